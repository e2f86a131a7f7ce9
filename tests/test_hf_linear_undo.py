"""Linear layers under `patch`: how it is undone, copied, and lives with others' hooks."""

import copy
import io
import pickle

import pytest
import torch
from hf_linear_helpers import QuantisedLinear, classes, generate, only_linear, watch_flat_linear
from hf_models import hf, make_batch, make_model, transformers

from flashinfer_lite.testing import assert_close, assert_same_bits


@pytest.fixture
def flat_calls(monkeypatch):
    return watch_flat_linear(monkeypatch)


def test_restore_is_exact(device):
    model = make_model("llama", device=device)
    model.lm_head.extra = "kept"
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    ids = make_batch(device=device)["input_ids"][:, :3]
    with torch.no_grad():
        expected = model(ids).logits
        handle = hf.patch(model)
        assert classes(model) == {hf.FlatLinear: 15}
        model(ids)
        for _ in range(2):
            handle.restore()
            assert {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()} == before
        assert_same_bits(model(ids).logits, expected, "logits")


def test_restore_leaves_other_changes_alone():
    model = make_model("llama")
    with only_linear(model):
        model.lm_head.__class__ = QuantisedLinear
        model.model.layers[0].mlp.up_proj = torch.nn.Linear(144, 96)
    assert classes(model) == {torch.nn.Linear: 14, QuantisedLinear: 1}


def test_second_patch():
    model = make_model("llama")
    handle = hf.patch(model)
    hf.patch(model, linear=True)  # None means True
    with pytest.raises(ValueError, match="already patched.*'linear': True.*'linear': False"):
        hf.patch(model, linear=False)
    assert classes(model) == {hf.FlatLinear: 15}
    handle.restore()
    assert classes(model) == {torch.nn.Linear: 15}
    with hf.patch(model, linear=False):
        assert classes(model) == {torch.nn.Linear: 15}


@pytest.mark.parametrize("outer_first", (True, False))
def test_shared_layers(outer_first):
    """A model and its inner model: whoever comes second is refused and changes nothing."""
    model = make_model("llama")
    first, second = (model, model.model) if outer_first else (model.model, model)
    handle = only_linear(first)
    patched = classes(model)
    for linear in (None, True):
        with pytest.raises(ValueError, match="shares linear layers"):
            hf.patch(second, attention=False, cache=False, linear=linear)
    assert classes(model) == patched
    # What is not shared may be patched beside it, and undone in any order.
    other = hf.patch(second, linear=False)
    handle.restore()
    assert classes(model) == {torch.nn.Linear: 15}
    assert second.config._attn_implementation == hf.NAME
    other.restore()
    assert second.config._attn_implementation == "eager"
    with only_linear(second):
        pass


def test_nested_contexts():
    model, helper = make_model("llama"), make_model("llama", num_hidden_layers=1)
    with hf.patch(model):
        with hf.patch(helper):
            assert classes(helper) == {hf.FlatLinear: 8}
        assert classes(helper) == {torch.nn.Linear: 8}
        assert classes(model) == {hf.FlatLinear: 15}
    assert classes(model) == {torch.nn.Linear: 15}


def test_failure_changes_nothing(monkeypatch):
    """What fails after the linear layers undoes them."""
    model = make_model("llama")
    monkeypatch.delattr(transformers.GenerationMixin, "_prepare_cache_for_generation")
    with pytest.raises(NotImplementedError, match="^cache: "):
        hf.patch(model)
    assert classes(model) == {torch.nn.Linear: 15}


# Copies.


def _torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _torch_save),
    ids=("deepcopy", "pickle", "torch.save"),
)
def test_copies(device, flat_calls, duplicate):
    model = make_model("llama", device=device)
    batch = make_batch("left", device=device)
    expected = generate(model, batch)
    handle = hf.patch(model)
    other = duplicate(model)
    handle.restore()
    assert classes(other) == {hf.FlatLinear: 15} and classes(model) == {torch.nn.Linear: 15}
    assert torch.equal(generate(other, batch), expected) and flat_calls
    hf.patch(other).restore()
    assert classes(other) == {torch.nn.Linear: 15}
    assert torch.equal(generate(other, batch), expected)


def test_a_copied_part_stays_as_it_is():
    """The inner model of a patched model, copied: it has no patch that could be undone."""
    model = make_model("llama")
    with hf.patch(model):
        part = copy.deepcopy(model.model)
    assert classes(part) == {hf.FlatLinear: 14}
    with only_linear(part):
        pass
    assert classes(part) == {hf.FlatLinear: 14}


def test_save_and_load(device, tmp_path, flat_calls):
    model = make_model("llama", device=device)
    batch = make_batch(device=device)
    expected = generate(model, batch)
    with hf.patch(model):
        model.save_pretrained(tmp_path)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(device)
    assert classes(loaded) == {torch.nn.Linear: 15}
    assert torch.equal(generate(loaded, batch), expected) and not flat_calls
    with hf.patch(loaded):
        loaded.load_state_dict(state)
        assert torch.equal(generate(loaded, batch), expected) and flat_calls


# Hooks of others.


@torch.no_grad()
def test_forward_hooks(device):
    model = make_model("llama", device=device)
    ids = make_batch(device=device)["input_ids"][:, :2]
    seen = []
    hook = model.lm_head.register_forward_hook(lambda *args: seen.append(type(args[0])))
    with hf.patch(model):
        model(ids)
    model(ids)
    hook.remove()
    assert seen == [hf.FlatLinear, torch.nn.Linear]


class _Hook:
    """Doubles what a layer returns: made into an accelerate hook below."""

    def post_forward(self, module, output):
        return output * 2


@pytest.mark.parametrize("hooked_first", (True, False))
@torch.no_grad()
def test_accelerate_hooks(device, flat_calls, hooked_first):
    """They keep the forward they found: ours runs below a hook that came later, and only while the
    patch is on."""
    hooks = pytest.importorskip("accelerate.hooks")
    hook = type("Hook", (_Hook, hooks.ModelHook), {})()
    model = make_model("llama", device=device)
    ids = make_batch(device=device)["input_ids"][:, :2]
    expected = model(ids).logits * 2
    oracle = copy.deepcopy(model).double()(ids).logits * 2
    if hooked_first:
        hooks.add_hook_to_module(model.lm_head, hook)
    handle = only_linear(model)
    if not hooked_first:
        hooks.add_hook_to_module(model.lm_head, hook)
    assert_close(model(ids).logits, oracle, expected, "logits under both")
    assert len(flat_calls) == (14 if hooked_first else 15)
    handle.restore()
    flat_calls.clear()
    assert_same_bits(model(ids).logits, expected, "logits under the hook")
    hooks.remove_hook_from_module(model.lm_head)
    assert_same_bits(model(ids).logits * 2, expected, "logits without the hook")
    assert not flat_calls
