"""One course of training, computed in other ways: another split of the batch, two processes.

The runs are in float64: in float32 the rounding of another order of summation may choose other experts.
"""
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, SMALL, THREADS
from tests.runs import assert_same_course, in_float64, read_log

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
