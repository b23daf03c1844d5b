"""How figures are drawn, by experiments and tools alike. Needs matplotlib, and imports it where it draws.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Each curve also has a marker and a
line style of its own, so that it can be told apart in grey. Every figure is written as svg and as png.
"""
import contextlib
import os

import numpy as np

LOSS = "validation loss, nats per token"
# yellow is left out: on white it is too faint for a line
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
MARKERS = "os^DvPX*<>hp"
LINES = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (8, 2, 1, 2, 1, 2)),
         (0, (10, 3)), (0, (2, 2, 6, 2)), (0, (4, 1, 4, 4)))


@contextlib.contextmanager
def optional_figures():
    """Without matplotlib, prints a remark instead of drawing figures."""
    try:
        yield
    except ImportError:
        print("no figures: they need matplotlib (pip install matplotlib)")


def style(i: int) -> dict:
    """Colour, marker and line style of the i-th curve: all three together repeat after 72."""
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
    """Make the axis 'x' or 'y' logarithmic, with fewer ticks the more decades it has: labels are powers of
    ten along x, and plain numbers such as 1.5 and 2 along y, for losses and multipliers."""
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
    """Write a figure, the legend of `ax` beside all axes, into a folder, which is created if necessary.
    The same figure gives the same file."""
    import matplotlib.pyplot as plt
    plt.rcParams["svg.hashsalt"] = name
    os.makedirs(folder, exist_ok=True)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        lines = "\n".join(labels).split("\n")
        fig.set_figheight(max(fig.get_figheight(), 0.3 + 0.2 * len(lines)))     # inches: all lines of it
        fig.set_figwidth(fig.get_figwidth() + 0.075 * max(0, max(map(len, lines)) - 16))     # and long ones
        fig.legend(handles, labels, loc="outside right center", frameon=False, handlelength=3.2)
    for kind in ("svg", "png"):
        metadata = {"Date": None} if kind == "svg" else None
        fig.savefig(os.path.join(folder, f"{name}.{kind}"), dpi=150, metadata=metadata)
    plt.close(fig)
