"""What the mutants of the kernels have to get past: a few small calls of each kernel.

Each case calls the kernel on the executor and knows what is right. The sizes are small but take
every path: several blocks of rows and keys, tails of both, unaligned tensors, values that are not
finite, rows without keys, several sections, stages that come round, empty splits.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashinfer_lite import reference
from flashinfer_lite.testing import (
    assert_close,
    assert_lse_close,
    assert_same_bits,
    check_forward,
    simt,
    simt_call,
)

INSTANCES = {
    "attention_fwd": "attention_fwd_sm80_bfloat16_d64",
    "attention_bwd": "attention_bwd_sm80_bfloat16_d64_s2",
    "decode": "decode_sm80_bfloat16_d64_s2",
    "combine": "combine_sm80_bfloat16_from_bfloat16",
    "append_kv": "append_kv_sm80_bfloat16",
    "flat_gemm": "flat_gemm_sm80_bfloat16_m64_s4",
    "gemv": "gemv_sm80_bfloat16_m4",
}
# Beside the kernel's own row: what the cases of decode merge their splits with.
MERGES_SPLITS = "combine_sm80_bfloat16_from_float32"
ONE_STAGE = "attention_bwd_sm80_bfloat16_d256"
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    name: str
    kernel: str
    call: Callable  # (options of simt.Executor) -> (tensors, reports)
    check: Callable  # (tensors), raises AssertionError


def _generator(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _shifted(x, elements=1):
    """The same values without 16-byte alignment."""
    memory = x.new_empty(x.numel() + elements)
    return memory[elements:].view(x.shape).copy_(x)


def _padded(x, elements):
    """The same values, with so many elements more from token to token."""
    batch_size, seqlen, num_heads, head_dim = x.shape
    memory = x.new_empty(batch_size, seqlen, num_heads * head_dim + elements)
    return memory[..., : num_heads * head_dim].view(x.shape).copy_(x)


@contextlib.contextmanager
def _unaligned_out():
    """Outputs of 16-bit elements start one element after a multiple of 16 bytes."""
    aligned = simt_call.Memory.output

    def output(memory, name, shape, dtype):
        if name != "out":
            return aligned(memory, name, shape, dtype)
        size = torch.Size(shape).numel()
        return aligned(memory, name, (size + 1,), dtype)[1:].view(shape)

    simt_call.Memory.output = output
    try:
        yield
    finally:
        simt_call.Memory.output = aligned


class Attention:
    """q, k, v and arguments of one case of attention or decode; each method adds a twist."""

    def __init__(
        self, kernel, name, q, kv, head_dim=64, head_dim_v=None, batch_size=1, **arguments
    ):
        self.kernel, self.name = kernel, name
        random = functools.partial(torch.randn, generator=_generator(f"{kernel} {name}"))
        (seqlen_q, num_heads_q), (seqlen_kv, num_heads_kv) = q, kv
        self.q = random(batch_size, seqlen_q, num_heads_q, head_dim).bfloat16()
        self.k = random(batch_size, seqlen_kv, num_heads_kv, head_dim).bfloat16()
        self.v = random(batch_size, seqlen_kv, num_heads_kv, head_dim_v or head_dim).bfloat16()
        if arguments.get("mask") in (torch.bool, torch.float32):
            full = (batch_size, num_heads_q, seqlen_q, seqlen_kv)
            mask = random(*full)
            arguments["mask"] = mask > -0.5 if arguments["mask"] == torch.bool else mask
        if arguments.get("alibi_slopes") is True:
            slopes = random(batch_size, num_heads_q)
            arguments["alibi_slopes"] = slopes
        self.arguments = arguments
        self.wanted = dict(arguments)  # where the oracle is to be told something else
        self.bound = {}  # of decode alone
        self.device = {}
        self.instance = INSTANCES[kernel]
        self.around = contextlib.nullcontext
        self.pages = None  # (k, v) of a paged cache; self.k and self.v are what it stands for

    def edit(self, change):
        change(self)
        return self

    def case(self, check=None):
        return Case(self.name, self.kernel, self._call, check or self._check)

    def _executor(self, options):
        device = simt.h200()
        if self.device:
            sizes = {"num_sms": 132, "smem_optin": 232448, "smem_per_sm": 233472, **self.device}
            device = simt.load().Device(arch=90, **sizes)
        return simt.Executor(self.instance, device, tolerate=True, **options)

    def _call(self, options):
        executor = self._executor(options)
        op = executor.attention if self.kernel == "attention_fwd" else executor.decode
        k, v = self.pages or (self.k, self.v)
        with self.around():
            tensors = op(self.q, k, v, return_lse=True, **self.arguments, **self.bound)
        return tensors, executor.reports

    def _check(self, tensors):
        check_forward(lambda *_, **__: tensors, self.q, self.k, self.v, **self.wanted)


def _unaligned(case):
    case.q, case.k, case.v = _shifted(case.q), _shifted(case.k), _shifted(case.v)
    case.around = _unaligned_out


def _unaligned_value(case):
    case.v = _shifted(case.v)


def _padded_tokens(case):
    # 8 bytes: enough for a chunk of half the size.
    case.q, case.k, case.v = (_padded(x, 4) for x in (case.q, case.k, case.v))


def _padded_heads(case):
    """Heads lie 8 bytes off multiples of 16, tokens of two heads do not."""
    for name in ("q", "k", "v"):
        x = getattr(case, name)
        setattr(case, name, x.new_empty(*x.shape[:3], x.shape[3] + 4)[..., :-4].copy_(x))


def _visible_non_finite(case):
    case.v[0, 70, 0, 33] = NAN  # in an odd column, alone
    case.v[0, 71, :, 8] = INF
    case.v[:, 33, -1] = -INF
    case.q = case.q.abs() + 0.5
    case.k[0, 97, 0] = -30.0  # its probability is 0
    case.v[0, 97, 0, 4] = NAN


def _hidden_non_finite(case):
    """Keys that the mask hides from every row, or only from some, hold NaN and inf."""
    case.v[:, 5::37] = NAN
    case.k[:, 11::37] = INF
    case.k[:, 13::37] = NAN
    for first in (5, 11, 13):
        case.arguments["mask"][..., first::37] = False
    case.v[0, -3, :, 7] = NAN  # seen by the last rows alone, where a mask is causal


def _rising(case):
    """Scores grow by hundreds towards the keys that the kernel meets last; odd keys have larger
    ones."""
    ends = (6.0, 0.1) if case.kernel == "attention_fwd" else (0.1, 6.0)
    growth = torch.linspace(*ends, case.k.shape[1]).view(1, -1, 1, 1)
    case.k *= growth.bfloat16()
    case.k[:, 1::2] *= 2
    case.q *= 6


def _far_below_zero(case):
    """Every score is so low that its exponential is 0 in float32."""
    case.q, case.k = 6 * case.q.abs(), -6 * case.k.abs()


def _first_key_non_finite(case):
    """The first query alone sees key 2, which is the first warp's."""
    case.v[0, 2, :, 5] = NAN


def _hostile_lengths(case):
    """Values outside the cache count as its bounds; a start beyond the end leaves nothing."""
    case.arguments["seqlens_kv"] = torch.tensor([-5, 999, 60], dtype=torch.int64)
    case.arguments["kv_start"] = torch.tensor([-7, -3, 90], dtype=torch.int32)
    case.wanted = {**case.arguments, "seqlens_kv": torch.tensor([0, case.k.shape[1], 60])}
    case.wanted["kv_start"] = torch.tensor([0, 0, 60])


def _pages(page_size, dtype):
    """The cache in scattered pages, by a strided table that is out of range for the first and the
    last of them."""

    def change(case):
        batch_size, capacity = case.k.shape[:2]
        shape = batch_size, capacity // page_size
        table = torch.randperm(shape[0] * shape[1], generator=_generator(case.name)).view(shape)
        case.pages = tuple(torch.empty_like(x) for x in (case.k, case.v))
        case.pages = tuple(x.view(-1, page_size, *x.shape[2:]) for x in case.pages)
        for pool, x in zip(case.pages, (case.k, case.v), strict=True):
            pool[table] = x.unflatten(1, (-1, page_size))
        named = table.where(table > 0, -5).where(table < table.max(), 2**30)
        table = torch.stack((named, named - 1), 2).flatten(1).to(dtype)[:, ::2]
        case.bound = {**case.bound, "block_table": table}

    return change


def _sections(case):
    """The L2 holds two and a half of the six heads."""
    bytes_per_head = case.k.shape[1] * 2 * 64 * 2
    case.device = {"l2_bytes": int(bytes_per_head * 4 * 8 / 5)}


def _splits(kv_splits, **bound):
    def change(case):
        case.bound = {"kv_splits": kv_splits, **bound}

    return change


def _lengths(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def attention_cases():
    attention = functools.partial(Attention, "attention_fwd")
    started = {"seqlens_kv": _lengths(170, 101, 0), "kv_start": _lengths(13, 64, 0)}
    masked = {"mask": torch.bool, "head_dim": 56, "head_dim_v": 40}
    return [
        attention("causal", (70, 4), (201, 2), causal=True).case(),
        attention("window", (150, 1), (500, 1), window=(300, 3)).case(),
        attention("lengths", (40, 2), (170, 1), batch_size=3, causal=True, **started).case(),
        attention("mask", (35, 4), (150, 2), softcap=5.0, **masked).case(),
        attention("softcap", (30, 2), (120, 1), softcap=3.0, causal=True).case(),
        attention("bias", (35, 4), (150, 2), mask=torch.float32, softmax_scale=-0.2).case(),
        attention("unaligned", (50, 6), (90, 2), 56, 40).edit(_unaligned).case(),
        attention("unaligned v", (20, 2), (90, 1)).edit(_unaligned_value).case(),
        attention("padded tokens", (20, 2), (90, 1)).edit(_padded_tokens).case(),
        attention("padded heads", (20, 2), (90, 2)).edit(_padded_heads).case(),
        attention("visible", (70, 4), (150, 2), window=(50, 0)).edit(_visible_non_finite).case(),
        attention("hidden", (70, 4), (150, 2), causal=True, mask=torch.bool)
        .edit(_hidden_non_finite)
        .case(),
        attention("rising", (70, 2), (300, 1)).edit(_rising).case(),
        attention("no keys", (300, 1), (40, 1), causal=True).case(),
        attention("top left", (130, 1), (200, 1), causal="top_left").case(),
        attention(
            "beyond the window", (150, 1), (40, 1), causal="top_left", window=(10, -1)
        ).case(),
        attention("alibi", (35, 4), (150, 2), batch_size=2, alibi_slopes=True).case(),
        attention("negative scale", (30, 2), (90, 1), softmax_scale=-0.2).case(),
        attention("deep", (30, 2), (90, 1)).edit(_far_below_zero).case(),
        attention("hostile", (20, 2), (150, 1), batch_size=3, causal=True)
        .edit(_hostile_lengths)
        .case(),
        attention("sections", (140, 6), (70, 3), batch_size=2).edit(_sections).case(),
    ]


def decode_cases():
    decode = functools.partial(Attention, "decode")
    started = {"seqlens_kv": _lengths(300, 0), "kv_start": _lengths(13, 0, dtype=torch.int64)}
    masked = {"mask": torch.bool, "head_dim": 56, "head_dim_v": 40}
    ends = {"seqlens_kv": _lengths(150, 70)}
    return [
        decode("stages", (1, 6), (1100, 2)).edit(_splits(1)).case(),
        decode("splits", (4, 12), (706, 2), batch_size=2, causal=True).edit(_splits(3)).case(),
        decode("one key more", (1, 2), (193, 1)).edit(_splits(3)).case(),
        decode("empty splits", (3, 2), (320, 1), batch_size=2, causal=True, **started)
        .edit(_splits(7))
        .case(),
        decode("no keys", (3, 2), (320, 1), batch_size=2, **started).edit(_splits(1)).case(),
        decode("window", (5, 4), (400, 2), window=(173, 3)).edit(_splits(2)).case(),
        decode("mask", (3, 4), (310, 2), softcap=5.0, **masked).edit(_splits(2)).case(),
        decode("softcap", (3, 2), (200, 1), softcap=3.0).edit(_splits(1)).case(),
        decode("bias", (3, 2), (310, 2), mask=torch.float32, softmax_scale=-0.2)
        .edit(_splits(1))
        .case(),
        decode("unaligned", (3, 6), (290, 2), 56, 40).edit(_unaligned).edit(_splits(1)).case(),
        decode("unaligned v", (1, 2), (290, 1)).edit(_unaligned_value).edit(_splits(1)).case(),
        decode("padded tokens", (2, 2), (290, 1)).edit(_padded_tokens).edit(_splits(1)).case(),
        decode("padded heads", (2, 2), (290, 2)).edit(_padded_heads).edit(_splits(1)).case(),
        decode("alibi", (7, 4), (200, 2), batch_size=2, alibi_slopes=True).edit(_splits(2)).case(),
        decode("negative scale", (2, 2), (90, 1), softmax_scale=-0.2).edit(_splits(1)).case(),
        decode("deep", (2, 2), (90, 1)).edit(_far_below_zero).edit(_splits(2)).case(),
        decode("more queries", (6, 1), (3, 1), causal=True).edit(_splits(1)).case(),
        decode("one warp", (3, 2), (120, 1), window=(115, -1))
        .edit(_first_key_non_finite)
        .edit(_splits(1))
        .case(),
        decode("visible", (3, 4), (430, 2), window=(400, 0))
        .edit(_visible_non_finite)
        .edit(_splits(2))
        .case(),
        decode("hidden", (3, 4), (430, 2), causal=True, mask=torch.bool)
        .edit(_hidden_non_finite)
        .edit(_splits(1))
        .case(),
        decode("rising", (2, 2), (900, 1)).edit(_rising).edit(_splits(2)).case(),
        decode("hostile", (2, 2), (150, 1), batch_size=3, causal=True)
        .edit(_hostile_lengths)
        .edit(_splits(2))
        .case(),
        decode("pages", (2, 4), (160, 2), batch_size=2, causal=True, **ends)
        .edit(_splits(2))
        .edit(_pages(16, torch.int32))
        .case(),
        decode("odd pages", (2, 4), (150, 2), batch_size=2, **ends)
        .edit(_splits(1))
        .edit(_pages(10, torch.int64))
        .case(),
        _batch_invariant(decode("batch invariant", (1, 2), (2100, 1), window=(1500, 0))),
    ]


def _batch_invariant(decode):
    """A longer cache with a second sequence leaves the bits of the first alone."""
    decode.bound = {"batch_invariant": True}
    longer = Attention("decode", "longer", (1, 2), (3200, 1), batch_size=2, window=(1500, 0))
    longer.bound = decode.bound
    for name in ("q", "k", "v"):
        part = getattr(decode, name)
        getattr(longer, name)[:1, : part.shape[1]] = part
    longer.arguments["seqlens_kv"] = _lengths(2100, 3150)

    def call(options):
        (out, lse), reports = decode._call(options)
        (longer_out, longer_lse), more = longer._call(options)
        return (out, lse, longer_out, longer_lse), [*reports, *more]

    def check(tensors):
        out, lse, longer_out, longer_lse = tensors
        decode._check((out, lse))
        assert_same_bits(longer_out[:1], out)
        assert_same_bits(longer_lse[:1], lse, "lse")

    return Case(decode.name, "decode", call, check)


def _merge(name, shape, change=None):
    """outs [num_states, batch, seqlen_q, num_heads_q, head_dim_v] and their lses."""
    generator = _generator(name)
    num_states, batch_size, seqlen_q, num_heads_q, _ = shape
    outs = torch.randn(shape, generator=generator).bfloat16()
    lses = 3 * torch.randn(num_states, batch_size, num_heads_q, seqlen_q, generator=generator)
    if change is not None:
        outs, lses = change(outs, lses)

    def call(options):
        executor = simt.Executor(tolerate=True, **options)
        return executor.merge_states(outs, lses), executor.reports

    def check(tensors):
        out, lse = tensors
        oracle, oracle_lse = reference.merge_states(outs.double(), lses.double())
        eager, _ = reference.merge_states(outs, lses.bfloat16())
        assert_close(out, oracle, eager)
        assert_lse_close(lse, oracle_lse)

    return Case(name, "combine", call, check)


def _empty_states(outs, lses):
    lses[1] = -INF
    outs[1] = NAN
    lses[:, 0, 0] = -INF
    return outs, lses


def _one_prevails(outs, lses):
    lses[19, :, 0] = 500.0
    lses[35, :, 1:] = 500.0
    return outs, lses


def _any_strides(outs, lses):
    # heads outermost, states innermost but one; unaligned besides
    order = (3, 1, 2, 0, 4)
    moved = _shifted(outs.permute(order).contiguous()).permute(order)
    return moved, lses.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def _nan_lse(outs, lses):
    lses[1, 0, 0, 0] = NAN
    lses[2, 1, 2, 3] = NAN
    lses[0, 1, 2, 3] = -INF
    return outs, lses


def combine_cases():
    return [
        _merge("ragged", (3, 2, 5, 3, 72)),
        _merge("empty states", (3, 2, 5, 3, 72), _empty_states),
        _merge("many states", (40, 1, 3, 2, 64), _one_prevails),
        _merge("full rows", (3, 1, 4, 2, 64)),
        _merge("two rounds", (2, 1, 2, 3, 296)),
        _merge("one full round", (2, 1, 1, 3, 256)),
        _merge("strides", (4, 2, 3, 3, 40), _any_strides),
        _merge("NaN", (3, 2, 5, 3, 72), _nan_lse),
    ]


@functools.cache
def suite():
    from mutant_append import append_cases  # all are made of what is here
    from mutant_backward import backward_cases
    from mutant_flat import flat_cases
    from mutant_unified import unified_cases
    from mutant_varlen import varlen_cases

    ours = [*attention_cases(), *decode_cases(), *combine_cases()]
    trained = [*backward_cases(), *unified_cases(), *varlen_cases()]
    return [*ours, *trained, *append_cases(), *flat_cases()]
