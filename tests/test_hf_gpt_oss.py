"""GPT-OSS, whose attention has a learned sink per head, against transformers' eager attention."""

import pytest
import torch
from hf_models import PADDINGS, hf, make_batch, make_cache, make_model, with_attention

from flashinfer_lite.calibrate.collect import collecting
from flashinfer_lite.testing import assert_close, assert_same_bits


def make_eager(device, dtype=torch.float32, **overrides):
    """A GPT-OSS whose sinks take from a tenth to nearly all of a row."""
    model = make_model("gpt_oss", device=device, dtype=dtype, **overrides)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.copy_(torch.tensor([0.5, 2.0, 4.0, 6.0]))
    return model


def oracle_of(model):
    # GPT-OSS has no "sdpa", and its eager attention takes the softmax in the scores' own dtype.
    return with_attention(model, "eager", torch.float64)


def generate(model, batch, **kwargs):
    return model.generate(**batch, max_new_tokens=20, do_sample=False, **kwargs)


@pytest.mark.parametrize("padding", PADDINGS)
def test_logits(device, padding):
    eager = make_eager(device)
    ours, batch = with_attention(eager, hf.NAME), make_batch(padding, device=device)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        oracle, expected, actual = (m(**batch).logits for m in (oracle_of(eager), eager, ours))
        assert_close(actual[real], oracle[real], expected[real], "logits")
        for layer in ours.model.layers:
            layer.self_attn.sinks.data.fill_(-torch.inf)
        without = ours(**batch).logits
    assert (without - actual)[real].abs().max() > 0.1  # the sinks matter


def test_logits_half(device):
    # Milder weights, as for the Llama family; the experts' choice of each token stays the same.
    eager = make_eager(device, torch.bfloat16, initializer_range=0.1)
    ours, batch = with_attention(eager, hf.NAME), make_batch("left", device=device)
    assert ours.model.layers[0].self_attn.sinks.dtype == torch.bfloat16
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        oracle, expected, actual = (m(**batch).logits for m in (oracle_of(eager), eager, ours))
    assert_close(actual[real], oracle[real], expected[real], "logits")


@pytest.mark.parametrize("padding", ("none", "left"))
@pytest.mark.parametrize("kind", ("dynamic", "static", "ours"))
def test_greedy_tokens(device, kind, padding):
    """Prefill and 20 steps of decode, across the window."""
    eager = make_eager(device)
    ours, batch = with_attention(eager, hf.NAME), make_batch(padding, device=device)
    actual = generate(ours, batch, past_key_values=make_cache(kind, ours))
    assert torch.equal(actual, generate(eager, batch))


def test_calibration_sees_the_model_with_its_sinks(device):
    """What the layers behind the first are given, and so their scores, depends on them."""
    ours = make_eager(device)
    ours.set_attn_implementation(hf.NAME)
    batch = make_batch("left", device=device)
    with torch.no_grad():
        expected = ours(**batch).logits
    with collecting(ours) as collector:
        assert_same_bits(ours(**batch).logits, expected)
    assert sorted(collector.layers) == [0, 1]


def test_patch(device):
    eager = make_eager(device)
    batch = make_batch("left", device=device)
    expected = generate(eager, batch)
    with hf.patch(eager) as ours:
        assert torch.equal(generate(ours, batch), expected)


@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients(device, padding):
    eager = make_eager(device, initializer_range=0.1)
    batch = make_batch(padding, device=device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def gradients(model):
        model(**batch, labels=labels, use_cache=False).loss.backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    ours = with_attention(eager, hf.NAME)
    oracle, expected, actual = (gradients(m) for m in (oracle_of(eager), eager, ours))
    assert actual.keys() == oracle.keys()
    assert sum("sinks" in name for name in actual) == 2
    for name in actual:
        assert_close(actual[name], oracle[name], expected[name], name, gradient=True)


def test_compiled_training_step(device):
    torch._dynamo.reset()
    ours = make_eager(device, initializer_range=0.1)
    ours.set_attn_implementation(hf.NAME)
    sinks = ours.model.layers[0].self_attn.sinks
    attend = ours.model.layers[0].self_attn

    def loss(x, cos, sin):
        return attend(x, (cos, sin), None)[0].square().sum()

    x = torch.randn(2, 9, 64, device=device)
    cos, sin = ours.model.rotary_emb(x, torch.arange(9, device=device)[None])
    step = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(step(x, cos, sin), sinks)[0]
    assert_close(got, torch.autograd.grad(loss(x, cos, sin), sinks)[0].double(), got, "dsinks")
    torch._dynamo.reset()
