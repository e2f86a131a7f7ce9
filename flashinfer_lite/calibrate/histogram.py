"""Counts of numbers per head, in bins that follow the range of what was seen."""

import math

import torch

WIDTH = 0.0625  # of a bin at first, in natural units of the score
MAX_BINS = 1024  # beyond it the bins are doubled: 64 units are resolved in 1/16, 1024 in 1
LIMIT = 8192.0  # what is farther from 0 is counted, but gets no bin: it would blur all others


class Histogram:
    """How many values of each head lie in [i * width, (i + 1) * width), for i = low, low + 1, ...

    Bins start at multiples of a power of two, so the result depends on the values alone, not on
    their order. A value that is NaN, infinite, or LIMIT or more from 0 is in no bin.

    Attributes:
        counts: int64 [num_heads, num_bins], on the CPU.
        low, width: the first bin's i, and the width of all.
        minimum, maximum: of each head, exact, of what is in a bin; +inf and -inf where nothing is.
        nonfinite, huge: of each head, how many values are NaN or infinite, or beyond LIMIT.
    """

    def __init__(self, num_heads: int):
        self.counts = torch.zeros(num_heads, 0, dtype=torch.int64)
        self.low, self.width = 0, WIDTH
        self.minimum, self.maximum = [math.inf] * num_heads, [-math.inf] * num_heads
        self.nonfinite, self.huge = [0] * num_heads, [0] * num_heads

    @property
    def num_heads(self) -> int:
        return self.counts.shape[0]

    def total(self, head: int) -> int:
        """Values of a head, those in no bin included."""
        return int(self.counts[head].sum()) + self.nonfinite[head] + self.huge[head]

    def totals(self) -> int:
        """Values of all heads."""
        return sum(self.total(head) for head in range(self.num_heads))

    def add(self, values: torch.Tensor, counted: torch.Tensor) -> None:
        """Count values [batch, num_heads, ...] where the bool `counted`, which broadcasts, is
        True."""
        counted = counted.expand(values.shape)
        values, counted = (x.transpose(0, 1).flatten(1) for x in (values, counted))
        if not values.numel():
            return
        lowest, highest = _extremes(values, counted)
        if not (-LIMIT < lowest.min() and highest.max() < LIMIT):  # NaN fails too
            binned = counted & (values.abs() < LIMIT)
            self._add_unbinned(values, counted & ~binned)
            counted = binned
            lowest, highest = _extremes(values, counted)
        lowest, highest = lowest.tolist(), highest.tolist()
        if min(lowest) == math.inf:
            return
        self.minimum = [min(pair) for pair in zip(self.minimum, lowest, strict=True)]
        self.maximum = [max(pair) for pair in zip(self.maximum, highest, strict=True)]
        self._cover(min(lowest), max(highest))
        num_bins = self.counts.shape[1]
        # One bin more takes what is not counted. Powers of two: the product and floor are exact.
        bins = (values * (1 / self.width)).floor_().sub_(self.low).masked_fill_(~counted, num_bins)
        bins += torch.arange(self.num_heads, device=bins.device)[:, None] * (num_bins + 1)
        found = torch.bincount(bins.int().flatten(), minlength=self.num_heads * (num_bins + 1))
        self.counts += found.view(self.num_heads, num_bins + 1)[:, :num_bins].cpu()

    def _add_unbinned(self, values, chosen) -> None:
        for name, kind in (("nonfinite", ~values.isfinite()), ("huge", values.isfinite())):
            found = (chosen & kind).sum(1).tolist()
            before = getattr(self, name)
            setattr(self, name, [a + b for a, b in zip(before, found, strict=True)])

    def _cover(self, lowest: float, highest: float) -> None:
        """Have bins for everything from `lowest` to `highest`, of width as small as MAX_BINS
        allows."""
        first, last = math.floor(lowest / self.width), math.floor(highest / self.width)
        if self.counts.shape[1]:
            first, last = min(first, self.low), max(last, self.low + self.counts.shape[1] - 1)
        counts = self.counts.new_zeros(self.num_heads, last - first + 1)
        begin = self.low - first
        counts[:, begin : begin + self.counts.shape[1]] = self.counts
        self.low, self.counts = first, counts
        while self.counts.shape[1] > MAX_BINS:
            self.coarsen()

    def coarsen(self) -> None:
        """Double the width of the bins."""
        even = self.low % 2  # bins 2i and 2i + 1 become bin i: start and end on a pair
        odd = (even + self.counts.shape[1]) % 2
        padded = torch.nn.functional.pad(self.counts, (even, odd))
        self.counts = padded.view(self.num_heads, -1, 2).sum(-1)
        self.low = (self.low - even) // 2
        self.width *= 2

    def shortest_interval(self, head: int, wanted: int) -> tuple[float, float] | None:
        """The edges of the shortest run of bins with `wanted` values of a head, of several the one
        with most values; None if the bins hold fewer."""
        return shortest_interval(self.counts[head], wanted, self.low, self.width)

    def outside(self, head: int, low: float, high: float) -> int:
        """An upper bound of how many values of a head are not strictly between: a bin that a bound
        cuts or touches from inside is outside, and so is what is in no bin."""
        edges = (torch.arange(self.counts.shape[1] + 1) + self.low).double() * self.width
        inside = (edges[:-1] > low) & (edges[1:] <= high)
        return self.total(head) - int(self.counts[head][inside].sum())


def _extremes(values, counted) -> tuple[torch.Tensor, torch.Tensor]:
    """(minimum, maximum) per row; inf and -inf where nothing is counted."""
    hidden = ~counted
    lowest = values.masked_fill(hidden, math.inf).amin(1)
    return lowest, values.masked_fill(hidden, -math.inf).amax(1)


def shortest_interval(
    counts: torch.Tensor, wanted: int, low: int, width: float
) -> tuple[float, float] | None:
    """`Histogram.shortest_interval`, of one row of counts."""
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))  # values below each edge
    if wanted > before[-1] or not wanted:
        return None
    starts = (before <= before[-1] - wanted).nonzero()[:, 0]
    ends = torch.searchsorted(before, before[starts] + wanted)
    length = ends - starts
    shortest = length == length.min()
    mass = torch.where(shortest, before[ends] - before[starts], -1)
    best = int(mass.argmax())
    return (int(starts[best]) + low) * width, (int(ends[best]) + low) * width


def merged(histograms: list[Histogram]) -> tuple[torch.Tensor, int, float]:
    """(counts [num_bins], low, width) over all heads of all histograms, at the widest bins."""
    filled = [h for h in histograms if h.counts.shape[1]]
    if not filled:
        return torch.zeros(0, dtype=torch.int64), 0, WIDTH
    width = max(h.width for h in filled)
    parts = []
    for h in filled:
        flat = Histogram(1)
        flat.counts, flat.low, flat.width = h.counts.sum(0, keepdim=True), h.low, h.width
        while flat.width < width:
            flat.coarsen()
        parts.append(flat)
    low = min(part.low for part in parts)
    counts = parts[0].counts.new_zeros(max(p.low + p.counts.shape[1] for p in parts) - low)
    for part in parts:
        begin = part.low - low
        counts[begin : begin + part.counts.shape[1]] += part.counts[0]
    return counts, low, width
