"""The functions of cuda/arch against the table, on the executor or (--device cuda) on a GPU."""

import re

import golden_gpu
import numpy as np
import pytest
from arch_declarations import ARCH, declared
from golden_table import CASES

from flashinfer_lite.testing import simt

GOLDEN = ARCH.parent / "kernels" / "golden"
CASES_BY_NAME = {case.name: case for case in CASES}
# Of the executor's side alone.
EXECUTOR_ONLY = {"flush_subnormal"}


@pytest.fixture(scope="module")
def executor():
    return simt.load()


@pytest.fixture(scope="module")
def gpu():
    if golden_gpu.stale():
        toolkit, problem = golden_gpu.build_cuda.find_toolkit()
        if toolkit is None:
            pytest.skip(f"build/golden/golden.so is missing or older than its sources: {problem}")
        golden_gpu.build(toolkit)
    library = golden_gpu.Gpu()
    assert library.arch, "no CUDA device"
    return library


def run_on_executor(executor, case, eager_copies):
    out = case.output()
    matrix = case.matrix or (0, 0, 0)
    report = executor.golden(case.name, case.inputs, out, matrix, eager_copies)
    assert not report, report
    return out


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_golden(name, device, request):
    case = CASES_BY_NAME[name]
    if device.type == "cpu":
        executor = request.getfixturevalue("executor")
        outputs = [run_on_executor(executor, case, eager) for eager in (False, True)]
    else:
        gpu = request.getfixturevalue("gpu")
        if case.min_arch > gpu.arch:
            pytest.skip(f"needs sm_{case.min_arch}, this is sm_{gpu.arch}")
        outputs = [gpu.run(case)]
    mismatches = [text for out in outputs if (text := case.mismatch(out))]
    assert not mismatches, mismatches


@pytest.mark.cuda_only("the CUDA runtime keeps an error, the executor does not")
@pytest.mark.parametrize(("threads", "smem_bytes"), [(2048, 0), (32, 1 << 20)])
def test_a_refused_launch_tells_its_caller_alone(threads, smem_bytes, device, gpu):
    status, kept = gpu.refused(threads, smem_bytes)
    assert status != 0
    assert kept == 0


def test_both_sides_declare_the_same():
    executor = {n: types for n, types in declared("cpu").items() if n not in EXECUTOR_ONLY}
    assert executor == declared("ptx")


def calls_by_case():
    """Name of a case's struct -> the functions of cuda/arch that it calls."""
    calls = {}
    for path in GOLDEN.glob("*.cuh"):
        code = re.sub(r"//[^\n]*", "", path.read_text())
        for name, body in re.findall(r"^struct (\w+)[^;{]*\{(.*?)^\};", code, re.M | re.S):
            calls[name] = set(re.findall(r"\barch::(\w+)", body))
    return calls


def test_every_function_has_a_golden_case():
    calls = calls_by_case()
    tested = {"launch"}  # every case is launched by it, DynamicSmem with more than the default
    for case in CASES:
        struct = case.name.split("<")[0]
        assert set(case.functions) - {"launch"} <= calls[struct], f"{case.name} does not call them"
        tested.update(case.functions)
    assert tested == set(declared("ptx"))


def test_every_case_is_in_the_table():
    listed = re.findall(r'^ *\{"([^"]+)", launch_case<', (GOLDEN / "golden.cuh").read_text(), re.M)
    assert sorted(listed) == sorted(CASES_BY_NAME)


@pytest.mark.parametrize(
    ("name", "function", "offset"),
    [("Exp2", np.exp2, 0), ("Log2", np.log2, 2.0**-20), ("Tanh", np.tanh, 0)],
)
def test_the_bounds_are_tight(name, function, offset):
    """A result that is off by a few times what the table allows is wrong."""
    case = CASES_BY_NAME[name]
    with np.errstate(all="ignore"):
        right = function(case.inputs.view(np.float32).astype(np.float64))
    normal = np.isfinite(right) & (np.abs(right) < 3e38) & (np.abs(right) >= 2.0**-126)
    for error in (2.0**-19, -(2.0**-19)):
        with np.errstate(all="ignore"):
            wrong = (right * (1 + error) + np.copysign(offset, error * right)).astype(np.float32)
        noticed = ~case.matches(wrong.view(np.uint32), case.expected)
        assert normal.sum() >= 20
        assert noticed[normal].all()
