"""The attention sink: one more score for each query head, with no value, folded in behind an op.

    lse' = log(exp(lse) + exp(sink)),  out' = out exp(lse - lse') = out sigmoid(lse - sink)

It needs nothing of the kernels but out and lse, so it is counted once however the keys were split,
and autograd through lse gives every gradient.
"""

import torch


def fold(out, lse, sink, wants_lse=True):
    """(out', lse') for out [batch, seqlen_q, num_heads_q, head_dim_v], lse [batch, num_heads_q,
    seqlen_q] and sink [num_heads_q]; lse' is None where it is not wanted. Rounded once, to out's
    dtype."""
    # A sink of -inf is none. With the least finite number in its place no -inf meets another.
    score = sink.to(lse.dtype).clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)
    # A row without a key is 0 already, and must not make a gradient of whatever reaches it.
    share = torch.sigmoid(lse - score).masked_fill(lse == -torch.inf, 1.0)
    scaled = (out * share.transpose(1, 2).unsqueeze(-1)).to(out.dtype)
    if not wants_lse:
        return scaled, None
    no_sink = (sink == -torch.inf).unsqueeze(-1)
    return scaled, torch.where(no_sink, lse, torch.logaddexp(lse, score))
