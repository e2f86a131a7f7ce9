"""What `make fdpp` does before it runs a variant: the model and the text, the calibration of the
unified max, and the inflection points of the linear layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

# Each part of the text is used for one thing, so that no figure comes from what chose phi.
PARTS = {"calibrated": (0.0, 0.4), "held out": (0.4, 0.6), "decoded": (0.6, 0.85)}
PARTS["scored"] = (0.85, 1.0)


def find_model(random: bool):
    """Return the model's `demo_model.Source`; the weights are fetched once."""
    from demo_model import RANDOM, FetchError, Source, fetch, find_cached

    fallback = Source(RANDOM, "a small random-weight Llama (4 layers, 8 query and 2 KV heads)")
    if random:
        return fallback
    try:
        folder = find_cached() or fetch()
    except FetchError as error:
        print(f"  The model could not be fetched: {error}")
        print("  Going on with random weights: all below is computed and checked the same way.")
        return fallback
    return Source(str(folder), "SmolLM2-135M-Instruct (30 layers, 9 query and 3 KV heads)")


def part(text: str, name: str) -> str:
    """Return one of `PARTS` of the text."""
    first, last = PARTS[name]
    return text[int(first * len(text)) : int(last * len(text))]


def encode(tokenizer, text: str, tokens: int) -> torch.Tensor:
    """Return the first `tokens` ids of a text, int64 [tokens]."""
    ids = tokenizer.encode(text[: 16 * tokens])[:tokens]
    if len(ids) < tokens:
        raise SystemExit(f"fdpp: expected a text of {tokens} tokens, got {len(ids)}")
    return torch.tensor(ids)


def calibrate_model(model, tokenizer, text: str, sizes, folder: Path):
    """Choose phi on one part of the text, count recomputed rows on another, save both with a
    picture; return the Calibration."""
    from flashinfer_lite.calibrate import calibrate

    ids = {
        name: encode(tokenizer, part(text, name), count)
        for name, count in (("calibrated", sizes.calibrated), ("held out", sizes.held_out))
    }
    calibration = calibrate(
        model,
        [ids["calibrated"]],
        held_out=[ids["held out"]],
        max_tokens=max(map(len, ids.values())),
        seqlen=sizes.seqlen,
        progress=sys.stderr.isatty(),
    )
    calibration.save(folder / "calibration.json")
    calibration.plot(folder / "calibration.png")
    return calibration


def calibration_fields(calibration) -> dict:
    """Return what of a calibration goes into the JSON lines."""
    phi = [value for layer in calibration.layers for value in layer.phi or ()]
    held_out = calibration.held_out
    return {
        "kind": "calibration",
        "tokens": calibration.tokens,
        "seqlen": calibration.seqlen,
        "guard": calibration.guard,
        "score_range": calibration.score_range,
        "phi_range": [min(phi), max(phi)] if phi else None,
        "layers_on": calibration.layers_on,
        "layers": calibration.num_layers,
        "held_out_tokens": held_out.tokens,
        "held_out_rows_checked": held_out.rows_checked,
        "held_out_rows_recomputed": held_out.rows_recomputed,
    }


def tune_linears(model, dtypes: list[torch.dtype], seconds: float, folder: Path) -> list[str]:
    """Measure M1 and M2 of the model's linear layers and put them in force for this process; with
    `seconds` 0 leave what is in force. Return lines that say what is.

    Args:
        model: its torch.nn.Linear layers' [N, K] are measured.
        dtypes: to be measured.
        seconds: for each [N, K] and dtype, about.
        folder: where dataflow.json goes.
    """
    from flashinfer_lite import dataflow

    modules = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    shapes = sorted({(m.out_features, m.in_features) for m in modules})
    lines, path = [], folder / "dataflow.json"
    if seconds:
        path.unlink(missing_ok=True)
        print(f"  measuring for about {seconds * len(shapes) * len(dtypes):.0f} s", flush=True)
        for dtype in dtypes:
            table = dataflow.tune(shapes, dtype=dtype, max_m=32, seconds=seconds)
            table.save(path)
            if table.contention:
                lines.append(f"measured on a busy machine ({table.contention})")
        dataflow.load(path)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for n, k in shapes:
            m1, m2 = dataflow.thresholds("cpu", dtype, n, k)
            lines.append(f"{name:8} [{n}, {k}]: gemv to M1 = {m1}, flat_gemm to M2 = {m2}")
    return lines


def write_lines(path: Path, records: list[dict]) -> None:
    """Write the records as JSON lines; the file appears whole."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    partial.replace(path)
