"""--init_from=resume: from where a run stopped, with other settings, from old checkpoints, and from what is
none."""
import json
import os
import shutil

import pytest
import torch

from model import GPT, GPTConfig, load_checkpoint
from tests.conftest import ROOT, SMALL, TINY, Hostile, write_ids
from tests.runs import (assert_one_sentence, assert_same_checkpoint, cross_entropy, load, losses, name_run,
                        read_log, untimed)


def test_resume_from_between_two_evaluations(trained, train, tmp_path):
    """A run that ended at 13 evaluated there; that evaluation stays in the log, and nothing else of it."""
    out = train(tmp_path / "out", max_iters=13, lr_decay_iters=20)
    train(out, init_from="resume")
    log = untimed(out)
    [extra] = [point for point in log if "val_loss" in point and point["iter"] == 13]
    log.remove(extra)
    assert log == untimed(trained())
    assert_same_checkpoint(out, trained())


def test_resume_takes_new_hyperparameters(train, tmp_path):
    """The optimizer of a resumed run has the groups of a run started with its hyperparameters."""
    out = train(tmp_path / "out", "btt", max_iters=1, weight_decay=0.0)
    settings = dict(max_iters=2, weight_decay=0.3, beta1=0.8, learning_rate=1e-3)
    train(out, "btt", init_from="resume", **settings)
    scratch = train(tmp_path / "scratch", "btt", **settings)
    groups = [load(folder / "ckpt.pt")["optimizer"]["param_groups"] for folder in (out, scratch)]
    for resumed, fresh in zip(*groups, strict=True):
        for key in ("weight_decay", "betas", "lr", "lr_multiplier"):
            assert resumed[key] == pytest.approx(fresh[key]), key


def test_changed_settings_are_printed(run, flags, trained, tmp_path):
    before = TINY | dict(warmup_iters=4)
    shutil.copytree(trained(**before), tmp_path / "out")
    changed = before | dict(max_iters=5, lr_decay_iters=4, learning_rate=0.5, min_lr=0.003 / 10, batch_size=2)
    done = run("train.py", *flags(**changed, init_from="resume"))
    assert done.returncode == 0, done.stderr
    changes = [line.strip() for line in done.stdout.splitlines() if "it was" in line]
    assert changes == ["batch_size = 2 from here on; it was 4",
                       "learning_rate = 0.5 from here on; it was 0.003",
                       "max_iters = 5 from here on; it was 4"]


# ckpt_best.pt

def test_best_checkpoint_is_that_of_the_least_val_loss(trained, train, python_text, tmp_path):
    """Also of a run that is resumed with a learning rate far too high."""
    out = tmp_path / "out"
    shutil.copytree(trained(), out)
    for end in (25, 30):  # the second resume starts from worse than the best
        train(out, init_from="resume", max_iters=end, learning_rate=1, decay_lr=False)
    evals = losses(out)[1]
    best, last = load(out / "ckpt_best.pt"), load(out / "ckpt.pt")
    assert best["iteration"] == min(evals, key=evals.get) < 30 == last["iteration"]
    assert best["best_val_loss"] == last["best_val_loss"] == min(evals.values()) < evals[30] - 0.5
    val = (python_text / "val.bin").read_bytes()
    assert cross_entropy(best, val) == pytest.approx(min(evals.values()), abs=1e-5)


@pytest.mark.parametrize("first_version", [False, True], ids=["", "first version"])
def test_best_val_loss_is_read_from_the_best_checkpoint(first_version, train, trained, tmp_path):
    """Not from ckpt.pt: a full disk may have left an older ckpt_best.pt, here one of val loss 99. The first
    version of the format has no val_loss."""
    out = tmp_path / "out"
    shutil.copytree(trained(**TINY), out)
    older = load(out / "ckpt_best.pt")
    if first_version:
        del older["val_loss"]
        older["best_val_loss"] = 99.0
    else:
        older["val_loss"] = 99.0
    torch.save(older, tmp_path / "older.pt")
    os.replace(tmp_path / "older.pt", out / "ckpt_best.pt")
    train(out, **TINY | {"max_iters": 5, "learning_rate": 1, "decay_lr": False}, init_from="resume")
    evals = losses(out)[1]
    assert load(out / "ckpt_best.pt")["iteration"] == 5 and min(evals.values()) < evals[5] < 99


def test_the_best_checkpoint_of_another_run_is_kept_and_does_not_count(train, trained, tmp_path):
    """It was the best of a run that this node has had before, on the same data."""
    out = tmp_path / "out"
    shutil.copytree(trained(**TINY), out)
    name_run(out / "ckpt_best.pt", "another")
    before, run_id = (out / "ckpt_best.pt").read_bytes(), load(out / "ckpt.pt")["run_id"]
    train(out, **TINY | {"max_iters": 5, "learning_rate": 1, "decay_lr": False}, init_from="resume")
    assert losses(out)[1][5] > load(out / "ckpt_best.pt.old")["val_loss"]
    assert (out / "ckpt_best.pt.old").read_bytes() == before
    assert run_id and run_id == load(out / "ckpt.pt")["run_id"] == load(out / "ckpt_best.pt")["run_id"]
    train(tmp_path / "new", **TINY, init_from=out / "ckpt.pt")
    assert load(tmp_path / "new" / "ckpt.pt")["run_id"] != run_id


def test_a_run_from_scratch_renames_the_files_of_an_earlier_one(train, trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained(**TINY), out)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    train(out, **TINY | {"max_iters": 2})
    assert {name: (out / f"{name}.old").read_bytes() for name in before} == before
    assert load(out / "ckpt.pt")["iteration"] == 2 and max(read_log(out)[2]) == 2


def test_a_refused_start_renames_nothing(run, flags, trained, python_text, tmp_path):
    """From a checkpoint that lies in the out_dir itself, on data of another vocabulary."""
    out, other = tmp_path / "out", shutil.copytree(python_text, tmp_path / "other")
    shutil.copytree(trained(**TINY), out)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    meta = json.loads((other / "meta.json").read_text())
    meta["tokenizer"]["characters"] = meta["tokenizer"]["characters"].replace("~", "é")
    (other / "meta.json").write_text(json.dumps(meta))
    done = run("train.py", *flags(**TINY | dict(init_from=out / "ckpt.pt", dataset=other)))
    assert_one_sentence(done, "another vocabulary")
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


# Going on with something else

@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A dataset of random characters: no model of it is as good as one of text."""
    ids = torch.randint(96, (20_000,), generator=torch.Generator().manual_seed(1)).tolist()
    return write_ids(tmp_path_factory.mktemp("data") / "noise", ids, ids)


def test_best_val_loss_belongs_to_the_data(trained, train, noise, tmp_path):
    """Of other data it starts anew; the best checkpoint of the data before is kept under another name."""
    out = tmp_path / "out"
    shutil.copytree(trained(**SMALL), out)
    before = (out / "ckpt_best.pt").read_bytes()
    train(out, max_iters=25, dataset=noise, init_from="resume")
    evals, best = losses(out)[1], load(out / "ckpt_best.pt")
    assert evals[25] > evals[15] + 0.2  # which were measured on text
    assert best["best_val_loss"] == load(out / "ckpt.pt")["best_val_loss"] == min(evals[20], evals[25])
    assert best["iteration"] in (20, 25)
    assert (out / "ckpt_best.pt.old").read_bytes() == before


def test_a_best_checkpoint_without_a_loss_is_replaced(trained, train, tmp_path):
    """A user may have put a periodic checkpoint in its place, whose val_loss is None."""
    out = tmp_path / "out"
    shutil.copytree(trained(), out)
    torch.save(load(out / "ckpt.pt") | dict(val_loss=None), out / "ckpt_best.pt")
    train(out, max_iters=25, init_from="resume")
    assert load(out / "ckpt_best.pt")["val_loss"] == min(losses(out)[1][i] for i in (20, 25))


def test_best_val_loss_belongs_to_the_windows(run, flags, trained, tmp_path):
    """Their number, not how they are batched."""
    for name, settings, anew in (("a", dict(eval_tokens=16 * 32, batch_size=8,
                                            gradient_accumulation_steps=1), False),
                                 ("b", dict(eval_iters=5), True)):
        out = tmp_path / name
        shutil.copytree(trained(), out)
        best = load(out / "ckpt.pt")["best_val_loss"]
        done = run("train.py", *flags(out_dir=out, max_iters=21, lr_decay_iters=20, decay_lr=False,
                                      learning_rate=1, init_from="resume", **settings))
        assert done.returncode == 0, done.stderr
        assert ("starts anew" in done.stdout) == anew
        change = abs(load(out / "ckpt.pt")["best_val_loss"] - best)
        assert change > 1e-4 if anew else change < 1e-5  # the last evaluation is made again


def test_a_longer_run_with_another_interval_keeps_the_last_evaluation(train, tmp_path):
    """At the iteration that it goes on from, which it does not make again; there is one of each."""
    train(tmp_path / "out", max_iters=10, eval_interval=5)
    train(tmp_path / "out", max_iters=16, eval_interval=4, init_from="resume")
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    evals = [point["iter"] for point in map(json.loads, lines) if point["type"] == "eval"]
    assert evals == [0, 5, 10, 12, 16]


def test_a_jump_of_the_learning_rate_is_said(run, flags, train, tmp_path):
    """An ended run that is extended has left its cosine's end for another cosine's middle."""
    train(tmp_path / "out", max_iters=10, learning_rate=1e-2)
    done = run("train.py", *flags(max_iters=20, learning_rate=1e-2, init_from="resume"))
    [line] = [line for line in done.stdout.splitlines() if "learning rate" in line]
    # 5 of 15 decaying iterations are done: a quarter of the way from 1e-2 to 1e-3 is left behind
    assert "jumps to 0.00775;" in line and "would be 0.001" in line
    assert read_log(tmp_path / "out")[1][10]["lr"] == pytest.approx(7.75e-3)
    done = run("train.py", *flags(max_iters=21, lr_decay_iters=20, learning_rate=1e-2, init_from="resume"))
    assert done.returncode == 0 and "learning rate" not in done.stdout, done.stderr


@pytest.mark.parametrize("config", ["dense", "btt_moe"])
def test_a_run_from_the_weights_of_another(config, run, flags, trained, noise, tmp_path):
    """It starts at those weights' loss, at iteration 0, with a fresh optimizer and schedule."""
    source = trained(config, n_layer=1)
    settings = dict(n_layer=1, max_iters=1, init_from=source / "ckpt.pt", dropout=0.1)
    done = run("train.py", *flags(config, **settings))
    assert done.returncode == 0 and f"weights of {source / 'ckpt.pt'}" in done.stdout, done.stderr
    _, steps, evals = read_log(tmp_path / "out")
    assert evals[0]["val_loss"] == pytest.approx(losses(source)[1][20], abs=1e-6)
    assert evals[0]["tokens"] == 0 and steps[0]["lr"] == pytest.approx(3e-3 / 6)
    end = load(tmp_path / "out" / "ckpt.pt")
    assert end["iteration"] == 1 and all(s["step"] == 1 for s in end["optimizer"]["state"].values())
    assert_one_sentence(run("train.py", *flags(config, **settings | dict(n_embd=16))), "n_embd", "32", "16")
    assert_one_sentence(run("train.py", *flags(config, **settings | dict(init_from="gone/ckpt.pt"))),
                        "there is no checkpoint gone/ckpt.pt")


def test_a_run_may_start_from_the_weights_in_its_own_folder(train, trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained(**TINY), out)
    before = (out / "ckpt.pt").read_bytes()
    train(out, **TINY | {"max_iters": 0}, init_from=out / "ckpt.pt")
    assert (out / "ckpt.pt.old").read_bytes() == before
    assert losses(out)[1][0] == pytest.approx(losses(trained(**TINY))[1][4], abs=1e-6)


# A checkpoint of the first version of this file format. `python train.py config/btt_moe.py --n_layer=1 ...`
# wrote it, with the settings below. They leave device, dtype, compile, lr_decay_iters, min_lr, backend,
# out_dir, head_aligned and weight_norm at None.

V1 = dict(dataset="alphabet", n_layer=1, n_head=1, n_embd=8, num_experts=4, block_size=16, batch_size=4,
          gradient_accumulation_steps=2, max_iters=40, warmup_iters=1, eval_interval=40, eval_iters=4,
          log_interval=10, sample_tokens=0, learning_rate=3e-3)


@pytest.fixture
def old_run(tmp_path):
    """The out_dir of that run."""
    out = tmp_path / "old"
    out.mkdir()
    for name, file in (("ckpt_v1.pt", "ckpt.pt"), ("log_v1.jsonl", "log.jsonl")):
        shutil.copy(ROOT / "tests" / "fixtures" / name, out / file)
    return out


def test_a_checkpoint_of_the_first_version_resumes(run, alphabet, old_run):
    """Its weights give the val loss that they gave then, and training goes on from there."""
    unset = ("device", "dtype", "compile", "lr_decay_iters", "min_lr", "backend", "out_dir", "head_aligned",
             "weight_norm")
    config = load(old_run / "ckpt.pt")["config"]
    assert all(config[key] is None for key in unset) and config | V1 == config
    before, weights = read_log(old_run)[2][40]["val_loss"], load(old_run / "ckpt.pt")
    settings = V1 | dict(dataset=alphabet, out_dir=old_run, device="cpu", init_from="resume", max_iters=60)
    done = run("train.py", "config/btt_moe.py", *(f"--{k}={v}" for k, v in settings.items()))
    assert done.returncode == 0 and "at iteration 40" in done.stdout, done.stderr
    _, steps, evals = read_log(old_run)
    assert list(steps) == [0, 10, 20, 30, 40, 50] and list(evals) == [0, 40, 60]
    ids = (alphabet / "val.bin").read_bytes()
    starts = [i * 79 // 15 for i in range(16)]  # the validation windows of that version
    assert cross_entropy(weights, ids, 16, starts) == pytest.approx(before, abs=5e-3)  # a tie may choose
    assert evals[40]["val_loss"] == pytest.approx(cross_entropy(weights, ids, 16), abs=5e-3)  # another expert
    assert evals[60]["val_loss"] < before - 0.1
    assert load(old_run / "ckpt.pt")["optimizer"]["state"][0]["step"] == 60


def test_sample_reads_a_checkpoint_of_the_first_version(run, old_run):
    """The alphabet in order, most of the time: it has been learned."""
    done = run("sample.py", f"--out_dir={old_run}", "--device=cpu", "--start=ABC", "--max_new_tokens=20",
               "--temperature=0.1")
    assert done.returncode == 0 and len(done.stdout) == 3 + 20 + 1, done.stderr
    text = done.stdout[:-1]
    assert sum(ord(b) == ord(a) + 1 for a, b in zip(text, text[1:])) > 10


def test_a_checkpoint_from_before_rank_decided_between_sizes_keeps_its_own(trained, train, tmp_path):
    """Of 8 = 2 x 4 as 4 x 2 or 2 x 4, in Monarch matrices: they had half of the rank."""
    settings = TINY | dict(n_embd=8)
    checkpoint = load(trained("monarch", **settings) / "ckpt.pt")
    old = GPT(GPTConfig(**checkpoint["model_args"] | dict(cheapest_sizes=True)))
    assert old.blocks[0].attn.q.sizes.rank() == 4
    del checkpoint["model_args"]["cheapest_sizes"]
    torch.save(checkpoint | dict(model=old.state_dict()), tmp_path / "old.pt")
    assert load_checkpoint(str(tmp_path / "old.pt"))[2].blocks[0].attn.q.sizes == old.blocks[0].attn.q.sizes
    out = train(tmp_path / "out", "monarch", **settings, init_from=tmp_path / "old.pt")
    train(out, "monarch", **settings | dict(max_iters=6), init_from="resume")
    resumed = load(out / "ckpt.pt")
    assert resumed["iteration"] == 6 and resumed["model_args"]["cheapest_sizes"] is True
    assert resumed["model"]["blocks.0.attn.q.A"].shape == old.blocks[0].attn.q.A.shape


# What cannot be resumed

@pytest.fixture
def refused(run, flags, trained, tmp_path):
    """refused(config, key=value, ...) -> the failed attempt to resume a tiny run; it has left the run as it
    was."""
    def refused(config="btt", **settings):
        out = trained("btt", **TINY)
        before = {name: (out / name).read_bytes() for name in os.listdir(out)}
        done = run("train.py", *flags(config, **TINY | {"out_dir": out, "init_from": "resume"} | settings))
        assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before
        return done
    return refused


def test_resume_of_another_model_names_both(refused):
    assert_one_sentence(refused("monarch", n_embd=64), "n_embd", "16", "64", "'btt'", "'monarch'")


@pytest.mark.parametrize("key, before, after", [("mup", True, False), ("mup_base_width", 128, 32)])
def test_resume_keeps_learning_rate_factors(key, before, after, refused):
    assert_one_sentence(refused(**{key: after}), key, str(before), str(after))


@pytest.mark.parametrize("contents", ["empty", "garbage", "hostile"])
def test_resume_from_what_is_no_checkpoint(contents, run, flags, trained, tmp_path):
    """No code that it brings along is run."""
    made, ckpt = tmp_path / "made", tmp_path / "out" / "ckpt.pt"
    ckpt.parent.mkdir()
    ckpt.write_bytes(b"garbage" if contents == "garbage" else b"")
    if contents == "hostile":
        torch.save(load(trained(**TINY) / "ckpt.pt") | {"config": Hostile(str(made))}, ckpt)
    assert_one_sentence(run("train.py", *flags(**TINY, init_from="resume")), str(ckpt))
    assert not made.exists()


@pytest.mark.parametrize("changed", [None, "first", "length"])
def test_other_training_tokens_are_told(changed, run, flags, python_text, tmp_path):
    """A resume is exact where nothing has changed; a dataset that was made again is not the same for long."""
    data = shutil.copytree(python_text, tmp_path / "data")
    settings = TINY | dict(dataset=data, max_iters=2)
    assert run("train.py", *flags(**settings)).returncode == 0
    ids = bytearray((data / "train.bin").read_bytes())
    ids[:200] = bytes(200) if changed == "first" else ids[:200]
    ids += bytes(1) if changed == "length" else b""
    (data / "train.bin").write_bytes(ids)
    meta = json.loads((data / "meta.json").read_text()) | dict(train_tokens=len(ids))
    (data / "meta.json").write_text(json.dumps(meta))
    done = run("train.py", *flags(**settings | dict(init_from="resume", max_iters=4)))
    assert done.returncode == 0, done.stderr
    assert ("training tokens are others" in done.stdout) == (changed is not None)
