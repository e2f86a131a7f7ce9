"""Verify the CUDA half on a machine with a GPU, in one command: `make test-gpu`. See docs/gpu.md.

    python3 scripts/test_gpu.py                            every stage, in less than nine minutes
    python3 scripts/test_gpu.py --stage doctor,graph       some of them
    python3 scripts/test_gpu.py --prebuilt --commit HASH   libraries carried from another machine

Stages run one after another; a failed one stops none of the others. Exit status: 0 all passed, 1 a
stage failed, 2 something is missing here and nothing ran. Needs this checkout and a python with a
CUDA torch and pytest, nothing installed by us, and no network.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import build_cuda
from gpu import report, stages

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [ROOT / "flashinfer_lite" / f"_C_{half}.abi3.so" for half in ("cpu", "cuda")]
BUDGET_S = 540
BUILD_S = 400


class Missing(Exception):
    """Why nothing can run here, in one line."""


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stage", default=",".join(stages.STAGES), help="comma-separated; default: %(default)s"
    )
    parser.add_argument("--dry-run", action="store_true", help="every stage without a GPU, tiny")
    parser.add_argument(
        "--prebuilt", action="store_true", help="take the libraries as they are, build nothing"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this python lacks")
    parser.add_argument("--commit", help="what the JSON says, where the files came without git")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all stages")
    parser.add_argument("--output", type=Path, help="the JSON; default: in $OUT or bench/results")
    args = parser.parse_args(argv)
    args.stages = [name for name in args.stage.split(",") if name]
    unknown = [name for name in args.stages if name not in stages.STAGES]
    if unknown or not args.stages:
        known = ", ".join(stages.STAGES)
        parser.error(f"--stage: expected some of {known}, got {args.stage!r}")
    return args


def require_gpu():
    """Raise Missing unless this python's torch sees a GPU."""
    try:
        import torch
    except ImportError as error:
        raise Missing(f"no torch in {sys.executable} ({error})") from None
    if torch.version.cuda is None:
        raise Missing(f"no GPU can be used: torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise Missing(f"no GPU: torch {torch.__version__} sees none")


def sources_of(library):
    """The files that a library is made of, and those that build it."""
    other = "cuda" if "_C_cpu" in library.name else "cpu"
    scripts = [ROOT / "setup.py", *(ROOT / "scripts").glob("build_*.py")]
    csrc = ROOT / "csrc"
    elsewhere = {csrc / "simt", csrc / other}  # the executor is in neither library
    return [path for path in scripts if path.name != "build_simt.py"] + [
        path
        for path in report.source_files(csrc)
        if elsewhere.isdisjoint(path.parents)
        and not path.stem.endswith(f"_{other}")
        and not (path.suffix == ".py" and other == "cuda")  # the table of the CUDA kernels
    ]


def is_stale(library):
    """Whether a library is older than what it is made of; every build makes it as new as itself."""
    built = library.stat().st_mtime
    return any(path.stat().st_mtime > built for path in sources_of(library))


def require_libraries(run, prebuilt):
    """Build what is missing or stale, or raise Missing."""
    absent = [path.name for path in LIBRARIES if not path.exists()]
    stale = [path.name for path in LIBRARIES if path.exists() and is_stale(path)]
    if prebuilt:
        if absent:
            raise Missing(f"--prebuilt, but no {' and no '.join(absent)} in flashinfer_lite/")
        return
    if not absent and not stale:
        return
    wanted = ", ".join([f"{n} (missing)" for n in absent] + [f"{n} (stale)" for n in stale])
    toolkit, problem = build_cuda.find_toolkit()
    if toolkit is None:
        cure = "make build CUDA=pip installs one, --prebuilt takes what is there as it is"
        raise Missing(f"{wanted}, and {problem}: {cure}")
    print(f"building {wanted} ...", flush=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if run.command("build", command, BUILD_S, FLASHINFER_LITE_CUDA="1") != 0:
        raise Missing(f"building {wanted} failed, the end of the output is above")


def require_loadable(run):
    code = "import flashinfer_lite as f; print(f.built, f.cuda_status, sep='|')"
    status = run.command("load", [sys.executable, "-c", code], 120)
    said = run.logs["load"].strip().splitlines()
    if status != 0 or not said or said[-1] != "True|loaded":
        raise Missing(f"the libraries do not load: {said[-1] if said else 'no answer'}")


def install_wheels(run, folder):
    """Install wheels into the run's own folder, ahead of what this python has."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise Missing(f"--wheels {folder}: no wheel there")
    site = run.work / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    if run.command("wheels", [*command, "--target", site, *wheels], 120) != 0:
        raise Missing("installing the wheels failed, pip's reason is above")
    run.environment["PYTHONPATH"] += os.pathsep + str(site)


def commit_of(args):
    """The checkout's commit, with +dirty for changed tracked files, or what --commit says."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if args.commit:
        return args.commit
    try:
        dirty = "+dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def clocks():
    sys.path.insert(0, str(ROOT / "bench"))
    from smi import smi

    return smi()


def run_stage(run, name, budget_left):
    function, limit = stages.STAGES[name]
    limit = min(limit, budget_left)
    print(f"\n==== {name}, at most {limit:.0f} s", flush=True)
    started = time.monotonic()
    if limit < 1:
        found = stages.outcome(False, "no time left of --budget")
    else:
        try:
            found = function(run, limit)
        except Exception as error:  # a stage that breaks must not take the others with it
            found = stages.outcome(False, f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - started
    result = {"stage": name, "seconds": seconds, "limit_s": limit} | found
    print(report.stage_table([result]), flush=True)
    return result


def output_paths(args, gpu):
    """Where the JSON and the logs go: together, but logs never among the committed results."""
    folder = Path(os.environ.get("OUT") or ROOT / "build")
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-").removeprefix("nvidia-")
    committed = not args.dry_run and "OUT" not in os.environ
    json_folder = ROOT / "bench" / "results" if committed else folder
    path = args.output or json_folder / f"gpu-{name}.json"
    return path, (path.parent if args.output else folder) / report.LOG_NAME


def verify(args, run):
    """Run the stages; return the exit status."""
    started = time.monotonic()
    if not args.dry_run:
        require_gpu()
    if args.wheels:
        install_wheels(run, args.wheels)
    if not args.dry_run:
        require_libraries(run, args.prebuilt)
        require_loadable(run)
    facts = {
        "commit": run.environment["FLASHINFER_LITE_COMMIT"],
        "command": sys.argv,
        "dry_run": args.dry_run,
        "sources_sha256": report.tree_sha256(ROOT / "csrc"),
        "libraries_sha256": {path.name: report.sha256(path) for path in LIBRARIES},
        "clocks": {"before": clocks()},
    }
    outcomes = []
    for name in args.stages:
        outcomes.append(run_stage(run, name, args.budget - (time.monotonic() - started)))
    facts["clocks"]["after"] = clocks()
    result = report.assemble(outcomes, facts)
    path, log = output_paths(args, result["machine"].get("gpu") or first_gpu(args.dry_run))
    report.write(path, log, result, run.logs)
    if result["comparisons"]:
        print(f"\n{report.bench_table(result['comparisons'])}")
    print(f"\n{report.stage_table(outcomes)}\n{path}", flush=True)
    return 1 if any(o["status"] == "failed" for o in outcomes) else 0


def first_gpu(dry_run):
    """The GPU's name where the stage that reads it did not run."""
    if dry_run:
        return "none (dry run)"
    import torch

    return torch.cuda.get_device_name(0)


def main(argv=None):
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as work:
        # Our checkout first: neither the package nor its tests need to be installed.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        environment["FLASHINFER_LITE_COMMIT"] = commit_of(args)
        run = stages.Run(Path(work), environment, args.dry_run)
        try:
            return verify(args, run)
        except Missing as reason:
            print(f"test-gpu: {reason}; docs/gpu.md says what is needed", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
