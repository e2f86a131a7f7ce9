"""Measure a table, and check a choice against the three kernels it chooses from."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from flashinfer_lite.dataflow.choice import choose
from flashinfer_lite.dataflow.inflection import KERNELS, between, inflection_points
from flashinfer_lite.dataflow.measure import (
    Contention,
    curves_of,
    implementations,
    measure,
    typical,
)
from flashinfer_lite.dataflow.table import Entry, Table, device_key

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ALLOWED = 0.97  # of the speed of the best of the three
CONFIRMING_ROUNDS = 8


def grid(max_m: int) -> list[int]:
    """The M to measure: 1, 2, 3, 4, 6, 8, 12, 16, ... and `max_m` itself."""
    ms = list(GRID)
    while ms[-1] < max_m:
        ms += [ms[-2] * 2, ms[-1] * 2]
    return [m for m in ms if m < max_m] + [max_m]


def tune_shape(
    runs: dict[str, Callable],
    n: int,
    k: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_m: int = 64,
    seconds: float = 10.0,
    progress: Callable[[], object] = lambda: None,
    clock: Callable[[Callable], float] | None = None,
) -> Entry:
    """Find the inflection points of one [N, K]: first on the grid, then next to what was found.

    Args:
        runs: {"gemv": function(x, weight), "flat_gemm": ..., "vendor": ...}.
        n, k, dtype, device, progress, clock: as in `measure`.
        max_m: the largest M; the vendor's kernel takes what is larger.
        seconds: of timing, about; each M is measured at least once all the same.

    Returns:
        The entry for the table.
    """
    options = {"dtype": dtype, "device": device, "progress": progress, "clock": clock}
    ms = grid(max_m)
    times = measure(runs, n, k, ms, seconds=0.7 * seconds, **options)
    if more := between(inflection_points(curves_of(times)), ms):
        times |= measure(runs, n, k, more, seconds=0.3 * seconds, **options)
    curves = curves_of(times)
    m1, m2 = inflection_points(curves)
    fewest = min(max(map(len, of_m.values())) for of_m in times.values())
    return Entry(m1, m2, curves, fewest)


def tune(
    shapes: Iterable[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    max_m: int = 64,
    seconds: float = 10.0,
    progress: Callable[[], object] = lambda: None,
    runs: dict[str, Callable] | None = None,
) -> Table:
    """Find the inflection points of some weights on this machine, with torch's threads
    (FlashDecoding++, arXiv 2311.01282, section 5).

    Args:
        shapes: (N, K) of the weights.
        dtype: float32, bfloat16 or float16.
        device: "cpu" or "cuda".
        max_m: the largest M to measure.
        seconds: of timing for each shape, about.
        progress: called after each M of each round.
        runs: the kernels, for tests; None: those of `flat_linear`.

    Returns:
        A Table; `Table.save` writes it, `dataflow.load` puts it in force.

    Example:
        >>> tune([(576, 576)], dtype=torch.float32, max_m=8).save("tuned.json")
    """
    runs = runs or implementations()
    threads = torch.get_num_threads()
    contention = Contention(threads)
    table = Table(device_key(device, threads))
    name = str(dtype).removeprefix("torch.")
    for n, k in shapes:
        table.entries[name, n, k] = tune_shape(
            runs,
            n,
            k,
            dtype=dtype,
            device=torch.device(device),
            max_m=max_m,
            seconds=seconds,
            progress=progress,
        )
    table.contention = contention.text() if device == "cpu" else ""
    return table


@dataclass(frozen=True)
class Checked:
    """One M of one [N, K] in a check.

    Attributes:
        n, k, m: sizes.
        chosen, best: kernels: the one that the table names, and the fastest of the three.
        ratio: speed of the automatic choice over the best's; median of the rounds.
        failed: whether the ratio is below 0.97, outside the noise.
    """

    n: int
    k: int
    m: int
    chosen: str
    best: str
    ratio: float
    failed: bool


def check_shape(
    runs: dict[str, Callable],
    n: int,
    k: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_m: int = 64,
    seconds: float = 10.0,
    progress: Callable[[], object] = lambda: None,
    clock: Callable[[Callable], float] | None = None,
) -> Iterator[Checked]:
    """Measure the choice in force beside the three kernels; yield what came out for each M.

    A ratio below 0.97 counts as a failure if a second measurement of that M, of the choice and the
    best alone, finds it again, and with it three quarters of its rounds.

    Args:
        runs: as for `tune_shape`, and "auto", which goes by the table in force.
        n, k, dtype, device, max_m, seconds, progress, clock: as for `tune_shape`.
    """
    options = {"dtype": dtype, "device": device, "progress": progress, "clock": clock}
    options |= {"prune": False, "seconds": seconds}
    times = measure(runs, n, k, grid(max_m), **options)
    for m, of_m in times.items():
        best, ratios = against_best(of_m)
        ratio, failed = statistics.median(ratios), False
        if ratio < ALLOWED:
            both = {name: runs[name] for name in (best, "auto")}
            again = measure(both, n, k, [m], least=CONFIRMING_ROUNDS, **options)[m]
            ratios = [b / a for b, a in zip(again[best], again["auto"], strict=True)]
            ratio = statistics.median(ratios)
            below = sum(one < ALLOWED for one in ratios)
            failed = ratio < ALLOWED and below >= 0.75 * len(ratios)
        yield Checked(n, k, m, choose(device.type, dtype, n, k, m), best, ratio, failed)


def against_best(times: dict[str, list[float]]) -> tuple[str, list[float]]:
    """(the fastest of the three, [its time over auto's in each round])."""
    best = min(KERNELS, key=lambda name: typical(times[name]))
    return best, [b / a for b, a in zip(times[best], times["auto"], strict=True)]


def geometric_mean(values: list[float]) -> float:
    """Of numbers > 0."""
    return math.exp(statistics.fmean(map(math.log, values)))
