"""FLOPs and bytes of attention, counted exactly, and the time that a machine needs at least."""

from __future__ import annotations

from dataclasses import dataclass

from shapes import Shape

LSE_BYTES = 4  # fp32, also for 16-bit inputs
# On a GPU the limits are measured by a large matmul and a device copy, which come within a few
# percent of what the chip can do. More than this above them is not speed but a wrong measurement:
# work left out, or bytes from a cache that counts as cold.
PLAUSIBLE_SHARE = 1.15


@dataclass(frozen=True)
class Cost:
    """``flops`` (a multiply and an add are 2) and ``bytes`` that any implementation must move."""

    flops: int
    bytes: int

    def seconds_at_least(self, flop_rate: float, bandwidth: float) -> float:
        """Return the roofline: the slower of computing and reading, perfectly overlapped."""
        return max(self.flops / flop_rate, self.bytes / bandwidth)


def implausible(row: dict) -> str | None:
    """Return what is wrong with a row that claims more than the machine can do."""
    if row["op"] == "overhead" or row["roofline"] <= PLAUSIBLE_SHARE:
        return None
    return (
        f"{row['impl']}: {100 * row['roofline']:.0f} % of the roofline, expected at most "
        f"{100 * PLAUSIBLE_SHARE:.0f} %: {row['seconds'] * 1e6:.4g} us is too fast to be true"
    )


def visible_range(shape: Shape, row: int) -> tuple[int, int]:
    """Return ``(first, end)`` of the keys that query ``row`` sees, causal and window applied."""
    position = row + shape.seqlen_kv - shape.seqlen_q
    end = min(shape.seqlen_kv, position + 1) if shape.causal else shape.seqlen_kv
    first = max(0, position - shape.window_left) if shape.window_left >= 0 else 0
    return first, max(first, end)


def visible_pairs(shape: Shape) -> int:
    """Return the number of (query, key) pairs of one head that are not masked."""
    ranges = (visible_range(shape, row) for row in range(shape.seqlen_q))
    return sum(end - first for first, end in ranges)


def keys_touched(shape: Shape) -> int:
    """Return how many keys at least one query of a head sees."""
    first, _ = visible_range(shape, 0)
    _, end = visible_range(shape, shape.seqlen_q - 1)
    return max(0, end - first)


def cost(shape: Shape, op: str, element_bytes: int) -> Cost:
    """Return what an op costs: masked pairs cost nothing, every tensor is moved once.

    Forward and decode: two products (q k^T, p v). Backward: five, as FlashAttention-2 recomputes
    q k^T. The softmax itself is not counted. K and V count once per KV head, however many query
    heads share them, and only the keys that some query sees.

    Args:
        shape: the problem.
        op: attention, attention_bwd, decode or overhead, or one of attention's other names.
        element_bytes: size of an element of q, k, v and out.
    """
    if shape.lengths:
        each = [cost(shape.sequence(i), op, element_bytes) for i in range(shape.batch_size)]
        return Cost(sum(c.flops for c in each), sum(c.bytes for c in each))
    heads = shape.batch_size * shape.num_heads_q
    query_rows = heads * shape.seqlen_q
    one_query_tensor = query_rows * shape.head_dim * element_bytes
    one_key_tensor = (
        shape.batch_size * shape.num_heads_kv * keys_touched(shape) * shape.head_dim * element_bytes
    )
    product = 2 * heads * visible_pairs(shape) * shape.head_dim
    if op == "attention_bwd":
        # read q out dout, k v, lse; write dq, dk dv
        moved = 4 * one_query_tensor + 4 * one_key_tensor + query_rows * LSE_BYTES
        return Cost(5 * product, moved)
    # read q, k v; write out
    return Cost(2 * product, 2 * one_query_tensor + 2 * one_key_tensor)
