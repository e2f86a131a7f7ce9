"""Which kernel runs a flat product: the table in force, or the shipped thresholds."""

import functools
import math
import os
import warnings
from dataclasses import dataclass
from operator import index
from pathlib import Path

import torch
from torch import get_num_threads
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashinfer_lite import _ops
from flashinfer_lite.dataflow.table import Table, TableError, device_key

VENDOR_ONLY = (0, 0)  # thresholds of what gemv and flat_gemm do not take
# Shipped (M1, M2) by processor, dtype and [N, K], for a device without a table of its own.
DEFAULTS: dict[str, dict[torch.dtype, dict[tuple[int, int], tuple[int, int]]]] = {
    # Measured on an AMD EPYC (avx2, 1 thread, torch 2.13) by `python -m flashinfer_lite tune` up to
    # M = 64, where torch's 16-bit products still took four times as long. The 128 of SmolLM2's
    # shapes are of an earlier and slower build of the kernels, which had not met torch there yet.
    "cpu": {
        torch.float32: {
            (192, 576): (4, 32),
            (576, 576): (0, 32),
            (576, 1536): (4, 18),
            (1536, 576): (1, 32),
            (49152, 576): (2, 64),
            (4096, 4096): (4, 36),
            (4096, 11008): (4, 32),
            (11008, 4096): (4, 64),
            (12288, 4096): (4, 64),
        },
        torch.bfloat16: {
            (192, 576): (64, 128),
            (576, 576): (2, 128),
            (576, 1536): (4, 128),
            (1536, 576): (4, 128),
            (49152, 576): (4, 128),
            (4096, 4096): (4, 64),
            (4096, 11008): (4, 64),
            (11008, 4096): (4, 64),
            (12288, 4096): (4, 64),
        },
        torch.float16: {
            (192, 576): (64, 128),
            (576, 576): (16, 128),
            (576, 1536): (4, 128),
            (1536, 576): (4, 128),
        },
    },
    # bfloat16: measured on a Xeon at the level avx512, AMX denied to torch (ONEDNN_MAX_CPU_ISA), 1
    # thread, M = 1 to 64: ours are 1.8 times as fast as torch at 4 and 8 rows, as fast at 64. The
    # others are reasoned: torch catches up as soon as a product is more than reading the weight.
    "cpu avx512": {
        torch.float32: {(4096, 4096): (8, 32)},
        torch.bfloat16: {(4096, 4096): (4, 64)},
        torch.float16: {(4096, 4096): (4, 16)},
    },
    # Measured on a Xeon with AMX (1 thread), M = 1 to 64: gemv is as fast at one row, flat_gemm
    # from 4 rows on, 1.2 to 2.2 times as fast as torch. M2 reasoned: twice 64 rows read the weight
    # twice, still below torch's time. What is not here is as without AMX.
    "cpu amx": {
        torch.bfloat16: {(4096, 4096): (1, 128)},
    },
    # Measured on an H200, M = 1 to 64: docs/kernels/gemv.md, flat_gemm.md.
    "cuda": dict.fromkeys(
        (torch.bfloat16, torch.float16),
        {
            (12288, 4096): (2, 2),
            (4096, 4096): (2, 2),
            (11008, 4096): (2, 2),
            (4096, 11008): (2, 16),
        },
    ),
}


@dataclass(frozen=True)
class InForce:
    """The table that choices come from.

    Attributes:
        table: None where the shipped defaults are in force.
        path: the file that was looked for.
        refusal: why its table is not in force; "" if it is.
    """

    table: Table | None
    path: Path
    refusal: str


_loaded: dict[str, Path] = {}  # what `load` was given, by device type


def cache_dir() -> Path:
    """The cache folder: $FLASHINFER_LITE_CACHE, else flashinfer_lite under $XDG_CACHE_HOME or
    ~/.cache."""
    chosen = os.environ.get("FLASHINFER_LITE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(chosen or os.path.join(base, "flashinfer_lite")))


def table_path(device_type: str = "cpu") -> Path:
    """The file that tables are read from: `load`'s, else $FLASHINFER_LITE_TUNED, else tuned.json
    in the cache folder."""
    if device_type in _loaded:
        return _loaded[device_type]
    named = os.environ.get("FLASHINFER_LITE_TUNED")
    return Path(os.path.expanduser(named)) if named else cache_dir() / "tuned.json"


def in_force(device_type: str) -> InForce:
    """The table in force on the CPU with torch's threads, or on the current CUDA device.

    The file is read at the first call and remembered. One that cannot be applied is refused with a
    warning, once. No file in the cache folder is no reason to warn.
    """
    return _in_force(device_type, _threads(device_type))


def _threads(device_type):
    return get_num_threads() if device_type == "cpu" else 0


@functools.lru_cache(maxsize=64)
def _in_force(device_type, threads):
    path = table_path(device_type)
    asked = device_type in _loaded or os.environ.get("FLASHINFER_LITE_TUNED")
    if not asked and not os.path.exists(path):
        return InForce(None, path, "no such file")
    try:
        return InForce(Table.load(path, device_key(device_type, threads)), path, "")
    except TableError as error:
        warnings.warn(
            f"{path} is not applied: {error}. The shipped defaults are; to measure anew: "
            f"{redo(device_type, threads, path)}",
            stacklevel=2,
        )
        return InForce(None, path, str(error))


def redo(device_type: str, threads: int, path: Path) -> str:
    """The command that measures a table for a device into a file."""
    which = f"--threads {threads}" if device_type == "cpu" else f"--device {device_type}"
    return f"python -m flashinfer_lite tune --model DIR {which} --output {path}"


def load(path: str | os.PathLike, device_type: str = "cpu") -> Table:
    """Put the table of a file in force for this process, ahead of the environment and the cache.

    Args:
        path: a file that `python -m flashinfer_lite tune` or `Table.save` has written.
        device_type: "cpu" (with torch's present number of threads) or "cuda".

    Returns:
        The table.

    Raises:
        TableError: if it is stale, foreign or damaged; what was in force stays so.
    """
    table = Table.load(path, device_key(device_type, _threads(device_type)))
    _loaded[device_type] = Path(path)
    _forget()
    return table


def unload() -> None:
    """Forget what was loaded: the next choice reads the environment and the cache folder anew.

    Needed only after a table, the environment or the instruction set has changed in a running
    process. Graphs that torch.compile has made keep the choice that they were made with.
    """
    _loaded.clear()
    _forget()


def _forget():
    _in_force.cache_clear()
    _thresholds.cache_clear()


def nearest(shapes, n: int, k: int) -> tuple[int, int]:
    """Of some [N, K] the one that is nearest in the logarithms of N and K."""
    return min(shapes, key=lambda s: (abs(math.log(s[0] / n)) + abs(math.log(s[1] / k)), s))


def _shipped(device_type, dtype):
    """{(N, K): (M1, M2)} of the processor, or None."""
    processors = [device_type]
    if device_type == "cpu":
        if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
            processors.append("cpu avx512")
        if _ops.built and _ops.cpu_isa() in ("amx", "amx-emulated"):
            processors.append("cpu amx")
    found = [DEFAULTS[name][dtype] for name in processors if dtype in DEFAULTS.get(name, ())]
    return found[-1] if found else None


@functools.lru_cache(maxsize=4096)
def _thresholds(device_type, dtype, n, k, threads):
    """((M1, M2), where they come from)."""
    shipped = _shipped(device_type, dtype)
    if shipped is None or not n or not k:
        return VENDOR_ONLY, f"no other kernel takes {dtype} on {device_type}"
    found = _in_force(device_type, threads)
    name = str(dtype).removeprefix("torch.")
    entries = found.table.entries if found.table else {}
    tuned = {key[1:]: entry for key, entry in entries.items() if key[0] == name}
    if tuned:
        shape = nearest(tuned, n, k)
        return (tuned[shape].m1, tuned[shape].m2), f"{found.path}, measured at {list(shape)}"
    shape = nearest(shipped, n, k)
    why = f"; {found.path}: {found.refusal or f'nothing in {name}'}"
    return shipped[shape], f"the shipped default of {list(shape)}{why}"


# A compiled graph keeps the answer as a constant, so dynamo sees neither the file nor the caches.
@torch.compiler.assume_constant_result
def thresholds(device_type: str, dtype: torch.dtype, n: int, k: int) -> tuple[int, int]:
    """(M1, M2) of a product x [M, K] times weight [N, K]: gemv for M <= M1, flat_gemm for
    M1 < M <= M2, vendor beyond.

    From the table in force: the entry of [N, K], else the nearest that was measured in the dtype,
    by the sum of |log| of the ratios of N and K; without a table the same rule on the shipped
    defaults. (0, 0) for what only the vendor takes.
    """
    return _thresholds(device_type, dtype, n, k, _threads(device_type))[0]


# Called while dynamo traces, not traced: torch 2.11 would answer True to every torch.compile.
@torch.compiler.assume_constant_result
def _exporting() -> bool:
    return torch.compiler.is_exporting()


def choose(device_type: str, dtype: torch.dtype, n: int, k: int, m: int) -> str:
    """The kernel for x [M, K] times weight [N, K], transposed: the heuristic dataflow of
    FlashDecoding++ (arXiv 2311.01282, section 5).

    A look-up: no tensor, no allocation that lasts, and under torch.compile a constant for each
    [N, K] and at most two comparisons of M. torch.export does not compare: a dynamic M takes the
    first kernel that M cannot be too large for, in the range given.

    Args:
        device_type: "cpu" or "cuda"; of another one the vendor's kernel is the answer.
        dtype: of x and weight.
        n, k, m: sizes, integers.

    Returns:
        "gemv", "flat_gemm" or "vendor".

    Example:
        >>> choose("cpu", torch.float64, 4096, 4096, 1)
        'vendor'
    """
    # index makes a number of what dynamo traces as a symbol: weights may be dynamic there.
    last_gemv, last_flat = thresholds(device_type, dtype, index(n), index(k))
    # An exported graph holds one kernel, which must suit each M of the range that was asked for.
    holds = statically_known_true if _exporting() else bool
    if holds(m <= last_gemv):
        return "gemv"
    return "flat_gemm" if holds(m <= last_flat) else "vendor"


def explain_choice(device_type: str, dtype: torch.dtype, n: int, k: int, m: int) -> str:
    """Why `choose` answers as it does: M1 and M2, and where they come from; a refused table and the
    reason included."""
    (m1, m2), source = _thresholds(device_type, dtype, n, k, _threads(device_type))
    return f"M = {m}, M1 = {m1}, M2 = {m2} for [{n}, {k}] by {source}"


def report() -> list[str]:
    """Lines on the table in force for each device type that is here, for `doctor`."""
    lines = []
    for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = in_force(device_type)
        if found.table:
            shapes = len(found.table.entries)
            lines.append(f"{device_type}: {found.path}, {shapes} shapes, {found.table.date}")
        else:
            lines.append(f"{device_type}: shipped defaults; {found.path}: {found.refusal}")
            if found.refusal != "no such file":
                lines.append(f"to measure: {redo(device_type, _threads(device_type), found.path)}")
    return lines
