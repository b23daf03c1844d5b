"""What a search has found: ranked table, csv, figure, importances, the best θ as a config, the best few as a plan.

Losses are compared at equal budgets only: those of complete trials with each other, and those of all trials at the
first evaluation at which the pruner decided.
"""
import dataclasses
import json
import math
import os

import numpy as np

from experiments import launcher
from experiments.scaling import fit as scaling_fit
from experiments.scaling import plot as scaling_plot
from experiments.scaling.report import number, round_all, table, write_csv
from experiments.search.space import LEVELS, theta_text, train_defaults
from experiments.search.study import TrialState, counted, optuna
from structured import Theta

PANELS = dict(omega="ω, parameter sharing", psi="ψ, rank", nu="ν, compute intensity")
ORDER = ("complete", "pruned", "running", "waiting", "fail")
OWN = ("struct", "theta", "rank", "n_embd", "num_experts", "top_k", "learning_rate")    # of a structure of follow.py


def rows_of(study: optuna.Study) -> list[dict]:
    """A row of trials.csv for each trial: complete ones first, by loss; then those that were pruned last."""
    rows = []
    first_rung, evals = study.user_attrs["first_rung"], study.user_attrs["request"]["evals"]
    for trial in counted(study):
        model, run, steps = trial.user_attrs["model"], trial.user_attrs.get("run", {}), trial.intermediate_values
        theta, share = Theta(*model["theta"]), (trial.last_step or 0) / evals
        rows.append(dict(
            trial=trial.number, state=trial.state.name.lower(), structure=model["label"], name=model["structure"],
            theta=theta_text(theta), omega=theta.omega, psi=theta.psi, nu=theta.nu,
            loss=steps.get(trial.last_step, math.nan), share_of_budget=share,
            first_loss=steps.get(first_rung, math.nan), flops=run.get("flops", math.nan) * share,
            width=model["width"], rank=model["rank"], sizes="; ".join(model["sizes"]),
            params=run.get("params") or "", flops_per_token=model["flops_per_token"],
            ms_per_iter=run.get("ms_per_iter") or "",
            learning_rate=run["settings"]["learning_rate"] if run else "", run=run.get("folder", ""),
            why=trial.user_attrs.get("why", "") if trial.state == TrialState.FAIL else ""))
    return sorted(rows, key=lambda r: (ORDER.index(r["state"]), -r["share_of_budget"], r["loss"]))


def taxonomy(row: dict) -> list[str]:
    return [f"{row[axis]:.3g}" for axis in PANELS]


# ---- Against dense ------------------------------------------------------------------------------------------

@dataclasses.dataclass
class DenseCurve:
    """The FLOPs that dense needs for a loss, between its measured points by interpolation in logarithms."""
    flops: np.ndarray
    losses: np.ndarray
    source: str

    def __post_init__(self):
        order = np.argsort(self.flops)
        flops, losses = np.asarray(self.flops, float)[order], np.asarray(self.losses, float)[order]
        keep = np.r_[True, losses[1:] < np.minimum.accumulate(losses)[:-1]]
        self.flops, self.losses = flops[keep], losses[keep]

    def share(self, flops: float, loss: float) -> str:
        """FLOPs ÷ those of dense for the same loss; a bound for a loss that dense has not reached, — for one that is
        above its first."""
        if not math.isfinite(loss) or loss > self.losses[0]:
            return "—"
        if loss < self.losses[-1]:
            return f"< {number(flops / self.flops[-1])}"
        return number(flops / scaling_fit.Frontier(self.flops, self.losses, ()).x_for(loss))


def dense_curve(dense: str | None, rows: list[dict], out: str, settings: dict) -> DenseCurve | None:
    """From a fit.json of experiments.scaling, a folder of runs, or the study's own dense trial; None without that.

    settings: keys of train.py that all trials share. Raises ValueError if what is named has no dense, or measures
    another loss.
    """
    if dense is None:
        return study_curve(rows, out)
    if os.path.isdir(dense):
        runs, _ = scaling_fit.read_runs([dense])
        runs = scaling_fit.mean_of_seeds([run for run in runs if run.label == "dense"])
        if not runs:
            raise ValueError(f"there is no run of dense below {dense!r}")
        frontier, measure = scaling_fit.frontier_of(scaling_fit.curves_of(runs, "flops")), runs[0].config
        curve = DenseCurve(frontier.x, frontier.losses, f"the frontier of {len(runs)} runs in {dense}")
    else:
        try:
            with open(dense, encoding="utf-8") as f:
                found = json.load(f)
            points, measure = found["axes"]["flops"]["dense"], found["measure"]
            curve = DenseCurve(points["x"], points["loss"], f"the frontier in {dense}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{dense!r} holds no dense curve: give a fit.json of experiments.scaling, or a folder of "
                             "runs") from error
    here = train_defaults() | settings
    for key in scaling_fit.COMPARABLE:
        if key in measure and key in here and measure[key] != here[key]:
            raise ValueError(f"the runs in {dense!r} do not measure the same loss: {key} is {measure[key]} there and "
                             f"{here[key]} in the search")
    return curve


def study_curve(rows: list[dict], out: str) -> DenseCurve | None:
    """The evaluations of the study's own dense trial."""
    for row in rows:
        if row["name"] == "dense" and row["run"]:
            points = [p for p in launcher.read_log(os.path.join(out, row["run"]))
                      if p.get("type") == "eval" and p["iter"] and p["val_loss"] is not None]
            if points:
                return DenseCurve([p["flops"] for p in points], [p["val_loss"] for p in points],
                                  f"the study's own, trial {row['trial']}, one width along its training")
    return None


# ---- Files --------------------------------------------------------------------------------------------------

def write_report(study: optuna.Study, out: str, results: str, *, dense: str | None, top: int, times: float,
                 seeds: tuple) -> None:
    """Write table.md, trials.csv, taxonomy.svg and .png, best.py and follow.py into `results`, and print the table.

    Raises ValueError, one sentence, if no trial has come to its end.
    """
    rows = rows_of(study)
    complete = [r for r in rows if r["state"] == "complete"]
    if not complete:
        raise ValueError("no trial of this study has come to its end yet")
    request, trials = study.user_attrs["request"], study.get_trials(deepcopy=False)
    curve = dense_curve(dense, rows, out, request["settings"])
    for row in rows:
        row["share_of_dense"] = curve.share(row["flops"], row["loss"]) if curve else ""
    settings = {r["trial"]: {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()} for r in rows
                if (found := trials[r["trial"]].user_attrs.get("run", {}).get("settings"))}
    text = page(study, rows, curve)
    command = (f"python -m experiments.scaling sweep {os.path.join(results, 'follow.py')} "
               f"--runs={os.path.join(out, 'follow')} --jobs=2")
    files = {"table.md": text, "best.py": config_text(complete[0], settings[complete[0]["trial"]]),
             "follow.py": plan_text(rows, settings, request, top, times, seeds, command)}
    os.makedirs(results, exist_ok=True)
    for name, contents in files.items():
        with open(os.path.join(results, name), "w", encoding="utf-8") as f:
            f.write(contents)
    write_csv(os.path.join(results, "trials.csv"), round_all(rows))
    try:
        draw(rows, f"{study.user_attrs['first_rung'] / request['evals']:.0%} of the budget", results)
    except ImportError:
        print("no figure: it needs matplotlib (pip install -r requirements-dev.txt)")
    print(text)


def config_text(row: dict, settings: dict) -> str:
    """A config file of train.py: all settings of the trial's run."""
    lines = [f"# Trial {row['trial']} of a search: {row['structure']},",
             f"# ω {row['omega']:g}, ψ {row['psi']:g}, ν {row['nu']:g}: validation loss {row['loss']:.4f} after "
             f"{number(row['flops'])} training FLOPs.",
             *(f"{key} = {value!r}" for key, value in settings.items())]
    return "\n".join(lines) + "\n"


def plan_text(rows: list[dict], settings: dict, request: dict, top: int, times: float, seeds: tuple,
              command: str) -> str:
    """A plan for experiments.scaling: the best structures and dense, each at its width and rate."""
    best = [r for r in rows if r["state"] == "complete" and r["name"] != "dense"][:top]
    dense = [settings[r["trial"]] for r in rows if r["name"] == "dense" and r["trial"] in settings]
    rate = dense[0]["learning_rate"] if dense else request["learning_rates"]
    structures = {r["structure"]: {k: v for k, v in settings[r["trial"]].items() if k in OWN} for r in best}
    structures["dense"] = dict(n_embd=request["dense_width"], learning_rate=rate)
    shared = {k: v for k, v in request["settings"].items() if k != "seed"}
    lines = [f"# The best structures of a search and dense, with {times:g} times the FLOPs of a trial:",
             f"#     {command}", "structures = {",
             *(f"    {label!r}: {own!r}," for label, own in structures.items()), "}",
             f"flops = {times * request['flops']!r}", f"seed = {[int(s) for s in seeds]!r}",
             f"evals = {4 * request['evals']}", *(f"{k} = {v!r}" for k, v in shared.items())]
    return "\n".join(lines) + "\n"


# ---- Table --------------------------------------------------------------------------------------------------

def page(study: optuna.Study, rows: list[dict], curve: DenseCurve | None) -> str:
    """The report as markdown."""
    request, attempts = study.user_attrs["request"], study.get_trials(deepcopy=False)
    complete, pruned, failed = ([r for r in rows if r["state"] == state] for state in ("complete", "pruned", "fail"))
    rejected, same = (sum(key in t.user_attrs for t in attempts) for key in ("rejected", "same_as"))
    early = f"{study.user_attrs['first_rung'] / request['evals']:.0%}"
    text = [f"{len(complete)} trials with the full budget of {number(request['flops'])} training FLOPs, "
            f"{number(request['flops_per_token'])} per token (within {request['tolerance']:.0%}), {len(pruned)} pruned, "
            f"{len(failed)} failed. The sampler asked for {rejected} θ that were not trained, since they have no model "
            f"or too large a ν, and for {same} whose matrices another trial has. Losses are validation cross-entropy in "
            "nats per token. Sizes are of the maps d → d, d → 4d, 4d → d. Dense is train.py's own, without weight norm; "
            "btt and monarch are plain einsums, not aligned with heads."]
    if curve:
        text.append(f"Share of dense's compute: FLOPs ÷ those that dense needs for the same loss; dense is "
                    f"{curve.source}.")
    head = ["", "structure, θ (α β γ δ ε φ ρ)", "width", "sizes", "ω", "ψ", "ν", "parameters", "loss"]
    text.append(table(head + ["share of dense's compute"] * bool(curve),
                      [[str(i), r["structure"], str(r["width"]), r["sizes"], *taxonomy(r), f"{r['params'] or 0:,}",
                        f"{r['loss']:.4f}", *([r["share_of_dense"]] if curve else [])]
                       for i, r in enumerate(complete, 1)]))
    if pruned:
        text += ["## Pruned", "Losses at the share of the budget that each trial had; those at different shares do not "
                 "compare.",
                 table(["structure, θ", "width", "ω", "ψ", "ν", "budget", "loss", f"loss at {early}"],
                       [[r["structure"], str(r["width"]), *taxonomy(r), f"{r['share_of_budget']:.0%}",
                         f"{r['loss']:.4f}", f"{r['first_loss']:.4f}"] for r in pruned])]
    if failed:
        text += ["## Failed", "\n".join(f"- trial {r['trial']}, {r['structure']}: {r['why']}" for r in failed)]
    losses = {"full budget": {r["trial"]: r["loss"] for r in complete},
              f"{early} of the budget": {r["trial"]: r["first_loss"] for r in rows if math.isfinite(r["first_loss"])}}
    shares = {at: (len(of_trials), importances(study, of_trials)) for at, of_trials in losses.items()}
    if names := list(dict.fromkeys(name for _, share in shares.values() if share for name in (*LEVELS, *share))):
        text += ["## Importance of the parameters", "PED-ANOVA, Optuna's: how much a parameter decides whether a trial "
                 "is among the best tenth. alpha and delta are the shares of what θγ and θφ leave.",
                 table(["loss at", "trials", *names],
                       [[at, str(n), *(f"{share.get(name, 0):.2f}" for name in names)]
                        for at, (n, share) in shares.items() if share])]
    return "\n\n".join(text) + "\n"


def importances(study: optuna.Study, losses: dict[int, float]) -> dict[str, float]:
    """{parameter: share} by PED-ANOVA of the losses of these trials; empty for fewer than 8."""
    if len(losses) < 8:
        return {}
    copy = optuna.create_study()
    copy.add_trials([optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=losses[t.number])
                     for t in study.get_trials(deepcopy=False) if t.number in losses])
    return optuna.importance.get_param_importances(copy, evaluator=optuna.importance.PedAnovaImportanceEvaluator())


# ---- Figure -------------------------------------------------------------------------------------------------

def draw(rows: list[dict], early: str, folder: str) -> None:
    """taxonomy.svg and .png: loss over ω, ψ and ν, of complete trials and of all at the first rung."""
    plt = scaling_plot.pyplot("search")
    parts = [("loss", [r for r in rows if r["state"] == "complete"], "full budget")]
    at_first_rung = [r for r in rows if math.isfinite(r["first_loss"])]
    if any(r["state"] != "complete" for r in at_first_rung):
        parts.append(("first_loss", at_first_rung, early))
    fig, grid = scaling_plot.axes(plt, len(PANELS), rows=len(parts), sharey="row", sharex="col")
    grid = np.atleast_2d(grid)
    names = sorted({r["name"] for r in rows} - {""}, key=lambda name: (name != "dense", name))
    looks = {"": dict(color="#bbbbbb", marker=".")} | {name: scaling_plot.style(i) for i, name in enumerate(names)}
    for line, (key, shown, budget) in zip(grid, parts):
        for ax, axis in zip(line, PANELS):
            for name, look in looks.items():
                points = [(r[axis], r[key]) for r in shown if r["name"] == name]
                ax.plot(*zip(*points) if points else ([], []), label=name or "no name", markersize=6,
                        **look | dict(linestyle="none"))
        line[0].set_ylabel(f"validation loss, nats per token\n({budget})")
    for ax, axis in zip(grid[-1], PANELS):
        ax.set_xlabel(PANELS[axis])
    scaling_plot.save(plt, fig, grid[0][0], folder, "taxonomy")
