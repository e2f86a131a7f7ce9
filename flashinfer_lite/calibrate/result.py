"""What a calibration found: phi by layer, the distributions behind it, and their file."""

import json
import os
from dataclasses import dataclass

from flashinfer_lite.calibrate.choose import SCORES_LEFT_OUT, Layer, choose_layer, held, percent
from flashinfer_lite.calibrate.guard import named
from flashinfer_lite.calibrate.histogram import merged, shortest_interval
from flashinfer_lite.calibrate.storage import from_json, to_json


@dataclass
class HeldOut:
    """Rows that the patched model checked and computed again on held-out text."""

    tokens: int
    rows_checked: int
    rows_recomputed: int

    @property
    def rate(self) -> float | None:
        """None where no layer uses the unified maximum."""
        return self.rows_recomputed / self.rows_checked if self.rows_checked else None


@dataclass
class Calibration:
    """phi for the unified-max softmax of one model.

    Attributes:
        model: its name, for people.
        num_layers, num_heads_q: its size; num_heads_q is the largest of its layers.
        dtype, guard: what it was measured and chosen for: "bfloat16" and (a, b).
        recompute_rate: the share of a head's rows that may be computed twice.
        seqlen, tokens: tokens seen at a time, and in all.
        layers: a Layer each.
        held_out: HeldOut, or None.
    """

    model: str
    num_layers: int
    num_heads_q: int
    dtype: str
    guard: tuple[float, float]
    recompute_rate: float
    seqlen: int
    tokens: int
    layers: list[Layer]
    held_out: HeldOut | None = None

    def phi(self, layer_idx: int) -> list[float] | None:
        """phi of each query head of a layer; None: the layer runs the online softmax."""
        if not 0 <= layer_idx < self.num_layers:
            raise IndexError(f"layer_idx: expected 0 to {self.num_layers - 1}, got {layer_idx}")
        return self.layers[layer_idx].phi

    @property
    def layers_on(self) -> int:
        return sum(layer.phi is not None for layer in self.layers)

    @property
    def expected_rate(self) -> float | None:
        """Rows of the calibration text that the layers with a phi would compute twice, as a share
        of their rows; an upper bound to the width of a bin. None if no layer has a phi."""
        rows = sum(layer.rows for layer in self.layers if layer.phi is not None)
        return sum(layer.rows_outside for layer in self.layers) / rows if rows else None

    @property
    def score_range(self) -> tuple[float, float] | None:
        """The shortest interval that holds 99.99 % of the visible scores of all layers: what the
        paper gives for a model."""
        counts, low, width = merged([layer.scores for layer in self.layers])
        wanted = held(int(counts.sum()), SCORES_LEFT_OUT)
        return shortest_interval(counts, wanted, low, width)

    def for_dtype(self, dtype, recompute_rate: float | None = None) -> "Calibration":
        """The phi for another dtype's guard (a torch.dtype or its name), or another rate, from the
        same distributions; `held_out` is not known for it."""
        name, guard = named(dtype)
        rate = self.recompute_rate if recompute_rate is None else recompute_rate
        if not 0 <= rate < 1:
            raise ValueError(f"recompute_rate: expected 0 <= rate < 1, got {rate!r}")
        layers = [
            choose_layer(layer.index, layer.scores, layer.row_max, guard, rate)
            for layer in self.layers
        ]
        given = {**vars(self), "dtype": name, "guard": guard, "recompute_rate": rate}
        return Calibration(**{**given, "layers": layers, "held_out": None})

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file that `load` and hf.patch(calibration=path) read."""
        text = json.dumps(to_json(self), allow_nan=False)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            OSError: no such file.
            ValueError: it is damaged, of another kind, of another version, or was chosen for
                another guard than this library's.
        """
        with open(path, encoding="utf-8") as file:
            try:
                given, layers, held_out = from_json(json.load(file))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{os.fspath(path)}: not a calibration: {error}") from error
        held_out = None if held_out is None else HeldOut(**held_out)
        return cls(**given, layers=layers, held_out=held_out)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the distributions of scores and row maxima per layer, phi and the guard (PNG, or
        what the name says). Needs matplotlib."""
        from flashinfer_lite.calibrate.plot import draw

        draw(self, path)

    def summary(self) -> str:
        """A table for people: a line per layer, then the totals."""
        scores, rows = percent(1 - SCORES_LEFT_OUT), percent(1 - self.recompute_rate)
        lines = [
            f"{self.model}: {self.tokens} tokens, {self.seqlen} at a time; {self.dtype}, guard "
            f"({self.guard[0]:g}, {self.guard[1]:g}); recompute rate up to {self.recompute_rate:g}",
            "",
            f"{'layer':>5}  {scores + ' of scores':>20}  {rows + ' of row max':>20}"
            f"  {'phi':>15}  {'margin':>6}  {'recomputed':>10}",
        ]
        lines += [_line(layer) for layer in self.layers]
        lines += ["", *self._totals()]
        return "\n".join(lines)

    def _totals(self) -> list[str]:
        lines = [
            f"{percent(1 - SCORES_LEFT_OUT)} of all scores lie in {_interval(self.score_range, 2)}"
        ]
        nonfinite = sum(sum(layer.scores.nonfinite) for layer in self.layers)
        huge = sum(sum(layer.scores.huge) for layer in self.layers)
        if nonfinite or huge:
            lines.append(f"left out: {nonfinite} scores NaN or infinite, {huge} beyond +-8192")
        lines.append(
            f"unified maximum in {self.layers_on} of {self.num_layers} layers; expected recompute "
            f"rate {_rate(self.expected_rate)}"
        )
        if self.held_out is None:
            return [*lines, "held-out text: not measured"]
        return [
            *lines,
            f"held-out text: {self.held_out.tokens} tokens, {self.held_out.rows_recomputed} of "
            f"{self.held_out.rows_checked} rows recomputed, rate {_rate(self.held_out.rate)}",
        ]


def _line(layer: Layer) -> str:
    known = [r for r in layer.row_max_ranges if r is not None]
    row_max = (min(r[0] for r in known), max(r[1] for r in known)) if known else None
    text = f"{layer.index:5}  {_interval(layer.score_range):>20}  {_interval(row_max):>20}"
    if layer.phi is None:
        return f"{text}  off: {layer.reason}"
    phi = f"{min(layer.phi):.1f} to {max(layer.phi):.1f}"
    rate = layer.rows_outside / layer.rows
    return f"{text}  {phi:>15}  {layer.margin:6.1f}  {_rate(rate):>10}"


def _interval(interval, digits: int = 1) -> str:
    return "-" if interval is None else f"({interval[0]:.{digits}f}, {interval[1]:.{digits}f})"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else percent(float(f"{rate:.3g}"))
