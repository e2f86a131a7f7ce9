"""flat_linear against float64, and what it promises of bits, memory and edges."""

import pytest
import torch
import torch.nn.functional as F

import flashinfer_lite
from flashinfer_lite import explain, flat_linear, reference
from flashinfer_lite.testing import EMULATED, assert_close, assert_same_bits, guarded

KERNELS = ["gemv", "flat_gemm"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
kernels = pytest.mark.parametrize("impl", KERNELS)
ON_CUDA = pytest.mark.cpu_only("float32 products are the vendor's on CUDA")
dtypes = pytest.mark.parametrize(
    "dtype", [pytest.param(DTYPES[0], marks=ON_CUDA), *DTYPES[1:]], ids=str
)


def make(m, n, k, dtype, device, bias=True):
    """x, weight and bias, not centred: a sum that lost bits would show."""
    x, weight, offset = (torch.randn(shape, dtype=torch.float64) for shape in ((m, k), (n, k), n))
    x, weight, offset = (t.to(device, dtype) for t in (x + 0.5, weight + 0.25, offset))
    return x, weight, offset if bias else None


def check(out, x, weight, bias, name="out"):
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    assert out.dtype == x.dtype
    eager = F.linear(x, weight, bias)
    if x.dtype != torch.float32 and x.shape[-1]:
        # Some of torch's kernels round once and add in fp32, as ours do: eager rounds each product.
        products = (x.unsqueeze(-2) * weight).sum(-1)
        eager = products if bias is None else products + bias
    assert_close(out, reference.linear(*wide), eager, name)


@kernels
@dtypes
def test_every_number_of_rows(device, isa, impl, dtype):
    x, weight, bias = make(64, 37, 91, dtype, device)
    for m in range(1, 65):
        check(flat_linear(x[:m], weight, bias, impl=impl), x[:m], weight, bias, f"M {m}")


@kernels
@dtypes
@pytest.mark.parametrize("k", [1, 7, 8, 15, 16, 31, 33, 64, 511, 512, 513, 1100])
def test_depths_and_widths(device, isa, impl, dtype, k):
    for n in (1, 2, 5, 11, 12, 13, 25, 50):
        for m in (1, 3, 6):
            x, weight, bias = make(m, n, k, dtype, device, bias=n % 2 == 0)
            check(flat_linear(x, weight, bias, impl=impl), x, weight, bias, f"{m} {n} {k}")


@kernels
@pytest.mark.parametrize("m", [65, 130])
def test_more_rows_than_one_block(device, isa, impl, m):
    x, weight, bias = make(m, 30, 600, torch.bfloat16, device)
    check(flat_linear(x, weight, bias, impl=impl), x, weight, bias)


@pytest.mark.parametrize("impl", [*KERNELS, "vendor", "reference", "auto"])
@dtypes
@pytest.mark.parametrize("m, n, k", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0), (1, 1, 1)])
def test_empty_sizes(device, isa, impl, dtype, m, n, k):
    for with_bias in (False, True):
        x, weight, bias = make(m, n, k, dtype, device, with_bias)
        for shape in ((m,), (1, m), (m, 1)):
            out = flat_linear(x.view(*shape, k), weight, bias, impl=impl)
            assert out.shape == (*shape, n) and out.dtype == dtype
        if k == 0:
            expected = x.new_zeros(m, n) if bias is None else bias.expand(m, n)
            assert_same_bits(flat_linear(x, weight, bias, impl=impl), expected)


@kernels
@dtypes
@pytest.mark.parametrize("k", [24, 37])
def test_nothing_behind_a_row_is_read(device, isa, impl, dtype, k):
    # Rows, and the tensors themselves, end in NaN: one element too many shows in the sum.
    x, weight, bias = make(5, 29, k, dtype, device)
    expected = flat_linear(x, weight, bias, impl=impl)
    for gap in (1, 3, 16):
        wide = [torch.full((t.shape[0] + 1, k + gap), torch.nan).to(t) for t in (x, weight)]
        views = [t[:-1, :k] for t in wide]
        for view, t in zip(views, (x, weight), strict=True):
            view.copy_(t)
        padded = torch.full((30 + gap,), torch.nan).to(bias)
        padded[gap : gap + 29] = bias
        assert_same_bits(flat_linear(*views, padded[gap : gap + 29], impl=impl), expected)


@kernels
def test_only_out_is_written(device, isa, impl):
    x, weight, bias = make(7, 26, 40, torch.bfloat16, device)
    expected = flat_linear(x, weight, bias, impl=impl)
    for offset in (0, 1):
        out = guarded((7, 26), torch.bfloat16, device, offset=offset)
        assert flat_linear(x, weight, bias, impl=impl, out=out.tensor) is out.tensor
        assert_same_bits(out.tensor, expected)
        out.assert_intact("out")
        wide = guarded((7, 40), torch.bfloat16, device, offset=offset)
        flat_linear(x, weight, bias, impl=impl, out=wide.tensor[:, 3:29])
        assert_same_bits(wide.tensor[:, 3:29], expected)
        assert wide.tensor[:, :3].isnan().all() and wide.tensor[:, 29:].isnan().all()


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_leading_dimensions_and_strides(device, isa, impl):
    x, weight, bias = make(6, 10, 20, torch.bfloat16, device)
    expected = flat_linear(x, weight, bias, impl=impl)

    def run(x, **options):
        return flat_linear(x, weight, bias, impl=impl, **options)

    assert_same_bits(run(x.view(2, 3, 20)), expected.view(2, 3, 10))
    assert_same_bits(run(x[0]), run(x[:1])[0])
    swapped = x.view(2, 3, 20).transpose(0, 1)
    assert_same_bits(run(swapped), expected.view(2, 3, 10).transpose(0, 1).contiguous())
    assert_same_bits(run(x[::2]), run(x[::2].contiguous()))
    assert_same_bits(run(x[:1].expand(4, 20)), run(x[:1].repeat(4, 1)))
    same = weight[:1].expand(10, 20)
    assert_same_bits(
        flat_linear(x, same, bias, impl=impl), flat_linear(x, same.contiguous(), bias, impl=impl)
    )
    assert_same_bits(
        flat_linear(x, weight[::3], impl=impl), flat_linear(x, weight[::3].clone(), impl=impl)
    )
    out = torch.full((2, 3, 10), torch.nan).to(x)
    assert run(x.view(2, 3, 20), out=out) is out
    assert_same_bits(out, expected.view(2, 3, 10))


@kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_stay_where_torch_has_them(device, isa, impl, value):
    for dtype in DTYPES if device.type == "cpu" else DTYPES[1:]:
        x, weight, bias = make(3, 14, 33, dtype, device)
        x[1, 32], weight[4, 0], bias[7] = value, value, value
        got, wanted = flat_linear(x, weight, bias, impl=impl), F.linear(x, weight, bias)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(wanted))


@kernels
def test_sums_too_large_for_float16_are_infinite(device, isa, impl):
    x = torch.full((2, 64), 60.0, dtype=torch.float16, device=device)
    out = flat_linear(x, torch.stack([x[0], -x[0], x[0] / 4]), impl=impl)
    expected = torch.tensor([[torch.inf, -torch.inf, 57600.0]] * 2)
    assert torch.equal(out.float().cpu(), expected)


@kernels
@dtypes
@pytest.mark.cpu_only("the threads are the CPU's")
def test_bits_do_not_depend_on_threads(device, isa, impl, dtype, threads):
    for m, n, k in ((1, 300, 600), (4, 7, 40000), (9, 411, 513), (64, 50, 900)):
        x, weight, bias = make(m, n, k, dtype, device)
        threads(1)
        expected = flat_linear(x, weight, bias, impl=impl)
        for count in (2, 3, 7):
            threads(count)
            assert_same_bits(flat_linear(x, weight, bias, impl=impl), expected)


@dtypes
@pytest.mark.parametrize("k", [40, 513, 1600])
def test_batch_invariant_bits_do_not_depend_on_other_rows(device, isa, dtype, k):
    x, weight, bias = make(130, 45, k, dtype, device)
    expected = flat_linear(x, weight, bias, batch_invariant=True)
    check(expected, x, weight, bias)
    for m in [*range(1, 33), 63, 64, 65, 100]:
        out = flat_linear(x[:m], weight, bias, batch_invariant=True)
        assert_same_bits(out, expected[:m], f"M {m}")
        out = flat_linear(x[130 - m :], weight, bias, batch_invariant=True)
        assert_same_bits(out, expected[130 - m :], f"last {m}")
    # Nor on the rows of the weight around one.
    assert_same_bits(
        flat_linear(x, weight[17:], batch_invariant=True)[:, 0],
        flat_linear(x, weight, batch_invariant=True)[:, 17],
    )


@pytest.mark.parametrize("impl", ["vendor", "reference"])
def test_the_other_choices_write_into_out_too(device, impl):
    x, weight, bias = make(6, 10, 20, torch.float16, device)
    out = torch.full((2, 3, 16), torch.nan).to(x)[..., :10]
    assert flat_linear(x.view(2, 3, 20), weight, bias, impl=impl, out=out) is out
    check(out.reshape(6, 10), x, weight, bias)


def test_auto_is_one_of_the_choices(device, isa):
    for m in (1, 8, 200):
        x, weight, bias = make(m, 64, 96, torch.bfloat16, device)
        kernel = explain("flat_linear", x, weight, bias).kernel.split()[1]
        expected = flat_linear(x, weight, bias, impl=kernel)
        assert_same_bits(flat_linear(x, weight, bias), expected)
    x, weight, bias = make(3, 64, 96, torch.float64, device)
    assert explain(flat_linear, x, weight).kernel == "flat_linear vendor"
    assert_same_bits(flat_linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.cpu_only("names CPU kernels")
def test_explain(device, isa):
    x, weight, _ = make(3, 64, 96, torch.bfloat16, device)
    below = {"avx512-bf16": "avx512", "amx": "avx512"}.get(isa, isa)
    below = "avx2" if isa in EMULATED else below
    for impl in KERNELS:
        chosen = explain("flat_linear", x, weight, impl=impl)
        assert chosen.kernel == f"flat_linear {impl} cpu {isa if impl == 'flat_gemm' else below}"
        assert {"vendor", "cuda"} < set(chosen.rejected) and impl not in chosen.rejected
    chosen = explain("flat_linear", x.half(), weight.half(), impl="flat_gemm")
    assert chosen.kernel == f"flat_linear flat_gemm cpu {below}"
    chosen = explain("flat_linear", x, weight, batch_invariant=True)
    assert "flat_gemm" in chosen.kernel and "batch_invariant" in chosen.rejected["vendor"]
    with pytest.raises(ValueError, match="^impl: expected"):
        explain("flat_linear", x, weight, impl="gemm")


def test_stats_count_native_calls(device):
    x, weight, _ = make(3, 64, 96, torch.bfloat16, device)
    flashinfer_lite.stats(reset=True)
    for impl in ("gemv", "flat_gemm", "vendor", "reference"):
        flat_linear(x, weight, impl=impl)
    assert flashinfer_lite.stats(reset=True).calls == 2


def test_autocast(device, isa):
    x, weight, bias = make(3, 14, 33, torch.float32, device)
    narrow = [t.bfloat16() for t in (x, weight, bias)]
    with torch.autocast(device.type, torch.bfloat16):
        for impl in (*KERNELS, "vendor"):
            out = flat_linear(x, weight, bias, impl=impl)
            assert_same_bits(out, flat_linear(*narrow, impl=impl))
        assert flat_linear(x, weight.bfloat16()).dtype == torch.bfloat16
        assert flat_linear(x.double(), weight.double()).dtype == torch.float64


def test_inputs_that_require_grad_are_refused_by_name(device):
    inputs = dict(zip(("x", "weight", "bias"), make(3, 14, 33, torch.float16, device), strict=True))
    for name in inputs:
        leaf = inputs | {name: inputs[name].clone().requires_grad_()}
        for impl in ("auto", "gemv", "vendor", "reference"):
            with pytest.raises(RuntimeError, match=f"^{name}: flat_linear is for inference"):
                flat_linear(**leaf, impl=impl)
            with torch.no_grad():
                expected = flat_linear(**inputs, impl=impl)
                assert_same_bits(flat_linear(**leaf, impl=impl), expected)


@pytest.mark.parametrize("kernel", ["gemv", "flat_gemm"])
def test_out_shares_no_memory_with_an_input(device, kernel):
    memory = torch.randn(5, 48, device=device, dtype=torch.bfloat16)
    weight, bias = memory.new_ones(16, 16), memory.new_ones(16)

    def run(x, weight, bias, out):
        return flat_linear(x, weight, bias, impl=kernel, out=out)

    x = memory[:, :16]
    for out in (x, memory[:, 8:24], memory[:, 15:31]):
        with pytest.raises(RuntimeError, match="out: expected memory of its own, got some of x's"):
            run(x, weight, bias, out)
    with pytest.raises(RuntimeError, match="got some of weight's"):
        run(x, weight, bias, weight[3:8])
    with pytest.raises(RuntimeError, match="got some of bias's"):
        run(x[:1], weight, bias, bias[None])
    beside = memory[:, 16:32]  # of the same rows, as a fused projection's are
    assert torch.equal(run(x, weight, bias, beside), run(x, weight, bias, torch.empty_like(x)))
