"""Cases of test_dtensor.py, which every process of a mesh runs with the same inputs."""

import functools
import math

import torch
import torch.distributed as dist
from process_groups import case, raises
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode

from flashinfer_lite import attention, decode, explain, flash_attn_func
from flashinfer_lite import scaled_dot_product_attention as sdpa
from flashinfer_lite.testing import assert_close, assert_same_bits, make_mask, make_qkv

BATCH, HEADS, WHOLE = Shard(0), Shard(2), Replicate()
OPS = {"attention": attention, "decode": decode}


@functools.cache
def mesh(*shape):
    names = ("a", "b")[: len(shape)]
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names or None)


def on_mesh(x, *placements, at=None):
    """x, and a leaf if it is one."""
    if not torch.is_tensor(x):
        return x
    return distribute_tensor(x.detach(), at or mesh(), placements).requires_grad_(x.requires_grad)


def options_for(keys, *, batch_size=4, heads=8, seqlen_q=5):
    lengths = torch.tensor([keys, 0, keys // 2, 7][:batch_size])
    return {
        "plain": {},
        "causal": {"causal": True},
        "lengths": {"seqlens_kv": lengths, "kv_start": lengths // 3, "window": (9, 4)},
        "bool": {"mask": make_mask("bool", (batch_size, heads, seqlen_q, keys))},
        "bool_batch": {"mask": make_mask("bool", (batch_size, 1, 1, keys)), "softcap": 5.0},
        "bias_heads": {"mask": make_mask("additive_inf", (heads, seqlen_q, keys))},
        "bias_row": {"mask": make_mask("additive", (keys,))},
        "sink": {"sink": torch.randn(heads), "causal": True},
        "phi": {"phi": torch.linspace(-5.0, -90.0, heads), "sink": torch.randn(heads).bfloat16()},
        "alibi": {"alibi_slopes": torch.rand(heads), "causal": True},
        "alibi_batch": {"alibi_slopes": torch.rand(batch_size, heads)},
    }


def run(op, tensors, options, grads=None):
    """op's results and, with grads, the gradients of all leaves."""
    out, lse = op(*tensors, **options, return_lse=True)
    if grads is None:
        return [out, lse]
    leaves = [x for x in (*tensors, *options.values()) if torch.is_tensor(x) and x.requires_grad]
    return [out, lse, *torch.autograd.grad((out, lse), leaves, grads)]


def compare(
    op, tensors, options, placements, at=None, optional=None, communicates=False, exact=True
):
    """Run op on the mesh and on one process, forward and, if it trains, backward.

    The bits are the same but of sums over ranks, and where ranks share a group of heads (not
    `exact`): fewer rows then share a tile.
    """
    at = at or mesh()
    train = op is attention
    floating = [x for x in (*tensors, *options.values()) if torch.is_tensor(x)]
    for x in floating:
        if train and x.is_floating_point():
            x.requires_grad_()
    for name in ("phi", "alibi_slopes"):
        if name in options:
            options[name].requires_grad_(False)
    grads = None
    if train:
        out, lse = op(*(t.detach() for t in tensors), return_lse=True)
        grads = torch.randn_like(out), torch.randn_like(lse)
    expected = run(op, tensors, options, grads)
    tensors = [on_mesh(x, *p, at=at) for x, p in zip(tensors, placements, strict=True)]
    optional = optional or {}
    options = {
        name: on_mesh(x, *optional.get(name, [WHOLE] * at.ndim), at=at)
        for name, x in options.items()
    }
    if grads is not None:
        grads = [on_mesh(g, *[WHOLE] * at.ndim, at=at) for g in grads]
    with CommDebugMode() as communication:
        got = run(op, tensors, options, grads)
    counts = communication.get_comm_counts()
    assert communicates or not sum(counts.values()), dict(counts)
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert isinstance(x, DTensor) and x.device_mesh == at
        assert x.shape == y.shape and x.dtype == y.dtype
        full = x.full_tensor()
        if exact and not any(isinstance(p, Partial) for p in x.placements):
            assert_same_bits(full, y.detach(), f"result {i}")
        else:
            terms = y.abs().sum().item() if i > 1 else None
            assert_close(full, y.double(), y, f"result {i}", terms=terms)
    return got


def inputs(heads_kv=2, heads=8, batch_size=4, keys=20):
    return make_qkv(batch_size, 5, keys, heads, heads_kv, 16, 24)


def placed(options, cut):
    """Optional arguments placed as their caller may have them."""
    dims = {
        "mask": {BATCH: -4, HEADS: -3},
        "sink": {HEADS: 0},
        "phi": {HEADS: 0},
        "alibi_slopes": {BATCH: -2, HEADS: -1},
        "kv_start": {BATCH: 0},
        "seqlens_kv": {BATCH: 0},
    }
    found = {}
    for name, x in options.items():
        dim = dims.get(name, {}).get(cut)
        if dim is not None and x.dim() > -1 - dim and x.shape[dim] > 1:
            found[name] = [Shard(dim % x.dim())]
    return found


EVERY = [f"{op}-{name}" for op in OPS for name in options_for(20)]


@case(*EVERY)
def batch(variant):
    op, name = variant.split("-")
    options = options_for(20)[name]
    cut = placed(options, BATCH)
    for optional, communicates in ((cut, False), ({}, bool(cut))):
        got = compare(
            OPS[op], inputs(), options, [[BATCH]] * 3, optional=optional, communicates=communicates
        )
        assert [x.placements for x in got[:2]] == [(Shard(0),), (Shard(0),)]
        assert got[0].to_local().shape[0] == 4 // dist.get_world_size()


@case(*EVERY)
def heads(variant):
    op, name = variant.split("-")
    options = options_for(20)[name]
    cut = placed(options, HEADS)
    for heads_kv in (4, 8):
        for optional, communicates in ((cut, False), ({}, bool(cut))):
            got = compare(
                OPS[op],
                inputs(heads_kv),
                options,
                [[HEADS]] * 3,
                optional=optional,
                communicates=communicates,
            )
            assert [x.placements for x in got[:2]] == [(Shard(2),), (Shard(1),)]
            assert got[0].to_local().shape[2] == 8 // dist.get_world_size()


@case(*EVERY)
def fewer_kv_heads_than_ranks(variant):
    """Ranks that share a group of heads have K and V whole, and read the head they need."""
    op, name = variant.split("-")
    options = options_for(20)[name]
    count = dist.get_world_size()
    for heads_kv in {1, count // 2}:
        got = compare(
            OPS[op],
            inputs(heads_kv),
            options,
            [[HEADS], [WHOLE], [WHOLE]],
            optional=placed(options, HEADS),
            exact=False,
        )
        assert got[0].placements == (Shard(2),)
        if op == "attention":
            assert got[3].placements == got[4].placements == (Partial(),)


@case(*OPS)
def one_sharded_tensor_decides(op):
    """The others are cut where they lie."""
    options = {"causal": True}
    for placements in ([HEADS, WHOLE, WHOLE], [WHOLE, HEADS, WHOLE], [WHOLE, WHOLE, HEADS]):
        placements = [[p] for p in placements]
        got = compare(OPS[op], inputs(4), options, placements, communicates=op == "attention")
        assert got[0].placements == (Shard(2),)
        batches = [[BATCH if p == [HEADS] else WHOLE] for p in placements]
        got = compare(OPS[op], inputs(4), options, batches, communicates=op == "attention")
        assert got[0].placements == (Shard(0),)
    got = compare(OPS[op], inputs(), options, [[WHOLE]] * 3)
    assert got[0].placements == got[1].placements == (WHOLE,)


@case(*OPS)
def what_cannot_be_cut_is_made_whole(op):
    """Along the sequence, along head_dim, or heads that do not divide."""
    options = {"causal": True, "window": (7, -1)}
    for dim in (1, 3):
        got = compare(OPS[op], inputs(), options, [[Shard(dim)]] * 3, communicates=True)
        assert got[0].placements == (WHOLE,)
    for heads, heads_kv in ((6, 2), (9, 3), (3, 1)):
        if heads % dist.get_world_size():
            tensors = inputs(heads_kv, heads)
            got = compare(OPS[op], tensors, options, [[HEADS]] * 3, communicates=True)
            assert got[0].placements == (WHOLE,)
    # A rank would read parts of two groups.
    if dist.get_world_size() == 4:
        got = compare(OPS[op], inputs(6, 12), options, [[HEADS]] * 3, communicates=True)
        assert got[0].placements == (WHOLE,)
    got = compare(OPS[op], inputs(4), options, [[Shard(1)], [HEADS], [BATCH]], communicates=True)
    assert got[0].placements == (Shard(2),)


@case(*OPS)
def partial_sums_are_summed(op):
    tensors = inputs()
    count = dist.get_world_size()
    share = DTensor.from_local(tensors[0] / count, mesh(), [Partial()])
    others = [on_mesh(x, WHOLE) for x in tensors[1:]]
    assert_same_bits(OPS[op](share, *others).full_tensor(), OPS[op](*tensors))


@case(*OPS)
def uneven_batches(op):
    """Some ranks have fewer sequences, or none."""
    for batch_size in (1, 3):
        options = options_for(20, batch_size=batch_size)
        for name in ("plain", "lengths", "bool", "bias_heads", "sink"):
            chosen = options[name]
            tensors = inputs(batch_size=batch_size)
            got = compare(OPS[op], tensors, chosen, [[BATCH]] * 3, optional=placed(chosen, BATCH))
            assert got[0].placements == (Shard(0),)


@case(*OPS)
def two_dimensions(op):
    """Batch by one and heads by the other; heads by both, where they share groups or not."""
    half = dist.get_world_size() // 2
    at = mesh(half, 2)
    options = {"causal": True, "sink": torch.randn(8)}
    for heads_kv in (1, 2, 4):
        kv = [BATCH, HEADS if heads_kv > 1 else WHOLE]
        got = compare(
            OPS[op],
            inputs(heads_kv),
            options,
            [[BATCH, HEADS], kv, kv],
            at,
            {"sink": [WHOLE, Shard(0)]},
            exact=heads_kv > 1,
        )
        assert got[0].placements == (Shard(0), Shard(2))
        kv = [HEADS if heads_kv % half == 0 else WHOLE, WHOLE]
        if heads_kv % (2 * half) == 0:
            kv = [HEADS, HEADS]
        got = compare(
            OPS[op],
            inputs(heads_kv),
            options,
            [[HEADS, HEADS], kv, kv],
            at,
            {"sink": [Shard(0), Shard(0)]},
            exact=heads_kv % (2 * half) == 0,
        )
        assert got[0].placements == (Shard(2), Shard(2))


@case(*OPS)
def a_dimension_of_one(op):
    """It divides the KV heads, which another dimension did not."""
    at = mesh(dist.get_world_size(), 1)
    kv = [WHOLE, HEADS]
    tensors = inputs(dist.get_world_size() // 2)
    got = compare(
        OPS[op], tensors, {}, [[HEADS, HEADS], kv, kv], at, communicates=True, exact=False
    )
    assert got[0].placements == (Shard(2), Shard(2))


@case()
def a_cache_in_pages():
    """Pages are any sequence's: batches cut the table, heads the pages."""
    q, k, v = make_qkv(4, 5, 20, 8, 4, 16, 24)
    pages = [x.unflatten(1, (4, 5)).flatten(0, 1) for x in (k, v)]
    table = torch.arange(16).view(4, 4)
    lengths = torch.tensor([20, 0, 10, 7])
    expected = decode(q, *pages, block_table=table, seqlens_kv=lengths, causal=True)
    assert_same_bits(expected, decode(q, k, v, seqlens_kv=lengths, causal=True))
    for cut, rows, kv in ((BATCH, BATCH, WHOLE), (HEADS, WHOLE, HEADS), (WHOLE, WHOLE, BATCH)):
        got = decode(
            on_mesh(q, cut),
            *(on_mesh(x, kv) for x in pages),
            block_table=on_mesh(table, rows),
            seqlens_kv=on_mesh(lengths, rows),
            causal=True,
        )
        assert got.placements == (cut,)
        assert_same_bits(got.full_tensor(), expected)
    with raises(TypeError, "^block_table: expected a DTensor, as others are"):
        decode(on_mesh(q, WHOLE), *(on_mesh(x, WHOLE) for x in pages), block_table=table)


@case()
def faces():
    q, k, v = inputs(8, keys=5)
    got = flash_attn_func(*(on_mesh(x, HEADS) for x in (q, k, v)), causal=True)
    assert got.placements == (Shard(2),)
    assert_same_bits(got.full_tensor(), flash_attn_func(q, k, v, causal=True))
    tensors = [x.transpose(1, 2) for x in (q, k, v)]
    got = sdpa(*(on_mesh(x, HEADS).transpose(1, 2) for x in (q, k, v)), is_causal=True)
    assert got.placements == (Shard(1),)
    assert_same_bits(got.full_tensor(), sdpa(*tensors, is_causal=True))


@case()
def out_of_decode():
    q, k, v = inputs()
    expected = decode(q, k, v)
    for placement in (BATCH, WHOLE):
        out = on_mesh(torch.full_like(expected, math.nan), placement)
        assert decode(*(on_mesh(x, BATCH) for x in (q, k, v)), out=out) is out
        assert out.placements == (placement,)
        assert_same_bits(out.full_tensor(), expected)
    with raises(TypeError, "^out: expected a DTensor, as q is one, got a torch.Tensor"):
        decode(*(on_mesh(x, BATCH) for x in (q, k, v)), out=torch.empty_like(expected))
    with raises(TypeError, "^out: expected a torch.Tensor, as q is one, got a DTensor"):
        decode(q, k, v, out=out)


@case()
def impl_and_autocast():
    q, k, v = inputs()
    tensors = [on_mesh(x, BATCH) for x in (q, k, v)]
    for op in OPS.values():
        expected = op(q, k, v, impl="reference")
        assert_close(op(*tensors, impl="reference").full_tensor(), expected.double(), expected)
        with torch.autocast("cpu", torch.bfloat16):
            got = op(*tensors)
            assert got.dtype == torch.bfloat16
            assert_same_bits(got.full_tensor(), op(q, k, v))


@case()
def refusals():
    q, k, v = inputs()
    tensors = [on_mesh(x, BATCH) for x in (q, k, v)]
    more = {
        "mask": torch.ones(20).bool(),
        "sink": torch.ones(8),
        "alibi_slopes": torch.ones(8),
        "kv_start": torch.zeros(4).int(),
        "seqlens_kv": torch.ones(4).int(),
        "phi": torch.zeros(8),
    }
    for op in OPS.values():
        names = ("q", "k", "v") if op is attention else ("q", "k_cache", "v_cache")
        for i, name in enumerate(names):
            mixed = list(tensors)
            mixed[i] = (q, k, v)[i]
            with raises(TypeError, f"^{name}: expected a DTensor, as others are, got a torch.Te"):
                op(*mixed)
        for name, x in more.items():
            op(*tensors, **{name: on_mesh(x, WHOLE)})
            with raises(TypeError, f"^{name}: expected a DTensor, as others are, got a torch.Te"):
                op(*tensors, **{name: x})
        with raises(TypeError, "^q: expected a DTensor, as others are"):
            op(q, k, v, mask=on_mesh(more["mask"], WHOLE))
        other = on_mesh(k, WHOLE, WHOLE, at=mesh(dist.get_world_size() // 2, 2))
        with raises(ValueError, f"^{names[1]}: expected the others' mesh .*got "):
            op(tensors[0], other, tensors[2])
        with raises(ValueError, rf"^{names[1]}: expected shape \[4, 20, 2, 16\] to fit q"):
            op(tensors[0], on_mesh(k[:3], WHOLE), tensors[2])
        with raises(TypeError, "^q: expected a torch.Tensor to explain, got a DTensor"):
            explain(op, *tensors)
    with raises(ValueError, "^process_group: expected None with DTensors, got one"):
        decode(*tensors, process_group=dist.group.WORLD)


@case()
def a_process_outside_of_the_mesh():
    at = init_device_mesh("cpu", (dist.get_world_size() - 1,))
    whole = inputs()
    tensors = [on_mesh(x, WHOLE, at=at) for x in whole]
    if at.get_coordinate() is not None:
        assert_same_bits(attention(*tensors).to_local(), attention(*whole))
        return
    with raises(RuntimeError, "^q: expected a mesh that this process belongs to"):
        attention(*tensors)


@case()
def compiled():
    leaves = [on_mesh(x, HEADS).requires_grad_() for x in inputs(4)]

    def forward(q, k, v):
        return attention(q, k, v, causal=True)

    def run(forward):
        out = forward(*leaves)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    step = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for x, y in zip(run(step), run(forward), strict=True):
        assert x.placements == (Shard(2),)
        assert_same_bits(x.to_local(), y.to_local())
