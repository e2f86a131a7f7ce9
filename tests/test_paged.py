"""decode() of a cache in pages: the same bits as of the dense cache that the pages stand for."""

import functools

import pytest
import torch

from flashinfer_lite import decode, explain, reference
from flashinfer_lite.testing import assert_same_bits, check_forward, make_mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
PAGE_SIZES = [1, 3, 16, 19, 256, 768]
SPARE_PAGES = 2  # that no table names
LAYOUTS = ("nhd", "hnd", "interleaved", "offset")


def make_pages(num_pages, page_size, num_heads, head_dim, head_dim_v, layout="nhd"):
    """(k, v) [num_pages, page_size, num_heads, dim], float32."""
    if layout == "hnd":
        k, v = (
            torch.randn(num_pages, num_heads, page_size, d).transpose(1, 2)
            for d in (head_dim, head_dim_v)
        )
    elif layout == "interleaved":  # a page of K, then that of V, in one storage
        both = torch.randn(num_pages, page_size * num_heads * (head_dim + head_dim_v))
        k, v = both.split([page_size * num_heads * d for d in (head_dim, head_dim_v)], 1)
        k, v = (
            x.unflatten(1, (page_size, num_heads, d)) for x, d in ((k, head_dim), (v, head_dim_v))
        )
    else:
        skip = 1 if layout == "offset" else 0  # one element: no row begins on 16 bytes
        k, v = (
            torch.randn(num_pages * page_size * num_heads * d + skip)[skip:].view(
                num_pages, page_size, num_heads, d
            )
            for d in (head_dim, head_dim_v)
        )
    return k, v


class Paged:
    """A paged cache with scattered pages, and the dense one that it stands for."""

    def __init__(
        self,
        device,
        dtype,
        page_size,
        *,
        batch_size=2,
        seqlen_q=1,
        capacity=300,
        num_heads_q=4,
        num_heads_kv=2,
        head_dim=64,
        head_dim_v=None,
        layout="nhd",
    ):
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        pages = -(-capacity // page_size)
        num_pages = batch_size * pages + SPARE_PAGES
        order = torch.randperm(num_pages)[: batch_size * pages]
        self.table = order.view(batch_size, pages).to(device)
        pools = make_pages(num_pages, page_size, num_heads_kv, head_dim, head_dim_v, layout)
        self.k, self.v = (_like(x, dtype, device) for x in pools)
        q = torch.randn(batch_size, seqlen_q, num_heads_q, head_dim)
        self.q = q.to(device=device, dtype=dtype)

    def dense(self):
        """With the heads side by side, or apart, as in the pages: it decides how they walk."""
        k, v = (reference.gather_pages(x, self.table) for x in (self.k, self.v))
        if self.k.stride(2) == self.k.shape[3]:
            return k, v
        return (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))

    def op(self, q, k, v, **arguments):
        """decode of the pages; k and v, the dense cache, are for the oracle."""
        return decode(q, self.k, self.v, block_table=self.table, **arguments)

    def check(self, **arguments):
        """Against the oracle, and bit for bit against the dense cache."""
        forced = {n: arguments.pop(n) for n in ("kv_splits",) if n in arguments}
        k, v = self.dense()
        got = check_forward(functools.partial(self.op, **forced), self.q, k, v, **arguments)
        wanted = decode(self.q, k, v, **forced, **arguments, return_lse=True)
        for x, y in zip(got, wanted, strict=True):
            assert_same_bits(x, y)


def _like(x, dtype, device):
    """x of another dtype and on another device, with its strides and storage offset."""
    base = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0)
    base = base.to(device=device, dtype=dtype)
    return base.as_strided(x.shape, x.stride(), x.storage_offset())


def lengths(device, *values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


@all_dtypes
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seqlen_q", [1, 4, 40])
def test_page_size(device, isa, dtype, page_size, seqlen_q):
    cache = Paged(device, dtype, page_size, seqlen_q=seqlen_q, head_dim_v=40)
    cache.check(seqlens_kv=lengths(device, 300, 129), causal=True)


FEATURES = {
    "plain": {},
    "top_left": {"causal": "top_left"},
    "window": {"window": (90, 20)},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.3, "causal": True},
    "seqlens_zero": {"seqlens_kv": (0, 256), "causal": True},
    "kv_start": {"kv_start": (299, 37), "causal": True},
    "both": {"kv_start": (5, 100), "seqlens_kv": (5, 213), "causal": True, "window": (30, 0)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kv_splits", [0, 1, 3])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("page_size", [7, 32])
def test_feature(device, isa, dtype, kv_splits, feature, page_size):
    arguments = {
        name: lengths(device, *x) if name in ("kv_start", "seqlens_kv") else x
        for name, x in FEATURES[feature].items()
    }
    for seqlen_q, num_heads_q in ((1, 2), (3, 8), (20, 2)):
        cache = Paged(device, dtype, page_size, seqlen_q=seqlen_q, num_heads_q=num_heads_q)
        cache.check(kv_splits=kv_splits, **arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [5, 64])
@pytest.mark.parametrize("seqlen_q", [1, 2, 30])
def test_layout(device, isa, layout, page_size, seqlen_q):
    cache = Paged(device, torch.bfloat16, page_size, layout=layout, seqlen_q=seqlen_q, head_dim=72)
    cache.check(causal=True)


@pytest.mark.parametrize("form", ["int32", "int64", "every_other", "transposed", "expanded"])
def test_table(device, isa, form):
    cache = Paged(device, torch.float32, 16)
    if form == "int32":
        cache.table = cache.table.int()
    elif form == "every_other":
        cache.table = torch.stack((cache.table, cache.table + 1000), 2).flatten(1)[:, ::2]
    elif form == "transposed":
        cache.table = cache.table.t().contiguous().t()
    elif form == "expanded":  # the sequences share their pages
        cache.table = cache.table[:1].expand(2, -1)
    cache.check(seqlens_kv=lengths(device, 300, 77))


@pytest.mark.parametrize("seqlen_q", [1, 2, 30])
def test_mask_and_softmax(device, isa, seqlen_q):
    cache = Paged(device, torch.bfloat16, 12, capacity=288, seqlen_q=seqlen_q)
    for kind, shape in (("bool", (2, 1, 1, 288)), ("additive_inf", (4, seqlen_q, 288))):
        cache.check(mask=make_mask(kind, shape, device=device, dtype=torch.float32))
    k, v = cache.dense()
    for phi in (0.0, -500.0):  # none and all of the rows are recomputed
        arguments = {"softmax": "unified", "phi": phi, "return_lse": True, "kv_splits": 2}
        got, wanted = cache.op(cache.q, k, v, **arguments), decode(cache.q, k, v, **arguments)
        assert all(map(torch.equal, got, wanted))
    sink = torch.tensor([0.0, 30.0, -torch.inf, 1.0], device=device)
    assert torch.equal(cache.op(cache.q, k, v, sink=sink), decode(cache.q, k, v, sink=sink))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_seen_may_hold_anything(device, isa, dtype, seqlen_q, bad):
    cache = Paged(device, dtype, 16, seqlen_q=seqlen_q, capacity=320)
    arguments = {
        "seqlens_kv": lengths(device, 250, 77),
        "kv_start": lengths(device, 21, 0),
        "causal": True,
        "return_lse": True,
    }
    k, v = cache.dense()
    wanted = decode(cache.q, k, v, **arguments)
    used = torch.zeros(cache.k.shape[:2], dtype=torch.bool, device=device)
    for b, (begin, end) in enumerate(((21, 250), (0, 77))):
        slots = torch.arange(begin, end, device=device)
        used[cache.table[b, slots // 16], slots % 16] = True
    cache.k[~used], cache.v[~used] = bad, bad
    cache.table[0, 0] = -1  # slots 0 to 15 come before kv_start
    cache.table[0, 16:], cache.table[1, 5:] = 2**40, -(2**40)
    for x, y in zip(cache.op(cache.q, None, None, **arguments), wanted, strict=True):
        assert_same_bits(x, y)


def test_pages_before_the_window_are_not_read(device, isa):
    cache = Paged(device, torch.float32, 16, batch_size=1, seqlen_q=2, capacity=320)
    wanted = decode(cache.q, *cache.dense(), causal=True, window=(40, 0))
    first = 320 - 2 - 40  # seen by the first query
    cache.table[0, : first // 16] = -7
    assert_same_bits(cache.op(cache.q, None, None, causal=True, window=(40, 0)), wanted)


@pytest.mark.checks_values
@pytest.mark.parametrize("page", [-1, 22, 2**31, 2**40])
def test_a_page_that_is_not_there(device, isa, page):
    cache = Paged(device, torch.float32, 32)
    assert cache.k.shape[0] == 22
    cache.table[1, 4] = page
    message = rf"^block_table: expected pages in \[0, 22\), got {page} at \[1, 4\]$"
    with pytest.raises(RuntimeError, match=message):
        cache.op(cache.q, None, None)
    used = lengths(device, 300, 128)
    assert cache.op(cache.q, None, None, seqlens_kv=used).isfinite().all()


def test_a_page_that_two_sequences_share(device, isa):
    cache = Paged(device, torch.bfloat16, 16, batch_size=3)
    cache.table[1:, :7] = cache.table[0, :7]
    cache.check(seqlens_kv=lengths(device, 300, 112, 130))


def test_batch_invariant(device, isa):
    cache = Paged(device, torch.bfloat16, 16, batch_size=3, capacity=2000)
    ends = lengths(device, 2000, 1100, 3)
    both = cache.op(cache.q, None, None, seqlens_kv=ends, batch_invariant=True)
    for b in range(3):
        arguments = {"block_table": cache.table[b : b + 1], "batch_invariant": True}
        q, end = cache.q[b : b + 1], ends[b : b + 1]
        alone = decode(q, cache.k, cache.v, seqlens_kv=end, **arguments)
        assert_same_bits(both[b : b + 1], alone)


@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_offsets_beyond_32_bits(device, isa, table_dtype):
    # 2^20 pages of 16 slots of 2 heads of 80: 5 GB that nobody touches but for three pages.
    k = torch.empty(2**20, 16, 2, 80, dtype=torch.bfloat16, device=device)
    v = torch.empty_like(k)
    pages = [2**20 - 1, 900_000, 3]
    assert 900_000 * k.stride(0) > 2**31
    small = torch.randn(2, 3, 16, 2, 80).to(k)
    for i, page in enumerate(pages):
        k[page], v[page] = small[0, i], small[1, i]
    q = torch.randn(1, 2, 4, 80).to(k)
    table = torch.tensor([pages], dtype=table_dtype, device=device)
    got = decode(q, k, v, block_table=table, causal=True)
    assert_same_bits(got, decode(q, *(x.view(1, 48, 2, 80) for x in small), causal=True))


def test_no_pages_and_no_keys(device, isa):
    q = torch.randn(2, 1, 4, 16, device=device)
    empty = torch.randn(0, 16, 2, 16, device=device)
    for pages in (0, 3):
        table = torch.zeros(2, pages, dtype=torch.int32, device=device)
        used = lengths(device, 0, 0)
        out, lse = decode(q, empty, empty, block_table=table, seqlens_kv=used, return_lse=True)
        assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.checks_values
def test_no_pages_and_some_keys(device, isa):
    q = torch.randn(2, 1, 4, 16, device=device)
    empty = torch.randn(0, 16, 2, 16, device=device)
    with pytest.raises(RuntimeError, match=r"^block_table: expected pages in \[0, 0\), got 0 at"):
        decode(q, empty, empty, block_table=torch.zeros(2, 1, dtype=torch.int32, device=device))


def test_out_and_reference_and_explain(device, isa):
    cache = Paged(device, torch.float32, 16, capacity=4096)
    out = torch.full_like(cache.q, torch.nan)
    result = cache.op(cache.q, None, None, out=out)
    assert result is out
    k, v = cache.dense()
    assert_same_bits(out, decode(cache.q, k, v))
    eager = cache.op(cache.q, None, None, impl="reference")
    torch.testing.assert_close(out, eager)
    paged = explain(decode, cache.q, cache.k, cache.v, block_table=cache.table)
    assert paged == explain(decode, cache.q, k, v)


def test_compiles_without_a_break(device):
    cache = Paged(device, torch.float32, 16)

    def step(q, k, v, table, used):
        return decode(q, k, v, block_table=table, seqlens_kv=used, causal=True)

    given = cache.q, cache.k, cache.v, cache.table, lengths(device, 300, 30)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    assert_same_bits(got, step(*given))
    op = torch.ops.flashinfer_lite.decode.default
    scalars = 0.125, 0.0, 1, -1, -1, 0, False, None, None
    torch.library.opcheck(op, (*given[:3], None, None, given[4], *scalars, cache.table))


@pytest.mark.parametrize(
    "table, error, message",
    [
        ([[0, 1]], TypeError, r"block_table: expected a torch.Tensor, got list"),
        (
            torch.zeros(2, 3),
            TypeError,
            r"block_table: expected dtype int32 or int64, got .*float32",
        ),
        (torch.zeros(2, 3, dtype=torch.int16), TypeError, r"block_table: expected dtype int32 or"),
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
    cache = Paged(device, torch.float32, 16)
    if torch.is_tensor(table) and not table.is_meta:
        table = table.to(device)
    with pytest.raises(error, match=f"^{message}"):
        decode(cache.q, cache.k, cache.v, block_table=table)


def test_pages_that_do_not_fit(device):
    cache = Paged(device, torch.float32, 16)
    with pytest.raises(ValueError, match=r"^v_cache: expected shape \[40, 16, 2, 'head_dim_v'\]"):
        decode(cache.q, cache.k, cache.v[1:], block_table=cache.table)
    with pytest.raises(ValueError, match=r"^block_table: expected pages of 1 slot or more"):
        decode(cache.q, cache.k[:, :0], cache.v[:, :0], block_table=cache.table)
    mask = torch.ones(1, 1, 1, 300, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"^mask: expected a shape that broadcasts to .* 304\]"):
        decode(cache.q, cache.k, cache.v, block_table=cache.table, mask=mask)
    with pytest.raises(RuntimeError, match="^k_cache: decode is for inference"):
        decode(cache.q, cache.k.requires_grad_(), cache.v, block_table=cache.table)
