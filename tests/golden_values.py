"""Scalar arithmetic and conversions: arguments, and what the PTX ISA says of their results."""

import numpy as np

INF, NAN = float("inf"), float("nan")
SUBNORMAL = 2.0**-130

EXP2_ARGUMENTS = [
    -INF, INF, NAN, 0.0, -0.0, SUBNORMAL, -SUBNORMAL, 128.0,
    -127.0, -126.5, -149.0, -200.0, -1e30, 1e30, 127.0, 127.99,
    -125.0, -125.7, 1.0, -1.0, 0.5, -0.5, 1 / 3, -1 / 3,
    10.3, -10.3, 30.75, -87.6, 1e-3, -1e-3, 1e-7, -64.015625,
]  # fmt: skip

LOG2_ARGUMENTS = [
    INF, -INF, NAN, 0.0, -0.0, SUBNORMAL, -SUBNORMAL, -1.0,
    -1e30, 1.0, 2.0, 0.5, 1024.0, 2.0**-126, 3.4e38, 1e-37,
    1.0000001, 0.9999999, 1.001, 0.999, 1.5, 0.75, 1.9999, 0.50001,
    3.0, 0.3, 10.0, 1e10, 1e-10, 12345.678, 7e-5, 511.5,
]  # fmt: skip

TANH_ARGUMENTS = [
    -INF, INF, NAN, 0.0, -0.0, 1e-6, -1e-6, 1e-3,
    0.01, -0.01, 0.1, -0.1, 0.25, 0.3, -0.4, 0.54,
    0.55, -0.56, 0.7, 1.0, -1.0, 1.5, 2.0, -2.5,
    3.0, 4.0, -5.0, 7.5, 9.0, 9.5, 20.0, -100.0,
]  # fmt: skip

# float32 bits -> bits of the nearest element, ties to even. None: a NaN, no matter which.
BFLOAT16_FROM_FLOAT = [
    (0x00000000, 0x0000), (0x80000000, 0x8000), (0x3F800000, 0x3F80), (0xBF800000, 0xBF80),
    (0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81), (0x3F807FFF, 0x3F80),
    (0xBF808000, 0xBF80), (0xBF818000, 0xBF82), (0xBF808001, 0xBF81), (0xBF807FFF, 0xBF80),
    (0x3FFFFFFF, 0x4000), (0x7F7F7FFF, 0x7F7F), (0x7F7F8000, 0x7F80), (0x7F7FFFFF, 0x7F80),
    (0xFF7FFFFF, 0xFF80), (0x7F800000, 0x7F80), (0xFF800000, 0xFF80), (0x7FC00000, 0x7FFF),
    (0x7F800001, 0x7FFF), (0xFFC00000, 0x7FFF), (0x00010000, 0x0001), (0x00008000, 0x0000),
    (0x00018000, 0x0002), (0x00008001, 0x0001), (0x00000001, 0x0000), (0x007FFFFF, 0x0080),
    (0x00800000, 0x0080), (0x40490FDB, 0x4049), (0xC2F6E979, 0xC2F7), (0x2EDBE6FF, 0x2EDC),
]  # fmt: skip
FLOAT16_FROM_FLOAT = [
    (0x00000000, 0x0000), (0x80000000, 0x8000), (0x3F800000, 0x3C00), (0xBF800000, 0xBC00),
    (0x3F801000, 0x3C00), (0x3F803000, 0x3C02), (0x3F801001, 0x3C01), (0x3F800FFF, 0x3C00),
    (0xBF801000, 0xBC00), (0xBF803000, 0xBC02), (0xBF801001, 0xBC01), (0x3FFFFFFF, 0x4000),
    (0x477FE000, 0x7BFF), (0x477FEFFF, 0x7BFF), (0x477FF000, 0x7C00), (0xC77FF000, 0xFC00),
    (0x7F800000, 0x7C00), (0xFF800000, 0xFC00), (0x7FC00000, 0x7FFF), (0x7F800001, 0x7FFF),
    (0x33800000, 0x0001), (0x33000000, 0x0000), (0x33000001, 0x0001), (0x33C00000, 0x0002),
    (0xB3C00000, 0x8002), (0x38800000, 0x0400), (0x387FFFFF, 0x0400), (0x387FC000, 0x03FF),
    (0x40490FDB, 0x4248), (0xC2F6E979, 0xD7B7), (0x2EDBE6FF, 0x0000), (0x00000001, 0x0000),
]  # fmt: skip

# bits of an element -> float32 bits
BFLOAT16_TO_FLOAT = [
    (bits, bits << 16)
    for bits in (
        0x0000, 0x8000, 0x3F80, 0xBF80, 0x4049, 0xC2F7, 0x0001, 0x8001,
        0x007F, 0x0080, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF,
        0x3F81, 0x3F82, 0x3F84, 0x3F88, 0x3F90, 0x3FA0, 0x3FC0, 0x4000,
        0x4100, 0x4200, 0x4400, 0x4800, 0x5000, 0x6000, 0x1234, 0x89AB,
    )
]  # fmt: skip
FLOAT16_TO_FLOAT = [
    (0x0000, 0x00000000), (0x8000, 0x80000000), (0x3C00, 0x3F800000), (0xBC00, 0xBF800000),
    (0x0001, 0x33800000), (0x8001, 0xB3800000), (0x0002, 0x34000000), (0x0003, 0x34400000),
    (0x03FF, 0x387FC000), (0x0400, 0x38800000), (0x7BFF, 0x477FE000), (0xFBFF, 0xC77FE000),
    (0x7C00, 0x7F800000), (0xFC00, 0xFF800000), (0x7E00, 0x7FFFFFFF), (0xFE01, 0x7FFFFFFF),
    (0x3C01, 0x3F802000), (0x3C02, 0x3F804000), (0x3C04, 0x3F808000), (0x3C08, 0x3F810000),
    (0x3C10, 0x3F820000), (0x3C20, 0x3F840000), (0x3C40, 0x3F880000), (0x3C80, 0x3F900000),
    (0x3D00, 0x3FA00000), (0x3E00, 0x3FC00000), (0x4000, 0x40000000), (0x4400, 0x40800000),
    (0x4800, 0x41000000), (0x5000, 0x42000000), (0x6000, 0x44000000), (0x0200, 0x38000000),
]  # fmt: skip

# format -> (bits, the infinity: larger magnitudes are NaN)
FORMATS = {"bfloat16": (16, 0x7F80), "float16": (16, 0x7C00), "float32": (32, 0x7F800000)}


def canonical_nans(element, words):
    """The words with every NaN in them replaced by the format's canonical one."""
    bits, infinity = FORMATS[element]
    magnitude_mask = 2 ** (bits - 1) - 1
    result = np.zeros_like(words)
    for shift in range(0, 32, bits):
        value = words >> shift & (2**bits - 1)
        is_nan = (value & magnitude_mask) > infinity
        result |= np.where(is_nan, magnitude_mask, value).astype(np.uint32) << shift
    return result


def _floats(words):
    return words.view(np.float32).astype(np.float64)


def _flushed(words):
    """Floats with subnormals replaced by zeros of their sign, as .ftz does."""
    x = _floats(words)
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x)


def _close(got, wanted, bound):
    """Within the bound where the result is finite and not zero, exact elsewhere, signs too."""
    with np.errstate(invalid="ignore"):
        near = np.abs(got - wanted) <= bound
    regular = np.isfinite(wanted) & (wanted != 0)
    same = (got == wanted) & (np.signbit(got) == np.signbit(wanted))
    return np.where(regular, near, same) | (np.isnan(got) & np.isnan(wanted))


def _ulp(x):
    with np.errstate(invalid="ignore"):
        return np.spacing(np.abs(x).astype(np.float32)).astype(np.float64)


def exp2_matches(out, arguments):
    """ex2.approx.ftz.f32: 2 ulp; of -inf +0, of +-0 and +-subnormals 1; subnormal results are 0."""
    with np.errstate(over="ignore"):
        wanted = np.exp2(_flushed(arguments)).astype(np.float32).astype(np.float64)
        exact = np.exp2(_flushed(arguments))
    flushed = np.abs(wanted) < 2.0**-126
    special = flushed | ~np.isfinite(wanted)
    wanted = np.where(special, np.where(flushed, 0.0, wanted), exact)
    return _close(_floats(out), wanted, 2 * _ulp(wanted))


def log2_matches(out, arguments):
    """lg2.approx.ftz.f32: an absolute error of 2^-22 for arguments between 0.5 and 2, a relative
    one elsewhere; of +-0 and +-subnormals -inf, of negative numbers NaN."""
    x = _flushed(arguments)
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.where(x == 0, -INF, np.log2(x))
    scale = np.where((x > 0.5) & (x < 2), 1.0, np.abs(wanted))
    close = _close(_floats(out), wanted, 2.0**-22 * scale)
    return close | (wanted == 0) & (np.abs(_floats(out)) <= 2.0**-22)


def tanh_matches(out, arguments):
    """tanhf: 2 ulp."""
    wanted = np.tanh(_floats(arguments))
    return _close(_floats(out), wanted, 2 * _ulp(wanted))
