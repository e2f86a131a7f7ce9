"""The guard of the unified-max softmax, as csrc/common/unified.h has it."""

import torch

# dtype of the probabilities -> (a, b): a row is computed again unless a < row_max - phi < b, in
# natural units of the score.
GUARDS = {
    torch.float64: (0.0, 44.0),
    torch.float32: (0.0, 44.0),
    torch.bfloat16: (0.0, 44.0),
    torch.float16: (0.0, 10.4),
}
BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in GUARDS}


def named(dtype) -> tuple[str, tuple[float, float]]:
    """("float16", its guard) of a torch.dtype or of its name."""
    for name, known in BY_NAME.items():
        if dtype in (name, known):
            return name, GUARDS[known]
    raise ValueError(f"dtype: expected one of {', '.join(BY_NAME)}, got {dtype!r}")
