"""torch.export and AOTInductor of a model that uses the ops: what leaves the process is eager's."""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim, export

from flashinfer_lite import attention, dataflow, decode, flat_linear
from flashinfer_lite.testing import assert_same_bits, make_qkv

WIDTH, HEADS, HEADS_KV, HEAD_DIM = 64, 4, 2, 16


class Layer(torch.nn.Module):
    """A prompt's attention, and one new token's over a cache that it is not yet in."""

    def __init__(self):
        super().__init__()
        rows = (HEADS + 2 * HEADS_KV) * HEAD_DIM
        self.register_buffer("into", torch.randn(rows, WIDTH) / 8)
        self.register_buffer("out_of", torch.randn(WIDTH, HEADS * HEAD_DIM) / 8)

    def forward(self, x, k_cache, v_cache, used):
        fused = flat_linear(x, self.into, batch_invariant=True)
        q, k, v = fused.unflatten(-1, (-1, HEAD_DIM)).split((HEADS, HEADS_KV, HEADS_KV), 2)
        prompt, lse = attention(q, k, v, causal=True, window=(9, -1), softcap=8.0, return_lse=True)
        newest = decode(q[:, -1:], k_cache, v_cache, seqlens_kv=used)
        both = torch.cat((prompt, newest), 1).flatten(2)
        return flat_linear(both, self.out_of, batch_invariant=True) + 1, lse


def inputs(batch_size, seqlen, capacity, device="cpu"):
    _, k, v = make_qkv(batch_size, 1, capacity, HEADS, HEADS_KV, HEAD_DIM, device=device)
    used = torch.randint(1, capacity + 1, (batch_size,), device=device)
    return torch.randn(batch_size, seqlen, WIDTH, device=device), k, v, used


BATCH, SEQLEN, CAPACITY = Dim("batch", max=64), Dim("seqlen", max=4096), Dim("capacity", max=65536)
DYNAMIC = {
    "x": {0: BATCH, 1: SEQLEN},
    "k_cache": {0: BATCH, 1: CAPACITY},
    "v_cache": {0: BATCH, 1: CAPACITY},
    "used": {0: BATCH},
}
SIZES = [(2, 7, 20), (5, 33, 90), (1, 3, 17), (3, 1, 1)]  # batch, seqlen, capacity


def exported(module, example, strict, dynamic=DYNAMIC):
    with torch.no_grad():
        return export(module, example, dynamic_shapes=dynamic, strict=strict)


def assert_same(got, expected):
    for x, y in zip(got, expected, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_exported_program_equals_eager(device, strict, tmp_path):
    layer = Layer().to(device)
    program = exported(layer, inputs(2, 7, 20, device), strict)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    called = {str(node.target) for node in program.graph.nodes}
    ops = ("attention_fwd", "decode", "flat_linear")
    assert called >= {f"flashinfer_lite.{name}.default" for name in ops}
    for sizes in SIZES:
        given = inputs(*sizes, device)
        expected = layer(*given)
        for run in (program.module(), loaded.module()):
            assert_same(run(*given), expected)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_exported_attention_trains(device, strict):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return attention(q, k, v, mask=mask, causal="top_left")

    def leaves(batch_size, seqlen):
        q, k, v = make_qkv(batch_size, seqlen, seqlen, 4, 2, 16, device=device, requires_grad=True)
        return q, k, v, torch.randn(seqlen, seqlen, device=device, requires_grad=True)

    dynamic = {name: {0: BATCH, 1: SEQLEN} for name in "qkv"} | {"mask": {0: SEQLEN, 1: SEQLEN}}
    program = export(Attention(), leaves(2, 7), dynamic_shapes=dynamic, strict=strict)
    given = leaves(3, 12)
    runs = [run(*given) for run in (program.module(), Attention())]
    assert_same_bits(*runs)
    got, expected = (torch.autograd.grad(out.square().sum(), given) for out in runs)
    assert_same(got, expected)


class Linear(torch.nn.Module):
    """flat_linear that chooses its kernel by the number of rows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(4096, 2 * WIDTH).bfloat16())

    def forward(self, x):
        return flat_linear(x, self.weight)


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """The shipped thresholds, whatever this machine has measured."""
    monkeypatch.setenv("FLASHINFER_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHINFER_LITE_TUNED", raising=False)
    dataflow.unload()
    yield
    dataflow.unload()


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@pytest.mark.parametrize(
    ("most", "kernel"),
    # Torch's own product where ours might lose: the graph holds one for any number of rows.
    [(1, "gemv"), (16, "flat_gemm"), (4096, "vendor")],
)
def test_one_kernel_for_every_number_of_rows(device, strict, most, kernel):
    linear = Linear().to(device)
    x = torch.randn(min(most, 3), 2 * WIDTH, dtype=torch.bfloat16, device=device)
    dynamic = {"x": {0: Dim("rows", max=most)} if most > 1 else None}
    program = exported(linear, (x,), strict, dynamic)
    for rows in {1, min(most, 3), most}:
        x = torch.randn(rows, 2 * WIDTH, device=device).bfloat16()
        expected = flat_linear(x, linear.weight, impl=kernel)
        assert_same_bits(program.module()(x), expected)


# In a process that has not seen the model: only the ops are there.
CHILD = """
import sys, torch, flashinfer_lite
kind, path = sys.argv[1:]
with torch.no_grad():
    if kind == "export":
        run = torch.export.load(f"{path}/layer.pt2").module()
    else:
        run = torch._inductor.aoti_load_package(f"{path}/compiled.pt2")
    for given, expected in torch.load(f"{path}/calls.pt"):
        for x, y in zip(run(*given), expected, strict=True):
            assert x.dtype == y.dtype and x.equal(y), (x - y).abs().max()
print("equal")
"""


def save_calls(layer, folder, device):
    calls = []
    for sizes in SIZES:
        given = inputs(*sizes, device)
        calls.append((given, layer(*given)))
    torch.save(calls, folder / "calls.pt")


def assert_equal_in_another_process(kind, folder):
    command = [sys.executable, "-c", CHILD, kind, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


def test_saved_program_in_another_process(device, tmp_path):
    layer = Layer().to(device)
    torch.export.save(exported(layer, inputs(2, 7, 20, device), False), tmp_path / "layer.pt2")
    save_calls(layer, tmp_path, device)
    assert_equal_in_another_process("export", tmp_path)


@pytest.mark.slow
def test_aot_inductor_package_in_another_process(device, tmp_path):
    layer = Layer().to(device)
    program = exported(layer, inputs(2, 7, 20, device), False)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "compiled.pt2")
    )
    save_calls(layer, tmp_path, device)
    run = torch._inductor.aoti_load_package(path)
    for given, expected in torch.load(tmp_path / "calls.pt"):
        assert_same(run(*given), expected)
    assert_equal_in_another_process("aot_inductor", tmp_path)
