"""The Llama family on our attention against transformers' eager attention: logits and tokens."""

import pytest
import torch
from hf_models import (
    FAMILIES,
    PADDINGS,
    WINDOW,
    hf,
    make_batch,
    make_cache,
    make_model,
    position_ids,
    transformers,
    with_attention,
)

from flashinfer_lite.testing import assert_close, assert_same_bits

CACHES = ("dynamic", "static", "ours")


def oracle_of(model):
    # Not eager: it takes its softmax in float32, where its float64 mask overflows.
    return with_attention(model, "sdpa", torch.float64)


def compare_logits(ours, eager, batch, **kwargs):
    """Our logits at the real tokens against eager's, both measured in float64."""
    with torch.no_grad():
        oracle = oracle_of(eager)(**batch, **kwargs).logits
        expected, actual = eager(**batch, **kwargs).logits, ours(**batch, **kwargs).logits
    mask = batch.get("attention_mask")
    real = torch.ones_like(actual[..., 0]) if mask is None else mask
    real = real.bool()
    assert_close(actual[real], oracle[real], expected[real], "logits")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(device, family, padding):
    eager = make_model(family, device=device)
    ours = with_attention(eager, hf.NAME)
    compare_logits(ours, eager, make_batch(padding, device=device))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_mask_and_cache(device, family):
    eager = make_model(family, device=device)
    ids = make_batch(device=device)["input_ids"]
    compare_logits(with_attention(eager, hf.NAME), eager, {"input_ids": ids}, use_cache=False)


@pytest.mark.parametrize("padding", ("none", "left"))
def test_logits_under_the_flash_name(device, padding):
    eager = make_model("llama", device=device)
    ours = with_attention(eager, hf.FLASH_NAME)
    compare_logits(ours, eager, make_batch(padding, device=device))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
def test_logits_half(device, family, dtype):
    # Scores of several units make one rounding of a 16-bit logit a few per cent: milder weights.
    eager = make_model(family, device=device, dtype=dtype, initializer_range=0.1)
    ours = with_attention(eager, hf.NAME)
    compare_logits(ours, eager, make_batch("left", device=device))


def test_holes_in_the_mask(device):
    """Padding in the middle is no span [kv_start, seqlens_kv): the row itself is the mask."""
    eager = make_model("llama", device=device)
    batch = make_batch("left", device=device)
    batch["attention_mask"][0, 7:9] = 0
    compare_logits(with_attention(eager, hf.NAME), eager, batch)


def test_packed_position_ids(device):
    """Two sequences in one row, told apart by position_ids alone; eager makes a full mask of it."""
    eager = make_model("mistral", device=device)
    ids = make_batch(device=device)["input_ids"][:1]
    packed = torch.cat([torch.arange(10), torch.arange(14)])[None].to(device)
    batch = {"input_ids": ids, "position_ids": packed}
    compare_logits(with_attention(eager, hf.NAME), eager, batch, use_cache=False)


@pytest.mark.parametrize("kind", ("bool", "additive"))
def test_mask_of_the_user(device, kind):
    """A 4-D mask is complete: nothing causal is added to it."""
    eager = make_model("llama", device=device)
    ids = make_batch(device=device)["input_ids"]
    visible = torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[..., 0] = True
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    mask = (visible if kind == "bool" else additive).to(device)
    with torch.no_grad():
        expected = eager(ids, attention_mask=additive.to(device)).logits
        oracle = oracle_of(eager)(ids, attention_mask=visible.to(device)).logits
        actual = with_attention(eager, hf.NAME)(ids, attention_mask=mask).logits
    assert_close(actual, oracle, expected, "logits")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill(device, family, kind, padding):
    """Chunks through a cache, single tokens among them, against one eager pass without a cache."""
    eager = make_model(family, device=device)
    ours = with_attention(eager, hf.NAME)
    batch = make_batch(padding, device=device)
    ids, mask = batch.values()
    positions = position_ids(mask)
    cache = make_cache(kind, ours)
    logits, start = [], 0
    with torch.no_grad():
        for seqlen in (5, 1, 1, 10, 3, 1, 3):
            end = start + seqlen
            logits.append(
                ours(
                    ids[:, start:end],
                    attention_mask=None if padding == "none" else mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                ).logits
            )
            start = end
        whole = {**batch, "position_ids": positions, "use_cache": False}
        expected = eager(**whole).logits
        oracle = oracle_of(eager)(**whole).logits
    real = mask.bool()
    assert_close(torch.cat(logits, 1)[real], oracle[real], expected[real], "logits")


def generate(model, batch, **kwargs):
    options = {"max_new_tokens": 20, "do_sample": False, **kwargs}
    return model.generate(**batch, **options)


@pytest.mark.parametrize("padding", ("none", "left"))
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(device, family, kind, padding):
    eager = make_model(family, device=device)
    ours = with_attention(eager, hf.NAME)
    batch = make_batch(padding, device=device)
    actual = generate(ours, batch, past_key_values=make_cache(kind, ours))
    assert torch.equal(actual, generate(eager, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_under_inference_mode(device, family):
    eager = make_model(family, device=device)
    ours = with_attention(eager, hf.NAME)
    batch = make_batch("left", device=device)
    cache = make_cache("ours", ours)
    with torch.inference_mode():
        actual = generate(ours, batch, past_key_values=cache)
    assert torch.equal(actual, generate(eager, batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    (
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 9},
        {"prompt_lookup_num_tokens": 3},
    ),
    ids=("beams", "chunked", "prompt_lookup"),
)
@pytest.mark.parametrize("cache", (True, False), ids=("ours", "dynamic"))
def test_generate_modes(device, family, options, cache):
    eager = make_model(family, device=device)
    batch = make_batch("left", device=device)
    if "prompt_lookup_num_tokens" in options:  # transformers allows one sequence
        batch = {name: tensor[:1].repeat(1, 2) for name, tensor in batch.items()}
    expected = generate(eager, batch, **options)
    with hf.patch(eager, cache=cache) as ours:
        assert torch.equal(generate(ours, batch, **options), expected)


@pytest.mark.parametrize("family", ("llama", "mistral"))
def test_assisted_generation(device, family):
    """The assistant's cache is rolled back, past the window too: `crop` and past recording."""
    eager = make_model(family, device=device)
    helper = make_model(family, device=device, num_hidden_layers=1)
    batch = {name: tensor[:1] for name, tensor in make_batch(device=device).items()}
    expected = generate(eager, batch)
    with hf.patch(eager), hf.patch(helper):
        assert torch.equal(generate(eager, batch, assistant_model=helper), expected)


@pytest.mark.parametrize("padding", ("none", "left"))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_future_does_not_matter(device, family, padding):
    ours = make_model(family, hf.NAME, device=device)
    batch = make_batch(padding, device=device)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 21] += 1
    with torch.no_grad():
        before, after = ours(**batch).logits, ours(**changed).logits
    assert_same_bits(after[:, :21], before[:, :21], "logits before the change")
    assert (after[:, 21:] != before[:, 21:]).any(-1).all()


def test_the_window_is_exact(device):
    """One Mistral layer: a token reaches WINDOW queries, its own included, and not one more."""
    ours = make_model("mistral", hf.NAME, device=device, num_hidden_layers=1)
    batch = make_batch(device=device)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 4] += 1
    with torch.no_grad():
        differs = (ours(**batch).logits != ours(**changed).logits).any(-1)
    expected = torch.zeros(24, dtype=torch.bool, device=device)
    expected[4 : 4 + WINDOW] = True
    assert torch.equal(differs, expected.expand(3, -1))


def test_static_cache_after_reset(device):
    """A reset StaticCache counts in a tensor from the start, also for its prefill."""
    eager = make_model("llama", device=device)
    ours = with_attention(eager, hf.NAME)
    batch = make_batch("left", device=device)
    cache = transformers.StaticCache(config=ours.config, max_cache_len=64)
    generate(ours, make_batch(device=device), past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(ours, batch, past_key_values=cache), generate(eager, batch))
