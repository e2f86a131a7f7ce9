// Which sequence a thread block works on. Of a ragged batch the offsets in device memory say it:
// the host knows neither how long a sequence is nor how many blocks it has.
//
// What lies before the first sequence and behind the last counts as a sequence too, without
// partners: sequence i of those 2 + `sequences` begins at edge(i). A head has as many blocks as are
// enough whatever the offsets are: sequence i has those from first_block(i) to first_block(i + 1),
// with first_block(i) = edge(i) / block_size + i. Blocks that it does not need have no rows.
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>

#include "cuda/tile/scores.cuh"

namespace flashinfer_lite::tile {

// Offsets are clamped: wrong ones may not lead outside of the tensors.
template <class View>
struct Edges {
  const View& offsets;
  int sequences;
  int total;

  __device__ __forceinline__ int operator[](int i) const {
    if (i == 0) return 0;
    if (i == sequences + 2) return total;
    return static_cast<int>(clamp(read_length(offsets, i - 1, 0), 0, total));
  }
};

// A sequence of a ragged batch among the edges, and which block of its own the thread block takes.
struct RaggedBlock {
  int index;
  int block;
};

// Each warp for itself: its lanes look at 32 edges at a time. What holds all along, wrong offsets
// or not: first_block(low) <= block < first_block(high).
template <class View>
__device__ __forceinline__ RaggedBlock find_block(const Edges<View>& edges, int group_size,
                                                  int block_size, int block) {
  const auto first_block = [&](int i) { return edges[i] * group_size / block_size + i; };
  const int lane = arch::thread_idx() % 32;
  int low = 0;
  int high = edges.sequences + 2;
#pragma unroll 1
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const uint32_t begun = arch::ballot(first_block(std::min(low + lane * step, high)) <= block);
    low += (31 - std::countl_zero(begun)) * step;
    high = std::min(low + step, high);
  }
  return {low, block - first_block(low)};
}

// Rows or keys of a sequence that lie side by side.
struct Span {
  int first;
  int length;
};

template <class View>
__device__ __forceinline__ Span span_of(const Edges<View>& edges, int i) {
  const int first = edges[i];
  return {first, std::max(edges[i + 1] - first, 0)};
}

// What a thread block works on. Slots is what says who sees whom: KeySlots, or, of a ragged batch,
// SequenceSlots.
template <class Slots>
struct Sequence {
  // Which of the batch; of a ragged one where its queries and its keys begin, for the batch strides
  // are those of a row there.
  int batch_q;
  int batch_kv;
  int rows;  // of a KV head
  int64_t seqlen_kv;
  int block;          // the thread block's, of the sequence's own
  int blocks_before;  // of a ragged batch: blocks of rows that belong to the sequences before
  Slots slots;
};

// Whose block `work.m_block` of a head's rows is, or, with kOfKeys, of its keys. Cfg says what a
// block has, and whether the batch is ragged.
template <class Cfg, bool kOfKeys, class Params, class Work>
__device__ __forceinline__ auto find_sequence(const Params& p, const Work& work) {
  if constexpr (!Cfg::ragged) {
    return Sequence<KeySlots>{work.batch_idx,
                              work.batch_idx,
                              p.rows,
                              p.seqlen_kv,
                              work.m_block,
                              0,
                              read_key_slots(p, work.batch_idx, p.seqlen_kv)};
  } else {
    const auto sequences = static_cast<int>(p.ragged.sequences);
    const Edges q{p.ragged.q, sequences, static_cast<int>(p.seqlen_q)};
    const Edges kv{p.ragged.kv, sequences, static_cast<int>(p.seqlen_kv)};
    const RaggedBlock at = kOfKeys ? find_block(kv, 1, Cfg::block_n, work.m_block)
                                   : find_block(q, p.group.value, Cfg::block_m, work.m_block);
    const bool is_tail = at.index == 0 || at.index == sequences + 1;
    const Span queries = is_tail && kOfKeys ? Span{0, 0} : span_of(q, at.index);
    const Span keys = is_tail && !kOfKeys ? Span{0, 0} : span_of(kv, at.index);
    Sequence<SequenceSlots> s;
    s.batch_q = queries.first;
    s.batch_kv = keys.first;
    s.rows = queries.length * p.group.value;
    s.seqlen_kv = keys.length;
    // Wrong offsets may leave any number of blocks over; their rows must count with 32 bits.
    s.block =
        std::min(at.block, kOfKeys ? keys.length / Cfg::block_n + 1 : s.rows / Cfg::block_m + 1);
    s.blocks_before = queries.first * p.group.value / Cfg::block_m + at.index;
    s.slots = {{0, 0}, queries.length};
    if (!is_tail) s.slots = {read_key_slots(p, at.index - 1, keys.length), queries.length};
    return s;
  }
}

// The two instances of a kernel that a row of the table has: for ragged batches, and for others.
template <class Config>
struct Ragged : Config {
  static constexpr bool ragged = true;
};
template <class Config>
struct Dense : Config {
  static constexpr bool ragged = false;
};
template <class Cfg>
using SlotsOf = std::conditional_t<Cfg::ragged, SequenceSlots, KeySlots>;

// Of a row in lse: [batch, num_heads_q, seqlen_q], or [num_heads_q, total_q].
template <class Cfg, class Params>
__device__ __forceinline__ int64_t lse_index(const Params& p, int batch_q, Row row) {
  if constexpr (Cfg::ragged) return row.head * p.seqlen_q + batch_q + row.query;
  return (batch_q * p.num_heads_q + row.head) * p.seqlen_q + row.query;
}

}  // namespace flashinfer_lite::tile
