"""search_space.py and search_study.py: the space, its sampling, and what a study keeps."""
import json
import math
import random
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from experiments.search.report import importances, rows_of
from experiments.search.space import LEVELS, Space, places_of, swapped, theta_of
from experiments.search.study import begin, make_pruner, make_sampler, open_study, propose, settled, trained
from structured import STRUCTURES, Theta

ROOT = Path(__file__).resolve().parents[2]
NAMED = {name: theta for name, theta in STRUCTURES.items() if theta is not None}
SETTINGS = dict(n_layer=3, n_head=4, block_size=128, batch_size=16, gradient_accumulation_steps=1, dataset="d", seed=1,
                decay_lr=False)


def make_space(**changes):
    options = dict(dense_width=96, flops=1e13, widths=tuple(range(32, 513, 4)), tolerance=0.05, learning_rates=(3e-3,),
                   experts=(0,), top_ks=(2,), max_nu=1.0, evals=8, settings=SETTINGS, vocab_size=96)
    return Space(**options | changes)


SPACE = make_space()    # what it has computed, it keeps


def random_thetas(count, seed=0):
    rng = random.Random(seed)
    return [theta_of(*(rng.randrange(len(levels)) for levels in LEVELS.values())) for _ in range(count)]


# ---- The space ------------------------------------------------------------------------------------------------------

def test_every_known_structure_is_in_the_space():
    """Exactly, or with the letters of its cores exchanged; those of the paper's list too."""
    paper = runpy.run_path(str(ROOT / "experiments" / "plans" / "paper.py"))["_thetas"].values()
    for theta in (*NAMED.values(), *(Theta(*t) for t in paper)):
        again = theta_of(**places_of(theta))
        assert any(again == pytest.approx(same, abs=1e-12) for same in (theta, swapped(theta))), theta
    with pytest.raises(ValueError, match="between the levels"):
        places_of(Theta(0.9, 0, 0.1, 0, 1, 0, 0))


def test_edges_have_a_probability_of_their_own():
    thetas = random_thetas(2000)
    assert all(theta.alpha >= theta.beta - 1e-12 for theta in thetas)
    for letter in ("beta", "gamma", "delta", "epsilon", "phi", "rho"):
        assert sum(getattr(theta, letter) == 0 for theta in thetas) > 200, letter


def test_points_have_the_compute_that_was_asked_for():
    """Against the FLOPs that a model counts itself."""
    import torch
    from model import GPT, GPTConfig
    space, checked = make_space(settings=SETTINGS | dict(n_layer=2), experts=(0, 4), top_ks=(1, 2),
                                widths=tuple(range(32, 513, 8))), 0
    dense = GPT(GPTConfig(block_size=128, vocab_size=96, n_layer=2, n_head=4, n_embd=96))
    assert space.flops_per_token == 3 * dense.flops_per_token()
    for i, theta in enumerate((*NAMED.values(), *random_thetas(30))):
        try:
            point = space.point(theta, *((0, 0), (4, 1), (4, 2))[i % 3])
        except ValueError:
            continue
        with torch.device("meta"):
            model = GPT(GPTConfig(block_size=128, vocab_size=96, n_layer=2, n_head=4, n_embd=point.width, struct="einsum",
                                  rank=point.rank, theta=tuple(point.theta), num_experts=point.num_experts,
                                  top_k=max(1, point.top_k)))
        assert point.flops_per_token == 3 * model.flops_per_token()
        assert abs(point.flops_per_token / space.flops_per_token - 1) <= 0.05 and point.width in space.widths
        exact = point.width ** theta.rho
        assert point.rank == max(1, round(exact)) or exact / 1.26 < point.rank < exact * 1.26
        checked += 1
    assert checked > 10


def test_runs_cost_what_was_asked_for(python_text, tmp_path):
    space = make_space(settings=SETTINGS | dict(dataset=str(python_text)), learning_rates=(1e-3, 2e-3))
    for theta in (NAMED["dense"], NAMED["btt"], NAMED["low_rank"]):
        runs = space.runs(space.point(theta), str(tmp_path))
        assert [run.settings["learning_rate"] for run in runs] == [1e-3, 2e-3] and len({run.folder for run in runs}) == 2
        for run in runs:
            assert abs(run.flops / 1e13 - 1) < 0.05 and run.max_iters == 8 * run.settings["eval_interval"]
            assert run.settings["n_embd"] == space.point(theta).width
            if theta == NAMED["dense"]:     # the model of config/dense.py, so that it is the one that others measure too
                assert run.settings["struct"] == "dense" and "theta" not in run.settings
            else:
                assert run.settings["struct"] == "einsum" and run.settings["theta"] == tuple(theta)


@pytest.mark.parametrize("settings", [dict(ffn_experts=4), dict(layers="mlp"), dict(dropout=1.5)])
def test_settings_that_do_not_fit_are_refused(python_text, tmp_path, settings):
    space = make_space(settings=SETTINGS | dict(dataset=str(python_text)) | settings)
    with pytest.raises(ValueError, match="would cost|dropout"):
        space.runs(space.point(NAMED["btt"]), str(tmp_path))


def test_the_same_matrices_have_the_same_name():
    generic = Theta(1/2, 1/4, 1/4, 1/4, 1/2, 1/4, 1/4)
    assert SPACE.point(generic).name == SPACE.point(swapped(generic)).name
    assert len({SPACE.point(theta).name for theta in NAMED.values()}) == len(NAMED)
    narrow, by_sizes = make_space(widths=(16,), dense_width=16, tolerance=3.0), {}      # different θ come to the same sizes
    for theta in set(t for t in random_thetas(150) if t.nu <= 1):
        point = narrow.point(theta)
        by_sizes.setdefault(tuple(frozenset((s, s.swapped())) for s in point.sizes), []).append(point.name)
    assert all(len(set(names)) == 1 for names in by_sizes.values()) and max(map(len, by_sizes.values())) > 1
    assert len({names[0] for names in by_sizes.values()}) == len(by_sizes) > 20


def test_what_has_no_model_is_never_proposed():
    for theta, word in ((Theta(1, 0, 0, 1, 0, 0, 1/2), "ν = 1.5"), (NAMED["monarch"], "no width")):
        with pytest.raises(ValueError, match=word):
            make_space(widths=(96,)).point(theta)
    with pytest.raises(ValueError, match="no width"):
        make_space(widths=(127,), tolerance=0.5, settings=SETTINGS | dict(n_head=1)).point(NAMED["monarch"])    # a prime
    study, space = optuna.create_study(sampler=make_sampler("random", 0)), make_space(widths=(96, 160, 240))
    for _ in range(12):
        trial, point = propose(study, space, 12)
        assert point.theta.nu <= 1 and abs(point.flops_per_token / space.flops_per_token - 1) <= 0.05
        assert point.width in (96, 160, 240)
        study.tell(trial, 1.0)
    assert propose(study, space, 12) is None
    rejected = [t for t in study.trials if "rejected" in t.user_attrs]
    assert len(rejected) > 10 and all(t.state.name == "FAIL" for t in rejected)
    with pytest.raises(ValueError, match="exhausted"):
        import search_study
        ask, search_study.ATTEMPTS = search_study.ATTEMPTS, 20
        try:
            propose(optuna.create_study(sampler=make_sampler("random", 0)), make_space(widths=(32,)), 12)
        finally:
            search_study.ATTEMPTS = ask


def test_a_point_that_another_trial_has_is_not_trained():
    """Other θ with its matrices get its values, the same θ is passed over, and so is what is one too many."""
    space = make_space(widths=(16,), dense_width=16, tolerance=3.0)
    study, kinds = optuna.create_study(sampler=make_sampler("random", 0)), Counter()
    for i in range(160):
        trial, point = propose(study, space, 160)
        trial.report(2.0 + i, 1)
        study.tell(trial, *((None, optuna.trial.TrialState.PRUNED) if i % 2 == 0 else (float(i), None)))
    for trial in study.trials:
        if "same_as" in trial.user_attrs:
            first = study.trials[trial.user_attrs["same_as"]]
            assert first.user_attrs["point"] == trial.user_attrs["point"] and "same_as" not in first.user_attrs
            same = trial.params == first.params
            kinds[same, first.state.name] += 1
            assert trial.state.name == ("FAIL" if same else first.state.name) and (same or trial.value == first.value)
            assert same or trial.intermediate_values == first.intermediate_values
    assert all(kinds[same, state] for same in (True, False) for state in ("COMPLETE", "PRUNED")), kinds
    trial = study.ask()
    trial.set_user_attr("point", "another")
    assert settled(study, trial, "another", 160) and study.trials[-1].user_attrs["surplus"]
    trial = study.ask()
    trial.set_user_attr("point", "another one")
    assert not settled(study, trial, "another one", 161) and study.trials[-1].state.name == "RUNNING"
    later = study.ask()     # asked for at the same time by another process
    later.set_user_attr("point", "another one")
    assert settled(study, later, "another one", 999) and study.trials[-1].state.name == "FAIL"
    assert not settled(study, trial, "another one", 999)


# ---- Sampling -------------------------------------------------------------------------------------------------------

def synthetic(theta):
    """What the paper says, and that of what is left some ν is best: 1.5 at ω = 0, ψ = 1, ν = 2/3."""
    return 1.5 + 0.5 * theta.omega + 0.5 * (1 - theta.psi) + 0.4 * abs(theta.nu - 2 / 3)


def sampled(kind, seed, trials=60, noise=0.02):
    """(true loss of each trial, true loss of what was measured to be the best) of one search, without training."""
    study, rng = optuna.create_study(sampler=make_sampler(kind, seed)), np.random.default_rng(seed)
    losses, measured = [], []
    while (proposal := propose(study, SPACE, trials)) is not None:
        trial, point = proposal
        losses.append(synthetic(point.theta))
        measured.append(losses[-1] + noise * rng.standard_normal())
        study.tell(trial, measured[-1])
    names = [t.user_attrs["point"] for t in trained(study)]
    assert len(names) == trials == len(set(names))
    return np.array(losses), losses[int(np.argmin(measured))]


def test_the_sampler_finds_the_optimum_region_and_better_than_random():
    """Region: ω = 0, ψ = 1 and ν within 1/8 of the best."""
    def in_region(loss):
        return loss <= 1.5 + 0.4 / 8 + 1e-9

    found, more = 0, 0
    for seed in range(10):
        losses, best = sampled("tpe", seed)
        of_random, _ = sampled("random", seed)
        found += in_region(best)
        more += in_region(losses).sum() > in_region(of_random).sum()
    assert found >= 9 and more >= 9, (found, more)


# ---- Studies --------------------------------------------------------------------------------------------------------

def test_importances_say_which_parameter_decides():
    study, rng = optuna.create_study(sampler=make_sampler("random", 0)), random.Random(0)
    for _ in range(60):
        trial = study.ask()
        places = {name: trial.suggest_int(name, 0, len(levels) - 1) for name, levels in LEVELS.items()}
        study.tell(trial, abs(places["phi"] - 2) + 0.1 * rng.random())
    shares = importances(study, {t.number: t.value for t in study.trials})
    assert sorted(shares.values())[-1] == shares["phi"] > 2 * sorted(shares.values())[-2]
    assert importances(study, {0: 1.0}) == {}


@pytest.mark.parametrize("kind", ["halving", "hyperband", "none"])
def test_pruners_decide_at_the_rungs(kind):
    """Successive halving: one in `reduction` goes on at 2, 4, 8 ... evaluations; hyperband begins later for some."""
    study = optuna.create_study(pruner=make_pruner(kind, 2, 2, 8), sampler=make_sampler("random", 0))
    ends = Counter()
    for i in range(32):
        trial = study.ask()
        for step in range(1, 9):
            trial.report((i * 7) % 32, step)
            if trial.should_prune():
                ends[step] += 1
                break
        else:
            ends["end"] += 1
        study.tell(trial, i if step == 8 else None, state=None if step == 8 else optuna.trial.TrialState.PRUNED)
    assert set(ends) <= {2, 4, 8, "end"}
    if kind == "halving":
        assert 10 <= ends[2] <= 20 and ends[2] > ends[4] > 0
    assert (ends["end"] == 32) == (kind == "none")


def test_dense_with_experts_is_not_dense():
    study, space = optuna.create_study(sampler=make_sampler("random", 0)), make_space(experts=(0, 4))
    begin(study, space, False, 2)
    for experts in (0, 4):
        study.enqueue_trial(places_of(NAMED["dense"]) | dict(num_experts=experts))
        trial, _ = propose(study, space, 2)
        study.tell(trial, 1.0)
    assert [row["name"] for row in rows_of(study)] == ["dense", "dense, 4 experts, top 2"]


def test_a_study_that_is_killed_while_it_begins_begins_again(tmp_path):
    """Whatever of its journal was written: the named structures are all asked for, once, and the request is there."""
    begin(open_study(None, "s", str(tmp_path), make_sampler("random")), SPACE, True, 3)
    lines = (tmp_path / "study.journal").read_bytes().splitlines(keepends=True)
    assert len(lines) > len(NAMED) + 2
    for n in range(len(lines)):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "study.journal").write_bytes(b"".join(lines[:n]))
        study = open_study(None, "s", str(tmp_path / str(n)), make_sampler("random"))
        begin(study, SPACE, True, 3)
        assert Counter(t.user_attrs["named"] for t in study.trials) == Counter(list(NAMED)), n
        assert study.user_attrs["request"] == SPACE.request() and study.user_attrs["first_rung"] == 3


def test_a_lock_that_was_left_behind_is_removed(tmp_path, monkeypatch):
    """By a process that was killed as it wrote."""
    import search_study
    monkeypatch.chdir(tmp_path)
    begin(open_study(None, "s", "out", make_sampler("random")), SPACE, True, 3)
    lock_of = search_study.lock_of

    def impatient(journal):
        lock = lock_of(journal)
        lock.grace_period = 3
        return lock
    monkeypatch.setattr(search_study, "lock_of", impatient)
    lock_of("out/study.journal").acquire()
    assert len(open_study(None, "s", "out", make_sampler("random")).trials) == len(NAMED)
    assert not Path("out/study.journal.lock").exists()


def test_a_password_is_not_told(capsys):
    with pytest.raises(SystemExit):
        open_study("nosuch://me:secret@host/db", "s", "out", make_sampler("random"))
    told = capsys.readouterr().err
    assert "secret" not in told and "nosuch://me:***@host/db" in told and told.count("\n") == 1


def test_processes_that_begin_a_database_together_all_get_it(tmp_path, monkeypatch):
    import search_study
    monkeypatch.setattr(search_study.time, "sleep", lambda seconds: None)
    create, calls = optuna.create_study, []

    def at_the_same_time(**options):
        calls.append(options)
        if len(calls) < 3:
            raise search_study.sqlalchemy.exc.IntegrityError("INSERT", None, Exception("UNIQUE constraint failed"))
        return create(**options)
    monkeypatch.setattr(optuna, "create_study", at_the_same_time)
    assert open_study(f"sqlite:///{tmp_path}/s.db", "s", "out", make_sampler("random")).trials == [] and len(calls) == 3


def test_half_a_line_of_the_journal_does_no_harm(tmp_path):
    """A full disk, or a power cut, left it: what comes later is read all the same."""
    open_study(None, "s", str(tmp_path), make_sampler("random")).ask()
    with open(tmp_path / "study.journal", "rb+") as f:
        before = f.read()
        f.write(before.splitlines(keepends=True)[-1][:20])
    study = open_study(None, "s", str(tmp_path), make_sampler("random"))
    for _ in range(2):
        study.ask()
    assert len(open_study(None, "s", str(tmp_path)).trials) == 3
    assert all(map(json.loads, (tmp_path / "study.journal").read_text().splitlines()))
