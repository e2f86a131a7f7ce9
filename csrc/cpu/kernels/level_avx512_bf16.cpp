// AVX-512 with products of bfloat16 pairs: the amx level's kernels for a processor without AMX.
#include "cpu/kernels/prelude.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#pragma GCC target("avx2,fma,f16c,prefer-vector-width=512")
// As in level_avx512.cpp: GCC's own header.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define FIL_CPU_LEVEL avx512_bf16
#define FIL_VECTOR_BYTES 64
#include "cpu/isa/avx512.h"
#include "cpu/isa/avx512_bf16.h"
#include "cpu/isa/dot_tiles.h"
#include "cpu/kernels/tile_kernels.h"
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif

namespace flashinfer_lite::cpu {

const KernelTable* avx512_bf16_table() {
#if defined(__x86_64__)
  static const KernelTable table = avx512_bf16::with_tiles<avx512_table>();
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace flashinfer_lite::cpu
