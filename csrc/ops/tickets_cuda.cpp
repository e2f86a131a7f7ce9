// Tickets: the counters by which the thread blocks of a launch find out who arrives last.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "ops/runtime_cuda.h"

namespace flashinfer_lite {
namespace {

constexpr int64_t kFewest = 256;  // of a buffer that lives on; decode's own splits take fewer

struct Buffer {
  uint32_t* data = nullptr;
  int64_t count = 0;
};

void check_cuda(cudaError_t error, const char* what) {
  check(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

void set_to_zero(void* data, int64_t count, Stream stream) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(uint32_t);
  check_cuda(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)),
             "cudaMemsetAsync of tickets");
}

// The stream's own buffer, zeroed when made; null if there is no memory for it. The launches of a
// stream run one after another, and each leaves its tickets at 0. None is freed: what is under way
// may still use it, and the next is twice as large.
uint32_t* stream_tickets(const CudaContext& context, int64_t count) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, unsigned long long>, Buffer> buffers;
  unsigned long long id = 0;  // a handle may come again, an id does not
  check_cuda(cudaStreamGetId(static_cast<cudaStream_t>(context.stream), &id), "cudaStreamGetId");
  const std::lock_guard lock(mutex);
  Buffer& buffer = buffers[{&context.device, id}];
  if (buffer.count >= count) return buffer.data;
  const int64_t more = std::max({count, 2 * buffer.count, kFewest});
  auto* data = static_cast<uint32_t*>(allocate_for_good(more * int64_t{sizeof(uint32_t)}));
  if (data == nullptr) return nullptr;
  set_to_zero(data, more, context.stream);
  buffer = {data, more};
  return data;
}

}  // namespace

Tickets cuda_tickets(const CudaContext& context, const Tensor& like, int64_t count) {
  if (!is_capturing(context.stream)) {
    if (uint32_t* data = stream_tickets(context, count)) return {data, {}};
  }
  Tensor own = new_tensor(like, {count}, ScalarType::Int);
  set_to_zero(own.data_ptr(), count, context.stream);
  return {static_cast<uint32_t*>(own.data_ptr()), own};
}

}  // namespace flashinfer_lite
