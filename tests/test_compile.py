"""torch.compile(fullgraph=True), static and dynamic: no graph break, no needless recompilation."""

import pytest
import torch
import torch._dynamo.testing

import flashinfer_lite
from flashinfer_lite import (
    attention,
    decode,
    flash_attn_func,
    flat_linear,
    scaled_dot_product_attention,
)
from flashinfer_lite.testing import assert_close, assert_same_bits, make_qkv


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, dynamic=False, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def train(q, k, v):
    out, lse = attention(q, k, v, causal=True, window=(9, -1), softcap=8.0, return_lse=True)
    return out.square().sum() + lse.sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_training(device, dynamic):
    step = compiled(train, dynamic)
    for seqlen_q, seqlen_kv in ((8, 8), (9, 12), (5, 30)):
        leaves = make_qkv(2, seqlen_q, seqlen_kv, 4, 2, 16, device=device, requires_grad=True)
        got = torch.autograd.grad(step(*leaves), leaves)
        expected = torch.autograd.grad(train(*leaves), leaves)
        for name, x, y in zip(("dq", "dk", "dv"), got, expected, strict=True):
            assert_same_bits(x, y, name)


@pytest.mark.parametrize("dynamic", [False, True])
def test_mask_and_lengths(device, dynamic):
    def run(q, k, v, mask, ends):
        return attention(q, k, v, mask=mask, seqlens_kv=ends, causal="top_left")

    step = compiled(run, dynamic)
    for seqlen in (8, 11, 17):
        q, k, v = make_qkv(2, seqlen, seqlen, 4, 2, 16, device=device)
        mask = torch.randn(4, 1, seqlen, device=device, requires_grad=True)
        ends = torch.tensor([seqlen, 3], device=device)
        got, expected = step(q, k, v, mask, ends), run(q, k, v, mask, ends)
        assert_same_bits(got, expected)
        (dmask,) = torch.autograd.grad(got.sum(), mask)
        assert_same_bits(dmask, torch.autograd.grad(expected.sum(), mask)[0], "dmask")


@pytest.mark.parametrize("dynamic", [False, True])
def test_decode_into_out(device, dynamic):
    def step(q, k_cache, v_cache, used, out):
        decode(q, k_cache, v_cache, seqlens_kv=used, out=out)
        return out + 1, decode(q, k_cache, v_cache, seqlens_kv=used, batch_invariant=True)

    run = compiled(step, dynamic)
    for batch_size in (2, 3, 5):
        q, k, v = make_qkv(batch_size, 1, 40, 4, 2, 16, device=device)
        out, expected = torch.zeros_like(q), torch.zeros_like(q)
        for length in (1, 17, 40):  # lengths are data: no recompilation
            used = torch.full((batch_size,), length, device=device)
            with torch.no_grad():
                got, wanted = run(q, k, v, used, out), step(q, k, v, used, expected)
            for x, y in zip((*got, out), (*wanted, expected), strict=True):
                assert_same_bits(x, y)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_flat_linear(device, dynamic, backend):
    def step(x, weight, bias, out):
        flat_linear(x, weight, impl="gemv", out=out)
        # No arithmetic on the results: Inductor would round it once for all.
        return flat_linear(x, weight, bias), flat_linear(x, weight, batch_invariant=True)

    run = compiled(step, dynamic, backend)
    weight, bias = torch.randn(24, 40, device=device), torch.randn(24, device=device)
    weight, bias = weight.bfloat16(), bias.bfloat16()
    for rows in (1, 3, 7):
        x = torch.randn(2, rows, 40, device=device).bfloat16()
        out, expected = x.new_zeros(2, 2, rows, 24)
        with torch.no_grad():
            got, wanted = run(x, weight, bias, out), step(x, weight, bias, expected)
        for value, other in zip((*got, out), (*wanted, expected), strict=True):
            assert_same_bits(value, other)


@pytest.mark.parametrize("dynamic", [False, True])
def test_faces(device, dynamic):
    def run(q, k, v):
        x = flash_attn_func(q, k, v, causal=True, window_size=(5, 0), return_attn_probs=True)[0]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + y.transpose(1, 2)

    step = compiled(run, dynamic)
    for seqlen in (8, 13):
        q, k, v = make_qkv(2, seqlen, seqlen, 4, 2, 16, device=device)
        assert_same_bits(step(q, k, v), run(q, k, v))


def test_merge_states(device):
    def run(q, k, v):
        first = attention(q, k[:, :5], v[:, :5], return_lse=True)
        rest = attention(q, k[:, 5:], v[:, 5:], return_lse=True)
        return flashinfer_lite.merge_states(*zip(first, rest, strict=True))[0].sum()

    leaves = make_qkv(2, 4, 12, 4, 2, 16, device=device, requires_grad=True)
    got = torch.autograd.grad(compiled(run)(*leaves), leaves)
    for x, y in zip(got, torch.autograd.grad(run(*leaves), leaves), strict=True):
        assert_same_bits(x, y)


def test_autocast(device):
    def run(q, k, v):
        with torch.autocast(device.type, torch.bfloat16):
            return attention(q, k, v)

    q, k, v = make_qkv(2, 4, 12, 4, 2, 16, device=device)
    out = compiled(run)(q, k, v)
    assert out.dtype == torch.bfloat16
    assert_same_bits(out, run(q, k, v))


def test_new_lengths_do_not_recompile(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = compiled(lambda *t: attention(*t, causal=True), dynamic=True, backend=counter)
    frames = []
    for seqlen in (5, 6, 9, 31, 64, 100):
        q, k, v = make_qkv(2, seqlen, seqlen, 4, 2, 16, device=device)
        step(q, k, v)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1  # dynamo may trace the first call more than once


def test_layouts_that_inductor_must_keep(device):
    # One compile with Inductor: it may choose other strides between ops than eager does.
    linear = torch.nn.Linear(64, 3 * 64, device=device)

    def run(x, impl="auto"):
        q, k, v = linear(x).unflatten(-1, (3, 4, 16)).unbind(2)
        return (attention(q * 2, k, v, causal=True, impl=impl).flatten(2) + x).square().sum()

    x = torch.randn(2, 9, 64, device=device)
    step = compiled(run, dynamic=True, backend="inductor")
    got = torch.autograd.grad(step(x), linear.weight)[0]
    expected = torch.autograd.grad(run(x), linear.weight)[0]
    linear.double()
    oracle = torch.autograd.grad(run(x.double(), impl="reference"), linear.weight)[0]
    assert_close(got, oracle, expected, "dweight", gradient=True)
