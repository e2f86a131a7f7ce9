"""attention(), forward: features, dtypes, sizes, tails, layouts and ranges, against the oracle."""

import functools
import random

import pytest
import torch

from flashinfer_lite import attention, explain, reference
from flashinfer_lite.testing import (
    EMULATED,
    LAYOUTS,
    assert_same_bits,
    check_forward,
    make_mask,
    make_qkv,
)
from flashinfer_lite.testing.tolerance import STRICT_KEYS

TILES = ("avx512-bf16", "amx", *EMULATED)  # up to 512 rows of bfloat16 for any threads
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [8, 16, 40, 56, 64, 72, 80, 96, 128, 192, 256]

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def lengths(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


# Base case: batch 2, 37 queries, 53 keys, 4 heads over 2, head_dim 64.
FEATURES = {
    "plain": {},
    "scale": {"softmax_scale": 0.3},
    "scale_zero": {"softmax_scale": 0.0},
    "scale_negative": {"softmax_scale": -0.2},
    "causal": {"causal": True},
    "causal_named": {"causal": "bottom_right"},
    "causal_top_left": {"causal": "top_left"},
    "window": {"window": (5, 3)},
    "window_left": {"window": (7, -1)},
    "window_right": {"window": (-1, 2)},
    "window_self": {"window": (0, 0)},
    "window_huge": {"window": (2**40, 2**62)},
    "window_causal": {"window": (9, -1), "causal": True},
    "window_causal_both": {"window": (9, 4), "causal": True},
    "window_top_left": {"window": (3, 0), "causal": "top_left"},
    "softcap": {"softcap": 1.0},
    "softcap_causal": {"softcap": 30.0, "causal": True},
    "seqlens": {"seqlens_kv": lengths(53, 20)},
    "seqlens_int64": {"seqlens_kv": lengths(31, 1, dtype=torch.int64)},
    "seqlens_zero": {"seqlens_kv": lengths(0, 53)},
    "seqlens_causal": {"seqlens_kv": lengths(53, 21), "causal": True},
    "seqlens_top_left": {"seqlens_kv": lengths(53, 21), "causal": "top_left"},
    "seqlens_window": {"seqlens_kv": lengths(40, 9), "window": (4, 4)},
    "kv_start": {"kv_start": lengths(0, 13)},
    "kv_start_causal": {"kv_start": lengths(20, 53), "causal": True},
    "kv_start_seqlens": {"kv_start": lengths(8, 3), "seqlens_kv": lengths(9, 50), "causal": True},
    "everything": {
        "kv_start": lengths(2, 0),
        "seqlens_kv": lengths(53, 44),
        "causal": True,
        "window": (25, 0),
        "softcap": 8.0,
    },
}
MASK_SHAPES = [
    (53,),
    (1,),
    (37, 53),
    (37, 1),
    (4, 37, 53),
    (4, 1, 53),
    (2, 1, 1, 53),
    (2, 4, 37, 53),
]


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(device, isa, dtype, feature):
    arguments = {
        name: x.to(device) if torch.is_tensor(x) else x for name, x in FEATURES[feature].items()
    }
    q, k, v = make_qkv(2, 37, 53, dtype=dtype, device=device)
    check_forward(attention, q, k, v, **arguments)
    # So few rows that the kernel reads K and V in place instead of packing them.
    check_forward(attention, q[:, :3], k, v, **arguments)


@pytest.mark.parametrize("kind", ["bool", "additive", "additive_inf"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_mask(device, isa, dtype, kind, shape):
    q, k, v = make_qkv(2, 37, 53, dtype=dtype, device=device)
    for mask_dtype in DTYPES if shape == (2, 4, 37, 53) else [random.choice(DTYPES)]:
        mask = make_mask(kind, shape, dtype=mask_dtype, device=device, empty_rows=shape[-1] > 1)
        check_forward(attention, q, k, v, mask=mask)
    ends = lengths(50, 17).to(device)
    check_forward(attention, q, k, v, mask=mask, causal=True, softcap=5.0, seqlens_kv=ends)


def test_mask_strides(device, isa, dtype):
    q, k, v = make_qkv(2, 21, 43, dtype=dtype, device=device)
    wide = make_mask("additive_inf", (2, 4, 21, 50), dtype=torch.float16, device=device)
    transposed = make_mask("bool", (2, 4, 43, 21), device=device).transpose(2, 3)
    strided = make_mask("additive", (2, 4, 21, 86), dtype=torch.float32, device=device)[..., ::2]
    for mask in (wide[..., 3:46], transposed, strided, wide[:1, :1, :1, :43].expand(2, 4, 21, 43)):
        check_forward(attention, q, k, v, mask=mask)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dim(device, isa, dtype, head_dim):
    for head_dim_v in (head_dim, 8 * (1 + (head_dim // 8 * 5) % 32)):
        q, k, v = make_qkv(1, 19, 45, 2, 1, head_dim, head_dim_v, dtype=dtype, device=device)
        check_forward(attention, q, k, v, causal=True)
        check_forward(attention, q[:, :1], k, v)


TAILS = sorted({max(t + d, 1) for t in (4, 6, 8, 12, 16, 32, 64, 128, 192) for d in (-1, 0, 1)})


@pytest.mark.parametrize("seqlen_kv", TAILS)
def test_tails_of_keys(device, isa, dtype, seqlen_kv):
    for seqlen_q in (1, 6, 25):
        q, k, v = make_qkv(1, seqlen_q, seqlen_kv, 2, 1, 40, dtype=dtype, device=device)
        check_forward(attention, q, k, v)
        check_forward(attention, q, k, v, causal=True, window=(seqlen_kv // 2, 0))


@pytest.mark.parametrize("seqlen_q", TAILS)
def test_tails_of_queries(device, isa, dtype, seqlen_q):
    q, k, v = make_qkv(1, seqlen_q, 67, 3, 1, 24, 32, dtype=dtype, device=device)
    check_forward(attention, q, k, v, causal=True)
    check_forward(attention, q, k, v, causal="top_left")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(device, isa, dtype, layout):
    for seqlen_q in (2, 41):
        q, k, v = make_qkv(2, seqlen_q, 41, 4, 4, 40, dtype=dtype, device=device, layout=layout)
        before = [t.clone() for t in (q, k, v)]
        check_forward(attention, q, k, v, causal=True)
        for name, t, old in zip("qkv", (q, k, v), before, strict=True):
            assert_same_bits(t, old, name)


def test_layout_gqa_fused(device, isa, dtype):
    q, k, v = make_qkv(2, 30, 30, 6, 2, 64, 80, dtype=dtype, device=device, layout="fused")
    assert not k.is_contiguous()
    check_forward(attention, q, k, v, causal=True)


@pytest.mark.parametrize(
    "heads", [(1, 1), (8, 8), (8, 2), (8, 1), (6, 2), (5, 1), (13, 1), (16, 1)]
)
def test_heads(device, isa, dtype, heads):
    for seqlen_q in (1, 9):
        q, k, v = make_qkv(2, seqlen_q, 75, *heads, 32, dtype=dtype, device=device)
        check_forward(attention, q, k, v, causal=True)


def test_one_key_rows_equal_v_bit_for_bit(device, isa, dtype):
    q, k, v = make_qkv(2, 33, 33, 4, 2, 72, dtype=dtype, device=device, logits=7)
    expected = v.repeat_interleave(2, 2)
    assert_same_bits(attention(q, k, v, window=(0, 0)), expected)
    assert_same_bits(attention(q, k[:, :1], v[:, :1]), expected[:, :1].expand(2, 33, 4, 72))
    diagonal = torch.eye(33, dtype=torch.bool, device=device)
    assert_same_bits(attention(q, k, v, mask=diagonal, softcap=3.0), expected)


@pytest.mark.parametrize("logits", [100.0, 1000.0])
def test_large_logits(device, isa, dtype, logits):
    q, k, v = make_qkv(2, 29, 141, dtype=dtype, device=device, logits=logits)
    check_forward(attention, q, k, v, causal=True)
    check_forward(attention, -q, k, v)
    check_forward(attention, q, k, v, softcap=50.0)


@pytest.mark.parametrize("softcap", [1e3, 1e6, 1e30])
def test_softcap_far_above_the_scores(device, isa, dtype, softcap):
    # tanh of almost nothing must keep its digits: the cap all but disappears.
    q, k, v = make_qkv(1, 20, 64, dtype=dtype, device=device)
    check_forward(attention, q, k, v, softcap=softcap)


def test_rising_and_falling_scores(device, isa, dtype):
    # The running maximum grows at every key, or never again: the rescale at its most and least.
    q, k, v = make_qkv(1, 7, 400, 2, 1, 16, dtype=dtype, device=device)
    ramp = torch.linspace(-150, 150, 400, device=device)
    for bias in (ramp, ramp.flip(0), ramp.roll(200)):
        check_forward(attention, q, k, v, mask=bias)


def test_rows_without_keys(device, isa, dtype):
    q, k, v = make_qkv(2, 20, 6, dtype=dtype, device=device)
    out, lse = check_forward(attention, q, k, v, causal=True)
    assert not out[:, :14].any() and (lse[:, :, :14] == -torch.inf).all()
    hidden = torch.zeros(6, dtype=torch.bool, device=device)
    out, lse = check_forward(attention, q, k, v, mask=hidden)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("empty", ["batch_size", "seqlen_q", "seqlen_kv", "heads", "num_heads_q"])
def test_zero_size_dimensions(device, isa, dtype, empty):
    shape = {"batch_size": 2, "seqlen_q": 3, "seqlen_kv": 5, "num_heads_q": 4, "num_heads_kv": 2}
    shape.update({"num_heads_q": 0, "num_heads_kv": 0} if empty == "heads" else {empty: 0})
    q, k, v = make_qkv(**shape, head_dim=16, head_dim_v=8, dtype=dtype, device=device)
    for arguments in ({}, {"causal": True}, {"mask": torch.ones(1, 1, device=device)}):
        out, lse = attention(q, k, v, **arguments, return_lse=True)
        assert list(out.shape) == [shape["batch_size"], shape["seqlen_q"], shape["num_heads_q"], 8]
        assert not out.any() and (lse == -torch.inf).all()


def test_repeats_bit_for_bit(device, isa, dtype, threads):
    q, k, v = make_qkv(3, 70, 300, 6, 2, 64, dtype=dtype, device=device)
    run = functools.partial(attention, q, k, v, causal=True, return_lse=True)
    first = run()
    for count in (1, 2, 3):
        threads(count)
        for name, x, y in zip(("out", "lse"), run(), first, strict=True):
            assert_same_bits(x, y, name)
    for b in range(3):  # a sequence alone
        alone = attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)
        assert_same_bits(alone, first[0][b : b + 1])


@pytest.mark.cpu_only("CUDA fuses scale and base: scores beyond 2^31 are a limit there")
@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("size", [1e5, 1e11, 1e15])
def test_the_largest_score_has_the_weight_1_however_large(device, isa, dtype, size, queries):
    if dtype == torch.float16:
        size = min(size, 1e8)
    q, k, v = make_qkv(1, queries, 70, 2, 1, 64, dtype=dtype, device=device)
    q, k = q.abs() * size**0.5, k.abs() * size**0.5 / 64
    k[:, 41] *= 4  # every row's largest score, by far
    out, lse = attention(q, k, v, return_lse=True)
    assert_same_bits(out, v[:, 41:42].expand(1, queries, 2, 64).contiguous())
    _, expected = reference.attention(q.double(), k.double(), v.double(), return_lse=True)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.cpu_only("a scale of 0 in float32 is a limit of CUDA's kernels")
def test_a_scale_that_rounds_to_0_hides_what_is_hidden(device, isa, dtype):
    q, k, v = make_qkv(1, 40, 70, 2, 1, 64, dtype=dtype, device=device)
    out = attention(q, k, v, causal=True, softmax_scale=1e-47)
    expected = reference.attention(*(x.double() for x in (q * 0, k, v)), causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)


@pytest.mark.cpu_only("the CPU cuts rows by the number of threads")
@pytest.mark.parametrize(
    "arguments",
    [
        {"causal": True},
        {"causal": True, "window": (150, 0)},
        {"window": (40, 90)},
        {"softcap": 9.0},
    ],
)
def test_the_length_of_row_blocks_changes_no_bit(device, isa, dtype, threads, arguments):
    q, k, v = make_qkv(2, 330, 600, 4, 2, 40, dtype=dtype, device=device)
    v[:, 300, :, 7] = torch.nan  # hidden from some rows of a block
    run = functools.partial(attention, **arguments, return_lse=True)
    threads(1)
    few, tile = run(q, k, v), explain(attention, q, k, v).tile
    threads(64)
    many, other_tile = run(q, k, v), explain(attention, q, k, v).tile
    assert tile[0] > other_tile[0] or (isa in TILES and dtype == torch.bfloat16)
    for name, x, y in zip(("out", "lse"), many, few, strict=True):
        assert_same_bits(x, y, name)


def test_deterministic_and_batch_invariant_change_nothing(device, isa, dtype):
    q, k, v = make_qkv(2, 20, 50, dtype=dtype, device=device)
    plain = attention(q, k, v)
    assert_same_bits(attention(q, k, v, deterministic=True, batch_invariant=True), plain)


def test_reference_impl_is_the_oracle(device, dtype):
    q, k, v = make_qkv(2, 9, 12, dtype=dtype, device=device)
    arguments = {
        "causal": True,
        "window": (4, 0),
        "softcap": 9.0,
        "kv_start": lengths(1, 0).to(device),
    }
    out, lse = attention(q, k, v, **arguments, impl="reference", return_lse=True)
    expected, expected_lse = reference.attention(q, k, v, **arguments, return_lse=True)
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)


def _random_case(rng):
    heads_kv = rng.choice([1, 2, 3])
    batch_size, seqlen_q, seqlen_kv = rng.randint(1, 3), rng.randint(1, 90), rng.randint(1, 200)
    shape = {
        "batch_size": batch_size,
        "seqlen_q": seqlen_q,
        "seqlen_kv": seqlen_kv,
        "num_heads_q": heads_kv * rng.choice([1, 2, 5]),
        "num_heads_kv": heads_kv,
        "head_dim": 8 * rng.randint(1, 16),
        "head_dim_v": 8 * rng.randint(1, 16),
        "layout": rng.choice(LAYOUTS),
        "logits": rng.choice([1, 1, 10]),
    }
    ends = [rng.randint(0, seqlen_kv) for _ in range(batch_size)]
    arguments = {
        "causal": rng.choice([False, True, "top_left"]),
        "window": (rng.choice([-1, -1, 0, 5, 40]), rng.choice([-1, -1, 0, 7])),
        "softcap": rng.choice([None, None, 2.0, 30.0]),
        "softmax_scale": rng.choice([None, 0.05]),
    }
    if rng.random() < 0.5:
        arguments["seqlens_kv"] = lengths(*ends)
        if rng.random() < 0.5:
            arguments["kv_start"] = lengths(*(rng.randint(0, end) for end in ends))
    if rng.random() < 0.4:
        full = (batch_size, shape["num_heads_q"], seqlen_q, seqlen_kv)
        mask_shape = [rng.choice([size, size, 1]) for size in full][rng.randint(0, 3) :]
        arguments["mask"] = rng.choice(["bool", "additive", "additive_inf"]), tuple(mask_shape)
    return shape, arguments


CASES = [*range(30), *(pytest.param(case, marks=pytest.mark.slow) for case in range(30, 120))]


@pytest.mark.parametrize("case", CASES)
def test_random_combination(device, isa, dtype, case):
    shape, arguments = _random_case(random.Random(case))
    q, k, v = make_qkv(**shape, dtype=dtype, device=device)
    if "mask" in arguments:
        arguments["mask"] = make_mask(*arguments["mask"], device=device)
    for name in arguments.keys() & {"seqlens_kv", "kv_start"}:
        arguments[name] = arguments[name].to(device)
    check_forward(attention, q, k, v, **arguments)


@pytest.mark.parametrize("keys", STRICT_KEYS)
def test_strict_rule(device, isa, dtype, keys):
    for mean in (0.0, 0.5):
        q, k, v = make_qkv(1, 64, keys, 2, 1, 64, dtype=dtype, device=device, mean=mean)
        check_forward(attention, q, k, v, strict=True)
        check_forward(attention, q[:, :1], k, v, strict=True, causal=True)


def test_float16_range(device, isa, dtype):
    # 24 * 24 * 128 is more than float16 holds; so is the sum of 4096 values of 60000.
    q, k, v = make_qkv(1, 3, 4096, 2, 1, 128, dtype=dtype, device=device)
    v = torch.full_like(v, 6e4)
    out, _ = check_forward(attention, q, k, v)
    assert out.isfinite().all()
    check_forward(attention, torch.full_like(q, 24.0), torch.full_like(k, 24.0), v)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(device, isa, dtype, head_dim):
    for head_dim_v in (8, 24, 64, 120, 256):
        q, k, v = make_qkv(1, 33, 130, 2, 1, head_dim, head_dim_v, dtype=dtype, device=device)
        check_forward(attention, q, k, v, causal=True)
