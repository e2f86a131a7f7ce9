"""Hostile calls of flat_linear straight to the op, beyond those of every op in test_hostile.py."""

import random

import pytest
import torch

import flashinfer_lite

OPS = torch.ops.flashinfer_lite
ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError)

assert flashinfer_lite.built


def test_kernels_and_outputs_of_flat_linear(device, isa):
    x, weight = (torch.randn(size, 40, device=device).bfloat16() for size in (5, 24))
    call = {"x": x, "weight": weight, "bias": None, "out": x.new_zeros(5, 24)}
    for kernel in ("", "vendor", "gemv ", "GEMV", "x" * 10000):
        with pytest.raises(ERRORS, match="kernel: expected gemv or flat_gemm"):
            OPS.flat_linear.out(**call, kernel=kernel)
    for bad in [
        call["out"][:1].expand(5, 24),
        torch.zeros(5 * 24, dtype=torch.bfloat16, device=device).as_strided((5, 24), (23, 1)),
        call["out"].float(),
        call["out"][:, :23],
        call["out"][:4],
        call["out"].t().contiguous().t(),
    ]:
        for kernel in ("gemv", "flat_gemm"):
            with pytest.raises(ERRORS, match="out"):
                OPS.flat_linear.out(**call | {"out": bad}, kernel=kernel)


def test_random_calls_of_flat_linear(device, isa):
    """Any sizes and strides: what is accepted stays in its bounds."""
    rng, accepted = random.Random(0), 0
    for _ in range(300):
        m, n, k = (rng.choice([0, 1, 2, 3, 5, 8, 17, 70]) for _ in range(3))
        dtype = rng.choice([torch.bfloat16, torch.float16])

        def tensor(*shape, dtype=dtype):
            shape = [rng.choice([0, 1, 4, 9]) if rng.random() < 0.02 else size for size in shape]
            row = max(shape[-1] + rng.choice([-1, 0, 0, 0, 1, 7]), 0)
            storage = torch.randn(shape[0] * row + shape[-1] + 4, device=device).to(dtype)
            strides = [rng.choice([0, row]) if rng.random() < 0.1 else row, 1][2 - len(shape) :]
            return storage.as_strided(shape, strides, rng.choice([0, 0, 1, 3]))

        x, weight, bias = tensor(m, k), tensor(n, k), rng.choice([None, tensor(1, n)[0]])
        kernel = rng.choice(["gemv", "flat_gemm"])
        try:
            out = OPS.flat_linear(x, weight, bias, kernel)
            assert out.shape == (x.shape[0], weight.shape[0])
            OPS.flat_linear.out(x, weight, bias, kernel, tensor(m, n))
            accepted += 1
        except ERRORS:
            pass
    assert accepted > 100
