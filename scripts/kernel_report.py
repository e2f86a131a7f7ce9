"""What the compiler made of each row of csrc/instances.py, read from the last CUDA build.

    python scripts/kernel_report.py ptxas    registers, shared memory and spills per architecture;
                                             fails on a spill that the row does not allow
    python scripts/kernel_report.py sass     counts of machine instructions; fails where one that
                                             the kernel is written for is missing
    python scripts/kernel_report.py static   both, with occupancy, as docs/kernels/static.md

The first reads what ptxas said during the build, the second disassembles the objects.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_cuda
from build_machine import build_folder, fail, max_jobs

sys.path.append(str(Path(__file__).resolve().parent.parent / "csrc"))
import instances

PTXAS_COLUMNS = ("registers", "stack", "spill stores", "spill loads", "static smem")
SASS_COLUMNS = (
    *("HMMA", "LDSM", "LDGSTS", "FFMA", "MUFU.EX2", "SHFL", "BAR"),
    *("LDG", "STG", "LDS", "STS", "LDL", "STL"),
)


def built_rows():
    """-> [(row, bytes of dynamic shared memory, its object file)] of the last CUDA build."""
    folder = build_folder()
    manifest = folder / build_cuda.MANIFEST
    if not manifest.exists():
        fail("no CUDA build to report on: run make build CUDA=1, or CUDA=pip")
    lines = subprocess.run([manifest], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    smem_bytes = dict(line.rsplit(" ", 1) for line in lines if line)
    return [
        (row, int(smem_bytes[row.name]), folder / "instances" / f"{row.name}.cu.o")
        for row in instances.ROWS
        if row.name in smem_bytes
    ]


def nvcc_of_the_build():
    """The compiler that the last CUDA build was made with, whatever is found now."""
    text = (build_folder() / "build.ninja").read_text()
    line = re.search(r"^nvcc = (.+)$", text, re.MULTILINE)
    return shlex.split(line[1])[0] if line else fail("the last build was without the CUDA half")


def parse_ptxas(text):
    """What `ptxas -v` printed -> {architecture: {column: the most that any kernel of it takes}}."""
    most = defaultdict(Counter)
    for kernel in re.split(r"Compiling entry function", text)[1:]:
        arch = re.search(r"for '(sm_\w+)'", kernel)[1]
        for column, number in (
            ("registers", r"Used (\d+) registers"),
            ("stack", r"(\d+) bytes stack frame"),
            ("spill stores", r"(\d+) bytes spill stores"),
            ("spill loads", r"(\d+) bytes spill loads"),
            ("static smem", r"(\d+) bytes smem"),
        ):
            match = re.search(number, kernel)
            most[arch][column] = max(most[arch][column], int(match[1]) if match else 0)
    return dict(most)


def spill_problem(row, usage):
    """Why the spills of a row fail the report, or None. usage: what parse_ptxas returns."""
    spills = {arch: used["spill stores"] + used["spill loads"] for arch, used in usage.items()}
    if not usage:
        return f"{row.name}: ptxas printed no kernel"
    allowed = row.allow_spill.bytes if row.allow_spill else 0
    if over := {arch: count for arch, count in spills.items() if count > allowed}:
        text = ", ".join(f"{count} bytes on {arch}" for arch, count in over.items())
        cure = "a smaller tile, or allow_spill=Spill(<bytes>, <why>) in its row"
        return f"{row.name}: spills {text}, may spill {allowed}; {cure}"
    if row.allow_spill is not None and not any(spills.values()):
        return f"{row.name}: has allow_spill but spills nothing; remove it from the row"
    return None


def report_ptxas():
    """Print the table; -> problems."""
    problems = []
    print(f"{'row':<42}{'arch':<7}{'smem':>8}", *(f"{column:>13}" for column in PTXAS_COLUMNS))
    for row, smem_bytes, unit in built_rows():
        usage = parse_ptxas(unit.with_name(f"{unit.name}.ptxas").read_text())
        for arch, used in usage.items():
            numbers = (f"{used[column]:>13}" for column in PTXAS_COLUMNS)
            why = f"  {row.allow_spill.why}" if row.allow_spill else ""
            print(f"{row.name:<42}{arch:<7}{smem_bytes:>8}", *numbers, why)
        problems.append(spill_problem(row, usage))
    return [problem for problem in problems if problem]


def find_cuobjdump():
    toolkit, _ = build_cuda.find_toolkit()
    roots = [*([toolkit.root] if toolkit else []), *build_cuda.environment_roots()]
    folders = [root / "bin" for root in roots]
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    return found or shutil.which("cuobjdump")


def parse_sass(text):
    """What `cuobjdump -sass` printed -> {architecture: Counter of opcodes with their modifiers}."""
    counts, arch = defaultdict(Counter), None
    for line in text.splitlines():
        if match := re.match(r"\s*code for (sm_\w+)|arch = (sm_\w+)", line):
            arch = match[1] or match[2]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            counts[arch][match[1]] += 1
    return dict(counts)


def count(opcodes, name):
    """Instructions that are `name` or one of its variants: LDG counts LDG.E.128, not LDGSTS."""
    return sum(n for opcode, n in opcodes.items() if f"{opcode}.".startswith(f"{name}."))


def opcodes_of_rows(rows):
    """-> [{architecture: Counter of opcodes}] of the rows' objects."""
    cuobjdump = find_cuobjdump() or fail("no cuobjdump: run make sass, which installs it")
    tools = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])

    def disassemble(unit):
        command = [cuobjdump, "-sass", unit]
        # It calls nvdisasm, which lies beside it.
        options = {"capture_output": True, "text": True, "env": {**os.environ, "PATH": tools}}
        answer = subprocess.run(command, **options)
        return answer.stdout if answer.returncode == 0 else fail(f"cuobjdump: {answer.stderr}")

    with ThreadPoolExecutor(max_jobs(2**30)) as pool:
        return list(map(parse_sass, pool.map(disassemble, [unit for _, _, unit in rows])))


def report_sass():
    """Print the table; -> problems."""
    rows = built_rows()
    problems = []
    print(f"{'row':<42}{'arch':<7}{'all':>7}", *(f"{column:>8}" for column in SASS_COLUMNS))
    for (row, _, _), by_arch in zip(rows, opcodes_of_rows(rows), strict=True):
        for arch, opcodes in by_arch.items():
            numbers = (f"{count(opcodes, column):>8}" for column in SASS_COLUMNS)
            print(f"{row.name:<42}{arch:<7}{opcodes.total():>7}", *numbers)
            wanted = row.traits.instructions(row.dtype)
            missing = " ".join(name for name in wanted if not count(opcodes, name))
            if missing:
                problems.append(f"{row.name}: no {missing} on {arch}")
    return problems


def resident_blocks(threads, registers, smem_bytes, smem_per_sm):
    """Thread blocks that share a multiprocessor: 65536 registers, given out 256 to a warp."""
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(by_registers, smem_per_sm // (smem_bytes + 1024), 2048 // threads)


STATIC_INTRODUCTION = """# What the compiler made of the kernels

Written by `make static` from a build by nvcc {release}; nothing here was measured on a GPU.
Registers and spills are ptxas' own words, instructions are counted in the disassembly of the whole
kernel: the steps over full and over masked blocks and the exact path. Blocks are those that
registers and shared memory let share a multiprocessor with 100, 164 and 228 KB (8.6 and 8.9, 8.0,
9.0).
"""


def report_static():
    """Write docs/kernels/static.md."""
    rows = built_rows()
    columns = ("HMMA", "LDSM", "LDGSTS", "FFMA", "MUFU.EX2", "BAR")
    heads = ("row", "arch", "registers", "spilled bytes", "shared memory", "blocks", "instructions")
    release = ".".join(map(str, build_cuda.nvcc_release(nvcc_of_the_build())))
    lines = [STATIC_INTRODUCTION.format(release=release), f"| {' | '.join((*heads, *columns))} |"]
    lines.append("|---" * (len(heads) + len(columns)) + "|")
    for (row, smem_bytes, unit), by_arch in zip(rows, opcodes_of_rows(rows), strict=True):
        usage = parse_ptxas(unit.with_name(f"{unit.name}.ptxas").read_text())
        for arch, used in sorted(usage.items()):
            threads = 32 * (row.num_warps or 4)
            blocks = [
                resident_blocks(threads, used["registers"], smem_bytes, kilobytes * 1024)
                for kilobytes in (100, 164, 228)
            ]
            spilled = used["spill stores"] + used["spill loads"]
            cells = [f"`{row.name}`", arch, used["registers"], spilled, smem_bytes]
            cells += [" / ".join(map(str, blocks)), by_arch[arch].total()]
            cells += [count(by_arch[arch], column) for column in columns]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    path = Path(__file__).resolve().parent.parent / "docs" / "kernels" / "static.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}")
    return []


def main():
    reports = {"ptxas": report_ptxas, "sass": report_sass, "static": report_static}
    if len(sys.argv) != 2 or sys.argv[1] not in reports:
        sys.exit(__doc__)
    problems = reports[sys.argv[1]]()
    print(*problems, sep="\n", end="\n" if problems else "")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
