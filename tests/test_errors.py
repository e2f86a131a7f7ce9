"""Bad input: the error names the argument, what is wanted and what came, and nothing is touched."""

import os

import pytest
import torch

from flashinfer_lite import attention, decode, flat_linear, merge_states
from flashinfer_lite.testing import assert_same_bits, force_isa, isa_levels, make_qkv, on_device

NAMES = {attention: ("q", "k", "v"), decode: ("q", "k_cache", "v_cache")}
both = pytest.mark.parametrize("op", [attention, decode], ids=["attention", "decode"])
INT = torch.int32


def describe(x):
    """A readable id."""
    if torch.is_tensor(x):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{x.device.type}"
    if isinstance(x, type):
        return x.__name__
    return type(x).__name__ if type(x) is object else str(x)[:40]


def call(op, device, *, tensors=(None, None, None), **arguments):
    """op on a good call (batch 2, 3 queries, 7 keys, 4 heads over 2, head_dim 16) but for changes.

    Then checks that no input has changed."""
    inputs = [
        new if new is not None else old for new, old in zip(tensors, good(device), strict=True)
    ]
    before = [t.clone() if torch.is_tensor(t) else t for t in inputs]  # clones keep strides
    try:
        return op(*inputs, **arguments)
    finally:
        for name, t, old in zip(NAMES[op], inputs, before, strict=True):
            if torch.is_tensor(t) and not t.is_meta:
                assert_same_bits(t, old, name)


def good(device):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


@both
def test_the_good_call_is_good(device, op):
    assert call(op, device).shape == (2, 3, 4, 16)


# position of the tensor, its replacement, error, text after "name: "
TENSORS = [
    (0, [[1.0]], TypeError, "expected a torch.Tensor, got list"),
    (1, 3, TypeError, "expected a torch.Tensor, got int"),
    (0, torch.zeros(2, 3, 16), ValueError, r"expected 4 dimensions .*got shape \[2, 3, 16\]"),
    (2, torch.zeros(1, 2, 7, 2, 16), ValueError, r"expected 4 dimensions .*\[1, 2, 7, 2, 16\]"),
    (0, torch.zeros(2, 3, 4, 16).int(), TypeError, "expected dtype .*got torch.int32"),
    (0, torch.zeros(2, 3, 4, 16).cfloat(), TypeError, "expected dtype .*got torch.complex64"),
    (0, torch.zeros(2, 3, 4, 16).to(torch.float8_e4m3fn), TypeError, "dtype .*float8"),
    (1, torch.zeros(2, 7, 2, 16).half(), TypeError, "expected q's dtype torch.float32, got .*16"),
    (2, torch.zeros(2, 7, 2, 16).double(), TypeError, "expected q's dtype torch.float32, got .*64"),
    (0, torch.zeros(2, 3, 4, 20), ValueError, "expected head_dim a multiple of 8.*256.*got 20"),
    (0, torch.zeros(2, 3, 4, 264), ValueError, "expected head_dim .*256.*got 264"),
    (0, torch.zeros(2, 3, 4, 0), ValueError, "expected head_dim .*got 0"),
    (2, torch.zeros(2, 7, 2, 12), ValueError, "expected head_dim .*got 12"),
    (0, torch.zeros(2, 3, 16, 4).mT, ValueError, "last dimension contiguous .*got stride 4"),
    (1, torch.zeros(2, 7, 2, 32)[..., ::2], ValueError, "last dimension .*got stride 2"),
    (2, torch.zeros(2, 7, 2, 1).expand(2, 7, 2, 16), ValueError, "last dimension .*stride 0"),
    (1, torch.zeros(2, 7, 2, 24), ValueError, r"expected shape .*got \[2, 7, 2, 24\]"),
    (1, torch.zeros(3, 7, 2, 16), ValueError, r"expected shape .*got \[3, 7, 2, 16\]"),
    (2, torch.zeros(2, 6, 2, 16), ValueError, r"expected shape \[2, 7, 2, .*got \[2, 6, 2, 16\]"),
    (2, torch.zeros(2, 8, 2, 16), ValueError, r"expected shape \[2, 7, 2, .*got \[2, 8, 2, 16\]"),
    (2, torch.zeros(1, 7, 2, 16), ValueError, r"expected shape .*got \[1, 7, 2, 16\]"),
    (2, torch.zeros(2, 7, 4, 16), ValueError, r"expected shape .*got \[2, 7, 4, 16\]"),
    (0, torch.zeros(2, 3, 3, 16), ValueError, "expected num_heads a multiple of .* 2, got 3"),
    (0, torch.zeros(2, 3, 1, 16), ValueError, "expected num_heads a multiple of .* 2, got 1"),
    (1, torch.zeros(2, 7, 2, 16, device="meta"), ValueError, "expected q's device .*, got meta"),
]


@both
@pytest.mark.parametrize("position, bad, error, message", TENSORS, ids=describe)
def test_tensors(device, op, position, bad, error, message):
    tensors = [None] * 3
    tensors[position] = on_device(bad, device)
    with pytest.raises(error, match=f"^{NAMES[op][position]}: .*{message}"):
        call(op, device, tensors=tensors)


ARGUMENTS = [
    ("causal", "bottom-right", ValueError, "expected False, True, 'bottom_right' or 'top_left'"),
    ("causal", None, ValueError, "expected .*got None"),
    ("causal", 2, ValueError, "expected .*got 2"),
    ("window", 5, ValueError, "expected .*got 5"),
    ("window", (1,), ValueError, "expected .*got"),
    ("window", None, ValueError, "expected .*got None"),
    ("window", (-2, 0), ValueError, r"expected each side >= 0 or -1 .*got \(-2, 0\)"),
    ("window", (0, -7), ValueError, "expected each side"),
    ("window", (1.5, 0), TypeError, "expected integers, got"),
    ("window", (True, 0), TypeError, "expected integers, got"),
    ("softmax_scale", float("nan"), ValueError, "expected a finite number, got nan"),
    ("softmax_scale", float("inf"), ValueError, "expected a finite number, got inf"),
    ("softmax_scale", "1", TypeError, "expected a number, got str"),
    ("softcap", 0, ValueError, "expected None or a finite number > 0, got 0"),
    ("softcap", -1.0, ValueError, "expected None or a finite number > 0, got -1.0"),
    ("softcap", float("inf"), ValueError, "expected .*got inf"),
    ("softcap", float("nan"), ValueError, "expected .*got nan"),
    ("softcap", "5", TypeError, "expected a number, got str"),
    ("mask", [True], TypeError, "expected a torch.Tensor, got list"),
    ("mask", torch.ones(7).int(), TypeError, "expected dtype bool or floating point.*int32"),
    ("mask", torch.ones(7, dtype=torch.uint8), TypeError, "expected dtype bool .*uint8"),
    ("mask", torch.ones(6).bool(), ValueError, r"broadcasts to \[2, 4, 3, 7\].*got \[6\]"),
    ("mask", torch.ones(3, 3, 7).bool(), ValueError, r"broadcasts to .*got \[3, 3, 7\]"),
    ("mask", torch.ones(2, 3, 7).bool(), ValueError, r"broadcasts to .*got \[2, 3, 7\]"),
    ("mask", torch.ones(2, 2, 3, 7).bool(), ValueError, "broadcasts to"),
    ("mask", torch.ones(1, 2, 4, 3, 7), ValueError, "broadcasts to"),
    ("mask", torch.ones(0), ValueError, r"broadcasts to .*got \[0\]"),
    ("mask", torch.tensor(True), ValueError, r"broadcasts to .*got \[\]"),
    ("mask", torch.ones(7, device="meta"), ValueError, "expected q's device .*, got meta"),
    ("kv_start", 1, TypeError, "expected a torch.Tensor, got int"),
    ("seqlens_kv", [1, 2], TypeError, "expected a torch.Tensor, got list"),
    ("kv_start", torch.zeros(2), TypeError, "expected dtype int32 or int64, got torch.float32"),
    ("seqlens_kv", torch.zeros(2, dtype=torch.int16), TypeError, "expected dtype .*int16"),
    ("kv_start", torch.zeros(3, dtype=INT), ValueError, r"expected shape \[2\].*got \[3\]"),
    ("seqlens_kv", torch.zeros(2, 1, dtype=INT), ValueError, r"expected shape \[2\].*got \[2, 1\]"),
    ("seqlens_kv", torch.tensor(1), ValueError, r"expected shape \[2\].*got \[\]"),
    ("seqlens_kv", torch.zeros(2, dtype=INT, device="meta"), ValueError, "expected q's device"),
    ("softmax", "offline", ValueError, "expected one of .*got 'offline'"),
    ("impl", "cuda", ValueError, "expected one of .*got 'cuda'"),
    ("alibi_slopes", [1.0] * 4, TypeError, "expected a torch.Tensor, got list"),
    ("alibi_slopes", torch.ones(4).double(), TypeError, "expected dtype float32, got torch.float6"),
    ("alibi_slopes", torch.ones(4).half(), TypeError, "expected dtype float32, got torch.float16"),
    (
        "alibi_slopes",
        torch.ones(2),
        ValueError,
        r"expected shape \[4\] \(num_heads_q\) or \[2, 4\]",
    ),
    ("alibi_slopes", torch.ones(1, 4), ValueError, r"expected shape .*, got \[1, 4\]"),
    ("alibi_slopes", torch.ones(4, 1), ValueError, r"expected shape .*, got \[4, 1\]"),
    ("alibi_slopes", torch.tensor(1.0), ValueError, r"expected shape .*, got \[\]"),
    ("alibi_slopes", torch.ones(4, device="meta"), ValueError, "expected q's device .*, got meta"),
    ("sink", 1.0, TypeError, "expected a torch.Tensor, got float"),
    ("sink", [1.0] * 4, TypeError, "expected a torch.Tensor, got list"),
    ("sink", torch.ones(4).int(), TypeError, "expected dtype float64, .*got torch.int32"),
    ("sink", torch.ones(2), ValueError, r"expected shape \[4\] \(num_heads_q\), got \[2\]"),
    ("sink", torch.ones(1), ValueError, r"expected shape \[4\] .*got \[1\]"),
    ("sink", torch.tensor(1.0), ValueError, r"expected shape \[4\] .*got \[\]"),
    ("sink", torch.ones(1, 4), ValueError, r"expected shape \[4\] .*got \[1, 4\]"),
    ("sink", torch.ones(4, device="meta"), ValueError, "expected q's device .*, got meta"),
    ("dropout_p", 0.1, NotImplementedError, ""),
    ("phi", float("nan"), ValueError, "expected a finite number, got nan"),
    ("phi", "5", TypeError, "expected a number or a float32 tensor .*, got str"),
    ("phi", torch.zeros(4).double(), TypeError, "expected dtype float32, got torch.float64"),
    ("phi", torch.zeros(3), ValueError, r"expected a number or shape \[4\].*got \[3\]"),
    ("phi", torch.zeros(4, device="meta"), ValueError, "expected q's device .*, got meta"),
]


@both
@pytest.mark.parametrize("name, bad, error, message", ARGUMENTS, ids=describe)
def test_arguments(device, op, name, bad, error, message):
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        call(op, device, **{name: on_device(bad, device)})


# kv_start, seqlens_kv, the message
LENGTHS = [
    (None, [7, 8], r"seqlens_kv: expected .*\[0, 7\].*got 8"),
    (None, [-1, 3], "seqlens_kv: expected .*got -1"),
    (None, [2**31 - 1, 0], "seqlens_kv: expected .*got 2147483647"),
    ([0, 8], None, "kv_start: expected .*got 8"),
    ([-3, 0], None, "kv_start: expected .*got -3"),
    ([0, 5], [7, 4], "kv_start: expected .*seqlens_kv = 4.*got 5"),
    ([-(2**31), 0], [7, 7], "kv_start: expected .*got -2147483648"),
]


@both
@pytest.mark.checks_values
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kv_start, seqlens_kv, message", LENGTHS, ids=describe)
def test_lengths(device, op, dtype, kv_start, seqlens_kv, message):
    arguments = {"kv_start": kv_start, "seqlens_kv": seqlens_kv}
    arguments = {
        n: x if x is None else torch.tensor(x, dtype=dtype, device=device)
        for n, x in arguments.items()
    }
    with pytest.raises(RuntimeError, match=message):
        call(op, device, **arguments)


@both
@pytest.mark.checks_values
def test_lengths_beyond_32_bits(device, op):
    for value in (2**32, 2**62, -(2**63)):
        lengths = torch.tensor([7, value], device=device)
        with pytest.raises(RuntimeError, match=f"seqlens_kv: expected .*got {value}"):
            call(op, device, seqlens_kv=lengths)


DECODE = [
    ("kv_splits", -1, ValueError, "expected 0 .*got -1"),
    ("kv_splits", 5000, ValueError, "expected 0 .*4096, got 5000"),
    ("kv_splits", 1.0, TypeError, "expected an integer, got 1.0"),
    ("kv_splits", True, TypeError, "expected an integer, got True"),
    ("process_group", object(), TypeError, "expected a torch.distributed.ProcessGroup .* got <obj"),
    ("out", 1, TypeError, "expected a torch.Tensor, got int"),
    ("out", torch.zeros(2, 3, 4, 24), ValueError, r"expected shape \[2, 3, 4, 16\], got"),
    ("out", torch.zeros(3, 4, 16), ValueError, "expected shape"),
    ("out", torch.zeros(2, 3, 4, 16).half(), TypeError, "expected q's dtype torch.float32, got"),
    ("out", torch.zeros(2, 3, 16, 4).mT, ValueError, "last dimension contiguous .*stride 4"),
    ("out", torch.zeros(2, 3, 4, 16, device="meta"), ValueError, "expected q's device"),
]


@pytest.mark.parametrize("name, bad, error, message", DECODE, ids=describe)
def test_decode_arguments(device, name, bad, error, message):
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        call(decode, device, **{name: on_device(bad, device)})


def test_decode_out_that_overlaps_itself(device):
    out = torch.zeros(1, 3, 4, 16, device=device).expand(2, 3, 4, 16)
    with pytest.raises((ValueError, RuntimeError), match="^out: expected its own memory"):
        call(decode, device, out=out)


def test_batch_invariant_excludes_kv_splits(device):
    with pytest.raises(ValueError, match="^kv_splits: expected 0 with batch_invariant, got 2"):
        call(decode, device, kv_splits=2, batch_invariant=True)


@pytest.mark.parametrize(
    "outs, lses, error, message",
    [
        ([], [], ValueError, "^outs: expected one or more"),
        (None, None, TypeError, "^outs: expected a torch.Tensor, got NoneType"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3), ValueError, "^outs: expected 5 dimensions"),
        (torch.zeros(1, 2, 3, 4, 8), torch.zeros(2, 4, 3), ValueError, "^lses: expected 4 dimens"),
        (torch.zeros(1, 2, 3, 4, 8), torch.zeros(2, 2, 4, 3), ValueError, r"^lses: .*got \[2, 2, "),
        (torch.zeros(1, 2, 3, 4, 8), torch.zeros(1, 2, 3, 4), ValueError, "^lses: expected shape"),
        (torch.zeros(1, 2, 3, 4, 8), torch.zeros(1, 2, 4, 3).half(), TypeError, "^lses: .*float32"),
        (torch.zeros(1, 2, 3, 4, 8).double(), torch.zeros(1, 2, 4, 3), TypeError, "^lses: .*64"),
        (torch.zeros(1, 2, 3, 4, 8).int(), torch.zeros(1, 2, 4, 3), TypeError, "^outs: .*int32"),
        (torch.zeros(1, 2, 3, 8, 4).mT, torch.zeros(1, 2, 4, 3), ValueError, "^outs: .*stride 4"),
        ([torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 16)], [], ValueError, "^outs: .*one shape"),
    ],
    ids=describe,
)
def test_merge_states_arguments(device, outs, lses, error, message):
    def here(x):
        return [here(t) for t in x] if isinstance(x, list) else on_device(x, device)

    outs, lses = here(outs), here(lses)
    with pytest.raises(error, match=message):
        merge_states(outs, lses)


X, WEIGHT = torch.zeros(3, 8), torch.zeros(5, 8)
FLAT = [
    ({"x": [1.0]}, TypeError, "^x: expected a torch.Tensor, got list"),
    ({"weight": None}, TypeError, "^weight: expected a torch.Tensor, got NoneType"),
    ({"bias": 1.0}, TypeError, "^bias: expected a torch.Tensor, got float"),
    ({"x": X.int()}, TypeError, "^x: expected dtype float64, .* got torch.int32"),
    ({"x": torch.zeros(())}, ValueError, r"^x: expected 1 dimension or more, .*got shape \[\]"),
    ({"x": X[:, :7]}, ValueError, r"^weight: expected shape .*7\] to fit x, got \[5, 8\]"),
    ({"x": torch.zeros(3, 16)[:, ::2]}, ValueError, "^x: expected the last .*got stride 2"),
    ({"weight": WEIGHT[0]}, ValueError, r"^weight: expected 2 dimensions .*got shape \[8\]"),
    ({"weight": WEIGHT.half()}, TypeError, "^weight: expected x's dtype torch.float32, got .*16"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "^weight: expected x's device .*, got meta"),
    ({"weight": torch.zeros(8, 5).t()}, ValueError, "^weight: expected the last .*got stride 5"),
    ({"bias": torch.zeros(4)}, ValueError, r"^bias: expected shape \[5\] \(N\), got \[4\]"),
    ({"bias": torch.zeros(5, 1)}, ValueError, r"^bias: expected shape \[5\] .*, got \[5, 1\]"),
    ({"bias": torch.zeros(5).double()}, TypeError, "^bias: expected x's dtype .*, got .*64"),
    ({"bias": torch.zeros(10)[::2]}, ValueError, "^bias: expected the last .*got stride 2"),
    ({"weight_scale": torch.ones(5)}, NotImplementedError, "^weight_scale: not implemented yet"),
    ({"impl": "gemm"}, ValueError, "^impl: expected one of .*'vendor'.*, got 'gemm'"),
    ({"impl": "gemv", "batch_invariant": True}, ValueError, "^impl: expected 'auto' or 'flat_g"),
    ({"impl": "vendor", "batch_invariant": True}, ValueError, "^impl: expected 'auto' or 'flat_g"),
    ({"out": torch.zeros(3, 4)}, ValueError, r"^out: expected shape \[3, 5\], got \[3, 4\]"),
    ({"out": torch.zeros(3, 5).half()}, TypeError, "^out: expected x's dtype .*, got .*16"),
    ({"out": torch.zeros(5, 3).t()}, ValueError, "^out: expected the last .*got stride 3"),
    ({"out": [0.0]}, TypeError, "^out: expected a torch.Tensor, got list"),
]


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("bad, error, message", FLAT, ids=describe)
def test_flat_linear_arguments(device, bad, error, message, no_grad):
    good = {"x": X.to(device), "weight": WEIGHT.to(device)}
    bad = {n: on_device(x, device) for n, x in bad.items()}
    with torch.set_grad_enabled(not no_grad):
        assert flat_linear(**good).shape == (3, 5)
        with pytest.raises(error, match=message):
            flat_linear(**good | bad)


def test_flat_linear_dtypes_without_a_kernel(device):
    x, weight = X.to(device).double(), WEIGHT.to(device).double()
    for options in ({"impl": "gemv"}, {"impl": "flat_gemm"}, {"batch_invariant": True}):
        with pytest.raises(TypeError, match="^x: expected dtype .*float16.*, got torch.float64"):
            flat_linear(x, weight, **options)
    out = torch.zeros(2, 3, 7, device=device)[..., :5].transpose(0, 1)
    with pytest.raises(ValueError, match="^out: expected leading dimensions that merge"):
        flat_linear(X.to(device).unsqueeze(1).expand(3, 2, 8), WEIGHT.to(device), out=out)


def test_forcing_an_absent_level_lists_those_present(device):
    with pytest.raises((RuntimeError, ValueError)) as caught, force_isa("amx9000"):
        pass
    assert "amx9000" in str(caught.value)
    assert all(level in str(caught.value) for level in isa_levels())


def test_unknown_arguments_are_refused(device):
    for op in (attention, decode):
        with pytest.raises(TypeError, match="sm_scale"):
            call(op, device, sm_scale=1.0)


@both
@pytest.mark.cuda_only("the CPU computes in float64")
def test_float64_on_cuda_is_refused_by_name(device, op):
    tensors = [t.double() for t in good(device)]
    with pytest.raises((TypeError, RuntimeError), match="^q: .*float16.* got .*float64"):
        call(op, device, tensors=tensors)


@both
@pytest.mark.cuda_only("the CPU raises")
@pytest.mark.skipif(os.environ.get("FLASHINFER_LITE_CHECK") == "1", reason="raises then")
def test_lengths_out_of_range_are_clamped_on_cuda(device, op):
    def run(starts, ends):
        starts, ends = (torch.tensor(x, dtype=INT, device=device) for x in (starts, ends))
        return call(op, device, kv_start=starts, seqlens_kv=ends)

    assert_same_bits(run([-5, 2], [2**31 - 1, 9]), run([0, 2], [7, 7]))
    assert not run([6, 0], [3, -4]).any()


@pytest.mark.checks_values
def test_the_process_works_after_errors(device):
    q, k, v = make_qkv(2, 3, 7, device=device)
    expected = attention(q, k, v)
    for seqlens_kv in ([8, 8], [-1, 0]):
        with pytest.raises(RuntimeError):
            attention(q, k, v, seqlens_kv=torch.tensor(seqlens_kv, device=device))
    assert_same_bits(attention(q, k, v), expected)
