"""The functions of flash-attn 2.x: the same names, arguments, layouts and meanings.

    from flashinfer_lite.flash_attn import flash_attn_func

Differences, all of them on purpose: a query row that sees no key has an lse of -inf (flash-attn:
+inf) and the third result of ``return_attn_probs`` is always None, for there is no dropout mask to
return. float32 works too, on the CPU also float64, and head_dim_v may differ from head_dim. ALiBi
under causal is the formula, where flash-attn adds slope * j: out is the same, but each row's lse is
not, by slope times the row's position. Slopes that require grad are refused, not ignored.

An argument is applied or refused: dropout, which has not landed, raises NotImplementedError with
its name.
"""

import torch

from flashinfer_lite import _check
from flashinfer_lite.append import append_kv, rotate
from flashinfer_lite.attention import attention
from flashinfer_lite.decode import decode
from flashinfer_lite.varlen import attention_varlen


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """softmax(softmax_scale * q k^T) v, row by row over the visible keys.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim].
        k: [batch, seqlen_kv, num_heads_kv, head_dim]; num_heads_kv divides num_heads_q.
        v: [batch, seqlen_kv, num_heads_kv, head_dim_v].
        dropout_p: must be 0.0 until dropout lands.
        softmax_scale: default head_dim ** -0.5.
        causal: bottom-right aligned: query i sees keys j <= i + seqlen_kv - seqlen_q.
        window_size: (left, right): query i sees keys from i + seqlen_kv - seqlen_q - left to
            i + seqlen_kv - seqlen_q + right, inclusive. -1 or None is open; None alone is (-1, -1).
        softcap: scores become softcap * tanh(scores / softcap); 0.0 is off.
        alibi_slopes: float32 [num_heads_q] or [batch, num_heads_q]: adds -slope |i + seqlen_kv -
            seqlen_q - j| to the score of query i and key j, after the softcap. It may not require
            grad.
        deterministic: the backward pass repeats bit for bit.
        return_attn_probs: also return the log-sum-exp, and None.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim_v]; with return_attn_probs (out, lse, None) with
        lse float32 (float64 for float64) [batch, num_heads_q, seqlen_q], natural logarithm. Both
        are differentiable.

    Raises:
        TypeError, ValueError: as `flashinfer_lite.attention`. NotImplementedError: see above.

    >>> q = torch.randn(1, 5, 4, 64); kv = torch.randn(1, 9, 2, 64)
    >>> flash_attn_func(q, kv, kv, causal=True, window_size=(4, 0)).shape
    torch.Size([1, 5, 4, 64])
    """
    out, lse = attention(
        q,
        k,
        v,
        causal=bool(causal),
        window=_window(window_size),
        softmax_scale=softmax_scale,
        softcap=None if softcap == 0.0 else softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_lse=True,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` with kv [batch, seqlen_kv, 2, num_heads_kv, head_dim], read in place.

    >>> q = torch.randn(1, 5, 4, 64); kv = torch.randn(1, 9, 2, 1, 64)
    >>> flash_attn_kvpacked_func(q, kv).shape
    torch.Size([1, 5, 4, 64])
    """
    k, v = _unpack("kv", kv, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` with qkv [batch, seqlen, 3, num_heads, head_dim], read in place.

    >>> flash_attn_qkvpacked_func(torch.randn(1, 5, 3, 4, 64), causal=True).shape
    torch.Size([1, 5, 4, 64])
    """
    q, k, v = _unpack("qkv", qkv, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """`flash_attn_func` of each sequence of a ragged batch: sequences behind one another.

    Args:
        q: [total_q, num_heads_q, head_dim].
        k: [total_k, num_heads_kv, head_dim]; num_heads_kv divides num_heads_q.
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [batch + 1], where the sequences begin and the
            last one ends, in q and in k and v.
        max_seqlen_q, max_seqlen_k: at least the longest sequence; None asks nothing.
        block_table: int32 or int64 [batch, pages], for inference: k and v are pages [num_pages,
            page_size, num_heads_kv, head_dim], any page_size. Sequence b has the first
            cu_seqlens_k[b + 1] - cu_seqlens_k[b] slots of the pages in row b.
        The rest: as `flash_attn_func`.

    Returns:
        out [total_q, num_heads_q, head_dim_v]; with return_attn_probs (out, lse, None) with lse
        float32 (float64 for float64) [num_heads_q, total_q], natural logarithm. Rows behind the
        last sequence have out 0 and lse -inf.

    >>> q = torch.randn(7, 4, 64); kv = torch.randn(9, 2, 64)
    >>> cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 5, 7]), torch.tensor([0, 5, 9])
    >>> flash_attn_varlen_func(q, kv, kv, cu_seqlens_q, cu_seqlens_k, 5, 5, causal=True).shape
    torch.Size([7, 4, 64])
    """
    out, lse = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=bool(causal),
        window=_window(window_size),
        softmax_scale=softmax_scale,
        softcap=None if softcap == 0.0 else softcap,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_lse=True,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` with kv [total_k, 2, num_heads_kv, head_dim], read in place.

    >>> q = torch.randn(7, 4, 64); kv = torch.randn(9, 2, 1, 64)
    >>> cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 5, 7]), torch.tensor([0, 5, 9])
    >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, 5, 5).shape
    torch.Size([7, 4, 64])
    """
    k, v = _unpack("kv", kv, 2, "total")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` with qkv [total, 3, num_heads, head_dim], read in place.

    >>> cu_seqlens = torch.tensor([0, 5, 7])
    >>> flash_attn_varlen_qkvpacked_func(torch.randn(7, 3, 4, 64), cu_seqlens, 5).shape
    torch.Size([7, 4, 64])
    """
    q, k, v = _unpack("qkv", qkv, 3, "total")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Write new keys and values into a cache, if given, and attend to what it then holds.

    Inference only, in place, in order: `append_kv`, then `decode`.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim].
        k_cache: [batch_cache, capacity, num_heads_kv, head_dim]; with block_table
            [num_pages, page_size, num_heads_kv, head_dim], any page_size.
        v_cache: the same with head_dim_v.
        k, v: [batch, seqlen_new, num_heads_kv, head_dim or head_dim_v]: both or none. They go to
            slots cache_seqlens and on, which needs cache_seqlens.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2], only with k: keys are rotated by the
            angles of their slots, queries by those of slots cache_seqlens + i with causal or a
            window, all by that of cache_seqlens without.
        cache_seqlens: slots in use before the call: an int, or int32 or int64 [batch]. Default:
            all.
        cache_batch_idx: integers [batch]: which sequences of the cache are meant; not with
            block_table. Sequences that get new keys must differ.
        cache_leftpad: integers [batch]: the first slot in use.
        block_table: int32 or int64 [batch, pages], as in `flashinfer_lite.decode`.
        softmax_scale, causal, window_size, softcap: as in `flash_attn_func`.
        rotary_interleaved: pairs are 2i and 2i + 1; else i and i + rotary_dim / 2.
        alibi_slopes: float32 [num_heads_q] or [batch, num_heads_q], as in `flash_attn_func`, with
            positions counted as for causal.
        num_splits: of the keys; 0 chooses.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim_v], or (out, lse) with lse float32 (float64 for
        float64) [batch, num_heads_q, seqlen_q].

    Raises:
        As `flashinfer_lite.append_kv` and `flashinfer_lite.decode`.

    >>> q = torch.randn(2, 1, 4, 32); k = v = torch.randn(2, 1, 1, 32)
    >>> k_cache, v_cache = torch.zeros(2, 2, 64, 1, 32)
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=9).shape
    torch.Size([2, 1, 4, 32])
    """
    _check.tensor("q", q)
    _check.alibi_slopes(alibi_slopes, q, q.shape[0])  # before anything is written
    if (k is None) != (v is None):
        raise ValueError("v: expected k and v together, got only one of them")
    if k is None and rotary_cos is not None:
        raise ValueError("rotary_cos: expected None without k, got one")
    used = _cache_seqlens(cache_seqlens, q)
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx: expected None with block_table, got one")
        # A cache of whole sequences is one of pages as long as they are.
        _check.lengths("cache_batch_idx", cache_batch_idx, q, q.shape[0])
        block_table = cache_batch_idx.unsqueeze(1)
    window = _window(window_size)
    if k is not None:
        if used is None:
            raise ValueError("cache_seqlens: expected lengths with k, got None")
        append_kv(
            k_cache,
            v_cache,
            k,
            v,
            seqlens_kv=used,
            block_table=block_table,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
        )
        if rotary_cos is not None:
            row = torch.arange(q.shape[1], device=q.device) * (causal or window != (-1, -1))
            positions = used.long().unsqueeze(1) + row
            # Lengths that leave no room are refused or, on CUDA, bounded, as they are for keys.
            positions = positions.clamp(0, max(rotary_cos.shape[0] - 1, 0))
            q = rotate(q, rotary_cos, rotary_sin, positions, rotary_interleaved)
        used = used + k.shape[1]
    return decode(
        q,
        k_cache,
        v_cache,
        seqlens_kv=used,
        kv_start=cache_leftpad,
        block_table=block_table,
        kv_splits=num_splits,
        causal=bool(causal),
        window=window,
        softmax_scale=softmax_scale,
        softcap=None if softcap == 0.0 else softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_softmax_lse,
    )


def _cache_seqlens(cache_seqlens, q):
    """The lengths as a tensor [batch], or None."""
    if cache_seqlens is None or torch.is_tensor(cache_seqlens):
        _check.lengths("cache_seqlens", cache_seqlens, q, q.shape[0])
        return cache_seqlens
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (int, torch.SymInt)):
        raise TypeError(
            f"cache_seqlens: expected an int or a torch.Tensor, got {type(cache_seqlens).__name__}"
        )
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int64, device=q.device)


def _window(window_size):
    """(left, right) with -1 for None."""
    if window_size is None:
        return (-1, -1)
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size: expected (left, right), -1 for open, got {window_size!r}")
    return tuple(-1 if side is None else side for side in window_size)


def _unpack(name, packed, count, rows="batch, seqlen"):
    if not torch.is_tensor(packed):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(packed).__name__}")
    dims = 3 + len(rows.split(", "))
    if packed.dim() != dims or packed.shape[-3] != count:
        raise ValueError(
            f"{name}: expected shape [{rows}, {count}, num_heads, head_dim], "
            f"got {list(packed.shape)}"
        )
    return packed.unbind(-3)
