"""flashinfer_lite.hf.Cache does what transformers' DynamicCache does, without copying the past."""

import copy
import pickle

import pytest
import torch
from hf_models import hf, make_model, transformers

from flashinfer_lite.testing import assert_same_bits

WINDOW = 5


def make_caches(window=None):
    """A DynamicCache and ours, of one layer."""
    options = {"sliding_window": window} if window else {}
    config = transformers.MistralConfig(num_hidden_layers=1, **options)
    if not window:
        config.sliding_window = None
    return transformers.DynamicCache(config=config), hf.Cache(config=config)


def make_tokens(seqlen, batch_size=2, device="cpu", dtype=torch.float32):
    """k [batch, 3, seqlen, 16] and v [batch, 3, seqlen, 8], as a model makes them (transposed)."""
    return tuple(
        torch.randn(batch_size, seqlen, 3, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for head_dim in (16, 8)
    )


def assert_equal_step(theirs, ours, tokens):
    """Both caches agree on what they hand out, on what they store and on the mask's size."""
    seqlen = tokens[0].shape[2]
    assert ours.get_mask_sizes(seqlen, 0) == theirs.get_mask_sizes(seqlen, 0)
    for name, mine, wanted in zip(
        "kv", ours.update(*tokens, 0), theirs.update(*tokens, 0), strict=True
    ):
        assert_same_bits(mine, wanted, name)
        assert mine.stride(-1) == 1
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert_same_bits(ours.layers[0].keys, theirs.layers[0].keys, "stored keys")
    assert_same_bits(ours.layers[0].values, theirs.layers[0].values, "stored values")


OPERATIONS = {
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(2),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reset": lambda cache: cache.reset(),
    "offload": lambda cache: (cache.layers[0].offload(), cache.layers[0].prefetch()),
    "crop": lambda cache: cache.crop(-2),
    "crop nothing": lambda cache: cache.crop(0),
}


@pytest.mark.parametrize("window", (None, WINDOW), ids=("full", "window"))
@pytest.mark.parametrize("operation", OPERATIONS)
@torch.no_grad()
def test_operations(device, operation, window):
    theirs, ours = make_caches(window)
    if operation.startswith("crop"):
        for cache in (theirs, ours):
            cache.activate_past_recording()
    for round_ in range(3):
        for seqlen in (3, 1, 1, 9, 1):
            batch_size = theirs.layers[0].keys.shape[0] if theirs.get_seq_length() else 2
            assert_equal_step(theirs, ours, make_tokens(seqlen, batch_size, device))
        if operation == "reorder_cache" and round_ < 2:  # twice in a row, as beam search does
            OPERATIONS[operation](theirs), OPERATIONS[operation](ours)
        if operation != "batch_select_indices" or round_ == 0:
            OPERATIONS[operation](theirs), OPERATIONS[operation](ours)
        if operation == "reset":
            assert ours.get_seq_length() == 0


@pytest.mark.parametrize("window", (None, 300, 400), ids=("full", "300", "400"))
@torch.no_grad()
def test_growth(device, window):
    """Through several doublings, and past the window: the past is intact at every step."""
    theirs, ours = make_caches(window)
    addresses = set()
    # 200 gives a buffer that is less than twice as long as the window of 400.
    for seqlen in (200, *[1] * 280, 40, 300, *[37] * 30, 700, *[1] * 20):
        assert_equal_step(theirs, ours, make_tokens(seqlen, 1, device))
        addresses.add(ours.layers[0].keys.untyped_storage().data_ptr())
    assert len(addresses) < 9, f"{len(addresses)} buffers for 2500 tokens: growth is not doubling"
    capacity = ours.layers[0].keys.untyped_storage().nbytes() // (3 * 16 * 4)
    assert capacity < (2 * window if window else 2 * ours.get_seq_length()) + 600


@torch.no_grad()
def test_hands_out_views(device):
    _, ours = make_caches()
    first, _ = ours.update(*make_tokens(40, device=device), 0)
    second, _ = ours.update(*make_tokens(1, device=device), 0)
    assert first.data_ptr() == second.data_ptr() and second.shape[2] == 41
    assert not second.is_contiguous()


@torch.no_grad()
def test_replaced_tensors_are_adopted(device):
    """Code outside may assign to layer.keys; the next token is appended to what it assigned."""
    theirs, ours = make_caches()
    assert_equal_step(theirs, ours, make_tokens(6, device=device))
    for cache in (theirs, ours):
        layer = cache.layers[0]
        layer.keys, layer.values = layer.keys[:, :, 1:4] * 2, layer.values[:, :, 1:4] * 2
    assert_equal_step(theirs, ours, make_tokens(1, device=device))
    assert_equal_step(theirs, ours, make_tokens(2, device=device))


@pytest.mark.parametrize("window", (None, WINDOW), ids=("full", "window"))
@pytest.mark.parametrize(
    "duplicate",
    (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))),
    ids=("deepcopy", "pickle"),
)
@torch.no_grad()
def test_copies_are_independent(device, duplicate, window):
    theirs, ours = make_caches(window)
    assert_equal_step(theirs, ours, make_tokens(4, device=device))
    other, other_theirs = duplicate(ours), copy.deepcopy(theirs)
    for pair in ((theirs, ours), (other_theirs, other), (theirs, ours)):
        assert_equal_step(*pair, make_tokens(1, device=device))


@torch.no_grad()
def test_dtype_of_the_past_wins_like_concatenation(device):
    theirs, ours = make_caches()
    for dtype in (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16):
        assert_equal_step(theirs, ours, make_tokens(2, device=device, dtype=dtype))


@torch.no_grad()
def test_another_batch_is_refused_and_harms_nothing(device):
    theirs, ours = make_caches()
    assert_equal_step(theirs, ours, make_tokens(3, device=device))
    with pytest.raises(RuntimeError):
        ours.update(*make_tokens(1, batch_size=4, device=device), 0)
    assert_equal_step(theirs, ours, make_tokens(1, device=device))


def test_gradients_flow(device):
    theirs, ours = make_caches()
    tokens = [tuple(t.requires_grad_() for t in make_tokens(2, device=device)) for _ in range(2)]
    grads = []
    for cache in (theirs, ours):
        for pair in tokens:
            keys, values = cache.update(*pair, 0)
        loss = (keys**2).sum() + (values**3).sum()
        grads.append(torch.autograd.grad(loss, [t for pair in tokens for t in pair]))
    for mine, wanted in zip(*grads, strict=True):
        assert_same_bits(mine, wanted, "gradient")


def test_outside_of_inference_mode(device):
    theirs, ours = make_caches()
    with torch.inference_mode():
        assert_equal_step(theirs, ours, make_tokens(3, device=device))
    with torch.no_grad():
        assert_equal_step(theirs, ours, make_tokens(1, device=device))
        assert_equal_step(theirs, ours, make_tokens(1, device=device))


def test_adopt(device):
    """An existing DynamicCache with tokens in it, and without a config."""
    theirs = transformers.DynamicCache()
    with torch.no_grad():
        for layer_idx in range(2):
            theirs.update(*make_tokens(4, device=device), layer_idx)
        ours = hf.Cache.adopt(copy.deepcopy(theirs))
        assert isinstance(ours, hf.Cache) and len(ours) == 2
        assert_equal_step(theirs, ours, make_tokens(1, device=device))
        ours.update(*make_tokens(5, device=device), 2)  # a layer that is made on demand
        assert type(ours.layers[2]) is type(ours.layers[0])


def test_layers_follow_the_config():
    cache = hf.Cache(config=make_model("qwen2").config)
    assert cache.is_sliding == [False, True]
    assert not cache.is_compileable and cache.is_croppable
    assert isinstance(cache, transformers.DynamicCache)
