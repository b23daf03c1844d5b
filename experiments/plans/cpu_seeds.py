# The noise of experiments/plans/cpu.py: a second seed at widths 32 and 64. At width 48:
#
#     python -m experiments.scaling sweep experiments/plans/cpu_widths.py --seed=2 --jobs=2
from experiments.plans.cpu import *  # noqa: F403
structures = {label: own | dict(flops={32: 3e12, 64: 1e13}) for label, own in structures.items()}
n_embd = [32, 64]
seed = 2
