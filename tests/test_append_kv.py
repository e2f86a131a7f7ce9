"""append_kv(): where new keys and values go, how they are rotated, and what is left alone."""

import pytest
import torch

from flashinfer_lite import append_kv
from flashinfer_lite.testing import assert_same_bits, on_device

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
HEADS, HEAD_DIM, HEAD_DIM_V = 2, 48, 24
ROTATIONS = pytest.mark.parametrize(
    "rotary_dim, interleaved", [(48, False), (48, True), (16, False), (2, True)]
)


class Cache:
    """A cache filled with NaN, dense or in pages, and the new keys and values."""

    def __init__(self, device, dtype, used, seqlen_new, page_size=None, capacity=60):
        self.used, batch_size = used, len(used)
        self.page_size = page_size
        self.table = None
        outer, slots = batch_size, capacity
        if page_size:
            pages = -(-capacity // page_size)
            outer, slots = batch_size * pages + 2, page_size
            self.table = torch.randperm(outer)[: batch_size * pages].view(batch_size, pages)
            self.table = self.table.to(device)
        self.k_cache, self.v_cache = (
            torch.full((outer, slots, HEADS, d), torch.nan, dtype=dtype, device=device)
            for d in (HEAD_DIM, HEAD_DIM_V)
        )
        self.k, self.v = (
            torch.randn(batch_size, seqlen_new, HEADS, d).to(device=device, dtype=dtype)
            for d in (HEAD_DIM, HEAD_DIM_V)
        )

    def lengths(self, dtype=torch.int32):
        return torch.tensor(self.used, dtype=dtype, device=self.k.device)

    def append(self, length_dtype=torch.int32, **arguments):
        result = append_kv(
            *(self.k_cache, self.v_cache, self.k, self.v),
            seqlens_kv=self.lengths(length_dtype),
            block_table=self.table,
            **arguments,
        )
        assert result is None

    def slot(self, cache, b, j):
        if self.table is None:
            return cache[b, j]
        return cache[self.table[b, j // self.page_size], j % self.page_size]

    def check(self, wanted_k=None):
        """Every new token is in its slot, and nothing else was written."""
        wanted_k = self.k if wanted_k is None else wanted_k
        for b, used in enumerate(self.used):
            for t in range(self.k.shape[1]):
                assert_same_bits(self.slot(self.k_cache, b, used + t), wanted_k[b, t])
                assert_same_bits(self.slot(self.v_cache, b, used + t), self.v[b, t])
                self.slot(self.k_cache, b, used + t).fill_(torch.nan)
                self.slot(self.v_cache, b, used + t).fill_(torch.nan)
        assert self.k_cache.isnan().all() and self.v_cache.isnan().all()


def tables(positions, rotary_dim, dtype=torch.float32, device="cpu"):
    angle = torch.arange(positions)[:, None] / 100 ** (torch.arange(rotary_dim // 2) / rotary_dim)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotated(x, first_slots, cos, sin, interleaved):
    """In float64, by complex numbers."""
    x = x.double().clone()
    half = cos.shape[1]
    for b, first in enumerate(first_slots):
        for t in range(x.shape[1]):
            turn = torch.complex(cos[first + t].double(), sin[first + t].double())
            row = x[b, t]
            pair = (row[:, 0 : 2 * half : 2], row[:, 1 : 2 * half : 2])
            pair = pair if interleaved else (row[:, :half], row[:, half : 2 * half])
            turned = torch.complex(*pair) * turn
            pair[0].copy_(turned.real), pair[1].copy_(turned.imag)
    return x


@all_dtypes
@pytest.mark.parametrize("page_size", [None, 1, 7, 16])
@pytest.mark.parametrize("length_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_slots(device, isa, dtype, page_size, length_dtype):
    for used, seqlen_new in (((0, 55, 13), 5), ((59, 0, 6), 1), ((0, 0), 60), ((3,), 0)):
        cache = Cache(device, dtype, used, seqlen_new, page_size)
        cache.append(length_dtype)
        cache.check()


@all_dtypes
@ROTATIONS
@pytest.mark.parametrize("page_size", [None, 16])
def test_rotation(device, isa, dtype, rotary_dim, interleaved, page_size):
    for table_dtype in {torch.float64 if dtype == torch.float64 else torch.float32, dtype}:
        used = (0, 55, 13)
        cache = Cache(device, dtype, used, 5, page_size)
        cos, sin = tables(60, rotary_dim, table_dtype, device)
        wanted = rotated(cache.k, used, cos, sin, interleaved)
        cache.append(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)
        for b, first in enumerate(used):
            got = torch.stack([cache.slot(cache.k_cache, b, first + t) for t in range(5)])
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), wanted[b], atol=4 * eps, rtol=2 * eps)
            assert_same_bits(got[..., rotary_dim:], cache.k[b, ..., rotary_dim:])
        expected = torch.stack(
            [
                torch.stack([cache.slot(cache.k_cache, b, first + t) for t in range(5)])
                for b, first in enumerate(used)
            ]
        )
        cache.check(expected)  # and nothing else was written


@all_dtypes
def test_strides(device, isa, dtype):
    """Heads first, K and V in one storage, new tokens as views of a fused projection."""
    both = torch.full((3, 2, HEADS, 60, 48), torch.nan, dtype=dtype, device=device)
    fused = torch.randn(3, 4, HEADS, 3, 48).to(device=device, dtype=dtype)
    k, v = fused[..., 1, :], fused[..., 2, :]
    k_cache, v_cache = both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2)
    used = torch.tensor([9, 0, 5, 0, 56, 0], device=device)[::2]
    append_kv(k_cache, v_cache, k, v, seqlens_kv=used)
    for b, first in enumerate(used.tolist()):
        assert_same_bits(k_cache[b, first : first + 4], k[b])
        assert_same_bits(v_cache[b, first : first + 4], v[b])
        k_cache[b, first : first + 4], v_cache[b, first : first + 4] = torch.nan, torch.nan
    assert both.isnan().all()


def test_a_cache_beyond_32_bits(device, isa):
    k_cache = torch.empty(2**20, 16, 2, 80, dtype=torch.bfloat16, device=device)
    v_cache = torch.empty_like(k_cache)
    k, v = torch.randn(2, 1, 1, 2, 80).to(k_cache)
    table = torch.tensor([[7, 900_000]], dtype=torch.int32, device=device)
    append_kv(k_cache, v_cache, k, v, seqlens_kv=table[0, :1] + 10, block_table=table)
    assert_same_bits(k_cache[900_000, 1], k[0, 0])
    assert_same_bits(v_cache[900_000, 1], v[0, 0])


@pytest.mark.checks_values
@pytest.mark.parametrize(
    "used, message",
    [
        (56, r"seqlens_kv: expected values in \[0, 60 - 5\], which .*, got 56 at batch 1"),
        (-1, r"seqlens_kv: expected values in \[0, 60 - 5\], which .*, got -1 at batch 1"),
        (2**40, r"seqlens_kv: expected values in .*, got 1099511627776 at batch 1"),
    ],
)
def test_no_room(device, isa, used, message):
    cache = Cache(device, torch.float32, (3, used), 5)
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        cache.append(torch.int64)
    assert cache.k_cache.isnan().all() and cache.v_cache.isnan().all()


@pytest.mark.checks_values
def test_no_page_and_no_angle(device, isa):
    cache = Cache(device, torch.float32, (3, 20), 5, page_size=16)
    cache.table[1, 2:], cache.table[0, 1:] = -1, 99  # not in use
    pages = cache.k_cache.shape[0]
    cache.append()
    cache.table[1, 1] = pages
    message = rf"^block_table: expected pages in \[0, {pages}\), got {pages} at \[1, 1\]$"
    with pytest.raises(RuntimeError, match=message):
        cache.append()
    cache = Cache(device, torch.float32, (3, 20), 5)
    cos, sin = tables(24, 16, device=device)
    message = "^rotary_cos: expected 25 positions or more for batch 1, got 24$"
    with pytest.raises(RuntimeError, match=message):
        cache.append(rotary_cos=cos, rotary_sin=sin)
    assert cache.k_cache.isnan().all()


INT = torch.int32
GOOD = {
    "k_cache": torch.zeros(2, 9, 3, 16),
    "v_cache": torch.zeros(2, 9, 3, 8),
    "k": torch.zeros(2, 1, 3, 16),
    "v": torch.zeros(2, 1, 3, 8),
    "seqlens_kv": torch.zeros(2, dtype=INT),
    "rotary_cos": torch.zeros(9, 4),
    "rotary_sin": torch.zeros(9, 4),
}
BAD = [
    ("k", None, TypeError, r"k: expected a torch.Tensor, got NoneType"),
    ("k", torch.zeros(2, 1, 3, 16).int(), TypeError, r"v: expected k's dtype torch.int32"),
    ("k", torch.zeros(2, 3, 16), ValueError, r"k: expected 4 dimensions"),
    ("k", torch.zeros(2, 1, 3, 24), ValueError, r"k_cache: expected shape \[2, 9, 3, 24\]"),
    ("k", torch.zeros(2, 1, 3, 32)[..., ::2], ValueError, r"k: expected the last dimension"),
    ("v", torch.zeros(2, 2, 3, 8), ValueError, r"v: expected shape \[2, 1, 3, 'head_dim_v'\]"),
    ("v", torch.zeros(2, 1, 3, 8).half(), TypeError, r"v: expected k's dtype torch.float32"),
    ("k_cache", torch.zeros(3, 9, 3, 16), ValueError, r"k_cache: expected shape \[2, 9, 3, 16\]"),
    ("v_cache", torch.zeros(2, 8, 3, 8), ValueError, r"v_cache: expected shape \[2, 9, 3, 8\]"),
    (
        "v_cache",
        torch.zeros(1, 9, 3, 8).expand(2, -1, -1, -1),
        ValueError,
        r"v_cache: expected its own memory for every element, got stride 0 in dimension 0",
    ),
    ("seqlens_kv", None, TypeError, r"seqlens_kv: expected a torch.Tensor, got NoneType"),
    ("seqlens_kv", torch.zeros(2), TypeError, r"seqlens_kv: expected dtype int32 or int64"),
    ("seqlens_kv", torch.zeros(3, dtype=INT), ValueError, r"seqlens_kv: expected shape \[2\]"),
    ("block_table", torch.zeros(2, 9), TypeError, r"block_table: expected dtype int32 or int64"),
    ("rotary_cos", None, TypeError, r"rotary_cos: expected a torch.Tensor, got NoneType"),
    ("rotary_sin", None, TypeError, r"rotary_sin: expected a torch.Tensor, got NoneType"),
    ("rotary_cos", torch.zeros(9, 9), ValueError, r"rotary_cos: expected shape \[positions, 1 to"),
    ("rotary_sin", torch.zeros(8, 4), ValueError, r"rotary_sin: expected rotary_cos's shape"),
    ("rotary_cos", torch.zeros(9, 4).half(), TypeError, r"rotary_cos: expected dtype torch.float"),
    ("rotary_interleaved", 1, TypeError, r"rotary_interleaved: expected a bool, got 1"),
]


@pytest.mark.parametrize("name, bad, error, message", BAD)
def test_arguments(device, name, bad, error, message):
    good = {n: x.to(device) for n, x in GOOD.items()}
    append_kv(**good)
    with pytest.raises(error, match=f"^{message}"):
        append_kv(**{**good, name: on_device(bad, device)})


@pytest.mark.parametrize("name, bad", [row[:2] for row in BAD if torch.is_tensor(row[1])])
def test_the_op_itself_refuses_too(device, isa, name, bad):
    call = {n: x.to(device) for n, x in GOOD.items()} | {"rotary_interleaved": False}
    call |= {"block_table": None, name: on_device(bad, device)}
    with pytest.raises(RuntimeError, match=r"^\w+: expected"):
        torch.ops.flashinfer_lite.append_kv(**call)


def test_gradients_are_refused_while_grad_mode_is_on(device):
    good = {n: x.to(device).clone() for n, x in GOOD.items()}
    good["k"].requires_grad_()
    with pytest.raises(RuntimeError, match="^k: append_kv is for inference and got a tensor that"):
        append_kv(**good)
    with torch.no_grad():
        append_kv(**good)


def test_compiles_without_a_break(device):
    def step(k_cache, v_cache, k, v, used, cos, sin):
        append_kv(k_cache, v_cache, k, v, seqlens_kv=used, rotary_cos=cos, rotary_sin=sin)
        return k_cache.sum() + v_cache.sum()

    def arguments():
        torch.manual_seed(0)
        tensors = [torch.randn(x.shape, device=device) for n, x in GOOD.items() if "seq" not in n]
        return [*tensors[:4], torch.tensor([0, 8], device=device), *tensors[4:]]

    compiled, eager = arguments(), arguments()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert_same_bits(got, step(*eager))
    for x, y in zip(compiled, eager, strict=True):
        assert_same_bits(x, y)
    op = torch.ops.flashinfer_lite.append_kv.default
    given = arguments()
    torch.library.opcheck(op, (*given[:5], None, *given[5:], False))
