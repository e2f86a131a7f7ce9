"""The cases of test_cuda_ops.py, for a process whose CUDA half is the one of made_up_gpus.py."""

import dataclasses
import functools
import json
import re
import sys
import traceback
from unittest import mock

import torch
from made_up_gpus import Gpus
from torch.utils._pytree import tree_map_only

import flashinfer_lite as fi
from flashinfer_lite.testing import (
    assert_close,
    assert_lse_close,
    assert_same_bits,
    check_backward,
    check_forward,
    make_mask,
    make_qkv,
    make_varlen,
)

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


def raw_arguments(q, k, v, **changes):
    """Of the op decode itself, past the checks in Python."""
    arguments = {"mask": None, "kv_start": None, "seqlens_kv": None, "softmax_scale": 0.25}
    arguments |= {"softcap": 0.0, "causal": 1, "window_left": -1, "window_right": -1}
    arguments |= {"kv_splits": 0, "batch_invariant": False, "phi": None, "phi_heads": None}
    arguments |= changes
    return q, k, v, *arguments.values()


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


@case(*((dtype, feature) for dtype in ("float32", "bfloat16") for feature in FEATURES))
def attention(variant):
    dtype, feature = variant
    q, k, v = make_qkv(*SHAPE, dtype=DTYPES[dtype], layout="bhsd")
    check_forward(on_gpu(fi.attention, impl="sm80"), q, k, v, **FEATURES[feature]())
    assert launched() == [f"attention_fwd_sm80_{dtype}_d64"]


class OnGpu(torch.autograd.Function):
    """An op on a GPU. Autograd's engine wants a real one, so the node's own formula is called
    here."""

    @staticmethod
    def forward(ctx, op, bound, arguments, *tensors):
        ctx.set_materialize_grads(False)
        ctx.shapes = [None if x is None else x.shape for x in tensors]
        copies = [None if x is None else put(x.detach())[0] for x in tensors]
        for copy, x in zip(copies, tensors, strict=True):
            if x is not None and x.dtype.is_floating_point:
                copy.requires_grad_(x.requires_grad)
        rest = {name: put(x)[0] if torch.is_tensor(x) else x for name, x in arguments.items()}
        q, k, v, mask = copies
        with torch.enable_grad():
            out, lse = op(q, k, v, mask=mask, return_lse=True, **rest, **bound)
        ctx.node = out.grad_fn
        assert lse.grad_fn is ctx.node
        return out.detach().memory, lse.detach().memory

    @staticmethod
    def backward(ctx, *gradients):
        gradients = [None if x is None else put(x)[0] for x in gradients]
        found = ctx.node.apply(*gradients)[:4]
        # That of a mask has four dimensions here.
        found = (None if x is None else x.memory for x in found)
        shapes = (
            None if x is None else x.reshape(shape)
            for x, shape in zip(found, ctx.shapes, strict=True)
        )
        return None, None, None, *shapes


def trained(of=fi.attention, **bound):
    """An op on a GPU, with gradients."""

    def op(q, k, v, *, mask=None, return_lse=True, **arguments):
        return OnGpu.apply(of, bound, arguments, q, k, v, mask)

    return op


@case(*((dtype, feature) for dtype in ("float32", "bfloat16") for feature in FEATURES))
def gradients(variant):
    dtype, feature = variant
    q, k, v = make_qkv(*SHAPE, dtype=DTYPES[dtype], layout="bhsd")
    check_backward(trained(), q, k, v, **FEATURES[feature]())
    name = f"attention_bwd_sm80_{dtype}_d64" + ("_s2" if dtype == "bfloat16" else "")
    assert launched() == [name] * 3, "rows, keys, finish"


@case(False, True)
def gradient_of_a_mask(deterministic):
    q, k, v = make_qkv(*SHAPE, dtype=torch.bfloat16)
    op = trained(deterministic=deterministic)
    for shape in ((2, 4, 5, 70), (4, 1, 70), (70,)):
        mask = make_mask("additive", shape).requires_grad_()
        check_backward(op, q, k, v, mask=mask, softcap=3.0)
        assert len(launched()) == 4


RAGGED = ([0, 37, 1, 3], [4, 53, 70, 0])


@case("float32", "bfloat16")
def attention_varlen(dtype):
    q, k, v, offsets = make_varlen(*RAGGED, dtype=DTYPES[dtype], tails=(2, 1))
    lengths = {"kv_start": torch.tensor([1, 9, 0, 0]), "seqlens_kv": torch.tensor([4, 50, 70, 0])}
    op = on_gpu(fi.attention_varlen)
    for arguments in ({"causal": True}, lengths, {"window": (9, 0)}):
        check_forward(op, q, k, v, **offsets, **arguments)
        assert launched()[0] == f"attention_fwd_sm80_{dtype}_d64"
    check_forward(functools.partial(op, phi=0.5), q, k, v, **offsets)


@case(False, True)
def gradients_of_a_ragged_batch(deterministic):
    q, k, v, offsets = make_varlen(*RAGGED, dtype=torch.bfloat16)
    op = trained(fi.attention_varlen, deterministic=deterministic)
    check_backward(op, q, k, v, **offsets, causal=True)
    assert launched() == ["attention_bwd_sm80_bfloat16_d64_s2"] * 3


@case()
def a_ragged_batch_without_rows_or_keys():
    for lengths in (([0, 0], [3, 4]), ([3, 4], [0, 0])):
        q, k, v, offsets = make_varlen(*lengths)
        check_forward(on_gpu(fi.attention_varlen), q, k, v, **offsets)
        check_backward(trained(fi.attention_varlen), q, k, v, **offsets)
        assert launched() == []


@case()
def values_of_offsets_are_checked():
    q, k, v, offsets = make_varlen([3, 0, 2], [4, 1, 2], head_dim=16)
    for name, bad, message in (
        (
            "cu_seqlens_q",
            [0, 3, 2, 5],
            "cu_seqlens_q: expected ascending values, got 2 at 2 after 3",
        ),
        ("cu_seqlens_kv", [0, 3, 3, 8], r"cu_seqlens_kv: expected values in \[0, 7\], got 8 at 3"),
        ("max_seqlen_q", 2, "max_seqlen_q: expected at least 3, the length of sequence 0, got 2"),
        ("seqlens_kv", [4, 2, 2], r"seqlens_kv: expected values in \[0, 1\], got 2 at batch 1"),
        ("kv_start", [4, 0, 3], r"kv_start: expected values in \[0, seqlens_kv = 2\], got 3 at .*"),
    ):
        value = torch.tensor(bad) if isinstance(bad, list) else bad
        call = {**offsets, name: value}
        expect(message, lambda call=call: on_gpu(fi.attention_varlen)(q, k, v, **call))


@case()
def pages_of_a_ragged_batch():
    q, k, v, offsets = make_varlen([3, 0, 9], [70, 5, 33], 4, 2, 16, tails=(2, 0))
    table = torch.randperm(6).view(3, 2)
    pools = [torch.full((6, 40, *x.shape[1:]), torch.nan) for x in (k, v)]
    offsets["cu_seqlens_kv"] -= 2
    for b, (first, end) in enumerate(offsets["cu_seqlens_kv"].unfold(0, 2, 1).tolist()):
        for x, pool in zip((k[2:], v[2:]), pools, strict=True):
            for j, slot in enumerate(x[first:end]):
                pool[table[b, j // 40], j % 40] = slot
    table[1, 1] = 2**40  # no key is there
    for lengths in (
        {},
        {"seqlens_kv": torch.tensor([60, 5, 0]), "kv_start": torch.tensor([7, 0, 0])},
    ):
        check_forward(
            lambda q, k, v, **given: on_gpu(fi.attention_varlen)(
                q, *pools, **given, block_table=table
            ),
            *(q, k[2:], v[2:]),
            **offsets,
            **lengths,
            causal=True,
        )


@case()
def values_of_pages_are_checked():
    q, k, v, offsets = make_varlen([3, 2], [4, 5], head_dim=16)
    pools = torch.randn(4, 4, *k.shape[1:]), torch.randn(4, 4, *v.shape[1:])
    table = torch.tensor([[0, 9], [1, 4]])
    call = functools.partial(on_gpu(fi.attention_varlen), q, *pools, **offsets)
    message = r"block_table: expected pages in \[0, 4\), got 4 at \[1, 1\]"
    expect(message, functools.partial(call, block_table=table))
    message = "cu_seqlens_kv: expected at most 4 keys in each sequence, as many as its pages .* 1"
    expect(message, functools.partial(call, block_table=table[:, :1]))


@case()
def gradients_are_the_same_every_time_if_asked_for():
    q, k, v = make_qkv(*SHAPE, dtype=torch.bfloat16)
    check_backward(trained(deterministic=True), q, k, v, causal=True)
    assert "aten::new_zeros" not in gpus().asked
    torch.use_deterministic_algorithms(True)
    try:
        check_backward(trained(), q, k, v, causal=True)
    finally:
        torch.use_deterministic_algorithms(False)


@case()
def gradients_without_keys_or_queries():
    q, k, v = make_qkv(*SHAPE)
    check_backward(trained(), q, k[:, :0], v[:, :0])
    assert launched() == []
    check_backward(trained(), q[:, :0], k, v)
    assert launched() == []


@case("float32", "float16")
def attention_of_wide_heads(dtype):
    q, k, v = make_qkv(1, 3, 40, 2, 1, 136, 200, dtype=DTYPES[dtype])
    check_forward(on_gpu(fi.attention), q, k, v, causal=True)
    assert launched()[0].startswith(f"attention_fwd_sm80_{dtype}_d256")


@case(*((2, feature) for feature in FEATURES), (1, "causal"), (7, "causal"), (7, "int64_lengths"))
def decode(variant):
    kv_splits, feature = variant
    q, k, v = make_qkv(*SHAPE, dtype=torch.bfloat16, layout="padded")
    check_forward(on_gpu(fi.decode, kv_splits=kv_splits), q, k, v, **FEATURES[feature]())
    combine = ["combine_sm80_bfloat16_from_float32"] if kv_splits > 1 else []
    assert launched() == ["decode_sm80_bfloat16_d64_s2", *combine]


@case("float32", "float16")
def decode_that_chooses(dtype):
    q, k, v = make_qkv(1, 1, 333, 4, 1, 64, dtype=DTYPES[dtype])
    check_forward(on_gpu(fi.decode), q, k, v)
    assert len(launched()) == 2, "one sequence leaves multiprocessors idle, unless it is split"


@case()
def decode_batch_invariant():
    q, k, v = make_qkv(2, 1, 1500, 2, 1, 16, dtype=torch.bfloat16)
    ends = torch.tensor([1500, 1100])
    op = on_gpu(fi.decode, batch_invariant=True)
    both, _ = check_forward(op, q, k, v, seqlens_kv=ends)
    assert len(launched()) == 2
    alone = op(q[1:], k[1:, :1100], v[1:, :1100])
    assert_same_bits(both[1:], alone)


@case(*((kv_splits, page_size) for kv_splits in (1, 3) for page_size in (1, 7, 16)))
def decode_paged(variant):
    kv_splits, page_size = variant
    pages = -(-70 // page_size)
    q, _, _ = make_qkv(*SHAPE, dtype=torch.bfloat16)
    table = torch.randperm(2 * pages + 3)[: 2 * pages].view(2, pages).to(INT)
    k, v = (torch.randn(2 * pages + 3, page_size, 2, d).bfloat16() for d in (40, 24))
    arguments = {"seqlens_kv": torch.tensor([70, 23]), "causal": True}
    dense = (fi.reference.gather_pages(x, table) for x in (k, v))
    op = on_gpu(fi.decode, kv_splits=kv_splits, block_table=gpus().put(table, "cuda:0"))
    check_forward(lambda q, _k, _v, **others: op(q, k, v, **others), q, *dense, **arguments)


@case()
def decode_paged_checks_its_pages():
    q, k, v = make_qkv(1, 1, 4, 2, 1, 16)
    table = torch.tensor([[0, 1, 2]])
    k, v = k.view(1, 4, 1, 16), v.view(1, 4, 1, 16)
    arguments = {"seqlens_kv": torch.tensor([5])}
    message = r"block_table: expected pages in \[0, 1\), got 1 at \[0, 1\]"
    expect(message, lambda: on_gpu(fi.decode)(q, k, v, block_table=table, **arguments))


@case()
def decode_paged_without_pages():
    q = torch.randn(2, 1, 2, 16)
    empty = torch.zeros(0, 4, 1, 16)
    arguments = {"block_table": torch.zeros(2, 3, dtype=INT), "return_lse": True}
    out, lse = on_gpu(fi.decode)(q, empty, empty, seqlens_kv=torch.tensor([0, 0]), **arguments)
    assert (out == 0).all() and (lse == -torch.inf).all() and launched() == []


@case("float32", "bfloat16")
def append_kv(dtype):
    """Into pages, rotated; a call that has no room is refused and writes nothing."""
    k, v = torch.randn(2, 2, 3, 2, 40).to(DTYPES[dtype])
    caches = [torch.full((5, 4, 2, 40), torch.nan, dtype=DTYPES[dtype]) for _ in range(2)]
    angles = torch.rand(8, 8)
    arguments = {
        "seqlens_kv": torch.tensor([0, 5], dtype=INT),
        "block_table": torch.tensor([[3, 1], [4, 0]]),
        "rotary_cos": angles.cos(),
        "rotary_sin": angles.sin(),
    }

    def run(**changes):
        on_cpu, put_there = [x.clone() for x in caches], put(*caches)
        given = arguments | changes
        there = {name: put(x)[0] for name, x in given.items()}
        error = None
        try:
            assert fi.append_kv(*put_there, *put(k, v), **there) is None
        except RuntimeError as caught:
            error = str(caught)
        else:
            fi.append_kv(*on_cpu, k, v, **given)
        for x, y in zip(put_there, on_cpu, strict=True):
            torch.testing.assert_close(x.memory, y, equal_nan=True)
        return error

    assert run() is None
    assert launched() == [f"append_kv_sm80_{dtype}"]
    assert run(seqlens_kv=torch.tensor([6, 0])).startswith("seqlens_kv: expected values in")
    assert run(block_table=torch.tensor([[3, 1], [4, 9]])).startswith("block_table: expected pages")


@case(1, 7)
def decode_out(kv_splits):
    q, k, v = make_qkv(*SHAPE)
    (out,) = put(torch.empty(2, 4, 5, 24).transpose(1, 2))
    out.memory.fill_(torch.nan)
    result = fi.decode(*put(q, k, v), kv_splits=kv_splits, out=out, return_lse=True)
    assert result[0] is out
    wanted, lse = fi.attention(q, k, v, return_lse=True)
    assert_close(out.memory, fi.attention(q.double(), k.double(), v.double()), wanted)
    assert_lse_close(result[1].memory, lse)


@case("float32", "bfloat16")
def merge_states(dtype):
    q, k, v = make_qkv(*SHAPE, dtype=DTYPES[dtype])
    parts = ((0, 30), (30, 30), (30, 70))
    states = [fi.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in parts]
    outs, lses = (torch.stack(x) for x in zip(*states, strict=True))
    out, lse = on_gpu(fi.merge_states)(outs, lses)
    exact, exact_lse = fi.merge_states(outs.double(), lses.double())
    assert_close(out, exact, fi.merge_states(outs, lses)[0])
    assert_lse_close(lse, exact_lse)
    assert launched() == [f"combine_sm80_{dtype}_from_{dtype}"]


@case()
def without_keys_or_queries_nothing_is_launched():
    q, k, v = make_qkv(*SHAPE)
    for op in (fi.attention, fi.decode):
        check_forward(on_gpu(op), q, k[:, :0], v[:, :0])
        assert launched() == []
        check_forward(on_gpu(op), q[:, :0], k, v)
        assert launched() == []


@case()
def explain_says_what_is_launched():
    q, k, v = put(*make_qkv(*SHAPE, dtype=torch.bfloat16))
    told = fi.explain("attention", q, k, v)
    fi.attention(q, k, v)
    assert [told.kernel] == launched() and told.kv_splits == 1
    options = {"plain": {}, "1": {"kv_splits": 1}, "7": {"kv_splits": 7}}
    for name, more in {**options, "invariant": {"batch_invariant": True}}.items():
        told = fi.explain("decode", q, k, v, **more)
        fi.decode(q, k, v, **more)
        assert launched()[0] == told.kernel, name
        assert (len(launched()) == 2) == (told.kv_splits > 1), name
    assert told.tile[0] == 16 and told.rejected["cpu"] == "inputs are on cuda:0"


@case("attention", "decode", "merge_states")
def the_tensors_device_and_its_stream_are_launched_on(op):
    q, k, v = make_qkv(*SHAPE)
    if op == "merge_states":
        on_gpu(fi.merge_states, device="cuda:1")(
            torch.randn(3, 2, 5, 4, 24), torch.randn(3, 2, 4, 5)
        )
    else:
        bound = {"kv_splits": 2} if op == "decode" else {}
        check_forward(on_gpu(getattr(fi, op), device="cuda:1", **bound), q, k, v)
    launches = gpus().machine.launches
    assert len(launches) == (2 if op == "decode" else 1)
    assert all((x.device, x.stream) == (1, STREAMS[1]) for x in launches)
    assert gpus().machine.current_device == 0


@case()
def one_device():
    q, k, v = make_qkv(*SHAPE)
    tensors = [*put(q), *put(k, v, device="cuda:1")]
    message = "k_cache: expected q's device cuda:0, got cuda:1"
    expect(message, lambda: fi.decode(*tensors), ValueError)
    message = "k: expected q's device cuda:0, got cuda:1"
    expect(message, lambda: OPS.decode(*raw_arguments(*tensors)))
    lengths = put(torch.tensor([9, 9]), device="cuda:1")[0]
    message = "seqlens_kv: expected q's device cuda:0, got cuda:1"
    expect(message, lambda: OPS.decode(*raw_arguments(*put(q, k, v), seqlens_kv=lengths)))
    assert launched() == []


@case()
def values_of_lengths_are_checked():
    q, k, v = make_qkv(*SHAPE)
    for ends, starts, message in (
        ([70, 71], [0, 0], r"seqlens_kv: expected values in \[0, 70\], got 71 at batch 1"),
        ([9, 9], [10, 0], r"kv_start: expected values in \[0, seqlens_kv = 9\], got 10 at batch 0"),
    ):
        lengths = {"seqlens_kv": torch.tensor(ends), "kv_start": torch.tensor(starts, dtype=INT)}
        for op in (fi.attention, fi.decode):
            expect(message, lambda op=op, lengths=lengths: on_gpu(op)(q, k, v, **lengths))


@case("attention", "decode")
def while_a_graph_is_captured_nothing_is_read(op):
    q, k, v = make_qkv(*SHAPE)
    wrong = {"seqlens_kv": torch.tensor([500, 20]), "kv_start": torch.tensor([-9, 500])}
    clamped = {"seqlens_kv": torch.tensor([70, 20]), "kv_start": torch.tensor([0, 20])}
    bound = {"kv_splits": 2} if op == "decode" else {}
    run = on_gpu(getattr(fi, op), **bound)
    gpus().machine.capturing = STREAMS[0]
    try:
        out, lse = run(q, k, v, **wrong, return_lse=True)
    finally:
        gpus().machine.capturing = NO_STREAM
    assert set(gpus().asked) == {"aten::new_empty"}
    expected = run(q, k, v, **clamped, return_lse=True)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])


@case("attention", "decode")
def unified_maximum(op):
    """Rows are counted on each device, under a capture too; one launch, whatever the splits."""
    q, k, v = make_qkv(*SHAPE, dtype=torch.bfloat16)
    by_head = torch.tensor([0.5, 99.0, 0.5, 0.5])
    for index, kv_splits, phi, recomputed in (
        (1, 3, 0.5, 0),
        (0, 3, by_head, 10),
        (0, 1, 99.0, 40),
    ):
        fi.stats(reset=True)
        bound = {"kv_splits": kv_splits} if op == "decode" else {}
        run = on_gpu(getattr(fi, op), device=f"cuda:{index}", **bound)
        gpus().machine.capturing = STREAMS[1] if index == 1 else NO_STREAM
        try:
            check_forward(lambda *t, run=run, phi=phi, **a: run(*t, phi=phi, **a), q, k, v)
        finally:
            gpus().machine.capturing = NO_STREAM
        assert dataclasses.astuple(fi.stats(reset=True))[1:] == (40, recomputed)
        assert dataclasses.astuple(fi.stats())[1:] == (0, 0)
        assert len(launched()) == 1


@case()
def a_device_that_is_too_old():
    q, k, v = put(*make_qkv(*SHAPE), device="cuda:2")
    message = (
        r"expected compute capability 8\.0 or higher, got 7\.5 \(Tesla T4\): "
        "flashinfer_lite.reference runs there"
    )
    for op in (fi.attention, fi.decode, functools.partial(fi.explain, "decode")):
        expect(message, lambda op=op: op(q, k, v))
    states = put(torch.zeros(2, 1, 3, 4, 16), torch.zeros(2, 1, 4, 3), device="cuda:2")
    expect(message, lambda: fi.merge_states(*states))


@case("attention", "decode")
def a_device_with_too_little_shared_memory(op):
    tensors = put(*make_qkv(*SHAPE[:5], 256), device="cuda:3")
    message = (
        r"(\w+): head_dim 256 in float32 needs (\d+) bytes of shared memory per thread block, "
        "the device offers 49152: impl='reference' runs there"
    )
    kernel, needed = expect(message, lambda: getattr(fi, op)(*tensors)).groups()
    assert kernel.startswith(op) and int(needed) > 49152
    narrow = make_qkv(*SHAPE, dtype=torch.bfloat16)
    check_forward(on_gpu(fi.attention, device="cuda:3"), *narrow)


@case()
def a_device_that_the_driver_does_not_know():
    tensors = put(*make_qkv(*SHAPE), device="cuda:9")
    for _ in range(2):  # a failure is not remembered
        expect("cuda:9: no device properties: invalid argument", lambda: fi.attention(*tensors))


@case()
def a_launch_that_fails():
    q, k, v = put(*make_qkv(*SHAPE))
    states = put(torch.zeros(3, 2, 5, 4, 24), torch.zeros(3, 2, 4, 5))
    text = (
        r"_sm80_float32_d64\w*: launch failed: out of memory \({} blocks of \d+ threads with \d+ "
    )
    text += r"bytes of shared memory\)"
    gpus().machine.launch_error = 2
    try:
        expect("attention_fwd" + text.format(4), lambda: fi.attention(q, k, v))
        expect("decode" + text.format(4 * 7), lambda: fi.decode(q, k, v, kv_splits=7))
        message = r"combine: launch failed: out of memory \(3 states of 2 \* 5 \* 4 rows of 24\)"
        expect(message, lambda: fi.merge_states(*states))
        gpus().machine.launch_error = 209
        way_out = (
            r".*: no kernel image .*; rebuild with TORCH_CUDA_ARCH_LIST=8\.0, the capability .*"
        )
        for op in (fi.attention, fi.decode):
            expect(way_out, lambda op=op: op(q, k, v))
        expect(way_out, lambda: fi.merge_states(*states))
    finally:
        gpus().machine.launch_error = 0


@case()
def a_driver_that_is_too_old():
    machine = gpus().machine
    try:
        for driver, wanted in (
            (12080, "driver 12.8 is older than the runtime 13.0 this library was built with: "),
            (13010, ""),
            (0, ""),
        ):
            machine.driver_version = driver
            assert OPS.cuda_version_error().startswith(wanted)
            assert bool(wanted) == bool(OPS.cuda_version_error())
    finally:
        machine.driver_version = 13000


@case()
def calls_are_counted():
    q, k, v = make_qkv(*SHAPE)
    tensors = put(q, k, v)
    fi.stats(reset=True)
    fi.attention(q, k, v)
    fi.attention(*tensors)
    fi.decode(*tensors, kv_splits=3)
    fi.decode(*tensors, out=put(torch.zeros(2, 5, 4, 24))[0])
    fi.merge_states(*put(torch.zeros(3, 2, 5, 4, 24), torch.zeros(3, 2, 4, 5)))
    fi.explain("decode", *tensors)
    assert fi.stats(reset=True).calls == 5
    assert fi.stats().calls == 0


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
