"""Hostile calls straight to the ops: they raise, or return something; they never crash the process.

The public functions check first, but anyone can call `torch.ops`. Run under AddressSanitizer and
UBSan with `make asan`.
"""

import itertools
import math
import random

import pytest
import torch

import flashinfer_lite
from flashinfer_lite.testing import assert_same_bits, on_device

OPS = torch.ops.flashinfer_lite
ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError)
SCALARS = {
    "softmax_scale": 0.25,
    "softcap": 0.0,
    "causal": 1,
    "window_left": -1,
    "window_right": -1,
}
PHI = {"phi": None, "phi_heads": None}  # with defaults in the schemas
HUGE = [2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -2, -(2**31), -(2**63)]

assert flashinfer_lite.built


def base(op, device):
    """A good call: batch 2, 3 queries, 7 keys, 4 heads over 2, head_dim 16, head_dim_v 24."""
    q, k = torch.randn(2, 3, 4, 16, device=device), torch.randn(2, 7, 2, 16, device=device)
    v, out = torch.randn(2, 7, 2, 24, device=device), torch.randn(2, 3, 4, 24, device=device)
    lse = torch.randn(2, 4, 3, device=device)
    optional = {"mask": None, "kv_start": None, "seqlens_kv": None}
    if op == "attention_fwd":
        return {"q": q, "k": k, "v": v, **optional, **SCALARS, **PHI, "deterministic": False}
    if op == "attention_bwd":
        first = {"dout": torch.randn_like(out), "dlse": None, "q": q, "k": k, "v": v}
        last = {"wants_dmask": False, "deterministic": False}
        return {**first, "out": out, "lse": lse, **optional, **SCALARS, **last}
    if op.startswith("attention_varlen"):
        return ragged_base(op, device)
    if op.startswith("flat_linear"):
        x, weight, bias = (
            torch.randn(shape, device=device).bfloat16() for shape in ((5, 40), (24, 40), (24,))
        )
        call = {"x": x, "weight": weight, "bias": bias, "kernel": "flat_gemm"}
        return {**call, "out": x.new_zeros(5, 24)} if op == "flat_linear.out" else call
    if op == "merge_states":
        return {"outs": torch.randn(3, 2, 3, 4, 24, device=device), "lses": torch.stack([lse] * 3)}
    call = {"q": q, "k_cache": k, "v_cache": v, **optional, **SCALARS}
    call |= {"kv_splits": 0, "batch_invariant": False}
    return {**call, "out": out, "lse": lse, **PHI} if op == "decode.out" else {**call, **PHI}


def ragged_base(op, device):
    """Sequences of 2, 0 and 4 queries, 5, 1 and 3 keys, and a row of tail at each end."""
    q, k = torch.randn(8, 4, 16, device=device), torch.randn(11, 2, 16, device=device)
    v, out = torch.randn(11, 2, 24, device=device), torch.randn(8, 4, 24, device=device)
    offsets = {
        "cu_seqlens_q": torch.tensor([1, 3, 3, 7], device=device),
        "cu_seqlens_kv": torch.tensor([1, 6, 7, 10], dtype=torch.int32, device=device),
    }
    rest = {**offsets, "kv_start": None, "seqlens_kv": None, **SCALARS}
    if op == "attention_varlen_fwd":
        longest = {"max_seqlen_q": None, "max_seqlen_kv": None}
        return {"q": q, "k": k, "v": v, **rest, **longest, **PHI, "deterministic": False}
    first = {"dout": torch.randn_like(out), "dlse": None, "q": q, "k": k, "v": v}
    lse = torch.randn(4, 8, device=device)
    return {**first, "out": out, "lse": lse, **rest, "deterministic": False}


def run(op, arguments):
    """Call the op; check that what it may not write is unchanged, whether it raises or not."""
    name, _, overload = op.partition(".")
    function = getattr(getattr(OPS, name), overload or "default")
    writes = ("out", "lse") if op.endswith(".out") else ()
    before = {
        n: t.clone()
        for n, t in arguments.items()
        if torch.is_tensor(t) and n not in writes and t.layout == torch.strided and not t.is_meta
    }
    try:
        return function(**arguments)
    finally:
        for n, old in before.items():
            assert_same_bits(arguments[n], old, n)


ALL = ["attention_fwd", "attention_bwd", "decode", "decode.out", "merge_states"]
RAGGED = ["attention_varlen_fwd", "attention_varlen_bwd"]
ALL += RAGGED
ALL += ["flat_linear", "flat_linear.out"]
all_ops = pytest.mark.parametrize("op", ALL)


@all_ops
def test_the_good_call_is_good(device, isa, op):
    run(op, base(op, device))


def mutations(t):
    """Tensors that do not fit where t did: dtypes, shapes, strides, layouts, devices."""
    for dtype in (
        torch.float64,
        torch.float16,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.uint8,
    ):
        yield t.to(dtype)
    for dim in range(t.dim()):
        for size in (0, 1, t.shape[dim] + 1, 2 * t.shape[dim] + 3):
            shape = list(t.shape)
            shape[dim] = size
            yield torch.zeros(shape, dtype=t.dtype, device=t.device)
        yield torch.zeros_like(t).select(dim, 0)
    yield t.unsqueeze(0)
    if t.dim() > 1:
        yield t.transpose(-1, -2)
    yield torch.zeros(*t.shape, 2, dtype=t.dtype, device=t.device)[..., 0]
    yield torch.zeros((), dtype=t.dtype, device=t.device)
    yield torch.zeros(0, dtype=t.dtype, device=t.device)
    yield torch.zeros(t.shape, dtype=t.dtype, device="meta")
    yield torch.zeros(t.shape, dtype=t.dtype, device=t.device).to_sparse()


@all_ops
def test_one_wrong_tensor(device, isa, op):
    names = [n for n, x in base(op, device).items() if torch.is_tensor(x)]
    for name in names:
        for bad in mutations(base(op, device)[name]):
            arguments = base(op, device) | {name: bad}
            try:
                run(op, arguments)
            except ERRORS:
                continue
            # What was accepted must be a good call of another size or stride, or of another dtype
            # where one tensor decides it, or more than one will do.
            assert bad.layout == torch.strided
            free = name == "outs" or (name in OFFSETS and bad.dtype == torch.int64)
            assert free or bad.dtype == base(op, device)[name].dtype


@all_ops
def test_pairs_of_wrong_tensors(device, op):
    arguments = base(op, device)
    names = [n for n, x in arguments.items() if torch.is_tensor(x)]
    for first, second in itertools.combinations(names, 2):
        for one, two in zip(
            mutations(arguments[first]), mutations(arguments[second]), strict=False
        ):
            try:
                run(op, base(op, device) | {first: one, second: two})
            except ERRORS:
                pass


@all_ops
@pytest.mark.parametrize("name", ["causal", "window_left", "window_right", "kv_splits"])
def test_integers(device, isa, op, name):
    for value in [-1, 0, 3, 4, 4096, 4097, *HUGE]:
        arguments = base(op, device)
        if name not in arguments:
            return
        arguments[name] = value
        wrong = {"causal": not 0 <= value <= 2, "kv_splits": not 0 <= value <= 4096}
        if wrong.get(name, value < -1):
            with pytest.raises(ERRORS, match=name):
                run(op, arguments)
        else:
            run(op, arguments)


@all_ops
@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
def test_floats(device, isa, op, name):
    for value in (float("nan"), float("inf"), -float("inf"), -1.0, 1e308, 5e-324, -0.0):
        arguments = base(op, device)
        if name not in arguments:
            return
        arguments[name] = value
        if value != value or abs(value) == float("inf") or (name == "softcap" and value < 0):
            with pytest.raises(ERRORS, match=name):
                run(op, arguments)
        else:
            run(op, arguments)


@all_ops
@pytest.mark.checks_values
@pytest.mark.parametrize("name", ["kv_start", "seqlens_kv"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths(device, isa, op, name, dtype):
    if name not in base(op, device):
        return
    for value in [8, -1, *HUGE]:
        if not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
            continue
        for position in (0, 1):
            # A ragged batch has three sequences, of which the second has one key.
            lengths = [3, 3] if "cu_seqlens_q" not in base(op, device) else [3, 1, 3]
            lengths = torch.tensor(lengths, dtype=dtype, device=device)
            lengths[position] = value
            with pytest.raises(RuntimeError, match=f"{name}: .*got {value}"):
                run(op, base(op, device) | {name: lengths})


@all_ops
@pytest.mark.parametrize("name", ["kv_start", "seqlens_kv"])
def test_length_tensors(device, isa, op, name):
    if name not in base(op, device):
        return
    count = 3 if "cu_seqlens_q" in base(op, device) else 2
    for bad in bad_integers(count, device):
        with pytest.raises(ERRORS):
            run(op, base(op, device) | {name: bad})
    strided = torch.tensor([1, 99, 0, 99, 1, 99], dtype=torch.int32, device=device)[::2][:count]
    run(op, base(op, device) | {name: strided})
    run(op, base(op, device) | {name: strided[:1].expand(count)})


def bad_integers(count, device):
    """Tensors that are no `count` integers."""
    return [
        torch.zeros(count, device=device),
        torch.zeros(count, dtype=torch.int16, device=device),
        torch.zeros(count, dtype=torch.bool, device=device),
        torch.zeros(count - 1, dtype=torch.int32, device=device),
        torch.zeros(count + 1, dtype=torch.int32, device=device),
        torch.zeros(0, dtype=torch.int32, device=device),
        torch.zeros((), dtype=torch.int32, device=device),
        torch.zeros(count, 1, dtype=torch.int32, device=device),
        torch.zeros(count, dtype=torch.int32, device="meta"),
        torch.zeros(count, dtype=torch.int32, device=device).to_sparse(),
    ]


ragged_ops = pytest.mark.parametrize("op", RAGGED)
OFFSETS = ("cu_seqlens_q", "cu_seqlens_kv")


@ragged_ops
@pytest.mark.parametrize("name", OFFSETS)
def test_offset_tensors(device, isa, op, name):
    for bad in bad_integers(4, device):
        with pytest.raises(ERRORS):
            run(op, base(op, device) | {name: bad})
    strided = torch.tensor([1, 99, 2, 99, 2, 99, 6, 99], dtype=torch.int32, device=device)[::2]
    run(op, base(op, device) | {name: strided})
    run(op, base(op, device) | {name: strided[:1].expand(4)})
    none = {n: base(op, device)[n][:0] for n in OFFSETS}
    with pytest.raises(ERRORS, match=r"cu_seqlens_q: expected shape \[batch \+ 1\], got \[0\]"):
        run(op, base(op, device) | none)


@ragged_ops
@pytest.mark.checks_values
@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offset_values(device, isa, op, name, dtype):
    for value in [12, -1, *HUGE]:
        if not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
            continue
        for position in range(4):
            offsets = base(op, device)[name].to(dtype)
            offsets[position] = value
            with pytest.raises(RuntimeError, match=f"{name}: expected .*got {value} at {position}"):
                run(op, base(op, device) | {name: offsets})
    offsets = torch.tensor([1, 5, 4, 6], dtype=dtype, device=device)
    message = f"{name}: expected ascending values, got 4 at 2 after 5"
    with pytest.raises(RuntimeError, match=message):
        run(op, base(op, device) | {name: offsets})


@pytest.mark.checks_values
def test_max_seqlens(device, isa):
    op = "attention_varlen_fwd"
    for name, length, longest in (("q", 4, 2), ("kv", 5, 0)):
        for value in (length, length + 1, *(x for x in HUGE if x > 0)):
            run(op, base(op, device) | {f"max_seqlen_{name}": value})
        message = f"max_seqlen_{name}: expected at least {length}, the length of sequence {longest}"
        with pytest.raises(RuntimeError, match=f"{message}, got {length - 1}"):
            run(op, base(op, device) | {f"max_seqlen_{name}": length - 1})
        for value in (x for x in HUGE if x < 0):
            with pytest.raises(ERRORS, match=f"max_seqlen_{name}: expected at least 0, got"):
                run(op, base(op, device) | {f"max_seqlen_{name}": value})


@all_ops
def test_masks(device, isa, op):
    if "mask" not in base(op, device):
        return
    full = (2, 4, 3, 7)
    for shape in itertools.product(*[(0, 1, size, size + 1) for size in full]):
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        fits = all(size in (1, want) for size, want in zip(shape, full, strict=True))
        if fits:
            run(op, base(op, device) | {"mask": mask})
        else:
            with pytest.raises(ERRORS, match="mask"):
                run(op, base(op, device) | {"mask": mask})
    for bad in [
        torch.zeros(7, device=device),
        torch.zeros(1, 2, 4, 3, 7, device=device),
        torch.zeros(full, dtype=torch.int32, device=device),
        torch.zeros(full, dtype=torch.complex64, device=device),
        torch.zeros(full, device="meta"),
        torch.zeros(full, device=device).to_sparse(),
    ]:
        with pytest.raises(ERRORS):
            run(op, base(op, device) | {"mask": bad})


def test_gradient_of_a_mask_that_has_none(device, isa):
    for mask in (None, torch.zeros(1, 1, 1, 7, dtype=torch.bool, device=device)):
        with pytest.raises(ERRORS, match="mask"):
            run(
                "attention_bwd", base("attention_bwd", device) | {"mask": mask, "wants_dmask": True}
            )


@pytest.mark.parametrize("op", ["attention_bwd", "attention_varlen_bwd"])
def test_backward_of_values_that_fit_nothing(device, isa, op):
    # lse and out need not belong to the inputs: the result is meaningless, the memory is safe.
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        arguments = base(op, device)
        for name in ("lse", "out", "dout"):
            run(op, arguments | {name: torch.full_like(arguments[name], value)})


def test_outputs_of_decode(device, isa):
    call = base("decode.out", device)
    for name, bad in [
        ("out", call["out"].expand(2, 3, 4, 24)[:1].expand(2, 3, 4, 24)),
        ("out", call["out"].double()),
        ("out", call["out"][..., :16]),
        ("lse", call["lse"].transpose(0, 1).contiguous().transpose(0, 1)),
        ("lse", call["lse"].double()),
        ("lse", call["lse"][:1].expand(2, 4, 3)),
    ]:
        with pytest.raises(ERRORS, match=name):
            run("decode.out", call | {name: bad})


def test_sizes_too_large_to_allocate(device, isa):
    q = torch.zeros(1, 1, 1, 8, device=device)
    for shape in ((2**40, 1, 1, 8), (2**20, 2**30, 1, 8), (1, 2**58, 1, 8)):
        many = q.expand(shape)
        kv = q.expand(shape[0], 1, 1, 8)
        with pytest.raises(ERRORS):
            OPS.attention_fwd(many, kv, kv, None, None, None, *SCALARS.values())


HOSTILE_PHI = [
    {"phi": math.nan},
    {"phi": -math.inf},
    {"phi": 0.0, "phi_heads": torch.zeros(4)},
    {"phi_heads": torch.zeros(3)},
    {"phi_heads": torch.zeros(4, 1)},
    {"phi_heads": torch.zeros(())},
    {"phi_heads": torch.zeros(4, dtype=torch.float64)},
    {"phi_heads": torch.zeros(4, dtype=torch.int32)},
    {"phi_heads": torch.zeros(1).expand(4)},
    {"phi_heads": torch.zeros(8)[::2]},
    {"phi_heads": torch.zeros(4, device="meta")},
]


@pytest.mark.parametrize("op", ["attention_fwd", "attention_varlen_fwd", "decode", "decode.out"])
@pytest.mark.parametrize("phi", HOSTILE_PHI, ids=str)
def test_phi(device, op, phi):
    phi = {n: on_device(x, device) for n, x in phi.items()}
    with pytest.raises(ERRORS, match="phi|device"):
        run(op, base(op, device) | phi)


HOSTILE_SLOPES = [
    torch.zeros(()),
    torch.zeros(3),
    torch.zeros(1, 4),
    torch.zeros(2, 3),
    torch.zeros(2, 4, 1),
    torch.zeros(4, dtype=torch.float64),
    torch.zeros(4, dtype=torch.int32),
    torch.zeros(4, device="meta"),
]


@pytest.mark.parametrize("op", ["attention_fwd", "attention_bwd", *RAGGED, "decode", "decode.out"])
@pytest.mark.parametrize("slopes", HOSTILE_SLOPES, ids=str)
def test_alibi_slopes(device, op, slopes):
    with pytest.raises(ERRORS, match="alibi_slopes|device"):
        run(op, base(op, device) | {"alibi_slopes": on_device(slopes, device)})


@pytest.mark.parametrize("op", ["attention_fwd", "attention_varlen_fwd", "decode", "decode.out"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
def test_phi_of_any_value_changes_nothing(device, op, value):
    """A head whose phi is no help is computed by the online softmax."""
    arguments = base(op, device)
    wanted = run(op, arguments) or (arguments["out"].clone(), arguments["lse"].clone())
    again = arguments | {"phi_heads": torch.full((4,), value, device=device)}
    got = run(op, again) or (again["out"], again["lse"])
    for x, y in zip(got, wanted, strict=True):
        assert_same_bits(x, y, "out, lse")


@all_ops
def test_wrong_number_of_arguments(device, op):
    name, _, overload = op.partition(".")
    function = getattr(getattr(OPS, name), overload or "default")
    arguments = base(op, device)
    with pytest.raises(ERRORS):
        function()
    with pytest.raises(ERRORS):
        function(*arguments.values(), 1)
    for name in arguments.keys() - {*PHI, "deterministic"}:  # those have defaults
        with pytest.raises(ERRORS):
            function(**{n: x for n, x in arguments.items() if n != name})
        with pytest.raises(ERRORS):
            function(**arguments | {name: "text"})


@pytest.mark.parametrize("seed", range(6))
def test_random_calls(device, isa, seed):
    """Any sizes, any dtypes, any strides: mostly refused; what is accepted stays in its bounds."""
    rng, accepted = random.Random(seed), 0
    sizes = [0, 1, 2, 3, 5, 8, 17, 130]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    for _ in range(150):
        dtype = rng.choice(dtypes)

        def tensor(*shape, dtype=dtype):
            shape = [rng.choice(sizes) if rng.random() < 0.02 else size for size in shape]
            storage = torch.randn(3 * torch.Size(shape).numel() + 4, device=device)
            storage = storage.to(rng.choice(dtypes) if rng.random() < 0.02 else dtype)
            order = rng.sample(range(len(shape) - 1), len(shape) - 1)
            strides, step = [0] * (len(shape) - 1) + [1], max(shape[-1], 1)
            for dim in order:  # any order of dimensions, sometimes gaps, sometimes broadcast
                strides[dim] = 0 if rng.random() < 0.1 else step
                step *= max(shape[dim], 1) if strides[dim] else 1
            return storage.as_strided(shape, strides, rng.choice([0, 0, 1, 3]))

        batch_size, seqlen_q, seqlen_kv = (
            rng.choice([1, 2, 3]),
            rng.choice(sizes),
            rng.choice(sizes),
        )
        heads_kv, head_dim, head_dim_v = (
            rng.choice([1, 2]),
            rng.choice([8, 40]),
            rng.choice([8, 72]),
        )
        heads_q = heads_kv * rng.choice([1, 3])
        scalars = [
            0.3,
            rng.choice([0.0, 4.0]),
            rng.randint(0, 2),
            rng.randint(-1, 9),
            rng.randint(-1, 9),
        ]
        q = tensor(batch_size, seqlen_q, heads_q, head_dim)
        k = tensor(batch_size, seqlen_kv, heads_kv, head_dim)
        v = tensor(batch_size, seqlen_kv, heads_kv, head_dim_v)
        mask = starts = ends = None
        if rng.random() < 0.4:
            full = (batch_size, heads_q, seqlen_q, seqlen_kv)
            mask = tensor(*[rng.choice([size, 1]) for size in full], dtype=rng.choice(dtypes))
        if rng.random() < 0.4:
            ends = torch.randint(0, seqlen_kv + 1, (batch_size,), device=device)
            starts = (ends * torch.rand(batch_size, device=device)).long()
        inputs = (mask, starts, ends, *scalars)
        try:
            out, lse = OPS.attention_fwd(q, k, v, *inputs)
            OPS.decode(q, k, v, *inputs, rng.choice([0, 1, 2, 5]), False)
            OPS.decode(q, k, v, *inputs, 0, True)
            wants = mask is not None
            dout = tensor(batch_size, seqlen_q, heads_q, head_dim_v)
            OPS.attention_bwd(dout, None, q, k, v, out, lse, *inputs, wants)
            OPS.attention_bwd(dout, lse, q, k, v, out, lse, *inputs, False, True)
            accepted += 1
        except ERRORS:
            pass
    assert accepted > 30
