"""lib/distributed.py: what ranks agree on, without DDP and with it, and what is printed when one of them is
lost."""
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig

from lib import distributed
from tests.conftest import PROCESSES, meeting_place


def even_numbers_alone(number):
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


def test_without_ddp_nothing_is_exchanged():
    assert not distributed.is_connected()
    x = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce_mean(x) is x and x.tolist() == [1, 2]
    assert distributed.all_reduce_max(3.5) == 3.5
    assert distributed.on_all_ranks(even_numbers_alone, 4) == 4
    with pytest.raises(ValueError, match="^3 is odd$"):
        distributed.on_all_ranks(even_numbers_alone, 3)
    distributed.disconnect()


def exchange(rank, environment, results):
    """One of three ranks. It calls every collective and puts what it gets into `results`."""
    os.environ |= environment | {"RANK": str(rank)}
    distributed.connect("gloo")
    mean = distributed.all_reduce_mean(torch.tensor([[float(rank)], [6.0]])).tolist()
    most = distributed.all_reduce_max(-float(rank))
    same = distributed.on_all_ranks(even_numbers_alone, 2 * rank)
    try:
        distributed.on_all_ranks(even_numbers_alone, 4 + rank)
        error = None
    except ValueError as e:
        error = str(e)
    distributed.disconnect()
    results.put((rank, mean, most, same, error, distributed.is_connected()))


def test_three_ranks_agree():
    """The mean and the maximum are everyone's. An error of one rank is raised on all, in its sentence."""
    results, (_store, environment) = PROCESSES.Queue(), meeting_place(3)
    ranks = [PROCESSES.Process(target=exchange, args=(rank, environment, results)) for rank in range(3)]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=600) for _ in ranks)
    for process in ranks:
        process.join(600)
    assert found == [(rank, [[1.0], [6.0]], 0.0, 2 * rank, "5 is odd", False) for rank in range(3)]


def connect_again(rank, environment, results):
    """One of three ranks; its node's torchrun has counted restarts of its own."""
    os.environ |= environment | {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(rank % 2)}
    distributed.connect("gloo")
    results.put((rank, distributed.gather(rank)))
    results.close()
    results.join_thread()
    os._exit(0)  # without a word to the store, as after SIGKILL


def test_a_restart_finds_nothing_of_the_start_before():
    """In the same store, whatever each node's count of restarts is, and with what a start has left that died
    on its way."""
    results, (store, environment) = PROCESSES.Queue(), meeting_place(3)
    for _ in range(3):
        ranks = [PROCESSES.Process(target=connect_again, args=(rank, environment, results))
                 for rank in range(3)]
        for process in reversed(ranks):
            process.start()
            time.sleep(0.1)
        assert sorted(results.get(timeout=120) for _ in ranks) == [(rank, [0, 1, 2]) for rank in range(3)]
        for process in ranks:
            process.join(60)
        store.set("word", "of one that died")


def test_a_rank_that_never_comes_is_missed():
    store = dist.HashStore()
    for rank, missing in ((0, 1), (1, 0)):
        with pytest.raises(RuntimeError, match=f"rank {missing} is missing after 0.2 s"):
            distributed.name_of_start(store, rank, 2, seconds=0.2)


@pytest.mark.parametrize("backend, expected", [
    ("nccl", {"cpu": "gloo", "cuda": "nccl"}), ("cpu:gloo,cuda:nccl", {"cpu": "gloo", "cuda": "nccl"}),
    ("xccl", {"cpu": "gloo", "xpu": "xccl"}), ("gloo", {"cpu": "gloo"})])
def test_hosts_have_a_backend_of_their_own(backend, expected, monkeypatch):
    """all_reduce_max exchanges tensors of the hosts, whatever the backend of the GPUs."""
    chosen = []
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(distributed, "name_of_start", lambda *_: "start")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.connect(backend)
    found = BackendConfig(dist.Backend(chosen[0])).get_device_backend_map()
    assert {device: str(found[device]) for device in expected} == expected


def test_a_group_that_cannot_be_connected_is_one_sentence(monkeypatch):
    for key, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="port").items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="the 2 processes cannot be connected by backend 'gloo'") as error:
        distributed.connect("gloo")
    assert "\n" not in str(error.value)


LOST = [
    "[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234. This is typical. Look",
    "[/x/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    "NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.2"]
OTHER = [
    "[/x/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4",
    "CUDA out of memory. Tried to allocate 2.00 GiB", "the compiler timed out",
    "mat1 and mat2 shapes cannot be multiplied"]


def printed_by_excepthook(error, capsys):
    try:
        raise error
    except Exception as e:
        distributed.excepthook(type(e), e, e.__traceback__)
    return capsys.readouterr().err


@pytest.mark.parametrize("message", LOST)
def test_a_lost_process_is_one_sentence(message, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    printed = printed_by_excepthook(RuntimeError(message), capsys)
    assert len(printed.splitlines()) == 1
    assert printed.startswith("error: rank 3: a process of this run was lost (")
    assert "gloo" not in printed and "typical" not in printed


@pytest.mark.parametrize("error", [*map(RuntimeError, OTHER), *map(ValueError, LOST)], ids=str)
def test_every_other_error_keeps_its_traceback(error, capsys):
    printed = printed_by_excepthook(error, capsys)
    assert "Traceback" in printed and str(error) in printed
