"""A short way for plain calls. The ops check shapes and values themselves, so that `_check` has to
run only where an op refuses, to name what is wrong by its Python argument and error type.

What Python alone can see keeps a call from being plain: types, autocast, gradients in either mode,
the transforms of torch.func, and tracing, where fake kernels check nothing.
"""

from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch._C import _are_functorch_transforms_active as in_a_transform
from torch.autograd import forward_ad
from torch.compiler import is_compiling

REFUSALS = (RuntimeError, IndexError, ZeroDivisionError)  # of the ops, and of q's head_dim


def call(
    op,
    q,
    k,
    v,
    causal,
    window,
    softmax_scale,
    softcap,
    kv_start,
    seqlens_kv,
    *rest,
    behind_v=(None,),
):
    """op's (out, lse) without mask and phi, or None where checks must come first. `behind_v` is
    what the op takes between v and kv_start, checked as far as only Python can: the mask's None, or
    a ragged batch's offsets."""
    if (
        not type(q) is type(k) is type(v) is Tensor
        or (causal is not False and causal is not True)
        or (softmax_scale is not None and type(softmax_scale) is not float)
        or (softcap is not None and not (type(softcap) is float and softcap > 0))
        or not (type(window) is tuple and len(window) == 2)
        or not type(window[0]) is type(window[1]) is int
        or (kv_start is not None and type(kv_start) is not Tensor)
        or (seqlens_kv is not None and type(seqlens_kv) is not Tensor)
        or not ((on_cpu := q.is_cpu) or q.is_cuda)
        or (is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or forward_ad._current_level >= 0
        or in_a_transform()
        or is_autocast_enabled("cpu" if on_cpu else "cuda")
        or is_compiling()
    ):
        return None
    try:
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return op(
            *(q, k, v, *behind_v, kv_start, seqlens_kv),
            *(scale, softcap or 0.0, int(causal), window[0], window[1], *rest),
        )
    except REFUSALS:
        return None
