"""The einsum operator in plain PyTorch: any device and float type. The reference for the other bodies.

Letters are those of the contraction (structured.py), where the first core comes first:
    a α   b β   g γ   d δ   e ε   f φ   r ρ;  t tiles of P rows, N = t · P
    x[g, b, a] and y[f, d, e] of a row; swapped: x[g, a, b], and otherwise y[f, e, d]
    first (E, g, rfd, a)    second (E, f, e, grb)

Three primitives make the six products of a layer: rows_to_z and z_to_rows (x -> z -> y, and dy -> dz -> dx
with the cores' roles exchanged), and core_gradient. z has its features first, (..., rfd, Pb), so that
rearranging it for the second core copies along the rows, and needs no copy for one matrix with b = d = 1.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.kernels.plan import Plan, make_plan, tile_rows
from lib.kernels.routing import choose, gate_weights, logits_gradient, router_logits


def _layouts(sizes, swapped: bool) -> tuple[tuple, tuple]:
    """(group, repeated, multiplied, turned) of the rows of x and of y: see _rows."""
    a, b, g, d, e, f, _ = sizes
    return (g, b, a, swapped), (f, d, e, not swapped)


def _rows(x: Tensor, tiles: int, layout: tuple) -> Tensor:
    """x (N, gba) -> (t, g, Pb, a), and with y's layout (N, fde) -> (t, f, Pd, e); turned: x[g, a, b]."""
    g, b, a, turned = layout
    x = x.view(tiles, -1, g, a, b).mT if turned else x.view(tiles, -1, g, b, a)
    x = x.transpose(1, 2).reshape(tiles, g, -1, a)
    return x if tiles == 1 else x.contiguous()  # else each of two products would copy it


def _rows_back(x: Tensor, layout: tuple) -> Tensor:
    """The way back of _rows: (t, g, Pb, a) -> (N, gba)."""
    g, b, a, turned = layout
    x = x.view(x.shape[0], g, -1, b, a).transpose(1, 2)
    return (x.mT if turned else x).reshape(-1, g * b * a).contiguous()  # where a = b = 1 it is a view


def _z_for_second(z: Tensor, sizes) -> Tensor:
    """z (t, g, rfd, Pb) -> (t, f, grb, Pd)."""
    a, b, g, d, e, f, r = sizes
    z = z.view(z.shape[0], g, r, f, d, -1, b).permute(0, 3, 1, 2, 6, 5, 4)  # (t, f, g, r, b, P, d)
    return z.reshape(z.shape[0], f, g * r * b, -1)


def _z_for_first(z: Tensor, sizes) -> Tensor:
    """The way back of _z_for_second: (t, f, grb, Pd) -> (t, g, rfd, Pb)."""
    a, b, g, d, e, f, r = sizes
    z = z.view(z.shape[0], f, g, r, b, -1, d).permute(0, 2, 3, 1, 6, 5, 4)  # (t, g, r, f, d, P, b)
    return z.reshape(z.shape[0], g, r * f * d, -1)


def rows_to_z(rows: Tensor, core: Tensor) -> Tensor:
    """rows (t, groups, n, K), each tile's core (t, groups, M, K) -> (t, groups, M, n)."""
    return core @ rows.mT


def z_to_rows(z: Tensor, core: Tensor) -> Tensor:
    """z (t, groups, M, n), each tile's core (t, groups, K, M) -> (t, groups, n, K)."""
    return z.mT @ core.mT


def core_gradient(left: Tensor, right: Tensor, tile_expert: Tensor, like: Tensor) -> Tensor:
    """left (t, groups, M, n), right (t, groups, n, K) -> (E, groups, M, K), summed over an expert's tiles.

    The sum over tiles is a product with a one-hot matrix, in at least float32: deterministic, no atomics.
    """
    tiles = left @ right  # (t, groups, M, K)
    if len(like) == 1 and len(tiles) == 1:
        return tiles.to(like.dtype)
    dtype = torch.promote_types(tiles.dtype, torch.float32)
    one_hot = (tile_expert == torch.arange(len(like), device=tiles.device)[:, None]).to(dtype)  # (E, t)
    return (one_hot @ tiles.flatten(1).to(dtype)).view(like.shape).to(like.dtype)


def _plan(first: Tensor, experts: Tensor | None) -> Plan | None:
    """None: one matrix, whose rows are one tile."""
    if experts is None:
        return None
    return make_plan(experts, len(first), tile_rows(experts.numel(), len(first)))


def _take(t: Tensor, plan: Plan | None) -> Tensor:
    """The rows (N, d) of a plan from those of tokens (T, d)."""
    return t if plan is None else t.index_select(0, plan.row_token)


def _cores(plan: Plan | None, *cores: Tensor) -> list[Tensor]:
    """The cores of each tile."""
    return list(cores) if plan is None else [core.index_select(0, plan.tile_expert) for core in cores]


def _sum_over_choices(rows: Tensor, plan: Plan | None, gates: Tensor | None = None) -> Tensor:
    """rows (N, d), gates (T, k) -> (T, d): the sum of a token's rows, times their gates."""
    if plan is None:
        return rows
    if gates is not None:
        gates = gates.to(rows.dtype)
    return F.embedding_bag(plan.place, rows, per_sample_weights=gates, mode="sum")


def forward(x, first, second, router, balance, experts, top_k, sizes, swapped, logits=None):
    """See operators.einsum."""
    if router is not None:
        logits = router_logits(x, router)
    chosen = experts if logits is None else choose(logits, balance, top_k)
    x = x.to(first.dtype)  # the router has seen it as it was
    plan = _plan(first, chosen)
    tiles = 1 if plan is None else len(plan.tile_expert)
    w1, w2 = _cores(plan, first, second)
    of_x, of_y = _layouts(sizes, swapped)
    z = rows_to_z(_rows(_take(x, plan), tiles, of_x), w1)
    rows = _rows_back(z_to_rows(_z_for_second(z, sizes), w2), of_y)
    gates = None if logits is None else gate_weights(logits, chosen)
    return _sum_over_choices(rows, plan, gates), logits, chosen


def backward(dy, dlogits, x, first, second, router, experts, logits, chosen, sizes, swapped):
    """See operators.einsum; the last result is the gradient of the router, or of logits that were given.

    z is computed again: that takes less memory than to keep it.
    """
    x_seen, x = x, x.to(first.dtype)
    plan = _plan(first, experts if logits is None else chosen)
    tiles = 1 if plan is None else len(plan.tile_expert)
    w1, w2 = _cores(plan, first, second)
    of_x, of_y = _layouts(sizes, swapped)
    xs = _rows(_take(x, plan), tiles, of_x)  # (t, g, Pb, a)
    dys = _take(dy, plan)
    if plan is not None:
        gates = dy.new_ones(plan.place.shape) if logits is None else gate_weights(logits, chosen)
        row_gate = F.pad(gates.flatten(), (0, 1)).index_select(0, plan.row_choice)  # 0 in padding rows
        dys = dys * row_gate[:, None].to(dys.dtype)
    dys = _rows(dys, tiles, of_y)  # (t, f, Pd, e)
    z = _z_for_second(rows_to_z(xs, w1), sizes)  # (t, f, grb, Pd)
    tile_expert = None if plan is None else plan.tile_expert
    dsecond = core_gradient(dys.mT, z.mT, tile_expert, second)
    dz = _z_for_first(rows_to_z(dys, w2.mT), sizes)  # (t, g, rfd, Pb)
    dfirst = core_gradient(dz, xs, tile_expert, first)
    dx_rows = z_to_rows(dz, w1.mT)  # (t, g, Pb, a)
    dx = _sum_over_choices(_rows_back(dx_rows, of_x), plan).to(x_seen.dtype)
    if logits is None:
        return dx, dfirst, dsecond, None
    # gate · its gradient is the product of a row's input with the input's gradient; float16 could overflow
    s = _rows_back(dx_rows.to(logits.dtype) * xs, of_x).sum(1, dtype=logits.dtype)[plan.place]  # (T, k)
    dlogit = logits_gradient(logits, chosen, gates, s)
    if dlogits is not None:
        dlogit = dlogit + dlogits
    if router is None:
        return dx, dfirst, dsecond, dlogit
    return dx + (dlogit @ router).to(dx.dtype), dfirst, dsecond, dlogit.T @ x_seen.to(router.dtype)
