"""Options, fixtures and the summary that all tests share.

Every test takes `device`; a numerical test of the CPU kernels takes `isa` and runs at each level
that is compiled in and present. Random numbers are seeded per test from one session seed.
"""

import random
import zlib
from collections import Counter

import hypothesis
import pytest
import torch

import flashinfer_lite
from flashinfer_lite.testing import ALL_LEVELS, force_isa, isa_levels

# The same examples in every run, here as in CI; `--hypothesis-profile=explore` looks elsewhere.
_COMMON = {"deadline": None, "print_blob": True}
hypothesis.settings.register_profile("fixed", max_examples=50, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("explore", max_examples=500, **_COMMON)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the `device` fixture")
    parser.addoption("--seed", default=20231123, type=int, help="seed of all random inputs")


def _present():
    # Unbuilt: one level, whose tests then fail with the library's own message.
    return isa_levels() if flashinfer_lite.built else ["baseline"]


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", _present(), indirect=True)


@pytest.fixture
def device(request):
    """The device under test, from --device."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def isa(request, device, record_property):
    """The ISA level in force; on another device than the CPU only the first one runs."""
    if device.type != "cpu" and request.param != _present()[0]:
        pytest.skip(f"ISA levels are the CPU's, device is {device}")
    record_property("isa", request.param)
    with force_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seeded(request):
    seed = request.config.getoption("--seed") ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    random.seed(seed)


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
    present = _present()
    terminalreporter.section("flashinfer_lite")
    for level in ALL_LEVELS:
        if level in present:
            line = f"{ran[level]} tests" if ran[level] else "present, no test selected"
        else:
            line = "skipped: not compiled in, or not on this processor"
        terminalreporter.write_line(f"ISA {level:9} {line}")
    seed, device = config.getoption("--seed"), config.getoption("--device")
    terminalreporter.write_line(f"seed {seed} (--seed), device {device} (--device)")
