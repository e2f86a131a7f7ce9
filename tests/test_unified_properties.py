"""softmax="unified" over generated shapes, phis, masks and values, most of them hostile."""

import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from unified_oracle import check_unified

from flashinfer_lite import attention, decode
from flashinfer_lite.testing import LAYOUTS, assert_same_bits, make_mask, make_qkv

per_level = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PHI = [0.0, 0.0, -3.0, 4.0, -9.0, -25.0, 28.0, -100.0, 100.0, 1e30, -1e300]
PHI_OF_HEADS = [0.0, 1.0, -5.0, 20.0, math.nan, math.inf, -math.inf, 3e38, -3e38]
FAR = [-20.0, -29.0, -50.0, -80.0, 25.0, 40.0, 200.0, torch.finfo(torch.float32).min]
MASKS = [None, None, "bool", "additive", "additive_inf", "far"]
VALUES = ["plain", "plain", "huge", "tiny", "zero", "one_huge", "mixed"]
POISON = [None, None, None, math.nan, math.inf, -math.inf]


def worst_values(v, kind, factor):
    """V at the ends of its dtype's range, in the memory layout that it has."""
    limits = torch.finfo(v.dtype)
    # The float64 oracle is to bear the weighted sums.
    largest = factor * (limits.max if v.dtype != torch.float64 else limits.max * 2.0**-64)
    if kind == "huge":
        return torch.full_like(v, largest)
    if kind == "tiny":
        return (v.double() * limits.tiny / factor).to(v.dtype)
    if kind == "zero":
        return v * 0
    if kind == "one_huge":
        v = v.clone()
        v[:, -1, 0, 0] = largest
        return v
    if kind == "mixed":
        return torch.where(torch.rand_like(v, dtype=torch.float32) < 0.5, v * limits.tiny, v)
    return v


@st.composite
def problems(draw, decoding):
    """A function of the device that makes (q, k, v, phi, arguments)."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    heads_kv = draw(st.integers(1, 3))
    shape = {
        "batch_size": draw(st.integers(1, 3)),
        # Around 12 rows of a KV head the kernel changes from K and V in place to packed tiles.
        "seqlen_q": pick(1, 2, 3, 4, 6, 8, 11, 12, 13) if decoding else pick(1, 5, 12, 33, 97, 100),
        "seqlen_kv": pick(1, 2, 3, 31, 32, 33, 65, 127, 128, 129, 300),
        "num_heads_q": heads_kv * pick(1, 2, 4, 7),
        "num_heads_kv": heads_kv,
        "head_dim": 8 * pick(1, 3, 8, 17),
        "head_dim_v": 8 * pick(1, 3, 8, 17),
        "dtype": pick(*DTYPES),
        "layout": pick(*LAYOUTS),
        "logits": pick(0.0, 1.0, 1.0, 5.0, 30.0, 1e-3),
    }
    batch_size, seqlen_kv = shape["batch_size"], shape["seqlen_kv"]
    arguments = {
        "causal": pick(False, False, True, "top_left"),
        "window": (pick(-1, -1, 0, 3, 20), pick(-1, -1, 0, 3, 20)),
        "softcap": pick(None, None, None, 0.5, 25.0, 60.0),
        "softmax_scale": pick(None, None, None, 0.0, -0.3, 1.0),
    }
    ends = starts = None
    if draw(st.booleans()):
        ends = [draw(st.integers(0, seqlen_kv)) for _ in range(batch_size)]
        starts = [draw(st.integers(0, end)) for end in ends] if draw(st.booleans()) else None
    mask, far = pick(*MASKS), pick(*FAR)
    full = (batch_size, shape["num_heads_q"], shape["seqlen_q"], seqlen_kv)
    mask_shape = [size if draw(st.booleans()) else 1 for size in full]
    values, factor = pick(*VALUES), pick(1.0, 0.5, 1e-3, 1e-10)
    poison, poisoned = pick(*POISON), pick(0, 1, 2)
    phi = pick(*PHI)
    if draw(st.booleans()):
        phi = [pick(*PHI_OF_HEADS) for _ in range(shape["num_heads_q"])]
    seed = draw(st.integers(0, 2**31))

    def make(device):
        assume(device.type == "cpu" or shape["dtype"] != torch.float64)  # refused by name on CUDA
        torch.manual_seed(seed)
        q, k, v = make_qkv(**shape, device=device)
        given = dict(arguments)
        for name, x in (("seqlens_kv", ends), ("kv_start", starts)):
            if x is not None:
                given[name] = torch.tensor(x, device=device)
        if mask == "far":
            given["mask"] = torch.where(torch.rand(mask_shape, device=device) < 0.4, far, 0.0)
        elif mask is not None:
            given["mask"] = make_mask(mask, mask_shape, device=device)
        if shape["layout"] != "expand":
            v = worst_values(v, values, factor)
            if poison is not None:  # in one place, which a row may see or not
                tensors = [t.clone() for t in (q, k, v)]
                t = tensors[poisoned]
                t[-1, t.shape[1] // 2, 0, -1] = poison
                q, k, v = tensors
        heads = torch.tensor(phi, device=device) if isinstance(phi, list) else phi
        return q, k, v, heads, given

    make.__qualname__ = make.__name__ = (
        f"{shape} {arguments} {ends} {starts} {mask} {far} {mask_shape} {values} {factor} "
        f"{poison} {poisoned} {phi} {seed}"
    )
    return make


@per_level
@given(problem=problems(decoding=False))
def test_attention(device, isa, problem):
    q, k, v, phi, arguments = problem(device)
    check_unified(attention, q, k, v, phi, **arguments)


@per_level
@given(problem=problems(decoding=True), kv_splits=st.sampled_from([0, 1, 2, 3, 7, 50, "invariant"]))
def test_decode(device, isa, problem, kv_splits):
    q, k, v, phi, arguments = problem(device)
    split = {"kv_splits": kv_splits}
    if kv_splits == "invariant":
        split = {"batch_invariant": True}
    check_unified(functools.partial(decode, **split), q, k, v, phi, **arguments)


@per_level
@given(problem=problems(decoding=True), kv_splits=st.sampled_from([1, 3, 50]))
def test_a_hopeless_phi_is_the_online_softmax(device, isa, problem, kv_splits):
    q, k, v, _, arguments = problem(device)
    arguments.pop("mask", None)  # which alone can bring a score up to phi
    hopeless = torch.full((q.shape[2],), 3e38, device=device)
    for op in (attention, functools.partial(decode, kv_splits=kv_splits)):
        online = op(q, k, v, **arguments, return_lse=True)
        got = op(q, k, v, **arguments, phi=hopeless, return_lse=True)
        for name, x, y in zip(("out", "lse"), got, online, strict=True):
            assert_same_bits(x, y, name)


@per_level
@given(problem=problems(decoding=True), kv_splits=st.sampled_from([1, 4]))
def test_strides_do_not_change_a_bit(device, isa, problem, kv_splits):
    q, k, v, phi, arguments = problem(device)
    compact = [t.contiguous().clone() for t in (q, k, v)]
    # heads that lie side by side are walked together, in other blocks of keys
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in compact]
    laid = compact if k.stride(2) == k.shape[3] and v.stride(2) == v.shape[3] else apart
    for op in (attention, functools.partial(decode, kv_splits=kv_splits)):
        same = op(*laid, phi=phi, **arguments)
        assert_same_bits(op(q, k, v, phi=phi, **arguments), same)


# What the search found.


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1e39], ids=str)
def test_found_rows_without_keys_counted(device, isa, value):
    """A phi that is infinite or NaN in float32 made NaN of hidden scores, and empty rows count."""
    q, k, v = make_qkv(1, 13, 3, 7, 1, 32, device=device)
    mask = make_mask("bool", (13, 3), device=device)
    phi = value if math.isfinite(value) else torch.full((7,), value, device=device)
    check_unified(attention, q, k, v, phi, mask=mask)


def test_found_quotient_rounded_to_infinity(device, isa):
    """One key, V the largest float32, a finite numerator: its quotient was infinite."""
    q = k = torch.zeros(1, 1, 1, 8, device=device)
    v = torch.full_like(q, torch.finfo(torch.float32).max)
    for phi in (2.883, 0.373, 1.213):
        check_unified(attention, q, k, v, phi)
        assert attention(q, k, v, phi=phi).isfinite().all()
