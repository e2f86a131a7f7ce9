"""The table of CUDA kernels: its rules, the sources made from it, and the reports on its rows."""

import dataclasses
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent.parent / name) for name in ("csrc", "scripts")]
import instances
import kernel_report as report

ROOT = Path(__file__).parent.parent
ROWS = instances.ROWS
# Rows of no table, so that the table may change.
COMBINE = instances.Row(kernel="combine", arch=80, dtype="bfloat16", partial="float32")
DECODE = instances.Row(
    kernel="decode",
    arch=80,
    dtype="bfloat16",
    head_dim=128,
    block_m=16,
    block_n=16,
    num_warps=4,
    num_stages=4,
)


def test_names_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_budget():
    per_kernel = Counter((row.kernel, row.arch) for row in ROWS)
    assert max(per_kernel.values()) <= instances.MAX_ROWS_PER_KERNEL_AND_ARCH, per_kernel
    assert len(ROWS) <= instances.MAX_ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_complete(row):
    """Every field that the kernel's Cfg has, and no other."""
    given = {
        field.name for field in dataclasses.fields(row) if getattr(row, field.name) is not None
    }
    assert given - {"allow_spill"} == {"kernel", "arch", "dtype", *row.traits.fields}
    assert row.dtype in instances.DTYPES
    assert (ROOT / f"csrc/cuda/kernels/{row.kernel}/sm{row.arch}.cuh").exists()


@pytest.mark.parametrize("kernel", ["attention_fwd", "attention_bwd", "decode"])
@pytest.mark.parametrize("dtype", instances.DTYPES)
def test_every_head_dim_up_to_256_has_a_row(kernel, dtype):
    sizes = {row.head_dim for row in ROWS if (row.kernel, row.dtype) == (kernel, dtype)}
    assert sizes == {64, 128, 256}


def test_unit_of_a_row():
    text = instances.unit_text(DECODE)
    assert '#include "cuda/kernels/decode/sm80.cuh"' in text
    assert "using Element = BFloat16;" in text
    assert "static constexpr int num_stages = 4;" in text
    assert "make_instance<decode_kernel::Kernel<Cfg>>" in text
    assert "using Partial = float;" in instances.unit_text(COMBINE)
    assert "head_dim" not in instances.unit_text(COMBINE)


def test_both_compilers_get_the_same_text(tmp_path):
    for_nvcc, list_for_nvcc = instances.generate(tmp_path / "nvcc", ".cu", ROWS)
    for_executor, list_for_executor = instances.generate(tmp_path / "executor", ".cpp", ROWS)
    assert list(for_nvcc) == list(for_executor) == ROWS
    for row in ROWS:
        assert for_nvcc[row].read_text() == for_executor[row].read_text()
    assert list_for_nvcc.read_text() == list_for_executor.read_text()


def test_list_keeps_the_order_of_the_table():
    text = instances.list_text(ROWS)
    places = [text.index(f"&{row.name}::instance") for row in ROWS]
    assert places == sorted(places)
    assert f"kNumInstances = {len(ROWS)};" in text


def test_generator_leaves_unchanged_files_alone(tmp_path):
    units, listing = instances.generate(tmp_path, ".cpp", [DECODE, COMBINE])
    before = {path: path.stat().st_mtime_ns for path in (*units.values(), listing)}
    instances.generate(tmp_path, ".cpp", [DECODE, COMBINE])
    assert {path: path.stat().st_mtime_ns for path in before} == before

    changed = dataclasses.replace(DECODE, block_n=64)
    instances.generate(tmp_path, ".cpp", [changed, COMBINE])
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in before if before[path] != after[path]} == {units[DECODE]}


def test_generator_removes_what_left_the_table(tmp_path):
    units, listing = instances.generate(tmp_path, ".cpp", [DECODE, COMBINE])
    instances.generate(tmp_path, ".cpp", [DECODE])
    assert set(tmp_path.iterdir()) == {units[DECODE], listing}


def test_rows_can_be_chosen_by_name(monkeypatch):
    monkeypatch.delenv("FLASHINFER_LITE_ROWS", raising=False)
    assert instances.selected_rows() == ROWS
    monkeypatch.setenv("FLASHINFER_LITE_ROWS", "decode_*_d128*,combine_*")
    assert instances.selected_rows() == [
        row
        for row in ROWS
        if row.kernel == "combine" or (row.kernel == "decode" and row.head_dim == 128)
    ]
    monkeypatch.setenv("FLASHINFER_LITE_ROWS", "decode_*,decode_sm70_*")
    with pytest.raises(SystemExit, match=r"FLASHINFER_LITE_ROWS: no row matches 'decode_sm70_\*'"):
        instances.selected_rows()


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN1k3CfgE' for 'sm_80'
ptxas info    : Function properties for _ZN1k3CfgE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem, 760 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN1k3CfgE' for 'sm_90'
ptxas warning : Registers are spilled to local memory in function '_ZN1k3CfgE', 28 bytes spill \
stores, 32 bytes spill loads
ptxas info    : Function properties for _ZN1k3CfgE
    64 bytes stack frame, 28 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 64 bytes cumulative stack size
"""


def test_report_reads_ptxas():
    usage = report.parse_ptxas(PTXAS)
    columns = report.PTXAS_COLUMNS
    assert [usage["sm_80"][column] for column in columns] == [168, 0, 0, 0, 1024]
    assert [usage["sm_90"][column] for column in columns] == [255, 64, 28, 32, 0]


def test_report_refuses_a_spill_that_its_row_does_not_allow():
    spilled = report.parse_ptxas(PTXAS)
    clean = {"sm_80": spilled["sm_80"]}
    allows = {
        number: dataclasses.replace(DECODE, allow_spill=instances.Spill(number, "rare"))
        for number in (59, 60)
    }
    assert "spills 60 bytes on sm_90, may spill 0;" in report.spill_problem(DECODE, spilled)
    assert "spills 60 bytes on sm_90, may spill 59;" in report.spill_problem(allows[59], spilled)
    assert report.spill_problem(allows[60], spilled) is None
    assert report.spill_problem(DECODE, clean) is None
    assert "spills nothing" in report.spill_problem(allows[60], clean)
    assert "no kernel" in report.spill_problem(DECODE, report.parse_ptxas(""))


def test_the_committed_report_is_of_this_table():
    """`make static` writes it anew."""
    lines = (ROOT / "docs/kernels/static.md").read_text().splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith("| `")]
    assert list(dict.fromkeys(row.strip("| `") for row, *_ in cells)) == [row.name for row in ROWS]
    introduction = report.STATIC_INTRODUCTION.splitlines()
    written = re.escape(introduction[2]).replace(r"\{release\}", r"\d+\.\d+")
    assert re.fullmatch(written, lines[2]), lines[2]
    assert lines[3 : len(introduction)] == introduction[3:]


SASS = """\
\t\tFunction : _ZN1k3CfgE
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_PTX_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
                                                            /* 0x000fe40000000f00 */
        /*0010*/               @P0 LDG.E.128 R4, [R2.64] ;  /* 0x0000000402047981 */
        /*0020*/              @!P1 LDGSTS.E.BYPASS.LTC128B.128 [R7], [R2.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
"""


def test_report_reads_sass():
    counts = report.parse_sass(f"\tcode for sm_80\n{SASS}\tcode for sm_90\n{SASS}{SASS}")
    assert {arch: opcodes.total() for arch, opcodes in counts.items()} == {"sm_80": 5, "sm_90": 10}
    found = {name: report.count(counts["sm_80"], name) for name in report.SASS_COLUMNS}
    assert {name for name, number in found.items() if number} == {"LDG", "LDGSTS", "HMMA"}
    assert found["LDG"] == 1
