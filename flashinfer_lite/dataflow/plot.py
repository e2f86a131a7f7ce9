"""The measured curves as a picture."""

import os
from pathlib import Path

from flashinfer_lite.dataflow.inflection import KERNELS
from flashinfer_lite.dataflow.table import Table

COLOURS = {"gemv": "#c8502d", "flat_gemm": "#2d7f8c", "vendor": "#7b8b99"}


def require_matplotlib():
    """Import matplotlib for files.

    Raises:
        ModuleNotFoundError: with the command that installs it.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        text = "expected matplotlib to be installed, got none: pip install matplotlib"
        raise ModuleNotFoundError(text) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(table: Table, path: str | os.PathLike) -> None:
    """Draw time against M for each shape of a table, with M1 and M2 marked, into a PNG.

    Raises:
        ModuleNotFoundError: if matplotlib is absent.
        ValueError: if the table is empty.
    """
    plt = require_matplotlib()
    if not table.entries:
        raise ValueError("table: expected at least one shape to plot, got none")
    columns = min(3, len(table.entries))
    rows = -(-len(table.entries) // columns)
    height = 3.4 * rows + 0.8
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.4 * columns, height), dpi=120, squeeze=False
    )
    for axes in grid.flat[len(table.entries) :]:
        axes.set_axis_off()
    for axes, (key, entry) in zip(grid.flat, sorted(table.entries.items()), strict=False):
        _draw(axes, *key, entry)
    grid.flat[0].legend(fontsize=8, loc="upper left")
    note = f"\nWARNING: {table.contention}" if table.contention else ""
    figure.suptitle(f"{table.device}\ntorch {table.torch}; {table.date}{note}", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / height))
    _save(figure, Path(path))
    plt.close(figure)


def _draw(axes, dtype, n, k, entry):
    for kernel in KERNELS:
        curve = entry.curves[kernel]
        micro = [1e6 * seconds for seconds in curve.values()]
        axes.plot(list(curve), micro, ".-", color=COLOURS[kernel], label=kernel, linewidth=1)
    last = max(entry.curves["vendor"])
    for name, m, kernel, y in (("M1", entry.m1, "gemv", 0.03), ("M2", entry.m2, "flat_gemm", 0.1)):
        if m:
            side = "right" if m > last / 4 else "left"
            axes.axvline(m, color=COLOURS[kernel], linestyle=":", linewidth=1)
            axes.text(
                m, y, f" {name} = {m} ", transform=axes.get_xaxis_transform(), ha=side, fontsize=8
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [m for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if m <= last]
    axes.set_xticks(ticks, map(str, ticks))
    axes.xaxis.minorticks_off()
    axes.set_title(f"{dtype} [{n}, {k}]", fontsize=9)
    axes.set_xlabel("M, rows of x", fontsize=8)
    axes.set_ylabel("us a call, cold weights", fontsize=8)
    axes.tick_params(labelsize=8)


def _save(figure, path):
    partial = path.with_name(path.name + ".partial.png")
    figure.savefig(partial, format="png", facecolor="white")
    os.replace(partial, path)
