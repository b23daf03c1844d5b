"""Runs of train.py in folders of their own, for scaling.py and search.py: what they are called and cost, who works at
them, how they are launched and stopped, and what their logs say.

Any number of machines that share a folder may work at the same runs: a run belongs to who creates its claim file, until
that file has not been touched for some time.
"""
import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import uuid

import configurator
from configurator import HERE, fail

TRAIN = os.path.join(HERE, "train.py")
# settings that do not change what is learned or measured, and so are no part of a run's name
ASIDE = ("out_dir", "init_from", "eval_interval", "checkpoint_interval", "log_interval", "sample_tokens", "max_skipped",
         "wandb_log", "wandb_project", "wandb_run_name")


def split_flags(script: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """(flags of the script, flags of train.py); a key of both is the script's, and so is one that nobody knows."""
    keys = set(configurator.read_keys(TRAIN)) - set(configurator.read_keys(script))
    ours = [a for a in arguments if a.partition("=")[0].removeprefix("--").replace("-", "_") not in keys]
    return ours, [a for a in arguments if a not in ours]


# ---- Runs -----------------------------------------------------------------------------------------------------------

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
        """The settings that differ most, and a hash of all: at a constant rate the length is not one of them."""
        s = self.settings
        aside = ASIDE if s.get("decay_lr", True) else (*ASIDE, "max_iters")
        contents = json.dumps({k: v for k, v in sorted(s.items()) if k not in aside})
        parts = [re.sub(r"[^\w.+-]+", "_", self.label), f"d{s['n_embd']}", f"l{s['n_layer']}", f"lr{s['learning_rate']:g}",
                 f"s{s['seed']}", *([f"i{s['max_iters']}"] if "max_iters" not in aside else []),
                 hashlib.sha256(contents.encode()).hexdigest()[:8]]
        return "-".join(parts)

    @property
    def folder(self) -> str:
        return os.path.join(self.root, self.name)


@functools.cache
def vocabulary(dataset: str) -> int:
    from data.common import open_dataset
    try:
        return open_dataset(dataset if os.path.isdir(dataset) else os.path.join(HERE, "data", dataset))[0]["vocab_size"]
    except ValueError as e:
        fail(str(e))


@functools.cache
def block_flops(arguments: tuple) -> tuple[int, int]:
    """Forward FLOPs per token of (a block, the output layer) of a model with these GPTConfig fields. Raises ValueError."""
    import torch
    from model import GPT, GPTConfig
    with torch.device("meta"):
        model = GPT(GPTConfig(**dict(arguments)))
    return model.flops_per_token(False), model.flops_per_token() - model.flops_per_token(False)


def make_run(label: str, values: dict, defaults: dict, root: str) -> Run:
    """One point of the grid as a run: budgets turned into iterations. Raises ValueError where no such model can be made."""
    from model import GPTConfig
    values = dict(values)
    head_size, budget, evals = (values.pop(k, None) for k in ("head_size", "flops", "evals"))
    s = values
    for key in ("n_embd", "n_layer", "learning_rate", "seed"):
        s.setdefault(key, defaults[key])
    if head_size:
        if s["n_embd"] % head_size:
            raise ValueError(f"n_embd = {s['n_embd']} is no multiple of head_size = {head_size}")
        s["n_head"] = int(s["n_embd"] // head_size)
    full = defaults | s
    fields = {f.name: full[f.name] for f in dataclasses.fields(GPTConfig) if f.name in full}
    block, output = block_flops(tuple(sorted((fields | dict(n_layer=1, vocab_size=vocabulary(full["dataset"]))).items())))
    per_token = 3 * (s["n_layer"] * block + output)
    per_iter = per_token * full["gradient_accumulation_steps"] * full["batch_size"] * full["block_size"]
    if isinstance(budget, dict):
        if s["n_embd"] not in budget:
            raise ValueError(f"flops has no budget for n_embd = {s['n_embd']}")
        budget = budget[s["n_embd"]]
    if budget:
        s["max_iters"] = max(1, round(budget / per_iter))
    s.setdefault("max_iters", defaults["max_iters"])
    if evals:
        s["eval_interval"] = max(1, math.ceil(s["max_iters"] / evals))
    return Run(label, s, float(per_iter * s["max_iters"]), root)


# ---- Claims: a run belongs to the newest of its files claim.1, claim.2, ..., as long as that one lives ---------------

def here() -> str:
    """This machine, or container: process numbers mean something within it alone."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as f:
            parts += [f.read().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def shared_time(folder: str, token: str) -> float:
    """The time by the clock of the folder's file system, which all machines share."""
    path = os.path.join(folder, f".clock.{token}")
    with open(path, "w"):
        os.utime(path)
    return os.stat(path).st_mtime


def newest_claim(folder: str) -> int:
    """Number of the newest claim of a run, 0 where there is none."""
    numbers = [int(n) for name in os.listdir(folder) if name.startswith("claim.") and (n := name[6:]).isdecimal()]
    return max(numbers, default=0)


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def claim_lives(folder: str, number: int, now: float, expiry: float) -> bool:
    """Is somebody at work? Not where all its processes were of this machine and are gone; else by the last sign of life,
    which must not be older than `expiry` seconds.

    A log that grows, here or one folder below, is one too: train.py goes on when the sweep that launched it is killed.
    """
    path, times = os.path.join(folder, f"claim.{number}"), []
    logs = [log for below in ("", "*") for log in glob.glob(os.path.join(glob.escape(folder), below, "log.jsonl"))]
    for file in (path, *logs):
        with contextlib.suppress(OSError):
            times.append(os.stat(file).st_mtime)
    try:
        with open(path) as f:
            claim = json.load(f)
        if os.name == "posix" and claim["here"] == here() and not any(map(process_exists, claim["processes"])):
            return False
    except FileNotFoundError:
        return True     # released at this moment: look again later
    except (OSError, ValueError, KeyError, TypeError):
        pass            # being written
    return now - max(times, default=0.0) < expiry


class Claim:
    """A claim that this process holds. The next number is taken by exclusive creation, which one process alone can do;
    no claim but one's own is ever removed while it could be the newest."""

    def __init__(self, folder: str, number: int, token: str):
        self.folder, self.number, self.token = folder, number, token
        self.path = os.path.join(folder, f"claim.{number}")

    @classmethod
    def take(cls, folder: str, now: float, expiry: float) -> "Claim | None":
        os.makedirs(folder, exist_ok=True)
        last = newest_claim(folder)
        if last and claim_lives(folder, last, now, expiry):
            return None
        claim = cls(folder, last + 1, uuid.uuid4().hex)
        try:
            os.close(os.open(claim.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return None
        claim.write([os.getpid()])
        return claim

    def write(self, processes: list[int]) -> None:
        with open(self.path, "w") as f:
            json.dump(dict(here=here(), processes=processes, token=self.token), f)

    def held(self) -> bool:
        """Is it still ours? Another takes over where this process slept for longer than `expiry`."""
        try:
            with open(self.path) as f:
                return json.load(f)["token"] == self.token and newest_claim(self.folder) == self.number
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def release(self) -> None:
        for number in range(1, self.number + 1):    # its own last: until then nobody can take a lower one
            with contextlib.suppress(OSError):
                os.remove(os.path.join(self.folder, f"claim.{number}"))


# ---- Processes and logs ----------------------------------------------------------------------------------------------

def read_log(folder: str) -> list[dict]:
    """The points of log.jsonl; a line that is only half there is left out, and so is one that is no object."""
    points = []
    with contextlib.suppress(OSError):
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    points.append(json.loads(line))
    return [p for p in points if isinstance(p, dict)]


def final_loss(run: Run) -> float | None:
    """Validation loss at the end of a run, None where it has not come to its end."""
    ends = [p["val_loss"] for p in read_log(run.folder) if p.get("type") == "eval" and p["iter"] >= run.max_iters]
    return ends[-1] if ends else None


def speed(run: Run) -> tuple[int, float | None]:
    """(iterations done, median ms of one, None where nothing is known yet)."""
    points = [p for p in read_log(run.folder) if "iter" in p]
    times = sorted(p["ms_per_iter"] for p in points if "ms_per_iter" in p)
    return max((p["iter"] for p in points), default=0), times[len(times) // 2] if times else None


def clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def visible_gpus() -> list[str]:
    """The GPUs that jobs share: those that CUDA_VISIBLE_DEVICES names, else all of this machine."""
    import torch
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(map(str, range(torch.cuda.device_count()))) if named is None else [g for g in named.split(",") if g]


def check_gpus(jobs: int, gpus: int) -> None:
    """End in one sentence where so many jobs cannot have so many GPUs each: those left over would train on the CPU."""
    if gpus and jobs * gpus > len(visible_gpus()):
        fail(f"jobs = {jobs} times gpus = {gpus} is more than the {len(visible_gpus())} GPUs that can be seen here")


def launch(run: Run, job: int, *, jobs: int, gpus: int, program: str) -> subprocess.Popen:
    """Start train.py on a run, or let it go on, as the job-th of so many at a time; what it prints goes into output.txt."""
    os.makedirs(run.folder, exist_ok=True)
    threads = max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // jobs)
    environment = os.environ | dict(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", str(threads)))
    start = [sys.executable]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[job * gpus:(job + 1) * gpus])
    if gpus > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    flags = [f"--{k}={','.join(map(repr, v)) + ',' if isinstance(v, tuple) else v}" for k, v in run.settings.items()]
    with open(os.path.join(run.folder, "settings.json"), "w", encoding="utf-8") as f:
        json.dump(dict(label=run.label, settings=run.settings), f, indent=1)
    with open(os.path.join(run.folder, "output.txt"), "a") as output:
        return subprocess.Popen([*start, os.path.join(HERE, program), *flags, f"--out_dir={run.folder}",
                                 "--init_from=auto"],
                                stdout=output, stderr=subprocess.STDOUT, env=environment)


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_words(run: Run) -> str:
    with contextlib.suppress(OSError):
        with open(os.path.join(run.folder, "output.txt"), errors="replace") as f:
            return (f.read().strip().splitlines() or ["it said nothing"])[-1]
    return "it said nothing"


