"""Where one kernel hands over to the next: FlashDecoding++ (arXiv 2311.01282), section 5."""

import math

KERNELS = ("gemv", "flat_gemm", "vendor")  # in the order in which a growing M wants them


def inflection_points(curves: dict[str, dict[int, float]]) -> tuple[int, int]:
    """The (M1, M2) by which the three kernels lose least.

    Args:
        curves: {"gemv": {M: seconds}, "flat_gemm": {...}, "vendor": {...}}: times of one [N, K],
            each > 0. An M counts if all three have it.

    Returns:
        (M1, M2), 0 <= M1 <= M2, each 0 or an M of the curves: gemv for M <= M1, flat_gemm for
        M1 < M <= M2, vendor beyond. Of points that lose alike, the smallest.

    Raises:
        ValueError: if a curve is missing, no M has all three times, or a time is not a finite
            number > 0.

    Example:
        >>> inflection_points({"gemv": {1: 1.0, 8: 8.0}, "flat_gemm": {1: 2.0, 8: 2.0},
        ...                    "vendor": {1: 3.0, 8: 3.0}})
        (1, 8)
    """
    for kernel in KERNELS:
        if kernel not in curves:
            raise ValueError(f"curves: expected times of {kernel}, got {sorted(curves)}")
    ms = sorted(set.intersection(*(set(curves[kernel]) for kernel in KERNELS)))
    if not ms:
        raise ValueError("curves: expected an M that all three kernels have a time for, got none")
    # The paper raises M until the next kernel is faster: one disturbed time then moves the point
    # anywhere. The log of (chosen / best), summed over every M, outvotes it, and a factor lost on
    # a call of 10 us counts as one lost on a call of 10 ms.
    losses = []
    for m in ms:
        times = [curves[kernel][m] for kernel in KERNELS]
        if not all(math.isfinite(time) and time > 0 for time in times):
            raise ValueError(f"curves: expected finite times > 0 at M = {m}, got {times}")
        losses.append([math.log(time / min(times)) for time in times])
    best, points = math.inf, (0, 0)
    for first in range(len(ms) + 1):
        for second in range(first, len(ms) + 1):
            chosen = [0] * first + [1] * (second - first) + [2] * (len(ms) - second)
            lost = math.fsum(loss[kernel] for loss, kernel in zip(losses, chosen, strict=True))
            if lost < best - 1e-12:
                best = lost
                points = tuple(ms[index - 1] if index else 0 for index in (first, second))
    return points


def between(points: tuple[int, int], ms: list[int], most: int = 4) -> list[int]:
    """The M still to be measured next to the inflection points.

    Args:
        points: (M1, M2) as found on `ms`.
        ms: the M measured so far, ascending.
        most: how many M to ask for in a gap, evenly spaced.

    Returns:
        M in the gaps above M1 and M2, ascending, none of them in `ms`.
    """
    wanted = set()
    for point in points:
        following = [m for m in ms if m > point]
        if following:
            gap = range(point + 1, following[0])
            step = max(1, -(-len(gap) // most))
            wanted.update(gap[step - 1 :: step] if step > 1 else gap)
    return sorted(wanted - set(ms))
