"""Fake CUDA tensors on a CPU build of PyTorch: code runs with devices, types and shapes, and without numbers.

What would make the host wait for a GPU, a CPU tensor among CUDA tensors, and a copy between the two raise an
error here. hooks.cpp has to be loaded before PyTorch is; so checks.py runs in a process of its own, with the
path of the library in FAKE_CUDA.
"""
import contextlib
import ctypes
import os
import subprocess
from pathlib import Path

if "FAKE_CUDA" in os.environ:
    ctypes.CDLL(os.environ["FAKE_CUDA"], ctypes.RTLD_GLOBAL)

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.kernels import grouped, operators

aten = torch.ops.aten
# operators that read a result back before they return on a GPU, and are quiet on fake tensors
WAITS = {aten.multinomial, aten.unique_dim, aten.unique_consecutive, aten._unique2, aten.masked_select}
INDEXES = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}
GROUPED = {torch.ops.structured.grouped_product, torch.ops.structured.grouped_product_grad_w}


class Waits(RuntimeError):
    """The host would wait for the GPU."""


class OnCPU(RuntimeError):
    """A tensor is on the CPU."""


def build(folder: Path) -> Path:
    """The compiled hooks.cpp. Raises CalledProcessError."""
    path, source = folder / "fake_cuda.so", Path(__file__).with_name("hooks.cpp")
    root = Path(torch.__file__).parent
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", str(source), "-o", str(path),
         f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"], check=True)
    return path


def _on(device: str, values) -> bool:
    """Whether there are tensors on a device among the values, but for empty ones."""
    return any(isinstance(t, torch.Tensor) and t.device.type == device and t.numel()
               for t in tree_leaves(values))


class _Watch(TorchDispatchMode):
    """Sees each operator before FakeTensorMode does, and raises Waits or OnCPU. transfers: how many copies to
    the host are allowed; what they made may be used there."""

    def __init__(self, transfers: int):
        super().__init__()
        self.host, self.transfers = transfers > 0, transfers

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind, given = func.overloadpacket, (args, kwargs)
        is_number = func in (aten.lift_fresh.default, aten.fill_.Tensor) and not args[-1].dim()  # x[i] = 0
        if is_number or func.namespace == "prim":
            return func(*args, **kwargs or {})
        if kind in WAITS or kind in INDEXES and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise Waits(f"{func} reads a result back")
        out = func(*args, **kwargs or {})
        if kind in GROUPED and self.host:
            given = args[2]  # ends, on the host or on the GPU
        if _on("cuda", given) and _on("cpu", out):
            if not self.transfers:
                raise Waits(f"{func} copies to the host")
            self.transfers -= 1
        elif _on("cpu", (given, out)) and kind not in GROUPED:
            if not self.host or _on("cuda", (given, out)):
                raise OnCPU(f"{func} with a tensor on the CPU")
        return out


class _NoData(TorchFunctionMode):
    """Raises Waits where numbers of the host become a tensor on the GPU: that is no copy of pinned memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            raise Waits(f"torch.{func.__name__} copies from the host")
        return func(*args, **kwargs or {})


def open_bodies(patch: pytest.MonkeyPatch) -> None:
    """The operators of lib/kernels, opaque to fake tensors otherwise, run their bodies: einsums the torch
    body. In a loop over experts each has one row."""
    def segments(ends):
        assert ends.device.type == "cpu"
        return [(e, e, e + 1) for e in range(len(ends))]

    patch.setattr(operators, "body_name", lambda *_: "torch")
    patch.setattr(operators, "_einsum",
                  transparent(operators._einsum, operators._setup, operators._autograd))
    patch.setattr(operators, "_einsum_backward", operators._einsum_backward._init_fn)
    patch.setattr(grouped, "_grouped_product",
                  transparent(grouped._grouped_product, grouped._save_for_backward, grouped._backward))
    patch.setattr(grouped, "_grouped_product_grad_w", grouped._grouped_product_grad_w._init_fn)
    patch.setattr(grouped, "_segments", segments)


def transparent(operator, setup_context, backward):
    """A function of the operator's body and its derivative."""
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return operator._init_fn(*args)
    Function.setup_context, Function.backward = staticmethod(setup_context), staticmethod(backward)
    return Function.apply


@contextlib.contextmanager
def fake_cuda(capability=(9, 0), transfers: int = 0, bodies: bool = True):
    """Within, tensors are made on a fake GPU of a compute capability.

    transfers: so many copies to the host are made, and no more. bodies: see open_bodies.
    """
    watch = _Watch(transfers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        if bodies:
            open_bodies(patch)
        with FakeTensorMode(), torch.device("cuda"), watch, _NoData():
            yield
    assert not watch.transfers, f"{watch.transfers} transfers fewer than expected"
