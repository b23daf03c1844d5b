"""Runs that are killed, or told by a signal to end, at any moment; and kill_test.py, which does it many times."""
import os
import random
import shutil
import signal

import pytest
import torch

from tests import kill_test
import model
from lib import distributed as processes
from lib import checkpoint as survive
from tests.conftest import PROCESSES, TINY, Started, _run_script, free_port
from tests.runs import assert_same_checkpoint, assert_same_course, load, read_log, untimed

DROPOUT = dict(dropout=0.1)


def test_killed_at_random_moments(python_text, tmp_path):
    """kill_test.py, with few kills: what it asserts is its exit."""
    arguments = ["config/moe.py", f"--dataset={python_text}", "--max_iters=20", "--lr_decay_iters=20"]
    figures = kill_test.kill_test(lambda flags: Started(tmp_path, flags), str(tmp_path), 4, 3, arguments)
    assert figures["kills"] == sum(figures["places"].values()) == 4 and figures["half_lines"] == 0


def stay_in_the_first_save():
    def endless_save(contents, f):
        f.write(b"half a checkpoint")
        f.flush()
        signal.pause()
    torch.save = endless_save


def test_kill_test_finds_the_moment_of_writing(python_text, flags, tmp_path):
    """However long it lasts: a run that gets no further than its first checkpoint is killed there."""
    class First(random.Random):
        def randrange(self, *_):
            return 0
    place = kill_test.kill_once(lambda arguments: Started(tmp_path, arguments, before=stay_in_the_first_save), flags(**TINY),
                                str(tmp_path / "out"), None, First(0))
    assert place == "writing a checkpoint"
    assert b"half a checkpoint".startswith((tmp_path / "out" / "ckpt.pt.tmp").read_bytes())


def test_kill_test_sees_a_difference(trained, tmp_path):
    """A weight, a counter or a point of the log that differs by the least there is."""
    whole = trained(**TINY)
    for name, change in {"model": lambda c: c["model"]["wte.weight"].view(-1)[:1].nextafter_(torch.tensor([9.0])),
                         "optimizer": lambda c: c["optimizer"]["state"][0]["exp_avg"].view(-1)[:1].nextafter_(torch.tensor([9.0])),
                         "tokens": lambda c: c.update(tokens=c["tokens"] + 1)}.items():
        out = tmp_path / name
        shutil.copytree(whole, out)
        assert kill_test.differences(str(out), str(whole)) == []
        checkpoint = load(out / "ckpt.pt")
        change(checkpoint)
        os.remove(out / "ckpt.pt")
        torch.save(checkpoint, out / "ckpt.pt")
        lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
        (out / "log.jsonl").write_text("".join(lines[:-1]))
        assert kill_test.differences(str(out), str(whole)) == [name, "log.jsonl"]


def die_between_the_two_checkpoints():
    """After ckpt_best.pt is in place, before ckpt.pt is, at the third save."""
    replace, calls = os.replace, []

    def counted(source, target):
        if str(target).endswith("ckpt.pt"):
            calls.append(target)
            if len(calls) == 3:
                os._exit(9)
        return replace(source, target)
    os.replace = counted


def die_in_the_first_save():
    def half_save(contents, f):
        f.write(b"half a checkpoint")
        f.flush()
        os._exit(9)
    torch.save = half_save


def test_killed_between_best_and_last(train, trained, tmp_path):
    """The best checkpoint is not lost, nor written through by the next save, whose temporary file shares its bytes."""
    out = train(tmp_path / "out", before=die_between_the_two_checkpoints, code=9)
    assert load(out / "ckpt.pt")["iteration"] == 5 and load(out / "ckpt_best.pt")["iteration"] == 10
    train(out, init_from="resume", before=die_in_the_first_save, code=9)
    assert load(out / "ckpt.pt")["iteration"] == 5 and load(out / "ckpt_best.pt")["iteration"] == 10
    train(out, init_from="auto")
    assert_same_checkpoint(out, trained())
    assert load(out / "ckpt_best.pt")["best_val_loss"] == load(out / "ckpt.pt")["best_val_loss"]


def die_in_a_save():
    """In the save of iteration SAVE, before a byte of it is written."""
    save = torch.save

    def dying(contents, f):
        if contents["iteration"] == int(os.environ["SAVE"]):
            os._exit(9)
        return save(contents, f)
    torch.save = dying


def test_checkpoints_between_evaluations(run, flags, trained, tmp_path):
    """Those of checkpoint_interval change nothing, and a killed run goes on from one."""
    out = tmp_path / "out"
    for iteration, last in ((8, 5), (10, 8)):
        shutil.rmtree(out, ignore_errors=True)
        assert run("train.py", *flags(checkpoint_interval=4), before=die_in_a_save, SAVE=str(iteration)).returncode == 9
        assert load(out / "ckpt.pt")["iteration"] == last
    done = run("train.py", *flags(checkpoint_interval=4, init_from="auto"))
    assert done.returncode == 0 and "at iteration 8" in done.stdout, done.stderr
    assert_same_checkpoint(out, trained())
    assert untimed(out) == untimed(trained())


def test_scratch_sets_an_earlier_run_aside(train, trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained(**TINY), out)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    train(out, **TINY | {"max_iters": 2})
    assert {name: (out / f"{name}.old").read_bytes() for name in before} == before
    assert load(out / "ckpt.pt")["iteration"] == 2 and max(read_log(out)[2]) == 2


def test_a_restart_by_torchrun_is_not_from_scratch(train, run, flags, tmp_path):
    """Whatever init_from was: what is there, the same command has made."""
    train(tmp_path / "out", max_iters=2)
    done = run("train.py", *flags(max_iters=4), TORCHELASTIC_RESTART_COUNT="1")
    assert done.returncode == 0 and "at iteration 2" in done.stdout, done.stderr


# Signals

def signals_in_an_iteration():
    """The process sends itself a signal, twice, in the middle of its 8th training batch."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    forward, calls = model.GPT.forward, []

    def counted(self, *args, **options):
        calls.append(self.training)
        if sum(calls) == 15 and self.training and os.environ.get("RANK", "0") == os.environ.get("TO", "0"):
            for _ in range(2):
                os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        return forward(self, *args, **options)
    model.GPT.forward = counted


def test_signals_wait_when_told_to():
    """Before that they end the program; the first counts; one that nohup has switched off stays off."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals = survive.Signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(SystemExit) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.code == 128 + 15 and signals.number == 0
        signal.signal(signal.SIGHUP, lambda *_: pytest.fail("SIGHUP was not taken over"))
        signals = survive.Signals()
        signals.wait = True
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.number == signal.SIGHUP
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("name, number", [("SIGTERM", 15), ("SIGINT", 2)])
def test_a_signal_ends_the_iteration_and_saves(name, number, run, flags, trained, tmp_path):
    done = run("train.py", *flags(**DROPOUT), before=signals_in_an_iteration, SIGNAL=name)
    assert done.returncode == 128 + number and not done.stderr, done.stderr
    assert name in done.stdout and "iteration 8" in done.stdout
    assert load(tmp_path / "out" / "ckpt.pt")["iteration"] == 8
    done = run("train.py", *flags(init_from="auto", **DROPOUT))
    assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    assert_same_checkpoint(tmp_path / "out", trained(**DROPOUT))
    assert untimed(tmp_path / "out") == untimed(trained(**DROPOUT))


def test_a_signal_to_one_of_two_processes_ends_both(run, flags, trained, tmp_path):
    """They end the same iteration, and the first one saves. One process was before them, one goes on: the same course."""
    settings = dict(gradient_accumulation_steps=4, batch_size=2, lr_decay_iters=20)
    done = run("train.py", *flags(max_iters=4, **settings))
    assert done.returncode == 0, done.stderr
    done = run("train.py", *flags(init_from="auto", **settings), processes=2, before=signals_in_an_iteration, SIGNAL="SIGTERM", TO="1")
    assert done.returncode == 128 + 15 and not done.stderr, done.stderr
    assert load(tmp_path / "out" / "ckpt.pt")["iteration"] == 4 + 8
    done = run("train.py", *flags(init_from="auto", **settings))
    assert done.returncode == 0, done.stderr
    assert_same_course(tmp_path / "out", trained(**settings))


# torchrun

def die_once():
    """The second process is killed in its 9th iteration, the first time it is started."""
    forward, calls = model.GPT.forward, []

    def counted(self, *args, **options):
        calls.append(self.training)
        if sum(calls) == 17 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *args, **options)
    model.GPT.forward = counted


def work(folder, arguments):
    """A worker of torchrun."""
    name = f"{os.environ['RANK']}.{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    _run_script("train.py", arguments, {}, f"{folder}/stdout{name}", f"{folder}/stderr{name}", die_once)


def torchrun(flags, folder, arguments):
    """torchrun of its own flags, but its workers are forked and not Python programs that would import torch again."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch
    config, *_ = run.config_from_args(run.parse_args([*flags, "--start-method=fork", "train.py"]))
    elastic_launch(config, work)(folder, arguments)


@pytest.mark.parametrize("message, lost", [
    ("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234. This is typical. Look", True),
    ("[/x/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete", True),
    ("NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.2", True),
    ("[/x/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4", False),
    ("CUDA out of memory. Tried to allocate 2.00 GiB", False), ("the compiler timed out", False),
    ("mat1 and mat2 shapes cannot be multiplied", False)])
def test_only_a_lost_process_is_told_without_a_traceback(message, lost, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    for error in (RuntimeError(message), ValueError(message)):
        try:
            raise error
        except Exception as e:
            processes.tell(type(e), e, e.__traceback__)
        said = capsys.readouterr().err
        if lost and isinstance(error, RuntimeError):
            assert len(said.splitlines()) == 1 and said.startswith("error: rank 3: a process of this run was lost (")
            assert "gloo" not in said and "typical" not in said
        else:
            assert "Traceback" in said and message in said


def test_torchrun_restarts_a_killed_worker(flags, trained, tmp_path):
    """torchrun starts both again, and they go on from the checkpoint; the one left alone says what happened to it."""
    settings = dict(gradient_accumulation_steps=4, batch_size=2, checkpoint_interval=3)
    process = PROCESSES.Process(target=torchrun, args=(
        ["--nproc-per-node=2", "--max-restarts=3", f"--master-port={free_port()}"], str(tmp_path),
        [str(a) for a in flags(**settings, init_from="auto")]))
    process.start()
    process.join(600)
    process.kill()
    process.join()
    said = {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path) if name.startswith("std")}
    assert process.exitcode == 0 and len(said) == 8, said
    left = said["stderr0.0"].splitlines()
    assert len(left) == 1 and left[0].startswith("error: rank 0: a process of this run was lost (") and "--init_from=auto" in left[0]
    assert "resuming" not in said["stdout0.0"] and "at iteration 6" in said["stdout0.1"] and not said["stderr0.1"]
    assert_same_course(tmp_path / "out", trained(**settings))
