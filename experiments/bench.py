"""Speed of every structure relative to nn.Linear, and of a training step.

    python -m experiments.bench                     widths 256 to 2048, then a step of every structure config
    python -m experiments.bench --widths=512, --structs=btt,btt_moe --step=False
    python -m experiments.bench --plan=experiments/plans/cpu.py "--widths=()" --n_embd=128 --head_size=32
                                                    the steps of a sweep's runs, for fit --bench

For each width: forward and backward of one square layer, as a ratio to nn.Linear of the same width. The
layers are timed in turn, so that a slow moment of the machine affects all of them: a ratio is taken within a
turn, and the median and the quartiles are over turns. Also: the ratio of the FLOPs; the time per FLOP
relative to nn.Linear's; and the memory above inputs and parameters, both what the forward keeps for the
backward (the output included) and the peak. Then tokens/s of whole training steps. Writes everything to
<out>/bench.json, the ratios by width as a table to table.md, and as a figure. Run nothing else meanwhile.
"""
from typing import Literal

import configurator
from configurator import PositiveInt, fail, structure_config
from lib.terminal import prepare_output

structs: str = "dense,low_rank,kronecker,monarch,tt,btt,einsum,dyad,btt_moe,moe"  # names of structure configs
plan: str = ""                  # a plan of experiments.scaling: its structures instead of structs
widths: tuple = (256, 512, 1024, 2048)  # of the square layers
tokens: PositiveInt = 4096      # rows of a layer's input
turns: PositiveInt = 15         # timed runs of each layer, after two that are not
step: bool = True               # time training steps too
n_embd: PositiveInt = 512       # width of the model of the training step
n_layer: PositiveInt = 3        # its blocks
head_size: PositiveInt = 64     # the width of its heads
block_size: PositiveInt = 128   # its tokens per sequence
batch_size: PositiveInt = 16    # its sequences per step
vocab_size: PositiveInt = 96    # its vocabulary
steps: PositiveInt = 7          # timed training steps of each model, after two that are not
device: str | None = None       # 'cuda', 'mps', 'cpu'; None: the best there is
dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: bfloat16 on GPUs, else float32
kernel: Literal["auto", "torch", "c", "triton"] = "auto"  # what computes einsums; auto: the best one here
compile: bool = False           # torch.compile layers and models
out: str = "out-bench"          # folder of bench.json, table.md and the figure
prepare_output(keep_going=True)
config = configurator.configure(globals())
globals().update(config)

import dataclasses
import itertools
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterable

os.environ["KINETO_LOG_LEVEL"] = "99"   # else torch's profiler writes lines between those of the table

import torch
from torch import nn

import structured
from experiments.launcher import whole_numbers
from experiments.scaling.plan import structures_of
from experiments.timing import ratios, take_turns
from lib import figure, kernels
from lib.device import autocast, choose_compile, choose_device, choose_dtype, device_name, use_device
from lib.files import write_whole
from lib.table import markdown_table
from model import GPT, GPTConfig

SIZES = ("block_size", "vocab_size", "n_layer", "n_embd", "n_head")  # of a model, from the keys above


def choose_structures() -> dict[str, dict]:
    """{name: fields of GPTConfig but its SIZES}, dense first. Raises ValueError for an unusable plan."""
    found = structures_of(plan) if plan else {name: structure_config(name) for name in structs.split(",")}
    fields = {field.name for field in dataclasses.fields(GPTConfig)} - {*SIZES}
    kept = {name: {key: value for key, value in options.items() if key in fields}
            for name, options in ({"dense": structure_config("dense")} | found).items()}
    for name, key in ((name, key) for name, options in kept.items() for key in options):
        if isinstance(kept[name][key], list):
            raise ValueError(f"{name} has several values of {key}: give a plan with one of them")
    return kept


if n_embd % head_size:
    fail(f"n_embd must be a multiple of head_size = {head_size}; got {n_embd}")
try:
    if widths:
        whole_numbers(widths=widths)
    device, device_type = choose_device(device)
    structures = choose_structures()
    use_device(device, tf32=True)   # as train.py does
    compile = choose_compile(compile, device)
    dtype = choose_dtype(dtype, device_type)
    kernels.use_kernel(kernel, device_type, dtype)
except ValueError as e:
    fail(str(e))
amp = autocast(device_type, dtype)


def memory(run) -> tuple[int, int] | tuple[None, None]:
    """(bytes that a call leaves allocated while its result is kept, most bytes at once), beyond those before
    it; None where the device does not count them."""
    if device_type == "cuda":   # allocations are counted when they are asked for, not when a kernel runs
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        left = torch.cuda.memory_allocated() - before
        del result
        return left, torch.cuda.max_memory_allocated() - before
    if device_type != "cpu":
        return None, None
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as trace:
        result = run()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        trace.export_chrome_trace(path)
        with open(path, encoding="utf-8") as f:
            events = [event for event in json.load(f)["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = list(itertools.accumulate((event["args"]["Bytes"] for event in events), initial=0))
    return totals[-1], max(totals)


def compiled(module: nn.Module):
    return torch.compile(module, fullgraph=True) if compile else module


def layers(d: int) -> dict[str, nn.Module]:
    """nn.Linear and a layer of each structure that makes single layers, d -> d."""
    made = {"nn.Linear": nn.Linear(d, d, bias=False)}
    for name, options in structures.items():
        if not options.get("ffn_experts"):  # there, the whole MLP is the expert
            names = [field.name for field in dataclasses.fields(structured.LayerConfig)]
            layer = structured.LayerConfig(**{key: options[key] for key in names if key in options})
            made[name] = structured.make_layer(layer, d, d)
    return made


def bench_layers(d: int) -> list[dict]:
    """A row for each layer of width d."""
    x = torch.randn(tokens, d, device=device, requires_grad=True)
    dy = torch.randn(tokens, d, device=device)

    def calls_of(layer):
        call = compiled(layer)

        def forward():
            with amp:
                return call(x)

        def run():
            y = forward()
            y.backward(dy.to(y.dtype))
            x.grad = None
            layer.zero_grad()
        return forward, run

    made = {name: layer.to(device) for name, layer in layers(d).items()}
    calls = {name: calls_of(layer) for name, layer in made.items()}
    times = take_turns({name: run for name, (_, run) in calls.items()}, turns, device_type)
    rows = []
    for name, (forward, run) in calls.items():
        ratio, quartiles = ratios(times[name], times["nn.Linear"])
        flops = 1.0 if name == "nn.Linear" else made[name].flops_per_token() / (2 * d * d)
        rows.append(dict(width=d, layer=name, ms=statistics.median(times[name]), ratio=ratio,
                         quartiles=quartiles, flops=flops, time_per_flop=ratio / flops,
                         kept_bytes=memory(forward)[0], peak_bytes=memory(run)[1]))
    return rows


def gpt_config(options: dict) -> GPTConfig:
    """The model of the training step, with the options of a structure."""
    return GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd,
                     n_head=n_embd // head_size, **options)


def bench_steps() -> list[dict]:
    """A row for each structure config: forward, backward and AdamW of a model."""
    x, y = torch.randint(vocab_size, (2, batch_size, block_size), device=device)

    def training_step(model):
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device_type)
        call = compiled(model)

        def run():
            with amp:
                _, loss, aux = call(x, y, return_aux=True, return_logits=False)
            (loss + 0.01 * aux.loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        return run

    models = {name: GPT(gpt_config(options)).to(device) for name, options in structures.items()}
    times = take_turns({name: training_step(model) for name, model in models.items()}, steps, device_type)
    dense_flops = models["dense"].flops_per_token()
    rows = []
    for name, model in models.items():
        ms, (speed, quartiles) = statistics.median(times[name]), ratios(times["dense"], times[name])
        rows.append(dict(config=name, ms=ms, tokens_per_s=batch_size * block_size / ms * 1e3, speed=speed,
                         quartiles=quartiles, flops=model.flops_per_token() / dense_flops))
    return rows


def machine() -> dict:
    """The machine and software that the times were measured on."""
    name = device_name(device) if device_type == "cuda" else platform.processor() or platform.machine()
    if device_type == "cpu" and os.path.exists("/proc/cpuinfo"):    # says more, on Linux
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return dict(device=name, threads=torch.get_num_threads(), dtype=dtype, compiled=compile,
                einsums=kernels.describe_body(device_type, dtype),
                torch=torch.__version__, python=platform.python_version(),
                system=platform.platform(terse=True))


LAYER_TABLE = {     # heading: how a row of the result is printed
    "width": "{width}", "layer": "{layer}", "ms": "{ms:.1f}", "time": "{ratio:.2f}",
    "quartiles": "{quartiles[0]:.2f} to {quartiles[1]:.2f}", "FLOPs": "{flops:.3f}",
    "time per FLOP": "{time_per_flop:.1f}", "kept MiB": "{kept}", "peak MiB": "{peak}"}
STEP_TABLE = {
    "config": "{config}", "ms": "{ms:.0f}", "tokens/s": "{tokens_per_s:,.0f}", "÷ dense": "{speed:.2f}",
    "quartiles": "{quartiles[0]:.2f} to {quartiles[1]:.2f}", "FLOPs": "{flops:.3f}"}


def print_table(title: str, columns: dict[str, str], rows: Iterable[dict]) -> list[dict]:
    """Print rows as they come, and return them."""
    print(f"\n{title}:\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    shown = []
    for row in rows:
        mib = {key: "" if row.get(f"{key}_bytes") is None else f"{row[f'{key}_bytes'] / 2 ** 20:.1f}"
               for key in ("kept", "peak")}
        print(f"| {' | '.join(columns.values())} |".format(**row | mib), flush=True)
        shown.append(row)
    return shown


def summary(result: dict) -> str:
    """A table with a row for each layer: time ÷ nn.Linear's at each width, FLOPs ÷ nn.Linear's at the largest
    width, and the speed of a training step of such layers ÷ dense's."""
    rows = {(row["layer"], row["width"]): row for row in result["layers"]}
    speeds = {row["config"]: f"{row['speed']:.2f}" for row in result["steps"]}
    at = sorted({width for _, width in rows})
    names = [name for name in dict.fromkeys([*(name for name, _ in rows), *speeds]) if name != "nn.Linear"]
    head = ["", *map(str, at), *([f"FLOPs at {at[-1]}"] if at else []), "tokens/s of a step"]
    lines = []
    for name in names:
        mine = [rows.get((name, width)) for width in at]
        cells = [f"{row['ratio']:.2f}" if row else "" for row in mine]
        cells += [f"{row['flops']:.3f}" if row else "" for row in mine[-1:]]
        lines.append([name, *cells, speeds.get(name, "")])
    return markdown_table(head, lines)


def draw(result: dict) -> None:
    """speed.svg and speed.png: time ÷ nn.Linear's along the width, a line for each layer."""
    fig, [[ax]] = figure.figure()
    ax.axhline(1, color="#888888", linewidth=0.8)
    names = dict.fromkeys(row["layer"] for row in result["layers"] if row["layer"] != "nn.Linear")
    for i, name in enumerate(names):
        mine = [row for row in result["layers"] if row["layer"] == name]
        ax.plot([row["width"] for row in mine], [row["ratio"] for row in mine], label=name, markersize=4.5,
                linewidth=1.4, **figure.style(i))
    figure.log_ticks(ax, "x")
    figure.log_ticks(ax, "y")
    at = sorted({row["width"] for row in result["layers"]})
    ax.set_xticks(at, map(str, at))
    ax.minorticks_off()
    ax.set(xlabel="width", ylabel="time of forward and backward ÷ nn.Linear's")
    figure.save(fig, ax, out, "speed")


def write(result: dict) -> None:
    write_whole(os.path.join(out, "bench.json"), json.dumps(result, indent=1))


def main() -> None:
    with torch.device("meta"):  # a size that does not factor must end here, before anything is measured
        for width in widths:
            layers(int(width))
        for options in structures.values() if step else ():
            GPT.count_flops(gpt_config(options))
    os.makedirs(out, exist_ok=True)
    if compile:
        torch._dynamo.config.recompile_limit = 1000     # every structure and width compiles the same code
    result = dict(machine=machine(), config=config, layers=[], steps=[])
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    result["layers"] = print_table(f"Forward + backward of {tokens:,} tokens, ÷ nn.Linear", LAYER_TABLE,
                                   (row for width in widths for row in bench_layers(int(width))))
    write(result)
    if step:
        result["steps"] = print_table(f"Training steps, n_embd {n_embd}, {n_layer} layers, {batch_size} x "
                                      f"{block_size} tokens", STEP_TABLE, bench_steps())
    write(result)
    write_whole(os.path.join(out, "table.md"), summary(result) + "\n")
    if result["layers"]:
        with figure.optional_figures():
            draw(result)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        fail(str(e))
