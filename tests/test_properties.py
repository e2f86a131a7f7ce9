"""Properties over generated shapes, strides and features: what must hold for any valid call."""

import math

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flashinfer_lite import attention, decode, merge_states, reference
from flashinfer_lite.testing import (
    LAYOUTS,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    check_backward,
    check_forward,
    make_mask,
    make_qkv,
)

# The fixtures (device, isa) stay the same for all examples of a test.
per_level = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def problems(draw, max_seqlen=80, decoding=False):
    """A function of the device that makes (q, k, v, arguments)."""
    heads_kv = draw(st.integers(1, 3))
    shape = {
        "batch_size": draw(st.integers(1, 3)),
        "seqlen_q": draw(st.integers(1, 4 if decoding else max_seqlen)),
        "seqlen_kv": draw(st.integers(1, 4 * max_seqlen if decoding else max_seqlen)),
        "num_heads_q": heads_kv * draw(st.sampled_from([1, 2, 4, 7])),
        "num_heads_kv": heads_kv,
        "head_dim": 8 * draw(st.integers(1, 10)),
        "head_dim_v": 8 * draw(st.integers(1, 10)),
        "dtype": draw(DTYPES),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "logits": draw(st.sampled_from([0.0, 1.0, 1.0, 20.0])),
    }
    batch_size, seqlen_kv = shape["batch_size"], shape["seqlen_kv"]
    side = st.one_of(st.just(-1), st.integers(0, max_seqlen))
    arguments = {
        "causal": draw(st.sampled_from([False, True, "bottom_right", "top_left"])),
        "window": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from([None, None, 0.5, 15.0])),
        "softmax_scale": draw(st.sampled_from([None, None, 0.0, 0.7])),
    }
    ends = starts = None
    if draw(st.booleans()):
        ends = [draw(st.integers(0, seqlen_kv)) for _ in range(batch_size)]
        starts = [draw(st.integers(0, end)) for end in ends] if draw(st.booleans()) else None
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    kind = draw(st.sampled_from([None, None, "bool", "additive", "additive_inf"]))
    mask_dtype = draw(DTYPES)
    full = (batch_size, shape["num_heads_q"], shape["seqlen_q"], seqlen_kv)
    mask_shape = [size if draw(st.booleans()) else 1 for size in full][draw(st.integers(0, 3)) :]
    seed = draw(st.integers(0, 2**31))
    scores = st.sampled_from([-math.inf, -3.0, 0.0, 2.5, 30.0])
    heads = shape["num_heads_q"]
    sink = draw(st.one_of(st.none(), st.lists(scores, min_size=heads, max_size=heads)))
    sink_dtype = draw(DTYPES)
    slope = st.sampled_from([0.0, 2.0**-8, 0.5, -0.1])
    slopes = draw(st.one_of(st.none(), st.lists(slope, min_size=heads, max_size=heads)))

    def make(device):
        assume(device.type == "cpu" or shape["dtype"] != torch.float64)  # refused by name on CUDA
        torch.manual_seed(seed)
        q, k, v = make_qkv(**shape, device=device)
        for name, values in (("seqlens_kv", ends), ("kv_start", starts)):
            if values is not None:
                arguments[name] = torch.tensor(values, dtype=index_dtype, device=device)
        if kind is not None:
            arguments["mask"] = make_mask(kind, mask_shape, dtype=mask_dtype, device=device)
        if sink is not None:
            arguments["sink"] = torch.tensor(sink, dtype=sink_dtype, device=device)
        if slopes is not None:
            arguments["alibi_slopes"] = torch.tensor(slopes, device=device)
        return q, k, v, dict(arguments)

    make.__qualname__ = make.__name__ = (
        f"{shape} {arguments} {ends} {starts} {kind} {mask_shape} {seed} {sink} {slopes}"
    )
    return make


@per_level
@given(problem=problems())
def test_forward_is_the_oracle(device, isa, problem):
    q, k, v, arguments = problem(device)
    check_forward(attention, q, k, v, **arguments)


@per_level
@given(problem=problems(max_seqlen=50))
def test_backward_is_the_oracle(device, isa, problem):
    q, k, v, arguments = problem(device)
    if "mask" in arguments and arguments["mask"].dtype != torch.bool:
        arguments["mask"].requires_grad_()
    if "sink" in arguments:
        arguments["sink"].requires_grad_()
    check_backward(attention, q, k, v, **arguments)


@per_level
@given(
    problem=problems(max_seqlen=150, decoding=True),
    kv_splits=st.integers(0, 9),
    invariant=st.booleans(),
)
def test_decode_is_the_oracle(device, isa, problem, kv_splits, invariant):
    q, k, v, arguments = problem(device)

    def run(*tensors, **kwargs):
        splits = 0 if invariant else kv_splits
        return decode(*tensors, **kwargs, kv_splits=splits, batch_invariant=invariant)

    check_forward(run, q, k, v, **arguments)


@per_level
@given(problem=problems(), cut=st.floats(0, 1))
def test_merging_two_halves_is_the_whole(device, isa, problem, cut):
    q, k, v, arguments = problem(device)
    at = int(cut * k.shape[1])
    end = arguments.pop("seqlens_kv", torch.full((len(q),), k.shape[1], device=device)).long()
    start = arguments.pop("kv_start", torch.zeros_like(end)).long()
    # Alignment is anchored at the end: hide by kv_start and by mask, never by a shorter seqlens_kv.
    slot = torch.arange(k.shape[1], device=device)
    mask = arguments.pop("mask", torch.ones(1, dtype=torch.bool, device=device))
    sink = arguments.pop("sink", None)  # of one half, whichever it is
    hidden = False if mask.dtype == torch.bool else -math.inf
    first = torch.where(slot < at, mask, hidden)
    left = attention(
        q, k, v, **arguments, seqlens_kv=end, kv_start=start, mask=first, sink=sink, return_lse=True
    )
    later = torch.minimum(start.clamp(min=at), end)
    rest = torch.where(slot >= at, mask, hidden)
    right = attention(
        q, k, v, **arguments, seqlens_kv=end, kv_start=later, mask=rest, return_lse=True
    )
    arguments |= {"seqlens_kv": end, "kv_start": start, "mask": mask, "sink": sink}
    out, lse = merge_states(*zip(left, right, strict=True))
    oracle, oracle_lse = reference.attention(
        q, k, v, **arguments, return_lse=True, dtype=torch.double
    )
    assert_lse_close(lse, oracle_lse)
    assert_close(out, oracle, reference.attention(q, k, v, **arguments), terms=v.abs().max().item())


@per_level
@given(problem=problems(), data=st.data())
def test_a_sequence_does_not_see_its_batch_mates(device, isa, problem, data):
    q, k, v, arguments = problem(device)
    b = data.draw(st.integers(0, len(q) - 1))
    one = slice(b, b + 1)
    mine = {}
    for name, x in arguments.items():
        per_batch = name in ("kv_start", "seqlens_kv") or (
            name == "mask" and x.dim() == 4 and len(x) == len(q)
        )
        mine[name] = x[one] if per_batch else x
    together = attention(q, k, v, **arguments, return_lse=True)
    alone = attention(q[one], k[one], v[one], **mine, return_lse=True)
    assert_same_bits(alone[0], together[0][one])
    assert_same_bits(alone[1], together[1][one], "lse")


@per_level
@given(problem=problems())
def test_strides_do_not_change_a_bit(device, isa, problem):
    q, k, v, arguments = problem(device)
    compact = [t.contiguous().clone() for t in (q, k, v)]
    assert_same_bits(attention(q, k, v, **arguments), attention(*compact, **arguments))
    assert_same_bits(decode(q, k, v, **arguments), decode(*compact, **arguments))


@per_level
@given(problem=problems())
def test_what_nobody_sees_does_not_matter(device, isa, problem):
    q, k, v, arguments = problem(device)
    expected = attention(q, k, v, **arguments)
    bounds = {n: arguments.get(n) for n in ("causal", "window", "kv_start", "seqlens_kv")}
    visible = reference.visible_keys(len(q), q.shape[1], k.shape[1], device=device, **bounds)
    mask = arguments.get("mask", torch.ones((), dtype=torch.bool, device=device))
    shown = mask if mask.dtype == torch.bool else mask != -math.inf
    visible = (visible & shown).expand(len(q), q.shape[2], q.shape[1], k.shape[1])
    seen = visible.any(-2).unflatten(1, (k.shape[2], -1)).any(2).mT.unsqueeze(-1)
    dirty = [torch.where(seen, t, math.nan) for t in (k, v)]
    assert_same_bits(attention(q, *dirty, **arguments), expected)
