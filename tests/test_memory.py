"""Peak memory, measured in a process of its own: linear in the keys, no more than torch's, no copy
of K or V. And keys that a window leaves out are not even read."""

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
    if op in ("prefill", "torch"):
        return torch.randn(3, 1, seqlen_q, 1, 64).bfloat16().unbind()
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
    if op == "prefill":
        return attention(q, k, v, causal=True)
    if op == "torch":
        return torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
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


def test_prefill_at_32k_needs_no_more_than_torch(device):
    ours, theirs = growth("prefill", 32768), growth("torch", 32768)
    assert 0 < ours <= theirs


# Calls that see a few of many keys, the others in pages that nobody may read: a kernel that visits
# them dies. So the keys read are those of the window and of the block that it begins in, at any
# length, and no clock has to say so.
WINDOW_SCRIPT = """
import ctypes, mmap, sys, torch
from flashinfer_lite import attention, decode, explain
libc, NO_ACCESS = ctypes.CDLL(None, use_errno=True), 0  # PROT_NONE
seqlen, rows, left, token = 8192, 64, 255, 2 * 64 * 4  # bytes of a token: 2 heads of 64 floats
buffers = [mmap.mmap(-1, seqlen * token) for _ in range(2)]
k, v = (torch.frombuffer(x, dtype=torch.float32).view(1, seqlen, 2, 64) for x in buffers)
for x in (k, v):
    x.normal_()

def protect(begin, end, how):
    for x in (k, v):
        length = (end - begin) * token
        address = ctypes.c_void_p(x.data_ptr() + begin * token)
        if length and libc.mprotect(address, ctypes.c_size_t(length), how):
            raise OSError(ctypes.get_errno(), "mprotect")

def rounded(x, unit):
    return x // unit * unit

q, per_page = torch.randn(1, rows, 4, 64), mmap.PAGESIZE // token
for end in (*range(1024, seqlen, 1024), seqlen - 3, seqlen):
    for op, part in ((attention, q), (decode, q[:, :1])):
        newest = torch.tensor([end])
        arguments = {"causal": True, "window": (left, 0), "seqlens_kv": newest}
        expected, block_n = op(part, k, v, **arguments), explain(op, part, k, v).tile[1]
        first = rounded(rounded(end - part.shape[1] - left, block_n), per_page)
        protect(0, first, NO_ACCESS)
        protect(-rounded(-end, per_page), seqlen, NO_ACCESS)
        got = op(part, k, v, **arguments)
        protect(0, seqlen, mmap.PROT_READ | mmap.PROT_WRITE)
        assert got.equal(expected), (op, end)
print("alive")
"""


def test_a_window_reads_its_own_keys_alone(device):
    done = subprocess.run([sys.executable, "-c", WINDOW_SCRIPT], capture_output=True, text=True)
    assert done.stdout.strip() == "alive", f"exit status {done.returncode}: {done.stderr}"
