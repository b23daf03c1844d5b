"""What must hold on a GPU, on fake CUDA tensors. tests/lib/test_fake_cuda.py runs this file with pytest, in a
process of its own."""
import pytest

from tests.fake_cuda import OnCPU, Waits, fake_cuda  # before torch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException,
                                           FakeTensorDeviceMismatchError)

from lib.kernels import grouped, grouped_product
from lib.steps import FiniteSteps
from model import GPT, GPTConfig
from structured import Einsum, Structured

AMPERE, HOPPER, BLACKWELL, RTX_50 = (8, 0), (9, 0), (10, 0), (12, 0)
KINDS = {
    "dense": {}, "btt": dict(struct="btt"), "dyad": dict(struct="dyad"),
    "einsum": dict(struct="einsum", theta=(0.75, 0, 0.25, 0, 0.25, 0.75, 0)),
    "btt_moe": dict(struct="btt", num_experts=4), "moe": dict(ffn_experts=4),
    "top 1": dict(struct="btt", num_experts=4, top_k=1, bias=True),
    "moe of btt": dict(struct="btt", ffn_experts=4, bias=True),
    "low_rank_moe": dict(struct="low_rank", num_experts=4, rank=3),  # rows of no multiple of 16 bytes
    "dyad_moe": dict(struct="dyad", num_experts=4, bias=True)}


def build(kind, **options):
    return GPT(GPTConfig(**dict(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=50) | KINDS[kind]
                         | options))


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cuda", dtype, enabled=dtype != torch.float32)


# Controls: what must not happen raises an error

def assign(x, index, value):
    x[index] = value


class WaitsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * dy.sum().item()


def in_backward(x):
    x.requires_grad_()
    WaitsInBackward.apply(x).sum().backward()


WAITING = {
    "item": lambda x: x.sum().item(), "tolist": lambda x: x.tolist(), "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x[0, 0]), "index": lambda x: [1, 2][x[0, 0].long()],
    "nonzero": lambda x: x.nonzero(), "where": lambda x: torch.where(x > 0), "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0), "mask to assign to": lambda x: assign(x, x > 0, x[0]),
    "unique": lambda x: x.unique(), "bincount": lambda x: x[0].long().bincount(minlength=9),
    "repeat_interleave": lambda x: x[0].repeat_interleave(x[0].long()),
    "multinomial": lambda x: x.multinomial(1), "equal": lambda x: x.equal(x),
    "allclose": lambda x: x.allclose(x), "largest class": lambda x: F.one_hot(x.long()),
    "cpu": lambda x: x.cpu(), "to cpu": lambda x: x.to("cpu", non_blocking=True), "backward": in_backward,
    "tensor": lambda x: torch.tensor([1, 2], device="cuda"),
    "as_tensor": lambda x: torch.as_tensor([1, 2], device="cuda")}
ON_CPU = {  # c is on the CPU
    "mixed": lambda x, c: x + c, "a number": lambda x, c: x + c[0, 0], "index": lambda x, c: x[c.long()],
    "to cuda": lambda x, c: c.to("cuda"), "copy_": lambda x, c: x.copy_(c),
    "copy_ to cpu": lambda x, c: c.copy_(x), "cat": lambda x, c: torch.cat([x, c])}
ALLOWED = {
    "repeat_interleave": lambda x: x[0].repeat_interleave(x[0].long(), output_size=9),
    "one_hot": lambda x: F.one_hot(x.long(), 4), "where": lambda x: torch.where(x > 0, x, 0),
    "number": lambda x: assign(x, slice(1), 0), "sort": lambda x: x.flatten().sort(stable=True)}


@pytest.mark.parametrize("name", WAITING)
def test_waiting_for_the_gpu_is_an_error(name):
    with fake_cuda():
        x = torch.rand(4, 4)
        with pytest.raises((Waits, DataDependentOutputException, DynamicOutputShapeException)):
            WAITING[name](x)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_tensor_on_the_cpu_is_an_error(name):
    with fake_cuda(transfers=1):
        x = torch.rand(4, 4)
        c = x.cpu()
        with pytest.raises((OnCPU, Waits, FakeTensorDeviceMismatchError)):
            ON_CPU[name](x, c)


@pytest.mark.parametrize("make", [torch.ones, torch.arange, torch.empty])
def test_a_tensor_made_on_the_cpu_is_an_error(make):
    with fake_cuda(), pytest.raises(OnCPU):
        make(4, device="cpu")


@pytest.mark.parametrize("name", ALLOWED)
def test_what_does_not_wait_is_none(name):
    with fake_cuda():
        ALLOWED[name](torch.rand(4, 4))


@pytest.mark.parametrize("given, made", [(2, 1), (1, 2)])
def test_transfers_are_counted(given, made):
    with pytest.raises((AssertionError, Waits)):
        with fake_cuda(transfers=given):
            for _ in range(made):
                torch.rand(4).cpu()


# A model

def train(model, dtype):
    """An iteration, as train.py makes it: forward, backward, clipping, optimizer step, biases of routers."""
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    idx = torch.randint(50, (2, 8))
    with autocast(dtype):
        _, loss, aux = model(idx, idx, return_aux=True)
    scaler.scale(loss + 0.01 * aux.loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    finite = FiniteSteps(optimizer).step(loss.detach(), norm, 1e-3, None)
    scaler.update()
    model.rebalance(aux.load, aux.variance, 0.1 * finite)
    assert all(v.device == p.device for p, state in optimizer.state.items() for v in state.values())
    for name, p in model.named_parameters():
        assert (p.grad.device, p.grad.dtype, p.grad.shape) == (p.device, torch.float32, p.shape), name


@pytest.mark.parametrize("kind, bodies", [*((kind, True) for kind in KINDS), ("btt_moe", False),
                                          ("moe", False)])
def test_a_model_does_not_wait(kind, bodies):
    """In training, evaluation and generation, in bfloat16 on a GPU with grouped_mm. With the operators'
    bodies in the open, and as operators."""
    with fake_cuda(HOPPER, bodies=bodies):
        model = build(kind)
        train(model, torch.bfloat16)
        idx = torch.randint(50, (2, 8))
        with autocast():
            model.balance_routers([[(idx, idx)]])
            model.eval()
            with torch.no_grad():
                _, loss, aux = model(idx, idx, return_aux=True)
                assert loss.device == aux.load.device == idx.device
            ways = [dict(top_k=5, top_p=0.9)]
            if kind in ("dense", "btt_moe"):  # attention is the same in all
                ways.append(dict(temperature=0, use_cache=False))
            for options in ways:
                assert model.generate(idx, 2, **options).shape == (2, 10)  # the window slides


def products(model) -> int:
    """Grouped products of a forward, and so transfers where each is a loop over experts."""
    return sum(len(m.order) if isinstance(m, Einsum) and m.plain else 2 if not isinstance(m, Einsum) else 0
               for m in model.modules() if isinstance(m, Structured) and m.num_experts)


@pytest.mark.parametrize("kind, capability, dtype", [
    ("btt_moe", AMPERE, torch.bfloat16), ("dyad_moe", AMPERE, torch.bfloat16),
    ("low_rank_moe", AMPERE, torch.bfloat16), ("moe", AMPERE, torch.float16), ("moe", HOPPER, torch.float16),
    ("moe", HOPPER, torch.float32), ("moe", RTX_50, torch.bfloat16)])
def test_a_loop_over_experts_waits_once(kind, capability, dtype):
    """Once for a product and its gradients."""
    with fake_cuda(capability, transfers=products(build(kind))):
        train(build(kind), dtype)


@pytest.mark.parametrize("capability, dtype, groups, hip, expected", [
    (HOPPER, torch.bfloat16, 1023, None, True), (BLACKWELL, torch.bfloat16, 8, None, True),
    (HOPPER, torch.bfloat16, 1024, None, False), (HOPPER, torch.float16, 8, None, False),
    (AMPERE, torch.bfloat16, 8, None, False), (RTX_50, torch.bfloat16, 8, None, False),
    ((9, 4), torch.bfloat16, 8, "7.0", False)])  # an MI300X
def test_where_grouped_mm_is_one_launch(capability, dtype, groups, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    with fake_cuda(capability):
        assert grouped.is_one_launch(torch.rand(3, 8, dtype=dtype), groups) == expected


@pytest.mark.parametrize("rows", [0, 1, 7, 64])
@pytest.mark.parametrize("K, M", [(8, 16), (5, 16), (8, 7), (33, 3), (1, 1)])
def test_operands_of_grouped_mm_are_aligned(K, M, rows):
    """It checks that itself. An operand may begin in the middle of a tensor."""
    with fake_cuda(HOPPER):
        x = torch.rand(rows * K + 1, dtype=torch.bfloat16)[1:].view(rows, K).requires_grad_()
        w = torch.rand(4, M, K, dtype=torch.bfloat16, requires_grad=True)
        y = grouped_product(x, w, torch.arange(4))
        assert y.shape == (rows, M) and y.is_contiguous()
        y.sum().backward()
        assert (x.grad.dtype, w.grad.dtype, w.grad.shape) == (torch.bfloat16, torch.bfloat16, w.shape)
