// CUDA's keywords for a host compiler. CUDA headers included earlier may have defined some of them.
#pragma once

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

// In a build with memory hooks (see hooks.cpp) the wrappers of the executor must stay out of the
// instrumented code, and g++ refuses to inline across that border.
#ifdef __SANITIZE_THREAD__
#define __forceinline__ inline
#define FIL_SIMT_INLINE __attribute__((no_sanitize("thread"))) inline
#else
#define __forceinline__ inline __attribute__((always_inline))
#define FIL_SIMT_INLINE inline __attribute__((always_inline))
#endif
