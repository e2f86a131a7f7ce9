// The functions of the CUDA runtime, and those of torch that only a torch with CUDA has.
#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>

#include "simt/fake_cuda/cuda_runtime_api.h"
#include "simt/fake_cuda/fake_cuda.h"
#include "simt/session.h"

namespace flashinfer_lite::simt {

FakeCuda& fake_cuda() {
  static FakeCuda fake;
  return fake;
}

void register_allocations() {
  Session* session = current_session();
  if (session == nullptr) return;
  GlobalMemory& memory = session->memory();
  for (const FakeMemory& each : fake_cuda().allocations) {
    if (memory.find(each.memory->data(), 1) != nullptr) continue;
    memory.add_buffer(each.memory->data(), each.memory->bytes(), "cudaMalloc's", true,
                      each.initialised);
  }
}

namespace {

cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

const FakeDevice* find_device(int index) {
  const auto found = fake_cuda().devices.find(index);
  return found == fake_cuda().devices.end() ? nullptr : &found->second;
}

}  // namespace
}  // namespace flashinfer_lite::simt

using flashinfer_lite::simt::fake_cuda;
using flashinfer_lite::simt::FakeDevice;
using flashinfer_lite::simt::FakeMemory;
using flashinfer_lite::simt::find_device;
using flashinfer_lite::simt::GuardedBuffer;

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
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
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

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, flashinfer_lite::simt::capture_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
}

// As on a GPU, a capture of any stream forbids this, unless the mode is relaxed.
cudaError_t cudaMalloc(void** data, size_t bytes) {
  auto& fake = fake_cuda();
  const bool captures = fake.capturing != ~uintptr_t{0};
  fake.last_error = fake.malloc_error;
  if (captures && flashinfer_lite::simt::capture_mode != cudaStreamCaptureModeRelaxed) {
    fake.last_error = cudaErrorStreamCaptureUnsupported;
  }
  if (fake.last_error != 0) return static_cast<cudaError_t>(fake.last_error);
  fake.allocations.push_back({fake.current_device, false, std::make_shared<GuardedBuffer>(bytes)});
  *data = fake.allocations.back().memory->data();
  return cudaSuccess;
}

// At once: what is launched on the stream is, too.
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t /*stream*/) {
  for (FakeMemory& each : fake_cuda().allocations) {
    each.initialised = each.initialised || each.memory->data() == data;
  }
  auto* session = flashinfer_lite::simt::current_session();
  if (session != nullptr) session->memory().set_written(data, bytes);
  std::fill_n(static_cast<uint8_t*>(data), bytes, static_cast<uint8_t>(value));
  return cudaSuccess;
}

// A capture of any stream forbids waiting, unless the mode is relaxed.
static cudaError_t wait() {
  const bool captures = fake_cuda().capturing != ~uintptr_t{0};
  const bool relaxed = flashinfer_lite::simt::capture_mode == cudaStreamCaptureModeRelaxed;
  return captures && !relaxed ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned /*flags*/) {
  *stream = nullptr;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t /*stream*/) { return wait(); }
cudaError_t cudaStreamDestroy(cudaStream_t /*stream*/) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return wait(); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind /*kind*/) {
  std::copy_n(static_cast<const uint8_t*>(from), bytes, static_cast<uint8_t*>(to));
  return wait();
}

cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(std::exchange(fake_cuda().last_error, 0));
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
