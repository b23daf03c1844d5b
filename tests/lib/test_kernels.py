"""lib/kernels: each path against a loop over rows, against the others, and as operators of torch.library."""
import math
import os
import shlex
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import structured
from lib import kernels
from lib.kernels import c_body, grouped, grouped_product, operators, plan, routing, torch_body
from lib.kernels.grouped import (_grouped_product, _grouped_product_grad_w, loop_product, loop_product_grad_w,
                                 one_product, one_product_grad_w)
from structured import Sizes
from tests.conftest import PROCESSES

# (K, M) and the rows of each expert: empty ones at the start, in the middle and at the end; no rows at all
SHAPES = [(8, 16), (5, 7), (9, 4), (1, 1), (33, 3)]
COUNTS = [(4, 4, 4), (0, 3, 0, 6, 1, 0), (0, 0, 11), (1,), (0, 0)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}

# sizes of one expert, (α β γ δ ε φ ρ)
EXPERTS = [
    Sizes(4, 1, 4, 1, 4, 4, 1),  # Monarch
    Sizes(4, 1, 3, 1, 5, 4, 3),  # BTT
    Sizes(4, 3, 1, 4, 3, 1, 2),  # Tensor-Train
    Sizes(4, 2, 3, 2, 5, 2, 3),  # all above 1
    Sizes(2, 5, 2, 5, 2, 3, 2),  # B goes first
    Sizes(1, 4, 4, 4, 1, 4, 1),
    Sizes(12, 1, 1, 1, 16, 1, 2),  # low rank
    Sizes(3, 3, 2, 3, 3, 2, 1),
    Sizes(16, 1, 20, 1, 16, 20, 1),  # whole vectors, and more groups than lanes
    Sizes(17, 1, 3, 2, 33, 2, 1),  # one more than whole vectors
    Sizes(40, 19, 1, 18, 24, 1, 1)]
all_experts = pytest.mark.parametrize("sizes", EXPERTS, ids=lambda s: "x".join(map(str, s)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


# ---- grouped_product ---------------------------------------------------------------------------------------

def naive_product(x, w, ends):
    """A row at a time, in float64."""
    x, w, expert = x.double(), w.double(), torch.searchsorted(ends, torch.arange(len(x)), right=True)
    rows = [w[expert[n]] @ x[n] for n in range(len(x))]
    return torch.stack(rows) if rows else x @ w[0].mT


def segments(shape, counts, dtype):
    K, M = shape
    ends = torch.tensor(counts).cumsum(0)
    make = dict(dtype=dtype, requires_grad=True)
    return torch.randn(sum(counts), K, **make), torch.randn(len(counts), M, K, **make), ends


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_product(shape, counts, dtype):
    """Every path multiplies each row by its own expert's matrix, and so do the gradients."""
    x, w, ends = segments(shape, counts, dtype)
    y = naive_product(x, w, ends)
    dy = torch.randn_like(y).to(dtype)
    dx, dw = torch.autograd.grad(y, (x, w), dy.double(), allow_unused=True, materialize_grads=True)
    tolerance = TOLERANCE[dtype]

    actual = grouped_product(x, w, ends)
    assert actual.dtype == dtype
    close(actual, y, tolerance)
    for a, expected in zip(torch.autograd.grad(actual, (x, w), dy), (dx, dw)):
        close(a, expected, 2 * tolerance)

    x, w = x.detach(), w.detach()
    close(loop_product(x, w, ends), y, tolerance)
    close(loop_product_grad_w(x, dy, ends), dw, 2 * tolerance)
    if sum(counts) and dtype != torch.float64:
        close(one_product(x, w, ends), y, tolerance)
        close(one_product_grad_w(x, dy, ends), dw, 2 * tolerance)


@pytest.mark.parametrize("grad_w", [loop_product_grad_w, one_product_grad_w])
@pytest.mark.parametrize("shape", [(8, 16), (5, 7)])
def test_an_expert_without_rows_has_a_gradient_of_zero(shape, grad_w, monkeypatch):
    """Whatever was in the memory: here NaN, and grouped_mm leaves it there as it may on a GPU."""
    whole = F.grouped_mm

    def leaves_nan(left, right, *, offs):
        empty = offs.diff(prepend=offs.new_zeros(1)) == 0
        return whole(left, right, offs=offs).masked_fill(empty[:, None, None], math.nan)

    monkeypatch.setattr(F, "grouped_mm", leaves_nan)
    x, w, ends = segments(shape, (0, 3, 0, 6, 1, 0), torch.bfloat16)
    dy = torch.randn(10, shape[1], dtype=torch.bfloat16)
    (expected,) = torch.autograd.grad(naive_product(x, w, ends), w, dy.double())
    torch.use_deterministic_algorithms(True)  # empty tensors are filled with NaN
    try:
        dw = grad_w(x.detach(), dy, ends)
    finally:
        torch.use_deterministic_algorithms(False)
    close(dw, expected, 4e-2)
    assert not dw[[0, 2, 5]].any() and dw.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_product_of_any_layout(shape, dtype, monkeypatch):
    """A transposed matrix, as in a backward, one of every second, and rows that begin anywhere.

    What grouped_mm gets begins at a multiple of 16 bytes, which it does not check on a CPU.
    """
    whole = F.grouped_mm

    def aligned(*operands, offs):
        assert all(t.storage_offset() * t.element_size() % 16 == 0 for t in operands)
        return whole(*operands, offs=offs)
    monkeypatch.setattr(F, "grouped_mm", aligned)
    x, w, ends = (t.detach() for t in segments(shape, (4, 0, 2), dtype))
    expected = naive_product(x, w, ends)
    x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    for same in (w.mT.contiguous().mT, torch.stack([w, w], dim=3)[..., 0]):
        assert not same.is_contiguous() or 1 in shape
        close(one_product(x, same, ends), expected, TOLERANCE[dtype])


def test_ends_are_read_once(monkeypatch):
    """For a product and both of its gradients, which get what the product has read."""
    on_host, read = [], grouped._segments
    monkeypatch.setattr(grouped, "_segments", lambda ends: on_host.append(ends) or read(ends))
    x, w, ends = segments((5, 3), (2, 0, 3), torch.float64)
    grouped_product(x, w, ends).sum().backward()
    assert len(on_host) == 3 and all(torch.equal(e, ends) for e in on_host)
    assert on_host[0].data_ptr() != ends.data_ptr() and on_host[2].data_ptr() == on_host[0].data_ptr()


def test_only_the_gradients_that_are_needed():
    x, w, ends = segments((5, 3), (2, 0, 3), torch.float64)
    grouped_product(x.detach(), w, ends).sum().backward()
    grouped_product(x, w.detach(), ends).sum().backward()
    expected = torch.autograd.grad(naive_product(x, w, ends).sum(), (x, w))
    close(x.grad, expected[0], 1e-10)
    close(w.grad, expected[1], 1e-10)


def test_grouped_product_takes_part_in_autocast():
    x, w, ends = segments((5, 3), (2, 0, 3), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_product(x, w, ends)
    assert y.dtype == torch.bfloat16
    close(y, naive_product(x, w, ends), 5e-2)
    y.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


# ---- The plan ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("T, k, E, skew", [
    (50, 2, 4, 0), (50, 1, 4, 0), (50, 4, 4, 0), (3, 2, 8, 0), (1, 1, 1, 0), (0, 2, 4, 0), (40, 1, 5, 100),
    (40, 2, 5, 100)])
def test_plan(T, k, E, skew, rows):
    """Each assignment has one row, in a tile of its expert; padding rows read token 0 and belong to none."""
    scores = torch.randn(T, E)
    scores[:, E // 2] += skew  # one expert gets a row of every token
    experts = scores.topk(k).indices
    made = plan.make_plan(experts, E, rows)
    tiles = (T * k + E * (rows - 1)) // rows
    assert made.tile_expert.shape == (tiles,)
    assert made.row_token.shape == made.row_choice.shape == (tiles * rows,)
    assert made.place.shape == (T, k)
    seen = []
    for n, (token, choice) in enumerate(zip(made.row_token.tolist(), made.row_choice.tolist())):
        if choice == T * k:
            assert token == 0
            continue
        assert token == choice // k and made.place.flatten()[choice] == n
        assert made.tile_expert[n // rows] == experts.flatten()[choice]
        seen.append(choice)
    assert sorted(seen) == list(range(T * k))
    assert ((0 <= made.tile_expert) & (made.tile_expert < E)).all()


@pytest.mark.parametrize("T, k, E", [(4096, 2, 8), (512, 2, 8), (16384, 1, 64)])
def test_padding_is_small(T, k, E):
    """At an even load the rows of the tiles in use are at most 8 % more than the assignments."""
    rows = plan.tile_rows(T * k, E)
    made = plan.make_plan(torch.randn(T, E).topk(k).indices, E, rows)
    used = (made.row_choice.view(-1, rows) < T * k).any(1).sum().item() * rows
    assert rows >= 8 and used <= 1.08 * T * k


# ---- The einsum operator against its definition ------------------------------------------------------------

def definition(x, first, second, sizes, swapped):
    """The einsum at the top of structured.py for one expert, one letter an axis, in the letters of the
    contraction."""
    a, b, g, d, e, f, r = sizes
    x = x.view(len(x), g, a, b) if swapped else x.view(len(x), g, b, a).mT
    y = torch.einsum("tgab,grfda,fegrb->tfde", x, first.view(g, r, f, d, a), second.view(f, e, g, r, b))
    return (y if swapped else y.mT).reshape(len(x), d * e * f)


def chosen_sum(rows, weights, chosen):
    """rows (T, E, d), weights (T, k), chosen (T, k) -> (T, d)."""
    picked = torch.stack([rows[t, chosen[t]] for t in range(len(rows))]) if len(rows) else rows[:, :1]
    return (picked * weights[..., None]).sum(1) if len(rows) else rows.sum(1)


def make_cores(sizes, E, dtype=torch.float64):
    a, b, g, d, e, f, r = sizes
    return (torch.randn(E, g, r * f * d, a, dtype=dtype, requires_grad=True),
            torch.randn(E, f, e, g * r * b, dtype=dtype, requires_grad=True))


def check_gradients(y, expected, inputs, others=(), expected_others=(), tolerance=1e-9):
    dy = [torch.randn_like(t) for t in (y, *others)]
    close_to_scale(y, expected, tolerance)
    grads = torch.autograd.grad((y, *others), inputs, dy)
    for a, e in zip(grads, torch.autograd.grad((expected, *expected_others), inputs, dy, retain_graph=True)):
        close_to_scale(a, e, tolerance)


def close_to_scale(actual, expected, tolerance):
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * (scale + 1e-300))


needs_c = pytest.mark.skipif(c_body.library(torch.float64) is None, reason="there is no C compiler")
bodies = pytest.mark.parametrize("body", ["torch", pytest.param("c", marks=needs_c)])
BODIES = ["torch", "c"] if c_body.library(torch.float64) else ["torch"]


@pytest.mark.parametrize("tokens", [0, 1, 9, 75, 530])
@pytest.mark.parametrize("swapped", [False, True])
@all_experts
def test_einsum_is_its_definition(sizes, swapped, tokens):
    first, second = make_cores(sizes, 1)
    x = torch.randn(tokens, sizes.d_in, dtype=torch.float64, requires_grad=True)
    expected = definition(x, first[0], second[0], sizes, swapped)
    for body in BODIES:
        y = operators.einsum(x, first, second, sizes, swapped, body=body)[0]
        check_gradients(y, expected, (x, first, second))


@pytest.mark.parametrize("T, E, k, balance", [
    (75, 4, 2, 0), (75, 4, 1, 0), (75, 4, 4, 0), (1, 4, 2, 0), (3, 8, 2, 0), (0, 4, 2, 0), (600, 5, 2, 0),
    (600, 5, 1, 100),  # all tokens with one expert
    (100, 5, 2, -100)])  # an expert without tokens
@all_experts
def test_mixture_is_its_definition(sizes, T, E, k, balance):
    swapped = (EXPERTS.index(sizes) + T + E + k) % 2 == 0    # every size and every routing has both
    first, second = make_cores(sizes, E)
    x = torch.randn(T, sizes.d_in, dtype=torch.float64, requires_grad=True)
    router = torch.randn(E, sizes.d_in, dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(E, dtype=torch.float64)
    biases[1] = balance
    biases[2] = 0.3
    logits = x @ router.mT
    choices = (logits + biases).topk(k).indices.sort().values
    gates = logits.softmax(1).gather(1, choices) if k == 1 else logits.gather(1, choices).softmax(1)
    rows = torch.stack([definition(x, *cores, sizes, swapped) for cores in zip(first, second)], dim=1)
    expected = chosen_sum(rows, gates, choices)
    for body in BODIES:
        y, found, chosen = operators.einsum(x, first, second, sizes, swapped, router=router, balance=biases,
                                            top_k=k, body=body)
        assert torch.equal(chosen.sort().values, choices)
        check_gradients(y, expected, (x, first, second, router), [found], [logits])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("T", [0, 1, 40])
@all_experts
def test_given_logits(sizes, T, k):
    """The logits of a router's own product, given, and their gradient."""
    first, second = make_cores(sizes, 3)
    x = torch.randn(T, sizes.d_in, dtype=torch.float64, requires_grad=True)
    router = torch.randn(3, sizes.d_in, dtype=torch.float64, requires_grad=True)
    options = dict(balance=torch.tensor([0.3, 0, -0.1]).double(), top_k=k)
    y, logits, chosen = operators.einsum(x, first, second, sizes, True, logits=x @ router.mT, **options)
    expected = operators.einsum(x, first, second, sizes, True, router=router, body="torch", **options)
    assert torch.equal(chosen, expected[2])
    check_gradients(y, expected[0], (x, first, second, router), [logits], [expected[1]])


@bodies
@pytest.mark.parametrize("tokens", [0, 2, 200])
@all_experts
def test_given_experts(sizes, tokens, body):
    first, second = make_cores(sizes, 3)
    x = torch.randn(tokens, sizes.d_in, dtype=torch.float64, requires_grad=True)
    experts = torch.randint(3, (tokens, 1))
    y = operators.einsum(x, first, second, sizes, False, experts=experts, body=body)[0]
    rows = torch.stack([definition(x, *cores, sizes, False) for cores in zip(first, second)], dim=1)
    ones = torch.ones(tokens, 1, dtype=torch.float64)
    check_gradients(y, chosen_sum(rows, ones, experts), (x, first, second))


@bodies
@pytest.mark.parametrize("tokens", [3, 40])
def test_given_experts_of_another_integer_type(tokens, body):
    x, *cores, sizes, b_first = routed_call(4, tokens)
    experts = torch.randint(4, (tokens, 1))
    y, expected = (kernels.einsum(x, *cores, sizes, b_first, experts=same, body=body)[0]
                   for same in (experts.int(), experts))
    assert torch.equal(y, expected)


@needs_c
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("expert", [-1, 4])
def test_an_expert_that_there_is_not(tokens, expert):
    """einsum.c would read out of bounds."""
    x, *cores, sizes, b_first = routed_call(4, tokens)
    experts = torch.zeros(tokens, 1, dtype=torch.int64)
    experts[1] = expert
    with pytest.raises(IndexError, match=f"^experts must be from 0 to 3; got .*{expert}"):
        kernels.einsum(x, *cores, sizes, b_first, experts=experts, body="c")
    with pytest.raises(IndexError, match=f"^experts has {tokens - 1} rows, and x {tokens}$"):
        kernels.einsum(x, *cores, sizes, b_first, experts=experts[:-1].abs() % 4, body="c")


@needs_c
@pytest.mark.parametrize("threads", [1, 2, 3])
@all_experts
def test_c_body_in_float32(sizes, threads):
    """Close to float64, whatever the number of threads, and bitwise the same when it runs again."""
    first, second = make_cores(sizes, 4)
    x = torch.randn(1500, sizes.d_in, dtype=torch.float64, requires_grad=True)
    experts = torch.randint(4, (1500, 1))
    inputs, dy = (x, first, second), torch.randn(1500, sizes.d_out, dtype=torch.float64)
    y = operators.einsum(*inputs, sizes, False, experts=experts, body="torch")[0]
    expected = [y, *torch.autograd.grad(y, inputs, dy)]
    before = torch.get_num_threads()
    runs = []
    try:
        torch.set_num_threads(threads)
        for _ in range(2):
            small = [t.detach().float().requires_grad_() for t in inputs]
            y = operators.einsum(*small, sizes, False, experts=experts, body="c")[0]
            runs.append([y, *torch.autograd.grad(y, small, dy.float())])
    finally:
        torch.set_num_threads(before)
    for a, again, e in zip(*runs, expected):
        assert torch.equal(a, again)
        assert (a - e).norm() < 1e-5 * e.norm()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradient_of_the_gates(k):
    """logits_gradient is gate_weights' backward, for s = gate · gradient of the gate."""
    logits = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    chosen = torch.randn(30, 4).topk(k).indices
    gates, dgates = routing.gate_weights(logits, chosen), torch.randn(30, k, dtype=torch.float64)
    (expected,) = torch.autograd.grad(gates, logits, dgates)
    close(routing.logits_gradient(logits, chosen, gates, gates * dgates).detach(), expected, 1e-12)


# ---- Layers ------------------------------------------------------------------------------------------------

def einsum_layer(sizes):
    layer = structured.linear("einsum", sizes.d_in, sizes.d_out, sizes=sizes, bias=True).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


def check_dense(layer, x):
    """Outputs and gradients of the layer are those of its matrix."""
    x.requires_grad_()
    y, expected = layer(x), x @ layer.to_dense().mT + layer.bias
    check_gradients(y, expected, [x, *layer.parameters()])


@pytest.mark.parametrize("tokens", [1, 50])
@all_experts
def test_layer_is_its_matrix(sizes, tokens):
    check_dense(einsum_layer(sizes), torch.randn(tokens, sizes.d_in, dtype=torch.float64))


@bodies
def test_einsum_of_strided_rows(body, monkeypatch):
    """Neither the rows nor the gradient need be contiguous."""
    monkeypatch.setattr(operators, "body_name", lambda *_: body)
    layer = einsum_layer(EXPERTS[3])
    check_dense(layer, torch.randn(layer.d_in, 20, dtype=torch.float64).mT)
    x = torch.randn(20, layer.d_in, dtype=torch.float64, requires_grad=True)
    for dy in (torch.ones(1, 1).double().expand(20, layer.d_out), torch.randn(layer.d_out, 20).double().mT):
        (actual,), (expected,) = (torch.autograd.grad(y, x, dy) for y in (layer(x), x @ layer.to_dense().mT))
        close(actual, expected, 1e-9)


@pytest.mark.parametrize("experts", [0, 2])
def test_bfloat16_gradients_are_summed_in_float32(experts, monkeypatch):
    """A gradient summed over many tiles is as exact as one of few.

    The choice of an expert is given: each router row sees one input alone, which is 0 or 1.
    """
    monkeypatch.setattr(torch_body, "tile_rows", lambda *_: 8)  # 2,048 tiles for each expert
    layer = structured.linear("btt", 16, 16, weight_norm=False, num_experts=experts, top_k=1)
    x, dy = torch.randn(32768, 16).abs(), torch.randn(32768, 16).abs()
    x[:, 0] = torch.arange(32768) % 2
    x[:, 1] = 1 - x[:, 0]
    if experts:
        layer.router.data = torch.eye(2, 16)
    grads = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = layer(x)
        cores = [p for name, p in layer.named_parameters() if "router" not in name]
        grads.append(torch.autograd.grad(y, cores, dy.to(y.dtype)))
    for rounded, exact in zip(*grads):
        assert (rounded - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("num_experts", [0, 4])
@all_experts
def test_einsum_takes_part_in_autocast(sizes, num_experts):
    layer = structured.linear("einsum", sizes.d_in, sizes.d_out, sizes=sizes, weight_norm=False,
                              num_experts=num_experts)
    # eighths and 64ths, so that two products have the same logits, and no two experts tie
    x = ((torch.randn(64, sizes.d_in) * 8).round() / 8).requires_grad_()
    if num_experts:
        layer.router.data = (layer.router.data * 64).round() / 64
        layer.balance.copy_(torch.arange(num_experts) / 2 ** 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    exact = layer(x)
    inputs, dy = [x, *layer.parameters()], torch.randn_like(exact)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, inputs, dy.bfloat16())
    for a, e in ((y, exact), *zip(gradients, torch.autograd.grad(exact, inputs, dy))):
        assert (a.float() - e).norm() < 0.03 * e.norm()


class Plain(nn.Module):
    """Experts that are no Einsum to MoE: it dispatches rows to them, sorted by expert."""

    def __init__(self, experts):
        super().__init__()
        self.inner = experts

    def forward(self, rows, ends):
        return self.inner(rows, ends)


def mixture(sizes, num_experts=4, top_k=2, **options):
    """A mixture of einsums in float64, every parameter random, and the same with the general dispatch."""
    moe = structured.linear("einsum", sizes.d_in, sizes.d_out, sizes=sizes, num_experts=num_experts,
                            top_k=top_k, **options).double()
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_()
    moe.balance.normal_(std=0.5)
    general = structured.MoE(sizes.d_in, Plain(moe.experts), num_experts, top_k)
    general.router, general.balance = moe.router, moe.balance
    return moe, general


def check_same(moe, general, x):
    """Outputs, what the routers report, and the gradients through both."""
    x.requires_grad_()
    (y, aux), (expected, expected_aux) = moe(x, return_aux=True), general(x, return_aux=True)
    for a, e in zip(aux, expected_aux):
        close(a, e, 1e-9)
    check_gradients(y, expected, [x, *moe.parameters()], [aux.loss], [expected_aux.loss])


@pytest.mark.parametrize("top_k", [1, 2, 4])
@all_experts
def test_mixture_is_its_general_dispatch(sizes, top_k):
    """One operator, and a dispatch of rows to experts, with biases: two ways to the same layer."""
    for tokens in (1, 50):
        x = torch.randn(tokens, sizes.d_in, dtype=torch.float64)
        check_same(*mixture(sizes, top_k=top_k, bias=True), x)


def test_experts_contract_in_both_orders():
    assert {sizes.order() for sizes in EXPERTS} == {("A", "B"), ("B", "A")}


@bodies
def test_gate_of_zero_passes_no_nan(body, monkeypatch):
    """A chosen expert whose gate underflows to 0 gets a gradient of zero, not 0 / 0."""
    monkeypatch.setattr(operators, "body_name", lambda *_: body)
    moe, general = mixture(EXPERTS[1], num_experts=2)
    with torch.no_grad():
        moe.router[0], moe.router[1] = 1000.0, -1000.0
    check_same(moe, general, torch.rand(5, moe.d_in, dtype=torch.float64) + 1)


def routed_call(E, T, dtype=torch.float32, width=16):
    """Inputs of kernels.einsum: x, first, second, sizes, and whether B goes first, of E experts; a router."""
    experts = structured.linear("btt", width, width, num_experts=E).to(dtype).experts
    cores = [experts.core(name).detach() for name in experts.order]
    return torch.randn(T, width, dtype=dtype), *cores, experts.contraction, experts.b_first


@pytest.mark.parametrize("gap", [60, 95, 120])
@pytest.mark.parametrize("body", ["torch", pytest.param("c", marks=needs_c)])
def test_an_unlikely_expert_that_the_balance_chooses(body, gap):
    """Its gate is denormal or 0 in float32; the gradients are finite, and those of float64."""
    x, *cores, sizes, b_first = routed_call(2, 5)
    x[:, 0] = 1
    router = torch.zeros(2, 16)
    router[0, 0] = gap
    gradients = []
    for dtype, chosen_body in ((torch.float32, body), (torch.float64, "torch")):
        inputs = [t.to(dtype).requires_grad_() for t in (x, router)]
        y, logits, chosen = kernels.einsum(inputs[0], *(core.to(dtype) for core in cores), sizes, b_first,
                                           router=inputs[1], balance=torch.tensor([-1e6, 0], dtype=dtype),
                                           body=chosen_body)
        assert (chosen == 1).all()
        gradients.append(torch.autograd.grad(1e30 * y.sum() + logits.square().sum(), inputs))
    for found, truth in zip(*gradients):
        torch.testing.assert_close(found, truth.float(), rtol=1e-4, atol=1e-4 * truth.abs().max().item())


@needs_c
def test_transposed_router_and_sliced_experts():
    """einsum.c reads memory as it lies."""
    *call, sizes, b_first = routed_call(4, 40)
    router, experts = torch.randn(16, 4).T, torch.randint(4, (40, 2))[:, :1]
    for routing in (dict(router=router, balance=torch.zeros(8)[::2], top_k=2), dict(experts=experts),
                    dict(experts=experts[:1].expand(40, 1))):
        same = {key: value.contiguous() if isinstance(value, torch.Tensor) else value
                for key, value in routing.items()}
        results = [kernels.einsum(*call, sizes, b_first, body="c", **given)[0] for given in (routing, same)]
        assert torch.equal(*results)


def test_a_few_tokens_are_counted_as_many_are():
    layer, flops = structured.linear("btt", 16, 16), []
    for T in (16, 32):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(torch.randn(T, 16))
        flops.append(counter.get_total_flops())
    assert flops[0] == 16 * layer.flops_per_token() and flops[1] == 2 * flops[0]


@pytest.mark.parametrize("options", [dict(), dict(num_experts=4)])
@pytest.mark.parametrize("struct", ["btt", "dense", "dyad"])
def test_autocast_leaves_float64_alone(struct, options):
    layer = structured.linear(struct, 16, 16, **options).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(40, 16, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("struct", ["btt", "dense", "dyad"])
@pytest.mark.parametrize("T", [4, 40])
def test_mixtures_of_meta_tensors(struct, T):
    layer = structured.linear(struct, 16, 32, num_experts=4).to("meta")
    assert layer(torch.randn(T, 16, device="meta")).shape == (T, 32)


def test_combine_with_gates_of_another_type_has_second_derivatives():
    y = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(3, 2, requires_grad=True)
    order = torch.randperm(6)
    place = order.argsort().view(3, 2)

    def second(result):
        grad, = torch.autograd.grad(result.pow(3).sum(), y, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), gates)[0]
    found = second(kernels.combine(y, gates, order, place))
    truth = second((y[place] * gates[..., None]).sum(1))
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("general", [False, True])
def test_gates_gradients_in_float16_do_not_overflow(general, top_k):
    """Products of one feature are beyond float16's largest number, 65,504, as under a loss scale."""
    moe = mixture(EXPERTS[1], top_k=top_k)[general].float()
    moe.router.data /= 1000  # else the gates are near 0 and 1
    x, dy, gradients = 100 * torch.randn(40, moe.d_in), 3000 * torch.randn(40, 20), []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            y = moe(x)
        gradients.append(torch.autograd.grad(y, moe.router, dy.to(y.dtype))[0])
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


@pytest.mark.parametrize("path", [0, 1, 2], ids=["experts", "general", "einsum"])
def test_undefined_gradient(path):
    """A branch after the layer that hands back no gradient counts as one of zeros."""
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None
    moe = einsum_layer(EXPERTS[0]) if path == 2 else mixture(EXPERTS[0])[path]
    x = torch.randn(6, moe.d_in, dtype=torch.float64, requires_grad=True)
    (Stop.apply(moe(x)).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# ---- Compiling einsum.c ------------------------------------------------------------------------------------

@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, no library loaded, and a small source: what is kept does not depend on it."""
    source = tmp_path / "small.c"
    source.write_text("#include <stdint.h>\n"
                      "int64_t scratch_size(void) { return 0; }\nint64_t vector_bits(void) { return 512; }\n"
                      "void forward(void) {}\nvoid backward(void) {}\n")
    monkeypatch.setattr(c_body, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    c_body.library.cache_clear()
    yield tmp_path / "cache" / "einsum-kernels"
    c_body.library.cache_clear()


def body_and_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [operators.body_name("cpu", torch.float32) for _ in range(2)]
    assert names[0] == names[1]
    return names[0], [str(w.message) for w in caught]


@needs_c
def test_library_is_compiled_once(fresh):
    assert body_and_warnings() == ("c", [])
    (built,) = fresh.iterdir()
    stamp = built.stat().st_mtime_ns
    c_body.library.cache_clear()
    assert body_and_warnings() == ("c", [])
    assert [f.stat().st_mtime_ns for f in fresh.iterdir()] == [stamp]


@needs_c
def test_library_of_another_cpu_is_left_alone(fresh, monkeypatch):
    fresh.mkdir(parents=True)
    cpu = c_body._cpu
    monkeypatch.setattr(c_body, "_cpu", lambda: "another")
    other = c_body.build(torch.float32, fresh)
    other.write_bytes(b"no library")
    monkeypatch.setattr(c_body, "_cpu", cpu)
    assert c_body.load(c_body.build(torch.float32, fresh)).vector_bits() == 512
    assert other.read_bytes() == b"no library"


@pytest.mark.skipif(sys.platform != "linux", reason="the OpenMP of torch's other builds")
def test_threads_are_torchs():
    assert c_body._openmp().value


@needs_c
def test_the_warning_has_the_compilers_error(monkeypatch, tmp_path):
    (tmp_path / "broken.c").write_text("int f(void) {\n    return 1 +;\n}\n")
    with pytest.raises(OSError, match="exit status 1: .*broken.c:2.*error: "):
        c_body._run(["cc", "-c", str(tmp_path / "broken.c"), "-o", str(tmp_path / "broken.o")])


@pytest.mark.parametrize("cc, words", [("/no/such/compiler", "cannot be run"), ("false", "exit status 1")])
def test_broken_compiler_is_one_sentence(fresh, monkeypatch, cc, words):
    monkeypatch.setenv("CC", cc)
    name, (message,) = body_and_warnings()
    assert name == "torch" and words in message and cc in message and "\n" not in message
    layer = structured.linear("btt", 16, 16, num_experts=2)
    assert layer(torch.randn(3, 16)).shape == (3, 16)


def test_missing_compiler_is_one_sentence(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    name, (message,) = body_and_warnings()
    assert name == "torch" and "there is no C compiler" in message


@needs_c
def test_cache_folder_that_cannot_be_written(fresh):
    fresh.parent.write_text("a file in its place")
    name, (message,) = body_and_warnings()
    assert name == "torch" and "\n" not in message


@needs_c
def test_processes_that_compile_at_once(fresh, tmp_path):
    """Each of three processes gets a library that works, and no unfinished one is left."""
    slow = tmp_path / "slow-cc"  # each waits until all three compile
    slow.write_text('#!/bin/sh\ntouch "$0.$PPID"\nwhile [ $(ls "$0".* | wc -l) -lt 3 ]; do sleep 0.05; done\n'
                    f'exec {shlex.join(c_body._compiler())} "$@"\n')
    slow.chmod(0o755)
    # not `fresh`, into which the import of this module may compile
    environment = dict(CC=str(slow), XDG_CACHE_HOME=str(tmp_path / "cache of three"))
    runs = [PROCESSES.Process(target=compile_once, args=(c_body.SOURCE, environment)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(300)
        run.kill()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert len(list((tmp_path / "cache of three" / "einsum-kernels").iterdir())) == 1


def compile_once(source, environment):
    os.environ.update(environment)
    c_body.SOURCE = source
    assert c_body.library(torch.float32).vector_bits() == 512


SANITIZED = """
import itertools, torch
from pathlib import Path
from lib.kernels import c_body
torch.set_num_threads(3)
c_body.FLAGS = ["-O0", "-g", *c_body.FLAGS[1:], "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
library = c_body.load(c_body.build(torch.float32, Path("{folder}")))
c_body.library = lambda dtype: library
shapes = [(3, 2, 2, 3, 5, 2, 2), (17, 1, 2, 1, 16, 33, 1), (1,) * 7, (18, 17, 1, 19, 16, 1, 1)]
for sizes, swapped in itertools.product(shapes, (False, True)):
    a, b, g, d, e, f, r = sizes
    for T, E, k in ((0, 2, 1), (1, 2, 1), (1, 3, 2), (70, 3, 2), (130, 5, 1), (45, 1, 0)):
        first, second = torch.randn(E, g, r * f * d, a), torch.randn(E, f, e, g * r * b)
        x, dy = torch.randn(T, a * b * g), torch.randn(T, d * e * f)
        router, balance = (torch.randn(E, a * b * g), torch.zeros(E)) if k else (None, None)
        y, logits, chosen = c_body.forward(x, first, second, router, balance, None, max(k, 1), sizes, swapped)
        c_body.backward(dy, logits, x, first, second, router, None, logits, chosen, sizes, swapped)
print("clean")
"""


@needs_c
def test_sanitizers(tmp_path):
    """No read or write out of bounds and no undefined behaviour, at odd sizes, with few tokens, and with one
    thread to three, in float32: float64 is the same text."""
    found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True)
    if found.returncode or not os.path.isabs(found.stdout.strip()):
        pytest.skip("there is no gcc with sanitizers")
    environment = dict(os.environ, CC="gcc", ASAN_OPTIONS="detect_leaks=0")
    fixed = ["setarch", "-R"]  # random addresses may lie where the sanitizer keeps its memory
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    run = subprocess.run([*fixed, "env", f"LD_PRELOAD={found.stdout.strip()}", sys.executable, "-c",
                          SANITIZED.replace("{folder}", str(tmp_path))],
                         env=environment, capture_output=True, text=True, timeout=3600)
    assert run.stdout.endswith("clean\n"), run.stderr[-3000:]


# ---- As operators ------------------------------------------------------------------------------------------

def operator_arguments(sizes, kind, grad=False):
    """What the operator takes: ten tokens, and three experts, but for kind 'matrix'."""
    E = 1 if kind == "matrix" else 3
    x = torch.randn(10, sizes.d_in, requires_grad=grad)
    cores = [core.detach().requires_grad_(grad) for core in make_cores(sizes, E, torch.float32)]
    router = torch.randn(E, sizes.d_in, requires_grad=grad) if kind == "mixture" else None
    balance = torch.randn(E) if kind in ("mixture", "logits") else None
    experts = torch.randint(3, (10, 1)) if kind == "experts" else None
    return x, *cores, router, balance, experts, 2 if kind == "mixture" else 1, list(sizes), False


def backward_arguments(sizes, kind):
    x, first, second, router, balance, experts, *rest = arguments = operator_arguments(sizes, kind)
    y, logits, chosen = operators._einsum(*arguments, "torch")
    dlogits = torch.randn_like(logits) if kind == "mixture" else None
    return [torch.randn_like(y), dlogits, x, first, second, router, experts, logits, chosen, *rest[1:]]


def test_operators_with_given_logits_are_well_formed():
    x, first, second, _, balance, *rest = operator_arguments(EXPERTS[3], "logits", True)
    logits = torch.randn(10, 3, requires_grad=True)
    arguments = (x, first, second, None, balance, *rest[:1], 2, *rest[2:], "torch", logits)
    torch.library.opcheck(operators._einsum, arguments)
    y, _, chosen = operators._einsum(*arguments)
    torch.library.opcheck(operators._einsum_backward, (
        torch.randn_like(y), None, *(t.detach() for t in (x, first, second)), None, None, logits.detach(),
        chosen, *rest[2:], "torch"))


@bodies
@pytest.mark.parametrize("kind", ["matrix", "mixture", "experts"])
def test_operators_are_well_formed(kind, body):
    """Schemas, fake shapes, autograd registration, and tracing with dynamic shapes."""
    torch.library.opcheck(operators._einsum, (*operator_arguments(EXPERTS[3], kind, True), body))
    torch.library.opcheck(operators._einsum_backward, (*backward_arguments(EXPERTS[3], kind), body))


@pytest.mark.parametrize("sizes", [
    Sizes(1, 1, 4, 1, 1, 3, 2), Sizes(4, 1, 1, 1, 1, 3, 2), Sizes(1, 1, 4, 3, 1, 1, 2)])
def test_strides_are_those_that_compiled_code_expects(sizes):
    """Where α = β = 1 or δ = ε = 1 the rows of a matrix could be returned as a view with other strides."""
    torch.library.opcheck(operators._einsum, (*operator_arguments(sizes, "matrix", True), "torch"))
    torch.library.opcheck(operators._einsum_backward, (*backward_arguments(sizes, "matrix"), "torch"))
    y = operators._einsum(*operator_arguments(sizes, "matrix"), "torch")[0]
    dx = operators._einsum_backward(*backward_arguments(sizes, "matrix"), "torch")[0]
    assert y.is_contiguous() and dx.is_contiguous()


def test_router_losses_are_not_autocast():
    logits, load = torch.randn(64, 8, requires_grad=True), torch.rand(8).softmax(0)
    expected = kernels.router_losses(logits, load)
    gradient = torch.autograd.grad(sum(expected), logits)[0]
    with torch.autocast("cpu", torch.bfloat16):
        losses = kernels.router_losses(logits, load)
        autocast_gradient = torch.autograd.grad(sum(losses), logits)[0]
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(autocast_gradient, gradient, rtol=1e-6, atol=1e-9)


def test_the_gradient_of_a_normalized_core_is_not_autocast():
    """Where a backward, too, runs under autocast."""
    core, gain = torch.randn(3, 4, 8, 5, requires_grad=True), torch.rand(3, 1, 1, 1, requires_grad=True)
    dy, gradients = torch.randn_like(core), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = kernels.normalize_core(core, gain, 0.5)
            gradients.append(torch.autograd.grad(y, (core, gain), dy))
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_grouped_operators_are_well_formed():
    x, w, ends = segments((5, 3), (4, 0, 2), torch.float32)
    torch.library.opcheck(_grouped_product, (x, w, ends))
    torch.library.opcheck(_grouped_product_grad_w, (x.detach(), torch.randn(6, 3), ends))


def flops(run, *args):
    with FlopCounterMode(display=False) as counter:
        run(*args)
    return counter.get_total_flops()


def test_flops_of_grouped_product_are_those_of_its_loop():
    for K, M in SHAPES:
        x, w, ends = (t.detach() for t in segments((K, M), (0, 3, 0, 6, 1), torch.float32))
        dy = torch.randn(10, M)
        assert flops(_grouped_product, x, w, ends) == 2 * 10 * K * M
        assert flops(_grouped_product_grad_w, x, dy, ends) == 2 * 10 * K * M
        with FlopCounterMode(display=False) as counter:
            loop_product(x, w, ends)
            loop_product_grad_w(x, dy, ends)
        assert counter.get_total_flops() == 2 * 2 * 10 * K * M


@pytest.mark.parametrize("kind", ["matrix", "mixture", "experts"])
@all_experts
def test_flops_are_those_of_the_products(sizes, kind, monkeypatch):
    """The registered formulas, and the products of the torch body in tiles of one row."""
    monkeypatch.setattr(torch_body, "tile_rows", lambda *_: 1)  # no padding rows
    a, b, g, d, e, f, r = sizes
    k, router = (2, 2 * 3 * sizes.d_in) if kind == "mixture" else (1, 0)
    first, second = 2 * g * b * a * r * f * d, 2 * f * d * e * g * r * b
    forward, backward = operator_arguments(sizes, kind), backward_arguments(sizes, kind)
    expected = 10 * (router + k * (first + second))
    assert flops(operators._einsum, *forward, "torch") == expected
    assert flops(torch_body.forward, *forward) == expected
    expected = 10 * (2 * router + k * (3 * first + 2 * second))  # z is computed again
    assert flops(operators._einsum_backward, *backward, "torch") == expected
    if kind != "mixture":  # as the operator calls its body
        backward[7], backward[8] = None, backward[6]
    # beside them, the sum of tiles' gradients by expert: with tiles of one row, E products for each row
    cores = 0 if kind == "matrix" else 3 * (g * r * f * d * a + f * e * g * r * b)
    assert flops(torch_body.backward, *backward) == expected + 2 * 10 * k * cores
