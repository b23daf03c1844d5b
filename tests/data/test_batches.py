"""data/batches.py: how a batch comes to a GPU."""
import numpy as np
import pytest
import torch

from data.batches import Batches
from data.common import TokenFile


def test_ids_of_32_bits_arrive_as_they_are(tmp_path):
    """Also those that 16 bits do not hold, and those that are negative as 32 bits with a sign."""
    ids = [0, 1, 65_535, 65_536, 200_018, 2 ** 31, 2 ** 32 - 1]
    (tmp_path / "ids").write_bytes(b"".join(i.to_bytes(4, "little") for i in ids))
    tokens = TokenFile(tmp_path / "ids", np.dtype("<u4"))
    batches = Batches({"train": tokens, "val": tokens}, block_size=6, sequences=1, batch_size=1,
                      val_windows=1, seed=1, device="cpu")
    for X, Y in (batches.train(0, 0, 1), batches.val(0)):
        assert X.tolist() == [ids[:-1]] and Y.tolist() == [ids[1:]]


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


@pytest.mark.parametrize("split, remedy", [("train", "make it again with more text"),
                                           ("val", "make it again with a larger --val-fraction")])
def test_a_split_that_is_too_small_says_what_to_do(split, remedy):
    splits = {name: np.arange(5 if name == split else 6, dtype=np.uint8) for name in ("train", "val")}
    with pytest.raises(ValueError, match=rf"{split}.bin .* holds 5 tokens, too few .* = 5: {remedy}"):
        Batches(splits, block_size=5, sequences=1, batch_size=1, val_windows=1, seed=1, device="cpu")


def test_the_digest_of_training_tokens_is_of_the_whole_file():
    ids = np.random.default_rng(0).integers(90, size=100_000).astype(np.uint8)

    def digest(ids):
        return Batches(dict(train=ids, val=ids[:99]), block_size=16, batch_size=1, sequences=1, seed=1,
                       val_windows=1, device="cpu").train_digest()
    for place in (0, 50_000, 99_000):
        other = ids.copy()
        other[place:place + 500] += 1
        assert digest(other) != digest(ids) == digest(ids.copy())
