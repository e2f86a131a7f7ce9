"""`patch(model, calibration=...)`: where phi lives, how it goes, and what is refused."""

import copy
import pickle

import pytest
import torch
from hf_calibration_helpers import attributes, counted, given
from hf_models import hf, make_batch, make_model

from flashinfer_lite.calibrate import GUARDS
from flashinfer_lite.hf import calibration as hf_calibration
from flashinfer_lite.testing import assert_same_bits

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
        ({"guard": GUARDS[torch.float16]}, r"\(0.0, 44.0\) of torch.float32.*\(0.0, 10.4\)"),
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
