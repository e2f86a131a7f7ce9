// From the parameters of an op and a device to a launch: which instance, how many splits, in which
// order. Host code without torch or CUDA headers, shared by the ops and the executor's module.
#pragma once

#include <string>

#include "common/params/append_kv_cuda.h"
#include "common/params/attention_cuda.h"
#include "cuda/instance.h"

namespace flashinfer_lite::cuda {

// What the choices depend on besides the problem; read once from the driver, or made up by a test.
struct Device {
  int arch = 0;  // 10 * major + minor
  int num_sms = 0;
  int64_t smem_optin = 0;   // bytes of shared memory that one block may ask for
  int64_t smem_per_sm = 0;  // bytes
  int64_t l2_bytes = 0;
};

// Of the rows with the smallest head_dim that holds both head sizes, the one that keeps the most
// warps on a multiprocessor, then the table's order; of attention_bwd, where warps wait less for
// each other than for shared memory, the first that fits. Throws std::runtime_error naming the
// sizes if none does.
const Instance& choose_attention(const std::string& kernel, ElementType element, int64_t head_dim,
                                 int64_t head_dim_v, const Device& device);

// Fills what follows from the rest: alignment, group, rows, scales.
void set_derived(CudaAttentionParams& p, ElementType element);

// The row of that name; throws if there is none.
const Instance& instance_named(const std::string& name);

// attention_fwd with the row that choose_attention gives, or another of the same kernel.
Status run_attention_fwd(CudaAttentionParams& p, const Instance& row, const Device& device,
                         Stream stream);

// The working memory of a backward, in floats: row_stats and, unless deterministic, dq_accum.
struct BackwardMemory {
  int64_t padded_rows = 0;
  int64_t row_stats = 0;
  int64_t dq_accum = 0;
};
BackwardMemory backward_memory(const CudaAttentionBwdParams& p, const Instance& row);

// attention_bwd: all of its launches. dQ is added up by atomics if there is a dq_accum; dmask must
// be 0 before, or absent.
Status run_attention_bwd(CudaAttentionBwdParams& p, const Instance& row, const Device& device,
                         Stream stream);

struct DecodePlan {
  const Instance* instance = nullptr;
  int64_t kv_splits = 1;
  int64_t keys_per_split = 0;  // 0: an equal part of each sequence's own length
};

// kv_splits 0 chooses. Depends on sizes alone, not on the values of the lengths.
DecodePlan plan_decode(const CudaAttentionParams& p, ElementType element, const Device& device,
                       int64_t kv_splits, bool batch_invariant);

// How many of p.tickets run_decode uses: with a unified maximum, where the plan splits.
int64_t num_tickets(const CudaAttentionParams& p, const DecodePlan& plan);

// decode into out and lse, or, if the plan splits, into out_partial and lse_partial (float32, laid
// out as AttentionFwdParams says), which run_combine then merges; with a unified maximum those (and
// row_max_partial) are working memory and out and lse are complete.
Status run_decode(CudaAttentionParams& p, const DecodePlan& plan, Stream stream);

Status run_combine(const CombineParams& p, ElementType element, const Device& device,
                   Stream stream);

Status run_append_kv(const CudaAppendKvParams& p, ElementType element, const Device& device,
                     Stream stream);

// The merge of run_decode's partials into p.out and p.lse.
CombineParams combine_of(const CudaAttentionParams& p);

}  // namespace flashinfer_lite::cuda
