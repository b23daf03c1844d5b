# Further widths for every structure of cpu.py: 16 and 24, below its smallest, and 48, between two of its
# widths. Without 48 the grid is too coarse for dense, whose frontier lies 0.12 nats lower with it at 3.2e12
# FLOPs.
#
#     python -m experiments.scaling sweep experiments/plans/cpu_widths.py --jobs=2
#     python -m experiments.scaling sweep experiments/plans/cpu_widths.py --n_embd=16 --head_size=16 --jobs=2
#
# One head of 16, one of 24, and two of 24: the one difference from cpu.py.
from experiments.plans.cpu import *  # noqa: F403
structures = {label: own | dict(n_embd=[24, 48], flops={16: 1.1e12, 24: 3.3e12, 48: 1e13})
              for label, own in structures.items()}  # noqa: F821
head_size = 24
