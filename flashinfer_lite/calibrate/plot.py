"""The picture of a calibration."""

import math

import torch

from flashinfer_lite.calibrate.choose import SCORES_LEFT_OUT, percent
from flashinfer_lite.calibrate.histogram import Histogram


def draw(calibration, path) -> None:
    """Two maps with a line per layer: scores with phi, and row maxima relative to phi with the
    guard. Darker is more, on a logarithmic scale."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        text = "plot: expected matplotlib to be installed, got none: pip install matplotlib"
        raise ModuleNotFoundError(text) from error

    layers = calibration.layers
    figure = Figure(figsize=(13, 2.4 + 0.24 * len(layers)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # no pyplot: the caller's windows and settings stay as they are
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(
        f"{calibration.model}: {calibration.tokens} tokens, {calibration.dtype}; unified maximum "
        f"in {calibration.layers_on} of {calibration.num_layers} layers"
    )
    for layer in layers:
        _draw_scores(left, layer)
        _draw_row_max(right, layer, calibration.guard)
    for bound in calibration.guard:
        right.axvline(bound, color="tab:red", linewidth=1)
    right.plot([], [], color="tab:red", label="guard")
    left.plot([], [], "|", color="tab:orange", label="phi of each head")
    left.plot([], [], color="black", label=f"{percent(1 - SCORES_LEFT_OUT)} of the scores")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    left.set(xlabel="score", ylabel="layer", title="visible scores, all heads")
    right.set(
        xlabel="row maximum - phi of its head",
        title="row maxima; red layers: online, around their middle",
    )
    left.set_ylim(len(layers) - 0.5, -0.5)
    step = math.ceil(len(layers) / 40)
    left.set_yticks(range(0, len(layers), max(1, step)))
    figure.savefig(path)


def _draw_scores(axes, layer) -> None:
    edges = _edges(layer.scores)
    _draw_line(axes, layer.index, edges, layer.scores.counts.sum(0), "Blues")
    if layer.score_range is not None:
        axes.plot(layer.score_range, [layer.index + 0.42] * 2, color="black", linewidth=1)
    if layer.phi is not None:
        axes.plot(layer.phi, [layer.index] * layer.num_heads, "|", color="tab:orange")


def _draw_row_max(axes, layer, guard) -> None:
    """All heads' row maxima less their phi; of an online layer as if phi were as good as can be."""
    middle = sum(guard) / 2
    edges = _edges(layer.row_max)
    for head, found in enumerate(layer.row_max_ranges):
        counts = layer.row_max.counts[head]
        if found is None or not counts.sum():
            continue
        phi = sum(found) / 2 - middle if layer.phi is None else layer.phi[head]
        colours = "Reds" if layer.phi is None else "Blues"
        _draw_line(axes, layer.index, edges - phi, counts, colours, head, layer.num_heads)


def _edges(h: Histogram) -> torch.Tensor:
    return (torch.arange(h.counts.shape[1] + 1) + h.low).double() * h.width


def _draw_line(axes, index, edges, counts, colours, part=0, parts=1) -> None:
    """One strip of the map: line `index`, of which it takes part `part` of `parts`."""
    total = counts.sum()
    if not total:
        return
    # From one in 10^6 to all; white is nothing at all.
    shade = torch.where(counts > 0, 0.15 + 0.85 * (1 + (counts / total).log10() / 6), torch.nan)
    top = index - 0.4 + 0.8 * part / parts
    axes.pcolormesh(
        edges.numpy(),
        [top, top + 0.8 / parts],
        shade.clamp(min=0.15)[None].numpy(),
        cmap=colours,
        vmin=0,
        vmax=1,
        rasterized=True,
    )
