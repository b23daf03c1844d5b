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

config/<label>.py, the plan, a structure's own keys and the command line follow each other, and a later one wins: max_iters
on the command line, say, over the plan's flops.
"""
import sys

import configurator
from experiments import launcher

# sweep
runs: str = "out-scaling"       # folder of the runs; fit reads every log.jsonl below it (several: comma-separated)
jobs: int = 1                   # runs at a time on this machine
gpus: int = 0                   # GPUs of each run, the next ones for each job; 0: whatever there is, for all
program: str = "train.py"       # what is launched
expiry: float = 900.0           # seconds without a sign of life after which a run is anyone's again
wait: bool = True               # when only other machines' runs are left, wait, and take over those whose claim expires
dry_run: bool = False           # list the runs and end
# fit and plot
base: str | None = None         # structure that multipliers are against; None: dense, where there are runs of it
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
    if command == "sweep":
        if not rest or rest[0].startswith("-"):
            configurator.fail("sweep needs a plan: python scaling.py sweep plans/cpu.py")
        return command, rest[0], *launcher.split_flags(__file__, rest[1:])
    return command, None, rest, []


command, plan_path, arguments, settings_for_all = split_arguments(sys.argv[1:])
config = configurator.configure(globals(), arguments)
globals().update(config)

import contextlib
import functools
import itertools
import math
import os
import runpy
import signal
import subprocess
import time
import types
import uuid

from configurator import HERE, fail, show
from experiments.launcher import TRAIN, Claim, Run, clock, final_loss, last_words, launch, make_run, shared_time, speed, stop

STANDS_FOR = dict(head_size="n_head", flops="max_iters", evals="eval_interval")     # a plan's keys, and those they decide

# ---- Plans ----------------------------------------------------------------------------------------------------------

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
            if name in STANDS_FOR:
                each = list(value.values()) if isinstance(value, dict) and name == "flops" else value
                for v in each if isinstance(each, list) else [each]:
                    if isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 < v < math.inf:
                        raise ValueError(f"{name} takes positive numbers, not {show(value)}")
                checked[name] = value
            elif name not in keys or name in ("out_dir", "init_from"):
                known = [*keys, *STANDS_FOR, "structures"]
                raise ValueError(f"unknown key {show(name)}: {configurator.nearest(name, known)}")
            else:
                coerce = functools.partial(configurator.coerce, keys[name])
                checked[name] = [coerce(v) for v in value] if isinstance(value, list) else coerce(value)
        except ValueError as e:
            fail(f"{where}: {e}")
    return checked


def override(values: dict, more: dict, where: str) -> dict:
    """The values, and more over them: what decides one of these no longer does. Both at once end in one sentence."""
    for key, decided in STANDS_FOR.items():
        if key in more and decided in more:
            fail(f"{where}: {key} and {decided} decide the same: set one of them")
        if key in more or decided in more:
            values = {k: v for k, v in values.items() if k not in (key, decided)}
    return values | more


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
        where = f"{path}, {label}"
        values = override(configurator.structure_config(label) if known else {}, plan, path)
        values = override(override(values, check_values(where, own, keys), where), for_all, "the command line")
        axes = {k: v for k, v in values.items() if isinstance(v, list)}
        for point in itertools.product(*axes.values()):
            values |= dict(zip(axes, point))
            try:
                run = make_run(label, values, defaults, runs)
            except ValueError as e:
                fail(f"{where}, {', '.join(f'{k} = {v}' for k, v in zip(axes, point))}: {e}")
            if run.name not in found or run.max_iters > found[run.name].max_iters:
                found[run.name] = run
    return sorted(found.values(), key=lambda run: run.flops)


# ---- Sweep ----------------------------------------------------------------------------------------------------------

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


def failed_since(run: Run, started: float) -> bool:
    """Has this or another machine tried this run since then, in vain?"""
    with contextlib.suppress(OSError):
        return os.stat(os.path.join(run.folder, "failed.txt")).st_mtime >= started
    return False


def sweep(planned: list[Run]) -> list[Run]:
    """Make every run that is not there; returns those that failed.

    One loop and no threads: it looks at the launched processes, touches their claims, fills free jobs with runs whose
    claim it gets, and tells how far things are.
    """
    os.makedirs(runs, exist_ok=True)
    token = uuid.uuid4().hex
    started, pause = shared_time(runs, token), min(1.0, expiry / 10)
    finished = [run for run in planned if final_loss(run) is not None]
    pending = [run for run in planned if run not in finished]
    active: dict[int, tuple[Run, Claim, subprocess.Popen]] = {}
    failed: list[Run] = []
    total, last_look, last_told = len(planned), -math.inf, time.monotonic()    # -inf: look for runs to claim at once
    print(f"{total} runs, {sum(run.flops for run in planned):.3g} FLOPs; {len(finished)} finished before", flush=True)

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
                    last_look = -math.inf
                    tell(run, "taken over by another machine, since this one did not stir for too long")
                else:
                    os.utime(claim.path)
            free = [job for job in range(jobs) if job not in active]
            if free and time.monotonic() - last_look > 5 * pause:
                last_look, now = time.monotonic(), shared_time(runs, token)
                for run in [r for r in pending if all(r is not a for a, *_ in active.values())]:
                    if final_loss(run) is not None or failed_since(run, started):
                        others = finished if final_loss(run) is not None else failed
                        pending.remove(run)
                        others.append(run)
                        tell(run, "finished elsewhere" if others is finished else f"FAILED elsewhere: {last_words(run)}")
                    elif free and (claim := Claim.take(run.folder, now, expiry)):
                        if final_loss(run) is not None:     # finished between the look and the claim
                            claim.release()
                            continue
                        with contextlib.suppress(FileNotFoundError):
                            os.remove(os.path.join(run.folder, "failed.txt"))
                        job = free.pop(0)
                        active[job] = run, claim, launch(run, job, jobs=jobs, gpus=gpus, program=program)
                        claim.write([os.getpid(), active[job][2].pid])
                if pending and not active and not wait:
                    break
            if time.monotonic() - last_told > 60:
                last_told, left = time.monotonic(), time_left(pending, finished)
                print("  running: " + (", ".join(f"{run.name} {speed(run)[0] / run.max_iters:.0%}"
                                                 for run, *_ in active.values()) or "others' runs")
                      + (f" | left about {clock(left)}" if left is not None else ""), flush=True)
            if active:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    next(iter(active.values()))[2].wait(pause)
            elif pending:
                time.sleep(pause)
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
    planned = expand(plan_path)
    if dry_run:
        for run in planned:
            its, ms = speed(run)
            print(f"{run.name:60s} {run.max_iters:8,} iterations {run.flops:9.3g} FLOPs  "
                  + ("finished" if final_loss(run) is not None else f"at iteration {its}" if its else "to do"))
        return print(f"{len(planned)} runs, {sum(run.flops for run in planned):.3g} FLOPs")
    launcher.check_gpus(jobs, gpus)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = sweep(planned)
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
    from experiments.scaling import report as scaling_report
    from experiments.scaling import plot as scaling_plot
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
