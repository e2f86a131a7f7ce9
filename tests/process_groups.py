"""Processes of a torch.distributed group (gloo, on the CPU) that run cases together.

The test starts them once and names a case to all; each answers how it failed there. A case that
fails on one process leaves the others waiting for it, so all of them are then replaced.
"""

import contextlib
import functools
import multiprocessing
import os
import re
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

CASES = {}
TIMEOUT_S = 60  # of a case that takes less than a second

_SERVER = multiprocessing.get_context("forkserver")  # it imports torch once, for all processes


def case(*variants):
    """Makes a function a case, or one for each variant, which it then takes first."""

    def add(function):
        name = f"{function.__module__}.{function.__name__}".replace("_child.", ".")
        for variant in variants:
            CASES[f"{name}[{variant}]"] = functools.partial(function, variant)
        if not variants:
            CASES[name] = function
        return function

    return add


def runs(modules, not_by_four):
    """(how many processes, case) of all cases: four leave out what has one of these words, since on
    a small machine they take turns."""
    starts = tuple(module.replace("_child", ".") for module in modules)
    cases = [case for case in CASES if case.startswith(starts)]
    return [(2, case) for case in cases] + [
        (4, case) for case in cases if not any(word in case for word in not_by_four)
    ]


class raises:
    """A context that ends in this error; pytest's own is for processes of pytest."""

    def __init__(self, error, message):
        self.error, self.message = error, message

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        assert kind is not None, f"nothing was raised, expected {self.error.__name__}"
        matches = issubclass(kind, self.error) and re.search(self.message, str(error))
        assert matches, f"got {kind.__name__}: {error}, expected {self.message}"
        return True


class Processes:
    """`count` processes that know the cases of some modules."""

    def __init__(self, count, modules, folder):
        self.count, self.modules, self.folder = count, modules, folder
        self.processes, self.pipes, self.starts = [], [], 0

    def start(self):
        meeting = self.folder / f"meeting{self.count}_{self.starts}"
        self.starts += 1
        path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
        with mock.patch.dict(os.environ, environment):
            os.environ.pop("FLASHINFER_LITE_CHECK", None)
            _SERVER.set_forkserver_preload(list(self.modules))
            for rank in range(self.count):
                ours, theirs = _SERVER.Pipe()
                arguments = self.modules, rank, self.count, f"file://{meeting}", theirs
                process = _SERVER.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self.pipes.append(ours)

    def run(self, case):
        """How the case of a run failed, by rank; "" if it did not."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send(case)
        failures = []
        for rank, pipe in enumerate(self.pipes):
            try:
                answer = pipe.recv() if pipe.poll(2 * TIMEOUT_S) else "no answer"
            except EOFError:
                answer = "it died"
            if answer:
                failures.append(f"rank {rank}: {answer}")
        if failures:
            self.stop()
        return "\n".join(failures)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


@contextlib.contextmanager
def started(modules, folder):
    """Two processes and four, each group started when it is first needed."""
    by_count = {count: Processes(count, modules, folder) for count in (2, 4)}
    try:
        yield by_count
    finally:
        for processes in by_count.values():
            processes.stop()


def _serve(modules, rank, count, meeting, pipe):
    """Receives names of cases; answers each by how it failed, "" if it did not."""
    for module in modules:
        __import__(module)
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=count, timeout=timeout
    )
    while True:
        case = pipe.recv()
        torch.manual_seed(0)  # the same numbers on every rank
        try:
            CASES[case]()
            pipe.send("")
        except Exception:
            pipe.send(traceback.format_exc())
