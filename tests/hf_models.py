"""Tiny transformers models with random weights, shared by the test_hf files."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

import flashinfer_lite.hf as hf  # noqa: E402

VOCAB = 61
WINDOW = 7
# Head counts of the real models (SmolLM2 9/3, Qwen2 14/2), heads narrower. The standard deviation
# of 0.3 spreads the attention scores over several units: the usual 0.02 would hide a wrong scale.
_COMMON = {
    "vocab_size": VOCAB,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_CONFIGS = {
    "llama": ("Llama", {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "mistral": (
        "Mistral",
        {
            "hidden_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": WINDOW,
        },
    ),
    # One layer full, one with a window.
    "qwen2": (
        "Qwen2",
        {
            "hidden_size": 112,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    # Heads wider than hidden_size / num_attention_heads.
    "qwen3": (
        "Qwen3",
        {
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
        },
    ),
    # What the Llama family has not: Conv1D in place of torch.nn.Linear, ...
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, **_NO_DROPOUT}),
    # ... a soft cap, ...
    "gemma2": (
        "Gemma2",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 20.0,
            "tie_word_embeddings": False,  # tied, it repeats its last token
        },
    ),
    # ... biases and a scaling of 1.0 with scaled queries, ...
    "opt": (
        "OPT",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 96,
            "num_attention_heads": 4,
            "init_std": 0.3,
            "dropout": 0.0,
        },
    ),
    # ... attention sinks, and a window on every other layer, ...
    "gpt_oss": (
        "GptOss",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",  # the default one has no float64
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    # ... one projection for q, k and v.
    "gpt_neox": (
        "GPTNeoX",
        {"hidden_size": 64, "num_attention_heads": 4, "hidden_dropout": 0.0},
    ),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ALL_FAMILIES = tuple(_CONFIGS)
PADDINGS = ("none", "left", "right")


def make_model(family, attention="eager", device="cpu", dtype=torch.float32, **overrides):
    """A causal language model in eval mode; the same weights for every attention and dtype."""
    name, options = _CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **options, **overrides})
    config._attn_implementation = attention
    torch.manual_seed(1)
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    return model.to(device, dtype).eval()


def with_attention(model, attention, dtype=None):
    """A copy of `model` that uses another attention, and perhaps another dtype."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    return other if dtype is None else other.to(dtype)


def make_batch(padding="none", seqlen=24, device="cpu"):
    """input_ids and attention_mask [3, seqlen]; one sequence has no padding, one is short."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, VOCAB, (3, seqlen), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        for row, pad in ((1, 5), (2, seqlen - 4)):
            hidden = slice(None, pad) if padding == "left" else slice(seqlen - pad, None)
            mask[row, hidden] = 0
        ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def position_ids(attention_mask):
    """What `generate` derives from a mask: tokens are counted, padding is not."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def make_cache(kind, model, capacity=64):
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=capacity)
    return {"dynamic": transformers.DynamicCache, "ours": hf.Cache}[kind](config=model.config)
