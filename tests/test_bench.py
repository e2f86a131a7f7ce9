"""The benchmark's arithmetic against brute force, and one smoke run of the runner."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from flashinfer_lite import reference

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/ by name, and forget it afterwards: its names are not ours."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def brute_force(shape, op, element_bytes):
    """FLOPs and bytes counted pair by pair and tensor by tensor from the oracle's visibility."""
    window = (shape.window_left, 0 if shape.causal else -1)
    visible = reference.visible_keys(
        1,
        shape.seqlen_q,
        shape.seqlen_kv,
        causal=shape.causal,
        window=window if shape.window_left >= 0 else (-1, -1),
    ).expand(1, 1, shape.seqlen_q, shape.seqlen_kv)[0, 0]
    pairs = sum(int(seen) for row in visible for seen in row)
    touched = int(visible.any(0).sum())
    products = 5 if op == "attention_bwd" else 2
    flops = 0
    for _ in range(shape.batch_size * shape.num_heads_q):
        flops += products * pairs * shape.head_dim * 2
    rows = shape.batch_size * shape.seqlen_q * shape.num_heads_q
    keys = shape.batch_size * touched * shape.num_heads_kv
    query_tensors = ["q", "out"] + (["dout", "dq"] if op == "attention_bwd" else [])
    key_tensors = ["k", "v"] + (["dk", "dv"] if op == "attention_bwd" else [])
    moved = (len(query_tensors) * rows + len(key_tensors) * keys) * shape.head_dim * element_bytes
    return flops, moved + (4 * rows if op == "attention_bwd" else 0)


@pytest.mark.parametrize("op", ["attention", "attention_bwd", "decode"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_left", [-1, 0, 3])
@pytest.mark.parametrize("lengths", [(7, 7), (1, 9), (4, 11), (9, 5)])
def test_cost_equals_brute_force(bench, device, op, causal, window_left, lengths):
    shape = bench("shapes").Shape("tiny", 2, *lengths, 6, 3, 8, causal, window_left)
    cost = bench("roofline").cost(shape, op, 2)
    assert (cost.flops, cost.bytes) == brute_force(shape, op, 2)


def test_roofline_is_the_slower_of_both(bench, device):
    cost = bench("roofline").Cost(flops=100, bytes=30)
    assert cost.seconds_at_least(flop_rate=10, bandwidth=10) == 10
    assert cost.seconds_at_least(flop_rate=1000, bandwidth=10) == 3


def test_shapes_are_named_after_models(bench, device):
    shapes = bench("shapes")
    shape = shapes.parse("llama3-8b@4096x2", "decode")
    assert (shape.batch_size, shape.seqlen_q, shape.seqlen_kv) == (2, 1, 4096)
    assert (shape.num_heads_q, shape.num_heads_kv, shape.head_dim) == (32, 8, 128)
    assert not shape.causal and shape.group_size == 4
    assert shapes.parse("mistral-7b@4096", "attention").window_left == -1
    assert shapes.parse("mistral-7b@8192", "attention").window_left == 4095
    for op, names in shapes.DEFAULTS.items():
        assert all(shapes.parse(name, op).name == name for name in names)


@pytest.mark.parametrize("text", ["llama@16", "gpt2", "gpt2@", "gpt2@0", "gpt2@16x0", "gpt2@-4"])
def test_a_wrong_shape_is_refused(bench, device, text):
    with pytest.raises(ValueError, match="shapes: expected"):
        bench("shapes").parse(text, "decode")


def test_quantiles_interpolate(bench, device):
    quantile = bench("bench").quantile
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.9) == pytest.approx(1.9)


@pytest.mark.parametrize("arguments", [["--threads", "-1"], ["--seconds", "0"], ["--shapes", "x"]])
def test_bad_arguments_end_in_one_line(bench, device, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        bench("bench").main(arguments)
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("bench.py: error: --") and "expected" in last


def test_a_wrong_result_gets_no_number(bench, device):
    shape = bench("shapes").parse("gpt2@16", "decode")
    implementations = bench("implementations")
    found = implementations.candidates(shape, "decode", torch.float32)
    check = bench("oracle").check
    check(shape, "decode", torch.float32, found)
    right = found["ours"].outputs()[0]
    found["ours"].outputs = lambda: (right * 1.001,)
    with pytest.raises(AssertionError, match="decode gpt2@16 ours out"):
        check(shape, "decode", torch.float32, found)


def test_a_wrong_rival_is_named_and_ours_keeps_its_number(bench, device):
    shape = bench("shapes").parse("gpt2@16", "decode")
    found = bench("implementations").candidates(shape, "decode", torch.float32)
    right = found["sdpa"].outputs()[0]
    found["sdpa"].outputs = lambda: (right * 1.001,)
    assert list(bench("oracle").check(shape, "decode", torch.float32, found)) == ["sdpa"]


@pytest.mark.parametrize("op", ["attention", "attention_bwd", "decode", "overhead"])
def test_smoke(bench, device, tmp_path, monkeypatch, capsys, op):
    machine = bench("machine")
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "cache_sizes", lambda: {"L2": 1 << 20})
    output = tmp_path / "bench.jsonl"
    arguments = ["--op", op, "--shapes", "smollm2-135m@24", "mistral-7b@16", "--dtype", "float32"]
    arguments += ["--seconds", "0.001", "--output", str(output)]
    assert bench("bench").main(arguments) == 0
    header, *rows = map(json.loads, output.read_text().splitlines())
    assert header["threads"] == torch.get_num_threads() and header["limits"]["read"] > 0
    names = [row["impl"] for row in rows if row["shape"] == "smollm2-135m@24"]
    assert names[0] == "ours" and "sdpa-gqa" in names
    assert all(row["seconds_p10"] <= row["seconds"] <= row["seconds_p90"] for row in rows)
    assert all(max(r["x_sdpa"] for r in rows if r["impl"][:4] == "sdpa") == 1 for _ in rows)
    assert output.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "smollm2-135m@24 float32" in printed and "roofline" in printed


def test_flat_linear_smoke(bench, device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench("machine"), "BANDWIDTH_BYTES", 1 << 20)
    flat = bench("flat_linear")
    monkeypatch.setattr(flat, "MODELS", {"llama2-7b": [(24, 40), (5, 7)]})
    output = tmp_path / "flat.jsonl"
    arguments = ["--model", "llama2-7b", "--rows", "1", "3", "--seconds", "0.001", "--warm"]
    assert flat.main([*arguments, "--output", str(output)]) == 0
    header, *rows = map(json.loads, output.read_text().splitlines())
    assert header["read"] > 0 and [(r["n"], r["k"], r["m"]) for r in rows[:2]] == [
        (24, 40, 1),
        (24, 40, 3),
    ]
    assert all(set(row["seconds"]) == {"gemv", "flat_gemm", "vendor"} for row in rows)
    assert "geometric mean" in capsys.readouterr().out


def test_flat_linear_names_the_rows_it_loses(bench, device):
    def row(m, ours, vendor):
        seconds = {"gemv": ours, "flat_gemm": 2 * ours, "vendor": vendor}
        return {"n": 8, "k": 8, "m": m, "bytes": 128, "seconds": seconds} | {
            "x_vendor": vendor / ours
        }

    flat, rows = bench("flat_linear"), [row(1, 1.0, 4.0), row(2, 4.0, 1.0)]
    assert flat.summary(rows, read=1e9) == [
        "geometric mean 1.00x over 2 rows, the least 0.25x",
        "torch is faster at: 8x8 M 2 0.25x",
    ]
    # Where torch saturates the memory, losing counts as a draw, and is still named.
    assert flat.summary(rows, read=130.0)[0] == "geometric mean 2.00x over 2 rows, the least 1.00x"
    assert flat.copies_for_cold(1 << 20, 32 << 20) == 128 and flat.copies_for_cold(1 << 40, 1) == 2


def test_above_the_roofline_is_refused(bench, device):
    implausible = bench("roofline").implausible
    row = {"op": "decode", "impl": "ours", "roofline": 1.1, "seconds": 1e-5}
    assert implausible(row) is None
    assert "ours: 130 % of the roofline" in implausible(row | {"roofline": 1.3})
    assert implausible(row | {"roofline": 1.3, "op": "overhead"}) is None


def test_the_gpu_path_on_a_stand_in(bench, device, tmp_path, capsys, monkeypatch):
    output = tmp_path / "bench.jsonl"
    arguments = ["--device", "stand-in", "--op", "decode", "attention", "--shapes", "llama3-8b@40"]
    arguments += ["--dtype", "float32", "--seconds", "0.001", "--output", str(output)]
    assert bench("bench").main(arguments) == 0
    header, *rows = map(json.loads, output.read_text().splitlines())
    assert header["gpu"] == "stand-in" and header["wrong"] == header["left_out"] == []
    prefill = [(row["impl"], row["causal"]) for row in rows if row["op"] == "attention"]
    assert {("ours", True), ("ours", False), ("sdpa-flash", True)} <= set(prefill)
    decode = {row["impl"]: row["mode"] for row in rows if row["op"] == "decode"}
    assert {"ours", "ours-bhsd", "sdpa-flash", "sdpa-flash-packed"} <= set(decode)
    assert set(decode.values()) <= {"graph", "events"}
    assert "sdpa-cudnn: not here: " in capsys.readouterr().out
    # Limits below what a CPU does: every number is too good to be true, and none is reported.
    standin = bench("device").StandIn
    monkeypatch.setattr(standin, "limits", lambda self, names: dict.fromkeys([*names, "read"], 1.0))
    assert bench("bench").main(arguments) == 1
    header, *rows = map(json.loads, output.read_text().splitlines())
    assert not rows and len(header["wrong"]) == 3 and "roofline" in header["wrong"][0]


def test_no_shape_is_begun_after_the_time(bench, device, tmp_path, capsys):
    output = tmp_path / "bench.jsonl"
    arguments = ["--device", "stand-in", "--within", "-1", "--output", str(output)]
    assert bench("bench").main(arguments) == 0
    header, *rows = map(json.loads, output.read_text().splitlines())
    assert not rows and "attention fa-hd128@4096x4 bfloat16 full" in header["left_out"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(bench, device, capsys):
    assert bench("bench").main(["--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_verdicts(bench, device):
    """By the slowest shape of each kind, ours in its faster layout; no rows, nothing said."""

    def row(op, shape, dtype, impl, ratio, roofline=0.9, causal=False):
        ours = {"op": op, "shape": shape, "dtype": dtype, "impl": impl, "x_sdpa": ratio}
        seconds = 1 / (ratio or 1)
        return ours | {"roofline": roofline, "bytes": 1 << 30, "causal": causal, "seconds": seconds}

    rows = [
        row("attention", "gpt2@1024", "bfloat16", "ours", 1.6, causal=True),
        row("attention", "smollm2-135m@2048", "bfloat16", "ours", 1.4, causal=True),
        row("attention", "gpt2@1024", "bfloat16", "ours", 1.5),
        row("attention", "gpt2@1024", "bfloat16", "sdpa", 1.0),
        row("decode", "llama3-8b@4096", "bfloat16", "ours", 1.9, 0.5),
        row("decode", "llama3-8b@4096", "bfloat16", "ours-bhsd", 2.1, 0.7),
        row("decode", "llama3-8b@4096", "bfloat16", "ours-paged16", 1.0, 0.5),
        row("decode", "gpt2@1024", "float32", "ours", 1.0),
        row("decode", "gpt2@1024", "float32", "ours-paged16", 0.95),
        row("decode", "gpt2@1024", "bfloat16", "ours", None),
    ]
    table = bench("goals").verdicts(rows, 1 << 20)
    found = {line[2:36].strip(): line[36:].split() for line in table[2:-2]}
    assert found == {
        "prefill bf16, causal": ["1.5x", "1.40x", "1.50x", "MISSED", "by", "smollm2-135m@2048"],
        "prefill bf16, full": ["1.5x", "1.50x", "1.50x", "met"],
        "decode bf16, groups of 2 to 7": ["2.0x", "2.10x", "2.10x", "met"],
    }
    assert table[-2] == "  decode llama3-8b@4096 bfloat16: 70 % of the roofline"
    slow = "  decode llama3-8b@4096 bfloat16: in pages of 16 1.90 times as long as in one piece"
    assert table[-1] == slow
    assert bench("goals").verdicts([], 1 << 20) == []
