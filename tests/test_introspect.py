"""explain(), stats() and the doctor say what ran."""

import os
import re
import subprocess
import sys

import pytest
import torch

import flashinfer_lite
from flashinfer_lite import attention, decode, explain, stats
from flashinfer_lite.testing import ALL_LEVELS, EMULATED, force_isa, isa_levels, make_qkv

LEVELS = "the levels are the CPU's"


def test_stats_count_calls(device):
    q, k, v = make_qkv(1, 3, 5, device=device, requires_grad=True)
    stats(reset=True)
    assert stats().calls == 0
    out = attention(q, k, v)
    assert stats().calls == 1
    out.sum().backward()
    assert stats().calls == 2
    with torch.no_grad():
        decode(q, k, v)
        decode(q, k, v, kv_splits=2)
    attention(q, k, v, impl="reference")  # not ours, not counted
    counted = stats(reset=True)
    assert counted.calls == 4
    assert counted.rows_checked == counted.rows_recomputed == 0
    assert stats().calls == 0


@pytest.mark.cpu_only(LEVELS)
@pytest.mark.parametrize("name", ["attention", "decode"])
@pytest.mark.parametrize("by_name", [False, True])
def test_explain_names_the_level_in_force(device, isa, name, by_name):
    q, k, v = make_qkv(1, 12, 12, dtype=torch.bfloat16, device=device)
    op = name if by_name else getattr(flashinfer_lite, name)
    calls = stats().calls
    chosen = explain(op, q, k, v, causal=True)
    assert stats().calls == calls  # it runs nothing
    assert isa in chosen.kernel and name in chosen.kernel
    assert len(chosen.tile) == 2 and all(size > 0 for size in chosen.tile)
    assert chosen.kv_splits >= 1
    for level in ALL_LEVELS:
        assert (level == isa) or any(level in kernel for kernel in chosen.rejected)
    assert all(reason for reason in chosen.rejected.values())


@pytest.mark.cpu_only(LEVELS)
def test_explain_names_the_level_whose_code_runs(device, isa):
    q, k, v = make_qkv(1, 12, 12, device=device)
    below = {"avx512-bf16": "avx512", "amx": "avx512"}.get(isa, isa)
    below = "avx2" if isa in EMULATED else below
    for x in (q, q[:, :1, :2].bfloat16()):  # float32, and one row of each head
        chosen = explain(attention, x, k.to(x.dtype), v.to(x.dtype))
        assert chosen.kernel == f"attention cpu {below}"
    below = "avx2" if below == "avx512" else below
    assert explain(attention, q.double(), k.double(), v.double()).kernel.endswith(below)


@pytest.mark.cpu_only(LEVELS)
def test_explain_names_the_level_by_the_number_of_rows(device):
    for level in isa_levels(emulated=True):
        least = {"avx512-bf16": 12, "amx": 3}.get(level.removesuffix("-emulated"), 17)
        for rows in (least - 1, least, 16):
            q, k, v = make_qkv(1, 1, 300, rows, 1, 64, dtype=torch.bfloat16, device=device)
            with force_isa(level):
                chosen = explain(decode, q, k, v)
            on_tiles = least <= rows <= 16
            assert (chosen.tile[1] == 64) == on_tiles  # the plan's own choice
            assert chosen.kernel.endswith(level) == (on_tiles or least == 17)


@pytest.mark.cpu_only("the threads are the CPU's")
def test_explain_splits(device, threads):
    q, k, v = make_qkv(1, 1, 4096, 8, 1, 64, device=device)
    threads(1)
    assert explain(decode, q, k, v).kv_splits == 1
    threads(2)
    assert explain(decode, q, k, v).kv_splits > 1
    assert explain(decode, q, k, v, kv_splits=5).kv_splits == 5
    threads(7)
    assert explain(attention, q, k, v).kv_splits == 1
    invariant = explain(decode, q, k, v, batch_invariant=True).kv_splits
    threads(1)
    assert explain(decode, q, k, v, batch_invariant=True).kv_splits == invariant


@pytest.mark.cuda_only("names CUDA instances")
def test_explain_on_cuda(device):
    q, k, v = make_qkv(1, 1, 65536, 8, 2, 128, device=device, dtype=torch.bfloat16)
    stats(reset=True)
    for op, name in ((attention, "attention_fwd_sm80_bfloat16"), (decode, "decode_sm80_bfloat16")):
        chosen = explain(op, q, k, v)
        assert chosen.kernel.startswith(name) and "cpu" in chosen.rejected
    assert explain(decode, q, k, v).kv_splits > 1  # two heads do not fill a GPU
    assert explain(decode, q, k, v, kv_splits=5).kv_splits == 5
    assert explain(decode, q[:, :0], k, v).kv_splits >= 1
    assert stats().calls == 0  # it runs nothing
    decode(q, k, v)
    assert stats(reset=True).calls == 1


def test_explain_reference(device):
    q, k, v = make_qkv(1, 3, 5, device=device)
    assert "reference" in explain(attention, q, k, v, impl="reference").kernel


def test_explain_refuses_what_the_op_refuses(device):
    q, k, v = make_qkv(1, 3, 5, device=device)
    for bad, error in (
        ({"softcap": -1.0}, ValueError),
        ({"sink": q}, ValueError),
        ({"alibi_slopes": q}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(bad))):
            attention(q, k, v, **bad)
        with pytest.raises(error, match=next(iter(bad))):
            explain(attention, q, k, v, **bad)
    with pytest.raises(ValueError, match="^k: "):
        explain(attention, q, k[..., :8], v)
    with pytest.raises(ValueError, match="^op: "):
        explain("softmax", q, k, v)
    with pytest.raises(TypeError):
        explain(attention, q, k, v, sm_scale=1.0)


def doctor(**environment):
    return subprocess.run(
        [sys.executable, "-m", "flashinfer_lite", "doctor"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_doctor(device):
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (flashinfer_lite.__version__, torch.__version__, flashinfer_lite.cuda_status):
        assert text in done.stdout
    for level in isa_levels():
        assert level in done.stdout
    for name in ("attention", "decode", "unified", "gemv", "flat_gemm"):
        assert re.search(rf"self-test +{name} +bfloat16 .*: ok", done.stdout), name
    assert re.search(r"self-test +passed", done.stdout)


@pytest.mark.skipif(flashinfer_lite.cuda_status == "loaded", reason="the CUDA half is here")
@pytest.mark.cpu_only("makes up a GPU")
def test_doctor_with_a_gpu_and_no_cuda_half(device):
    code = (
        "import runpy, sys, torch\n"
        "torch.version.cuda, torch.cuda.device_count = '13.0', lambda: 1\n"
        "sys.argv = ['flashinfer_lite', 'doctor']\n"
        "runpy.run_module('flashinfer_lite', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"for CUDA tensors: run .make build CUDA=1", done.stdout)
    assert "NOT SOUND" in done.stdout


def test_doctor_and_environment_variable(device):
    assert "level baseline" in doctor(FLASHINFER_LITE_ISA="baseline").stdout
    assert not any(level in doctor().stdout for level in EMULATED)
    done = doctor(FLASHINFER_LITE_ISA="amx9000")
    assert done.returncode == 1
    assert "amx9000" in done.stdout and all(level in done.stdout for level in isa_levels())


def test_absent_level_in_the_environment_fails_at_the_first_call(device):
    code = (
        "import torch, flashinfer_lite as fi\n"
        "x = torch.zeros(1, 1, 1, 8)\n"
        "try: fi.attention(x, x, x)\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FLASHINFER_LITE_ISA": "nosuch"},
        capture_output=True,
        text=True,
    )
    assert "nosuch" in done.stdout and all(level in done.stdout for level in isa_levels())
