"""The stages of test_gpu.py: what each runs, within which time, and what it makes of the output.

A stage is a function from a `Run` and the seconds it has to an outcome: a dict with `status`
(passed, failed, skipped), `summary` (one line) and `details`. Whatever needs the GPU runs in
processes of its own, so a crash or a hang ends one stage and no more.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from gpu import planted

ROOT = Path(__file__).resolve().parents[2]
GPU = Path(__file__).resolve().parent
TEST_FILES = (
    "attention_forward",
    "attention_backward",
    "decode",
    "merge_states",
    "append_kv",
    "paged",
    "sink",
    "alibi",
    "varlen",
    "varlen_backward",
    "varlen_paged",
    "varlen_torch",
    "flat_linear",
    "errors",
    "properties",
    "regressions",
    "regressions_memory",
    "sdpa_face",
    "flash_attn_face",
    "kvcache_face",
    "introspect",
    "compile",
    "registration",
    "hostile",
    "plain",
    "transforms",
    "unified",
    "unified_properties",
    "unified_torch",
)
TOOLS = ("memcheck", "racecheck", "synccheck")
# A summary must be there and count nothing: a tool that did not run has found nothing either.
CLEAN = re.compile(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards")
TOOL_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")
OURS = "kns=flashinfer_lite"  # substring of a kernel's name: instrument our kernels alone
LOG_BYTES = 1 << 20
TAIL_LINES = 40
FLAT_SPARE_S = 12  # torch's start, and the last shape begun
BENCH_SPARE_S = 30  # the last shape begun may have to compile FlexAttention


@dataclass
class Run:
    """One run of test_gpu.py: where it works and what the processes it starts get."""

    work: Path
    environment: dict[str, str]
    dry: bool = False
    logs: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def command(self, name: str, command: list, seconds: float, **environment) -> int | None:
        """Run a command within ``seconds``; return its exit status, or None if time ran out.

        Its output is kept in ``logs[name]``; the end of it is printed if it fails.
        """
        log = self.work / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(map(str, command)),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self.environment | environment,
                start_new_session=True,
            )
            try:
                status = process.wait(max(seconds, 1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        text = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        self.logs[name] = text
        if status != 0:
            reason = "out of time" if status is None else f"exit status {status}"
            tail = "\n".join(text.splitlines()[-TAIL_LINES:])
            print(f"--- {name}: {reason}; the end of its output:\n{tail}\n---", flush=True)
        return status


def outcome(ok: bool, summary: str, **details) -> dict:
    return {"status": "passed" if ok else "failed", "summary": summary, "details": details}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def doctor(run: Run, seconds: float) -> dict:
    path = run.work / "doctor.json"
    command = [sys.executable, GPU / "doctor.py", "--device", run.device, "--json", path]
    status = run.command("doctor", command, seconds)
    found = read_json(path)
    print(run.logs["doctor"], flush=True)
    smem = found.get("smem_optin_bytes")
    summary = (
        f"{found.get('gpu')}, {found.get('sms', '?')} SMs, "
        f"{smem // 1024 if smem else '?'} KiB of shared memory a block, CUDA half: "
        f"{found.get('cuda_status')}"
    )
    return outcome(status == 0, summary, **found)


def read_junit(path: Path) -> dict:
    """Return the counts and failures of a pytest report."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failed = []
    if not path.exists():
        return counts | {"failed": [], "missing": True}
    root = ElementTree.parse(path).getroot()
    for suite in root.iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    for case in root.iter("testcase"):
        for kind in ("failure", "error"):
            if (problem := case.find(kind)) is not None:
                name = f"{case.get('classname')}::{case.get('name')}"
                message = (problem.get("message") or "").splitlines() or [""]
                failed.append({"test": name, "message": message[0][:300]})
    return counts | {"failed": failed}


def run_pytest(run: Run, name: str, arguments: list, seconds: float, workers: int = 0, **env):
    """Return (passed, the counts and failures) of a pytest run."""
    junit = run.work / f"{name}.xml"
    parallel = ["-n", workers] if workers and has_module(run, "xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "--device", run.device, *parallel]
    command += [f"--junitxml={junit}", "-p", "no:cacheprovider", *arguments]
    status = run.command(name, command, seconds, OMP_NUM_THREADS="1", **env)
    found = read_junit(junit)
    found["not_here"] = re.findall(r"^not on \S+: (\d+ tests: .*)$", run.logs[name], re.MULTILINE)
    ran = found["tests"] - found["skipped"]
    return status == 0 and ran > 0, found | {"exit_status": status}


def has_module(run: Run, name: str) -> bool:
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is None)"
    done = subprocess.run([sys.executable, "-c", code], env=run.environment, cwd=ROOT)
    return done.returncode == 0


def counted(found: dict) -> str:
    bad = found["failures"] + found["errors"]
    return f"{found['tests'] - bad - found['skipped']} passed, {bad} failed"


def tests(run: Run, seconds: float) -> dict:
    if not has_module(run, "pytest"):
        return outcome(False, "no pytest in this python: carry wheels and pass --wheels")
    support = run.work / "support.json"
    record = f"--record-support={support}"
    if run.dry:
        few = ["tests/test_merge_states.py", "-k", "single_state or only_empty"]
        ok, found = run_pytest(run, "tests", [record, *few], seconds)
        return outcome(ok, counted(found), numerics=found, support=read_json(support))
    files = [f"tests/test_{name}.py" for name in TEST_FILES]
    workers = max(1, min(10, (os.cpu_count() or 1) - 4))
    with ThreadPoolExecutor() as pool:
        both = [
            pool.submit(
                run_pytest, run, "tests", [record, "-m", "not slow", *files], seconds, workers
            ),
            # Values of lengths are checked in this mode only, which waits for the device.
            pool.submit(
                run_pytest,
                run,
                "tests_checked",
                ["-m", "checks_values", *files],
                seconds,
                2,
                FLASHINFER_LITE_CHECK="1",
            ),
        ]
        (ok, found), (ok_checked, checked) = [future.result() for future in both]
    summary = f"{counted(found)}; with FLASHINFER_LITE_CHECK=1: {counted(checked)}"
    details = {"numerics": found, "checked": checked, "support": read_json(support)}
    return outcome(ok and ok_checked, summary, **details)


def golden(run: Run, seconds: float) -> dict:
    # The dry run has no device: only what compares the two sides' declarations.
    arguments = ["tests/test_arch_golden.py", *(["-k", "declare"] if run.dry else [])]
    ok, found = run_pytest(run, "golden", arguments, seconds)
    # Without its library every case is skipped; a few belong to other architectures.
    enough = 2 * found["skipped"] < found["tests"]
    return outcome(ok and enough, f"{counted(found)}, {found['skipped']} skipped", table=found)


def sanitizer(run: Run, seconds: float) -> dict:
    deadline = time.monotonic() + seconds
    cases = [sys.executable, GPU / "cases.py", "--device", run.device]
    if run.dry:
        status = run.command("cases", [*cases, "--few"], seconds)
        return outcome(status == 0, "no sanitizer in a dry run", tools={"none": status})
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return outcome(True, "no compute-sanitizer on the PATH") | {"status": "skipped"}
    proof = planted.build(run)

    def under(name, *command):
        options = [tool, "--tool", name, "--error-exitcode", "86", "--print-limit", "20"]
        # The runtime's own probing calls fail where torch expects it; our launches are checked.
        options += ["--report-api-errors", "no", "--kernel-name", OURS, *command]
        key = f"{name}_{'planted' if command[0] == proof else 'cases'}"
        # Each allocation is the device's own, so that its end is a bound that memcheck knows.
        left = deadline - time.monotonic()
        status = run.command(key, options, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        said = TOOL_SUMMARY.findall(run.logs[key])
        return status, said[-1] if said else "no summary", bool(CLEAN.search(run.logs[key]))

    with ThreadPoolExecutor() as pool:
        modes = {name: ["--unchecked"] if name == "racecheck" else [] for name in TOOLS}
        runs = {name: pool.submit(under, name, *cases, *modes[name]) for name in TOOLS}
        proofs = {name: pool.submit(under, name, proof, name) for name in TOOLS if proof}
        found = {name: future.result() for name, future in runs.items()}
        bites = {name: future.result()[0] == 86 for name, future in proofs.items()}
    clean = all(status == 0 and quiet for status, _, quiet in found.values())
    proven = all(bites.values()) if proof else None
    tools = {name: {"exit_status": s, "said": said} for name, (s, said, _) in found.items()}
    summary = "; ".join(f"{name}: {said}" for name, (_, said, _) in found.items())
    summary += "; planted errors " + {None: "not built", True: "found", False: "MISSED"}[proven]
    return outcome(clean and proven is not False, summary, tools=tools, planted_found=bites)


def graph(run: Run, seconds: float) -> dict:
    path = run.work / "graph.json"
    command = [sys.executable, GPU / "graphs.py", "--device", run.device, "--json", path]
    status = run.command("graph", command, seconds)
    found = read_json(path)
    summary = ", ".join(f"{name} {text.split(':')[0]}" for name, text in found.items())
    return outcome(status == 0, summary or "no result", checks=found)


def bench(run: Run, seconds: float) -> dict:
    path = run.work / "bench.jsonl"
    command = [sys.executable, ROOT / "bench" / "bench.py", "--output", path]
    if run.dry:
        command += [
            "--device",
            "stand-in",
            "--op",
            "attention",
            "attention_bwd",
            "decode",
            "--dtype",
            "float32",
        ]
        command += ["--shapes", "llama3-8b@24", "--seconds", "0.001"]
    else:
        within = max(seconds - BENCH_SPARE_S, 1)
        command += ["--device", "cuda", "--seconds", "0.15", "--within", f"{within:.0f}"]
    status = run.command("bench", command, seconds)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [{}]
    header, rows = lines[0], lines[1:]
    wrong, left_out = header.get("wrong", []), header.get("left_out", [])
    summary = f"{len(rows)} rows, {len(wrong)} wrong, no time for {len(left_out)}"
    return outcome(status == 0 and len(rows) > 0, summary, header=header, rows=rows)


def flat(run: Run, seconds: float) -> dict:
    path = run.work / "flat.json"
    command = [sys.executable, GPU / "flat.py", "--device", run.device, "--json", path]
    within = max(seconds - FLAT_SPARE_S, 1)
    status = run.command("flat", [*command, "--within", f"{within:.0f}"], seconds)
    rows = read_json(path) or []
    times = [row["seconds"] for row in rows]
    ours = sum(min(t["gemv"], t["flat_gemm"]) < t["vendor"] for t in times)
    summary = f"{len(rows)} shapes, ours faster than cuBLAS at {ours}"
    return outcome(status == 0 and len(rows) > 0, summary, rows=rows)


# name -> (stage, seconds): together the nine minutes that one call may take.
STAGES = {
    "doctor": (doctor, 30),
    "tests": (tests, 170),
    "golden": (golden, 30),
    "sanitizer": (sanitizer, 165),
    "graph": (graph, 25),
    "flat": (flat, 30),
    "bench": (bench, 90),
}
