"""Figures of scaling laws, from the fit.json that report.py writes."""
import contextlib
import itertools
import json
import os

import numpy as np

from experiments.scaling.fit import AXES, TAXONOMY, Law
from lib.figure import LOSS, figure, log_ticks, save, style

AXIS_FIGURES = {"frontier": "flops", "frontier_without_output_layer": "flops_without_output_layer",
                "wall_clock": "seconds"}
FIGURES = (*AXIS_FIGURES, "multiplier", "taxonomy")


def draw_frontier(ax, fitted: dict, looks: dict, curves: list[dict], axis: str) -> None:
    """Faint: every run. Markers: the frontier, hollow where it is not fitted. Lines: the laws."""
    for label, f in fitted.items():
        look = looks[label]
        for curve in (c for c in curves if c["structure"] == label and axis in c):
            ax.plot(curve[axis], curve["loss"], color=look["color"], linewidth=0.6, alpha=0.25)
        x, loss, used = np.array(f["x"]), np.array(f["loss"]), np.array(f["used"], bool)
        every = max(1, len(x) // 12)
        for part, fill in ((used, look["color"]), (~used, "none")):
            ax.plot(x[part][::every], loss[part][::every], markersize=4.5, markerfacecolor=fill,
                    markeredgewidth=0.9, **look | dict(linestyle="none"))
        if f["law"] is not None:
            at = np.geomspace(x[used].min(), x[used].max(), 100)
            ax.plot(at, Law(**f["law"]).loss(at), linewidth=1.5, **look | dict(marker="none"))
        ax.plot([], [], label=label, markersize=4.5, linewidth=1.5, **look)
    log_ticks(ax, "x")
    losses = [loss for f in fitted.values() for loss in f["loss"]]
    ax.set_ylim(min(losses) * 0.96, max(losses) * 1.04)
    log_ticks(ax, "y")


def draw_multipliers(ax, fitted: dict, looks: dict, base: str) -> list[float]:
    """For each structure: by the laws, a line and its interval; by the frontiers' points, markers. 1 for the
    base. Returns all multipliers."""
    found = [1.0]
    for label, f in fitted.items():
        look = looks[label]
        if label == base:
            ax.axhline(1, color=look["color"], linewidth=1.2, label=label, linestyle=look["linestyle"])
            continue
        ax.plot([], [], label=label, markersize=4.5, linewidth=1.5, **look)
        if points := [(x, *m) for x, m in zip(f["x"], f["multipliers"]) if m is not None]:
            x, value, low, high = map(np.array, zip(*points))
            ax.fill_between(x, np.maximum(low, 1e-30), high, color=look["color"], alpha=0.13, linewidth=0)
            ax.plot(x, value, linewidth=1.5, **look | dict(marker="none"))
            found += list(value)
        if points := [(x, m) for x, m in zip(f["x"], f["measured_multipliers"]) if m is not None]:
            every = max(1, len(points) // 10)
            ax.plot(*zip(*points[::every]), markersize=4.5, **look | dict(linestyle="none"))
            found += [m for _, m in points]
    log_ticks(ax, "x")
    return found


def draw_taxonomy(row, rows: list[dict]) -> None:
    """Loss over ω, ψ and ν: filled where ω = 0 and ψ = 1, with a mark of its own for mixtures."""
    looks = {"ω = 0 and ψ = 1": dict(marker="o", color="#0072B2"),
             "other θ": dict(marker="o", color="#D55E00", markerfacecolor="none"),
             "experts": dict(marker="*", color="#000000", markersize=9)}

    def kind(r: dict) -> str:
        is_best = r["omega"] < 1e-6 and r["psi"] > 1 - 1e-6     # as the paper has it
        return "experts" if r["experts"] else "ω = 0 and ψ = 1" if is_best else "other θ"

    for ax, (axis, what) in zip(row, TAXONOMY.items()):
        for label, look in looks.items():
            if mine := [r for r in rows if kind(r) == label]:
                x, y = zip(*((r[axis], r["loss"]) for r in mine))
                ax.plot(x, y, label=label, linestyle="none", **look)
        ax.set_xlabel(what)
        log_ticks(ax, "y")
    for r in rows if len(rows) <= 12 else ():   # more names would lie upon each other
        row[-1].annotate(r["structure"], (r["nu"], r["loss"]), xytext=(5, 0), textcoords="offset points",
                         fontsize=7, verticalalignment="center")


def draw(found: dict) -> dict[str, tuple]:
    """{name: (figure, the axes that have its legend)} of those FIGURES that fit.json has data for."""
    by_axis, base, drawn = found["axes"], found["base"], {}
    loss = found["measure"].get("loss", LOSS)
    labels = dict.fromkeys(label for of_axis in by_axis.values() for label in of_axis)
    looks = {label: style(i) for i, label in enumerate(labels)}
    for name, axis in AXIS_FIGURES.items():
        if axis in by_axis:
            fig, [[ax]] = figure()
            draw_frontier(ax, by_axis[axis], looks, found["curves"], axis)
            ax.set(xlabel=AXES[axis], ylabel=loss)
            drawn[name] = fig, ax
    panels = {"flops": "Compute", "seconds": "Time"}
    panels = {axis: what for axis, what in panels.items() if axis in by_axis}
    if any(gain for axis in panels for f in by_axis[axis].values() for gain in f["multipliers"]):
        fig, [row] = figure(len(panels), sharey=True)
        gains = []
        for ax, (axis, what) in zip(row, panels.items()):
            gains += draw_multipliers(ax, by_axis[axis], looks, base)
            ax.set(xlabel=AXES[axis], title=f"{what} that {base} needs ÷ needed")
        row[0].set(ylabel="multiplier", ylim=(min(gains) / 1.5, max(gains) * 1.5))  # not all of intervals
        log_ticks(row[0], "y")
        drawn["multiplier"] = fig, row[0]
    taxonomy = found.get("taxonomy", dict(rows=[]))
    if len(taxonomy["rows"]) > 1:
        fig, [row] = figure(len(TAXONOMY), sharey=True)
        draw_taxonomy(row, taxonomy["rows"])
        row[0].set_ylabel(f"{loss},\nat {taxonomy['budget']:.2g} FLOPs")
        drawn["taxonomy"] = fig, row[0]
    return drawn


def plot(folder: str) -> None:
    """All FIGURES there are data for, .svg and .png, beside fit.json, instead of those of an earlier fit.
    Raises ValueError where fit.json is not there, or is none that can be drawn, before any is touched."""
    try:
        with open(os.path.join(folder, "fit.json"), encoding="utf-8") as f:
            drawn = draw(json.load(f))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"there is no fit.json that can be drawn in {folder!r} ({type(e).__name__}: {e}): "
                         "make it with python -m experiments.scaling fit") from e
    for name, kind in itertools.product(FIGURES, ("svg", "png")):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, f"{name}.{kind}"))
    for name, (fig, ax) in drawn.items():
        save(fig, ax, folder, name)
