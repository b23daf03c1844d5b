"""Timings taken in turns, so that a disturbance of the machine affects all of them, and their ratios."""
import time
from collections.abc import Callable

import numpy as np
import torch


def take_turns(runs: dict[str, Callable], count: int, device_type: str) -> dict[str, list[float]]:
    """{name: milliseconds of each of `count` calls, to the end of their work on the device}, after two calls
    that are not timed."""
    wait = getattr(torch, device_type).synchronize  # torch.cuda, torch.mps; nothing to wait for in torch.cpu
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count + 2):
        for name, run in runs.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: ms[2:] for name, ms in times.items()}


def ratios(times: list[float], base: list[float]) -> tuple[float, list[float]]:
    """(median, quartiles) of times ÷ base, turn by turn."""
    low, median, high = np.quantile(np.divide(times, base), [0.25, 0.5, 0.75]).tolist()
    return median, [low, high]
