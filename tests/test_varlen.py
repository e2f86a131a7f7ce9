"""attention_varlen(), forward: against the oracle, and bit for bit a loop of attention()."""

import functools
import random

import pytest
import torch

from flashinfer_lite import attention, attention_varlen, explain, stats
from flashinfer_lite.testing import (
    LAYOUTS,
    assert_close,
    assert_same_bits,
    check_forward,
    make_varlen,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32)


def on(device, arguments):
    return {n: x.to(device) if torch.is_tensor(x) else x for n, x in arguments.items()}


# Of each sequence how many queries and keys: without either, without both, at the ends and between.
BATCH = ([0, 37, 5, 0, 1, 40, 3], [4, 53, 0, 0, 90, 25, 3])
FEATURES = {
    "plain": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "causal_top_left": {"causal": "top_left"},
    "window": {"window": (5, 3)},
    "window_left": {"window": (7, -1)},
    "window_causal": {"window": (9, -1), "causal": True},
    "window_huge": {"window": (2**40, 2**62)},
    "softcap": {"softcap": 1.0},
    "softcap_causal": {"softcap": 30.0, "causal": True},
    "seqlens": {"seqlens_kv": lengths(4, 20, 0, 0, 90, 0, 3), "causal": True},
    "kv_start": {"kv_start": lengths(4, 13, 0, 0, 89, 25, 1)},
    "sink": {"sink": torch.tensor([0.5, -4.0, 3.0, -torch.inf]), "causal": True},
    "everything": {
        "kv_start": lengths(1, 13, 0, 0, 0, 2, 1).long(),
        "seqlens_kv": lengths(3, 50, 0, 0, 80, 24, 2).long(),
        "causal": True,
        "window": (25, 0),
        "softcap": 8.0,
        "sink": torch.tensor([0.5, -4.0, 3.0, 9.0]),
    },
}
every_feature = pytest.mark.parametrize("feature", FEATURES)


@all_dtypes
@every_feature
def test_feature(device, isa, dtype, feature):
    q, k, v, offsets = make_varlen(*BATCH, dtype=dtype, device=device)
    check_forward(attention_varlen, q, k, v, **offsets, **on(device, FEATURES[feature]))


def loop(q, k, v, cu_seqlens_q, cu_seqlens_kv, op=attention, **arguments):
    """[(out, lse)] of attention on one sequence after the other."""
    results = []
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(*x[b : b + 2].tolist()) for x in (cu_seqlens_q, cu_seqlens_kv))
        own = {
            n: x[b : b + 1] if n in ("kv_start", "seqlens_kv") else x for n, x in arguments.items()
        }
        out, lse = op(q[None, rows], k[None, keys], v[None, keys], **own, return_lse=True)
        results.append((out[0], lse[0]))
    return results


def assert_same_as_loop(q, k, v, offsets, **arguments):
    out, lse = attention_varlen(q, k, v, **offsets, **arguments, return_lse=True)
    at = int(offsets["cu_seqlens_q"][0])
    for part, part_lse in loop(q, k, v, **offsets, **arguments):
        rows = slice(at, at + len(part))
        assert_same_bits(out[rows], part)
        assert_same_bits(lse[:, rows], part_lse, "lse")
        at += len(part)
    return out, lse


@all_dtypes
@every_feature
def test_bits_are_those_of_a_loop(device, isa, dtype, feature, threads):
    heads = random.choice([(4, 4), (4, 2), (4, 1)])
    q, k, v, offsets = make_varlen(*BATCH, *heads, dtype=dtype, device=device)
    for count in (1, 3):
        threads(count)
        assert_same_as_loop(q, k, v, offsets, **on(device, FEATURES[feature]))


@all_dtypes
def test_bits_of_long_sequences(device, isa, dtype, threads):
    threads(2)
    lengths_q = [300, 1, 130, 2, 97]
    q, k, v, offsets = make_varlen(lengths_q, [700, 2000, 129, 300, 97], dtype=dtype, device=device)
    assert_same_as_loop(q, k, v, offsets, causal=True)
    check_forward(attention_varlen, q, k, v, **offsets, causal=True)


@all_dtypes
@pytest.mark.parametrize("phi", [-5.0, 99.0, "by head"], ids=str)
def test_unified_maximum(device, isa, dtype, phi):
    q, k, v, offsets = make_varlen(*BATCH, dtype=dtype, device=device, tails=(3, 2))
    phi = torch.tensor([-5.0, 99.0, -5.0, -99.0], device=device) if phi == "by head" else phi
    stats(reset=True)
    assert_same_as_loop(q, k, v, offsets, phi=phi, causal=True)
    of_both = stats(reset=True)
    attention_varlen(q, k, v, **offsets, phi=phi, causal=True)
    counted = stats(reset=True)
    assert counted.calls == 1
    assert 2 * counted.rows_checked == of_both.rows_checked > 0
    assert 2 * counted.rows_recomputed == of_both.rows_recomputed
    assert counted.rows_recomputed > 0 or phi == -5.0
    run = functools.partial(attention_varlen, phi=phi)
    check_forward(run, q, k, v, **offsets, causal=True)


@all_dtypes
@every_feature
def test_tails_are_defined_and_not_read(device, isa, dtype, feature):
    arguments = on(device, FEATURES[feature])
    q, k, v, offsets = make_varlen(*BATCH, dtype=dtype, device=device, tails=(2, 3))
    out, lse = check_forward(attention_varlen, q, k, v, **offsets, **arguments)
    for rows in (slice(0, 2), slice(-3, None)):
        assert not out[rows].any() and (lse[:, rows] == -torch.inf).all()
    offsets = {n: x - 2 for n, x in offsets.items()}
    tight = attention_varlen(q[2:-3], k[2:-3], v[2:-3], **offsets, **arguments, return_lse=True)
    assert_same_bits(out[2:-3], tight[0])
    assert_same_bits(lse[:, 2:-3], tight[1], "lse")


@all_dtypes
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "capacity"])
def test_layout(device, isa, dtype, layout):
    q, k, v, offsets = make_varlen(
        [3, 0, 26, 1], num_heads_kv=4, head_dim=40, dtype=dtype, device=device, layout=layout
    )
    before = [x.clone() for x in (q, k, v)]
    check_forward(attention_varlen, q, k, v, **offsets, causal=True)
    for name, x, old in zip("qkv", (q, k, v), before, strict=True):
        assert_same_bits(x, old, name)


@all_dtypes
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (6, 2), (5, 1), (16, 1), (9, 3)])
def test_heads(device, isa, dtype, heads):
    q, k, v, offsets = make_varlen([9, 1, 17], [9, 75, 0], *heads, 32, dtype=dtype, device=device)
    check_forward(attention_varlen, q, k, v, **offsets, causal=True)


@all_dtypes
@pytest.mark.parametrize("head_dims", [(8, 256), (64, 128), (192, 128), (256, 8), (40, 72)])
def test_head_dims(device, isa, dtype, head_dims):
    q, k, v, offsets = make_varlen([9, 1, 17], [9, 75, 5], 2, 1, *head_dims, dtype=dtype)
    q, k, v, offsets = *(x.to(device) for x in (q, k, v)), on(device, offsets)
    check_forward(attention_varlen, q, k, v, **offsets)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_of_any_dtype_and_stride(device, isa, dtype):
    q, k, v, offsets = make_varlen(*BATCH, device=device)
    expected = attention_varlen(q, k, v, **offsets)
    for step in (1, 2):
        other = {
            n: torch.stack([x.to(dtype)] * step, 1).flatten()[::step] for n, x in offsets.items()
        }
        assert_same_bits(attention_varlen(q, k, v, **other), expected)
    mixed = offsets | {"cu_seqlens_kv": offsets["cu_seqlens_kv"].long()}
    assert_same_bits(attention_varlen(q, k, v, **mixed), expected)


def test_max_seqlens_change_nothing(device, isa):
    q, k, v, offsets = make_varlen(*BATCH, device=device)
    expected = attention_varlen(q, k, v, **offsets)
    for longest in ((40, 90), (40, None), (None, 90), (2**40, 2**62)):
        assert_same_bits(attention_varlen(q, k, v, *offsets.values(), *longest), expected)


@pytest.mark.parametrize(
    "lengths_q, lengths_kv", [([], []), ([0], [0]), ([0, 0], [3, 4]), ([3, 4], [0, 0])], ids=str
)
@pytest.mark.parametrize("tails", [(0, 0), (2, 1)])
def test_nothing_to_do(device, isa, lengths_q, lengths_kv, tails):
    q, k, v, offsets = make_varlen(lengths_q, lengths_kv, device=device, tails=tails)
    for arguments in ({}, {"phi": 0.0}, {"impl": "reference"}):
        out, lse = attention_varlen(q, k, v, **offsets, **arguments, return_lse=True)
        assert out.shape == q.shape and lse.shape == (4, len(q))
        assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("heads", [(0, 2), (0, 0)])
def test_no_heads(device, isa, heads):
    q, k, v = (torch.zeros(5, n, 16, device=device) for n in (heads[0], heads[1], heads[1]))
    offsets = torch.tensor([0, 2, 5], device=device)
    out, lse = attention_varlen(q, k, v, offsets, offsets, return_lse=True)
    assert out.shape == q.shape and lse.shape == (0, 5)


def test_many_short_sequences(device, isa):
    """More of them than a thread's stack would hold, one token each."""
    q, k, v, offsets = make_varlen([1] * 3000, num_heads_q=2, head_dim=8, device=device)
    assert_same_bits(attention_varlen(q, k, v, **offsets, causal=True), v)


@pytest.mark.parametrize(
    "cu_q, cu_kv, heads, head_dim",
    [
        ([0, 0, 1, 1, 2], [0, 0, 3, 3, 8], (9, 3), 64),
        ([0, 0, 0, 0, 1], [0, 2, 3, 3, 8], (9, 3), 64),
        ([0, 0, 1208, 2048, 2048], [0, 2538, 4280, 5120, 8192], (2, 1), 256),
    ],
    ids=str,
)
def test_fa_1537_fa_1619_fa_2562_zero_length_sequences(device, cu_q, cu_kv, heads, head_dim):
    lengths_q, lengths_kv = (torch.tensor(x).diff().tolist() for x in (cu_q, cu_kv))
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, offsets = make_varlen(
            lengths_q, lengths_kv, *heads, head_dim, dtype=dtype, device=device, tails=(0, 5)
        )
        for arguments in ({}, {"causal": True}):
            check_forward(attention_varlen, q, k, v, **offsets, **arguments)


def test_reference_impl(device):
    q, k, v, offsets = make_varlen(*BATCH, device=device, tails=(1, 1))
    out, lse = attention_varlen(q, k, v, **offsets, causal=True, return_lse=True)
    again = attention_varlen(q, k, v, **offsets, causal=True, impl="reference", return_lse=True)
    assert_close(out, again[0].double(), again[0])
    assert again[1].shape == lse.shape


@pytest.mark.cpu_only("the levels are the CPU's")
def test_explain(device, isa):
    q, k, v, offsets = make_varlen(*BATCH, device=device, dtype=torch.bfloat16)
    stats(reset=True)
    told = explain(attention_varlen, q, k, v, **offsets, causal=True)
    one = explain(attention, q[None, :37], k[None, :53], v[None, :53])
    assert stats().calls == 0
    assert told.kernel == one.kernel.replace("attention", "attention_varlen")
    assert told.tile == one.tile and told.kv_splits == 1 and told.rejected == one.rejected
    told = explain("attention_varlen", q, k, v, **offsets, impl="reference")
    assert told.kernel == "attention_varlen reference"
    nothing = {n: x[:1] for n, x in offsets.items()}
    assert explain("attention_varlen", q, k, v, **nothing).kv_splits == 1


def _random_case(rng):
    heads_kv, batch_size = rng.choice([1, 2, 3]), rng.randint(1, 6)
    seqlens = [
        [rng.choice([0, 1, rng.randint(0, 20), rng.randint(0, 150)]) for _ in range(batch_size)]
        for _ in range(2)
    ]
    layout = rng.choice(["contiguous", "bhsd", "padded", "misaligned"])
    options = {
        "num_heads_q": heads_kv * rng.choice([1, 2, 5]),
        "num_heads_kv": heads_kv,
        "head_dim": 8 * rng.randint(1, 16),
        "head_dim_v": 8 * rng.randint(1, 16),
        "layout": layout,
        "logits": rng.choice([1, 1, 10]),
        "tails": (rng.choice([0, 0, 1, 7]), rng.choice([0, 0, 1, 7])),
        "offsets_dtype": rng.choice([torch.int32, torch.int64]),
    }
    arguments = {
        "causal": rng.choice([False, True, "top_left"]),
        "window": (rng.choice([-1, -1, 0, 5, 40]), rng.choice([-1, -1, 0, 7])),
        "softcap": rng.choice([None, None, 2.0, 30.0]),
        "softmax_scale": rng.choice([None, 0.05]),
    }
    if rng.random() < 0.5:
        ends = [rng.randint(0, n) for n in seqlens[1]]
        arguments["seqlens_kv"] = lengths(*ends)
        if rng.random() < 0.5:
            arguments["kv_start"] = lengths(*(rng.randint(0, end) for end in ends))
    return seqlens, options, arguments


CASES = [*range(25), *(pytest.param(case, marks=pytest.mark.slow) for case in range(25, 120))]


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_random_combination(device, isa, dtype, case):
    seqlens, options, arguments = _random_case(random.Random(case))
    q, k, v, offsets = make_varlen(*seqlens, **options, dtype=dtype, device=device)
    arguments = on(device, arguments)
    check_forward(attention_varlen, q, k, v, **offsets, **arguments)
    if device.type == "cpu":
        assert_same_as_loop(q, k, v, offsets, **arguments)
