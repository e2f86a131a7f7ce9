"""The emulated tiles against an exact model of the instructions, and the packers for them.

The kernels on these tiles are tested as every level is, through `isa`.
"""

import ctypes
import itertools
import math
import os
import platform
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from page_ends import run_child

import flashinfer_lite
from flashinfer_lite import attention
from flashinfer_lite.testing import (
    AMX_EMULATED,
    EMULATED,
    current_isa,
    force_isa,
    isa_levels,
    make_qkv,
)

ROOT = Path(__file__).parent.parent
SMALLEST, INF, NAN = 2.0**-126, math.inf, math.nan
pytestmark = [
    pytest.mark.cpu_only("the tiles are a processor's"),
    pytest.mark.skipif(
        platform.machine() != "x86_64" or AMX_EMULATED not in isa_levels(emulated=True),
        reason="the emulation needs AVX2",
    ),
]


def compile_probe(path, *definitions):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra"]
    source = Path(__file__).with_name("amx_probe.cpp")
    includes = f"-I{ROOT / 'csrc'}"
    command = [compiler, *flags, *definitions, includes, str(source), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_probe(tmp_path_factory.mktemp("amx") / "amx_probe.so")


@pytest.fixture(scope="module")
def probe(library):
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def dot_probe(tmp_path_factory):
    path = tmp_path_factory.mktemp("dot") / "dot_probe.so"
    return ctypes.CDLL(str(compile_probe(path, "-DDOT_TILES")))


@pytest.fixture(params=["amx", "dot"])
def either(request):
    """A probe of the tiles of either kind."""
    return request.getfixturevalue("probe" if request.param == "amx" else "dot_probe")


def call(function, *arguments):
    function(
        *(
            ctypes.c_void_p(x.data_ptr()) if torch.is_tensor(x) else ctypes.c_int64(x)
            for x in arguments
        )
    )


def round32(x):
    """A rational to float32: nearest even; what is below the smallest normal then, zero."""
    if x == 0:
        return 0.0
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    step = Fraction(2) ** (exponent - 23)
    magnitude = round(magnitude / step) * step
    rounded = INF if magnitude >= 2**128 else float(magnitude) if magnitude >= SMALLEST else 0.0
    return math.copysign(rounded, x)


def multiply_add(a, b, c):
    if all(map(math.isfinite, (a, b, c))):
        return round32(Fraction(a) * Fraction(b) + Fraction(c))
    product = NAN if 0 in (a, b) and not math.isfinite(a + b) else a * b
    return product + c


def normal(x):
    return x if abs(x) >= SMALLEST or math.isnan(x) else 0.0


def model(a, b, c):
    """TDPBF16PS as Intel's manual writes it; a [m, k, 2], b [k, n, 2], c [m, n]."""
    (rows, cols), pairs = c.shape, a.shape[1]
    a, b, c = ([normal(x) for x in t.double().flatten().tolist()] for t in (a, b, c))
    out = []
    for m, n in itertools.product(range(rows), range(cols)):
        even = odd = 0.0
        for k in range(pairs):
            left, right = 2 * (m * pairs + k), 2 * (k * cols + n)
            even = multiply_add(a[left], b[right], even)
            odd = multiply_add(a[left + 1], b[right + 1], odd)
        out.append(multiply_add(1.0, multiply_add(1.0, even, odd), c[m * cols + n]))
    return torch.tensor(out, dtype=torch.float64).reshape(rows, cols)


def any_bits(*shape):
    """bfloat16 of any bits: of all magnitudes, denormals, NaN and inf among them."""
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)


def check_multiply(probe, a, b, c):
    expected = model(a, b, c)
    before = probe.mxcsr()
    call(probe.multiply, c.shape[0], a.shape[1], c.shape[1], a, b, c)
    assert probe.mxcsr() == before  # neither the mode nor a flag
    torch.testing.assert_close(c.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 16, 16), (3, 5, 7), (16, 1, 2), (2, 16, 13)])
@pytest.mark.parametrize("kind", ["ordinary", "denormal", "any"])
def test_products_bit_for_bit(device, probe, shape, kind):
    rows, pairs, cols = shape
    c = torch.randn(rows, cols)
    if kind == "any":
        a, b = any_bits(rows, pairs, 2), any_bits(pairs, cols, 2)
    else:
        a, b = torch.randn(rows, pairs, 2), torch.randn(pairs, cols, 2)
        if kind == "denormal":  # products and sums about the smallest normal number, inputs too
            a, b, c = a * 2.0**-60, b * 2.0**-66, c * 2.0**-126
            a[::2, ::3] *= 2.0**-66
        a, b = a.bfloat16(), b.bfloat16()
    check_multiply(probe, a, b, c)


@pytest.mark.parametrize("rows", range(1, 17))
def test_every_number_of_rows(device, probe, rows):
    a, b = torch.randn(rows, 2, 2).bfloat16(), torch.randn(2, 16, 2).bfloat16()
    check_multiply(probe, a, b, torch.zeros(rows, 16))


def test_products_of_pairs_bit_for_bit(device, dot_probe):
    # VDPBF16PS as Intel's manual writes it, the odd members first; 16 of them, then c.
    a, b = torch.randn(16, 16, 2).bfloat16(), torch.randn(16, 16, 2).bfloat16()
    a[3, 5, 1], b[7, 2, 0], c = NAN, INF, torch.randn(16, 16)
    expected = torch.empty(16, 16, dtype=torch.float64)
    for m, n in itertools.product(range(16), range(16)):
        total = 0.0
        for k, half in itertools.product(range(16), (1, 0)):
            total = multiply_add(a[m, k, half].item(), b[k, n, half].item(), total)
        expected[m, n] = multiply_add(1.0, total, c[m, n].item())
    call(dot_probe.multiply, 16, 16, 16, a, b, c)
    torch.testing.assert_close(c.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        ((1.0, 0.0), (2.0**-130, 0.0), 0.0, 0.0),  # a denormal factor is zero
        ((1.0, 0.0), (1.0, 0.0), 2.0**-130, 1.0),  # and so is a denormal sum
        ((2.0**-70, 0.0), (2.0**-60, 0.0), 0.0, 0.0),  # and a denormal product
        ((INF, 0.0), (0.0, 0.0), 0.0, NAN),
        ((INF, 1.0), (1.0, 1.0), 0.0, INF),
        ((INF, INF), (1.0, -1.0), 0.0, NAN),
        ((0.0, NAN), (0.0, 0.0), 0.0, NAN),
        ((2.0**100, -(2.0**100)), (2.0**100, 2.0**100), 0.0, NAN),  # each overflows, then they meet
        ((1.0, 2.0**-24), (1.0, 1.0), -1.0, 0.0),  # a pair is rounded before it is added: to even
    ],
)
def test_special_products(device, probe, a, b, c, expected):
    a, b = (torch.tensor([[x]]).bfloat16() for x in (a, b))
    c = torch.tensor([[c]])
    check_multiply(probe, a, b, c)
    assert c.item() == expected or (math.isnan(expected) and math.isnan(c.item()))


@pytest.mark.parametrize("which", range(12))
def test_misuse_traps(device, library, which):
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).misuse({which})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode == 0) == (which == 11)  # the last is none


def test_rounding_to_bfloat16(device, probe):
    x = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).int()
    x[:4096] = x[:4096] & -65536 | 0x8000  # ties
    x[4096:8192] |= 0x7F800000  # NaN
    x = x.view(torch.float32)
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    call(probe.round_floats, x.numel(), x, out)
    expected = torch.where(x.abs() < SMALLEST, x * 0, x).bfloat16()
    assert torch.equal(out.isnan(), x.isnan())
    finite = ~x.isnan()
    assert torch.equal(out[finite].view(torch.int16), expected[finite].view(torch.int16))


def test_rounding_of_two_rows(device, probe):
    rows = torch.randn(2, 1 << 12)
    rows[:, :4] = torch.tensor([[NAN, INF, 2.0**-130, 0.0], [-INF, -NAN, 1.0, -(2.0**-130)]])
    pairs, even, odd = (torch.empty(n << 12, dtype=torch.bfloat16) for n in (2, 1, 1))
    call(probe.round_pairs, 1 << 12, rows[0], rows[1], pairs, even, odd)
    expected = torch.where(rows.abs() < SMALLEST, 0.0, rows).bfloat16()
    for found in (torch.stack([even, odd]), pairs.view(-1, 2).T):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_short_exponentials(device, probe):
    x = torch.cat([torch.linspace(-126, 0, 1 << 16), torch.linspace(-2, 0, 1 << 16)])
    x[:2] = torch.tensor([-126.0, NAN])
    outside = torch.tensor([-INF, -1e30, -128.0, -127.0, -126.6, 8.0, 126.0, 0.0])
    out = torch.empty_like(x)
    call(probe.short_exponentials, x.numel(), x, out)
    exact = torch.exp2(x.double())
    assert out[1].isnan() and out[-1] == 1 and (out[2:] <= 1).all()
    assert ((out / exact - 1).abs()[[0, *range(2, len(x))]] < 3.1e-6).all()
    call(probe.short_exponentials, 8, outside, out)
    assert not out[:5].any() and (out[5:8] / 2.0 ** outside[5:] - 1).abs().max() < 3.1e-6


def up(n, multiple=32):
    return -(-n // multiple) * multiple


def unpacked(tiles, depth, cols):
    """The right factor [depth, cols] that tiles hold."""
    words = tiles.view(up(cols) // 16, up(depth) // 2, 16, 2)
    return words.permute(1, 3, 0, 2).reshape(up(depth), up(cols))


PACKED = [(1, 8), (2, 256), (15, 24), (16, 32), (17, 40), (31, 72), (33, 64), (64, 8), (127, 120)]


@pytest.mark.parametrize(("count", "depth"), PACKED)
def test_pack_keys(device, probe, count, depth):
    # Any bits: a packer moves them. Rows lie apart, at an odd stride.
    k = any_bits(count, depth + 5)[:, :depth]
    tiles, staging = any_bits(up(count) * up(depth)), any_bits(16 * up(depth))
    call(probe.keys, count, depth, k, k.stride(0), tiles, staging)
    found = unpacked(tiles, depth, count)
    assert torch.equal(found[:depth, :count].view(torch.int16), k.T.view(torch.int16))
    assert not found[depth:].any() and not found[:, count:].any()


@pytest.mark.parametrize("finite_only", [False, True])
@pytest.mark.parametrize(("count", "cols"), PACKED)
def test_pack_values(device, probe, count, cols, finite_only):
    v = any_bits(count, cols + 5)[:, :cols]
    tiles = any_bits(up(count) * up(cols))
    call(probe.values, finite_only, count, cols, v, v.stride(0), tiles)
    found = unpacked(tiles, count, cols)
    expected = torch.where(v.isfinite(), v, 0.0) if finite_only else v
    assert torch.equal(found[:count, :cols].view(torch.int16), expected.view(torch.int16))
    assert not found[count:].any() and not found[:, cols:].any()


@pytest.mark.parametrize("rows", [1, 16, 17, 32])
@pytest.mark.parametrize(("count", "depth"), PACKED)
def test_product_of_packed_keys(device, either, rows, count, depth):
    a, k = torch.zeros(32, up(depth)), torch.randn(count, depth).bfloat16()
    a[:rows, :depth] = torch.randn(rows, depth)
    a, c = a.bfloat16(), torch.randn(32, up(count) + 3)
    tiles, staging = any_bits(up(count) * up(depth)), any_bits(16 * up(depth))
    call(either.keys, count, depth, k, depth, tiles, staging)
    for accumulate in (False, True):
        expected = a[:rows].double()[:, :depth] @ k.double().T
        expected += c[:rows, :count].double() * accumulate
        call(either.gemm, rows, count, depth, a, a.stride(0), tiles, c, c.stride(0), accumulate)
        bound = 2.0**-22 * (a.double().abs()[:rows, :depth] @ k.double().abs().T + 4)
        assert ((c[:rows, :count].double() - expected).abs() <= bound).all()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_the_level_amx_has_the_instructions(device):
    # All that can be said of it on a processor without.
    built = next((ROOT / "flashinfer_lite").glob("_C_cpu*.so"))
    listing = subprocess.run(["objdump", "-d", built], capture_output=True, text=True).stdout
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert instruction in listing


def test_emulation_is_no_default(device):
    assert set(EMULATED).isdisjoint(isa_levels()) and set(EMULATED) <= set(isa_levels(True))
    with force_isa(None):
        assert flashinfer_lite.explain(attention, *make_qkv(1, 12, 12)).kernel[-8:] != "emulated"


def test_the_default_is_the_highest_level_that_is_fast(device):
    highest = isa_levels()[-1]
    if highest == "avx512-bf16" and "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        highest = "avx512"
    with force_isa(None):
        assert os.environ.get("FLASHINFER_LITE_ISA") or current_isa() == highest


@pytest.mark.parametrize("emulated", EMULATED)
def test_the_number_of_rows_does_not_change_a_bit(device, emulated):
    # More than 16 rows are packed, in blocks of at most 512 rows; fewer run in place.
    q, k, v = make_qkv(1, 300, 300, 2, 1, 40, dtype=torch.bfloat16)
    with force_isa(emulated):
        whole = attention(q, k, v)
        for first, last in ((0, 9), (5, 22), (100, 300), (290, 300)):
            part = attention(q[:, first:last], k, v)
            assert torch.equal(part, whole[:, first:last])
        whole = attention(q[:, :8], k, v)
        for first, last in ((0, 6), (1, 7), (2, 8)):
            part = attention(q[:, first:last], k, v)
            assert torch.equal(part, whole[:, first:last])


@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize("first_query", [0, 73])  # 73: 14 rows, in place
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_values_that_are_not_finite_reach_rows_that_see_them(device, value, first_query, emulated):
    q, k, v = make_qkv(1, 80, 80, 2, 1, 40, dtype=torch.bfloat16)
    q = q[:, first_query:]
    poisoned = v.clone()
    for key, column in ((20, 3), (41, 7), (78, 9)):
        v[0, key, 0, column], poisoned[0, key, 0, column] = 0.0, value
    with force_isa(emulated):
        expected, out = (attention(q, k, x, causal=True) for x in (v, poisoned))
    for key, column in ((20, 3), (41, 7), (78, 9)):
        expected[0, max(key - first_query, 0) :, :, column] = value
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


# q, k and v each end where a page begins that must not be touched.
AT_THE_END = """
import os, sys, torch
from flashinfer_lite import attention
from flashinfer_lite.testing import force_isa
from page_ends import at_the_end

for queries, keys, head_dim in ((1, 5, 8), (4, 33, 32), (8, 70, 40), (8, 96, 64), (50, 70, 72)):
    q, k, v = at_the_end(1, queries, 2, head_dim), *(at_the_end(1, keys, 1, head_dim) for _ in "kv")
    with force_isa(sys.argv[1]):
        out = attention(*(x.requires_grad_() for x in (q, k, v)))
        assert torch.equal(out, torch.full_like(out, 0.5))
        out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    print(queries, keys, head_dim, flush=True)
os._exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("emulated", EMULATED)
def test_nothing_behind_the_tensors_is_read(device, emulated):
    run_child(AT_THE_END, emulated)
