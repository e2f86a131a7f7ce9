"""attention and decode of DTensors, on meshes of two and of four processes (gloo, on the CPU).

The cases are in dtensor_child.py.
"""

import dtensor_child
import process_groups
import pytest

MODULES = [dtensor_child.__name__]
RUNS = process_groups.runs(MODULES, ("decode-", "compiled"))

pytestmark = pytest.mark.cpu_only("gloo's processes are on the CPU")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    with process_groups.started(MODULES, tmp_path_factory.mktemp("meetings")) as by_count:
        yield by_count


@pytest.mark.parametrize("count, case", RUNS)
def test_on_a_mesh(device, processes, count, case):
    failure = processes[count].run(case)
    assert not failure, failure
