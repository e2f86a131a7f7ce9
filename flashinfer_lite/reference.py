"""The oracle: what every op of this package means, in plain eager torch.

Slow, seqlen_q x seqlen_kv memory, any dtype, any device, differentiable by torch's own autograd.
The kernels are tested against it in float64; the same code run in the inputs' own dtype gives the
eager error that tolerances are made of.

    scores = softmax_scale * q k^T
    scores = softcap * tanh(scores / softcap)            if softcap
    scores = scores - alibi_slope |position - key|       if there are slopes
    scores = scores + mask                               if the mask is additive
    scores = [scores, sink]                              if there is one: a column without a value
    out    = softmax(scores over the visible keys) v
    lse    = log sum_visible exp(scores)

A hidden key is removed by selection, never by adding a large negative number, and NaN or inf in it
reaches neither the output nor a gradient. A row without any visible key has out 0, lse -inf, and
gives and receives gradients of exactly 0; with a sink its lse is the sink, and so is the gradient's
way.
"""

import math
from itertools import pairwise

import torch


def gather_pages(cache, block_table):
    """A paged cache as a dense one: [batch, pages * page_size, num_heads_kv, head_dim], a copy.

    Args:
        cache: [num_pages, page_size, num_heads_kv, head_dim].
        block_table: integers [batch, pages]. Entries that name no page give some page's content.

    >>> gather_pages(torch.arange(6.0).view(3, 2, 1, 1), torch.tensor([[2, 0]])).flatten().tolist()
    [4.0, 5.0, 0.0, 1.0]
    """
    if cache.shape[0] == 0:
        return cache.new_zeros(block_table.shape[0], 0, *cache.shape[2:])
    pages = cache[block_table.long().clamp(0, cache.shape[0] - 1)]
    return pages.flatten(1, 2)


def visible_keys(
    batch_size,
    seqlen_q,
    seqlen_kv,
    *,
    causal=False,
    window=(-1, -1),
    kv_start=None,
    seqlens_kv=None,
    device="cpu",
):
    """Which key each query may see, the mask aside: bool [batch or 1, 1, seqlen_q, seqlen_kv].

    Key j is visible to query i of sequence b iff ``kv_start[b] <= j < seqlens_kv[b]`` and, with
    ``pos = i + diagonal``, ``j >= pos - window_left`` (if window_left >= 0) and ``j <= pos``
    (causal) or ``j <= pos + window_right`` (if window_right >= 0). The diagonal is 0 for
    ``causal="top_left"``, and ``seqlens_kv[b] - seqlen_q`` otherwise.

    >>> visible_keys(1, 2, 3, causal=True)[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    if causal not in (False, True, "bottom_right", "top_left"):
        raise ValueError(
            f"causal: expected False, True, 'bottom_right' or 'top_left', got {causal!r}"
        )

    begin = _column(batch_size, kv_start, 0, device)
    end = _column(batch_size, seqlens_kv, seqlen_kv, device)
    key = torch.arange(seqlen_kv, device=device).view(1, 1, 1, -1)
    pos = _positions(batch_size, seqlen_q, seqlen_kv, causal, seqlens_kv, device)
    window_left, window_right = window
    visible = (key >= begin) & (key < end) & torch.ones_like(pos, dtype=torch.bool)
    if window_left >= 0:
        visible = visible & (key >= pos - window_left)
    if causal:
        visible = visible & (key <= pos)
    elif window_right >= 0:
        visible = visible & (key <= pos + window_right)
    return visible


def _column(batch_size, lengths, default, device):
    """[batch, 1, 1, 1], or a number for all sequences."""
    if lengths is None:
        return default
    if lengths.shape != (batch_size,):
        raise ValueError(f"lengths: expected shape [{batch_size}], got {list(lengths.shape)}")
    return lengths.to(device=device, dtype=torch.int64).view(-1, 1, 1, 1)


def _positions(batch_size, seqlen_q, seqlen_kv, causal, seqlens_kv, device):
    """Where among the keys each row stands: int64 [batch or 1, 1, seqlen_q, 1]."""
    row = torch.arange(seqlen_q, device=device).view(1, 1, -1, 1)
    end = _column(batch_size, seqlens_kv, seqlen_kv, device)
    return row if causal == "top_left" else row + (end - seqlen_q)


def attention(
    q,
    k,
    v,
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
    return_lse=False,
    dtype=None,
):
    """Softmax attention, computed the obvious way.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim].
        k: [batch, seqlen_kv, num_heads_kv, head_dim]; num_heads_kv divides num_heads_q, and query
            head h reads KV head ``h // (num_heads_q // num_heads_kv)``.
        v: [batch, seqlen_kv, num_heads_kv, head_dim_v].
        causal: False, True or "bottom_right", "top_left"; see `visible_keys`.
        window: (left, right), inclusive, -1 open.
        softmax_scale: default ``head_dim ** -0.5``.
        softcap: None, or a finite number > 0.
        mask: bool (True is visible) or additive, broadcastable from the right to [batch,
            num_heads_q, seqlen_q, seqlen_kv]. Exactly -inf hides a key.
        alibi_slopes: [num_heads_q] or [batch, num_heads_q]; the position of a row is that of
            `visible_keys`.
        sink: [num_heads_q], a score that every row of a head has and that has no value; -inf is
            none, inf leaves nothing to the keys.
        kv_start, seqlens_kv: int [batch]; the visible slots are ``kv_start <= j < seqlens_kv``.
        return_lse: also return the log-sum-exp.
        dtype: what to compute in, and the dtype of the result. Default: q's. Every intermediate is
            rounded to it, as eager code would.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim_v]; with return_lse also lse [batch,
        num_heads_q, seqlen_q], natural logarithm, float32 (float64 when computed in float64).

    Raises:
        ValueError: shapes that do not fit, or a softcap that is not finite and > 0.

    >>> q = torch.randn(1, 2, 4, 8); k = torch.randn(1, 3, 2, 8)
    >>> attention(q, k, k, causal=True, dtype=torch.float64).shape
    torch.Size([1, 2, 4, 8])
    """
    dtype = dtype or q.dtype
    batch_size, seqlen_q, num_heads_q, head_dim = q.shape
    seqlen_kv, num_heads_kv, head_dim_v = v.shape[1:]
    if k.shape != (batch_size, seqlen_kv, num_heads_kv, head_dim) or len(v) != batch_size:
        raise ValueError(f"k, v: {list(k.shape)} and {list(v.shape)} do not fit q {list(q.shape)}")
    if num_heads_kv == 0 or num_heads_q % num_heads_kv:
        raise ValueError(f"k: expected num_heads_kv to divide {num_heads_q}, got {num_heads_kv}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap}")
    softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    group_size = num_heads_q // num_heads_kv

    visible = visible_keys(
        batch_size,
        seqlen_q,
        seqlen_kv,
        causal=causal,
        window=window,
        kv_start=kv_start,
        seqlens_kv=seqlens_kv,
        device=q.device,
    )
    bias = None
    if mask is not None:
        if mask.dtype == torch.bool:
            visible = visible & mask
        else:
            bias = mask.to(dtype)
            visible = visible & (mask != -math.inf)
    visible = visible.expand(batch_size, num_heads_q, seqlen_q, seqlen_kv)
    alive = visible.any(-1, keepdim=True)  # [batch, num_heads_q, seqlen_q, 1]

    # [batch, num_heads, seqlen, dim] with the KV heads repeated; clean of what nobody sees
    q = torch.where(alive, q.to(dtype).transpose(1, 2), 0)
    k, v = (t.to(dtype).transpose(1, 2).repeat_interleave(group_size, 1) for t in (k, v))
    seen = visible.any(-2).unsqueeze(-1)
    k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)

    scores = _select_scores(q, k, visible) * softmax_scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if alibi_slopes is not None:
        if alibi_slopes.shape not in ((num_heads_q,), (batch_size, num_heads_q)):
            raise ValueError(
                f"alibi_slopes: expected shape [{num_heads_q}] or [{batch_size}, {num_heads_q}], "
                f"got {list(alibi_slopes.shape)}"
            )
        pos = _positions(batch_size, seqlen_q, seqlen_kv, causal, seqlens_kv, q.device)
        distance = (pos - torch.arange(seqlen_kv, device=q.device)).abs()
        scores = scores - alibi_slopes.to(dtype)[..., None, None] * distance.to(dtype)
    if bias is not None:
        scores = scores + torch.where(visible, bias, 0)
    if sink is not None:
        sink = sink.to(dtype).view(num_heads_q, 1, 1).expand(*alive.shape)
        alive = alive | (sink != -math.inf)
    # An empty row is made an ordinary row of zeros first: softmax of only -inf has NaN gradients.
    scores = torch.where(visible, scores, torch.where(alive, -math.inf, 0.0).to(dtype))
    if sink is not None:
        # softmax of inf is NaN; its limit is a row that the sink has to itself.
        whole = sink == math.inf
        column = torch.where(alive & ~whole, sink, 0)
        scores = torch.cat([torch.where(whole, -math.inf, scores), column], -1)
    probs = torch.where(visible, torch.softmax(scores, -1)[..., :seqlen_kv], 0)
    out = _select_sum(probs, v, visible).transpose(1, 2)
    if not return_lse:
        return out
    lse = torch.logsumexp(scores.to(torch.promote_types(dtype, torch.float32)), -1, keepdim=True)
    if sink is not None:
        lse = torch.where(whole, sink.to(lse.dtype), lse)
    return out, torch.where(alive, lse, -math.inf).squeeze(-1)


def attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_kv,
    max_seqlen_q=None,
    max_seqlen_kv=None,
    *,
    alibi_slopes=None,
    kv_start=None,
    seqlens_kv=None,
    block_table=None,
    return_lse=False,
    dtype=None,
    **arguments,
):
    """`attention` of each sequence of a ragged batch.

    Args:
        q: [total_q, num_heads_q, head_dim]; sequence b has rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1].
        k, v: [total_kv, num_heads_kv, head_dim or head_dim_v], likewise by cu_seqlens_kv.
        cu_seqlens_q, cu_seqlens_kv: int [batch + 1].
        max_seqlen_q, max_seqlen_kv: None, or at least the longest sequence.
        kv_start, seqlens_kv: int [batch], counted from the sequence's first key.
        block_table: int [batch, pages]: k and v are pages as `gather_pages` takes them, and
            sequence b has the first cu_seqlens_kv[b + 1] - cu_seqlens_kv[b] slots of row b.
        alibi_slopes: [num_heads_q] or [batch, num_heads_q].
        arguments: causal, window, softmax_scale, softcap, sink as `attention` has them.

    Returns:
        out [total_q, num_heads_q, head_dim_v]; with return_lse also lse [num_heads_q, total_q].
        Rows of no sequence have out 0 and lse -inf, with a sink too.

    Raises:
        ValueError: offsets that do not ascend within the tensors, a sequence that is longer than
            said, and what `attention` raises.

    >>> q = torch.randn(5, 4, 8); offsets = torch.tensor([0, 2, 5])
    >>> attention_varlen(q, q, q, offsets, offsets, causal=True).shape
    torch.Size([5, 4, 8])
    """
    dtype = dtype or q.dtype
    starts_q = offsets("cu_seqlens_q", cu_seqlens_q, len(q), max_seqlen_q)
    if block_table is not None:
        lengths = page_lengths(cu_seqlens_kv, k, block_table)
        k, v = (_join_pages(x, block_table, lengths) for x in (k, v))
        cu_seqlens_kv = torch.tensor([0, *lengths]).cumsum(0)
    starts_kv = offsets("cu_seqlens_kv", cu_seqlens_kv, len(k), max_seqlen_kv)

    # Of no sequence at all the results depend on the inputs too, as autograd sees it.
    nothing = sum(x[:0].sum() for x in (q, k, v)).to(dtype)

    def tail(count):
        lse_dtype = torch.promote_types(dtype, torch.float32)
        lse = q.new_full((q.shape[1], count), -math.inf, dtype=lse_dtype)
        out = q.new_zeros(count, q.shape[1], v.shape[2], dtype=dtype)
        return out + nothing, lse + nothing

    results = [tail(starts_q[0])]
    for b in range(len(starts_q) - 1):
        rows = slice(starts_q[b], starts_q[b + 1])
        keys = slice(starts_kv[b], starts_kv[b + 1])
        out, lse = attention(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            alibi_slopes=_of_sequence(alibi_slopes, b),
            kv_start=None if kv_start is None else kv_start[b : b + 1],
            seqlens_kv=None if seqlens_kv is None else seqlens_kv[b : b + 1],
            return_lse=True,
            dtype=dtype,
            **arguments,
        )
        results.append((out[0], lse[0]))
    results.append(tail(len(q) - starts_q[-1]))
    outs, lses = zip(*results, strict=True)
    out = torch.cat(outs)
    return (out, torch.cat(lses, 1)) if return_lse else out


def _of_sequence(alibi_slopes, b):
    return (
        alibi_slopes[b : b + 1]
        if alibi_slopes is not None and alibi_slopes.dim() == 2
        else alibi_slopes
    )


def offsets(name, cu_seqlens, total, longest=None):
    """The values of cu_seqlens, or ValueError: ascending in [0, total], at most `longest` apart.

    >>> offsets("cu_seqlens_q", torch.tensor([0, 2, 5]), 5)
    [0, 2, 5]
    """
    values = cu_seqlens.tolist()
    if values != sorted(values) or values[0] < 0 or values[-1] > total:
        raise ValueError(f"{name}: expected ascending values in [0, {total}], got {values}")
    for b, (begin, end) in enumerate(pairwise(values)):
        if longest is not None and end - begin > longest:
            raise ValueError(
                f"{name.replace('cu_seqlens', 'max_seqlen')}: expected at least {end - begin}, the "
                f"length of sequence {b}, got {longest}"
            )
    return values


def page_lengths(cu_seqlens_kv, cache, block_table):
    """How many keys each sequence of a ragged batch has in pages, or ValueError: at most as many as
    its row of the table has slots.

    >>> page_lengths(torch.tensor([0, 2, 5]), torch.zeros(9, 4, 1, 8), torch.tensor([[7], [3]]))
    [2, 3]
    """
    starts = offsets("cu_seqlens_kv", cu_seqlens_kv, 2**63 - 1)
    lengths = [end - begin for begin, end in pairwise(starts)]
    slots = block_table.shape[1] * cache.shape[1]
    for b, length in enumerate(lengths):
        if length > slots:
            raise ValueError(
                f"cu_seqlens_kv: expected at most {slots} keys in each sequence, as many as its "
                f"pages have slots, got {length} at batch {b}"
            )
    return lengths


def _join_pages(cache, block_table, lengths):
    """The keys of all sequences behind one another."""
    rows = gather_pages(cache, block_table)
    nothing = cache.new_zeros(0, *cache.shape[2:])
    return torch.cat([nothing, *(row[:n] for row, n in zip(rows, lengths, strict=True))])


def _select_scores(q, k, visible):
    """q k^T, where a hidden pair has no part in any gradient even if its key is NaN or inf."""
    if bool(k.isfinite().all()):
        return q @ k.transpose(-1, -2)
    pairs = torch.where(
        visible.unsqueeze(-1), k.unsqueeze(-3), 0
    )  # [..., seqlen_q, seqlen_kv, dim]
    return (q.unsqueeze(-2) * pairs).sum(-1)


def _select_sum(probs, v, visible):
    """probs v, where a hidden pair has no part even if its value is NaN or inf (0 * NaN is NaN)."""
    if bool(v.isfinite().all()):
        return probs @ v
    pairs = torch.where(visible.unsqueeze(-1), v.unsqueeze(-3), 0)
    return (probs.unsqueeze(-1) * pairs).sum(-2)


def merge_states(outs, lses):
    """Merge attention states over disjoint keys.

    lse = log sum exp(lses), out = sum exp(lses - lse) outs

    Args:
        outs: [num_states, batch, seqlen_q, num_heads_q, head_dim_v], or a list of 4-D tensors.
        lses: [num_states, batch, num_heads_q, seqlen_q], natural logarithm, or a list of 3-D
        tensors.

    Returns:
        (out, lse) without the first dimension. A state whose lse is -inf is the identity, whatever
        its out holds; a row where all are gives out 0 and lse -inf.

    >>> out, lse = merge_states([torch.ones(1, 1, 1, 8)] * 2, [torch.zeros(1, 1, 1)] * 2)
    >>> out.unique().tolist(), round(lse.item(), 4)
    ([1.0], 0.6931)
    """
    outs = torch.stack(list(outs)) if isinstance(outs, (list, tuple)) else outs
    lses = torch.stack(list(lses)) if isinstance(lses, (list, tuple)) else lses
    live = lses != -math.inf
    alive = live.any(0)
    # As in `attention`: rows of only -inf become rows of zeros, then are selected away.
    safe = torch.where(live, lses, torch.where(alive, -math.inf, 0.0).to(lses.dtype))
    lse = torch.logsumexp(safe, 0)
    weight = torch.where(live, torch.exp(safe - lse), 0).transpose(-1, -2).unsqueeze(-1)
    select = live.transpose(-1, -2).unsqueeze(-1)
    out = (weight * torch.where(select, outs, 0)).sum(0).to(outs.dtype)
    return out, torch.where(alive, lse, -math.inf)


def linear(x, weight, bias=None, *, dtype=None):
    """x weight^T + bias.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        dtype: what to compute in, and the dtype of the result. Default: float32 (float64 for
            float64), rounded once to x's dtype.

    Returns:
        [..., N].

    >>> linear(torch.ones(2, 8), torch.ones(3, 8), torch.ones(3)).unique().tolist()
    [9.0]
    """
    compute = dtype or torch.promote_types(x.dtype, torch.float32)
    out = x.to(compute) @ weight.to(compute).T
    if bias is not None:
        out = out + bias.to(compute)
    return out.to(dtype or x.dtype)
