"""Cases of test_cuda_ops.py: which device and stream, what is checked, what a device refuses."""

import dataclasses
import functools

import torch
from cuda_child import (
    INT,
    NO_STREAM,
    OPS,
    SHAPE,
    STREAMS,
    case,
    expect,
    gpus,
    launched,
    on_gpu,
    put,
)

import flashinfer_lite as fi
from flashinfer_lite.testing import assert_same_bits, check_forward, make_qkv


def raw_arguments(q, k, v, **changes):
    """Of the op decode itself, past the checks in Python."""
    arguments = {"mask": None, "kv_start": None, "seqlens_kv": None, "softmax_scale": 0.25}
    arguments |= {"softcap": 0.0, "causal": 1, "window_left": -1, "window_right": -1}
    arguments |= {"kv_splits": 0, "batch_invariant": False, "phi": None, "phi_heads": None}
    arguments |= changes
    return q, k, v, *arguments.values()


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
