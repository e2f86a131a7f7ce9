"""The stages of scripts/test_gpu.py without a GPU: what they ask for, and what they make of it."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
from gpu import stages

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path):
    return stages.Run(tmp_path, os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_pytest_report_is_read(device, tmp_path):
    path = tmp_path / "junit.xml"
    assert stages.read_junit(path)["missing"]
    path.write_text(
        '<testsuites><testsuite tests="4" failures="1" errors="0" skipped="1">'
        '<testcase classname="tests.test_a" name="test_x[1]"/>'
        '<testcase classname="tests.test_a" name="test_y"><failure message="out: max&#10;x"/>'
        "</testcase></testsuite></testsuites>"
    )
    found = stages.read_junit(path)
    assert found["failed"] == [{"test": "tests.test_a::test_y", "message": "out: max"}]
    assert stages.counted(found) == "2 passed, 1 failed"


@pytest.fixture
def commands(run, monkeypatch):
    """What a real run asks for, as {name: (command, seconds, environment)}, and nothing starts.

    `commands.status` is what each command is said to end with; `commands.write` is called with the
    command before it ends, in the place of what it leaves behind.
    """

    class Commands(dict):
        status = 0

        def write(self, command):
            pass

    asked = Commands()

    def command(name, arguments, seconds, **environment):
        asked[name] = ([str(x) for x in arguments], seconds, environment)
        run.logs[name] = "not on cuda: 7 tests: CUDA kernels refuse float64 by name\n"
        asked.write(asked[name][0])
        return asked.status

    monkeypatch.setattr(run, "command", command)
    monkeypatch.setattr(stages, "has_module", lambda run, name: True)
    return asked


def junit(command, tests, skipped=0, failures=0):
    path = next(x for x in command if x.startswith("--junitxml=")).partition("=")[2]
    Path(path).write_text(
        f'<testsuites><testsuite tests="{tests}" failures="{failures}" errors="0" '
        f'skipped="{skipped}"/></testsuites>'
    )


def test_the_tests_stage_asks_for_the_tests_twice(device, run, commands):
    files = [f"tests/test_{name}.py" for name in stages.TEST_FILES]

    def write(command):
        junit(command, 9, skipped=1)
        for path in (x.partition("=")[2] for x in command if x.startswith("--record-support=")):
            Path(path).write_text('{"gpu": {}}')

    commands.write = write
    found = stages.tests(run, 50)
    assert found["status"] == "passed" and found["details"]["support"] == {"gpu": {}}
    assert (
        found["summary"] == "8 passed, 0 failed; with FLASHINFER_LITE_CHECK=1: 8 passed, 0 failed"
    )
    assert found["details"]["numerics"]["not_here"] == [
        "7 tests: CUDA kernels refuse float64 by name"
    ]
    for name, chosen, checked in (
        ("tests", "not slow", {}),
        ("tests_checked", "checks_values", {"FLASHINFER_LITE_CHECK": "1"}),
    ):
        command, seconds, environment = commands[name]
        assert command[:6] == [sys.executable, "-m", "pytest", "-q", "--device", "cuda"]
        assert int(command[command.index("-n") + 1]) >= 1
        assert command[-len(files) - 2 :] == ["-m", chosen, *files]
        assert seconds == 50 and environment == {"OMP_NUM_THREADS": "1"} | checked
    commands.status = 1
    assert stages.tests(run, 50)["status"] == "failed"


@pytest.mark.parametrize("name", ["tests", "tests_checked"])
def test_the_tests_stage_wants_a_test_to_run_in_each(device, run, commands, name):
    def write(command):
        junit(command, 9, skipped=9 if f"{name}.xml" in " ".join(command) else 0)

    commands.write = write
    assert stages.tests(run, 50)["status"] == "failed"
    commands.write = lambda command: None  # killed before it wrote
    run.work.joinpath(f"{name}.xml").unlink()
    assert stages.tests(run, 50)["status"] == "failed"


def test_the_golden_stage_wants_most_of_the_table(device, run, commands):
    for tests, skipped, failures, status in ((9, 4, 0, "passed"), (9, 5, 0, "failed")):
        commands.write = lambda command, n=(tests, skipped, failures): junit(command, *n)
        found = stages.golden(run, 50)
        assert found["status"] == status
        assert found["summary"] == f"{tests - skipped} passed, 0 failed, {skipped} skipped"
    command, seconds, environment = commands["golden"]
    assert command[-1] == "tests/test_arch_golden.py" and "-k" not in command
    assert command[4:6] == ["--device", "cuda"] and seconds == 50
    commands.write, commands.status = lambda command: junit(command, 9, failures=1), 1
    assert stages.golden(run, 50)["summary"] == "8 passed, 1 failed, 0 skipped"
    assert stages.golden(run, 50)["status"] == "failed"


def test_the_bench_stage_reads_its_rows(device, run, commands):
    header = {"wrong": [], "left_out": ["b", "c"], "limits": {}}

    def write(command):
        lines = [json.dumps(line) for line in (header, {"impl": "ours"}, {"impl": "sdpa-flash"})]
        Path(command[command.index("--output") + 1]).write_text("\n".join(lines) + "\n")

    commands.write = write
    found = stages.bench(run, 100)
    assert (found["status"], found["summary"]) == ("passed", "2 rows, 0 wrong, no time for 2")
    assert found["details"]["header"] == header and len(found["details"]["rows"]) == 2
    command, seconds, _ = commands["bench"]
    assert command[:2] == [sys.executable, str(ROOT / "bench" / "bench.py")] and seconds == 100
    # No op and no shape is named: all of them, within less than the stage has.
    assert command[4:] == ["--device", "cuda", "--seconds", "0.15", "--within", "70"]
    header["wrong"], commands.status = ["a"], 1
    found = stages.bench(run, 100)
    assert (found["status"], found["summary"]) == ("failed", "2 rows, 1 wrong, no time for 2")
    commands.status, commands.write = 0, lambda command: (run.work / "bench.jsonl").unlink()
    assert stages.bench(run, 100)["status"] == "failed"


def test_the_flat_stage_reads_its_rows(device, run, commands):
    seconds = {"gemv": 2e-6, "flat_gemm": 1e-6}
    rows = [{"seconds": seconds | {"vendor": vendor}} for vendor in (1.5e-6, 0.5e-6)]

    def write(command):
        Path(command[command.index("--json") + 1]).write_text(json.dumps(rows))

    commands.write = write
    found = stages.flat(run, 40)
    summary = "2 shapes, ours faster than cuBLAS at 1"
    assert (found["status"], found["summary"]) == ("passed", summary)
    assert found["details"]["rows"] == rows
    command, limit, _ = commands["flat"]
    assert command[1] == str(ROOT / "scripts" / "gpu" / "flat.py") and limit == 40
    assert command[2:4] == ["--device", "cuda"] and command[-2:] == ["--within", "28"]
    commands.status = 1
    assert stages.flat(run, 40)["status"] == "failed"
    commands.status, commands.write = 0, lambda command: (run.work / "flat.json").unlink()
    assert stages.flat(run, 40)["status"] == "failed"


@pytest.mark.parametrize(
    "text, clean",
    [
        ("========= ERROR SUMMARY: 0 errors\n", True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True),
        ("========= ERROR SUMMARY: 10 errors\n", False),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n", False),
        ("the tool did not start\n", False),
    ],
)
def test_only_a_summary_of_nothing_is_clean(device, text, clean):
    assert bool(stages.CLEAN.search(text)) == clean


def test_the_sanitizer_stage_believes_no_tool_that_misses_a_planted_error(
    device, run, monkeypatch, tmp_path
):
    tool, proof = tmp_path / "compute-sanitizer", tmp_path / "planted"
    monkeypatch.setattr(stages.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(stages.planted, "build", lambda run: proof)
    for bites in (True, False):
        status = 86 if bites else 0
        tool.write_text(
            f'#!/bin/sh\ncase "$*" in *{proof}*) exit {status};; esac\n'
            "echo ERROR SUMMARY: 0 errors\n"
        )
        tool.chmod(0o755)
        found = stages.sanitizer(run, 60)
        assert found["status"] == ("passed" if bites else "failed")
        assert ("found" if bites else "MISSED") in found["summary"]
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    assert stages.sanitizer(run, 60)["status"] == "skipped"
