"""Building and installing: what a user sees when something is missing, and what is in the wheel."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTALL_HINT = "install torch>=2.11 first, then: pip install --no-build-isolation ."

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the repository, not an installed package"
)


def run(*command, cwd=ROOT, **environment):
    """Run without a terminal; standard output and error come back as one text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def fake_torch(folder, source):
    """A folder whose `torch`, put first on PYTHONPATH, hides the installed one."""
    package = folder / "torch" / "utils"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cpp_extension.py").write_text(
        "BuildExtension = object\ninclude_paths = library_paths = list\n"
    )
    (package.parent / "__init__.py").write_text(source)
    return folder


def test_unbuilt_checkout_imports_and_says_what_to_do(tmp_path):
    without_libraries = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(
        ROOT / "flashinfer_lite", tmp_path / "flashinfer_lite", ignore=without_libraries
    )
    code = (
        "import torch, flashinfer_lite as fi\n"
        "print(fi.__file__, fi.built)\n"
        "x = torch.zeros(1, 1, 1, 8)\n"
        "try: fi.attention(x, x, x)\n"
        "except RuntimeError as error: print(error)"
    )
    # Started in tmp_path, `python -c` finds the copy before the installed package.
    result = run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    where, message = result.stdout.strip().splitlines()
    assert where == f"{tmp_path / 'flashinfer_lite' / '__init__.py'} False"
    assert message.startswith('flashinfer_lite is not built: run "make build"')
    assert "pip install --no-build-isolation" in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "raise ImportError(\"No module named 'torch'\")",
            "flashinfer_lite: building needs the torch it will run with, got none "
            f"(No module named 'torch'): {INSTALL_HINT}",
        ),
        (
            "__version__ = '2.10.1+cpu'",
            f"flashinfer_lite: expected torch>=2.11, got 2.10.1+cpu: {INSTALL_HINT}",
        ),
    ],
    ids=["no-torch", "old-torch"],
)
def test_setup_without_a_fitting_torch(tmp_path, source, message):
    hidden = fake_torch(tmp_path, source)
    result = run(sys.executable, "setup.py", "build_ext", "--inplace", PYTHONPATH=str(hidden))
    assert result.returncode == 1
    assert result.stdout.strip() == message


def test_pip_install_without_torch(tmp_path):
    """Through pip: our line is there, no traceback, and nothing was downloaded before it."""
    hidden = fake_torch(tmp_path, "raise ImportError(\"No module named 'torch'\")")
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--target", tmp_path]
    result = run(*pip, ROOT, PYTHONPATH=str(hidden))
    assert result.returncode == 1
    assert INSTALL_HINT in result.stdout
    assert "Traceback" not in result.stdout
    assert "Downloading" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("option", [(), ("--no-build-isolation",)], ids=["isolated", "bare"])
def test_pip_install_into_an_empty_environment(tmp_path, option):
    """Nothing there, not even setuptools; build isolation, pip's default, needs an index."""
    venv.create(tmp_path / "empty", with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "empty" / "bin" / "python"]
    result = run(*pip, "install", *option, ROOT)
    assert result.returncode == 1
    assert INSTALL_HINT in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FLASHINFER_LITE_CUDA", "1", "CUDA half cannot be built: this version has no CUDA"),
        ("FLASHINFER_LITE_CUDA", "yes", "FLASHINFER_LITE_CUDA: expected auto, 0 or 1, got 'yes'"),
        ("MAX_JOBS", "many", "MAX_JOBS: expected a positive integer, got 'many'"),
        ("CXX", "no-such-g++", "no C++ compiler (no-such-g++ not found): sudo apt install g++"),
    ],
)
def test_build_refuses_in_one_line(tmp_path, variable, value, message):
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path]
    result = run(*build, **{"FLASHINFER_LITE_CUDA": "0", variable: value})
    assert result.returncode == 1
    assert result.stdout.startswith(f"flashinfer_lite: {message}")
    assert len(result.stdout.splitlines()) == 1


def test_bootstrap_names_what_apt_must_install(tmp_path):
    bootstrap = [sys.executable, "scripts/bootstrap.py", tmp_path / "venv"]
    result = run(*bootstrap, PATH=str(tmp_path), CXX="")
    assert result.returncode == 1
    assert result.stdout == (
        "flashinfer_lite: missing on this machine: g++ make; "
        "install with: sudo apt install g++ make\n"
    )
    assert not (tmp_path / "venv").exists()


def test_bootstrap_runs_a_step_again_only_when_its_inputs_change(tmp_path):
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    inputs, calls = tmp_path / "requirements.txt", []
    for text in ("a==1", "a==1", "a==2"):
        inputs.write_text(text)
        bootstrap.run_once(tmp_path / ".ready", calls.append, [inputs], text)
    assert calls == ["a==1", "a==2"]


def test_wheel_is_abi3_and_imports_no_python_symbol(tmp_path):
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    result = run(*pip_wheel, "--wheel-dir", tmp_path, ROOT)
    assert result.returncode == 0, result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-cp310-abi3-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flashinfer_lite"}
    assert "flashinfer_lite/_C_cpu.abi3.so" in names
    library = tmp_path / "flashinfer_lite" / "_C_cpu.abi3.so"
    symbols = run("nm", "--dynamic", "--undefined-only", library).stdout.split()
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]
