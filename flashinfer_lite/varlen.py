"""Attention over ragged batches: sequences of different lengths behind one another, no padding."""

from itertools import pairwise

import torch

from flashinfer_lite import _check, _ops, _plain, _sink, reference


def attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_kv,
    max_seqlen_q=None,
    max_seqlen_kv=None,
    *,
    causal=False,
    window=(-1, -1),
    softmax_scale=None,
    softcap=None,
    mask=None,
    alibi_slopes=None,
    sink=None,
    kv_start=None,
    seqlens_kv=None,
    block_table=None,
    dropout_p=0.0,
    softmax="auto",
    phi=None,
    deterministic=False,
    batch_invariant=False,
    impl="auto",
    return_lse=False,
):
    """`attention` of each sequence of a ragged batch, bit for bit.

    Differentiable in q, k, v, a sink, and through lse. Sequence b has the queries from
    cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the keys from cu_seqlens_kv[b] to
    cu_seqlens_kv[b + 1]; either may be none.

    Args:
        q: [total_q, num_heads_q, head_dim], dtypes as `attention`.
        k: [total_kv, num_heads_kv, head_dim], num_heads_q a multiple of num_heads_kv.
        v: [total_kv, num_heads_kv, head_dim_v]. The last dimension is contiguous, every other
            stride is free: views of a fused projection [total, 3, num_heads, head_dim] are read
            where they lie.
        cu_seqlens_q, cu_seqlens_kv: int32 or int64 [batch + 1], ascending within [0, total_q] and
            [0, total_kv]; of cu_seqlens_kv only the differences count with pages.
        max_seqlen_q, max_seqlen_kv: None, or an integer no sequence is longer than. Nothing but the
            check depends on them.
        kv_start, seqlens_kv: int32 or int64 [batch], counted from the sequence's first key: its
            visible keys are kv_start <= j < seqlens_kv (flash-attn's seqused_k), and bottom-right
            alignment counts from seqlens_kv.
        block_table: int32 or int64 [batch, pages], for inference. k and v are then pages
            [num_pages, page_size, num_heads_kv, head_dim or head_dim_v], and the keys of sequence b
            are the first cu_seqlens_kv[b + 1] - cu_seqlens_kv[b] slots of the pages in row b.
            Entries behind the last key's page may hold anything. On CUDA the pages of the table are
            copied first, batch * pages of them; for a few queries a sequence `decode` reads them in
            place.
        mask: must be None, because the sequences have no common shape. Pad the batch and use
            `attention` for one.
        alibi_slopes: float32 [num_heads_q] or [batch, num_heads_q], as `attention`; a sequence's
            positions are its own.
        dropout_p: not implemented yet, refused.
        causal, window, softmax_scale, softcap, sink, softmax, phi, deterministic, batch_invariant,
            impl, return_lse: as `attention`, for each sequence.

    Returns:
        out [total_q, num_heads_q, head_dim_v], or (out, lse) with lse [num_heads_q, total_q],
        natural log, float32 (float64 for float64). A row that sees no key: out 0, lse -inf,
        gradients 0; with a sink: out 0, lse the sink. A row of no sequence, before cu_seqlens_q[0]
        or from cu_seqlens_q[-1] on: out 0, lse -inf, gradients 0, with a sink too; what q, k and v
        hold there is not read.

    Raises:
        TypeError, ValueError: naming the argument, what is expected and what came.
        RuntimeError: for values only the kernel reads (cu_seqlens_q, cu_seqlens_kv, kv_start,
            seqlens_kv, block_table), for a longest sequence beyond max_seqlen_q or max_seqlen_kv,
            for block_table with inputs that require grad, and for alibi_slopes that do.
        NotImplementedError: for arguments that have not landed, and for tensors that carry a
            tangent of forward-mode AD, which impl="reference" has.

    Example:
        >>> q = torch.randn(7, 4, 64); k = v = torch.randn(12, 2, 64)
        >>> offsets = torch.tensor([0, 5, 5, 7]), torch.tensor([0, 5, 9, 12])
        >>> flashinfer_lite.attention_varlen(q, k, v, *offsets, causal=True).shape
        torch.Size([7, 4, 64])
    """
    offsets, longest = (cu_seqlens_q, cu_seqlens_kv), (max_seqlen_q, max_seqlen_kv)
    if (
        mask is alibi_slopes is sink is phi is None
        and softmax == "auto"
        and impl == "auto"
        and dropout_p == 0
        and type(cu_seqlens_q) is type(cu_seqlens_kv) is torch.Tensor
        and all(x is None or type(x) is int for x in longest)
        and (block_table is None or type(block_table) is torch.Tensor)
    ):
        scores = causal, window, softmax_scale, softcap
        plain = _plain.call(
            *(_unrecorded, q, k, v, *scores, kv_start, seqlens_kv, *longest),
            *(None, None, block_table),
            behind_v=offsets,
        )
        if plain is not None:
            return plain if return_lse else plain[0]
    q, k, v = _check.under_autocast(q, k, v)
    scores = causal, window, softmax_scale, softcap
    scores = check_varlen(
        q, k, v, *offsets, *longest, *scores, mask, kv_start, seqlens_kv, block_table
    )
    phi = _check.unified(softmax, phi, q)
    _check.sink(sink, q)
    _check.alibi_slopes(alibi_slopes, q, cu_seqlens_q.shape[0] - 1)
    _check.not_landed(dropout_p)
    if block_table is not None:
        _check.no_grad("attention_varlen with block_table", q=q, k=k, v=v, sink=sink)
    if _check.impl(impl, q):
        out, lse = reference.attention_varlen(
            *(q, k, v, *offsets, *longest),
            causal=causal,
            window=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sink=sink,
            kv_start=kv_start,
            seqlens_kv=seqlens_kv,
            block_table=block_table,
            return_lse=True,
        )
    else:
        tensors = {"q": q, "k": k, "v": v, "sink": sink, "alibi_slopes": alibi_slopes}
        _check.no_forward_ad("attention_varlen", "; impl='reference' has", **tensors)
        if block_table is not None and q.is_cuda:
            pages = cu_seqlens_kv, seqlens_kv, block_table
            if _check.wants_values(q):
                _check_values(q, k, cu_seqlens_q, kv_start, scores, longest, *pages)
            k, v, cu_seqlens_kv, seqlens_kv = _join_pages(k, v, *pages)
            offsets, longest, block_table = (cu_seqlens_q, cu_seqlens_kv), (None, None), None
        out, lse = _ops.attention_varlen_fwd(
            *(q, k, v, *offsets, kv_start, seqlens_kv, *scores, *longest, *phi, block_table),
            *(alibi_slopes, bool(deterministic)),
        )
        if sink is not None:
            out, lse = _fold_sink(out, lse, sink, cu_seqlens_q, return_lse)
    return (out, lse) if return_lse else out


def _unrecorded(*arguments):
    """As in attention: past autograd's detour by Python."""
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.attention_varlen_fwd(*arguments)


def _join_pages(k, v, cu_seqlens_kv, seqlens_kv, block_table):
    """k, v, cu_seqlens_kv and seqlens_kv of a ragged batch that is not in pages: a copy in which
    each sequence has all slots of its pages, without a word of the device to the host."""
    slots = block_table.shape[1] * k.shape[1]
    k, v = (reference.gather_pages(x, block_table).flatten(0, 1) for x in (k, v))
    lengths = cu_seqlens_kv.diff().clamp(0, slots)
    if seqlens_kv is not None:
        lengths = torch.minimum(lengths, seqlens_kv)
    starts = torch.full_like(cu_seqlens_kv, slots, dtype=torch.int64).cumsum(0) - slots
    return k, v, starts, lengths


def _check_values(
    q, k, cu_seqlens_q, kv_start, scores, longest, cu_seqlens_kv, seqlens_kv, block_table
):
    """RuntimeError as on the CPU for wrong offsets, lengths and pages, by a call of one small head
    there."""
    q, k = (torch.zeros(8).expand(*x.shape[:-2], 1, 8) for x in (q, k))
    offsets_and_lengths = (
        None if x is None else x.cpu() for x in (cu_seqlens_q, cu_seqlens_kv, kv_start, seqlens_kv)
    )
    _ops.attention_varlen_fwd(
        *(q, k, k, *offsets_and_lengths, *scores, *longest, None, None, block_table.cpu()),
        *(None, False),
    )


def check_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_kv,
    max_seqlen_q,
    max_seqlen_kv,
    causal,
    window,
    softmax_scale,
    softcap,
    mask,
    kv_start,
    seqlens_kv,
    block_table,
):
    """Check the common arguments; returns those that make scores as the op takes them."""
    _check.qkv(q, k, v, ragged=True, paged=block_table is not None)
    _check.offsets(cu_seqlens_q, cu_seqlens_kv, q)
    _check.max_seqlen("max_seqlen_q", max_seqlen_q)
    _check.max_seqlen("max_seqlen_kv", max_seqlen_kv)
    scores = _check.scores(q, causal, window, softmax_scale, softcap)
    if mask is not None:
        raise ValueError(
            "mask: expected None, got one: the sequences of a ragged batch have no common shape; "
            "pad the batch and use attention, or use causal, window, kv_start and seqlens_kv"
        )
    batch_size = cu_seqlens_q.shape[0] - 1
    _check.block_table(block_table, q, k, batch_size)
    _check.lengths("kv_start", kv_start, q, batch_size)
    _check.lengths("seqlens_kv", seqlens_kv, q, batch_size)
    return scores


def longest_sequence(q, k, v, cu_seqlens_q, cu_seqlens_kv, block_table):
    """q, k and v of the sequence with the most pairs of query and key, with a batch dimension."""
    starts = reference.offsets("cu_seqlens_q", cu_seqlens_q, len(q))
    if block_table is not None:
        # Lengths are what counts: any memory does for keys that nobody reads.
        lengths = reference.page_lengths(cu_seqlens_kv, k, block_table)
        k, v = (x.as_strided((sum(lengths), *x.shape[2:]), (0, *x.stride()[2:])) for x in (k, v))
        cu_seqlens_kv = torch.tensor([0, *lengths]).cumsum(0)
    starts_kv = reference.offsets("cu_seqlens_kv", cu_seqlens_kv, len(k))
    sequences = [
        (slice(*rows), slice(*keys))
        for rows, keys in zip(pairwise(starts), pairwise(starts_kv), strict=True)
    ] or [(slice(0, 0), slice(0, 0))]
    rows, keys = max(sequences, key=lambda s: (s[0].stop - s[0].start) * (s[1].stop - s[1].start))
    return q[None, rows], k[None, keys], v[None, keys]


def _fold_sink(out, lse, sink, cu_seqlens_q, wants_lse):
    """`_sink.fold` for the rows that belong to a sequence."""
    row = torch.arange(out.shape[0], device=out.device)
    rows = (row >= cu_seqlens_q[0]) & (row < cu_seqlens_q[-1])
    out, lse = _sink.fold(out.unsqueeze(0), lse.unsqueeze(0), sink, wants_lse, rows)
    return out.squeeze(0), None if lse is None else lse.squeeze(0)
