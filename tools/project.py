"""A dense checkpoint with each projection replaced by the nearest matrix of a structure: docs/project.md.

    python -m tools.project out-dense --struct=btt --rank=4           a run's ckpt.pt, or a checkpoint file
    python -m tools.project out-dense --struct=btt --calibration_tokens=65536 --finetune_iters=1000

Nearest in the Frobenius norm or, with calibration_tokens, in the mean square of the layer's outputs. Writes
<out_dir>/ckpt.pt, from whose weights train.py can start (--init_from), and which sample.py takes. It has no
weight norm, so that its cores are the matrices' own. Prints a table of the projections and the losses.
"""
import dataclasses
import os
import shlex
import subprocess
import sys
from typing import Literal

from configurator import (HERE, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, configure,
                          fail, read_keys)
from lib.terminal import prepare_output

# what the projections become
struct: str = "btt"                     # low_rank, kronecker, monarch, tt, btt, einsum, dyad or dense
rank: PositiveInt | None = None         # rank ρ; None: d^θρ
theta: tuple | None = None              # exponents of alpha beta gamma delta epsilon phi rho, for 'einsum'
layers: Literal["all", "attn", "mlp"] = "all"  # which projections; others stay dense
head_aligned: bool | None = None        # φ of q, k, v and γ of o = n_head; None: btt, at full rank
dyad_blocks: PositiveInt = 4            # blocks of struct 'dyad'
dyad_variant: Literal["it", "ot", "dt"] = "it"  # variant of struct 'dyad'
# in which norm they are nearest
calibration_tokens: NonNegativeInt = 0  # training tokens whose second moments weigh the inputs; 0: none
damping: NonNegativeFloat = 0.01        # share of the mean second moment, added to each feature's
sweeps: PositiveInt = 100               # most sweeps of alternating least squares
tolerance: NonNegativeFloat = 1e-4      # stop where a sweep lowers the squared error by less than this share
# losses
eval_tokens: NonNegativeInt = 65536     # validation tokens of the losses; 0: do not measure them
batch_size: PositiveInt = 8             # sequences at once
finetune_iters: NonNegativeInt = 0      # iterations of train.py from the result; 0: print the command
learning_rate: PositiveFloat | None = None  # its peak; None: a third of the checkpoint's
# I/O
dataset: str | None = None              # a folder under data/, or the path of one; None: the checkpoint's
out_dir: str | None = None              # None: the checkpoint's folder, and -<struct>
device: str | None = None               # of losses and calibration: 'cuda', 'mps', 'cpu'; None: the best
seed: Seed = 1337                       # of the choice of calibration tokens

import torch
from torch import Tensor

from data.batches import Batches
from data.common import check_token_ids, open_dataset
from lib.checkpoint import Progress, save_checkpoint
from lib.commands import flag_of
from lib.device import autocast, choose_device
from lib.evaluation import evaluate
from lib.files import lock_out_dir
from lib.log import read_log
from lib.nearest import nearest_einsum, nearest_sum, relative_error
from lib.table import markdown_table
from model import GPT, load_checkpoint
from structured import Dyad, Einsum, Structured

# ---- The checkpoint and its data ---------------------------------------------------------------------------

def read_dense(place: str) -> tuple[str, dict, GPT]:
    """load_checkpoint, for what can be projected. Raises ValueError or OSError if this cannot."""
    path, checkpoint, model = load_checkpoint(place)
    config, why = model.config, ""
    if config.struct != "dense" or config.num_experts or config.ffn_experts:
        experts = " with experts" if config.num_experts or config.ffn_experts else ""
        why = f"its struct is {config.struct!r}{experts}, and only a dense model without experts can be"
    elif wrong := [key for key in ("config", "tokenizer") if not isinstance(checkpoint.get(key), dict)]:
        why = f"it lacks a valid {wrong[0]}"
    elif broken := [name for name, p in model.named_parameters() if not p.isfinite().all()]:
        why = f"{broken[0]} has values that are not finite"
    if why:
        raise ValueError(f"{path} cannot be projected: {why}")
    return path, checkpoint, model


def open_batches(checkpoint: dict, model: GPT, device: str) -> Batches:
    """The checkpoint's dataset. Raises ValueError if it is not there, or is of another vocabulary."""
    meta, splits = open_dataset(dataset or checkpoint["config"]["dataset"])
    if meta["tokenizer"] != checkpoint["tokenizer"]:
        raise ValueError("the dataset's vocabulary is not the checkpoint's: give its own by --dataset")
    check_token_ids(splits, model.config.vocab_size)
    windows = max(1, -(-eval_tokens // model.config.block_size))
    return Batches(splits, block_size=model.config.block_size, batch_size=batch_size, seed=seed,
                   sequences=batch_size, val_windows=windows, device=device)


def loss_of(model: GPT, batches: Batches | None, amp) -> float | None:
    """Cross-entropy on the validation windows, in nats per token; None if it is not to be measured."""
    if not eval_tokens:
        return None
    model.to(batches.device)
    loss, *_ = evaluate(model, batches, (0, 0), amp, lambda: False)
    model.to("cpu").eval()
    return loss

# ---- Second moments of the inputs --------------------------------------------------------------------------

def input_name(name: str) -> str:
    """The first of the projections that read the same input as this one."""
    return name.replace(".attn.k", ".attn.q").replace(".attn.v", ".attn.q")


@torch.no_grad()
def second_moments(model: GPT, names: list[str], batches: Batches) -> dict[str, Tensor]:
    """{input_name: Xᵀ X / N + damping (d_in, d_in)} of the inputs X (N, d_in) on training tokens."""
    moments: dict[str, Tensor] = {}

    def add(name):
        def hook(module, inputs):
            X = inputs[0].flatten(0, -2).float()
            moments[name] = moments.get(name, 0) + (X.T @ X).cpu().double()  # MPS has no float64
        return model.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [add(name) for name in sorted(set(map(input_name, names)))]
    model.to(batches.device)
    left, iteration = -(-calibration_tokens // model.config.block_size), 0  # sequences
    while left > 0:
        X, _ = batches.train(iteration, 0, min(left, batch_size))
        model(X)
        left, iteration = left - len(X), iteration + 1
    for hook in hooks:
        hook.remove()
    model.to("cpu")
    for C in moments.values():
        C /= -(-calibration_tokens // model.config.block_size) * model.config.block_size
        C += damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    return moments

# ---- Projection --------------------------------------------------------------------------------------------

@torch.no_grad()
def fill(layer: Structured, W: Tensor, C: Tensor | None) -> None:
    """Gives a layer without weight norm the cores of the matrix nearest to W."""
    if isinstance(layer, Dyad):
        layer.wl[:], layer.wu[:] = nearest_sum(W, layer.places(), C)
        return
    if not isinstance(layer, Einsum):
        raise ValueError(f"fill() of tools/project.py does not know {type(layer).__name__}: add it there")
    A, B, _ = nearest_einsum(W, layer.sizes, C, sweeps, tolerance)
    first, second = (B, A) if layer.b_first else (A, B)
    if len(layer.order) == 1:
        cores = [torch.einsum("gadfr->grfda", first * second)]
    else:
        cores = [torch.einsum("gadfr->grfda", first), torch.einsum("gbefr->fegrb", second)]
        if not W.any():  # as a residual branch begins: two zero cores would never learn
            getattr(layer, layer.order[1]).zero_()
            return
        # the same size relative to their initial scale, as learning rates assume
        sizes = [core.square().mean().sqrt() / layer.init_std(name) for core, name in zip(cores, layer.order)]
        ratio = (sizes[1] / sizes[0]).sqrt()
        cores = [cores[0] * ratio, cores[1] / ratio]
    for name, core in zip(layer.order, cores):
        parameter = getattr(layer, name)
        parameter.copy_(core.reshape(parameter.shape))


def projections(model: GPT) -> dict[str, Structured]:
    """{name: projection} of all blocks."""
    return {name: module for name, module in model.blocks.named_modules(prefix="blocks")
            if isinstance(module, Structured)}


def project(dense: GPT, moments) -> tuple[GPT, list[list]]:
    """The projected model, and rows of the table: name, sizes, relative errors, parameters, FLOPs.

    moments: a function from the names of projections to their inputs' second moments, {} without. Raises
    ValueError where the structure does not fit the widths.
    """
    config = dataclasses.replace(dense.config, struct=struct, rank=rank, theta=theta, layers=layers,
                                 head_aligned=head_aligned, weight_norm=False, cheapest_sizes=False,
                                 dyad_blocks=dyad_blocks, dyad_variant=dyad_variant)
    torch.manual_seed(seed)
    model = GPT(config)
    found = projections(model)  # those that stay dense too: a dense layer may have had a weight norm
    own = {f"{name}.{core}" for name, layer in found.items() for core in layer.fans()}
    source = dense.state_dict()
    model.load_state_dict({name: weight if name in own else source[name]
                           for name, weight in model.state_dict().items()})
    targets = [name for name in found if layers == "all" or f".{layers}." in name]
    weights, rows = moments(targets), []
    for name, layer in found.items():
        W, C = dense.get_submodule(name).to_dense().detach(), weights.get(input_name(name))
        fill(layer, W, C)
        if name not in targets:
            continue
        M = layer.to_dense().detach()
        errors = [relative_error(W, M)] + [relative_error(W, M, C)] * (C is not None)
        params = sum(getattr(layer, core).numel() for core in layer.fans())
        rows.append([name.removeprefix("blocks."), layer.describe_sizes(), errors, params, W.numel(),
                     layer.flops_per_token()])
    return model.eval(), rows


def show_table(rows: list[list]) -> str:
    """The rows of project() as a markdown table, with a last row of sums."""
    weighted = len(rows[0][2]) > 1
    head = ["projection", "sizes", "relative error", *["weighted error"] * weighted, "parameters", "of dense",
            "FLOPs/token", "of dense"]
    sums = [sum(row[i] for row in rows) for i in (3, 4, 5)]
    lines = []
    for name, sizes, errors, params, dense, flops in [*rows, ["all", "", [], *sums]]:
        errors = [f"{error:.6f}" for error in errors] or [""] * (1 + weighted)
        lines.append([name, sizes, *errors, f"{params:,}", f"{params / dense:.3f}", f"{flops:,}",
                      f"{flops / (2 * dense):.3f}"])
    return markdown_table(head, lines)

# ---- The result, and its fine-tuning -----------------------------------------------------------------------

def contents(checkpoint: dict, model: GPT, config: dict) -> dict:
    """A checkpoint for starting from its weights: no optimizer, and no iteration."""
    return dict(model=model.state_dict(), optimizer={}, scaler={}, config=config,
                model_args=dataclasses.asdict(model.config), tokenizer=checkpoint["tokenizer"],
                val_loss=None, **dataclasses.asdict(Progress()))


def finetune_flags(config: dict, path: str, out: str) -> list[str]:
    """train.py's arguments for a run of finetune_iters, or 1,000, from the checkpoint at path: the
    checkpoint's settings, as far as they are not the defaults, and a schedule of its own."""
    iters = finetune_iters or 1000
    peak = learning_rate or config["learning_rate"] / 3
    here = ("backend", "device", "dtype", "compile", "kernel", "wandb_log", "checkpoint_interval")
    values = {key: value for key, value in config.items() if key not in here} | dict(
        out_dir=out, init_from=path, max_iters=iters, learning_rate=peak, min_lr=None, lr_decay_iters=None,
        warmup_iters=iters // 10, eval_interval=iters)
    values |= {key: value for key, value in (("dataset", dataset), ("device", device)) if value}
    if eval_tokens:
        values["eval_tokens"] = eval_tokens
    keys = read_keys(os.path.join(HERE, "train.py"))
    return [flag_of(key, value) for key, value in values.items()
            if key in keys and value != keys[key].default]


def finetune(flags: list[str], out: str) -> float | None:
    """The last validation loss of train.py with these arguments. Raises ValueError if it fails."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()    # train.py may need all of the GPU
    if subprocess.run([sys.executable, os.path.join(HERE, "train.py"), *flags]).returncode:
        raise ValueError("the fine-tuning run has failed: see above; the projected checkpoint is whole")
    return [point["val_loss"] for point in read_log(out) if point["type"] == "eval"][-1]


def check_absent(path: str) -> None:
    if os.path.exists(path):
        raise ValueError(f"{path} exists: give another --out_dir, or remove it")


def run(place: str) -> None:
    """Projects the checkpoint at place, and prints and writes the result. Raises ValueError or OSError where
    it cannot."""
    path, checkpoint, dense = read_dense(place)
    out = out_dir or f"{os.path.dirname(path) or 'out'}-{struct}"
    new = os.path.join(out, "ckpt.pt")
    check_absent(new)
    where, device_type = choose_device(device)
    amp = autocast(device_type, "float32")
    batches = open_batches(checkpoint, dense, where) if eval_tokens or calibration_tokens else None
    model, rows = project(dense, lambda names: second_moments(dense, names, batches)
                          if calibration_tokens else {})
    before, after = (loss_of(m, batches, amp) for m in (dense, model))
    keys = read_keys(os.path.join(HERE, "train.py"))
    changed = {key: value for key, value in dataclasses.asdict(model.config).items() if key in keys}
    config = checkpoint["config"] | changed
    lock_out_dir(out)
    check_absent(new)  # another one may have made it in the meantime
    save_checkpoint(new, contents(checkpoint, model, config), None)
    print(show_table(rows))
    print(f"\nparameters of the whole model: {dense.num_params():,} before, {model.num_params():,} after\n"
          f"forward FLOPs per token: {dense.flops_per_token():,} before, {model.flops_per_token():,} after")
    if eval_tokens:
        print(f"validation loss, nats per token: {before:.4f} before, {after:.4f} after projection")
    flags = finetune_flags(config, new, f"{out}-finetuned")
    print(f"{new} is written; sample from it: python sample.py --out_dir={shlex.quote(out)}\n"
          f"fine-tune it: python train.py {shlex.join(flags)}", flush=True)
    if finetune_iters:
        loss = finetune(flags, f"{out}-finetuned")
        print(f"validation loss, nats per token: {loss:.4f} after {finetune_iters:,} iterations of "
              "fine-tuning")


def main(arguments: list[str]) -> None:
    places = [argument for argument in arguments if not argument.startswith("-")]
    globals().update(configure(globals(), [flag for flag in arguments if flag not in places]))
    if len(places) != 1:
        fail("project needs one checkpoint: python -m tools.project out-dense --struct=btt")
    try:
        run(places[0])
    except (ValueError, OSError) as e:
        fail(str(e))


if __name__ == "__main__":
    prepare_output()
    main(sys.argv[1:])
