"""Build the executor, which runs the CUDA kernels on a CPU: build/simt/_simt<suffix>.so.

    python scripts/build_simt.py [--ops]

A Python module for the tests, never part of the package: the kernels' rows (csrc/instances.py), the
host code that chooses among them, and csrc/simt, compiled by g++ alone. Needs pybind11, not torch.

With it comes build/simt-hooks/_simt<suffix>.so, which shares all objects but those of its kernels:
a few rows, instrumented, so that their plain loads and stores reach the checkers too.

--ops also builds _C_cuda_simt<suffix>.so: the CUDA ops with these kernels, on a made-up machine
(csrc/simt/fake_cuda). Needs torch, but neither CUDA nor its headers.

Environment, besides MAX_JOBS, CXX and FLASHINFER_LITE_WERROR of setup.py
    FLASHINFER_LITE_ROWS   e.g. decode_*_d64_s2: only these rows of the table
"""

import argparse
import os
import sys
import sysconfig
import time

from bootstrap import MIN_TORCH
from build_graph import Graph
from build_machine import ROOT, fail, max_jobs, sources

sys.path.append(str(ROOT / "csrc"))
import instances

BYTES_PER_JOB = 2**30
CXXFLAGS = "-std=c++20 -O2 -g1 -fPIC -ffp-contract=off -fvisibility=hidden"
# g++ has no `#pragma unroll`, and need not: the executor runs the loop as it stands.
WARNINGS = "-Wall -Wextra -Wno-unknown-pragmas -Wno-psabi"
# A frame touches each of its pages, so that none reaches over the guard into the next stack.
KERNELS = "-fstack-clash-protection"
# The compiler calls __tsan_read4 and its like at each access; csrc/simt/hooks.cpp defines them.
HOOKS = "-fsanitize=thread --param=tsan-instrument-func-entry-exit=0"
HOOKED_ROWS = {
    "attention_fwd_sm80_bfloat16_d64",
    "attention_fwd_sm80_float32_d64",
    "decode_sm80_bfloat16_d64_s2",
    "decode_sm80_float32_d64_s2",
    "combine_sm80_bfloat16_from_float32",
}
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
RAW, HOOKS_SOURCE = "csrc/simt/selftest/raw.cpp", "csrc/simt/hooks.cpp"
MODULE, OPS_MODULE = f"_simt{SUFFIX}", f"_C_cuda_simt{SUFFIX}"


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


def torch_flags():
    """The compiler's flags for code that includes torch's headers, and the linker's."""
    from torch.utils.cpp_extension import include_paths, library_paths

    major, minor = MIN_TORCH
    cxx = [f"-DTORCH_TARGET_VERSION=0x{major << 56 | minor << 48:016x}"]
    for path in include_paths():
        cxx += ["-isystem", path]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    return cxx, libraries


def add_ops(graph, chosen, objects):
    """The module of the ops; `objects` are the executor's and the rows'."""
    cxx, libraries = torch_flags()
    fake = "csrc/simt/fake_cuda"
    # USE_CUDA: torch's headers declare the CUDA functions too.
    graph.command("opsflags", [f"-I{ROOT / fake}", "-DUSE_CUDA", *cxx])
    rows = "".join(f"FIL_ROW({row.name})\n" for row in chosen)
    instances.write_if_changed(graph.folder / "instances" / "rows.inc", rows)
    graph.command("fakeflags", [f"-I{graph.folder}"])
    objects = [
        *objects,
        *(
            graph.compile(path, "$cxxflags $fakeflags $opsflags")
            for path in sources(f"{fake}/*.cpp")
        ),
        *(graph.compile(path, "$cxxflags $opsflags") for path in sources("csrc/ops/*_cuda.cpp")),
    ]
    return graph.link(OPS_MODULE, objects, "-shared", libraries)


def compile_kernels(graph, rows, folder, flags):
    """Objects of rows and of the self test without wrappers; and that of the rows' list."""
    units, listing = instances.generate(graph.folder / folder / "instances", ".cpp", rows)
    return [
        *(graph.compile(path, f"$cxxflags {flags}") for path in units.values()),
        graph.compile(RAW, f"$cxxflags {flags}", below=folder),
    ], graph.compile(listing, "$cxxflags")


def add_hooks(graph, chosen, host):
    """The module whose kernels are instrumented; -> a list of it, or of nothing."""
    rows = [row for row in chosen if row.name in HOOKED_ROWS]
    if not rows:
        return []
    graph.command("hooks", HOOKS.split())
    kernels, listing = compile_kernels(graph, rows, "hooked", "$kernelflags $hooks")
    objects = [*kernels, listing, *host, graph.compile(HOOKS_SOURCE, "$cxxflags")]
    return [graph.link(ROOT / "build" / "simt-hooks" / MODULE, objects, "-shared")]


def build(ops):
    """-> the paths of the modules."""
    graph = Graph(ROOT / "build" / "simt")
    graph.command("cxxflags", cxxflags())
    graph.command("kernelflags", KERNELS.split())
    chosen = instances.selected_rows()
    kernels, listing = compile_kernels(graph, chosen, "", "$kernelflags")
    host = sources("csrc/simt/*.cpp", "csrc/simt/selftest/*.cpp", "csrc/cuda/*.cpp")
    host = [graph.compile(path, "$cxxflags") for path in host if path not in (RAW, HOOKS_SOURCE)]
    modules = [graph.link(MODULE, [*kernels, listing, *host], "-shared")]
    modules += add_hooks(graph, chosen, host)
    if ops:
        modules.append(add_ops(graph, chosen, [*kernels, *host]))
    graph.run(max_jobs(BYTES_PER_JOB))
    return modules


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", action="store_true", help="also the CUDA ops on a made-up machine")
    arguments = parser.parse_args()
    started = time.monotonic()
    modules = build(arguments.ops)
    seconds = time.monotonic() - started
    names = " and ".join(str(module.relative_to(ROOT)) for module in modules)
    print(f"{names} up to date in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
