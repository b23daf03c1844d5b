"""search.py: searches with a stand-in for train.py, and what is made of them."""
import csv
import json
import math
import os
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")

from experiments.search import report as search_report
from experiments.search.study import make_sampler, open_study, trained
from structured import STRUCTURES, Theta

ROOT = Path(__file__).resolve().parents[2]
NAMED = {name: theta for name, theta in STRUCTURES.items() if theta is not None}


# ---- Searches with a stand-in for train.py ----------------------------------------------------------------------------

# A run whose loss follows from its θ and rate, and which goes on from what its log says. Beside it, the file 'jobs' says
# what was launched, and while there is a file 'hold', no run goes beyond so many evaluations.
STAND_IN = '''
import json, os, sys, time
sys.path.insert(0, ROOT)
from structured import STRUCTURES, Theta
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
out, its, every = flags["out_dir"], int(flags["max_iters"]), int(flags["eval_interval"])
here, log = os.path.dirname(os.path.abspath(__file__)), os.path.join(out, "log.jsonl")
lines = [json.loads(line) for line in open(log)] if os.path.exists(log) else []
first = max((p["iter"] // every * every + every for p in lines if p["type"] == "eval"), default=0)
with open(os.path.join(here, "jobs"), "a") as f:
    f.write(json.dumps(dict(flags, first=first, pid=os.getpid(), parent=os.getppid())) + "\\n")
launched = len(open(os.path.join(here, "jobs")).readlines())
def held(evaluations):
    try:
        return evaluations >= int(open(os.path.join(here, "hold")).read())
    except FileNotFoundError:
        return False
theta = STRUCTURES[flags["struct"]] or Theta.parse(flags["theta"])
if flags["seed"] == "13" and theta.omega > 0:
    sys.exit("seed 13 does not share")
loss = 1.5 + 0.5 * theta.omega + 0.5 * (1 - theta.psi) + 0.1 * theta.nu + 10 * abs(float(flags["learning_rate"]) - 2e-3)
with open(log, "a") as f:
    f.write(json.dumps(dict(type="run", config=flags, params=int(flags["n_embd"]))) + "\\n")
    for i in range(first, its + 1, every):
        bad = flags["seed"] == "14" and theta.psi < 1 and i > its / 2
        val_loss = None if bad else loss + 2 * (1 - i / its)
        f.write(json.dumps(dict(type="eval", iter=i, flops=1e6 * i, val_loss=val_loss)) + "\\n")
        f.flush()
        while held(i // every):
            time.sleep(0.01)
'''.replace("ROOT", repr(str(ROOT)))
LATER_IS_WORSE = STAND_IN.replace("loss = ", "loss = launched + ")


@pytest.fixture
def desk(run, python_text, tmp_path):
    """desk(*flags): a small search with the stand-in; desk.jobs(): what it launched; desk.trials(): what it has kept."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def search(*flags, before=None):
        return run("experiments.search", "run", f"--out={tmp_path}/out", f"--program={tmp_path}/stand_in.py",
                   f"--dataset={python_text}", "--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=1",
                   "--n_layer=1", "--n_head=4", "--decay_lr=False", "--dense_width=64", "--flops=2e9", "--expiry=2",
                   "--widths=" + ",".join(map(str, range(32, 160, 4))), *flags, before=before)

    def jobs():
        lines = (tmp_path / "jobs").read_text().splitlines() if (tmp_path / "jobs").exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def trials():
        return trained(open_study(None, "search", str(tmp_path / "out")))
    search.jobs, search.trials, search.folder, search.hold = jobs, trials, tmp_path, tmp_path / "hold"
    return search


def states(trials):
    return Counter(t.state.name for t in trials)


def points(jobs):
    """The folders of points that were launched."""
    return [Path(job["out_dir"]).parent.name for job in jobs]


def evaluations(folder):
    """How many each run below the folder has logged."""
    return [log.read_text().count('"eval"') for log in folder.rglob("log.jsonl")]


def wait_until(true):
    for _ in range(30_000):     # minutes: for what never comes
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def begun(desk, *flags):
    """(thread of a search, list that its result goes into)."""
    told = []
    thread = threading.Thread(target=lambda: told.append(desk(*flags)))
    thread.start()
    return thread, told


def test_a_search(desk):
    """The named structures first, and to their end; every point once; of the others some are stopped, at the rungs."""
    told = desk("--trials=16", "--sampler_seed=1")
    assert told.returncode == 0, told.stdout + told.stderr
    trials, jobs = desk.trials(), desk.jobs()
    assert len(trials) == 16 == len(jobs) and len(set(points(jobs))) == 16
    assert {t.user_attrs["label"].split()[0] for t in trials[:6]} == set(NAMED) and states(trials[:6]) == {"COMPLETE": 6}
    assert states(trials[6:])["PRUNED"] >= 3 and not states(trials)["FAIL"]
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    assert all(abs(t.user_attrs["flops"] / 2e9 - 1) <= 0.05 for t in trials)
    for trial in complete:
        theta = Theta(*trial.user_attrs["theta"])
        assert trial.value == pytest.approx(1.5 + 0.5 * theta.omega + 0.5 * (1 - theta.psi) + 0.1 * theta.nu + 0.01)
        assert sorted(trial.intermediate_values) == list(range(1, 9))
    assert all(trial.last_step in (2, 4) for trial in trials if trial.state.name == "PRUNED")
    assert not list((desk.folder / "out").rglob("claim.*")) and not list((desk.folder / "out").glob(".clock*"))
    again = desk("--trials=16")
    assert again.returncode == 0 and len(desk.jobs()) == 16 and f"{len(complete)} trials to their end" in again.stdout


def test_what_is_behind_is_told_and_then_stopped(desk):
    """The second run is behind; asked to end, it keeps the journal of that moment: what was decided is in it."""
    (desk.folder / "stand_in.py").write_text("import shutil, signal\n" + LATER_IS_WORSE.replace("def held", '''
def at_end(*_):
    os.mkdir(os.path.join(here, "end"))
    shutil.copy(os.path.join(here, "out", "study.journal"), os.path.join(here, "end"))
    sys.exit()
signal.signal(signal.SIGTERM, at_end)
def held''').replace("held(i // every)", "launched == 2 and i == 2 * every"))
    told = desk("--trials=2", "--named=False", "--sampler=random", "--sampler_seed=0")
    assert told.returncode == 0 and [t.state.name for t in desk.trials()] == ["COMPLETE", "PRUNED"], told.stderr
    assert open_study(None, "search", str(desk.folder / "end")).trials[-1].state.name == "PRUNED"
    assert sorted(evaluations(desk.folder / "out")) == [3, 9]


def test_a_search_killed_before_it_asked_the_pruner_asks_for_that_evaluation(desk):
    """Its journal ends with the second trial's second evaluation; the run itself has gone on to its end."""
    flags = ("--trials=2", "--named=False", "--sampler=random", "--sampler_seed=0")
    (desk.folder / "stand_in.py").write_text(LATER_IS_WORSE)
    assert desk(*flags).returncode == 0 and len(desk.jobs()) == 2
    number, journal = desk.trials()[1].number, desk.folder / "out" / "study.journal"
    lines = journal.read_text().splitlines(keepends=True)
    last, = [i for i, line in enumerate(map(json.loads, lines)) if line.get("trial_id") == number and line.get("step") == 2]
    journal.write_text("".join(lines[:last + 1]))
    told = desk(*flags)
    trial = desk.trials()[1]
    assert told.returncode == 0 and (trial.state.name, trial.last_step) == ("PRUNED", 2) and len(desk.jobs()) == 2


def test_two_processes_share_a_study(desk):
    """Each has launched a run before the first of them ends."""
    desk.hold.write_text("1")
    flags = ("--trials=8", "--named=False", "--sampler=random", "--widths=32,64,96", "--tolerance=0.3", "--expiry=900")
    searches = [begun(desk, *flags, f"--sampler_seed={seed}") for seed in (1, 2)]
    wait_until(lambda: len({job["parent"] for job in desk.jobs()}) == 2)
    desk.hold.unlink()
    for thread, _ in searches:
        thread.join()
    assert [told[0].returncode for _, told in searches] == [0, 0], searches
    jobs, trials = desk.jobs(), desk.trials()
    assert len(jobs) == 8 == len(set(points(jobs)))
    assert len(trials) == 8 and not {"RUNNING", "FAIL"} & set(states(trials))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_search_goes_on_where_it_was(desk, number):
    desk.hold.write_text("3")
    thread, told = begun(desk, "--trials=4", "--pruner=none", "--jobs=2")
    wait_until(lambda: evaluations(desk.folder / "out") == [4, 4])
    killed = desk.jobs()
    before = {t.number: t.user_attrs["point"] for t in desk.trials()}
    os.kill(killed[0]["parent"], number)
    for job in killed if number == signal.SIGKILL else ():
        os.kill(job["pid"], number)
    thread.join()
    desk.hold.unlink()
    assert told[0].returncode == (-9 if number == signal.SIGKILL else 130) and "Traceback" not in told[0].stderr
    assert states(desk.trials()) == {"RUNNING": 2}
    again = desk("--trials=4", "--pruner=none")
    assert again.returncode == 0 and "taken up where it was left" in again.stdout, again.stdout + again.stderr
    trials, jobs = desk.trials(), desk.jobs()
    assert len(trials) == 4 == states(trials)["COMPLETE"] and len(jobs) == 6 and len(set(points(jobs))) == 4
    gone_on = [job for job in jobs[2:] if job["out_dir"] in {k["out_dir"] for k in killed}]
    assert len(gone_on) == 2 and all(job["first"] > 0 for job in gone_on)
    assert {t.number: t.user_attrs["point"] for t in trials}.items() >= before.items()
    assert all(sorted(t.intermediate_values) == list(range(1, 9)) for t in trials)


def test_a_run_that_outlives_its_search_is_not_started_twice(desk):
    """The search is killed, and train.py goes on: who comes next waits for its end, and takes that."""
    desk.hold.write_text("3")
    thread, _ = begun(desk, "--trials=1", "--pruner=none")
    wait_until(lambda: evaluations(desk.folder / "out") == [4])
    job, = desk.jobs()
    os.kill(job["parent"], signal.SIGKILL)
    thread.join()
    old, = (desk.folder / "out").glob(".clock.*")
    thread, told = begun(desk, "--trials=1", "--pruner=none", "--expiry=900")
    wait_until(lambda: any(new != old for new in (desk.folder / "out").glob(".clock.*")))
    new, = {*(desk.folder / "out").glob(".clock.*")} - {old}
    times = set()
    wait_until(lambda: times.add(new.stat().st_mtime_ns) or len(times) > 2)     # it has looked, and looks again
    desk.hold.unlink()
    thread.join()
    assert told[0].returncode == 0 and len(desk.jobs()) == 1 and states(desk.trials()) == {"COMPLETE": 1}


def test_a_trial_that_another_process_has_told_is_no_error(desk):
    desk.hold.write_text("1")
    thread, told = begun(desk, "--trials=2", "--pruner=none")
    wait_until(lambda: evaluations(desk.folder / "out") == [2])
    study = open_study(None, "search", str(desk.folder / "out"))
    study.tell(desk.trials()[0].number, 1.0)
    desk.hold.unlink()
    thread.join()
    assert told[0].returncode == 0 and "another process" in told[0].stdout, told
    assert states(desk.trials()) == {"COMPLETE": 2} and desk.trials()[0].value == 1.0 and len(desk.jobs()) == 2


def test_runs_that_another_study_has_left_are_taken_where_they_measure_the_same(desk):
    """Its journal is gone. Of the same request all is taken but what was evaluated in between; of another nothing."""
    flags = ("--trials=1", "--pruner=none")
    assert desk(*flags).returncode == 0
    losses, every = desk.trials()[0].intermediate_values, int(desk.jobs()[0]["eval_interval"])
    log, = (desk.folder / "out").rglob("log.jsonl")
    with open(log, "a") as f:
        f.writelines(json.dumps(dict(type="eval", iter=i, val_loss=0.1)) + "\n" for i in (1, every + 1))
    (desk.folder / "out" / "study.journal").unlink()
    assert desk(*flags).returncode == 0
    assert desk.trials()[0].intermediate_values == losses and len(desk.jobs()) == 1
    (desk.folder / "out" / "study.journal").unlink()
    assert desk(*flags, "--flops=3e9").returncode == 0
    assert [job["first"] for job in desk.jobs()] == [0, 0]
    assert sorted(desk.trials()[0].intermediate_values) == list(range(1, 9))


def test_a_trial_that_was_asked_for_and_never_begun_ends(desk):
    """Its process died between asking and planning: nobody waits for it."""
    assert desk("--trials=1", "--pruner=none").returncode == 0
    open_study(None, "search", str(desk.folder / "out"), make_sampler("random")).ask()
    told = desk("--trials=2", "--pruner=none")
    assert told.returncode == 0 and states(desk.trials()) == {"COMPLETE": 2}
    assert states(open_study(None, "search", str(desk.folder / "out")).trials)["RUNNING"] == 0


def some_have_no_model():
    import search_space
    runs = search_space.Space.runs

    def without(space, point, root):
        if os.path.basename(root) == point.name and point.theta.omega > 0:
            raise ValueError("no such model")
        return runs(space, point, root)
    search_space.Space.runs = without


def test_a_trial_that_cannot_start_fails_and_the_search_goes_on(desk):
    told = desk("--trials=6", "--pruner=none", before=some_have_no_model)
    failed = [t for t in desk.trials() if t.state.name == "FAIL"]
    assert told.returncode == 1 and states(desk.trials()) == {"COMPLETE": 6 - len(failed), "FAIL": len(failed)}, told
    assert len(failed) == sum(theta.omega > 0 for theta in NAMED.values()) == told.stdout.count("FAILED, no such model")
    assert all(t.user_attrs["why"] == "no such model" for t in failed) and len(desk.jobs()) == 6 - len(failed)
    assert not list((desk.folder / "out").rglob("claim.*"))


def test_failures_are_told_and_the_search_goes_on(desk):
    told = desk("--trials=10", "--seed=13", "--pruner=none", "--sampler_seed=0")
    trials = desk.trials()
    failed = [t for t in trials if t.state.name == "FAIL"]
    assert told.returncode == 1 and len(trials) == 10 and len(failed) >= 2 and states(trials)["COMPLETE"] >= 3
    assert all(Theta(*t.user_attrs["theta"]).omega > 0 for t in failed)
    assert all(t.user_attrs["why"] == "ended with status 1: seed 13 does not share" for t in failed)
    assert told.stdout.count("FAILED, ended with status 1: seed 13 does not share") == len(failed)


def test_a_loss_that_is_not_finite_ends_a_trial(desk):
    told = desk("--trials=6", "--seed=14", "--pruner=none")
    failed = [t for t in desk.trials() if t.state.name == "FAIL"]
    assert told.returncode == 1 and {Theta(*t.user_attrs["theta"]).psi for t in failed} == {0.5}
    assert "not finite" in failed[0].user_attrs["why"] and states(desk.trials())["COMPLETE"] == 5


def test_what_has_failed_is_tried_again(desk):
    """By the same command, once its cause is gone; it counts once, and a named structure keeps its name."""
    stand_in = desk.folder / "stand_in.py"
    stand_in.write_text("import sys; sys.exit('no room')")
    told = desk("--trials=6", "--pruner=none", "--max_failures=3")
    assert told.returncode == 1 and states(desk.trials()) == {"FAIL": 3}
    stand_in.write_text(STAND_IN)
    told = desk("--trials=6", "--pruner=none")
    assert told.returncode == 0 and "3 trials that have failed are tried again" in told.stdout, told.stdout + told.stderr
    trials = desk.trials()
    assert states(trials) == {"COMPLETE": 6} and {t.user_attrs["named"] for t in trials} == set(NAMED)
    assert "tried again" not in desk("--trials=6", "--pruner=none").stdout and len(desk.jobs()) == 6


def test_a_run_that_another_still_writes_is_left_to_it(desk):
    """Its lock is held, although no claim says so, as when a machine slept: the trial is taken up later, not failed."""
    (desk.folder / "stand_in.py").write_text(STAND_IN.replace("theta = STRUCTURES", """
if launched < 3:
    sys.exit("error: another run writes into " + out + " (123): wait for its end")
theta = STRUCTURES"""))
    told = desk("--trials=1", "--pruner=none")
    assert told.returncode == 0 and states(desk.trials()) == {"COMPLETE": 1} and len(desk.jobs()) == 3, told
    assert told.stdout.count("another process has taken it over") == 2


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


def test_a_pruned_trial_is_described_by_its_best_rate(desk):
    (desk.folder / "stand_in.py").write_text(STAND_IN.replace("loss = ", "loss = (launched - 1) // 3 + "))
    told = desk("--trials=2", "--learning_rates=1e-3,1.9e-3,4e-3", "--named=False", "--sampler=random", "--sampler_seed=0")
    assert told.returncode == 0 and [t.state.name for t in desk.trials()] == ["COMPLETE", "PRUNED"], told
    assert [t.user_attrs["settings"]["learning_rate"] for t in desk.trials()] == [1.9e-3, 1.9e-3]


def test_experts_are_searched_when_asked_for(desk):
    told = desk("--trials=8", "--experts=0,4", "--top_ks=1,2", "--sampler=random", "--sampler_seed=3", "--pruner=none",
                "--named=False", "--tolerance=0.3")
    assert told.returncode == 0, told.stdout + told.stderr
    found = {(job.get("num_experts", "0"), job.get("top_k", "0")) for job in desk.jobs()}
    assert ("0", "0") in found and found & {("4", "1"), ("4", "2")} and found <= {("0", "0"), ("4", "1"), ("4", "2")}


def test_a_database_holds_the_study_too(desk):
    url = f"--storage=sqlite:///{desk.folder}/study.db"
    told = desk("--trials=2", url)
    assert told.returncode == 0 and len(desk.jobs()) == 2, told.stderr
    assert not (desk.folder / "out" / "study.journal").exists()
    assert desk("--trials=3", url).returncode == 0 and len(desk.jobs()) == 3
    with sqlite3.connect(desk.folder / "study.db") as database:
        database.execute("DROP TABLE study_user_attributes")
        database.execute("CREATE VIEW study_user_attributes AS SELECT 1 AS x")
    told = desk("--trials=4", url)
    assert told.returncode == 1 and told.stderr.startswith("error: ") and told.stderr.count("\n") == 1, told.stderr


def test_a_study_goes_on_with_the_same_request_alone(desk):
    assert desk("--trials=1").returncode == 0
    for flag, word in (("--flops=3e9", "flops = 2000000000.0, not 3"), ("--seed=5", "seed = 1337, not 5"),
                       ("--bias=True", "bias = None, not True"), ("--learning_rates=1e-3", "learning_rates")):
        told = desk("--trials=2", flag)
        assert told.returncode == 1 and word in told.stderr and told.stderr.count("\n") == 1, told.stderr
    assert len(desk.jobs()) == 1


@pytest.mark.parametrize("flags, word", [
    (["--jobs=0"], "jobs"), (["--flops=1e9"], "flops"), (["--sampler=cmaes"], "cmaes"), (["--pruner=none!"], "none!"),
    (["--reduction=1"], "reduction"), (["--widths=33"], "33"), (["--experts=-1"], "experts"), (["--n_embd=64"], "n_embd"),
    (["--dataset=nowhere"], "nowhere"), (["--trails=3"], "trials"), (["--n_lyer=3"], "n_lyer"),
    (["config/nowhere.py"], "nowhere"), (["--top_ks=1.5"], "top_ks"), (["--storage=mongo://x"], "mongo"),
    (["--learning_rates="], "learning_rates"), (["--experts=0,1"], "experts"), (["--dropout=1.5"], "dropout"),
    (["--ffn_experts=4"], "ffn_experts"), (["config/moe.py"], "ffn_experts"), (["config/btt.py"], "struct"),
    (["--head_aligned=True"], "head_aligned"), (["--gpus=100"], "gpus"), (["--batch_size=0"], "batch_size"),
    (["--n_head=0"], "n_head"), (["--n_layer=0"], "n_layer"), (["--experts=4", "--top_ks=8"], "top_ks"),
    (["--dense_width=66"], "dense_width")])
def test_run_refuses(desk, flags, word):
    told = desk(*flags)
    assert told.returncode == 1 and told.stderr.startswith("error: ") and word in told.stderr, told.stderr
    assert told.stderr.count("\n") == 1 and not desk.jobs()
    assert not list(desk.folder.rglob("study.journal")) or "storage" in flags[0]    # which a right command would go on with


def test_named_structures_have_a_width_at_larger_ones_of_dense(run, python_text):
    told = run("experiments.search", "run", "--dry_run=True", "--dense_width=192", f"--dataset={python_text}", "--n_layer=3",
               "--n_head=16", "--block_size=128", "--batch_size=16", "--gradient_accumulation_steps=1", "--flops=2e13")
    lines = told.stdout.splitlines()[1:7]
    assert told.returncode == 0 and {line.split()[0] for line in lines if " width " in line} == set(NAMED), told


def test_named_structures_that_are_left_out_are_told(desk):
    told = desk("--trials=1", "--widths=64")
    assert told.returncode == 0 and "monarch is left out: " in told.stdout and "dense is left out" not in told.stdout


def no_optuna():
    for name in [name for name in sys.modules if name == "search_study" or name.partition(".")[0] == "optuna"]:
        del sys.modules[name]
    sys.modules["optuna"] = None


def test_commands_refuse(run, tmp_path):
    for words, named in ((["sweep"], "sweep"), ([], "run or report"), (["report", f"--out={tmp_path}/x"], "search first"),
                         (["report", "--top=-1"], "top"), (["report", "--times=0"], "times"), (["report", "--seeds=1.5"], "seeds")):
        told = run("experiments.search", *words)
        assert told.returncode == 1 and told.stderr.startswith("error: ") and named in told.stderr
        assert told.stderr.count("\n") == 1
    assert "--trials=40" in run("experiments.search", "--help").stdout
    told = run("experiments.search", "run", before=no_optuna)
    assert told.returncode == 1 and "requirements-search.txt" in told.stderr and told.stderr.count("\n") == 1


# ---- Report ---------------------------------------------------------------------------------------------------------

def test_report(desk, run):
    assert desk("--trials=14", "--sampler_seed=2", "--first_rung=3").returncode == 0
    results, places = desk.folder / "results", [f"--out={desk.folder}/out", f"--results={desk.folder}/results"]
    told = run("experiments.search", "report", *places)
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
        found = [float(row[k]) for k in ("omega", "psi", "nu")]
        assert found == pytest.approx([theta.omega, theta.psi, theta.nu], abs=1e-5)
        assert float(row["share_of_budget"]) in ((1,) if row["state"] == "complete" else (0.375, 0.75))
    parts = text.split("## Pruned")
    assert all((r["structure"] in parts[0]) == (r["state"] == "complete") for r in rows)
    assert "PED-ANOVA" in text and (results / "taxonomy.png").read_bytes().startswith(b"\x89PNG")
    svg = (results / "taxonomy.svg").read_text()
    assert all(word in svg for word in ("ω, parameter sharing", "ψ, rank", "ν, compute intensity", ">dense<", "full budget",
                                        "38% of"))
    again = run("experiments.search", "report", *places)
    assert again.stdout == told.stdout and (results / "taxonomy.svg").read_text() == svg


def test_from_search_to_configs(run, python_text, tmp_path):
    """With train.py itself: two tiny trials; the best is a config that train.py runs, the others a plan for scaling.py."""
    told = run("experiments.search", "run", "config/cpu.py", f"--out={tmp_path}/out", f"--dataset={python_text}", "--block_size=16",
               "--batch_size=4", "--n_layer=1", "--dense_width=64", "--widths=64,96,100,104", "--flops=4e8", "--trials=2",
               "--eval_iters=2", "--evals=4", "--sample_tokens=0", "--warmup_iters=2", "--tolerance=0.2", "--pruner=none")
    assert told.returncode == 0, told.stdout + told.stderr
    for log in (tmp_path / "out").rglob("log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines[-1]["flops"] == pytest.approx(4e8, rel=0.2) and sum(p["type"] == "eval" for p in lines) == 5
    told = run("experiments.search", "report", f"--out={tmp_path}/out", f"--results={tmp_path}/results", "--times=2")
    assert told.returncode == 0 and "share of dense's compute" in told.stdout, told.stderr
    best = run("train.py", tmp_path / "results" / "best.py", f"--out_dir={tmp_path}/again")
    assert best.returncode == 0, best.stderr
    with open(tmp_path / "results" / "trials.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    once, again = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                   for folder in (tmp_path / "out" / rows[0]["run"], tmp_path / "again"))
    assert once[-1]["val_loss"] == again[-1]["val_loss"] == pytest.approx(float(rows[0]["loss"]), abs=1e-5)
    assert all(once[0]["config"][k] == v for k, v in again[0]["config"].items() if k not in ("out_dir", "init_from"))
    structs = {r["name"]: json.loads((tmp_path / "out" / r["run"] / "settings.json").read_text())["settings"]["struct"]
               for r in rows}
    assert structs == {"dense": "dense", "tt": "einsum"}    # the same dense as follow.py's
    plan = run("experiments.scaling", "sweep", tmp_path / "results" / "follow.py", "--dry_run=True", f"--runs={tmp_path}/follow")
    lines = plan.stdout.splitlines()
    assert plan.returncode == 0 and len(lines) == 5, plan.stderr
    assert sum(line.startswith("dense-d64-") for line in lines) == 2
    assert sum(f"-d{r['width']}-" in line for line in lines for r in rows if r["name"] != "dense") == 2
    assert all(float(line.split()[3]) == pytest.approx(8e8, rel=0.06) for line in lines[:4])


def test_share_of_dense():
    curve = search_report.DenseCurve([1e12, 4e12, 2e12, 8e12], [3.0, 2.0, 2.5, 2.1], "by hand")
    assert curve.share(1e12, 2.5) == "0.5" and curve.share(4e12, 2.0) == "1" and curve.share(1e12, 1.9) == "< 0.25"
    assert curve.share(1e12, 3.1) == "—" and curve.share(1e12, math.nan) == "—"
    middle = math.exp(math.log(1e12) + math.log(3.0 / 2.75) / math.log(3.0 / 2.5) * math.log(2))
    assert float(curve.share(1e12, 2.75)) == pytest.approx(1e12 / middle, rel=0.01)


def test_a_dense_curve_leaves_out_what_is_not_finite(tmp_path):
    points = [dict(type="eval", iter=i, flops=1e12 * i, val_loss=loss) for i, loss in enumerate((4.0, 3.0, None, 2.5))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    curve = search_report.dense_curve(None, [dict(name="dense", run=".", trial=0)], str(tmp_path), {})
    assert list(curve.flops) == [1e12, 3e12] and list(curve.losses) == [3.0, 2.5]


def test_dense_curves_from_elsewhere(tmp_path):
    fit = dict(axes=dict(flops=dict(dense=dict(x=[1e12, 2e12], loss=[3.0, 2.5]))), measure=dict(block_size=64, eval_iters=200))
    (tmp_path / "fit.json").write_text(json.dumps(fit))
    curve = search_report.dense_curve(str(tmp_path / "fit.json"), [], "", dict(block_size=64))     # eval_iters as train.py has it
    assert curve.share(1e12, 2.5) == "0.5" and "fit.json" in curve.source
    for settings, key in ((dict(block_size=64, eval_iters=20), "eval_iters"), (dict(eval_iters=200), "block_size")):
        with pytest.raises(ValueError, match=f"do not measure the same loss: {key} is"):
            search_report.dense_curve(str(tmp_path / "fit.json"), [], "", settings)
    (tmp_path / "other.json").write_text("{}")
    for place in ("other.json", "nowhere"):
        with pytest.raises(ValueError, match="no dense curve"):
            search_report.dense_curve(str(tmp_path / place), [], "", {})
