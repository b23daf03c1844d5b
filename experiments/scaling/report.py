"""What runs have to say about scaling, as tables, csv files and remarks, for scaling.py; scaling_fit.py has the mathematics."""
import csv
import json
import math
import os
from collections.abc import Iterable

import numpy as np

from experiments.scaling.fit import (AXES, COMPARABLE, PER_DECADE, Fit, Run, alike, fit_structure, interval, mean_of_seeds,
                         measured_multipliers, multipliers, read_runs, same_but_seed, seed_noise, share_seconds, take_seconds)

GAP = 10 ** (2.5 / PER_DECADE)  # between neighbors of a frontier, what is more than this is remarked on

# ---- What a reader should know --------------------------------------------------------------------------------------

def remarks(fit: Fit) -> list[str]:
    """Outliers of a fit, and where its frontier may lie lower than the runs could show."""
    notes, frontier = [], fit.frontier
    for before, after in zip(range(len(frontier.x) - 1), range(1, len(frontier.x))):
        one, other = (fit.runs[frontier.owners[i]] for i in (before, after))
        first = np.ceil(np.log10(other.x(fit.axis)[0]) * PER_DECADE - 1e-9)
        if other.size != one.size and len(other.points.tokens) > 1 and np.log10(frontier.x[after]) * PER_DECADE < first + 0.5:
            notes.append(f"{fit.label}: the frontier passes to {other.name} at its first evaluation, and may be lower before; "
                         "more evaluations would tell")
        if other.size != one.size and frontier.x[after] > GAP * frontier.x[before]:
            notes.append(f"{fit.label}: {one.name} has ended before {other.name} gets ahead of it, and the frontier between "
                         f"{frontier.x[before]:.2g} and {frontier.x[after]:.2g} FLOPs is not known; a longer run would tell")
    if fit.law is None:
        return notes + [f"{fit.label}: no law, its frontier has {len(frontier.x)} points"]
    residuals = frontier.losses / fit.law.loss(frontier.x) - 1
    limit = max(0.01, 5 * 1.4826 * float(np.median(np.abs(residuals[fit.used]))))
    for i in np.flatnonzero(fit.used & (np.abs(residuals) > limit)):
        notes.append(f"{fit.label}: outlier, {fit.runs[frontier.owners[i]].name} lies {abs(residuals[i]):.1%} "
                     f"{'below' if residuals[i] < 0 else 'above'} the law at {frontier.x[i]:.2g} FLOPs; kept, and counts less")
    if fit.growth is None:
        notes.append(f"{fit.label}: fewer than three sizes are each the best somewhere, so that the ends of the frontier are "
                     "not known; the law goes through all of it that is in the range asked for")
    return notes


def worse_though_larger(runs: list[Run], noise: float) -> list[str]:
    """Runs whose loss is above that of a smaller run of the same structure and learning rate after the same tokens."""
    notes = []
    for run in runs:
        for other in runs:
            like = all(run.config.get(k) == other.config.get(k) for k in ("learning_rate", "decay_lr", "seed", "weight_decay"))
            if run.label == other.label and like and run.flops_per_token["flops"] > 1.2 * other.flops_per_token["flops"]:
                tokens = min(run.points.tokens[-1], other.points.tokens[-1])
                if tokens < max(run.points.tokens[0], other.points.tokens[0]):
                    continue
                mine, smaller = (float(np.interp(tokens, *r.points)) for r in (run, other))
                if mine > smaller * (1 + max(0.02, 4 * noise)):
                    notes.append(f"{run.name}: outlier, {mine:.3f} after {tokens:,.0f} tokens where the smaller {other.name} "
                                 f"has {smaller:.3f}; kept")
    return notes


def best_rates(runs: list[Run]) -> list[str]:
    """For runs that differ in the learning rate alone: the losses after the same tokens, the least in bold."""
    lines = []
    for same in alike(runs, ("learning_rate",)):
        tokens = min(run.points.tokens[-1] for run in same)
        if len(same) > 1 and tokens >= max(run.points.tokens[0] for run in same):
            losses = {run.config["learning_rate"]: float(np.interp(tokens, *run.points)) for run in same}
            best = min(losses, key=losses.get)
            name = next(run.name for run in same if run.config["learning_rate"] == best)
            edge = " (at the edge of the rates tried)" if best in (min(losses), max(losses)) else ""
            lines.append(f"{same[0].label}, {same[0].size}: "
                         + ", ".join(f"{'**' * (rate == best)}{rate:g}: {loss:.3f}{'**' * (rate == best)}"
                                     for rate, loss in sorted(losses.items()))
                         + f" after {tokens:,.0f} tokens{edge}; the best is {name}")
    return sorted(lines)


# ---- Tables ---------------------------------------------------------------------------------------------------------

def budgets_of(fits: Iterable[Fit]) -> list[float]:
    """1 and 3 of every power of ten within the frontiers."""
    xs = np.concatenate([fit.frontier.x[fit.used] for fit in fits])
    powers = range(math.floor(math.log10(xs.min())), math.ceil(math.log10(xs.max())) + 1)
    return [b for p in powers for b in (10.0 ** p, 3 * 10.0 ** p) if xs.min() * 0.999 <= b <= xs.max() * 1.001]


def number(value: float, digits: int = 3) -> str:
    """Three digits, with an exponent where there are more than five places."""
    plain = not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{value:.{digits}g}" if plain else f"{value:.2e}"


def between(values: list[float], level: float) -> str:
    low, high = interval(values, level)
    return f" ({number(low)} to {number(high)})" if math.isfinite(low) else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def laws_table(fits: dict[str, Fit], level: float, unit: str) -> str:
    rows = []
    for label, fit in fits.items():
        if fit.law is None:
            rows.append([label, *["—"] * 7])
            continue
        growth = f"{fit.growth.exponent:.2f}" + between(fit.growths, level) if fit.growth else "—"
        rows.append([label, number(fit.law.floor) + between([s.floor for s in fit.samples], level),
                     number(fit.law.scale) + between([s.scale for s in fit.samples], level),
                     number(fit.law.exponent) + between([s.exponent for s in fit.samples], level),
                     f"{number(fit.range[0])} to {number(fit.range[1])}", str(int(fit.used.sum())), growth,
                     f"{fit.noise:.2%}"])
    return table(["structure", "L∞", "C0", "a", f"fitted between ({unit})", "points", "best size ∝ C^p, p", "noise"], rows)


def multiplier_table(fits: dict[str, Fit], base: str, budgets: list[float], level: float) -> str:
    rows = []
    for label, fit in fits.items():
        if label != base and fit.law is not None:
            cells = multipliers(fit, fits[base], np.array(budgets), level)
            rows.append([label, *["—" if c is None else f"{number(c[0])} ({number(c[1])} to {number(c[2])})" for c in cells]])
    return table(["structure", *[f"{b:.0e}" for b in budgets]], rows)


def nearest(fit: Fit, budget: float) -> int | None:
    """Place of the frontier's point nearest to a budget; None where it is further off than 20 %."""
    off = np.abs(np.log(fit.frontier.x / budget))
    return int(off.argmin()) if off.min() <= 0.2 else None


def measured_table(fits: dict[str, Fit], base: str, budgets: list[float]) -> str:
    """Multipliers between the frontiers themselves, at the point nearest to each budget."""
    rows = []
    for label, fit in fits.items():
        if label != base:
            gains, places = measured_multipliers(fit, fits[base]), [nearest(fit, b) for b in budgets]
            rows.append([label, *["—" if i is None or math.isnan(gains[i]) else number(gains[i]) for i in places]])
    return table(["structure", *[f"{b:.0e}" for b in budgets]], rows)


def sizes_table(fits: dict[str, Fit], budgets: list[float]) -> str:
    """At each budget: the run that has the least loss, and whether it is at the edge of the sizes tried."""
    rows = []
    for label, fit in fits.items():
        tried = {run.size for run in fit.runs}
        ordered = sorted(tried, key=lambda size: min(r.flops_per_token["flops"] for r in fit.runs if r.size == size))
        for b in budgets:
            if (i := nearest(fit, b)) is None:
                continue
            run = fit.runs[fit.frontier.owners[i]]
            edge = {ordered[0]: "smallest", ordered[-1]: "largest"}.get(run.size, "") if len(tried) > 1 else "only"
            rows.append([label, f"{b:.0e}", run.size, f"{run.params:,}", f"{run.active_params:,}",
                         f"{b / run.flops_per_token['flops']:,.0f}", f"{fit.frontier.losses[i]:.3f}", edge])
    return table(["structure", "FLOPs", "layers x width", "parameters", "active", "tokens", "loss", "of the sizes tried"], rows)


def write_csv(path: str, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def round_all(value):
    """Floats to six digits, for files that people compare."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: round_all(v) for k, v in value.items()}
    return [round_all(v) for v in value] if isinstance(value, (list, tuple)) else value


# ---- All of it ------------------------------------------------------------------------------------------------------

def fit(folders: list[str], out: str, *, base: str | None, floor: float | None, window: tuple, samples: int, level: float,
        bench: Iterable[str] = ()) -> None:
    """Fits the runs below the folders; writes fit.json, runs.csv, frontier.csv and table.md into `out`.

    window is in FLOPs, and narrows the fits along FLOPs alone. base: None stands for dense, which may be missing. Raises
    ValueError, in one sentence, for runs that cannot be fitted.
    """
    runs, notes = read_runs(folders)
    if bench:
        notes += take_seconds(runs, bench)
    share_seconds(runs)
    labels = {run.label for run in runs}
    if base not in labels | {None}:
        raise ValueError(f"there are no runs of {base!r}, that multipliers could be against: base takes one of "
                         f"{', '.join(sorted(labels))}")
    if (base := base or "dense") not in labels:
        notes.append(f"no multipliers, since there are no runs of {base}; --base takes another structure")
    least = min(run.points.losses.min() for run in runs)
    if floor is not None and not 0 <= floor < least:
        raise ValueError(f"floor must not be negative, and below all losses, the least of which is {least:.4g}; "
                         f"got {floor:g}")
    groups, short = same_but_seed(runs)
    means, (noise, seeds) = mean_of_seeds(groups), seed_noise(groups)
    notes += short
    fits: dict[str, dict[str, Fit]] = {}
    for axis, what in AXES.items():
        rng = np.random.default_rng(0)
        for label in sorted(labels, key=lambda label: (label != base, label)):
            if mine := [run for run in means if run.label == label and axis in run.flops_per_token]:
                found = fit_structure(label, mine, axis, window=window if axis != "seconds" else (None, None),
                                      floor=floor, samples=samples, noise=noise, rng=rng)
                if found.used.any():
                    fits.setdefault(axis, {})[label] = found
                else:
                    notes.append(f"{label}: left out along {what}, no point of its frontier is in the range")
    if "flops" not in fits:
        raise ValueError("no frontier has a point between min_flops and max_flops: ask for a wider range, or for more runs")
    notes += worse_though_larger(runs, noise or 0.0)
    for f in fits["flops"].values():
        notes += remarks(f)
    about = (f"{len(runs)} runs of {len(labels)} structures. Losses are validation cross-entropy in nats per token, budgets C in "
             "FLOPs (2 per multiply-add, backward twice the forward, attention and routers included; embeddings are looked up, "
             f"and cost none). Intervals: {level:.0%}, parametric bootstrap with {samples} samples; "
             "the noise of a run, relative, is "
             + (f"{noise:.2%} between seeds, or more where a structure's runs scatter more about its law" if noise
                else "how its structure's runs scatter about the law, since none differ in their seed alone")
             + (f"; L∞ is set to {floor:g}" if floor is not None else "") + ".")
    text = [about]
    for axis, of_axis in fits.items():
        text += sections(axis, of_axis, base, level)
    if seeds:
        text += ["## Seeds", "\n".join(f"- {line}" for line in seeds)]
    if rates := best_rates(runs):
        text += ["## Learning rates", "\n".join(f"- {line}" for line in rates)]
    text += ["## Left out, or to be taken with care", "\n".join(f"- {note}" for note in notes) or "Nothing."]
    os.makedirs(out, exist_ok=True)
    write_data(out, runs, fits, base, level)
    with open(os.path.join(out, "table.md"), "w", encoding="utf-8") as f:
        f.write("\n\n".join(text) + "\n")
    print("\n\n".join(text))


def comparable(fits: dict[str, Fit], base: str) -> bool:
    """Is there something to take multipliers against?"""
    return base in fits and fits[base].law is not None


def sections(axis: str, fits: dict[str, Fit], base: str, level: float) -> list[str]:
    """Paragraphs of the page about one axis: laws, multipliers, and the best sizes along FLOPs."""
    what, unit = AXES[axis], "s" if axis == "seconds" else "FLOPs"
    timing = ", C in seconds; the intervals hold the noise of losses, none of times" if unit == "s" else ""
    text = [f"## Against {what}", f"L = L∞ + (C / C0)^-a{timing}:",
            laws_table(fits, level, unit)]
    budgets = budgets_of(fits.values())
    if comparable(fits, base) and len(fits) > 1:
        text += [f"{what[0].upper()}{what[1:]} that {base} needs for the same loss ÷ those that the structure needs, at the budgets "
                 f"in the head of the table ({unit}; —: outside of what both laws were fitted to):",
                 multiplier_table(fits, base, budgets, level),
                 "The same from the points of one frontier to those of the other, without laws:",
                 measured_table(fits, base, budgets)]
    return text + (["The best size at each budget:", sizes_table(fits, budgets)] if axis == "flops" else [])


def write_data(out: str, runs: list[Run], fits: dict[str, dict[str, Fit]], base: str, level: float) -> None:
    """runs.csv, frontier.csv, and fit.json with all that the figures need."""
    rows: list[dict] = []
    drawn: dict = {"axes": {axis: {} for axis in fits}, "base": base}
    for axis, of_axis in fits.items():
        for label, f in of_axis.items():
            none = [None] * len(f.frontier.x)
            gains = multipliers(f, of_axis[base], f.frontier.x, level) if comparable(of_axis, base) and f.law else none
            measured = [None if math.isnan(m) else float(m) for m in measured_multipliers(f, of_axis[base])
                        ] if base in of_axis else none
            drawn["axes"][axis][label] = dict(x=f.frontier.x.tolist(), loss=f.frontier.losses.tolist(), used=f.used.tolist(),
                                              law=f.law._asdict() if f.law else None, multipliers=gains,
                                              measured_multipliers=measured)
            for x, loss, owner, used, gain, found in zip(*f.frontier, f.used, gains, measured):
                value, low, high = gain or ("", "", "")
                rows.append(dict(axis=axis, structure=label, x=float(x), loss=float(loss), run=f.runs[owner].name,
                                 fitted=bool(used), law=float(f.law.loss(x)) if f.law else "", multiplier=value, low=low,
                                 high=high, measured_multiplier=found))
    drawn["measure"] = {key: runs[0].config[key] for key in COMPARABLE if key in runs[0].config}
    drawn["runs"] = [dict(run=r.name, structure=r.label, n_layer=r.config["n_layer"], n_embd=r.config["n_embd"],
                          learning_rate=r.config["learning_rate"], seed=r.config["seed"], params=r.params,
                          active_params=r.active_params, tokens=float(r.points.tokens[-1]),
                          **{axis: float(r.x(axis)[-1]) if axis in r.flops_per_token else "" for axis in AXES},
                          train_loss=r.train_loss, val_loss=float(r.points.losses[-1])) for r in runs]
    write_csv(os.path.join(out, "runs.csv"), round_all(drawn["runs"]))
    write_csv(os.path.join(out, "frontier.csv"), round_all(rows))
    drawn["curves"] = [dict(structure=r.label, loss=r.points.losses.tolist(),
                            **{axis: r.x(axis).tolist() for axis in AXES if axis in r.flops_per_token}) for r in runs]
    with open(os.path.join(out, "fit.json"), "w", encoding="utf-8") as f:
        json.dump(round_all(drawn), f)
