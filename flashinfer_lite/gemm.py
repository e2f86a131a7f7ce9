"""Matrix products with few rows."""


def flat_linear(
    x, weight, bias=None, *, weight_scale=None, impl="auto", batch_invariant=False, out=None
):
    """Flat GEMM of FlashDecoding++ (arXiv 2311.01282). Not implemented yet.

    Raises:
        NotImplementedError: always; use torch.nn.functional.linear until it lands.
    """
    raise NotImplementedError("flat_linear: not implemented yet; use torch.nn.functional.linear")
