"""Run the golden cases on a GPU, with nvcc, ctypes and numpy alone: neither torch nor our library.

    python tests/golden_gpu.py --build    compile build/golden/golden.so; needs no GPU
    python tests/golden_gpu.py            run the table on the GPU, compiling first if need be

The library stands alone: it can be compiled on one machine and carried to another, all of
build/golden.
"""

import argparse
import ctypes
import hashlib
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import build_cuda

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "golden"
LIBRARY = FOLDER / "golden.so"
STAMP = FOLDER / "fingerprint"
# As the CUDA half is compiled, but for functions that ctypes can see; for sm_80 and sm_90 always.
FLAGS = [
    *shlex.split(build_cuda.NVCCFLAGS),
    "-Xcompiler=-fvisibility=default",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]

SOURCE = r"""
#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/kernels/golden/golden.cuh"

namespace {

namespace golden = flashinfer_lite::golden;

using Encode = decltype(&cuTensorMapEncodeTiled);

// Found through the runtime, so that the library loads where there is no driver.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

int encode_matrix(golden::Params& params, uint32_t* matrix, uint64_t rows, uint64_t cols) {
  const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  static_assert(sizeof params.map == sizeof(CUtensorMap));
  const cuuint64_t size[2] = {cols, rows};
  const cuuint64_t row_bytes[1] = {4 * cols};
  const cuuint32_t box[2] = {golden::TmaLoad::kBoxCols, golden::TmaLoad::kBoxRows};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode(
      reinterpret_cast<CUtensorMap*>(&params.map), CU_TENSOR_MAP_DATA_TYPE_UINT32, 2, matrix, size,
      row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

int run(const golden::Entry& entry, uint32_t* in, uint32_t* device_out, uint32_t* out,
        size_t out_bytes, const int64_t* matrix) {
  golden::Params params{in, device_out, {}};
  if (matrix[1] > 0) {
    const int error = encode_matrix(params, in + matrix[0], matrix[1], matrix[2]);
    if (error != cudaSuccess) return error;
  }
  const int status = entry.launch(params, nullptr);
  if (status != cudaSuccess) return status;
  return cudaMemcpy(out, device_out, out_bytes, cudaMemcpyDeviceToHost);
}

}  // namespace

// matrix: first word, rows (0 = no matrix), columns. -> a cudaError_t, or -1: no such case.
extern "C" int golden_run(const char* name, const uint32_t* in, size_t in_words, uint32_t* out,
                          size_t out_words, const int64_t* matrix) {
  const golden::Entry* entry = golden::find(name);
  if (entry == nullptr) return -1;
  uint32_t* buffer = nullptr;
  const size_t out_begin = (in_words + 63) / 64 * 64;  // as aligned as the buffer
  int error = cudaMalloc(&buffer, 4 * (out_begin + out_words));
  if (error != cudaSuccess) return error;
  uint32_t* device_out = buffer + out_begin;
  error = cudaMemcpy(buffer, in, 4 * in_words, cudaMemcpyHostToDevice);
  if (error == cudaSuccess) {
    error = cudaMemcpy(device_out, out, 4 * out_words, cudaMemcpyHostToDevice);
  }
  if (error == cudaSuccess) error = run(*entry, buffer, device_out, out, 4 * out_words, matrix);
  cudaFree(buffer);
  return error;
}

// The status of a launch that a GPU must refuse, for its threads or for its shared memory. `kept`
// is the error that the runtime still holds afterwards.
extern "C" int golden_refused(uint32_t threads, uint32_t smem_bytes, int* kept) {
  constexpr auto kernel = golden::golden_case<golden::Indices>;
  const int status = flashinfer_lite::arch::launch<kernel>({1, threads, smem_bytes}, nullptr,
                                                           golden::Params{});
  *kept = cudaGetLastError();
  return status;
}

// 10 * major + minor of the current device, or 0 without one.
extern "C" int golden_device() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

extern "C" const char* golden_error(int error) {
  return error < 0 ? "no such case" : cudaGetErrorString(static_cast<cudaError_t>(error));
}
"""


def fingerprint():
    """Of what the library is compiled from; times say nothing on a machine it was carried to."""
    digest = hashlib.sha256(" ".join([SOURCE, *FLAGS]).encode())
    for folder in ("common", "cuda/arch", "cuda/kernels/golden"):
        for path in sorted((ROOT / "csrc" / folder).glob("*.*h")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def stale():
    return not LIBRARY.exists() or not STAMP.exists() or STAMP.read_text() != fingerprint()


def build(toolkit):
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = FOLDER / "golden.cu"
    source.write_text(SOURCE)
    folders = [f"-I{ROOT / 'csrc'}", f"-L{toolkit.library}"]
    command = [toolkit.nvcc, *FLAGS, *folders, "-shared", "-o", LIBRARY, source]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:  # ptxas talks of every kernel, so only a failure is shown
        raise RuntimeError(f"golden.cu does not compile:\n{done.stdout}")
    STAMP.write_text(fingerprint())


class Gpu:
    """The loaded library. `arch`: compute capability of the device, e.g. 90; 0 without one."""

    def __init__(self):
        self._library = ctypes.CDLL(str(LIBRARY))
        self._library.golden_error.restype = ctypes.c_char_p
        self.arch = self._library.golden_device()

    def run(self, case):
        """-> the output words."""
        inputs, out = np.ascontiguousarray(case.inputs), case.output()
        matrix = (ctypes.c_int64 * 3)(*(case.matrix or (0, 0, 0)))
        error = self._library.golden_run(
            case.name.encode(),
            ctypes.c_void_p(inputs.ctypes.data),
            ctypes.c_size_t(len(inputs)),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_size_t(len(out)),
            matrix,
        )
        if error:
            raise RuntimeError(f"{case.name}: {self._library.golden_error(error).decode()}")
        return out

    def refused(self, threads, smem_bytes):
        """-> (status of the launch, error the runtime still holds)."""
        kept = ctypes.c_int()
        return self._library.golden_refused(threads, smem_bytes, ctypes.byref(kept)), kept.value


def main():
    parser = argparse.ArgumentParser(description="Run the golden cases on a GPU.")
    parser.add_argument("--build", action="store_true", help="compile only")
    arguments = parser.parse_args()
    if stale():
        toolkit, problem = build_cuda.find_toolkit()
        build(toolkit or sys.exit(f"golden_gpu: {problem}"))
    if arguments.build:
        return
    from golden_table import CASES

    gpu = Gpu()
    if not gpu.arch:
        sys.exit("golden_gpu: no CUDA device")
    cases = [case for case in CASES if case.min_arch <= gpu.arch]
    wrong = [text for case in cases if (text := case.mismatch(gpu.run(case)))]
    for threads, smem_bytes in ((2048, 0), (32, 1 << 20)):
        status, kept = gpu.refused(threads, smem_bytes)
        if not status or kept:
            wrong.append(f"launch of {threads} threads, {smem_bytes} bytes: {status}, kept {kept}")
    print(f"sm_{gpu.arch}: {len(cases)} cases, {len(wrong)} wrong", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
