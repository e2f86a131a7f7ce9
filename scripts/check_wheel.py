"""Build the wheel and try it in fresh virtual environments: `make wheel-check`.

One wheel is for every Python >= 3.10 and every torch >= 2.11. For each Python that is found here,
and each torch that pip can get for it, an environment is made, the wheel is installed, and
`python -m flashinfer_lite doctor` runs in it, which sees nothing of the checkout. A line each says
what came of it. A combination that cannot be had is said to be so and fails nothing; a wheel that
does not install or is not sound does, and so does a run that has tried nothing.

From PyPI a torch brings its CUDA libraries along: 3 GB to download, 6 GB on the disk, freed before
the next combination. The CPU build is taken where pip sees one. Standard library only.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bootstrap import ROOT, TORCH_CPU_INDEX, fail

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.11.0", "2.13.0")
NOT_HAD, SOUND, UNSOUND = "not to be had", "sound", "NOT SOUND"


def run(*command, minutes=20):
    """(whether it succeeded, standard output and error as one text)."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * minutes,
        )
    except subprocess.TimeoutExpired:
        return False, f"no end after {minutes} minutes"
    return done.returncode == 0, done.stdout


def version_of(python):
    """'3.12', say, of an interpreter that starts and can make environments, else None."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    started, text = run(python, "-c", code, minutes=1)
    return text.strip() if started else None


def find_pythons(wanted):
    """{version: interpreter} of those that are on PATH or that pyenv or uv has installed."""
    found = {}
    home = Path.home()
    for version in wanted:
        name, candidates = f"python{version}", []
        for folder in (home / ".pyenv" / "versions", home / ".local" / "share" / "uv" / "python"):
            candidates += sorted(folder.glob(f"*{version}.*/bin/{name}"), reverse=True)
        # PATH comes last: pyenv's shims there run what is chosen for a folder, or nothing at all.
        for candidate in filter(None, [*candidates, sys.executable, shutil.which(name)]):
            if version_of(candidate) == version:
                found[version] = candidate
                break
    return found


def build_wheel(folder):
    """The wheel that `pip wheel` makes with this Python, which has torch and setuptools."""
    pip_wheel = [sys.executable, *"-m pip wheel --quiet --no-build-isolation --no-deps".split()]
    built, text = run(*pip_wheel, "--wheel-dir", folder, ROOT, minutes=60)
    if not built:
        fail(f"the wheel could not be built:\n{text}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def reason(text):
    """pip's own last word, in one line."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no reason given"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1][:150]


def attempt(wheel, interpreter, torch, folder):
    """(outcome, what there is to say about it) of one Python and one torch."""
    made, text = run(interpreter, "-m", "venv", folder)
    if not made:
        return NOT_HAD, reason(text)
    python = folder / "bin" / "python"
    pip = [python, *"-I -m pip install --quiet --no-compile --disable-pip-version-check".split()]
    got, text = run(*pip, *TORCH_CPU_INDEX.split(), f"torch=={torch}")
    if not got:
        return NOT_HAD, reason(text)
    installed, text = run(*pip, "--no-deps", wheel)
    if not installed:
        return UNSOUND, reason(text)
    # -I: neither the folder we are in nor PYTHONPATH may bring in the checkout.
    sound, text = run(python, "-I", "-m", "flashinfer_lite", "doctor", minutes=5)
    lines = text.strip().splitlines() or ["doctor printed nothing"]
    versions = [" ".join(line.split()[1:]) for line in lines if line.startswith("torch ")]
    if not sound:
        return UNSOUND, "\n".join(["doctor:", *lines])
    return SOUND, f"torch {versions[0]}; {' '.join(lines[-1].split())}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="try this one; default: build it")
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION")
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="VERSION")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="flashinfer_lite-wheel-") as name:
        scratch = Path(name)
        wheel = arguments.wheel.resolve() if arguments.wheel else build_wheel(scratch)
        print(f"{wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        pythons = find_pythons(arguments.python)
        for version in arguments.python:
            for torch in arguments.torch:
                started = time.monotonic()
                environment = scratch / f"python{version}-torch{torch}"
                if version in pythons:
                    outcome, detail = attempt(wheel, pythons[version], torch, environment)
                else:
                    outcome, detail = NOT_HAD, "no such Python on PATH, in pyenv or in uv"
                shutil.rmtree(environment, ignore_errors=True)
                outcomes.append(outcome)
                took = time.monotonic() - started
                print(f"python {version:5} torch {torch:7} {outcome}: {detail} ({took:.0f} s)")
                sys.stdout.flush()
    counts = {outcome: outcomes.count(outcome) for outcome in (SOUND, UNSOUND, NOT_HAD)}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    sys.exit(0 if counts[SOUND] and not counts[UNSOUND] else 1)


if __name__ == "__main__":
    main()
