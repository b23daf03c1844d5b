"""Losses of several runs against iterations, tokens, FLOPs and time: a table, and a figure of four panels.

    python -m tools.compare out-dense out-btt_moe              folders of runs, or files like log.jsonl
    python -m tools.compare out-* --losses=2,1.8 --out=figures

Runs may be unfinished, or resumed any number of times. They are named by the settings in which they differ.
FLOPs and time at a common validation loss are those at which a run first reaches it, interpolated linearly
between evaluations. Time is that of the iterations alone, without evaluations, checkpoints and interruptions.
Writes compare.svg and compare.png into <out>.
"""
import dataclasses
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable

import numpy as np

from configurator import UnitFloat, configure, fail
from lib.figure import figure, log_ticks, optional_figures, save, style
from lib.log import NO_EFFECT, format_duration, read_log, validation_windows
from lib.table import markdown_table
from lib.terminal import prepare_output

# what to compare
losses: tuple = ()              # validation losses at which FLOPs and time are compared; (): common ones
smoothing: UnitFloat = 0.9      # of training losses: weight of the average before, at each logged iteration
out: str = "out-compare"        # folder of the figure

DIGEST = "the digest of the validation windows"
AXES = {"iter": "iterations", "tokens": "tokens", "flops": "training FLOPs", "seconds": "training seconds"}


@dataclasses.dataclass
class Run:
    """What a log says of a run. train and val are its points in order: dicts with 'loss' and each of AXES."""
    name: str
    settings: dict      # see settings_of
    measured: dict      # what validation losses must have in common to be comparable
    max_iters: int | None
    train: list[dict]
    val: list[dict]
    label: str = ""

    @property
    def last(self) -> dict:
        """The point that is furthest along, of either kind."""
        return max(self.train + self.val, key=lambda point: point["iter"], default=dict.fromkeys(AXES, 0))


# ---- Logs --------------------------------------------------------------------------------------------------

def read_run(place: str) -> Run:
    """A run from its folder or log file. Raises ValueError if there is none of train.py."""
    points = read_log(place)
    starts = [point for point in points if point.get("type") == "run"]
    if not starts:
        raise ValueError(f"{place} is no run: there is no log.jsonl of train.py")
    name = os.path.basename(os.path.abspath(place).removesuffix(os.sep + "log.jsonl"))
    try:
        kept = last_attempt(points)
        clock = make_clock(kept)
        per_token, of_iter = (starts[-1].get(key) for key in ("flops_per_token", "tokens_per_iter"))
        curves: dict[str, list] = {"train": [], "eval": []}
        for point in kept:
            done = point["iter"] + (point["type"] == "train")  # as its tokens are counted
            tokens = point.get("tokens", done * of_iter)
            loss = point["val_loss" if point["type"] == "eval" else "loss"]
            curves[point["type"]].append(dict(iter=done, tokens=tokens, seconds=clock(done), loss=loss,
                                              flops=point.get("flops", tokens * per_token)))
        return Run(name, settings_of(starts), measured_on(starts[-1]), starts[-1]["config"]["max_iters"],
                   *([p for p in curve if p["loss"] is not None and math.isfinite(p["loss"])]
                     for curve in curves.values()))
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{place} has a log that train.py did not write ({type(e).__name__}: {e})") from None


def last_attempt(points: list[dict]) -> list[dict]:
    """Training and evaluation points in the order of iterations; of those that a resumed run has made again,
    the last ones."""
    kept = {(p["type"], p["iter"]): p for p in points if p.get("type") in ("train", "eval")}
    return sorted(kept.values(), key=lambda point: point["iter"])


def make_clock(points: list[dict]) -> Callable[[int], float]:
    """The function from iterations to the seconds that they took. A training point's time per iteration holds
    for those that it was measured over: in the log of a resumed run fewer than since the point before, and
    the first of them compiles. The others take the median of all times, and those after the last point its
    time."""
    timed = [point for point in points if point["type"] == "train" and point.get("ms_per_iter")]
    if not timed:
        return lambda iterations: math.nan
    spans = [point.get("iterations", point["iter"] + 1) for point in timed]
    usual = np.median(np.repeat([point["ms_per_iter"] for point in timed], spans)) / 1e3
    done, rates = [0], []
    for point, span in zip(timed, spans):
        end = point["iter"] + 1
        if (begin := end - span) > done[-1]:
            done, rates = [*done, begin], [*rates, usual]
        done, rates = [*done, end], [*rates, point["ms_per_iter"] / 1e3]
    seconds = np.concatenate([[0.0], np.cumsum(np.diff(done) * rates)])
    return lambda iterations: float(np.interp(iterations, done, seconds)
                                    + max(0, iterations - done[-1]) * rates[-1])


def suits_heads(start: dict) -> bool:
    """What head_aligned is by default, in a run with this first line."""
    config = start["config"]
    if config["struct"] not in ("monarch", "btt") or config.get("num_experts"):
        return False
    from model import GPTConfig  # only here, since it imports torch
    try:
        known = start["model_args"] | dict(struct=start["model_args"]["struct"], head_aligned=None)
        return GPTConfig(**known).head_aligned
    except (KeyError, TypeError, ValueError):  # an old log
        return config.get("layers") != "mlp"


def settings_of(starts: list[dict]) -> dict:
    """The settings of a run that change what it does, from the first lines of its attempts: those of the last
    one, and what the first started from. None for those that follow from others by default."""
    first, start = starts[0], starts[-1]
    config = dict(start["config"])
    origin = first["config"].get("init_from")
    config["init_from"] = "scratch" if origin in (None, "auto", "resume") else origin
    config |= {key: start[key] for key in ("dtype", "compile", "device", "processes") if key in start}
    follow = {"min_lr": config["learning_rate"] / 10, "lr_decay_iters": config["max_iters"],
              "weight_norm": config["struct"] != "dense", "head_aligned": suits_heads(start)}
    config |= {key: None for key, value in follow.items() if config.get(key) == value}
    left_out = (*NO_EFFECT, "eval_iters", "eval_tokens", "backend")
    return {key: value for key, value in config.items() if key not in left_out}


def measured_on(start: dict) -> dict:
    """What validation losses must have in common to be comparable."""
    config = start["config"]
    found = {"dataset": config["dataset"], "vocabulary": start.get("model_args", {}).get("vocab_size"),
             "block_size": config["block_size"], "validation windows": validation_windows(config),
             DIGEST: start.get("measured_on", "")[:12] or None}
    return {key: value for key, value in found.items() if value is not None}


# ---- What differs ------------------------------------------------------------------------------------------

def different(dicts: list[dict]) -> list[str]:
    """Keys whose values differ, of those dicts that have them."""
    keys = dict.fromkeys(key for d in dicts for key in d)
    return [key for key in keys if len({json.dumps(d[key]) for d in dicts if key in d}) > 1]


def name_runs(runs: list[Run]) -> None:
    """Gives each run a label of the settings in which the runs differ; its own name too where that is not
    enough."""
    keys = different([run.settings for run in runs])
    for run in runs:
        shown = [f"{key}={run.settings[key]}" for key in keys if key in run.settings]
        run.label = ", ".join([text for text in shown if not text.endswith("=None")] or shown)
    labels = [run.label for run in runs]
    for run in runs:
        if not run.label or labels.count(run.label) > 1:
            run.label = ": ".join(filter(None, (run.name, run.label)))


def remarks(runs: list[Run]) -> list[str]:
    """What a reader must know before comparing the losses."""
    notes, keys = [], different([run.measured for run in runs])
    # equal digests mean equal tokens, whatever a dataset is called; other windows have other digests anyway
    same_windows = not {"block_size", "validation windows"} & set(keys)
    decides = same_windows and all(DIGEST in run.measured for run in runs)
    for key in keys:
        if key == ("dataset" if decides else DIGEST):
            continue
        values = ", ".join(f"{run.measured[key]} ({run.label})" for run in runs if key in run.measured)
        notes.append(f"these validation losses do not measure the same, compare them with care: {key} is "
                     + values)
    return notes


# ---- Tables ------------------------------------------------------------------------------------------------

def overview(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        last, evals = run.last, run.val
        best = min(evals, key=lambda point: point["loss"], default=None)
        state = f"{last['iter']:,}" if run.max_iters is None or last["iter"] >= run.max_iters else \
            f"{last['iter']:,} of {run.max_iters:,}"
        timed = last["seconds"] > 0
        rows.append([run.label, f"{evals[-1]['loss']:.4f}" if evals else "—",
                     f"{best['loss']:.4f} at {best['iter']:,}" if evals else "—", state,
                     f"{last['tokens']:,.0f}", f"{last['flops']:.3g}",
                     format_duration(last["seconds"]) if timed else "—",
                     f"{last['tokens'] / last['seconds']:,.0f}" if timed else "—"])
    head = ["run", "last val loss", "best", "iterations", "tokens", "FLOPs", "time", "tokens/s"]
    return markdown_table(head, rows)


def common_losses(runs: list[Run]) -> list[float]:
    """Validation losses that all runs have reached after their first evaluation on the way: the lowest such
    loss, and those a quarter and half of the way up; none where the curves share none."""
    on_the_way = [[point["loss"] for point in run.val if point["iter"] > 0] for run in runs]
    if not all(on_the_way):
        return []
    lowest, highest = max(map(min, on_the_way)), min(found[0] for found in on_the_way)
    levels = [lowest + share * (highest - lowest) for share in (0.5, 0.25, 0)]
    levels = [math.ceil(level * 100) / 100 for level in levels]  # rounded up: all runs have reached it
    return [level for level in dict.fromkeys(levels) if level < highest]


def reached(run: Run, loss: float) -> dict | None:
    """Where the run's validation loss first comes down to this one: {axis: value}; None if it never does."""
    before = None
    for point in run.val:
        if point["loss"] <= loss:
            if before is None:
                return point
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return {axis: before[axis] + share * (point[axis] - before[axis]) for axis in AXES}
        before = point
    return None


def crossings(runs: list[Run], levels: list[float]) -> str:
    """FLOPs and time at which each run reaches each loss, and their ratios to the first run's."""
    rows = []
    for level in levels:
        of_first = reached(runs[0], level)
        for run in runs:
            place, cells = reached(run, level), []
            for axis, show in (("flops", "{:.3g}".format), ("seconds", format_duration)):
                value, base = (found[axis] if found else math.nan for found in (place, of_first))
                cells.append("—" if math.isnan(value) else show(value))
                cells.append("—" if math.isnan(value) or not base > 0 else f"{value / base:.3f}")
            rows.append([f"{level:g}", run.label, *cells])
    return markdown_table(["val loss", "run", "FLOPs", "÷ first run's", "time", "÷ first run's"], rows)


# ---- Figure ------------------------------------------------------------------------------------------------

def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential averages of a series, up to each of its values; the weights of each sum to 1."""
    averages, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        averages.append(total / norm)
    return averages


def draw(runs: list[Run], folder: str) -> None:
    """A panel for each axis: markers are validation losses, faint lines smoothed training losses."""
    fig, grid = figure(2, rows=2, sharey=True)
    for ax, (axis, name) in zip(grid.flat, AXES.items()):
        for i, run in enumerate(runs):
            look = style(i)
            val = [(p[axis], p["loss"]) for p in run.val if p[axis] > 0]
            averages = smooth([p["loss"] for p in run.train], smoothing)
            train = [(p[axis], loss) for p, loss in zip(run.train, averages) if p[axis] > 0]
            if train:
                ax.plot(*zip(*train), color=look["color"], linewidth=0.8, alpha=0.45)
            ax.plot(*(zip(*val) if val else ([], [])), markersize=4, linewidth=1.4,
                    label=textwrap.fill(run.label, 40), **look)
        if any(p[axis] > 0 for run in runs for p in run.train + run.val):
            log_ticks(ax, "x")
            log_ticks(ax, "y")
        ax.set_xlabel(name)
    for ax in grid[:, 0]:
        ax.set_ylabel("loss, nats per token")
    fig.suptitle("markers: validation; faint lines: training, smoothed")
    save(fig, grid[0, 0], folder, "compare")


def compare(places: list[str]) -> None:
    """Prints the tables and writes the figure. A folder without a log among several, such as out-compare
    itself, is passed over. Raises ValueError for another place without a run."""
    without = [p for p in places if os.path.isdir(p) and not os.path.exists(os.path.join(p, "log.jsonl"))]
    if len(without) < len(places):
        places = [place for place in places if place not in without]
        for place in without:
            print(f"{place} has no log.jsonl, and is passed over\n")
    runs = [read_run(place) for place in places]
    if len({run.name for run in runs}) < len(runs):
        for run, place in zip(runs, places):
            run.name = place
    name_runs(runs)
    print(overview(runs))
    for note in remarks(runs):
        print(f"\n{note}")
    levels = [float(loss) for loss in losses] or common_losses(runs)
    if levels and len(runs) > 1:
        print("\n" + crossings(runs, levels))
    with optional_figures():
        draw(runs, out)
        print(f"\n{os.path.join(out, 'compare.svg')} and compare.png are written")


def main(arguments: list[str]) -> None:
    places = [argument for argument in arguments if not argument.startswith("-")]
    globals().update(configure(globals(), [flag for flag in arguments if flag not in places]))
    if not places:
        fail("compare needs the folders of some runs: python -m tools.compare out-a out-b")
    try:
        compare(places)
    except (ValueError, OSError) as e:
        fail(str(e))


if __name__ == "__main__":
    prepare_output()
    main(sys.argv[1:])
