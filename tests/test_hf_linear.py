"""One linear layer under `patch`, and models: what goes to flat_linear, and what stays."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from hf_linear_helpers import QuantisedLinear, classes, generate, only_linear, watch_flat_linear
from hf_models import ALL_FAMILIES, hf, make_batch, make_cache, make_model, transformers

import flashinfer_lite
from flashinfer_lite.dataflow import choose
from flashinfer_lite.hf import linear as hf_linear
from flashinfer_lite.testing import assert_close, assert_same_bits

ROWS = hf_linear.ROWS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def flat_calls(monkeypatch):
    return watch_flat_linear(monkeypatch)


def make_layer(device, dtype=torch.float32, bias=True, in_features=24, out_features=40):
    layer = torch.nn.Linear(in_features, out_features, bias, device, dtype)
    hf_linear.swap(layer)
    return layer


# One layer.


@pytest.mark.parametrize("shape", ((24,), (1, 1, 24), (3, 2, 24), (ROWS, 24), (0, 24)), ids=str)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_few_rows_go_to_flat_linear(device, flat_calls, dtype, bias, shape):
    layer = make_layer(device, dtype, bias)
    x = torch.randn(shape, device=device, dtype=dtype)
    out = layer(x)
    weights = [None if w is None else w.double() for w in (layer.weight, layer.bias)]
    if device.type == "cpu" or dtype != torch.float32:
        assert flat_calls == [(shape, (40, 24), bias)]
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert out.dtype == dtype and out.shape == (*shape[:-1], 40)
    assert_close(out, torch.nn.functional.linear(x.double(), *weights), expected, "out")


def _strided(x):
    return x.repeat_interleave(3, -1)[..., ::3]


@pytest.mark.parametrize(
    "change",
    (
        {"rows": ROWS + 1},
        {"grad": True},
        {"dtype": torch.float64},
        {"view": _strided},
        {"device": "meta"},
    ),
    ids=("rows", "grad", "float64", "strided", "meta"),
)
def test_everything_else_stays(device, flat_calls, change):
    rows, dtype = change.get("rows", 2), change.get("dtype", torch.float32)
    device = change.get("device", device)
    layer = make_layer(device, dtype)
    x = change.get("view", lambda x: x)(torch.randn(rows, 24, device=device, dtype=dtype))
    with torch.set_grad_enabled(change.get("grad", False)):
        out = layer(x)
    assert not flat_calls and out.requires_grad == change.get("grad", False)
    if device != "meta":
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert_same_bits(out, expected, "out")


@torch.no_grad()
def test_autocast_keeps_its_cached_casts(device, flat_calls):
    """fp32 weights under autocast: nn.Linear casts each weight once, flat_linear at every call."""
    layer, plain = make_layer(device), torch.nn.Linear(24, 40, device=device)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 24, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        for given in (x, x.bfloat16()):
            assert_same_bits(layer(given), plain(given), "out")
    layer.half(), plain.half()  # bfloat16 comes out all the same
    with torch.autocast(device.type, torch.bfloat16):
        assert_same_bits(layer(x.half()), plain(x.half()), "out")
    assert not flat_calls


@pytest.mark.parametrize("name", ("weight", "bias"))
@torch.no_grad()
def test_parameters_of_another_kind(device, flat_calls, name):
    """Pruned layers compute their weight or bias: it is no parameter any more."""
    layer, plain = make_layer(device), torch.nn.Linear(24, 40, device=device)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 24, device=device)
    for pruned in (layer, plain):
        torch.nn.utils.prune.l1_unstructured(pruned, name, amount=0.5)
    assert_same_bits(layer(x), plain(x), "out")
    torch.nn.utils.prune.remove(layer, name)
    assert not flat_calls
    layer(x)
    assert len(flat_calls) == 1


@torch.no_grad()
def test_keyword_of_the_base_class(device):
    layer = make_layer(device)
    x = torch.randn(2, 24, device=device)
    assert_same_bits(layer(input=x), layer(x), "out")


@torch.no_grad()
def test_the_base_class_reports_wrong_sizes(device):
    with pytest.raises((RuntimeError, ValueError)):
        make_layer(device)(torch.randn(2, 23, device=device))


class TensorSubclass(torch.Tensor):
    """Stands for torchao's weights and DTensor: nn.Linear, but its weight is no plain parameter."""


def test_what_is_swappable():
    plain = torch.nn.Linear(24, 40)
    assert hf_linear.swappable(plain)
    assert not hf_linear.swappable(QuantisedLinear(24, 40))
    assert not hf_linear.swappable(torch.nn.Embedding(24, 40))
    subclass = torch.nn.Linear(24, 40)
    weight = torch.randn(40, 24).as_subclass(TensorSubclass)
    subclass.weight = torch.nn.Parameter(weight)
    assert type(subclass.weight) is TensorSubclass and not hf_linear.swappable(subclass)
    transposed = torch.nn.Linear(24, 40)
    transposed.weight = torch.nn.Parameter(torch.randn(24, 40).t())
    assert not hf_linear.swappable(transposed)
    hooked = torch.nn.Linear(24, 40)
    hooked.forward = hooked.forward
    assert not hf_linear.swappable(hooked)
    hf_linear.swap(plain)
    assert not hf_linear.swappable(plain)


# Models.


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_tokens(device, flat_calls, family):
    model = make_model(family, device=device)
    for batch in (make_batch("left", device=device), make_batch(device=device)):
        expected = generate(model, batch)
        assert not flat_calls
        with hf.patch(model):
            assert torch.equal(generate(model, batch), expected)
        # 72 rows of prefill are nn.Linear's, but for the head, which gets the last of each.
        swapped = sum(classes(model).values())
        assert len(flat_calls) == 1 + 19 * swapped
        flat_calls.clear()


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
def test_decode_logits_half(device, flat_calls, family, dtype):
    """16-bit tokens may tie: the logits of one step, each error measured in float64."""
    options = {"init_std" if family == "opt" else "initializer_range": 0.1}
    model = make_model(family, device=device, dtype=dtype, **options)
    oracle = copy.deepcopy(model).double()
    ids = make_batch(seqlen=7, device=device)["input_ids"]
    with torch.no_grad():
        wanted, expected = oracle(ids).logits, model(ids).logits
        with only_linear(model):
            actual = model(ids).logits
    assert len(flat_calls) == classes(model)[torch.nn.Linear]
    assert_close(actual, wanted, expected, "logits")


@pytest.mark.parametrize("kind", ("dynamic", "static", "ours"))
@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2"))
def test_caches(device, flat_calls, family, kind):
    model = make_model(family, device=device)
    batch = make_batch("left", device=device)
    expected = generate(model, batch)
    with hf.patch(model):
        actual = generate(model, batch, past_key_values=make_cache(kind, model))
    assert torch.equal(actual, expected) and flat_calls


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_kernels_ran(device, family):
    """The native counter: each linear layer of a step is a call of ours, or the vendor's."""
    model = make_model(family, device=device, dtype=torch.bfloat16)
    ids = make_batch(device=device)["input_ids"][:, :1]
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    ours = sum(choose(device.type, torch.bfloat16, n, k, 3) != "vendor" for n, k in shapes)
    assert ours, "the test needs a shape that is not the vendor's"
    calls = []
    for linear in (False, True):
        with torch.no_grad(), hf.patch(model, linear=linear):
            flashinfer_lite.stats(reset=True)
            model(ids, use_cache=False)
            calls.append(flashinfer_lite.stats(reset=True).calls)
    assert calls[1] - calls[0] == ours


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_weights_are_untouched(family):
    model = make_model(family)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    handle = hf.patch(model)
    for _ in range(2):
        state = model.state_dict()
        assert {name: tensor.data_ptr() for name, tensor in state.items()} == before
        assert [id(parameter) for parameter in model.parameters()] == parameters
        assert list(state) == list(before)
        now = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == now
        handle.restore()


def test_tied_head():
    model = make_model("llama", tie_word_embeddings=True)
    batch = make_batch()
    expected = generate(model, batch)
    with hf.patch(model):
        assert type(model.lm_head) is hf.FlatLinear
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(generate(model, batch), expected)


def test_conv1d_is_left_alone():
    model = make_model("gpt2")
    with hf.patch(model):
        assert type(model.transformer.h[0].attn.c_attn) is transformers.pytorch_utils.Conv1D
        assert type(model.lm_head) is hf.FlatLinear
        assert classes(model) == {hf.FlatLinear: 1}


def test_nothing_to_swap():
    model = make_model("gpt2").transformer
    attributes = set(model.__dict__)
    with pytest.raises(ValueError, match="^linear: .*GPT2Model.*Conv1D"):
        hf.patch(model, linear=True)
    assert set(model.__dict__) == attributes and model.config._attn_implementation == "eager"
    with hf.patch(model):  # not asked for by name
        pass


def test_subclasses_are_left_alone():
    model = make_model("llama")
    quantised = QuantisedLinear(144, 96, bias=False)
    model.model.layers[0].mlp.up_proj = quantised
    with hf.patch(model):
        assert type(quantised) is QuantisedLinear
        assert classes(model) == {hf.FlatLinear: 14, QuantisedLinear: 1}
    assert classes(model) == {torch.nn.Linear: 14, QuantisedLinear: 1}


def test_training_is_as_before(device):
    model = make_model("llama", device=device).train()
    batch = make_batch("right", device=device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with only_linear(model):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.optim.SGD(model.parameters(), 0.0).step()
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter.grad, expected[name], name)


def test_weights_that_change_in_place_are_seen(device):
    """No packed copy of a weight may be kept: an optimiser step between two tokens counts."""
    model = make_model("llama", device=device)
    ids = make_batch(device=device)["input_ids"][:, :2]
    with torch.no_grad(), only_linear(model):
        before = model(ids).logits
        model.lm_head.weight.mul_(2)
        assert_close(model(ids).logits, before.double() * 2, before * 2, "logits")


# Graphs.


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("kind", ("dynamic", "static", "ours"))
def test_compile(device, kind, dtype):
    """Token after token through a cache: no break, and no graph from the fourth step on."""
    model = make_model("llama", device=device, dtype=dtype, num_hidden_layers=1)
    oracle = copy.deepcopy(model).double()
    ids = make_batch(seqlen=31, device=device)["input_ids"]
    with torch.no_grad():
        wanted, expected = oracle(ids).logits, model(ids).logits
        with hf.patch(model):
            step = compiled(model)
            cache = make_cache(kind, model)
            model(ids[:, :24], past_key_values=cache)
            logits = []
            for i in range(24, 30):
                if i == 27:
                    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                positions = torch.tensor([[i]], device=device)
                mask = torch.ones(3, i + 1, dtype=torch.int64, device=device)
                out = step(
                    ids[:, i : i + 1],
                    position_ids=positions,
                    attention_mask=mask,
                    past_key_values=cache,
                )
                logits.append(out.logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert_close(torch.cat(logits, 1), wanted[:, 24:30], expected[:, 24:30], "logits")


@pytest.mark.parametrize("family", ("llama", "qwen2", "gpt2", "gemma2"))
def test_compiled_generate(device, family):
    """transformers' own compiled loop over a static cache, made to be one graph."""
    model = make_model(family, device=device)
    batch = make_batch("left", device=device)
    expected = generate(model, batch, max_new_tokens=6)
    options = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    graphs = []
    for linear in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with hf.patch(model, linear=linear):
            actual = generate(
                model,
                batch,
                max_new_tokens=6,
                cache_implementation="static",
                compile_config=options,
            )
        assert torch.equal(actual, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_restore_reaches_a_compiled_model(device):
    """The class is part of a graph's guards: a compiled model follows patch and restore."""
    model = make_model("llama", device=device)
    ids = make_batch(device=device)["input_ids"][:, :2]
    step = compiled(model)
    with torch.no_grad():
        expected = step(ids, use_cache=False).logits
        with only_linear(model):
            flashinfer_lite.stats(reset=True)
            step(ids, use_cache=False)
            assert flashinfer_lite.stats(reset=True).calls > 0
        actual = step(ids, use_cache=False).logits
        assert flashinfer_lite.stats(reset=True).calls == 0
    assert_same_bits(actual, expected, "logits")
