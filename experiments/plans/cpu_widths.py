# Between the widths of cpu.py: every structure at width 48, too. Without it the grid is too coarse for dense,
# whose frontier lies 0.08 nats lower with it at 3e12 FLOPs.
#
#     python -m experiments.scaling sweep experiments/plans/cpu_widths.py --jobs=2
#
# 2 heads of 24, the one difference from cpu.py.
from experiments.plans.cpu import *  # noqa: F403
structures = {label: structures[label] | dict(flops=1e13) for label in structures}  # noqa: F821
n_embd = 48
head_size = 24
