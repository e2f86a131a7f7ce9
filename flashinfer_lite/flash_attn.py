"""The functions of flash-attn 2.x: the same names, arguments, layouts and meanings.

    from flashinfer_lite.flash_attn import flash_attn_func

Differences, all of them on purpose: a query row that sees no key has an lse of -inf (flash-attn:
+inf) and the third result of ``return_attn_probs`` is always None, for there is no dropout mask to
return. float32 works too, on the CPU also float64, and head_dim_v may differ from head_dim.

An argument is applied or refused: what has not landed (dropout, ALiBi, variable lengths, paged
caches, and for now gradients on CUDA) raises NotImplementedError with its name.
"""

import torch

from flashinfer_lite.attention import attention


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
        alibi_slopes: must be None until ALiBi lands.
        deterministic: the backward pass repeats bit for bit.
        return_attn_probs: also return the log-sum-exp, and None.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim_v]; with return_attn_probs (out, lse, None) with
        lse float32 (float64 for float64) [batch, num_heads_q, seqlen_q], natural logarithm. On the
        CPU both are differentiable; CUDA tensors that require grad are refused.

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
    """Not implemented yet: sequences of different lengths in one [total, num_heads, head_dim]."""
    raise NotImplementedError("flash_attn_varlen_func: not implemented yet")


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
    """Not implemented yet, see `flash_attn_varlen_func`."""
    raise NotImplementedError("flash_attn_varlen_kvpacked_func: not implemented yet")


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
    """Not implemented yet, see `flash_attn_varlen_func`."""
    raise NotImplementedError("flash_attn_varlen_qkvpacked_func: not implemented yet")


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
    """Not implemented yet: append to a cache and attend. `flashinfer_lite.decode` reads a cache."""
    raise NotImplementedError("flash_attn_with_kvcache: not implemented yet; see decode()")


def _window(window_size):
    """(left, right) with -1 for None."""
    if window_size is None:
        return (-1, -1)
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size: expected (left, right), -1 for open, got {window_size!r}")
    return tuple(-1 if side is None else side for side in window_size)


def _unpack(name, packed, count):
    if not torch.is_tensor(packed):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(packed).__name__}")
    if packed.dim() != 5 or packed.shape[2] != count:
        raise ValueError(
            f"{name}: expected shape [batch, seqlen, {count}, num_heads, head_dim], "
            f"got {list(packed.shape)}"
        )
    return packed.unbind(2)
