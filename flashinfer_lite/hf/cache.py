"""A transformers cache that writes new tokens in place and hands out views, instead of
concatenating every step."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Spare slots beyond what is needed now, so that a short answer never moves its prompt.
_HEADROOM = 256


class Cache(DynamicCache):
    """A `transformers.DynamicCache` that grows by doubling: no copy of the past at every step.

    `update` returns strided views [batch, num_heads_kv, seqlen, head_dim] of a buffer with more
    slots; any attention implementation can read them. A view is valid until the next `update`.
    Layers with a sliding window keep at most about twice the window. Everything a DynamicCache does
    works: crop, beam search, batch selection, offloading, reset. Where gradients flow through the
    cache (training with `use_cache=True`) it concatenates as DynamicCache does.

    Args:
        ddp_cache_data, config, offloading, offload_only_non_sliding: as in
            `transformers.DynamicCache`. Pass `config=model.config` for models with sliding windows.

    Example:
        >>> cache = flashinfer_lite.hf.Cache(config=model.config)
        >>> tokens = model.generate(**inputs, past_key_values=cache)
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._replace_layers()

    @classmethod
    def adopt(cls, cache: DynamicCache) -> "Cache":
        """A Cache with the state and the layers of `cache`, which must not be used any more."""
        adopted = cls.__new__(cls)
        adopted.__dict__.update(cache.__dict__)
        adopted._replace_layers()
        return adopted

    def _replace_layers(self):
        # By exact type: quantised, linear-attention and other layers keep their own class.
        self.layers = [
            _REPLACEMENTS[type(layer)].from_layer(layer) if type(layer) in _REPLACEMENTS else layer
            for layer in self.layers
        ]
        self.layer_class_to_replicate = _REPLACEMENTS.get(
            self.layer_class_to_replicate, self.layer_class_to_replicate
        )


class _Preallocated:
    """`self.keys` and `self.values` are views of slots [_start, _end) of two larger buffers.

    transformers replaces `self.keys` at will (beam search, batch selection, offloading): a tensor
    that is not the view we made last is adopted, that is, copied into new buffers at the next
    update.
    """

    # Keys [batch, num_heads_kv, capacity, head_dim] and values [..., head_dim_v].
    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None
    _view: torch.Tensor | None = None
    _start = 0
    _end = 0

    @classmethod
    def from_layer(cls, layer: DynamicLayer):
        replacement = cls.__new__(cls)
        replacement.__dict__.update(layer.__dict__)
        return replacement

    def update(self, key_states, value_states, *args, **kwargs):
        """Append tokens [batch, num_heads_kv, seqlen, head_dim]; returns the keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._can_write_in_place(key_states, value_states):
            self._drop_buffers()
            return super().update(key_states, value_states, *args, **kwargs)
        return self._append(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; the next update writes their slots again."""
        owned = self._owns_keys()
        super().crop(tokens_to_remove)
        if owned and tokens_to_remove <= 0:
            self._end += tokens_to_remove
            self._start = self._end - self.keys.shape[-2]
            self._view = self.keys

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes row beam_idx[i]."""
        if not self._owns_keys():
            super().reorder_cache(beam_idx)
            return
        # Straight into buffers with room: the base class' copy would be copied again by `update`.
        fresh = tuple(
            buffer.new_empty(len(beam_idx), *buffer.shape[1:]) for buffer in self._buffers
        )
        for old, new in zip(self._buffers, fresh, strict=True):
            used = slice(self._start, self._end)
            torch.index_select(old[:, :, used], 0, beam_idx.to(old.device), out=new[:, :, used])
        self._buffers = fresh
        self._set_views(self._start)

    def offload(self) -> None:
        """Move to the CPU; the buffers go too, or the device would not get its memory back."""
        super().offload()
        if not self._owns_keys():
            self._drop_buffers()

    def reset(self) -> None:
        """Forget all tokens, and the buffers with them."""
        super().reset()
        self._drop_buffers()
        self.keys = self.values = None  # older transformers zero them instead
        self.is_initialized = False

    def _owns_keys(self) -> bool:
        return self._buffers is not None and self.keys is self._view

    def _drop_buffers(self) -> None:
        self._buffers = self._view = None

    def _past(self) -> int:
        return self.keys.shape[-2] if self.keys.numel() else 0

    def _can_write_in_place(self, key_states, value_states) -> bool:
        # Autograd would see the write; tokens unlike the past are torch.cat's to promote or refuse.
        if torch.is_grad_enabled() and (
            key_states.requires_grad
            or value_states.requires_grad
            or self.keys.requires_grad
            or self.values.requires_grad
        ):
            return False
        return self._past() == 0 or all(
            old.shape[:2] == new.shape[:2]
            and old.shape[3] == new.shape[3]
            and old.dtype == new.dtype
            and old.device == new.device
            for old, new in ((self.keys, key_states), (self.values, value_states))
        )

    def _make_room(self, key_states, value_states) -> None:
        """Make buffers hold the past in [_start, _end), with room for the new tokens behind it."""
        past, seqlen = self._past(), key_states.shape[-2]
        capacity = 0
        if self._owns_keys() and self._writable():
            capacity = self._buffers[0].shape[2]
            if self._end + seqlen <= capacity:
                return
            # A window has free slots in front: slide its past there, if it does not overlap itself.
            if past <= self._start and past + seqlen <= capacity:
                for buffer in self._buffers:
                    buffer[:, :, :past].copy_(buffer[:, :, self._start : self._end])
                self._start, self._end = 0, past
                return
        # Twice the past at least, so that a window's past always finds a free half to slide to.
        capacity = max(2 * min(capacity, past), past + seqlen) + _HEADROOM
        buffers = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            buffer = new.new_empty(*new.shape[:2], capacity, new.shape[3])
            if past:
                buffer[:, :, :past].copy_(old)
            buffers.append(buffer)
        self._buffers, self._start, self._end = tuple(buffers), 0, past

    def _writable(self) -> bool:
        # A tensor made under inference_mode cannot be written outside of it (a graph never is).
        if torch.compiler.is_compiling():
            return True
        return torch.is_inference_mode_enabled() or not self._buffers[0].is_inference()

    def _write(self, key_states, value_states) -> None:
        self._make_room(key_states, value_states)
        end = self._end + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._end : end].copy_(new)
        self._end = end

    def _slots(self, start: int):
        return tuple(buffer[:, :, start : self._end] for buffer in self._buffers)

    def _set_views(self, start: int) -> None:
        self._start = start
        self.keys, self.values = self._slots(start)
        self._view = self.keys


class PreallocatedLayer(_Preallocated, DynamicLayer):
    """Full attention: every token stays."""

    def _append(self, key_states, value_states):
        self._write(key_states, value_states)
        self._set_views(0)
        return self.keys, self.values


class PreallocatedSlidingWindowLayer(_Preallocated, DynamicSlidingWindowLayer):
    """Sliding window: `sliding_window - 1` tokens stay, the next query adds its own."""

    def _append(self, key_states, value_states):
        seqlen, past = key_states.shape[-2], self._past()
        self.cumulative_length += seqlen
        keep = self.sliding_window - 1
        if seqlen > keep and not self.record_past:
            # None of the past stays, so only the tail of a long prompt goes into the buffer.
            full = key_states, value_states
            if past:
                full = tuple(
                    torch.cat(pair, dim=-2)
                    for pair in ((self.keys, key_states), (self.values, value_states))
                )
            self._drop_buffers()
            self.keys = self.values = key_states.new_empty(0)
            self._write(*(states[:, :, seqlen - keep :] for states in (key_states, value_states)))
            self._set_views(0)
            return full
        self._write(key_states, value_states)
        oldest = self._start
        # While past tokens are recorded (assisted decoding) `crop` decides what goes.
        self._set_views(oldest if self.record_past else max(oldest, self._end - keep))
        return self._slots(max(oldest, self._end - keep - seqlen))


_REPLACEMENTS = {
    DynamicLayer: PreallocatedLayer,
    DynamicSlidingWindowLayer: PreallocatedSlidingWindowLayer,
}
