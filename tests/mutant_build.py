"""Modules of the executor with a mutant in them: build/mutants/<kernel>/<mutant>/.

One source file is compiled for each, against a mutated copy of one header that an include path puts
before csrc/; everything else is linked from build/simt. Nothing is written below csrc/.
"""

import re
import subprocess
import sys

from mutant_sources import CUDA, KERNELS, ROOT, closure

sys.path += [str(ROOT / "scripts"), str(ROOT / "csrc")]
import build_simt
import instances
from build_graph import Graph, escaped
from build_machine import find_ninja, sources

FOLDER = ROOT / "build" / "mutants"
MADE = ROOT / "build" / "simt"
HOST = {path.name: path for path in sorted(CUDA.glob("*.cpp"))}  # what chooses the rows


def build(mutants, kernels, rows, jobs):
    """Compile each mutant for each of its kernels; -> {(mutant's name, kernel): module or None}.

    `rows` are the names of the rows that a kernel's module has, its own first. What a mutant leaves
    alone comes from build/simt. None: it does not compile.
    """
    graph = Graph(FOLDER)
    # Not optimised: most mutants run for less time than they take to compile.
    graph.command("cxxflags", [*build_simt.cxxflags(), "-O0", "-g0", "-w"])
    header = _add_header(graph)
    modules = {}
    for kernel in kernels:
        own = [mutant for mutant in mutants if kernel in mutant.kernels]
        modules.update(_add_kernel(graph, header, kernel, rows[kernel], own))
    _run(graph, jobs)
    # Where the compiler fails it leaves no object, but an older module may lie there.
    return {
        key: path if path.exists() and path.with_name("mutant.o").exists() else None
        for key, path in modules.items()
    }


def _add_header(graph):
    """What the kernels include and no mutant changes, compiled once; -> the header's path."""
    compiler = "$cxx -MD -MF $out.d $flags"
    graph.rule("header", f"{compiler} -x c++-header $in -o $out", "HEADER", depfile="$out.d")
    graph.rule("mutant", f"{compiler} -c $source -o $out", "CXX $out", depfile="$out.d")
    included = set().union(*(closure(f"cuda/kernels/{kernel}/sm80.cuh") for kernel in KERNELS))
    names = {name for name in included if name.startswith("common/")} | {"cuda/arch/arch.cuh"}
    mutated = [name for name in included if name.startswith(("cuda/tile/", "cuda/kernels/"))]
    text = "".join((ROOT / "csrc" / name).read_text() for name in mutated)
    system = sorted(set(re.findall(r"^#include (<[^>]+>)", text, re.MULTILINE)))
    lines = [*system, *(f'"{name}"' for name in (*sorted(names), "cuda/instance.h"))]
    header = FOLDER / "unmutated.h"
    instances.write_if_changed(header, "".join(f"#include {line}\n" for line in lines))
    graph.build(f"{header}.gch", "header", [header], flags="$cxxflags")
    return header


def _add_kernel(graph, header, kernel, rows, mutants):
    """-> {(mutant's name, kernel): path of the module to be}"""
    folder = FOLDER / kernel
    chosen = [row for row in instances.ROWS if row.name in rows]
    units, listing = instances.generate(folder / "instances", ".cpp", chosen)
    units = {row.name: path for row, path in units.items()}
    listed = graph.compile(listing, "$cxxflags")
    host = sources("csrc/simt/*.cpp", "csrc/simt/selftest/*.cpp")
    host = [MADE / f"{path}.o" for path in host if not path.endswith("/hooks.cpp")]
    # What each source is without a mutant.
    parts = {path: MADE / "instances" / f"{path.name}.o" for path in units.values()}
    parts |= {path: MADE / "csrc/cuda" / f"{name}.o" for name, path in HOST.items()}
    modules = {}
    for mutant in mutants:
        place = folder / mutant.name
        changed = mutant.write(place / "csrc")
        replaced = HOST.get(mutant.file, units[rows[0]])
        source = changed if mutant.file in HOST else replaced
        target = place / "mutant.o"
        flags = f"-include {escaped(header)} -I{escaped(place / 'csrc')} $cxxflags"
        inputs = [source, f"{header}.gch"]
        graph.build(target, "mutant", inputs, flags=flags, source=escaped(source))
        objects = [*{**parts, replaced: target}.values(), listed, *host]
        module = graph.link(place / build_simt.MODULE, objects, "-shared -s")
        modules[mutant.name, kernel] = module
    return modules


def _run(graph, jobs):
    """Like graph.run, but going on with the others where one does not compile (-k 0)."""
    ninja_file = FOLDER / "build.ninja"
    ninja_file.write_text("\n".join(graph.lines) + "\n")
    command = [find_ninja(), "-f", ninja_file, "-k", "0", "-j", str(jobs), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout[-4000:], file=sys.stderr)
