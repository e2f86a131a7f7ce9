"""Each function of cuda/arch becomes the PTX instruction that it stands for, and no other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from arch_declarations import ARCH, declared

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import build_cuda

CSRC = ARCH.parent.parent
MMA = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.{0}\.{0}\.f32 "
# PTX has no untyped 8-bit operands, so a byte is .u8; wider ones are untyped.
WIDTHS = {
    "uint8_t": "u8",
    "BFloat16": "b16",
    "uint32_t": "b32",
    "float": "b32",
    "U32x2": "v2.b32",
    "U32x4": "v4.b32",
}

# (function, statement, the instruction it makes). A statement may use a, b, c, d (fragments), x, y
# (float), u (uint32_t) and p (a pointer, from cast<T>()), and shows its result through out(...).
SCALAR = [
    ("thread_idx", "out(thread_idx());", r"mov\.u32\s.*%tid\.x"),
    ("block_idx", "out(block_idx());", r"mov\.u32\s.*%ctaid\.x"),
    ("num_blocks", "out(num_blocks());", r"mov\.u32\s.*%nctaid\.x"),
    ("dynamic_smem", "out(dynamic_smem());", r"mov\.u32\s.*dynamic_smem_begin"),
    ("exp2", "out(exp2(x));", r"ex2\.approx\.ftz\.f32 "),
    ("log2", "out(log2(x));", r"lg2\.approx\.ftz\.f32 "),
    ("tanh", "out(tanh(x));", r"ex2\.approx\.(ftz\.)?f32 "),
    ("pack", "out(pack<BFloat16>(x, y));", r"cvt\.rn\.bf16x2\.f32 "),
    ("pack", "out(pack<Float16>(x, y));", r"cvt\.rn\.f16x2\.f32 "),
    ("to_float", "out(to_float(BFloat16{h}));", r"shl\.b32 |mov\.b32 .*\{"),
    ("to_float", "out(to_float(Float16{h}));", r"cvt\.f32\.f16 "),
    ("to_float", "out(to_float(x));", r"st\.global"),
    ("from_float", "out(from_float<BFloat16>(x).bits);", r"cvt\.rn\.bf16\.f32 "),
    ("from_float", "out(from_float<Float16>(x).bits);", r"cvt\.rn\.f16\.f32 "),
    ("opaque", "out(opaque(u));", r"// begin inline asm\s+// end inline asm"),
    ("predicate", "out(predicate(u > 3));", r"setp\.gt\.u32 "),
]
WARP_AND_BLOCK = [
    ("sync_warp", "sync_warp(u);", r"bar\.warp\.sync "),
    ("shfl_xor", "out(shfl_xor(x, 1));", r"shfl\.sync\.bfly\.b32 \s*%\w+\|%p\d+, "),
    ("shfl", "out(shfl(u, 5));", r"shfl\.sync\.idx\.b32 \s*%\w+\|%p\d+, "),
    ("ballot", "out(ballot(u > 3));", r"vote\.sync\.ballot\.b32 "),
    ("any", "out(any(u > 3));", r"vote\.sync\.any\.pred "),
    ("all", "out(all(u > 3));", r"vote\.sync\.all\.pred "),
    ("sync_threads", "sync_threads();", r"bar(rier)?\.sync \s*0;"),
    ("sync_threads_or", "out(sync_threads_or(u > 3));", r"bar(rier)?\.red\.or\.pred .*, 0,"),
    ("bar_sync", "bar_sync(u, 64);", r"bar(rier)?\.sync %r\d+, %r\d+;"),
    ("bar_arrive", "bar_arrive(u, 64);", r"bar(rier)?\.arrive %r\d+, %r\d+;"),
]
MEMORY = [
    *(
        case
        for type, width in WIDTHS.items()
        for case in (
            ("lds", f"stg(cast<{type}>(p), lds<{type}>(u));", rf"ld\.shared\.{width} "),
            ("sts", f"sts(u, ldg(cast<{type}>(p)));", rf"st\.shared\.{width} "),
            ("ldg", f"sts(u, ldg(cast<{type}>(p)));", rf"ld\.global\.{width} "),
            ("stg", f"stg(cast<{type}>(p), lds<{type}>(u));", rf"st\.global\.{width} "),
        )
    ),
    ("prefetch_l2", "prefetch_l2(p);", r"prefetch\.global\.L2 "),
    ("atomic_add", "out(atomic_add(cast<int32_t>(p), int32_t{3}));", r"atom\.global\.add\.[us]32 "),
    ("atomic_add", "out(atomic_add(cast<uint32_t>(p), 3u));", r"atom\.global\.add\.u32 "),
    (
        "atomic_add",
        "out(atomic_add(cast<uint64_t>(p), uint64_t{3}));",
        r"atom\.global\.add\.u64 ",
    ),
    ("atomic_add", "out(atomic_add(cast<float>(p), x));", r"atom\.global\.add\.f32 "),
    ("ticket", "out(ticket(cast<uint32_t>(p), 5));", r"atom\.global\.inc\.u32 .*, 5;"),
    ("fence_gpu", "fence_gpu();", r"fence\.acq_rel\.gpu;"),
    ("cp_async_16", "cp_async_16(u, p, 7);", r"cp\.async\.cg\.shared\.global \[%r\d+\], .*, 16, "),
    ("cp_async_commit", "cp_async_commit();", r"cp\.async\.commit_group;"),
    ("cp_async_wait", "cp_async_wait<2>();", r"cp\.async\.wait_group 2;"),
]
TENSOR = [
    ("ldmatrix_x4", "ldmatrix_x4(a, u);", r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 "),
    (
        "ldmatrix_x4_trans",
        "ldmatrix_x4_trans(a, u);",
        r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16 ",
    ),
    ("mma_m16n8k16", "mma_m16n8k16<BFloat16>(d[0], a, b[0]);", MMA.format("bf16")),
    ("mma_m16n8k16", "mma_m16n8k16<Float16>(d[0], a, b[0]);", MMA.format("f16")),
    ("mma_m16n8k16_row", "mma_m16n8k16_row<BFloat16, 1>(d, a, b);", MMA.format("bf16")),
    ("mma_m16n8k16_row", "mma_m16n8k16_row<Float16, 1>(d, a, b);", MMA.format("f16")),
]
HOPPER = [
    ("mbarrier_init", "mbarrier_init(u, 3);", r"mbarrier\.init\.shared::cta\.b64 \[%r\d+\], "),
    ("mbarrier_arrive", "mbarrier_arrive(u);", r"mbarrier\.arrive\.shared::cta\.b64 _, "),
    (
        "mbarrier_arrive_expect_tx",
        "mbarrier_arrive_expect_tx(u, 64);",
        r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, ",
    ),
    (
        "mbarrier_wait",
        "mbarrier_wait(u, 1);",
        r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, ",
    ),
    (
        "mbarrier_test_wait",
        "out(mbarrier_test_wait(u, 1));",
        r"mbarrier\.test_wait\.parity\.shared::cta\.b64 p, ",
    ),
    (
        "fence_mbarrier_init",
        "fence_mbarrier_init();",
        r"fence\.mbarrier_init\.release\.cluster;",
    ),
    ("fence_proxy_async", "fence_proxy_async();", r"fence\.proxy\.async\.shared::cta;"),
    (
        "tma_load_2d",
        "tma_load_2d(u, &map, 1, 2, u + 8);",
        r"cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\.tile"
        r"\.mbarrier::complete_tx::bytes \[%r\d+\], \[%rd\d+, \{%r\d+, %r\d+\}\], \[%r\d+\];",
    ),
]
ELECT = {80: r"mov\.u32 lane, %laneid;", 90: r"elect\.sync _\|p, 0xffffffff;"}
EVERYWHERE = [*SCALAR, *WARP_AND_BLOCK, *MEMORY, *TENSOR]
STATEMENTS = [
    *EVERYWHERE,
    *HOPPER,
    ("elect_one", "out(elect_one());", None),
    ("from_float", "out(from_float<float>(x));", r"st\.global"),
    ("mma_m16n8k16_row", "mma_m16n8k16_row<BFloat16, 3>(d, a, b);", None),
]

PROLOGUE = """
#include "cuda/arch/arch.cuh"
using namespace flashinfer_lite;
template <class T> __device__ T* cast(void* p) { return static_cast<T*>(p); }
"""
KERNEL = """
extern "C" __global__ void kernel_{index}(uint32_t u, float x, float y, uint16_t h, void* p,
                                          const __grid_constant__ TensorMap map, uint32_t* words) {{
  uint32_t a[4], b[3][2];
  float d[3][4];
  for (int i = 0; i < 4; ++i) a[i] = words[i];
  for (int i = 0; i < 6; ++i) b[i / 2][i % 2] = words[4 + i];
  for (int i = 0; i < 12; ++i) d[i / 4][i % 4] = words[10 + i];
  auto out = [&](auto value) {{ *cast<decltype(value)>(words + 22) = value; }};
  {statement}
  for (int i = 0; i < 4; ++i) words[30 + i] = a[i];
  for (int i = 0; i < 12; ++i) cast<float>(words)[40 + i] = d[i / 4][i % 4];
}}
"""


@pytest.fixture(scope="module", params=[80, 90])
def ptx(request, tmp_path_factory):
    """(architecture, {statement: the PTX of its kernel})."""
    toolkit, problem = build_cuda.find_toolkit()
    if toolkit is None:
        pytest.skip(problem)
    source = tmp_path_factory.mktemp("ptx") / "statements.cu"
    names = re.compile(rf"\b({'|'.join(declared('ptx'))})(?=[<(])")
    kernels = [
        KERNEL.format(index=i, statement=names.sub(r"arch::\1", statement))
        for i, (_, statement, _) in enumerate(STATEMENTS)
    ]
    source.write_text(PROLOGUE + "".join(kernels))
    target = "compute_90a" if request.param == 90 else "compute_80"
    flags = ["-std=c++20", "--expt-relaxed-constexpr", f"-I{CSRC}", f"-arch={target}", "-ptx"]
    flags += ["-diag-suppress=177,550"]  # variables that a kernel does not need
    subprocess.run([toolkit.nvcc, *flags, "-o", source.with_suffix(".ptx"), source], check=True)
    text = source.with_suffix(".ptx").read_text()
    assert re.search(r"\.extern \.shared \.align 1024 \.b8 \w*dynamic_smem_begin", text)
    bodies = re.split(r"\.entry kernel_(\d+)", text)[1:]
    pairs = zip(bodies[::2], bodies[1::2], strict=True)
    return request.param, {STATEMENTS[int(index)][1]: body for index, body in pairs}


def test_every_function_has_a_statement():
    assert {function for function, _, _ in STATEMENTS} == set(declared("ptx")) - {"launch"}


def test_instructions(ptx):
    arch, bodies = ptx
    expected = [*EVERYWHERE, ("elect_one", "out(elect_one());", ELECT[arch])]
    if arch == 90:
        expected += HOPPER
    missing = [
        f"{statement} makes no {instruction}"
        for _, statement, instruction in expected
        if not re.search(instruction, bodies[statement])
    ]
    assert not missing, "\n".join(missing)


def test_a_row_is_one_mma_a_tile(ptx):
    _, bodies = ptx
    assert (
        len(re.findall(MMA.format("bf16"), bodies["mma_m16n8k16_row<BFloat16, 3>(d, a, b);"])) == 3
    )


def test_the_first_source_of_a_pack_is_the_upper_half(ptx):
    _, bodies = ptx
    for statement in ("out(pack<BFloat16>(x, y));", "out(pack<Float16>(x, y));"):
        body = bodies[statement]
        lo, hi = (
            re.search(rf"ld\.param\.[bf]32\s+(%\w+), \[kernel_\d+_param_{i}\];", body)[1]
            for i in (1, 2)
        )
        assert re.search(rf"cvt\.rn\.b?f16x2\.f32 %r\d+, {hi}, {lo};", body), statement


def test_hopper_instructions_trap_on_older_architectures(ptx):
    arch, bodies = ptx
    if arch >= 90:
        assert not any("trap;" in body for body in bodies.values())
        return
    for _, statement, instruction in HOPPER:
        assert "trap;" in bodies[statement], statement
        assert not re.search(instruction, bodies[statement]), statement
