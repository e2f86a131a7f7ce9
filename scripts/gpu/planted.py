"""A program with one planted error for each sanitizer tool: a tool that misses it proves nothing.

Its kernels lie in namespace flashinfer_lite, so the filter that picks our kernels is proven too.
"""

import build_cuda

SOURCE = r"""
#include <cstring>
namespace flashinfer_lite {
__global__ void out_of_bounds(int* data) { data[256 + threadIdx.x] = 1; }
__global__ void race(int* data) {
  __shared__ int slot[256];
  slot[threadIdx.x] = threadIdx.x;
  data[threadIdx.x] = slot[(threadIdx.x + 32) % 256];
}
__global__ void divergent(int* data) {
  if (threadIdx.x < 48) __syncthreads();
  data[threadIdx.x] = 1;
}
}  // namespace flashinfer_lite
int main(int, char** argv) {
  int* data = nullptr;
  if (cudaMalloc(&data, 256 * sizeof(int)) != cudaSuccess) return 1;
  if (!std::strcmp(argv[1], "memcheck")) flashinfer_lite::out_of_bounds<<<1, 256>>>(data);
  if (!std::strcmp(argv[1], "racecheck")) flashinfer_lite::race<<<1, 256>>>(data);
  if (!std::strcmp(argv[1], "synccheck")) flashinfer_lite::divergent<<<1, 64>>>(data);
  return cudaDeviceSynchronize() != cudaSuccess;
}
"""
BUILD_S = 60


def build(run):
    """Compile the program; None where there is no nvcc, or it fails."""
    toolkit, _ = build_cuda.find_toolkit()
    if toolkit is None:
        return None
    source, program = run.work / "planted.cu", run.work / "planted"
    source.write_text(SOURCE)
    command = [toolkit.nvcc, "-arch=sm_80", "-O1", f"-L{toolkit.library}", "-o", program, source]
    return program if run.command("planted_build", command, BUILD_S) == 0 else None
