"""structured.py against independent truths: matrices by hand, brute force, autograd's own differences, counted FLOPs."""
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import structured
from tests.conftest import ROOT
from structured import DYAD_VARIANTS, STRUCTURES, Theta, linear
from tests.structures import CASES, THETAS, all_cases, randomize, close, make, randn


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
    layer = randomize(linear("dyad", d_in, d_out, dyad_blocks=D, dyad_variant=variant))
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
    randomize(layer)
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
    plain = make(case, 48, 64, weight_norm=True, normalized=True)
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


def test_gradients_of_cores_above_and_below_the_limit():
    """A core that is normalized, one that is not, and one of zeros."""
    core = (randn(3, 2, 3, 4) * torch.tensor([2.0, 0.1, 0.0])[:, None, None, None]).requires_grad_()
    gain = randn(3, 1, 1, 1).requires_grad_()
    assert gradcheck(lambda *inputs: structured._NormalizedCore.apply(*inputs, 0.7), (core, gain))
    assert gradcheck(lambda core: structured._NormalizedCore.apply(core, None, 0.7), core)


@all_cases
def test_gradients_of_mixtures_through_the_router(case):
    moe = make(case, 8, 12, num_experts=3, bias=True, weight_norm=True)
    x = randn(5, 8)
    logits = (x @ moe.router.T).sort(dim=1).values
    assert logits.diff(dim=1).min() > 1e-3  # no choice flips within the differences' step
    check_gradients(moe, x, fast_mode=True, check_undefined_grad=False)  # undefined gradients: see test_kernels.py


# ---- Mixtures -------------------------------------------------------------------------------------------------------

def naive_mixture(moe, x):
    """DESIGN 3: y = Σ_{e in top-k} g_e · (W_e x + b_e), g the softmax over the chosen logits; a token at a time. The
    biases of the balance have a say in the choice alone."""
    W, y = moe.experts.to_dense(), []
    for row in x:
        logits = moe.router @ row
        chosen = sorted(range(len(W)), key=lambda e: -(logits[e] + moe.balance[e]).item())[:moe.top_k]
        total = sum(logits[e].exp() for e in chosen)
        y.append(sum(logits[e].exp() / total * (W[e] @ row + moe.experts.bias[e]) for e in chosen))
    return torch.stack(y)


def masked_mixture(moe, x):
    """All experts of all tokens, and a mask: the same function to autograd."""
    logits = x @ moe.router.T
    scores = logits.detach() + moe.balance
    gates = logits.masked_fill(scores < scores.topk(moe.top_k).values[:, -1:], -math.inf).softmax(1)
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
    moe.balance.normal_()
    y, aux = moe(x, return_aux=True)
    assert torch.equal(y, moe(x))
    logits = x @ moe.router.T
    probability, share = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for row in logits:
        probability += row.exp() / row.exp().sum() / 23
        share[(row + moe.balance).argsort(descending=True)[:2]] += 1 / 46
    close(aux.load, share)
    assert aux.load.sum().item() == pytest.approx(1) and not aux.load.requires_grad and not aux.variance.requires_grad
    close(aux.variance, sum(((row - row.mean()) ** 2).mean() for row in logits) / 23)
    z = sum(row.exp().sum().log() ** 2 for row in logits) / 23
    for got, expected in ((aux.switch, 5 * (probability * share).sum()), (aux.z, z), (aux.loss(), aux.switch + 0.1 * aux.z)):
        close(got, expected)
        close(*(torch.autograd.grad(loss, moe.router, retain_graph=True)[0] for loss in (got, expected)))


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


def test_rebalance():
    """Biases move by rate · spread of the logits · distance from the mean load; a load that is no number moves nothing."""
    moe = make("btt", 16, 16, num_experts=4, top_k=2)
    moe.balance.copy_(torch.tensor([1.0, 2, 3, 4]))
    moe.rebalance(torch.tensor([0.5, 0.25, 0.2, 0.05], dtype=torch.float64), torch.tensor(9.0).double(), 0.1)
    close(moe.balance, torch.tensor([1 + 0.3 * -1, 2, 3 + 0.3 * 0.2, 4 + 0.3 * 0.8], dtype=torch.float64))
    before = moe.balance.clone()
    moe.rebalance(torch.full((4,), math.nan), torch.tensor(1.0), 0.1)
    moe.rebalance(torch.full((4,), 0.25), torch.tensor(math.inf), 0.1)
    assert torch.equal(moe.balance, before)


@pytest.mark.parametrize("struct", ["btt", "dense"])
def test_rebalance_evens_the_load_of_clusters(struct):
    """Tokens of 40 kinds, some far more frequent than others, as characters are."""
    torch.manual_seed(0)
    moe, kinds = linear(struct, 64, 64, num_experts=8), torch.randn(40, 64)
    x = kinds[torch.multinomial(1 / torch.arange(1, 41.0), 4000, replacement=True)] + 0.3 * torch.randn(4000, 64)
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
    for options in (dict(rank=2), dict(theta=THETAS[0]), dict(sizes=(1,) * 7), dict(phi=4), dict(gamma=4)):
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
    assert "gamma" in error("einsum", 24, 16, sizes=sizes, gamma=4)


@pytest.mark.parametrize("struct, options", [("monarch", {}), ("btt", {}), ("btt", dict(num_experts=3)),
                                             ("einsum", dict(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25)))])
def test_fixed_gamma_and_phi(struct, options):
    for heads in (2, 3, 8):
        for layer, size in ((linear(struct, 96, 192, phi=heads, **options), lambda s: s.phi),
                            (linear(struct, 192, 96, gamma=heads, **options), lambda s: s.gamma)):
            layer = layer.experts if options.get("num_experts") else layer
            assert size(layer.sizes) == heads and (layer.sizes.d_in, layer.sizes.d_out) == (layer.d_in, layer.d_out)
            if struct != "einsum":
                assert layer.sizes.beta == layer.sizes.delta == 1
    x = randn(5, 96)
    layer = randomize(linear(struct, 96, 192, phi=8, **options))
    if not options.get("num_experts"):
        close(layer(x), x @ layer.to_dense().T)
    assert "phi = 5" in error(struct, 96, 192, phi=5, **options)
    assert "gamma = 0" in error(struct, 96, 192, gamma=0, **options)


@pytest.mark.parametrize("struct", ["dense", "low_rank", "kronecker", "tt"])
def test_what_has_no_gamma_or_phi_to_fix(struct):
    assert "gamma = 0" in error(struct, 64, 64, gamma=8) and "phi = 0" in error(struct, 64, 64, phi=8)


# ---- The table ------------------------------------------------------------------------------------------------------

def test_readme_has_the_table():
    """The README's table is what `python structured.py 768 3072` prints."""
    assert structured.table(768, 3072) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_is_what_the_layers_have():
    """Each cell against the counted layer: torch's FLOP counter, and the parameters themselves."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in structured.table(96, 384).splitlines()[2:]]
    assert [row[0] for row in rows] == [name for name in STRUCTURES if name != "einsum"]
    for name, theta, sizes, params, params_share, flops, flops_share, psi, nu, omega, cores in rows:
        layer = linear(name, 96, 384, weight_norm=False)
        weights = dict(layer.named_parameters())
        count = sum(p.numel() for p in weights.values())
        assert int(params.replace(",", "")) == count and float(params_share) == pytest.approx(count / (96 * 384), abs=6e-4)
        executed = counted(lambda: layer(torch.randn(1, 96)))
        assert int(flops.replace(",", "")) == executed
        assert float(flops_share) == pytest.approx(executed / (2 * 96 * 384), abs=6e-4)
        told = {core.split(": ")[0]: [float(v) for v in core.split(": ")[1].split(" · ")] for core in cores.split(", ")}
        assert told.keys() == weights.keys()
        for core, (std, lr) in told.items():
            assert std == pytest.approx(layer.init_std(core), rel=6e-3)
            assert lr == pytest.approx(layer.lr_multipliers(128)[core], rel=6e-3)
        if STRUCTURES[name]:
            point = STRUCTURES[name]
            assert [float(v) for v in (psi, nu, omega)] == [point.psi, point.nu, point.omega]
            assert tuple(float(v) for v in theta.split()) == point
    assert "97 does not split" in structured.table(97, 97)


@pytest.mark.parametrize("arguments", [[], ["768", "3072", "1"], ["x"], ["0"], ["64.5"]])
def test_table_wants_widths(run, arguments):
    told = run("structured.py", *arguments)
    assert told.returncode == 1 and told.stderr.startswith("usage:") and not told.stdout


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


def shared_factor(sizes, name, order, d0):
    """√(u / u0) for u rows per token of the core's product, which are d^t of a width d: u0 = d0^t."""
    first, d = name == order[0], (sizes.d_in if name == order[0] else sizes.d_out)
    uses = {("A", True): sizes.beta, ("A", False): sizes.epsilon, ("B", True): sizes.alpha, ("B", False): sizes.delta}
    uses = uses[name, first] if len(order) == 2 else 1
    return math.sqrt(uses / d0 ** (math.log(uses) / math.log(d)))


@pytest.mark.parametrize("sizes", [(6, 2, 1, 3, 8, 1, 2), (2, 6, 1, 8, 3, 1, 2), (4, 3, 2, 2, 5, 2, 1), (6, 1, 2, 1, 5, 3, 2)])
def test_uses_are_the_rank_of_one_tokens_gradient(sizes):
    """Each use of a core by a token adds a rank-one term to the gradient of the core's matrices."""
    layer = randomize(linear("btt", math.prod(sizes[:3]), math.prod(sizes[3:6]), sizes=sizes, weight_norm=False))
    (layer(randn(1, layer.d_in)) * randn(1, layer.d_out)).sum().backward()
    for name, uses in layer.sizes.uses().items():
        ranks = torch.linalg.matrix_rank(getattr(layer, name).grad)
        assert min(getattr(layer, name).shape[1:]) > uses - (uses == 1), "the case can show it"
        assert (ranks == uses).all()


def test_learning_rate_of_shared_cores():
    """d0 / (2 · fan_in) · √(u / u0): Kronecker's cores have fan_in √d and are used √d times, so d0 / 2 · d^(-1/4) · d0^(-1/4)."""
    for d in (16, 256, 4096):
        for d0 in (16, 64, 256):
            layer = linear("kronecker", d, d)
            assert [layer.lr_multipliers(d0)[n] for n in "AB"] == pytest.approx([d0 / 2 * d ** -0.25 * d0 ** -0.25] * 2)
            monarch = linear("monarch", d, d)  # nothing is shared
            assert [monarch.lr_multipliers(d0)[n] for n in "AB"] == pytest.approx([d0 / 2 / math.sqrt(d)] * 2)


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
        factor = 1 if struct == "dyad" else shared_factor(experts.sizes, name, experts.order, 128)
        assert experts.lr_multipliers(128)[name] == pytest.approx(128 / (cores * fan_in) * factor)
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
