"""attention_varlen() as torch sees it: errors by name, compile, export, autocast, transforms."""

import functools
import sys

import pytest
import torch
import torch._dynamo.testing
from test_varlen import BATCH, FEATURES, on
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import grad, jvp, vmap

from flashinfer_lite import (
    attention_varlen,
    explain,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flashinfer_lite.testing import assert_same_bits, make_varlen, on_device

INT = torch.int32
SHORT = sys.modules["flashinfer_lite._plain"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def good(device):
    """Sequences of 3, 0 and 2 queries, 4, 1 and 2 keys, 4 heads over 2, head_dim 16."""
    q, k, v, offsets = make_varlen([3, 0, 2], [4, 1, 2], head_dim=16, device=device)
    return {"q": q, "k": k, "v": v, **offsets}


Q, KV = torch.zeros(5, 4, 16), torch.zeros(7, 2, 16)
CU = torch.tensor([0, 3, 3, 5], dtype=INT)
# what changes, the error, how its message goes on behind the name
WRONG = [
    ({"q": [[1.0]]}, TypeError, "expected a torch.Tensor, got list"),
    ({"q": Q[None]}, ValueError, r"expected 3 dimensions \[total, num_heads, head_dim\], got sh"),
    ({"v": KV[0]}, ValueError, r"expected 3 dimensions .*got shape \[2, 16\]"),
    ({"q": Q.int()}, TypeError, "expected dtype .*got torch.int32"),
    ({"k": KV.half()}, TypeError, "expected q's dtype torch.float32, got .*16"),
    ({"v": KV[..., :12]}, ValueError, "expected head_dim .*got 12"),
    ({"k": torch.zeros(7, 16, 2).mT}, ValueError, "expected the last dimension .*got stride 2"),
    ({"k": KV[..., :8]}, ValueError, r"expected shape \[7, 2, 16\] to fit q, got \[7, 2, 8\]"),
    ({"v": KV[:6]}, ValueError, r"expected shape \[7, 2, 'head_dim_v'\] like k, got \[6, 2, 16\]"),
    ({"q": Q[:, :3]}, ValueError, "expected num_heads a multiple of k's num_heads 2, got 3"),
    ({"k": KV.to("meta")}, ValueError, "expected q's device .*, got meta"),
    ({"cu_seqlens_q": [0, 5]}, TypeError, "expected a torch.Tensor, got list"),
    ({"cu_seqlens_kv": None}, TypeError, "expected a torch.Tensor, got NoneType"),
    ({"cu_seqlens_q": CU.float()}, TypeError, "expected dtype int32 or int64, got torch.float32"),
    ({"cu_seqlens_q": CU.short()}, TypeError, "expected dtype int32 or int64, got torch.int16"),
    ({"cu_seqlens_q": CU[:0]}, ValueError, r"expected shape \[batch \+ 1\], got \[0\]"),
    ({"cu_seqlens_q": CU[None]}, ValueError, r"expected shape \[batch \+ 1\], got \[1, 4\]"),
    ({"cu_seqlens_kv": CU[:3]}, ValueError, r"expected shape \[4\] like cu_seqlens_q, got \[3\]"),
    ({"cu_seqlens_kv": CU.to("meta")}, ValueError, "expected q's device .*, got meta"),
    ({"max_seqlen_q": 3.0}, TypeError, "expected None or an integer, got float"),
    ({"max_seqlen_q": True}, TypeError, "expected None or an integer, got bool"),
    ({"max_seqlen_kv": -1}, ValueError, "expected None or an integer >= 0, got -1"),
    ({"mask": torch.ones(5, 7).bool()}, ValueError, "expected None, got one.* use attention"),
    ({"kv_start": torch.zeros(4, dtype=INT)}, ValueError, r"expected shape \[3\].*got \[4\]"),
    ({"seqlens_kv": torch.zeros(3)}, TypeError, "expected dtype int32 or int64, got"),
    ({"sink": torch.ones(2)}, ValueError, r"expected shape \[4\] \(num_heads_q\), got \[2\]"),
    ({"phi": torch.zeros(3)}, ValueError, r"expected a number or shape \[4\].*got \[3\]"),
    ({"alibi_slopes": torch.ones(2, 4)}, ValueError, r"expected shape \[4\] .* or \[3, 4\] .*got"),
    ({"alibi_slopes": torch.ones(4).double()}, TypeError, "expected dtype float32, got torch.floa"),
    ({"dropout_p": 0.1}, NotImplementedError, "not implemented yet"),
    ({"causal": 2}, ValueError, "expected .*got 2"),
    ({"window": (-2, 0)}, ValueError, "expected each side"),
    ({"softcap": 0.0}, ValueError, "expected None or a finite number > 0, got 0.0"),
    ({"softmax": "offline"}, ValueError, "expected one of"),
    ({"impl": "cuda"}, ValueError, "expected one of"),
]


@pytest.mark.parametrize("change, error, message", WRONG, ids=lambda x: str(x)[:40])
def test_errors_name_the_argument(device, change, error, message):
    (name, bad) = next(iter(change.items()))
    call = good(device) | {name: on_device(bad, device)}
    for op in (attention_varlen, functools.partial(explain, attention_varlen)):
        with pytest.raises(error, match=f"^{name}: {message}"):
            op(**call)


@pytest.mark.checks_values
@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seqlens_q": [0, 3, 2, 5]}, "cu_seqlens_q: expected ascending values, got 2 at 2 aft"),
        (
            {"cu_seqlens_q": [-1, 3, 3, 5]},
            r"cu_seqlens_q: expected values in \[0, 5\], got -1 at 0",
        ),
        ({"cu_seqlens_kv": [0, 3, 3, 8]}, r"cu_seqlens_kv: .* in \[0, 7\], got 8 at 3"),
        ({"max_seqlen_q": 2}, "max_seqlen_q: expected at least 3, the length of sequence 0, got 2"),
        ({"max_seqlen_kv": 3}, "max_seqlen_kv: expected at least 4, the length of sequence 0"),
        ({"seqlens_kv": [4, 2, 2]}, r"seqlens_kv: expected values in \[0, 1\], got 2 at batch 1"),
        ({"kv_start": [4, 0, 3]}, r"kv_start: expected .*seqlens_kv = 2\], got 3 at batch 2"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_values_are_checked(device, isa, change, message):
    (name, bad) = next(iter(change.items()))
    bad = torch.tensor(bad, device=device) if isinstance(bad, list) else bad
    with pytest.raises(RuntimeError, match=f"^{message}"):
        attention_varlen(**good(device) | {name: bad})
    if name.startswith(("cu_", "max_")):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            attention_varlen(**good(device) | {name: bad}, impl="reference")


@pytest.mark.parametrize("impl, error", [("sm80", ValueError), ("sm90", NotImplementedError)])
@pytest.mark.cpu_only("sm80 is what CUDA tensors run")
def test_impl_is_what_runs_or_an_error(device, impl, error):
    call = good(device)
    with pytest.raises(error, match="^impl: "):
        attention_varlen(**call, impl=impl)
    assert_same_bits(attention_varlen(**call, impl="cpu"), attention_varlen(**call))


@pytest.fixture
def short(monkeypatch):
    """The short way's results so far, None where it stepped aside."""
    results, call = [], SHORT.call

    def recorded(*arguments, **options):
        results.append(call(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(SHORT, "call", recorded)
    return results


@pytest.mark.parametrize("feature", ["plain", "causal", "window", "softcap", "seqlens"])
def test_the_short_way_gives_the_same_bits(device, short, monkeypatch, feature):
    q, k, v, offsets = make_varlen(*BATCH, device=device)
    arguments = on(device, FEATURES[feature]) | {"return_lse": True}
    quick = attention_varlen(q, k, v, *offsets.values(), 40, None, **arguments)
    assert len(short) == 1 and short[0] is not None
    monkeypatch.setattr(SHORT, "call", lambda *_, **__: None)
    slow = attention_varlen(q, k, v, *offsets.values(), 40, None, **arguments)
    for x, y in zip(quick, slow, strict=True):
        assert_same_bits(x, y)


def train(q, k, v, cu_seqlens_q, cu_seqlens_kv, longest=None):
    out, lse = attention_varlen(
        *(q, k, v, cu_seqlens_q, cu_seqlens_kv, longest),
        causal=True,
        window=(9, -1),
        softcap=8.0,
        return_lse=True,
    )
    return out.square().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training(device, dynamic):
    step = torch.compile(train, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlens in (([3, 0, 6], [4, 2, 9]), ([5, 1, 8], [5, 1, 8]), ([20, 0], [7, 40])):
        q, k, v, offsets = make_varlen(*seqlens, head_dim=16, device=device)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        got = torch.autograd.grad(step(*leaves, *offsets.values(), max(seqlens[0])), leaves)
        expected = torch.autograd.grad(train(*leaves, *offsets.values()), leaves)
        for name, x, y in zip(("dq", "dk", "dv"), got, expected, strict=True):
            assert_same_bits(x, y, name)


def test_new_lengths_do_not_recompile(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(q, k, v, cu_seqlens_q, cu_seqlens_kv, longest):
        return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_kv, longest, longest)

    frames = []
    for n in (5, 6, 9, 31, 64):
        q, k, v, offsets = make_varlen([n, 3, n + 1], head_dim=16, device=device)
        step(q, k, v, *offsets.values(), n + 1)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_exported_program_equals_eager(device, strict):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_kv, sink):
            return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_kv, causal=True, sink=sink)

    def inputs(*seqlens):
        q, k, v, offsets = make_varlen(*seqlens, head_dim=16, device=device, tails=(0, 1))
        return q, k, v, *offsets.values(), torch.arange(4.0, device=device)

    total_q, total_kv, batch = Dim("total_q"), Dim("total_kv"), Dim("batch")
    dynamic = {"q": {0: total_q}, "k": {0: total_kv}, "v": {0: total_kv}, "sink": None}
    dynamic |= {"cu_seqlens_q": {0: batch}, "cu_seqlens_kv": {0: batch}}
    with torch.no_grad():
        example = inputs([3, 0, 6], [4, 2, 9])
        program = export(Attention(), example, dynamic_shapes=dynamic, strict=strict)
        for seqlens in (([3, 0, 6], [4, 2, 9]), ([20, 3], [7, 40])):
            given = inputs(*seqlens)
            assert_same_bits(program.module()(*given), Attention()(*given))


def test_autocast(device):
    call = good(device)
    with torch.autocast(device.type, torch.bfloat16):
        out = attention_varlen(**call)
    assert out.dtype == torch.bfloat16
    call |= {name: call[name].bfloat16() for name in "qkv"}
    assert_same_bits(out, attention_varlen(**call))


def test_a_tangent_is_refused_by_name(device):
    call = good(device)
    for name in "qkv":
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(call[name], torch.ones_like(call[name]))
            with pytest.raises(NotImplementedError, match=f"^{name}: .*no forward-mode AD"):
                attention_varlen(**call | {name: dual})


def test_the_reference_has_forward_ad(device):
    call = {n: x.double() if n in "qkv" else x for n, x in good(device).items()}
    q = call.pop("q")
    _, tangent = jvp(lambda q: attention_varlen(q, **call, impl="reference"), (q,), (q,))
    assert tangent.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_equals_a_loop(device):
    call = good(device)
    q = torch.stack([call.pop("q")] * 2)
    q[1] *= 3
    got = vmap(lambda q: attention_varlen(q, **call, causal=True))(q)
    for i in range(2):
        assert_same_bits(got[i], attention_varlen(q[i], **call, causal=True))


def test_func_grad_is_refused(device):
    call = good(device)
    q = call.pop("q")
    with pytest.raises(RuntimeError, match="functorch transforms"):
        grad(lambda q: attention_varlen(q, **call).sum())(q)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({}, {}),
        ({"causal": True}, {"causal": True}),
        ({"window_size": (3, 2), "softcap": 2.0}, {"window": (3, 2), "softcap": 2.0}),
        ({"window_size": None, "softmax_scale": 0.5}, {"softmax_scale": 0.5}),
        ({"window_size": (3, -1), "causal": True}, {"window": (3, 0), "causal": True}),
    ],
    ids=str,
)
def test_flash_attn_face(device, theirs, ours):
    q, k, v, offsets = make_varlen(*BATCH, device=device)
    seen = (*offsets.values(), 40, 90)
    got = flash_attn_varlen_func(q, k, v, *seen, **theirs, return_attn_probs=True)
    expected = attention_varlen(q, k, v, *seen, **ours, return_lse=True)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], expected[1], "lse")
    assert got[2] is None and len(got) == 3
    assert_same_bits(flash_attn_varlen_func(q, k, v, *seen, **theirs), expected[0])


def test_flash_attn_face_by_position(device):
    q, k, v, offsets = make_varlen(*BATCH, device=device)
    seen = (*offsets.values(), 40, 90)
    got = flash_attn_varlen_func(q, k, v, *seen, 0.0, 0.3, True, (5, 0), 4.0, None, True, True)
    arguments = {"softmax_scale": 0.3, "causal": True, "window": (5, 0), "softcap": 4.0}
    assert_same_bits(got[0], attention_varlen(q, k, v, *seen, **arguments))


def test_flash_attn_packed_forms_are_views_with_gradients(device):
    cu = torch.tensor([0, 4, 4, 11], device=device)
    packed = torch.randn(11, 3, 4, 24, device=device, requires_grad=True)
    out = flash_attn_varlen_qkvpacked_func(packed, cu, 7, causal=True)
    expected = flash_attn_varlen_func(*packed.unbind(1), cu, cu, 7, 7, causal=True)
    assert_same_bits(out, expected)
    (got,) = torch.autograd.grad(out.square().sum(), packed)
    assert_same_bits(got, torch.autograd.grad(expected.square().sum(), packed)[0])

    q = torch.randn(11, 4, 24, device=device)
    kv = torch.randn(11, 2, 2, 24, device=device, requires_grad=True)
    out, lse, _ = flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 7, 7, return_attn_probs=True)
    assert_same_bits(out, flash_attn_varlen_func(q, *kv.unbind(1), cu, cu, 7, 7))
    assert torch.autograd.grad(lse.sum(), kv)[0].any()


def test_flash_attn_face_refuses(device):
    q, k, v, offsets = make_varlen([3, 2], device=device)
    seen = (*offsets.values(), 3, 3)
    with pytest.raises(NotImplementedError, match="^dropout_p: "):
        flash_attn_varlen_func(q, k, v, *seen, 0.1)
    with pytest.raises(ValueError, match=r"^kv: expected shape \[total, 2, num_heads, head_dim\]"):
        flash_attn_varlen_kvpacked_func(q, k, *seen)
    with pytest.raises(ValueError, match=r"^qkv: expected shape \[total, 3, .*got \[2, 9, 2, 8\]"):
        flash_attn_varlen_qkvpacked_func(torch.zeros(2, 9, 2, 8, device=device), seen[0], 3)
