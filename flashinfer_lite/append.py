"""Writing new keys and values into a KV cache."""

import torch

from flashinfer_lite import _check, _ops


def append_kv(
    k_cache,
    v_cache,
    k,
    v,
    *,
    seqlens_kv,
    block_table=None,
    rotary_cos=None,
    rotary_sin=None,
    rotary_interleaved=False,
):
    """Write new keys and values behind the last of each sequence of a cache, in place.

    Token t of sequence b goes to slot ``seqlens_kv[b] + t``; seqlens_kv itself stays as it is. With
    rotary_cos and rotary_sin the keys are rotated by the angles of their slots on the way (Su et
    al., "RoFormer", arXiv 2104.09864). For inference; in order with what runs on the same stream.

    Args:
        k_cache: [batch, capacity, num_heads_kv, head_dim], any strides with the last dimension
            contiguous; with block_table [num_pages, page_size, num_heads_kv, head_dim].
        v_cache: the same with head_dim_v.
        k: [batch, seqlen_new, num_heads_kv, head_dim] of the caches' dtype: float64 (CPU only),
            float32, bfloat16 or float16.
        v: [batch, seqlen_new, num_heads_kv, head_dim_v].
        seqlens_kv: int32 or int64 [batch]: slots in use before the call.
        block_table: int32 or int64 [batch, pages], as in `decode`.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2], float32 (float64 with float64 keys) or
            of the keys' dtype, row i for slot i; both or none. rotary_dim, at most head_dim, is how
            many of a key's first elements are rotated.
        rotary_interleaved: element 2i is paired with 2i + 1, as in GPT-J; else i with
            i + rotary_dim / 2, as in GPT-NeoX and Llama.

    Raises:
        RuntimeError: if an input requires grad while grad mode is on; if a token has no slot, its
            slot no page, or no row of rotary_cos. On CUDA, where reading lengths would wait, only
            if the environment variable FLASHINFER_LITE_CHECK is 1; else such a token is not
            written.
        TypeError, ValueError: naming the argument, what is expected and what came.

    Example:
        >>> cache = torch.zeros(2, 512, 4, 64); k = torch.randn(2, 1, 4, 64)
        >>> used = torch.tensor([100, 7])
        >>> flashinfer_lite.append_kv(cache, cache.clone(), k, k, seqlens_kv=used)
        >>> torch.equal(cache[1, 7], k[1, 0])
        True
    """
    tensors = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    _check_tensors(k_cache, v_cache, k, v, paged=block_table is not None)
    if seqlens_kv is None:
        raise TypeError("seqlens_kv: expected a torch.Tensor, got NoneType")
    _check.lengths("seqlens_kv", seqlens_kv, k, k.shape[0], "k's")
    _check.block_table(block_table, k, k_cache, k.shape[0], "k's")
    _check_rotary(rotary_cos, rotary_sin, k)
    if not isinstance(rotary_interleaved, bool):
        raise TypeError(f"rotary_interleaved: expected a bool, got {rotary_interleaved!r}")
    _check.no_grad("append_kv", **tensors)
    _check.no_forward_ad("append_kv", "", **tensors)
    _check.native("k", k)
    _ops.append_kv(
        *tensors.values(), seqlens_kv, block_table, rotary_cos, rotary_sin, rotary_interleaved
    )


def _check_tensors(k_cache, v_cache, k, v, paged):
    _check.tensor("k", k)
    for name, x in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check.tensor(name, x)
        if x.dtype != k.dtype:
            raise TypeError(f"{name}: expected k's dtype {k.dtype}, got {x.dtype}")
        if x.device != k.device:
            raise ValueError(f"{name}: expected k's device {k.device}, got {x.device}")
    if k.dtype not in _check.ELEMENT_DTYPES:
        raise TypeError(f"k: expected dtype float64, float32, bfloat16 or float16, got {k.dtype}")
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [batch, seqlen, num_heads, head_dim], "
                f"got shape {list(x.shape)}"
            )
        if x.stride(3) != 1 and x.shape[3] > 1 and x.numel():
            raise ValueError(
                f"{name}: expected the last dimension contiguous (stride 1), got stride "
                f"{x.stride(3)}"
            )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: expected shape {[*k.shape[:3], 'head_dim_v']} like k, got {list(v.shape)}"
        )
    outer = k_cache.shape[0] if paged else k.shape[0]
    slots = k_cache.shape[1]
    for name, x, new in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        wanted = [outer, slots, *new.shape[2:]]
        if list(x.shape) != wanted:
            raise ValueError(f"{name}: expected shape {wanted}, got {list(x.shape)}")
        for dim in range(4):
            if x.shape[dim] > 1 and x.stride(dim) == 0:
                raise ValueError(
                    f"{name}: expected its own memory for every element, got stride 0 in "
                    f"dimension {dim}"
                )


def _check_rotary(cos, sin, k):
    if cos is None and sin is None:
        return
    accumulator = _ops.accumulator_dtype(k.dtype)
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check.tensor(name, x)
        if x.dtype not in (accumulator, k.dtype):
            raise TypeError(f"{name}: expected dtype {accumulator} or k's {k.dtype}, got {x.dtype}")
        if x.dtype != cos.dtype:
            raise TypeError(f"{name}: expected rotary_cos's dtype {cos.dtype}, got {x.dtype}")
        if x.device != k.device:
            raise ValueError(f"{name}: expected k's device {k.device}, got {x.device}")
        if x.dim() != 2 or not 2 <= 2 * x.shape[1] <= k.shape[3]:
            raise ValueError(
                f"{name}: expected shape [positions, 1 to head_dim / 2 = {k.shape[3] // 2}], "
                f"got {list(x.shape)}"
            )
        if x.shape != cos.shape:
            raise ValueError(
                f"{name}: expected rotary_cos's shape {list(cos.shape)}, got {list(x.shape)}"
            )
        if x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(
                f"{name}: expected the last dimension contiguous (stride 1), got stride "
                f"{x.stride(1)}"
            )


def rotate(x, cos, sin, positions, interleaved):
    """x [batch, seqlen, num_heads, head_dim] with its first elements rotated as `append_kv` rotates
    keys, a copy: by rows `positions` [batch, seqlen] of cos and sin."""
    accumulator = _ops.accumulator_dtype(x.dtype)
    dim = 2 * cos.shape[1]
    cos, sin = (t[positions].unsqueeze(2).to(accumulator) for t in (cos, sin))
    head = x[..., :dim].to(accumulator)
    first, second = head.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else head.chunk(2, -1)
    turned = first * cos - second * sin, first * sin + second * cos
    head = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((head.to(x.dtype), x[..., dim:]), -1)
