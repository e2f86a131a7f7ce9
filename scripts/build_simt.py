"""Build the executor, which runs the CUDA kernels on a CPU: build/simt/_simt<suffix>.so.

    python scripts/build_simt.py

A Python module for the tests, never part of the package: the kernels' rows (csrc/instances.py), the
host code that chooses among them, and csrc/simt, compiled by g++ alone. Needs pybind11, not torch.

Environment, besides MAX_JOBS, CXX and FLASHINFER_LITE_WERROR of setup.py
    FLASHINFER_LITE_ROWS        e.g. decode_*_d64_s2: only these rows of the table
    FLASHINFER_LITE_SIMT_HOOKS  1: instrument the kernels, so that plain loads and stores reach the
                                checkers too; built in build/simt-hooks/
"""

import os
import sys
import sysconfig
import time

from build_graph import Graph
from build_machine import ROOT, fail, max_jobs, sources

sys.path.append(str(ROOT / "csrc"))
import instances

BYTES_PER_JOB = 2**30
CXXFLAGS = "-std=c++20 -O2 -g1 -fPIC -ffp-contract=off -fvisibility=hidden"
# g++ has no `#pragma unroll`, and need not: the executor runs the loop as it stands.
WARNINGS = "-Wall -Wextra -Wno-unknown-pragmas"
# The compiler calls __tsan_read4 and its like at each access; csrc/simt/hooks.cpp defines them.
HOOKS = "-fsanitize=thread --param=tsan-instrument-func-entry-exit=0"
MODULE = "_simt" + sysconfig.get_config_var("EXT_SUFFIX")


def cxxflags():
    try:
        import pybind11
    except ImportError:
        fail("the executor needs pybind11: run make venv, or pip install pybind11")
    flags = [*CXXFLAGS.split(), *WARNINGS.split(), f"-I{ROOT / 'csrc'}"]
    for path in (pybind11.get_include(), sysconfig.get_path("include")):
        flags += ["-isystem", path]
    if os.environ.get("FLASHINFER_LITE_WERROR") == "1":
        flags.append("-Werror")
    return flags


def build(hooks):
    """-> the path of the module."""
    graph = Graph(ROOT / "build" / ("simt-hooks" if hooks else "simt"))
    graph.command("cxxflags", cxxflags())
    graph.command("kernelflags", HOOKS.split() if hooks else [])
    chosen = instances.selected_rows()
    units, listing = instances.generate(graph.folder / "instances", ".cpp", chosen)
    host = sources("csrc/simt/**/*.cpp", "csrc/cuda/dispatch*.cpp")
    if not hooks:
        host = [path for path in host if not path.endswith("/hooks.cpp")]
    objects = [graph.compile(path, "$cxxflags $kernelflags") for path in units.values()]
    objects += [graph.compile(path, "$cxxflags") for path in (listing, *host)]
    module = graph.link(MODULE, objects, "-shared")
    graph.run(max_jobs(BYTES_PER_JOB))
    return module


def main():
    started = time.monotonic()
    module = build(hooks=os.environ.get("FLASHINFER_LITE_SIMT_HOOKS") == "1")
    seconds = time.monotonic() - started
    print(f"{module.relative_to(ROOT)} up to date in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
