"""The rule that makes a phi out of a distribution of row maxima."""

import math
from dataclasses import dataclass

from flashinfer_lite.calibrate.histogram import Histogram

MARGIN = 0.05  # of the guard's width, what must be left between the row maxima and either bound
SCORES_LEFT_OUT = 1e-4  # the paper gives the range that holds all other scores


@dataclass
class Layer:
    """What was measured of one layer, and what follows from it.

    Attributes:
        index: its layer_idx.
        num_heads: query heads; 0 if no attention ran in it.
        phi: of each head, or None: the layer runs the online softmax.
        reason: why phi is None, otherwise "".
        score_range: the shortest interval that holds 99.99 % of the visible scores, or None.
        row_max_ranges: of each head the shortest interval that holds the wanted fraction of the row
            maxima, or None if too many are NaN, infinite or huge.
        margin: the smallest distance, over the heads, of such an interval from the guard's bounds
            at the best phi; negative if one is wider than the guard; None without an interval.
        rows, rows_outside: row maxima seen, and how many of them miss the guard around phi, an
            upper bound to the width of a bin; 0 without phi.
        scores, row_max: Histograms of the visible scores and of the maxima of rows.
    """

    index: int
    num_heads: int
    phi: list[float] | None
    reason: str
    score_range: tuple[float, float] | None
    row_max_ranges: list[tuple[float, float] | None]
    margin: float | None
    rows: int
    rows_outside: int
    scores: Histogram
    row_max: Histogram


def choose_layer(
    index: int,
    scores: Histogram,
    row_max: Histogram,
    guard: tuple[float, float],
    recompute_rate: float,
) -> Layer:
    """Choose phi for each head of a layer, or say why it has none.

    A row is computed again unless a < row_max - phi < b, with (a, b) the guard. Of a head's rows a
    share of recompute_rate may be, so the others must fit between phi + a and phi + b. Among all
    intervals that hold so many row maxima, the shortest, [l, u], leaves the most room; phi puts it
    in the middle of the guard, where both its ends are equally far from the bounds:

        phi = (l + u) / 2 - (a + b) / 2        margin = ((b - a) - (u - l)) / 2

    Text that was not measured will stray farther, so the margin must be MARGIN of the guard's width
    at least. One head that falls short turns the technique off for its layer: a layer is one kernel
    call.
    """
    low, high = guard
    ranges, phi, reasons = [], [], []
    for head in range(row_max.num_heads):
        rows = row_max.total(head)
        interval = row_max.shortest_interval(head, held(rows, recompute_rate))
        ranges.append(interval)
        if interval is None:
            reasons.append((-math.inf, _lost(head, row_max, rows)))
            continue
        margin = ((high - low) - (interval[1] - interval[0])) / 2
        phi.append((sum(interval) - (low + high)) / 2)
        if margin < MARGIN * (high - low):
            reasons.append((margin, _too_wide(head, interval, margin, guard, recompute_rate)))
    found = [((high - low) - (r[1] - r[0])) / 2 for r in ranges if r is not None]
    if not row_max.totals():
        reasons, phi = [(0.0, "no attention ran in this layer")], []
    elif len(reasons) > 1:
        worst = min(reasons)
        reasons = [(worst[0], f"{worst[1]}; {len(reasons)} of {len(ranges)} heads do not fit")]
    on = not reasons
    return Layer(
        index=index,
        num_heads=row_max.num_heads,
        phi=phi if on else None,
        reason="" if on else reasons[0][1],
        score_range=_score_range(scores),
        row_max_ranges=ranges,
        margin=min(found, default=None),
        rows=row_max.totals(),
        rows_outside=outside(row_max, phi, guard) if on else 0,
        scores=scores,
        row_max=row_max,
    )


def outside(row_max: Histogram, phi: list[float], guard: tuple[float, float]) -> int:
    """How many rows the guard around phi would have computed again, an upper bound to the width of
    a bin."""
    return sum(
        row_max.outside(head, value + guard[0], value + guard[1]) for head, value in enumerate(phi)
    )


def held(total: int, left_out: float) -> int:
    """How many of `total` remain when the share `left_out` may be missing."""
    return total - math.floor(left_out * total + 1e-9)  # 0.001 * 3000 is a little less than 3


def percent(fraction: float) -> str:
    return f"{100 * fraction:.6g} %"


def _score_range(scores: Histogram) -> tuple[float, float] | None:
    flat = Histogram(1)
    flat.counts, flat.low, flat.width = scores.counts.sum(0, keepdim=True), scores.low, scores.width
    return flat.shortest_interval(0, held(int(flat.counts.sum()), SCORES_LEFT_OUT))


def _lost(head: int, row_max: Histogram, rows: int) -> str:
    unbinned = row_max.nonfinite[head] + row_max.huge[head]
    if not rows:
        return f"head {head} had no row with a visible key"
    return f"head {head}: {unbinned} of {rows} row maxima are NaN, infinite or beyond +-8192"


def _too_wide(head, interval, margin, guard, recompute_rate) -> str:
    held = percent(1 - recompute_rate)
    text = f"head {head}: {held} of the row maxima lie in ({interval[0]:.1f}, {interval[1]:.1f})"
    width = guard[1] - guard[0]
    if margin < 0:
        return f"{text}, wider than the guard's {width:g}"
    return (
        f"{text}, which leaves {margin:.2f} to each bound of the guard, {MARGIN * width:.2f} wanted"
    )
