"""attention_varlen(), backward: against float64 autograd, and bit for bit a loop of attention()."""

import random

import pytest
import torch
from test_varlen import BATCH, FEATURES, all_dtypes, every_feature, lengths, loop, on

from flashinfer_lite import attention, attention_varlen
from flashinfer_lite.testing import (
    LAYOUTS,
    assert_close_elementwise,
    assert_same_bits,
    check_backward,
    make_varlen,
)


def with_sink(arguments):
    """A sink that requires grad, where there is one."""
    if "sink" in arguments:
        arguments["sink"] = arguments["sink"].detach().requires_grad_()
    return arguments


@all_dtypes
@every_feature
def test_feature(device, isa, dtype, feature):
    arguments = with_sink(on(device, FEATURES[feature]))
    q, k, v, offsets = make_varlen(*BATCH, dtype=dtype, device=device)
    check_backward(attention_varlen, q, k, v, **offsets, **arguments)
    check_backward(attention_varlen, q, k, v, **offsets, with_lse=False, **arguments)


def assert_same_as_loop(q, k, v, offsets, **arguments):
    """Sequence by sequence: a sum of the slices' gradients would make 0 of -0."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    results = attention_varlen(*leaves, **offsets, **arguments, return_lse=True)
    douts = [torch.randn_like(x) for x in results]
    grads = torch.autograd.grad(results, leaves, douts)
    starts = [0, 0]

    def one_gradient(*tensors, **own):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out, lse = attention(*tensors, **own)
        rows, keys = (
            slice(start, start + x.shape[1])
            for start, x in zip(starts, (out, tensors[1]), strict=True)
        )
        starts[:] = rows.stop, keys.stop
        dout = (douts[0][None, rows], douts[1][None, :, rows])
        expected = torch.autograd.grad((out, lse), tensors, dout)
        for name, x, y, part in zip("qkv", grads, expected, (rows, keys, keys), strict=True):
            assert_same_bits(x[None, part], y, "d" + name)
        return out, lse

    loop(q, k, v, **offsets, op=one_gradient, **arguments)
    assert starts == [len(q), len(k)]


@all_dtypes
@pytest.mark.parametrize("feature", ["plain", "causal", "window", "softcap", "seqlens", "kv_start"])
def test_bits_are_those_of_a_loop(device, isa, dtype, feature, threads):
    heads = random.choice([(4, 4), (4, 2), (4, 1)])
    q, k, v, offsets = make_varlen(*BATCH, *heads, dtype=dtype, device=device)
    for count in (1, 3):
        threads(count)
        assert_same_as_loop(q, k, v, offsets, **on(device, FEATURES[feature]))


@all_dtypes
def test_bits_of_long_sequences(device, isa, dtype, threads):
    """One that one thread takes in parts, and several in two passes, beside short ones."""
    lengths_q, lengths_kv = [75, 1, 130, 2], [1600, 20, 129, 0]
    q, k, v, offsets = make_varlen(lengths_q, lengths_kv, 2, 1, 24, dtype=dtype, device=device)
    for count in (1, 2, 8):
        threads(count)
        assert_same_as_loop(q, k, v, offsets, causal=True)


@all_dtypes
def test_repeats_bit_for_bit(device, isa, dtype, threads):
    q, k, v, offsets = make_varlen([150, 3, 40], [170, 90, 5], 6, 2, dtype=dtype, device=device)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run():
        out = attention_varlen(*leaves, **offsets, causal=True, deterministic=True)
        return torch.autograd.grad(out.square().sum(), leaves)

    first = run()
    for count in (1, 2, 2, 3):
        threads(count)
        for name, x, y in zip(("dq", "dk", "dv"), run(), first, strict=True):
            assert_same_bits(x, y, name)


@all_dtypes
@every_feature
def test_tails_get_and_give_nothing(device, isa, dtype, feature):
    arguments = with_sink(on(device, FEATURES[feature]))
    q, k, v, offsets = make_varlen(*BATCH, dtype=dtype, device=device, tails=(2, 3))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    inputs = [*leaves, *([arguments["sink"]] if "sink" in arguments else [])]
    out, lse = attention_varlen(*leaves, **offsets, **arguments, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dout[:2] = dout[-3:] = torch.nan
    dlse[:, :2] = dlse[:, -3:] = torch.nan
    grads = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    for name, x in zip("qkv", grads, strict=False):
        assert not x[:2].any() and not x[-3:].any(), name
    offsets = {n: x - 2 for n, x in offsets.items()}
    tight = [x.detach()[2:-3].requires_grad_() for x in (q, k, v)]
    inputs = [*tight, *inputs[3:]]
    results = attention_varlen(*tight, **offsets, **arguments, return_lse=True)
    expected = torch.autograd.grad(results, inputs, (dout[2:-3], dlse[:, 2:-3]))
    for name, x, y in zip("qkv", grads, expected, strict=False):
        assert_same_bits(x[2:-3], y, name)
    for x, y in zip(grads[3:], expected[3:], strict=True):
        assert_close_elementwise(x, y.double(), "dsink")


@all_dtypes
def test_rows_and_keys_of_no_use_have_no_gradient(device, isa, dtype):
    lengths_q, lengths_kv = [3, 0, 20, 4], [0, 5, 6, 4]
    q, k, v, offsets = make_varlen(lengths_q, lengths_kv, dtype=dtype, device=device)
    dq, dk, dv = check_backward(attention_varlen, q, k, v, **offsets, causal=True)
    assert not dq[:3].any() and not dk[:5].any() and not dv[:5].any()
    assert not dq[3:17].any()  # bottom-right: 20 queries, 6 keys
    nothing = check_backward(attention_varlen, q, k, v, **{n: x[:1] for n, x in offsets.items()})
    assert not any(x.any() for x in nothing)


@all_dtypes
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "capacity"])
def test_layout(device, isa, dtype, layout):
    q, k, v, offsets = make_varlen(
        [3, 0, 26, 1], num_heads_kv=4, head_dim=40, dtype=dtype, device=device, layout=layout
    )
    check_backward(attention_varlen, q, k, v, **offsets, causal=True)


@all_dtypes
def test_layout_of_dout(device, isa, dtype):
    q, k, v, offsets = make_varlen([9, 14, 2], [5, 30, 2], 4, 2, 40, 72, dtype=dtype, device=device)
    dout = torch.randn(25, 4, 72, device=device).to(dtype)
    transposed = dout.transpose(0, 1).contiguous().transpose(0, 1)
    expected = check_backward(attention_varlen, q, k, v, **offsets, dout=dout, with_lse=False)
    flat = torch.empty(dout.numel() + 1, dtype=dtype, device=device)[1:].view_as(dout).copy_(dout)
    strided = torch.stack([dout, dout], -1)[..., 0]
    for other in (transposed, flat, strided):
        got = check_backward(attention_varlen, q, k, v, **offsets, dout=other, with_lse=False)
        for name, x, y in zip(("dq", "dk", "dv"), got, expected, strict=True):
            assert_same_bits(x, y, name)
    one = torch.ones((), dtype=dtype, device=device).expand(25, 4, 72)
    check_backward(attention_varlen, q, k, v, **offsets, dout=one)


@pytest.mark.cpu_only("CUDA kernels refuse float64 by name")
@pytest.mark.parametrize("feature", ["plain", "causal", "window", "softcap", "sink", "everything"])
def test_gradcheck(device, isa, feature):
    q, k, v, offsets = make_varlen(
        [0, 3, 1, 0, 2, 2, 1],
        [4, 53, 0, 0, 90, 25, 3],
        head_dim=8,
        dtype=torch.float64,
        device=device,
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    arguments = on(device, FEATURES[feature])
    if "sink" in arguments:
        leaves.append(torch.randn(4, dtype=torch.float64, device=device, requires_grad=True))
        del arguments["sink"]

    def run(q, k, v, sink=None):
        results = attention_varlen(q, k, v, **offsets, **arguments, sink=sink, return_lse=True)
        return [x.masked_fill(x == -torch.inf, 0.0) for x in results]

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("needed", ["q", "k", "v"])
def test_each_input_alone(device, isa, needed):
    q, k, v, offsets = make_varlen(*BATCH, device=device)
    tensors = {"q": q, "k": k, "v": v}
    everything = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    out = attention_varlen(**everything, **offsets)
    expected = torch.autograd.grad(out.square().sum(), everything[needed])
    tensors[needed].requires_grad_()
    got = torch.autograd.grad(
        attention_varlen(**tensors, **offsets).square().sum(), tensors[needed]
    )
    assert_same_bits(got[0], expected[0], "d" + needed)


def test_second_derivative_is_refused(device):
    q, k, v, offsets = make_varlen([4, 2], device=device)
    q.requires_grad_()
    out = attention_varlen(q, k, v, **offsets)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


def test_no_heads(device, isa):
    q, k, v = (torch.ones(5, n, 16, device=device, requires_grad=True) for n in (0, 2, 2))
    offsets = torch.tensor([1, 2, 5], device=device)
    out = attention_varlen(q, k, v, offsets, offsets)
    for x in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not x.any()


CASES = [*range(15), *(pytest.param(case, marks=pytest.mark.slow) for case in range(15, 60))]


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_random_combination(device, isa, dtype, case):
    rng = random.Random(case)
    heads_kv, batch_size = rng.choice([1, 2]), rng.randint(1, 5)
    lengths_q, lengths_kv = (
        [rng.choice([0, 1, rng.randint(0, 140)]) for _ in range(batch_size)] for _ in range(2)
    )
    q, k, v, offsets = make_varlen(
        lengths_q,
        lengths_kv,
        heads_kv * rng.choice([1, 2, 3]),
        heads_kv,
        8 * rng.randint(1, 10),
        8 * rng.randint(1, 10),
        dtype=dtype,
        device=device,
        layout=rng.choice(["contiguous", "bhsd", "padded", "misaligned"]),
    )
    arguments = {
        "causal": rng.choice([False, True, "top_left"]),
        "window": (rng.choice([-1, -1, 0, 5, 40]), rng.choice([-1, 0, 7])),
        "softcap": rng.choice([None, 2.0, 30.0]),
    }
    if rng.random() < 0.5:
        arguments["seqlens_kv"] = lengths(*(rng.randint(0, n) for n in lengths_kv)).to(device)
    check_backward(attention_varlen, q, k, v, **offsets, **arguments)
