"""lib/factorize.py: the nearest divisor triples, against brute force."""
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.factorize import divisors, nearest_triples, widths_that_factor


def nearest_by_brute_force(d, exponents):
    """Divisor triples of d at the least distance from d^exponents in log space."""
    triples = [(i, j, d // i // j) for i in range(1, d + 1) if d % i == 0
               for j in range(1, d // i + 1) if d // i % j == 0]
    distance = {t: sum((math.log(s) - x * math.log(d)) ** 2 for s, x in zip(t, exponents)) for t in triples}
    return [t for t in triples if distance[t] < min(distance.values()) + 1e-9]


@st.composite
def simplex(draw):
    """Three exponents that sum to 1, often with ties and zeros."""
    n = draw(st.sampled_from([1, 2, 3, 4, 6, 12, 97, 1000]))
    i, j = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
    return i / n, (j - i) / n, (n - j) / n


smooth_widths = st.builds(lambda p, q: 2 ** p * q, st.integers(4, 9),
                          st.sampled_from([1, 3, 5, 6, 9, 15, 12])).filter(lambda d: 64 <= d <= 8192)


@pytest.mark.parametrize("n, expected", [
    (1, [1]), (2, [1, 2]), (16, [1, 2, 4, 8, 16]), (36, [1, 2, 3, 4, 6, 9, 12, 18, 36]), (97, [1, 97]),
    (1009 * 1013, [1, 1009, 1013, 1009 * 1013])])
def test_divisors(n, expected):
    assert divisors(n) == expected


@settings(deadline=None, max_examples=200, derandomize=True)
@given(simplex(), smooth_widths)
def test_triples_are_all_the_nearest(exponents, d):
    assert sorted(nearest_triples(d, exponents)) == sorted(nearest_by_brute_force(d, exponents))


@pytest.mark.parametrize("last", [1, 2, 12, 48])
def test_a_size_that_is_given_leaves_the_others_their_ratio(last):
    """α = d^1/4 and β = d^1/2 share d / γ: α is its cube root."""
    found = nearest_triples(96, (0.25, 0.5, 0.25), last)
    assert found
    for i, j, k in found:
        assert k == last and i * j * k == 96
        assert (i, j, 1) in nearest_by_brute_force(96 // last, (1 / 3, 2 / 3, 0))


@pytest.mark.parametrize("d, exponents", [(127, (0.94, 0.06, 0)), (53, (0.9, 0.05, 0.05))])
def test_exponents_that_no_larger_width_has(d, exponents):
    with pytest.raises(ValueError, match=f"^{d} does not split into about .*; a width of [0-9]+ would$"):
        nearest_triples(d, exponents)


@pytest.mark.parametrize("d", [97, 766, 1009])
def test_a_width_without_near_divisors_names_widths_that_have_them(d):
    """About √d each: neither a prime nor twice a prime splits like that."""
    with pytest.raises(ValueError, match=f"^{d} does not split into about .* a width of ") as error:
        nearest_triples(d, (0.5, 0, 0.5))
    below, above = widths_that_factor(d, (0.5, 0, 0.5))
    assert below < d < above and f"{below} or {above}" in str(error.value)
    for width in (below, above):
        for size in (nearest_triples(width, (0.5, 0, 0.5))[0][i] for i in (0, 2)):
            assert math.sqrt(width) / 1.5 <= size <= 1.5 * math.sqrt(width)


def test_a_size_may_be_off_by_a_factor_of_four():
    assert nearest_triples(3 * 37, (0.5, 0, 0.5))  # 3 instead of √111: 3.5 times less
    with pytest.raises(ValueError, match="122 does not split"):  # 2 instead of √122: 5.5 times less
        nearest_triples(2 * 61, (0.5, 0, 0.5))
