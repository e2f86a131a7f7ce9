"""The heuristic dataflow: the table and its refusals, the choice. test_inflection.py has how points
follow from curves, test_tune.py the command that measures."""

import json
import math
import sys
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from flashinfer_lite import dataflow, explain
from flashinfer_lite.dataflow import Entry, Table, TableError
from flashinfer_lite.dataflow.choice import DEFAULTS
from flashinfer_lite.testing import AMX_EMULATED, force_isa, isa_levels

# The table


@pytest.fixture(autouse=True)
def _nothing_in_force(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHINFER_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHINFER_LITE_TUNED", raising=False)
    dataflow.unload()
    torch._dynamo.reset()
    yield
    monkeypatch.undo()
    dataflow.unload()


def here():
    return dataflow.device_key("cpu", torch.get_num_threads())


def make_table(shapes=((64, 32),), m1=2, m2=5, dtype="float32", **fields):
    seconds = {"gemv": (1.0, 2.0, 5.0, 8.0), "flat_gemm": (3.0,) * 4, "vendor": (4.0,) * 4}
    measured = {name: dict(zip((1, 2, 5, 8), of, strict=True)) for name, of in seconds.items()}
    entries = {(dtype, n, k): Entry(m1, m2, measured, 7) for n, k in shapes}
    return Table(fields.pop("device", here()), entries, **fields)


def test_table_round_trip(tmp_path):
    table = make_table([(64, 32), (8, 4096)], contention="load average 3")
    del table.entries["float32", 64, 32].curves["gemv"][5]  # pruned: not every M has every kernel
    table.save(tmp_path / "new" / "table.json")
    assert Table.load(tmp_path / "new" / "table.json") == table
    assert Table.load(tmp_path / "new" / "table.json", here()) == table
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]


def test_saving_keeps_what_else_is_in_the_file(tmp_path):
    path = tmp_path / "table.json"
    make_table([(64, 32)], device="cpu, other").save(path)
    make_table([(64, 32), (8, 8)]).save(path)
    make_table([(64, 32)], m1=1, dtype="bfloat16").save(path)
    make_table([(8, 8)], m1=0).save(path)
    found = Table.load(path).entries
    assert {key: entry.m1 for key, entry in found.items()} == {
        ("bfloat16", 64, 32): 1,
        ("float32", 64, 32): 2,
        ("float32", 8, 8): 0,
    }
    assert len(Table.load(path, "cpu, other").entries) == 1


def test_saving_drops_what_is_stale_or_damaged(tmp_path):
    path = tmp_path / "table.json"
    make_table([(64, 32)], torch="1.0").save(path)
    make_table([(8, 8)]).save(path)
    assert list(Table.load(path).entries) == [("float32", 8, 8)]
    path.write_text('{"schema": 1, "dev')
    make_table([(8, 8)]).save(path)
    assert list(Table.load(path).entries) == [("float32", 8, 8)]


def change(*keys, to):
    """A function that sets content[keys...] = to, in the section of this machine."""

    def apply(content):
        inner = content["devices"][here()]
        for key in keys[:-1]:
            inner = inner[key]
        if to is None:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = to

    return apply


SHAPE = ("shapes", "float32 64,32")
REFUSED = {
    "schema": (lambda content: content.update(schema=99), "stale: schema 99"),
    "torch": (change("torch", to="1.0"), "stale: measured with torch 1.0"),
    "library": (change("library", to="9.9"), "stale: measured with flashinfer_lite 9.9"),
    "kernels": (change("kernel_version", to=0), "stale: .*kernels 0"),
    "device": (lambda c: c.update(devices={"cpu, x": c["devices"][here()]}), "foreign: .*cpu, x"),
    "no devices": (lambda content: content.update(devices={}), "foreign: "),
    "no version": (change("torch", to=None), "damaged: .*torch"),
    "no schema": (lambda content: content.pop("schema"), "damaged: no schema"),
    "devices a list": (lambda content: content.update(devices=[]), "damaged: no devices"),
    "section a list": (lambda content: content["devices"].update(x=[]), "damaged: .*x"),
    "no shapes": (change("shapes", to=None), "damaged: .*shapes"),
    "shape's name": (change("shapes", "float32 64", to={}), "damaged: .*float32 64"),
    "dtype": (change("shapes", "int8 64,32", to={}), "damaged: .*int8"),
    "M1 > M2": (change(*SHAPE, "m1", to=6), "damaged: .*m1 = 6"),
    "M1 a float": (change(*SHAPE, "m1", to=1.0), "damaged: .*integers"),
    "M1 negative": (change(*SHAPE, "m1", to=-1), "damaged: .*integers"),
    "M1 a bool": (change(*SHAPE, "m1", to=True), "damaged: .*integers"),
    "no M2": (change(*SHAPE, "m2", to=None), "damaged: .*m2"),
    "curve's length": (change(*SHAPE, "seconds", "gemv", to=[1.0]), "damaged: .*gemv"),
    "curve's value": (change(*SHAPE, "seconds", "gemv", to=[math.nan] * 4), "damaged: .*gemv"),
    "M not ascending": (change(*SHAPE, "m", to=[1, 2, 8, 5]), "damaged: .*integers"),
    "kernel": (change(*SHAPE, "seconds", "magic", to=[1.0] * 4), "damaged: .*magic"),
}


def refused_file(path, name):
    make_table().save(path)
    content = json.loads(path.read_text())
    REFUSED[name][0](content)
    path.write_text(json.dumps(content))
    return REFUSED[name][1]


@pytest.mark.parametrize("name", REFUSED)
def test_load_refuses(name, tmp_path):
    reason = refused_file(tmp_path / "table.json", name)
    for load in (Table.load, dataflow.load):
        with pytest.raises(TableError, match=reason) as caught:
            load(tmp_path / "table.json")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"schema": 1', "\0", "[" * 100000])
def test_load_refuses_what_is_no_table(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(TableError, match="^damaged: "):
        Table.load(tmp_path / "table.json")


def test_load_refuses_unreadable_files(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff\xfe{}")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "latin"):
        with pytest.raises(TableError, match="^(cannot be read|damaged): "):
            Table.load(path)


# The choice


def choices(n=64, k=32, dtype=torch.float32):
    return [dataflow.choose("cpu", dtype, n, k, m) for m in (1, 2, 3, 5, 6, 64)]


TUNED = ["gemv", "gemv", "flat_gemm", "flat_gemm", "vendor", "vendor"]  # (M1, M2) = (2, 5)


def shipped():
    return [
        "gemv" if m <= m1 else "flat_gemm" if m <= m2 else "vendor"
        for (m1, m2) in [dataflow.thresholds("cpu", torch.float32, 64, 32)]
        for m in (1, 2, 3, 5, 6, 64)
    ]


def test_a_table_in_the_cache_is_applied(tmp_path):
    make_table(m1=2, m2=5).save(tmp_path / "cache" / "tuned.json")
    assert choices() == TUNED
    why = dataflow.explain_choice("cpu", torch.float32, 64, 32, 3)
    assert why.startswith("M = 3, M1 = 2, M2 = 5 for [64, 32] by ") and "tuned.json" in why
    explained = explain("flat_linear", torch.ones(3, 32), torch.ones(64, 32))
    assert explained.kernel.startswith("flat_linear flat_gemm cpu")
    assert explained.rejected["gemv"] == explained.rejected["vendor"] == why


def test_a_table_in_the_environment_is_applied(tmp_path, monkeypatch):
    make_table(m1=9, m2=9).save(tmp_path / "cache" / "tuned.json")
    make_table(m1=2, m2=5).save(tmp_path / "mine.json")
    monkeypatch.setenv("FLASHINFER_LITE_TUNED", str(tmp_path / "mine.json"))
    assert choices() == TUNED


def test_the_file_is_read_once(tmp_path):
    path = tmp_path / "cache" / "tuned.json"
    make_table(m1=2, m2=5).save(path)
    assert choices() == TUNED
    path.unlink()
    assert choices() == TUNED and choices(n=640) == TUNED
    dataflow.unload()
    assert dataflow.in_force("cpu").table is None


def test_unknown_shapes_go_by_the_nearest(tmp_path):
    table = make_table([(64, 64)], m1=1, m2=1)
    table.entries |= make_table([(4096, 64)], m1=2, m2=2).entries
    table.entries |= make_table([(64, 4096)], m1=3, m2=3).entries
    table.entries |= make_table([(64, 64)], m1=50, m2=50, dtype="bfloat16").entries
    table.save(tmp_path / "cache" / "tuned.json")
    for (n, k), m1 in {(64, 64): 1, (100, 90): 1, (3000, 60): 2, (50, 9000): 3}.items():
        assert dataflow.thresholds("cpu", torch.float32, n, k) == (m1, m1)
    assert dataflow.thresholds("cpu", torch.bfloat16, 4096, 64) == (50, 50)
    # A dtype that was not measured has the shipped default, and says so.
    why = dataflow.explain_choice("cpu", torch.float16, 64, 64, 1)
    assert "shipped default" in why and "nothing in float16" in why


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_table_warns_once_and_is_not_applied(name, tmp_path, monkeypatch):
    expected = shipped()
    dataflow.unload()
    path = tmp_path / "mine.json"
    reason = refused_file(path, name)
    monkeypatch.setenv("FLASHINFER_LITE_TUNED", str(path))
    with pytest.warns(UserWarning, match=reason) as caught:
        assert choices() == expected
        choices(n=640)
    (warning,) = caught
    command = f"python -m flashinfer_lite tune --model DIR --threads {torch.get_num_threads()}"
    for text in (str(path), f"{command} --output {path}"):
        assert text in str(warning.message)
    why = explain("flat_linear", torch.ones(9, 32), torch.ones(64, 32)).rejected["gemv"]
    assert "shipped default" in why and dataflow.in_force("cpu").refusal in why


def test_a_file_that_was_asked_for_and_is_absent_warns(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choices()  # no file in the cache folder is the usual case
    monkeypatch.setenv("FLASHINFER_LITE_TUNED", str(tmp_path / "absent.json"))
    dataflow.unload()
    with pytest.warns(UserWarning, match="absent.json is not applied: cannot be read"):
        choices()


def test_a_table_of_another_number_of_threads_is_foreign(tmp_path, monkeypatch):
    make_table().save(tmp_path / "mine.json")
    monkeypatch.setenv("FLASHINFER_LITE_TUNED", str(tmp_path / "mine.json"))
    assert choices() == TUNED
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=rf"foreign: .*this is .*{threads + 1} threads"):
            choices()
    finally:
        torch.set_num_threads(threads)
    assert choices() == TUNED


def test_explicit_load(tmp_path, monkeypatch):
    make_table(m1=9, m2=9).save(tmp_path / "environment.json")
    monkeypatch.setenv("FLASHINFER_LITE_TUNED", str(tmp_path / "environment.json"))
    table = make_table(m1=2, m2=5)
    table.save(tmp_path / "mine.json")
    assert dataflow.load(tmp_path / "mine.json") == table
    assert choices() == TUNED
    with pytest.raises(TableError, match="cannot be read"):
        dataflow.load(tmp_path / "absent.json")
    assert choices() == TUNED
    dataflow.unload()
    assert choices() == ["gemv"] * 5 + ["vendor"]


@pytest.mark.parametrize("processor", DEFAULTS)
def test_shipped_defaults(processor, monkeypatch):
    level = AMX_EMULATED if processor == "cpu amx" else "baseline"
    if level not in isa_levels(emulated=True):
        pytest.skip(f"no {level} here")
    capability = "AVX2" if processor == "cpu" else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with force_isa(level):
        for dtype, shapes in DEFAULTS[processor].items():
            for (n, k), points in shapes.items():
                assert 0 <= points[0] <= points[1]
                assert dataflow.thresholds(processor.split()[0], dtype, n, k) == points


def test_what_amx_does_not_change_has_the_default_without(monkeypatch):
    if AMX_EMULATED not in isa_levels(emulated=True):
        pytest.skip(f"no {AMX_EMULATED} here")
    for capability, processor in (("AVX2", "cpu"), ("AVX512", "cpu avx512")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        dataflow.unload()
        with force_isa(AMX_EMULATED):
            for dtype in (torch.float32, torch.float16):
                (n, k), points = next(iter(DEFAULTS[processor][dtype].items()))
                assert dataflow.thresholds("cpu", dtype, n, k) == points
            chosen = [dataflow.choose("cpu", torch.bfloat16, 64, 64, m) for m in (1, 2, 64, 129)]
        assert chosen == ["gemv", "flat_gemm", "flat_gemm", "vendor"]


def test_what_only_the_vendor_takes():
    for device_type, dtype in (("cpu", torch.float64), ("cuda", torch.float32), ("meta", None)):
        assert dataflow.choose(device_type, dtype, 4096, 4096, 1) == "vendor"
    assert dataflow.choose("cpu", torch.float32, 0, 64, 1) == "vendor"
    assert dataflow.choose("cpu", torch.float32, 64, 0, 1) == "vendor"


class NoOps(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"tensor work: {function}")


def test_choosing_allocates_nothing_and_touches_no_tensor():
    def choose_often(times):
        for _ in range(times):
            dataflow.choose("cpu", torch.float32, 640, 320, 3)

    choose_often(10)
    before = sys.getallocatedblocks()
    with NoOps():
        choose_often(1000)
    assert sys.getallocatedblocks() - before < 100


def planted(x, weight):
    """What flat_linear does with the choice, told apart by its factor."""
    kernel = dataflow.choose(x.device.type, x.dtype, *weight.shape, x.shape[0])
    return x @ weight.T * {"gemv": 1.0, "flat_gemm": 2.0, "vendor": 3.0}[kernel]


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("warm", [False, True])
def test_choosing_under_compile(dynamic, warm, tmp_path):
    table = make_table([(64, 32)], m1=2, m2=5)
    table.entries |= make_table([(16, 32)], m1=0, m2=3).entries
    table.save(tmp_path / "cache" / "tuned.json")
    ms = (1, 4, 9) if dynamic is False else range(2, 12)
    weights = [torch.ones(n, 32) for n in (64, 16)]
    expected = {}
    if warm:
        expected = {(m, w): planted(torch.ones(m, 32), w) for m in ms for w in weights}
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(planted, fullgraph=True, dynamic=dynamic, backend=counter)
    got = {(m, w): step(torch.ones(m, 32), w) for m in ms for w in weights}
    expected = expected or {(m, w): planted(torch.ones(m, 32), w) for m in ms for w in weights}
    for key, out in got.items():
        assert torch.equal(out, expected[key])
    # One graph for a shape and kernel, and one more while dynamo makes M a symbol.
    assert counter.frame_count <= (6 if dynamic is not None else 8)


def test_refusal_under_compile(tmp_path, monkeypatch):
    refused_file(tmp_path / "mine.json", "torch")
    monkeypatch.setenv("FLASHINFER_LITE_TUNED", str(tmp_path / "mine.json"))
    step = torch.compile(planted, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="mine.json is not applied"):
        out = step(torch.ones(3, 32), torch.ones(64, 32))
    assert torch.equal(out, planted(torch.ones(3, 32), torch.ones(64, 32)))
