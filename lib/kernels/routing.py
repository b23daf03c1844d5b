"""The router's arithmetic: logits, choices, gates and their gradients. T tokens, E experts, k per token."""
import torch
import torch.nn.functional as F
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast computes products of x in; None without autocast, and for float64, which it
    leaves alone. torch.compile traces this."""
    on = not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else None


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """x (T, d_in), router (E, d_in) -> x routerᵀ (T, E), in the router's type."""
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return F.linear(x.to(router.dtype), router)


def choose(logits: Tensor, balance: Tensor, top_k: int) -> Tensor:
    """logits (T, E), balance (E,) -> the experts with the largest of logits + balance: (T, k)."""
    return (logits.detach() + balance).topk(top_k).indices


def gate_weights(logits: Tensor, chosen: Tensor) -> Tensor:
    """logits (T, E), chosen (T, k) -> gates (T, k).

    The softmax of the chosen logits; for k = 1, where that is 1 whatever the logit, the chosen expert's
    probability among all (Switch Transformer, arXiv 2101.03961, equation 2). Not by gather, whose gradient
    is wrong in compiled code (torch 2.13).
    """
    one_hot = F.one_hot(chosen, logits.shape[1])  # (T, k, E)
    if chosen.shape[1] == 1:
        return (one_hot * logits.softmax(dim=1)[:, None]).sum(2)
    return (one_hot * logits[:, None]).sum(2).softmax(dim=1)


def logits_gradient(logits: Tensor, chosen: Tensor, gates: Tensor, s: Tensor) -> Tensor:
    """Gradient of the logits (T, E) from s = gate · gradient of the gate, (T, k): gate_weights' backward."""
    if chosen.shape[1] == 1:
        return torch.zeros_like(logits).scatter_(1, chosen, s) - s * logits.softmax(dim=1)
    return torch.zeros_like(logits).scatter_(1, chosen, s - gates * s.sum(1, keepdim=True))
