"""Cases of test_distributed.py in which ranks disagree, or one of them refuses its arguments."""

import os
from unittest import mock

import torch
import torch.distributed as dist
from distributed_child import world
from process_groups import case, raises
from torch._subclasses.fake_tensor import FakeTensorMode

from flashinfer_lite import decode, explain
from flashinfer_lite.testing import make_qkv

# What the last rank does differently, and the message on every rank.
DISAGREEMENTS = {
    "batch": (
        {"q": torch.zeros(1, 3, 4, 16), "batch_size": 1},
        r"^q: .*same shape .*\[2, 3, 4, 16\] on rank 0 ",
    ),
    "seqlen_q": ({"q": torch.zeros(2, 2, 4, 16)}, r"^q: .*same shape on every rank .*\[2, 2, 4"),
    "heads": ({"q": torch.zeros(2, 3, 8, 16)}, r"^q: .*same shape on every rank .*\[2, 3, 8"),
    "dtype": (
        {"q": torch.zeros(2, 3, 4, 16).double(), "dtype": torch.float64},
        "^q: .*same dtype .*float32 on rank 0 and torch.float64 on rank",
    ),
    "num_heads": ({"heads_kv": 1}, "^k_cache: .*same num_heads .*got 2 on rank 0 and 1 on rank"),
    "head_dim_v": ({"head_dim_v": 24}, "^v_cache: .*same head_dim_v .*got 16 on rank 0 and 24 on"),
    "softmax_scale": ({"softmax_scale": 1.0}, "^softmax_scale: .*got 0.25 .* and 1.0 on rank"),
    "softcap": ({"softcap": 2.0}, "^softcap: .*same value .*got None on rank 0 and 2.0 on rank"),
    "causal": ({"causal": True}, "^causal: .*got False on rank 0 and bottom_right on rank"),
    "window": ({"window": (1, -1)}, r"^window: .*got \(-1, -1\) on rank 0 and \(1, -1\) on rank"),
    "softmax": ({"softmax": "unified"}, "^softmax: .*got online on rank 0 and unified on rank"),
    "sink": ({"sink": torch.ones(4)}, "^sink: .*got None on rank 0 and a tensor on rank"),
    "alibi_slopes": (
        {"alibi_slopes": torch.ones(4)},
        "^alibi_slopes: .*got None on rank 0 and a tensor on rank",
    ),
    "impl": ({"impl": "reference"}, "^impl: .*got a kernel on rank 0 and reference on rank"),
    "batch_invariant": ({"batch_invariant": True}, "^batch_invariant: .*got False .* and True on"),
}


def call(changes):
    changes = dict(changes)
    q, k, v = make_qkv(2, 3, 7, 4, changes.pop("heads_kv", 2), 16, changes.pop("head_dim_v", 16))
    dtype, batch_size = changes.pop("dtype", q.dtype), changes.pop("batch_size", len(q))
    k, v = k[:batch_size].to(dtype), v[:batch_size].to(dtype)
    return decode(changes.pop("q", q), k, v, process_group=world(), **changes)


@case(*DISAGREEMENTS)
def ranks_that_disagree(name):
    changes, message = DISAGREEMENTS[name]
    last = dist.get_rank() == dist.get_world_size() - 1
    with raises(ValueError, message):
        call(changes if last else {})
    assert call({}).shape == (2, 3, 4, 16)  # and nobody is out of step


@case()
def ranks_with_another_phi():
    with raises(ValueError, "^phi: .*same value .*got 0.0 on rank 0 and 1.0 on rank 1"):
        call({"phi": float(dist.get_rank() > 0)})
    with raises(ValueError, "^phi: .*got a tensor on rank 0 and 1.0 on rank 1"):
        call({"phi": 1.0 if dist.get_rank() else torch.zeros(4)})


@case()
def other_values_are_found_on_demand():
    rank = float(dist.get_rank())
    base = torch.ones(2, 3, 4, 16)
    given = {"q": base, "phi": torch.zeros(4), "sink": torch.ones(4)}
    given["alibi_slopes"] = torch.ones(4)
    with mock.patch.dict(os.environ, FLASHINFER_LITE_CHECK="1"):
        call(given)
        for name, x in given.items():
            other = x.clone()
            other.flatten()[3] += rank
            with raises(ValueError, f"^{name}: expected the same values on every rank"):
                call(given | {name: other})
    checks = "1" if dist.get_rank() else "0"
    with mock.patch.dict(os.environ, FLASHINFER_LITE_CHECK=checks):
        with raises(ValueError, "^FLASHINFER_LITE_CHECK: expected the same setting .*False .*True"):
            call(given)


# Bad arguments of the last rank alone, its error and message; the others are told.
REFUSALS = {
    "window": ({"window": 5}, ValueError, r"^window: expected \(left, right\)"),
    "q": ({"q": [1.0]}, TypeError, "^q: expected a torch.Tensor, got list"),
    "block_table": ({"block_table": torch.zeros(2, 1)}, TypeError, "^block_table: expected dtype"),
    "grad": ({"sink": torch.ones(4).requires_grad_()}, RuntimeError, "^sink: decode is for inf"),
    "out": ({"out": torch.zeros(1)}, ValueError, "^out: expected shape"),
    "seqlens": (
        {"seqlens_kv": torch.tensor([3, 8])},
        RuntimeError,
        r"^seqlens_kv: expected values in \[0, 7\], got 8 at batch 1",
    ),
    "negative": (
        {"seqlens_kv": torch.tensor([-1, 7])},
        RuntimeError,
        r"^seqlens_kv: expected values in \[0, 7\], got -1 at batch 0",
    ),
    "kv_start": (
        {"seqlens_kv": torch.tensor([3, 7]), "kv_start": torch.tensor([4, 0])},
        RuntimeError,
        r"^kv_start: expected values in \[0, seqlens_kv = 3\], got 4 at batch 0",
    ),
}


@case(*REFUSALS)
def a_rank_that_refuses(name):
    changes, error, message = REFUSALS[name]
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        with raises(error, message):
            call(changes)
    else:
        told = f"^process_group: expected a valid call on every rank, got on rank {last} "
        with raises(RuntimeError, told + f"{error.__name__}: {message[1:]}"):
            call({})
    assert call({}).shape == (2, 3, 4, 16)


@case()
def what_is_no_group():
    q, k, v = make_qkv(2, 3, 7, 4, 2, 16)
    for bad in (object(), 1, -100, [0, 1]):
        with raises(TypeError, "^process_group: expected a torch.distributed.ProcessGroup "):
            decode(q, k, v, process_group=bad)
        with raises(TypeError, "^process_group: expected a torch.distributed.ProcessGroup "):
            explain(decode, q, k, v, process_group=bad)
    with raises(ValueError, "^process_group: expected a backend for q's device meta, got cpu:gloo"):
        decode(*(t.to("meta") for t in (q, k, v)), process_group=world())


@case()
def a_graph_cannot_capture_the_unified_merge():
    q, k, v = make_qkv(2, 1, 7, 4, 2, 16)
    with (
        FakeTensorMode() as mode,
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: True),
    ):
        on_gpu = [torch.empty_like(mode.from_tensor(t), device="cuda") for t in (q, k, v)]
        with raises(RuntimeError, "^softmax: expected 'online' with process_group while a CUDA gr"):
            decode(*on_gpu, phi=0.0, process_group=world(), impl="reference")


@case()
def a_page_out_of_range():
    """The op finds it, when the others are already past their checks."""
    table, last = torch.tensor([[0, 1], [1, 0]]), dist.get_world_size() - 1
    if dist.get_rank() == last:
        with raises(RuntimeError, "^block_table: .*2"):
            call({"block_table": table + torch.tensor([[0, 0], [1, 1]])})
    else:
        with raises(RuntimeError, f"^process_group: .* got on rank {last} RuntimeError: block_tab"):
            call({"block_table": table})
    assert call({"block_table": table}).shape == (2, 3, 4, 16)
    with raises(ValueError, "^block_table: expected the same value on every rank"):
        call({"block_table": table} if dist.get_rank() else {})
