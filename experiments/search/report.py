"""What a search has found, for search.py: ranked table, csv, figure, importances, the best θ as a config and a plan.

Losses are compared at equal budgets alone: trials that came to their end with each other, and all trials at the first
evaluation at which the pruner decided.
"""
import json
import math
import os

import numpy as np
import optuna
from optuna.trial import TrialState

import configurator
from experiments import launcher
from experiments.scaling import fit as scaling_fit
from experiments.launcher import read_log
from experiments.scaling.report import number, round_all, table, write_csv
from experiments.search.space import LEVELS, text_of
from experiments.search.study import trained
from structured import Theta

PANELS = (("omega", "ω, parameter sharing"), ("psi", "ψ, rank"), ("nu", "ν, compute intensity"))


def rows_of(study: optuna.Study) -> list[dict]:
    """A row for each trial of the budget, those of the full budget first, by loss; then those pruned latest."""
    rows = []
    for trial in trained(study):
        facts, theta = trial.user_attrs, Theta(*trial.user_attrs["theta"])
        steps, evals = trial.intermediate_values, study.user_attrs["request"]["evals"]
        last = evals if trial.state == TrialState.COMPLETE else trial.last_step or 0
        loss = trial.value if trial.state == TrialState.COMPLETE else steps.get(last, math.nan)
        rows.append(dict(trial=trial.number, state=trial.state.name.lower(), structure=facts["label"],
                         name=facts["structure"], theta=text_of(theta), omega=theta.omega, psi=theta.psi, nu=theta.nu,
                         loss=loss, share_of_budget=last / evals,
                         first_loss=steps.get(study.user_attrs["first_rung"], math.nan),
                         flops=facts.get("flops", math.nan) * last / evals, width=facts.get("width", ""),
                         rank=facts.get("rank", ""), sizes="; ".join(facts.get("sizes", ())),
                         params=facts.get("params") or "", flops_per_token=facts.get("flops_per_token", ""),
                         ms_per_iter=facts.get("ms_per_iter") or "",
                         learning_rate=facts.get("settings", {}).get("learning_rate", ""), run=facts.get("run", ""),
                         why=facts.get("why", "")))
    order = dict(complete=0, pruned=1, running=2, fail=3)
    return sorted(rows, key=lambda r: (order[r["state"]], -r["share_of_budget"], r["loss"]))


def taxonomy(row: dict) -> list[str]:
    return [f"{row[axis]:.3g}" for axis, _ in PANELS]


# ---- Against dense --------------------------------------------------------------------------------------------------

class DenseCurve:
    """Compute that dense needs for a loss: between its measured points, by interpolation in logarithms."""

    def __init__(self, flops, losses, source: str):
        order = np.argsort(flops)
        flops, losses = np.asarray(flops, float)[order], np.asarray(losses, float)[order]
        best = np.minimum.accumulate(losses)
        keep = np.r_[True, losses[1:] < best[:-1]]
        self.flops, self.losses, self.source = flops[keep], losses[keep], source

    def share(self, flops: float, loss: float) -> str:
        """FLOPs spent ÷ those of dense for the same loss, a bound where dense has not come so far, — where it began
        below."""
        if not math.isfinite(loss) or loss > self.losses[0]:
            return "—"
        if loss < self.losses[-1]:
            return f"< {number(flops / self.flops[-1])}"
        return number(flops / scaling_fit.Frontier(self.flops, self.losses, ()).x_for(loss))


def refuse_other_losses(measured: dict, settings: dict, dense: str) -> None:
    """Raises ValueError where the runs of dense have another dataset, batch ... than the search."""
    defaults = {k.name: k.default for k in configurator.read_keys(launcher.TRAIN).values()}
    for key in (k for k in scaling_fit.COMPARABLE if k in measured and k in defaults):
        if measured[key] != settings.get(key, defaults[key]):
            raise ValueError(f"the runs in {dense!r} do not measure the same loss: {key} is {measured[key]} there and "
                             f"{settings.get(key, defaults[key])} in the search")


def dense_curve(dense: str | None, rows: list[dict], out: str, settings: dict) -> DenseCurve | None:
    """From scaling.py's fit.json, from a folder of runs, or from the study's own dense trial; None without the last.
    settings: what all trials of the search share. Raises ValueError, in one sentence, where what was named has no dense."""
    if dense is None:
        mine = [r for r in rows if r["name"] == "dense" and r["run"]]
        if not mine:
            return None
        points = [p for p in read_log(os.path.join(out, mine[0]["run"]))
                  if p.get("type") == "eval" and p["iter"] and p["val_loss"] is not None]
        return DenseCurve([p["flops"] for p in points], [p["val_loss"] for p in points],
                          f"the study's own, trial {mine[0]['trial']}, one width along its training") if points else None
    if os.path.isdir(dense):
        runs, _ = scaling_fit.read_runs([dense])
        runs = scaling_fit.mean_of_seeds([run for run in runs if run.label == "dense"])
        if not runs:
            raise ValueError(f"there is no run of dense below {dense!r}")
        refuse_other_losses(runs[0].config, settings, dense)
        frontier = scaling_fit.frontier_of(scaling_fit.curves_of(runs, "flops"))
        return DenseCurve(frontier.x, frontier.losses, f"the frontier of {len(runs)} runs in {dense}")
    try:
        with open(dense, encoding="utf-8") as f:
            whole = json.load(f)
        found, measure = whole["axes"]["flops"]["dense"], whole["measure"]
        curve = DenseCurve(found["x"], found["loss"], f"the frontier in {dense}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{dense!r} holds no dense curve: give a fit.json of scaling.py, or a folder of runs") from e
    refuse_other_losses(measure, settings, dense)
    return curve


# ---- Importances ----------------------------------------------------------------------------------------------------

def importances(study: optuna.Study, losses: dict[int, float]) -> dict[str, float]:
    """{parameter: share} by PED-ANOVA, which needs no other package, of these trials' losses; empty for less than 8."""
    trials = [t for t in study.get_trials(deepcopy=False) if math.isfinite(losses.get(t.number, math.nan))]
    if len(trials) < 8:
        return {}
    copy = optuna.create_study()
    copy.add_trials([optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=losses[t.number])
                     for t in trials])
    return optuna.importance.get_param_importances(copy, evaluator=optuna.importance.PedAnovaImportanceEvaluator())


# ---- Figure ---------------------------------------------------------------------------------------------------------

def draw(rows: list[dict], first_rung: int, evals: int, folder: str) -> None:
    """taxonomy.svg and .png: loss over ω, ψ and ν, of the trials with the full budget and of all at the first rung."""
    from experiments.scaling import plot as scaling_plot
    plt = scaling_plot.pyplot("search")
    parts = [("loss", [r for r in rows if r["state"] == "complete"], "full budget")]
    if any(r["state"] != "complete" and math.isfinite(r["first_loss"]) for r in rows):
        early = [r for r in rows if math.isfinite(r["first_loss"])]
        parts.append(("first_loss", early, f"{first_rung / evals:.0%} of the budget"))
    fig, grid = scaling_plot.axes(plt, len(PANELS), rows=len(parts), sharey="row", sharex="col")
    grid = np.atleast_2d(grid)
    names = sorted({r["name"] for r in rows if r["name"]}, key=lambda name: (name != "dense", name))
    for line, (key, mine, budget) in zip(grid, parts):
        for ax, (axis, _) in zip(line, PANELS):
            for i, name in enumerate(["", *names]):
                look = scaling_plot.style(i - 1) if name else dict(color="#bbbbbb", marker=".")
                points = [(r[axis], r[key]) for r in mine if r["name"] == name]
                ax.plot([x for x, _ in points], [y for _, y in points], label=name or "no name", markersize=6,
                        **look | dict(linestyle="none"))
        line[0].set_ylabel(f"validation loss, nats per token\n({budget})")
    for ax, (_, what) in zip(grid[-1], PANELS):
        ax.set_xlabel(what)
    scaling_plot.save(plt, fig, grid[0][0], folder, "taxonomy")


# ---- Files that other programs run ----------------------------------------------------------------------------------

def config_text(row: dict, settings: dict) -> str:
    """A config file of train.py: all settings of the trial's run."""
    lines = [f"# Trial {row['trial']} of a search: {row['structure']}, "
             f"ω {row['omega']:g}, ψ {row['psi']:g}, ν {row['nu']:g},",
             f"# validation loss {row['loss']:.4f} after {number(row['flops'])} training FLOPs.",
             *(f"{key} = {value!r}" for key, value in settings.items())]
    return "\n".join(lines) + "\n"


def plan_text(best: list[dict], settings: dict, dense: dict | None, request: dict, times: float, seeds: tuple,
              command: str) -> str:
    """A plan of scaling.py: the best θ's and dense, each at its width and rate, with more budget and several seeds."""
    own = ("struct", "theta", "rank", "n_embd", "num_experts", "top_k", "learning_rate")
    shared = {k: v for k, v in request["settings"].items() if k != "seed"}
    lines = [f"# The best of a search and dense, {times:g} times the budget of a trial:",
             f"#     {command}", "structures = {"]
    for row in best:
        chosen = settings[row["trial"]]
        lines.append(f"    {row['structure']!r}: {({k: v for k, v in chosen.items() if k in own})!r},")
    rates = dense["learning_rate"] if dense else list(request["learning_rates"])
    lines += [f"    'dense': {dict(n_embd=request['dense_width'], learning_rate=rates)!r},", "}",
              f"flops = {times * request['flops']!r}", f"seed = {[int(s) for s in seeds]!r}",
              f"evals = {4 * request['evals']}", *(f"{k} = {v!r}" for k, v in shared.items())]
    return "\n".join(lines) + "\n"


# ---- All of it ------------------------------------------------------------------------------------------------------

def page(study: optuna.Study, rows: list[dict], curve: DenseCurve | None, first_rung: int) -> str:
    """The report as markdown."""
    request, attempts = study.user_attrs["request"], study.get_trials(deepcopy=False)
    complete, pruned, failed = ([r for r in rows if r["state"] == state] for state in ("complete", "pruned", "fail"))
    rejected, same = (sum(key in t.user_attrs for t in attempts) for key in ("rejected", "same_as"))
    early = f"{first_rung / request['evals']:.0%}"
    text = [f"{len(complete)} trials with the full budget of {number(request['flops'])} training FLOPs, "
            f"{number(request['flops_per_token'])} per token (within {request['tolerance']:.0%}), {len(pruned)} pruned, "
            f"{len(failed)} failed. The sampler asked for {rejected} θ that were not trained, having no model or too large "
            f"a ν, and for {same} whose matrices a trial had before. Losses are validation cross-entropy in nats per "
            "token. Sizes are of the maps d → d, d → 4d, 4d → d. Dense is train.py's own, without weight norm; btt and "
            "monarch are plain einsums, not aligned with heads."]
    if curve:
        text.append(f"Share of dense's compute: FLOPs ÷ those that dense needs for the same loss; dense is {curve.source}.")
    head = ["", "structure, θ (α β γ δ ε φ ρ)", "width", "sizes", "ω", "ψ", "ν", "parameters", "loss"]
    text.append(table(head + ["share of dense's compute"] * bool(curve),
                      [[str(i), r["structure"], str(r["width"]), r["sizes"], *taxonomy(r), f"{r['params'] or 0:,}",
                        f"{r['loss']:.4f}", *([r["share_of_dense"]] if curve else [])] for i, r in enumerate(complete, 1)]))
    if pruned:
        text += ["## Pruned", "At the budget that they had, in shares of the full one; losses at different budgets do not "
                 "compare.",
                 table(["structure, θ", "width", "ω", "ψ", "ν", "budget", "loss", f"loss at {early}"],
                       [[r["structure"], str(r["width"]), *taxonomy(r), f"{r['share_of_budget']:.0%}", f"{r['loss']:.4f}",
                         f"{r['first_loss']:.4f}"] for r in pruned])]
    if failed:
        text += ["## Failed", "\n".join(f"- trial {r['trial']}, {r['structure']}: {r['why']}" for r in failed)]
    return "\n\n".join(text + importance_section(study, rows, complete, early)) + "\n"


def importance_section(study: optuna.Study, rows: list[dict], complete: list[dict], early: str) -> list[str]:
    """Paragraphs on the importances by the losses at the full budget, and of all trials at the first rung."""
    measures = {"full budget": {r["trial"]: r["loss"] for r in complete},
                f"{early} of the budget": {r["trial"]: r["first_loss"] for r in rows}}
    found = [(what, sum(map(math.isfinite, losses.values())), importances(study, losses))
             for what, losses in measures.items()]
    names = list(dict.fromkeys(name for *_, shares in found for name in (*LEVELS, *shares) if shares))
    lines = [[what, str(n), *(f"{shares.get(name, 0):.2f}" for name in names)] for what, n, shares in found if shares]
    return ["## Importance of the parameters", "PED-ANOVA, Optuna's: how much a parameter decides whether a trial is among "
            "the best tenth. alpha and delta are the shares of what θγ and θφ leave.",
            table(["loss at", "trials", *names], lines)] if lines else []


def report(study: optuna.Study, out: str, results: str, *, dense: str | None, top: int, times: float, seeds: tuple) -> None:
    """Writes table.md, trials.csv, taxonomy.svg and .png, best.py and follow.py into `results`. Raises ValueError, in one
    sentence, where no trial has come to its end."""
    rows = rows_of(study)
    complete = [r for r in rows if r["state"] == "complete"]
    if not complete:
        raise ValueError("no trial of this study has come to its end yet")
    request, first_rung = (study.user_attrs[key] for key in ("request", "first_rung"))
    curve = dense_curve(dense, rows, out, request["settings"])
    for row in rows:
        row["share_of_dense"] = curve.share(row["flops"], row["loss"]) if curve else ""
    trials = study.get_trials(deepcopy=False)
    settings = {r["trial"]: {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()} for r in rows
                if (found := trials[r["trial"]].user_attrs.get("settings"))}
    dense_settings = next((settings[r["trial"]] for r in rows if r["name"] == "dense" and r["trial"] in settings), None)
    best = [r for r in complete if r["name"] != "dense"][:top]
    os.makedirs(results, exist_ok=True)
    text = page(study, rows, curve, first_rung)
    command = f"python scaling.py sweep {os.path.join(results, 'follow.py')} --runs={os.path.join(out, 'follow')} --jobs=2"
    files = {"table.md": text, "best.py": config_text(complete[0], settings[complete[0]["trial"]]),
             "follow.py": plan_text(best, settings, dense_settings, request, times, seeds, command)}
    for name, contents in files.items():
        with open(os.path.join(results, name), "w", encoding="utf-8") as f:
            f.write(contents)
    write_csv(os.path.join(results, "trials.csv"), round_all(rows))
    try:
        draw(rows, first_rung, request["evals"], results)
    except ImportError:
        print("no figure: it needs matplotlib (pip install -r requirements-dev.txt)")
    print(text)
