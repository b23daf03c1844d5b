"""What a run survives besides kills: full disks, numbers that are not finite, a second writer, wandb, bad data."""
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import data.common
from tests import kill_test
import model
from lib import checkpoint as survive
from data import tokenizer
from tests.conftest import PROCESSES, ROOT, TINY, Started, write_ids
from data.common import largest_id
from tests.runs import assert_one_sentence, assert_same_checkpoint, load, losses, read_log, untimed


# A full disk

def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]), resource.RLIM_INFINITY))


def full_from_7_to_12():
    """No file can grow beyond 4,000 bytes, which the log has, while the 7th to 12th iterations are trained."""
    forward, calls = model.GPT.forward, []

    def counted(self, *args, **options):
        calls.append(self.training)
        full = 6 <= (sum(calls) - 1) // 2 < 12
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return forward(self, *args, **options)
    model.GPT.forward = counted


def test_a_disk_that_is_full_for_a_while(run, flags, trained, tmp_path):
    """Training goes on, it is said, and in the end nothing is missing: neither a point of the log nor a weight."""
    done = run("train.py", *flags(), before=full_from_7_to_12)
    assert done.returncode == 0 and not done.stderr, done.stderr
    out = tmp_path / "out"
    lines = done.stdout.splitlines()
    [failed] = [line for line in lines if "could not be written" in line]
    assert "iteration 10" in failed and "too large" in failed and "is that of iteration 5" in failed
    assert sum("log.jsonl cannot be written" in line for line in lines) == 1
    assert untimed(out) == untimed(trained())
    assert_same_checkpoint(out, trained())
    assert sorted(os.listdir(out)) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl"]


def test_a_disk_that_stays_full(run, flags, trained, tmp_path):
    """The checkpoint of before is intact, the log is whole, the exit status says that the end was not saved."""
    size = os.path.getsize(trained() / "ckpt.pt")
    done = run("train.py", *flags(max_iters=6, lr_decay_iters=20))
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    for limit in (size // 2, size * 9 // 10):
        done = run("train.py", *flags(init_from="auto"), before=limit_files, LIMIT=str(limit))
        assert_one_sentence(done, "iteration 20", "ckpt.pt is that of iteration 6")
        assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
        assert max(read_log(tmp_path / "out")[2]) == 20
        assert sorted(os.listdir(tmp_path / "out")) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl"]


def test_a_log_line_is_whole_or_waits(tmp_path):
    """Whatever part of it the disk takes."""
    path = tmp_path / "log.jsonl"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = survive.Log(str(path), -1)
    try:
        for room in range(0, 120, 7):
            size = path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + min(room, 50), limit[1]))
            with pytest.raises(OSError):
                log.write({"type": "train", "iter": room, "loss": float("nan"), "text": "x" * 50})
            assert path.stat().st_size == size
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            log.sync()
            assert b'"iter": %d,' % room in path.read_bytes()
            log.write({"type": "train", "iter": room + 1, "loss": 1.5})
            points = [json.loads(line) for line in path.read_text().splitlines()]
            assert [p["iter"] for p in points] == [i for r in range(0, room + 1, 7) for i in (r, r + 1)]
        assert points[0]["loss"] is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def log_that_is_never_written():
    def refuse(self):
        raise OSError(28, "No space left on device")
    survive.Log._write_waiting = refuse


def test_a_log_that_lacks_its_end_is_said(run, flags, trained, tmp_path):
    done = run("train.py", *flags(**TINY), before=log_that_is_never_written)
    assert_one_sentence(done, "log.jsonl", "ended well")
    assert done.stdout.count("its lines wait") == 1
    assert_same_checkpoint(tmp_path / "out", trained(**TINY))


def test_a_save_that_fails_between_the_two_checkpoints(tmp_path, monkeypatch):
    """Of two files with one content each is the one or the other, never a part; what could be written is written."""
    path, best = str(tmp_path / "ckpt.pt"), str(tmp_path / "ckpt_best.pt")
    survive.save_checkpoint(path, {"iteration": 1}, best)
    with pytest.raises(OSError):
        survive.save_checkpoint(path, {"iteration": 2}, str(tmp_path / "gone" / "ckpt_best.pt"))
    assert (load(path), load(best)) == ({"iteration": 2}, {"iteration": 1})

    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if b == best else replace(a, tmp_path / "gone" / "x"))
    with pytest.raises(OSError):
        survive.save_checkpoint(path, {"iteration": 3}, best)
    assert (load(path), load(best)) == ({"iteration": 2}, {"iteration": 3})
    monkeypatch.setattr(torch, "save", lambda contents, f: f.write(b"half") and 1 // 0)
    with pytest.raises(ZeroDivisionError):
        survive.save_checkpoint(path, {"iteration": 4}, None)
    assert (load(path), load(best)) == ({"iteration": 2}, {"iteration": 3})


def test_the_best_checkpoint_is_what_its_file_says(train, trained, tmp_path):
    """Not what ckpt.pt remembers: a full disk may have left an older one there."""
    out = tmp_path / "out"
    shutil.copytree(trained(**TINY), out)
    older = load(out / "ckpt_best.pt") | {"best_val_loss": 99.0}
    torch.save(older, tmp_path / "older.pt")
    os.replace(tmp_path / "older.pt", out / "ckpt_best.pt")
    train(out, **TINY | {"max_iters": 5, "learning_rate": 1, "decay_lr": False}, init_from="resume")
    evals = losses(out)[1]
    assert load(out / "ckpt_best.pt")["iteration"] == 5 and min(evals.values()) < evals[5] < 99


@pytest.mark.parametrize("tail", [b'{"type": "train", "it', b'{"type": "train", "iter": 3', b"\0\0\0\0", b"\xff\xfe\n", b"3\n",
                                  b'[1]\n', b"\n"])
def test_what_a_power_cut_left_in_the_log_is_dropped(tail, tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [b'{"type": "run"}\n', b'{"type": "eval", "iter": 0}\n', b'{"type": "train", "iter": 1}\n']
    path.write_bytes(b"".join(lines) + b'{"type": "train", "iter": 2}\n' + tail)
    survive.Log(str(path), 2)
    assert path.read_bytes() == b"".join(lines)


def test_a_log_that_cannot_be_rewritten_stays(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"type": "eval", "iter": 0}\n' * 10)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        with pytest.raises(OSError):
            survive.Log(str(path), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.stat().st_size == 280 and os.listdir(tmp_path) == ["log.jsonl"]


def terminal_without_the_letters():
    sys.stdout.reconfigure(encoding="ascii")
    tokenizer.CharTokenizer.decoder = lambda self: lambda token: "\N{SNOWMAN}"


def test_a_sample_that_cannot_be_shown_is_no_failure(run, flags):
    done = run("train.py", *flags(**TINY | {"sample_tokens": 3}), before=terminal_without_the_letters)
    assert done.returncode == 0 and not done.stderr and "no sample: " in done.stdout


# Numbers that are not finite

def not_finite():
    """The losses alone, or the gradients alone, of the iterations named in BAD are not finite on the process TO."""
    forward, calls, bad = model.GPT.forward, [], json.loads(os.environ["BAD"])

    def spoiled(self, *args, **options):
        output = forward(self, *args, **options)
        calls.append(self.training)
        steps = 8 // 4 // int(os.environ.get("WORLD_SIZE", 1))
        if self.training and (sum(calls) - 1) // steps in bad and os.environ.get("RANK", "0") == os.environ.get("TO", "0"):
            logits, loss, *rest = output
            if "GRADIENT" in os.environ:
                loss.register_hook(lambda g: g * float("inf"))
            else:
                loss = loss + float("nan")
            output = logits, loss, *rest
        return output
    model.GPT.forward = spoiled


@pytest.mark.parametrize("config, environment, processes", [
    ("dense", {}, 1), ("btt_moe", {"GRADIENT": "1"}, 1), ("btt_moe", {"TO": "1"}, 2)])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(config, environment, processes, run, flags, tmp_path):
    """Weights, moments, learning rates and the routers' biases; it is counted and logged."""
    ends = []
    for end in (7, 8):
        out = tmp_path / f"out{end}"
        settings = TINY | dict(out_dir=out, max_iters=end, lr_decay_iters=20)
        done = run("train.py", *flags(**settings), f"config/{config}.py", processes=processes, before=not_finite,
                   BAD="[3, 7]", **environment)
        assert done.returncode == 0, done.stderr
        ends.append(load(out / "ckpt.pt"))
    for name, weight in ends[0]["model"].items():
        assert torch.equal(weight, ends[1]["model"][name]), name
    assert kill_test.same(ends[0]["optimizer"], ends[1]["optimizer"])
    assert [(end["iteration"], end["skipped"], end["skipped_in_a_row"]) for end in ends] == [(7, 1, 0), (8, 2, 1)]
    assert done.stdout.count("skipped, because") == 2
    points = [json.loads(line) for line in open(out / "log.jsonl")]
    skips = [p for p in points if p["type"] == "skip"]
    assert [(p["iter"], p["skipped"]) for p in skips] == [(3, 1), (7, 2)]
    assert all([p["loss"] is None, p["grad_norm"] is None] == ["GRADIENT" not in environment, "GRADIENT" in environment] for p in skips)
    assert [p["iter"] for p in points if p["type"] == "train"] == [0, 1, 2, 4, 5, 6]


def test_too_many_that_are_not_finite_end_the_run(run, flags, tmp_path):
    """With advice, the last checkpoint as it was; resumed, the count goes on."""
    done = run("train.py", *flags(max_skipped=4, checkpoint_interval=1), before=not_finite, BAD=str(list(range(7, 20))))
    assert_one_sentence(done, "4 iterations in a row", "iteration 10", "--learning_rate")
    checkpoint = load(tmp_path / "out" / "ckpt.pt")
    assert (checkpoint["iteration"], checkpoint["skipped_in_a_row"]) == (10, 3)
    done = run("train.py", *flags(max_skipped=4, init_from="resume"), before=not_finite, BAD="[0]")
    assert_one_sentence(done, "4 iterations in a row")
    done = run("train.py", *flags(max_skipped=4, init_from="resume"))
    assert done.returncode == 0 and load(tmp_path / "out" / "ckpt.pt")["skipped"] == 3, done.stderr


def weights_break_in_the_8th_step():
    step, calls = torch.optim.AdamW.step, []

    def breaking(self, *args, **options):
        step(self, *args, **options)
        calls.append(self)
        if len(calls) == 8:
            self.param_groups[0]["params"][0].data.fill_(math.inf)
    torch.optim.AdamW.step = breaking


def test_weights_that_have_gone_wild_replace_no_checkpoint(run, flags, tmp_path):
    """The step looked well, the weights after it are of no use: the checkpoint of before stays, and from it all is well."""
    done = run("train.py", *flags(max_skipped=3, checkpoint_interval=1), before=weights_break_in_the_8th_step)
    assert_one_sentence(done, "3 iterations in a row", "ckpt.pt is that of iteration 7")
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


def test_an_evaluation_that_is_not_finite_is_forgotten(train, trained, tmp_path):
    """It writes no checkpoint, and is not the best one for ever."""
    out = train(tmp_path / "out", before=third_evaluation_is_not_finite)
    evals, expected = losses(out)[1], losses(trained())[1]
    assert evals == expected | {10: None} and read_log(out)[2][10]["best_val_loss"] == expected[5]
    assert_same_checkpoint(out, trained())
    train(tmp_path / "short", before=third_evaluation_is_not_finite, max_iters=10, lr_decay_iters=20, code=1)
    assert load(tmp_path / "short" / "ckpt.pt")["iteration"] == 5


def test_float16_keeps_the_scale_of_its_gradients(train, trained, tmp_path):
    """A scale that has grown is in the checkpoint; resumed, the run ends as one in one go."""
    settings = dict(dtype="float16", before=grow_the_scale_often)
    whole = trained(**settings)
    out = train(tmp_path / "out", max_iters=10, lr_decay_iters=20, **settings)
    train(out, init_from="auto", **settings)
    assert_same_checkpoint(whole, out)
    scaler = load(out / "ckpt.pt")["scaler"]
    assert scaler == load(whole / "ckpt.pt")["scaler"] and scaler["scale"] != 2.0 ** 16


def grow_the_scale_often():
    whole = torch.amp.GradScaler
    torch.amp.GradScaler = lambda *args, **options: whole(*args, **options, growth_interval=3)


# One writer

def test_a_second_run_is_refused_while_the_first_lives(run, flags, tmp_path):
    """And a lock that a killed one left is no obstacle."""
    first = Started(tmp_path, flags(max_iters=100000, eval_interval=10))
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


def test_two_locks_at_once(tmp_path):
    """Of several processes that take one folder and leave it again, never two hold it."""
    program = f"""if True:
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import types
        sys.modules["torch"] = types.ModuleType("torch")
        import survive
        while True:
            try:
                survive.take_out_dir("out")
                break
            except ValueError:
                time.sleep(0.001)
        os.mkdir("alone")
        if os.fork() == 0:
            sys.exit()  # the end of a child is not the end of the lock
        os.wait()
        time.sleep(0.01)
        os.rmdir("alone")"""
    started = [subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path) for _ in range(8)]
    assert [process.wait(600) for process in started] == [0] * 8
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []


def test_a_lock_on_a_file_that_was_just_removed_is_none(tmp_path, monkeypatch):
    """Its last owner removes it between the opening and the locking: the next one would lock another file."""
    lock, lockf, calls = tmp_path / "lock", survive.fcntl.lockf, []

    def late(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            os.remove(lock)
        return lockf(descriptor, operation)
    monkeypatch.setattr(survive.fcntl, "lockf", late)
    survive.take_out_dir(str(tmp_path))
    other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", other, lock], capture_output=True, text=True)
    assert len(calls) == 2 and "BlockingIOError" in done.stderr


# wandb

def wandb_that_breaks():
    """It notes how it is called, and breaks at BREAKS_AT."""
    breaks_at = os.environ.get("BREAKS_AT", "")

    class Run:
        def log(self, point, step):
            note("log", step)
            if breaks_at == "log" and step == 2:
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


@pytest.mark.parametrize("breaks_at", ["log", "finish"])
def test_wandb_that_breaks_does_not_stop_training(breaks_at, run, flags, trained, tmp_path):
    notes = tmp_path / "notes"
    done = run("train.py", *flags(**TINY, wandb_log=True), before=wandb_that_breaks, NOTES=str(notes), BREAKS_AT=breaks_at)
    assert done.returncode == 0 and not done.stderr and done.stdout.count("wandb is off") == 1
    assert untimed(tmp_path / "out") == untimed(trained(**TINY))
    calls = [json.loads(line) for line in notes.read_text().splitlines()]
    assert [step for what, step in calls if what == "log"][-1] == (2 if breaks_at == "log" else 4)


def test_a_signal_while_wandb_starts_is_no_failure_of_wandb(run, flags, tmp_path):
    """Before the first iteration a signal ends the run at once; the lock goes with it."""
    done = run("train.py", *flags(**TINY, wandb_log=True), before=wandb_that_breaks, NOTES=str(tmp_path / "notes"), BREAKS_AT="signal")
    assert done.returncode == 128 + 15 and not done.stderr and "wandb is off" not in done.stdout and "iter " not in done.stdout
    assert os.listdir(tmp_path / "out") == ["log.jsonl"]


def test_a_resumed_run_is_the_same_one_of_wandb(run, flags, tmp_path):
    """Even if a run without wandb was in between."""
    notes = tmp_path / "notes"
    for end, wandb_log in ((2, True), (3, False), (4, True)):
        done = run("train.py", *flags(**TINY | {"max_iters": end}, wandb_log=wandb_log, init_from="auto"),
                   before=wandb_that_breaks, NOTES=str(notes))
        assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in notes.read_text().splitlines()]
    ids = [value for what, value in calls if what == "init"]
    assert len(ids) == 2 and ids[0] == ids[1] and ids[0][0] and ids[0][1] == "allow"


# Data

@pytest.mark.parametrize("split, place", [("train", -1), ("train", 300), ("val", 0), ("val", -1)])
def test_an_id_beyond_the_vocabulary_is_found_anywhere(split, place, run, flags, tmp_path):
    """Though no window of the run would hold it."""
    ids = {"train": [1, 2, 3] * 200, "val": [1, 2, 3] * 100}
    ids[split][place] = 96
    done = run("train.py", *flags(dataset=write_ids(tmp_path / "data", ids["train"], ids["val"]), max_iters=0))
    assert_one_sentence(done, f"{split}.bin", "96", "95")
    assert not (tmp_path / "out").exists()


def data_of_the_second_process_is_gone():
    def gone(folder):
        raise ValueError("its disk is gone")
    if os.environ["RANK"] == "1":
        data.common.open_dataset = gone


def test_a_mistake_that_one_process_meets_is_told_by_the_first(run, flags, tmp_path):
    done = run("train.py", *flags(**TINY), processes=2, before=data_of_the_second_process_is_gone)
    assert_one_sentence(done, "its disk is gone")
    assert not (tmp_path / "out").exists()


def test_largest_id_reads_every_share():
    tokens = np.random.default_rng(0).integers(0, 500, 1013).astype(np.uint16)
    for parts in (1, 2, 7, 2000):
        for size in (1, 10, 5000):
            shares = [largest_id(tokens, part, parts, size) for part in range(parts)]
            assert max(shares) == tokens.max()
    for place in (0, 1, 505, 506, 1012):  # wherever it is, exactly one share has it
        marked = tokens.copy()
        marked[place] = 60_000
        assert [largest_id(marked, part, 3, 100) for part in range(3)].count(60_000) == 1


# Checkpoints

def check(path, checkpoint, whole, **changes):
    """survive.check_checkpoint of a checkpoint against the run that the other belongs to."""
    gpt = model.GPT(model.GPTConfig(**whole["model_args"]))
    here = dict(model_args=whole["model_args"], tokenizer=whole["tokenizer"], config=whole["config"], model=gpt)
    survive.check_checkpoint(str(path), checkpoint, **here | changes)


def test_a_truncated_checkpoint_is_one_sentence(trained, tmp_path):
    """At any length, and with anything in the place of what it must hold."""
    whole = (trained(**TINY) / "ckpt.pt").read_bytes()
    path = tmp_path / "ckpt.pt"
    for length in [0, 1, 4, 100, *range(1000, len(whole), len(whole) // 20), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a checkpoint that can be read"):
            survive.read_checkpoint(str(path))
    contents = load(trained(**TINY) / "ckpt.pt")
    for name in survive.KINDS:
        for wrong in ({k: v for k, v in contents.items() if k != name}, contents | {name: "x"}):
            torch.save(wrong, path)
            with pytest.raises(ValueError, match=f"without a sound {name}"):
                survive.read_checkpoint(str(path))
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        survive.read_checkpoint(str(path))


def test_what_differs_is_listed_with_both_values(trained):
    """Settings, vocabulary, weights: the settings of both, whichever of them lacks one."""
    whole = load(trained(**TINY) / "ckpt.pt")
    check("ckpt.pt", whole, whole)
    weights = dict(whole["model"])
    weights["extra"] = weights.pop("ln_f.weight")
    weights["wpe.weight"] = weights["wpe.weight"][:-1]
    others = [(dict(model_args=whole["model_args"] | {"n_layer": 3, "younger": 5}), {},
               ["n_layer = 3 there and 1 here", "younger = 5 there and absent here"]),
              ({}, dict(model_args=whole["model_args"] | {"younger": 5}), ["younger = absent there and 5 here"]),
              (dict(tokenizer={"name": "gpt2"}), {}, ["another vocabulary", "'gpt2' there and 'char' here"]),
              (dict(model=weights), {}, ["wpe.weight = '(15, 16) torch.float32' there and '(16, 16) torch.float32' here",
                                         "ln_f.weight = absent there", "extra = '(16,) torch.float32' there and absent"])]
    for there, here, words in others:
        with pytest.raises(ValueError) as error:
            check("ckpt.pt", whole | there, whole, **here)
        assert all(word in str(error.value) for word in words), error.value


def test_an_optimizer_of_another_shape_is_one_sentence(trained):
    whole = load(trained(**TINY) / "ckpt.pt")

    def restore(checkpoint):
        gpt = model.GPT(model.GPTConfig(**whole["model_args"]))
        optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        survive.restore("ckpt.pt", checkpoint, gpt, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        return optimizer

    assert kill_test.same(restore(whole).state_dict()["state"], whole["optimizer"]["state"])
    state, groups = whole["optimizer"]["state"], whole["optimizer"]["param_groups"]
    for optimizer in (dict(state=state, param_groups=groups[1:]), dict(state=state), {},
                      dict(state=state | {0: dict(state[0], exp_avg=torch.zeros(3))}, param_groups=groups)):
        with pytest.raises(ValueError, match="does not fit"):
            restore(whole | {"optimizer": optimizer})


def test_changed_settings_are_printed(run, flags, trained, tmp_path):
    shutil.copytree(trained(**TINY), tmp_path / "out")
    done = run("train.py", *flags(**TINY | {"max_iters": 5}, init_from="resume", learning_rate=0.5, batch_size=2))
    assert done.returncode == 0, done.stderr
    changes = [line.strip() for line in done.stdout.splitlines() if "it was" in line]
    assert changes == ["batch_size = 2 from here on; it was 4", "learning_rate = 0.5 from here on; it was 0.003",
                       "max_iters = 5 from here on; it was 4"]


def measure_memory(folder, results):
    """Saves and restores a layer of 64 MB; the peaks of the process's own memory above its start, in such sizes."""
    import threading

    def own():
        [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
        return int(line.split()[1]) / 2 ** 16

    def peak_of(call):
        start, peak, done = own(), 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, own() - start)
        thread = threading.Thread(target=watch)
        thread.start()
        call()
        done.set()
        thread.join()
        return max(peak, own() - start)

    def make():
        layer = torch.nn.Linear(4096, 4096, bias=False)
        return layer, torch.optim.AdamW(layer.parameters(), fused=True), torch.amp.GradScaler("cpu", enabled=False)

    layer, optimizer, scaler = make()
    layer(torch.ones(1, 4096)).sum().backward()
    optimizer.step()
    path = os.path.join(folder, "ckpt.pt")
    contents = dict(model=layer.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), model_args={},
                    config={}, tokenizer={}, iteration=0, tokens=0, flops=0.0, best_val_loss=0.0)
    results.put(peak_of(lambda: survive.save_checkpoint(path, contents, path + ".best")))
    layer, optimizer, scaler = make()
    results.put(peak_of(lambda: survive.restore(path, survive.read_checkpoint(path), layer, optimizer, scaler)))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of memory")
def test_memory_of_saving_and_loading(tmp_path):
    """To save takes no copy of the weights; to load, the two moments that stay, and no second copy of anything."""
    results = PROCESSES.Queue()
    process = PROCESSES.Process(target=measure_memory, args=(str(tmp_path), results))
    process.start()
    saving, loading = results.get(timeout=600), results.get(timeout=600)
    process.join()
    assert saving < 0.5 and 1.5 < loading < 2.5
