"""Decode-sized linear layers through `flashinfer_lite.flat_linear`, by exchanging the class of the
modules: weights, hooks, tied parameters and state_dict stay where they are."""

import torch
from torch import nn

import flashinfer_lite

# Inputs of up to this many rows are flat_linear's. It chooses among its kernels and the vendor's by
# itself; beyond, only its checks would be added.
ROWS = 64


class FlatLinear(nn.Linear):
    """A `torch.nn.Linear` that sends few rows without gradients to `flashinfer_lite.flat_linear`
    and does everything else as its base class.

    `patch` gives linear layers this class and takes it away again; nothing else differs.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features] -> [..., out_features]."""
        weight = self.weight
        # The likeliest to fail comes first: this runs hundreds of times a token.
        if (
            input.numel() <= ROWS * self.in_features
            and not torch.is_grad_enabled()
            and _has_kernel(input, weight)
            and type(self) is FlatLinear  # a hook may have kept this function beyond `restore`
        ):
            return flashinfer_lite.flat_linear(input, weight, self.bias)
        return nn.functional.linear(input, weight, self.bias)


def _has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    dtype = x.dtype
    # Autocast keeps its casts of nn.Linear's weights; flat_linear would cast them at every call.
    if dtype is not weight.dtype or x.stride(-1) != 1:
        return False
    if dtype is torch.bfloat16 or dtype is torch.float16:
        return x.is_cuda or x.is_cpu
    return dtype is torch.float32 and x.is_cpu and not torch.is_autocast_enabled("cpu")


def swappable(module: nn.Module) -> bool:
    """Whether `module` computes what nn.Linear computes, with a weight that flat_linear can read.

    Quantised and LoRA layers are subclasses, or have weights of their own class; a module with a
    `forward` of its own (accelerate's offloading) would never call ours.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = getattr(module, "weight", None)
    return type(weight) is nn.Parameter and weight.dim() == 2 and weight.stride(1) == 1


def swap(module: nn.Module) -> None:
    """Give a swappable module the class FlatLinear."""
    module.__class__ = FlatLinear


def swap_back(module: nn.Module) -> None:
    """Undo `swap`, unless somebody else has changed the class since."""
    if type(module) is FlatLinear:
        module.__class__ = nn.Linear
