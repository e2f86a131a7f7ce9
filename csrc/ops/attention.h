// From the tensors of an attention call to checked AttentionParams, for both halves of the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "common/params/attention.h"
#include "ops/check.h"

namespace flashinfer_lite {

// How ops spell causal: the schema's int.
enum class Causal : int64_t { kNone = 0, kBottomRight = 1, kTopLeft = 2 };

inline const std::optional<Tensor> kNoTensor;

// What every attention op takes besides its outputs, in the order of the schemas. The tensors of a
// ragged batch have no batch dimension and count as those of one sequence; pages have theirs.
struct AttentionArgs {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& kv_start;
  const std::optional<Tensor>& seqlens_kv;
  double softmax_scale;
  double softcap;
  int64_t causal;
  int64_t window_left;
  int64_t window_right;
  const std::optional<Tensor>& block_table = kNoTensor;
  const std::optional<Tensor>& alibi_slopes = kNoTensor;
  std::optional<int64_t> sequences = {};  // how many a ragged batch has; none: it is not ragged

  bool ragged() const { return sequences.has_value(); }
  int64_t batch_size() const { return ragged() ? *sequences : q.size(0); }
};

// [num_heads_q] or [batch, num_heads_q].
inline AlibiView alibi_view(const Tensor& slopes, const AttentionArgs& a, int64_t num_heads_q) {
  check_device("alibi_slopes", slopes, "q's", a.q);
  check_dtype("alibi_slopes", slopes, ScalarType::Float);
  const int64_t dims = slopes.dim();
  const bool fits = (dims == 1 || (dims == 2 && slopes.size(0) == a.batch_size())) &&
                    slopes.size(dims - 1) == num_heads_q;
  check(fits, "alibi_slopes: expected shape [", num_heads_q, "] or [", a.batch_size(), ", ",
        num_heads_q, "], got ", shape_text(slopes));
  return {static_cast<const float*>(slopes.data_ptr()), dims == 2 ? slopes.stride(0) : 0,
          slopes.stride(dims - 1)};
}

// The unified maximum of the softmax; neither is the online softmax.
struct PhiArgs {
  const std::optional<double>& phi;
  const std::optional<Tensor>& phi_heads;
};

template <class Pointer>
void set_strided(Strided<Pointer>& view, const Tensor& x) {
  const int64_t dims = x.dim();
  view.data = x.data_ptr();
  view.batch = dims == 4 ? x.stride(0) : 0;
  view.seqlen = x.stride(dims - 3);
  view.head = x.stride(dims - 2);
}

// check_shape for [batch, seqlen, num_heads, head_dim], or without the batch where it is ragged.
inline void check_rows_shape(const char* name, const Tensor& x, bool ragged, int64_t batch_size,
                             int64_t seqlen, int64_t num_heads, int64_t head_dim) {
  if (ragged) return check_shape(name, x, {seqlen, num_heads, head_dim});
  check_shape(name, x, {batch_size, seqlen, num_heads, head_dim});
}

inline MaskType mask_type(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
      return MaskType::kBool;
    case ScalarType::Double:
      return MaskType::kFloat64;
    case ScalarType::Float:
      return MaskType::kFloat32;
    case ScalarType::BFloat16:
      return MaskType::kBFloat16;
    case ScalarType::Half:
      return MaskType::kFloat16;
    default:
      fail("mask: expected dtype bool or floating point, got ", dtype_text(type));
  }
}

inline MaskView mask_view(const Tensor& mask, const AttentionParams& p) {
  const int64_t full[4] = {p.batch_size, p.num_heads_q, p.seqlen_q, p.seqlen_kv};
  int64_t stride[4];
  bool fits = mask.dim() == 4;
  for (int64_t i = 0; fits && i < 4; ++i) {
    fits = mask.size(i) == full[i] || mask.size(i) == 1;
    stride[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
  }
  check(fits, "mask: expected a shape that broadcasts to [", full[0], ", ", full[1], ", ", full[2],
        ", ", full[3], "], got ", shape_text(mask));
  return {mask.data_ptr(), mask_type(mask.scalar_type()), stride[0], stride[1], stride[2],
          stride[3]};
}

// What shows on the table of a paged cache, `cache`, without reading it; it is where `like` is.
// Returns how many slots a sequence has.
inline int64_t check_block_table(const Tensor& table, const Tensor& like, int64_t batch_size,
                                 const Tensor& cache) {
  check_device("block_table", table, "q's", like);
  check(table.dim() == 2 && table.size(0) == batch_size, "block_table: expected shape [",
        batch_size, ", pages], got ", shape_text(table));
  const ScalarType type = table.scalar_type();
  check(type == ScalarType::Int || type == ScalarType::Long,
        "block_table: expected dtype int32 or int64, got ", dtype_text(type));
  const int64_t page_size = cache.size(1);
  check(page_size > 0, "block_table: expected pages of 1 slot or more, got ", shape_text(cache));
  int64_t slots = 0;
  check(!__builtin_mul_overflow(table.size(1), page_size, &slots) && slots <= int64_t{1} << 48,
        "block_table: expected at most 2^48 slots, got ", table.size(1), " pages of ", page_size);
  return slots;
}

// Checks q, k and v and fills sizes and views.
inline void set_tensors(AttentionParams& p, const AttentionArgs& a, DeviceType backend) {
  const ScalarType type = a.q.scalar_type();
  check_backend("q", a.q, backend);
  check_element_type("q", type, backend);
  for (const auto& [name, x] :
       {std::pair<const char*, const Tensor&>{"q", a.q}, {"k", a.k}, {"v", a.v}}) {
    check_device(name, x, "q's", a.q);
    const bool pages = a.block_table && &x != &a.q;
    const int64_t dims = a.ragged() && !pages ? 3 : 4;
    check(x.dim() == dims, name, ": expected ", dims, " dimensions ",
          pages      ? "[num_pages, page_size"
          : dims < 4 ? "[total"
                     : "[batch, seqlen",
          ", num_heads, head_dim], got ", shape_text(x));
    check_dtype(name, x, type);
    check_last_stride(name, x);
  }
  const int64_t dims = a.q.dim(), dims_kv = a.k.dim();
  p.batch_size = a.ragged() ? 1 : a.q.size(0);
  p.seqlen_q = a.q.size(dims - 3);
  p.num_heads_q = a.q.size(dims - 2);
  p.head_dim = a.q.size(dims - 1);
  p.seqlen_kv = a.block_table ? check_block_table(*a.block_table, a.q, a.batch_size(), a.k)
                              : a.k.size(dims_kv - 3);
  p.num_heads_kv = a.k.size(dims_kv - 2);
  p.head_dim_v = a.v.size(dims_kv - 1);
  const int64_t outer = a.block_table ? a.k.size(0) : p.batch_size;
  for (const auto& [name, x, head_dim] :
       {std::tuple<const char*, const Tensor&, int64_t>{"k", a.k, p.head_dim},
        {"v", a.v, p.head_dim_v}}) {
    check_rows_shape(name, x, dims_kv == 3, outer, a.k.size(dims_kv - 3), p.num_heads_kv, head_dim);
  }
  for (const auto& [name, dim] :
       {std::pair<const char*, int64_t>{"q", p.head_dim}, {"v", p.head_dim_v}}) {
    check(dim % 8 == 0 && dim >= 8 && dim <= 256, name,
          ": expected head_dim a multiple of 8 in [8, 256], got ", dim);
  }
  const bool divides =
      p.num_heads_kv == 0 ? p.num_heads_q == 0 : p.num_heads_q % p.num_heads_kv == 0;
  check(divides, "q: expected num_heads a multiple of k's num_heads ", p.num_heads_kv, ", got ",
        p.num_heads_q);
  set_strided(p.q, a.q);
  set_strided(p.k, a.k);
  set_strided(p.v, a.v);
  if (a.block_table) p.block_table = page_table(a.k.size(0), a.k.size(1));
  p.lse_head = p.seqlen_q;
  p.lse_batch = p.num_heads_q * p.seqlen_q;
}

// Checks and fills what turns dot products into scores, and who sees whom but for the lengths.
inline void set_scores(AttentionParams& p, const AttentionArgs& a) {
  if (a.mask) {
    check_device("mask", *a.mask, "q's", a.q);
    p.mask = mask_view(*a.mask, p);
  }
  if (a.alibi_slopes) p.alibi = alibi_view(*a.alibi_slopes, a, p.num_heads_q);
  check(std::isfinite(a.softmax_scale), "softmax_scale: expected a finite number, got ",
        a.softmax_scale);
  check(std::isfinite(a.softcap) && a.softcap >= 0,
        "softcap: expected a finite number > 0, or 0 for none, got ", a.softcap);
  p.softmax_scale = a.softmax_scale;
  p.softcap = a.softcap;

  const Causal causal = static_cast<Causal>(a.causal);
  check(a.causal >= 0 && a.causal <= 2,
        "causal: expected 0 (none), 1 (bottom_right) or 2 (top_left), got ", a.causal);
  check(a.window_left >= -1, "window_left: expected >= 0, or -1 for open, got ", a.window_left);
  check(a.window_right >= -1, "window_right: expected >= 0, or -1 for open, got ", a.window_right);
  p.alignment = causal == Causal::kTopLeft ? Alignment::kTopLeft : Alignment::kBottomRight;
  // A window beyond both lengths is open; the bound keeps position arithmetic far from overflow.
  const int64_t widest = p.seqlen_q + p.seqlen_kv;
  p.window_left = std::min(a.window_left, widest);
  p.window_right = causal == Causal::kNone ? std::min(a.window_right, widest) : 0;
}

inline void set_softmax(AttentionFwdParams& p, const PhiArgs& a, const Tensor& q) {
  p.unified = a.phi || a.phi_heads;
  check(!a.phi || !a.phi_heads, "phi: expected none together with phi_heads, got ",
        a.phi.value_or(0));
  if (a.phi) {
    check(std::isfinite(*a.phi), "phi: expected a finite number, got ", *a.phi);
    p.phi = *a.phi;
  }
  if (!a.phi_heads) return;
  check_device("phi_heads", *a.phi_heads, "q's", q);
  check_dtype("phi_heads", *a.phi_heads, ScalarType::Float);
  check_shape("phi_heads", *a.phi_heads, {p.num_heads_q});
  check_last_stride("phi_heads", *a.phi_heads);
  p.phi_heads = static_cast<const float*>(a.phi_heads->data_ptr());
}

// What shows on a tensor of integers, one for each of something, without reading it.
inline void check_lengths(const char* name, const Tensor& x, const Tensor& q, int64_t count) {
  check_device(name, x, "q's", q);
  check_shape(name, x, {count});
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Int || type == ScalarType::Long, name,
        ": expected dtype int32 or int64, got ", dtype_text(type));
}

// Fills every field of AttentionParams except kv_start and seqlens_kv, whose tensors it checks as
// far as that goes without reading them; or throws.
inline void set_params(AttentionParams& p, const AttentionArgs& a, DeviceType backend) {
  set_tensors(p, a, backend);
  set_scores(p, a);
  if (a.kv_start) check_lengths("kv_start", *a.kv_start, a.q, a.batch_size());
  if (a.seqlens_kv) check_lengths("seqlens_kv", *a.seqlens_kv, a.q, a.batch_size());
}

// Owns the lengths and pages that params point to.
struct Lengths {
  std::vector<int64_t> kv_start, seqlens_kv, pages;
};

// An element of an int32 or int64 tensor in host memory.
inline int64_t integer_at(const Tensor& x, int64_t offset) {
  return x.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(x.data_ptr())[offset]
                                            : static_cast<const int64_t*>(x.data_ptr())[offset];
}

inline std::vector<int64_t> length_values(const Tensor& x) {
  std::vector<int64_t> values(x.size(0));
  for (int64_t b = 0; b < x.size(0); ++b) values[b] = integer_at(x, b * x.stride(0));
  return values;
}

// Reads the lengths from tensors in host memory that passed check_lengths, and checks their values:
// sequence b has slots(b) of them.
template <class Slots>
void read_lengths(Lengths& lengths, const std::optional<Tensor>& kv_start,
                  const std::optional<Tensor>& seqlens_kv, const Slots& slots) {
  if (kv_start) lengths.kv_start = length_values(*kv_start);
  if (seqlens_kv) lengths.seqlens_kv = length_values(*seqlens_kv);
  // Only given lengths need a look: an expanded batch of 2^40 is not counted through for nothing.
  const size_t count = std::max(lengths.kv_start.size(), lengths.seqlens_kv.size());
  for (size_t b = 0; b < count; ++b) {
    const int64_t end = seqlens_kv ? lengths.seqlens_kv[b] : slots(b);
    const int64_t start = kv_start ? lengths.kv_start[b] : 0;
    check(end >= 0 && end <= slots(b), "seqlens_kv: expected values in [0, ", slots(b), "], got ",
          end, " at batch ", b);
    check(start >= 0 && start <= end, "kv_start: expected values in [0, seqlens_kv = ", end,
          "], got ", start, " at batch ", b);
  }
}

// read_lengths of a batch that is not ragged, into p.
inline void set_lengths(AttentionParams& p, Lengths& lengths, const std::optional<Tensor>& kv_start,
                        const std::optional<Tensor>& seqlens_kv) {
  read_lengths(lengths, kv_start, seqlens_kv, [&](int64_t) { return p.seqlen_kv; });
  if (kv_start) p.kv_start = lengths.kv_start.data();
  if (seqlens_kv) p.seqlens_kv = lengths.seqlens_kv.data();
}

// Reads the pages of each sequence's slots from a table in host memory, and checks them. The
// entries of other pages may hold anything: they stand for page 0. `pages` owns what view points
// to.
inline void read_pages(PageTable& view, std::vector<int64_t>& pages, const Tensor& table,
                       const std::vector<KeyRange>& slots) {
  for (const KeyRange& s : slots) view.row = std::max(view.row, ceil_div(s.end, view.page_size));
  const auto batch_size = static_cast<int64_t>(slots.size());
  pages.assign(batch_size * view.row + 1, 0);  // not empty: a null pointer is no table
  view.pages = pages.data();
  for (int64_t b = 0; b < batch_size; ++b) {
    if (slots[b].empty()) continue;
    for (int64_t i = slots[b].begin / view.page_size; i * view.page_size < slots[b].end; ++i) {
      const int64_t page = integer_at(table, b * table.stride(0) + i * table.stride(1));
      check(page >= 0 && page < view.num_pages, "block_table: expected pages in [0, ",
            view.num_pages, "), got ", page, " at [", b, ", ", i, "]");
      pages[b * view.row + i] = page;
    }
  }
}

// The pages of keys that some row sees; after set_lengths.
inline void set_pages(AttentionParams& p, Lengths& lengths,
                      const std::optional<Tensor>& block_table) {
  if (!block_table) return;
  std::vector<KeyRange> seen(p.batch_size);
  for (int64_t b = 0; p.seqlen_q > 0 && b < p.batch_size; ++b) {
    seen[b] = p.visibility(b).rows(0, p.seqlen_q - 1);
  }
  read_pages(p.block_table, lengths.pages, *block_table, seen);
}

// dmask is empty unless wanted; then it has mask's shape and the accumulator's dtype, and is 0.
struct Gradients {
  Tensor dq, dk, dv, dmask;

  std::tuple<Tensor, Tensor, Tensor, Tensor> tuple() const { return {dq, dk, dv, dmask}; }

  // True if no kernel has to run: there are no rows or no keys.
  bool finished(const AttentionParams& p, const Tensor& lse) {
    if (lse.numel() > 0 && p.seqlen_kv > 0) return false;
    torch::stable::zero_(dq);
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
    return true;
  }

  // The stride of dmask's dimension i, 0 where it broadcasts.
  int64_t dmask_stride(int64_t i) const { return dmask.size(i) == 1 ? 0 : dmask.stride(i); }
};

inline Gradients new_gradients(const AttentionParams& p, const AttentionArgs& a, bool wants_dmask) {
  check(!wants_dmask || (a.mask && a.mask->scalar_type() != ScalarType::Bool),
        "wants_dmask: expected an additive mask to differentiate");
  const ScalarType type = a.q.scalar_type(), accumulator = accumulator_type(type);
  const auto like_mask = [&](const Tensor& mask) {
    return torch::stable::new_zeros(mask, {mask.size(0), mask.size(1), mask.size(2), mask.size(3)},
                                    accumulator);
  };
  return {new_tensor(a.q, {p.batch_size, p.seqlen_q, p.num_heads_q, p.head_dim}, type),
          new_tensor(a.k, {p.batch_size, p.seqlen_kv, p.num_heads_kv, p.head_dim}, type),
          new_tensor(a.v, {p.batch_size, p.seqlen_kv, p.num_heads_kv, p.head_dim_v}, type),
          wants_dmask ? like_mask(*a.mask) : new_tensor(a.q, {0}, accumulator)};
}

struct Outputs {
  Tensor out;
  Tensor lse;
};

inline Outputs new_outputs(const Tensor& q, const AttentionParams& p, bool ragged = false) {
  std::vector<int64_t> out{p.batch_size, p.seqlen_q, p.num_heads_q, p.head_dim_v};
  std::vector<int64_t> lse{p.batch_size, p.num_heads_q, p.seqlen_q};
  if (ragged) {
    out.erase(out.begin());
    lse.erase(lse.begin());
  }
  const ScalarType type = q.scalar_type();
  return {new_tensor(q, out, type), new_tensor(q, lse, accumulator_type(type))};
}

inline void set_outputs(AttentionFwdParams& p, const Outputs& outputs) {
  set_strided(p.out, outputs.out);
  p.lse = outputs.lse.data_ptr();
}

// What attention_bwd takes besides, but for the arguments of the forward.
struct GradientArgs {
  const Tensor& dout;
  const std::optional<Tensor>& dlse;
  const Tensor& out;
  const Tensor& lse;
};

// Checks the gradients and results that the backward reads, and fills their views.
template <class Params>
void set_results(Params& p, const GradientArgs& g, const AttentionArgs& a) {
  for (const auto& [name, x] :
       {std::pair<const char*, const Tensor&>{"dout", g.dout}, {"out", g.out}}) {
    check_device(name, x, "q's", a.q);
    check_dtype(name, x, a.q.scalar_type());
    check_rows_shape(name, x, a.ragged(), p.batch_size, p.seqlen_q, p.num_heads_q, p.head_dim_v);
    check_last_stride(name, x);
  }
  const auto check_lse = [&](const char* name, const Tensor& x) {
    check_device(name, x, "q's", a.q);
    check_dtype(name, x, accumulator_type(a.q.scalar_type()));
    if (a.ragged()) {
      check_shape(name, x, {p.num_heads_q, p.seqlen_q});
    } else {
      check_shape(name, x, {p.batch_size, p.num_heads_q, p.seqlen_q});
    }
    check(x.is_contiguous(), name, ": expected a contiguous tensor, got other strides");
  };
  check_lse("lse", g.lse);
  if (g.dlse) check_lse("dlse", *g.dlse);
  set_strided(p.out, g.out);
  set_strided(p.dout, g.dout);
  p.lse = g.lse.data_ptr();
  p.dlse = g.dlse ? static_cast<decltype(p.dlse)>(g.dlse->data_ptr()) : nullptr;
}

}  // namespace flashinfer_lite
