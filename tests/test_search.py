"""search.py: the space, its sampling, searches with a stand-in for train.py, and what is made of them."""
import csv
import json
import math
import os
import random
import runpy
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import search_report
from search_space import LEVELS, Space, places_of, swapped, theta_of
from search_study import is_trained, make_pruner, make_sampler, open_study, propose, settled
from space import STRUCTURES, Theta

optuna = pytest.importorskip("optuna")
ROOT = Path(__file__).resolve().parents[1]
NAMED = {name: theta for name, theta in STRUCTURES.items() if theta is not None}
SETTINGS = dict(n_layer=3, n_head=4, block_size=128, batch_size=16, gradient_accumulation_steps=1, dataset="d", seed=1, decay_lr=False)


def make_space(**changes):
    options = dict(dense_width=96, flops=1e13, widths=tuple(range(32, 513, 4)), tolerance=0.05, learning_rates=(3e-3,), experts=(0,),
                   top_ks=(2,), max_nu=1.0, evals=8, settings=SETTINGS, vocab_size=96)
    return Space(**options | changes)


SPACE = make_space()    # what it has computed, it keeps


def random_thetas(count, seed=0):
    rng = random.Random(seed)
    return [theta_of(*(rng.randrange(len(levels)) for levels in LEVELS.values())) for _ in range(count)]


# ---- The space ------------------------------------------------------------------------------------------------------

def test_every_known_structure_is_in_the_space():
    """Exactly, or with the letters of its cores exchanged; those of the paper's list too."""
    paper = runpy.run_path(str(ROOT / "plans" / "paper.py"))["_thetas"].values()
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
    space, checked = make_space(settings=SETTINGS | dict(n_layer=2), experts=(0, 4), top_ks=(1, 2), widths=tuple(range(32, 513, 8))), 0
    dense = GPT(GPTConfig(block_size=128, vocab_size=96, n_layer=2, n_head=4, n_embd=96))
    assert space.flops_per_token == 3 * dense.flops_per_token()
    for i, theta in enumerate((*NAMED.values(), *random_thetas(30))):
        try:
            point = space.point(theta, *((0, 0), (4, 1), (4, 2))[i % 3])
        except ValueError:
            continue
        with torch.device("meta"):
            model = GPT(GPTConfig(block_size=128, vocab_size=96, n_layer=2, n_head=4, n_embd=point.width, struct="einsum", rank=point.rank,
                                  theta=tuple(point.theta), num_experts=point.num_experts, top_k=max(1, point.top_k)))
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
            assert run.settings["struct"] == "einsum" and run.settings["n_embd"] == space.point(theta).width


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
        assert point.theta.nu <= 1 and abs(point.flops_per_token / space.flops_per_token - 1) <= 0.05 and point.width in (96, 160, 240)
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
    names = [t.user_attrs["point"] for t in study.trials if is_trained(t)]
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


# ---- Searches with a stand-in for train.py ----------------------------------------------------------------------------

# A run whose loss follows from its θ and rate, and which goes on from what its log says. 'jobs' beside it says what was launched.
STAND_IN = '''
import json, os, sys, time
sys.path.insert(0, ROOT)
from space import Theta
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
out, its, every = flags["out_dir"], int(flags["max_iters"]), int(flags["eval_interval"])
here, log = os.path.dirname(os.path.abspath(__file__)), os.path.join(out, "log.jsonl")
lines = [json.loads(line) for line in open(log)] if os.path.exists(log) else []
first = max((p["iter"] + every for p in lines if p["type"] == "eval"), default=0)
with open(os.path.join(here, "jobs"), "a") as f:
    f.write(json.dumps(dict(flags, first=first, pid=os.getpid(), parent=os.getppid())) + "\\n")
theta = Theta.parse(flags["theta"])
if flags["seed"] == "13" and theta.omega > 0:
    sys.exit("seed 13 does not share")
loss = 1.5 + 0.5 * theta.omega + 0.5 * (1 - theta.psi) + 0.1 * theta.nu + 10 * abs(float(flags["learning_rate"]) - 2e-3)
with open(log, "a") as f:
    f.write(json.dumps(dict(type="run", config=flags, params=int(flags["n_embd"]))) + "\\n")
    for i in range(first, its + 1, every):
        bad = flags["seed"] == "14" and theta.psi < 1 and i > its / 2
        f.write(json.dumps(dict(type="eval", iter=i, flops=1e6 * i, val_loss=float("nan") if bad else loss + 2 * (1 - i / its))) + "\\n")
        f.flush()
        with open(os.path.join(here, "pause")) as pause:
            time.sleep(float(pause.read()))
'''.replace("ROOT", repr(str(ROOT)))


@pytest.fixture
def desk(run, python_text, tmp_path):
    """desk(*flags): a small search with the stand-in; desk.jobs(): what it has launched; desk.study(): what it has kept."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def search(*flags, pause=0.0):
        if not (tmp_path / "pause").exists() or (tmp_path / "pause").read_text() != str(pause):
            (tmp_path / "pause").write_text(str(pause))
        return run("search.py", "run", f"--out={tmp_path}/out", f"--program={tmp_path}/stand_in.py", f"--dataset={python_text}",
                   "--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=1", "--n_layer=1", "--n_head=4", "--expiry=2",
                   "--decay_lr=False", "--dense_width=64", "--widths=" + ",".join(map(str, range(32, 160, 4))), "--flops=2e9", *flags)

    def jobs():
        return [json.loads(line) for line in (tmp_path / "jobs").read_text().splitlines()] if (tmp_path / "jobs").exists() else []

    def trials():
        return [t for t in open_study(None, "search", str(tmp_path / "out")).trials if is_trained(t)]
    search.jobs, search.trials, search.folder = jobs, trials, tmp_path
    return search


def states(trials):
    return Counter(t.state.name for t in trials)


def points(jobs):
    """The folders of points that were launched."""
    return [Path(job["out_dir"]).parent.name for job in jobs]


def test_a_search(desk):
    """The named structures first; every point once; those that are behind are stopped; the best has ω = 0 and ψ = 1."""
    told = desk("--trials=16", "--jobs=2", "--sampler_seed=1", pause=0.1)
    assert told.returncode == 0, told.stdout + told.stderr
    trials, jobs = desk.trials(), desk.jobs()
    assert len(trials) == 16 == len(jobs) and len(set(points(jobs))) == 16
    assert {t.user_attrs["label"].split()[0] for t in trials[:6]} == set(NAMED) and states(trials[:6]) == {"COMPLETE": 6}
    assert states(trials[6:])["PRUNED"] >= 3 and not states(trials)["FAIL"]
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    assert all(abs(t.user_attrs["flops"] / 2e9 - 1) <= 0.05 for t in trials)
    best = Theta(*min(complete, key=lambda t: t.value).user_attrs["theta"])
    assert (best.omega, best.psi) == (0, 1)
    for trial in complete:
        theta = Theta(*trial.user_attrs["theta"])
        assert trial.value == pytest.approx(1.5 + 0.5 * theta.omega + 0.5 * (1 - theta.psi) + 0.1 * theta.nu + 0.01)
        assert sorted(trial.intermediate_values) == list(range(1, 9))
    for trial in trials:
        if trial.state.name == "PRUNED":     # at a rung, and its process was stopped
            assert trial.last_step in (2, 4)
            log, = (desk.folder / "out" / trial.user_attrs["point"]).glob("*/log.jsonl")
            assert log.read_text().count('"eval"') < 9
    assert not list((desk.folder / "out").rglob("claim.*")) and not list((desk.folder / "out").glob(".clock*"))
    again = desk("--trials=16", "--jobs=2")
    assert again.returncode == 0 and len(desk.jobs()) == 16 and f"{len(complete)} trials to their end" in again.stdout


def test_two_processes_share_a_study(desk):
    (desk.folder / "pause").write_text("0.03")
    told = []
    flags = ("--trials=14", "--named=False", "--sampler=random", "--widths=32,64,96", "--tolerance=0.3")
    threads = [threading.Thread(target=lambda: told.append(desk(*flags, pause=0.03))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [t.returncode for t in told] == [0, 0], told
    jobs, trials = desk.jobs(), desk.trials()
    assert len({job["parent"] for job in jobs}) == 2 and len(jobs) == 14 == len(set(points(jobs)))
    assert len(trials) == 14 and not {"RUNNING", "FAIL"} & set(states(trials))


def launched(desk, count, *flags, pause):
    """(thread of a search, list that its result goes into), once it has launched so many runs and one has evaluated twice."""
    told = []
    thread = threading.Thread(target=lambda: told.append(desk(*flags, pause=pause)))
    thread.start()
    for _ in range(1200):
        logs = [log.read_text().count('"eval"') for log in (desk.folder / "out").rglob("log.jsonl")]
        if len(desk.jobs()) >= count and any(2 < n < 8 for n in logs):
            break
        time.sleep(0.02)
    return thread, told


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_search_goes_on_where_it_was(desk, number):
    thread, told = launched(desk, 2, "--trials=4", "--pruner=none", pause=0.2)
    job = desk.jobs()[-1]
    before = {t.number: t.user_attrs["point"] for t in desk.trials()}
    os.kill(job["parent"], number)
    if number == signal.SIGKILL:
        os.kill(job["pid"], number)
    thread.join()
    assert told[0].returncode == (-9 if number == signal.SIGKILL else 130) and "Traceback" not in told[0].stderr
    assert "RUNNING" in states(desk.trials())
    again = desk("--trials=4", "--pruner=none")
    assert again.returncode == 0 and "taken up where it was left" in again.stdout, again.stdout + again.stderr
    trials, jobs = desk.trials(), desk.jobs()
    assert len(trials) == 4 == states(trials)["COMPLETE"] and len(jobs) == 5 and len(set(points(jobs))) == 4
    gone_on, = [j for j in jobs if j["out_dir"] == job["out_dir"] and j["pid"] != job["pid"]]
    assert gone_on["first"] > 0 and {t.number: t.user_attrs["point"] for t in trials}.items() >= before.items()
    assert all(sorted(t.intermediate_values) == list(range(1, 9)) for t in trials)


def test_a_run_that_outlives_its_search_is_not_started_twice(desk):
    """The search is killed, and train.py goes on: who comes next waits for its end, and takes that."""
    thread, told = launched(desk, 1, "--trials=1", "--pruner=none", pause=0.3)
    job, = desk.jobs()
    os.kill(job["parent"], signal.SIGKILL)
    thread.join()
    again = desk("--trials=1", "--pruner=none", "--expiry=100", pause=0.3)
    assert again.returncode == 0 and len(desk.jobs()) == 1 and states(desk.trials()) == {"COMPLETE": 1}


def test_a_trial_that_was_asked_for_and_never_begun_ends(desk):
    """Its process died between asking and planning: nobody waits for it."""
    assert desk("--trials=1", "--pruner=none").returncode == 0
    open_study(None, "search", str(desk.folder / "out"), make_sampler("random")).ask()
    told = desk("--trials=2", "--pruner=none")
    assert told.returncode == 0 and states(desk.trials()) == {"COMPLETE": 2}
    assert states(open_study(None, "search", str(desk.folder / "out")).trials)["RUNNING"] == 0


def test_failures_are_told_and_the_search_goes_on(desk):
    told = desk("--trials=10", "--seed=13", "--pruner=none", "--sampler_seed=0")
    trials = desk.trials()
    failed = [t for t in trials if t.state.name == "FAIL"]
    assert told.returncode == 1 and len(trials) == 10 and len(failed) >= 2 and states(trials)["COMPLETE"] >= 3
    assert all(Theta(*t.user_attrs["theta"]).omega > 0 for t in failed)
    assert all(t.user_attrs["why"] == "ended with status 1: seed 13 does not share" for t in failed)
    assert told.stdout.count("FAILED, ended with status 1: seed 13 does not share") == len(failed)


def test_a_loss_that_is_not_finite_ends_a_trial(desk):
    told = desk("--trials=6", "--seed=14", "--pruner=none", pause=0.01)
    failed = [t for t in desk.trials() if t.state.name == "FAIL"]
    assert told.returncode == 1 and {Theta(*t.user_attrs["theta"]).psi for t in failed} == {0.5}
    assert "not finite" in failed[0].user_attrs["why"] and states(desk.trials())["COMPLETE"] == 5


def test_nothing_but_failures_ends_the_search(desk):
    (desk.folder / "stand_in.py").write_text("import sys; sys.exit('no room')")
    told = desk("--trials=10", "--max_failures=3")
    assert told.returncode == 1 and "3 trials in a row have failed, the last: ended with status 1: no room" in told.stderr
    assert told.stderr.count("\n") == 1 and states(desk.trials()) == {"FAIL": 3}


def test_of_several_rates_the_best_counts(desk):
    """The first diverges, the third is nearest to the best; all belong to one trial."""
    (desk.folder / "stand_in.py").write_text(STAND_IN.replace("bad = ", 'bad = flags["learning_rate"] == "0.1" and i or '))
    told = desk("--trials=2", "--learning_rates=0.1,1e-3,1.9e-3,4e-3", "--pruner=none")
    trials, jobs = desk.trials(), desk.jobs()
    assert told.returncode == 0 and states(trials) == {"COMPLETE": 2} and len(jobs) == 8, told.stdout + told.stderr
    for trial in trials:
        theta = Theta(*trial.user_attrs["theta"])
        assert trial.user_attrs["settings"]["learning_rate"] == 1.9e-3
        assert trial.value == pytest.approx(1.5 + 0.5 * theta.omega + 0.5 * (1 - theta.psi) + 0.1 * theta.nu + 0.001)


def test_experts_are_searched_when_asked_for(desk):
    told = desk("--trials=8", "--experts=0,4", "--top_ks=1,2", "--sampler=random", "--sampler_seed=3", "--pruner=none", "--named=False",
                "--tolerance=0.3")
    assert told.returncode == 0, told.stdout + told.stderr
    found = {(job.get("num_experts", "0"), job.get("top_k", "0")) for job in desk.jobs()}
    assert ("0", "0") in found and found & {("4", "1"), ("4", "2")} and found <= {("0", "0"), ("4", "1"), ("4", "2")}


def test_a_database_holds_the_study_too(desk):
    url = f"--storage=sqlite:///{desk.folder}/study.db"
    told = desk("--trials=2", url)
    assert told.returncode == 0 and len(desk.jobs()) == 2 and not (desk.folder / "out" / "study.journal").exists(), told.stderr
    assert desk("--trials=3", url).returncode == 0 and len(desk.jobs()) == 3


def test_a_study_goes_on_with_the_same_request_alone(desk):
    assert desk("--trials=1").returncode == 0
    for flag, word in (("--flops=3e9", "flops"), ("--seed=5", "settings"), ("--learning_rates=1e-3", "learning_rates")):
        told = desk("--trials=2", flag)
        assert told.returncode == 1 and word in told.stderr and told.stderr.count("\n") == 1, told.stderr
    assert len(desk.jobs()) == 1


@pytest.mark.parametrize("flags, word", [
    (["--jobs=0"], "jobs"), (["--flops=1e9"], "flops"), (["--sampler=cmaes"], "cmaes"), (["--pruner=none!"], "none!"), (["--reduction=1"], "reduction"),
    (["--widths=33"], "33"), (["--experts=-1"], "experts"), (["--n_embd=64"], "n_embd"), (["--dataset=nowhere"], "nowhere"),
    (["--trails=3"], "trials"), (["--n_lyer=3"], "n_lyer"), (["config/nowhere.py"], "nowhere"), (["--top_ks=1.5"], "top_ks"),
    (["--storage=mongo://x"], "mongo"), (["--learning_rates="], "learning_rates")])
def test_run_refuses(desk, flags, word):
    told = desk(*flags)
    assert told.returncode == 1 and told.stderr.startswith("error: ") and word in told.stderr, told.stderr
    assert told.stderr.count("\n") == 1 and not desk.jobs()


def no_optuna():
    for name in [name for name in sys.modules if name == "search_study" or name.partition(".")[0] == "optuna"]:
        del sys.modules[name]
    sys.modules["optuna"] = None


def test_commands_refuse(run, tmp_path):
    for words, named in ((["sweep"], "sweep"), ([], "run or report"), (["report", f"--out={tmp_path}/x"], "search first")):
        told = run("search.py", *words)
        assert told.returncode == 1 and told.stderr.startswith("error: ") and named in told.stderr and told.stderr.count("\n") == 1
    assert "--trials=45" in run("search.py", "--help").stdout
    told = run("search.py", "run", before=no_optuna)
    assert told.returncode == 1 and "requirements-search.txt" in told.stderr and told.stderr.count("\n") == 1


# ---- Report ---------------------------------------------------------------------------------------------------------

def test_report(desk, run):
    assert desk("--trials=14", "--jobs=2", "--sampler_seed=2", pause=0.02).returncode == 0
    results, places = desk.folder / "results", [f"--out={desk.folder}/out", f"--results={desk.folder}/results"]
    told = run("search.py", "report", *places)
    assert told.returncode == 0, told.stderr
    text = (results / "table.md").read_text()
    assert text.strip() in told.stdout.strip()
    trials = desk.trials()
    with open(results / "trials.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    complete = [r for r in rows if r["state"] == "complete"]
    assert len(rows) == 14 and len(complete) == states(trials)["COMPLETE"]
    assert [float(r["loss"]) for r in complete] == sorted(float(r["loss"]) for r in complete)
    for row in rows:
        theta = Theta(*trials[[t.number for t in trials].index(int(row["trial"]))].user_attrs["theta"])
        assert [float(row[k]) for k in ("omega", "psi", "nu")] == pytest.approx([theta.omega, theta.psi, theta.nu], abs=1e-5)
        assert float(row["share_of_budget"]) in ((1,) if row["state"] == "complete" else (0.25, 0.5))
    parts = text.split("## Pruned")
    assert all((r["structure"] in parts[0]) == (r["state"] == "complete") for r in rows)
    assert "PED-ANOVA" in text and (results / "taxonomy.png").read_bytes().startswith(b"\x89PNG")
    svg = (results / "taxonomy.svg").read_text()
    assert all(word in svg for word in ("ω, parameter sharing", "ψ, rank", "ν, compute intensity", ">dense<", "full budget", "25% of"))
    again = run("search.py", "report", *places)
    assert again.stdout == told.stdout and (results / "taxonomy.svg").read_text() == svg


def test_from_search_to_configs(run, python_text, tmp_path):
    """With train.py itself: two tiny trials; the best is a config that train.py runs, the others a plan for scaling.py."""
    told = run("search.py", "run", "config/cpu.py", f"--out={tmp_path}/out", f"--dataset={python_text}", "--block_size=16", "--batch_size=4",
               "--n_layer=1", "--dense_width=64", "--widths=64,96,100,104", "--flops=4e8", "--trials=2", "--eval_iters=2", "--evals=4",
               "--sample_tokens=0", "--warmup_iters=2", "--tolerance=0.2", "--pruner=none")
    assert told.returncode == 0, told.stdout + told.stderr
    for log in (tmp_path / "out").rglob("log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines[-1]["flops"] == pytest.approx(4e8, rel=0.2) and sum(p["type"] == "eval" for p in lines) == 5
    told = run("search.py", "report", f"--out={tmp_path}/out", f"--results={tmp_path}/results", "--times=2")
    assert told.returncode == 0 and "share of dense's compute" in told.stdout, told.stderr
    best = run("train.py", tmp_path / "results" / "best.py", f"--out_dir={tmp_path}/again")
    assert best.returncode == 0, best.stderr
    with open(tmp_path / "results" / "trials.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    once, again = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                   for folder in (tmp_path / "out" / rows[0]["run"], tmp_path / "again"))
    assert once[-1]["val_loss"] == again[-1]["val_loss"] == pytest.approx(float(rows[0]["loss"]), abs=1e-5)     # the same run
    assert all(once[0]["config"][k] == v for k, v in again[0]["config"].items() if k not in ("out_dir", "init_from"))
    plan = run("scaling.py", "sweep", tmp_path / "results" / "follow.py", "--dry_run=True", f"--runs={tmp_path}/follow")
    lines = plan.stdout.splitlines()
    assert plan.returncode == 0 and len(lines) == 5 and sum(line.startswith("dense-d64-") for line in lines) == 2, plan.stderr
    assert sum(f"-d{r['width']}-" in line for line in lines for r in rows if r["name"] != "dense") == 2
    assert all(float(line.split()[3]) == pytest.approx(8e8, rel=0.06) for line in lines[:4])


def test_share_of_dense():
    curve = search_report.DenseCurve([1e12, 4e12, 2e12, 8e12], [3.0, 2.0, 2.5, 2.1], "by hand")
    assert curve.share(1e12, 2.5) == "0.5" and curve.share(4e12, 2.0) == "1" and curve.share(1e12, 1.9) == "< 0.25"
    assert curve.share(1e12, 3.1) == "—" and curve.share(1e12, math.nan) == "—"
    middle = math.exp(math.log(1e12) + math.log(3.0 / 2.75) / math.log(3.0 / 2.5) * math.log(2))
    assert float(curve.share(1e12, 2.75)) == pytest.approx(1e12 / middle, rel=0.01)


def test_dense_curves_from_elsewhere(tmp_path):
    (tmp_path / "fit.json").write_text(json.dumps(dict(axes=dict(flops=dict(dense=dict(x=[1e12, 2e12], loss=[3.0, 2.5]))))))
    curve = search_report.dense_curve(str(tmp_path / "fit.json"), [], "", {})
    assert curve.share(1e12, 2.5) == "0.5" and "fit.json" in curve.source
    (tmp_path / "other.json").write_text("{}")
    for place in ("other.json", "nowhere"):
        with pytest.raises(ValueError, match="no dense curve"):
            search_report.dense_curve(str(tmp_path / place), [], "", {})


def test_importances_say_which_parameter_decides():
    study, rng = optuna.create_study(sampler=make_sampler("random", 0)), random.Random(0)
    for _ in range(60):
        trial = study.ask()
        places = {name: trial.suggest_int(name, 0, len(levels) - 1) for name, levels in LEVELS.items()}
        study.tell(trial, abs(places["phi"] - 2) + 0.1 * rng.random())
    shares = search_report.importances(study, {t.number: t.value for t in study.trials})
    assert sorted(shares.values())[-1] == shares["phi"] > 2 * sorted(shares.values())[-2]
    assert search_report.importances(study, {0: 1.0}) == {}


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
