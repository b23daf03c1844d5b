"""What a run gets through: full disks, losses that are not finite, a wandb that breaks, data that one process
lacks."""
import json
import math
import os
import resource
import shutil
import signal
import sys
import types

import pytest
import torch

import data.common
import model
from data import tokenizer
from lib.log import RunLog
from tests import kill_test
from tests.conftest import TINY
from tests.runs import assert_one_sentence, assert_same_checkpoint, load, losses, read_log, untimed


# A full disk

def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]), resource.RLIM_INFINITY))


def full_in_iterations_6_to_11():
    """No file can grow beyond 4,000 bytes, which the log has already, while these iterations are trained."""
    forward, calls = model.GPT.forward, []

    def counted(self, *args, **options):
        calls.append(self.training)
        full = 6 <= (sum(calls) - 1) // 2 < 12
        limit = 4000 if full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return forward(self, *args, **options)
    model.GPT.forward = counted


def test_a_disk_that_is_full_for_a_while(run, flags, trained, tmp_path):
    """Training goes on and says so.

    In the end nothing is missing: neither a point of the log nor a weight.
    """
    done = run("train.py", *flags(), before=full_in_iterations_6_to_11)
    assert done.returncode == 0 and not done.stderr, done.stderr
    out = tmp_path / "out"
    lines = done.stdout.splitlines()
    [failed] = [line for line in lines if "could not be written" in line]
    assert "iteration 10" in failed and "too large" in failed and "checkpoint of iteration 5" in failed
    assert sum("log.jsonl cannot be written" in line for line in lines) == 1
    assert untimed(out) == untimed(trained())
    assert_same_checkpoint(out, trained())
    assert sorted(os.listdir(out)) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl"]


def test_a_disk_that_stays_full(run, flags, trained, tmp_path):
    """The last checkpoint is intact, the log is whole, and the exit status says that the end was not
    saved."""
    size = os.path.getsize(trained() / "ckpt.pt")
    run("train.py", *flags(max_iters=6, lr_decay_iters=20))
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    for limit in (size // 2, size * 9 // 10):
        done = run("train.py", *flags(init_from="auto"), before=limit_files, LIMIT=str(limit))
        assert_one_sentence(done, "iteration 20", "ckpt.pt holds the checkpoint of iteration 6")
        assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
        assert max(read_log(tmp_path / "out")[2]) == 20
        assert sorted(os.listdir(tmp_path / "out")) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl"]


def log_cannot_be_written():
    def refuse(self):
        raise OSError(28, "No space left on device")
    RunLog._write_waiting = refuse


def test_a_log_without_its_end_is_an_error(run, flags, trained, tmp_path):
    done = run("train.py", *flags(**TINY), before=log_cannot_be_written)
    assert_one_sentence(done, "log.jsonl", "ended well")
    assert done.stdout.count("its lines wait") == 1
    assert_same_checkpoint(tmp_path / "out", trained(**TINY))


def log_cannot_be_synced():
    def refuse(self):
        raise OSError(116, "Stale file handle")
    RunLog.sync = refuse


def test_a_log_that_fails_stops_no_checkpoint(run, flags, trained, tmp_path):
    done = run("train.py", *flags(**TINY), before=log_cannot_be_synced)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("log.jsonl cannot be synced (Stale file handle)") == 1
    assert_same_checkpoint(tmp_path / "out", trained(**TINY))


def terminal_without_the_letters():
    sys.stdout.reconfigure(encoding="ascii")
    tokenizer.Decoder.__call__ = lambda self, token: "\N{SNOWMAN}"


def test_a_terminal_that_lacks_the_letters_shows_all_others(run, flags):
    """Of the sample, and of the lines that describe the structures."""
    settings = TINY | dict(sample_tokens=3, max_iters=0)
    plain, whole = (run("train.py", *flags("btt", **settings), before=before) for before in
                   (terminal_without_the_letters, None))
    assert plain.returncode == 0 and not plain.stderr and "\n???\n" in plain.stdout
    about = [done.stdout.partition("model: ")[2].partition("data: ")[0] for done in (plain, whole)]
    assert about[0] == about[1].encode("ascii", "replace").decode() != about[1]


def vocabulary_is_gone():
    def gone(meta):
        raise OSError("the vocabulary could not be downloaded")
    tokenizer.from_meta = gone


def tiktoken_is_missing():
    def missing(meta):
        raise ModuleNotFoundError("No module named 'tiktoken'")
    tokenizer.from_meta = missing


@pytest.mark.parametrize("before, why", [
    (vocabulary_is_gone, "the vocabulary"), (tiktoken_is_missing, "No module")])
def test_a_sample_that_cannot_be_made_is_no_failure(before, why, run, flags):
    done = run("train.py", *flags(**TINY | {"sample_tokens": 3}), before=before)
    assert done.returncode == 0 and not done.stderr and f"no sample: {why}" in done.stdout


# Losses and gradients that are not finite

def not_finite():
    """The losses alone, or with GRADIENT the gradients alone, of the iterations in BAD are not finite on rank
    TO."""
    forward, calls, bad = model.GPT.forward, [], json.loads(os.environ["BAD"])

    def spoiled(self, *args, **options):
        output = forward(self, *args, **options)
        calls.append(self.training)
        steps = 8 // 4 // int(os.environ.get("WORLD_SIZE", 1))
        here = os.environ.get("RANK", "0") == os.environ.get("TO", "0")
        if self.training and here and (sum(calls) - 1) // steps in bad:
            logits, loss, *rest = output
            if "GRADIENT" in os.environ:
                loss.register_hook(lambda g: g * float("inf"))
            else:
                loss = loss + float("nan")
            output = logits, loss, *rest
        return output
    model.GPT.forward = spoiled


@pytest.mark.parametrize("config, environment, processes", [
    ("dense", {}, 1), ("btt_moe", {"GRADIENT": "1"}, 1), ("btt_moe", {"TO": "1"}, 2)],
    ids=["loss", "gradient", "loss of the second process"])
def test_a_step_that_is_not_finite_changes_nothing(config, environment, processes, run, flags, tmp_path):
    """Neither weights, moments and learning rates nor the routers' biases. It is counted and logged."""
    ends = []
    for end in (7, 8):
        out = tmp_path / f"out{end}"
        settings = TINY | dict(out_dir=out, max_iters=end, lr_decay_iters=20, router_balance_rate=0.1)
        done = run("train.py", *flags(config, **settings), processes=processes, before=not_finite,
                   BAD="[3, 7]", **environment)
        assert done.returncode == 0, done.stderr
        ends.append(load(out / "ckpt.pt"))
    assert kill_test.same(ends[0]["model"], ends[1]["model"])
    assert kill_test.same(ends[0]["optimizer"], ends[1]["optimizer"])
    counters = [(end["iteration"], end["skipped"], end["skipped_in_a_row"]) for end in ends]
    assert counters == [(7, 1, 0), (8, 2, 1)]
    assert done.stdout.count("skipped, not finite") == 2
    points = [json.loads(line) for line in open(out / "log.jsonl")]
    skips = [p for p in points if p["type"] == "skip"]
    assert [(p["iter"], p["skipped"]) for p in skips] == [(3, 1), (7, 2)]
    null = "grad_norm" if "GRADIENT" in environment else "loss"
    assert all(p[null] is None for p in skips)
    assert all((p["loss"] is None) == (null == "loss") for p in skips)
    assert [p["iter"] for p in points if p["type"] == "train"] == [0, 1, 2, 4, 5, 6]


def test_too_many_iterations_that_are_not_finite_end_the_run(run, flags, tmp_path):
    """With advice, and with the last checkpoint as it was. A resumed run goes on counting."""
    done = run("train.py", *flags(max_skipped=4, checkpoint_interval=1), before=not_finite,
               BAD=str(list(range(7, 20))))
    assert_one_sentence(done, "4 iterations in a row", "iteration 10", "--learning_rate")
    checkpoint = load(tmp_path / "out" / "ckpt.pt")
    assert (checkpoint["iteration"], checkpoint["skipped_in_a_row"]) == (10, 3)
    done = run("train.py", *flags(max_skipped=4, init_from="resume"), before=not_finite, BAD="[0]")
    assert_one_sentence(done, "4 iterations in a row")
    done = run("train.py", *flags(max_skipped=4, init_from="resume"))
    assert done.returncode == 0 and load(tmp_path / "out" / "ckpt.pt")["skipped"] == 3, done.stderr


def test_iterations_that_are_read_later_count_the_same(run, flags, tmp_path):
    """Whatever log_interval is: the points of the log and the checkpoints are those of log_interval=1.

    Too many in a row end the run when they are read.
    """
    logs, checkpoints = [], []
    for interval in (1, 6):
        out = tmp_path / f"out{interval}"
        done = run("train.py", *flags("btt_moe", out_dir=out, max_iters=14, log_interval=interval,
                                       router_balance_rate=0.1), before=not_finite, BAD="[2, 7, 8, 13]")
        assert done.returncode == 0 and done.stdout.count("skipped, not finite") == 4, done.stderr
        points = [json.loads(line) for line in open(out / "log.jsonl")]
        assert [p["iter"] for p in points if "iter" in p] == sorted(p["iter"] for p in points if "iter" in p)
        logs.append([p for p in points if p["type"] in ("skip", "eval")])
        checkpoints.append(load(out / "ckpt.pt"))
        trained = {p["iter"] for p in points if p["type"] == "train"}
        assert trained == ({0, 6, 12} if interval == 6 else {*range(14)} - {2, 7, 8, 13})
    assert logs[0] == logs[1]
    for name in ("model", "optimizer", "iteration", "tokens", "flops", "skipped", "skipped_in_a_row"):
        assert kill_test.same(checkpoints[0][name], checkpoints[1][name]), name
    done = run("train.py", *flags(max_skipped=4, log_interval=9), before=not_finite, BAD=str([*range(3, 20)]))
    assert_one_sentence(done, "4 iterations in a row", "up to 6")
    assert load(tmp_path / "out" / "ckpt.pt")["iteration"] == 5


def weights_break_in_the_8th_step():
    step, calls = torch.optim.AdamW.step, []

    def breaking(self, *args, **options):
        step(self, *args, **options)
        calls.append(self)
        if len(calls) == 8:
            self.param_groups[0]["params"][0].data.fill_(math.inf)
    torch.optim.AdamW.step = breaking


def test_weights_that_are_not_finite_are_not_saved(run, flags, tmp_path):
    """Loss and gradient of the step were finite.

    The checkpoint of before stays, and a run resumes from it.
    """
    done = run("train.py", *flags(max_skipped=3, checkpoint_interval=1), before=weights_break_in_the_8th_step)
    assert_one_sentence(done, "3 iterations in a row", "ckpt.pt holds the checkpoint of iteration 7")
    unsaved = [f"no checkpoint of iteration {i} is written: its loss is not finite" for i in (8, 9, 10)]
    assert [line for line in done.stdout.splitlines() if "no checkpoint" in line] == unsaved
    assert load(tmp_path / "out" / "ckpt.pt")["iteration"] == 7
    done = run("train.py", *flags(init_from="resume", max_iters=9))
    assert done.returncode == 0 and losses(tmp_path / "out")[1][9] < 5, done.stderr


def third_evaluation_is_not_finite():
    forward, calls = model.GPT.forward, []

    def spoiled(self, *args, **options):
        logits, loss, *rest = forward(self, *args, **options)
        calls.append(self.training)
        return logits, loss * (math.nan if not self.training and 8 < calls.count(False) <= 12 else 1), *rest
    model.GPT.forward = spoiled


def test_an_evaluation_that_is_not_finite_is_not_the_best(run, flags, trained, tmp_path):
    """Nor does it write a checkpoint, which it says."""
    out, done = tmp_path / "out", run("train.py", *flags(), before=third_evaluation_is_not_finite)
    assert done.returncode == 0 and done.stdout.count("no checkpoint of iteration 10 is written") == 1
    evals, expected = losses(out)[1], losses(trained())[1]
    assert evals == expected | {10: None} and read_log(out)[2][10]["best_val_loss"] == expected[5]
    assert_same_checkpoint(out, trained())
    done = run("train.py", *flags(out_dir=tmp_path / "short", max_iters=10, lr_decay_iters=20),
               before=third_evaluation_is_not_finite)
    assert done.returncode == 1 and load(tmp_path / "short" / "ckpt.pt")["iteration"] == 5


def scale_grows_often():
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda *args, **options: scaler(*args, **options, growth_interval=3)


def test_float16_keeps_the_scale_of_its_gradients(train, trained, tmp_path):
    """A scale that has grown is in the checkpoint: stopped and resumed, the run ends as in one go."""
    settings = dict(dtype="float16", before=scale_grows_often)
    whole = trained(**settings)
    out = train(tmp_path / "out", max_iters=10, lr_decay_iters=20, **settings)
    train(out, init_from="auto", **settings)
    assert_same_checkpoint(whole, out)
    scaler = load(out / "ckpt.pt")["scaler"]
    assert scaler == load(whole / "ckpt.pt")["scaler"] and scaler["scale"] != 2.0 ** 16


@pytest.mark.parametrize("before, after", [("float32", "float16"), ("float16", "float32")])
def test_a_run_goes_on_in_another_dtype(train, before, after, tmp_path):
    """From float32 to float16 it begins with a gradient scaler of its own."""
    out = train(tmp_path / "out", max_iters=4, dtype=before)
    train(out, init_from="resume", max_iters=6, dtype=after)
    checkpoint = load(out / "ckpt.pt")
    assert checkpoint["iteration"] == 6 and bool(checkpoint["scaler"]) == (after == "float16")


# wandb

def wandb_is_missing():
    sys.modules["wandb"] = None


def wandb_is_offline():
    def init(**options):
        raise ConnectionError("no network")
    sys.modules["wandb"] = types.SimpleNamespace(init=init)


def wandb_that_notes_and_breaks():
    """It appends each call to the file NOTES, and breaks at BREAKS_AT.

    Like wandb it counts steps, if it is given none, and drops a point of an earlier step than the last.
    """
    breaks_at = os.environ.get("BREAKS_AT", "")

    class Run:
        def define_metric(self, name, step_metric=None):
            note("define_metric", [name, step_metric])

        def log(self, point, step=None):
            with open(os.environ["NOTES"]) as f:
                steps = [value[1] for what, value in map(json.loads, f) if what == "log"]
            step = steps[-1] + 1 if steps and step is None else step or 0  # it goes on in a resumed run
            note("log" if not steps or step >= steps[-1] else "dropped", [point, step])
            if breaks_at == "log" and point["iter"] == 2:
                raise BrokenPipeError("the service is gone")

        def finish(self):
            note("finish", None)
            if breaks_at == "finish":
                raise SystemExit(3)

    def note(what, value):
        with open(os.environ["NOTES"], "a") as f:
            f.write(json.dumps([what, value]) + "\n")

    def init(id, resume, **options):
        note("init", [id, resume])
        if breaks_at == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return Run()
    sys.modules["wandb"] = types.SimpleNamespace(init=init)


@pytest.fixture
def run_with_wandb(run, flags, tmp_path):
    """run_with_wandb(breaks_at, ...) -> (the process, the calls that wandb got so far)."""
    def run_with_wandb(breaks_at="", **settings):
        notes = tmp_path / "notes"
        done = run("train.py", *flags(**TINY | {"wandb_log": True} | settings),
                   before=wandb_that_notes_and_breaks, NOTES=str(notes), BREAKS_AT=breaks_at)
        return done, [json.loads(line) for line in notes.read_text().splitlines()]
    return run_with_wandb


@pytest.mark.parametrize("before", [wandb_is_missing, wandb_is_offline])
def test_training_does_not_depend_on_wandb(before, train, trained, tmp_path):
    out = train(tmp_path / "out", wandb_log=True, before=before, **TINY)
    assert untimed(out) == untimed(trained(**TINY))


def test_wandb_gets_the_numbers_of_the_log(run_with_wandb, tmp_path):
    done, calls = run_with_wandb()
    assert done.returncode == 0, done.stderr
    points = [p for p in map(json.loads, open(tmp_path / "out" / "log.jsonl")) if "iter" in p]
    assert calls[0][0] == "init" and calls[-1] == ["finish", None]
    assert calls[1:3] == [["define_metric", ["iter", None]], ["define_metric", ["*", "iter"]]]
    assert [(what, value[0]) for what, value in calls[3:-1]] == [("log", p) for p in points]


@pytest.mark.parametrize("breaks_at, last", [("log", 2), ("finish", 4)])
def test_wandb_that_breaks_does_not_stop_training(breaks_at, last, run_with_wandb, trained, tmp_path):
    done, calls = run_with_wandb(breaks_at)
    assert done.returncode == 0 and not done.stderr and done.stdout.count("wandb is off") == 1
    assert untimed(tmp_path / "out") == untimed(trained(**TINY))
    assert [value[0]["iter"] for what, value in calls if what == "log"][-1] == last


def test_a_signal_while_wandb_starts_ends_the_run(run_with_wandb, tmp_path):
    """It is no failure of wandb.

    Before the first iteration a signal ends the run at once, and the lock goes with it.
    """
    done, _ = run_with_wandb("signal")
    assert done.returncode == 128 + 15 and not done.stderr
    assert "wandb is off" not in done.stdout and "iter " not in done.stdout
    assert os.listdir(tmp_path / "out") == ["log.jsonl"]


def test_a_resumed_run_is_the_same_run_of_wandb(run_with_wandb):
    """Even if there was a resumed run without wandb in between."""
    for end, wandb_log in ((2, True), (3, False), (4, True)):
        done, calls = run_with_wandb(max_iters=end, wandb_log=wandb_log, init_from="auto")
        assert done.returncode == 0, done.stderr
    ids = [value for what, value in calls if what == "init"]
    assert len(ids) == 2 and ids[0] == ids[1] and ids[0][0] and ids[0][1] == "allow"


def test_a_copy_of_a_run_is_another_run_of_wandb(run_with_wandb, tmp_path):
    run_with_wandb(max_iters=2)
    shutil.copytree(tmp_path / "out", tmp_path / "branch")
    done, calls = run_with_wandb(max_iters=3, init_from="resume", out_dir=tmp_path / "branch")
    assert done.returncode == 0, done.stderr
    first, other = (value[0] for what, value in calls if what == "init")
    assert first != other and load(tmp_path / "branch" / "ckpt.pt")["wandb_id"] == other


def test_wandb_gets_the_points_that_a_resumed_run_makes_again(run_with_wandb, tmp_path):
    """They are those from an older checkpoint on."""
    ckpt = tmp_path / "out" / "ckpt.pt"
    run_with_wandb(max_iters=2)
    older = ckpt.read_bytes()
    run_with_wandb(init_from="resume")
    ckpt.write_bytes(older)
    done, calls = run_with_wandb(init_from="resume")
    assert done.returncode == 0, done.stderr
    assert [value[0]["iter"] for what, value in calls if what == "log" and value[0]["type"] == "train"] == [
        0, 1, 2, 3, 2, 3]
    assert not [value for what, value in calls if what == "dropped"]


# One of two processes

def data_of_the_second_process_is_gone():
    def gone(folder):
        raise ValueError("its disk is gone")
    if os.environ["RANK"] == "1":
        data.common.open_dataset = gone


def test_an_error_of_the_second_process_is_printed_by_the_first(run, flags, tmp_path):
    done = run("train.py", *flags(**TINY), processes=2, before=data_of_the_second_process_is_gone)
    assert_one_sentence(done, "its disk is gone")
    assert not (tmp_path / "out").exists()
