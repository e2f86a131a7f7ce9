"""Time flat_linear against torch.nn.functional.linear: ``python bench/flat_linear.py --help``.

Both kernels and torch's run in the same rounds, one call after another in turning order. Outputs
are checked against float64 first. Weights are cold: copies of four times the last-level cache, or
a gigabyte, are taken in turn, as the layers of a model are; ``--warm`` uses one copy.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # built but not installed works too

import machine  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timing import quantile  # noqa: E402

from bench import write  # noqa: E402
from flashinfer_lite import flat_linear, reference  # noqa: E402
from flashinfer_lite.testing import assert_close  # noqa: E402

# [N, K] of the models' layers, the output layer last.
MODELS = {
    "smollm2-135m": [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)],
    "llama2-7b": [(12288, 4096), (4096, 4096), (11008, 4096), (4096, 11008)],
}
IMPLS = ("gemv", "flat_gemm", "vendor")
MAX_COPIES_BYTES = 1 << 30
MAX_ROUNDS, MIN_ROUNDS = 300, 5
SATURATED = 0.9  # of the read bandwidth: there torch leaves nothing to win


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flat_linear.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own number")
    parser.add_argument("--seconds", type=float, default=0.3, help="per shape and implementation")
    parser.add_argument("--warm", action="store_true", help="one copy of the weight")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the calling thread's own time, for a busy machine; needs --threads 1",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "flat_linear.jsonl")
    args = parser.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        parser.error(f"--cpu-time: expected --threads 1, got {args.threads}")
    if min(args.rows) < 1:
        parser.error(f"--rows: expected 1 or more, got {min(args.rows)}")
    return args


def copies_for_cold(size: int, cache_bytes: int) -> int:
    """Return how many copies of a weight of ``size`` bytes no cache can hold."""
    return max(2, min(-(-4 * cache_bytes // size), MAX_COPIES_BYTES // size))


def check(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Hold both kernels to the tests' tolerance, on part of the weight's rows."""
    some = weight[:: max(weight.shape[0] // 256, 1)]
    oracle, eager = reference.linear(x, some, dtype=torch.float64), F.linear(x, some)
    for impl in ("gemv", "flat_gemm"):
        name = f"{impl} {list(x.shape)} {list(weight.shape)}"
        assert_close(flat_linear(x, some, impl=impl), oracle, eager, name)


def measure(x: torch.Tensor, weights, seconds: float, clock) -> dict[str, list[float]]:
    """Return the seconds of each call by implementation; ``weights`` yields the next copy."""
    calls = {
        "gemv": lambda: flat_linear(x, next(weights), impl="gemv"),
        "flat_gemm": lambda: flat_linear(x, next(weights), impl="flat_gemm"),
        "vendor": lambda: F.linear(x, next(weights)),
    }
    times = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds * len(calls)
    for number in range(MAX_ROUNDS):
        for turn in range(len(IMPLS)):
            name = IMPLS[(turn + number) % len(IMPLS)]
            start = clock()
            calls[name]()
            times[name].append(clock() - start)
        if number + 1 >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
    return times


def rows_of(model: str, args: argparse.Namespace, cache_bytes: int, clock):
    dtype = getattr(torch, args.dtype)
    for n, k in MODELS[model]:
        size = n * k * dtype.itemsize
        copies = 1 if args.warm else copies_for_cold(size, cache_bytes)
        weight = torch.randn(n, k).to(dtype)
        weights = itertools.cycle([weight.clone() for _ in range(copies)])
        for m in args.rows:
            x = torch.randn(m, k).to(dtype)
            check(x, weight)
            times = measure(x, weights, args.seconds, clock)
            medians = {name: quantile(samples, 0.5) for name, samples in times.items()}
            best = min(medians["gemv"], medians["flat_gemm"])
            yield {"op": "flat_linear", "model": model, "n": n, "k": k, "m": m} | {
                "dtype": args.dtype,
                "cold": not args.warm,
                "rounds": len(times["vendor"]),
                "seconds": medians,
                "seconds_p10": {name: quantile(s, 0.1) for name, s in times.items()},
                "bytes": size,
                "x_vendor": medians["vendor"] / best,
            }


def row_line(row: dict, read: float) -> str:
    cells = "".join(
        f"{row['seconds'][name] * 1e6:10.1f} us {row['bytes'] / row['seconds'][name] / 1e9:5.1f}"
        for name in IMPLS
    )
    share = row["bytes"] / min(row["seconds"][name] for name in IMPLS[:2]) / read
    return (
        f"{row['n']:6} x {row['k']:<6} M {row['m']:<3}{cells} {share:5.0%} {row['x_vendor']:6.2f}x"
    )


def summary(rows: list[dict], read: float) -> list[str]:
    """Return lines: the geometric mean, and the shapes where torch is faster."""
    ratios = []
    for row in rows:
        saturated = row["bytes"] / row["seconds"]["vendor"] >= SATURATED * read
        ratios.append(max(row["x_vendor"], 1.0) if saturated else row["x_vendor"])
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    lost = [f"{r['n']}x{r['k']} M {r['m']} {r['x_vendor']:.2f}x" for r in rows if r["x_vendor"] < 1]
    return [
        f"geometric mean {mean:.2f}x over {len(rows)} rows, the least {min(ratios):.2f}x",
        f"torch is faster at: {', '.join(lost) or 'none'}",
    ]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    cpu = machine.Cpu()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    header = cpu.describe(torch.get_num_threads())
    warnings = [] if args.cpu_time else cpu.warnings(header)
    read = machine.read_bandwidth(clock)
    print(f"{header['cpu']}, {header['threads']} threads, {header['isa']}, {header['commit']}")
    print(f"read {read / 1e9:.1f} GB/s; {'own time' if args.cpu_time else 'wall clock'}")
    for warning in warnings:
        print(f"WARNING: {warning}")
    print(f"{args.dtype}, {'warm' if args.warm else 'cold'} weights; median us and GB/s of")
    print(f"{'N x K':>12} {'':>10}{''.join(f'{name:>19}' for name in IMPLS)}  read  vs vendor")
    rows = []
    for model in args.model:
        for row in rows_of(model, args, cpu.last_level_bytes, clock):
            rows.append(row)
            print(row_line(row, read), flush=True)
    print("\n".join(summary(rows, read)))
    write(args.output, header | {"read": read, "command": sys.argv, "warnings": warnings}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
