"""decode over a cache cut along the sequence, by two and by four processes (gloo, on the CPU).

The cases are in distributed_child.py.
"""

import distributed_child
import process_groups
import pytest

pytestmark = pytest.mark.cpu_only("gloo's processes are on the CPU")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meetings")
    groups = {n: process_groups.Processes(n, distributed_child.__name__, folder) for n in (2, 4)}
    yield groups
    for group in groups.values():
        group.stop()


# Two processes run all cases, four those in one dtype: on a small machine they take turns.
OTHER_DTYPES = ("float64", "bfloat16", "float16")
RUNS = [(2, case) for case in process_groups.CASES["distributed_child"]]
RUNS += [(4, case) for _, case in RUNS if not any(dtype in case for dtype in OTHER_DTYPES)]


@pytest.mark.parametrize("count, case", RUNS)
def test_in_a_group(device, processes, count, case):
    failure = processes[count].run(case)
    assert not failure, failure
