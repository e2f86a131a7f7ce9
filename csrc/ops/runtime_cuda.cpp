#include "ops/runtime_cuda.h"

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <limits>
#include <mutex>

namespace flashinfer_lite {
namespace {

constexpr int kMaxDevices = 128;

const char* error_text(Status status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

// What a launch that failed for want of machine code is to be told; else empty.
std::string launch_way_out(Status status, const CudaContext& context) {
  if (status != cudaErrorNoKernelImageForDevice) return "";
  const int arch = context.device.arch;
  return "; rebuild with TORCH_CUDA_ARCH_LIST=" + std::to_string(arch / 10) + "." +
         std::to_string(arch % 10) + ", the capability of this device";
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, index);
  check(error == cudaSuccess, "cuda:", index, ": no device properties: ", error_text(error));
  return value;
}

std::string device_name(int index) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, index);
  return error == cudaSuccess ? properties.name : error_text(error);
}

cuda::Device read_device(int index) {
  cuda::Device device;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  check(major >= 8, "expected compute capability 8.0 or higher, got ", major, ".", minor, " (",
        device_name(index), "): flashinfer_lite.reference runs there");
  device.arch = 10 * major + minor;
  device.num_sms = attribute(cudaDevAttrMultiProcessorCount, index);
  device.smem_optin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  device.smem_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  device.l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
  return device;
}

// Read once per device; a failure is thrown again by the next call.
const cuda::Device& device_at(int index) {
  static std::once_flag once[kMaxDevices];
  static cuda::Device devices[kMaxDevices];
  check(index >= 0 && index < kMaxDevices, "expected a device index below ", kMaxDevices, ", got ",
        index);
  std::call_once(once[index], [&] { devices[index] = read_device(index); });
  return devices[index];
}

Stream current_stream(int index) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(index, &stream);
  check(error == AOTI_TORCH_SUCCESS, "cuda:", index, ": torch gave no current stream");
  return stream;
}

bool value_checks_are_on() {
  static const bool wanted = [] {
    const char* text = std::getenv("FLASHINFER_LITE_CHECK");
    const std::string value = text ? text : "";
    check(value.empty() || value == "0" || value == "1",
          "FLASHINFER_LITE_CHECK: expected 0 or 1, got ", value);
    return value == "1";
  }();
  return wanted;
}

void check_length_values(const AttentionParams& p, const AttentionArgs& args) {
  AttentionParams host = p;
  Lengths lengths;
  set_lengths(host, lengths, on_host(args.kv_start), on_host(args.seqlens_kv));
  set_pages(host, lengths, on_host(args.block_table));
}

// Why the CUDA half cannot run with the driver that is here; empty if it can. Within a major
// version any driver runs any runtime. No driver at all is no error: such a machine has no CUDA
// tensors either, and the registrations are of use for export.
std::string cuda_version_error() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "";
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) return "";
  if (driver / 1000 >= runtime / 1000) return "";
  const auto text = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  return "driver " + text(driver) + " is older than the runtime " + text(runtime) +
         " this library was built with: update the driver or rebuild";
}

// The names of the compiled instances, in the order that plan() counts them.
std::string cuda_instances() {
  std::string names;
  for (int i = 0; i < cuda::kNumInstances; ++i) {
    if (i > 0) names += ' ';
    names += cuda::kInstances[i]->name;
  }
  return names;
}

}  // namespace

CudaContext::CudaContext(const Tensor& x)
    : guard(x.get_device_index()),
      device(device_at(x.get_device_index())),
      stream(current_stream(x.get_device_index())) {}

cuda::ElementType cuda_element_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return cuda::ElementType::kFloat32;
    case ScalarType::BFloat16:
      return cuda::ElementType::kBFloat16;
    case ScalarType::Half:
      return cuda::ElementType::kFloat16;
    default:
      fail("expected float32, bfloat16 or float16, got ", dtype_text(type));
  }
}

void set_cuda_params(CudaAttentionParams& p, const AttentionArgs& args) {
  set_params(p, args, DeviceType::CUDA);
  if (!args.kv_start && !args.seqlens_kv && !args.block_table) return;
  if (args.kv_start) p.device_kv_start = lengths_view(*args.kv_start);
  if (args.seqlens_kv) p.device_seqlens_kv = lengths_view(*args.seqlens_kv);
  if (args.block_table) p.device_block_table = block_table_view(*args.block_table);
  if (!args.ragged() && wants_value_checks(args.q)) check_length_values(p, args);
}

LengthsView lengths_view(const Tensor& x) {
  return {x.data_ptr(), x.scalar_type() == ScalarType::Long, x.stride(0)};
}

BlockTableView block_table_view(const Tensor& x) {
  return {x.data_ptr(), x.scalar_type() == ScalarType::Long, x.stride(0), x.stride(1)};
}

bool wants_value_checks(const Tensor& x) {
  return value_checks_are_on() && !is_capturing(current_stream(x.get_device_index()));
}

std::optional<Tensor> on_host(const std::optional<Tensor>& x) {
  if (!x) return {};
  return torch::stable::to(*x, torch::stable::Device(DeviceType::CPU));
}

bool finish_without_keys(Outputs& outputs, int64_t num_keys) {
  if (outputs.lse.numel() == 0) return true;
  if (num_keys > 0) return false;
  torch::stable::zero_(outputs.out);
  torch::stable::fill_(outputs.lse, -std::numeric_limits<double>::infinity());
  return true;
}

void check_launch(Status status, const CudaContext& context, const cuda::Instance& instance,
                  int64_t blocks) {
  check(status == cudaSuccess, instance.name, ": launch failed: ", error_text(status), " (", blocks,
        " blocks of ", 32 * instance.num_warps, " threads with ", instance.smem_bytes,
        " bytes of shared memory)", launch_way_out(status, context));
}

void check_combine(Status status, const CudaContext& context, const CombineParams& p) {
  check(status == cudaSuccess, "combine: launch failed: ", error_text(status), " (", p.num_states,
        " states of ", p.batch_size, " * ", p.seqlen_q, " * ", p.num_heads_q, " rows of ",
        p.head_dim_v, ")", launch_way_out(status, context));
}

void check_append_kv(Status status, const CudaContext& context, const AppendKvParams& p) {
  check(status == cudaSuccess, "append_kv: launch failed: ", error_text(status), " (", p.batch_size,
        " * ", p.seqlen_new, " tokens of ", p.num_heads_kv, " heads)",
        launch_way_out(status, context));
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  check(error == cudaSuccess, "cudaStreamIsCapturing: ", error_text(error));
  return status != cudaStreamCaptureStatusNone;
}

RelaxedCapture::RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
RelaxedCapture::~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

void* allocate_for_good(int64_t bytes) {
  const RelaxedCapture relaxed;
  void* data = nullptr;
  if (cudaMalloc(&data, static_cast<size_t>(bytes)) == cudaSuccess) return data;
  cudaGetLastError();  // or the next who asks is told of it
  return nullptr;
}

}  // namespace flashinfer_lite

STABLE_TORCH_LIBRARY_IMPL(flashinfer_lite, CompositeExplicitAutograd, m) {
  m.impl("cuda_version_error", FIL_BOX(flashinfer_lite::cuda_version_error));
  m.impl("cuda_instances", FIL_BOX(flashinfer_lite::cuda_instances));
}
