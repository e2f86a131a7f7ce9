"""`patch(model, calibration=...)`: what the unified-max softmax computes in a model."""

import copy

import pytest
import torch
from hf_calibration_helpers import counted, generate, given
from hf_models import ALL_FAMILIES, hf, make_batch, make_cache, make_model, transformers

import flashinfer_lite
from flashinfer_lite.calibrate import calibrate
from flashinfer_lite.testing import assert_close, assert_same_bits

# What is computed.


@pytest.mark.parametrize("padding", ("none", "left"))
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_tokens(device, family, padding):
    model = make_model(family, device=device)
    batch = make_batch(padding, device=device)
    expected = generate(model, batch)
    with hf.patch(model, calibration=given(model)):
        counted()
        assert torch.equal(generate(model, batch), expected)
        checked, recomputed = counted()
    heads = model.config.num_attention_heads
    tokens = batch["attention_mask"].sum() + 3 * 19
    assert checked == 2 * heads * tokens, "a row for each layer, head and token; padding has none"
    assert recomputed < checked / 4


@pytest.mark.parametrize("kind", ("dynamic", "static", "ours"))
@pytest.mark.parametrize("family", ("llama", "gemma2"))
def test_caches(device, family, kind):
    model = make_model(family, device=device)
    batch = make_batch("left", device=device)
    expected = generate(model, batch)
    with hf.patch(model, calibration=given(model)):
        counted()
        actual = generate(model, batch, past_key_values=make_cache(kind, model))
        assert counted()[0] > 0
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@torch.no_grad()
def test_logits(device, family, dtype):
    options = {"init_std" if family == "opt" else "initializer_range": 0.1}
    model = make_model(family, device=device, dtype=dtype, **options)
    oracle = copy.deepcopy(model).double()
    others = {"gemma2": hf.NAME, "gpt_oss": "eager"}
    oracle.set_attn_implementation(others.get(family, "sdpa"))
    calibration = given(model, (-3.0, -4.0))  # row maxima are near 0 here
    for batch in (make_batch("left", device=device), make_batch(seqlen=5, device=device)):
        real = batch["attention_mask"].bool()
        wanted, expected = oracle(**batch).logits[real], model(**batch).logits[real]
        with hf.patch(model, calibration=calibration, linear=False):
            counted()
            actual = model(**batch).logits[real]
            checked, recomputed = counted()
        assert recomputed < checked, "the test needs rows that the unified softmax finished"
        assert_close(actual, wanted, expected, "logits")


def test_phi_reaches_both_kernels(device, monkeypatch):
    """Each layer's own phi, in prefill and in decode; no phi, no unified softmax."""
    model = make_model("llama", device=device, num_hidden_layers=3)
    calibration = given(model, off=(1,))
    seen = []
    for name in ("attention", "decode"):
        inner = getattr(flashinfer_lite, name)

        def spy(*args, name=name, inner=inner, **kwargs):
            seen.append((name, kwargs["phi"]))
            return inner(*args, **kwargs)

        monkeypatch.setattr(flashinfer_lite, name, spy)
    with hf.patch(model, calibration=calibration):
        generate(model, make_batch(device=device), max_new_tokens=2)
    assert [name for name, _ in seen] == ["attention"] * 3 + ["decode"] * 3
    for i, (_, phi) in enumerate(seen):
        if i % 3 == 1:
            assert phi is None
            continue
        wanted = torch.tensor(calibration.phi(i % 3), device=device)
        assert_same_bits(phi, wanted, f"phi of call {i}")


@torch.no_grad()
def test_layers_without_phi_stay_online(device):
    model = make_model("llama", device=device)
    ids = make_batch(device=device)["input_ids"][:, :4]
    rows = 3 * 9 * 4  # of one layer
    for off, wanted in (((), 2 * rows), ((0,), rows), ((0, 1), 0)):
        with hf.patch(model, calibration=given(model, off=off)):
            counted()
            model(ids)
            assert counted()[0] == wanted


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_violated_rows(device, family):
    """A phi far off: every row is computed again, and nothing but the count shows it."""
    model = make_model(family, device=device)
    batch = make_batch("left", device=device)
    with hf.patch(model):
        expected = generate(model, batch, return_dict_in_generate=True, output_logits=True)
    with hf.patch(model, calibration=given(model, (500.0, -500.0))):
        counted()
        actual = generate(model, batch, return_dict_in_generate=True, output_logits=True)
        checked, recomputed = counted()
    assert checked == recomputed > 0
    assert torch.equal(actual.sequences, expected.sequences)
    for step, (mine, wanted) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert_same_bits(mine, wanted, f"logits of step {step}")


def test_huge_scores(device):
    """Scores of hundreds in one layer, by its weights: some rows leave the guard, tokens do not
    change."""
    model = make_model("llama", device=device)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(30)
    batch = make_batch("left", device=device)
    with hf.patch(model):
        expected = generate(model, batch)
    with hf.patch(model, calibration=given(model, (-3.0, -4.0))):
        counted()
        assert torch.equal(generate(model, batch), expected)
        checked, recomputed = counted()
    assert 0 < recomputed < checked


def test_layers_that_are_not_attention(device):
    """A convolution and an attention layer: the calibration has no phi for the first."""
    config = transformers.Lfm2Config(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = transformers.Lfm2ForCausalLM(config).to(device).eval()
    batch = make_batch(device=device)
    expected = generate(model, batch)
    calibration = given(model, off=(0,))
    with hf.patch(model, calibration=calibration):
        counted()
        assert torch.equal(generate(model, batch), expected)
        assert counted()[0] == 4 * (3 * 24 + 3 * 19)
    calibration.phis.reverse()
    with pytest.raises(ValueError, match="^calibration: expected an attention layer of index 0"):
        hf.patch(model, calibration=calibration)


def test_gradients(device):
    """Patched in inference mode, then trained: phi is a constant of the graph."""
    model = make_model("llama", device=device, initializer_range=0.1).train()
    batch = make_batch("right", device=device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def gradients(model):
        model.zero_grad()
        model(**batch, labels=labels, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(model)
    oracle = copy.deepcopy(model).double()
    oracle.set_attn_implementation("sdpa")
    oracle = gradients(oracle)
    with torch.inference_mode():
        handle = hf.patch(model, calibration=given(model, (-3.0, -4.0)))
    counted()
    actual = gradients(model)
    assert counted()[0] > 0
    handle.restore()
    for name in expected:
        assert_close(actual[name], oracle[name], expected[name], name)


# With the real one.


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
def test_measured(device, tmp_path, dtype):
    """calibrate, save, patch by path: few rows of the same text leave the guard."""
    model = make_model("llama", device=device, dtype=dtype, initializer_range=0.05)
    ids = make_batch(seqlen=100, device=device)["input_ids"]
    calibration = calibrate(model, [row.tolist() for row in ids], progress=False)
    assert all(calibration.phi(layer) is not None for layer in range(2))
    path = tmp_path / "calibration.json"
    with pytest.raises(FileNotFoundError, match="^calibration: expected .*calibration.json: No"):
        hf.patch(model, calibration=path)
    calibration.save(path)
    with torch.no_grad(), hf.patch(model, calibration=path):
        hf.patch(model, calibration=calibration)  # equal, hence the same patch
        counted()
        model(ids)
        checked, recomputed = counted()
    assert checked == 2 * 9 * ids.numel()
    assert recomputed <= 0.005 * checked
    if dtype == torch.float32:
        with pytest.raises(ValueError, match=r"^calibration: .*for_dtype\(torch.float16\)"):
            hf.patch(model.half(), calibration=path)
        hf.patch(model, calibration=calibration.for_dtype(torch.float16)).restore()


# Graphs.


@pytest.mark.parametrize("kind", ("dynamic", "static", "ours"))
def test_compile(device, kind):
    """No break, no graph from the fourth step on, and the unified softmax inside."""
    model = make_model("llama", device=device)
    ids = make_batch(seqlen=31, device=device)["input_ids"]
    oracle = copy.deepcopy(model).double()
    oracle.set_attn_implementation("sdpa")
    torch._dynamo.reset()
    with torch.no_grad():
        wanted, expected = oracle(ids).logits, model(ids).logits
        with hf.patch(model, calibration=given(model, off=(1,)), linear=False):
            step = torch.compile(model, backend="aot_eager", fullgraph=True)
            cache = make_cache(kind, model)
            model(ids[:, :24], past_key_values=cache)
            logits = []
            counted()
            for i in range(24, 30):
                if i == 27:
                    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                mask = torch.ones(3, i + 1, dtype=torch.int64, device=device)
                positions = torch.tensor([[i]], device=device)
                options = {"attention_mask": mask, "position_ids": positions}
                out = step(ids[:, i : i + 1], past_key_values=cache, **options)
                logits.append(out.logits)
            assert counted()[0] == 6 * 3 * 9
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert_close(torch.cat(logits, 1), wanted[:, 24:30], expected[:, 24:30], "logits")


@torch.no_grad()
def test_a_compiled_model_follows(device):
    """A calibration given, changed and taken away after the graph was made."""
    model = make_model("llama", hf.NAME, device=device, initializer_range=0.1)
    ids = make_batch(device=device)["input_ids"]
    torch._dynamo.reset()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    rows = 2 * 9 * ids.numel()
    given_phis = ((None, (0, 0)), ((-8.0, -8.0), (rows, 0)), ((500.0, 500.0), (rows, rows)))
    for values, wanted in given_phis:
        calibration = None if values is None else given(model, values)
        with hf.patch(model, linear=False, calibration=calibration):
            counted()
            step(ids, use_cache=False)
            assert counted() == wanted
    step(ids, use_cache=False)
    assert counted() == (0, 0)
