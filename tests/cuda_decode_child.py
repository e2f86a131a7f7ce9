"""Cases of test_cuda_ops.py: decode, its pages, append_kv and merge_states."""

import torch
from cuda_child import DTYPES, FEATURES, INT, SHAPE, case, expect, gpus, launched, on_gpu, put

import flashinfer_lite as fi
from flashinfer_lite.testing import (
    assert_close,
    assert_lse_close,
    assert_same_bits,
    check_forward,
    make_qkv,
)


@case(*((2, feature) for feature in FEATURES), (1, "causal"), (7, "causal"), (7, "int64_lengths"))
def decode(variant):
    kv_splits, feature = variant
    q, k, v = make_qkv(*SHAPE, dtype=torch.bfloat16, layout="padded")
    check_forward(on_gpu(fi.decode, kv_splits=kv_splits), q, k, v, **FEATURES[feature]())
    combine = ["combine_sm80_bfloat16_from_float32"] if kv_splits > 1 else []
    assert launched() == ["decode_sm80_bfloat16_d64_s2", *combine]


@case("float32", "float16")
def decode_that_chooses(dtype):
    q, k, v = make_qkv(1, 1, 333, 4, 1, 64, dtype=DTYPES[dtype])
    check_forward(on_gpu(fi.decode), q, k, v)
    assert len(launched()) == 2, "one sequence leaves multiprocessors idle, unless it is split"


@case()
def decode_batch_invariant():
    q, k, v = make_qkv(2, 1, 1500, 2, 1, 16, dtype=torch.bfloat16)
    ends = torch.tensor([1500, 1100])
    op = on_gpu(fi.decode, batch_invariant=True)
    both, _ = check_forward(op, q, k, v, seqlens_kv=ends)
    assert len(launched()) == 2
    alone = op(q[1:], k[1:, :1100], v[1:, :1100])
    assert_same_bits(both[1:], alone)


@case(*((kv_splits, page_size) for kv_splits in (1, 3) for page_size in (1, 7, 16)))
def decode_paged(variant):
    kv_splits, page_size = variant
    pages = -(-70 // page_size)
    q, _, _ = make_qkv(*SHAPE, dtype=torch.bfloat16)
    table = torch.randperm(2 * pages + 3)[: 2 * pages].view(2, pages).to(INT)
    k, v = (torch.randn(2 * pages + 3, page_size, 2, d).bfloat16() for d in (40, 24))
    arguments = {"seqlens_kv": torch.tensor([70, 23]), "causal": True}
    dense = (fi.reference.gather_pages(x, table) for x in (k, v))
    op = on_gpu(fi.decode, kv_splits=kv_splits, block_table=gpus().put(table, "cuda:0"))
    check_forward(lambda q, _k, _v, **others: op(q, k, v, **others), q, *dense, **arguments)


@case()
def decode_paged_checks_its_pages():
    q, k, v = make_qkv(1, 1, 4, 2, 1, 16)
    table = torch.tensor([[0, 1, 2]])
    k, v = k.view(1, 4, 1, 16), v.view(1, 4, 1, 16)
    arguments = {"seqlens_kv": torch.tensor([5])}
    message = r"block_table: expected pages in \[0, 1\), got 1 at \[0, 1\]"
    expect(message, lambda: on_gpu(fi.decode)(q, k, v, block_table=table, **arguments))


@case()
def decode_paged_without_pages():
    q = torch.randn(2, 1, 2, 16)
    empty = torch.zeros(0, 4, 1, 16)
    arguments = {"block_table": torch.zeros(2, 3, dtype=INT), "return_lse": True}
    out, lse = on_gpu(fi.decode)(q, empty, empty, seqlens_kv=torch.tensor([0, 0]), **arguments)
    assert (out == 0).all() and (lse == -torch.inf).all() and launched() == []


@case("float32", "bfloat16")
def append_kv(dtype):
    """Into pages, rotated; a call that has no room is refused and writes nothing."""
    k, v = torch.randn(2, 2, 3, 2, 40).to(DTYPES[dtype])
    caches = [torch.full((5, 4, 2, 40), torch.nan, dtype=DTYPES[dtype]) for _ in range(2)]
    angles = torch.rand(8, 8)
    arguments = {
        "seqlens_kv": torch.tensor([0, 5], dtype=INT),
        "block_table": torch.tensor([[3, 1], [4, 0]]),
        "rotary_cos": angles.cos(),
        "rotary_sin": angles.sin(),
    }

    def run(**changes):
        on_cpu, put_there = [x.clone() for x in caches], put(*caches)
        given = arguments | changes
        there = {name: put(x)[0] for name, x in given.items()}
        error = None
        try:
            assert fi.append_kv(*put_there, *put(k, v), **there) is None
        except RuntimeError as caught:
            error = str(caught)
        else:
            fi.append_kv(*on_cpu, k, v, **given)
        for x, y in zip(put_there, on_cpu, strict=True):
            torch.testing.assert_close(x.memory, y, equal_nan=True)
        return error

    assert run() is None
    assert launched() == [f"append_kv_sm80_{dtype}"]
    assert run(seqlens_kv=torch.tensor([6, 0])).startswith("seqlens_kv: expected values in")
    assert run(block_table=torch.tensor([[3, 1], [4, 9]])).startswith("block_table: expected pages")


@case(1, 7)
def decode_out(kv_splits):
    q, k, v = make_qkv(*SHAPE)
    (out,) = put(torch.empty(2, 4, 5, 24).transpose(1, 2))
    out.memory.fill_(torch.nan)
    result = fi.decode(*put(q, k, v), kv_splits=kv_splits, out=out, return_lse=True)
    assert result[0] is out
    wanted, lse = fi.attention(q, k, v, return_lse=True)
    assert_close(out.memory, fi.attention(q.double(), k.double(), v.double()), wanted)
    assert_lse_close(result[1].memory, lse)


@case("float32", "bfloat16")
def merge_states(dtype):
    q, k, v = make_qkv(*SHAPE, dtype=DTYPES[dtype])
    parts = ((0, 30), (30, 30), (30, 70))
    states = [fi.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in parts]
    outs, lses = (torch.stack(x) for x in zip(*states, strict=True))
    out, lse = on_gpu(fi.merge_states)(outs, lses)
    exact, exact_lse = fi.merge_states(outs.double(), lses.double())
    assert_close(out, exact, fi.merge_states(outs, lses)[0])
    assert_lse_close(lse, exact_lse)
    assert launched() == [f"combine_sm80_{dtype}_from_{dtype}"]
