"""Cases of test_cuda_ops.py: the attention sink; flat_linear, and its tickets."""

import struct

import torch
from cuda_child import (
    NO_STREAM,
    SHAPE,
    STREAMS,
    case,
    expect,
    gpus,
    launched,
    on_gpu,
    put,
)
from test_flat_linear import check, make

import flashinfer_lite as fi
from flashinfer_lite.testing import assert_same_bits, check_forward, make_qkv

OPS = torch.ops.flashinfer_lite
# N and K that the host code cuts in two; and what it does not cut.
SPLIT, WHOLE = (70, 1100), (70, 200)
SHAPES = {"split": SPLIT, "whole": WHOLE}


@case(*((op, dtype) for op in ("attention", "decode") for dtype in ("float32", "bfloat16")))
def sink(variant):
    """Joined behind the kernels, by the one that merges states."""
    op, dtype = variant
    q, k, v = make_qkv(*SHAPE, dtype=getattr(torch, dtype))
    arguments = {"causal": True, "seqlens_kv": torch.tensor([70, 0])}
    run = on_gpu(getattr(fi, op), **({"kv_splits": 3} if op == "decode" else {}))
    expected = run(q, k, v, **arguments, return_lse=True)
    none = torch.full((4,), -torch.inf)
    for values in (torch.tensor([0.5, -torch.inf, 9.0, torch.inf]), none.to(q.dtype)):
        got = check_forward(run, q, k, v, sink=values, **arguments)
        assert launched() == ["combine_sm80_float32_from_float32"]
        for x, y, dim in zip(got, expected, (2, 1), strict=True):
            unchanged = (values == -torch.inf).nonzero().flatten()
            assert_same_bits(x.index_select(dim, unchanged), y.index_select(dim, unchanged))


def inputs(m, shape, dtype=torch.bfloat16):
    return make(m, *shape, dtype, "cpu")


def allocations():
    """[(device, counters)] of what cudaMalloc gave in this process."""
    return [
        (device, struct.unpack(f"{len(data) // 4}I", data))
        for device, data in gpus().machine.allocations
    ]


@case(*((kernel, dtype) for kernel in ("gemv", "flat_gemm") for dtype in ("bfloat16", "float16")))
def flat_linear(variant):
    kernel, dtype = variant
    for m, shape in ((1, SPLIT), (3, WHOLE), (17, SPLIT)):
        x, weight, bias = inputs(m, shape, getattr(torch, dtype))
        for more in ((), (bias,)):
            out = on_gpu(fi.flat_linear, impl=kernel)(x, weight, *more)
            check(out, x, weight, *(more or (None,)))
            (name,) = launched()
            assert name.startswith(f"{kernel}_sm80_{dtype}_m")


@case("gemv", "flat_gemm")
def flat_linear_out(kernel):
    x, weight, bias = inputs(5, SPLIT)
    expected = on_gpu(fi.flat_linear, impl=kernel)(x, weight, bias)
    (wide,) = put(torch.full((5, 90), torch.nan, dtype=x.dtype))
    out = wide[:, 3:73]
    result = fi.flat_linear(*put(x, weight, bias), impl=kernel, out=out)
    assert result is out
    assert_same_bits(out.memory, expected)
    assert wide.memory[:, :3].isnan().all() and wide.memory[:, 73:].isnan().all()


@case("gemv", "flat_gemm")
def flat_linear_of_leading_dimensions(kernel):
    x, weight, bias = inputs(6, SPLIT)
    op = on_gpu(fi.flat_linear, impl=kernel)
    expected = op(x, weight, bias)
    assert_same_bits(op(x.view(2, 3, -1), weight, bias), expected.view(2, 3, -1))
    assert_same_bits(op(x[0], weight, bias), expected[0])


@case("gemv", "flat_gemm")
def flat_linear_of_empty_sizes(kernel):
    for m, n, k in ((0, 5, 7), (3, 0, 7), (0, 0, 0)):
        out = on_gpu(fi.flat_linear, impl=kernel)(*inputs(m, (n, k)))
        assert out.shape == (m, n) and launched() == []
    x, weight, bias = inputs(3, (5, 0))
    assert_same_bits(on_gpu(fi.flat_linear, impl=kernel)(x, weight, bias), bias.expand(3, 5))
    out = on_gpu(fi.flat_linear, impl=kernel)(x, weight)
    assert_same_bits(out, torch.zeros_like(out))


@case()
def flat_linear_is_batch_invariant():
    x, weight, bias = inputs(40, SPLIT)
    op = on_gpu(fi.flat_linear, batch_invariant=True)
    whole = op(x, weight, bias)
    for m in (1, 8, 9, 33):
        assert_same_bits(op(x[:m], weight, bias), whole[:m])


@case()
def flat_linear_refuses():
    x, weight, bias = put(*inputs(2, WHOLE))
    message = "kernel: expected gemv or flat_gemm, got cublas"
    expect(message, lambda: OPS.flat_linear(x, weight, bias, "cublas"))
    message = "x: expected dtype bfloat16 or float16 on CUDA, got float32"
    wide = put(*inputs(2, WHOLE, torch.float32))
    expect(message, lambda: OPS.flat_linear(*wide, "gemv"))
    there = put(*inputs(2, WHOLE)[1:2], device="cuda:1")
    message = "weight: expected x's device cuda:0, got cuda:1"
    expect(message, lambda: OPS.flat_linear(x, *there, bias, "gemv"))
    tensors = put(*inputs(2, WHOLE), device="cuda:3")
    message = (
        "flat_gemm: no kernel for compute capability 8.9 with 49152 bytes of shared memory per "
        "thread block: impl='vendor' runs there"
    )
    expect(message, lambda: OPS.flat_linear(*tensors, "flat_gemm"))
    tensors = put(*inputs(2, WHOLE), device="cuda:2")
    expect(r"expected compute capability 8\.0 .*", lambda: OPS.flat_linear(*tensors, "gemv"))
    gpus().machine.launch_error = 2
    try:
        message = r"flat_gemm_sm80_bfloat16_m8_s6: launch failed: out of memory \(2 blocks of .*"
        expect(message, lambda: OPS.flat_linear(x, weight, bias, "flat_gemm"))
    finally:
        gpus().machine.launch_error = 0


@case("split", "whole")
def flat_linear_on_the_tensors_device_and_its_stream(shape):
    x, weight, bias = inputs(4, SHAPES[shape])
    out = on_gpu(fi.flat_linear, impl="flat_gemm", device="cuda:1")(x, weight, bias)
    check(out, x, weight, bias)
    (launch,) = gpus().machine.launches
    assert (launch.device, launch.stream) == (1, STREAMS[1])
    assert gpus().machine.current_device == 0


def run_split(device="cuda:0", m=3, shape=SPLIT):
    x, weight, bias = inputs(m, shape)
    out = on_gpu(fi.flat_linear, impl="flat_gemm", device=device)(x, weight, bias)
    check(out, x, weight, bias)
    return out


@case()
def tickets_of_a_stream_are_made_once():
    machine = gpus().machine
    streams = dict(machine.streams)
    try:
        machine.streams = {**streams, 0: 0x3000}
        before = len(allocations())
        for _ in range(3):
            run_split()
        assert len(allocations()) == before + 1
        run_split(device="cuda:1")
        machine.streams = {**streams, 0: 0x4000}  # another stream of the same device
        after = len(allocations())
        run_split()
        assert len(allocations()) == after + 1
        device, counters = allocations()[-1]
        assert device == 0 and len(counters) == 256 and not any(counters)
    finally:
        machine.streams = streams


@case()
def tickets_grow():
    """Where shared memory holds 8 rows of x, 1000 are 125 blocks, times 3 of the weight."""
    machine = gpus().machine
    sizes = {"name": "smaller", "arch": 86, "num_sms": 20, "smem_per_sm": 65536, "l2_bytes": 2**20}
    machine.devices = {**machine.devices, 4: gpus().module.Device(smem_optin=57344, **sizes)}
    before = len(allocations())
    for m in (3, 1000, 1000, 3):
        run_split("cuda:4", m, (135, 1100))
    made = allocations()[before:]
    assert [(device, len(counters)) for device, counters in made] == [(4, 256), (4, 512)]
    assert not any(any(counters) for _, counters in made)


@case()
def tickets_while_a_graph_is_captured():
    """From torch, and zeroed in the graph, so that the graph may run beside other calls."""
    before = len(allocations())
    machine = gpus().machine
    machine.capturing = STREAMS[0]
    try:
        captured = [run_split() for _ in range(2)]
        # out, partials, tickets
        assert gpus().asked == ["aten::new_empty"] * 3
        assert len(allocations()) == before
        # Meanwhile other streams go on: their buffers are made in spite of the capture.
        machine.streams = {**STREAMS, 0: 0x5000}
        eager = run_split()
        assert len(allocations()) == before + 1
    finally:
        machine.capturing = NO_STREAM
        machine.streams = STREAMS
    torch.manual_seed(0)
    for out in captured:
        assert out.isfinite().all()
    assert eager.isfinite().all()


@case()
def tickets_without_memory_for_them():
    """torch may hold all of the memory, and then gives them."""
    machine = gpus().machine
    machine.streams = {**STREAMS, 0: 0x6000}
    machine.malloc_error = 2
    before = len(allocations())
    try:
        run_split()
        assert machine.last_error == 0, "taken back, or the next call of torch is told of it"
        assert len(gpus().asked) == 3
    finally:
        machine.malloc_error = 0
    run_split()
    assert len(allocations()) == before + 1 and len(gpus().asked) == 2
    machine.streams = STREAMS


@case()
def flat_linear_counts_its_calls():
    x, weight, bias = inputs(2, WHOLE)
    fi.stats(reset=True)
    for kernel in ("gemv", "flat_gemm"):
        on_gpu(fi.flat_linear, impl=kernel)(x, weight, bias)
    assert fi.stats(reset=True).calls == 2
