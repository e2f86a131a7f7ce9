"""What the CPU half is to reach against SDPA at its best, and whether a run's rows reach it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from shapes import parse

SHARE_OF_READING = 0.8  # of a decode whose K and V do not fit the caches
PAGED = 1.1  # times as long as a dense cache, at most
WINDOW = 1.2  # times the share of the full attention's time that its pairs are, at most
MEMORY = 1.0  # times what the call of the most frugal SDPA adds to a process, at most


@dataclass(frozen=True)
class Goal:
    """Every shape that `matches` is to be `wanted` times as fast as the fastest SDPA."""

    work: str
    matches: Callable[[dict], bool]
    wanted: float


def _is(op: str, dtype: str | None = None, causal: bool | None = None) -> Callable[[dict], bool]:
    def matches(row: dict) -> bool:
        return (
            row["op"] == op
            and dtype in (None, row["dtype"])
            and (op != "attention" or causal in (None, row["causal"]))
        )

    return matches


def _decode(groups: range) -> Callable[[dict], bool]:
    def matches(row: dict) -> bool:
        return (
            row["op"] == "decode"
            and row["dtype"] == "bfloat16"
            and parse(row["shape"], "decode").group_size in groups
        )

    return matches


GOALS = (
    Goal("prefill bf16, causal", _is("attention", "bfloat16", True), 1.5),
    Goal("prefill bf16, full", _is("attention", "bfloat16", False), 1.5),
    Goal("prefill bf16, padded", _is("padded", "bfloat16"), 1.5),
    Goal("prefill fp32", _is("attention", "float32"), 1.1),
    Goal("backward bf16", _is("attention_bwd", "bfloat16"), 1.5),
    Goal("backward fp32", _is("attention_bwd", "float32"), 1.1),
    Goal("decode bf16, no groups", _decode(range(1, 2)), 1.2),
    Goal("decode bf16, groups of 2 to 7", _decode(range(2, 8)), 2.0),
    Goal("decode bf16, groups of 8 and more", _decode(range(8, 1000)), 3.0),
    Goal("a call of 16 keys", _is("overhead"), 1.0),
    Goal("a patched model, prefill", _is("model_prefill"), 1.3),
    Goal("a patched model, decode", _is("model_decode"), 1.6),
)


def best_of_ours(rows: list[dict]) -> list[dict]:
    """One row for each shape, dtype and mask: ours in its faster layout, as SDPA is in its."""
    best: dict[tuple, dict] = {}
    for row in rows:
        if row["impl"] in ("ours", "ours-bhsd") and row["x_sdpa"]:
            key = row["op"], row["shape"], row["causal"], row["dtype"]
            if key not in best or row["x_sdpa"] > best[key]["x_sdpa"]:
                best[key] = row
    return list(best.values())


def _paged(rows: list[dict]) -> list[str]:
    """A line for each decode that pages slow down by more than PAGED."""
    seconds = {
        (r["shape"], r["dtype"], r["impl"]): r["seconds"] for r in rows if r["op"] == "decode"
    }
    slow = (
        (shape, dtype, impl.removeprefix("ours-paged"), time / seconds[shape, dtype, "ours"])
        for (shape, dtype, impl), time in seconds.items()
        if impl.startswith("ours-paged") and (shape, dtype, "ours") in seconds
    )
    return [
        f"  decode {shape} {dtype}: in pages of {size} {ratio:.2f} times as long as in one piece"
        for shape, dtype, size, ratio in slow
        if ratio > PAGED
    ]


def _reading(best: list[dict], last_level_bytes: int) -> list[str]:
    """The verdict on the decodes past the caches, and a line for each that reads too slowly."""
    large = [r for r in best if r["op"] == "decode" and r["bytes"] > last_level_bytes]
    if not large:
        return []
    slow = [row for row in large if row["roofline"] < SHARE_OF_READING]
    least = min(large, key=lambda row: row["roofline"])
    verdict = f"MISSED by {least['shape']}" if slow else "met"
    wanted, reached = (f"{100 * share:.0f} %" for share in (SHARE_OF_READING, least["roofline"]))
    return [
        f"  {'decode past the caches, of reading':34} {wanted:>6} {reached:>8} {'':8}  {verdict}",
        *(
            f"  decode {row['shape']} {row['dtype']}: {100 * row['roofline']:.0f} % of the roofline"
            for row in slow
        ),
    ]


def _window_ratios(rows: list[dict]):
    """Yield (shape, share of the time of full attention divided by the share of its pairs)."""
    of = {(r["shape"], r["dtype"], r["impl"]): r for r in rows if r["op"] == "window"}
    for (shape, dtype, impl), row in of.items():
        full = of.get((shape, dtype, f"{impl}-full"))
        if full:
            yield shape, row["seconds"] / full["seconds"] * full["flops"] / row["flops"]


def _memory_ratios(rows: list[dict]):
    """Yield (shape, what ours adds to its process divided by the least that an SDPA does)."""
    problems: dict[tuple, dict[str, int]] = {}
    for row in rows:
        if row["op"] == "memory":
            of = problems.setdefault((row["shape"], row["dtype"]), {})
            of[row["impl"]] = row["peak_bytes"]
    for (shape, _), peaks in problems.items():
        rivals = [peak for impl, peak in peaks.items() if impl.startswith("sdpa")]
        if rivals and "ours" in peaks:
            yield shape, peaks["ours"] / max(min(rivals), 1)


def _at_most(rows: list[dict]) -> list[str]:
    """The verdicts on what is to be small, under a heading of their own."""
    goals = (
        ("a window's time, to its pairs", WINDOW, _window_ratios),
        ("peak memory of a prefill, to sdpa", MEMORY, _memory_ratios),
    )
    lines = []
    for work, wanted, ratios_of in goals:
        if ratios := list(ratios_of(rows)):
            shape, most = max(ratios, key=lambda found: found[1])
            verdict = "met" if most <= wanted else f"MISSED by {shape}"
            lines.append(f"  {work:34} {wanted:5.1f}x {most:7.2f}x {'':8}  {verdict}")
    return [f"  {'':34} {'at most':>6} {'most':>7}", *lines] if lines else []


def _at_least(best: list[dict]) -> list[str]:
    """The verdicts on the speed against SDPA."""
    lines = []
    for goal in GOALS:
        found = [row for row in best if goal.matches(row)]
        if not found:
            continue
        ratios = [row["x_sdpa"] for row in found]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        least = min(found, key=lambda row: row["x_sdpa"])
        verdict = "met" if min(ratios) >= goal.wanted else f"MISSED by {least['shape']}"
        lines.append(
            f"  {goal.work:34} {goal.wanted:5.1f}x {min(ratios):7.2f}x {mean:7.2f}x  {verdict}"
        )
    return lines


def verdicts(rows: list[dict], last_level_bytes: int) -> list[str]:
    """The lines of the table: the goals that `rows` say something about, met or by which shape
    missed; below the reading goal and the last one, the rows that miss it."""
    best = best_of_ours(rows)
    lines = _at_least(best)
    if lines:
        head = f"  {'':34} {'wanted':>6} {'least':>8} {'mean':>8}"
        lines = ["against the fastest sdpa, ours in the faster of its layouts", head, *lines]
        lines += _reading(best, last_level_bytes) + _paged(rows)
    return lines + _at_most(rows)
