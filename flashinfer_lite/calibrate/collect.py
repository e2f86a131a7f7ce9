"""Runs a transformers model with an attention function that looks at its scores."""

import contextlib
import contextvars

import torch

from flashinfer_lite import _check
from flashinfer_lite.attention import attention
from flashinfer_lite.calibrate.histogram import Histogram

# transformers branches on the substrings flash, sdpa, flex and eager of a name.
NAME = "fi_lite_calibrate"
CHUNK = 1 << 18  # scores held at a time, all heads together: what a CPU core's cache holds
_active: contextvars.ContextVar["Collector"] = contextvars.ContextVar("active collector")


class Collector:
    """Distributions by layer_idx: `layers[index]` is (Histogram of scores, of row maxima).

    Attention calls of modules without a layer_idx are counted in `unnumbered` and not measured:
    nothing could look up their phi.
    """

    def __init__(self):
        self.layers: dict[int, tuple[Histogram, Histogram]] = {}
        self.unnumbered = 0

    def record(self, layer_idx: int | None, q, k, options: dict) -> None:
        """Count the scores of one call of `flashinfer_lite.attention`."""
        if layer_idx is None:
            self.unnumbered += 1
            return
        num_heads = q.shape[2]
        if layer_idx not in self.layers:
            self.layers[layer_idx] = Histogram(num_heads), Histogram(num_heads)
        scores, row_max = self.layers[layer_idx]
        if scores.num_heads != num_heads:
            raise ValueError(
                f"model: layer_idx {layer_idx} belongs to attention of {scores.num_heads} and of "
                f"{num_heads} heads; a calibration has one entry for both"
            )
        for found, visible in score_chunks(q, k, **options):
            scores.add(found, visible)
            largest = found.masked_fill(~visible, -torch.inf).amax(-1)
            row_max.add(largest, visible.any(-1))


def score_chunks(
    q,
    k,
    *,
    softmax_scale=None,
    softcap=None,
    causal=False,
    window=(-1, -1),
    mask=None,
    kv_start=None,
    seqlens_kv=None,
):
    """Scores as softmax sees them, some query rows at a time; the arguments are `attention`'s.

    Yields (scores, visible): float32 (float64 of float64) and bool, [batch, num_heads_q, rows,
    keys] and broadcastable to it. Keys that no row of the chunk can see are left out where that is
    cheap to know.
    """
    batch_size, seqlen_q, num_heads_q, head_dim = q.shape
    seqlen_kv, num_heads_kv = k.shape[1:3]
    if not (batch_size and seqlen_q and seqlen_kv and num_heads_kv):
        return
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    keys = k.permute(0, 2, 3, 1).to(dtype)  # [batch, num_heads_kv, head_dim, seqlen_kv]
    if mask is not None:
        mask = mask.broadcast_to(batch_size, num_heads_q, seqlen_q, seqlen_kv)
    rows = max(1, CHUNK // (batch_size * num_heads_q * seqlen_kv))
    for first in range(0, seqlen_q, rows):
        last = min(first + rows, seqlen_q)
        visible, begin, end = _visible(
            first, last, seqlen_q, seqlen_kv, causal, window, kv_start, seqlens_kv, q.device
        )
        if begin >= end:
            continue
        # The query heads of a KV head lie together: their rows make one product with its keys.
        queries = q[:, first:last].transpose(1, 2).to(dtype)
        queries = queries.reshape(batch_size, num_heads_kv, -1, head_dim)
        with torch.autocast(q.device.type, enabled=False):
            scores = (queries @ keys[..., begin:end]).mul_(scale)
        scores = scores.view(batch_size, num_heads_q, last - first, end - begin)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            part = mask[:, :, first:last, begin:end]
            if part.dtype == torch.bool:
                visible = visible & part
            else:
                scores = scores + part
                visible = visible & (part != -torch.inf)
        yield scores, visible


def _visible(
    first, last, seqlen_q, seqlen_kv, causal, window, kv_start, seqlens_kv, device
) -> tuple[torch.Tensor, int, int]:
    """What rows [first, last) see of the keys [begin, end): (bool [batch or 1, 1, rows, keys],
    begin, end). `reference.visible_keys` has the rule."""
    begin, end = 0, seqlen_kv
    length = seqlen_kv if seqlens_kv is None else seqlens_kv.view(-1, 1, 1, 1)
    diagonal = 0 if causal == "top_left" else length - seqlen_q
    left, right = window
    if causal:
        right = 0
    if not torch.is_tensor(diagonal):
        if right >= 0:
            end = min(end, max(0, last + diagonal + right))
        if left >= 0:
            begin = max(begin, first + diagonal - left)
    key = torch.arange(begin, max(begin, end), device=device)
    pos = torch.arange(first, last, device=device).view(1, 1, -1, 1) + diagonal
    visible = (key < length) & torch.ones_like(pos, dtype=torch.bool)
    if kv_start is not None:
        visible = visible & (key >= kv_start.view(-1, 1, 1, 1))
    if left >= 0:
        visible = visible & (key >= pos - left)
    if right >= 0:
        visible = visible & (key <= pos + right)
    return visible, begin, end


def _attention_forward(module, query, key, value, attention_mask, s_aux=None, **kwargs):
    """The attention function under NAME: looks at the scores, then computes the online softmax."""
    from flashinfer_lite.hf.attention import op_arguments

    collector = _active.get(None)
    if collector is None:
        raise RuntimeError(
            f"attn_implementation={NAME!r} works in flashinfer_lite.calibrate only; "
            "use 'fi_lite' to run a model"
        )
    qkv, options = op_arguments(module, query, key, value, attention_mask, **kwargs)
    q, k, v = _check.under_autocast(*qkv)
    collector.record(getattr(module, "layer_idx", None), q, k, options)
    return attention(q, k, v, sink=s_aux, **options), None


@contextlib.contextmanager
def evaluating(model):
    """Eval mode, no gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def collecting(model):
    """Make a transformers model report to the Collector that this yields, in `evaluating`; on
    leaving, also by an error, the model is as it was."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from flashinfer_lite.hf import key_mask
    from flashinfer_lite.hf.patching import _configs

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, key_mask)
    configs = _configs(model)
    names = [config._attn_implementation_internal for config in configs]
    collector = Collector()
    token = _active.set(collector)
    try:
        model.set_attn_implementation(NAME)
        if not any(config._attn_implementation == NAME for config in configs):
            raise ValueError(
                f"model: {type(model).__name__} does not use transformers' attention interface, "
                "its scores cannot be seen"
            )
        with evaluating(model):
            yield collector
    finally:
        _active.reset(token)
        for config, name in zip(configs, names, strict=True):
            # The property would push the name down into the sub-configs, which had their own.
            config._attn_implementation_internal = name
