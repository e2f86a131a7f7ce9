"""What the cases of test_cuda_ops.py stand on: GPUs made up by made_up_gpus.py, and the checks."""

import functools
import json
import re
import sys
import traceback
from unittest import mock

import torch
from made_up_gpus import Gpus
from torch.utils._pytree import tree_map_only

from flashinfer_lite.testing import make_mask

CASES = {}
OPS = torch.ops.flashinfer_lite
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
A100 = {"arch": 80, "num_sms": 108, "smem_optin": 166912, "smem_per_sm": 167936}
T4 = {"arch": 75, "num_sms": 40, "smem_optin": 65536, "smem_per_sm": 65536}
SMALL = {"arch": 89, "num_sms": 24, "smem_optin": 49152, "smem_per_sm": 65536}  # of shared memory
STREAMS = {0: 0x1000, 1: 0x2000}
NO_STREAM = 2**64 - 1

# Batch 2, 5 queries, 70 keys, 4 heads over 2; head dims below the 64 of the row that runs.
SHAPE = (2, 5, 70, 4, 2, 40, 24)
INT = torch.int32
FEATURES = {
    "plain": dict,
    "causal": lambda: {"causal": True},
    "top_left": lambda: {"causal": "top_left"},
    "window": lambda: {"window": (9, 2)},
    "scale": lambda: {"softmax_scale": 0.3},
    "softcap": lambda: {"softcap": 4.0, "causal": True},
    "alibi": lambda: {"alibi_slopes": torch.rand(4)},
    "alibi_by_sequence": lambda: {"alibi_slopes": torch.rand(4, 2).T, "causal": True},
    "mask_bool": lambda: {"mask": make_mask("bool", (2, 1, 5, 70))},
    "mask_by_head": lambda: {"mask": make_mask("additive_inf", (4, 1, 70), dtype=torch.bfloat16)},
    "int32_lengths": lambda: {"seqlens_kv": torch.tensor([70, 23], dtype=INT), "causal": True},
    "int64_lengths": lambda: {
        "seqlens_kv": torch.tensor([61, 0]),
        "kv_start": torch.tensor([7, 0]),
    },
    "strided_lengths": lambda: {"kv_start": torch.tensor([3, 9, 60, 9])[::2]},
}


def case(*variants):
    """Makes a function a case, or one for each variant, which it then takes first."""

    def add(function):
        name = function.__name__
        for variant in variants:
            label = "-".join(map(str, variant if isinstance(variant, tuple) else (variant,)))
            CASES[f"{name}[{label}]"] = functools.partial(function, variant)
        if not variants:
            CASES[name] = function
        return function

    return add


@functools.cache
def gpus():
    """Two A100, then one too old and one too small."""
    made = Gpus()
    kinds = {"A100": A100, "another A100": A100, "Tesla T4": T4, "small": SMALL}
    made.machine.devices = {
        index: made.module.Device(name=name, l2_bytes=40 * 2**20, **kind)
        for index, (name, kind) in enumerate(kinds.items())
    }
    made.machine.streams = STREAMS
    return made


def put(*tensors, device="cuda:0"):
    return [gpus().put(x, device) for x in tensors]


def on_gpu(function, *, device="cuda:0", **bound):
    """`function` on copies of its tensors on a GPU; its results come back."""

    def op(*tensors, **arguments):
        tensors, arguments = tree_map_only(
            torch.Tensor, lambda x: gpus().put(x, device), (tensors, arguments)
        )
        # A torch without CUDA does not know whether a graph is being captured.
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=False):
            results = function(*tensors, **arguments, **bound)
        return tree_map_only(torch.Tensor, lambda x: x.memory.clone(), results)

    return op


def launched():
    return [launch.instance for launch in gpus().machine.launches]


def expect(message, call, error=RuntimeError):
    """-> the match of `message`, a regular expression for the whole text."""
    try:
        call()
    except error as caught:
        text = str(caught)
    else:
        raise AssertionError("no error")
    match = re.fullmatch(message, text)
    assert match, text
    assert gpus().machine.current_device == 0  # the guard is gone
    return match


def serve():
    """Reads names of cases, one a line; answers each by a line of JSON: "", or how it failed."""
    for line in sys.stdin:
        torch.manual_seed(0)
        try:
            CASES[line.strip()]()
            answer = ""
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)
