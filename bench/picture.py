"""The benchmark's rows as a PNG: each implementation's speed against the best SDPA of its shape."""

from __future__ import annotations

import os
from pathlib import Path

COLOURS = {"ours": "#c8502d", "ours-bhsd": "#e39a7d"}
OTHER_COLOURS = {"sdpa-packed": "#4f6272", "sdpa-expanded": "#a9b4be"}
DEFAULT_COLOUR = "#7b8b99"


def mask_of(row: dict) -> str:
    """Return what tells a shape's full attention from its causal one, which needs no word."""
    return "  full" if row["op"] == "attention" and not row["causal"] else ""


def draw(path: Path, header: list[str], rows: list[dict], warnings: list[str]) -> bool:
    """Save the picture; return False, with nothing written, if no row has a ratio."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["x_sdpa"]:
            title = f"{row['op']}  {row['shape']}  {row['dtype']}"
            groups.setdefault(title + mask_of(row), []).append(row)
    if not groups:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = sum(len(group) for group in groups.values())
    height = 1.6 + 0.2 * bars + 0.14 * len(groups)
    figure, axes = plt.subplots(figsize=(11, height), dpi=120)
    position, ticks, names = 0.0, [], []
    for title, group in groups.items():
        first = position
        for row in group:
            ratio = row["x_sdpa"]
            colour = (COLOURS | OTHER_COLOURS).get(row["impl"], DEFAULT_COLOUR)
            axes.barh(position, ratio, 0.9, color=colour)
            # p90 of the time is p10 of the speed
            low = ratio * row["seconds"] / row["seconds_p90"]
            high = ratio * row["seconds"] / row["seconds_p10"]
            axes.plot([low, high], [position, position], color="black", linewidth=0.8)
            text = f" {row['impl']}  {ratio:.2f}x"
            if row["roofline"] and row["op"] != "overhead":
                text += f"  ({100 * row['roofline']:.0f} % of the roofline)"
            axes.text(max(high, ratio), position, text, va="center", fontsize=7)
            position += 1
        ticks.append((first + position - 1) / 2)
        names.append(title)
        position += 0.7
    axes.axvline(1.0, color="black", linewidth=0.6, linestyle=":")
    axes.set_yticks(ticks, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.28, y=0.01)
    axes.set_xlim(left=0)
    axes.set_xlabel("speed against the fastest SDPA of the same run; line: p10 to p90")
    axes.spines[["top", "right"]].set_visible(False)
    title = "\n".join([*header, *("WARNING: " + w.split(". ")[0] for w in warnings)])
    axes.set_title(title, fontsize=8, loc="left")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    os.replace(partial, path)
    return True
