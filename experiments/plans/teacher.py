# Structures for experiments.teacher: the paper's list of θ, dense, and BTT-MoE.
from experiments.plans import paper as _paper
structures = {"dense": dict(struct="dense"), "btt_moe": dict(struct="btt", num_experts=8, top_k=2)}
structures |= {label: options for label, options in _paper.structures.items() if label != "dense"}
