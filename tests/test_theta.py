"""Theta and Sizes of structured.py: against brute force, counted layers, and the measured rank of
matrices."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structured import STRUCTURES, Sizes, Theta, linear
from tests.lib.test_factorize import nearest_by_brute_force, simplex, smooth_widths
from tests.structures import NAMED, THETAS, close, cost, counted_flops, make, randn, randomize


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Exponents

@pytest.mark.parametrize("theta, message", [
    ((1.5, -0.5, 0, 1, 0, 0, 0), "alpha"), ((1, 0, 0, 1, 0, 0, 1.1), "rho"),
    ((0.5, 0, 0, 1, 0, 0, 0), "gamma"), ((1, 0, 0, 0.5, 0.2, 0.2, 0), "delta"),
    ((float("nan"), 0, 1, 1, 0, 0, 0), "alpha")])
def test_theta_outside_its_simplices_is_refused(theta, message):
    for make_theta in (lambda: Theta(*theta), lambda: Theta.parse(theta),
                       lambda: linear("einsum", 64, 64, theta=theta)):
        with pytest.raises(ValueError, match=message):
            make_theta()


@pytest.mark.parametrize("value", [
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0), ("0.5", "0", "0.5", "0", "0.5", "0.5", "0"),
    [0.5, 0, 0.5, 0, 0.5, 0.5, 0], Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0)])
def test_theta_is_parsed(value):
    assert Theta.parse(value) == STRUCTURES["monarch"]
    assert linear("einsum", 64, 96, theta=value).sizes == linear("monarch", 64, 96).sizes


@pytest.mark.parametrize("value", ["", "1, 0, 0, 1, 0, 0, 0", "1001000", (1, 0, 0), (1, 0, 0, 1, 0, 0, "x"),
                                   None, 3, (1,) * 8])
def test_parse_refuses_what_is_not_seven_numbers(value):
    with pytest.raises(ValueError, match="seven numbers"):
        Theta.parse(value)


@pytest.mark.parametrize("theta, psi, nu, omega", [
    (STRUCTURES["dense"], 1, 1, 0), (STRUCTURES["monarch"], 1, 1 / 2, 0),
    (STRUCTURES["kronecker"], 1, 1 / 2, 1 / 2), (Theta(1, 0, 0, 0, 1, 0, 1 / 4), 1 / 4, 1 / 4, 0)])
def test_taxonomy_has_the_values_of_the_paper(theta, psi, nu, omega):
    assert (theta.psi, theta.nu, theta.omega) == pytest.approx((psi, nu, omega))


def growth(widths, values):
    """x, where the values grow as width^x: the slope of a line through their logarithms."""
    return np.polyfit([math.log(w) for w in widths], [math.log(v) for v in values], 1)[0]


def measured_cost(theta, width):
    """(FLOPs that the layer executes for one token, parameters that it has), without memory for either."""
    with torch.device("meta"):
        layer, x = linear("einsum", width, width, theta=theta, weight_norm=False), torch.empty(1, width)
        return counted_flops(lambda: layer(x)), sum(p.numel() for p in layer.parameters())


def check_exponents_of_cost(theta, widths):
    """f, n, and what the taxonomy makes of them: ω is how FLOPs grow over parameters, ν how they grow over
    the width."""
    flops, params = zip(*(measured_cost(theta, width) for width in widths))
    assert growth(widths, flops) == pytest.approx(theta.flops_exponent, abs=0.05)
    assert growth(widths, params) == pytest.approx(theta.params_exponent, abs=0.05)
    assert growth(widths, [f / p for f, p in zip(flops, params)]) == pytest.approx(theta.omega, abs=0.05)
    assert growth(widths, [f / d for f, d in zip(flops, widths)]) == pytest.approx(theta.nu, abs=0.05)


EXACT_THETAS = [Theta(*t) for t in (
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0.5), (0.5, 0.5, 0, 0, 0.5, 0.5, 0), (0, 0.5, 0.5, 0.5, 0, 0.5, 0),
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0.5), (1, 0, 0, 0.5, 0.5, 0, 0), (0, 0, 1, 0, 0, 1, 0))]


@pytest.mark.parametrize("theta", [*(STRUCTURES[name] for name in NAMED), *EXACT_THETAS])
def test_cost_of_layers_grows_with_the_exponents(theta):
    """At powers of 4, where the sizes are exact."""
    check_exponents_of_cost(theta, [64, 256, 1024, 4096])


@pytest.mark.parametrize("theta", [Theta(*t) for t in THETAS])
def test_cost_of_layers_grows_with_the_exponents_in_the_limit(theta):
    """For any θ: at widths so large that lower-order terms do not matter, with so many divisors that rounding
    does not either."""
    check_exponents_of_cost(theta, [5040 * 12, 5040 * 720, 5040 * 5040, 5040 * 5040 * 30])


def measured_rank(W):
    """Rank of a square matrix: by a random projection where it is small, by an inverse that is checked where
    it is full."""
    d = len(W)
    n = max(16, d // 8)
    sketched = torch.linalg.matrix_rank(randn(n, d) @ W @ randn(d, n)).item()
    if sketched < n:
        return sketched
    inverse, singular = torch.linalg.inv_ex(W)
    if not singular and (W @ inverse @ (v := randn(d, 4)) - v).norm() < 1e-3:
        return d
    return torch.linalg.matrix_rank(W).item()


def check_exponent_of_rank(theta, widths):
    layers = [randomize(linear("einsum", d, d, theta=theta, weight_norm=False), std=1) for d in widths]
    ranks = [measured_rank(layer.to_dense()) for layer in layers]
    assert growth(widths, ranks) == pytest.approx(theta.psi, abs=0.05)


@pytest.mark.parametrize("theta", [
    *(STRUCTURES[name] for name in ("low_rank", "kronecker", "monarch", "btt", "tt")),
    Theta(1, 0, 0, 0.5, 0.5, 0, 0), Theta(0, 1, 0, 0.5, 0.5, 0, 0), Theta(0.5, 0.5, 0, 0, 0.5, 0.5, 0)])
def test_rank_of_matrices_grows_with_psi(theta):
    """Over widths where the sizes are exact."""
    check_exponent_of_rank(theta, [64, 256])


@pytest.mark.parametrize("theta", [Theta(1, 0, 0, 0, 1, 0, 0.25), Theta(0, 0.5, 0.5, 1, 0, 0, 0.25),
                                   Theta(0.75, 0.25, 0, 0.25, 0.75, 0, 0.25)])
def test_rank_of_matrices_grows_with_psi_in_quarters(theta):
    """Only fourth powers are exact here."""
    check_exponent_of_rank(theta, [16, 256])


# Sizes

@pytest.mark.parametrize("struct, top_k, rank", [("monarch", 2, 64), ("btt", 2, 64), ("monarch", 1, 128)])
def test_experts_have_full_rank_together(struct, top_k, rank):
    """Those of a token are added up: two of half the rank cost less, and suffice."""
    layer = linear(struct, 128, 128, num_experts=8, top_k=top_k)
    assert layer.experts.sizes.rank() == rank


@settings(deadline=None, max_examples=120, derandomize=True)
@given(st.sampled_from([1, 2, math.inf]), simplex(), simplex(), st.floats(0, 1), smooth_widths, smooth_widths)
def test_sizes_are_the_nearest_then_of_the_greatest_rank_then_the_cheapest(summed, inputs, outputs, rho, d_in,
                                                                           d_out):
    def loss(s):
        return -min(d_in, d_out, summed * min_cut(s)), *cost(s)
    theta = Theta(*inputs, *outputs, rho)
    sizes = theta.sizes(d_in, d_out, summed=summed)
    assert sizes.d_in == d_in == math.prod(sizes[:3]) and sizes.d_out == d_out == math.prod(sizes[3:6])
    assert sizes.rho == max(1, round(min(d_in, d_out) ** rho))
    assert (sizes.flops(), sizes.params()) == cost(sizes)

    near_in, near_out = nearest_by_brute_force(d_in, inputs), nearest_by_brute_force(d_out, outputs)
    assert sizes[:3] in near_in and sizes[3:6] in near_out
    assert loss(sizes) == min(loss(Sizes(*i, *o, sizes.rho)) for i in near_in for o in near_out)

    (a, b, g), (d, e, f) = inputs, outputs
    assert loss(Theta(b, a, g, e, d, f, rho).sizes(d_in, d_out, summed=summed)) == loss(sizes)


def test_both_contraction_orders_occur():
    orders = {Theta(*theta).sizes(d, 4 * d).order() for theta in THETAS for d in (64, 768)}
    assert orders == {("A", "B"), ("B", "A")}


def test_integer_rank_overrides_the_exponent():
    assert STRUCTURES["btt"].sizes(64, 256, rank=5).rho == 5
    assert linear("btt", 64, 256, rank=5).sizes == STRUCTURES["btt"].sizes(64, 256, rank=5)
    assert linear("btt", 64, 256, rank=1).sizes == linear("monarch", 64, 256).sizes


explicit = st.tuples(*[st.integers(1, 4)] * 6, st.integers(1, 3)).map(lambda s: Sizes(*s))


def min_cut(sizes):
    """What the rank of a matrix of these sizes can be at most: the input, the output, and what passes between
    them.

    With A on the input's side and B on the output's, β, γ, ρ, φ, δ cross; with B there, α, γ, ρ, φ, ε.
    """
    a, b, g, d, e, f, r = sizes
    return min(a * b * g, d * e * f, b * g * r * f * d, a * g * r * f * e)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(explicit)
def test_random_cores_have_the_greatest_rank(sizes):
    layer = randomize(linear("einsum", sizes.d_in, sizes.d_out, sizes=sizes))
    assert torch.linalg.matrix_rank(layer.to_dense()).item() == min_cut(sizes) == sizes.rank()


@pytest.mark.parametrize("struct, d_in, d_out, rank", [
    ("low_rank", 64, 256, 8), ("kronecker", 96, 384, 96), ("tt", 256, 64, 64), ("monarch", 144, 144, 144),
    ("btt", 64, 256, 64), ("dense", 40, 24, 24),
    ("monarch", 128, 128, 128), ("kronecker", 96, 96, 96), ("monarch", 128, 512, 128)])  # √128 is no integer
def test_all_but_low_rank_have_full_rank(struct, d_in, d_out, rank):
    layer = make(struct, d_in, d_out)
    assert torch.linalg.matrix_rank(layer.to_dense()).item() == rank == layer.sizes.rank()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(explicit)
def test_swapped_cores_make_the_same_matrix(sizes):
    """A and B, α and β, δ and ε exchanged: the same numbers, with two axes of the input and of the output
    exchanged."""
    swapped = sizes.swapped()
    assert swapped.swapped() == sizes
    one, two = (linear("einsum", s.d_in, s.d_out, sizes=s, weight_norm=False).double()
                for s in (sizes, swapped))
    randomize(one)
    if len(one.order) == 2:
        with torch.no_grad():
            for mine, its in zip(two.factors(), reversed(one.factors())):
                mine.copy_(its)
        a, b, g, d, e, f, r = sizes
        expected = one.to_dense().view(f, e, d, g, b, a).permute(0, 2, 1, 3, 5, 4)
        close(two.to_dense().view(f, d, e, g, a, b), expected)
    assert one.flops_per_token() == two.flops_per_token()
