"""Time flashinfer_lite against torch's SDPA: ``make bench``, or ``python bench/bench.py --help``.

Every implementation of a shape runs in the same rounds, one call after another in turning order, so
that a busy moment hits them all. Outputs are checked against an fp64 oracle first; a wrong one ends
the run without a number. docs/benchmarks.md says how to read the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # built but not installed works too

import memory  # noqa: E402
import torch  # noqa: E402
import whole  # noqa: E402
from goals import verdicts  # noqa: E402
from shapes import DEFAULTS, GPU_DEFAULTS, ONE_DTYPE, OPS, Shape, parse  # noqa: E402
from timing import compare_with_sdpa, spread, time_interleaved  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16", "float64")
COLD_OPS = ("decode",)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "stand-in"),
        default="cpu",
        help="stand-in: the GPU's path on the CPU, to test the benchmark itself",
    )
    parser.add_argument("--op", nargs="+", choices=OPS, help="default: all that the device has")
    parser.add_argument(
        "--shapes", nargs="+", metavar="MODEL@KEYS[xBATCH]", help="default: a few for each op"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: the device's usual")
    parser.add_argument(
        "--impl", nargs="+", help="only implementations whose name starts like this"
    )
    parser.add_argument(
        "--no-causal", action="store_true", help="attention and attention_bwd without a causal mask"
    )
    parser.add_argument("--warm", action="store_true", help="decode from a warm cache")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own number")
    parser.add_argument(
        "--seconds", type=float, help="of timing per shape, dtype and implementation"
    )
    parser.add_argument(
        "--within", type=float, default=float("inf"), help="begin no shape after so many seconds"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench.jsonl")
    args = parser.parse_args(argv)
    if args.threads < 0:
        parser.error(f"--threads: expected 0 (torch's own) or more, got {args.threads}")
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds: expected more than 0, got {args.seconds}")
    if args.device != "cpu" and (missing := set(args.op or ()) - set(GPU_DEFAULTS)):
        names = ", ".join(GPU_DEFAULTS)
        parser.error(f"--op: expected some of {names} on a GPU, got {', '.join(sorted(missing))}")
    try:
        args.work = list(dict.fromkeys(work_of(args)))
    except ValueError as error:
        parser.error(f"--{error}")
    return args


def work_of(args: argparse.Namespace):
    """Yield (op, shape, dtype or None for the device's usual ones).

    "full" is attention without the causal mask; on a GPU attention comes with the mask and without.
    """
    defaults = DEFAULTS if args.device == "cpu" else GPU_DEFAULTS
    for op in args.op or defaults:
        optional = op in ("attention", "attention_bwd")
        masks = (False,) if args.no_causal and optional else (True,)
        if args.device != "cpu" and op == "attention" and not args.no_causal:
            masks = (True, False)
        for text in args.shapes or defaults.get(op, ()):
            for causal in masks:
                shape = parse(text, op, causal=causal)
                for dtype in args.dtype or (ONE_DTYPE.get(op),):
                    yield "attention" if op == "full" else op, shape, dtype


def make_machine(name: str):
    if name == "cpu":
        import machine

        return machine.Cpu()
    import device

    return device.Gpu() if name == "cuda" else device.StandIn()


def measure(op: str, shape: Shape, dtype_name: str, args, machine, limits) -> list[dict]:
    """Check, then time every implementation of one shape; return one row for each."""
    from implementations import copies_for_cold
    from roofline import cost, implausible

    dtype = getattr(torch, dtype_name)
    cold = op in COLD_OPS and not args.warm
    copies = copies_for_cold(shape, dtype, machine.last_level_bytes) if cold else 1
    # A window is held against the same attention without one.
    problems = {"": shape}
    if op == "window":
        problems["-full"] = replace(shape, window_left=-1)
    found = {}
    with torch.inference_mode(op != "attention_bwd"):
        for suffix, problem in problems.items():
            checked = right_ones(op, problem, dtype, copies, args, machine)
            found |= {name + suffix: (problem, one) for name, one in checked.items()}
        if not found:
            return []
        runs = [candidate.run for _, candidate in found.values()]
        modes, measures = zip(*machine.measures(runs, copies, op == "overhead"), strict=True)
        times = time_interleaved(
            measures, args.seconds or machine.default_seconds, machine.min_rounds
        )
    rows = []
    for name, mode, samples in zip(found, modes, times, strict=True):
        problem, candidate = found[name]
        chosen = candidate.explain() if candidate.explain else None
        price = cost(problem, op, dtype.itemsize)
        at_least = price.seconds_at_least(limits[dtype_name], limits["read"])
        timed = spread(samples)
        rows.append(
            {
                "op": op,
                "shape": shape.name,
                "causal": shape.causal,
                "dtype": dtype_name,
                "impl": name,
                "kernel": chosen and chosen.kernel,
                "kv_splits": chosen and chosen.kv_splits,
                "cold": cold,
                "mode": mode,
                **timed,
                "flops": price.flops,
                "bytes": price.bytes,
                "flops_per_s": price.flops / timed["seconds"],
                "bytes_per_s": price.bytes / timed["seconds"],
                "roofline": at_least / timed["seconds"],
            }
        )
    if machine.peers == "gpu" and (wrong := [w for w in map(implausible, rows) if w]):
        raise AssertionError(f"{op} {shape.name} {'; '.join(wrong)}")
    compare_with_sdpa(rows)
    return rows


def right_ones(op: str, shape: Shape, dtype: torch.dtype, copies: int, args, machine) -> dict:
    """Return the implementations that can run here and are right; AssertionError if ours is not."""
    from implementations import candidates, refused
    from oracle import check

    found = candidates(shape, op, dtype, copies, machine.device, machine.peers)
    if args.impl:
        found = {n: c for n, c in found.items() if any(n.startswith(i) for i in args.impl)}
    for name, reason in refused(found).items():
        print(f"  {name}: not here: {reason}")
    if found:
        for name, error in check(shape, op, dtype, found, machine.device).items():
            print(f"  {name}: WRONG, not timed: {error}")
            del found[name]
    return found


def scaled(rate: float | None, unit: str) -> str:
    if rate is None:
        return " " * (9 + len(unit))
    prefix, size = ("T", 1e12) if rate >= 1e12 else ("G", 1e9)
    return f"{rate / size:7.2f} {prefix}{unit}"


def row_line(row: dict) -> str:
    if row["op"] == "memory":
        return f"  {row['impl']:21} {row['peak_bytes'] / 2**20:10.2f} MiB"
    micro = 1e6
    p10_p90 = f"[{row['seconds_p10'] * micro:.4g} - {row['seconds_p90'] * micro:.4g}]"
    ratio = f"{row['x_sdpa']:.2f}x" if row["x_sdpa"] else "-"
    share = row["roofline"] if row["op"] != "overhead" else None
    roofline = f"{100 * share:.0f} %" if share else "-"
    return (
        f"  {row['impl']:21} {row['seconds'] * micro:10.4g} us {p10_p90:>22} "
        f"{scaled(row['flops_per_s'], 'FLOP/s')} {scaled(row['bytes_per_s'], 'B/s')} "
        f"{roofline:>6} {ratio:>7}"
    )


def title_of(op: str, shape: str, dtype: str, causal: bool) -> str:
    mask = "" if op != "attention" else " causal" if causal else " full"
    return f"{op} {shape} {dtype}{mask}"


def print_table(rows: list[dict]) -> None:
    first = rows[0]
    title = title_of(*(first[field] for field in ("op", "shape", "dtype", "causal")))
    cold = ", cold cache" if first["cold"] else ""
    print(f"\n{title}{cold}, {first['rounds']} round{'s' if first['rounds'] > 1 else ''}")
    for row in rows:
        print(row_line(row), flush=True)


def run_all(args, machine, limits) -> tuple[list[dict], list[str], list[str]]:
    """Measure every shape; return the rows, what was wrong, and what there was no time for."""
    rows, wrong, left_out = [], [], []
    start = time.perf_counter()
    others = {"memory": memory.measure, "model": whole.measure}
    for op, shape, only_dtype in args.work:
        for dtype_name in [only_dtype] if only_dtype else machine.default_dtypes:
            title = title_of(op, shape.name, dtype_name, shape.causal)
            if time.perf_counter() - start > args.within:
                left_out.append(title)
                continue
            try:
                measured = others.get(op, measure)(op, shape, dtype_name, args, machine, limits)
            except AssertionError as error:
                # No number for a wrong result; the other shapes still get theirs.
                print(f"\nWRONG, no number: {dtype_name} {error}")
                wrong.append(f"{title}: {error}")
                continue
            for _, part in itertools.groupby(measured, lambda row: row["op"]):
                print_table(list(part))
            rows += measured
    if left_out:
        print(f"\nno time for: {', '.join(left_out)}")
    return rows, wrong, left_out


def write(output: Path, header: dict, rows: list[dict]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in [header, *rows]))
    os.replace(partial, output)
    print(f"\n{output}")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    import flashinfer_lite

    if not flashinfer_lite.built:
        print('bench: flashinfer_lite is not built: run "make build"', file=sys.stderr)
        return 1
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"bench: --device cuda: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    machine = make_machine(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    header = machine.describe(torch.get_num_threads())
    warnings = machine.warnings(header)
    limits = machine.limits(args.dtype or list(machine.default_dtypes))
    lines = machine.lines(header, limits)
    print("\n".join(lines + [f"WARNING: {warning}" for warning in warnings]))
    print("columns: median [p10 - p90], rates, share of the roofline, speed against the best sdpa")

    busy = machine.watch()
    rows, wrong, left_out = run_all(args, machine, limits)
    if args.impl and not rows and not wrong and not left_out:
        print(f"bench: --impl {' '.join(args.impl)}: no such implementation", file=sys.stderr)
        return 2
    if warning := busy():
        warnings.append(warning)
        print(f"\nWARNING: {warning}")
    if machine.peers == "cpu" and (table := verdicts(rows, machine.last_level_bytes)):
        print("\n" + "\n".join(table))
    header |= {"limits": limits, "command": sys.argv, "warnings": warnings, "time": time.time()}
    write(args.output, header | {"wrong": wrong, "left_out": left_out}, rows)
    from picture import draw

    picture = args.output.with_suffix(".png")
    if machine.peers == "cpu" and draw(picture, lines, rows, warnings):
        print(picture)
    if wrong:
        print(f"bench: {len(wrong)} wrong results", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nbench: interrupted", file=sys.stderr)
        sys.exit(130)
