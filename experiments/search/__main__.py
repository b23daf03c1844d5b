"""Search for good structures, θ and experts if asked for, at equal training FLOPs: Optuna around train.py.

    python -m experiments.search run config/cpu.py --jobs=2     repeat it to go on after a kill or Ctrl-C
    python -m experiments.search run config/cpu.py --dry_run=True       print what would be searched
    python -m experiments.search report     table, csv, figure, importances, best.py and follow.py
    python -m experiments.scaling sweep out-search/report/follow.py --runs=out-search/follow --jobs=2
                                            the best structures and dense: more FLOPs, several seeds

Run them from the root of the clone. `run` also takes config files and keys of train.py, for what all trials
share: data, batch size, number of layers, seed, ... Every trial is a model with the FLOPs per token of a
dense model of `dense_width`, trained for `flops` in all; its width and rank are chosen for that (space.py).
Each evaluation is reported to Optuna, whose pruner ends a trial that is behind others at its share of the
budget.

Any number of processes may run the same command at once. On several machines they share the folder `out` and
a database server (--storage): SQLite is for one machine. Trials of a dead process are taken over after
`expiry` seconds. Failed trials are tried again by the next `run`, unless their loss was not finite.
It needs optuna: pip install -r requirements-search.txt
"""
from typing import Annotated, Literal

import configurator
from configurator import NonNegativeInt, PositiveFloat, PositiveInt, Seed, fail
from experiments import launcher

# run
out: str = "out-search"         # folder of the study and of its runs
storage: str | None = None      # a database URL that Optuna takes; None: the SQLite file study.db in `out`
study: str = "search"           # name of the study in its database
jobs: PositiveInt = 1           # trials at a time in this process
gpus: NonNegativeInt = 0        # GPUs of each run, different ones for each job; 0: all runs see all devices
program: str = "train.py"       # what is launched
expiry: PositiveInt = 120       # seconds without a sign of life until a process counts as dead
max_failures: PositiveInt = 5   # end after so many failed trials in a row
dry_run: bool = False           # print what would be searched, and end
# search
trials: PositiveInt = 40        # trials that are trained, pruned ones included, by all processes
named: bool = True              # the named structures come first, and are not pruned
sampler: Literal["tpe", "random"] = "tpe"
sampler_seed: Seed | None = None  # for jobs=1; None: a different one each time. Each process needs its own
pruner: Literal["halving", "none"] = "halving"  # halving: successive halving
first_rung: PositiveInt = 2     # evaluations before the pruner's first decision; the next: times reduction
reduction: Annotated[int, ("at least", 2), ("below", 2**31)] = 2  # one trial in this many continues at a rung
# equal compute
dense_width: PositiveInt = 96   # a dense model of this width has the FLOPs per token of all trials
flops: PositiveFloat = 3e12     # training FLOPs of a trial
tolerance: PositiveFloat = 0.05  # of the FLOPs per token, relative
widths: tuple | None = None     # to choose from; None: multiples of 4 and n_head, 1/3 to 6 times dense_width
learning_rates: tuple = (3e-3,)  # a run for each of them in every trial: the best counts
experts: tuple = (0,)           # numbers of experts to choose from; 0: none
top_ks: tuple = (2,)            # experts per token to choose from
max_nu: PositiveFloat = 1.0     # θ above this compute intensity are left out: they cost more than dense
evals: PositiveInt = 8          # evaluations of a run
# report
results: str | None = None      # folder of the report; None: report in `out`
dense: str | None = None        # dense to compare with, a fit.json of scaling; None: the study's own
top: PositiveInt = 3            # structures in follow.py, besides dense
times: PositiveFloat = 4.0      # FLOPs of a run there, as a multiple of a trial's
seeds: tuple = (1, 2)           # of each


command, files, own_flags, train_flags = launcher.split_arguments(__file__, ("run", "report"))
config = configurator.configure(globals(), own_flags)
globals().update(config)

import math
import os
import signal

from experiments.search import space as points
from experiments.search import study as studies
from experiments.search.space import Point, Space
from experiments.search.study import TrialState, optuna
from lib.commands import key_of


def check_keys() -> None:
    """Exit with one sentence if a key of this program has an unusable value."""
    try:
        for key, least in dict(widths=1, experts=0, top_ks=1, seeds=0).items():
            if config[key] is not None:
                launcher.whole_numbers(least, **{key: config[key]})
    except ValueError as e:
        fail(str(e))
    if pruner != "none" and first_rung >= evals:
        fail(f"first_rung = {first_rung} must be less than evals = {evals}: nothing would be pruned")
    if not learning_rates or min(learning_rates) < 0:
        fail(f"learning_rates takes numbers of at least 0; got {learning_rates}")
    if 1 in experts:
        fail(f"experts takes 0, for none, and numbers of at least 2; got {experts}")
    if any(experts) and min(top_ks) > max(experts):
        fail(f"top_ks = {top_ks} are all more than there are experts: {max(experts)}")


def shared_settings() -> dict:
    """Keys of train.py that all trials share: those that differ from its defaults, and the most important."""
    settings = configurator.configure({"__file__": launcher.TRAIN}, files + train_flags)
    defaults = launcher.TRAIN_DEFAULTS
    flags = set(map(key_of, train_flags))
    for key in points.CHOSEN:
        if key in flags or key in points.STRUCTURAL and settings[key] != defaults[key]:
            fail(f"{key} is what the search chooses: python -m experiments.search --help lists its keys")
    shared = {k: v for k, v in settings.items() if k not in points.CHOSEN and v != defaults[k]}
    # a later change of train.py's defaults must not change a study
    always = ("n_layer", "n_head", "block_size", "batch_size", "gradient_accumulation_steps", "dataset",
              "seed", "decay_lr")
    return shared | {key: settings[key] for key in always}


def make_space() -> Space:
    """The space of this command. Exits with one sentence, or raises ValueError with it, if there is none."""
    settings = shared_settings()
    step = math.lcm(4, settings["n_head"])
    choices = widths or [w for w in range(step, 6 * dense_width + 1, step) if 3 * w >= dense_width]
    choices = tuple(sorted(set(map(int, choices))))
    for key, values in dict(dense_width=(dense_width,), widths=choices).items():
        if bad := [v for v in values if v % settings["n_head"]]:
            fail(f"{key} must be divisible by n_head = {settings['n_head']}; got {bad[0]}")
    space = Space(dense_width, flops, choices, tolerance, learning_rates, tuple(map(int, experts)),
                  tuple(map(int, top_ks)), max_nu, evals, settings, launcher.vocabulary(settings["dataset"]))
    iterations = flops / space.flops_per_token / launcher.tokens_per_iter(settings)
    if iterations < (1 + tolerance) * evals / tolerance / 2:
        fail(f"flops = {flops:g} are {iterations:.0f} iterations, too few to meet them within "
             f"{tolerance:.0%} by multiples of evals = {evals}: ask for more flops, a larger tolerance, or "
             "fewer evals")
    for point in space.named().values():
        if isinstance(point, Point):
            space.runs(point, out)      # raises ValueError, before the request is that of a study
    return space


def describe(space: Space) -> None:
    """Print the request, and the models of the named structures."""
    print(f"{trials} trials of {flops:.3g} training FLOPs, {space.flops_per_token:,.0f} a token, as a dense "
          f"model of width {dense_width}: {flops / space.flops_per_token:,.0f} tokens; {len(space.widths)} "
          f"widths from {space.widths[0]} to {space.widths[-1]}")
    for name, point in space.named().items():
        if isinstance(point, Point):
            first, *_ = space.runs(point, out)
            print(f"  {point.label:32s} width {point.width:4d}  {str(point.sizes[0]):24s} "
                  f"{first.max_iters:7,} iterations  {first.flops / flops:.1%} of the FLOPs")
        else:
            print(f"  {name}: {point}")


def run() -> int:
    """Search, and print what came of it; returns the exit status."""
    space = make_space()
    if dry_run:
        describe(space)
        return 0
    launcher.check_gpus(jobs * len(learning_rates), gpus)
    os.makedirs(out, exist_ok=True)
    with studies.study_lock(out):
        found = studies.open_study(storage, study, out, expiry=expiry, create=True,
                                   sampler=studies.make_sampler(sampler, sampler_seed),
                                   pruner=studies.make_pruner(pruner, first_rung, reduction))
        studies.begin(found, space, named, first_rung, reduction)
        if again := studies.retry_failed(found):
            print(f"{again} trials that have failed are tried again")
    for name, point in space.named().items() if named else ():
        if isinstance(point, str):
            print(f"{name} is left out: {point}")
    search = studies.Search(found, space, out, trials, jobs, gpus, program, expiry, max_failures)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, search.interrupt)
    search.run()
    if search.interrupted:
        raise KeyboardInterrupt
    states = [t.state.name for t in studies.counted(found)]
    rejected, same = (sum(key in t.user_attrs for t in found.trials) for key in ("rejected", "same_as"))
    print(f"{states.count('COMPLETE')} trials to their end, {states.count('PRUNED')} pruned, "
          f"{states.count('FAIL')} failed; {rejected} θ without a model, {same} that others had")
    return 1 if TrialState.FAIL in search.states else 0


def main() -> int:
    """Carry out the command; the exit status."""
    check_keys()
    if command == "run":
        return run()
    from experiments.search.report import write_report
    write_report(studies.open_study(storage, study, out), out, results or os.path.join(out, "report"),
                 dense=dense, top=top, times=times, seeds=seeds)
    return 0


if __name__ == "__main__":
    launcher.run_program(main, optuna.exceptions.OptunaError)
