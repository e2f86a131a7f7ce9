"""Shapes named after models: ``llama3-8b@4096x2`` is Llama 3 8B's heads at 4096 keys, batch 2."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Heads:
    """What a model fixes: query heads, KV heads, head size, and the window to the left (-1
    none)."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    window_left: int = -1


# One layer each, from the models' published configurations.
MODELS = {
    "smollm2-135m": Heads(9, 3, 64),
    "llama3-8b": Heads(32, 8, 128),
    "mistral-7b": Heads(32, 8, 128, window_left=4095),
    "qwen2-7b": Heads(28, 4, 128),
    "qwen3-0.6b": Heads(16, 8, 128),
    "gpt2": Heads(12, 12, 64),
    "gemma3-270m": Heads(4, 1, 256),
    "llama2-7b": Heads(32, 32, 128),
    "qwen3-30b": Heads(32, 4, 128),
    # Hidden size 2048, as in the papers' own tables.
    "fa-hd64": Heads(32, 32, 64),
    "fa-hd128": Heads(16, 16, 128),
    "fa-hd256": Heads(8, 8, 256),
    "one-hd64": Heads(1, 1, 64),
}


@dataclass(frozen=True)
class Shape:
    """One problem. ``causal`` is bottom-right aligned; decode has ``seqlen_q`` 1. ``lengths`` says
    how many keys of each sequence are no padding, where some are."""

    name: str
    batch_size: int
    seqlen_q: int
    seqlen_kv: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    causal: bool = True
    window_left: int = -1
    lengths: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        return self.num_heads_q // self.num_heads_kv

    def sequence(self, index: int) -> Shape:
        """Return the problem that one sequence of the batch is, without its padding."""
        keys = self.lengths[index] if self.lengths else self.seqlen_kv
        return replace(self, batch_size=1, seqlen_kv=keys, lengths=())


# op -> what `make bench` times: a few minutes on two cores.
DEFAULTS = {
    "attention": ("smollm2-135m@2048", "llama3-8b@1024", "gpt2@1024"),
    "attention_bwd": ("smollm2-135m@1024", "gpt2@512"),
    "decode": (
        "smollm2-135m@4096",
        "llama3-8b@4096",
        "llama3-8b@16384",
        "qwen2-7b@4096x4",
        "qwen3-0.6b@4096",
        "qwen3-30b@8192",
        "gpt2@1024",
    ),
    "overhead": ("smollm2-135m@16",),
    "full": ("smollm2-135m@2048", "qwen3-0.6b@1024"),
    "padded": ("smollm2-135m@1024x4", "gpt2@512x4"),
    "window": ("smollm2-135m@8192",),
    "memory": ("one-hd64@32768",),
    "model": ("smollm2-135m@4096",),
}
OPS = tuple(DEFAULTS)
# Without --dtype: the goals of these are about one, the others run in the device's usual ones.
ONE_DTYPE = {
    "full": "bfloat16",
    "padded": "bfloat16",
    "window": "bfloat16",
    "memory": "bfloat16",
    "model": "auto",  # the faster one of torch's products
}
WINDOW_LEFT = 255  # of the op "window": 256 keys with the query's own

TOKENS = 16384  # batch times seqlen of the papers' tables
# The same for a GPU, what matters most first: a run may have to stop before the end.
GPU_DEFAULTS = {
    "decode": (
        "llama3-8b@4096x32",  # 537 MB of K and V
        "llama3-8b@1024",
        "llama3-8b@4096",
        "llama3-8b@65536",
        "llama3-8b@4096x8",
        "qwen3-30b@1024",
        "qwen2-7b@16384x8",
        "llama2-7b@4096x8",
    ),
    "attention": tuple(
        f"fa-hd{head_dim}@{seqlen}x{TOKENS // seqlen}"
        for seqlen in (4096, 1024, 16384, 2048, 8192)
        for head_dim in (128, 64, 256)
    ),
    "attention_bwd": tuple(
        f"fa-hd{head_dim}@{seqlen}x{TOKENS // seqlen}"
        for seqlen in (4096, 1024, 16384)
        for head_dim in (128, 64, 256)
    ),
    "overhead": ("llama3-8b@16",),
}
# Compiling FlexAttention takes longer than timing everything else: only for these, by (op, shape).
COMPILED = {
    ("attention", "llama3-8b@1024"),
    ("decode", "llama3-8b@4096"),
    ("attention", "fa-hd128@4096x4"),
    ("decode", "llama3-8b@4096x32"),
}


def padded_lengths(keys: int, batch_size: int) -> tuple[int, ...]:
    """Return lengths from ``keys`` down to little more than a quarter of it."""
    return tuple(keys - 3 * keys * index // (4 * batch_size) for index in range(batch_size))


def parse(text: str, op: str, causal: bool = True) -> Shape:
    """Return the shape that ``model@keys`` or ``model@keysxbatch`` names.

    Args:
        text: for example ``"smollm2-135m@4096"`` or ``"llama3-8b@4096x2"``.
        op: decode and overhead have one query row per sequence, the others as many as keys.
        causal: for the ops of a whole prompt; full and padded have no causal mask.

    Raises:
        ValueError: naming what was expected.

    Example:
        >>> parse("llama3-8b@4096x2", "decode").batch_size
        2
    """
    match = re.fullmatch(r"([a-z0-9.-]+)@(\d+)(?:x(\d+))?", text)
    if not match or match[1] not in MODELS:
        known = ", ".join(MODELS)
        raise ValueError(
            f"shapes: expected MODEL@KEYS or MODEL@KEYSxBATCH with a model of {known}, got {text!r}"
        )
    keys, batch_size = int(match[2]), int(match[3] or 1)
    if keys < 1 or batch_size < 1:
        raise ValueError(f"shapes: expected at least 1 key and batch 1, got {text!r}")
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    heads = MODELS[match[1]]
    one_row = op in ("decode", "overhead")
    window_left = WINDOW_LEFT if op == "window" else heads.window_left
    return Shape(
        name=text,
        batch_size=batch_size,
        seqlen_q=1 if one_row else keys,
        seqlen_kv=keys,
        num_heads_q=heads.num_heads_q,
        num_heads_kv=heads.num_heads_kv,
        head_dim=heads.head_dim,
        causal=causal and not one_row and op not in ("full", "padded"),
        window_left=window_left if 0 <= window_left < keys - 1 else -1,
        lengths=padded_lengths(keys, batch_size) if op == "padded" else (),
    )
