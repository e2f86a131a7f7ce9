"""The contract of every op: schema, fake kernel, autograd, dispatch keys."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashinfer_lite import _ops
from flashinfer_lite.testing import make_mask, make_qkv, make_varlen

# name -> (what the arguments must hold, autograd)
OPS = {
    "attention_fwd": ("Tensor q, Tensor k, Tensor v", True),
    "attention_bwd": ("Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v", True),
    "attention_varlen_fwd": (
        "Tensor cu_seqlens_q, Tensor cu_seqlens_kv, Tensor? kv_start, Tensor? seqlens_kv",
        True,
    ),
    "attention_varlen_bwd": ("Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_kv", True),
    "decode": ("Tensor q, Tensor k_cache, Tensor v_cache", False),
    "decode.out": (
        "Tensor(a!) out, Tensor(b!) lse, float? phi=None, Tensor? phi_heads=None, "
        "Tensor? block_table=None, Tensor? alibi_slopes=None) -> ()",
        False,
    ),
    "merge_states": ("Tensor outs, Tensor lses", True),
    "append_kv": ("(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor", False),
    "flat_linear": ("Tensor x, Tensor weight, Tensor? bias, str kernel) -> Tensor", False),
    "flat_linear.out": ("Tensor? bias, str kernel, Tensor(a!) out) -> ()", False),
    "plan": ("Tensor q, Tensor k, Tensor v, str kernel", False),
    "cpu_isa": ("", False),
    "cpu_isas": ("", False),
    "stats": ("", False),
    "cuda_version_error": ("", False),
    "cuda_instances": ("", False),
    "cuda_stats": ("", False),
}
NATIVE = Path(__file__).parent.parent / "csrc" / "ops"
# What the stable ABI boxes a schema's type as. Another C++ type compiles, and reads garbage.
CPP_TYPES = {
    "Tensor": "Tensor",
    "int": "int64_t",
    "float": "double",
    "bool": "bool",
    "str": "std::string",
    "Optional[Tensor]": "std::optional<Tensor>",
    "Optional[float]": "std::optional<double>",
    "Optional[int]": "std::optional<int64_t>",
    "Optional[str]": "std::optional<std::string>",
}
SCALARS = (0.25, 0.0, 1, -1, -1)
LAYOUTS = ["contiguous", "fused", "bhsd", "misaligned", "expand"]
without_and_with_gradients = pytest.mark.parametrize("requires_grad", [False, True])


def op_named(name):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.flashinfer_lite, packet), overload or "default")


def test_every_op_is_listed(device):
    registered = {
        name.removeprefix("flashinfer_lite::").removesuffix(".default")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("flashinfer_lite::")
    }
    assert registered == set(OPS) == set(_ops.SCHEMAS)


@pytest.mark.parametrize("name", OPS)
def test_schema(device, name):
    text, autograd = OPS[name]
    schema = op_named(name)._schema
    assert text in str(schema)
    # register_autograd takes neither mutated nor keyword-only tensors; training ops have none.
    if autograd:
        assert not schema.is_mutable
        assert not any(argument.kwarg_only for argument in schema.arguments)
    assert schema.is_mutable == (name.endswith(".out") or name == "append_kv")


@pytest.mark.parametrize("name", [n for n, (text, _) in OPS.items() if text])
def test_dispatch_keys(device, name):
    def has(key):
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"flashinfer_lite::{name}", key)

    assert has("CPU") and has("Meta")
    assert has("CUDA") or _ops.cuda_status != "loaded"
    # Autograd costs microseconds a call even under no_grad: inference ops have none.
    assert has("Autograd") == OPS[name][1]


def native_signatures():
    """{(op, dispatch key): (return type, [(type, name) of the parameters])} of csrc/ops/*.cpp."""
    found = {}
    for path in NATIVE.glob("*.cpp"):
        text = re.sub(r"/\*|\*/", "", path.read_text())  # unused parameters: const Tensor& /*out*/
        registration = re.search(r"STABLE_TORCH_LIBRARY_IMPL\(flashinfer_lite, (\w+), m\)", text)
        if registration is None:  # what several ops share
            continue
        key = registration[1]
        for op, function in re.findall(r'm\.impl\("([\w.]+)", FIL_BOX\([\w:]*::(\w+)\)\)', text):
            head = re.search(rf"^([\w:<>, ]+) {function}\(([^)]*)\) {{", text, re.MULTILINE)
            declared = re.sub(r"const |&", "", head[2]).split(",") if head[2] else []
            found[op, key] = (head[1], [tuple(one.split()) for one in declared])
    return found


def test_native_signatures_are_those_of_the_schemas(device):
    signatures = native_signatures()
    for (name, key), (returned, parameters) in signatures.items():
        schema = op_named(name)._schema
        wanted = [(CPP_TYPES[str(a.type)], a.name) for a in schema.arguments]
        assert parameters == wanted, (name, key)
        types = [CPP_TYPES[str(result.type)] for result in schema.returns]
        single = types[0] if types else "void"
        assert returned == (f"std::tuple<{', '.join(types)}>" if len(types) > 1 else single), name
    assert {name for name, _ in signatures} == set(OPS)
    for name in (name for name, (text, _) in OPS.items() if text):
        assert {key for op, key in signatures if op == name} == {"CPU", "CUDA"}, name


def sample(device, layout="contiguous", dtype=torch.float32, seqlen_q=5, requires_grad=False):
    seqlen_kv = seqlen_q if layout == "fused" else 9
    options = {"dtype": dtype, "device": device, "layout": layout}
    return make_qkv(2, seqlen_q, seqlen_kv, 4, 2, 16, requires_grad=requires_grad, **options)


def optional(device, mask=None, lengths=False, q=5, k=9):
    if mask is not None:
        mask = make_mask(mask, (1, 4, q, k), device=device)
    ends = torch.tensor([k, 3], dtype=torch.int32, device=device) if lengths else None
    starts = torch.tensor([1, 0], device=device) if lengths else None
    return mask, starts, ends


@without_and_with_gradients
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_attention_fwd(device, requires_grad, mask, dtype):
    q, k, v = sample(device, dtype=dtype, requires_grad=requires_grad)
    mask, *lengths = optional(device, mask, lengths=mask is not None)
    if requires_grad and mask is not None and mask.dtype != torch.bool:
        mask.requires_grad_()
    torch.library.opcheck(_ops.attention_fwd, (q, k, v, mask, *lengths, *SCALARS))


@without_and_with_gradients
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_attention_fwd_layouts(device, layout, requires_grad):
    inputs = sample(device, layout, requires_grad=requires_grad and layout != "expand")
    torch.library.opcheck(_ops.attention_fwd, (*inputs, None, None, None, *SCALARS))


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_opcheck_attention_bwd(device, mask):
    q, k, v = sample(device)
    masks = optional(device, mask, lengths=True)
    out, lse = _ops.attention_fwd(q, k, v, *masks, *SCALARS)
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), dlse, q, k, v, out, lse, *masks, *SCALARS)
        torch.library.opcheck(_ops.attention_bwd, (*arguments, mask == "additive"))


def ragged(device, lengths=False, requires_grad=False, **options):
    """The tensors of a ragged batch, as attention_varlen_fwd takes them."""
    q, k, v, offsets = make_varlen([3, 0, 6], [4, 2, 9], head_dim=16, device=device, **options)
    starts = torch.tensor([1, 0, 0], device=device) if lengths else None
    ends = torch.tensor([4, 0, 8], dtype=torch.int32, device=device) if lengths else None
    tensors = [x.requires_grad_(requires_grad) for x in (q, k, v)]
    return *tensors, *offsets.values(), starts, ends


@without_and_with_gradients
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "bhsd", "padded", "misaligned"])
def test_opcheck_attention_varlen_fwd(device, requires_grad, lengths, layout):
    inputs = ragged(device, lengths, requires_grad, layout=layout)
    torch.library.opcheck(_ops.attention_varlen_fwd, (*inputs, *SCALARS, 6, None))
    torch.library.opcheck(_ops.attention_varlen_fwd, (*inputs, *SCALARS, None, 9, 0.0))


@pytest.mark.parametrize("lengths", [False, True])
def test_opcheck_attention_varlen_bwd(device, lengths):
    q, k, v, *rest = ragged(device, lengths)
    out, lse = _ops.attention_varlen_fwd(q, k, v, *rest, *SCALARS, None, None)
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), dlse, q, k, v, out, lse, *rest, *SCALARS)
        torch.library.opcheck(_ops.attention_varlen_bwd, arguments)


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("invariant", [False, True])
def test_opcheck_decode(device, mask, invariant):
    q, k, v = sample(device, seqlen_q=1)
    masks = optional(device, mask, lengths=True, q=1)
    torch.library.opcheck(_ops.decode, (q, k, v, *masks, *SCALARS, 0, invariant))
    out, lse = torch.empty_like(q), torch.empty(2, 4, 1, device=device)
    torch.library.opcheck(_ops.decode_out, (q, k, v, *masks, *SCALARS, 2, False, out, lse))


@pytest.mark.parametrize("kernel", ["attention_fwd", "decode"])
def test_opcheck_plan(device, kernel):
    q, k, v = sample(device, seqlen_q=1)
    torch.library.opcheck(_ops.plan, (q, k, v, kernel, 9, 0, False))
    with pytest.raises(RuntimeError, match="kernel: expected attention_fwd or decode, got softmax"):
        _ops.plan(q, k, v, "softmax", 9, 0, False)
    with pytest.raises(RuntimeError, match="longest: expected 0 to k's seqlen 9, got 10"):
        _ops.plan(q, k, v, kernel, 10, 0, False)


@pytest.mark.parametrize("kernel", ["gemv", "flat_gemm"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_flat_linear(device, kernel, with_bias):
    x, weight, bias = (
        torch.randn(shape, device=device).bfloat16() for shape in ((3, 40), (24, 40), (24,))
    )
    bias = bias if with_bias else None
    torch.library.opcheck(_ops.flat_linear, (x, weight, bias, kernel))
    out = torch.empty(3, 32, dtype=x.dtype, device=device)[:, :24]
    torch.library.opcheck(_ops.flat_linear_out, (x, weight, bias, kernel, out))
    check_fake(lambda *inputs: [_ops.flat_linear(*inputs)], (x, weight, bias, kernel))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_merge_states(device, requires_grad):
    outs = torch.randn(3, 2, 5, 4, 16, device=device, requires_grad=requires_grad)
    lses = torch.randn(3, 2, 4, 5, device=device, requires_grad=requires_grad)
    torch.library.opcheck(_ops.merge_states, (outs, lses))


def check_fake(op, arguments):
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if torch.is_tensor(x) else x for x in arguments))
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_fake_results_have_the_strides_of_real_ones(device, layout, dtype):
    q, k, v = sample(device, layout, dtype=dtype)
    masks = optional(device, "additive", lengths=True, q=q.shape[1], k=k.shape[1])
    out, lse = _ops.attention_fwd(q, k, v, *masks, *SCALARS)
    batch_size, num_heads_q, seqlen_q = lse.shape
    swapped = lse.new_zeros(seqlen_q, batch_size, 2, num_heads_q).permute(2, 0, 3, 1)
    calls = [
        (_ops.attention_fwd, (q, k, v, *masks, *SCALARS)),
        (_ops.decode, (q, k, v, *masks, *SCALARS, 3, False)),
        (_ops.merge_states, (torch.stack([out] * 2), torch.stack([lse] * 2))),
        (_ops.merge_states, (torch.stack([out] * 2).permute(0, 2, 1, 3, 4), swapped)),
    ]
    for op, arguments in calls:
        check_fake(op, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "bhsd", "misaligned", "expand"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_fake_results_of_a_ragged_batch_have_the_strides_of_real_ones(device, layout, dtype):
    q, k, v, *rest = ragged(device, layout=layout, dtype=dtype)
    check_fake(_ops.attention_varlen_fwd, (q, k, v, *rest, *SCALARS, None, None))
    out, lse = _ops.attention_varlen_fwd(q, k, v, *rest, *SCALARS, None, None)
    check_fake(_ops.attention_varlen_bwd, (out, lse, q, k, v, out, lse, *rest, *SCALARS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_fake_gradients_have_the_strides_of_real_ones(device, layout, dtype):
    q, k, v = sample(device, layout, dtype=dtype)
    masks = optional(device, "additive", lengths=True, q=q.shape[1], k=k.shape[1])
    out, lse = _ops.attention_fwd(q, k, v, *masks, *SCALARS)
    arguments = (out, lse, q, k, v, out, lse, *masks, *SCALARS, True)
    check_fake(_ops.attention_bwd, arguments)


def test_results_share_no_memory_with_inputs(device):
    q, k, v = sample(device, seqlen_q=9)
    out, lse = _ops.attention_fwd(q, k[:, :1], v[:, :1], None, None, None, *SCALARS)
    outs, lses = out.unsqueeze(0), lse.unsqueeze(0)
    merged = _ops.merge_states(outs, lses)  # one state: still a copy, as the schema says
    assert merged[0].data_ptr() != out.data_ptr() and merged[1].data_ptr() != lse.data_ptr()
