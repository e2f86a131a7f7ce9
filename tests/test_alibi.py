"""ALiBi: a bias by the distance of query and key, in attention, decode and attention_varlen."""

import functools
import math

import pytest
import torch
from test_paged import PAGE_SIZES, Paged
from test_sink import OPS, all_dtypes, arguments, every_feature, every_op
from torch.func import jvp, vmap

from flashinfer_lite import attention, attention_varlen, decode, explain, reference, stats
from flashinfer_lite.testing import (
    LAYOUTS,
    assert_close,
    assert_same_bits,
    check_backward,
    check_forward,
    make_mask,
    make_qkv,
    make_varlen,
)

INF = math.inf
# What GPT-like models have of it, none, and the other way round.
SLOPES = (0.5, 2.0**-6, 0.0, -0.03)


def make_slopes(device, batch_size=None):
    """[4], or [batch_size, 4] with other values in each row."""
    slopes = torch.tensor(SLOPES, device=device)
    if batch_size is None:
        return slopes
    return torch.stack([slopes.roll(b) * 1.5**b for b in range(batch_size)])


def bias_of(slopes, seqlen_q, seqlen_kv, diagonal):
    """The bias as a mask [batch, heads, seqlen_q, seqlen_kv], element by element; diagonal: of each
    sequence."""
    bias = torch.empty(len(diagonal), slopes.shape[-1], seqlen_q, seqlen_kv, dtype=torch.float64)
    for b, shift in enumerate(diagonal):
        for i in range(seqlen_q):
            for j in range(seqlen_kv):
                slope = (slopes[b] if slopes.dim() == 2 else slopes).double()
                bias[b, :, i, j] = -slope * abs(i + shift - j)
    return bias.to(slopes.device)


@all_dtypes
@every_op
@every_feature
def test_feature(device, isa, dtype, op, feature):
    for seqlen_q, seqlen_kv, heads_kv in ((1, 300, 1), (5, 130, 2), (33, 33, 4)):
        q, k, v = make_qkv(3, seqlen_q, seqlen_kv, 4, heads_kv, 40, 24, dtype=dtype, device=device)
        options = arguments(feature, device, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        slopes = make_slopes(device, 3 if seqlen_q > 1 else None)
        check_forward(op, q, k, v, alibi_slopes=slopes, **options)


@all_dtypes
def test_many_rows(device, isa, dtype):
    """Several blocks of rows and of keys, and heads that share a KV head or not."""
    for seqlen_q, seqlen_kv, heads_kv in ((200, 333, 1), (150, 70, 4)):
        q, k, v = make_qkv(2, seqlen_q, seqlen_kv, 4, heads_kv, 64, dtype=dtype, device=device)
        for options in ({}, {"causal": True}, {"causal": "top_left"}, {"window": (60, 10)}):
            check_forward(attention, q, k, v, alibi_slopes=make_slopes(device, 2), **options)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_it_is_this_mask(device, causal, batched):
    """The formula, written down once more."""
    q, k, v = make_qkv(2, 4, 9, 4, 2, 16, device=device)
    slopes = make_slopes(device, 2 if batched else None)
    used = torch.tensor([9, 6], device=device)
    diagonal = [0, 0] if causal == "top_left" else [9 - 4, 6 - 4]
    options = {"seqlens_kv": used, "causal": causal, "softcap": 2.0, "return_lse": True}
    mask = bias_of(slopes, 4, 9, diagonal)
    expected = reference.attention(q, k, v, mask=mask, dtype=torch.float64, **options)
    oracle = reference.attention(q, k, v, alibi_slopes=slopes, dtype=torch.float64, **options)
    for name, x, y in zip(("out", "lse"), oracle, expected, strict=True):
        assert_close(x, y, y, name)
    eager = reference.attention(q, k, v, mask=mask, **options)
    for op in (attention, decode):
        for x, y, e in zip(
            op(q, k, v, alibi_slopes=slopes, **options), expected, eager, strict=True
        ):
            assert_close(x, y, e)


@all_dtypes
@every_op
@pytest.mark.parametrize("phi", [-2.0, -80.0], ids=["safe", "recomputed"])
def test_unified_maximum(device, isa, dtype, op, phi):
    q, k, v = make_qkv(3, 3, 200, 4, 2, 32, dtype=dtype, device=device)
    unified = functools.partial(op, softmax="unified", phi=phi)
    options = {"window": (90, 20), "alibi_slopes": make_slopes(device) / 16}
    stats(reset=True)
    got = check_forward(unified, q, k, v, **options)
    recomputed = stats(reset=True).rows_recomputed
    assert (recomputed > 0) == (phi == -80.0)
    if phi == -80.0 and recomputed == q.shape[:3].numel():
        for x, y in zip(got, op(q, k, v, **options, return_lse=True), strict=True):
            assert_same_bits(x, y)


@all_dtypes
def test_the_bias_decides_which_rows_are_recomputed(device, isa, dtype):
    q, k, v = make_qkv(1, 1, 64, 4, 2, 32, dtype=dtype, device=device)
    slopes = torch.tensor([0.0, 0.0, -3.0, 0.1], device=device)
    for op in OPS.values():
        stats(reset=True)
        check_forward(functools.partial(op, phi=-3.0), q, k, v, alibi_slopes=slopes)
        assert stats(reset=True).rows_recomputed == 1


@all_dtypes
@every_op
def test_slope_zero_changes_nothing(device, isa, dtype, op):
    """Bit for bit, where scores are finished one by one anyway, as under a mask that hides none."""
    q, k, v = make_qkv(2, 3, 130, 4, 2, 32, dtype=dtype, device=device)
    mask = torch.ones(1, dtype=torch.bool, device=device)
    run = functools.partial(op, q, k, v, causal=True, mask=mask, return_lse=True)
    slopes = torch.tensor([0.0, 0.3, 0.0, 0.0], device=device)
    for name, x, y, head in zip(
        ("out", "lse"), run(alibi_slopes=slopes), run(), (2, 1), strict=True
    ):
        others = [0, 2, 3]
        assert_same_bits(x.movedim(head, 0)[others], y.movedim(head, 0)[others], name)
        assert not torch.equal(x.movedim(head, 0)[1], y.movedim(head, 0)[1])


@all_dtypes
@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(device, isa, dtype, op, layout):
    q, k, v = make_qkv(3, 6, 6, 4, 4, 40, dtype=dtype, device=device, layout=layout)
    slopes = make_slopes(device, 3)
    expected = check_forward(op, q, k, v, alibi_slopes=slopes, causal=True)
    strided = torch.full((4, 3, 2), torch.nan, device=device)
    strided[..., 1] = slopes.T
    got = op(q, k, v, alibi_slopes=strided[..., 1].T, causal=True, return_lse=True)
    for x, y in zip(got, expected, strict=True):
        assert_same_bits(x, y)
    one = make_slopes(device)
    for x, y in zip(
        op(q, k, v, alibi_slopes=one.expand(3, 4), return_lse=True),
        op(q, k, v, alibi_slopes=one, return_lse=True),
        strict=True,
    ):
        assert_same_bits(x, y)


@all_dtypes
@pytest.mark.parametrize("op", [OPS["attention"], OPS["three splits"]], ids=["attention", "decode"])
def test_keys_far_away(device, isa, dtype, op):
    """A bias of hundreds on every key that is seen, whose differences are what matters."""
    keys = 2**15
    q, k, v = make_qkv(1, 1, keys, 4, 1, 8, dtype=dtype, device=device)
    slopes = torch.tensor([2.0**-6, -(2.0**-6), 2.0**-4, 0.02], device=device)
    mask = (torch.arange(keys, device=device) < 300).view(1, 1, 1, keys)
    out, lse = check_forward(op, q, k, v, alibi_slopes=slopes, mask=mask)
    assert lse[0, 0, 0] < -500 and lse[0, 1, 0] > 500 and lse[0, 2, 0] < -2000


@all_dtypes
@every_op
def test_rows_without_keys_and_hidden_keys(device, isa, dtype, op):
    q, k, v = make_qkv(3, 2, 70, 4, 2, 16, dtype=dtype, device=device)
    used, start = torch.tensor([70, 0, 33], device=device), torch.tensor([9, 0, 33], device=device)
    k[0, :9], v[0, :9] = math.nan, INF
    k[1:], v[1:] = INF, math.nan  # not in use
    out, lse = check_forward(
        op, q, k, v, alibi_slopes=make_slopes(device, 3), seqlens_kv=used, kv_start=start
    )
    assert not out[1:].any() and (lse[1:] == -INF).all()
    out, lse = check_forward(op, q, k[:, :0], v[:, :0], alibi_slopes=make_slopes(device))
    assert not out.any() and (lse == -INF).all()
    # One key in sight: whatever its bias, the row is its value.
    out = op(q[:1], k[:1, 20:21], v[:1, 20:21], alibi_slopes=make_slopes(device))
    assert_same_bits(out, v[:1, 20:21].repeat_interleave(2, 2).expand(1, 2, 4, 16))


@all_dtypes
@every_op
def test_slopes_that_are_not_finite_stay_in_their_head(device, isa, dtype, op):
    q, k, v = make_qkv(2, 2, 70, 4, 2, 16, dtype=dtype, device=device)
    used = torch.tensor([70, 0], device=device)
    slopes = torch.tensor([0.5, math.nan, INF, 0.0], device=device)
    out, lse = op(q, k, v, alibi_slopes=slopes, seqlens_kv=used, return_lse=True)
    expected = op(q, k, v, alibi_slopes=slopes.nan_to_num(0, 0), seqlens_kv=used, return_lse=True)
    for x, y, head in ((out, expected[0], 2), (lse, expected[1], 1)):
        fine = [0, 3]
        assert_same_bits(x.movedim(head, 0)[fine], y.movedim(head, 0)[fine])
    assert out[0, :, 1].isnan().all() and not out[1].any()


@all_dtypes
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages(device, isa, dtype, page_size):
    for seqlen_q, options in ((1, {}), (3, {"causal": True, "kv_splits": 3})):
        cache = Paged(device, dtype, page_size, seqlen_q=seqlen_q)
        used = torch.tensor([300, 129], device=device)
        cache.check(alibi_slopes=make_slopes(device, 2), seqlens_kv=used, **options)


@all_dtypes
@pytest.mark.parametrize("kv_splits", [0, 3])
def test_decode_into_out(device, isa, dtype, kv_splits):
    q, k, v = make_qkv(2, 2, 600, 4, 2, 40, 24, dtype=dtype, device=device)
    slopes = make_slopes(device)
    run = functools.partial(decode, q, k, v, alibi_slopes=slopes, kv_splits=kv_splits)
    out = torch.full((2, 2, 4, 24), torch.nan, dtype=dtype, device=device)
    assert run(out=out) is out
    assert_same_bits(out, run())


@all_dtypes
@pytest.mark.parametrize("op", [attention, OPS["invariant"]], ids=["attention", "decode"])
def test_batch_invariant(device, isa, dtype, op, threads):
    q, k, v = make_qkv(3, 5, 1500, 4, 2, 32, dtype=dtype, device=device)
    used = torch.tensor([1500, 0, 1025], device=device)
    slopes = make_slopes(device, 3)
    together = op(q, k, v, alibi_slopes=slopes, seqlens_kv=used, return_lse=True)
    for b, count in ((0, 1), (1, 2), (2, 3)):
        threads(count)
        one = slice(b, b + 1)
        options = {"alibi_slopes": slopes[one], "seqlens_kv": used[one], "return_lse": True}
        for x, y in zip(op(q[one], k[one], v[one], **options), together, strict=True):
            assert_same_bits(x, y[one])


@all_dtypes
@every_feature
def test_gradients(device, isa, dtype, feature):
    for seqlen_q, seqlen_kv, heads_kv in ((1, 60, 1), (13, 40, 2), (70, 150, 4)):
        q, k, v = make_qkv(3, seqlen_q, seqlen_kv, 4, heads_kv, 40, 24, dtype=dtype, device=device)
        options = arguments(feature, device, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, gradients=True)
        slopes = make_slopes(device, 3 if seqlen_q == 13 else None)
        check_backward(attention, q, k, v, alibi_slopes=slopes, **options)


@pytest.mark.cpu_only("computed in float64, which CUDA kernels refuse by name")
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_gradcheck(device, isa, causal):
    """Against finite differences, rows without keys included."""
    tensors = make_qkv(2, 3, 5, 4, 2, 8, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.randn(4, 1, 5, dtype=torch.float64, device=device, requires_grad=True)
    used = torch.tensor([5, 0], device=device)
    slopes = make_slopes(device, 2)

    def run(q, k, v, mask):
        options = {"seqlens_kv": used, "window": (2, 2), "softcap": 3.0, "causal": causal}
        out, lse = attention(q, k, v, mask=mask, alibi_slopes=slopes, return_lse=True, **options)
        return out, torch.where(lse == -INF, 0, lse)

    assert torch.autograd.gradcheck(run, (*tensors, mask))


LENGTHS = [(5, 70, 0, 1, 130), (5, 90, 7, 0, 60)]


@all_dtypes
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_varlen(device, isa, dtype, causal, batched):
    """Against the oracle, and bit for bit a loop over attention."""
    q, k, v, offsets = make_varlen(*LENGTHS, tails=(2, 3), dtype=dtype, device=device)
    slopes = make_slopes(device, 5 if batched else None)
    options = {"causal": causal, "window": (50, 20)}
    out, lse = check_forward(attention_varlen, q, k, v, alibi_slopes=slopes, **offsets, **options)
    starts_q, starts_kv = (x.tolist() for x in offsets.values())
    for b in range(5):
        rows = slice(*starts_q[b : b + 2])
        keys = slice(*starts_kv[b : b + 2])
        one, one_lse = attention(
            *(q[None, rows], k[None, keys], v[None, keys]),
            alibi_slopes=slopes[b] if batched else slopes,
            return_lse=True,
            **options,
        )
        assert_same_bits(out[rows], one[0])
        assert_same_bits(lse[:, rows], one_lse[0])


@all_dtypes
@pytest.mark.parametrize("batched", [False, True])
def test_varlen_gradients(device, isa, dtype, batched):
    q, k, v, offsets = make_varlen(*LENGTHS, dtype=dtype, device=device)
    slopes = make_slopes(device, 5 if batched else None)
    used = torch.tensor([4, 90, 0, 0, 33], device=device)
    for options in ({}, {"causal": True, "softcap": 5.0}, {"seqlens_kv": used, "window": (9, 9)}):
        check_backward(attention_varlen, q, k, v, alibi_slopes=slopes, **offsets, **options)


@all_dtypes
def test_varlen_unified_and_pages(device, isa, dtype):
    cache = Paged(device, dtype, 16, seqlen_q=2)
    k, v = cache.dense()
    slopes = make_slopes(device, 2)
    starts = torch.tensor([0, 2, 4], device=device)
    starts_kv = torch.tensor([0, k.shape[1], 2 * k.shape[1]], device=device)
    q = cache.q.flatten(0, 1)
    for options in ({}, {"phi": -3.0}, {"phi": torch.tensor([-3.0, -90, 80, 0], device=device)}):
        run = functools.partial(attention_varlen, alibi_slopes=slopes, causal=True, **options)
        got = run(q, cache.k, cache.v, starts, starts_kv, block_table=cache.table)
        assert_same_bits(got, run(q, k.flatten(0, 1), v.flatten(0, 1), starts, starts_kv))
        expected = attention(cache.q, k, v, alibi_slopes=slopes, causal=True, **options)
        assert_same_bits(got, expected.flatten(0, 1))


def test_slopes_get_no_gradient(device):
    """Refused, not forgotten; the oracle has one."""
    q, k, v = make_qkv(2, 3, 9, 4, 2, 16, device=device)
    slopes = make_slopes(device).requires_grad_()
    message = "^alibi_slopes: expected a tensor that does not require grad, got one that does"
    for run in (attention, decode, functools.partial(explain, attention)):
        with pytest.raises(RuntimeError, match=message):
            run(q, k, v, alibi_slopes=slopes)
        with torch.no_grad():
            run(q, k, v, alibi_slopes=slopes)
    q, k, v, offsets = make_varlen([3, 2], device=device)
    with pytest.raises(RuntimeError, match=message):
        attention_varlen(q, k, v, **offsets, alibi_slopes=slopes)
    out = reference.attention_varlen(q, k, v, **offsets, alibi_slopes=slopes)
    assert torch.autograd.grad(out.square().sum(), slopes)[0].all()


@pytest.mark.parametrize("op", [attention, decode], ids=["attention", "decode"])
def test_a_tangent_of_slopes_is_refused(device, op):
    q, k, v = make_qkv(2, 3, 30, 4, 2, 16, device=device)
    slopes = make_slopes(device)
    with pytest.raises((NotImplementedError, RuntimeError), match="^alibi_slopes: expected"):
        jvp(lambda x: op(q, k, v, alibi_slopes=x), (slopes,), (slopes,))
    run = functools.partial(reference.attention, q, k, v)
    out, tangent = jvp(lambda x: run(alibi_slopes=x), (slopes,), (slopes,))
    assert out.shape == tangent.shape and tangent.any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", [attention, decode], ids=["attention", "decode"])
def test_vmap_over_slopes(device, op):
    q, k, v = make_qkv(2, 3, 30, 4, 2, 16, device=device)
    all_slopes = make_slopes(device, 3)
    got = vmap(lambda x: op(q, k, v, alibi_slopes=x, return_lse=True))(all_slopes)
    for i, slopes in enumerate(all_slopes):
        expected = op(q, k, v, alibi_slopes=slopes, return_lse=True)
        for x, y in zip(got, expected, strict=True):
            assert_same_bits(x[i], y)


class Step(torch.nn.Module):
    """A prompt's attention and a decode, with slopes that are a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", torch.tensor(SLOPES))

    def forward(self, q, k, v):
        newest = decode(q[:, -1:], k, v, alibi_slopes=self.slopes)
        options = {"causal": True, "alibi_slopes": self.slopes, "return_lse": True}
        return newest, *attention(q, k, v, **options)


def test_compiled_and_exported_inference(device):
    torch._dynamo.reset()
    step, given = Step().to(device), make_qkv(2, 5, 30, 4, 2, 16, device=device)
    with torch.no_grad():
        expected = step(*given)
        seqlen = torch.export.Dim("seqlen", max=4096)
        shapes = {"q": None, "k": {1: seqlen}, "v": {1: seqlen}}
        program = torch.export.export(step, given, dynamic_shapes=shapes)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for run in (compiled, program.module()):
            for x, y in zip(run(*given), expected, strict=True):
                assert_same_bits(x, y)
    torch._dynamo.reset()


def test_compiled_training(device):
    torch._dynamo.reset()
    slopes = make_slopes(device, 2)

    def loss(q, k, v):
        out, lse = attention(q, k, v, alibi_slopes=slopes, causal=True, return_lse=True)
        return out.square().sum() + lse.sum()

    step = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (8, 11):
        leaves = make_qkv(2, seqlen, seqlen, 4, 2, 16, device=device, requires_grad=True)
        got = torch.autograd.grad(step(*leaves), leaves)
        for x, y in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            assert_same_bits(x, y)
    torch._dynamo.reset()


def test_compiled_varlen_training(device):
    torch._dynamo.reset()
    slopes = make_slopes(device, 2)
    *leaves, offsets = make_varlen([5, 9], device=device)
    leaves = [x.requires_grad_() for x in leaves]

    def loss(q, k, v):
        return attention_varlen(q, k, v, **offsets, alibi_slopes=slopes).square().sum()

    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(step(*leaves), leaves)
    for x, y in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_same_bits(x, y)
    torch._dynamo.reset()


def test_autocast(device):
    """Slopes stay float32."""
    q, k, v = make_qkv(1, 3, 40, 4, 2, 16, device=device)
    slopes = make_slopes(device)
    with torch.autocast(device.type, torch.bfloat16):
        out, lse = attention(q, k, v, alibi_slopes=slopes, return_lse=True)
    cast = (t.bfloat16() for t in (q, k, v))
    expected = attention(*cast, alibi_slopes=slopes, return_lse=True)
    for x, y in zip((out, lse), expected, strict=True):
        assert_same_bits(x, y)


def test_explain_and_reference(device):
    q, k, v = make_qkv(1, 3, 40, 4, 2, 16, device=device)
    slopes = make_slopes(device)
    for op in (attention, decode):
        assert explain(op, q, k, v, alibi_slopes=slopes) == explain(op, q, k, v)
        for bad in (slopes[:3], slopes.double(), 1.0):
            with pytest.raises((TypeError, ValueError), match="^alibi_slopes: expected"):
                explain(op, q, k, v, alibi_slopes=bad)
        expected = reference.attention(q, k, v, alibi_slopes=slopes, return_lse=True)
        got = op(q, k, v, alibi_slopes=slopes, impl="reference", return_lse=True)
        for x, y in zip(got, expected, strict=True):
            assert_same_bits(x, y)
    with pytest.raises(ValueError, match=r"^alibi_slopes: expected shape \[4\] or \[1, 4\], got"):
        reference.attention(q, k, v, alibi_slopes=slopes[:2])


@every_op
def test_inputs_are_not_touched(device, op):
    tensors = *make_qkv(2, 3, 40, 4, 2, 16, device=device), make_slopes(device, 2)
    before = [t.clone() for t in tensors]
    mask = make_mask("additive_inf", (4, 3, 40), device=device)
    op(*tensors[:3], alibi_slopes=tensors[3], mask=mask)
    for t, old in zip(tensors, before, strict=True):
        assert_same_bits(t, old)
