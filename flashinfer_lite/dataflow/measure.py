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
LONG_S, LONG_AT = 0.02, 4.0  # the same after the first calls, if longer than what those start
TRIES = 4
OCCUPY_CYCLES = 400_000  # about 0.2 ms in which the host gets ahead of the GPU


def implementations() -> dict[str, Callable]:
    """The three kernels, {name: function(x, weight)}."""
    from flashinfer_lite.gemm import flat_linear

    def kernel(impl):
        return lambda x, weight: flat_linear(x, weight, impl=impl)

    return {impl: kernel(impl) for impl in ("gemv", "flat_gemm", "vendor")}


def preemptions() -> int:
    """How often this process has been put off a CPU that it wanted to keep."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def thread_seconds(run: Callable[[], object]) -> float:
    """Seconds of one call by this thread's CPU time: what others do on the CPU does not count."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def wall_seconds(run: Callable[[], object]) -> float:
    """Seconds of one call by the wall clock. A call that was put off the CPU meanwhile timed the
    others' work too: it is made again, and the shortest of a few counts."""
    shortest = float("inf")
    for _ in range(TRIES):
        before, start = preemptions(), time.perf_counter()
        run()
        shortest = min(shortest, time.perf_counter() - start)
        if preemptions() == before:
            break
    return shortest


def cuda_seconds(run: Callable[[], object]) -> float:
    """Seconds of one call on the GPU, which is kept busy first so that the host is not timed."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(OCCUPY_CYCLES)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def clock_of(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """How a call is timed on a device: from a function to the seconds of one call."""
    if device.type == "cuda":
        return cuda_seconds
    return thread_seconds if torch.get_num_threads() == 1 else wall_seconds


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
    least: int = 1,
    progress: Callable[[], object] = lambda: None,
    clock: Callable[[Callable], float] | None = None,
) -> dict[int, dict[str, list[float]]]:
    """Times of every run at every M, one after another in common rounds.

    Args:
        runs: {name: function(x, weight)}; x is [M, K], weight [N, K].
        n, k, ms: sizes.
        dtype, device: of the inputs, which are made here.
        seconds: after which no other M begins, once there are `least` rounds of all.
        prune: leave out what cannot be the best: after two rounds what is twice as slow at its M,
            and after its first call what takes long and four times as long.
        least: rounds of all, however long they take; an untimed one comes before them.
        progress: called after each M of a round.
        clock: from a function to the seconds of one call; None: the device's.

    Returns:
        {M: {name: [seconds of each round]}}; without `prune` the rounds of an M correspond.
    """
    clock = clock or clock_of(device)
    calls = (MAX_ROUNDS + 1) * len(ms) * len(runs)
    weights = itertools.cycle(cold_weights(n, k, dtype, device, calls))
    inputs = {m: torch.randn(m, k, device=device).to(dtype) for m in ms}
    order = random.Random(0)
    deadline = time.perf_counter() + seconds

    def one_each(m, names):
        # Back to back, in random order: a busy moment hits all the kernels of this M.
        shuffled = order.sample(names, len(names))
        progress()
        return {name: clock(lambda n=name: runs[n](inputs[m], next(weights))) for name in shuffled}

    with torch.inference_mode():
        # The first calls start threads and fill the dispatcher's caches: they are not counted.
        first = {m: one_each(m, list(runs)) for m in order.sample(list(ms), len(ms))}
        times = {m: {name: [] for name in runs} for m in ms}
        names = {m: list(runs) for m in ms}
        if prune:
            for m in ms:
                names[m] = _in_the_running(first[m], max(LONG_AT * min(first[m].values()), LONG_S))
                times[m] |= {name: [first[m][name]] for name in runs if name not in names[m]}
        for number in range(MAX_ROUNDS):
            for m in order.sample(list(ms), len(ms)):
                if number >= least and time.perf_counter() > deadline:
                    return times
                for name, took in one_each(m, names[m]).items():
                    times[m][name].append(took)
                if prune and number + 1 == PRUNE_AFTER:
                    so_far = {name: typical(times[m][name]) for name in names[m]}
                    names[m] = _in_the_running(so_far, PRUNE_AT * min(so_far.values()))
    return times


def _in_the_running(times, limit):
    return [name for name, seconds in times.items() if seconds <= limit]


def typical(samples: list[float]) -> float:
    """The median of the faster half: other work on the machine only ever adds time."""
    return statistics.median(sorted(samples)[: (len(samples) + 1) // 2])


def curves_of(times: dict[int, dict[str, list[float]]]) -> dict[str, dict[int, float]]:
    """{name: {M: typical seconds}} of what `measure` returns."""
    return {
        name: {m: typical(of_m[name]) for m, of_m in sorted(times.items())}
        for name in next(iter(times.values()))
    }


class Contention:
    """Whether other work wants the CPUs, from when this is made."""

    def __init__(self, threads: int):
        self.threads, self.load = threads, os.getloadavg()[0]
        self.start, self.before = time.perf_counter(), preemptions()

    def text(self) -> str:
        """What got in the way so far, in words; "" for nothing."""
        found = []
        cpus = len(os.sched_getaffinity(0))
        if self.load + self.threads > cpus + 0.5:
            found.append(
                f"load average {self.load:.1f} plus our {self.threads} threads on {cpus} CPUs"
            )
        seconds = time.perf_counter() - self.start
        count = preemptions() - self.before
        if count > 20 * seconds:
            found.append(f"put off the CPU {count / seconds:.0f} times a second")
        return "; ".join(found)
