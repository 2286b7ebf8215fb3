"""Medians, intervals and verdicts of benchmark runs."""
import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest

from engram_kernels.profile import Series, Verdict, compare_runs, load_run, markdown, measure, median_interval, summarize

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("n", [6, 9, 15, 40, 101])
def test_profile_median_interval_covers_the_median(n):
    rand = random.Random(n)
    hits = sum(low <= 1.0 <= high for low, high in
               (median_interval([rand.lognormvariate(0, 0.5) for _ in range(n)]) for _ in range(2000)))
    assert hits / 2000 >= 0.94  # at least 95 %, less three deviations of 2000 trials


def test_profile_median_interval_is_not_the_whole_range_when_it_need_not_be():
    assert median_interval(range(1, 102)) == (41, 61)
    assert median_interval([3.0, 1.0]) == (1.0, 3.0)
    with pytest.raises(ValueError, match="no samples"):
        median_interval([])


def test_profile_summaries_are_never_empty():
    assert summarize([2.0]).median == summarize([2.0]).low == 2.0
    for bad in ([], [float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="expected at least one, all finite"):
            summarize(bad)


class Clock:
    """Time that passes only in `run`."""

    def __init__(self, durations):
        self.now, self.durations = 0.0, itertools.cycle(durations)

    def __call__(self):
        return self.now

    def run(self):
        self.now += next(self.durations)


def test_profile_measure_stops_when_the_median_is_known():
    clock = Clock([1.0])
    steady, control = measure(clock.run, clock=clock)
    assert len(steady.samples) == 9 and steady.median == 1.0 and control is None and steady.flags == ()
    clock = Clock([1.0, 5.0])
    wild, _ = measure(clock.run, clock=clock, max_rounds=31, max_seconds=1e9)
    assert len(wild.samples) == 31 and any(f.startswith("spread") for f in wild.flags)
    clock = Clock([1.0, 5.0])
    assert len(measure(clock.run, clock=clock, max_seconds=0)[0].samples) == 9


def test_profile_measure_interleaves_the_control():
    calls = []
    measure(lambda: calls.append("run"), lambda: calls.append("control"), min_rounds=3, max_rounds=3)
    assert calls == ["run", "control"] + ["control", "run"] * 3


def run_file(path, cells):
    """A file as pytest-benchmark writes it; cells: (group, contender, role, samples)."""
    path.write_text(json.dumps({"benchmarks": [
        {"group": g, "name": c, "extra_info": {"contender": c, "role": r}, "stats": {"data": s}} for g, c, r, s in cells]}))
    return load_run(path)


def noisy(rand, median, n=15, noise=0.02):
    return [median * rand.lognormvariate(0, noise) for _ in range(n)]


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("with_control", [True, False])
def test_profile_identical_runs_give_no_false_verdict(noise, with_control):
    rand = random.Random(0)
    verdicts = []
    for _ in range(1000):
        a, b = ({("g", "ours"): Series("ours", summarize(noisy(rand, 1.0, noise=noise))),
                 **({("g", "copy"): Series("bound", summarize(noisy(rand, 2.0, noise=noise)))} if with_control else {})}
                for _ in range(2))
        verdicts += [cell.verdict for cell in compare_runs(a, b)]
    false = sum(v in (Verdict.FASTER, Verdict.SLOWER) for v in verdicts)
    assert len(verdicts) == 1000 and false <= 10


def shares(pairs):
    """Verdict -> share, over all cells of pairs of runs."""
    verdicts = [cell.verdict for a, b in pairs for cell in compare_runs(a, b)]
    return {v: verdicts.count(v) / len(verdicts) for v in Verdict}


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory):
    """20 real runs of the same code on a busy machine."""
    path, content = tmp_path_factory.mktemp("runs") / "run.json", json.loads((GOLDEN / "bench_series.json").read_text())
    runs = []
    for run in content["runs"]:
        path.write_text(json.dumps(run))
        runs.append(load_run(path))
    return runs, content["runs"]


def test_profile_real_runs_of_the_same_code_give_no_false_verdict(real_runs):
    runs, _ = real_runs
    pairs = list(itertools.combinations(runs, 2))
    found = shares(pairs)
    assert len(pairs) == 190 and found[Verdict.FASTER] + found[Verdict.SLOWER] <= 0.01
    bare = [{key: dataclasses.replace(series, controls={}) for key, series in run.items()} for run in runs]
    without = shares(itertools.combinations(bare, 2))
    assert without[Verdict.FASTER] + without[Verdict.SLOWER] > 0.1  # what the controls are for


def test_profile_resampled_runs_of_the_same_code_give_no_false_verdict(real_runs, tmp_path):
    """Two runs drawn from the blocks of the same real one, each block with its controls."""
    rand, pairs = random.Random(2), []

    def drawn(run):
        entries = []
        for e in run["benchmarks"]:
            data, controls = e["stats"]["data"], e["extra_info"]["controls"]
            size = len(data) // 5
            chosen = [rand.randrange(5) for _ in range(5)]
            picked = [x for i in chosen for x in data[i * size:(i + 1) * size]]
            entries.append({**e, "stats": {"data": picked}, "extra_info": {
                **e["extra_info"], "controls": {name: [times[i] for i in chosen] for name, times in controls.items()}}})
        (tmp_path / "drawn.json").write_text(json.dumps({"benchmarks": entries}))
        return load_run(tmp_path / "drawn.json")

    for run in real_runs[1]:
        pairs += [(drawn(run), drawn(run)) for _ in range(10)]
    found = shares(pairs)
    assert found[Verdict.FASTER] + found[Verdict.SLOWER] <= 0.01


def test_profile_a_verdict_holds_by_every_control(tmp_path):
    """Twice as slow beside one control, as fast as ever beside the other: who knows?"""
    def run(name, seconds, loop, read):
        path = tmp_path / name
        info = {"contender": "ours", "role": "ours", "controls": {"loop": [loop] * 5, "read": [read] * 5}}
        path.write_text(json.dumps({"benchmarks": [{"group": "g", "name": "ours", "stats": {"data": [seconds] * 15},
                                                    "extra_info": info}]}))
        return load_run(path)

    def verdict(seconds, loop, read):
        cell, = compare_runs(run("a.json", 1.0, 1.0, 1.0), run("b.json", seconds, loop, read))
        return cell.verdict
    assert verdict(2.0, 1.0, 1.0) is Verdict.SLOWER and verdict(0.5, 1.0, 1.0) is Verdict.FASTER
    assert verdict(1.0, 1.0, 1.0) is Verdict.SAME
    assert verdict(2.0, 2.0, 1.0) is Verdict.UNCLEAR and verdict(2.0, 1.0, 2.0) is Verdict.UNCLEAR
    assert verdict(1.5, 1.5, 1.5) is Verdict.UNCLEAR  # the machine was slower, but half of that is not certain
    assert verdict(3.0, 1.5, 1.5) is Verdict.SLOWER


def test_profile_changes_are_found_and_drift_is_not_one(tmp_path):
    rand = random.Random(1)
    before = run_file(tmp_path / "a.json", [("g", "ours", "ours", noisy(rand, 1.0)), ("g", "peer", "peer", noisy(rand, 3.0)),
                                            ("g", "copy", "bound", noisy(rand, 2.0)), ("gone", "x", "ours", [1.0])])
    after = run_file(tmp_path / "b.json", [("g", "ours", "ours", noisy(rand, 1.3 * 1.1)), ("g", "peer", "peer", noisy(rand, 3.3)),
                                           ("g", "copy", "bound", noisy(rand, 2.2)), ("new", "x", "ours", [1.0])])
    cells = {cell.contender: cell for cell in compare_runs(before, after)}
    assert set(cells) == {"ours", "peer"}
    assert cells["ours"].verdict is Verdict.SLOWER and cells["ours"].ratio == pytest.approx(1.3, rel=0.05)
    assert cells["ours"].control == pytest.approx(1.1, rel=0.05)
    assert cells["peer"].verdict in (Verdict.SAME, Verdict.UNCLEAR)
    back = {cell.contender: cell.verdict for cell in compare_runs(after, before)}
    assert back["ours"] is Verdict.FASTER
    text = markdown(list(cells.values()))
    assert text.index("SLOWER") < text.index("peer") and "1 SLOWER" in text


@pytest.mark.parametrize("text", ["", "[]", '{"benchmarks": [{}]}',
                                  '{"benchmarks": [{"group": "g", "name": "n", "extra_info": {}, "stats": {"data": []}}]}'])
def test_profile_compare_refuses_what_is_no_run(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad.json: no run of the benchmarks"):
        load_run(tmp_path / "bad.json")
