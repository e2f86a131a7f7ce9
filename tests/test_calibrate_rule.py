"""Calibration without a model: histograms, the rule for phi, texts, and the file."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies

from flashinfer_lite import reference
from flashinfer_lite.calibrate import (
    GUARDS,
    MARGIN,
    Calibration,
    HeldOut,
    Histogram,
    choose_layer,
    collect,
    histogram,
)
from flashinfer_lite.calibrate.texts import make_batches

ROOT = Path(__file__).resolve().parent.parent
NAN, INF = float("nan"), float("inf")
fixed_fixtures = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def counted(*rows):
    """A Histogram of a list of values per head."""
    h = Histogram(len(rows))
    for head, row in enumerate(rows):
        if row:
            values = torch.zeros(1, len(rows), len(row), dtype=torch.float64)
            values[0, head] = torch.tensor(row, dtype=torch.float64)
            keep = torch.zeros(1, len(rows), len(row), dtype=torch.bool)
            keep[0, head] = True
            h.add(values, keep)
    return h


def chosen(*rows, guard=(-30.0, 30.0), rate=0.0):
    return choose_layer(0, counted(*rows), counted(*rows), guard, rate)


def make_calibration(held_out=None):
    guard = GUARDS[torch.bfloat16]
    heads = [[1.0, 2.0, 9.0, INF], [-3.0, 4.5, 4.5, 8000.5]]
    layers = [choose_layer(0, counted(*heads), counted(*heads), guard, 0.3)]
    layers.append(choose_layer(1, Histogram(0), Histogram(0), guard, 0.3))
    layers.append(choose_layer(2, counted([-80.0, 80.0]), counted([-80.0, 80.0]), guard, 0.3))
    return Calibration("m", 3, 2, "bfloat16", guard, 0.3, 8, 4, layers, held_out)


def test_importing_it_needs_no_other_package(device):
    code = (
        "import sys, flashinfer_lite.calibrate as c; "
        "print({'transformers', 'matplotlib'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "set()", out.stdout + out.stderr


def test_the_guard_is_the_kernels(device):
    text = (ROOT / "csrc/common/unified.h").read_text()
    rows = re.findall(r"kUnifiedGuard(<\w+>)?{(-?[\d.]+), (-?[\d.]+)}", text)
    found = {name: (float(low), float(high)) for name, low, high in rows}
    assert found == {"": GUARDS[torch.float32], "<Float16>": GUARDS[torch.float16]}
    assert GUARDS[torch.float64] == GUARDS[torch.bfloat16] == GUARDS[torch.float32]


@fixed_fixtures
@hypothesis.given(
    strategies.lists(
        strategies.lists(
            strategies.sampled_from([NAN, INF, -INF, 1e30, -8192.0, 8191.5])
            | strategies.floats(-50, 50, width=32),
            max_size=12,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_histogram_counts_everything_once(device, rows):
    h = counted(*rows)
    backwards = Histogram(len(rows))
    for head in reversed(range(len(rows))):
        for value in reversed(rows[head]):
            keep = torch.arange(len(rows)).view(1, -1, 1) == head
            backwards.add(torch.full((1, len(rows), 1), value), keep)
    for name in ("low", "width", "minimum", "maximum", "nonfinite", "huge"):
        assert getattr(h, name) == getattr(backwards, name), name
    assert torch.equal(h.counts, backwards.counts)
    assert h.counts.shape[1] <= histogram.MAX_BINS
    for head, row in enumerate(rows):
        binned = [x for x in row if abs(x) < histogram.LIMIT]
        assert h.minimum[head] == min(binned, default=INF)
        assert h.maximum[head] == max(binned, default=-INF)
        assert h.nonfinite[head] == sum(not abs(x) < INF for x in row)
        assert h.total(head) == len(row)
        for i, n in enumerate(h.counts[head].tolist()):
            low = (h.low + i) * h.width
            assert n == sum(low <= x < low + h.width for x in binned)


def test_bins_widen_with_the_range_of_values_alone(device):
    narrow = counted([0.0, 63.9])
    assert narrow.width == 0.0625 and narrow.counts.shape[1] == 1023
    wide = counted([-500.0, 0.3], [400.0])
    assert wide.width == 1.0 and wide.counts.sum() == 3
    assert wide.counts[0][0 - wide.low] == 1 and wide.low == -500


@fixed_fixtures
@hypothesis.given(
    strategies.lists(strategies.integers(0, 3), min_size=1, max_size=12), strategies.integers(0, 30)
)
def test_shortest_interval_is_the_shortest(device, counts, wanted):
    found = histogram.shortest_interval(torch.tensor(counts), wanted, low=-4, width=0.5)
    runs = [
        (j - i, -sum(counts[i:j]), i)
        for i in range(len(counts))
        for j in range(i + 1, len(counts) + 1)
        if sum(counts[i:j]) >= wanted > 0
    ]
    if not runs:
        assert found is None
        return
    length, mass, start = min(runs)
    begin, end = (round(edge / 0.5) + 4 for edge in found)
    assert (end - begin, -sum(counts[begin:end])) == (length, mass)


def test_phi_puts_the_row_maxima_into_the_middle_of_the_guard(device):
    layer = chosen([2.0, 5.9375], [-7.0, -7.0])
    assert layer.phi == [4.0, -7.0 + 0.03125] and layer.reason == ""
    assert layer.row_max_ranges == [(2.0, 6.0), (-7.0, -6.9375)]
    assert layer.margin == 28.0 and (layer.rows, layer.rows_outside) == (4, 0)
    half = chosen([2.0, 5.9375], guard=(0.0, 10.4))
    assert half.phi == [4.0 - 5.2] and half.margin == pytest.approx(3.2)


def test_the_wanted_rate_may_be_left_out(device):
    rows = [0.0] * 998 + [70.0, -70.0]
    assert chosen(rows).phi is None
    assert chosen(rows, rate=1e-3).phi is None, "one row may be outside, two are"
    layer = chosen(rows, rate=2e-3)
    assert (layer.rows_outside, layer.phi) == (2, [0.125]), "bins are 0.25 wide by then"
    assert chosen([0.0] * 999 + [70.0], rate=1e-3).rows_outside == 1


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (
            [[-20.0, 41.0]],
            r"head 0: 100 % of the row maxima lie in \(-20.0, 41.1\), wider than",
        ),
        (
            [[0.0], [-28.0, 28.0]],
            r"head 1.* leaves 1.97 to each bound of the guard, 3.00 wanted",
        ),
        ([[-90.0, 0.0], [0.0], [-99.0, 0.0]], r"head 2.*; 2 of 3 heads do not fit"),
        ([[0.0, NAN], [0.0]], r"head 0: 1 of 2 row maxima are NaN"),
        ([[0.0], []], r"head 1 had no row"),
        ([[], []], r"no attention ran in this layer"),
        ([[-496.8, 363.5]], r"lie in \(-497.0, 364.0\)"),  # the paper's OPT-6.7B
    ],
)
def test_a_layer_is_off_for_a_reason(device, rows, reason):
    layer = chosen(*rows)
    assert layer.phi is None and layer.rows_outside == 0
    assert re.search(reason, layer.reason), layer.reason


def test_the_margin_that_is_just_enough(device):
    width = 60 * (1 - 2 * MARGIN)
    assert chosen([0.0, width - 0.0625]).phi is not None
    assert chosen([0.0, width]).phi is None


def test_outside_never_promises_too_much(device):
    h = counted([0.0, 1.0, 1.01, 2.0, NAN])
    assert h.outside(0, -1.0, 3.0) == 1, "NaN is outside of everything"
    assert h.outside(0, 0.0, 3.0) == 2, "0 is not above 0"
    assert h.outside(0, 0.99, 1.05) == 5, "a bin that the bound cuts is outside"


@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (0, 2), (5, -1)])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("masked", ["no", "bool", "additive"])
def test_chunks_are_the_softmax_of_the_oracle(device, causal, window, lengths, masked, monkeypatch):
    if causal and window[1] > 0:
        window = (window[0], 0)
    monkeypatch.setattr(collect, "CHUNK", 2 * 6 * 11 * 2)  # two rows at a time
    seqlen_q, seqlen_kv = 7, 11
    q = torch.randn(2, seqlen_q, 6, 16, device=device)
    k = torch.randn(2, seqlen_kv, 2, 16, device=device)
    options = {"causal": causal, "window": window, "softmax_scale": 0.7, "softcap": 5.0}
    if lengths:
        options["kv_start"] = torch.tensor([0, 4], device=device, dtype=torch.int32)
        options["seqlens_kv"] = torch.tensor([9, 11], device=device, dtype=torch.int32)
    if masked != "no":
        mask = torch.rand(2, 1, seqlen_q, seqlen_kv, device=device) < 0.7
        bias = torch.randn(6, seqlen_q, seqlen_kv, device=device)
        options["mask"] = mask if masked == "bool" else bias.masked_fill(~mask, -INF)
    lse = []
    for scores, visible in collect.score_chunks(q, k, **options):
        assert scores.dtype == torch.float32 and scores.shape[2] <= 2
        assert scores[visible.expand_as(scores)].isfinite().all(), "hidden by -inf is not seen"
        lse.append(scores.masked_fill(~visible, -INF).double().logsumexp(-1))
    _, expected = reference.attention(q, k, k, **options, return_lse=True, dtype=torch.float64)
    if lse:
        found, seen = torch.cat(lse, 2), expected[:, :, -sum(x.shape[2] for x in lse) :]
        if causal == "top_left":
            seen = expected[:, :, : found.shape[2]]
        torch.testing.assert_close(found, seen, atol=1e-4, rtol=1e-5)
    assert torch.isneginf(expected).all() or lse


def test_texts_become_batches(device):
    class Tokenizer:
        bos_token_id = 1

        def encode(self, text):
            return [1, *map(ord, text)]

    def ids(*args, **kwargs):
        return [batch["input_ids"].tolist() for batch in make_batches(*args, **kwargs)]

    assert ids([[5, 6, 7], [8]], None, 2, 99) == [[[5, 6]], [[8]], [[7]]], "first pieces first"
    assert ids([[5, 6, 7], [8]], None, 2, 3) == [[[5, 6]], [[8]]]
    assert ids(["abc"], Tokenizer(), 3, 99) == [[[1, 97, 98]], [[1, 99]]], "each piece has a BOS"
    assert ids("abc", Tokenizer(), 50, 3) == [[[1, 97, 98]]], "shorter than a piece"
    padded = {"input_ids": torch.ones(2, 4), "attention_mask": torch.eye(4)[:2]}
    assert make_batches([padded], None, 2, 99) == [padded]
    for empty in ([], [""], [[]], ["", []]):
        with pytest.raises(ValueError, match="held_out: expected text, got none"):
            make_batches(empty, Tokenizer(), 8, 99, "held_out")
    with pytest.raises(TypeError, match="tokenizer: expected"):
        make_batches(["abc"], None, 8, 99)
    for wrong in ([3.5], 7, ["a", "b"], [[1], [2]], None):
        with pytest.raises(TypeError, match="texts: expected str"):
            make_batches([wrong], Tokenizer(), 8, 99)


def test_it_reads_what_it_wrote(device, tmp_path):
    for held_out in (None, HeldOut(5, 40, 2)):
        calibration = make_calibration(held_out)
        calibration.save(tmp_path / "c.json")
        loaded = Calibration.load(tmp_path / "c.json")
        assert loaded.summary() == calibration.summary()
        assert (loaded.guard, loaded.held_out) == (calibration.guard, held_out)
        assert [loaded.phi(i) for i in range(3)] == [calibration.phi(i) for i in range(3)]
        for ours, theirs in zip(loaded.layers, calibration.layers, strict=True):
            for name in ("scores", "row_max"):
                assert torch.equal(getattr(ours, name).counts, getattr(theirs, name).counts)
            ours, theirs = ({**vars(x), "scores": 0, "row_max": 0} for x in (ours, theirs))
            assert ours == theirs
        loaded.save(tmp_path / "d.json")
        assert (tmp_path / "c.json").read_bytes() == (tmp_path / "d.json").read_bytes()


def test_the_picture_has_what_the_layers_have(device, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="the picture needs it")
    drawn, save = [], figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path))
    )
    calibration = make_calibration()
    calibration.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    lines = [[list(map(float, line.get_xdata())) for line in axes.lines] for axes in (left, right)]
    assert calibration.phi(0) in lines[0] and list(calibration.layers[2].score_range) in lines[0]
    assert [0.0, 0.0] in lines[1] and [44.0, 44.0] in lines[1]
    colours = [[mesh.cmap.name for mesh in axes.collections] for axes in (left, right)]
    # Layer 1 has no attention, layer 2 one head and no phi.
    assert colours == [["Blues"] * 2, ["Blues", "Blues", "Reds"]]


def test_the_other_dtype_from_the_same_measurement(device):
    calibration = make_calibration(HeldOut(5, 40, 2))
    half = calibration.for_dtype(torch.float16)
    assert (half.dtype, half.guard, half.held_out) == ("float16", (0.0, 10.4), None)
    layer = calibration.layers[0]
    same = choose_layer(0, layer.scores, layer.row_max, (0.0, 10.4), 0.3)
    assert half.layers[0] == same != layer
    assert calibration.for_dtype("bfloat16", 0.0).phi(0) is None, "no row may be left out"
    with pytest.raises(ValueError, match="dtype: expected one of"):
        calibration.for_dtype("float8")
    with pytest.raises(IndexError, match="layer_idx"):
        calibration.phi(3)


def damage(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    if value is KeyError:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["format"], "other", "format"),
        (["version"], 2, "version: expected 1, got 2"),
        (["tokens"], KeyError, "tokens: missing"),
        (["more"], 1, "more: unknown field"),
        (["num_layers"], 4, "layers: expected 4, got 3"),
        (["num_layers"], True, "num_layers: expected a count"),
        (["dtype"], "float8", "dtype: expected one of"),
        (["dtype"], ["float16"], "dtype: expected one of"),
        (["guard"], [-20, 20], "made for another version, calibrate again"),
        (["layers", 0, "phi", 0], NAN, r"layers\[0\].phi: expected a list of numbers"),
        (["layers", 0, "phi"], [1.0], r"layers\[0\].phi: expected 2 of them, got 1"),
        (["layers", 0, "phi"], None, r"layers\[0\].reason: expected exactly where phi is null"),
        (["layers", 2, "index"], 1, r"layers\[2\].index: expected 2, got 1"),
        (["layers", 0, "row_max", "low"], 0.5, r"layers\[0\].row_max.low: expected an integer"),
        (["layers", 0, "row_max", "counts", 0, 0], -1, r"row_max.counts: expected lists of counts"),
        (["layers", 0, "scores", "counts", 0], [1], r"scores.counts: expected lists of one length"),
        (["layers", 0, "scores", "huge"], [], r"scores.huge: expected 2 of them, got 0"),
        (["held_out"], {"tokens": 1}, "held_out.rows_checked: missing"),
    ],
)
def test_a_damaged_file_is_refused_by_name(device, tmp_path, path, value, reason):
    file = tmp_path / "c.json"
    make_calibration().save(file)
    data = json.loads(file.read_text())
    changed = copy.deepcopy(data)
    damage(changed, path, value)
    file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=reason) as error:
        Calibration.load(file)
    assert str(error.value).startswith(f"{file}: not a calibration: ")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"null", b"[" * 99999])
def test_a_foreign_file_is_refused(device, tmp_path, content):
    file = tmp_path / "c.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.load(file)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "absent.json")
