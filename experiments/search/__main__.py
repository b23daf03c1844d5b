"""Search for good structures: θ, and experts where asked for, at equal training FLOPs, by Optuna around runs of train.py.

    python search.py run config/cpu.py --jobs=2             search; the same command goes on, from any number of processes
    python search.py run config/cpu.py --dry_run=True       the request, the named structures, how many random θ have one
    python search.py report                                 ranked table, csv, figure, importances, best.py, follow.py
    python scaling.py sweep results/search/follow.py --runs=out-search/follow --jobs=2
                                                            the best and dense, with more budget and several seeds

`run` takes config files and keys of train.py too: those that say what all trials share (data, batch, layers, seed ...).
Every trial is a model whose FLOPs per token are those of a dense model of `dense_width`, and costs `flops` in all: its
width and rank are chosen to that end (search_space.py). Evaluations go to Optuna as they come, and its pruner ends trials
that are behind at an equal share of the budget. What has failed, but for a loss that is not finite, is tried again by the next
`run`.

Needs optuna (pip install -r requirements-search.txt). State: the study, a journal in `out` unless `storage` says
otherwise, and a folder for each point, in one of the study's in `out`. Where several machines search, they share both.
A trial belongs to who holds the claim file in its folder; one whose processes are dead, or which has not stirred for
`expiry` seconds, is taken up by whoever finds it, and its runs go on from their checkpoints.
"""
import sys

import configurator
from experiments import launcher

for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors="replace")    # where there is no θ

# run
out: str = "out-search"         # folder of the runs, and of the study
storage: str | None = None      # a database URL that Optuna takes; None: the file study.journal in `out`
study: str = "search"           # name of the study in its storage
jobs: int = 1                   # trials at a time of this process
gpus: int = 0                   # GPUs of each run, the next ones for each job; 0: whatever there is, for all
program: str = "train.py"       # what is launched
expiry: float = 900.0           # seconds without a sign of life after which a trial is anyone's
max_failures: int = 5           # end after so many failed trials in a row
dry_run: bool = False           # tell what would be searched, and end
# search
trials: int = 40                # trials that are trained, pruned ones included, by all processes together
named: bool = True              # the named structures come first, and are not pruned
sampler: str = "tpe"            # 'tpe' or 'random'
sampler_seed: int | None = None  # None: a different one each time; several processes must not share one
pruner: str = "halving"         # 'halving' (successive halving), 'hyperband' or 'none'
first_rung: int = 2             # evaluations before the pruner's first decision
reduction: int = 2              # one in so many goes on at each rung: at first_rung · reduction^k evaluations
# equal compute
dense_width: int = 96           # FLOPs per token are those of a dense model of this width
flops: float = 3e12             # training FLOPs of a trial
tolerance: float = 0.05         # relative, of FLOPs per token
widths: tuple | None = None     # to choose from; None: multiples of 4 and n_head, a third of dense_width to six times it
learning_rates: tuple = (3e-3,)  # of every trial: the best counts, all are paid for
experts: tuple = (0,)           # numbers of experts to choose from; 0: none
top_ks: tuple = (2,)            # experts per token to choose from
max_nu: float = 1.0             # θ above this compute intensity are left out: they cost more than dense and express no more
evals: int = 8                  # evaluations of a run
# report
results: str = "results/search"  # folder of the report
dense: str | None = None        # fit.json of scaling.py, or folder of dense runs, to compare with; None: the study's dense
top: int = 3                    # structures of follow.py, besides dense
times: float = 4.0              # budget of a run there, in those of a trial
seeds: tuple = (1, 2)           # of each


def split_arguments(arguments: list[str]) -> tuple[str, list[str], list[str]]:
    """(command, flags of this file, config files and flags of train.py)."""
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return "", ["--help"], []
    command, *rest = arguments or [""]
    if command not in ("run", "report"):
        configurator.fail(f"the first word must be run or report; got {command!r}")
    if command == "report":
        return command, rest, []
    files = [a for a in rest if not a.startswith("-") and a.strip()]
    ours, theirs = launcher.split_flags(__file__, [a for a in rest if a not in files])
    return command, ours, files + theirs


command, own_arguments, train_arguments = split_arguments(sys.argv[1:])
config = configurator.configure(globals(), own_arguments)
globals().update(config)

import dataclasses
import datetime
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import time
import uuid

from configurator import fail
from experiments.launcher import Claim, Run, check_gpus, clock, last_words, launch, read_log, shared_time, speed, stop

from experiments.search.space import CHOSEN, LEVELS, STRUCTURAL, Point, Space, theta_of
from experiments.search.study import begin, make_pruner, make_sampler, open_study, propose, settled, trained, try_again

import optuna    # after search_study, which says what to do where it is missing
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.trial import TrialState

# ---- What is asked for ----------------------------------------------------------------------------------------------

def make_space() -> Space:
    """The space of this command, or one sentence about what is wrong with its keys. Raises ValueError, in one too."""
    for key in ("jobs", "expiry", "max_failures", "trials", "first_rung", "dense_width", "flops", "tolerance", "evals",
                "max_nu"):
        if config[key] <= 0:
            fail(f"{key} must be positive; got {config[key]}")
    if reduction < 2:
        fail(f"reduction must be at least 2; got {reduction}")
    for key, options in dict(sampler=("tpe", "random"), pruner=("halving", "hyperband", "none")).items():
        if config[key] not in options:
            fail(f"{key} must be one of {', '.join(options)}; got {config[key]!r}")
    for key, least in dict(widths=1, experts=0, top_ks=1, learning_rates=0).items():
        if config[key] is not None and (not config[key] or any(v < least for v in config[key])):
            fail(f"{key} takes numbers of at least {least}; got {config[key]}")
    for key in ("widths", "experts", "top_ks"):
        if any(v != int(v) for v in config[key] or ()):
            fail(f"{key} takes whole numbers; got {config[key]}")
    whole = {key: tuple(map(int, config[key])) for key in ("widths", "experts", "top_ks") if config[key]}
    globals().update(whole)
    if 1 in experts:
        fail(f"experts takes 0, for none, and numbers of at least 2; got {experts}")
    settings = configurator.configure({"__file__": launcher.TRAIN}, train_arguments)
    defaults = {k.name: k.default for k in configurator.read_keys(launcher.TRAIN).values()}
    flags = {a.partition("=")[0].removeprefix("--").replace("-", "_") for a in train_arguments if a.startswith("-")}
    for key in CHOSEN:
        if key in flags or key in STRUCTURAL and settings[key] != defaults[key]:
            fail(f"{key} is what the search chooses: python search.py --help has the keys that it chooses by")
    for key in ("n_layer", "n_head", "block_size", "batch_size", "gradient_accumulation_steps"):
        if settings[key] < 1:
            fail(f"{key} must be at least 1; got {settings[key]}")
    if any(experts) and min(top_ks) > max(experts):
        fail(f"top_ks = {top_ks} are all more than there are experts: {max(experts)}")
    if dense_width % settings["n_head"]:
        fail(f"dense_width must be a multiple of n_head = {settings['n_head']}; got {dense_width}")
    shared = {k: v for k, v in settings.items() if k not in CHOSEN and v != defaults[k]}
    for key in ("n_layer", "n_head", "block_size", "batch_size", "gradient_accumulation_steps", "dataset", "seed",
                "decay_lr"):
        shared[key] = settings[key]     # a change of train.py's defaults must not change a study
    step = math.lcm(4, shared["n_head"])
    chosen = tuple(sorted(set(widths or (w for w in range(step, 6 * dense_width + 1, step) if w >= dense_width / 3))))
    if bad := [w for w in chosen if w % shared["n_head"]]:
        fail(f"widths must be multiples of n_head = {shared['n_head']}; got {bad[0]}")
    vocabulary = launcher.vocabulary(shared["dataset"])
    space = Space(dense_width, flops, chosen, tolerance, learning_rates, experts, top_ks, max_nu, evals, shared, vocabulary)
    tokens = math.prod(shared[k] for k in ("gradient_accumulation_steps", "batch_size", "block_size"))
    if (iterations := flops / space.flops_per_token / tokens) < (1 + tolerance) * evals / tolerance / 2:
        fail(f"flops = {flops:g} are {iterations:.0f} iterations, too few to meet them within {tolerance:.0%} by multiples "
             f"of evals = {evals}: ask for more flops, a larger tolerance, or fewer evals")
    for point in space.named().values():
        if isinstance(point, Point):
            space.runs(point, out)      # what the settings do not allow must not become a study's request
    return space


# ---- A trial at work ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Work:
    trial: optuna.trial.Trial
    point: Point
    claim: Claim
    runs: list[Run]             # one for each learning rate
    processes: list[subprocess.Popen]
    reported: set[int]          # evaluations that Optuna knows
    behind: bool                # the pruner's word on the last of them
    why: str                    # it has no runs

    @property
    def what(self) -> str:
        return f"trial {self.trial.number}, {self.point.label}, width {self.point.width}"

    def stop(self) -> None:
        for process in self.processes:
            stop(process)


def folder_of(point: str, space: Space) -> str:
    """Of a point's runs. Another request has its own, since its runs evaluate at other iterations."""
    digest = hashlib.sha256(json.dumps(space.request(), sort_keys=True).encode()).hexdigest()[:8]
    return os.path.join(out, f"{study}-{digest}", point)


def start(trial, point: Point, claim: Claim, space: Space, job: int) -> Work:
    """Launch the runs of a trial, or let them go on."""
    try:
        runs, why = space.runs(point, claim.folder), ""
    except ValueError as e:     # the trial fails, and no other
        runs, why = [], str(e)
    known = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    behind = bool(known) and is_behind(trial, max(known), space)    # who has reported it may have died before asking
    work = Work(trial, point, claim, runs, [], known, behind, why)
    for i, run in enumerate(runs):
        if final(run, space) is None and not behind:
            n = len(runs)
            work.processes.append(launch(run, job * n + i, jobs=jobs * n, gpus=gpus, program=program))
    claim.write([os.getpid(), *(p.pid for p in work.processes)])
    return work


def losses_of(run: Run) -> dict[int, float]:
    """{evaluation: validation loss} of a run, from the first after the start on; inf where the log has null, not finite."""
    every = run.settings["eval_interval"]
    return {p["iter"] // every: math.inf if p["val_loss"] is None else p["val_loss"] for p in read_log(run.folder)
            if p.get("type") == "eval" and p["iter"] and p["iter"] % every == 0}


def final(run: Run, space: Space) -> float | None:
    return losses_of(run).get(space.evals)


def is_behind(trial, step: int, space: Space) -> bool:
    """The pruner's word on the last evaluation, which it keeps, so that each is asked about; the named go to their end."""
    return step < space.evals and trial.should_prune() and "named" not in trial.user_attrs


def follow(work: Work, space: Space) -> str | None:
    """Report what is new of a trial; what it has come to, 'done', 'pruned' or 'failed', or None while it is at work.

    Of several learning rates, the best at each evaluation counts, and one that has failed is left out.
    """
    if work.behind:
        return "pruned"
    ended = [p.poll() is not None for p in work.processes]
    curves = [losses_of(run) for run in work.runs]
    alive = [c for c, run in zip(curves, work.runs) if not has_failed(run, work, space)]
    for step in sorted(set.intersection(*map(set, alive)) - work.reported) if alive else ():
        work.trial.report(min(c[step] for c in alive), step)
        work.reported.add(step)
        if is_behind(work.trial, step, space):
            return "pruned"
    if not alive:
        return "failed"
    return "done" if all(ended) else None


def has_failed(run: Run, work: Work, space: Space) -> bool:
    """Has a run ended before its end, or lost its finite loss?"""
    losses = losses_of(run)
    if math.inf in losses.values():
        return True
    running = any(p.poll() is None and f"--out_dir={run.folder}" in p.args for p in work.processes)
    return not running and final(run, space) is None


def why_failed(work: Work, space: Space) -> str:
    """What became of the runs of a failed trial."""
    words = []
    for run in work.runs:
        status = next((p.returncode for p in work.processes if f"--out_dir={run.folder}" in p.args), 0)
        words.append("diverged, its validation loss is not finite" if math.inf in losses_of(run).values() else
                     f"ended with status {status}: {last_words(run)}" if status else
                     f"ended without reaching iteration {run.max_iters}: {last_words(run)}")
    return "; ".join(dict.fromkeys(words)) or work.why


def close(found, work: Work, space: Space, outcome: str) -> None:
    """Tell Optuna what a trial has come to, with what the report needs; then end its runs, which may take a while, and let
    its claim go."""
    trial = work.trial
    if outcome == "failed":
        trial.set_user_attr("why", why_failed(work, space))
        found.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
    else:
        best = min(work.runs, key=lambda run: losses_of(run).get(max(work.reported), math.inf))
        first = next((p for p in read_log(best.folder) if p.get("type") == "run"), {})
        its, ms = speed(best)
        facts = dict(run=os.path.relpath(best.folder, out), settings=best.settings, width=work.point.width,
                     rank=work.point.rank, sizes=[str(s) for s in work.point.sizes], flops=best.flops, iterations=its,
                     flops_per_token=work.point.flops_per_token, params=first.get("params"), ms_per_iter=ms)
        for key, value in facts.items():
            trial.set_user_attr(key, value)
        if outcome == "done":
            found.tell(trial, final(best, space), skip_if_finished=True)
        else:
            found.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    work.stop()
    work.claim.release()


def is_refused(work: Work) -> bool:
    """Is a run of it locked by another that still lives, although nobody's claim said so?"""
    return any(p.poll() and "another run writes into" in last_words(run) for run in work.runs
               for p in work.processes if f"--out_dir={run.folder}" in p.args)


def attend(found, work: Work, space: Space) -> str | None:
    """Follow a trial, and close it at its end: what it has come to, 'lost' where another process has it or has told it."""
    try:
        outcome = follow(work, space) if work.claim.held() else "lost"
        if outcome is None:
            os.utime(work.claim.path)
        elif outcome == "failed" and is_refused(work):
            outcome = "lost"    # the claim stays, and expires once the log does not grow any more
        elif outcome != "lost":
            close(found, work, space, outcome)
    except UpdateFinishedTrialError:
        outcome = "lost"
    if outcome == "lost":
        work.stop()
    return outcome


def adopt(found, space: Space, mine: set[int], now: float):
    """(trial, point, claim) of a trial that nobody is at any more; None where there is none."""
    for frozen in found.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if frozen.number in mine:
            continue
        trial = optuna.trial.Trial(found, frozen._trial_id)
        if "point" not in frozen.user_attrs:    # who asked for it died before it knew what it was
            if datetime.datetime.now() - frozen.datetime_start > datetime.timedelta(seconds=expiry):
                found.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            continue
        if claim := Claim.take(folder_of(frozen.user_attrs["point"], space), now, expiry):
            told = found.get_trials(deepcopy=False)[frozen.number].state != TrialState.RUNNING
            if not told and not settled(found, trial, frozen.user_attrs["point"]):
                return trial, space.point(*space.suggest(trial)), claim
            claim.release()
    return None


# ---- The search -----------------------------------------------------------------------------------------------------

def search(found, space: Space) -> int:
    """Until there are enough trials and none is at work; returns how many of this process failed.

    One loop and no threads, as in scaling.py's sweep: it follows the trials at work, and fills free jobs, first with what
    others have left.
    """
    token, pause = uuid.uuid4().hex, min(1.0, expiry / 10)
    active: dict[int, Work] = {}
    failures = failed = 0
    os.makedirs(out, exist_ok=True)
    last_told = time.monotonic()
    try:
        while True:
            for job, work in list(active.items()):
                outcome = attend(found, work, space)
                if outcome:
                    del active[job]
                if outcome == "lost":
                    print(f"{work.what}: another process has taken it over", flush=True)
                elif outcome:
                    failures, failed = (failures + 1, failed + 1) if outcome == "failed" else (0, failed)
                    tell(found, work, outcome)
                    if failures >= max_failures:
                        raise ValueError(f"{failures} trials in a row have failed, the last: {why_failed(work, space)}")
            for job in [j for j in range(jobs) if j not in active]:
                now, mine = shared_time(out, token), {w.trial.number for w in active.values()}
                if left := adopt(found, space, mine, now):
                    active[job] = start(*left, space, job)
                    print(f"{active[job].what}: taken up where it was left", flush=True)
                elif proposal := propose(found, space, trials):
                    if claim := Claim.take(folder_of(proposal[1].name, space), now, expiry):   # else another is at it
                        active[job] = start(*proposal, claim, space, job)
                elif not active and not found.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    return failed
            if time.monotonic() - last_told > 60:
                last_told = time.monotonic()
                print("  running: " + (", ".join(f"trial {w.trial.number} {speed(w.runs[0])[0] / w.runs[0].max_iters:.0%}"
                                                 for w in active.values() if w.runs) or "others' trials"), flush=True)
            time.sleep(pause)
    finally:
        for work in active.values():
            work.stop()
            work.claim.release()
        if os.path.exists(path := os.path.join(out, f".clock.{token}")):
            os.remove(path)


def tell(found, work: Work, outcome: str) -> None:
    """A line on a trial that has ended."""
    all_trials = found.get_trials(deepcopy=False)
    counted = trained(found)
    ended = sum(t.state.is_finished() for t in counted)
    complete = [t for t in counted if t.state == TrialState.COMPLETE]
    me = all_trials[work.trial.number]
    if outcome == "failed":
        what = f"FAILED, {me.user_attrs.get('why')}"
    else:
        what = (f"val loss {me.value:.4f}" if outcome == "done" else
                f"pruned at evaluation {me.last_step} with {me.intermediate_values[me.last_step]:.4f}")
        what += f", {clock((me.user_attrs['ms_per_iter'] or 0) * me.user_attrs['iterations'] / 1e3)}"
    if complete:
        best = min(complete, key=lambda t: t.value)
        what += f" | best {best.value:.4f}, trial {best.number}, {best.user_attrs['label']}"
    print(f"[{ended}/{trials}] {work.what}: {what}", flush=True)


def describe(space: Space, draws: int = 300) -> None:
    """What would be searched: the request, the models of the named structures, the share of random θ that have one."""
    tokens = space.flops / space.flops_per_token
    print(f"{trials} trials of {space.flops:.3g} training FLOPs, {space.flops_per_token:,.0f} a token, as a dense model of "
          f"width {dense_width}: {tokens:,.0f} tokens; {len(space.widths)} widths from {space.widths[0]} to "
          f"{space.widths[-1]}")
    for name, point in space.named().items():
        if isinstance(point, Point):
            run, *_ = space.runs(point, out)
            print(f"  {point.label:32s} width {point.width:4d}  {str(point.sizes[0]):24s} {run.max_iters:7,} iterations  "
                  f"{run.flops / space.flops:.1%} of the FLOPs")
        else:
            print(f"  {name}: {point}")
    rng, intense, none = random.Random(0), 0, 0
    for _ in range(draws):
        theta = theta_of(*(rng.randrange(len(levels)) for levels in LEVELS.values()))
        try:
            space.point(theta)
        except ValueError:
            intense += theta.nu > space.max_nu + 1e-9
            none += theta.nu <= space.max_nu + 1e-9
    print(f"of {draws} random θ, {intense} are above ν = {space.max_nu:g}, {none} of the others have no width at these "
          "FLOPs")


def run() -> int:
    """Search, and sum up; the status to exit with."""
    space = make_space()
    if dry_run:
        describe(space)
        return 0
    check_gpus(jobs * len(learning_rates), gpus)
    found = open_study(storage, study, out, make_sampler(sampler, sampler_seed),
                       make_pruner(pruner, first_rung, reduction, evals))
    begin(found, space, named, first_rung)
    for name, point in space.named().items() if named else ():
        if isinstance(point, str):
            print(f"{name} is left out: {point}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if again := try_again(found):
        print(f"{again} trials that have failed are tried again")
    failed = search(found, space)
    ended = trained(found)
    counts = {s: sum(t.state == s for t in ended) for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)}
    print("{} trials to their end, {} pruned, {} failed".format(*counts.values())
          + f"; {sum('rejected' in t.user_attrs for t in found.trials)} θ without a model, "
          f"{sum('same_as' in t.user_attrs for t in found.trials)} that others had")
    return 1 if failed else 0


def main() -> None:
    try:
        if command == "run":
            sys.exit(run())
        for key in ("top", "times"):
            if not config[key] > 0:
                fail(f"{key} must be positive; got {config[key]}")
        if not seeds or any(s != int(s) or s < 0 for s in seeds):
            fail(f"seeds takes whole numbers of at least 0; got {seeds}")
        from experiments.search import report as search_report
        search_report.report(open_study(storage, study, out), out, results, dense=dense, top=top, times=times, seeds=seeds)
    except (OSError, ValueError, OptunaError) as e:
        fail(str(e))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoints", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
