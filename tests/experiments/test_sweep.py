"""scaling.py sweep, with a stand-in for train.py; test_scaling_fit.py has the rest."""
import json
import math
import os
import runpy
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

import configurator
from experiments import launcher
from structured import Theta

ROOT = Path(__file__).resolve().parents[2]

# Writes the log of a run that took no time. 'jobs' beside it says what was launched; where 'meet' names a word of that and
# a number, a run waits until so many of them are different.
STAND_IN = '''
import json, os, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
out, its, every = flags["out_dir"], int(flags["max_iters"]), int(flags["eval_interval"])
here = os.path.dirname(os.path.abspath(__file__))
job = dict(flags, pid=os.getpid(), parent=os.getppid(), threads=os.environ["OMP_NUM_THREADS"],
           gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
with open(os.path.join(here, "jobs"), "a") as f:
    f.write(json.dumps(job) + "\\n")
if os.path.exists(os.path.join(here, "meet")):
    with open(os.path.join(here, "meet")) as f:
        word, number = f.read().split()
    open(os.path.join(here, f"met.{job[word]}"), "w").close()
    for _ in range(10_000):
        if sum(name.startswith("met.") for name in os.listdir(here)) >= int(number):
            break
        time.sleep(0.02)
    else:
        sys.exit("nobody came")
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
    """desk(plan, *flags, **options of run): a sweep of a plan with the stand-in; desk.jobs(): what it was launched with."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def sweep(plan=PLAN, *flags, **options):
        (tmp_path / "plan.py").write_text(plan)
        return run("experiments.scaling", "sweep", tmp_path / "plan.py", f"--runs={tmp_path}/runs", f"--program={tmp_path}/stand_in.py",
                   f"--dataset={python_text}", *flags, **options)
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


def forget_threads():
    del os.environ["OMP_NUM_THREADS"]


def test_jobs_share_the_machine(desk):
    """Four run at once, each with its share of the cores."""
    (desk.folder / "meet").write_text("pid 4")
    told = desk(PLAN, "--jobs=4", before=forget_threads)
    assert told.returncode == 0 and len(desk.jobs()) == 4, told.stdout
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert {j["threads"] for j in desk.jobs()} == {str(max(1, cores // 4))}


def test_jobs_share_the_gpus(desk):
    (desk.folder / "meet").write_text("pid 2")
    told = desk(PLAN, "--jobs=2", "--gpus=1", CUDA_VISIBLE_DEVICES="5,7")
    assert told.returncode == 0 and {j["gpus"] for j in desk.jobs()} == {"5", "7"}, told.stdout + told.stderr
    told = desk(PLAN + "bias = True\n", "--jobs=2", "--gpus=2", CUDA_VISIBLE_DEVICES="5,6,7")     # two would have one GPU
    assert told.returncode == 1 and told.stderr.count("\n") == 1
    assert "jobs = 2 times gpus = 2 is more than the 3 GPUs" in told.stderr
    assert len(desk.jobs()) == 4


# one structure's runs: max_iters, eval_interval and n_head at 6 * 1e8 FLOPs, 5 evaluations, heads of 32, unless overridden
@pytest.mark.parametrize("plan, flags, its, every, heads", [
    ("", ["--max_iters=20"], 20, 4, 2), ("", ["--eval_interval=7"], None, 7, 2), ("", ["--n_head=4"], None, None, 4),
    ("max_iters=20, n_head=[4]", [], 20, 4, 4), ("eval_interval=7", ["--max_iters=30"], 30, 7, 2),
    ("n_head=4, eval_interval=7", ["--n_head=8", "--eval_interval=9"], None, 9, 8)])
def test_what_is_more_specific_wins(desk, plan, flags, its, every, heads):
    """A structure's own keys over the plan's budgets and head sizes, and the command line over both."""
    plan = PLAN.replace('"btt": dict(learning_rate=1e-3)', "").replace("{}", f"dict({plan})").replace("[32, 64]", "64")
    assert desk(plan.replace("3e8", "6e8"), *flags).returncode == 0
    job, = desk.jobs()
    if its is None:
        from model import GPT, GPTConfig
        model = GPT(GPTConfig(block_size=16, vocab_size=96, n_layer=2, n_head=heads, n_embd=64))
        its = round(6e8 / (3 * model.flops_per_token() * 4 * 16))
    assert [int(job[k]) for k in ("max_iters", "eval_interval", "n_head")] == [its, every or math.ceil(its / 5), heads]


def test_machines_share_a_plan(desk):
    """Three sweeps at once: every run is made, and made once, and each sweep makes some."""
    plan = PLAN.replace("n_embd = [32, 64]", "n_embd = 32").replace("seed = 1\n", "seed = [1, 2, 3, 4, 5, 6]\n")
    (desk.folder / "meet").write_text("parent 3")
    told = []
    threads = [threading.Thread(target=lambda: told.append(desk(plan))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [t.returncode for t in told] == [0, 0, 0] and all("12 of 12 finished, 0 failed" in t.stdout for t in told)
    jobs = desk.jobs()
    assert len(jobs) == 12 and len({j["out_dir"] for j in jobs}) == 12 and len({j["parent"] for j in jobs}) == 3
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
    for _ in range(6000):
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
    thread, told = launched(desk, ONE + "dropout = 0.9\n", "--wait=False")
    job, = desk.jobs()
    (Path(job["out_dir"]) / "claim.2").write_text(json.dumps(ELSEWHERE))
    thread.join()
    assert "taken over" in told[0].stdout and "hands of others" in told[0].stdout and gone(job["pid"])
    assert (Path(job["out_dir"]) / "claim.2").exists()


def test_an_interrupted_sweep_leaves_nothing_behind(desk):
    thread, told = launched(desk, ONE + "dropout = 0.9\n")
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
    (PLAN + "max_iters = 3", [], "flops and max_iters"),
    (PLAN.replace("{}", "dict(n_head=2, head_size=4)"), [], "head_size and n_head"),
    (PLAN, ["--expiry=-1"], "expiry"), (PLAN, ["--seedd=3"], "seed"), (PLAN, ["--dataset=nowhere"], "nowhere")])
def test_sweep_refuses(desk, plan, flags, word):
    told = desk(plan, *flags)
    assert told.returncode == 1 and told.stderr.startswith("error: ") and word in told.stderr, told.stderr
    assert told.stderr.count("\n") == 1 and not desk.runs.exists()


@pytest.mark.parametrize("words, named", [
    ([], "sweep"), (["sweeep"], "sweeep"), (["sweep"], "plan"), (["sweep", "nowhere.py"], "nowhere.py"),
    (["fit", "--runs=nowhere"], "nowhere"), (["fit", f"--runs={ROOT / 'tests'}"], "no run"), (["fit", "--level=2"], "level"),
    (["fit", "--samples=1"], "samples"), (["plot", "--out=nowhere"], "fit.json"), (["fit", "--n_embd=3"], "n_embd")])
def test_commands_refuse(run, words, named):
    told = run("experiments.scaling", *words)
    assert told.returncode == 1 and told.stderr.startswith("error: ") and named in told.stderr, told.stderr
    assert told.stderr.count("\n") == 1


def test_taxonomy_plan_differs_in_one_thing_at_a_time():
    thetas = [Theta(*theta) for theta in runpy.run_path(str(ROOT / "experiments" / "plans" / "taxonomy.py"))["_thetas"].values()]
    origin, seen = thetas[0], set()
    assert (origin.omega, origin.psi, origin.nu) == (0, 1, 0.5)
    for theta in thetas[1:]:
        differing = {n for n in ("omega", "psi", "nu") if abs(getattr(theta, n) - getattr(origin, n)) > 1e-9}
        assert len(differing) == 1
        seen |= differing
    assert seen == {"omega", "psi", "nu"}


def test_plans_can_be_run(run, python_text, tmp_path):
    """Every model of the plans can be made at its widths; the paper's own, which are many, at one."""
    one = ["--n_embd=256", "--n_layer=3"]
    for plan, count, flags in (("cpu", 24, []), ("cpu_rates", 26, []), ("cpu_seeds", 4, []), ("taxonomy", 36, []),
                               ("search_controls", 10, []), ("paper", 24, one), ("paper_moe", 7, one)):
        told = run("experiments.scaling", "sweep", f"experiments/plans/{plan}.py", "--dry_run=True", f"--dataset={python_text}",
                   f"--runs={tmp_path}/r", *flags)
        assert told.returncode == 0 and told.stdout.count("to do") == count, told.stderr


def test_what_is_not_learned_changes_no_name():
    """A sweep that writes checkpoints more often, say, goes on with the runs that are there."""
    settings = dict(n_embd=32, n_layer=2, learning_rate=1e-3, seed=1, max_iters=10)
    name = launcher.Run("dense", settings, 1.0, "").name
    for key in ("checkpoint_interval", "max_skipped", "eval_interval", "log_interval"):
        assert launcher.Run("dense", settings | {key: 7}, 1.0, "").name == name
    assert launcher.Run("dense", settings | dict(weight_decay=0.1), 1.0, "").name != name


def test_paper_config_is_a_point_of_its_plan():
    config = configurator.configure({"__file__": launcher.TRAIN}, ["config/paper.py"])
    plan = runpy.run_path(str(ROOT / "experiments" / "plans" / "paper.py"))
    assert math.prod(config[k] for k in ("gradient_accumulation_steps", "batch_size", "block_size")) == 65_536
    assert config["n_embd"] == config["n_head"] * plan["head_size"]
    for key in runpy.run_path(str(ROOT / "config" / "paper.py")).keys() & plan.keys():
        assert key.startswith("_") or config[key] in (plan[key] if isinstance(plan[key], list) else [plan[key]]), key


# ---- From plan to figures ------------------------------------------------------------------------------------------------

def test_from_plan_to_figures(run, python_text, tmp_path):
    """With train.py itself: a tiny run."""
    (tmp_path / "plan.py").write_text(ONE.replace("evals = 5", "evals = 12") + "eval_iters = 2\nwarmup_iters = 2\nsample_tokens = 0\n"
                                      "log_interval = 2\n")
    places = [tmp_path / "plan.py", f"--runs={tmp_path}/runs", f"--dataset={python_text}"]
    told = run("experiments.scaling", "sweep", *places)
    assert told.returncode == 0 and "1 of 1 finished" in told.stdout, told.stdout + told.stderr
    for log in (tmp_path / "runs").rglob("log.jsonl"):
        points = [json.loads(line) for line in log.read_text().splitlines()]
        assert points[-1]["flops"] == pytest.approx(1e8, rel=0.05) and points[-1]["iter"] == points[0]["config"]["max_iters"]
    told = run("experiments.scaling", "fit", f"--runs={tmp_path}/runs", f"--out={tmp_path}/out", "--samples=10")
    assert told.returncode == 0 and "1 runs of 1 structures" in told.stdout, told.stderr
    assert (tmp_path / "out" / "frontier.svg").exists()
