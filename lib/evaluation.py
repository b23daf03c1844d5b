"""The loss of a model: on a dataset's validation windows, by all ranks, and on a text."""
import torch

from lib import distributed


@torch.no_grad()
def evaluate(model, batches, shape: tuple[int, int], amp, stopped) -> tuple[float, torch.Tensor] | None:
    """(cross-entropy in nats per token, load (R, E) of the routers' experts), means over all validation
    windows. A collective. None if stopped() is true before a batch; it must agree on every rank.

    model     a model.GPT, or one that is called like it; left in training mode
    batches   val(i) of val_batches batches, val_windows windows in all, on `device`
    shape     (R, E)
    amp       the context in which the model computes
    """
    total, load = torch.zeros((), device=batches.device), torch.zeros(shape, device=batches.device)
    rank, world_size = distributed.rank(), distributed.world_size()
    model.eval()
    for i in range(rank, batches.val_batches + rank, world_size):  # the same number on every rank
        if stopped():
            model.train()
            return None
        if i < batches.val_batches:
            X, Y = batches.val(i)
            with amp:
                _, loss, aux = model(X, Y, return_aux=True, return_logits=False)
            total += loss * len(X)
            load += aux.load * len(X)
    model.train()
    share = batches.val_windows / world_size  # windows of a rank, on average
    return distributed.all_reduce_mean(total).item() / share, distributed.all_reduce_mean(load) / share


@torch.no_grad()
def score_text(model, ids: torch.Tensor, window: int, stride: int, batch_size: int, amp) -> float:
    """Cross-entropy of ids[1:] in nats, summed: each token is scored once, by the model in evaluation mode.

    Windows of `window` tokens slide by `stride`, so that at least window - stride + 1 tokens come before each
    one that is scored, except at the beginning of the text; the last window ends with the text.

    ids  (N,) on the model's device, N >= 2; stride <= window <= the model's block_size
    amp  the context in which the model computes
    """
    targets = len(ids) - 1
    window = min(window, targets)
    starts = [*range(0, targets - window, stride), targets - window]
    fresh = [window, *(b - a for a, b in zip(starts, starts[1:]))]  # targets that no earlier window scored
    windows = ids.unfold(0, window + 1, 1)  # (N - window, window + 1), not copied
    nats = torch.zeros((), dtype=torch.float64)
    for i in range(0, len(starts), batch_size):
        batch = windows[starts[i:i + batch_size]]
        X, Y = batch[:, :-1], batch[:, 1:].clone()
        for row, count in zip(Y, fresh[i:i + batch_size]):
            row[:window - count] = -1
        with amp:
            loss = model(X, Y, return_logits=False)[1]
        nats += loss.cpu().double() * (Y >= 0).sum().cpu()
    return nats.item()
