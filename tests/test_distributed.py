"""decode over a cache cut along the sequence, by two and by four processes (gloo, on the CPU).

The cases are in distributed_child.py and distributed_errors_child.py.
"""

import distributed_child
import distributed_errors_child
import process_groups
import pytest

MODULES = [module.__name__ for module in (distributed_child, distributed_errors_child)]
RUNS = process_groups.runs(MODULES, ("float64", "bfloat16", "float16", "compiled"))

pytestmark = pytest.mark.cpu_only("gloo's processes are on the CPU")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    with process_groups.started(MODULES, tmp_path_factory.mktemp("meetings")) as by_count:
        yield by_count


@pytest.mark.parametrize("count, case", RUNS)
def test_in_a_group(device, processes, count, case):
    failure = processes[count].run(case)
    assert not failure, failure
