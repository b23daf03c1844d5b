"""torch.compile against eager mode: layers, models and runs of train.py, in float64.

Most graphs run as they were traced (aot_eager). Two tests compile to C++, which takes long.
"""
import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import structured
from lib import device
from model import GPT
from structured import LayerConfig, linear, make_experts
from tests.conftest import ROOT, THREADS, TINY
from tests.runs import assert_one_sentence, assert_same_checkpoint, assert_same_course, in_float64, read_log
from tests.structures import close, randn, randomize
from tests.test_model import random_model

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
    reason="no C++ compiler, which torch.compile needs on a CPU")


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


# Layers

class ReluExperts(torch.nn.Module):
    """Experts that are MLPs."""

    def __init__(self):
        super().__init__()
        self.up = make_experts(LayerConfig("btt"), 4, 16, 32)
        self.down = make_experts(LayerConfig("dense"), 4, 32, 16)

    def forward(self, rows, ends):
        return self.down(self.up(rows, ends).relu(), ends)


@pytest.mark.parametrize("kind", ["btt", "dense", "dyad", "mlp"])
def test_compiled_mixture(kind):
    """One graph without breaks, the same results, and no recompilation when the routing changes."""
    if kind == "mlp":
        moe = structured.MoE(16, ReluExperts(), 4, 2).double()
    else:
        moe = linear(kind, 16, 16, num_experts=4, bias=True).double()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, backend=backend)
    loads = []
    for shift in (0, 1, 2, 3):
        x = randn(24, 16).requires_grad_()
        with torch.no_grad():
            moe.router.copy_(moe.router.roll(shift, 0) * (1 if shift < 3 else 100))
        results = []
        for run in (moe, compiled):
            y, aux = run(x, return_aux=True)
            grads = torch.autograd.grad(y.square().sum() + aux.loss, [x, *moe.parameters()])
            results.append((y, *aux, *grads))
        loads.append(tuple(aux.load.tolist()))
        for a, e in zip(*results):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * max(1, e.abs().max().item()))
    assert len(set(loads)) == 4 and backend.frame_count == 1


@needs_a_compiler
def test_router_gradient_of_a_mixture_with_bias_in_compiled_code():
    """The gates meet the biases outside of the experts' operator. Made by gather, their gradient is wrong in
    the C++ of torch 2.13."""
    layer = randomize(linear("btt", 64, 64, num_experts=4, top_k=2, bias=True), std=0.2)
    x, gradients = randn(2, 128, 64), []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        y, aux = call(x, return_aux=True)
        gradients += torch.autograd.grad(y.square().mean() + aux.loss, layer.router)
    close(gradients[1], gradients[0], 1e-9)


# Models

@pytest.mark.parametrize("kind", ["btt_moe", "moe"])
def test_a_compiled_backward_computes_in_the_types_of_an_eager_one(kind):
    """train.py's backward is outside of the autocast that its forward is in: the gradients of routers and
    gains, made in float32, must not become products of bfloat16 in compiled code."""
    device.choose_compile(False, "cpu")
    model = random_model(kind, n_layer=1).float().train()
    idx, targets = torch.randint(40, (2, 3, 12))
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            _, loss, aux = run(idx, targets, return_aux=True)
        names, parameters = zip(*((name, p) for name, p in model.named_parameters()
                                  if "router" in name or "gain" in name))
        gradients.append(torch.autograd.grad(loss + aux.loss, parameters))
    assert any("router" in name for name in names)
    for name, got, expected in zip(names, gradients[1], gradients[0]):
        error = (got - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind, backend", [
    ("btt_moe", "aot_eager"), pytest.param("moe", "inductor", marks=needs_a_compiler)])
def test_compiled_model(kind, backend):
    """One graph, never made again while the routing changes; loss, load and gradients as in eager mode."""
    model, counter = random_model(kind, n_layer=1).train(), CompileCounterWithBackend(backend)
    compiled, loads = torch.compile(model, fullgraph=True, backend=counter), []
    for _ in range(3):
        idx, targets = torch.randint(40, (2, 3, 12))
        results = []
        for run in (model, compiled):
            logits, loss, aux = run(idx, targets, return_aux=True, return_logits=False)
            assert logits is None
            total = loss + 0.01 * aux.loss
            results.append([loss, aux.load, *torch.autograd.grad(total, model.parameters())])
        for got, expected in zip(results[1], results[0]):  # the logits are float32, all else float64
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        loads.append(aux.load.flatten().tolist())
        model.rebalance(aux.load, aux.variance, 1.0)
    assert loads[0] != loads[1] != loads[2] and counter.frame_count == 1


# Runs

def test_compiled_model_takes_other_lengths():
    """From the second length on the lengths are symbols in the graph."""
    model = random_model("btt_moe", n_layer=1, layers="mlp")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for T in (8, 5, 1):
        idx = torch.randint(model.config.vocab_size, (2, T))
        close(compiled(idx)[0], model(idx)[0])


def compile_without_code():
    """torch.compile traces and differentiates the graph as always, but runs it without generating C++."""
    in_float64()
    compiled = torch.compile
    torch.compile = lambda module, **options: compiled(module, **options | {"backend": "aot_eager"})


def compile_beside_small_buckets(graphs):
    """As compile_without_code; gradients are reduced in many parts, for which torch.compile cuts the graph.
    Each graph leaves a mark in a file of its process."""
    in_float64()
    compiled, aot_eager = torch.compile, torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        with open(f"{graphs}.{os.environ['RANK']}", "a") as f:
            f.write(".")
        return aot_eager(graph, inputs)
    torch.compile = lambda module, **options: compiled(module, **options | {"backend": backend})
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 10_000
    torch.nn.parallel.DistributedDataParallel = functools.partial(
        torch.nn.parallel.DistributedDataParallel, bucket_cap_mb=0.03)


@pytest.mark.parametrize("config, layers", [("btt_moe", "mlp"), ("moe", "all")])
def test_compiled_processes_train_as_eager_ones(config, layers, train, trained, tmp_path):
    """Two micro-batches for each of two processes, and evaluations in between."""
    settings = dict(n_layer=1, max_iters=6, eval_interval=3, gradient_accumulation_steps=4, batch_size=2,
                    layers=layers)
    hook = functools.partial(compile_beside_small_buckets, str(tmp_path / "graphs"))
    out = train(tmp_path / "out", config, processes=2, compile=True, before=hook, **settings)
    # in compiled code the logits are float32
    assert_same_course(trained(config, before=in_float64, **settings), out, 1e-6)
    graphs = [len((tmp_path / f"graphs.{rank}").read_text()) for rank in (0, 1)]
    assert graphs[0] == graphs[1] > 3, graphs


def compile_and_count_eager_calls(place):
    compile_without_code()
    forward = GPT.forward

    def counted(self, *args, **options):
        if not torch.compiler.is_compiling():
            with open(place, "a") as f:
                f.write(".")
        return forward(self, *args, **options)
    GPT.forward = counted


def test_a_compiled_run_calls_the_compiled_model_alone(train, tmp_path):
    """Before a checkpoint too, which asks for a loss: eager it would need more memory than training."""
    place = tmp_path / "calls"
    train(tmp_path / "out", compile=True, before=functools.partial(compile_and_count_eager_calls, str(place)),
          **TINY | dict(checkpoint_interval=1, eval_interval=100))
    assert not place.exists()


def no_compiler():
    from torch._inductor import config
    config.cpp.cxx = (None, "/nowhere/g++")  # what CXX=/nowhere/g++ does before torch is imported


@pytest.mark.parametrize("before, environment", [
    (no_compiler, {}), (None, dict(TORCHINDUCTOR_CACHE_DIR="/dev/null/x")),
    (None, dict(TORCHINDUCTOR_CACHE_DIR="/proc"))], ids=["no compiler", "no cache", "no room in the cache"])
def test_a_run_that_cannot_be_compiled_is_one_sentence(before, environment, run, flags, tmp_path):
    done = run("train.py", *flags(**TINY, compile=True), before=before, **environment)
    assert_one_sentence(done, "torch.compile does not work here (")
    assert os.listdir(tmp_path) == []


def test_an_eager_run_needs_no_cache_of_compiled_code(flags, trained, tmp_path):
    """Although torch makes its folder, for AdamW: where torch is imported in this environment."""
    environment = os.environ | {"OMP_NUM_THREADS": THREADS, "TORCHINDUCTOR_CACHE_DIR": "/dev/null/x"}
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags(**TINY)], env=environment, cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert_same_checkpoint(tmp_path / "out", trained(**TINY))


def compile_on_the_first_rank_alone():
    def fail(module, **options):
        raise RuntimeError("no compiler on this node\nand more lines")
    compile_without_code()
    if os.environ["RANK"] == "1":
        torch.compile = fail


def test_a_rank_that_cannot_compile_ends_all(run, flags, tmp_path):
    done = run("train.py", *flags(**TINY, compile=True), processes=2, before=compile_on_the_first_rank_alone)
    assert_one_sentence(done, "torch.compile does not work here (no compiler on this node)")
    assert os.listdir(tmp_path) == []


def test_compiled_run(trained):
    """The same losses and weights, under the same names."""
    eager = trained("btt_moe", before=in_float64, **TINY)
    compiled = trained("btt_moe", before=compile_without_code, compile=True, **TINY)
    assert read_log(compiled)[0][0]["compile"] is True
    assert_same_course(eager, compiled, tolerance=1e-6)  # compiled code casts the logits to float32
