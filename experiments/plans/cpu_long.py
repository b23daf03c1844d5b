# Beyond the grid of cpu.py: dense with weight norm and the mixtures to 3e13 FLOPs, three times its budget, at
# widths 96 and 128, which resumes its runs, and the second seeds at 64; and width 192 for the two structures
# whose best width at 1e13 is its largest.
#
#     python -m experiments.scaling sweep experiments/plans/cpu_long.py --jobs=2
#     python -m experiments.scaling sweep experiments/plans/cpu_long.py --n_embd=64 --seed=2 --jobs=2
#
from experiments.plans.cpu import *  # noqa: F403
_longer = ("dense_normed", "btt_moe", "btt_moe_16", "moe")
structures = ({label: structures[label] | dict(flops=3e13) for label in _longer}    # noqa: F821
              | {label: structures[label] | dict(flops=1e13, n_embd=192)            # noqa: F821
                 for label in ("kronecker", "tt")})
n_embd = [96, 128]
evals = 60
