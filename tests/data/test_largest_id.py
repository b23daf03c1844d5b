"""How a dataset's ids are read: the check of all of them, shared by processes, and its memory."""
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from data.batches import Batches
from data.common import TokenFile, check_token_ids, largest_id

TOKENS = np.random.default_rng(0).integers(0, 500, 1013).astype(np.uint16)


@pytest.mark.parametrize("parts", [1, 2, 7, 2000])
@pytest.mark.parametrize("size", [1, 10, 5000])
def test_the_shares_cover_all_tokens(parts, size):
    assert max(largest_id(TOKENS, part, parts, size) for part in range(parts)) == TOKENS.max()


@pytest.mark.parametrize("place", [0, 1, 505, 506, 1012])
def test_each_token_is_in_one_share(place):
    marked = TOKENS.copy()
    marked[place] = 60_000
    assert [largest_id(marked, part, 3, 100) for part in range(3)].count(60_000) == 1


def memory(field):
    """Bytes of this process: VmRSS, or RssFile, which are those of mapped files."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_a_dataset_takes_no_memory_of_its_size(tmp_path):
    """Neither the check of its ids nor 2,000 windows: schedulers count mapped pages as the process's own."""
    size = 300 << 20
    for split in ("train", "val"):
        with open(tmp_path / split, "wb") as f:
            f.truncate(size)  # of zeros, and of no room on the disk
    before = {field: memory(field) for field in ("VmRSS", "RssFile")}
    splits = {split: TokenFile(tmp_path / split, np.dtype("<u2")) for split in ("train", "val")}
    check_token_ids(splits, 1)
    checked = {field: memory(field) for field in before}
    batches = Batches(splits, block_size=1000, sequences=20, batch_size=20, val_windows=1000, seed=1,
                      device="cpu")
    for i in range(50):
        batches.train(i, 0, 20)
        batches.val(i)
    for field, start in before.items():
        assert checked[field] - start < 64 << 20 and memory(field) - start < 64 << 20, field


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4"])
def test_a_file_of_ids_is_read_as_an_array(dtype, tmp_path):
    """Also in parts, where a read returns less than it was asked for."""
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 5000, endpoint=True, dtype=dtype)
    assert largest_id(ids) == max(ids.tolist())
    ids.tofile(tmp_path / "ids")
    tokens = TokenFile(tmp_path / "ids", np.dtype(dtype))
    whole, tokens.file = tokens.file, ShortReads(tokens.file)
    assert len(tokens) == 5000
    for first, last in ((0, 5000), (17, 4001), (4999, 5000), (4000, 9000), (7, 7)):
        assert np.array_equal(tokens[first:last], ids[first:last])
    tokens.file = whole
    os.truncate(tmp_path / "ids", 100)
    with pytest.raises(OSError, match="has become shorter"):
        tokens[:1000]


class ShortReads:
    """A file that gives at most 333 bytes at a time."""
    def __init__(self, file):
        self.file, self.seek = file, file.seek

    def readinto(self, buffer):
        return self.file.readinto(buffer[:333])
