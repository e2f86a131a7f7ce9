"""The FlashDecoding++ example without a network, and that each of its proofs can fail."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashinfer_lite
from flashinfer_lite.calibrate import Calibration

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "flashdecoding_pp.py"
pytest.importorskip("transformers", reason="the example runs a transformers model")
pytest.importorskip("matplotlib", reason="the example draws the calibration")
pytestmark = pytest.mark.cpu_only("the example measures the CPU")

TINY = ["--quick", "--contexts", "8", "--rounds", "1", "--scored", "6", "--tune-seconds", "0"]


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def test_quick_mode_holds_and_leaves_its_records(device, tmp_path):
    command = [sys.executable, str(EXAMPLE), "--quick", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout and "no checks failed" in result.stdout
    records = [json.loads(line) for line in (tmp_path / "out" / "fdpp.jsonl").open()]
    speed = {(r["variant"], r["dtype"], r["context"]) for r in records if r["kind"] == "speed"}
    names = {"eager", "sdpa", "sdpa-ourcache", "online", "unified", "unified-flat"}
    contexts = [("fp32", 64), ("fp32", 192), ("bf16", 64), ("bf16", 192)]
    assert speed == {(name, *context) for name in names for context in contexts}
    assert all(
        r["speed_against_sdpa"] == 1 for r in records if r.get("variant") == "sdpa" and "ms" in r
    )
    scored = {(r["variant"], r["dtype"]): r for r in records if r["kind"] == "perplexity"}
    assert len(scored) == 10
    assert scored["unified", "fp32"]["rows_checked"] == 4 * 8 * 48
    assert scored["online", "bf16"]["rows_checked"] == 0
    assert sum(r["kind"] == "check" for r in records) == 24
    loaded = Calibration.load(tmp_path / "out" / "calibration.json")
    assert loaded.layers_on == 4
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 1000


def run_tiny(capsys, tmp_path, dtype="fp32"):
    """(exit status, the checks that failed) of the smallest run there is."""
    from flashdecoding_pp import main

    status = main([*TINY, "--dtypes", dtype, "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    return status, [line for line in lines if line.startswith("  FAILED")]


def test_a_miscount_fails_it(device, examples, monkeypatch, capsys, tmp_path):
    real = flashinfer_lite.stats

    def one_too_many(reset=False):
        counted = real(reset)
        return dataclasses.replace(counted, rows_checked=counted.rows_checked + 1)

    monkeypatch.setattr(flashinfer_lite, "stats", one_too_many)
    status, failed = run_tiny(capsys, tmp_path)
    assert status == 1 and len(failed) == 3
    assert "rows checked 193, expected 192 = 4 layers x 8 heads x 6 steps" in failed[1]


def test_a_wrong_phi_fails_it_and_nothing_else_does(
    device, examples, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(Calibration, "phi", lambda self, layer: [1000.0] * self.num_heads_q)
    status, failed = run_tiny(capsys, tmp_path)
    assert status == 1 and len(failed) == 2  # the output is right: every row was recomputed
    assert all("rows recomputed 192, 100.000%" in line for line in failed)


def test_linear_layers_left_to_torch_fail_it(device, examples, monkeypatch, capsys, tmp_path):
    from flashinfer_lite import hf

    real = hf.patch
    monkeypatch.setattr(hf, "patch", lambda model, **kw: real(model, **{**kw, "linear": False}))
    status, failed = run_tiny(capsys, tmp_path, "bf16")
    assert status == 1 and len(failed) == 1
    assert "flat_linear in a step: {}, expected {'gemv': 29}" in failed[0]


def test_the_comparisons_can_fail(device, examples):
    from fdpp_checks import Run, check_bf16, check_fp32, check_greedy

    torch.manual_seed(0)
    nll = 2 + torch.rand(100, dtype=torch.float64)

    def runs(**shifts):
        moved = {"eager": 0.0, "sdpa": 0.0, **shifts}
        return {name: Run(nll + shift, 0, 0, {}) for name, shift in moved.items()}

    assert all(c.passed for c in check_fp32(runs(online=4e-5)))
    assert [c.passed for c in check_fp32(runs(online=4e-5, unified=6e-5))] == [True, True, False]
    spread = {"sdpa": 0.01, "online": -0.0195, "unified": 0.0205}
    assert [c.passed for c in check_bf16(runs(**spread))] == [True, False]
    # sdpa equal to eager on the average, by luck: what is allowed comes from its scatter.
    scattered = runs(online=0.02, unified=0.04)
    scatter = torch.where(torch.arange(100) % 2 == 0, 0.1, -0.1).double()
    scattered["sdpa"] = Run(nll + scatter, 0, 0, {})
    assert [c.passed for c in check_bf16(scattered)] == [True, False]
    texts = {"eager": [1, 2, 3], "online": [1, 2, 3], "unified": [1, 2, 4]}
    assert [c.passed for c in check_greedy(texts)] == [True, False]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--contexts", "0"],
        ["--contexts", "9000"],
        ["--scored", "8000"],
        ["--rounds", "0"],
        ["--tune-seconds", "-1"],
        ["--threads", "-1"],
        ["--dtypes", "fp8"],
    ],
)
def test_bad_arguments_end_in_one_line(device, examples, capsys, arguments):
    from flashdecoding_pp import parse_arguments

    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and arguments[0] in last
    assert last.startswith("flashdecoding_pp.py: error: ")
