"""Every mask the two functions agree on hides what transformers' complete boolean mask hides."""

import itertools

import pytest
import torch
from hf_models import hf
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import flashinfer_lite
from flashinfer_lite.testing import assert_close

WINDOW = 4


class Module(torch.nn.Module):
    is_causal = True


def qkv(seqlen_q, seqlen_kv, device, dtype=torch.float64):
    shapes = ((3, 4, seqlen_q, 16), (3, 2, seqlen_kv, 16), (3, 2, seqlen_kv, 8))
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def assert_same_as_complete(q_length, kv_length, attention_mask, device, **kwargs):
    """Attention with our mask function's answer equals attention with sdpa's complete mask."""
    options = {
        "batch_size": 3,
        "q_length": q_length,
        "kv_length": kv_length,
        "attention_mask": attention_mask,
        "device": device,
        **kwargs,
    }
    q, k, v = qkv(q_length, kv_length, device)
    sliding_window = options.get("local_size")
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    complete = sdpa_mask(**{**options, **skips})
    is_causal = options.get("mask_function") is not bidirectional_mask_function
    row = hf.key_mask(**options)
    for grad in (False, True):  # without gradients short steps go to the decode kernel
        with torch.set_grad_enabled(grad):
            out, _ = hf.attention_forward(
                Module(), q, k, v, row, sliding_window=sliding_window, is_causal=is_causal
            )
            wanted, _ = hf.attention_forward(
                Module(), q, k, v, complete, sliding_window=sliding_window, is_causal=is_causal
            )
        assert_close(out, wanted, wanted)
    return row


def paddings(seqlen, device):
    """Left, right, both, none, a hole, nothing visible: one batch of three for each."""
    masks = torch.ones(6, 3, seqlen, dtype=torch.bool, device=device)
    masks[0, 1, :3] = False
    masks[1, 1:, -2:] = False
    masks[2, 1, :2] = masks[2, 1, -1:] = False
    masks[4, 2, 2:3] = False
    masks[5, 0] = False
    return masks


@pytest.mark.parametrize("q_length", (1, 3, 9))
@pytest.mark.parametrize(
    ("mode", "past", "spare"),
    [
        ("bidirectional", 0, 0),  # encoders have no cache
        *itertools.product(("causal", "window"), (0, 5), (0, 4)),
    ],
)
@pytest.mark.parametrize("position", ("int", "tensor"))
def test_against_the_complete_mask(device, mode, q_length, past, spare, position):
    """Caches with `past` tokens and, if static, `spare` slots nobody has written yet."""
    functions = {
        "causal": {"mask_function": causal_mask_function},
        "window": {
            "mask_function": sliding_window_causal_mask_function(WINDOW),
            "local_size": WINDOW,
        },
        "bidirectional": {
            "mask_function": bidirectional_mask_function,
            "allow_is_causal_skip": False,
            "allow_is_bidirectional_skip": True,
        },
    }
    seen = past + q_length
    q_offset = past if position == "int" else torch.tensor(past, device=device)
    options = {**functions[mode], "q_offset": q_offset}
    for mask in (None, *paddings(seen, device)):
        assert_same_as_complete(q_length, seen + spare, mask, device, **options)
    if mode != "bidirectional" and q_length == 1:  # the static decode step of a compileable cache
        options["allow_is_causal_skip"] = False
        for mask in (None, *paddings(seen, device)):
            row = assert_same_as_complete(q_length, seen + spare, mask, device, **options)
            assert row.shape[-1] == seen + spare, "its shape must not depend on the length"


@pytest.mark.parametrize("q_length", (1, 2, 6))
@pytest.mark.parametrize("padded", (False, True))
def test_sliding_cache(device, q_length, padded):
    """A cache that has dropped its oldest tokens: slot 0 is token `kv_offset`."""
    seen = 11 + q_length
    mask = None
    if padded:
        mask = torch.ones(3, seen, dtype=torch.bool, device=device)
        mask[1, :9], mask[2, :1] = False, False
    assert_same_as_complete(
        q_length,
        WINDOW - 1 + q_length,
        mask,
        device,
        q_offset=11,
        kv_offset=11 - WINDOW + 1,
        mask_function=sliding_window_causal_mask_function(WINDOW),
        local_size=WINDOW,
    )


def test_short_mask_is_padding(device):
    """transformers reads a mask that ends early as padding on the right."""
    mask = torch.ones(3, 5, dtype=torch.bool, device=device)
    assert_same_as_complete(4, 9, mask, device, q_offset=5)


def test_what_is_not_materialised(device):
    assert hf.key_mask(batch_size=1, q_length=5, kv_length=8, q_offset=3, device=device) is None
    ones = torch.ones(2, 8, dtype=torch.bool, device=device)
    options = {"batch_size": 2, "q_length": 8, "kv_length": 8, "device": device}
    assert hf.key_mask(attention_mask=ones, **options) is None
    ones[1, 0] = False
    row = hf.key_mask(attention_mask=ones, **options)
    assert row.shape == (2, 1, 1, 8) and row.untyped_storage().data_ptr() == ones.data_ptr()


@pytest.fixture
def calls(monkeypatch):
    """What the attention function hands to the two ops."""
    seen = []

    def recorded(name):
        op = getattr(flashinfer_lite, name)

        def call(q, k, v, **kwargs):
            seen.append(
                (name, k, {key: given for key, given in kwargs.items() if given is not None})
            )
            return op(q, k, v, **kwargs)

        return call

    for name in ("attention", "decode"):
        monkeypatch.setattr(flashinfer_lite, name, recorded(name))
    return seen


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("local_size", (None, WINDOW))
def test_padding_becomes_a_span(device, calls, side, local_size):
    """A mask that is one run of keys reaches the kernel as its ends, K and V as they are."""
    mask = torch.ones(3, 9, dtype=torch.bool, device=device)
    mask[1, slice(2) if side == "left" else slice(-2, None)] = False
    q, k, v = qkv(9, 9, device)
    options = {"batch_size": 3, "q_length": 9, "kv_length": 9, "device": device}
    if local_size:
        function = sliding_window_causal_mask_function(local_size)
        options |= {"mask_function": function, "local_size": local_size}
    row = hf.key_mask(attention_mask=mask, **options)
    hf.attention_forward(Module(), q, k, v, row, sliding_window=local_size)
    ((name, keys, kwargs),) = calls
    assert name == "attention" and keys.data_ptr() == k.data_ptr() and "mask" not in kwargs
    if side == "left":
        assert kwargs["causal"] is True and kwargs["kv_start"].tolist() == [0, 2, 0]
        assert "seqlens_kv" not in kwargs
    else:
        assert kwargs["causal"] == "top_left" and kwargs["seqlens_kv"].tolist() == [9, 7, 9]
        assert "kv_start" not in kwargs


def test_short_steps_without_gradients_are_decoded(device, calls):
    """And of a static cache only what has been written is read, whatever the mask's shape."""
    q, k, v = qkv(1, 20, device)
    row = hf.key_mask(
        batch_size=3,
        q_length=1,
        kv_length=20,
        q_offset=torch.tensor(6, device=device),
        allow_is_causal_skip=False,
        device=device,
    )
    with torch.no_grad():
        hf.attention_forward(Module(), q, k, v, row)
    hf.attention_forward(Module(), q, k, v, row)
    assert [name for name, _, _ in calls] == ["decode", "attention"]
    for _, keys, kwargs in calls:
        assert keys.data_ptr() == k.data_ptr() and keys.shape[1] == 20
        assert kwargs["seqlens_kv"].tolist() == [7, 7, 7] and "mask" not in kwargs


def test_patterns_are_spelt_out(device):
    """What is not plainly causal, or may not be skipped, is a complete mask."""

    def odd_keys(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx % 2 == 1

    pattern = and_masks(odd_keys, causal_mask_function)
    row = assert_same_as_complete(6, 6, None, device, mask_function=pattern)
    assert row.shape == (3, 1, 6, 6)
    row = assert_same_as_complete(6, 6, None, device, allow_is_causal_skip=False)
    assert row.shape == (3, 1, 6, 6)


def reference(q, k, v, bias, scaling, softcap=None):
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = q @ k.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (torch.softmax(scores + bias, -1) @ v).transpose(1, 2)


def hidden(visible):
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)


def test_scaling_and_softcap(device):
    q, k, v = qkv(5, 7, device)
    causal = torch.ones(5, 7, dtype=torch.bool).tril(2)
    out, _ = hf.attention_forward(Module(), q, k, v, None, scaling=0.9, softcap=2.0)
    wanted = reference(q, k, v, hidden(causal).to(device), 0.9, 2.0)
    assert_close(out, wanted, wanted)
    out, _ = hf.attention_forward(Module(), q, k, v, None, is_causal=False)
    wanted = reference(q, k, v, 0.0, 16**-0.5)
    assert_close(out, wanted, wanted)


def test_bidirectional_window(device):
    q, k, v = qkv(6, 6, device)
    slot = torch.arange(6)
    near = (slot[:, None] - slot).abs() < 3
    out, _ = hf.attention_forward(Module(), q, k, v, None, is_causal=False, sliding_window=3)
    wanted = reference(q, k, v, hidden(near).to(device), 16**-0.5)
    assert_close(out, wanted, wanted)


@pytest.mark.parametrize("kind", ("none", "padding", "hole", "complete", "additive"))
def test_position_bias(device, kind):
    """Added on top of whatever mask there is, and it gets its gradient."""
    q, k, v = qkv(6, 6, device)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    keys = torch.ones(3, 6, dtype=torch.bool)
    if kind in ("padding", "hole"):
        keys[1, 1 if kind == "hole" else 0] = False
    visible = (causal & keys[:, None, None, :]).to(device)
    visible[1, :, 0, 0] = visible[1, :, 0, 0] & (kind != "padding")
    bias = torch.randn(1, 4, 6, 6, device=device, dtype=torch.float64, requires_grad=True)
    mask = {"none": None, "complete": visible, "additive": hidden(visible).to(device)}.get(kind)
    if kind in ("padding", "hole"):
        mask = hf.key_mask(
            batch_size=3, q_length=6, kv_length=6, attention_mask=keys.to(device), device=device
        )
    out, _ = hf.attention_forward(Module(), q, k, v, mask, scaling=1.0, position_bias=bias)
    wanted = reference(q, k, v, bias + hidden(visible).to(device), 1.0)
    wanted = torch.where(wanted.isnan(), 0.0, wanted)  # the one row that sees nothing
    assert_close(out, wanted, wanted)
    seen = slice(1, None) if kind == "padding" else slice(None)
    weights = torch.randn_like(out[:, seen])
    (actual,) = torch.autograd.grad((out[:, seen] * weights).sum(), bias)
    (oracle,) = torch.autograd.grad((wanted[:, seen] * weights).sum(), bias)
    oracle = torch.where(oracle.isnan(), 0.0, oracle)
    assert_close(actual, oracle, oracle, "gradient of the bias")
