"""Which [N, K] to measure: given, or those of a model's linear layers."""

from collections.abc import Iterable
from pathlib import Path

import torch


def parse_shape(text: str) -> tuple[int, int]:
    """[N, K] from "N,K".

    Raises:
        ValueError: naming what was expected.
    """
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[1])
    raise ValueError(f"expected N,K with integers >= 1, got {text!r}")


def model_shapes(folder: Path) -> tuple[dict[tuple[int, int], list[str]], torch.dtype | None]:
    """The [N, K] of the linear layers of a transformers model, from its config.json alone.

    The model is built without memory for its weights (on torch's meta device), so the names and
    the fusion of its projections are the model's own.

    Args:
        folder: with the config.json.

    Returns:
        ({(N, K): names of the layers, e.g. ["k_proj", "v_proj"]}, the config's dtype or None).

    Raises:
        ValueError: if there is no config.json, transformers is absent or does not know the model,
            or the model has no linear layer.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"expected a folder with a config.json, got {folder}")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError(
            f"expected transformers to read {folder}, got: {error}; pip install transformers, or "
            "give --shapes"
        ) from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"expected a causal language model in {folder}, got: {line}") from error
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else None
    return linear_shapes(model.named_modules(), folder), dtype


def linear_shapes(modules: Iterable, where) -> dict[tuple[int, int], list[str]]:
    """{(N, K): last parts of the names} of the nn.Linear among named modules, largest last."""
    found: dict[tuple[int, int], set[str]] = {}
    for name, module in modules:
        if isinstance(module, torch.nn.Linear):
            shape = (module.out_features, module.in_features)
            found.setdefault(shape, set()).add(name.rpartition(".")[2])
    if not found:
        raise ValueError(f"expected a model with nn.Linear layers, got none in {where}")
    ordered = sorted(found, key=lambda shape: (shape[0] * shape[1], shape))
    return {shape: sorted(found[shape]) for shape in ordered}
