"""The CUDA ops themselves, on made-up GPUs: checks, allocation, devices, streams, splits, errors.

Their kernels run on the executor, and a result counts only if the executor found nothing. The cases
are what cuda_cases.py imports, and run in a child process: one for each worker of pytest-xdist.
"""

import json
import select

import pytest
from cuda_cases import CASES
from made_up_gpus import start

TIMEOUT_S = 300  # of a case that takes seconds: a kernel that hangs does not hang the tests

pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    with start(folder, "import cuda_cases; cuda_cases.serve()") as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("case", CASES)
def test_on_made_up_gpus(device, child, case):
    assert child.poll() is None, f"the child has ended with {child.returncode}"
    print(case, file=child.stdin, flush=True)
    if not select.select([child.stdout], [], [], TIMEOUT_S)[0]:
        child.kill()
        pytest.fail(f"no answer in {TIMEOUT_S} s")
    answer = child.stdout.readline()
    assert answer, f"the child died with {child.wait()}"
    failure = json.loads(answer)
    assert not failure, failure
