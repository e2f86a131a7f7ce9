"""Peak memory, measured in a process of its own: linear in the keys, and no copy of K or V."""

import subprocess
import sys

import pytest

# Prints the bytes by which the peak of the process grows in the call, K and V being there before.
# The high-water mark is reset first, where the kernel offers that.
SCRIPT = """
import sys, torch
from flashinfer_lite import attention, decode, scaled_dot_product_attention
op, seqlen, layout = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(2)

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def inputs(seqlen_q, seqlen_kv):
    q = torch.full((1, seqlen_q, 4, 64), 0.1)
    k = torch.full((1, seqlen_kv, 2, 64), 0.1)
    if layout == "bhsd":
        k = torch.full((1, 2, seqlen_kv, 64), 0.1).transpose(1, 2)
    return q, k, k.clone(memory_format=torch.preserve_format)

def run(q, k, v):
    if op == "decode":
        return decode(q[:, :1], k, v)
    if op == "masked":
        return attention(q[:, :64], k, v, mask=torch.zeros(()).expand(64, k.shape[1]))
    if op == "sdpa":
        return scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q[:, :64], k, v)), enable_gqa=True
        )
    if op == "forward":
        return attention(q, k, v, causal=True, window=(256, -1))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, causal=True, window=(256, -1))
    return torch.autograd.grad(out, leaves, torch.ones(()).expand_as(out).contiguous())

run(*inputs(128, 128))  # lazy initialisation, thread pools
tensors = inputs(seqlen, seqlen)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
result = run(*tensors)
print(status("VmHWM") - before)
"""

ROW = 64 * 4  # bytes of one head of one token


def growth(op, seqlen, layout="contiguous"):
    command = [sys.executable, "-c", SCRIPT, op, str(seqlen), layout]
    done = subprocess.run(command, capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("this kernel cannot reset the peak of a process (/proc/self/clear_refs)")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_linear_in_the_sequence(device, op):
    # out and lse; for the backward also dout, dq, dk, dv and one accumulator of dq.
    at_16k, at_32k = growth(op, 16384), growth(op, 32768)
    assert at_32k <= 2 * 1.1 * at_16k
    per_token = {"forward": 4 * ROW + 16, "backward": 3 * 4 * ROW + 4 * ROW + 2 * 2 * ROW + 64}[op]
    assert at_32k <= 1.1 * 32768 * per_token + 4 * 2**20


@pytest.mark.parametrize("layout", ["contiguous", "bhsd"])
@pytest.mark.parametrize("op", ["decode", "masked", "sdpa"])
def test_no_copy_of_k_or_v(device, op, layout):
    # K and V are 64 MB here; what is kept of them is a tile per thread.
    assert growth(op, 65536, layout) < 8 * 2**20
