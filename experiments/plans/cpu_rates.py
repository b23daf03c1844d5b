# Learning rates for experiments/plans/cpu.py: the same four for every structure at two widths, 500 iterations
# each. The grid takes the one whose loss, the mean of both widths, is lowest.
from experiments.plans.cpu import *  # noqa: F403
_rates = [1.5e-3, 3e-3, 6e-3, 1.2e-2]
structures = {label: {key: value for key, value in own.items() if key != "flops"}
              | dict(learning_rate=_rates) for label, own in structures.items()}
n_embd = [64, 128]
max_iters = 500
evals = 4
