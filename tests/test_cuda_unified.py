"""The unified maximum (FlashDecoding++) in the CUDA kernels, on the executor.

A row for which it was not safe has the bits of the online softmax, the others do not notice, each
row is counted once, and the tickets by which splits find the last of them are left as they were.
"""

import functools
import math

import pytest
import torch
from cuda_coverage import ROWS

from flashinfer_lite.testing import assert_same_bits, check_forward, make_mask, make_qkv

pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")

SLOW = pytest.mark.slow
DECODE_ROWS = [row for row in ROWS if row.kernel == "decode"]
every_decode_row = pytest.mark.parametrize("row", DECODE_ROWS, ids=lambda row: row.name)
# Each row of the table, and decode's with one split and several.
OPS = [(row, 0) for row in ROWS if row.kernel == "attention_fwd"]
OPS += [(row, kv_splits) for row in DECODE_ROWS for kv_splits in (1, 3)]
every_op = pytest.mark.parametrize(
    ("row", "kv_splits"), OPS, ids=[f"{row.name}-{n}" if n else row.name for row, n in OPS]
)


def dtype_of(row):
    return getattr(torch, row.dtype)


class Op:
    """The row as a function with attention's arguments, lse included; and what it counted."""

    def __init__(self, executor, row, kv_splits, **options):
        self.ex = executor(row, **options)
        self.run = self.ex.attention
        if kv_splits:
            self.run = functools.partial(self.ex.decode, kv_splits=kv_splits)

    def __call__(self, *qkv, return_lse=True, **arguments):
        out = self.run(*qkv, return_lse=return_lse, **arguments)
        if getattr(self.ex, "tickets", None) is not None:
            assert not self.ex.tickets.any()
        return out

    @property
    def counts(self):
        return self.ex.rows_checked, self.ex.rows_recomputed


def assert_same(got, expected, rows=...):
    """Of (out, lse) the bits, in all rows or those of a mask [batch, seqlen_q, num_heads_q]."""
    assert_same_bits(got[0][rows], expected[0][rows])
    assert_same_bits(got[1].transpose(1, 2)[rows], expected[1].transpose(1, 2)[rows], "lse")


SAFE_PHI = -5.0  # for scores of about +-4 no row violates it


def with_logits(row, seqlen_q, seqlen_kv, heads, levels):
    """q, k, v whose scores with softmax_scale=1 are the levels, over the keys in turn."""
    q, k, v = make_qkv(1, seqlen_q, seqlen_kv, *heads, row.head_dim, dtype=dtype_of(row))
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0] = 1
    for i, level in enumerate(levels):
        k[:, i :: len(levels), :, 0] = level
    return q, k, v


LEVELS = {"100": [100.0], "151": [151.29], "-200": [-200.0], "mixed": [151.0, -200.0]}
SIZES = [(1, 1), (2, 33), (3, 128), (4, 33), (8, 33)]
ALL_SIZES = [(m, n) for m in (1, 2, 3, 4, 8) for n in (1, 33, 128, 1025)]
SIZES = [
    *SIZES,
    *(pytest.param(size, marks=SLOW) for size in ALL_SIZES if size not in SIZES),
]


@every_op
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_executorch_22133_extreme_logits(device, executor, row, kv_splits, size):
    """With a fixed phi and no guard these are inf / inf and 0 / 0."""
    op = Op(executor, row, kv_splits)
    for levels in LEVELS.values():
        qkv = with_logits(row, *size, (2, 1), levels)
        expected = op(*qkv, softmax_scale=1.0)
        got = check_forward(functools.partial(op, phi=0.0), *qkv, softmax_scale=1.0)
        assert op.counts == (2 * size[0], 2 * size[0])
        assert got[0].isfinite().all()
        assert_same(got, expected)


@every_op
@pytest.mark.parametrize("group", [1, 4, 8])
def test_neighbours_of_a_bad_row_do_not_notice(device, executor, row, kv_splits, group):
    op = Op(executor, row, kv_splits)
    q, k, v = make_qkv(1, 3, 70, 2 * group, 2, row.head_dim, dtype=dtype_of(row))
    q[..., -1] = 0
    k[:, ::2, :, -1], k[:, 1::2, :, -1] = 151.0, -200.0
    arguments = {"phi": SAFE_PHI, "softmax_scale": row.head_dim**-0.5}
    harmless = op(q, k, v, **arguments)
    assert op.counts == (3 * 2 * group, 0)
    bad = torch.zeros(1, 3, 2 * group, dtype=torch.bool)
    bad[0, 1, group] = bad[0, 2, 0] = True
    q[..., -1][bad] = row.head_dim**0.5
    got = check_forward(
        functools.partial(op, phi=arguments["phi"]), q, k, v, softmax_scale=row.head_dim**-0.5
    )
    assert op.counts == (3 * 2 * group, 2)
    online = op(q, k, v)
    assert op.counts == (0, 0)
    assert_same(got, online, bad)
    assert_same(got, harmless, ~bad)


@every_op
def test_phi_by_head(device, executor, row, kv_splits):
    op = Op(executor, row, kv_splits)
    q, k, v = make_qkv(2, 5, 77, 4, 2, row.head_dim, dtype=dtype_of(row))
    expected = op(q, k, v, causal=True)
    for far in (90.0, -90.0, math.inf, math.nan, -math.inf, 3e38):
        phi = torch.full((4,), SAFE_PHI)
        alike = op(q, k, v, causal=True, phi=phi)
        assert op.counts == (40, 0)
        assert_same(op(q, k, v, causal=True, phi=SAFE_PHI), alike)
        phi[1] = far
        got = op(q, k, v, causal=True, phi=phi)
        assert op.counts == (40, 10)
        bad = torch.zeros(2, 5, 4, dtype=torch.bool)
        bad[:, :, 1] = True
        assert_same(got, expected, bad)
        assert_same(got, alike, ~bad)


@every_op
def test_guard_is_where_it_should_be(device, executor, row, kv_splits):
    """In natural units of the score, on both sides."""
    op = Op(executor, row, kv_splits)
    low, high = (0.0, 10.4) if row.dtype == "float16" else (0.0, 44.0)
    qkv = with_logits(row, 1, 40, (1, 1), [1.0, 0.5])  # the row's maximum is 1
    for excess, recomputed in (
        (low - 0.1, 1), (low + 0.1, 0), (high - 0.1, 0), (high + 0.1, 1)
    ):  # fmt: skip
        check_forward(functools.partial(op, phi=1.0 - excess), *qkv, softmax_scale=1.0)
        assert op.counts == (1, recomputed), excess


CASES = {
    "mask": {"mask": functools.partial(make_mask, "bool")},
    "bias": {"mask": functools.partial(make_mask, "additive_inf"), "softcap": 5.0},
    "window": {"window": (20, 3)},
    "causal": {"causal": True},
    "lengths": {"seqlens_kv": [70, 3, 0], "kv_start": [5, 0, 0], "causal": True},
    "scale": {"softmax_scale": -0.1},
    "top_left": {"causal": "top_left", "window": (-1, 4)},
}


@every_op
@pytest.mark.parametrize("name", CASES)
def test_features(device, executor, row, kv_splits, name):
    """Rows that see a key are checked, once each; empty rows and empty splits are nobody's."""
    arguments = dict(CASES[name])
    q, k, v = make_qkv(3, 9, 70, 4, 2, row.head_dim, dtype=dtype_of(row))
    if callable(arguments.get("mask")):
        arguments["mask"] = arguments["mask"]((3, 4, 9, 70))
    for key in ("seqlens_kv", "kv_start"):
        if key in arguments:
            arguments[key] = torch.tensor(arguments[key], dtype=torch.int32)
    op = Op(executor, row, kv_splits)
    online = op(q, k, v, **arguments)
    rows = int((online[1] > -math.inf).sum())
    check_forward(functools.partial(op, phi=SAFE_PHI), q, k, v, **arguments)
    assert op.ex.rows_checked == rows
    assert row.dtype == "float16" or op.ex.rows_recomputed == 0
    got = op(q, k, v, **arguments, phi=200.0)
    assert op.counts == (rows, rows)
    assert_same(got, online)


@every_op
def test_values_that_are_not_finite(device, executor, row, kv_splits):
    """Those who see one have the online softmax's bits; so has who only met it, hidden."""
    op = Op(executor, row, kv_splits)
    q, k, v = make_qkv(1, 9, row.block_n + 9, 2, 1, row.head_dim, dtype=dtype_of(row))
    mask = make_mask("bool", (1, 2, 9, k.shape[1]), hidden=0.5)
    phi = SAFE_PHI
    clean = op(q, k, v, mask=mask, phi=phi)
    v[0, 2, 0, 5], v[0, row.block_n + 1, 0, 7], k[0, 4, 0, 3] = math.nan, math.inf, math.nan
    q[0, 3, 1, 1] = math.nan
    online = op(q, k, v, mask=mask)
    got = check_forward(functools.partial(op, phi=phi), q, k, v, mask=mask)
    assert op.ex.rows_checked == int((clean[1] > -math.inf).sum())
    assert op.ex.rows_recomputed > 0
    seen = ~online[0].isfinite().all(-1)
    assert seen.any() and not seen.all()
    assert_same(got, online, seen)
    like_online = (got[0] == online[0]).all(-1)
    like_clean = (got[0] == clean[0]).all(-1)
    assert (seen | like_online | like_clean).all()


@every_op
def test_values_that_overflow_or_underflow(device, executor, row, kv_splits):
    op = Op(executor, row, kv_splits)
    q, k, v = make_qkv(1, 3, 50, 2, 1, row.head_dim, dtype=dtype_of(row))
    half = row.dtype == "float16"
    cases = [(1.0, SAFE_PHI, 0), (0.0, SAFE_PHI, 0)]
    if half:
        cases += [(8e3, SAFE_PHI, 0)]
    else:
        cases += [(1e37, -25.0, 6), (1e-30, SAFE_PHI, 0)]
    for size, phi, recomputed in cases:
        scaled = (v.double() * size).to(v.dtype)
        online = op(q, k, scaled)
        got = op(q, k, scaled, phi=phi)
        assert op.counts == (6, recomputed), (size, phi)
        if recomputed:
            assert_same(got, online)
        elif size <= 1:  # the rules of float32 are absolute
            check_forward(functools.partial(op, phi=phi), q, k, scaled)


@every_op
def test_bits_do_not_depend_on_the_order_of_execution(device, executor, row, kv_splits):
    q, k, v = make_qkv(2, 7, row.block_n + 3, 4, 2, row.head_dim, dtype=dtype_of(row))
    phi = torch.tensor([SAFE_PHI, 99.0, SAFE_PHI, SAFE_PHI])
    results = [
        Op(executor, row, kv_splits, **options)(q, k, v, causal=True, phi=phi)
        for options in ({}, {"seed": 2, "eager": True}, {"seed": 3, "threads": 2})
    ]
    for got in results[1:]:
        assert_same(got, results[0])


@every_decode_row
@pytest.mark.parametrize("kv_splits", [3, 7, 40])
def test_one_launch_that_may_come_again(device, executor, row, kv_splits):
    """In the same working memory, as a CUDA graph does; more splits than blocks of keys too."""
    op = Op(executor, row, kv_splits)
    q, k, v = make_qkv(2, 3, 6 * row.block_n, 4, 2, row.head_dim, dtype=dtype_of(row))
    phi = torch.tensor([SAFE_PHI, 99.0, SAFE_PHI, SAFE_PHI])
    once = op(q, k, v, phi=phi)
    assert op.ex.report.totals["blocks"] == 2 * 2 * kv_splits
    assert op.counts == (24, 6)
    twice = op(q, k, v, phi=phi, launches=2)
    assert op.counts == (48, 12)
    assert_same(twice, once)


@every_decode_row
def test_batch_invariant(device, executor, row):
    ex = executor(row)
    q, k, v = make_qkv(2, 1, 1100, 1, 1, row.head_dim, dtype=dtype_of(row))
    used = torch.tensor([70, 1050], dtype=torch.int32)
    op = functools.partial(ex.decode, batch_invariant=True, return_lse=True, phi=SAFE_PHI)
    got = op(q, k, v, seqlens_kv=used)
    alone = op(q[1:], k[1:, :1050], v[1:, :1050])
    assert_same_bits(alone[0], got[0][1:])
    assert_same_bits(alone[1], got[1][1:], "lse")
    far = ex.decode(q, k, v, seqlens_kv=used, batch_invariant=True, return_lse=True, phi=99.0)
    assert ex.rows_recomputed == 2
    online = ex.decode(q, k, v, seqlens_kv=used, batch_invariant=True, return_lse=True)
    assert_same(far, online)


@every_decode_row
def test_a_split_may_underflow(device, executor, row):
    """The first half's probabilities are 0: only the row as a whole is checked."""
    op = Op(executor, row, 2)
    q, k, v = with_logits(row, 1, 8 * row.block_n, (1, 1), [0.0])
    k[:, : 4 * row.block_n, :, 0] = -500.0
    k[:, 4 * row.block_n :, :, 0] = 1.0
    check_forward(functools.partial(op, phi=-3.0), q, k, v, softmax_scale=1.0)
    assert op.counts == (1, 0)
