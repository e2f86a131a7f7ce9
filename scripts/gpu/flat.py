"""flat_linear on a device: small checked calls, its tickets in CUDA graphs, and its times.

python scripts/gpu/flat.py --device cuda --json FILE

The times: the layers of Llama-2-7B for a few rows of x, cold weights, against
torch.nn.functional.linear (cuBLAS). Outputs are checked against float64 first.
"""

import argparse
import functools
import itertools
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from flashinfer_lite import flat_linear, reference
from flashinfer_lite.testing import assert_close, assert_same_bits

KERNELS = ("gemv", "flat_gemm")
ROWS = (1, 2, 4, 8, 16, 32, 64)
LLAMA2_7B = ((12288, 4096), (4096, 4096), (11008, 4096), (4096, 11008))  # [N, K]
MAX_COPIES_BYTES = 1 << 30


def make(m, n, k, dtype, device):
    x, weight, bias = (torch.randn(shape) + 0.5 for shape in ((m, k), (n, k), (n,)))
    return [t.to(device, dtype) for t in (x, weight, bias)]


def check(x, weight, bias, impl, name, unchecked=False):
    if unchecked:
        flat_linear(x, weight, bias, impl=impl)
        return
    oracle = reference.linear(x.double(), weight.double(), bias.double())
    assert_close(flat_linear(x, weight, bias, impl=impl), oracle, F.linear(x, weight, bias), name)


def cases(device, few=False, unchecked=False):
    """Yield (name, function that raises AssertionError): every row of the table, its tails, its
    splits, and what does not begin on 16 bytes."""
    for impl, dtype in itertools.product(KERNELS, (torch.bfloat16, torch.float16)):
        for m, n, k in ((1, 70, 1100), (2, 9, 203), (4, 131, 264), (9, 21, 136), (33, 140, 1064)):
            for by in (0, 1):
                x, weight, bias = make(m, n, k + by, dtype, device)
                tensors = x[:, by:], weight[:, by:], bias
                name = f"{impl} {dtype} {m} {n} {k} shifted by {by}"
                yield name, functools.partial(check, *tensors, impl, name, unchecked)
                if few:
                    return


def check_graph(device, capture):
    """Two calls that split K in one graph, replayed beside an eager one on another stream."""
    x, weight, bias = make(5, 70, 4096, torch.bfloat16, device)
    more = [t.clone() for t in (x, weight)]

    def run():
        first = flat_linear(x, weight, bias, impl="flat_gemm")
        return first, flat_linear(first.expand(5, 70), weight[:, :70], impl="flat_gemm")

    replay = capture(device, run)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for _ in range(4):
        x.copy_(torch.randn(x.shape))
        expected = [t.clone() for t in run()]
        alone = flat_linear(*more, impl="flat_gemm")
        if side:
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                beside = [flat_linear(*more, impl="flat_gemm") for _ in range(20)]
        else:
            beside = [alone]
        for got, wanted in zip(replay(), expected, strict=True):
            assert_same_bits(got, wanted, "flat_gemm in a graph")
        if side:
            torch.cuda.current_stream(device).wait_stream(side)
        for got in beside:
            assert_same_bits(got, alone, "flat_gemm beside a graph")


def times(machine, shapes, rows, dtype, deadline):
    """Yield a dict for each shape and M: the seconds of each kernel and of cuBLAS."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    from timing import quantile, time_interleaved

    for n, k in shapes:
        size = n * k * dtype.itemsize
        copies = max(2, min(4 * machine.last_level_bytes // size + 1, MAX_COPIES_BYTES // size))
        weight = torch.randn(n, k, device=machine.device).to(dtype)
        weights = [weight.clone() for _ in range(copies)]
        for m in rows:
            if time.monotonic() > deadline:
                return
            x = torch.randn(m, k, device=machine.device).to(dtype)
            some, bias = weight[:: max(n // 256, 1)], x.new_zeros(-(-n // max(n // 256, 1)))
            for impl in KERNELS:
                check(x, some, bias[: some.shape[0]], impl, f"{impl} {m} {n} {k}")
            runs = [in_turn(x, weights, impl) for impl in (*KERNELS, "vendor")]
            modes, measures = zip(*machine.measures(runs, copies, False), strict=True)
            samples = time_interleaved(measures, machine.default_seconds / 3, machine.min_rounds)
            names = (*KERNELS, "vendor")
            medians = {name: quantile(s, 0.5) for name, s in zip(names, samples, strict=True)}
            yield {"n": n, "k": k, "m": m, "modes": modes, "seconds": medians, "bytes": size}


def in_turn(x, weights, impl):
    """A function that multiplies with the next of the weights, which no cache can hold all."""
    turn = itertools.cycle(weights)
    return lambda: flat_linear(x, next(turn), impl=impl)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--within", type=float, default=30, help="seconds; begin nothing after")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.within
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    import device

    torch.manual_seed(0)
    dry = arguments.device == "cpu"
    machine = device.StandIn() if dry else device.Gpu()
    shapes, rows = (((48, 64),), (1, 8)) if dry else (LLAMA2_7B, ROWS)
    found = []
    for row in times(machine, shapes, rows, torch.bfloat16, deadline):
        found.append(row)
        cells = " ".join(f"{name} {s * 1e6:8.1f} us" for name, s in row["seconds"].items())
        print(f"{row['n']:6} x {row['k']:<6} M {row['m']:<3} {cells}", flush=True)
    arguments.json.write_text(json.dumps(found))
    print(f"{len(found)} of {len(shapes) * len(rows)} shapes", flush=True)


if __name__ == "__main__":
    main()
