"""The attention sink: one more score per query head, without a value, in attention and decode."""

import functools
import math

import pytest
import torch

from flashinfer_lite import attention, decode, explain, reference, stats
from flashinfer_lite.testing import (
    LAYOUTS,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    check_forward,
    guarded,
    make_mask,
    make_qkv,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
OPS = {
    "attention": attention,
    "decode": decode,
    "one split": functools.partial(decode, kv_splits=1),
    "three splits": functools.partial(decode, kv_splits=3),
    "invariant": functools.partial(decode, batch_invariant=True),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
INF = math.inf

# Scores of make_qkv are of some units: these are a whisper, a peer and a ruler of a row.
SINKS = (-4.0, 0.5, 3.0, 9.0)


def make_sink(device, dtype=torch.float32, values=SINKS, requires_grad=False):
    return torch.tensor(values, dtype=dtype, device=device, requires_grad=requires_grad)


def arguments(feature, device, *, seqlen_q, seqlen_kv, gradients=False):
    """The options of a feature, for a batch of 3 and 4 query heads."""
    lengths = functools.partial(torch.tensor, device=device)
    some = [seqlen_kv, 0, seqlen_kv // 2]
    bias = make_mask("additive_inf", (4, seqlen_q, seqlen_kv), device=device)
    return {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window": (20, 3)},
        "window_causal": {"window": (9, -1), "causal": True},
        "window_past": {"window": (3, 0), "causal": "top_left", "kv_start": lengths([0, 2, 9])},
        "softcap": {"softcap": 1.5, "softmax_scale": 0.3},
        "seqlens": {"seqlens_kv": lengths(some), "causal": True},
        "kv_start": {"kv_start": lengths([seqlen_kv, 0, 7])},
        "bool": {"mask": make_mask("bool", (3, 1, seqlen_q, seqlen_kv), device=device)},
        "bias": {"mask": bias.requires_grad_(gradients), "softcap": 4.0, "window": (30, 30)},
    }[feature]


FEATURES = (
    "plain causal window window_causal window_past softcap seqlens kv_start bool bias"
).split()
every_feature = pytest.mark.parametrize("feature", FEATURES)


@all_dtypes
@every_op
@every_feature
def test_feature(device, isa, dtype, op, feature):
    for seqlen_q, seqlen_kv, heads_kv in ((1, 300, 1), (5, 130, 2), (33, 33, 4)):
        q, k, v = make_qkv(3, seqlen_q, seqlen_kv, 4, heads_kv, 40, 24, dtype=dtype, device=device)
        options = arguments(feature, device, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        check_forward(op, q, k, v, sink=make_sink(device), **options)


@all_dtypes
@every_op
@pytest.mark.parametrize("phi", [-2.0, -80.0], ids=["safe", "recomputed"])
def test_unified_maximum(device, isa, dtype, op, phi):
    """Of a sink the guard knows nothing: what is recomputed is a matter of the keys alone."""
    q, k, v = make_qkv(3, 3, 200, 4, 2, 32, dtype=dtype, device=device)
    unified = functools.partial(op, softmax="unified", phi=phi)
    stats(reset=True)
    check_forward(unified, q, k, v, sink=make_sink(device), window=(90, 20))
    recomputed = stats(reset=True).rows_recomputed
    assert (recomputed > 0) == (phi == -80.0)
    unified(q, k, v, window=(90, 20))
    assert stats(reset=True).rows_recomputed == recomputed


@all_dtypes
@every_op
@pytest.mark.parametrize("sink_dtype", DTYPES, ids=str)
def test_any_dtype_of_the_sink(device, isa, dtype, op, sink_dtype):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("CUDA kernels refuse float64")
    q, k, v = make_qkv(2, 2, 70, 4, 2, 32, dtype=dtype, device=device)
    sink = make_sink(device, sink_dtype)
    out, lse = check_forward(op, q, k, v, sink=sink)
    # It is widened, not rounded: these values are exact in every dtype.
    for x, y in zip((out, lse), op(q, k, v, sink=sink.float(), return_lse=True), strict=True):
        assert_same_bits(x, y)


@all_dtypes
@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(device, isa, dtype, op, layout):
    q, k, v = make_qkv(2, 6, 6, 4, 4, 40, dtype=dtype, device=device, layout=layout)
    strided = make_sink(device).repeat_interleave(3)[::3]
    check_forward(op, q, k, v, sink=strided, causal=True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_op
def test_strict_rule(device, isa, dtype, op):
    """Not for 16 bits: there out is rounded twice, by the op and with the sink."""
    for keys in (128, 2048):
        q, k, v = make_qkv(2, 1, keys, 4, 1, 64, dtype=dtype, device=device)
        check_forward(op, q, k, v, sink=make_sink(device, values=(0.0, 4.0, 6.0, 8.0)), strict=True)


@all_dtypes
@every_op
def test_it_is_applied_in_the_dtype_of_lse(device, isa, dtype, op):
    """One rounding of the op's own result: few elements may fall to the other side."""
    q, k, v = make_qkv(2, 3, 200, 4, 2, 64, dtype=dtype, device=device)
    out, lse = op(q, k, v, return_lse=True)
    share = torch.sigmoid(lse.double() - make_sink(device)[:, None])
    expected = (out * share.transpose(1, 2).unsqueeze(-1)).to(dtype)
    got = op(q, k, v, sink=make_sink(device))
    if dtype in (torch.bfloat16, torch.float16):
        assert (got != expected).sum() <= got.numel() / 100
    assert_close(got, expected.double(), expected)


@all_dtypes
def test_it_is_a_key_without_a_value(device, isa, dtype):
    """Said with the ops alone: one key more, whose score is the sink by a mask and whose v is 0."""
    q, k, v = make_qkv(2, 5, 40, 4, 2, 32, dtype=dtype, device=device)
    sink = make_sink(device)
    more = [torch.cat([t, torch.zeros_like(t[:, :1])], 1) for t in (k, v)]
    mask = torch.zeros(4, 1, 41, device=device)
    mask[:, 0, 40] = sink
    exact = (t.double() for t in (q, *more))
    wide, wide_lse = attention(*exact, mask=mask, return_lse=True, impl="reference")
    oracle, oracle_lse = reference.attention(
        q, k, v, sink=sink, return_lse=True, dtype=torch.float64
    )
    assert_close(wide, oracle, oracle, "oracle")
    assert_close(wide_lse, oracle_lse, oracle_lse, "oracle's lse")
    eager = reference.attention(q, *more, mask=mask)
    out, lse = attention(q, k, v, sink=sink, return_lse=True)
    assert_close(out, wide, eager)
    assert_lse_close(lse, wide_lse)


@all_dtypes
@every_op
def test_no_visible_key(device, isa, dtype, op):
    q, k, v = make_qkv(2, 2, 9, 4, 2, 16, dtype=dtype, device=device)
    k[1], v[1] = math.nan, INF  # not in use
    sink, used = make_sink(device), torch.tensor([9, 0], device=device)
    out, lse = check_forward(op, q, k, v, sink=sink, seqlens_kv=used)
    assert_same_bits(out[1], torch.zeros_like(out[1]))
    assert_same_bits(lse[1], sink.to(lse.dtype)[:, None].expand(4, 2), "lse")
    out, lse = check_forward(op, q, k[:, :0], v[:, :0], sink=sink)
    assert not out.any() and (lse == sink[:, None]).all()


@all_dtypes
@every_op
def test_minus_infinity_is_no_sink(device, isa, dtype, op):
    """Bit for bit, in the heads that have none, with keys or without."""
    q, k, v = make_qkv(2, 3, 80, 4, 2, 16, dtype=dtype, device=device)
    options = {"seqlens_kv": torch.tensor([80, 0], device=device), "causal": True}
    expected = op(q, k, v, **options, return_lse=True)
    for values in ((-INF,) * 4, (-INF, 2.0, -INF, -1.0)):
        sink = make_sink(device, values=values)
        out, lse = check_forward(op, q, k, v, sink=sink, **options)
        none = sink == -INF
        assert_same_bits(out[:, :, none], expected[0][:, :, none])
        assert_same_bits(lse[:, none], expected[1][:, none], "lse")
        assert (lse[1] == sink[:, None]).all()


@all_dtypes
@every_op
def test_infinity_and_nan(device, isa, dtype, op):
    q, k, v = make_qkv(2, 3, 80, 4, 2, 16, dtype=dtype, device=device)
    options = {"seqlens_kv": torch.tensor([80, 0], device=device)}
    sink = make_sink(device, values=(INF, math.nan, 0.5, -INF))
    out, lse = check_forward(op, q, k, v, sink=sink, **options)
    assert not out[:, :, 0].any() and (lse[:, 0] == INF).all()
    assert out[0, :, 1].isnan().all() and lse[:, 1].isnan().all()
    assert not out[1].any()  # whatever the sink: no key, no output
    assert out.isfinite()[:, :, 2:].all()
    # NaN in a visible value reaches the output past any finite sink.
    v[0, 5] = math.nan
    assert op(q, k, v, sink=sink, **options)[0].isnan().all()


@all_dtypes
@every_op
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(device, isa, dtype, op, sign):
    """Scores by the hundred against sinks of every size, to the ends of float32 and beyond it."""
    q, k, v = make_qkv(2, 2, 70, 4, 2, 64, dtype=dtype, device=device, logits=100.0)
    for values in ((0.0, 300.0, 1e4, 6e4), (3e38, 1e30, 80.0, 1e-30)):
        sink = make_sink(device, values=[sign * x for x in values])
        out, lse = op(q, k, v, sink=sink, return_lse=True)
        oracle = reference.attention(q, k, v, sink=sink, return_lse=True, dtype=torch.float64)
        eager = reference.attention(q, k, v, sink=sink)
        terms = 1000 * oracle[0].abs().max().item() if dtype == torch.float32 else None
        assert_close(out, oracle[0], eager, terms=terms)
        assert_lse_close(lse, oracle[1])


@all_dtypes
@pytest.mark.parametrize("kv_splits", [0, 3])
def test_decode_into_out(device, isa, dtype, kv_splits):
    q, k, v = make_qkv(2, 2, 600, 4, 2, 40, 24, dtype=dtype, device=device)
    run = functools.partial(
        decode, q, k, v, sink=make_sink(device), causal=True, kv_splits=kv_splits, return_lse=True
    )
    out = guarded((2, 2, 4, 24), dtype, device, offset=1)
    got, lse = run(out=out.tensor)
    assert got is out.tensor
    for name, x, y in zip(("out", "lse"), (got, lse), run(), strict=True):
        assert_same_bits(x, y, name)
    out.assert_intact("out")
    wide = torch.full((2, 4, 5, 50), torch.nan, dtype=dtype, device=device)
    strided = wide[:, :, 1:3, 5:29].transpose(1, 2)
    assert_same_bits(run(out=strided)[0], got)
    assert int((~wide.isnan()).sum()) == strided.numel()


@all_dtypes
@pytest.mark.parametrize("op", [attention, OPS["invariant"]], ids=["attention", "decode"])
def test_batch_invariant(device, isa, dtype, op, threads):
    """Also where the sink joins: torch's exp has other bits in the last lines of a tensor."""
    run = functools.partial(op, sink=make_sink(device), return_lse=True)
    q, k, v = make_qkv(3, 5, 1500, 4, 2, 32, dtype=dtype, device=device)
    used = torch.tensor([1500, 0, 1025], device=device)
    together = run(q, k, v, seqlens_kv=used)
    for b, count in ((0, 1), (1, 2), (2, 3)):
        threads(count)
        one = slice(b, b + 1)
        alone = run(q[one], k[one], v[one], seqlens_kv=used[one])
        for name, x, y in zip(("out", "lse"), alone, together, strict=True):
            assert_same_bits(x, y[one], name)


def test_decode_refuses_a_sink_that_requires_grad(device):
    q, k, v = make_qkv(1, 1, 9, device=device)
    sink = make_sink(device, requires_grad=True)
    with pytest.raises(RuntimeError, match="^sink: decode is for inference"):
        decode(q, k, v, sink=sink)
    with pytest.raises(RuntimeError, match="^sink: decode is for inference"):
        explain(decode, q, k, v, sink=sink)
    with torch.no_grad():
        decode(q, k, v, sink=sink)


@every_op
def test_inputs_are_not_touched(device, op):
    q, k, v = make_qkv(2, 3, 40, 4, 2, 16, device=device)
    tensors = q, k, v, make_sink(device, values=(-INF, 0.0, INF, 1.0))
    before = [t.clone() for t in tensors]
    with_lse = op(q, k, v, sink=tensors[3], return_lse=True)
    assert_same_bits(op(q, k, v, sink=tensors[3]), with_lse[0])
    for t, old in zip(tensors, before, strict=True):
        assert_same_bits(t, old)


def test_explain_and_reference(device):
    q, k, v = make_qkv(1, 3, 40, 4, 2, 16, device=device)
    sink = make_sink(device)
    for op in (attention, decode):
        assert explain(op, q, k, v, sink=sink) == explain(op, q, k, v)
        for bad in (sink[:3], sink.int(), 1.0):
            with pytest.raises((TypeError, ValueError), match="^sink: expected"):
                explain(op, q, k, v, sink=bad)
        expected = reference.attention(q, k, v, sink=sink, return_lse=True)
        got = op(q, k, v, sink=sink, impl="reference", return_lse=True)
        for x, y in zip(got, expected, strict=True):
            assert_same_bits(x, y)
