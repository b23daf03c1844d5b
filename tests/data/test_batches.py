"""data/batches.py: how a batch comes to a GPU."""
import numpy as np
import torch

from data.batches import Batches


def test_a_batch_goes_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to",
                        lambda self, device, non_blocking=False: calls.append((device, non_blocking)) or self)
    splits = {split: np.arange(20, dtype=np.uint8) for split in ("train", "val")}
    batches = Batches(splits, block_size=4, sequences=6, batch_size=2, val_windows=4, seed=1, device="cuda:1")
    for X, Y in (batches.train(0, 2, 5), batches.val(1)):
        assert torch.equal(X[:, 1:], Y[:, :-1])
    assert calls == ["pinned", ("cuda:1", True)] * 2
