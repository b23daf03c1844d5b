"""µP's coordinate check: do activations keep their size as the width grows, over the first steps of training?

    python -m experiments.coordinate_check                              every structure, widths 128 to 1024
    python -m experiments.coordinate_check --structs=dense --mup=False  one rate for every parameter: it fails

For each structure and width a model of 3 layers, with heads of 32, takes 10 AdamW steps on real data. Then,
on one more batch, it measures the root mean square of each block's change of the residual stream, of the
attention logits, and of the output logits, over several seeds. Under µP none depends on the width (Yang et
al., arXiv 2203.03466, appendix D.1). Prints the ratio of the largest to the smallest value over the widths,
writes coordinate_check.csv, .svg and .png into <out>, and exits with status 1 where a ratio is 2 or more.
"""
import configurator
from configurator import PositiveFloat, PositiveInt, fail, structure_config
from lib.terminal import prepare_output

structs: str = "dense,low_rank,kronecker,monarch,tt,btt,einsum,dyad,btt_moe,moe"  # names of structure configs
widths: tuple = (128, 256, 512, 1024)  # n_embd of the models
learning_rate: PositiveFloat = 1e-3  # of AdamW, constant, at the base width
mup_base_width: PositiveInt = 128  # d0
mup: bool = True                # False: every parameter learns at learning_rate
steps: int = 10                 # AdamW steps before the measurement
seeds: PositiveInt = 3          # models of the largest width; up to 4 times as many of smaller ones
batch_size: PositiveInt = 8     # sequences per step
block_size: PositiveInt = 64    # tokens per sequence
dataset: str = "python_char"    # a folder under data/, or the path of one
out: str = "out-coordinate_check"  # folder of the table and the figure
prepare_output(keep_going=True)
config = configurator.configure(globals())
globals().update(config)

import math
import os
import sys

import numpy as np
import torch

from data.common import open_dataset
from experiments.scaling.report import write_csv
from lib.figure import figure, optional_figures, save, style
from model import GPT, GPTConfig

LIMIT = 2.0  # a ratio over the widths that no longer passes


def mean_square(x: torch.Tensor) -> float:
    return x.double().square().mean().item()


def measure(model: GPT, x, y) -> dict[str, float]:
    """Mean squares on one batch: {'block 0', ..., 'attention logits', 'output logits'}. Keeps its hooks."""
    changes, queries, keys = [], [], []     # of each block; queries and keys are (B, T, nh, hs)
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: changes.append(mean_square(output - inputs[0])))
        block.attn.q_norm.register_forward_hook(lambda _, inputs, output: queries.append(output))
        block.attn.k_norm.register_forward_hook(lambda _, inputs, output: keys.append(output))
    with torch.no_grad():
        logits, _ = model(x, y)
    products = [model.config.attention_scale * torch.einsum("bthd,bshd->bhts", q, k)
                for q, k in zip(queries, keys)]
    return {f"block {i}": change for i, change in enumerate(changes)} | {
        "attention logits": mean_square(torch.stack(products)), "output logits": mean_square(logits)}


def train_and_measure(options: dict, width: int, seed: int, tokens, vocab_size: int) -> dict[str, float]:
    """Mean squares on the batch that follows the last step of a model of this width."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=3, n_head=width // 32,
                          n_embd=width, **options))
    base_width = mup_base_width if mup else None
    optimizer = model.configure_optimizers(0.0, learning_rate, (0.9, 0.95), "cpu", base_width)
    rng = np.random.default_rng(seed)
    for step in range(steps + 1):
        starts = rng.integers(0, len(tokens) - block_size, batch_size)
        windows = np.stack([tokens[s:s + block_size + 1] for s in starts]).astype(np.int64)
        x, y = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
        if step == steps:
            return measure(model, x, y)
        _, loss, aux = model(x, y, return_aux=True)
        (loss + 0.01 * aux.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.rebalance(aux.load, aux.variance, 0.1)


def check_structure(name: str, tokens, vocab_size: int) -> list[dict]:
    """Rows of the table, one for each width and quantity. Smaller models vary more, and get more seeds."""
    rows, fields = [], GPTConfig.__dataclass_fields__
    options = {key: value for key, value in structure_config(name).items() if key in fields}
    for width in sorted({int(width) for width in widths}):
        count = seeds * min(4, int(max(widths)) // width)
        runs = [train_and_measure(options, width, s, tokens, vocab_size) for s in range(count)]
        rows += [dict(struct=name, mup=mup, width=width, quantity=quantity,
                      rms=float(np.mean([run[quantity] for run in runs])) ** 0.5) for quantity in runs[0]]
    return rows


def spread(rows: list[dict]) -> dict[str, float]:
    """{quantity: largest ÷ smallest value over the widths}; infinite where one is 0 or not finite."""
    found = {}
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        sizes = [row["rms"] for row in rows if row["quantity"] == quantity]
        found[quantity] = max(sizes) / min(sizes) if all(0 < size < math.inf for size in sizes) else math.inf
    return found


def draw(rows: list[dict], folder: str) -> None:
    """A panel for each structure: size against width, a line for each quantity."""
    names, quantities, ticks = (list(dict.fromkeys(row[key] for row in rows))
                                for key in ("struct", "quantity", "width"))
    columns = min(5, len(names))
    fig, grid = figure(columns, rows=math.ceil(len(names) / columns), sharex=True, sharey=True)
    for ax, name in zip(grid.flat, names):
        for i, quantity in enumerate(quantities):
            sizes = [row["rms"] for row in rows if (row["struct"], row["quantity"]) == (name, quantity)]
            ax.plot(ticks, sizes, label=quantity, markersize=4, **style(i))
        ax.set(xscale="log", yscale="log", title=name if mup else f"{name}, without µP")
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    for ax in grid.flat[len(names):]:
        ax.axis("off")
    fig.supxlabel("width")
    fig.supylabel(f"root mean square after {steps} steps")
    save(fig, grid[0, 0], folder, "coordinate_check")


def main() -> int:
    """Check every structure; the exit status."""
    if steps < 2:
        fail(f"steps must be at least 2, since the first moves only zero weights; got {steps}")
    if any(w < 32 or w % 32 for w in widths) or len(set(widths)) < 2:
        fail(f"widths must be two or more different multiples of 32, the size of a head; got {widths}")
    names = [name.strip() for name in structs.split(",")]
    if len(set(names)) < len(names):
        fail(f"structs must name every structure once; got {structs!r}")
    for name in names:
        structure_config(name)      # an unknown one ends here, not after the structures before it
    meta, splits = open_dataset(dataset)
    if len(splits["train"]) <= block_size:
        fail(f"train.bin of the dataset holds {len(splits['train'])} tokens, too few for block_size = "
             f"{block_size}")
    rows, status = [], 0
    for name in names:
        rows += (found := check_structure(name, splits["train"], meta["vocab_size"]))
        ratios = spread(found)
        line = f"{name:10s} " + "  ".join(f"{quantity} {ratio:.2f}" for quantity, ratio in ratios.items())
        if max(ratios.values()) >= LIMIT:
            line, status = line + f"  <- not below {LIMIT:g}", 1
        print(line, flush=True)
    write_csv(os.path.join(out, "coordinate_check.csv"), rows)
    if not any(0 < row["rms"] < math.inf for row in rows):
        print("no figure: every value is 0 or not finite")
        return status
    with optional_figures():
        draw(rows, out)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        fail(str(e))
