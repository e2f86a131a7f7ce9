"""Reported bugs of memory: strides, alignment, 64-bit offsets, garbage in slots that nobody sees.

Named after the report as in test_regressions.py.
"""

import functools
import math

import pytest
import torch

from flashinfer_lite import (
    attention,
    decode,
)
from flashinfer_lite.testing import (
    assert_close,
    assert_lse_close,
    assert_same_bits,
    check_backward,
    check_forward,
    guarded,
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


@pytest.mark.parametrize("seqlen", [99864, 99866])
def test_sageattention_386_offsets_of_fused_views_beyond_31_bits(device, seqlen):
    # Lazily committed: only the pages of one head are touched.
    fused = torch.empty(seqlen, 3, 56, 128, dtype=torch.bfloat16, device=device)
    q, k, v = (t[None, :, 55:] for t in fused.unbind(1))
    q, k, v = q[:, -3:], k[:, -40:], v[:, -40:]
    for t in (k, v, q):
        t.copy_(torch.randn(t.shape))
    assert (fused.numel() > 2**31) == (seqlen > 99864)
    compact = [t.contiguous() for t in (q, k, v)]
    assert_same_bits(attention(q, k, v, causal=True), attention(*compact, causal=True))


def test_pt_190857_sglang_20389_vllm_50427_strides_beyond_31_bits(device):
    buffer = torch.empty(24000, 704, 128, dtype=torch.bfloat16, device=device)
    k = buffer.transpose(0, 1)[703:, :, None]  # [1, 24000, 1, 128], row stride 90112
    k = k[:, -33:]
    k.copy_(torch.randn(k.shape))
    assert k.storage_offset() + 32 * k.stride(1) > 2**31
    q = torch.randn(1, 5, 2, 128, device=device).bfloat16()
    compact = k.contiguous()
    assert_same_bits(attention(q, k, k), attention(q, compact, compact))


def test_pt_190857_strides_beyond_31_bits_in_backward(device):
    buffer = torch.empty(24000, 704, 128, dtype=torch.bfloat16, device=device)
    k = buffer.transpose(0, 1)[703:, -33:, None]
    k.copy_(torch.randn(k.shape))
    q = torch.randn(1, 5, 2, 128, device=device).bfloat16()
    compact = k.contiguous()
    strided, plain = k.detach().requires_grad_(), compact.requires_grad_()
    for x, y in zip(
        torch.autograd.grad(attention(q, strided, strided).sum(), strided),
        torch.autograd.grad(attention(q, plain, plain).sum(), plain),
        strict=True,
    ):
        assert_same_bits(x, y, "dk")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_pt_162588_pt_187227_mask_offsets_beyond_32_bits(device, dtype):
    # 144 rows, 2^25 elements apart; only the pages that are written get memory.
    kind = torch.bool if dtype == torch.bool else torch.float16
    buffer = torch.empty(144 * 2**25, dtype=kind, device=device)
    mask = buffer.view(144, 2**25)[:, :50]
    mask.copy_(make_mask("bool" if dtype == torch.bool else "additive", (144, 50)))
    assert 143 * mask.stride(0) > 2**32
    q, k, v = make_qkv(1, 144, 50, 2, 1, 16, device=device)
    assert_same_bits(attention(q, k, v, mask=mask), attention(q, k, v, mask=mask.contiguous()))


def test_mlx_2894_mlx_3360_positions_beyond_16_bits(device, isa):
    q, k, v = make_qkv(1, 2, 65601, 2, 1, 8, device=device)
    for op in (attention, decode):
        check_forward(op, q, k, v, causal=True, window=(40000, -1))


@pytest.mark.parametrize(
    "shape", [(65536, 4, 4, 8, 2), (1, 10, 10, 65536, 65536), (1, 64 * 1025 + 1, 1, 1, 1)], ids=str
)
def test_pt_146704_pt_142228_large_counts(device, shape):
    batch_size, seqlen_q, seqlen_kv, num_heads_q, num_heads_kv = shape
    small = [t.half() for t in make_qkv(2, seqlen_q, seqlen_kv, 2, 1, 8, device=device)]
    repeats = batch_size // 2 or 1, 1, num_heads_q // 2 or 1, 1
    q = small[0][:batch_size, :, :num_heads_q].repeat(repeats)
    k, v = (t[:batch_size].repeat(repeats[0], 1, num_heads_kv, 1) for t in small[1:])
    out = attention(q, k, v)
    assert out.isfinite().all()
    last = attention(q[-1:, -3:, -1:], k[-1:, :, -1:], v[-1:, :, -1:])
    assert_same_bits(out[-1:, -3:, -1:], last)


@pytest.mark.parametrize("seqlen_kv", [33, 65, 97])
def test_pt_112577_pt_191937_flaggems_5896_transposed_and_expanded(device, isa, seqlen_kv):
    mask = make_mask("bool", (2, 1, 62, seqlen_kv), device=device)
    q = torch.randn(2, 62, 4, 128, device=device).bfloat16()
    k, v = (torch.randn(2, seqlen_kv, 1, 128, device=device).bfloat16() for _ in range(2))
    k, v = k.expand(-1, -1, 4, -1), v.expand(-1, -1, 4, -1)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    out, _ = check_forward(attention, transposed, k, v, mask=mask)
    assert_same_bits(attention(q, k.contiguous(), v.contiguous(), mask=mask), out)


def test_pt_187506_pt_116333_last_dimension_and_size_one_strides(device, isa):
    q, k, v = make_qkv(1, 1, 1, 1, 1, 8, device=device)
    expected = attention(q, k, v)
    for strides in ((1, 1, 1, 1), (0, 0, 0, 1), (7, 3, 999999, 1), (8, 8, 8, 1)):
        odd = [t.as_strided((1, 1, 1, 8), strides) for t in (q, k, v)]
        assert_same_bits(attention(*odd), expected)
        assert_same_bits(decode(*odd), expected)
    q, k, v = make_qkv(2, 8, 8, 8, 8, 8, device=device)
    with pytest.raises(ValueError, match="stride"):
        attention(q, k.mT, v)


@all_dtypes
def test_fa_355_gradient_of_out_is_not_contiguous(device, isa, dtype):
    q, k, v = make_qkv(2, 4, 4, 32, 1, 128, dtype=dtype, device=device, requires_grad=True)
    out = attention(q, k, v)
    for reduce in (torch.sum, torch.mean):
        got = torch.autograd.grad(reduce(out), (q, k, v), retain_graph=True)
        grad = torch.autograd.grad(reduce(out), out, retain_graph=True)[0].contiguous()
        expected = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        for x, y in zip(got, expected, strict=True):
            assert_same_bits(x, y)
    check_backward(attention, q, k, v, dout=grad.mT.contiguous().mT)


@all_dtypes
@pytest.mark.parametrize("seqlen", [43, 77, 498])
def test_qkan_26_xf_813_misaligned_pointers(device, isa, dtype, seqlen):
    q, k, v = make_qkv(1, seqlen, seqlen, 2, 1, 40, dtype=dtype, device=device, layout="misaligned")
    assert q.data_ptr() % 16
    mask = torch.randn(seqlen * seqlen + 1, device=device).to(dtype)[1:].view(seqlen, seqlen)
    out, _ = check_forward(attention, q, k, v, mask=mask)
    into = guarded(out.shape, dtype, device, offset=1)
    one_split = functools.partial(decode, kv_splits=1)
    one_split(q, k, v, mask=mask, out=into.tensor)
    into.assert_intact("out")
    if device.type != "cpu":  # one kernel there, two on CUDA
        out, _ = check_forward(one_split, q, k, v, mask=mask)
    assert_same_bits(into.tensor, out)


@all_dtypes
@pytest.mark.parametrize("seqlen", [43, 77])
def test_xf_813_misaligned_pointers_in_backward(device, isa, dtype, seqlen):
    q, k, v = make_qkv(1, seqlen, seqlen, 2, 1, 40, dtype=dtype, device=device, layout="misaligned")
    mask = torch.randn(seqlen * seqlen + 1, device=device).to(dtype)[1:].view(seqlen, seqlen)
    check_backward(attention, q, k, v, mask=mask)


@pytest.mark.parametrize(
    "head_dim", [1, 8, 40, 56, 72, 80, 88, 96, 112, 136, 192, 256, 288, 512, 576]
)
@pytest.mark.parametrize("head_dim_v", [None, 128, 512])
def test_fi_4299_llama_cpp_20375_fi_4748_head_dims(device, isa, head_dim, head_dim_v):
    head_dim_v = head_dim_v or head_dim
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = make_qkv(1, 16, 40, 2, 1, head_dim, head_dim_v, dtype=dtype, device=device)
        if head_dim % 8 or max(head_dim, head_dim_v) > 256:
            with pytest.raises(ValueError, match="head_dim"):
                attention(q, k, v)
        else:
            check_forward(attention, q, k, v, causal=True)


@all_ops
@all_dtypes
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_fa_1745_fa_2374_garbage_beyond_the_length(device, isa, dtype, op, poison):
    used = lengths(device, 32, 64, 96, 48)
    q, k, v = make_qkv(4, 2, 128, 8, 2, 64, dtype=dtype, device=device)
    slot = torch.arange(128, device=device).view(1, -1, 1, 1)
    outside = slot >= used.view(-1, 1, 1, 1)
    clean = k.masked_fill(outside, 0), v.masked_fill(outside, 0)
    dirty = k.masked_fill(outside, poison), v.masked_fill(outside, poison)
    for cache in ((dirty[0], clean[1]), (clean[0], dirty[1]), dirty):
        for causal in (False, True):
            expected = op(q, *clean, seqlens_kv=used, causal=causal, return_lse=True)
            got = op(q, *cache, seqlens_kv=used, causal=causal, return_lse=True)
            assert_same_bits(got[0], expected[0])
            assert_same_bits(got[1], expected[1])


@all_ops
@all_dtypes
def test_pt_101967_garbage_where_the_mask_hides(device, isa, dtype, op):
    q, k, v = make_qkv(2, 21, 150, 4, 2, 40, dtype=dtype, device=device)
    hidden = torch.zeros(150, dtype=torch.bool, device=device)
    hidden[[0, 5, 64, 127, 149]] = True
    additive = torch.zeros(150, device=device).masked_fill(hidden, -math.inf)
    for mask in (~hidden, additive, (~hidden).expand(2, 4, 21, 150).contiguous()):
        expected = op(q, k, v, mask=mask)
        for poison in (math.nan, math.inf):
            dirty = [t.masked_fill(hidden.view(1, -1, 1, 1), poison) for t in (k, v)]
            assert_same_bits(op(q, dirty[0], v, mask=mask), expected)
            check_forward(op, q, *dirty, mask=mask)
    # Hidden from some rows only: those stay clean, the others do not.
    v[:, 100] = math.nan
    mask = torch.ones(21, 150, dtype=torch.bool, device=device)
    mask[::3, 100] = False
    out, _ = check_forward(op, q, k, v, mask=mask)
    assert out[:, ::3].isfinite().all() and out[:, 1::3].isnan().all()


@all_dtypes
def test_nan_of_future_tokens_stays_in_the_future(device, isa, dtype):
    q, k, v = make_qkv(1, 200, 200, 2, 1, 40, dtype=dtype, device=device)
    k[:, 150], v[:, 150] = math.nan, math.inf
    for arguments in ({"causal": True}, {"causal": True, "window": (30, -1)}):
        out, _ = check_forward(attention, q, k, v, **arguments)
        assert out[:, :150].isfinite().all() and out[:, 150].isnan().all()


@all_dtypes
def test_garbage_beyond_the_length_in_backward(device, isa, dtype):
    q, k, v = make_qkv(2, 20, 90, 4, 2, 40, dtype=dtype, device=device)
    arguments = {"seqlens_kv": lengths(device, 33, 70), "kv_start": lengths(device, 0, 17)}
    slot = torch.arange(90, device=device).view(1, -1, 1, 1)
    start, end = (arguments[n].view(-1, 1, 1, 1) for n in ("kv_start", "seqlens_kv"))
    outside = (slot < start) | (slot >= end)
    clean = [t.masked_fill(outside, 0) for t in (k, v)]
    dirty = [t.masked_fill(outside, math.nan) for t in (k, v)]
    options = {"causal": True, "with_lse": False, "dout": q.detach(), **arguments}
    expected = check_backward(attention, q, *clean, **options)
    for x, y in zip(check_backward(attention, q, *dirty, **options), expected, strict=True):
        assert_same_bits(x, y)


@all_ops
@all_dtypes
@pytest.mark.parametrize("used", [1, 15, 17, 255, 256, 257, 300])
def test_fi_3716_padding_lanes_do_not_count(device, isa, dtype, op, used):
    q, k, v = make_qkv(1, 1, 304, 4, 2, 64, dtype=dtype, device=device)
    q = torch.zeros_like(q)
    out, lse = op(q, k, v, seqlens_kv=lengths(device, used), return_lse=True)
    mean = v[:, :used].double().mean(1, keepdim=True).repeat_interleave(2, 2)
    assert_close(out, mean, mean.to(dtype), terms=v.abs().max().item())
    assert_lse_close(lse, torch.full_like(lse, math.log(used)).double())


def test_pt_119320_many_sequences_with_packed_strides(device):
    packed = torch.randn(2701, 3, 3, 2, 8, device=device, requires_grad=True)
    out = attention(*packed.unbind(2), causal=True)
    (got,) = torch.autograd.grad(out.sum(), packed)
    assert got.isfinite().all()
    alone = packed[2690:].detach().requires_grad_()
    (expected,) = torch.autograd.grad(attention(*alone.unbind(2), causal=True).sum(), alone)
    assert_same_bits(got[2690:], expected)
