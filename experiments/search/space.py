"""The points that search.py chooses from: θ, and experts where they are asked for, each as a model of equal compute.

Optuna sees whole numbers, places in these lists, which its kernels know to be near or far from each other:

    gamma   θγ
    alpha   θα's share of what θγ leaves of the input; θβ is the rest
    phi     θφ
    delta   θδ's share of what θφ leaves of the output; θε is the rest
    rho     θρ

Lists rather than real numbers, so that corners and edges of the two simplices, on which all named structures lie, are
met with a probability of their own: a share is 1 in a quarter of all cases. They hold the fractions of all structures of
the paper; at width 128 a twelfth is a factor 1.5 in size, and between divisors there is seldom more to choose from.
A core's letters can be exchanged with those of the other, α with β and δ with ε, which gives the same matrices: θα >= θβ
leaves one of the two.

A model of the request's FLOPs per token: of the widths in the list, and where θρ > 0 of the ranks within a quarter of
d^θρ, those that are within the tolerance; of these the one whose integer sizes are nearest to d^θ. A point's name says
its width and the sizes of its three maps, so that two θ with the same matrices have the same name.
"""
import bisect
import dataclasses
import functools
import hashlib
import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import configurator
from experiments import launcher
from structured import STRUCTURES, Sizes, Theta

PARTS = tuple(map(Fraction, ("0", "1/4", "1/3", "1/2", "2/3", "3/4", "1")))
LEVELS = {"gamma": PARTS, "alpha": tuple(p for p in PARTS if p >= Fraction(1, 2)), "phi": PARTS, "delta": PARTS,
          "rho": tuple(map(Fraction, ("0", "1/8", "1/4", "1/3", "1/2", "3/4")))}
RANK_SLACK = 1.25   # ranks between d^θρ ÷ this and d^θρ · this are tried
# keys of train.py that the search sets itself: those of a structure and its rate, and those that any config may have
STRUCTURAL = ("struct", "theta", "rank", "layers", "num_experts", "top_k", "ffn_experts", "head_aligned", "learning_rate",
              "min_lr")
CHOSEN = (*STRUCTURAL, "out_dir", "init_from", "n_embd", "max_iters", "lr_decay_iters", "eval_interval")


def theta_of(gamma: int, alpha: int, phi: int, delta: int, rho: int) -> Theta:
    """θ at these places of LEVELS."""
    g, a, p, d, r = (levels[i] for levels, i in zip(LEVELS.values(), (gamma, alpha, phi, delta, rho)))
    a, d = (1 - g) * a, (1 - p) * d
    return Theta(a, 1 - g - a, g, d, 1 - p - d, p, r)


@functools.cache
def _places() -> dict[tuple, dict[str, int]]:
    found: dict[tuple, dict[str, int]] = {}
    for places in itertools.product(*(range(len(levels)) for levels in LEVELS.values())):
        found.setdefault(_rounded(theta_of(*places)), dict(zip(LEVELS, places)))
    return found


def _rounded(theta) -> tuple:
    return tuple(round(e, 9) for e in theta)


def swapped(theta: Theta) -> Theta:
    a, b, g, d, e, p, r = theta
    return Theta(b, a, g, e, d, p, r)


def places_of(theta: Theta) -> dict[str, int]:
    """{name: place in LEVELS} of θ, or of the θ with the same matrices. Raises ValueError where it is not in the space."""
    for same in (theta, swapped(theta)):
        if _rounded(same) in _places():
            return _places()[_rounded(same)]
    raise ValueError(f"θ = {text_of(theta)} is between the levels of the search")


def text_of(theta) -> str:
    """'1/2 0 1/2 0 1/2 1/2 1/4'."""
    return " ".join(str(Fraction(e).limit_denominator(64)) for e in theta)


def name_of(theta: Theta) -> str | None:
    """The structure that θ is, whatever its rank; None where it has no name."""
    for name, known in STRUCTURES.items():
        same = known and _rounded(known)[:6] in (_rounded(theta)[:6], _rounded(swapped(theta))[:6])
        if same and (known.rho > 0) == (theta.rho > 0):
            return name
    return None


# ---- Equal compute --------------------------------------------------------------------------------------------------

class Point(NamedTuple):
    """A model of the space at its width."""
    theta: Theta
    num_experts: int
    top_k: int              # 0 without experts
    width: int
    rank: int
    sizes: tuple[Sizes, Sizes, Sizes]   # of the maps d -> d, d -> 4d and 4d -> d
    flops_per_token: int    # training: three times the forward

    @property
    def name(self) -> str:
        """The same for the same matrices, and a folder's."""
        same = [max(s, s.swapped()) for s in self.sizes]
        words = f"{self.width} {self.num_experts} {self.top_k} {[tuple(s) for s in same]}"
        square = "".join(f"{letter}{size}" for letter, size in zip("abgdefr", same[0]) if size > 1)
        experts = f"-e{self.num_experts}k{self.top_k}" if self.num_experts else ""
        return f"d{self.width}-{square}{experts}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"

    @property
    def experts(self) -> str:
        return f", {self.num_experts} experts, top {self.top_k}" if self.num_experts else ""

    @property
    def structure(self) -> str:
        """Its name, that of dense without experts alone being 'dense'; '' where it has none."""
        name = name_of(self.theta)
        return name + self.experts if name else ""

    @property
    def label(self) -> str:
        """As tables and figures call it."""
        return f"{name_of(self.theta) or 'θ'} {text_of(self.theta)}{self.experts}"


@dataclasses.dataclass(frozen=True)
class Space:
    """All points, and what is asked of their models. A study keeps this as its request: see asdict()."""
    dense_width: int        # width of the dense model whose FLOPs per token are asked for
    flops: float            # training FLOPs of a trial
    widths: tuple           # to choose from, ascending
    tolerance: float        # relative, of the FLOPs per token
    learning_rates: tuple
    experts: tuple          # numbers of experts, 0 for none
    top_ks: tuple
    max_nu: float           # θ of more compute intensity are left out
    evals: int
    settings: dict          # all keys of train.py but those in CHOSEN
    vocab_size: int
    cache: dict = dataclasses.field(default_factory=dict, compare=False)

    @functools.cached_property
    def flops_per_token(self) -> int:
        """Training FLOPs per token that are asked for."""
        return self.flops_of([STRUCTURES["dense"].sizes(*widths) for widths in _maps(self.dense_width)], self.dense_width)

    def request(self) -> dict:
        """What must be the same for all trials of a study, in the types of JSON."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v
                for f in dataclasses.fields(self) if f.name != "cache"} | dict(
            flops_per_token=self.flops_per_token)

    def suggest(self, trial) -> tuple[Theta, int, int]:
        """(θ, experts, top-k) that an Optuna trial is to try."""
        theta = theta_of(*(trial.suggest_int(name, 0, len(levels) - 1) for name, levels in LEVELS.items()))
        experts, top_k = (trial.suggest_categorical(name, list(options)) if len(options) > 1 else options[0]
                          for name, options in (("num_experts", self.experts), ("top_k", self.top_ks)))
        return theta, experts, top_k if experts else 0

    def flops_of(self, sizes, width: float, experts: int = 0, top_k: int = 0) -> float:
        """Training FLOPs per token of a model of this width whose maps d -> d, d -> 4d, 4d -> d have these sizes: what
        GPT.flops_per_token() counts, without making a model. Real numbers do too."""
        square, up, down = ((top_k or 1) * s.flops() + 2 * s.d_in * experts for s in sizes)
        block = 4 * square + up + down + 4 * self.settings["block_size"] * width
        return 3 * (self.settings["n_layer"] * block + 2 * width * self.vocab_size)

    def point(self, theta: Theta, experts: int = 0, top_k: int = 0) -> Point:
        """The model of this θ at the requested FLOPs per token. Raises ValueError, in one sentence, where there is none."""
        if theta.nu > self.max_nu + 1e-9:
            raise ValueError(f"θ = {text_of(theta)} has ν = {theta.nu:.3g}, more than {self.max_nu:g}")
        key = (_rounded(theta), experts, top_k)
        if key not in self.cache:
            self.cache[key] = self._nearest(theta, experts, top_k)
        if self.cache[key] is None:
            raise ValueError(f"θ = {text_of(theta)} has no width among the {len(self.widths)} at which its FLOPs per token "
                             f"are within {self.tolerance:.0%} of {self.flops_per_token:.3g}")
        return self.cache[key]

    def named(self) -> dict[str, Point | str]:
        """{name: its model, or why it has none} of the named structures, with the fewest experts."""
        found: dict[str, Point | str] = {}
        for name, theta in STRUCTURES.items():
            if theta is not None:
                try:
                    found[name] = self.point(theta, min(self.experts), self.top_ks[0] if min(self.experts) else 0)
                except ValueError as e:
                    found[name] = str(e)
        return found

    def _nearest(self, theta: Theta, experts: int, top_k: int) -> Point | None:
        if experts and top_k > experts:
            return None
        found: list[tuple[float, float, Point]] = []
        # a factor 2 in FLOPs is farther than divisors are from real sizes
        limits = (self.flops_per_token * limit for limit in ((1 - self.tolerance) / 2, (1 + self.tolerance) * 2))
        low, high = (bisect.bisect(self.widths, limit, key=lambda d: self._ideal(theta, d, experts, top_k))
                     for limit in limits)
        for d in self.widths[low:high]:
            for rank in self._ranks(theta, d):
                try:
                    sizes = tuple(theta.sizes(*widths, rank) for widths in _maps(d))
                except ValueError:
                    continue
                flops = self.flops_of(sizes, d, experts, top_k)
                off = abs(flops / self.flops_per_token - 1)
                if off <= self.tolerance:
                    distortion = sum(_distance(theta, s) for s in sizes)
                    found.append((round(distortion, 6), off, Point(theta, experts, top_k, d, rank, sizes, flops)))
        return min(found)[2] if found else None

    def _ideal(self, theta: Theta, d: int, experts: int, top_k: int) -> float:
        """FLOPs per token if sizes were real numbers, exactly d^θ."""
        return self.flops_of([Sizes(*(i ** e for e in theta[:3]), *(o ** e for e in theta[3:6]), d ** theta.rho)
                              for i, o in _maps(d)], d, experts, top_k)

    def _ranks(self, theta: Theta, d: int) -> list[int]:
        """ρ as θ says, and beyond it what the slack allows."""
        if theta.rho == 0:
            return [1]
        exact = d ** theta.rho
        return sorted({max(1, round(exact)), *range(math.ceil(exact / RANK_SLACK), math.floor(exact * RANK_SLACK) + 1)})

    def runs(self, point: Point, root: str) -> list[launcher.Run]:
        """A run of the point for each learning rate; iterations are a multiple of the evaluations, so that every trial
        evaluates at the same shares of its budget. Raises ValueError where no such model can be made.

        Dense is train.py's own, without weight norm; all others are plain einsums, heads not aligned.
        """
        tokens = math.prod(self.settings[k] for k in ("gradient_accumulation_steps", "batch_size", "block_size"))
        every = max(1, round(self.flops / (point.flops_per_token * tokens * self.evals)))
        structure = dict(struct="dense") if point.structure == "dense" else dict(struct="einsum", theta=tuple(point.theta))
        values = self.settings | structure | dict(n_embd=point.width, max_iters=every * self.evals, eval_interval=every)
        if point.rank != max(1, round(point.width ** point.theta.rho)):
            values |= dict(rank=point.rank)
        if point.num_experts:
            values |= dict(num_experts=point.num_experts, top_k=point.top_k)
        defaults = {k.name: k.default for k in configurator.read_keys(launcher.TRAIN).values()}
        runs = [launcher.make_run(point.label, values | dict(learning_rate=rate), defaults, root)
                for rate in self.learning_rates]
        if abs(runs[0].flops / self.flops - 1) > self.tolerance + 1e-9:
            raise ValueError(f"a run of {point.label} would cost {runs[0].flops:.3g} FLOPs, not {self.flops:.3g}: its "
                             "settings change what a model costs")
        return runs


def _maps(d: int) -> tuple[tuple[int, int], ...]:
    return (d, d), (d, 4 * d), (4 * d, d)


def _distance(theta: Theta, sizes: Sizes) -> float:
    """Squared distance of integer sizes from d^θ, in log space."""
    widths = [sizes.d_in] * 3 + [sizes.d_out] * 3 + [min(sizes.d_in, sizes.d_out)]
    return sum((math.log(size) - e * math.log(d)) ** 2 for size, e, d in zip(sizes, theta, widths))
