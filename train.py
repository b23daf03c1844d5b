"""Train a GPT of structured matrices, on one device or many.

    python train.py config/btt_moe.py config/quickstart.py      one process: a GPU, or the CPU
    torchrun --nproc_per_node=8 train.py config/btt_moe.py      eight GPUs of one node
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 \\
        train.py config/btt_moe.py                              two nodes of four: the same command on both
    python train.py config/btt_moe.py --init_from=resume        continue a run
    torchrun --max-restarts=3 train.py config/btt_moe.py        continue by itself when a process dies

Config files and --key=value override the keys below, from left to right; --help lists them.
"""
from typing import Literal

from configurator import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, UnitFloat, configure, fail
from lib.terminal import prepare_output

# I/O
out_dir: str | None = None              # for checkpoints and log.jsonl; None: out-<names of the config files>
init_from: str = "scratch"              # scratch, resume, auto (resume if it can), *.pt, gpt2, GPT-2's folder
eval_interval: PositiveInt = 2000       # iterations between evaluations; each writes a checkpoint
checkpoint_interval: PositiveInt = 500  # iterations between checkpoints, besides those of evaluations
eval_iters: PositiveInt = 200           # batches of batch_size in an evaluation, if eval_tokens is None
eval_tokens: PositiveInt | None = None  # tokens of an evaluation, whatever batch_size is
log_interval: PositiveInt = 10          # iterations between log lines; skipped iterations are reported then
sample_tokens: NonNegativeInt = 256     # tokens of the sample that is printed at the end; 0 for none
# wandb
wandb_log: bool = False                 # send the numbers of log.jsonl to wandb too
wandb_project: str = "structured-gpt"   # the project that the run is listed under
wandb_run_name: str = "gpt"             # its name there
# data
dataset: str = "openwebtext"            # a folder under data/, or the path of one
gradient_accumulation_steps: PositiveInt = 40  # micro-batches per iteration, over all processes
batch_size: PositiveInt = 12            # sequences per micro-batch
block_size: PositiveInt = 1024          # tokens per sequence
# model
n_layer: PositiveInt = 12               # blocks
n_head: PositiveInt = 12                # attention heads
n_embd: PositiveInt = 768               # width
dropout: UnitFloat = 0.0                # probability of dropout; 0 is good for pretraining
bias: bool = False                      # biases in projections and layer norms
struct: str = "dense"                   # dense, low_rank, kronecker, monarch, tt, btt, einsum or dyad
rank: PositiveInt | None = None         # ρ; None: d^θρ; with experts 1, but low_rank d / E, einsum d^θρ
theta: tuple | None = None              # exponents of alpha beta gamma delta epsilon phi rho, for 'einsum'
layers: Literal["all", "attn", "mlp"] = "all"  # which projections have the structure; others are dense
num_experts: NonNegativeInt = 0         # experts inside every structured projection; 0: no experts
top_k: PositiveInt = 2                  # experts that each token uses
ffn_experts: NonNegativeInt = 0         # standard MoE: experts that are whole MLPs; 0: none
aux_loss_weight: NonNegativeFloat = 0.01  # weight of (load-balance loss + 0.1 · z loss), mean over routers
router_balance_rate: NonNegativeFloat = 0.0  # step size of router biases that even out the load; 0: none
weight_norm: bool | None = None         # cap each core's rms at its init_std; None: for all but dense
qk_norm: bool = True                    # layer norm of queries and keys, per head
head_aligned: bool | None = None        # φ of q, k, v and γ of o = n_head; None: btt, at full rank
dyad_blocks: PositiveInt = 4            # of struct 'dyad': blocks of each of its two matrices
dyad_variant: Literal["it", "ot", "dt"] = "it"  # what it permutes: 'it' inputs, 'ot' outputs, 'dt' both
# AdamW with µP: learning_rate is that of a dense layer of width mup_base_width; others have a factor
learning_rate: NonNegativeFloat = 3e-3  # peak learning rate
mup_base_width: PositiveInt = 128       # d0: a dense layer of width d learns at learning_rate · d0 / d
mup: bool = True                        # False: one rate for all, as for GPT-2's weights; init, scales stay
max_iters: NonNegativeInt = 600000      # iterations
weight_decay: NonNegativeFloat = 0.1    # each iteration multiplies every matrix by 1 - lr · weight_decay
beta1: UnitFloat = 0.9                  # decay of the first moment
beta2: UnitFloat = 0.95                 # decay of the second moment
grad_clip: NonNegativeFloat = 1.0       # clip the gradient's norm at this value; 0: do not
max_skipped: PositiveInt = 25           # stop after this many non-finite iterations in a row
decay_lr: bool = True                   # cosine decay after the warmup; False: constant
warmup_iters: NonNegativeInt = 2000     # iterations of linear warmup
lr_decay_iters: NonNegativeInt | None = None  # iteration at which min_lr is reached; None: max_iters
min_lr: NonNegativeFloat | None = None  # last learning rate; None: a tenth of learning_rate
# system
seed: Seed = 1337                       # of initialization, data order and dropout
backend: Literal["nccl", "gloo", "mpi", "ucc", "xccl", "cpu:gloo,cuda:nccl"] | None = None  # None: by device
device: str | None = None               # 'cuda', 'cuda:1', 'mps', 'cpu'; None: the best there is
dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: bfloat16 if a GPU has it
kernel: Literal["auto", "torch", "c", "triton"] = "auto"  # for einsums; auto: c on CPUs, else torch
compile: bool | None = None             # torch.compile the model; None: on GPUs
prepare_output(keep_going=True)  # training goes on when stdout fails: a closed terminal, a full disk
given = set()  # filled by configure(): the keys that the command line or a config file sets
config = configure(globals(), given=given)
globals().update(config)

# ---- Keys that depend on each other, checked before torch is loaded ----------------------------------------

import os
import sys

from lib.commands import STARTS, default_out_dir, next_commands

out_dir = default_out_dir(sys.argv[1:]) if out_dir is None else out_dir
if decay_lr and lr_decay_iters is not None and lr_decay_iters < warmup_iters:
    fail(f"lr_decay_iters = {lr_decay_iters} must not be less than warmup_iters = {warmup_iters}")
lr_decay_iters = max_iters if lr_decay_iters is None else lr_decay_iters
min_lr = learning_rate / 10 if min_lr is None else min_lr
if decay_lr and min_lr > learning_rate:
    fail(f"min_lr = {min_lr} must not exceed learning_rate = {learning_rate}, from which it decays")
sequences_per_iter = gradient_accumulation_steps * batch_size
if sequences_per_iter > 2 ** 20:  # every micro-step draws the starts of all of them
    fail(f"gradient_accumulation_steps · batch_size = {sequences_per_iter} is more than {2 ** 20} sequences")
if not out_dir.strip() or "\0" in out_dir or os.path.exists(out_dir) and not os.path.isdir(out_dir):
    fail(f"out_dir must be a folder, or a path where one can be made; got {out_dir!r}")
if init_from not in STARTS and not init_from.endswith(".pt") and not os.path.isdir(init_from):
    fail(f"init_from must be {', '.join(STARTS)}, a GPT-2's folder, or a checkpoint, *.pt; got {init_from!r}")

import contextlib
import dataclasses
import math
import secrets
import signal
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from data import tokenizer
from data.batches import Batches
from data.common import check_token_ids, open_dataset
from lib import distributed, gpt2, kernels
from lib.checkpoint import Checkpoints, Progress
from lib.device import (autocast, check_memory, choose_compile, choose_device, choose_dtype, device_name,
                        peak_flops, peak_memory, use_device)
from lib.evaluation import evaluate
from lib.log import Logger, format_duration, print0, validation_windows
from lib.signals import DeferredSignals
from lib.steps import FiniteSteps
from model import GPT, GPTConfig

# ---- Ranks and devices -------------------------------------------------------------------------------------

ddp_rank, ddp_local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
ddp_world_size, local_size = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
ddp, master = ddp_world_size > 1, ddp_rank == 0
signals = DeferredSignals()

def or_fail(function, *args):
    """function(*args) on every rank; a ValueError on one of them ends all with its message."""
    try:
        return distributed.on_all_ranks(function, *args)
    except ValueError as e:
        if ddp and not distributed.is_connected():  # the other ranks do not know of it
            sys.exit(f"error: rank {ddp_rank}: {e}")
        distributed.disconnect()
        fail(str(e))

if gradient_accumulation_steps % ddp_world_size:
    fail(f"gradient_accumulation_steps = {gradient_accumulation_steps} must be a multiple of the "
         f"{ddp_world_size} processes that share it")
device, device_type = or_fail(choose_device, device, ddp_local_rank if ddp else None)
use_device(device, tf32=True)
dtype = choose_dtype(dtype, device_type)
backend = backend or ("nccl" if device_type == "cuda" else "gloo")
amp = autocast(device_type, dtype)
or_fail(distributed.connect, backend)
masked = dict(out_dir=None, dataset=None, device=device_type, init_from=os.path.basename(init_from))
or_fail(distributed.require_same, config | masked | dict(dtype=dtype, torch=torch.__version__))  # not paths
or_fail(kernels.use_kernel, kernel, device_type, dtype)
compile = or_fail(choose_compile, compile, device)

# ---- Settings that come with the weights -------------------------------------------------------------------

checkpoints = Checkpoints(out_dir, first_of_node=ddp_local_rank == 0)
# what the initial weights (a checkpoint's or, below, GPT-2's) determine: fields of GPTConfig, mup's keys
start_settings = or_fail(checkpoints.start_settings, init_from, GPTConfig, config, given)
gpt2_folder = None if start_settings else or_fail(gpt2.find, init_from)
if gpt2_folder:
    start_settings = or_fail(gpt2.start_settings, gpt2_folder, config, given)
adopted = {key: value for key, value in start_settings.items() if config.get(key, value) != value}
globals().update(start_settings)  # n_embd, block_size ... are those of the weights from here on

# ---- Data --------------------------------------------------------------------------------------------------

meta, splits = or_fail(open_dataset, dataset)  # splits: {name: token ids, read from the disk}
vocab_size = meta["vocab_size"]
tokens_per_iter = sequences_per_iter * block_size
settings = config | start_settings | dict(vocab_size=vocab_size)  # with fields that have no key
batches = or_fail(lambda: Batches(
    splits, block_size=block_size, batch_size=batch_size, seed=seed, sequences=sequences_per_iter,
    val_windows=validation_windows(settings), device=device))
digests = dict(trained_on=batches.train_digest(), measured_on=batches.val_digest())
or_fail(distributed.require_same, digests | dict(tokenizer=meta["tokenizer"]))
or_fail(check_token_ids, splits, vocab_size, ddp_local_rank % local_size, local_size)  # a share each

# ---- Model and optimizer -----------------------------------------------------------------------------------

fields = [f.name for f in dataclasses.fields(GPTConfig) if f.name in settings]
gpt_config = or_fail(lambda: GPTConfig(**{name: settings[name] for name in fields}))
model_args = dataclasses.asdict(gpt_config)
# from here on every key has the value that is used, logged and saved (rank, theta, eval_tokens may be None)
config = {key: model_args.get(key, globals()[key]) for key in config}

def make_model() -> GPT:
    """The model on its device, the same on every rank. Raises ValueError if it does not fit in memory."""
    try:
        check_memory(GPT.count_params(gpt_config), device_type)
        torch.manual_seed(seed)
        return GPT(gpt_config).to(device)
    except (RuntimeError, MemoryError, OverflowError) as e:
        raise ValueError(f"this model cannot be made here: {(str(e) or repr(e)).splitlines()[0]}") from None

raw_model = or_fail(make_model)
if gpt2_folder:
    or_fail(gpt2.load_weights, gpt2_folder, raw_model, meta["tokenizer"])
optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type,
                                           mup_base_width if mup else None)
finite_steps = FiniteSteps(optimizer)  # its step() sets the rates, and steps where loss and norm are finite
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
num_routers, experts_per_router = len(raw_model.routers()), num_experts or ffn_experts  # R, E

# ---- Checkpoints, torch.compile, DDP -----------------------------------------------------------------------

src_rank = or_fail(checkpoints.open, init_from)  # the rank that has the checkpoint; locks out_dir
progress = Progress(**digests) if src_rank is None else or_fail(
    checkpoints.load, src_rank, raw_model, optimizer, scaler, config, meta["tokenizer"], digests, device)
or_fail(checkpoints.rename_old)
model = local_model = torch.compile(raw_model, dynamic=False) if compile else raw_model
probe = raw_model   # what next_loss_is_finite() asks
if ddp:
    model = DistributedDataParallel(model, device_ids=[ddp_local_rank] if device_type == "cuda" else None,
                                    gradient_as_bucket_view=True,
                                    forward_sync_buffers=False)  # every rank changes its buffers alike

# ---- Log ---------------------------------------------------------------------------------------------------

peak, peak_source = peak_flops(device, dtype, ddp_world_size)  # None: unknown
train_flops_per_token = 3 * raw_model.flops_per_token()  # the backward costs twice the forward
print0(f"model: {raw_model.num_params():,} parameters, {raw_model.num_params(active=True):,} active, "
       f"{raw_model.flops_per_token():,} forward FLOPs per token, vocabulary {vocab_size}\n  "
       + "\n  ".join(raw_model.describe()))
print0(f"data: {dataset}, {len(splits['train']):,} training and {len(splits['val']):,} validation tokens, "
       f"{tokens_per_iter:,} tokens per iteration")
print0(f"device: {device} x {ddp_world_size}, {dtype}, {'compiled' if compile else 'eager'}, einsums by "
       f"{kernels.describe_body(device_type, dtype)}"
       + (f", utilization of {peak / 1e12:.3g} TFLOP/s ({peak_source})" if peak else ""))

eval_due = lambda i: i % eval_interval == 0 or i >= max_iters  # whether to evaluate before iteration i
drop_from = progress.iteration if checkpoints.resumes else -1  # log.jsonl loses points from here on; -1: all
logger = or_fail(Logger, out_dir, drop_from, master, eval_due(progress.iteration))
if wandb_log:
    progress.wandb_id = progress.wandb_id or secrets.token_hex(4)
    logger.start_wandb(project=wandb_project, name=wandb_run_name, config=config, id=progress.wandb_id,
                       resume="allow")
logger.log(type="run", config=config, model_args=model_args, **digests, torch=torch.__version__,
           python=sys.version.split()[0], device=device_name(device), processes=ddp_world_size, dtype=dtype,
           compile=compile, params=raw_model.num_params(), active_params=raw_model.num_params(active=True),
           flops_per_token=train_flops_per_token, tokens_per_iter=tokens_per_iter,
           flops_per_token_without_output_layer=3 * raw_model.flops_per_token(False),
           routers=list(raw_model.routers()), peak_flops=peak, peak_flops_from=peak_source)

# ---- Training ----------------------------------------------------------------------------------------------

def learning_rate_at(iteration: int, c: dict = config) -> float:
    """Linear warmup, then a constant or a cosine to min_lr; depends on iteration and settings c alone."""
    if iteration < c["warmup_iters"]:
        return c["learning_rate"] * (iteration + 1) / (c["warmup_iters"] + 1)
    if not c["decay_lr"]:
        return c["learning_rate"]
    done = min(1.0, (iteration - c["warmup_iters"]) / max(1, c["lr_decay_iters"] - c["warmup_iters"]))
    return c["min_lr"] + 0.5 * (1 + math.cos(math.pi * done)) * (c["learning_rate"] - c["min_lr"])


if 0 < max_iters < warmup_iters:
    print0(f"  the warmup does not end: warmup_iters = {warmup_iters} is more than max_iters = {max_iters}")
lr, lr_before = (learning_rate_at(progress.iteration, c) for c in (config, config | checkpoints.settings))
if not math.isclose(lr, lr_before):
    print0(f"  the learning rate jumps to {lr:.3g}; by the checkpoint's settings it would be {lr_before:.3g}")


def any_signal() -> int:
    """The number of a signal that any rank has received, or 0. A collective."""
    return int(distributed.all_reduce_max(signals.received))


def balance_routers() -> None:
    """Balances a new model's routers on 40 batches of at most 8,192 training tokens, equally on all ranks."""
    count = min(max(1, 8192 // block_size), sequences_per_iter)  # sequences of a step
    parts = [(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    with amp:
        raw_model.balance_routers((batches.train(i, *part) for part in parts) for i in range(40))
    distributed.broadcast_tensors(raw_model.buffers(), 0, device)  # GPUs of two kinds may round differently


def train_step() -> bool:
    """One iteration, without waiting for a GPU. If the loss or the gradient norm is not finite, weights,
    optimizer and routers' biases stay as they were. On a signal it returns False and changes nothing."""
    # dropout is a function of seed, iteration and rank, so that a resumed run repeats it
    state = np.random.SeedSequence((seed, progress.iteration, ddp_rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))  # 63 bits
    micro_steps = gradient_accumulation_steps // ddp_world_size
    mean_loss, router_stats = torch.zeros((), device=device), 0
    for micro_step in range(micro_steps):
        if micro_step and any_signal():
            optimizer.zero_grad(set_to_none=True)
            return False
        first = (micro_step * ddp_world_size + ddp_rank) * batch_size
        X, Y = batches.train(progress.iteration, first, first + batch_size)
        # gradients are reduced over the ranks once, at the last micro-step
        with model.no_sync() if ddp and micro_step < micro_steps - 1 else contextlib.nullcontext():
            with amp:
                _, loss, aux = model(X, Y, return_aux=True, return_logits=False)
            scaler.scale((loss + aux_loss_weight * aux.loss) / micro_steps).backward()
        mean_loss += loss.detach() / micro_steps
        router_stats += torch.cat([aux.load, aux.variance[:, None]], dim=1) / micro_steps  # (R, E + 1)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    progress.tokens += tokens_per_iter
    progress.flops += float(tokens_per_iter * train_flops_per_token)
    finite = finite_steps.step(distributed.all_reduce_mean(mean_loss), norm,
                               learning_rate_at(progress.iteration), dataclasses.replace(progress))  # a copy
    if num_routers and router_balance_rate:
        router_stats = distributed.all_reduce_mean(router_stats)  # load and variance in one
        raw_model.rebalance(router_stats[:, :-1], router_stats[:, -1], router_balance_rate * finite)
    scaler.update()  # float16: a smaller scale after gradients that are not finite
    optimizer.zero_grad(set_to_none=True)
    return True


@torch.no_grad()
def next_loss_is_finite() -> bool:
    """Whether every rank's next micro-batch has a finite loss."""
    raw_model.eval()
    with amp:
        X, Y = batches.train(progress.iteration, ddp_rank * batch_size, (ddp_rank + 1) * batch_size)
        _, loss, _ = probe(X, Y, return_aux=True, return_logits=False)
    raw_model.train()
    return not distributed.all_reduce_max(float(not math.isfinite(loss.item())))


def log_point(kind: str, at: Progress = progress, **values) -> None:
    """A point of the log. Tokens and FLOPs include iteration `iter` in 'train' and 'skip', not in 'eval'."""
    logger.log(type=kind, iter=at.iteration, tokens=at.tokens, flops=at.flops, **values)


def save_checkpoint(val_loss: float | None = None) -> None:
    """Writes all that a resume needs, unless the disk is full or the loss of these weights is not finite."""
    if not (next_loss_is_finite() if val_loss is None else math.isfinite(val_loss)):
        print0(f"no checkpoint of iteration {progress.iteration} is written: its loss is not finite")
    elif master:
        contents = dict(model=raw_model.state_dict(), optimizer=optimizer.state_dict(),
                        scaler=scaler.state_dict(), model_args=model_args, config=config,
                        tokenizer=meta["tokenizer"], **dataclasses.asdict(progress))
        checkpoints.save(contents, val_loss, logger)


def evaluate_and_save() -> None:
    """Evaluates, logs and saves; at a signal it stops without doing any of these."""
    global probe  # local_model's graph is there from here on, and needs less memory than eager
    if (result := evaluate(local_model, batches, (num_routers, experts_per_router), amp, any_signal)) is None:
        return
    probe, (val_loss, load) = local_model, result
    entropy = torch.special.entr(load).sum(1)  # (R,) nats
    if math.isfinite(val_loss):
        progress.best_val_loss = min(progress.best_val_loss, val_loss)
    print0(f"eval {progress.iteration:6d} | val loss {val_loss:.4f}")
    for line in raw_model.describe_load(load, entropy):
        print0("  " + line)
    log_point("eval", val_loss=val_loss, best_val_loss=progress.best_val_loss, router_load=load.tolist(),
              router_entropy=entropy.tolist(), router_max_load=[max(l) * len(l) for l in load.tolist()])
    save_checkpoint(val_loss)


def report(loss: float, norm: float, seconds: float, iterations: int) -> None:
    """Prints and logs the last iteration's loss and norm, and mean times since the last report."""
    rate = iterations * tokens_per_iter / seconds  # tokens/s
    utilization = rate * train_flops_per_token / peak if peak else None  # MFU
    left = format_duration((max_iters - progress.iteration - 1) * seconds / iterations)
    print0(f"iter {progress.iteration:6d} | loss {loss:.4f} | {seconds / iterations * 1e3:.1f} ms | "
           f"{rate:,.0f} tokens/s | {f'utilization {utilization:.1%} | ' if peak else ''}left {left}")
    log_point("train", loss=loss, grad_norm=norm, lr=learning_rate_at(progress.iteration), tokens_per_s=rate,
              ms_per_iter=seconds / iterations * 1e3, iterations=iterations, utilization=utilization,
              skipped=progress.skipped, peak_memory=peak_memory(device))


def read_results() -> None:
    """Waits for the iterations since the last call and counts them. Those that were skipped are logged; too
    many in a row end the run."""
    for at, loss, norm in finite_steps.read():
        if progress.count(math.isfinite(loss) and math.isfinite(norm)):
            continue
        print0(f"iter {at.iteration:6d} | skipped, not finite: loss {loss}, gradient norm {norm}")
        log_point("skip", at, loss=loss, grad_norm=norm, skipped=progress.skipped)
        if progress.skipped_in_a_row >= max_skipped:
            advice = distributed.broadcast(checkpoints.advice(), 0)  # rank 0 knows what it has saved
            logger.finish()
            distributed.disconnect()
            fail(f"the loss or the gradient was not finite in {progress.skipped_in_a_row} iterations in a "
                 f"row, up to {at.iteration}: try another --learning_rate, --grad_clip or --seed (for other "
                 f"data), or a --dtype with more range; {advice}")


if src_rank is None and num_routers and router_balance_rate:
    balance_routers()
signals.deferring = True
training_started = last_report = time.perf_counter()
iterations_since_report = 0
while True:
    evaluates = eval_due(progress.iteration)
    if evaluates or progress.iteration % checkpoint_interval == 0:
        read_results()
    paused_at = time.perf_counter()
    if evaluates:
        evaluate_and_save()
    elif progress.iteration % checkpoint_interval == 0:
        save_checkpoint()
    last_report += time.perf_counter() - paused_at  # the time of an iteration does not include these
    if any_signal() or progress.iteration >= max_iters or not train_step():  # all wait for rank 0's file here
        break
    iterations_since_report += 1
    if progress.iteration % log_interval == 0:
        read_results()
        if not progress.skipped_in_a_row:
            report(*finite_steps.last, time.perf_counter() - last_report, iterations_since_report)
            last_report, iterations_since_report = time.perf_counter(), 0
    progress.iteration += 1
stop_signal = any_signal()
read_results()
saved = distributed.all_reduce_max(float(checkpoints.saved_at == progress.iteration))
if stop_signal and not saved:
    save_checkpoint()
    distributed.all_reduce_max(0.0)  # a barrier: torchrun kills rank 0 soon after another rank has ended
signals.stop_deferring(handled=stop_signal)
if stop_signal:
    print0(f"stopped by {signal.Signals(stop_signal).name} at iteration {progress.iteration}: "
           f"{checkpoints.advice()}")
    logger.finish()
    distributed.disconnect()
    sys.exit(128 + stop_signal)

# ---- A sample, and how to get more -------------------------------------------------------------------------

print0(f"done: {progress.iteration} iterations, {progress.tokens:,} tokens, {progress.flops:.3g} FLOPs, best "
       f"val loss {progress.best_val_loss:.4f}, {format_duration(time.perf_counter() - training_started)}")
if master and sample_tokens:
    print0(f"---- a sample of {sample_tokens} tokens")
    raw_model.eval()
    torch.manual_seed(seed)
    try:
        tok = tokenizer.from_meta(meta)
        start = torch.tensor([[tok.start]], device=device)
        with amp:
            tokenizer.print_tokens(tok, raw_model.stream(start, sample_tokens, temperature=0.8))
    except (ImportError, OSError, RuntimeError, ValueError) as e:  # no vocabulary here; out of memory
        print0(f"no sample: {e}")
    print0("----")
print0(next_commands(sys.argv[1:], config, adopted, raw_model.flops_ratio_to_dense()))
logger.finish()
distributed.disconnect()
if master and checkpoints.saved_at != progress.iteration:
    fail(f"the run has ended at iteration {progress.iteration}, whose checkpoint is missing "
         f"({checkpoints.failure or 'the validation loss is not finite'}): {checkpoints.advice()}")
if logger.lines_waiting():
    fail(f"the run has ended well, but {logger.path} lacks its last lines, for which there was no room")
