"""Batches of a dataset: which tokens an iteration sees depends only on seed, iteration and place in the
global batch."""
import hashlib

import numpy as np
import torch
from torch import Tensor


class Batches:
    """Windows of block_size tokens and their targets, the same for any number of ranks and after a
    resume.

    splits       {"train": ids, "val": ids}, 1-D, on disk; each longer than block_size, else ValueError
    sequences    sequences of an iteration's global batch
    batch_size   sequences of a validation batch; the last one may have fewer
    val_windows  windows of an evaluation
    """

    def __init__(self, splits: dict[str, np.ndarray], *, block_size: int, sequences: int, batch_size: int,
                 val_windows: int, seed: int, device: str):
        for split, tokens in splits.items():
            if len(tokens) <= block_size:
                remedy = "a larger --val-fraction" if split == "val" else "more text"
                raise ValueError(f"{split}.bin of the dataset holds {len(tokens)} tokens, too few for "
                                 f"block_size = {block_size}: make it again with {remedy}")
        self.splits, self.block_size, self.sequences = splits, block_size, sequences
        self.batch_size, self.val_windows, self.seed, self.device = batch_size, val_windows, seed, device
        self.val_batches = -(-val_windows // batch_size)

    def train(self, iteration: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Sequences [first, last) of an iteration's global batch: inputs and targets, (last - first,
        block_size) each.

        Their places are uniform over the training tokens, by a counter-based generator.
        """
        draws = np.random.Philox(key=self.seed, counter=[0, 0, 0, iteration]).random_raw(self.sequences)
        starts = draws % np.uint64(len(self.splits["train"]) - self.block_size)
        return self._windows("train", starts[first:last].tolist())

    def val(self, i: int) -> tuple[Tensor, Tensor]:
        """The i-th of val_batches batches, (at most batch_size, block_size) each."""
        places = range(i * self.batch_size, min((i + 1) * self.batch_size, self.val_windows))
        return self._windows("val", map(self._val_start, places))

    def _val_start(self, j: int) -> int:
        """Where the j-th validation window starts: the first n windows are spread over the validation tokens
        for every n (multiples of the golden ratio modulo 1, in 64 bits)."""
        fraction = (j * 0x9E3779B97F4A7C15) % 2 ** 64
        return fraction * (len(self.splits["val"]) - self.block_size) >> 64

    def val_digest(self) -> str:
        """A digest of the tokens of all validation windows: losses on equal windows can be compared."""
        sha = hashlib.sha256(f"{self.val_windows} windows of {self.block_size}".encode())
        for start in map(self._val_start, range(self.val_windows)):
            sha.update(self.splits["val"][start:start + self.block_size + 1].tobytes())
        return sha.hexdigest()

    def train_digest(self, samples: int = 1024, size: int = 64) -> str:
        """A digest of the number of training tokens, and of samples of them from all over the file."""
        tokens = self.splits["train"]
        sha = hashlib.sha256(f"{len(tokens)} tokens".encode())
        for start in (len(tokens) * i // samples for i in range(samples)):
            sha.update(tokens[start:start + size].tobytes())
        return sha.hexdigest()

    def _windows(self, split: str, starts) -> tuple[Tensor, Tensor]:
        data, T = self.splits[split], self.block_size
        windows = np.stack([data[s:s + T + 1] for s in starts])  # (B, T + 1)
        windows = torch.from_numpy(windows.astype(np.int64))
        if torch.device(self.device).type == "cuda":
            windows = windows.pin_memory().to(self.device, non_blocking=True)
        else:
            windows = windows.to(self.device)
        return windows[:, :-1], windows[:, 1:]
