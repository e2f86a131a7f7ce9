"""The attention function transformers calls in every layer, over `flashinfer_lite.attention`,
`decode` and `attention_varlen`."""

import torch

import flashinfer_lite
from flashinfer_lite.hf import packed
from flashinfer_lite.hf.calibration import phi_of
from flashinfer_lite.hf.masks import is_numbered, span_of

# Every keyword a model may pass is in exactly one of these three lists; any other one is an error.
APPLIED = packed.NAMES | {
    *("scaling", "dropout", "sliding_window", "softcap", "is_causal", "position_bias", "s_aux"),
}
INERT = frozenset(
    {
        "cache_position",
        "deterministic",
        "encoder_hidden_states",  # cross attention: key and value were made from them
        "logits_indices",
        "logits_processor_args",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",  # applied by the rotary embedding; packing has become a mask
        "return_dict",
        "use_cache",
    }
)
_SPARSE = "sparse attention by index is not supported"
REFUSED = {
    "seq_idx": "say where sequences begin by cu_seq_lens_q and cu_seq_lens_k, or by position_ids",
    "indices": _SPARSE,
    "block_indices": _SPARSE,
    "output_attentions": "fused kernels never hold the weights; use attn_implementation='eager'",
}

# Up to this many queries a step without gradients goes to the split-KV decode kernel.
DECODE_MAX_SEQLEN_Q = 8


def attention_forward(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function for `transformers.AttentionInterface`. Key and value are read in place.

    Args:
        module: the attention layer; its `is_causal` is read where the keyword is None, and the phi
            of a calibration that `patch` was given.
        query: [batch, num_heads_q, seqlen_q, head_dim], any strides but the last.
        key: [batch, num_heads_kv, seqlen_kv, head_dim].
        value: [batch, num_heads_kv, seqlen_kv, head_dim_v].
        attention_mask: None; or a bool row [batch, 1, 1, length] that says which keys exist (those
            past `length` do not), on top of which causal and window apply; or the row of
            sequence numbers that `key_mask` makes of packed sequences, likewise; or any other
            4-D mask, bool or additive, which is complete: causal and window are taken to be in it.
            For one query a bool row is complete too, unless `key_mask` made it.
        scaling: softmax scale, None for head_dim ** -0.5.
        dropout: 0; dropout has not landed.
        sliding_window: a query sees the last `sliding_window` keys, its own included (in both
            directions if not causal).
        softcap: None, or finite and positive.
        is_causal: bottom-right aligned; None reads `module.is_causal`, True if there is none.
        position_bias: additive and unscaled, broadcastable to
            [batch, num_heads_q, seqlen_q, seqlen_kv]; its gradient is computed.
        s_aux: the attention sinks of GPT-OSS, [num_heads_q]: `flashinfer_lite.attention`'s sink;
            its gradient is computed.
        **kwargs: cu_seq_lens_q and cu_seq_lens_k, int32 or int64 [sequences + 1], say where packed
            sequences begin; max_length_q and max_length_k bound them. cache and what comes with it
            (block_table, read_index, write_index) is continuous batching's. Names in INERT are
            ignored, names in REFUSED raise. None means not given.

    Returns:
        (out, None) with out [batch, seqlen_q, num_heads_q, head_dim_v], contiguous.

    Raises:
        NotImplementedError: an argument in REFUSED, or dropout > 0.
        TypeError: an argument in none of the lists, or a mask that is not a tensor.
        ValueError: a mask that is not 4-D, and whatever `flashinfer_lite.attention` refuses.

    Example:
        >>> model.set_attn_implementation("fi_lite")  # this function, with its mask function
    """
    sequences, key, value = packed.take(module, query, key, value, attention_mask, kwargs)
    qkv, options = op_arguments(
        module,
        query,
        key,
        value,
        attention_mask if sequences is None else None,
        scaling=scaling,
        dropout=dropout,
        sliding_window=sliding_window,
        softcap=softcap,
        is_causal=is_causal,
        position_bias=position_bias,
        **kwargs,
    )
    options |= {"sink": s_aux, "phi": phi_of(module, query.device)}
    if sequences is not None:
        return sequences.attend(*qkv, **options), None
    decoding = query.shape[2] <= DECODE_MAX_SEQLEN_Q and not torch.is_grad_enabled()
    op = flashinfer_lite.decode if decoding else flashinfer_lite.attention
    return op(*qkv, **options), None


def op_arguments(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    position_bias=None,
    **kwargs,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict]:
    """(q, k, v) and the options `flashinfer_lite.attention` is called with for these arguments of
    `attention_forward`, phi and sink aside; calibration computes its scores from the same."""
    _check_kwargs(kwargs)
    if dropout:
        raise NotImplementedError(f"dropout: has not landed, expected 0, got {dropout}")
    seqlen_q, seqlen_kv = query.shape[2], key.shape[2]
    # A single query is the newest token and sees every key, whatever is_causal says.
    causal = seqlen_q > 1 and bool(
        getattr(module, "is_causal", True) if is_causal is None else is_causal
    )
    window = (-1, -1)
    if sliding_window is not None:
        left = sliding_window - 1
        window = (left, -1 if causal or seqlen_q == 1 else left)
    length, visible = _visible_keys(attention_mask, seqlen_q, seqlen_kv, causal, window)
    if length < seqlen_kv:
        key, value = key[:, :, :length], value[:, :, :length]
    if position_bias is not None:
        visible["mask"] = _add_bias(position_bias[..., :length], visible.get("mask"))
    qkv = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return qkv, {"softmax_scale": scaling, "softcap": softcap, **visible}


def _check_kwargs(kwargs: dict) -> None:
    for name, given in kwargs.items():
        if given is None or name in INERT:
            continue
        if name in packed.NAMES:
            raise NotImplementedError(f"{name}: calibration takes padded batches alone")
        if name not in REFUSED:
            raise TypeError(
                f"{name}: unknown argument of the attention function; if it cannot change the "
                "output add it to flashinfer_lite.hf.INERT, otherwise to APPLIED or to REFUSED"
            )
        if given is not False:
            raise NotImplementedError(f"{name}: {REFUSED[name]}")


def _visible_keys(
    mask, seqlen_q: int, seqlen_kv: int, causal: bool, window: tuple[int, int]
) -> tuple[int, dict]:
    """How many key slots to hand over, and the arguments of `attention` that say who sees which."""
    plain = {"causal": causal, "window": window}
    if mask is None:
        return seqlen_kv, plain
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask: expected a tensor or None, got {type(mask).__name__}")
    if mask.dim() != 4:
        raise ValueError(f"attention_mask: expected 4 dimensions, got shape {tuple(mask.shape)}")
    if is_numbered(mask):
        return seqlen_kv, {**plain, "mask": mask == mask.mT}
    span = span_of(mask)
    is_row = mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[2] == 1
    complete = seqlen_q == 1 if span is None else span.complete
    if complete or not is_row:
        if span is not None and span.contiguous:
            return seqlen_kv, {"kv_start": span.kv_start, "seqlens_kv": span.seqlens_kv}
        return seqlen_kv, {"mask": mask}

    length = mask.shape[3]
    if span is None or not span.contiguous:
        return length, {**plain, "mask": mask}
    if span.seqlens_kv is None:
        return length, {**plain, "kv_start": span.kv_start}
    # Padding on the right. Bottom-right and windows would be anchored at the last token, whereas
    # query i sits in slot length - seqlen_q + i: usable only where that is slot i, or nothing is.
    ends = {"kv_start": span.kv_start, "seqlens_kv": span.seqlens_kv}
    if causal and seqlen_q == length:
        return length, {"causal": "top_left", "window": window, **ends}
    if not causal and window == (-1, -1):
        return length, ends
    return length, {**plain, "mask": mask}


def _add_bias(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
