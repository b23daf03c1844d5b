"""Structures to test, and what several test files ask of them."""
import random

import pytest
import torch

from structured import DYAD_VARIANTS, STRUCTURES, linear

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
