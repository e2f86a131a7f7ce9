"""flash_attn_with_kvcache(): every argument, against an oracle that builds what it means."""

import pytest
import torch

from flashinfer_lite import flash_attn_with_kvcache, reference
from flashinfer_lite.testing import assert_close, assert_lse_close, assert_same_bits

BATCH, CAPACITY, HEADS_Q, HEADS_KV, HEAD_DIM, HEAD_DIM_V = 3, 96, 4, 2, 32, 24
all_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:]
)


def rotate(x, angles, positions, interleaved):
    """By complex numbers; angles [positions, dim / 2], positions [batch, seqlen]."""
    dim = 2 * angles.shape[1]
    turn = torch.polar(torch.ones_like(angles), angles)[positions].unsqueeze(2)
    head = x[..., :dim].double()
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else torch.stack(head.chunk(2, -1), -1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    head = turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)
    return torch.cat((head.to(x.dtype), x[..., dim:]), -1)


class Problem:
    def __init__(self, device, dtype, seqlen_q=2, seqlen_new=2, page_size=None, batch_cache=None):
        def randn(*shape):
            return torch.randn(shape).to(device=device, dtype=dtype)

        self.table = None
        outer, slots = batch_cache or BATCH, CAPACITY
        if page_size:
            pages = -(-CAPACITY // page_size)
            outer, slots = BATCH * pages + 1, page_size
            self.table = torch.randperm(outer)[:-1].view(BATCH, pages).to(device, torch.int32)
        self.k_cache = randn(outer, slots, HEADS_KV, HEAD_DIM)
        self.v_cache = randn(outer, slots, HEADS_KV, HEAD_DIM_V)
        self.q = randn(BATCH, seqlen_q, HEADS_Q, HEAD_DIM)
        self.k = randn(BATCH, seqlen_new, HEADS_KV, HEAD_DIM)
        self.v = randn(BATCH, seqlen_new, HEADS_KV, HEAD_DIM_V)
        self.used = torch.tensor([70, 0, 33], dtype=torch.int32, device=device)
        self.angles = torch.rand(CAPACITY, 8, dtype=torch.float64, device=device) * 6

    def rotary(self, dtype=None):
        dtype = dtype or (torch.float64 if self.q.dtype == torch.float64 else torch.float32)
        return {
            "rotary_cos": self.angles.cos().to(dtype),
            "rotary_sin": self.angles.sin().to(dtype),
        }

    def dense(self, batch_idx=None):
        """Copies of each sequence's cache."""
        if self.table is not None:
            return [reference.gather_pages(x, self.table) for x in (self.k_cache, self.v_cache)]
        index = slice(None) if batch_idx is None else batch_idx.long()
        return [x[index].clone() for x in (self.k_cache, self.v_cache)]

    def oracle(self, caches, new=True, rotary=None, interleaved=True, dtype=None, **arguments):
        """(out, lse) of caches that get the new tokens."""
        k_cache, v_cache = caches
        q, k, end = self.q, self.k, self.used.long()
        if new:
            slots = end[:, None] + torch.arange(k.shape[1], device=end.device)
            if rotary:
                rows = torch.arange(q.shape[1], device=end.device)
                moves = arguments.get("causal") or arguments.get("window", (-1, -1)) != (-1, -1)
                k = rotate(k, self.angles, slots, interleaved)
                q = rotate(q, self.angles, end[:, None] + rows * bool(moves), interleaved)
            batch = torch.arange(BATCH, device=end.device)[:, None]
            k_cache[batch, slots], v_cache[batch, slots] = k, self.v
            end = end + k.shape[1]
        tensors = (x.to(dtype) if dtype else x for x in (q, k_cache, v_cache))
        return reference.attention(*tensors, seqlens_kv=end, return_lse=True, **arguments)

    def check(self, got, batch_idx=None, **arguments):
        caches = self.dense(batch_idx)
        oracle, oracle_lse = self.oracle(
            [x.clone() for x in caches], dtype=torch.float64, **arguments
        )
        eager, _ = self.oracle(caches, **arguments)
        assert_close(got[0], oracle, eager)
        assert_lse_close(got[1], oracle_lse)


def call(problem, new=True, **arguments):
    tensors = (problem.k, problem.v) if new else (None, None)
    return flash_attn_with_kvcache(
        *(problem.q, problem.k_cache, problem.v_cache, *tensors),
        **{"cache_seqlens": problem.used, "block_table": problem.table, **arguments},
        return_softmax_lse=True,
    )


@all_dtypes
@pytest.mark.parametrize("page_size", [None, 1, 16, 19])
@pytest.mark.parametrize("seqlen_q, seqlen_new", [(1, 1), (2, 2), (5, 3), (2, 9)])
def test_append_and_attend(device, isa, dtype, page_size, seqlen_q, seqlen_new):
    for causal, window in ((True, (-1, -1)), (False, (-1, -1)), (True, (20, 0)), (False, (9, 1))):
        problem = Problem(device, dtype, seqlen_q, seqlen_new, page_size)
        before = problem.dense()
        got = call(problem, causal=causal, window_size=window, softcap=20.0)
        arguments = {"causal": causal, "window": window, "softcap": 20.0}
        problem.check(got, **arguments)
        for x, y, new in zip(before, problem.dense(), (problem.k, problem.v), strict=True):
            for b, first in enumerate(problem.used.tolist()):
                x[b, first : first + seqlen_new] = new[b]
            assert_same_bits(y, x)  # what is behind the new tokens, too, is as it was


@all_dtypes
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("page_size", [None, 16])
def test_rotary(device, isa, dtype, interleaved, page_size):
    for causal, window in ((True, (-1, -1)), (False, (-1, -1)), (False, (9, 3))):
        problem = Problem(device, dtype, 3, 3, page_size)
        arguments = {"causal": causal, "interleaved": interleaved, "window": window}
        caches = problem.dense()
        got = call(
            problem,
            causal=causal,
            window_size=window,
            rotary_interleaved=interleaved,
            **problem.rotary(),
        )
        oracle, oracle_lse = problem.oracle(
            [x.clone() for x in caches], rotary=True, dtype=torch.float64, **arguments
        )
        eager, _ = problem.oracle(caches, rotary=True, **arguments)
        assert_close(got[0], oracle, eager)
        # A key's last bit may be rounded the other way.
        atol = 2e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(got[1].double(), oracle_lse.double(), atol=atol, rtol=1e-5)


def test_rotary_is_interleaved_unless_told_otherwise(device):
    outs = []
    for arguments in ({}, {"rotary_interleaved": True}, {"rotary_interleaved": False}):
        torch.manual_seed(1)
        problem = Problem(device, torch.float32)
        outs.append(call(problem, **problem.rotary(), **arguments)[0])
    assert_same_bits(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_batch_idx(device, isa, index_dtype):
    problem = Problem(device, torch.float32, batch_cache=7)
    index = torch.tensor([5, 0, 3], dtype=index_dtype, device=device)
    others = torch.tensor([1, 2, 4, 6], device=device)
    before = problem.k_cache[others].clone()
    caches = problem.dense(index)
    got = call(problem, cache_batch_idx=index, causal=True)
    oracle, oracle_lse = problem.oracle(caches, dtype=torch.float64, causal=True)
    assert_close(got[0], oracle, oracle.float())
    assert_lse_close(got[1], oracle_lse)
    assert_same_bits(problem.k_cache[others], before)
    assert_same_bits(problem.k_cache[5, 70:72], problem.k[0])


@pytest.mark.checks_values
def test_a_batch_idx_that_is_not_there(device, isa):
    problem = Problem(device, torch.float32, batch_cache=7)
    index = torch.tensor([5, 0, 7], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"expected pages in \[0, 7\), got 7"):
        call(problem, cache_batch_idx=index, causal=True)


@pytest.mark.parametrize("page_size", [None, 16])
def test_leftpad_and_splits(device, isa, page_size):
    problem = Problem(device, torch.float32, page_size=page_size)
    pad = torch.tensor([11, 0, 33], dtype=torch.int32, device=device)
    for num_splits in (0, 1, 4):
        got = call(problem, cache_leftpad=pad, num_splits=num_splits, causal=True)
        problem.check(got, causal=True, kv_start=pad)


@pytest.mark.parametrize("page_size", [None, 16])
def test_alibi(device, isa, page_size):
    """Positions count to the end of each sequence, new tokens included; padding moves none."""
    problem = Problem(device, torch.float32, page_size=page_size)
    pad = torch.tensor([11, 0, 33], dtype=torch.int32, device=device)
    for slopes in (torch.rand(HEADS_Q), torch.rand(BATCH, HEADS_Q)):
        options = {"causal": True, "alibi_slopes": slopes.to(device)}
        got = call(problem, cache_leftpad=pad, num_splits=3, **options)
        problem.check(got, kv_start=pad, **options)


def test_lengths_by_number_and_by_default(device, isa):
    problem = Problem(device, torch.float32)
    problem.used = torch.full_like(problem.used, 40)
    problem.check(call(problem, cache_seqlens=40, causal=True), causal=True)
    problem.used = torch.full_like(problem.used, CAPACITY)
    got = call(problem, new=False, cache_seqlens=None)
    problem.check(got, new=False)
    out = flash_attn_with_kvcache(problem.q, problem.k_cache, problem.v_cache)
    assert_same_bits(out, got[0])


def test_what_is_not_in_use_may_hold_anything(device, isa):
    problem = Problem(device, torch.bfloat16, page_size=16)
    torch.manual_seed(3)
    clean = call(problem, causal=True)
    end = (problem.used + 2).tolist()
    for b in range(BATCH):
        for j in range(end[b], CAPACITY):
            page = problem.table[b, j // 16]
            problem.k_cache[page, j % 16] = torch.nan
            problem.v_cache[page, j % 16] = torch.inf
    again = call(problem, causal=True)
    assert_same_bits(again[0], clean[0])


def test_arguments(device):
    problem = Problem(device, torch.float32)
    q, k_cache, v_cache, k, v = (
        getattr(problem, name) for name in ("q", "k_cache", "v_cache", "k", "v")
    )
    before = k_cache.clone()
    table = torch.zeros(BATCH, 3, dtype=torch.int32, device=device)
    index = torch.zeros(BATCH, dtype=torch.int32, device=device)
    for arguments, error, message in (
        ({"k": k}, ValueError, "v: expected k and v together"),
        ({"v": v}, ValueError, "v: expected k and v together"),
        ({"k": k, "v": v}, ValueError, "cache_seqlens: expected lengths with k, got None"),
        (problem.rotary(), ValueError, "rotary_cos: expected None without k"),
        ({"cache_seqlens": 1.5}, TypeError, "cache_seqlens: expected an int or a torch.Tensor"),
        ({"cache_seqlens": True}, TypeError, "cache_seqlens: expected an int or a torch.Tensor"),
        (
            {"cache_batch_idx": index, "block_table": table},
            ValueError,
            "cache_batch_idx: expected None with block_table",
        ),
        (
            {"k": k, "v": v, "cache_seqlens": 3, "alibi_slopes": index.float()[:1]},
            ValueError,
            "alibi_slopes: expected shape",
        ),
    ):
        with pytest.raises(error, match=f"^{message}"):
            flash_attn_with_kvcache(q, k_cache, v_cache, **arguments)
    assert_same_bits(k_cache, before)


@pytest.mark.checks_values
def test_no_room(device):
    problem = Problem(device, torch.float32)
    before = problem.k_cache.clone()
    message = r"seqlens_kv: expected values in \[0, 96 - 2\], which leave room for k's tokens, got"
    with pytest.raises(RuntimeError, match=f"^{message}"):
        call(problem, cache_seqlens=CAPACITY - 1)
    assert_same_bits(problem.k_cache, before)
