"""The points that the search chooses from: θ, and experts if asked for, as a model of the requested compute.

Optuna chooses five integers, each an index into one of the lists in LEVELS: θγ; θα's share of 1 - θγ, of
which θβ has the rest; θφ; θδ's share of 1 - θφ, of which θε has the rest; and θρ. The lists hold the
fractions of all structures of the paper. Named structures lie on corners and edges of the two simplices,
which real numbers would never hit. Exchanging the two cores (α with β, δ with ε) gives the same matrices but
for the order of their inputs and outputs, which the heads alone see, so that shares of α start at 1/2.

The model of a θ: among the widths in the list, and for θρ > 0 the ranks within a quarter of d^θρ, those whose
FLOPs per token are within the tolerance; of these the one whose integer sizes are nearest to d^θ.
"""
import dataclasses
import functools
import hashlib
import json
import math
from fractions import Fraction
from typing import NamedTuple

from experiments.launcher import Run, make_run, tokens_per_iter
from lib.factorize import log_distance
from structured import STRUCTURES, Sizes, Theta

PARTS = tuple(map(Fraction, ("0", "1/4", "1/3", "1/2", "2/3", "3/4", "1")))
LEVELS = {"gamma": PARTS, "alpha": PARTS[3:], "phi": PARTS, "delta": PARTS,
          "rho": tuple(map(Fraction, ("0", "1/8", "1/4", "1/3", "1/2", "3/4")))}
NAMED = {name: theta for name, theta in STRUCTURES.items() if theta is not None}
RANK_SLACK = 1.25   # ranks from d^θρ / 1.25 to d^θρ * 1.25 are tried
# keys of train.py that the search sets: those of a structure and its rate, and those that any config may have
STRUCTURAL = ("struct", "theta", "rank", "layers", "num_experts", "top_k", "ffn_experts", "head_aligned",
              "learning_rate", "min_lr")
CHOSEN = (*STRUCTURAL, "out_dir", "init_from", "n_embd", "max_iters", "lr_decay_iters", "eval_interval")


def theta_of(gamma: int, alpha: int, phi: int, delta: int, rho: int) -> Theta:
    """θ at these indices into LEVELS."""
    g, a, f, d, r = (levels[i] for levels, i in zip(LEVELS.values(), (gamma, alpha, phi, delta, rho)))
    a, d = (1 - g) * a, (1 - f) * d
    return Theta(a, 1 - g - a, g, d, 1 - f - d, f, r)


def indices_of(theta: Theta) -> dict[str, int]:
    """{name: index into LEVELS} of θ, or of θ with its cores exchanged. Raises ValueError if it has none."""
    for a, _, g, d, _, f, r in (theta, swapped(theta)):
        alpha, delta = a / (1 - g) if g < 1 else 1, d / (1 - f) if f < 1 else 1
        values = dict(gamma=g, alpha=alpha, phi=f, delta=delta, rho=r)
        found = {name: i for name, levels in LEVELS.items() for i, level in enumerate(levels)
                 if abs(level - values[name]) < 1e-9}
        if len(found) == len(LEVELS):
            return found
    raise ValueError(f"θ = {theta_text(theta)} is between the levels of the search")


def swapped(theta: Theta) -> Theta:
    """The θ with its two cores exchanged: the same matrices but for the order of their inputs and outputs."""
    a, b, g, d, e, f, r = theta
    return Theta(b, a, g, e, d, f, r)


def theta_text(theta) -> str:
    """'1/2 0 1/2 0 1/2 1/2 1/4'."""
    return " ".join(str(Fraction(e).limit_denominator(64)) for e in theta)


def structure_name(theta: Theta) -> str:
    """The structure that θ is, whatever its rank; '' if it has no name."""
    for name, known in NAMED.items():
        if (known.rho > 0) == (theta.rho > 0):
            if any(math.dist(known[:6], same[:6]) < 1e-9 for same in (theta, swapped(theta))):
                return name
    return ""


class Point(NamedTuple):
    """A model of the space at its width."""
    theta: Theta
    num_experts: int        # 0 for none
    top_k: int              # 0 without experts
    width: int
    rank: int
    sizes: tuple[Sizes, Sizes, Sizes]   # of the maps d -> d, d -> 4d and 4d -> d
    flops_per_token: int    # training: three times the forward pass

    @property
    def name(self) -> str:
        """A name for a folder: the same for two θ that come to the same model. With cores exchanged that is
        one where neither side has indices of both cores, which would change places within the heads."""
        same = [max(s, s.swapped()) if 1 in (s.alpha, s.beta) and 1 in (s.delta, s.epsilon) else s
                for s in self.sizes]
        contents = f"{self.width} {self.num_experts} {self.top_k} {[tuple(s) for s in same]}"
        square = "".join(f"{letter}{size}" for letter, size in zip("abgdefr", same[0]) if size > 1)
        experts = f"-e{self.num_experts}k{self.top_k}" if self.num_experts else ""
        return f"d{self.width}-{square}{experts}-{hashlib.sha256(contents.encode()).hexdigest()[:8]}"

    @property
    def structure(self) -> str:
        """'btt' or 'btt, 8 experts, top 2'; '' if θ has no name."""
        name = structure_name(self.theta)
        return name and name + self.experts

    @property
    def label(self) -> str:
        """What tables and figures call it."""
        return f"{structure_name(self.theta) or 'θ'} {theta_text(self.theta)}{self.experts}"

    @property
    def experts(self) -> str:
        return f", {self.num_experts} experts, top {self.top_k}" if self.num_experts else ""

    def facts(self) -> dict:
        """What a study keeps of it."""
        return dict(point=self.name, label=self.label, structure=self.structure, theta=self.theta,
                    width=self.width, rank=self.rank, sizes=[str(s) for s in self.sizes],
                    flops_per_token=self.flops_per_token)


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """All points, and what their models must cost. Its fields are the request that a study keeps."""
    dense_width: int        # a dense model of this width has the requested FLOPs per token
    flops: float            # training FLOPs of a trial
    widths: tuple           # to choose from, ascending
    tolerance: float        # relative, of the FLOPs per token
    learning_rates: tuple
    experts: tuple          # numbers of experts to choose from, 0 for none
    top_ks: tuple
    max_nu: float           # θ above this compute intensity are left out
    evals: int              # evaluations of a run
    settings: dict          # keys of train.py that all trials share
    vocab_size: int

    @functools.cached_property
    def flops_per_token(self) -> int:
        """Training FLOPs per token that a model must have."""
        sizes = [STRUCTURES["dense"].sizes(*d_in_out) for d_in_out in _maps(self.dense_width)]
        return self.flops_of(sizes, self.dense_width)

    def request(self) -> dict:
        """What must be the same for all trials of a study, in the types of JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self) | dict(flops_per_token=self.flops_per_token)))

    def suggest(self, trial) -> Point:
        """The point that an Optuna trial is to try. Raises ValueError, as point() does."""
        theta = theta_of(*(trial.suggest_int(name, 0, len(levels) - 1) for name, levels in LEVELS.items()))
        experts, top_k = (trial.suggest_categorical(name, list(options)) if len(options) > 1 else options[0]
                          for name, options in (("num_experts", self.experts), ("top_k", self.top_ks)))
        return self.point(theta, experts, top_k)

    def point(self, theta: Theta, experts: int = 0, top_k: int = 0) -> Point:
        """The model of θ at the requested FLOPs per token; top_k is ignored without experts. Raises
        ValueError if there is none."""
        top_k = top_k if experts else 0
        if experts and top_k > experts:
            raise ValueError(f"top_k = {top_k} is more than {experts} experts")
        if theta.nu > self.max_nu + 1e-9:
            raise ValueError(f"θ = {theta_text(theta)} has ν = {theta.nu:.3g}, more than {self.max_nu:g}")
        if (point := self._nearest(theta, experts, top_k)) is None:
            raise ValueError(f"θ = {theta_text(theta)} has no width among the {len(self.widths)} with FLOPs "
                             f"per token within {self.tolerance:.0%} of {self.flops_per_token:.3g}")
        return point

    def first(self) -> dict[str, tuple[Theta, int, int]]:
        """{name: (θ, experts, top_k)} of what comes first, with the fewest experts: structures with a name,
        and BTT-MoE, whose experts have rank 1, where the sampler may choose between none and some."""
        experts = sorted(self.experts)
        found = {name: (theta, experts[0]) for name, theta in NAMED.items()}
        if experts[0] == 0 and experts[-1] > 0:
            found["btt_moe"] = NAMED["monarch"], min(filter(None, experts))
        return {name: (theta, most, next((k for k in self.top_ks if k <= most), self.top_ks[0]))
                for name, (theta, most) in found.items()}

    def named(self) -> dict[str, Point | str]:
        """{name: its model, or a sentence why it has none} of those that come first."""
        found: dict[str, Point | str] = {}
        for name, (theta, experts, top_k) in self.first().items():
            try:
                found[name] = self.point(theta, experts, top_k)
            except ValueError as error:
                found[name] = str(error)
        return found

    def flops_of(self, sizes, width: float, experts: int = 0, top_k: int = 0) -> float:
        """Training FLOPs per token of a model whose maps d -> d, d -> 4d, 4d -> d have these sizes: what
        GPT.flops_per_token() counts, but without making a model, and for real numbers too."""
        square, up, down = ((top_k or 1) * s.flops() + 2 * s.d_in * experts for s in sizes)
        block = 4 * square + up + down + 4 * self.settings["block_size"] * width
        return 3 * (self.settings["n_layer"] * block + 2 * width * self.vocab_size)

    @functools.cache
    def _nearest(self, theta: Theta, experts: int, top_k: int) -> Point | None:
        found: list[tuple[float, float, Point]] = []
        for d in self.widths:
            share = self._real_flops(theta, d, experts, top_k) / self.flops_per_token
            if not (1 - self.tolerance) / 2 < share < (1 + self.tolerance) * 2:
                continue    # integer sizes change the FLOPs by less than a factor of 2
            for rank in _ranks(theta, d):
                try:
                    sizes = tuple(theta.sizes(*d_in_out, rank, summed=max(1, top_k)) for d_in_out in _maps(d))
                except ValueError:
                    continue
                flops = self.flops_of(sizes, d, experts, top_k)
                off = abs(flops / self.flops_per_token - 1)
                if off <= self.tolerance:
                    distance = round(sum(_distance(theta, s) for s in sizes), 6)
                    found.append((distance, off, Point(theta, experts, top_k, d, rank, sizes, flops)))
        return min(found)[2] if found else None

    def _real_flops(self, theta: Theta, d: int, experts: int, top_k: int) -> float:
        """FLOPs per token if sizes were real numbers, exactly d^θ."""
        sizes = [Sizes(*(d_in ** e for e in theta[:3]), *(d_out ** e for e in theta[3:6]), d ** theta.rho)
                 for d_in, d_out in _maps(d)]
        return self.flops_of(sizes, d, experts, top_k)

    def runs(self, point: Point, root: str) -> list[Run]:
        """A run of the point for each learning rate. Raises ValueError if train.py cannot make such a model.
        All have weight norm, dense too; all but dense are einsums, so that none is aligned with heads."""
        # all trials evaluate at the same shares of the budget
        flops_per_iter = point.flops_per_token * tokens_per_iter(self.settings)
        every = max(1, round(self.flops / (flops_per_iter * self.evals)))
        values = self.settings | dict(n_embd=point.width, max_iters=every * self.evals, eval_interval=every)
        if point.structure == "dense":
            values = dict(struct="dense", weight_norm=True) | values
        else:
            values |= dict(struct="einsum", theta=tuple(point.theta))
        if point.rank != max(1, round(point.width ** point.theta.rho)):
            values |= dict(rank=point.rank)
        if point.num_experts:
            values |= dict(num_experts=point.num_experts, top_k=point.top_k)
        runs = [make_run(point.label, values | dict(learning_rate=rate), root)
                for rate in self.learning_rates]
        if abs(runs[0].flops / self.flops - 1) > self.tolerance + 1e-9:
            raise ValueError(f"a run of {point.label} would cost {runs[0].flops:.3g} FLOPs, not "
                             f"{self.flops:.3g}: a setting changes what a model costs")
        return runs


def _maps(d: int) -> tuple[tuple[int, int], ...]:
    return (d, d), (d, 4 * d), (4 * d, d)


def _ranks(theta: Theta, d: int) -> list[int]:
    """ρ as θ says, 1 where θρ is 0, and the other ranks within the slack."""
    exact = d ** theta.rho
    low, high = math.ceil(exact / RANK_SLACK), math.floor(exact * RANK_SLACK)
    return sorted({max(1, round(exact)), *range(low, high + 1)})


def _distance(theta: Theta, sizes: Sizes) -> float:
    """Squared distance of integer sizes from d^θ, in log space."""
    parts = (slice(3), sizes.d_in), (slice(3, 6), sizes.d_out), (slice(6, 7), min(sizes.d_in, sizes.d_out))
    return sum(log_distance(sizes[part], theta[part], width) for part, width in parts)
