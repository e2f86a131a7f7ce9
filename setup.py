"""Build flashinfer_lite's native libraries: one ninja graph, linked against torch's stable ABI.

    flashinfer_lite/_C_cpu.abi3.so    CPU kernels and their op registrations, always built

The libraries hold no Python symbols and target torch 2.11, so one wheel serves every
Python >= 3.10 and every torch >= 2.11.

Environment
    FLASHINFER_LITE_CUDA      auto (default), 0 or 1: the CUDA half; 1 makes its absence an error
    FLASHINFER_LITE_SANITIZE  e.g. address,undefined: built in a directory of its own (`make asan`)
    FLASHINFER_LITE_WERROR    1: warnings are errors, as in CI
    MAX_JOBS                  compiler jobs at a time; default: what cores and free memory allow
    CXX                       compiler, e.g. "ccache g++"; default g++
"""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MIN_TORCH = (2, 11)
# The oldest torch whose C shim we may call, in the encoding of torch/headeronly/version.h.
TORCH_TARGET_VERSION = f"0x{MIN_TORCH[0] << 56 | MIN_TORCH[1] << 48:016x}"
BYTES_PER_JOB = 3 * 2**29  # the heaviest translation unit stays below this
# -ffp-contract=off: a*b+c stays two roundings unless a kernel writes the FMA, at every ISA level.
CXXFLAGS = "-std=c++20 -O3 -fPIC -ffp-contract=off -fvisibility=hidden -fvisibility-inlines-hidden"
WARNINGS = "-Wall -Wextra"
INSTALL_HINT = "install torch>=2.11 first, then: pip install --no-build-isolation ."


def fail(message):
    """Stop with one line; raised at any depth, setuptools and pip print it without a traceback."""
    raise SystemExit(f"flashinfer_lite: {message}")


try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ImportError as error:
    # Checked before anything else: pip would otherwise first download gigabytes of dependencies.
    # Build isolation ends here too: it hides the installed torch, the one to build with.
    fail(f"building needs the torch it will run with, got none ({error}): {INSTALL_HINT}")

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
    fail(f"expected torch>=2.11, got {torch.__version__}: {INSTALL_HINT}")

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones do not read our pyproject.toml
    fail(f"expected setuptools>=77, got {setuptools.__version__}: pip install 'setuptools>=77,<82'")


def sources(*patterns):
    """Paths relative to the root, sorted so that the ninja file is the same on every machine."""
    paths = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def check_cuda_half():
    """FLASHINFER_LITE_CUDA, honoured as far as this version goes: it has no CUDA sources yet."""
    mode = os.environ.get("FLASHINFER_LITE_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        fail(f"FLASHINFER_LITE_CUDA: expected auto, 0 or 1, got {mode!r}")
    reason = "this version has no CUDA sources (csrc/cuda)"
    if mode == "1":
        fail(f"CUDA half cannot be built: {reason}; unset FLASHINFER_LITE_CUDA to build without it")
    if mode == "auto":
        print(f"CUDA half not built: {reason}; the CPU half is complete without it", flush=True)


def free_memory():
    """Bytes a build may use: what Linux calls available, or less inside a limited container."""
    free = sys.maxsize
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        free = free if limit == "max" else min(free, int(limit))
    except (OSError, KeyError):
        pass  # not Linux, or no cgroup v2: keep what is known
    return free


def max_jobs():
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            fail(f"MAX_JOBS: expected a positive integer, got {asked!r}")
        return int(asked)
    # The affinity mask, where there is one, also knows what taskset or a container left us.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, free_memory() // BYTES_PER_JOB))


def find_ninja():
    """The ninja beside this Python (its directory need not be on PATH), else the one on PATH."""
    beside = shutil.which("ninja", path=Path(sys.executable).parent)
    return beside or shutil.which("ninja") or fail("ninja not found: pip install ninja")


def find_compiler():
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        fail(f"no C++ compiler ({command[0]} not found): sudo apt install g++")
    return command


def ninja_path(path):
    """Escape what ninja's own syntax would read: `$`, space and colon."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(BuildExtension):
    """Build every library from one ninja file in a persistent directory.

    torch's own BuildExtension recompiles everything under pip (PEP 660 gives it a fresh temporary
    directory each time) and links outside ninja. Here objects, dependency files and links live in
    build/, so every entry point (make, pip install, pip wheel) is incremental, and a touched header
    rebuilds its dependents and nothing else.
    """

    def build_extensions(self):
        check_cuda_half()
        started = time.monotonic()
        sanitize = os.environ.get("FLASHINFER_LITE_SANITIZE", "")
        flavour = f"-{sanitize.replace(',', '-')}" if sanitize else ""
        build_dir = ROOT / "build" / f"ninja-{sysconfig.get_platform()}{flavour}"
        build_dir.mkdir(parents=True, exist_ok=True)

        ninja_file = build_dir / "build.ninja"
        text = self.ninja_text(build_dir, sanitize)
        if not ninja_file.exists() or ninja_file.read_text() != text:
            ninja_file.write_text(text)

        ninja, jobs = [find_ninja(), "-f", str(ninja_file)], max_jobs()
        # Two ninjas in one directory spoil each other's logs; the second waits. The kernel drops
        # the lock with its holder, however that ends.
        with (build_dir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if subprocess.run([*ninja, "-j", str(jobs)]).returncode != 0:
                fail("compilation failed, the compiler's message is above")
        for extension in self.extensions:
            wanted = Path(self.get_ext_fullpath(extension.name))
            self.place(build_dir / self.library_name(extension), wanted)
        if not sanitize:
            with (ROOT / "compile_commands.json").open("w") as database:
                subprocess.run([*ninja, "-t", "compdb", "cxx"], stdout=database, check=True)
        seconds = time.monotonic() - started
        print(f"native libraries up to date in {seconds:.1f} s ({jobs} jobs)", flush=True)

    def library_name(self, extension):
        return Path(self.get_ext_filename(extension.name)).name

    @staticmethod
    def place(built, wanted):
        """Copy by rename: a process that has the old library mapped keeps it whole."""
        wanted.parent.mkdir(parents=True, exist_ok=True)
        partial = wanted.with_name(wanted.name + ".partial")
        shutil.copy2(built, partial)
        os.replace(partial, wanted)

    @staticmethod
    def flags(sanitize):
        """The compiler's flags and the linker's."""
        cxxflags = [*CXXFLAGS.split(), *WARNINGS.split(), f"-I{ROOT / 'csrc'}"]
        cxxflags.append(f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
        for path in include_paths():
            cxxflags += ["-isystem", path]
        if os.environ.get("FLASHINFER_LITE_WERROR") == "1":
            cxxflags.append("-Werror")
        # No rpath: `import torch` maps these libraries first, and the loader matches by soname.
        ldflags = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
        if sys.platform == "linux":
            ldflags.insert(0, "-Wl,--exclude-libs,ALL")
        if sanitize:
            instrument = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
            cxxflags += [*instrument, "-fno-omit-frame-pointer", "-O1", "-g1"]
            ldflags = [*instrument, *ldflags]
        elif sys.platform == "linux":
            # A symbol that nothing defines is an error now, not when a user imports us. (The
            # sanitizers' own symbols come from a preloaded runtime, so not with those.)
            ldflags.insert(0, "-Wl,-z,defs")
        return cxxflags, ldflags

    def ninja_text(self, build_dir, sanitize):
        cxxflags, ldflags = self.flags(sanitize)
        lines = [
            "ninja_required_version = 1.5",
            f"builddir = {ninja_path(build_dir)}",
            f"cxx = {shlex.join(find_compiler())}",
            f"cxxflags = {shlex.join(cxxflags)}",
            f"ldflags = {shlex.join(ldflags)}",
            "rule cxx",
            # -MD, not -MMD: torch's are system headers, and a new torch must rebuild too.
            "  command = $cxx -MD -MF $out.d $cxxflags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CXX $in",
            "rule link",
            "  command = $cxx -shared -o $out $in $ldflags",
            "  description = LINK $out",
        ]
        for extension in self.extensions:
            objects = []
            for source in extension.sources:
                objects.append(ninja_path(build_dir / f"{source}.o"))
                lines.append(f"build {objects[-1]}: cxx {ninja_path(ROOT / source)}")
            library = ninja_path(build_dir / self.library_name(extension))
            lines.append(f"build {library}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


class FreshBuildPy(build_py):
    """Start from an empty directory, or a deleted module lives on in build/ and in each wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "flashinfer_lite"), ignore_errors=True)
        super().run()


setup(
    ext_modules=[
        Extension(
            "flashinfer_lite._C_cpu",
            sources("csrc/cpu/kernels/*.cpp", "csrc/ops/*_cpu.cpp"),
            language="c++",
            py_limited_api=True,
        )
    ],
    # use_ninja is torch's way of calling ninja, with a warning where it is not on PATH.
    cmdclass={"build_ext": NinjaBuild.with_options(use_ninja=False), "build_py": FreshBuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
