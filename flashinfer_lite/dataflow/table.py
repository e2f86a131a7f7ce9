"""The measured table: one JSON file, by device, dtype and [N, K], and the reasons to refuse it."""

import contextlib
import datetime
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashinfer_lite import _ops
from flashinfer_lite.dataflow.inflection import KERNELS

SCHEMA = 1
# Raise it when gemv or flat_gemm gets another speed: tables measured before are then refused.
KERNEL_VERSION = 2
FIELDS = {"torch": str, "library": str, "kernel_version": int, "date": str, "contention": str}


class TableError(ValueError):
    """A table that must not be applied here; the text says why, in one line."""


def device_key(device_type: str, threads: int) -> str:
    """The name of this machine's processor, as tables are filed under it.

    Args:
        device_type: "cpu", or "cuda" for the current CUDA device.
        threads: torch's threads; they count on the CPU alone.
    """
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"cuda, {torch.cuda.get_device_name()}, capability {major}.{minor}"
    isa = _ops.cpu_isa() if _ops.built else "not built"
    return f"cpu, {_cpu_name()}, {isa}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    # A virtual machine's "model name" may be the maker's alone; the numbers tell models apart.
    found = (
        re.search(rf"^{name}\s*:\s*(.*\S)", text, re.MULTILINE)
        for name in ("model name", "cpu family", "model")
    )
    name, family, model = (match[1] if match else "" for match in found)
    numbers = f" (family {family}, model {model})" if family and model else ""
    return (name or os.uname().machine) + numbers


@dataclass(frozen=True)
class Entry:
    """What was measured for one dtype and [N, K].

    Attributes:
        m1, m2: gemv for M <= m1, flat_gemm for m1 < M <= m2, vendor beyond.
        curves: {kernel: {M: seconds}}, each the median of the faster half of the rounds.
        rounds: the fewest of any M.
    """

    m1: int
    m2: int
    curves: dict[str, dict[int, float]]
    rounds: int


@dataclass
class Table:
    """Inflection points of one device.

    Attributes:
        device: `device_key` of where they were measured.
        entries: {(dtype's name, N, K): Entry}.
        torch, library: versions; the vendor's kernels are torch's.
        kernel_version: of gemv and flat_gemm.
        date: when the last entry was measured, ISO 8601 in UTC.
        contention: what other work got in the way, in words; "" for none seen.
    """

    device: str
    entries: dict[tuple[str, int, int], Entry] = field(default_factory=dict)
    torch: str = torch.__version__
    library: str = ""
    kernel_version: int = KERNEL_VERSION
    date: str = ""
    contention: str = ""

    def __post_init__(self):
        self.library = self.library or _library_version()
        now = datetime.datetime.now(datetime.timezone.utc)
        self.date = self.date or now.isoformat(timespec="seconds")

    def why_stale(self) -> str | None:
        """Why these times are not those of the installed library; None if they are."""
        for name, has, here in (
            ("flashinfer_lite", self.library, _library_version()),
            ("torch", self.torch, torch.__version__),
            ("version of the kernels", self.kernel_version, KERNEL_VERSION),
        ):
            if has != here:
                return f"stale: measured with {name} {has}, this is {here}"
        return None

    def save(self, path: str | os.PathLike) -> None:
        """Write the table into a JSON file, which appears whole or not at all.

        What the file has of other devices stays; so do this device's entries of other shapes,
        unless they are stale. A file that is damaged or has another schema is replaced.

        Args:
            path: the file; its folder is made if need be.

        Raises:
            OSError: if it cannot be written.
        """
        path = Path(path)
        try:
            sections = _read(path)
            mine = _table(self.device, sections[self.device]) if self.device in sections else None
        except TableError:
            sections, mine = {}, None
        kept = mine.entries if mine and not mine.why_stale() else {}
        sections[self.device] = _section(self, kept | self.entries)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"schema": SCHEMA, "devices": sections}, file, indent=1)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | None = None) -> "Table":
        """Read a device's table from a file.

        Args:
            path: the JSON file.
            device: its `device_key`; None: this machine's CPU with torch's threads.

        Raises:
            TableError: if the file cannot be read, is damaged, has another schema, has nothing of
                the device, or is stale: another library, kernel or torch version measured it.
        """
        device = device or device_key("cpu", torch.get_num_threads())
        # All of it is checked, for a damaged file is not to be trusted in its other parts.
        tables = {key: _table(key, section) for key, section in _read(Path(path)).items()}
        if device not in tables:
            others = "; ".join(tables) or "nothing"
            raise TableError(f"foreign: measured on ({others}), this is ({device})")
        if reason := tables[device].why_stale():
            raise TableError(reason)
        return tables[device]


def shape_key(dtype: str, n: int, k: int) -> str:
    """How an entry is called in the file."""
    return f"{dtype} {n},{k}"


def _library_version():
    from flashinfer_lite import __version__

    return __version__


def _read(path):
    """The sections of a file, {device: ...}; TableError with the reason if it has none."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise TableError(f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TableError(f"damaged: not JSON ({error})") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise TableError("damaged: no schema")
    if content["schema"] != SCHEMA:
        raise TableError(f"stale: schema {content['schema']!r}, this is {SCHEMA}")
    sections = content.get("devices")
    if not isinstance(sections, dict):
        raise TableError("damaged: no devices")
    return sections


def _section(table, entries):
    return {name: getattr(table, name) for name in FIELDS} | {
        "shapes": {shape_key(*key): _content(entry) for key, entry in sorted(entries.items())}
    }


def _content(entry):
    ms = sorted(set().union(*entry.curves.values()))
    seconds = {name: [curve.get(m) for m in ms] for name, curve in entry.curves.items()}
    return {"m1": entry.m1, "m2": entry.m2, "rounds": entry.rounds, "m": ms, "seconds": seconds}


def _table(device, section):
    """A section as a Table; TableError if any of it is not what `_section` writes."""
    try:
        fields = {name: section[name] for name in FIELDS}
        for name, value in fields.items():
            _expect(type(value) is FIELDS[name], f"{name} {value!r}")
        entries = {_key(name): _entry(name, what) for name, what in section["shapes"].items()}
        return Table(device=device, entries=entries, **fields)
    except TableError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TableError(f"damaged: section ({device}): {reason}") from error


def _key(name):
    match = re.fullmatch(r"(float16|bfloat16|float32) ([1-9]\d*),([1-9]\d*)", name)
    _expect(match is not None, f"shape {name!r}")
    return match[1], int(match[2]), int(match[3])


def _entry(name, content):
    m1, m2, ms, rounds = (content[field] for field in ("m1", "m2", "m", "rounds"))
    _expect(_integers([m1, m2, rounds, *ms]) and ms == sorted(set(ms)), f"{name}: integers")
    _expect(0 <= m1 <= m2, f"{name}: m1 = {m1}, m2 = {m2}")
    curves = {}
    for kernel, seconds in content["seconds"].items():
        _expect(kernel in KERNELS and len(seconds) == len(ms), f"{name}: curve of {kernel}")
        curve = {m: s for m, s in zip(ms, seconds, strict=True) if s is not None}
        _expect(
            all(isinstance(s, float) and 0 < s < float("inf") for s in curve.values()),
            f"{name}: seconds of {kernel}",
        )
        curves[kernel] = curve
    return Entry(m1, m2, curves, rounds)


def _integers(values):
    return all(type(value) is int and value >= 0 for value in values)


def _expect(fine, what):
    if not fine:
        raise TableError(f"damaged: {what}")
