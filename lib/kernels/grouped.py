"""Products over expert segments: each row times the matrix of its own expert.

Rows that belong to the same expert lie next to each other; `ends[e]` is where expert e's rows end. Then

    grouped_product(x, w, ends)[n] = w[e(n)] @ x[n]        x (N, K), w (E, M, K) -> (N, M)

computes each row with its own expert's matrix and with no other: N·K·M multiply-adds, whatever the balance.
It serves experts with large matrices (dense, low rank, DYAD, and MLPs of these); einsums have
operators.py. There are two routes:

    one launch  F.grouped_mm with the offsets on the device: bfloat16 on GPUs of compute capability 9.x and
                10.x. Elsewhere PyTorch's grouped_mm is itself a loop that reads the offsets back.
    a loop      one product per expert with rows; the offsets are read back once, for a product and its two
                gradients: the GPU waits for a few launches, which costs less than gathering a matrix for
                each tile of rows.

The operators are registered with torch.library: torch.compile sees opaque calls whose shapes do not depend on
the routing.
"""
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lib.kernels.routing import autocast_dtype

MOST_GROUPS = 1023  # of one call of grouped_mm on a GPU


def is_one_launch(x: Tensor, groups: int) -> bool:
    """Whether grouped_mm is one kernel, which reads its offsets on the device, for rows like x."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or groups > MOST_GROUPS:
        return False
    if torch.version.hip is not None or sys.platform == "win32":  # ROCm numbers its GPUs in its own way
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _segments(ends: Tensor):
    """(expert, start, stop) of every expert that has rows."""
    start = 0
    for e, stop in enumerate(ends.tolist()):
        if stop > start:
            yield e, start, stop
        start = stop


def loop_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """grouped_product as one product per expert. On a GPU ends (E,) should be on the host."""
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
    """Zeros behind the last dimension: grouped_mm needs rows of a multiple of 16 bytes that begin at one."""
    extra = -x.shape[-1] % (16 // x.element_size())
    x = F.pad(x, (0, extra)) if extra else x.contiguous()
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x


def one_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """grouped_product as one call of grouped_mm."""
    rows = w.shape[1]
    if not len(x):
        return x.new_empty(0, rows)
    if any(size * w.element_size() % 16 for size in w.shape[1:]):
        w = _pad(_pad(w.mT).mT)
    elif not w.mT.is_contiguous():  # in a backward it is, since w is a transpose there
        w = _pad(w)
    return F.grouped_mm(_pad(x), w.mT, offs=ends.to(torch.int32))[:, :rows].contiguous()


def one_product_grad_w(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """Gradient of grouped_product in w, as one call of grouped_mm."""
    if not len(x):
        return x.new_zeros(len(ends), dy.shape[1], x.shape[1])
    dw = F.grouped_mm(_pad(dy).mT, _pad(x), offs=ends.to(torch.int32))  # (E, M', K')
    # for an expert without rows the kernel may leave memory as it finds it
    has_rows = (ends.diff(prepend=ends.new_zeros(1)) > 0)[:, None, None]
    return torch.where(has_rows, dw[:, :dy.shape[1], :x.shape[1]], 0)


@torch.library.custom_op("structured::grouped_product", mutates_args=())
def _grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """grouped_product, and ends on the host for the gradients; nothing for those of one launch."""
    if is_one_launch(x, len(ends)):
        return one_product(x, w, ends), ends.new_empty(0, device="cpu")
    on_host = ends.to("cpu", copy=True)  # the one transfer
    return loop_product(x, w, on_host), on_host


@_grouped_product.register_fake
def _(x, w, ends):
    on_host = ends.new_empty(0 if is_one_launch(x, len(ends)) else ends.shape[0], device="cpu")
    return x.new_empty(x.shape[0], w.shape[1]), on_host


@torch.library.custom_op("structured::grouped_product_grad_w", mutates_args=())
def _grouped_product_grad_w(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    return (one_product_grad_w if is_one_launch(x, len(ends)) else loop_product_grad_w)(x, dy, ends)


@_grouped_product_grad_w.register_fake
def _(x, dy, ends):
    return x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):
    x, w, ends, on_host = ctx.saved_tensors
    need_x, need_w, _ = ctx.needs_input_grad
    ends = ends if is_one_launch(x, len(ends)) else on_host
    dx = _grouped_product(dy, w.mT, ends)[0] if need_x else None
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
    if dtype := autocast_dtype(x):
        x, w = x.to(dtype), w.to(dtype)
    return _grouped_product(x, w, ends)[0]
