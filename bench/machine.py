"""The machine under the benchmark: what it is, what it can do at most, and whether it is ours."""

from __future__ import annotations

import functools
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BANDWIDTH_BYTES = 256 << 20  # well past any cache that a read could come from
DEFAULT_CACHE_BYTES = 32 << 20  # where the system does not tell
MAX_CALLS, STRETCH_S = 500, 0.02  # overhead: calls in one timed stretch, too short for the clock


def cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def cache_sizes() -> dict[str, int]:
    """Return the bytes of CPU 0's caches by level, e.g. ``{"L1d": 32768, "L2": ..., "L3":
    ...}``."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind = (index / "level").read_text(), (index / "type").read_text()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind.startswith("Instruction"):
            continue
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1], 1)
        name = f"L{level.strip()}" + ("d" if kind.startswith("Data") else "")
        sizes[name] = int(size.rstrip("KMG")) * unit
    return sizes


def commit() -> str:
    """Return the checkout's short commit, with ``+dirty`` for changed tracked files, or unknown.

    FLASHINFER_LITE_COMMIT says it where the files have been copied without their history.
    """
    if "FLASHINFER_LITE_COMMIT" in os.environ:
        return os.environ["FLASHINFER_LITE_COMMIT"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = "+dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load_warning(threads: int) -> str | None:
    """Return a warning when other processes want CPUs that the timed threads need."""
    cpus = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    if load + threads > cpus + 0.5:
        return (
            f"load average {load:.1f} plus our {threads} threads on {cpus} CPUs: other work is "
            "running. Threads then wait for each other at every barrier, spinning: compare ratios "
            "of one run at most, or wait for a quiet machine."
        )
    return None


def preemptions() -> int:
    """Return how often this process has been put off a CPU that it wanted to keep."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def best_seconds(function, repeats: int, clock=time.perf_counter) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def read_bandwidth(clock=time.perf_counter) -> float:
    """Return bytes per second of the fastest of torch's streaming reads, with torch's threads."""
    data = torch.ones(BANDWIDTH_BYTES // 4)
    as_ints, matrix = data.view(torch.int32), data.view(-1, 4096)
    # One stream leaves bandwidth unused; the product reads several rows side by side.
    readers = (
        data.sum,
        lambda: torch.dot(data, data),
        as_ints.max,
        lambda: torch.mv(matrix, matrix[0]),
    )
    return BANDWIDTH_BYTES / min(best_seconds(reader, 5, clock) for reader in readers)


def matmul_rate(dtype: torch.dtype) -> float:
    """Return FLOP/s of torch's fastest square matmul, in ``dtype`` or in fp32 if that is faster.

    A CPU without 16-bit matrix instructions multiplies bf16 in fp32 units, so its fp32 rate is the
    honest ceiling there, however slow torch's own bf16 matmul is.
    """
    rates = []
    for candidate in {dtype, torch.float32} if dtype != torch.float64 else {dtype}:
        for size in (512, 1024):
            a = torch.ones(size, size, dtype=candidate)
            rates.append(2 * size**3 / best_seconds(lambda a=a: torch.mm(a, a), 3))
    return max(rates)


def versions() -> dict:
    """Return what is the same on every device: versions, commit, load."""
    import flashinfer_lite

    return {
        "torch": torch.__version__,
        "flashinfer_lite": getattr(flashinfer_lite, "__version__", "unknown"),
        "commit": commit(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


class Cpu:
    """This machine's processor, with torch's threads."""

    peers = "cpu"
    default_dtypes = ("float32", "bfloat16")
    min_rounds = 5
    default_seconds = 1.5

    def __init__(self):
        self.device = torch.device("cpu")
        self.last_level_bytes = max(cache_sizes().values(), default=DEFAULT_CACHE_BYTES)

    def describe(self, threads: int) -> dict:
        """Return the header of a run."""
        from flashinfer_lite.testing import current_isa

        return {
            "cpu": cpu_name(),
            "cpus": len(os.sched_getaffinity(0)),
            "threads": threads,
            "isa": current_isa(),
            "caches": cache_sizes(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
        } | versions()

    def lines(self, header: dict, limits: dict) -> list[str]:
        caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in header["caches"].items())
        rates = ", ".join(
            f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in limits.items() if name != "read"
        )
        return [
            f"{header['cpu']}, {header['cpus']} CPUs, {header['threads']} threads; {caches}",
            f"flashinfer_lite {header['flashinfer_lite']} ({header['isa']}, {header['commit']}), "
            f"torch {header['torch']} ({header['torch_isa']}), Python {header['python']}",
            f"measured here: read {limits['read'] / 1e9:.1f} GB/s; matmul {rates}",
        ]

    def warnings(self, header: dict) -> list[str]:
        return [w for w in [load_warning(header["threads"])] if w]

    def watch(self) -> Callable[[], str | None]:
        """Return a function that says, later, whether other work got in the way meanwhile."""
        start, before = time.perf_counter(), preemptions()

        def warning():
            seconds, count = time.perf_counter() - start, preemptions() - before
            if count <= 20 * seconds:
                return None
            return f"put off the CPU {count / seconds:.0f} times a second: other work was running"

        return warning

    def limits(self, dtypes: list[str]) -> dict[str, float]:
        rates = {name: matmul_rate(getattr(torch, name)) for name in dtypes}
        return rates | {"read": read_bandwidth()}

    def measures(self, runs: list, copies: int, many_calls: bool) -> list[tuple[str, Callable]]:
        """Return ("wall", function that returns the seconds of one call) for each of ``runs``.

        Args:
            runs: functions without arguments.
            copies: unused: the caller's functions take their copies in turn.
            many_calls: time stretches of calls, for calls too short for the clock.
        """
        calls = 1
        for run in runs:  # threads started, allocator and dispatcher warm
            run()
            if many_calls:
                start = time.perf_counter()
                run()
                fit = int(STRETCH_S / (time.perf_counter() - start))
                calls = max(calls, min(MAX_CALLS, fit))

        def stretch(run):
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls

        return [("wall", functools.partial(stretch, run)) for run in runs]
