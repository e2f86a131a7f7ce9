"""Building and installing: what a user sees when something is missing, and what is in the wheel.

What needs no build of the CUDA half is here too: whether, with what and for what it is built.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import build_cuda

ROOT = Path(__file__).parent.parent
INSTALL_HINT = "install torch>=2.11 first, then: pip install --no-build-isolation ."


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


def fake_toolkit(folder, release="13.0", library="lib64"):
    """A folder that looks like a CUDA toolkit: a compiler that says its release, a runtime."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    if library:
        (folder / library).mkdir(parents=True)
        (folder / library / "libcudart_static.a").touch()
    return folder


def test_cuda_without_nvcc_is_refused_in_one_line(tmp_path):
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path]
    result = run(*build, FLASHINFER_LITE_CUDA="1", CUDA_HOME=tmp_path)
    assert result.returncode == 1
    assert result.stdout == (
        f"flashinfer_lite: CUDA half cannot be built: no nvcc in CUDA_HOME={tmp_path}; "
        "make build CUDA=pip installs a compiler\n"
    )


@pytest.mark.parametrize("library", ["lib64", "lib", "targets/x86_64-linux/lib"])
def test_toolkit_is_found_in_each_layout(tmp_path, monkeypatch, library):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path, library=library)))
    toolkit, problem = build_cuda.find_toolkit()
    assert (toolkit.nvcc, problem) == (tmp_path / "bin" / "nvcc", "")
    assert (toolkit.library, toolkit.release) == (tmp_path / library, (13, 0))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"release": "12.4"}, "expected nvcc >= 12.8, got 12.4 in "),
        ({"library": ""}, "no libcudart_static.a beside "),
    ],
)
def test_toolkit_that_does_not_fit(tmp_path, monkeypatch, options, problem):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path, **options)))
    assert build_cuda.find_toolkit() == (None, f"{problem}{tmp_path / 'bin' / 'nvcc'}")


@pytest.mark.parametrize(
    ("mode", "torch_has_cuda", "gpu", "built", "wanted"),
    [
        ("0", True, True, True, False),
        ("1", False, False, False, True),
        ("auto", False, False, False, False),
        ("auto", True, False, False, True),
        ("auto", False, True, False, True),
        ("auto", False, False, True, True),  # asked for once, kept up to date
        ("", False, False, False, False),
    ],
)
def test_choice_of_the_cuda_half(tmp_path, monkeypatch, mode, torch_has_cuda, gpu, built, wanted):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "toolkit")))
    monkeypatch.setenv("FLASHINFER_LITE_CUDA", mode)
    monkeypatch.setattr(build_cuda, "has_gpu", lambda: gpu)
    monkeypatch.setattr(build_cuda, "ROOT", tmp_path)
    (tmp_path / "flashinfer_lite").mkdir()
    if built:
        (tmp_path / "flashinfer_lite" / "_C_cuda.abi3.so").touch()
    toolkit, line = build_cuda.choose(torch_has_cuda)
    assert (toolkit is not None) == wanted
    says_why = not wanted and mode != "0"
    assert line == says_why * (
        "CUDA half not built: this torch has no CUDA and there is no GPU; "
        "FLASHINFER_LITE_CUDA=1 builds it"
    )


def test_auto_without_nvcc_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FLASHINFER_LITE_CUDA", "auto")
    toolkit, line = build_cuda.choose(torch_has_cuda=True)
    assert toolkit is None
    assert line == (
        f"CUDA half not built: no nvcc in CUDA_HOME={tmp_path}; make build CUDA=pip installs one"
    )


@pytest.mark.parametrize(
    ("listed", "sm80", "sm90"),
    [
        (None, ["80,sm_80", "90,sm_90", "90,compute_90"], ["90a,sm_90a"]),
        ("8.6", ["86,sm_86"], []),
        ("9.0a", ["90,sm_90"], ["90a,sm_90a"]),
        ("7.5 8.0;8.0+PTX, 12.0", ["80,sm_80", "80,compute_80", "120,sm_120"], []),
    ],
)
def test_architectures(monkeypatch, listed, sm80, sm90):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    for row_arch, wanted in ((80, sm80), (90, sm90)):
        flags = [
            flag.replace("-gencode=arch=compute_", "") for flag in build_cuda.gencode(row_arch)
        ]
        assert [flag.replace("code=", "") for flag in flags] == wanted


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("Hopper", "TORCH_CUDA_ARCH_LIST: expected e.g. \"8.0;9.0+PTX\", got 'Hopper'"),
        ("7.5", "TORCH_CUDA_ARCH_LIST: expected one that is 8.0 or later, got '7.5'"),
    ],
)
def test_architectures_that_do_not_fit(monkeypatch, listed, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit) as refused:
        build_cuda.architectures()
    assert str(refused.value) == f"flashinfer_lite: {message}"


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


def undefined_symbols(library):
    return run(
        "nm", "--dynamic", "--undefined-only", "--format=just-symbols", library
    ).stdout.split()


def test_cuda_half_leaves_only_torchs_cuda_symbols_undefined():
    """Its link cannot insist on complete symbols where torch has no CUDA; so this does."""
    library = ROOT / "flashinfer_lite" / "_C_cuda.abi3.so"
    if not library.exists():
        pytest.skip("the CUDA half is not built")
    torch_libraries = Path(torch.__file__).parent / "lib"
    assert not [name for name in undefined_symbols(library) if name.startswith(("Py", "_Py"))]
    unresolved = run("ldd", "-r", library, LD_LIBRARY_PATH=str(torch_libraries)).stdout
    names = re.findall(r"undefined symbol: (\w+)", unresolved)
    assert all(re.match("aoti_torch_.*cuda|torch_c10_cuda_|torch_get_cuda_", x) for x in names), (
        names
    )


def test_wheel_is_abi3_and_imports_no_python_symbol(tmp_path):
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    result = run(*pip_wheel, "--wheel-dir", tmp_path, ROOT, FLASHINFER_LITE_CUDA="0")
    assert result.returncode == 0, result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-cp310-abi3-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flashinfer_lite"}
    libraries = [name for name in names if name.endswith(".so")]
    assert libraries == ["flashinfer_lite/_C_cpu.abi3.so"]  # the CUDA half was not asked for
    library = tmp_path / "flashinfer_lite" / "_C_cpu.abi3.so"
    symbols = undefined_symbols(library)
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]
