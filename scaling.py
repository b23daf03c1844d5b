"""Compute-optimal scaling laws: run a plan, fit what its runs measured, draw it.

    python scaling.py sweep plans/cpu.py                        the runs of a plan, one at a time; the same again goes on
    python scaling.py sweep plans/cpu.py --dry_run=True         what it would run, and what is there already
    python scaling.py sweep plans/paper.py --jobs=8 --gpus=1    eight at a time, each on a GPU of its own
    python scaling.py fit --runs=out-scaling                    tables, csv and figures from every log.jsonl below a folder
    python scaling.py plot                                      the figures again, from what fit wrote

A plan is a Python file that sets keys of train.py, and `sweep` takes them on the command line too, for all runs of the
plan. A list is an axis of the grid. Besides:

    structures  {label: {keys of its own}}; config/<label>.py says what the structure is, or the keys themselves
    head_size   n_head = n_embd / head_size
    flops       training FLOPs, instead of max_iters: a number, a list, or {n_embd: number}
    evals       evaluations of a run, instead of eval_interval

A run's folder is named by its settings, so that a finished one is never made again and an interrupted one goes on. Where
the learning rate is constant, shorter runs are the beginnings of longer ones: the largest budget alone is run, and a
plan whose budgets are raised goes on from there. Any number of machines that share a folder may sweep the same plan at
once: a run belongs to who creates its claim file, until that file has not been touched for `expiry` seconds.
"""
import sys

import configurator

# sweep
runs: str = "out-scaling"       # folder of the runs; fit reads every log.jsonl below it (several: comma-separated)
jobs: int = 1                   # runs at a time on this machine
gpus: int = 0                   # GPUs of each run, the next ones for each job; 0: whatever there is, for all
program: str = "train.py"       # what is launched
expiry: float = 900.0           # seconds without a sign of life after which a run is anyone's again
wait: bool = True               # when only other machines' runs are left, wait, and take over those whose claim expires
dry_run: bool = False           # list the runs and end
# fit and plot
base: str = "dense"             # structure that multipliers are against
floor: float | None = None      # L∞ of every structure, in nats per token; None: fitted, each its own
min_flops: float | None = None  # the frontier begins here; None: where the smallest size is the best one
max_flops: float | None = None  # and ends here; None: where the largest size is the best one
bench: str = ""                 # bench.py's json files whose training steps say the seconds, not the runs: they shared a machine
samples: int = 300              # bootstrap samples
level: float = 0.9              # probability of the intervals
out: str = "results/scaling"    # folder of the tables and figures


def split_arguments(arguments: list[str]) -> tuple[str, str | None, list[str], list[str]]:
    """(command, plan, flags of this file, flags of train.py)."""
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return "", None, ["--help"], []
    command, *rest = arguments or [""]
    if command not in ("sweep", "fit", "plot"):
        configurator.fail(f"the first word must be sweep, fit or plot; got {command!r}")
    plan, own = None, set(configurator.read_keys(__file__))
    if command == "sweep":
        if not rest or rest[0].startswith("-"):
            configurator.fail("sweep needs a plan: python scaling.py sweep plans/cpu.py")
        plan, *rest = rest
        keys = set(configurator.read_keys(TRAIN)) - own
        ours = [a for a in rest if a.partition("=")[0].removeprefix("--").replace("-", "_") not in keys]
        return command, plan, ours, [a for a in rest if a not in ours]
    return command, plan, rest, []


HERE = configurator.HERE
TRAIN = HERE + "/train.py"
command, plan_path, arguments, settings_for_all = split_arguments(sys.argv[1:])
config = configurator.configure(globals(), arguments)
globals().update(config)

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import runpy
import signal
import socket
import subprocess
import time
import types
import uuid

from configurator import fail, show

# settings that do not change what is learned or measured, and so are no part of a run's name
ASIDE = ("out_dir", "init_from", "eval_interval", "log_interval", "sample_tokens", "wandb_log", "wandb_project",
         "wandb_run_name")
PLAN_KEYS = ("structures", "head_size", "flops", "evals")

# ---- Plans ----------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Run:
    label: str          # its structure, as figures call it
    settings: dict      # keys of train.py, all but out_dir and init_from
    flops: float        # training FLOPs of the whole run

    @property
    def max_iters(self) -> int:
        return self.settings["max_iters"]

    @functools.cached_property
    def name(self) -> str:
        """The settings that differ most, and a hash of all: at a constant rate the length is not one of them."""
        s = self.settings
        aside = ASIDE if s.get("decay_lr", True) else (*ASIDE, "max_iters")
        contents = json.dumps({k: v for k, v in sorted(s.items()) if k not in aside})
        parts = [re.sub(r"[^\w.+-]+", "_", self.label), f"d{s['n_embd']}", f"l{s['n_layer']}", f"lr{s['learning_rate']:g}",
                 f"s{s['seed']}", *([f"i{s['max_iters']}"] if "max_iters" not in aside else []),
                 hashlib.sha256(contents.encode()).hexdigest()[:8]]
        return "-".join(parts)

    @property
    def folder(self) -> str:
        return os.path.join(runs, self.name)


def read_plan(path: str) -> dict:
    """{key: value} of a plan file, each value of the type that train.py takes; whatever is wrong ends in one sentence."""
    path = next((p for p in (path, os.path.join(HERE, path)) if os.path.isfile(p)), None) or fail(
        f"there is no plan {show(path)}: give a file, such as one in plans/")
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        fail(f"{path}{configurator.describe(e, path)}")
    plan = {k: v for k, v in values.items() if not (k.startswith("_") or callable(v) or isinstance(v, types.ModuleType))}
    if not isinstance(plan.get("structures"), dict) or not plan["structures"]:
        fail(f"{path}: structures must be a dictionary {{label: {{keys of its own}}}}; got {show(plan.get('structures'))}")
    for label, own in plan["structures"].items():
        if not isinstance(own, dict):
            fail(f"{path}: structures[{label!r}] must be a dictionary of keys of its own; got {show(own)}")
    return plan


def check_values(where: str, values: dict, keys: dict) -> dict:
    """The values, each coerced to its key's type, lists element by element; unknown ones end in one sentence."""
    checked = {}
    for name, value in values.items():
        try:
            if name in ("head_size", "flops", "evals"):
                each = list(value.values()) if isinstance(value, dict) and name == "flops" else value
                for v in each if isinstance(each, list) else [each]:
                    if isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 < v < math.inf:
                        raise ValueError(f"{name} takes positive numbers, not {show(value)}")
                checked[name] = value
            elif name not in keys or name in ("out_dir", "init_from"):
                raise ValueError(f"unknown key {show(name)}: {configurator.nearest(name, [*keys, *PLAN_KEYS])}")
            else:
                coerce = functools.partial(configurator.coerce, keys[name])
                checked[name] = [coerce(v) for v in value] if isinstance(value, list) else coerce(value)
        except ValueError as e:
            fail(f"{where}: {e}")
    return checked


@functools.cache
def vocabulary(dataset: str) -> int:
    from data.common import open_dataset
    try:
        return open_dataset(dataset if os.path.isdir(dataset) else os.path.join(HERE, "data", dataset))[0]["vocab_size"]
    except ValueError as e:
        fail(str(e))


@functools.cache
def block_flops(arguments: tuple) -> tuple[int, int]:
    """Forward FLOPs per token of (a block, the output layer) of a model with these GPTConfig fields. Raises ValueError."""
    import torch
    from model import GPT, GPTConfig
    with torch.device("meta"):
        model = GPT(GPTConfig(**dict(arguments)))
    return model.flops_per_token(False), model.flops_per_token() - model.flops_per_token(False)


def make_run(label: str, values: dict, defaults: dict) -> Run:
    """One point of the grid as a run: budgets turned into iterations. Raises ValueError where no such model can be made."""
    from model import GPTConfig
    values = dict(values)
    head_size, budget, evals = (values.pop(k, None) for k in ("head_size", "flops", "evals"))
    s = {k: v for k, v in values.items()}
    for key in ("n_embd", "n_layer", "learning_rate", "seed"):
        s.setdefault(key, defaults[key])
    if head_size:
        if s["n_embd"] % head_size:
            raise ValueError(f"n_embd = {s['n_embd']} is no multiple of head_size = {head_size}")
        s["n_head"] = int(s["n_embd"] // head_size)
    full = defaults | s
    fields = {f.name: full[f.name] for f in dataclasses.fields(GPTConfig) if f.name in full}
    block, output = block_flops(tuple(sorted((fields | dict(n_layer=1, vocab_size=vocabulary(full["dataset"]))).items())))
    per_token = 3 * (s["n_layer"] * block + output)
    per_iter = per_token * full["gradient_accumulation_steps"] * full["batch_size"] * full["block_size"]
    if isinstance(budget, dict):
        if s["n_embd"] not in budget:
            raise ValueError(f"flops has no budget for n_embd = {s['n_embd']}")
        budget = budget[s["n_embd"]]
    if budget:
        s["max_iters"] = max(1, round(budget / per_iter))
    s.setdefault("max_iters", defaults["max_iters"])
    if evals:
        s["eval_interval"] = max(1, math.ceil(s["max_iters"] / evals))
    return Run(label, s, float(per_iter * s["max_iters"]))


def expand(path: str) -> list[Run]:
    """The runs of a plan, the cheapest first."""
    keys = configurator.read_keys(TRAIN)
    defaults = {k.name: k.default for k in keys.values()}
    plan = read_plan(path)
    structures = plan.pop("structures")
    plan = check_values(path, plan, keys)
    for_all = {}
    for argument in settings_for_all:
        name, text = configurator.split_flag(argument, keys)
        for_all[name] = configurator.parse(keys[name], text)
    found: dict[str, Run] = {}
    for label, own in structures.items():
        known = os.path.exists(os.path.join(HERE, "config", f"{label}.py"))
        if not known and "struct" not in own:
            fail(f"{path}: there is no config/{label}.py, so structures[{label!r}] must set struct")
        values = (configurator.structure_config(label) if known else {}) | plan
        values |= check_values(f"{path}, {label}", own, keys) | for_all
        axes = {k: v for k, v in values.items() if isinstance(v, list)}
        for point in itertools.product(*axes.values()):
            values |= dict(zip(axes, point))
            try:
                run = make_run(label, values, defaults)
            except ValueError as e:
                fail(f"{path}, {label}, {', '.join(f'{k} = {v}' for k, v in zip(axes, point))}: {e}")
            if run.name not in found or run.max_iters > found[run.name].max_iters:
                found[run.name] = run
    return sorted(found.values(), key=lambda run: run.flops)


# ---- Claims: a run belongs to the newest of its files claim.1, claim.2, ..., as long as that one lives ---------------

def here() -> str:
    """This machine, or container: process numbers mean something within it alone."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as f:
            parts += [f.read().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def shared_time(token: str) -> float:
    """The time by the clock of the folder's file system, which all machines share."""
    path = os.path.join(runs, f".clock.{token}")
    with open(path, "w"):
        os.utime(path)
    return os.stat(path).st_mtime


def newest_claim(folder: str) -> int:
    """Number of the newest claim of a run, 0 where there is none."""
    numbers = [int(n) for name in os.listdir(folder) if name.startswith("claim.") and (n := name[6:]).isdecimal()]
    return max(numbers, default=0)


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def claim_lives(folder: str, number: int, now: float) -> bool:
    """Is somebody at work? Not where all its processes were of this machine and are gone; else by the last sign of life.

    A log that grows is one too: train.py goes on when the sweep that launched it is killed.
    """
    path, times = os.path.join(folder, f"claim.{number}"), []
    for file in (path, os.path.join(folder, "log.jsonl")):
        with contextlib.suppress(OSError):
            times.append(os.stat(file).st_mtime)
    try:
        with open(path) as f:
            claim = json.load(f)
        if os.name == "posix" and claim["here"] == here() and not any(map(process_exists, claim["processes"])):
            return False
    except FileNotFoundError:
        return True     # released at this moment: look again later
    except (OSError, ValueError, KeyError, TypeError):
        pass            # being written
    return now - max(times, default=0.0) < expiry


class Claim:
    """A claim that this process holds. The next number is taken by exclusive creation, which one process alone can do;
    no claim but one's own is ever removed while it could be the newest."""

    def __init__(self, folder: str, number: int, token: str):
        self.folder, self.number, self.token = folder, number, token
        self.path = os.path.join(folder, f"claim.{number}")

    @classmethod
    def take(cls, folder: str, now: float) -> "Claim | None":
        os.makedirs(folder, exist_ok=True)
        last = newest_claim(folder)
        if last and claim_lives(folder, last, now):
            return None
        claim = cls(folder, last + 1, uuid.uuid4().hex)
        try:
            os.close(os.open(claim.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return None
        claim.write([os.getpid()])
        return claim

    def write(self, processes: list[int]) -> None:
        with open(self.path, "w") as f:
            json.dump(dict(here=here(), processes=processes, token=self.token), f)

    def held(self) -> bool:
        """Is it still ours? Another takes over where this process slept for longer than `expiry`."""
        try:
            with open(self.path) as f:
                return json.load(f)["token"] == self.token and newest_claim(self.folder) == self.number
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def release(self) -> None:
        for number in range(1, self.number + 1):    # its own last: until then nobody can take a lower one
            with contextlib.suppress(OSError):
                os.remove(os.path.join(self.folder, f"claim.{number}"))


# ---- Sweep ----------------------------------------------------------------------------------------------------------

def read_log(folder: str) -> list[dict]:
    """The lines of log.jsonl; a line that is only half there is left out."""
    points = []
    with contextlib.suppress(OSError):
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    points.append(json.loads(line))
    return points


def final_loss(run: Run) -> float | None:
    """Validation loss at the end of a run, None where it has not come to its end."""
    ends = [p["val_loss"] for p in read_log(run.folder) if p.get("type") == "eval" and p["iter"] >= run.max_iters]
    return ends[-1] if ends else None


def speed(run: Run) -> tuple[int, float | None]:
    """(iterations done, median ms of one, None where nothing is known yet)."""
    points = [p for p in read_log(run.folder) if "iter" in p]
    times = sorted(p["ms_per_iter"] for p in points if "ms_per_iter" in p)
    return max((p["iter"] for p in points), default=0), times[len(times) // 2] if times else None


def time_left(pending: list[Run], done: list[Run]) -> float | None:
    """Seconds for the rest of these runs: by their own speed, else by that of others per FLOP, of the same structure first."""
    speeds = {run.name: speed(run) for run in (*pending, *done)}
    known = [(run, ms * run.max_iters / run.flops) for run in (*pending, *done) if (ms := speeds[run.name][1])]
    total = 0.0
    for run in pending:
        its, ms = speeds[run.name]
        per_flop = [rate for other, rate in known if other.label == run.label] or [rate for _, rate in known]
        if ms is None and not per_flop:
            return None
        ms = ms or sum(per_flop) / len(per_flop) * run.flops / run.max_iters
        total += max(0, run.max_iters - its) * ms / 1e3
    return total / jobs


def clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def launch(run: Run, job: int) -> subprocess.Popen:
    """Start train.py on a run, or let it go on; what it prints goes into output.txt."""
    threads = max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // jobs)
    environment = os.environ | dict(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", str(threads)))
    start = [sys.executable]
    if gpus:
        visible = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g] or list(map(str, range(jobs * gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[job * gpus:(job + 1) * gpus])
    if gpus > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    flags = [f"--{k}={','.join(map(repr, v)) + ',' if isinstance(v, tuple) else v}" for k, v in run.settings.items()]
    with open(os.path.join(run.folder, "settings.json"), "w", encoding="utf-8") as f:
        json.dump(dict(label=run.label, settings=run.settings), f, indent=1)
    with open(os.path.join(run.folder, "output.txt"), "a") as output:
        return subprocess.Popen([*start, os.path.join(HERE, program), *flags, f"--out_dir={run.folder}",
                                 "--init_from=auto"],
                                stdout=output, stderr=subprocess.STDOUT, env=environment)


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_words(run: Run) -> str:
    with contextlib.suppress(OSError):
        with open(os.path.join(run.folder, "output.txt"), errors="replace") as f:
            return (f.read().strip().splitlines() or ["it said nothing"])[-1]
    return "it said nothing"


def failed_since(run: Run, started: float) -> bool:
    """Has this or another machine tried this run since then, in vain?"""
    with contextlib.suppress(OSError):
        return os.stat(os.path.join(run.folder, "failed.txt")).st_mtime >= started
    return False


def sweep(todo: list[Run]) -> list[Run]:
    """Make every run that is not there; returns those that failed.

    One loop and no threads: it looks at the launched processes, touches their claims, fills free jobs with runs whose
    claim it gets, and tells how far things are.
    """
    os.makedirs(runs, exist_ok=True)
    token = uuid.uuid4().hex
    started, pause = shared_time(token), min(1.0, expiry / 10)
    finished = [run for run in todo if final_loss(run) is not None]
    pending = [run for run in todo if run not in finished]
    active: dict[int, tuple[Run, Claim, subprocess.Popen]] = {}
    failed: list[Run] = []
    total, last_look, last_told = len(todo), -math.inf, time.monotonic()    # -inf: look for runs to claim at once
    print(f"{total} runs, {sum(run.flops for run in todo):.3g} FLOPs; {len(finished)} finished before", flush=True)

    def tell(run: Run, what: str) -> None:
        print(f"[{len(finished) + len(failed)}/{total}] {run.name}: {what}", flush=True)

    def close(run: Run, claim: Claim, status: int) -> None:
        """What became of a run whose process has ended; its claim is let go after that is on disk."""
        loss = final_loss(run)
        pending.remove(run)
        if status == 0 and loss is not None:
            finished.append(run)
            its, ms = speed(run)
            left = time_left(pending, finished)
            tell(run, f"val loss {loss:.4f}, {clock((ms or 0) * run.max_iters / 1e3)}"
                 + (f" | left about {clock(left)}" if pending and left is not None else ""))
        else:
            failed.append(run)
            what = f"ended with status {status}" if status else f"ended without reaching iteration {run.max_iters}"
            tell(run, f"FAILED, {what}: {last_words(run)}")
            with open(os.path.join(run.folder, "failed.txt"), "w") as f:
                f.write(f"{what}: {last_words(run)}\n")
        claim.release()

    try:
        while pending:
            for job, (run, claim, process) in list(active.items()):
                if process.poll() is not None:
                    del active[job]
                    close(run, claim, process.returncode)
                    last_look = -math.inf
                elif not claim.held():
                    del active[job]
                    stop(process)
                    tell(run, "taken over by another machine, since this one did not stir for too long")
                else:
                    os.utime(claim.path)
            free = [job for job in range(jobs) if job not in active]
            if free and time.monotonic() - last_look > 5 * pause:
                last_look, now = time.monotonic(), shared_time(token)
                for run in [r for r in pending if all(r is not a for a, *_ in active.values())]:
                    if final_loss(run) is not None or failed_since(run, started):
                        others = finished if final_loss(run) is not None else failed
                        pending.remove(run)
                        others.append(run)
                        tell(run, "finished elsewhere" if others is finished else f"FAILED elsewhere: {last_words(run)}")
                    elif free and (claim := Claim.take(run.folder, now)):
                        if final_loss(run) is not None:     # finished between the look and the claim
                            claim.release()
                            continue
                        with contextlib.suppress(FileNotFoundError):
                            os.remove(os.path.join(run.folder, "failed.txt"))
                        job = free.pop(0)
                        active[job] = run, claim, launch(run, job)
                        claim.write([os.getpid(), active[job][2].pid])
                if pending and not active and not wait:
                    break
            if time.monotonic() - last_told > 60:
                last_told, left = time.monotonic(), time_left(pending, finished)
                print("  running: " + (", ".join(f"{run.name} {speed(run)[0] / run.max_iters:.0%}"
                                                 for run, *_ in active.values()) or "others' runs")
                      + (f" | left about {clock(left)}" if left is not None else ""), flush=True)
            time.sleep(pause if pending else 0)
    finally:
        for run, claim, process in active.values():
            stop(process)
            claim.release()
        os.remove(os.path.join(runs, f".clock.{token}"))
    print(f"{len(finished)} of {total} finished, {len(failed)} failed"
          + (f", {len(pending)} in the hands of others" if pending else ""), flush=True)
    return failed


def run_sweep() -> None:
    for key in ("jobs", "expiry"):
        if config[key] <= 0:
            fail(f"{key} must be positive; got {config[key]}")
    if gpus < 0:
        fail(f"gpus must not be negative; got {gpus}")
    todo = expand(plan_path)
    if dry_run:
        for run in todo:
            its, ms = speed(run)
            print(f"{run.name:60s} {run.max_iters:8,} iterations {run.flops:9.3g} FLOPs  "
                  + ("finished" if final_loss(run) is not None else f"at iteration {its}" if its else "to do"))
        return print(f"{len(todo)} runs, {sum(run.flops for run in todo):.3g} FLOPs")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = sweep(todo)
    except OSError as e:
        fail(str(e))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoints", file=sys.stderr)
        sys.exit(130)
    if failed:
        print("failed: " + ", ".join(run.name for run in failed))
    sys.exit(1 if failed else 0)


def main() -> None:
    if command == "sweep":
        return run_sweep()
    import scaling_report
    import scaling_plot
    if not 0 < level < 1:
        fail(f"level must be between 0 and 1; got {level}")
    if samples < 10:
        fail(f"samples must be at least 10; got {samples}")
    try:
        if command == "fit":
            scaling_report.fit(runs.split(","), out, base=base, floor=floor, window=(min_flops, max_flops),
                               samples=samples, level=level, bench=[path for path in bench.split(",") if path])
        scaling_plot.plot(out)
    except (ValueError, OSError) as e:
        fail(str(e))
    except ImportError:
        print("no figures: they need matplotlib (pip install -r requirements-dev.txt)")


if __name__ == "__main__":
    main()
