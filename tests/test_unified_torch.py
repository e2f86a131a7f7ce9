"""softmax="unified" in torch: gradients, compilation, threads, batches, out=."""

import functools
import math
import threading

import pytest
import torch
import torch._dynamo
from unified_oracle import counted

from flashinfer_lite import attention, decode, reference
from flashinfer_lite.testing import (
    assert_close,
    assert_same_bits,
    check_backward,
    guarded,
    make_mask,
    make_qkv,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
OPS = {
    "attention": attention,
    "decode_split": functools.partial(decode, kv_splits=7),
    "decode_invariant": functools.partial(decode, batch_invariant=True),
}
INT = torch.int32


@pytest.mark.cpu_only("the number of threads is the CPU's")
@all_dtypes
@pytest.mark.parametrize("phi", [0.0, 1.5, 50.0])
def test_threads_and_repeats_do_not_change_a_bit(device, threads, dtype, phi):
    for seqlen_q, seqlen_kv in ((1, 3000), (3, 700), (60, 200)):
        q, k, v = make_qkv(2, seqlen_q, seqlen_kv, 4, 2, 64, dtype=dtype, logits=6.0)
        for op in OPS.values():
            results = []
            for count in (1, 2, 2):
                threads(count)
                results.append(
                    counted(lambda: op(q, k, v, phi=phi, return_lse=True))  # noqa: B023
                )
            for (out, lse), *counts in results[1:]:
                assert_same_bits(out, results[0][0][0])
                assert_same_bits(lse, results[0][0][1], "lse")
                assert tuple(counts) == results[0][1:]


@all_dtypes
def test_batch_mates_do_not_change_a_bit(device, isa, dtype):
    q, k, v = make_qkv(3, 2, 2500, 4, 2, 64, dtype=dtype, device=device, logits=4.0)
    q[1] *= 100  # whose rows are recomputed
    ends = torch.tensor([2500, 2500, 1300], dtype=INT, device=device)
    for name in ("attention", "decode_invariant"):
        run = functools.partial(OPS[name], phi=4.0, return_lse=True)
        out, lse = run(q, k, v, seqlens_kv=ends)
        for b in range(3):
            one = slice(b, b + 1)
            alone = run(q[one], k[one], v[one], seqlens_kv=ends[one])
            assert_same_bits(alone[0], out[one])
            assert_same_bits(alone[1], lse[one], "lse")


@all_dtypes
def test_out_is_written_and_nothing_else(device, isa, dtype):
    q, k, v = make_qkv(2, 3, 300, 4, 2, 64, dtype=dtype, device=device, logits=8.0)
    for kv_splits in (1, 5):
        for phi in (0.0, 12.0, 60.0):
            expected = decode(q, k, v, phi=phi, kv_splits=kv_splits)
            band = guarded((2, 3, 4, 64), dtype, device)
            assert decode(q, k, v, phi=phi, kv_splits=kv_splits, out=band.tensor) is band.tensor
            assert_same_bits(band.tensor, expected)
            band.assert_intact("out")
            wide = torch.full((2, 4, 3, 72), math.nan, dtype=dtype, device=device)
            view = wide[..., :64].transpose(1, 2)
            with torch.inference_mode():
                decode(q, k, v, phi=phi, kv_splits=kv_splits, out=view)
            assert_same_bits(view, expected)
            assert wide[..., 64:].isnan().all()


@pytest.mark.cpu_only("CUDA counts in the order of its streams")
def test_counters_are_exact_under_threads(device, threads):
    threads(1)
    q, k, v = make_qkv(2, 3, 100, 4, 2, 32)
    phi = torch.tensor([-5.0, 60.0, -6.0, -7.0])

    def work():
        for _ in range(100):
            attention(q, k, v, phi=phi)
            decode(q, k, v, phi=phi, kv_splits=2)

    def both():
        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    _, checked, recomputed = counted(both)
    assert (checked, recomputed) == (2 * 200 * 24, 2 * 200 * 6)


GRADIENTS = {
    "plain": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 9.0},
    "window": {"window": (9, 2)},
}


@all_dtypes
@pytest.mark.parametrize("feature", GRADIENTS)
def test_backward(device, isa, dtype, feature):
    arguments = GRADIENTS[feature]
    q, k, v = make_qkv(2, 21, 33, 4, 2, 32, dtype=dtype, device=device, logits=3.0)
    phi = torch.tensor([0.0, 4.0, 60.0, math.nan], device=device)
    run = functools.partial(attention, phi=phi)
    mask = make_mask("additive_inf", (2, 1, 21, 33), device=device).requires_grad_()
    check_backward(run, q, k, v, mask=mask, **arguments)
    unified = check_backward(run, q, k, v, dout=torch.ones_like(q), with_lse=False, **arguments)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    online = torch.autograd.grad(attention(*leaves, **arguments).sum(), leaves)
    oracle = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = torch.autograd.grad(reference.attention(*oracle, **arguments).sum(), oracle)
    for name, x, y, z in zip(("dq", "dk", "dv"), unified, online, exact, strict=True):
        assert_close(x, z, y, name, gradient=True, terms=1.0)


def test_gradcheck(device):
    q, k, v = make_qkv(1, 3, 5, 2, 1, 8, dtype=torch.float64, requires_grad=True)
    mask = make_mask("additive_inf", (3, 5), dtype=torch.float64).requires_grad_()
    for phi in (1.0, torch.tensor([2.0, 80.0])):
        run = functools.partial(attention, phi=phi, causal=True, return_lse=True)
        assert torch.autograd.gradcheck(lambda *t: run(*t[:3], mask=t[3])[0], (q, k, v, mask))  # noqa: B023
        assert torch.autograd.gradcheck(lambda *t: run(*t)[1][..., 1:], (q, k, v))  # noqa: B023


def test_phi_has_no_gradient(device):
    q, k, v = make_qkv(1, 3, 5, 2, 1, 8, device=device, requires_grad=True)
    phi = torch.zeros(2, device=device, requires_grad=True)
    attention(q, k, v, phi=phi).sum().backward()
    assert phi.grad is None and q.grad.isfinite().all()
    with torch.no_grad():
        assert_same_bits(decode(q, k, v, phi=phi), decode(q, k, v, phi=0.0))


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("op", ["attention_fwd", "decode", "decode.out"])
def test_opcheck(device, op, heads):
    q, k, v = make_qkv(2, 3, 9, 4, 2, 16, device=device)
    arguments = [q, k, v, None, None, None, 0.25, 0.0, 1, -1, -1]
    if op != "attention_fwd":
        arguments += [2, False]
    if op == "decode.out":
        arguments += [torch.empty_like(q), q.new_empty(2, 4, 3)]
    phi = (None, torch.tensor([0.0, 1.0, 60.0, 2.0], device=device)) if heads else (1.5, None)
    name, _, overload = op.partition(".")
    packet = getattr(torch.ops.flashinfer_lite, name)
    torch.library.opcheck(getattr(packet, overload or "default"), (*arguments, *phi))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    def train(q, k, v, phi):
        out, lse = attention(q, k, v, causal=True, phi=phi, return_lse=True)
        return out.square().sum() + lse.sum()

    def serve(q, k, v, phi):
        return decode(q, k, v, phi=phi), decode(q, k, v, phi=2.0, kv_splits=2)

    torch._dynamo.reset()
    compiled = [
        torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for f in (train, serve)
    ]
    for seqlen in (5, 9):
        for phi in (torch.tensor([0.0, 60.0, 1.0, 2.0], device=device), 3.0):
            leaves = make_qkv(2, seqlen, seqlen, 4, 2, 16, device=device, requires_grad=True)
            got = torch.autograd.grad(compiled[0](*leaves, phi), leaves)
            for x, y in zip(got, torch.autograd.grad(train(*leaves, phi), leaves), strict=True):
                assert_same_bits(x, y)
            with torch.no_grad():
                for x, y in zip(compiled[1](*leaves, phi), serve(*leaves, phi), strict=True):
                    assert_same_bits(x, y)
    torch._dynamo.reset()


def test_numbers_may_be_symbolic(device):
    def run(q, scale, softcap, phi):
        return attention(q, q, q, softmax_scale=scale, softcap=softcap, phi=phi)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    q, _, _ = make_qkv(1, 5, 5, 2, 2, 16, device=device)
    for numbers in ((0.3, 2.0, 1.0), (0.4, 3.0, -2.0)):
        assert_same_bits(compiled(q, *numbers), run(q, *numbers))
    torch._dynamo.reset()


def test_autocast(device):
    q, k, v = make_qkv(2, 4, 12, 4, 2, 16, device=device)
    phi = torch.zeros(4, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        for op in (attention, decode):
            got = op(q, k, v, phi=phi)
            assert got.dtype == torch.bfloat16
            with torch.autocast(device.type, enabled=False):
                assert_same_bits(got, op(*(t.bfloat16() for t in (q, k, v)), phi=0.0))
