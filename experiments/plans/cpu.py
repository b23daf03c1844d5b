# Our own reproduction on two CPU cores: characters of Python's standard library, 128 at a time, 3 layers.
#
#     python data/python_char/prepare.py
#     python -m experiments.scaling sweep experiments/plans/cpu_rates.py --jobs=2   rates; the best are below
#     python -m experiments.scaling sweep experiments/plans/cpu.py --jobs=2         the grid
#     python -m experiments.scaling sweep experiments/plans/cpu_seeds.py --jobs=2   a second seed: the noise
#     python -m experiments.scaling fit --min_flops=1e12                            see results/scaling
#
# The rate is constant after its warmup, as in the paper, so that every evaluation is a point of the frontier.
# Budgets give every run 1,400 to 8,000 iterations of 2,048 characters, of the corpus' 10 million: 4e12 to
# 1e14 FLOPs. The effort for learning rates is the same for each structure: three rates at width 128, for a
# fifth of its budget, and one more beyond the best where that was at the edge.
#
# Width 64 is still ahead of 128 at 2,000 iterations. So the two smaller widths go through most of an epoch,
# and width 64 of dense, moe and btt_moe further: without that the frontier has a gap where it passes from one
# width to the next. About 8 core-hours.
_large = {64: 2e13, 128: 4e13, 256: 1e14}         # FLOPs by width, where a width costs what dense does
_medium = {64: 6.6e12, 128: 1.6e13, 256: 2.4e13}  # ν = 3/4
_small = {64: 4e12, 128: 1e13, 256: 1e13}         # ν = 1/2
_budgets = {"dense": _large, "moe": _large | {256: 7e13}, "btt": _medium, "tt": _medium,
            "btt_moe": _medium | {64: 1.3e13, 256: 1.8e13}, "monarch": _small, "low_rank": _small,
            "kronecker": _small}
_rates = dict(dense=3e-3, low_rank=3e-3, kronecker=6e-3, monarch=1.5e-3, tt=6e-3, btt=1.5e-3, btt_moe=3e-3,
              moe=3e-3)     # found by cpu_rates.py

structures = {label: dict(flops=budget, learning_rate=_rates[label]) for label, budget in _budgets.items()}
for _label in ("btt_moe", "moe"):
    structures[_label]["router_balance_rate"] = 0.0  # the default, but in the names of results/scaling's runs
n_embd = [64, 128, 256]
n_layer = 3
head_size = 32
dataset = "python_char"
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
decay_lr = False
warmup_iters = 100
weight_decay = 0.0
seed = 1
evals = 30
eval_iters = 20
log_interval = 20
sample_tokens = 0
