// The functions of the CUDA runtime, and those of torch that only a torch with CUDA has.
#include <cstdio>

#include "simt/fake_cuda/cuda_runtime_api.h"
#include "simt/fake_cuda/fake_cuda.h"

namespace flashinfer_lite::simt {

FakeCuda& fake_cuda() {
  static FakeCuda fake;
  return fake;
}

namespace {

const FakeDevice* find_device(int index) {
  const auto found = fake_cuda().devices.find(index);
  return found == fake_cuda().devices.end() ? nullptr : &found->second;
}

}  // namespace
}  // namespace flashinfer_lite::simt

using flashinfer_lite::simt::fake_cuda;
using flashinfer_lite::simt::FakeDevice;
using flashinfer_lite::simt::find_device;

extern "C" {

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int index) {
  const FakeDevice* device = find_device(index);
  if (device == nullptr) return cudaErrorInvalidValue;
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device->arch / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device->arch % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = device->num_sms;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device->smem_optin;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device->smem_per_sm;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = device->l2_bytes;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  const FakeDevice* device = find_device(index);
  if (device == nullptr) return cudaErrorInvalidValue;
  std::snprintf(properties->name, sizeof properties->name, "%s", device->name.c_str());
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
  }
  return "unrecognized error code";
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool is = reinterpret_cast<uintptr_t>(stream) == fake_cuda().capturing;
  *status = is ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake_cuda().driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = fake_cuda().runtime_version;
  return cudaSuccess;
}

// torch's C interface, 0 = success. The linker prefers these to torch's own, in this library alone.

int32_t aoti_torch_get_data_ptr(void* tensor, void** data);  // torch's own

int32_t aoti_torch_get_device_type(void* /*tensor*/, int32_t* type) {
  constexpr int32_t kCuda = 1;
  *type = kCuda;
  return 0;
}

int32_t aoti_torch_get_device_index(void* tensor, int32_t* index) {
  void* data = nullptr;
  const int32_t error = aoti_torch_get_data_ptr(tensor, &data);
  const auto found = fake_cuda().tensors.find(reinterpret_cast<uintptr_t>(data));
  *index = found == fake_cuda().tensors.end() ? 0 : found->second;
  return error;
}

int32_t aoti_torch_create_device_guard(int32_t index, void** guard) {
  *guard = new int(fake_cuda().current_device);
  fake_cuda().current_device = index;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void* guard) {
  const int* before = static_cast<int*>(guard);
  fake_cuda().current_device = *before;
  delete before;
  return 0;
}

int32_t aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  *stream = reinterpret_cast<void*>(fake_cuda().streams[index]);
  return 0;
}

}  // extern "C"
