// Checks of decode and merge_states beyond those of attention, for both halves of the library.
#pragma once

#include "ops/attention.h"

namespace flashinfer_lite {

inline void check_kv_splits(int64_t kv_splits) {
  check(kv_splits >= 0 && kv_splits <= 4096, "kv_splits: expected 0 (automatic) to 4096, got ",
        kv_splits);
}

// The caller's own out and lse, of decode.out.
inline void check_outputs(const Outputs& outputs, const Tensor& q, const AttentionParams& p) {
  const auto& [out, lse] = outputs;
  const int64_t rows[3] = {p.batch_size, p.seqlen_q, p.num_heads_q};
  check_device("out", out, "q's", q);
  check_dtype("out", out, q.scalar_type());
  check_shape("out", out, {rows[0], rows[1], rows[2], p.head_dim_v});
  check_last_stride("out", out);
  for (int64_t i = 0; i < 3; ++i) {
    check(rows[i] <= 1 || out.stride(i) != 0,
          "out: expected its own memory for every element, got stride 0 in dimension ", i);
  }
  check_device("lse", lse, "q's", q);
  check_dtype("lse", lse, accumulator_type(q.scalar_type()));
  check_shape("lse", lse, {p.batch_size, p.num_heads_q, p.seqlen_q});
  check(lse.is_contiguous(), "lse: expected a contiguous tensor, got other strides");
}

// merge_states: checks its inputs, allocates its outputs and fills c.
inline Outputs prepare_merge(CombineParams& c, const Tensor& outs, const Tensor& lses,
                             DeviceType backend) {
  const ScalarType type = outs.scalar_type(), accumulator = accumulator_type(type);
  check_backend("outs", outs, backend);
  check_element_type("outs", type, backend);
  check_device("lses", lses, "outs'", outs);
  check(outs.dim() == 5,
        "outs: expected 5 dimensions [num_states, batch, seqlen_q, num_heads_q, head_dim_v], got ",
        shape_text(outs));
  check_last_stride("outs", outs);
  c.num_states = outs.size(0);
  c.batch_size = outs.size(1);
  c.seqlen_q = outs.size(2);
  c.num_heads_q = outs.size(3);
  c.head_dim_v = outs.size(4);
  check_dtype("lses", lses, accumulator);
  check_shape("lses", lses, {c.num_states, c.batch_size, c.num_heads_q, c.seqlen_q});
  c.partial_in_accumulator = false;
  c.out_partial = {outs.data_ptr(), outs.stride(1), outs.stride(2), outs.stride(3)};
  c.out_partial_state = outs.stride(0);
  c.lse_partial = lses.data_ptr();
  c.lse_partial_state = lses.stride(0);
  c.lse_partial_batch = lses.stride(1);
  c.lse_partial_head = lses.stride(2);
  c.lse_partial_seqlen = lses.stride(3);
  Outputs outputs{new_tensor(outs, {c.batch_size, c.seqlen_q, c.num_heads_q, c.head_dim_v}, type),
                  new_tensor(outs, {c.batch_size, c.num_heads_q, c.seqlen_q}, accumulator)};
  set_strided(c.out, outputs.out);
  c.lse = outputs.lse.data_ptr();
  return outputs;
}

// plan(): checks its arguments and fills p. True for decode, false for attention_fwd, which never
// splits.
inline bool prepare_plan(AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::string& kernel, int64_t longest, int64_t kv_splits,
                         DeviceType backend) {
  const std::optional<Tensor> none;
  set_params(p, {q, k, v, none, none, none, 1.0, 0.0, 0, -1, -1}, backend);
  const bool is_decode = kernel == "decode";
  check(is_decode || kernel == "attention_fwd", "kernel: expected attention_fwd or decode, got ",
        kernel);
  check(longest >= 0 && longest <= p.seqlen_kv, "longest: expected 0 to k's seqlen ", p.seqlen_kv,
        ", got ", longest);
  check_kv_splits(kv_splits);
  return is_decode;
}

// What plan() returns. `instance` counts in cuda_instances(); -1 is none.
inline Tensor plan_result(int64_t block_m, int64_t block_n, int64_t kv_splits, int64_t instance) {
  Tensor result = torch::stable::empty({4}, ScalarType::Long);
  int64_t* values = static_cast<int64_t*>(result.data_ptr());
  values[0] = block_m;
  values[1] = block_n;
  values[2] = kv_splits;
  values[3] = instance;
  return result;
}

}  // namespace flashinfer_lite
