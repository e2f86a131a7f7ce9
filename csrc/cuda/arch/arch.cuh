// One wrapper per GPU instruction the kernels use: inline PTX under nvcc, the SIMT executor of
// csrc/simt under a host compiler. Signatures are the same on both sides.
#pragma once

#ifdef __CUDACC__
#include "cuda/arch/ptx.cuh"
#else
#include "cuda/arch/cpu.cuh"
#endif
