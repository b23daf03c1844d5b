"""The einsum of two cores as one operator of torch.library, with and without experts and their router.

The operator is opaque to torch.compile and its shapes do not depend on the routing. The backward computes z,
the result of the first product, again. Its body is chosen when it runs (use_kernel):

    c       on CPUs, in float32 and float64: einsum.c, if it can be compiled
    triton  on CUDA (not ROCm) from capability 8.0 on, in bfloat16, float16 and float32
    torch   everywhere, in every type
"""
import functools
import importlib.util
import os

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from lib.kernels import c_body, torch_body
from lib.kernels.routing import autocast_dtype

KERNELS = ("auto", "torch", "c", "triton")
FEW = 16  # tokens up to which a call without gradients goes to the body directly
_kernel = "auto"  # of use_kernel


@functools.cache
def _bodies():
    """The modules, {name: body}; triton where it is installed."""
    bodies = {"torch": torch_body, "c": c_body}
    if importlib.util.find_spec("triton"):
        from lib.kernels import triton_body
        bodies["triton"] = triton_body
    return bodies


def is_available(name: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a body computes einsums of this type on this device."""
    if name == "c":
        return device_type == "cpu" and dtype in c_body.MACROS and c_body.library(dtype) is not None
    if name == "triton":
        there = (device_type == "cuda" and _has_tensor_cores() or
                 device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
        return there and "triton" in _bodies() and dtype in _bodies()["triton"].DTYPES
    return True


@functools.cache
def _has_tensor_cores() -> bool:
    """Whether the GPU, if one can be asked, is one for the Triton body: NVIDIA's from capability 8.0 on."""
    if torch.version.hip:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def use_kernel(name: str, device_type: str, dtype: str) -> None:
    """The body that computes einsums from here on, of KERNELS. Calls of a type that it lacks go to torch.

    Raises ValueError, in one sentence, where it does not compute this type ('float32' ...) on this device.
    """
    global _kernel
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {name!r}")
    if name != "auto" and not is_available(name, device_type, getattr(torch, dtype)):
        where = dict(c="on CPUs, with a C compiler, in float32",
                     triton="on NVIDIA GPUs of compute capability 8.0 or more, with Triton")
        raise ValueError(f"kernel {name!r} does not compute {dtype} on {device_type}: it works {where[name]};"
                         " 'auto' takes one that does")
    if name == "triton" and (device_type == "cpu" or torch.cuda.is_available()):
        try:
            _bodies()["triton"].try_out(device_type, getattr(torch, dtype))
        except Exception as e:
            raise ValueError(f"kernel 'triton' does not work here ({(str(e) or repr(e)).splitlines()[0]}): "
                             "Triton needs a C compiler and Python's headers; 'auto' does without") from None
    _kernel = name


def body_name(device_type: str, dtype: torch.dtype) -> str:
    """The body that computes einsums of this type on this device. 'auto' is torch on CUDA until a measurement
    in results/ shows where triton wins."""
    name = _kernel
    if name == "auto":
        name = "c" if device_type == "cpu" else "torch"
    return name if is_available(name, device_type, dtype) else "torch"


def describe_body(device_type: str, dtype: str) -> str:
    """For a program's first lines, with dtype 'float32' or another: 'c (vectors of 512 bits)' or 'torch'."""
    dtype = getattr(torch, dtype)
    name = body_name(device_type, dtype)
    return f"c (vectors of {c_body.library(dtype).vector_bits()} bits)" if name == "c" else name


def _body(name: str, logits_given: bool, x: Tensor, first: Tensor, *others: Tensor | None):
    """The body of a call on these tensors; name: '', or the one to take; logits_given: no router."""
    if not name:
        name = body_name(x.device.type, first.dtype)
        types = {tensor.dtype for tensor in (x, first, *others) if tensor is not None}
        if name == "c" and (logits_given or len(types) > 1):
            name = "torch"  # einsum.c takes one type in all, and computes the logits itself
    return _bodies()[name]


def computes_logits(x: Tensor) -> bool:
    """Whether the body of a mixture that reads x computes the router's logits itself: c does, so this is true
    on a CPU, even if einsum.c could not be compiled. torch.compile traces this."""
    dtype = autocast_dtype(x) or x.dtype
    return x.device.type == "cpu" and _kernel in ("auto", "c") and dtype in (torch.float32, torch.float64)


def _empty_outputs(x: Tensor, first: Tensor, router: Tensor | None, top_k: int, sizes, given: Tensor | None):
    """y, logits and chosen of the operator's shapes and types, with nothing in them."""
    y = first.new_empty(x.shape[0], sizes[3] * sizes[4] * sizes[5])
    logits = x.new_empty(0) if router is None else router.new_empty(x.shape[0], router.shape[0])
    routed = router is not None or given is not None
    return y, logits, x.new_empty((x.shape[0], top_k) if routed else 0, dtype=torch.int64)


@torch.library.custom_op("structured::einsum", mutates_args=())
def _einsum(x: Tensor, first: Tensor, second: Tensor, router: Tensor | None, balance: Tensor | None,
            experts: Tensor | None, top_k: int, sizes: list[int], swapped: bool, body: str,
            given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if not len(x):
        return _empty_outputs(x, first, router, top_k, sizes, given)
    y, logits, chosen = _body(body, given is not None, x, first, second, router, balance).forward(
        x, first, second, router, balance, experts, top_k, sizes, swapped,
        *([] if given is None else [given]))
    # an operator must return tensors, none of them an input
    return (y, x.new_empty(0) if router is None else logits,
            chosen if balance is not None else x.new_empty(0, dtype=torch.int64))


@_einsum.register_fake
def _(x, first, second, router, balance, experts, top_k, sizes, swapped, body, given=None):
    return _empty_outputs(x, first, router, top_k, sizes, given)


@torch.library.custom_op("structured::einsum_backward", mutates_args=())
def _einsum_backward(dy: Tensor, dlogits: Tensor | None, x: Tensor, first: Tensor, second: Tensor,
                     router: Tensor | None, experts: Tensor | None, logits: Tensor, chosen: Tensor,
                     sizes: list[int], swapped: bool, body: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not len(x):
        drouter = torch.zeros_like(logits if router is None else router)
        return torch.empty_like(x), torch.zeros_like(first), torch.zeros_like(second), drouter
    logits_given = router is None and len(logits) > 0
    if router is None and not logits_given:
        logits, chosen = None, experts
    dx, dfirst, dsecond, drouter = _body(
        body, logits_given, x, first, second, router, logits, dy).backward(
        dy, dlogits, x, first, second, router, experts, logits, chosen, sizes, swapped)
    return dx, dfirst, dsecond, x.new_empty(0) if drouter is None else drouter


@_einsum_backward.register_fake
def _(dy, dlogits, x, first, second, router, experts, logits, chosen, sizes, swapped, body):
    drouter = torch.empty_like(logits if router is None else router)  # without either, logits are empty
    return torch.empty_like(x), torch.empty_like(first), torch.empty_like(second), drouter


def _setup(ctx, inputs, output):
    x, first, second, router, _, experts, _, ctx.sizes, ctx.swapped, ctx.body, given = inputs
    y, logits, chosen = output
    ctx.logits_given = given is not None
    logits = given if ctx.logits_given else logits
    ctx.save_for_backward(x, first, second, router, experts, logits, chosen)
    ctx.mark_non_differentiable(chosen)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dlogits, _):
    x, first, second, router, *_ = ctx.saved_tensors
    if router is None:
        dlogits = None
    if dy is None and dlogits is None:
        return (None,) * 11
    if dy is None:
        dy = first.new_zeros(x.shape[0], ctx.sizes[3] * ctx.sizes[4] * ctx.sizes[5])
    dlogits = None if dlogits is None else dlogits.contiguous()
    dx, dfirst, dsecond, drouter = _einsum_backward(dy.contiguous(), dlogits, *ctx.saved_tensors, ctx.sizes,
                                                    ctx.swapped, ctx.body)
    return (dx, dfirst, dsecond, None if router is None else drouter, None, None, None, None, None, None,
            drouter if ctx.logits_given else None)


_einsum.register_autograd(_autograd, setup_context=_setup)


def _product_flops(rows: int, sizes) -> tuple[int, int]:
    """FLOPs of each of the two products."""
    a, b, g, d, e, f, r = sizes
    return 2 * rows * g * b * a * r * f * d, 2 * rows * f * d * e * g * r * b


@register_flop_formula(torch.ops.structured.einsum)
def _(x_shape, first_shape, second_shape, router_shape, balance_shape, experts_shape, top_k, sizes, *args,
      **kwargs) -> int:
    router = 2 * x_shape[0] * x_shape[1] * router_shape[0] if router_shape else 0
    return router + sum(_product_flops(x_shape[0] * top_k, sizes))


@register_flop_formula(torch.ops.structured.einsum_backward)
def _(dy_shape, dlogits_shape, x_shape, first_shape, second_shape, router_shape, experts_shape, logits_shape,
      chosen_shape, sizes, *args, **kwargs) -> int:
    top_k = chosen_shape[1] if len(chosen_shape) == 2 else 1
    router = 4 * x_shape[0] * x_shape[1] * router_shape[0] if router_shape else 0
    first, second = _product_flops(x_shape[0] * top_k, sizes)
    return router + 3 * first + 2 * second  # the first product is computed again


def einsum(x: Tensor, first: Tensor, second: Tensor, sizes, swapped: bool, *, router: Tensor | None = None,
           balance: Tensor | None = None, top_k: int = 1, experts: Tensor | None = None,
           logits: Tensor | None = None, body: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """The einsum of two cores: x (T, d_in) -> y (T, d_out), logits, chosen. Takes part in autocast.

    sizes are the seven of the contraction, swapped where B goes first. There are four kinds of call:
        one matrix     first (1, γ, ρφδ, α), second (1, φ, ε, γρβ): y = W x; logits and chosen mean nothing
        a mixture      first (E, ...), second (E, ...), router (E, d_in) and balance (E,) in at least float32:
                       y[t] = Σ_{e in chosen[t]} gate · W[e] x[t]; logits = x routerᵀ (T, E); chosen
                       (T, top_k), the largest of logits + balance; gates by routing.gate_weights
        given logits   the same with logits (T, E), in at least float32, instead of the router
        given experts  experts (T, 1), integers: y[t] = W[experts[t]] x[t]; logits and chosen mean nothing
    body: 'torch', 'c' or 'triton' to force one.
    """
    if dtype := autocast_dtype(x):
        x = x.to(dtype) if router is None else x  # the router sees it as it is
        first, second = first.to(dtype), second.to(dtype)
    experts = None if experts is None else experts.long()
    *tensors, given = [t if t is None else t.contiguous()
                       for t in (x, first, second, router, balance, experts, logits)]
    plain = (type(x) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
             and not torch.jit.is_tracing() and not is_in_torch_dispatch_mode())
    if plain and 0 < len(x) <= FEW:
        # a token at a time, calling an operator takes longer than its work
        body = _body(body, given is not None, *tensors[:5])
        return body.forward(*tensors, top_k, sizes, swapped, *([] if given is None else [given]))
    y, logits, chosen = _einsum(*tensors, top_k, list(sizes), swapped, body, given)
    return y, logits if given is None else given, chosen
