"""The attention sink under torch: gradients, autocast, compile, export, vmap."""

import math

import pytest
import torch
from test_sink import SINKS, all_dtypes, arguments, every_feature, make_sink
from torch.func import jvp, vmap

from flashinfer_lite import attention, decode, reference
from flashinfer_lite.testing import assert_close, assert_same_bits, check_backward, make_qkv

INF = math.inf


@all_dtypes
@every_feature
def test_gradients(device, isa, dtype, feature):
    for seqlen_q, seqlen_kv, heads_kv in ((1, 60, 1), (13, 40, 2)):
        q, k, v = make_qkv(3, seqlen_q, seqlen_kv, 4, heads_kv, 40, 24, dtype=dtype, device=device)
        options = arguments(feature, device, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, gradients=True)
        for with_lse in (True, False):
            sink = make_sink(device, dtype, requires_grad=True)
            grads = check_backward(attention, q, k, v, sink=sink, with_lse=with_lse, **options)
            assert grads[-1].shape == (4,) and grads[-1].dtype == dtype


@pytest.mark.cpu_only("computed in float64, which CUDA kernels refuse by name")
def test_gradcheck(device, isa):
    """Against finite differences, rows without keys and heads without a sink included."""
    tensors = make_qkv(2, 3, 5, 4, 2, 8, dtype=torch.float64, device=device, requires_grad=True)
    used = torch.tensor([5, 0], device=device)
    sink = make_sink(device, torch.float64, (0.3, -1.0, 2.0, 5.0), requires_grad=True)

    def run(q, k, v, sink, mask):
        x = torch.cat([sink, sink[:1].detach() - INF])[[0, 1, 4, 3]]
        options = {"seqlens_kv": used, "window": (2, 2), "softcap": 3.0, "mask": mask}
        out, lse = attention(q, k, v, sink=x, return_lse=True, **options)
        return out, torch.where(lse == -INF, 0, lse)

    mask = torch.randn(4, 1, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(run, (*tensors, sink, mask))


@all_dtypes
def test_gradients_of_rows_without_keys(device, isa, dtype):
    """The gradient of lse is the sink's, that of out nobody's, though it be NaN."""
    q, k, v = make_qkv(1, 3, 6, 4, 2, 16, dtype=dtype, device=device, requires_grad=True)
    sink = make_sink(device, values=(0.5, -INF, INF, -3.0), requires_grad=True)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    out, lse = attention(q, k, v, sink=sink, seqlens_kv=nothing, return_lse=True)
    dlse = torch.randn_like(lse)
    dout = torch.full_like(out, math.nan)
    grads = torch.autograd.grad((out, lse), (q, k, v, sink), (dout, dlse))
    for x in grads[:3]:
        assert_same_bits(x.abs(), torch.zeros_like(x))
    expected = dlse.sum((0, 2)).float()
    expected[1] = 0
    assert_close(grads[3], expected.double(), expected, "dsink")


@all_dtypes
def test_gradients_without_a_sink_are_as_ever(device, isa, dtype):
    q, k, v = make_qkv(2, 7, 30, 4, 2, 16, dtype=dtype, device=device, requires_grad=True)
    used = torch.tensor([30, 0], device=device)

    def grads(leaves, **options):
        out, lse = attention(q, k, v, seqlens_kv=used, **options, return_lse=True)
        lse = torch.where(lse == -INF, 0, lse)
        return torch.autograd.grad((out, lse), leaves, (dout, dlse))

    dout, dlse = torch.randn_like(q), torch.randn(2, 4, 7, device=device).to(q.dtype)
    dlse = dlse.to(torch.promote_types(dtype, torch.float32))
    sink = make_sink(device, values=(-INF,) * 4, requires_grad=True)
    *got, dsink = grads((q, k, v, sink), sink=sink)
    assert_same_bits(dsink.abs(), torch.zeros_like(sink), "dsink")
    for name, x, y in zip(("dq", "dk", "dv"), got, grads((q, k, v)), strict=True):
        assert_same_bits(x, y, name)


def test_a_sink_alone_may_require_grad(device):
    """It needs no backward of the kernels: on CUDA, too, it can be trained by itself."""
    q, k, v = make_qkv(2, 3, 20, 4, 2, 16, device=device)
    sink = make_sink(device, requires_grad=True)

    def dsink(run, *tensors):
        x = sink.detach().to(tensors[0].dtype).requires_grad_()
        out, lse = run(*tensors, sink=x, return_lse=True)
        return torch.autograd.grad(out.square().sum() + lse.sum(), x)[0]

    oracle = dsink(reference.attention, *(t.double() for t in (q, k, v)))
    assert_close(
        dsink(attention, q, k, v), oracle, dsink(reference.attention, q, k, v), gradient=True
    )


def test_autocast(device):
    q, k, v = make_qkv(1, 3, 40, 4, 2, 16, device=device)
    sink = make_sink(device)
    with torch.autocast(device.type, torch.bfloat16):
        out, lse = attention(q, k, v, sink=sink, return_lse=True)
    cast = (t.bfloat16() for t in (q, k, v))
    expected = attention(*cast, sink=sink, return_lse=True)
    for x, y in zip((out, lse), expected, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training(device, dynamic):
    torch._dynamo.reset()

    def loss(q, k, v, sink):
        out, lse = attention(q, k, v, sink=sink, causal=True, return_lse=True)
        return out.square().sum() + lse.sum()

    step = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    sink = make_sink(device, torch.bfloat16, requires_grad=True)
    for seqlen in (8, 11):
        leaves = make_qkv(2, seqlen, seqlen, 4, 2, 16, device=device, requires_grad=True)
        leaves = (*leaves, sink)
        got = torch.autograd.grad(step(*leaves), leaves)
        for x, y in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            assert_same_bits(x, y)
    torch._dynamo.reset()


class Step(torch.nn.Module):
    """A prompt's attention and a decode, with a sink that is a parameter."""

    def __init__(self):
        super().__init__()
        self.sink = torch.nn.Parameter(torch.tensor(SINKS))

    def forward(self, q, k, v):
        newest = decode(q[:, -1:], k, v, sink=self.sink)
        return newest, *attention(q, k, v, causal=True, sink=self.sink, return_lse=True)


def test_compiled_and_exported_inference(device):
    torch._dynamo.reset()
    step, given = Step().to(device), make_qkv(2, 5, 30, 4, 2, 16, device=device)
    with torch.no_grad():
        expected = step(*given)
        seqlen = torch.export.Dim("seqlen", max=4096)
        shapes = {"q": None, "k": {1: seqlen}, "v": {1: seqlen}}
        program = torch.export.export(step, given, dynamic_shapes=shapes)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for run in (compiled, program.module()):
            for x, y in zip(run(*given), expected, strict=True):
                assert_same_bits(x, y)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", [attention, decode], ids=["attention", "decode"])
def test_vmap_over_sinks(device, op):
    q, k, v = make_qkv(2, 3, 30, 4, 2, 16, device=device)
    sinks = torch.stack([make_sink(device), make_sink(device) + 1, make_sink(device) - INF])
    got = vmap(lambda sink: op(q, k, v, sink=sink, return_lse=True))(sinks)
    both = vmap(lambda x, sink: op(x, k, v, sink=sink, return_lse=True))(
        torch.stack([q] * 3), sinks
    )
    for i, sink in enumerate(sinks):
        for x, z, y in zip(got, both, op(q, k, v, sink=sink, return_lse=True), strict=True):
            assert_same_bits(x[i], y)
            assert_same_bits(z[i], y)


@pytest.mark.parametrize("op", [attention, decode], ids=["attention", "decode"])
def test_a_tangent_of_a_sink_is_refused(device, op):
    q, k, v = make_qkv(2, 3, 30, 4, 2, 16, device=device)
    sink = make_sink(device)
    with pytest.raises(NotImplementedError, match="^sink: .*has no forward-mode AD"):
        jvp(lambda x: op(q, k, v, sink=x), (sink,), (sink,))
    out, tangent = jvp(lambda x: reference.attention(q, k, v, sink=x), (sink,), (sink,))
    assert out.shape == tangent.shape and tangent.any()
