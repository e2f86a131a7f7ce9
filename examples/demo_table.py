"""The demo's table: runs one process per variant, formats the rows for the terminal and draws them
as a PNG."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

VARIANTS = {
    "ours": "ours, our Cache",
    "ours-dynamic": "ours, DynamicCache",
    "sdpa": "sdpa, DynamicCache",
    "sdpa-ourcache": "sdpa, our Cache",
    "eager": "eager, DynamicCache",
    "ceiling": "ceiling: free attention",
}
SHORT_REPEATS = 3
WARMUP_STEPS = 2
WORKER = Path(__file__).with_name("demo_worker.py")


class WorkerError(RuntimeError):
    """A variant's process failed; the text is the last line that it wrote."""


def run_variant(variant: str, options: list[str], on_tick) -> dict:
    """Measure one variant in its own process and return its result; ``on_tick(label)`` is called as
    it moves on."""
    command = [sys.executable, str(WORKER), "--variant", variant, *options]
    paths = [str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    result = None
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            for line in worker.stdout:
                message = json.loads(line) if line.startswith("{") else {"event": "other"}
                if message["event"] == "tick":
                    on_tick(message["label"])
                elif message["event"] == "result":
                    result = message
            code = worker.wait()
        except BaseException:
            worker.terminate()
            worker.wait()
            raise
        if code != 0 or result is None:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            killed = " (killed: out of memory?)" if code == -9 else ""
            raise WorkerError((lines[-1].strip() if lines else f"exit status {code}") + killed)
    return result


def machine() -> str:
    """Return the CPU's model name and how many of its CPUs this process may use."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} CPUs"


def count_equal(a: list[int], b: list[int]) -> str:
    return f"{sum(x == y for x, y in zip(a, b, strict=True))}/{len(a)}"


def build_rows(results: dict[str, dict], dtype: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and one row of text per measured variant; ``sdpa`` is the 1.00x of every
    ratio.

    Args:
        results: variant name to worker result.
        dtype: the dtype of the prefill columns, for the header.
    """
    short_dtype = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    contexts = [fields["context"] for fields in next(iter(results.values()))["contexts"]]
    header = [f"tokens/s ({short_dtype})"]
    header += [f"prefill {c}" for c in contexts] + [f"decode {c}" for c in contexts]
    has_bf16 = any("bf16" in result for result in results.values())
    header += [f"bf16 decode {contexts[-1]}"] if has_bf16 else []
    header += ["peak MB", "prefill x sdpa", "decode x sdpa"]
    header += ["bf16 decode x sdpa"] if has_bf16 else []
    header += ["same tokens as eager"]
    base = results.get("sdpa")
    rows = []
    for variant, result in results.items():
        last = result["contexts"][-1]
        row = [VARIANTS[variant]]
        row += [f"{f['context'] / f['prefill_s']:.0f}" for f in result["contexts"]]
        row += [f"{1 / f['decode_s']:.1f}" for f in result["contexts"]]
        row += [f"{1 / result['bf16']['decode_s']:.1f}"] if has_bf16 else []
        row += [f"{last['peak_mb']:.0f}"]
        base_last = base["contexts"][-1] if base else None
        row += [_ratio(base_last, last, "prefill_s"), _ratio(base_last, last, "decode_s")]
        if has_bf16:
            row += [_ratio(base["bf16"] if base else None, result["bf16"], "decode_s")]
        row += [_agreement(results.get("eager"), result) if variant != "ceiling" else "-"]
        rows.append(row)
    return header, rows


def _ratio(base: dict | None, fields: dict, key: str) -> str:
    return f"{base[key] / fields[key]:.2f}x" if base else "-"


def _agreement(eager: dict | None, result: dict) -> str:
    """Return how many of all predicted tokens (both contexts, then bf16) equal eager's."""
    if eager is None:
        return "-"
    ours, theirs = [], []
    for fields, wanted in zip(result["contexts"], eager["contexts"], strict=True):
        ours += fields["predicted"]
        theirs += wanted["predicted"]
    text = count_equal(ours, theirs)
    if "bf16" in result:
        text += ", bf16 " + count_equal(result["bf16"]["predicted"], eager["bf16"]["predicted"])
    return text


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Return the table as text; a long header is split over two lines at its last space."""
    tops, bottoms = [], []
    for title in header:
        top, _, bottom = title.rpartition(" ")
        if " x sdpa" in title:
            top, bottom = title.replace(" x sdpa", ""), "x sdpa"
        elif title == header[0]:
            top, bottom = "", title
        elif title == header[-1]:
            top, bottom = "same tokens", "as eager"
        tops.append(top)
        bottoms.append(bottom)
    lines = [tops, bottoms, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = []
    for number, line in enumerate(lines):
        cells = [line[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        text.append("  " + "  ".join(cells).rstrip())
        if number == 1:
            text.append("  " + "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(text)


def draw(path: Path, title: str, notes: str, header, rows, results: dict[str, dict]) -> None:
    """Save the table, with bars of the long-context columns below it, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#c8502d" if variant.startswith("ours") else "#6f7f8f" for variant in results]
    has_bf16 = all("bf16" in result for result in results.values())
    panels = 3 if has_bf16 else 2
    figure = plt.figure(figsize=(16, 7.5), dpi=120)
    grid = figure.add_gridspec(2, panels, height_ratios=[1.25, 1], hspace=0.18, wspace=0.08)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.5, y=0.97)
    table_axes = figure.add_subplot(grid[0, :])
    table_axes.axis("off")
    widest = [
        max(len(header[i]) * 0.62, *(len(row[i]) for row in rows)) for i in range(len(header))
    ]
    table = table_axes.table(
        cellText=rows,
        colLabels=[_wrap(text) for text in header],
        colWidths=[width / sum(widest) for width in widest],
        cellLoc="right",
        bbox=[0, 0, 1, 1],
    )
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor("#d8dde2")
        if column == 0:
            cell.get_text().set_horizontalalignment("left")
        if row == 0:
            cell.set_facecolor("#eef1f4")
            cell.set_text_props(fontweight="bold")
            cell.set_height(cell.get_height() * 1.8)
        elif colours[row - 1] != "#6f7f8f":
            cell.set_facecolor("#fbeee9")
    last = [result["contexts"][-1] for result in results.values()]
    context = last[0]["context"]
    series = [
        (f"prefill {context}, tokens/s", [context / fields["prefill_s"] for fields in last]),
        (f"decode at {context}, tokens/s", [1 / fields["decode_s"] for fields in last]),
    ]
    if has_bf16:
        rates = [1 / result["bf16"]["decode_s"] for result in results.values()]
        series.append((f"bf16 decode at {context}, tokens/s", rates))
    for column, (label, values) in enumerate(series):
        axes = figure.add_subplot(grid[1, column])
        bars = axes.barh(range(len(values)), values, color=colours)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=9)
        names = list(results) if column == 0 else [""] * len(values)
        axes.set_yticks(range(len(values)), names)
        axes.invert_yaxis()
        axes.set_title(label, fontsize=10)
        axes.set_xlim(0, max(values) * 1.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.5, 0.02, notes, ha="center", fontsize=8.5, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    os.replace(partial, path)


def _wrap(text: str) -> str:
    head, _, tail = text.replace(" (", "\n(").rpartition(" ")
    if "\n" in text.replace(" (", "\n("):
        return text.replace(" (", "\n(")
    return f"{head}\n{tail}" if head else tail
