"""One phi per query head on each attention layer: the unified-max softmax of FlashDecoding++, as
calibrated for a model."""

import os

import torch
from torch import nn

# A plain attribute, in the module's __dict__: a buffer would be in state_dict, or at least be cast
# with the model.
_ATTRIBUTE = "_flashinfer_lite_phi"


def phi_of(module: nn.Module, device: torch.device) -> torch.Tensor | None:
    """phi of an attention layer, float32 [num_heads_q] on `device`; None for the online softmax."""
    # A missing attribute of a module is an exception inside; but of the two, dynamo guards getattr.
    compiling = torch.compiler.is_compiling()
    phi = getattr(module, _ATTRIBUTE, None) if compiling else module.__dict__.get(_ATTRIBUTE)
    if phi is None or phi.device == device:
        return phi
    # The model has been moved: move phi too, once, and outside of a graph for good.
    with torch.inference_mode(False):
        phi = phi.to(device)
    if not compiling:
        module.__dict__[_ATTRIBUTE] = phi
    return phi


def load(calibration):
    """A `flashinfer_lite.calibrate.Calibration`, from itself or from the path of a saved one."""
    if isinstance(calibration, (str, os.PathLike)):
        from flashinfer_lite.calibrate import Calibration  # it imports this package

        try:
            return Calibration.load(calibration)
        except OSError as error:
            why = error.strerror or error
            text = f"calibration: expected the path of a saved one, got {calibration}: {why}"
            raise type(error)(text) from error
    if not callable(getattr(calibration, "phi", None)):
        raise TypeError(
            "calibration: expected a flashinfer_lite.calibrate.Calibration or the path of one, got "
            f"{type(calibration).__name__}"
        )
    return calibration


def phis_by_layer(calibration) -> dict[int, list[float]]:
    """The layers that `calibration` gives a phi; in all others the softmax stays online."""
    phis = {layer: calibration.phi(layer) for layer in range(calibration.num_layers)}
    return {layer: phi for layer, phi in phis.items() if phi is not None}


def check_fits(model, calibration, phis: dict[int, list[float]]) -> dict[int, list[nn.Module]]:
    """The modules of each phi; ValueError where the calibration is another model's."""
    from flashinfer_lite.calibrate import GUARDS

    modules = _modules_by_layer(model)
    heads = [_num_heads(module) or 0 for layer in modules.values() for module in layer]
    config = model.config.get_text_config()
    # Both as `calibrate` counts them.
    num_layers = max([getattr(config, "num_hidden_layers", 0), *(layer + 1 for layer in modules)])
    for name, ours, theirs in (
        ("layers", calibration.num_layers, num_layers),
        ("query heads", calibration.num_heads_q, max(heads, default=0) or calibration.num_heads_q),
    ):
        if ours != theirs:
            raise ValueError(
                f"calibration: expected one of {theirs} {name} for {type(model).__name__}, got one "
                f"of {ours}"
            )
    guard = GUARDS.get(model.dtype)
    if tuple(calibration.guard) != guard:
        raise ValueError(
            f"calibration: expected one for the guard {guard} of {model.dtype}, got one for "
            f"{tuple(calibration.guard)}; calibration.for_dtype({model.dtype}) chooses phi anew "
            "from the same measurement"
        )
    fitting = {}
    for layer, phi in phis.items():
        found = modules.get(layer, ())
        fitting[layer] = [m for m in found if _num_heads(m) in (None, len(phi))]
        if not fitting[layer]:
            raise ValueError(
                f"calibration: expected an attention layer of index {layer} and {len(phi)} query "
                f"heads, got {[type(module).__name__ for module in found] or 'none of this index'}"
            )
    return fitting


def attach(module: nn.Module, phi: list[float]) -> None:
    """Give an attention layer its phi."""
    parameter = next(module.parameters(), None)
    device = "cpu" if parameter is None or parameter.is_meta else parameter.device
    with torch.inference_mode(False):  # an inference tensor could not be used in training
        module.__dict__[_ATTRIBUTE] = torch.tensor(phi, dtype=torch.float32, device=device)


def detach(module: nn.Module) -> None:
    """Back to the online softmax."""
    module.__dict__.pop(_ATTRIBUTE, None)


def _modules_by_layer(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that may call an attention function, by their layer_idx. Decoder layers and
    state-space mixers have one as well; of attention it is known whether it is causal."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        attends = hasattr(module, "is_causal") or "Attention" in type(module).__name__
        if isinstance(layer, int) and attends:
            found.setdefault(layer, []).append(module)
    return found


def _num_heads(module: nn.Module) -> int | None:
    return getattr(getattr(module, "config", None), "num_attention_heads", None)
