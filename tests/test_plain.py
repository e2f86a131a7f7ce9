"""The short way of plain calls: who takes it, and that nobody can tell but by the clock."""

import functools
import math
import sys

import pytest
import torch

from flashinfer_lite import attention, decode
from flashinfer_lite.testing import assert_same_bits, make_qkv, on_device

SHORT = sys.modules["flashinfer_lite._plain"]
OPS = {"attention": attention, "decode": decode}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture
def short(monkeypatch):
    """The short way's results so far, None where it stepped aside."""
    results, call = [], SHORT.call

    def recorded(*arguments):
        results.append(call(*arguments))
        return results[-1]

    monkeypatch.setattr(SHORT, "call", recorded)
    return results


@pytest.fixture
def no_short(monkeypatch):
    """Turns the short way off when called."""
    return lambda: monkeypatch.setattr(SHORT, "call", lambda *_: None)


PLAIN = {
    "nothing": {},
    "causal": {"causal": True},
    "window": {"window": (3, 0)},
    "scores": {"softmax_scale": 0.3, "softcap": 5.0},
    "lengths": {"kv_start": [1, 0], "seqlens_kv": [7, 9]},
    "lse": {"return_lse": True},
}


@every_op
@pytest.mark.parametrize("name", PLAIN)
def test_it_gives_the_same_bits(device, short, no_short, op, name):
    q, k, v = make_qkv(2, 3, 9, 4, 2, 16, device=device)
    arguments = {
        key: torch.tensor(x, device=device) if isinstance(x, list) else x
        for key, x in PLAIN[name].items()
    }
    quick = op(q, k, v, **arguments)
    assert len(short) == 1 and short[0] is not None
    no_short()
    slow = op(q, k, v, **arguments)
    assert type(quick) is type(slow)
    for x, y in zip(quick, slow, strict=True):
        assert_same_bits(x, y)


class Subclass(torch.Tensor):
    pass


@every_op
def test_who_has_to_be_checked_first(device, short, op):
    q, k, v = make_qkv(2, 3, 9, 4, 2, 16, device=device)
    run = functools.partial(op, q, k, v)
    for arguments in (
        {"softmax": "unified"},
        {"phi": -5.0},
        {"impl": "reference"},
        {"causal": "top_left"},
        {"window": [3, 0]},
        {"softmax_scale": 1},
        {"softcap": 5},
        {"mask": torch.ones(3, 9, dtype=torch.bool, device=device)},
    ):
        run(**arguments)
    op(q.as_subclass(Subclass), k, v)
    with torch.autocast(device.type, torch.bfloat16):
        assert run().dtype == torch.bfloat16
    assert all(result is None for result in short)


def test_gradients_go_the_long_way(device, short):
    q, k, v = make_qkv(1, 3, 9, 2, 1, 16, device=device)
    for x in (q, k, v):
        x.requires_grad_()
        assert attention(q, k, v).grad_fn is not None
        with torch.no_grad():
            assert attention(q, k, v).grad_fn is None
        with pytest.raises(RuntimeError, match="^[qkv]_?(cache)?: decode is for inference"):
            decode(q, k, v)
        x.requires_grad_(False)
    assert [result is None for result in short] == [True, False, True] * 3


WRONG = {
    "q: expected 4 dim": lambda q, k, v: ((q[0], k, v), {}),
    "q: expected a torch.Tensor": lambda q, k, v: ((None, k, v), {}),
    "q: expected head_dim": lambda q, k, v: ((q[..., :0], k[..., :0], v), {}),
    "k.*: expected q's dtype": lambda q, k, v: ((q, k.half(), v), {}),
    "k.*: expected shape": lambda q, k, v: ((q, k[:1], v), {}),
    "v.*: expected the last dimension": lambda q, k, v: ((q, k, v.mT.contiguous().mT), {}),
    "softmax_scale": lambda q, k, v: ((q, k, v), {"softmax_scale": math.nan}),
    "softcap": lambda q, k, v: ((q, k, v), {"softcap": 0.0}),
    "window": lambda q, k, v: ((q, k, v), {"window": (-2, 0)}),
    "seqlens_kv: expected dtype": lambda q, k, v: ((q, k, v), {"seqlens_kv": torch.ones(2)}),
    "causal": lambda q, k, v: ((q, k, v), {"causal": 1}),
}


@every_op
@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused_is_named_as_ever(device, no_short, op, message):
    (q, k, v), arguments = WRONG[message](*make_qkv(2, 3, 9, 4, 2, 16, device=device))
    arguments = {key: on_device(x, device) for key, x in arguments.items()}
    with pytest.raises((TypeError, ValueError), match=f"^{message}") as quick:
        op(q, k, v, **arguments)
    no_short()
    with pytest.raises(type(quick.value)) as slow:
        op(q, k, v, **arguments)
    assert str(quick.value) == str(slow.value)


def test_a_compiled_call_is_checked(device, short):
    q, k, v = make_qkv(1, 3, 16, 2, 1, 16, device=device)
    step = torch.compile(lambda q: attention(q, k, v), backend="eager", fullgraph=True)
    assert_same_bits(step(q), attention(q, k, v))
    assert len(short) == 2 and short[0] is None and short[1] is not None
