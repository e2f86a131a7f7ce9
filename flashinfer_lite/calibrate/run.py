"""`calibrate`: measure a model, choose its phi, and check them on other text."""

import math
import os

import torch

from flashinfer_lite import _check
from flashinfer_lite._introspect import stats
from flashinfer_lite.calibrate.choose import choose_layer
from flashinfer_lite.calibrate.collect import collecting, evaluating
from flashinfer_lite.calibrate.guard import named
from flashinfer_lite.calibrate.histogram import Histogram
from flashinfer_lite.calibrate.result import Calibration, HeldOut
from flashinfer_lite.calibrate.texts import make_batches, num_tokens

RECOMPUTE_RATE = 1e-3
MAX_TOKENS = 16384
SEQLEN = 1024


def calibrate(
    model,
    texts,
    *,
    tokenizer=None,
    recompute_rate: float = RECOMPUTE_RATE,
    held_out=None,
    max_tokens: int = MAX_TOKENS,
    seqlen: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure the attention scores of a model on text and choose phi for its unified-max softmax.

    The model runs over the texts with an attention function that counts, per layer and head, every
    visible score (after softmax_scale, softcap and mask) and the maximum of every row; memory does
    not grow with the text. `flashinfer_lite.calibrate.choose_layer` says how a phi comes out of the
    row maxima, and when a layer has none. The same texts give the same calibration.

    Args:
        model: a `transformers.PreTrainedModel` that hf.patch accepts; calibrate it in the dtype it
            will run in. Afterwards it is exactly as it was.
        texts: a str, or several of: str; sequence of token ids; dict of tensors, which is passed to
            the model as it is (padded batches, encoder-decoder models). They should be like what
            the model will see, and long enough: below 1 / recompute_rate tokens the whole range of
            what was seen has to fit.
        tokenizer: of the model; needed for str.
        recompute_rate: the share of a head's rows that may be computed twice, 0 <= rate < 1.
        held_out: other texts; the model, patched with the calibration, counts the rows that it
            recomputes on them.
        max_tokens: of the texts, and again of held_out; the rest of them is not read.
        seqlen: tokens the model sees at a time, up to its maximum; scores may grow with the
            position, so take the length that matters. Default: 1024, or the model's maximum.
        progress: show progress bars.

    Returns:
        A Calibration, with `held_out` measured where it was given.

    Raises:
        TypeError: no PreTrainedModel, a text of another type, or a str without a tokenizer.
        ValueError: no text, an argument out of range, or a model that does not take another
            attention function.

    Example:
        >>> calibration = calibrate(model, [open("a.txt").read()], tokenizer=tokenizer)
        >>> calibration.phi(0)  # of each head, or None
    """
    seqlen = _check_arguments(model, recompute_rate, max_tokens, seqlen)
    batches = make_batches(texts, tokenizer, seqlen, max_tokens)
    other = None
    if held_out is not None:
        _check_not_patched(model)
        other = make_batches(held_out, tokenizer, seqlen, max_tokens, "held_out")
    dtype, guard = named(model.dtype)
    found = _collect(model, batches, progress, "calibrate")
    config = model.config.get_text_config()
    indices = (getattr(module, "layer_idx", None) for module in model.modules())
    num_layers = max(
        getattr(config, "num_hidden_layers", 0),
        *(index + 1 for index in indices if isinstance(index, int)),
    )
    absent = (Histogram(0), Histogram(0))
    calibration = Calibration(
        model=_name_of(model),
        num_layers=num_layers,
        num_heads_q=max(scores.num_heads for scores, _ in found.values()),
        dtype=dtype,
        guard=guard,
        recompute_rate=recompute_rate,
        seqlen=seqlen,
        tokens=sum(map(num_tokens, batches)),
        layers=[
            choose_layer(i, *found.get(i, absent), guard, recompute_rate) for i in range(num_layers)
        ],
    )
    if other is not None:
        calibration.held_out = _measure(model, calibration, other, progress)
    return calibration


def _check_arguments(model, recompute_rate, max_tokens, seqlen) -> int:
    """Refuse what cannot be; the seqlen to run with."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}"
        )
    _check.number("recompute_rate", recompute_rate)
    if not 0 <= recompute_rate < 1:
        raise ValueError(f"recompute_rate: expected 0 <= rate < 1, got {recompute_rate!r}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if seqlen is None:
        seqlen = min(SEQLEN, longest)
    for name, value, most in (("max_tokens", max_tokens, math.inf), ("seqlen", seqlen, longest)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if not 1 <= value <= most:
            bound = f" and <= {most}, the model's maximum" if most < math.inf else ""
            raise ValueError(f"{name}: expected >= 1{bound}, got {value}")
    return seqlen


def _check_not_patched(model) -> None:
    from flashinfer_lite.hf.patching import _STATE

    if _STATE in vars(model):
        raise ValueError(
            "model: patched already, and held_out is measured by a patch; restore() that one first"
        )


def _name_of(model) -> str:
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name


def _collect(model, batches, progress, label) -> dict[int, tuple[Histogram, Histogram]]:
    with collecting(model) as collector:
        _run(model, batches, progress, label)
    if not collector.layers:
        raise ValueError(
            f"model: {type(model).__name__} called its attention function for no layer with a "
            f"layer_idx ({collector.unnumbered} calls without)"
        )
    return collector.layers


def _run(model, batches: list[dict], progress: bool, label: str) -> None:
    """The model's forward, batch by batch, under a bar that counts tokens."""
    from tqdm import tqdm

    total = sum(map(num_tokens, batches))
    with tqdm(total=total, unit="tok", desc=label, disable=not progress) as bar:
        for batch in batches:
            inputs = {
                name: value.to(model.device) if torch.is_tensor(value) else value
                for name, value in batch.items()
            }
            if set(inputs) == {"input_ids"}:  # without the head: a vocabulary's logits per token
                model.base_model(**inputs, use_cache=False)
            else:
                model(**inputs)
            bar.update(num_tokens(batch))


def _measure(model, calibration, batches, progress) -> HeldOut:
    """Run the patched model and see how many rows its kernels recompute."""
    from flashinfer_lite.hf import patch

    tokens = sum(map(num_tokens, batches))
    if not calibration.layers_on:
        return HeldOut(tokens, 0, 0)
    with patch(model, linear=False, cache=False, calibration=calibration), evaluating(model):
        before = stats()
        _run(model, batches, progress, "held out")
        after = stats()
    return HeldOut(
        tokens,
        after.rows_checked - before.rows_checked,
        after.rows_recomputed - before.rows_recomputed,
    )
