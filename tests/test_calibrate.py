"""Calibration of tiny transformers models: what is counted, chosen and left behind."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import VOCAB, hf, make_batch, make_model, transformers
from transformers.masking_utils import eager_mask

from flashinfer_lite.calibrate import Calibration, calibrate, collect, run

ROOT = Path(__file__).resolve().parent.parent
TOL = 1e-3  # of a score between this calibration and the eager one, far below a bin
NAN, INF = float("nan"), float("inf")


def ids(count, seed=3):
    return torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def quietly(model, texts, **kwargs):
    return calibrate(model, texts, progress=False, **kwargs)


def eager_scores(model, batches):
    """{layer: (scores, row maxima) per head}, float64, by transformers' own additive mask."""
    found = {}

    def attend(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        q, k, v = (x.double() for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = (mask[..., : k.shape[2]] < -1).expand(scores.shape)
        scores = scores.masked_fill(hidden, -INF)
        found.setdefault(module.layer_idx, []).append(scores)
        weights = scores.softmax(-1).nan_to_num(0)
        return (weights @ v).to(query.dtype).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("spelt_out", attend)
    transformers.AttentionMaskInterface.register("spelt_out", eager_mask)
    model = copy.deepcopy(model)
    model.set_attn_implementation("spelt_out")
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    return {
        layer: [
            tuple(
                torch.cat([x[:, head][x[:, head] > -INF] for x in parts]).sort().values.cpu()
                for parts in (seen, [x.amax(-1) for x in seen])
            )
            for head in range(seen[0].shape[1])
        ]
        for layer, seen in found.items()
    }


def assert_same_distribution(h, head, values):
    """The histogram's counts below each edge are the values' own, up to TOL in the values."""
    below = h.counts[head].cumsum(0)
    assert h.total(head) == below[-1] == len(values)
    edges = ((torch.arange(len(below)) + 1 + h.low).double() * h.width).contiguous()
    assert (below >= torch.searchsorted(values, edges - TOL)).all()
    assert (below <= torch.searchsorted(values, edges + TOL)).all()
    assert abs(h.minimum[head] - values[0]) < TOL and abs(h.maximum[head] - values[-1]) < TOL


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "opt", "gpt_neox"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_it_counts_the_scores_of_eager_attention(device, family, padding, monkeypatch):
    monkeypatch.setattr(collect, "CHUNK", 1000)
    model = make_model(family, device=device)
    texts = [make_batch(padding, device=device), ids(30)]
    expected = eager_scores(model, [texts[0], {"input_ids": texts[1][None].to(device)}])
    calibration = quietly(model, texts)
    assert calibration.num_layers == len(expected) == len(calibration.layers)
    for layer in calibration.layers:
        assert layer.num_heads == calibration.num_heads_q == len(expected[layer.index])
        for head, (scores, row_max) in enumerate(expected[layer.index]):
            assert_same_distribution(layer.scores, head, scores)
            assert_same_distribution(layer.row_max, head, row_max)
            low, high = layer.row_max_ranges[head]
            if layer.phi is not None:
                assert layer.phi[head] == (low + high) / 2 - sum(calibration.guard) / 2
            assert low - TOL <= row_max[0] and row_max[-1] <= high + TOL, "all of so few rows"
        everything = torch.cat([scores for scores, _ in expected[layer.index]])
        low, high = layer.score_range
        inside = ((everything > low - TOL) & (everything < high + TOL)).sum()
        assert inside >= 0.9999 * len(everything)


def test_the_softcap_and_the_window_show(device):
    """What would go unnoticed if both sides above ignored them."""
    capped = quietly(make_model("gemma2", device=device, attn_logit_softcapping=2.0), [ids(40)])
    assert all(max(layer.scores.maximum) <= 2 for layer in capped.layers)
    windowed = quietly(make_model("mistral", device=device), [ids(40)])
    assert windowed.layers[0].scores.total(0) == 7 * 40 - sum(range(7))
    full = quietly(make_model("llama", device=device), [ids(40)])
    assert full.layers[0].scores.total(0) == 40 * 41 // 2


def test_memory_is_bounded_by_the_chunk(device, monkeypatch):
    sizes = []
    add = collect.Histogram.add
    monkeypatch.setattr(
        collect.Histogram,
        "add",
        lambda self, x, seen: (sizes.append(x.numel()), add(self, x, seen)),
    )
    monkeypatch.setattr(collect, "CHUNK", 4000)
    quietly(make_model("llama", device=device), [ids(200)])
    assert 2000 < max(sizes) <= 4000


def state(model):
    return {
        "configs": [
            (id(m.config), m.config.to_dict(), m.config._attn_implementation)
            for m in model.modules()
            if hasattr(m, "config")
        ],
        "modules": [(type(m), m.training, sorted(vars(m))) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "forward": [m.forward.__func__ for m in model.modules()],
        "grad": [(p.requires_grad, p.grad) for p in model.parameters()],
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(device, fails, monkeypatch):
    # In train mode its dropout would be refused, while calibrating and while measuring.
    model = make_model("llama", device=device, attention_dropout=0.5, initializer_range=0.1)
    model.train()
    model.model.layers[1].eval()
    before, weights = state(model), copy.deepcopy(model.state_dict())
    if fails:
        monkeypatch.setattr(collect, "score_chunks", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quietly(model, [ids(20)])
    else:
        quietly(model, [ids(20)], held_out=[ids(20, seed=4)])
    assert state(model) == before and torch.is_grad_enabled()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    model.set_attn_implementation(collect.NAME)
    with pytest.raises(RuntimeError, match="works in flashinfer_lite.calibrate only"):
        model(ids(4)[None].to(device))


def test_a_patched_model_is_calibrated_and_stays_patched(device):
    model = make_model("llama", device=device)
    expected = quietly(model, [ids(20)])
    with hf.patch(model):
        assert quietly(model, [ids(20)]).summary() == expected.summary()
        assert model.config._attn_implementation == hf.NAME
        with pytest.raises(ValueError, match="patched already"):
            quietly(model, [ids(20)], held_out=[ids(20)])


def test_the_same_text_gives_the_same_file(device, tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(len(name) + ord(name))
        model = make_model("llama", device=device)
        quietly(model, [ids(50)], held_out=[ids(50, seed=4)]).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_patched_model_recomputes_what_was_foretold(device, dtype):
    model = make_model("llama", device=device, dtype=dtype, initializer_range=0.08)
    held_out = ids(200, seed=4)
    calibration = quietly(model, [ids(200)], held_out=[held_out], recompute_rate=0.05, seqlen=100)
    assert calibration.layers_on == 2 and calibration.guard == run.named(dtype)[1]
    assert calibration.held_out.rows_checked == 2 * 9 * 200
    seen = quietly(model, [held_out], seqlen=100)
    # The true number lies between the bins surely outside and those not surely inside.
    width = max(layer.row_max.width for layer in seen.layers)
    low, high = calibration.guard
    bounds = [
        sum(
            layer.row_max.outside(head, phi + low - slack, phi + high + slack)
            for layer in seen.layers
            for head, phi in enumerate(calibration.phi(layer.index))
        )
        for slack in (width, 0.0)
    ]
    assert bounds[0] <= calibration.held_out.rows_recomputed <= bounds[1]
    assert calibration.held_out.rate <= 0.2 and calibration.expected_rate <= 0.05


def test_rows_beyond_the_guard_are_recomputed_and_counted(device):
    """Held-out text that is nothing like the calibration's: its rows are found out."""
    model = make_model("llama", device=device, dtype=torch.float16, initializer_range=0.1)
    texts = {"texts": [ids(300) % 3 + 2], "held_out": [ids(300, seed=4)]}
    calibration = quietly(model, **texts, recompute_rate=0.01)
    assert calibration.layers_on
    assert 0 < calibration.held_out.rows_recomputed < calibration.held_out.rows_checked
    assert calibration.held_out.rate > calibration.expected_rate
    again = quietly(model, **texts, recompute_rate=0.01)
    assert again.held_out == calibration.held_out, "counters of the process, not of the run"


def test_ranges_like_opts_turn_the_technique_off(device):
    model = make_model("opt", device=device)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
    calibration = quietly(model, [ids(60)], held_out=[ids(60, seed=4)])
    assert [calibration.phi(i) for i in range(2)] == [None, None]
    for layer in calibration.layers:
        assert "of the row maxima lie in (" in layer.reason
        assert "wider than the guard's 44" in layer.reason
    assert calibration.expected_rate is None and calibration.held_out.rate is None
    assert calibration.held_out.rows_checked == 0
    low, high = calibration.score_range
    assert low < -100 and high > 100
    text = calibration.summary()
    assert text.count("off: head ") == 2 and "unified maximum in 0 of 2 layers" in text
    assert all(line.isascii() for line in text.splitlines())


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_score_that_is_not_finite_is_reported(device, value):
    """One head of the last layer; what comes before and beside it is as it was."""
    model = make_model("opt", device=device)
    good = quietly(model, [ids(40)])
    with torch.no_grad():
        model.model.decoder.layers[1].self_attn.k_proj.bias[3 * 16 + 5] = value
    bad = quietly(model, [ids(40)])
    assert bad.layers[0].reason == good.layers[0].reason == ""
    layer = bad.layers[1]
    assert layer.scores.nonfinite == [0, 0, 0, 40 * 41 // 2]
    assert all(
        torch.equal(layer.scores.counts[i], good.layers[1].scores.counts[i]) for i in range(3)
    )
    rows = layer.row_max.nonfinite[3]
    assert f"head 3: {rows} of 40 row maxima are NaN" in layer.reason and rows > 0
    assert layer.phi is None and "820 scores NaN or infinite" in bad.summary()


def test_layers_without_attention_are_online(device):
    config = transformers.Lfm2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = transformers.Lfm2ForCausalLM(config).to(device).eval()
    calibration = quietly(model, [ids(40)], held_out=[ids(20)])
    assert [layer.reason for layer in calibration.layers] == [
        "no attention ran in this layer",
        "",
        "no attention ran in this layer",
    ]
    assert calibration.held_out.rows_checked == 4 * 20


def test_what_cannot_be_calibrated_is_refused(device):
    model = make_model("llama", device=device)
    for texts in ([], [[]]):
        with pytest.raises(ValueError, match="texts: expected text, got none"):
            quietly(model, texts)
    with pytest.raises(ValueError, match="held_out: expected text, got none"):
        quietly(model, [ids(9)], held_out=[])
    for name, value in (("recompute_rate", 1.0), ("seqlen", 0), ("seqlen", 257), ("max_tokens", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            quietly(model, [ids(9)], **{name: value})
    with pytest.raises(TypeError, match="seqlen: expected an integer"):
        quietly(model, [ids(9)], seqlen=8.0)
    with pytest.raises(TypeError, match="model: expected a transformers.PreTrainedModel"):
        quietly(torch.nn.Linear(2, 2), [ids(9)])
    bloom = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="does not use transformers' attention interface"):
        quietly(transformers.BloomForCausalLM(bloom), [ids(9)])


def save_tiny_model(folder):
    """A model and a tokenizer of one token per character, as from_pretrained reads them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "<unk>", *map(chr, range(97, 123)), " ", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>"
    ).save_pretrained(folder)
    make_model("llama", initializer_range=0.1).save_pretrained(folder)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "flashinfer_lite", "calibrate", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.cpu_only("the command's default device")
def test_the_command_from_text_to_file_and_picture(device, tmp_path):
    save_tiny_model(tmp_path / "model")
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("the quick brown fox. " * 20)
    other.write_text("jumps over the lazy dog. " * 5)
    output, plot = tmp_path / "c.json", tmp_path / "c.png"
    options = ["--text", text, "--output", output, "--seqlen", 64, "--dtype", "float32"]
    done = command(tmp_path / "model", *options, "--plot", plot, "--held-out", other)
    assert done.returncode == 0, done.stderr
    calibration = Calibration.load(output)
    assert done.stdout == calibration.summary() + "\n"
    assert (calibration.model, calibration.tokens) == ("model", 420)
    assert calibration.held_out.rows_checked == 2 * 9 * 125 and calibration.layers_on == 2
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10000
    assert "calibrate" in done.stderr and "held out" in done.stderr, "no progress bars"
    with hf.patch(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), calibration=output
    ):
        pass
    wrong = {
        "--text": ["--text", tmp_path / "absent", "--output", output],
        "--output": ["--text", text, "--output", tmp_path / "no" / "folder.json"],
        "--output: expected a file": ["--text", text, "--output", tmp_path],
        "--device": [*options, "--device", "nonsense"],
        "--recompute-rate": [*options, "--recompute-rate", 2],
        "--max-tokens": [*options, "--max-tokens", 0],
        "--held-out": [*options, "--held-out", plot],
    }
    (tmp_path / "empty").write_text("")
    for option, arguments in wrong.items():
        failed = command(tmp_path / "model", *arguments)
        wanted = option if ": " in option else f"{option}: expected"
        assert failed.returncode == 2 and wanted in failed.stderr.splitlines()[-1], option
    failed = command(tmp_path / "model", "--text", tmp_path / "empty", "--output", output)
    assert failed.returncode == 2 and "--text: expected text" in failed.stderr.splitlines()[-1]
    failed = command(tmp_path, *options)
    assert failed.returncode == 2 and "MODEL_DIR: expected a folder" in failed.stderr
    assert json.loads(output.read_text())["version"] == 1
