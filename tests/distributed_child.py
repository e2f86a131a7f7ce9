"""Cases of test_distributed.py, which every process of a group runs with the same inputs.

`sharded` is an op on the whole cache that gives each rank its part: so the oracle and its tolerance
are those of decode without a group.
"""

import functools
import itertools
import math
from unittest import mock

import torch
import torch.distributed as dist
from process_groups import case, raises

from flashinfer_lite import decode, explain, reference
from flashinfer_lite.testing import (
    assert_close,
    assert_lse_close,
    assert_same_bits,
    check_forward,
    make_mask,
    make_qkv,
)

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
DTYPES["float16"] = torch.float16
INF = math.inf


def world():
    return dist.group.WORLD


def cuts(keys, count):
    """Where parts of unequal size begin and end, one of them empty where there are four."""
    shares = {1: [1.0], 2: [0.6, 1.0], 4: [0.1, 0.1, 0.7, 1.0]}[count]
    return [0, *(int(share * keys) for share in shares)]


def in_pages(caches, page_size):
    """The caches in pages that lie in another order, and the table of them."""
    pages = -(-caches[0].shape[1] // page_size)
    table = torch.randperm(len(caches[0]) * pages).view(-1, pages)
    paged = []
    for cache in caches:
        spare = pages * page_size - cache.shape[1]
        slots = torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, spare), value=math.nan)
        place = torch.empty_like(table.flatten())
        place[table.flatten()] = torch.arange(table.numel())
        paged.append(slots.unflatten(1, (pages, page_size)).flatten(0, 1)[place])
    return paged, table


def sharded(
    q, k, v, *, mask=None, kv_start=None, seqlens_kv=None, group=None, page_size=None, **options
):
    """decode of the whole cache by the ranks, each with its part and with room for more."""
    group = group or world()
    at = cuts(k.shape[1], dist.get_world_size(group))
    begin, end = list(itertools.pairwise(at))[dist.get_rank(group)]
    spare = 3
    part = [t.new_full((len(t), end - begin + spare, *t.shape[2:]), math.nan) for t in (k, v)]
    for mine, whole in zip(part, (k, v), strict=True):
        mine[:, : end - begin] = whole[:, begin:end]
    used = torch.full((len(q),), k.shape[1]) if seqlens_kv is None else seqlens_kv
    used = (used - begin).clamp(0, end - begin)
    if kv_start is not None:
        options["kv_start"] = torch.minimum((kv_start - begin).clamp(min=0), used)
    if mask is not None:
        if mask.shape[-1] > 1:
            mask = torch.nn.functional.pad(mask[..., begin:end], (0, spare), value=True)
        options["mask"] = mask
    if page_size:
        part, options["block_table"] = in_pages(part, page_size)
        if options.get("mask") is not None and mask.shape[-1] > 1:
            more = options["block_table"].shape[1] * page_size - mask.shape[-1]
            options["mask"] = torch.nn.functional.pad(mask, (0, more), value=True)
    result = decode(q, *part, seqlens_kv=used, process_group=group, **options)
    same_on_all_ranks(result if isinstance(result, tuple) else [result], group)
    return result


def same_on_all_ranks(results, group):
    bits = torch.cat([x.contiguous().flatten().view(torch.uint8) for x in results])
    others = [torch.empty_like(bits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, bits, group=group)
    for rank, other in enumerate(others):
        assert_same_bits(other, bits, f"the result of rank {rank}")


def counted(run):
    """What run() returns, and how often it reduced and gathered tensors."""
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gathered:
            result = run()
    return result, (reduced.call_count, gathered.call_count)


def features(seqlen_q, keys):
    bias = make_mask("additive_inf", (4, seqlen_q, keys))
    slopes = torch.tensor([0.5, 2.0**-4, 0.0, -0.03])
    return {
        "plain": {},
        "causal": {"causal": True},
        "top_left": {"causal": "top_left"},
        "window": {"window": (17, 2)},
        "window_left": {"window": (keys // 2, -1)},
        "window_right": {"window": (-1, 1)},
        "window_causal": {"window": (9, -1), "causal": True},
        "window_top_left": {"window": (2, 1), "causal": "top_left"},
        "softcap": {"softcap": 1.5, "softmax_scale": 0.3},
        "seqlens": {"seqlens_kv": torch.tensor([keys, 0, keys // 4]), "causal": True},
        "window_seqlens": {
            "seqlens_kv": torch.tensor([keys, 1, keys // 2 + 1]),
            "kv_start": torch.tensor([1, 0, keys // 2]),
            "window": (keys // 3, 0),
        },
        "kv_start": {"kv_start": torch.tensor([keys, 0, keys // 2])},
        "bool": {"mask": make_mask("bool", (3, 1, seqlen_q, keys)), "window": (20, 20)},
        "bias": {"mask": bias, "causal": True},
        "one_column": {"mask": make_mask("additive", (4, seqlen_q, 1))},
        "sink": {"sink": torch.tensor([-4.0, 0.5, 3.0, -INF]), "window": (30, 0)},
        "alibi": {"alibi_slopes": slopes},
        "alibi_seqlens": {
            "alibi_slopes": torch.stack([slopes, slopes / 2, -slopes]),
            "seqlens_kv": torch.tensor([keys, 0, keys // 4]),
            "causal": True,
        },
        "alibi_bool": {
            "alibi_slopes": slopes,
            "mask": make_mask("bool", (3, 1, seqlen_q, keys)),
            "causal": "top_left",
        },
        "alibi_bias": {"alibi_slopes": slopes, "mask": bias},
    }


@case(*(f"{name}-{dtype}" for dtype in DTYPES for name in features(1, 1)))
def feature(variant):
    name, dtype = variant.split("-")
    for seqlen_q, keys, heads_kv in ((1, 130, 1), (5, 67, 2), (4, 3, 4)):
        q, k, v = make_qkv(3, seqlen_q, keys, 4, heads_kv, 40, 24, dtype=DTYPES[dtype])
        options = features(seqlen_q, keys)[name]
        check_forward(sharded, q, k, v, **options)
    check_forward(functools.partial(sharded, kv_splits=3), q, k, v, **options)


@case(*(f"{name}-{dtype}" for dtype in ("float32", "bfloat16") for name in features(1, 1)))
def feature_in_pages(variant):
    name, dtype = variant.split("-")
    q, k, v = make_qkv(3, 3, 50, 4, 2, 40, 24, dtype=DTYPES[dtype])
    options = features(3, 50)[name]
    for softmax in ("online", "unified"):
        run = functools.partial(sharded, softmax=softmax)
        out, lse = check_forward(functools.partial(run, page_size=7), q, k, v, **options)
        for x, y in zip(run(q, k, v, **options, return_lse=True), (out, lse), strict=True):
            assert_same_bits(x, y)
    if dtype == "float32":
        run = functools.partial(sharded, page_size=7, impl="reference")
        check_forward(run, q, k, v, **options)


@case()
def gathers_lengths_only_where_positions_count():
    q, k, v = make_qkv(2, 3, 20, 4, 2, 16)
    for options, lengths in (
        ({}, 0),
        ({"causal": True}, 1),
        ({"window": (5, 0)}, 1),
        ({"window": (-1, 4)}, 1),
        ({"alibi_slopes": torch.ones(4)}, 1),
    ):
        local = options | {"process_group": world()}
        _, merges = counted(lambda: decode(q, k, v, **local))  # noqa: B023
        assert merges == (0, 1 + lengths), options
        _, merges = counted(lambda: decode(q[:, :1], k, v, **local))  # noqa: B023
        always = "alibi_slopes" in options or options == {"window": (5, 0)}
        assert merges == (0, 1 + always), options


@case()
def a_window_beyond_everything():
    q, k, v = make_qkv(2, 3, 20, 4, 2, 16)
    end = 2**63 - 1
    assert_same_bits(sharded(q, k, v, window=(end, end)), sharded(q, k, v))
    assert_same_bits(sharded(q, k, v, window=(end, 0)), sharded(q, k, v, causal=True))


@case(*DTYPES)
def lengths_of_each_rank(dtype):
    """The sequence is what the ranks have in use, one after the other, in each batch."""
    count, rank = dist.get_world_size(), dist.get_rank()
    used = torch.randint(0, 9, (count, 3))
    used[0, 1] = used[-1, 2] = 0
    q, k, v = make_qkv(3, 2, 9 * count, 4, 2, 32, dtype=DTYPES[dtype])
    keys, values = (t.unflatten(1, (count, 9)) for t in (k, v))
    whole = [torch.full_like(t, math.nan) for t in (k, v)]
    for b in range(3):
        for together, parts in zip(whole, (keys, values), strict=True):
            row = torch.cat([parts[b, r, : used[r, b]] for r in range(count)])
            together[b, : len(row)] = row

    def run(q, k, v, *, seqlens_kv, **options):
        part = keys[:, rank], values[:, rank]
        return decode(q, *part, seqlens_kv=used[rank], process_group=world(), **options)

    for options in ({}, {"causal": True}, {"window": (4, -1)}, {"window": (3, 1), "softcap": 2.0}):
        check_forward(run, q, *whole, seqlens_kv=used.sum(0), **options)


@case(*DTYPES)
def no_keys_at_all(dtype):
    q, k, v = make_qkv(2, 3, 8, 4, 2, 16, dtype=DTYPES[dtype])
    for softmax in ("online", "unified"):
        run = functools.partial(sharded, softmax=softmax)
        out, lse = check_forward(run, q, k[:, :0], v[:, :0])
        assert not out.any() and (lse == -INF).all()
        hidden = torch.zeros(2, 1, 3, 8, dtype=torch.bool)
        hidden[0, :, 1] = True
        check_forward(run, q, k, v, mask=hidden)
        sink = torch.tensor([0.5, -1.0, -INF, 7.0])
        out, lse = check_forward(run, q, k, v, mask=hidden, sink=sink)
        assert (lse[1] == sink[:, None]).all()
        for empty in ("batch_size", "seqlen_q"):
            shape = {"batch_size": 2, "seqlen_q": 1, "seqlen_kv": 5, empty: 0}
            tensors = make_qkv(**shape, head_dim=16, dtype=DTYPES[dtype])
            (out, lse), merges = counted(lambda: sharded(*tensors, window=(2, 0), return_lse=True))  # noqa: B023
            assert out.shape == tensors[0].shape and lse.numel() == 0


@case(*DTYPES)
def unified_safe(dtype):
    """One all-reduce and no exchange of states."""
    for seqlen_q, heads_kv in ((1, 1), (3, 2)):
        q, k, v = make_qkv(3, seqlen_q, 90, 4, heads_kv, 40, 24, dtype=DTYPES[dtype])
        heads = torch.tensor([-2.0, -3.0, -4.0, -5.0])
        for phi in (-3.0, heads):
            run = functools.partial(sharded, phi=phi)
            (out, lse), merges = counted(lambda: check_forward(run, q, k, v))  # noqa: B023
            # The test itself gathers once.
            assert merges == (1, 1), merges
            if dtype in ("float64", "float32"):  # elsewhere the rounding of out hides it
                assert not torch.equal(out, sharded(q, k, v))
            check_forward(run, q, k, v, causal=True, seqlens_kv=torch.tensor([90, 0, 40]))
            check_forward(run, q, k, v, sink=torch.tensor([-4.0, 0.5, 3.0, -INF]))
            _, merges = counted(
                lambda: check_forward(functools.partial(run, batch_invariant=True), q, k, v)  # noqa: B023
            )
            assert merges == (0, 2)


@case(*(f"{phi}-{dtype}" for dtype in DTYPES for phi in (-100.0, 100.0, -1e300, "heads")))
def unified_useless_phi(variant):
    phi, dtype = variant.rsplit("-", 1)
    q, k, v = make_qkv(3, 2, 90, 4, 2, 40, 24, dtype=DTYPES[dtype])
    mask = make_mask("bool", (3, 4, 2, 90))
    mask[2, :, 1] = False
    phi = torch.tensor([math.nan, INF, -INF, 3e38]) if phi == "heads" else float(phi)
    run = functools.partial(sharded, phi=phi)
    expected = sharded(q, k, v, mask=mask, return_lse=True)
    for x, y in zip(check_forward(run, q, k, v, mask=mask), expected, strict=True):
        assert_same_bits(x, y)  # every row is violated: the online softmax and its merge


@case(*(f"{size}-{dtype}" for dtype in DTYPES for size in (300.0, -300.0, "nan", "large")))
def unified_row_violated_on_one_rank(variant):
    """It is merged anew, and its neighbours keep their bits."""
    size, dtype = variant.rsplit("-", 1)
    q, k, v = make_qkv(2, 3, 80, 4, 2, 32, dtype=DTYPES[dtype])
    run = functools.partial(sharded, phi=-3.0, return_lse=True)
    mask = torch.zeros(2, 4, 3, 80)
    out, lse = run(q, k, v, mask=mask)
    last = cuts(80, dist.get_world_size())[-2]  # slots of the last rank alone
    if size == "nan":
        mask[1, 3, 2, last + 1] = math.nan
    elif size == "large":  # finite scores and values, whose product with exp(lse - phi) is not
        v[1, last + 1, 1, 5] = torch.finfo(v.dtype).max / 2
        mask[1, 2:, :, last + 1] = -INF
        mask[1, 3, 2] = 30.0
    else:
        mask[1, 3, 2, last:] = float(size)
        if float(size) < 0:  # and nothing elsewhere
            mask[1, 3, 2, :last] = -INF
    (got, got_lse), merges = counted(lambda: run(q, k, v, mask=mask))
    row = torch.zeros(2, 3, 4, dtype=torch.bool)
    row[1, 2, 3] = True
    again = size != "large" or dtype != "float16"  # whose largest value is not that large
    assert merges == (1, 1 + again), merges
    oracle, oracle_lse = reference.attention(
        q, k, v, mask=mask, return_lse=True, dtype=torch.float64
    )
    eager = reference.attention(q, k, v, mask=mask)
    assert_close(got[row], oracle[row], eager[row])
    assert_lse_close(got_lse.mT[row], oracle_lse.mT[row])
    if size != "large":
        assert_same_bits(got[~row], out[~row])
        assert_same_bits(got_lse.mT[~row], lse.mT[~row])


@case("nan", "inf")
def a_visible_value_that_is_not_finite_reaches_every_rank(value):
    q, k, v = make_qkv(2, 1, 40, 4, 2, 16)
    v[1, 39, 1, 3] = float(value)
    for softmax in ("online", "unified"):
        out = sharded(q, k, v, softmax=softmax)
        assert not out[1, 0, 2:, 3].isfinite().any()
        out[1, 0, 2:, 3] = 0.0
        assert out.isfinite().all()
        hidden = sharded(q, k, v, softmax=softmax, seqlens_kv=torch.tensor([40, 39]))
        assert hidden.isfinite().all()


@case(*DTYPES)
def batch_invariant(dtype):
    q, k, v = make_qkv(5, 2, 1100, 4, 2, 16, dtype=DTYPES[dtype])
    used = torch.tensor([1100, 1, 0, 700, 900])
    for options in (
        {},
        {"phi": -3.0},
        {"window": (500, 3), "phi": torch.tensor([-3.0, 0, 80, -90])},
    ):
        run = functools.partial(sharded, batch_invariant=True, return_lse=True, **options)
        together = run(q, k, v, seqlens_kv=used)
        for b in range(5):
            one = slice(b, b + 1)
            alone = run(q[one], k[one], v[one], seqlens_kv=used[one])
            for x, y in zip(alone, together, strict=True):
                assert_same_bits(x, y[one])


@case(*DTYPES)
def out_is_written_in_place(dtype):
    q, k, v = make_qkv(2, 2, 60, 4, 2, 40, 24, dtype=DTYPES[dtype])
    for options in ({}, {"phi": -3.0}, {"sink": torch.ones(4)}):
        expected = sharded(q, k, v, causal=True, **options)
        wide = torch.full((2, 4, 3, 30), math.nan, dtype=q.dtype)
        out = wide[:, :, :2, 3:27].transpose(1, 2)
        assert sharded(q, k, v, causal=True, out=out, **options) is out
        assert_same_bits(out, expected)
        out.zero_()
        assert int((~wide.isnan()).sum()) == out.numel()


@case("float64", "float32")
def reference_impl(dtype):
    q, k, v = make_qkv(3, 2, 60, 4, 2, 40, 24, dtype=DTYPES[dtype])
    for options in features(2, 60).values():
        run = functools.partial(sharded, impl="reference", softmax="unified")
        check_forward(run, q, k, v, **options)


@case()
def a_group_of_one():
    q, k, v = make_qkv(2, 2, 60, 4, 2, 16)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    local = functools.partial(decode, q, k, v, causal=True, return_lse=True)
    for x, y in zip(local(process_group=alone), local(), strict=True):
        assert_same_bits(x, y)


@case()
def groups_side_by_side():
    count, rank = dist.get_world_size(), dist.get_rank()
    members = [range(first, first + count // 2) for first in (0, count // 2)]
    groups = [dist.new_group(list(ranks)) for ranks in members]
    which = int(rank in members[1])
    torch.manual_seed(which)
    q, k, v = make_qkv(3, 2, 60, 4, 2, 16)
    check_forward(functools.partial(sharded, group=groups[which]), q, k, v, window=(20, 0))
    with raises(TypeError, "^process_group: expected a .*ProcessGroup that this process belongs"):
        decode(q, k, v, process_group=groups[1 - which])


@case()
def compiled():
    """It breaks the graph, and is refused where that may not be."""
    q, k, v = make_qkv(2, 1, 40, 4, 2, 16)

    def step(q, k, v):
        return decode(q + 1, k, v, process_group=world(), phi=-3.0) * 2

    got = torch.compile(step, backend="aot_eager")(q, k, v)
    assert_same_bits(got, step(q, k, v))
    torch._dynamo.reset()
    with raises(torch._dynamo.exc.Unsupported, "exception"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(q, k, v)


@case()
def explained():
    q, k, v = make_qkv(2, 1, 700, 4, 2, 16)
    for part in (slice(0, 700), slice(0, 0)):
        tensors = q, k[:, part], v[:, part]
        assert explain(decode, *tensors, process_group=world()) == explain(decode, *tensors)
