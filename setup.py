"""Build flashinfer_lite's native libraries: one ninja graph, linked against torch's stable ABI.

    flashinfer_lite/_C_cpu.abi3.so    CPU kernels and their op registrations, always built
    flashinfer_lite/_C_cuda.abi3.so   CUDA kernels (the rows of csrc/instances.py) and their
                                      registrations, static CUDA runtime; no GPU needed to build it

The libraries hold no Python symbols and target torch 2.11, so one wheel serves every
Python >= 3.10 and every torch >= 2.11.

Environment
    FLASHINFER_LITE_CUDA      1 builds the CUDA half, 0 does not (and removes an old one); auto, the
                              default, builds it where there is nvcc and torch has CUDA, there is a
                              GPU, or it was built here before
    CUDA_HOME, CUDA_PATH      the CUDA toolkit; default: wheels in this environment (`make build
                              CUDA=pip`), the nvcc on PATH, /usr/local/cuda*
    TORCH_CUDA_ARCH_LIST      default "8.0;9.0+PTX"
    FLASHINFER_LITE_ROWS      e.g. decode_*_d64_s2,combine_*: only these rows, for work on a kernel
    FLASHINFER_LITE_SANITIZE  e.g. address,undefined: built in a directory of its own (`make asan`)
    FLASHINFER_LITE_WERROR    1: warnings are errors, as in CI
    MAX_JOBS                  compiler jobs at a time; default: what cores and free memory allow
    CXX                       compiler, e.g. "ccache g++"; default g++
"""

import os
import shutil
import sys
import time
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))
import build_cuda
from build_graph import Graph, place
from build_machine import ROOT, build_folder, fail, max_jobs, sources

MIN_TORCH = (2, 11)
# The oldest torch whose C shim we may call, in the encoding of torch/headeronly/version.h.
TORCH_TARGET_VERSION = f"0x{MIN_TORCH[0] << 56 | MIN_TORCH[1] << 48:016x}"
BYTES_PER_JOB = 3 * 2**29  # the heaviest translation unit stays below this
# -ffp-contract=off: a*b+c stays two roundings unless a kernel writes the FMA, at every ISA level.
CXXFLAGS = "-std=c++20 -O3 -fPIC -ffp-contract=off -fvisibility=hidden -fvisibility-inlines-hidden"
WARNINGS = "-Wall -Wextra"
INSTALL_HINT = "install torch>=2.11 first, then: pip install --no-build-isolation ."

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


class NinjaBuild(BuildExtension):
    """Build every library from one ninja file in a persistent directory.

    torch's own BuildExtension recompiles everything under pip (PEP 660 gives it a fresh temporary
    directory each time), links outside ninja, and compiles no CUDA with a CPU-only torch. Here
    objects, dependency files and links live in build/, so every entry point (make, pip install, pip
    wheel) is incremental, and a touched header rebuilds its dependents and nothing else.
    """

    def finalize_options(self):
        self.sanitize = os.environ.get("FLASHINFER_LITE_SANITIZE", "")
        torch_has_cuda = torch.version.cuda is not None
        self.toolkit, self.no_cuda = None, ""
        if not self.sanitize:
            self.toolkit, self.no_cuda = build_cuda.choose(torch_has_cuda)
        if self.toolkit and CUDA_LIBRARY not in self.distribution.ext_modules:
            self.distribution.ext_modules.append(CUDA_LIBRARY)
        super().finalize_options()

    def build_extensions(self):
        started, as_of = time.monotonic(), time.time()
        if self.no_cuda:
            print(self.no_cuda, flush=True)
        jobs = max_jobs(BYTES_PER_JOB)
        graph = Graph(build_folder(self.sanitize))
        self.add_libraries(graph, jobs)
        graph.run(jobs)
        for extension in self.extensions:
            wanted = Path(self.get_ext_fullpath(extension.name))
            place(graph.folder / self.library_name(extension), wanted, as_of)
        if not self.sanitize:
            (ROOT / "compile_commands.json").write_text(graph.compile_commands())
        seconds = time.monotonic() - started
        cuda = f", {build_cuda.describe(self.toolkit)}" if self.toolkit else ""
        print(f"native libraries up to date in {seconds:.1f} s ({jobs} jobs{cuda})", flush=True)

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        if not self.toolkit:
            for stale in (ROOT / "flashinfer_lite").glob("_C_cuda*.so"):
                stale.unlink()

    def library_name(self, extension):
        return Path(self.get_ext_filename(extension.name)).name

    def flags(self):
        """The compiler's flags, the linker's, and the linker's for a library without gaps."""
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
        complete = []
        if self.sanitize:
            instrument = [f"-fsanitize={self.sanitize}", "-fno-sanitize-recover=all"]
            cxxflags += [*instrument, "-fno-omit-frame-pointer", "-O1", "-g1"]
            ldflags = [*instrument, *ldflags]
        elif sys.platform == "linux":
            # A symbol that nothing defines is an error now, not when a user imports us. (The
            # sanitizers' own symbols come from a preloaded runtime, so not with those.)
            complete = ["-Wl,-z,defs"]
        return cxxflags, ldflags, complete

    def add_libraries(self, graph, jobs):
        cxxflags, ldflags, complete = self.flags()
        graph.command("cxxflags", cxxflags)
        for extension in self.extensions:
            name = self.library_name(extension)
            if extension is CUDA_LIBRARY:
                build_cuda.add_library(graph, self.toolkit, name, extension.sources, ldflags, jobs)
            else:
                objects = [graph.compile(source, "$cxxflags") for source in extension.sources]
                graph.link(name, objects, "-shared", [*complete, *ldflags])


class FreshBuildPy(build_py):
    """Start from an empty directory, or a deleted module lives on in build/ and in each wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "flashinfer_lite"), ignore_errors=True)
        super().run()


def library(name, *patterns):
    return Extension(name, sources(*patterns), language="c++", py_limited_api=True)


CPU_LIBRARY = library("flashinfer_lite._C_cpu", "csrc/cpu/kernels/*.cpp", "csrc/ops/*_cpu.cpp")
CUDA_LIBRARY = library("flashinfer_lite._C_cuda", "csrc/ops/*_cuda.cpp", "csrc/cuda/*.cpp")

setup(
    ext_modules=[CPU_LIBRARY],
    # use_ninja is torch's way of calling ninja, with a warning where it is not on PATH.
    cmdclass={"build_ext": NinjaBuild.with_options(use_ninja=False), "build_py": FreshBuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
