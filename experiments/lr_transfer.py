"""Does the best learning rate stay where it is as the width grows? Validation loss against learning rate, for each width.

    python lr_transfer.py                                       dense, btt and btt_moe, about an hour on two CPU cores
    python lr_transfer.py --structs=dense --mup=False           one rate for every parameter: the best one moves

Each point is a run of train.py on a small scale: 3 layers, heads of 32, python_char. Finished runs are kept in `runs` and
not made again. For each width it prints the best rate of the grid and, since losses of single runs differ by more than
those of neighboring rates, the minimum of a parabola through the losses of all runs over the logarithm of the rate. Writes
<out>.csv and <out>.png, and exits with status 1 where that minimum moves by more than one step of the grid, or leaves it.
"""
import configurator

structs: str = "dense,btt,btt_moe"  # names of structure configs
widths: tuple = (64, 128, 256)  # n_embd of the models
rates: tuple = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)  # learning rates, at the base width
mup: bool = True                # False: every parameter learns at learning_rate
max_iters: int = 500            # iterations of each run, 1,024 tokens each
seeds: int = 1                  # runs of each point; their mean counts
jobs: int = 2                   # runs at a time; they share the machine's cores
dataset: str = "python_char"    # a folder under data/, or the path of one
runs: str = "out-lr_transfer"   # folder of the runs
out: str = "results/lr_transfer"  # where to write, without .csv and .png
config = configurator.configure(globals())
globals().update(config)

import concurrent.futures
import csv
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np

from configurator import fail, structure_config

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def val_loss(folder: str, flags: dict) -> float | None:
    """Validation loss of a run with these flags: infinite if it diverged, None if there is none or it did not finish."""
    try:
        with open(os.path.join(folder, "log.jsonl")) as f:
            points = [json.loads(line) for line in f]
    except (OSError, ValueError):
        return None
    if not points or any(points[0]["config"][k] != v for k, v in flags.items()):
        return None
    losses = [p["val_loss"] for p in points if p["type"] == "eval" and p["iter"] == max_iters]
    return (losses[0] if math.isfinite(losses[0]) else math.inf) if losses else None


def run(struct: str, width: int, rate: float, seed: int) -> dict:
    """One run of train.py, unless it is there already; its row of the csv."""
    name = f"{struct}-d{width}-lr{rate:g}-i{max_iters}-s{seed}" + "-nomup" * (not mup)
    folder = os.path.join(runs, name)
    flags = dict(dataset=dataset, n_embd=width, n_head=width // 32, n_layer=3, batch_size=16,
                 gradient_accumulation_steps=1, learning_rate=rate, max_iters=max_iters, lr_decay_iters=max_iters,
                 eval_interval=max_iters, eval_iters=100, log_interval=20, sample_tokens=0, seed=seed, mup=mup)
    if val_loss(folder, flags) is None:
        os.makedirs(folder, exist_ok=True)
        command = [sys.executable, os.path.join(HERE, "train.py"), os.path.join(HERE, "config", f"{struct}.py"),
                   os.path.join(HERE, "config", "quickstart.py"), *(f"--{k}={v}" for k, v in flags.items()),
                   f"--out_dir={folder}"]
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        with open(os.path.join(folder, "output.txt"), "w") as output:
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT,
                                    env=os.environ | dict(OMP_NUM_THREADS=threads)).returncode
        if status:
            with open(os.path.join(folder, "output.txt")) as output:
                last = (output.read().strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"the run in {folder} ended with status {status}: {last}")
    loss = val_loss(folder, flags)
    print(f"{name}: {loss:.4f}", flush=True)
    return dict(struct=struct, width=width, learning_rate=rate, seed=seed, iters=max_iters, mup=mup, val_loss=loss)


def mean_losses(rows: list[dict], struct: str, width: int) -> list[tuple[float, float]]:
    """(rate, mean validation loss over the seeds), by rate."""
    here = [r for r in rows if r["struct"] == struct and r["width"] == width]
    return [(rate, sum(losses) / len(losses)) for rate in sorted(rates)
            if (losses := [r["val_loss"] for r in here if r["learning_rate"] == rate])]


def minimum(rows: list[dict], struct: str, width: int) -> float:
    """The rate at which the least-squares parabola of loss over log rate has its minimum; NaN if it has none."""
    points = [(math.log(r["learning_rate"]), r["val_loss"]) for r in rows
              if r["struct"] == struct and r["width"] == width and math.isfinite(r["val_loss"])]
    if len({x for x, _ in points}) < 3:
        return math.nan
    curvature, slope, _ = np.polyfit(*zip(*points), 2)
    return math.exp(min(-slope / (2 * curvature), 700)) if curvature > 0 else math.nan


def draw(rows: list[dict], path: str) -> None:
    """A panel for each structure: loss against rate, a line for each width, its best rate filled, the parabola's dotted."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = structs.split(",")
    fig, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.2), sharex=True, sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names):
        colors = plt.cm.viridis([0.9 * i / len(widths) for i in range(len(widths))])
        for marker, color, width in zip(itertools.cycle("os^Dv<>"), colors, widths):
            points = mean_losses(rows, name, width)
            ax.plot(*zip(*points), marker=marker, color=color, markerfacecolor="white", label=f"width {width}")
            ax.plot(*min(points, key=lambda p: p[1]), marker=marker, color=color)
            ax.axvline(minimum(rows, name, width), color=color, linestyle=":", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_xticks(rates, [f"{r:g}" for r in rates], rotation=45)
        ax.set_title(name)
    axes[0, 0].set_ylabel("validation loss, nats per character")
    fig.supxlabel("learning rate" + (" at the base width" if mup else ", the same for every parameter"), fontsize="medium")
    axes[0, -1].legend(edgecolor="none", framealpha=1)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main() -> None:
    for key in ("max_iters", "seeds", "jobs"):
        if config[key] < 1:
            fail(f"{key} must be at least 1; got {config[key]}")
    if len(rates) < 3 or min(rates) <= 0:
        fail(f"rates must be three or more, and positive; got {rates}")
    if not widths or any(w < 32 or w % 32 for w in widths):
        fail(f"widths must be multiples of 32, the size of a head; got {widths}")
    for struct in structs.split(","):
        structure_config(struct)
    for key, values in (("structs", structs.split(",")), ("widths", widths), ("rates", rates)):
        if len(set(values)) < len(values):
            fail(f"{key} names something twice: {config[key]}")
    grid = [(struct, int(width), rate, seed) for struct in structs.split(",") for width in sorted(widths, reverse=True)
            for rate in rates for seed in range(1, seeds + 1)]
    try:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            rows = list(pool.map(lambda point: run(*point), grid))
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        with open(out + ".csv", "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, out + ".png")
    except (RuntimeError, OSError) as e:
        fail(str(e))
    except ImportError:
        print("no figure: it needs matplotlib (pip install -r requirements-dev.txt)")
    moved, step = [], (max(rates) / min(rates)) ** (1 / (len(rates) - 1))
    for struct in structs.split(","):
        best = {width: min(mean_losses(rows, struct, width), key=lambda p: p[1]) for width in widths}
        minima = {width: minimum(rows, struct, width) for width in widths}
        fine = all(min(rates) <= m <= max(rates) for m in minima.values()) and max(minima.values()) <= step * min(minima.values())
        moved += [struct] * (not fine)
        print(f"{struct:10s} " + "  ".join(f"width {w}: {loss:.4f} at {rate:g}, parabola's minimum at {minima[w]:.2g}"
                                           for w, (rate, loss) in best.items())
              + "  <- moves by more than one step, or leaves the grid" * (not fine))
    sys.exit(1 if moved else 0)


if __name__ == "__main__":
    main()
