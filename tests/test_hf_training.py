"""Training through our attention: gradients of eager's, checkpointing, Trainer, torch.compile."""

import pytest
import torch
from hf_models import (
    FAMILIES,
    PADDINGS,
    hf,
    make_batch,
    make_cache,
    make_model,
    transformers,
    with_attention,
)

from flashinfer_lite.testing import assert_close, assert_same_bits

# transformers renames "gradient" checkpointing to "activation" checkpointing; both work.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def gradients(model, batch, **kwargs):
    """The gradient of the loss over real tokens, by parameter name."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.zero_grad()
    model(**batch, labels=labels, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(device, family, padding):
    # With weights of 0.3 single gradients reach 1e3: rounding there would drown what is compared.
    eager = make_model(family, device=device, initializer_range=0.1)
    batch = make_batch(padding, device=device)
    oracle = gradients(with_attention(eager, "sdpa", torch.float64), batch, use_cache=False)
    expected = gradients(eager, batch, use_cache=False)
    actual = gradients(with_attention(eager, hf.NAME), batch, use_cache=False)
    for name in expected:
        assert_close(actual[name], oracle[name], expected[name], name)


@pytest.mark.parametrize("family", ("llama", "mistral"))
def test_gradients_through_our_cache(device, family):
    """use_cache=True is the default in training too: no in-place write may break the graph."""
    ours = make_model(family, hf.NAME, device=device)
    batch = make_batch("left", device=device)
    expected = gradients(ours, batch, use_cache=False)
    cache = make_cache("ours", ours)
    actual = gradients(ours, batch, past_key_values=cache)
    for name in expected:
        assert_same_bits(actual[name], expected[name], name)
    with torch.no_grad():  # and it serves inference afterwards
        ids, mask = make_batch(seqlen=30, device=device).values()
        logits = ours(ids[:, 24:], attention_mask=mask, past_key_values=cache).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", ("llama", "mistral"))
@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(device, family, reentrant):
    ours = make_model(family, hf.NAME, device=device).train()
    batch = make_batch("left", device=device)
    expected = gradients(ours, batch, use_cache=False)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = gradients(ours, batch, use_cache=False)
    for name in expected:
        assert_same_bits(actual[name], expected[name], name)


def test_autocast(device):
    """q and k leave Qwen3's norms in float32, v is bfloat16: attention casts as torch's does."""
    ours = make_model("qwen3", hf.NAME, device=device)
    sdpa = with_attention(ours, "sdpa")
    batch = make_batch("left", device=device)
    real = batch["attention_mask"].bool()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        actual, expected = ours(**batch).logits, sdpa(**batch).logits
    with torch.no_grad():
        oracle = sdpa.double()(**batch).logits
    assert actual.dtype == expected.dtype
    assert_close(actual[real], oracle[real], expected[real], "logits")


@pytest.mark.parametrize("name", (hf.NAME, hf.FLASH_NAME))
def test_trainer_step(device, tmp_path, name):
    pytest.importorskip("accelerate")
    model = make_model("llama", name, device=device)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ids, mask = make_batch("right").values()
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": i.masked_fill(m == 0, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        gradient_checkpointing=True,
        learning_rate=0.1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
    )
    result = transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert result.global_step == 1 and result.training_loss > 0
    changed = [key for key, tensor in model.state_dict().items() if (tensor != before[key]).any()]
    assert any("k_proj" in key for key in changed) and any("q_proj" in key for key in changed)


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    ("family", "padding"),
    [("llama", "none"), ("mistral", "none"), *((family, "left") for family in FAMILIES)],
)
def test_compile(device, family, padding):
    ours = make_model(family, hf.NAME, device=device)
    batch = make_batch(padding, device=device)
    if padding == "none":
        del batch["attention_mask"]
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with torch.no_grad():
        eager = with_attention(ours, "eager")(**batch).logits
        oracle = with_attention(ours, "sdpa", torch.float64)(**batch).logits
        actual = compiled(ours)(**batch).logits
    assert_close(actual[real], oracle[real], eager[real], "logits")


@pytest.mark.parametrize("kind", ("dynamic", "static", "ours"))
def test_compile_decode(device, kind):
    """One token after another through a cache, one graph: no recompilation from Python state."""
    ours = make_model("llama", hf.NAME, device=device, num_hidden_layers=1)
    # One token more than is used: a slice that is the whole mask has other strides, a new graph.
    ids, mask = make_batch("left", seqlen=31, device=device).values()
    step = compiled(ours)
    with torch.no_grad():
        expected = with_attention(ours, "eager")(ids, attention_mask=mask).logits
        oracle = with_attention(ours, "sdpa", torch.float64)(ids, attention_mask=mask).logits
        cache = make_cache(kind, ours)
        positions = torch.arange(31, device=device)[None]
        ours(ids[:, :24], attention_mask=mask[:, :24], past_key_values=cache)
        for i in range(24, 30):
            inputs = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
            if i == 27:  # two shapes have been seen: what follows must be the dynamic graph again
                frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            logits = step(ids[:, i : i + 1], past_key_values=cache, **inputs).logits
            assert_close(logits[:, 0], oracle[:, i], expected[:, i], f"logits of token {i}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


def test_compile_training(device):
    ours = make_model("mistral", hf.NAME, device=device, initializer_range=0.1)
    batch = make_batch("right", device=device)
    oracle = gradients(with_attention(ours, "sdpa", torch.float64), batch, use_cache=False)
    expected = gradients(with_attention(ours, "eager"), batch, use_cache=False)
    ours.zero_grad()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    compiled(ours)(**batch, labels=labels, use_cache=False).loss.backward()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, oracle[name], expected[name], name)
