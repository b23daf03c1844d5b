"""Does everything work on this GPU, and how fast is it? One command, some twenty minutes (an estimate).

    python -m experiments.gpu_check                     every check, on the GPU
    python -m experiments.gpu_check --training=False    without the training runs
    python -m experiments.gpu_check --device=cpu        small sizes, as the tests do

For each body that computes einsums here (torch, triton; see lib/kernels/operators.py): errors of outputs and
gradients against float64, an expert without tokens, whether repeated runs are bitwise the same, eager and
compiled layers against the torch body's, whether the host never waits, and the time of layers relative to
nn.Linear. Then generation, and training runs of twenty iterations at GPT-2 small's sizes, each in its own
process, some with torchrun on all GPUs.
Prints each check, and writes all checks so far into <out>/gpu_check.json. The exit status is 1 if one
failed.
"""
from typing import Annotated

from configurator import PositiveInt, configure, fail
from lib.terminal import prepare_output

device: str | None = None       # 'cuda', 'cuda:1', 'cpu'; None: the best there is
widths: tuple | None = None     # of the square layers; None: 256 to 4096, on a CPU 64
tokens: PositiveInt | None = None  # rows of a layer's input; None: 4096, on a CPU 128
iterations: Annotated[int, ("at least", 2)] = 20  # of each training run
training: bool = True           # training runs too
out: str = "out-gpu_check"      # folder of gpu_check.json
prepare_output(keep_going=True)
config = configure(globals())
globals().update(config)

import functools
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import traceback

import numpy as np
import torch
from torch import nn

import model
import structured
from experiments.launcher import run_alone, whole_numbers
from experiments.timing import ratios, take_turns
from lib import kernels
from lib.device import autocast, choose_compile, choose_device, device_name, use_device
from lib.files import write_whole
from lib.kernels import grouped, operators
from lib.log import read_log

try:
    device, device_type = choose_device(device)
    if widths is not None:
        whole_numbers(widths=widths)
        widths = tuple(map(int, widths))
    os.makedirs(out, exist_ok=True)
except (ValueError, OSError) as e:
    fail(str(e))
on_gpu = device_type == "cuda"
if widths is None:
    widths = (256, 512, 768, 1024, 1600, 2048, 4096) if on_gpu else (64,)
tokens = tokens or (4096 if on_gpu else 128)
use_device(device)
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if on_gpu else [torch.float32, torch.bfloat16]
if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
    DTYPES.remove(torch.bfloat16)
# relative errors, as norms: two roundings of each product to 8, 11 or 24 bits
BOUNDS = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}
SYSTEM = dict(device=device_name(device), python=sys.version.split()[0], torch=torch.__version__,
              cuda=torch.version.cuda, hip=torch.version.hip, system=platform.platform(),
              gpus=torch.cuda.device_count() if on_gpu else 0)
if on_gpu:
    SYSTEM["capability"] = torch.cuda.get_device_capability()
path, started, results = os.path.join(out, "gpu_check.json"), time.perf_counter(), []


def record(name: str, passed: bool, **values) -> None:
    """Prints a check and writes all checks so far into the file, since a later one may end the process."""
    results.append(dict(check=name, passed=bool(passed), **values))
    write_whole(path, json.dumps(dict(system=SYSTEM, config=config, seconds=time.perf_counter() - started,
                                      checks=results), indent=1))
    shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"{'ok    ' if passed else 'FAILED'} {name}" + (f": {shown}" if shown else ""), flush=True)


def attempt(name: str, check, *args) -> None:
    """check(*args), which calls record; an error is a check that failed, and the next one goes on."""
    try:
        check(*args)
    except Exception as e:  # a compiler's, a driver's or PyTorch's own
        record(name, False, error=(str(e) or type(e).__name__).strip().splitlines()[0][:300])
        traceback.print_exc()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bodies(dtype: torch.dtype) -> list[str]:
    """The names of the bodies that compute einsums of this type here."""
    return [name for name in kernels.KERNELS[1:] if operators.is_available(name, device_type, dtype)]


# ---- Einsums against float64 -------------------------------------------------------------------------------

def exact_mixture(width: int, experts: int):
    """A BTT layer's sizes and order, and (x, first, second, router, balance) in float64 that are exact in any
    dtype, with logits that are exact in float32 and never tie: every type makes the same choices. The rows of
    x do not fill their last tile."""
    layer = structured.linear("btt", width, width, num_experts=experts)
    sizes, b_first = layer.experts.contraction, layer.experts.b_first
    a, b, g, d, e, f, r = sizes
    made = dict(device=device, dtype=torch.float64)
    x = (torch.randn(max(1, tokens - 3), width, **made) * 16).round().clamp(-127, 127) / 16
    first = (torch.randn(experts, g, r * f * d, a, **made) / a ** 0.5).bfloat16().half().double()
    second = (torch.randn(experts, f, e, g * r * b, **made) / (g * r * b) ** 0.5).bfloat16().half().double()
    router = torch.randint(-1, 2, (experts, width), device=device).double() / 64
    balance = torch.arange(experts, **made) / 2 ** 15
    balance[1] -= 4096  # nobody chooses expert 1
    return sizes, b_first, [x, first, second, router], balance


def run_mixture(body: str, sizes, b_first, inputs, balance, dy, kind: str = "top 2"):
    """(y, dx, dfirst, dsecond, drouter) and the choices, of a kind of call of kernels.einsum."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    x, first, second, router = inputs
    routing = dict(router=router, balance=balance, top_k=1 if kind == "top 1" else 2)
    if kind == "given logits":
        routing |= dict(router=None, logits=kernels.router_logits(x, router))
    elif kind == "given experts":   # all but expert 1
        experts = torch.arange(len(x), device=device)[:, None] % (len(first) - 1)
        routing = dict(experts=experts + (experts > 0))
    y, logits, chosen = kernels.einsum(x, first, second, sizes, b_first, body=body, **routing)
    loss = (y * dy).sum() + logits.square().sum() / len(x)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads], chosen


def check_mixture(body: str, width: int, experts: int, dtype: torch.dtype, kind: str = "top 2") -> None:
    name = f"{body} btt_moe {width} x {experts} {name_of(dtype)}" + (f", {kind}" if kind != "top 2" else "")
    sizes, b_first, inputs, balance = exact_mixture(width, experts)
    dy = torch.randn(len(inputs[0]), width, device=device).to(dtype)
    truth, choices = run_mixture("torch", sizes, b_first, inputs, balance, dy.double(), kind)
    small = [t.to(dtype) for t in inputs[:3]] + [inputs[3].float()]
    poison(8 * tokens * width)
    outputs, chosen = run_mixture(body, sizes, b_first, small, balance.float(), dy, kind)
    errors = {n: ((o.double() - t).norm() / t.norm().clamp(min=1e-300)).item()
              for n, o, t in zip(("y", "dx", "dA", "dB", "drouter"), outputs, truth)}
    is_near = all(error <= BOUNDS[dtype] for error in errors.values())
    record(f"{name}: error", is_near and torch.equal(chosen, choices),
           bound=BOUNDS[dtype], **errors)
    record(f"{name}: expert without tokens", not outputs[2][1].any() and not outputs[3][1].any())
    again, _ = run_mixture(body, sizes, b_first, small, balance.float(), dy, kind)
    record(f"{name}: bitwise the same again", all(map(torch.equal, outputs, again)))


def poison(numbers: int) -> None:
    """Leaves NaN in memory that the next tensors are likely to get."""
    blocks = [torch.full((max(1, numbers >> i),), float("nan"), device=device) for i in range(0, 12, 2)]
    del blocks


# ---- Layers ------------------------------------------------------------------------------------------------

LAYERS = {"dense": dict(struct="dense"), "low_rank": dict(struct="low_rank"), "btt": dict(struct="btt"),
          "kronecker": dict(struct="kronecker"), "tt": dict(struct="tt"), "dyad": dict(struct="dyad"),
          "btt_moe": dict(struct="btt", num_experts=8), "dense_moe": dict(struct="dense", num_experts=8)}


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, amp) -> list[torch.Tensor]:
    """The output and the gradients of a layer."""
    with amp:
        y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))]


def make_layer(name: str, width: int, rows: int = tokens):
    layer = structured.linear(d_in=width, d_out=width, **LAYERS[name]).to(device)
    return (layer, torch.randn(rows, width, device=device, requires_grad=True),
            torch.randn(rows, width, device=device))


def check_layer(name: str, body: str, dtype: torch.dtype) -> None:
    """A layer, eager and compiled as one graph, agrees with the torch body's; the host does not wait. Rows
    do not fill their last tile."""
    title = f"{body} {name} {widths[0]} {name_of(dtype)}"
    amp = autocast(device_type, name_of(dtype))
    layer, x, dy = make_layer(name, widths[0], max(1, tokens - 3))

    def outputs(module, body: str) -> torch.Tensor:
        kernels.use_kernel(body, device_type, name_of(dtype))
        # as one vector: the gradient of a gain is one number, a sum whose terms cancel
        return torch.cat([t.flatten().float() for t in step(module, x, dy, amp)])

    reference = outputs(layer, "torch")
    for kind, module in (("eager", layer), ("compiled", torch.compile(layer, fullgraph=True))):
        error = ((outputs(module, body) - reference).norm() / reference.norm()).item()
        record(f"{title}: {kind} is torch's", error <= BOUNDS[dtype], error=error, bound=BOUNDS[dtype])
    reads_ends = name == "dense_moe" and not grouped.is_one_launch(x.to(dtype), 8)
    if on_gpu and not reads_ends:  # elsewhere a loop over experts reads back where their rows end
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(layer, x, dy, amp)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        record(f"{title}: the host does not wait", True)


def time_layers(body: str, width: int, dtype: torch.dtype) -> None:
    """Forward and backward beside nn.Linear's, in turns: medians of ratios, and GB/s of what has to move."""
    layers = {"nn.Linear": (nn.Linear(width, width, bias=False, device=device), "torch")}
    for name in ("btt", "kronecker", "btt_moe"):
        layers[f"{name} {body}"] = (make_layer(name, width)[0], body)
    _, x, dy = make_layer("dense", width)
    amp = autocast(device_type, name_of(dtype))

    def run(layer, body):
        kernels.use_kernel(body, device_type, name_of(dtype))
        step(layer, x, dy, amp)

    runs = {name: functools.partial(run, *made) for name, made in layers.items()}
    times = take_turns(runs, 10, device_type)
    moved = tokens * width * 5 * dtype.itemsize  # reads of x, x and dy, writes of y and dx
    for name, ms in times.items():
        beside = f" beside {body}" if name == "nn.Linear" else ""
        record(f"time of {name} {width} {name_of(dtype)}{beside}", True, ms=min(ms),
               ratio_to_linear=ratios(ms, times["nn.Linear"])[0], gigabytes_per_s=moved / min(ms) / 1e6)


def check_generation(name: str) -> None:
    """Tokens are the same with and without a cache, and new lengths cost no more than known ones."""
    torch.manual_seed(0)
    size = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024) if on_gpu else dict(
        n_layer=2, n_head=2, n_embd=64, block_size=64)
    gpt = model.GPT(model.GPTConfig(vocab_size=256, **size, **LAYERS[name])).to(device).eval()
    for p in gpt.parameters():  # at their initial values all logits are zero
        nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.dim() >= 2 else 1.0)
    kernels.use_kernel("auto", device_type, "float32")
    first, second = torch.randint(256, (2, 1, 8), device=device)
    gpt.double()  # rounding changes no choice
    with_cache, without = (gpt.generate(first, 40, temperature=0, use_cache=cache) for cache in (True, False))
    record(f"generation of {name}: the cache changes no token", torch.equal(with_cache, without))
    gpt.float()
    times = []
    with autocast(device_type, name_of(DTYPES[0])):
        gpt.generate(second, 2)  # compiles and loads what there is to
        for prompt in (first, first):
            start = time.perf_counter()
            gpt.generate(prompt, 50).tolist()  # waits for the GPU
            times.append(1e3 * (time.perf_counter() - start) / 50)
    record(f"time of generation of {name}, {name_of(DTYPES[0])}", not on_gpu or times[0] < 3 * times[1],
           first_ms_per_token=times[0], ms_per_token=times[1])


# ---- Training ----------------------------------------------------------------------------------------------

def write_tokens(folder: str) -> None:
    """A dataset of random tokens of GPT-2's vocabulary; the smaller ones are the likelier."""
    os.makedirs(folder)
    ids = (50257 * np.random.default_rng(0).random(300_000) ** 4).astype(np.uint16)
    meta = dict(vocab_size=50257, dtype="uint16", tokenizer=dict(name="gpt2"))
    for split, part in dict(train=ids[:-60_000], val=ids[-60_000:]).items():
        part.tofile(os.path.join(folder, f"{split}.bin"))
        meta[f"{split}_tokens"] = len(part)
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(meta, f)


def check_training(name: str, options: list[str], folder: str, launcher: list[str]) -> None:
    """A run of train.py that ends well, and whose loss falls."""
    run = os.path.join(folder, name.replace(" ", "-"))
    size = [] if on_gpu else ["--n_layer=1", "--n_head=2", "--n_embd=64", "--block_size=64"]
    status, out, err = run_alone(
        [*launcher, "train.py", *options, *size, f"--dataset={os.path.join(folder, 'tokens')}",
         f"--out_dir={run}", f"--device={device_type if launcher[1:] else device}",
         f"--max_iters={iterations}", "--eval_iters=2",
         f"--batch_size={8 if on_gpu else 2}", "--log_interval=1", "--warmup_iters=5", "--sample_tokens=0"],
        timeout=900)
    if status:
        raise RuntimeError((err.strip() or out.strip() or "no message").splitlines()[-1])
    points = [p for p in read_log(run) if p["type"] == "train"]
    losses = [p["loss"] for p in points]
    last = points[len(points) // 2:]
    shutil.rmtree(run)  # checkpoints take gigabytes
    record(f"training of {name}", len(losses) == iterations and losses[-1] < losses[0],
           first_loss=losses[0], last_loss=losses[-1],
           tokens_per_s=statistics.median(p["tokens_per_s"] for p in last),
           utilization=last[-1]["utilization"], peak_memory=last[-1]["peak_memory"])


def check_training_runs() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(os.path.join(folder, "tokens"))
        accumulation = 2 * max(1, SYSTEM["gpus"])   # two micro-batches on each
        alone = ["--gradient_accumulation_steps=1"]
        kinds = [("dense", "auto"), ("btt_moe", "auto"), ("moe", "auto")] if on_gpu else [("moe", "auto")]
        if on_gpu and "triton" in bodies(DTYPES[0]):
            kinds.append(("btt_moe", "triton"))
        for (structure, kernel), compiled in itertools.product(kinds, (False, True)[:1 + on_gpu]):
            name = f"{structure} {kernel} {'compiled' if compiled else 'eager'}"
            options = [f"config/{structure}.py", f"--compile={compiled}", f"--kernel={kernel}", *alone]
            attempt(name, check_training, name, options, folder, [sys.executable])
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        counts = sorted({1, accumulation // 2})
        for processes, compiled in itertools.product(counts, (False, True)[:1 + on_gpu]):
            name = f"btt_moe {'compiled' if compiled else 'eager'} with torchrun on {processes}"
            options = [f"--compile={compiled}", f"--gradient_accumulation_steps={accumulation}"]
            attempt(name, check_training, name, ["config/btt_moe.py", *options], folder,
                    [*torchrun, f"--nproc_per_node={processes}"])


print(", ".join(f"{key} {value}" for key, value in SYSTEM.items()), flush=True)
torch.manual_seed(0)
choose_compile(False, device)  # a compiled backward computes in the types that train.py's does
torch.backends.cuda.matmul.fp32_precision = "ieee"  # float32 is checked as float32, and not as TF32
for body in bodies(DTYPES[0]):  # one after the other: after an illegal access nothing works in this process
    for width, experts, dtype in itertools.product(widths, (8, 16), DTYPES):
        if body in bodies(dtype):
            attempt(f"{body} {width} {experts} {dtype}", check_mixture, body, width, experts, dtype)
    for kind in ("top 1", "given experts", *(["given logits"] if body != "c" else [])):
        attempt(f"{body} {kind}", check_mixture, body, widths[0], 8, DTYPES[0], kind)
    for name in LAYERS if on_gpu else ["btt", "dense_moe"]:    # on a CPU compilation takes long
        attempt(f"layer {name} {body}", check_layer, name, body, DTYPES[0])
    for width in widths:
        attempt(f"time of {body} at {width}", time_layers, body, width, DTYPES[0])
for name in ("dense", "btt_moe"):
    attempt(f"generation of {name}", check_generation, name)
if training:
    if on_gpu:
        attempt("memory is released", torch.cuda.empty_cache)  # the runs are processes of their own
    check_training_runs()

print(f"Written to {path}. Please open an issue with this file, whatever it says: few cards have been tried.")
failed = sum(not result["passed"] for result in results)
print(f"{len(results)} checks, {failed} failed")
sys.exit(failed > 0)
