"""decode(): a KV cache in place, split among threads, and the batch-invariant mode."""

import functools

import pytest
import torch

from flashinfer_lite import attention, decode
from flashinfer_lite.testing import (
    LAYOUTS,
    assert_same_bits,
    check_forward,
    guarded,
    make_mask,
    make_qkv,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def lengths(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (90, 20)},
    "window_causal": {"window": (150, -1), "causal": True},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.3},
    "seqlens": {"seqlens_kv": lengths(700, 1, 129)},
    "seqlens_zero": {"seqlens_kv": lengths(0, 256, 5, dtype=torch.int64), "causal": True},
    "kv_start": {"kv_start": lengths(699, 0, 128), "causal": True},
    "kv_start_seqlens": {"kv_start": lengths(5, 300, 64), "seqlens_kv": lengths(5, 513, 640)},
}


@all_dtypes
@pytest.mark.parametrize("kv_splits", [0, 1, 2, 7])
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(device, isa, dtype, kv_splits, feature):
    arguments = {
        name: x.to(device) if torch.is_tensor(x) else x for name, x in FEATURES[feature].items()
    }
    op = functools.partial(decode, kv_splits=kv_splits)
    for seqlen_q in (1, 4):
        q, k, v = make_qkv(3, seqlen_q, 700, 8, 2, 40, dtype=dtype, device=device)
        check_forward(op, q, k, v, **arguments)


@all_dtypes
@pytest.mark.parametrize("kv_splits", [1, 2, 7])
def test_mask(device, isa, dtype, kv_splits):
    op = functools.partial(decode, kv_splits=kv_splits)
    q, k, v = make_qkv(2, 2, 300, 4, 2, 64, dtype=dtype, device=device)
    for kind, shape in [("bool", (2, 1, 1, 300)), ("additive_inf", (4, 2, 300)), ("bool", (300,))]:
        mask = make_mask(kind, shape, device=device, dtype=torch.float32)
        check_forward(op, q, k, v, mask=mask)


@all_dtypes
def test_more_splits_than_keys(device, isa, dtype):
    for keys in (0, 1, 3, 130):
        q, k, v = make_qkv(2, 1, keys, 4, 1, 32, dtype=dtype, device=device)
        for kv_splits in (2, 8, 100, 4096 if keys == 3 else 9):
            check_forward(functools.partial(decode, kv_splits=kv_splits), q, k, v)


@all_dtypes
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (12, 1), (13, 1), (32, 2)])
def test_heads(device, isa, dtype, heads):
    for seqlen_q in (1, 3):
        q, k, v = make_qkv(2, seqlen_q, 270, *heads, 64, 96, dtype=dtype, device=device)
        check_forward(functools.partial(decode, kv_splits=2), q, k, v, causal=True)


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(device, isa, dtype, layout):
    q, k, v = make_qkv(2, 50, 50, 4, 4, 40, dtype=dtype, device=device, layout=layout)
    check_forward(decode, q[:, -1:], k, v, causal=True)
    check_forward(functools.partial(decode, kv_splits=3), q[:, -2:], k, v, causal=True)


@all_dtypes
@pytest.mark.parametrize("head_dim", [8, 16, 40, 56, 64, 72, 80, 96, 128, 192, 256])
def test_head_dim(device, isa, dtype, head_dim):
    for head_dim_v in (head_dim, 8 * (1 + (head_dim // 8 * 5) % 32)):
        q, k, v = make_qkv(1, 1, 300, 4, 2, head_dim, head_dim_v, dtype=dtype, device=device)
        check_forward(functools.partial(decode, kv_splits=2), q, k, v)


@all_dtypes
@pytest.mark.parametrize("offset", range(-2, 3))
def test_tails(device, isa, dtype, offset):
    for base in (8, 16, 64, 128, 256):
        q, k, v = make_qkv(1, 1, base + offset, 2, 1, 24, dtype=dtype, device=device)
        for kv_splits in (1, 2):
            check_forward(functools.partial(decode, kv_splits=kv_splits), q, k, v)


@all_dtypes
@pytest.mark.parametrize("keys", [128, 512, 2048, 8192])
def test_strict_rule(device, isa, dtype, keys):
    for kv_splits in (1, 4):
        q, k, v = make_qkv(2, 1, keys, 4, 1, 64, dtype=dtype, device=device)
        check_forward(functools.partial(decode, kv_splits=kv_splits), q, k, v, strict=True)


@all_dtypes
def test_out_is_written_in_place(device, isa, dtype):
    q, k, v = make_qkv(2, 2, 600, 4, 2, 40, 24, dtype=dtype, device=device)
    expected, expected_lse = decode(q, k, v, causal=True, kv_splits=2, return_lse=True)
    out = guarded((2, 2, 4, 24), dtype, device, offset=1)
    got, lse = decode(q, k, v, causal=True, kv_splits=2, out=out.tensor, return_lse=True)
    assert got is out.tensor
    assert_same_bits(got, expected)
    assert_same_bits(lse, expected_lse, "lse")
    out.assert_intact("out")


@all_dtypes
def test_out_with_strides(device, isa, dtype):
    q, k, v = make_qkv(2, 3, 70, 4, 2, 40, dtype=dtype, device=device)
    expected = decode(q, k, v)
    wide = torch.full((2, 4, 5, 50), torch.nan, dtype=dtype, device=device)
    out = wide[:, :, 1:4, 5:45].transpose(1, 2)
    assert_same_bits(decode(q, k, v, out=out), expected)
    wide[:, :, 1:4, 5:45] = 0
    written = ~wide.isnan()
    assert int(written.sum()) == out.numel()


@all_dtypes
def test_cache_is_not_touched(device, isa, dtype):
    q, k, v = make_qkv(2, 1, 300, dtype=dtype, device=device)
    k[:, 200:], v[:, 200:] = torch.nan, torch.inf
    before = k.clone(), v.clone()
    decode(q, k, v, seqlens_kv=torch.tensor([200, 7], device=device), kv_splits=3)
    assert_same_bits(k, before[0], "k_cache")
    assert_same_bits(v, before[1], "v_cache")


@all_dtypes
@pytest.mark.cpu_only("CUDA's decode and attention are two kernels, each with its own tiles")
def test_agrees_with_attention(device, isa, dtype):
    q, k, v = make_qkv(2, 3, 500, dtype=dtype, device=device)
    used = torch.tensor([500, 129], device=device)
    out, lse = decode(q, k, v, causal=True, seqlens_kv=used, kv_splits=1, return_lse=True)
    expected, expected_lse = attention(q, k, v, causal=True, seqlens_kv=used, return_lse=True)
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse, "lse")


@all_dtypes
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_batch_invariant(device, isa, dtype, seqlen_q, threads):
    # 2500 keys are three splits. The same sequence alone, in any slot, among any company, in a
    # larger cache, on any number of threads: the same bits.
    run = functools.partial(decode, batch_invariant=True, causal=True, return_lse=True)
    for heads in ((8, 2), (3, 3)):
        q, k, v = make_qkv(5, seqlen_q, 2500, *heads, 32, dtype=dtype, device=device)
        used = torch.tensor([2500, 1, 0, 1024, 1025], device=device)
        for count in (1, 2, 3):
            threads(count)
            together = run(q, k, v, seqlens_kv=used)
            for b in range(5):
                one = slice(b, b + 1)
                for capacity in (2500, max(int(used[b]), 1)):
                    cache = k[one, :capacity], v[one, :capacity]
                    alone = run(q[one], *cache, seqlens_kv=used[one])
                    for name, x, y in zip(("out", "lse"), alone, together, strict=True):
                        assert_same_bits(x, y[one], f"{name} of {b} on {count} threads")
            flipped = run(q.flip(0), k.flip(0), v.flip(0), seqlens_kv=used.flip(0))
            assert_same_bits(flipped[0].flip(0), together[0])
    check_forward(functools.partial(decode, batch_invariant=True), q, k, v, seqlens_kv=used)


@all_dtypes
def test_repeats_bit_for_bit(device, isa, dtype, threads):
    threads(3)
    q, k, v = make_qkv(1, 1, 3000, 8, 1, 64, dtype=dtype, device=device)
    first = decode(q, k, v)
    for _ in range(5):
        assert_same_bits(decode(q, k, v), first)


@all_dtypes
@pytest.mark.cpu_only("the threads are the CPU's")
def test_uses_every_thread_and_stays_right(device, isa, dtype, threads):
    threads(4)
    q, k, v = make_qkv(1, 1, 4000, 8, 2, 64, dtype=dtype, device=device)
    check_forward(decode, q, k, v)


@all_dtypes
@pytest.mark.parametrize("which", ["k", "v"])
def test_k_and_v_in_different_layouts(device, isa, dtype, which):
    # Heads walk together only where both caches have them side by side.
    q, k, v = make_qkv(2, 1, 300, 8, 4, 64, dtype=dtype, device=device)
    heads_first = {"k": k, "v": v}[which].transpose(1, 2).contiguous().transpose(1, 2)
    check_forward(decode, q, *((heads_first, v) if which == "k" else (k, heads_first)))


@all_dtypes
@pytest.mark.cpu_only("the threads are the CPU's")
def test_heads_walking_together_change_no_bits(device, isa, dtype, threads):
    # How many walk together follows the number of threads; their bits must not.
    q, k, v = make_qkv(1, 1, 500, 12, 6, 16, dtype=dtype, device=device)
    threads(1)
    alone = attention(q, k, v, causal=True)
    for count in (2, 3, 6):
        threads(count)
        assert_same_bits(attention(q, k, v, causal=True), alone)


def test_zero_size_dimensions(device, isa):
    for empty in ("batch_size", "seqlen_q", "seqlen_kv"):
        shape = {"batch_size": 2, "seqlen_q": 1, "seqlen_kv": 5, empty: 0}
        q, k, v = make_qkv(**shape, head_dim=16, device=device)
        for kv_splits in (0, 1, 3):
            out, lse = decode(q, k, v, kv_splits=kv_splits, return_lse=True)
            assert not out.any() and (lse == -torch.inf).all()


def test_gradients_are_refused_while_grad_mode_is_on(device):
    q, k, v = make_qkv(1, 1, 9, device=device)
    for name in ("q", "k_cache", "v_cache", "mask"):
        inputs = {"q": q, "k_cache": k, "v_cache": v, "mask": torch.zeros(9, device=device)}
        inputs[name] = inputs[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=rf"^{name}: "):
            decode(**inputs)
        with torch.no_grad():
            decode(**inputs)


def test_reference_impl(device):
    q, k, v = make_qkv(2, 1, 33, device=device)
    expected = attention(q, k, v, impl="reference")
    assert_same_bits(decode(q, k, v, impl="reference"), expected)
    out = torch.empty_like(expected)
    assert decode(q, k, v, impl="reference", out=out) is out
    assert_same_bits(out, expected)
