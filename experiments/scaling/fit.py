"""From runs to scaling laws. For each structure, along an axis x (training FLOPs, or seconds):

points      A run's evaluations where the learning rate is constant, its end alone where it decays. Runs that
            differ only in the seed count as one, their mean; where some end early, the others continue it.
frontier    The lowest loss that any run has reached by x, at 12 budgets a decade, by interpolation in log x.
            It is used between the budgets at which the smallest and the largest size are the best ones. These
            follow from where one size hands over to the next, by a line in log size over log x.
law         L = L∞ + (x / x0)^-a through the frontier, by least squares with Huber weights.
intervals   A parametric bootstrap: all losses of a run move by the noise between seeds (less for a mean of
            several), each evaluation by the noise within a run, and frontier and law are computed again.
multiplier  The x that dense needs for the same loss ÷ the x that the structure needs: by the laws of both,
            where both frontiers have that loss; and from the points of one frontier to the other.

Seconds are iterations · the median time of one, over all runs of a structure and size. Runs that share a
machine slow each other down; experiments.bench measures the times alone.
"""
import contextlib
import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from experiments.launcher import NOT_IN_NAMES, TRAIN_DEFAULTS
from lib.figure import LOSS
from lib.log import read_log, validation_windows

AXES = {"flops": "training FLOPs", "flops_without_output_layer": "training FLOPs without the output layer",
        "seconds": "training seconds"}
PER_DECADE = 12     # budgets of a frontier
TAXONOMY = {"omega": "ω, parameter sharing", "psi": "ψ, rank", "nu": "ν, compute intensity"}
REACHED = 0.99      # this share of a budget counts as reaching it, since iterations are whole
SIZE = ("n_embd", "n_layer", "n_head")
STEP_SHAPE = (*SIZE, "block_size", "batch_size")    # what a step's time depends on, besides the vocabulary
# losses compare if these are equal
COMPARABLE = ("dataset", "block_size", "vocab_size", "windows", "loss")
# runs of a structure may differ in these without a remark
VARIED = (*SIZE, "learning_rate", "seed", "max_iters", "lr_decay_iters", "dtype", "compile")
# these change rounding alone; eval_iters and eval_tokens are counted in 'windows'
SAME_RESULT = ("device", "backend", "kernel", "eval_iters", "eval_tokens")
SHARE = 0.9         # seeds whose lengths differ by less end together: their mean ends with the shortest
HUBER = 1.345       # residuals beyond this many standard deviations count less


class Points(NamedTuple):
    """A run's evaluations, in the order of training: arrays of the same length."""
    tokens: np.ndarray
    losses: np.ndarray  # validation cross-entropy in nats per token, or what config['loss'] says


@dataclasses.dataclass
class MeasuredRun:
    """What a log says of a run of one structure, its label."""
    name: str
    label: str
    config: dict        # see comparable_config
    params: int
    active_params: int
    per_token: dict[str, float]     # {axis: FLOPs or seconds of a token}
    points: Points
    train_loss: float   # of the last logged iteration
    seeds: int = 1      # runs that this is the mean of

    def curve(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """(FLOPs or seconds, loss) at each point."""
        return self.points.tokens * self.per_token[axis], self.points.losses

    @property
    def size(self) -> str:
        return f"{self.config['n_layer']} x {self.config['n_embd']}"

    @property
    def first(self) -> float:
        return self.points.tokens[0]

    @property
    def last(self) -> float:
        return self.points.tokens[-1]

    def loss_after(self, tokens):
        """Its loss after so many tokens, between its points by interpolation in log tokens."""
        return np.interp(np.log(tokens), np.log(self.points.tokens), self.points.losses)


class Law(NamedTuple):
    """L = floor + (x / scale)^-exponent."""
    floor: float
    scale: float
    exponent: float

    def loss(self, x):
        return self.floor + (np.asarray(x, float) / self.scale) ** -self.exponent

    def x(self, loss):
        """Where the law reaches a loss; infinite at or below its floor."""
        above = np.maximum(np.asarray(loss, float) - self.floor, 0.0)
        with np.errstate(divide="ignore", over="ignore"):   # infinite there
            return self.scale * above ** (-1 / self.exponent)


def label_of(folder: str, config: dict) -> str:
    """Name of a run's structure: the plan's, else one made of its settings."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open(os.path.join(folder, "settings.json"), encoding="utf-8") as f:
            return json.load(f)["label"]
    experts = {"num_experts": "_moe", "ffn_experts": "_ffn_moe"}
    label = config["struct"] + "".join(suffix for key, suffix in experts.items() if config.get(key))
    label = label.replace("dense_ffn_moe", "moe")   # the name of its config
    usual = {"theta": None, "rank": None, "num_experts": 8, "ffn_experts": 8, "layers": "all"}
    own = {key: value for key, value in config.items() if key in usual and value not in (0, usual[key])}
    return label + "".join(f"-{key}={value}" for key, value in own.items() if value is not None)


def theta_of(config: dict):
    """structured.Theta of a run's projections, of one expert where there are experts in them; None for those
    that are no einsum, and for settings that do not say."""
    from structured import STRUCTURES, Theta    # only here, since it imports torch
    if config.get("theta"):
        return Theta.parse(config["theta"])
    theta = STRUCTURES.get(config.get("struct"))
    if theta and (config.get("num_experts") or config.get("rank")):
        # structured.layer_sizes: experts have rank 1, of low rank d / E; and a rank that is set does not grow
        grows = config["struct"] == "low_rank" and not config.get("rank")
        theta = Theta(*theta[:6], 1 if grows else 0)
    return theta


def comparable_config(start: dict) -> dict:
    """The settings by which runs are compared, from a log's first line, where old ones hold None for what
    train.py found out later. Raises KeyError where one is missing. Device, backend and kernel change nothing
    but rounding and are left out, as is the decay where the rate is constant."""
    config = dict(start["config"])
    config |= {key: config[key] for key in ("learning_rate", "seed", "max_iters", "decay_lr", *STEP_SHAPE)}
    config |= {key: start.get(key, config.get(key)) for key in ("dtype", "compile")}
    config["vocab_size"] = start.get("model_args", {}).get("vocab_size")
    config["loss"] = start.get("loss", LOSS)  # of another program's log
    config["windows"] = validation_windows(config)
    min_lr, decay_iters = config.pop("min_lr", None), config.pop("lr_decay_iters", None)
    if config["decay_lr"]:
        rate = config["learning_rate"] or 1.0
        config["min_lr ÷ learning_rate"] = 0.1 if min_lr is None else float(f"{min_lr / rate:.6g}")
        config["lr_decay_iters"] = config["max_iters"] if decay_iters is None else decay_iters
    return {key: value for key, value in config.items() if key not in (*NOT_IN_NAMES, *SAME_RESULT)}


def read_run(folder: str) -> tuple[MeasuredRun | None, str | None]:
    """(a run that can be used or None, what a reader should know of it or None), from its log.jsonl. Raises
    KeyError, TypeError, AttributeError or ValueError for a log that lacks something."""
    lines, name = read_log(folder), os.path.basename(os.path.abspath(folder))
    starts, trains, skips = ([p for p in lines if p.get("type") == kind] for kind in ("run", "train", "skip"))
    evals = {p["iter"]: p for p in lines if p.get("type") == "eval"}
    if not starts:
        return None, f"{name}: left out, its log has no run line"
    start, config = starts[-1], comparable_config(starts[-1])
    iters = np.array(sorted(evals))
    tokens, losses = (np.array([evals[i][key] for i in iters], float) for key in ("tokens", "val_loss"))
    last = iters[-1] if evals else 0
    unfinished = last < config["max_iters"]
    if diverged := divergence(losses, lines[-1] if unfinished else {}):
        return None, f"{name}: left out, diverged: {diverged}"
    if last == 0:
        return None, f"{name}: left out, it has no evaluation after the first iteration"
    remarks = [f"{len(skips)} iterations skipped, whose loss or gradient was not finite"] if skips else []
    if unfinished:
        remarks.append(f"unfinished, at iteration {last} of {config['max_iters']}")
        if config["decay_lr"]:
            return None, f"{name}: {remarks[-1]}; left out, since its rate decays and only an end counts"
    kept = iters == last if config["decay_lr"] else iters > 0
    points = Points(tokens[kept], losses[kept])
    per_token = {"flops": start["flops_per_token"],
                 "flops_without_output_layer": start["flops_per_token_without_output_layer"]}
    if trains:
        ms = statistics.median(p["ms_per_iter"] for p in trains)
        per_token["seconds"] = ms / 1e3 / start["tokens_per_iter"]
    run = MeasuredRun(name, label_of(folder, start["config"]), config, start["params"],
                      start["active_params"], per_token, points, trains[-1]["loss"] if trains else math.nan)
    return run, f"{name}: {'; '.join(remarks)}" if remarks else None


def divergence(losses: np.ndarray, end: dict) -> str | None:
    """What is wrong with a run, if anything; end: the last line of its log if it is unfinished."""
    if not np.isfinite(losses).all():
        return "its validation loss is not finite"
    if end.get("type") == "skip":
        return f"its loss or gradient is not finite at its end, iteration {end['iter']}"
    if len(losses) > 2 and losses[-1] - losses.min() > 0.1 * (losses[0] - losses.min()):
        return f"its validation loss ends at {losses[-1]:.3f}, after {losses.min():.3f}"
    return None


def read_runs(folders: Iterable[str]) -> tuple[list[MeasuredRun], list[str]]:
    """(runs, remarks on those left out, unfinished or unlike others) below the folders. Raises ValueError
    where there is none, or where their losses do not measure the same."""
    paths: set[str] = set()
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f"there is no folder {folder!r}: give the folder of some runs with --runs")
        paths |= {os.path.realpath(root) for root, _, files in os.walk(folder) if "log.jsonl" in files}
    runs, notes = [], []
    for path in sorted(paths):
        try:
            run, note = read_run(path)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            name = os.path.basename(path)
            run = None
            note = f"{name}: left out, its log was not written by train.py ({type(e).__name__}: {e})"
        runs += [run] if run else []
        notes += [note] if note else []
    if not runs:
        why = f" ({notes[0]})" if notes else ""
        raise ValueError(f"there is no run below {', '.join(folders)} that can be used{why}")
    for key, (one, other, *_) in differences(runs, COMPARABLE).items():
        raise ValueError(f"these runs do not measure the same loss: {key} is {one} and {other}; keep them in "
                         "different folders")
    runs, copies = without_copies(runs)
    return runs, notes + copies + unlike(runs)


def differences(runs: list[MeasuredRun], keys: Iterable[str]) -> dict[str, list[str]]:
    """{key: ['<value> in <name of a run>', ...]} of those known settings in which the runs differ."""
    found = {}
    for key in keys:
        values = {str(run.config[key]): run.name for run in runs if key in run.config}
        if len(values) > 1:
            found[key] = [f"{value} in {name}" for value, name in values.items()]
    return found


def grouped(runs: Iterable[MeasuredRun], key: Callable) -> dict:
    """{key of a run: the runs that have it}."""
    groups: dict = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def alike(runs: Iterable[MeasuredRun], except_for: Iterable[str]) -> list[list[MeasuredRun]]:
    """Groups of runs of a structure that are alike but for these settings, and their length where the rate is
    constant. Models of other sizes, as an earlier version made of the same settings, are not alike."""
    def key(run: MeasuredRun) -> str:
        without = (*except_for, *(() if run.config["decay_lr"] else ("max_iters",)))
        config = {name: value for name, value in run.config.items()  # old logs lack keys that are new
                  if name not in without and value != TRAIN_DEFAULTS.get(name, ...)}
        sizes = [run.params, f"{run.per_token['flops']:.4g}"]
        return json.dumps([run.label, config, sizes], sort_keys=True)
    return list(grouped(runs, key).values())


def without_copies(runs: list[MeasuredRun]) -> tuple[list[MeasuredRun], list[str]]:
    """(the longest of each group of runs that do not even differ in the seed, remarks on the others)."""
    found, notes = [], []
    for same in alike(runs, ()):
        longest, *others = sorted(same, key=lambda run: -run.last)
        found.append(longest)
        notes += [f"{run.name}: left out, another run of the same settings and seed is as long or longer, "
                  f"{longest.name}" for run in others]
    return found, notes


def unlike(runs: list[MeasuredRun]) -> list[str]:
    """Remarks on structures whose runs differ in more than size, learning rate, seed and length."""
    notes = []
    for label, mine in sorted(grouped(runs, lambda run: run.label).items()):
        keys = {key for run in mine for key in run.config} - {*VARIED}
        for key, values in differences(mine, sorted(keys)).items():
            notes.append(f"{label}: its runs differ in {key}, {', '.join(values)}; the frontier is of all")
    return notes


def share_seconds(runs: list[MeasuredRun]) -> None:
    """Give all runs of a structure and shape the median of their seconds per token."""
    timed = [run for run in runs if "seconds" in run.per_token]
    for same in grouped(timed, lambda run: (run.label, *map(run.config.get, STEP_SHAPE))).values():
        seconds = statistics.median(run.per_token["seconds"] for run in same)
        for run in same:
            run.per_token["seconds"] = seconds


def take_seconds(runs: list[MeasuredRun], paths: Iterable[str]) -> list[str]:
    """Take seconds per token from training steps that experiments.bench timed. Returns remarks on runs
    whose structure and shape it did not time; raises ValueError for a file that bench did not write."""
    known, machines = {}, set()
    for path in paths:
        try:
            with open(path, encoding="utf-8") as f:
                found = json.load(f)
            config = found["config"] | dict(n_head=found["config"]["n_embd"] // found["config"]["head_size"])
            shape = *(config[key] for key in STEP_SHAPE), config["vocab_size"]
            machine = dict(found.get("machine", {}), system="")     # not the version of its kernel
            machines.add(json.dumps(machine, sort_keys=True))
            known |= {(step["config"], *shape): 1 / step["tokens_per_s"] for step in found["steps"]}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is no output of experiments.bench ({type(e).__name__}: {e})") from None
    notes = ["the steps of --bench are of several machines"] if len(machines) > 1 else []
    for run in runs:
        run.per_token.pop("seconds", None)
        step = run.label, *(run.config[key] for key in STEP_SHAPE), run.config.get("vocab_size")
        if step in known:
            run.per_token["seconds"] = known[step]
        else:
            notes.append(f"{run.name}: no seconds, for no step of {run.label} and its shape was timed")
    return notes


def same_but_seed(runs: list[MeasuredRun]) -> tuple[list[list[MeasuredRun]], list[str]]:
    """(groups of runs that differ only in the seed, remarks on those left out of their group, since they end
    before another one's first evaluation)."""
    groups, notes = [], []
    for same in alike(runs, ("seed",)):
        least = max(run.first for run in same)
        groups.append([run for run in same if run.last >= least])
        notes += [f"{run.name}: left out of its seeds' mean, it ends early, after {run.last:,.0f} tokens"
                  for run in same if run.last < least]
    return groups, notes


def shared_points(same: list[MeasuredRun]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, losses of shape (runs, tokens)) of a group of same_but_seed: first up to the end of the
    shortest run, then from there on for those that are much longer (by SHARE), and so on."""
    begin, left = max(run.first for run in same), same
    while left:
        shortest = min(left, key=lambda run: run.last)
        tokens = np.unique(np.append(shortest.points.tokens[shortest.points.tokens >= begin], begin))
        yield tokens, np.array([run.loss_after(tokens) for run in left])
        begin, left = shortest.last, [run for run in left if SHARE * run.last > shortest.last]


def mean_of_seeds(groups: list[list[MeasuredRun]]) -> list[MeasuredRun]:
    """One run for each group of same_but_seed: the mean of their losses. Where one ends, the mean of the
    others continues the mean of all: as for the intervals, seeds are taken to differ by a constant factor."""
    means = []
    for same in groups:
        tokens, losses = np.empty(0), np.empty(0)
        for more, of_runs in shared_points(same):
            mean = of_runs.mean(axis=0)
            if len(tokens):
                more, mean = more[1:], mean[1:] * (losses[-1] / mean[0])
            tokens, losses = np.append(tokens, more), np.append(losses, mean)
        axes = [axis for axis in AXES if all(axis in run.per_token for run in same)]
        per_token = {axis: statistics.mean(run.per_token[axis] for run in same) for axis in axes}
        longest = max(same, key=lambda run: run.last)
        means.append(dataclasses.replace(longest, points=Points(tokens, losses), per_token=per_token,
                                         seeds=len(same)))
    return means


def seed_noise(groups: list[list[MeasuredRun]]) -> tuple[float | None, list[str]]:
    """(relative standard deviation of a run's loss between seeds, over all points that two or more share,
    pooled over the groups of same_but_seed; a line for each group that has several, with its last losses).
    None without such a group."""
    squares, freedom, lines = 0.0, 0, []
    for same in (group for group in groups if len(group) > 1):
        shared = [(tokens, losses) for tokens, losses in shared_points(same) if len(losses) > 1]
        square = sum(((losses / losses.mean(axis=0) - 1) ** 2).sum() for _, losses in shared)
        square /= sum(len(tokens) * (len(losses) - 1) for tokens, losses in shared)
        squares, freedom = squares + float(square) * (len(same) - 1), freedom + len(same) - 1
        tokens, losses = shared[-1]
        listed = ", ".join(f"{loss:.4f}" for loss in losses[:, -1])
        lines.append(f"{same[0].label}, {same[0].size}: {listed} after {tokens[-1]:,.0f} tokens")
    return (math.sqrt(squares / freedom) if freedom else None), lines


def point_noise(runs: list[MeasuredRun]) -> float:
    """Relative standard deviation of an evaluation about its run's curve: from second differences over log
    tokens, of the later half of each run, where the curve bends least."""
    found = []
    for run in runs:
        half = slice(len(run.points.tokens) // 2, None)
        x, y = np.log(run.points.tokens[half]), run.points.losses[half] / run.points.losses[-1]
        if len(x) >= 5:
            t = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
            found.append((y[1:-1] - (1 - t) * y[:-2] - t * y[2:]) / np.sqrt(1 + (1 - t) ** 2 + t ** 2))
    return robust_deviation(np.concatenate(found)) if found else 0.0


def robust_deviation(residuals: np.ndarray) -> float:
    """Standard deviation from the median of absolute values, which a few outliers do not change."""
    return float(1.4826 * np.median(np.abs(residuals)))


class Frontier(NamedTuple):
    x: np.ndarray       # budgets, ascending
    losses: np.ndarray  # the lowest loss reached by each, descending
    owners: np.ndarray  # index of the run that reached it

    def x_for(self, losses) -> np.ndarray:
        """The budget that reaches each loss, by interpolation in logarithms; nan outside of the points."""
        logs = np.interp(-np.log(losses), -np.log(self.losses), np.log(self.x), left=math.nan, right=math.nan)
        return np.exp(logs)


def lower_envelope(x: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices, ascending in x, of the points whose loss is below that of every point before."""
    order = np.lexsort((losses, x))
    lowest = np.minimum.accumulate(losses[order])
    return order[np.diff(lowest, prepend=np.inf) < 0]


def first_budget(x: np.ndarray) -> float:
    """Number, counted from 1 at PER_DECADE a decade, of the first budget that a curve reaches."""
    return np.ceil(np.log10(x[0]) * PER_DECADE - 1e-9)


def last_budget(x: np.ndarray) -> float:
    """Number of the last budget that a curve reaches."""
    return np.floor(np.log10(x[-1] / REACHED) * PER_DECADE)


def frontier_of(curves: list[tuple[np.ndarray, np.ndarray]]) -> Frontier:
    """The lower envelope of curves (x, losses), each ascending in x; one point alone is a curve too. A curve
    that ends just short of a budget, by REACHED, has its last loss there."""
    points = []
    for i, (x, loss) in enumerate(curves):
        if len(x) > 1:
            budgets = 10 ** (np.arange(first_budget(x), last_budget(x) + 1) / PER_DECADE)
            x, loss = budgets, np.interp(np.log(budgets), np.log(x), loss)
        points.append((x, loss, np.full(len(x), i)))
    xs, losses, owners = map(np.concatenate, zip(*points))
    best = lower_envelope(xs, losses)
    return Frontier(xs[best], losses[best], owners[best])


class Growth(NamedTuple):
    exponent: float                 # best size ∝ x^exponent
    window: tuple[float, float]     # x at which the smallest and the largest size are the best ones


def growth_of(frontier: Frontier, sizes: np.ndarray) -> Growth | None:
    """How the best size, in x per token, grows with the budget; None unless three sizes or more are each the
    best somewhere. A size hands over to the next between its last budget and the first one of the next, and
    there the best size is the geometric mean of both."""
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
    return Growth(float(slope), (float(low), float(high)))


def fit_law(x: np.ndarray, losses: np.ndarray, floor: float | None = None) -> Law:
    """L = L∞ + (x / x0)^-a by least squares of relative residuals, L∞ >= 0, 0.01 <= a <= 3. Raises ValueError
    for less than three points. L∞ and k = x0^a are linear: only a is searched, on a grid that is refined."""
    if len(x) < 3:
        raise ValueError(f"a power law needs at least 3 points on the frontier; there are {len(x)}")
    middle = np.exp(np.log(x).mean())   # powers of x / middle stay near 1
    log_x, relative = np.log(x / middle), 1 / losses
    weights, grid = np.ones(len(x)), np.geomspace(0.01, 3, 60)
    for _ in range(20):
        for _ in range(4):
            floors, ks, errors = _solve(grid, log_x, losses, weights * relative ** 2, floor)
            i = int(errors.argmin())
            a, l_inf, k = float(grid[i]), float(floors[i]), float(ks[i])
            grid = np.geomspace(grid[max(0, i - 1)], grid[min(len(grid) - 1, i + 1)], 12)
        residuals = (l_inf + k * np.exp(-a * log_x) - losses) * relative
        limit, before = HUBER * max(robust_deviation(residuals), 1e-9), weights
        weights = np.minimum(1, limit / np.maximum(np.abs(residuals), 1e-12))
        if np.abs(before - weights).max() < 0.01:
            break
        grid = np.clip(np.geomspace(a / 2, a * 2, 24), 0.01, 3)
    return Law(l_inf, float(middle * max(k, 1e-300) ** (1 / a)), a)


def _solve(exponents, log_x, losses, weights, floor):
    """(L∞, k, weighted squared error) for each exponent, by weighted least squares; L∞, k not negative."""
    p = np.exp(-exponents[:, None] * log_x)  # (exponents, points)
    if floor is None:
        mean_p, mean_l = p @ weights / weights.sum(), losses @ weights / weights.sum()
        centred = p - mean_p[:, None]
        slopes = (centred * (losses - mean_l)) @ weights / np.maximum((centred ** 2) @ weights, 1e-300)
        floors = np.maximum(mean_l - slopes * mean_p, 0.0)
    else:
        floors = np.full(len(p), float(floor))
    ks = np.maximum((p * (losses - floors[:, None])) @ weights / ((p ** 2) @ weights), 0.0)  # given L∞
    residuals = floors[:, None] + ks[:, None] * p - losses
    return floors, ks, (residuals ** 2) @ weights


@dataclasses.dataclass
class Fit:
    """What one structure's runs say along one axis."""
    label: str
    axis: str
    runs: list[MeasuredRun]
    frontier: Frontier
    used: np.ndarray            # which points of the frontier the law is fitted to
    growth: Growth | None
    law: Law | None             # None where there are less than three points
    samples: list[Law] = dataclasses.field(default_factory=list)    # of the bootstrap
    growths: list[float] = dataclasses.field(default_factory=list)  # growth.exponent of the bootstrap
    noise: float = 0.0          # relative, of a run

    @property
    def range(self) -> tuple[float, float]:
        """The budgets that the law was fitted to."""
        x = self.frontier.x[self.used]
        return float(x.min()), float(x.max())


def analyse(curves, sizes, window, floor) -> tuple[Frontier, np.ndarray, Growth | None, Law | None]:
    """(frontier, which of its points count, growth of the best size, law) of one structure's curves, between
    the budgets of the window; None there stands for where the smallest, or largest, size is the best one."""
    frontier = frontier_of(curves)
    growth = growth_of(frontier, sizes)
    found = growth.window if growth else (0, math.inf)
    low, high = (end if asked is None else asked for asked, end in zip(window, found))
    used = (frontier.x >= low * 0.999) & (frontier.x <= high * 1.001)
    if used.sum() < 4 and window == (None, None):   # sizes too close to each other to say where it ends
        used = np.ones(len(frontier.x), bool)
    law = fit_law(frontier.x[used], frontier.losses[used], floor) if used.sum() >= 3 else None
    return frontier, used, growth, law


def fit_structure(label: str, runs: list[MeasuredRun], axis: str, *, window=(None, None), floor=None,
                  samples=300, noise: float | None = None, rng=None) -> Fit:
    """Frontier, law and bootstrap of a structure's runs. noise: relative, between seeds; None: residuals."""
    runs = sorted(runs, key=lambda run: run.per_token[axis])
    curves = [run.curve(axis) for run in runs]
    sizes = np.array([run.per_token[axis] for run in runs])
    fit = Fit(label, axis, runs, *analyse(curves, sizes, window, floor))
    if fit.law is None:
        return fit
    x, losses, owners = (column[fit.used] for column in fit.frontier)
    residuals = losses / fit.law.loss(x) - 1
    # the points of a run err together: each run counts once
    squares = [(residuals[owners == i] ** 2).mean() for i in np.unique(owners)]
    between = math.sqrt(sum(squares) / max(1, len(squares) - 2))
    fit.noise, within = max(noise or 0.0, between), point_noise(runs)
    spreads = [max((noise or 0.0) / math.sqrt(run.seeds), between) for run in runs]
    rng = rng or np.random.default_rng(0)
    span = (window[0] or x[0], window[1] or x[-1])
    for _ in range(samples):
        moved = [(x, y * (1 + spread * rng.standard_normal() + within * rng.standard_normal(len(y))))
                 for spread, (x, y) in zip(spreads, curves)]
        _, _, growth, law = analyse(moved, sizes, span, floor)
        fit.samples += [law] if law else []
        fit.growths += [growth.exponent] if growth else []
    return fit


def multipliers(fit: Fit, base: Fit, x: Iterable[float], level: float) -> list[tuple | None]:
    """(multiplier, low, high) at each x: what base needs for the loss that fit has there, ÷ x. None where x
    is outside of what fit has measured, or its loss outside of what base has."""
    found: list[tuple | None] = []
    losses = base.frontier.losses[base.used]
    low, high = fit.range
    for at in x:
        value, *drawn = (float(of_base.x(law.loss(at))) / at for law, of_base in
                         zip([fit.law, *fit.samples], [base.law, *base.samples]))
        is_known = low * 0.999 <= at <= high * 1.001 and losses.min() <= fit.law.loss(at) <= losses.max()
        # the lowest of noisy runs is too low, and noise added once more lowers it by as much again: so the
        # interval is reflected about the value, in logarithms
        turned = [value * value / one for one in drawn]
        found.append((value, *interval(turned, level)) if is_known and math.isfinite(value) else None)
    return found


def measured_multipliers(fit: Fit, base: Fit) -> np.ndarray:
    """At each point of the frontier what base's needs for its loss ÷ x; nan where it has no such loss."""
    return base.frontier.x_for(fit.frontier.losses) / fit.frontier.x


def interval(values: list[float], level: float) -> tuple[float, float]:
    """The quantiles that hold this share of the values between them; nan where there are none."""
    if not values:
        return math.nan, math.nan
    return tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="nearest").tolist())
