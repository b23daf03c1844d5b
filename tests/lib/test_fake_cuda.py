"""What needs a GPU to run, on fake tensors: tests/fake_cuda, and every size of the experiments."""
import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch

from configurator import structure_config
from experiments import launcher
from experiments.scaling.plan import expand
from lib.kernels import grouped
from model import GPT, GPTConfig
from structured import MoE
from tests import fake_cuda
from tests.conftest import ROOT


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="PyTorch has hooks of its own")
def test_on_fake_cuda(tmp_path):
    """tests/fake_cuda/checks.py, in a process that loads hooks.cpp before PyTorch."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:xdist", "-p",
               "no:cacheprovider", "tests/fake_cuda/checks.py"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ, FAKE_CUDA=str(fake_cuda.build(tmp_path))),
                          capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


# Every size of the plans and configs, and more

def configs(dataset):
    """Settings of train.py's keys."""
    for path in sorted((ROOT / "experiments" / "plans").glob("[a-z]*.py")):
        yield from (run.settings for run in expand(str(path), [f"--dataset={dataset}"], "out"))
    own = [structure_config(name) for name in ("dense", "low_rank", "kronecker", "monarch", "tt", "btt",
                                               "btt_moe", "moe", "einsum", "dyad")]
    mixtures = [dict(struct=struct, **{key: experts}) for struct in ("dense", "low_rank", "btt", "dyad")
                for key, experts in itertools.product(("num_experts", "ffn_experts"), (8, 16))]
    for settings, width in [*itertools.product(own, (128, 256, 768)),  # of the configs
                            *itertools.product(mixtures, (256, 1024, 1600, 2048, 4096))]:
        yield settings | dict(n_embd=width, n_head=width // 32)


def parts(model):
    """{what tells one from another: layer}: the projections and mixtures of a block."""
    block = model.blocks[0]
    mlp = [block.mlp] if isinstance(block.mlp, MoE) else [block.mlp.up, block.mlp.down]
    return {repr(layer): layer for layer in [block.attn.q, block.attn.o, *mlp]}


def test_every_size_runs(python_text, monkeypatch):
    """Forward and backward of each layer, by the torch body and grouped_mm with its checks, on meta tensors
    of bfloat16."""
    fake_cuda.open_bodies(monkeypatch)
    monkeypatch.setattr(launcher, "training_flops", lambda settings: 10 ** 6)  # makes each model, for budgets
    monkeypatch.setattr(grouped, "is_one_launch", lambda *_: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not on meta
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, **_: tensor)  # slow for what it does here
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    models, layers = set(), set()
    with torch.device("meta"):
        for settings in configs(python_text):
            settings = {key: value for key, value in settings.items() if key in fields}
            config = GPTConfig(**settings | dict(n_layer=1, vocab_size=96, block_size=128))
            if repr(config) in models:
                continue
            models.add(repr(config))
            for name, layer in parts(GPT(config).bfloat16()).items():
                if name in layers:
                    continue
                layers.add(name)
                x = torch.rand(1024, layer.d_in, dtype=torch.bfloat16, requires_grad=True)
                y = layer(x)
                y.sum().backward()
                assert y.dtype == torch.bfloat16
                for p in [x, *layer.parameters()]:
                    assert p.grad is not None and p.grad.shape == p.shape, name
    assert len(models) > 250 and len(layers) > 500
