"""The executor's checkers and counters, on the small kernels of csrc/simt/selftest.

Each kernel is right as it stands, and nothing may be reported of it. A variant of it has a planted
defect, and exactly the expected kinds of errors must be reported; or is another right way to write
it.
"""

import re
from concurrent.futures import ProcessPoolExecutor
from math import gcd
from multiprocessing import get_context

import numpy as np
import pytest
from simt_selftests import DEFECTS, DEFECTS_EAGER, DISABLED, LIMITS, REPAIRS, Bench, kinds, run

from flashinfer_lite.testing import simt

pytestmark = pytest.mark.cpu_only("tests the executor, which is no device of torch")


@pytest.fixture(scope="module")
def executor():
    return simt.load()


def pairs(table):
    return [(case, variant) for case, variants in table.items() for variant in variants]


def test_every_kind_has_a_defect(executor):
    planted = {
        kind for variants in DEFECTS.values() for text in variants.values() for kind in text.split()
    }
    assert planted | {"launch"} == set(executor.ERROR_KINDS)
    assert {kind for rows in DISABLED.values() for kind in rows} == set(executor.SITE_KINDS)


@pytest.mark.parametrize("eager", [False, True], ids=["late", "eager"])
@pytest.mark.parametrize(("case", "variant"), pairs(DEFECTS))
def test_defect_is_found(executor, case, variant, eager):
    table = DEFECTS_EAGER if eager and variant in DEFECTS_EAGER.get(case, ()) else DEFECTS
    report = run(executor, case, variant, {"eager": eager})
    assert kinds(report) == set(table[case][variant].split()), report.text()
    unseen = {"fault", "stack-overflow"}  # a fault tells where the thread was last seen to wait
    for kind, file, line, count, text in report.errors:
        assert file.startswith("selftest/") and line > 0 or kind in unseen, report.text()
        assert count > 0 and text


OPTIONS = {
    "late": {},
    "eager": {"eager": True},
    "two OS threads": {"threads": 2, "seed": 3},
    "races only": {"checks": "races"},
    "counters only": {"checks": "counters"},
    "off": {"checks": "off"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_right_kernels_are_silent(executor, options):
    for case in executor.selftest_names():
        for variant in ["", *REPAIRS.get(case, [])]:
            if (case, variant) not in LIMITS:
                report = run(executor, case, variant, options)
                assert not report.errors, f"{case} {variant}: {report.text()}"


def test_one_session_runs_them_all(executor):
    bench = Bench(executor, {"threads": 2, "seed": 1})
    names = [name for name in executor.selftest_names() if (name, "") not in LIMITS]
    for name in names:
        bench.words["state"][:] = 0
        report = bench.run(name)
    assert not report.errors, report.text()
    assert report.totals["launches"] == len(names)


@pytest.mark.parametrize(("case", "variant"), LIMITS, ids="/".join)
def test_known_limits(executor, case, variant):
    assert kinds(run(executor, case, variant)) == set(LIMITS[case, variant].split())


@pytest.mark.parametrize("eager", [False, True], ids=["late", "eager"])
@pytest.mark.parametrize(("case", "kind"), pairs(DISABLED))
def test_disabled_call_is_missed(executor, case, kind, eager):
    """Switched off at its site, each call leaves the kernel as broken as if it were not there."""
    sites = [site for site in run(executor, case).sites if site[0] == kind]
    assert len(sites) == len(DISABLED[case][kind])
    for (_, file, line, hits), expected in zip(sites, DISABLED[case][kind], strict=True):
        assert hits > 0
        report = run(executor, case, "", {"eager": eager, "disabled": [(file, line, kind)]})
        if eager and (case, kind, expected) == ("tma_ring", "wait", "mbarrier"):
            expected = DEFECTS_EAGER["tma_ring"]["empty is not waited for"]
        assert kinds(report) == set(expected.split()), f"{file}:{line}: {report.text()}"


def test_disabled_or_gives_each_thread_its_own_predicate(executor):
    bench = Bench(executor)
    sites = bench.run("block_or").sites
    assert (bench.words["out"][:64] == 1).all()
    broken = Bench(executor, {"disabled": [(file, line, kind) for kind, file, line, _ in sites]})
    assert not broken.run("block_or").errors
    assert list(np.flatnonzero(broken.words["out"][:64])) == [40]


def test_deadlock_tells_where_every_warp_stands(executor):
    text = run(executor, "four_warps_wait", "in four places").text()
    at = r" at selftest/barrier\.cpp:\d+"
    for place in (
        f"warp 0 lanes ffffffff: barrier 0{at}",
        f"warp 1 lanes ffffffff: barrier 1{at}",
        f"warp 2 lanes 0000ffff: shuffle{at}",
        "warp 2 lanes ffff0000: exited",
        f"warp 3 lanes 00000001: mbarrier_wait{at}",
        "warp 3 lanes fffffffe: exited",
    ):
        assert re.search(place, text), text


@pytest.mark.parametrize(
    ("case", "variant"),
    [("copy_pipeline", "wait off by one"), ("tma_boxes", "a warp does not wait")],
)
def test_data_shows_when_copies_land(executor, case, variant):
    late, eager = (Bench(executor, {"eager": eager}) for eager in (False, True))
    for bench in (late, eager):
        bench.run(case, variant)
    poison = late.words["out"] == 0x7FBF7FBF
    assert poison.any() and not (eager.words["out"] == 0x7FBF7FBF).any()
    assert (late.words["out"] == eager.words["out"])[~poison].all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("case", "variant"),
    [
        ("wild_pointer", "used"),
        ("deep_stack", "48 KiB"),
        ("block_exchange", "no barrier"),
        ("named_barriers", "counts differ"),
    ],
)
def test_session_survives_a_fatal_finding(executor, case, variant, threads):
    bench = Bench(executor, {"threads": threads})
    first = len(bench.run(case, variant, blocks=8).errors)
    bench.words["out"][:] = 0
    report = bench.run("block_exchange")
    assert len(report.errors) == first > 0
    assert list(bench.words["out"][:64]) == list(range(63, -1, -1))


def test_stack_bytes_are_an_option(executor):
    assert not run(executor, "deep_stack", "48 KiB", {"stack_bytes": 64 * 1024}).errors


LAUNCHES = {
    "most threads": ({"threads": 1024}, ""),
    "most shared memory": ({"smem_bytes": 231424}, ""),
    "too many threads": ({"threads": 1025}, "launch"),
    "too much shared memory": ({"smem_bytes": 231425}, "launch"),
    "no threads": ({"threads": 0}, "launch"),
    "no blocks": ({"blocks": 0}, "launch"),
}


@pytest.mark.parametrize(("launch", "expected"), LAUNCHES.values(), ids=LAUNCHES)
def test_launch_limits(executor, launch, expected):
    report = run(
        executor, "guarded_load" if "threads" not in launch else "many_mbarriers", **launch
    )
    assert kinds(report) == set(expected.split())
    assert report.totals["blocks"] == (0 if expected else 1)


@pytest.mark.parametrize(("number", "expected"), [(32, set()), (33, {"mbarrier"})])
def test_number_of_mbarriers(executor, number, expected):
    assert kinds(run(executor, "many_mbarriers", number=number)) == expected


@pytest.mark.parametrize("case", ["mma<bfloat16>", "ldmatrix"])
def test_tensor_core_needs_a_full_warp(executor, case):
    assert kinds(run(executor, case, threads=16)) == {"collective"}


def test_launches_are_ordered(executor):
    bench = Bench(executor)
    bench.run("write_then_read", "write")
    assert not bench.run("write_then_read", "read").errors


def outputs(executor, case, options, blocks):
    bench = Bench(executor, options)
    report = bench.run(case, blocks=blocks)
    assert not report.errors, report.text()
    return bench.words["out"].tobytes() + bench.words["state"].tobytes()


ORDERS = [{"seed": 0}, {"seed": 1}, {"seed": 2}, {"seed": 3, "threads": 2}]


@pytest.mark.parametrize("case", ["last_block_sums", "atomic_sum", "grid_of_patterns"])
def test_right_results_do_not_depend_on_the_order_of_blocks(executor, case):
    assert len({outputs(executor, case, options, 8) for options in ORDERS}) == 1


def test_seeds_reveal_what_depends_on_the_order_of_blocks(executor):
    assert len({outputs(executor, "arrival_order", options, 8) for options in ORDERS[:3]}) == 3
    repeated = {outputs(executor, "arrival_order", {"seed": 5}, 8) for _ in range(3)}
    assert len(repeated) == 1


def counts(report, access):
    """Ideal and actual wavefronts or sectors of one instruction."""
    [(requests, ideal, actual)] = [row[3:] for row in report.counters if row[0] == access]
    assert requests == 1
    return ideal, actual


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("nbytes", [4, 8, 16])
def test_bank_conflicts(executor, nbytes, stride):
    """A wavefront is 128 bytes, from lanes whose words lie in different banks."""
    phases = nbytes // 4
    ways = gcd(stride, 32 // phases)
    report = run(executor, f"shared_stride<{nbytes}>", number=stride)
    for access in ("ld.shared", "st.shared"):
        assert counts(report, access) == (phases, phases * ways)


@pytest.mark.parametrize(
    ("case", "variant", "stride", "expected"),
    [
        ("shared_stride<4>", "", 0, (1, 1)),  # all lanes read one word
        ("shared_stride<16>", "", 0, (4, 4)),
        ("shared_stride<4>", "", 32, (1, 32)),
        ("shared_stride<2>", "", 1, (1, 1)),  # two lanes share a word
        ("shared_stride<2>", "", 4, (1, 2)),
        ("shared_stride<4>", "half of the lanes", 2, (1, 2)),
        ("shared_stride<4>", "half of the lanes", 1, (1, 1)),
    ],
)
def test_bank_conflicts_of_shared_words(executor, case, variant, stride, expected):
    assert counts(run(executor, case, variant, number=stride), "ld.shared") == expected


@pytest.mark.parametrize(("variant", "actual"), [("", 32), ("swizzled", 4), ("padded", 4)])
def test_bank_conflicts_of_ldmatrix(executor, variant, actual):
    assert counts(run(executor, "ldmatrix_rows", variant), "ldmatrix") == (4, actual)


@pytest.mark.parametrize(
    ("nbytes", "variant", "stride", "expected"),
    [
        (4, "", 1, (4, 4)),
        (8, "", 1, (8, 8)),
        (16, "", 1, (16, 16)),
        (4, "", 2, (4, 8)),
        (4, "", 8, (4, 32)),
        (8, "", 4, (8, 32)),
        (16, "", 2, (16, 32)),
        (4, "one element off", 1, (4, 5)),
        (8, "one element off", 1, (8, 9)),
        (16, "one element off", 1, (16, 17)),
    ],
)
def test_sectors(executor, nbytes, variant, stride, expected):
    report = run(executor, f"global_stride<{nbytes}>", variant, number=stride)
    assert counts(report, "ld.global") == counts(report, "st.global") == expected


def test_sectors_of_one_word_for_all(executor):
    assert counts(run(executor, "global_stride<4>", number=0), "ld.global") == (1, 1)
    assert counts(run(executor, "atomic_stride", number=0), "atom.global") == (1, 1)
    assert counts(run(executor, "atomic_stride", number=8), "atom.global") == (4, 32)


@pytest.mark.parametrize(("stride", "wavefronts", "sectors"), [(1, 4, 16), (2, 8, 32)])
def test_counters_of_cp_async(executor, stride, wavefronts, sectors):
    report = run(executor, "copy_stride", number=stride)
    assert counts(report, "cp.async.shared") == (4, wavefronts)
    assert counts(report, "cp.async.global") == (16, sectors)


def test_lanes_may_pass_a_line_unequally_often(executor):
    branch, loop = run(executor, "uneven_loop").counters
    assert branch[3:] == (1, 1, 1)  # 16 lanes, one word
    assert loop[3:] == (2, 6, 6)  # 32 lanes, then 16


def test_counters_do_not_depend_on_order_or_threads(executor):
    reports = [run(executor, "grid_of_patterns", options=options) for options in ORDERS]
    assert all(report.counters == reports[0].counters for report in reports)
    [bank_conflicts] = [row[3:] for row in reports[0].counters if row[0] == "ld.shared"]
    assert bank_conflicts == (8, 8, 1 + 2 + 1 + 4 + 1 + 2 + 1 + 8)  # strides 1 to 8


def test_checks_are_an_option(executor):
    case, variant = "block_exchange", "no barrier"
    assert not run(executor, case, variant, {"checks": "counters"}).errors
    assert not run(executor, case, variant, {"checks": "off"}).counters
    assert not run(executor, case, variant, {"checks": "races"}).counters
    for checks in ("counters", "races", "off"):
        assert kinds(run(executor, "shared_store", "above", {"checks": checks})) == {"oob-shared"}
        assert kinds(run(executor, "global_load", "above", {"checks": checks})) == {"oob-global"}


def test_misuse_of_sessions(executor):
    with pytest.raises(ValueError, match="checks: expected all, races, counters or off, got some"):
        executor.Session(checks="some")
    with pytest.raises(ValueError, match="no kind of call is named pause"):
        executor.Session(disabled=[("a.cuh", 1, "pause")])
    bench = Bench(executor)
    guard = bench.guards["out"]
    with pytest.raises(ValueError, match="the buffers out and twin overlap"):
        bench.session.register_buffer(guard.address + 4, 8, "twin", True, True)
    with bench.session, pytest.raises(RuntimeError, match="a session is open already"):
        executor.Session().__enter__()
    with pytest.raises(ValueError, match="has no variant no such"):
        bench.run("block_loop", "no such")


def test_without_a_session_only_the_status_tells(executor):
    addresses = {name: guard.address for name, guard in Bench(executor).guards.items()}
    assert executor.run_selftest("four_warps_wait", **addresses) == 0
    assert executor.run_selftest("four_warps_wait", "in four places", **addresses) == 1


def halves(x, dtype):
    """Bits of values that `dtype` holds exactly."""
    x = np.asarray(x, np.float32)
    return (
        x.astype(np.float16).view(np.uint16)
        if dtype == "float16"
        else (x.view(np.uint32) >> 16).astype(np.uint16)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mma(executor, dtype):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, shape) / 4 for shape in ((16, 16), (16, 8)))
    c = rng.integers(-100, 100, (16, 8)) / 16
    a[3, 5], a[4, 0], b[2, 6], c[9, 1] = np.nan, np.inf, -np.inf, np.nan
    b[0, 3] = 0  # times infinity
    with np.errstate(invalid="ignore"):
        expected = a @ b + c
    bench = Bench(executor)
    words = np.concatenate([halves(a, dtype).ravel(), halves(b.T, dtype).ravel()]).view(np.uint32)
    words = np.concatenate([words, c.astype(np.float32).ravel().view(np.uint32)])
    bench.words["in_"][: words.size] = words
    report = bench.run(f"mma<{dtype}>")
    assert not report.errors, report.text()
    assert report.totals["mmas"] == 1
    out = bench.words["out"][:128].view(np.float32).reshape(16, 8)
    assert np.isnan(expected).sum() > 10 and np.isinf(expected).sum() > 10
    np.testing.assert_array_equal(out, expected.astype(np.float32))


HOOKED = {
    "": "",
    "no barrier": "uninit-shared race-shared",
    "shared overrun": "oob-shared",
    "global underrun": "oob-global",
    "never written": "uninit-global",
    "one word for all": "race-global",
}


def hooked_reports():
    module = simt.load(hooks=True)
    reports = [run(module, "raw_exchange", variant) for variant in HOOKED]
    return [(kinds(report), report.counters) for report in reports]


def test_hooks_see_plain_accesses():
    """In another process: a process holds one build of the module."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        reports = pool.submit(hooked_reports).result()
    for (variant, expected), (found, counters) in zip(HOOKED.items(), reports, strict=True):
        assert found == set(expected.split()), variant
        assert {"ld.shared", "st.shared", "st.global"} <= {access for access, *_ in counters}
