"""What attention_varlen on the executor has beyond attention: offsets, and lengths of sequences."""

import torch

from flashinfer_lite import _check
from flashinfer_lite.varlen import attention_varlen


def as_one(*tensors):
    """Tensors of a ragged batch, with a batch dimension of 1 before the others; a view."""
    return [None if x is None else x.unsqueeze(0) for x in tensors]


def split(arguments):
    """-> (arguments that are attention's as they are, those with something for each sequence)."""
    names = "kv_start", "seqlens_kv", "alibi_slopes"
    by_sequence = {name: arguments[name] for name in names if arguments.get(name) is not None}
    return {name: x for name, x in arguments.items() if name not in names}, by_sequence


def set_ragged(call, q, cu_seqlens_q, cu_seqlens_kv, alibi_slopes=None, **lengths):
    """Completes a call that takes the tensors for those of one sequence."""
    _check.offsets(cu_seqlens_q, cu_seqlens_kv, q)
    sequences, p = len(cu_seqlens_q) - 1, call.params

    def placed(name, x):
        x = call.memory.copy_of(name, x)
        return x.data_ptr(), x.dtype == torch.int64, x.stride(0)

    cu = placed("cu_seqlens_q", cu_seqlens_q), placed("cu_seqlens_kv", cu_seqlens_kv)
    p.set_ragged(*cu, sequences)
    call.set_alibi(alibi_slopes, q, sequences)
    for name, x in lengths.items():
        _check.lengths(name, x, q, sequences)
        if x.numel():
            setter = {"kv_start": p.set_kv_start, "seqlens_kv": p.set_seqlens_kv}[name]
            setter(placed(name, x))


class Training(torch.autograd.Function):
    """attention_varlen whose backward runs on the executor, the forward natively."""

    @staticmethod
    def forward(ctx, executor, deterministic, arguments, q, k, v, cu_seqlens_q, cu_seqlens_kv):
        offsets = cu_seqlens_q, cu_seqlens_kv
        out, lse = attention_varlen(q, k, v, *offsets, **arguments, return_lse=True)
        ctx.save_for_backward(q, k, v, out, lse, *offsets)
        ctx.executor, ctx.deterministic, ctx.arguments = executor, deterministic, arguments
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        gradients = ctx.executor.attention_varlen_bwd(
            *(dout, dlse, *ctx.saved_tensors), deterministic=ctx.deterministic, **ctx.arguments
        )
        return None, None, None, *gradients, None, None
