"""Structures to test, and independent truths about them that several test files use."""
import math
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from structured import DYAD_VARIANTS, STRUCTURES, Einsum, MoE, linear

B_FIRST = (0.1, 0.6, 0.3, 0.6, 0.1, 0.3, 0.25)  # min(β, δ) > min(α, ε): contracting B first costs less
NAMED = [name for name, theta in STRUCTURES.items() if theta]     # points of the einsum space


def random_theta(rng):
    """Seven exponents: two points of the simplex, uniformly distributed, and a small rank."""
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


def randomize(module, std=1.5):
    """Every parameter random, in float64: cores far above their initial size, gains not 1, biases not 0."""
    with torch.no_grad():
        for name, p in module.double().named_parameters():
            if "gain" in name:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=std)
    return module


def make(case, d_in, d_out, **options):
    """A layer of one of the CASES, with random parameters."""
    struct, more = CASES[case]
    return randomize(linear(struct, d_in, d_out, **more, **options))


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def counted_flops(run):
    """FLOPs of the products that run() executes, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def recomputed_flops(module, rows):
    """FLOPs of the first products that the backward of `rows` tokens executes again: those of all einsums of
    two cores but low rank, in each chosen expert."""
    mixtures = {m.experts: m.top_k for m in module.modules() if isinstance(m, MoE)}
    total = 0
    for layer in module.modules():
        if isinstance(layer, Einsum) and not layer.plain:
            inside = [k for experts, k in mixtures.items() if layer in set(experts.modules())]
            a, b, g, d, e, f, r = layer.contraction
            total += 2 * rows * (inside or [1])[0] * g * b * a * r * f * d
    return total


# DESIGN.md, section 2, in the letters of structured.py
EINSUM = dict(x="gba", A="gadfr", B="gbefr", y="fed")


def cost(sizes):
    """(FLOPs per token in the cheaper order, entries of the cores) of the einsum between these sizes.

    A contraction costs one multiply-add for each value of all its indices. A core of one entry is left out:
    the other absorbs it.
    """
    size = dict(zip("abgdefr", sizes))

    def volume(letters):
        return math.prod(size[letter] for letter in set(letters))
    cores = [name for name in "AB" if volume(EINSUM[name]) > 1] or ["A"]
    flops = []
    for order in (cores, cores[::-1]):
        rest, total = EINSUM["x"], 0
        for core in order:
            total += 2 * volume(rest + EINSUM[core])
            later = EINSUM["y"] + "".join(EINSUM[name] for name in order if name != core)
            rest = "".join(letter for letter in set(rest + EINSUM[core]) if letter in later)
        flops.append(total)
    return min(flops), sum(volume(EINSUM[core]) for core in cores)
