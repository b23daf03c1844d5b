"""The nearest structured matrix: members of a family, gradient descent and brute-force least squares."""
import math

import pytest
import torch

from lib import nearest
from lib.nearest import matrix_of, nearest_einsum, nearest_sum, relative_error
from structured import DYAD_VARIANTS, Sizes
from tests.structures import all_cases, close, make, randn

RANDOM = Sizes(2, 2, 3, 2, 3, 2, 2)  # all seven letters, and fewer ranks than a slice has
SWAPPED = RANDOM.swapped()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def moments(d_in, rows=None):
    X = randn(rows or 2 * d_in, d_in) * torch.logspace(-1, 1, d_in, dtype=torch.float64)
    return X.T @ X / len(X)


def nearest_matrix(layer, W, C=None):
    """The matrix nearest to W in the layer's family; a Dyad's by its own to_dense."""
    if hasattr(layer, "sizes"):
        return matrix_of(*nearest_einsum(W, layer.sizes, C)[:2])
    layer.weight_norm = False
    layer.wl.data, layer.wu.data = nearest_sum(W, layer.places(), C)
    return layer.to_dense().detach()


@all_cases
@pytest.mark.parametrize("d_in, d_out", [(36, 36), (24, 60), (60, 24)])
def test_a_matrix_of_the_family_is_found(case, d_in, d_out):
    layer = make(case, d_in, d_out)
    W = layer.to_dense().detach()
    for C in (None, moments(d_in), moments(d_in, rows=7)):  # the last one is singular
        assert relative_error(W, nearest_matrix(layer, W, C), C) < 1e-10
    assert relative_error(W, nearest_matrix(layer, W)) < 1e-10


def by_descent(W, matrix, parameters, root, steps=500):
    """The least ‖(W - matrix()) root‖ that Adam finds, by falling steps."""
    optimizer = torch.optim.Adam([p.requires_grad_() for p in parameters], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((W - matrix()) @ root).square().sum()
        loss.backward()
        optimizer.step(), schedule.step()
    return loss.item() ** 0.5


@pytest.mark.parametrize("sizes", [(12, 1, 1, 1, 8, 1, 2), (3, 4, 1, 2, 4, 1, 2),
                                   (4, 1, 3, 1, 4, 2, 2), RANDOM])
def test_closed_forms_are_no_worse_than_gradient_descent(sizes):
    """And not far better: the slices of both are of the same family."""
    sizes = Sizes(*sizes)
    W = randn(sizes.d_out, sizes.d_in)
    error = (W - nearest_matrix(type("Layer", (), dict(sizes=sizes)), W)).norm().item()
    A, B = (randn(*core.shape) for core in nearest_einsum(W, sizes)[:2])
    descent = by_descent(W, lambda: matrix_of(A, B), [A, B], torch.eye(sizes.d_in, dtype=torch.float64))
    assert error <= descent * (1 + 1e-9) and descent <= 1.05 * error + 1e-6


@pytest.mark.parametrize("sizes", [(12, 1, 1, 3, 4, 2, 2), (1, 12, 1, 3, 4, 2, 2)])
def test_the_weighted_closed_form_is_no_worse_than_gradient_descent(sizes):
    """γ = 1, and one of α and β."""
    sizes = Sizes(*sizes)
    W, C = randn(24, 12), moments(12)
    A, B, [error] = nearest_einsum(W, sizes, C)
    A, B = (randn(*core.shape) for core in (A, B))
    root = torch.linalg.cholesky(C)
    descent = by_descent(W, lambda: matrix_of(A, B), [A, B], root)
    assert error ** 0.5 <= descent * (1 + 1e-9)
    # more than what the plain solution does for this norm
    plain = nearest_einsum(W, sizes)
    assert error < 0.99 * ((W - matrix_of(*plain[:2])) @ root).square().sum()


@pytest.mark.parametrize("sizes", [RANDOM, SWAPPED, (3, 4, 1, 2, 4, 1, 2), (4, 1, 3, 1, 4, 2, 2)])
@pytest.mark.parametrize("unknowns", [1024, 3])
def test_alternating_least_squares_never_increases_the_error(sizes, unknowns, monkeypatch):
    """Nor with a singular C, nor where a core is updated in parts."""
    monkeypatch.setattr(nearest, "UNKNOWNS", unknowns)
    sizes = Sizes(*sizes)
    for C in (moments(sizes.d_in), moments(sizes.d_in, rows=5)):
        W = randn(sizes.d_out, sizes.d_in)
        A, B, errors = nearest_einsum(W, sizes, C, sweeps=30, tolerance=0)
        assert len(errors) > 2
        assert all(after <= before + 1e-14 * errors[0] for before, after in zip(errors, errors[1:]))
        R = W - matrix_of(A, B)
        assert errors[-1] == pytest.approx(torch.trace(R @ C @ R.T).item(), rel=1e-8, abs=1e-13 * errors[0])
        assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("sizes", [RANDOM, (3, 4, 1, 2, 4, 1, 2), (4, 1, 3, 1, 4, 2, 2)])
def test_a_weighted_step_is_the_least_squares_solution(sizes):
    """One core given the other, against lstsq over all of its entries: a column for each."""
    sizes = Sizes(*sizes)
    W, C = randn(sizes.d_out, sizes.d_in), moments(sizes.d_in)
    root = torch.linalg.cholesky(C)
    A, B, _ = nearest_einsum(W, sizes)
    units = torch.eye(A.numel(), dtype=torch.float64).view(-1, *A.shape)
    columns = torch.stack([(matrix_of(unit, B) @ root).flatten() for unit in units], dim=1)
    solution = torch.linalg.lstsq(columns, (W @ root).flatten()[:, None], driver="gelsd").solution
    best = (columns @ solution - (W @ root).flatten()[:, None]).square().sum()
    a, b, g, d, e, f, r = sizes
    R = (W - matrix_of(A, B)).view(f, e, d, g, b, a)
    nearest._improve(A, B, R, C.view(g, b, a, g, b, a))
    close(((W - matrix_of(A, B)) @ root).square().sum(), best)
    close(R.reshape_as(W), W - matrix_of(A, B))


def test_alternating_least_squares_ends_where_gradient_descent_does():
    """From the same start: the weighted error is no larger than after 1,000 steps of Adam."""
    sizes = RANDOM
    W, C = randn(sizes.d_out, sizes.d_in), moments(sizes.d_in)
    A, B, errors = nearest_einsum(W, sizes, C, sweeps=1000, tolerance=1e-8)
    A, B, _ = nearest_einsum(W, sizes)
    descent = by_descent(W, lambda: matrix_of(A, B), [A, B], torch.linalg.cholesky(C))
    assert errors[-1] ** 0.5 <= 1.001 * descent


@pytest.mark.parametrize("variant", DYAD_VARIANTS)
@pytest.mark.parametrize("d_in, d_out", [(12, 12), (12, 20), (20, 12)])
def test_the_nearest_dyad_is_the_least_squares_solution(variant, d_in, d_out):
    layer = make(f"dyad_{variant}", d_in, d_out)
    layer.weight_norm = False
    W, C = randn(d_out, d_in), moments(d_in)
    columns = []
    for entry in range(layer.wl.numel() + layer.wu.numel()):
        unit = torch.eye(layer.wl.numel() + layer.wu.numel(), dtype=torch.float64)[entry]
        layer.wl.data, layer.wu.data = (half.view_as(layer.wl) for half in unit.chunk(2))
        columns.append(layer.to_dense().detach())
    for weights in (None, C):
        root = torch.linalg.cholesky(torch.eye(d_in, dtype=torch.float64) if weights is None else C)
        design = torch.stack([(column @ root).flatten() for column in columns], dim=1)
        solution = torch.linalg.lstsq(design, (W @ root).flatten()[:, None], driver="gelsd").solution
        expected = torch.einsum("nij,n->ij", torch.stack(columns), solution[:, 0])
        close(nearest_matrix(layer, W, weights), expected, 1e-8)


def test_relative_error():
    W, C = torch.tensor([[3.0, 4.0]]), torch.diag(torch.tensor([4.0, 1.0]))
    assert relative_error(W, W) == 0 == relative_error(0 * W, 0 * W)
    assert relative_error(W, torch.tensor([[3.0, 0.0]])) == pytest.approx(4 / 5)
    assert relative_error(W, torch.tensor([[3.0, 0.0]]), C) == pytest.approx(4 / 52 ** 0.5)


def test_nan_is_no_perfect_fit():
    W, M, C = torch.ones(12, 12), torch.zeros(12, 12), torch.eye(12)
    M[0, 0] = C[1, 1] = math.nan
    assert math.isnan(relative_error(W, M)) and math.isnan(relative_error(W, W, C))
    _, _, errors = nearest_einsum(torch.randn(RANDOM.d_out, 12), RANDOM, C)
    assert len(errors) == 2 and all(map(math.isnan, errors))
