"""What a search has found: a ranked table, csv, a figure, importances, the best θ as a config, and a plan.

Losses are compared at equal budgets only: those of complete trials with each other, and those of all trials
at the first evaluation at which the pruner decided.
"""
import json
import math
import os
import pprint

import numpy as np

from experiments.launcher import TRAIN_DEFAULTS
from experiments.scaling import fit as scaling_fit
from experiments.scaling.report import number, round_all, write_csv
from experiments.search.space import LEVELS, theta_text
from experiments.search.study import counted, optuna
from lib.figure import LOSS, figure, optional_figures, save, style
from lib.log import read_log, validation_windows
from lib.table import markdown_table
from structured import Theta

STATES = ("complete", "pruned", "running", "waiting", "fail")
# what a structure of follow.py sets itself
OWN_KEYS = ("struct", "weight_norm", "theta", "rank", "n_embd", "num_experts", "top_k", "learning_rate")


def rows_of(study: optuna.Study) -> list[dict]:
    """A row of trials.csv for each trial: complete ones first, by loss; then those that were pruned last."""
    rows, first_rung, evals = [], study.user_attrs["first_rung"], study.user_attrs["request"]["evals"]
    for trial in counted(study):
        model, losses, state = trial.user_attrs["model"], trial.intermediate_values, trial.state.name.lower()
        run = trial.user_attrs.get("run") or dict(flops=math.nan, settings={})
        theta, share = Theta(*model["theta"]), (trial.last_step or 0) / evals
        rows.append(dict(
            trial=trial.number, state=state, structure=model["label"], name=model["structure"],
            named=trial.user_attrs.get("named", ""),
            theta=theta_text(theta), omega=theta.omega, psi=theta.psi, nu=theta.nu,
            loss=losses.get(trial.last_step, math.nan), share_of_budget=share,
            first_loss=losses.get(first_rung, math.nan), flops=run["flops"] * share, width=model["width"],
            rank=model["rank"], sizes="; ".join(model["sizes"]), params=run.get("params") or "",
            flops_per_token=model["flops_per_token"], ms_per_iter=run.get("ms_per_iter") or "",
            learning_rate=run["settings"].get("learning_rate", ""), run=run.get("folder", ""),
            why=trial.user_attrs.get("why", "") if state == "fail" else ""))
    return sorted(rows, key=lambda r: (STATES.index(r["state"]), -r["share_of_budget"], r["loss"]))


# ---- Against dense -----------------------------------------------------------------------------------------

class DenseCurve:
    """The FLOPs that dense needs for a loss: between measured points by interpolation in logarithms."""
    def __init__(self, flops, losses, source: str):
        flops, losses = np.asarray(flops, float), np.asarray(losses, float)
        lower = scaling_fit.lower_envelope(flops, losses)
        self.flops, self.losses, self.source = flops[lower], losses[lower], source

    def share(self, flops: float, loss: float) -> str:
        """FLOPs ÷ those of dense for the same loss; a bound below dense's last loss, — above its first."""
        if not math.isfinite(loss) or loss > self.losses[0]:
            return "—"
        if loss < self.losses[-1]:
            return f"< {number(flops / self.flops[-1])}"
        return number(flops / scaling_fit.Frontier(self.flops, self.losses, ()).x_for(loss))


def dense_curve(dense: str | None, rows: list[dict], out: str, settings: dict) -> DenseCurve | None:
    """From a fit.json of experiments.scaling, or the study's own dense trial if it has one. settings: keys of
    train.py that all trials share. Raises ValueError if `dense` holds no dense curve, or one of another loss.
    """
    if dense is None:
        own = next((r for r in rows if r["name"] == "dense" and r["run"]), None)
        if own is None:
            return None
        points = [(p["flops"], p["val_loss"]) for p in read_log(os.path.join(out, own["run"]))
                  if p.get("type") == "eval" and p["iter"] and p["val_loss"] is not None]
        if settings.get("decay_lr", TRAIN_DEFAULTS["decay_lr"]):  # before its end the rate is too high
            points = points[-1:]
        source = f"the study's own, trial {own['trial']}, one width along its training"
        return DenseCurve(*zip(*points), source) if points else None
    try:
        with open(dense, encoding="utf-8") as f:
            found = json.load(f)
        base = found.get("base", "")
        base = base if base.startswith("dense") else "dense"     # dense_normed, if that is the better one
        measure, frontier = found["measure"], found["axes"]["flops"][base]
        curve = DenseCurve(frontier["x"], frontier["loss"], f"the frontier of {base} in {dense}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{dense!r} holds no dense curve: give a fit.json of experiments.scaling") from error
    here = TRAIN_DEFAULTS | settings
    here["windows"] = validation_windows(here)
    for key in scaling_fit.COMPARABLE:
        if key in measure and key in here and measure[key] != here[key]:
            raise ValueError(f"the runs in {dense!r} do not measure the same loss: {key} is {measure[key]} "
                             f"there and {here[key]} in the search")
    return curve


# ---- Files -------------------------------------------------------------------------------------------------

def write_report(study: optuna.Study, out: str, results: str, *, dense: str | None, top: int, times: float,
                 seeds: tuple) -> None:
    """Write table.md, trials.csv, taxonomy.svg, taxonomy.png, best.py and follow.py; print the table.

    Raises ValueError, one sentence, if no trial has come to its end.
    """
    if "request" not in study.user_attrs:
        raise ValueError(f"the study {study.study_name!r} has not begun")
    rows, request = rows_of(study), study.user_attrs["request"]
    complete = [r for r in rows if r["state"] == "complete"]
    if not complete:
        raise ValueError("no trial of this study has come to its end yet")
    curve = dense_curve(dense, rows, out, request["settings"])
    for row in rows:
        row["share_of_dense"] = curve.share(row["flops"], row["loss"]) if curve else ""
    settings = {t.number: {k: tuple(v) if isinstance(v, list) else v
                           for k, v in t.user_attrs["run"]["settings"].items()}
                for t in counted(study) if "run" in t.user_attrs}
    early = f"{study.user_attrs['first_rung'] / request['evals']:.0%} of the budget"
    text = page(study, rows, curve, early)
    head = (f"# The best of a search and dense, {times:g} times the FLOPs of a trial:\n"
            f"#     python -m experiments.scaling sweep {os.path.join(results, 'follow.py')} "
            f"--runs={os.path.join(out, 'follow')} --jobs=2\n")
    files = {"table.md": text, "best.py": config_text(complete[0], settings[complete[0]["trial"]]),
             "follow.py": head + plan_text(rows, settings, request, top, seeds, times)}
    write_csv(os.path.join(results, "trials.csv"), round_all(rows))
    for name, contents in files.items():
        with open(os.path.join(results, name), "w", encoding="utf-8") as f:
            f.write(contents)
    with optional_figures():
        draw(rows, early, results)
    print(text)


def assignments(settings: dict) -> str:
    return "".join(f"{key} = {value!r}\n" for key, value in settings.items())


def config_text(row: dict, settings: dict) -> str:
    """A config file of train.py: all settings of the trial's run."""
    return (f"# Trial {row['trial']} of a search: {row['structure']}, ω {row['omega']:g}, ψ {row['psi']:g}, "
            f"ν {row['nu']:g}.\n# Validation loss {row['loss']:.4f} after {number(row['flops'])} training "
            f"FLOPs.\n{assignments(settings)}")


def plan_text(rows: list[dict], settings: dict, request: dict, top: int, seeds: tuple, times: float) -> str:
    """A plan for experiments.scaling: the best structures, BTT-MoE if it came first, which among mixtures
    alone is Monarch with experts, and dense, each at its width and rate."""
    best = [r for r in rows if r["state"] == "complete" and r["name"] != "dense"][:top]
    best += [r for r in rows if (r["named"] == "btt_moe" or r["named"] == "monarch" != r["name"])
             and r["trial"] in settings and r not in best]
    structures = {r["structure"]: {k: v for k, v in settings[r["trial"]].items() if k in OWN_KEYS}
                  for r in best}
    dense = next((settings[r["trial"]] for r in rows if r["name"] == "dense" and r["trial"] in settings),
                 dict(weight_norm=True, learning_rate=request["learning_rates"]))
    structures["dense"] = dict(n_embd=request["dense_width"]) | {
        key: dense[key] for key in ("weight_norm", "learning_rate") if key in dense}
    shared = dict(flops=times * request["flops"], seed=[int(s) for s in seeds], evals=4 * request["evals"])
    shared |= {k: v for k, v in request["settings"].items() if k != "seed"}
    text = pprint.pformat(structures, width=90, compact=True, sort_dicts=False)
    return f"structures = \\\n{text}\n{assignments(shared)}"


# ---- Table -------------------------------------------------------------------------------------------------

def page(study: optuna.Study, rows: list[dict], curve: DenseCurve | None, early: str) -> str:
    """The report as markdown."""
    request, attempts = study.user_attrs["request"], study.get_trials(deepcopy=False)
    complete, pruned, failed = ([r for r in rows if r["state"] == s] for s in ("complete", "pruned", "fail"))
    rejected, same = (sum(key in t.user_attrs for t in attempts) for key in ("rejected", "same_as"))
    normed = all(t.user_attrs["run"]["settings"].get("weight_norm") for t in attempts if "run" in t.user_attrs
                 and t.user_attrs["run"]["settings"].get("struct") == "dense")
    text = [f"{len(complete)} trials with the full budget of {number(request['flops'])} training FLOPs, "
            f"{number(request['flops_per_token'])} per token (within {request['tolerance']:.0%}), "
            f"{len(pruned)} pruned, {len(failed)} failed. The sampler asked for {rejected} θ that were not "
            f"trained, having no model or too large a ν, and for {same} whose matrices another trial has. "
            "Losses are validation cross-entropy in nats per token. Sizes are of the maps d → d, d → 4d, "
            f"4d → d. Dense is with{'' if normed else 'out'} weight norm; none is aligned with heads."]
    head = ["", "structure, θ (α β γ δ ε φ ρ)", "width", "sizes", "ω", "ψ", "ν", "parameters", "loss"]
    cells = [[str(i), r["structure"], str(r["width"]), r["sizes"], *taxonomy(r), f"{r['params'] or 0:,}",
              f"{r['loss']:.4f}"] for i, r in enumerate(complete, 1)]
    if curve:
        text.append("Share of dense's compute: FLOPs ÷ those that dense needs for the same loss; dense is "
                    f"{curve.source}.")
        head.append("share of dense's compute")
        cells = [[*line, r["share_of_dense"]] for line, r in zip(cells, complete)]
    text.append(markdown_table(head, cells))
    if pruned:
        text += ["## Pruned", "At the share of the budget that each had. Losses at different shares do not "
                 "compare.",
                 markdown_table(
                     ["structure, θ", "width", "ω", "ψ", "ν", "budget", "loss", f"loss at {early}"],
                     [[r["structure"], str(r["width"]), *taxonomy(r), f"{r['share_of_budget']:.0%}",
                       f"{r['loss']:.4f}", f"{r['first_loss']:.4f}"] for r in pruned])]
    if failed:
        lines = [f"- trial {r['trial']}, {r['structure']}: {r['why']}" for r in failed]
        text += ["## Failed", "\n".join(lines)]
    losses = {"full budget": {r["trial"]: r["loss"] for r in complete},
              early: {r["trial"]: r["first_loss"] for r in rows if math.isfinite(r["first_loss"])}}
    shares = {at: found for at, of in losses.items() if (found := importances(study, of))}
    if shares:
        names = list(dict.fromkeys(name for found in shares.values() for name in (*LEVELS, *found)))
        text += ["## Importance of the parameters", "PED-ANOVA, Optuna's: how much a parameter decides "
                 "whether a trial is among the best tenth. alpha and delta are the shares of what θγ and θφ "
                 "leave.",
                 markdown_table(["loss at", "trials", *names],
                                [[at, str(len(losses[at])), *(f"{found.get(name, 0):.2f}" for name in names)]
                                 for at, found in shares.items()])]
    return "\n\n".join(text) + "\n"


def taxonomy(row: dict) -> list[str]:
    return [f"{row[axis]:.3g}" for axis in scaling_fit.TAXONOMY]


def importances(study: optuna.Study, losses: dict[int, float]) -> dict[str, float]:
    """{parameter: share} by PED-ANOVA of the losses of these trials; empty for fewer than 8."""
    if len(losses) < 8:
        return {}
    copy = optuna.create_study()
    for trial in study.get_trials(deepcopy=False):
        if trial.number in losses:
            copy.add_trial(optuna.trial.create_trial(params=trial.params, distributions=trial.distributions,
                                                     value=losses[trial.number]))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return optuna.importance.get_param_importances(copy, evaluator=evaluator)


# ---- Figure ------------------------------------------------------------------------------------------------

def draw(rows: list[dict], early: str, folder: str) -> None:
    """taxonomy.svg and .png: loss over ω, ψ and ν, of complete trials and of all at the first rung."""
    parts = [("loss", [r for r in rows if r["state"] == "complete"], "full budget")]
    at_first_rung = [r for r in rows if math.isfinite(r["first_loss"])]
    if any(r["state"] != "complete" for r in at_first_rung):
        parts.append(("first_loss", at_first_rung, early))
    fig, grid = figure(len(scaling_fit.TAXONOMY), rows=len(parts), sharey="row", sharex="col")
    names = sorted({r["name"] for r in rows} - {""}, key=lambda name: (name != "dense", name))
    looks = {name: style(i) for i, name in enumerate(names)}
    looks = {"": dict(color="#bbbbbb", marker=".")} | looks
    for axes, (key, shown, budget) in zip(grid, parts):
        for ax, axis in zip(axes, scaling_fit.TAXONOMY):
            for name, look in looks.items():
                mine = [r for r in shown if r["name"] == name]
                ax.plot([r[axis] for r in mine], [r[key] for r in mine], label=name or "no name",
                        **look | dict(linestyle="none", markersize=6))
        axes[0].set_ylabel(f"{LOSS}\n({budget})")
    for ax, label in zip(grid[-1], scaling_fit.TAXONOMY.values()):
        ax.set_xlabel(label)
    save(fig, grid[0][0], folder, "taxonomy")
