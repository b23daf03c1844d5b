# Beyond the grid of cpu.py: the mixtures to 3e13 FLOPs, three times its budget, and dense with weight norm to
# 6e13, which is about what it needs for their losses, at widths 96 and 128, which resumes its runs, and the
# second seeds at 64; and width 192 for the structures whose best width is the largest without it.
#
#     python -m experiments.scaling sweep experiments/plans/cpu_long.py --jobs=2
#     python -m experiments.scaling sweep experiments/plans/cpu_long.py --n_embd=64 --seed=2 --jobs=2
#
from experiments.plans.cpu import *  # noqa: F403
_longer = dict(dense_normed=6e13, btt_moe=3e13, btt_moe_16=3e13, moe=3e13)  # FLOPs
_structures = structures  # noqa: F821
structures = ({label: _structures[label] | dict(flops=flops) for label, flops in _longer.items()}
              | {label: _structures[label] | dict(flops=1e13, n_embd=192) for label in ("kronecker", "tt")})
structures["btt_moe"]["n_embd"] = [96, 128, 192]
n_embd = [96, 128]
evals = 60
