"""Bugs reported of other attention kernels, on our CUDA kernels as the executor runs them.

Named after the report as in test_regressions.py. The host code chooses the rows, as for an H200.
"""

import functools
import math

import pytest
import torch

from flashinfer_lite import reference
from flashinfer_lite.testing import (
    assert_close,
    assert_lse_close,
    assert_same_bits,
    check_forward,
    make_mask,
    make_qkv,
    simt,
)

pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
every_dtype = pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT], ids=str)
OPS = {
    "attention": lambda ex: ex.attention,
    "decode": lambda ex: functools.partial(ex.decode, kv_splits=1),
    "decode_split": lambda ex: functools.partial(ex.decode, kv_splits=7),
    "decode_invariant": lambda ex: functools.partial(ex.decode, batch_invariant=True),
}
every_op = pytest.mark.parametrize("name", OPS)


def op_of(name):
    return OPS[name](simt.Executor())


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32)


@every_op
@pytest.mark.parametrize("level", [-4e5, -8e5, -1.6e6])
def test_fi_4267_fi_4450_valid_logits_far_below_minus_50000(device, name, level):
    q = torch.ones(1, 1, 16, 128, dtype=BRAIN)
    k = torch.full((1, 64, 1, 128), level / 128, dtype=BRAIN)
    k[:, 0] = (level + 5000) / 128
    v = torch.randn(1, 64, 1, 128).to(BRAIN)
    out, lse = check_forward(op_of(name), q, k, v)
    assert (lse < level / 20).all()
    if k[0, 0, 0, 0] > k[0, 1, 0, 0]:  # bfloat16 rounds the lowest level's two keys to one
        assert_same_bits(out, v[:, :1].expand_as(out))


@every_op
def test_lattice_373_masked_key_beats_every_visible_one(device, name):
    q, k, v = (torch.zeros(1, 2, 1, 8) for _ in range(3))
    q[0, 0], k[0, 0, 0, 0], v[0, :, 0, 0] = -20000.0, 1.0, torch.tensor([1.0, 100.0])
    mask = torch.tensor([[True, False], [True, True]])
    out, _ = check_forward(op_of(name), q, k, v, mask=mask, softmax_scale=1.0)
    assert out[0, 0, 0, 0].item() == 1.0


@every_op
@pytest.mark.parametrize("seqlen_kv", [1, 33])
def test_executorch_22133_extreme_logits(device, name, seqlen_kv):
    op = op_of(name)
    q, k, v = make_qkv(1, 3, seqlen_kv, 4, 2, 64)
    q, k = torch.ones_like(q), torch.full_like(k, 1 / 64)
    for level in (100.0, 151.29, -200.0):
        out, _ = check_forward(op, q, k * level, v, softmax_scale=1.0)
        assert out.isfinite().all()
    k[:, ::2] *= 151.0
    k[:, 1::2] *= -200.0
    check_forward(op, q, k, v, softmax_scale=1.0)


@every_op
@every_dtype
def test_pt_103749_pt_103963_pt_109517_padding_masks(device, name, dtype):
    op = op_of(name)
    q, k, v = make_qkv(2, 21, 61, 2, 2, 64, dtype=dtype)
    boolean = make_mask("bool", (2, 1, 21, 61))
    boolean[1, :, 10:] = False
    additive = torch.zeros(2, 1, 21, 61).masked_fill(~boolean, -math.inf)
    for mask in (boolean, additive.to(dtype)):
        out, lse = check_forward(op, q, k, v, mask=mask)
        assert not out[1, 10:].any() and (lse[1, :, 10:] == -math.inf).all()


@every_op
@pytest.mark.parametrize("mask_dtype", [BRAIN, FLOAT, torch.float64], ids=str)
def test_pt_103749_rows_of_the_lowest_number_are_not_empty(device, name, mask_dtype):
    # Every key is as good as every other.
    q, k, v = make_qkv(2, 21, 61, 2, 2, 64, dtype=BRAIN)
    lowest = torch.full((61,), torch.finfo(mask_dtype).min, dtype=mask_dtype)
    out, lse = op_of(name)(q, k, v, mask=lowest, return_lse=True)
    assert lse.isfinite().all()
    mean = v.double().mean(1, keepdim=True).expand(2, 21, 2, 64)
    assert_close(out, mean, v.mean(1, keepdim=True).expand_as(out), terms=v.abs().max().item())


@every_op
@pytest.mark.parametrize("mask_dtype", [BRAIN, FLOAT, torch.float64], ids=str)
def test_pt_103749_the_largest_number_in_a_mask_wins(device, name, mask_dtype):
    q, k, v = make_qkv(1, 5, 61, 2, 1, 64, dtype=BRAIN)
    mask = torch.zeros(61, dtype=mask_dtype)
    mask[7] = torch.finfo(mask_dtype).max
    assert_same_bits(op_of(name)(q, k, v, mask=mask), v[:, 7:8].expand(1, 5, 2, 64))


@every_dtype
def test_fi_4051_fi_5262_rocmlir_2371_empty_states(device, dtype):
    ex = simt.Executor()
    q, k, v = make_qkv(2, 3, 3, 4, 2, 32, dtype=dtype)
    for kv_splits in (2, 8, 64):  # more splits than keys, and causal empties more of them
        op = functools.partial(ex.decode, kv_splits=kv_splits)
        whole = check_forward(op, q, k, v, causal=True)
    empty = torch.full_like(whole[0], math.nan), torch.full_like(whole[1], -math.inf)
    for states in ([whole, empty], [empty, whole], [empty, whole, empty, empty]):
        out, lse = ex.merge_states(*(torch.stack(x) for x in zip(*states, strict=True)))
        assert_same_bits(out, whole[0])
        assert_same_bits(lse, whole[1])
    out, lse = ex.merge_states(*(torch.stack((x, x)) for x in empty))
    assert not out.any() and (lse == -math.inf).all()


@every_op
@pytest.mark.parametrize("seqlen_q", [130, 5])
def test_fi_4452_fa_1778_more_queries_than_keys(device, name, seqlen_q):
    q, k, v = make_qkv(1, seqlen_q, 2, 2, 1, 40, dtype=BRAIN)
    out, lse = check_forward(op_of(name), q, k, v, causal=True)
    assert not out[:, : seqlen_q - 2].any() and (lse[:, :, : seqlen_q - 2] == -math.inf).all()


@pytest.mark.parametrize("seqlen", [99864, 99866])
def test_sageattention_386_offsets_of_fused_views_beyond_31_bits(device, seqlen):
    # Lazily committed: only the pages of one head are touched. A buffer each, for the executor
    # wants to know what every address belongs to.
    buffers = [torch.empty(seqlen, 3, 56, 128, dtype=BRAIN) for _ in range(2)]
    assert (buffers[0].numel() > 2**31) == (seqlen > 99864)
    k, v = buffers[0][None, :, 1, 55:], buffers[1][None, :, 2, 55:]
    for t in (k, v):
        t[:, -40:] = torch.randn(1, 40, 1, 128)
    q = torch.randn(1, 3, 1, 128).to(BRAIN)
    compact = [t[:, -40:].contiguous() for t in (k, v)]
    for name in ("attention", "decode", "decode_split"):
        op = op_of(name)
        got = op(q, k, v, kv_start=lengths(seqlen - 40), causal=True)
        assert_same_bits(got, op(q, *compact, causal=True))


def test_pt_190857_sglang_20389_vllm_50427_strides_beyond_31_bits(device):
    buffers = [torch.empty(24000, 704, 128, dtype=BRAIN) for _ in range(2)]
    k, v = (t.transpose(0, 1)[703:, :, None] for t in buffers)  # row stride 90112
    assert 23999 * k.stride(1) > 2**31
    for t in (k, v):
        t[:, -33:] = torch.randn(1, 33, 1, 128)
    compact = [t[:, -33:].contiguous() for t in (k, v)]
    q = torch.randn(1, 5, 2, 128).to(BRAIN)
    for name in ("attention", "decode", "decode_split"):
        op = op_of(name)
        assert_same_bits(op(q, k, v, kv_start=lengths(23967)), op(q, *compact))


def test_vllm_50427_sequences_beyond_31_bits(device):
    buffers = [torch.empty(2**31 + 2**21, dtype=BRAIN) for _ in range(2)]
    k, v = (torch.as_strided(t, (2, 33, 1, 128), (2**31 + 2**20, 128, 128, 1)) for t in buffers)
    for t in (k, v):
        t.copy_(torch.randn(t.shape))
    q = torch.randn(2, 5, 2, 128).to(BRAIN)
    for name in OPS:
        op = op_of(name)
        assert_same_bits(op(q, k, v), op(q, k.contiguous(), v.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bool, HALF], ids=str)
def test_pt_162588_pt_187227_mask_offsets_beyond_32_bits(device, dtype):
    buffer = torch.empty(144 * 2**25, dtype=dtype)
    mask = buffer.view(144, 2**25)[:, :50]
    mask.copy_(make_mask("bool" if dtype == torch.bool else "additive", (144, 50)))
    assert 143 * mask.stride(0) > 2**32
    q, k, v = make_qkv(1, 144, 50, 1, 1, 16, dtype=BRAIN)
    for name in ("attention", "decode"):
        op = op_of(name)
        assert_same_bits(op(q, k, v, mask=mask), op(q, k, v, mask=mask.contiguous()))


@pytest.mark.parametrize("name", ["attention", "decode_split"])
def test_mlx_2894_mlx_3360_positions_beyond_16_bits(device, name):
    q, k, v = make_qkv(1, 2, 65601, 2, 1, 8, dtype=BRAIN)
    check_forward(op_of(name), q, k, v, causal=True, window=(700, -1))
    used = {"kv_start": lengths(32700), "seqlens_kv": lengths(32900)}
    check_forward(op_of(name), q, k, v, **used)


@pytest.mark.parametrize("name", ["attention", "decode"])
@pytest.mark.parametrize("seqlen_kv", [33, 65, 97])
def test_pt_112577_pt_191937_flaggems_5896_transposed_and_expanded(device, name, seqlen_kv):
    mask = make_mask("bool", (2, 1, 22, seqlen_kv))
    q = torch.randn(2, 22, 4, 128).to(BRAIN)
    k, v = (torch.randn(2, seqlen_kv, 1, 128).to(BRAIN).expand(-1, -1, 4, -1) for _ in range(2))
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    op = op_of(name)
    out, _ = check_forward(op, transposed, k, v, mask=mask)
    assert_same_bits(op(q, k.contiguous(), v.contiguous(), mask=mask), out)


@every_op
def test_pt_187506_pt_116333_strides_of_size_one(device, name):
    op = op_of(name)
    q, k, v = make_qkv(1, 1, 1, 1, 1, 8)
    expected = op(q, k, v)
    for strides in ((1, 1, 1, 1), (0, 0, 0, 1), (7, 3, 999999, 1), (8, 8, 8, 1)):
        assert_same_bits(op(*(t.as_strided((1, 1, 1, 8), strides) for t in (q, k, v))), expected)


@every_op
@every_dtype
def test_qkan_26_xf_813_misaligned_pointers(device, name, dtype):
    q, k, v = make_qkv(1, 43, 77, 2, 1, 40, dtype=dtype, layout="misaligned")
    assert q.data_ptr() % 16
    mask = torch.randn(43 * 77 + 1).to(dtype)[1:].view(43, 77)
    out, _ = check_forward(op_of(name), q, k, v, mask=mask)
    aligned = [t.clone() for t in (q, k, v)]
    assert_same_bits(op_of(name)(*aligned, mask=mask), out)


@pytest.mark.parametrize("dtype", [BRAIN, FLOAT], ids=str)
@pytest.mark.parametrize("head_dim_v", [None, 128])
@pytest.mark.parametrize("head_dim", [8, 40, 56, 72, 80, 88, 96, 112, 136, 192, 256, 288, 576])
def test_fi_4299_llama_cpp_20375_fi_4748_head_dims(device, dtype, head_dim, head_dim_v):
    for name in ("attention", "decode_split"):
        q, k, v = make_qkv(1, 6, 40, 2, 1, head_dim, head_dim_v, dtype=dtype)
        if head_dim > 256:
            with pytest.raises(ValueError, match=f"head_dim .* got {head_dim}"):
                op_of(name)(q, k, v)
        else:
            check_forward(op_of(name), q, k, v, causal=True)


@every_op
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_fa_1745_fa_2374_garbage_beyond_the_length(device, name, poison):
    op = op_of(name)
    used = lengths(32, 64, 96, 48)
    q, k, v = make_qkv(4, 2, 128, 4, 1, 64, dtype=BRAIN)
    outside = torch.arange(128).view(1, -1, 1, 1) >= used.view(-1, 1, 1, 1)
    clean, dirty = ([t.masked_fill(outside, x) for t in (k, v)] for x in (0, poison))
    for cache in ((dirty[0], clean[1]), (clean[0], dirty[1]), dirty):
        for causal in (False, True):
            arguments = {"seqlens_kv": used, "causal": causal, "return_lse": True}
            expected, got = op(q, *clean, **arguments), op(q, *cache, **arguments)
            assert_same_bits(got[0], expected[0])
            assert_same_bits(got[1], expected[1])


@every_op
@every_dtype
def test_pt_101967_garbage_where_the_mask_hides(device, name, dtype):
    op = op_of(name)
    q, k, v = make_qkv(1, 5, 150, 2, 1, 40, dtype=dtype)
    hidden = torch.zeros(150, dtype=torch.bool)
    hidden[[0, 5, 64, 127, 149]] = True
    additive = torch.zeros(150).masked_fill(hidden, -math.inf)
    for mask in (~hidden, additive):
        clean, dirty = (
            [t.masked_fill(hidden.view(1, -1, 1, 1), x) for t in (k, v)] for x in (0, math.nan)
        )
        assert_same_bits(op(q, *dirty, mask=mask), op(q, *clean, mask=mask))


@every_op
@pytest.mark.parametrize("used", [1, 15, 17, 255, 256, 257, 300])
def test_fi_3716_padding_lanes_do_not_count(device, name, used):
    q, k, v = make_qkv(1, 1, 304, 2, 1, 64, dtype=BRAIN)
    q = torch.zeros_like(q)
    out, lse = op_of(name)(q, k, v, seqlens_kv=lengths(used), return_lse=True)
    mean = v[:, :used].double().mean(1, keepdim=True).repeat_interleave(2, 2)
    assert_close(out, mean, mean.to(BRAIN), terms=v.abs().max().item())
    assert_lse_close(lse, torch.full_like(lse, math.log(used)).double())


@every_op
@pytest.mark.parametrize("seqlens", [(1, 5), (2, 5), (5, 2), (4, 9), (3, 3)], ids=str)
def test_pt_108108_pt_110144_hf_30437_causal_alignment(device, name, seqlens):
    seqlen_q, seqlen_kv = seqlens
    q, k, _ = make_qkv(1, seqlen_q, seqlen_kv, 1, 1, 16)
    v = torch.eye(16)[None, :seqlen_kv, None]
    row, key = torch.arange(seqlen_q).view(-1, 1), torch.arange(16)
    for causal, diagonal in ((True, seqlen_kv - seqlen_q), ("top_left", 0)):
        sees = op_of(name)(q, k, v, causal=causal)[0, :, 0] > 0
        assert torch.equal(sees, (key <= row + diagonal) & (key < seqlen_kv))


@every_dtype
def test_hf_30437_chunked_prefill_over_a_static_cache(device, dtype):
    q, k, v = make_qkv(2, 50, 50, 2, 1, 40, dtype=dtype)
    expected = op_of("attention")(q, k, v, causal=True)
    cache = [torch.full((2, 80, 1, 40), math.nan, dtype=dtype) for _ in range(2)]
    for begin, end in ((0, 17), (17, 18), (18, 50)):
        for slots, t in zip(cache, (k, v), strict=True):
            slots[:, begin:end] = t[:, begin:end]
        for name in ("attention", "decode"):
            out = op_of(name)(q[:, begin:end], *cache, causal=True, seqlens_kv=lengths(end, end))
            assert_close(out, expected[:, begin:end].double(), out, terms=1.0)


@every_op
@pytest.mark.parametrize("window", [1, 2, 4, 64, 69, 70, 71])
def test_hf_39408_vllm_3385_megatron_2656_size_of_the_window(device, name, window):
    seqlen, op = 70, op_of(name)
    q, k, _ = make_qkv(1, seqlen, seqlen, 1, 1, 16)
    v = torch.eye(72)[None, :seqlen, None]
    arguments = {"causal": True, "window": (window - 1, 0)}
    out = op(q, k, v, **arguments)
    visible = (torch.arange(seqlen) + 1).clamp(max=window)
    assert torch.equal((out[0, :, 0] > 0).sum(-1), visible)
    # What lies outside of the window is not read: NaN there changes nothing.
    poisoned = k.clone(), v.clone()
    for t in poisoned:
        t[:, : max(seqlen - window, 0)] = math.nan
    assert_same_bits(op(q[:, -1:], *poisoned, **arguments), op(q[:, -1:], k, v, **arguments))


@every_dtype
def test_fi_2113_fi_4485_sglang_40903_base_of_the_lse(device, dtype):
    q, k, v = make_qkv(1, 4, 600, 2, 1, 64, dtype=dtype)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().expand(-1, -1, 2, -1)) / 8
    for name in OPS:
        assert_lse_close(op_of(name)(q, k, v, return_lse=True)[1], scores.logsumexp(-1))
    cuts = ((0, 584), (584, 600))
    op = op_of("attention")
    parts = [op(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in cuts]
    out, lse = simt.Executor().merge_states(*(torch.stack(x) for x in zip(*parts, strict=True)))
    assert_lse_close(lse, scores.logsumexp(-1))
    oracle = reference.attention(q, k, v, dtype=torch.float64)
    assert_close(out, oracle, reference.attention(q, k, v), terms=v.abs().max().item())


@pytest.mark.parametrize("heads", [(4, 1), (2, 2)], ids=str)
def test_fi_2424_fa_1897_vllm_58131_batch_mates(device, heads):
    # Long enough to be split: 2500 keys are three splits of the batch-invariant mode.
    op = op_of("decode_invariant")
    q, k, v = make_qkv(1, 1, 2500, *heads, 64, dtype=BRAIN)
    alone = op(q, k, v)
    for mates, slot in ((1, 0), (3, 2)):
        used = torch.randint(0, 300, (mates + 1,))
        used[slot] = 2500
        batch = [t.expand(mates + 1, -1, -1, -1) for t in (q, k, v)]
        out = op(*batch, seqlens_kv=used)
        assert_same_bits(out[slot : slot + 1], alone)


def test_pt_141218_lengths_beyond_the_capacity_are_clamped(device):
    q, k, v = make_qkv(2, 3, 40, 2, 1, 64, dtype=BRAIN)
    for name in OPS:
        op = op_of(name)
        for dtype in (torch.int32, torch.int64):
            wild = torch.tensor([2**31 - 1, -5], dtype=dtype)
            expected = op(q, k, v, seqlens_kv=lengths(40, 0))
            assert_same_bits(op(q, k, v, seqlens_kv=wild), expected)
            begins = torch.tensor([-(2**31), 2**31 - 1], dtype=dtype)
            expected = op(q, k, v, kv_start=lengths(0, 40))
            assert_same_bits(op(q, k, v, kv_start=begins), expected)


@every_op
def test_pt_193728_dimensions_of_size_zero(device, name):
    for empty in ("batch_size", "seqlen_q", "seqlen_kv"):
        shape = {"batch_size": 2, "seqlen_q": 3, "seqlen_kv": 5, empty: 0}
        q, k, v = make_qkv(**shape, head_dim=16, dtype=HALF)
        out, lse = op_of(name)(q, k, v, return_lse=True)
        assert not out.any() and (lse == -math.inf).all()


@every_op
def test_llama_cpp_17746_large_values_do_not_overflow(device, name):
    q, k, v = make_qkv(1, 2, 1100, 2, 1, 64, dtype=HALF)
    v = torch.where(torch.rand(v.shape) < 0.5, 6e4, -6e4).to(HALF)
    out, _ = check_forward(op_of(name), q, k, v)
    assert out.isfinite().all()
    # 24 * 24 * 64 is more than half of what float16 holds, 24 * 24 * 128 more than all.
    q, k, v = make_qkv(1, 2, 40, 2, 1, 128, dtype=HALF)
    check_forward(op_of(name), torch.full_like(q, 24.0), torch.full_like(k, 24.0), v)
