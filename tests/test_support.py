"""The README's support table: the block, the features read off a call, and what a claim needs."""

import functools
import json
import sys
from pathlib import Path

import pytest
import support
import torch

from flashinfer_lite import attention, decode
from flashinfer_lite.testing import check_backward, check_forward, make_qkv, simt

ROOT = Path(__file__).parent.parent


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import support_table

    yield support_table
    del sys.modules["support_table"]


@pytest.fixture
def cells(monkeypatch):
    """What is recorded of this test alone."""
    seen = set()
    monkeypatch.setattr(support, "_record", lambda cell: seen.add(tuple(cell.split("|"))))
    return seen


def test_the_readme_has_what_the_json_gives(table):
    text = table.README.read_text()
    block = text.partition(table.BEGIN)[2].partition(table.END)[0]
    assert block == table.render(table.read()), "run make support"


def test_the_gpus_part_comes_from_their_results(table, monkeypatch, tmp_path):
    support_json = {"cpu": {"decode": {"forward": ["", "sink"]}}, "executor": {}}
    (tmp_path / "support.json").write_text(json.dumps(support_json))
    details = {"support": {"gpu": {"decode": {"forward": ["sink", "brand_new"]}}, "cpu": {}}}
    stages = [{"stage": "doctor", "details": {}}, {"stage": "tests", "details": details}]
    (tmp_path / "gpu-x.json").write_text(json.dumps({"stages": stages}))
    monkeypatch.setattr(table, "CLAIMS", tmp_path / "support.json")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    lines = table.render(table.read()).splitlines()
    assert lines[0] == "|  | `decode` |"
    assert lines[2:] == ["| any call | C |", "| sink | C G |", "| `brand_new` | G |"]


def test_features_are_read_off_the_call(device, cells):
    """Also those that are bound to the op, or given to it as numbers."""
    q, k, v = make_qkv(1, 5, 9, 4, 2, 16, 24, dtype=torch.float32, device=device)
    op = functools.partial(decode, kv_splits=3, softmax="unified", phi=0.0)
    check_forward(op, q, k, v, causal="top_left", seqlens_kv=torch.tensor([7], device=device))
    place = "gpu" if device.type == "cuda" else "cpu"
    wanted = {"", "float32", "GQA", "head_dim_v", "kv_splits", "unified softmax"}
    wanted |= {"causal top-left", "seqlens_kv"}
    assert cells == {(place, "decode", "forward", feature) for feature in wanted}


def test_a_backward_counts_for_itself(device, cells):
    q, k, v = make_qkv(1, 5, 9, 2, 2, 16, 16, dtype=torch.float32, device=device)
    check_backward(attention, q, k, v, window=(3, 0), sink=torch.zeros(2, device=device))
    assert {(op, direction) for _, op, direction, _ in cells} == {("attention", "backward")}
    assert {"window", "lse gradient", "sink"} <= {feature for *_, feature in cells}


def test_a_call_that_is_wrong_is_not_counted(device, cells):
    q, k, v = make_qkv(1, 5, 9, 2, 2, 16, 16, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="^window: "):
        check_forward(attention, q, k, v, window=(3, 0, 1))
    assert not cells


@pytest.mark.cpu_only("the executor runs kernels on the CPU")
def test_calls_on_the_executor(cells):
    q, k, v = make_qkv(1, 5, 9, 2, 2, 16, 16, dtype=torch.bfloat16)
    check_forward(simt.Executor().attention, q, k, v, softcap=4.0)
    assert cells == {("executor", "attention", "forward", x) for x in ("", "bfloat16", "softcap")}


def test_a_claim_that_no_test_ran():
    claimed = {"cpu": {"decode": {"forward": ["", "sink"]}}, "executor": {}}
    assert list(support.unseen(claimed, claimed)) == []
    ran = {"cpu": {"decode": {"forward": [""]}, "attention": {"forward": ["", "sink"]}}}
    assert list(support.unseen(claimed, ran)) == ["cpu decode forward: sink"]
    assert list(support.unseen(claimed, {})) == ["cpu decode forward: ", "cpu decode forward: sink"]
