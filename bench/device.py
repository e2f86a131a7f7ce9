"""The GPU under the benchmark, and a stand-in that walks the same path where there is none.

A machine object tells bench.py what it times on: its device, how one call is timed, what it can do
at most, and how to describe it. `machine.Cpu` is the third of the kind.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from smi import smi

GRAPH_BELOW_S = 50e-6  # shorter calls are timed inside a CUDA graph: launching them takes as long
GRAPH_CALLS = 20  # in one graph; more where there are more copies of the inputs
HOST_CALLS = 200
OCCUPY_CYCLES = 400_000  # about 0.2 ms in which the host gets ahead of the GPU
MATMUL_SIZE = 8192
COPY_BYTES = 2 << 30
LIMIT_REPEATS = 10
DRIFT = 0.1  # of the limits from the run's start to its end, before it is worth a warning


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


class Gpu:
    """CUDA device 0."""

    peers = "gpu"
    default_dtypes = ("bfloat16",)
    min_rounds = 10
    default_seconds = 0.3

    def __init__(self):
        self.device = torch.device("cuda", 0)
        self.properties = torch.cuda.get_device_properties(self.device)
        self.last_level_bytes = self.properties.L2_cache_size

    def describe(self, threads: int) -> dict:
        import machine

        return {
            "gpu": self.properties.name,
            "sms": self.properties.multi_processor_count,
            "memory_bytes": self.properties.total_memory,
            "caches": {"L2": self.last_level_bytes},
            "smi": smi(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "threads": threads,
        } | machine.versions()

    def lines(self, header: dict, limits: dict) -> list[str]:
        rates = ", ".join(f"{n} {r / 1e12:.0f} TFLOP/s" for n, r in limits.items() if n != "read")
        clocks = ", ".join(f"{name} {value}" for name, value in header["smi"].items())
        l2 = header["caches"]["L2"] >> 20
        return [
            f"{header['gpu']}, {header['sms']} SMs, L2 {l2} MiB; {clocks}",
            f"flashinfer_lite {header['flashinfer_lite']} ({header['commit']}), torch "
            f"{header['torch']}, CUDA {header['cuda']}, cuDNN {header['cudnn']}",
            f"measured here: copy {limits['read'] / 1e12:.2f} TB/s; matmul {rates}",
        ]

    def warnings(self, header: dict) -> list[str]:
        return []

    def watch(self) -> Callable[[], str | None]:
        """Return a function that says, later, whether the GPU has slowed down meanwhile."""
        before = self.limits(list(self.default_dtypes))

        def warning():
            after = self.limits(list(self.default_dtypes))
            slower = {name: rate / before[name] for name, rate in after.items()}
            if min(slower.values()) > 1 - DRIFT:
                return None
            return f"the limits, measured again at the end, are {slower} of what they were"

        return warning

    def limits(self, dtypes: list[str]) -> dict[str, float]:
        """Return the FLOP/s of a large matmul for each dtype, and under "read" the bytes per second
        of a device copy, which reads and writes."""
        found = {}
        for name in dtypes:
            a, b = (
                torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=self.device).to(getattr(torch, name))
                for _ in range(2)
            )
            found[name] = 2 * MATMUL_SIZE**3 / self.typical(lambda a=a, b=b: torch.mm(a, b))
        source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        found["read"] = 2 * COPY_BYTES / self.typical(lambda: target.copy_(source))
        return found

    def typical(self, run: Callable) -> float:
        for _ in range(3):
            run()
        one = self.by_events(run)
        return median([one() for _ in range(LIMIT_REPEATS)])

    def by_events(self, run: Callable, calls: int = 1) -> Callable[[], float]:
        """Return a function that makes one call of ``run`` and returns the seconds of each of the
        ``calls`` in it. The GPU is kept busy first, so that waiting for the host is not timed."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def measure():
            torch.cuda._sleep(OCCUPY_CYCLES)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) * 1e-3 / calls

        return measure

    def by_graph(self, run: Callable, calls: int) -> Callable[[], float]:
        """The same for short calls: ``calls`` of them, captured once, replayed as one."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        graph.replay()
        return self.by_events(graph.replay, calls)

    def by_host(self, run: Callable) -> Callable[[], float]:
        """The same by the host's clock, for calls that cost the host more than the GPU."""

        def measure():
            self.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                run()
            self.synchronize()
            return (time.perf_counter() - start) / HOST_CALLS

        return measure

    def synchronize(self):
        torch.cuda.synchronize(self.device)

    def measures(self, runs: list, copies: int, many_calls: bool) -> list[tuple[str, Callable]]:
        """Return (mode, function that returns the seconds of one call) for each of ``runs``.

        Args:
            runs: functions without arguments.
            copies: how many sets of inputs a call takes in turn; a graph holds a call of each.
            many_calls: time what the host spends on a call.
        """
        return [self._measure(run, copies, many_calls) for run in runs]

    def _measure(self, run, copies, many_calls):
        for _ in range(3):
            run()
        if many_calls:
            return "host", self.by_host(run)
        events = self.by_events(run)
        if median([events() for _ in range(5)]) >= GRAPH_BELOW_S:
            return "events", events
        try:
            # Whole turns through the copies, and long enough for the start not to count.
            return "graph", self.by_graph(run, copies * max(1, GRAPH_CALLS // copies))
        except RuntimeError as error:
            self.synchronize()
            print(f"  no graph of this one: {str(error).splitlines()[0]}")
            return "events", events


class StandIn(Gpu):
    """The path of `Gpu` on the CPU, for tests of the benchmark: its times mean nothing."""

    default_seconds = 0.01

    def __init__(self):
        self.device = torch.device("cpu")
        self.last_level_bytes = 1 << 16

    def describe(self, threads: int) -> dict:
        import machine

        header = {"gpu": "stand-in", "sms": 1, "memory_bytes": 0, "smi": {}, "threads": threads}
        header |= {"caches": {"L2": self.last_level_bytes}, "cuda": None, "cudnn": None}
        return header | machine.versions()

    def synchronize(self):
        pass

    def limits(self, dtypes):
        return dict.fromkeys([*dtypes, "read"], 1e15)

    def by_events(self, run, calls=1):
        def measure():
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) / calls

        return measure

    def by_graph(self, run, calls):
        def replay():
            for _ in range(calls):
                run()

        return self.by_events(replay, calls)
