"""What the tests of patched linear layers share."""

from collections import Counter

import torch
from hf_models import hf

from flashinfer_lite import gemm


class QuantisedLinear(torch.nn.Linear):
    """Stands for the layers of a quantiser or of LoRA: a subclass."""


def watch_flat_linear(monkeypatch):
    """A list that fills with the shapes flat_linear is given, in order."""
    calls = []
    inner = gemm.unchecked

    def counting(x, weight, bias):
        calls.append((tuple(x.shape), tuple(weight.shape), bias is not None))
        return inner(x, weight, bias)

    monkeypatch.setattr(gemm, "unchecked", counting)
    return calls


def only_linear(model, **kwargs):
    return hf.patch(model, attention=False, cache=False, linear=True, **kwargs)


def classes(model):
    """How many linear layers of each class a model has."""
    return Counter(type(m) for m in model.modules() if isinstance(m, torch.nn.Linear))


def generate(model, batch, **kwargs):
    return model.generate(**batch, **{"max_new_tokens": 20, "do_sample": False, **kwargs})
