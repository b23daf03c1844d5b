# Learning rates for experiments/plans/cpu.py: three for each structure at width 128, for a fifth of its
# budget there, and one more beyond the best where that was at the edge. The structures with routers had their
# three with balanced ones (--router_balance_rate=0.1), and the best two again with those of the grid.
from experiments.plans.cpu import *  # noqa: F403
n_embd = 128
_flops = dict(dense=7.5e12, moe=7.5e12, btt=3e12, tt=3e12, btt_moe=3e12, monarch=2e12, low_rank=2e12,
              kronecker=2e12)
_lower, _higher, _two = [7.5e-4, 1.5e-3, 3e-3, 6e-3], [1.5e-3, 3e-3, 6e-3, 1.2e-2], [1.5e-3, 3e-3]
_rates = dict(btt=_lower, monarch=_lower, tt=_higher, kronecker=_higher, btt_moe=_two, moe=_two)
structures = {label: own | dict(flops=_flops[label], learning_rate=_rates.get(label, [1.5e-3, 3e-3, 6e-3]))
              for label, own in structures.items()}
evals = 8
