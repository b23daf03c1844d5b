"""Runs that are killed or end by a signal, at any moment, and go on; and kill_test.py, which does it many
times."""
import atexit
import functools
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import model
from data import tokenizer
from lib.signals import DeferredSignals, Stopped
from tests import kill_test
from tests.conftest import PROCESSES, TINY, ForkedProgram, run_script
from tests.runs import (assert_one_sentence, assert_same_checkpoint, assert_same_course, in_float64, load,
                        read_log, untimed)

DROPOUT = dict(dropout=0.1)


# kill_test.py

def test_runs_killed_at_random_moments_end_as_one_left_alone(python_text, tmp_path):
    """What kill_test asserts raises SystemExit."""
    arguments = ["config/moe.py", f"--dataset={python_text}", "--max_iters=20", "--lr_decay_iters=20"]
    start = functools.partial(ForkedProgram, tmp_path)
    figures = kill_test.kill_test(start, str(tmp_path), 4, 3, arguments)
    assert figures["kills"] == 4 and figures["half_lines"] == 0
    assert figures["places"].keys() - {"before the first checkpoint"}, figures


def stay_in_the_first_save():
    def endless_save(contents, f):
        f.write(b"half a checkpoint")
        f.flush()
        signal.pause()
    torch.save = endless_save


def test_kill_test_finds_the_moment_of_writing(flags, tmp_path):
    """A run that never ends its first save is killed there."""
    class First(random.Random):
        def randrange(self, *_):
            return 0
    start = functools.partial(ForkedProgram, tmp_path, before=stay_in_the_first_save)
    place = kill_test.kill_once(start, flags(**TINY), str(tmp_path / "out"), None, First(0))
    assert place == "writing a checkpoint"
    assert b"half a checkpoint".startswith((tmp_path / "out" / "ckpt.pt.tmp").read_bytes())


def least_change(tensor):
    """Moves one number of the tensor to its neighbour in floating point, in place."""
    tensor.view(-1)[:1].nextafter_(torch.tensor([9.0]))


@pytest.mark.parametrize("name, change", [
    ("model", lambda c: least_change(c["model"]["wte.weight"])),
    ("optimizer", lambda c: least_change(c["optimizer"]["state"][0]["exp_avg"])),
    ("tokens", lambda c: c.update(tokens=c["tokens"] + 1))], ids=["weight", "moment", "counter"])
def test_kill_test_sees_the_least_difference(name, change, trained, tmp_path):
    whole, out = trained(**TINY), tmp_path / "out"
    shutil.copytree(whole, out)
    assert kill_test.differences(str(out), str(whole)) == []
    checkpoint = load(out / "ckpt.pt")
    change(checkpoint)
    os.remove(out / "ckpt.pt")  # its bytes are ckpt_best.pt's too
    torch.save(checkpoint, out / "ckpt.pt")
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:-1]))
    assert kill_test.differences(str(out), str(whole)) == [name, "log.jsonl"]


# Kills at chosen moments

def die_while_saving(iteration):
    """The process dies with half the checkpoint of this iteration written."""
    save = torch.save

    def dying_save(contents, f):
        if contents["iteration"] == iteration:
            f.write(b"half a checkpoint")
            f.flush()
            os._exit(9)
        return save(contents, f)
    torch.save = dying_save


def test_killed_while_it_writes_a_checkpoint(trained, train, tmp_path):
    """The run goes on from the last whole checkpoint, and the half of a log line is dropped."""
    out = train(tmp_path / "out", before=functools.partial(die_while_saving, 10), code=9)
    assert load(out / "ckpt.pt")["iteration"] == 5 and 9 in read_log(out)[1]
    with open(out / "log.jsonl", "a") as log:
        log.write('{"type": "train", "iter": 1')
    train(out, init_from="resume")
    assert untimed(out) == untimed(trained())
    assert_same_checkpoint(out, trained())
    assert sorted(os.listdir(out)) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl"]


def die_between_the_two_files():
    """At the third save, when ckpt_best.pt is in place and ckpt.pt is not yet."""
    replace, calls = os.replace, []

    def counted(source, target):
        if str(target).endswith("ckpt.pt"):
            calls.append(target)
            if len(calls) == 3:
                os._exit(9)
        return replace(source, target)
    os.replace = counted


def test_killed_between_ckpt_best_and_ckpt(train, trained, tmp_path):
    """ckpt_best.pt is not lost; nor does the next save write through to it, though the two share their
    bytes."""
    out = train(tmp_path / "out", before=die_between_the_two_files, code=9)
    assert load(out / "ckpt.pt")["iteration"] == 5 and load(out / "ckpt_best.pt")["iteration"] == 10
    train(out, init_from="resume", before=functools.partial(die_while_saving, 5), code=9)
    assert load(out / "ckpt.pt")["iteration"] == 5 and load(out / "ckpt_best.pt")["iteration"] == 10
    train(out, init_from="auto")
    assert_same_checkpoint(out, trained())
    assert load(out / "ckpt_best.pt")["best_val_loss"] == load(out / "ckpt.pt")["best_val_loss"]


def test_checkpoints_between_evaluations(run, flags, trained, tmp_path):
    """Those of checkpoint_interval change nothing in the course, and a killed run goes on from one."""
    out = tmp_path / "out"
    for iteration, last in ((8, 5), (10, 8)):
        shutil.rmtree(out, ignore_errors=True)
        die = functools.partial(die_while_saving, iteration)
        assert run("train.py", *flags(checkpoint_interval=4), before=die).returncode == 9
        assert load(out / "ckpt.pt")["iteration"] == last
    done = run("train.py", *flags(checkpoint_interval=4, init_from="auto"))
    assert done.returncode == 0 and "at iteration 8" in done.stdout, done.stderr
    assert_same_checkpoint(out, trained())
    assert untimed(out) == untimed(trained())


# Signals

def signal_in_an_iteration(name, to="0"):
    """The process of rank `to` sends itself a signal, twice, in the middle of its 8th training iteration."""
    in_float64()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has ignored it for background jobs
    forward, calls = model.GPT.forward, []

    def counted(self, *args, **options):
        calls.append(self.training)
        if sum(calls) == 15 and self.training and os.environ.get("RANK", "0") == to:
            for _ in range(2):
                os.kill(os.getpid(), getattr(signal, name))
        return forward(self, *args, **options)
    model.GPT.forward = counted


@pytest.mark.parametrize("name, number", [("SIGTERM", 15), ("SIGINT", 2), ("SIGUSR1", signal.SIGUSR1)])
def test_a_signal_ends_between_micro_steps_and_saves(name, number, run, flags, trained, tmp_path):
    done = run("train.py", *flags(**DROPOUT), before=functools.partial(signal_in_an_iteration, name))
    assert done.returncode == 128 + number and not done.stderr, done.stderr
    assert name in done.stdout and "iteration 7" in done.stdout  # 8th: it is made again
    assert load(tmp_path / "out" / "ckpt.pt")["iteration"] == 7
    done = run("train.py", *flags(init_from="auto", **DROPOUT), before=in_float64)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    whole = trained(**DROPOUT, before=in_float64)
    assert_same_checkpoint(tmp_path / "out", whole)
    assert untimed(tmp_path / "out") == untimed(whole)


def test_a_signal_to_one_of_two_processes_ends_both(run, flags, trained, tmp_path):
    """Both end before the same iteration, which is made again, and the first saves.

    One process, then two, then one: the course is that of one.
    """
    settings = dict(config="btt_moe", gradient_accumulation_steps=4, batch_size=2, n_layer=1,
                    lr_decay_iters=20)
    done = run("train.py", *flags(max_iters=5, **settings), before=in_float64)
    assert done.returncode == 0, done.stderr
    done = run("train.py", *flags(init_from="auto", **settings), processes=2,
               before=functools.partial(signal_in_an_iteration, "SIGTERM", to="1"))
    assert done.returncode == 128 + 15 and not done.stderr, done.stderr
    assert load(tmp_path / "out" / "ckpt.pt")["iteration"] == 5 + 7
    done = run("train.py", *flags(init_from="auto", **settings), before=in_float64)
    assert done.returncode == 0, done.stderr
    assert_same_course(tmp_path / "out", trained(**settings, before=in_float64))


def signal_in_an_evaluation(to="0"):
    """The process of rank `to` gets a signal in the second batch of the evaluation at iteration 10. At the
    end each process writes how many batches it saw there."""
    in_float64()
    forward, calls = model.GPT.forward, []

    def counted(self, *args, **options):
        if self.training:
            calls.append("train")
        elif sum(c == "train" for c in calls) == int(os.environ["STEPS"]):
            calls.append("eval")
            if calls.count("eval") == 2 and os.environ.get("RANK", "0") == to:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **options)
    model.GPT.forward = counted
    atexit.register(lambda: Path(f"{os.environ['COUNT']}{os.environ.get('RANK', '0')}").write_text(
        str(calls.count("eval"))))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_an_evaluation(processes, run, flags, trained, tmp_path):
    """After the batch in hand; the checkpoint is that of the iteration, whose evaluation is made again."""
    settings = dict(n_layer=1, gradient_accumulation_steps=4, batch_size=2, eval_iters=40)
    done = run("train.py", *flags(**settings), processes=processes, COUNT=str(tmp_path / "count"),
               STEPS=str(40 // processes),
               before=functools.partial(signal_in_an_evaluation, str(processes - 1)))
    assert done.returncode == 128 + 15 and not done.stderr, done.stderr
    for rank in range(processes):  # one more for the check of the loss before it is saved
        assert int((tmp_path / f"count{rank}").read_text()) <= 2 + 1
    assert load(tmp_path / "out" / "ckpt.pt")["iteration"] == 10
    assert list(read_log(tmp_path / "out")[2]) == [0, 5]
    done = run("train.py", *flags(init_from="auto", **settings), processes=processes, before=in_float64)
    assert done.returncode == 0, done.stderr
    whole = trained(**settings, processes=processes, before=in_float64)
    assert_same_checkpoint(tmp_path / "out", whole)
    assert untimed(tmp_path / "out") == untimed(whole)


def signal_in_a_save():
    """A signal while the checkpoint of iteration 5 is written; `saves` has a line for each one."""
    save = torch.save

    def signalled(contents, f):
        with open(os.environ["SAVES"], "a") as saves:
            saves.write(f"{contents['iteration']}\n")
        if contents["iteration"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(contents, f)
    torch.save = signalled


@pytest.mark.parametrize("interval", [5, 20])
def test_a_signal_in_a_save_does_not_save_twice_nor_train_on(interval, run, flags, trained, tmp_path):
    """In the save of an evaluation, or in one between two of them."""
    settings = dict(checkpoint_interval=5, eval_interval=interval)
    done = run("train.py", *flags(**settings), before=signal_in_a_save, SAVES=str(tmp_path / "saves"))
    assert done.returncode == 128 + 15 and not done.stderr, done.stderr
    assert (tmp_path / "saves").read_text().split() == ["0", "5"]
    done = run("train.py", *flags(init_from="auto", **settings))
    assert done.returncode == 0 and "at iteration 5" in done.stdout, done.stderr
    assert_same_checkpoint(tmp_path / "out", trained(**settings))


def signal_in_the_calibration():
    """A signal in the third batch that balances the routers; the calls of the model are counted."""
    forward, calls = model.GPT.forward, []

    def counted(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **options)
    model.GPT.forward = counted
    atexit.register(lambda: Path(os.environ["COUNT"]).write_text(str(len(calls))))


def test_a_signal_ends_the_calibration_of_routers(run, flags, tmp_path):
    """At once: there is nothing yet to save."""
    done = run("train.py", *flags("btt_moe", router_balance_rate=0.01), before=signal_in_the_calibration,
               COUNT=str(tmp_path / "count"))
    assert done.returncode == 128 + 15 and not done.stderr, done.stderr
    assert (tmp_path / "count").read_text() == "3" and not (tmp_path / "out" / "ckpt.pt").exists()


def signal_in_the_sample():
    print_tokens = tokenizer.print_tokens

    def signalled(tok, tokens):
        os.kill(os.getpid(), signal.SIGTERM)
        print_tokens(tok, tokens)
    tokenizer.print_tokens = signalled


def test_a_signal_ends_the_sample(run, flags, trained, tmp_path):
    done = run("train.py", *flags(sample_tokens=30), before=signal_in_the_sample)
    assert done.returncode == 128 + 15 and not done.stderr and "sample more" not in done.stdout
    assert_same_checkpoint(tmp_path / "out", trained())


def test_a_signal_that_nobody_handled_is_not_forgotten():
    """One that comes between the last look at it and the end of training."""
    signals = object.__new__(DeferredSignals)
    signals.received, signals.deferring = 0, True
    signals.stop_deferring(handled=0)
    assert not signals.deferring
    signals.deferring = True
    signals._handle(15, None)
    signals.stop_deferring(handled=15)
    with pytest.raises(Stopped) as stopped:
        signals.stop_deferring(handled=0)
    assert stopped.value.code == 128 + 15


# Lock

def test_a_second_run_into_the_same_folder_is_refused(run, flags, tmp_path):
    """While the first lives. The lock file that a killed run leaves is no obstacle."""
    first = ForkedProgram(tmp_path, flags(max_iters=100000, eval_interval=10))
    while first.running() and not (tmp_path / "out" / "ckpt.pt").exists():
        time.sleep(0.05)
    second = run("train.py", *flags(max_iters=2))
    assert_one_sentence(second, str(tmp_path / "out"), f"process {first.process.pid} on")
    assert first.running()
    first.kill()
    assert (tmp_path / "out" / "lock").exists()
    third = run("train.py", *flags(max_iters=2, init_from="auto", eval_interval=10))
    assert third.returncode == 0 and "resuming" in third.stdout, third.stderr
    assert not (tmp_path / "out" / "lock").exists()


# torchrun

def test_a_restart_by_torchrun_is_not_from_scratch(train, run, flags, tmp_path):
    """Whatever init_from is, and however many restarts this node has counted: the same torchrun has made what
    is there. What another start has made is renamed."""
    train(tmp_path / "out", max_iters=3)
    for restarts, iterations, words in ((1, 2, "ckpt.pt of an earlier run is renamed to ckpt.pt.old"),
                                        (0, 4, "resuming")):
        done = run("train.py", *flags(max_iters=iterations), TORCHELASTIC_RUN_ID="none",
                   TORCHELASTIC_RESTART_COUNT=str(restarts))
        assert done.returncode == 0 and words in done.stdout, done.stderr
    assert load(tmp_path / "out" / "ckpt.pt")["iteration"] == 4


@pytest.mark.parametrize("restarts, says", [(0, False), (1, True)])
def test_a_restart_without_a_checkpoint_says_that_it_begins_again(restarts, says, run, flags):
    """The disk of its node may be gone."""
    done = run("train.py", *flags(**TINY), TORCHELASTIC_RUN_ID="none",
               TORCHELASTIC_RESTART_COUNT=str(restarts))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert ("torchrun has restarted this run" in done.stdout) == ("begins again" in done.stdout) == says


def die_once():
    """The second process is killed in its 9th iteration, the first time that it is started."""
    in_float64()
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
    run_script("train.py", arguments, {}, f"{folder}/stdout{name}", f"{folder}/stderr{name}", die_once)


STANDALONE = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # what torchrun takes --standalone for


def torchrun(flags, folder, arguments):
    """torchrun with these flags. Its workers are forked: Python programs would import torch again."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch
    config, *_ = run.config_from_args(run.parse_args([*flags, "--start-method=fork", "train.py"]))
    elastic_launch(config, work)(folder, arguments)


def test_torchrun_restarts_a_killed_worker(flags, trained, tmp_path):
    """Both workers start again, and go on from the checkpoint.

    The one that lived says what happened to the other.
    """
    settings = dict(gradient_accumulation_steps=4, batch_size=2, checkpoint_interval=3)
    process = PROCESSES.Process(target=torchrun, args=(
        ["--nproc-per-node=2", "--max-restarts=3", *STANDALONE], str(tmp_path),
        [str(a) for a in flags(**settings)]))
    process.start()
    process.join(600)
    process.kill()
    process.join()
    output = {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path) if name.startswith("std")}
    assert process.exitcode == 0 and len(output) == 8, output
    [line] = output["stderr0.0"].splitlines()
    assert line.startswith("error: rank 0: a process of this run was lost (") and "--init_from=resume" in line
    assert "resuming" not in output["stdout0.0"]
    assert "at iteration 6" in output["stdout0.1"] and not output["stderr0.1"]
    assert_same_course(tmp_path / "out", trained(**settings, before=in_float64))
