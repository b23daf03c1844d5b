"""The space of structures: exponents θ, the integer sizes that they give two widths, and what they cost.

The legend of the letters is at the top of structured.py.
"""
import ast
import functools
import math
from typing import NamedTuple


class Sizes(NamedTuple):
    """Integer sizes of the seven indices."""
    alpha: int
    beta: int
    gamma: int
    delta: int
    epsilon: int
    phi: int
    rho: int

    @property
    def d_in(self) -> int:
        return self.alpha * self.beta * self.gamma

    @property
    def d_out(self) -> int:
        return self.delta * self.epsilon * self.phi

    def core_sizes(self) -> dict[str, int]:
        """Entries of each core. A core of one entry is a scalar that the other absorbs: it is left out."""
        a, b, g, d, e, f, r = self
        cores = {"A": g * a * d * f * r, "B": g * b * e * f * r}
        return {name: n for name, n in cores.items() if n > 1} or {"A": 1}

    def order(self) -> tuple[str, ...]:
        """Cores in the order of contraction: the cheaper of the two orders, A first where they tie."""
        names = self.core_sizes()
        if len(names) == 1:
            return tuple(names)
        return min((("A", "B"), ("B", "A")), key=self._multiply_adds)

    def _multiply_adds(self, order) -> int:
        """Multiply-adds per token when the cores are contracted in this order."""
        a, b, g, d, e, f, r = self if order[0] == "A" else self.swapped()
        if len(order) == 1:
            return g * a * d * f * r * b
        return g * b * a * d * f * r + d * f * b * g * r * e

    def swapped(self) -> "Sizes":
        """The same function class with the roles of A and B exchanged."""
        a, b, g, d, e, f, r = self
        return Sizes(b, a, g, e, d, f, r)

    def fans(self) -> dict[str, tuple[int, int]]:
        """(fan_in, fan_out) of each core: those of the matrix product that it takes part in."""
        order = self.order()
        a, b, g, d, e, f, r = self if order[0] == "A" else self.swapped()
        fans = {order[0]: (a, d * f * r)}
        if len(order) == 2:
            fans[order[1]] = (b * g * r, e)
        return fans

    def uses(self) -> dict[str, int]:
        """How often one token uses each entry of a core: the rows per token of the product that it takes part in."""
        order = self.order()
        sizes = self if order[0] == "A" else self.swapped()
        return dict(zip(order, (sizes.beta, sizes.delta)))

    def params(self) -> int:
        return sum(self.core_sizes().values())

    def flops(self) -> int:
        """Forward FLOPs per token in the cheaper order."""
        return 2 * self._multiply_adds(self.order())

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in zip("αβγδεφρ", self) if size > 1) or "scalar"


class Theta(NamedTuple("Theta", [(name, float) for name in Sizes._fields])):
    """Exponents of the seven indices: a structure, whatever its width.

    Raises ValueError unless all are in [0, 1], θα + θβ + θγ = 1 and θδ + θε + θφ = 1.
    ω, ψ, ν are exact in the exponents at d_in = d_out (paper, section 3).
    """
    __slots__ = ()

    def __new__(cls, alpha, beta, gamma, delta, epsilon, phi, rho):
        theta = super().__new__(cls, *(float(v) for v in (alpha, beta, gamma, delta, epsilon, phi, rho)))
        for name, value in zip(cls._fields, theta):
            if not 0 <= value <= 1:
                raise ValueError(f"theta: {name} = {value:g} is outside [0, 1]")
        for names, total in (("alpha + beta + gamma", sum(theta[:3])), ("delta + epsilon + phi", sum(theta[3:6]))):
            if abs(total - 1) > 1e-6:
                raise ValueError(f"theta: {names} = {total:g}, but it must be 1")
        return theta

    @classmethod
    def parse(cls, value) -> "Theta":
        """A Theta from a Theta, seven numbers, or their text, '0.5, 0, 0.5, 0, 0.5, 0.5, 0'. Raises ValueError."""
        try:
            numbers = ast.literal_eval(value) if isinstance(value, str) else value
            numbers = [float(n) for n in numbers]
        except (ValueError, TypeError, SyntaxError):
            numbers = []
        if len(numbers) != 7:
            raise ValueError(f"theta must be seven numbers ({', '.join(cls._fields)}); got {value!r}")
        return cls(*numbers)

    @property
    def flops_exponent(self) -> float:
        """f, where FLOPs per token grow as d^f."""
        a, b, g, d, e, f, r = self
        return 2 + r - max(min(a, e), min(b, d))

    @property
    def params_exponent(self) -> float:
        """n, where parameters grow as d^n."""
        a, b, g, d, e, f, r = self
        return 2 + r - min(b + e, a + d)

    @property
    def omega(self) -> float:
        """Parameter sharing, f - n: 0 where every parameter is used once per token."""
        return self.flops_exponent - self.params_exponent

    @property
    def psi(self) -> float:
        """Rank: rank(W) grows as d^ψ for generic cores."""
        a, b, g, d, e, f, r = self
        return min(1.0, 2 + r - a - e, 2 + r - b - d)

    @property
    def nu(self) -> float:
        """Compute intensity, f - 1: FLOPs per token and dimension grow as d^ν."""
        return self.flops_exponent - 1

    def sizes(self, d_in: int, d_out: int, rank: int | None = None, *, gamma: int | None = None,
              phi: int | None = None) -> Sizes:
        """Integer sizes that multiply out to the widths exactly: the divisor triples nearest to d^θ in log space, ties
        broken towards fewer FLOPs, then fewer parameters. `rank` overrides ρ = min(d_in, d_out)^θρ, rounded; `gamma`
        and `phi` fix the size of their index, and α and β, or δ and ε, share the rest of the width.

        Raises ValueError where a width is not positive, has no factorization near the targets, or the rank is not
        within 1 ... min(d_in, d_out), and where a fixed index has no exponent or does not divide its width.
        """
        for name, d in (("d_in", d_in), ("d_out", d_out)):
            if d < 1:
                raise ValueError(f"{name} must be at least 1; got {d}")
        if rank is None:
            rank = max(1, round(min(d_in, d_out) ** self.rho))
        if not 1 <= rank <= min(d_in, d_out):
            raise ValueError(f"rank must be between 1 and {min(d_in, d_out)} for {d_in} -> {d_out}; got {rank}")
        for name, fixed, d, exponents in (("gamma", gamma, d_in, self[:3]), ("phi", phi, d_out, self[3:6])):
            if fixed is not None and not (exponents[2] > 0 and exponents[0] + exponents[1] > 0):
                raise ValueError(f"{name} cannot be fixed at {fixed}: a structure whose θ has {name} = {exponents[2]:g} "
                                 "leaves no choice, one like btt or monarch does")
            if fixed is not None and (fixed < 1 or d % fixed):
                raise ValueError(f"{name} = {fixed} must divide the width {d}")
        return _nearest_sizes(self, d_in, d_out, rank, gamma, phi)


def _divisors(n: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def _log_distance(triple, exponents, d: int) -> float:
    return sum((math.log(size) - exponent * math.log(d)) ** 2 for size, exponent in zip(triple, exponents))


@functools.lru_cache(maxsize=4096)
def _nearest_triples(d: int, exponents) -> list[tuple[int, int, int]]:
    """All ordered divisor triples of d at the least distance from d^exponents in log space."""
    divisors = _divisors(d)
    triples = [(i, j, d // (i * j)) for i in divisors for j in divisors if d % (i * j) == 0]
    distances = [_log_distance(t, exponents, d) for t in triples]
    least = min(distances)
    return [t for t, distance in zip(triples, distances) if distance <= least + 1e-9]


def _is_sensible(triple, exponents, d: int) -> bool:
    """Every size within a factor 4 of its target; a prime width cannot be split at all."""
    if d > 1 and sum(e > 0 for e in exponents) > 1 and len(_divisors(d)) == 2:
        return False
    return all(abs(math.log(size) - e * math.log(d)) <= math.log(4) + 1e-9 for size, e in zip(triple, exponents))


def _nearest_triples_with(last: int, d: int, exponents) -> list[tuple[int, int, int]]:
    """The same with the last size given: the other two share what is left in the ratio of their exponents."""
    rest = exponents[0] + exponents[1]
    return [(i, j, last) for i, j, _ in _nearest_triples(d // last, (exponents[0] / rest, exponents[1] / rest, 0))]


@functools.lru_cache(maxsize=4096)
def _nearest_sizes(theta: Theta, d_in: int, d_out: int, rank: int, gamma: int | None, phi: int | None) -> Sizes:
    ins, outs = (_nearest_triples(d, exponents) if fixed is None else _nearest_triples_with(fixed, d, exponents)
                 for fixed, d, exponents in ((gamma, d_in, theta[:3]), (phi, d_out, theta[3:6])))
    for fixed, d, triples, exponents in ((gamma, d_in, ins, theta[:3]), (phi, d_out, outs, theta[3:6])):
        if fixed is None and not _is_sensible(triples[0], exponents, d):
            targets = " x ".join(f"{d ** e:.1f}" for e in exponents if e > 0)
            near = " or ".join(str(w) for w in _widths_that_factor(d, exponents))
            raise ValueError(f"the map {d_in} -> {d_out} has no sensible factorization: {d} does not split into about "
                             f"{targets}; a width of {near} would, and dense and low_rank take any width")
    candidates = [Sizes(*i, *o, rank) for i in ins for o in outs]
    return min(candidates, key=lambda s: (s.flops(), s.params(), s))


def _widths_that_factor(d: int, exponents) -> list[int]:
    """The nearest widths below and above d whose sizes come within a factor 1.5 of their targets."""
    def good(w):
        return _log_distance(_nearest_triples(w, exponents)[0], exponents, w) <= math.log(1.5) ** 2
    below = next((w for w in range(d - 1, 3, -1) if good(w)), None)
    above = next(w for w in range(max(d, 3) + 1, 4 * d + 64) if good(w))
    return [w for w in (below, above) if w]


# Structures by name. Where θρ > 0 the rank can be set; 'einsum' takes its θ from the caller; 'dyad' is no einsum.
STRUCTURES: dict[str, Theta | None] = {
    "dense":     Theta(1, 0, 0, 1, 0, 0, 0),
    "low_rank":  Theta(1, 0, 0, 0, 1, 0, 1 / 2),
    "kronecker": Theta(1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 0, 0),
    "monarch":   Theta(1 / 2, 0, 1 / 2, 0, 1 / 2, 1 / 2, 0),
    "tt":        Theta(1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 0, 1 / 4),
    "btt":       Theta(1 / 2, 0, 1 / 2, 0, 1 / 2, 1 / 2, 1 / 4),
    "einsum":    None,
    "dyad":      None,
}
DYAD_VARIANTS = ("it", "ot", "dt")
