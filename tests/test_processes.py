"""One course of training, computed in other ways: another split of the batch, two processes, two nodes.

The runs are in float64: in float32 the rounding of another order of summation may choose other experts.
"""
import atexit
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lib.device
import model
from lib.checkpoint import tensors_of
from tests.conftest import ROOT, SMALL, THREADS, TINY
from tests.runs import assert_one_sentence, assert_same_course, in_float64, load, name_run, read_log

SHORT = dict(n_layer=1, max_iters=8, eval_interval=4, before=in_float64)


@pytest.mark.parametrize("config", ["dense", "btt_moe"])
def test_split_of_the_batch_does_not_matter(config, trained):
    """8 sequences, or 4 micro-batches of 2; but for the routers' losses, which are those of a micro-batch."""
    whole, split = (trained(config, **SHORT, aux_loss_weight=0, batch_size=size, eval_iters=16 // size,
                            gradient_accumulation_steps=8 // size) for size in (8, 2))
    assert_same_course(whole, split)


@pytest.mark.parametrize("config, settings", [
    ("dense", {}),
    ("btt_moe", {}),
    ("moe", {}),
    # 4 tokens for 8 experts: most get no gradient. One batch to evaluate: the second process has none.
    ("btt_moe", dict(block_size=2, batch_size=2, top_k=1, eval_iters=1)),
], ids=["dense", "btt_moe", "moe", "starved experts"])
def test_two_processes_train_as_one(config, settings, trained):
    settings = SHORT | {"gradient_accumulation_steps": 4, "batch_size": 2} | settings
    one, two = trained(config, **settings), trained(config, processes=2, **settings)
    assert_same_course(one, two)
    assert read_log(two)[0][0]["processes"] == 2


@pytest.mark.parametrize("start", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]],
                         ids=["python", "torchrun"])
def test_the_documented_command(start, trained, python_text, tmp_path):
    """As a user types it, from another folder, in float32: the same losses, into out-<config files>, and a
    sample."""
    flags = [f"--{k}={v}" for k, v in (SMALL | {"dataset": python_text, "sample_tokens": 30}).items()]
    command = [sys.executable, *start, ROOT / "train.py", "config/dense.py", "config/quickstart.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": THREADS},
                          capture_output=True, text=True, timeout=6000)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["out-dense-quickstart"]
    assert_same_course(tmp_path / "out-dense-quickstart", trained(), tolerance=1e-4)
    assert done.stdout.count("a sample of 30 tokens") == done.stdout.count("best val loss") == 1


# ---- Two nodes, here two folders: each rank looks into its own, and rank 0 may have been the other one -----


def in_a_folder_of_its_own():
    """The process is the first of its node; when it ends, it writes its weights and moments to its folder."""
    in_float64()
    folder = Path(os.environ["NODES"]) / os.environ["RANK"]
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    configure = model.GPT.configure_optimizers

    def recorded(self, *args):
        optimizer = configure(self, *args)
        atexit.register(lambda: torch.save([self.state_dict(), optimizer.state_dict()["state"]], "end.pt"))
        return optimizer
    model.GPT.configure_optimizers = recorded


NODES = dict(config="btt_moe", n_layer=1, gradient_accumulation_steps=4, batch_size=2, max_iters=10,
             out_dir="out", router_balance_rate=0.01)


@pytest.fixture
def nodes(run, flags, tmp_path):
    """nodes([checkpoint of rank 0 | None, of rank 1], init_from="auto", ...) -> the process of rank 0."""
    def nodes(checkpoints, **settings):
        for rank, checkpoint in enumerate(checkpoints):
            if checkpoint is not None:
                shutil.copytree(checkpoint, tmp_path / str(rank) / "out")
        return run("train.py", *flags(**NODES | settings), processes=2, before=in_a_folder_of_its_own,
                   NODES=str(tmp_path))
    return nodes


def assert_same_ends(folder):
    ends = [load(folder / rank / "end.pt") for rank in "01"]
    assert ends[0][0].keys() == ends[1][0].keys() and len(ends[0][1]) == len(ends[1][1]) > 0
    for a, b in zip(*map(list, map(tensors_of, ends)), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def parts(train, trained, tmp_path_factory):
    """{n: the out_dir of that course, stopped at iteration n}; "other": of another seed, at iteration 6. The
    checkpoints of all three are named as those of one run."""
    folder, settings = tmp_path_factory.mktemp("parts"), {k: v for k, v in NODES.items() if k != "out_dir"}
    settings |= dict(before=in_float64, lr_decay_iters=10)
    parts = {n: train(folder / str(n), **settings | dict(max_iters=n)) for n in (3, 6)}
    parts["other"] = train(folder / "other", **settings | dict(max_iters=6, seed=8))
    for out in parts.values():
        name_run(out / "ckpt.pt", "one")
        name_run(out / "ckpt_best.pt", "one")
    parts["whole"] = trained(**settings)
    return parts


@pytest.mark.parametrize("first, second", [(None, 6), (3, 6), (6, None)])
def test_the_newest_checkpoint_of_all_nodes_is_resumed(first, second, nodes, parts, tmp_path):
    """On whichever node it lies; the end is that of one process left alone, and the same on both nodes."""
    done = nodes([parts.get(first), parts.get(second)], init_from="auto")
    assert done.returncode == 0 and "at iteration 6" in done.stdout, done.stderr
    assert (f"checkpoint of iteration {first}, which is older" in done.stdout) == (first == 3)
    assert_same_ends(tmp_path)
    whole, end = load(parts["whole"] / "ckpt.pt"), load(tmp_path / "0" / "out" / "ckpt.pt")
    for name, weight in whole["model"].items():
        torch.testing.assert_close(end["model"][name], weight, rtol=0, atol=1e-7, msg=name)
    assert end["iteration"] == 10 and end["tokens"] == whole["tokens"] and end["run_id"] == "one"


def test_two_checkpoints_of_one_iteration_do_not_let_the_nodes_diverge(nodes, parts, tmp_path):
    done = nodes([parts[6], parts["other"]], init_from="resume")
    assert done.returncode == 0, done.stderr
    assert_same_ends(tmp_path)


@pytest.mark.parametrize("run_id", ["another", None])
def test_checkpoints_of_two_runs_are_not_mixed(run_id, nodes, parts, tmp_path):
    """The newer one may be what another run has left on that node; one without a name may be this run's."""
    shutil.copytree(parts[6], tmp_path / "newer")
    name_run(tmp_path / "newer" / "ckpt.pt", run_id)
    done = nodes([parts[3], tmp_path / "newer"], init_from="auto")
    if run_id is not None:
        assert_one_sentence(done, "several runs", "rank 0 has one of iteration 3, of run one",
                            "rank 1 has one of iteration 6, of run another")
        assert load(tmp_path / "0" / "out" / "ckpt.pt")["iteration"] == 3
    else:
        assert done.returncode == 0 and "at iteration 6" in done.stdout, done.stderr


def with_losses_that_stop_being_finite():
    in_a_folder_of_its_own()
    sys.stderr = open("stderr", "w", buffering=1)
    forward, calls = model.GPT.forward, []

    def spoiled(self, *args, **options):
        logits, loss, *rest = forward(self, *args, **options)
        calls.append(self.training)
        return logits, loss * (math.nan if sum(calls) > 6 else 1), *rest  # from the third iteration on
    model.GPT.forward = spoiled


def test_every_node_says_where_the_checkpoint_is_when_losses_are_not_finite(run, flags, tmp_path):
    """Rank 0 alone has written it."""
    settings = NODES | dict(max_skipped=2, checkpoint_interval=1, router_balance_rate=0)
    done = run("train.py", *flags(**settings), processes=2, before=with_losses_that_stop_being_finite,
               NODES=str(tmp_path))
    errors = [(tmp_path / rank / "stderr").read_text() for rank in "01"]
    assert done.returncode == 1 and errors[0] == errors[1]
    assert "2 iterations in a row" in errors[0] and "ckpt.pt holds the checkpoint of iteration 3" in errors[0]


def test_a_broken_checkpoint_gives_way_to_a_whole_one(nodes, parts, tmp_path):
    shutil.copytree(parts[6], tmp_path / "0" / "out")
    os.truncate(tmp_path / "0" / "out" / "ckpt.pt", 1000)
    done = nodes([None, parts[3]], init_from="auto")
    assert done.returncode == 0 and "at iteration 3" in done.stdout, done.stderr
    assert "rank 0 has a checkpoint that cannot be read" in done.stdout
    assert_same_ends(tmp_path)


def test_where_no_node_has_a_checkpoint_there_is_one_sentence(nodes, tmp_path):
    assert_one_sentence(nodes([None, None], init_from="resume"), "there is no checkpoint", "scratch")
    assert not (tmp_path / "0" / "out").exists()


def test_a_checkpoint_of_another_model_on_the_second_node_is_one_sentence(nodes, parts):
    assert_one_sentence(nodes([None, parts[3]], init_from="auto", n_embd=16), "n_embd = 32", "16")


def test_a_run_from_scratch_leaves_no_checkpoint_behind_on_any_node(nodes, parts, tmp_path):
    """A later resume would take it for its own."""
    done = nodes([None, parts[6]], max_iters=2)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "0" / "out" / "ckpt.pt")["iteration"] == 2
    assert "ckpt.pt" not in os.listdir(tmp_path / "1" / "out")


def second_rank(*arguments):
    """More arguments for the second of two processes."""
    if os.environ["RANK"] == "1":
        sys.argv += arguments


def with_another_rate():
    second_rank("--learning_rate=0.5")


def with_a_longer_start():
    second_rank("--init_from=" + "x" * 100 + os.environ["RANK"] + ".pt")


def with_another_default_dtype():
    """As a GPU of another kind would choose."""
    if os.environ["RANK"] == "1":
        lib.device.choose_dtype = lambda *_: "bfloat16"


def with_other_data():
    second_rank(f"--dataset={os.environ['OTHER']}")


@pytest.mark.parametrize("before, word", [(with_another_rate, "learning_rate = 0.5 on rank 1"),
                                          (with_a_longer_start, "init_from = xxx"),
                                          (with_another_default_dtype, "dtype = bfloat16 on rank 1"),
                                          (with_other_data, "trained_on = ")],
                         ids=["settings", "start", "dtype", "data"])
def test_processes_that_differ_do_not_train(before, word, run, flags, python_text, tmp_path):
    """On two nodes it may be an old config file, or another Python's library in data/python_char."""
    other = shutil.copytree(python_text, tmp_path / "other")
    ids = bytearray((other / "train.bin").read_bytes())
    ids[:100] = bytes(100)
    (other / "train.bin").write_bytes(ids)
    done = run("train.py", *flags(**TINY), processes=2, before=before, OTHER=str(other))
    assert_one_sentence(done, "the processes differ", word)
    assert not (tmp_path / "out").exists()
