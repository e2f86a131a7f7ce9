"""softmax="unified": which rows the guard lets through, has computed again, and counts."""

import functools
import math

import pytest
import torch
from unified_oracle import check_unified, counted, predict

from flashinfer_lite import attention, decode, explain, reference
from flashinfer_lite.testing import (
    assert_close,
    assert_same_bits,
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
INT = torch.int32


def uniform(score, *, rows=1, keys=1, heads=1, dtype=torch.float32, device="cpu", value=1.0):
    """q, k, v and a float32 mask such that every score is exactly `score`."""
    q, k = (torch.zeros(1, n, heads, 8, dtype=dtype, device=device) for n in (rows, keys))
    v = torch.full((1, keys, heads, 8), value, dtype=dtype, device=device)
    mask = torch.full((1, keys), score, device=device)
    return q, k, v, {"mask": mask.to(torch.promote_types(dtype, torch.float32))}


# DEMAND case 3: logits for which a fixed phi gives inf/inf and 0/0.
LEVELS = (100.0, 151.29, -200.0, "mixed")
HEADS = ((2, 2), (4, 2), (4, 1), (8, 1))


def extreme(level, seqlen_q, seqlen_kv, heads, head_dim, dtype, device):
    """q and k whose scores are all `level` at softmax_scale 1, or +151 and -200 in turn."""
    q, k, v = make_qkv(1, seqlen_q, seqlen_kv, *heads, head_dim, dtype=dtype, device=device)
    q, k = torch.ones_like(q), torch.full_like(k, 1 / head_dim)
    if level == "mixed":
        k[:, ::2] *= 151.0
        k[:, 1::2] *= -200.0
    else:
        k *= level
    return q, k, v


@all_dtypes
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen_kv", [1, 33, 128, 1025])
def test_executorch_22133_extreme_logits(device, dtype, head_dim, seqlen_kv):
    for i, seqlen_q in enumerate((1, 2, 3, 4, 8)):
        heads = HEADS[(i + seqlen_kv) % len(HEADS)]
        for j, level in enumerate(LEVELS):
            q, k, v = extreme(level, seqlen_q, seqlen_kv, heads, head_dim, dtype, device)
            op = list(OPS.values())[(i + j) % len(OPS)]
            given = {"softmax_scale": 1.0, "return_lse": True}
            online = op(q, k, v, softmax="online", **given)
            got, checked, recomputed = counted(lambda: op(q, k, v, phi=5.0, **given))  # noqa: B023
            assert checked == recomputed == seqlen_q * heads[0]
            for x, y in zip(got, online, strict=True):
                assert x.isfinite().all()
                assert torch.equal(x, y)
            if level == "mixed":
                check_forward(functools.partial(op, phi=5.0), q, k, v, softmax_scale=1.0)


@all_dtypes
@all_ops
def test_neighbours_of_a_bad_row_keep_their_bits(device, isa, dtype, op):
    for heads, seqlens in zip(HEADS, ((1, 33), (3, 300), (8, 128), (40, 60)), strict=True):
        one_bad_row(op, *make_qkv(2, *seqlens, *heads, 64, dtype=dtype, device=device))


def one_bad_row(op, q, k, v):
    rows = q[..., 0].numel()
    row = (1, q.shape[1] - 1, q.shape[2] - 1)
    # Far from the bounds for ordinary scores, and far from their maxima.
    given = {"phi": -3.0 if q.dtype == torch.float16 else -12.0, "return_lse": True}
    (out, lse), checked, recomputed = counted(lambda: op(q, k, v, **given))
    assert (checked, recomputed) == (rows, 0)
    other = torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
    other[row] = False
    for size in (400.0, -400.0):  # K has a mean: every score of the row is far away
        bad = q.clone()
        bad[row] = size
        (bad_out, bad_lse), checked, recomputed = counted(lambda: op(bad, k, v, **given))  # noqa: B023
        assert (checked, recomputed) == (rows, 1)
        online, online_lse = op(bad, k, v, return_lse=True)
        assert bad_out[row].isfinite().all()
        assert_same_bits(bad_out[row], online[row])
        assert_same_bits(bad_lse.mT[row], online_lse.mT[row], "lse")
        assert_same_bits(bad_out[other], out[other])
        assert_same_bits(bad_lse.mT[other], lse.mT[other], "lse")
    if q.dtype in (torch.float32, torch.float64):  # else nothing above says that phi was used
        assert not torch.equal(out, op(q, k, v))


@all_ops
@all_dtypes
@pytest.mark.parametrize("phi", [0.0, 40.0, -1e300, 1e300], ids=str)
def test_empty_rows_count_nowhere(device, isa, dtype, op, phi):
    q, k, v = make_qkv(3, 5, 40, 4, 2, 64, dtype=dtype, device=device)
    visible = torch.ones(3, 1, 5, 40, dtype=torch.bool, device=device)
    visible[1, :, 2] = False  # a row in a batch of others
    visible[2, :, :, 3:] = False
    additive = torch.zeros(visible.shape, device=device).masked_fill(~visible, -math.inf)
    ends = torch.tensor([40, 0, 3], dtype=INT, device=device)
    cases = [
        ({"mask": visible}, 3 * 5 - 1),
        ({"mask": additive}, 3 * 5 - 1),
        ({"seqlens_kv": ends}, 10),
        ({"seqlens_kv": ends, "causal": True}, 5 + 3),  # of the third only the last three see
        ({"seqlens_kv": ends, "kv_start": ends}, 0),
        ({"mask": additive, "seqlens_kv": ends, "causal": True, "window": (0, 0)}, 5 + 3),
    ]
    for arguments, rows in cases:
        _, checked, recomputed = counted(lambda: op(q, k, v, phi=phi, **arguments))  # noqa: B023
        assert checked == 4 * rows, arguments
        assert recomputed == checked or phi == 0.0
        check_unified(op, q, k, v, phi, **arguments)


@all_ops
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38], ids=str)
def test_a_useless_phi_says_nothing_of_rows_without_keys(device, isa, op, value):
    q, k, v = make_qkv(2, 3, 300, 4, 2, 32, device=device)
    mask = make_mask("bool", (2, 4, 3, 300), device=device)  # the first row sees nothing
    mask[0, :, 0] = False
    phi = torch.full((4,), value, device=device)
    _, checked, recomputed = counted(lambda: op(q, k, v, phi=phi, mask=mask))
    assert checked == recomputed == mask.any(-1).sum()
    check_unified(op, q, k, v, phi, mask=mask)


@all_dtypes
@all_ops
def test_bounds_of_the_guard(device, isa, dtype, op):
    low, high = (0.0, 10.4) if dtype == torch.float16 else (0.0, 44.0)
    inside, outside = (low + 0.01, high - 0.01), (low - 0.01, high + 0.01)
    for scores, violated in ((inside, 0), (outside, 3), ((low, high), 3)):
        if scores == (low, high) and device.type != "cpu":
            scores = (0.0,) if low == 0.0 else ()  # elsewhere rounding decides a tie, but at 0
        for score in scores:
            q, k, v, masks = uniform(score, rows=3, keys=70, dtype=dtype, device=device)
            (out, lse), checked, recomputed = counted(
                lambda: op(q, k, v, softmax="unified", **masks, return_lse=True)  # noqa: B023
            )
            assert (checked, recomputed) == (3, violated), score
            check_unified(op, q, k, v, 0.0, **masks)
    # A split may underflow, as long as the row's maximum is in another.
    q, k, v, masks = uniform(low + 1, rows=3, keys=2000, dtype=dtype, device=device)
    masks["mask"][:, 600:] = -300.0
    (out, lse), checked, recomputed = counted(
        lambda: op(q, k, v, softmax="unified", **masks, return_lse=True)
    )
    assert (checked, recomputed) == (3, 0)
    assert_close(lse, torch.full_like(lse, low + 1 + math.log(600)).double(), lse)


@all_ops
def test_numerators(device, isa, op):
    """Finite scores within the guard, and values with which the sums are not safe."""
    for value, score, violated in (
        (1e-30, 5.0, 0),  # as good as the online softmax has them
        (0.0, 5.0, 0),
        (1e30, 29.0, 3),  # overflow
        (1e30, 10.0, 0),
        (math.nan, 5.0, 3),
        (-math.inf, 5.0, 3),
    ):
        q, k, v, masks = uniform(score, rows=3, keys=70, device=device, value=value)
        _, _, recomputed = counted(lambda: op(q, k, v, softmax="unified", **masks))  # noqa: B023
        assert recomputed == violated, (value, score)
        check_unified(op, q, k, v, 0.0, **masks)
    # One column decides, wherever it lies.
    for column in (0, 7, 16, 23):
        q, k, v, masks = uniform(20.0, keys=70, device=device)
        wide = torch.ones(1, 70, 1, 24, device=device)
        wide[..., column] = 1e37
        _, _, recomputed = counted(lambda: op(q, k, wide, softmax="unified", **masks))  # noqa: B023
        assert recomputed == 1
        wide[..., column] = 1e-30
        _, _, recomputed = counted(lambda: op(q, k, wide, softmax="unified", **masks))  # noqa: B023
        assert recomputed == 0


@all_ops
def test_the_largest_values_do_not_round_to_infinity(device, isa, op):
    largest = torch.finfo(torch.float32).max
    for step in range(60):
        q, k, v, masks = uniform(0.05 * step + 0.013, device=device, value=largest)
        assert op(q, k, v, softmax="unified", **masks).isfinite().all()


@all_ops
def test_what_is_flushed(device, isa, op):
    """A key far below the maximum counts where its value is as much larger, whatever phi is."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v, _ = uniform(0.0, keys=2, dtype=dtype, device=device)
        v[:, 1] = torch.finfo(dtype).max / 4
        far = 8.0 if dtype == torch.float16 else 70.0
        mask = torch.tensor([0.0, -far], device=device)
        exact = reference.attention(q, k, v, mask=mask, dtype=torch.float64)
        assert exact.min() > 2
        terms = 44 * exact.max().item()
        for phi in (29.9, 0.1, -0.1, -8.0):
            assert_close(op(q, k, v, mask=mask, phi=phi), exact, exact, terms=terms)


def test_a_million_keys_near_the_upper_bound(device, isa):
    q, k, v, masks = uniform(43.5, device=device, keys=2**20)
    ones = torch.ones(1, 1, 1, 1, device=device)
    k, v = (t[:, :1].expand(1, 2**20, 1, 8) for t in (k, v))
    masks["mask"] = (43.5 * ones[0, 0]).expand(1, 2**20)
    for op in (attention, functools.partial(decode, kv_splits=3)):
        (out, lse), checked, recomputed = counted(
            lambda: op(q, k, v, softmax="unified", **masks, return_lse=True)  # noqa: B023
        )
        assert (checked, recomputed) == (1, 0)
        assert_close(out, torch.ones_like(out).double(), out, terms=44.0)
        assert abs(lse.item() - 43.5 - math.log(2**20)) < 1e-3


@all_ops
@pytest.mark.parametrize("per_head", [False, True])
def test_phi_is_of_the_head(device, isa, op, per_head):
    """Each head's own phi: heads off by 50 are recomputed, the others are not."""
    q, k, v = make_qkv(2, 3, 50, 6, 2, 32, device=device, logits=0.1)
    phi = torch.tensor([-1.0, 40.0, -3.0, -50.0, math.nan, -5.0], device=device)
    violated = torch.tensor([False, True, False, True, True, False], device=device)
    if not per_head:
        phi, violated = 40.0, torch.ones_like(violated)
    (out, lse), checked, recomputed = counted(lambda: op(q, k, v, phi=phi, return_lse=True))
    assert (checked, recomputed) == (36, 6 * violated.sum())
    online, online_lse = op(q, k, v, return_lse=True)
    assert_same_bits(out[:, :, violated], online[:, :, violated])
    assert_same_bits(lse[:, violated], online_lse[:, violated])
    if per_head:
        for head in (2, 5):  # phi 0 may give the online softmax's bits
            assert not torch.equal(out[:, :, head], online[:, :, head])
        scattered = torch.stack([phi, -phi], -1)[:, 0]
        assert not scattered.is_contiguous()
        assert_same_bits(op(q, k, v, phi=scattered), out)
        assert_same_bits(op(q, k, v, phi=phi[:1].expand(6)), op(q, k, v, phi=-1.0))


@all_ops
def test_arguments(device, isa, op):
    q, k, v = make_qkv(2, 3, 50, 4, 2, 32, device=device)
    unified = op(q, k, v, phi=0.0)
    assert_same_bits(op(q, k, v, softmax="unified"), unified)
    assert_same_bits(op(q, k, v, softmax="auto", phi=0), unified)
    assert_same_bits(op(q, k, v, softmax="unified", phi=torch.zeros(4, device=device)), unified)
    for softmax in ("auto", "online"):
        _, checked, _ = counted(lambda: op(q, k, v, softmax=softmax))  # noqa: B023
        assert checked == 0
    for bad in ({"softmax": "online", "phi": 0.0}, {"phi": math.inf}, {"phi": math.nan}):
        with pytest.raises(ValueError, match="^phi: expected"):
            op(q, k, v, **bad)
    for bad in (torch.zeros(3), torch.zeros(()), torch.zeros(4, 1), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match=r"^phi: expected a number or shape \[4\]"):
            op(q, k, v, phi=bad.to(device))
    with pytest.raises(TypeError, match=r"^phi: expected a number or a float32 .*, got bool"):
        op(q, k, v, phi=True)


def test_explain_is_the_same(device, isa):
    q, k, v = make_qkv(2, 3, 600, 4, 2, 64, device=device)
    for op in (attention, decode):
        plain = explain(op, q, k, v)
        for given in ({"softmax": "unified"}, {"phi": 5.0}, {"phi": torch.zeros(4, device=device)}):
            assert explain(op, q, k, v, **given) == plain
        with pytest.raises(ValueError, match="^phi: "):
            explain(op, q, k, v, softmax="online", phi=1.0)


def test_nothing_lost_at_predicting(device):
    """The prediction itself, where it is known."""
    q, k, v, masks = uniform(29.0, rows=2, keys=3, device=device)
    masks["mask"] = torch.tensor([[29.0, 1.0, 0.0], [-math.inf] * 3], device=device)
    rows = predict(q, k, v, 0.0, **masks)
    assert rows.alive.flatten().tolist() == rows.good.flatten().tolist() == [True, False]
    assert not rows.violated.any()
    rows = predict(q, k, v, 60.0, **masks)
    assert rows.violated.flatten().tolist() == [True, False]
