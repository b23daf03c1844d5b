"""Every named structure at a width, as a markdown table: sizes, costs, taxonomy, initialization and learning
rates.

    python -m experiments.structures_table 768 3072     the map 768 -> 3072; one width alone stands for both
"""
import math
import sys

from lib.table import markdown_table
from lib.terminal import prepare_output
from structured import STRUCTURES, Dyad, linear

HEAD = ("structure", "θ (α β γ δ ε φ ρ)", "sizes", "parameters", "of dense", "FLOPs/token", "of dense",
        "ψ", "ν", "ω", "init std · lr × per core")


def structures_table(d_in: int, d_out: int, base_width: int = 128) -> str:
    """The table for maps d_in -> d_out; lr × is the factor on the learning rate at this base width."""
    return markdown_table(HEAD, [row_of(name, d_in, d_out, base_width) for name in STRUCTURES
                                 if name != "einsum"])


def row_of(name: str, d_in: int, d_out: int, base_width: int) -> list[str]:
    theta, dense = STRUCTURES[name], d_in * d_out
    try:
        layer = linear(name, d_in, d_out)
    except ValueError as e:
        return [name, str(e), *[""] * (len(HEAD) - 2)]
    params = sum(p.numel() for key, p in layer.named_parameters() if key in layer.fans())
    flops, lr = layer.flops_per_token(), layer.lr_multipliers(base_width)
    cores = ", ".join(f"{key}: {layer.init_std(key):.3g} · {lr[key]:.3g}" for key in layer.fans())
    exponents = " ".join(f"{e:g}" for e in theta) if theta else "not an einsum"
    if theta:
        taxonomy = theta.psi, theta.nu, theta.omega
    elif isinstance(layer, Dyad):
        taxonomy = 1, 1, 0
    else:
        taxonomy = (math.nan,) * 3   # a structure of one's own
    return [name, exponents, layer.describe_sizes(), f"{params:,}", f"{params / dense:.3f}", f"{flops:,}",
            f"{flops / (2 * dense):.3f}", *(f"{v:g}" for v in taxonomy), cores]


def main() -> None:
    prepare_output()
    try:
        widths = [int(text) for text in sys.argv[1:]]
    except ValueError:
        widths = []
    if not 1 <= len(widths) <= 2 or min(widths) < 1:
        sys.exit("error: usage: python -m experiments.structures_table D_IN [D_OUT], with positive widths")
    print(structures_table(widths[0], widths[-1]))


if __name__ == "__main__":
    main()
