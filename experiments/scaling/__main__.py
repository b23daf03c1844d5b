"""Compute-optimal scaling laws and learning-rate transfer: run a plan, fit what its runs measured, draw it.

    python -m experiments.scaling sweep experiments/plans/cpu.py    the runs of a plan, one at a time
        --dry_run=True                                              list them, and their progress
        --jobs=8 --gpus=1                                           eight at a time, a GPU for each
    python -m experiments.scaling fit --runs=out-scaling            laws, from every log.jsonl below a folder
    python -m experiments.scaling plot                              the figures again, from what fit wrote
    python -m experiments.scaling transfer --runs=out-lr_transfer   does the best rate stay over the widths?

Run them from the clone's root. A plan is a Python file that sets keys of train.py; a list is an axis of the
grid. Besides:

    structures  {label: {keys of its own}}; config/<label>.py, or the keys, say what the structure is
    head_size   n_head = n_embd / head_size
    flops       training FLOPs, instead of max_iters: a number, a list, or {n_embd: number}
    evals       evaluations of a run, instead of eval_interval

sweep also takes keys of train.py on the command line, for all runs of the plan. config/<label>.py, the plan,
a structure's own keys and the command line are applied in this order, and a later one wins: max_iters on the
command line, say, over the plan's flops.

A run's folder is named by its settings, so that a finished run is never made again, and the same command
resumes an interrupted one. Where the learning rate is constant, shorter runs are the beginnings of longer
ones: only the largest budget is run, and a plan whose budgets are raised resumes it. Any number of processes
and machines that share a folder may sweep the same plan at once. transfer exits with status 1 where the best
learning rate moves.
"""
from typing import Annotated

import configurator
from configurator import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, fail
from experiments import launcher

# sweep
runs: str = "out-scaling"       # folder of the runs; fit and transfer read all logs below it (several: a,b)
jobs: PositiveInt = 1           # runs at a time on this machine
gpus: NonNegativeInt = 0        # GPUs of each run, different ones for each job; 0: all runs see all devices
program: str = "train.py"       # what is started for each run
expiry: PositiveFloat = 900.0   # seconds after which the run of a hung sweep is taken over
wait: bool = True               # when only other sweeps' runs are left, wait, and take over those that expire
dry_run: bool = False           # list the runs and end
# fit, plot and transfer
base: str | None = None         # structure that multipliers are against; None: dense, if there are runs of it
floor: NonNegativeFloat | None = None  # L∞ of every structure, in nats per token; None: fitted, each its own
min_flops: float | None = None  # the frontier begins here; None: where the smallest size is the best one
max_flops: float | None = None  # and ends here; None: where the largest size is the best one
bench: str = ""                 # files of experiments.bench that the seconds are taken from (several: a,b)
samples: Annotated[int, ("at least", 10), ("below", 10**6)] = 300  # bootstrap samples
level: Annotated[float, ("above", 0), ("below", 1)] = 0.9  # probability of the intervals
out: str = "out-fit"            # folder of the tables and figures

command, plans, own_flags, train_flags = launcher.split_arguments(
    __file__, ("sweep", "fit", "plot", "transfer"))
globals().update(configurator.configure(globals(), own_flags))

import signal

from experiments.scaling import plan, plot, report, transfer
from experiments.scaling.sweep import Sweep
from lib.figure import optional_figures


def sweep() -> int:
    """Make the runs of the plan, or list them; the exit status."""
    if len(plans) != 1:
        fail(f"sweep takes one plan, not {len(plans)}: python -m experiments.scaling sweep "
             "experiments/plans/cpu.py")
    planned = plan.expand(plans[0], train_flags, runs)
    if dry_run:
        for run in planned:
            done = launcher.speed(run)[0]
            state = f"at iteration {done}" if done else "to do"
            state = "finished" if launcher.final_loss(run) is not None else state
            print(f"{run.name:60s} {run.max_iters:8,} iterations {run.flops:9.3g} FLOPs  {state}")
        print(f"{len(planned)} runs, {sum(run.flops for run in planned):.3g} FLOPs")
        return 0
    launcher.check_gpus(jobs, gpus)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = Sweep(planned, jobs=jobs, gpus=gpus, program=program, expiry=expiry, wait=wait).make_all()
    if failed:
        print("failed: " + ", ".join(run.name for run in failed))
    return 1 if failed else 0


def main() -> int:
    """Carry out the command; the exit status."""
    if command == "sweep":
        return sweep()
    if command == "transfer":
        return 0 if transfer.transfer(runs.split(","), out) else 1
    if command == "fit":
        report.write_report(runs.split(","), out, base=base, floor=floor, window=(min_flops, max_flops),
                            samples=samples, level=level, bench=[path for path in bench.split(",") if path])
    with optional_figures():
        plot.plot(out)
    return 0


if __name__ == "__main__":
    launcher.run_program(main)
