"""What the tests ran: which features of which op, forward and backward, and where.

Features are read off the arguments of a call, by their names, so a new argument shows up by itself.
Calls count whose results `check_forward` or `check_backward` held against the oracle, every call on
the executor, and in the files of WHOLE every call; all of them in tests that passed.

    pytest --record-support docs/support.json    writes what this run saw

A run of all tests fails if docs/support.json claims for the CPU or the executor what it has not
seen. scripts/support_table.py puts the file into the README.
"""

import contextlib
import functools
import inspect
import json
from pathlib import Path

import pytest
import torch
from cuda_coverage import add_failure
from torch.utils._python_dispatch import TorchDispatchMode

import flashinfer_lite.testing
from flashinfer_lite.testing import simt

CLAIMS = Path(__file__).parent.parent / "docs" / "support.json"
PROPERTY = "support"
# Their tests compare by themselves.
WHOLE = frozenset({"test_append_kv", "test_flat_linear", "test_kvcache_face", "test_merge_states"})
OPS = ("attention", "attention_varlen", "decode", "append_kv", "merge_states", "flat_linear")

# Arguments that are no feature: what every call has, how it is launched, what nothing depends on.
PLAIN = {
    *("q", "k", "v", "k_cache", "v_cache", "out", "lse", "dout", "outs", "lses", "x", "weight"),
    *("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv", "softmax_scale"),
    *("return_lse", "launches", "kernel", "splits", "out_row", "out_offset"),
}
RENAMED = {
    "window_left": "window",
    "window_right": "window",
    "phi": "unified softmax",
    "phi_heads": "unified softmax",
    "softmax": "unified softmax",
    "dlse": "lse gradient",
    "wants_dmask": "mask gradient",
    "rotary_cos": "rotary",
    "rotary_sin": "rotary",
}
_record = None  # a function of the running test


def features(arguments):
    """The features of a call with these arguments."""
    for name, value in arguments.items():
        if name in PLAIN or _is_off(name, value):
            continue
        if name == "mask":
            yield "bool mask" if value.dtype == torch.bool else "additive mask"
        elif name == "causal":
            yield "causal top-left" if value in (2, "top_left") else "causal"
        else:
            yield RENAMED.get(name, name)
    q, k, v = (arguments.get(name, arguments.get(f"{name}_cache")) for name in "qkv")
    if q is not None and q.shape[-2] != k.shape[-2]:
        yield "GQA"
    if v is not None and v.shape[-1] != k.shape[-1]:
        yield "head_dim_v"
    first = next(x for x in arguments.values() if torch.is_tensor(x))
    yield str(first.dtype).removeprefix("torch.")


def _is_off(name, value):
    if value is None or name == "phi" or torch.is_tensor(value):
        return value is None
    return value in (False, 0, -1, (-1, -1), "auto")


def note(place, op, arguments):
    """Record a call of an op by the name of its schema, or of the executor's method."""
    base, _, ending = op.rpartition("_")
    name, backward = (base, ending == "bwd") if ending in ("fwd", "bwd") else (op, False)
    if _record is not None and name in OPS:
        for feature in ("", *features(arguments)):
            _record("|".join((place, name, "backward" if backward else "forward", feature)))


class Watch(TorchDispatchMode):
    """Notes every call of our ops, with the tensors of `given` that no op takes, such as a sink."""

    def __init__(self, given=(), backward=None):
        super().__init__()
        self.given, self.backward = dict(given), backward

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "flashinfer_lite":
            op = function._schema.name.partition("::")[2]
            if self.backward in (None, op.endswith("_bwd")):
                names = (argument.name for argument in function._schema.arguments)
                arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
                on_gpu = any(torch.is_tensor(x) and x.is_cuda for x in arguments.values())
                if "q" in arguments:
                    given = ((n, x) for n, x in self.given.items() if torch.is_tensor(x))
                    arguments |= {n: x for n, x in given if n not in arguments}
                note("gpu" if on_gpu else "cpu", op, arguments)
        return result


def _watched_check(check, backward):
    @functools.wraps(check)
    def call(op, q, k, v, **arguments):
        with Watch(arguments, backward):
            return check(op, q, k, v, **arguments)

    return call


def _watched_method(name, method):
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args, **kwargs):
        result = method(*args, **kwargs)
        _, *bound = signature.bind(*args, **kwargs).arguments.items()
        arguments = dict(bound)
        tensors = arguments.pop("tensors", ())  # append_kv's
        arguments = dict(zip(("k_cache", "v_cache", "k", "v"), tensors, strict=False)) | arguments
        rest = arguments.pop("arguments", {})
        note("executor", name, arguments | rest)
        return result

    return call


# Before the tests import them.
for _backward, _name in enumerate(("check_forward", "check_backward")):
    _check = getattr(flashinfer_lite.testing, _name)
    setattr(flashinfer_lite.testing, _name, _watched_check(_check, bool(_backward)))
for _name, _method in list(vars(simt.Executor).items()):
    if _name.removesuffix("_bwd") in OPS:
        setattr(simt.Executor, _name, _watched_method(_name, _method))


@pytest.fixture(autouse=True)
def _observed(request, record_property):
    global _record
    seen = set()

    def record(cell):
        if cell not in seen:
            seen.add(cell)
            record_property(PROPERTY, cell)

    _record = record
    # torch.compile refuses to work below a mode.
    whole = request.module.__name__ in WHOLE and "compile" not in request.node.name
    with Watch() if whole else contextlib.nullcontext():
        yield
    _record = None


def pytest_addoption(parser):
    parser.addoption("--record-support", type=Path, help="write which features the tests ran")


def _ran(reporter):
    """{place: {op: {direction: [features]}}} of the tests that passed."""
    cells = {
        tuple(value.split("|"))
        for report in reporter.getreports("passed")
        for name, value in report.user_properties
        if name == PROPERTY
    }
    tree = {}
    for place, op, direction, feature in sorted(cells):
        tree.setdefault(place, {}).setdefault(op, {}).setdefault(direction, []).append(feature)
    return tree


def unseen(claimed, ran):
    """What is claimed of the CPU and the executor and did not run."""
    for place in ("cpu", "executor"):
        for op, directions in claimed.get(place, {}).items():
            for direction, found in directions.items():
                seen = ran.get(place, {}).get(op, {}).get(direction, ())
                yield from (f"{place} {op} {direction}: {x}" for x in found if x not in seen)


def _ran_everything(session):
    config, option = session.config, session.config.option
    narrowed = option.keyword or option.markexpr not in ("", "not slow") or session.testsfailed
    narrowed = narrowed or getattr(option, "lf", False) or option.collectonly
    return not narrowed and config.args == config.getini("testpaths") and option.device == "cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """In the process with the reports: writes what ran, or fails if more than that is claimed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    path = session.config.getoption("--record-support")
    if path:
        path.write_text(json.dumps(_ran(reporter), indent=1) + "\n")
    elif _ran_everything(session):
        missing = list(unseen(json.loads(CLAIMS.read_text()), _ran(reporter)))
        if missing:
            text = f"{CLAIMS.name} claims what no test ran: {', '.join(missing)}"
            add_failure(session, "tests/support.py", "claims", text)
