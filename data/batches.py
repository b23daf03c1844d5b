"""Batches of a dataset: which tokens an iteration sees depends only on seed, iteration and place in the
global batch."""
import numpy as np
import torch
from torch import Tensor


class Batches:
    """Windows of block_size tokens and their targets, the same whatever the number of ranks, and after a
    resume.

    splits      {"train": ids, "val": ids}, 1-D, on disk; each longer than block_size, else ValueError
    sequences   sequences of an iteration's global batch
    batch_size  sequences of a validation batch, of which there are eval_iters
    """

    def __init__(self, splits: dict[str, np.ndarray], *, block_size: int, sequences: int, batch_size: int,
                 eval_iters: int, seed: int, device: str):
        for split, tokens in splits.items():
            if len(tokens) <= block_size:
                raise ValueError(f"{split}.bin of the dataset holds {len(tokens)} tokens, too few for "
                                 f"block_size = {block_size}")
        self.splits, self.block_size, self.sequences = splits, block_size, sequences
        self.batch_size, self.eval_iters, self.seed, self.device = batch_size, eval_iters, seed, device

    def train(self, iteration: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Sequences [first, last) of an iteration's global batch: inputs and targets, (last - first,
        block_size) each.

        Their places are uniform over the training tokens, by a counter-based generator.
        """
        words = np.random.Philox(key=self.seed, counter=[0, 0, 0, iteration]).random_raw(self.sequences)
        starts = words % np.uint64(len(self.splits["train"]) - self.block_size)
        return self._windows("train", starts[first:last].tolist())

    def val(self, i: int) -> tuple[Tensor, Tensor]:
        """The i-th of eval_iters batches: windows spread evenly over the validation tokens, (batch_size,
        block_size)."""
        last = len(self.splits["val"]) - self.block_size - 1
        gaps = max(1, self.eval_iters * self.batch_size - 1)
        places = range(i * self.batch_size, (i + 1) * self.batch_size)
        return self._windows("val", [j * last // gaps for j in places])

    def _windows(self, split: str, starts) -> tuple[Tensor, Tensor]:
        data, T = self.splits[split], self.block_size
        windows = np.stack([data[s:s + T + 1] for s in starts])  # (B, T + 1)
        windows = torch.from_numpy(windows.astype(np.int64))
        if torch.device(self.device).type == "cuda":
            windows = windows.pin_memory().to(self.device, non_blocking=True)
        else:
            windows = windows.to(self.device)
        return windows[:, :-1], windows[:, 1:]
