"""The heuristic dataflow of FlashDecoding++ (arXiv 2311.01282, section 5).

A product with few rows, x [M, K] times weight [N, K] transposed, is fastest by `gemv` for the
smallest M, by `flat_gemm` for some more, and by the vendor's GEMM beyond. The two M at which the
fastest changes, the inflection points M1 and M2, depend on the machine, the dtype and [N, K]:
`python -m flashinfer_lite tune` measures them, `choose` looks them up.

    choice.py      the table in force, the shipped defaults, `choose`
    table.py       the measured table as a JSON file, and the reasons to refuse it
    inflection.py  from curves to M1 and M2
    measure.py     timing; tuning.py: of a whole shape; shapes.py: which shapes
    command.py     the command; plot.py: its picture
"""

from flashinfer_lite.dataflow.choice import (
    cache_dir,
    choose,
    explain_choice,
    in_force,
    load,
    table_path,
    thresholds,
    unload,
)
from flashinfer_lite.dataflow.inflection import inflection_points
from flashinfer_lite.dataflow.table import Entry, Table, TableError, device_key
from flashinfer_lite.dataflow.tuning import tune

__all__ = [
    "Entry",
    "Table",
    "TableError",
    "cache_dir",
    "choose",
    "device_key",
    "explain_choice",
    "in_force",
    "inflection_points",
    "load",
    "table_path",
    "thresholds",
    "tune",
    "unload",
]
