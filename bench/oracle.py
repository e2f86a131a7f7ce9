"""The check before the clock: every implementation against an fp64 oracle, on parts of a shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from implementations import Candidate, make_inputs, window_of
from shapes import Shape

from flashinfer_lite import reference
from flashinfer_lite.testing import assert_close

CHECKED_ROWS = 64
CHECKED_PARTS = 16
PLAUSIBLE = 6.0


def check(
    shape: Shape,
    op: str,
    dtype: torch.dtype,
    found: dict[str, Candidate],
    device: torch.device | str = "cpu",
) -> dict[str, str]:
    """Hold every candidate to the project's tolerance against the fp64 oracle.

    The oracle costs a full score matrix, so it is asked about parts whose answer is independent of
    the rest: the first and the last KV group with its query heads, of the first and the last
    sequence (every one while they are few); in attention the first and the last rows, in the
    backward all of them.

    Returns:
        the rivals that fail, each with what is wrong.

    Raises:
        AssertionError: if ours fails, naming the shape, the implementation and the worst element.
    """
    inputs = make_inputs(shape, op, dtype, device)
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
        for label, answers in compare(
            _Part(shape.sequence(sequence), sequence, group), inputs, results
        ):
            for name, tensor in answers.items():
                pieces.setdefault(label, {}).setdefault(name, []).append(tensor.flatten())
    wrong = {}
    for label, answers in pieces.items():
        whole = {name: torch.cat(tensors) for name, tensors in answers.items()}
        yardstick = _yardstick(whole)
        for name in found:
            where = f"{op} {shape.name} {name} {label}"
            try:
                assert_close(whole[name], whole["oracle"], yardstick, where)
            except AssertionError as error:
                if name.startswith("ours"):
                    raise
                wrong[name] = str(error)
    return wrong


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
    """One KV head of one sequence, with its group of query heads; ``shape`` is the sequence's."""

    shape: Shape
    sequence: int
    group: int

    def of_queries(self, t: torch.Tensor) -> torch.Tensor:
        size = self.shape.group_size
        heads = slice(self.group * size, (self.group + 1) * size)
        return t[self.sequence : self.sequence + 1, :, heads]

    def of_keys(self, t: torch.Tensor) -> torch.Tensor:
        keys = slice(0, self.shape.seqlen_kv)
        return t[self.sequence : self.sequence + 1, keys, self.group : self.group + 1]

    @property
    def masking(self) -> dict:
        return {"causal": self.shape.causal, "window": window_of(self.shape)}


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
