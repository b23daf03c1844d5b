"""Optimizer steps that change nothing where the loss or the gradient is not finite.

The device decides, and the host reads the outcomes later, all at once: it need not wait for a GPU in every
iteration.
"""
import math
from typing import Any

import torch
from torch import Tensor


class FiniteSteps:
    """Steps of an optimizer whose groups have an 'lr_multiplier'. Fused ones do not wait for the device."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.rates: list[float] = []  # learning rates of the groups in the last step that was taken
        self.last = (math.nan, math.nan)  # loss and norm of the last step that was read
        self.waiting: list[tuple[Any, list[float], Tensor]] = []  # note, rates, (loss, norm) of each step

    def step(self, loss: Tensor, norm: Tensor, learning_rate: float, note: Any) -> Tensor:
        """Takes a step if loss and norm, () each, are finite, and returns whether they are: () of bool.

        If not, the weights, the moments and the count of steps stay as they are.
        """
        groups = self.optimizer.param_groups
        if not self.waiting:
            self.rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = learning_rate * group["lr_multiplier"]
        self.waiting.append((note, [group["lr"] for group in groups], torch.stack([loss, norm])))
        finite = loss.isfinite() & norm.isfinite()
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~finite).to(torch.float32)  # its kernel then does nothing
            self.optimizer.step()
            del self.optimizer.found_inf
        elif finite:
            self.optimizer.step()
        return finite

    def read(self) -> list[tuple[Any, float, float]]:
        """(note, loss, norm) of each step since the last call, in order. Waits for the device, once.

        The learning rates are those of the last step that was taken, as if the others had never happened.
        """
        if not self.waiting:
            return []
        notes, rates, results = zip(*self.waiting)
        self.waiting = []
        outcomes = torch.stack(results).tolist()
        self.last = tuple(outcomes[-1])
        taken = [r for r, outcome in zip(rates, outcomes) if all(map(math.isfinite, outcome))]
        for group, rate in zip(self.optimizer.param_groups, (taken or [self.rates])[-1]):
            group["lr"] = rate
        return [(note, *outcome) for note, outcome in zip(notes, outcomes)]
