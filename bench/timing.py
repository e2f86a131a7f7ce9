"""The clock's side of the benchmark: rounds in turning order, and what a row says of them."""

from __future__ import annotations

import time

MAX_ROUNDS = 200


def time_interleaved(measures: list, seconds_each: float, min_rounds: int = 5) -> list[list[float]]:
    """Return the seconds per call of each function, measured in common rounds.

    Args:
        measures: functions that run once and return the seconds of a call.
        seconds_each: how long each may take in all.
        min_rounds: the least number of rounds; 200 are the most.
    """
    times: list[list[float]] = [[] for _ in measures]
    deadline = time.perf_counter() + seconds_each * len(measures)
    for number in range(MAX_ROUNDS):
        for turn in range(len(measures)):
            index = (turn + number) % len(measures)
            times[index].append(measures[index]())
        if number + 1 >= min_rounds and time.perf_counter() > deadline:
            break
    return times


def quantile(values: list[float], q: float) -> float:
    """Return the q-quantile, interpolated linearly."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(samples: list[float]) -> dict:
    """Return the fields of a row that say what the clock said."""
    return {
        "rounds": len(samples),
        "seconds": quantile(samples, 0.5),
        "seconds_p10": quantile(samples, 0.1),
        "seconds_p90": quantile(samples, 0.9),
    }


def compare_with_sdpa(rows: list[dict]) -> None:
    """Give each row of one problem its speed against the fastest SDPA, None if there is none."""
    rivals = [row["seconds"] for row in rows if row["impl"].startswith("sdpa")]
    for row in rows:
        row["x_sdpa"] = min(rivals) / row["seconds"] if rivals else None
