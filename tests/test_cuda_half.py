"""The CUDA half without a GPU: what it registers, and what it refuses before it needs a device.

The library is loaded by a child process with CPU-only torch, cuda_half_child.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_coverage import ROWS
from cuda_half_child import REFUSALS, SCALARS, STUB
from torch._subclasses.fake_tensor import FakeTensorMode

from flashinfer_lite import attention, cuda_status, decode, merge_states

CHILD = Path(__file__).parent / "cuda_half_child.py"
LIBRARY = Path(__file__).parent.parent / "flashinfer_lite" / "_C_cuda.abi3.so"
OPS = torch.ops.flashinfer_lite


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the child saw."""
    if not LIBRARY.exists():
        pytest.skip("the CUDA half is not built: FLASHINFER_LITE_CUDA=1 make build")
    if torch.version.cuda is not None:
        pytest.skip("the stub stands in for CUDA torch, and this torch is one")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile the stub with")
    folder = tmp_path_factory.mktemp("stub")
    source, stub = folder / "stub.c", folder / "stub.so"
    source.write_text(STUB)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", stub, source], check=True)
    done = subprocess.run(
        [sys.executable, CHILD, stub],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_loads_without_a_driver(device, seen):
    assert seen["status"] == "loaded"
    assert ROWS, "needs the table, csrc/instances.py"
    assert seen["instances"] == [row.name for row in ROWS]


def test_every_op_has_cpu_cuda_and_fake_kernels(device, seen):
    for name, (takes_tensors, *keys) in seen["registered"].items():
        if takes_tensors:
            assert {"CPU", "CUDA", "Meta"} <= set(keys), name
        else:
            assert keys, name


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(device, seen, case):
    assert seen["refusals"][case].startswith(REFUSALS[case][2])


def test_a_cpu_tensor_is_refused_by_the_cuda_kernel(device, seen):
    assert seen["refusals"]["not on CUDA"] == "q: expected a CUDA tensor, got one on cpu"


def test_without_keys_no_device_is_needed(device, seen):
    empty = [[2, 3, 4, 24], True, [2, 4, 3], True]
    others = {
        "no queries": [[2, 0, 4, 24], True, [2, 4, 0], True],
        "attention_varlen_fwd": [[3, 4, 24], True, [4, 3], True],
    }
    for name, result in seen["without_keys"].items():
        assert result == others.get(name, empty), name


def test_both_halves_count_calls(device, seen):
    assert seen["calls"] == [2, 0]


PUBLIC = {
    "attention": "cuda:0 [2, 3, 4, 24]",
    "sm80": "cuda:0 [2, 3, 4, 24]",
    "decode": "cuda:0 [2, 3, 4, 24]",
    "no_grad": "cuda:0 [2, 3, 4, 24]",
    "float64": "TypeError: q: expected dtype float32, bfloat16 or float16 on CUDA, got torch.fl",
    "cpu": "ValueError: impl: 'cpu' expects CPU tensors, got cuda:0",
    "sm90": "NotImplementedError: impl: not implemented yet, got 'sm90'",
    "states": "TypeError: outs: expected dtype float32, bfloat16 or float16 on CUDA, got torch.fl",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_on_fake_cuda_tensors(device, seen, name):
    assert seen["public"][name].startswith(PUBLIC[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_cuda_tensors_need_no_library(device, dtype):
    with FakeTensorMode():
        q = torch.empty(2, 4, 3, 16, dtype=dtype, device="cuda:1").transpose(1, 2)
        k = torch.empty(2, 7, 2, 16, dtype=dtype, device="cuda:1")
        v = torch.empty(2, 7, 2, 24, dtype=dtype, device="cuda:1")
        inputs = (q, k, v, None, None, None, *SCALARS)
        states = torch.empty(5, 2, 3, 4, 24, dtype=dtype, device="cuda:1"), q.new_empty(5, 2, 4, 3)
        for out, lse in (
            OPS.attention_fwd(*inputs),
            OPS.decode(*inputs, 0, False),
            OPS.merge_states(states[0], states[1].float()),
        ):
            assert (out.shape, out.dtype) == ((2, 3, 4, 24), dtype)
            assert (lse.shape, lse.dtype) == ((2, 4, 3), torch.float32)
            assert out.is_contiguous() and lse.is_contiguous()
            assert out.device == lse.device == torch.device("cuda:1")
        plan = OPS.plan(q, k, v, "decode", 7, 0, False)
        assert (plan.shape, plan.dtype, plan.device.type) == ((4,), torch.int64, "cpu")
        with pytest.raises(RuntimeError, match="on one device, got .*'cuda:0', 'cuda:1'"):
            OPS.attention_fwd(q, k.to("cuda:0"), *inputs[2:])


@pytest.mark.skipif(cuda_status == "loaded", reason="the CUDA half is here")
def test_without_the_cuda_half_its_tensors_are_refused(device):
    with FakeTensorMode():
        q = torch.empty(1, 3, 2, 16, device="cuda")
        for op in (attention, decode):
            with pytest.raises(RuntimeError) as caught:
                op(q, q, q)
            text = str(caught.value)
            start = f"q: expected the CUDA half for a tensor on cuda:0, got: {cuda_status}"
            assert text.startswith(start)
            assert text.endswith("; impl='reference' runs there")
            # A driver that is too old says in the status what to do.
            assert "make build CUDA=1" in text or "update the driver" in cuda_status
        with pytest.raises(RuntimeError) as caught:
            merge_states(q.new_empty(4, 1, 3, 2, 16), q.new_empty(4, 1, 2, 3))
        assert str(caught.value).startswith(start.replace("q:", "outs:"))
        assert str(caught.value).endswith("; flashinfer_lite.reference.merge_states runs there")
