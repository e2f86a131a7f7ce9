"""What the machine offers to a build: tools, cores, memory. Standard library only."""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fail(message):
    """Stop with one line; raised at any depth, setuptools and pip print it without a traceback."""
    raise SystemExit(f"flashinfer_lite: {message}")


def sources(*patterns):
    """Paths relative to the root, sorted so that the ninja file is the same on every machine."""
    paths = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def build_folder(sanitize=""):
    """Where the package's libraries are built; each sanitizer has a folder of its own."""
    flavour = f"-{sanitize.replace(',', '-')}" if sanitize else ""
    return ROOT / "build" / f"ninja-{sysconfig.get_platform()}{flavour}"


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


def max_jobs(bytes_per_job):
    """Compiler jobs at a time: MAX_JOBS, else what cores and free memory allow."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            fail(f"MAX_JOBS: expected a positive integer, got {asked!r}")
        return int(asked)
    # The affinity mask, where there is one, also knows what taskset or a container left us.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, free_memory() // bytes_per_job))


def find_ninja():
    """The ninja beside this Python (its directory need not be on PATH), else the one on PATH."""
    beside = shutil.which("ninja", path=Path(sys.executable).parent)
    return beside or shutil.which("ninja") or fail("ninja not found: pip install ninja")


def find_compiler():
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        fail(f"no C++ compiler ({command[0]} not found): sudo apt install g++")
    return command
