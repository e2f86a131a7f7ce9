"""The driver's own readings of the GPU: clocks, power, temperature. Imports no torch."""

from __future__ import annotations

import subprocess

SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def smi(fields: tuple[str, ...] = SMI_FIELDS) -> dict[str, str]:
    """Return what nvidia-smi reads now; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(fields, values, strict=False))
