# The noise of experiments/plans/cpu.py: a second seed at widths 32 and 64. At width 48:
#
#     python -m experiments.scaling sweep experiments/plans/cpu_widths.py --seed=2 --jobs=2
from experiments.plans.cpu import *  # noqa: F403
n_embd = [32, 64]
seed = 2
