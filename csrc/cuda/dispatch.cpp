#include "cuda/dispatch.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace flashinfer_lite::cuda {
namespace {

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::runtime_error(text.str());
}

const char* text_of(ElementType element) {
  switch (element) {
    case ElementType::kFloat32:
      return "float32";
    case ElementType::kBFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

int64_t size_of(ElementType element) { return element == ElementType::kFloat32 ? 4 : 2; }

// The rows that could run, apart from shared memory: those of the smallest head_dim that is enough.
std::vector<const Instance*> candidates(const std::string& kernel, ElementType element,
                                        int64_t head_dim, const Device& device) {
  std::vector<const Instance*> found;
  for (int i = 0; i < kNumInstances; ++i) {
    const Instance& row = *kInstances[i];
    // sm80 rows run on whatever came later, sm90 rows on 9.0 alone.
    const bool runs = row.arch == 90 ? device.arch == 90 : device.arch >= row.arch;
    if (kernel != row.kernel || row.element != element || !runs || row.head_dim < head_dim)
      continue;
    if (!found.empty() && row.head_dim > found.front()->head_dim) continue;
    if (!found.empty() && row.head_dim < found.front()->head_dim) found.clear();
    found.push_back(&row);
  }
  return found;
}

uint32_t checked_blocks(const Instance& row, int64_t blocks) {
  if (blocks > std::numeric_limits<int32_t>::max()) {
    fail(row.name, ": expected at most 2147483647 thread blocks, got ", blocks,
         ": call it on parts of the batch");
  }
  return static_cast<uint32_t>(blocks);
}

// Blocks of a head's rows or keys. Where a ragged batch has its sequences nobody knows here: what
// is enough in any case, see tile/sequence.cuh.
int64_t blocks_per_head(const CudaAttentionParams& p, int64_t count, int64_t block) {
  return p.is_ragged() ? count / block + p.ragged.sequences + 2 : ceil_div(count, block);
}

// Sequences are told apart by where they begin: a batch stride is that of a row.
template <class Pointer>
void set_ragged_stride(const CudaAttentionParams& p, Strided<Pointer>& x) {
  if (p.is_ragged()) x.batch = x.seqlen;
}

// What one of the sequences has, of what all of them have.
int64_t mean_length(const CudaAttentionParams& p, int64_t count) {
  return p.is_ragged() ? ceil_div(count, std::max<int64_t>(p.ragged.sequences, 1)) : count;
}

// Whether 16-byte accesses may be used. The stride of a dimension of size 1 does not matter, but
// for seqlen: rows beyond the last have addresses too, and those must be aligned though nothing is
// read.
template <class Pointer>
bool rows_are_aligned(const Strided<Pointer>& x, int64_t batch_size, int64_t num_heads,
                      int64_t element_size) {
  const auto even = [&](int64_t size, int64_t stride) {
    return size <= 1 || stride * element_size % 16 == 0;
  };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && even(batch_size, x.batch) &&
         x.seqlen * element_size % 16 == 0 && even(num_heads, x.head);
}

// The kernels index rows and keys with 32 bits; offsets in memory have 64.
void check_sizes(const char* kernel, const CudaAttentionParams& p) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (p.seqlen_kv >= kMost) fail(kernel, ": expected less than 2^30 keys, got ", p.seqlen_kv);
  if (p.rows_per_kv_head() >= kMost) {
    fail(kernel, ": expected less than 2^30 rows (queries times the heads of a group), got ",
         p.rows_per_kv_head());
  }
  if (p.block_table.num_pages > INT32_MAX) {
    fail(kernel, ": expected less than 2^31 pages, got ", p.block_table.num_pages);
  }
  if (p.ragged.sequences >= kMost) {
    fail(kernel, ": expected less than 2^30 sequences, got ", p.ragged.sequences);
  }
}

// The candidates that shared memory has room for, in the table's order; throws if there is none.
std::vector<const Instance*> fitting(const std::string& kernel, ElementType element,
                                     int64_t head_dim, int64_t head_dim_v, const Device& device) {
  const int64_t widest = std::max(head_dim, head_dim_v);
  const auto rows = candidates(kernel, element, widest, device);
  if (rows.empty()) {
    fail(kernel, ": no kernel for head_dim ", widest, " in ", text_of(element),
         " on compute capability ", device.arch / 10, ".", device.arch % 10,
         " (built: 8.0 and up, head_dim to 256): impl='reference' runs there");
  }
  std::vector<const Instance*> found;
  for (const Instance* row : rows) {
    if (row->smem_bytes <= device.smem_optin) found.push_back(row);
  }
  if (found.empty()) {
    int64_t least = rows.front()->smem_bytes;
    for (const Instance* row : rows) least = std::min<int64_t>(least, row->smem_bytes);
    fail(kernel, ": head_dim ", widest, " in ", text_of(element), " needs ", least,
         " bytes of shared memory per thread block, the device offers ", device.smem_optin,
         ": impl='reference' runs there");
  }
  return found;
}

}  // namespace

const Instance& choose_attention(const std::string& kernel, ElementType element, int64_t head_dim,
                                 int64_t head_dim_v, const Device& device) {
  const auto rows = fitting(kernel, element, head_dim, head_dim_v, device);
  if (kernel == "attention_bwd") return *rows.front();
  // The most warps that shared memory lets a multiprocessor hold; at a tie the first of the table.
  const Instance* best = nullptr;
  int64_t most_warps = 0;
  for (const Instance* row : rows) {
    const int64_t warps = blocks_per_sm(row->smem_bytes, device.smem_per_sm) * row->num_warps;
    if (warps > most_warps) best = row;
    most_warps = std::max(warps, most_warps);
  }
  return *best;
}

void set_derived(CudaAttentionParams& p, ElementType element) {
  const int64_t size = size_of(element);
  constexpr double kLog2E = 1.44269504088896340736;
  p.scale_log2 = static_cast<float>(p.softmax_scale * kLog2E);
  if (p.softcap != 0) {
    p.to_cap = static_cast<float>(p.softmax_scale / p.softcap);
    p.from_cap = static_cast<float>(p.softcap * kLog2E);
  }
  // In float32 arithmetic, as the kernels turn the phi of each head.
  constexpr float kMost = std::numeric_limits<float>::max();
  const auto phi = static_cast<float>(std::clamp<double>(p.phi, -kMost, kMost));
  p.phi_log2 = std::clamp(phi * static_cast<float>(kLog2E), -kMost, kMost);
  p.group = Divisor(static_cast<int32_t>(p.group_size()));
  p.rows = static_cast<int32_t>(p.rows_per_kv_head());
  // float32 too: there a row of one key must give exactly its value, which a scale inside the
  // exponential does not.
  p.scale_first = size == 4 || p.softcap != 0 || p.alibi.slopes != nullptr ||
                  p.mask.type != MaskType::kNone || !(p.softmax_scale > 0);
  p.vector_q = rows_are_aligned(p.q, p.batch_size, p.num_heads_q, size);
  const bool paged = p.device_block_table.data != nullptr;
  const int64_t outer = paged ? p.block_table.num_pages : p.batch_size;
  p.vector_k = rows_are_aligned(p.k, outer, p.num_heads_kv, size);
  p.vector_v = rows_are_aligned(p.v, outer, p.num_heads_kv, size);
  p.vector_out = rows_are_aligned(p.out, p.batch_size, p.num_heads_q, size);
  set_ragged_stride(p, p.q);
  set_ragged_stride(p, p.k);
  set_ragged_stride(p, p.v);
  set_ragged_stride(p, p.out);
}

const Instance& instance_named(const std::string& name) {
  for (int i = 0; i < kNumInstances; ++i) {
    if (name == kInstances[i]->name) return *kInstances[i];
  }
  fail("no instance is named ", name);
}

Status run_attention_fwd(CudaAttentionParams& p, const Instance& row, const Device& device,
                         Stream stream) {
  check_sizes("attention_fwd", p);
  const int64_t heads = p.batch_size * p.num_heads_kv;
  const int64_t keys = mean_length(p, p.seqlen_kv);
  const int64_t bytes_per_head = keys * (p.head_dim + p.head_dim_v) * size_of(row.element);
  set_derived(p, row.element);
  p.num_m_blocks = blocks_per_head(p, p.rows_per_kv_head(), row.block_m);
  p.heads_per_section = heads_per_section(heads, bytes_per_head, device.l2_bytes);
  if (checked_blocks(row, p.num_m_blocks * heads) == 0) return 0;
  return row.launch(&p, stream);
}

BackwardMemory backward_memory(const CudaAttentionBwdParams& p, const Instance& row) {
  BackwardMemory m;
  m.padded_rows = blocks_per_head(p, p.rows_per_kv_head(), row.block_m) * row.block_m;
  const int64_t rows = p.batch_size * p.num_heads_kv * m.padded_rows;
  m.row_stats = rows * 2;
  m.dq_accum = rows * row.head_dim;
  return m;
}

Status run_attention_bwd(CudaAttentionBwdParams& p, const Instance& row, const Device& device,
                         Stream stream) {
  check_sizes("attention_bwd", p);
  set_derived(p, row.element);
  const int64_t size = size_of(row.element);
  p.grad_scale = static_cast<float>(p.softmax_scale);
  p.vector_dout = rows_are_aligned(p.dout, p.batch_size, p.num_heads_q, size);
  p.vector_dq = rows_are_aligned(p.dq, p.batch_size, p.num_heads_q, size);
  p.vector_dk = rows_are_aligned(p.dk, p.batch_size, p.num_heads_kv, size);
  p.vector_dv = rows_are_aligned(p.dv, p.batch_size, p.num_heads_kv, size);
  set_ragged_stride(p, p.dout);
  set_ragged_stride(p, p.dq);
  set_ragged_stride(p, p.dk);
  set_ragged_stride(p, p.dv);
  p.padded_rows = backward_memory(p, row).padded_rows;

  const int64_t heads = p.batch_size * p.num_heads_kv;
  const int64_t columns = p.head_dim + p.head_dim_v;
  const auto run = [&](CudaBwdPass pass, int64_t blocks_per_head, int64_t shared_bytes) {
    p.pass = pass;
    p.num_m_blocks = blocks_per_head;
    p.heads_per_section = heads_per_section(heads, shared_bytes, device.l2_bytes);
    return checked_blocks(row, blocks_per_head * heads) == 0 ? 0 : row.launch(&p, stream);
  };
  // What the thread blocks of a head all read: the rows those of keys, the keys those of rows.
  const int64_t row_bytes = mean_length(p, p.padded_rows) * (columns * size + row.head_dim * 4);
  const int64_t key_bytes = mean_length(p, p.seqlen_kv) * columns * size;
  const int64_t row_blocks = p.padded_rows / row.block_m;
  const bool atomic = p.dq_accum != nullptr;
  Status status = run(CudaBwdPass::kRows, row_blocks, row_bytes);
  if (status == 0) {
    status = run(CudaBwdPass::kKeys, blocks_per_head(p, p.seqlen_kv, row.block_n), row_bytes);
  }
  if (status == 0) {
    status = atomic ? run(CudaBwdPass::kFinish, row_blocks, row_bytes)
                    : run(CudaBwdPass::kQueries, row_blocks, key_bytes);
  }
  if (status == 0 && p.dmask.data != nullptr) {
    status = run(CudaBwdPass::kMask, row_blocks, key_bytes);
  }
  return status;
}

DecodePlan plan_decode(const CudaAttentionParams& p, ElementType element, const Device& device,
                       int64_t kv_splits, bool batch_invariant) {
  check_sizes("decode", p);
  DecodePlan plan;
  plan.instance = &choose_attention("decode", element, p.head_dim, p.head_dim_v, device);
  if (batch_invariant) {
    plan.kv_splits = std::max<int64_t>(ceil_div(p.seqlen_kv, kBatchInvariantSplit), 1);
    plan.keys_per_split = kBatchInvariantSplit;
    return plan;
  }
  if (kv_splits == 0) {
    const int64_t work =
        p.batch_size * p.num_heads_kv * ceil_div(p.rows_per_kv_head(), plan.instance->block_m);
    // Two resident blocks each: more of them would want more splits; not measured yet.
    const int64_t resident =
        std::min<int64_t>(blocks_per_sm(plan.instance->smem_bytes, device.smem_per_sm), 2);
    kv_splits = cuda_kv_splits(work, device.num_sms * resident, p.seqlen_kv);
  }
  plan.kv_splits = kv_splits;
  return plan;
}

int64_t num_tickets(const CudaAttentionParams& p, const DecodePlan& plan) {
  if (!p.unified || plan.kv_splits == 1) return 0;
  return p.batch_size * p.num_heads_kv * ceil_div(p.rows_per_kv_head(), plan.instance->block_m);
}

Status run_decode(CudaAttentionParams& p, const DecodePlan& plan, Stream stream) {
  const Instance& row = *plan.instance;
  set_derived(p, row.element);
  p.kv_splits = plan.kv_splits;
  p.keys_per_split = plan.keys_per_split;
  p.num_m_blocks = ceil_div(p.rows_per_kv_head(), row.block_m);
  const int64_t blocks = p.num_m_blocks * p.num_heads_kv * p.batch_size * p.kv_splits;
  if (checked_blocks(row, blocks) == 0) return 0;
  return row.launch(&p, stream);
}

Status run_combine(const CombineParams& p, ElementType element, const Device& device,
                   Stream stream) {
  const ElementType partial = p.partial_in_accumulator ? ElementType::kFloat32 : element;
  for (int i = 0; i < kNumInstances; ++i) {
    const Instance& row = *kInstances[i];
    if (std::string("combine") != row.kernel || device.arch < row.arch) continue;
    if (row.element != element || row.partial != partial) continue;
    const int64_t warps =
        p.batch_size * p.seqlen_q * p.num_heads_q * ceil_div(p.head_dim_v, kMergedColumns);
    if (checked_blocks(row, ceil_div(warps, 4)) == 0) return 0;
    return row.launch(&p, stream);
  }
  fail("combine: no kernel for ", text_of(element), " from ", text_of(partial),
       " on compute capability ", device.arch / 10, ".", device.arch % 10);
}

Status run_append_kv(const CudaAppendKvParams& p, ElementType element, const Device& device,
                     Stream stream) {
  for (int i = 0; i < kNumInstances; ++i) {
    const Instance& row = *kInstances[i];
    if (std::string("append_kv") != row.kernel || device.arch < row.arch) continue;
    if (row.element != element) continue;
    const int64_t warps = p.batch_size * p.seqlen_new * p.num_heads_kv;
    if (checked_blocks(row, ceil_div(warps, 4)) == 0) return 0;
    return row.launch(&p, stream);
  }
  fail("append_kv: no kernel for ", text_of(element), " on compute capability ", device.arch / 10,
       ".", device.arch % 10);
}

CombineParams combine_of(const CudaAttentionParams& p) {
  CombineParams c;
  c.num_states = p.kv_splits;
  c.batch_size = p.batch_size;
  c.seqlen_q = p.seqlen_q;
  c.num_heads_q = p.num_heads_q;
  c.head_dim_v = p.head_dim_v;
  c.out_partial.data = p.out_partial;
  c.out_partial.head = p.head_dim_v;
  c.out_partial.seqlen = p.num_heads_q * p.head_dim_v;
  c.out_partial.batch = p.seqlen_q * c.out_partial.seqlen;
  c.out_partial_state = p.batch_size * c.out_partial.batch;
  c.lse_partial = p.lse_partial;
  c.lse_partial_seqlen = 1;
  c.lse_partial_head = p.seqlen_q;
  c.lse_partial_batch = p.num_heads_q * p.seqlen_q;
  c.lse_partial_state = p.batch_size * c.lse_partial_batch;
  c.out = p.out;
  c.lse = p.lse;
  return c;
}

}  // namespace flashinfer_lite::cuda
