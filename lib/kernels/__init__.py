"""The products under the layers of structured.py.

    operators     einsums of two cores, with and without experts and their router: one operator, three bodies.
                  Begin with the docstring of einsum()
    torch_body    the body that runs anywhere, the reference of the others
    plan          which rows of a mixture are computed together
    routing       logits, choices and gates
    c_body        the body on CPUs: compiles and calls einsum.c
    triton_body   the body on GPUs
    grouped       rows sorted by expert, each times its own expert's large matrix
    autograd      small functions whose backward is written by hand
"""
import torch
from torch import Tensor

from lib.kernels.autograd import combine, dispatch, normalize_core, router_losses
from lib.kernels.grouped import grouped_product
from lib.kernels.operators import KERNELS, computes_logits, describe_body, einsum, use_kernel
from lib.kernels.routing import autocast_dtype, choose, gate_weights, router_logits

__all__ = ["KERNELS", "autocast_dtype", "batched_product", "choose", "combine", "computes_logits",
           "describe_body", "dispatch", "einsum", "gate_weights", "grouped_product", "normalize_core",
           "router_logits", "router_losses", "use_kernel"]


def batched_product(x: Tensor, w: Tensor, ends: Tensor | None) -> Tensor:
    """y[b] = x[b] @ w[b]ᵀ: x (B, N, K), w (B, M, K) -> (B, N, M).

    With `ends`, for which see grouped_product, w is (E, B, M, K).
    """
    if ends is None:
        return x @ w.mT
    B, N, _ = x.shape
    groups = ends + N * torch.arange(B, device=ends.device)[:, None]  # (B, E): batch by batch, B · E of them
    y = grouped_product(x.flatten(0, 1), w.transpose(0, 1).flatten(0, 1), groups.flatten())
    return y.view(B, N, w.shape[2])
