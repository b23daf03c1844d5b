"""What experiments.scaling and experiments.search share: their command lines, and runs of train.py, each in a
folder of its own."""
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import configurator
from configurator import HERE, fail
from lib.commands import flag_of, key_of
from lib.files import is_locked, write_whole
from lib.log import NO_EFFECT, read_log
from lib.terminal import prepare_output

TRAIN = os.path.join(HERE, "train.py")
# read at import: Python 3.11 can fail with a SystemError where several threads parse source at once
TRAIN_KEYS = configurator.read_keys(TRAIN)
TRAIN_DEFAULTS = {name: key.default for name, key in TRAIN_KEYS.items()}
NOT_IN_NAMES = (*NO_EFFECT, "init_from")    # keys of train.py that are not part of a run's name


def split_arguments(script: str, commands: tuple[str, ...]) -> tuple[str, list, list, list]:
    """(command, files, flags of the script, flags of train.py) of a command line.

    The first command alone takes files and flags of train.py. Keys of both and unknown ones count as the
    script's.
    """
    prepare_output(keep_going=True)
    if {"-h", "--help"} & set(sys.argv[1:]):
        return "", [], ["--help"], []
    command, *rest = sys.argv[1:] or [""]
    if command not in commands:
        fail(f"the first word must be {' or '.join(commands)}; got {command!r}")
    if command != commands[0]:
        return command, [], rest, []
    files = [a for a in rest if a.strip() and not a.startswith("-")]
    keys = TRAIN_KEYS.keys() - set(configurator.read_keys(script))
    of_train = [a for a in rest if key_of(a) in keys]
    return command, files, [a for a in rest if a not in files + of_train], of_train


def run_program(main: Callable[[], int], *errors: type[Exception]) -> NoReturn:
    """End the process with the status of main(). A user's mistake, or one of the errors, is one sentence."""
    try:
        sys.exit(main())
    except (OSError, ValueError, *errors) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command makes what is missing", file=sys.stderr)
        sys.exit(130)


def whole_numbers(least: int = 1, **values: Sequence[float]) -> None:
    """Raises ValueError unless each is a sequence of one or more whole numbers of at least `least`."""
    for name, numbers in values.items():
        if not numbers or any(number < least or number != int(number) for number in numbers):
            raise ValueError(f"{name} takes whole numbers of at least {least}; got {numbers}")


@dataclasses.dataclass(frozen=True)
class Run:
    label: str          # its structure, as figures call it
    settings: dict      # keys of train.py, all but out_dir and init_from
    flops: float        # training FLOPs of the whole run
    root: str           # the folder that its own one is in

    @property
    def max_iters(self) -> int:
        return self.settings["max_iters"]

    @functools.cached_property
    def name(self) -> str:
        """The settings that differ most, and a hash of all. Without max_iters where the learning rate is
        constant, so that a longer run resumes a shorter one."""
        s, label = self.settings, re.sub(r"[^\w.+-]+", "_", self.label)
        left_out, end = NOT_IN_NAMES, f"-i{s['max_iters']}"
        if not s.get("decay_lr", True):
            left_out, end = (*NOT_IN_NAMES, "max_iters"), ""
        contents = json.dumps({key: value for key, value in sorted(s.items()) if key not in left_out})
        digest = hashlib.sha256(contents.encode()).hexdigest()[:8]
        return f"{label}-d{s['n_embd']}-l{s['n_layer']}-lr{s['learning_rate']:g}-s{s['seed']}{end}-{digest}"

    @property
    def folder(self) -> str:
        return os.path.join(self.root, self.name)


def vocabulary(dataset: str) -> int:
    """Number of different tokens of a dataset. Raises ValueError where there is no such dataset."""
    from data.common import open_dataset
    return open_dataset(dataset)[0]["vocab_size"]


@functools.cache
def forward_flops(model_args: tuple) -> int:
    """Forward FLOPs per token, from items of GPTConfig. Raises ValueError where no such model can be made."""
    from model import GPT, GPTConfig
    return GPT.count_flops(GPTConfig(**dict(model_args)))


def training_flops(settings: dict) -> int:
    """Training FLOPs per token of a model, backward twice the forward; settings has all keys of train.py."""
    from model import GPTConfig
    model_args = {f.name: settings[f.name] for f in dataclasses.fields(GPTConfig) if f.name in settings}
    model_args["vocab_size"] = vocabulary(settings["dataset"])
    return 3 * forward_flops(tuple(sorted(model_args.items())))


def tokens_per_iter(settings: dict) -> int:
    return math.prod(settings[key] for key in ("gradient_accumulation_steps", "batch_size", "block_size"))


def make_run(label: str, values: dict, root: str) -> Run:
    """One point of a grid as a run: head_size, flops and evals become n_head, max_iters and eval_interval.
    Raises ValueError where no such model can be made."""
    shown = ("n_embd", "n_layer", "learning_rate", "seed")      # in every run's name
    settings = values | {key: TRAIN_DEFAULTS[key] for key in shown if key not in values}
    head_size, budget, evals = (settings.pop(key, None) for key in ("head_size", "flops", "evals"))
    width = settings["n_embd"]
    if head_size:
        if width % head_size:
            raise ValueError(f"n_embd = {width} is no multiple of head_size = {head_size:g}")
        settings["n_head"] = int(width // head_size)
    everything = TRAIN_DEFAULTS | settings
    flops_per_iter = training_flops(everything) * tokens_per_iter(everything)
    if isinstance(budget, dict):
        if width not in budget:
            raise ValueError(f"flops has no budget for n_embd = {width}")
        budget = budget[width]
    if budget:
        if budget < flops_per_iter / 2:
            raise ValueError(f"flops = {budget:g} is less than one iteration, {flops_per_iter:.3g}")
        settings["max_iters"] = max(1, round(budget / flops_per_iter))
    settings.setdefault("max_iters", TRAIN_DEFAULTS["max_iters"])
    if evals:
        settings["eval_interval"] = max(1, math.ceil(settings["max_iters"] / evals))
    return Run(label, settings, float(flops_per_iter * settings["max_iters"]), root)


def final_loss(run: Run) -> float | None:
    """Validation loss at the end of a run; None if it has not ended, or the loss is not finite."""
    evals = [point for point in read_log(run.folder) if point.get("type") == "eval"]
    ends = [point["val_loss"] for point in evals if point["iter"] >= run.max_iters]
    return ends[-1] if ends else None


def run_alone(command: list[str], timeout: float) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command. None of its processes outlives this call: torchrun's
    workers would go on to use the GPUs, and have sessions of their own, so that it must end them itself.
    Raises subprocess.TimeoutExpired."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err
    finally:
        stop(process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def speed(run: Run) -> tuple[int, float | None]:
    """(iterations done, median ms of one; None where nothing is known yet)."""
    points = [p for p in read_log(run.folder) if "iter" in p]
    times = [p["ms_per_iter"] for p in points if "ms_per_iter" in p]
    return max((p["iter"] for p in points), default=0), statistics.median(times) if times else None


def last_words(run: Run) -> str:
    """The last line that train.py printed."""
    with contextlib.suppress(OSError, IndexError):
        with open(os.path.join(run.folder, "output.txt"), errors="replace") as f:
            return f.read().strip().splitlines()[-1]
    return "it said nothing"


def why_ended(run: Run, status: int) -> str:
    """How a train.py ended that did not reach the end of its run."""
    end = f"before iteration {run.max_iters}, or with no finite loss there"
    how = f"with status {status}" if status else end
    return f"ended {how}: {last_words(run)}"


def visible_gpus() -> list[str]:
    """The GPUs that jobs share: those that CUDA_VISIBLE_DEVICES names, else all of this machine."""
    import torch
    every = ",".join(map(str, range(torch.cuda.device_count())))
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",") if gpu]


def check_begun(run: Run) -> None:
    """Raises ValueError where the run's folder holds one of another model, as versions before rank decided
    between sizes made of some settings: train.py would go on with it, for too few or too many FLOPs."""
    try:
        with open(os.path.join(run.folder, "log.jsonl"), encoding="utf-8") as log:
            there = json.loads(log.readline())["flops_per_token"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    here = run.flops / run.max_iters / tokens_per_iter(TRAIN_DEFAULTS | run.settings)
    if not math.isclose(there, here, rel_tol=1e-6):
        raise ValueError(f"{run.folder} holds a run of {there:,.0f} training FLOPs per token, not "
                         f"{here:,.0f}: an earlier version made another model of these; move it away")


def check_gpus(jobs: int, gpus: int) -> None:
    """Raises ValueError where `jobs` jobs cannot have `gpus` GPUs each: some would train on the CPU."""
    if gpus and jobs * gpus > (visible := len(visible_gpus())):
        raise ValueError(f"{jobs} runs at a time, with gpus = {gpus} each: more than the {visible} GPUs here")


def launch(run: Run, job: int, *, jobs: int, gpus: int, program: str) -> subprocess.Popen:
    """Start or resume train.py on a run, as number `job` of `jobs` at a time; it prints into output.txt."""
    os.makedirs(run.folder, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = dict(OMP_NUM_THREADS=str(max(1, cores // jobs))) | os.environ
    command = [sys.executable]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[job * gpus:(job + 1) * gpus])
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    command.append(os.path.join(HERE, program))
    settings = run.settings | dict(out_dir=run.folder, init_from="auto")
    command += [flag_of(key, value) for key, value in settings.items()]
    write_whole(os.path.join(run.folder, "settings.json"),
                json.dumps(dict(label=run.label, settings=run.settings), indent=1))
    with open(os.path.join(run.folder, "output.txt"), "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def is_training(folder: str) -> bool:
    """Whether a train.py, on any machine, holds the lock of this out_dir."""
    return is_locked(os.path.join(folder, "lock"))


def stop(*processes: subprocess.Popen) -> None:
    """End these train.py processes together: they have a minute to write checkpoints."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 60
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
