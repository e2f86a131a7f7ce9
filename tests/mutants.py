"""Break the CUDA kernels one line at a time and see that the executor's tests notice.

    python tests/mutants.py [--sites-only] [--kernel NAME] [--changed [--base REF]] [--list]

A *site* is a call that orders or guards something: a barrier, a wait, a commit, a predicate. Each
is switched off in turn, without recompiling; the sites are those that the cases reach, and all that
the sources have must be reached. A *text* mutant is a changed line (tests/mutant_list), compiled
for one row per kernel. Cases: tests/mutant_cases.py. A mutant counts as noticed if the executor
finds something, a result is wrong against float64, or wavefronts or sectors differ; a site also if
a bit of a result does.

Exit code 1 if a mutant survives without an explanation, or dies in spite of one, or does not
compile, or is stale. `make simt` first.
"""

import argparse
import multiprocessing
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

import mutant_build
import mutant_run
import mutant_sources
import torch
from mutant_cases import INSTANCES, MERGES_SPLITS, ONE_STAGE, suite
from mutant_sources import CUDA, KERNELS, ROOT

ROWS = {kernel: [row] for kernel, row in INSTANCES.items()}
ROWS["decode"].append(MERGES_SPLITS)
ROWS["attention_bwd"].append(ONE_STAGE)
KIND_OF_CALL = {
    "sync_threads": "barrier",
    "sync_threads_or": "barrier",
    "bar_sync": "named_barrier",
    "bar_arrive": "arrive",
    "cp_async_wait": "wait",
    "mbarrier_wait": "wait",
    "cp_async_commit": "commit",
    "fence_gpu": "fence",
    "fence_proxy_async": "fence",
    "fence_mbarrier_init": "fence",
    "mbarrier_arrive": "arrive",
    "mbarrier_arrive_expect_tx": "arrive",
    "sync_warp": "syncwarp",
    "predicate": "predicate",
}
CALL = re.compile(rf"\barch::({'|'.join(KIND_OF_CALL)})\b")
# (kernel, kind, file, part of the line): why nothing need notice that the site is off.
EXPLAINED_SITES = {}


@dataclass(frozen=True)
class Site:
    kernel: str
    kind: str
    file: str  # as the executor names it: tile/copy.cuh
    line: int

    @property
    def text(self):
        return source(self.file).splitlines()[self.line - 1].strip()

    @property
    def title(self):
        return f"{self.kind} off at {self.file}:{self.line}: {self.text}"

    def explained_by(self, explained):
        """The key of `explained` that means this site, or None."""
        for key in explained:
            if key[:3] == (self.kernel, self.kind, self.file) and key[3] in self.text:
                return key
        return None


@dataclass(frozen=True)
class Verdict:
    kernel: str
    kind: str  # of site, or "text"
    title: str
    noticed: tuple | None  # (case, checker, text)
    explained: str | None


def source(file):
    path = CUDA / file
    return (path if path.exists() else CUDA / "kernels" / file).read_text()


def calls_in_source(kernel):
    """{(kind, file, line)} of every call in the kernel's own file and the tiles it includes."""
    found = set()
    for path in mutant_sources.closure(f"cuda/kernels/{kernel}/sm80.cuh"):
        if not path.startswith(("cuda/kernels/", "cuda/tile/")):
            continue
        file = "/".join(path.split("/")[-2:])
        for line, text in enumerate(source(file).splitlines(), 1):
            code = text.partition("//")[0]
            found |= {(KIND_OF_CALL[call], file, line) for call in CALL.findall(code)}
    return found


def sites_of(kernel, goldens):
    """The sites of the kernel that its cases reach."""
    reached = frozenset().union(*(golden.sites for golden in goldens[kernel].values()))
    return [Site(kernel, *site) for site in sorted(reached & calls_in_source(kernel))]


def unreached(kernels, goldens):
    """Sites in the sources that no case reaches: one of a kernel's own, or a tile's that no
    kernel at all reaches, which only a run of all kernels can tell."""
    reached = {site for kernel in kernels for golden in goldens[kernel].values()
               for site in golden.sites}  # fmt: skip
    missing = {site for kernel in kernels for site in calls_in_source(kernel)} - reached
    if set(kernels) != set(KERNELS):
        missing = {site for site in missing if not site[1].startswith("tile/")}
    return sorted(missing)


# ---- What a worker process runs. It inherits the cases and goldens of the parent by forking.

_work = {}


def _try_site(site):
    cases = [
        case
        for case in _work["cases"][site.kernel]
        if (site.kind, site.file, site.line)
        in _work["goldens"][site.kernel][case.name, False].sites
    ]

    def attempt():
        off = [(site.file, site.line, site.kind)]
        goldens = _work["goldens"][site.kernel]
        return mutant_run.first_killer(cases, goldens, same_bits=True, disabled=off)

    noticed, trouble = mutant_run.in_child(attempt)
    return site, ("", trouble, "") if trouble else noticed


def _try_text(job):
    mutant, kernel, module = job

    def attempt():
        mutant_run.use_module(module)
        cases, goldens = _work["cases"][kernel], _work["goldens"][kernel]
        return mutant_run.first_killer(cases, goldens, same_bits=False)

    noticed, trouble = mutant_run.in_child(attempt)
    return job, ("", trouble, "") if trouble else noticed


def _golden_of(kernel):
    return kernel, mutant_run.in_child(lambda: mutant_run.golden(_work["cases"][kernel]))


def side_by_side(function, jobs, workers):
    if not jobs:
        return []
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return list(pool.imap_unordered(function, jobs))


# ---- Verdicts


def judge_sites(kernels, goldens, explained, workers):
    sites = [site for kernel in kernels for site in sites_of(kernel, goldens)]
    verdicts = []
    for site, noticed in side_by_side(_try_site, sites, workers):
        key = site.explained_by(explained)
        verdicts.append(
            Verdict(site.kernel, site.kind, site.title, noticed, key and explained[key])
        )
    return verdicts


def judge_text(mutants, kernels, workers):
    """-> (verdicts, titles of mutants that do not compile)."""
    modules = mutant_build.build(mutants, kernels, ROWS, workers)
    jobs = [
        (mutant, kernel, modules[mutant.name, kernel])
        for mutant in mutants
        for kernel in kernels
        if kernel in mutant.kernels
    ]
    broken = sorted({mutant.title for mutant, _, module in jobs if module is None})
    verdicts = []
    for (mutant, kernel, _), noticed in side_by_side(
        _try_text, [job for job in jobs if job[2]], workers
    ):
        reason = mutant.survives.get(kernel)
        verdicts.append(Verdict(kernel, "text", mutant.title, noticed, reason))
    return verdicts, broken


def table(verdicts):
    """One line per kernel and kind: mutants, who noticed them, survivors."""
    groups = defaultdict(list)
    for verdict in verdicts:
        groups[verdict.kernel, verdict.kind].append(verdict)
    lines = [f"{'kernel':14}{'kind':14}{'mutants':>8}{'noticed':>8}{'survive':>8}  by"]
    for (kernel, kind), group in sorted(groups.items()):
        by = Counter(verdict.noticed[1] for verdict in group if verdict.noticed)
        by = ", ".join(f"{checker} {count}" for checker, count in by.most_common())
        noticed = sum(verdict.noticed is not None for verdict in group)
        counts = f"{len(group):8}{noticed:8}{len(group) - noticed:8}"
        lines.append(f"{kernel:14}{kind:14}{counts}  {by}")
    return "\n".join(lines)


def complaints(verdicts):
    for verdict in verdicts:
        where = f"{verdict.kernel}: {verdict.title}"
        if verdict.noticed is None and verdict.explained is None:
            yield f"survives: {where}"
        elif verdict.noticed and verdict.explained:
            case, checker, _ = verdict.noticed
            yield f"explained, but noticed by {checker} in case {case!r}: {where}"


def stale_sites(kernels, goldens, explained):
    keys = {
        site.explained_by(explained) for kernel in kernels for site in sites_of(kernel, goldens)
    }
    return [key for key in explained if key[0] in kernels and key not in keys]


# ---- What to run


def git(*arguments):
    """The lines that git prints."""
    command = ["git", "-C", ROOT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def changed_files(base):
    """-> (the paths that differ from where HEAD left `base`, untracked ones too; since when).

    Where nothing differs, as in CI on `base` itself: since before the last commit on csrc/cuda.
    """
    untracked = git("ls-files", "--others", "--exclude-standard")
    changed = [*git("diff", "--name-only", "--merge-base", base), *untracked]
    if changed:
        return changed, base
    last = git("log", "-1", "--first-parent", "--format=%h", "--", "csrc/cuda")
    if not last:
        return [], base
    base = f"{last[0]}~1"
    return git("diff", "--name-only", base), base


def changed_kernels(base):
    """The kernels that a change since `base` may concern."""
    try:
        changed, since = changed_files(base)
    except subprocess.CalledProcessError as error:
        print(f"--changed: every kernel, because git says: {error.stderr.strip()}")
        return KERNELS
    everywhere = ("csrc/simt/", "csrc/instances.py", "scripts/build_", "tests/mutant")
    in_all = sources_of("cuda/dispatch.cpp") | sources_of("cuda/flat_linear.cpp")
    kernels = KERNELS
    if in_all.isdisjoint(changed) and not any(
        path.startswith((*everywhere, "flashinfer_lite/testing/")) for path in changed
    ):
        own = {kernel: sources_of(f"cuda/kernels/{kernel}/sm80.cuh") for kernel in KERNELS}
        kernels = tuple(kernel for kernel in KERNELS if not own[kernel].isdisjoint(changed))
    print(f"changed since {since}: {', '.join(kernels) or 'no kernel'}", flush=True)
    return kernels


def sources_of(file):
    return {f"csrc/{path}" for path in mutant_sources.closure(file)}


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--sites-only", action="store_true")
    parser.add_argument("--changed", action="store_true", help="only kernels that changed")
    parser.add_argument("--base", default="origin/main", help="since when, for --changed")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--verbose", action="store_true", help="say what noticed each mutant")
    return parser.parse_args(arguments)


def main(arguments=None, cases=None, explained=EXPLAINED_SITES):
    started = time.monotonic()
    torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork, its locks do
    options = parse(arguments)
    kernels = tuple(options.kernel or KERNELS)
    if options.changed:
        kernels = tuple(kernel for kernel in changed_kernels(options.base) if kernel in kernels)
        if not kernels:
            return 0
    mutants = [m for m in mutant_sources.all_mutants() if set(m.kernels) & set(kernels)]
    faults = {mutant.name: mutant.fault() for mutant in mutants}
    mutants = [mutant for mutant in mutants if not faults[mutant.name]]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.title}\n    {mutant.why}")
        return 0
    cases = suite() if cases is None else cases
    _work["cases"] = {kernel: [c for c in cases if c.kernel == kernel] for kernel in kernels}
    results = dict(side_by_side(_golden_of, kernels, options.jobs))
    if failed := [kernel for kernel, (found, _) in results.items() if found is None]:
        print(f"the kernels as they are do not pass: {', '.join(failed)}")
        return 1
    _work["goldens"] = goldens = {kernel: found for kernel, (found, _) in results.items()}
    verdicts = judge_sites(kernels, goldens, explained, options.jobs)
    wrong = [f"stale: {fault}" for fault in faults.values() if fault]
    wrong += [f"no case reaches {kind} at {file}:{line}"
             for kind, file, line in unreached(kernels, goldens)]  # fmt: skip
    wrong += [f"explained, but no such site: {key}" for key in
              stale_sites(kernels, goldens, explained)]  # fmt: skip
    if not options.sites_only:
        of_text, broken = judge_text(mutants, kernels, options.jobs)
        verdicts += of_text
        wrong += [f"does not compile: {title}" for title in broken]
    wrong += complaints(verdicts)
    if options.verbose:
        for verdict in verdicts:
            print(f"{verdict.kernel}: {verdict.title}: {verdict.noticed or verdict.explained}")
    print(table(verdicts))
    print("\n".join(wrong) or "every mutant is noticed, or explained")
    print(f"{len(verdicts)} mutants in {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
