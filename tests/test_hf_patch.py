"""Names, keyword lists, and `patch`: what is switched, what is refused, and how it is undone."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from hf_models import FAMILIES, hf, make_batch, make_model, transformers

from flashinfer_lite.hf import registration
from flashinfer_lite.testing import assert_same_bits


def implementations(model):
    return [
        module.config._attn_implementation
        for module in model.modules()
        if isinstance(module, transformers.PreTrainedModel)
    ]


def caches_made(model, **kwargs):
    """The class of the cache that `generate` makes."""
    ids = make_batch()["input_ids"][:1]
    out = model.generate(
        ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, **kwargs
    )
    return type(out.past_key_values)


def test_names():
    for part in ("flash", "sdpa", "flex", "eager"):
        assert part not in hf.NAME, "transformers branches on it"
    assert "flash" in hf.FLASH_NAME, "continuous batching asks for it"
    for name in (hf.NAME, hf.FLASH_NAME, hf.BATCHING_NAME):
        assert transformers.AttentionInterface()[name] is hf.attention_forward
        assert transformers.AttentionMaskInterface()[name] is hf.key_mask


def test_registering_again_changes_nothing():
    loader = registration.flash_utils._lazy_imports
    hf.register()
    assert registration.flash_utils._lazy_imports is loader


def test_the_hook_leaves_other_names_alone():
    with pytest.raises((ImportError, ValueError)):
        registration.flash_utils._lazy_imports("no_such_flash_attention")


def test_flash_name_without_the_private_loader(monkeypatch):
    """A transformers that has changed: the name with "flash" says which one to use instead."""
    monkeypatch.delattr(registration.flash_utils, "_lazy_imports")
    try:
        hf.register()
        for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
            for name in (hf.FLASH_NAME, hf.BATCHING_NAME):
                with pytest.raises(RuntimeError, match=hf.NAME):
                    interface()[name]()
        assert transformers.AttentionInterface()[hf.NAME] is hf.attention_forward
    finally:
        monkeypatch.undo()
        hf.register()


def test_from_config_by_name():
    config = make_model("llama").config
    for name in (hf.NAME, hf.FLASH_NAME, hf.BATCHING_NAME):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
        assert set(implementations(model)) == {name}


def forward(device="cpu", mask=None, **kwargs):
    query, key = torch.randn(1, 4, 3, 16, device=device), torch.randn(1, 2, 3, 16, device=device)
    return hf.attention_forward(torch.nn.Module(), query, key, key, mask, **kwargs)


def test_the_lists_are_disjoint():
    lists = (hf.APPLIED, hf.INERT, set(hf.REFUSED))
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_inert_arguments(device):
    out, weights = forward(device, **dict.fromkeys(hf.INERT, object()))
    assert weights is None and out.shape == (1, 3, 4, 16) and out.is_contiguous()


@pytest.mark.parametrize("name", sorted(hf.REFUSED))
def test_refused_arguments(device, name):
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        forward(device, **{name: torch.ones(4)})
    forward(device, **{name: None})


def test_unknown_argument(device):
    with pytest.raises(TypeError, match="^brand_new: .*INERT"):
        forward(device, brand_new=1)


def test_dropout_is_refused(device):
    with pytest.raises(NotImplementedError, match="^dropout: .*0.1"):
        forward(device, dropout=0.1)


@pytest.mark.parametrize(
    ("mask", "error"),
    (([1], TypeError), (torch.ones(1, 3, dtype=torch.bool), ValueError)),
    ids=("list", "2-d"),
)
def test_bad_masks(mask, error):
    with pytest.raises(error, match="^attention_mask: "):
        forward(mask=mask)


def test_output_attentions_is_refused():
    model = make_model("llama", hf.NAME)
    with pytest.raises(NotImplementedError, match="^output_attentions: "):
        model(make_batch()["input_ids"], output_attentions=True)
    model(make_batch()["input_ids"], output_attentions=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_and_restore(family, device):
    model = make_model(family, device=device)
    batch = make_batch("left", device=device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(model.__dict__)
    with torch.no_grad():
        expected = model(**batch).logits
        handle = hf.patch(model)
        assert set(implementations(model)) == {hf.NAME} and "active" in repr(handle)
        assert caches_made(model) is hf.Cache
        assert type(model) is type(make_model(family))
        patched = model(**batch).logits
        for _ in range(2):  # the second one is harmless
            handle.restore()
            assert set(implementations(model)) == {"eager"} and "restored" in repr(handle)
            assert_same_bits(model(**batch).logits, expected, "logits")
    assert (patched != expected).any(), "the patch changed nothing"
    assert set(model.__dict__) == attributes
    assert caches_made(model) is transformers.DynamicCache
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)


def test_context_manager_restores_after_an_error():
    model = make_model("llama")
    with pytest.raises(ZeroDivisionError), hf.patch(model) as patched:
        assert patched is model
        raise ZeroDivisionError
    assert set(implementations(model)) == {"eager"}


def test_restores_the_name_it_found():
    model = make_model("llama", hf.FLASH_NAME)
    hf.patch(model).restore()
    assert set(implementations(model)) == {hf.FLASH_NAME}


def test_patching_twice():
    model = make_model("llama")
    hf.patch(model)
    handle = hf.patch(model)  # the same patch: it must not remember our name as the old one
    with pytest.raises(ValueError, match="already patched"):
        hf.patch(model, cache=False)
    with pytest.raises(ValueError, match="shares its configuration"):
        hf.patch(model.model)
    assert set(implementations(model)) == {hf.NAME}
    handle.restore()
    assert set(implementations(model)) == {"eager"}
    with hf.patch(model, cache=False):
        assert caches_made(model) is transformers.DynamicCache


def test_the_handle_keeps_the_model_but_the_model_makes_no_cycle():
    with hf.patch(make_model("llama")) as model:
        assert isinstance(model, transformers.PreTrainedModel)
    hf.patch(model)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None, "a patched model must be freed as soon as an unpatched one"
    finally:
        gc.enable()


def test_only_the_cache():
    model = make_model("llama")
    with hf.patch(model, attention=False, linear=False):
        assert set(implementations(model)) == {"eager"}
        assert type(model.lm_head) is torch.nn.Linear
        assert caches_made(model) is hf.Cache
    assert caches_made(model) is transformers.DynamicCache


def test_a_cache_of_the_user_stays():
    with hf.patch(make_model("llama")) as model:
        theirs = transformers.DynamicCache(config=model.config)
        assert caches_made(model, past_key_values=theirs) is transformers.DynamicCache
        assert caches_made(model, cache_implementation="static") is transformers.StaticCache


@pytest.mark.parametrize(
    "duplicate",
    (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))),
    ids=("deepcopy", "pickle"),
)
def test_copies(duplicate):
    """A copy of a patched model is patched, and is restored by itself."""
    model = make_model("llama")
    ids = make_batch()["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        handle = hf.patch(model)
        other = duplicate(model)
        assert set(implementations(other)) == {hf.NAME} and caches_made(other) is hf.Cache
        handle.restore()
        assert set(implementations(other)) == {hf.NAME} and caches_made(other) is hf.Cache
        hf.patch(other).restore()
        assert set(implementations(other)) == {"eager"}
        assert caches_made(other) is transformers.DynamicCache
        assert_same_bits(other(ids).logits, expected, "logits of the copy")


def test_a_model_without_generate():
    model = make_model("llama").model
    ids = make_batch()["input_ids"]
    with torch.no_grad(), hf.patch(model):
        assert model(ids).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("name", ("Falcon", "Bloom"))
def test_a_model_outside_the_interface_is_refused(name):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, n_layer=1
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    attributes = set(model.__dict__)
    with pytest.raises(ValueError, match=f"{name}ForCausalLM does not use"):
        hf.patch(model)
    assert set(implementations(model)) == {"eager"} and set(model.__dict__) == attributes
    with hf.patch(model, attention=False):  # the rest of it can be had
        assert type(model.lm_head) is hf.FlatLinear


def test_not_a_model():
    with pytest.raises(TypeError, match="^model: .*Linear"):
        hf.patch(torch.nn.Linear(2, 2))


def test_what_is_no_bool_is_refused():
    model = make_model("llama")
    for name, wrong in (("linear", "yes"), ("attention", None), ("cache", 1)):
        with pytest.raises(TypeError, match=f"^{name}: expected a bool, got {wrong!r}"):
            hf.patch(model, **{name: wrong})


def test_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import flashinfer_lite.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'needs transformers: pip install "flashinfer-lite[hf]"' in done.stderr.splitlines()[-1]
