"""The attention sink: one more score for each query head, with no value, folded in behind an op.

    lse' = log(exp(lse) + exp(sink)),  out' = out exp(lse - lse')

It needs nothing of the kernels but out and lse, so it is counted once however the keys were split,
and autograd through lse gives every gradient.
"""

import torch

from flashinfer_lite import _ops


def fold(out, lse, sink, wants_lse=True, rows=None):
    """(out', lse') for out [batch, seqlen_q, num_heads_q, head_dim_v], lse [batch, num_heads_q,
    seqlen_q] and sink [num_heads_q]; out' is rounded to out's dtype, lse' None if not wanted.
    `rows`: bool [seqlen_q], the rows that have a sink at all; None is every one."""
    score = sink.to(lse.dtype).unsqueeze(-1).expand_as(lse)
    if rows is not None:
        score = torch.where(rows, score, -torch.inf)
    # exp(lse - lse') by merging a state that holds 1 with one that holds 0. Our own op, because the
    # bits of torch's exp on a CPU depend on where in a tensor a number stands; it knows -inf, but
    # inf - inf is NaN.
    states = torch.stack([lse, score.clamp(max=torch.finfo(lse.dtype).max)])
    values = lse.new_zeros(2, 1, 1, 1, 1)
    values[:1].fill_(1.0)
    share, merged = _ops.merge_states(values.expand(2, *out.shape[:3], 1), states)
    # A row without a key is 0 already, and must not make a gradient of whatever reaches it.
    empty = (lse == -torch.inf).transpose(1, 2).unsqueeze(-1)
    scaled = (out * share.masked_fill(empty, 1.0)).to(out.dtype)
    return scaled, torch.where(score == torch.inf, score, merged) if wants_lse else None
