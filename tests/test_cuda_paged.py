"""The CUDA decode of a cache in pages, on the executor."""

import functools

import pytest
import torch
from cuda_coverage import ROWS

from flashinfer_lite.reference import gather_pages
from flashinfer_lite.testing import assert_same_bits, check_forward

pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")

DECODE_ROWS = [row for row in ROWS if row.kernel == "decode"]
every_row = pytest.mark.parametrize("row", DECODE_ROWS, ids=lambda row: row.name)


class Paged:
    """A call of decode on scattered pages: sequences of `capacity` and of 5 keys."""

    def __init__(self, row, page_size, capacity=None, table_dtype=torch.int32, seqlen_q=3):
        self.row = row
        capacity = 2 * row.block_n + 9 if capacity is None else capacity
        dtype, head_dim = getattr(torch, row.dtype), row.head_dim
        pages = -(-capacity // page_size)
        order = torch.randperm(2 * pages + 2)[: 2 * pages]
        self.table = order.view(2, pages).to(table_dtype)
        self.k, self.v = (
            torch.randn(2 * pages + 2, page_size, 2, head_dim).to(dtype) for _ in range(2)
        )
        self.q = torch.randn(2, seqlen_q, 4, head_dim).to(dtype)
        self.arguments = {"seqlens_kv": torch.tensor([capacity, 5]), "causal": True}

    def dense(self):
        return (gather_pages(x, self.table) for x in (self.k, self.v))

    def run(self, executor, kv_splits=1, **arguments):
        op = functools.partial(executor(self.row).decode, kv_splits=kv_splits)
        arguments = self.arguments | arguments
        return op(self.q, self.k, self.v, block_table=self.table, **arguments, return_lse=True)

    def check(self, executor, kv_splits=1, **arguments):
        """Against the oracle, and bit for bit against the dense cache."""
        got = self.run(executor, kv_splits, **arguments)
        arguments = self.arguments | arguments
        k, v = self.dense()
        of_oracle = {n: x for n, x in arguments.items() if n not in ("softmax", "phi")}
        check_forward(lambda *_, **__: got, self.q, k, v, **of_oracle)
        wanted = executor(self.row).decode(
            self.q, k, v, kv_splits=kv_splits, **arguments, return_lse=True
        )
        for x, y in zip(got, wanted, strict=True):
            assert_same_bits(x, y)


@every_row
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("kv_splits", [1, 3])
def test_page_size(device, executor, row, page_size, kv_splits):
    Paged(row, page_size).check(executor, kv_splits)


@every_row
def test_features(device, executor, row):
    cache = Paged(row, 8, table_dtype=torch.int64)
    cache.arguments["kv_start"] = torch.tensor([11, 0])
    cache.table = torch.stack((cache.table, cache.table + 99), 2).flatten(1)[:, ::2]
    cache.check(executor, window=(20, 0), softcap=3.0)
    cache.check(executor, 2, softmax="unified", phi=0.0)
    cache.check(executor, 2, softmax="unified", phi=-300.0)


@every_row
def test_layouts(device, executor, row):
    cache = Paged(row, 7)
    both = torch.stack((cache.k, cache.v), 1).transpose(2, 3).contiguous().transpose(2, 3)
    cache.k, cache.v = both.unbind(1)  # heads first, pages of K and V in turn
    cache.check(executor)
    memory = torch.empty(cache.k.numel() + 1, dtype=cache.k.dtype)
    k = memory[1:].view(cache.k.shape)
    k.copy_(cache.k)
    cache.k = k  # no row begins on 16 bytes
    cache.check(executor)


@every_row
def test_what_is_not_seen_may_hold_anything(device, executor, row):
    cache = Paged(row, 16)
    wanted = cache.run(executor)
    end = int(cache.arguments["seqlens_kv"][0])
    used = torch.zeros(cache.k.shape[:2], dtype=torch.bool)
    for b, count in enumerate((end, 5)):
        slots = torch.arange(count)
        used[cache.table[b, slots // 16].long(), slots % 16] = True
    cache.k[~used], cache.v[~used] = torch.nan, torch.inf
    cache.table[1, 1:] = torch.iinfo(torch.int32).max
    for x, y in zip(cache.run(executor), wanted, strict=True):
        assert_same_bits(x, y)


@every_row
@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_pages_that_are_not_there_are_clamped(device, executor, row, table_dtype):
    cache = Paged(row, 16, table_dtype=table_dtype)
    last = cache.k.shape[0] - 1
    cache.table[0, 0], cache.table[0, 1] = 0, last
    wanted = cache.run(executor)
    cache.table[0, 0], cache.table[0, 1] = -3, torch.iinfo(table_dtype).max
    for x, y in zip(cache.run(executor), wanted, strict=True):
        assert_same_bits(x, y)


def test_offsets_beyond_32_bits(device, executor):
    row = next(row for row in DECODE_ROWS if row.dtype == "bfloat16" and row.head_dim == 128)
    cache = Paged(row, 16, capacity=48, seqlen_q=1)
    cache.q, cache.arguments = cache.q[:1], {}
    cache.table = torch.tensor([[2**20 - 1, 900_000, 3]], dtype=torch.int32)
    k = torch.empty(2**20, 16, 2, 128, dtype=torch.bfloat16)
    v = torch.empty_like(k)
    for i, page in enumerate(cache.table[0].tolist()):
        k[page], v[page] = cache.k[i], cache.v[i]
    dense = (x[:3].view(1, 48, 2, 128) for x in (cache.k, cache.v))
    cache.k, cache.v = k, v
    got = cache.run(executor)
    for x, y in zip(got, executor(row).decode(cache.q, *dense, return_lse=True), strict=True):
        assert_same_bits(x, y)
