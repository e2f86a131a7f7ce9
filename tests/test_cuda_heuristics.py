"""The host's choices for the CUDA kernels: pure functions, asked about devices that nobody owns."""

import pytest
import torch
from cuda_coverage import ROWS

from flashinfer_lite.testing import simt

pytestmark = pytest.mark.cpu_only("host code, the same wherever it runs")

SMS = (76, 108, 132, 142)
MIN_KEYS = 128  # per split
KB = 1024
# Compute capability -> shared memory per block and per multiprocessor, KB.
SHARED = {75: (64, 64), 80: (163, 164), 86: (99, 100), 89: (99, 100), 90: (227, 228)}
SHARED |= {100: (227, 228), 120: (99, 100)}


@pytest.fixture(scope="module")
def module():
    return simt.load()


def device_of(arch, num_sms=108, shared=None):
    optin, per_sm = shared or SHARED[arch]
    return simt.load().Device(arch, num_sms, optin * KB, per_sm * KB, 40 * 2**20)


def row_named(name):
    return next(row for row in simt.instances() if row["name"] == name)


@pytest.mark.parametrize("num_sms", SMS)
class TestSplits:
    WORK = (1, 2, 3, 8, 13, 32, 57, 64, 100, 131, 200)
    KEYS = (0, 1, 127, 128, 129, 255, 256, 1000, 4096, 10_000, 131_072, 2**20)

    def fill(self, work, splits, slots):
        return work * splits / (-(-work * splits // slots) * slots)

    def test_no_split_is_shorter_than_the_least(self, device, module, num_sms):
        for work in self.WORK:
            for keys in self.KEYS:
                splits = module.cuda_kv_splits(work, 2 * num_sms, keys)
                assert 1 <= splits <= max(keys // MIN_KEYS, 1)
                assert splits <= 128

    def test_one_where_the_work_fills_the_machine(self, device, module, num_sms):
        for slots in (num_sms, 2 * num_sms):
            for work in (slots, slots + 1, -(-slots * 4 // 5), 10 * slots):
                assert module.cuda_kv_splits(work, slots, 2**20) == 1

    def test_no_work(self, device, module, num_sms):
        assert module.cuda_kv_splits(0, num_sms, 2**20) == 1

    def test_waves_are_nearly_as_full_as_any(self, device, module, num_sms):
        for work in self.WORK:
            for keys in self.KEYS:
                for slots in (num_sms, 2 * num_sms):
                    splits = module.cuda_kv_splits(work, slots, keys)
                    if work * 5 >= slots * 4:
                        continue
                    most = min(max(keys // MIN_KEYS, 1), 128)
                    fills = [self.fill(work, n, slots) for n in range(1, most + 1)]
                    assert fills[splits - 1] >= 0.85 * max(fills)
                    assert all(fill < 0.85 * max(fills) for fill in fills[: splits - 1])

    def test_one_sequence_uses_most_of_the_machine(self, device, module, num_sms):
        splits = module.cuda_kv_splits(8, 2 * num_sms, 2**20)
        assert self.fill(8, splits, 2 * num_sms) > 0.8

    def test_longer_never_means_fewer(self, device, module, num_sms):
        for work in self.WORK:
            chosen = [module.cuda_kv_splits(work, 2 * num_sms, keys) for keys in self.KEYS]
            assert chosen == sorted(chosen)

    def test_more_work_never_means_more(self, device, module, num_sms):
        # Up to a wave boundary: there a split more can fill what a wave left.
        for keys in self.KEYS:
            chosen = [module.cuda_kv_splits(2**i, 2 * num_sms, keys) for i in range(9)]
            assert chosen == sorted(chosen, reverse=True)


def problem(module, batch_size=1, seqlen_q=1, seqlen_kv=4096, heads=(32, 8), head_dim=128):
    p = module.AttentionParams()
    p.batch_size, p.seqlen_q, p.seqlen_kv = batch_size, seqlen_q, seqlen_kv
    p.num_heads_q, p.num_heads_kv = heads
    p.head_dim = p.head_dim_v = head_dim
    return p


@pytest.mark.parametrize("num_sms", SMS)
class TestPlan:
    def plan(self, module, num_sms, kv_splits=0, batch_invariant=False, **sizes):
        p = problem(module, **sizes)
        on = device_of(90, num_sms)
        return module.plan_decode(p, "bfloat16", on, kv_splits, batch_invariant)

    def test_asked_for(self, device, module, num_sms):
        for kv_splits in (1, 2, 7, 4096):
            plan = self.plan(module, num_sms, kv_splits)
            assert (plan.kv_splits, plan.keys_per_split) == (kv_splits, 0)

    def test_chosen(self, device, module, num_sms):
        for batch_size in (1, 4, 64):
            for seqlen_q in (1, 8):
                plan = self.plan(module, num_sms, batch_size=batch_size, seqlen_q=seqlen_q)
                row = row_named(plan.instance)
                work = batch_size * 8 * -(-seqlen_q * 4 // row["block_m"])
                slots = num_sms * min(228 * KB // (row["smem_bytes"] + KB), 2)
                assert plan.kv_splits == module.cuda_kv_splits(work, slots, 4096)
        assert self.plan(module, num_sms, batch_size=64).kv_splits == 1
        assert self.plan(module, num_sms).kv_splits > 4

    def test_batch_invariant_looks_at_the_keys_alone(self, device, module, num_sms):
        for seqlen_kv, splits in ((0, 1), (1, 1), (1024, 1), (1025, 2), (5000, 5)):
            for batch_size in (1, 64):
                sizes = {"seqlen_kv": seqlen_kv, "batch_size": batch_size}
                plan = self.plan(module, num_sms, batch_invariant=True, **sizes)
                assert (plan.kv_splits, plan.keys_per_split) == (splits, 1024)

    def test_too_large(self, device, module, num_sms):
        with pytest.raises(RuntimeError, match="2\\^30 keys, got 1073741825"):
            self.plan(module, num_sms, seqlen_kv=2**30 + 1)
        with pytest.raises(RuntimeError, match="2\\^30 rows .* got 4294967296"):
            self.plan(module, num_sms, seqlen_q=2**30)


@pytest.mark.parametrize("l2_mib", [6, 40, 50])
def test_heads_per_section(device, module, l2_mib):
    l2 = l2_mib * 2**20
    for heads in (1, 7, 64, 4096):
        for bytes_per_head in (0, 1, 2**16, 2**20, 2**28):
            n = module.heads_per_section(heads, bytes_per_head, l2)
            assert 1 <= n <= heads
            assert n == 1 or n * bytes_per_head <= l2 * 5 // 8
            assert n == heads or (n + 1) * bytes_per_head > l2 * 5 // 8
    assert module.heads_per_section(0, 2**20, l2) == 1


def test_division_by_multiplication(device, module):
    """Exact for every dividend of 31 bits: at multiples and beside them, and anywhere."""
    most = 2**31 - 1
    divisors = [*range(1, 300), 2**15 - 1, 2**15 + 1, 2**30 - 1, 2**30, 2**30 + 1, most]
    for divisor in divisors:
        multiples = {k * divisor for k in (0, 1, 2, 1000, 2**20, most // divisor)}
        drawn = torch.randint(most, (50,)).tolist()
        for n in {most, *drawn, *(m + e for m in multiples for e in (-1, 0, 1))}:
            if 0 <= n <= most:
                assert module.divide(n, divisor) == n // divisor, (n, divisor)


KERNELS = ("attention_fwd", "attention_bwd", "decode")
DTYPES = ("bfloat16", "float16", "float32")


def choose(module, kernel, dtype, on, head_dim, head_dim_v=None):
    name = module.choose_attention(kernel, dtype, head_dim, head_dim_v or head_dim, on)
    return row_named(name)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_choice(device, module, arch, kernel, dtype):
    on = device_of(arch)
    optin, per_sm = (n * KB for n in SHARED[arch])
    for head_dim in (8, 64, 72, 128, 136, 192, 256):
        row = choose(module, kernel, dtype, on, head_dim)
        assert (row["kernel"], row["dtype"]) == (kernel, dtype)
        assert row["head_dim"] == (64 if head_dim <= 64 else 128 if head_dim <= 128 else 256)
        assert row["smem_bytes"] <= optin and row["arch"] <= arch
        same = [r for r in simt.instances(kernel) if r["dtype"] == dtype]
        same = [r for r in same if r["head_dim"] == row["head_dim"] and r["smem_bytes"] <= optin]
        if kernel == "attention_bwd":
            assert row == same[0]
        else:  # no other row of that size keeps more warps on a multiprocessor
            warps = {
                r["name"]: max(per_sm // (r["smem_bytes"] + KB), 1) * r["num_warps"] for r in same
            }
            assert warps[row["name"]] == max(warps.values())
        # The wider of the two head sizes decides.
        assert choose(module, kernel, dtype, on, 8, head_dim) == row
        assert choose(module, kernel, dtype, on, head_dim, 8) == row


@pytest.mark.parametrize("arch", [70, 75])
@pytest.mark.parametrize("kernel", KERNELS)
def test_older_than_80_is_refused(device, module, arch, kernel):
    on = device_of(arch, shared=(64, 64))
    text = f"{kernel}: no kernel for head_dim 64 in float16 on compute capability 7.{arch % 10} "
    with pytest.raises(RuntimeError, match=text):
        choose(module, kernel, "float16", on, 64)


def test_wider_than_256_is_refused(device, module):
    for head_dims in ((264, 64), (64, 512)):
        with pytest.raises(RuntimeError, match=f"no kernel for head_dim {max(head_dims)} in"):
            choose(module, "attention_fwd", "bfloat16", device_of(90), *head_dims)


@pytest.mark.parametrize("shared", [48, 64, 99, 163, 227])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_little_shared_memory(device, module, shared, kernel, dtype):
    """What does not fit is refused with both sizes; what fits some row gets one that fits."""
    on = device_of(80, shared=(shared, shared + 1))
    for head_dim in (64, 128, 256):
        rows = [r for r in simt.instances(kernel) if r["dtype"] == dtype]
        least = min(r["smem_bytes"] for r in rows if r["head_dim"] == head_dim)
        if least <= shared * KB:
            assert choose(module, kernel, dtype, on, head_dim)["smem_bytes"] <= shared * KB
            continue
        text = f"{kernel}: head_dim {head_dim} in {dtype} needs {least} bytes .* {shared * KB}: "
        with pytest.raises(RuntimeError, match=text):
            choose(module, kernel, dtype, on, head_dim)


def test_every_device_from_99_kb_runs_every_head(device, module):
    for kernel in KERNELS:
        for dtype in DTYPES:
            for head_dim in (64, 128, 256):
                choose(module, kernel, dtype, device_of(86), head_dim)


def test_every_row_is_the_choice_of_some_device(device, module):
    chosen = {
        choose(module, kernel, dtype, device_of(arch), head_dim)["name"]
        for kernel in KERNELS
        for dtype in DTYPES
        for arch in SHARED
        if arch >= 80
        for head_dim in (64, 128, 256)
    }
    assert chosen == {row.name for row in ROWS if row.kernel in KERNELS}


def test_grid_limit(device, module):
    p = problem(module, batch_size=2**30, heads=(8, 8))
    plan = module.plan_decode(p, "bfloat16", device_of(90), 1, False)
    with pytest.raises(RuntimeError, match="at most 2147483647 thread blocks, got 8589934592"):
        module.decode(p, plan)
