"""Small calls of every kernel and feature, each checked: what runs under compute-sanitizer.

python scripts/gpu/cases.py --device cuda

Few and small, because a sanitizer slows a kernel a hundredfold; odd sizes, because those have the
tails and the guards. --unchecked leaves the oracles out: racecheck dies in cuBLAS's products.
"""

import argparse
import functools
import sys

import flat
import torch

from flashinfer_lite import (
    append_kv,
    attention,
    attention_varlen,
    decode,
    merge_states,
    reference,
)
from flashinfer_lite.testing import (
    assert_close,
    assert_same_bits,
    check_backward,
    check_forward,
    make_mask,
    make_qkv,
    make_varlen,
)

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def lengths(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def attention_cases(device):
    """Yield (name, op, q, k, v, arguments)."""
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        for head_dim in (64, 128, 256):
            q, k, v = make_qkv(1, 67, 131, 2, 1, head_dim, dtype=dtype, device=device)
            yield f"attention {dtype} {head_dim}", attention, q, k, v, {"causal": True}
    q, k, v = make_qkv(2, 37, 53, 4, 2, 72, 40, dtype=BFLOAT16, device=device)
    ends, starts = lengths(device, 53, 20), lengths(device, 2, 20)
    for name, arguments in {
        "window": {"window": (9, 4), "causal": True},
        "lengths": {"seqlens_kv": ends, "kv_start": starts, "causal": "top_left"},
        "softcap": {"softcap": 8.0},
        "mask": {"mask": make_mask("additive_inf", (4, 37, 53), device=device)},
        "bool mask": {"mask": make_mask("bool", (2, 1, 1, 53), device=device)},
    }.items():
        yield f"attention {name}", attention, q, k, v, arguments
    for layout in ("misaligned", "capacity", "fused", "expand"):
        tensors = make_qkv(2, 33, 33, 2, 2, 64, dtype=FLOAT16, device=device, layout=layout)
        yield f"attention {layout}", attention, *tensors, {"causal": True}


def ragged_cases(device):
    """Yield (name, op, q, k, v, arguments): sequences without rows or keys, and tails."""
    lengths_q, lengths_kv = [0, 67, 1, 5, 130, 0], [3, 131, 40, 0, 129, 0]
    starts, ends = lengths(device, 1, 9, 0, 0, 64, 0), lengths(device, 3, 120, 40, 0, 127, 0)
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        for head_dim in (64, 128, 256):
            options = {"head_dim": head_dim, "dtype": dtype, "device": device, "tails": (2, 3)}
            q, k, v, offsets = make_varlen(lengths_q, lengths_kv, 2, 1, **options)
            arguments = {**offsets, "causal": True}
            yield f"varlen {dtype} {head_dim}", attention_varlen, q, k, v, arguments
    q, k, v, offsets = make_varlen(
        lengths_q,
        lengths_kv,
        6,
        2,
        72,
        40,
        dtype=BFLOAT16,
        device=device,
        offsets_dtype=torch.int64,
    )
    for name, arguments in {
        "window": {"window": (9, 4)},
        "lengths": {"seqlens_kv": ends, "kv_start": starts, "causal": "top_left"},
        "softcap": {"softcap": 8.0},
    }.items():
        yield f"varlen {name}", attention_varlen, q, k, v, {**offsets, **arguments}


def ragged_backward_cases(device):
    for deterministic in (False, True):
        op = functools.partial(attention_varlen, deterministic=deterministic)
        label = "deterministic" if deterministic else "atomic"
        for name, _, q, k, v, arguments in ragged_cases(device):
            yield f"backward {label} {name}", op, *map(torch.nan_to_num, (q, k, v)), arguments


def backward_cases(device):
    """Yield (name, op, q, k, v, arguments); masks that require grad are given theirs."""
    for deterministic in (False, True):
        op = functools.partial(attention, deterministic=deterministic)
        label = "deterministic" if deterministic else "atomic"
        for dtype in (BFLOAT16, FLOAT16, FLOAT32):
            for head_dim in (64, 128, 256):
                tensors = make_qkv(1, 67, 131, 2, 1, head_dim, dtype=dtype, device=device)
                yield f"backward {label} {dtype} {head_dim}", op, *tensors, {"causal": True}
        q, k, v = make_qkv(2, 37, 53, 4, 2, 72, 40, dtype=BFLOAT16, device=device)
        ends, starts = lengths(device, 53, 20), lengths(device, 2, 20)
        bias = make_mask("additive_inf", (4, 37, 53), device=device).requires_grad_()
        for name, arguments in {
            "window": {"window": (9, 4)},
            "lengths": {"seqlens_kv": ends, "kv_start": starts, "causal": "top_left"},
            "softcap, mask": {"softcap": 8.0, "mask": bias},
        }.items():
            yield f"backward {label} {name}", op, q, k, v, arguments
    for layout in ("misaligned", "capacity", "fused", "expand"):
        tensors = make_qkv(2, 33, 33, 2, 2, 64, dtype=FLOAT16, device=device, layout=layout)
        yield f"backward {layout}", attention, *tensors, {"causal": True}


def decode_cases(device):
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        for head_dim in (64, 128, 256):
            tensors = make_qkv(2, 1, 261, 8, 2, head_dim, dtype=dtype, device=device)
            for kv_splits in (1, 3):
                op = functools.partial(decode, kv_splits=kv_splits)
                yield f"decode {dtype} {head_dim} splits {kv_splits}", op, *tensors, {}
    q, k, v = make_qkv(3, 3, 300, 6, 2, 40, 72, dtype=BFLOAT16, device=device, layout="capacity")
    ends = lengths(device, 300, 0, 129)
    for name, op in {
        "lengths": functools.partial(decode, kv_splits=7),
        "invariant": functools.partial(decode, batch_invariant=True),
    }.items():
        yield f"decode {name}", op, q, k, v, {"seqlens_kv": ends, "causal": True}


def unified_cases(device):
    """Within the guard's bounds, out of them for every row, and for one head of four."""
    phi = -5.0
    by_head = torch.tensor([phi, 90.0, phi, phi], device=device)
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        for head_dim in (64, 128, 256):
            q, k, v = make_qkv(2, 37, 261, 4, 2, head_dim, dtype=dtype, device=device)
            for name, value in {"in": phi, "out": 90.0, "by head": by_head}.items():
                label = f"{dtype} {head_dim} unified {name}"
                op = functools.partial(attention, phi=value)
                yield f"attention {label}", op, q, k, v, {"causal": True}
                for kv_splits in (1, 3):
                    op = functools.partial(decode, phi=value, kv_splits=kv_splits)
                    yield f"decode {label} splits {kv_splits}", op, q[:, :2], k, v, {}


def run_merge(device):
    for dtype in (BFLOAT16, FLOAT32):
        outs = torch.randn(5, 2, 3, 4, 72, device=device).to(dtype)
        lses = torch.randn(5, 2, 4, 3, device=device)
        lses[2], lses[:, 1, 0] = -torch.inf, -torch.inf
        out, _ = merge_states(outs, lses)
        oracle, _ = reference.merge_states(outs.double(), lses.double())
        assert_close(out, oracle, reference.merge_states(outs, lses)[0])


def run_pages(device):
    """Pages of no power of two, of more than a tile and of one slot: the dense cache's bits."""
    ends, sink = lengths(device, 261, 130), torch.randn(4, device=device)
    for dtype, page_size in ((BFLOAT16, 16), (FLOAT16, 5), (BFLOAT16, 256), (FLOAT32, 1)):
        pages = -(-261 // page_size)
        table = torch.randperm(2 * pages, device=device).view(2, pages)
        pool = make_qkv(2 * pages, 1, page_size, 4, 2, 64, 40, dtype=dtype, device=device)[1:]
        dense = [reference.gather_pages(x, table) for x in pool]
        q = torch.randn(2, 1, 4, 64, device=device).to(dtype)
        for arguments in ({"kv_splits": 1}, {"kv_splits": 3}, {"sink": sink}, {"phi": -5.0}):
            got = decode(q, *pool, seqlens_kv=ends, block_table=table, **arguments)
            wanted = decode(q, *dense, seqlens_kv=ends, **arguments)
            assert_same_bits(got, wanted, f"pages of {page_size}, {dtype}")


def run_append(device):
    """New tokens, rotated, into pages and into a dense cache."""
    angle = torch.rand(64, 8, device=device)
    used = lengths(device, 19, 0, 41)
    table = torch.randperm(9, device=device).view(3, 3)
    for dtype in (BFLOAT16, FLOAT32):
        for outer, slots, block_table in ((9, 20, table), (3, 60, None)):
            caches = [torch.zeros(outer, slots, 2, d, device=device, dtype=dtype) for d in (40, 24)]
            new = [torch.randn(3, 5, 2, d, device=device).to(dtype) for d in (40, 24)]
            arguments = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
            append_kv(*caches, *new, seqlens_kv=used, block_table=block_table, **arguments)
            written = caches[1]
            if block_table is not None:
                written = written[block_table].flatten(1, 2)
            for b, start in enumerate(used.tolist()):
                assert torch.equal(written[b, start : start + 5], new[1][b])


def run_forward(op, q, k, v, **arguments):
    op(q, k, v, **arguments, return_lse=True)


def run_backward(op, q, k, v, **arguments):
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = op(*leaves, **arguments, return_lse=True)
    mask = arguments.get("mask")
    leaves += [] if mask is None else [mask]
    torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--few", action="store_true", help="one case of each op")
    parser.add_argument("--unchecked", action="store_true", help="run them without the oracles")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    failures = count = 0
    checks = (check_forward, check_backward)
    forward, backward = (run_forward, run_backward) if arguments.unchecked else checks
    for check, cases in (
        (forward, attention_cases(device)),
        (backward, backward_cases(device)),
        (forward, ragged_cases(device)),
        (backward, ragged_backward_cases(device)),
        (forward, decode_cases(device)),
        (forward, unified_cases(device)),
    ):
        for name, op, q, k, v, options in cases:
            count += 1
            try:
                check(op, q, k, v, **options)
            except AssertionError as error:
                failures += 1
                print(f"{name}: {error}", flush=True)
            if arguments.few:
                break
    run_merge(device)
    run_pages(device)
    run_append(device)
    for _, run in flat.cases(device, arguments.few, arguments.unchecked):
        count += 1
        try:
            run()
        except AssertionError as error:
            failures += 1
            print(error, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{count + 3} cases ran, {failures} wrong", flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
