"""lib/kernels: each path against a loop over rows, against the others, and as operators of torch.library."""
import math
import types

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import structured
from lib.kernels import cpu_einsum, release_scratch, segment_product
from lib.kernels.segment_product import (_segment_product, _segment_product_grad_w, grouped_product,
                                         grouped_product_grad_w, loop_product, loop_product_grad_w)
from structured import Sizes

# (B, K, M) and the rows of each expert: empty ones at the start, in the middle and at the end; no rows at all
SHAPES = [(1, 8, 16), (3, 5, 7), (2, 9, 4), (4, 1, 1), (1, 33, 3)]
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
    Sizes(3, 3, 2, 3, 3, 2, 1)]
all_experts = pytest.mark.parametrize("sizes", EXPERTS, ids=lambda s: "x".join(map(str, s)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


# ---- segment_product ---------------------------------------------------------------------------------------

def naive_product(x, w, ends):
    """A row at a time, in float64."""
    x, w, expert = x.double(), w.double(), torch.searchsorted(ends, torch.arange(x.shape[1]), right=True)
    rows = [torch.stack([w[expert[n], b] @ x[b, n] for b in range(x.shape[0])]) for n in range(x.shape[1])]
    return torch.stack(rows, dim=1) if rows else x @ w[0].mT


def segments(shape, counts, dtype):
    B, K, M = shape
    ends = torch.tensor(counts).cumsum(0)
    make = dict(dtype=dtype, requires_grad=True)
    return torch.randn(B, sum(counts), K, **make), torch.randn(len(counts), B, M, K, **make), ends


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_segment_product(shape, counts, dtype):
    """Every path multiplies each row by its own expert's matrix, and so do the gradients."""
    x, w, ends = segments(shape, counts, dtype)
    y = naive_product(x, w, ends)
    dy = torch.randn_like(y).to(dtype)
    dx, dw = torch.autograd.grad(y, (x, w), dy.double(), allow_unused=True,
                                 materialize_grads=True)
    tolerance = TOLERANCE[dtype]

    actual = segment_product(x, w, ends)
    assert actual.dtype == dtype
    close(actual, y, tolerance)
    for a, expected in zip(torch.autograd.grad(actual, (x, w), dy), (dx, dw)):
        close(a, expected, 2 * tolerance)

    x, w = x.detach(), w.detach()
    close(loop_product(x, w, ends), y, tolerance)
    close(loop_product_grad_w(x, dy, ends), dw, 2 * tolerance)
    if sum(counts) and dtype != torch.float64:
        close(grouped_product(x, w, ends), y, tolerance)
        close(grouped_product_grad_w(x, dy, ends), dw, 2 * tolerance)


def test_only_the_gradients_that_are_needed():
    x, w, ends = segments((2, 5, 3), (2, 0, 3), torch.float64)
    segment_product(x.detach(), w, ends).sum().backward()
    segment_product(x, w.detach(), ends).sum().backward()
    expected = torch.autograd.grad(naive_product(x, w, ends).sum(), (x, w))
    close(x.grad, expected[0], 1e-10)
    close(w.grad, expected[1], 1e-10)


def test_segment_product_takes_part_in_autocast():
    x, w, ends = segments((2, 5, 3), (2, 0, 3), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = segment_product(x, w, ends)
    assert y.dtype == torch.bfloat16
    close(y, naive_product(x, w, ends), 5e-2)
    y.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


# ---- einsum ------------------------------------------------------------------------------------------------

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
    close(y, expected, 1e-9)
    inputs, dy = [x, *layer.parameters()], torch.randn_like(y)
    for a, e in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9 * e.abs().max().item())


@pytest.fixture
def rows_of_a_piece(monkeypatch):
    """rows_of_a_piece(16): the operators take so many rows at once, as if the caches were small."""
    def rows_of_a_piece(rows):
        init = cpu_einsum._Layout.__init__

        def few_rows(self, *args, **options):
            init(self, *args, **options)
            self.rows = rows
        monkeypatch.setattr(cpu_einsum._Layout, "__init__", few_rows)
    return rows_of_a_piece


@pytest.mark.parametrize("rows", [16, None], ids=["pieces", "one piece"])
@all_experts
def test_einsum_is_its_matrix(sizes, rows, rows_of_a_piece):
    if rows is not None:
        rows_of_a_piece(rows)
    for tokens in (1, 50):
        check_dense(einsum_layer(sizes), torch.randn(tokens, sizes.d_in, dtype=torch.float64))


@pytest.mark.parametrize("experts", [0, 4])
def test_training_after_inference_mode(experts):
    """Scratch memory that was made in inference mode is fit for training."""
    release_scratch()
    layer = structured.linear("btt", 48, 64, num_experts=experts)
    x = torch.randn(30, 48, requires_grad=True)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("experts", [0, 2])
def test_bfloat16_gradients_are_summed_in_float32(experts, rows_of_a_piece):
    """A gradient summed over many pieces is as exact as one of few.

    The choice of an expert is given: each router row sees one input alone, which is 0 or 1.
    """
    rows_of_a_piece(8)
    layer = structured.linear("btt", 16, 16, weight_norm=False, num_experts=experts, top_k=1)
    x, dy = torch.randn(4096, 16).abs(), torch.randn(4096, 16).abs()
    x[:, 0] = torch.arange(4096) % 2
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


def test_every_layout_occurs():
    layouts = [cpu_einsum._Layout(s.contraction(), s.order()[0] == "B") for s in EXPERTS]
    assert {(to.by_delta, to.by_beta) for to in layouts} == {(False, False), (True, False), (False, True)}


def test_einsum_of_strided_rows():
    """Neither the rows nor the gradient need be contiguous."""
    layer = einsum_layer(EXPERTS[3])
    check_dense(layer, torch.randn(layer.d_in, 20, dtype=torch.float64).mT)
    x = torch.randn(20, layer.d_in, dtype=torch.float64, requires_grad=True)
    for dy in (torch.ones(1, 1).double().expand(20, layer.d_out), torch.randn(layer.d_out, 20).double().mT):
        (actual,), (expected,) = (torch.autograd.grad(y, x, dy) for y in (layer(x), x @ layer.to_dense().mT))
        close(actual, expected, 1e-9)


class Elsewhere(torch.Tensor):
    """A tensor that does not say that it is on the CPU, so that the operators for CPUs leave it alone."""
    device = types.SimpleNamespace(type="elsewhere")


@all_experts
def test_path_of_other_devices_is_the_matrix_too(sizes, monkeypatch):
    monkeypatch.setattr("lib.kernels.einsum", None)
    x = torch.randn(2, 25, sizes.d_in, dtype=torch.float64).as_subclass(Elsewhere)
    check_dense(einsum_layer(sizes), x)


@all_experts
def test_einsum_takes_part_in_autocast(sizes):
    layer = structured.linear("einsum", sizes.d_in, sizes.d_out, sizes=sizes, weight_norm=False)
    x = torch.randn(64, sizes.d_in, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    exact = layer(x)
    inputs, dy = [x, *layer.parameters()], torch.randn_like(exact)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, inputs, dy.bfloat16())
    for a, e in ((y, exact), *zip(gradients, torch.autograd.grad(exact, inputs, dy))):
        assert (a.float() - e).norm() < 0.03 * e.norm()


# ---- routed_einsum -----------------------------------------------------------------------------------------

class Plain(nn.Module):
    """Experts that are no Einsum to MoE: it dispatches to them in general, through segment_product."""

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
    for a, e in zip((y, *aux), (expected, *expected_aux)):
        close(a, e, 1e-9)
    inputs, dy = [x, *moe.parameters()], torch.randn_like(y)
    one = torch.ones_like(aux.z)
    for a, e in zip(torch.autograd.grad((y, aux.loss()), inputs, (dy, one)),
                    torch.autograd.grad((expected, expected_aux.loss()), inputs, (dy, one))):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9 * e.abs().max().item())


def test_experts_contract_in_both_orders():
    assert {sizes.order() for sizes in EXPERTS} == {("A", "B"), ("B", "A")}


@pytest.mark.parametrize("top_k", [1, 2, 4])
@all_experts
def test_routed_einsum_is_the_general_path(sizes, top_k):
    for tokens in (1, 50):
        x = torch.randn(tokens, sizes.d_in, dtype=torch.float64)
        check_same(*mixture(sizes, top_k=top_k, bias=True), x)


@pytest.mark.parametrize("sizes", [EXPERTS[i] for i in (1, 3, 4)], ids=["btt", "full", "B first"])
@pytest.mark.parametrize("balance", ["random", "skewed", "one expert"])
def test_routed_einsum_of_many_tokens(sizes, balance, rows_of_a_piece):
    """Several blocks of tokens, several pieces of one expert within a block."""
    rows_of_a_piece(16)
    moe, general = mixture(sizes, num_experts=5, top_k=2 if balance == "random" else 1)
    x = torch.randn(300, sizes.d_in, dtype=torch.float64)
    with torch.no_grad():
        moe.balance.zero_()
        if balance == "skewed":  # one expert gets most of every block, the others something
            x[:, 0] = 1
            moe.router[2, 0] += 1.5 * sizes.d_in ** 0.5
            assert (moe(x, return_aux=True)[1].load > torch.tensor([0, 0, 0.5, 0, 0])).all()
        if balance == "one expert":
            x = x.abs()
            moe.router.copy_(torch.tensor([1.0, 2, 5, 3, 4])[:, None].expand_as(moe.router))
    check_same(moe, general, x)


def test_routed_einsum_at_full_piece_size():
    """More tokens than the rows that a block or a piece holds, as they are."""
    sizes = EXPERTS[0]
    moe, general = mixture(sizes, num_experts=8, top_k=1)
    check_same(moe, general, torch.randn(20000, sizes.d_in, dtype=torch.float64))


@all_experts
def test_routed_einsum_takes_part_in_autocast(sizes):
    moe = mixture(sizes)[0].float()
    for p in moe.experts.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(64, sizes.d_in, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x)
    exact = moe(x)
    inputs, dy = [x, *moe.parameters()], torch.randn_like(exact)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, inputs, dy.bfloat16())
    for a, e in ((y, exact), *zip(gradients, torch.autograd.grad(exact, inputs, dy))):
        assert (a.float() - e).norm() < 0.03 * e.norm()


def test_gate_of_zero_passes_no_nan():
    """A chosen expert whose gate underflows to 0 gets a gradient of zero, not 0 / 0."""
    moe, general = mixture(EXPERTS[1], num_experts=2)
    with torch.no_grad():
        moe.router[0], moe.router[1] = 1000.0, -1000.0
    check_same(moe, general, torch.rand(5, moe.d_in, dtype=torch.float64) + 1)


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


# ---- As operators ------------------------------------------------------------------------------------------

def segment_arguments(grad):
    x, w, ends = segments((2, 5, 3), (4, 0, 2), torch.float32)
    return (x, w, ends) if grad else (x.detach(), torch.randn(2, 6, 3), ends)


def einsum_arguments(sizes, grad=False):
    """What routed_einsum's operator takes, in the letters of the contraction."""
    order = sizes.order()
    a, b, g, d, e, f, r = contraction = sizes.contraction()
    E, T, k = 3, 10, 2
    make = dict(requires_grad=grad)
    return (torch.randn(T, sizes.d_in, **make), torch.randn(E, sizes.d_in, **make), torch.randn(E),
            torch.randn(E, g, r * f * d, a, **make), torch.randn(E, f, e, g * r * b, **make), k,
            list(contraction), order[0] == "B")


def one_einsum_arguments(sizes, grad=False):
    x, _, _, first, second, _, *rest = einsum_arguments(sizes)
    return *(t.detach().requires_grad_(grad) for t in (x, first[0], second[0])), *rest


def one_einsum_backward_arguments(sizes):
    x, *rest = one_einsum_arguments(sizes)
    y, z = cpu_einsum._einsum(x, *rest)
    return torch.randn_like(y), x, z, *rest


def einsum_backward_arguments(sizes):
    x, router, _, first, second, _, *rest = arguments = einsum_arguments(sizes)
    y, logits, *saved = cpu_einsum._routed_einsum(*arguments)
    return torch.randn_like(y), torch.randn_like(logits), x, logits, *saved, router, first, second, *rest


def test_operators_are_well_formed():
    """Schemas, fake shapes, autograd registration, and tracing with dynamic shapes."""
    torch.library.opcheck(_segment_product, segment_arguments(True))
    torch.library.opcheck(_segment_product_grad_w, segment_arguments(False))
    for sizes in EXPERTS[3:5]:
        torch.library.opcheck(cpu_einsum._einsum, one_einsum_arguments(sizes, True))
        torch.library.opcheck(cpu_einsum._einsum_backward, one_einsum_backward_arguments(sizes))
        torch.library.opcheck(cpu_einsum._routed_einsum, einsum_arguments(sizes, True))
        torch.library.opcheck(cpu_einsum._routed_einsum_backward, einsum_backward_arguments(sizes))


def product_in_place(out, left, right, **_):
    return 2 * math.prod(left) * right[-1]


def flops(run, *args):
    in_place = {torch.ops.aten.baddbmm_: product_in_place, torch.ops.aten.addmm_: product_in_place}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run(*args)
    return counter.get_total_flops()


def test_flops_of_segment_product_are_those_of_its_loop():
    for shape in SHAPES:
        x, w, ends = (t.detach() for t in segments(shape, (0, 3, 0, 6, 1), torch.float32))
        B, K, M = shape
        dy = torch.randn(B, 10, M)
        assert flops(loop_product, x, w, ends) == flops(_segment_product, x, w, ends) == 2 * B * 10 * K * M
        assert flops(loop_product_grad_w, x, dy, ends) == flops(_segment_product_grad_w, x, dy, ends)
        assert flops(loop_product_grad_w, x, dy, ends) == 2 * B * 10 * K * M


@all_experts
def test_flops_of_routed_einsum_are_those_of_its_products(sizes):
    """The registered formula, the products inside, and the sizes' own count for 10 tokens, 3 experts and 2
    per token."""
    forward, backward = einsum_arguments(sizes), einsum_backward_arguments(sizes)
    expected = 10 * (2 * sizes.flops() + 2 * 3 * sizes.d_in)
    executed = flops(cpu_einsum._routed_einsum._init_fn, *forward)
    assert executed == flops(cpu_einsum._routed_einsum, *forward) == expected
    executed = flops(cpu_einsum._routed_einsum_backward._init_fn, *backward)
    assert executed == flops(cpu_einsum._routed_einsum_backward, *backward) == 2 * expected


@all_experts
def test_flops_of_einsum_are_those_of_its_products(sizes):
    forward, backward = one_einsum_arguments(sizes), one_einsum_backward_arguments(sizes)
    executed = flops(cpu_einsum._einsum._init_fn, *forward)
    assert executed == flops(cpu_einsum._einsum, *forward) == 10 * sizes.flops()
    executed = flops(cpu_einsum._einsum_backward._init_fn, *backward)
    assert executed == flops(cpu_einsum._einsum_backward, *backward) == 2 * 10 * sizes.flops()
