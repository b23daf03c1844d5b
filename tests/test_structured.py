"""structured.py against independent truths: matrices by hand, brute force, numerical gradients, counted
FLOPs."""
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call

import structured
from lib import kernels
from structured import DYAD_VARIANTS, STRUCTURES, LayerConfig, linear, make_experts
from tests.structures import (CASES, NAMED, THETAS, all_cases, close, cost, counted_flops, make, randn,
                              randomize, recomputed_flops)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- Layers and their matrices -----------------------------------------------------------------------------

@pytest.mark.parametrize("d_in, d_out", [(64, 64), (96, 384), (384, 96), (768, 3072)])
@pytest.mark.parametrize("weight_norm", [True, False])
@all_cases
def test_layer_applies_its_matrix(case, d_in, d_out, weight_norm):
    layer = make(case, d_in, d_out, weight_norm=weight_norm, bias=weight_norm)
    x = randn(2, 3, d_in)
    expected = x @ layer.to_dense().mT
    if layer.bias is not None:
        expected = expected + layer.bias
    close(layer(x), expected)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] in (*NAMED, "einsum")])
@pytest.mark.parametrize("d_in, d_out", [(12, 24), (24, 16)])
def test_matrix_is_the_formula(case, d_in, d_out):
    """DESIGN 2, one entry at a time: row (φ, ε, δ), column (γ, β, α), first index slowest."""
    layer = make(case, d_in, d_out)
    a, b, g, d, e, f, r = layer.sizes
    A, B = (core.detach().numpy() for core in layer.factors())
    assert A.shape == (g, a, d, f, r) and B.shape == (g, b, e, f, r)
    W = np.zeros((d_out, d_in))
    for gi, ai, bi, di, ei, fi, ri in itertools.product(*map(range, (g, a, b, d, e, f, r))):
        W[(fi * e + ei) * d + di, (gi * b + bi) * a + ai] += A[gi, ai, di, fi, ri] * B[gi, bi, ei, fi, ri]
    close(layer.to_dense().detach(), torch.from_numpy(W))


WIDTHS = pytest.mark.parametrize("d_in, d_out", [(64, 64), (96, 384), (384, 96)])


@WIDTHS
def test_dense_is_its_core(d_in, d_out):
    layer = make("dense", d_in, d_out)
    close(layer.to_dense(), layer.core("A").view(d_out, d_in))


@WIDTHS
def test_low_rank_is_a_product_of_two_matrices(d_in, d_out):
    layer = make("low_rank", d_in, d_out, rank=5)
    A, B = layer.factors()
    close(layer.to_dense(), B.reshape(d_out, 5) @ A.reshape(d_in, 5).T)


@WIDTHS
def test_kronecker_is_a_kronecker_product(d_in, d_out):
    layer = make("kronecker", d_in, d_out)
    A, B = (core[0, :, :, 0, 0] for core in layer.factors())  # A[α, δ], B[β, ε]
    close(layer.to_dense(), torch.kron(B.T.contiguous(), A.T.contiguous()))


@WIDTHS
def test_tt_is_a_sum_of_kronecker_products(d_in, d_out):
    layer = make("tt", d_in, d_out, rank=3)
    A, B = (core[0, :, :, 0] for core in layer.factors())
    terms = [torch.kron(B[..., r].T.contiguous(), A[..., r].T.contiguous()) for r in range(3)]
    close(layer.to_dense(), sum(terms))


@WIDTHS
def test_monarch_is_two_block_diagonal_matrices_and_a_permutation(d_in, d_out):
    layer = make("monarch", d_in, d_out)
    A, B = layer.factors()
    A, B = A[:, :, 0, :, 0], B[:, 0, :, :, 0]  # A[γ, α, φ], B[γ, ε, φ]
    g, f = A.shape[0], A.shape[2]
    first = torch.block_diag(*(A[i].T for i in range(g)))  # rows (γ, φ)
    last = torch.block_diag(*(B[:, :, i].T for i in range(f)))  # columns (φ, γ)
    identity = torch.eye(g * f, dtype=A.dtype)
    permutation = identity.view(g, f, g * f).transpose(0, 1).reshape(g * f, g * f)
    close(layer.to_dense(), last @ permutation @ first)


@pytest.mark.parametrize("variant", DYAD_VARIANTS)
@pytest.mark.parametrize("D, d_in, d_out", [(4, 12, 20), (3, 12, 6), (1, 5, 7)])
def test_dyad_is_its_definition(variant, D, d_in, d_out):
    layer = randomize(linear("dyad", d_in, d_out, dyad_blocks=D, dyad_variant=variant))
    i, o, (wl, wu) = d_in // D, d_out // D, (layer.core(name).detach() for name in ("wl", "wu"))
    W = torch.zeros(d_out, d_in, dtype=torch.float64)
    for b, p, j in itertools.product(range(D), range(o), range(i)):
        W[b * o + p, b * i + j] += wl[b, p, j]
        row = {"it": b * o + p, "ot": p * D + b, "dt": p * D + b}[variant]
        column = {"it": j * D + b, "ot": b * i + j, "dt": j * D + b}[variant]
        W[row, column] += wu[b, p, j]
    close(layer.to_dense(), W)


def experts_of(case, d_in, d_out, num_experts, **options):
    """The experts of one of the CASES, without a router."""
    struct, more = CASES[case]
    return make_experts(LayerConfig(struct, **more, **options), num_experts, d_in, d_out)


@all_cases
def test_weight_norm_is_its_formula(case):
    """DESIGN 4: M / max(1, rms(M) / std0) · gain, above and below std0, for each expert by itself."""
    layer = randomize(experts_of(case, 48, 64, 3, weight_norm=True))
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
def test_without_weight_norm_a_core_acts_as_it_is(case):
    layer = make(case, 48, 64, weight_norm=False)
    assert not any("gain" in name for name, _ in layer.named_parameters())
    assert all(torch.equal(layer.core(name), getattr(layer, name)) for name in layer.fans())


@all_cases
def test_no_gain_where_a_norm_follows(case):
    layer = make(case, 48, 64, weight_norm=True, norm_follows=True)
    assert not any("gain" in name for name, _ in layer.named_parameters())
    for name in layer.fans():
        assert layer.core(name).square().mean().sqrt().item() == pytest.approx(layer.init_std(name))


def test_weight_norm_is_for_every_structure_but_dense():
    assert not any("gain" in name for name, _ in linear("dense", 16, 16).named_parameters())
    for struct in ("low_rank", "kronecker", "monarch", "tt", "btt", "dyad"):
        assert any("gain" in name for name, _ in linear(struct, 16, 16).named_parameters())


@all_cases
def test_gradient_is_finite_where_a_core_is_zero(case):
    layer = make(case, 16, 16, weight_norm=True)
    torch.nn.init.zeros_(getattr(layer, list(layer.fans())[-1]))
    layer(randn(3, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def check_gradients(module, x, **options):
    """The gradients of x and of all parameters are those of finite differences."""
    names, params = zip(*module.named_parameters())
    params = [p.detach().clone().requires_grad_() for p in params]

    def run(x, *params):
        return functional_call(module, dict(zip(names, params)), (x,))
    assert gradcheck(run, (x.requires_grad_(), *params), **options)


@pytest.mark.parametrize("weight_norm", [True, False])
@all_cases
def test_gradients_of_layers(case, weight_norm):
    check_gradients(make(case, 8, 12, weight_norm=weight_norm, bias=True), randn(3, 8))


def test_gradients_of_cores_above_and_below_the_limit():
    """A core that is normalized, one that is not, and one of zeros."""
    core = (randn(3, 2, 3, 4) * torch.tensor([2.0, 0.1, 0.0])[:, None, None, None]).requires_grad_()
    gain = randn(3, 1, 1, 1).requires_grad_()
    assert gradcheck(lambda *inputs: kernels.normalize_core(*inputs, 0.7), (core, gain))
    assert gradcheck(lambda core: kernels.normalize_core(core, None, 0.7), core)


@all_cases
def test_gradients_of_mixtures_through_the_router(case):
    moe = make(case, 8, 12, num_experts=3, bias=True, weight_norm=True)
    x = randn(5, 8)
    logits = (x @ moe.router.T).sort(dim=1).values
    assert logits.diff(dim=1).min() > 1e-3, "no choice changes within the step of the differences"
    # undefined gradients: see lib/test_kernels.py
    check_gradients(moe, x, fast_mode=True, check_undefined_grad=False)


# ---- Mixtures ----------------------------------------------------------------------------------------------

def naive_mixture(moe, x):
    """DESIGN 3, a token at a time: y = Σ_{e in top-k} g_e · (W_e x + b_e), g the softmax over the chosen
    logits; for k = 1 over all.

    The biases of the balance change the choice alone.
    """
    W, y = moe.experts.to_dense(), []
    for row in x:
        logits = moe.router @ row
        chosen = sorted(range(len(W)), key=lambda e: -(logits[e] + moe.balance[e]).item())[:moe.top_k]
        total = sum(logits[e].exp() for e in (chosen if moe.top_k > 1 else range(len(W))))
        y.append(sum(logits[e].exp() / total * (W[e] @ row + moe.experts.bias[e]) for e in chosen))
    return torch.stack(y)


def masked_mixture(moe, x):
    """All experts of all tokens, and a mask: the same function to autograd."""
    logits = x @ moe.router.T
    scores = logits.detach() + moe.balance
    masked = scores < scores.topk(moe.top_k).values[:, -1:]
    if moe.top_k > 1:
        gates = logits.masked_fill(masked, -math.inf).softmax(1)
    else:
        gates = logits.softmax(1) * ~masked
    every = torch.einsum("eoi,ti->teo", moe.experts.to_dense(), x) + moe.experts.bias
    return torch.einsum("te,teo->to", gates, every)


def check_mixture(moe, x):
    """Outputs and all gradients, for a random direction of the output."""
    moe.balance.normal_(std=0.1)
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
            scores = torch.tensor([-0.3, 0.1, -0.2, -0.1, 0.14, -0.4])
            moe.router.copy_(scores[:, None].expand(6, 12))
    load = moe(x, return_aux=True)[1].load
    assert (load > 0).sum() == 2 and load.sum() == 1
    check_mixture(moe, x)


@all_cases
def test_each_expert_is_a_layer_of_the_structure(case):
    """An expert's matrix is that of a single layer with its slice of the parameters."""
    experts = make(case, 24, 32, num_experts=3, weight_norm=True).experts
    options = dict(sizes=experts.sizes) if isinstance(experts, structured.Einsum) else {}
    struct, more = CASES[case]
    single = linear(struct, 24, 32, weight_norm=True, **(options or more)).double()
    for e, W in enumerate(experts.to_dense()):
        with torch.no_grad():
            for name, p in single.named_parameters():
                p.copy_(getattr(experts, name)[e])
        close(W, single.to_dense())


@pytest.mark.parametrize("struct, rank, rank_of_experts", [("btt", 3, 1), ("tt", 3, 1), ("low_rank", 8, 8),
                                                           ("monarch", 1, 1)])
def test_default_rank(struct, rank, rank_of_experts):
    """d^θρ = 64^1/4 or 64^1/2; experts have rank 1, and low-rank experts d / E, which is 8 too."""
    assert linear(struct, 64, 64).sizes.rho == rank
    assert linear(struct, 64, 64, num_experts=8).experts.sizes.rho == rank_of_experts


def test_rank_of_low_rank_experts():
    assert linear("low_rank", 64, 64, num_experts=4).experts.sizes.rho == 16
    assert linear("low_rank", 64, 64, num_experts=8, rank=3).experts.sizes.rho == 3


def test_router_reports_its_losses_and_load():
    moe, x = make("btt", 16, 16, num_experts=5, top_k=2), randn(23, 16)
    moe.balance.normal_()
    y, aux = moe(x, return_aux=True)
    assert torch.equal(y, moe(x))
    logits = x @ moe.router.T
    probability, share = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for row in logits:
        probability += row.exp() / row.exp().sum() / 23
        share[(row + moe.balance).argsort(descending=True)[:2]] += 1 / 46
    close(aux.load, share)
    assert aux.load.sum().item() == pytest.approx(1)
    assert not aux.load.requires_grad and not aux.variance.requires_grad
    close(aux.variance, sum(((row - row.mean()) ** 2).mean() for row in logits) / 23)
    z = sum(row.exp().sum().log() ** 2 for row in logits) / 23
    switch = 5 * (probability * share).sum()
    for got, expected in ((aux.load_balance, switch), (aux.z_loss, z), (aux.loss, switch + 0.1 * z)):
        close(got, expected)
        close(*(torch.autograd.grad(loss, moe.router, retain_graph=True)[0] for loss in (got, expected)))


def test_balanced_router_has_switch_loss_1():
    moe = make("btt", 4, 4, num_experts=4, top_k=1)
    with torch.no_grad():
        moe.router.copy_(torch.eye(4) * 3)
    close(moe(torch.eye(4, dtype=torch.float64), return_aux=True)[1].load_balance, torch.tensor(1.0).double())


@pytest.fixture
def float64():
    """Layers and tensors are made in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_router_at_init_reaches_every_expert(float64):
    """No dead start; and what all tokens share, as the 3 here, decides nothing."""
    moe, x = linear("btt", 64, 64, num_experts=8), torch.randn(2000, 64)
    load = moe(x, return_aux=True)[1].load
    assert (load > 0.05).all()
    close(moe(x + 3, return_aux=True)[1].load, load)


def test_rebalance_moves_biases_against_the_load():
    """By rate · spread of the logits · distance from the mean load; a load that is not finite moves
    nothing."""
    moe = make("btt", 16, 16, num_experts=4, top_k=2)
    moe.balance.copy_(torch.tensor([1.0, 2, 3, 4]))
    load = torch.tensor([0.5, 0.25, 0.2, 0.05], dtype=torch.float64)
    moe.rebalance(load, torch.tensor(9.0).double(), 0.1)
    close(moe.balance, torch.tensor([1 - 0.3, 2, 3 + 0.3 * 0.2, 4 + 0.3 * 0.8], dtype=torch.float64))
    before = moe.balance.clone()
    moe.rebalance(torch.full((4,), math.nan), torch.tensor(1.0), 0.1)
    moe.rebalance(torch.full((4,), 0.25), torch.tensor(math.inf), 0.1)
    assert torch.equal(moe.balance, before)


@pytest.mark.parametrize("struct", ["btt", "dense"])
def test_rebalance_evens_the_load_of_clusters(struct):
    """Tokens of 40 kinds, some far more frequent than others, as characters are."""
    moe, kinds = linear(struct, 64, 64, num_experts=8), torch.randn(40, 64)
    x = kinds[torch.multinomial(1 / torch.arange(1, 41.0), 4000, replacement=True)]
    x = x + 0.3 * torch.randn(4000, 64)
    loads = []
    for i in range(41):
        _, aux = moe(x, return_aux=True)
        loads.append(8 * aux.load)
        moe.rebalance(aux.load, aux.variance, 1 / (1 + i / 5))
    assert loads[0].max() > 1.5 and loads[0].min() < 0.6
    assert loads[-1].max() < 1.3 and loads[-1].min() > 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("struct", ["btt", "dense"])
def test_router_works_in_float32_under_autocast(struct, dtype):
    """Logits that differ by less than bfloat16 resolves, and more than float32's rounding, decide the
    choice."""
    moe = linear(struct, 16, 16, num_experts=3, top_k=1)
    router = torch.ones(3, 16)
    router[1] += 1e-4
    router[2] -= 1e-4
    moe.router.data = router
    x = (torch.rand(50, 16) + 0.5).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, aux = moe(x, return_aux=True)
    assert y.dtype == torch.bfloat16 and aux.z_loss.dtype == torch.float32
    assert aux.load.tolist() == [0, 1, 0]
    exact = (x.double() @ router.double().T).logsumexp(1).square().mean().item()
    assert aux.z_loss.item() == pytest.approx(exact, rel=1e-5)
    gates = (x.double() @ router.double().T).softmax(1)[:, 1:2].float()
    expected = x.float() @ moe.experts.to_dense()[1].T * gates
    assert (y.float() - expected).norm() < 0.02 * expected.norm()


def test_router_of_a_bfloat16_layer_works_in_float32():
    """Logits that bfloat16 would round to a tie still choose the larger; float32 holds both exactly."""
    moe = linear("dense", 16, 16, num_experts=2, top_k=1).bfloat16()
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        moe.router[:] = 1
        moe.router[1, 0] = 1 + 2 ** -7  # the sum 16 + 2^-7 is 16 in bfloat16
    _, aux = moe(x, return_aux=True)
    assert aux.load.tolist() == [0, 1]


# ---- Errors ------------------------------------------------------------------------------------------------

def error(*args, **options):
    """The message of the ValueError that linear() raises: one sentence."""
    with pytest.raises(ValueError) as caught:
        linear(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and not re.search(r"\. \S|[^.]\.$", message)
    return message


@pytest.mark.parametrize("struct", ["kronecker", "monarch", "tt", "btt"])
@pytest.mark.parametrize("d_in, d_out, culprit", [(97, 96, 97), (64, 769, 769), (766, 64, 766), (7, 8, 7),
                                                  (1009, 1013, 1009)])
def test_widths_without_factorization(struct, d_in, d_out, culprit):
    message = error(struct, d_in, d_out)
    assert f"{d_in} -> {d_out}" in message and f"{culprit} does not split" in message
    would = [int(w) for w in re.findall(r"\d+", message.split("a width of")[1])]
    assert would and all(abs(w - culprit) < 0.1 * culprit + 3 for w in would)
    for width in would:
        assert linear(struct, width, width).sizes.d_in == width
    for other in ("dense", "low_rank"):
        assert linear(other, d_in, d_out).to_dense().shape == (d_out, d_in)


@pytest.mark.parametrize("args, options, word", [
    (("lowrank", 64, 64), {}, "'lowrank'"),
    *((("lowrank", 64, 64), {}, name) for name in STRUCTURES),
    (("bttt", 64, 64), dict(sizes=(8, 1, 8, 1, 8, 8, 1)), "'bttt'"),
    *((("low_rank", 64, 128), dict(rank=rank), str(rank)) for rank in (0, -1, 65)),
    *(((struct, 64, 64), dict(rank=2), "rank") for struct in ("dense", "kronecker", "monarch")),
    (("einsum", 64, 64), {}, "theta"),
    (("btt", 64, 64), dict(theta=THETAS[0]), "theta"),
    (("dense", 0, 64), {}, "at least 1"),
    (("dense", 64, -4), {}, "-4"),
    *((("btt", 64, 64), dict(num_experts=4, top_k=top_k), f"got {top_k}") for top_k in (0, -1, 5)),
    *((("btt", 64, 64), dict(num_experts=n, top_k=1), f"below 32768; got {n}") for n in (1, -1)),
    *((("dyad", 64, 64), dict(dyad_blocks=blocks), f"dyad_blocks = {blocks}") for blocks in (0, 5)),
    (("dyad", 64, 64), dict(dyad_variant="tt"), "'tt'"),
    *((("dyad", 64, 64), options, "dyad_blocks") for options in (
        dict(rank=2), dict(theta=THETAS[0]), dict(sizes=(1,) * 7), dict(phi=4), dict(gamma=4))),
    (("btt", 24, 32), dict(sizes=(2, 3, 4, 4, 2, 2, 3)), "24 -> 16"),
    *((("btt", 24, 16), dict(sizes=sizes), "seven positive integers") for sizes in (
        (2, 3, 4), (2, 3, 4, 4, 2, 2, 0), (2.0, 3, 4, 4, 2, 2, 3), (-2, -3, 4, 4, 2, 2, 3))),
    (("btt", 24, 16), dict(sizes=(2, 3, 4, 4, 2, 2, 3), rank=2), "rank"),
    (("einsum", 24, 16), dict(sizes=(2, 3, 4, 4, 2, 2, 3), theta=THETAS[0]), "theta"),
    (("einsum", 24, 16), dict(sizes=(2, 3, 4, 4, 2, 2, 3), gamma=4), "gamma"),
    *(((struct, 64, 64), {name: 8}, f"{name} = 0") for struct in ("dense", "low_rank", "kronecker", "tt")
      for name in ("gamma", "phi"))])
def test_what_cannot_be_made_is_one_sentence(args, options, word):
    assert word in error(*args, **options)


@pytest.mark.parametrize("struct", ["dense", "kronecker", "monarch"])
def test_rank_1_is_what_structures_without_a_rank_have(struct):
    assert linear(struct, 64, 64, rank=1).sizes.rho == 1


def test_explicit_sizes():
    sizes = (2, 3, 4, 4, 2, 2, 3)
    layer, x = make("btt", 24, 16, sizes=sizes), randn(5, 24)
    assert layer.sizes == sizes
    close(layer(x), x @ layer.to_dense().T)


@pytest.mark.parametrize("struct, options", [
    ("monarch", {}), ("btt", {}), ("btt", dict(num_experts=3)),
    ("einsum", dict(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25)))])
def test_fixed_gamma_and_phi(struct, options):
    """The number of heads of an input or output.

    The other two indices share the width, monarch's as before.
    """
    for heads, (fixed, d_in, d_out) in itertools.product((2, 3, 8), [("phi", 96, 192), ("gamma", 192, 96)]):
        layer = randomize(linear(struct, d_in, d_out, **{fixed: heads}, **options))
        sizes = layer.experts.sizes if options.get("num_experts") else layer.sizes
        assert getattr(sizes, fixed) == heads and (sizes.d_in, sizes.d_out) == (d_in, d_out)
        if struct != "einsum":
            assert sizes.beta == sizes.delta == 1
        if not options.get("num_experts"):
            x = randn(5, d_in)
            close(layer(x), x @ layer.to_dense().T)
    assert "phi = 5 must divide the width 192" in error(struct, 96, 192, phi=5, **options)
    assert "gamma = 0 must divide the width 96" in error(struct, 96, 192, gamma=0, **options)
    assert "gamma = -2 must divide the width 96" in error(struct, 96, 192, gamma=-2, **options)


@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("struct", ["dense", "btt", "dyad"])
def test_no_rows(struct, num_experts):
    x = torch.zeros(0, 3, 16, requires_grad=True)
    y = linear(struct, 16, 64, num_experts=num_experts)(x)
    y.sum().backward()
    assert y.shape == (0, 3, 64) and x.grad.shape == x.shape


@pytest.mark.parametrize("struct", ["dense", "btt"])
def test_router_of_no_rows_reports_zeros(struct):
    """Not NaN, which the loss of other tokens could not be added to."""
    moe = linear(struct, 16, 64, num_experts=4)
    y, aux = moe(torch.zeros(0, 16), return_aux=True)
    (y.sum() + aux.loss).backward()
    assert not any(value.any() for value in (*aux, moe.router.grad))
    moe.rebalance(aux.load, aux.variance, 0.1)
    assert not moe.balance.any()


# ---- FLOPs -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_experts, top_k", [(0, 2), (4, 1), (4, 3)])
@pytest.mark.parametrize("d_in, d_out", [(48, 192), (192, 48)])
@all_cases
def test_flops_are_those_executed(case, d_in, d_out, num_experts, top_k):
    layer = make(case, d_in, d_out, num_experts=num_experts, top_k=top_k)
    x = randn(30, d_in).requires_grad_()
    forward = counted_flops(lambda: layer(x))
    assert forward == 30 * layer.flops_per_token()
    both = counted_flops(lambda: layer(x).sum().backward())
    assert both - forward == pytest.approx(2 * forward + recomputed_flops(layer, 30), rel=0.01)


@pytest.mark.parametrize("num_experts", [0, 6])
@all_cases
def test_flops_are_those_of_the_cores(case, num_experts):
    """Two experts and the router; what is no einsum uses each parameter once."""
    layer = make(case, 48, 192, num_experts=num_experts, top_k=2)
    experts = layer.experts if num_experts else layer
    once = 2 * sum(math.prod(getattr(experts, name).shape[-3:]) for name in experts.fans())
    one = cost(experts.sizes)[0] if isinstance(experts, structured.Einsum) else once
    assert layer.flops_per_token() == (2 * one + 2 * 48 * 6 if num_experts else one)


@pytest.mark.parametrize("options", [dict(struct="dense"),
                                     dict(struct="einsum", theta=(0, 1, 0, 0, 1, 0, 0))])
def test_scalar_core_is_left_out(options):
    """A core of one entry is no core: dense has one, and d0 / (cores · fan_in) counts one."""
    layer = linear(d_in=24, d_out=16, weight_norm=False, **options)
    assert [p.numel() for p in layer.parameters()] == [24 * 16]
    (name,) = layer.fans()
    assert layer.fans()[name] == (24, 16) and layer.lr_multipliers(48)[name] == 2
    assert layer.flops_per_token() == 2 * 24 * 16


# ---- Initialization and learning rates ---------------------------------------------------------------------

@WIDTHS
@all_cases
def test_fans_count_the_products(case, d_in, d_out):
    """With ones in all cores, a row of the matrix sums to the number of ways from the input to one output: Π
    fan_in, and a column to those from one input to the output: Π fan_out. Of DYAD, whose cores add up, to the
    fans."""
    layer = linear(CASES[case][0], d_in, d_out, weight_norm=False, **CASES[case][1])
    for p in layer.parameters():
        torch.nn.init.ones_(p)
    fan_in, fan_out = zip(*layer.fans().values())
    W, total = layer.to_dense(), math.prod if layer.cores_multiply else max
    assert (W.sum(1) == total(fan_in)).all() and (W.sum(0) == total(fan_out)).all()


@pytest.mark.parametrize("d_in, d_out", [(144, 144), (144, 576), (576, 144)])
@pytest.mark.parametrize("num_experts", [0, 4])
@all_cases
def test_fans_and_init_are_those_of_the_matrix_products(case, d_in, d_out, num_experts):
    """A core (batch, out, in) multiplies vectors of `in` numbers; each DYAD output sums two such products."""
    layer = linear(CASES[case][0], d_in, d_out, num_experts=num_experts, **CASES[case][1])
    experts = layer.experts if num_experts else layer
    products = 1 if experts.cores_multiply else 2
    for name, (fan_in, fan_out) in experts.fans().items():
        core = getattr(experts, name)
        assert (fan_out, fan_in) == tuple(products * n for n in core.shape[-2:])
        std = math.sqrt(min(fan_in, fan_out)) / fan_in  # DESIGN 4
        assert core.square().mean().sqrt().item() == pytest.approx(std, rel=5 / math.sqrt(2 * core.numel()))
    assert all((p == 1).all() for name, p in layer.named_parameters() if "gain" in name)


@pytest.mark.parametrize("sizes", [(6, 2, 1, 3, 8, 1, 2), (2, 6, 1, 8, 3, 1, 2), (4, 3, 2, 2, 5, 2, 1),
                                   (6, 1, 2, 1, 5, 3, 2)])
def test_uses_are_the_rank_of_one_tokens_gradient(sizes):
    """Each use of a core by a token adds a rank-one term to the gradient of the core's matrices."""
    layer = linear("btt", math.prod(sizes[:3]), math.prod(sizes[3:6]), sizes=sizes, weight_norm=False)
    randomize(layer)
    (layer(randn(1, layer.d_in)) * randn(1, layer.d_out)).sum().backward()
    for name, uses in layer.sizes.uses().items():
        core = getattr(layer, name)
        assert min(core.shape[1:]) > uses, "a greater rank would be seen"
        assert (torch.linalg.matrix_rank(core.grad) == uses).all()


@pytest.mark.parametrize("d_in, d_out", [(144, 144), (144, 576), (576, 144)])
@pytest.mark.parametrize("num_experts", [0, 4])
@all_cases
def test_learning_rate_falls_with_fan_in(case, d_in, d_out, num_experts):
    """DESIGN 4: d0 / (cores · fan_in), where the core is used once by a token, or its width is the base
    width."""
    layer = linear(CASES[case][0], d_in, d_out, num_experts=num_experts, **CASES[case][1])
    experts = layer.experts if num_experts else layer
    cores = len(experts.fans()) if experts.cores_multiply else 1
    is_einsum = isinstance(experts, structured.Einsum)
    uses = experts.sizes.uses() if is_einsum else dict.fromkeys(experts.fans(), 1)
    for base in (128, d_in, d_out):
        multipliers = experts.lr_multipliers(base)
        for (name, (fan_in, _)), width in zip(experts.fans().items(), (d_in, d_out, d_out)):
            if uses[name] == 1 or base == width:
                assert multipliers[name] == pytest.approx(base / (cores * fan_in))
        assert all(m == 1 for name, m in multipliers.items() if name not in uses)
        if num_experts:
            assert layer.lr_multipliers(base) == {"router": base / d_in}


@pytest.mark.parametrize("theta", [STRUCTURES["kronecker"], STRUCTURES["tt"],
                                   (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25)])
@pytest.mark.parametrize("base, d", [(16, 256), (256, 16), (256, 4096)])
def test_learning_rate_of_a_shared_core_grows_with_its_uses(theta, base, d):
    """By √(uses / uses at the base width), at widths where the sizes are exact."""
    small, large = (linear("einsum", width, width, theta=theta) for width in (base, d))
    uses_at_base, uses = small.sizes.uses(), large.sizes.uses()
    assert max(uses.values()) > 1
    for name, (fan_in, _) in large.fans().items():
        expected = base / (2 * fan_in) * math.sqrt(uses[name] / uses_at_base[name])
        assert large.lr_multipliers(base)[name] == pytest.approx(expected)


@pytest.mark.parametrize("d", [64, 1024])
@all_cases
def test_scale_at_init(case, d):
    """Unit inputs make outputs of at most about unit size, and the matrix's norm does not depend on the
    width.

    Where a norm follows, learning rates are relative to the size of the output.
    """
    struct, options = CASES[case]
    layer, followed = (linear(struct, d, d, norm_follows=follows, **options) for follows in (False, True))
    with torch.no_grad():
        rms = layer(torch.randn(256, d)).square().mean().sqrt().item()
        W, v = layer.to_dense(), torch.randn(d)
        for _ in range(20):
            v = torch.nn.functional.normalize(W.T @ (W @ v), dim=0)
    assert rms < 1.1 and (W @ v).norm() < 4.5
    if struct != "einsum":
        assert (W @ v).norm() > 0.4
    for name in layer.fans():
        relative = followed.lr_multipliers(128)[name] / layer.lr_multipliers(128)[name]
        assert relative == pytest.approx(rms, rel=0.2)


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
    assert zero == (list(experts.fans())[-1:] if experts.cores_multiply else ["wl", "wu"])
    assert all(getattr(experts, name).grad.abs().max() > 0 for name in zero)


def test_router_at_init_has_the_scale_of_a_core():
    """std = √min(d, E) / d, as a core of fan-in d and fan-out E: logits shrink as the width grows."""
    for d, E in ((64, 8), (256, 4)):
        router = linear("dense", d, d, num_experts=E).router
        assert router.std().item() == pytest.approx(math.sqrt(min(d, E)) / d, rel=0.12)
