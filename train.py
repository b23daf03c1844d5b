"""Train a GPT of structured matrices, on one device or many.

    python train.py config/btt_moe.py config/quickstart.py                      one process: a GPU, or the CPU
    torchrun --nproc_per_node=8 train.py config/btt_moe.py                      eight GPUs of one node
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py config/btt_moe.py
                                                                                two nodes of four: the same on both
    python train.py config/btt_moe.py --init_from=resume                        go on where a run ended
    torchrun --max-restarts=3 --nproc_per_node=8 train.py config/btt_moe.py --init_from=auto
                                                                                and go on by itself when a process dies

Config files and --key=value override the keys below, from left to right; --help lists them.
"""
import configurator

# I/O
out_dir: str | None = None      # where ckpt.pt, ckpt_best.pt and log.jsonl go; None: out-<names of the config files>
init_from: str = "scratch"      # 'scratch', 'resume' from out_dir/ckpt.pt, or 'auto': resume if it is there
eval_interval: int = 2000       # iterations between evaluations; each writes a checkpoint
checkpoint_interval: int = 500  # iterations between checkpoints, besides those of evaluations
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
rank: int | None = None         # inner rank; None: the structure's own, 1 for experts but einsum's
theta: tuple | None = None      # seven exponents (alpha beta gamma delta epsilon phi rho) for struct 'einsum'
layers: str = "all"             # which projections are structured: 'all', 'attn' or 'mlp'
num_experts: int = 0            # experts inside every structured projection; 0: no experts
top_k: int = 2                  # experts per token
ffn_experts: int = 0            # standard MoE: experts that are whole MLPs; 0: none
aux_loss_weight: float = 0.01   # weight of the routers' load-balance and z losses
router_balance_rate: float = 0.1  # how fast biases on the choice of experts follow their load; 0: no biases
weight_norm: bool | None = None  # normalize the cores; None: for every structure but dense
qk_norm: bool = True            # layer norm of queries and keys, per head
head_aligned: bool | None = None  # φ of q, k, v and γ of the output projection run over heads; None: monarch, btt without experts
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
max_skipped: int = 25           # end after so many iterations in a row whose loss or gradient is not finite
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
import math
import os
import secrets
import signal
import sys
import time

from configurator import fail

HERE = os.path.dirname(os.path.abspath(__file__))

# ---- What a user can get wrong, before anything is written and before torch is loaded -------------------------------

for key, value in config.items():
    if isinstance(value, (int, float)) and abs(value) >= (2 ** 63 if key == "seed" else 2 ** 31):
        fail(f"{key} is too large; got {value}")
for key in ("eval_interval", "checkpoint_interval", "eval_iters", "log_interval", "gradient_accumulation_steps", "batch_size",
            "block_size", "mup_base_width", "max_skipped"):
    if config[key] < 1:
        fail(f"{key} must be at least 1; got {config[key]}")
for key in ("max_iters", "warmup_iters", "lr_decay_iters", "sample_tokens", "learning_rate", "min_lr", "weight_decay",
            "grad_clip", "aux_loss_weight", "router_balance_rate", "seed"):
    if config[key] is not None and config[key] < 0:
        fail(f"{key} must not be negative; got {config[key]}")
for key in ("beta1", "beta2"):
    if not 0 <= config[key] < 1:
        fail(f"{key} must be in [0, 1); got {config[key]}")
for key, values in dict(init_from=("scratch", "resume", "auto"), dtype=(None, "float32", "bfloat16", "float16"),
                        backend=(None, "nccl", "gloo", "mpi", "ucc", "xccl", "cpu:gloo,cuda:nccl")).items():
    if config[key] not in values:
        fail(f"{key} must be one of {', '.join(map(str, values))}; got {config[key]!r}")
if gradient_accumulation_steps * batch_size > 2 ** 20:
    fail(f"gradient_accumulation_steps = {gradient_accumulation_steps} times batch_size = {batch_size} is more than the "
         f"{2 ** 20} sequences that an iteration may have")
if out_dir is None:
    files = [os.path.splitext(os.path.basename(a))[0] for a in sys.argv[1:] if not a.startswith("-")]
    out_dir = "-".join(["out", *files])
for key in ("out_dir", "dataset"):
    if not globals()[key].strip() or "\0" in globals()[key]:
        fail(f"{key} must be a path; got {globals()[key]!r}")
if os.path.exists(out_dir) and not os.path.isdir(out_dir):
    fail(f"out_dir {out_dir!r} is a file: give a folder, or a path where one can be made")
lr_decay_iters = max_iters if lr_decay_iters is None else lr_decay_iters
min_lr = learning_rate / 10 if min_lr is None else min_lr
if decay_lr and min_lr > learning_rate:
    fail(f"min_lr = {min_lr} must not exceed learning_rate = {learning_rate}, from which it decays")

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from lib import device as devices
from lib import kernels
from lib import distributed as processes
from lib import checkpoint as survive
from data import tokenizer
from data.common import largest_id, open_dataset
from model import GPT, GPTConfig

# ---- Processes and devices ------------------------------------------------------------------------------------------

signals = survive.Signals()  # until the first iteration they end the run at once, then after the iteration
rank_id, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
local_rank = int(os.environ.get("LOCAL_RANK", 0))
ddp, master = world_size > 1, rank_id == 0
if gradient_accumulation_steps % world_size:
    fail(f"gradient_accumulation_steps = {gradient_accumulation_steps} must be a multiple of the {world_size} processes "
         "that share it")

device, device_type, dtype = devices.choose(device, dtype, local_rank if ddp else None)
if device_type == "cuda":
    torch.cuda.set_device(device)
elif device_type == "cpu":
    kernels.keep_freed_memory()
if compile is None:
    compile = device_type == "cuda"
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.cudnn.fp32_precision = "tf32"
autocast = devices.autocast(device_type, dtype)
if ddp:
    processes.connect(backend, device_type)


def say(*message) -> None:
    """Print, once for all processes; a closed terminal or a full disk behind stdout is no reason to stop."""
    if master:
        with contextlib.suppress(OSError, ValueError):
            print(*message, flush=True)


# ---- Data: which tokens an iteration sees depends on seed, iteration and place in the global batch alone ------------

def load_dataset() -> tuple[dict, dict]:
    """(meta.json, {split: token ids on disk}); ValueError, one sentence, for whatever is wrong with the dataset."""
    folder = dataset if os.path.isdir(dataset) else os.path.join(HERE, "data", dataset)
    if not os.path.isdir(folder):
        raise ValueError(f"there is no dataset {dataset!r}: give a path, or the name of a folder under data/ (made by "
                         "data/*/prepare.py)")
    meta, splits = open_dataset(folder)
    for split, tokens in splits.items():
        if len(tokens) <= block_size:
            raise ValueError(f"{split}.bin of {folder} holds {len(tokens)} tokens, too few for block_size = {block_size}")
    return meta, splits


def check_ids() -> None:
    """Every id of both files is read, shared by the processes of a machine; ValueError for one beyond the vocabulary."""
    for split, tokens in splits.items():
        share = (local_rank, int(os.environ["LOCAL_WORLD_SIZE"])) if "LOCAL_WORLD_SIZE" in os.environ else (0, 1)
        largest = largest_id(tokens, *share)
        if largest >= vocab_size:
            raise ValueError(f"{split}.bin of dataset {dataset!r} holds the token id {largest}, but its vocabulary ends at "
                             f"{vocab_size - 1}: make it again with data/*/prepare.py")


def to_device(data: np.ndarray, starts) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, (len(starts), block_size) each: the windows of data at these places."""
    windows = torch.from_numpy(np.stack([data[s:s + block_size + 1] for s in starts]).astype(np.int64))
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


meta, splits = processes.together(load_dataset)
vocab_size = meta["vocab_size"]
processes.together(check_ids)
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size

# ---- Model and optimizer --------------------------------------------------------------------------------------------

ckpt_path, best_path, log_path = (os.path.join(out_dir, name) for name in ("ckpt.pt", "ckpt_best.pt", "log.jsonl"))
model_args = {f.name: vocab_size if f.name == "vocab_size" else config[f.name] for f in dataclasses.fields(GPTConfig)}


def make_model() -> GPT:
    """The model on its device, the same on every process; ValueError if its sizes do not fit each other or the memory."""
    try:
        with torch.device("meta"):  # shapes without memory
            one = GPT(GPTConfig(**model_args | {"n_layer": min(n_layer, 1)}))
        params = one.num_params() + (n_layer - 1) * sum(p.numel() for p in one.blocks[0].parameters())
        size = params * 4 * (4 if device_type == "cpu" else 1)  # float32 weights, on a CPU with gradients and two moments
        if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise ValueError(f"a model of {params:,} parameters needs {size / 1e9:,.0f} GB of memory, more than there is: "
                             "take a smaller n_embd or n_layer")
        torch.manual_seed(seed)
        return GPT(GPTConfig(**model_args)).to(device)
    except (RuntimeError, MemoryError, OverflowError) as e:
        raise ValueError(f"this model cannot be made here: {(str(e) or type(e).__name__).splitlines()[0]}") from None


raw_model = processes.together(make_model)
optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type,
                                           mup_base_width if mup else None)
routers = (len(raw_model.routers()), num_experts or ffn_experts)  # (R, E)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
iteration, tokens_seen, flops_spent, best_val_loss = 0, 0, 0.0, math.inf
skipped, skipped_in_a_row = 0, 0  # iterations whose loss or gradient was not finite
saved_at, saved_best = None, math.inf  # the iteration of ckpt.pt and the val loss of ckpt_best.pt, once written or read
wandb_id = None

# ---- out_dir and its checkpoint -------------------------------------------------------------------------------------

def open_out_dir() -> bool:
    """Take out_dir, for this run alone; whether the run resumes what is in it. Only the first process is asked."""
    if init_from == "resume" and not os.path.exists(ckpt_path):
        survive.read_checkpoint(ckpt_path)  # says that there is none
    survive.take_out_dir(out_dir)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # what is there, this very command has made
    if os.path.exists(ckpt_path) and (init_from != "scratch" or restarted):
        return True
    for name in survive.set_aside(out_dir):
        say(f"{name} of an earlier run is {name}.old in {out_dir} from here on")
    return False


def load_checkpoint() -> dict:
    """Take over the checkpoint of an earlier run; what else it holds. ValueError, one sentence, if it is not for this one."""
    checkpoint = survive.read_checkpoint(ckpt_path)
    survive.check_checkpoint(ckpt_path, checkpoint, model_args=model_args, tokenizer=meta["tokenizer"], config=config,
                             model=raw_model)
    survive.restore(ckpt_path, checkpoint, raw_model, optimizer, scaler)
    try:
        best = survive.read_checkpoint(best_path)["best_val_loss"]
    except ValueError:  # it is missing, or of no use
        best = math.inf
    return {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")} | {"saved_best": best}


def save_checkpoint(best: bool = False) -> None:
    """Write all that a run needs to go on, on the first process; what the disk does not take leaves the last one there."""
    global saved_at, saved_best
    if master:
        contents = dict(model=raw_model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                        model_args=model_args, config=config, tokenizer=meta["tokenizer"], iteration=iteration,
                        tokens=tokens_seen, flops=flops_spent, best_val_loss=best_val_loss, seed=seed, skipped=skipped,
                        skipped_in_a_row=skipped_in_a_row, wandb_id=wandb_id)
        try:
            log_file.sync()
            survive.save_checkpoint(ckpt_path, contents, best_path if best else None)
            saved_at = iteration
            saved_best = best_val_loss if best else saved_best
        except OSError as e:
            say(f"the checkpoint of iteration {iteration} could not be written ({e.strerror}): {kept_checkpoint()}")
    processes.wait_for_all()


def kept_checkpoint() -> str:
    return f"{ckpt_path} is that of iteration {saved_at}" if saved_at is not None else "there is no checkpoint yet"


resuming = bool(processes.largest(processes.together(lambda: master and open_out_dir()), device))
if resuming:
    checkpoint = processes.together(load_checkpoint)
    iteration, best_val_loss = checkpoint["iteration"], checkpoint["best_val_loss"]
    tokens_seen, flops_spent = checkpoint["tokens"], checkpoint["flops"]
    skipped, skipped_in_a_row = checkpoint.get("skipped", 0), checkpoint.get("skipped_in_a_row", 0)
    saved_at, saved_best, wandb_id = iteration, checkpoint["saved_best"], checkpoint.get("wandb_id")
    say(f"resuming {out_dir} at iteration {iteration}")
    for key, value in config.items():
        if key not in ("init_from", "out_dir") and checkpoint["config"].get(key, value) != value:
            say(f"  {key} = {value!r} from here on; it was {checkpoint['config'][key]!r}")
    del checkpoint

model = torch.compile(raw_model) if compile else raw_model
if ddp:
    model = DistributedDataParallel(model, device_ids=[local_rank] if device_type == "cuda" else None,
                                    gradient_as_bucket_view=True, forward_sync_buffers=False)  # they are the same

# ---- Speed: FLOPs of a token against the peak of the devices --------------------------------------------------------

peak, peak_source = devices.peak_flops(device, dtype)
peak *= world_size
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

def log(**point) -> None:
    """One line of log.jsonl, and the same to wandb."""
    if master:
        try:
            log_file.write(point)
        except OSError as e:
            say(f"{log_path} cannot be written ({e.strerror}): its lines wait for the disk")
        if wandb_run is not None and "iter" in point:
            wandb_run.log(point)


def open_log() -> survive.Log:
    try:
        return survive.Log(log_path, iteration if resuming else -1)
    except OSError as e:
        raise ValueError(f"{log_path} cannot be written: {e.strerror}") from None


log_file = processes.together(lambda: open_log() if master else None)
wandb_run = None
if wandb_log:
    wandb_id = wandb_id or secrets.token_hex(4)
    if master:
        wandb_run = survive.Wandb(say, project=wandb_project, name=wandb_run_name, config=config, id=wandb_id,
                                  resume="allow")
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
    share = eval_iters / world_size
    return processes.mean(total).item() / share, processes.mean(load) / share


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


def train_step() -> tuple[float, float, bool]:
    """One iteration: (cross-entropy, gradient norm) of the global batch, and whether both are finite.

    If not, the parameters, the optimizer and the routers' biases stay as they were, on every process.
    """
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
    loss, norm = torch.stack([processes.mean(total), norm]).tolist()  # .tolist() waits for the device
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(iteration) * group["lr_multiplier"]
        scaler.step(optimizer)
        if routers[0] and router_balance_rate:
            balance = processes.mean(balance)
            raw_model.rebalance(balance[:, :-1], balance[:, -1], router_balance_rate)
    scaler.update()  # float16: a smaller scale after gradients that are not finite
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, finite


@torch.no_grad()
def healthy() -> bool:
    """Whether the model's loss is finite on the batch that comes next: else a checkpoint would be of no use."""
    raw_model.eval()
    with autocast:
        _, loss = raw_model(*train_batch(iteration, rank_id * batch_size, (rank_id + 1) * batch_size))
    raw_model.train()
    return not processes.largest(float(not math.isfinite(loss.item())), device)


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
        lr=learning_rate_at(iteration), ms_per_iter=seconds / its * 1e3, tokens_per_s=rate, utilization=utilization,
        skipped=skipped)


def report_skipped(loss: float, norm: float) -> None:
    """The same for an iteration that was skipped; the end of the run if there were too many in a row."""
    say(f"iter {iteration:6d} | skipped, because it is not finite: loss {loss}, gradient norm {norm}")
    log(type="skip", iter=iteration, tokens=tokens_seen, flops=flops_spent, loss=loss, grad_norm=norm, skipped=skipped)
    if skipped_in_a_row >= max_skipped:
        processes.together(give_up)


def give_up() -> None:
    if master:
        finish_wandb()
        raise ValueError(f"the loss or the gradient was not finite in {skipped_in_a_row} iterations in a row, up to "
                         f"{iteration}: {kept_checkpoint()}; go on with --init_from=resume and a lower --learning_rate or --grad_clip, "
                         "another --seed for other data, or a --dtype of more range than float16")


def finish_wandb() -> None:
    if wandb_run is not None:
        wandb_run.finish()


signals.wait = True
if not resuming:
    balance_routers()
training_started = last_report = time.perf_counter()
its_since_report = 0
while not (stopping := int(processes.largest(signals.number, device))):
    if iteration % eval_interval == 0 or iteration >= max_iters:
        started = time.perf_counter()
        val_loss, load = evaluate()
        best_val_loss = min(best_val_loss, val_loss) if math.isfinite(val_loss) else best_val_loss
        say(f"eval {iteration:6d} | val loss {val_loss:.4f}")
        entropy = torch.special.entr(load).sum(1)  # (R,) nats
        for line in describe_load(load, entropy):
            say("  " + line)
        log(type="eval", iter=iteration, tokens=tokens_seen, flops=flops_spent, val_loss=val_loss,
            best_val_loss=best_val_loss, router_load=load.tolist(), router_entropy=entropy.tolist(),
            router_max_load=[max(l) * len(l) for l in load.tolist()], seconds=time.perf_counter() - training_started)
        if math.isfinite(val_loss):
            save_checkpoint(best=val_loss < saved_best)
        last_report += time.perf_counter() - started  # what an iteration takes does not include evaluations
    elif iteration % checkpoint_interval == 0 and healthy():
        save_checkpoint()
    if iteration >= max_iters:
        break
    loss, norm, finite = train_step()
    tokens_seen += tokens_per_iter
    flops_spent += float(tokens_per_iter * flops_per_token)
    its_since_report += 1
    skipped += not finite
    skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
    if not finite:
        report_skipped(loss, norm)
    elif iteration % log_interval == 0:
        report(loss, norm, time.perf_counter() - last_report, its_since_report)
        last_report, its_since_report = time.perf_counter(), 0
    iteration += 1

if stopping and healthy():
    save_checkpoint()
signals.wait = False
if stopping:
    say(f"stopped by {signal.Signals(stopping).name} at iteration {iteration}: {kept_checkpoint()}; go on with "
        "--init_from=resume")
    finish_wandb()
    processes.disconnect()
    sys.exit(128 + stopping)

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
    except (OSError, ValueError) as e:  # a terminal that is gone, or lacks the letters
        say(f"no sample: {e}")
    say("----")
say(f"sample more: python sample.py --out_dir={out_dir}")
finish_wandb()
processes.disconnect()
if master and saved_at != iteration:
    fail(f"the run has ended at iteration {iteration}, but {kept_checkpoint()}: make room and go on with --init_from=resume")
if master and log_file.waiting:
    fail(f"the run has ended well, but {log_path} lacks its last lines, for which there was no room on the disk")
