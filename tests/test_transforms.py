"""torch.func's transforms and forward-mode AD: right, or refused by name, never silently wrong."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from flashinfer_lite import attention, decode, flat_linear, merge_states, reference
from flashinfer_lite.testing import assert_same_bits, make_qkv

NO_FORWARD_AD = "has no forward-mode AD"
# torch's own word on ops without a batching rule: a loop over the samples.
a_loop = pytest.mark.filterwarnings("ignore:There is a performance drop")


def states(device):
    return torch.randn(2, 1, 3, 2, 16, device=device), torch.randn(2, 1, 2, 3, device=device)


# op -> a function of the device that makes its tensors
OPS = {
    attention: lambda device: make_qkv(1, 3, 9, 2, 1, 16, device=device),
    decode: lambda device: make_qkv(1, 1, 9, 2, 1, 16, device=device),
    merge_states: states,
    flat_linear: lambda device: (
        torch.randn(3, 24, device=device).bfloat16(),
        torch.randn(16, 24, device=device).bfloat16(),
    ),
}
NAMES = {
    attention: ("q", "k", "v"),
    decode: ("q", "k_cache", "v_cache"),
    merge_states: ("outs", "lses"),
    flat_linear: ("x", "weight"),
}
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


@every_op
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_a_tangent_is_refused_by_name(device, op, grad_mode):
    tensors = OPS[op](device)
    expected = op(*tensors)
    for position, name in enumerate(NAMES[op]):
        with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
            given = list(tensors)
            given[position] = forward_ad.make_dual(given[position], given[position])
            with pytest.raises(NotImplementedError, match=f"^{name}: .*{NO_FORWARD_AD}"):
                op(*given)
            # Without a tangent the level is nothing to us.
            for x, y in zip(as_tuple(op(*tensors)), as_tuple(expected), strict=True):
                assert_same_bits(x, y)


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


@every_op
def test_jvp_is_refused_by_name(device, op):
    tensors = tuple(OPS[op](device))
    with pytest.raises(NotImplementedError, match=NO_FORWARD_AD):
        jvp(op, tensors, tensors)


def test_a_tangent_of_a_mask_or_of_a_leaf_is_refused(device):
    q, k, v = make_qkv(1, 3, 9, 2, 1, 16, device=device, requires_grad=True)
    mask = torch.randn(3, 9, device=device)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=f"^mask: .*{NO_FORWARD_AD}"):
            attention(q, k, v, mask=forward_ad.make_dual(mask, mask))
        with pytest.raises(NotImplementedError, match=f"^k: .*{NO_FORWARD_AD}"):
            attention(q, forward_ad.make_dual(k, torch.ones_like(k)), v)


def test_the_reference_has_forward_ad(device):
    q, k, v = (x.double() for x in make_qkv(1, 3, 9, 2, 1, 16, device=device))
    tangents = [torch.randn_like(x) for x in (q, k, v)]
    _, got = jvp(lambda *t: attention(*t, impl="reference"), (q, k, v), tuple(tangents))
    _, expected = jvp(reference.attention, (q, k, v), tuple(tangents))
    assert got.abs().sum() > 0
    assert_same_bits(got, expected)


@a_loop
@pytest.mark.parametrize("op", [attention, decode], ids=["attention", "decode"])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 1, 1), (0, None, None), (None, 2, 2)], ids=str)
def test_vmap_equals_a_loop(device, op, in_dims):
    def run(*tensors):
        return op(*tensors, causal=True, window=(5, 0), return_lse=True)

    def sample(i):
        return [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims)]  # noqa: B905

    tensors = [
        x if dim is None else torch.stack([x, x.flip(1) * 2, -x], dim)
        for x, dim in zip(make_qkv(2, 3, 9, 4, 2, 16, device=device), in_dims, strict=True)
    ]
    got = vmap(run, in_dims)(*tensors)
    for i in range(3):
        for x, y in zip(got, run(*sample(i)), strict=True):
            assert_same_bits(x[i], y)


def loss(q, k, v):
    return attention(q, k, v, causal=True).square().sum()


@a_loop
def test_gradients_through_vmap(device):
    leaves = [torch.stack([x, -x]) for x in make_qkv(1, 3, 9, 4, 2, 16, device=device)]
    for x in leaves:
        x.requires_grad_()
    got = torch.autograd.grad(vmap(loss)(*leaves).sum(), leaves)
    for i in range(2):
        sample = [x[i].detach().requires_grad_() for x in leaves]
        for x, y in zip(got, torch.autograd.grad(loss(*sample), sample), strict=True):
            assert_same_bits(x[i], y)


@a_loop
def test_func_grad_is_refused(device):
    """torch.library.register_autograd knows nothing of it, and torch says so in each nesting."""
    tensors = [torch.stack([x, -x]) for x in make_qkv(1, 3, 9, 4, 2, 16, device=device)]
    for run in (
        lambda *t: grad(loss)(*(x[0] for x in t)),
        vmap(grad(loss)),
        grad(lambda *t: vmap(loss)(*t).sum()),
    ):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            run(*tensors)


@a_loop
def test_forward_ad_below_and_above_vmap_is_refused(device):
    tensors = [torch.stack([x, -x]) for x in make_qkv(1, 3, 9, 4, 2, 16, device=device)]
    pairs = tuple(tensors), tuple(tensors)
    with pytest.raises(NotImplementedError, match=NO_FORWARD_AD):
        jvp(lambda *t: vmap(attention)(*t), *pairs)
    with pytest.raises(NotImplementedError, match=NO_FORWARD_AD):
        vmap(lambda *t: jvp(attention, t, t))(*tensors)
