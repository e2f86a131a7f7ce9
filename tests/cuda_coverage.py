"""What has run on the executor: a table of instance rows x features, from the calls themselves.

The `executor` fixture makes executors that look at each call's arguments and results and record
which features of which row it met. The terminal summary prints the table. A session that ran a
row's tests, of a file in MATRICES, fails if a cell of that row is empty, unless REFUSED says why.
"""

import string
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
from _pytest.reports import TestReport

from flashinfer_lite.reference import gather_pages
from flashinfer_lite.testing import simt

sys.path.insert(0, str(Path(__file__).parent.parent / "csrc"))
from instances import ROWS

PROPERTY = "cuda_cell"
MATRICES = {
    "test_cuda_kernels.py": ("attention_fwd", "decode", "combine"),
    "test_cuda_append_kv.py": ("append_kv",),
    "test_cuda_backward.py": ("attention_bwd",),
    "test_cuda_flat.py": ("flat_gemm", "gemv"),
    "test_cuda_varlen.py": ("ragged attention_fwd", "ragged attention_bwd"),
}
EXECUTOR = ("late copies", "eager copies", "block order", "2 OS threads")
ATTENTION = (
    *("all keys", "causal q<kv", "causal q=kv", "causal q>kv"),
    *("top left q<kv", "top left q=kv", "top left q>kv", "window"),
    *("bool mask", "additive mask", "-inf in mask", "mask broadcast"),
    *("kv_start", "seqlens int32", "seqlens int64", "softcap", "softcap saturated", "scale <= 0"),
    *("alibi", "alibi by sequence"),
    *("group 1", "group 4", "group 7", "head_dim below row", "head_dim_v differs"),
    *("fused views", "transposed", "stride 0", "misaligned"),
    *("rows 1", "rows tile-1", "rows tile", "rows tile+1"),
    *("keys 0", "keys 1", "keys tile-1", "keys tile", "keys tile+1"),
    *("empty rows", "hidden NaN or inf", "visible NaN or inf", "extreme logits"),
)
UNIFIED = ("sequence alone", "unified", "unified, phi by head", "unified, rows recomputed")
BACKWARD = (
    *(name for name in ATTENTION if not name.startswith(("keys 0", "hidden", "visible"))),
    *("lse gradient", "no lse gradient", "deterministic", "dout strides", "dout misaligned"),
    *("mask gradient", "mask gradient shared", "NaN past the length", "NaN in empty rows"),
)
DECODE = (
    *("1 split", "2 splits", "7 splits", "empty splits", "batch invariant", "queries > 1"),
    "pages",
)
COMBINE = (
    *("1 state", "2 states", "7 states", "40 states", "empty states", "NaN in empty state"),
    *("strides", "columns % 32"),
)
FLAT_LINEAR = (
    *("M 1", "M < block_m", "M = block_m", "M > block_m"),
    *("N < block_n", "N = block_n", "N > block_n", "K % 8", "K < 1 step", "K > ring"),
    *("bias", "no bias", "padded rows", "stride 0", "misaligned x", "misaligned weight"),
    *("padded out", "misaligned out", "NaN behind rows", "NaN in x", "NaN in weight"),
)
APPEND_KV = (
    *("dense", "pages", "seqlens int32", "seqlens int64", "no slot", "no page", "no angle"),
    *("rotary", "rotary by pairs", "rotary in float32"),
    *("head_dim_v differs", "tokens > 1", "dim > 32"),
)
RAGGED = (
    *("int32 offsets", "int64 offsets", "offsets apart", "tails", "no tails", "> 32 sequences"),
    *("no rows", "no keys", "one row", "more rows than keys", "lengths of sequences", "causal"),
)
FLAT_GEMM = ("1 split", "2 splits", "7 splits", "empty splits", "same tickets", "any block_m")
FEATURES = {
    "attention_fwd": (*ATTENTION, *UNIFIED, *EXECUTOR),
    "attention_bwd": (*BACKWARD, *EXECUTOR),
    "decode": (*ATTENTION, *UNIFIED, *DECODE, *EXECUTOR),
    "combine": (*COMBINE, *EXECUTOR),
    "append_kv": (*APPEND_KV, *EXECUTOR),
    "flat_gemm": (*FLAT_LINEAR, *FLAT_GEMM, *EXECUTOR),
    "gemv": (*FLAT_LINEAR, *EXECUTOR),
    "ragged attention_fwd": (*RAGGED, "ragged unified"),
    "ragged attention_bwd": (*RAGGED, "ragged atomics", "ragged deterministic"),
}
# What the host code never asks of a row.
REFUSED = {
    (f"combine_sm80_{dtype}_from_float32", feature): reason
    for dtype in ("bfloat16", "float16")
    for feature, reason in (
        ("1 state", "decode with one split writes out itself"),
        ("strides", "decode's partials are contiguous"),
    )
} | {
    (f"gemv_sm80_{dtype}_m1", "M < block_m"): "there is no M below 1"
    for dtype in ("bfloat16", "float16")
}


def _layouts(x):
    batch_size, seqlen, num_heads, head_dim = x.shape
    strides = [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]
    size = x.element_size()
    if 0 in strides:
        yield "stride 0"
    if num_heads > 1 and x.stride(2) > x.stride(1) > 0:
        yield "transposed"
    elif seqlen > 1 and x.stride(2) == head_dim and x.stride(1) > num_heads * head_dim:
        yield "fused views"
    if x.data_ptr() % 16 or any(s * size % 16 for s in strides[:-1]):
        yield "misaligned"


def _masks(q, k, causal=False, window=(-1, -1), mask=None, kv_start=None, seqlens_kv=None, **_):
    relation = "<" if q.shape[1] < k.shape[1] else "=" if q.shape[1] == k.shape[1] else ">"
    if causal:
        yield f"{'top left' if causal == 'top_left' else 'causal'} q{relation}kv"
    if tuple(window) != (-1, -1):
        yield "window"
    if mask is not None:
        yield "bool mask" if mask.dtype == torch.bool else "additive mask"
        if mask.dtype != torch.bool and (mask == -torch.inf).any():
            yield "-inf in mask"
        full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if mask.shape != full or 0 in mask.stride():
            yield "mask broadcast"
    if kv_start is not None:
        yield "kv_start"
    if seqlens_kv is not None:
        yield f"seqlens {str(seqlens_kv.dtype).removeprefix('torch.')}"
    elif not causal and tuple(window) == (-1, -1) and mask is None and kv_start is None:
        yield "all keys"


def _scores(q, k, softmax_scale=None, softcap=None, alibi_slopes=None, **_):
    if alibi_slopes is not None:
        yield "alibi" if alibi_slopes.dim() == 1 else "alibi by sequence"
    if softmax_scale is not None and softmax_scale <= 0:
        yield "scale <= 0"
    if softcap:
        yield "softcap"
        scale = q.shape[3] ** -0.5 if softmax_scale is None else abs(softmax_scale)
        keys = k.float().repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), keys) * scale / softcap
        if scores.numel() and scores.abs().max() > 10:
            yield "softcap saturated"


def _sizes(row, q, k, v):
    group = q.shape[2] // k.shape[2]
    if group in (1, 4, 7):
        yield f"group {group}"
    if q.shape[3] < row.head_dim:
        yield "head_dim below row"
    if q.shape[3] != v.shape[3]:
        yield "head_dim_v differs"
    for name, size, tile in (
        ("rows", q.shape[1] * group, row.block_m),
        ("keys", k.shape[1], row.block_n),
    ):
        near = {0: "0", 1: "1", tile - 1: "tile-1", tile: "tile", tile + 1: "tile+1"}
        if size in near:
            yield f"{name} {near[size]}"


def _results(q, k, v, out, lse):
    if (lse == -torch.inf).any():
        yield "empty rows"
    if not all(t.isfinite().all() for t in (k, v)):
        yield f"{'hidden' if out.isfinite().all() else 'visible'} NaN or inf"
    if (lse[lse.isfinite()].abs() > 88).any():  # exp of it leaves float32
        yield "extreme logits"


def _flat_sizes(row, m, n, k):
    for name, size, block in (("M", m, row.block_m), ("N", n, row.block_n)):
        relation = "<" if size < block else "=" if size == block else ">"
        yield f"{name} {relation} block_{name.lower()}"
    step = row.block_k or 256 * row.num_warps
    yield from (["M 1"] if m == 1 else [])
    yield from (["K % 8"] if k % 8 else [])
    yield from (["K < 1 step"] if k < step else [])
    yield from (["K > ring"] if k > step * (row.num_stages or 1) else [])


def _flat_layouts(x, weight, out_row=0, out_offset=0):
    for name, t in (("x", x), ("weight", weight)):
        if t.shape[0] > 1 and t.stride(0) != t.shape[1]:
            yield "stride 0" if t.stride(0) == 0 else "padded rows"
        if t.data_ptr() % 16 or (t.stride(0) * 2 % 16 and t.shape[0] > 1):
            yield f"misaligned {name}"
        if not t.isfinite().all():
            yield f"NaN in {name}"
    if out_row > weight.shape[0]:
        yield "padded out"
    if out_offset % 4 or out_row % 4:
        yield "misaligned out"


def _append_kv(
    cache, k, v, seqlens_kv, block_table=None, rotary_cos=None, rotary_interleaved=False, **_
):
    slots = cache.shape[1]
    end = seqlens_kv.long() + k.shape[1]
    yield f"seqlens {str(seqlens_kv.dtype).removeprefix('torch.')}"
    yield "dense" if block_table is None else "pages"
    if (end > (slots if block_table is None else slots * block_table.shape[1])).any():
        yield "no slot"
    if block_table is not None and not ((block_table >= 0) & (block_table < len(cache))).all():
        yield "no page"
    if rotary_cos is not None:
        yield "rotary by pairs" if rotary_interleaved else "rotary"
        if rotary_cos.dtype == torch.float32:
            yield "rotary in float32"
        if (end > rotary_cos.shape[0]).any():
            yield "no angle"
    yield from (["head_dim_v differs"] if k.shape[3] != v.shape[3] else [])
    yield from (["tokens > 1"] if k.shape[1] > 1 else [])
    yield from (["dim > 32"] if k.shape[3] > 32 else [])


def _ragged(q, k, cu_seqlens_q, cu_seqlens_kv, causal=False, seqlens_kv=None, **_):
    rows, keys = cu_seqlens_q.diff(), cu_seqlens_kv.diff()
    yield f"{str(cu_seqlens_q.dtype).removeprefix('torch.')} offsets"
    ends = [int(cu_seqlens_q[0]), len(q) - int(cu_seqlens_q[-1])]
    yield "tails" if any(ends) else "no tails"
    for name, met in {
        "offsets apart": cu_seqlens_q.stride(0) > 1,
        "> 32 sequences": len(rows) > 32,
        "no rows": ((rows == 0) & (keys > 0)).any(),
        "no keys": ((rows > 0) & (keys == 0)).any(),
        "one row": (rows == 1).any(),
        "more rows than keys": ((rows > keys) & (keys > 0)).any(),
        "lengths of sequences": seqlens_kv is not None,
        "causal": bool(causal),
    }.items():
        if met:
            yield name


class Recording(simt.Executor):
    """An executor of one row that tells `record` of every (row name, feature) that it meets."""

    def __init__(self, row, record, **options):
        super().__init__(row.name, **options)
        self.row = row
        self._record = record

    def record(self, features, name=None):
        options = self.options
        for feature in (
            *features,
            "eager copies" if options.get("eager") else "late copies",
            *(["block order"] if options["seed"] > 1 else []),
            *(["2 OS threads"] if options.get("threads", 1) == 2 else []),
        ):
            self._record(name or self.row.name, feature)

    def _record_attention(self, q, k, v, arguments, out, lse):
        self.record(
            [
                *_masks(q, k, **arguments),
                *_scores(q, k, **arguments),
                *_sizes(self.row, q, k, v),
                *(name for x in (q, k, v) if x.numel() for name in _layouts(x)),
                *_results(q, k, v, out, lse),
                *self._unified(**arguments),
            ]
        )

    def _unified(self, phi=None, softmax="auto", **_):
        if phi is None and softmax != "unified":
            return
        yield "unified"
        if torch.is_tensor(phi):
            yield "unified, phi by head"
        if 0 < self.rows_recomputed < self.rows_checked:
            yield "unified, rows recomputed"

    def attention(self, q, k, v, *, return_lse=False, **arguments):
        out, lse = super().attention(q, k, v, return_lse=True, **arguments)
        self._record_attention(q, k, v, arguments, out, lse)
        return (out, lse) if return_lse else out

    def attention_varlen(self, q, k, v, *offsets, return_lse=False, **arguments):
        result = super().attention_varlen(q, k, v, *offsets, return_lse=return_lse, **arguments)
        offsets = dict(zip(("cu_seqlens_q", "cu_seqlens_kv"), offsets, strict=False))
        unified = ["ragged unified"] if any(self._unified(**arguments)) else []
        self.record([*_ragged(q, k, **offsets, **arguments), *unified])
        return result

    def attention_varlen_bwd(self, *tensors, **arguments):
        gradients = super().attention_varlen_bwd(*tensors, **arguments)
        names = "cu_seqlens_q", "cu_seqlens_kv"
        given = dict(zip(names, tensors[7:], strict=False)) | arguments
        way = "ragged deterministic" if given.pop("deterministic", False) else "ragged atomics"
        self.record([*_ragged(tensors[2], tensors[3], **given), way])
        return gradients

    def attention_bwd(
        self, dout, dlse, q, k, v, out, lse, *, wants_dmask=False, deterministic=False, **arguments
    ):
        options = {"wants_dmask": wants_dmask, "deterministic": deterministic}
        got = super().attention_bwd(dout, dlse, q, k, v, out, lse, **options, **arguments)
        self._record_attention(q, k, v, arguments, out, lse)
        mask = arguments.get("mask")
        empty = (lse == -torch.inf).transpose(1, 2)
        self.record(
            [
                "no lse gradient" if dlse is None else "lse gradient",
                *(["deterministic"] if deterministic else []),
                *(["dout strides"] if not dout.is_contiguous() else []),
                *(["dout misaligned"] if dout.data_ptr() % 16 else []),
                *(["mask gradient"] if wants_dmask else []),
                *(["mask gradient shared"] if wants_dmask and 1 in mask.shape else []),
                *(["NaN past the length"] if not v.isfinite().all() else []),
                *(["NaN in empty rows"] if q[empty].isnan().any() else []),
            ]
        )
        return got

    def decode(self, q, k, v, *, kv_splits=0, batch_invariant=False, return_lse=False, **arguments):
        splitting = {"kv_splits": kv_splits, "batch_invariant": batch_invariant}
        out, lse = super().decode(q, k, v, return_lse=True, **splitting, **arguments)
        block_table = arguments.pop("block_table", None)
        if block_table is not None:
            self.record(["pages"])
            k, v = (gather_pages(x, block_table) for x in (k, v))
        self._record_attention(q, k, v, arguments, out, lse)
        splits = self.plan.kv_splits
        self.record(["1 split" if splits == 1 else f"{splits} splits"])
        empty = splits > -(-k.shape[1] // self.row.block_n)
        self.record(
            [
                *(["empty splits"] if empty else []),
                *(["batch invariant"] if batch_invariant else []),
                *(["queries > 1"] if q.shape[1] > 1 else []),
            ]
        )
        if splits > 1 and not any(self._unified(**arguments)):  # unwritten partials are NaN
            merged = ["empty states", "NaN in empty state"] if empty else []
            merged += [f"{splits} states", *(["columns % 32"] if v.shape[3] % 32 else [])]
            self.record(merged, f"combine_sm80_{self.row.dtype}_from_float32")
        return (out, lse) if return_lse else out

    def flat_linear(self, x, weight, bias=None, **options):
        out = super().flat_linear(x, weight, bias, **options)
        splits, launches = self.plan.splits, options.get("launches", 1)
        layout = {key: options.get(key, 0) for key in ("out_row", "out_offset")}
        self.record(
            [
                *_flat_sizes(self.row, *x.shape[:1], *weight.shape),
                *_flat_layouts(x, weight, **layout),
                "no bias" if bias is None else "bias",
                "1 split" if splits == 1 else f"{splits} splits",
                *(["empty splits"] if splits > -(-x.shape[1] // 64) else []),
                *(["same tickets"] if splits > 1 and launches > 1 else []),
            ]
        )
        return out

    def append_kv(self, k_cache, v_cache, k, v, **arguments):
        result = super().append_kv(k_cache, v_cache, k, v, **arguments)
        self.record(_append_kv(k_cache, k, v, **arguments))
        return result

    def merge_states(self, outs, lses):
        out, lse = super().merge_states(outs, lses)
        empty = lses == -torch.inf
        self.record(
            [
                f"{len(outs)} state{'s' if len(outs) > 1 else ''}",
                *(["empty states"] if empty.any() else []),
                *(["NaN in empty state"] if outs.transpose(2, 3)[empty].isnan().any() else []),
                *(["strides"] if not outs.is_contiguous() else []),
                *(["columns % 32"] if outs.shape[4] % 32 else []),
            ]
        )
        return out, lse


@pytest.fixture
def executor(record_property):
    """A function that makes the executor of a row: `executor(row, seed=2, eager=True)`."""
    seen = set()

    def record(name, feature):
        if (name, feature) not in seen:
            seen.add((name, feature))
            record_property(PROPERTY, f"{name}|{feature}")

    return lambda row, **options: Recording(row, record, **options)


def _cells(reporter):
    """How many tests met each (row, feature), and the kernels whose whole matrix was asked for."""
    cells, kernels = Counter(), set()
    for report in (*reporter.getreports("passed"), *reporter.getreports("failed")):
        found = [value for name, value in report.user_properties if name == PROPERTY]
        if found and report.when == "call":
            cells.update(tuple(value.split("|")) for value in found)
            for file, of_file in MATRICES.items():
                kernels.update(of_file if file in report.nodeid else ())
    option = reporter.config.option
    narrowed = (
        option.keyword
        or getattr(option, "lf", False)
        or any("::" in arg for arg in reporter.config.args)
    )
    return cells, set() if narrowed else kernels


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Adds a failed test, in the process that has the reports, if a cell is empty."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    cells, kernels = _cells(reporter)
    empty = [
        f"{feature!r} on {row.name}"
        for row in ROWS
        for group in kernels
        if group.split()[-1] == row.kernel
        for feature in FEATURES[group]
        if not cells[row.name, feature] and (row.name, feature) not in REFUSED
    ]
    if not empty:
        return
    text = "no test ran " + ", ".join(empty)
    add_failure(session, "tests/cuda_coverage.py", "every_feature_met_every_row", text)


def add_failure(session, file, name, text):
    """Make a session fail as if it had had one test more."""
    report = TestReport(f"{file}::{name}", (file, None, name), {}, "failed", text, "call")
    session.config.hook.pytest_runtest_logreport(report=report)
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _symbol(cells, name, feature):
    if (name, feature) in REFUSED:
        return "-"
    count = cells[name, feature]
    return "." if count == 0 else str(min(count, 9))


def pytest_terminal_summary(terminalreporter):
    cells, _ = _cells(terminalreporter)
    if not cells:
        return
    terminalreporter.section("CUDA kernels on the executor: tests of each row and feature")
    terminalreporter.write_line("9: nine or more, '.': none, '-': refused, see below")
    for kernel, features in FEATURES.items():
        keys = (string.ascii_letters + "+*#@&%")[: len(features)]
        legend = ", ".join(f"{key} {name}" for key, name in zip(keys, features, strict=True))
        terminalreporter.write_line("")
        terminalreporter.write_line(textwrap.fill(f"{kernel}: {legend}", 98))
        terminalreporter.write_line(" " * 36 + keys)
        for row in (row for row in ROWS if row.kernel == kernel.split()[-1]):
            line = "".join(_symbol(cells, row.name, feature) for feature in features)
            terminalreporter.write_line(f"{row.name:36}{line}")
    for (name, feature), reason in REFUSED.items():
        terminalreporter.write_line(f"{name}: {feature!r} refused: {reason}")
