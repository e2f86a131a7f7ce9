"""Decode-sized linear layers through `flashinfer_lite.flat_linear`, by exchanging the class of the
modules: weights, hooks, tied parameters and state_dict stay where they are."""

import torch
from torch import nn
from torch.autograd import forward_ad

from flashinfer_lite import cuda_status, gemm

# Inputs of up to this many rows are flat_linear's, which chooses among its kernels and the vendor's
# by itself; beyond, the choice is known.
ROWS = 64
_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_CUDA_DTYPES = _CPU_DTYPES - {torch.float32} if cuda_status == "loaded" else frozenset()


class FlatLinear(nn.Linear):
    """A `torch.nn.Linear` that computes few rows without gradients as `flashinfer_lite.flat_linear`
    does, and everything else as its base class.

    `patch` gives linear layers this class and takes it away again; nothing else differs.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features] -> [..., out_features]."""
        # This runs hundreds of times a token. Asking the module for its weight would cost as much
        # as all the conditions together, of which the likeliest to fail comes first.
        parameters = self._parameters
        weight = parameters.get("weight")
        if (
            input.numel() <= ROWS * self.in_features
            and not torch.is_grad_enabled()
            and weight is not None  # pruning and weight norm make it another kind of attribute
            and "bias" in parameters
            and _has_kernel(input, weight)
            and type(self) is FlatLinear  # a hook may have kept this function beyond `restore`
        ):
            return gemm.unchecked(input, weight, parameters["bias"])
        return nn.functional.linear(input, self.weight, self.bias)


def _has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    dtype = x.dtype
    if dtype is not weight.dtype or x.stride(-1) != 1 or forward_ad._current_level >= 0:
        return False
    # Autocast keeps its casts of nn.Linear's weights; here they would be made at every call.
    if x.is_cpu:
        return dtype in _CPU_DTYPES and not torch.is_autocast_enabled("cpu")
    return x.is_cuda and dtype in _CUDA_DTYPES and not torch.is_autocast_enabled("cuda")


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
