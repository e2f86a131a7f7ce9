"""What the mutants of flat_gemm and gemv have to get past: see mutant_cases.py.

Each case launches twice on the same memory: the bits agree, the tickets are back at 0, and of what
lies between out's rows nothing is written.
"""

import torch
from mutant_cases import INSTANCES, Case, _generator
from test_cuda_flat import padded, shifted
from test_flat_linear import check

from flashinfer_lite.testing import assert_same_bits, simt


def _case(kernel, name, sizes, change=(), with_bias=True, chosen=False, **options):
    """`change`: of x and of weight; `chosen`: the host code takes the row and the splits."""
    m, n, k = sizes
    generator = _generator(f"{kernel} {name}")
    x, weight, bias = (
        (torch.randn(shape, generator=generator) + 0.5).bfloat16() for shape in ((m, k), (n, k), n)
    )
    if change:
        x, weight = change[0](x), change[1](weight)
    bias = shifted(bias) if with_bias else None

    def call(session_options):
        instance = None if chosen else INSTANCES[kernel]
        executor = simt.Executor(instance, tolerate=True, **session_options)
        executor.flat_linear(x, weight, bias, kernel=kernel, launches=2, **options)
        tickets = executor.tickets
        return (
            (*executor.outs, executor.outside, torch.zeros(1) if tickets is None else tickets),
            executor.reports,
        )

    def right(tensors):
        first, second, outside, tickets = tensors
        check(first, x, weight, bias)
        assert_same_bits(second, first)
        assert outside.isnan().all(), "written between the rows of out"
        assert not tickets.any(), "tickets are left"

    return Case(name, kernel, call, right)


def same(t):
    return t


def odd(t):
    return padded(t, 3)


def ragged(t):
    """Rows begin on 16 bytes though K is no multiple of 8."""
    return padded(t, 16 - t.shape[1] % 8)


def flat_cases():
    def flat(*arguments, **options):
        return _case("flat_gemm", *arguments, **options)

    def gemv(*arguments, **options):
        return _case("gemv", *arguments, **options)

    return [
        flat("ring", (5, 70, 9 * 64 + 40), splits=1),
        flat("more rows", (70, 140, 304), splits=2),
        flat("splits", (9, 130, 7 * 64), splits=3, out_row=131),
        flat("empty splits", (3, 20, 136), splits=7),
        flat("whole tiles", (64, 256, 256), splits=1, with_bias=False),
        flat("unaligned", (6, 21, 77), (shifted, shifted), splits=1, out_row=24, out_offset=1),
        flat("unaligned x", (66, 21, 64), (shifted, same), splits=1, out_row=24, out_offset=4),
        flat("unaligned weight", (6, 131, 72), (same, odd), splits=2, with_bias=False),
        flat("ragged", (6, 21, 203), (ragged, ragged), splits=2, out_row=26, out_offset=2),
        flat("two launches", (1030, 9, 1024), out_row=11),
        flat("chosen", (6, 70, 1100), chosen=True),
        gemv("turns", (4, 17, 2344)),
        gemv("ragged", (3, 8, 1029), (ragged, ragged), out_row=9),
        gemv("unaligned", (4, 5, 77), (shifted, shifted), out_row=8, out_offset=1),
        gemv("unaligned x", (1, 8, 264), (shifted, same)),
        gemv("unaligned weight", (2, 8, 264), (same, odd), with_bias=False),
        gemv("more rows", (6, 9, 64)),
        gemv("chosen", (1, 8, 72), chosen=True, with_bias=False),
    ]
