"""What the kernels ask of memory and tensor cores, to the last request, from the shape alone.

A shared access costs no more wavefronts and a global one no more sectors than its bytes need, and
there are as many of each as the formulas here say: no tile is loaded twice or in vain.
"""

import dataclasses
from collections import Counter

import pytest
import torch
from cuda_coverage import ROWS

from flashinfer_lite.testing import make_qkv

pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")

FORWARD_ROWS = [row for row in ROWS if row.kernel == "attention_fwd"]
DECODE_ROWS = [row for row in ROWS if row.kernel == "decode"]
COMBINE_ROWS = [row for row in ROWS if row.name.endswith(f"{row.dtype}_from_{row.dtype}")]
every_forward = pytest.mark.parametrize("row", FORWARD_ROWS, ids=lambda row: row.name)
every_decode = pytest.mark.parametrize("row", DECODE_ROWS, ids=lambda row: row.name)

COPY, GEMM, EPILOGUE = "tile/copy.cuh", "tile/gemm.cuh", "tile/epilogue.cuh"


def dtype_of(row):
    return getattr(torch, row.dtype)


def size_of(row):
    return dtype_of(row).itemsize


def per_warp(row, rows, threads=32):
    """16-byte accesses of a warp's 32 lanes for so many rows of head_dim."""
    return rows * row.head_dim * size_of(row) // (16 * threads)


# Where `actual` may exceed `ideal`; the formulas below say by how much.
#   st.shared of the epilogue: in float32 the lanes of a row write 8 bytes each, and the swizzle of
#     16-byte chunks leaves two rows on each bank.
#   ld.global of combine: a lane takes the lse of a state, and states lie a whole batch apart; the
#     rest of the sector is for the next rows' warps.
#   ld.global of decode's last split with a unified maximum: likewise.
BY_FORMULA = {
    ("st.shared", EPILOGUE): "float32",
    ("ld.global", "tile/merge.cuh"): "",
    ("ld.global", "decode/unified.cuh"): "",
}


def counted(row, report):
    """{(access, file): (requests, actual)}, after a look that `actual` is ideal."""
    requests, actual = Counter(), Counter()
    for access, file, line, number, ideal, cost in report.counters:
        key = access, file
        requests[key] += number
        actual[key] += cost
        excused = key in BY_FORMULA and row.dtype.endswith(BY_FORMULA[key])
        assert cost == ideal or excused, f"{access} at {file}:{line}: {cost}, ideal {ideal}"
    return {key: (requests[key], actual[key]) for key in requests}


def products(row, steps):
    """Requests of both products for so many (warp with 16 rows) x (block of keys)."""
    keys, columns = row.block_n, row.head_dim
    m_tiles = max(row.block_m // 16 // row.num_warps, 1) if row.kernel == "attention_fwd" else 1
    if row.dtype == "float32":
        q = columns // 4 * 2 * m_tiles  # four columns of two rows a lane
        k = columns // 4 * keys // 4  # of two keys of each n tile
        v = keys * columns // 8  # two columns of every key, for each n tile
        return ("ld.shared", steps * (q + k + v), steps * 4 * (q + k) + steps * 2 * v)
    q = columns // 16 * m_tiles
    k = v = columns // 16 * keys // 16
    return ("ldmatrix", steps * (q + k + v), steps * 4 * (q + k + v))


def mmas(row, steps):
    m_tiles = row.block_m // 16 // row.num_warps if row.kernel == "attention_fwd" else 1
    tiles = row.head_dim // 16 * (row.block_n // 8) + row.block_n // 16 * (row.head_dim // 8)
    return 0 if row.dtype == "float32" else steps * m_tiles * tiles


def key_blocks(row, seqlen_q, seqlen_kv, left=None, right=None):
    """How many blocks of keys each block of rows sees some of, for group size 1."""
    counts = []
    for first in range(0, seqlen_q, row.block_m):
        last = min(first + row.block_m, seqlen_q) - 1
        diagonal = seqlen_kv - seqlen_q
        begin = 0 if left is None else max(first + diagonal - left, 0)
        end = seqlen_kv if right is None else min(last + diagonal + right + 1, seqlen_kv)
        counts.append(-(-end // row.block_n) - begin // row.block_n)
    return counts


def forward_expected(row, blocks, steps):
    """Of full blocks of rows; a step is one block of keys of one block of rows."""
    kernel, chunks = "attention_fwd/sm80.cuh", row.head_dim * size_of(row) // 16
    copies = blocks * per_warp(row, row.block_m) + 2 * steps * per_warp(row, row.block_n)
    access, requests, wavefronts = products(row, steps * row.num_warps)
    staged = blocks * row.block_m // 8 * row.head_dim // 8  # a pair of columns per lane
    rows_out = blocks * row.block_m * chunks // 32
    lse = blocks * row.block_m // 8  # eight neighbours, one sector
    return {
        ("cp.async.shared", COPY): (copies, 4 * copies),
        ("cp.async.global", COPY): (copies, 16 * copies),
        (access, GEMM): (requests, wavefronts),
        ("st.shared", EPILOGUE): (staged, staged * (4 if row.dtype == "float32" else 1)),
        ("ld.shared", EPILOGUE): (rows_out, 4 * rows_out),
        ("st.global", EPILOGUE): (rows_out, 16 * rows_out),
        ("st.global", kernel): (lse, lse),
    }


MASKS = {
    "all": ({}, (None, None)),
    "causal": ({"causal": True}, (None, 0)),
    "window": ({"window": (40, 8)}, (40, 8)),
}


@every_forward
@pytest.mark.parametrize("mask", MASKS)
def test_forward(device, executor, row, mask):
    """Causal loads no block above the diagonal, a window only the blocks that it touches."""
    arguments, sides = MASKS[mask]
    seqlen_q, seqlen_kv, heads = 2 * row.block_m, 3 * row.block_n + 2 * row.block_m, 2
    if row.dtype == "float32":
        seqlen_kv, heads = row.block_n + 2 * row.block_m, 1
    q, k, v = make_qkv(1, seqlen_q, seqlen_kv, heads, heads, row.head_dim, dtype=dtype_of(row))
    ex = executor(row)
    ex.attention(q, k, v, **arguments)
    steps = heads * sum(key_blocks(row, seqlen_q, seqlen_kv, *sides))
    expected = forward_expected(row, 2 * heads, steps)
    assert counted(row, ex.report) == expected
    assert ex.report.totals["mmas"] == mmas(row, steps * row.num_warps)
    assert ex.report.totals["blocks"] == 2 * heads


def test_steps_of_the_masks_differ():
    for row in FORWARD_ROWS:
        q, kv = 2 * row.block_m, 3 * row.block_n + 2 * row.block_m
        counts = [sum(key_blocks(row, q, kv, *sides)) for _, sides in MASKS.values()]
        assert counts == sorted(set(counts), reverse=True)


def decode_expected(row, heads_kv, group, kv_splits, key_blocks):
    """One query; a thread block for each KV head and split, with `key_blocks` blocks of keys."""
    kernel, columns, size = "decode/sm80.cuh", row.head_dim, size_of(row)
    blocks, rows_per_warp = heads_kv * kv_splits, max(128 // columns, 1)
    kv = blocks * key_blocks * 2 * per_warp(row, row.block_n)
    q_all, q = blocks * per_warp(row, 16), blocks * per_warp(row, group)
    access, requests, wavefronts = products(row, blocks * key_blocks)
    # The merge: every warp leaves 16 rows and their states, then a lane takes four columns.
    left = row.num_warps * (columns // 8 * 2 + 2)
    taken = blocks * group * columns // 128
    read = taken * row.num_warps
    lse = blocks * group // rows_per_warp
    sectors = 16 if kv_splits > 1 else 4 * size
    return {
        ("cp.async.shared", COPY): (kv + q_all, 4 * (kv + q_all)),
        ("cp.async.global", COPY): (kv + q, 16 * (kv + q)),
        (access, GEMM): (requests, wavefronts),
        ("st.shared", kernel): (blocks * left, 2 * blocks * left),
        ("ld.shared", kernel): (2 * read, 4 * read + 2 * read),  # columns, and the row's state
        ("st.global", "decode/block.cuh"): (taken, taken * sectors),
        ("st.global", kernel): (lse, lse),
    }


def combine_expected(row, rows, num_states, partial_size):
    """`rows` heads of one query: a multiple of 8, so that no two states share a sector."""
    merge, columns = "tile/merge.cuh", row.head_dim // 32
    parts = row.head_dim // 64  # each by a warp that reads every lse
    return {
        ("ld.global", merge): (
            rows * (parts * 2 * -(-num_states // 32) + num_states * columns),
            rows * num_states * (parts * 2 + columns * partial_size),
        ),
        ("st.global", merge): (rows * columns, rows * columns * size_of(row)),
        ("st.global", "combine/sm80.cuh"): (rows, rows),
    }


@every_decode
@pytest.mark.parametrize("kv_splits", [1, 3])
def test_decode(device, executor, row, kv_splits):
    heads_kv, group, key_blocks = 2, 4, 5
    keys = kv_splits * key_blocks * row.block_n
    q, k, v = make_qkv(1, 1, keys, heads_kv * group, heads_kv, row.head_dim, dtype=dtype_of(row))
    ex = executor(row)
    ex.decode(q, k, v, kv_splits=kv_splits)
    expected = decode_expected(row, heads_kv, group, kv_splits, key_blocks)
    if kv_splits > 1:
        expected |= combine_expected(row, heads_kv * group, kv_splits, 4)
    assert counted(row, ex.report) == expected
    assert ex.report.totals["mmas"] == mmas(row, heads_kv * kv_splits * key_blocks)


@every_decode
def test_decode_under_a_window(device, executor, row):
    """The blocks that the window touches and no other, in whichever split."""
    q, k, v = make_qkv(1, 1, 20 * row.block_n, 4, 1, row.head_dim, dtype=dtype_of(row))
    ex = executor(row)
    ex.decode(q, k, v, kv_splits=2, causal=True, window=(3 * row.block_n, 0))
    requests, wavefronts = counted(row, ex.report)["cp.async.global", COPY]
    # 3 block_n + 1 keys lie in four blocks, two for each split.
    assert requests == 2 * per_warp(row, 4) + 4 * 2 * per_warp(row, row.block_n)


def maxima(row, steps):
    """(loads, stores) of shared memory, two maxima a lane, in so many (warp with 16 rows, step)."""
    m_tiles = max(row.block_m // 16 // row.num_warps, 1) if row.kernel == "attention_fwd" else 1
    return steps * m_tiles, steps * m_tiles


@every_forward
def test_forward_with_a_unified_maximum(device, executor, row):
    """What the online softmax asks for, and each lane's maxima in shared memory: once a step."""
    seqlen_kv, heads = row.block_n * 3, 2
    q, k, v = make_qkv(1, row.block_m, seqlen_kv, heads, heads, row.head_dim, dtype=dtype_of(row))
    ex = executor(row)
    ex.attention(q, k, v, phi=-4.0)
    assert (ex.rows_checked, ex.rows_recomputed) == (heads * row.block_m, 0)
    got = counted(row, ex.report)
    loads, stores = maxima(row, heads * 3 * row.num_warps)
    once = heads * row.num_warps * loads // (heads * 3 * row.num_warps)
    unified = "tile/unified.cuh"
    assert got.pop(("st.shared", unified)) == (stores + once, 2 * (stores + once))
    assert got.pop(("ld.shared", unified)) == (loads + 2 * once, 2 * (loads + 2 * once))
    assert got.pop(("atom.global", unified))[0] == heads * row.num_warps
    kernel = "attention_fwd/sm80.cuh"
    assert got.pop(("st.shared", kernel))[0] == heads * row.num_warps  # the rows that are left
    assert got == forward_expected(row, heads, 3 * heads)


@every_decode
def test_decode_with_a_unified_maximum(device, executor, row):
    """One launch: the cache is read once, each partial written once and read once."""
    heads_kv, group, kv_splits = 2, 4, 3
    keys = kv_splits * 5 * row.block_n
    q, k, v = make_qkv(1, 1, keys, heads_kv * group, heads_kv, row.head_dim, dtype=dtype_of(row))
    ex = executor(row)
    ex.decode(q, k, v, kv_splits=kv_splits, phi=-4.0)
    assert ex.report.totals["blocks"] == heads_kv * kv_splits
    got = counted(row, ex.report)
    assert not any(file.startswith("combine") for _, file in got)
    expected = decode_expected(row, heads_kv, group, kv_splits, 5)
    for key in (("cp.async.global", COPY), ("cp.async.shared", COPY)):
        assert got[key] == expected[key]
    assert ex.report.totals["mmas"] == mmas(row, heads_kv * kv_splits * 5)
    # Of each row and split: the columns and two floats, 32 lanes with 16 bytes each.
    rows, parts = heads_kv * group, -(-row.head_dim // 128)
    requests, _ = got["ld.global", "decode/unified.cuh"]
    assert requests == rows * (2 + kv_splits * parts)
    requests, _ = got["st.global", "decode/block.cuh"]
    assert requests == rows * (kv_splits + 1) * parts
    assert got["atom.global", "decode/unified.cuh"][0] == heads_kv * kv_splits  # tickets


@pytest.mark.parametrize("row", COMBINE_ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("num_states", [1, 5, 33])
def test_merge_states(device, executor, row, num_states):
    """Each partial is read once, each lse twice: for the largest, then for the weights."""
    outs = torch.randn(num_states, 1, 1, 8, 128).to(dtype_of(row))
    lses = torch.randn(num_states, 1, 8, 1)
    ex = executor(row)
    ex.merge_states(outs, lses)
    row = dataclasses.replace(row, head_dim=128)
    expected = combine_expected(row, 8, num_states, size_of(row))
    assert counted(row, ex.report) == expected


@pytest.mark.parametrize("row", [FORWARD_ROWS[0], DECODE_ROWS[0]], ids=lambda row: row.name)
def test_counters_do_not_depend_on_the_order_of_execution(device, executor, row):
    q, k, v = make_qkv(2, 40, 100, 4, 2, row.head_dim, dtype=dtype_of(row))
    reports = []
    for options in ({}, {"seed": 2}, {"seed": 3, "threads": 2}, {"eager": True, "threads": 2}):
        ex = executor(row, **options)
        kernel = ex.attention if row.kernel == "attention_fwd" else ex.decode
        kernel(q, k, v, causal=True)
        totals = {name: x for name, x in ex.report.totals.items() if name != "seconds"}
        reports.append((ex.report.counters, ex.report.sites, totals))
    assert all(report == reports[0] for report in reports[1:])


@pytest.mark.parametrize("row", [FORWARD_ROWS[0], DECODE_ROWS[0]], ids=lambda row: row.name)
def test_only_the_block_that_met_nan_runs_again(device, executor, row):
    q, k, v = make_qkv(1, 8, 2 * row.block_n, 3, 3, row.head_dim, dtype=dtype_of(row))
    counts = []
    for value in (0.0, torch.nan):
        v[0, 3, 1, 2] = value
        ex = executor(row)
        (ex.attention if row.kernel == "attention_fwd" else ex.decode)(q, k, v)
        counts.append(ex.report.totals["mmas"])
    assert counts[1] * 3 == counts[0] * 4  # one head of three


BACKWARD_ROWS = [row for row in ROWS if row.kernel == "attention_bwd"]
every_backward = pytest.mark.parametrize("row", BACKWARD_ROWS, ids=lambda row: row.name)
SHARED, ROWS_FILE = "attention_bwd/block.cuh", "attention_bwd/rows.cuh"


def added(*counts):
    """{key: (requests, actual)} of several, added up."""
    requests, actual = Counter(), Counter()
    for each in counts:
        for key, (number, cost) in each.items():
            requests[key] += number
            actual[key] += cost
    return {key: (requests[key], actual[key]) for key in requests}


def scores_of_warp(row, rows, keys):
    """A product like q k^T by one warp."""
    if row.dtype == "float32":
        requests = row.head_dim // 4 * (rows // 8 + keys // 4)
        return {("ld.shared", GEMM): (requests, 4 * requests)}
    requests = row.head_dim // 16 * (rows // 16 + keys // 16)
    return {("ldmatrix", GEMM): (requests, 4 * requests)}


def product_of_warp(row, rows, inner, columns):
    """x y or x^T y, both in shared memory."""
    file = "tile/gemm_tiles.cuh"
    if row.dtype == "float32":
        x, y = inner * rows // 8, inner * columns // 8
        return {("ld.shared", file): (x + y, x + 2 * y)}
    requests = inner // 16 * (max(columns // 64, 1) * rows // 16 + columns // 16)
    return {("ldmatrix", file): (requests, 4 * requests)}


def times(n, counts):
    return {key: (n * requests, n * actual) for key, (requests, actual) in counts.items()}


def copied(row, rows):
    requests = per_warp(row, rows)
    return {
        ("cp.async.shared", COPY): (requests, 4 * requests),
        ("cp.async.global", COPY): (requests, 16 * requests),
    }


def staged(row, rows, columns):
    """Fragments into a tile."""
    requests = rows // 8 * columns // 8
    return {("st.shared", EPILOGUE): (requests, requests * (4 if row.dtype == "float32" else 1))}


def stored(row, rows):
    """Rows of a tile to global memory."""
    requests = rows * row.head_dim * size_of(row) // 512
    return {
        ("ld.shared", EPILOGUE): (requests, 4 * requests),
        ("st.global", EPILOGUE): (requests, 16 * requests),
    }


def statistics(row, rows, warps):
    """Of a block of rows: copied, and read by each warp for its rows."""
    return {
        ("cp.async.shared", SHARED): (1, max(row.block_m * 8 // 128, 1)),
        ("cp.async.global", SHARED): (1, row.block_m * 8 // 32),
        ("ld.shared", SHARED): (warps * 2 * (rows // 8), warps * 3 * (rows // 8)),
    }


def looked_through(row):
    """Statistics of a block of rows that do not see every key, by every warp."""
    look, phases = -(-row.block_m // 32), max(row.block_m // 16, 1)
    return {("ld.shared", SHARED): (row.num_warps * look, row.num_warps * phases)}


def before_and_after(row):
    """kRows and kFinish of a block of rows."""
    warps, tiles = row.block_m // 16, row.block_m * row.head_dim // 128
    counts = [times(2, copied(row, row.block_m)), times(warps, scores_of_warp(row, 16, 16))]
    lse = {
        ("ld.global", ROWS_FILE): (2 * warps, 2 * warps),
        ("st.global", ROWS_FILE): (2 * warps, 4 * warps),
    }
    zeros = {("st.global", ROWS_FILE): (tiles, 16 * tiles)}
    read = {("ld.global", ROWS_FILE): (4 * tiles, 16 * tiles)}
    finish = staged(row, row.block_m, row.head_dim), stored(row, row.block_m)
    return added(*counts, lse, zeros, read, *finish)


def step_of_keys(row):
    """kKeys: a block of rows meets a block of keys."""
    warps, m, n = row.num_warps, row.block_m, row.block_n
    row_warps, key_warps = min(2, m // 16), max(n // 32, 1)
    others, columns = warps // row_warps, row.head_dim // (warps // key_warps)
    counts = [
        times(2, copied(row, m)),
        statistics(row, m // row_warps, warps),
        times(2 * warps, scores_of_warp(row, m // row_warps, n // others)),
        times(2 * warps, staged(row, m // row_warps, n // others)),
        times(2 * warps, product_of_warp(row, n // key_warps, m, columns)),
    ]
    dq = product_of_warp(row, m // row_warps, n, row.head_dim // others)
    adds = m * row.head_dim // 32
    atomics = {("atom.global", "attention_bwd/keys.cuh"): (adds, 4 * adds)}
    return added(*counts, times(warps, dq), atomics)


def block_of_keys(row):
    whole = copied(row, row.block_n), stored(row, row.block_n)
    return added(*(times(2, x) for x in whole), times(2, staged(row, row.block_n, row.head_dim)))


@every_backward
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_backward(device, executor, row, mask):
    """Each block of keys reads the rows that see any of it, and adds to each tile of dQ once."""
    heads, seqlen_q, seqlen_kv = 2, 3 * row.block_m, 3 * row.block_n
    q, k, v = make_qkv(1, seqlen_q, seqlen_kv, heads, heads, row.head_dim, dtype=dtype_of(row))
    ex = executor(row)
    q.requires_grad_()
    out = ex.training(q, k, v, causal=mask == "causal")
    torch.autograd.grad(out, q, torch.randn_like(q))
    row_blocks = key_blocks = 3
    steps = row_blocks * key_blocks
    masked = steps if row.dtype == "float32" else 0  # whose scores are scaled one by one
    if mask == "causal":
        diagonal = seqlen_kv - seqlen_q
        firsts = [max(n * row.block_n - diagonal, 0) // row.block_m for n in range(key_blocks)]
        wholes = [
            -(-max((n + 1) * row.block_n - 1 - diagonal, 0) // row.block_m)
            for n in range(key_blocks)
        ]
        steps = sum(row_blocks - first for first in firsts)
        assert steps < row_blocks * key_blocks
        masked = steps if masked else steps - sum(row_blocks - whole for whole in wholes)
    expected = added(
        times(heads * row_blocks, before_and_after(row)),
        times(heads * steps, step_of_keys(row)),
        times(heads * masked, looked_through(row)),
        times(heads * key_blocks, block_of_keys(row)),
    )
    assert counted(row, ex.report) == expected
    # Of 16 x 8 x 16: five products a step, and 16 x 16 dots of dO and out for 16 rows.
    tile = row.block_m * row.block_n * row.head_dim // 2048
    mmas = 5 * steps * tile + row_blocks * row.block_m // 16 * row.head_dim // 8
    assert ex.report.totals["mmas"] == (0 if row.dtype == "float32" else heads * mmas)


@every_backward
def test_backward_without_atomics(device, executor, row):
    """No accumulator: nothing is added in global memory, and two products more for each tile."""
    q, k, v = make_qkv(1, 2 * row.block_m, 2 * row.block_n, 1, 1, row.head_dim, dtype=dtype_of(row))
    ex = executor(row)
    q.requires_grad_()
    out = ex.training(q, k, v, deterministic=True)
    torch.autograd.grad(out, q, torch.randn_like(q))
    got = counted(row, ex.report)
    assert not any(access == "atom.global" for access, _ in got)
    tile = row.block_m * row.block_n * row.head_dim // 2048
    mmas = 7 * 4 * tile + 2 * row.block_m // 16 * row.head_dim // 8
    assert ex.report.totals["mmas"] == (0 if row.dtype == "float32" else mmas)
