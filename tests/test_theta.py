"""space.py against brute force, the textbook formulas of the exponents, and the measured rank of matrices."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structured import STRUCTURES, Sizes, Theta, linear
from tests.structures import NAMED, THETAS, awaken, close, cost_of_order, entries, make, randn


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


@settings(deadline=None, max_examples=60, derandomize=True)
@given(explicit)
def test_swapped_cores_make_the_same_matrix(sizes):
    """A and B, α and β, δ and ε exchanged: the same numbers, with two axes of the input and of the output exchanged."""
    one, two = (linear("einsum", s.d_in, s.d_out, sizes=s, weight_norm=False).double() for s in (sizes, sizes.swapped()))
    awaken(one)
    if len(one.order) == 2:
        with torch.no_grad():
            for mine, its in zip(two.cores(), reversed(one.cores())):
                mine.copy_(its)
        a, b, g, d, e, f, r = sizes
        close(two.to_dense().view(f, d, e, g, a, b), one.to_dense().view(f, e, d, g, b, a).permute(0, 2, 1, 3, 5, 4))
    assert one.flops_per_token() == two.flops_per_token()


def measured_rank(W):
    """Rank of a square matrix: by a random projection where it is small, by a proven inverse where it is full."""
    d = len(W)
    n = max(16, d // 8)
    sketched = torch.linalg.matrix_rank(randn(n, d) @ W @ randn(d, n)).item()
    if sketched < n:
        return sketched
    inverse, singular = torch.linalg.inv_ex(W)
    if not singular and (W @ inverse @ (v := randn(d, 4)) - v).norm() < 1e-3:  # W · W⁻¹ is the identity: none is lost
        return d
    return torch.linalg.matrix_rank(W).item()


@pytest.mark.parametrize("theta", [
    STRUCTURES["low_rank"], STRUCTURES["kronecker"], STRUCTURES["monarch"], STRUCTURES["btt"], STRUCTURES["tt"],
    Theta(1, 0, 0, 0.5, 0.5, 0, 0), Theta(0, 1, 0, 0.5, 0.5, 0, 0), Theta(0.5, 0.5, 0, 0, 0.5, 0.5, 0)])
def test_exponent_of_rank(theta):
    """rank(W) of random cores grows as d^ψ over widths where the sizes are exact."""
    widths = [64, 256, 1024, 4096]
    ranks = [measured_rank(awaken(linear("einsum", d, d, theta=theta, weight_norm=False), std=1).to_dense()) for d in widths]
    assert slope(widths, ranks) == pytest.approx(theta.psi, abs=0.05)


@pytest.mark.parametrize("theta", [Theta(1, 0, 0, 0, 1, 0, 0.25), Theta(0, 0.5, 0.5, 1, 0, 0, 0.25), Theta(0.75, 0.25, 0, 0.25, 0.75, 0, 0.25)])
def test_exponent_of_rank_with_quarters(theta):
    """As above where only fourth powers are exact."""
    ranks = [measured_rank(awaken(linear("einsum", d, d, theta=theta, weight_norm=False), std=1).to_dense()) for d in (16, 256)]
    assert slope([16, 256], ranks) == pytest.approx(theta.psi, abs=0.05)
