"""`make wheel-check` without a network: what it looks for, what it says and how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
import check_wheel  # noqa: E402

HERE = "{}.{}".format(*sys.version_info)


def run(*arguments):
    command = [sys.executable, SCRIPTS / "check_wheel.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_this_python_is_found_and_an_absent_one_is_not():
    found = check_wheel.find_pythons((HERE, "3.99"))
    assert list(found) == [HERE]
    assert check_wheel.version_of(found[HERE]) == HERE


def test_a_run_that_tries_nothing_fails_and_says_why(tmp_path):
    wheel = tmp_path / "some.whl"
    wheel.touch()
    done = run("--wheel", wheel, "--python", "3.99", "--torch", "2.11.0")
    assert done.returncode == 1
    first, line, summary = done.stdout.splitlines()
    assert first == "some.whl, 0.0 MiB"
    reason = "not to be had: no such Python on PATH, in pyenv or in uv"
    assert line.startswith(f"python 3.99  torch 2.11.0  {reason} (")
    assert summary == "0 sound, 0 NOT SOUND, 1 not to be had"


@pytest.fixture
def steps(monkeypatch):
    """Commands run so far; those with a word of `failing` in them fail with the text beside it."""
    failing, commands = {}, []

    def pretend(*command, **options):
        text = " ".join(map(str, command))
        commands.append(text)
        doctor = "torch           2.13.0+cpu, 2 threads\nself-test       passed in 0.1 s\n"
        for word, message in failing.items():
            if word in text:
                return False, message
        return True, doctor if "doctor" in text else ""

    monkeypatch.setattr(check_wheel, "run", pretend)
    return failing, commands


@pytest.mark.parametrize(
    ("failing", "outcome"),
    [
        ({}, ("sound", "torch 2.13.0+cpu, 2 threads; self-test passed in 0.1 s")),
        (
            {"torch==": "WARNING: x\nERROR: No matching distribution found for torch==2.13.0\n"},
            ("not to be had", "No matching distribution found for torch==2.13.0"),
        ),
        ({"-m venv": "no venv here"}, ("not to be had", "no venv here")),
        (
            {"the.whl": "ERROR: the.whl is not a supported wheel on this platform."},
            ("NOT SOUND", "the.whl is not a supported wheel on this platform."),
        ),
        (
            {"flashinfer_lite doctor": "torch           2.13.0\nself-test       FAILED\n"},
            ("NOT SOUND", "doctor:\ntorch           2.13.0\nself-test       FAILED"),
        ),
    ],
    ids=["sound", "no-torch", "no-venv", "wheel-refused", "doctor-fails"],
)
def test_outcomes(steps, tmp_path, failing, outcome):
    steps[0].update(failing)
    assert check_wheel.attempt("the.whl", "python3", "2.13.0", tmp_path) == outcome
    # What is installed and run in the new environment sees nothing of the checkout.
    assert all(" -I -m " in command for command in steps[1][1:])
