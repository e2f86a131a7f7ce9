"""Tensors that end where a page begins that must not be touched.

For processes of their own, which end by `os._exit`: the mappings cannot be closed while tensors
have them.
"""

import ctypes
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import torch

_libc, _kept = ctypes.CDLL(None, use_errno=True), []


def at_the_end(*shape):
    """A bfloat16 tensor of 0.5."""
    count = math.prod(shape)
    pages = -(-2 * count // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    _kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    page = ctypes.c_void_p(address + pages)
    if _libc.mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=torch.bfloat16, count=pages // 2)
    return flat[pages // 2 - count :].view(shape).fill_(0.5)


def run_child(code, *arguments):
    """Run a program that imports this module and ends by os._exit(7)."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 7, f"after {done.stdout!r}: {done.stderr}"
