"""From measured curves to the inflection points M1 and M2 of the heuristic dataflow."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashinfer_lite.dataflow import inflection_points
from flashinfer_lite.dataflow.inflection import between

MS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
KERNELS = ("gemv", "flat_gemm", "vendor")


def curves(gemv, flat_gemm, vendor, ms=MS):
    """{kernel: {M: seconds}} of three functions of M."""
    functions = zip(KERNELS, (gemv, flat_gemm, vendor), strict=True)
    return {name: {m: float(f(m)) for m in ms} for name, f in functions}


def lost(of, m1, m2):
    """Sum over M of log(chosen / best), in words other than the library's."""
    total = 0.0
    for m in of["vendor"]:
        chosen = "gemv" if m <= m1 else "flat_gemm" if m <= m2 else "vendor"
        total += math.log(of[chosen][m]) - math.log(min(of[name][m] for name in KERNELS))
    return total


CLEAN = curves(lambda m: m, lambda m: 3.5 + 0.01 * m, lambda m: 3 if m > 40 else 9)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        pytest.param(CLEAN, (3, 32), id="clean"),
        pytest.param(curves(lambda m: m, lambda m: 9, lambda m: 2), (1, 1), id="no flat_gemm"),
        pytest.param(curves(lambda m: 9, lambda m: m, lambda m: 7), (0, 6), id="gemv never best"),
        pytest.param(curves(lambda m: 9, lambda m: 8, lambda m: 2), (0, 0), id="vendor always"),
        pytest.param(curves(lambda m: 9, lambda m: 2, lambda m: 8), (0, 64), id="flat always"),
        pytest.param(curves(lambda m: 2, lambda m: 9, lambda m: 8), (64, 64), id="gemv always"),
        pytest.param(curves(lambda m: 2, lambda m: 2, lambda m: 2), (0, 0), id="all alike"),
        # flat_gemm and vendor cross at 4, back at 16, and again at 32: what lies at 24 counts less.
        pytest.param(
            curves(lambda m: 9, lambda m: 2, lambda m: 4 if m < 16 or m == 24 else 1),
            (0, 12),
            id="crossing twice",
        ),
        pytest.param(curves(lambda m: 1, lambda m: 2, lambda m: 3, ms=(5,)), (5, 5), id="one M"),
    ],
)
def test_inflection_points(of, expected):
    assert inflection_points(of) == expected


def first_crossings(of):
    """The paper's rule: raise M until the next kernel is faster."""
    m1 = m2 = 0
    for m in MS:
        if of["gemv"][m] > of["flat_gemm"][m]:
            break
        m1 = m2 = m
    for m in MS[MS.index(m1) + 1 if m1 else 0 :]:
        if of["flat_gemm"][m] > of["vendor"][m]:
            break
        m2 = m
    return m1, m2


@pytest.mark.parametrize("noise", [0.03, 0.1, 0.25])
def test_noise_costs_less_than_by_the_first_crossings(noise):
    generator = torch.Generator().manual_seed(1)
    # Close curves: memory-bound for the fewest rows, as measured ones are.
    clean = curves(lambda m: max(5, 1.2 * m), lambda m: 5.3 + 0.06 * m, lambda m: 7.5 + 0.005 * m)
    ours, paper = [], []
    for _ in range(100):
        factors = torch.randn(3, len(MS), generator=generator).mul(noise).exp().tolist()
        noisy = {
            name: {m: clean[name][m] * factor for m, factor in zip(MS, row, strict=True)}
            for name, row in zip(KERNELS, factors, strict=True)
        }
        ours.append(lost(clean, *inflection_points(noisy)))
        paper.append(lost(clean, *first_crossings(noisy)))
    least = lost(clean, *inflection_points(clean))
    assert sum(ours) - least * 100 < 0.5 * (sum(paper) - least * 100)


@given(st.lists(st.tuples(*[st.integers(1, 50)] * 3), min_size=1, max_size=6))
def test_no_other_points_lose_less(rows):
    of = {name: {m + 1: row[i] for m, row in enumerate(rows)} for i, name in enumerate(KERNELS)}
    m1, m2 = inflection_points(of)
    candidates = [(a, b) for b in range(len(rows) + 1) for a in range(b + 1)]
    assert (m1, m2) in candidates
    least = min(lost(of, *points) for points in candidates)
    assert lost(of, m1, m2) == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize(
    "of",
    [
        {},
        {"gemv": {1: 1.0}, "flat_gemm": {1: 1.0}},
        {"gemv": {1: 1.0}, "flat_gemm": {2: 1.0}, "vendor": {1: 1.0}},
        curves(lambda m: 0, lambda m: 1, lambda m: 1),
        curves(lambda m: 1, lambda m: math.nan, lambda m: 1),
        curves(lambda m: 1, lambda m: 1, lambda m: math.inf),
    ],
)
def test_inflection_points_refuses(of):
    with pytest.raises(ValueError, match="^curves: expected .*, got "):
        inflection_points(of)


def test_between():
    assert between((4, 32), list(MS)) == [5, 36, 40, 44]
    assert between((0, 0), list(MS)) == []
    assert between((8, 64), list(MS)) == [9, 10, 11]
    assert between((2, 2), [1, 2, 100]) == [27, 52, 77]
    for m1, m2 in itertools.combinations_with_replacement((0, *MS), 2):
        assert not set(between((m1, m2), list(MS))) & set(MS)
