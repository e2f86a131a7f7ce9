#include "cuda/flat_linear.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "common/heuristics.h"

namespace flashinfer_lite::cuda {
namespace {

constexpr int64_t kElementSize = 2;  // bytes

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::runtime_error(text.str());
}

// The kernels index rows and columns with 32 bits; offsets in memory have 64.
void check_sizes(const FlatLinearParams& p) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const int64_t largest = std::max({p.m, p.n, p.k});
  if (largest >= kMost) fail("flat_linear: expected M, N and K below 2^30, got ", largest);
}

// Whether every row begins on `bytes`, those behind the last too: they have addresses.
bool rows_are_aligned(const void* data, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0 &&
         stride * kElementSize % bytes == 0;
}

}  // namespace

const Instance& choose_flat_linear(FlatLinearKernel kernel, ElementType element, int64_t m,
                                   const Device& device) {
  const std::string name = kernel == FlatLinearKernel::kGemv ? "gemv" : "flat_gemm";
  const Instance* best = nullptr;
  for (int i = 0; i < kNumInstances; ++i) {
    const Instance& row = *kInstances[i];
    if (name != row.kernel || row.element != element || device.arch < row.arch) continue;
    if (row.smem_bytes > device.smem_optin) continue;
    const bool enough = best != nullptr && best->block_m >= m;
    const bool better = best == nullptr || (enough ? row.block_m >= m && row.block_m < best->block_m
                                                   : row.block_m > best->block_m);
    if (better) best = &row;
  }
  if (best == nullptr) {
    fail(name, ": no kernel for compute capability ", device.arch / 10, ".", device.arch % 10,
         " with ", device.smem_optin,
         " bytes of shared memory per thread block: impl='vendor' runs there");
  }
  return *best;
}

FlatLinearPlan plan_flat_linear(const FlatLinearParams& p, const Instance& row, int64_t splits) {
  check_sizes(p);
  FlatLinearPlan plan;
  plan.instance = &row;
  plan.rows_per_launch = p.m;
  plan.num_n_blocks = ceil_div(p.n, row.block_n);
  if (row.block_k > 0) {  // gemv is not split
    plan.splits = splits > 0 ? splits : flat_gemm_splits(p.n, p.k);
    plan.k_per_split = ceil_div(ceil_div(p.k, kFlatGemmStep), plan.splits) * kFlatGemmStep;
    if (plan.splits > 1) plan.rows_per_launch = std::min(p.m, kFlatGemmRowsPerLaunch);
  }
  plan.num_m_blocks = ceil_div(plan.rows_per_launch, row.block_m);
  if (plan.num_blocks() > std::numeric_limits<int32_t>::max()) {
    fail(row.name, ": expected at most 2147483647 thread blocks, got ", plan.num_blocks(),
         ": call it on parts of x");
  }
  return plan;
}

Status run_flat_linear(CudaFlatLinearParams& p, const FlatLinearPlan& plan, Stream stream) {
  if (p.m <= 1) p.x_row = p.out_row = 0;  // and any stride is even
  if (p.n <= 1) p.weight_row = 0;
  p.vector_x = rows_are_aligned(p.x, p.x_row, 16);
  p.vector_weight = rows_are_aligned(p.weight, p.weight_row, 16);
  p.vector_out = rows_are_aligned(p.out, p.out_row, 8);
  p.num_n_blocks = plan.num_n_blocks;
  p.splits = plan.splits;
  p.k_per_split = plan.k_per_split;
  if (plan.num_blocks() == 0) return 0;
  Status status = 0;
  for (int64_t first = 0; first < p.m && status == 0; first += plan.rows_per_launch) {
    CudaFlatLinearParams part = p;
    part.m = std::min(p.m - first, plan.rows_per_launch);
    part.num_m_blocks = ceil_div(part.m, plan.instance->block_m);
    part.x = static_cast<const char*>(p.x) + first * p.x_row * kElementSize;
    part.out = static_cast<char*>(p.out) + first * p.out_row * kElementSize;
    status = plan.instance->launch(&part, stream);
  }
  return status;
}

}  // namespace flashinfer_lite::cuda
