# Controls for the longer runs of a search (results/search), with their budget and schedule.
#
#     python -m experiments.scaling sweep experiments/plans/search_controls.py --runs=out-search/controls
#
# - All structures of the search have the rate 3e-3. BTT-MoE's best is lower (cpu_rates.py); is that of dense?
# - When results/scaling had only widths 32, 64 and 128, dense of width 48 was ahead of its frontier and
#   BTT-MoE behind: is it the width or the number of heads? Here there are 4; there, heads of 32 dimensions,
#   so that widths 32 and 64 have 1 and 2 heads.
from experiments.plans.cpu import *  # noqa: F403
del head_size, n_embd  # noqa: F821
_btt_moe = dict(struct="btt", num_experts=8, top_k=2, n_embd=64, learning_rate=1.5e-3)
_dense = dict(struct="dense", weight_norm=True)
structures = {
    "btt_moe, 1.5e-3": _btt_moe,
    "dense, 1.5e-3": _dense | dict(n_embd=48, learning_rate=1.5e-3),
    "dense, 2 heads": _dense | dict(n_embd=48, n_head=2),
    "dense, width 64": _dense | dict(n_embd=64),
    "dense, width 64, 2 heads": _dense | dict(n_embd=64, n_head=2),
    "btt_moe, 1.5e-3, 2 heads": _btt_moe | dict(n_head=2),
}
n_head = 4
flops = 4e12
seed = 1
evals = 32
learning_rate = 3e-3
warmup_iters = 50
