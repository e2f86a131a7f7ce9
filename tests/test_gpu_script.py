"""scripts/test_gpu.py without a GPU: what it refuses, its arithmetic, a dry run of all of it."""

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "test_gpu.py"
STAGES = ["doctor", "tests", "golden", "sanitizer", "graph", "flat", "bench"]


@pytest.fixture
def script(monkeypatch):
    """Import test_gpu.py or a module of scripts/gpu by name, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in ("gpu", "test_gpu", "smi") or name.startswith("gpu."):
            del sys.modules[name]


@pytest.fixture
def run(script, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FLASHINFER_LITE_COMMIT": "abc"}
    return script("gpu.stages").Run(tmp_path, environment, dry=True)


def start(*arguments, **environment):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_a_dry_run_walks_every_stage(device, tmp_path):
    done = start("--dry-run", "--commit", "abc123", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu-none-dry-run.json").read_text())
    assert result["schema"] == 1 and result["dry_run"] and result["commit"] == "abc123"
    assert [stage["stage"] for stage in result["stages"]] == STAGES
    for stage in result["stages"]:
        assert stage["status"] == "passed" and stage["seconds"] <= stage["limit_s"], stage
        assert stage["summary"] and stage["summary"] in done.stdout
    tests = next(stage for stage in result["stages"] if stage["stage"] == "tests")
    assert "bfloat16" in tests["details"]["support"]["cpu"]["merge_states"]["forward"]
    assert result["machine"]["self_test"] and set(result["clocks"]) == {"before", "after"}
    assert len(result["sources_sha256"]) == 64 and result["libraries_sha256"]["_C_cpu.abi3.so"]
    assert {row["op"] for row in result["rows"]} == {"attention", "attention_bwd", "decode"}
    assert len(result["comparisons"]) == 4
    assert "x flash" in done.stdout and "of 4 problems" in done.stdout
    logs = (tmp_path / "gpu-logs.txt").read_text()
    assert all(f"==== {name}\n" in logs for name in ("doctor", "tests", "golden", "bench"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_what_is_missing(device):
    done = start()
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("test-gpu: no GPU") and done.stderr.count("\n") == 1
    assert "docs/gpu.md" in done.stderr


def test_unknown_stages_are_refused(device):
    for stages in ("doctor,nosuch", ","):
        done = start("--stage", stages)
        assert done.returncode == 2 and "--stage: expected some of doctor, tests" in done.stderr


def test_the_limits_fit_into_one_call(device, script):
    stages = script("gpu.stages")
    assert list(stages.STAGES) == STAGES
    assert sum(limit for _, limit in stages.STAGES.values()) <= script("test_gpu").BUDGET_S == 540
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in stages.TEST_FILES)


def test_a_failed_stage_stops_no_other(device, script, run, capsys, monkeypatch, tmp_path):
    module, stages = script("test_gpu"), script("gpu.stages")

    def breaks(run, seconds):
        raise OSError("disk full")

    def passes(run, seconds):
        return stages.outcome(True, "fine")

    monkeypatch.setattr(stages, "STAGES", {"first": (breaks, 5), "second": (passes, 5)})
    args = module.parse_arguments(["--dry-run", "--output", str(tmp_path / "r.json")])
    assert args.stages == ["first", "second"]
    assert module.verify(args, run) == 1
    outcomes = json.loads((tmp_path / "r.json").read_text())["stages"]
    assert [o["status"] for o in outcomes] == ["failed", "passed"]
    assert outcomes[0]["summary"] == "OSError: disk full"
    args.budget = 0
    assert module.verify(args, run) == 1
    assert "no time left of --budget" in capsys.readouterr().out


def test_a_command_out_of_time_is_killed_with_its_children(device, run, capsys):
    child = "import os, time; os.fork(); print('begun', flush=True); time.sleep(60)"
    started = time.monotonic()
    assert run.command("slow", [sys.executable, "-c", child], 3) is None
    assert time.monotonic() - started < 30
    assert "begun" in run.logs["slow"]
    assert "slow: out of time" in capsys.readouterr().out
    assert run.command("wrong", [sys.executable, "-c", "raise SystemExit(7)"], 30) == 7


def test_libraries_are_required_and_their_age_is_known(device, script, run, monkeypatch, tmp_path):
    module = script("test_gpu")
    libraries = [tmp_path / "_C_cpu.abi3.so", tmp_path / "_C_cuda.abi3.so"]
    monkeypatch.setattr(module, "LIBRARIES", libraries)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # where no nvcc is, whatever is elsewhere
    libraries[0].touch()
    for prebuilt, text in ((True, "no _C_cuda.abi3.so"), (False, "no nvcc in CUDA_HOME=")):
        with pytest.raises(module.Missing, match=text):
            module.require_libraries(run, prebuilt)
    libraries[1].touch()
    module.require_libraries(run, prebuilt=False)
    os.utime(libraries[1], (0, 0))
    with pytest.raises(module.Missing, match=r"_C_cuda.abi3.so \(stale\)"):
        module.require_libraries(run, prebuilt=False)
    module.require_libraries(run, prebuilt=True)


@pytest.mark.parametrize(
    ("source", "stale"),
    [
        ("setup.py", {"cpu", "cuda"}),
        ("scripts/build_graph.py", {"cpu", "cuda"}),
        ("scripts/build_simt.py", set()),
        ("csrc/common/types.h", {"cpu", "cuda"}),
        ("csrc/ops/check.h", {"cpu", "cuda"}),
        ("csrc/ops/decode_cpu.cpp", {"cpu"}),
        ("csrc/cpu/kernels/table.h", {"cpu"}),
        ("csrc/ops/runtime_cuda.h", {"cuda"}),
        ("csrc/common/params/attention_cuda.h", {"cuda"}),
        ("csrc/cuda/dispatch.cpp", {"cuda"}),
        ("csrc/instances.py", {"cuda"}),
        ("csrc/__pycache__/instances.cpython-311.pyc", set()),
        ("csrc/simt/barrier.cpp", set()),
    ],
)
def test_a_library_is_stale_by_its_own_sources(
    device, script, monkeypatch, tmp_path, source, stale
):
    module, built, changed = script("test_gpu"), tmp_path / "built", tmp_path / source
    monkeypatch.setattr(module, "ROOT", tmp_path)
    libraries = {half: tmp_path / f"_C_{half}.abi3.so" for half in ("cpu", "cuda")}
    for path in (tmp_path / "setup.py", built, changed, *libraries.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (100, 200 if path == changed else 100))
    assert {half for half, path in libraries.items() if module.is_stale(path)} == stale
    for path in libraries.values():  # a build that compiled nothing
        script("build_graph").place(built, path, as_of=300)
    assert not any(map(module.is_stale, libraries.values()))


def test_caches_are_no_sources(device, script, tmp_path):
    report = script("gpu.report")
    (tmp_path / "a.h").write_text("int a;")
    before = report.tree_sha256(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").touch()
    assert report.tree_sha256(tmp_path) == before
    (tmp_path / "b.h").touch()
    assert report.tree_sha256(tmp_path) != before


def test_carried_wheels_are_installed_for_the_run_alone(device, script, run, tmp_path):
    module, wheels = script("test_gpu"), tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(module.Missing, match="no wheel there"):
        module.install_wheels(run, wheels)
    with zipfile.ZipFile(wheels / "carried_thing-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried_thing-1.0.dist-info"
        wheel.writestr("carried_thing.py", "")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    stages = script("gpu.stages")
    assert not stages.has_module(run, "carried_thing")
    module.install_wheels(run, wheels)
    assert stages.has_module(run, "carried_thing")


def row(impl, seconds, roofline=0.5, **change):
    problem = {"op": "attention", "shape": "a", "causal": True, "dtype": "bfloat16"}
    rates = {"flops_per_s": 1e12 / seconds, "bytes_per_s": 1e12, "mode": "events"}
    rates |= {"kernel": "a_kernel", "kv_splits": 3}
    return problem | rates | {"impl": impl, "seconds": seconds, "roofline": roofline} | change


def test_comparisons_take_the_fastest_of_each_rival(device, script):
    report = script("gpu.report")
    rows = [row("ours", 2.0), row("sdpa-flash", 5.0), row("sdpa-flash-packed", 3.0)]
    rows += [row("sdpa-cudnn", 1.0), row("sdpa-flash", 4.0, shape="ours is wrong here")]
    rows += [row("ours", 1.0, op="decode", causal=False), row("ours-bhsd", 0.5, op="decode")]
    first, second = report.comparisons(rows)
    assert first["speed"] == {"sdpa-flash": 1.5, "sdpa-cudnn": 0.5}
    assert second["op"] == "decode" and second["speed"] == {}
    text = report.bench_table([first, second])
    assert "0.50 <" in text and "slower than a rival on 1 of 2 problems" in text
    assert "attention a causal" in text and "decode a " in text and "a_kernel x3" in text


def pytest_on_cuda(*arguments, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command += arguments
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_what_cannot_run_on_cuda_is_deselected_by_reason(device):
    files = ["tests/test_decode.py", "tests/test_regressions.py", "tests/test_errors.py"]
    done = pytest_on_cuda("--collect-only", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    for reason in ("refuse float64 by name", "under FLASHINFER_LITE_CHECK=1"):
        assert f"{reason}" in done.stdout
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(names) > 300 and not any("[cuda-float64" in name for name in names)
    assert any("test_float64_on_cuda_is_refused" in name for name in names)
    assert sum("test_forcing_an_absent_level" in name for name in names) == 1


def test_an_asynchronous_error_is_blamed_on_its_test_and_ends_the_process(device, tmp_path):
    (tmp_path / "broken_gpu.py").write_text(
        "import torch\n"
        "def synchronize(*_):\n"
        "    raise RuntimeError('CUDA error: an illegal memory access')\n"
        "torch.cuda.synchronize = synchronize\n"
    )
    chosen = ["-p", "broken_gpu", "-k", "test_signature", "tests/test_flash_attn_face.py"]
    done = pytest_on_cuda(*chosen, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 3
    assert "test_signature" in done.stdout and "illegal memory access" in done.stdout
    assert "1 passed" in done.stdout


def test_the_results_name_the_gpu(device, script, monkeypatch, tmp_path):
    module = script("test_gpu")
    monkeypatch.delenv("OUT", raising=False)
    args = module.parse_arguments([])
    path, log = module.output_paths(args, "NVIDIA H100 80GB HBM3")
    assert path == ROOT / "bench" / "results" / "gpu-h100-80gb-hbm3.json"
    assert log == ROOT / "build" / "gpu-logs.txt"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert module.output_paths(args, "NVIDIA H200")[0] == tmp_path / "gpu-h200.json"
