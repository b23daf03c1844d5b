"""From runs to scaling laws: frontiers, power laws and multipliers, for scaling.py.

A run is read from its log.jsonl. Its points are its evaluations where the learning rate is constant, and its end alone
where the rate decays. Along an axis x (training FLOPs, those without the output layer, or seconds), for each structure:

    frontier    the least loss that any of its runs has reached by x: at 12 budgets a decade, between the points of a run
                by interpolation in log x; runs that differ in the seed alone are one, their mean. It holds between the
                budgets at which the smallest and the largest size are the best ones; these follow from where one size
                hands over to the next, by a line in log size over log x
    law         L = L∞ + (x / x0)^-a through it: for each a the other two are linear, and Huber weights make it robust
    intervals   by a parametric bootstrap: every run's losses move together by the noise between seeds, each evaluation by
                the noise within a run, and the frontier and the law are made anew
    multiplier  x that dense needs for the same loss ÷ x it needs, both by their laws, where both frontiers have that loss;
                and, without laws, from one frontier's points to the other, between these by interpolation

Seconds are iterations · the median time of one, over all runs of a structure and size, so that a pause of the machine does
not count; evaluations do not either.
Of runs that shared a machine with others, the time of an iteration is better taken from bench.py.
"""
import contextlib
import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from experiments.launcher import ASIDE, read_log

# what a frontier is drawn against
AXES = {"flops": "training FLOPs", "flops_without_output_layer": "training FLOPs without the output layer",
        "seconds": "training seconds"}
PER_DECADE = 12     # budgets of a frontier
COMPARABLE = ("dataset", "block_size", "vocab_size", "eval_iters", "batch_size")  # what makes two validation losses one measure
VARIED = ("n_embd", "n_layer", "n_head", "learning_rate", "seed", "max_iters", "lr_decay_iters", "backend", "device",
          "dtype", "compile")  # may differ between runs of a structure without a remark
SHARE = 0.9         # of seeds, those count together that have come this far
STEP_SHAPE = ("n_embd", "n_layer", "n_head", "block_size", "batch_size")    # of a training step that bench.py times
HUBER = 1.345       # residuals beyond so many standard deviations count less


class Points(NamedTuple):
    """A run's evaluations, in the order of training: arrays of the same length."""
    tokens: np.ndarray
    losses: np.ndarray  # validation cross-entropy, nats per token


@dataclasses.dataclass
class Run:
    name: str
    label: str          # structure
    config: dict
    params: int
    active_params: int
    flops_per_token: dict[str, float]   # by axis; seconds per token for 'seconds'
    points: Points
    train_loss: float   # of the last logged iteration

    @property
    def size(self) -> str:
        return f"{self.config['n_layer']} x {self.config['n_embd']}"

    def x(self, axis: str) -> np.ndarray:
        """FLOPs, or seconds, at each point."""
        return self.points.tokens * self.flops_per_token[axis]


class Law(NamedTuple):
    """L = floor + (x / scale)^-exponent."""
    floor: float
    scale: float
    exponent: float

    def loss(self, x):
        return self.floor + (np.asarray(x, float) / self.scale) ** -self.exponent

    def x(self, loss):
        """Where the law reaches a loss; infinite at or below its floor."""
        above = np.asarray(loss, float) - self.floor
        logs = np.log(self.scale) - np.log(np.maximum(above, 1e-300)) / self.exponent
        return np.where(above > 0, np.exp(np.minimum(logs, 700)), np.inf)


# ---- Runs -----------------------------------------------------------------------------------------------------------

def label_of(config: dict) -> str:
    """Name of a structure by its settings, for a run that carries no label of a plan."""
    label = config["struct"]
    if config.get("theta"):
        label += "(" + " ".join(f"{e:g}" for e in config["theta"]) + ")"
    if config.get("ffn_experts"):
        label = ("moe" if label == "dense" else f"{label}_ffn_moe") + (f"{e}" if (e := config["ffn_experts"]) != 8 else "")
    if config.get("num_experts"):
        label += "_moe" + (f"{e}" if (e := config["num_experts"]) != 8 else "")
    if config.get("rank"):
        label += f"-r{config['rank']}"
    return label + (f"-{config['layers']}" if config.get("layers", "all") != "all" else "")


def read_run(folder: str) -> tuple[Run | None, str | None]:
    """(a run that can be used or None, what a reader should know of it or None), from its log.jsonl. Raises KeyError,
    TypeError, AttributeError or ValueError for a log that lacks something."""
    lines, name = read_log(folder), os.path.basename(os.path.abspath(folder))
    starts, trains, skips = ([p for p in lines if p.get("type") == kind] for kind in ("run", "train", "skip"))
    evals = sorted({p["iter"]: p for p in lines if p.get("type") == "eval"}.items())
    if not starts:
        return None, f"{name}: left out, its log has no run line"
    first, config = starts[-1], starts[-1]["config"]
    config |= {key: config[key] for key in ("learning_rate", "seed", *STEP_SHAPE)}    # which others will ask for
    last = evals[-1][0] if evals else 0
    losses = np.array([p["val_loss"] for _, p in evals], float)
    if diverged := divergence(losses, lines[-1] if last < config["max_iters"] else {}):
        return None, f"{name}: left out, diverged: {diverged}"
    if last == 0:
        return None, f"{name}: left out, it has no evaluation after the first iteration"
    remarks = [f"{len(skips)} iterations skipped, whose loss or gradient was not finite"] if skips else []
    if last < config["max_iters"]:
        remarks.append(f"unfinished, at iteration {last} of {config['max_iters']}")
        if config["decay_lr"]:
            return None, f"{name}: {'; '.join(remarks)}; left out, since its learning rate decays and only an end counts"
    keep = [i for i, (it, _) in enumerate(evals) if it > 0 and (not config["decay_lr"] or it == last)]
    label = label_of(config)
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open(os.path.join(folder, "settings.json"), encoding="utf-8") as f:
            label = json.load(f)["label"]
    per_token = {"flops": first["flops_per_token"], "flops_without_output_layer": first["flops_per_token_without_output_layer"]}
    if trains:
        per_token["seconds"] = statistics.median(p["ms_per_iter"] for p in trains) / 1e3 / first["tokens_per_iter"]
    points = Points(np.array([evals[i][1]["tokens"] for i in keep], float), losses[keep])
    return Run(name, label, config | dict(vocab_size=first.get("model_args", {}).get("vocab_size")), first["params"],
               first["active_params"], per_token, points, trains[-1]["loss"] if trains else math.nan), (
                   f"{name}: {'; '.join(remarks)}" if remarks else None)


def divergence(val: np.ndarray, end: dict) -> str | None:
    """What is wrong with a run, if anything: its validation losses are not finite, or a tenth of what was gained is lost
    again; or it stopped early, and the end of its log says that an iteration was skipped."""
    if not np.isfinite(val).all():
        return "its validation loss is not finite"
    if end.get("type") == "skip":
        return f"its loss or gradient is not finite at its end, iteration {end['iter']}"
    if len(val) > 2 and val[-1] - val.min() > 0.1 * (val[0] - val.min()):
        return f"its validation loss ends at {val[-1]:.3f}, after {val.min():.3f}"
    return None


def read_runs(folders: Iterable[str]) -> tuple[list[Run], list[str]]:
    """(runs, remarks on those left out, unfinished or unlike others) below the folders. Raises ValueError, in one
    sentence, where there is none, or where their losses do not measure the same."""
    paths: list[str] = []
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f"there is no folder {folder!r}: give the folder of some runs with --runs")
        paths += [os.path.realpath(root) for root, _, files in os.walk(folder) if "log.jsonl" in files]
    found, notes = [], []
    for path in sorted(set(paths)):
        try:
            run, note = read_run(path)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            run, note = None, f"{os.path.basename(path)}: left out, its log is none of train.py's ({type(e).__name__}: {e})"
        found += [run] if run else []
        notes += [note] if note else []
    if not found:
        raise ValueError(f"there is no run below {', '.join(folders)} that can be used" + (f" ({notes[0]})" if notes else ""))
    for key in COMPARABLE:
        values = {str(run.config.get(key)): run.name for run in found}
        if len(values) > 1:
            (a, first), (b, second), *_ = values.items()
            raise ValueError(f"these runs do not measure the same loss: {key} is {a} in {first} and {b} in {second}; "
                             "keep them in different folders")
    found, copies = without_copies(found)
    return found, notes + copies + unlike(found)


def alike(runs: Iterable[Run], aside: Iterable[str]) -> list[list[Run]]:
    """Groups of runs of a structure that differ in nothing but settings that change nothing, and those named. Where the
    rate is constant, the length is one that changes nothing."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        without = {*ASIDE, *aside, *(() if run.config["decay_lr"] else ("max_iters",))}
        config = {k: v for k, v in run.config.items() if k not in without}
        groups.setdefault(json.dumps([run.label, config], sort_keys=True), []).append(run)
    return list(groups.values())


def without_copies(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """(the longest of each group of runs that do not even differ in the seed, remarks on the others)."""
    found, notes = [], []
    for same in alike(runs, ()):
        longest = max(same, key=lambda run: run.points.tokens[-1])
        found.append(longest)
        notes += [f"{run.name}: left out, another run of the same settings and seed is as long or longer, {longest.name}"
                  for run in same if run is not longest]
    return found, notes


def unlike(runs: list[Run]) -> list[str]:
    """Remarks on structures whose runs differ in more than size, learning rate, seed and length."""
    notes = []
    for label in sorted({run.label for run in runs}):
        mine = [run for run in runs if run.label == label]
        for key in sorted({k for run in mine for k in run.config} - {*ASIDE, *VARIED}):
            values = {str(run.config.get(key)): run.name for run in mine}
            if len(values) > 1:
                where = ", ".join(f"{value} in {name}" for value, name in values.items())
                notes.append(f"{label}: its runs differ in {key}, {where}; its frontier is the least of all")
    return notes


def share_seconds(runs: list[Run]) -> None:
    """Seconds per token are the median over all runs of a structure and size: a run slowed down is no size of its own."""
    timed = [run for run in runs if "seconds" in run.flops_per_token]
    medians = {key: statistics.median(run.flops_per_token["seconds"] for run in timed if (run.label, run.size) == key)
               for key in {(run.label, run.size) for run in timed}}
    for run in timed:
        run.flops_per_token["seconds"] = medians[run.label, run.size]


def take_seconds(runs: list[Run], paths: Iterable[str]) -> list[str]:
    """Seconds per token from the training steps of bench.py, in place of the runs' own: a run keeps none that no step of
    the same structure and shape tells. Returns remarks; raises ValueError, in one sentence, for a file that is none of bench.py's."""
    known = {}
    for path in paths:
        try:
            with open(path, encoding="utf-8") as f:
                found = json.load(f)
            config = found["config"] | dict(n_head=found["config"]["n_embd"] // found["config"]["head_size"])
            shape = tuple(config[k] for k in STEP_SHAPE)
            known |= {(step["config"], *shape): 1 / step["tokens_per_s"] for step in found["steps"]}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is no output of bench.py that can be read ({type(e).__name__}: {e})") from None
    notes = []
    for run in runs:
        seconds = known.get((run.label, *(run.config[k] for k in STEP_SHAPE)))
        run.flops_per_token.pop("seconds", None)
        if seconds is None:
            notes.append(f"{run.name}: no seconds, for bench.py has not timed {run.label} of its shape")
        else:
            run.flops_per_token["seconds"] = seconds
    return notes


# ---- Frontier -------------------------------------------------------------------------------------------------------

class Frontier(NamedTuple):
    x: np.ndarray       # budgets, ascending
    losses: np.ndarray  # the least loss reached by each, descending
    owners: np.ndarray  # index of the run that reached it

    def x_for(self, losses) -> np.ndarray:
        """The budget that reaches each loss, between points by interpolation in logarithms; nan outside of them."""
        logs = np.interp(-np.log(losses), -np.log(self.losses), np.log(self.x), left=math.nan, right=math.nan)
        return np.exp(logs)


def frontier_of(curves: list[tuple[np.ndarray, np.ndarray]]) -> Frontier:
    """The lower envelope of curves (x, losses), each ascending in x; one point alone is a curve too."""
    xs, losses, owners = [], [], []
    for i, (x, loss) in enumerate(curves):
        first, last = np.ceil(np.log10(x[0]) * PER_DECADE - 1e-9), np.floor(np.log10(x[-1]) * PER_DECADE + 1e-9)
        at = 10 ** (np.arange(first, last + 1) / PER_DECADE) if len(x) > 1 else x
        xs.append(at)
        losses.append(np.interp(np.log(at), np.log(x), loss) if len(x) > 1 else loss)
        owners.append(np.full(len(at), i))
    xs, losses, owners = map(np.concatenate, (xs, losses, owners))
    order = np.lexsort((losses, xs))
    xs, losses, owners = xs[order], losses[order], owners[order]
    best = np.minimum.accumulate(losses)
    keep = np.r_[True, losses[1:] < best[:-1]] if len(xs) else np.zeros(0, bool)
    return Frontier(xs[keep], losses[keep], owners[keep])


class Growth(NamedTuple):
    """Best size (x per token) = (x / scale)^exponent, and the budgets at which the smallest and largest are the best."""
    exponent: float
    scale: float
    window: tuple[float, float]


def growth_of(frontier: Frontier, sizes: np.ndarray) -> Growth | None:
    """How the best size grows with the budget; None unless three sizes or more are each the best somewhere.

    sizes: x per token of each curve. A size hands over to the next between the last budget of the smaller and the first
    budget of the larger, and there the best size is the geometric mean of both.
    """
    owned = np.log(sizes[frontier.owners])
    distinct = np.unique(owned.round(6))
    if len(distinct) < 3:
        return None
    log_x, middles = np.log(frontier.x), (distinct[1:] + distinct[:-1]) / 2
    handovers = np.array([(log_x[owned < m].max() + log_x[owned > m].min()) / 2 for m in middles])
    slope, intercept = np.polyfit(handovers, middles, 1) if np.ptp(handovers) > 0 else (0.0, 0.0)
    if slope <= 0:
        return None
    low, high = np.exp((distinct[[0, -1]] - intercept) / slope)
    return Growth(float(slope), float(np.exp(-intercept / slope)), (float(low), float(high)))


# ---- Laws -----------------------------------------------------------------------------------------------------------

def fit_law(x: np.ndarray, losses: np.ndarray, floor: float | None = None) -> Law:
    """L = L∞ + (x / x0)^-a by least squares of relative residuals, L∞ >= 0, with Huber weights; a in [0.01, 3].

    For each a, L∞ and k = x0^a are linear, so that the search is over a alone: a grid, refined three times.
    Raises ValueError for less than three points.
    """
    if len(x) < 3:
        raise ValueError(f"a power law needs at least 3 points on the frontier; there are {len(x)}")
    middle = np.exp(np.log(x).mean())  # powers of x / middle stay near 1
    log_x, relative = np.log(x / middle), 1 / losses
    weights, grid = np.ones(len(x)), np.geomspace(0.01, 3, 60)
    for _ in range(20):
        for refinement in range(4):
            floors, ks, errors = _solve(grid, log_x, losses, weights * relative ** 2, floor)
            i = int(errors.argmin())
            if refinement < 3:
                grid = np.geomspace(grid[max(0, i - 1)], grid[min(len(grid) - 1, i + 1)], 12)
        a, l_inf, k = float(grid[i]), float(floors[i]), float(ks[i])
        residuals = (l_inf + k * np.exp(-a * log_x) - losses) * relative
        spread, before = 1.4826 * np.median(np.abs(residuals)), weights
        weights = np.minimum(1, HUBER * max(spread, 1e-9) / np.maximum(np.abs(residuals), 1e-12))
        if np.abs(before - weights).max() < 0.01:
            break
        grid = np.clip(np.geomspace(a / 2, a * 2, 24), 0.01, 3)
    return Law(l_inf, float(middle * max(k, 1e-300) ** (1 / a)), a)


def _solve(exponents, log_x, losses, weights, floor):
    """(L∞, k, weighted squared error) for each exponent: weighted least squares in closed form, L∞ and k not negative."""
    p = np.exp(-exponents[:, None] * log_x)  # (exponents, points)
    w = weights.sum()
    mean_p, mean_l = p @ weights / w, losses @ weights / w
    if floor is None:
        centred = p - mean_p[:, None]
        ks = (centred * (losses - mean_l)) @ weights / np.maximum((centred ** 2) @ weights, 1e-300)
        floors = mean_l - ks * mean_p
    else:
        ks, floors = np.zeros(len(p)), np.full(len(p), float(floor))
    bound = (floors < 0) | (floor is not None)
    floors = np.where(floors < 0, 0.0, floors)
    through = (p * (losses - floors[:, None])) @ weights / ((p ** 2) @ weights)
    ks = np.maximum(np.where(bound, through, ks), 0.0)
    residuals = floors[:, None] + ks[:, None] * p - losses
    return floors, ks, (residuals ** 2) @ weights


@dataclasses.dataclass
class Fit:
    """What one structure's runs say along one axis."""
    label: str
    axis: str
    runs: list[Run]
    frontier: Frontier
    used: np.ndarray            # which points of the frontier the law is fitted to
    growth: Growth | None
    law: Law | None             # None where there are less than three points
    samples: list[Law] = dataclasses.field(default_factory=list)
    growths: list[float] = dataclasses.field(default_factory=list)  # bootstrap samples of growth.exponent
    noise: float = 0.0          # relative, of a run

    @property
    def range(self) -> tuple[float, float]:
        """The budgets that the law was fitted to."""
        x = self.frontier.x[self.used]
        return float(x.min()), float(x.max())


def curves_of(runs: list[Run], axis: str) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(run.x(axis), run.points.losses) for run in runs]


def analyse(curves, sizes, window, floor) -> tuple[Frontier, np.ndarray, Growth | None, Law | None]:
    """(frontier, which of its points count, growth of the best size, law) of one structure's curves."""
    frontier = frontier_of(curves)
    growth = growth_of(frontier, sizes)
    low, high = (given if given is not None else growth.window[i] if growth else (0, math.inf)[i]
                 for i, given in enumerate(window))
    used = (frontier.x >= low * 0.999) & (frontier.x <= high * 1.001)
    if used.sum() < 4 and window == (None, None):  # sizes too close to each other to say where the frontier ends
        used = np.ones(len(frontier.x), bool)
    law = fit_law(frontier.x[used], frontier.losses[used], floor) if used.sum() >= 3 else None
    return frontier, used, growth, law


def same_but_seed(runs: list[Run]) -> tuple[list[list[Run]], list[str]]:
    """(groups of runs that differ in the seed alone, remarks on those left out): of several, those have come to nearly the
    same end, and none of them ends where another has no evaluation yet."""
    groups, notes = [], []
    for same in alike(runs, ("seed",)):
        least = max(SHARE * max(run.points.tokens[-1] for run in same), *(run.points.tokens[0] for run in same))
        groups.append([run for run in same if run.points.tokens[-1] >= least])
        notes += [f"{run.name}: left out of its seeds' mean, it ends after {run.points.tokens[-1]:,.0f} tokens; another "
                  "goes on" for run in same if run.points.tokens[-1] < least]
    return groups, notes


def mean_of_seeds(groups: list[list[Run]]) -> list[Run]:
    """One run for each group of runs that differ in the seed alone: the mean of their losses, as long as all of them go on.
    The least of several seeds would make a frontier too low, and only where there are several."""
    means = []
    for same in groups:
        first = min(same, key=lambda run: run.points.tokens[-1])
        tokens = first.points.tokens[first.points.tokens >= max(run.points.tokens[0] for run in same)]
        losses = np.mean([np.interp(tokens, *run.points) for run in same], axis=0)
        per_token = {axis: statistics.mean(run.flops_per_token[axis] for run in same) for axis in first.flops_per_token
                     if all(axis in run.flops_per_token for run in same)}
        means.append(dataclasses.replace(first, points=Points(tokens, losses), flops_per_token=per_token))
    return means


def seed_noise(groups: list[list[Run]]) -> tuple[float | None, list[str]]:
    """(relative standard deviation of a run's loss between seeds, pooled over all groups of runs that differ in the seed
    alone; None without any, a line for each group)."""
    squares, freedom, lines = 0.0, 0, []
    for same in (g for g in groups if len(g) > 1):
        tokens = min(run.points.tokens[-1] for run in same)
        losses = np.array([np.interp(tokens, *run.points) for run in same])
        squares += float(((losses / losses.mean() - 1) ** 2).sum())
        freedom += len(same) - 1
        lines.append(f"{same[0].label}, {same[0].size}: {', '.join(f'{v:.4f}' for v in losses)} after {tokens:,.0f} tokens")
    return (math.sqrt(squares / freedom) if freedom else None), lines


def point_noise(runs: list[Run]) -> float:
    """Relative standard deviation of an evaluation about its run's curve: from second differences over log tokens, of
    the later half of each run, where the curve bends least."""
    found = []
    for run in runs:
        x, y = np.log(run.points.tokens), run.points.losses
        half = slice(len(x) // 2, None)
        x, y = x[half], y[half] / y[-1]
        if len(x) >= 5:
            t = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
            found.append((y[1:-1] - (1 - t) * y[:-2] - t * y[2:]) / np.sqrt(1 + (1 - t) ** 2 + t ** 2))
    return float(1.4826 * np.median(np.abs(np.concatenate(found)))) if found else 0.0


def fit_structure(label: str, runs: list[Run], axis: str, *, window=(None, None), floor=None, samples=300,
                  noise: float | None = None, rng=None) -> Fit:
    """Frontier, law and bootstrap of one structure's runs. noise: relative, between seeds; None: from the residuals."""
    runs = sorted(runs, key=lambda run: run.flops_per_token[axis])
    curves, sizes = curves_of(runs, axis), np.array([run.flops_per_token[axis] for run in runs])
    frontier, used, growth, law = analyse(curves, sizes, window, floor)
    fit = Fit(label, axis, runs, frontier, used, growth, law)
    if law is None:
        return fit
    within = point_noise(runs)
    residuals = frontier.losses[used] / law.loss(frontier.x[used]) - 1
    owners = frontier.owners[used]
    means = [residuals[owners == i].mean() for i in np.unique(owners)]  # a run's points err together
    between = math.sqrt(sum(m * m for m in means) / max(1, len(means) - 2))
    fit.noise = max(noise or 0.0, between)
    rng = rng or np.random.default_rng(0)
    span = (window[0] or frontier.x[used][0], window[1] or frontier.x[used][-1])
    for _ in range(samples):
        moved = [(x, y * (1 + fit.noise * rng.standard_normal() + within * rng.standard_normal(len(y)))) for x, y in curves]
        _, _, g, sample = analyse(moved, sizes, span, floor)
        if sample is not None:
            fit.samples.append(sample)
        if g is not None:
            fit.growths.append(g.exponent)
    return fit


def multipliers(fit: Fit, base: Fit, x: np.ndarray, level: float) -> list[tuple[float, float, float] | None]:
    """(multiplier, low, high) at each x: what base needs for the loss that fit has there, ÷ x. None where x is outside
    of what fit has measured, or its loss outside of what base has."""
    found: list[tuple[float, float, float] | None] = []
    losses = base.frontier.losses[base.used]
    for at in x:
        low, high = fit.range
        if not (low * 0.999 <= at <= high * 1.001 and losses.min() <= fit.law.loss(at) <= losses.max()):
            found.append(None)
            continue
        drawn = [float(b.x(f.loss(at))) / at for f, b in zip(fit.samples, base.samples)]
        value = float(base.law.x(fit.law.loss(at))) / at
        found.append((value, *interval(drawn, level)) if math.isfinite(value) else None)
    return found


def measured_multipliers(fit: Fit, base: Fit) -> np.ndarray:
    """The multiplier at each point of the frontier without a law: what base's frontier needs ÷ x, nan where it has no such loss."""
    return base.frontier.x_for(fit.frontier.losses) / fit.frontier.x


def interval(values: list[float], level: float) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)
