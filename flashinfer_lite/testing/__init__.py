"""What tests and benchmarks share: inputs, checks, tolerance, poison, ISA levels, the executor.

tolerance   how close is close: the only place with numbers
inputs      q, k, v in every layout and every hostile range
check       a call, and its gradients, against the oracle
poison      guard bands, and outputs that start as NaN
isa         force one ISA level of the CPU kernels
simt        the CUDA kernels on the executor (`make simt`)
"""

from flashinfer_lite.testing.check import check_backward, check_forward
from flashinfer_lite.testing.inputs import LAYOUTS, make_mask, make_qkv, make_varlen, on_device
from flashinfer_lite.testing.isa import (
    ALL_LEVELS,
    AMX_EMULATED,
    BF16_EMULATED,
    EMULATED,
    current_isa,
    force_isa,
    isa_levels,
)
from flashinfer_lite.testing.poison import Guarded, guarded
from flashinfer_lite.testing.tolerance import (
    assert_close,
    assert_close_elementwise,
    assert_close_strict,
    assert_lse_close,
    assert_same_bits,
)

__all__ = [
    "ALL_LEVELS",
    "AMX_EMULATED",
    "BF16_EMULATED",
    "EMULATED",
    "LAYOUTS",
    "Guarded",
    "assert_close",
    "assert_close_elementwise",
    "assert_close_strict",
    "assert_lse_close",
    "assert_same_bits",
    "check_backward",
    "check_forward",
    "current_isa",
    "force_isa",
    "guarded",
    "isa_levels",
    "make_mask",
    "make_qkv",
    "make_varlen",
    "on_device",
]
