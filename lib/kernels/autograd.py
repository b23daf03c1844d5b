"""Small functions whose backward is written by hand: step by step, each took a tenth of a small layer's time
on a CPU."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


class _NormalizeCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, core, gain, std):
        length = torch.linalg.vector_norm(core, dim=(-3, -2, -1), keepdim=True)
        rms = length / math.sqrt(math.prod(core.shape[-3:]))
        shrink = std / rms.clamp(min=std)
        scale = shrink if gain is None else shrink * gain
        ctx.save_for_backward(core, rms, shrink, scale)
        ctx.std, ctx.gain = std, gain is not None
        return core * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        core, rms, shrink, scale = ctx.saved_tensors
        dot = (grad * core).sum((-3, -2, -1), keepdim=True)  # autocast would compute vecdot in bfloat16
        # where it is normalized, the part of the gradient along the core vanishes
        along = dot / (rms.clamp(min=ctx.std).square() * math.prod(core.shape[-3:])) * (rms > ctx.std)
        dgain = dot * shrink if ctx.gain else None
        return (grad * scale).addcmul_(along * scale, core, value=-1), dgain, None


def normalize_core(core: Tensor, gain: Tensor | None, std: float) -> Tensor:
    """gain · M / max(1, rms(M) / std), the rms over the last three dimensions; gain: a number for each M."""
    return _NormalizeCore.apply(core, gain, std)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, place):
        ctx.save_for_backward(place)
        return x.index_select(0, order // place.shape[1])

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return F.embedding_bag(place, grad, mode="sum"), None, None


def dispatch(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """Rows of x (T, d), one for each of k assignments per token, in the order of their experts -> (T·k, d).

    `order` lists the assignments (token · k + choice) by expert; `place` (T, k) is its inverse. The gradient
    is a gather too: a token's k rows are read back and summed, which is deterministic and cheaper than
    scattered additions.
    """
    return _Dispatch.apply(x, order, place)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gates, order, place):
        ctx.save_for_backward(y, gates, order)
        gates = gates.to(y.dtype)
        return F.embedding_bag(place.view(gates.shape), y, per_sample_weights=gates, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        y, gates, order = ctx.saved_tensors
        rows = grad.index_select(0, order // gates.shape[1])
        # products of float16 could overflow
        products = rows.to(torch.promote_types(y.dtype, torch.float32)) * y
        dgates = torch.empty_like(gates).view(-1).index_copy_(0, order, products.sum(1).to(gates.dtype))
        return rows * gates.flatten()[order, None].to(rows.dtype), dgates.view(gates.shape), None, None


def combine(y: Tensor, gates: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """Rows y (T·k, d) in the order of experts and gates (T, k) -> Σ_k gate · row, (T, d). order, place: see
    dispatch."""
    return _Combine.apply(y, gates, order, place)


class _RouterLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, load):
        z = logits.logsumexp(dim=1, keepdim=True)
        p = (logits - z).exp()
        ctx.save_for_backward(p, z, load)
        tokens = max(1, len(p))  # without tokens both are 0
        return load.numel() / tokens * (p.sum(0) * load).sum(), z.square().sum() / tokens

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dswitch, dz):
        p, z, load = ctx.saved_tensors
        v = load * (dswitch * (load.numel() / max(1, len(p))))
        return p * (z * (dz * (2 / max(1, len(p)))) - (p * v).sum(1, keepdim=True) + v), None


def router_losses(logits: Tensor, load: Tensor) -> tuple[Tensor, Tensor]:
    """logits (T, E) and load (E,), the share of assignments to each expert, -> the switch and z losses, ()
    each.

    switch = E · Σ_e (mean probability of e) · load_e; z = mean over tokens of logsumexp(logits)².
    """
    return _RouterLosses.apply(logits, load)
