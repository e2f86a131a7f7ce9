"""Matrix products with few rows."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from flashinfer_lite import _check, _ops, reference
from flashinfer_lite.dataflow.choice import choose

KERNELS = ("gemv", "flat_gemm")  # what the op knows; the other choices are torch's
IMPLS = ("auto", *KERNELS, "vendor", "reference")
_NARROW = (torch.bfloat16, torch.float16)
_CPU_DTYPES = (*_NARROW, torch.float32)


def flat_linear(
    x, weight, bias=None, *, weight_scale=None, impl="auto", batch_invariant=False, out=None
):
    """out = x weight^T + bias for few rows of x: the flat GEMM of FlashDecoding++, for inference.

    With few rows the time goes into reading the weight: it is read once, in place, and products
    are summed in fp32. Which kernel is fastest depends on the number of rows M, on [N, K] and the
    dtype; "auto" looks it up. Hong et al., "FlashDecoding++" (arXiv 2311.01282), sections 4 and 5.

    Args:
        x: [..., K], float32, bfloat16 or float16 with the last dimension contiguous (float64, and
            float32 on CUDA, through "vendor" alone). Leading dimensions that have no one stride
            are copied, as torch's linear does; the weight never is.
        weight: [N, K] of x's dtype, the last dimension contiguous, rows at any stride.
        bias: [N] of x's dtype.
        weight_scale: not implemented yet, refused.
        impl: "auto"; "gemv" for the fewest rows; "flat_gemm" up to 64 rows, in blocks beyond;
            "vendor", which is torch.nn.functional.linear; "reference". Any M runs with each.
        batch_invariant: a row's bits depend neither on M nor on the number of threads: always
            flat_gemm. Excludes the other values of impl.
        out: written in place and returned; [..., N] of x's dtype, not overlapping an input.

    Returns:
        [..., N] of x's dtype.

    Raises:
        RuntimeError: if an input requires grad while grad mode is on.
        TypeError, ValueError, NotImplementedError: naming the argument, what is expected and what
            came.

    Example:
        >>> x, weight = torch.randn(1, 3, 576), torch.randn(192, 576)
        >>> flashinfer_lite.flat_linear(x, weight).shape
        torch.Size([1, 3, 192])
    """
    # Decoding calls this hundreds of times a token: what is plainly in order is asked no more.
    if (
        impl == "auto"
        and out is None
        and weight_scale is None
        and not batch_invariant
        and _is_plain(x, weight, bias)
    ):
        return unchecked(x, weight, bias)
    x, weight, bias = under_autocast(x, weight, bias)
    kernel = choose_kernel(x, weight, bias, weight_scale, impl, batch_invariant, out)
    if kernel in KERNELS:
        return _run_native(kernel, x, weight, bias, out)
    linear = F.linear if kernel == "vendor" else reference.linear
    result = linear(x, weight, bias)
    return result if out is None else out.copy_(result)


def unchecked(x, weight, bias):
    """flat_linear(x, weight, bias) without Python's checks, which would take as long as the product
    of a small layer; the op repeats those that guard memory. For inputs that there are kernels for,
    outside of autocast and of gradients.
    """
    kernel = _choose(x, weight)
    if kernel == "vendor":
        return F.linear(x, weight, bias)
    return _run_native(kernel, x, weight, bias, None)


def _choose(x, weight):
    rows = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
    return choose("cpu" if x.is_cpu else x.device.type, x.dtype, *weight.shape, rows)


def _is_plain(x, weight, bias):
    """Whether nothing at all is wrong or unusual, by the quickest questions."""
    return (
        isinstance(x, torch.Tensor)
        and isinstance(weight, torch.Tensor)
        and x.is_cpu
        and weight.is_cpu
        and x.dtype in _CPU_DTYPES
        and weight.dtype is x.dtype
        and weight.dim() == 2
        and x.shape[-1:] == weight.shape[1:]
        and x.is_contiguous()
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and _ops.built
        and (bias is None or _is_plain_bias(bias, weight))
    )


def _is_plain_bias(bias, weight):
    return (
        isinstance(bias, torch.Tensor)
        and bias.is_cpu
        and bias.dtype is weight.dtype
        and bias.shape == weight.shape[:1]
        and bias.is_contiguous()
    )


def _run_native(kernel, x, weight, bias, out):
    if x.dim() > 2 and not x.is_contiguous():
        # A view where the leading dimensions have one stride, as the op wants it.
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).view(x.shape)
    if out is None:
        return _ops.flat_linear(x, weight, bias, kernel)
    _ops.flat_linear_out(x, weight, bias, kernel, out)
    return out


def under_autocast(x, weight, bias):
    """The inputs as autocast wants them."""
    if not isinstance(x, torch.Tensor):
        return x, weight, bias  # the checks that follow name the culprit
    if not torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
        return x, weight, bias
    if bias is None:
        return *_check.under_autocast(x, weight), None
    return _check.under_autocast(x, weight, bias)


def choose_kernel(x, weight, bias, weight_scale, impl, batch_invariant, out):
    """Check everything and name what runs: "gemv", "flat_gemm", "vendor" or "reference"."""
    if weight_scale is not None:
        _check.not_landed(weight_scale=weight_scale)
    if impl not in IMPLS:
        _check.choice("impl", impl, IMPLS)
    if batch_invariant and impl not in ("auto", "flat_gemm"):
        raise ValueError(f"impl: expected 'auto' or 'flat_gemm' with batch_invariant, got {impl!r}")
    _check_inputs(x, weight, bias)
    _check_native(x, impl, batch_invariant)
    if out is not None:
        _check_out(out, x, weight)
    if batch_invariant:
        return "flat_gemm"
    if impl != "auto":
        return impl
    return _choose(x, weight)


def _check_native(x, impl, batch_invariant):
    """Refuse a kernel that x's device and dtype do not have."""
    wanted = "flat_gemm" if batch_invariant else impl
    native = x.dtype in _NARROW or (x.dtype == torch.float32 and not x.is_cuda)
    if wanted in KERNELS and not native:
        dtypes = "bfloat16 or float16 on CUDA" if x.is_cuda else "float32, bfloat16 or float16"
        raise TypeError(
            f"x: expected dtype {dtypes} for {wanted}, got {x.dtype}; impl='vendor' runs there"
        )
    if native and wanted in ("auto", *KERNELS):
        _check.native("x", x, "; impl='vendor' runs there")


def _check_inputs(x, weight, bias):
    _check.tensor("x", x)
    _check.tensor("weight", weight)
    dtype, device, depth = x.dtype, x.device, weight.shape[-1:]
    if dtype not in _check.ELEMENT_DTYPES:
        raise TypeError(f"x: expected dtype float64, float32, bfloat16 or float16, got {dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected 2 dimensions [N, K], got shape {list(weight.shape)}")
    if x.dim() < 1:
        raise ValueError("x: expected 1 dimension or more, [..., K], got shape []")
    if x.shape[-1:] != depth:
        raise ValueError(
            f"weight: expected shape [N, {x.shape[-1]}] to fit x, got {list(weight.shape)}"
        )
    _check_like_x("weight", weight, dtype, device)
    _check_last_stride("x", x)
    _check_last_stride("weight", weight)
    if bias is not None:
        _check.tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias: expected shape [{weight.shape[0]}] (N), got {list(bias.shape)}"
            )
        _check_like_x("bias", bias, dtype, device)
        _check_last_stride("bias", bias)
    if torch.is_grad_enabled():
        for name, t in (("x", x), ("weight", weight), ("bias", bias)):
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"{name}: flat_linear is for inference and got a tensor that requires grad; "
                    "use torch.nn.functional.linear to train, or torch.no_grad()"
                )
    otherwise = "; torch.nn.functional.linear has"
    _check.no_forward_ad("flat_linear", otherwise, x=x, weight=weight, bias=bias)


def _check_like_x(name, t, dtype, device):
    if t.dtype != dtype:
        raise TypeError(f"{name}: expected x's dtype {dtype}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name}: expected x's device {device}, got {t.device}")


def _check_last_stride(name, t):
    if t.stride(-1) != 1 and t.shape[-1] > 1 and t.numel():
        raise ValueError(
            f"{name}: expected the last dimension contiguous (stride 1), got stride {t.stride(-1)}"
        )


def _check_out(out, x, weight):
    _check.tensor("out", out)
    wanted = [*x.shape[:-1], weight.shape[0]]
    if list(out.shape) != wanted:
        raise ValueError(f"out: expected shape {wanted}, got {list(out.shape)}")
    _check_like_x("out", out, x.dtype, x.device)
    _check_last_stride("out", out)
    try:
        out.view(math.prod(wanted[:-1]), wanted[-1])
    except RuntimeError:
        raise ValueError(
            "out: expected leading dimensions that merge into rows of one stride, got strides "
            f"{list(out.stride())}"
        ) from None
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("out: expected a tensor that does not require grad, got one that does")
