"""The speed table of `make fdpp`: every variant decodes the same tokens in the same rounds of one
process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

WARMUP_ROUNDS = 2
# Above this share of the CPUs taken by others, the table says so.
BUSY = 0.05


@dataclass(frozen=True)
class Row:
    """One variant at one context: seconds of each round, and the same rounds of sdpa."""

    name: str
    dtype: str
    context: int
    seconds: list[float]
    sdpa_seconds: list[float]

    @property
    def tokens_per_s(self) -> float:
        return 1 / statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """Speed against sdpa: the median over the rounds, each of which is one pair."""
        pairs = zip(self.sdpa_seconds, self.seconds, strict=True)
        return statistics.median(base / own for base, own in pairs)

    def fields(self) -> dict:
        """Return the row as it is written to the JSON lines."""
        tenths = statistics.quantiles(self.seconds, n=10) if len(self.seconds) > 1 else []
        return {
            "kind": "speed",
            "variant": self.name,
            "dtype": self.dtype,
            "context": self.context,
            "rounds": len(self.seconds),
            "ms": 1e3 * statistics.median(self.seconds),
            "ms_p10_p90": [1e3 * tenths[0], 1e3 * tenths[-1]] if tenths else None,
            "tokens_per_s": self.tokens_per_s,
            "speed_against_sdpa": self.ratio,
        }


class Contention:
    """How much of the machine's CPUs other processes took while this was entered."""

    share: float | None = None  # unknown where there is no /proc/stat

    def __enter__(self):
        self._start = self._now()
        return self

    def __exit__(self, *exc_info):
        start, end = self._start, self._now()
        if start and end:
            wall, busy, own = (b - a for a, b in zip(start, end, strict=True))
            self.share = max(0.0, (busy - own) / (wall * os.cpu_count()))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
        busy = user + nice + system + irq + softirq + steal
        used = os.times()
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), used.user + used.system

    def notice(self) -> str | None:
        if self.share is None or self.share <= BUSY:
            return None
        return (
            f"other processes took {self.share:.0%} of the CPUs meanwhile: trust the ratios, "
            "not the tokens/s, and run again on a quiet machine"
        )


def clock_of(threads: int):
    """Return the clock that rounds are timed by: of one thread its own CPU time, which other work
    on the machine does not add to; of several the wall's, for they wait for each other."""
    return time.thread_time if threads == 1 else time.perf_counter


@torch.inference_mode()
def measure(variants, filled, ids: torch.Tensor, context: int, rounds: int, dtype: str):
    """Return a `Row` per variant.

    Args:
        variants: `fdpp_variants.Variant`s, one of them "sdpa".
        filled: a cache with the keys and values of ids[:context].
        ids: the text, which says what comes next whatever is predicted.
        context: how many keys the first step sees, less one.
        rounds: timed rounds; in each every variant decodes one token, in turning order.
        dtype: the models' dtype, for the rows.
    """
    clock = clock_of(torch.get_num_threads())
    caches = {variant.name: variant.cache(filled, context) for variant in variants}
    seconds = {variant.name: [] for variant in variants}
    for number, token in enumerate(ids[context : context + WARMUP_ROUNDS + rounds]):
        turn = number % len(variants)
        for variant in [*variants[turn:], *variants[:turn]]:
            start = clock()
            variant.step(token, caches[variant.name]).argmax().item()
            seconds[variant.name].append(clock() - start)
    timed = {name: all_rounds[WARMUP_ROUNDS:] for name, all_rounds in seconds.items()}
    return [Row(name, dtype, context, own, timed["sdpa"]) for name, own in timed.items()]


def format_rows(rows: list[Row], labels: dict[str, str]) -> str:
    """Return the table of several contexts and dtypes as text, a line per variant."""
    columns = sorted({(row.dtype, row.context) for row in rows}, key=lambda c: (c[0] != "fp32", c))
    names = list(dict.fromkeys(row.name for row in rows))
    cells = {(row.name, row.dtype, row.context): row for row in rows}
    width = max(len(labels[name]) for name in names)
    tops = [f"{dtype} decode at {context}" for dtype, context in columns]
    lines = [" " * width + "".join(f"{top:>22}" for top in tops)]
    lines.append("tokens/s, x sdpa".ljust(width) + "-" * 22 * len(tops))
    for name in names:
        line = labels[name].ljust(width)
        for column in columns:
            row = cells[(name, *column)]
            line += f"{row.tokens_per_s:>14.1f} {row.ratio:>6.2f}x"
        lines.append(line)
    return "\n".join("  " + line for line in lines)
