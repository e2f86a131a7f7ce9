"""Memory that notices: NaN where a kernel must write, guard bands where it must not."""

import math
from dataclasses import dataclass

import torch

GUARD = 256  # elements before and after: more than one vector store or one row of head_dim 256
_PATTERN = 0x5A


@dataclass
class Guarded:
    """A tensor inside a larger buffer whose other bytes hold a pattern."""

    tensor: torch.Tensor
    buffer: torch.Tensor  # bytes
    first: int  # of the tensor's bytes in the buffer
    last: int

    def assert_intact(self, name="tensor"):
        """Fails if a byte outside of the tensor has changed."""
        for where, band in (
            ("before", self.buffer[: self.first]),
            ("after", self.buffer[self.last :]),
        ):
            hits = (band != _PATTERN).nonzero().flatten()
            if len(hits):
                at = int(hits[-1] - len(band) if where == "before" else hits[0])
                raise AssertionError(
                    f"{name}: {len(hits)} guard bytes {where} it were overwritten, the nearest at "
                    f"distance {abs(at)}"
                )


def guarded(shape, dtype, device="cpu", fill=math.nan, offset=0):
    """A contiguous tensor between guard bands, filled with ``fill``.

    Args:
        shape, dtype, device: of the tensor.
        fill: NaN by default, so that an element that is never written shows.
        offset: elements by which it is moved off its natural alignment.

    >>> out = guarded((2, 3), torch.float32)
    >>> out.tensor.isnan().all().item(), out.assert_intact()
    (True, None)
    """
    size = torch.empty((), dtype=dtype).element_size()
    first = (GUARD + offset) * size
    last = first + math.prod(shape) * size
    buffer = torch.full((last + GUARD * size,), _PATTERN, dtype=torch.uint8, device=device)
    tensor = buffer.view(dtype)[first // size : last // size].view(shape)
    if dtype.is_floating_point or not math.isnan(fill):
        tensor.fill_(fill)
    return Guarded(tensor, buffer, first, last)
