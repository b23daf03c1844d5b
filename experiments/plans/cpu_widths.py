# Between the widths of cpu.py: is the frontier of dense, or of BTT-MoE, lower at width 48 than at 32 and 64?
#
#     python -m experiments.scaling sweep experiments/plans/cpu_widths.py --jobs=2
#
# 2 heads of 24, the one difference from cpu.py.
from experiments.plans.cpu import *  # noqa: F403
structures = {label: structures[label] | dict(flops=5e12)  # noqa: F821
              for label in ("dense_normed", "btt_moe")}
n_embd = 48
head_size = 24
