"""Run an op, the float64 oracle and the same-dtype eager formula on one input, and compare."""

import torch

from flashinfer_lite import reference
from flashinfer_lite.testing.tolerance import (
    assert_close,
    assert_close_elementwise,
    assert_close_strict,
    assert_lse_close,
)

_ORDINARY_LOGITS = 20.0  # the elementwise rule of float32 is for scores whose rounding is small


def check_forward(op, q, k, v, *, strict=False, **arguments):
    """Compare ``op(q, k, v, **arguments, return_lse=True)`` with the oracle.

    Args:
        op: a function like `flashinfer_lite.attention`, or `attention_varlen`, whose tensors have
            no batch dimension; bind what the oracle does not know first.
        strict: hold it to the strict rule too.
        arguments: causal, window, softmax_scale, softcap, mask, alibi_slopes, sink, kv_start,
            seqlens_kv; of a ragged batch cu_seqlens_q and cu_seqlens_kv.

    Returns:
        (out, lse) of the op.
    """
    out, lse = op(q, k, v, **arguments, return_lse=True)
    oracle, oracle_lse = _detached(q, k, v, arguments, torch.float64)
    eager, _ = _detached(q, k, v, arguments, None)
    assert out.dtype == q.dtype and out.is_contiguous() and lse.is_contiguous()
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert_lse_close(lse, oracle_lse)
    # Eager may be luckier than one rounding of each float32 score; ours may not be.
    lucky = q.dtype == torch.float32 and not strict
    terms = _score_size(q, k, v, arguments) * _largest_finite(oracle) if lucky else None
    assert_close(out, oracle, eager, terms=terms)
    if strict:
        assert_close_strict(out, oracle, eager)
    elif q.dtype == torch.float32 and _largest_finite(oracle_lse) < _ORDINARY_LOGITS:
        assert_close_elementwise(out, oracle)
    return out, lse


def check_backward(op, q, k, v, *, strict=False, dout=None, with_lse=True, **arguments):
    """Compare the gradients of ``op`` in q, k, v, and in a mask and a sink that require grad, with
    the oracle's.

    On CUDA under torch.use_deterministic_algorithms both ways of adding up dQ are compared.

    Args:
        q, k, v: with or without requires_grad; their strides are what the op sees.
        dout: gradient of out, default random with a mean; any strides.
        with_lse: let a random gradient flow through lse too.

    Returns:
        the op's gradients (dq, dk, dv), then dmask and dsink where they are asked for.
    """
    mask, sink = arguments.get("mask"), arguments.get("sink")
    additive = mask is not None and mask.requires_grad
    wants_dsink = sink is not None and sink.requires_grad

    def gradients(run, dtype):
        leaves = [_leaf(t, dtype) for t in (q, k, v)]
        kwargs = dict(arguments)
        if additive:
            kwargs["mask"] = _leaf(kwargs["mask"], dtype and torch.float64)
            leaves.append(kwargs["mask"])
        if wants_dsink:
            kwargs["sink"] = _leaf(sink, dtype)
            leaves.append(kwargs["sink"])
        out, lse = run(*leaves[:3], **kwargs)
        grads = (dout.to(out.dtype), dlse.to(lse.dtype)) if with_lse else (dout.to(out.dtype),)
        return torch.autograd.grad((out, lse)[: len(grads)], leaves, grads)

    *batch, seqlen_q, num_heads_q, _ = q.shape
    if dout is None:
        dout = torch.randn(*q.shape[:-1], v.shape[-1], device=q.device) + 0.5
        dout = dout.to(q.dtype)
    dlse = torch.randn(*batch, num_heads_q, seqlen_q, device=q.device)

    def oracle_run(*tensors, **kwargs):
        return _oracle(q)(*tensors, **kwargs, return_lse=True)

    def op_run(*tensors, **kwargs):
        return op(*tensors, **kwargs, return_lse=True)

    actual = gradients(op_run, None)
    oracle = gradients(oracle_run, torch.float64)
    eager = gradients(oracle_run, None)
    slack = _score_size(q, k, v, arguments) if q.dtype == torch.float32 else 1.0
    results = [actual]
    if q.is_cuda and torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
        try:
            results.append(gradients(op_run, None))
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)
    for name, ref, e, *found in zip(("dq", "dk", "dv"), oracle, eager, *results, strict=False):
        terms = slack * _largest_finite(ref)
        for x in found:
            if strict:
                assert_close_strict(x, ref, e, name, gradient=True)
            assert_close(x, ref, e, name, gradient=True, terms=terms)
    if additive:
        # The sum over broadcast dimensions cancels: what it rounds is the size of its terms.
        full = (*batch, num_heads_q, seqlen_q, k.shape[1])
        arguments["mask"] = mask.detach().expand(full)
        terms = gradients(oracle_run, torch.float64)[3].abs().sum_to_size(_padded(mask.shape))
        terms = slack * terms.max().item() if terms.numel() else 0.0
        dtype = max(q.dtype, mask.dtype, key=lambda d: torch.finfo(d).eps)
        names = {"name": "dmask", "dtype": dtype, "terms": terms, "gradient": True}
        assert_close(actual[3], oracle[3], eager[3], **names)
    if wants_dsink:
        # A sum over all rows of a head, which cancels likewise: p_sink (dlse - dout . out).
        out, lse = _detached(q, k, v, {**arguments, "sink": sink}, torch.float64)
        share = torch.where(lse == -torch.inf, 0, torch.exp(sink.detach().double()[:, None] - lse))
        size = (dout.double() * out).abs().sum(-1).transpose(-1, -2) + dlse.double().abs()
        terms = slack * _largest_finite((share * size).sum(-1).reshape(-1, num_heads_q).sum(0))
        dtype = max(q.dtype, sink.dtype, key=lambda d: torch.finfo(d).eps)
        names = {"name": "dsink", "dtype": dtype, "terms": terms, "gradient": True}
        assert_close(actual[-1], oracle[-1], eager[-1], **names)
    return actual


def _padded(shape):
    """A mask's shape with all four dimensions."""
    return (1,) * (4 - len(shape)) + tuple(shape)


def _oracle(q):
    return reference.attention if q.dim() == 4 else reference.attention_varlen


def _detached(q, k, v, arguments, dtype):
    with torch.no_grad():
        return _oracle(q)(q, k, v, **arguments, return_lse=True, dtype=dtype)


def _score_size(q, k, v, arguments):
    """How many roundings of P one rounding of a score or of the float32 lse is worth."""
    lse = _largest_finite(_detached(q, k, v, arguments, torch.float64)[1])
    scale = arguments.get("softmax_scale")
    scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    k = k.detach().double().repeat_interleave(q.shape[-2] // max(k.shape[-2], 1), -2)
    scores = torch.einsum("...qhd,...khd->...hqk", q.detach().double(), k)
    return max(
        lse, scale * _largest_finite(scores) / min(arguments.get("softcap") or 1.0, 1.0), 1.0
    )


def _leaf(t, dtype):
    """A leaf with t's values and strides, or in float64."""
    t = t.detach()
    return (t if dtype is None else t.to(dtype)).requires_grad_()


def _largest_finite(t):
    finite = t[t.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
