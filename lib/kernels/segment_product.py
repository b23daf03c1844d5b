"""Products over expert segments: each row times the matrix of its own expert.

Rows that belong to the same expert lie next to each other; `ends[e]` is where expert e's rows end. Then

    segment_product(x, w, ends)[b, n] = w[e(n), b] @ x[b, n]        x (B, N, K), w (E, B, M, K) -> (B, N, M)

computes each row with its own expert's matrix and with no other: N·B·K·M multiply-adds, whatever the balance.
On a GPU it serves every mixture, as one grouped product with its offsets on the device, so that nothing waits
for the host; on a CPU it is a loop over segments, and serves what is no einsum of two cores: those have
cpu_einsum.py.

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
    """segment_product as one batched product per expert."""
    y = x.new_empty(x.shape[0], x.shape[1], w.shape[2])
    for e, i, j in _segments(ends):
        y[:, i:j] = torch.bmm(x[:, i:j], w[e].mT)
    return y


def loop_product_grad_w(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """Gradient of segment_product in w: (E, B, M, K); zero for an expert without rows."""
    dw = x.new_zeros(ends.numel(), x.shape[0], dy.shape[2], x.shape[2])
    for e, i, j in _segments(ends):
        torch.bmm(dy[:, i:j].mT, x[:, i:j], out=dw[e])
    return dw


def _pad_to(x: Tensor, multiple: int) -> Tensor:
    """Zeros behind the last dimension: grouped_mm wants rows of a multiple of 16 bytes."""
    extra = -x.shape[-1] % multiple
    return F.pad(x, (0, extra)) if extra else x.contiguous()


def _group_ends(ends: Tensor, B: int, N: int) -> Tensor:
    """Ends of the B·E groups (b, e) among the B·N rows (b, n)."""
    first = torch.arange(B, device=ends.device, dtype=ends.dtype) * N
    return (first[:, None] + ends).flatten().to(torch.int32)


def grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """segment_product as one grouped product over B·E groups."""
    (B, N, K), (E, _, M, _) = x.shape, w.shape
    multiple = 16 // x.element_size()
    rows = _pad_to(x.reshape(B * N, K), multiple)
    mats = _pad_to(_pad_to(w.transpose(0, 1).reshape(B * E, M, K), multiple).mT, multiple)  # (B·E, K', M')
    return F.grouped_mm(rows, mats, offs=_group_ends(ends, B, N))[:, :M].reshape(B, N, M)


def grouped_product_grad_w(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """Gradient of segment_product in w, as one grouped product."""
    (B, N, K), M, E = x.shape, dy.shape[2], ends.numel()
    multiple = 16 // x.element_size()
    left = _pad_to(dy.reshape(B * N, M), multiple)
    right = _pad_to(x.reshape(B * N, K), multiple)
    dw = F.grouped_mm(left.mT, right, offs=_group_ends(ends, B, N))  # (B·E, M', K')
    return dw[:, :M, :K].reshape(B, E, M, K).transpose(0, 1).contiguous()


@torch.library.custom_op("structured::segment_product", mutates_args=())
def _segment_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return (loop_product if x.device.type == "cpu" else grouped_product)(x, w, ends)


@_segment_product.register_fake
def _(x, w, ends):
    return x.new_empty(x.shape[0], x.shape[1], w.shape[2])


@torch.library.custom_op("structured::segment_product_grad_w", mutates_args=())
def _segment_product_grad_w(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    return (loop_product_grad_w if x.device.type == "cpu" else grouped_product_grad_w)(x, dy, ends)


@_segment_product_grad_w.register_fake
def _(x, dy, ends):
    return x.new_empty(ends.shape[0], x.shape[0], dy.shape[2], x.shape[2])


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, w, ends = ctx.saved_tensors
    need_x, need_w, _ = ctx.needs_input_grad
    dx = _segment_product(dy, w.mT, ends) if need_x else None
    dw = _segment_product_grad_w(x, dy, ends) if need_w else None
    return dx, dw, None


_segment_product.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.structured.segment_product)
def _(x_shape, w_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * w_shape[2] * w_shape[3]


@register_flop_formula(torch.ops.structured.segment_product_grad_w)
def _(x_shape, dy_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * x_shape[2] * dy_shape[2]


def segment_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """y[b, n] = w[e(n), b] @ x[b, n], where expert e owns the rows ends[e - 1] <= n < ends[e].

    x (B, N, K), w (E, B, M, K), ends (E,) integers that rise to N -> (B, N, M). Takes part in autocast.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w = x.to(dtype), w.to(dtype)
    return _segment_product(x, w, ends)
