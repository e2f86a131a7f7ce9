"""attention and decode of DTensors, on meshes of two and of four processes (gloo, on the CPU).

The cases are in dtensor_child.py.
"""

import dtensor_child
import process_groups
import pytest

pytestmark = pytest.mark.cpu_only("gloo's processes are on the CPU")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meetings")
    groups = {n: process_groups.Processes(n, dtensor_child.__name__, folder) for n in (2, 4)}
    yield groups
    for group in groups.values():
        group.stop()


RUNS = [(count, case) for case in process_groups.CASES["dtensor_child"] for count in (2, 4)]


@pytest.mark.parametrize("count, case", RUNS)
def test_on_a_mesh(device, processes, count, case):
    failure = processes[count].run(case)
    assert not failure, failure
