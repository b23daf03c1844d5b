"""lib/evaluation.py: the loss of a text, against one forward pass for each of its tokens."""
import contextlib

import pytest
import torch

from lib.evaluation import score_text
from model import GPT, GPTConfig

AMP = contextlib.nullcontext()


def first_start(t, count, window, stride):
    """Where the first window begins that holds the tokens before token t, of `count` in all."""
    starts = [s for s in range(0, count, stride) if s + window >= t]
    return max(0, min(starts[0], count - 1 - window))


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 10, 29, 40])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_token_is_scored_once_with_its_context(count, batch_size):
    """Of the numbers 0, 1, ...: what a model is asked tells which they are."""
    for window, stride in [(8, s) for s in (1, 3, 4, 7, 8)] + [(1, 1)]:
        asked, rows = [], 0

        def model(X, Y, **_):
            nonlocal rows
            rows += len(X)
            assert len(X) <= batch_size and X.shape == Y.shape and X.shape[1] <= window
            for x, y in zip(X, Y):
                assert x.tolist() == list(range(x[0], x[0] + len(x)))
                for place, target in enumerate(y.tolist()):
                    if target >= 0:
                        assert target == x[place] + 1
                        asked.append((target, x[0].item()))
            return None, torch.tensor(2.0)  # the mean, whatever their number

        nats = score_text(model, torch.arange(count), window, stride, batch_size, AMP)
        assert nats == 2.0 * (count - 1)
        assert [target for target, _ in asked] == list(range(1, count))
        for target, first in asked:
            assert first == first_start(target, count, window, stride)
            assert first == 0 or target - first >= window - stride + 1
        assert rows <= 1 + max(0, count - 1 - window + stride - 1) // stride


def test_the_loss_of_a_text_is_that_of_its_tokens_one_by_one():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=16)).double().eval()
    for p in model.parameters():
        p.data.normal_(std=0.5)
    ids = torch.randint(20, (30,))
    for window, stride in ((8, 1), (8, 5), (6, 6)):
        with torch.no_grad():
            seen = [ids[first_start(t, 30, window, stride):t] for t in range(1, 30)]
            losses = [-model(before[None])[0][0, -1].log_softmax(-1)[ids[t]]
                      for t, before in enumerate(seen, 1)]
        found = score_text(model, ids, window, stride, 3, AMP)
        assert found == pytest.approx(torch.stack(losses).double().sum().item(), rel=1e-6)
