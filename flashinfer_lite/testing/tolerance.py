"""How close is close: the one place of the test-suite with numbers in it.

The oracle is float64, computed by `flashinfer_lite.reference` from the same rounded inputs; "eager"
is the same formula with every intermediate rounded to the tested dtype. Every rule first asks for
the same finite elements, and for the same infinities and NaNs where they are not finite.
"""

import torch

# Every test: at most twice what eager loses, and one rounding of the largest value.
GENERAL_FACTOR = 2.0

# Where low-precision accumulation would show: 128, 512, 2048 and 8192 keys. (max, mean) of the
# error, as a multiple of eager's. A kernel that accumulates in fp32 sits near (0.4, 0.4), see
# PyTorch's and FlashAttention's own rules: none is stricter.
STRICT_KEYS = (128, 512, 2048, 8192)
STRICT_FORWARD = (1.25, 1.0)
STRICT_GRADIENT = (2.0, 1.25)

# Elementwise |x - ref| <= atol + rtol |ref|.
ATOL = {torch.float32: 1e-5, torch.float64: 1e-12}
RTOL = {torch.float32: 5e-6, torch.float64: 1e-11}
LSE_ATOL, LSE_RTOL = 1e-4, 1e-5

# Below so many elements the largest error of a float32 result is no measure of the usual one.
FEW = 4096

# In float64 eager *is* the oracle, so its error says nothing: this many roundings of the largest
# value instead. Far below the 6e-8 that one float32 step in between would cost.
FLOAT64_ROUNDINGS = 2.0**16


def _at(index, shape):
    return (
        "["
        + ", ".join(str(int(i)) for i in torch.unravel_index(torch.as_tensor(index), shape))
        + "]"
    )


def _compare(actual, oracle, name):
    """|actual - oracle| in float64, 0 where both are the same infinity or both NaN.

    Fails where one is finite and the other is not."""
    if actual.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, expected {list(oracle.shape)}")
    actual, oracle = actual.detach().double(), oracle.detach().double()
    same = (actual == oracle) | (actual.isnan() & oracle.isnan())
    wrong = ~same & ~(actual.isfinite() & oracle.isfinite())
    if wrong.any():
        at = int(wrong.flatten().nonzero()[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are not finite where they "
            f"should be, or the reverse; the first at {_at(at, wrong.shape)}: got "
            f"{actual.flatten()[at].item()}, expected {oracle.flatten()[at].item()}"
        )
    return torch.where(same, 0.0, actual - oracle).abs()


def _report(name, error, actual, oracle, rule):
    at = int(error.argmax())
    got, wanted = actual.detach().flatten()[at].item(), oracle.detach().flatten()[at].item()
    return (
        f"{name}: max error {error.max().item():.3e}, mean {error.mean().item():.3e}; {rule}\n"
        f"  worst at {_at(at, error.shape)} of {list(error.shape)}: "
        f"got {got!r}, expected {wanted!r}"
    )


def _largest(t):
    finite = t.detach().double()
    finite = finite[finite.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_close(actual, oracle, eager, name="out", *, gradient=False, dtype=None, terms=None):
    """The general rule: max|x - ref| <= 2 (max|eager - ref| + eps(dtype) max|ref|).

    Args:
        actual: the kernel's result.
        oracle: the float64 one.
        eager: the same formula in the tested dtype. Ignored for float64, where it is the oracle.
        gradient: of q, k, v or a mask. In float32 they may meet the elementwise rule instead: eager
            subtracts from dP a sum of the very products in it, whose roundings cancel; a flash
            backward subtracts dout . out, and like torch's own kernel is at 1 to 3 times eager.
            So may any float32 result of few elements, where eager's worst is luck.
        dtype: what was computed in, where the result has a wider one. Default: actual's.
        terms: the largest sum of the magnitudes that were added up, where max|ref| is far less.

    >>> one = torch.ones(3)
    >>> assert_close(one, one.double(), one)
    """
    dtype = dtype or actual.dtype
    error = _compare(actual, oracle, name)
    if not error.numel():
        return
    rounding = torch.finfo(dtype).eps * max(_largest(oracle), terms or 0.0)
    if dtype == torch.float64:
        eager_error, bound = 0.0, FLOAT64_ROUNDINGS * max(rounding, torch.finfo(dtype).eps)
    else:
        both = eager.isfinite() & oracle.isfinite()
        eager_error = torch.where(both, eager.detach().double() - oracle.detach(), 0.0)
        eager_error = eager_error.abs().max().item()
        bound = GENERAL_FACTOR * (eager_error + rounding)
    if error.max() <= bound:
        return
    lenient = dtype == torch.float32 and (gradient or error.numel() < FEW)
    if lenient and (error <= _elementwise_bound(oracle, dtype)).all():
        return
    rule = f"allowed {bound:.3e} (eager's error is {eager_error:.3e})"
    raise AssertionError(_report(name, error, actual, oracle, rule))


def assert_close_strict(actual, oracle, eager, name="out", gradient=False):
    """The strict rule of 16-bit dtypes: max and mean error as multiples of eager's. Where both are
    little more than the rounding of the result, one element may be rounded the other way.

    float32 and float64 are held to `assert_close_elementwise` instead (gradients:
    `assert_close`)."""
    if actual.dtype in ATOL:
        if gradient:
            return assert_close(actual, oracle, eager, name, gradient=True)
        return assert_close_elementwise(actual, oracle, name)
    error, eager_error = _compare(actual, oracle, name), _compare(eager, oracle, name + " (eager)")
    worst, mean = STRICT_GRADIENT if gradient else STRICT_FORWARD
    one_rounding = torch.finfo(actual.dtype).eps * _largest(oracle) / actual.numel()
    allowed = worst * eager_error.max(), mean * eager_error.mean() + one_rounding
    if error.max() > allowed[0] or error.mean() > allowed[1]:
        rule = f"allowed {allowed[0]:.3e} and {allowed[1]:.3e} ({worst}x and {mean}x eager's)"
        raise AssertionError(_report(name, error, actual, oracle, rule))


def assert_close_elementwise(actual, oracle, name="out"):
    """float32 and float64 on inputs of ordinary size: |x - ref| <= atol + rtol |ref| everywhere."""
    error = _compare(actual, oracle, name)
    bound = _elementwise_bound(oracle, actual.dtype)
    if (error > bound).any():
        rule = f"allowed {ATOL[actual.dtype]} + {RTOL[actual.dtype]} |ref|"
        raise AssertionError(_report(name, error - bound, actual, oracle, rule))


def _elementwise_bound(oracle, dtype):
    size = oracle.detach().double().abs()
    return ATOL[dtype] + RTOL[dtype] * torch.where(size.isfinite(), size, 0.0)


def assert_lse_close(actual, oracle, name="lse"):
    """|lse - ref| <= 1e-4 + 1e-5 |ref|, and -inf exactly where the oracle has it."""
    error = _compare(actual, oracle, name)
    size = oracle.detach().double().abs()
    bound = LSE_ATOL + LSE_RTOL * torch.where(size.isfinite(), size, 0.0)
    if (error > bound).any():
        rule = f"allowed {LSE_ATOL} + {LSE_RTOL} |ref|"
        raise AssertionError(_report(name, error - bound, actual, oracle, rule))


def assert_same_bits(actual, expected, name="out"):
    """Equal bit for bit; NaN equals NaN, and 0.0 differs from -0.0."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{name}: {list(actual.shape)} {actual.dtype}, "
            f"expected {list(expected.shape)} {expected.dtype}"
        )
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    differ = actual.detach().contiguous().view(bits) != expected.detach().contiguous().view(bits)
    if differ.any():
        at = int(differ.flatten().nonzero()[0])
        raise AssertionError(
            f"{name}: {int(differ.sum())} of {differ.numel()} elements differ in their bits; "
            f"the first at {_at(at, differ.shape)}: got {actual.flatten()[at].item()!r}, "
            f"expected {expected.flatten()[at].item()!r}"
        )
