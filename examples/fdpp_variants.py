"""The ways of running one model that `make fdpp` compares. They share the model's weights and start
from the same keys and values."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kind:
    """What a variant is made of.

    Attributes:
        label: the row's name in the tables.
        attention: "eager" or "sdpa", torch's; or "ours".
        our_cache: `flashinfer_lite.hf.Cache` instead of transformers' DynamicCache.
        unified: the unified-max softmax where the calibration gives a phi.
        linear: flat_linear, by the dataflow table, instead of torch's linear layers.
    """

    label: str
    attention: str
    our_cache: bool = True
    unified: bool = False
    linear: bool = False


KINDS = {
    "eager": Kind("eager, DynamicCache", "eager", our_cache=False),
    "sdpa": Kind("sdpa, DynamicCache", "sdpa", our_cache=False),
    "sdpa-ourcache": Kind("sdpa, our Cache", "sdpa"),
    "online": Kind("ours, online softmax", "ours"),
    "unified": Kind("ours, unified max", "ours", unified=True),
    "unified-flat": Kind("ours, unified max, flat GEMM", "ours", unified=True, linear=True),
}


class Variant:
    """A model of `KINDS[name]`, with `base`'s own parameters."""

    def __init__(self, name: str, base, calibration):
        self.name, self.kind = name, KINDS[name]
        shared = {id(tensor): tensor for tensor in base.parameters()}
        self.model = copy.deepcopy(base, shared)
        if self.kind.attention == "ours":
            from flashinfer_lite import hf

            hf.patch(
                self.model,
                linear=self.kind.linear,
                calibration=calibration if self.kind.unified else None,
            )
        else:
            self.model.set_attn_implementation(self.kind.attention)

    def cache(self, filled=None, length: int = 0):
        """An empty cache; or one with the first `length` keys and values of `filled`, in the
        model's dtype."""
        from transformers import DynamicCache

        from flashinfer_lite import hf

        cache = (hf.Cache if self.kind.our_cache else DynamicCache)(config=self.model.config)
        for index, layer in enumerate(filled.layers if filled else ()):
            keys = layer.keys[:, :, :length].to(self.model.dtype)
            cache.update(keys, layer.values[:, :, :length].to(self.model.dtype), index)
        return cache

    def step(self, token: torch.Tensor, cache) -> torch.Tensor:
        """Decode one token; return the logits [vocab] of the next."""
        return self.model(token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1]


@torch.inference_mode()
def prefill(model, ids: torch.Tensor):
    """Return a DynamicCache with the keys and values of ids [seqlen]."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
