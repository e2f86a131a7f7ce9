"""What would run, what ran, and whether this installation is sound."""

import functools
import inspect
import os
import platform
import time
from dataclasses import dataclass, field

import torch

from flashinfer_lite import _check, _dtensor, _ops, distributed, reference
from flashinfer_lite.attention import attention, prepare
from flashinfer_lite.dataflow.choice import explain_choice, report
from flashinfer_lite.decode import check_decode, decode
from flashinfer_lite.gemm import KERNELS as FLAT_KERNELS
from flashinfer_lite.gemm import choose_kernel, flat_linear, under_autocast
from flashinfer_lite.varlen import attention_varlen, check_varlen, longest_sequence

NOT_LANDED = ("dropout_p",)


OPS = {"attention": attention, "attention_varlen": attention_varlen, "decode": decode}
# op -> what plan calls it
KERNELS = {"attention": "attention_fwd", "attention_varlen": "attention_fwd", "decode": "decode"}
# Rows of x by rows of the weight, both at most, of a block on the CPU.
FLAT_TILES = {"gemv": (4, 16), "flat_gemm": (64, 16)}
FLAT_TILES_AVX512 = FLAT_TILES | {"gemv": (6, 16)}
FLAT_TILES_MATRIX = {"flat_gemm": (64, 32)}
# Levels with kernels of their own in bfloat16, for a forward of LEAST_TILE_ROWS or more, a backward
# and flat_gemm, and what runs the rest.
LEVEL_BELOW = {
    "avx512-bf16": "avx512",
    "amx": "avx512",
    "avx512-bf16-emulated": "avx2",
    "amx-emulated": "avx2",
}
# kLeastTileRows in csrc/cpu/isa.
LEAST_TILE_ROWS = {"avx512-bf16": 12, "amx": 3, "avx512-bf16-emulated": 12, "amx-emulated": 3}


@dataclass(frozen=True)
class Explanation:
    """The choice an op makes for its arguments.

    Attributes:
        kernel: on the CPU the op and the level, e.g. "decode cpu avx2"; on CUDA the compiled
            instance, e.g. "decode_sm80_bfloat16_d128_s2".
        tile: (block_m, block_n): rows (queries times the heads of a group) and keys per step; of
            flat_linear rows of x and of the weight, (0, 0) on CUDA, where it is not told.
        kv_splits: into how many parts the keys are split.
        rejected: {kernel: reason} of the others.
    """

    kernel: str
    tile: tuple[int, int]
    kv_splits: int
    rejected: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stats:
    """Counters of this process since the start or the last reset.

    Attributes:
        calls: native op calls.
        rows_checked, rows_recomputed: rows that the unified-max softmax checked and recomputed.
    """

    calls: int
    rows_checked: int
    rows_recomputed: int


def stats(reset: bool = False) -> Stats:
    """Counters of the native ops; `reset` sets them to 0 after reading.

    Counting never waits. Reading the rows that CUDA devices have counted waits for those devices,
    so not while a CUDA graph is captured; a reset loses what is counted while it takes place.
    """
    if not _ops.built:
        raise RuntimeError(_ops.NOT_BUILT)
    return Stats(*_ops.stats(reset))


def explain(op, *args, **kwargs) -> Explanation:
    """What `op(*args, **kwargs)` would run, without running it.

    Args:
        op: flashinfer_lite.attention, attention_varlen, decode or flat_linear, or its name.
        *args, **kwargs: the op's own arguments, checked as the op would. With process_group what
            this rank runs on its part of the keys; nothing is asked of the others.

    Raises:
        ValueError: if op is another function; and whatever the op itself raises for its arguments.

    Example:
        >>> flashinfer_lite.explain("decode", q, k_cache, v_cache).kv_splits
        1
    """
    name = getattr(op, "__name__", op)
    if name == "flat_linear":
        return _explain_flat_linear(*args, **kwargs)
    if name not in OPS:
        raise ValueError(
            f"op: expected attention, attention_varlen, decode or flat_linear, got {op!r}"
        )
    bound = inspect.signature(OPS[name]).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    names = list(given)[:3]
    if given.get("process_group") is not None:
        distributed.check_group(given["process_group"], given["q"])
    if _dtensor.given(*(given[n] for n in names)):
        raise TypeError("q: expected a torch.Tensor to explain, got a DTensor; see its to_local()")
    q, k, v = _check.under_autocast(*(given[n] for n in names))
    common = ("causal", "window", "softmax_scale", "softcap", "mask", "kv_start", "seqlens_kv")
    table = given.get("block_table")
    if name == "attention_varlen":
        own = ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv")
        check_varlen(q, k, v, *(given[n] for n in (*own, *common)), table)
    else:
        prepare(q, k, v, *(given[n] for n in common), names, table)
    _check.unified(given["softmax"], given["phi"], q)
    _check.not_landed(**{n: given[n] for n in NOT_LANDED if n in given})
    _check.sink(given["sink"], q)
    sequences = given["cu_seqlens_q"].shape[0] - 1 if name == "attention_varlen" else q.shape[0]
    _check.alibi_slopes(given["alibi_slopes"], q, sequences)
    splits, invariant = given.get("kv_splits", 1), name == "decode" and given["batch_invariant"]
    if name == "decode":
        floating = (given[n] for n in ("mask", "sink", "alibi_slopes"))
        check_decode(q, k, v, *floating, splits, invariant, given["out"])
    reference_runs = _check.impl(given["impl"], q)
    if name == "attention_varlen":
        if table is not None:
            _check.no_grad("attention_varlen with block_table", q=q, k=k, v=v, sink=given["sink"])
        q, k, v = _one_sequence(q, k, v, given["cu_seqlens_q"], given["cu_seqlens_kv"], table)
    elif table is not None:
        k, v = (_spread_pages(x, table) for x in (k, v))
    if reference_runs:
        rejected = {"cpu": "impl='reference' was asked for"}
        return Explanation(f"{name} reference", (q.shape[1], k.shape[1]), 1, rejected)

    if q.device.type not in ("cpu", "cuda"):
        raise ValueError(f"q: expected a CPU or CUDA tensor to explain, got one on {q.device}")
    if q.device.type == "cuda":
        return _explain_cuda(name, q, k, v, splits, invariant)
    longest, end, start = k.shape[1], given["seqlens_kv"], given["kv_start"]
    never_splits = name == "attention_varlen"
    if not never_splits and q.shape[0] and (end is not None or start is not None):
        visible = (longest if end is None else end) - (0 if start is None else start)
        longest = max(int(visible.max()), 0)
    return _explain_cpu(name, q, k, v, longest, splits, invariant)


def _spread_pages(cache, block_table):
    """A view with the shape of the dense cache that the pages stand for."""
    batch_size, pages = block_table.shape
    shape = batch_size, pages * cache.shape[1], *cache.shape[2:]
    return cache.as_strided(shape, (0, 0, *cache.stride()[2:]))


def _one_sequence(q, k, v, cu_seqlens_q, cu_seqlens_kv, block_table):
    """One that stands for all of a ragged batch: the longest, or, where reading the offsets would
    wait for a device, all of them."""
    if q.device.type == "cpu":
        return longest_sequence(q, k, v, cu_seqlens_q, cu_seqlens_kv, block_table)
    if block_table is not None:
        return q.unsqueeze(0), *(_spread_pages(x, block_table[:1]) for x in (k, v))
    return q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)


def _explain_flat_linear(*args, **kwargs):
    bound = inspect.signature(flat_linear).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    impl, invariant = given["impl"], given["batch_invariant"]
    x, weight, bias = under_autocast(given["x"], given["weight"], given["bias"])
    chosen = choose_kernel(x, weight, bias, given["weight_scale"], impl, invariant, given["out"])
    m, n, k = x.shape[:-1].numel(), *weight.shape
    if invariant:
        why = "batch_invariant=True is always flat_gemm"
    elif impl != "auto":
        why = f"impl={impl!r} was asked for"
    else:
        why = explain_choice(x.device.type, x.dtype, n, k, m)
    rejected = {other: why for other in (*FLAT_KERNELS, "vendor") if other != chosen}
    if chosen not in FLAT_KERNELS:
        return Explanation(f"flat_linear {chosen}", (m, n), 1, rejected)
    if x.device.type != "cpu":
        return Explanation(f"flat_linear {chosen} {x.device.type}", (0, 0), 1, rejected)
    isa, levels = _levels(x.device)
    tiles = FLAT_TILES_MATRIX
    if isa not in LEVEL_BELOW or chosen != "flat_gemm" or x.dtype != torch.bfloat16:
        levels[f"cpu {isa}"] = "only flat_gemm in bfloat16 runs there"
        isa = LEVEL_BELOW.get(isa, isa)
        levels.pop(f"cpu {isa}", None)
        tiles = FLAT_TILES_AVX512 if isa == "avx512" else FLAT_TILES
    return Explanation(f"flat_linear {chosen} cpu {isa}", tiles[chosen], 1, rejected | levels)


def _levels(device):
    """The CPU level in force, and why not the others."""
    isa = _ops.cpu_isa()
    rejected = {"cuda": f"inputs are on {device}; {_ops.cuda_status}"}
    for level in ("amx", "avx512-bf16", "avx512", "avx2", "baseline"):
        if level not in _ops.cpu_isas():
            rejected[f"cpu {level}"] = "not on this processor"
        elif level != isa:
            rejected[f"cpu {level}"] = f"{isa} is in force"
    return isa, rejected


def _explain_cpu(name, q, k, v, longest, splits, invariant):
    block_m, block_n, kv_splits, _ = _ops.plan(
        q, k, v, KERNELS[name], longest, splits, invariant
    ).tolist()
    isa, rejected = _levels(q.device)
    least = LEAST_TILE_ROWS.get(isa, 0)
    if isa in LEVEL_BELOW and (q.dtype != torch.bfloat16 or block_m < least):
        rejected[f"cpu {isa}"] = f"only {least} rows or more in bfloat16 run there"
        isa = LEVEL_BELOW[isa]
        rejected.pop(f"cpu {isa}", None)
    if isa == "avx512" and q.dtype == torch.float64:
        isa = "avx2"
        rejected["cpu avx512"] = "float64 runs at the avx2 level"
        rejected.pop("cpu avx2", None)
    return Explanation(f"{name} cpu {isa}", (block_m, block_n), kv_splits, rejected)


def _explain_cuda(name, q, k, v, splits, invariant):
    # By the capacity of the cache: reading the lengths would wait for the device.
    block_m, block_n, kv_splits, instance = _ops.plan(
        q, k, v, KERNELS[name], k.shape[1], splits, invariant
    ).tolist()
    rejected = {"cpu": f"inputs are on {q.device}", "sm90": "not built: no kernel for it yet"}
    kernel = _ops.cuda_instances()[instance]
    return Explanation(kernel, (block_m, block_n), kv_splits, rejected)


def add_parser(commands):
    """Add the command doctor."""
    parser = commands.add_parser("doctor", help="versions, levels, and a self-test of the kernels")
    parser.set_defaults(run=lambda args: 0 if doctor() else 1, error=parser.error)


def doctor() -> bool:
    """Print versions, levels and the state of both halves, and check the kernels. True if sound."""
    from flashinfer_lite import __version__

    print(f"flashinfer_lite {__version__}")
    print(f"python          {platform.python_version()} on {platform.platform()}")
    print(f"torch           {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"CUDA half       {_ops.cuda_status}")
    if _ops.cuda_way_out:
        print(f"                for CUDA tensors: {_ops.cuda_way_out}")
    if not _ops.built:
        print(f"CPU half        {_ops.NOT_BUILT}")
        return False
    try:
        isa, forced = _ops.cpu_isa(), os.environ.get("FLASHINFER_LITE_ISA")
    except RuntimeError as error:
        print(f"CPU half        {str(error).splitlines()[0]}")
        return False
    print(
        f"CPU half        loaded; level {isa}{' (forced)' if forced else ''}, "
        f"present: {', '.join(_ops.cpu_isas())}"
    )
    for line in report():
        print(f"dataflow        {line}")
    sound = _self_test("cpu")
    gpus = torch.cuda.device_count()
    if gpus and _ops.cuda_status != "loaded":
        print("cuda:0          a GPU, and no CUDA half that could use it: NOT SOUND")
        return False
    for index in range(gpus):
        print(f"cuda:{index:<10} {torch.cuda.get_device_name(index)}")
        sound &= _self_test(f"cuda:{index}")
    return sound


def _self_test(device):
    """Compare the ops with the reference on the same inputs, which the CPU makes."""
    sound, started = True, time.monotonic()
    for dtype in _check.ELEMENT_DTYPES if device == "cpu" else _check.CUDA_DTYPES:
        for name, op, inputs, exact, eager in _self_tests(device, dtype):
            # Twice the error of eager torch in the same dtype; fp64 has only its own rounding.
            rounding = torch.finfo(dtype).eps * exact.abs().max()
            error = (eager.double() - exact).abs().max()
            allowed = 16 * rounding if dtype == torch.float64 else 2 * (error + rounding)
            try:
                out = op(*(t.to(device) for t in inputs)).cpu()
            except RuntimeError as failure:
                print(f"self-test       {name:9} {str(failure).splitlines()[0]}: FAILED")
                return False
            error = (out.double() - exact).abs().max()
            ok = bool(error <= allowed)
            sound &= ok
            print(
                f"self-test       {name:9} {str(dtype)[6:]:8} error {error:.1e} of "
                f"{allowed:.1e} allowed: {'ok' if ok else 'WRONG'}"
            )
    print(
        f"self-test       {'passed' if sound else 'FAILED'} in {time.monotonic() - started:.1f} s"
    )
    return sound


def _self_tests(device, dtype):
    """(name, function, inputs, exact result, eager result) of each kernel that takes the dtype."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 20, 6, 64, generator=generator).to(dtype)
    k, v = torch.randn(2, 2, 200, 2, 64, generator=generator).to(dtype).unbind()
    exact = reference.attention(q.double(), k.double(), v.double(), causal=True)
    eager = reference.attention(q, k, v, causal=True)
    for name, op, phi in (
        ("attention", attention, None),
        ("decode", decode, None),
        ("unified", decode, 0.0),  # rows that fail its guard are right too
    ):
        yield name, functools.partial(op, causal=True, phi=phi), (q, k, v), exact, eager
    if dtype == torch.float64 or (dtype == torch.float32 and device != "cpu"):
        return  # products of the vendor's
    x = torch.randn(5, 576, generator=generator).to(dtype)
    weight = torch.randn(192, 576, generator=generator).to(dtype)
    exact, eager = reference.linear(x.double(), weight.double(), None), x @ weight.T
    for name in FLAT_KERNELS:
        yield name, functools.partial(flat_linear, impl=name), (x, weight), exact, eager
