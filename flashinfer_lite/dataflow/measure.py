"""Time the three kernels of a flat product side by side, as decoding would call them."""

import itertools
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

MAX_COPIES_BYTES = 1 << 30
DEFAULT_CACHE_BYTES = 32 << 20  # where the system does not tell
MIN_ROUNDS, MAX_ROUNDS = 3, 40
PRUNE_AFTER, PRUNE_AT = 2, 2.0  # rounds; times the best: what is slower cannot win any more
OCCUPY_CYCLES = 400_000  # about 0.2 ms in which the host gets ahead of the GPU


def implementations() -> dict[str, Callable]:
    """The three kernels, {name: function(x, weight)}."""
    from flashinfer_lite.gemm import flat_linear

    def kernel(impl):
        return lambda x, weight: flat_linear(x, weight, impl=impl)

    return {impl: kernel(impl) for impl in ("gemv", "flat_gemm", "vendor")}


def cpu_seconds(run: Callable[[], object]) -> float:
    """Seconds of one call by the wall clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_seconds(run: Callable[[], object]) -> float:
    """Seconds of one call on the GPU, which is kept busy first so that the host is not timed."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(OCCUPY_CYCLES)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def last_level_bytes(device: torch.device) -> int:
    """Bytes of the largest cache in front of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [DEFAULT_CACHE_BYTES >> 3]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * units.get(text[-1], 1))
    return max(sizes) if len(sizes) > 1 else DEFAULT_CACHE_BYTES


def cold_weights(
    n: int, k: int, dtype: torch.dtype, device: torch.device, calls: int
) -> torch.Tensor:
    """Copies of a weight, [copies, N, K], four times the last-level cache: taken in turn each
    comes from memory, as every layer's does in decoding. At least 2, else at most 1 GiB, and no
    more than there are calls."""
    size = n * k * dtype.itemsize
    enough = min(-(-4 * last_level_bytes(device) // size), MAX_COPIES_BYTES // size, calls)
    copies = max(2, enough)
    one = torch.randn(n, k, device=device).mul_(k**-0.5).to(dtype)
    return one.expand(copies, n, k).contiguous()


def measure(
    runs: dict[str, Callable],
    n: int,
    k: int,
    ms: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    prune: bool = True,
    progress: Callable[[], object] = lambda: None,
    clock: Callable[[Callable], float] | None = None,
) -> dict[int, dict[str, list[float]]]:
    """Times of every run at every M, one after another in common rounds.

    Args:
        runs: {name: function(x, weight)}; x is [M, K], weight [N, K].
        n, k, ms: sizes.
        dtype, device: of the inputs, which are made here.
        seconds: after which no other round begins; one untimed and one timed round there always
            are.
        prune: leave out, after two rounds, what is twice as slow as the best at its M.
        progress: called after each M of a round.
        clock: from a function to the seconds of one call; None: the device's.

    Returns:
        {M: {name: [seconds of each round]}}; without `prune` the rounds of an M correspond.
    """
    clock = clock or (cuda_seconds if device.type == "cuda" else cpu_seconds)
    calls = (MAX_ROUNDS + 1) * len(ms) * len(runs)
    weights = itertools.cycle(cold_weights(n, k, dtype, device, calls))
    inputs = {m: torch.randn(m, k, device=device).to(dtype) for m in ms}
    times = {m: {name: [] for name in runs} for m in ms}
    order = random.Random(0)
    deadline = time.perf_counter() + seconds
    with torch.inference_mode():
        for number in range(MAX_ROUNDS + 1):
            late = number >= 2 and time.perf_counter() > deadline
            if late:
                break
            for m in order.sample(list(ms), len(ms)):
                # Back to back, in random order: a busy moment hits all the kernels of this M.
                for name in order.sample(list(runs), len(runs)):
                    if prune and len(times[m][name]) >= PRUNE_AFTER and _hopeless(times[m], name):
                        continue
                    weight = next(weights)
                    took = clock(lambda m=m, n=name, w=weight: runs[n](inputs[m], w))
                    if number:  # the first round starts threads and fills the dispatcher's caches
                        times[m][name].append(took)
                progress()
                if number >= MIN_ROUNDS and time.perf_counter() > deadline:
                    break
    return times


def _hopeless(times, name):
    best = min(statistics.median(samples) for samples in times.values() if samples)
    return statistics.median(times[name]) > PRUNE_AT * best


def medians(times: dict[int, dict[str, list[float]]]) -> dict[str, dict[int, float]]:
    """{name: {M: median seconds}} of what `measure` returns."""
    return {
        name: {m: statistics.median(of_m[name]) for m, of_m in sorted(times.items())}
        for name in next(iter(times.values()))
    }


class Contention:
    """Whether other work wants the CPUs, from when this is made."""

    def __init__(self, threads: int):
        self.threads, self.load = threads, os.getloadavg()[0]
        self.start, self.before = time.perf_counter(), self._preemptions()

    @staticmethod
    def _preemptions():
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

    def text(self) -> str:
        """What got in the way so far, in words; "" for nothing."""
        found = []
        cpus = len(os.sched_getaffinity(0))
        if self.load + self.threads > cpus + 0.5:
            found.append(
                f"load average {self.load:.1f} plus our {self.threads} threads on {cpus} CPUs"
            )
        seconds = time.perf_counter() - self.start
        count = self._preemptions() - self.before
        if count > 20 * seconds:
            found.append(f"put off the CPU {count / seconds:.0f} times a second")
        return "; ".join(found)
