"""The two-factor einsum on a CPU, with and without a mixture of experts.

An einsum is bound by memory traffic, not by arithmetic. So its rows go through both products in pieces that
stay in cache, with the intermediate z stored feature-major, (γ, ρφδ, rows), which is how the second product
wants to read it. For a mixture, tokens are taken in blocks, and a block's assignments are sorted by expert;
rows are gathered once and combined once per block. Letters are those of the contraction, as in
structured.Einsum.
"""
import contextlib
import ctypes
import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# state of the module, but memory alone: fresh pages cost more here than the products that fill them. A thread
# keeps it
_scratch = threading.local()


def _buffer(name: str, like: Tensor, *shape: int) -> Tensor:
    """Uninitialized memory of this shape, the same at every call from this thread: for use within one call
    only."""
    key, numel = f"{name} {like.dtype}", math.prod(shape)
    buffer = getattr(_scratch, key, None)
    if buffer is None or buffer.numel() < numel:
        with torch.inference_mode(False):  # or it would stay an inference tensor, unfit for training
            buffer = like.new_empty(numel)
        setattr(_scratch, key, buffer)
    return buffer[:numel].view(shape)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the precision of total."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


def _zeros(like: Tensor, shape) -> Tensor:
    """Zeros to sum gradients into: at least in float32."""
    return torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _gather(name: str, x: Tensor, tokens: Tensor) -> Tensor:
    """x[tokens] in scratch memory."""
    return torch.index_select(x, 0, tokens, out=_buffer(name, x, tokens.numel(), x.shape[1]))


def release_scratch() -> None:
    """Give back this thread's scratch memory."""
    _scratch.__dict__.clear()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the process, for programs that do the same thing over and over on a
    CPU.

    Otherwise large tensors are returned to the system when freed, and made of fresh pages every time, which
    can cost more than the products that fill them. Without glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


class _Layout:
    """How rows (n, d) lie for the two products of an einsum of these sizes.

    Copies between layouts are cheap if their fastest index stays the fastest. So where δ > 1 is that of the
    output, the rows of the second product are (n, δ) and go last, (φ, ε, nδ); where β > 1 is that of the
    input, those of the first are (n, β) and go last too, (γ, α, nβ). `gathered` rows are combined whole, and
    have to come first.
    """

    def __init__(self, sizes: list[int], swapped: bool, gathered: bool = False):
        self.sizes, self.swapped = sizes, swapped
        a, b, g, d, e, f, r = sizes
        self.d_in, self.d_out = a * b * g, d * e * f
        self.width = g * r * f * d * b  # entries of z per row
        piece = 2 ** 19 if gathered else 2 ** 18  # entries, at an even load
        self.rows = max(64, min(2048, piece // max(self.d_in, self.d_out, self.width)))
        self.by_delta = not swapped and d > 1 and not gathered
        self.by_beta = swapped and b > 1 and not gathered

    def block(self, num_experts: int, top_k: int) -> int:
        """Tokens that give each expert as many rows as a piece has, if the load is even."""
        return max(1, self.rows * num_experts // top_k)

    def first(self, x: Tensor) -> Tensor:
        """Left factor of the first product: (n, d_in) -> (γ, nβ, α)."""
        a, b, g, *_ = self.sizes
        if self.by_beta:
            return x.view(-1, g, a, b).permute(1, 2, 0, 3).reshape(g, a, -1).mT
        x = x.view(-1, g, a, b).mT if self.swapped else x.view(-1, g, b, a)
        return x.transpose(0, 1).reshape(g, -1, a)

    def first_product(self, x: Tensor, first: Tensor, z: Tensor) -> Tensor:
        """x · firstᵀ into the memory z: (γ, ρφδ, nβ), or (γ, nβ, ρφδ) by δ."""
        if self.by_delta:
            return torch.bmm(x, first.mT, out=z.view(first.shape[0], -1, first.shape[1]))
        return torch.bmm(first, x.mT, out=z.view(*first.shape[:2], -1))

    def second(self, z: Tensor) -> Tensor:
        """Left factor of the second product, from z: (φ, δn, γρβ), or (φ, nδ, γρβ) by δ; a view where β = δ =
        1."""
        a, b, g, d, e, f, r = self.sizes
        if self.by_delta:
            return z.view(g, -1, b, r, f, d).permute(4, 0, 3, 2, 1, 5).reshape(f, g * r * b, -1).mT
        return z.view(g, r, f, d, -1, b).permute(2, 3, 4, 0, 1, 5).reshape(f, -1, g * r * b)

    def last(self, y: Tensor) -> Tensor:
        """Result of the second product, from y: (n, d_out) -> (φ, δn, ε), or (φ, nδ, ε) by δ."""
        _, _, _, d, e, f, _ = self.sizes
        if self.by_delta:
            return y.view(-1, f, e, d).permute(1, 2, 0, 3).reshape(f, e, -1).mT
        y = y.view(-1, f, d, e) if self.swapped else y.view(-1, f, e, d).mT
        return y.permute(1, 2, 0, 3).reshape(f, -1, e)

    def second_product_back(self, dy: Tensor, second: Tensor) -> Tensor:
        """dy · second, as the gradient of `first`'s product: (γ, nβ, ρφδ), in the memory order of z."""
        a, b, g, d, e, f, r = self.sizes
        if self.by_beta:
            dz = torch.bmm(dy, second, out=_buffer("dz", dy, f, dy.shape[1], g * r * b))
            return dz.view(f, d, -1, g, r, b).permute(3, 4, 0, 1, 2, 5).reshape(g, r * f * d, -1).mT
        dz = torch.bmm(second.mT, dy.mT, out=_buffer("dz", dy, f, g * r * b, dy.shape[1]))
        if self.by_delta:
            return dz.view(f, g, r, b, -1, d).permute(1, 4, 3, 2, 0, 5).reshape(g, -1, r * f * d)
        dz = dz.view(f, g, r, b, d, -1).permute(1, 2, 0, 4, 5, 3)  # no copy at β = δ = ρ = 1
        return dz.reshape(g, r * f * d, -1).mT

    def store_inputs(self, dz: Tensor, first: Tensor, x: Tensor) -> None:
        """dz · first, (γ, nβ, α), into x (n, d_in): the way back of `first`."""
        a, b, g, *_ = self.sizes
        if self.by_beta:
            rows = torch.bmm(first.mT, dz.mT, out=_buffer("rows", x, g, a, dz.shape[1]))
            x.view(-1, g, a, b).copy_(rows.view(g, a, -1, b).permute(2, 0, 1, 3))
        else:
            rows = torch.bmm(dz, first, out=_buffer("rows", x, g, dz.shape[1], a))
            rows = rows.view(g, -1, b, a).transpose(0, 1)
            x.view(-1, g, a, b).mT.copy_(rows) if self.swapped else x.view(-1, g, b, a).copy_(rows)

    def store_outputs(self, z: Tensor, second: Tensor, y: Tensor) -> None:
        """z · secondᵀ, (φ, δn, ε), into y (n, d_out): the way back of `last`."""
        _, _, _, d, e, f, _ = self.sizes
        if self.by_delta:
            rows = torch.bmm(second, z.mT, out=_buffer("rows", y, f, e, z.shape[1]))
            y.view(-1, f, e, d).copy_(rows.view(f, e, -1, d).permute(2, 0, 1, 3))
        else:
            rows = torch.bmm(z, second.mT, out=_buffer("rows", y, f, z.shape[1], e))
            rows = rows.view(f, d, -1, e).permute(2, 0, 1, 3)
            y.view(-1, f, d, e).copy_(rows) if self.swapped else y.view(-1, f, e, d).mT.copy_(rows)

    def combine_inputs(self, rows: Tensor, block: "_Block") -> Tensor:
        """Sums over each token's assignments of what the pieces left as (γ, nβ, α): -> (tokens, d_in)."""
        a, b, g, *_ = self.sizes
        i, n, r = block.first_row, block.piece_rows, block.row
        index = _index(i * (g * b) + r * b, g, n * b, b, torch.ones_like(n))
        x = F.embedding_bag(index, rows.view(-1, a), mode="sum").view(-1, g, b, a)
        return (x.mT if self.swapped else x).reshape(-1, self.d_in)

    def combine_outputs(self, rows: Tensor, block: "_Block", gates: Tensor) -> Tensor:
        """Gated sums over each token's assignments of what the pieces left as (φ, δn, ε): -> (tokens,
        d_out)."""
        _, _, _, d, e, f, _ = self.sizes
        i, n, r = block.first_row, block.piece_rows, block.row
        index = _index(i * (f * d) + r, f, n * d, d, n)
        weights = gates[:, None].expand(-1, f * d, -1).reshape(index.shape)
        y = F.embedding_bag(index, rows.view(-1, e), per_sample_weights=weights, mode="sum").view(-1, f, d, e)
        return (y if self.swapped else y.mT).reshape(-1, self.d_out)


@torch.library.custom_op("structured::einsum", mutates_args=())
def _einsum(x: Tensor, first: Tensor, second: Tensor, sizes: list[int],
            swapped: bool) -> tuple[Tensor, Tensor]:
    to = _Layout(sizes, swapped)
    y, z = x.new_empty(x.shape[0], to.d_out), x.new_empty(x.shape[0], to.width)
    for xs, ys, zs in zip(x.split(to.rows), y.split(to.rows), z.split(to.rows)):
        zs = to.first_product(to.first(xs), first, zs)
        to.store_outputs(to.second(zs), second, ys)
    return y, z


@_einsum.register_fake
def _(x, first, second, sizes, swapped):
    to = _Layout(sizes, swapped)
    return x.new_empty(x.shape[0], to.d_out), x.new_empty(x.shape[0], to.width)


@torch.library.custom_op("structured::einsum_backward", mutates_args=())
def _einsum_backward(dy: Tensor, x: Tensor, z: Tensor, first: Tensor, second: Tensor, sizes: list[int],
                     swapped: bool) -> tuple[Tensor, Tensor, Tensor]:
    to = _Layout(sizes, swapped)
    dx, dfirst = torch.empty_like(x), _zeros(first, first.shape)
    dsecond = _zeros(second, second.mT.shape)  # transposed: the faster product
    for dys, xs, zs, dxs in zip(*(t.split(to.rows) for t in (dy, x, z, dx))):
        dys = to.last(dys)
        _add_product(dsecond, to.second(zs).mT, dys)
        dz = to.second_product_back(dys, second)
        _add_product(dfirst, dz.mT, to.first(xs))
        to.store_inputs(dz, first, dxs)
    return dx, dfirst.to(first.dtype), dsecond.mT.to(second.dtype).contiguous()


@_einsum_backward.register_fake
def _(dy, x, z, first, second, sizes, swapped):
    return x.new_empty(x.shape), first.new_empty(first.shape), second.new_empty(second.shape)


def _einsum_setup(ctx, inputs, output):
    x, first, second, ctx.sizes, ctx.swapped = inputs
    ctx.save_for_backward(x, output[1], first, second)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _einsum_autograd(ctx, dy, _):
    if dy is None:
        return (None,) * 5
    x, z, first, second = ctx.saved_tensors
    return *_einsum_backward(dy.contiguous(), x, z, first, second, ctx.sizes, ctx.swapped), None, None


_einsum.register_autograd(_einsum_autograd, setup_context=_einsum_setup)


def _einsum_flops(rows: int, sizes) -> int:
    """Both products."""
    a, b, g, d, e, f, r = sizes
    return 2 * rows * (g * b * a * r * f * d + f * d * e * g * r * b)


@register_flop_formula(torch.ops.structured.einsum)
def _(x_shape, first_shape, second_shape, sizes, *args, **kwargs) -> int:
    return _einsum_flops(x_shape[0], sizes)


@register_flop_formula(torch.ops.structured.einsum_backward)
def _(dy_shape, x_shape, z_shape, first_shape, second_shape, sizes, *args, **kwargs) -> int:
    return 2 * _einsum_flops(x_shape[0], sizes)


def einsum(x: Tensor, first: Tensor, second: Tensor, sizes, swapped) -> Tensor:
    """The einsum of two cores: x (T, d_in), first (γ, ρφδ, α), second (φ, ε, γρβ) -> (T, d_out).

    sizes are the seven of the contraction, swapped where B goes first. Takes part in autocast.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, first, second = x.to(dtype), first.to(dtype), second.to(dtype)
    return _einsum(x.contiguous(), first, second, list(sizes), swapped)[0]


def _index(base: Tensor, outer: int, outer_step: Tensor, inner: int, inner_step: Tensor) -> Tensor:
    """base (tokens, k) + o · outer_step + i · inner_step -> (tokens · outer · inner, k)."""
    o = torch.arange(outer, dtype=base.dtype)[:, None]
    index = torch.addcmul(base[:, None], o, outer_step[:, None])  # (tokens, outer, k)
    if inner > 1:
        i = torch.arange(inner, dtype=base.dtype)[:, None]
        index = torch.addcmul(index[:, :, None], i, inner_step[:, None, None])
    return index.view(-1, base.shape[1])


class _Block:
    """A block of tokens with its assignments sorted by expert; an assignment is token · k + choice within the
    block.

    order (n · k,): the assignments by expert; token: those of the sorted rows. pieces: (expert, first row,
    last row) in order, of at most `most` rows. For each assignment, (n, k): its row within its piece, the
    piece's first row and its rows.
    """

    def __init__(self, chosen: Tensor, start: int, num_experts: int, most: int):
        (n, k), experts = chosen.shape, chosen.flatten()
        # cheaper than a sort
        seen = (experts == torch.arange(num_experts)[:, None]).cumsum(1, dtype=torch.int32)
        counts = seen[:, -1]
        starts = counts.cumsum(0, dtype=torch.int32) - counts
        row, first = seen.gather(0, experts[None])[0] - 1, starts[experts]
        self.order = torch.empty_like(experts).scatter_(0, (first + row).long(), torch.arange(n * k))
        self.token = self.order // k + start
        self.tokens = slice(start, start + n)
        rows = [(e, i, i + c) for e, (i, c) in enumerate(zip(starts.tolist(), counts.tolist())) if c]
        self.pieces = [(e, i, min(i + most, last))
                       for e, begin, last in rows for i in range(begin, last, most)]
        count = counts[experts]
        if len(self.pieces) > len(rows):  # an expert's rows are in several pieces
            before = row // most * most
            row, first, count = row - before, first + before, (count - before).clamp(max=most)
        self.row, self.first_row, self.piece_rows = (t.view(n, k) for t in (row, first, count))


def _blocks(chosen: Tensor, num_experts: int, size: int, rows: int):
    """Blocks of `size` tokens, with pieces of at most 2 · rows rows."""
    for start in range(0, chosen.shape[0], size):
        yield _Block(chosen[start:start + size], start, num_experts, 2 * rows)


def _choose(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row of scores (T, E), in falling order: (T, k). For so few, faster than topk;
    scores is lost."""
    chosen = torch.empty(scores.shape[0], k, dtype=torch.int64)
    for j in range(k):
        torch.argmax(scores, dim=1, out=chosen[:, j])
        scores.scatter_(1, chosen[:, j:j + 1], -math.inf)
    return chosen


def _place(whole: Tensor | None, part: Tensor, rows: slice, total: int) -> Tensor:
    """Put a block's result into its rows of the whole, which is made with the first; one that is all of it is
    taken as it is."""
    if len(part) == total:
        return part
    whole = part.new_empty(total, part.shape[1]) if whole is None else whole
    whole[rows] = part
    return whole


@torch.library.custom_op("structured::routed_einsum", mutates_args=())
def _routed_einsum(x: Tensor, router: Tensor, balance: Tensor, first: Tensor, second: Tensor, top_k: int,
                   sizes: list[int], swapped: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to = _Layout(sizes, swapped, gathered=True)
    T, E, (*_, d, e_, f, _) = x.shape[0], router.shape[0], sizes
    size = to.block(E, top_k)
    logits = router.new_empty(T, E)
    for xs, part in zip(x.split(size), logits.split(size)):
        torch.mm(xs.to(router.dtype), router.T, out=part)
    x = x.to(first.dtype)  # the router has seen it as it was
    y, z = None, x.new_empty(T * top_k, to.width)
    chosen = _choose(logits + balance, top_k)
    gates = logits.gather(1, chosen).softmax(1).to(x.dtype)
    for block in _blocks(chosen, E, size, to.rows):
        rows = _buffer("rows", x, block.order.numel(), to.d_out)
        z_block = z[block.tokens.start * top_k:block.tokens.stop * top_k]
        for e, i, j in block.pieces:
            zs = to.first_product(to.first(_gather("x", x, block.token[i:j])), first[e], z_block[i:j])
            torch.bmm(to.second(zs), second[e].mT, out=rows[i:j].view(f, d * (j - i), e_))
        y = _place(y, to.combine_outputs(rows, block, gates[block.tokens]), block.tokens, T)
    return x.new_empty(T, to.d_out) if y is None else y, logits, chosen, z


@_routed_einsum.register_fake
def _(x, router, balance, first, second, top_k, sizes, swapped):
    T, to = x.shape[0], _Layout(sizes, swapped)
    return (first.new_empty(T, to.d_out), router.new_empty(T, router.shape[0]),
            x.new_empty(T, top_k, dtype=torch.int64), first.new_empty(T * top_k, to.width))


@torch.library.custom_op("structured::routed_einsum_backward", mutates_args=())
def _routed_einsum_backward(dy: Tensor, dlogits: Tensor, x: Tensor, logits: Tensor, chosen: Tensor, z: Tensor,
                            router: Tensor, first: Tensor, second: Tensor, sizes: list[int],
                            swapped: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to = _Layout(sizes, swapped, gathered=True)
    a, b, g, d, e_, f, r = sizes
    E, k = router.shape[0], chosen.shape[1]
    gates, x_seen, x = logits.gather(1, chosen).softmax(1), x, x.to(first.dtype)
    dx, drouter = None, torch.zeros_like(router)
    dfirst, dsecond = _zeros(first, first.shape), _zeros(second, second.mT.shape)
    for block in _blocks(chosen, E, to.block(E, k), to.rows):
        tokens = block.tokens
        rows = _buffer("rows", x, block.order.numel(), to.d_in)
        z_block = z[tokens.start * k:tokens.stop * k]
        gate = gates[tokens].view(-1)[block.order].to(x.dtype)
        dgate = logits.new_empty(block.order.numel())  # times the gate
        for e, i, j in block.pieces:
            n = j - i
            zs = z_block[i:j].view(g, r * f * d, n * b)
            dys = to.last(_gather("dy", dy, block.token[i:j]).mul_(gate[i:j, None]))
            dz = to.second_product_back(dys, second[e]).mT
            products = torch.mul(zs, dz, out=_buffer("z · dz", x, *zs.shape)).view(-1, n, b)
            torch.sum(products, (0, 2), dtype=dgate.dtype, out=dgate[i:j])
            torch.bmm(dz.mT, first[e], out=rows[i:j].view(g, n * b, a))
            _add_product(dsecond[e], to.second(zs).mT, dys)
            _add_product(dfirst[e], dz, to.first(_gather("x", x, block.token[i:j])))
        # softmax's backward: gate · (dgate - Σ gate · dgate)
        dgates = torch.empty_like(dgate).index_copy_(0, block.order, dgate).view(-1, k)
        dgates = dgates - gates[tokens] * dgates.sum(1, keepdim=True)
        dlogit = dlogits[tokens].scatter_add(1, chosen[tokens], dgates)
        drouter.addmm_(dlogit.T, x_seen[tokens].to(router.dtype))
        part = to.combine_inputs(rows, block).to(x_seen.dtype)
        dx = _place(dx, part.addmm_(dlogit.to(part.dtype), router.to(part.dtype)), tokens, len(x))
    dx = torch.empty_like(x_seen) if dx is None else dx  # no rows
    return dx, drouter, dfirst.to(first.dtype), dsecond.mT.to(second.dtype).contiguous()


@_routed_einsum_backward.register_fake
def _(dy, dlogits, x, logits, chosen, z, router, first, second, sizes, swapped):
    return tuple(torch.empty_like(t) for t in (x, router, first, second))


def _routed_einsum_setup(ctx, inputs, output):
    x, router, _, first, second, _, ctx.sizes, ctx.swapped = inputs
    _, logits, chosen, z = output
    ctx.save_for_backward(x, logits, chosen, z, router, first, second)
    ctx.mark_non_differentiable(chosen, z)
    ctx.set_materialize_grads(False)  # a gradient of zeros for z would be large


def _routed_einsum_autograd(ctx, dy, dlogits, *_):
    x, logits, *_ = ctx.saved_tensors
    if dy is None and dlogits is None:
        return (None,) * 8
    if dy is None:
        dy = ctx.saved_tensors[-1].new_zeros(x.shape[0], _Layout(ctx.sizes, ctx.swapped).d_out)
    dlogits = torch.zeros_like(logits) if dlogits is None else dlogits
    dx, drouter, dfirst, dsecond = _routed_einsum_backward(
        dy.contiguous(), dlogits.contiguous(), *ctx.saved_tensors, ctx.sizes, ctx.swapped)
    return dx, drouter, None, dfirst, dsecond, None, None, None


_routed_einsum.register_autograd(_routed_einsum_autograd, setup_context=_routed_einsum_setup)


def _routed_flops(tokens: int, router_shape, top_k: int, sizes) -> int:
    """The router's product and the experts'."""
    return 2 * tokens * math.prod(router_shape) + _einsum_flops(tokens * top_k, sizes)


@register_flop_formula(torch.ops.structured.routed_einsum)
def _(x_shape, router_shape, balance_shape, first_shape, second_shape, top_k, sizes, *args, **kwargs) -> int:
    return _routed_flops(x_shape[0], router_shape, top_k, sizes)


@register_flop_formula(torch.ops.structured.routed_einsum_backward)
def _(dy_shape, dlogits_shape, x_shape, logits_shape, chosen_shape, z_shape, router_shape, first_shape,
      second_shape, sizes, *args, **kwargs) -> int:
    return 2 * _routed_flops(x_shape[0], router_shape, chosen_shape[1], sizes)


def routed_einsum(x: Tensor, router: Tensor, balance: Tensor, first: Tensor, second: Tensor, top_k: int,
                  sizes, swapped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A mixture of einsums, router included: y[t] = Σ_{e in chosen[t]} g_e · W[e] x[t], g their logits'
    softmax.

    x (T, d_in), router (E, d_in) and balance (E,) in at least float32, first (E, γ, ρφδ, α), second (E, φ, ε,
    γρβ), sizes the seven of the contraction, swapped where B goes first. Chosen are the top_k of x · routerᵀ
    + balance.
    -> y (T, d_out), logits x · routerᵀ (T, E), chosen (T, top_k). Takes part in autocast.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        first, second = first.to(dtype), second.to(dtype)
    return _routed_einsum(x.contiguous(), router, balance, first, second, top_k, list(sizes), swapped)[:3]
