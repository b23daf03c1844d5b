"""data.common.largest_id: the check of a dataset's ids, shared by processes."""
import numpy as np
import pytest

from data.common import largest_id

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
