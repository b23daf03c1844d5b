"""Checkpoints that are whole or absent: written, read, compared with the run, and restored.

Errors that a user can fix are ValueError, with one sentence. Failed writes are OSError, and leave the old
files as they were: training goes on.
"""
import contextlib
import dataclasses
import math
import os
import secrets
import shutil
import socket

import torch

from lib import distributed
from lib.distributed import on_all_ranks
from lib.files import (lock_out_dir, remove, rename_old_files, replace_file, restarted, unused_suffix,
                       write_temporary)
from lib.log import print0

# what every checkpoint holds
CONTENTS = dict(model=dict, optimizer=dict, scaler=dict, model_args=dict, config=dict, tokenizer=dict,
                iteration=int, tokens=int, flops=float, best_val_loss=float)
# what a checkpoint means that lacks a field, where that is not the field's default
EARLIER = dict(model_args=dict(cheapest_sizes=True))


@dataclasses.dataclass
class Progress:
    """How far a run has come: the counters that a checkpoint holds."""
    iteration: int = 0
    tokens: int = 0
    flops: float = 0.0
    best_val_loss: float = math.inf
    skipped: int = 0            # iterations whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    wandb_id: str | None = None
    trained_on: str | None = None   # digest of the training tokens
    measured_on: str | None = None  # digest of the validation windows that best_val_loss belongs to

    def count(self, finite: bool) -> bool:
        """Counts an iteration: as skipped, unless it was finite. Returns finite."""
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        return finite


class Checkpoints:
    """out_dir/ckpt.pt, the last checkpoint, and out_dir/ckpt_best.pt, the one of lowest validation loss.

    Rank 0 writes them, on its own node. The nodes may share out_dir or have one each, and rank 0 may be on
    another node the next time: the first rank of every node looks for checkpoints, and all ranks use the
    newest. start_settings(), open() and load(), to be called in this order, are collectives, which raise
    ValueError on every rank or on none.

    saved_at      iteration of the last checkpoint, None before there is one
    place         where that is
    resumes       whether the run continues a checkpoint, with its whole state, not just its weights
    settings      the config of the checkpoint that the run resumes; {} if it does not
    run_id        a random name of the run, in all of its checkpoints; old ones lack it, and count as its own
    saved_best    validation loss of ckpt_best.pt, inf before there is one
    failure       why the last checkpoint could not be written
    """

    def __init__(self, out_dir: str, first_of_node: bool = True):
        self.out_dir, self.first_of_node = out_dir, first_of_node
        self.path, self.best_path = (os.path.join(out_dir, name) for name in ("ckpt.pt", "ckpt_best.pt"))
        self.saved_at: int | None = None
        self.place, self.resumes, self.settings = self.path, False, {}
        self.run_id: str | None = None
        self.saved_best = math.inf
        self.agents: list[str] = []     # those of name_of_agent, of all nodes
        self.opened: tuple[str, dict | None] = (self.path, None)  # what open() has chosen, for load()
        self.failure: str | None = None

    def open(self, init_from: str) -> int | None:
        """Finds the newest whole checkpoint of all nodes, and locks rank 0's out_dir. Returns the rank that
        has it; None if there is none.

        init_from: 'scratch', 'resume', 'auto', or the path of a checkpoint whose weights the run starts from,
        *.pt; a GPT-2 is like 'scratch'. Raises ValueError if there is nothing to start from, or out_dir
        cannot be written or is locked.
        """
        source, older = self._find(init_from)
        for line in older:
            print0(line)
        if init_from == "auto" and source is None:
            print0(f"there is no checkpoint in {self.out_dir}: a run from scratch, with random weights")
        elif not self.resumes and distributed.all_reduce_max(float(restarted())):
            print0(f"torchrun has restarted this run, which has no checkpoint in {self.out_dir} on any node: "
                   "it begins again")
        before = (self.opened[1] or {}).get("run_id") if self.resumes else None
        self.run_id = distributed.broadcast(before or secrets.token_hex(8), source or 0)
        on_all_ranks(lambda: distributed.rank() == 0 and lock_out_dir(self.out_dir))
        return source

    def rename_old(self) -> None:
        """Renames what an earlier run has left in every out_dir, unless this run resumes it."""
        if not self.resumes and self.first_of_node:
            for name, new in rename_old_files(self.out_dir).items():
                print0(f"{name} of an earlier run is renamed to {new} in {self.out_dir}")

    def start_settings(self, init_from: str, config_class, config: dict, given: set[str]) -> dict:
        """The settings of a run that starts from the checkpoint that open() would find: the fields of its
        config_class, and mup's, except those that the user has given; {} if there is none. A collective.

        config: the run's keys; given: the names of those that the user has set. Raises ValueError if one that
        is given contradicts the checkpoint.
        """
        source, _ = self._find(init_from)
        if source is None:
            return {}
        path, checkpoint = self.opened
        model_args, before = distributed.broadcast(
            checkpoint and (checkpoint["model_args"], checkpoint["config"]), source)
        try:
            there = dataclasses.asdict(config_class(**model_args))
        except (TypeError, ValueError):  # load() says what differs
            return {}
        del there["vocab_size"]  # the data's
        if not self.resumes:
            del there["dropout"]
        mup = {key: before[key] for key in ("mup", "mup_base_width") if key in before and key not in given}
        return adopt_settings(path, there, config, given) | mup

    def _find(self, init_from: str) -> tuple[int | None, list[str]]:
        """(the rank whose checkpoint is the newest, None without one; what to print of the others)."""
        self.agents = sorted(filter(None, set(distributed.gather(name_of_agent()))))
        if init_from in ("resume", "auto"):
            found = self._newest(self.path, needed=init_from == "resume")
        else:  # after a restart by torchrun this very command has made what is there
            found = self._newest(self.path, needed=False, made_by=self.agents)
        self.resumes = found[0] is not None
        if self.resumes or not init_from.endswith(".pt"):
            return found
        return self._newest(init_from, needed=True)

    def _newest(self, path: str, *, needed: bool, made_by: list | None = None) -> tuple[int | None, list]:
        """_find() for one path. With made_by, only checkpoints that a run of one of these agents wrote count.
        Raises ValueError if there are only broken ones, none where one is needed, or those of two runs."""
        checkpoint = problem = None
        try:
            if self.first_of_node and made_by != []:
                checkpoint = read_checkpoint(path)
                if made_by is not None and not set(made_by) & set(checkpoint.get("agents", ())):
                    checkpoint = None
        except ValueError as e:
            # after a restart by torchrun it may be this run's own
            problem = str(e) if made_by is None or restarted() else None
        report = (checkpoint and checkpoint["iteration"], checkpoint and checkpoint.get("run_id"), problem,
                  problem is not None and os.path.exists(path))
        iterations, run_ids, problems, unreadable = zip(*distributed.gather(report))
        source = max((rank for rank, i in enumerate(iterations) if i is not None),
                     key=lambda rank: (iterations[rank], -rank), default=None)
        if source is None and (needed or any(unreadable)):
            raise ValueError(next((p for p, bad in zip(problems, unreadable) if bad), problems[0]))
        if len(set(run_ids) - {None}) > 1:
            found = ", ".join(f"rank {rank} has one of iteration {iterations[rank]}, of run {run_id}"
                              for rank, run_id in enumerate(run_ids) if run_id is not None)
            raise ValueError(f"the nodes' checkpoints {path} are those of several runs: {found}; move those "
                             "of other runs away")
        older = []
        for rank, i in enumerate(iterations):
            if unreadable[rank] or i is not None and i < iterations[source]:
                what = "that cannot be read" if i is None else f"of iteration {i}, which is older"
                older.append(f"rank {rank} has a checkpoint {what}: all go on from that of rank {source}")
        self.opened = path, checkpoint if source == distributed.rank() else None
        return source, older

    def load(self, source: int, model, optimizer, scaler, config: dict, tokenizer: dict, digests: dict,
             device: str) -> Progress:
        """Puts the checkpoint that open() found on the rank `source` into model, optimizer and scaler of
        every rank, says so, and returns its counters. A run that does not resume takes the weights alone.

        config: the keys of train.py. digests: trained_on and measured_on, as in Progress, of this run's data;
        best losses on other data are forgotten. Raises ValueError if the checkpoint does not fit this run.
        """
        path, checkpoint = self.opened
        self.opened = path, None
        outline = distributed.broadcast(without_values(checkpoint), source)
        checkpoint = outline if checkpoint is None else checkpoint
        self.place = path if source == 0 else f"{path} on the node of rank {source}"

        def restore():
            model_args = dataclasses.asdict(model.config)
            with contextlib.suppress(TypeError, ValueError):  # else the arguments differ, and are named
                checkpoint["model_args"] = dataclasses.asdict(type(model.config)(**checkpoint["model_args"]))
            if not self.resumes:
                checkpoint["model_args"]["dropout"] = model.config.dropout
            # the settings that learning-rate factors depend on
            mup = {key: config[key] for key in ("mup", "mup_base_width")} if self.resumes else {}
            check_checkpoint(path, checkpoint, model_args=model_args, tokenizer=tokenizer, config=mup,
                             model=model)
            if self.resumes:
                restore_checkpoint(path, checkpoint, model, optimizer, scaler)
            else:
                model.load_state_dict(checkpoint["model"])
        on_all_ranks(restore)
        progress = progress_of(checkpoint) if self.resumes else Progress()
        state = [model.state_dict(), optimizer.state_dict()]  # the rest has come with the outline
        distributed.broadcast_tensors(tensors_of(state), source, device)
        if self.resumes:
            self.saved_at = checkpoint["iteration"]
            self.settings = {key: value for key, value in checkpoint["config"].items() if value is not None}
            if "max_iters" in self.settings:  # in old checkpoints lr_decay_iters None meant it
                self.settings.setdefault("lr_decay_iters", self.settings["max_iters"])
            if os.path.realpath(self.settings.get("out_dir", self.out_dir)) != os.path.realpath(self.out_dir):
                progress.wandb_id = None  # a copy of the out_dir, or a moved one, has a wandb run of its own
            self._find_best(progress, digests["measured_on"])
        print0(f"resuming {self.place} at iteration {progress.iteration}" if self.resumes else
               f"starting from the weights of {self.place}")
        for key, before, value in changed_settings(self.settings, config):
            print0(f"  {key} = {value!r} from here on; it was {before!r}")
        if progress.trained_on not in (None, digests["trained_on"]):
            print0("  the training tokens are others from here on")
        return dataclasses.replace(progress, **digests)

    def _find_best(self, progress: Progress, measured_on: str) -> None:
        """Sets saved_best. Forgets best losses, in progress and in ckpt_best.pt, that were measured on other
        windows, and renames such a ckpt_best.pt, and that of another run."""
        if progress.measured_on != measured_on:
            print0(f"the best validation loss so far, {progress.best_val_loss:.4f}, was measured on other "
                   "windows or data: it starts anew")
            progress.best_val_loss = math.inf
        best_loss = math.inf
        with contextlib.suppress(ValueError):  # ckpt_best.pt is missing or unusable
            if self.first_of_node:
                best = read_checkpoint(self.best_path)
                if best.get("measured_on") == measured_on and best.get("run_id") in (None, self.run_id):
                    best_loss = best.get("val_loss", best["best_val_loss"])
                    best_loss = math.inf if best_loss is None else best_loss  # of no evaluation
                else:
                    with contextlib.suppress(OSError):  # another node of a shared folder was first
                        suffix = unused_suffix(self.out_dir, ["ckpt_best.pt"])
                        os.replace(self.best_path, self.best_path + suffix)
        self.saved_best = min(distributed.gather(best_loss))

    def save(self, contents: dict, val_loss: float | None, log) -> None:
        """Writes ckpt.pt, and ckpt_best.pt too if its validation loss is the lowest so far, after the waiting
        lines of `log`, a Logger, which may fail. If a checkpoint cannot be written, it says so, and the
        previous one stays."""
        log.sync()
        best = val_loss is not None and val_loss < self.saved_best
        contents = contents | dict(val_loss=val_loss, agents=self.agents, run_id=self.run_id)
        try:
            best_failure = save_checkpoint(self.path, contents, self.best_path if best else None)
        except OSError as e:
            self.failure = f"it could not be written: {e.strerror}"
            print0(f"the checkpoint of iteration {contents['iteration']} could not be written "
                   f"({e.strerror}): {self.describe()}")
            return
        self.saved_at, self.place, self.failure = contents["iteration"], self.path, None
        if best_failure is not None:
            print0(f"ckpt_best.pt could not be written ({best_failure.strerror}): any older one stays")
        elif best:
            self.saved_best = val_loss

    def advice(self) -> str:
        """describe(), and how to go on from there."""
        how = "; to go on, give the same command with --init_from=resume"
        return self.describe() + (how if self.saved_at is not None else "")

    def describe(self) -> str:
        if self.saved_at is None:
            return "there is no checkpoint yet"
        return f"{self.place} holds the checkpoint of iteration {self.saved_at}"


def name_of_agent() -> str | None:
    """A name of the torchrun that started this process, and restarts it, which no other torchrun on any
    machine has; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    started = ""
    with contextlib.suppress(OSError, IndexError):  # Linux: field 22 is the start time of the process
        with open(f"/proc/{os.getppid()}/stat", encoding="utf-8", errors="replace") as f:
            started = f.read().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {os.getppid()} {started}"


def adopt_settings(place: str, there: dict, config: dict, given: set[str]) -> dict:
    """The entries of `there`, the settings of the weights at `place`, except those that the user has given a
    value other than None. Raises ValueError if such a value differs."""
    given = {key for key in given & there.keys() if config[key] is not None}
    if differing := _differences(*({key: d[key] for key in sorted(given)} for d in (there, config))):
        raise ValueError(f"{place} holds another model: {differing}")
    return {key: value for key, value in there.items() if key not in given}


def progress_of(checkpoint: dict) -> Progress:
    """The counters that a checkpoint holds; those that an older one lacks have their initial values."""
    names = [field.name for field in dataclasses.fields(Progress)]
    return Progress(**{name: checkpoint[name] for name in names if name in checkpoint})


def changed_settings(before: dict, config: dict) -> list[tuple[str, object, object]]:
    """(key, value before, value now) of the settings that a resumed run changes. None in an old checkpoint is
    unknown."""
    return [(key, before[key], value) for key, value in config.items()
            if key not in ("init_from", "out_dir") and before.get(key) not in (None, value)]


def save_checkpoint(path: str, contents: dict, best_path: str | None) -> OSError | None:
    """Writes contents to path atomically, and to best_path first if one is given.

    No tensor is copied, except one at a time on its way from a GPU. Raises OSError if the write fails; both
    files then hold the previous checkpoints. If best_path alone cannot be written, the error is returned. A
    kill between the two leaves path older than best_path: the resumed run makes the same best once more.
    """
    write_temporary(path, lambda f: torch.save(contents, f))
    failure = None
    if best_path is not None:
        try:
            remove(best_path + ".tmp")
            try:
                os.link(path + ".tmp", best_path + ".tmp")  # the same bytes, written once
            except OSError:  # no hard links here
                with open(path + ".tmp", "rb") as f:
                    write_temporary(best_path, lambda g: shutil.copyfileobj(f, g))
            replace_file(best_path)
        except OSError as e:
            failure = e
    replace_file(path)
    return failure


def read_checkpoint(path: str, needed: dict[str, type] = CONTENTS) -> dict:
    """The contents of a checkpoint, its tensors mapped from the file rather than read into memory.

    No code in it is executed. Raises ValueError if it cannot be read, or lacks something that is needed.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}: train one first (--init_from=scratch), or name "
                         "another one, such as an --out_dir") from None
    except (PermissionError, IsADirectoryError) as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None
    except Exception as e:
        is_of_a_run = os.path.basename(path) == "ckpt.pt"
        remedy = ": move it away, or put ckpt_best.pt in its place" if is_of_a_run else ""
        problem = f"is not a checkpoint that can be read ({type(e).__name__})"
        raise ValueError(f"{path} {problem}{remedy}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint of train.py: it holds a {type(checkpoint).__name__}")
    wrong = [name for name, kind in needed.items() if not isinstance(checkpoint.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks a valid {', '.join(wrong)}")
    for name, earlier in EARLIER.items():
        if isinstance(checkpoint.get(name), dict):
            checkpoint[name] = earlier | checkpoint[name]
    return checkpoint


def check_checkpoint(path: str, checkpoint: dict, *, model_args: dict, tokenizer: dict, config: dict,
                     model) -> None:
    """Raises ValueError, naming what differs with both values, unless the checkpoint is of this model and
    vocabulary."""
    comparisons = [
        ("holds another model", checkpoint["model_args"], model_args),
        ("was trained on another vocabulary", checkpoint["tokenizer"], tokenizer),
        ("holds the weights of another model", _shapes(checkpoint["model"]), _shapes(model.state_dict())),
    ]
    for what, there, here in comparisons:
        if differing := _differences(there, here):
            raise ValueError(f"{path} {what}: {differing}")
    for key, value in config.items():
        before = checkpoint["config"].get(key, value)
        if before != value:
            raise ValueError(f"{path} was trained with {key} = {before}, and this run has {value}: a "
                             "resumed run keeps the learning-rate factors of its parameters")


def _differences(there: dict, here: dict, most: int = 20) -> str:
    absent = object()
    def show(value):
        text = "absent" if value is absent else repr(value)
        return text if len(text) <= 200 else text[:200] + "..."  # a vocabulary may have megabytes
    pairs = {key: (there.get(key, absent), here.get(key, absent)) for key in there | here}
    texts = [f"{key} = {show(a)} there and {show(b)} here" for key, (a, b) in pairs.items() if a != b]
    return ", ".join(texts[:most]) + (f", and {len(texts) - most} more" if len(texts) > most else "")


def _shapes(weights: dict) -> dict[str, str]:
    return {name: f"{tuple(w.shape)} {w.dtype}" if isinstance(w, torch.Tensor) else type(w).__name__
            for name, w in weights.items()}


def restore_checkpoint(path: str, checkpoint: dict, model, optimizer, scaler) -> None:
    """Loads a checked checkpoint into a model, its optimizer and its scaler. Raises ValueError if it does not
    fit.

    The optimizer keeps the options that it has, such as betas and weight decay. What it takes over is copied:
    a tensor that is mapped from the file would keep the file's memory, and change if the file did.
    """
    of_checkpoint = ("params", "lr", "lr_multiplier")
    options = [{k: v for k, v in g.items() if k not in of_checkpoint} for g in optimizer.param_groups]
    try:
        model.load_state_dict(checkpoint["model"])
        state = checkpoint["optimizer"]
        groups = state["param_groups"]
        if len(groups) == len(options):  # options such as fused decide the device of the optimizer's state
            state = state | dict(param_groups=[group | own for group, own in zip(groups, options)])
        optimizer.load_state_dict(state)
        if checkpoint["scaler"]:  # {}: the run was not in float16, and its scaler is a new one from here on
            scaler.load_state_dict(checkpoint["scaler"])
        for p, state in optimizer.state.items():
            shapes = dict(exp_avg=p.shape, exp_avg_sq=p.shape, step=())  # Adam's; others are not checked
            for name, value in state.items():
                if not isinstance(value, torch.Tensor):
                    continue
                if value.shape != shapes.get(name, value.shape):
                    raise ValueError(f"{name} of shape {tuple(value.shape)} for weights of {tuple(p.shape)}")
                if value.device.type == "cpu":  # one at a time: the optimizer never exists twice
                    state[name] = value.clone()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        reason = str(e) or type(e).__name__
        raise ValueError(f"{path} does not fit this optimizer or its scaler: {reason}") from None


# ---- The same state on every rank --------------------------------------------------------------------------

def tensors_of(state):
    """The tensors in nested dicts and lists, in order."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors_of(part)


def without_values(state):
    """Nested dicts and lists with zeros for every tensor, of its shape and dtype, as one number in memory."""
    if isinstance(state, torch.Tensor):
        return torch.zeros((), dtype=state.dtype).expand(state.shape)
    if isinstance(state, dict):
        return {key: without_values(part) for key, part in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(without_values, state))
    return state
