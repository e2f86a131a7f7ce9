"""What the mutants have to get past with a unified maximum: see mutant_cases.py.

A case knows which heads are recomputed: those have the bits of the online softmax. Every row with a
key is counted once, and the tickets are left at 0.
"""

import functools
import math

import torch
from mutant_cases import Attention, _lengths

from flashinfer_lite.testing import assert_same_bits

HIGH = 44.0  # the guard's upper bound in bfloat16; the lower one is 0


class Unified(Attention):
    """One case; `recomputed` is a mask that broadcasts to [batch, seqlen_q, num_heads_q]."""

    def __init__(self, kernel, name, *shapes, phi, recomputed=False, kv_splits=1, **arguments):
        super().__init__(kernel, name, *shapes, **arguments)
        self.phi = torch.tensor(phi) if isinstance(phi, list) else phi
        self.recomputed = torch.as_tensor(recomputed)
        if kernel == "decode":
            self.bound = {"kv_splits": kv_splits}

    def _run(self, options, **arguments):
        executor = self._executor(options)
        op = executor.attention if self.kernel == "attention_fwd" else executor.decode
        tensors = op(
            self.q, self.k, self.v, return_lse=True, **self.arguments, **self.bound, **arguments
        )
        counts = torch.tensor([executor.rows_checked, executor.rows_recomputed])
        tickets = getattr(executor, "tickets", None)
        return (*tensors, counts, torch.zeros(1) if tickets is None else tickets), executor.reports

    def _call(self, options):
        again = {"launches": 2} if self.kernel == "decode" else {}
        tensors, reports = self._run(options, phi=self.phi, **again)
        online, more = self._run(options)
        return (*tensors, *online[:2]), [*reports, *more]

    def _check(self, tensors):
        out, lse, counts, tickets, online_out, online_lse = tensors
        super()._check((out, lse))
        rows = lse.transpose(1, 2) != -math.inf
        bad = self.recomputed.expand(rows.shape) & rows
        launches = 2 if self.kernel == "decode" else 1
        assert counts.tolist() == [launches * int(rows.sum()), launches * int(bad.sum())]
        assert not tickets.any()
        assert_same_bits(out[bad], online_out[bad])
        assert_same_bits(lse.transpose(1, 2)[bad], online_lse.transpose(1, 2)[bad], "lse")
        if self.v.any() and not bad.all():  # P is rounded on another base
            assert not torch.equal(out[~bad & rows], online_out[~bad & rows])


def _bounds(case):
    """Scores of one key, odd and in a block of its own, are 1, all others 1/2; those of queries 8
    to 15 of each 16 are 0."""
    case.q, case.k = torch.zeros_like(case.q), torch.zeros_like(case.k)
    case.k[..., 0] = 0.5
    case.k[:, 71, :, 0] = 1.0
    late = torch.arange(case.q.shape[1]) // 8 % 2 == 1
    case.q[:, ~late, :, 0] = 1.0


def _far_below_zero(case):
    case.q, case.k = 6 * case.q.abs(), -6 * case.k.abs()


def _nan_scores(case):
    case.q[:, 1, 0] = math.nan


def _scaled(factor):
    def change(case):
        case.v *= factor

    return change


def _one_huge_column(case):
    case.v[..., 5] *= 1e33


def cases_of(kernel, seqlen_q, kv_splits):
    """The same for each kernel; more rows than a thread block takes."""
    make = functools.partial(Unified, kernel, kv_splits=kv_splits)
    label = f"unified, {kv_splits} splits: " if kernel == "decode" else "unified: "
    by_head = torch.tensor([False, True, False, False])
    late = (torch.arange(seqlen_q) // 8 % 2 == 1)[None, :, None]
    at_bounds = [1 - HIGH - 0.1, 1.1 - HIGH, 0.9, 1.1]
    beyond = torch.tensor([True, False, False, True])
    # Where the maximum is 0 and not 1, what was 0.1 above the lower bound is 0.9 below it.
    beyond = torch.where(late, torch.tensor([False, False, True, True]), beyond)
    nan_row = torch.zeros(1, seqlen_q, 4, dtype=torch.bool)
    nan_row[0, 1, 0] = True
    lengths = {"seqlens_kv": _lengths(130, 5, 0), "kv_start": _lengths(3, 0, 0)}
    heads = (seqlen_q, 4)
    return [
        make(
            label + "one head is far", heads, (201, 2), causal=True,
            phi=[-5.0, 90.0, -5.0, -6.0], recomputed=by_head,
        ),
        make(label + "all far", heads, (201, 2), causal=True, phi=200.0, recomputed=True),
        make(
            label + "lengths", heads, (130, 2), batch_size=3, causal=True, **lengths,
            phi=[-5.0, math.nan, -5.0, -6.0], recomputed=by_head,
        ),
        make(label + "bounds", heads, (90, 4), softmax_scale=1.0, phi=at_bounds, recomputed=beyond)
        .edit(_bounds),
        make(label + "deep", heads, (90, 1), phi=0.5, recomputed=True).edit(_far_below_zero),
        make(label + "tiny", heads, (90, 1), phi=[-5.0, 25.0, -5.0, -5.0], recomputed=by_head)
        .edit(_scaled(1e-30)),
        make(label + "huge", heads, (90, 1), phi=[-5.0, -26.0, -5.0, -5.0], recomputed=by_head)
        .edit(_one_huge_column),
        make(label + "NaN", heads, (90, 2), phi=-5.0, recomputed=nan_row).edit(_nan_scores),
        make(
            label + "group of 3", (seqlen_q, 6), (90, 2), phi=[-5.0, 90.0, -5.0, -5.0, -5.0, -5.0],
            recomputed=torch.arange(6) == 1,
        ),
        make(label + "zero", heads, (90, 1), phi=-5.0).edit(_scaled(0.0)),
    ]  # fmt: skip


def unified_cases():
    found = [*cases_of("attention_fwd", 70, 1), *cases_of("decode", 9, 1)]
    found += [*cases_of("decode", 9, 3), *cases_of("decode", 2, 40)[:3]]
    return [case.case() for case in found]
