"""Kernels touch shared and global memory through cuda/arch alone.

The executor's second build instruments plain loads and stores of kernel code: they get to the
checkers with the file "@pc", and none may come from a kernel.
"""

from functools import partial

import pytest
import torch
from simt_selftests import run

from flashinfer_lite.testing import check_forward, simt

pytestmark = pytest.mark.cpu_only("tests the executor, which is no device of torch")

RAW = "@pc"


def tensors(instance):
    dtype = getattr(torch, instance.split("_sm80_")[1].split("_")[0])
    return (torch.randn(2, n, heads, 64, dtype=dtype) for n, heads in ((37, 4), (150, 2), (150, 2)))


def raw_accesses(report):
    return [row for row in report.counters if row[1] == RAW]


@pytest.mark.parametrize(
    ("function", "instance"),
    [
        ("attention", "attention_fwd_sm80_bfloat16_d64"),
        ("attention", "attention_fwd_sm80_float32_d64"),
        ("decode", "decode_sm80_bfloat16_d64_s2"),
        ("decode", "decode_sm80_float32_d64_s2"),
    ],
)
def test_no_plain_access(function, instance):
    executor = simt.Executor(instance, hooks=True)
    call = getattr(executor, function)
    q, k, v = tensors(instance)
    if function == "decode":
        q = q[:, :1]
    check_forward(call, q, k, v, causal=True, softcap=20.0)
    check_forward(
        call, q[..., :56], k[..., :56], v[..., :40], mask=torch.rand(q.shape[1], 150) > 0.3
    )
    assert len(executor.reports) == 2
    for report in executor.reports:
        assert report.counters and not raw_accesses(report)


def test_no_plain_access_in_split_and_combine():
    executor = simt.Executor("decode_sm80_bfloat16_d64_s2", hooks=True)
    q, k, v = tensors(executor.instance)
    check_forward(partial(executor.decode, kv_splits=3), q[:, :1], k, v)
    files = {file for _, file, *_ in executor.report.counters}
    assert {"combine/sm80.cuh", "decode/sm80.cuh"} <= files
    assert not raw_accesses(executor.report)


def test_plain_accesses_are_seen():
    report = run(simt.load(hooks=True), "raw_exchange")
    assert not report.errors, report.text()
    assert {"ld.shared", "st.shared", "st.global"} <= {row[0] for row in raw_accesses(report)}
    report = run(simt.load(hooks=True), "raw_exchange", "no barrier")
    assert {"race-shared"} <= {kind for kind, *_ in report.errors}
