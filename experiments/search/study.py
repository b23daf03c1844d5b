"""The search as an Optuna study, and its objective, which trains a point.

Optuna's heartbeats tell which trials a dead process has left. They fail, and Optuna's retry callback queues a
copy of each; its runs go on from the checkpoints in the folder of its point. User attributes of a trial:

    named                        the structure that was queued before the sampler had a choice; never pruned
    model                        its point as a dict: a trial that has one counts in the search
    rejected, same_as, surplus   why it does not count: no model, another trial has its point, one too many
    run                          facts of its best run, at its end
    why                          why it failed
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import queue
import re
import subprocess
import time
import warnings
from typing import NoReturn

import filelock

from configurator import fail, show
from experiments import launcher
from experiments.search.space import Point, Space, indices_of
from lib.log import read_log

try:
    import optuna
    import sqlalchemy  # Optuna's own
    from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
    from optuna.storages import RetryHeartbeatStaleTrialCallback
    from optuna.trial import FrozenTrial, TrialState
except ImportError:
    fail("the search needs optuna: pip install -r requirements-search.txt")

warnings.filterwarnings("ignore", category=ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.ERROR)

ATTEMPTS = 2000     # θ in a row that the sampler may ask for in vain
SKIPPED = {"rejected", "same_as", "surplus"}
DIVERGED = "diverged, its validation loss is not finite"

queue_copy = RetryHeartbeatStaleTrialCallback()     # (study, trial) -> None


# ---- The study ---------------------------------------------------------------------------------------------

def make_sampler(kind: str, seed: int | None = None) -> optuna.samplers.BaseSampler:
    """'tpe' or 'random'. TPE models the parameters jointly, since ω and ψ depend on sums of them; it counts
    running trials as bad ones, so that two processes do not ask for the same."""
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=12)


class LatestTrials:
    """A study as the pruner is to see it: a trial that was queued again counts once, as its copy, which holds
    its losses too."""

    def __init__(self, study: optuna.Study):
        self.study = study

    def get_trials(self, *_, **__) -> list[FrozenTrial]:
        return latest_trials(self.study)

    def __getattr__(self, name: str):
        return getattr(self.study, name)


class Halving(optuna.pruners.SuccessiveHalvingPruner):
    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return super().prune(LatestTrials(study), trial)


def make_pruner(kind: str, first_rung: int, reduction: int) -> optuna.pruners.BasePruner:
    """'halving' or 'none'. The resource is the number of evaluations."""
    if kind == "halving":
        return Halving(first_rung, reduction)
    return optuna.pruners.NopPruner()


def study_lock(folder: str) -> filelock.FileLock:
    """For what one process and thread may do at a time: begin a study, take a trial, give it its point."""
    return filelock.FileLock(os.path.join(folder, "study.lock"))


class LockedStorage(optuna.storages.RDBStorage):
    """SQLite has no row locks: without another lock, two workers can take the same waiting trial."""
    def __init__(self, *args, folder: str, **options):
        super().__init__(*args, **options)
        self.lock = study_lock(folder)

    def set_trial_state_values(self, *args, **options) -> bool:
        with self.lock:
            return super().set_trial_state_values(*args, **options)


def open_study(url: str | None, name: str, folder: str, *, expiry: int = 120, create: bool = False,
               **options) -> optuna.Study:
    """The study in a database: any URL that Optuna takes; None is the SQLite file study.db in the folder.
    expiry: seconds without a heartbeat until a trial is taken over. options: sampler, pruner. Raises
    ValueError if the study cannot be opened."""
    url = f"sqlite:///{os.path.join(folder, 'study.db')}" if url is None else url
    shown = re.sub(r"(//[^:/@]*):[^@/]*@", r"\1:***@", url)  # without its password
    wait = dict(connect_args=dict(timeout=100)) if url.startswith("sqlite") else {}  # while others write
    try:
        address = sqlalchemy.make_url(url)
        file = (address.database or "").removeprefix("file:")
        if not create and address.get_backend_name() == "sqlite" and not os.path.exists(file):
            raise KeyError(name)  # else SQLite would make the file
        storage = LockedStorage(url, wait, folder=folder, heartbeat_interval=max(1, expiry // 4),
                                grace_period=expiry, heartbeat_stale_trial_callback=queue_copy,
                                skip_table_creation=not create)
        if create:
            return optuna.create_study(storage=storage, study_name=name, load_if_exists=True, **options)
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        raise ValueError(f"there is no study {name!r} in {shown!r}: search first, or name another --study, "
                         "--out or --storage") from None
    except Exception as error:  # whatever a database driver raises
        error = error.__cause__ or error  # the driver's, where Optuna has words of its own
        why = (str(error).replace(url, shown) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the storage {shown!r} cannot be opened: {why}") from None


def begin(study: optuna.Study, space: Space, named: bool, first_rung: int, reduction: int = 2) -> None:
    """Queue the named structures if asked for, then store the request: a study without one has not begun.
    Raises ValueError if it has begun with another one."""
    asked, stored = space.request(), study.user_attrs.get("request")
    rungs = dict(first_rung=first_rung, reduction=reduction)
    if stored is None:
        for name, (theta, experts, top_k) in space.first().items() if named else ():
            options = dict(num_experts=(space.experts, experts), top_k=(space.top_ks, top_k))
            params = indices_of(theta) | {key: v for key, (choices, v) in options.items() if len(choices) > 1}
            study.enqueue_trial(params, user_attrs=dict(named=name), skip_if_exists=True)
        for key, value in rungs.items():
            study.set_user_attr(key, value)
        study.set_user_attr("request", asked)
    elif changed := [key for key, value in rungs.items() if study.user_attrs.get(key, value) != value]:
        raise ValueError(f"the study was begun with {changed[0]} = {study.user_attrs[changed[0]]}, not "
                         f"{rungs[changed[0]]}: give the same, or another --out")
    elif stored != asked:
        stored, asked = (request | request["settings"] | dict(settings=None) for request in (stored, asked))
        key = next(k for k in asked | stored if stored.get(k) != asked.get(k))
        raise ValueError(f"the study was begun with {key} = {show(stored.get(key))}, not "
                         f"{show(asked.get(key))}: give the same, or another --out")


def latest_trials(study: optuna.Study) -> list[FrozenTrial]:
    """All trials, but those that were queued again: their copies stand for them."""
    trials = study.get_trials(deepcopy=False)
    copied = {number for t in trials for number in RetryHeartbeatStaleTrialCallback.retry_history(t)}
    return [t for t in trials if t.number not in copied]


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of the search, each with a point of its own."""
    return [t for t in latest_trials(study) if "model" in t.user_attrs and "same_as" not in t.user_attrs]


def retry_failed(study: optuna.Study) -> int:
    """Queue copies of the failed trials, but for those that diverged: they would again. Returns how many."""
    failed = [t for t in latest_trials(study) if t.state == TrialState.FAIL
              and not t.user_attrs.keys() & SKIPPED and t.user_attrs.get("why") != DIVERGED]
    for trial in failed:
        queue_copy(study, trial)
    return len(failed)


# ---- The objective -----------------------------------------------------------------------------------------

class Unfinished(Exception):
    """A trial ends without a value."""


def end(trial: optuna.Trial, **why) -> NoReturn:
    """Raises Unfinished, once the trial has these attributes."""
    for name, value in why.items():
        trial.set_user_attr(name, value)
    raise Unfinished


class Training:
    """A run of a trial: what its log says, and the process that writes it, if one is needed."""
    def __init__(self, run: launcher.Run, evals: int):
        self.run, self.evals = run, evals
        self.error = ""     # why it has failed
        self.losses: dict[int, float] = {}  # by evaluation, from the first after the start; inf if not finite
        self.process: subprocess.Popen | None = None

    def read(self) -> None:
        """Read the log, and find out whether the run has failed."""
        status = self.process and self.process.poll()  # before the log: until it ends it may write
        every = self.run.settings["eval_interval"]
        self.losses = {p["iter"] // every: math.inf if p["val_loss"] is None else p["val_loss"]
                       for p in read_log(self.run.folder)
                       if p.get("type") == "eval" and p["iter"] and p["iter"] % every == 0}
        if math.inf in self.losses.values():
            self.error = DIVERGED
        elif status is not None and self.evals not in self.losses:
            self.error = launcher.why_ended(self.run, status)

    def launch(self, job: int, **options) -> None:
        """Start train.py, unless it is not needed, or one that has outlived its search still runs, whose log
        is then followed. Arguments: see launcher.launch."""
        is_over = self.error or self.evals in self.losses
        if self.process is None and not is_over and not launcher.is_training(self.run.folder):
            self.process = launcher.launch(self.run, job, **options)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclasses.dataclass
class Search:
    """The objective of a study, and the loop around Study.optimize."""
    study: optuna.Study
    space: Space
    out: str                    # folder of the study's runs
    trials: int                 # how many are trained, by all processes
    jobs: int = 1               # trials at a time in this one
    gpus: int = 0               # of each run
    program: str = "train.py"
    expiry: int = 120           # that of open_study
    max_failures: int = 5       # end after so many failed trials in a row

    def __post_init__(self):
        # another request has another folder, since its runs evaluate at other iterations
        digest = hashlib.sha256(json.dumps(self.space.request(), sort_keys=True).encode()).hexdigest()[:8]
        self.root = os.path.join(self.out, f"{self.study.study_name}-{digest}")
        self.interrupted, self.error = False, ""
        self.states: list[TrialState] = []      # of the trials that this process has trained
        self.skipped_in_a_row = 0
        self.free_jobs: queue.SimpleQueue[int] = queue.SimpleQueue()    # numbers: each job has its own GPUs
        for job in range(self.jobs):
            self.free_jobs.put(job)

    def interrupt(self, *_) -> None:
        """A signal handler: the search ends within a minute, with its train.py. Trials are queued again."""
        self.interrupted = True

    def run(self) -> None:
        """Search until there are enough trials, and all have ended. Raises ValueError if it cannot go on."""
        waiting = False
        while not (self.interrupted or self.error):
            if missing := self.missing():
                self.optimize(min(self.jobs, missing))
                continue
            running = sum(t.state == TrialState.RUNNING for t in counted(self.study))
            if not running:
                return
            if not waiting:
                print(f"waiting for {running} trials of other processes; those of a dead one are taken over "
                      f"{self.expiry} seconds after its last sign of life", flush=True)
            waiting = True
            time.sleep(1)
            optuna.storages.fail_stale_trials(self.study)  # Study.optimize does it too, before every trial
        if self.error:
            raise ValueError(self.error)

    def missing(self) -> int:
        """How many trials are still to be started."""
        found = counted(self.study)
        return max(0, self.trials - len(found)) + sum(t.state == TrialState.WAITING for t in found)

    def optimize(self, jobs: int) -> None:
        try:
            self.study.optimize(self, n_jobs=jobs, catch=(Unfinished,), callbacks=[self.after_trial])
        except (ValueError, UpdateFinishedTrialError) as error:
            if isinstance(error, ValueError) and not str(error).startswith("Cannot tell a"):
                raise
            print("another process has ended a trial of this one", flush=True)

    def __call__(self, trial: optuna.Trial) -> float:
        """The objective: validation loss at the end of the budget. Raises TrialPruned or Unfinished."""
        try:
            point = self.space.suggest(trial)
        except ValueError as error:
            end(trial, rejected=str(error))
        with study_lock(self.out):
            first = self.take_point(trial, point)
        if first is None:
            return self.train(trial, point)
        # the same matrices have the same value; but the very same θ would only keep the sampler where it is
        if first.params == trial.params or first.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            raise Unfinished
        for step, loss in sorted(first.intermediate_values.items()):
            trial.report(loss, step)
        if first.state == TrialState.PRUNED:
            raise optuna.TrialPruned
        return first.value

    def take_point(self, trial: optuna.Trial, point: Point) -> FrozenTrial | None:
        """Give the trial its point, or return the other trial that has it. Raises Unfinished if there are
        enough trials without this one."""
        others = [t for t in counted(self.study) if t.number != trial.number]
        first = next((t for t in others if t.user_attrs["model"]["point"] == point.name), None)
        if first is not None:
            trial.set_user_attr("same_as", first.number)
        elif trial.user_attrs.get("model", {}).get("point") == point.name:
            print(f"trial {trial.number}, {point.label}: goes on where it was left", flush=True)
        elif len(others) >= self.trials:
            end(trial, surplus=True)
        else:   # new, or of a version that made another model of this θ
            trial.set_user_attr("model", point.facts())
        return first

    def train(self, trial: optuna.Trial, point: Point) -> float:
        """Train the runs of a point, or continue them. Every process it starts ends before it returns."""
        try:
            runs = self.space.runs(point, os.path.join(self.root, point.name))
        except ValueError as error:
            end(trial, why=str(error))
        trainings = [Training(run, self.space.evals) for run in runs]
        job = self.free_jobs.get()
        try:
            return self.follow(trial, trainings, job)
        finally:
            launcher.stop(*(training.process for training in trainings if training.process is not None))
            self.free_jobs.put(job)

    def follow(self, trial: optuna.Trial, trainings: list[Training], job: int) -> float:
        """Report the evaluations of the runs, and launch those that need it. Of several learning rates the
        best at each evaluation counts; those that have failed are left out."""
        reported: set[int] = set()
        while True:
            for training in trainings:
                training.read()
            if self.interrupted:
                raise Unfinished
            alive = [t for t in trainings if not t.error]
            if not alive:
                end(trial, why="; ".join(dict.fromkeys(t.error for t in trainings)))
            for step in sorted(set.intersection(*(set(t.losses) for t in alive)) - reported):
                best = min(alive, key=lambda t: t.losses[step])
                trial.report(best.losses[step], step)
                reported.add(step)
                print(f"trial {trial.number}: evaluation {step} of {self.space.evals}, val loss "
                      f"{best.losses[step]:.4f}", flush=True)
                if self.is_behind(trial, step):
                    self.store_run(trial, best.run)
                    raise optuna.TrialPruned
            if self.space.evals in reported and not any(t.is_running() for t in alive):
                self.store_run(trial, best.run)
                return best.losses[self.space.evals]
            for i, training in enumerate(trainings, job * len(trainings)):
                training.launch(i, jobs=self.jobs * len(trainings), gpus=self.gpus, program=self.program)
            time.sleep(0.1)
            with contextlib.suppress(StopIteration, subprocess.TimeoutExpired):
                next(t.process for t in alive if t.is_running()).wait(1)

    def is_behind(self, trial: optuna.Trial, step: int) -> bool:
        """The pruner's decision, which is stored: Optuna's pruners do not repeat it after a kill. Named
        structures go on regardless; it is asked for, since others are compared with those it knows."""
        named, pruned_at = "named" in trial.user_attrs, trial.user_attrs.get("pruned_at")
        if step == self.space.evals or named and pruned_at:     # it takes no part in later comparisons
            return False
        behind = pruned_at == step or trial.should_prune()
        if behind:
            trial.set_user_attr("pruned_at", step)
        return behind and not named

    def store_run(self, trial: optuna.Trial, run: launcher.Run) -> None:
        start = next((p for p in read_log(run.folder) if p.get("type") == "run"), {})
        trial.set_user_attr("run", dict(
            folder=os.path.relpath(run.folder, self.out), settings=run.settings, flops=run.flops,
            params=start.get("params"), ms_per_iter=launcher.speed(run)[1]))

    def after_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Optuna's callback: print the outcome of the trial, and stop the study if there is reason to."""
        attributes = trial.user_attrs
        if attributes.keys() & SKIPPED:
            self.skipped_in_a_row += 1
            if "surplus" in attributes and "named" in attributes:  # a later command may ask for more trials
                study.enqueue_trial(trial.params, user_attrs=dict(named=attributes["named"]))
        elif self.interrupted and trial.state == TrialState.FAIL:
            queue_copy(study, trial)
        else:
            self.skipped_in_a_row = 0
            self.states.append(trial.state)
            print(self.outcome(trial), flush=True)
            if self.states[-self.max_failures:] == [TrialState.FAIL] * self.max_failures:
                self.error = (f"{self.max_failures} trials in a row have failed, the last: "
                              f"{attributes['why']}")
        if self.skipped_in_a_row >= ATTEMPTS:
            self.error = (f"in {ATTEMPTS:,} attempts the sampler found nothing that is not trained yet: the "
                          "space may be exhausted; widen --widths or --tolerance, or ask for fewer --trials")
        if self.error or self.interrupted or not self.missing():
            study.stop()

    def outcome(self, trial: FrozenTrial) -> str:
        """A line on a trial that has ended."""
        ended = [t for t in counted(self.study) if t.state.is_finished()]
        losses = [t.value for t in ended if t.state == TrialState.COMPLETE]
        model, state = trial.user_attrs["model"], trial.state.name.lower()
        loss = f"{state}, val loss {trial.value:.4f}" if state != "fail" else ""
        best = f" | best {min(losses):.4f}" if losses else ""
        return (f"[{len(ended)}/{self.trials}] trial {trial.number}, {model['label']}, width {model['width']}"
                f": {loss or 'FAILED, ' + trial.user_attrs['why']}{best}")
