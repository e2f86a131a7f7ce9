"""The machine under the benchmark: what it is, what it can do at most, and whether it is ours."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BANDWIDTH_BYTES = 256 << 20  # well past any cache that a read could come from


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
    """Return the checkout's short commit, with ``+dirty`` for changed tracked files, or unknown."""

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


def best_seconds(function, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth() -> float:
    """Return bytes per second of the fastest of torch's streaming reads, with torch's threads."""
    data = torch.ones(BANDWIDTH_BYTES // 4)
    as_ints = data.view(torch.int32)
    readers = (data.sum, lambda: torch.dot(data, data), as_ints.max)
    return BANDWIDTH_BYTES / min(best_seconds(reader, 5) for reader in readers)


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


def describe(threads: int) -> dict:
    """Return the header of a run: machine, versions, commit, load."""
    import flashinfer_lite
    from flashinfer_lite.testing import current_isa

    return {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": threads,
        "isa": current_isa(),
        "caches": cache_sizes(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "flashinfer_lite": getattr(flashinfer_lite, "__version__", "unknown"),
        "commit": commit(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
