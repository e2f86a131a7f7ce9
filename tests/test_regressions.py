"""Bugs that users of other attention kernels reported, each named after its report.

FA flash-attention, FI FlashInfer, HF transformers, PT pytorch, XF xformers; "_123" is issue or
pull request 123. The oracle is float64 on the same rounded inputs, or the answer where it is known.
"""

import functools
import math

import pytest
import torch

from flashinfer_lite import (
    attention,
    decode,
    flash_attn_func,
    merge_states,
    reference,
    scaled_dot_product_attention,
)
from flashinfer_lite.testing import (
    assert_close,
    assert_close_elementwise,
    assert_lse_close,
    assert_same_bits,
    check_backward,
    check_forward,
    make_mask,
    make_qkv,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
OPS = {
    "attention": attention,
    "decode": decode,
    "decode_split": functools.partial(decode, kv_splits=7),
    "decode_invariant": functools.partial(decode, batch_invariant=True),
}
all_ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def lengths(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


@all_ops
@pytest.mark.parametrize("level", [-4e5, -8e5, -1.6e6])
def test_fi_4267_fi_4450_valid_logits_far_below_minus_50000(device, isa, op, level):
    q = torch.ones(1, 1, 16, 128, dtype=torch.bfloat16, device=device)
    k = torch.full((1, 64, 1, 128), level / 128, dtype=torch.bfloat16, device=device)
    k[:, 0] = (level + 5000) / 128
    v = torch.randn(1, 64, 1, 128, device=device).bfloat16()
    out, lse = check_forward(op, q, k, v)
    assert (lse < level / 20).all()
    if k[0, 0, 0, 0] > k[0, 1, 0, 0]:  # bfloat16 rounds the lowest level's two keys to one
        assert_same_bits(out, v[:, :1].expand_as(out))


@all_ops
def test_lattice_373_masked_key_beats_every_visible_one(device, isa, op):
    q, k, v = (torch.zeros(1, 2, 1, 8, device=device) for _ in range(3))
    q[0, 0], k[0, 0, 0, 0], v[0, :, 0, 0] = -20000.0, 1.0, torch.tensor([1.0, 100.0])
    mask = torch.tensor([[True, False], [True, True]], device=device)
    out, _ = check_forward(op, q, k, v, mask=mask, softmax_scale=1.0)
    assert out[0, 0, 0, 0].item() == 1.0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen_kv", [1, 33, 128, 1025])
def test_executorch_22133_extreme_logits(device, isa, head_dim, seqlen_kv):
    for op in OPS.values():
        for seqlen_q in (1, 3, 8):
            q, k, v = make_qkv(1, seqlen_q, seqlen_kv, 4, 2, head_dim, device=device)
            q, k = torch.ones_like(q), torch.full_like(k, 1 / head_dim)
            for level in (100.0, 151.29, -200.0):
                out, _ = check_forward(op, q, k * level, v, softmax_scale=1.0)
                assert out.isfinite().all()
            k[:, ::2] *= 151.0
            k[:, 1::2] *= -200.0
            check_forward(op, q, k, v, softmax_scale=1.0)


@all_dtypes
def test_pt_103749_pt_103963_pt_109517_padding_masks(device, isa, dtype):
    q, k, v = make_qkv(2, 61, 61, 4, 4, 64, dtype=dtype, device=device)
    boolean = make_mask("bool", (2, 1, 61, 61), device=device)
    boolean[1, :, 40:] = False
    additive = torch.zeros(2, 1, 61, 61, device=device).masked_fill(~boolean, -math.inf)
    for mask in (boolean, additive, additive.to(dtype)):
        out, lse = check_forward(attention, q, k, v, mask=mask)
        assert not out[1, 40:].any() and (lse[1, :, 40:] == -math.inf).all()
    # A row of finfo.min is not empty: every key is as good as every other.
    lowest = torch.zeros(2, 4, 61, 61, device=device)
    lowest[..., :20] = torch.finfo(torch.float32).min
    lowest[:, :, 7] = torch.finfo(torch.float32).min
    out = attention(q, k, v, mask=lowest)
    mean = v.double().mean(1)
    assert_close(out[:, 7], mean, v.mean(1), terms=v.abs().max().item())
    assert_close(out[:, 8], attention(q, k[:, 20:], v[:, 20:])[:, 8].double(), out[:, 8], terms=1.0)


@all_dtypes
def test_pt_103749_pt_103963_padding_masks_in_backward(device, isa, dtype):
    q, k, v = make_qkv(2, 61, 61, 4, 4, 64, dtype=dtype, device=device)
    boolean = make_mask("bool", (2, 1, 61, 61), device=device)
    boolean[1, :, 40:] = False
    additive = torch.zeros(2, 1, 61, 61, device=device).masked_fill(~boolean, -math.inf)
    for mask in (boolean, additive, additive.to(dtype)):
        assert not check_backward(attention, q, k, v, mask=mask)[0][1, 40:].any()


@all_dtypes
def test_fi_4051_fi_5262_rocmlir_2371_empty_states(device, isa, dtype):
    q, k, v = make_qkv(2, 3, 3, 4, 2, 32, dtype=dtype, device=device)
    whole = attention(q, k, v, causal=True, return_lse=True)
    for kv_splits in (2, 8, 64):  # more splits than keys, and causal empties more of them
        op = functools.partial(decode, kv_splits=kv_splits)
        out, lse = check_forward(op, q, k, v, causal=True)
    empty = torch.full_like(whole[0], math.nan), torch.full_like(whole[1], -math.inf)
    for states in ([whole, empty], [empty, whole], [empty, whole, empty, empty]):
        out, lse = merge_states(*zip(*states, strict=True))
        assert_same_bits(out, whole[0])
        assert_same_bits(lse, whole[1])
    out, lse = merge_states(*zip(empty, empty, strict=True))
    assert not out.any() and (lse == -math.inf).all()


@all_dtypes
@pytest.mark.parametrize("seqlen_q", [130, 5])
def test_fi_4452_fa_1778_more_queries_than_keys(device, isa, dtype, seqlen_q):
    q, k, v = make_qkv(2, seqlen_q, 2, 4, 2, 40, dtype=dtype, device=device)
    for op in OPS.values():
        out, lse = check_forward(op, q, k, v, causal=True)
        assert not out[:, : seqlen_q - 2].any() and (lse[:, :, : seqlen_q - 2] == -math.inf).all()


@all_dtypes
@pytest.mark.parametrize("seqlen_q", [130, 5])
def test_fa_1778_more_queries_than_keys_in_backward(device, isa, dtype, seqlen_q):
    q, k, v = make_qkv(2, seqlen_q, 2, 4, 2, 40, dtype=dtype, device=device)
    dq, _, _ = check_backward(attention, q, k, v, causal=True)
    assert not dq[:, : seqlen_q - 2].any()


@pytest.mark.parametrize("seqlens", [(1, 5), (2, 5), (5, 2), (4, 9), (3, 3)], ids=str)
def test_pt_108108_pt_110144_hf_30437_causal_alignment(device, isa, seqlens):
    seqlen_q, seqlen_kv = seqlens
    q, k, _ = make_qkv(1, seqlen_q, seqlen_kv, 1, 1, 16, device=device)
    v = torch.eye(16, device=device)[None, :seqlen_kv, None]
    row, key = torch.arange(seqlen_q).view(-1, 1), torch.arange(16)

    def sees(out):
        return (out[0, :, 0] > 0).cpu()

    expected = (key <= row + seqlen_kv - seqlen_q) & (key < seqlen_kv)
    for op in (attention, decode, flash_attn_func):
        assert torch.equal(sees(op(q, k, v, causal=True)), expected)
    expected = (key <= row) & (key < seqlen_kv)
    assert torch.equal(sees(attention(q, k, v, causal="top_left")), expected)
    swap = [t.transpose(1, 2) for t in (q, k, v)]
    out = scaled_dot_product_attention(*swap, is_causal=True).transpose(1, 2)
    assert torch.equal(sees(out), expected)


@all_dtypes
def test_hf_30437_chunked_prefill_over_a_static_cache(device, isa, dtype):
    q, k, v = make_qkv(2, 50, 50, 4, 2, 40, dtype=dtype, device=device)
    expected = attention(q, k, v, causal=True)
    cache = [torch.full((2, 80, 2, 40), math.nan, dtype=dtype, device=device) for _ in range(2)]
    for begin, end in ((0, 17), (17, 18), (18, 50)):
        for slots, t in zip(cache, (k, v), strict=True):
            slots[:, begin:end] = t[:, begin:end]
        for op in (attention, functools.partial(decode, kv_splits=1)):
            out = op(q[:, begin:end], *cache, causal=True, seqlens_kv=lengths(device, end, end))
            assert_close(out, expected[:, begin:end].double(), out, terms=1.0)


@pytest.mark.parametrize("window", [1, 2, 4, 64, 69, 70, 71])
def test_hf_39408_vllm_3385_megatron_2656_size_of_the_window(device, isa, window):
    # transformers' sliding_window=W counts the query itself: (W - 1, 0) here.
    seqlen = 70
    q, k, _ = make_qkv(1, seqlen, seqlen, 1, 1, 16, device=device)
    v = torch.eye(72, device=device)[None, :seqlen, None]
    visible = (torch.arange(seqlen) + 1).clamp(max=window)
    out = attention(q, k, v, causal=True, window=(window - 1, 0))
    assert torch.equal((out[0, :, 0] > 0).sum(-1).cpu(), visible)
    for used in (1, 30, 70):
        ends = lengths(device, used)
        out = decode(q[:, -1:], k, v, causal=True, window=(window - 1, 0), seqlens_kv=ends)
        assert int((out > 0).sum()) == min(used, window)
        assert out[0, 0, 0, used - 1] > 0
    poisoned = k.clone(), v.clone()
    for t in poisoned:
        t[:, : max(seqlen - window, 0)] = math.nan
    out = decode(q[:, -1:], *poisoned, causal=True, window=(window - 1, 0))
    assert_same_bits(out, decode(q[:, -1:], k, v, causal=True, window=(window - 1, 0)))


@all_dtypes
def test_fi_2113_fi_4485_sglang_40903_base_of_the_lse(device, isa, dtype):
    q, k, v = make_qkv(1, 4, 600, 4, 2, 64, dtype=dtype, device=device)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(2, 2)) / 8
    for op in OPS.values():
        assert_lse_close(op(q, k, v, return_lse=True)[1], scores.logsumexp(-1))
    parts = [attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 584), (584, 600))]
    out, lse = merge_states(*zip(*parts, strict=True))
    assert_lse_close(lse, scores.logsumexp(-1))
    oracle = reference.attention(q, k, v, dtype=torch.float64)
    assert_close(out, oracle, reference.attention(q, k, v), terms=v.abs().max().item())


def test_fa_1817_fa_1137_gradient_of_the_lse(device, isa):
    q, k, v = make_qkv(2, 9, 30, dtype=torch.float32, device=device, requires_grad=True)
    got = torch.autograd.grad(attention(q, k, v, return_lse=True)[1].mean(), (q, k))
    _, lse = reference.attention(q, k, v, return_lse=True, dtype=torch.float64)
    for x, ref in zip(got, torch.autograd.grad(lse.mean(), (q, k)), strict=True):
        assert x.any()
        assert_close_elementwise(x, ref)


@pytest.mark.parametrize("seqlen", [64, 192, 1, *range(65, 97)])
def test_pt_196678_cudnn_1072_lse_below_minus_88_in_backward(device, isa, seqlen):
    # exp(0 - lse) of a padding lane overflows; times zero it is NaN.
    q, k, v = make_qkv(1, seqlen, 128 if seqlen == 1 else seqlen, 2, 1, 64, device=device)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    q[..., 0], k[..., 0] = 1.0, -120 * 8.0
    square = torch.ones(seqlen, k.shape[1], dtype=torch.bool, device=device)
    for mask in (square, square.tril(k.shape[1] - seqlen)):
        gradients = check_backward(attention, q, k, v, mask=mask, with_lse=False)
        assert all(g.isfinite().all() for g in gradients)
    check_backward(attention, q, k, v, causal=True, with_lse=False)


@pytest.mark.parametrize("heads", [(32, 8), (8, 8)], ids=str)
def test_fi_2424_fa_1897_vllm_58131_batch_mates(device, heads, threads):
    # Long enough to be split: 5000 keys are five splits of the batch-invariant mode.
    q, k, v = make_qkv(1, 1, 5000, *heads, 64, device=device, dtype=torch.bfloat16)
    alone = decode(q, k, v, batch_invariant=True)
    for mates, slot in ((1, 0), (7, 4)):
        used = torch.randint(0, 5001, (mates + 1,), device=device)
        used[slot] = 5000
        batch = [t.expand(mates + 1, -1, -1, -1) for t in (q, k, v)]
        for count in (1, 2):
            threads(count)
            out = decode(*batch, seqlens_kv=used, batch_invariant=True)
            assert_same_bits(out[slot : slot + 1], alone)


def test_fa_2244_deterministic_backward(device):
    q, k, v = make_qkv(2, 130, 200, 8, 2, 64, device=device, requires_grad=True)
    runs = []
    for _ in range(10):
        out = attention(q, k, v, causal=True, deterministic=True)
        runs.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for run in runs[1:]:
        for x, y in zip(run, runs[0], strict=True):
            assert_same_bits(x, y)


def test_pt_193728_lengths_of_k_and_v_differ(device):
    q, k, v = make_qkv(1, 3, 6, 1, 1, 8, device=device)
    for op in (attention, decode, flash_attn_func):
        with pytest.raises(ValueError, match=r"5, 1.*got \[1, 6, 1, 8\]"):
            op(q, k[:, :5], v)
    swap = [t.transpose(1, 2) for t in (q, k[:, :5], v)]
    with pytest.raises(ValueError, match="^value: .*5, got 6"):
        scaled_dot_product_attention(*swap)


@all_dtypes
def test_pt_141128_visible_nan_stays(device, isa, dtype):
    for position, where in ((0, (0, 3, 1)), (1, (0, 7, 0)), (2, (0, 7, 0))):
        tensors = list(make_qkv(1, 9, 30, 4, 2, 16, dtype=dtype, device=device))
        tensors[position][where + (5,)] = math.nan
        for op in OPS.values():
            out, _ = check_forward(op, *tensors)
            assert out.isnan().any() and out.isfinite().any()


def test_diffusers_14104_autocast_of_mixed_dtypes(device):
    q, k, v = make_qkv(1, 9, 12, device=device)
    expected = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    with pytest.raises(TypeError, match="^v: expected q's dtype"):
        attention(q, k, v.bfloat16())
    with torch.autocast(device.type, torch.bfloat16):
        assert_same_bits(attention(q, k, v.bfloat16()), expected)
        decoded = decode(q, k, v.bfloat16(), kv_splits=1)
        assert_close(decoded, expected.double(), expected)
        assert_same_bits(flash_attn_func(q, k.bfloat16(), v), expected)
        swap = [t.transpose(1, 2) for t in (q, k, v.bfloat16())]
        out = scaled_dot_product_attention(*swap, enable_gqa=True).transpose(1, 2)
        assert_same_bits(out, expected)


@pytest.mark.cpu_only("CUDA kernels refuse float64 by name")
def test_autocast_leaves_float64(device):
    q, k, v = make_qkv(1, 9, 12, device=device, dtype=torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        assert attention(q, k, v).dtype == torch.float64


def test_diffusers_14104_gradient_under_autocast(device):
    q, k, v = make_qkv(1, 9, 12, device=device)
    q.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        out = attention(q, k, v)
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@all_ops
@pytest.mark.parametrize("softcap", [1.0, 50.0])
def test_sglang_33915_megatron_6590_softcap_is_applied(device, isa, op, softcap):
    q, k, v = make_qkv(1, 4, 300, device=device, logits=10)
    out, _ = check_forward(op, q, k, v, softcap=softcap)
    assert not torch.equal(out, op(q, k, v))


def test_llama_cpp_17746_large_values_do_not_overflow(device, isa):
    q, k, v = make_qkv(1, 4, 4096, 2, 1, 64, device=device, dtype=torch.float16)
    v = torch.where(torch.rand_like(v) < 0.5, 6e4, -6e4).to(v.dtype)
    for op in OPS.values():
        out, _ = check_forward(op, q, k, v)
        assert out.isfinite().all()
