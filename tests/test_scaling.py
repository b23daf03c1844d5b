"""scaling.py: sweeps with a stand-in for train.py, and fits of runs whose laws are known."""
import csv
import json
import math
import os
import runpy
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import launcher
import scaling_fit
from scaling_fit import Law, Points, Run
from space import Theta

ROOT = Path(__file__).resolve().parents[1]

# Writes the log of a run that took no time. 'jobs' beside it says what was launched, and how it is to behave.
STAND_IN = '''
import json, os, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
out, its, every = flags["out_dir"], int(flags["max_iters"]), int(flags["eval_interval"])
here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "jobs"), "a") as f:
    f.write(json.dumps(dict(flags, pid=os.getpid(), parent=os.getppid(), threads=os.environ["OMP_NUM_THREADS"])) + "\\n")
if flags["seed"] == "13" and not os.path.exists(os.path.join(here, "mended")):
    print("a long story")
    sys.exit("seed 13 brings bad luck")
time.sleep(100 * float(flags.get("dropout", 0)))
with open(os.path.join(out, "log.jsonl"), "w") as f:
    f.write(json.dumps(dict(type="run", config=flags)) + "\\n")
    for i in [*range(0, its, every), its] if flags["seed"] != "14" else [0]:
        f.write(json.dumps(dict(type="eval", iter=i, val_loss=4 - i / its)) + "\\n")
'''
PLAN = """
structures = {"dense": {}, "btt": dict(learning_rate=1e-3)}
n_embd = [32, 64]
head_size = 32
n_layer = 2
block_size = 16
batch_size = 4
gradient_accumulation_steps = 1
decay_lr = False
flops = {32: 1e8, 64: [SECOND]}
evals = 5
seed = 1
""".replace("[SECOND]", "3e8")


@pytest.fixture
def desk(run, python_text, tmp_path):
    """desk(plan, *flags): a sweep of a plan with the stand-in; desk.jobs(): what it was launched with."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def sweep(plan=PLAN, *flags):
        (tmp_path / "plan.py").write_text(plan)
        return run("scaling.py", "sweep", tmp_path / "plan.py", f"--runs={tmp_path}/runs", f"--program={tmp_path}/stand_in.py",
                   f"--dataset={python_text}", *(flags or ["--expiry=2"]))
    def jobs():
        return [json.loads(line) for line in (tmp_path / "jobs").read_text().splitlines()]
    sweep.jobs, sweep.runs, sweep.folder = jobs, tmp_path / "runs", tmp_path
    return sweep


# ---- Sweeps ---------------------------------------------------------------------------------------------------------

def test_a_plan_is_run_once(desk, python_text):
    told = desk()
    assert told.returncode == 0 and "4 of 4 finished, 0 failed" in told.stdout, told.stdout + told.stderr
    jobs = desk.jobs()
    grid = {(j["struct"], j["n_embd"], j["n_head"], j["learning_rate"]) for j in jobs}
    assert len(jobs) == 4 and grid == {("dense", "32", "1", "0.003"), ("dense", "64", "2", "0.003"),
                                       ("btt", "32", "1", "0.001"), ("btt", "64", "2", "0.001")}
    from model import GPT, GPTConfig
    for j in jobs:
        d = int(j["n_embd"])
        model = GPT(GPTConfig(block_size=16, vocab_size=96, n_layer=2, n_head=d // 32, n_embd=d, struct=j["struct"]))
        assert int(j["max_iters"]) == round({32: 1e8, 64: 3e8}[d] / (3 * model.flops_per_token() * 4 * 16))
        assert int(j["eval_interval"]) == math.ceil(int(j["max_iters"]) / 5)
        assert j["init_from"] == "auto" and j["dataset"] == str(python_text) and Path(j["out_dir"]).parent == desk.runs
    assert len({j["out_dir"] for j in jobs}) == 4
    assert not list(desk.runs.rglob("claim.*")) and not list(desk.runs.glob(".clock*"))
    told = desk()
    assert told.returncode == 0 and "4 finished before" in told.stdout and len(desk.jobs()) == 4


def test_budgets_at_a_constant_rate_are_one_run(desk):
    """A longer run holds the shorter ones; where the rate decays each is a run of its own. More budget goes on."""
    one = 'structures = {"dense": {}}\nn_embd = 32\nhead_size = 32\nn_layer = 1\nblock_size = 16\nbatch_size = 4\nevals = 2\n' \
          'gradient_accumulation_steps = 1\nflops = [1e8, 2e8, 4e8]\n'
    assert "1 runs" in desk(one + "decay_lr = False\n", "--dry_run=True").stdout
    told = desk(one, "--dry_run=True")
    assert "3 runs, 7" in told.stdout and told.stdout.count("to do") == 3 and not (desk.folder / "jobs").exists()
    assert desk(one + "decay_lr = False\n").returncode == 0
    first, = desk.jobs()
    assert desk((one + "decay_lr = False\n").replace("4e8", "8e8")).returncode == 0
    _, second = desk.jobs()
    assert second["out_dir"] == first["out_dir"] and second["init_from"] == "auto"
    assert int(second["max_iters"]) == pytest.approx(2 * int(first["max_iters"]), abs=1)


def test_failures_are_told_and_the_rest_goes_on(desk):
    plan = PLAN.replace("seed = 1\n", "seed = [1, 13, 14]\n").replace("n_embd = [32, 64]", "n_embd = 32")
    told = desk(plan)
    assert told.returncode == 1 and "2 of 6 finished, 4 failed" in told.stdout, told.stdout + told.stderr
    assert told.stdout.count("ended with status 1: seed 13 brings bad luck") == 2
    assert told.stdout.count("without reaching iteration") == 2 and len(desk.jobs()) == 6
    assert told.stdout.splitlines()[-1].startswith("failed: ") and told.stdout.splitlines()[-1].count("-s13-") == 2
    (desk.folder / "mended").touch()
    told = desk(plan)       # what failed is tried again, once
    assert "2 finished before" in told.stdout and "4 of 6 finished, 2 failed" in told.stdout and len(desk.jobs()) == 10


def test_jobs_share_the_machine(desk):
    told = desk(PLAN + "dropout = 0.005\n", "--jobs=4", "--expiry=1")
    assert told.returncode == 0 and len(desk.jobs()) == 4
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert {j["threads"] for j in desk.jobs()} <= {str(max(1, cores // 4)), os.environ.get("OMP_NUM_THREADS")}


def test_machines_share_a_plan(desk):
    """Three sweeps at once: every run is made, and made once."""
    plan = PLAN.replace("n_embd = [32, 64]", "n_embd = 32").replace("seed = 1\n", "seed = [1, 2, 3, 4, 5, 6]\ndropout = 0.002\n")
    told = []
    threads = [threading.Thread(target=lambda: told.append(desk(plan))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [t.returncode for t in told] == [0, 0, 0] and all("12 of 12 finished, 0 failed" in t.stdout for t in told)
    jobs = desk.jobs()
    assert len(jobs) == 12 and len({j["out_dir"] for j in jobs}) == 12 and len({j["parent"] for j in jobs}) > 1
    assert not list(desk.runs.rglob("claim.*"))


ONE = PLAN.replace("n_embd = [32, 64]", "n_embd = 32").replace(', "btt": dict(learning_rate=1e-3)', "")


def claimed(desk, claim, age, log_age=None):
    """The folder of ONE's run with somebody's claim in it, so many seconds old."""
    name = desk(ONE, "--dry_run=True").stdout.split()[0]
    (desk.runs / name).mkdir(parents=True)
    for file, text, old in (("claim.3", json.dumps(claim), age), ("log.jsonl", "", log_age)):
        if old is not None:
            (desk.runs / name / file).write_text(text)
            os.utime(desk.runs / name / file, (time.time() - old,) * 2)
    return desk.runs / name


ELSEWHERE = dict(here="another machine", processes=[1], token="")


@pytest.mark.parametrize("claim, age, log_age, taken", [
    (ELSEWHERE, 1000, 1000, True), (ELSEWHERE, 5, None, False), (ELSEWHERE, 1000, 5, False), ("half", 5, None, False)])
def test_claims_expire(desk, claim, age, log_age, taken):
    """One of a machine that gave no sign of life, by its claim or its log, for longer than `expiry`."""
    folder = claimed(desk, claim, age, log_age)
    told = desk(ONE, "--expiry=100", "--wait=False")
    assert told.returncode == 0 and (folder / "claim.3").exists() == (not taken)
    assert ("1 of 1 finished" in told.stdout) == taken and ("1 in the hands of others" in told.stdout) == (not taken)
    assert (desk.folder / "jobs").exists() == taken


def test_one_of_two_gets_a_claim(tmp_path, monkeypatch):
    """Both have looked when there was no claim yet: who creates the file first has the run."""
    first = launcher.Claim.take(str(tmp_path), time.time(), 100)
    with monkeypatch.context() as looked_before:
        looked_before.setattr(launcher, "newest_claim", lambda folder: 0)
        assert launcher.Claim.take(str(tmp_path), time.time(), 100) is None
    assert first.held() and os.listdir(tmp_path) == ["claim.1"]


def test_claims_of_dead_processes_end_at_once(desk):
    """Of this machine: nothing to wait for."""
    places = dict(here=socket.gethostname(), token="")
    if os.path.exists("/proc/self/ns/pid"):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        places["here"] += f" {boot} {os.readlink('/proc/self/ns/pid')}"
    dead = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitpid(dead, 0)
    folder = claimed(desk, places | dict(processes=[dead, os.getpid()]), 0)
    assert "hands of others" in desk(ONE, "--expiry=100", "--wait=False").stdout
    (folder / "claim.3").write_text(json.dumps(places | dict(processes=[dead])))
    assert "1 of 1 finished" in desk(ONE, "--expiry=100", "--wait=False").stdout


def launched(desk, plan, *flags):
    """(thread of a sweep, list that its result goes into), once it has launched a run."""
    told = []
    thread = threading.Thread(target=lambda: told.append(desk(plan, *flags)))
    thread.start()
    for _ in range(600):
        if (desk.folder / "jobs").exists() and (desk.folder / "jobs").read_text().endswith("\n"):
            break
        time.sleep(0.05)
    return thread, told


def gone(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except ProcessLookupError:
        return True


def test_a_lost_claim_ends_the_run(desk):
    """Who slept for too long finds the run in other hands, and leaves it to them."""
    thread, told = launched(desk, ONE + "dropout = 0.9\n", "--expiry=1", "--wait=False")
    job, = desk.jobs()
    (Path(job["out_dir"]) / "claim.2").write_text(json.dumps(ELSEWHERE))
    thread.join()
    assert "taken over" in told[0].stdout and "hands of others" in told[0].stdout and gone(job["pid"])
    assert (Path(job["out_dir"]) / "claim.2").exists()


def test_an_interrupted_sweep_leaves_nothing_behind(desk):
    thread, told = launched(desk, ONE + "dropout = 0.9\n", "--expiry=1")
    job, = desk.jobs()
    assert list(Path(job["out_dir"]).glob("claim.*"))
    os.kill(job["parent"], 15)
    thread.join()
    assert told[0].returncode == 130 and "goes on" in told[0].stderr and "Traceback" not in told[0].stderr
    assert gone(job["pid"]) and not list(desk.runs.rglob("claim.*"))


@pytest.mark.parametrize("plan, flags, word", [
    ("n_embd = 32", [], "structures"), ('structures = {"dense": 3}', [], "'dense'"), ('structures = {"dens": {}}', [], "dens"),
    (PLAN + "n_emdb = 3", [], "did you mean n_embd"), (PLAN + "n_layer = 'three'", [], "n_layer"), (PLAN + "1 / 0", [], "line 13"),
    (PLAN + "head_size = 48", [], "48"), (PLAN.replace("64: 3e8", "65: 3e8"), [], "n_embd = 64"), (PLAN + "flops = -1", [], "flops"),
    (PLAN.replace("[32, 64]", "[37]").replace("head_size = 32", "n_head = 1"), [], "37"), (PLAN, ["--jobs=0"], "jobs"),
    (PLAN, ["--expiry=-1"], "expiry"), (PLAN, ["--seedd=3"], "seed"), (PLAN, ["--dataset=nowhere"], "nowhere")])
def test_sweep_refuses(desk, plan, flags, word):
    told = desk(plan, *flags)
    assert told.returncode == 1 and told.stderr.startswith("error: ") and word in told.stderr, told.stderr
    assert told.stderr.count("\n") == 1 and not desk.runs.exists()


@pytest.mark.parametrize("words, named", [
    ([], "sweep"), (["sweeep"], "sweeep"), (["sweep"], "plan"), (["sweep", "nowhere.py"], "nowhere.py"),
    (["fit", "--runs=nowhere"], "nowhere"), (["fit", "--runs=tests"], "no run"), (["fit", "--level=2"], "level"),
    (["fit", "--samples=1"], "samples"), (["plot", "--out=nowhere"], "fit.json"), (["fit", "--n_embd=3"], "n_embd")])
def test_commands_refuse(run, words, named):
    told = run("scaling.py", *words)
    assert told.returncode == 1 and told.stderr.startswith("error: ") and named in told.stderr, told.stderr
    assert told.stderr.count("\n") == 1


def test_taxonomy_plan_differs_in_one_thing_at_a_time():
    thetas = [Theta(*theta) for theta in runpy.run_path(str(ROOT / "plans" / "taxonomy.py"))["_thetas"].values()]
    origin, seen = thetas[0], set()
    assert (origin.omega, origin.psi, origin.nu) == (0, 1, 0.5)
    for theta in thetas[1:]:
        differing = {n for n in ("omega", "psi", "nu") if abs(getattr(theta, n) - getattr(origin, n)) > 1e-9}
        assert len(differing) == 1
        seen |= differing
    assert seen == {"omega", "psi", "nu"}


def test_plans_can_be_run(run, python_text, tmp_path):
    """Every model of the plans can be made at its widths; the paper's own are too many to make here."""
    for plan, count in (("cpu", 24), ("cpu_rates", 26), ("cpu_seeds", 8), ("taxonomy", 36)):
        told = run("scaling.py", "sweep", f"plans/{plan}.py", "--dry_run=True", f"--dataset={python_text}", f"--runs={tmp_path}/r")
        assert told.returncode == 0 and told.stdout.count("to do") == count, told.stderr


# ---- Frontiers and laws ---------------------------------------------------------------------------------------------

def chinchilla(params, tokens, m=1.0):
    """Loss of a model of so many parameters after so many tokens, where each token counts m times."""
    return 1.0 + 60 * params ** -0.35 + 500 * (m * tokens) ** -0.4


EXPONENT = 0.35 * 0.4 / (0.35 + 0.4)     # of the compute-optimal frontier, at 6 · params · tokens FLOPs (Hoffmann et al., 2022)
GROWTH = 0.4 / (0.35 + 0.4)              # of the best size


def best_tokens(params, m):
    """Tokens after which this size is the best one for what has been spent: both terms of the loss fall at the same rate."""
    return (0.4 * 500 / (0.35 * 60) * params ** 0.35) ** 2.5 / m


def synthetic(label, m, seed, noise=0.004, sizes=np.geomspace(1e5, 3e6, 5)):
    """Runs of a structure that needs 1 / m of dense's compute for every loss, with noise between runs and within them."""
    rng, found = np.random.default_rng(seed), []
    for params in sizes:
        tokens = np.arange(1, 41) / 40 * 12 * best_tokens(params, m)
        losses = chinchilla(params, tokens, m) * (1 + noise * rng.standard_normal() + 0.001 * rng.standard_normal(40))
        config = dict(n_embd=int(params), n_layer=3, seed=1, learning_rate=3e-3, decay_lr=False, max_iters=40)
        per_token = {"flops": 6 * params, "flops_without_output_layer": 5 * params, "seconds": 1e-9 * params}
        found.append(Run(f"{label}-{params:.0f}", label, config, int(params), int(params), per_token, Points(tokens, losses), 1.0))
    return found


def test_laws_are_recovered_within_their_intervals():
    """90 % intervals of a, L∞ and the multiplier hold the truth in nearly 90 % of all cases; 12 seeds, at least 8 of each."""
    hits = dict(a=0, floor=0, multiplier=0)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        base = scaling_fit.fit_structure("dense", synthetic("dense", 1, seed), "flops", samples=40, noise=0.004, rng=rng)
        better = scaling_fit.fit_structure("btt", synthetic("btt", 3, 100 + seed), "flops", samples=40, noise=0.004, rng=rng)
        low, high = scaling_fit.interval([law.exponent for law in base.samples], 0.9)
        hits["a"] += low <= EXPONENT <= high
        assert abs(base.law.exponent / EXPONENT - 1) < 0.25 and high - low < EXPONENT  # no interval that holds everything
        low, high = scaling_fit.interval([law.floor for law in base.samples], 0.9)
        hits["floor"] += low <= 1 <= high
        (value, low, high), = scaling_fit.multipliers(better, base, [math.sqrt(math.prod(better.range))], 0.9)
        hits["multiplier"] += low <= 3 <= high
        assert 2.3 < value < 3.9 and high / low < 1.6
        assert abs(base.growth.exponent - GROWTH) < 0.15
    assert min(hits.values()) >= 8, hits


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
    curves = [(x, 1 + k * x ** -a) for k, a, x in ((3e2, 0.5, np.geomspace(1e4, 1e7, 30)), (6e4, 0.8, np.geomspace(1e5, 1e8, 30)),
                                                   (1, 0.0001, np.geomspace(1e5, 1e8, 30)))]
    frontier = scaling_fit.frontier_of(curves)
    expected = []
    for x in 10 ** (np.arange(4 * 12, 8 * 12 + 1) / 12):
        there = [np.interp(np.log(x), np.log(c), l) if c[0] * 0.999 <= x <= c[-1] * 1.001 else np.inf for c, l in curves]
        if not expected or min(there) < expected[-1][1]:    # else an earlier budget already has as much
            expected.append((x, min(there), int(np.argmin(there))))
    assert set(frontier.owners) == {0, 1} and len(expected) < 49
    assert [tuple(point) for point in zip(*frontier)] == [pytest.approx(point) for point in expected]
    ends = scaling_fit.frontier_of([(np.array([x]), np.array([l])) for x, l in ((1, 5), (2, 4), (3, 4.5), (4, 3), (4, 3.5))])
    assert ends.x.tolist() == [1, 2, 4] and ends.losses.tolist() == [5, 4, 3] and ends.owners.tolist() == [0, 1, 3]


# ---- fit and plot, from logs to figures ------------------------------------------------------------------------------

def write_log(folder, label, config, per_token, tokens, losses, train=None, ms=10.0):
    """A log as train.py writes it, 1,000 tokens an iteration."""
    folder.mkdir(parents=True)
    config = dict(struct="dense", dataset="d", block_size=8, eval_iters=2, batch_size=4, decay_lr=False, learning_rate=1e-3, seed=1,
                  n_layer=3, max_iters=int(tokens[-1] // 1000)) | config
    lines = [dict(type="run", config=config, model_args=dict(vocab_size=96), params=config["n_embd"] ** 2,
                  active_params=config["n_embd"], flops_per_token=per_token, tokens_per_iter=1000,
                  flops_per_token_without_output_layer=per_token * 0.9),
             dict(type="eval", iter=0, tokens=0, val_loss=4.6)]
    for t, loss in zip(tokens, losses):
        lines.append(dict(type="train", iter=int(t // 1000) - 1, tokens=t, loss=loss if train is None else train, ms_per_iter=ms))
        lines.append(dict(type="eval", iter=int(t // 1000), tokens=t, val_loss=loss))
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"type": "eval", "it')    # a half line
    (folder / "settings.json").write_text(json.dumps(dict(label=label)))


@pytest.fixture(scope="module")
def fitted(run, tmp_path_factory):
    """Runs of two structures, one of which needs a third of the compute and four thirds of the time, and of some bad ones."""
    folder = tmp_path_factory.mktemp("fit")
    tokens = np.arange(1, 41) * 1e6
    for m, label in ((1.0, "dense"), (3.0, "btt")):
        for i, params in enumerate(np.geomspace(2e4, 6e5, 5)):
            mine = tokens / 40e6 * 12 * best_tokens(params, m) // 1000 * 1000
            write_log(folder / "runs" / f"{label}{i}", label, dict(n_embd=int(params)), 6 * params, mine,
                      chinchilla(params, mine, m), ms=params * m * 4 / 3 if m > 1 else params)
    for seed, factor in ((1, 1.01), (2, 0.99)):     # worse than the same size above, and far from the frontier
        write_log(folder / "runs" / f"seed{seed}", "dense", dict(n_embd=7, seed=seed, learning_rate=2e-3), 6e6, tokens,
                  2 * factor * chinchilla(1e6, tokens), ms=1e9)
    flat = np.full(40, 2.0)
    write_log(folder / "runs" / "nan", "dense", dict(n_embd=8), 6e5, tokens, flat, train=math.nan)
    write_log(folder / "runs" / "rises", "dense", dict(n_embd=8), 6e5, tokens, np.linspace(2, 4, 40))
    write_log(folder / "runs" / "decays", "dense", dict(n_embd=8, decay_lr=True, max_iters=10 ** 6), 6e5, tokens, flat)
    write_log(folder / "runs" / "short", "dense", dict(n_embd=8, max_iters=10 ** 6), 6e9, tokens, flat + 2, ms=1e9)
    told = run("scaling.py", "fit", f"--runs={folder}/runs", f"--out={folder}/out", "--samples=20")
    assert told.returncode == 0, told.stderr
    return folder / "out", told


def test_fit_finds_the_multiplier_in_logs(fitted):
    folder, _ = fitted
    with open(folder / "frontier.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    for axis, truth in (("flops", 3.0), ("flops_without_output_layer", 3.0), ("seconds", 3.0 / 4)):
        gains = [float(r["multiplier"]) for r in rows if r["axis"] == axis and r["structure"] == "btt" and r["multiplier"]]
        assert len(gains) > 10 and gains == pytest.approx([truth] * len(gains), rel=0.06), axis
    law = json.loads((folder / "fit.json").read_text())["axes"]["flops"]["dense"]["law"]
    assert law["exponent"] == pytest.approx(EXPONENT, rel=0.1) and law["floor"] == pytest.approx(1, abs=0.1)
    with open(folder / "runs.csv", newline="") as f:
        assert {r["run"] for r in csv.DictReader(f)} == {*(f"{s}{i}" for s in ("dense", "btt") for i in range(5)), "seed1", "seed2",
                                                         "short"}


def test_fit_names_what_it_leaves_out(fitted):
    folder, told = fitted
    text = (folder / "table.md").read_text()
    assert text in told.stdout
    for line in ("nan: left out, diverged: its training loss is not finite", "rises: left out, diverged: its validation loss ends",
                 "decays: unfinished, at iteration 40000 of 1000000; left out", "short: unfinished, at iteration 40000 of 1000000\n",
                 "short: outlier"):
        assert f"- {line}" in text
    assert "relative noise of a run 1.41% between seeds" in text     # 1 ± 0.01: the standard deviation of two, one degree of freedom
    assert "dense0: " not in text


def test_figures(fitted, run):
    folder, _ = fitted
    names = [f"{name}.{kind}" for name in ("frontier", "wall_clock", "multiplier", "params") for kind in ("png", "svg")]
    made = {name: (folder / name).read_bytes() for name in names}
    assert all(made[n].startswith(b"\x89PNG") and len(made[n]) > 10_000 for n in names if n.endswith("png"))
    for name in (n for n in names if n.endswith("svg")):
        text = made[name].decode()
        assert "<svg" in text and all(f">{label}<" in text for label in ("dense", "btt"))
    assert run("scaling.py", "plot", f"--out={folder}").returncode == 0
    assert {name: (folder / name).read_bytes() for name in names} == made   # nothing of the day in them


def test_fit_refuses_different_losses(run, tmp_path):
    for name, dataset in (("a", "one"), ("b", "other")):
        write_log(tmp_path / "runs" / name, "dense", dict(n_embd=8, dataset=dataset), 6e5, np.arange(1, 6) * 1e6, np.linspace(3, 2, 5))
    told = run("scaling.py", "fit", f"--runs={tmp_path}/runs", f"--out={tmp_path}/out")
    assert told.returncode == 1 and told.stderr.count("\n") == 1 and "dataset is one in a and other in b" in told.stderr
    assert not (tmp_path / "out").exists()


def test_seeds_count_as_their_mean(run):
    one, = synthetic("dense", 1, 0, sizes=[1e5])
    import dataclasses
    other = dataclasses.replace(one, name="other", config=one.config | dict(seed=2), points=Points(one.points.tokens[:30],
                                                                                                 one.points.losses[:30] + 0.2))
    mean, = scaling_fit.mean_of_seeds([one, other])
    assert np.array_equal(mean.points.tokens, one.points.tokens[:30])
    assert mean.points.losses == pytest.approx(one.points.losses[:30] + 0.1)
    assert len(scaling_fit.mean_of_seeds([one, dataclasses.replace(other, config=other.config | dict(learning_rate=1.0))])) == 2


def test_seconds_of_bench(tmp_path):
    """A run's seconds per token are those of the training step of its structure and shape, or none."""
    small, large = synthetic("btt", 1, 0, sizes=[1e5, 2e5])
    for run, width in ((small, 64), (large, 128)):
        run.config.update(n_embd=width, n_head=2, block_size=16, batch_size=4)
    steps = [dict(config="btt", tokens_per_s=5000.0), dict(config="dense", tokens_per_s=1.0)]
    config = dict(n_embd=64, n_layer=3, head_size=32, block_size=16, batch_size=4)
    (tmp_path / "bench.json").write_text(json.dumps(dict(config=config, steps=steps)))
    notes = scaling_fit.take_seconds([small, large], [tmp_path / "bench.json"])
    assert small.flops_per_token["seconds"] == 1 / 5000 and "seconds" not in large.flops_per_token
    assert len(notes) == 1 and large.name in notes[0]
    for key in ("n_layer", "head_size", "block_size", "batch_size"):
        (tmp_path / "bench.json").write_text(json.dumps(dict(config=config | {key: 8}, steps=steps)))
        assert len(scaling_fit.take_seconds([small, large], [tmp_path / "bench.json"])) == 2
    (tmp_path / "bench.json").write_text('{"steps": 3}')
    with pytest.raises(ValueError, match="bench.json is no output of bench.py"):
        scaling_fit.take_seconds([small], [tmp_path / "bench.json"])


def test_from_plan_to_figures(run, python_text, tmp_path):
    """With train.py itself: a tiny run."""
    (tmp_path / "plan.py").write_text(ONE.replace("evals = 5", "evals = 12") + "eval_iters = 2\nwarmup_iters = 2\nsample_tokens = 0\nlog_interval = 2\n")
    places = [tmp_path / "plan.py", f"--runs={tmp_path}/runs", f"--dataset={python_text}", "--expiry=5"]
    told = run("scaling.py", "sweep", *places)
    assert told.returncode == 0 and "1 of 1 finished" in told.stdout, told.stdout + told.stderr
    for log in (tmp_path / "runs").rglob("log.jsonl"):
        points = [json.loads(line) for line in log.read_text().splitlines()]
        assert points[-1]["flops"] == pytest.approx(1e8, rel=0.05) and points[-1]["iter"] == points[0]["config"]["max_iters"]
    told = run("scaling.py", "fit", f"--runs={tmp_path}/runs", f"--out={tmp_path}/out", "--samples=10")
    assert told.returncode == 0 and "1 runs of 1 structures" in told.stdout, told.stderr
    assert (tmp_path / "out" / "frontier.svg").exists()
