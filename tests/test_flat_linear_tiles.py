"""flat_gemm on tiles, emulated: more than one block of everything, tails, and whose bits depend on
what. test_flat_linear.py runs at these levels too."""

import random
import sys

import pytest
import torch
from page_ends import run_child

from flashinfer_lite import explain, flat_linear
from flashinfer_lite.testing import (
    AMX_EMULATED,
    EMULATED,
    assert_same_bits,
    force_isa,
    guarded,
    isa_levels,
)

pytestmark = [
    pytest.mark.cpu_only("the tiles are a processor's"),
    pytest.mark.skipif(
        AMX_EMULATED not in isa_levels(emulated=True), reason="the emulation is x86's"
    ),
]


@pytest.fixture(autouse=True, params=EMULATED)
def emulated(request):
    with force_isa(request.param):
        yield request.param


def run(x, weight, bias=None, out=None):
    return flat_linear(x, weight, bias, impl="flat_gemm", out=out)


def strided(rows, columns, gap, offset):
    """bfloat16 not centred, `offset` elements into memory; NaN wherever the rows are not."""
    row = columns + gap
    storage = torch.full((offset + rows * row,), torch.nan).bfloat16()
    view = storage[offset:].view(rows, row)[:, :columns]
    return view.copy_(torch.randn(rows, columns) + 0.25)


def assert_close(out, x, weight, bias):
    """Half a unit in bfloat16's last place, and what float32 sums of any order may lose."""
    x, weight = x.double(), weight.double()
    expected = x @ weight.T + (0 if bias is None else bias.double())
    lost = 2.0**-20 * (x.abs() @ weight.abs().T)
    error = (out.double() - expected).abs()
    assert (error <= 2.0**-8 * expected.abs() + lost).all(), error.max()


@pytest.mark.parametrize("seed", range(12))
def test_any_shape_and_strides(device, seed):
    rng = random.Random(seed)
    for _ in range(4):
        m, n = rng.randint(1, 130), rng.choice([1, 15, 16, 31, 32, 33, rng.randint(1, 700)])
        k = rng.choice([1, 31, 32, 33, rng.randint(1, 600), rng.randint(2049, 2300)])
        x = strided(m, k, rng.choice([0, 1, 7, 32]), rng.choice([0, 0, 1, 5]))
        weight = strided(n, k, rng.choice([0, 1, 7, 32]), rng.choice([0, 0, 1, 5]))
        bias = rng.choice([None, torch.randn(n).bfloat16()])
        out = guarded((m, n), torch.bfloat16, device, offset=rng.choice([0, 1]))
        out.tensor.fill_(torch.nan)
        run(x, weight, bias, out.tensor)
        out.assert_intact("out")
        assert_close(out.tensor, x, weight, bias)


# Two panels of the weight and a part of one; blocks of K: two, and a part of a tile's depth.
N, K = 603, 2100


@pytest.mark.parametrize("n, k", [(N, K), (31, K), (40, 32), (64, 4096)])
def test_bits_depend_on_no_number_of_rows_and_no_task(device, threads, n, k):
    x, weight, bias = strided(130, k, 0, 0), strided(n, k, 0, 0), torch.randn(n).bfloat16()
    threads(1)
    expected = run(x, weight, bias)
    assert_close(expected, x, weight, bias)
    for count in (1, 2, 5, 19):
        threads(count)
        for m in (1, 2, 15, 16, 17, 32, 33, 48, 49, 64, 65, 130) if count < 3 else (7, 130):
            out = torch.full((m, n), torch.nan).bfloat16()
            assert_same_bits(run(x[:m], weight, bias, out), expected[:m], f"first {m} of {count}")
            assert_same_bits(run(x[130 - m :], weight, bias), expected[130 - m :], f"last {m}")
    threads(1)
    for first, last in ((0, 1), (3, n), (max(n - 33, 0), n), (n // 2, n // 2 + 17)):
        part = run(x, weight[first:last], bias[first:last])
        assert_same_bits(part, expected[:, first:last].contiguous(), f"weight {first} to {last}")


@pytest.mark.parametrize("m", [1, 8, 33, 64, 130])
def test_every_thread_count_gives_every_element(device, threads, m):
    x, weight = strided(m, 1200, 0, 0), strided(1000, 1200, 3, 1)
    for count in (1, 2, 3, 40):
        threads(count)
        out = torch.full((m, 1000), torch.nan).bfloat16()
        assert_close(run(x, weight, None, out), x, weight, None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("n, k", [(N, K), (20, 70)])
def test_what_is_not_finite_stays_in_its_row_and_column(device, n, k, value):
    x, weight = strided(70, k, 0, 0), strided(n, k, 0, 0)
    expected = run(x, weight)
    for row, column, depth in ((0, n - 1, k - 1), (69, 0, 0), (17, n // 2, k // 2), (64, 15, 63)):
        for sick_x, sick_weight in ((True, False), (False, True)):
            sick = [x.clone(), weight.clone()]
            if sick_x:
                sick[0][row, depth] = value
            if sick_weight:
                sick[1][column, depth] = value
            out = run(*sick)
            part = out[row] if sick_x else out[:, column]
            assert not part.isfinite().any()
            part.copy_(expected[row] if sick_x else expected[:, column])
            assert_same_bits(out, expected)


def test_tiles_do_it(device):
    x, weight = strided(3, 40, 0, 0), strided(50, 40, 0, 0)
    assert explain(flat_linear, x, weight, impl="flat_gemm").tile == (64, 32)


@pytest.mark.parametrize("emulated", [AMX_EMULATED], indirect=True)
def test_denormals_are_zero(device):
    # On tiles, and on vectors not.
    x, weight = torch.full((3, 40), 2.0**-130).bfloat16(), torch.full((50, 40), 2.0**100).bfloat16()
    assert not run(x, weight).any()
    assert flat_linear(x, weight, impl="gemv").all()


# x and the weight each end where a page begins that must not be touched.
AT_THE_END = """
import os, sys, torch
from flashinfer_lite import flat_linear
from flashinfer_lite.testing import force_isa
from page_ends import at_the_end

for m, n, k in ((1, 1, 1), (3, 5, 33), (17, 33, 31), (2, 32, 32), (65, 70, 100), (4, 290, 2080)):
    with force_isa(sys.argv[1]):
        out = flat_linear(at_the_end(m, k), at_the_end(n, k), impl="flat_gemm")
    assert torch.equal(out, torch.full((m, n), k / 4).bfloat16())
    print(m, n, k, flush=True)
os._exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
def test_nothing_behind_the_tensors_is_read(device, emulated):
    run_child(AT_THE_END, emulated)
