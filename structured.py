"""Structured linear layers: every matrix of a two-factor einsum, DYAD, and mixtures of experts over them.

A linear map W (d_out x d_in) reads its input as x[γ, β, α] and writes y[φ, ε, δ], first index slowest:

    y[φ, ε, δ] = Σ_{α, β, γ, ρ}  A[γ, α, δ, φ, ρ] · B[γ, β, ε, φ, ρ] · x[γ, β, α]

with α·β·γ = d_in and δ·ε·φ = d_out. In code each index, and its size, is one ASCII letter:

    a  α alpha    input index of A alone            d  δ delta    output index of A alone
    b  β beta     input index of B alone            e  ε epsilon  output index of B alone
    g  γ gamma    input index of both cores         f  φ phi      output index of both cores
    r  ρ rho      inner rank, summed over

T is the number of rows (tokens), E that of experts, k of them chosen per token. The sizes come from exponents
θ in [0, 1]^7 that do not depend on the width: size_α = d_in^θα, ..., size_φ = d_out^θφ, size_ρ = min(d_in,
d_out)^θρ. Dense, low-rank, Kronecker, Monarch, Tensor-Train and Block Tensor-Train matrices are points of
this space (STRUCTURES), and one class, Einsum, serves it all.

Source: Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of Structured
Matrices" (NeurIPS 2024, arXiv 2410.02117); DYAD: Chandy et al., arXiv 2312.06881. FLOPs count 2 per
multiply-add throughout.
"""
import dataclasses
import functools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lib import factorize, kernels

# ---- θ: a structure, whatever its width --------------------------------------------------------------------

INDICES = ("alpha", "beta", "gamma", "delta", "epsilon", "phi", "rho")


class Theta(NamedTuple("Theta", [(name, float) for name in INDICES])):
    """Exponents of the seven indices; they give ω, ψ and ν, exactly where d_in = d_out (paper, section 3).

    Raises ValueError unless all are in [0, 1], θα + θβ + θγ = 1 and θδ + θε + θφ = 1.
    """
    __slots__ = ()

    def __new__(cls, alpha, beta, gamma, delta, epsilon, phi, rho):
        theta = super().__new__(cls, *(float(v) for v in (alpha, beta, gamma, delta, epsilon, phi, rho)))
        for name, value in zip(INDICES, theta):
            if not 0 <= value <= 1:
                raise ValueError(f"theta: {name} = {value:g} is outside [0, 1]")
        for names, exponents in (("alpha + beta + gamma", theta[:3]), ("delta + epsilon + phi", theta[3:6])):
            if abs(sum(exponents) - 1) > 1e-6:
                raise ValueError(f"theta: {names} = {sum(exponents):g}, but it must be 1")
        return theta

    @classmethod
    def parse(cls, value) -> "Theta":
        """A Theta from seven numbers in any sequence. Raises ValueError."""
        try:
            numbers = [] if isinstance(value, str) else [float(n) for n in value]
        except (ValueError, TypeError):
            numbers = []
        if len(numbers) != 7:
            raise ValueError(f"theta must be seven numbers ({', '.join(INDICES)}); got {value!r}")
        return cls(*numbers)

    @property
    def flops_exponent(self) -> float:
        """Exponent of the FLOPs per token in the width."""
        a, b, g, d, e, f, r = self
        return 2 + r - max(min(a, e), min(b, d))

    @property
    def params_exponent(self) -> float:
        """Exponent of the number of parameters in the width."""
        a, b, g, d, e, f, r = self
        return 2 + r - min(b + e, a + d)

    @property
    def omega(self) -> float:
        """ω, parameter sharing: FLOPs per parameter grow as d^ω; at 0 a token uses each parameter once."""
        return self.flops_exponent - self.params_exponent

    @property
    def psi(self) -> float:
        """ψ, rank: rank(W) grows as d^ψ for generic cores."""
        a, b, g, d, e, f, r = self
        return min(1.0, 2 + r - a - e, 2 + r - b - d)

    @property
    def nu(self) -> float:
        """ν, compute intensity: FLOPs per token and dimension grow as d^ν."""
        return self.flops_exponent - 1

    def sizes(self, d_in: int, d_out: int, rank: int | None = None, *, gamma: int | None = None,
              phi: int | None = None, summed: float = 1) -> "Sizes":
        """Integer sizes that multiply out to the widths exactly: the divisor triples nearest to d^θ in log
        space; ties go to the greatest rank of a sum of `summed` such matrices, then to the fewest FLOPs, then
        the fewest parameters. `rank` overrides ρ; `gamma` and `phi` fix the size of their index, and the
        other two share the rest of the width.

        Raises ValueError where a width is not positive or does not factor near the targets, where the rank is
        not in 1 ... min(d_in, d_out), and where a fixed index has no exponent or does not divide its width.
        """
        if (least := min(d_in, d_out)) < 1:
            raise ValueError(f"widths must be at least 1; got {d_in} -> {d_out}")
        if rank is None:
            rank = max(1, round(least ** self.rho))
        if not 1 <= rank <= least:
            raise ValueError(f"rank must be between 1 and {least} for {d_in} -> {d_out}; got {rank}")
        return _nearest_sizes(self, d_in, d_out, rank, gamma, phi, summed)


# ρ = 1 in dense, kronecker and monarch; 'einsum' takes its θ from the caller, and 'dyad' has none
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

# ---- Sizes: a structure between two widths -----------------------------------------------------------------

class Sizes(NamedTuple("Sizes", [(name, int) for name in INDICES])):
    """Integer sizes of the seven indices."""
    __slots__ = ()

    d_in = property(lambda self: self.alpha * self.beta * self.gamma)
    d_out = property(lambda self: self.delta * self.epsilon * self.phi)

    def core_sizes(self) -> dict[str, int]:
        """Entries of each core. A core of one entry is a scalar that the other absorbs: it is left out."""
        a, b, g, d, e, f, r = self
        cores = {"A": g * a * d * f * r, "B": g * b * e * f * r}
        return {name: n for name, n in cores.items() if n > 1} or {"A": 1}

    def order(self) -> tuple[str, ...]:
        """Cores in the order of contraction: the cheaper of the two orders, A first in a tie."""
        names = self.core_sizes()
        if len(names) == 1:
            return tuple(names)
        return ("A", "B") if self._multiply_adds() <= self.swapped()._multiply_adds() else ("B", "A")

    def swapped(self) -> "Sizes":
        """The sizes with A and B exchanged; the axes of x and of y change places too."""
        a, b, g, d, e, f, r = self
        return Sizes(b, a, g, e, d, f, r)

    def contraction(self) -> "Sizes":
        """The sizes as the two products see them: swapped where B is the first core."""
        return self if self.order()[0] == "A" else self.swapped()

    def fans(self) -> dict[str, tuple[int, int]]:
        """(fan_in, fan_out) of each core: those of the matrix product that it takes part in."""
        a, b, g, d, e, f, r = self.contraction()
        return dict(zip(self.order(), [(a, d * f * r), (b * g * r, e)]))

    def uses(self) -> dict[str, int]:
        """How often one token uses each entry of a core: the rows per token of its product."""
        sizes = self.contraction()
        return dict(zip(self.order(), (sizes.beta, sizes.delta)))

    def params(self) -> int:
        return sum(self.core_sizes().values())

    def rank(self) -> int:
        """The rank of W with generic cores: at most the widths, and what the indices between A and B pass."""
        a, b, g, d, e, f, r = self
        return min(self.d_in, self.d_out, b * g * d * f * r, a * g * e * f * r)

    def flops(self) -> int:
        """Forward FLOPs per token in the cheaper order."""
        return 2 * self.contraction()._multiply_adds()

    def _multiply_adds(self) -> int:
        """Multiply-adds per token where A goes first."""
        a, b, g, d, e, f, r = self
        first, second = g * b * a * d * f * r, d * f * b * g * r * e
        return first + second if len(self.core_sizes()) == 2 else first

    def __str__(self) -> str:
        return " ".join(f"{letter}{size}" for letter, size in zip("αβγδεφρ", self) if size > 1) or "scalar"


@functools.lru_cache(maxsize=4096)
def _nearest_sizes(theta: Theta, d_in: int, d_out: int, rank: int, gamma, phi, summed) -> Sizes:
    """The cached body of Theta.sizes; the widths and the rank are checked."""
    for name, fixed, exponent, width in (("gamma", gamma, theta.gamma, d_in), ("phi", phi, theta.phi, d_out)):
        if fixed is not None and not 0 < exponent < 1:
            raise ValueError(f"{name} cannot be fixed at {fixed}: θ has {name} = {exponent:g}, so that it "
                             "has no size to choose; take btt or monarch")
        if fixed is not None and (fixed < 1 or width % fixed):
            raise ValueError(f"{name} = {fixed} must divide the width {width}")
    try:
        ins = factorize.nearest_triples(d_in, theta[:3], gamma)
        outs = factorize.nearest_triples(d_out, theta[3:6], phi)
    except ValueError as e:
        raise ValueError(f"the map {d_in} -> {d_out} has no sensible factorization: {e}; dense and low_rank "
                         "take any width") from None
    return min((Sizes(*i, *o, rank) for i in ins for o in outs),
               key=lambda s: (-min(d_in, d_out, summed * s.rank()), s.flops(), s.params(), s))

# ---- Layers ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class LayerConfig:
    """What a config file can set of a layer. GPTConfig inherits it; all but the last are keys of train.py."""
    struct: str = "dense"           # a name in STRUCTURES
    rank: int | None = None         # ρ; None: d^θρ, but 1 in experts of a named structure (low_rank: d / E)
    theta: tuple | None = None      # seven exponents, for struct 'einsum' alone
    num_experts: int = 0            # 0, or E experts of the structure with a router
    top_k: int = 2                  # experts per token
    weight_norm: bool | None = None  # cap the cores' rms, with gains; None: for every structure but dense
    bias: bool = False
    dyad_blocks: int = 4            # D, for struct 'dyad' alone
    dyad_variant: str = "it"        # 'it', 'ot' or 'dt', for struct 'dyad' alone
    cheapest_sizes: bool = False    # of sizes that are as near, whatever their rank: as in old checkpoints

    def __post_init__(self):
        if self.struct not in STRUCTURES:
            raise ValueError(f"struct must be one of {', '.join(STRUCTURES)}; got {self.struct!r}")
        if self.weight_norm is None:
            self.weight_norm = self.struct != "dense"
        self.check_experts("num_experts")

    def check_experts(self, name: str) -> None:
        """Raises ValueError if the number of experts, the field `name`, or top_k is out of range."""
        experts = getattr(self, name)
        if not (experts == 0 or 2 <= experts < 2 ** 15):  # sorted as 16-bit integers
            raise ValueError(f"{name} must be 0 (no experts), or at least 2 and below 32768; got {experts}")
        if experts and not 1 <= self.top_k <= experts:
            raise ValueError(f"top_k must be between 1 and {name} = {experts}; got {self.top_k}")


class Structured(nn.Module):
    """Cores of a structured matrix: their initialization, normalization, gains and bias (paper, section 4).

    shapes      {name of a core: (batch, out, in)}: it acts as x @ coreᵀ, batched; with experts, a leading E
    fans        {name: (fan_in, fan_out)} of those products
    norm_follows  a norm follows, which undoes the output's scale: no gains, and another learning rate
    zero_core   the core that starts at zero; the others start normal, std = √min(fan_in, fan_out) / fan_in

    A subclass has forward(x, ends), to_dense() and flops_per_token(). With experts the rows of x are grouped
    by expert, and ends (E,) says where: expert e has rows n with ends[e - 1] <= n < ends[e].
    With config.weight_norm a core M acts as gain · M / max(1, rms(M) / std), with a gain for each expert.
    """
    cores_multiply = True  # whether W is a product of the cores; otherwise it is their sum

    def __init__(self, d_in: int, d_out: int, shapes: dict, fans: dict, config: LayerConfig, *,
                 num_experts: int = 0, norm_follows: bool = False, zero_core: str | None = None):
        super().__init__()
        self.d_in, self.d_out, self.num_experts = d_in, d_out, num_experts
        self.weight_norm, self.norm_follows, self._fans = config.weight_norm, norm_follows, fans
        lead = (num_experts,) if num_experts else ()
        for name, shape in shapes.items():
            core = torch.zeros(*lead, *shape)
            if name != zero_core:
                nn.init.normal_(core, std=self.init_std(name))
            self.register_parameter(name, nn.Parameter(core))
            if config.weight_norm and not norm_follows:
                self.register_parameter(f"gain_{name}", nn.Parameter(torch.ones(num_experts or 1)))
        self.bias = nn.Parameter(torch.zeros(*lead, d_out)) if config.bias else None
        self.fixed: dict[str, Tensor] = {}  # core(name) of each, which model.fixed_cores keeps for generation

    def fans(self) -> dict[str, tuple[int, int]]:
        """{parameter name: (fan_in, fan_out)} of each core; of one expert, where there are experts."""
        return dict(self._fans)

    def init_std(self, name: str) -> float:
        return math.sqrt(min(self._fans[name])) / self._fans[name][0]

    def lr_multipliers(self, base_width: int) -> dict[str, float]:
        """{parameter name: factor on Adam's learning rate}: d0 / (n · fan_in) for each core, else 1; n is
        the number of cores that are multiplied, 1 where W is their sum. Where a norm follows, times the
        output's initial rms, the product of the cores' growth (docs/mup.md).
        """
        growth = [math.sqrt(min(fan_in, fan_out) / fan_in) for fan_in, fan_out in self._fans.values()]
        count, rms = (len(growth), math.prod(growth)) if self.cores_multiply else (1, growth[0])
        multipliers = dict.fromkeys(dict(self.named_parameters()), 1.0)
        for name, (fan_in, _) in self._fans.items():
            multipliers[name] = (rms if self.norm_follows else 1.0) * base_width / (count * fan_in)
        return multipliers

    def core(self, name: str) -> Tensor:
        """The core, normalized and times its gain: (batch, out, in), with experts (E, batch, out, in)."""
        if name in self.fixed:
            return self.fixed[name]
        core, gain = getattr(self, name), getattr(self, f"gain_{name}", None)
        if gain is not None:
            gain = gain.view(*core.shape[:-3], 1, 1, 1)
        return kernels.normalize_core(core, gain, self.init_std(name)) if self.weight_norm else core

    def add_bias(self, y: Tensor, ends: Tensor | None) -> Tensor:
        if self.bias is None:
            return y
        if ends is None:
            return y + self.bias.to(y.dtype)
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        return y + self.bias.repeat_interleave(counts, dim=0, output_size=y.shape[0]).to(y.dtype)

    def describe_sizes(self) -> str:
        return ", ".join(f"{name} {'x'.join(map(str, getattr(self, name).shape))}" for name in self._fans)

    def extra_repr(self) -> str:
        experts = f", {self.num_experts} experts" if self.num_experts else ""
        return f"{self.d_in} -> {self.d_out}, {self.describe_sizes()}{experts}"


class Einsum(Structured):
    """The two-factor einsum at the top of this file, for given sizes.

    forward: x (..., d_in) -> (..., d_out); with experts, x (N, d_in) and ends (E,) -> (N, d_out). Each core
    is one batched product (where B goes first, A and B exchange their letters): the first over γ, (Tβ, α) x
    (α, ρφδ), and the second over φ, (Tδ, γρβ) x (γρβ, ε).
    """

    def __init__(self, sizes: Sizes, config: LayerConfig, *, zero_init: bool = False, **kwargs):
        order, contraction = sizes.order(), sizes.contraction()
        a, b, g, d, e, f, r = contraction  # from here on in the letters of the core that goes first
        shapes = [(g, r * f * d, a),  # (γ, ρφδ, α)
                  (f, e, g * r * b)]  # (φ, ε, γρβ); left out where it has one entry, as in a dense matrix
        super().__init__(sizes.d_in, sizes.d_out, dict(zip(order, shapes)), sizes.fans(), config,
                         zero_core=order[-1] if zero_init else None, **kwargs)
        self.sizes, self.order, self.contraction, self.b_first = sizes, order, contraction, order[0] == "B"
        self.plain = len(order) == 1 or b == g == d == f == 1  # dense or low rank: whole matrices

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, self.d_in)  # (T, d_in)
        cores = [self.core(name) for name in self.order]
        if self.plain:
            y = rows
            for core in (core.squeeze(-3) for core in cores):  # (out, in), with experts (E, out, in)
                y = F.linear(y, core) if ends is None else kernels.grouped_product(y, core, ends)
        elif ends is None:  # the operator expects a leading E, here 1
            y = kernels.einsum(rows, *(core[None] for core in cores), self.contraction, self.b_first)[0]
        else:
            expert = torch.searchsorted(ends, torch.arange(len(rows), device=x.device), right=True)[:, None]
            y = kernels.einsum(rows, *cores, self.contraction, self.b_first, experts=expert)[0]
        return self.add_bias(y.view(*x.shape[:-1], self.d_out), ends)

    def mixture(self, x: Tensor, balance: Tensor, top_k: int, **routing) -> tuple[Tensor, ...]:
        """x (T, d_in) -> y (T, d_out), logits (T, E), chosen experts (T, k); routing: router=(E, d_in), or
        logits=(T, E) if already known."""
        cores = (self.core(name) for name in self.order)
        y, logits, chosen = kernels.einsum(x, *cores, self.contraction, self.b_first, balance=balance,
                                           top_k=top_k, **routing)
        if self.bias is not None:
            gates = kernels.gate_weights(logits, chosen)[..., None]  # (T, k, 1)
            y = y + (gates * self.bias[chosen]).sum(1).to(y.dtype)
        return y, logits, chosen

    def lr_multipliers(self, base_width: int) -> dict[str, float]:
        """As for every layer, times √(u / u0) for a core whose entries a token uses u times.

        Shared parameters (ω > 0): a token's gradient sums u rank-one terms. Adam normalizes the sum, which
        leaves each term 1 / √u of the step that it would get alone; u = d^t, and u0 = d0^t (docs/mup.md).
        """
        multipliers = super().lr_multipliers(base_width)
        # the first core is reused along d_in, for each β, and the second along d_out, for each δ
        for (name, uses), width in zip(self.sizes.uses().items(), (self.d_in, self.d_out)):
            if uses > 1:
                multipliers[name] *= (width / base_width) ** (math.log(uses, width) / 2)  # t / 2
        return multipliers

    def factors(self) -> tuple[Tensor, Tensor]:
        """A[γ, α, δ, φ, ρ], B[γ, β, ε, φ, ρ] as they act, a 1 if left out; with experts, a leading E."""
        a, b, g, d, e, f, r = self.contraction
        first = self.core(self.order[0])  # (..., γ, ρφδ, α)
        lead = first.shape[:-3]
        first = torch.einsum("...grfda->...gadfr", first.reshape(*lead, g, r, f, d, a))
        second = first.new_ones(*lead, 1, 1, 1, 1, 1)
        if len(self.order) == 2:  # (..., φ, ε, γρβ)
            second = self.core(self.order[1]).reshape(*lead, f, e, g, r, b)
            second = torch.einsum("...fegrb->...gbefr", second)
        return (second, first) if self.b_first else (first, second)

    def to_dense(self) -> Tensor:
        """The matrix that the layer applies: (d_out, d_in); with experts, (E, d_out, d_in)."""
        W = torch.einsum("...gadfr,...gbefr->...fedgba", *self.factors())
        return W.reshape(*W.shape[:-6], self.d_out, self.d_in)

    def flops_per_token(self) -> int:
        """Forward FLOPs per row."""
        return self.sizes.flops()

    def describe_sizes(self) -> str:
        return str(self.sizes)


class Dyad(Structured):
    """DYAD (arXiv 2312.06881): a block-diagonal plus a permuted block-diagonal matrix, D blocks each.

    With i = d_in / D, o = d_out / D, and wl, wu of shape (D, o, i):
        it: y[b·o + p] = Σ_j wl[b, p, j] · x[b·i + j] + wu[b, p, j] · x[j·D + b]
        ot: the second term lands on y[p·D + b] and reads x[b·i + j]
        dt: the second term lands on y[p·D + b] and reads x[j·D + b]
    Each output sums 2i products and each input feeds 2o: those are the fans.
    Raises ValueError for an unknown variant, and where D does not divide both widths.
    """
    cores_multiply = False  # W is the sum of both

    def __init__(self, d_in: int, d_out: int, config: LayerConfig, *, zero_init: bool = False, **kwargs):
        D, variant = config.dyad_blocks, config.dyad_variant
        if variant not in DYAD_VARIANTS:
            raise ValueError(f"dyad_variant must be one of {', '.join(DYAD_VARIANTS)}; got {variant!r}")
        if D < 1 or d_in % D or d_out % D:
            raise ValueError(f"dyad_blocks = {D} must divide both widths of {d_in} -> {d_out}")
        shape, fans = (D, d_out // D, d_in // D), (2 * d_in // D, 2 * d_out // D)
        super().__init__(d_in, d_out, dict(wl=shape, wu=shape), dict(wl=fans, wu=fans), config, **kwargs)
        self.blocks, self.variant = D, variant
        for core in (self.wl, self.wu) if zero_init else ():  # W is their sum: both start at zero
            nn.init.zeros_(core)

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        D, lead, T = self.blocks, x.shape[:-1], x.numel() // self.d_in
        blocked = x.reshape(T, D, self.d_in // D).transpose(0, 1)  # (D, T, i), x[b·i + j]
        strided = x.reshape(T, self.d_in // D, D).permute(2, 0, 1)  # (D, T, i), x[j·D + b]
        lower = kernels.batched_product(blocked, self.core("wl"), ends)  # (D, T, o)
        upper = kernels.batched_product(blocked if self.variant == "ot" else strided, self.core("wu"), ends)
        if self.variant == "it":
            y = (lower + upper).transpose(0, 1).reshape(T, self.d_out)
        else:
            y = lower.transpose(0, 1).reshape(T, self.d_out) + upper.permute(1, 2, 0).reshape(T, self.d_out)
        return self.add_bias(y.view(*lead, self.d_out), ends)

    def places(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(rows, columns) in the matrix of the entries of wl, and of wu: each (D, o, i)."""
        D, o, i = self.blocks, *self.wl.shape[-2:]
        b, p, j = torch.meshgrid(*map(torch.arange, (D, o, i)), indexing="ij")
        rows = b * o + p if self.variant == "it" else p * D + b
        return (b * o + p, b * i + j), (rows, b * i + j if self.variant == "ot" else j * D + b)

    def to_dense(self) -> Tensor:
        """The matrix that the layer applies: (d_out, d_in); with experts, (E, d_out, d_in)."""
        W = self.wl.new_zeros(*self.wl.shape[:-3], self.d_out, self.d_in)
        for name, (rows, columns) in zip(("wl", "wu"), self.places()):
            W[..., rows.to(W.device), columns.to(W.device)] += self.core(name)
        return W

    def flops_per_token(self) -> int:
        return 4 * self.d_in * self.d_out // self.blocks

    def describe_sizes(self) -> str:
        return f"{self.variant}, {self.blocks} blocks"

# ---- Mixture of experts ------------------------------------------------------------------------------------

class Aux(NamedTuple):
    """What a router reports about one batch; all 0 if there are no tokens."""
    load_balance: Tensor  # () E · Σ_e (mean probability of e) · load_e; 1 when balanced
    z_loss: Tensor  # () mean over tokens of logsumexp(logits)²: ST-MoE, arXiv 2202.08906
    load: Tensor    # (E,) share of assignments to each expert, without gradient
    variance: Tensor  # () mean over tokens of the variance of a token's logits, without gradient
    loss = property(lambda self: self.load_balance + 0.1 * self.z_loss)  # (), to be added to the model's


class MoE(nn.Module):
    """Sparse mixture of experts: y = Σ_{e in top-k} gate_e · expert_e(x), gates the softmax of the k chosen
    logits; for k = 1, where that is constant, the expert's probability among all (Switch Transformer).

    `experts(rows, ends)` maps rows sorted by expert, (T·k, d_in) -> (T·k, d_out): an Einsum or Dyad with
    experts is a structured MoE of one projection; a whole MLP of such layers is the standard MoE. Only the
    chosen experts are computed, and no token is dropped. Logits are float32 under autocast too (TF32 on CUDA
    in train.py).

    Experts are chosen by logits + balance, logits = router @ x. `balance` is a buffer of biases, which
    `rebalance` moves against the load: they change which experts are chosen, not the gate weights (after Wang
    et al., arXiv 2408.15664, whose step size is fixed; ours is proportional to 1 - load ÷ mean load).
    """

    def __init__(self, d_in: int, experts: nn.Module, num_experts: int, top_k: int):
        super().__init__()
        self.d_in, self.experts, self.num_experts, self.top_k = d_in, experts, num_experts, top_k
        # random, since a zero router ties all logits and sends every token to the same experts; its rows sum
        # to zero, so that an offset common to all features of x, as a GELU leaves, favors no expert
        router = torch.randn(num_experts, d_in)
        router -= router.mean(dim=1, keepdim=True)
        self.router = nn.Parameter(router * math.sqrt(min(d_in, num_experts)) / d_in)  # (E, d_in)
        self.register_buffer("balance", torch.zeros(num_experts))  # (E,) the experts' biases

    def forward(self, x: Tensor, return_aux: bool = False, logits: Tensor | None = None):
        """x (..., d_in) -> y (..., d_out), or (y, Aux). logits (T, E): the router's, if already known."""
        rows = x.reshape(-1, self.d_in)  # (T, d_in)
        router = self.router.to(torch.promote_types(self.router.dtype, torch.float32))
        if isinstance(self.experts, Einsum) and not self.experts.plain:  # one operator does all of it
            routing = dict(router=router) if logits is None else dict(logits=logits)
            y, logits, chosen = self.experts.mixture(rows, self.balance, self.top_k, **routing)
        else:
            logits = kernels.router_logits(rows, router) if logits is None else logits
            y, chosen = self._dispatch(rows, logits)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return (y, self._aux(logits, chosen)) if return_aux else y

    def _dispatch(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, d_in), logits (T, E) -> y (T, d_out), chosen (T, k), with rows gathered by expert."""
        chosen = kernels.choose(logits, self.balance, self.top_k)
        order = chosen.flatten().to(torch.int16).argsort(stable=True)  # (T·k,) assignments by expert
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        rows = kernels.dispatch(x, order, place.view(chosen.shape))  # (T·k, d_in)
        y = self.experts(rows, self._counts(chosen).cumsum(0))  # (T·k, d_out)
        return kernels.combine(y, kernels.gate_weights(logits, chosen), order, place), chosen

    def _counts(self, chosen: Tensor) -> Tensor:
        return F.one_hot(chosen, self.num_experts).sum((0, 1))  # (E,) assignments to each expert

    def _aux(self, logits: Tensor, chosen: Tensor) -> Aux:
        load = self._counts(chosen).to(logits.dtype) / max(1, chosen.numel())
        variance = (logits - logits.mean(1, keepdim=True)).detach().square().sum() / max(1, logits.numel())
        return Aux(*kernels.router_losses(logits, load), load, variance)

    @torch.no_grad()
    def rebalance(self, load: Tensor, variance: Tensor, rate: float | Tensor) -> None:
        """biases += rate · √variance · (1 - E · load), or 0 where not finite; load (E,), variance ()."""
        self.balance += torch.nan_to_num(rate * variance.sqrt() * (1 - self.num_experts * load), 0, 0, 0)

    def lr_multipliers(self, base_width: int) -> dict[str, float]:
        """The factor on the learning rate of the router; the experts have their own method."""
        return {"router": base_width / self.d_in}

    def flops_per_token(self) -> int:
        """Active forward FLOPs per token: the router and top_k experts."""
        return 2 * self.d_in * self.num_experts + self.top_k * self.experts.flops_per_token()

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, top {self.top_k}"

# ---- Making a layer: linear(), or make_layer() from a config -----------------------------------------------

def linear(struct: str, d_in: int, d_out: int, *, sizes: tuple | None = None, gamma: int | None = None,
           phi: int | None = None, norm_follows=False, zero_init=False, **options) -> nn.Module:
    """A linear layer, x (..., d_in) -> (..., d_out), of a named structure: linear("btt", 768, 3072).

    struct, options   the fields of LayerConfig: rank, theta, num_experts, top_k, weight_norm, bias ...
    sizes             the seven integer sizes themselves, instead of rank and theta
    gamma, phi        the size of γ or φ, where θ leaves it open: the number of heads of the input or output
    norm_follows      a norm follows: no gains, and learning rates relative to the initial scale of the output
    zero_init         start the last core at zero, for a projection that ends a residual branch

    Raises ValueError, in one sentence, for names, widths, ranks and numbers of experts that do not fit.
    """
    return make_layer(LayerConfig(struct, **options), d_in, d_out, sizes=sizes, gamma=gamma, phi=phi,
                      norm_follows=norm_follows, zero_init=zero_init)


def make_layer(config: LayerConfig, d_in: int, d_out: int, **role) -> nn.Module:
    """linear() for a config; role: its sizes, gamma, phi, norm_follows, zero_init."""
    experts = make_experts(config, config.num_experts, d_in, d_out, **role)
    return MoE(d_in, experts, config.num_experts, config.top_k) if config.num_experts else experts


def make_experts(config: LayerConfig, num_experts: int, d_in: int, d_out: int, *, sizes=None, gamma=None,
                 phi=None, **role) -> Structured:
    """num_experts experts or, for 0, one matrix, without a router, whatever config.num_experts is. Raises
    ValueError as layer_sizes does, for sizes of other widths, and for arguments that exclude each other."""
    if config.struct == "dyad":
        if (config.rank, config.theta, sizes, gamma, phi) != (None,) * 5:
            raise ValueError("struct 'dyad' takes dyad_blocks and dyad_variant, not a rank, theta, sizes ...")
        return Dyad(d_in, d_out, config, num_experts=num_experts, **role)
    if sizes is None:
        sizes = layer_sizes(config, num_experts, d_in, d_out, gamma=gamma, phi=phi)
    elif (config.rank, config.theta, gamma, phi) != (None,) * 4:
        raise ValueError("sizes say the rank and the structure: give no rank, theta, gamma or phi with them")
    return Einsum(_checked_sizes(sizes, d_in, d_out), config, num_experts=num_experts, **role)


def layer_sizes(config: LayerConfig, num_experts: int, d_in: int, d_out: int, *, gamma: int | None = None,
                phi: int | None = None) -> Sizes:
    """Sizes of a structure (any but dyad) between two widths; of one expert, where there are experts.

    Raises ValueError for a rank that the structure does not have, a theta that is missing or not wanted,
    widths that do not factor, and a γ or φ that cannot be fixed.
    """
    struct, rank, theta = config.struct, config.rank, config.theta
    if struct == "einsum" and theta is None:
        raise ValueError("struct 'einsum' needs theta, seven exponents")
    if struct != "einsum" and theta is not None:
        raise ValueError(f"theta belongs to struct 'einsum'; {struct!r} has its own")
    theta = STRUCTURES[struct] if theta is None else Theta.parse(theta)
    if rank not in (None, 1) and struct in ("dense", "kronecker", "monarch"):
        with_rank = dict(dense="low_rank", kronecker="tt", monarch="btt")[struct]
        raise ValueError(f"struct {struct!r} has no rank to set (got {rank}); {with_rank!r} has one")
    if rank is None and num_experts and struct != "einsum":  # low_rank: all experts make about full rank
        rank = max(1, min(d_in, d_out) // num_experts) if struct == "low_rank" else 1
    summed = math.inf if config.cheapest_sizes else config.top_k if num_experts else 1
    return theta.sizes(d_in, d_out, rank, gamma=gamma, phi=phi, summed=summed)


def _checked_sizes(sizes, d_in: int, d_out: int) -> Sizes:
    if len(sizes) != 7 or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ValueError(f"sizes must be seven positive integers ({', '.join(INDICES)}); got {sizes}")
    sizes = Sizes(*sizes)
    if (sizes.d_in, sizes.d_out) != (d_in, d_out):
        raise ValueError(f"sizes {sizes} make a map {sizes.d_in} -> {sizes.d_out}, not {d_in} -> {d_out}")
    return sizes
