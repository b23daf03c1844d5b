"""Structured linear layers: every matrix that a two-factor einsum can express, mixtures of experts over them, and DYAD.

A linear map W (d_out x d_in) reads its input as x[γ, β, α] and writes its output as y[φ, ε, δ], first index slowest:

    y[φ, ε, δ] = Σ_{α, β, γ, ρ}  A[γ, α, δ, φ, ρ] · B[γ, β, ε, φ, ρ] · x[γ, β, α]

    legend   α (alpha)    input index that only A sees       δ (delta)    output index that only A makes
             β (beta)     input index that only B sees       ε (epsilon)  output index that only B makes
             γ (gamma)    input index that both see          φ (phi)      output index that both make
             ρ (rho)      inner rank, summed
             T            tokens (rows)                      E, k         experts, experts chosen per token

with α·β·γ = d_in and δ·ε·φ = d_out. The sizes come from exponents θ in [0, 1]^7 that do not depend on the width:
size_α = d_in^θα, ..., size_φ = d_out^θφ, size_ρ = min(d_in, d_out)^θρ. Dense, low-rank, Kronecker, Monarch,
Tensor-Train and Block Tensor-Train matrices are points of this space (STRUCTURES), and one class, Einsum, serves it all.

Source: Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of Structured Matrices"
(NeurIPS 2024, arXiv 2410.02117); DYAD: Chandy et al., arXiv 2312.06881. FLOPs count 2 per multiply-add throughout.

`python structured.py 768 3072` prints every named structure at a width.
"""
import ast
import functools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lib.kernels import einsum, routed_einsum, segment_product


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

# ---- Layers ---------------------------------------------------------------------------------------------------------

def _on_cpu(x: Tensor) -> bool:
    """Whether to take the operators of kernels.py that are made for CPUs."""
    return x.device.type == "cpu"


def _product(x: Tensor, w: Tensor, ends: Tensor | None, columns: bool = False) -> Tensor:
    """y[b] = x[b] @ w[b]^T. x (B, N, K), w (B, M, K) -> (B, N, M); with `ends`, w (E, B, M, K), one expert per row.

    `columns` stores the result as (B, M, N), so that a later sum over M and B reads it without a copy.
    """
    if ends is not None:
        return segment_product(x, w, ends)
    return torch.bmm(w, x.mT).mT if columns else torch.bmm(x, w.mT)


class _NormalizedCore(torch.autograd.Function):
    """gain · M / max(1, rms(M) / std), the rms over the last three dimensions; gain broadcasts to M, or is None.

    By hand, since a dozen small operations each way for each core are a tenth of a small layer's time on a CPU.
    """

    @staticmethod
    def forward(ctx, core, gain, std):
        rms = torch.linalg.vector_norm(core, dim=(-3, -2, -1), keepdim=True) / math.sqrt(math.prod(core.shape[-3:]))
        norm = std / rms.clamp(min=std)
        scale = norm if gain is None else norm * gain
        ctx.save_for_backward(core, rms, norm, scale)
        ctx.std, ctx.gain = std, gain is not None
        return core * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        core, rms, norm, scale = ctx.saved_tensors
        dot = torch.linalg.vecdot(grad.flatten(-3), core.flatten(-3)).view_as(rms)
        # where it is normalized, the part of the gradient along the core vanishes
        along = dot / (rms.clamp(min=ctx.std).square() * math.prod(core.shape[-3:])) * (rms > ctx.std)
        return (grad * scale).addcmul_(along * scale, core, value=-1), dot * norm if ctx.gain else None, None


class Structured(nn.Module):
    """Cores of a structured matrix: their initialization, normalization, gains and bias (paper, section 4).

    cores: {name: (batch, out, in)}, each the right factor of a batched product; with experts, a leading E.
    A core starts normal with std = √min(fan_in, fan_out) / fan_in, the one named `zero_core` at zero. With weight_norm
    a core M acts as M / max(1, rms(M) / std), per expert, times a learned scalar. `normalized`: what follows the layer
    undoes the scale of its output, so that there is no such scalar, and only relative changes count.
    """

    def __init__(self, d_in, d_out, cores, fans, *, num_experts=0, bias=False, weight_norm=False,
                 normalized=False, zero_core=None):
        super().__init__()
        self.d_in, self.d_out, self.num_experts, self.weight_norm = d_in, d_out, num_experts, weight_norm
        self.normalized, self._fans = normalized, dict(fans)
        lead = (num_experts,) if num_experts else ()
        for name, shape in cores.items():
            core = torch.zeros(*lead, *shape)
            if name != zero_core:
                nn.init.normal_(core, std=self.init_std(name))
            self.register_parameter(name, nn.Parameter(core))
            if weight_norm and not normalized:
                self.register_parameter(f"gain_{name}", nn.Parameter(torch.ones(num_experts or 1)))
        self.bias = nn.Parameter(torch.zeros(*lead, d_out)) if bias else None

    def fans(self) -> dict[str, tuple[int, int]]:
        """{parameter name: (fan_in, fan_out)} of each core; of one expert, where there are experts."""
        return dict(self._fans)

    def init_std(self, name: str) -> float:
        fan_in, fan_out = self._fans[name]
        return math.sqrt(min(fan_in, fan_out)) / fan_in

    def lr_multipliers(self, base_width: int) -> dict[str, float]:
        """{parameter name: factor on the learning rate} for Adam: d0 / (cores · fan_in) for a core, else 1.

        Where the output is normalized, times its initial root mean square, Π √(min(fan_in, fan_out) / fan_in) over the
        cores: changes count relative to it, and it falls with the width where fan_in grows faster than fan_out.
        """
        cores = 1 if isinstance(self, Dyad) else len(self._fans)  # DYAD's cores add up, they do not multiply
        size = math.prod(min(i, o) / i for i, o in self._fans.values()) ** (cores / len(self._fans) / 2)
        multipliers = dict.fromkeys(dict(self.named_parameters()), 1.0)
        for name, (fan_in, _) in self._fans.items():
            multipliers[name] = (size if self.normalized else 1.0) * base_width / (cores * fan_in)
        return multipliers

    def core(self, name: str) -> Tensor:
        """The core as it acts, normalized and scaled: (batch, out, in), with experts (E, batch, out, in)."""
        core = getattr(self, name)
        if not self.weight_norm:
            return core
        gain = getattr(self, f"gain_{name}", None)
        if gain is not None:
            gain = gain.view(*core.shape[:-3], 1, 1, 1)
        return _NormalizedCore.apply(core, gain, self.init_std(name))

    def add_bias(self, y: Tensor, ends: Tensor | None) -> Tensor:
        if self.bias is None:
            return y
        if ends is None:
            return y + self.bias.to(y.dtype)
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        return y + self.bias.repeat_interleave(counts, dim=0, output_size=y.shape[0]).to(y.dtype)


class Einsum(Structured):
    """The two-factor einsum at the top of this file, for given sizes.

    forward: x (..., d_in) -> (..., d_out). With experts: x (N, d_in) sorted by expert, ends (E,) -> (N, d_out).
    Below, the letters are those of the contraction: where B goes first, α and β, δ and ε change places.
    First product:  a batch over γ of (Tβ, α) x (α, ρφδ).  Second: a batch over φ of (δT, γρβ) x (γρβ, ε).
    """

    def __init__(self, sizes: Sizes, *, zero_init=False, **kwargs):
        self.sizes, self.order = sizes, sizes.order()
        a, b, g, d, e, f, r = self._contraction()
        cores = {self.order[0]: (g, r * f * d, a)}
        if len(self.order) == 2:
            cores[self.order[1]] = (f, e, g * r * b)
        zero_core = self.order[-1] if zero_init else None
        super().__init__(sizes.d_in, sizes.d_out, cores, sizes.fans(), zero_core=zero_core, **kwargs)

    def _contraction(self) -> Sizes:
        return self.sizes if self.order[0] == "A" else self.sizes.swapped()

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        if len(self.order) == 1 and ends is None:
            return F.linear(x, self.core(self.order[0]).squeeze(0), self.bias)
        a, b, g, d, e, f, r = self._contraction()
        lead, T = x.shape[:-1], x.numel() // self.d_in
        if ends is None and _on_cpu(x):
            y = einsum(x.reshape(T, self.d_in), self.core(self.order[0]), self.core(self.order[1]), self._contraction(),
                       self.order[0] == "B")
            return self.add_bias(y.view(*lead, self.d_out), None)
        x = x.reshape(T, g, b, a) if self.order[0] == "A" else x.reshape(T, g, a, b).mT
        x = x.transpose(0, 1).reshape(g, T * b, a)
        z = _product(x, self.core(self.order[0]), _repeat(ends, b), columns=True)  # (γ, Tβ, ρφδ)
        if len(self.order) == 1:
            return self.add_bias(z.reshape(*lead, self.d_out), ends)
        z = z.view(g, T, b, r, f, d)
        if ends is None:
            z = z.permute(4, 5, 1, 0, 3, 2).reshape(f, d * T, g * r * b)  # no copy where β = 1
            y = _product(z, self.core(self.order[1]), None).view(f, d, T, e).permute(2, 0, 3, 1)
        else:
            z = z.permute(4, 1, 5, 0, 3, 2).reshape(f, T * d, g * r * b)  # the rows of an expert stay together
            y = _product(z, self.core(self.order[1]), _repeat(ends, d)).view(f, T, d, e).permute(1, 0, 3, 2)
        y = y if self.order[0] == "A" else y.mT  # (T, φ, ε, δ)
        return self.add_bias(y.reshape(*lead, self.d_out), ends)

    def mixture(self, x: Tensor, router: Tensor, balance: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """These experts with a router, on a CPU: (y, logits, chosen) as kernels.routed_einsum makes them."""
        y, logits, chosen = routed_einsum(x, router, balance, self.core(self.order[0]), self.core(self.order[1]), top_k,
                                          self._contraction(), self.order[0] == "B")
        if self.bias is not None:
            y = y + (logits.gather(1, chosen).softmax(1)[..., None] * self.bias[chosen]).sum(1).to(y.dtype)
        return y, logits, chosen

    def lr_multipliers(self, base_width: int) -> dict[str, float]:
        """As for every layer, times √(u / u0) for a core whose entries a token uses u times, u0 at the base width.

        Shared parameters (ω > 0): the gradient of a token is a sum of u rank-one terms, one for each place. Adam brings
        the sum to the size of one, so each place moves by 1 / √u of what it would alone, and u = d^t grows with the width.
        """
        multipliers = super().lr_multipliers(base_width)
        for (name, uses), d in zip(self.sizes.uses().items(), (self.d_in, self.d_out)):
            if uses > 1:  # u / u0 = (d / d0)^t
                multipliers[name] *= (d / base_width) ** (math.log(uses, d) / 2)
        return multipliers

    def cores(self) -> tuple[Tensor, Tensor]:
        """A[γ, α, δ, φ, ρ] and B[γ, β, ε, φ, ρ] as they act; with experts, a leading E. A left-out core is a one."""
        a, b, g, d, e, f, r = self._contraction()
        first = self.core(self.order[0])
        lead, n = first.shape[:-3], first.dim() - 3
        def order(*dims):
            return [*range(n), *(n + i for i in dims)]
        first = first.reshape(*lead, g, r, f, d, a).permute(order(0, 4, 3, 2, 1))
        if len(self.order) == 2:
            second = self.core(self.order[1]).reshape(*lead, f, e, g, r, b).permute(order(2, 4, 1, 0, 3))
        else:
            second = first.new_ones(*lead, 1, 1, 1, 1, 1)
        return (first, second) if self.order[0] == "A" else (second, first)

    def to_dense(self) -> Tensor:
        """The matrix that the layer applies: (d_out, d_in); with experts, (E, d_out, d_in)."""
        W = torch.einsum("...gadfr,...gbefr->...fedgba", *self.cores())
        return W.reshape(*W.shape[:-6], self.d_out, self.d_in)

    def flops_per_token(self) -> int:
        """Forward FLOPs per row."""
        return self.sizes.flops()

    def extra_repr(self) -> str:
        return f"{self.d_in} -> {self.d_out}, {self.sizes}" + (f", {self.num_experts} experts" * bool(self.num_experts))


def _repeat(ends: Tensor | None, times: int) -> Tensor | None:
    """Ends of the segments when every row becomes `times` rows."""
    return ends if ends is None or times == 1 else ends * times


class Dyad(Structured):
    """DYAD (arXiv 2312.06881): the sum of a block-diagonal and a permuted block-diagonal matrix, D blocks each.

    With i = d_in / D, o = d_out / D, and wl, wu of shape (D, o, i):
        it: y[b·o + p] = Σ_j wl[b, p, j] · x[b·i + j] + wu[b, p, j] · x[j·D + b]
        ot: the second term lands on y[p·D + b] and reads x[b·i + j];   dt: lands on y[p·D + b], reads x[j·D + b].
    Each output sums 2i products and each input feeds 2o: those are the fans.
    Raises ValueError where D does not divide both widths.
    """

    def __init__(self, d_in, d_out, blocks, variant, *, zero_init=False, **kwargs):
        if variant not in DYAD_VARIANTS:
            raise ValueError(f"dyad_variant must be one of {', '.join(DYAD_VARIANTS)}; got {variant!r}")
        if blocks < 1 or d_in % blocks or d_out % blocks:
            raise ValueError(f"dyad_blocks = {blocks} must divide both widths of {d_in} -> {d_out}")
        self.blocks, self.variant = blocks, variant
        shape, fans = (blocks, d_out // blocks, d_in // blocks), (2 * d_in // blocks, 2 * d_out // blocks)
        super().__init__(d_in, d_out, dict(wl=shape, wu=shape), dict(wl=fans, wu=fans), **kwargs)
        if zero_init:  # both terms end the branch
            nn.init.zeros_(self.wl)
            nn.init.zeros_(self.wu)

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        D, lead, T = self.blocks, x.shape[:-1], x.numel() // self.d_in
        blocked = x.reshape(T, D, self.d_in // D).transpose(0, 1)  # (D, T, i), x[b·i + j]
        strided = x.reshape(T, self.d_in // D, D).permute(2, 0, 1)  # (D, T, i), x[j·D + b]
        lower = _product(blocked, self.core("wl"), ends)  # (D, T, o)
        upper = _product(blocked if self.variant == "ot" else strided, self.core("wu"), ends)
        if self.variant == "it":
            y = (lower + upper).transpose(0, 1).reshape(T, self.d_out)
        else:
            y = lower.transpose(0, 1).reshape(T, self.d_out) + upper.permute(1, 2, 0).reshape(T, self.d_out)
        return self.add_bias(y.view(*lead, self.d_out), ends)

    def to_dense(self) -> Tensor:
        """The matrix that the layer applies: (d_out, d_in); with experts, (E, d_out, d_in)."""
        D, wl, wu = self.blocks, self.core("wl"), self.core("wu")
        o, i = wl.shape[-2:]
        b, p, j = (n.to(wl.device) for n in torch.meshgrid(*map(torch.arange, (D, o, i)), indexing="ij"))
        W = wl.new_zeros(*wl.shape[:-3], self.d_out, self.d_in)
        W[..., b * o + p, b * i + j] += wl
        rows = b * o + p if self.variant == "it" else p * D + b
        cols = b * i + j if self.variant == "ot" else j * D + b
        W[..., rows, cols] += wu
        return W

    def flops_per_token(self) -> int:
        """Forward FLOPs per row."""
        return 4 * self.d_in * self.d_out // self.blocks

    def extra_repr(self) -> str:
        return f"{self.d_in} -> {self.d_out}, {self.variant}, {self.blocks} blocks"


# ---- Mixture of experts ---------------------------------------------------------------------------------------------

class Aux(NamedTuple):
    """What a router reports of one batch."""
    switch: Tensor  # () load balance: E · Σ_e (mean probability of e) · (share of assignments to e); 1 when balanced
    z: Tensor       # () mean over tokens of logsumexp(logits)²
    load: Tensor    # (E,) share of assignments to each expert, without gradient
    variance: Tensor  # () mean over tokens of the variance of a token's logits, without gradient

    def loss(self) -> Tensor:
        return self.switch + 0.1 * self.z


class _Dispatch(torch.autograd.Function):
    """Rows of x (T, d), one for each of k assignments per token, in the order of their experts -> (T·k, d).

    `order` lists the assignments (token · k + choice) by expert, `place` (T, k) is its inverse. The gradient is a gather too:
    a token's k rows are read back and summed, which is deterministic and cheaper than scattered additions.
    """

    @staticmethod
    def forward(ctx, x, order, place):
        ctx.save_for_backward(place)
        return x.index_select(0, order // place.shape[1])

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return F.embedding_bag(place, grad, mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """Rows y (T·k, d) in the order of experts and gates (T, k) -> Σ_k gate · row, (T, d)."""

    @staticmethod
    def forward(ctx, y, gates, order, place):
        gates = gates.to(y.dtype)
        ctx.save_for_backward(y, gates, order)
        return F.embedding_bag(place.view(gates.shape), y, per_sample_weights=gates, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        y, gates, order = ctx.saved_tensors
        rows = grad.index_select(0, order // gates.shape[1])
        dgates = torch.empty_like(gates).view(-1).index_copy_(0, order, (rows * y).sum(1)).view(gates.shape)
        return rows * gates.flatten()[order, None], dgates, None, None


class _RouterLosses(torch.autograd.Function):
    """logits (T, E), load (E,) -> the switch and z losses of Aux. By hand, since step by step they and their gradients took
    a tenth of a small layer's time on a CPU."""

    @staticmethod
    def forward(ctx, logits, load):
        z = logits.logsumexp(dim=1, keepdim=True)
        p = (logits - z).exp()
        ctx.save_for_backward(p, z, load)
        return load.numel() * (p.mean(0) @ load), z.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dswitch, dz):
        p, z, load = ctx.saved_tensors
        v = load * (dswitch * (load.numel() / max(1, len(p))))
        return p * (z * (dz * (2 / max(1, len(p)))) - (p @ v)[:, None] + v), None


class MoE(nn.Module):
    """Sparse mixture of experts: y = Σ_{e in top-k} g_e · expert_e(x), g the softmax over the k chosen logits x·W_g.

    `experts(rows, ends)` maps rows sorted by expert, (T·k, d_in) -> (T·k, d_out): one Einsum with experts makes a
    structured MoE of a single projection; a whole MLP of such layers makes the standard MoE. Only the chosen experts
    are computed, and no token is dropped. The router works in float32.

    The experts are chosen by x·W_g + balance, while the gates are those of the logits alone: a bias of each expert, no
    parameter but a buffer, that `rebalance` moves against its load (Wang et al., arXiv 2408.15664).
    """

    def __init__(self, d_in: int, experts: nn.Module, num_experts: int, top_k: int):
        super().__init__()
        if num_experts < 2:
            raise ValueError(f"a mixture needs at least 2 experts; got {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and the number of experts ({num_experts}); got {top_k}")
        self.d_in, self.num_experts, self.top_k = d_in, num_experts, top_k
        self.experts = experts
        # random, since a zero router ties all logits and sends every token to the same experts; rows that sum to zero
        # do not see the mean of x, which is the same for all tokens
        router = torch.randn(num_experts, d_in)
        router -= router.mean(dim=1, keepdim=True)
        self.router = nn.Parameter(router * math.sqrt(min(d_in, num_experts)) / d_in)  # (E, d_in)
        self.register_buffer("balance", torch.zeros(num_experts))  # (E,)

    def forward(self, x: Tensor, return_aux: bool = False):
        """x (..., d_in) -> y (..., d_out), or (y, Aux)."""
        rows = x.reshape(-1, self.d_in)  # (T, d_in)
        if _on_cpu(x) and isinstance(self.experts, Einsum) and len(self.experts.order) == 2:
            router = self.router.to(torch.promote_types(self.router.dtype, torch.float32))
            y, logits, chosen = self.experts.mixture(rows, router, self.balance, self.top_k)
        else:
            y, logits, chosen = self._dispatch(rows)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return (y, self._aux(logits, chosen)) if return_aux else y

    def _dispatch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, d_in) -> y (T, d_out), logits (T, E), chosen (T, k): assignments sorted by expert, rows gathered and combined."""
        with torch.autocast(x.device.type, enabled=False):
            precision = torch.promote_types(self.router.dtype, torch.float32)
            logits = F.linear(x.to(precision), self.router.to(precision))  # (T, E)
        chosen = (logits.detach() + self.balance).topk(self.top_k).indices  # (T, k)
        # the chosen logits; not by gather: fused with the auxiliary losses, its gradient is wrong in compiled code (torch 2.13)
        gates = (F.one_hot(chosen, self.num_experts) * logits[:, None]).sum(2).softmax(dim=-1)
        order = chosen.flatten().argsort(stable=True)  # assignments by expert
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        y = self.experts(_Dispatch.apply(x, order, place.view(chosen.shape)), self._counts(chosen).cumsum(0))
        return _Combine.apply(y, gates, order, place), logits, chosen

    def _counts(self, chosen: Tensor) -> Tensor:
        """Assignments to each expert: (E,)."""
        return F.one_hot(chosen, self.num_experts).sum((0, 1))

    def _aux(self, logits: Tensor, chosen: Tensor) -> Aux:
        load = self._counts(chosen).to(logits.dtype) / chosen.numel()
        switch, z = _RouterLosses.apply(logits, load)
        variance = (logits.detach() - logits.detach().mean(dim=1, keepdim=True)).square().mean()
        return Aux(switch, z, load, variance)

    @torch.no_grad()
    def rebalance(self, load: Tensor, variance: Tensor, rate: float) -> None:
        """Adds rate · √variance · (1 - E · load) to the experts' biases: load (E,) and variance () are those of an Aux,
        or means of such over batches."""
        self.balance += torch.nan_to_num(rate * variance.sqrt() * (1 - self.num_experts * load), 0, 0, 0)

    def fans(self) -> dict[str, tuple[int, int]]:
        """{parameter name: (fan_in, fan_out)} of the router and of one expert's cores."""
        fans = {"router": (self.d_in, self.num_experts)}
        for prefix, module in self.experts.named_modules(prefix="experts"):
            if isinstance(module, Structured):
                fans |= {f"{prefix}.{name}": fan for name, fan in module.fans().items()}
        return fans

    def lr_multipliers(self, base_width: int) -> dict[str, float]:
        """The factor on the learning rate of the router; the experts answer for themselves."""
        return {"router": base_width / self.d_in}

    def flops_per_token(self) -> int:
        """Active forward FLOPs per token: the router and top_k experts."""
        return 2 * self.d_in * self.num_experts + self.top_k * self.experts.flops_per_token()

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, top {self.top_k}"


# ---- The one way to make a layer ------------------------------------------------------------------------------------

def layer_sizes(struct: str, d_in: int, d_out: int, *, rank=None, theta=None, gamma=None, phi=None,
                num_experts=0) -> Sizes:
    """Sizes of a named structure (any but dyad) between two widths; of one expert, where there are experts.

    Raises ValueError, in one sentence, for an unknown name, a rank that the structure does not have, a theta that is
    missing or not wanted, widths that do not factor, and a γ or φ that cannot be fixed.
    """
    if struct not in STRUCTURES:
        raise ValueError(f"struct must be one of {', '.join(STRUCTURES)}; got {struct!r}")
    if (struct == "einsum") != (theta is not None):
        raise ValueError("struct 'einsum' needs theta, seven exponents" if theta is None
                         else f"theta belongs to struct 'einsum'; {struct!r} has its own")
    theta = STRUCTURES[struct] if theta is None else Theta.parse(theta)
    if rank is not None and struct in ("dense", "kronecker", "monarch") and rank != 1:
        with_rank = dict(dense="low_rank", kronecker="tt", monarch="btt")[struct]
        raise ValueError(f"struct {struct!r} has no rank to set (got {rank}); {with_rank!r} has one")
    if rank is None and num_experts and struct == "low_rank":
        rank = max(1, min(d_in, d_out) // num_experts)  # together, the experts have full rank
    elif rank is None and num_experts and struct != "einsum":
        rank = 1
    return theta.sizes(d_in, d_out, rank, gamma=gamma, phi=phi)


def linear(struct: str, d_in: int, d_out: int, *, bias: bool = False, rank: int | None = None, theta=None,
           sizes=None, gamma: int | None = None, phi: int | None = None, num_experts: int = 0, top_k: int = 2,
           weight_norm: bool | None = None, normalized: bool = False, zero_init: bool = False, dyad_blocks: int = 4,
           dyad_variant: str = "it") -> nn.Module:
    """A linear layer, x (..., d_in) -> (..., d_out), whose matrix has the named structure.

    struct        a name in STRUCTURES
    rank          ρ; None: the structure's own, or 1 per expert (low_rank: d / E, einsum: θ's own)
    theta         seven exponents (a tuple, a Theta, or text), for struct 'einsum' alone
    sizes         the seven integer sizes themselves, instead of rank and theta
    gamma, phi    the size of γ or φ, where θ leaves it open: the number of heads that the input or output consists of
    num_experts   0, or E experts of the structure with a router, top_k of them per token
    weight_norm   normalize the cores, with a learned scalar each; None: for every structure but dense
    normalized    a norm follows: no learned scalars, and learning rates relative to the initial scale of the output
    zero_init     start the last core at zero, for a projection that ends a residual branch
    dyad_blocks, dyad_variant   D and 'it', 'ot' or 'dt', for struct 'dyad' alone

    Raises ValueError, in one sentence, for whatever cannot be made.
    """
    layer = unrouted(struct, d_in, d_out, bias=bias, rank=rank, theta=theta, sizes=sizes, gamma=gamma, phi=phi,
                     num_experts=num_experts, weight_norm=weight_norm, normalized=normalized, zero_init=zero_init,
                     dyad_blocks=dyad_blocks, dyad_variant=dyad_variant)
    return MoE(d_in, layer, num_experts, top_k) if num_experts else layer


def unrouted(struct, d_in, d_out, *, rank=None, theta=None, sizes=None, gamma=None, phi=None, num_experts=0,
             weight_norm=None, dyad_blocks=4, dyad_variant="it", **options) -> Structured:
    """The layer of linear() without a router: with experts it maps rows sorted by expert, as MoE hands them over."""
    options |= dict(num_experts=num_experts, weight_norm=struct != "dense" if weight_norm is None else weight_norm)
    if struct == "dyad":
        if (rank, theta, sizes, gamma, phi) != (None,) * 5:
            raise ValueError("struct 'dyad' takes dyad_blocks and dyad_variant, not rank, theta, sizes, gamma or phi")
        return Dyad(d_in, d_out, dyad_blocks, dyad_variant, **options)
    if sizes is not None:
        return Einsum(_explicit_sizes(sizes, d_in, d_out, (rank, theta, gamma, phi)), **options)
    return Einsum(layer_sizes(struct, d_in, d_out, rank=rank, theta=theta, gamma=gamma, phi=phi, num_experts=num_experts),
                  **options)


def _explicit_sizes(sizes, d_in: int, d_out: int, others: tuple) -> Sizes:
    sizes = tuple(sizes)
    if len(sizes) != 7 or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ValueError(f"sizes must be seven positive integers ({', '.join(Sizes._fields)}); got {sizes}")
    if others != (None,) * len(others):
        raise ValueError("sizes already say the rank and the structure: give no rank, theta, gamma or phi with them")
    sizes = Sizes(*sizes)
    if (sizes.d_in, sizes.d_out) != (d_in, d_out):
        raise ValueError(f"sizes {tuple(sizes)} make a map {sizes.d_in} -> {sizes.d_out}, not {d_in} -> {d_out}")
    return sizes


def table(d_in: int, d_out: int, base_width: int = 128) -> str:
    """Markdown table of every named structure at a width: the README's table is this output."""
    dense = d_in * d_out
    lines = ["| structure | θ (α β γ δ ε φ ρ) | sizes | parameters | of dense | FLOPs/token | of dense | ψ | ν | ω "
             "| init std · lr × per core |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, theta in STRUCTURES.items():
        if name == "einsum":
            continue
        try:
            layer = linear(name, d_in, d_out)
        except ValueError as e:
            lines.append(f"| {name} | {e} |" + " |" * 9)
            continue
        params = sum(p.numel() for n, p in layer.named_parameters() if n in layer.fans())
        flops, lr = layer.flops_per_token(), layer.lr_multipliers(base_width)
        cores = ", ".join(f"{n}: {layer.init_std(n):.3g} · {lr[n]:.3g}" for n in layer.fans())
        exponents = " ".join(f"{e:g}" for e in theta) if theta else "not an einsum"
        taxonomy = f"{theta.psi:g} | {theta.nu:g} | {theta.omega:g}" if theta else "1 | 1 | 0"
        sizes = layer.sizes if theta else f"{layer.blocks} blocks"
        lines.append(f"| {name} | {exponents} | {sizes} | {params:,} | {params / dense:.3f} | {flops:,} "
                     f"| {flops / (2 * dense):.3f} | {taxonomy} | {cores} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys
    try:
        widths = [int(v) for v in sys.argv[1:]]
        assert 1 <= len(widths) <= 2 and min(widths) > 0
    except (ValueError, AssertionError):
        sys.exit("usage: python structured.py D_IN [D_OUT], two positive widths")
    print(table(widths[0], widths[-1]))
