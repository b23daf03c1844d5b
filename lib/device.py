"""The device of a program, the type it computes in, and how fast the device could be."""
import contextlib
import ctypes
import os
import random
import re

import torch
import torch._functorch.config

from lib.distributed import on_all_ranks
from lib.log import print0

# Dense bfloat16 and float16 FLOP/s from the makers' data sheets. The first key that is a word of the device's
# name is used.
PEAK_FLOPS = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A40": 150e12,
    "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def choose_device(device: str | None, local_rank: int | None = None) -> tuple[str, str]:
    """(device, its type); None: the best there is of cuda, mps and cpu. A GPU gets an index, as
    torch.cuda.set_device requires: 'cuda' and 'xpu' mean that of local_rank, or else the first one.

    Raises ValueError if the device cannot be used, or is one GPU for several processes (local_rank).
    """
    if device is None:
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind = device.partition(":")[0]
    if device in ("cuda", "xpu"):
        device = f"{device}:{local_rank or 0}"
    elif kind in ("cuda", "xpu") and local_rank is not None or kind == "mps" and local_rank:
        other = "cpu" if kind == "mps" else kind  # a Mac has one GPU
        raise ValueError(f"device {device!r} is one GPU, and several processes would share it: use {other!r}")
    try:
        device_type = torch.device(device).type
        torch.ones(1, device=device).item()
    except Exception as e:  # each backend raises errors of its own
        reason = (str(e) or type(e).__name__).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device {device!r} cannot be used here: {reason}") from None
    return device, device_type


def use_device(device: str, tf32: bool = False) -> None:
    """Makes a GPU the current one, to which later queries of type, memory and pending work refer; with tf32,
    its float32 products round their inputs to TF32. On a CPU freed memory is kept."""
    device_type = torch.device(device).type
    if device_type == "cuda":
        torch.cuda.set_device(device)
        if tf32:  # fp32_precision alone would make older code, such as Inductor's autotuning, fail
            torch.set_float32_matmul_precision("high")
    elif device_type == "cpu":
        keep_freed_memory()  # fresh memory for every tensor can cost more than the products


def choose_dtype(dtype: str | None, device_type: str) -> str:
    """dtype; None: bfloat16 if the current GPU has it, and does not emulate it, else float32."""
    if dtype is None:
        has_bfloat16 = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    return dtype


def autocast(device_type: str, dtype: str) -> contextlib.AbstractContextManager:
    """The context in which a forward computes in dtype: 'float32' (no autocast), 'bfloat16' or 'float16'."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, getattr(torch, dtype))


def choose_compile(compile: bool | None, device: str) -> bool:
    """Whether to torch.compile models, after a trial; None: on GPUs, unless the trial fails. Every rank must
    call it, and gets the same answer.

    A compiled backward then computes in the types that an eager one does, and not under the autocast of its
    forward. Raises ValueError if it was asked for and fails.
    """
    torch._functorch.config.backward_pass_autocast = "off"
    wanted = torch.device(device).type == "cuda" if compile is None else compile
    try:
        on_all_ranks(check_compile, device, wanted)
    except ValueError as e:
        if compile:
            raise
        if wanted:
            print0(f"{e}: the model is not compiled")
        return False
    return wanted


def check_compile(device: str, trial: bool) -> None:
    """Compiles one product for this device if `trial`. Raises ValueError if torch.compile does not work here.

    A TORCHINDUCTOR_CACHE_DIR that cannot be made is taken out of the environment: torch makes it for eager
    models too.
    """
    try:
        if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            os.makedirs(folder, exist_ok=True)
        if trial:
            factor = random.SystemRandom().random()  # no cache has this product, so that a compiler is needed
            torch.compile(lambda x: factor * x)(torch.ones(8, device=device))
    except Exception as e:  # each backend, and each compiler, raises errors of its own
        if isinstance(e, OSError):
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"torch.compile does not work here ({reason})") from None


def device_name(device: str) -> str:
    """'NVIDIA H100 PCIe', 'cpu' ..."""
    device_type = torch.device(device).type
    return torch.cuda.get_device_name(device) if device_type == "cuda" else device_type


def peak_flops(device: str, dtype: str, count: int = 1) -> tuple[float, str] | tuple[None, None]:
    """(FLOP/s of `count` such devices, where the figure comes from); None without a data sheet in PEAK_FLOPS.

    CPUs and float32 have none. A timed product is not a peak: on a busy machine a run can be faster.
    """
    if torch.device(device).type == "cuda" and dtype != "float32":
        name = device_name(device)
        for part, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return count * flops, f"{name}'s data sheet"
    return None, None


def peak_memory(device: str) -> int | None:
    """Most bytes that tensors have taken at once on a GPU so far; None elsewhere, where it is not counted."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else None


def check_memory(params: int, device_type: str) -> None:
    """Raises ValueError if the weights of that many float32 parameters exceed this machine's memory.

    On a CPU their gradients and Adam's two moments count too.
    """
    size = params * 4 * (4 if device_type == "cpu" else 1)
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise ValueError(f"a model of {params:,} parameters needs {size / 1e9:,.0f} GB of memory, more than "
                         "there is: take a smaller n_embd or n_layer")


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
