"""What a run survives by: signals that wait, a lock, files that are whole or absent, and a wandb that may fail.

Errors that a user can mend are ValueError, one sentence; train.py ends in it on every process. A checkpoint or a log line
that the disk does not take is OSError, with the files as they were: training goes on.
"""
import atexit
import contextlib
import errno
import json
import math
import os
import shutil
import signal
import socket

import torch

from configurator import show

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- Signals --------------------------------------------------------------------------------------------------------


class Stopped(SystemExit):
    """A signal that does not wait."""


class Signals:
    """SIGTERM, SIGINT and SIGHUP as a number to be looked at between iterations; before that, an orderly exit.

    `number` is 0, or the first signal that came once `wait` was set. More of them change nothing: torchrun and a
    terminal may both send one.
    """

    def __init__(self):
        self.number, self.wait = 0, False
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if not self.wait:
            raise Stopped(128 + number)
        self.number = self.number or number


# ---- The out_dir ----------------------------------------------------------------------------------------------------


def take_out_dir(out_dir: str) -> None:
    """Makes out_dir and locks it for as long as this process lives; ValueError if it cannot be, or another run has it.

    The lock is a record lock on out_dir/lock: the kernel drops it when its process dies, on NFS too, and the file left
    behind means nothing. Where the file system or Windows has no such locks, none is taken.
    """
    parents = [out_dir]
    while parents[-1] and not os.path.exists(parents[-1]):
        parents.append(os.path.dirname(parents[-1]))
    try:
        os.makedirs(out_dir, exist_ok=True)
        _lock(os.path.join(out_dir, "lock"))
    except (OSError, UnicodeError) as e:
        for folder in parents[:-1]:  # those that were not there
            with contextlib.suppress(OSError, UnicodeError):
                os.rmdir(folder)
        raise ValueError(f"out_dir {show(out_dir)} cannot be written: {getattr(e, 'strerror', None) or e}") from None
    for name in ("ckpt.pt.tmp", "ckpt_best.pt.tmp", "log.jsonl.tmp"):  # of a killed run
        remove(os.path.join(out_dir, name))


def _lock(path: str) -> None:
    if fcntl is None:
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            owner = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if e.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"another run writes into {os.path.dirname(path)} ({owner or 'unknown'}): wait for its "
                                 "end, or give another --out_dir") from None
            return  # no locks here
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # its last owner has just removed the file: what was locked is not what others would lock
    os.ftruncate(descriptor, 0)
    with contextlib.suppress(OSError):  # a full disk: the message to others will lack the name
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    mine = os.getpid()
    atexit.register(lambda: remove(path) if os.getpid() == mine else None)  # the descriptor stays open until then


def set_aside(out_dir: str) -> list[str]:
    """Renames what an earlier run left to <name>.old, for a run from scratch; the names. A log of no training is nothing."""
    names = [name for name in ("ckpt.pt", "ckpt_best.pt", "log.jsonl") if os.path.exists(os.path.join(out_dir, name))]
    if names == ["log.jsonl"]:
        with open(os.path.join(out_dir, "log.jsonl"), "rb") as f:
            names = names if any(b'"train"' in line for line in f) else []
    for name in names:
        os.replace(os.path.join(out_dir, name), os.path.join(out_dir, name + ".old"))
    return names


def remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def write_aside(path: str, write) -> None:
    """Calls write(file) on the new file path + ".tmp" and syncs it; raises OSError, and removes it, if it cannot."""
    remove(path + ".tmp")  # never written in place: it may be another name of ckpt_best.pt
    try:
        with open(path + ".tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except BaseException as e:
        remove(path + ".tmp")
        if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):  # how torch.save passes it on
            raise e.__context__ from None
        raise


def move_into_place(path: str) -> None:
    os.replace(path + ".tmp", path)
    if os.name != "nt":  # Windows cannot open a folder, and needs no sync of one
        folder = os.open(os.path.dirname(path) or os.curdir, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

KINDS = dict(model=dict, optimizer=dict, scaler=dict, model_args=dict, config=dict, tokenizer=dict, iteration=int,
             tokens=int, flops=float, best_val_loss=float)  # what every checkpoint holds


def save_checkpoint(path: str, contents: dict, best_path: str | None) -> None:
    """Writes contents beside path, then puts them in its place, and in that of best_path before if one is given.

    No copy of the tensors is made but one at a time on its way from a GPU. Raises OSError if the disk does not take
    it; path then holds the previous checkpoint. A kill between the two leaves path older than best_path: the resumed
    run makes the same best once more.
    """
    write_aside(path, lambda f: torch.save(contents, f))
    failure = None
    if best_path is not None:
        try:
            remove(best_path + ".tmp")
            try:
                os.link(path + ".tmp", best_path + ".tmp")  # the same bytes twice, without writing them twice
            except OSError:
                with open(path + ".tmp", "rb") as f:
                    write_aside(best_path, lambda g: shutil.copyfileobj(f, g))
            move_into_place(best_path)
        except OSError as e:
            failure = e
    move_into_place(path)
    if failure is not None:
        raise failure


def read_checkpoint(path: str) -> dict:
    """The contents of a checkpoint, its tensors mapped from the file rather than read into memory.

    Nothing of it is executed. Raises ValueError if it is not a checkpoint of train.py.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path} to resume from: use --init_from=scratch, or another --out_dir, and "
                         "let every node see the same one") from None
    except Exception as e:
        raise ValueError(f"{path} is not a checkpoint that can be read ({type(e).__name__}): remove it, or put "
                         "ckpt_best.pt in its place") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint of train.py: it holds a {type(checkpoint).__name__}")
    wrong = [name for name, kind in KINDS.items() if not isinstance(checkpoint.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of train.py: without a sound {', '.join(wrong)}")
    return checkpoint


def check_checkpoint(path: str, checkpoint: dict, *, model_args: dict, tokenizer: dict, config: dict, model) -> None:
    """Raises ValueError, naming what differs with both values, if the checkpoint is not of this model and vocabulary."""
    differing = _differences(checkpoint["model_args"], model_args)
    if differing:
        raise ValueError(f"{path} holds another model: {differing}")
    differing = _differences(checkpoint["tokenizer"], tokenizer)
    if differing:
        raise ValueError(f"{path} was trained on another vocabulary: {differing}")
    tensors = [{name: _shape(value) for name, value in weights.items()}
               for weights in (checkpoint["model"], model.state_dict())]
    differing = _differences(*tensors)
    if differing:
        raise ValueError(f"{path} holds the weights of another model: {differing}")
    for key in ("mup", "mup_base_width"):
        before = checkpoint["config"].get(key, config[key])
        if before != config[key]:
            raise ValueError(f"{path} was trained with {key} = {before}, and this run has {config[key]}: a resumed run "
                             "keeps the learning-rate factors of its parameters")


def _differences(there: dict, here: dict, most: int = 20) -> str:
    absent = object()
    pairs = {k: (there.get(k, absent), here.get(k, absent)) for k in [*there, *(k for k in here if k not in there)]}
    texts = [f"{k} = {'absent' if a is absent else repr(a)} there and {'absent' if b is absent else repr(b)} here"
             for k, (a, b) in pairs.items() if a is absent or b is absent or a != b]
    return ", ".join(texts[:most]) + (f", and {len(texts) - most} more" if len(texts) > most else "")


def _shape(value) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def restore(path: str, checkpoint: dict, model, optimizer, scaler) -> None:
    """Loads a checkpoint that was checked into a model, its optimizer and its scaler; ValueError if it does not fit.

    The optimizer keeps the betas and weight decays that it has. What it takes over is copied: a tensor that is mapped
    from the file would keep the file's memory, and change if the file did.
    """
    hyperparameters = [dict(betas=g["betas"], weight_decay=g["weight_decay"]) for g in optimizer.param_groups]
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        for p, state in optimizer.state.items():
            for name, value in state.items():
                if value.shape not in (p.shape, ()):
                    raise ValueError(f"{name} of shape {tuple(value.shape)} for weights of shape {tuple(p.shape)}")
                if value.device.type == "cpu":  # one at a time: the optimizer never exists twice
                    state[name] = value.clone()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"{path} does not fit this optimizer or its scaler: {str(e) or type(e).__name__}") from None
    for group, values in zip(optimizer.param_groups, hyperparameters):
        group.update(values)


# ---- log.jsonl ------------------------------------------------------------------------------------------------------


class Log:
    """log.jsonl: one JSON object a line, whole lines only, however the disk and the process fare.

    Opened, it holds what a run that reached `iteration` had logged before it: later points are about to be made again.
    Lines that a full disk does not take wait in memory, in order.
    """

    def __init__(self, path: str, iteration: int):
        kept = []
        if os.path.exists(path):
            with open(path, "rb") as f:
                for line in f:
                    with contextlib.suppress(ValueError):  # a half line, or what a power cut left
                        point = json.loads(line)
                        if isinstance(point, dict) and point.get("iter", -1) < iteration:
                            kept.append(line.rstrip(b"\n") + b"\n")
        write_aside(path, lambda f: f.writelines(kept))
        move_into_place(path)
        self.file, self.waiting = open(path, "ab", buffering=0), b""

    def write(self, point: dict) -> None:
        """Appends a line, numbers that are not finite as null; raises OSError if it is the first that has to wait."""
        already = bool(self.waiting)
        self.waiting += (json.dumps(_finite(point), allow_nan=False) + "\n").encode()
        try:
            self._write_waiting()
        except OSError:
            if not already:
                raise

    def sync(self) -> None:
        """Lines that waited are tried once more; those that are written are on the disk when it returns."""
        with contextlib.suppress(OSError):
            self._write_waiting()
        os.fsync(self.file.fileno())

    def _write_waiting(self) -> None:
        end = os.fstat(self.file.fileno()).st_size
        written = 0
        try:
            while written < len(self.waiting):  # one write, unless the disk is full
                written += self.file.write(self.waiting[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file.fileno(), end)
            raise
        self.waiting = b""


def _finite(x):
    """x with None in place of every number in it that JSON does not have."""
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


# ---- wandb ----------------------------------------------------------------------------------------------------------


class Wandb:
    """A wandb run, or nothing: whatever it raises is said once, and switches it off."""

    def __init__(self, say, **options):
        self.say, self.run = say, None

        def start():
            import wandb
            return wandb.init(**options)
        self.run = self._attempt(start)

    def log(self, point: dict) -> None:
        if self.run is not None:
            self._attempt(lambda: self.run.log(point, step=point["iter"]))

    def finish(self) -> None:
        if self.run is not None:
            self._attempt(lambda: self.run.finish())

    def _attempt(self, call):
        try:
            return call()
        except Stopped:
            raise
        except (Exception, SystemExit) as e:
            self.say(f"wandb is off: {type(e).__name__}: {e}")
            self.run = None
