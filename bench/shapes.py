"""Shapes named after models: ``llama3-8b@4096x2`` is Llama 3 8B's heads at 4096 keys, batch 2."""

from __future__ import annotations

import re
from dataclasses import dataclass


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
}


@dataclass(frozen=True)
class Shape:
    """One problem. ``causal`` is bottom-right aligned; decode has ``seqlen_q`` 1."""

    name: str
    batch_size: int
    seqlen_q: int
    seqlen_kv: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    causal: bool = True
    window_left: int = -1

    @property
    def group_size(self) -> int:
        return self.num_heads_q // self.num_heads_kv


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
}
OPS = tuple(DEFAULTS)

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


def parse(text: str, op: str, causal: bool = True) -> Shape:
    """Return the shape that ``model@keys`` or ``model@keysxbatch`` names.

    Args:
        text: for example ``"smollm2-135m@4096"`` or ``"llama3-8b@4096x2"``.
        op: decode and overhead have one query row per sequence, the others as many as keys.
        causal: for attention and attention_bwd.

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
    return Shape(
        name=text,
        batch_size=batch_size,
        seqlen_q=1 if one_row else keys,
        seqlen_kv=keys,
        num_heads_q=heads.num_heads_q,
        num_heads_kv=heads.num_heads_kv,
        head_dim=heads.head_dim,
        causal=causal and not one_row,
        window_left=heads.window_left if 0 <= heads.window_left < keys - 1 else -1,
    )
