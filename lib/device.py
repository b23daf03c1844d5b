"""The device of a program, the type it computes in, and how fast it could be."""
import contextlib
import re
import time

import torch

from configurator import fail

# dense bfloat16 and float16 FLOP/s from the makers' data sheets; the first that is a word of the device's name counts
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L40": 181e12, "L4": 121e12, "A40": 150e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12}


def choose(device: str | None, dtype: str | None, local_rank: int | None = None) -> tuple[str, str, str]:
    """(device, its type, dtype), the best there is where they are None; of several GPUs that of the process local_rank.

    Ends the program in one sentence if the device cannot be used.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and local_rank is not None:
        device = f"cuda:{local_rank}"
    try:
        device_type = torch.device(device).type
        torch.ones(1, device=device).item()
    except Exception as e:
        fail(f"device {device!r} cannot be used here: {(str(e) or type(e).__name__).splitlines()[0]}")
    if dtype is None:
        dtype = "bfloat16" if device_type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return device, device_type, dtype


def autocast(device_type: str, dtype: str) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device_type, getattr(torch, dtype))


def peak_flops(device: str, dtype: str) -> tuple[float, str]:
    """(FLOP/s of one device, where the figure comes from): a table, else a large product timed here."""
    device_type = torch.device(device).type
    if device_type == "cuda" and dtype != "float32":
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return flops, f"{name}'s data sheet"
    n = 1024 if device_type == "cpu" else 4096
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(times), f"a {n} x {n} product timed at the start"
