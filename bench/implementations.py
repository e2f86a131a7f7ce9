"""What is timed: ours and torch's SDPA, each at its best, and the check that they agree.

SDPA gets its native layout, [batch, heads, seqlen, dim], contiguous and converted before timing.
Each way that it knows to share K and V among a group's heads is an implementation of its own:

    sdpa-gqa       enable_gqa=True
    sdpa-packed    the group packed by hand into the query rows (one row per query: decode only)
    sdpa-expanded  K and V repeated for every query head beforehand (attention, attention_bwd)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from shapes import Shape

import flashinfer_lite
from flashinfer_lite import reference
from flashinfer_lite.testing import assert_close

CHECKED_ROWS = 64
CHECKED_PARTS = 16
PLAUSIBLE = 6.0
MAX_COPIES_BYTES = 1 << 30


@dataclass
class Candidate:
    """One way to compute the op.

    ``run`` is what is timed; ``outputs`` returns the results in our layout, untimed:
    (out,) or (dq, dk, dv), each [batch, seqlen, heads, head_dim].
    """

    name: str
    run: Callable
    outputs: Callable[[], tuple[torch.Tensor, ...]]


def make_inputs(shape: Shape, op: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return seeded q, k, v, dout [batch, seqlen, heads, head_dim]; dout is for the backward."""
    generator = torch.Generator().manual_seed(0)
    rows, keys = (shape.num_heads_q, shape.seqlen_q), (shape.num_heads_kv, shape.seqlen_kv)
    return tuple(
        torch.randn(shape.batch_size, seqlen, heads, shape.head_dim, generator=generator).to(dtype)
        for heads, seqlen in (rows, keys, keys, rows)
    )


def _bhsd(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).contiguous()


def _bshd(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2)


def _sdpa_mask(shape: Shape) -> dict:
    """Return SDPA's way to say what the shape masks: a flag, nothing, or a dense bool mask."""
    if shape.window_left >= 0:
        window = (shape.window_left, 0 if shape.causal else -1)
        visible = reference.visible_keys(
            1, shape.seqlen_q, shape.seqlen_kv, causal=shape.causal, window=window
        )
        return {"attn_mask": visible}
    return {"is_causal": shape.causal and shape.seqlen_q > 1}


def candidates(shape: Shape, op: str, dtype: torch.dtype, copies: int = 1) -> dict[str, Candidate]:
    """Return every implementation of ``op`` for a shape, by name.

    Args:
        shape, op, dtype: the problem.
        copies: decode only: how many copies of K and V the calls take in turn, so that a call finds
            none of its own in a cache; see `copies_for_cold`.
    """
    q, k, v, dout = make_inputs(shape, op, dtype)
    if op == "attention_bwd":
        return {c.name: c for c in _backward(shape, q, k, v, dout)}
    if op == "attention":
        return {c.name: c for c in _forward(shape, q, k, v)}
    return {c.name: c for c in _decode(shape, q, k, v, copies)}


def copies_for_cold(shape: Shape, dtype: torch.dtype, cache_bytes: int) -> int:
    """Return how many copies of K and V are four times the last-level cache: 2 at least, and no
    more than a gigabyte of them."""
    size = 2 * shape.batch_size * shape.seqlen_kv * shape.num_heads_kv * shape.head_dim
    size *= dtype.itemsize
    return max(2, min(-(-4 * cache_bytes // size), MAX_COPIES_BYTES // size))


def _window(shape: Shape) -> tuple[int, int]:
    return (shape.window_left, 0) if shape.window_left >= 0 else (-1, -1)


def _forward(shape: Shape, q, k, v):
    mask = _sdpa_mask(shape)
    options = {"causal": shape.causal, "window": _window(shape)}

    def ours():
        return flashinfer_lite.attention(q, k, v, **options)

    yield Candidate("ours", ours, lambda: (ours(),))
    qh, kh, vh = _bhsd(q), _bhsd(k), _bhsd(v)
    gqa = shape.group_size > 1

    def sdpa():
        return F.scaled_dot_product_attention(qh, kh, vh, enable_gqa=gqa, **mask)

    yield Candidate("sdpa-gqa" if gqa else "sdpa", sdpa, lambda: (_bshd(sdpa()),))
    if gqa:
        ke, ve = (t.repeat_interleave(shape.group_size, 1) for t in (kh, vh))

        def expanded():
            return F.scaled_dot_product_attention(qh, ke, ve, **mask)

        yield Candidate("sdpa-expanded", expanded, lambda: (_bshd(expanded()),))


def _decode(shape: Shape, q, k, v, copies: int):
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

    yield Candidate("ours", ours, lambda: (ours(),))
    yield Candidate("ours-bhsd", ours_bhsd, lambda: (ours_bhsd(),))
    qh = _bhsd(q)
    gqa = shape.group_size > 1

    def sdpa():
        return F.scaled_dot_product_attention(qh, *next(sdpa_kv), enable_gqa=gqa)

    yield Candidate("sdpa-gqa" if gqa else "sdpa", sdpa, lambda: (_bshd(sdpa()),))
    if gqa:
        # [batch, heads_q, 1, dim] -> [batch, heads_kv, group, dim]: a view, and no mask is needed
        packed_q = qh.view(shape.batch_size, shape.num_heads_kv, shape.group_size, shape.head_dim)

        def packed():
            return F.scaled_dot_product_attention(packed_q, *next(sdpa_kv))

        yield Candidate("sdpa-packed", packed, lambda: (_bshd(packed().reshape(qh.shape)),))


def _backward(shape: Shape, q, k, v, dout):
    mask = _sdpa_mask(shape)
    options = {"causal": shape.causal, "window": _window(shape)}

    def candidate(name, forward, leaves, grad_out, to_ours):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = forward(*leaves)

        def run():
            return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

        return Candidate(name, run, lambda: tuple(to_ours(run())))

    yield candidate(
        "ours",
        lambda q, k, v: flashinfer_lite.attention(q, k, v, **options),
        (q, k, v),
        dout,
        lambda grads: grads,
    )
    heads_first = [_bhsd(t) for t in (q, k, v)]
    grad_out = _bhsd(dout)
    gqa = shape.group_size > 1
    yield candidate(
        "sdpa-gqa" if gqa else "sdpa",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **mask),
        heads_first,
        grad_out,
        lambda grads: map(_bshd, grads),
    )
    if gqa:
        qh, kh, vh = heads_first
        wide = [qh, *(t.repeat_interleave(shape.group_size, 1) for t in (kh, vh))]

        def fold(grads):  # the gradient of a shared head is the sum over its group
            dq, dk, dv = grads
            folded = (t.unflatten(1, (-1, shape.group_size)).sum(2) for t in (dk, dv))
            return map(_bshd, (dq, *folded))

        yield candidate(
            "sdpa-expanded",
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **mask),
            wide,
            grad_out,
            fold,
        )


def check(shape: Shape, op: str, dtype: torch.dtype, found: dict[str, Candidate]) -> None:
    """Hold every candidate to the project's tolerance against the fp64 oracle; raise if one fails.

    The oracle costs a full score matrix, so it is asked about parts whose answer is independent of
    the rest: the first and the last KV group with its query heads, of the first and the last
    sequence (every one while they are few); in attention the first and the last rows, in the
    backward all of them.

    Raises:
        AssertionError: naming the shape, the implementation and the worst element.
    """
    inputs = make_inputs(shape, op, dtype)
    results = {name: candidate.outputs() for name, candidate in found.items()}
    compare = _backward_pieces if op == "attention_bwd" else _forward_pieces
    # label -> "oracle", "eager" or a candidate -> flat pieces, compared as one: the tolerance is a
    # multiple of eager's largest error, which needs a good number of elements to mean something.
    pieces: dict[str, dict[str, list[torch.Tensor]]] = {}
    parts = [(b, g) for b in range(shape.batch_size) for g in range(shape.num_heads_kv)]
    if len(parts) > CHECKED_PARTS:
        batches, groups = {0, shape.batch_size - 1}, {0, shape.num_heads_kv - 1}
        parts = [(b, g) for b, g in parts if b in batches and g in groups]
    for sequence, group in parts:
        for label, answers in compare(_Part(shape, sequence, group), inputs, results):
            for name, tensor in answers.items():
                pieces.setdefault(label, {}).setdefault(name, []).append(tensor.flatten())
    for label, answers in pieces.items():
        whole = {name: torch.cat(tensors) for name, tensors in answers.items()}
        yardstick = _yardstick(whole)
        for name in found:
            where = f"{op} {shape.name} {name} {label}"
            assert_close(whole[name], whole["oracle"], yardstick, where)


def _yardstick(whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the tolerance calls eager: eager itself, or an SDPA result that errs more.

    In fp32 torch's own SDPA backward misses twice eager's error on some shapes, by rounding alone;
    holding it, or ours, to more than the other can do would refuse numbers for nothing. An SDPA
    further off than PLAUSIBLE times eager is no yardstick but wrong.
    """

    def error(name):
        return float((whole[name].double() - whole["oracle"]).abs().max())

    rivals = [name for name in whole if name.startswith("sdpa")]
    plausible = [name for name in rivals if error(name) <= PLAUSIBLE * error("eager")]
    return whole[max(["eager", *plausible], key=error)]


@dataclass(frozen=True)
class _Part:
    """One KV head of one sequence, with its group of query heads."""

    shape: Shape
    sequence: int
    group: int

    def of_queries(self, t: torch.Tensor) -> torch.Tensor:
        size = self.shape.group_size
        heads = slice(self.group * size, (self.group + 1) * size)
        return t[self.sequence : self.sequence + 1, :, heads]

    def of_keys(self, t: torch.Tensor) -> torch.Tensor:
        return t[self.sequence : self.sequence + 1, :, self.group : self.group + 1]

    @property
    def masking(self) -> dict:
        return {"causal": self.shape.causal, "window": _window(self.shape)}


def _forward_pieces(part: _Part, inputs, results):
    shape = part.shape
    q, k, v = part.of_queries(inputs[0]), part.of_keys(inputs[1]), part.of_keys(inputs[2])
    rows = min(CHECKED_ROWS, shape.seqlen_q)
    # With a bottom-right mask, the last rows are those of a shorter q over all keys, and the first
    # rows those over the keys up to the last of them.
    cuts = [(slice(shape.seqlen_q - rows, None), slice(None))]
    if shape.causal and rows < shape.seqlen_q:
        cuts.append((slice(0, rows), slice(0, rows + shape.seqlen_kv - shape.seqlen_q)))
    for of_rows, of_keys in cuts:
        args = (q[:, of_rows], k[:, of_keys], v[:, of_keys])
        answers = {name: part.of_queries(out)[:, of_rows] for name, (out,) in results.items()}
        answers["oracle"] = reference.attention(*args, **part.masking, dtype=torch.float64)
        answers["eager"] = reference.attention(*args, **part.masking)
        yield "out", answers


def _backward_pieces(part: _Part, inputs, results):
    cut = (part.of_queries, part.of_keys, part.of_keys, part.of_queries)
    args = [take(t) for take, t in zip(cut, inputs, strict=True)]

    def gradients(dtype):
        q, k, v, dout = (t.detach().to(dtype) for t in args)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = reference.attention(*leaves, **part.masking, dtype=dtype)
        return torch.autograd.grad(out, leaves, dout)

    oracle, eager = gradients(torch.float64), gradients(inputs[0].dtype)
    for index, label in enumerate(("dq", "dk", "dv")):
        answers = {name: cut[index](grads[index]) for name, grads in results.items()}
        yield label, answers | {"oracle": oracle[index], "eager": eager[index]}
