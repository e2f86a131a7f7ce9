"""The ISA levels of the CPU kernels: which are here, and how to force one."""

import contextlib

from flashinfer_lite import _ops

ALL_LEVELS = ("baseline", "avx2", "avx512", "avx512-bf16", "amx")
# The kernels of a level on its instructions in software: for tests, never chosen by themselves.
AMX_EMULATED = "amx-emulated"
BF16_EMULATED = "avx512-bf16-emulated"
EMULATED = (BF16_EMULATED, AMX_EMULATED)


def isa_levels(emulated=False):
    """The levels compiled in and present on this machine, the newest last; `emulated` adds those
    for tests alone."""
    return list(_ops.cpu_isas(emulated))


def current_isa():
    """The level in force."""
    return _ops.cpu_isa()


@contextlib.contextmanager
def force_isa(name):
    """Run the CPU kernels of one level in this block, process-wide; None is the default one.

    Raises:
        Whatever the library raises for a level that is not present; it lists those that are.

    >>> with force_isa("baseline"):
    ...     current_isa()
    'baseline'
    """
    previous = _ops.cpu_isa()
    _ops.set_cpu_isa(name)
    try:
        yield
    finally:
        _ops.set_cpu_isa(previous)
