// From the tensors of an append_kv call to checked AppendKvParams, for both halves of the library.
#pragma once

#include "common/params/append_kv.h"
#include "ops/attention.h"

namespace flashinfer_lite {

// In the order of the schema.
struct AppendKvArgs {
  const Tensor& k_cache;
  const Tensor& v_cache;
  const Tensor& k;
  const Tensor& v;
  const Tensor& seqlens_kv;
  const std::optional<Tensor>& block_table;
  const std::optional<Tensor>& rotary_cos;
  const std::optional<Tensor>& rotary_sin;
  bool rotary_interleaved;
};

inline void check_own_memory(const char* name, const Tensor& x) {
  for (int64_t i = 0; i < x.dim(); ++i) {
    check(x.size(i) <= 1 || x.stride(i) != 0, name,
          ": expected its own memory for every element, got stride 0 in dimension ", i);
  }
}

inline void set_rotary(RotaryTable& rotary, const AppendKvArgs& a, int64_t head_dim) {
  check(a.rotary_cos.has_value() == a.rotary_sin.has_value(),
        "rotary_sin: expected one together with rotary_cos, got only one of them");
  if (!a.rotary_cos) return;
  const Tensor &cos = *a.rotary_cos, &sin = *a.rotary_sin;
  const ScalarType type = cos.scalar_type(), accumulator = accumulator_type(a.k.scalar_type());
  check(type == a.k.scalar_type() || type == accumulator, "rotary_cos: expected dtype ",
        dtype_text(accumulator), " or k's ", dtype_text(a.k.scalar_type()), ", got ",
        dtype_text(type));
  check_device("rotary_cos", cos, "k's", a.k);
  check_device("rotary_sin", sin, "k's", a.k);
  check_dtype("rotary_sin", sin, type);
  check(cos.dim() == 2 && cos.size(1) >= 1 && 2 * cos.size(1) <= head_dim,
        "rotary_cos: expected shape [positions, 1 to head_dim / 2 = ", head_dim / 2, "], got ",
        shape_text(cos));
  check_shape("rotary_sin", sin, {cos.size(0), cos.size(1)});
  check_last_stride("rotary_cos", cos);
  check_last_stride("rotary_sin", sin);
  rotary = {cos.data_ptr(), sin.data_ptr(),  cos.stride(0),       sin.stride(0),
            cos.size(0),    2 * cos.size(1), type == accumulator, a.rotary_interleaved};
}

// Fills every field but the pages and seqlens_kv, whose tensors it checks as far as that goes
// without reading them; or throws.
inline void set_append_params(AppendKvParams& p, const AppendKvArgs& a, DeviceType backend) {
  const ScalarType type = a.k.scalar_type();
  check_backend("k", a.k, backend);
  check_element_type("k", type, backend);
  for (const auto& [name, x] : {std::pair<const char*, const Tensor&>{"k", a.k},
                                {"v", a.v},
                                {"k_cache", a.k_cache},
                                {"v_cache", a.v_cache}}) {
    check_device(name, x, "k's", a.k);
    check(x.dim() == 4, name, ": expected 4 dimensions [batch, seqlen, num_heads, head_dim], got ",
          shape_text(x));
    check_dtype(name, x, type);
    check_last_stride(name, x);
  }
  p.batch_size = a.k.size(0);
  p.seqlen_new = a.k.size(1);
  p.num_heads_kv = a.k.size(2);
  p.head_dim = a.k.size(3);
  p.head_dim_v = a.v.size(3);
  check_shape("v", a.v, {p.batch_size, p.seqlen_new, p.num_heads_kv, p.head_dim_v});
  const int64_t outer = a.block_table ? a.k_cache.size(0) : p.batch_size;
  const int64_t slots = a.k_cache.size(1);
  check_shape("k_cache", a.k_cache, {outer, slots, p.num_heads_kv, p.head_dim});
  check_shape("v_cache", a.v_cache, {outer, slots, p.num_heads_kv, p.head_dim_v});
  check_own_memory("k_cache", a.k_cache);
  check_own_memory("v_cache", a.v_cache);
  p.capacity = slots;
  if (a.block_table) {
    p.capacity = check_block_table(*a.block_table, a.k, p.batch_size, a.k_cache);
    p.block_table = page_table(outer, slots);
  }
  check_lengths("seqlens_kv", a.seqlens_kv, a.k, a.k.size(0));
  set_rotary(p.rotary, a, p.head_dim);
  set_strided(p.k, a.k);
  set_strided(p.v, a.v);
  set_strided(p.k_cache, a.k_cache);
  set_strided(p.v_cache, a.v_cache);
}

// Reads lengths and pages from tensors in host memory that passed set_append_params, and checks
// their values. `lengths` owns what p points to.
inline void set_append_slots(AppendKvParams& p, Lengths& lengths, const Tensor& seqlens_kv,
                             const std::optional<Tensor>& block_table) {
  lengths.seqlens_kv = length_values(seqlens_kv);
  p.seqlens_kv = lengths.seqlens_kv.data();
  const int64_t most = p.capacity - p.seqlen_new;
  for (int64_t b = 0; b < p.batch_size; ++b) {
    const int64_t used = p.seqlens_kv[b];
    check(used >= 0 && used <= most, "seqlens_kv: expected values in [0, ", p.capacity, " - ",
          p.seqlen_new, "], which leave room for k's tokens, got ", used, " at batch ", b);
    check(p.rotary.cos == nullptr || used + p.seqlen_new <= p.rotary.positions,
          "rotary_cos: expected ", used + p.seqlen_new, " positions or more for batch ", b,
          ", got ", p.rotary.positions);
  }
  if (!block_table || p.seqlen_new == 0) return;
  std::vector<KeyRange> slots(p.batch_size);
  for (int64_t b = 0; b < p.batch_size; ++b) {
    slots[b] = {p.seqlens_kv[b], p.seqlens_kv[b] + p.seqlen_new};
  }
  read_pages(p.block_table, lengths.pages, *block_table, slots);
}

}  // namespace flashinfer_lite
