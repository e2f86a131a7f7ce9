"""attention_varlen of the CUDA kernels, on the executor: each row of the table, against the oracle
and bit for bit against attention of each sequence alone.

The results of a call count only if the executor found nothing, and tests/cuda_coverage.py records
what ran.
"""

import functools

import pytest
import torch
from cuda_coverage import ROWS

from flashinfer_lite.testing import (
    assert_same_bits,
    check_backward,
    check_forward,
    make_varlen,
)

pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")

FORWARD_ROWS = [row for row in ROWS if row.kernel == "attention_fwd"]
BACKWARD_ROWS = [row for row in ROWS if row.kernel == "attention_bwd"]
every_row = pytest.mark.parametrize("row", FORWARD_ROWS, ids=lambda row: row.name)
every_backward_row = pytest.mark.parametrize("row", BACKWARD_ROWS, ids=lambda row: row.name)
both_ways = pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "rows"])
LENGTHS = "kv_start", "seqlens_kv"


def ragged_batch(row, heads=(2, 1), **options):
    """Sequences without rows or keys at both ends and between, of one row, of a tile and one more
    or less, with more rows than keys. -> (q, k, v, offsets)"""
    group, m, n = heads[0] // heads[1], row.block_m, row.block_n
    lengths_q = [0, m // group + 1, 1, 0, m // group - 1, 3, m // group, 0]
    lengths_kv = [5, n - 1, 2 * n + 1, 0, 3, 0, n, 0]
    options = {"head_dim": row.head_dim, "dtype": getattr(torch, row.dtype), **options}
    return make_varlen(lengths_q, lengths_kv, *heads, **options)


def lengths_of(offsets, dtype=torch.int32):
    """kv_start and seqlens_kv within the keys of each sequence."""
    keys = offsets["cu_seqlens_kv"].diff()
    return {"kv_start": (keys // 3).to(dtype), "seqlens_kv": (keys * 3 // 4).to(dtype)}


def sequences(offsets):
    """(which, its rows, its keys) of those that have rows or keys."""
    cu_q, cu_kv = (offsets[f"cu_seqlens_{x}"].tolist() for x in ("q", "kv"))
    for b in range(len(cu_q) - 1):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_kv[b : b + 2])
        if rows.start < rows.stop or keys.start < keys.stop:
            yield b, rows, keys


def own(arguments, b):
    """The arguments of attention for sequence b alone."""
    by_sequence = {n for n, x in arguments.items() if n in LENGTHS or n == "alibi_slopes"}
    return {n: x[b : b + 1] if n in by_sequence else x for n, x in arguments.items()}


def check(executor, row, q, k, v, offsets, *, phi=None, **arguments):
    """Against the oracle, and each sequence against attention of it alone."""
    ex = executor(row)
    forced = {} if phi is None else {"phi": phi}
    out, lse = check_forward(
        lambda *tensors, **given: ex.attention_varlen(*tensors, **given, **forced),
        *(q, k, v),
        **offsets,
        **arguments,
    )
    for b, rows, keys in sequences(offsets):
        one = q[None, rows], k[None, keys], v[None, keys]
        if rows.start == rows.stop:
            continue
        alone, lse_alone = ex.attention(*one, **own(arguments, b), **forced, return_lse=True)
        assert_same_bits(out[rows], alone[0])
        assert_same_bits(lse[:, rows], lse_alone[0], "lse")
    return out, lse


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (11, 3)},
    "window_causal": {"window": (17, -1), "causal": True},
    "softcap": {"softcap": 2.0, "causal": True},
    "scale": {"softmax_scale": -0.3},
    "unified": {"phi": 0.0, "causal": True},
    "recomputed": {"phi": 300.0},
}


@every_row
@pytest.mark.parametrize("name", CASES)
def test_case(device, executor, row, name):
    q, k, v, offsets = ragged_batch(row, tails=(0, 0) if name == "plain" else (2, 3))
    check(executor, row, q, k, v, offsets, **CASES[name])


@every_row
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_lengths(device, executor, row, dtype):
    q, k, v, offsets = ragged_batch(row, offsets_dtype=dtype)
    lengths = lengths_of(offsets, dtype)
    check(executor, row, q, k, v, offsets, **lengths, causal=True)
    mixed = {n: torch.stack((x, x - 77), 1).flatten()[::2] for n, x in offsets.items()}
    mixed["cu_seqlens_q"] = mixed["cu_seqlens_q"].long()
    check(executor, row, q, k, v, mixed, seqlens_kv=lengths["seqlens_kv"])


@every_row
def test_alibi(device, executor, row):
    q, k, v, offsets = ragged_batch(row, (4, 2), tails=(2, 1))
    slopes = torch.rand(8, 4) - 0.2
    check(executor, row, q, k, v, offsets, alibi_slopes=slopes, causal=True)
    check(executor, row, q, k, v, offsets, alibi_slopes=slopes, phi=0.0, **lengths_of(offsets))


@every_row
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (7, 1)])
def test_heads(device, executor, row, heads):
    q, k, v, offsets = ragged_batch(row, heads, head_dim=40, head_dim_v=24, tails=(1, 0))
    check(executor, row, q, k, v, offsets, causal=True)


@every_row
@pytest.mark.parametrize("layout", ["bhsd", "padded", "misaligned", "fused"])
def test_layout(device, executor, row, layout):
    size = {"num_heads_q": 2, "num_heads_kv": 2, "head_dim": 24, "dtype": getattr(torch, row.dtype)}
    q, k, v, offsets = make_varlen([3, 0, row.block_n + 1, 1], **size, layout=layout)
    check(executor, row, q, k, v, offsets, causal=True)


@every_row
@pytest.mark.parametrize("tails", [(0, 0), (3, 2), (300, 150)])
def test_tails_are_defined_and_not_read(device, executor, row, tails):
    """NaN lies there; a call without them has the same bits."""
    q, k, v, offsets = ragged_batch(row, tails=tails)
    out, lse = check(executor, row, q, k, v, offsets, causal=True)
    before, behind = tails
    inner = slice(before, len(q) - behind)
    for rows in (slice(0, before), slice(len(q) - behind, None)):
        assert not out[rows].any() and (lse[:, rows] == -torch.inf).all()
    keys = slice(before, len(k) - behind)
    moved = {n: x - before for n, x in offsets.items()}
    tight = executor(row).attention_varlen(
        q[inner], k[keys], v[keys], **moved, causal=True, return_lse=True
    )
    assert_same_bits(out[inner], tight[0])
    assert_same_bits(lse[:, inner], tight[1], "lse")


@every_row
@pytest.mark.parametrize("count", [0, 1, 30, 31, 62, 63, 1000])
def test_many_sequences(device, executor, row, count):
    """Of a row and a key each: the search looks at 32 of them at a time."""
    dtype = getattr(torch, row.dtype)
    q, k, v, offsets = make_varlen([1] * count, None, 1, 1, 8, dtype=dtype, tails=(1, 1))
    out, lse = executor(row).attention_varlen(q, k, v, **offsets, return_lse=True)
    assert_same_bits(out[1:-1], v[1:-1])
    assert not out[[0, -1]].any() and (lse[:, [0, -1]] == -torch.inf).all()


@every_row
def test_offsets_are_clamped(device, executor, row):
    """Wrong ones lead nowhere outside: the executor sees every access. Rows that they give to a
    sequence, as far as they are there, have its keys."""
    q, k, v, offsets = ragged_batch(row)
    ex = executor(row)
    cu_q, cu_kv = offsets.values()
    wanted = ex.attention_varlen(q, k, v, cu_q, cu_kv, causal=True, return_lse=True)
    for dtype in (torch.int32, torch.int64):
        limits, last = torch.iinfo(dtype), len(cu_q) - 1
        wide_q, wide_kv = cu_q.to(dtype), cu_kv.to(dtype)
        wide_q[0] = wide_kv[0] = limits.min
        wide_q[last] = wide_kv[last] = limits.max
        got = ex.attention_varlen(q, k, v, wide_q, wide_kv, causal=True, return_lse=True)
        for x, y in zip(got, wanted, strict=True):
            assert_same_bits(x, y)
    ex = executor(row, checks="counters")  # sequences that overlap write the same rows
    for b, x in enumerate(([9, 0, 5], [len(q) + 9, -1, 3], [2**31 - 1, -(2**31), 2**31 - 1])):
        wrong = torch.tensor(x, dtype=torch.int32)
        ex.attention_varlen(q, k, v, wrong, wrong.roll(b), causal=True)


@every_row
def test_hidden_and_visible_values_that_are_not_finite(device, executor, row):
    q, k, v, offsets = ragged_batch(row)
    keys = slice(*offsets["cu_seqlens_kv"][2:4].tolist())  # of a sequence of one row
    wanted = executor(row).attention_varlen(q, k, v, **offsets, causal=True)
    v[keys.start + 1] = torch.nan
    got = executor(row).attention_varlen(q, k, v, **offsets, causal=True)
    only = int(offsets["cu_seqlens_q"][2])
    assert got[only].isnan().all()
    got[only] = wanted[only]
    assert_same_bits(got, wanted)


def test_offsets_beyond_32_bits(device, executor):
    row = next(row for row in FORWARD_ROWS if row.dtype == "bfloat16" and row.head_dim == 128)
    q, k, v, offsets = make_varlen([3, 5], [9, 20], 2, 1, 128, dtype=torch.bfloat16)
    stride = 2**28  # elements from key to key: the last lies beyond 2^32
    memory = torch.empty(28 * stride + 128, dtype=torch.bfloat16)
    far = torch.as_strided(memory, k.shape, (stride, 128, 1))
    far.copy_(k)
    got = executor(row).attention_varlen(q, far, v, **offsets, return_lse=True)
    wanted = executor(row).attention_varlen(q, k, v, **offsets, return_lse=True)
    for x, y in zip(got, wanted, strict=True):
        assert_same_bits(x, y)


def gradients(op, q, k, v, offsets, dout, dlse, **arguments):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    results = op(*leaves, **offsets, **arguments, return_lse=True)
    return torch.autograd.grad(results, leaves, (dout, dlse.contiguous()))


def gradients_of(q, v):
    """Random gradients of out and lse."""
    dout = torch.randn(*q.shape[:2], v.shape[2]).to(q.dtype)
    return dout, torch.randn(q.shape[1], q.shape[0])


def assert_same_as_loop(executor, row, q, k, v, offsets, **arguments):
    """Each sequence's gradients against those of attention of it alone, bit for bit."""
    ex, (dout, dlse) = executor(row), gradients_of(q, v)
    op = functools.partial(ex.training_varlen, deterministic=True)
    got = gradients(op, q, k, v, offsets, dout, dlse, **arguments)
    alone = functools.partial(ex.training, deterministic=True)
    for b, rows, keys in sequences(offsets):
        one = q[None, rows], k[None, keys], v[None, keys]
        parts = got[0][None, rows], got[1][None, keys], got[2][None, keys]
        wanted = [torch.zeros_like(x) for x in one]
        if rows.start < rows.stop and keys.start < keys.stop:
            dout_dlse = dout[None, rows], dlse[None, :, rows]
            wanted = gradients(alone, *one, {}, *dout_dlse, **own(arguments, b))
        for name, x, y in zip(("dq", "dk", "dv"), parts, wanted, strict=True):
            assert_same_bits(x, y, name)
    return got


TRAINED = {n: CASES[n] for n in ("plain", "causal", "top_left", "window", "softcap", "scale")}


@every_backward_row
@pytest.mark.parametrize("name", TRAINED)
def test_gradients(device, executor, row, name):
    q, k, v, offsets = ragged_batch(row, head_dim_v=row.head_dim - 8)
    for deterministic in (False, True):
        op = functools.partial(executor(row).training_varlen, deterministic=deterministic)
        check_backward(op, q, k, v, **offsets, **TRAINED[name], with_lse=deterministic)


@every_backward_row
@pytest.mark.parametrize("name", ["causal", "window"])
def test_gradients_have_the_bits_of_a_loop(device, executor, row, name):
    q, k, v, offsets = ragged_batch(row, (4, 2), offsets_dtype=torch.int64)
    assert_same_as_loop(executor, row, q, k, v, offsets, **TRAINED[name])
    lengths = lengths_of(offsets)
    apart = {n: torch.stack((x, x - 77), 1).flatten()[::2] for n, x in offsets.items()}
    assert_same_as_loop(executor, row, q, k, v, apart, **TRAINED[name], **lengths)
    slopes = torch.rand(8, 4) - 0.2
    assert_same_as_loop(executor, row, q, k, v, apart, **TRAINED[name], alibi_slopes=slopes)


@every_backward_row
@both_ways
@pytest.mark.parametrize("tails", [(3, 2), (150, 300)])
def test_tails_get_and_give_nothing(device, executor, row, deterministic, tails):
    q, k, v, offsets = ragged_batch(row, tails=tails)
    dout, dlse = gradients_of(q, v)
    before, behind = tails
    dout[:before] = dout[len(q) - behind :] = torch.nan
    dlse[:, :before] = dlse[:, len(q) - behind :] = torch.nan
    op = functools.partial(executor(row).training_varlen, deterministic=deterministic, causal=True)
    got = gradients(op, q, k, v, offsets, dout, dlse)
    rows, keys = slice(before, len(q) - behind), slice(before, len(k) - behind)
    moved = {n: x - before for n, x in offsets.items()}
    tight = gradients(op, q[rows], k[keys], v[keys], moved, dout[rows], dlse[:, rows])
    for name, x, y, inner in zip("qkv", got, tight, (rows, keys, keys), strict=True):
        assert not x[: inner.start].any() and not x[inner.stop :].any(), name
        if deterministic or name != "q":
            assert_same_bits(x[inner], y, name)


@every_backward_row
@both_ways
def test_gradients_of_many_sequences(device, executor, row, deterministic):
    """Of a row and a key each, whose probability is 1 whatever the score."""
    dtype = getattr(torch, row.dtype)
    q, k, v, offsets = make_varlen([1] * 70, None, 1, 1, 8, dtype=dtype, tails=(1, 1))
    dout, dlse = gradients_of(q, v)
    op = functools.partial(executor(row).training_varlen, deterministic=deterministic)
    dq, dk, dv = gradients(op, q, k, v, offsets, dout, 0 * dlse)
    assert not dq.any() and not dk.any()
    torch.testing.assert_close(dv[1:-1], dout[1:-1])
    assert not dv[[0, -1]].any()


@every_backward_row
@both_ways
@pytest.mark.parametrize("layout", ["bhsd", "misaligned", "fused"])
def test_gradients_of_layouts(device, executor, row, deterministic, layout):
    size = {"num_heads_q": 2, "num_heads_kv": 2, "head_dim": 24, "dtype": getattr(torch, row.dtype)}
    q, k, v, offsets = make_varlen([3, 0, row.block_n + 1, 1], **size, layout=layout)
    op = functools.partial(executor(row).training_varlen, deterministic=deterministic)
    check_backward(op, q, k, v, **offsets, causal=True)


@every_backward_row
@both_ways
def test_offsets_of_the_backward_are_clamped(device, executor, row, deterministic):
    q, k, v, offsets = ragged_batch(row)
    dout, dlse = gradients_of(q, v)
    ex = executor(row, checks="counters")  # sequences that overlap write the same rows
    out, lse = torch.randn_like(dout), torch.randn_like(dlse)
    for b, x in enumerate(([9, 0, 5], [len(q) + 9, -1, 3], [2**31 - 1, -(2**31), 2**31 - 1])):
        wrong = torch.tensor(x, dtype=torch.int32)
        tensors = dout, dlse, q, k, v, out, lse, wrong, wrong.roll(b)
        ex.attention_varlen_bwd(*tensors, deterministic=deterministic, causal=True)
