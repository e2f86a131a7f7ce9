"""What the tests of `patch(model, calibration=...)` share."""

from dataclasses import dataclass, field

import torch

import flashinfer_lite
from flashinfer_lite.calibrate import GUARDS


@dataclass
class Given:
    """The part of a Calibration that `patch` reads, with phi at will."""

    phis: list
    num_heads_q: int
    guard: tuple = GUARDS[torch.float32]
    num_layers: int = field(init=False)

    def __post_init__(self):
        self.num_layers = len(self.phis)

    def phi(self, layer_idx):
        return self.phis[layer_idx]


def given(model, values=None, off=()):
    """phi of all layers: another one for each head, or `values` of each layer."""
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    phis = [torch.linspace(-7, -2, heads).add(layer).tolist() for layer in range(layers)]
    if values is not None:
        phis = [[value] * heads for value in values]
    return Given([None if i in off else p for i, p in enumerate(phis)], heads, GUARDS[model.dtype])


def counted():
    """(rows_checked, rows_recomputed) since the last call."""
    stats = flashinfer_lite.stats(reset=True)
    return stats.rows_checked, stats.rows_recomputed


def generate(model, batch, **kwargs):
    return model.generate(**batch, **{"max_new_tokens": 20, "do_sample": False, **kwargs})


def attributes(model):
    return {name: set(module.__dict__) for name, module in model.named_modules()}
