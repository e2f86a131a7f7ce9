"""The small kernels of csrc/simt/selftest: what must be found in which, and how to run one."""

from dataclasses import dataclass, field

import numpy as np

# Case -> variant -> kinds of errors.
DEFECTS = {
    "block_exchange": {
        "no barrier": "uninit-shared race-shared",
        "a warp skips the barrier": "barrier race-shared",
        "a lane skips the barrier": "barrier uninit-shared race-shared",
        "a warp has exited": "barrier",
        "from two lines": "barrier",
    },
    "block_loop": {"no barrier at the end of a round": "race-shared"},
    "named_barriers": {
        "consumer does not wait": "barrier race-shared",
        "producer does not wait": "barrier",
        "written after the arrival": "race-shared",
        "last arrival is missing": "deadlock",
        "an arrival too many": "barrier",
        "counts differ": "barrier",
        "not whole warps": "barrier",
        "no such barrier": "barrier",
    },
    "four_warps_wait": {"in four places": "deadlock"},
    "warp_exchange": {
        "no sync_warp": "uninit-shared race-shared",
        "a lane skips sync_warp": "uninit-shared race-shared deadlock",
        "masks differ": "deadlock",
        "lane outside its mask": "collective",
        "another collective": "collective",
        "a shuffle instead": "race-shared",
        "a vote instead": "race-shared",
    },
    "partial_warp": {
        "from a lane that does not exist": "collective",
        "under divergence": "deadlock",
    },
    "read_then_write": {
        "the first writes, no barrier": "race-global",
        "the last writes, no barrier": "race-global",
    },
    "elected_arrive": {
        "no sync_warp": "race-shared",
        "count too high": "deadlock",
        "polling in vain": "deadlock",
        "count too low": "race-shared",
        "wrong parity": "race-shared",
        "not initialised": "mbarrier",
        "initialisation is not ordered": "mbarrier",
    },
    "many_mbarriers": {"misaligned": "misaligned", "beyond the end": "oob-shared"},
    "tma_boxes": {
        "a warp does not wait": "in-flight",
        "expect_tx too high": "deadlock",
        "expect_tx too low": "in-flight leftover",
        "arrives twice": "mbarrier",
        "overwritten in flight": "in-flight",
        "mbarrier not initialised": "mbarrier",
        "no fence after the initialisation": "proxy-fence",
        "written before, no proxy fence": "proxy-fence",
        "written after the proxy fence": "proxy-fence",
        "destination misaligned": "misaligned uninit-shared",
        "destination beyond the end": "oob-shared deadlock",
        "not a tensor map": "fault",
        "column off 16 bytes": "fault",
        "map longer than its buffer": "oob-global deadlock",
    },
    "tma_ring": {
        "full is not waited for": "uninit-shared race-shared deadlock",
        "empty is not waited for": "mbarrier",
        "released early": "race-shared",
        "empty counts half a warp": "race-shared",
        "wrong parity": "deadlock",
    },
    "copy_pipeline": {
        "second group not committed": "in-flight race-shared",
        "wait off by one": "in-flight",
        "first group not waited for": "in-flight race-shared",
        "no sync_warp": "uninit-shared race-shared",
        "overwritten in flight": "in-flight",
        "refilled while others read": "race-shared",
        "copied over while others read": "race-shared",
        "not waited for at the end": "leftover",
    },
    "copy_one": {
        "source beyond the end": "oob-global",
        "source misaligned": "misaligned uninit-shared",
        "destination beyond the end": "oob-shared uninit-shared",
        "destination misaligned": "misaligned uninit-shared",
        "17 bytes": "collective",
    },
    "shared_store": {
        "below": "oob-shared",
        "above": "oob-shared",
        "at null": "oob-shared",
        "before null": "oob-shared",
        "over the end": "oob-shared",
        "word misaligned": "misaligned",
        "16 bytes misaligned": "misaligned",
    },
    "shared_load": {
        "never written": "uninit-shared",
        "half written": "uninit-shared",
        "the other half": "uninit-shared",
        "wider than what is written": "uninit-shared",
        "below": "oob-shared",
        "above": "oob-shared",
        "8 bytes misaligned": "misaligned",
    },
    "shared_of_two_blocks": {"left by another block": "uninit-shared"},
    "halves_of_a_word": {"the same half": "race-shared"},
    "global_store": {
        "below": "oob-global",
        "above": "oob-global",
        "over the end": "oob-global",
        "at null": "oob-global",
        "misaligned": "misaligned",
        "read-only": "oob-global",
        "atomic, read-only": "oob-global",
        "atomic above": "oob-global",
    },
    "global_load": {
        "below": "oob-global",
        "above": "oob-global",
        "misaligned": "misaligned",
        "prefetch above": "oob-global",
        "never written": "uninit-global",
        "half written": "uninit-global",
        "atomic, never written": "uninit-global",
    },
    "write_then_read": {"read": "uninit-global"},
    "deep_stack": {"48 KiB": "stack-overflow"},
    "wild_pointer": {"used": "fault"},
    "global_exchange": {"no barrier": "uninit-global race-global"},
    "blocks_write": {
        "the same word": "race-global",
        "reads the next block's word": "race-global",
        "reads the previous block's word": "race-global",
    },
    "last_block_sums": {
        "no barrier before the ticket": "race-global",
        "no fence before the ticket": "race-global",
        "no fence after the ticket": "race-global",
        "written after the fence": "race-global",
        "without a ticket": "race-global",
        "each block its counter": "race-global",
        "a float counts": "race-global",
        "the first to arrive reads": "uninit-global race-global",
    },
    "atomic_sum": {
        "plain adds": "race-global",
        "a plain write too": "race-global",
        "a plain read too": "race-global",
    },
    "mma<bfloat16>": {"from two lines": "collective"},
    "mma<float16>": {"from two lines": "collective"},
    "ldmatrix": {
        "no sync_warp": "race-shared",
        "from two lines": "collective",
        "row beyond the end": "oob-shared",
        "row misaligned": "misaligned",
    },
}

# Where copies that land early show another face of the defect.
DEFECTS_EAGER = {
    "tma_boxes": {
        "a warp does not wait": "race-shared",
        "expect_tx too low": "race-shared",
        "overwritten in flight": "race-shared",
    },
    "tma_ring": {
        "empty is not waited for": "race-shared deadlock",
        "empty counts half a warp": "race-shared deadlock",
    },
}

# Case -> variants that are right too.
REPAIRS = {
    "warp_exchange": ["half by half"],
    "elected_arrive": ["every lane arrives", "polling"],
    "tma_boxes": ["written before", "polling"],
    "copy_one": ["nothing valid beyond the end"],
    "last_block_sums": ["atomic_add instead"],
    "read_then_write": ["the last writes"],
}

# What the checkers are known to get wrong: kinds that they report, and would not if they were
# perfect; or the other way round.
LIMITS = {
    # A block that has taken what another published does not pass it on through another counter.
    ("relay", ""): "race-global",
    # Atomics order blocks, not the threads of one block.
    ("atomic_within_block", ""): "race-global",
}

# Case -> kind of call -> what is found with each such call switched off, in the order of lines.
DISABLED = {
    "block_exchange": {"barrier": ["uninit-shared race-shared"]},
    "block_loop": {"barrier": ["uninit-shared race-shared", "race-shared"]},
    "named_barriers": {
        "named_barrier": ["barrier", "barrier race-shared"],
        "arrive": ["deadlock", "deadlock"],
    },
    "warp_exchange": {"syncwarp": ["uninit-shared race-shared"]},
    "elected_arrive": {
        "syncwarp": ["race-shared"],
        "arrive": ["deadlock"],
        "wait": ["race-shared"],
        "barrier": ["mbarrier"],
    },
    "tma_boxes": {"fence": ["proxy-fence"], "arrive": ["deadlock"]},
    "tma_ring": {
        "wait": ["mbarrier", "uninit-shared race-shared deadlock"],
        "arrive": ["deadlock", "deadlock"],
        "fence": ["proxy-fence"],
        "barrier": ["mbarrier"],
    },
    "copy_pipeline": {
        "commit": ["in-flight race-shared", "in-flight race-shared", "leftover"],
        "wait": ["in-flight", "in-flight race-shared", "leftover"],
        "syncwarp": ["uninit-shared race-shared", "in-flight race-shared", "race-shared"],
    },
    "last_block_sums": {
        "fence": ["race-global", "race-global"],
        "barrier": ["race-global", "uninit-shared race-shared race-global"],
    },
    "guarded_load": {"predicate": ["oob-global"]},
}


@dataclass
class Bench:
    """The buffers of the self tests, and a session that knows them."""

    module: object
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.session = self.module.Session(**self.options)
        self.guards, self.words = {}, {}
        for name in ("in_", "out", "state"):
            guard = self.module.GuardedBuffer(4 * self.module.SELFTEST_WORDS)
            self.guards[name] = guard
            self.words[name] = np.frombuffer(guard, np.uint32)
            writable, initialised = name != "in_", name != "out"
            self.session.register_buffer(guard.address, guard.nbytes, name, writable, initialised)
        self.words["in_"][:] = np.arange(self.module.SELFTEST_WORDS)
        self.words["state"][:] = 0

    def run(self, case, variant="", **launch):
        """-> the report of all that ran so far."""
        addresses = {name: guard.address for name, guard in self.guards.items()}
        with self.session:
            self.module.run_selftest(case, variant, **addresses, **launch)
        return self.session.report()


def kinds(report):
    return {kind for kind, *_ in report.errors}


def run(executor, case, variant="", options=None, **launch):
    return Bench(executor, options or {}).run(case, variant, **launch)
