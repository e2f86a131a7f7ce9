"""Peak memory of a causal prefill: how much each implementation's call adds to its process.

Every implementation runs in a process of its own, `python memory.py IMPL SHAPE DTYPE THREADS`,
which prints the bytes: those by which the resident memory's peak exceeds what was resident when the
call began, its inputs included. Its result is checked before the number is printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from shapes import Shape, parse

ROOT = Path(__file__).resolve().parent.parent
RESET_PEAK = Path("/proc/self/clear_refs")
# What is freed goes back to the system at once: else the call's tensors could lie in what making
# its inputs has left, and count as nothing.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
WARM_KEYS = 128  # threads started and libraries loaded before memory is looked at


def measure(op: str, shape: Shape, dtype_name: str, args, machine, limits) -> list[dict]:
    """Return a row with ``peak_bytes`` for every implementation; none where it cannot be told."""
    from implementations import candidates

    try:
        reset_peak()
    except OSError as error:
        print(f"\n  {op} {shape.name}: not here: a process cannot reset its peak: {error}")
        return []
    few = replace(shape, name="", seqlen_q=1, seqlen_kv=1)
    rows = []
    for name in candidates(few, "attention", getattr(torch, dtype_name)):
        if args.impl and not any(name.startswith(impl) for impl in args.impl):
            continue
        command = [sys.executable, __file__, name, shape.name, dtype_name]
        command.append(str(torch.get_num_threads()))
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | MALLOC)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            if name.startswith("ours"):
                raise AssertionError(f"{op} {shape.name} {name}: {reason}")
            print(f"  {name}: not here: {reason}")
            continue
        row = {"op": op, "shape": shape.name, "causal": shape.causal, "dtype": dtype_name}
        row |= {"impl": name, "cold": False, "rounds": 1, "x_sdpa": None}
        rows.append(row | {"peak_bytes": int(done.stdout)})
    return rows


def reset_peak() -> None:
    RESET_PEAK.write_text("5")


def resident(field: str) -> int:
    """Return VmRSS, what is resident now, or VmHWM, the most since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


def growth(name: str, text: str, dtype: torch.dtype) -> int:
    """Return the bytes that the call of one implementation adds; AssertionError if it is wrong."""
    from implementations import candidates
    from oracle import check

    model, _, size = text.partition("@")
    keys, times, batch_size = size.partition("x")
    few = f"{model}@{min(int(keys), WARM_KEYS)}{times}{batch_size}"
    candidates(parse(few, "memory"), "attention", dtype)[name].outputs()
    shape = parse(text, "memory")
    candidate = candidates(shape, "attention", dtype)[name]
    reset_peak()
    before = resident("VmRSS")
    result = candidate.outputs()
    added = resident("VmHWM") - before
    found = {name: replace(candidate, outputs=lambda: result)}
    for error in check(shape, "attention", dtype, found).values():
        raise AssertionError(error)
    return added


def main() -> None:
    name, text, dtype_name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with torch.inference_mode():
        print(growth(name, text, getattr(torch, dtype_name)))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
