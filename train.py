"""Train a GPT of structured matrices, on one device or many.

    python train.py config/btt_moe.py config/quickstart.py                      one process: a GPU, or the CPU
    torchrun --nproc_per_node=8 train.py config/btt_moe.py                      eight GPUs of one node
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py config/btt_moe.py
                                                                                two nodes: the same on both
    python train.py config/btt_moe.py --init_from=resume                        go on where a run ended

Config files and --key=value override the keys below, from left to right; --help lists them.
"""
import configurator

# I/O
out_dir: str | None = None      # where ckpt.pt, ckpt_best.pt and log.jsonl go; None: out-<names of the config files>
init_from: str = "scratch"      # 'scratch', or 'resume' from out_dir/ckpt.pt
eval_interval: int = 2000       # iterations between evaluations; each writes a checkpoint
eval_iters: int = 200           # batches of batch_size in an evaluation
log_interval: int = 10          # iterations between log lines
sample_tokens: int = 256        # tokens of the sample that is printed at the end; 0 for none
# wandb
wandb_log: bool = False         # send the numbers of log.jsonl to wandb too
wandb_project: str = "structured-gpt"  # wandb project
wandb_run_name: str = "gpt"     # wandb run name
# data
dataset: str = "openwebtext"    # a folder under data/, or the path of one
gradient_accumulation_steps: int = 40  # micro-batches per iteration, over all processes
batch_size: int = 12            # sequences per micro-batch
block_size: int = 1024          # tokens per sequence
# model
n_layer: int = 12               # blocks
n_head: int = 12                # attention heads
n_embd: int = 768               # width
dropout: float = 0.0            # for pretraining 0 is good
bias: bool = False              # biases in projections and layer norms
struct: str = "dense"           # dense, low_rank, kronecker, monarch, tt, btt, einsum or dyad
rank: int | None = None         # inner rank; None: the structure's own, 1 for experts
theta: tuple | None = None      # seven exponents (alpha beta gamma delta epsilon phi rho) for struct 'einsum'
layers: str = "all"             # which projections are structured: 'all', 'attn' or 'mlp'
num_experts: int = 0            # experts inside every structured projection; 0: no experts
top_k: int = 2                  # experts per token
ffn_experts: int = 0            # standard MoE: experts that are whole MLPs; 0: none
aux_loss_weight: float = 0.01   # weight of the routers' load-balance and z losses
router_balance_rate: float = 0.1  # how fast biases on the choice of experts follow their load; 0: no biases
weight_norm: bool | None = None  # normalize the cores; None: for every structure but dense
qk_norm: bool = True            # layer norm of queries and keys, per head
head_aligned: bool | None = None  # φ of q, k, v and γ of the output projection run over heads; None: monarch, btt
dyad_blocks: int = 4            # blocks of struct 'dyad'
dyad_variant: str = "it"        # 'it', 'ot' or 'dt'
# AdamW; the learning rate is µP's: that of a dense layer of width mup_base_width
learning_rate: float = 3e-3     # peak learning rate
mup_base_width: int = 128       # d0: a core learns at learning_rate · d0 / (cores · fan_in), a shared one faster
mup: bool = True                # False: every parameter learns at learning_rate, for comparison
max_iters: int = 600000         # iterations
weight_decay: float = 0.1       # every matrix shrinks by learning_rate · weight_decay an iteration
beta1: float = 0.9              # decay of the first moment
beta2: float = 0.95             # decay of the second moment
grad_clip: float = 1.0          # clip the gradient's norm at this value; 0: do not
decay_lr: bool = True           # cosine decay after the warmup; False: constant
warmup_iters: int = 2000        # iterations of linear warmup
lr_decay_iters: int | None = None  # iteration at which min_lr is reached; None: max_iters
min_lr: float | None = None     # last learning rate; None: a tenth of learning_rate
# system
seed: int = 1337                # of initialization, data order and dropout
backend: str | None = None      # of torch.distributed; None: nccl on GPUs, gloo elsewhere
device: str | None = None       # 'cuda', 'cuda:1', 'mps', 'cpu'; None: the best there is
dtype: str | None = None        # 'float32', 'bfloat16', 'float16'; None: bfloat16 where the GPU has it, else float32
compile: bool | None = None     # torch.compile the model; None: on GPUs
config = configurator.configure(globals())
globals().update(config)

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import kernels
import tokenizer
from configurator import fail
from data.common import open_dataset
from model import GPT, GPTConfig

HERE = os.path.dirname(os.path.abspath(__file__))

# ---- What a user can get wrong, before anything is written ----------------------------------------------------------

for key in ("eval_interval", "eval_iters", "log_interval", "gradient_accumulation_steps", "batch_size", "mup_base_width"):
    if config[key] < 1:
        fail(f"{key} must be at least 1; got {config[key]}")
for key in ("max_iters", "warmup_iters", "sample_tokens", "learning_rate", "weight_decay", "grad_clip",
            "aux_loss_weight", "router_balance_rate", "seed"):
    if config[key] < 0:
        fail(f"{key} must not be negative; got {config[key]}")
for key in ("beta1", "beta2"):
    if not 0 <= config[key] < 1:
        fail(f"{key} must be in [0, 1); got {config[key]}")
if init_from not in ("scratch", "resume"):
    fail(f"init_from must be 'scratch' or 'resume'; got {init_from!r}")
if dtype not in (None, "float32", "bfloat16", "float16"):
    fail(f"dtype must be float32, bfloat16 or float16; got {dtype!r}")
if out_dir is None:
    files = [os.path.splitext(os.path.basename(a))[0] for a in sys.argv[1:] if not a.startswith("-")]
    out_dir = "-".join(["out", *files])
lr_decay_iters = max_iters if lr_decay_iters is None else lr_decay_iters
min_lr = learning_rate / 10 if min_lr is None else min_lr

# ---- Processes and devices ------------------------------------------------------------------------------------------

rank_id, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
local_rank = int(os.environ.get("LOCAL_RANK", 0))
ddp, master = world_size > 1, rank_id == 0
if gradient_accumulation_steps % world_size:
    fail(f"gradient_accumulation_steps = {gradient_accumulation_steps} must be a multiple of the {world_size} processes "
         "that share it")

if device is None:
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
if ddp and device == "cuda":
    device = f"cuda:{local_rank}"
try:
    device_type = torch.device(device).type
    torch.empty(1, device=device)
except (RuntimeError, AssertionError) as e:
    fail(f"device {device!r} cannot be used here: {str(e).splitlines()[0]}")
if device_type == "cuda":
    torch.cuda.set_device(device)
elif device_type == "cpu":
    kernels.keep_freed_memory()
if dtype is None:
    dtype = "bfloat16" if device_type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
if compile is None:
    compile = device_type == "cuda"
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.cudnn.fp32_precision = "tf32"
autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast(device_type, getattr(torch, dtype))
if ddp:
    dist.init_process_group(backend or ("nccl" if device_type == "cuda" else "gloo"))


def say(*message) -> None:
    """Print, once for all processes."""
    if master:
        print(*message, flush=True)


def mean_over_processes(x: torch.Tensor) -> torch.Tensor:
    if ddp:
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
        x /= world_size
    return x


# ---- Data: which tokens an iteration sees depends on seed, iteration and place in the global batch alone ------------

def load_dataset() -> tuple[dict, dict]:
    """(meta.json, {split: token ids on disk}); whatever is wrong with the dataset ends in one sentence."""
    folder = dataset if os.path.isdir(dataset) else os.path.join(HERE, "data", dataset)
    if not os.path.isdir(folder):
        fail(f"there is no dataset {dataset!r}: give a path, or the name of a folder under data/ (made by data/*/prepare.py)")
    try:
        meta, splits = open_dataset(folder)
    except ValueError as e:
        fail(str(e))
    for split, tokens in splits.items():
        if len(tokens) <= block_size:
            fail(f"{split}.bin of {folder} holds {len(tokens)} tokens, too few for block_size = {block_size}")
    return meta, splits


def to_device(data: np.ndarray, starts) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, (len(starts), block_size) each: the windows of data at these places."""
    windows = torch.from_numpy(np.stack([data[s:s + block_size + 1] for s in starts]).astype(np.int64))
    if windows.max() >= vocab_size:
        fail(f"dataset {dataset!r} holds the token id {windows.max()}, but its vocabulary ends at {vocab_size - 1}")
    if device_type == "cuda":
        windows = windows.pin_memory().to(device, non_blocking=True)
    else:
        windows = windows.to(device)
    return windows[:, :-1], windows[:, 1:]


def train_batch(iteration: int, first: int, last: int):
    """The sequences from first to last, without it, of an iteration's global batch."""
    words = np.random.Philox(key=seed, counter=[0, 0, 0, iteration]).random_raw(gradient_accumulation_steps * batch_size)
    starts = words % np.uint64(len(splits["train"]) - block_size)
    return to_device(splits["train"], starts[first:last].tolist())


def val_batch(i: int):
    """The i-th of eval_iters batches: windows spread evenly over the validation tokens."""
    last, count = len(splits["val"]) - block_size - 1, eval_iters * batch_size
    return to_device(splits["val"], [j * last // max(1, count - 1) for j in range(i * batch_size, (i + 1) * batch_size)])


meta, splits = load_dataset()
vocab_size = meta["vocab_size"]
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size

# ---- Model and optimizer --------------------------------------------------------------------------------------------

ckpt_path = os.path.join(out_dir, "ckpt.pt")
model_args = {f.name: vocab_size if f.name == "vocab_size" else config[f.name] for f in dataclasses.fields(GPTConfig)}
torch.manual_seed(seed)  # every process starts from the same weights
try:
    raw_model = GPT(GPTConfig(**model_args)).to(device)
except ValueError as e:
    fail(str(e))
optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type,
                                           mup_base_width if mup else None)
routers = (len(raw_model.routers()), num_experts or ffn_experts)  # (R, E)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
iteration, tokens_seen, flops_spent, best_val_loss = 0, 0, 0.0, math.inf


def load_checkpoint(path: str) -> dict:
    """The contents of a checkpoint, mapped from the file rather than read into memory."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key in ("model", "optimizer", "scaler", "model_args", "config", "iteration", "tokens", "flops", "best_val_loss"):
            checkpoint[key]
    except FileNotFoundError:
        fail(f"there is no checkpoint {path} to resume from: use --init_from=scratch, or another --out_dir")
    except Exception as e:
        fail(f"{path} is not a checkpoint that can be read ({type(e).__name__}): remove it, or resume from ckpt_best.pt")
    differing = {k: (v, model_args.get(k)) for k, v in checkpoint["model_args"].items() if v != model_args.get(k)}
    if differing:
        fail(f"{path} holds another model: " + ", ".join(f"{k} = {a!r} there and {b!r} here"
                                                         for k, (a, b) in differing.items()))
    for key in ("mup", "mup_base_width"):
        before = checkpoint["config"].get(key, config[key])
        if before != config[key]:
            fail(f"{path} was trained with {key} = {before}, and this run has {config[key]}: a resumed run keeps the "
                 "learning-rate factors of its parameters")
    return checkpoint


def save_checkpoint(best: bool) -> None:
    """Write all that a run needs to go on, beside the old checkpoint and then in its place; link the best one too."""
    contents = dict(model=raw_model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                    model_args=model_args, config=config, tokenizer=meta["tokenizer"], iteration=iteration,
                    tokens=tokens_seen, flops=flops_spent, best_val_loss=best_val_loss, seed=seed)
    with open(ckpt_path + ".tmp", "wb") as f:
        torch.save(contents, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(ckpt_path + ".tmp", ckpt_path)
    if best:
        beside = os.path.join(out_dir, "ckpt_best.pt")
        try:
            with contextlib.suppress(FileNotFoundError):
                os.remove(beside + ".tmp")
            os.link(ckpt_path, beside + ".tmp")  # the same bytes twice, without writing them twice
        except OSError:
            shutil.copyfile(ckpt_path, beside + ".tmp")
        os.replace(beside + ".tmp", beside)


if init_from == "resume":
    checkpoint = load_checkpoint(ckpt_path)
    hyperparameters = [dict(betas=g["betas"], weight_decay=g["weight_decay"]) for g in optimizer.param_groups]
    raw_model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    iteration, best_val_loss = checkpoint["iteration"], checkpoint["best_val_loss"]
    tokens_seen, flops_spent = checkpoint["tokens"], checkpoint["flops"]
    for group, values in zip(optimizer.param_groups, hyperparameters):
        group.update(values)  # those of this run, not of the checkpoint
    del checkpoint
    say(f"resuming {out_dir} at iteration {iteration}")

model = torch.compile(raw_model) if compile else raw_model
if ddp:
    model = DistributedDataParallel(model, device_ids=[local_rank] if device_type == "cuda" else None,
                                    gradient_as_bucket_view=True, broadcast_buffers=False)  # they are the same

# ---- Speed: FLOPs of a token against the peak of the devices --------------------------------------------------------

# dense bfloat16 and float16 FLOP/s from the makers' data sheets; the first that is a word of the device's name counts
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L40": 181e12, "L4": 121e12, "A40": 150e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12}


def peak_flops() -> tuple[float, str]:
    """(FLOP/s of all devices together, where the figure comes from): a table, else a large product timed here."""
    if device_type == "cuda" and dtype != "float32":
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return flops * world_size, f"{name}'s data sheet"
    n = 1024 if device_type == "cpu" else 4096
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(times) * world_size, f"a {n} x {n} product timed at the start"


peak, peak_source = peak_flops()
flops_per_token = 3 * raw_model.flops_per_token()  # forward, and twice as much backward
say(f"model: {raw_model.num_params():,} parameters, {raw_model.num_params(active=True):,} active, "
    f"{raw_model.flops_per_token():,} forward FLOPs per token, vocabulary {vocab_size}")
for line in raw_model.describe():
    say("  " + line)
say(f"data: {dataset}, {len(splits['train']):,} training and {len(splits['val']):,} validation tokens, "
    f"{tokens_per_iter:,} tokens per iteration")
say(f"device: {device} x {world_size}, {dtype}, {'compiled' if compile else 'eager'}, utilization is of "
    f"{peak / 1e12:.3g} TFLOP/s ({peak_source})")

# ---- Log ------------------------------------------------------------------------------------------------------------

log_path = os.path.join(out_dir, "log.jsonl")


def open_log():
    """log.jsonl, empty, or as it was when the checkpoint was written: later points are about to be made again."""
    kept = []
    if init_from == "resume" and os.path.exists(log_path):
        with open(log_path, encoding="utf-8") as f:
            for line in f:
                with contextlib.suppress(ValueError):  # a half line of a killed run
                    if json.loads(line).get("iter", -1) < iteration:
                        kept.append(line.rstrip("\n") + "\n")
    with open(log_path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(kept)
    os.replace(log_path + ".tmp", log_path)
    return open(log_path, "a", encoding="utf-8")


def log(**point) -> None:
    """One line of log.jsonl, and the same to wandb."""
    if master:
        log_file.write(json.dumps(point) + "\n")
        log_file.flush()
        if wandb_run is not None and "iter" in point:
            wandb_run.log(point, step=point["iter"])


def start_wandb():
    """The wandb run, or None: training does not depend on it."""
    if not (wandb_log and master):
        return None
    try:
        import wandb
        return wandb.init(project=wandb_project, name=wandb_run_name, config=config)
    except Exception as e:
        say(f"wandb is off: {type(e).__name__}: {e}")
        return None


if master:
    try:
        os.makedirs(out_dir, exist_ok=True)
        log_file = open_log()
    except OSError as e:
        fail(f"out_dir {out_dir} cannot be written: {e.strerror}")
wandb_run = start_wandb()
log(type="run", config=config, model_args=model_args, torch=torch.__version__, python=sys.version.split()[0],
    device=torch.cuda.get_device_name(device) if device_type == "cuda" else device_type, processes=world_size,
    dtype=dtype, compile=compile, params=raw_model.num_params(), active_params=raw_model.num_params(active=True),
    flops_per_token=flops_per_token, flops_per_token_without_output_layer=3 * raw_model.flops_per_token(False),
    tokens_per_iter=tokens_per_iter, routers=list(raw_model.routers()), peak_flops=peak, peak_flops_from=peak_source)

# ---- Training -------------------------------------------------------------------------------------------------------

def learning_rate_at(it: int) -> float:
    """Linear warmup, then a cosine down to min_lr, or the constant learning_rate."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    done = min(1.0, (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)


@torch.no_grad()
def evaluate() -> tuple[float, torch.Tensor]:
    """(validation cross-entropy in nats per token, load (R, E) of each router's experts), shared by all processes."""
    model.eval()
    total, load = torch.zeros((), device=device), torch.zeros(routers, device=device)
    for i in range(rank_id, eval_iters, world_size):
        X, Y = val_batch(i)
        with autocast:
            _, loss, aux = (model.module if ddp else model)(X, Y, return_aux=True)
        total += loss
        load += aux.load
    model.train()
    if ddp:
        dist.all_reduce(total)
        dist.all_reduce(load)
    return total.item() / eval_iters, load / eval_iters


@torch.no_grad()
def balance_routers(passes: int = 40, sequences: int = max(1, 8192 // block_size)) -> None:
    """Brings the routers of a new model into balance: steps of falling size, each by the load of a few training batches.

    Every process does the same, whatever their number and the size of a micro-batch.
    """
    raw_model.eval()
    for i in range(passes * bool(routers[0]) * bool(router_balance_rate)):
        load, variance, count = 0, 0, min(sequences, gradient_accumulation_steps * batch_size)
        for first in range(0, count, batch_size):
            last = min(first + batch_size, count)
            with autocast:
                *_, aux = raw_model(*train_batch(i, first, last), return_aux=True)
            load += aux.load * (last - first) / count
            variance += aux.variance * (last - first) / count
        raw_model.rebalance(load, variance, 1 / (1 + i / 5))
    raw_model.train()


def seed_dropout() -> None:
    """Dropout, too, is a function of seed, iteration and process, so that a resumed run repeats it."""
    torch.manual_seed(int(np.random.SeedSequence((seed, iteration, rank_id)).generate_state(1, np.uint64)[0] >> 1))


def train_step() -> tuple[torch.Tensor, torch.Tensor]:
    """One iteration; (cross-entropy, gradient norm) of the global batch's share of this process."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(iteration) * group["lr_multiplier"]
    seed_dropout()
    steps = gradient_accumulation_steps // world_size
    total, balance = torch.zeros((), device=device), 0
    for step in range(steps):
        first = (step * world_size + rank_id) * batch_size
        X, Y = train_batch(iteration, first, first + batch_size)
        last = step == steps - 1
        with model.no_sync() if ddp and not last else contextlib.nullcontext():  # gradients meet once, at the last
            with autocast:
                _, loss, aux = model(X, Y, return_aux=True)
            scaler.scale((loss + aux_loss_weight * aux.loss) / steps).backward()
        total += loss.detach() / steps
        balance += torch.cat([aux.load, aux.variance[:, None]], dim=1) / steps
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if routers[0] and router_balance_rate:
        balance = mean_over_processes(balance)
        raw_model.rebalance(balance[:, :-1], balance[:, -1], router_balance_rate)
    return total, norm


def describe_load(load: torch.Tensor, entropy: torch.Tensor) -> list[str]:
    """A line for each block: the experts' loads at its routers, from load (R, E) and entropy (R,)."""
    blocks: dict[str, list] = {}
    for name, l, h in zip(raw_model.routers(), load * load.shape[1], entropy):
        _, block, *_, part = name.split(".")
        blocks.setdefault(block, []).append(f"{part} {l.min():.2f} to {l.max():.2f}, {h / math.log(len(l)):.1%}")
    return [f"block {block}: load ÷ mean, entropy of its most: " + "; ".join(parts) for block, parts in blocks.items()]


def clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def report(loss: float, norm: float, seconds: float, its: int) -> None:
    """A line on the screen and one in the log for the iterations since the last report."""
    rate = its * tokens_per_iter / seconds  # tokens/s
    utilization = rate * flops_per_token / peak
    say(f"iter {iteration:6d} | loss {loss:.4f} | {seconds / its * 1e3:.1f} ms | {rate:,.0f} tokens/s | "
        f"utilization {utilization:.1%} | left {clock((max_iters - iteration) * seconds / its)}")
    log(type="train", iter=iteration, tokens=tokens_seen, flops=flops_spent, loss=loss, grad_norm=norm,
        lr=learning_rate_at(iteration), ms_per_iter=seconds / its * 1e3, tokens_per_s=rate, utilization=utilization)


if init_from == "scratch":
    balance_routers()
training_started = last_report = time.perf_counter()
its_since_report = 0
while True:
    if iteration % eval_interval == 0 or iteration >= max_iters:
        started = time.perf_counter()
        val_loss, load = evaluate()
        best = val_loss < best_val_loss
        best_val_loss = min(best_val_loss, val_loss)
        say(f"eval {iteration:6d} | val loss {val_loss:.4f}")
        entropy = torch.special.entr(load).sum(1)  # (R,) nats
        for line in describe_load(load, entropy):
            say("  " + line)
        log(type="eval", iter=iteration, tokens=tokens_seen, flops=flops_spent, val_loss=val_loss,
            best_val_loss=best_val_loss, router_load=load.tolist(), router_entropy=entropy.tolist(),
            router_max_load=[max(l) * len(l) for l in load.tolist()], seconds=time.perf_counter() - training_started)
        if master:
            save_checkpoint(best)
        if ddp:
            dist.barrier()
        last_report += time.perf_counter() - started  # what an iteration takes does not include evaluations
    if iteration >= max_iters:
        break
    loss, norm = train_step()
    tokens_seen += tokens_per_iter
    flops_spent += float(tokens_per_iter * flops_per_token)
    its_since_report += 1
    if iteration % log_interval == 0:
        loss = mean_over_processes(loss).item()  # .item() waits for the device
        report(loss, norm.item(), time.perf_counter() - last_report, its_since_report)
        last_report, its_since_report = time.perf_counter(), 0
    iteration += 1

# ---- A sample, and how to get more ----------------------------------------------------------------------------------

def print_sample() -> None:
    raw_model.eval()
    tok = tokenizer.from_meta(meta)
    decode = tok.decoder()
    start = [getattr(tok, "end_of_text", 0)]
    with autocast:
        for token in raw_model.stream(torch.tensor([start], device=device), sample_tokens, temperature=0.8):
            print(decode(token.item()), end="", flush=True)
    print()


say(f"done: {iteration} iterations, {tokens_seen:,} tokens, {flops_spent:.3g} FLOPs, "
    f"{clock(time.perf_counter() - training_started)}, best val loss {best_val_loss:.4f}")
if master and sample_tokens:
    say(f"---- a sample of {sample_tokens} tokens")
    torch.manual_seed(seed)
    try:
        print_sample()
    except OSError as e:
        say(f"no sample: {e}")
    say("----")
say(f"sample more: python sample.py --out_dir={out_dir}")
if wandb_run is not None:
    wandb_run.finish()
if ddp:
    dist.destroy_process_group()
