"""A whole model, patched, against the same model on transformers' sdpa: a prompt, then tokens.

The architecture is SmolLM2-135M's; the weights are random, which costs the same and needs no
download. Both sides share them and see the same tokens in the same rounds. They get their numbers
only if their logits agree in each.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from shapes import Shape
from timing import MAX_ROUNDS, compare_with_sdpa, spread, time_interleaved

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL = "smollm2-135m"
CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    # With transformers' 0.02 a row attends to all keys alike and hardly moves the logits.
    "initializer_range": 0.05,
}
# Of the norm of sdpa's logits: ten times and more what rounding does in 30 layers, and less than
# half of what other keys would do.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.2, "float64": 1e-6}
PREFILL_ROUNDS, DECODE_ROUNDS = 3, 10  # at least; a prompt takes seconds, the first one more
WARM_KEYS = 64


class Side:
    """One of the two models with its cache, and the logits of its calls."""

    def __init__(self, model, make_cache: Callable, ids: torch.Tensor, keys: int):
        self._model, self._make_cache = model, make_cache
        self._ids, self._keys = ids, keys
        self.logits: list[torch.Tensor] = []

    def _call(self, begin: int, end: int) -> float:
        from demo_worker import prefill

        seconds, logits = prefill(self._model, self._ids[:, begin:end], self._cache)
        self._position = end
        self.logits.append(logits.float())
        return seconds

    def prefill(self, keys: int | None = None) -> float:
        """Return the seconds of a prompt of ``keys`` tokens, by default all there are to be."""
        self._cache = None  # released before the next one is made
        self._cache = self._make_cache()
        return self._call(0, keys or self._keys)

    def decode(self) -> float:
        """Return the seconds of the next token."""
        return self._call(self._position, self._position + 1)


def measure(op: str, shape: Shape, dtype_name: str, args, machine, limits) -> list[dict]:
    """Return rows of ``model_prefill`` and ``model_decode``; none where the model cannot run."""
    try:
        sides, dtype_name = make_sides(shape, dtype_name)
    except (ImportError, NotImplementedError) as error:
        print(f"\n  {op} {shape.name}: not here: {error}")
        return []
    seconds = args.seconds or machine.default_seconds
    parts = (
        ("model_prefill", Side.prefill, PREFILL_ROUNDS),
        ("model_decode", Side.decode, DECODE_ROUNDS),
    )
    rows = []
    with torch.inference_mode():
        for side in sides.values():
            side.prefill(min(shape.seqlen_kv, WARM_KEYS))
            side.decode()
        for part, call, min_rounds in parts:
            calls = [functools.partial(call, side) for side in sides.values()]
            times = time_interleaved(calls, seconds, min_rounds)
            check_agreement(f"{part} {shape.name}", sides, TOLERANCE[dtype_name])
            pair = [
                row_of(part, shape, dtype_name, name, samples)
                for name, samples in zip(sides, times, strict=True)
            ]
            compare_with_sdpa(pair)
            rows += pair
    return [row for row in rows if not args.impl or row["impl"].startswith(tuple(args.impl))]


def make_sides(shape: Shape, dtype_name: str) -> tuple[dict[str, Side], str]:
    """Return the patched model and the other by name, and the dtype that "auto" is here.

    Raises:
        ImportError: transformers is missing or too old.
        NotImplementedError: another model's shape.
    """
    if not shape.name.startswith(f"{MODEL}@"):
        raise NotImplementedError(f"expected {MODEL}, the only one whose other layers are known")
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from flashinfer_lite import hf

    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    from demo import bfloat16_slowdown

    if dtype_name == "auto":
        dtype_name = "bfloat16" if bfloat16_slowdown() <= 1 else "float32"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**CONFIG, attn_implementation="sdpa")
        theirs = LlamaForCausalLM(config).to(getattr(torch, dtype_name)).eval()
        tokens = shape.seqlen_kv + MAX_ROUNDS + 1
        ids = torch.randint(config.vocab_size, (shape.batch_size, tokens))
    ours = copy.deepcopy(theirs, {id(weight): weight for weight in theirs.parameters()})
    hf.patch(ours)
    caches = {"ours": (ours, hf.Cache), "sdpa": (theirs, DynamicCache)}
    return {
        name: Side(model, functools.partial(cache, config=config), ids, shape.seqlen_kv)
        for name, (model, cache) in caches.items()
    }, dtype_name


def check_agreement(where: str, sides: dict[str, Side], tolerance: float) -> None:
    """Compare the logits of all calls since the last check, and forget them."""
    ours, theirs = (torch.stack(sides[name].logits) for name in ("ours", "sdpa"))
    error = float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())
    if not error <= tolerance:
        raise AssertionError(
            f"{where}: expected logits within {tolerance} of sdpa's in norm, got {error:.2g}"
        )
    for side in sides.values():
        side.logits.clear()


def row_of(part: str, shape: Shape, dtype_name: str, name: str, samples: list[float]) -> dict:
    """Return a row; of a whole model neither FLOPs nor bytes are counted."""
    row = {"op": part, "shape": shape.name, "causal": True, "dtype": dtype_name, "impl": name}
    row |= {"cold": False, "mode": "wall", **spread(samples)}
    return row | {"flops_per_s": None, "bytes_per_s": None, "roofline": None}
