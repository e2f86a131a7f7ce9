"""The flash-attn names: signatures, defaults and meanings of flash-attn 2.8."""

import inspect

import pytest
import torch

import flashinfer_lite
from flashinfer_lite import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    reference,
)
from flashinfer_lite.testing import (
    assert_close_elementwise,
    assert_same_bits,
    check_forward,
    make_qkv,
    on_device,
)

# Verbatim from flash_attn/flash_attn_interface.py of 2.8.4.
_COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
_VARLEN = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {_COMMON})",
    "flash_attn_kvpacked_func": f"(q, kv, {_COMMON})",
    "flash_attn_qkvpacked_func": f"(qkv, {_COMMON})",
    "flash_attn_varlen_func": f"(q, k, v, {_VARLEN}, {_COMMON}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {_VARLEN}, {_COMMON})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {_COMMON})",
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(device, name):
    function = getattr(flashinfer_lite, name)
    assert str(inspect.signature(function)) == SIGNATURES[name]


def qkv(device, seqlen_q=9, seqlen_kv=13, **kwargs):
    return make_qkv(2, seqlen_q, seqlen_kv, device=device, **kwargs)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({}, {}),
        ({"causal": True}, {"causal": True}),
        ({"window_size": (3, 2)}, {"window": (3, 2)}),
        ({"window_size": (3, -1), "causal": True}, {"window": (3, 0)}),
        ({"window_size": (-1, 4)}, {"window": (-1, 4)}),
        ({"window_size": None}, {}),
        ({"window_size": (None, None)}, {}),
        ({"window_size": (2, None)}, {"window": (2, -1)}),
        ({"window_size": [2, 2]}, {"window": (2, 2)}),
        ({"softcap": 2.0}, {"softcap": 2.0}),
        ({"softcap": 0}, {}),
        ({"softmax_scale": 0.5, "causal": True}, {"softmax_scale": 0.5, "causal": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("seqlens", [(9, 13), (13, 9), (1, 7), (8, 8)], ids=str)
def test_meaning(device, theirs, ours, seqlens):
    q, k, v = qkv(device, *seqlens)

    def theirs_func(q, k, v, return_lse, **_):
        out, lse, probs = flash_attn_func(q, k, v, **theirs, return_attn_probs=True)
        assert probs is None
        return out, lse

    out, _ = check_forward(theirs_func, q, k, v, **ours)
    assert_same_bits(flash_attn_func(q, k, v, **theirs), out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", [(9, 13), (13, 9), (1, 7)], ids=str)
def test_alibi(device, seqlens, causal):
    """slopes [heads] or [batch, heads] times the distance from i + seqlen_kv - seqlen_q."""
    q, k, v = qkv(device, *seqlens)
    row = torch.arange(seqlens[0], device=device)[:, None] + seqlens[1] - seqlens[0]
    distance = (row - torch.arange(seqlens[1], device=device)).abs()
    for slopes in (torch.rand(4, device=device), torch.rand(2, 4, device=device)):

        def with_slopes(q, k, v, return_lse, **_):
            options = {"alibi_slopes": slopes, "causal": causal, "softcap": 3.0}  # noqa: B023
            out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
            packed = flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **options)
            assert_same_bits(packed, out)
            offsets, longest = (cu(len(q), n, device) for n in seqlens), seqlens
            flat = (x.flatten(0, 1) for x in (q, k, v))
            if device.type == "cpu":
                ragged = flash_attn_varlen_func(*flat, *offsets, *longest, **options)
                assert_same_bits(ragged, out.flatten(0, 1))
            return out, lse

        mask = -slopes[..., None, None] * distance
        check_forward(with_slopes, q, k, v, mask=mask, causal=causal, softcap=3.0)


def cu(batch_size, seqlen, device):
    return torch.arange(batch_size + 1, device=device, dtype=torch.int32) * seqlen


def test_positional_arguments(device):
    q, k, v = qkv(device)
    slopes = torch.rand(4, device=device)
    got = flash_attn_func(q, k, v, 0.0, 0.3, True, (5, 0), 4.0, slopes, True, True)
    scores = {"softmax_scale": 0.3, "causal": True, "window": (5, 0), "softcap": 4.0}
    expected = attention(q, k, v, alibi_slopes=slopes, **scores, return_lse=True)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], expected[1])
    assert got[2] is None


def test_rows_without_keys_have_lse_minus_infinity(device):
    q, k, v = qkv(device, 5, 2)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert not out[:, :3].any() and (lse[:, :, :3] == -torch.inf).all()


def test_packed_forms_are_views_with_gradients(device):
    packed = torch.randn(2, 11, 3, 4, 24, device=device, requires_grad=True)
    out = flash_attn_qkvpacked_func(packed, causal=True)
    expected = flash_attn_func(*packed.unbind(2), causal=True)
    assert_same_bits(out, expected)
    (got,) = torch.autograd.grad(out.square().sum(), packed)
    (wanted,) = torch.autograd.grad(expected.square().sum(), packed)
    assert_same_bits(got, wanted)

    q = torch.randn(2, 5, 4, 24, device=device)
    kv = torch.randn(2, 11, 2, 2, 24, device=device, requires_grad=True)
    out, lse, _ = flash_attn_kvpacked_func(q, kv, causal=True, return_attn_probs=True)
    assert_same_bits(out, flash_attn_func(q, *kv.unbind(2), causal=True))
    assert torch.autograd.grad(lse.sum(), kv)[0].any()


def test_gradient_through_lse(device):
    q, k, v = qkv(device, requires_grad=True)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    got = torch.autograd.grad(out.sum() + lse.square().mean(), (q, k, v))
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    expected = torch.autograd.grad(out.sum() + lse.square().mean(), (q, k, v))
    for name, x, ref in zip(("dq", "dk", "dv"), got, expected, strict=True):
        assert_close_elementwise(x, ref, name)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes: expected shape"),
        ({"softcap": -1.0}, ValueError, "softcap: "),
        ({"softcap": float("inf")}, ValueError, "softcap: "),
        ({"softcap": float("nan")}, ValueError, "softcap: "),
        ({"window_size": 5}, ValueError, "window_size: "),
        ({"window_size": (1, 2, 3)}, ValueError, "window_size: "),
        ({"window_size": (-3, 1)}, ValueError, "window"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: "),
    ],
    ids=str,
)
def test_refuses(device, arguments, error, message):
    q, k, v = qkv(device)
    arguments = {name: on_device(x, device) for name, x in arguments.items()}
    with pytest.raises(error, match=message):
        flash_attn_func(q, k, v, **arguments)


def test_refuses_packed_of_wrong_shape(device):
    with pytest.raises(ValueError, match=r"^qkv: .*\[batch, seqlen, 3, .*got \[2, 9, 2, 4, 8\]"):
        flash_attn_qkvpacked_func(torch.zeros(2, 9, 2, 4, 8, device=device))
    with pytest.raises(ValueError, match=r"^kv: "):
        flash_attn_kvpacked_func(*[torch.zeros(2, 9, 4, 8, device=device)] * 2)
    with pytest.raises(TypeError, match=r"^kv: "):
        flash_attn_kvpacked_func(torch.zeros(2, 9, 4, 8, device=device), None)
