"""torch.nn.functional.scaled_dot_product_attention over our kernels, and a switch to swap it in."""

import contextlib
import math
import threading

import torch

from flashinfer_lite import _check
from flashinfer_lite.attention import attention


def scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """softmax(scale * query key^T + attn_mask) value, as torch defines it; K and V are not copied.

    Args:
        query: [..., num_heads_q, seqlen_q, head_dim]; 2 dimensions are one head of one sequence, 3
            are the heads of one sequence. More than 4 must be viewable as 4 (K, V and the mask).
        key: [..., num_heads_kv, seqlen_kv, head_dim].
        value: [..., num_heads_kv, seqlen_kv, head_dim_v].
        attn_mask: bool (True is visible) or additive, broadcastable to [..., num_heads_q, seqlen_q,
            seqlen_kv]. It may have any floating dtype and may require grad.
        dropout_p: must be 0.0 until dropout lands.
        is_causal: aligned top-left, as torch does: query i sees keys j <= i. Not with attn_mask.
        scale: default head_dim ** -0.5.
        enable_gqa: num_heads_kv may be any divisor of num_heads_q. Without it they are equal, or K
            and V have one head that all of query's share.

    Returns:
        [..., num_heads_q, seqlen_q, head_dim_v], a transposed view. A row that sees no key is 0.

    Raises:
        TypeError, ValueError: the argument, what is expected, what came. Unlike torch also for a
            last dimension that is not contiguous: K and V would have to be copied.

    >>> q, k = torch.randn(2, 8, 5, 64), torch.randn(2, 2, 9, 64)
    >>> scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).shape
    torch.Size([2, 8, 5, 64])
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check.tensor(name, x)
        if x.is_nested or x.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got a nested or sparse one")
        if x.dim() < 2 or x.dim() != query.dim():
            wanted = "at least 2" if name == "query" else f"query's {query.dim()}"
            raise ValueError(f"{name}: expected {wanted} dimensions, got shape {list(x.shape)}")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: expected None together with is_causal=True, got a mask")

    leading = _leading(query, key, value, enable_gqa)
    batch_size = math.prod(leading)
    q, k, v = (
        _as_4d(name, x, leading, batch_size).transpose(1, 2)
        for name, x in (("query", query), ("key", key), ("value", value))
    )
    _check.qkv(*_check.under_autocast(q, k, v), names=("query", "key", "value"))
    mask = attn_mask
    if mask is not None:
        full = (*leading, q.shape[2], q.shape[1], k.shape[1])[-query.dim() :]
        mask = _mask_as_4d(attn_mask, leading, full, batch_size)
    out = attention(
        q,
        k,
        v,
        causal="top_left" if is_causal else False,
        softmax_scale=scale,
        mask=mask,
        dropout_p=dropout_p,
    ).transpose(1, 2)
    if query.dim() == 4:
        return out
    return out.view(*query.shape[:-1], value.shape[-1])


def _leading(query, key, value, enable_gqa):
    """The dimensions before [num_heads, seqlen, head_dim]; fails if the three do not fit."""
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value: expected key's seqlen {key.shape[-2]}, got {value.shape[-2]}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: expected query's head_dim {query.shape[-1]}, got {key.shape[-1]}")
    if query.dim() == 2:
        return torch.Size()
    num_heads_q, num_heads_kv = query.shape[-3], key.shape[-3]
    if value.shape[-3] != num_heads_kv:
        raise ValueError(f"value: expected key's {num_heads_kv} heads, got {value.shape[-3]}")
    if enable_gqa:
        fits = num_heads_kv and num_heads_q % num_heads_kv == 0
        wanted = f"a divisor of query's {num_heads_q} heads"
    else:
        fits = num_heads_kv in (num_heads_q, 1)
        wanted = f"query's {num_heads_q} heads (other divisors need enable_gqa=True)"
    if not fits and num_heads_q != num_heads_kv:
        raise ValueError(f"key: expected {wanted}, got {num_heads_kv}")
    leading = query.shape[:-3]
    for name, x in (("key", key), ("value", value)):
        for size, want in zip(x.shape[:-3], leading, strict=True):
            if size not in (want, 1):
                raise ValueError(
                    f"{name}: expected leading dimensions that broadcast to query's "
                    f"{list(leading)}, got {list(x.shape[:-3])}"
                )
    return leading


def _as_4d(name, x, leading, batch_size):
    """A view [batch, num_heads, seqlen, dim]; broadcast dimensions keep stride 0."""
    if x.dim() <= 4:
        x = x[(None,) * (4 - x.dim())]
        return x if x.shape[0] == batch_size else x.expand(batch_size, -1, -1, -1)
    x = x.expand(*leading, *x.shape[-3:])
    if name == "query":
        return x.reshape(batch_size, *x.shape[-3:])
    return _view(name, x, batch_size)


def _mask_as_4d(mask, leading, full, batch_size):
    _check.tensor("attn_mask", mask)
    if mask.dtype != torch.bool and mask.dtype not in _check.ELEMENT_DTYPES:
        raise TypeError(f"attn_mask: expected dtype bool or floating point, got {mask.dtype}")
    if not 1 <= mask.dim() <= len(full) or any(
        size not in (1, want)
        for size, want in zip(mask.shape, full[len(full) - mask.dim() :], strict=True)
    ):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to {list(full)}, got {list(mask.shape)}"
        )
    if mask.dim() < 4 or len(leading) == 1:
        return mask
    return _spread(mask, leading, batch_size)


def _spread(mask, leading, batch_size):
    """A mask over more than one leading dimension, as a view with one."""
    if all(size == 1 for size in mask.shape[:-3]):
        return mask[(0,) * (mask.dim() - 3)]
    return _view("attn_mask", mask.expand(*leading, *mask.shape[-3:]), batch_size)


def _view(name, x, batch_size):
    try:
        return x.view(batch_size, *x.shape[-3:])
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected leading dimensions that can be viewed as one without a copy, got "
            f"shape {list(x.shape)} with strides {list(x.stride())}"
        ) from error


_swap_lock = threading.Lock()


@contextlib.contextmanager
def swapped():
    """Make ``torch.nn.functional.scaled_dot_product_attention`` ours within this block.

    For the whole process, and for every caller that looks the name up when it calls (torch's own
    modules and transformers' "sdpa" do; ``from torch.nn.functional import ...`` made before does
    not). On leaving, also by an exception, the very function that was there before is back. Blocks
    nest.

    >>> q = torch.randn(1, 2, 5, 64)
    >>> with swapped():
    ...     torch.nn.functional.scaled_dot_product_attention(q, q, q).shape
    torch.Size([1, 2, 5, 64])
    """
    functional = torch.nn.functional
    with _swap_lock:
        previous = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = scaled_dot_product_attention
    try:
        yield
    finally:
        with _swap_lock:
            functional.scaled_dot_product_attention = previous
