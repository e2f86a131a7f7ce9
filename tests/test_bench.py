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
    quantile = bench("timing").quantile
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.9) == pytest.approx(1.9)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "-1"],
        ["--seconds", "0"],
        ["--shapes", "x"],
        ["--op", "padded", "--device", "stand-in"],
    ],
)
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


@pytest.fixture
def run(bench, tmp_path, monkeypatch):
    """Run the benchmark with these arguments; return its status, the header and the rows."""
    machine = bench("machine")
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "cache_sizes", lambda: {"L2": 1 << 20})
    output = tmp_path / "bench.jsonl"

    def runs(*arguments):
        status = bench("bench").main([*arguments, "--seconds", "0.001", "--output", str(output)])
        header, *rows = map(json.loads, output.read_text().splitlines())
        return status, header, rows

    return runs


@pytest.mark.parametrize(
    "op", ["attention", "attention_bwd", "decode", "overhead", "full", "padded"]
)
def test_smoke(run, device, tmp_path, capsys, op):
    output = tmp_path / "bench.jsonl"
    shapes = ("smollm2-135m@24", "mistral-7b@16")
    status, header, rows = run("--op", op, "--shapes", *shapes, "--dtype", "float32")
    assert status == 0
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

    slowest = "llama3-8b@4096"
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
        "decode past the caches, of reading": ["80", "%", "70", "%", "MISSED", "by", slowest],
    }
    assert table[-2] == "  decode llama3-8b@4096 bfloat16: 70 % of the roofline"
    slow = "  decode llama3-8b@4096 bfloat16: in pages of 16 1.90 times as long as in one piece"
    assert table[-1] == slow
    assert bench("goals").verdicts([], 1 << 20) == []


def test_a_decode_that_reads_fast_enough_is_met(bench, device):
    row = {"op": "decode", "shape": "gpt2@64", "dtype": "bfloat16", "impl": "ours", "x_sdpa": 2.0}
    row |= {"roofline": 0.8, "bytes": 1 << 30, "causal": False, "seconds": 1.0}
    table = bench("goals").verdicts([row], 1 << 20)
    assert table[-1].split()[-5:] == ["80", "%", "80", "%", "met"]


@pytest.mark.parametrize(("seconds", "verdict"), [(1.2, "met"), (1.3, "MISSED by gpt2@8192")])
def test_a_windows_verdict_is_by_its_pairs(bench, device, seconds, verdict):
    def row(impl, seconds, flops):
        found = {"op": "window", "shape": "gpt2@8192", "dtype": "bfloat16", "impl": impl}
        return found | {"seconds": seconds, "flops": flops, "x_sdpa": None, "causal": True}

    rows = [row("ours", seconds, 100), row("ours-full", 16.0, 1600)]
    head, line = bench("goals").verdicts(rows, 1 << 20)
    assert "at most" in head and line.endswith(verdict) and f"{seconds:.2f}x" in line
    assert bench("goals").verdicts(rows[:1], 1 << 20) == []


@pytest.mark.parametrize(("ours", "verdict"), [(100, "met"), (101, "MISSED by one-hd64@64")])
def test_the_verdict_on_memory_is_by_the_most_frugal_sdpa(bench, device, ours, verdict):
    peaks = {"ours": ours, "sdpa-gqa": 100, "sdpa-expanded": 300}
    rows = [
        {"op": "memory", "shape": "one-hd64@64", "dtype": "bfloat16", "causal": True}
        | {"impl": impl, "peak_bytes": peak, "x_sdpa": None}
        for impl, peak in peaks.items()
    ]
    assert bench("goals").verdicts(rows, 1 << 20)[1].endswith(verdict)


def test_padding_costs_nothing(bench, device):
    """A padded batch costs what its sequences do, one by one, and has lengths of several sizes."""
    shapes, cost = bench("shapes"), bench("roofline").cost
    shape = shapes.parse("gpt2@1024x4", "padded")
    assert shape.lengths == (1024, 832, 640, 448) and not shape.causal
    tiny = shapes.Shape("tiny", 2, 5, 7, 6, 3, 8, False, lengths=(7, 4))
    each = [brute_force(tiny.sequence(i), "padded", 2) for i in range(2)]
    assert tiny.sequence(1).seqlen_kv == 4
    price = cost(tiny, "padded", 2)
    assert (price.flops, price.bytes) == tuple(map(sum, zip(*each, strict=True)))


def test_padding_and_a_window_without_causal_are_the_same_to_all(bench, device):
    shapes, check = bench("shapes"), bench("oracle").check
    candidates = bench("implementations").candidates
    padded = shapes.Shape("padded", 3, 80, 80, 6, 3, 16, False, lengths=(80, 1, 50))
    window = shapes.Shape("window", 1, 80, 80, 6, 3, 16, False, window_left=3)
    for op, shape in (("padded", padded), ("attention", window)):
        found = candidates(shape, op, torch.float32)
        assert check(shape, op, torch.float32, found) == {}
    every_key = candidates(shapes.Shape("all", 3, 80, 80, 6, 3, 16, False), "padded", torch.float32)
    with pytest.raises(AssertionError, match="padded padded ours out"):
        check(padded, "padded", torch.float32, {"ours": every_key["ours"]})
    names = set(candidates(padded, "padded", torch.float32))
    assert {"sdpa-gqa", "sdpa-gqa-each", "sdpa-expanded", "sdpa-expanded-each"} < names


def test_a_window_is_timed_against_all_keys(run, device, capsys):
    status, _, rows = run("--op", "window", "--shapes", "smollm2-135m@300")
    ours, full = rows
    assert status == 0 and [row["impl"] for row in rows] == ["ours", "ours-full"]
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert full["flops"] - ours["flops"] == 4 * 9 * 64 * (44 * 45 // 2)
    assert "a window's time, to its pairs" in capsys.readouterr().out


def test_peak_memory_is_that_of_the_call(run, bench, device, capsys):
    try:
        bench("memory").reset_peak()
    except OSError:
        pytest.skip("this kernel cannot reset the peak of a process (/proc/self/clear_refs)")
    status, _, rows = run("--op", "memory", "--shapes", "one-hd64@32768", "--impl", "ours")
    (row,) = rows
    out = 32768 * 64 * 2
    assert status == 0 and row["impl"] == "ours" and out <= row["peak_bytes"] < 2 * out
    assert "MiB" in capsys.readouterr().out


def test_memory_of_a_wrong_result_gets_no_number(bench, device, monkeypatch):
    memory = bench("memory")
    monkeypatch.setattr(memory, "reset_peak", lambda: None)
    monkeypatch.setattr(memory, "resident", lambda field: 0)
    assert memory.growth("ours", "one-hd64@64", torch.float32) == 0
    monkeypatch.setattr("flashinfer_lite.attention", lambda q, k, v, **options: v)
    with pytest.raises(AssertionError, match="attention one-hd64@64 ours out"):
        memory.growth("ours", "one-hd64@64", torch.float32)


def test_memory_goes_on_where_a_peak_cannot_be_reset(run, bench, device, monkeypatch, capsys):
    monkeypatch.setattr(bench("memory"), "RESET_PEAK", Path("/nowhere/clear_refs"))
    status, header, rows = run("--op", "memory", "overhead", "--dtype", "float32")
    assert status == 0 and {row["op"] for row in rows} == {"overhead"} and not header["wrong"]
    assert "memory one-hd64@32768: not here: " in capsys.readouterr().out


@pytest.fixture
def small_model(bench, monkeypatch):
    pytest.importorskip("transformers", reason="the benchmark runs a transformers model")
    whole = bench("whole")
    sizes = {"vocab_size": 64, "num_hidden_layers": 2}
    monkeypatch.setattr(whole, "CONFIG", whole.CONFIG | sizes)
    return whole


def test_a_patched_model_is_timed_in_two_parts(run, small_model, device, capsys):
    status, _, rows = run("--op", "model", "--shapes", "smollm2-135m@24x2")
    assert status == 0
    names = [(row["op"], row["impl"]) for row in rows]
    parts = ("model_prefill", "model_decode")
    assert names == [(part, impl) for part in parts for impl in ("ours", "sdpa")]
    assert all(row["x_sdpa"] == 1 for row in rows if row["impl"] == "sdpa")
    assert {row["dtype"] for row in rows} < {"float32", "bfloat16"}
    printed = capsys.readouterr().out
    assert "a patched model, prefill" in printed and "a patched model, decode" in printed


def test_a_model_with_other_logits_gets_no_number(run, small_model, device, monkeypatch):
    monkeypatch.setattr(small_model, "TOLERANCE", {"float32": 0.0})
    arguments = ("--op", "model", "--shapes", "smollm2-135m@24", "--dtype", "float32")
    status, header, rows = run(*arguments)
    assert status == 1 and not rows and "expected logits within 0.0" in header["wrong"][0]


@pytest.mark.parametrize("factor", [1.002, float("nan")])
def test_agreement_is_by_the_worst_call(small_model, device, factor):
    right = [torch.ones(8), torch.ones(8)]
    sides = {name: small_model.Side(None, None, None, 1) for name in ("ours", "sdpa")}
    sides["ours"].logits, sides["sdpa"].logits = [right[0], right[1] * factor], right
    with pytest.raises(AssertionError, match="tiny: expected logits"):
        small_model.check_agreement("tiny", sides, 1e-3)
    sides["ours"].logits = list(right)
    small_model.check_agreement("tiny", sides, 1e-3)
    assert not sides["ours"].logits and not sides["sdpa"].logits


def test_without_transformers_the_model_is_not_here(run, device, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, rows = run("--op", "model")
    assert status == 0 and not rows
    assert "model smollm2-135m@4096: not here: " in capsys.readouterr().out


def test_another_model_is_not_here(run, device, capsys):
    status, _, rows = run("--op", "model", "--shapes", "gpt2@16")
    assert status == 0 and not rows
    assert "model gpt2@16: not here: expected smollm2-135m" in capsys.readouterr().out


def test_the_whole_table_is_the_default_of_a_cpu(run, device):
    """One shape for each goal; after the time none is begun, and all are named."""
    _, header, rows = run("--within", "-1")
    assert not rows
    assert {
        "attention smollm2-135m@2048 bfloat16 causal",
        "attention smollm2-135m@2048 bfloat16 full",
        "attention_bwd gpt2@512 float32",
        "decode llama3-8b@4096 bfloat16",
        "overhead smollm2-135m@16 float32",
        "padded gpt2@512x4 bfloat16",
        "window smollm2-135m@8192 bfloat16",
        "memory one-hd64@32768 bfloat16",
        "model smollm2-135m@4096 auto",
    } <= set(header["left_out"])


def test_the_picture_tells_full_from_causal(bench, device):
    mask_of = bench("picture").mask_of
    assert mask_of({"op": "attention", "causal": False}).strip() == "full"
    assert mask_of({"op": "attention", "causal": True}) == ""
    assert mask_of({"op": "decode", "causal": False}) == ""
