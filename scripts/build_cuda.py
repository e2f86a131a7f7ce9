"""The CUDA half: whether it is built, by which nvcc, and for which architectures."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bootstrap import has_gpu
from build_machine import ROOT, fail, find_compiler, free_memory

sys.path.append(str(ROOT / "csrc"))
import instances

MIN_NVCC = (12, 8)
BYTES_PER_JOB = 3 * 2**29  # one nvcc with its children
# -fmad=false: as on the CPU, a*b+c stays two roundings unless a kernel writes the FMA.
NVCCFLAGS = (
    "-std=c++20 -O3 -lineinfo -Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage "
    "-fmad=false --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
)
DEFAULT_ARCHS = "8.0;9.0+PTX"
MANIFEST = "manifest"  # a program that prints the rows of the library and their shared memory


@dataclass(frozen=True)
class Toolkit:
    root: Path
    library: Path  # folder of libcudart_static.a
    release: tuple[int, int]

    @property
    def nvcc(self):
        return self.root / "bin" / "nvcc"


def environment_roots():
    """Where the compiler's wheels put it in this Python environment."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else []
    return [root for folder in folders for root in sorted(Path(folder).glob("cu1[3-9]"))[::-1]]


def candidate_roots():
    """-> (folders where a toolkit may be, the words for them)."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return [Path(os.environ[variable])], f"{variable}={os.environ[variable]}"
    on_path = shutil.which("nvcc")
    roots = [
        *environment_roots(),
        *([Path(on_path).resolve().parents[1]] if on_path else []),
        Path("/usr/local/cuda"),
        *sorted(Path("/usr/local").glob("cuda-*"))[::-1],
    ]
    return roots, "this Python's packages, PATH and /usr/local/cuda*"


def nvcc_release(nvcc):
    """-> e.g. (13, 0), or (0, 0) where it does not say."""
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", answer)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def find_toolkit():
    """-> (Toolkit, "") or (None, what is wrong)."""
    roots, where = candidate_roots()
    problem = f"no nvcc in {where}"
    for nvcc in (root / "bin" / "nvcc" for root in roots):
        if not nvcc.exists():
            continue
        root = nvcc.parents[1]
        libraries = [root / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
        library = next((x for x in libraries if (x / "libcudart_static.a").exists()), None)
        if library is None:
            problem = f"no libcudart_static.a beside {nvcc}"
            continue
        release = nvcc_release(nvcc)
        if release >= MIN_NVCC:
            return Toolkit(root, library, release), ""
        wanted, got = (".".join(map(str, version)) for version in (MIN_NVCC, release))
        problem = f"expected nvcc >= {wanted}, got {got} in {nvcc}"
    return None, problem


def choose(torch_has_cuda):
    """FLASHINFER_LITE_CUDA -> (Toolkit, "") or (None, the line to print)."""
    mode = os.environ.get("FLASHINFER_LITE_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        fail(f"FLASHINFER_LITE_CUDA: expected auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return None, ""
    toolkit, problem = find_toolkit()
    if toolkit is None:
        if mode == "1":
            fail(f"CUDA half cannot be built: {problem}; make build CUDA=pip installs a compiler")
        return None, f"CUDA half not built: {problem}; make build CUDA=pip installs one"
    # One that was asked for once is kept up to date, so that it never grows stale.
    built = any((ROOT / "flashinfer_lite").glob("_C_cuda*.so"))
    if mode == "1" or torch_has_cuda or built or has_gpu():
        return toolkit, ""
    reason = "this torch has no CUDA and there is no GPU"
    return None, f"CUDA half not built: {reason}; FLASHINFER_LITE_CUDA=1 builds it"


def architectures():
    """TORCH_CUDA_ARCH_LIST as [(80, ptx too), ...]; what is older than 8.0 is left out."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    wanted = {}
    for text in re.split(r"[;,\s]+", asked.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", text)
        if not match:
            fail(f'TORCH_CUDA_ARCH_LIST: expected e.g. "{DEFAULT_ARCHS}", got {asked!r}')
        arch = 10 * int(match[1]) + int(match[2])
        wanted[arch] = wanted.get(arch, False) or bool(match[3])
    fitting = [(arch, ptx) for arch, ptx in sorted(wanted.items()) if arch >= 80]
    if not fitting:
        fail(f"TORCH_CUDA_ARCH_LIST: expected one that is 8.0 or later, got {asked!r}")
    return fitting


def gencode(row_arch):
    """nvcc's flags for the rows of an architecture; [] where the list leaves them out."""
    if row_arch == 90:
        # Its instructions exist in 9.0a alone: neither older nor later ones have them.
        listed = any(arch == 90 for arch, _ in architectures())
        return ["-gencode=arch=compute_90a,code=sm_90a"] if listed else []
    flags = []
    for arch, ptx in architectures():
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def add_nvcc(graph, toolkit, jobs):
    graph.command("nvcc", [toolkit.nvcc])
    # The last word: a compiler cache may stand before the compiler.
    flags = [*NVCCFLAGS.split(), f"-I{ROOT / 'csrc'}", "-ccbin", find_compiler()[-1]]
    graph.command("nvccflags", flags)
    graph.pool("nvcc", max(1, min(jobs, free_memory() // BYTES_PER_JOB)))
    # What ptxas says of registers and spills stays beside the object, for `make ptxas`.
    strict = os.environ.get("FLASHINFER_LITE_WERROR") == "1"
    refuse = "{ cat $out.ptxas; exit 1; }"
    warnings = "grep 'warning #' $out.ptxas"
    graph.rule(
        "nvcc",
        f"$nvcc -MD -MF $out.d $nvccflags $gencode -c $in -o $out > $out.ptxas 2>&1 || {refuse}; "
        + (f"! {warnings} > /dev/null || {refuse}" if strict else f"{warnings} || true"),
        "NVCC $in",
        depfile="$out.d",
        pool="nvcc",
    )


def add_library(graph, toolkit, name, sources, ldflags, jobs):
    """The CUDA half in the graph that builds the CPU's; -> the rows that are in it."""
    add_nvcc(graph, toolkit, jobs)
    chosen = [row for row in instances.selected_rows() if gencode(row.arch)]
    units, listing = instances.generate(graph.folder / "instances", ".cu", chosen)
    rows = []
    for row, unit in units.items():
        rows.append(unit.with_name(f"{unit.name}.o"))
        flags = shlex.join(gencode(row.arch))
        graph.build(rows[-1], "nvcc", [unit], f"{rows[-1]}.ptxas", gencode=flags)
    include = shlex.join(["-DUSE_CUDA", "-isystem", str(toolkit.root / "include")])
    rows.append(graph.compile(listing, "$cxxflags"))
    host = [graph.compile(source, f"$cxxflags {include}") for source in sources]
    runtime = [f"-L{toolkit.library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # A torch with CUDA resolves its CUDA symbols through libtorch.so, which an as-needed link would
    # drop. A torch without has none of them, so this one library may leave symbols undefined.
    torch = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    graph.link(name, [*rows, *host], "-shared", [*torch, *ldflags, *runtime])
    printer = graph.compile(instances.write_manifest(graph.folder / "instances"), "$cxxflags")
    graph.link(MANIFEST, [*rows, printer], "", runtime)
    return chosen


def describe(toolkit):
    release = ".".join(map(str, toolkit.release))
    archs = " ".join(f"{arch}{'+PTX' if ptx else ''}" for arch, ptx in architectures())
    return f"CUDA half by nvcc {release} for {archs}"
