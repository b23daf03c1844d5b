"""The processes of a run, as torchrun starts them: what they agree on, and what is said when one of them is lost.

All of them call a function here together, but for tell. Before connect, and so in a run of one process, each is alone.
"""
import os
import re
import sys

import torch
import torch.distributed as dist

from configurator import fail

LOST = re.compile(r"(closed|reset|aborted) by (peer|remote)|connection (was )?(closed|reset|refused|aborted)|socket closed|"
                  r"broken pipe|timed out waiting \d+ ?ms for (recv|send)|remote ?(process|error)", re.IGNORECASE)


def connect(backend: str | None, device_type: str) -> None:
    """Connects as many as the environment says; ends the program in one sentence if that fails."""
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
        # torchrun's store outlives a restart: the addresses of processes that are gone must not be found in it
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend or ("nccl" if device_type == "cuda" else "gloo"), store=store, rank=rank,
                                world_size=world_size)
    except (RuntimeError, ValueError) as e:
        fail(f"the {os.environ['WORLD_SIZE']} processes cannot be connected by backend {backend!r}: {str(e).splitlines()[0]}")
    sys.excepthook = tell


def disconnect() -> None:
    if connected():
        dist.destroy_process_group()


def connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def wait_for_all() -> None:
    if connected():
        dist.barrier()


def mean(x: torch.Tensor) -> torch.Tensor:
    """The mean of x, of any shape, over the processes; in place."""
    if connected():
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
        x /= dist.get_world_size()
    return x


def largest(x: float, device: str) -> float:
    """The largest x of all processes."""
    if connected():
        x = torch.tensor(x, dtype=torch.float32, device=device)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x.item()
    return x


def together(make, *args):
    """make(*args) on every process; where it raises ValueError on one of them, all end in its sentence."""
    result = error = None
    try:
        result = make(*args)
    except ValueError as e:
        error = str(e)
    errors = [error]
    if connected():
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, error)
    if any(errors):
        disconnect()
        fail(next(filter(None, errors)))
    return result


def tell(kind, error, traceback) -> None:
    """A sys.excepthook: one sentence where the others do not answer because one of them is gone; the traceback of all else."""
    if issubclass(kind, RuntimeError) and LOST.search(str(error)):
        place, _, reason = str(error).partition("] ")  # "[library.cc:1] Connection closed by peer. A long explanation"
        reason = (reason if place.startswith("[") else str(error)).splitlines()[0].split(". ")[0]
        print(f"error: rank {os.environ.get('RANK')}: a process of this run was lost ({reason}); resume with --init_from=auto",
              file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
