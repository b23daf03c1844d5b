"""Figures of scaling laws, from the fit.json that report.py writes, and how every figure of the experiments
is drawn.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Each structure also has a marker and a
line style of its own, so that a grey print shows as much. Every figure is written as svg and as png.
"""
import contextlib
import itertools
import json
import os

import numpy as np

from experiments.scaling.fit import AXES, Law

AXIS_FIGURES = {"frontier": "flops", "frontier_without_output_layer": "flops_without_output_layer",
                "wall_clock": "seconds"}
FIGURES = (*AXIS_FIGURES, "multiplier", "params")
LOSS = "validation loss, nats per token"
# yellow is left out: on white it is too faint for a line
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
MARKERS = "os^DvPX*<>hp"
LINES = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (8, 2, 1, 2, 1, 2)),
         (0, (10, 3)), (0, (2, 2, 6, 2)), (0, (4, 1, 4, 4)))


@contextlib.contextmanager
def optional_figures():
    """Without matplotlib there is a remark instead of a figure."""
    try:
        yield
    except ImportError:
        print("no figures: they need matplotlib (pip install -r requirements-dev.txt)")


def style(i: int) -> dict:
    """Colour, marker and line style of the i-th structure: all three together repeat after 72."""
    looks = dict(color=COLORS, marker=MARKERS, linestyle=LINES)
    return {key: values[i % len(values)] for key, values in looks.items()}


def figure(panels: int = 1, rows: int = 1, **options):
    """(a figure that needs no screen, its axes as an array of rows)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"font.size": 9, "svg.fonttype": "none"}
    fig, grid = plt.subplots(rows, panels, figsize=(2.7 + 3.4 * panels, 0.8 + 3.2 * rows), squeeze=False,
                             layout="constrained", **options)
    for ax in grid.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return fig, grid


def log_ticks(ax, name: str) -> None:
    """Make the axis 'x' or 'y' logarithmic, with fewer ticks the more decades it has: powers of ten along x;
    losses and multipliers, along y, are read as 1.5 and 2."""
    from matplotlib import ticker
    ax.set(**{f"{name}scale": "log"})
    axis = getattr(ax, f"{name}axis")
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    if name == "x":
        subs = (1,) if decades > 2 else (1, 2, 5)
        formatter = ticker.LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(np.inf, np.inf))
    else:
        fine = (1, 1.5, 2, 3, 4, 5, 7) if decades > 0.5 else np.arange(1, 10, 0.2).round(1)
        subs = (1, 2, 5) if decades > 1.2 else fine
        formatter = ticker.FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_locator(ticker.LogLocator(base=10, subs=subs))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(ticker.NullFormatter())


def save(fig, ax, folder: str, name: str) -> None:
    """Write a figure, the legend of `ax` beside all axes, into a folder that is made if need be. The same
    figure is the same file."""
    import matplotlib.pyplot as plt
    plt.rcParams["svg.hashsalt"] = name
    os.makedirs(folder, exist_ok=True)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        fig.legend(handles, labels, loc="outside right center", frameon=False, handlelength=3.2)
    for kind in ("svg", "png"):
        metadata = {"Date": None} if kind == "svg" else None
        fig.savefig(os.path.join(folder, f"{name}.{kind}"), dpi=150, metadata=metadata)
    plt.close(fig)


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
            ax.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)
            ax.plot(x, value, linewidth=1.5, **look | dict(marker="none"))
            found += list(value)
        if points := [(x, m) for x, m in zip(f["x"], f["measured_multipliers"]) if m is not None]:
            every = max(1, len(points) // 10)
            ax.plot(*zip(*points[::every]), markersize=4.5, **look | dict(linestyle="none"))
            found += [m for _, m in points]
    log_ticks(ax, "x")
    return found


def draw_params(ax, runs: list[dict], looks: dict, key: str) -> None:
    """The end of every run; a line through the best of each size."""
    for label, look in looks.items():
        mine = [(r[key], r["val_loss"]) for r in runs if r["structure"] == label]
        best = sorted({size: min(loss for s, loss in mine if s == size) for size, _ in mine}.items())
        ax.plot(*zip(*mine), color=look["color"], marker=look["marker"], linestyle="none", markersize=3.5,
                markerfacecolor="none", markeredgewidth=0.7)
        ax.plot(*zip(*best), label=label, markersize=4.5, linewidth=1.3, **look)
    log_ticks(ax, "x")
    log_ticks(ax, "y")


def draw(found: dict) -> dict[str, tuple]:
    """{name: (figure, the axes that have its legend)} of those FIGURES that fit.json has data for."""
    by_axis, base, drawn = found["axes"], found["base"], {}
    labels = dict.fromkeys(label for of_axis in by_axis.values() for label in of_axis)
    looks = {label: style(i) for i, label in enumerate(labels)}
    for name, axis in AXIS_FIGURES.items():
        if axis in by_axis:
            fig, [[ax]] = figure()
            draw_frontier(ax, by_axis[axis], looks, found["curves"], axis)
            ax.set(xlabel=AXES[axis], ylabel=LOSS)
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
    fig, [row] = figure(2, sharey=True)
    for ax, (key, what) in zip(row, (("params", "parameters"), ("active_params", "active parameters"))):
        draw_params(ax, found["runs"], looks, key)
        ax.set_xlabel(what)
    row[0].set_ylabel(LOSS + ", at each run's end")
    return drawn | {"params": (fig, row[0])}


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
