"""python -m experiments.scaling fit and plot: laws of runs whose truth is known."""
import csv
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.scaling import fit as scaling_fit
from experiments.scaling import plot as scaling_plot
from experiments.scaling import report as scaling_report
from experiments.scaling.fit import Law, MeasuredRun, Points
from lib.figure import COLORS
from tests.conftest import ROOT
from tests.experiments.logs import cells_of, write_log


def chinchilla(params, tokens, m=1.0):
    """Loss of a model of so many parameters after so many tokens, where each token counts m times."""
    return 1.0 + 60 * params ** -0.35 + 500 * (m * tokens) ** -0.4


# of the compute-optimal frontier, at 6 · params · tokens FLOPs (Hoffmann et al., 2022)
EXPONENT = 0.35 * 0.4 / (0.35 + 0.4)
GROWTH = 0.4 / (0.35 + 0.4)              # of the best size


def best_tokens(params, m):
    """Tokens after which this size is the best one for what has been spent: both terms of the loss fall at
    the same rate."""
    return (0.4 * 500 / (0.35 * 60) * params ** 0.35) ** 2.5 / m


def synthetic(label, m, seed, noise=0.004, sizes=np.geomspace(1e5, 3e6, 5)):
    """Runs of a structure that needs 1 / m of dense's compute for every loss, with noise between runs and
    within them."""
    rng, found = np.random.default_rng(seed), []
    for params in sizes:
        tokens = np.arange(1, 41) / 40 * 12 * best_tokens(params, m)
        off = noise * rng.standard_normal() + 0.001 * rng.standard_normal(40)
        losses = chinchilla(params, tokens, m) * (1 + off)
        config = dict(n_embd=int(params), n_layer=3, seed=1, learning_rate=3e-3, decay_lr=False, max_iters=40)
        per_token = {"flops": 6 * params, "flops_without_output_layer": 5 * params, "seconds": 1e-9 * params}
        found.append(MeasuredRun(f"{label}-{params:.0f}", label, config, int(params), int(params), per_token,
                                 Points(tokens, losses), 1.0))
    return found


def test_laws_are_recovered_within_their_intervals():
    """90 % intervals of a, L∞ and the multiplier hold the truth in nearly 90 % of all cases; 8 seeds, at
    least 5 of each."""
    hits = dict(a=0, floor=0, multiplier=0)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        base = scaling_fit.fit_structure("dense", synthetic("dense", 1, seed), "flops", samples=40,
                                         noise=0.004, rng=rng)
        better = scaling_fit.fit_structure("btt", synthetic("btt", 3, 100 + seed), "flops", samples=40,
                                           noise=0.004, rng=rng)
        low, high = scaling_fit.interval([law.exponent for law in base.samples], 0.9)
        hits["a"] += low <= EXPONENT <= high
        assert abs(base.law.exponent / EXPONENT - 1) < 0.25
        assert high - low < EXPONENT  # no interval that holds everything
        low, high = scaling_fit.interval([law.floor for law in base.samples], 0.9)
        hits["floor"] += low <= 1 <= high
        (value, low, high), = scaling_fit.multipliers(better, base, [math.sqrt(math.prod(better.range))], 0.9)
        hits["multiplier"] += low <= 3 <= high
        assert 2.3 < value < 3.9 and high / low < 1.6
        assert abs(base.growth.exponent - GROWTH) < 0.15
    assert min(hits.values()) >= 5, hits


def test_a_law_without_noise_is_exact():
    x = np.geomspace(1e12, 1e15, 20)
    for law in (Law(1.2, 3e10, 0.21), Law(0.0, 1e9, 0.08), Law(2.0, 1e13, 0.7)):
        assert scaling_fit.fit_law(x, law.loss(x)) == pytest.approx(law, rel=1e-2, abs=1e-3)
        assert law.x(law.loss(x)) == pytest.approx(x, rel=1e-6)
    law = Law(1.2, 3e10, 0.21)
    assert scaling_fit.fit_law(x, law.loss(x), floor=1.2) == pytest.approx(law, rel=1e-2)
    assert law.x(1.1) == math.inf
    spoiled = law.loss(x)
    spoiled[7] *= 1.3       # one bad point among twenty
    assert scaling_fit.fit_law(x, spoiled) == pytest.approx(law, rel=0.02, abs=0.01)
    with pytest.raises(ValueError, match="3 points"):
        scaling_fit.fit_law(x[:2], x[:2])


def test_frontier_is_the_least_of_all_curves():
    """Against the least of all curves at every budget, computed by hand; single points are ends of runs."""
    curves = [(x, 1 + k * x ** -a) for k, a, x in ((3e2, 0.5, np.geomspace(1e4, 1e7, 30)),
                                                   (6e4, 0.8, np.geomspace(1e5, 1e8, 30)),
                                                   (1, 0.0001, np.geomspace(1e5, 1e8, 30)))]
    frontier = scaling_fit.frontier_of(curves)
    expected = []
    for x in 10 ** (np.arange(4 * 12, 8 * 12 + 1) / 12):
        there = [np.interp(np.log(x), np.log(c), l) if c[0] * 0.999 <= x <= c[-1] * 1.001 else np.inf
                 for c, l in curves]
        if not expected or min(there) < expected[-1][1]:    # else an earlier budget already has as much
            expected.append((x, min(there), int(np.argmin(there))))
    assert set(frontier.owners) == {0, 1} and len(expected) < 49
    assert [tuple(point) for point in zip(*frontier)] == [pytest.approx(point) for point in expected]
    # iterations are whole: a run that ends 0.5 % before a budget is there with its last loss; 2 % before, not
    for end, count in ((0.995e6, 25), (0.98e6, 24)):
        x = np.geomspace(1e4, end, 30)
        frontier = scaling_fit.frontier_of([(x, 1 + 3e2 * x ** -0.5)])
        assert len(frontier.x) == count and frontier.losses[-1] >= 1 + 3e2 * end ** -0.5
    assert scaling_fit.frontier_of([(np.array([1e5, 0.995e6]), np.array([3.0, 2.0]))]).losses[-1] == 2.0
    points = (1, 5), (2, 4), (3, 4.5), (4, 3), (4, 3.5), (5, 3)
    ends = scaling_fit.frontier_of([(np.array([x]), np.array([loss])) for x, loss in points])
    assert ends.x.tolist() == [1, 2, 4] and ends.losses.tolist() == [5, 4, 3]
    assert ends.owners.tolist() == [0, 1, 3]


@pytest.fixture(scope="module")
def fitted(run, tmp_path_factory):
    """Runs of two structures, one of which needs a third of the compute and four thirds of the time, and of
    some bad ones."""
    folder = tmp_path_factory.mktemp("fit")
    tokens = np.arange(1, 41) * 1e6
    for m, label in ((1.0, "dense"), (3.0, "btt")):
        for i, params in enumerate(np.geomspace(2e4, 6e5, 5)):
            mine = tokens / 40e6 * 12 * best_tokens(params, m) // 1000 * 1000
            write_log(folder / "runs" / f"{label}{i}", label, dict(n_embd=int(params)), 6 * params, mine,
                      chinchilla(params, mine, m), ms=params * m * 4 / 3 if m > 1 else params)
    # worse than the same size above, and far from the frontier
    for seed, factor in ((1, 1.01), (2, 0.99)):
        write_log(folder / "runs" / f"seed{seed}", "dense", dict(n_embd=7, seed=seed, learning_rate=2e-3),
                  6e6, tokens,
                  2 * factor * chinchilla(1e6, tokens), ms=1e9)
    flat = np.full(40, 2.0)
    write_log(folder / "runs" / "skips", "dense", dict(n_embd=8), 6e5, tokens, flat, skipped=25,
              max_iters=10 ** 6)
    write_log(folder / "runs" / "nan", "dense", dict(n_embd=8), 6e5, tokens, np.r_[flat[:39], math.nan])
    write_log(folder / "runs" / "rises", "dense", dict(n_embd=8), 6e5, tokens, np.linspace(2, 4, 40))
    write_log(folder / "runs" / "decays", "dense", dict(n_embd=8, decay_lr=True), 6e5, tokens, flat,
              max_iters=10 ** 6)
    write_log(folder / "runs" / "short", "dense", dict(n_embd=8), 6e9, tokens, flat + 2, ms=1e9,
              max_iters=10 ** 6)
    write_log(folder / "runs" / "some", "dense", dict(n_embd=9), 6e9, tokens, flat + 2, ms=1e9, skipped=3)
    for name, change in (("lacks", '"flops_per_token": '), ("unset", '"n_head": '), ("list", '"config": ')):
        write_log(folder / "runs" / name, "dense", dict(n_embd=8), 6e5, tokens, flat)
        log = folder / "runs" / name / "log.jsonl"
        log.write_text(log.read_text().replace(change, '"config": 3, "x": ' if name == "list" else '"x": '))
    with open(folder / "runs" / "some" / "log.jsonl", "a") as f:
        f.write("\n3\n")
    done = run("experiments.scaling", "fit", f"--runs={folder}/runs", f"--out={folder}/out", "--samples=20")
    assert done.returncode == 0, done.stderr
    return folder / "out", done


def test_fit_finds_the_multiplier_in_logs(fitted):
    folder, _ = fitted
    with open(folder / "frontier.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    for axis, truth in (("flops", 3.0), ("flops_without_output_layer", 3.0), ("seconds", 3.0 / 4)):
        gains = [float(r["multiplier"]) for r in rows if r["axis"] == axis and r["structure"] == "btt"
                 and r["multiplier"]]
        assert len(gains) > 10 and gains == pytest.approx([truth] * len(gains), rel=0.06), axis
        measured = [float(r["measured_multiplier"]) for r in rows
                    if r["axis"] == axis and r["structure"] == "btt" and r["measured_multiplier"]]
        assert len(measured) > 10 and np.median(measured) == pytest.approx(truth, rel=0.06), axis
    law = json.loads((folder / "fit.json").read_text())["axes"]["flops"]["dense"]["law"]
    assert law["exponent"] == pytest.approx(EXPONENT, rel=0.1) and law["floor"] == pytest.approx(1, abs=0.1)
    with open(folder / "runs.csv", newline="") as f:
        assert {r["run"] for r in csv.DictReader(f)} == {*(f"{s}{i}" for s in ("dense", "btt")
                                                           for i in range(5)), "seed1", "seed2",
                                                         "short", "some"}


def test_what_a_loss_costs(fitted):
    """The table says at which budget the best of the sizes has come to each loss."""
    folder, _ = fitted
    texts = (folder / "table.md").read_text().split("What each frontier needs for a loss")[1:]
    tables = [[[cell.strip() for cell in line.strip("|").split("|")]
               for line in text.split("\n\n")[1].splitlines()] for text in texts]
    assert [table[0][0].split()[0] for table in tables] == ["FLOPs", "FLOPs", "s"]
    for (head, _, dense, btt), ratio in zip(tables, (1 / 3, 1 / 3, 4 / 3)):
        known = [i for i, cells in enumerate(zip(dense, btt)) if i and "—" not in cells]
        assert len(known) >= 3
        for i in known:
            assert float(btt[i]) / float(dense[i]) == pytest.approx(ratio, rel=0.06)
            if head is tables[0][0]:  # all training FLOPs
                tokens = float(dense[i]) / 6 / np.geomspace(2e4, 6e5, 5)
                best = chinchilla(np.geomspace(2e4, 6e5, 5), tokens).min()
                assert best == pytest.approx(float(head[i]), abs=0.02)


def test_remarks_on_frontiers_that_are_not_known():
    """The larger of two sizes gets ahead at 1e12 FLOPs. If the smaller ends before, or the larger has no
    evaluation so early, there is a hole."""
    def remarks_of(end=1e13, begin=1e10):
        x = np.geomspace(1e10, 1e14, 200)
        small = 3 - np.log10(x / 1e10) + 0.7 * np.log10(np.maximum(x, 1e11) / 1e11)
        large = 3.3 - 0.8 * np.log10(x / 1e10)
        shape = dict(n_layer=3, learning_rate=3e-3, seed=1, decay_lr=False, max_iters=40)
        runs = [MeasuredRun(name, "btt", shape | dict(n_embd=n), n, n, {"flops": float(n)},
                            Points(x[part] / n, losses[part]), 1.0)
                for name, n, losses, part in (("small", 64, small, x <= end),
                                              ("large", 128, large, x >= begin))]
        return [n for n in scaling_report.remarks(scaling_fit.fit_structure("btt", runs, "flops", samples=0))
                if "passes" in n
                or "ended before" in n]
    assert remarks_of() == []
    assert remarks_of(end=1.1e11) == ["btt: small has ended before large gets ahead of it, and the frontier "
                                      "between 1e+11 and 4.6e+11 "
                                    "FLOPs is not known; a longer run would tell"]
    assert remarks_of(begin=2.9e12) == ["btt: the frontier passes to large at its first evaluation, and may "
                                        "be lower before; "
                                        "more evaluations would tell"]


def test_laws_go_through_their_points():
    """Whatever the noise does to the Huber weights: no residual of a law is far above the noise, 0.5 %, and
    the outlier's alone."""
    x = np.geomspace(1e12, 1.2e13, 14)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        losses = (0.9 + (x / 7e11) ** -0.7) * (1 + 0.005 * rng.standard_normal(14))
        losses[rng.integers(14)] *= 1.05
        residuals = np.abs(scaling_fit.fit_law(x, losses).loss(x) / losses - 1)
        assert np.sort(residuals)[-2] < 0.025, seed


def test_measured_multipliers_are_those_between_frontiers():
    """No law, no noise: base passes 3 nats at 1, 2 at 10 and 1 at 100, the other at 4, 10 and 20; nothing is
    known beyond."""
    found = [scaling_fit.Fit(label, "flops", [], scaling_fit.Frontier(np.array(x), np.array(losses), None),
                             None, None, None)
             for label, x, losses in (("base", [1.0, 10, 100], [3.0, 2, 1]),
                                      ("fit", [2.0, 4, 10, 20, 40], [3.1, 3, 2, math.sqrt(2), 0.9]))]
    gains = scaling_fit.measured_multipliers(found[1], found[0])
    assert gains[1:4] == pytest.approx([1 / 4, 1, 10 ** 1.5 / 20]) and np.isnan(gains[[0, 4]]).all()


def test_fit_names_what_it_leaves_out(fitted):
    folder, done = fitted
    text = (folder / "table.md").read_text()
    assert text in done.stdout
    for line in ("nan: left out, diverged: its validation loss is not finite",
                 "some: 3 iterations skipped, whose",
                 "skips: left out, diverged: its loss or gradient is not finite at its end, iteration 40024",
                 "lacks: left out, its log was not written by train.py (KeyError: 'flops_per_token')",
                 "unset: left out, its log was not written by train.py (KeyError: 'n_head')",
                 "list: left out, its log was not written by train.py",
                 "rises: left out, diverged: its validation loss ends",
                 "short: unfinished, at iteration 40000 of 1000000\n",
                 "decays: unfinished, at iteration 40000 of 1000000; left out"):
        assert f"- {line}" in text
    # 1 ± 0.01: the standard deviation of two, one degree of freedom
    assert "a run's relative noise is 1.41% between seeds" in text
    rows = [cells for cells in cells_of(text) if cells[0] in ("dense", "btt")]
    noise = [float(cells[-1].rstrip("%")) for cells in rows if cells[-1].endswith("%")]
    assert len(noise) == 6 and min(noise) == 1.41 and max(noise) < 2     # of each structure along each axis
    assert "dense0: " not in text


def test_structures_are_ordered_by_their_loss_at_a_budget_beside_their_taxonomy(tmp_path, svg_only):
    """ω, ψ and ν by hand: of monarch, Kronecker, low rank, and of BTT's experts, which have rank 1. The
    budget is that which all come to, though Kronecker's loss no longer falls after two thirds of it."""
    tokens = np.arange(1, 31) * 1e6
    for label, settings, factor in (
            ("dense", dict(), 1.0), ("monarch", dict(struct="monarch"), 0.9),
            ("kron", dict(struct="einsum", theta=[0.5, 0.5, 0, 0.5, 0.5, 0, 0]), 1.1),
            ("low_rank", dict(struct="low_rank"), 1.2), ("dyad", dict(struct="dyad"), 1.3),
            ("btt_moe", dict(struct="btt", num_experts=8, top_k=2), 0.8)):
        losses = factor * (2 + 4 * (tokens / 1e6) ** -0.5)
        if label == "kron":
            losses[20:] = losses[19] + 0.001
        write_log(tmp_path / "runs" / label, label, dict(n_embd=8) | settings, 6e5, tokens, losses)
    text = report(tmp_path)
    assert "compute intensity), at 1.78e+13 FLOPs" in text     # of 1.8e13
    part = text.split("By ω (parameter sharing)")[1].split("The best size")[0]
    rows = [cells for cells in cells_of(part)[2:] if len(cells) == 7]
    assert [row[:5] for row in rows] == [
        ["btt_moe", "8", "0", "1", "0.5"], ["monarch", "", "0", "1", "0.5"], ["dense", "", "0", "1", "1"],
        ["kron", "", "0.5", "1", "0.5"], ["low_rank", "", "0", "0.5", "0.5"]]
    assert "dyad" not in part and rows[2][-1] == "1"
    assert 1.1 * (2 + 4 * 20 ** -0.5) - 1e-3 < float(rows[3][5]) < 1.1 * (2 + 4 * 19 ** -0.5)
    scaling_plot.plot(str(tmp_path / "out"))
    assert (tmp_path / "out" / "taxonomy.svg").exists()


@pytest.mark.parametrize("settings, taxonomy", [
    (dict(struct="btt"), (0, 1, 3 / 4)), (dict(struct="btt", rank=1), (0, 1, 1 / 2)),
    (dict(struct="tt", num_experts=4), (1 / 2, 1, 1 / 2)),
    (dict(struct="low_rank", num_experts=8), (0, 1, 1)),
    (dict(struct="einsum", theta=[0.5, 0, 0.5, 0, 0.5, 0.5, 0.25], rank=3), (0, 1, 3 / 4))])
def test_the_theta_of_settings(settings, taxonomy):
    """Experts have rank 1, those of low rank d / E; a rank that is set does not grow; 'einsum' says its own.
    """
    theta = scaling_fit.theta_of(settings)
    assert (theta.omega, theta.psi, theta.nu) == pytest.approx(taxonomy)


@pytest.fixture
def svg_only(monkeypatch):
    """Figures are not rasterized, which takes long."""
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options:
                        savefig(self, path, **options) if path.endswith(".svg") else None)


def test_figures(fitted, run):
    folder, _ = fitted
    names = [f"{name}.{kind}" for name in scaling_plot.FIGURES for kind in ("png", "svg")]
    made = {name: (folder / name).read_bytes() for name in names}
    assert all(made[n].startswith(b"\x89PNG") and len(made[n]) > 10_000 for n in names if n.endswith("png"))
    for name in (n for n in names if n.endswith("svg")):
        text = made[name].decode()
        assert "<svg" in text and all(f">{label}<" in text for label in ("dense", "btt"))
    assert run("experiments.scaling", "plot", f"--out={folder}").returncode == 0
    assert {name: (folder / name).read_bytes() for name in names} == made   # nothing of the day in them


def lacks_a_curves_key(found):
    for curve in found["axes"]["flops"].values():
        del curve["measured_multipliers"]
    return found


@pytest.mark.parametrize("change", [
    lacks_a_curves_key, lambda found: {"axes": {}},
    lambda found: found | dict(axes=dict.fromkeys(found["axes"], 3)),
    lambda found: found | dict(axes=3), lambda found: [], lambda found: 3])
def test_plot_refuses_a_fit_of_another_version(fitted, tmp_path, change):
    """One that lacks something, or holds a number where there should be more; the figures beside it stay."""
    found = json.loads((fitted[0] / "fit.json").read_text())
    (tmp_path / "fit.json").write_text(json.dumps(change(found)))
    (tmp_path / "frontier.svg").touch()
    with pytest.raises(ValueError, match="fit.json.*python -m experiments.scaling fit"):
        scaling_plot.plot(str(tmp_path))
    assert (tmp_path / "frontier.svg").exists()


def test_the_published_fit_can_be_drawn(tmp_path, svg_only):
    shutil.copy(ROOT / "results" / "scaling" / "fit.json", tmp_path)
    scaling_plot.plot(str(tmp_path))
    assert {f.stem for f in tmp_path.glob("*.svg")} == set(scaling_plot.FIGURES)


@pytest.mark.parametrize("other, refusal", [
    (dict(dataset="other"), "dataset is d in a and other in b"),
    (dict(batch_size=8), "windows is 8 in a and 16 in b"),
    (dict(batch_size=16, eval_iters=9, eval_tokens=57), None)])     # 57 tokens are 8 windows of 8 tokens, too
def test_losses_on_other_windows_are_not_compared(other, refusal, tmp_path):
    for name, config in (("a", {}), ("b", other)):
        write_log(tmp_path / name, "dense", dict(n_embd=8) | config, 6e5, np.arange(1, 6) * 1e6,
                  np.linspace(3, 2, 5))
    if refusal is None:
        assert len(scaling_fit.read_runs([str(tmp_path)])[0]) == 2
    else:
        with pytest.raises(ValueError, match=refusal):
            scaling_fit.read_runs([str(tmp_path)])


@pytest.mark.parametrize("flag, words", [
    ("--base=dnse", ("dnse", "btt, dense")), ("--floor=-1", ("floor", "-1")), ("--floor=3", ("floor", "3")),
    ("--min_flops=1e30", ("min_flops",))])
def test_fit_refuses(fitted, run, tmp_path, flag, words):
    done = run("experiments.scaling", "fit", f"--runs={fitted[0].parent}/runs", f"--out={tmp_path}/out",
               "--samples=10", flag)
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words) and not (tmp_path / "out").exists()


def report(folder, base=None):
    """The page about the runs in a folder."""
    scaling_report.write_report([str(folder / "runs")], str(folder / "out"), base=base, floor=None,
                                window=(None, None),
                                samples=10, level=0.9)
    return (folder / "out" / "table.md").read_text()


def test_an_interval_is_turned_about_its_value():
    """What noise that is added once more moves up, it had moved down: half of what the base needs by all laws
    of the bootstrap becomes twice."""
    runs = synthetic("dense", 1, 0)
    base, fit = (scaling_fit.fit_structure("dense", runs, "flops", samples=10) for _ in range(2))
    middle = [math.sqrt(math.prod(fit.range))]
    fit.samples = [fit.law] * 10
    base.samples = [base.law._replace(scale=base.law.scale / 2)] * 10
    (value, low, high), = scaling_fit.multipliers(fit, base, middle, 0.9)
    assert value == pytest.approx(1) and low == high == pytest.approx(2)
    base.samples = [base.law._replace(floor=9.0)] * 10  # never reached
    (value, low, high), = scaling_fit.multipliers(fit, base, middle, 0.9)
    assert value == pytest.approx(1) and low == high == 0


def test_a_law_that_misses_its_points_on_both_sides_is_noise(tmp_path):
    """A curve that is above its law at first, below it then, and at its end above it again."""
    runs = synthetic("dense", 1, 0, noise=0, sizes=[1e5, 1e6, 1e7])
    for run in runs:
        bend = np.sin(np.linspace(0, 4 * np.pi, len(run.points.losses)))
        run.points.losses[:] *= 1 + 0.05 * bend
    fit = scaling_fit.fit_structure("dense", runs, "flops", samples=10, noise=0.001)
    assert 0.01 < fit.noise < 0.2


def test_fit_json_is_json(tmp_path):
    """JSON has neither NaN nor Infinity: null stands there, as for a training loss that no line gives."""
    tokens = np.arange(1, 41) * 1e6
    write_log(tmp_path / "runs" / "a", "dense", dict(n_embd=8), 6e5, tokens, 3 - tokens / 1e8)
    log = tmp_path / "runs" / "a" / "log.jsonl"
    lines = [line for line in log.read_text().splitlines() if '"train"' not in line]
    log.write_text("\n".join(lines) + "\n")
    report(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")
    path, = tmp_path.rglob("fit.json")
    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found["runs"][0]["train_loss"] is None


def test_without_a_base_there_are_no_multipliers(tmp_path, svg_only):
    """Nor the figure of some before, and a structure without a single budget is skipped by name."""
    tokens = np.arange(1, 11) * 1e6
    write_log(tmp_path / "runs" / "a", "btt", dict(n_embd=8), 6e5, tokens, 3 - tokens / 1e7)
    write_log(tmp_path / "runs" / "b", "tt", dict(n_embd=8), 6e5, np.array([1.01, 1.02]) * 10 ** 6.1,
              [3, 2.9])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "multiplier.svg").touch()
    text = report(tmp_path)
    assert "- no multipliers, since there are no runs of dense" in text
    assert "needs for the same loss" not in text
    assert "- tt: left out along training FLOPs, no point of its frontier" in text
    assert any(cells[:3] == ["btt", "1e+12", "3 x 8"] for cells in cells_of(text))
    scaling_plot.plot(str(tmp_path / "out"))
    assert (tmp_path / "out" / "frontier.svg").exists() and not (tmp_path / "out" / "multiplier.svg").exists()


def test_a_structure_looks_the_same_in_every_figure(fitted, tmp_path, svg_only):
    """One whose seconds are known, while those of the structure before it are not."""
    found = json.loads((fitted[0] / "fit.json").read_text())
    del found["axes"]["seconds"]["dense"]
    (tmp_path / "fit.json").write_text(json.dumps(found))
    scaling_plot.plot(str(tmp_path))
    for name in ("frontier", "wall_clock", "multiplier"):
        assert COLORS[1].lower() in (tmp_path / f"{name}.svg").read_text(), name


def test_unlike_runs_of_a_structure_are_named(tmp_path):
    tokens = np.arange(1, 41) * 1e6
    for rate in (1e-3, 2e-3):
        for balance in (0.0, 0.1):
            config = dict(n_embd=8, learning_rate=rate, router_balance_rate=balance,
                          log_interval=int(rate * 1e3))
            write_log(tmp_path / "runs" / f"r{rate:g}b{balance:g}", "moe", config, 6e5, tokens,
                      3 + balance + rate - tokens / 1e8, ms=10 + balance)
    text = report(tmp_path, base="moe")
    assert "- moe: its runs differ in router_balance_rate, 0.0 in r0.002b0, 0.1 in r0.002b0.1; " in text
    assert "differ in log_interval" not in text and "differ in learning_rate" not in text
    with open(tmp_path / "out" / "runs.csv", newline="") as f:
        seconds = [float(r["seconds"]) for r in csv.DictReader(f)]
    assert seconds == pytest.approx([40_000 * 10.05e-3] * 4)   # the median
    for balance, loss in ((0, 2.6), (0.1, 2.7)):
        assert (f"- moe, 3 x 8: **0.001: {loss + 0.001:.3f}**, 0.002: {loss + 0.002:.3f} after 40,000,000 "
                "tokens (at the edge "
                f"of the rates tried); the best is r0.001b{balance}\n") in text


def test_rates_are_compared_at_the_same_tokens():
    """Of runs whose rate decays only the end is known, and only those of the same length have the same
    end."""
    def ended(rate, its, decays=True):
        config = dict(n_embd=8, n_layer=3, seed=1, learning_rate=rate, decay_lr=decays, max_iters=its)
        points = Points(np.array([its]), np.array([3 - rate]))
        return MeasuredRun(f"{rate}-{its}", "dense", config, 1, 1, {"flops": 1.0}, points, 1.0)

    runs = [ended(rate, its) for rate, its in ((0.1, 100), (0.2, 100), (0.3, 500))]
    line, = scaling_report.best_rates(runs)
    assert line.startswith("dense, 3 x 8: 0.1: 2.900, **0.2: 2.800** after 100 tokens")
    assert not scaling_report.best_rates([ended(0.1, 100, False), ended(0.2, 500, False)])


# what an earlier train.py put into a log, and what it is since
UNRESOLVED = dict.fromkeys(("lr_decay_iters", "min_lr", "device", "dtype", "compile", "out_dir", "backend"))
RESOLVED = dict(lr_decay_iters=40, min_lr=1e-4, device="cpu", dtype="float32", compile=False, out_dir="there",
                backend="gloo")


@pytest.mark.parametrize("decays, change, copies", [
    (True, {}, True), (True, dict(min_lr=2e-4), False), (True, dict(lr_decay_iters=30), False),
    (False, dict(min_lr=3e-4, lr_decay_iters=7), True), (True, dict(device="cuda:1", backend="nccl"), True)])
def test_logs_that_hold_none_are_compared_by_what_was_used(tmp_path, decays, change, copies):
    for name, settings in (("old", UNRESOLVED), ("new", RESOLVED | change)):
        write_log(tmp_path / name, "btt", dict(n_embd=8, decay_lr=decays) | settings, 6e5, [2e4, 4e4], [3, 2],
                  dtype="float32", compile=False)
    runs, notes = scaling_fit.read_runs([str(tmp_path)])
    assert len(runs) == (1 if copies else 2)
    assert any("another run of the same settings" in note for note in notes) == copies


@pytest.mark.parametrize("dropout, copies", [(0.0, True), (0.1, False)])
def test_a_key_that_an_older_log_lacks_had_its_default(tmp_path, dropout, copies):
    for name, settings in (("old", {}), ("new", dict(dropout=dropout))):
        write_log(tmp_path / name, "btt", dict(n_embd=8) | RESOLVED | settings, 6e5, [2e4, 4e4], [3, 2])
    runs, notes = scaling_fit.read_runs([str(tmp_path)])
    assert len(runs) == (1 if copies else 2)
    assert any("another run of the same settings" in note for note in notes) == copies


def test_another_dtype_is_another_run(tmp_path):
    for dtype in ("float32", "bfloat16"):
        write_log(tmp_path / dtype, "btt", dict(n_embd=8) | UNRESOLVED, 6e5, [2e4, 4e4], [3, 2], dtype=dtype,
                  compile=False)
    runs, notes = scaling_fit.read_runs([str(tmp_path)])
    assert len(runs) == 2 and not notes


def test_rates_are_compared_though_each_has_its_own_min_lr(tmp_path):
    for rate in (1e-3, 2e-3):
        config = dict(n_embd=8, decay_lr=True, learning_rate=rate) | RESOLVED | dict(min_lr=rate / 10)
        write_log(tmp_path / f"{rate}", "btt", config, 6e5, [4e4], [3 - rate])
    runs, notes = scaling_fit.read_runs([str(tmp_path)])
    line, = scaling_report.best_rates(runs)
    assert "0.001: 2.999, **0.002: 2.998**" in line and not notes


def test_a_copy_is_no_second_run(tmp_path):
    """The same settings and seed in another folder: the longer one counts, and there is no noise to be had
    from both."""
    tokens = np.arange(1, 41) * 1e6
    for place, n in (("here", 40), ("there", 30)):
        write_log(tmp_path / "runs" / place / f"run{n}", "dense", dict(n_embd=8), 6e5, tokens[:n],
                  3 - tokens[:n] / 1e8)
    text = report(tmp_path)
    assert "- run30: left out, another run of the same settings and seed is as long or longer, run40" in text
    assert text.startswith("1 runs of 1 structures") and "none differ in their seed alone" in text


def with_seed(run, seed, points=slice(None), worse=0.0):
    """A run like another, but for the seed, some of the points, and the losses."""
    return dataclasses.replace(run, name=f"seed {seed}", config=run.config | dict(seed=seed), points=Points(
        run.points.tokens[points], run.points.losses[points] + worse))


def test_seeds_count_as_their_mean():
    one, = synthetic("dense", 1, 0, sizes=[1e5])
    other = with_seed(one, 2, slice(38), 0.2)
    groups, notes = scaling_fit.same_but_seed([one, other])
    mean, = scaling_fit.mean_of_seeds(groups)
    assert not notes and np.array_equal(mean.points.tokens, one.points.tokens[:38])
    assert mean.points.losses == pytest.approx(one.points.losses[:38] + 0.1)
    for unlike in (dict(config=other.config | dict(learning_rate=1.0)), dict(params=one.params + 1),
                   dict(per_token=one.per_token | dict(flops=1.1 * one.per_token["flops"]))):
        # other sizes: those that an earlier version made of the same settings
        assert len(scaling_fit.same_but_seed([one, dataclasses.replace(other, **unlike)])[0]) == 2


def test_the_mean_goes_on_with_the_seeds_that_go_on():
    """Three seeds that differ by a factor, of which two end early, one of them at once: their mean does not
    jump where they end, and the noise is that of all points that two or more of them share."""
    one, = synthetic("dense", 1, 0, sizes=[1e5])
    tokens, losses = one.points
    seeds = [with_seed(one, 2, slice(20), 0.03 * losses[:20]), one,
             with_seed(one, 3, slice(1), 0.06 * losses[0])]
    groups, notes = scaling_fit.same_but_seed(seeds)
    mean, = scaling_fit.mean_of_seeds(groups)
    assert not notes and mean.seeds == 3 and np.array_equal(mean.points.tokens, tokens)
    assert mean.points.losses == pytest.approx(losses * 1.03)
    noise, (line,) = scaling_fit.seed_noise(groups)
    of_three, of_two = 2 * (0.03 / 1.03) ** 2, 2 * (0.015 / 1.015) ** 2
    assert noise == pytest.approx(math.sqrt((of_three + 19 * of_two) / (2 + 19)), rel=0.05)
    assert f"after {tokens[19]:,.0f} tokens" in line
    short = dataclasses.replace(seeds[0], points=Points(tokens[:2] * 1.5, losses[:2]))
    mean, = scaling_fit.mean_of_seeds(scaling_fit.same_but_seed([one, short])[0])
    assert mean.points.tokens[:2].tolist() == [tokens[0] * 1.5, tokens[1] * 1.5]    # then one's own


def test_losses_between_points_are_interpolated_in_log_tokens():
    one, = synthetic("dense", 1, 0, sizes=[1e5])
    one = dataclasses.replace(one, points=Points(np.array([1e4, 1e6]), np.array([3.0, 2.0])))
    assert one.loss_after(1e5) == pytest.approx(2.5)


@pytest.mark.parametrize("points, late", [(slice(1), slice(1, None)), (slice(39), slice(39, None))])
def test_a_seed_that_ends_before_another_begins_is_left_out(points, late):
    """Of the mean, and of the noise."""
    whole, = synthetic("dense", 1, 0, sizes=[1e5])
    one, short = with_seed(whole, 1, late), with_seed(whole, 2, points, 1.0)
    groups, note = scaling_fit.same_but_seed([short, one])
    mean, = scaling_fit.mean_of_seeds(groups)
    assert np.array_equal(mean.points.tokens, one.points.tokens)
    assert np.array_equal(mean.points.losses, one.points.losses)
    assert scaling_fit.seed_noise(groups) == (None, [])
    assert len(note) == 1 and note[0].startswith("seed 2: left out of its seeds' mean")


def test_seeds_are_compared_where_all_of_them_are_known():
    """Of a seed that begins late, or has one point alone, with the other's losses there, not with earlier
    ones."""
    one, = synthetic("dense", 1, 0, sizes=[1e5])
    groups, _ = scaling_fit.same_but_seed([with_seed(one, 2, slice(30, None)),
                                           with_seed(one, 1, slice(39), 1.0)])
    mean, = scaling_fit.mean_of_seeds(groups)
    assert np.array_equal(mean.points.tokens, one.points.tokens[30:39])
    assert mean.points.losses == pytest.approx(one.points.losses[30:39] + 0.5)
    groups, _ = scaling_fit.same_but_seed([with_seed(one, 2, slice(38, 39)), one])
    mean, = scaling_fit.mean_of_seeds(groups)
    assert mean.points.tokens == one.points.tokens[38]
    assert mean.points.losses == pytest.approx(one.points.losses[38])
    assert scaling_fit.seed_noise(groups)[0] == 0


def test_the_noise_between_seeds_is_that_of_all_shared_points():
    """Two seeds that agree at their end, and differed by 2 % in one half of the points before."""
    one, = synthetic("dense", 1, 0, sizes=[1e5])
    points = len(one.points.tokens)
    shift = np.where(np.arange(points) < points // 2, 0.02, 0.0)
    groups, _ = scaling_fit.same_but_seed([one, with_seed(one, 2, worse=shift * one.points.losses)])
    noise, (line,) = scaling_fit.seed_noise(groups)
    assert noise == pytest.approx(0.02 / math.sqrt(2) * math.sqrt((points // 2) / points), rel=0.02)
    last = f"{one.points.losses[-1]:.4f}"
    assert f"{last}, {last} after" in line


def test_a_mean_of_seeds_is_less_noisy():
    """The intervals of means of four are half as wide."""
    runs = synthetic("dense", 1, 0, noise=0)
    widths = []
    for seeds in (1, 4):
        fit = scaling_fit.fit_structure("dense", [dataclasses.replace(run, seeds=seeds) for run in runs],
                                        "flops", samples=200, noise=0.01, floor=1.0)
        widths.append(np.std([law.loss(fit.frontier.x[-1]) for law in fit.samples]))
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.25)
    groups, _ = scaling_fit.same_but_seed([runs[0], with_seed(runs[0], 2)])
    assert scaling_fit.mean_of_seeds(groups)[0].seeds == 2


def test_a_shape_has_one_time():
    """Runs of a structure and shape differ in their time by chance; their median is the shape's."""
    runs = synthetic("dense", 1, 0, sizes=[1e5, 1e5, 1e5, 2e5])
    other = dataclasses.replace(runs[0], config=runs[0].config | dict(batch_size=64),
                                per_token=dict(seconds=0.1))
    scaling_fit.share_seconds([*runs, other])
    assert other.per_token["seconds"] == 0.1
    for run, seconds in zip(runs, (1.0, 1.01, 1.5, 7.0)):
        run.per_token["seconds"] = seconds
    del runs[3].per_token["flops"]
    runs.append(dataclasses.replace(runs[0], per_token={}))
    scaling_fit.share_seconds(runs)
    assert [run.per_token.get("seconds") for run in runs] == [1.01, 1.01, 1.01, 7.0, None]


def test_seconds_of_bench(tmp_path):
    """A run's seconds per token are those of the training step of its structure and shape, or none."""
    small, large = synthetic("btt", 1, 0, sizes=[1e5, 2e5])
    for run, width in ((small, 64), (large, 128)):
        run.config.update(n_embd=width, n_head=2, block_size=16, batch_size=4)
    steps = [dict(config="btt", tokens_per_s=5000.0), dict(config="dense", tokens_per_s=1.0)]
    config = dict(n_embd=64, n_layer=3, head_size=32, block_size=16, batch_size=4, vocab_size=None)
    (tmp_path / "bench.json").write_text(json.dumps(dict(config=config, steps=steps)))
    notes = scaling_fit.take_seconds([small, large], [tmp_path / "bench.json"])
    assert small.per_token["seconds"] == 1 / 5000 and "seconds" not in large.per_token
    assert len(notes) == 1 and large.name in notes[0]
    for key in ("n_layer", "head_size", "block_size", "batch_size", "vocab_size"):
        (tmp_path / "bench.json").write_text(json.dumps(dict(config=config | {key: 8}, steps=steps)))
        assert len(scaling_fit.take_seconds([small, large], [tmp_path / "bench.json"])) == 2
    for name in "ab":
        machine = dict(device=name, threads=2, system=f"of {name}")
        (tmp_path / name).write_text(json.dumps(dict(config=config, steps=steps, machine=machine)))
    notes = scaling_fit.take_seconds([small], [tmp_path / "a", tmp_path / "b"])
    assert notes == ["the steps of --bench are of several machines"]
    (tmp_path / "bench.json").write_text('{"steps": 3}')
    with pytest.raises(ValueError, match="bench.json is no output of experiments.bench"):
        scaling_fit.take_seconds([small], [tmp_path / "bench.json"])


def test_an_interval_holds_its_share_of_the_values():
    assert scaling_fit.interval([*range(101)], 0.9) == (5, 95)
    assert scaling_fit.interval([*range(101)], 0.5) == (25, 75)


def test_scatter_about_a_law_of_two_constants_has_n_minus_2_degrees_of_freedom():
    """Eight runs of one point each, 1 % about a law whose floor is given; the mean over many draws."""
    x, squares = np.geomspace(1e12, 1e15, 8), []
    for seed in range(60):
        off = 0.01 * np.random.default_rng(seed).standard_normal(8)
        losses = (1 + (x / 1e11) ** -0.2) * (1 + off)
        runs = [MeasuredRun(str(i), "dense", {}, 1, 1, {"flops": 10.0 ** i}, Points(np.array([c / 10.0 ** i]),
                np.array([loss])), 1.0) for i, (c, loss) in enumerate(zip(x, losses))]
        fit = scaling_fit.fit_structure("dense", runs, "flops", window=(x[0], x[-1]), floor=1.0, samples=0)
        squares.append(fit.noise ** 2)
    assert math.sqrt(np.mean(squares)) == pytest.approx(0.01, rel=0.08)


def test_noise_within_a_run_is_found():
    """0.3 % about a curve, whatever its slope."""
    run, = synthetic("dense", 1, 0, noise=0, sizes=[1e5])
    for step in (1e4, 1e6):
        tokens = np.arange(1, 4001) * step
        losses = chinchilla(1e5, tokens) * (1 + 0.003 * np.random.default_rng(0).standard_normal(4000))
        run = dataclasses.replace(run, points=Points(tokens, losses))
        assert scaling_fit.point_noise([run]) == pytest.approx(0.003, rel=0.12)


def test_noise_within_runs_widens_the_bootstrap(monkeypatch):
    runs, spreads = synthetic("dense", 1, 0, noise=0), []
    for within in (0.0, 0.02):
        monkeypatch.setattr(scaling_fit, "point_noise", lambda runs: within)
        fit = scaling_fit.fit_structure("dense", runs, "flops", samples=25, noise=0.0, floor=1.0)
        spreads.append(np.std([law.loss(fit.frontier.x[-1]) for law in fit.samples]))
    assert spreads[1] > 2 * spreads[0]


def test_sizes_hand_over_midway_between_their_budgets():
    """Sizes 1, 10 and 100, which hand over at 10^1.5 and 10^3.5: the best one grows with the root of x."""
    frontier = scaling_fit.Frontier(10.0 ** np.arange(6), np.arange(9.0, 3, -1), np.array([0, 0, 1, 1, 2, 2]))
    growth = scaling_fit.growth_of(frontier, np.array([1.0, 10, 100]))
    assert growth.exponent == pytest.approx(0.5) and growth.window == pytest.approx((10 ** 0.5, 10 ** 4.5))


def test_of_a_run_whose_rate_decays_the_end_alone_counts(tmp_path):
    for name, decays in (("decays", True), ("constant", False)):
        write_log(tmp_path / name, "dense", dict(n_embd=8, decay_lr=decays), 6e5, [2e4, 3e4, 4e4],
                  [3, 2.5, 2])
    runs = {run.name: run.points.tokens.tolist() for run in scaling_fit.read_runs([str(tmp_path)])[0]}
    assert runs == {"decays": [4e4], "constant": [2e4, 3e4, 4e4]}


def test_the_table_of_sizes_has_the_tokens_of_a_budget():
    fit = scaling_fit.fit_structure("dense", synthetic("dense", 1, 0), "flops", samples=0)
    budget = float(fit.frontier.x[len(fit.frontier.x) // 2])
    *_, (_, _, _, params, _, trained, *_) = cells_of(scaling_report.sizes_table({"dense": fit}, [budget]))
    params, trained = (int(number.replace(",", "")) for number in (params, trained))
    assert 6 * params * trained == pytest.approx(budget, rel=1e-3)


def test_seconds_are_those_of_the_median_iteration(tmp_path):
    write_log(tmp_path / "run", "dense", dict(n_embd=8), 6e5, [1e4, 2e4, 3e4, 4e4, 5e4],
              [3, 2.9, 2.8, 2.7, 2.6])
    log, times = tmp_path / "run" / "log.jsonl", iter((900.0, 11.0, 10.0, 40.0, 12.0))  # the first compiles
    lines = [line if '"train"' not in line else json.dumps(json.loads(line) | dict(ms_per_iter=next(times)))
             for line in log.read_text().splitlines()]
    log.write_text("\n".join(lines))
    [run], _ = scaling_fit.read_runs([str(tmp_path)])
    assert run.per_token["seconds"] == pytest.approx(12e-3 / 1000)


def test_multipliers_are_given_only_where_both_were_measured():
    base, fit = (scaling_fit.fit_structure("dense", synthetic("dense", 1, 0, 0, sizes), "flops", samples=2)
                 for sizes in (np.geomspace(1e5, 3e6, 5), np.geomspace(1e6, 3e7, 5)))
    low, high = fit.range
    before, first, last, beyond = scaling_fit.multipliers(fit, base, [low / 10, low, high, high * 10], 0.9)
    assert first[0] == pytest.approx(1, rel=0.1)
    assert before is None and last is None and beyond is None  # base has come to no such loss
