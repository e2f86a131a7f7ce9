"""What only a device has: CUDA graphs, streams, repeated launches, a second device.

python scripts/gpu/graphs.py --device cuda --json FILE

On the CPU (a dry run) a graph is a plain call and a stream is nothing: the checks themselves run.
"""

import argparse
import contextlib
import functools
import json
import sys
import traceback
from pathlib import Path

import flat
import torch

from flashinfer_lite import append_kv, attention, decode, merge_states
from flashinfer_lite.testing import assert_same_bits, make_qkv

REPEATS = 20
SLEEP_CYCLES = (
    100_000_000  # about 50 ms: long enough for a call on a wrong stream to come too early
)
DTYPE = torch.bfloat16


class Skipped(Exception):
    """The machine lacks what a check is about; the text says what."""


def capture(device, function):
    """Return a function that replays one capture of ``function`` and returns its results."""
    if device.type == "cpu":
        return function
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay():
        for result in results:
            result.fill_(torch.nan)  # a replay that writes nothing must show
        graph.replay()
        return results

    return replay


def calls(device):
    """Return {name: (q, k, v, lengths, function of no arguments)} over tensors that may change."""
    found = {}
    for name, op, seqlen_q, options in (
        ("attention", attention, 70, {"causal": True}),
        ("decode", decode, 1, {}),
        ("decode split", decode, 2, {"kv_splits": 5, "causal": True}),
        ("decode invariant", decode, 1, {"batch_invariant": True}),
    ):
        q, k, v = make_qkv(3, seqlen_q, 700, 8, 2, 128, dtype=DTYPE, device=device)
        ends = torch.tensor([700, 300, 1], dtype=torch.int32, device=device)
        run = functools.partial(op, q, k, v, seqlens_kv=ends, return_lse=True, **options)
        found[name] = q, k, v, ends, run
    return found


def check_graph(device):
    """Replays follow lengths and contents that change between them, bit for bit as eager calls."""
    for name, (q, _, v, ends, run) in calls(device).items():
        replay = capture(device, run)
        for lengths in ([700, 300, 1], [1, 699, 64], [0, 700, 700], [129, 128, 127]):
            ends.copy_(torch.tensor(lengths, dtype=torch.int32))
            q.copy_(torch.randn(q.shape)), v.copy_(torch.randn(v.shape))
            expected = [t.clone() for t in run()]
            for got, wanted in zip(replay(), expected, strict=True):
                assert_same_bits(got, wanted, f"{name} at lengths {lengths}")


def check_graph_with_out(device):
    """decode(out=...) in a graph: each replay writes where the caller said, for each new token."""
    q, k, v = make_qkv(2, 1, 512, 8, 2, 64, dtype=DTYPE, device=device)
    used = torch.zeros(2, dtype=torch.int32, device=device)
    out = torch.full_like(q, torch.nan)

    def step():
        used.add_(1)
        decode(q, k, v, seqlens_kv=used, kv_splits=3, out=out)
        return (out,)

    replay = capture(device, step)
    used.fill_(100)
    for token in range(101, 106):
        replay()
        ends = torch.full_like(used, token)
        assert_same_bits(out, decode(q, k, v, seqlens_kv=ends, kv_splits=3), f"token {token}")


def check_graph_of_a_cache(device):
    """append_kv and decode over pages in a graph: each replay takes the next slot."""
    q, k, v = make_qkv(2, 1, 512, 8, 2, 64, dtype=DTYPE, device=device)
    table = torch.randperm(64, device=device).view(2, 32).int()
    pools = [torch.zeros(64, 16, 2, 64, dtype=DTYPE, device=device) for _ in range(2)]
    used = torch.zeros(2, dtype=torch.int32, device=device)
    new = [torch.empty_like(k[:, :1]) for _ in range(2)]

    def step():
        append_kv(*pools, *new, seqlens_kv=used, block_table=table)
        used.add_(1)
        return decode(q, *pools, seqlens_kv=used, block_table=table, return_lse=True)

    replay = capture(device, step)
    used.zero_()
    for token in range(20):
        new[0].copy_(k[:, token : token + 1]), new[1].copy_(v[:, token : token + 1])
        got = replay()
        ends = torch.full_like(used, token + 1)
        expected = decode(q, k, v, seqlens_kv=ends, return_lse=True)
        for x, y in zip(got, expected, strict=True):
            assert_same_bits(x, y, f"token {token}")


def check_graph_of_a_backward(device):
    """A forward and its gradients in one graph, for contents that change between replays."""
    q, k, v = make_qkv(2, 70, 300, 8, 2, 128, dtype=DTYPE, device=device)
    dout = torch.randn_like(q)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def step():
        out = attention(*leaves, causal=True, deterministic=True)
        return torch.autograd.grad(out, leaves, dout)

    replay = capture(device, step)
    for _ in range(3):
        with torch.no_grad():
            q.copy_(torch.randn(q.shape)), dout.copy_(torch.randn(q.shape))
        expected = [t.clone() for t in step()]
        for got, wanted, name in zip(replay(), expected, ("dq", "dk", "dv"), strict=True):
            assert_same_bits(got, wanted, name)


def check_side_stream(device):
    """A call goes to the current stream: behind what writes its inputs there."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for name, (q, k, v, _, run) in calls(device).items():
        fresh = [torch.randn_like(t) for t in (q, k, v)]
        if stream:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            if stream:
                torch.cuda._sleep(SLEEP_CYCLES)
            for target, source in zip((q, k, v), fresh, strict=True):
                target.copy_(source)
            got = run()
            merged = merge_states([got[0]] * 2, [got[1]] * 2)
        if stream:
            stream.synchronize()
        for x, y in zip(got, run(), strict=True):
            assert_same_bits(x, y, name)
        assert_same_bits(merged[0], merge_states([got[0]] * 2, [got[1]] * 2)[0], f"merge of {name}")


def check_repeats(device):
    """The same bits, call after call, with other work in between."""
    for name, (*_, run) in calls(device).items():
        first = run()
        for _ in range(REPEATS if device.type == "cuda" else 1):
            torch.randn(1 << 20, device=device).sort()
            for x, y in zip(run(), first, strict=True):
                assert_same_bits(x, y, name)


def check_second_device(device):
    """A call on the tensors' device, whatever the current one is: the first device's bits."""
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        raise Skipped("one device")
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        raise Skipped("the second device is of another kind")
    for name, (q, k, v, ends, run) in calls(device).items():
        there = [t.to("cuda:1") for t in (q, k, v, ends)]
        again = functools.partial(run.func, *there[:3], **{**run.keywords, "seqlens_kv": there[3]})
        for x, y in zip(again(), run(), strict=True):
            assert x.device == there[0].device
            assert_same_bits(x.to(device), y, name)


def check_flat_linear(device):
    """A graph's tickets are its own."""
    flat.check_graph(device, capture)


CHECKS = (
    check_graph,
    check_graph_with_out,
    check_graph_of_a_cache,
    check_graph_of_a_backward,
    check_side_stream,
    check_repeats,
    check_flat_linear,
    check_second_device,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda:0" if arguments.device == "cuda" else "cpu")
    outcomes = {}
    for check in CHECKS:
        torch.manual_seed(0)
        name = check.__name__.removeprefix("check_")
        try:
            check(device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            outcomes[name] = "passed"
        except Skipped as reason:
            outcomes[name] = f"skipped: {reason}"
        except Exception as error:
            traceback.print_exc()
            outcomes[name] = f"failed: {str(error).splitlines()[0] if str(error) else error!r}"
        print(f"{name:20} {outcomes[name]}", flush=True)
    arguments.json.write_text(json.dumps(outcomes))
    sys.exit(any(outcome.startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
