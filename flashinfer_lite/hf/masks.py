"""The mask function transformers calls once per forward, before the first layer.

transformers' own implementations build a [batch, 1, seqlen_q, seqlen_kv] mask as soon as one token
is padding. The kernels know causal and window by themselves, so all they need is which *keys*
exist: a row [batch, 1, 1, length]. Of sequences packed into one row they need the number of each
token's sequence. Only patterns that a row cannot describe (chunked or blockwise attention) are
spelt out in full.
"""

from typing import NamedTuple

import torch
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

# transformers hands windows and packing over as closures, which only code objects identify.
_AND_CODE = and_masks(causal_mask_function).__code__
_WINDOW_CODE = sliding_window_overlay(1).__code__
_PACKED_CODE = packed_sequence_mask_function(None).__code__
# Newer versions ask by position what is seen within a sequence, older ones by slot.
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
_REMAP_CODE = _remap and _remap(causal_mask_function, None).__code__
_ATTRIBUTE = "_flashinfer_lite_keys"
_OFFSETS = "_flashinfer_lite_offsets"


class KeySpan(NamedTuple):
    """What the values of a key row say, read once per forward instead of once per layer.

    `contiguous`: in every sequence the visible keys are one run `kv_start <= j < seqlens_kv`;
    otherwise the row itself has to be the mask. `kv_start`, `seqlens_kv`: int32 [batch], or None
    where they bind nothing. `complete`: the row is for one query and holds causal and window
    already.
    """

    contiguous: bool
    kv_start: torch.Tensor | None = None
    seqlens_kv: torch.Tensor | None = None
    complete: bool = False


def span_of(mask: torch.Tensor) -> KeySpan | None:
    """The KeySpan that `key_mask` attached; None for masks from elsewhere and in a graph."""
    # A graph must not read it: dynamo would specialise on the attribute of one particular tensor.
    return None if torch.compiler.is_compiling() else getattr(mask, _ATTRIBUTE, None)


def is_numbered(mask: torch.Tensor) -> bool:
    """Whether a mask is a row of sequence numbers, as only `key_mask` makes them."""
    return mask.dtype == torch.int16 and mask.shape[:3] == (1, 1, 1)


def offsets_of(row: torch.Tensor) -> torch.Tensor:
    """cu_seqlens of a row of sequence numbers, found once per forward: a GPU has to sync for it."""
    offsets = getattr(row, _OFFSETS, None)
    if offsets is None:
        number = row.flatten()
        starts = (number.diff() != 0).nonzero().flatten() + 1
        offsets = torch.nn.functional.pad(starts, (1, 1))
        offsets[-1] = len(number)
        setattr(row, _OFFSETS, offsets)
    return offsets


def key_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device="cpu",
    **kwargs,
) -> torch.Tensor | None:
    """Mask function for `transformers.AttentionMaskInterface`; the arguments are transformers'.

    Args:
        attention_mask: bool [batch, seen], True = token, or None.
        q_offset: int, or a 0-d tensor once a static cache has been written.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether the caller accepts less than the
            full mask.

    Returns:
        None (every key exists), a bool row [batch, 1, 1, length] with length <= kv_length that
        describes keys only (causal and window are left to the attention function), for packed
        sequences of a batch of 1 an int16 row [1, 1, 1, kv_length], the number modulo 2 ** 16 of
        each token's, or a complete bool mask [batch, 1, q_length, kv_length].
    """
    # A static cache counts on the device; on the CPU reading the count costs nothing.
    if isinstance(q_offset, torch.Tensor) and _values_known(q_offset):
        q_offset = int(q_offset)
    numbers = _sequence_numbers(mask_function)
    if numbers is not None and batch_size == 1:
        return numbers[:, None, None, :].short()
    bidirectional = mask_function is bidirectional_mask_function
    row_allowed = allow_is_bidirectional_skip if bidirectional else allow_is_causal_skip
    plain = (
        bidirectional or mask_function is causal_mask_function or _is_sliding_causal(mask_function)
    )
    if not (plain and row_allowed) or isinstance(q_offset, torch.Tensor):
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            # sdpa's skips assume sdpa's top-left causal, so its mask is always spelt out.
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            device=device,
            **kwargs,
        )
        return _attach_span(mask, complete=True) if q_length == 1 else mask

    # Slots in use: a static cache hands out its whole buffer, written up to `length`.
    length = kv_length if bidirectional else min(q_offset + q_length - kv_offset, kv_length)
    if attention_mask is None:
        if length == kv_length:
            return None
        row = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    else:
        row = attention_mask[:, kv_offset : kv_offset + length]
        if row.shape[1] < length:  # transformers reads a short mask as padding on the right
            row = torch.nn.functional.pad(row, (0, length - row.shape[1]))
        if length == kv_length and _values_known(row) and bool(row.all()):
            return None
    return _attach_span(row.expand(batch_size, -1)[:, None, None, :], complete=False)


def _is_sliding_causal(mask_function) -> bool:
    window, causal = _parts_of_and(mask_function)
    return _code(window) is _WINDOW_CODE and causal is causal_mask_function


def _sequence_numbers(mask_function) -> torch.Tensor | None:
    """[batch, length] if the function is causal, perhaps with a window, within packed sequences."""
    parts = _parts_of_and(mask_function)
    same, inner = parts if _code(parts[0]) is _PACKED_CODE else reversed(parts)
    if _code(same) is not _PACKED_CODE:
        return None
    if _REMAP_CODE and _code(inner) is _REMAP_CODE:
        inner = _captured(inner)["mask_function"]
    numbers = _captured(same)["packed_sequence_mask"]
    plain = inner is causal_mask_function or _is_sliding_causal(inner)
    return numbers if plain and type(numbers) is torch.Tensor else None


def _parts_of_and(mask_function) -> tuple:
    """The two functions of an `and_masks`; of anything else (None, None)."""
    # Dynamo cannot look into closures: in a compiled graph every pattern is spelt out.
    if torch.compiler.is_compiling() or _code(mask_function) is not _AND_CODE:
        return None, None
    (functions,) = _captured(mask_function).values()
    return functions if len(functions) == 2 else (None, None)


def _code(function):
    return getattr(function, "__code__", None)


def _captured(function) -> dict:
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _values_known(tensor: torch.Tensor) -> bool:
    """Whether reading values is free: not in a graph, not a fake tensor, not on a device that would
    have to sync."""
    return tensor.is_cpu and type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def _attach_span(mask: torch.Tensor, complete: bool) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return mask
    span = KeySpan(False, complete=complete)
    if _values_known(mask):
        row = mask[:, 0, 0]  # [batch, length]
        start = row.int().argmax(1, keepdim=True)  # 0 for an empty row, whose end is then 0 as well
        end = start + row.sum(1, keepdim=True)
        slot = torch.arange(row.shape[1])
        if torch.equal(row, (slot >= start) & (slot < end)):
            span = KeySpan(
                True,
                None if not start.any() else start[:, 0].int(),
                None if bool((end == row.shape[1]).all()) else end[:, 0].int(),
                complete,
            )
    setattr(mask, _ATTRIBUTE, span)
    return mask
