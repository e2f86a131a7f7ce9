"""What is timed: ours and torch's SDPA, each at its best.

SDPA gets its native layout, [batch, heads, seqlen, dim], contiguous and converted before timing.
Each way that it knows to share K and V among a group's heads is an implementation of its own:

    sdpa-gqa       enable_gqa=True
    sdpa-packed    the group packed by hand into the query rows (one row per query: decode only)
    sdpa-expanded  K and V repeated for every query head beforehand (attention, attention_bwd)
    ...-each       one call for each sequence of a padded batch, instead of one with a bool mask

On a GPU each of torch's kernels is asked for by name instead, with K and V shared by enable_gqa or,
in decode, packed too: sdpa-flash, sdpa-efficient, sdpa-cudnn, sdpa-flash-packed and so on.

On both, FlexAttention compiled (flex) where `shapes.COMPILED` says so.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from shapes import COMPILED, Shape
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashinfer_lite
from flashinfer_lite import reference

MAX_COPIES_BYTES = 1 << 30
PAGE_SIZES = {"cpu": (16,), "gpu": (16, 64, 256)}
GPU_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass
class Candidate:
    """One way to compute the op.

    ``run`` is what is timed; ``outputs`` returns the results in our layout, untimed:
    (out,) or (dq, dk, dv), each [batch, seqlen, heads, head_dim]. ``explain`` is ours to say which
    kernel, tile and splits it takes.
    """

    name: str
    run: Callable
    outputs: Callable[[], tuple[torch.Tensor, ...]]
    explain: Callable | None = None


def make_inputs(
    shape: Shape, op: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """Return seeded q, k, v, dout [batch, seqlen, heads, head_dim]; dout is for the backward."""
    generator = torch.Generator(device).manual_seed(0)
    rows, keys = (shape.num_heads_q, shape.seqlen_q), (shape.num_heads_kv, shape.seqlen_kv)
    return tuple(
        torch.randn(
            shape.batch_size, seqlen, heads, shape.head_dim, generator=generator, device=device
        ).to(dtype)
        for heads, seqlen in (rows, keys, keys, rows)
    )


def _bhsd(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).contiguous()


def _bshd(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2)


def _sdpa_mask(shape: Shape, device: torch.device) -> dict:
    """Return SDPA's way to say what the shape masks: a flag, nothing, or a dense bool mask."""
    if shape.window_left >= 0 or shape.lengths:
        visible = reference.visible_keys(
            shape.batch_size if shape.lengths else 1,
            shape.seqlen_q,
            shape.seqlen_kv,
            causal=shape.causal,
            window=window_of(shape),
            seqlens_kv=torch.tensor(shape.lengths, device=device) if shape.lengths else None,
            device=device,
        )
        return {"attn_mask": visible}
    return {"is_causal": shape.causal and shape.seqlen_q > 1}


def candidates(
    shape: Shape,
    op: str,
    dtype: torch.dtype,
    copies: int = 1,
    device: torch.device | str = "cpu",
    peers: str = "cpu",
) -> dict[str, Candidate]:
    """Return every implementation of ``op`` for a shape, by name.

    Args:
        shape, op, dtype: the problem.
        copies: decode only: how many copies of K and V the calls take in turn, so that a call finds
            none of its own in a cache; see `copies_for_cold`.
        device: where the inputs lie.
        peers: "cpu" leaves the choice of its kernel to SDPA, "gpu" asks for each by name.
    """
    q, k, v, dout = make_inputs(shape, op, dtype, device)
    if op == "attention_bwd":
        rivals = {"cpu": _backward_rivals, "gpu": _backward_rivals_on_gpu}[peers]
        return {c.name: c for c in _backward(shape, q, k, v, dout, rivals)}
    ways = {
        ("attention", "cpu"): _forward,
        ("window", "cpu"): _our_forward,
        ("attention", "gpu"): _forward_on_gpu,
        ("decode", "cpu"): functools.partial(_decode, copies=copies),
        ("decode", "gpu"): functools.partial(_decode_on_gpu, copies=copies, op=op),
    }
    kind = {"overhead": "decode", "padded": "attention"}.get(op, op)
    way = ways[kind, peers]
    return {c.name: c for c in way(shape, q, k, v)}


def refused(found: dict[str, Candidate]) -> dict[str, str]:
    """Take out of ``found`` the rivals that cannot run here; return each with its reason."""
    reasons = {}
    for name in [name for name in found if not name.startswith("ours")]:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found[name].run()
        except Exception as error:  # torch, Triton and cuDNN each have errors of their own
            said = [str(w.message) for w in caught] or [str(error)]
            reasons[name] = said[0].strip().splitlines()[0][:160]
            del found[name]
    return reasons


def copies_for_cold(shape: Shape, dtype: torch.dtype, cache_bytes: int) -> int:
    """Return how many copies of K and V are four times the last-level cache: 2 at least, and no
    more than a gigabyte of them."""
    size = 2 * shape.batch_size * shape.seqlen_kv * shape.num_heads_kv * shape.head_dim
    size *= dtype.itemsize
    return max(2, min(-(-4 * cache_bytes // size), MAX_COPIES_BYTES // size))


def window_of(shape: Shape) -> tuple[int, int]:
    """Return the window of `attention`, which looks ahead only where the shape does."""
    if shape.window_left < 0:
        return -1, -1
    return shape.window_left, 0 if shape.causal else -1


def _our_forward(shape: Shape, q, k, v):
    options = {"causal": shape.causal, "window": window_of(shape)}
    if shape.lengths:
        options["seqlens_kv"] = torch.tensor(shape.lengths, device=q.device)

    def ours():
        return flashinfer_lite.attention(q, k, v, **options)

    explain = functools.partial(flashinfer_lite.explain, "attention", q, k, v, **options)
    yield Candidate("ours", ours, lambda: (ours(),), explain)


def _forward(shape: Shape, q, k, v):
    yield from _our_forward(shape, q, k, v)
    qh, kh, vh = _bhsd(q), _bhsd(k), _bhsd(v)
    gqa = shape.group_size > 1
    yield from _sdpa_forward("sdpa-gqa" if gqa else "sdpa", shape, qh, kh, vh, gqa)
    if ("attention", shape.name) in COMPILED:
        flex = _flex(shape, q.device, gqa)
        yield Candidate("flex", lambda: flex(qh, kh, vh), lambda: (_bshd(flex(qh, kh, vh)),))
    if gqa:
        ke, ve = (t.repeat_interleave(shape.group_size, 1) for t in (kh, vh))
        yield from _sdpa_forward("sdpa-expanded", shape, qh, ke, ve, False)


def _sdpa_forward(name: str, shape: Shape, q, k, v, gqa: bool):
    """SDPA on the whole batch and, where it is padded, on each sequence's own keys too."""
    mask = _sdpa_mask(shape, q.device)

    def whole():
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **mask)

    yield Candidate(name, whole, lambda: (_bshd(whole()),))
    if not shape.lengths:
        return
    parts = [
        (q[i : i + 1], k[i : i + 1, :, :keys], v[i : i + 1, :, :keys])
        for i, keys in enumerate(shape.lengths)
    ]

    def each():
        return [F.scaled_dot_product_attention(*part, enable_gqa=gqa) for part in parts]

    yield Candidate(f"{name}-each", each, lambda: (_bshd(torch.cat(each())),))


def _on(backend: SDPBackend, *tensors, **options):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*tensors, **options)


def _flex(shape: Shape, device: torch.device, gqa: bool) -> Callable:
    """Return FlexAttention, compiled for this shape at its first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if shape.causal:
        # seqlen_q equals seqlen_kv in what is compiled: both alignments are one
        def visible(b, h, row, key):
            return key <= row

        sizes = (None, None, shape.seqlen_q, shape.seqlen_kv)
        block_mask = create_block_mask(visible, *sizes, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=block_mask, enable_gqa=gqa)


def _forward_on_gpu(shape: Shape, q, k, v):
    mask = _sdpa_mask(shape, q.device)
    gqa = shape.group_size > 1
    yield from _our_forward(shape, q, k, v)
    qh, kh, vh = _bhsd(q), _bhsd(k), _bhsd(v)
    runs = {
        name: functools.partial(_on, backend, qh, kh, vh, enable_gqa=gqa, **mask)
        for name, backend in GPU_BACKENDS.items()
    }
    if ("attention", shape.name) in COMPILED:
        runs["flex"] = functools.partial(_flex(shape, q.device, gqa), qh, kh, vh)
    for name, run in runs.items():
        yield Candidate(name, run, lambda run=run: (_bshd(run()),))


def _decode_on_gpu(shape: Shape, q, k, v, copies: int, op: str):
    qh = _bhsd(q)
    gqa = shape.group_size > 1
    packed_q = qh.view(shape.batch_size, shape.num_heads_kv, shape.group_size, shape.head_dim)
    sdpa_kv, ours = _our_decode(shape, q, k, v, copies, PAGE_SIZES["gpu"])
    yield from ours

    def run_on(backend, query, gqa):
        return _on(backend, query, *next(sdpa_kv), enable_gqa=gqa)

    runs = {}
    for name, backend in GPU_BACKENDS.items():
        runs[name] = functools.partial(run_on, backend, qh, gqa)
        if gqa:
            runs[f"{name}-packed"] = functools.partial(run_on, backend, packed_q, False)
    if (op, shape.name) in COMPILED:
        flex = _flex(shape, q.device, gqa)
        runs["flex"] = lambda: flex(qh, *next(sdpa_kv))
    for name, run in runs.items():
        yield Candidate(name, run, lambda run=run: (_bshd(run().reshape(qh.shape)),))


def _decode(shape: Shape, q, k, v, copies: int):
    sdpa_kv, ours = _our_decode(shape, q, k, v, copies, PAGE_SIZES["cpu"])
    yield from ours
    qh = _bhsd(q)
    gqa = shape.group_size > 1

    def sdpa():
        return F.scaled_dot_product_attention(qh, *next(sdpa_kv), enable_gqa=gqa)

    yield Candidate("sdpa-gqa" if gqa else "sdpa", sdpa, lambda: (_bshd(sdpa()),))
    if ("decode", shape.name) in COMPILED:
        flex = _flex(shape, q.device, gqa)

        def flexed():
            return flex(qh, *next(sdpa_kv))

        yield Candidate("flex", flexed, lambda: (_bshd(flexed()),))
    if gqa:
        # [batch, heads_q, 1, dim] -> [batch, heads_kv, group, dim]: a view, and no mask is needed
        packed_q = qh.view(shape.batch_size, shape.num_heads_kv, shape.group_size, shape.head_dim)

        def packed():
            return F.scaled_dot_product_attention(packed_q, *next(sdpa_kv))

        yield Candidate("sdpa-packed", packed, lambda: (_bshd(packed().reshape(qh.shape)),))


def _our_decode(shape: Shape, q, k, v, copies: int, page_sizes: tuple[int, ...]):
    """Return SDPA's caches, to be taken in turn, and ours with its own layout, with SDPA's and in
    pages."""
    if shape.window_left >= 0:  # a window over one row is a shorter cache, for everyone
        k, v = (t[:, -shape.window_left - 1 :] for t in (k, v))
    # One turn for all that read the same memory: the next call gets the copy used longest ago.
    ours_kv = itertools.cycle([(k.clone(), v.clone()) for _ in range(copies)])
    sdpa_kv = itertools.cycle([(_bhsd(k), _bhsd(v)) for _ in range(copies)])

    def ours():
        return flashinfer_lite.decode(q, *next(ours_kv))

    def ours_bhsd():  # the layout of transformers' caches and of our hf.Cache
        k, v = next(sdpa_kv)
        return flashinfer_lite.decode(q, k.transpose(1, 2), v.transpose(1, 2))

    def explain():
        return flashinfer_lite.explain("decode", q, *next(ours_kv))

    candidates = [
        Candidate("ours", ours, lambda: (ours(),), explain),
        Candidate("ours-bhsd", ours_bhsd, lambda: (ours_bhsd(),)),
    ]
    for page_size in page_sizes:
        if k.shape[1] % page_size == 0:
            paged = _paged(q, k, v, copies, page_size)
            candidates.append(
                Candidate(f"ours-paged{page_size}", paged, lambda paged=paged: (paged(),))
            )
    return sdpa_kv, candidates


def _paged(q, k, v, copies: int, page_size: int):
    """Return ours on caches in scattered pages, to be taken in turn."""
    generator = torch.Generator().manual_seed(1)
    pages = k.shape[1] // page_size
    order = torch.randperm(len(k) * pages, generator=generator).to(k.device)
    table = order.argsort().view(len(k), pages).int()  # page order[i] of the dense cache is page i

    def scattered(x):
        return x.reshape(-1, page_size, *x.shape[2:])[order]

    kv = itertools.cycle([(scattered(k), scattered(v)) for _ in range(copies)])
    return lambda: flashinfer_lite.decode(q, *next(kv), block_table=table)


def _gradients(name, forward, leaves, grad_out, to_ours):
    """A candidate that times the gradients of `forward` in the leaves; it runs once, when first
    wanted."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = []

    def run():
        if not out:
            out.append(forward(*leaves))
        return torch.autograd.grad(out[0], leaves, grad_out, retain_graph=True)

    return Candidate(name, run, lambda: tuple(to_ours(run())))


def _backward(shape: Shape, q, k, v, dout, rivals):
    options = {"causal": shape.causal, "window": window_of(shape)}
    ours = functools.partial(flashinfer_lite.attention, **options)
    yield _gradients("ours", ours, (q, k, v), dout, lambda grads: grads)
    yield from rivals(shape, *(_bhsd(t) for t in (q, k, v, dout)))


def _backward_rivals(shape: Shape, q, k, v, dout):
    mask = _sdpa_mask(shape, q.device)
    gqa = shape.group_size > 1
    sdpa = functools.partial(F.scaled_dot_product_attention, enable_gqa=gqa, **mask)
    name = "sdpa-gqa" if gqa else "sdpa"
    yield _gradients(name, sdpa, (q, k, v), dout, lambda grads: map(_bshd, grads))
    if not gqa:
        return
    wide = [q, *(t.repeat_interleave(shape.group_size, 1) for t in (k, v))]

    def fold(grads):  # the gradient of a shared head is the sum over its group
        dq, dk, dv = grads
        folded = (t.unflatten(1, (-1, shape.group_size)).sum(2) for t in (dk, dv))
        return map(_bshd, (dq, *folded))

    expanded = functools.partial(F.scaled_dot_product_attention, **mask)
    yield _gradients("sdpa-expanded", expanded, wide, dout, fold)


def _backward_rivals_on_gpu(shape: Shape, q, k, v, dout):
    """The kernel that SDPA's forward is told to use brings its own backward."""
    options = {"enable_gqa": shape.group_size > 1, **_sdpa_mask(shape, q.device)}
    for name, backend in GPU_BACKENDS.items():
        run = functools.partial(_on, backend, **options)
        yield _gradients(name, run, (q, k, v), dout, lambda grads: map(_bshd, grads))
