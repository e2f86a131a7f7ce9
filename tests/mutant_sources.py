"""Mutants of the kernels' source text: the list of them.

tests/mutant_list/*.txt, read by `read_list`:

    @ tile/copy.cuh                             the file below csrc/cuda; applies to what follows
    @ tile/epilogue.cuh attention_fwd           the same, for this kernel's cases alone
    - return first + r < end; }                 occurs once in the file; one `-` per line
    + return first + r <= end; }                as many lines instead
    # reads a slot that holds nothing           what is wrong with it
    = decode: equal because ...                 survives the cases of this kernel, and why it may
"""

import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
KERNELS = (
    *("attention_fwd", "attention_bwd", "decode", "combine"),
    *("append_kv", "flat_gemm", "gemv"),
)


@dataclass
class Mutant:
    file: str  # below csrc/cuda
    kernels: tuple
    old: str = ""
    new: str = ""
    why: str = ""
    survives: dict = field(default_factory=dict)  # kernel -> reason

    @cached_property
    def name(self):
        stem = self.file.replace("/sm80.cuh", "").rpartition("/")[2].partition(".")[0]
        digest = hashlib.sha256(f"{self.file}\n{self.old}\n{self.new}".encode()).hexdigest()
        return f"{stem}_{digest[:8]}"

    @property
    def title(self):
        return f"{self.file}: {' '.join(self.old.split())} -> {' '.join(self.new.split())}"

    def fault(self):
        """What is wrong with the entry, or an empty string."""
        count = (CUDA / self.file).read_text().count(self.old) if self.old else 0
        if count != 1:
            return f"{self.title}: the old text occurs {count} times"
        if not self.why or self.new == self.old:
            return f"{self.title}: changes nothing, or does not say what is wrong"
        if self.new.count("\n") != self.old.count("\n"):
            return f"{self.title}: moves the lines below"
        return ""

    def write(self, folder):
        """The mutated file, where an include path that starts with `folder` finds it first."""
        path = folder / "cuda" / self.file
        text = (CUDA / self.file).read_text().replace(self.old, self.new)
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return path


def default_kernels(file):
    """Whose cases a file's mutants have to get past."""
    own = [kernel for kernel in KERNELS if file == f"kernels/{kernel}/sm80.cuh"]
    if file.startswith("kernels/attention_bwd/") or file == "tile/gemm_tiles.cuh":
        own = ["attention_bwd"]
    flat = file in ("tile/ragged.cuh", "flat_linear.cpp")
    return tuple(own or (("flat_gemm", "gemv") if flat else ("attention_fwd", "decode")))


def read_list(text):
    mutants, file, kernels, last = [], None, (), None
    for line in text.splitlines():
        mark, rest = line[:1], line[2:]
        if mark == "@":
            file, *named = rest.split()
            kernels = tuple(named) or default_kernels(file)
        elif mark == "-":
            if last != "-":
                mutants.append(Mutant(file, kernels))
            mutants[-1].old += ("\n" if last == "-" else "") + rest
        elif mark == "+":
            mutants[-1].new += ("\n" if last == "+" else "") + rest
        elif mark == "#":
            mutants[-1].why += (" " if mutants[-1].why else "") + rest
        elif mark == "=":
            kernel, _, reason = rest.partition(": ")
            mutants[-1].survives[kernel] = reason
        elif line:
            raise ValueError(f"mutants: expected a line that starts with @ - + # or =, got {line}")
        last = mark
    return mutants


def all_mutants():
    paths = sorted((ROOT / "tests" / "mutant_list").glob("*.txt"))
    return [mutant for path in paths for mutant in read_list(path.read_text())]


def closure(file):
    """The file and what it includes of ours, below csrc."""
    seen, ahead = set(), [file]
    while ahead:
        path = ahead.pop()
        if path in seen:
            continue
        seen.add(path)
        text = (ROOT / "csrc" / path).read_text()
        ahead += [
            name
            for name in re.findall(r'^#\s*include "([^"]+)"', text, re.MULTILINE)
            if (ROOT / "csrc" / name).exists()
        ]
    return seen
