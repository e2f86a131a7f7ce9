"""What each function of csrc/cuda/arch must give, as words, for one launch of each golden case.

Expectations are typed from the tables and formulas of the PTX ISA, and know nothing of the code
that is tested. Values are distinct and exact in every format, so that a wrong index shows. The
cases themselves are kernels: csrc/cuda/kernels/golden.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from golden_values import (
    BFLOAT16_FROM_FLOAT,
    BFLOAT16_TO_FLOAT,
    EXP2_ARGUMENTS,
    FLOAT16_FROM_FLOAT,
    FLOAT16_TO_FLOAT,
    LOG2_ARGUMENTS,
    TANH_ARGUMENTS,
    canonical_nans,
    exp2_matches,
    log2_matches,
    tanh_matches,
)

LANES = np.arange(32)
UNTOUCHED = 0xABABABAB  # an output word before the launch, and after it where nothing is written


def words(values):
    return np.asarray(values).astype(np.int64).astype(np.uint32)


def distinct(count, salt=0):
    """Words that differ from each other, in their lowest bytes too (up to 256 of them)."""
    return words((np.arange(count) * 2654435761 + salt * 977 + 12345) % 2**32)


def float_words(values):
    return np.asarray(values, dtype=np.float32).view(np.uint32).ravel()


def bitwise(out, expected):
    return out == expected


@dataclass(frozen=True)
class Case:
    name: str
    functions: tuple[str, ...]
    """The functions of cuda/arch that the case is there to test."""
    inputs: np.ndarray
    expected: np.ndarray
    """All output words; UNTOUCHED where nothing is written."""
    matches: Callable = bitwise
    """(output words, expected words) -> one truth value a word."""
    initial: dict[int, int] = field(default_factory=dict)
    """Output words that hold something else than UNTOUCHED before the launch."""
    min_arch: int = 80
    matrix: tuple[int, int, int] | None = None
    """Of the tensor map: word in `inputs` where the matrix begins, rows, columns."""

    def output(self):
        out = np.full(len(self.expected), UNTOUCHED, dtype=np.uint32)
        for index, word in self.initial.items():
            out[index] = word
        return out

    def mismatch(self, out):
        """The first wrong word in words; empty if all are right."""
        wrong = np.flatnonzero(~self.matches(out, self.expected))
        if not len(wrong):
            return ""
        at = wrong[0]
        return (
            f"{self.name}: {len(wrong)} of {len(out)} words are wrong, first word {at}: "
            f"wanted {self.expected[at]:#010x}, got {out[at]:#010x}"
        )


def indices():
    block, thread = np.divmod(np.arange(3 * 64), 64)
    expected = np.stack([thread, block, np.full(3 * 64, 3)], axis=1)
    functions = ("thread_idx", "block_idx", "num_blocks")
    return Case("Indices", functions, distinct(1), words(expected.ravel()))


def dynamic_smem():
    inputs = distinct(32)
    expected = np.concatenate([words(np.zeros(32)), inputs[::-1]])
    return Case("DynamicSmem", ("dynamic_smem", "launch"), inputs, expected)


def sync_warp():
    inputs = distinct(64)
    expected = np.concatenate([inputs[:32][LANES ^ 15], inputs[32:][LANES ^ 31]])
    return Case("SyncWarp", ("sync_warp",), inputs, expected)


def shfl_xor():
    masks = [1, 2, 4, 8, 16, 31]
    inputs = distinct(32)
    rows = [inputs[LANES ^ mask] for mask in masks for _ in ("uint32", "float")]
    return Case(
        "ShflXor", ("shfl_xor",), np.concatenate([inputs, words(masks)]), np.concatenate(rows)
    )


def shfl():
    # shfl.sync .idx with a clamp of 31: of the source lane only the low five bits count.
    inputs = distinct(32)
    sources = [(LANES * 7 + 3) % 64, np.where(LANES < 16, 5, -1)]
    rows = [inputs[source % 32] for source in sources for _ in ("uint32", "float")]
    return Case(
        "Shfl", ("shfl",), np.concatenate([inputs, *map(words, sources)]), np.concatenate(rows)
    )


def vote():
    rounds = [LANES < 0, LANES >= 0, LANES == 17, LANES != 17, LANES * 5 % 7 < 3]
    expected = []
    for mine in rounds:
        ballot = sum(1 << int(lane) for lane in LANES[mine])
        expected += [np.full(32, ballot), np.full(32, mine.any()), np.full(32, mine.all())]
    return Case(
        "Vote", ("ballot", "any", "all"), words(np.concatenate(rounds)),
        words(np.concatenate(expected)),
    )  # fmt: skip


def elect_one():
    return Case("ElectOne", ("elect_one",), distinct(1), words(np.ones(32)))


def sync_threads():
    inputs = distinct(256).reshape(2, 128)
    source = (np.arange(128) * 37 + 11) % 128
    return Case("SyncThreads", ("sync_threads",), inputs.ravel(), inputs[:, source].ravel())


def sync_threads_or():
    thread = np.arange(128)
    rounds = np.stack([thread < 0, thread == 127, thread == 0, thread >= 0])
    expected = np.repeat(rounds.any(axis=1), 128)
    return Case("SyncThreadsOr", ("sync_threads_or",), words(rounds.ravel()), words(expected))


def named_barriers():
    inputs = distinct(128)
    consumer = np.arange(64)
    first = inputs[:64][63 - consumer]
    second = inputs[64:][63 - (consumer + 5) % 64]
    functions = ("bar_sync", "bar_arrive")
    return Case("NamedBarriers", functions, inputs, np.concatenate([first, second]))


def access(space, functions, size):
    """Little-endian: the first byte in memory is the lowest of its word."""
    values = distinct(32 * max(1, size // 4), salt=1)
    if size < 4:
        values %= 2 ** (8 * size)
    memory = distinct(32 * size // 4, salt=2)
    stored = values.astype(f"<u{min(size, 4)}").view("<u4")
    loaded = memory.view(f"<u{min(size, 4)}").astype(np.uint32)
    return Case(
        f"{space}Access<{size}>", functions, np.concatenate([values, memory]),
        np.concatenate([stored, loaded]),
    )  # fmt: skip


def prefetch_l2():
    return Case("PrefetchL2", ("prefetch_l2",), distinct(32), distinct(32))


def atomic_add(name, start, values, encode):
    """`values` and `start` are such that every sum is exact."""
    sums = start + np.concatenate([[0], np.cumsum(values)])
    expected = np.full(64, UNTOUCHED, dtype=np.uint32)
    expected[:2] = encode([sums[-1], sums[-1]])
    expected[32:] = encode(sums[:-1])
    first = int(encode([start])[0])
    return Case(
        f"AtomicAdd<{name}>", ("atomic_add",), encode(values), expected,
        initial={0: first, 1: first},
    )  # fmt: skip


def atomic_add_64():
    """Over the carry from the low word, which starts at its largest, to the high one."""
    sum_ = 2**32 - 1 + (int(LANES.sum()) << 28)
    expected = words([sum_ % 2**32, sum_ >> 32])
    return Case(
        "AtomicAdd64", ("atomic_add",), words(LANES), expected, initial={0: 2**32 - 1, 1: 0}
    )


def ticket():
    """atom.inc: old >= last ? 0 : old + 1."""
    expected = np.full(96, UNTOUCHED, dtype=np.uint32)
    expected[32:64] = LANES % 5  # last is 4, from 0
    expected[64:] = [9, *(LANES[:-1] % 5)]  # last is 4, from 9
    expected[:2] = [32 % 5, 31 % 5]
    return Case("Ticket", ("ticket",), words([4, 4]), expected, initial={0: 0, 1: 9})


def last_block():
    inputs = distinct(128)
    expected = np.full(192, UNTOUCHED, dtype=np.uint32)
    expected[0] = 0  # the last ticket has set the counter back
    expected[32:160] = inputs
    expected[160:] = inputs.reshape(4, 32).sum(axis=0, dtype=np.uint32)
    return Case("LastBlock", ("fence_gpu", "ticket"), inputs, expected, initial={0: 0})


def cp_async():
    """Of 16 bytes the first src-size are copied, the others become zero."""
    valid = LANES % 17
    inputs = distinct(256).reshape(2, 32, 4)
    cut = inputs[0].copy().view(np.uint8)
    cut[np.arange(16) >= valid[:, None]] = 0
    expected = [cut.view(np.uint32)[LANES ^ 1], inputs[1][LANES ^ 1]]
    return Case(
        "CpAsync",
        ("cp_async_16", "cp_async_commit", "cp_async_wait"),
        np.concatenate([words(valid), inputs.ravel()]),
        np.concatenate(expected).ravel(),
    )


def ldmatrix(trans):
    """Lane 8 i + r says where row r of matrix i is; register i is of matrix i: from row lane / 4
    the elements 2 (lane % 4) and 2 (lane % 4) + 1, the first in the low half. With .trans the same
    of the transposed matrix."""
    matrices = np.arange(1, 4 * 64 + 1).reshape(4, 8, 8)
    row_at = LANES * 13 % 32  # each 16-byte row of shared memory holds some row of some matrix
    memory = np.empty((32, 8), dtype=np.uint16)
    memory[row_at] = matrices.reshape(32, 8)
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    row, col = LANES // 4, 2 * (LANES % 4)
    registers = [matrix[row, col] | matrix[row, col + 1] << 16 for matrix in matrices]
    return Case(
        "LdMatrix<trans>" if trans else "LdMatrix",
        ("ldmatrix_x4_trans" if trans else "ldmatrix_x4",),
        np.concatenate([words(row_at * 16), memory.view(np.uint32).ravel()]),
        words(np.stack(registers, axis=1).ravel()),
    )


# Fragments of mma.m16n8k16: element i of a lane is at (row, col) of its matrix.
GROUP, IN_GROUP = (LANES // 4)[:, None], (LANES % 4)[:, None]


def fragment_a(matrix):
    i = np.arange(8)
    row = np.where((i < 2) | ((4 <= i) & (i < 6)), GROUP, GROUP + 8)
    col = np.where(i < 4, IN_GROUP * 2 + (i & 1), IN_GROUP * 2 + (i & 1) + 8)
    return matrix[row, col]


def fragment_b(matrix):
    i = np.arange(4)
    row = np.where(i < 2, IN_GROUP * 2 + (i & 1), IN_GROUP * 2 + (i & 1) + 8)
    return matrix[row, GROUP + 0 * i]


def fragment_c(matrix):
    i = np.arange(4)
    return matrix[np.where(i < 2, GROUP, GROUP + 8), IN_GROUP * 2 + (i & 1)]


def element_pairs(element, values):
    """Two 16-bit elements a register, the lower index in the low half."""
    if element == "bfloat16":
        bits = float_words(values) >> 16
    else:
        bits = np.asarray(values, dtype=np.float16).view(np.uint16).ravel().astype(np.uint32)
    return bits[0::2] | bits[1::2] << 16


def mma(element, tiles):
    """All products and sums are integers below 2^24, exact in any order."""
    a = (np.arange(256) * 77 % 256 - 128).reshape(16, 16)
    b = [(np.arange(128) * 45 % 128 - 20 - 9 * tile).reshape(16, 8) for tile in range(tiles)]
    c = [np.arange(128).reshape(16, 8) * 1001 - 7000 * tile for tile in range(tiles)]
    inputs = [element_pairs(element, fragment_a(a))]
    inputs += [element_pairs(element, fragment_b(tile)) for tile in b]
    inputs += [float_words(fragment_c(tile)) for tile in c]
    expected = [float_words(fragment_c(a @ b[tile] + c[tile])) for tile in range(tiles)]
    name, function = ("Mma", "mma_m16n8k16") if tiles == 1 else ("MmaRow", "mma_m16n8k16_row")
    return Case(f"{name}<{element}>", (function,), np.concatenate(inputs), np.concatenate(expected))


def unary(name, function, arguments, matches):
    """`matches` computes the right results from the arguments, which stand in for them here."""
    arguments = float_words(arguments)
    return Case(name, (function,), arguments, arguments, matches)


def conversions(element, from_float, to_float):
    """pack, from_float and to_float; any NaN is as good as another."""

    def same(out, expected):
        return canonical_nans(element, out) == canonical_nans(element, expected)

    def same_float(out, expected):
        return canonical_nans("float32", out) == canonical_nans("float32", expected)

    source, bits = (words(column) for column in zip(*from_float, strict=True))
    packed = bits | bits[::-1] << 16  # the first argument is the lower half
    yield Case(f"FromFloat<{element}>", ("from_float",), source, bits, same)
    yield Case(f"Pack<{element}>", ("pack",), np.concatenate([source, source[::-1]]), packed, same)
    source, bits = (words(column) for column in zip(*to_float, strict=True))
    yield Case(f"ToFloat<{element}>", ("to_float",), source, bits, same_float)


def predicate():
    inputs = words(LANES * 3 % 5)
    return Case("Predicate", ("predicate",), inputs, words(inputs != 0))


def mbarrier():
    inputs = distinct(192).reshape(3, 64)
    functions = ("mbarrier_init", "mbarrier_arrive", "mbarrier_wait", "fence_mbarrier_init")
    return Case("Mbarrier", functions, inputs.ravel(), inputs[:, ::-1].ravel(), min_arch=90)


def mbarrier_test_wait():
    """Parity 0 is that of the first phase, parity 1 of the second and of the one before the first;
    true of the phase before the current one."""
    expected = words([0, 1, 1, 0])
    return Case("MbarrierTestWait", ("mbarrier_test_wait",), distinct(1), expected, min_arch=90)


def tma_load():
    """A box of 8 rows of 32 words: c0 counts columns, c1 rows, outside of the matrix is zero. The
    128-byte swizzle moves the 16-byte piece at column j of row r to column j xor r % 8. The first
    column lies on 16 bytes: an H200 calls anything else an illegal instruction."""
    corners = [(4, 3), (32, 15), (-8, -2)]
    rows, cols = 20, 48
    matrix = distinct(rows * cols).reshape(rows, cols)
    padded = np.zeros((rows + 64, cols + 64), dtype=np.uint32)
    padded[32 : 32 + rows, 32 : 32 + cols] = matrix
    inputs = np.zeros(64, dtype=np.uint32)
    inputs[:6] = words(np.ravel(corners))
    r, c = np.indices((8, 32))
    expected = np.empty((3, 256), dtype=np.uint32)
    for copy, (c0, c1) in enumerate(corners):
        expected[copy, r * 32 + ((c // 4) ^ (r % 8)) * 4 + c % 4] = padded[32 + c1 + r, 32 + c0 + c]
    return Case(
        "TmaLoad",
        ("mbarrier_arrive_expect_tx", "tma_load_2d", "fence_proxy_async"),
        np.concatenate([inputs, matrix.ravel()]),
        expected.ravel(),
        min_arch=90,
        matrix=(64, rows, cols),
    )


def all_cases():
    sizes = (1, 2, 4, 8, 16)
    steps = (LANES * 11 % 32 + 1) * np.where(LANES % 3, 1, -1)
    exact = words(LANES * 0x01234567 ^ 0x3F800000)
    yield from (indices(), dynamic_smem(), sync_warp(), shfl_xor(), shfl(), vote(), elect_one())
    yield from (sync_threads(), sync_threads_or(), named_barriers())
    yield from (access("Shared", ("lds", "sts"), size) for size in sizes)
    yield from (access("Global", ("ldg", "stg"), size) for size in sizes)
    yield from (prefetch_l2(), ticket(), last_block(), cp_async())
    yield atomic_add("int32", -100, steps, words)
    yield atomic_add("uint32", 2**32 - 100, np.abs(steps), words)
    yield atomic_add("float", -100.5, steps, float_words)
    yield atomic_add_64()
    yield from (ldmatrix(trans=False), ldmatrix(trans=True))
    yield from (mma(element, tiles) for element in ("bfloat16", "float16") for tiles in (1, 3))
    yield unary("Exp2", "exp2", EXP2_ARGUMENTS, exp2_matches)
    yield unary("Log2", "log2", LOG2_ARGUMENTS, log2_matches)
    yield unary("Tanh", "tanh", TANH_ARGUMENTS, tanh_matches)
    yield from conversions("bfloat16", BFLOAT16_FROM_FLOAT, BFLOAT16_TO_FLOAT)
    yield from conversions("float16", FLOAT16_FROM_FLOAT, FLOAT16_TO_FLOAT)
    yield Case("ToFloat<float32>", ("to_float",), exact, exact)
    yield Case("FromFloat<float32>", ("from_float",), exact, exact)
    yield Case("Opaque", ("opaque",), distinct(32), distinct(32))
    yield from (predicate(), mbarrier(), mbarrier_test_wait(), tma_load())


CASES = tuple(all_cases())
