"""Every row of the instance table on the executor, against the oracle: features, tails, layouts.

One base case, one axis at a time; the results of a call count only if the executor found nothing.
tests/cuda_coverage.py records what ran, and the summary shows it.
"""

import functools
import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from cuda_coverage import ROWS

from flashinfer_lite import reference
from flashinfer_lite.testing import (
    LAYOUTS,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    check_forward,
    make_mask,
    make_qkv,
)

pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")

SLOW = pytest.mark.slow
ATTENTION_ROWS = [row for row in ROWS if row.kernel in ("attention_fwd", "decode")]
DECODE_ROWS = [row for row in ROWS if row.kernel == "decode"]
every_row = pytest.mark.parametrize("row", ATTENTION_ROWS, ids=lambda row: row.name)
every_decode_row = pytest.mark.parametrize("row", DECODE_ROWS, ids=lambda row: row.name)


def lengths(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def dtype_of(row):
    return getattr(torch, row.dtype)


def kernel_of(executor, row, *, kv_splits=1, **options):
    """The row as a function with attention's arguments."""
    ex = executor(row, **options)
    if row.kernel == "attention_fwd":
        return ex.attention
    return functools.partial(ex.decode, kv_splits=kv_splits)


@dataclass
class Case:
    """A shape, the arguments, and what make_qkv is to do about it. Sizes count tiles and more."""

    seqlen_q: tuple = (0, 20)  # (tiles of rows, and so many more)
    seqlen_kv: tuple = (1, 9)  # (tiles of keys, and so many more)
    heads: tuple = (2, 1)
    batch_size: int = 1
    arguments: dict = field(default_factory=dict)  # a function of the mask's full shape makes it
    qkv: dict = field(default_factory=dict)  # further arguments of make_qkv
    narrow: int = 0  # head_dim is so much less than the row's, but at least 8
    kv_splits: int = 1

    def make(self, row):
        """(q, k, v), and the arguments of the call."""
        tiles, more = self.seqlen_q
        seqlen_q = tiles * row.block_m + more
        tiles, more = self.seqlen_kv
        seqlen_kv = tiles * row.block_n + more
        shape = (
            self.batch_size,
            seqlen_q,
            seqlen_kv,
            *self.heads,
            max(row.head_dim - self.narrow, 8),
        )
        full = (self.batch_size, self.heads[0], seqlen_q, seqlen_kv)
        arguments = {
            name: x(full) if callable(x) else x.clone() if torch.is_tensor(x) else x
            for name, x in self.arguments.items()
        }
        return make_qkv(*shape, dtype=dtype_of(row), **self.qkv), arguments


def bool_mask(shape):
    return make_mask("bool", shape)


def bias_by_head(shape):
    return make_mask("additive_inf", (shape[1], 1, shape[3]), dtype=torch.bfloat16)


def bias_of_stride_0(shape):
    return make_mask("additive", shape[-1:]).expand(shape)


def bias_of_float64(shape):
    return make_mask("additive_inf", shape, dtype=torch.float64)


def slopes(shape):
    return torch.linspace(0.3, -0.05, shape[1])


def slopes_by_sequence(shape):
    return torch.rand(shape[1], shape[0]).T


CAUSAL, TOP_LEFT = {"causal": True}, {"causal": "top_left"}
ENDS = {"seqlens_kv": lengths(13, 23)}
CASES = {
    "one_row_one_key": Case((0, 1), (0, 1), (1, 1)),
    "a_tile_less_1": Case((1, -1), (1, -1), (1, 1), kv_splits=7),
    "a_tile": Case((1, 0), (1, 0), (1, 1)),
    "a_tile_plus_1": Case((1, 1), (1, 1), (1, 1), kv_splits=2),
    "no_keys": Case((0, 3), (0, 0)),
    "causal_fewer_queries": Case((0, 20), (2, 5), (4, 1), arguments=CAUSAL, kv_splits=2),
    "causal_square": Case((0, 37), (0, 37), arguments=CAUSAL),
    "causal_more_queries": Case((0, 37), (0, 15), arguments=CAUSAL, kv_splits=2),
    "top_left_fewer_queries": Case((0, 20), (1, 9), arguments=TOP_LEFT, kv_splits=2),
    "top_left_square": Case((0, 33), (0, 33), arguments=TOP_LEFT, kv_splits=7),
    "top_left_more_queries": Case((0, 37), (0, 15), arguments=TOP_LEFT),
    "window": Case((0, 20), (2, 9), arguments={"window": (11, 6)}, kv_splits=2),
    "window_causal": Case((0, 9), (2, 9), arguments={"window": (17, 0), **CAUSAL}),
    "mask_bool": Case(batch_size=2, arguments={"mask": bool_mask}, kv_splits=2),
    "mask_by_head": Case((0, 9), arguments={"mask": bias_by_head}, kv_splits=7),
    "mask_stride_0": Case((0, 9), arguments={"mask": bias_of_stride_0, **CAUSAL}),
    "mask_float64": Case((0, 9), arguments={"mask": bias_of_float64, "softcap": 5.0}),
    "padded_left": Case((0, 9), batch_size=2, arguments={"kv_start": lengths(3, 20), **CAUSAL}),
    "padded_right": Case((0, 9), batch_size=2, arguments={**ENDS, **CAUSAL}, kv_splits=2),
    "padded_int64": Case(
        (0, 9),
        batch_size=2,
        arguments={
            "kv_start": lengths(3, 0, dtype=torch.int64),
            "seqlens_kv": lengths(21, 0, dtype=torch.int64),
        },
        kv_splits=7,
    ),
    "softcap": Case((0, 9), arguments={"softcap": 1.0, **CAUSAL}),
    "softcap_saturated": Case((0, 9), arguments={"softcap": 3.0}, qkv={"logits": 300.0}),
    "scale_negative": Case((0, 9), arguments={"softmax_scale": -0.2}, kv_splits=2),
    "alibi": Case((0, 9), heads=(4, 2), arguments={"alibi_slopes": slopes}, kv_splits=2),
    "alibi_top_left": Case((1, 9), arguments={"alibi_slopes": slopes, "softcap": 2.0, **TOP_LEFT}),
    "alibi_by_sequence": Case(
        (0, 9),
        batch_size=2,
        arguments={"alibi_slopes": slopes_by_sequence, **ENDS, "mask": bool_mask},
        kv_splits=2,
    ),
    "extreme_logits": Case((0, 9), qkv={"logits": 300.0}, kv_splits=2),
    "group_7": Case((0, 5), heads=(7, 1), arguments=CAUSAL),
    "group_4_of_2": Case((0, 3), heads=(8, 2), kv_splits=2),
    "narrow_head": Case((0, 9), qkv={"head_dim_v": 24}, narrow=8),
    "smallest_head": Case((0, 3), (0, 11), qkv={"head_dim_v": 40}, narrow=256, kv_splits=2),
    "fused": Case((0, 25), (0, 25), (2, 2), 2, qkv={"layout": "fused"}),
    "transposed": Case((0, 9), heads=(4, 2), qkv={"layout": "bhsd"}, kv_splits=2),
    "stride_0": Case((0, 9), heads=(4, 2), batch_size=2, qkv={"layout": "expand"}),
    "misaligned": Case((0, 9), heads=(4, 2), batch_size=2, qkv={"layout": "misaligned"}),
    "odd_strides": Case((0, 9), heads=(2, 2), qkv={"layout": "padded"}, narrow=8),
    "beside_NaN": Case((0, 9), batch_size=2, qkv={"layout": "capacity"}),
}


@every_row
@pytest.mark.parametrize("name", CASES)
def test_case(device, executor, row, name):
    case = CASES[name]
    qkv, arguments = case.make(row)
    check_forward(kernel_of(executor, row, kv_splits=case.kv_splits), *qkv, **arguments)


def random_case(rng, row):
    heads_kv, seqlen_kv = rng.choice([1, 2]), rng.randint(1, 130)
    shape = (rng.randint(1, 2), rng.randint(1, 40), seqlen_kv, heads_kv * rng.choice([1, 2, 5]))
    head_dim, head_dim_v = (8 * rng.randint(1, row.head_dim // 8) for _ in range(2))
    layout = rng.choice(LAYOUTS)
    arguments = {
        "causal": rng.choice([False, True, "top_left"]),
        "window": (rng.choice([-1, -1, 0, 5, 40]), rng.choice([-1, -1, 0, 7])),
        "softcap": rng.choice([None, None, 2.0, 30.0]),
    }
    ends = [rng.randint(0, seqlen_kv) for _ in range(shape[0])]
    if rng.random() < 0.5:
        arguments["seqlens_kv"] = lengths(*ends)
        arguments["kv_start"] = lengths(*(rng.randint(0, end) for end in ends))
    if rng.random() < 0.4:
        full = (shape[0], shape[3], *shape[1:3])
        mask_shape = [rng.choice([size, size, 1]) for size in full][rng.randint(0, 3) :]
        arguments["mask"] = make_mask(rng.choice(["bool", "additive_inf"]), mask_shape)
    if rng.random() < 0.3:
        arguments["alibi_slopes"] = torch.rand(rng.choice([shape[:1], ()]) + shape[3:4])
    sizes = (*shape, heads_kv, head_dim, head_dim_v)
    return make_qkv(*sizes, dtype=dtype_of(row), layout=layout), arguments


@pytest.mark.parametrize(
    "seed", [*range(30), *(pytest.param(n, marks=SLOW) for n in range(30, 150))]
)
def test_random_combination(device, executor, seed):
    rng = random.Random(seed)
    row = rng.choice(ATTENTION_ROWS)
    qkv, arguments = random_case(rng, row)
    check_forward(kernel_of(executor, row, kv_splits=rng.choice([1, 2, 5])), *qkv, **arguments)


@every_row
def test_slope_zero_changes_nothing(device, executor, row):
    """Bit for bit, in its own head, where scores are finished one by one anyway."""
    op = kernel_of(executor, row, kv_splits=2)
    q, k, v = make_qkv(1, 9, row.block_n + 9, 2, 1, row.head_dim, dtype=dtype_of(row))
    mask = torch.ones(1, dtype=torch.bool)
    got = op(q, k, v, alibi_slopes=torch.tensor([0.0, 0.2]), mask=mask, causal=True)
    wanted = op(q, k, v, mask=mask, causal=True)
    assert_same_bits(got[:, :, 0], wanted[:, :, 0])
    assert not torch.equal(got[:, :, 1], wanted[:, :, 1])


@every_row
def test_alibi_of_keys_far_away(device, executor, row):
    """Only keys are seen whose bias is some hundreds: what counts is how they differ."""
    op = kernel_of(executor, row, kv_splits=2)
    q, k, v = make_qkv(1, 1, 1500, 2, 1, row.head_dim, dtype=dtype_of(row))
    mask = torch.arange(1500) < 40
    slopes = torch.tensor([0.25, -0.5])
    _, lse = check_forward(op, q, k, v, alibi_slopes=slopes, mask=mask)
    assert lse[0, 0, 0] < -300 and lse[0, 1, 0] > 600


@every_row
def test_unified_maximum(device, executor, row):
    """In and out of its bounds; test_cuda_unified.py has the rest."""
    op = kernel_of(executor, row, kv_splits=2)
    qkv = make_qkv(2, 9, row.block_n + 9, 4, 2, row.head_dim, dtype=dtype_of(row))
    arguments = {"causal": True, "seqlens_kv": lengths(row.block_n + 9, 5)}
    phi = -5.0
    check_forward(functools.partial(op, phi=phi), *qkv, **arguments)
    phi = torch.tensor([phi, 99.0, phi, -99.0])
    check_forward(functools.partial(op, phi=phi), *qkv, **arguments)


@every_decode_row
def test_pages(device, executor, row):
    """In order and the other way round; test_cuda_paged.py has the rest."""
    op = kernel_of(executor, row, kv_splits=2)
    q, k, v = make_qkv(1, 2, 64, 2, 1, row.head_dim, dtype=dtype_of(row))
    pages = (x.view(8, 8, 1, -1) for x in (k, v))
    backwards = (x.view(8, 8, 1, -1).flip(0) for x in (k, v))
    wanted = op(q, k, v)
    assert_same_bits(op(q, *pages, block_table=torch.arange(8)[None]), wanted)
    assert_same_bits(op(q, *backwards, block_table=torch.arange(8).flip(0)[None]), wanted)


def poisoned(t, keys, value):
    """A copy in which those keys hold nothing but `value`."""
    t = t.clone()
    t[:, keys] = value
    return t


@every_row
def test_what_hidden_keys_hold_does_not_matter(device, executor, row):
    block_n = row.block_n
    op = kernel_of(executor, row, kv_splits=2)
    q, k, v = make_qkv(1, 9, 3 * block_n, 2, 1, row.head_dim, dtype=dtype_of(row))
    mask = torch.ones(3 * block_n, dtype=torch.bool)
    mask[block_n + 2 :: 5] = False
    # Hidden by the mask, by the lengths, and by the causal window: in blocks that are read.
    hidden = ~mask
    hidden[:3] = hidden[-2:] = True
    arguments = {
        "mask": mask,
        "kv_start": lengths(3),
        "seqlens_kv": lengths(3 * block_n - 2),
        "causal": True,
        "window": (2 * block_n, 0),
        "return_lse": True,
    }
    hidden[: block_n - 2 - 9] = True  # what the first query's window leaves out
    expected = op(q, poisoned(k, hidden, 0), poisoned(v, hidden, 0), **arguments)
    got = op(q, poisoned(k, hidden, math.inf), poisoned(v, hidden, math.nan), **arguments)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], expected[1], "lse")


@every_row
def test_what_is_not_finite_reaches_who_sees_it(device, executor, row):
    op = kernel_of(executor, row)
    q, k, v = make_qkv(1, 9, row.block_n + 9, 2, 1, row.head_dim, dtype=dtype_of(row))
    mask = make_mask("bool", (1, 2, 9, k.shape[1]), hidden=0.5)
    clean = op(q, k, v, mask=mask)
    v[0, 2, 0, 5], v[0, row.block_n + 1, 0, 7], k[0, 4, 0, 3] = math.nan, math.inf, math.nan
    q[0, 3, 1, 1] = math.nan
    out, _ = check_forward(op, q, k, v, mask=mask)
    finite = out.isfinite()
    assert 0 < int(finite.sum()) < finite.numel()
    assert_same_bits(out[finite], clean[finite])


@every_row
def test_bits_do_not_depend_on_the_order_of_execution(device, executor, row):
    q, k, v = make_qkv(2, 7, row.block_n + 3, 4, 2, row.head_dim, dtype=dtype_of(row))
    results = [
        kernel_of(executor, row, kv_splits=2, **options)(q, k, v, causal=True, return_lse=True)
        for options in ({}, {"seed": 2, "eager": True}, {"seed": 3, "threads": 2})
    ]
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1], "lse")


@every_row
def test_bits_of_a_sequence_alone(device, executor, row):
    op = kernel_of(executor, row, kv_splits=2)
    used = lengths(row.block_n + 3, 2 * row.block_n, 5)
    q, k, v = make_qkv(3, 5, 2 * row.block_n, 4, 2, row.head_dim, dtype=dtype_of(row))
    out, lse = op(q, k, v, seqlens_kv=used, causal=True, return_lse=True)
    alone = slice(0, 1), slice(0, int(used[0]))
    got = op(q[:1], k[alone], v[alone], causal=True, return_lse=True)
    assert_same_bits(got[0], out[:1])
    assert_same_bits(got[1], lse[:1], "lse")
    head = op(q[:1, :, 2:], k[alone][:, :, 1:], v[alone][:, :, 1:], causal=True)
    assert_same_bits(head, out[:1, :, 2:])
    executor(row).record(["sequence alone"])


@every_decode_row
@pytest.mark.parametrize("kv_splits", [1, 2, 7, 40])
def test_splits(device, executor, row, kv_splits):
    """Fewer keys than splits leave some without keys; no key at all leaves only such."""
    op = functools.partial(executor(row).decode, kv_splits=kv_splits)
    q, k, v = make_qkv(2, 3, 8 * row.block_n + 5, 4, 1, row.head_dim, dtype=dtype_of(row))
    check_forward(op, q[:, :1], k, v, seqlens_kv=lengths(k.shape[1], 0))
    check_forward(op, q, k[:, :3], v[:, :3], causal=True)


@every_decode_row
def test_splits_are_what_decoding_parts_and_merging_gives(device, executor, row):
    op = executor(row).decode
    q, k, v = make_qkv(1, 2, 6 * row.block_n, 2, 1, row.head_dim, dtype=dtype_of(row))
    out, lse = op(q, k, v, kv_splits=3, return_lse=True)
    width = 2 * row.block_n
    parts = [
        op(q, k[:, at : at + width], v[:, at : at + width], kv_splits=1, return_lse=True)
        for at in range(0, k.shape[1], width)
    ]
    merge = next(r for r in ROWS if r.name == f"combine_sm80_{row.dtype}_from_{row.dtype}")
    merged = executor(merge).merge_states(*(torch.stack(x) for x in zip(*parts, strict=True)))
    assert_same_bits(merged[1], lse, "lse")
    if row.dtype == "float32":  # elsewhere the parts were rounded
        assert_same_bits(merged[0], out)


@every_decode_row
def test_batch_invariant(device, executor, row):
    """1100 keys are two splits of 1024, whoever else is in the batch and how long the cache is."""
    op = functools.partial(executor(row).decode, batch_invariant=True, return_lse=True)
    q, k, v = make_qkv(2, 1, 1100, 1, 1, row.head_dim, dtype=dtype_of(row))
    out, lse = op(q, k, v, seqlens_kv=lengths(70, 1050))
    alone = op(q[1:], k[1:, :1050], v[1:, :1050])
    assert_same_bits(alone[0], out[1:])
    assert_same_bits(alone[1], lse[1:], "lse")
    short = op(q[:1], k[:1, :70], v[:1, :70])
    assert_same_bits(short[0], out[:1])
    assert_same_bits(short[1], lse[:1], "lse")


COMBINE_ROWS = [row for row in ROWS if row.name.endswith(f"{row.dtype}_from_{row.dtype}")]


def make_states(row, num_states, head_dim_v=72):
    outs = (torch.randn(num_states, 2, 3, 5, head_dim_v) + 0.5).to(dtype_of(row))
    return outs, torch.randn(num_states, 2, 5, 3) * 3


def check_merge(op, outs, lses):
    out, lse = op(outs, lses)
    oracle, oracle_lse = reference.merge_states(outs.double(), lses.double())
    assert_close(out, oracle, reference.merge_states(outs, lses)[0])
    assert_lse_close(lse, oracle_lse)
    return out, lse


@pytest.mark.parametrize("row", COMBINE_ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("num_states", [1, 2, 7, 40])
def test_merge_states(device, executor, row, num_states):
    op = executor(row).merge_states
    for head_dim_v in (8, 72, 256):
        outs, lses = make_states(row, num_states, head_dim_v)
        whole = check_merge(op, outs, lses)
        check_merge(op, outs, lses * 1000)
        empty = torch.rand(num_states, 2, 5, 3) < 0.4
        check_merge(op, outs, lses.masked_fill(empty, -math.inf))
        nothing = torch.full_like(outs[:1], math.nan), torch.full_like(lses[:1], -math.inf)
        got = op(torch.cat([nothing[0], outs]), torch.cat([nothing[1], lses]))
        assert_same_bits(got[0], whole[0])
        assert_same_bits(got[1], whole[1], "lse")


@pytest.mark.parametrize("row", COMBINE_ROWS, ids=lambda row: row.name)
def test_merge_states_of_any_strides(device, executor, row):
    op = executor(row).merge_states
    outs, lses = make_states(row, 3)
    expected = op(outs, lses)
    for a, b in ((1, 3), (0, 2), (2, 3)):
        swapped = outs.transpose(a, b).contiguous().transpose(a, b)
        got = op(swapped, lses.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1], "lse")
    check_merge(op, outs[:1].expand(3, -1, -1, -1, -1), lses[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("row", COMBINE_ROWS, ids=lambda row: row.name)
def test_merge_states_keeps_nan_that_counts(device, executor, row):
    outs, lses = make_states(row, 2)
    outs[1, 0, 0, 0, 3], lses[0, 1, 2, 1] = math.nan, math.nan
    for options in ({}, {"seed": 2, "eager": True}, {"seed": 3, "threads": 2}):
        out, lse = executor(row, **options).merge_states(outs, lses)
        assert out[0, 0, 0, 3].isnan() and out[1, 1, 2].isnan().all()
        assert lse[1, 2, 1].isnan() and int(lse.isnan().sum()) == 1
        assert int(out.isnan().sum()) == 1 + outs.shape[4]
