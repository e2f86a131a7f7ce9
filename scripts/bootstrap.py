"""Make .venv and fill it with what building, testing and the demo need. Standard library only.

    python3 scripts/bootstrap.py .venv               create or update the environment
    python3 scripts/bootstrap.py .venv --editable    install this checkout into it, once it is built
    python3 scripts/bootstrap.py .venv --also cuda   add what scripts/requirements-cuda.txt lists

Each step leaves a stamp that holds a hash of what the step read, so a second call returns at once,
and an edit of requirements.txt, say, runs the step again.

Which torch: one >= 2.11 that this python3 already has is reused. Else a machine with an NVIDIA GPU
gets the CUDA build, and any other machine the CPU build, which is ten times smaller.
"""

import argparse
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "scripts" / "requirements.txt"
MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 11)
TORCH_CPU = "torch==2.13.0"
# "2.13.0+cpu" sorts above "2.13.0", so pip takes the CPU wheel wherever it sees one. Out of reach,
# this index must not cost minutes of retries.
TORCH_CPU_INDEX = "--retries 0 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu"


def fail(message):
    sys.exit(f"flashinfer_lite: {message}")


def check_machine():
    """Stop with the one apt line that names everything missing."""
    if sys.version_info < MIN_PYTHON:
        wanted, got = (
            ".".join(map(str, version[:2])) for version in (MIN_PYTHON, sys.version_info)
        )
        fail(f"expected Python >= {wanted}, got {got}; name another with: make PYTHON=python3.12")
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]
    found = {
        "g++": shutil.which(compiler),
        "make": shutil.which("make"),
        "python3-venv": importlib.util.find_spec("ensurepip"),
        # torch.compile builds C++ against it; the library does not
        "python3-dev": Path(sysconfig.get_path("include"), "Python.h").exists(),
    }
    missing = " ".join(package for package, there in found.items() if not there)
    if missing:
        fail(f"missing on this machine: {missing}; install with: sudo apt install {missing}")


def installed_torch(python):
    """(version, folder) of the torch that `python` sees if new enough; reads metadata only."""
    code = "import importlib.metadata as m; d = m.distribution('torch'); "
    code += "print(d.version, d.locate_file(''))"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if answer.returncode != 0:
        return None
    version, folder = answer.stdout.strip().split(" ", 1)
    fits = tuple(int(part) for part in version.split(".")[:2]) >= MIN_TORCH
    return (version, Path(folder)) if fits else None


def has_gpu():
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def pip_install(venv, what, *arguments):
    print(f"installing {what} ...", flush=True)
    pip = [venv / "bin" / "python", *"-m pip install -q --disable-pip-version-check".split()]
    if subprocess.run([*pip, *arguments]).returncode != 0:
        fail(f"installing {what} failed, pip's reason is above; then run the same command again")


def create_venv(venv):
    reuse = installed_torch(sys.executable)
    if subprocess.run([sys.executable, "-m", "venv", venv]).returncode != 0:
        shutil.rmtree(venv, ignore_errors=True)
        fail("python3 could not create a virtual environment: sudo apt install python3-venv")
    if reuse:
        # Not --system-site-packages: that misses a torch in the user's folder, or in a virtual
        # environment that python3 is in itself.
        site_packages = next((venv / "lib").glob("python3.*")) / "site-packages"
        (site_packages / "installed_torch.pth").write_text(f"{reuse[1]}\n")


def make_environment(venv):
    started = time.monotonic()
    check_machine()
    python = venv / "bin" / "python"
    if not python.exists():
        create_venv(venv)
    if found := installed_torch(python):
        print(f"using the installed torch {found[0]}", flush=True)
    elif has_gpu():
        pip_install(venv, "torch>=2.11 (CUDA build, about 3 GB)", "torch>=2.11")
    else:
        # --no-deps: its requirements come with the rest, from the ordinary index alone.
        options = ["--no-deps", *TORCH_CPU_INDEX.split()]
        pip_install(venv, f"{TORCH_CPU} (CPU build, about 200 MB)", *options, TORCH_CPU)
    version, folder = installed_torch(python)
    pinned = ["--requirement", REQUIREMENTS]
    if venv.resolve() not in folder.resolve().parents:
        # Packages beside a torch from outside count as installed, but their commands (pytest, ruff)
        # are not in our bin/: get copies of our own.
        pip_install(venv, "the pinned packages", "--no-deps", "--ignore-installed", *pinned)
    # Naming the exact torch completes its requirements, and keeps pip from trading it for another.
    pip_install(venv, "the pinned packages and what they need", *pinned, f"torch=={version}")
    print(f"environment ready in {time.monotonic() - started:.0f} s", flush=True)


def install_editable(venv):
    """`make build` compiles in place, so only a change of the metadata needs pip again."""
    pip_install(venv, "this checkout", "--no-deps", "--no-build-isolation", "--editable", ROOT)


def install_list(venv, requirements):
    pip_install(venv, requirements.name, "--requirement", requirements)


def run_once(stamp, step, inputs, venv):
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    step(venv)
    stamp.write_text(digest)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("--editable", action="store_true", help="install this checkout instead")
    parser.add_argument("--also", metavar="NAME", help="install scripts/requirements-NAME.txt")
    arguments = parser.parse_args()
    venv = arguments.venv
    if arguments.also:
        listed = REQUIREMENTS.with_name(f"requirements-{arguments.also}.txt")
        step = functools.partial(install_list, requirements=listed)
        run_once(venv / f".{listed.stem}", step, [listed], venv)
    elif arguments.editable:
        run_once(venv / ".editable", install_editable, [ROOT / "pyproject.toml"], venv)
    else:
        run_once(venv / ".ready", make_environment, [Path(__file__), REQUIREMENTS], venv)


if __name__ == "__main__":
    main()
