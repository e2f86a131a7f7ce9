"""Cases of test_cuda_ops.py: attention and attention_varlen, and their gradients."""

import functools

import torch
from cuda_child import DTYPES, FEATURES, SHAPE, case, expect, gpus, launched, on_gpu, put

import flashinfer_lite as fi
from flashinfer_lite.testing import check_backward, check_forward, make_mask, make_qkv, make_varlen

RAGGED = ([0, 37, 1, 3], [4, 53, 70, 0])


@case(*((dtype, feature) for dtype in ("float32", "bfloat16") for feature in FEATURES))
def attention(variant):
    dtype, feature = variant
    q, k, v = make_qkv(*SHAPE, dtype=DTYPES[dtype], layout="bhsd")
    check_forward(on_gpu(fi.attention, impl="sm80"), q, k, v, **FEATURES[feature]())
    assert launched() == [f"attention_fwd_sm80_{dtype}_d64"]


class OnGpu(torch.autograd.Function):
    """An op on a GPU. Autograd's engine wants a real one, so the node's own formula is called
    here."""

    @staticmethod
    def forward(ctx, op, bound, arguments, *tensors):
        ctx.set_materialize_grads(False)
        ctx.shapes = [None if x is None else x.shape for x in tensors]
        copies = [None if x is None else put(x.detach())[0] for x in tensors]
        for copy, x in zip(copies, tensors, strict=True):
            if x is not None and x.dtype.is_floating_point:
                copy.requires_grad_(x.requires_grad)
        rest = {name: put(x)[0] if torch.is_tensor(x) else x for name, x in arguments.items()}
        q, k, v, mask = copies
        with torch.enable_grad():
            out, lse = op(q, k, v, mask=mask, return_lse=True, **rest, **bound)
        ctx.node = out.grad_fn
        assert lse.grad_fn is ctx.node
        return out.detach().memory, lse.detach().memory

    @staticmethod
    def backward(ctx, *gradients):
        gradients = [None if x is None else put(x)[0] for x in gradients]
        found = ctx.node.apply(*gradients)[:4]
        # That of a mask has four dimensions here.
        found = (None if x is None else x.memory for x in found)
        shapes = (
            None if x is None else x.reshape(shape)
            for x, shape in zip(found, ctx.shapes, strict=True)
        )
        return None, None, None, *shapes


def trained(of=fi.attention, **bound):
    """An op on a GPU, with gradients."""

    def op(q, k, v, *, mask=None, return_lse=True, **arguments):
        return OnGpu.apply(of, bound, arguments, q, k, v, mask)

    return op


@case(*((dtype, feature) for dtype in ("float32", "bfloat16") for feature in FEATURES))
def gradients(variant):
    dtype, feature = variant
    q, k, v = make_qkv(*SHAPE, dtype=DTYPES[dtype], layout="bhsd")
    check_backward(trained(), q, k, v, **FEATURES[feature]())
    name = f"attention_bwd_sm80_{dtype}_d64" + ("_s2" if dtype == "bfloat16" else "")
    assert launched() == [name] * 3, "rows, keys, finish"


@case(False, True)
def gradient_of_a_mask(deterministic):
    q, k, v = make_qkv(*SHAPE, dtype=torch.bfloat16)
    op = trained(deterministic=deterministic)
    for shape in ((2, 4, 5, 70), (4, 1, 70), (70,)):
        mask = make_mask("additive", shape).requires_grad_()
        check_backward(op, q, k, v, mask=mask, softcap=3.0)
        assert len(launched()) == 4


@case("float32", "bfloat16")
def attention_varlen(dtype):
    q, k, v, offsets = make_varlen(*RAGGED, dtype=DTYPES[dtype], tails=(2, 1))
    lengths = {"kv_start": torch.tensor([1, 9, 0, 0]), "seqlens_kv": torch.tensor([4, 50, 70, 0])}
    op = on_gpu(fi.attention_varlen)
    for arguments in ({"causal": True}, lengths, {"window": (9, 0)}):
        check_forward(op, q, k, v, **offsets, **arguments)
        assert launched()[0] == f"attention_fwd_sm80_{dtype}_d64"
    check_forward(functools.partial(op, phi=0.5), q, k, v, **offsets)


@case(False, True)
def gradients_of_a_ragged_batch(deterministic):
    q, k, v, offsets = make_varlen(*RAGGED, dtype=torch.bfloat16)
    op = trained(fi.attention_varlen, deterministic=deterministic)
    check_backward(op, q, k, v, **offsets, causal=True)
    assert launched() == ["attention_bwd_sm80_bfloat16_d64_s2"] * 3


@case()
def a_ragged_batch_without_rows_or_keys():
    for lengths in (([0, 0], [3, 4]), ([3, 4], [0, 0])):
        q, k, v, offsets = make_varlen(*lengths)
        check_forward(on_gpu(fi.attention_varlen), q, k, v, **offsets)
        check_backward(trained(fi.attention_varlen), q, k, v, **offsets)
        assert launched() == []


@case()
def values_of_offsets_are_checked():
    q, k, v, offsets = make_varlen([3, 0, 2], [4, 1, 2], head_dim=16)
    for name, bad, message in (
        (
            "cu_seqlens_q",
            [0, 3, 2, 5],
            "cu_seqlens_q: expected ascending values, got 2 at 2 after 3",
        ),
        ("cu_seqlens_kv", [0, 3, 3, 8], r"cu_seqlens_kv: expected values in \[0, 7\], got 8 at 3"),
        ("max_seqlen_q", 2, "max_seqlen_q: expected at least 3, the length of sequence 0, got 2"),
        ("seqlens_kv", [4, 2, 2], r"seqlens_kv: expected values in \[0, 1\], got 2 at batch 1"),
        ("kv_start", [4, 0, 3], r"kv_start: expected values in \[0, seqlens_kv = 2\], got 3 at .*"),
    ):
        value = torch.tensor(bad) if isinstance(bad, list) else bad
        call = {**offsets, name: value}
        expect(message, lambda call=call: on_gpu(fi.attention_varlen)(q, k, v, **call))


@case()
def pages_of_a_ragged_batch():
    q, k, v, offsets = make_varlen([3, 0, 9], [70, 5, 33], 4, 2, 16, tails=(2, 0))
    table = torch.randperm(6).view(3, 2)
    pools = [torch.full((6, 40, *x.shape[1:]), torch.nan) for x in (k, v)]
    offsets["cu_seqlens_kv"] -= 2
    for b, (first, end) in enumerate(offsets["cu_seqlens_kv"].unfold(0, 2, 1).tolist()):
        for x, pool in zip((k[2:], v[2:]), pools, strict=True):
            for j, slot in enumerate(x[first:end]):
                pool[table[b, j // 40], j % 40] = slot
    table[1, 1] = 2**40  # no key is there
    for lengths in (
        {},
        {"seqlens_kv": torch.tensor([60, 5, 0]), "kv_start": torch.tensor([7, 0, 0])},
    ):
        check_forward(
            lambda q, k, v, **given: on_gpu(fi.attention_varlen)(
                q, *pools, **given, block_table=table
            ),
            *(q, k[2:], v[2:]),
            **offsets,
            **lengths,
            causal=True,
        )


@case()
def values_of_pages_are_checked():
    q, k, v, offsets = make_varlen([3, 2], [4, 5], head_dim=16)
    pools = torch.randn(4, 4, *k.shape[1:]), torch.randn(4, 4, *v.shape[1:])
    table = torch.tensor([[0, 9], [1, 4]])
    call = functools.partial(on_gpu(fi.attention_varlen), q, *pools, **offsets)
    message = r"block_table: expected pages in \[0, 4\), got 4 at \[1, 1\]"
    expect(message, functools.partial(call, block_table=table))
    message = "cu_seqlens_kv: expected at most 4 keys in each sequence, as many as its pages .* 1"
    expect(message, functools.partial(call, block_table=table[:, :1]))


@case()
def gradients_are_the_same_every_time_if_asked_for():
    q, k, v = make_qkv(*SHAPE, dtype=torch.bfloat16)
    check_backward(trained(deterministic=True), q, k, v, causal=True)
    assert "aten::new_zeros" not in gpus().asked
    torch.use_deterministic_algorithms(True)
    try:
        check_backward(trained(), q, k, v, causal=True)
    finally:
        torch.use_deterministic_algorithms(False)


@case()
def gradients_without_keys_or_queries():
    q, k, v = make_qkv(*SHAPE)
    check_backward(trained(), q, k[:, :0], v[:, :0])
    assert launched() == []
    check_backward(trained(), q[:, :0], k, v)
    assert launched() == []


@case("float32", "float16")
def attention_of_wide_heads(dtype):
    q, k, v = make_qkv(1, 3, 40, 2, 1, 136, 200, dtype=DTYPES[dtype])
    check_forward(on_gpu(fi.attention), q, k, v, causal=True)
    assert launched()[0].startswith(f"attention_fwd_sm80_{dtype}_d256")
