"""The one JSON of a run, and the tables that are printed last."""

import hashlib
import json
import os
import time
from pathlib import Path

SCHEMA = 1
RIVALS = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex")
LOG_NAME = "gpu-logs.txt"


def sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def source_files(folder: Path) -> list[Path]:
    """The files below a folder, without what Python keeps beside its sources."""
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return sorted(path for path in paths if path.is_file())


def tree_sha256(folder: Path) -> str:
    """Hash names and contents of a folder's files: which sources, where there is no git."""
    digest = hashlib.sha256()
    for path in source_files(folder):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def problem_of(row: dict) -> tuple:
    return row["op"], row["shape"], row["causal"], row["dtype"]


def comparisons(rows: list[dict]) -> list[dict]:
    """Return one dict per problem: our time, share of the roofline, and speed against each rival.

    A rival that comes in several ways (packed or not) counts as the fastest of them.
    """
    problems: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        problems.setdefault(problem_of(row), {})[row["impl"]] = row
    found = []
    for (op, shape, causal, dtype), by_name in problems.items():
        if "ours" not in by_name:
            continue
        ours = by_name["ours"]
        speed = {}
        for rival in RIVALS:
            times = [r["seconds"] for name, r in by_name.items() if name.startswith(rival)]
            if times:
                speed[rival] = min(times) / ours["seconds"]
        found.append(
            {
                "op": op,
                "shape": shape,
                "causal": causal,
                "dtype": dtype,
                "seconds": ours["seconds"],
                "mode": ours["mode"],
                "kernel": ours["kernel"],
                "kv_splits": ours["kv_splits"],
                "flops_per_s": ours["flops_per_s"],
                "bytes_per_s": ours["bytes_per_s"],
                "roofline": ours["roofline"],
                "speed": speed,
            }
        )
    return found


def table(heads: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [heads, *lines]
    )


def bench_table(found: list[dict]) -> str:
    """Our row of every problem; a speed below 1 has a mark, and those are counted below."""
    heads = ["problem", "us", "mode", "TFLOP/s", "TB/s", "roofline"]
    heads += [*(f"x {rival.removeprefix('sdpa-')}" for rival in RIVALS), "kernel"]
    lines, slower = [], 0
    for one in found:
        mask = "" if one["op"] != "attention" else " causal" if one["causal"] else " full"
        cells = [one["speed"].get(rival) for rival in RIVALS]
        slower += any(cell is not None and cell < 1 for cell in cells)
        lines.append(
            [
                f"{one['op']} {one['shape']}{mask}",
                f"{one['seconds'] * 1e6:.4g}",
                one["mode"],
                f"{one['flops_per_s'] / 1e12:.4g}",
                f"{one['bytes_per_s'] / 1e12:.3g}",
                "-" if one["op"] == "overhead" else f"{100 * one['roofline']:.0f} %",
                *("-" if c is None else f"{c:.2f}{' <' if c < 1 else ''}" for c in cells),
                f"{one['kernel']} x{one['kv_splits']}",
            ]
        )
    return table(heads, lines) + f"\nslower than a rival on {slower} of {len(found)} problems (<)"


def stage_table(outcomes: list[dict]) -> str:
    lines = [
        [o["stage"], o["status"], f"{o['seconds']:.0f} of {o['limit_s']:.0f} s", o["summary"]]
        for o in outcomes
    ]
    return table(["stage", "status", "time", "what"], lines)


def assemble(outcomes: list[dict], facts: dict) -> dict:
    """Return the run as one object. The benchmark's rows move to the top level, as do the machine's
    facts, so that a reader finds them without knowing the stages."""
    details = {o["stage"]: o["details"] for o in outcomes}
    bench = details.get("bench", {})
    rows = bench.pop("rows", [])
    return {
        "schema": SCHEMA,
        "time": time.time(),
        **facts,
        "machine": details.get("doctor", {}),
        "limits": bench.get("header", {}).get("limits", {}),
        "stages": outcomes,
        "comparisons": comparisons(rows),
        "rows": rows,
    }


def write(path: Path, log: Path, result: dict, logs: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
    text = "".join(f"==== {name}\n{log}\n" for name, log in logs.items())
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(text)
