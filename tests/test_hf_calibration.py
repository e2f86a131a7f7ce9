"""`patch(model, calibration=...)`: the unified-max softmax in a model, and what is refused."""

import copy
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from hf_models import ALL_FAMILIES, hf, make_batch, make_cache, make_model, transformers

import flashinfer_lite
from flashinfer_lite.calibrate import GUARDS, calibrate
from flashinfer_lite.hf import calibration as hf_calibration
from flashinfer_lite.testing import assert_close, assert_same_bits


@dataclass
class Given:
    """The part of a Calibration that `patch` reads, with phi at will."""

    phis: list
    num_heads_q: int
    guard: tuple = GUARDS[torch.float32]
    num_layers: int = field(init=False)

    def __post_init__(self):
        self.num_layers = len(self.phis)

    def phi(self, layer_idx):
        return self.phis[layer_idx]


def given(model, values=None, off=()):
    """phi of all layers: another one for each head, or `values` of each layer."""
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    phis = [torch.linspace(-2, 3, heads).add(layer).tolist() for layer in range(layers)]
    if values is not None:
        phis = [[value] * heads for value in values]
    return Given([None if i in off else p for i, p in enumerate(phis)], heads, GUARDS[model.dtype])


def counted():
    """(rows_checked, rows_recomputed) since the last call."""
    stats = flashinfer_lite.stats(reset=True)
    return stats.rows_checked, stats.rows_recomputed


def generate(model, batch, **kwargs):
    return model.generate(**batch, **{"max_new_tokens": 20, "do_sample": False, **kwargs})


def attributes(model):
    return {name: set(module.__dict__) for name, module in model.named_modules()}


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
    oracle.set_attn_implementation("sdpa" if family != "gemma2" else hf.NAME)
    # Row maxima are near 0 here; float16 has its guard above phi.
    calibration = given(model, (-3.0, -4.0) if dtype == torch.float16 else (0.0, 1.0))
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
    with hf.patch(model, calibration=given(model, (0.0, 0.0))):
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


@pytest.mark.gradients
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
        handle = hf.patch(model, calibration=given(model, (0.0, 0.0)))
    counted()
    actual = gradients(model)
    assert counted()[0] > 0
    handle.restore()
    for name in expected:
        assert_close(actual[name], oracle[name], expected[name], name)


# Where phi lives.


def test_state_dict_is_untouched():
    model = make_model("llama")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    buffers = [name for name, _ in model.named_buffers()]
    with hf.patch(model, calibration=given(model)):
        assert {n: t.data_ptr() for n, t in model.state_dict().items()} == before
        assert [name for name, _ in model.named_buffers()] == buffers


@torch.no_grad()
def test_phi_is_not_cast_but_moved(device):
    model = make_model("llama", device=device)
    calibration = given(model)
    with hf.patch(model, calibration=calibration):
        attention = model.model.layers[0].self_attn
        model.bfloat16()
        phi = hf_calibration.phi_of(attention, device)
        assert phi.dtype == torch.float32 and phi.device.type == device.type
        assert_same_bits(phi, torch.tensor(calibration.phi(0), device=device), "phi")
        model(make_batch(device=device)["input_ids"])
        # The device of the query decides, and what was moved stays there.
        elsewhere = torch.device("meta")
        moved = hf_calibration.phi_of(attention, elsewhere)
        assert moved.device == elsewhere and moved is hf_calibration.phi_of(attention, elsewhere)


def test_meta_weights():
    """A model without memory yet: phi is ready on the CPU."""
    with torch.device("meta"):
        model = make_model("llama", device="meta")
    with hf.patch(model, calibration=given(model)):
        phi = hf_calibration.phi_of(model.model.layers[0].self_attn, torch.device("cpu"))
        assert phi.device.type == "cpu"


@pytest.mark.parametrize(
    "duplicate",
    (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))),
    ids=("deepcopy", "pickle"),
)
@torch.no_grad()
def test_copies(device, duplicate):
    model = make_model("llama", device=device)
    before = attributes(model)
    ids = make_batch(device=device)["input_ids"]
    handle = hf.patch(model, calibration=given(model))
    other = duplicate(model)
    handle.restore()
    for patched, wanted in ((model, 0), (other, 2 * 9 * 72)):
        counted()
        patched(ids)
        assert counted()[0] == wanted
    hf.patch(other, calibration=given(other)).restore()  # the same one: a handle on its patch
    other(ids)
    assert counted()[0] == 0 and attributes(other) == attributes(model) == before


@torch.no_grad()
def test_restore(device):
    model = make_model("llama", device=device)
    before = attributes(model)
    ids = make_batch(device=device)["input_ids"]
    expected = model(ids).logits
    with pytest.raises(ZeroDivisionError), hf.patch(model, calibration=given(model)):
        assert attributes(model) != before
        raise ZeroDivisionError
    assert attributes(model) == before
    counted()
    assert_same_bits(model(ids).logits, expected, "logits")
    with hf.patch(model):
        model(ids)
    assert counted()[0] == 0


# What is refused.


def test_another_calibration():
    model = make_model("llama")
    handle = hf.patch(model, calibration=given(model))
    hf.patch(model, calibration=given(model))
    with pytest.raises(ValueError, match="another calibration"):
        hf.patch(model, calibration=given(model, off=(0,)))
    with pytest.raises(ValueError, match="already patched"):
        hf.patch(model)
    handle.restore()
    hf.patch(model, calibration=given(model, off=(0,))).restore()


@pytest.mark.parametrize(
    ("change", "text"),
    (
        ({"num_layers": 3}, "expected one of 2 layers for LlamaForCausalLM, got one of 3"),
        ({"num_heads_q": 4}, "expected one of 9 query heads for LlamaForCausalLM, got one of 4"),
        ({"guard": GUARDS[torch.float16]}, r"\(-30.0, 30.0\) of torch.float32.*\(0.0, 10.4\)"),
        ({"phis": [None, [0.0] * 8]}, r"index 1 and 8 query heads, got \['LlamaAttention'\]"),
    ),
    ids=("layers", "heads", "guard", "values"),
)
def test_a_calibration_of_another_model(change, text):
    model = make_model("llama")
    before = attributes(model)
    calibration = given(model)
    if change == {"num_layers": 3}:
        calibration.phis.append(None)
    for name, value in change.items():
        setattr(calibration, name, value)
    with pytest.raises(ValueError, match=f"^calibration: .*{text}"):
        hf.patch(model, calibration=calibration)
    assert attributes(model) == before and model.config._attn_implementation == "eager"


def test_arguments_that_do_not_go_together():
    model = make_model("llama")
    with pytest.raises(ValueError, match="^calibration: .*attention=False"):
        hf.patch(model, attention=False, calibration=given(model))
    with pytest.raises(TypeError, match="^calibration: .*Calibration.*dict"):
        hf.patch(model, calibration={})
    with pytest.raises(FileNotFoundError):
        hf.patch(model, calibration="no/such/file.json")
    assert model.config._attn_implementation == "eager"


def test_shared_attention_layers():
    """Two models of two configurations, with the same layers."""
    model, other = make_model("llama"), make_model("llama")
    other.model.layers = model.model.layers
    handle = hf.patch(model, linear=False, calibration=given(model))
    with pytest.raises(ValueError, match="shares attention layers"):
        hf.patch(other, linear=False, calibration=given(other))
    assert other.config._attn_implementation == "eager"
    handle.restore()
    hf.patch(other, calibration=given(other)).restore()


# With the real one.


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
def test_measured(device, tmp_path, dtype):
    """calibrate, save, patch by path: few rows of the same text leave the guard."""
    model = make_model("llama", device=device, dtype=dtype, initializer_range=0.05)
    ids = make_batch(seqlen=100, device=device)["input_ids"]
    calibration = calibrate(model, [row.tolist() for row in ids], progress=False)
    assert all(calibration.phi(layer) is not None for layer in range(2))
    path = tmp_path / "calibration.json"
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
    for values, wanted in ((None, (0, 0)), ((0.0, 0.0), (rows, 0)), ((500.0, 500.0), (rows, rows))):
        calibration = None if values is None else given(model, values)
        with hf.patch(model, linear=False, calibration=calibration):
            counted()
            step(ids, use_cache=False)
            assert counted() == wanted
    step(ids, use_cache=False)
    assert counted() == (0, 0)
