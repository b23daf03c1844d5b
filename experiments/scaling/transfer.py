"""Learning-rate transfer: does the best learning rate stay where it is as the width grows?

The best rate of a width is the minimum of a parabola through the validation losses of all its runs over the
logarithm of the rate: the losses of single runs differ by more than those of neighbouring rates.
"""
import dataclasses
import math
import os

import numpy as np

from experiments.scaling.fit import MeasuredRun, differences, grouped, read_runs
from experiments.scaling.report import write_csv
from lib.figure import LOSS, figure, optional_figures, save, style


@dataclasses.dataclass
class Curve:
    """Losses against rates of one structure and width; several seeds are several points of a rate."""
    width: int
    rates: np.ndarray
    losses: np.ndarray

    def means(self) -> dict[float, float]:
        return {rate: float(self.losses[self.rates == rate].mean()) for rate in sorted({*self.rates})}

    def best(self) -> float:
        """The rate with the lowest mean loss."""
        return min(self.means(), key=self.means().get)

    def minimum(self) -> float:
        """The rate where the least-squares parabola over log rate has its minimum; nan where it has none."""
        if len(self.means()) < 3:
            return math.nan
        curvature, slope, _ = np.polyfit(np.log(self.rates), self.losses, 2)
        return math.exp(min(-slope / (2 * curvature), 700)) if curvature > 0 else math.nan


def curves_of(label: str, runs: list[MeasuredRun]) -> tuple[list[Curve], list[str]]:
    """(a curve for each width, remarks) of one structure. Raises ValueError where its runs differ in more
    than width, rate and seed."""
    settings = {key for run in runs for key in run.config} - {"n_embd", "n_head", "learning_rate", "seed"}
    for key, (one, other, *_) in differences(runs, settings).items():
        raise ValueError(f"runs of {label} differ in more than width, rate, seed: {key} is {one} and {other}")
    curves = []
    for width, mine in sorted(grouped(runs, lambda run: run.config["n_embd"]).items()):
        points = [(run.config["learning_rate"], run.points.losses[-1]) for run in mine]
        curves.append(Curve(width, *np.array(points).T))
    return curves, [f"{label}: there is no run of width {curve.width} at learning rate {rate:g}"
                    for curve in curves for rate in rates_of(curves) if rate not in curve.rates]


def rates_of(curves: list[Curve]) -> list[float]:
    """The grid: all rates of any width."""
    return sorted({rate for curve in curves for rate in curve.rates})


def stays(curves: list[Curve]) -> bool:
    """Whether the minima lie within the grid, and no two of them further apart than one step of it."""
    grid, minima = rates_of(curves), [curve.minimum() for curve in curves]
    step = (grid[-1] / grid[0]) ** (1 / max(1, len(grid) - 1))
    return all(grid[0] <= minimum <= grid[-1] for minimum in minima) and max(minima) <= step * min(minima)


def draw(by_structure: dict[str, list[Curve]], mup: bool, folder: str) -> None:
    """A panel for each structure: loss against rate, a line for each width. The best rate is filled, the
    parabola's minimum dotted."""
    fig, [row] = figure(len(by_structure), sharex=True, sharey=True)
    for ax, (label, curves) in zip(row, by_structure.items()):
        for i, curve in enumerate(curves):
            look, means = style(i), curve.means()
            ax.plot(*zip(*means.items()), markerfacecolor="white", label=f"width {curve.width}", **look)
            ax.plot(curve.best(), means[curve.best()], **look)
            ax.axvline(curve.minimum(), color=look["color"], linestyle=":", linewidth=1)
        ax.set(xscale="log", title=label)
        ax.set_xticks(rates_of(curves), [f"{rate:g}" for rate in rates_of(curves)], rotation=45)
        ax.minorticks_off()
    row[0].set_ylabel(LOSS)
    fig.supxlabel("learning rate" + (" at the base width" if mup else ", the same for every parameter"))
    save(fig, row[0], folder, "lr_transfer")


def transfer(folders: list[str], out: str) -> bool:
    """Prints the best rates of every structure and width, and writes lr_transfer.csv, .svg and .png into
    `out`; whether the minimum stays for all structures. Raises ValueError for runs that do not compare."""
    runs, notes = read_runs(folders)
    longest = {run.label: run.last for run in sorted(runs, key=lambda run: run.last)}
    notes += [f"{run.name}: left out, it ends before others" for run in runs if run.last < longest[run.label]]
    runs = [run for run in runs if run.last == longest[run.label]]
    runs.sort(key=lambda run: (run.label, *(run.config[key] for key in ("n_embd", "learning_rate", "seed"))))
    by_structure = {}
    for label, mine in grouped(runs, lambda run: run.label).items():
        by_structure[label], remarks = curves_of(label, mine)
        notes += remarks
        if len(by_structure[label]) < 2 or len(rates_of(by_structure[label])) < 3:
            raise ValueError(f"the runs of {label} have fewer than two widths, or than three learning rates: "
                             "whether the best one stays cannot be told")
    for note in notes:
        print(note)
    for label, curves in by_structure.items():
        cells = [f"width {curve.width}: {curve.means()[curve.best()]:.4f} at {curve.best():g}, parabola's "
                 f"minimum at {curve.minimum():.2g}" for curve in curves]
        print(f"{label:10s} " + "  ".join(cells)
              + ("" if stays(curves) else "  <- moves by more than one step, or leaves the grid"))
    write_csv(os.path.join(out, "lr_transfer.csv"), [
        dict(struct=run.label, width=run.config["n_embd"], learning_rate=run.config["learning_rate"],
             seed=run.config["seed"], iters=run.config["max_iters"], mup=run.config.get("mup", True),
             val_loss=float(run.points.losses[-1])) for run in runs])
    with optional_figures():
        draw(by_structure, all(run.config.get("mup", True) for run in runs), out)
    return all(map(stays, by_structure.values()))
