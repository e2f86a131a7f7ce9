// Checks of ragged batches beyond those of attention, for both halves of the library.
//
// Sequences lie behind one another in [total, num_heads, head_dim]; sequence b is the rows from
// cu_seqlens[b] to cu_seqlens[b + 1]. Rows outside of all of them are tails: they see no key. Keys
// in pages are where row b of the table says, and cu_seqlens_kv only tells how many there are.
#pragma once

#include <limits>

#include "ops/attention.h"

namespace flashinfer_lite {

struct RaggedArgs {
  const Tensor& cu_seqlens_q;   // [batch + 1]
  const Tensor& cu_seqlens_kv;  // [batch + 1]
  std::optional<int64_t> max_seqlen_q, max_seqlen_kv;
};

// What shows without reading the offsets. Returns how many sequences there are.
inline int64_t check_ragged(const RaggedArgs& r, const Tensor& q) {
  const Tensor& cu = r.cu_seqlens_q;
  check(cu.dim() == 1 && cu.size(0) > 0, "cu_seqlens_q: expected shape [batch + 1], got ",
        shape_text(cu));
  check_lengths("cu_seqlens_q", cu, q, cu.size(0));
  check_lengths("cu_seqlens_kv", r.cu_seqlens_kv, q, cu.size(0));
  for (const auto& [name, x] :
       {std::pair<const char*, const std::optional<int64_t>&>{"max_seqlen_q", r.max_seqlen_q},
        {"max_seqlen_kv", r.max_seqlen_kv}}) {
    check(x.value_or(0) >= 0, name, ": expected at least 0, got ", x.value_or(0));
  }
  return cu.size(0) - 1;
}

// The values of a tensor of offsets in host memory that passed check_ragged, checked: they ascend
// within [0, total], and no two are further apart than `longest`.
inline std::vector<int64_t> offset_values(const char* name, const Tensor& x, int64_t total,
                                          const char* longest_name,
                                          std::optional<int64_t> longest) {
  std::vector<int64_t> values = length_values(x);
  for (size_t i = 0; i < values.size(); ++i) {
    check(values[i] >= 0 && values[i] <= total, name, ": expected values in [0, ", total, "], got ",
          values[i], " at ", i);
    if (i == 0) continue;
    check(values[i] >= values[i - 1], name, ": expected ascending values, got ", values[i], " at ",
          i, " after ", values[i - 1]);
    const int64_t length = values[i] - values[i - 1];
    check(!longest || length <= *longest, longest_name, ": expected at least ", length,
          ", the length of sequence ", i - 1, ", got ", longest.value_or(0));
  }
  return values;
}

// Where the sequences lie, and which keys of each are visible.
struct Ragged {
  // From tensors in host memory that passed their checks; checks their values.
  Ragged(const RaggedArgs& r, const AttentionArgs& a, const AttentionParams& p)
      : q(offset_values("cu_seqlens_q", r.cu_seqlens_q, p.seqlen_q, "max_seqlen_q",
                        r.max_seqlen_q)),
        kv(offset_values("cu_seqlens_kv", r.cu_seqlens_kv,
                         a.block_table ? std::numeric_limits<int64_t>::max() : p.seqlen_kv,
                         "max_seqlen_kv", r.max_seqlen_kv)) {
    for (int64_t b = 0; a.block_table && b < batch_size(); ++b) {
      check(kv[b + 1] - kv[b] <= p.seqlen_kv, "cu_seqlens_kv: expected at most ", p.seqlen_kv,
            " keys in each sequence, as many as its pages have slots, got ", kv[b + 1] - kv[b],
            " at batch ", b);
    }
    read_lengths(lengths, a.kv_start, a.seqlens_kv, [&](int64_t b) { return kv[b + 1] - kv[b]; });
  }

  int64_t batch_size() const { return static_cast<int64_t>(q.size()) - 1; }

  std::vector<int64_t> q, kv;  // [batch + 1]
  Lengths lengths;
};

}  // namespace flashinfer_lite
