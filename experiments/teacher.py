"""The taxonomy at low cost, and structured layers outside of GPT: MLPs that learn a random function.

    python -m experiments.teacher                               dense, BTT-MoE, the θ of plans/paper.py
    python -m experiments.scaling fit --runs=out-teacher/runs --base=dense_normed
                                                                laws and figures, as for train.py's runs

After the paper's third domain (its Figure 5, bottom). The teacher is a ReLU network of random weights on 8
normal numbers, its output standardized; a student has three hidden layers, whose inner maps are structured,
and sees every example once. The loss is the mean squared error on a test set: 1 for a student that knows
nothing. The paper's students are residual blocks of two maps, with GELU, and its rate decays.

Each structure has the same effort for its learning rate: all of `learning_rates` at `tuned_at`, for a part of
the longest run, on examples held out for it; µP takes the best one to the other widths. The rate is constant,
so that every evaluation is a point of the frontier. Routers have their losses as in train.py, but relative to
the error, which falls far below 1. A finished run is never made again, and several processes may share a
folder.
"""
import itertools
import json
import math
import os
import time

from configurator import PositiveFloat, PositiveInt, configure, fail, nearest, show
from lib.terminal import prepare_output

out: str = "out-teacher"                # rates/ and runs/ are made in it, and the teacher's answers
only: str = ""                          # labels of structures, a,b; empty: all
widths: tuple = (64, 128, 256, 512, 1024)
seeds: tuple = (1, 2, 3)                # of weights, and of where in the data a run begins
examples: PositiveInt = 2_000_000       # of the longest run, in whole BLOCKs: each is seen once
flops: PositiveFloat = 3e12             # a run ends at these training FLOPs, or at the last example
batch_size: PositiveInt = 1024
evals: PositiveInt = 24                 # after n^(i / evals) of a run's n iterations, i >= evals / 3
learning_rates: tuple = (1e-3, 3e-3, 1e-2, 3e-2)  # at the base width
tuned_at: PositiveInt = 128             # the width at which they are compared
tune_share: PositiveFloat = 0.25        # of `examples` for that
base_width: PositiveInt = 64            # µP: learning rates are those of this width
teacher_width: PositiveInt = 1024
prepare_output(keep_going=True)
config = configure(globals())
globals().update(config)

import filelock
import torch
from torch import nn
from torch.nn import functional as F

import structured
from experiments.launcher import run_program, whole_numbers
from experiments.plans import paper
from lib.files import replace_file, write_temporary, write_whole
from lib.log import read_log
from model import apply_layer, lr_multipliers, num_params

D_IN, TEACHER_HIDDEN_LAYERS, HIDDEN_LAYERS = 8, 6, 3
AUX_LOSS_WEIGHT = 0.01  # as in train.py
BLOCK = 16_384       # examples are made in blocks; one more is the test set
STRUCTURES = {"dense": dict(struct="dense"), "dense_normed": dict(struct="dense", weight_norm=True),
              "btt_moe": dict(struct="btt", num_experts=8, top_k=2)}
STRUCTURES |= {label: options for label, options in paper.structures.items() if "theta" in options}
# of the test set and of the teacher, beyond those of all blocks; the generator looks at 32 bits
TEST_SEED, TEACHER_SEED = 2**32 - 1, 2**32 - 2

# ---- Data --------------------------------------------------------------------------------------------------


def inputs(block: int) -> torch.Tensor:
    """x (BLOCK, 8) of a block, standard normal."""
    return torch.randn(BLOCK, D_IN, generator=torch.Generator().manual_seed(block))


class Teacher:
    """A ReLU network of TEACHER_HIDDEN_LAYERS; normal weights of std √(2 / fan_in) keep the scale."""

    def __init__(self):
        random = torch.Generator().manual_seed(TEACHER_SEED)
        sizes = [D_IN] + [teacher_width] * TEACHER_HIDDEN_LAYERS + [1]
        self.weights = [torch.randn(d_out, d_in, generator=random) * math.sqrt(2 / d_in)
                        for d_in, d_out in zip(sizes, sizes[1:])]
        answers = self.raw(inputs(TEST_SEED))
        self.mean, self.std = answers.mean(), answers.std()

    @torch.no_grad()
    def raw(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights[:-1]:
            x = F.relu(F.linear(x, weight))
        return F.linear(x, self.weights[-1])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, 8) -> y (N, 1), standardized over the test set."""
        return (self.raw(x) - self.mean) / self.std


def make_data() -> tuple[tuple, tuple]:
    """((x, y) of the training examples, (x, y) of the test set). The teacher's answers are kept in a file."""
    path = os.path.join(out, "teacher.pt")
    blocks = [inputs(block) for block in range(math.ceil(examples / BLOCK))]
    test = inputs(TEST_SEED)
    with filelock.FileLock(path + ".lock"):
        known = torch.load(path) if os.path.exists(path) else []
        if len(known) <= len(blocks):
            teacher = Teacher()
            known = known or [teacher(test)]
            known += [teacher(x) for x in blocks[len(known) - 1:]]
            write_temporary(path, lambda file: torch.save(known, file))
            replace_file(path)
    return (torch.cat(blocks), torch.cat(known[1:len(blocks) + 1])), (test, known[0])

# ---- Student -----------------------------------------------------------------------------------------------


class Student(nn.Module):
    """x (N, 8) -> y (N, 1), with HIDDEN_LAYERS hidden layers, each normalized; options: those of
    structured.linear."""

    def __init__(self, width: int, options: dict):
        super().__init__()
        self.first = nn.Linear(D_IN, width)
        self.inner = nn.ModuleList(structured.linear(d_in=width, d_out=width, bias=True, **options)
                                   for _ in range(HIDDEN_LAYERS - 1))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(HIDDEN_LAYERS))
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: torch.Tensor, aux: list | None = None) -> torch.Tensor:
        """Where the layers have routers, their structured.Aux are appended to aux."""
        x = self.norms[0](F.relu(self.first(x)))
        for layer, norm in zip(self.inner, self.norms[1:]):
            x = norm(F.relu(apply_layer(layer, x, aux)))
        return self.last(x)

    def lr_multipliers(self) -> dict[str, float]:
        """{parameter name: factor on the learning rate} under µP for Adam."""
        return lr_multipliers(self, base_width) | {"last.weight": base_width / self.last.in_features}

    def flops(self, output_layer: bool = True) -> int:
        """Training FLOPs of an example: 2 for each multiply-add, backward twice the forward."""
        ends = 2 * (self.first.weight.numel() + output_layer * self.last.weight.numel())
        return 3 * (ends + sum(layer.flops_per_token() for layer in self.inner))

# ---- Runs --------------------------------------------------------------------------------------------------


def train(folder: str, label: str, options: dict, width: int, rate: float, seed: int, data: tuple) -> None:
    """A run of one student; log.jsonl appears in its folder when it is whole, in the form of train.py's."""
    (x, y), (test_x, test_y) = data
    torch.manual_seed(seed)
    student = Student(width, options)
    multipliers = student.lr_multipliers()
    optimizer = torch.optim.Adam([dict(params=[p], lr=rate * multipliers[name])
                                  for name, p in student.named_parameters()])
    iterations = min(len(x) // batch_size, int(flops / (student.flops() * batch_size)))
    first = int(len(x) * (max(seed - 1, 0) * 0.618 % 1))  # each seed begins elsewhere in the data
    if not iterations:
        raise ValueError(f"{len(x):,} examples or {flops:g} FLOPs are less than a batch at width {width}")
    steps = {round(iterations ** (i / evals)) for i in range(evals // 3, evals + 1)}
    settings = dict(options, dataset="teacher", n_layer=HIDDEN_LAYERS, n_head=1, n_embd=width, block_size=1,
                  batch_size=batch_size, eval_iters=1, learning_rate=rate, seed=seed, max_iters=iterations,
                  decay_lr=False)
    lines = [dict(type="run", config=settings, params=num_params(student),
                  active_params=num_params(student, active=True), tokens_per_iter=batch_size,
                  flops_per_token=student.flops(), loss="mean squared error",
                  flops_per_token_without_output_layer=student.flops(output_layer=False))]
    spent, timed = 0.0, 0   # since the last evaluation
    for iteration in range(1, iterations + 1):
        begin = time.perf_counter()
        place = (first + torch.arange((iteration - 1) * batch_size, iteration * batch_size)) % len(x)
        aux: list[structured.Aux] = []
        error = F.mse_loss(student(x[place], aux), y[place])
        router_loss = sum(report.loss for report in aux) / max(1, len(aux))
        optimizer.zero_grad()
        (error + AUX_LOSS_WEIGHT * error.detach() * router_loss).backward()
        optimizer.step()
        spent, timed = spent + time.perf_counter() - begin, timed + 1
        if iteration in steps:
            with torch.no_grad():
                errors = error.item(), F.mse_loss(student(test_x), test_y).item()
            last, test_error = (e if math.isfinite(e) else None for e in errors)  # JSON has no other
            load = [report.load.tolist() for report in aux]
            lines += [dict(type="train", iter=iteration, loss=last, ms_per_iter=1e3 * spent / timed),
                      dict(type="eval", iter=iteration, tokens=iteration * batch_size, val_loss=test_error,
                           router_load=load)]
            spent, timed = 0.0, 0
    write_whole(os.path.join(folder, "settings.json"), json.dumps(dict(label=label)))
    write_whole(os.path.join(folder, "log.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))


def run(kind: str, label: str, options: dict, width: int, rate: float, seed: int, data: tuple,
        wait: bool) -> float | None:
    """The last test error of a run, inf where it is not finite. The run is made if it does not exist; while
    another process makes it, this one waits or, without `wait`, returns None."""
    name = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in label)
    folder = os.path.join(out, kind, f"{name}-d{width}-lr{rate:g}-s{seed}")
    os.makedirs(folder, exist_ok=True)
    try:
        with filelock.FileLock(os.path.join(folder, "lock"), blocking=wait):
            made = not read_log(folder)
            if made:
                train(folder, label, options, width, rate, seed, data)
            error = read_log(folder)[-1]["val_loss"]
    except filelock.Timeout:
        return None
    if made:
        print(f"{kind}: {label}, width {width}, rate {rate:g}, seed {seed}: test error {error}", flush=True)
    return math.inf if error is None else error


def chosen_structures() -> dict[str, dict]:
    """{label: fields of LayerConfig}; exits with one sentence where there is no such label."""
    chosen = [label for label in only.split(",") if label] or list(STRUCTURES)
    if unknown := [label for label in chosen if label not in STRUCTURES]:
        fail(f"there is no structure {show(unknown[0])} here: {nearest(unknown[0], STRUCTURES)}")
    return {label: STRUCTURES[label] for label in chosen}


def check_settings() -> None:
    """Raises ValueError if the folder holds runs of other settings than these."""
    names = ("examples", "flops", "batch_size", "evals", "learning_rates", "tuned_at", "tune_share",
             "base_width", "teacher_width")
    settings, path = {name: config[name] for name in names}, os.path.join(out, "settings.json")
    settings["learning_rates"] = list(learning_rates)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        for name in names:
            if known.get(name) != settings[name]:
                raise ValueError(f"the runs in {out} have {name} = {known.get(name)}, not {settings[name]}: "
                                 "give another --out")
    else:
        write_whole(path, json.dumps(settings))


def main() -> int:
    """Tune the learning rate of each structure, then make the runs of the grid, the first seed first."""
    structures = chosen_structures()
    whole_numbers(widths=widths, seeds=seeds)
    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"learning_rates takes numbers above 0; got {learning_rates}")
    with torch.device("meta"):  # a width that does not factor ends here, not after the runs before it
        for width, options in itertools.product((tuned_at, *widths), structures.values()):
            if (least := Student(int(width), options).flops() * batch_size) > flops:
                raise ValueError(f"{flops:g} FLOPs are less than a batch at width {width}, {least:.3g}")
    os.makedirs(out, exist_ok=True)
    with filelock.FileLock(os.path.join(out, "settings.json.lock")):
        check_settings()
    (x, y), test = data = make_data()
    held_out = max(1, len(x) // 64)
    few = min(int(tune_share * len(x)), len(x) - held_out)
    tuning = (x[:few], y[:few]), (x[-held_out:], y[-held_out:])
    errors: dict[str, dict[float, float | None]] = {label: {} for label in structures}
    for wait in (False, True):  # what another process is making comes last
        for label, options in structures.items():
            for rate in learning_rates:
                errors[label][rate] = run("rates", label, options, tuned_at, rate, 0, tuning, wait)
    for wait in (False, True):
        for seed in map(int, seeds):
            for width in map(int, widths):
                for label, options in structures.items():
                    best = min(learning_rates, key=errors[label].get)
                    run("runs", label, options, width, best, seed, data, wait)
    return 0


if __name__ == "__main__":
    run_program(main)
