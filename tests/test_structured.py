"""structured.py against independent truths: matrices by hand, brute force, autograd's own differences, counted FLOPs."""
import itertools
import math
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import structured
from structured import DYAD_VARIANTS, STRUCTURES, Sizes, Theta, linear

B_FIRST = (0.1, 0.6, 0.3, 0.6, 0.1, 0.3, 0.25)  # min(β, δ) > min(α, ε): contracting B first costs less
NAMED = [name for name in STRUCTURES if name not in ("einsum", "dyad")]


def random_theta(rng):
    """Seven exponents, uniform on the two simplices; a small rank."""
    parts = []
    for _ in range(2):
        i, j = sorted((rng.random(), rng.random()))
        parts += [i, j - i, 1 - j]
    return (*parts, 0.4 * rng.random())


rng = random.Random(0)
THETAS = [(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25), B_FIRST, (0, 0.5, 0.5, 0.5, 0, 0.5, 0.2),
          *(random_theta(rng) for _ in range(3))]
CASES = {name: (name, {}) for name in NAMED}
CASES |= {f"einsum{i}": ("einsum", dict(theta=theta)) for i, theta in enumerate(THETAS)}
CASES |= {f"dyad_{v}": ("dyad", dict(dyad_variant=v)) for v in DYAD_VARIANTS}
all_cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def awaken(module, std=1.5):
    """Every parameter random in float64: cores far above their initial rms, gains that are not 1, biases not 0."""
    with torch.no_grad():
        for name, p in module.double().named_parameters():
            if "gain" in name:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=std)
    return module


def make(case, d_in, d_out, **options):
    struct, more = CASES[case]
    return awaken(linear(struct, d_in, d_out, **more, **options))


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- Layers and their matrices --------------------------------------------------------------------------------------

@pytest.mark.parametrize("d_in, d_out", [(64, 64), (768, 3072), (640, 2560), (96, 384), (384, 96), (3072, 768), (2560, 640)])
@pytest.mark.parametrize("weight_norm", [True, False])
@all_cases
def test_layer_applies_its_matrix(case, d_in, d_out, weight_norm):
    layer = make(case, d_in, d_out, weight_norm=weight_norm, bias=weight_norm)
    x = randn(2, 3, d_in)
    expected = x @ layer.to_dense().mT
    if layer.bias is not None:
        expected = expected + layer.bias
    close(layer(x), expected)


def test_both_contraction_orders_occur():
    orders = {Theta(*theta).sizes(d, 4 * d).order() for theta in THETAS for d in (64, 768)}
    assert orders == {("A", "B"), ("B", "A")}


@pytest.mark.parametrize("case", [case for case in CASES if "dyad" not in case])
@pytest.mark.parametrize("d_in, d_out", [(12, 24), (24, 16)])
def test_matrix_is_the_formula(case, d_in, d_out):
    """DESIGN 2, one entry at a time: row (φ, ε, δ), column (γ, β, α), first index slowest."""
    layer = make(case, d_in, d_out)
    a, b, g, d, e, f, r = layer.sizes
    A, B = (core.detach().numpy() for core in layer.cores())
    assert A.shape == (g, a, d, f, r) and B.shape == (g, b, e, f, r)
    W = np.zeros((d_out, d_in))
    for gi, ai, bi, di, ei, fi, ri in itertools.product(*map(range, (g, a, b, d, e, f, r))):
        W[(fi * e + ei) * d + di, (gi * b + bi) * a + ai] += A[gi, ai, di, fi, ri] * B[gi, bi, ei, fi, ri]
    close(layer.to_dense().detach(), torch.from_numpy(W))


@pytest.mark.parametrize("d_in, d_out", [(64, 64), (96, 384), (384, 96)])
def test_named_structures_are_their_textbook_matrices(d_in, d_out):
    layer = make("kronecker", d_in, d_out)
    A, B = (core[0, :, :, 0, 0] for core in layer.cores())  # A[α, δ], B[β, ε]
    close(layer.to_dense(), torch.kron(B.T.contiguous(), A.T.contiguous()))

    layer = make("tt", d_in, d_out, rank=3)
    A, B = (core[0, :, :, 0] for core in layer.cores())
    close(layer.to_dense(), sum(torch.kron(B[..., r].T.contiguous(), A[..., r].T.contiguous()) for r in range(3)))

    layer = make("low_rank", d_in, d_out, rank=5)
    A, B = layer.cores()
    close(layer.to_dense(), B.reshape(d_out, 5) @ A.reshape(d_in, 5).T)

    layer = make("monarch", d_in, d_out)
    A, B = layer.cores()
    A, B = A[:, :, 0, :, 0], B[:, 0, :, :, 0]  # A[γ, α, φ], B[γ, ε, φ]
    g, f = A.shape[0], A.shape[2]
    first = torch.block_diag(*(A[i].T for i in range(g)))  # rows (γ, φ)
    last = torch.block_diag(*(B[:, :, i].T for i in range(f)))  # columns (φ, γ)
    permutation = torch.eye(g * f, dtype=A.dtype).view(g, f, g * f).transpose(0, 1).reshape(g * f, g * f)
    close(layer.to_dense(), last @ permutation @ first)

    layer = make("dense", d_in, d_out)
    close(layer.to_dense(), layer.core("A").view(d_out, d_in))


@pytest.mark.parametrize("variant", DYAD_VARIANTS)
@pytest.mark.parametrize("D, d_in, d_out", [(4, 12, 20), (3, 12, 6), (1, 5, 7)])
def test_dyad_is_its_definition(variant, D, d_in, d_out):
    layer = awaken(linear("dyad", d_in, d_out, dyad_blocks=D, dyad_variant=variant))
    i, o, (wl, wu) = d_in // D, d_out // D, (layer.core(name).detach() for name in ("wl", "wu"))
    W = torch.zeros(d_out, d_in, dtype=torch.float64)
    for b, p, j in itertools.product(range(D), range(o), range(i)):
        W[b * o + p, b * i + j] += wl[b, p, j]
        row = {"it": b * o + p, "ot": p * D + b, "dt": p * D + b}[variant]
        column = {"it": j * D + b, "ot": b * i + j, "dt": j * D + b}[variant]
        W[row, column] += wu[b, p, j]
    close(layer.to_dense(), W)


@all_cases
def test_weight_norm_is_its_formula(case):
    """M / max(1, rms(M) / std0) · gain, above and below std0, for each expert by itself."""
    layer = structured.unrouted(CASES[case][0], 48, 64, num_experts=3, weight_norm=True, **CASES[case][1])
    awaken(layer)
    for name, (fan_in, fan_out) in layer.fans().items():
        std0 = math.sqrt(min(fan_in, fan_out)) / fan_in
        M, gain = getattr(layer, name), getattr(layer, f"gain_{name}")
        with torch.no_grad():
            M.copy_(torch.randn_like(M) * std0 * torch.tensor([0.3, 1.7, 40.0])[:, None, None, None])
        for e in range(3):
            rms = M[e].square().mean().sqrt()
            assert (rms > std0) == (e > 0)
            close(layer.core(name)[e], M[e] / max(1, rms / std0) * gain[e], 1e-13)


@all_cases
def test_without_weight_norm_or_gain_no_such_factor(case):
    layer = make(case, 48, 64, weight_norm=False)
    assert not any("gain" in name for name, _ in layer.named_parameters())
    assert all(torch.equal(layer.core(name), getattr(layer, name)) for name in layer.fans())
    plain = make(case, 48, 64, weight_norm=True, gain=False)
    assert not any("gain" in name for name, _ in plain.named_parameters())
    for name in plain.fans():
        assert plain.core(name).square().mean().sqrt().item() == pytest.approx(plain.init_std(name))
    assert linear("dense", 8, 8).weight_norm is False and linear("btt", 16, 16).weight_norm is True


@all_cases
def test_gradient_is_finite_where_a_core_is_zero(case):
    layer = make(case, 16, 16, weight_norm=True)
    torch.nn.init.zeros_(getattr(layer, list(layer.fans())[-1]))
    layer(randn(3, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def check_gradients(module, x, **options):
    names, params = zip(*module.named_parameters())
    params = [p.detach().clone().requires_grad_() for p in params]
    def run(x, *params):
        return functional_call(module, dict(zip(names, params)), (x,))
    assert gradcheck(run, (x.requires_grad_(), *params), **options)


@pytest.mark.parametrize("weight_norm", [True, False])
@all_cases
def test_gradients_of_layers(case, weight_norm):
    check_gradients(make(case, 8, 12, weight_norm=weight_norm, bias=True), randn(3, 8))


@all_cases
def test_gradients_of_mixtures_through_the_router(case):
    moe = make(case, 8, 12, num_experts=3, bias=True, weight_norm=True)
    x = randn(5, 8)
    logits = (x @ moe.router.T).sort(dim=1).values
    assert logits.diff(dim=1).min() > 1e-3  # no choice flips within the differences' step
    check_gradients(moe, x, fast_mode=True, check_undefined_grad=False)  # undefined gradients: see test_kernels.py


# ---- Mixtures -------------------------------------------------------------------------------------------------------

def naive_mixture(moe, x):
    """DESIGN 3: y = Σ_{e in top-k} g_e · (W_e x + b_e), g the softmax over the chosen logits; a token at a time."""
    W, y = moe.experts.to_dense(), []
    for row in x:
        logits = moe.router @ row
        chosen = sorted(range(len(W)), key=lambda e: -logits[e].item())[:moe.top_k]
        total = sum(logits[e].exp() for e in chosen)
        y.append(sum(logits[e].exp() / total * (W[e] @ row + moe.experts.bias[e]) for e in chosen))
    return torch.stack(y)


def masked_mixture(moe, x):
    """All experts of all tokens, and a mask: the same function to autograd."""
    logits = x @ moe.router.T
    gates = logits.masked_fill(logits < logits.topk(moe.top_k).values[:, -1:], -math.inf).softmax(1)
    every = torch.einsum("eoi,ti->teo", moe.experts.to_dense(), x) + moe.experts.bias
    return torch.einsum("te,teo->to", gates, every)


def check_mixture(moe, x):
    """Outputs and all gradients, for a random direction of the output."""
    with torch.no_grad():
        close(moe(x), naive_mixture(moe, x))
    x, direction = x.requires_grad_(), randn(len(x), moe.experts.d_out)
    inputs = [x, *moe.parameters()]
    actual = torch.autograd.grad((moe(x) * direction).sum(), inputs)
    expected = torch.autograd.grad((masked_mixture(moe, x) * direction).sum(), inputs)
    for a, e in zip(actual, expected):
        close(a, e, 1e-9)


@pytest.mark.parametrize("d_in, d_out", [(12, 24), (24, 12)])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@all_cases
def test_mixture_is_its_definition(case, d_in, d_out, top_k):
    moe = make(case, d_in, d_out, num_experts=4, top_k=top_k, bias=True)
    check_mixture(moe, randn(17, d_in))
    x = randn(2, 3, d_in)  # leading dimensions are kept
    assert torch.equal(moe(x), moe(x.view(6, d_in)).view(2, 3, d_out))


@pytest.mark.parametrize("case", ["dense", "low_rank", "kronecker", "btt", "einsum1", "dyad_ot"])
@pytest.mark.parametrize("tokens", ["one", "all to the same two"])
def test_mixture_with_idle_experts(case, tokens):
    moe = make(case, 12, 24, num_experts=6, bias=True)
    x = randn(1, 12) if tokens == "one" else randn(40, 12).abs() + 0.1
    if tokens != "one":
        with torch.no_grad():
            moe.router.copy_(torch.tensor([-0.3, 0.1, -0.2, -0.1, 0.14, -0.4])[:, None].expand(6, 12))
    load = moe(x, return_aux=True)[1].load
    assert (load > 0).sum() == 2 and load.sum() == 1
    check_mixture(moe, x)


@all_cases
def test_each_expert_is_a_layer_of_the_structure(case):
    """An expert's matrix is that of a single layer with its slice of the parameters."""
    experts = make(case, 24, 32, num_experts=3, weight_norm=True).experts
    options = {} if isinstance(experts, structured.Dyad) else dict(sizes=experts.sizes)
    struct, more = CASES[case]
    single = linear(struct, 24, 32, weight_norm=True, **(options or more)).double()
    for e, W in enumerate(experts.to_dense()):
        with torch.no_grad():
            for name, p in single.named_parameters():
                p.copy_(getattr(experts, name)[e])
        close(W, single.to_dense())


@pytest.mark.parametrize("struct, rank", [("btt", 1), ("tt", 1), ("low_rank", 8), ("monarch", 1)])
def test_default_rank_of_experts(struct, rank):
    assert linear(struct, 64, 64, num_experts=8).experts.sizes.rho == rank  # low_rank: d / E
    assert linear(struct, 64, 64).sizes.rho == dict(btt=3, tt=3, low_rank=8, monarch=1)[struct]  # d^θρ
    assert linear("low_rank", 64, 64, num_experts=8, rank=3).experts.sizes.rho == 3


def test_what_the_router_reports():
    moe, x = make("btt", 16, 16, num_experts=5, top_k=2), randn(23, 16)
    y, aux = moe(x, return_aux=True)
    assert torch.equal(y, moe(x))
    logits = x @ moe.router.T
    probability, share = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for row in logits:
        probability += row.exp() / row.exp().sum() / 23
        share[row.argsort(descending=True)[:2]] += 1 / 46
    close(aux.load, share)
    assert aux.load.sum().item() == pytest.approx(1) and not aux.load.requires_grad
    close(aux.switch, 5 * (probability * share).sum())
    close(aux.z, sum(row.exp().sum().log() ** 2 for row in logits) / 23)
    close(aux.loss(), aux.switch + 0.1 * aux.z)
    aux.loss().backward()
    assert moe.router.grad.abs().max() > 0


def test_balanced_router_has_switch_loss_1():
    moe = make("btt", 4, 4, num_experts=4, top_k=1)
    with torch.no_grad():
        moe.router.copy_(torch.eye(4) * 3)
    close(moe(torch.eye(4, dtype=torch.float64), return_aux=True)[1].switch, torch.tensor(1.0).double())


def test_router_breaks_ties_at_init():
    """No dead start: at init, random tokens reach every expert, and a mean that all tokens share decides nothing."""
    moe = linear("btt", 64, 64, num_experts=8)
    x = torch.randn(2000, 64)
    assert (moe(x, return_aux=True)[1].load > 0.05).all()
    torch.testing.assert_close(moe(x + 3, return_aux=True)[1].load, moe(x, return_aux=True)[1].load, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("struct", ["btt", "dense"])
def test_router_works_in_float32_under_autocast(struct, dtype):
    """Logits that differ by less than bfloat16 resolves still decide the choice."""
    moe = linear(struct, 16, 16, num_experts=3, top_k=1)
    router = torch.ones(3, 16)
    router[1] += 1e-4
    router[2] -= 1e-4
    moe.router.data = router
    x = (torch.rand(50, 16) + 0.5).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, aux = moe(x, return_aux=True)
    assert y.dtype == torch.bfloat16 and aux.z.dtype == torch.float32
    assert aux.load.tolist() == [0, 1, 0]
    exact = (x.double() @ router.double().T).logsumexp(1).square().mean().item()
    assert aux.z.item() == pytest.approx(exact, rel=1e-5)
    expected = x.float() @ moe.experts.to_dense()[1].T
    assert (y.float() - expected).norm() < 0.02 * expected.norm()


# ---- The space ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("theta, message", [
    ((1.5, -0.5, 0, 1, 0, 0, 0), "alpha"), ((1, 0, 0, 1, 0, 0, 1.1), "rho"), ((0.5, 0, 0, 1, 0, 0, 0), "gamma"),
    ((1, 0, 0, 0.5, 0.2, 0.2, 0), "delta"), ((float("nan"), 0, 1, 1, 0, 0, 0), "alpha")])
def test_theta_is_validated(theta, message):
    for make_theta in (lambda: Theta(*theta), lambda: Theta.parse(theta), lambda: linear("einsum", 64, 64, theta=theta)):
        with pytest.raises(ValueError, match=message):
            make_theta()


@pytest.mark.parametrize("text", ["0.5, 0, 0.5, 0, 0.5, 0.5, 0", "(0.5,0,0.5,0,0.5,0.5,0)", (0.5, 0, 0.5, 0, 0.5, 0.5, 0),
                                  [0.5, 0, 0.5, 0, 0.5, 0.5, 0], Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0)])
def test_theta_is_parsed(text):
    assert Theta.parse(text) == STRUCTURES["monarch"]
    assert linear("einsum", 64, 96, theta=text).sizes == linear("monarch", 64, 96).sizes


@pytest.mark.parametrize("text", ["", "1, 0, 0", "a, b", "1, 0, 0, 1, 0, 0, x", None, 3, "__import__('os')", (1,) * 8])
def test_what_is_no_theta(text):
    with pytest.raises(ValueError, match="seven numbers"):
        Theta.parse(text)


@pytest.mark.parametrize("theta, psi, nu, omega", [
    (STRUCTURES["dense"], 1, 1, 0), (STRUCTURES["monarch"], 1, 1 / 2, 0), (STRUCTURES["kronecker"], 1, 1 / 2, 1 / 2),
    (Theta(1, 0, 0, 0, 1, 0, 1 / 4), 1 / 4, 1 / 4, 0)])
def test_taxonomy(theta, psi, nu, omega):
    assert (theta.psi, theta.nu, theta.omega) == pytest.approx((psi, nu, omega))


def cost_of_order(sizes, order):
    """Multiply-adds of each step, counted as (rows of the result) x (its columns) x (what is summed)."""
    a, b, g, d, e, f, r = sizes
    if a * g * d * f * r == 1 or b * g * e * f * r == 1:  # one core is a scalar: one product
        return sizes.d_in * sizes.d_out
    first = (g * b) * (d * f * r) * a if order == "AB" else (g * a) * (e * f * r) * b
    last = (f * d) * e * (g * r * b) if order == "AB" else (f * e) * d * (g * r * a)
    return first + last


def entries(sizes):
    a, b, g, d, e, f, r = sizes
    counts = [n for n in (g * a * d * f * r, g * b * e * f * r) if n > 1]
    return sum(counts) or 1


def nearest_by_brute_force(theta, d, exponents):
    """Divisor triples of d at the least distance from d^exponents in log space."""
    triples = [(i, j, d // i // j) for i in range(1, d + 1) if d % i == 0 for j in range(1, d // i + 1) if d // i % j == 0]
    distance = {t: sum((math.log(s) - x * math.log(d)) ** 2 for s, x in zip(t, exponents)) for t in triples}
    return [t for t in triples if distance[t] < min(distance.values()) + 1e-9]


@st.composite
def simplex(draw):
    n = draw(st.sampled_from([1, 2, 3, 4, 6, 12, 97, 1000]))
    i, j = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
    return i / n, (j - i) / n, (n - j) / n


smooth_widths = st.builds(lambda p, q: 2 ** p * q, st.integers(4, 9), st.sampled_from([1, 3, 5, 6, 9, 15, 12])).filter(
    lambda d: 64 <= d <= 8192)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(simplex(), simplex(), st.floats(0, 1), smooth_widths, smooth_widths)
def test_sizes_are_the_nearest_and_the_order_the_cheaper(ins, outs, rho, d_in, d_out):
    theta = Theta(*ins, *outs, rho)
    sizes = theta.sizes(d_in, d_out)
    assert sizes.d_in == d_in == math.prod(sizes[:3]) and sizes.d_out == d_out == math.prod(sizes[3:6])
    assert sizes.rho == max(1, round(min(d_in, d_out) ** rho))

    orders = {order: cost_of_order(sizes, order) for order in ("AB", "BA")}
    assert sizes.flops() == 2 * min(orders.values())
    if len(sizes.order()) == 2:
        assert orders["".join(sizes.order())] == min(orders.values())
    assert sizes.params() == entries(sizes)

    near_in, near_out = nearest_by_brute_force(theta, d_in, ins), nearest_by_brute_force(theta, d_out, outs)
    assert sizes[:3] in near_in and sizes[3:6] in near_out
    candidates = [Sizes(*i, *o, sizes.rho) for i in near_in for o in near_out]
    costs = [(2 * min(cost_of_order(s, order) for order in ("AB", "BA")), entries(s)) for s in candidates]
    assert (sizes.flops(), sizes.params()) == min(costs)

    (a, b, g), (d, e, f) = ins, outs
    swapped = Theta(b, a, g, e, d, f, rho).sizes(d_in, d_out)
    assert (swapped.flops(), swapped.params()) == (sizes.flops(), sizes.params())
    assert sizes.swapped().swapped() == sizes and sizes.swapped().flops() == sizes.flops()


def test_integer_rank_overrides_the_exponent():
    assert STRUCTURES["btt"].sizes(64, 256, rank=5).rho == 5
    assert linear("btt", 64, 256, rank=5).sizes == STRUCTURES["btt"].sizes(64, 256, rank=5)
    assert linear("btt", 64, 256, rank=1).sizes == linear("monarch", 64, 256).sizes


explicit = st.tuples(*[st.integers(1, 4)] * 6, st.integers(1, 3)).map(lambda s: Sizes(*s))


def min_cut(sizes):
    """What any matrix of these sizes can have as rank: the input, the output, and what passes between the cores' sides.

    With A on the input's side and B on the output's, β, γ, ρ, φ, δ cross; with B there, α, γ, ρ, φ, ε.
    """
    a, b, g, d, e, f, r = sizes
    return min(a * b * g, d * e * f, b * g * r * f * d, a * g * r * f * e)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(explicit)
def test_rank_is_the_min_cut(sizes):
    layer = awaken(linear("einsum", sizes.d_in, sizes.d_out, sizes=sizes))
    assert torch.linalg.matrix_rank(layer.to_dense()).item() == min_cut(sizes)


@pytest.mark.parametrize("struct, d_in, d_out", [("low_rank", 64, 256), ("kronecker", 96, 384), ("tt", 256, 64),
                                                 ("monarch", 144, 144), ("btt", 64, 256), ("dense", 40, 24)])
def test_rank_of_named_structures(struct, d_in, d_out):
    layer = make(struct, d_in, d_out)
    rank = torch.linalg.matrix_rank(layer.to_dense()).item()
    assert rank == min_cut(layer.sizes) == (8 if struct == "low_rank" else min(d_in, d_out))


def slope(widths, values):
    return np.polyfit([math.log(w) for w in widths], [math.log(v) for v in values], 1)[0]


EXACT_THETAS = [Theta(*t) for t in ((0.5, 0, 0.5, 0, 0.5, 0.5, 0.5), (0.5, 0.5, 0, 0, 0.5, 0.5, 0), (0, 0.5, 0.5, 0.5, 0, 0.5, 0),
                                    (0.5, 0.5, 0, 0.5, 0.5, 0, 0.5), (1, 0, 0, 0.5, 0.5, 0, 0), (0, 0, 1, 0, 0, 1, 0))]


@pytest.mark.parametrize("theta", [*(STRUCTURES[name] for name in NAMED), *EXACT_THETAS])
def test_exponents_of_cost(theta):
    """Parameters grow as d^n and FLOPs as d^f; powers of 4, where the sizes are exact."""
    widths = [64, 256, 1024, 4096]
    sizes = [theta.sizes(d, d) for d in widths]
    assert slope(widths, [entries(s) for s in sizes]) == pytest.approx(theta.params_exponent, abs=0.05)
    flops = [2 * min(cost_of_order(s, "AB"), cost_of_order(s, "BA")) for s in sizes]
    assert slope(widths, flops) == pytest.approx(theta.flops_exponent, abs=0.05)
    assert theta.omega == pytest.approx(theta.flops_exponent - theta.params_exponent)
    assert theta.nu == pytest.approx(theta.flops_exponent - 1)


@pytest.mark.parametrize("theta", [Theta(*t) for t in THETAS])
def test_exponents_of_cost_in_the_limit(theta):
    """As above for any θ: at widths where the lower-order terms and the roundings have faded."""
    widths = [2 ** p for p in range(16, 37, 2)]
    sizes = [theta.sizes(d, d) for d in widths]
    assert slope(widths, [s.params() for s in sizes]) == pytest.approx(theta.params_exponent, abs=0.05)
    assert slope(widths, [s.flops() for s in sizes]) == pytest.approx(theta.flops_exponent, abs=0.05)


@pytest.mark.parametrize("theta, widths", [
    (STRUCTURES["low_rank"], [16, 64, 256, 1024]), (STRUCTURES["kronecker"], [16, 64, 256]),
    (STRUCTURES["btt"], [16, 64, 256]), (Theta(1, 0, 0, 0.5, 0.5, 0, 0), [16, 64, 256, 1024]),
    (Theta(0, 1, 0, 0.5, 0.5, 0, 0), [16, 64, 256, 1024]), (Theta(1, 0, 0, 0, 1, 0, 0.25), [16, 256]),
    (Theta(0, 0.5, 0.5, 1, 0, 0, 0.25), [16, 256]), (Theta(0.75, 0.25, 0, 0.25, 0.75, 0, 0.25), [16, 256])])
def test_exponent_of_rank(theta, widths):
    """Where the sizes are exact; a random projection to a few more dimensions than a small rank shows it as well."""
    ranks = []
    for d in widths:
        W, n = awaken(linear("einsum", d, d, theta=theta, weight_norm=False)).to_dense(), max(16, d // 4)
        sketched = torch.linalg.matrix_rank(randn(n, d) @ W @ randn(d, n)).item()
        ranks.append(sketched if sketched < n else torch.linalg.matrix_rank(W).item())
    assert slope(widths, ranks) == pytest.approx(theta.psi, abs=0.05)


# ---- Errors ---------------------------------------------------------------------------------------------------------

def error(*args, **options):
    with pytest.raises(ValueError) as caught:
        linear(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and not re.search(r"\. \S|\.$", message), "one sentence"
    return message


@pytest.mark.parametrize("struct", ["kronecker", "monarch", "tt", "btt"])
@pytest.mark.parametrize("d_in, d_out, culprit", [(97, 96, 97), (64, 769, 769), (766, 64, 766), (7, 8, 7), (1009, 1013, 1009)])
def test_widths_without_factorization(struct, d_in, d_out, culprit):
    message = error(struct, d_in, d_out)
    assert f"{d_in} -> {d_out}" in message and f"{culprit} does not split" in message
    would = [int(w) for w in re.findall(r"\d+", message.split("a width of")[1])]
    assert would and all(abs(w - culprit) < 0.1 * culprit + 3 for w in would)
    for width in would:  # what it says would work works
        assert linear(struct, width, width).sizes.d_in == width
    for other in ("dense", "low_rank"):
        assert linear(other, d_in, d_out).to_dense().shape == (d_out, d_in)


def test_errors_of_linear():
    assert "'lowrank'" in error("lowrank", 64, 64)
    assert all(name in error("lowrank", 64, 64) for name in STRUCTURES)
    for rank in (0, -1, 65):
        assert str(rank) in error("low_rank", 64, 128, rank=rank)
    for struct in ("dense", "kronecker", "monarch"):
        assert "rank" in error(struct, 64, 64, rank=2)
        assert linear(struct, 64, 64, rank=1).sizes.rho == 1
    assert "theta" in error("einsum", 64, 64)
    assert "theta" in error("btt", 64, 64, theta=THETAS[0])
    assert "at least 1" in error("dense", 0, 64)
    assert "-4" in error("dense", 64, -4)
    for top_k in (0, -1, 5):
        assert f"{top_k}" in error("btt", 64, 64, num_experts=4, top_k=top_k)
    assert "2 experts" in error("btt", 64, 64, num_experts=1, top_k=1)
    assert "5" in error("dyad", 64, 64, dyad_blocks=5)
    assert "0" in error("dyad", 64, 64, dyad_blocks=0)
    assert "'tt'" in error("dyad", 64, 64, dyad_variant="tt")
    for options in (dict(rank=2), dict(theta=THETAS[0]), dict(sizes=(1,) * 7)):
        assert "dyad_blocks" in error("dyad", 64, 64, **options)


def test_explicit_sizes():
    sizes = (2, 3, 4, 4, 2, 2, 3)
    layer = make("btt", 24, 16, sizes=sizes)
    assert layer.sizes == sizes
    x = randn(5, 24)
    close(layer(x), x @ layer.to_dense().T)
    assert "24 -> 16" in error("btt", 24, 32, sizes=sizes)
    for bad in ((2, 3, 4), (*sizes[:6], 0), (2.0, *sizes[1:]), (-2, -3, *sizes[2:])):
        assert "seven positive integers" in error("btt", 24, 16, sizes=bad)
    assert "rank" in error("btt", 24, 16, sizes=sizes, rank=2)
    assert "theta" in error("einsum", 24, 16, sizes=sizes, theta=THETAS[0])


def test_scalar_core_is_left_out():
    """A core of one entry is no core: dense has one, and d0 / (cores · fan_in) counts one."""
    for layer in (linear("dense", 24, 16), linear("einsum", 24, 16, theta=(0, 1, 0, 0, 1, 0, 0))):
        assert sum(p.numel() for p in layer.parameters() if p.dim() == 3) == 24 * 16
        (name,) = layer.fans()
        assert layer.fans()[name] == (24, 16) and layer.lr_multipliers(48)[name] == 2
        assert layer.flops_per_token() == 2 * 24 * 16


# ---- FLOPs ----------------------------------------------------------------------------------------------------------

def counted(run, **options):
    with FlopCounterMode(display=False, **options) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_experts, top_k", [(0, 2), (4, 1), (4, 3)])
@pytest.mark.parametrize("d_in, d_out", [(48, 192), (192, 48)])
@all_cases
def test_flops_are_those_executed(case, d_in, d_out, num_experts, top_k):
    layer = make(case, d_in, d_out, num_experts=num_experts, top_k=top_k)
    x = randn(30, d_in).requires_grad_()
    forward = counted(lambda: layer(x))
    assert forward == 30 * layer.flops_per_token()
    both = counted(lambda: layer(x).sum().backward())
    assert both - forward == pytest.approx(2 * forward, rel=0.01)


@pytest.mark.parametrize("num_experts", [0, 6])
@all_cases
def test_flops_are_those_of_the_cores(case, num_experts):
    layer = make(case, 48, 192, num_experts=num_experts, top_k=2)
    experts = layer.experts if num_experts else layer
    if isinstance(experts, structured.Dyad):
        one = 2 * 2 * 48 * 192 // 4
    else:
        one = 2 * min(cost_of_order(experts.sizes, order) for order in ("AB", "BA"))
    assert layer.flops_per_token() == (2 * one + 2 * 48 * 6 if num_experts else one)


# ---- Initialization and learning rates ------------------------------------------------------------------------------

def design_fans(sizes, order):
    """DESIGN 4; where B goes first, A and B change places."""
    a, b, g, d, e, f, r = sizes
    if order == ("A",):
        return {"A": (a * b * g, d * e * f)}
    if order == ("A", "B"):
        return {"A": (a, d * f * r), "B": (b * g * r, e)}
    return {"B": (b, e * f * r), "A": (a * g * r, d)}


@pytest.mark.parametrize("d_in, d_out", [(144, 144), (144, 576), (576, 144)])
@pytest.mark.parametrize("num_experts", [0, 4])
@all_cases
def test_init_and_fans(case, d_in, d_out, num_experts):
    struct, options = CASES[case]
    layer = linear(struct, d_in, d_out, num_experts=num_experts, **options)
    experts = layer.experts if num_experts else layer
    if struct == "dyad":
        expected, cores = dict.fromkeys(("wl", "wu"), (2 * d_in // 4, 2 * d_out // 4)), 1
    else:
        expected = design_fans(experts.sizes, experts.sizes.order())
        cores = len(expected)
    assert experts.fans() == expected
    for name, (fan_in, fan_out) in expected.items():
        core = getattr(experts, name)
        std = math.sqrt(min(fan_in, fan_out)) / fan_in
        assert core.square().mean().sqrt().item() == pytest.approx(std, rel=5 / math.sqrt(2 * core.numel()))
        assert experts.lr_multipliers(128)[name] == pytest.approx(128 / (cores * fan_in))
    assert all(m == 1 for name, m in experts.lr_multipliers(128).items() if name not in expected)
    assert all((p == 1).all() for name, p in layer.named_parameters() if "gain" in name)
    if num_experts:
        assert layer.fans() == {"router": (d_in, 4)} | {f"experts.{n}": fan for n, fan in expected.items()}
        assert layer.lr_multipliers(128) == {"router": 128 / d_in}


@pytest.mark.parametrize("num_experts", [0, 3])
@all_cases
def test_zero_init_makes_the_zero_map_and_trains(case, num_experts):
    struct, options = CASES[case]
    layer = linear(struct, 48, 64, zero_init=True, num_experts=num_experts, **options)
    x = torch.randn(20, 48)
    assert (layer(x) == 0).all()
    (layer(x) * torch.randn(20, 64)).sum().backward()
    experts = layer.experts if num_experts else layer
    zero = [name for name in experts.fans() if (getattr(experts, name) == 0).all()]
    assert zero == (["wl", "wu"] if struct == "dyad" else [experts.sizes.order()[-1]])
    assert all(getattr(experts, name).grad.abs().max() > 0 for name in zero)


@pytest.mark.parametrize("d", [64, 1024])
@all_cases
def test_scale_at_init_does_not_depend_on_width(case, d):
    """Unit inputs: the output's rms is Π √fan_in · std of its products, never above 1; the matrix's norm is O(1)."""
    struct, options = CASES[case]
    layer = linear(struct, d, d, **options)
    fans = layer.fans().values()
    expected = math.prod(math.sqrt(min(fan_in, fan_out) / fan_in) for fan_in, fan_out in fans)
    if struct == "dyad":
        expected = 1
    with torch.no_grad():
        assert layer(torch.randn(256, d)).square().mean().sqrt().item() == pytest.approx(expected, rel=0.2)
        assert expected <= 1
        v = torch.randn(d)
        W = layer.to_dense()
        for _ in range(20):
            v = torch.nn.functional.normalize(W.T @ (W @ v), dim=0)
        assert (W @ v).norm() < 4.5 and ((W @ v).norm() > 0.4 or struct == "einsum")


@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("struct", ["dense", "btt", "dyad"])
def test_no_rows(struct, num_experts):
    x = torch.zeros(0, 3, 16, requires_grad=True)
    y = linear(struct, 16, 64, num_experts=num_experts)(x)
    y.sum().backward()
    assert y.shape == (0, 3, 64) and x.grad.shape == x.shape


def test_router_of_a_bfloat16_layer_works_in_float32():
    """Logits that bfloat16 would round to a tie still choose the larger."""
    moe = linear("dense", 16, 16, num_experts=2, top_k=1).bfloat16()
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        moe.router[:] = 1
        moe.router[1, 0] = 1 + 2 ** -7  # the sum 16 + 2^-7 is 16 in bfloat16
        moe.router[0, 0] = 1
    _, aux = moe(x, return_aux=True)
    assert aux.load.tolist() == [0, 1]
