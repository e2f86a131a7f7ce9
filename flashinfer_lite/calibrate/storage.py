"""A calibration as JSON, and back, with every field checked."""

import math

import torch

from flashinfer_lite.calibrate.choose import Layer
from flashinfer_lite.calibrate.guard import BY_NAME, GUARDS
from flashinfer_lite.calibrate.histogram import Histogram

FORMAT = "flashinfer_lite calibration"
VERSION = 1


def to_json(calibration) -> dict:
    """A dict of what JSON can hold; `from_json` reads it."""
    given = {**vars(calibration), "guard": list(calibration.guard)}
    given["layers"] = [_layer_to_json(layer) for layer in calibration.layers]
    given["held_out"] = calibration.held_out and vars(calibration.held_out)
    return {"format": FORMAT, "version": VERSION, **given}


def _layer_to_json(layer: Layer) -> dict:
    return {
        **vars(layer),
        "scores": _histogram_to_json(layer.scores),
        "row_max": _histogram_to_json(layer.row_max),
    }


def _histogram_to_json(h: Histogram) -> dict:
    # JSON has no infinity: a head without a value has no extremes.
    finite = {
        name: [x if math.isfinite(x) else None for x in getattr(h, name)]
        for name in ("minimum", "maximum")
    }
    return {**vars(h), "counts": h.counts.tolist(), **finite}


def _is_int(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_count(x) -> bool:
    return _is_int(x) and 0 <= x < 2**63


def _is_number(x) -> bool:
    return (_is_int(x) or isinstance(x, float)) and math.isfinite(x)


def _is_interval(x) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(map(_is_number, x)) and x[0] <= x[1]


def _is_list_of(check):
    return lambda x: isinstance(x, list) and all(map(check, x))


def _or_none(check):
    return lambda x: x is None or check(x)


def _is_text(x) -> bool:
    return isinstance(x, str)


# Field -> (check, what it wants), of each kind of object.
_TOP = {
    "model": (_is_text, "a string"),
    "num_layers": (_is_count, "a count"),
    "num_heads_q": (_is_count, "a count"),
    "dtype": (lambda x: _is_text(x) and x in BY_NAME, f"one of {', '.join(BY_NAME)}"),
    "guard": (_is_interval, "[a, b]"),
    "recompute_rate": (lambda x: _is_number(x) and 0 <= x < 1, "a number in [0, 1)"),
    "seqlen": (_is_count, "a count"),
    "tokens": (_is_count, "a count"),
    "layers": (_is_list_of(lambda x: isinstance(x, dict)), "a list of layers"),
    "held_out": (_or_none(lambda x: isinstance(x, dict)), "an object or null"),
}
_HELD_OUT = dict.fromkeys(("tokens", "rows_checked", "rows_recomputed"), (_is_count, "a count"))
_LAYER = {
    "index": (_is_count, "a count"),
    "num_heads": (_is_count, "a count"),
    "phi": (_or_none(_is_list_of(_is_number)), "a list of numbers or null"),
    "reason": (_is_text, "a string"),
    "score_range": (_or_none(_is_interval), "[low, high] or null"),
    "row_max_ranges": (_is_list_of(_or_none(_is_interval)), "a list of [low, high] or null"),
    "margin": (_or_none(_is_number), "a number or null"),
    "rows": (_is_count, "a count"),
    "rows_outside": (_is_count, "a count"),
    "scores": (lambda x: isinstance(x, dict), "a histogram"),
    "row_max": (lambda x: isinstance(x, dict), "a histogram"),
}
_HISTOGRAM = {
    "counts": (_is_list_of(_is_list_of(_is_count)), "lists of counts"),
    "low": (_is_int, "an integer"),
    "width": (lambda x: _is_number(x) and x > 0, "a positive number"),
    "minimum": (_is_list_of(_or_none(_is_number)), "a list of numbers or null"),
    "maximum": (_is_list_of(_or_none(_is_number)), "a list of numbers or null"),
    "nonfinite": (_is_list_of(_is_count), "a list of counts"),
    "huge": (_is_list_of(_is_count), "a list of counts"),
}


def from_json(data) -> tuple[dict, list[Layer], dict | None]:
    """(fields but layers and held_out, layers, held_out) of what `to_json` made.

    Raises:
        ValueError: naming the first field that is wrong.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"expected an object with format {FORMAT!r}")
    if data.get("version") != VERSION:
        raise ValueError(f"version: expected {VERSION}, got {data.get('version')!r}")
    given = _checked(data, _TOP, "", others=("format", "version"))
    given["guard"] = tuple(given["guard"])
    if given["guard"] != GUARDS[BY_NAME[given["dtype"]]]:
        raise ValueError(
            f"guard: expected {GUARDS[BY_NAME[given['dtype']]]} for {given['dtype']}, got "
            f"{given['guard']}: made for another version, calibrate again"
        )
    layers = given.pop("layers")
    if len(layers) != given["num_layers"]:
        raise ValueError(f"layers: expected {given['num_layers']}, got {len(layers)}")
    layers = [_layer(layer, i) for i, layer in enumerate(layers)]
    held_out = given.pop("held_out")
    if held_out is not None:
        held_out = _checked(held_out, _HELD_OUT, "held_out.")
    return given, layers, held_out


def _checked(data: dict, fields: dict, where: str, others=()) -> dict:
    for name, (check, wanted) in fields.items():
        if name not in data:
            raise ValueError(f"{where}{name}: missing")
        if not check(data[name]):
            raise ValueError(f"{where}{name}: expected {wanted}, got {_short(data[name])}")
    unknown = sorted(set(data) - set(fields) - set(others))
    if unknown:
        raise ValueError(f"{where}{unknown[0]}: unknown field")
    return {name: data[name] for name in fields}


def _short(x) -> str:
    text = repr(x)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _layer(data: dict, index: int) -> Layer:
    where = f"layers[{index}]."
    given = _checked(data, _LAYER, where)
    heads = given["num_heads"]
    for name in ("scores", "row_max"):
        given[name] = _histogram(given[name], heads, f"{where}{name}.")
    if given["index"] != index:
        raise ValueError(f"{where}index: expected {index}, got {given['index']}")
    for name in ("phi", "row_max_ranges"):
        if given[name] is not None and len(given[name]) != heads:
            raise ValueError(f"{where}{name}: expected {heads} of them, got {len(given[name])}")
    if (given["phi"] is None) != bool(given["reason"]):
        raise ValueError(f"{where}reason: expected exactly where phi is null")
    given["score_range"] = _interval(given["score_range"])
    given["row_max_ranges"] = [_interval(r) for r in given["row_max_ranges"]]
    return Layer(**given)


def _interval(x: list | None) -> tuple[float, float] | None:
    return None if x is None else tuple(x)


def _histogram(data: dict, heads: int, where: str) -> Histogram:
    given = _checked(data, _HISTOGRAM, where)
    h = Histogram(heads)
    counts = given["counts"]
    for name in ("counts", "minimum", "maximum", "nonfinite", "huge"):
        if len(given[name]) != heads:
            raise ValueError(f"{where}{name}: expected {heads} of them, got {len(given[name])}")
    if len({len(row) for row in counts}) > 1:
        raise ValueError(f"{where}counts: expected lists of one length")
    for name, none in (("minimum", math.inf), ("maximum", -math.inf)):
        given[name] = [none if x is None else x for x in given[name]]
    given["counts"] = torch.tensor(counts, dtype=torch.int64).view(heads, -1 if heads else 0)
    vars(h).update(given)
    return h
