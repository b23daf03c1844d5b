"""µP's coordinate check: do activations keep their size as the width grows, over the first steps of training?

    python coordinate_check.py                                  every structure, widths 128 to 1024; some ten minutes
    python coordinate_check.py --structs=dense --mup=False      one rate for every parameter: it fails
    python coordinate_check.py --widths=128,256,512,1024,2048

For each structure and width a model of 3 layers, with heads of 32, takes 10 AdamW steps on real data. Then, on one more
batch: the root mean square of each block's change of the residual stream, of the attention logits, and of the output
logits, over several seeds. Under µP none depends on the width (Yang et al., arXiv 2203.03466, appendix D.1). Prints
the ratio of the largest to the smallest value over the widths, writes <out>.csv and <out>.png, and exits with status 1
where a ratio is 2 or more.
"""
import configurator

structs: str = "dense,low_rank,kronecker,monarch,tt,btt,einsum,dyad,btt_moe,moe"  # names of structure configs
widths: tuple = (128, 256, 512, 1024)  # n_embd of the models
learning_rate: float = 1e-3     # of AdamW, constant, at the base width
mup_base_width: int = 128       # d0
mup: bool = True                # False: every parameter learns at learning_rate
steps: int = 10                 # AdamW steps before the measurement
seeds: int = 3                  # models of the largest width, up to 4 times as many of smaller ones, which differ more
batch_size: int = 8             # sequences per step
block_size: int = 64            # tokens per sequence
dataset: str = "python_char"    # a folder under data/, or the path of one
out: str = "results/coordinate_check"  # where to write, without .csv and .png
config = configurator.configure(globals())
globals().update(config)

import csv
import math
import os
import sys

import numpy as np
import torch

from configurator import fail, structure_config
from data.common import open_dataset
from model import GPT, GPTConfig

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 2.0  # ratio over the widths that no longer passes


def mean_square(x: torch.Tensor) -> float:
    return x.double().square().mean().item()


def measure(model: GPT, x, y) -> dict[str, float]:
    """Mean squares on one batch: {'block 0', ..., 'attention logits', 'output logits'}."""
    found, heads = {}, {}

    def keep_change(name):
        return lambda module, args, output: found.__setitem__(name, mean_square(output - args[0]))

    def keep_heads(name):
        return lambda module, args, output: heads.setdefault(name, []).append(output)  # (B, T, nh, hs), block by block

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(keep_change(f"block {i}"))
        block.attn.q_norm.register_forward_hook(keep_heads("q"))
        block.attn.k_norm.register_forward_hook(keep_heads("k"))
    with torch.no_grad():
        logits, _ = model(x, y)
    products = [torch.einsum("bthd,bshd->bhts", q, k) * 8 / q.shape[-1] for q, k in zip(heads["q"], heads["k"])]
    return found | {"attention logits": mean_square(torch.stack(products)), "output logits": mean_square(logits)}


def train_and_measure(options: dict, width: int, seed: int, tokens, vocab_size: int) -> dict[str, float]:
    """Mean squares on the batch that follows the last step of a model of this width."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=3, n_head=width // 32, n_embd=width,
                          **options))
    optimizer = model.configure_optimizers(0.0, learning_rate, (0.9, 0.95), "cpu", mup_base_width if mup else None)
    rng = np.random.default_rng(seed)
    for step in range(steps + 1):
        starts = rng.integers(0, len(tokens) - block_size, batch_size)
        batch = torch.from_numpy(np.stack([tokens[s:s + block_size + 1] for s in starts]).astype(np.int64))
        x, y = batch[:, :-1], batch[:, 1:]
        if step == steps:
            return measure(model, x, y)
        _, loss, aux = model(x, y, return_aux=True)
        (loss + 0.01 * aux.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.rebalance(aux.load, aux.variance, 0.1)


def draw(rows: list[dict], path: str) -> None:
    """A panel for each structure: size against width, a line for each quantity."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names, quantities = (list(dict.fromkeys(r[key] for r in rows)) for key in ("struct", "quantity"))
    columns = min(5, len(names))
    lines = -(-len(names) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(max(3.2 * columns, 6), 2.7 * lines + 0.7), sharex=True, sharey=True,
                             squeeze=False)
    for ax, name in zip(axes.flat, names):
        for style, quantity in zip(("o-", "s-", "^-", "D--", "v:"), quantities):
            points = [(r["width"], r["rms"]) for r in rows if r["struct"] == name and r["quantity"] == quantity]
            ax.plot(*zip(*points), style, label=quantity, markersize=4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(sorted({r["width"] for r in rows}), sorted({r["width"] for r in rows}))
        ax.set_title(name if mup else f"{name}, without µP")
    for ax in axes.flat[len(names):]:
        ax.axis("off")
    fig.supxlabel("width")
    fig.supylabel(f"root mean square after {steps} steps")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncol=3 if columns < 4 else 5, frameon=False)
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.5 / (2.7 * lines + 0.7)))
    fig.savefig(path, dpi=120)


def main() -> None:
    if steps < 2:
        fail(f"steps must be at least 2, since the first moves zeros alone; got {steps}")
    for key in ("seeds", "batch_size", "block_size", "mup_base_width", "learning_rate"):
        if config[key] <= 0:
            fail(f"{key} must be positive; got {config[key]}")
    if any(w < 32 or w % 32 for w in widths) or len(set(widths)) < 2:
        fail(f"widths must be two or more different multiples of 32, the size of a head; got {widths}")
    structures = {name: structure_config(name) for name in structs.split(",")}
    rows, failed = [], []
    try:
        meta, splits = open_dataset(dataset if os.path.isdir(dataset) else os.path.join(HERE, "data", dataset))
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        for name, options in structures.items():
            ratios = {}
            for width in map(int, sorted(widths)):
                count = seeds * min(4, int(max(widths)) // width)
                runs = [train_and_measure(options, width, s, splits["train"], meta["vocab_size"]) for s in range(count)]
                for quantity in runs[0]:
                    rms = float(np.mean([r[quantity] for r in runs])) ** 0.5
                    rows.append(dict(struct=name, mup=mup, width=width, quantity=quantity, rms=rms))
            for quantity in runs[0]:
                values = [r["rms"] for r in rows if r["struct"] == name and r["quantity"] == quantity]
                fine = all(map(math.isfinite, values)) and min(values) > 0
                ratios[quantity] = max(values) / min(values) if fine else math.inf
            failed += [name] * (not max(ratios.values()) < LIMIT)
            print(f"{name:10s} " + "  ".join(f"{q} {r:.2f}" for q, r in ratios.items())
                  + f"  <- not below {LIMIT:g}" * (name in failed), flush=True)
        with open(out + ".csv", "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, out + ".png")
    except (ValueError, OSError) as e:
        fail(str(e))
    except ImportError:
        print("no figure: it needs matplotlib (pip install -r requirements-dev.txt)")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
