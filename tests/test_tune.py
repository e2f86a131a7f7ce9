"""Measuring the dataflow's table: the order of measurement, the command, its errors, its check."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from flashinfer_lite import dataflow
from flashinfer_lite.__main__ import main
from flashinfer_lite.dataflow import choice, measure, tuning
from flashinfer_lite.dataflow.plot import plot
from flashinfer_lite.dataflow.shapes import model_shapes, parse_shape

CPU = torch.device("cpu")
KERNELS = ("gemv", "flat_gemm", "vendor")


@pytest.fixture(autouse=True)
def _nothing_in_force(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHINFER_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHINFER_LITE_TUNED", raising=False)
    dataflow.unload()
    yield
    monkeypatch.undo()
    dataflow.unload()


def made_up(gemv, flat_gemm, vendor):
    """Kernels whose calls return the seconds they are said to take; see `told`."""
    functions = zip(KERNELS, (gemv, flat_gemm, vendor), strict=True)
    return {name: (lambda x, weight, f=f: float(f(x.shape[0]))) for name, f in functions}


def told(run):
    """A clock that believes the call."""
    return run()


# gemv to 9, flat_gemm to 37, both between two M of the grid
CROSSING = made_up(lambda m: m, lambda m: 9.5, lambda m: 20 if m < 38 else 5)


def test_grid():
    assert tuning.grid(64) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert tuning.grid(1) == [1]
    assert tuning.grid(5) == [1, 2, 3, 4, 5]
    assert tuning.grid(200)[-4:] == [96, 128, 192, 200]


def test_points_between_two_m_of_the_grid_are_found():
    entry = tuning.tune_shape(CROSSING, 8, 8, dtype=torch.float32, device=CPU, clock=told)
    assert entry.m1 == 9 and 36 <= entry.m2 < 40
    assert {9, 10, 11, 36, 40} <= set(entry.curves["vendor"])
    assert entry.rounds == measure.MAX_ROUNDS


def test_the_order_of_measurement():
    calls = []

    def run(name):
        return lambda x, weight: calls.append((name, x.shape[0], weight.data_ptr())) or 1.0

    runs = {name: run(name) for name in KERNELS}
    times = measure.measure(
        runs, 16, 16, [1, 2, 5], dtype=torch.float32, device=CPU, seconds=9, clock=told
    )
    rounds = measure.MAX_ROUNDS
    assert all(len(s) == rounds for of_m in times.values() for s in of_m.values())
    assert len(calls) == 9 * (rounds + 1)  # one round is not timed
    triples = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    for triple in triples:  # the kernels of an M back to back
        assert len({m for _, m, _ in triple}) == 1
        assert {name for name, _, _ in triple} == set(KERNELS)
    assert len({tuple(name for name, _, _ in triple) for triple in triples}) == 6
    # Every weight comes back only after all others, which are four times the cache.
    weights = [weight for _, _, weight in calls]
    copies = len(set(weights))
    assert copies * 16 * 16 * 4 >= 4 * measure.last_level_bytes(CPU) or copies >= len(calls)
    for i in range(len(weights) - copies):
        assert weights[i + copies] == weights[i] and weights[i] not in weights[i + 1 : i + copies]


def test_the_hopeless_are_left_out():
    runs = made_up(lambda m: m if m < 16 else 9, lambda m: 2, lambda m: 3)
    options = {"dtype": torch.float32, "device": CPU, "seconds": 9, "clock": told}
    times = measure.measure(runs, 8, 8, [1, 7, 16], **options)
    counted = {m: {name: len(s) for name, s in of_m.items()} for m, of_m in times.items()}
    most, few = measure.MAX_ROUNDS, measure.PRUNE_AFTER
    assert counted[1] == {"gemv": most, "flat_gemm": most, "vendor": few}
    assert counted[7] == {"gemv": few, "flat_gemm": most, "vendor": most}
    assert counted[16] == {"gemv": 1, "flat_gemm": most, "vendor": most}  # seconds: long enough
    times = measure.measure(runs, 8, 8, [1, 7, 16], prune=False, **options)
    assert all(len(s) == most for of_m in times.values() for s in of_m.values())


def test_time_is_bounded():
    def slow(x, weight):
        time.sleep(0.01)

    runs = dict.fromkeys(KERNELS, slow)
    start = time.perf_counter()
    times = measure.measure(runs, 8, 8, [1, 2], dtype=torch.float32, device=CPU, seconds=0.1)
    # One round untimed and one timed there always are, 0.06 s each here.
    assert all(1 <= len(s) <= 5 for of_m in times.values() for s in of_m.values())
    assert time.perf_counter() - start < 20


def test_a_call_put_off_the_cpu_is_timed_again(monkeypatch):
    for counts, calls in (([5, 5], 1), ([5, 6, 6, 6], 2), (range(99), measure.TRIES)):
        counted, made = iter(counts), []
        monkeypatch.setattr(measure, "preemptions", lambda counted=counted: next(counted))
        seconds = measure.wall_seconds(lambda made=made: time.sleep(made.append(1) or 0.01))
        assert len(made) == calls and 0.01 <= seconds < 5


def test_one_thread_is_timed_by_its_own_work():
    assert measure.thread_seconds(lambda: time.sleep(0.2)) < 0.1
    assert measure.thread_seconds(lambda: sum(range(10**6))) > 1e-3


def test_contention_is_said():
    quiet = measure.Contention(1)
    quiet.load, quiet.before = 0.0, measure.preemptions() + 10**6
    assert quiet.text() == ""
    quiet.load = 64.0
    assert re.search(r"load average 64.0 plus our 1 threads on \d+ CPUs", quiet.text())
    quiet.before -= 2 * 10**6
    assert re.search(r"put off the CPU \d+ times a second", quiet.text())


@pytest.fixture
def believed(monkeypatch):
    """Sets the kernels that the command measures; its clock believes what their calls return."""
    monkeypatch.setattr(measure, "clock_of", lambda device: told)
    return lambda runs: monkeypatch.setattr(measure, "implementations", lambda: runs)


def test_tune_and_load(tmp_path, believed):
    runs = made_up(lambda m: 1, lambda m: 2, lambda m: 4)
    table = dataflow.tune([(8, 8), (16, 8)], dtype=torch.float32, max_m=4, seconds=0.1, runs=runs)
    assert {key: (e.m1, e.m2) for key, e in table.entries.items()} == {
        ("float32", 8, 8): (4, 4),
        ("float32", 16, 8): (4, 4),
    }
    table.save(tmp_path / "tuned.json")
    assert dataflow.load(tmp_path / "tuned.json") == table
    assert dataflow.choose("cpu", torch.float32, 8, 8, 4) == "gemv"
    assert dataflow.choose("cpu", torch.float32, 8, 8, 5) == "vendor"


# Which shapes


def test_parse_shape():
    assert parse_shape("576,1536") == (576, 1536)
    for text in ("", "5", "5,", "5,0", "-5,3", "5x3", "5,3,1", "a,b", "1.5,2"):
        with pytest.raises(ValueError, match=f"expected N,K .*got '{text}'"):
            parse_shape(text)


def write_config(folder, **changes):
    fields = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 96,
        "dtype": "float32",
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(fields | changes))
    return folder


def test_shapes_of_a_model(tmp_path):
    shapes, dtype = model_shapes(write_config(tmp_path))
    assert dtype == torch.float32
    assert shapes == {
        (24, 48): ["k_proj", "v_proj"],
        (48, 48): ["o_proj", "q_proj"],
        (48, 80): ["down_proj"],
        (80, 48): ["gate_proj", "up_proj"],
        (96, 48): ["lm_head"],
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


def test_shapes_of_a_model_with_fused_projections(tmp_path):
    shapes, dtype = model_shapes(write_config(tmp_path, model_type="phi3", dtype="bfloat16"))
    assert dtype == torch.bfloat16
    assert shapes[96, 48] == ["lm_head", "qkv_proj"]  # (4 + 2 x 2) heads of 12
    assert shapes[160, 48] == ["gate_up_proj"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model_type": "nosuch"}', '{"model_type": 5}'])
def test_what_is_no_model(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="^expected a causal language model in .*, got: .+") as e:
        model_shapes(tmp_path)
    assert "\n" not in str(e.value)


# The command


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "--model or --shapes: expected one of them, got neither"),
        ("--shapes 5", "--shapes: expected N,K with integers >= 1, got '5'"),
        ("--shapes 8,8 --threads 0", "--threads: expected an integer from 1 to 4096, got 0"),
        ("--shapes 8,8 --max-m 0", "--max-m: expected an integer from 1 to 4096, got 0"),
        ("--shapes 8,8 --max-m x", "--max-m: invalid int value: 'x'"),
        ("--shapes 8,8 --seconds 0", "--seconds: expected more than 0, got 0.0"),
        ("--shapes 8,8 --seconds nan", "--seconds: expected more than 0, got nan"),
        ("--shapes 8,8 --dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--shapes 8,8 --device tpu", "--device: invalid choice: 'tpu'"),
        ("--shapes 8,8 --output .", "--output: expected a file, got the folder ."),
        ("--shapes 8,8 --plot no/such/x.png", "--plot: expected a file in a folder that exists"),
        ("--model /nosuch", "--model: expected a folder with a config.json, got /nosuch"),
        ("--check --plot x.png", "--check: expected neither --output nor --plot"),
        ("--check", "--check: expected --model, --shapes or a table in force, got none"),
    ],
)
def test_errors_are_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["tune", *arguments.split()])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert text in err and err.count("\n") == 1 and not out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_error_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--shapes", "8,8", "--device", "cuda"])
    assert re.search(r"--device: expected cpu, .*sees no GPU, got cuda\n$", capsys.readouterr().err)


def test_error_without_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main(["tune", "--shapes", "8,8", "--plot", str(tmp_path / "x.png")])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_output_that_cannot_be_written(believed, capsys, tmp_path):
    believed(CROSSING)
    (tmp_path / "file").touch()
    arguments = ["--shapes", "8,8", "--max-m", "1", "--output", str(tmp_path / "file" / "x.json")]
    assert main(["tune", *arguments]) == 2
    assert "--output: expected a file to write, got " in capsys.readouterr().err


def test_tune_command(believed, capsys, tmp_path):
    believed(made_up(lambda m: 1, lambda m: 2, lambda m: 4))
    arguments = "--shapes 8,8 16,8 --dtype float32 bfloat16 --max-m 2 --seconds 0.1 --threads 1"
    assert main(["tune", *arguments.split(), "--plot", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    path = tmp_path / "cache" / "tuned.json"
    for text in (f"saved: {path}", "in force from the next process on", "x.png", "1 thread;"):
        assert text in out
    assert out.count("gemv to M1 = 2, flat_gemm to M2 = 2") == 4
    found = dataflow.Table.load(path, dataflow.device_key("cpu", 1))
    assert len(found.entries) == 4
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    # Another run adds to the table, and replaces what is damaged, saying so.
    path.write_text("{")
    assert main(["tune", *arguments.split()[:2], "--max-m", "1", "--seconds", "0.1"]) == 0
    assert re.search("replacing .*: damaged: not JSON", capsys.readouterr().out)
    elsewhere = ["--output", str(tmp_path / "other.json")]
    assert main(["tune", *arguments.split()[:2], "--max-m", "1", *elsewhere]) == 0
    assert f"export FLASHINFER_LITE_TUNED={tmp_path / 'other.json'}" in capsys.readouterr().out


def test_an_interruption_keeps_what_was_measured(believed, tmp_path):
    def interrupt(x, weight):
        if weight.shape[0] == 16:
            raise KeyboardInterrupt
        return 1.0

    believed(dict.fromkeys(KERNELS, interrupt))
    with pytest.raises(KeyboardInterrupt):
        main(["tune", "--shapes", "8,8", "16,8", "--max-m", "1", "--seconds", "0.1"])
    found = dataflow.Table.load(tmp_path / "cache" / "tuned.json")
    assert list(found.entries) == [("bfloat16", 8, 8)]


@pytest.mark.parametrize(
    ("auto", "failed"),
    [(lambda m: 1.0, []), (lambda m: 1.02, []), (lambda m: 1.5 if m == 3 else 1.0, [3])],
)
def test_check(auto, failed):
    runs = made_up(lambda m: 1, lambda m: 2, lambda m: 3)
    runs["auto"] = lambda x, weight: auto(x.shape[0])
    options = {"dtype": torch.float32, "device": CPU, "max_m": 4, "clock": told}
    found = list(tuning.check_shape(runs, 8, 8, **options))
    assert [one.m for one in found] == [1, 2, 3, 4]
    assert [one.m for one in found if one.failed] == failed
    for one in found:
        assert one.best == "gemv" and one.ratio == pytest.approx(1 / auto(one.m))


def test_a_slow_moment_fails_no_check():
    calls = {"auto": 0}

    def auto(x, weight):
        calls["auto"] += 1
        return 9.0 if calls["auto"] < 30 else 1.0  # slow in most of the first measurement

    runs = made_up(lambda m: 1, lambda m: 2, lambda m: 3) | {"auto": auto}
    options = {"dtype": torch.float32, "device": CPU, "max_m": 1, "clock": told}
    (found,) = tuning.check_shape(runs, 8, 8, **options)
    assert not found.failed and found.ratio == 1.0 and calls["auto"] > 60


@pytest.mark.parametrize(("auto", "status"), [(1.0, 0), (4.0, 1)])
def test_check_command(auto, status, believed, monkeypatch, capsys):
    believed(made_up(lambda m: 1, lambda m: 2, lambda m: 4))
    monkeypatch.setattr("flashinfer_lite.gemm.flat_linear", lambda x, w: auto)
    assert main("tune --shapes 8,8 --dtype float32 --max-m 2".split()) == 0
    dataflow.unload()
    assert main(["tune", "--check", "--max-m", "2"]) == status
    out = capsys.readouterr().out
    mean = 1 / auto
    assert f"auto/best: geometric mean {mean:.3f}, worst {mean:.3f} at [8, 8] M = 1 (gemv, " in out
    assert f"{2 * status} of 2 below 0.97 outside the noise" in out


def test_plot_refuses_an_empty_table(tmp_path):
    with pytest.raises(ValueError, match="^table: "):
        plot(dataflow.Table("cpu"), tmp_path / "x.png")


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "flashinfer_lite", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_help():
    done = command("tune", "--help")
    assert done.returncode == 0
    for option in ("--model", "--shapes", "--threads", "--check", "examples:", "2311.01282"):
        assert option in done.stdout


def test_doctor_says_which_table_is_in_force(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cache" / "tuned.json"
    assert choice.report() == [f"cpu: shipped defaults; {path}: no such file"]
    table = dataflow.Table(dataflow.device_key("cpu", torch.get_num_threads()))
    table.save(path)
    dataflow.unload()
    (line,) = choice.report()
    assert line.startswith(f"cpu: {path}, 0 shapes, 20")
    path.write_text("{")
    dataflow.unload()
    lines = choice.report()
    assert "damaged" in lines[0] and lines[1].startswith("to measure: python -m flashinfer_lite ")
    done = command("doctor")
    assert done.returncode == 0
    assert re.search(r"^dataflow +cpu: shipped defaults; .*damaged", done.stdout, re.MULTILINE)
