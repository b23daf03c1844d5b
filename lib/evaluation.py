"""The validation loss of a model, measured by all ranks."""
import torch

from lib import distributed


@torch.no_grad()
def evaluate(model, batches, shape: tuple[int, int], amp, stopped) -> tuple[float, torch.Tensor] | None:
    """(cross-entropy in nats per token, load (R, E) of the routers' experts), means over all validation
    windows. A collective. None if stopped() is true before one of the batches; it must be so on every rank.

    model     called as model(X, Y, return_aux=True), in evaluation mode; left in training mode
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
                _, loss, aux = model(X, Y, return_aux=True)
            total += loss * len(X)
            load += aux.load * len(X)
    model.train()
    share = batches.val_windows / world_size  # windows of a rank, on average
    return distributed.all_reduce_mean(total).item() / share, distributed.all_reduce_mean(load) / share
