# The paper's protocol for mixtures of experts (Potapczynski et al., arXiv:2410.02117, section 5), for GPUs.
#
#     python -m experiments.scaling sweep experiments/plans/paper_moe.py --gpus=8
#
# From the paper and its published scripts: the data and schedule of paper.py; BTT-MoE (experts of Monarch's θ
# and rank 1 in every projection) at widths 256 to 2048 against the standard MoE (experts are MLPs) at 128 to
# 1024, each with 8 and 16 experts, 2 per token, 3, 6 and 9 layers; the auxiliary losses times 0.01; experts
# that are dense or of low rank as ablations.
#
# Ours: as in paper.py; dense with 9 layers; the ablations at 3 layers and 8 experts alone; the weight norm of
# each expert by itself; routers that begin random instead of at zero.
from experiments.plans.paper import *  # noqa: F403
_wide, _narrow = [256, 512, 1024, 2048], [128, 256, 512, 1024]
structures = {
    "dense": dict(n_embd=[256, 512, 768, 1024]),
    "dense_normed": dict(struct="dense", weight_norm=True, n_embd=[256, 512, 768, 1024]),
    "btt_moe": dict(n_embd=_wide),
    "btt_moe16": dict(struct="btt", num_experts=16, n_embd=_wide),
    "moe": dict(n_embd=_narrow),
    "moe16": dict(struct="dense", ffn_experts=16, n_embd=_narrow),
    "dense_moe": dict(struct="dense", num_experts=8, n_embd=[256, 512, 1024], n_layer=3),
    "low_rank_moe": dict(struct="low_rank", num_experts=8, n_embd=_wide, n_layer=3),
}
n_layer = [3, 6, 9]
