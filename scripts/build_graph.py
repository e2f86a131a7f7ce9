"""A ninja file, written line by line, and the call of ninja. Standard library only."""

import fcntl
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from build_machine import ROOT, fail, find_compiler, find_ninja


def escaped(path):
    """Escape what ninja's own syntax would read: `$`, space and colon."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def place(built, wanted, as_of):
    """Copy by rename: a process that has the old library mapped keeps it whole.

    The copy's time is that of the build's begin, whether or not anything had to be compiled: what
    is newer has not been looked at.
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    partial = wanted.with_name(wanted.name + ".partial")
    shutil.copy(built, partial)
    os.utime(partial, (as_of, as_of))
    os.replace(partial, wanted)


class Graph:
    """Objects, dependency files and links of one build, all below one persistent directory."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines = ["ninja_required_version = 1.10", f"builddir = {escaped(folder)}"]
        self.command("cxx", find_compiler())
        # -MD, not -MMD: torch's and CUDA's are system headers, and new ones must rebuild too.
        self.rule("cxx", "$cxx -MD -MF $out.d $flags -c $in -o $out", "CXX $in", depfile="$out.d")
        self.rule("link", "$cxx $flags -o $out $in $libraries", "LINK $out")

    def command(self, name, arguments):
        """A variable that holds a command line, or a part of one."""
        self.lines.append(f"{name} = {shlex.join(map(str, arguments))}")

    def rule(self, name, command, title, **settings):
        if "depfile" in settings:
            settings["deps"] = "gcc"
        settings = {"command": command, "description": title, **settings}
        self.lines.append(f"rule {name}")
        self.lines += [f"  {key} = {value}" for key, value in settings.items()]

    def pool(self, name, depth):
        self.lines += [f"pool {name}", f"  depth = {depth}"]

    def build(self, target, rule, inputs, beside="", **variables):
        """`beside` is a second file that the rule writes; `variables` are in ninja's syntax."""
        outputs = f"{escaped(target)} | {escaped(beside)}" if beside else escaped(target)
        self.lines.append(f"build {outputs}: {rule} {' '.join(map(escaped, inputs))}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]

    def compile(self, source, flags, below=""):
        """Compile a source below the root or below our own folder; -> its object file.

        `below` is a folder in our own, for a source that is compiled in more than one way.
        """
        source = ROOT / source
        base = self.folder if source.is_relative_to(self.folder) else ROOT
        target = self.folder / below / f"{source.relative_to(base)}.o"
        self.build(target, "cxx", [source], flags=flags)
        return target

    def link(self, target, objects, flags, libraries=()):
        target = self.folder / target
        libraries = shlex.join(map(str, libraries))
        self.build(target, "link", objects, flags=flags, libraries=libraries)
        return target

    def run(self, jobs):
        ninja_file = self.folder / "build.ninja"
        text = "\n".join(self.lines) + "\n"
        ninja = [find_ninja(), "-f", str(ninja_file)]
        # Two ninjas in one directory spoil each other's logs; the second waits. The kernel drops
        # the lock with its holder, however that ends.
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not ninja_file.exists() or ninja_file.read_text() != text:
                ninja_file.write_text(text)
            if subprocess.run([*ninja, "-j", str(jobs)]).returncode != 0:
                fail("compilation failed, the compiler's message is above")

    def compile_commands(self):
        """Text of a compile_commands.json."""
        tool = [find_ninja(), "-f", str(self.folder / "build.ninja"), "-t", "compdb", "cxx"]
        return subprocess.run(tool, capture_output=True, text=True, check=True).stdout
