# Beyond the grid of cpu.py: the mixtures to 1e14 FLOPs and the baseline, dense with weight norm, to 1.7e14,
# where it reaches their losses, at the widths that are the best there; this resumes that grid's runs. The
# narrower ones go as far as they are in question. And width 192 for structures whose best width is the
# largest without it.
#
#     python -m experiments.scaling sweep experiments/plans/cpu_long.py --jobs=2
#     python -m experiments.scaling sweep experiments/plans/cpu_long.py --n_embd=64 --seed=2 --jobs=2
#
# At their ends the 10 million characters have been read up to 8 times.
from experiments.plans.cpu import *  # noqa: F403
_longer = {"dense_normed": {64: 3e13, 96: 1e14, 128: 1.7e14, 192: 1e14},    # FLOPs by width
           "btt_moe": {64: 3e13, 96: 3e13, 128: 1e14, 192: 1e14},
           "btt_moe_16": {64: 3e13, 96: 1e14, 128: 1e14},
           "moe": {64: 6e13, 96: 1e14, 128: 1e14}}
_structures = structures  # noqa: F821
structures = ({label: _structures[label] | dict(flops=flops, n_embd=[width for width in flops if width > 64])
               for label, flops in _longer.items()}
              | {label: _structures[label] | dict(flops={64: 1e13, 192: 1e13}, n_embd=[192])
                 for label in ("kronecker", "monarch", "tt")})
evals = 60
