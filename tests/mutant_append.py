"""The cases of append_kv that mutants must fail."""

import torch
from mutant_cases import Case, _generator

from flashinfer_lite import append_kv
from flashinfer_lite.testing import simt

CAPACITY = 24


def _append(name, used, seqlen_new, page_size=None, rotary=None, change=None, unwritten=()):
    """`unwritten`: (sequence, token) pairs that have no slot, page or angle."""
    generator = _generator(f"append_kv {name}")
    batch_size, outer, slots, table = len(used), len(used), CAPACITY, None
    if page_size:
        pages = CAPACITY // page_size
        outer, slots = batch_size * pages + 1, page_size
        table = torch.randperm(outer, generator=generator)[1:].view(batch_size, pages)
        table = torch.stack((table, table - 1), 2).flatten(1)[:, ::2]
    k, v = (torch.randn(batch_size, seqlen_new, 3, d, generator=generator) for d in (72, 40))
    tensors = [
        *(torch.full((outer, slots, 3, d), torch.nan).bfloat16() for d in (72, 40)),
        *(k.bfloat16(), v.bfloat16()),
    ]
    arguments = {"seqlens_kv": torch.tensor(used, dtype=torch.int32), "block_table": table}
    if rotary:
        rotary_dim, dtype, interleaved, positions = rotary
        angle = 6 * torch.rand(positions, rotary_dim // 2, generator=generator)
        arguments |= {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)}
        arguments["rotary_interleaved"] = interleaved
    wanted = _wanted(tensors, arguments, unwritten)
    if change:
        change(arguments)

    def call(options):
        executor = simt.Executor(tolerate=True, **options)
        return executor.append_kv(*tensors, **arguments), executor.reports

    def check(caches):
        for x, y in zip(caches, wanted, strict=True):
            torch.testing.assert_close(x, y, atol=0.02, rtol=0.01, equal_nan=True)

    return Case(name, "append_kv", call, check)


def _wanted(tensors, arguments, unwritten):
    """The caches afterwards: token by token, those that may be written."""
    k_cache, v_cache, k, v = tensors
    caches = k_cache.clone(), v_cache.clone()
    for b in range(k.shape[0]):
        for t in range(k.shape[1]):
            if (b, t) in unwritten:
                continue
            one = {n: x for n, x in arguments.items() if n not in ("seqlens_kv", "block_table")}
            one["seqlens_kv"] = arguments["seqlens_kv"][b : b + 1] + t
            table = arguments["block_table"]
            one["block_table"] = None if table is None else table[b : b + 1]
            into = caches if table is not None else tuple(x[b : b + 1] for x in caches)
            append_kv(*into, k[b : b + 1, t : t + 1], v[b : b + 1, t : t + 1], **one)
    return caches


def _hostile_lengths(arguments):
    arguments["seqlens_kv"] = torch.tensor([-1, 22, 2**63 - 1])


def _hostile_pages(arguments):
    arguments["block_table"] = arguments["block_table"].clone()
    arguments["block_table"][0, 1], arguments["block_table"][1, 2] = -1, 7


def append_cases():
    halves, pairs = (64, torch.float32, False, 24), (16, torch.bfloat16, True, 24)
    few = (16, torch.float32, False, 16)
    no_slot = {(0, 0), (0, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2)}
    return [
        _append("dense", (0, 21, 7), 3),
        _append("pages", (0, 21, 7), 3, 8),
        _append("rotary", (0, 21, 7), 3, 8, halves),
        _append("rotary by pairs", (0, 21), 3, None, pairs),
        _append("no slot", (0, 22, 0), 3, None, None, _hostile_lengths, no_slot),
        _append("no page", (6, 15), 3, 8, None, _hostile_pages, {(0, 2), (1, 1), (1, 2)}),
        _append("no angle", (6, 15), 3, None, few, None, {(1, 1), (1, 2)}),
    ]
