"""Calibration of the unified-max softmax: one phi per layer and head, measured on real text.

    from flashinfer_lite.calibrate import Calibration, calibrate

    calibration = calibrate(model, texts, tokenizer=tokenizer, held_out=other_texts)
    print(calibration.summary())
    calibration.save("calibration.json")
    flashinfer_lite.hf.patch(model, calibration="calibration.json")

or `python -m flashinfer_lite calibrate MODEL_DIR --text FILE`. FlashDecoding++ (arXiv 2311.01282)
replaces the running maximum of a row by a constant phi, which needs no exchange between partial
results, as long as the row's true maximum lies in a guard around phi; other rows are computed
again. Calibration finds the phi with which hardly any are, and the layers where no phi does it.

transformers, tqdm and matplotlib are imported when they are needed, not here.
"""

from flashinfer_lite.calibrate.choose import MARGIN, Layer, choose_layer
from flashinfer_lite.calibrate.cli import add_parser
from flashinfer_lite.calibrate.guard import GUARDS
from flashinfer_lite.calibrate.histogram import Histogram
from flashinfer_lite.calibrate.result import Calibration, HeldOut
from flashinfer_lite.calibrate.run import calibrate

__all__ = [
    "GUARDS",
    "MARGIN",
    "Calibration",
    "HeldOut",
    "Histogram",
    "Layer",
    "add_parser",
    "calibrate",
    "choose_layer",
]
