"""The mutants' runner: its list fits the sources, it notices every broken site of one kernel, and
it tells of what slips through. `make mutants` runs it whole.
"""

import mutants
import pytest

mutant_sources, suite, KERNELS = mutants.mutant_sources, mutants.suite, mutants.KERNELS
Mutant, read_list = mutant_sources.Mutant, mutant_sources.read_list
pytestmark = pytest.mark.cpu_only("the executor runs kernels on the CPU")
# What `index < rows` guards against does not happen: the rows fill the blocks, the lanes the row.
FULL_ROWS = [case for case in suite() if case.name == "full rows"]


def run(capsys, *arguments, **planted):
    code = mutants.main(["--sites-only", *arguments], **planted)
    return code, capsys.readouterr().out


def test_list_fits_the_sources(device):
    listed = mutant_sources.all_mutants()
    assert [fault for fault in (mutant.fault() for mutant in listed) if fault] == []
    assert len({mutant.name for mutant in listed}) == len(listed) > 200
    assert {kernel for mutant in listed for kernel in mutant.kernels} == set(KERNELS)
    assert {kernel for m in listed for kernel in m.survives if kernel not in m.kernels} == set()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("no such text", "x", "occurs 0 times"),
        ("int", "long", "times"),
        ("#pragma once", "#pragma once", "changes nothing"),
        ("#pragma once", "#pragma\nonce", "moves the lines below"),
    ],
)
def test_a_stale_entry_is_told(device, old, new, complaint):
    assert complaint in Mutant("tile/rows.cuh", KERNELS, old, new, "a reason").fault()


def test_list_format(device):
    text = (
        "@ tile/copy.cuh decode\n- a\n-   b\n+ c\n+   d\n# why\n# so\n= decode: since\n- e\n+ f\n"
    )
    first, second = read_list(text)
    assert (first.old, first.new, first.why) == ("a\n  b", "c\n  d", "why so")
    assert first.survives == {"decode": "since"} and first.kernels == ("decode",)
    assert (second.file, second.old, second.new) == ("tile/copy.cuh", "e", "f")
    with pytest.raises(ValueError, match="starts with"):
        read_list("* x")


def test_every_site_of_a_kernel_is_noticed(device, capsys):
    code, out = run(capsys, "--kernel", "combine")
    assert code == 0, out
    assert "every mutant is noticed" in out and "combine" in out


def test_a_survivor_is_told(device, capsys):
    code, out = run(capsys, "--kernel", "combine", cases=FULL_ROWS)
    assert code == 1
    assert "survives: combine: predicate off at combine/sm80.cuh" in out


def test_an_unreached_site_is_told(device, capsys):
    cases = [case for case in suite() if case.kernel == "attention_fwd" and case.name == "no keys"]
    code, out = run(capsys, "--kernel", "attention_fwd", cases=cases)
    assert code == 1
    assert "no case reaches barrier at attention_fwd/sm80.cuh" in out


def test_an_explanation_must_hold(device, capsys):
    planted = {
        ("combine", "predicate", "combine/sm80.cuh", "index < "): "not so",
        ("combine", "barrier", "combine/sm80.cuh", "sync_threads"): "no such site",
    }
    code, out = run(capsys, "--kernel", "combine", explained=planted)
    assert code == 1
    assert "explained, but noticed by " in out and "explained, but no such site: " in out


def test_what_a_change_concerns(device, monkeypatch):
    def changed(*paths):
        monkeypatch.setattr(mutants, "changed_files", lambda base: (paths, base))
        return mutants.changed_kernels("HEAD~1")

    assert changed("README.md", "csrc/ops/decode_cpu.cpp") == ()
    assert changed("csrc/cuda/kernels/decode/sm80.cuh") == ("decode",)
    assert changed("csrc/cuda/tile/scheduler.cuh") == ("attention_fwd", "attention_bwd")
    assert changed("csrc/common/types.h") == KERNELS
    assert changed("csrc/simt/barrier.cpp") == KERNELS
    assert changed("csrc/cuda/dispatch.cpp") == KERNELS
    assert changed("csrc/common/heuristics.h") == KERNELS
    assert changed("scripts/build_simt.py") == KERNELS


def test_since_when_a_change_counts(device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # where a hook runs the tests
        monkeypatch.delenv(name, raising=False)

    def commit(path):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
        mutants.git("add", ".")
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        mutants.git(*who, "commit", "-qm", path)

    mutants.git("init", "-q", "-b", "main")
    commit("README.md")
    commit("csrc/cuda/kernels/decode/sm80.cuh")
    commit("docs/gpu.md")
    kernel, page = "csrc/cuda/kernels/decode/sm80.cuh", "docs/gpu.md"
    assert mutants.changed_files("main~1") == ([page], "main~1")
    # At the base: the last change of a kernel, and what came after it.
    changed, since = mutants.changed_files("main")
    assert changed == [kernel, page]
    assert mutants.git("rev-parse", since) == mutants.git("rev-parse", "main~2")
    (tmp_path / "new.txt").touch()
    assert mutants.changed_files("main") == (["new.txt"], "main")
    assert mutants.changed_kernels("nosuch") == KERNELS
    assert "every kernel, because git says" in capsys.readouterr().out
