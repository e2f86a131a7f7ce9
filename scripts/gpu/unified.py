"""Time a unified maximum against the online softmax over long caches, in turn, from CUDA events.

python scripts/gpu/unified.py [--rounds 30]

Decode with bfloat16, 32 query heads over 8, head_dim 128, and prefill of the same heads; phi lies
within the guard's bounds, and outside of them for what recomputing costs. Results are compared
before anything is timed.
"""

import argparse
import functools
import statistics

import torch

from flashinfer_lite import attention, decode, stats
from flashinfer_lite.testing import make_qkv

SHAPES = {  # name: (op, batch_size, seqlen_q, seqlen_kv)
    **{f"decode {b} x {n}": (decode, b, 1, n) for b in (1, 8) for n in (4096, 32768, 131072)},
    **{f"prefill {n}": (functools.partial(attention, causal=True), 1, n, n) for n in (2048, 8192)},
}


def microseconds(run):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    print(f"{'':20}{'online':>12}{'unified':>12}{'recomputed':>12}  (median us, rows recomputed)")
    for name, (op, batch_size, seqlen_q, seqlen_kv) in SHAPES.items():
        shape = (batch_size, seqlen_q, seqlen_kv, 32, 8, 128)
        qkv = make_qkv(*shape, dtype=torch.bfloat16, device="cuda")
        runs = {
            "online": functools.partial(op, *qkv),
            "unified": functools.partial(op, *qkv, phi=-2.0),
            "recomputed": functools.partial(op, *qkv, phi=200.0),
        }
        online, unified, recomputed = (run() for run in runs.values())
        assert torch.equal(recomputed, online)
        torch.testing.assert_close(unified, online, atol=2e-2, rtol=2e-2)
        stats(reset=True)
        runs["unified"]()
        left = stats(reset=True).rows_recomputed
        times = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                times[key].append(microseconds(run))
        medians = "".join(f"{statistics.median(values):12.1f}" for values in times.values())
        print(f"{name:20}{medians}  {left}")


if __name__ == "__main__":
    main()
