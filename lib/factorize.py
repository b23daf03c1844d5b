"""Integer factors of a width that come nearest to given exponents: the divisor search behind Theta.sizes.

A triple (i, j, k) of a width d has i · j · k = d; its targets are d^e for three exponents that sum to 1.
Distances are squared differences of logarithms.
"""
import functools
import math

SENSIBLE = 4  # a size may be off its target by this factor
GOOD = 1.5    # a width is suggested to the user if its sizes are within this factor

Triple = tuple[int, int, int]
Exponents = tuple[float, float, float]


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def log_distance(triple, exponents, d: int) -> float:
    """Squared distance of the sizes from d^exponents, in log space."""
    return sum((math.log(size) - e * math.log(d)) ** 2 for size, e in zip(triple, exponents))


def nearest_triples(d: int, exponents: Exponents, last: int | None = None) -> list[Triple]:
    """All ordered divisor triples of d nearest to d^exponents: several where they tie.

    With `last`, a divisor of d, the third size is given, and the other two share d / last in the ratio of
    their exponents. Raises ValueError, one sentence, where no triple is near: where a size is off its target
    by more than a factor 4, or a prime width should split.
    """
    if last is not None:
        rest = exponents[0] + exponents[1]
        pairs = _nearest(d // last, (exponents[0] / rest, exponents[1] / rest, 0.0))
        return [(i, j, last) for i, j, _ in pairs]
    triples = _nearest(d, exponents)
    if not _is_sensible(triples[0], exponents, d):
        targets = " x ".join(f"{d ** e:.1f}" for e in exponents if e > 0)
        near = " or ".join(map(str, widths_that_factor(d, exponents)))
        hint = f"; a width of {near} would" if near else ""
        raise ValueError(f"{d} does not split into about {targets}{hint}")
    return triples


@functools.lru_cache(maxsize=4096)
def _nearest(d: int, exponents: Exponents) -> list[Triple]:
    parts = divisors(d)
    triples = [(i, j, d // (i * j)) for i in parts for j in parts if d % (i * j) == 0]
    distances = [log_distance(t, exponents, d) for t in triples]
    least = min(distances)
    return [t for t, distance in zip(triples, distances) if distance <= least + 1e-9]


def _is_sensible(triple: Triple, exponents: Exponents, d: int) -> bool:
    if d > 1 and sum(e > 0 for e in exponents) > 1 and len(divisors(d)) == 2:
        return False
    farthest = max(abs(math.log(size) - e * math.log(d)) for size, e in zip(triple, exponents))
    return farthest <= math.log(SENSIBLE) + 1e-9


def widths_that_factor(d: int, exponents: Exponents) -> list[int]:
    """The nearest widths below and above d that factor well, if there are any."""
    def good(width):
        return log_distance(_nearest(width, exponents)[0], exponents, width) <= math.log(GOOD) ** 2
    below = next((width for width in range(d - 1, 3, -1) if good(width)), None)
    above = next((width for width in range(max(d, 3) + 1, 4 * d + 64) if good(width)), None)
    return [width for width in (below, above) if width]
