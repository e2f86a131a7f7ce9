"""Runs the cases of a kernel against a mutant and says what noticed it, if anything did."""

import os
import pickle
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from flashinfer_lite.testing import assert_same_bits, simt

SECONDS = 120  # for one mutant's cases; what needs more hangs


@dataclass(frozen=True)
class Golden:
    """What a case gives without a mutant."""

    tensors: tuple
    counters: tuple  # [(access, file, line, requests, ideal, actual)] of each launch
    sites: frozenset  # {(kind, file, line)}


def in_child(function):
    """function() in a process of its own; -> (result, "") or (None, "crash" or "hang").

    Modules of mutants cannot share a process, and some mutants take it down.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        torch.set_num_threads(1)
        status = 1
        try:
            with os.fdopen(write, "wb") as pipe:
                pipe.write(pickle.dumps(function()))
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return pickle.loads(data), ""
    hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return None, "hang" if hung else "crash"


def use_module(path):
    """Let simt.load() take the executor from this file; in a child that has loaded none."""
    simt.module_path = lambda hooks=False: Path(path)
    simt.load.cache_clear()


def golden(cases):
    """{(case, eager): Golden}; AssertionError if the kernels as they are do not pass."""
    found = {}
    for case in cases:
        for eager in (False, True):
            tensors, reports = case.call({"eager": eager})
            for report in reports:
                assert not report.errors, f"{case.kernel} {case.name}: {report.text()}"
            try:
                case.check(tensors)
            except AssertionError as error:
                raise AssertionError(f"{case.kernel} {case.name}: {error}") from None
            found[case.name, eager] = Golden(
                tuple(tensors), _counters(reports), frozenset().union(*map(_sites, reports))
            )
    return found


def _counters(reports):
    return tuple(tuple(report.counters) for report in reports)


def _sites(report):
    return {(kind, file, line) for kind, file, line, _ in report.sites}


def killer(case, unmutated, options, same_bits):
    """-> (checker, text) of what notices the mutant in this case, or None.

    `same_bits`: nothing that the mutant changes may change the bits of a result.
    """
    try:
        tensors, reports = case.call(options)
    except RuntimeError as error:
        return "host", str(error)
    for report in reports:
        if report.errors:
            kind, file, line, _, text = report.errors[0]
            return kind, f"{file}:{line} {text}"
    try:
        case.check(tensors)
    except AssertionError as error:
        return "numerics", str(error)
    if _counters(reports) != unmutated.counters:
        return "counters", "other wavefronts or sectors than without the mutant"
    if same_bits:
        try:
            for got, wanted in zip(tensors, unmutated.tensors, strict=True):
                assert_same_bits(got, wanted)
        except AssertionError as error:
            return "bits", str(error)
    return None


def first_killer(cases, goldens, *, same_bits, disabled=()):
    """The first case that notices, late and eager copies; -> (case name, checker, text) or None."""
    for case in cases:
        for eager in (False, True):
            options = {"eager": eager, "disabled": list(disabled)}
            noticed = killer(case, goldens[case.name, eager], options, same_bits)
            if noticed:
                return (case.name, *noticed)
    return None
