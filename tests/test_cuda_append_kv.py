"""The CUDA append_kv on the executor: what the CPU writes, and where it may not."""

import pytest
import torch
from cuda_coverage import ROWS

from flashinfer_lite import append_kv

pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")

every_row = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.kernel == "append_kv"], ids=lambda row: row.name
)
CAPACITY = 40


def angles(positions, rotary_dim, dtype=torch.float32):
    angle = torch.rand(positions, rotary_dim // 2) * 6
    return {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)}


class Cache:
    def __init__(self, row, used, seqlen_new, page_size=None, head_dim=72, head_dim_v=40):
        dtype = getattr(torch, row.dtype)
        outer, slots, self.table = len(used), CAPACITY, None
        if page_size:
            pages = -(-CAPACITY // page_size)
            outer, slots = len(used) * pages + 1, page_size
            self.table = torch.randperm(outer)[1:].view(len(used), pages)
        self.k_cache, self.v_cache = (
            torch.full((outer, slots, 3, d), torch.nan, dtype=dtype) for d in (head_dim, head_dim_v)
        )
        self.k, self.v = (
            torch.randn(len(used), seqlen_new, 3, d).to(dtype) for d in (head_dim, head_dim_v)
        )
        self.used = torch.tensor(used)

    def run(self, executor, **arguments):
        tensors = self.k_cache, self.v_cache, self.k, self.v
        return executor.append_kv(
            *tensors, seqlens_kv=self.used, block_table=self.table, **arguments
        )

    def check(self, executor, **arguments):
        got = self.run(executor, **arguments)
        wanted = self.k_cache.clone(), self.v_cache.clone()
        append_kv(
            *wanted, self.k, self.v, seqlens_kv=self.used, block_table=self.table, **arguments
        )
        eps = torch.finfo(self.k.dtype).eps
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y, atol=2 * eps, rtol=eps, equal_nan=True)
        assert torch.equal(got[1].nan_to_num(-9), wanted[1].nan_to_num(-9))


@every_row
@pytest.mark.parametrize("page_size", [None, 1, 7, 16])
@pytest.mark.parametrize("options", [{}, {"eager": True}, {"seed": 2}, {"threads": 2}], ids=str)
def test_slots(device, executor, row, page_size, options):
    for used, seqlen_new in (((0, 37, 13), 3), ((39,), 1), ((5, 0), 0)):
        cache = Cache(row, used, seqlen_new, page_size)
        cache.check(executor(row, **options))
        cache.used = torch.stack((cache.used, cache.used + 99), 1).int().flatten()[::2]
        cache.check(executor(row, **options))


@every_row
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [72, 16, 2])
def test_rotation(device, executor, row, interleaved, rotary_dim):
    for dtype in {torch.float32, getattr(torch, row.dtype)}:
        for page_size in (None, 16):
            cache = Cache(row, (0, 37, 13), 3, page_size)
            rotary = angles(CAPACITY, rotary_dim, dtype)
            cache.check(executor(row), **rotary, rotary_interleaved=interleaved)


@every_row
def test_strides(device, executor, row):
    cache = Cache(row, (9, 0), 4, head_dim=24, head_dim_v=24)
    both = torch.stack((cache.k_cache, cache.v_cache), 1).transpose(2, 3).contiguous()
    cache.k_cache, cache.v_cache = both.transpose(2, 3).unbind(1)
    cache.k, cache.v = torch.stack((cache.k, cache.v), 2).unbind(2)
    cache.check(executor(row))


@every_row
@pytest.mark.parametrize("page_size", [None, 8])
def test_tokens_without_a_slot_are_not_written(device, executor, row, page_size):
    for used in (-1, -(2**63), 40, 2**63 - 1):
        cache = Cache(row, (3, used), 2, page_size)
        got = cache.run(executor(row))
        cache.used[1] = 0
        cache.k[1], cache.v[1] = torch.nan, torch.nan  # of the second sequence nothing is left
        cache.check(executor(row))
        wanted = cache.run(executor(row))
        for x, y in zip(got, wanted, strict=True):
            assert torch.equal(x.nan_to_num(-9), y.nan_to_num(-9))
    cache = Cache(row, (39,), 2)  # the first of two tokens fits
    k_cache, _ = cache.run(executor(row))
    assert torch.equal(k_cache[0, 39], cache.k[0, 0]) and k_cache[0, :39].isnan().all()


@every_row
def test_tokens_without_a_page_or_an_angle_are_not_written(device, executor, row):
    for page in (-1, 7, 2**40):
        cache = Cache(row, (6,), 4, page_size=8)
        assert cache.k_cache.shape[0] == 6
        cache.table[0, 1] = page
        k_cache, v_cache = cache.run(executor(row))
        first = cache.table[0, 0]
        assert torch.equal(k_cache[first, 6:], cache.k[0, :2])
        assert torch.equal(v_cache[first, 6:], cache.v[0, :2])
        k_cache[first, 6:], v_cache[first, 6:] = torch.nan, torch.nan
        assert k_cache.isnan().all() and v_cache.isnan().all()
    cache = Cache(row, (6,), 4)
    k_cache, v_cache = cache.run(executor(row), **angles(8, 16))
    assert k_cache[0, 6:8].isfinite().all() and k_cache[0, 8:].isnan().all()
    assert v_cache[0, 6:8].isfinite().all() and v_cache[0, 8:].isnan().all()
