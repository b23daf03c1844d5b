"""lib/steps.py: a step whose loss or gradient is not finite has never been."""
import math

import pytest
import torch

from lib.steps import FiniteSteps

NAN, INF = math.nan, math.inf


def run(outcomes, fused, read_every=1):
    """(weights, optimizer, what was read) after one step for each (loss, gradient norm); the learning rate of
    step i is (i + 1) / 10."""
    torch.manual_seed(0)
    weights = [torch.randn(5, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    optimizer = torch.optim.AdamW([dict(params=[w], lr_multiplier=m) for w, m in zip(weights, (1, 3))],
                                  lr=0.7, fused=fused)
    steps, found = FiniteSteps(optimizer), []
    for i, (loss, norm) in enumerate(outcomes):
        generator = torch.Generator().manual_seed(i)
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator)
            if not math.isfinite(norm):
                w.grad[0] = norm
        finite = steps.step(torch.tensor(loss), torch.tensor(norm), (i + 1) / 10, i)
        assert finite.item() == (math.isfinite(loss) and math.isfinite(norm))
        if (i + 1) % read_every == 0:
            found += steps.read()
    found += steps.read()
    assert steps.read() == [] and (not found or str(steps.last) == str(found[-1][1:]))
    return weights, optimizer, found


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("read_every", [1, 3, 100])
@pytest.mark.parametrize("bad", [{2: (NAN, 1.0)}, {2: (1.0, INF), 3: (1.0, NAN)}, {5: (INF, -INF)},
                                 {0: (NAN, NAN)}, {0: (INF, 1.0), 5: (1.0, NAN)}])
def test_steps_that_are_not_finite_change_nothing(bad, read_every, fused):
    """Weights, moments, counts of steps and learning rates are bitwise those of a run without them. They are
    reported in order."""
    outcomes = [bad.get(i, (float(i), 0.5)) for i in range(6)]
    weights, optimizer, found = run(outcomes, fused, read_every)
    assert [note for note, *_ in found] == list(range(6))
    assert str([tuple(outcome) for _, *outcome in found]) == str(outcomes)  # a NaN is not itself

    expected = [w.detach().clone() for w in run([], fused)[0]]
    other = torch.optim.AdamW([dict(params=[w]) for w in expected], fused=fused)
    for i in (i for i in range(6) if i not in bad):
        generator = torch.Generator().manual_seed(i)
        for w, group, multiplier in zip(expected, other.param_groups, (1, 3)):
            w.grad = torch.randn(w.shape, generator=generator)
            group["lr"] = (i + 1) / 10 * multiplier
        other.step()
    for w, e in zip(weights, expected):
        assert torch.equal(w, e)
        for name, value in other.state[e].items():
            assert torch.equal(optimizer.state[w][name], value), name
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]


def test_learning_rates_stay_if_no_step_is_taken():
    _, optimizer, _ = run([(NAN, 1.0), (1.0, INF)], True, 100)
    assert [g["lr"] for g in optimizer.param_groups] == [0.7, 0.7]
