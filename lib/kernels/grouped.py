"""Products over expert segments: each row times the matrix of its own expert.

Rows that belong to the same expert lie next to each other; `ends[e]` is where expert e's rows end. Then

    grouped_product(x, w, ends)[n] = w[e(n)] @ x[n]        x (N, K), w (E, M, K) -> (N, M)

computes each row with its own expert's matrix and with no other: N·K·M multiply-adds, whatever the balance.
It serves experts with large matrices (dense, low rank, DYAD, and MLPs of these); einsums have
operators.py. On a GPU it is one product of E groups with its offsets on the device, on a CPU a loop.

The operators are registered with torch.library: torch.compile sees opaque calls whose shapes do not depend on
the routing.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def _segments(ends: Tensor):
    """(expert, start, stop) of every expert that has rows."""
    start = 0
    for e, stop in enumerate(ends.tolist()):
        if stop > start:
            yield e, start, stop
        start = stop


def loop_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """grouped_product as one product per expert."""
    y = x.new_empty(x.shape[0], w.shape[1])
    for e, i, j in _segments(ends):
        torch.mm(x[i:j], w[e].T, out=y[i:j])
    return y


def loop_product_grad_w(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """Gradient of grouped_product in w: (E, M, K); zero for an expert without rows."""
    dw = x.new_zeros(ends.numel(), dy.shape[1], x.shape[1])
    for e, i, j in _segments(ends):
        torch.mm(dy[i:j].T, x[i:j], out=dw[e])
    return dw


def _pad(x: Tensor) -> Tensor:
    """Zeros behind the last dimension: grouped_mm wants rows of a multiple of 16 bytes."""
    extra = -x.shape[-1] % (16 // x.element_size())
    return F.pad(x, (0, extra)) if extra else x.contiguous()


def one_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """grouped_product as one call of grouped_mm."""
    return F.grouped_mm(_pad(x), _pad(_pad(w).mT), offs=ends.to(torch.int32))[:, :w.shape[1]].contiguous()


def one_product_grad_w(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """Gradient of grouped_product in w, as one call of grouped_mm."""
    dw = F.grouped_mm(_pad(dy).mT, _pad(x), offs=ends.to(torch.int32))  # (E, M', K')
    return dw[:, :dy.shape[1], :x.shape[1]].contiguous()


@torch.library.custom_op("structured::grouped_product", mutates_args=())
def _grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return (loop_product if x.device.type == "cpu" else one_product)(x, w, ends)


@_grouped_product.register_fake
def _(x, w, ends):
    return x.new_empty(x.shape[0], w.shape[1])


@torch.library.custom_op("structured::grouped_product_grad_w", mutates_args=())
def _grouped_product_grad_w(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    return (loop_product_grad_w if x.device.type == "cpu" else one_product_grad_w)(x, dy, ends)


@_grouped_product_grad_w.register_fake
def _(x, dy, ends):
    return x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, w, ends = ctx.saved_tensors
    need_x, need_w, _ = ctx.needs_input_grad
    dx = _grouped_product(dy, w.mT, ends) if need_x else None
    dw = _grouped_product_grad_w(x, dy, ends) if need_w else None
    return dx, dw, None


_grouped_product.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.structured.grouped_product)
def _(x_shape, w_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * w_shape[1] * w_shape[2]


@register_flop_formula(torch.ops.structured.grouped_product_grad_w)
def _(x_shape, dy_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * dy_shape[1]


def grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """y[n] = w[e(n)] @ x[n], where expert e owns the rows ends[e - 1] <= n < ends[e].

    x (N, K), w (E, M, K), ends (E,) integers that rise to N -> (N, M). Takes part in autocast.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w = x.to(dtype), w.to(dtype)
    return _grouped_product(x, w, ends)
