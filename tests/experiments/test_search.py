"""experiments.search as a program: searches with a stand-in for train.py, and the report on them."""
import contextlib
import csv
import json
import math
import os
import re
import runpy
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

optuna = pytest.importorskip("optuna")

from experiments.scaling.fit import TAXONOMY
from experiments.search import report, study
from experiments.search.space import Space
from structured import STRUCTURES, Theta

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
NAMED = {name: theta for name, theta in STRUCTURES.items() if theta is not None}
SIGNALS = (signal.SIGINT, signal.SIGTERM)

# A run whose loss follows from its θ and rate, and which goes on from what its log says. Like train.py, it
# locks its folder. Beside it, the file 'launched' has a line for each run that got its lock, and while there
# is a file 'hold', no run goes beyond so many evaluations.
STAND_IN = '''
import fcntl, json, os, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
out, its, every = flags["out_dir"], int(flags["max_iters"]), int(flags["eval_interval"])
rate, seed = float(flags["learning_rate"]), flags["seed"]
here, log = os.path.dirname(os.path.abspath(__file__)), os.path.join(out, "log.jsonl")
lock = open(os.path.join(out, "lock"), "w")
try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit("error: another run writes into " + out + " (process 1): wait for its end")
lines = [json.loads(line) for line in open(log)] if os.path.exists(log) else []
first = max((p["iter"] // every * every + every for p in lines if p["type"] == "eval"), default=0)
with open(os.path.join(here, "launched"), "a") as f:
    f.write(json.dumps(dict(flags, first=first, pid=os.getpid(), parent=os.getppid())) + "\\n")
launched = len(open(os.path.join(here, "launched")).readlines())
def held(evaluations):
    try:
        return evaluations >= int(open(os.path.join(here, "hold")).read())
    except FileNotFoundError:
        return False
theta = "1,0,0,1,0,0,0" if flags["struct"] == "dense" else flags["theta"].strip("(),")
a, b, g, d, e, f, r = map(float, theta.split(","))
flops_exponent = 2 + r - max(min(a, e), min(b, d))
omega = flops_exponent - (2 + r - min(b + e, a + d))
psi = min(1, 2 + r - a - e, 2 + r - b - d)
if seed == "13" and omega > 0:
    sys.exit("seed 13 does not share")
loss = 1.5 + 0.5 * omega + 0.5 * (1 - psi) + 0.1 * (flops_exponent - 1) + 10 * abs(rate - 2e-3)
with open(log, "a") as f:
    f.write(json.dumps(dict(type="run", config=flags, params=int(flags["n_embd"]))) + "\\n")
    for i in range(first, its + 1, every):
        bad = seed == "14" and psi < 1 and i > its / 2
        val_loss = None if bad else loss + 2 * (1 - i / its)
        f.write(json.dumps(dict(type="eval", iter=i, flops=1e6 * i, val_loss=val_loss)) + "\\n")
        f.flush()
        while held(i // every):
            time.sleep(0.01)
'''
LATER_IS_WORSE = STAND_IN.replace("loss = ", "loss = launched + ")
FLAGS = ["--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=1", "--n_layer=1", "--n_head=4",
         "--decay_lr=False", "--dense_width=64", "--flops=2e9",
         "--widths=" + ",".join(map(str, range(32, 160, 4)))]
RANDOM = ["--named=False", "--sampler=random", "--sampler_seed=0"]


class Searcher:
    """Searches with the stand-in in folder/out."""
    def __init__(self, folder, run, capsys, dataset):
        self.folder, self.out, self.hold = folder, folder / "out", folder / "hold"
        self.run, self.capsys = run, capsys
        self.flags = [*FLAGS, f"--out={self.out}", f"--program={folder}/stand_in.py", f"--dataset={dataset}"]
        self.write(STAND_IN)

    def write(self, program):
        (self.folder / "stand_in.py").write_text(program)

    def __call__(self, *flags, command="run"):
        """The command in this process: it spares the imports."""
        arguments, handlers = sys.argv, {number: signal.getsignal(number) for number in SIGNALS}
        shared = self.flags if command == "run" else self.flags[-3:-2]
        sys.argv = ["search", command, *shared, *map(str, flags)]
        try:
            runpy.run_module("experiments.search", run_name="__main__")
        except SystemExit as end:
            return SimpleNamespace(returncode=end.code, **self.capsys.readouterr()._asdict())
        finally:
            sys.argv = arguments
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def in_process(self, *flags):
        """A list that the result of `run` in a process of its own is in at the end of the context."""
        done = []
        thread = threading.Thread(target=lambda: done.append(
            self.run("experiments.search", "run", *self.flags, *flags)))
        thread.start()
        try:
            yield done
        except BaseException:
            self.hold.unlink(missing_ok=True)
            raise
        finally:
            thread.join()

    def study(self):
        return study.open_study(None, "search", str(self.out))

    def trials(self):
        return study.counted(self.study())

    def states(self):
        return Counter(t.state.name for t in self.trials())

    def launched(self):
        file = self.folder / "launched"
        return [json.loads(line) for line in file.read_text().splitlines(True)
                if line.endswith("\n")] if file.exists() else []

    def points(self):
        """The folders of the points that were launched."""
        return [Path(flags["out_dir"]).parent.name for flags in self.launched()]

    def evaluations(self):
        """How many each run has logged; the first is before training."""
        return sorted(log.read_text().count('"eval"') for log in self.out.rglob("log.jsonl"))

    def end_heartbeats(self):
        """As if the last sign of life of all running trials was long ago."""
        with contextlib.closing(sqlite3.connect(self.out / "study.db")) as database, database:
            database.execute("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'")


@pytest.fixture
def search(run, capsys, python_text, tmp_path):
    """A Searcher, in memory if there is a folder there: SQLite waits for the disk at every commit."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Searcher(Path(folder), run, capsys, python_text)


def wait_until(condition):
    for _ in range(30_000):     # minutes, for what never comes
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def assert_refused(done, word):
    assert done.returncode == 1 and done.err.startswith("error: ") and word in done.err, done
    assert done.err.count("\n") == 1, done.err


# ---- Which trials there are --------------------------------------------------------------------------------

def test_named_structures_come_first_and_others_are_pruned_at_the_rungs(search):
    done = search("--trials=14", "--sampler_seed=1")
    assert done.returncode == 0, done
    trials, launched = search.trials(), search.launched()
    assert len(trials) == 14 == len(launched) == len(set(search.points()))
    assert [t.user_attrs.get("named") for t in trials[:7]] == [*NAMED, None]
    assert {t.state.name for t in trials[:6]} == {"COMPLETE"}
    assert all("completed_rung_0" in t.system_attrs for t in trials[:6])    # the pruner compares with them
    pruned = [t for t in trials if t.state.name == "PRUNED"]
    assert len(pruned) >= 3 and {t.last_step for t in pruned} <= {2, 4} and not search.states()["FAIL"]
    for trial in trials:
        log = search.out / trial.user_attrs["run"]["folder"] / "log.jsonl"
        points = map(json.loads, log.read_text().splitlines())
        losses = [p["val_loss"] for p in points if p["type"] == "eval"][1:]
        reported = [loss for _, loss in sorted(trial.intermediate_values.items())]
        assert reported == losses[:len(reported)] and trial.value == reported[-1]
        assert len(reported) == 8 or trial in pruned
        assert abs(trial.user_attrs["run"]["flops"] / 2e9 - 1) <= 0.05
    again = search("--trials=14")
    assert again.returncode == 0 and len(search.launched()) == 14
    assert again.out == f"{14 - len(pruned)} trials to their end, {len(pruned)} pruned, 0 failed; " + \
        done.out.splitlines()[-1].partition("; ")[2] + "\n"


def test_a_trial_that_is_behind_is_stopped_and_stays_pruned_after_a_kill(search):
    """The second run is behind at its second evaluation. When it is asked to end, it keeps the study of that
    moment; a search that goes on from there prunes the trial too, and launches nothing."""
    search.write("import shutil, signal\n" + LATER_IS_WORSE.replace("def held", '''
def at_end(*_):
    shutil.copy(os.path.join(here, "out", "study.db"), here)
    sys.exit()
signal.signal(signal.SIGTERM, at_end)
def held''').replace("held(i // every)", "launched == 2 and i == 2 * every"))
    assert search("--trials=2", *RANDOM).returncode == 0
    assert search.states() == {"COMPLETE": 1, "PRUNED": 1} and search.evaluations() == [3, 9]
    shutil.move(search.folder / "study.db", search.out / "study.db")
    assert search.states() == {"COMPLETE": 1, "RUNNING": 1}
    search.end_heartbeats()
    assert search("--trials=2", *RANDOM).returncode == 0
    assert search.states() == {"COMPLETE": 1, "PRUNED": 1} and len(search.launched()) == 2


def test_the_pruner_decides_on_evaluations_that_were_logged_before(search):
    """The runs of a study that is lost have gone on to their end; the second was behind at its second
    evaluation."""
    search.write(LATER_IS_WORSE)
    assert search("--trials=2", *RANDOM, "--pruner=none").returncode == 0
    (search.out / "study.db").unlink()
    assert search("--trials=2", *RANDOM).returncode == 0
    first, second = search.trials()
    assert (first.state.name, second.state.name, second.last_step) == ("COMPLETE", "PRUNED", 2)
    assert len(search.launched()) == 2


def test_runs_of_a_lost_study_are_taken_over_if_they_measure_the_same(search):
    """Evaluations in between do not count; runs of another request are not looked at."""
    flags = ("--trials=1", "--pruner=none")
    assert search(*flags).returncode == 0
    losses, every = search.trials()[0].intermediate_values, int(search.launched()[0]["eval_interval"])
    log, = search.out.rglob("log.jsonl")
    with open(log, "a") as f:
        f.writelines(json.dumps(dict(type="eval", iter=i, val_loss=0.1)) + "\n" for i in (1, every + 1))
    (search.out / "study.db").unlink()
    assert search(*flags).returncode == 0
    assert search.trials()[0].intermediate_values == losses and len(search.launched()) == 1
    (search.out / "study.db").unlink()
    assert search(*flags, "--flops=3e9").returncode == 0
    assert [flags["first"] for flags in search.launched()] == [0, 0]
    assert sorted(search.trials()[0].intermediate_values) == list(range(1, 9))


def test_experts_are_searched_if_asked_for(search):
    done = search("--trials=8", "--experts=0,4", "--top_ks=1,2", "--sampler=random", "--sampler_seed=3",
                  "--pruner=none", "--named=False", "--tolerance=0.3")
    assert done.returncode == 0, done
    found = {(flags.get("num_experts", "0"), flags.get("top_k", "0")) for flags in search.launched()}
    assert ("0", "0") in found and found & {("4", "1"), ("4", "2")}
    assert found <= {("0", "0"), ("4", "1"), ("4", "2")}


def test_the_best_of_several_rates_counts(search):
    """The first rate diverges, the third is the best one; all belong to one trial."""
    search.write(STAND_IN.replace("bad = ", "bad = rate == 0.1 and i or "))
    done = search("--trials=2", "--learning_rates=0.1,1e-3,1.9e-3,4e-3", "--pruner=none")
    assert done.returncode == 0 and search.states() == {"COMPLETE": 2} and len(search.launched()) == 8, done
    for trial in search.trials():
        run = trial.user_attrs["run"]
        assert run["settings"]["learning_rate"] == 1.9e-3
        log = (search.out / run["folder"] / "log.jsonl").read_text()
        assert trial.value == json.loads(log.splitlines()[-1])["val_loss"]


def test_a_pruned_trial_is_described_by_its_best_rate(search):
    search.write(STAND_IN.replace("loss = ", "loss = (launched - 1) // 3 + "))
    assert search("--trials=2", "--learning_rates=1e-3,1.9e-3,4e-3", *RANDOM).returncode == 0
    assert search.states() == {"COMPLETE": 1, "PRUNED": 1}
    assert [t.user_attrs["run"]["settings"]["learning_rate"] for t in search.trials()] == [1.9e-3, 1.9e-3]


# ---- Several processes, and kills --------------------------------------------------------------------------

def test_two_processes_share_a_study(search):
    """They begin at once, and each launches a run before the first one ends; every point is trained once.
    What Optuna calls experimental is not the user's concern."""
    search.hold.write_text("1")
    flags = ("--trials=6", "--widths=32,64,96,128", "--tolerance=0.3", "--sampler=random")
    with (search.in_process(*flags, "--sampler_seed=1") as one,
          search.in_process(*flags, "--sampler_seed=2") as other):
        wait_until(lambda: len({flags["parent"] for flags in search.launched()}) == 2)
        search.hold.unlink()
    assert [(done[0].returncode, done[0].stderr) for done in (one, other)] == [(0, "")] * 2, (one, other)
    assert search.states()["COMPLETE"] + search.states()["PRUNED"] == 6
    assert len(search.launched()) == 6 == len(set(search.points()))
    queued = Counter(t.user_attrs["named"] for t in study.latest_trials(search.study())
                     if "named" in t.user_attrs and "surplus" not in t.user_attrs)
    assert queued == Counter(NAMED.keys())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_search_goes_on_from_its_checkpoints(search, number):
    flags = ("--trials=4", "--pruner=none", "--jobs=2")
    search.hold.write_text("3")
    with search.in_process(*flags) as done:
        wait_until(lambda: search.evaluations() == [4, 4])
        killed, points = search.launched(), {t.user_attrs["model"]["point"] for t in search.trials()}
        os.kill(killed[0]["parent"], number)
        for job in killed if number == signal.SIGKILL else ():
            os.kill(job["pid"], number)
    search.hold.unlink()
    assert done[0].returncode == (-9 if number == signal.SIGKILL else 130)
    assert "Traceback" not in done[0].stderr
    assert search.states() == ({"RUNNING": 2} if number == signal.SIGKILL else {"WAITING": 2})
    search.end_heartbeats()
    again = search(*flags)
    assert again.returncode == 0 and again.out.count("goes on where it was left") == 2, again
    trials, launched = search.trials(), search.launched()
    assert search.states() == {"COMPLETE": 4} and len(launched) == 6 and len(set(search.points())) == 4
    resumed = [job for job in launched[2:] if job["out_dir"] in {k["out_dir"] for k in killed}]
    assert len(resumed) == 2 and all(job["first"] > 0 for job in resumed)
    assert {t.user_attrs["model"]["point"] for t in trials} >= points
    assert {t.user_attrs["named"] for t in trials} == set(list(NAMED)[:4])
    assert all(sorted(t.intermediate_values) == list(range(1, 9)) for t in trials)


def test_a_run_that_outlives_its_search_is_not_trained_twice(search):
    """The search alone is killed. The next one finds the folder locked, and takes what that run comes to."""
    search.hold.write_text("3")
    with search.in_process("--trials=1", "--pruner=none"):
        wait_until(lambda: search.evaluations() == [4])
        job, = search.launched()
        os.kill(job["parent"], signal.SIGKILL)
        wait_until(lambda: search.states() == {"RUNNING": 1})
        search.end_heartbeats()
        with search.in_process("--trials=1", "--pruner=none") as done:
            wait_until(lambda: len(search.trials()[0].intermediate_values) == 3
                       and search.trials()[0].number > 0)
            search.hold.unlink()
    assert done[0].returncode == 0 and search.states() == {"COMPLETE": 1}, done
    assert len(search.launched()) == 1 and search.evaluations() == [9]


def test_a_trial_that_another_process_has_ended_is_no_error(search):
    """As after a sleep for longer than `expiry`."""
    search.hold.write_text("1")
    with search.in_process("--trials=2", "--pruner=none") as done:
        wait_until(lambda: search.evaluations() == [2])
        search.study().tell(search.trials()[0].number, 1.0)
        search.hold.unlink()
    assert done[0].returncode == 0 and "another process has ended a trial" in done[0].stdout, done
    assert search.states() == {"COMPLETE": 2} and search.trials()[0].value == 1.0
    assert len(search.launched()) == 2


def test_nobody_waits_for_a_trial_whose_process_died_before_it_had_a_point(search):
    assert search("--trials=1").returncode == 0
    search.study().ask()
    assert search("--trials=2").returncode == 0 and search.states() == {"COMPLETE": 2}


# ---- Failures ----------------------------------------------------------------------------------------------

def test_failures_are_reported_and_the_search_goes_on(search):
    done = search("--trials=9", "--seed=13", "--pruner=none", "--sampler_seed=0")
    failed = [t for t in search.trials() if t.state.name == "FAIL"]
    assert done.returncode == 1 and len(search.trials()) == 9 and search.states()["COMPLETE"] >= 3
    assert {"kronecker", "tt"} <= {t.user_attrs.get("named") for t in failed}
    assert {t.user_attrs["why"] for t in failed} == {"ended with status 1: seed 13 does not share"}
    assert done.out.count("FAILED, ended with status 1: seed 13 does not share") == len(failed)


def test_a_loss_that_is_not_finite_is_a_failure_that_is_not_tried_again(search):
    flags = ("--trials=6", "--seed=14", "--pruner=none")
    assert search(*flags).returncode == 1
    failed, = [t for t in search.trials() if t.state.name == "FAIL"]
    assert failed.user_attrs["named"] == "low_rank" and "not finite" in failed.user_attrs["why"]
    assert search(*flags).returncode == 0 and search.states() == {"COMPLETE": 5, "FAIL": 1}
    assert len(search.launched()) == 6


def test_nothing_but_failures_ends_the_search_and_the_next_one_tries_them_again(search):
    """A trial that is tried again counts once, and a named structure keeps its name."""
    search.write("import sys; sys.exit('no room')")
    done = search("--trials=6", "--max_failures=3")
    assert_refused(done, "3 trials in a row have failed, the last: ended with status 1: no room")
    assert search.states() == {"FAIL": 3}
    search.write(STAND_IN)
    done = search("--trials=6")
    assert done.returncode == 0 and "3 trials that have failed are tried again" in done.out, done
    assert search.states() == {"COMPLETE": 6}
    assert {t.user_attrs["named"] for t in search.trials()} == set(NAMED)
    assert "tried again" not in search("--trials=6").out and len(search.launched()) == 6


def test_a_trial_that_cannot_start_fails_and_the_search_goes_on(search, monkeypatch):
    runs = Space.runs

    def some(space, point, root):
        if os.path.basename(root) == point.name and point.theta.omega > 0:
            raise ValueError("no such model")
        return runs(space, point, root)
    monkeypatch.setattr(Space, "runs", some)
    done = search("--trials=6")
    assert done.returncode == 1 and search.states() == {"COMPLETE": 4, "FAIL": 2}, done
    assert done.out.count("FAILED, no such model") == 2 and len(search.launched()) == 4


# ---- What a user asks for ----------------------------------------------------------------------------------

def test_a_database_url_holds_the_study_too(search):
    url = f"--storage=sqlite:///{search.folder}/other.db"
    assert search("--trials=2", url).returncode == 0 and len(search.launched()) == 2
    assert not (search.out / "study.db").exists()
    assert search("--trials=3", url).returncode == 0 and len(search.launched()) == 3
    with sqlite3.connect(search.folder / "other.db") as database:
        database.execute("DROP TABLE study_user_attributes")
        database.execute("CREATE VIEW study_user_attributes AS SELECT 1 AS x")
    assert_refused(search("--trials=4", url), "during the commit")  # as Optuna says


@pytest.mark.parametrize("contents", [None, b""], ids=["missing", "empty"])
@pytest.mark.parametrize("address", ["sqlite:///{}", "sqlite+pysqlite:///{}?timeout=5"])
def test_a_report_makes_no_database(address, contents, search):
    database = search.folder / "no study.db"
    if contents is not None:
        database.write_bytes(contents)
    sentence = "there is no study 'search'" if contents is None else "no such table"
    assert_refused(search("--storage=" + address.format(database), command="report"), sentence)
    assert (database.read_bytes() if database.exists() else None) == contents
    assert not search.out.exists()


def test_a_study_goes_on_with_the_same_request_only(search):
    assert search("--trials=1").returncode == 0
    for flag, words in (("--flops=3e9", "flops = 2000000000.0, not 3"), ("--seed=5", "seed = 1337, not 5"),
                        ("--bias=True", "bias = None, not True"),
                        ("--learning_rates=1e-3", "learning_rates")):
        assert_refused(search("--trials=2", flag), words)
    assert len(search.launched()) == 1


@pytest.mark.parametrize("flags, word", [
    (["--jobs=0"], "jobs"), (["--flops=1e9"], "flops"), (["--sampler=cmaes"], "cmaes"),
    (["--pruner=none!"], "none!"),
    (["--reduction=1"], "reduction"), (["--widths=33"], "33"), (["--experts=-1"], "experts"),
    (["--n_embd=64"], "n_embd"), (["--dataset=nowhere"], "nowhere"), (["--trails=3"], "trials"),
    (["--n_lyer=3"], "n_lyer"), (["config/nowhere.py"], "nowhere"), (["--top_ks=1.5"], "top_ks"),
    (["--storage=mongo://x"], "mongo"), (["--learning_rates="], "learning_rates"),
    (["--experts=0,1"], "experts"),
    (["--dropout=1.5"], "dropout"), (["--ffn_experts=4"], "ffn_experts"), (["config/moe.py"], "ffn_experts"),
    (["config/btt.py"], "struct"), (["--head_aligned=True"], "head_aligned"), (["--gpus=100"], "gpus"),
    (["--batch_size=0"], "batch_size"), (["--n_head=0"], "n_head"), (["--n_layer=0"], "n_layer"),
    (["--first_rung=8", "--evals=8"], "first_rung"),
    (["--experts=4", "--top_ks=8"], "top_ks"), (["--dense_width=66"], "dense_width")])
def test_a_bad_flag_is_refused_before_there_is_a_study(search, flags, word):
    assert_refused(search(*flags), word)
    assert not search.launched() and not list(search.folder.rglob("*.db"))


def test_a_password_stays_out_of_the_message(search):
    done = search("--storage=nosuch://me:secret@host/db")
    assert_refused(done, "nosuch://me:***@host/db")
    assert "secret" not in done.err


@pytest.mark.parametrize("arguments, word", [
    (["sweep"], "sweep"), ([""], "run or report"), (["report"], "search first"),
    (["report", "--top=-1"], "top"), (["report", "--times=0"], "times"),
    (["report", "--seeds=1.5"], "seeds")])
def test_a_bad_command_is_refused(search, arguments, word):
    assert_refused(search(*arguments[1:], command=arguments[0]), word)


def test_help_lists_the_keys(search):
    done = search(command="--help")
    assert done.returncode == 0 and "--trials=40" in done.out
    assert "python -m experiments.search run" in done.out


def no_optuna():
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna" or ".search" in name]:
        del sys.modules[name]
    sys.modules["optuna"] = None


def test_without_optuna_it_says_how_to_install_it(run):
    done = run("experiments.search", "run", before=no_optuna)
    assert done.returncode == 1 and "requirements-search.txt" in done.stderr and done.stderr.count("\n") == 1


def test_a_dry_run_describes_the_search(search):
    """The named structures have a width at larger ones of dense too."""
    done = search("--dry_run=True", "--dense_width=192", "--widths=None", "--n_layer=3", "--n_head=16",
                  "--block_size=128", "--batch_size=16", "--flops=2e13")
    assert done.returncode == 0, done
    assert {line.split()[0] for line in done.out.splitlines() if " iterations " in line} == set(NAMED)
    assert not search.out.exists()


def test_named_structures_that_are_left_out_are_listed(search):
    done = search("--trials=1", "--widths=64")
    assert done.returncode == 0 and "monarch is left out: " in done.out
    assert "dense is left out" not in done.out


# ---- Report ------------------------------------------------------------------------------------------------

def test_a_report_has_a_table_a_csv_file_and_a_figure(search):
    assert search("--trials=14", "--sampler_seed=2", "--first_rung=3").returncode == 0
    done, results, trials = search(command="report"), search.out / "report", search.trials()
    assert done.returncode == 0, done
    text = (results / "table.md").read_text()
    assert text.strip() in done.out.strip()
    with open(results / "trials.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    complete = [r for r in rows if r["state"] == "complete"]
    assert len(rows) == 14 and len(complete) == search.states()["COMPLETE"]
    assert [float(r["loss"]) for r in complete] == sorted(float(r["loss"]) for r in complete)
    by_number = {str(t.number): t for t in trials}
    for row in rows:
        trial = by_number[row["trial"]]
        theta = Theta(*trial.user_attrs["model"]["theta"])
        taxonomy = [float(row[k]) for k in ("omega", "psi", "nu")]
        assert taxonomy == pytest.approx([theta.omega, theta.psi, theta.nu], abs=1e-5)
        assert float(row["loss"]) == pytest.approx(trial.value, abs=1e-5)
        assert float(row["share_of_budget"]) in ((1,) if row["state"] == "complete" else (0.375, 0.75))
    parts = text.split("## Pruned")
    assert all((r["structure"] in parts[0]) == (r["state"] == "complete") for r in rows)
    assert "PED-ANOVA" in text and (results / "taxonomy.png").read_bytes().startswith(b"\x89PNG")
    svg = (results / "taxonomy.svg").read_text()
    assert all(word in svg for word in (*TAXONOMY.values(), ">dense<", "full budget", "38% of"))
    again = search(command="report")
    assert again.out == done.out and (results / "taxonomy.svg").read_text() == svg


def test_the_best_become_a_config_of_train_and_a_plan_of_scaling(run, search, python_text, tmp_path):
    """With train.py itself, and two tiny trials."""
    done = search("config/cpu.py", "--program=train.py", "--batch_size=4", "--widths=64,96,100,104",
                  "--flops=4e8", "--trials=2", "--eval_iters=2", "--evals=4", "--sample_tokens=0",
                  "--warmup_iters=2",
                  "--tolerance=0.2", "--pruner=none", "--jobs=2")
    assert done.returncode == 0, done
    for log in search.out.rglob("log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines[-1]["flops"] == pytest.approx(4e8, rel=0.2)
        assert sum(p["type"] == "eval" for p in lines) == 5
    done = search(f"--results={tmp_path}/results", "--times=2", command="report")
    assert done.returncode == 0 and "share of dense's compute" in done.out, done
    best = run("train.py", tmp_path / "results" / "best.py", f"--out_dir={tmp_path}/again")
    assert best.returncode == 0, best.stderr
    with open(tmp_path / "results" / "trials.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    once, again = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                   for folder in (search.out / rows[0]["run"], tmp_path / "again"))
    assert once[-1]["val_loss"] == again[-1]["val_loss"] == pytest.approx(float(rows[0]["loss"]), abs=1e-5)
    assert all(once[0]["config"][k] == v for k, v in again[0]["config"].items()
               if k not in ("out_dir", "init_from"))
    settings = {r["name"]: json.loads((search.out / r["run"] / "settings.json").read_text())["settings"]
                for r in rows}
    assert {name: s["struct"] for name, s in settings.items()} == {"dense": "dense", "tt": "einsum"}
    follow = (tmp_path / "results" / "follow.py").read_text()
    command = re.search("python -m experiments.scaling sweep .*", follow)[0]
    plan = run("experiments.scaling", *command.split()[3:], "--dry_run=True")
    lines = plan.stdout.splitlines()
    assert plan.returncode == 0 and len(lines) == 5, plan.stderr
    assert sum(line.startswith("dense-d64-") for line in lines) == 2
    assert sum(f"-d{r['width']}-" in line for line in lines for r in rows if r["name"] != "dense") == 2
    assert all(float(line.split()[3]) == pytest.approx(8e8, rel=0.06) for line in lines[:4])


@pytest.mark.parametrize("named", ["btt_moe", "monarch"])
def test_the_plan_holds_btt_moe_wherever_it_came(named):
    """It is Monarch with experts where the search is over mixtures alone; Monarch without is not it."""
    def row(trial, structure, name, named=""):
        return dict(trial=trial, state="complete", structure=structure, name=name, named=named)
    rows = [row(0, "the best", "tt"), row(1, "monarch", "monarch", "monarch"),
            row(2, "with experts", "monarch, 8 experts, top 2", named)]
    settings = {i: dict(struct=str(i), n_embd=8, learning_rate=1e-3) for i in range(3)}
    request = dict(learning_rates=[1e-3], dense_width=8, flops=1e9, evals=4, settings={})
    plan: dict = {}
    exec(report.plan_text(rows, settings, request, 1, (1,), 4.0), plan)
    assert list(plan["structures"]) == ["the best", "with experts", "dense"]


def test_the_share_of_dense_is_interpolated_and_bounded():
    curve = report.DenseCurve([1e12, 4e12, 2e12, 8e12], [3.0, 2.0, 2.5, 2.1], "by hand")
    assert curve.share(1e12, 2.5) == "0.5" and curve.share(4e12, 2.0) == "1"
    assert curve.share(1e12, 1.9) == "< 0.25"
    assert curve.share(1e12, 3.1) == "—" and curve.share(1e12, math.nan) == "—"
    between = curve.share(1e12, math.sqrt(3.0 * 2.5))    # halfway in logarithms
    assert float(between) == pytest.approx(1 / math.sqrt(2), rel=0.01)


@pytest.mark.parametrize("decays, flops, losses", [
    (False, [1e12, 3e12], [3.0, 2.5]), (True, [3e12], [2.5])])  # before the end a decaying rate is too high
def test_a_dense_curve_leaves_out_what_is_not_finite_or_no_end(tmp_path, decays, flops, losses):
    points = [dict(type="eval", iter=i, flops=1e12 * i, val_loss=loss)
              for i, loss in enumerate((4.0, 3.0, None, 2.5))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    curve = report.dense_curve(None, [dict(name="dense", run=".", trial=0)], str(tmp_path),
                               dict(decay_lr=decays))
    assert list(curve.flops) == flops and list(curve.losses) == losses
    assert curve.share(6e12, 2.5) == "2"


def test_a_dense_curve_from_elsewhere_must_measure_the_same_loss(tmp_path):
    fit = dict(axes=dict(flops=dict(dense=dict(x=[1e12, 2e12], loss=[3.0, 2.5]))),
               measure=dict(block_size=64, windows=200 * 12))
    (tmp_path / "fit.json").write_text(json.dumps(fit))
    # eval_iters and batch_size are those of train.py
    curve = report.dense_curve(str(tmp_path / "fit.json"), [], "", dict(block_size=64))
    assert curve.share(1e12, 2.5) == "0.5" and "fit.json" in curve.source
    for settings, key in ((dict(block_size=64, eval_iters=20), "windows"),
                          (dict(eval_iters=200), "block_size")):
        with pytest.raises(ValueError, match=f"do not measure the same loss: {key} is"):
            report.dense_curve(str(tmp_path / "fit.json"), [], "", settings)
    # the baseline of that fit, if it is a dense one
    for base, first in (("dense_normed", 2.8), ("btt", 3.0)):
        fit["axes"]["flops"]["dense_normed"] = dict(x=[1e12, 2e12], loss=[2.8, 2.5])
        (tmp_path / "fit.json").write_text(json.dumps(fit | dict(base=base)))
        curve = report.dense_curve(str(tmp_path / "fit.json"), [], "", dict(block_size=64))
        assert curve.losses[0] == first
    (tmp_path / "other.json").write_text("{}")
    for place in ("other.json", "nowhere"):
        with pytest.raises(ValueError, match="no dense curve"):
            report.dense_curve(str(tmp_path / place), [], "", {})
