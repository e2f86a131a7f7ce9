"""Build flashinfer_lite's native libraries: one ninja graph, linked against torch's stable ABI.

    flashinfer_lite/_C_cpu.abi3.so    CPU kernels and their op registrations, always built

The libraries hold no Python symbols and target torch 2.11, so one wheel serves every Python >= 3.10 and every torch >= 2.11.

Environment
    FLASHINFER_LITE_CUDA      auto (default) | 0 | 1     build the CUDA half; 1 makes its absence an error
    FLASHINFER_LITE_SANITIZE  e.g. address,undefined     sanitizers, in a build directory of their own (see `make asan`)
    FLASHINFER_LITE_WERROR    1                          warnings are errors (what CI sets)
    MAX_JOBS                  parallel compiler jobs; default: what cores and free memory allow
    CXX                       compiler, e.g. "ccache g++" or clang++; default g++
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MIN_TORCH = (2, 11)
# The oldest torch whose C shim we may call, as torch/headeronly spells it: major << 56 | minor << 48.
TORCH_TARGET_VERSION = f"0x{MIN_TORCH[0] << 56 | MIN_TORCH[1] << 48:016x}"
# The heaviest translation unit (all AVX-512 kernels at -O3) stays below this.
BYTES_PER_JOB = 3 * 2**29
INSTALL_HINT = "install torch>=2.11 first, then: pip install --no-build-isolation ."


def fail(message):
    """Stop with one line; raised at any depth, setuptools and pip print it without a traceback."""
    raise SystemExit(f"flashinfer_lite: {message}")


try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ImportError as error:
    # Checked before anything else: pip would otherwise first download the dependencies, gigabytes of them.
    # Build isolation ends here too, because it hides the installed torch, and that is the one to build with.
    fail(
        f"building needs the torch it will run with, and there is none here ({error}): {INSTALL_HINT}"
    )

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
    fail(f"expected torch>=2.11, got {torch.__version__}: {INSTALL_HINT}")


def sources(*patterns):
    """Paths relative to the root, sorted so that the ninja file is the same on every machine."""
    return sorted(
        str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)
    )


def check_cuda_half():
    """FLASHINFER_LITE_CUDA, honoured as far as this version goes: it has no CUDA sources yet."""
    mode = os.environ.get("FLASHINFER_LITE_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        fail(f"FLASHINFER_LITE_CUDA: expected auto, 0 or 1, got {mode!r}")
    reason = "this version has no CUDA sources (csrc/cuda)"
    if mode == "1":
        fail(
            f"CUDA half cannot be built: {reason}; unset FLASHINFER_LITE_CUDA to build the CPU half"
        )
    if mode == "auto":
        print(f"CUDA half not built: {reason}; the CPU half is complete without it", flush=True)


def free_memory():
    """Bytes a build may use: what the kernel calls available, or less where a container has its own limit."""
    free = sys.maxsize
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
        limit, used = (
            Path("/sys/fs/cgroup", name).read_text().strip()
            for name in ("memory.max", "memory.current")
        )
        if limit != "max":
            free = min(free, int(limit) - int(used))
    except (OSError, KeyError):
        pass  # not Linux, or no cgroup v2: keep what is known
    return free


def max_jobs():
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            fail(f"MAX_JOBS: expected a positive integer, got {asked!r}")
        return int(asked)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(cores, free_memory() // BYTES_PER_JOB))


def find_ninja():
    """The ninja of this Python's environment (its bin directory need not be on PATH), else the one on PATH."""
    beside = Path(sys.executable).with_name("ninja")
    return (
        str(beside)
        if beside.exists()
        else shutil.which("ninja") or fail("ninja not found: pip install ninja")
    )


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

    torch's own BuildExtension recompiles everything under pip (PEP 660 gives it a fresh temporary directory each time) and
    links outside ninja. Here objects, dependency files and links live in build/, so any entry point (make, pip install,
    pip wheel) is incremental, and a touched header rebuilds its dependents and nothing else.
    """

    def build_extensions(self):
        check_cuda_half()
        started = time.monotonic()
        sanitize = os.environ.get("FLASHINFER_LITE_SANITIZE", "")
        build_dir = (
            ROOT
            / "build"
            / "-".join(
                filter(None, ["ninja", sysconfig.get_platform(), sanitize.replace(",", "-")])
            )
        )
        build_dir.mkdir(parents=True, exist_ok=True)

        ninja_file = build_dir / "build.ninja"
        text = self.ninja_text(build_dir, sanitize)
        if not ninja_file.exists() or ninja_file.read_text() != text:
            ninja_file.write_text(text)

        ninja, jobs = [find_ninja(), "-f", str(ninja_file)], max_jobs()
        if subprocess.run([*ninja, "-j", str(jobs)]).returncode != 0:
            fail("compilation failed, the compiler's message is above")
        for extension in self.extensions:
            self.place(
                build_dir / self.library_name(extension),
                Path(self.get_ext_fullpath(extension.name)),
            )
        if not sanitize:
            commands = subprocess.run(
                [*ninja, "-t", "compdb", "cxx"], capture_output=True, text=True, check=True
            ).stdout
            (ROOT / "compile_commands.json").write_text(commands)
        print(
            f"native libraries up to date in {time.monotonic() - started:.1f} s ({jobs} jobs)",
            flush=True,
        )

    def library_name(self, extension):
        return Path(self.get_ext_filename(extension.name)).name

    @staticmethod
    def place(built, wanted):
        """Copy by rename: a process that has the old library mapped keeps running, nobody sees half a file."""
        wanted.parent.mkdir(parents=True, exist_ok=True)
        partial = wanted.with_name(wanted.name + ".partial")
        shutil.copy2(built, partial)
        os.replace(partial, wanted)

    def ninja_text(self, build_dir, sanitize):
        cxxflags = [
            "-std=c++20",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-fvisibility-inlines-hidden",
            "-Wall",
            "-Wextra",
        ]
        # a*b+c stays two roundings unless a kernel writes the FMA: levels that share a formula then agree.
        cxxflags += [
            "-ffp-contract=off",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            f"-I{ROOT / 'csrc'}",
        ]
        for path in include_paths():
            cxxflags += ["-isystem", path]
        if os.environ.get("FLASHINFER_LITE_WERROR") == "1":
            cxxflags.append("-Werror")
        # No rpath: `import torch` has mapped these libraries before ours is loaded, and the loader matches by soname.
        ldflags = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
        if sys.platform == "linux":
            # A symbol that nothing defines is a link error here, not an import error on a user's machine.
            ldflags = ["-Wl,-z,defs", "-Wl,--exclude-libs,ALL", *ldflags]
        if sanitize:
            instrument = [
                f"-fsanitize={sanitize}",
                "-fno-sanitize-recover=all",
                "-fno-omit-frame-pointer",
            ]
            cxxflags += [*instrument, "-O1", "-g1"]
            ldflags = [*instrument, *(flag for flag in ldflags if flag != "-Wl,-z,defs")]

        lines = [
            "ninja_required_version = 1.5",
            f"builddir = {ninja_path(build_dir)}",
            f"cxx = {shlex.join(find_compiler())}",
            f"cxxflags = {shlex.join(cxxflags)}",
            f"ldflags = {shlex.join(ldflags)}",
            "rule cxx",
            # -MD, not -MMD: torch's headers are system headers, and an upgraded torch must rebuild too.
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
            lines.append(
                f"build {ninja_path(build_dir / self.library_name(extension))}: link {' '.join(objects)}"
            )
        return "\n".join(lines) + "\n"


class FreshBuildPy(build_py):
    """Without this a module deleted since the last wheel would still be in build/lib*, and so in the next wheel."""

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
    # use_ninja asks torch for its own way of calling ninja, and a warning where ninja is not on PATH; ours needs neither.
    cmdclass={"build_ext": NinjaBuild.with_options(use_ninja=False), "build_py": FreshBuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
