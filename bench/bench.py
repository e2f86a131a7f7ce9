"""Time flashinfer_lite against torch's SDPA: ``make bench``, or ``python bench/bench.py --help``.

Every implementation of a shape runs in the same rounds, one call after another in turning order, so
that a busy moment hits them all. Outputs are checked against an fp64 oracle first; a wrong one ends
the run without a number. docs/benchmarks.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # built but not installed works too

import torch  # noqa: E402
from shapes import DEFAULTS, OPS, Shape, parse  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULT_DTYPES = ("float32", "bfloat16")
MIN_ROUNDS, MAX_ROUNDS = 5, 200
COLD_OPS = ("decode",)
MAX_CALLS, STRETCH_S = 500, 0.02  # overhead: calls in one timed stretch, too short for the clock
DEFAULT_CACHE_BYTES = 32 << 20  # where the system does not tell


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), help="default: all")
    parser.add_argument(
        "--shapes", nargs="+", metavar="MODEL@KEYS[xBATCH]", help="default: a few for each op"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DEFAULT_DTYPES))
    parser.add_argument(
        "--impl", nargs="+", help="only implementations whose name starts like this"
    )
    parser.add_argument("--no-causal", action="store_true", help="attention without a causal mask")
    parser.add_argument("--warm", action="store_true", help="decode from a warm cache")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own number")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="of timing per shape, dtype and implementation"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench.jsonl")
    args = parser.parse_args(argv)
    if args.threads < 0:
        parser.error(f"--threads: expected 0 (torch's own) or more, got {args.threads}")
    if not args.seconds > 0:
        parser.error(f"--seconds: expected more than 0, got {args.seconds}")
    try:
        args.work = [
            (op, parse(text, op, causal=not args.no_causal))
            for op in args.op
            for text in args.shapes or DEFAULTS[op]
        ]
    except ValueError as error:
        parser.error(f"--{error}")
    return args


def time_interleaved(
    runs: list, seconds_each: float, many_calls: bool = False
) -> list[list[float]]:
    """Return the seconds per call of each function, measured in common rounds.

    Args:
        runs: functions without arguments.
        seconds_each: how long each may take in all; at least 5 rounds, at most 200.
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
    times: list[list[float]] = [[] for _ in runs]
    deadline = time.perf_counter() + seconds_each * len(runs)
    for number in range(MAX_ROUNDS):
        for turn in range(len(runs)):
            index = (turn + number) % len(runs)
            run = runs[index]
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[index].append((time.perf_counter() - start) / calls)
        if number + 1 >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
    return times


def quantile(values: list[float], q: float) -> float:
    """Return the q-quantile, interpolated linearly."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def measure(op: str, shape: Shape, dtype_name: str, args, limits, caches) -> list[dict]:
    """Check, then time every implementation of one shape; return one row for each."""
    from implementations import candidates, check, copies_for_cold
    from roofline import cost

    dtype = getattr(torch, dtype_name)
    cold = op in COLD_OPS and not args.warm
    last_level = max(caches.values(), default=DEFAULT_CACHE_BYTES)
    copies = copies_for_cold(shape, dtype, last_level) if cold else 1
    found = candidates(shape, op, dtype, copies)
    if args.impl:
        found = {n: c for n, c in found.items() if any(n.startswith(i) for i in args.impl)}
    if not found:
        return []
    with torch.inference_mode(op != "attention_bwd"):
        check(shape, op, dtype, found)
        times = time_interleaved(
            [candidate.run for candidate in found.values()],
            args.seconds,
            many_calls=op == "overhead",
        )
    price = cost(shape, op, dtype.itemsize)
    rows = []
    for name, samples in zip(found, times, strict=True):
        median = quantile(samples, 0.5)
        rows.append(
            {
                "op": op,
                "shape": shape.name,
                "causal": shape.causal,
                "dtype": dtype_name,
                "impl": name,
                "cold": cold,
                "rounds": len(samples),
                "seconds": median,
                "seconds_p10": quantile(samples, 0.1),
                "seconds_p90": quantile(samples, 0.9),
                "flops": price.flops,
                "bytes": price.bytes,
                "flops_per_s": price.flops / median,
                "bytes_per_s": price.bytes / median,
                "roofline": price.seconds_at_least(limits[dtype_name], limits["read"]) / median,
            }
        )
    rivals = [row["seconds"] for row in rows if row["impl"].startswith("sdpa")]
    for row in rows:
        row["x_sdpa"] = min(rivals) / row["seconds"] if rivals else None
    return rows


def header_lines(header: dict, limits: dict) -> list[str]:
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


def row_line(row: dict) -> str:
    micro = 1e6
    spread = f"[{row['seconds_p10'] * micro:.4g} - {row['seconds_p90'] * micro:.4g}]"
    ratio = f"{row['x_sdpa']:.2f}x" if row["x_sdpa"] else "-"
    roofline = "-" if row["op"] == "overhead" else f"{100 * row['roofline']:.0f} %"
    return (
        f"  {row['impl']:14} {row['seconds'] * micro:10.4g} us {spread:>22} "
        f"{row['flops_per_s'] / 1e9:8.1f} GFLOP/s {row['bytes_per_s'] / 1e9:7.2f} GB/s "
        f"{roofline:>6} {ratio:>7}"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    import flashinfer_lite

    if not flashinfer_lite.built:
        print('bench: flashinfer_lite is not built: run "make build"', file=sys.stderr)
        return 1
    import machine

    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    header = machine.describe(threads)
    warnings = [w for w in [machine.load_warning(threads)] if w]
    limits = {name: machine.matmul_rate(getattr(torch, name)) for name in args.dtype}
    limits["read"] = machine.read_bandwidth()
    lines = header_lines(header, limits)
    print("\n".join(lines))
    for warning in warnings:
        print(f"WARNING: {warning}")
    print("columns: median [p10 - p90], rates, share of the roofline, speed against the best sdpa")

    rows, failures = [], 0
    start, preempted = time.perf_counter(), machine.preemptions()
    for op, shape in args.work:
        for dtype_name in args.dtype:
            try:
                measured = measure(op, shape, dtype_name, args, limits, header["caches"])
            except AssertionError as error:
                # No number for a wrong result; the other shapes still get theirs.
                print(f"\nWRONG, not timed: {dtype_name} {error}")
                failures += 1
                continue
            if measured:
                cold = ", cold cache" if measured[0]["cold"] else ""
                print(f"\n{op} {shape.name} {dtype_name}{cold}, {measured[0]['rounds']} rounds")
            for row in measured:
                print(row_line(row), flush=True)
            rows += measured
    if not rows and not failures:
        print(f"bench: --impl {' '.join(args.impl)}: no such implementation", file=sys.stderr)
        return 2
    preempted = machine.preemptions() - preempted
    seconds = time.perf_counter() - start
    if preempted > 20 * seconds:
        warnings.append(
            f"put off the CPU {preempted / seconds:.0f} times a second: other work was running"
        )
        print(f"\nWARNING: {warnings[-1]}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    header |= {"limits": limits, "command": sys.argv, "warnings": warnings, "time": time.time()}
    partial = args.output.with_name(args.output.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in [header, *rows]))
    os.replace(partial, args.output)
    print(f"\n{args.output}")
    from picture import draw

    picture = args.output.with_suffix(".png")
    if draw(picture, lines, rows, warnings):
        print(picture)
    if failures:
        print(f"bench: {failures} wrong results", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nbench: interrupted", file=sys.stderr)
        sys.exit(130)
