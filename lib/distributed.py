"""The ranks of a run, as torchrun starts them.

connect, all_reduce_*, gather, broadcast*, on_all_ranks and require_same are collectives: every rank must call
them. Before connect(), and so without DDP, they act on this process alone.
"""
import os
import re
import secrets
import sys
import time

import torch
import torch.distributed as dist

# GPU-only backends, each with gloo beside it for CPU tensors
WITH_HOSTS = {"nccl": "cpu:gloo,cuda:nccl", "xccl": "cpu:gloo,xpu:xccl"}

# what the backends say when a peer is gone
PEER_IS_LOST = re.compile(
    r"(closed|reset|aborted) by (peer|remote)|connection (was )?(closed|reset|refused|aborted)|socket closed|"
    r"broken pipe|timed out waiting \d+ ?ms for (recv|send)|remote ?(process|error)", re.IGNORECASE)


def connect(backend: str) -> None:
    """Joins the process group that the environment describes, if any. Raises ValueError if that fails."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    both = WITH_HOSTS.get(backend, backend)
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(name_of_start(store, rank, world_size), store)
        dist.init_process_group(both, store=store, rank=rank, world_size=world_size)
    except (RuntimeError, ValueError) as e:
        advice = "; set GLOO_SOCKET_IFNAME to the network interface of the nodes" if "gloo" in both else ""
        raise ValueError(f"the {os.environ['WORLD_SIZE']} processes cannot be connected by backend "
                         f"{both!r}: {str(e).splitlines()[0]}{advice}") from None
    sys.excepthook = excepthook


def name_of_start(store, rank: int, world_size: int, seconds: float = 1800.0) -> str:
    """A name that only these ranks have, for their keys in a store. torchrun's store outlives a restart, with
    the addresses of dead processes in it, and the nodes of a run may count different numbers of restarts.

    Each rank answers rank 0's nonce with one of its own, and rank 0 repeats the pair: keys left by an earlier
    start lack one of the two. Raises RuntimeError if a rank is still missing after so many seconds.
    """
    nonce, deadline = secrets.token_hex(8), time.monotonic() + seconds

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def wait(other: int) -> None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {other} is missing after {seconds:g} s")
        time.sleep(0.05)

    if rank == 0:
        store.set("nonce", nonce)
        for other in range(1, world_size):
            while not (answer := read(f"answer {other}")).startswith(nonce):
                wait(other)
            store.set(f"accepted {other}", answer)
        return nonce
    while not (accepted := read(f"accepted {rank}")).endswith(nonce):
        if first := read("nonce"):
            store.set(f"answer {rank}", f"{first} {nonce}")
        wait(0)
    return accepted.split()[0]


def disconnect() -> None:
    if is_connected():
        dist.destroy_process_group()


def is_connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def all_reduce_mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks of x, a tensor of any shape; in place."""
    if is_connected():
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
        x /= dist.get_world_size()
    return x


def all_reduce_max(x: float) -> float:
    """The largest x of all ranks, exchanged by their hosts without waiting for a device."""
    if is_connected():
        x = torch.tensor(x, dtype=torch.float32)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x.item()
    return x


def rank() -> int:
    return dist.get_rank() if is_connected() else 0


def world_size() -> int:
    return dist.get_world_size() if is_connected() else 1


def gather(x) -> list:
    """[x of rank 0, x of rank 1, ...]; any Python object that can be pickled."""
    everyone = [x] * world_size()
    if is_connected():
        dist.all_gather_object(everyone, x)
    return everyone


def broadcast(x, source: int):
    """x of the rank `source`: any Python object that can be pickled."""
    box = [x]
    if is_connected():
        dist.broadcast_object_list(box, src=source)
    return box[0]


def broadcast_tensors(tensors, source: int, device: str) -> None:
    """Gives every tensor, in place, its value on the rank `source`, sent via the backend's device."""
    if is_connected():
        for tensor in tensors:
            sent = tensor.detach().to(device).contiguous()
            dist.broadcast(sent, src=source)
            tensor.detach().copy_(sent)


def on_all_ranks(function, *args):
    """function(*args) on every rank. If it raises ValueError on one, every rank raises the first one's
    sentence."""
    result = error = None
    try:
        result = function(*args)
    except ValueError as e:
        error = str(e)
    for error in gather(error):
        if error is not None:
            raise ValueError(error)
    return result


def require_same(values: dict) -> None:
    """Raises ValueError, which names the keys, if the values of a dict differ between ranks."""
    first, *others = gather(values)
    for rank, other in enumerate(others, 1):
        keys = [key for key in first | other if first.get(key) != other.get(key)]
        if keys:
            on_first, on_other = ("; ".join(f"{key} = {str(there.get(key))[:80]}" for key in keys)
                                  for there in (first, other))
            raise ValueError(f"the processes differ: {on_first} on rank 0, and {on_other} on rank {rank}; "
                             "all need the same command, data and versions")


def excepthook(kind, error, traceback) -> None:
    """A sys.excepthook: one sentence when another rank is lost, the traceback of any other error."""
    if issubclass(kind, RuntimeError) and PEER_IS_LOST.search(str(error)):
        # the message is like "[file.cc:1] Connection closed by peer. A long explanation"
        place, _, reason = str(error).partition("] ")
        reason = (reason if place.startswith("[") else str(error)).splitlines()[0].split(". ")[0]
        print(f"error: rank {os.environ.get('RANK')}: a process of this run was lost ({reason}); resume with "
              "--init_from=resume", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
