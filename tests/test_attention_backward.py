"""attention(), backward: gradients in q, k, v, mask and through lse, against float64 autograd."""

import random

import pytest
import torch

from flashinfer_lite import attention
from flashinfer_lite.testing import (
    LAYOUTS,
    assert_close_elementwise,
    assert_same_bits,
    check_backward,
    make_mask,
    make_qkv,
)
from flashinfer_lite.testing.tolerance import STRICT_KEYS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32)


FEATURES = {
    "plain": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "causal_top_left": {"causal": "top_left"},
    "window": {"window": (5, 3)},
    "window_causal": {"window": (9, -1), "causal": True},
    "softcap": {"softcap": 2.0},
    "softcap_causal": {"softcap": 20.0, "causal": True},
    "seqlens": {"seqlens_kv": lengths(53, 20)},
    "seqlens_zero": {"seqlens_kv": lengths(0, 53), "causal": True},
    "kv_start": {"kv_start": lengths(0, 13), "causal": True},
    "everything": {
        "kv_start": lengths(2, 0),
        "seqlens_kv": lengths(53, 44),
        "causal": True,
        "window": (25, 0),
        "softcap": 8.0,
    },
}


@all_dtypes
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(device, isa, dtype, feature):
    arguments = {
        name: x.to(device) if torch.is_tensor(x) else x for name, x in FEATURES[feature].items()
    }
    q, k, v = make_qkv(2, 37, 53, dtype=dtype, device=device)
    check_backward(attention, q, k, v, **arguments)
    check_backward(attention, q[:, :2], k, v, with_lse=False, **arguments)


@all_dtypes
@pytest.mark.parametrize("kind", ["bool", "additive_inf"])
@pytest.mark.parametrize(
    "shape", [(53,), (37, 53), (4, 1, 53), (2, 1, 1, 53), (2, 4, 37, 1), (2, 4, 37, 53)], ids=str
)
def test_mask(device, isa, dtype, kind, shape):
    q, k, v = make_qkv(2, 37, 53, dtype=dtype, device=device)
    mask = make_mask(kind, shape, device=device, empty_rows=shape[-1] > 1)
    check_backward(attention, q, k, v, mask=mask, softcap=4.0)


@all_dtypes
@pytest.mark.parametrize(
    "shape",
    [(53,), (1,), (37, 53), (4, 1, 1), (2, 1, 1, 53), (2, 1, 37, 1), (2, 4, 37, 53)],
    ids=str,
)
def test_mask_gradient(device, isa, dtype, shape):
    for mask_dtype in DTYPES:
        q, k, v = make_qkv(2, 37, 53, dtype=dtype, device=device)
        mask = make_mask("additive", shape, dtype=mask_dtype, device=device).requires_grad_()
        *_, dmask = check_backward(
            attention, q, k, v, mask=mask, causal=True, window=(30, -1), softcap=6.0
        )
        assert dmask.shape == mask.shape and dmask.dtype == mask.dtype


def test_mask_gradient_where_it_hides(device, isa):
    q, k, v = make_qkv(2, 20, 30, dtype=torch.float32, device=device)
    mask = make_mask("additive_inf", (2, 1, 20, 30), device=device).requires_grad_()
    *_, dmask = check_backward(attention, q, k, v, mask=mask)
    assert not dmask[mask == -torch.inf].any()


def test_only_the_mask_needs_a_gradient(device, isa):
    q, k, v = make_qkv(1, 9, 14, dtype=torch.float32, device=device)
    mask = make_mask("additive", (9, 14), device=device).requires_grad_()
    (dmask,) = torch.autograd.grad(attention(q, k, v, mask=mask).mean(), mask)
    exact = mask.detach().double().requires_grad_()
    out = attention(q.double(), k.double(), v.double(), mask=exact, impl="reference")
    (expected,) = torch.autograd.grad(out.mean(), exact)
    assert dmask.any()
    assert_close_elementwise(dmask, expected, "dmask")


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(device, isa, dtype, layout):
    q, k, v = make_qkv(2, 26, 26, 4, 4, 40, dtype=dtype, device=device, layout=layout)
    check_backward(attention, q, k, v, causal=True)


@all_dtypes
def test_layout_of_dout(device, isa, dtype):
    q, k, v = make_qkv(2, 26, 35, 4, 2, 40, 72, dtype=dtype, device=device)
    dout = torch.randn(2, 26, 4, 72, device=device).to(dtype)
    transposed = dout.transpose(1, 2).contiguous().transpose(1, 2)
    expected = check_backward(attention, q, k, v, dout=dout, with_lse=False)
    flat = torch.empty(dout.numel() + 1, dtype=dtype, device=device)[1:].view_as(dout).copy_(dout)
    strided = torch.stack([dout, dout], -1)[..., 0]
    for other in (transposed, flat, strided):
        got = check_backward(attention, q, k, v, dout=other, with_lse=False)
        for name, x, y in zip(("dq", "dk", "dv"), got, expected, strict=True):
            assert_same_bits(x, y, name)
    one = torch.ones((), dtype=dtype, device=device).expand(2, 26, 4, 72)
    check_backward(attention, q, k, v, dout=one)


@all_dtypes
@pytest.mark.parametrize("head_dim", [8, 16, 40, 56, 64, 72, 80, 96, 128, 192, 256])
def test_head_dim(device, isa, dtype, head_dim):
    for head_dim_v in (head_dim, 8 * (1 + (head_dim // 8 * 5) % 32)):
        q, k, v = make_qkv(1, 19, 45, 2, 1, head_dim, head_dim_v, dtype=dtype, device=device)
        check_backward(attention, q, k, v, causal=True)


@all_dtypes
@pytest.mark.parametrize(
    "seqlen", sorted({t + d for t in (4, 6, 8, 16, 64, 128) for d in (-1, 0, 1)})
)
def test_tails(device, isa, dtype, seqlen):
    q, k, v = make_qkv(1, seqlen, 23, 2, 1, 24, dtype=dtype, device=device)
    check_backward(attention, q, k, v, causal=True)
    q, k, v = make_qkv(1, 11, seqlen, 2, 1, 24, dtype=dtype, device=device)
    check_backward(attention, q, k, v)


@all_dtypes
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (6, 2), (5, 1), (16, 1)])
def test_heads(device, isa, dtype, heads):
    q, k, v = make_qkv(2, 21, 40, *heads, 32, dtype=dtype, device=device)
    check_backward(attention, q, k, v, causal=True)


@all_dtypes
def test_large_logits(device, isa, dtype):
    q, k, v = make_qkv(1, 29, 70, dtype=dtype, device=device, logits=100)
    check_backward(attention, q, k, v, causal=True)
    check_backward(attention, q, k, v, softcap=50.0)


@all_dtypes
@pytest.mark.parametrize("keys", STRICT_KEYS)
def test_strict_rule(device, isa, dtype, keys):
    # K is centred: dQ = dS K, and every row of dS carries the rounding of that row's 16-bit out,
    # as in every FlashAttention-2 backward. The mean of K would add it up over the keys.
    q, k, v = make_qkv(1, 64, keys, 2, 1, 64, dtype=dtype, device=device, mean=0)
    check_backward(attention, q, k, v, strict=True, causal=True, with_lse=False)


@all_dtypes
def test_rows_without_keys(device, isa, dtype):
    q, k, v = make_qkv(2, 20, 6, dtype=dtype, device=device)
    dq, _, _ = check_backward(attention, q, k, v, causal=True)
    assert not dq[:, :14].any()
    hidden = torch.zeros(6, dtype=torch.bool, device=device)
    for gradient in check_backward(attention, q, k, v, mask=hidden):
        assert not gradient.any()


@all_dtypes
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "two_passes"])
def test_nan_in_a_query_without_keys(device, isa, dtype, fused, threads):
    q, k, v = make_qkv(1, 70, 70, 2, 1, 16, dtype=dtype, device=device)
    visible = torch.ones(70, 70, dtype=torch.bool, device=device)
    visible[2] = False
    wanted = gradients_of_sum(q, k, v, visible)
    q[:, 2] = torch.nan
    threads(1 if fused else 2)
    for got, expected in zip(gradients_of_sum(q, k, v, visible), wanted, strict=True):
        assert_same_bits(got, expected)


def gradients_of_sum(q, k, v, mask):
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention(*inputs, mask=mask).sum(), inputs)


@pytest.mark.parametrize("empty", ["batch_size", "seqlen_q", "seqlen_kv"])
def test_zero_size_dimensions(device, isa, empty):
    shape = {"batch_size": 2, "seqlen_q": 3, "seqlen_kv": 5, empty: 0}
    q, k, v = make_qkv(**shape, head_dim=16, device=device, requires_grad=True)
    grads = torch.autograd.grad(attention(q, k, v, causal=True).sum(), (q, k, v))
    for t, g in zip((q, k, v), grads, strict=True):
        assert g.shape == t.shape and not g.any()


@pytest.mark.cpu_only("computed in float64, which CUDA kernels refuse by name")
@pytest.mark.parametrize("feature", ["plain", "causal", "window", "softcap", "everything"])
def test_gradcheck(device, isa, feature):
    q, k, v = make_qkv(2, 3, 53, 2, 1, 8, dtype=torch.float64, device=device)
    q, k, v = (t.requires_grad_() for t in (q, k[:, :53].detach(), v.detach()))

    def run(*inputs):
        return attention(*inputs, **FEATURES[feature], return_lse=True)

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


@pytest.mark.cpu_only("computed in float64, which CUDA kernels refuse by name")
def test_gradcheck_of_everything(device, isa):
    q, k, v = make_qkv(1, 4, 6, 2, 1, 8, 16, dtype=torch.float64, device=device, requires_grad=True)
    for shape in [(6,), (4, 1), (2, 4, 6), (1, 2, 1, 6)]:
        bias = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

        def run(q, k, v, bias):
            return attention(q, k, v, mask=bias, causal=True, softcap=3.0, return_lse=True)

        assert torch.autograd.gradcheck(run, (q, k, v, bias))


@all_dtypes
def test_repeats_bit_for_bit(device, isa, dtype, threads):
    q, k, v = make_qkv(2, 150, 170, 6, 2, 64, dtype=dtype, device=device, requires_grad=True)
    dout = torch.randn(2, 150, 6, 64, device=device).to(dtype)

    def gradients():
        out = attention(q, k, v, causal=True, deterministic=True)
        return torch.autograd.grad(out, (q, k, v), dout)

    first = gradients()
    for count in (1, 2, 2, 3):
        threads(count)
        for name, x, y in zip(("dq", "dk", "dv"), gradients(), first, strict=True):
            assert_same_bits(x, y, name)


@all_dtypes
def test_more_threads_than_tasks(device, isa, dtype, threads):
    # One KV head of one sequence on several threads: the backward has to cut along keys and rows.
    threads(4)
    q, k, v = make_qkv(1, 150, 170, 4, 1, 40, dtype=dtype, device=device)
    mask = make_mask("additive", (4, 1, 170), device=device).requires_grad_()
    check_backward(attention, q, k, v, causal=True, mask=mask)


@all_dtypes
@pytest.mark.parametrize("feature", ["plain", "causal", "window", "kv_start"])
def test_parts_of_the_keys(device, isa, dtype, feature, threads):
    # So few heads and so many keys that one thread takes these in parts, and four take two passes.
    arguments = FEATURES[feature]
    if feature == "kv_start":
        arguments = {"kv_start": lengths(600).to(device), "seqlens_kv": lengths(1500).to(device)}
    q, k, v = make_qkv(1, 75, 1600, 2, 1, 24, dtype=dtype, device=device, mean=0)
    dout = torch.randn(1, 75, 2, 24, device=device).to(dtype)
    threads(1)
    one = check_backward(attention, q, k, v, dout=dout, with_lse=False, **arguments)
    threads(4)
    several = check_backward(attention, q, k, v, dout=dout, with_lse=False, **arguments)
    for name, x, y in zip(("dq", "dk", "dv"), one, several, strict=True):
        assert_same_bits(x, y, name)


@all_dtypes
def test_a_sequence_has_the_same_bits_in_a_batch(device, isa, dtype, threads):
    q, k, v = make_qkv(4, 75, 1100, 2, 1, 24, dtype=dtype, device=device, requires_grad=True)
    dout = torch.randn(4, 75, 2, 24, device=device).to(dtype)
    together = torch.autograd.grad(attention(q, k, v, causal=True), (q, k, v), dout)
    threads(3)
    alone = torch.autograd.grad(
        attention(*(t[1:2] for t in (q, k, v)), causal=True), (q, k, v), dout[1:2]
    )
    for name, x, y in zip(("dq", "dk", "dv"), together, alone, strict=True):
        assert_same_bits(x[1], y[1], name)


def test_no_graph_without_grad(device):
    q, k, v = make_qkv(1, 4, 4, device=device, requires_grad=True)
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad
    assert attention(q.detach(), k, v.detach()).requires_grad


@pytest.mark.parametrize("needed", ["q", "k", "v"])
def test_each_input_alone(device, isa, needed):
    tensors = dict(zip("qkv", make_qkv(2, 9, 11, device=device), strict=True))
    everything = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    expected = torch.autograd.grad(attention(**everything).square().sum(), everything[needed])
    tensors[needed].requires_grad_()
    got = torch.autograd.grad(attention(**tensors).square().sum(), tensors[needed])
    assert_same_bits(got[0], expected[0], "d" + needed)


@pytest.mark.cpu_only("computed in float64, which CUDA kernels refuse by name")
def test_lse_alone(device, isa):
    q, k, v = make_qkv(2, 9, 11, dtype=torch.float64, device=device, requires_grad=True)
    _, lse = attention(q, k, v, causal="top_left", return_lse=True)
    grads = torch.autograd.grad(lse.mean(), (q, k), allow_unused=True)
    _, lse = attention(q, k, v, causal="top_left", return_lse=True, impl="reference")
    expected = torch.autograd.grad(lse.mean(), (q, k))
    assert grads[0].any()
    for x, ref in zip(grads, expected, strict=True):
        assert_close_elementwise(x, ref)


def test_second_derivative_is_refused(device):
    q, k, v = make_qkv(1, 4, 4, device=device, requires_grad=True)
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


CASES = [*range(20), *(pytest.param(case, marks=pytest.mark.slow) for case in range(20, 80))]


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_random_combination(device, isa, dtype, case):
    rng = random.Random(case)
    heads_kv, batch_size = rng.choice([1, 2]), rng.randint(1, 2)
    seqlen_q, seqlen_kv = rng.randint(1, 140), rng.randint(1, 140)
    q, k, v = make_qkv(
        batch_size,
        seqlen_q,
        seqlen_kv,
        heads_kv * rng.choice([1, 2, 3]),
        heads_kv,
        8 * rng.randint(1, 10),
        8 * rng.randint(1, 10),
        dtype=dtype,
        device=device,
        layout=rng.choice(LAYOUTS),
    )
    arguments = {
        "causal": rng.choice([False, True, "top_left"]),
        "window": (rng.choice([-1, -1, 0, 5, 40]), rng.choice([-1, 0, 7])),
        "softcap": rng.choice([None, 2.0, 30.0]),
    }
    if rng.random() < 0.5:
        ends = lengths(*(rng.randint(0, seqlen_kv) for _ in range(batch_size)))
        arguments["seqlens_kv"] = ends.to(device)
    if rng.random() < 0.5:
        shape = [rng.choice([size, 1]) for size in (q.shape[2], seqlen_q, seqlen_kv)]
        arguments["mask"] = make_mask("additive", shape, device=device).requires_grad_()
    check_backward(attention, q, k, v, **arguments)
