"""q, k, v as users have them: views of something larger, in every layout, seldom centred on zero.

Random numbers come from torch's global generator, which tests/conftest.py seeds for each test.
"""

import math

import torch

# How the memory lies. Every one has the same values for the same seed, except "expand".
#   contiguous  [batch, seqlen, num_heads, head_dim]
#   fused       views of one [batch, seqlen, 3 (or 2), num_heads, head_dim] projection
#   bhsd        transposed views of [batch, num_heads, seqlen, head_dim]
#   sbhd        transposed views of [seqlen, batch, num_heads, head_dim]
#   padded      rows further apart than head_dim, by an odd number of elements
#   misaligned  contiguous, but starting one element off a 16-byte boundary
#   capacity    the first slots of a cache twice as long, NaN in the rest
#   expand      K and V are one head and one sequence, repeated with stride 0
LAYOUTS = ("contiguous", "fused", "bhsd", "sbhd", "padded", "misaligned", "capacity", "expand")


def on_device(x, device):
    """A tensor of the CPU there, with its own strides: `Tensor.to` packs what has gaps or overlaps.
    Anything else as it is."""
    if not torch.is_tensor(x) or x.device.type != "cpu":
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _laid_out(t, layout):
    """The values of a contiguous 4-D tensor in another memory layout."""
    batch_size, seqlen, num_heads, head_dim = t.shape
    if layout == "bhsd":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sbhd":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "padded":
        wide = t.new_full((batch_size, seqlen, num_heads, head_dim + 3), math.nan)
        wide[..., :head_dim] = t
        return wide[..., :head_dim]
    if layout == "misaligned":
        flat = t.new_full((t.numel() + 1,), math.nan)
        flat[1:] = t.flatten()
        return flat[1:].view(t.shape)
    if layout == "capacity":
        cache = t.new_full((batch_size, 2 * seqlen + 1, num_heads, head_dim), math.nan)
        cache[:, :seqlen] = t
        return cache[:, :seqlen]
    return t


def _fused(tensors):
    """Views of one [batch, seqlen, n, num_heads, head_dim], or of rows that hold unequal parts."""
    first = tensors[0]
    if all(t.shape == first.shape for t in tensors):
        return torch.stack(tensors, 2).unbind(2)
    width = [t.shape[2] * t.shape[3] for t in tensors]
    if any(t.shape[:2] != first.shape[:2] for t in tensors):
        return (_laid_out(first, "contiguous"), *_fused(tensors[1:]))
    rows = torch.cat([t.flatten(2) for t in tensors], -1)
    return [
        part.unflatten(-1, t.shape[2:])
        for part, t in zip(rows.split(width, -1), tensors, strict=True)
    ]


def make_qkv(
    batch_size=2,
    seqlen_q=33,
    seqlen_kv=None,
    num_heads_q=4,
    num_heads_kv=2,
    head_dim=64,
    head_dim_v=None,
    *,
    dtype=torch.float32,
    device="cpu",
    layout="contiguous",
    mean=0.5,
    logits=1.0,
    requires_grad=False,
):
    """q, k, v of [batch, seqlen, num_heads, head_dim].

    Args:
        seqlen_kv, head_dim_v: default to seqlen_q and head_dim.
        layout: one of LAYOUTS.
        mean: added to K and V: data that is not centred shows sums that lose bits.
        logits: multiplies q and so every score; 100 makes rows that only one key wins.
        requires_grad: make all three leaves that require grad (their strides are kept).

    >>> q, k, v = make_qkv(layout="fused", num_heads_kv=4)
    >>> q.stride() == v.stride(), q.is_contiguous()
    (True, False)
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    seqlen_kv = seqlen_q if seqlen_kv is None else seqlen_kv
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    shapes = [
        (batch_size, seqlen_q, num_heads_q, head_dim),
        (batch_size, seqlen_kv, num_heads_kv, head_dim),
        (batch_size, seqlen_kv, num_heads_kv, head_dim_v),
    ]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    q, k, v = (t.to(device, dtype) for t in (q * logits, k + mean, v + mean))
    if layout == "expand":
        k, v = k[:1, :, :1].expand(shapes[1]), v[:1, :, :1].expand(shapes[2])
    elif layout == "fused":
        q, k, v = _fused([q, k, v])
    else:
        q, k, v = (_laid_out(t, layout) for t in (q, k, v))
    if requires_grad:
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    return q, k, v


def make_varlen(
    lengths_q,
    lengths_kv=None,
    num_heads_q=4,
    num_heads_kv=2,
    head_dim=64,
    head_dim_v=None,
    *,
    tails=(0, 0),
    offsets_dtype=torch.int32,
    device="cpu",
    **options,
):
    """(q, k, v, offsets): a ragged batch, and the arguments that say where its sequences lie.

    Args:
        lengths_q, lengths_kv: how many queries and keys each sequence has; alike by default.
        tails: so many rows before the first sequence and behind the last hold NaN.
        options: dtype, layout, mean and logits as `make_qkv` has them.

    >>> q, k, v, offsets = make_varlen([3, 0, 2], [4, 1, 0])
    >>> q.shape[0], offsets["cu_seqlens_kv"].tolist()
    (5, [0, 4, 5, 5])
    """
    before, behind = tails
    starts = [
        torch.tensor([before, *lengths]).cumsum(0)
        for lengths in (lengths_q, lengths_q if lengths_kv is None else lengths_kv)
    ]
    totals = [int(x[-1]) + behind for x in starts]
    heads = num_heads_q, num_heads_kv, head_dim, head_dim_v
    q, k, v = (x[0] for x in make_qkv(1, *totals, *heads, device=device, **options))
    if any(tails):
        for x, cu in ((q, starts[0]), (k, starts[1]), (v, starts[1])):
            x[:before] = math.nan
            x[cu[-1] :] = math.nan
    offsets = [x.to(device, offsets_dtype) for x in starts]
    return q, k, v, dict(zip(("cu_seqlens_q", "cu_seqlens_kv"), offsets, strict=True))


def make_mask(kind, shape, *, dtype=torch.float32, device="cpu", hidden=0.3, empty_rows=True):
    """A mask of the given shape.

    Args:
        kind: "bool"; "additive" (normal numbers); "additive_inf" (also -inf at hidden places).
        shape: of the mask, 1 to 4 dimensions, the last one over keys.
        dtype: of an additive mask.
        hidden: the fraction of hidden keys.
        empty_rows: hide every key of the first row.

    >>> make_mask("bool", (3, 5)).any(-1).tolist()[0]
    False
    """
    visible = torch.rand(shape) >= hidden
    if empty_rows and len(shape) > 1 and visible.numel():
        visible.select(-2, 0).fill_(False)
    if kind == "bool":
        return visible.to(device)
    bias = torch.randn(shape, dtype=torch.float64)
    if kind == "additive_inf":
        bias = bias.masked_fill(~visible, -math.inf)
    elif kind != "additive":
        raise ValueError(f"kind: expected 'bool', 'additive' or 'additive_inf', got {kind!r}")
    return bias.to(device, dtype)
