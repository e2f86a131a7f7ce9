"""Sequences behind one another in one row: packed training batches, and continuous batching.

transformers says where they begin by `cu_seq_lens_q` and `cu_seq_lens_k`, or by position_ids that
restart, which `key_mask` turns into numbered sequences.
"""

from typing import NamedTuple

import torch
from transformers.generation.continuous_batching import PagedAttentionCache

import flashinfer_lite
from flashinfer_lite.hf.masks import is_numbered, offsets_of

# The keywords that this file applies.
OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
OF_CACHE = ("block_table", "read_index", "write_index")
NAMES = frozenset({"cache", *OFFSETS, *OF_CACHE})


class Packed(NamedTuple):
    """Where the sequences of the only row begin, and for the decode path of continuous batching
    the pages (k_cache, v_cache, block_table) that hold their past."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_kv: torch.Tensor
    max_seqlen_q: int | None
    max_seqlen_kv: int | None
    pages: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def attend(self, q, k, v, **options) -> torch.Tensor:
        """Attention within each sequence; q, k, v and the result are [1, tokens, heads, dim]."""
        if self.pages is not None:
            return self._decode(q, k, v, **options)
        return flashinfer_lite.attention_varlen(q[0], k[0], v[0], *self[:4], **options).unsqueeze(0)

    def _decode(self, q, k, v, **options):
        """Each sequence has one new token, which is written to its pages."""
        k_cache, v_cache, block_table = self.pages
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        # A CUDA graph is padded with sequences of no key: -1, so nothing is written or seen.
        used = self.cu_seqlens_kv.diff() - 1
        flashinfer_lite.append_kv(k_cache, v_cache, k, v, seqlens_kv=used, block_table=block_table)
        out = flashinfer_lite.decode(
            q, k_cache, v_cache, seqlens_kv=used + 1, block_table=block_table, **options
        )
        return out.transpose(0, 1)


def take(module, query, key, value, attention_mask, kwargs: dict):
    """(Packed or None, key, value): what `kwargs` says of packed sequences, removed from it.

    With a cache of continuous batching the new key and value are written to it, and the key and
    value to attend to come back, unless Packed has pages.
    """
    given = {name: kwargs.pop(name, None) for name in NAMES}
    cache = given.pop("cache")
    if cache is None:
        for name in OF_CACHE:
            if given[name] is not None:
                raise ValueError(f"{name}: expected None without a cache, got one")
    elif not isinstance(cache, PagedAttentionCache):
        raise TypeError(
            f"cache: expected a PagedAttentionCache of transformers, got {type(cache).__name__}"
        )
    elif given["cu_seq_lens_q"] is None:
        raise ValueError("cu_seq_lens_q: expected a tensor with a cache, got None")
    else:
        # It chooses this layer's of cu_seq_lens_k, max_length_k and block_table, in place.
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=given
        )
    offsets = _offsets(given, query, attention_mask)
    if offsets is None:
        return None, key, value
    pages = None
    if given["block_table"] is not None:
        pages = given["k_cache"], given["v_cache"], given["block_table"]
    # Towers of vision models give the longest as a tensor, which costs a sync and is optional.
    longest = (given[name] if type(given[name]) is int else None for name in OFFSETS[2:])
    return Packed(*offsets, *longest, pages), key, value


def _offsets(given: dict, query, mask):
    """(cu_seqlens_q, cu_seqlens_kv), or None if nothing is packed."""
    offsets = given["cu_seq_lens_q"], given["cu_seq_lens_k"]
    numbered = isinstance(mask, torch.Tensor) and is_numbered(mask)
    if offsets[0] is offsets[1] is None:
        # In a graph nobody can count the sequences: there the row is expanded to a mask.
        known = numbered and not torch.compiler.is_compiling()
        return (offsets_of(mask),) * 2 if known else None
    for name, one in zip(OFFSETS, offsets, strict=False):
        if one is None:
            raise ValueError(f"{name}: expected both cu_seq_lens_q and cu_seq_lens_k, got one")
    if mask is not None and not numbered:
        raise ValueError(
            f"attention_mask: expected None with cu_seq_lens_q, got shape {tuple(mask.shape)}; "
            "drop one of them (in a compiled graph position_ids become a mask, so cu_seq_lens_*)"
        )
    if query.shape[0] != 1:
        raise ValueError(
            "cu_seq_lens_q: expected all sequences in one row, a batch of 1, got a batch of "
            f"{query.shape[0]}"
        )
    return offsets
