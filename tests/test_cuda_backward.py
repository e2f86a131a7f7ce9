"""Every row of attention_bwd on the executor, against the oracle: features, tails, layouts, edges.

The forward is the CPU's. As in test_cuda_kernels.py the results of a call count only if the
executor found nothing, and tests/cuda_coverage.py records what ran.
"""

import functools
import math
import random

import pytest
import torch
from cuda_coverage import ROWS
from test_cuda_kernels import (
    CAUSAL,
    TOP_LEFT,
    Case,
    bias_by_head,
    bias_of_float64,
    bias_of_stride_0,
    bool_mask,
    dtype_of,
    lengths,
    random_case,
    slopes,
    slopes_by_sequence,
)

from flashinfer_lite import reference
from flashinfer_lite.testing import assert_same_bits, check_backward, make_mask, make_qkv

pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")

SLOW = pytest.mark.slow
BACKWARD_ROWS = [row for row in ROWS if row.kernel == "attention_bwd"]
every_row = pytest.mark.parametrize("row", BACKWARD_ROWS, ids=lambda row: row.name)
both_ways = pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "rows"])


def trained_bias(shape):
    return make_mask("additive_inf", shape).requires_grad_()


def trained_bias_of_heads(shape):
    return make_mask("additive", (shape[1], 1, shape[3]), dtype=torch.bfloat16).requires_grad_()


ATOMICS = {
    "a_tile_less_1": Case((1, -1), (1, -1), (1, 1)),
    "a_tile": Case((1, 0), (1, 0), (1, 1)),
    "causal_fewer_queries": Case((0, 20), (2, 5), (4, 1), arguments=CAUSAL),
    "causal_more_queries": Case((0, 37), (0, 15), arguments=CAUSAL),
    "top_left_square": Case((0, 33), (0, 33), arguments=TOP_LEFT),
    "window": Case((0, 20), (2, 9), arguments={"window": (11, 6)}),
    "mask_bool": Case((0, 9), batch_size=2, arguments={"mask": bool_mask}),
    "mask_by_head": Case((0, 9), arguments={"mask": bias_by_head}),
    "mask_trained": Case((0, 9), arguments={"mask": trained_bias, "softcap": 3.0}),
    "mask_of_heads_trained": Case((0, 9), arguments={"mask": trained_bias_of_heads, **CAUSAL}),
    "padded_left": Case((0, 9), batch_size=2, arguments={"kv_start": lengths(3, 20), **CAUSAL}),
    "softcap": Case((0, 9), arguments={"softcap": 1.0, **CAUSAL}),
    "scale_negative": Case((0, 9), arguments={"softmax_scale": -0.2}),
    "alibi": Case((0, 20), (1, 9), (4, 2), arguments={"alibi_slopes": slopes, **CAUSAL}),
    "alibi_softcap": Case(
        (0, 9),
        batch_size=2,
        arguments={"alibi_slopes": slopes_by_sequence, "softcap": 2.0, "mask": trained_bias},
    ),
    "group_7": Case((0, 5), heads=(7, 1), arguments=CAUSAL),
    "narrow_head": Case((0, 9), qkv={"head_dim_v": 24}, narrow=8),
    "fused": Case((0, 25), (0, 25), (2, 2), 2, qkv={"layout": "fused"}),
    "misaligned": Case((0, 9), heads=(4, 2), batch_size=2, qkv={"layout": "misaligned"}),
    "beside_NaN": Case((0, 9), batch_size=2, qkv={"layout": "capacity"}),
}
DETERMINISTIC = {
    "one_row_one_key": Case((0, 1), (0, 1), (1, 1)),
    "a_tile_plus_1": Case((1, 1), (1, 1), (1, 1)),
    "causal_square": Case((0, 37), (0, 37), arguments=CAUSAL),
    "top_left_fewer_queries": Case((0, 20), (1, 9), arguments=TOP_LEFT),
    "top_left_more_queries": Case((0, 37), (0, 15), arguments=TOP_LEFT),
    "window_causal": Case((0, 9), (2, 9), arguments={"window": (17, 0), **CAUSAL}),
    "mask_stride_0": Case((0, 9), arguments={"mask": bias_of_stride_0, **CAUSAL}),
    "mask_float64": Case((0, 9), arguments={"mask": bias_of_float64, "softcap": 5.0}),
    "padded_right": Case((0, 9), batch_size=2, arguments={"seqlens_kv": lengths(13, 23), **CAUSAL}),
    "padded_int64": Case(
        (0, 9),
        batch_size=2,
        arguments={
            "kv_start": lengths(3, 0, dtype=torch.int64),
            "seqlens_kv": lengths(21, 0, dtype=torch.int64),
        },
    ),
    "softcap_saturated": Case((0, 9), arguments={"softcap": 3.0}, qkv={"logits": 300.0}),
    "extreme_logits": Case((0, 9), qkv={"logits": 100.0}),
    "alibi": Case((0, 20), (1, 9), (4, 2), arguments={"alibi_slopes": slopes, **TOP_LEFT}),
    "smallest_head": Case((0, 3), (0, 11), qkv={"head_dim_v": 40}, narrow=256),
    "transposed": Case((0, 9), heads=(4, 2), qkv={"layout": "bhsd"}),
    "stride_0": Case((0, 9), heads=(4, 2), batch_size=2, qkv={"layout": "expand"}),
    "odd_strides": Case((0, 9), heads=(2, 2), qkv={"layout": "padded"}, narrow=8),
}


def training(executor, row, deterministic=False, **options):
    return functools.partial(executor(row, **options).training, deterministic=deterministic)


@every_row
@pytest.mark.parametrize("name", ATOMICS)
def test_case(device, executor, row, name):
    qkv, arguments = ATOMICS[name].make(row)
    check_backward(training(executor, row), *qkv, **arguments)


@every_row
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_case_without_atomics(device, executor, row, name):
    qkv, arguments = DETERMINISTIC[name].make(row)
    check_backward(training(executor, row, True), *qkv, **arguments, with_lse=False)


@pytest.mark.parametrize(
    "seed", [*range(20), *(pytest.param(n, marks=SLOW) for n in range(20, 100))]
)
def test_random_combination(device, executor, seed):
    rng = random.Random(seed)
    row = rng.choice(BACKWARD_ROWS)
    qkv, arguments = random_case(rng, row)
    if "mask" in arguments and arguments["mask"].dtype != torch.bool:
        arguments["mask"].requires_grad_()
    check_backward(training(executor, row, rng.random() < 0.3), *qkv, **arguments)


@every_row
def test_strict_rule(device, executor, row):
    """Where products that are rounded too early would show."""
    q, k, v = make_qkv(1, 40, 128, 2, 1, row.head_dim, dtype=dtype_of(row))
    for deterministic in (False, True):
        check_backward(training(executor, row, deterministic), q, k, v, strict=True, causal=True)


@every_row
def test_strides_of_dout(device, executor, row):
    q, k, v = make_qkv(2, 5, 9, 4, 2, row.head_dim, dtype=dtype_of(row))
    dout = torch.randn(2, 4, 5, row.head_dim).to(q.dtype).transpose(1, 2)
    check_backward(training(executor, row), q, k, v, dout=dout)
    shifted = torch.randn(2 * 5 * 4 * row.head_dim + 1).to(q.dtype)[1:].view(q.shape)
    check_backward(training(executor, row), q, k, v, dout=shifted)
    check_backward(training(executor, row), q, k, v, dout=dout[:, :1].expand(-1, 5, -1, -1))


@every_row
@both_ways
def test_one_key_leaves_q_and_k_no_gradient(device, executor, row, deterministic):
    """P is 1 whatever the score: dP - delta has to be 0 to the bit."""
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 40, 40, 2, 1, row.head_dim,
                                                    dtype=dtype_of(row)))  # fmt: skip
    out = training(executor, row, deterministic)(q, k, v, window=(0, 0))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert not dq.any() and not dk.any() and dv.any()


@every_row
@both_ways
def test_keys_past_the_length_are_not_read(device, executor, row, deterministic):
    q, k, v = make_qkv(2, 9, 40, 2, 1, row.head_dim, dtype=dtype_of(row))
    arguments = {"kv_start": lengths(3, 0), "seqlens_kv": lengths(33, 0), "causal": True}
    slots = torch.arange(40)
    outside = (slots < 3) | (slots >= 33)
    k[0, outside], v[0, outside], k[1], v[1] = math.inf, math.nan, math.nan, math.nan
    clean = [t.masked_fill(~t.isfinite(), 0) for t in (k, v)]
    dout = torch.randn_like(q)
    op = training(executor, row, deterministic)
    got = check_backward(op, q, k, v, dout=dout, with_lse=False, **arguments)
    wanted = check_backward(op, q, *clean, dout=dout, with_lse=False, **arguments)
    for x, y, name in zip(got, wanted, ("dq", "dk", "dv"), strict=True):
        if deterministic or name != "dq":
            assert_same_bits(x, y, name)
    assert not got[1][0, outside].any() and not got[2][0, outside].any()
    assert not any(x[1].any() for x in got)


@every_row
@both_ways
def test_rows_without_keys_may_hold_anything(device, executor, row, deterministic):
    q, k, v = make_qkv(1, 37, 15, 2, 1, row.head_dim, dtype=dtype_of(row))
    q[:, :22] = math.nan  # causal: they see no key
    dout = torch.randn_like(q)
    dout[:, :22] = math.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask = torch.zeros(2, 37, 15, requires_grad=True)
    op = training(executor, row, deterministic)
    got = torch.autograd.grad(op(*leaves, causal=True, mask=mask), (*leaves, mask), dout)
    rest = [t.detach().requires_grad_() for t in (q[:, 22:], k, v)]
    wanted = torch.autograd.grad(op(*rest, causal=True), rest, dout[:, 22:])
    assert not got[0][:, :22].any() and not got[3][:, :22].any()
    for x in got:
        assert x.isfinite().all()
    for x, y in zip((got[0][:, 22:], *got[1:3]), wanted, strict=True):
        torch.testing.assert_close(x, y)


@every_row
def test_low_lse(device, executor, row):
    """lse below -88: exp of what it leaves of a hidden score would be inf."""
    q, k, v = make_qkv(1, 9, 20, 2, 1, row.head_dim, dtype=dtype_of(row))
    mask = torch.full((9, 20), -200.0)
    mask[:, 13:] = -math.inf
    for deterministic in (False, True):
        op = training(executor, row, deterministic)
        check_backward(op, q, k, v, mask=mask, seqlens_kv=lengths(17))


@every_row
def test_bits_without_atomics(device, executor, row):
    """The same whatever runs first; with atomics, those of dK and dV are."""
    q, k, v = make_qkv(2, 7, row.block_n + 3, 4, 2, row.head_dim, dtype=dtype_of(row))
    mask = make_mask("additive", (2, 4, 7, row.block_n + 3))
    dout, leaves = torch.randn_like(q), [t.requires_grad_() for t in (q, k, v, mask)]
    results = {True: [], False: []}
    for options in ({}, {"seed": 2, "eager": True}, {"seed": 3, "threads": 2}):
        for deterministic, found in results.items():
            out = training(executor, row, deterministic, **options)(q, k, v, mask=mask, causal=True)
            found.append(torch.autograd.grad(out, leaves, dout))
    for deterministic, found in results.items():
        for other in found[1:]:
            for x, y, name in zip(other, found[0], ("dq", "dk", "dv", "dmask"), strict=True):
                if deterministic or name != "dq":
                    assert_same_bits(x, y, name)
    oracle = [t.detach().double().requires_grad_() for t in leaves]
    out = reference.attention(*oracle[:3], mask=oracle[3], causal=True)
    wanted = torch.autograd.grad(out, oracle, dout.double())
    for x, y in zip(results[False][0], wanted, strict=True):
        assert (x - y).abs().max() <= 0.02 * y.abs().max()
