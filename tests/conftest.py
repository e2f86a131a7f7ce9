"""Options, fixtures and the summary that all tests share.

Every test takes `device`; a numerical test of the CPU kernels takes `isa` and runs at each level
that is compiled in and present, or once on another device. Random numbers are seeded per test from
one session seed.

What cannot run on the device of --device is deselected, and the summary counts it by reason. The
reasons are the markers below, and dtype float64 on CUDA.
"""

import os
import random
import sys
import zlib
from collections import Counter

import hypothesis
import pytest
import torch

import flashinfer_lite
from flashinfer_lite.testing import ALL_LEVELS, EMULATED, force_isa, isa_levels

# The same examples in every run, here as in CI; `--hypothesis-profile=explore` looks elsewhere.
_COMMON = {"deadline": None, "print_blob": True}
hypothesis.settings.register_profile("fixed", max_examples=50, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("explore", max_examples=500, **_COMMON)
hypothesis.settings.load_profile("fixed")

pytest_plugins = ["cuda_coverage", "support"]

NO_FLOAT64 = "CUDA kernels refuse float64 by name"
NOT_EMULATED = "emulated levels have an attention and a flat_gemm of their own, in bfloat16 alone"
MARKERS = {
    "checks_values": "CUDA checks the values of lengths under FLASHINFER_LITE_CHECK=1 only",
    "cpu_only": "cpu_only(reason): not on another device",
    "cuda_only": "cuda_only(reason): not on another device",
}
NOT_HERE = pytest.StashKey[Counter]()


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the `device` fixture")
    parser.addoption("--seed", default=20231123, type=int, help="seed of all random inputs")


def pytest_configure(config):
    config.stash[NOT_HERE] = Counter()
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", meaning if "(" in meaning else f"{name}: {meaning}")


def _on_cuda(config):
    return torch.device(config.getoption("--device")).type == "cuda"


def _levels(config):
    if _on_cuda(config):
        return ["cuda"]
    # Unbuilt: one level, whose tests then fail with the library's own message.
    return isa_levels(emulated=True) if flashinfer_lite.built else ["baseline"]


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", _levels(metafunc.config), indirect=True)


def _reason_not_to_run(item, on_cuda):
    """Why a test does not belong on this device, or None."""
    if marker := item.get_closest_marker("cpu_only" if on_cuda else "cuda_only"):
        return marker.args[0]
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if not on_cuda:
        other = parameters.get("dtype", torch.bfloat16) != torch.bfloat16
        other |= parameters.get("impl", "flat_gemm") != "flat_gemm"
        return NOT_EMULATED if other and parameters.get("isa") in EMULATED else None
    checked = os.environ.get("FLASHINFER_LITE_CHECK") == "1"
    if item.get_closest_marker("checks_values") and not checked:
        return MARKERS["checks_values"]
    return NO_FLOAT64 if parameters.get("dtype") == torch.float64 else None


def pytest_collection_modifyitems(config, items):
    reasons = {item: _reason_not_to_run(item, _on_cuda(config)) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if reasons[item]])
    items[:] = [item for item in items if not reasons[item]]
    config.stash[NOT_HERE].update(filter(None, reasons.values()))
    if hasattr(config, "workeroutput"):  # pytest-xdist: the summary is another process's
        config.workeroutput["not_here"] = dict(config.stash[NOT_HERE])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    # Every worker collects every test, so one worker's counts are those of all.
    counted = getattr(node, "workeroutput", {}).get("not_here")
    node.config.stash[NOT_HERE] = Counter(counted or node.config.stash[NOT_HERE])


@pytest.fixture
def device(request):
    """The device under test, from --device."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def isa(request, device, record_property):
    """The ISA level in force; "cuda" on CUDA devices."""
    record_property("isa", request.param)
    if device.type == "cuda":
        yield request.param
        return
    with force_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seeded(request):
    seed = request.config.getoption("--seed") ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True)
def _repeatable(device):
    """On CUDA: gradients whose bits can be compared. check_backward tries the other way too."""
    cuda = device.type == "cuda"
    if cuda:
        torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    if cuda:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _device_survived(request, device):
    """On CUDA: blame an asynchronous error on the test that caused it.

    Such an error fails every later call of its process, so the process ends: a worker of
    pytest-xdist is replaced and its test counts as failed, a single process stops.
    """
    yield
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        message = f"{request.node.nodeid}: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message, returncode=3)
        sys.__stderr__.write(f"\n{message}\n")
        sys.__stderr__.flush()
        os._exit(3)


@pytest.fixture
def threads():
    """A function that sets the number of threads; undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter, config):
    ran = Counter(
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, value in report.user_properties
        if name == "isa" and report.when == "call"
    )
    levels = _levels(config)
    terminalreporter.section("flashinfer_lite")
    for level in levels if _on_cuda(config) else (*ALL_LEVELS, *EMULATED):
        if level in levels:
            line = f"{ran[level]} tests" if ran[level] else "present, no test selected"
        else:
            line = "skipped: not compiled in, or not on this processor"
        terminalreporter.write_line(f"ISA {level:20} {line}")
    seed, device = config.getoption("--seed"), config.getoption("--device")
    for reason, count in config.stash[NOT_HERE].most_common():
        terminalreporter.write_line(f"not on {device}: {count} tests: {reason}")
    terminalreporter.write_line(f"seed {seed} (--seed), device {device} (--device)")
