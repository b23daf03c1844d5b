# Controls for the longer runs of a search (results/search), with their budget, seeds and schedule.
#
#     python -m experiments.scaling sweep experiments/plans/search_controls.py --runs=out-search/controls
#
# - The θ of a search are plain einsums with weight norm; dense has neither. Is that why they lead?
# - How good are the named structures as train.py makes them, aligned with heads, at a rate of their own?
# - Dense is best at width 64 for this budget (results/scaling). Does the best θ lead at that size too?
from experiments.plans.cpu import *  # noqa: F403
del n_embd, head_size, head_aligned  # noqa: F821
structures = {
    "dense, an einsum": dict(struct="einsum", theta=(1, 0, 0, 1, 0, 0, 0), n_embd=96),
    "btt, aligned": dict(struct="btt", n_embd=152, learning_rate=1.5e-3),
    "monarch, aligned": dict(struct="monarch", n_embd=240, learning_rate=1.5e-3),
    "dense": dict(n_embd=64),
    "θ 3/4 0 1/4 9/16 3/16 1/4 0": dict(struct="einsum", theta=(3/4, 0, 1/4, 9/16, 3/16, 1/4, 0), n_embd=88),
}
flops = 1.2e13
seed = [1, 2]
evals = 32
learning_rate = 3e-3
n_head = 4
warmup_iters = 50
sample_tokens = 128
