"""python -m experiments.scaling sweep, with a stand-in for train.py: plans, sweeps beside each other, kills,
errors."""
import contextlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import configurator
from experiments import launcher
from experiments.scaling import plan as plans
from experiments.scaling.sweep import Job, Sweep
from model import GPT, GPTConfig, lr_multipliers
from tests.conftest import ROOT, ForkedProgram

# Writes the log of a run that took no time. 'jobs' beside it says what was started. Where 'locks' exists, it
# locks its out_dir as train.py does. Where 'meet' holds a word of that and a number, a run waits until so
# many of them are different; while 'hold' exists, it waits for that to go.
STAND_IN = '''
import fcntl, json, os, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
out, its, every = flags["out_dir"], int(flags["max_iters"]), int(flags["eval_interval"])
here = os.path.dirname(os.path.abspath(__file__))
lock = open(os.path.join(out, "lock"), "w")
if os.path.exists(os.path.join(here, "locks")):
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
while os.path.exists(os.path.join(here, "hold")):
    time.sleep(0.02)
if flags["seed"] == "13" and not os.path.exists(os.path.join(here, "mended")):
    print("a long story")
    sys.exit("seed 13 brings bad luck")
with open(os.path.join(out, "log.jsonl"), "w") as f:
    f.write(json.dumps(dict(type="run", config=flags, pid=os.getpid())) + "\\n")
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
ONE = PLAN.replace("n_embd = [32, 64]", "n_embd = 32").replace(', "btt": dict(learning_rate=1e-3)', "")


class Workplace:
    """A folder with the stand-in, a plan and its runs; calling it sweeps the plan."""

    def __init__(self, run, dataset, folder):
        self.run, self.dataset, self.folder, self.runs = run, dataset, folder, folder / "runs"
        (folder / "stand_in.py").write_text(STAND_IN)

    def arguments(self, plan=PLAN, *flags):
        """What follows `python -m experiments.scaling sweep`; it writes the plan."""
        whole = self.folder / f"plan.py.{threading.get_ident()}"    # threads sweep the same plan
        whole.write_text(plan)
        os.replace(whole, self.folder / "plan.py")
        return [self.folder / "plan.py", f"--runs={self.runs}", f"--program={self.folder}/stand_in.py",
                f"--dataset={self.dataset}", *flags]

    def __call__(self, *plan_and_flags, **options):
        return self.run("experiments.scaling", "sweep", *self.arguments(*plan_and_flags), **options)

    def start(self, *arguments, jobs=1):
        """(thread of a sweep, list that its result goes into), once so many runs were started in all."""
        results = []
        thread = threading.Thread(target=lambda: results.append(self(*arguments)))
        thread.start()
        wait_until(lambda: len(self.jobs()) == jobs)
        return thread, results

    def jobs(self):
        """What the stand-in was started with, in order."""
        path = self.folder / "jobs"
        return [json.loads(line) for line in path.read_text().splitlines(True)
                if line.endswith("\n")] if path.exists() else []

    def leases(self):
        return list(self.runs.rglob("lease*"))


def wait_until(holds):
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.02)
    raise TimeoutError


@pytest.fixture
def sweep(run, python_text, tmp_path):
    return Workplace(run, python_text, tmp_path)


def test_a_plan_is_run_once(sweep, python_text):
    done = sweep()
    assert done.returncode == 0 and "4 of 4 finished, 0 failed" in done.stdout, done.stdout + done.stderr
    jobs = sweep.jobs()
    grid = {(j["struct"], j["n_embd"], j["n_head"], j["learning_rate"]) for j in jobs}
    assert len(jobs) == 4 and grid == {("dense", "32", "1", "0.003"), ("dense", "64", "2", "0.003"),
                                       ("btt", "32", "1", "0.001"), ("btt", "64", "2", "0.001")}
    from model import GPT, GPTConfig
    for j in jobs:
        d = int(j["n_embd"])
        model = GPT(GPTConfig(block_size=16, vocab_size=96, n_layer=2, n_head=d // 32, n_embd=d,
                              struct=j["struct"]))
        assert int(j["max_iters"]) == round({32: 1e8, 64: 3e8}[d] / (3 * model.flops_per_token() * 4 * 16))
        assert int(j["eval_interval"]) == math.ceil(int(j["max_iters"]) / 5)
        assert j["init_from"] == "auto" and j["dataset"] == str(python_text)
        assert Path(j["out_dir"]).parent == sweep.runs
    assert len({j["out_dir"] for j in jobs}) == 4 and not sweep.leases()
    done = sweep()
    assert done.returncode == 0 and "4 finished before" in done.stdout and len(sweep.jobs()) == 4


def test_budgets_at_a_constant_rate_are_one_run(sweep):
    """A longer run holds the shorter ones; where the rate decays each is a run of its own. More budget
    resumes the run."""
    one = ONE.replace("{32: 1e8, 64: 3e8}", "[1e8, 2e8, 4e8]").replace("decay_lr = False\n", "")
    assert "1 runs" in sweep(one + "decay_lr = False\n", "--dry_run=True").stdout
    done = sweep(one, "--dry_run=True")
    assert "3 runs, 7" in done.stdout and done.stdout.count("to do") == 3 and not sweep.jobs()
    assert sweep(one + "decay_lr = False\n").returncode == 0
    first, = sweep.jobs()
    assert sweep((one + "decay_lr = False\n").replace("4e8", "8e8")).returncode == 0
    _, second = sweep.jobs()
    assert second["out_dir"] == first["out_dir"] and second["init_from"] == "auto"
    assert int(second["max_iters"]) == pytest.approx(2 * int(first["max_iters"]), abs=1)


# one structure's runs: max_iters, eval_interval and n_head at 6 * 1e8 FLOPs, 5 evaluations, heads of 32,
# unless overridden
@pytest.mark.parametrize("own, flags, its, every, heads", [
    ("", ["--max_iters=20"], 20, 4, 2), ("", ["--eval_interval=7"], None, 7, 2),
    ("", ["--n_head=4"], None, None, 4),
    ("max_iters=20, n_head=[4]", [], 20, 4, 4), ("eval_interval=7", ["--max_iters=30"], 30, 7, 2),
    ("n_head=4, eval_interval=7", ["--n_head=8", "--eval_interval=9"], None, 9, 8)])
def test_a_structures_keys_override_the_plan_and_the_command_line_both(sweep, own, flags, its, every, heads):
    plan = PLAN.replace('"btt": dict(learning_rate=1e-3)',
                        "").replace("{}", f"dict({own})").replace("[32, 64]", "64")
    assert sweep(plan.replace("3e8", "6e8"), *flags).returncode == 0
    job, = sweep.jobs()
    if its is None:
        from model import GPT, GPTConfig
        model = GPT(GPTConfig(block_size=16, vocab_size=96, n_layer=2, n_head=heads, n_embd=64))
        its = round(6e8 / (3 * model.flops_per_token() * 4 * 16))
    assert [int(job[k]) for k in ("max_iters", "eval_interval", "n_head")] == [its, every
                                                                               or math.ceil(its / 5), heads]


@pytest.mark.parametrize("plan, flags, word", [
    ("n_embd = 32", [], "structures"), ('structures = {"dense": 3}', [], "'dense'"),
    ('structures = {"dens": {}}', [], "dens"),
    (PLAN + "n_emdb = 3", [], "did you mean n_embd"), (PLAN + "n_layer = 'three'", [], "n_layer"),
    (PLAN + "1 / 0", [], "line 13"),
    (PLAN + "head_size = 48", [], "48"), (PLAN.replace("64: 3e8", "65: 3e8"), [], "n_embd = 64"),
    (PLAN.replace("32: 1e8", "32: [1e8, 2e8]"), [], "flops"), (PLAN + "n_layer = [[1, 2], 3]", [], "n_layer"),
    (PLAN.replace("flops = {32: 1e8, 64: 3e8}", "max_iters = 0"), [], "max_iters"),
    (PLAN + "flops = -1", [], "flops"), (PLAN.replace("[32, 64]", "[]"), [], "n_embd is an empty list"),
    (PLAN.replace("[32, 64]", "[37]").replace("head_size = 32", "n_head = 1"), [], "37"),
    (PLAN, ["--jobs=0"], "jobs"),
    (PLAN + "max_iters = 3", [], "flops and max_iters"),
    (PLAN.replace("{}", "dict(n_head=2, head_size=4)"), [], "head_size and n_head"),
    (PLAN, ["--gpus=-1"], "gpus"),
    (PLAN, ["--expiry=-1"], "expiry"), (PLAN, ["--seedd=3"], "seed"),
    (PLAN, ["--dataset=nowhere"], "nowhere")])
def test_mistakes_in_a_plan_are_one_sentence(sweep, refused, plan, flags, word):
    assert word in refused("experiments.scaling", "sweep", *sweep.arguments(plan, *flags))
    assert not sweep.runs.exists()


@pytest.mark.parametrize("words, named", [
    ([], "sweep"), (["sweeep"], "sweeep"), (["sweep"], "plan"), (["sweep", "nowhere.py"], "nowhere.py"),
    (["sweep", "a.py", "b.py"], "one plan, not 2"),
    (["sweep", "plans/cpu.py"], "did you mean experiments/plans/cpu.py"),
    (["fit", "--runs=nowhere"], "nowhere"), (["fit", f"--runs={ROOT / 'tests'}"], "no run"),
    (["fit", "--level=2"], "level"),
    (["fit", "--samples=1"], "samples"), (["plot", "--out=nowhere"], "fit.json"),
    (["fit", "--n_embd=3"], "n_embd"),
    (["transfer", "--runs=nowhere"], "nowhere")])
def test_mistakes_in_a_command_are_one_sentence(refused, words, named):
    assert named in refused("experiments.scaling", *words)


def test_a_mistake_is_one_sentence_of_the_program(run):
    done = run("experiments.scaling", "sweep", "nowhere.py")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


ONE_SIZE = ["--n_embd=256", "--n_layer=3"]   # of the paper's many


@pytest.mark.parametrize("plan, count, flags", [
    ("cpu", 40, []), ("cpu_rates", 80, []), ("cpu_seeds", 20, []), ("cpu_widths", 20, []),
    ("cpu_long", 13, []), ("search_controls", 6, []),
    ("lr_transfer", 54, []), ("paper", 25, ONE_SIZE), ("paper_moe", 8, ONE_SIZE)])
def test_every_model_of_a_plan_can_be_made(run, python_text, tmp_path, plan, count, flags):
    done = run("experiments.scaling", "sweep", f"experiments/plans/{plan}.py", "--dry_run=True",
               f"--dataset={python_text}",
               f"--runs={tmp_path}/r", *flags)
    assert done.returncode == 0 and done.stdout.count("to do") == count, done.stderr


def test_a_run_of_other_sizes_is_not_resumed(python_text, tmp_path):
    """An earlier version made another model of the same settings: train.py would go on with that one."""
    settings = dict(struct="monarch", n_embd=32, n_layer=2, n_head=2, max_iters=7, decay_lr=False)
    run = launcher.make_run("monarch", settings | dict(dataset=str(python_text)), str(tmp_path))
    launcher.check_begun(run)   # nothing there
    os.makedirs(run.folder)
    per_token = launcher.training_flops(launcher.TRAIN_DEFAULTS | run.settings)
    for there in (per_token, per_token - 600):
        Path(run.folder, "log.jsonl").write_text(json.dumps(dict(type="run", flops_per_token=there)) + "\n")
        if there == per_token:
            launcher.check_begun(run)
    with pytest.raises(ValueError, match="an earlier version made another model"):
        Sweep([run], jobs=1, gpus=0, program="train.py", expiry=60, wait=False)


def test_a_budget_of_less_than_an_iteration_is_refused(python_text):
    """A run of one iteration would cost more than was asked for."""
    settings = dict(n_embd=32, n_layer=2, n_head=2, dataset=python_text)
    whole = launcher.make_run("dense", settings | dict(max_iters=1), "runs").flops
    assert launcher.make_run("dense", settings | dict(flops=0.6 * whole), "runs").max_iters == 1
    with pytest.raises(ValueError, match="is less than one iteration"):
        launcher.make_run("dense", settings | dict(flops=0.4 * whole), "runs")


def test_dense_runs_of_both_plans_of_the_paper_are_the_same(python_text):
    flags = [f"--dataset={python_text}", *ONE_SIZE]
    names = [{run.name for run in plans.expand(f"experiments/plans/{plan}.py", flags, "runs")
              if run.label in ("dense", "dense_normed")} for plan in ("paper", "paper_moe")]
    assert names[0] == names[1] and len(names[0]) == 2


def test_a_runs_name_depends_on_what_is_learned_alone():
    """A sweep that writes checkpoints more often, say, resumes the runs that are there."""
    settings = dict(n_embd=32, n_layer=2, learning_rate=1e-3, seed=1, max_iters=10)
    name = launcher.Run("dense", settings, 1.0, "").name
    for key in ("checkpoint_interval", "max_skipped", "eval_interval", "log_interval"):
        assert launcher.Run("dense", settings | {key: 7}, 1.0, "").name == name
    assert launcher.Run("dense", settings | dict(weight_decay=0.1), 1.0, "").name != name
    assert name == "dense-d32-l2-lr0.001-s1-i10-d41a0292"    # by an earlier version, whose runs must be found


@pytest.mark.parametrize("plan", ["paper", "paper_moe"])
def test_the_papers_rate_is_that_of_a_dense_layer_of_width_768(plan):
    """The base width of its scripts; the MLP's down projection is four times as wide."""
    plan = runpy.run_path(str(ROOT / "experiments" / "plans" / f"{plan}.py"))
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=1, n_embd=768, vocab_size=96, block_size=128))
    rates = {name: plan["learning_rate"] * factor
             for name, factor in lr_multipliers(model, plan["mup_base_width"]).items()}
    assert rates["blocks.0.attn.v.A"] == rates["lm_head.A"] == rates["wte.weight"] == pytest.approx(3e-3)
    assert rates["blocks.0.mlp.down.A"] == pytest.approx(7.5e-4)


def test_paper_config_is_a_point_of_its_plan():
    config = configurator.configure({"__file__": launcher.TRAIN}, ["config/paper.py"])
    plan = runpy.run_path(str(ROOT / "experiments" / "plans" / "paper.py"))
    assert math.prod(config[k] for k in ("gradient_accumulation_steps", "batch_size", "block_size")) == 65_536
    assert config["n_embd"] == config["n_head"] * plan["head_size"]
    for key in runpy.run_path(str(ROOT / "config" / "paper.py")).keys() & plan.keys():
        assert key.startswith("_") or config[key] in (plan[key]
                                                      if isinstance(plan[key], list) else [plan[key]]), key


def test_jobs_are_stopped_together():
    """Each has its minute for a checkpoint, whatever the others take."""
    calls = []

    class Process:
        def __init__(self, name, ends):
            self.name, self.ends = name, ends

        def __getattr__(self, what):
            def called(seconds=None):
                calls.append((self.name, what))
                if what == "wait" and seconds is not None and not self.ends:
                    raise subprocess.TimeoutExpired("train.py", seconds)
            return called
    launcher.stop(Process("a", ends=False), Process("b", ends=True))
    assert calls == [("a", "terminate"), ("b", "terminate"),
                     ("a", "wait"), ("a", "kill"), ("a", "wait"), ("b", "wait")]


def test_failures_are_named_and_the_rest_goes_on(sweep):
    plan = PLAN.replace("seed = 1\n", "seed = [1, 13, 14]\n").replace("n_embd = [32, 64]", "n_embd = 32")
    done = sweep(plan)
    assert done.returncode == 1 and "2 of 6 finished, 4 failed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("ended with status 1: seed 13 brings bad luck") == 2
    assert done.stdout.count("ended before iteration") == 2 and len(sweep.jobs()) == 6
    assert done.stdout.splitlines()[-1].startswith("failed: ")
    assert done.stdout.splitlines()[-1].count("-s13-") == 2
    (sweep.folder / "mended").touch()
    done = sweep(plan)       # what failed is tried again, once
    assert "2 finished before" in done.stdout and "4 of 6 finished, 2 failed" in done.stdout
    assert len(sweep.jobs()) == 10


def forget_threads():
    """No number of threads is set, and the machine has 12 cores."""
    del os.environ["OMP_NUM_THREADS"]
    os.sched_getaffinity = lambda _: set(range(12))


def test_jobs_share_the_cores(sweep):
    """Four run at once, each with its share."""
    (sweep.folder / "meet").write_text("pid 4")
    done = sweep(PLAN, "--jobs=4", before=forget_threads)
    assert done.returncode == 0 and len(sweep.jobs()) == 4, done.stdout
    assert {j["threads"] for j in sweep.jobs()} == {"3"}


def test_jobs_share_the_gpus(sweep):
    (sweep.folder / "meet").write_text("pid 2")
    done = sweep(PLAN, "--jobs=2", "--gpus=1", CUDA_VISIBLE_DEVICES="5,7")
    assert done.returncode == 0 and {j["gpus"] for j in sweep.jobs()} == {"5", "7"}, done.stdout + done.stderr
    done = sweep(PLAN + "bias = True\n", "--jobs=2", "--gpus=2",
                 CUDA_VISIBLE_DEVICES="5,6,7")     # two would have one GPU
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "2 runs at a time, with gpus = 2 each: more than the 3 GPUs" in done.stderr
    assert len(sweep.jobs()) == 4


def test_train_py_is_seen_while_it_lives(flags, tmp_path):
    """By the lock of its out_dir, which outlives neither the process nor a kill."""
    assert not launcher.is_training(tmp_path / "out")
    train = ForkedProgram(tmp_path, flags(max_iters=10**6, eval_interval=10**6))
    wait_until((tmp_path / "out" / "log.jsonl").exists)  # asking locks it for a moment
    assert launcher.is_training(tmp_path / "out")
    train.kill()
    assert not launcher.is_training(tmp_path / "out")


def test_sweeps_share_a_plan(sweep):
    """Three at once: every run is made, and made once, and each sweep makes some."""
    plan = PLAN.replace("n_embd = [32, 64]", "n_embd = 32").replace("seed = 1\n",
                                                                    "seed = [1, 2, 3, 4, 5, 6]\n")
    (sweep.folder / "meet").write_text("parent 3")
    results = []
    threads = [threading.Thread(target=lambda: results.append(sweep(plan))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [r.returncode for r in results] == [0, 0, 0] and all("12 of 12 finished, 0 failed" in r.stdout
                                                                for r in results)
    jobs = sweep.jobs()
    assert len(jobs) == 12 and len({j["out_dir"] for j in jobs}) == 12 and len({j["parent"]
                                                                                for j in jobs}) == 3
    assert not sweep.leases()


@pytest.fixture
def held(sweep, request):
    """A sweep whose run goes on until the file 'hold' is removed. By parameter its expiry, in seconds."""
    (sweep.folder / "hold").touch()
    thread, results = sweep.start(ONE, f"--expiry={getattr(request, 'param', 10)}")
    yield sweep, thread, results
    if thread.is_alive():
        for job in sweep.jobs():
            kill(job["parent"])
            kill(job["pid"])
    thread.join()


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid))


def gone(pid):
    """Ended, or a zombie whose parent has not waited for it. Either read can come after the end."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except FileNotFoundError:                   # ended between the two, or a system without /proc
        return os.path.exists("/proc/self")


def test_a_run_at_work_is_left_alone(held):
    sweep, thread, results = held
    done = sweep(ONE, "--expiry=10", "--wait=False")
    assert done.returncode == 0 and "0 of 1 finished, 0 failed, 1 in the hands of others" in done.stdout
    done = sweep(ONE, "--expiry=11", "--wait=False")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "another expiry" in done.stderr
    (sweep.folder / "hold").unlink()
    thread.join()
    assert "1 of 1 finished" in results[0].stdout and len(sweep.jobs()) == 1


def test_a_dead_sweeps_run_is_taken_at_once(held):
    """Of this machine, as soon as its train.py is dead too."""
    sweep, thread, _ = held
    job, = sweep.jobs()
    kill(job["parent"])
    kill(job["pid"])
    (sweep.folder / "hold").unlink()
    assert "1 of 1 finished" in sweep(ONE, "--expiry=10", "--wait=False").stdout and len(sweep.jobs()) == 2


def test_a_train_py_that_outlives_its_sweep_is_left_alone(sweep):
    """No second one is started beside it, and its end counts."""
    (sweep.folder / "hold").touch()
    (sweep.folder / "locks").touch()
    thread, _ = sweep.start(ONE)
    job, = sweep.jobs()
    kill(job["parent"])
    assert "1 in the hands of others" in sweep(ONE, "--wait=False").stdout and len(sweep.jobs()) == 1
    (sweep.folder / "hold").unlink()
    wait_until(lambda: gone(job["pid"]))
    assert "1 finished before" in sweep(ONE).stdout and len(sweep.jobs()) == 1
    thread.join()


def test_a_start_beside_another_train_py_is_no_failure(tmp_path):
    """It ends at once, since the folder is locked; the run stays to be done."""
    run = launcher.Run("dense", dict(n_embd=32, n_layer=2, learning_rate=1e-3, seed=1, max_iters=10), 1.0,
                       str(tmp_path))
    sweep = Sweep([run], jobs=1, gpus=0, program="", expiry=10.0, wait=False)
    os.makedirs(run.folder)
    script = ("import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
              "print(flush=True); time.sleep(99)")
    other = subprocess.Popen([sys.executable, "-c", script, os.path.join(run.folder, "lock")],
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    ours = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    ours.wait()
    sweep.close(Job(run, ours))
    assert sweep.pending == [run] and not sweep.failed
    other.kill()
    other.communicate()
    sweep.close(Job(run, ours))
    assert not sweep.pending and sweep.failed == [run]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("held", [2], indirect=True)
def test_a_hung_sweeps_run_is_taken_over(held):
    """A machine that sleeps: its sweep and train.py are stopped. When they wake, they leave the run to the
    other."""
    sweep, thread, results = held
    job, = sweep.jobs()
    for pid in (job["parent"], job["pid"]):
        os.kill(pid, signal.SIGSTOP)
    (sweep.folder / "hold").unlink()
    assert "1 of 1 finished" in sweep(ONE, "--expiry=2").stdout
    log = (Path(job["out_dir"]) / "log.jsonl").read_text()
    os.kill(job["parent"], signal.SIGCONT)
    wait_until(lambda: has_pending(job["pid"], signal.SIGTERM))
    os.kill(job["pid"], signal.SIGCONT)
    thread.join()
    assert "taken over by another sweep" in results[0].stdout and "1 of 1 finished" in results[0].stdout
    assert gone(job["pid"]) and (Path(job["out_dir"]) / "log.jsonl").read_text() == log


def has_pending(pid, number):
    """Whether a stopped process has not received this signal yet."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["ShdPnd"], 16) >> (number - 1) & 1


def test_an_interrupted_sweep_leaves_nothing_behind(held):
    sweep, thread, results = held
    job, = sweep.jobs()
    assert sweep.leases()
    os.kill(job["parent"], signal.SIGTERM)
    thread.join()
    assert results[0].returncode == 130 and "makes what is missing" in results[0].stderr
    assert "Traceback" not in results[0].stderr
    assert gone(job["pid"]) and not sweep.leases()


def test_from_plan_to_figures(run, python_text, tmp_path):
    """With train.py itself: a tiny run."""
    more = "eval_iters = 2\nwarmup_iters = 2\nsample_tokens = 0\nlog_interval = 2\n"
    (tmp_path / "plan.py").write_text(ONE.replace("evals = 5", "evals = 12") + more)
    places = [tmp_path / "plan.py", f"--runs={tmp_path}/runs", f"--dataset={python_text}"]
    done = run("experiments.scaling", "sweep", *places)
    assert done.returncode == 0 and "1 of 1 finished" in done.stdout, done.stdout + done.stderr
    for log in (tmp_path / "runs").rglob("log.jsonl"):
        points = [json.loads(line) for line in log.read_text().splitlines()]
        assert points[-1]["flops"] == pytest.approx(1e8, rel=0.05)
        assert points[-1]["iter"] == points[0]["config"]["max_iters"]
    done = run("experiments.scaling", "fit", f"--runs={tmp_path}/runs", f"--out={tmp_path}/out",
               "--samples=10")
    assert done.returncode == 0 and "1 runs of 1 structures" in done.stdout, done.stderr
    assert (tmp_path / "out" / "frontier.svg").exists()
