"""Attention of few queries over a KV cache, and merging of attention states."""

import contextlib
import functools

import torch

from flashinfer_lite import _check, _dtensor, _ops, _plain, _sink, distributed
from flashinfer_lite.attention import prepare, run_reference

_TENSORS = (
    "q",
    "k_cache",
    "v_cache",
    "mask",
    "kv_start",
    "seqlens_kv",
    "sink",
    "phi",
    "block_table",
    "alibi_slopes",
)


def decode(
    q,
    k_cache,
    v_cache,
    *,
    seqlens_kv=None,
    kv_start=None,
    block_table=None,
    kv_splits=0,
    out=None,
    process_group=None,
    causal=False,
    window=(-1, -1),
    softmax_scale=None,
    softcap=None,
    mask=None,
    alibi_slopes=None,
    sink=None,
    dropout_p=0.0,
    softmax="auto",
    phi=None,
    deterministic=False,
    batch_invariant=False,
    impl="auto",
    return_lse=False,
):
    """Flash-Decoding: attention of the newest queries over a KV cache, for inference.

    The cache is read in place, once per KV head: the heads of a group share the read. Where batch
    and KV heads leave threads or SMs idle, the keys are split and the partial states merged. Dao,
    Haziza, Massa, Sizov, "Flash-Decoding for long-context inference" (2023).

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim], seqlen_q usually 1.
        k_cache: [batch, capacity, num_heads_kv, head_dim], any strides with the last dimension
            contiguous; slots outside [kv_start, seqlens_kv) may hold anything, NaN included. With
            block_table in pages: [num_pages, page_size, num_heads_kv, head_dim].
        v_cache: [batch, capacity, num_heads_kv, head_dim_v], or in pages likewise.
        seqlens_kv, kv_start: int32 or int64 [batch]: the slots in use are
            kv_start <= j < seqlens_kv. Default: the whole cache. CUDA clamps values out of range.
        block_table: int32 or int64 [batch, pages]: slot j of a sequence is slot j % page_size of
            page block_table[batch, j // page_size]. Any page_size >= 1, any page as often as you
            like; capacity is pages * page_size. Entries of pages that no query sees may hold
            anything. CUDA clamps pages out of range, on the CPU they are an error.
        kv_splits: 0 chooses; 1 or more forces that many.
        out: written in place and returned; [batch, seqlen_q, num_heads_q, head_dim_v] of q's dtype.
        batch_invariant: split by the sequence's own length alone, so that a row's bits depend
            neither on the batch nor on the number of threads or SMs. Excludes kv_splits.
        process_group: a torch.distributed.ProcessGroup whose ranks hold the cache in parts, cut
            along the sequence: `Sequence parallel`, below.
        causal, window, softmax_scale, softcap, mask, alibi_slopes, sink, softmax, phi, impl,
            return_lse, and the rest: as in `attention`. causal matters when seqlen_q > 1. With
            softmax="unified" partial states are merged by plain sums, and the guard is asked once
            per row, after all splits. A sink, too, is counted once, after them.

    Returns:
        out, or (out, lse) with return_lse; shapes, dtypes and empty rows as in `attention`.

    Raises:
        RuntimeError: if an input requires grad while grad mode is on; for lengths and pages out of
            range, on CUDA only if the environment variable FLASHINFER_LITE_CHECK is 1; and as in
            `attention`.
        TypeError, ValueError, NotImplementedError: as in `attention`.

    On CUDA the limits are those of `attention`, and DTensors are taken as there.

    Sequence parallel: with process_group every rank of the group makes the same call, with the same
    q, phi, sink and alibi_slopes, and with its own part of the keys: k_cache, v_cache, block_table,
    kv_start, seqlens_kv, kv_splits and the columns of mask. The sequence is the slots 0 <= j <
    seqlens_kv of rank 0, then those of rank 1, and so on; kv_start hides slots and moves none. So
    causal, window and alibi_slopes count positions in the whole sequence, as if the parts were
    concatenated. Where they do not matter (one query, no window, no slopes) the parts may hold the
    keys in any order. Slopes become a float32 mask [batch, num_heads_q, seqlen_q, capacity] on each
    rank. A part may be empty. Each rank returns the whole result, with the same bits as every
    other.

    Partial results are rounded to q's dtype once before they are merged. softmax="unified" merges
    them by one all-reduce and then reads, which waits for the device, whether a row was not safe
    and is to be merged by (out, lse); it raises while a CUDA graph is captured. With
    batch_invariant=True or impl="reference" every row is merged by (out, lse). On the CPU ranks
    first compare their calls, and all raise if one differs or refuses its arguments; on CUDA only
    under FLASHINFER_LITE_CHECK=1, which also compares the values of q, phi, sink and alibi_slopes:
    without it a rank that differs is a wait until the group's timeout, or a wrong result.
    docs/distributed.md has more.

    Example:
        >>> q = torch.randn(2, 1, 8, 64); cache = torch.randn(2, 512, 2, 64)
        >>> used = torch.tensor([512, 100])
        >>> flashinfer_lite.decode(q, cache, cache, seqlens_kv=used).shape
        torch.Size([2, 1, 8, 64])
    """
    if (
        mask is alibi_slopes is sink is phi is None
        and out is process_group is None
        and (block_table is None or type(block_table) is torch.Tensor)
        and softmax == "auto"
        and impl == "auto"
        and dropout_p == 0
        and type(kv_splits) is int
        and type(batch_invariant) is bool
        and not (batch_invariant and kv_splits)
    ):
        scores, split = (causal, window, softmax_scale, softcap), (kv_splits, batch_invariant)
        given = q, k_cache, v_cache, *scores, kv_start, seqlens_kv
        plain = _plain.call(_ops.decode, *given, *split, None, None, block_table)
        if plain is not None:
            return plain if return_lse else plain[0]
    group, refusals = process_group, contextlib.nullcontext()
    if group is not None:
        distributed.check_group(group, q)
        refusals = distributed.refusals_told(group, q)
    with refusals:
        q, k_cache, v_cache = _check.under_autocast(q, k_cache, v_cache)
        arguments = prepare(
            q,
            k_cache,
            v_cache,
            causal,
            window,
            softmax_scale,
            softcap,
            mask,
            kv_start,
            seqlens_kv,
            ("q", "k_cache", "v_cache"),
            block_table,
        )
        phi_of_op = _check.unified(softmax, phi, q)
        _check.sink(sink, q)
        _check.alibi_slopes(alibi_slopes, q, q.shape[0])
        _check.not_landed(dropout_p)
        floating = mask, sink, alibi_slopes
        check_decode(q, k_cache, v_cache, *floating, kv_splits, batch_invariant, out)
        as_reference = _check.impl(impl, q)
        others = sink, phi, block_table, alibi_slopes
        tensors = dict(zip(_TENSORS, (*arguments[:6], *others), strict=True))
        on_mesh = _on_mesh(out, group, *tensors.values())
        if group is not None:
            distributed.check_call(arguments, block_table, phi_of_op)
    rest = kv_splits, batch_invariant, *phi_of_op, block_table
    run = functools.partial(_run, rest, as_reference)
    if on_mesh:
        op = functools.partial(
            decode,
            causal=causal,
            window=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
            softmax=softmax,
            kv_splits=kv_splits,
            batch_invariant=batch_invariant,
            impl=impl,
        )
        result, lse = _dtensor.call(op, **tensors)
    elif group is not None:
        how = phi_of_op, batch_invariant, as_reference
        shared = alibi_slopes, sink
        result, lse = distributed.decode(group, run, arguments, block_table, *shared, *how)
    else:
        result, lse = run(arguments, alibi_slopes, sink, return_lse, out)
    if out is not None and result is not out:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def _run(rest, as_reference, arguments, alibi_slopes, sink, wants_lse=True, out=None):
    """(out, lse), written to `out` where that is no detour."""
    if as_reference:
        return run_reference(arguments, sink, rest[-1], alibi_slopes)
    if out is not None and sink is None:
        q = arguments[0]
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_ops.accumulator_dtype(q.dtype))
        _ops.decode_out(*arguments, *rest[:2], out, lse, *rest[2:], alibi_slopes)
        return out, lse
    result = _ops.decode(*arguments, *rest, alibi_slopes)
    return result if sink is None else _sink.fold(*result, sink, wants_lse)


def _on_mesh(out, group, *tensors):
    """Whether the tensors are DTensors."""
    on_mesh = _dtensor.given(*tensors)
    if out is not None and _dtensor.given(out) != on_mesh:
        kinds = ["a torch.Tensor", "a DTensor"]
        raise TypeError(f"out: expected {kinds[on_mesh]}, as q is one, got {kinds[not on_mesh]}")
    if on_mesh and group is not None:
        raise ValueError(
            "process_group: expected None with DTensors, got one; see DTensor.to_local"
        )
    return on_mesh


def check_decode(q, k_cache, v_cache, mask, sink, alibi_slopes, kv_splits, batch_invariant, out):
    """Check what decode takes beyond attention's arguments."""
    if isinstance(kv_splits, bool) or not isinstance(kv_splits, int):
        raise TypeError(f"kv_splits: expected an integer, got {kv_splits!r}")
    if not 0 <= kv_splits <= 4096:
        raise ValueError(f"kv_splits: expected 0 (automatic) to 4096, got {kv_splits}")
    if batch_invariant and kv_splits:
        raise ValueError(f"kv_splits: expected 0 with batch_invariant, got {kv_splits}")
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "mask": mask, "sink": sink}
    _check.no_grad("decode", **tensors)
    tensors["alibi_slopes"] = alibi_slopes
    _check.no_forward_ad("decode", "; reference.attention has", **tensors)
    if out is not None:
        _check_out(out, q, v_cache)


def _check_out(out, q, v_cache):
    _check.tensor("out", out)
    wanted = [*q.shape[:3], v_cache.shape[3]]
    if list(out.shape) != wanted:
        raise ValueError(f"out: expected shape {wanted}, got {list(out.shape)}")
    if out.dtype != q.dtype:
        raise TypeError(f"out: expected q's dtype {q.dtype}, got {out.dtype}")
    if out.device != q.device:
        raise ValueError(f"out: expected q's device {q.device}, got {out.device}")
    if out.stride(3) != 1:
        raise ValueError(
            f"out: expected the last dimension contiguous (stride 1), got stride {out.stride(3)}"
        )


def merge_states(outs, lses):
    """Merge attention states of the same queries over disjoint sets of keys.

        lse = log sum_s exp(lse_s),  out = sum_s exp(lse_s - lse) out_s

    Differentiable in outs and lses. An empty state (lse -inf) is the identity whatever its out
    holds; merging only empty states gives out 0 and lse -inf.

    Args:
        outs: [num_states, batch, seqlen_q, num_heads_q, head_dim_v], or a sequence of such states
            without the first dimension; float64 (CPU only), float32, bfloat16 or float16.
        lses: [num_states, batch, num_heads_q, seqlen_q] or a sequence likewise; natural log,
            float32 (float64 with float64 outs).

    Returns:
        (out, lse) of one state.

    Raises:
        TypeError, ValueError: naming the argument, what is expected and what came.

    Example:
        >>> first = flashinfer_lite.attention(q, k[:, :100], v[:, :100], return_lse=True)
        >>> rest = flashinfer_lite.attention(q, k[:, 100:], v[:, 100:], return_lse=True)
        >>> out, lse = flashinfer_lite.merge_states(*zip(first, rest))
    """
    outs = _stacked("outs", outs, 5)
    lses = _stacked("lses", lses, 4)
    if outs.dtype not in _check.ELEMENT_DTYPES:
        raise TypeError(
            f"outs: expected dtype float64, float32, bfloat16 or float16, got {outs.dtype}"
        )
    wanted_dtype = _ops.accumulator_dtype(outs.dtype)
    if lses.dtype != wanted_dtype:
        raise TypeError(f"lses: expected dtype {wanted_dtype}, got {lses.dtype}")
    if lses.device != outs.device:
        raise ValueError(f"lses: expected outs' device {outs.device}, got {lses.device}")
    num_states, batch_size, seqlen_q, num_heads_q, _ = outs.shape
    wanted = [num_states, batch_size, num_heads_q, seqlen_q]
    if list(lses.shape) != wanted:
        raise ValueError(f"lses: expected shape {wanted} to fit outs, got {list(lses.shape)}")
    if outs.stride(-1) != 1 and outs.shape[-1] > 1:
        raise ValueError(
            f"outs: expected the last dimension contiguous (stride 1), got stride {outs.stride(-1)}"
        )
    _check.native("outs", outs, "; flashinfer_lite.reference.merge_states runs there")
    _check.no_forward_ad("merge_states", "; reference.merge_states has", outs=outs, lses=lses)
    return _ops.merge_states(outs, lses)


def _stacked(name, states, dims):
    if isinstance(states, (tuple, list)):
        for state in states:
            _check.tensor(name, state)
        if not states or any(s.shape != states[0].shape for s in states):
            raise ValueError(
                f"{name}: expected one or more tensors of one shape, got "
                f"{[list(s.shape) for s in states]}"
            )
        states = torch.stack(states)
    _check.tensor(name, states)
    if states.dim() != dims:
        raise ValueError(
            f"{name}: expected {dims} dimensions with num_states first, got {list(states.shape)}"
        )
    return states
