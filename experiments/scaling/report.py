"""What runs say about scaling, as tables, csv files and remarks; fit.py has the mathematics."""
import csv
import json
import math
import os
from collections.abc import Iterable

import numpy as np

from experiments.scaling.fit import (
    AXES, COMPARABLE, PER_DECADE, TAXONOMY, Fit, MeasuredRun, alike, first_budget, fit_structure, interval,
    last_budget, mean_of_seeds, measured_multipliers, multipliers, read_runs, robust_deviation,
    same_but_seed, seed_noise, share_seconds, take_seconds, theta_of)
from lib.files import write_whole
from lib.table import markdown_table

GAP = 10 ** (2.5 / PER_DECADE)  # a wider gap between two points of a frontier is remarked on


def remarks(fit: Fit) -> list[str]:
    """Outliers of a fit, and where its frontier may lie lower than the runs could show."""
    notes, frontier = handover_remarks(fit), fit.frontier
    if fit.law is None:
        return notes + [f"{fit.label}: no law, {fit.used.sum()} points of its frontier are in the range"]
    residuals = frontier.losses / fit.law.loss(frontier.x) - 1
    limit = max(0.01, 5 * robust_deviation(residuals[fit.used]))
    for i in np.flatnonzero(fit.used & (np.abs(residuals) > limit)):
        run, side = fit.runs[frontier.owners[i]], "below" if residuals[i] < 0 else "above"
        notes.append(f"{fit.label}: outlier, {run.name} lies {abs(residuals[i]):.1%} {side} the law at "
                     f"{frontier.x[i]:.2g} FLOPs; kept, and counts less")
    if fit.growth is None:
        notes.append(f"{fit.label}: fewer than three sizes are each the best somewhere, so that the ends of "
                     "the frontier are not known; the law goes through all of it within the range asked for")
    return notes


def handover_remarks(fit: Fit) -> list[str]:
    """Where a frontier passes to another size, and longer runs or earlier evaluations could lower it."""
    notes, x = [], fit.frontier.x
    owners = [fit.runs[i] for i in fit.frontier.owners]
    for i, (one, other) in enumerate(zip(owners, owners[1:])):
        if one.size == other.size:
            continue
        is_first = np.log10(x[i + 1]) * PER_DECADE < first_budget(other.curve(fit.axis)[0]) + 0.5
        if is_first and len(other.points.tokens) > 1:
            notes.append(f"{fit.label}: the frontier passes to {other.name} at its first evaluation, and may "
                         "be lower before; more evaluations would tell")
        if x[i + 1] > GAP * x[i]:
            notes.append(f"{fit.label}: {one.name} has ended before {other.name} gets ahead of it, and the "
                         f"frontier between {x[i]:.2g} and {x[i + 1]:.2g} FLOPs is not known; a longer run "
                         "would tell")
    return notes


def best_rates(runs: list[MeasuredRun]) -> list[str]:
    """For runs that differ only in the learning rate: the losses after the same tokens, the best in bold."""
    lines = []
    for same in alike(runs, ("learning_rate",)):
        tokens = min(run.last for run in same)
        if len(same) < 2 or tokens < max(run.first for run in same):
            continue
        same.sort(key=lambda run: run.config["learning_rate"])
        losses = [run.loss_after(tokens) for run in same]
        best = int(np.argmin(losses))
        cells = [f"{run.config['learning_rate']:g}: {loss:.3f}" for run, loss in zip(same, losses)]
        cells[best] = f"**{cells[best]}**"
        edge = " (at the edge of the rates tried)" if best in (0, len(same) - 1) else ""
        lines.append(f"{same[0].label}, {same[0].size}: {', '.join(cells)} after {tokens:,.0f} tokens{edge}; "
                     f"the best is {same[best].name}")
    return sorted(lines)


def number(value: float) -> str:
    """Three digits, with an exponent where there are more than five places."""
    plain = not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{value:.3g}" if plain else f"{value:.2e}"


def with_interval(value: str, values: list[float], level: float) -> str:
    """'<value> (<low> to <high>)', the value alone where there are no bootstrap values."""
    return "{} ({} to {})".format(value, *map(number, interval(values, level))) if values else value


def laws_table(fits: dict[str, Fit], level: float, unit: str) -> str:
    rows = []
    for label, fit in fits.items():
        cells = ["—"] * 7
        if fit.law is not None:
            constants = [with_interval(number(value), list(drawn), level)
                         for value, *drawn in zip(fit.law, *fit.samples)]
            growth = with_interval(f"{fit.growth.exponent:.2f}", fit.growths, level) if fit.growth else "—"
            cells = [*constants, " to ".join(map(number, fit.range)), str(fit.used.sum()), growth,
                     f"{fit.noise:.2%}"]
        rows.append([label, *cells])
    return markdown_table(["structure", "L∞", "C0", "a", f"fitted between ({unit})", "points",
                           "best size ∝ C^p, p", "noise"], rows)


def multiplier_tables(fits: dict[str, Fit], base: str, budgets: list[float], level: float) -> tuple[str, str]:
    """(multipliers by the laws, those from the points of one frontier to the other) at each budget."""
    by_laws, by_points = [], []
    for label, fit in fits.items():
        if label == base:
            continue
        if fit.law is not None:
            gains = multipliers(fit, fits[base], budgets, level)
            texts = ["—" if gain is None else "{} ({} to {})".format(*map(number, gain)) for gain in gains]
            by_laws.append([label, *texts])
        measured = measured_multipliers(fit, fits[base])
        places = [nearest(fit, budget) for budget in budgets]
        gains = [math.nan if place is None else measured[place] for place in places]
        by_points.append([label, *["—" if math.isnan(gain) else number(gain) for gain in gains]])
    head = ["structure", *[f"{budget:.0e}" for budget in budgets]]
    return markdown_table(head, by_laws), markdown_table(head, by_points)


def nearest(fit: Fit, budget: float) -> int | None:
    """Index of the frontier's point nearest to a budget; None if it is three quarters of a step between
    budgets (15 %) or more away."""
    off = np.abs(np.log10(fit.frontier.x / budget)) * PER_DECADE
    return int(off.argmin()) if off.min() < 0.75 else None


def losses_table(fits: dict[str, Fit], unit: str) -> str:
    """The budget at which each frontier reaches a loss, for some losses that two structures or more reach."""
    ends = sorted(fit.frontier.losses[-1] for fit in fits.values())
    lowest, highest = ends[:2][-1], np.median([fit.frontier.losses[fit.used][0] for fit in fits.values()])
    step = 10 ** np.floor(np.log10(lowest)) / 20
    losses = np.unique(np.ceil(np.geomspace(lowest, max(lowest, highest), 7) / step))[::-1] * step
    rows = []
    for label, fit in fits.items():
        budgets = fit.frontier.x_for(losses)
        rows.append([label, *["—" if math.isnan(budget) else number(budget) for budget in budgets]])
    return markdown_table([f"{unit} until a loss of", *map(number, losses)], rows)


def taxonomy_of(fits: dict[str, Fit], base: str) -> dict:
    """{"budget": the largest that nine tenths of the structures reach, "rows": ω, ψ and ν of each einsum that
    does, the lowest loss that its runs have reached by then, and the FLOPs that the base needs for it ÷ those
    at which it was reached}, the best first."""
    reached = {label: max(last_budget(run.curve(fit.axis)[0]) for run in fit.runs)
               for label, fit in fits.items()}
    last = sorted(reached.values())[len(reached) // 10]
    budget, rows = float(10 ** (last / PER_DECADE)), []
    for label, fit in fits.items():
        config, before = fit.runs[0].config, fit.frontier.x <= budget * 1.001
        theta = theta_of(config)
        if theta is not None and reached[label] >= last and before.any():
            at, loss = float(fit.frontier.x[before][-1]), float(fit.frontier.losses[before][-1])
            gain = float(fits[base].frontier.x_for(loss)) / at if base in fits else math.nan
            rows.append(dict(structure=label, omega=theta.omega, psi=theta.psi, nu=theta.nu,
                             experts=config.get("num_experts") or config.get("ffn_experts") or 0, loss=loss,
                             multiplier=None if math.isnan(gain) else gain))
    return dict(budget=budget, rows=sorted(rows, key=lambda row: row["loss"]))


def taxonomy_table(found: dict) -> list[str]:
    """The same as text; nothing for fewer than two structures."""
    if len(found["rows"]) < 2:
        return []
    rows = [[row["structure"], str(row["experts"] or ""), *(f"{row[axis]:.3g}" for axis in TAXONOMY),
             f"{row['loss']:.4g}", "—" if row["multiplier"] is None else number(row["multiplier"])]
            for row in found["rows"]]
    budget = number(found["budget"])
    return [f"By ω (parameter sharing), ψ (rank) and ν (compute intensity), at {budget} FLOPs:",
            markdown_table(["structure", "experts", "ω", "ψ", "ν", "loss", "multiplier"], rows)]


def sizes_table(fits: dict[str, Fit], budgets: list[float]) -> str:
    """At each budget: the run that has the lowest loss, and whether it is at the edge of the sizes tried."""
    rows = []
    for label, fit in fits.items():
        smallest, largest = fit.runs[0].size, fit.runs[-1].size     # fit_structure sorts them
        edges = {smallest: "smallest", largest: "largest"} if smallest != largest else {smallest: "only"}
        for budget in budgets:
            if (i := nearest(fit, budget)) is not None:
                run = fit.runs[fit.frontier.owners[i]]
                rows.append([label, f"{budget:.0e}", run.size, f"{run.params:,}", f"{run.active_params:,}",
                             f"{budget / run.per_token['flops']:,.0f}", f"{fit.frontier.losses[i]:.3f}",
                             edges.get(run.size, "")])
    return markdown_table(["structure", "FLOPs", "layers x width", "parameters", "active", "tokens", "loss",
                           "of the sizes tried"], rows)


def sections(axis: str, fits: dict[str, Fit], base: str, level: float) -> list[str]:
    """Paragraphs of the page about one axis: laws, multipliers, and the best sizes along FLOPs."""
    what, unit = AXES[axis], "s" if axis == "seconds" else "FLOPs"
    timing = ", C in seconds; the intervals hold the noise of losses, none of times" if unit == "s" else ""
    text = [f"## Against {what}", f"L = L∞ + (C / C0)^-a{timing}:", laws_table(fits, level, unit)]
    lows, highs = zip(*(fit.range for fit in fits.values()))
    budgets = [float(f"{digit}e{power}") for power in range(-10, 40) for digit in (1, 3)]
    budgets = [budget for budget in budgets if min(lows) * 0.999 <= budget <= max(highs) * 1.001]
    if base in fits and fits[base].law and len(fits) > 1:
        by_laws, by_points = multiplier_tables(fits, base, budgets, level)
        text += [f"T{what[1:]} that {base} needs for the same loss ÷ those that the structure needs, at the "
                 f"budgets in the head of the table ({unit}; —: outside of what both laws were fitted to):",
                 by_laws,
                 "The same from the points of one frontier to those of the other, without laws:", by_points]
    text += ["What each frontier needs for a loss (—: before its first point, or not reached):",
             losses_table(fits, unit)]
    if axis == "flops":
        text += taxonomy_table(taxonomy_of(fits, base))
        text += ["The best size at each budget:", sizes_table(fits, budgets)]
    return text


def write_csv(path: str, rows: list[dict]) -> None:
    """Rows of the same keys as a csv file with a header, in a folder that is created if necessary."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def round_all(value):
    """Floats to six digits, for files that people compare; None for those that JSON does not have."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: round_all(v) for k, v in value.items()}
    return [round_all(v) for v in value] if isinstance(value, (list, tuple)) else value


def curve_of(fits: dict[str, Fit], label: str, base: str, level: float) -> dict:
    """What the figures need of a structure along an axis."""
    fit, of_base = fits[label], fits.get(base)
    by_law = measured = [None] * len(fit.frontier.x)
    if of_base:
        gains = measured_multipliers(fit, of_base).tolist()
        measured = [None if math.isnan(gain) else gain for gain in gains]
        by_law = multipliers(fit, of_base, fit.frontier.x, level) if fit.law and of_base.law else by_law
    return dict(x=fit.frontier.x.tolist(), loss=fit.frontier.losses.tolist(), used=fit.used.tolist(),
                law=fit.law._asdict() if fit.law else None, multipliers=by_law, measured_multipliers=measured)


def write_data(out: str, runs: list[MeasuredRun], fits: dict, base: str, level: float) -> None:
    """runs.csv, frontier.csv, and fit.json with all that the figures need."""
    by_axis = {axis: {label: curve_of(of_axis, label, base, level) for label in of_axis}
               for axis, of_axis in fits.items()}
    rows = []
    for axis, label in ((axis, label) for axis in fits for label in fits[axis]):
        fit, curve = fits[axis][label], by_axis[axis][label]
        keys = ("x", "loss", "used", "multipliers", "measured_multipliers")
        for owner, x, loss, used, gain, measured in zip(fit.frontier.owners, *map(curve.get, keys)):
            value, low, high = gain or ("", "", "")
            rows.append(dict(axis=axis, structure=label, x=x, loss=loss, run=fit.runs[owner].name,
                             fitted=used, law=float(fit.law.loss(x)) if fit.law else "",
                             multiplier=value, low=low, high=high, measured_multiplier=measured))
    ends, curves = [], []
    for run in runs:
        xs = {axis: run.curve(axis)[0].tolist() for axis in AXES if axis in run.per_token}
        curves.append(dict(structure=run.label, loss=run.points.losses.tolist(), **xs))
        settings = {key: run.config[key] for key in ("n_layer", "n_embd", "learning_rate", "seed")}
        ends.append(dict(run=run.name, structure=run.label, **settings, params=run.params,
                         active_params=run.active_params, tokens=float(run.last),
                         **{axis: xs.get(axis, [""])[-1] for axis in AXES},
                         train_loss=run.train_loss, val_loss=float(run.points.losses[-1])))
    measure = {key: runs[0].config[key] for key in COMPARABLE if key in runs[0].config}
    write_csv(os.path.join(out, "runs.csv"), round_all(ends))
    write_csv(os.path.join(out, "frontier.csv"), round_all(rows))
    found = round_all(dict(axes=by_axis, base=base, measure=measure, runs=ends, curves=curves,
                           taxonomy=taxonomy_of(fits["flops"], base)))
    write_whole(os.path.join(out, "fit.json"), json.dumps(found, allow_nan=False))


def fit_all(runs: list[MeasuredRun], base: str, *, window: tuple, floor: float | None, samples: int,
            noise: float | None) -> tuple[dict[str, dict[str, Fit]], list[str]]:
    """({axis: {structure: fit}}, the base first, remarks on structures left out). The window is in FLOPs, and
    is not used along seconds. Raises ValueError where nothing is left."""
    fits: dict[str, dict[str, Fit]] = {}
    notes = []
    for axis, what in AXES.items():
        rng = np.random.default_rng(0)
        span = (None, None) if axis == "seconds" else window
        for label in sorted({run.label for run in runs}, key=lambda label: (label != base, label)):
            mine = [run for run in runs if run.label == label and axis in run.per_token]
            if not mine:
                continue
            fit = fit_structure(label, mine, axis, window=span, floor=floor, samples=samples, noise=noise,
                                rng=rng)
            if fit.used.any():
                fits.setdefault(axis, {})[label] = fit
            else:
                notes.append(f"{label}: left out along {what}, no point of its frontier is in the range")
    if "flops" not in fits:
        raise ValueError("no frontier has a point between min_flops and max_flops: ask for a wider range, or "
                         "make more runs")
    return fits, notes


def write_report(folders: list[str], out: str, *, base: str | None, floor: float | None, window: tuple,
                 samples: int, level: float, bench: Iterable[str] = ()) -> None:
    """Fits the runs below the folders; writes fit.json, runs.csv, frontier.csv and table.md, which it prints,
    into `out`. base: None stands for dense, which may be missing. Raises ValueError."""
    runs, notes = read_runs(folders)
    if bench:
        notes += take_seconds(runs, bench)
    share_seconds(runs)
    labels = sorted({run.label for run in runs})
    if base not in (*labels, None):
        raise ValueError(f"there are no runs of {base!r}: base takes one of {', '.join(labels)}")
    if (base := base or "dense") not in labels:
        notes.append(f"no multipliers, since there are no runs of {base}; --base takes another structure")
    lowest = min(run.points.losses.min() for run in runs)
    if floor is not None and floor >= lowest:
        raise ValueError(f"floor must be below all losses, {lowest:.4g}; got {floor:g}")
    groups, short = same_but_seed(runs)
    noise, seeds = seed_noise(groups)
    fits, left_out = fit_all(mean_of_seeds(groups), base, window=window, floor=floor, samples=samples,
                             noise=noise)
    notes += short + left_out
    for fit in fits["flops"].values():
        notes += remarks(fit)
    source = ("how its structure's runs scatter about the law, which follows them: the intervals are far too "
              "narrow, since none differ in their seed alone")
    if noise:
        source = (f"{noise:.2%} between seeds (÷ √n in a mean of n), or more where a structure's runs "
                  "scatter more about its law")
    text = [f"{len(runs)} runs of {len(labels)} structures. Losses: {runs[0].config['loss']}. Budgets C: "
            "training FLOPs (2 per multiply-add, backward twice the forward, attention and routers "
            "included; embeddings are looked up, and cost none). Intervals: "
            f"{level:.0%}, parametric bootstrap with {samples} samples; a run's relative noise is {source}"
            + (f"; L∞ is set to {floor:g}." if floor is not None else ".")]
    for axis, of_axis in fits.items():
        text += sections(axis, of_axis, base, level)
    lists = {"Seeds": seeds, "Learning rates": best_rates(runs), "Left out, or to be taken with care": notes}
    for heading, lines in lists.items():
        if lines:
            text += [f"## {heading}", "\n".join(f"- {line}" for line in lines)]
    write_data(out, runs, fits, base, level)
    write_whole(os.path.join(out, "table.md"), "\n\n".join(text) + "\n")
    print(*text, sep="\n\n")
