"""flat_gemm and gemv on the executor: every row of the table against float64, its bits, its bytes.

tests/cuda_coverage.py records what ran, as for test_cuda_kernels.py.
"""

import random
from collections import Counter

import pytest
import torch
from cuda_coverage import ROWS
from test_flat_linear import check, make

from flashinfer_lite.testing import assert_same_bits, simt

pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")

FLAT_ROWS = [row for row in ROWS if row.kernel == "flat_gemm"]
GEMV_ROWS = [row for row in ROWS if row.kernel == "gemv"]
every_row = pytest.mark.parametrize("row", FLAT_ROWS + GEMV_ROWS, ids=lambda row: row.name)
every_flat_row = pytest.mark.parametrize("row", FLAT_ROWS, ids=lambda row: row.name)
every_gemv_row = pytest.mark.parametrize("row", GEMV_ROWS, ids=lambda row: row.name)
ORDERS = ({}, {"seed": 2, "eager": True}, {"seed": 3, "threads": 2})


def inputs(row, m, n, k, bias=True):
    return make(m, n, k, getattr(torch, row.dtype), "cpu", bias)


def step_of(row):
    return row.block_k or 256 * row.num_warps


def run(executor, row, m, n, k, bias=True, **options):
    x, weight, offset = inputs(row, m, n, k, bias)
    out = executor(row).flat_linear(x, weight, offset, **options)
    check(out, x, weight, offset, f"M {m} N {n} K {k}")
    return out


@every_row
def test_every_number_of_rows(device, executor, row):
    """Those that the host code gives the row to, one more, and two blocks."""
    smaller = [r.block_m for r in ROWS if (r.kernel, r.dtype) == (row.kernel, row.dtype)]
    first = max((m for m in smaller if m < row.block_m), default=0) + 1
    sizes = [1, *range(first, row.block_m + 1), row.block_m + 1, 2 * row.block_m]
    for i, m in enumerate(dict.fromkeys(sizes)):
        run(executor, row, m, row.block_n + i % 7, 72 + 8 * (i % 3), bias=i % 2 == 0)


@every_row
def test_depths(device, executor, row):
    """Around a chunk of 8, a product of 16, a stage, the ring, and its turning twice."""
    step, stages = step_of(row), row.num_stages or 1
    ends = [step, (stages - 1) * step, stages * step, (2 * stages + 1) * step]
    sizes = [1, 7, 8, 15, 16, 17, 33]
    sizes += [end + more for end in ends for more in (-1, 0, 8) if end > 0]
    for k in dict.fromkeys(sizes):
        run(executor, row, 3, row.block_n, k, splits=1)


@every_row
def test_widths(device, executor, row):
    block = row.block_n
    for n in dict.fromkeys([1, 3, 4, 15, 16, 17, block - 1, block, block + 1, 2 * block + 5]):
        run(executor, row, row.block_m, n, 40, bias=n % 3 > 0)


@every_flat_row
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits(device, executor, row, splits):
    """Even ones, a short last one, empty ones; twice on the same tickets, which are back at 0."""
    for k in (2 * splits * 64, splits * 64 + 40, 130, 64):
        x, weight, bias = inputs(row, row.block_m + 2, row.block_n + 3, k)
        ex = executor(row)
        ex.flat_linear(x, weight, bias, splits=splits, launches=2)
        assert ex.plan.splits == splits
        check(ex.outs[0], x, weight, bias, f"K {k}")
        assert_same_bits(ex.outs[1], ex.outs[0])


@every_row
def test_bits_do_not_depend_on_the_order_of_execution(device, executor, row):
    x, weight, bias = inputs(row, row.block_m + 1, 2 * row.block_n + 3, 7 * 64 + 8)
    split = {"splits": 3} if row.kernel == "flat_gemm" else {}
    outs = [executor(row, **order).flat_linear(x, weight, bias, **split) for order in ORDERS]
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n, k, splits", [(70, 1100, 2), (200, 300, 1), (9, 3000, 5)])
def test_bits_of_a_row_do_not_depend_on_m(device, executor, dtype, n, k, splits):
    """With the host code's own splits, whichever row of the table runs."""
    rows = [row for row in FLAT_ROWS if row.dtype == dtype]
    x, weight, bias = inputs(rows[0], 64, n, k)
    x[40] = -x[40] * 1e-30
    ex = executor(rows[-1])
    whole = ex.flat_linear(x, weight, bias)
    assert ex.plan.splits == splits
    check(whole, x, weight, bias)
    for row in rows:
        for m in (1, row.block_m - 1, row.block_m):
            for first in (0, 64 - m):
                ex = executor(row)
                part = ex.flat_linear(x[first : first + m], weight, bias)
                assert_same_bits(part, whole[first : first + m])
                ex.record(["any block_m"])


def shifted(t, by=1):
    """The same values, so many elements off the alignment."""
    memory = torch.full((t.numel() + by,), torch.nan, dtype=t.dtype)
    return memory[by:].view(t.shape).copy_(t)


def padded(t, by):
    """The same values with NaN between the rows."""
    memory = torch.full((t.shape[0] + 1, t.shape[1] + by), torch.nan, dtype=t.dtype)
    return memory[: t.shape[0], : t.shape[1]].copy_(t)


@every_row
@pytest.mark.parametrize("k", [120, 203])
def test_layouts_change_no_bit(device, executor, row, k):
    x, weight, bias = inputs(row, row.block_m + 1, row.block_n + 6, k)
    expected = executor(row).flat_linear(x, weight, bias)
    check(expected, x, weight, bias)
    near = 8 - k % 8  # to the next row that begins on 16 bytes
    for name, change in {
        "aligned": lambda t: padded(t, near),
        "padded": lambda t: padded(t, 8 + near),
        "odd": lambda t: padded(t, 3 if k % 2 else 1),
        "shifted": shifted,
        "shifted by 8": lambda t: shifted(t, 4),
    }.items():
        for views in ((change(x), weight), (x, change(weight)), (change(x), change(weight))):
            got = executor(row).flat_linear(*views, shifted(bias))
            assert_same_bits(got, expected, name)
    executor(row).record(["NaN behind rows"])


@every_row
def test_rows_of_stride_0(device, executor, row):
    x, weight, bias = inputs(row, 1, 1, 72)
    x, weight = x.expand(row.block_m + 1, -1), weight.expand(row.block_n + 1, -1)
    bias = bias.expand(row.block_n + 1).contiguous()
    out = executor(row).flat_linear(x, weight, bias)
    check(out, x, weight, bias)
    assert_same_bits(out, out[:1, :1].expand_as(out).contiguous())


@every_row
def test_out_of_any_row_stride(device, executor, row):
    n = row.block_n + 8
    x, weight, bias = inputs(row, row.block_m + 1, n, 72)
    expected = executor(row).flat_linear(x, weight, bias)
    for out_row, offset in ((n + 4, 0), (n + 4, 1), (n + 1, 0), (n + 2, 2), (n, 3)):
        # The executor's own check: what lies between the rows stays NaN.
        got = executor(row).flat_linear(x, weight, bias, out_row=out_row, out_offset=offset)
        assert_same_bits(got, expected, f"{out_row} {offset}")


@every_row
def test_what_is_not_finite_stays_in_its_row(device, executor, row):
    m, n = row.block_m + 1, row.block_n + 5
    x, weight, bias = inputs(row, m, n, 200)
    split = {"splits": 2} if row.kernel == "flat_gemm" else {}
    expected = executor(row).flat_linear(x, weight, bias, **split)
    x[m - 2, 11], weight[n - 2, 199], bias[1] = torch.nan, torch.inf, -torch.inf
    out = executor(row).flat_linear(x, weight, bias, **split)
    wrong = torch.zeros(m, n, dtype=torch.bool)
    wrong[m - 2], wrong[:, n - 2], wrong[:, 1] = True, True, True
    assert out[m - 2].isnan().all()
    assert torch.equal(~out.isfinite(), wrong)
    assert_same_bits(out[~wrong], expected[~wrong])


@pytest.mark.parametrize("seed", range(12))
def test_random_combination(device, executor, seed):
    rng = random.Random(seed)
    row = rng.choice(FLAT_ROWS + GEMV_ROWS)
    m, n, k = rng.randint(1, 80), rng.randint(1, 150), rng.randint(1, 700)
    x, weight, bias = inputs(row, m, n, k, rng.random() < 0.5)
    for change in rng.sample([shifted, lambda t: padded(t, rng.randint(1, 9))], rng.randint(0, 2)):
        x, weight = change(x), change(weight)
    options = {"splits": rng.randint(0, 5)} if row.kernel == "flat_gemm" else {}
    options |= {"out_row": n + rng.choice([0, 0, 1, 4]), "out_offset": rng.choice([0, 0, 1, 4])}
    out = executor(row, seed=seed + 1, eager=seed % 2 == 0).flat_linear(x, weight, bias, **options)
    check(out, x, weight, bias)


# ---- What they ask of memory and tensor cores, from the shape alone


def counted(report):
    """{(access, file): (requests, wavefronts or sectors)}."""
    requests, actual = Counter(), Counter()
    for access, file, _, number, _, cost in report.counters:
        requests[access, file] += number
        actual[access, file] += cost
    return {key: (requests[key], actual[key]) for key in requests}


def flat_expected(row, n_blocks, splits, steps):
    """Of whole blocks, `steps` of block_k columns in each split, with a bias."""
    kernel, copy = "flat_gemm/sm80.cuh", "tile/ragged.cuh"
    blocks, warps = n_blocks * splits, row.num_warps
    n_tiles, m_tiles = row.block_n // 16 // warps, row.block_m // 8
    copies = blocks * steps * (row.block_n + row.block_m) * row.block_k * 2 // 512
    loads = blocks * steps * warps * row.block_k // 32 * (2 * n_tiles + m_tiles)
    staged = n_blocks * warps * n_tiles * m_tiles * 4
    rows_out = n_blocks * row.block_m * row.block_n // 4 // 32
    bias = n_blocks * warps * n_tiles * 2
    expected = {
        ("cp.async.global", copy): (copies, 16 * copies),
        ("cp.async.shared", copy): (copies, 4 * copies),
        ("ldmatrix", kernel): (loads, 4 * loads),
        ("st.shared", kernel): (staged, staged),
        ("ld.shared", kernel): (rows_out, 4 * rows_out),
        ("ld.global", kernel): (bias, bias),
        ("st.global", kernel): (rows_out, 8 * rows_out),
    }
    if splits > 1:  # each partial is written once and read once
        partials = blocks * warps * n_tiles * m_tiles
        expected["ld.global", kernel] = (bias + partials, bias + 16 * partials)
        expected["st.global", kernel] = (rows_out + partials, 8 * rows_out + 16 * partials)
        expected["atom.global", kernel] = (blocks, blocks)
    return expected


@every_flat_row
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("steps", [1, 9])
def test_counters_of_flat_gemm(device, executor, row, splits, steps):
    n, k = 2 * row.block_n, splits * steps * row.block_k
    ex = executor(row)
    ex.flat_linear(*inputs(row, row.block_m, n, k), splits=splits)
    found = counted(ex.report)
    assert found == flat_expected(row, 2, splits, steps)
    # The weight is read once, x once for each block of the weight's rows.
    sectors = found["cp.async.global", "tile/ragged.cuh"][1]
    assert sectors * 32 == (n * k + 2 * row.block_m * k) * 2
    assert ex.report.totals["mmas"] == n // 16 * (row.block_m // 8) * k // 16
    assert ex.report.totals["blocks"] == 2 * splits


@every_flat_row
def test_columns_of_x_that_do_not_exist_cost_no_partials(device, executor, row):
    """Eight at a time."""
    for m in dict.fromkeys([1, 9, row.block_m]):
        if m > row.block_m:
            continue
        ex = executor(row)
        ex.flat_linear(*inputs(row, m, row.block_n, 128, bias=False), splits=2)
        requests = counted(ex.report)["ld.global", "flat_gemm/sm80.cuh"][0]
        assert requests == 2 * row.block_n // 16 * -(-m // 8)


@every_gemv_row
def test_counters_of_gemv(device, executor, row):
    """Two turns of the threads, and half of the warps once more."""
    kernel, n_blocks, warps = "gemv/sm80.cuh", 3, row.num_warps
    k, n = 2 * step_of(row) + step_of(row) // 2, n_blocks * row.block_n
    ex = executor(row)
    ex.flat_linear(*inputs(row, row.block_m, n, k))
    loads = n_blocks * k // 256 * (row.block_n + row.block_m)
    assert counted(ex.report) == {
        ("ld.global", kernel): (loads + n_blocks, 16 * loads + n_blocks),  # and the bias
        ("st.shared", kernel): (n_blocks * warps, n_blocks * warps),
        ("ld.shared", kernel): (n_blocks * warps, n_blocks * warps),
        ("st.global", kernel): (n_blocks, n_blocks * row.block_m),
    }
    assert ex.report.totals["mmas"] == 0


# ---- The host code's choices


def chosen(kernel, m, dtype="bfloat16", **device):
    sizes = {"arch": 90, "num_sms": 132, "smem_optin": 232448, "smem_per_sm": 233472}
    made = simt.load().Device(**{**sizes, "l2_bytes": 50 * 2**20, **device})
    return simt.load().choose_flat_linear(kernel, dtype, m, made)


def test_choice_of_the_row(device):
    """The least block_m that is enough, else the largest."""
    for kernel, rows in (("flat_gemm", FLAT_ROWS), ("gemv", GEMV_ROWS)):
        sizes = sorted({row.block_m for row in rows})
        for m in range(1, 2 * sizes[-1]):
            wanted = min((size for size in sizes if size >= m), default=sizes[-1])
            assert chosen(kernel, m, "float16").startswith(f"{kernel}_sm80_float16_m{wanted}")
    # 100 KB of an RTX 4090 hold every row; less than one needs leaves it out.
    assert chosen("flat_gemm", 64, arch=89, smem_optin=101376).endswith("m64_s4")
    assert chosen("flat_gemm", 64, smem_optin=80 * 1024).endswith("m32_s6")
    message = "flat_gemm: no kernel for compute capability 9.0 with 49152 bytes of shared memory"
    with pytest.raises(RuntimeError, match=message):
        chosen("flat_gemm", 1, smem_optin=49152)
    with pytest.raises(RuntimeError, match="gemv: no kernel for compute capability 7.5"):
        chosen("gemv", 1, arch=75)


def test_splits_of_k(device):
    """Two blocks a multiprocessor of an H200, where K has 512 columns for each; M has no say."""
    splits = simt.load().flat_gemm_splits
    llama = {(12288, 4096): 2, (4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 4}
    assert {shape: splits(*shape) for shape in llama} == llama
    assert splits(128256, 4096) == 1
    assert splits(64, 64) == splits(1, 1) == splits(0, 0) == splits(64, 960) == 1
    assert splits(64, 961) == 2 and splits(64, 10**6) == 16


def test_sizes_are_checked(device):
    module = simt.load()
    p = module.FlatLinearParams()
    row = FLAT_ROWS[0].name
    p.set_sizes(1, 2**30, 64)
    with pytest.raises(RuntimeError, match="expected M, N and K below 2\\^30, got 1073741824"):
        module.plan_flat_linear(p, row, 0)
    p.set_sizes(2**29, 2**29, 64)
    for name in (row, GEMV_ROWS[0].name):
        with pytest.raises(RuntimeError, match="expected at most 2147483647 thread blocks, got"):
            module.plan_flat_linear(p, name, 0)


def test_many_rows_are_split_by_several_launches(device, executor):
    """Or the partials of a long prompt would not fit: 4 splits M N bytes of them."""
    row = next(row for row in FLAT_ROWS if row.block_m == 64)
    x, weight, bias = inputs(row, 1100, 9, 1024)
    ex = executor(row)
    out = ex.flat_linear(x, weight, bias, out_row=11)
    assert ex.plan.splits == 2 and ex.plan.num_partials == 1024 * 128 * 2
    assert ex.report.totals["launches"] == 2
    check(out, x, weight, bias)
    assert_same_bits(out[1000:], executor(row).flat_linear(x[1000:], weight, bias))
    ex.flat_linear(x[:, :256], weight[:, :256], bias)
    assert ex.plan.splits == 1 and ex.report.totals["launches"] == 1
