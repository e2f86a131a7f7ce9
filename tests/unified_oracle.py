"""What the softmax with a unified maximum owes, row by row, computed in float64.

The guard is written out here again, from docs/flashdecoding_pp.md and not from the kernels: rows
whose distance to it is beyond doubt must be checked, recomputed or left alone accordingly.
"""

import math
from dataclasses import dataclass

import torch

from flashinfer_lite import reference, stats
from flashinfer_lite.testing import assert_close, assert_lse_close, assert_same_bits

GUARD = {torch.float16: (0.0, 10.4)}  # low < row_max - phi < high, in natural units
WIDE_GUARD = (0.0, 44.0)
OVERFLOW = 2.0**128  # of numerators, in float32
FLUSHED = 2.0**-126  # less of a key's weight than this part of the largest may be lost


@dataclass
class Rows:
    """Of [batch, num_heads_q, seqlen_q]: bool, but `above`, the distance from phi."""

    alive: torch.Tensor  # sees a key
    scored: torch.Tensor  # and one whose score is not -inf
    violated: torch.Tensor  # beyond doubt
    good: torch.Tensor  # beyond doubt
    above: torch.Tensor


def predict(q, k, v, phi=0.0, *, mask=None, softmax_scale=None, softcap=None, **bounds):
    """What the guard must say of every row."""
    dtype, group = q.dtype, q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    visible = reference.visible_keys(
        len(q), q.shape[1], k.shape[1], device=q.device, **bounds
    ).expand(len(q), q.shape[2], q.shape[1], k.shape[1])
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores, size = (q @ k.mT) * scale, (q.abs() @ k.abs().mT) * abs(scale)
    if softcap:
        scores, size = softcap * torch.tanh(scores / softcap), size.clamp(max=2 * softcap)
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else mask != -math.inf)
    if mask is not None and mask.dtype != torch.bool:
        scores, size = scores + mask, size + mask.abs()

    alive = visible.any(-1)
    broken = (visible & scores.isnan()).any(-1)
    row_max = torch.where(visible, scores, -math.inf).amax(-1) if k.shape[2] else alive - math.inf
    size = torch.where(visible & size.isfinite(), size, 0.0)
    doubt = size.sum(-1) * 2.0**-18 + 1e-4
    phi = torch.as_tensor(phi, device=q.device).double().view(-1, 1)
    above = row_max - phi
    low, high = GUARD.get(dtype, WIDE_GUARD)
    outside = broken | ~((above > low - doubt) & (above < high + doubt))
    inside = ~broken & (above > low + doubt) & (above < high - doubt)

    weight = torch.where(visible, torch.exp(scores - phi.unsqueeze(-1)), 0.0)
    seen = torch.where(visible.any(-2).unsqueeze(-1), v, 0.0)
    finite = seen.nan_to_num(0.0, 0.0, 0.0)
    broken = (visible.double() @ (~seen.isfinite()).double()).amax(-1) > 0  # by a visible value
    numerator, terms = (weight @ finite).abs().amax(-1), (weight @ finite.abs()).amax(-1)
    huge = math.inf if dtype == torch.float64 else OVERFLOW
    outside |= broken | (numerator > 1.01 * huge)
    inside &= ~broken & (terms < 0.25 * huge)
    inside &= terms < (1 - 2.0**-16) * huge * weight.sum(-1)  # or the quotient rounds to inf
    scored = row_max > -math.inf
    return Rows(alive, scored, alive & scored & outside, alive & scored & inside, above)


def counted(run):
    """What run() returns, and how many rows it checked and recomputed."""
    before = stats()
    result = run()
    after = stats()
    checked = after.rows_checked - before.rows_checked
    return result, checked, after.rows_recomputed - before.rows_recomputed


def check_unified(op, q, k, v, phi=0.0, **arguments):
    """Run both softmaxes and compare: finiteness, tolerance, bits of recomputed rows, stats().

    Returns:
        (out, lse) of the unified one, and the prediction.
    """
    rows = predict(q, k, v, phi, **arguments)
    online, online_lse = op(q, k, v, **arguments, softmax="online", return_lse=True)
    (out, lse), checked, recomputed = counted(
        lambda: op(q, k, v, **arguments, softmax="unified", phi=phi, return_lse=True)
    )
    assert rows.scored.sum() <= checked <= rows.alive.sum(), f"{checked} rows checked"
    most = (rows.alive & ~rows.good).sum()
    assert rows.violated.sum() <= recomputed <= most, (
        f"{recomputed} rows recomputed, expected {int(rows.violated.sum())} to {int(most)}"
    )

    # By row: [batch, num_heads_q, seqlen_q, head_dim_v].
    by_row, online_by_row = out.transpose(1, 2), online.transpose(1, 2)
    kept = rows.violated | ~rows.scored
    assert_same_bits(by_row[kept], online_by_row[kept], "rows computed again")
    assert_same_bits(lse[kept], online_lse[kept], "their lse")

    given = {"return_lse": True, "dtype": torch.float64, **arguments}
    oracle, oracle_lse = reference.attention(q, k, v, **given)
    terms, _ = reference.attention(q, k, v.abs(), **given)
    # The online softmax has tests of its own. Its sums may overflow where the others do not.
    alike = kept.mT.unsqueeze(-1) | (~online.isfinite() & ~out.isfinite())
    oracle = torch.where(alike, out.double(), oracle)
    # Large scores are rounded alike on both sides.
    alike = kept | ((lse - oracle_lse).abs() <= 2 * (online_lse - oracle_lse).abs())
    assert_lse_close(lse, torch.where(alike, lse.double(), oracle_lse))
    # A score is rounded after phi is taken off, and a key far below the maximum is flushed.
    spread = largest_finite(rows.above[~kept])
    lost = k.shape[1] * FLUSHED / torch.finfo(q.dtype).eps * largest_finite(v)
    assert_close(out, oracle, online, terms=largest_finite(terms) * (1 + spread) + lost)
    return (out, lse), rows


def largest_finite(t):
    """The largest magnitude among the finite elements."""
    return t.double().abs().nan_to_num(0.0, 0.0, 0.0).max().item() if t.numel() else 0.0
