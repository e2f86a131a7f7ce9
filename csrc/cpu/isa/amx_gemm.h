// Products of one attention tile on AMX tiles: bfloat16 factors, fp32 sums.
//
// A right factor B [depth, cols] lies in scratch memory as tiles of 32 of its depth by 16 columns,
// a column's tiles one after the other. A tile is 16 rows of 16 words, and a word the pair of
// elements of one column at depths 2i and 2i + 1. Depth and columns are padded to multiples of 32
// with zeros, which the left factor's padding meets.
//
// On dot_tiles.h the same runs on vectors, and nothing runs beside it.
//
// An element of a product depends on its row and its column alone, in an order that neither the
// number of rows nor that of columns changes.
#pragma once

#include "cpu/isa/tile_config.h"

namespace flashinfer_lite::cpu::FIL_CPU_LEVEL {

// tiles <- B = k^T for k [count, depth]: a transpose of words. staging holds 16 padded rows.
inline void pack_keys(int64_t count, int64_t depth, Rows<BFloat16> k, BFloat16* tiles,
                      BFloat16* staging) {
  const int64_t padded = round_up(depth, kAmxDepth);
  for (int64_t first = 0; first < round_up(count, 2 * kAmxRows); first += kAmxRows) {
    const int64_t inside = max_of<int64_t>(min_of<int64_t>(count - first, kAmxRows), 0);
    __builtin_memset(staging, 0, kAmxRows * padded * sizeof(BFloat16));
    for (int64_t r = 0; r < inside; ++r) {
      __builtin_memcpy(staging + r * padded, k[first + r], depth * sizeof(BFloat16));
    }
    // Words as floats, which are only moved.
    transpose(kAmxRows, padded / 2, reinterpret_cast<const float*>(staging), padded / 2,
              reinterpret_cast<float*>(tiles + first * padded), kAmxRows);
  }
}

// Into the second-level cache.
FIL_INLINE void prefetch_row(const BFloat16* row, int64_t count) {
  for (int64_t c = 0; c < count; c += kAmxDepth) __builtin_prefetch(row + c, 0, 2);
}

// The first elements of a row, one to a word, zeros for those that are not there.
template <bool finite_only>
FIL_INLINE Vector<uint32_t> load_words(const BFloat16* p, int64_t count) {
  constexpr int width = kWidth<uint32_t>;
  typedef uint16_t Half __attribute__((vector_size(FIL_VECTOR_BYTES / 2)));
  Half half = {};
  if (count >= width) {
    __builtin_memcpy(&half, p, sizeof half);
  } else if (count > 0) {
    BFloat16 part[width] = {};
    __builtin_memcpy(part, p, count * sizeof(BFloat16));
    __builtin_memcpy(&half, part, sizeof half);
  }
  const Vector<uint32_t> words = __builtin_convertvector(half, Vector<uint32_t>);
  if constexpr (!finite_only) return words;
  return (words & 0x7f80u) == 0x7f80u ? Vector<uint32_t>{} : words;
}

// tiles <- B = v [count, cols]: two rows interleaved. finite_only: zeros for NaN and inf. As many
// rows of `next` will be read after it.
template <bool finite_only>
void pack_values(int64_t count, int64_t cols, Rows<BFloat16> v, BFloat16* tiles,
                 const Rows<BFloat16>* next = nullptr) {
  constexpr int width = kWidth<uint32_t>;
  const int64_t depth = round_up(count, kAmxDepth);
  for (int64_t key = 0; key < depth; key += 2) {
    const int64_t even_row = min_of(key, count - 1), odd_row = min_of(key + 1, count - 1);
    const BFloat16* const even = v[even_row];
    const BFloat16* const odd = v[odd_row];
    if (next) prefetch_row((*next)[even_row], cols);
    if (next) prefetch_row((*next)[odd_row], cols);
    const auto pack = [&](int64_t c, int64_t first, int64_t second) __attribute__((always_inline)) {
      const Vector<uint32_t> pair =
          load_words<finite_only>(even + c, first) | load_words<finite_only>(odd + c, second) << 16;
      BFloat16* to = tiles + c / kAmxRows * kAmxRows * depth + (key * kAmxRows + c % kAmxRows * 2);
      __builtin_memcpy(to, &pair, sizeof pair);
    };
    int64_t c = 0;
    for (; key + 1 < count && c + width <= cols; c += width) pack(c, width, width);
    for (; c < round_up(cols, 2 * kAmxRows); c += width) {
      pack(c, key < count ? cols - c : 0, key + 1 < count ? cols - c : 0);
    }
  }
}

// C[rows, cols] (+)= A[rows, depth] B[depth, cols] with B packed for b_depth, at least depth. rows,
// at most 32, are rounded up to 16 or 32, cols and depth to multiples of 32: that much of A is read
// and of C written.
struct AmxProduct {
  int64_t rows, cols, depth;
  const BFloat16* a;
  int64_t a_row;
  const BFloat16* b;
  int64_t b_depth;
  float* c;
  int64_t c_row;
  bool accumulate;

  FIL_INLINE int64_t steps() const {
    return ceil_div(cols, 2 * kAmxRows) * ceil_div(depth, kAmxDepth);
  }
};

// Products in steps, for other work to be done between them: a tile product takes the processor 16
// cycles, in which it can execute what does not wait for it. A step multiplies 32 of the depth of
// 32 columns; the sums are stored at the beginning of the next, when they are ready.
class AmxQueue {
 public:
  explicit AmxQueue(Tiles& tiles) : tiles_(tiles) {}

  // At most three at a time.
  FIL_INLINE void add(const AmxProduct& product) {
    if (steps_ == 0) {
      next_ = 0;
      count_ = 0;
      start_product(product);
    }
    products_[count_++] = product;
    steps_ += product.steps();
  }

  FIL_INLINE int64_t steps() const { return steps_; }

  FIL_INLINE void step() {
    if (steps_ == 0) return;
    Tiles::fence();
    if (products_[next_].rows > kAmxRows) {
      step_of<true>(products_[next_]);
    } else {
      step_of<false>(products_[next_]);
    }
    Tiles::fence();
    --steps_;
  }

  // Does what is left and stores the last sums.
  FIL_INLINE void finish() {
    while (steps_ > 0) step();
    store_sums();
  }

 private:
  FIL_INLINE void start_product(const AmxProduct& p) {
    col_ = 0;
    d_ = 0;
    depth_ = round_up(p.depth, kAmxDepth);
  }

  FIL_INLINE void store_sums() {
    if (sums_ == nullptr) return;
    Tiles::fence();
    float* const below = sums_ + kAmxRows * sums_row_;
    const int64_t bytes = sums_row_ * int64_t{sizeof(float)};
    tiles_.store<0>(sums_, bytes);
    tiles_.store<1>(sums_ + 16, bytes);
    if (two_rows_) tiles_.store<2>(below, bytes);
    if (two_rows_) tiles_.store<3>(below + 16, bytes);
    Tiles::fence();
    sums_ = nullptr;
  }

  template <bool two_rows>
  FIL_INLINE void load_sums(const AmxProduct& p) {
    float* const c = p.c + col_;
    float* const below = c + kAmxRows * p.c_row;
    const int64_t bytes = p.c_row * int64_t{sizeof(float)};
    if (p.accumulate) {
      tiles_.load<0>(c, bytes);
      tiles_.load<1>(c + 16, bytes);
      if constexpr (two_rows) tiles_.load<2>(below, bytes);
      if constexpr (two_rows) tiles_.load<3>(below + 16, bytes);
    } else {
      tiles_.zero<0>();
      tiles_.zero<1>();
      if constexpr (two_rows) tiles_.zero<2>();
      if constexpr (two_rows) tiles_.zero<3>();
    }
  }

  template <bool two_rows>
  FIL_INLINE void step_of(const AmxProduct& p) {
    if (d_ == 0) {
      store_sums();
      load_sums<two_rows>(p);
    }
    const int64_t a_bytes = p.a_row * int64_t{sizeof *p.a};
    const BFloat16* const b = p.b + col_ * p.b_depth + d_ * kAmxRows;
    tiles_.load<4>(p.a + d_, a_bytes);
    tiles_.load<6>(b, 64);
    tiles_.multiply<0, 4, 6>();
    tiles_.load<7>(b + p.b_depth * kAmxRows, 64);
    tiles_.multiply<1, 4, 7>();
    if constexpr (two_rows) {
      tiles_.load<5>(p.a + kAmxRows * p.a_row + d_, a_bytes);
      tiles_.multiply<2, 5, 6>();
      tiles_.multiply<3, 5, 7>();
    }
    d_ += kAmxDepth;
    if (d_ < depth_) return;
    sums_ = p.c + col_;
    sums_row_ = p.c_row;
    two_rows_ = two_rows;
    d_ = 0;
    col_ += 2 * kAmxRows;
    if (col_ < p.cols) return;
    ++next_;
    if (next_ < count_) start_product(products_[next_]);
  }

  Tiles& tiles_;
  AmxProduct products_[3];
  int next_ = 0, count_ = 0;
  int64_t steps_ = 0;
  int64_t col_ = 0, d_ = 0, depth_ = 0;  // of the product that is next
  float* sums_ = nullptr;                // where the sums in the tiles belong, once complete
  int64_t sums_row_ = 0;
  bool two_rows_ = false;
};

// A product with nothing between.
inline void amx_gemm(Tiles& tiles, int64_t rows, int64_t cols, int64_t depth, const BFloat16* a,
                     int64_t a_row, const BFloat16* b, float* c, int64_t c_row, bool accumulate) {
  AmxQueue queue(tiles);
  queue.add({rows, cols, depth, a, a_row, b, round_up(depth, kAmxDepth), c, c_row, accumulate});
  queue.finish();
}

}  // namespace flashinfer_lite::cpu::FIL_CPU_LEVEL
