"""scaled_dot_product_attention: torch's meaning, torch's shapes, and a swap that undoes itself."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from flashinfer_lite import reference, scaled_dot_product_attention
from flashinfer_lite.sdpa import swapped
from flashinfer_lite.testing import assert_close, assert_same_bits, make_mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
TORCH = F.scaled_dot_product_attention


def check_sdpa(query, key, value, attn_mask=None, **arguments):
    """Against torch in float64, with torch in the same dtype as the eager one."""
    out = scaled_dot_product_attention(query, key, value, attn_mask, **arguments)
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    mask = attn_mask.double() if additive else attn_mask
    oracle = TORCH(query.double(), key.double(), value.double(), mask, **arguments)
    mask = attn_mask.to(query.dtype) if additive else attn_mask
    eager = TORCH(query, key, value, mask, **arguments)
    assert out.dtype == query.dtype
    slack = value.detach().abs().max().item() if value.numel() else 0.0
    assert_close(out, oracle, eager, terms=slack)
    return out


def bhsd(device, dtype=torch.float32, heads=(4, 4), seqlens=(9, 13), dims=(40, 40), lead=(2,)):
    query = torch.randn(*lead, heads[0], seqlens[0], dims[0], device=device).to(dtype)
    key = (torch.randn(*lead, heads[1], seqlens[1], dims[0], device=device) + 0.5).to(dtype)
    value = (torch.randn(*lead, heads[1], seqlens[1], dims[1], device=device) + 0.5).to(dtype)
    return query, key, value


def test_signature_is_torchs(device):
    assert list(inspect.signature(scaled_dot_product_attention).parameters) == [
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
    ]


@all_dtypes
@pytest.mark.parametrize("seqlens", [(1, 5), (2, 5), (5, 2), (4, 9), (3, 3), (70, 65)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_causal_is_top_left(device, isa, dtype, seqlens, is_causal):
    check_sdpa(*bhsd(device, dtype, seqlens=seqlens), is_causal=is_causal)
    check_sdpa(*bhsd(device, dtype, seqlens=seqlens), is_causal=is_causal, scale=0.3)


@all_dtypes
@pytest.mark.parametrize("kind", ["bool", "additive", "additive_inf"])
@pytest.mark.parametrize(
    "shape", [(9, 13), (1, 13), (4, 9, 13), (4, 1, 13), (2, 1, 1, 13), (2, 4, 9, 13)], ids=str
)
def test_mask(device, isa, dtype, kind, shape):
    mask = make_mask(kind, shape, dtype=dtype, device=device)
    check_sdpa(*bhsd(device, dtype), mask)


def test_mask_over_keys_alone_and_of_another_dtype(device, isa):
    query, key, value = bhsd(device)
    row = make_mask("additive_inf", (13,), dtype=torch.float64, device=device)
    expected = scaled_dot_product_attention(query, key, value, row.float().expand(9, 13))
    assert_same_bits(scaled_dot_product_attention(query, key, value, row.float()), expected)
    half = make_mask("additive", (9, 13), dtype=torch.bfloat16, device=device)
    expected = scaled_dot_product_attention(query, key, value, half.float())
    assert_same_bits(scaled_dot_product_attention(query, key, value, half), expected)


@all_dtypes
@pytest.mark.parametrize("lead", [None, (), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_number_of_dimensions(device, isa, dtype, lead):
    query, key, value = bhsd(device, dtype, dims=(40, 24), lead=lead or ())
    if lead is None:  # one head of one sequence
        query, key, value = query[0], key[0], value[0]
    for mask in (None, torch.ones(9, 13, device=device).tril(2).bool()):
        out = check_sdpa(query, key, value, mask)
        assert out.shape == (*query.shape[:-1], 24)
    check_sdpa(query, key, value, is_causal=True)


def test_mask_with_every_leading_dimension(device, isa):
    query, key, value = bhsd(device, lead=(2, 3))
    for shape in [(2, 3, 4, 9, 13), (1, 1, 1, 9, 13), (2, 3, 1, 1, 13), (1, 4, 9, 13)]:
        check_sdpa(query, key, value, make_mask("bool", shape, device=device))
    three = bhsd(device, lead=())
    check_sdpa(*three, make_mask("bool", (4, 9, 13), device=device))
    # Broadcast over the first but not over the second of two: no view has that as one dimension.
    with pytest.raises(ValueError, match=r"^attn_mask: .*without a copy"):
        mask = make_mask("bool", (3, 4, 9, 13), device=device)
        scaled_dot_product_attention(query, key, value, mask)


@all_dtypes
def test_broadcast_of_batch_and_heads(device, isa, dtype):
    query, key, value = bhsd(device, dtype)
    check_sdpa(query, key[:1], value[:1])
    check_sdpa(query, key[:, :1], value[:, :1], is_causal=True)
    check_sdpa(query, key[:1, :1], value[:1, :1])


@all_dtypes
@pytest.mark.parametrize("heads", [(8, 2), (6, 3), (5, 1), (4, 4)], ids=str)
def test_enable_gqa(device, isa, dtype, heads):
    check_sdpa(*bhsd(device, dtype, heads=heads), enable_gqa=True, is_causal=True)
    query, key, value = bhsd(device, dtype, heads=heads, lead=())
    check_sdpa(query, key, value, enable_gqa=True)


@all_dtypes
def test_memory_layouts(device, isa, dtype):
    query, key, value = bhsd(device, dtype)
    bshd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    assert_same_bits(scaled_dot_product_attention(*bshd), check_sdpa(query, key, value))
    expanded = key[:, :1].expand_as(key), value[:, :1].expand_as(value)
    check_sdpa(query, *expanded)


def test_rows_without_keys_are_zero(device, isa):
    query, key, value = bhsd(device)
    mask = torch.ones(9, 13, dtype=torch.bool, device=device)
    mask[4] = False
    out = scaled_dot_product_attention(query, key, value, mask)
    assert not out[:, :, 4].any()


def test_rows_without_keys_have_no_gradient(device, isa):
    query, key, value = (t.requires_grad_() for t in bhsd(device))
    mask = torch.ones(9, 13, dtype=torch.bool, device=device)
    mask[4] = False
    out = scaled_dot_product_attention(query, key, value, mask)
    dquery, *_ = torch.autograd.grad(out.sum(), (query, key, value))
    assert not dquery[:, :, 4].any() and dquery.isfinite().all()


@pytest.mark.parametrize("empty", ["lead", "seqlen_q", "seqlen_kv"])
def test_zero_size_dimensions(device, isa, empty):
    query, key, value = bhsd(
        device,
        lead=(0 if empty == "lead" else 2,),
        seqlens=(0 if empty == "seqlen_q" else 9, 0 if empty == "seqlen_kv" else 13),
    )
    expected = TORCH(query, key, value)
    got = scaled_dot_product_attention(query, key, value)
    assert got.shape == expected.shape and not got.any()


@pytest.mark.cpu_only("computed in float64, which CUDA kernels refuse by name")
def test_gradients(device, isa):
    tensors = [t.double().requires_grad_() for t in bhsd(device, heads=(4, 2), dims=(16, 24))]
    mask = make_mask("additive", (4, 1, 13), dtype=torch.float64, device=device).requires_grad_()
    leaves = *tensors, mask
    weights = torch.randn(2, 4, 9, 24, dtype=torch.float64, device=device)

    def gradients(sdpa):
        out = sdpa(*tensors, attn_mask=mask, enable_gqa=True)
        return torch.autograd.grad((out * weights).sum(), leaves)

    theirs, ours = gradients(TORCH), gradients(scaled_dot_product_attention)
    for name, x, ref in zip(("dq", "dk", "dv", "dmask"), ours, theirs, strict=True):
        assert_close(x, ref, ref, name, gradient=True)


def test_agrees_with_the_oracle(device, isa):
    query, key, value = bhsd(device, heads=(4, 2))
    out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    swap = [t.transpose(1, 2) for t in (query, key, value)]
    oracle = reference.attention(*swap, causal="top_left", dtype=torch.float64)
    assert_close(
        out, oracle.transpose(1, 2), reference.attention(*swap, causal="top_left").transpose(1, 2)
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"attn_mask": torch.ones(9, 13).bool(), "is_causal": True}, ValueError, "^attn_mask: "),
        ({"dropout_p": 0.5}, NotImplementedError, "dropout_p"),
        ({"attn_mask": torch.ones(9, 12).bool()}, ValueError, r"^attn_mask: .*\[9, 12\]"),
        ({"attn_mask": torch.ones(1, 2, 4, 9, 13).bool()}, ValueError, "^attn_mask: "),
        ({"attn_mask": torch.ones(9, 13).int()}, TypeError, "^attn_mask: .*int32"),
        ({"attn_mask": [[True]]}, TypeError, "^attn_mask: .*list"),
        ({"key": torch.zeros(2, 4, 13, 24)}, ValueError, "^key: .*40, got 24"),
        ({"key": torch.zeros(2, 4, 12, 40)}, ValueError, "^value: .*12, got 13"),
        ({"key": torch.zeros(2, 2, 13, 40)}, ValueError, "^value: .*2 heads, got 4"),
        (
            {"key": torch.zeros(2, 2, 13, 40), "value": torch.zeros(2, 2, 13, 40)},
            ValueError,
            "^key: .*4 heads .*enable_gqa.*got 2",
        ),
        (
            {
                "key": torch.zeros(2, 3, 13, 40),
                "value": torch.zeros(2, 3, 13, 40),
                "enable_gqa": True,
            },
            ValueError,
            "^key: .*divisor of query's 4 heads, got 3",
        ),
        ({"key": torch.zeros(3, 4, 13, 40)}, ValueError, "^key: .*leading"),
        ({"key": torch.zeros(4, 13, 40)}, ValueError, "^key: .*4 dimensions"),
        ({"query": torch.zeros(40)}, ValueError, "^query: .*at least 2 dimensions, got"),
        ({"query": None}, TypeError, "^query: .*NoneType"),
        ({"key": torch.zeros(2, 4, 13, 40).half()}, TypeError, "^key: .*float16"),
        ({"value": torch.zeros(2, 4, 40, 13).mT}, ValueError, "^value: .*stride"),
        ({"value": torch.zeros(2, 4, 13, 20)}, ValueError, "^value: .*20"),
        ({"query": torch.zeros(2, 4, 9, 40).to_sparse()}, TypeError, "^query: .*sparse"),
        ({"scale": float("nan")}, ValueError, "scale: "),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_refuses(device, change, error, message):
    arguments = dict(zip(("query", "key", "value"), bhsd(device), strict=True))
    arguments |= {n: x.to(device) if torch.is_tensor(x) else x for n, x in change.items()}
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**arguments)


def test_swapped(device):
    query, key, value = bhsd(device)
    expected = scaled_dot_product_attention(query, key, value)
    with swapped():
        assert F.scaled_dot_product_attention is scaled_dot_product_attention
        assert_same_bits(F.scaled_dot_product_attention(query, key, value), expected)
        with swapped():
            pass
        assert F.scaled_dot_product_attention is scaled_dot_product_attention
    assert F.scaled_dot_product_attention is TORCH
    with pytest.raises(ZeroDivisionError), swapped():
        _ = 1 / 0
    assert F.scaled_dot_product_attention is TORCH


def test_swapped_reaches_torchs_own_modules(device):
    layer = torch.nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    layer, x = layer.to(device).train(), torch.randn(2, 7, 64, device=device)
    expected = layer(x)
    with swapped():
        got = layer(x)
    assert_close(got, expected.double(), expected, terms=1.0)
    with swapped(), pytest.raises(NotImplementedError, match="dropout_p"):
        torch.nn.MultiheadAttention(64, 4, dropout=0.1).to(device)(x, x, x, need_weights=False)
