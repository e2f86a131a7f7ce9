"""Continuous batching (`generate_batch`) and packed sequences, against sdpa and against a loop."""

import inspect
import itertools

import pytest
import torch
from hf_models import FAMILIES, VOCAB, hf, make_model, transformers, with_attention
from transformers.data import DataCollatorWithFlattening
from transformers.generation.continuous_batching import initialization
from transformers.utils.generic import is_flash_attention_requested

import flashinfer_lite
from flashinfer_lite.hf import masks, registration
from flashinfer_lite.testing import assert_close, assert_same_bits

# With pages of 8 and batches of 32 tokens: less than a page, more, a whole number, and a prompt
# that is read in two steps. The window of Mistral and Qwen2, 7, is exceeded by most.
LENGTHS = (1, 5, 9, 16, 23, 40)
PACKED = (10, 1, 0, 7, 6)
# Eager takes its softmax in float32, but where sdpa cannot do what the model asks.
ORACLE = {"gemma2": "eager", "gpt_oss": "eager"}
WAYS = ("cu_seq_lens", "cu_seq_lens alone", "position_ids")


def make_prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def generate_batch(model, prompts, tokens=12, **options):
    """The new tokens of each prompt, by continuous batching."""
    config = {"page_size": 8, "num_blocks": 64, "max_batch_tokens": 32, **options}
    outputs = model.generate_batch(
        prompts,
        transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1),
        transformers.ContinuousBatchingConfig(**config),
    )
    assert [one.error for one in outputs.values()] == [None] * len(prompts)
    found = {tuple(one.prompt_ids): one.generated_tokens for one in outputs.values()}
    return [found[tuple(prompt)] for prompt in prompts]


def generate(model, prompt, tokens=12):
    ids = torch.tensor([prompt], device=model.device)
    return model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, len(prompt) :].tolist()


@pytest.fixture
def calls(monkeypatch):
    """(name, how many sequences) of each call of an op."""
    seen = []

    def recorded(name):
        op = getattr(flashinfer_lite, name)

        def call(q, k, v, *args, **kwargs):
            seen.append((name, len(args[0]) - 1 if args else len(q)))
            return op(q, k, v, *args, **kwargs)

        return call

    for name in ("attention", "attention_varlen", "decode"):
        monkeypatch.setattr(flashinfer_lite, name, recorded(name))
    return seen


@pytest.fixture
def no_full_mask(monkeypatch):
    def refuse(**kwargs):
        raise AssertionError("a mask of every query and key was made")

    monkeypatch.setattr(masks, "sdpa_mask", refuse)


@pytest.mark.parametrize("name", (hf.FLASH_NAME, hf.BATCHING_NAME))
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_batch(device, calls, no_full_mask, family, name):
    sdpa = make_model(family, "sdpa", device=device)
    prompts = make_prompts()
    expected = generate_batch(sdpa, prompts)
    assert expected == [generate(sdpa, prompt) for prompt in prompts]
    assert not calls
    assert generate_batch(with_attention(sdpa, name), prompts) == expected
    names, counts = zip(*calls, strict=True)
    assert set(names) == {"attention_varlen"} and max(counts) == len(prompts)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
def test_generate_batch_half(device, dtype):
    """Half precision may break a tie otherwise than sdpa: the same tokens as one by one."""
    ours = make_model("llama", hf.FLASH_NAME, device=device, dtype=dtype)
    prompts = make_prompts((3, 17))
    batched = generate_batch(ours, prompts, tokens=3)
    assert batched == [generate(ours, prompt, tokens=3) for prompt in prompts]


@pytest.mark.parametrize("family", ("llama", "qwen3"))
def test_generate_batch_over_pages(device, calls, monkeypatch, family):
    """The decode path of CUDA, which transformers opens by its own condition alone: pages are
    written and read in place."""
    sdpa = make_model(family, "sdpa", device=device)
    prompts = make_prompts()
    expected = generate_batch(sdpa, prompts, tokens=20)
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *args: None)
    ours = with_attention(sdpa, hf.BATCHING_NAME)
    assert generate_batch(ours, prompts, tokens=20, max_blocks_per_request=8) == expected
    assert calls.count(("decode", len(prompts))) > 10 * ours.config.num_hidden_layers


def test_the_condition_for_pages():
    """What transformers asks, besides CUDA, before it hands out a block_table."""
    name = hf.BATCHING_NAME
    assert is_flash_attention_requested(requested_attention_implementation=name, version=[2, 3])
    function = registration.flash_utils._lazy_imports(name)[2]
    assert {"block_table", "cache_seqlens"} <= set(inspect.signature(function).parameters)


def test_generate_batch_of_a_patched_model(device, calls):
    """Linear layers and a calibration's phi are the patch's, the name is chosen on top of it."""
    model = make_model("llama", "sdpa", device=device)
    prompts = make_prompts()
    expected = generate_batch(model, prompts)
    with hf.patch(model):
        model.set_attn_implementation(hf.BATCHING_NAME)
        assert generate_batch(model, prompts) == expected
    assert ("attention_varlen", len(prompts)) in calls
    assert model.config._attn_implementation == "sdpa"


def test_the_plain_name_is_not_for_batching(device):
    with pytest.raises(ValueError, match=f"{hf.NAME} is not supported for continuous batching"):
        generate_batch(make_model("llama", hf.NAME, device=device), make_prompts())


def packed_batch(lengths=PACKED, device="cpu", flash=True):
    """What transformers' collator makes of sequences of these lengths."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
    batch = collator([{"input_ids": ids} for ids in make_prompts(lengths)])
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


@pytest.mark.parametrize(
    ("family", "how"),
    [
        *itertools.product((*FAMILIES, "gemma2"), WAYS),
        ("gpt_oss", "cu_seq_lens"),  # transformers makes its masks without position_ids
    ],
)
def test_packed_logits_are_those_of_a_loop(device, calls, no_full_mask, family, how):
    eager = make_model(family, device=device)
    ours = with_attention(eager, hf.NAME)
    oracle = with_attention(eager, ORACLE.get(family, "sdpa"), torch.float64)
    batch = packed_batch(device=device, flash=how != "position_ids")
    del batch["labels"]
    prompts = [torch.tensor([ids], device=device) for ids in make_prompts(PACKED) if ids]
    with torch.no_grad():
        expected, exact = (
            torch.cat([m(p, use_cache=False).logits for p in prompts], 1) for m in (eager, oracle)
        )
        if how == "cu_seq_lens alone":
            # The rotary embedding is relative: positions that run on change nothing.
            del batch["position_ids"]
        actual = ours(**batch, use_cache=False).logits
    assert_close(actual, exact, expected, "logits")
    counted = len(PACKED) - (how == "position_ids")  # an empty sequence has no position
    assert set(calls) == {("attention_varlen", counted)}


@pytest.mark.parametrize("flash", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradients(device, family, flash):
    """Against eager, which spells packing out as a mask."""
    eager = make_model(family, device=device, initializer_range=0.1)

    def gradients(model, **batch):
        model(**batch, use_cache=False).loss.backward()
        return {name: x.grad for name, x in model.named_parameters()}

    lengths = [n for n in PACKED if n]  # the collator gives a label even to an empty sequence
    plain = packed_batch(lengths, device, flash=False)
    oracle = gradients(with_attention(eager, "sdpa", torch.float64), **plain)
    expected = gradients(eager, **plain)
    ours = with_attention(eager, hf.NAME)
    ours.zero_grad()
    actual = gradients(ours, **packed_batch(lengths, device, flash))
    assert actual.keys() == oracle.keys()
    for name in actual:
        assert_close(actual[name], oracle[name], expected[name], name)


def qkv(device, batch_size=1):
    return (torch.randn(batch_size, h, sum(PACKED), 16, device=device) for h in (4, 2, 2))


def offsets(lengths=PACKED, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0).int()


class Module(torch.nn.Module):
    is_causal, layer_idx = True, 0


OPTIONS = {
    "causal": {},
    "not causal": {"is_causal": False},
    "window": {"sliding_window": 3},
    "window both ways": {"sliding_window": 3, "is_causal": False},
    "softcap": {"softcap": 1.5, "scaling": 0.7},
    "sink": {"s_aux": torch.tensor([0.5, 2.0, -1.0, 6.0])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_attention_is_a_loop(device, options):
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    tensors = [x.requires_grad_() for x in qkv(device)]
    cu_seqlens = offsets(device=device)

    def loop():
        for begin, end in itertools.pairwise(cu_seqlens.tolist()):
            part = (x[:, :, begin:end] for x in tensors)
            yield hf.attention_forward(Module(), *part, None, **options)[0]

    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    packed = dict(zip(names, (cu_seqlens, cu_seqlens, 10, 10), strict=True))
    out, weights = hf.attention_forward(Module(), *tensors, None, **packed, **options)
    expected = torch.cat(list(loop()), 1)
    assert weights is None and out.is_contiguous()
    assert_same_bits(out, expected)
    dout = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad((out * dout).sum(), tensors),
        torch.autograd.grad((expected * dout).sum(), tensors),
        strict=True,
    ):
        assert_same_bits(got, wanted)


def numbered(device, lengths=PACKED):
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    functions = transformers.masking_utils
    return hf.key_mask(
        batch_size=1,
        q_length=position_ids.shape[1],
        kv_length=position_ids.shape[1],
        mask_function=functions.packed_sequence_compatibility_function(
            functions.causal_mask_function,
            position_ids,
            functions.find_packed_sequence_indices(position_ids),
        ),
        allow_is_causal_skip=False,
        device=device,
    )


def test_numbered_sequences_in_a_compiled_layer(device):
    """The row was made outside of the graph, where nobody may count the sequences."""
    torch._dynamo.reset()
    tensors, row = list(qkv(device)), numbered(device)

    def attend(*args):
        return hf.attention_forward(Module(), *args, sliding_window=4)[0]

    assert row.shape == (1, 1, 1, sum(PACKED))
    expected = attend(*tensors, row)
    actual = torch.compile(attend, backend="aot_eager", fullgraph=True)(*tensors, row)
    assert_close(actual, expected.double(), expected)
    torch._dynamo.reset()


def test_rows_of_a_batch_are_packed_by_a_mask(device):
    """Sequences packed into several rows: a full mask, as transformers makes it."""
    eager = make_model("mistral", device=device)
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(12 - n)]) for n in (5, 9)])
    batch = {
        "input_ids": torch.tensor(make_prompts((12, 12)), device=device),
        "position_ids": positions.to(device),
        "use_cache": False,
    }
    with torch.no_grad():
        expected, actual = (
            model(**batch).logits for model in (eager, with_attention(eager, hf.NAME))
        )
        exact = with_attention(eager, "sdpa", torch.float64)(**batch).logits
    assert_close(actual, exact, expected, "logits")


CU = offsets()
REFUSALS = {
    "mask too": (
        {"attention_mask": torch.ones(1, 1, 24, 24, dtype=torch.bool)},
        (ValueError, r"^attention_mask: expected None with cu_seq_lens_q, got shape \(1, 1, 24"),
    ),
    "a batch": ({"batch_size": 2}, (ValueError, "^cu_seq_lens_q: .*got a batch of 2")),
    "no cu_seq_lens_k": ({"cu_seq_lens_k": None}, (ValueError, "^cu_seq_lens_k: expected both")),
    "no cu_seq_lens_q": ({"cu_seq_lens_q": None}, (ValueError, "^cu_seq_lens_q: expected both")),
    "too long": ({"max_length_q": 9}, (RuntimeError, "^max_seqlen_q: .*10")),
    "bias": ({"position_bias": torch.ones(1, 1, 24, 24)}, (ValueError, "^mask: expected None")),
    "dropout": ({"dropout": 0.1}, (NotImplementedError, "^dropout: ")),
    "no cache": ({"read_index": []}, (ValueError, "^read_index: expected None without a cache")),
    "table": ({"block_table": CU}, (ValueError, "^block_table: expected None without a cache")),
    "a cache": ({"cache": object()}, (TypeError, "^cache: .*PagedAttentionCache.*got object")),
    "per layer": ({"cu_seq_lens_k": {"full_attention": CU}}, (TypeError, "^cu_seqlens_kv: .*dict")),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case):
    changed, (error, text) = REFUSALS[case]
    options = {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU, "attention_mask": None, **changed}
    tensors = qkv("cpu", batch_size=options.pop("batch_size", 1))
    with pytest.raises(error, match=text):
        hf.attention_forward(Module(), *tensors, options.pop("attention_mask"), **options)
