"""The table of compiled CUDA kernels, and the generator of the translation units that hold them.

A row is one instantiation of one kernel. Each row becomes one source file in the build directory,
with the same text for nvcc and for the executor's g++, so what the tests run on a CPU is what a GPU
gets. `instances.cpp` lists the rows for the host code that chooses among them.

A dimension of a row is a template argument because it changes registers or the layout of shared
memory; lengths, strides, windows, splits and scale are run-time values and have no row.
"""

import fnmatch
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

SIXTEEN_BIT = ("bfloat16", "float16")
FLOAT32 = ("float32",)
# Name in the table -> (element type, enumerator of ElementType).
DTYPES = {
    "float32": ("float", "ElementType::kFloat32"),
    "bfloat16": ("BFloat16", "ElementType::kBFloat16"),
    "float16": ("Float16", "ElementType::kFloat16"),
}
TILE_FIELDS = ("head_dim", "block_m", "block_n", "num_warps", "num_stages")
MAX_ROWS_PER_KERNEL_AND_ARCH = 16
MAX_ROWS = 80


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What is the same for every row of a kernel on one architecture."""

    namespace: str  # of `template <class Cfg> struct Kernel` in the kernel's header
    fields: tuple[str, ...]  # what a row must say, besides kernel, arch and dtype
    # Machine instructions that each row must contain; `make sass` looks for them.
    sixteen_bit_instructions: tuple[str, ...]
    float32_instructions: tuple[str, ...]

    def instructions(self, dtype):
        return self.sixteen_bit_instructions if dtype in SIXTEEN_BIT else self.float32_instructions


FLAT_FIELDS = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
TENSOR_CORE = ("HMMA", "LDSM", "LDGSTS", "MUFU.EX2")
KERNELS = {
    ("attention_fwd", 80): Kernel(
        namespace="attention_fwd",
        fields=TILE_FIELDS,
        sixteen_bit_instructions=TENSOR_CORE,
        float32_instructions=("FFMA", "LDGSTS", "MUFU.EX2"),
    ),
    ("decode", 80): Kernel(
        namespace="decode_kernel",
        fields=TILE_FIELDS,
        sixteen_bit_instructions=TENSOR_CORE,
        float32_instructions=("FFMA", "LDGSTS", "MUFU.EX2"),
    ),
    ("attention_bwd", 80): Kernel(
        namespace="attention_bwd",
        fields=TILE_FIELDS,
        sixteen_bit_instructions=TENSOR_CORE,
        float32_instructions=("FFMA", "LDGSTS", "MUFU.EX2"),
    ),
    ("combine", 80): Kernel(
        namespace="combine",
        fields=("partial",),
        sixteen_bit_instructions=("LDG", "STG", "MUFU.EX2"),
        float32_instructions=("LDG", "STG", "MUFU.EX2"),
    ),
    ("append_kv", 80): Kernel(
        namespace="append_kv",
        fields=(),
        sixteen_bit_instructions=("LDG", "STG", "FMUL"),
        float32_instructions=("LDG", "STG", "FMUL"),
    ),
    ("flat_gemm", 80): Kernel(
        namespace="flat_gemm",
        fields=FLAT_FIELDS,
        sixteen_bit_instructions=("HMMA", "LDSM", "LDGSTS", "ATOMG"),
        float32_instructions=(),
    ),
    ("gemv", 80): Kernel(
        namespace="gemv",
        fields=("block_m", "block_n", "num_warps"),
        sixteen_bit_instructions=("LDG.E.128", "FFMA", "SHFL"),
        float32_instructions=(),
    ),
}


@dataclass(frozen=True)
class Spill:
    """What a row may spill, and why that is accepted."""

    bytes: int  # stored and loaded again, on the architecture that spills most
    why: str


@dataclass(frozen=True, kw_only=True)
class Row:
    kernel: str
    arch: int
    dtype: str
    partial: str | None = None  # dtype of the partial results that a combine kernel reads
    head_dim: int | None = None
    block_m: int | None = None  # query rows per block; of flat_gemm and gemv: rows of x
    block_n: int | None = None  # keys per step; of flat_gemm and gemv: rows of the weight per block
    block_k: int | None = None  # columns of the weight per step
    num_warps: int | None = None
    num_stages: int | None = None
    allow_spill: Spill | None = None  # without it, a spill fails the report

    @property
    def name(self):
        parts = [self.kernel, f"sm{self.arch}", self.dtype]
        if self.partial is not None:
            parts.append(f"from_{self.partial}")
        if self.head_dim is not None:
            parts.append(f"d{self.head_dim}")
        elif self.block_m is not None:
            parts.append(f"m{self.block_m}")
        if (self.num_stages or 1) > 1:
            parts.append(f"s{self.num_stages}")
        if (self.num_warps or 1) > 4:
            parts.append(f"w{self.num_warps}")
        return "_".join(parts)

    @property
    def traits(self):
        return KERNELS[self.kernel, self.arch]


def rows(dtypes, **fields):
    """One row for each dtype."""
    return [Row(dtype=dtype, **fields) for dtype in dtypes]


attention_fwd_sm80 = partial(rows, kernel="attention_fwd", arch=80, num_stages=1)
attention_bwd_sm80 = partial(rows, kernel="attention_bwd", arch=80)
decode_sm80 = partial(rows, kernel="decode", arch=80, block_m=16)
combine_sm80 = partial(rows, kernel="combine", arch=80)
flat_gemm_sm80 = partial(rows, SIXTEEN_BIT, kernel="flat_gemm", arch=80, block_k=64, num_warps=4)
gemv_sm80 = partial(rows, SIXTEEN_BIT, kernel="gemv", arch=80, num_warps=4)

ROWS = [
    *attention_fwd_sm80(SIXTEEN_BIT, head_dim=64, block_m=128, block_n=64, num_warps=4),
    *attention_fwd_sm80(
        SIXTEEN_BIT,
        head_dim=128,
        block_m=128,
        block_n=32,
        num_warps=4,
        allow_spill=Spill(100, "12 words, of ragged batches alone"),
    ),
    *attention_fwd_sm80(SIXTEEN_BIT, head_dim=256, block_m=64, block_n=64, num_warps=4),
    *attention_fwd_sm80(
        SIXTEEN_BIT,
        head_dim=256,
        block_m=128,
        block_n=64,
        num_warps=8,
        allow_spill=Spill(
            188, "16 words of ragged batches on sm_80; on sm_90 11, and 12 of ragged ones"
        ),
    ),
    *attention_fwd_sm80(FLOAT32, head_dim=64, block_m=64, block_n=64, num_warps=4),
    *attention_fwd_sm80(FLOAT32, head_dim=128, block_m=64, block_n=32, num_warps=4),
    *attention_fwd_sm80(FLOAT32, head_dim=256, block_m=32, block_n=32, num_warps=2),
    # The first of a head_dim that shared memory has room for.
    *attention_bwd_sm80(
        SIXTEEN_BIT, head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=2
    ),
    *attention_bwd_sm80(
        SIXTEEN_BIT,
        head_dim=128,
        block_m=64,
        block_n=128,
        num_warps=8,
        num_stages=2,
        allow_spill=Spill(248, "21 words, of ragged batches alone, on sm_80"),
    ),
    *attention_bwd_sm80(
        SIXTEEN_BIT, head_dim=128, block_m=32, block_n=64, num_warps=4, num_stages=2
    ),
    *attention_bwd_sm80(
        SIXTEEN_BIT, head_dim=256, block_m=64, block_n=64, num_warps=8, num_stages=2
    ),
    *attention_bwd_sm80(
        SIXTEEN_BIT,
        head_dim=256,
        block_m=64,
        block_n=64,
        num_warps=8,
        num_stages=1,
        allow_spill=Spill(28, "three words of queries of ragged batches; on sm_80 two of keys"),
    ),
    *attention_bwd_sm80(
        SIXTEEN_BIT,
        head_dim=256,
        block_m=32,
        block_n=32,
        num_warps=4,
        num_stages=1,
        allow_spill=Spill(76, "of queries: six words of ragged batches, on sm_90 eight of dense"),
    ),
    *attention_bwd_sm80(FLOAT32, head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=1),
    *attention_bwd_sm80(
        FLOAT32,
        head_dim=128,
        block_m=32,
        block_n=32,
        num_warps=4,
        num_stages=1,
        allow_spill=Spill(32, "four words of queries of ragged batches, on sm_90"),
    ),
    *attention_bwd_sm80(FLOAT32, head_dim=256, block_m=16, block_n=16, num_warps=2, num_stages=1),
    *decode_sm80(SIXTEEN_BIT, head_dim=64, block_n=32, num_warps=4, num_stages=2),
    *decode_sm80(SIXTEEN_BIT, head_dim=128, block_n=16, num_warps=4, num_stages=2),
    *decode_sm80(SIXTEEN_BIT, head_dim=256, block_n=16, num_warps=2, num_stages=2),
    *decode_sm80(FLOAT32, head_dim=64, block_n=16, num_warps=4, num_stages=2),
    *decode_sm80(FLOAT32, head_dim=128, block_n=16, num_warps=2, num_stages=2),
    *decode_sm80(FLOAT32, head_dim=256, block_n=16, num_warps=2, num_stages=1),
    *combine_sm80(SIXTEEN_BIT, partial="float32"),
    *combine_sm80(["bfloat16"], partial="bfloat16"),
    *combine_sm80(["float16"], partial="float16"),
    *combine_sm80(FLOAT32, partial="float32"),
    *rows(("float32", *SIXTEEN_BIT), kernel="append_kv", arch=80),
    # The least block_m that is enough, or the last.
    *flat_gemm_sm80(block_m=8, block_n=64, num_stages=6),
    *flat_gemm_sm80(block_m=16, block_n=64, num_stages=6),
    *flat_gemm_sm80(block_m=32, block_n=64, num_stages=6),
    *flat_gemm_sm80(block_m=64, block_n=128, num_stages=4),
    *gemv_sm80(block_m=1, block_n=4),
    *gemv_sm80(block_m=2, block_n=8),
    *gemv_sm80(block_m=4, block_n=8),
]


def selected_rows():
    """The rows to compile: all, or those that FLASHINFER_LITE_ROWS names, e.g. decode_*_d64_s2."""
    asked = os.environ.get("FLASHINFER_LITE_ROWS")
    if not asked:
        return ROWS
    patterns = asked.split(",")
    for pattern in patterns:
        if not fnmatch.filter((row.name for row in ROWS), pattern):
            raise SystemExit(f"flashinfer_lite: FLASHINFER_LITE_ROWS: no row matches {pattern!r}")
    return [row for row in ROWS if any(fnmatch.fnmatch(row.name, one) for one in patterns)]


def unit_text(row):
    """The translation unit of a row."""
    element, enumerator = DTYPES[row.dtype]
    types = {"Element": element}
    info = {"name": f'"{row.name}"', "kernel": f'"{row.kernel}"', "arch": row.arch}
    info["element"] = enumerator
    if row.partial is not None:
        types["Partial"], info["partial"] = DTYPES[row.partial]
    numbers = {field: getattr(row, field) for field in row.traits.fields if field != "partial"}
    kernel = f"{row.traits.namespace}::Kernel<Cfg>"
    return "\n".join(
        [
            f"// {row.name}: generated by csrc/instances.py",
            f'#include "cuda/kernels/{row.kernel}/sm{row.arch}.cuh"',
            '#include "cuda/instance.h"',
            "",
            f"namespace flashinfer_lite::cuda::{row.name} {{",
            "struct Cfg {",
            *(f"  using {name} = {value};" for name, value in types.items()),
            *(f"  static constexpr int {name} = {value};" for name, value in numbers.items()),
            "};",
            "extern const Instance instance;",
            f"constinit const Instance instance = make_instance<{kernel}>({{",
            *(f"    .{name} = {value}," for name, value in {**info, **numbers}.items()),
            "});",
            "}",
            "",
        ]
    )


def list_text(chosen):
    """instances.cpp: what cuda/instance.h declares."""
    return "\n".join(
        [
            "// generated by csrc/instances.py",
            '#include "cuda/instance.h"',
            "",
            "namespace flashinfer_lite::cuda {",
            *(f"namespace {row.name} {{ extern const Instance instance; }}" for row in chosen),
            "const Instance* const kInstances[] = {",
            *(f"    &{row.name}::instance," for row in chosen),
            "};",
            f"const int kNumInstances = {len(chosen)};",
            "}",
            "",
        ]
    )


def write_if_changed(path, text):
    """Leave an unchanged file alone: its time stamp decides what is compiled again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def generate(folder, suffix, chosen):
    """Write the sources of the chosen rows; -> ({row: path}, path of instances.cpp).

    Files of rows that are no longer in the table are removed.
    """
    folder = Path(folder)
    units = {row: folder / f"{row.name}{suffix}" for row in chosen}
    listing = folder / "instances.cpp"
    for row, path in units.items():
        write_if_changed(path, unit_text(row))
    write_if_changed(listing, list_text(chosen))
    for stale in set(folder.glob(f"*{suffix}")) - {*units.values(), listing}:
        stale.unlink()
    return units, listing


def write_manifest(folder):
    """A program that prints `name smem_bytes` of each row: only the compiler knows the latter."""
    path = Path(folder) / "manifest.cpp"
    lines = [
        "// generated by csrc/instances.py",
        "#include <cstdio>",
        "",
        '#include "cuda/instance.h"',
        "",
        "int main() {",
        "  using namespace flashinfer_lite::cuda;",
        "  for (int i = 0; i < kNumInstances; ++i) {",
        '    std::printf("%s %d\\n", kInstances[i]->name, kInstances[i]->smem_bytes);',
        "  }",
        "}",
        "",
    ]
    write_if_changed(path, "\n".join(lines))
    return path
