// FlashAttention-2 backward on tensor cores (Dao, arXiv 2307.08691, algorithm 2), compute
// capability 8.0 and up. With S the scaled scores, P = exp(S - lse), dP = dO v^T and
// delta = rowsum(dO out) - dlse:
//
//   dS = P (dP - delta)      dV = P^T dO      dK = scale dS^T q      dQ = scale dS k
//
//   q, dq [batch, seqlen_q, num_heads_q, head_dim]    k, dk [batch, seqlen_kv, num_heads_kv,
//   head_dim] out, dout likewise with head_dim_v                v, dv likewise with head_dim_v
//
// A softcap multiplies dS by its slope; an additive mask gets the dS without. Rows are packed as in
// the forward, so dK and dV sum over the heads of a group in registers. What runs, one launch each:
//
//   rows      lse and delta of every row, side by side; dQ's accumulator to 0
//   keys      a thread block owns block_n keys of a (batch, KV head) and walks the rows that see
//             any: S and dP, P and dS to shared memory, then dV, dK, and dQ by fp32 atomics
//   finish    dQ's accumulator to the element type
//
// That is five products a tile. Atomics add in any order, so where the same bits are wanted every
// time, keys leaves dQ out and a kernel that owns rows and walks their keys computes it: two
// products more, and no accumulator. The alternative, atomics in a fixed order, would have every
// thread block wait for the one before it.
//
//   queries   dQ; or, as a launch of its own, the gradient of an additive mask
//
// Shared memory of keys: K | V | P | dS | num_stages of (Q | dO | statistics). Of queries: Q | dO |
// statistics | num_stages of (K | V).
#pragma once

#include "cuda/kernels/attention_bwd/keys.cuh"
#include "cuda/kernels/attention_bwd/queries.cuh"
#include "cuda/kernels/attention_bwd/rows.cuh"

namespace flashinfer_lite::attention_bwd {

template <class Config>
struct Kernel {
  using Cfg = Config;
  using Params = attention_bwd::Params;
  using RowTile = typename Sizes<Cfg>::RowTile;
  static constexpr int smem_bytes =
      std::max(KeysTraits<Cfg>::smem_bytes, QueriesTraits<Cfg>::smem_bytes);

  static Status launch(const Params& p, Stream stream) {
    return p.is_ragged() ? launch_pass<tile::Ragged<Cfg>>(p, stream)
                         : launch_pass<tile::Dense<Cfg>>(p, stream);
  }

 private:
  template <class Of>
  static Status launch_pass(const Params& p, Stream stream) {
    const int64_t blocks = p.num_m_blocks * p.num_heads_kv * p.batch_size;
    const auto config = [&](int threads, int bytes) -> LaunchConfig {
      return {static_cast<uint32_t>(blocks), static_cast<uint32_t>(threads),
              static_cast<uint32_t>(bytes)};
    };
    constexpr int kRowThreads = Sizes<Cfg>::row_threads;
    switch (p.pass) {
      case CudaBwdPass::kRows:
        return arch::launch<attention_bwd_rows_sm80<Of>>(
            config(kRowThreads, RowsTraits<Cfg>::smem_bytes), stream, p);
      case CudaBwdPass::kKeys:
        return arch::launch<attention_bwd_keys_sm80<Of>>(
            config(KeysTraits<Cfg>::num_threads, KeysTraits<Cfg>::smem_bytes), stream, p);
      case CudaBwdPass::kFinish:
        return arch::launch<attention_bwd_finish_sm80<Of>>(config(kRowThreads, RowTile::bytes),
                                                           stream, p);
      default:
        return arch::launch<attention_bwd_queries_sm80<Of>>(
            config(kRowThreads, QueriesTraits<Cfg>::smem_bytes), stream, p);
    }
  }
};

}  // namespace flashinfer_lite::attention_bwd
