"""The products under the layers of structured.py.

    contract        rows through the two cores of an einsum, with or without experts
    segment_product rows sorted by expert, each times its own expert's matrix
    routed_einsum   on a CPU, a whole mixture of einsums in one operator, router included
    autograd        small functions whose backward is written by hand
"""
import torch.nn.functional as F
from torch import Tensor

from lib.kernels.autograd import combine, dispatch, normalize_core, router_losses
from lib.kernels.cpu_einsum import einsum, keep_freed_memory, release_scratch, routed_einsum
from lib.kernels.segment_product import segment_product

__all__ = ["batched_product", "combine", "contract", "dispatch", "gate_weights", "keep_freed_memory",
           "normalize_core",
           "release_scratch", "routed_einsum", "router_losses", "segment_product",
           "use_cpu_operators"]


def use_cpu_operators(x: Tensor) -> bool:
    """Whether einsums of x take the operators of cpu_einsum.py."""
    return x.device.type == "cpu"


def contract(x: Tensor, cores: list[Tensor], sizes, swapped: bool, ends: Tensor | None = None) -> Tensor:
    """The einsum of one core or two: x (T, d_in) -> (T, d_out).

    sizes are the seven of the contraction; where B goes first (`swapped`) they are those with A and B
    exchanged. cores: (γ, ρφδ, α), then (φ, ε, γρβ). With experts each core has a leading E, rows are sorted
    by expert, and expert e's rows end at ends[e].
    """
    if ends is None and use_cpu_operators(x):
        return einsum(x, *cores, sizes, swapped)
    T, (a, b, g, d, e, f, r) = x.shape[0], sizes
    x = x.reshape(T, g, a, b).mT if swapped else x.reshape(T, g, b, a)
    x = x.transpose(0, 1).reshape(g, T * b, a)
    z = batched_product(x, cores[0], ends, b, columns=True)  # (γ, Tβ, ρφδ)
    if len(cores) == 1:
        return z.reshape(T, d)
    z = z.view(g, T, b, r, f, d)
    if ends is None:
        z = z.permute(4, 5, 1, 0, 3, 2).reshape(f, d * T, g * r * b)  # no copy where β = 1
        y = batched_product(z, cores[1], None).view(f, d, T, e).permute(2, 0, 3, 1)
    else:
        z = z.permute(4, 1, 5, 0, 3, 2).reshape(f, T * d, g * r * b)  # the rows of an expert stay together
        y = batched_product(z, cores[1], ends, d).view(f, T, d, e).permute(1, 0, 3, 2)
    y = y.mT if swapped else y  # (T, φ, ε, δ)
    return y.reshape(T, f * e * d)


def gate_weights(logits: Tensor, chosen: Tensor) -> Tensor:
    """The softmax of the chosen logits: logits (T, E), chosen (T, k) -> (T, k).

    Not by gather, whose gradient is wrong in compiled code (torch 2.13).
    """
    return (F.one_hot(chosen, logits.shape[1]) * logits[:, None]).sum(2).softmax(dim=-1)


def batched_product(x: Tensor, w: Tensor, ends: Tensor | None, rows_each: int = 1,
                    columns: bool = False) -> Tensor:
    """y[b] = x[b] @ w[b]ᵀ: x (B, N, K), w (B, M, K) -> (B, N, M).

    With `ends`, w is (E, B, M, K), and a row of the layer's input is `rows_each` rows here. Without,
    `columns` stores the result as (B, M, N), so that a later sum over M and B reads it without a copy.
    """
    if ends is not None:
        return segment_product(x, w, ends * rows_each)
    return (w @ x.mT).mT if columns else x @ w.mT
