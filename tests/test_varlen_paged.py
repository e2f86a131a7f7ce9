"""attention_varlen() of keys in pages: the same bits as of the dense keys that the pages hold."""

import functools
import itertools

import pytest
import torch
from test_varlen import BATCH, FEATURES, all_dtypes, every_feature, on

from flashinfer_lite import attention_varlen, decode, explain, flash_attn_varlen_func
from flashinfer_lite.testing import assert_same_bits, check_forward, make_varlen

PAGE_SIZES = [1, 3, 16, 256]
SPARE_PAGES = 2  # that no table names
GARBAGE = (-1, 2**31 - 1, -(2**31))
OP = torch.ops.flashinfer_lite.attention_varlen_fwd.default


class Pages:
    """The keys of a ragged batch in scattered pages. Slots that are not in use hold `unused`, and
    entries of the table behind the last page of a sequence name no page."""

    def __init__(self, k, v, cu_seqlens_kv, page_size, *, unused=torch.nan, spare_entries=1):
        starts = cu_seqlens_kv.tolist()
        counts = [-(-(end - begin) // page_size) for begin, end in itertools.pairwise(starts)]
        num_pages = sum(counts) + SPARE_PAGES
        order = iter(torch.randperm(num_pages).tolist())
        width = max(counts, default=0) + spare_entries
        garbage = itertools.cycle(GARBAGE)
        table = [
            [next(order) for _ in range(n)] + [next(garbage) for _ in range(width - n)]
            for n in counts
        ]
        self.table = torch.tensor(table, dtype=torch.int32, device=k.device).view(
            len(counts), width
        )
        self.k, self.v = (x.new_full((num_pages, page_size, *x.shape[1:]), unused) for x in (k, v))
        for b, n in enumerate(counts):
            for i in range(n):
                first = starts[b] + i * page_size
                rows = slice(first, min(first + page_size, starts[b + 1]))
                for pool, x in ((self.k, k), (self.v, v)):
                    pool[table[b][i], : rows.stop - rows.start] = x[rows]

    def op(self, q, k, v, *args, **arguments):
        """attention_varlen of the pages; k and v, the dense keys, are for the oracle."""
        return attention_varlen(q, self.k, self.v, *args, block_table=self.table, **arguments)


def assert_same_as_dense(q, k, v, offsets, page_size, **arguments):
    """Against the oracle, and bit for bit against the dense keys."""
    pages = Pages(k, v, offsets["cu_seqlens_kv"], page_size)
    forced = {"phi": arguments.pop("phi")} if "phi" in arguments else {}
    op = functools.partial(pages.op, **forced)
    got = check_forward(op, q, k, v, **offsets, **arguments)
    wanted = attention_varlen(q, k, v, **offsets, **forced, **arguments, return_lse=True)
    assert_same_bits(got[0], wanted[0])
    assert_same_bits(got[1], wanted[1], "lse")


@all_dtypes
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_page_size(device, isa, dtype, page_size):
    q, k, v, offsets = make_varlen(*BATCH, dtype=dtype, device=device, head_dim_v=40)
    assert_same_as_dense(q, k, v, offsets, page_size, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_feature
def test_feature(device, isa, dtype, feature):
    q, k, v, offsets = make_varlen(*BATCH, dtype=dtype, device=device)
    for page_size in (3, 16):
        assert_same_as_dense(q, k, v, offsets, page_size, **on(device, FEATURES[feature]))


@pytest.mark.parametrize("phi", [-5.0, 99.0])  # no and every row is computed again
def test_unified_maximum(device, isa, phi):
    q, k, v, offsets = make_varlen(*BATCH, dtype=torch.bfloat16, device=device)
    assert_same_as_dense(q, k, v, offsets, 16, phi=phi, causal=True)


@pytest.mark.cpu_only("CUDA's decode and attention are two kernels, each with its own tiles")
@all_dtypes
def test_bits_are_those_of_decode(device, isa, dtype, threads):
    q, k, v, offsets = make_varlen([1, 30, 5], [300, 129, 700], dtype=dtype, device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    for count in (1, 3):
        threads(count)
        out, lse = pages.op(q, None, None, **offsets, causal=True, return_lse=True)
        at = 0
        for b, (rows, keys) in enumerate(((1, 300), (30, 129), (5, 700))):
            seen = slice(at, at + rows)
            used = torch.tensor([keys], device=device)
            part, part_lse = decode(
                *(q[None, seen], pages.k, pages.v),
                seqlens_kv=used,
                block_table=pages.table[b : b + 1],
                causal=True,
                kv_splits=1,
                return_lse=True,
            )
            assert_same_bits(out[seen], part[0])
            assert_same_bits(lse[:, seen], part_lse[0], "lse")
            at += rows


def test_tails_and_offsets_that_begin_anywhere(device, isa):
    q, k, v, offsets = make_varlen(*BATCH, device=device, tails=(3, 2))
    assert_same_as_dense(q, k, v, offsets, 16, causal=True)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    wanted = pages.op(q, None, None, **offsets)
    for first in (10**6, 2**31 - 200):  # of keys in pages only the lengths count
        moved = offsets | {"cu_seqlens_kv": offsets["cu_seqlens_kv"] + first}
        assert_same_bits(pages.op(q, None, None, **moved), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_seen_may_hold_anything(device, isa, dtype, bad):
    lengths_q, lengths_kv = [3, 40, 0, 2], [60, 90, 30, 0]
    q, k, v, offsets = make_varlen(lengths_q, lengths_kv, dtype=dtype, device=device)
    ends = torch.tensor([33, 90, 30, 0], device=device)
    starts = torch.tensor([17, 0, 0, 0], device=device)
    arguments = {**offsets, "seqlens_kv": ends, "kv_start": starts, "return_lse": True}
    wanted = attention_varlen(q, k, v, **arguments)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16, unused=bad)
    first = pages.table[0].tolist()
    for pool in (pages.k, pages.v):
        pool[first[1], 0] = bad  # slot 16
        pool[first[2], 1:] = bad  # from slot 33 on
    pages.table[0, 0], pages.table[0, 3] = -1, 2**30
    pages.table[2] = -7  # a sequence without queries reads nothing
    got = pages.op(q, None, None, **arguments)
    assert_same_bits(got[0], wanted[0])
    assert_same_bits(got[1], wanted[1], "lse")


@pytest.mark.parametrize("form", ["int64", "every_other", "transposed"])
def test_table(device, isa, form):
    q, k, v, offsets = make_varlen(*BATCH, device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    wanted = pages.op(q, None, None, **offsets)
    if form == "int64":
        pages.table = pages.table.long()
    elif form == "every_other":
        pages.table = torch.stack((pages.table, pages.table + 1000), 2).flatten(1)[:, ::2]
    else:
        pages.table = pages.table.t().contiguous().t()
    assert_same_bits(pages.op(q, None, None, **offsets), wanted)


def test_pages_that_sequences_share(device, isa):
    q, k, v, offsets = make_varlen([4, 4, 9], [40, 40, 40], device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 8)
    pages.table = pages.table[:1].expand(3, -1)
    k, v = (x[:40].repeat(3, 1, 1) for x in (k, v))
    wanted = attention_varlen(q, k, v, **offsets, causal=True)
    assert_same_bits(pages.op(q, None, None, **offsets, causal=True), wanted)


@pytest.mark.parametrize("lengths_q, lengths_kv", [([], []), ([0, 3], [0, 0]), ([0], [5])], ids=str)
def test_nothing_to_do(device, isa, lengths_q, lengths_kv):
    q, k, v, offsets = make_varlen(lengths_q, lengths_kv, device=device)
    for spare in (0, 1):
        pages = Pages(k, v, offsets["cu_seqlens_kv"], 4, spare_entries=spare)
        for pool in (slice(None), slice(0)) if 5 not in lengths_kv else (slice(None),):
            out, lse = attention_varlen(
                *(q, pages.k[pool], pages.v[pool]),
                **offsets,
                block_table=pages.table,
                return_lse=True,
            )
            assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all()


@pytest.mark.checks_values
@pytest.mark.parametrize("page", [-1, 9, 2**31, 2**40])
def test_a_page_that_is_not_there(device, isa, page):
    q, k, v, offsets = make_varlen([2, 3], [40, 60], device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    assert len(pages.k) == 9
    pages.table = pages.table.long()
    pages.table[1, 2] = page
    message = rf"^block_table: expected pages in \[0, 9\), got {page} at \[1, 2\]$"
    with pytest.raises(RuntimeError, match=message):
        pages.op(q, None, None, **offsets)
    used = torch.tensor([40, 32], device=device)
    assert pages.op(q, None, None, **offsets, seqlens_kv=used).isfinite().all()


@pytest.mark.checks_values
def test_sequences_longer_than_their_pages(device, isa):
    q, k, v, offsets = make_varlen([2, 3], [40, 60], device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16, spare_entries=0)
    message = r"^cu_seqlens_kv: expected at most 64 keys in each sequence, .* got 65 at batch 1$"
    for last in (104, 105):
        offsets["cu_seqlens_kv"][2] = last
        if last == 104:
            pages.op(q, None, None, **offsets)
            continue
        with pytest.raises(RuntimeError, match=message):
            pages.op(q, None, None, **offsets)
        with pytest.raises(ValueError, match=message):
            pages.op(q, None, None, **offsets, impl="reference")
    offsets["cu_seqlens_kv"][0] = -1
    with pytest.raises(RuntimeError, match=r"^cu_seqlens_kv: expected values in \[0, "):
        pages.op(q, None, None, **offsets)


def test_reference_and_explain_and_flash_attn(device, isa):
    q, k, v, offsets = make_varlen(*BATCH, device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    out, lse = pages.op(q, None, None, **offsets, causal=True, return_lse=True)
    eager = pages.op(q, None, None, **offsets, causal=True, impl="reference")
    torch.testing.assert_close(out, eager)
    table = {"block_table": pages.table}
    paged = explain(attention_varlen, q, pages.k, pages.v, **offsets, **table)
    assert paged == explain(attention_varlen, q, k, v, **offsets)
    seen = *offsets.values(), 40, 90
    rest = {"causal": True, "return_attn_probs": True, **table}
    got = flash_attn_varlen_func(q, pages.k, pages.v, *seen, **rest)
    assert_same_bits(got[0], out)
    assert_same_bits(got[1], lse, "lse")


def test_compiles_without_a_break(device):
    q, k, v, offsets = make_varlen(*BATCH, device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)

    def step(q, k, v, cu_seqlens_q, cu_seqlens_kv, table):
        return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_kv, block_table=table)

    given = q, pages.k, pages.v, *offsets.values(), pages.table
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    assert_same_bits(got, step(*given))


RAW = pytest.mark.cpu_only("CUDA's op has no pages: Python joins them first")


@RAW
def test_opcheck(device):
    q, k, v, offsets = make_varlen(*BATCH, device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    scalars = 0.125, 0.0, 1, -1, -1, None, None, None, None
    given = q, pages.k, pages.v, *offsets.values(), None, None, *scalars, pages.table
    torch.library.opcheck(OP, given)


def test_inference_only(device):
    q, k, v, offsets = make_varlen([2, 3], [40, 60], device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    wanted = pages.op(q, None, None, **offsets)
    for name in "qkv":
        given = {"q": q, "k": pages.k, "v": pages.v}
        given[name] = given[name].detach().requires_grad_()
        run = functools.partial(attention_varlen, **given, **offsets, block_table=pages.table)
        for other in ({}, {"impl": "reference"}):
            with pytest.raises(
                RuntimeError, match=f"^{name}: attention_varlen with block_table is"
            ):
                run(**other)
        with torch.no_grad():
            assert_same_bits(run(), wanted)


@RAW
def test_the_op_itself_is_for_inference(device):
    q, k, v, offsets = make_varlen([2, 3], [40, 60], device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    scalars = 0.125, 0.0, 0, -1, -1, None, None, None, None
    with pytest.raises(RuntimeError, match="^block_table: expected None with inputs that"):
        OP(
            q.requires_grad_(),
            pages.k,
            pages.v,
            *offsets.values(),
            None,
            None,
            *scalars,
            pages.table,
        )


@pytest.mark.parametrize(
    "table, error, message",
    [
        ([[0, 1]], TypeError, r"block_table: expected a torch.Tensor, got list"),
        (
            torch.zeros(2, 3),
            TypeError,
            r"block_table: expected dtype int32 or int64, got .*float32",
        ),
        (torch.zeros(3, 2).int(), ValueError, r"block_table: expected shape \[2, pages\] .*\[3, 2"),
        (
            torch.zeros(2).int(),
            ValueError,
            r"block_table: expected shape \[2, pages\] .* got \[2\]",
        ),
        (torch.zeros(2, 3, device="meta").int(), ValueError, r"block_table: expected q's device"),
    ],
)
def test_table_that_does_not_fit(device, table, error, message):
    q, k, v, offsets = make_varlen([2, 3], [40, 60], device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    pages.table = table.to(device) if torch.is_tensor(table) and not table.is_meta else table
    with pytest.raises(error, match=f"^{message}"):
        pages.op(q, None, None, **offsets)


def test_pages_that_do_not_fit(device):
    q, k, v, offsets = make_varlen([2, 3], [40, 60], device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    run = functools.partial(attention_varlen, q, **offsets, block_table=pages.table)
    with pytest.raises(ValueError, match=r"^k: expected 4 dimensions \[num_pages, page_size, num_"):
        run(k=k, v=v)
    with pytest.raises(ValueError, match=r"^v: expected shape \[9, 16, 2, 'head_dim_v'\] like k"):
        run(k=pages.k, v=pages.v[1:])
    with pytest.raises(ValueError, match=r"^block_table: expected pages of 1 slot or more"):
        run(k=pages.k[:, :0], v=pages.v[:, :0])
    with pytest.raises(ValueError, match=r"^k: expected 3 dimensions \[total, num_heads, head_dim"):
        attention_varlen(q, pages.k, pages.v, **offsets)


def hostile():
    """(what, change) of an argument of the op, each of which it must refuse."""
    for name in ("k", "v"):
        yield name, lambda x: x[0]
        yield name, lambda x: x.unsqueeze(0)
        yield name, lambda x: x[:-1]
        yield name, lambda x: x[:, :-1]
        yield name, lambda x: x.transpose(2, 3)
        yield name, lambda x: x[:, :, :0]
        yield name, lambda x: x[..., :0]
        yield name, lambda x: x.to("meta")
        yield name, lambda x: x.double()
    yield "block_table", lambda x: x[:1]
    yield "block_table", lambda x: x[0]
    yield "block_table", lambda x: x.float()
    yield "block_table", lambda x: x.to("meta")
    yield "block_table", lambda x: x[:, :1]
    yield "block_table", lambda x: x[:, :0]
    yield "block_table", lambda x: x.new_zeros(2, 1).expand(2, 2**60)


@pytest.mark.parametrize("name, change", list(hostile()))
def test_hostile_calls_of_the_op_raise(device, isa, name, change):
    q, k, v, offsets = make_varlen([2, 3], [40, 60], device=device)
    pages = Pages(k, v, offsets["cu_seqlens_kv"], 16)
    given = {"q": q, "k": pages.k, "v": pages.v, "block_table": pages.table}
    given[name] = change(given[name])
    table = given.pop("block_table")
    scalars = 0.125, 0.0, 0, -1, -1, None, None, None, None
    with pytest.raises((RuntimeError, NotImplementedError)):
        OP(*given.values(), *offsets.values(), None, None, *scalars, table)
