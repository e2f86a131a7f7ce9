"""merge_states(): splitting the keys and merging changes nothing; empty states are the identity."""

import pytest
import torch

from flashinfer_lite import attention, merge_states, reference
from flashinfer_lite.testing import assert_close, assert_lse_close, assert_same_bits, make_qkv

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
NO_FLOAT64 = "CUDA kernels refuse float64 by name"


def make_states(num_states, dtype, device, shape=(2, 3, 4, 24)):
    batch_size, seqlen_q, num_heads_q, _ = shape
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    outs = (torch.randn(num_states, *shape, device=device) + 0.5).to(dtype)
    lses = torch.randn(num_states, batch_size, num_heads_q, seqlen_q, device=device) * 3
    return outs, lses.to(lse_dtype)


def check_merge(outs, lses):
    out, lse = merge_states(outs, lses)
    oracle, oracle_lse = reference.merge_states(outs.double(), lses.double())
    eager, _ = reference.merge_states(outs, lses)
    assert out.dtype == outs.dtype and lse.dtype == lses.dtype
    assert_close(out, oracle, eager)
    assert_lse_close(lse, oracle_lse)
    return out, lse


@all_dtypes
@pytest.mark.parametrize("num_states", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("head_dim_v", [8, 24, 64, 256])
def test_against_the_oracle(device, isa, dtype, num_states, head_dim_v):
    outs, lses = make_states(num_states, dtype, device, (2, 3, 4, head_dim_v))
    check_merge(outs, lses)
    lses[torch.rand_like(lses) < 0.4] = -torch.inf
    check_merge(outs, lses)
    check_merge(outs, lses * 100)


@all_dtypes
def test_splitting_the_keys_changes_nothing(device, isa, dtype):
    q, k, v = make_qkv(2, 16, 300, dtype=dtype, device=device)
    for cuts in ([4], [100, 200], [1, 2, 3, 299]):
        bounds = zip([0, *cuts], [*cuts, 300], strict=True)
        parts = [attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in bounds]
        out, lse = merge_states(*zip(*parts, strict=True))
        oracle, oracle_lse = reference.attention(q, k, v, dtype=torch.float64, return_lse=True)
        # each state is rounded to dtype once, and the merge once more
        assert_close(out, oracle, reference.attention(q, k, v), terms=v.abs().max().item())
        assert_lse_close(lse, oracle_lse)


@all_dtypes
def test_empty_states_are_the_identity(device, isa, dtype):
    outs, lses = make_states(1, dtype, device)
    empty = torch.full_like(outs, torch.nan), torch.full_like(lses, -torch.inf)
    for states in (
        [(outs, lses), empty],
        [empty, (outs, lses)],
        [empty, empty, (outs, lses), empty],
    ):
        out, lse = merge_states(*(torch.cat(parts) for parts in zip(*states, strict=True)))
        assert_same_bits(out, outs[0])
        assert_same_bits(lse, lses[0], "lse")


@all_dtypes
def test_only_empty_states(device, isa, dtype):
    outs, lses = make_states(3, dtype, device)
    for count in (1, 2, 3):
        poisoned = torch.full_like(outs[:count], torch.nan)
        out, lse = merge_states(poisoned, torch.full_like(lses[:count], -torch.inf))
        assert_same_bits(out, torch.zeros_like(outs[0]))
        assert (lse == -torch.inf).all()


@all_dtypes
def test_single_state_is_unchanged(device, isa, dtype):
    outs, lses = make_states(1, dtype, device)
    out, lse = merge_states(outs, lses)
    assert_same_bits(out, outs[0])
    assert_same_bits(lse, lses[0], "lse")


@all_dtypes
def test_far_apart(device, isa, dtype):
    outs, lses = make_states(2, dtype, device)
    lses[0], lses[1] = 20000.0, -20000.0
    out, lse = merge_states(outs, lses)
    assert_same_bits(out, outs[0])
    assert_same_bits(lse, lses[0], "lse")


@all_dtypes
def test_nan_of_a_state_that_counts_stays(device, isa, dtype):
    outs, lses = make_states(2, dtype, device)
    outs[1, 0, 0, 0, 3] = torch.nan
    out, _ = merge_states(outs, lses)
    assert out[0, 0, 0, 3].isnan() and int(out.isnan().sum()) == 1
    lses[0, 1, 2, 1] = torch.nan
    out, lse = merge_states(outs, lses)
    assert lse[1, 2, 1].isnan() and out[1, 1, 2].isnan().all()


@all_dtypes
def test_strides_and_lists(device, isa, dtype):
    outs, lses = make_states(3, dtype, device)
    expected = merge_states(outs, lses)
    strided = outs.transpose(1, 3).contiguous().transpose(1, 3), lses.permute(3, 2, 1, 0)
    strided = strided[0], strided[1].contiguous().permute(3, 2, 1, 0)
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    for inputs in (strided, (list(outs), tuple(lses))):
        got = merge_states(*inputs)
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1], "lse")
    check_merge(outs[:1].expand(3, -1, -1, -1, -1), lses[:1].expand(3, -1, -1, -1))


def test_zero_size_dimensions(device, isa):
    for shape in [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)]:
        out, lse = merge_states(*make_states(2, torch.float32, device, shape))
        assert list(out.shape) == list(shape)
        assert list(lse.shape) == [shape[0], shape[2], shape[1]]


@pytest.mark.cpu_only(NO_FLOAT64)
def test_gradients(device, isa):
    outs, lses = make_states(3, torch.float64, device, (1, 2, 2, 8))
    lses[0, 0, 0, 0] = -torch.inf
    lses[:, 0, 1, 1] = -torch.inf
    leaves = outs.requires_grad_(), lses.requires_grad_()
    weights = torch.randn(1, 2, 2, 8, dtype=torch.float64, device=device)

    def loss(merge):
        out, lse = merge(*leaves)
        return (out * weights).sum() + torch.where(lse.isfinite(), lse, 0).square().sum()

    got = torch.autograd.grad(loss(merge_states), leaves)
    expected = torch.autograd.grad(loss(reference.merge_states), leaves)
    for name, x, ref in zip(("douts", "dlses"), got, expected, strict=True):
        assert_close(x, ref, ref, name)


@pytest.mark.cpu_only(NO_FLOAT64)
def test_gradcheck(device, isa):
    outs, lses = make_states(3, torch.float64, device, (1, 2, 2, 8))
    assert torch.autograd.gradcheck(merge_states, (outs.requires_grad_(), lses.requires_grad_()))


@all_dtypes
def test_gradients_of_other_dtypes(device, isa, dtype):
    outs, lses = make_states(3, dtype, device)

    def gradients(merge, dtype=None):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (outs, lses)]
        out, lse = merge(*leaves)
        return torch.autograd.grad(out.double().square().sum() + lse.double().sum(), leaves)

    got = gradients(merge_states)
    oracle, eager = (
        gradients(reference.merge_states, torch.float64),
        gradients(reference.merge_states),
    )
    assert got[0].dtype == dtype
    for name, x, ref, e in zip(("douts", "dlses"), got, oracle, eager, strict=True):
        assert_close(x, ref, e, name, dtype=dtype, gradient=True, terms=1.0)
