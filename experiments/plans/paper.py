# The paper's protocol for structures without experts (Potapczynski et al., arXiv:2410.02117), for GPUs.
#
#     python data/openwebtext_char/prepare.py
#     python -m experiments.scaling sweep experiments/plans/paper.py --jobs=8 --gpus=1
#
# From the paper and its published scripts: OpenWebText in a vocabulary of 96 characters, 128 of them a
# sequence, 65,536 a step, 100,000 steps at a constant 3e-3 after 2,000 of warmup, no weight decay; the rate
# that of a dense layer of width 768, which µP takes to the others; AdamW's betas 0.9 and 0.95, gradients
# clipped at 1; 3 and 6 layers with heads of 64, QK norm; widths 256 to 4096, dense to 1024; and the list of θ
# below, where the scripts write a third as 0.33 and 0.67.
#
# Ours: the names of the θ, the batch in 8 micro-batches of 64, evaluations of 200 x 64 sequences, integer
# sizes, the learned gains of the weight norm, and what docs/mup.md calls ours in µP. In the paper's GPT-2
# runs the indices do not follow the heads, so head_aligned is off. And dense_normed, dense with the weight
# norm that all others have: the fairer baseline, by fit --base=dense_normed.
_thetas = {  # alpha beta gamma delta epsilon phi rho
    # Monarch and what lies between it and dense, θα + θε = 1
    "btt 1/2": (1/2, 0, 1/2, 0, 1/2, 1/2, 0),                       # Monarch: ψ 1, ν 1/2, ω 0
    "btt 1/3": (1/3, 0, 2/3, 0, 2/3, 1/3, 0),                       # ψ 1, ν 2/3, ω 0
    "btt 1/4": (1/4, 0, 3/4, 0, 3/4, 1/4, 0),                       # ψ 1, ν 3/4, ω 0
    "btt 2/3": (2/3, 0, 1/3, 0, 1/3, 2/3, 0),                       # ψ 1, ν 2/3, ω 0
    "btt 3/4": (3/4, 0, 1/4, 0, 1/4, 3/4, 0),                       # ψ 1, ν 3/4, ω 0
    # θα + θε other than 1: more takes rank away, less does not
    "btt 2/3 2/3": (2/3, 0, 1/3, 0, 2/3, 1/3, 0),                   # ψ 2/3, ν 1/3, ω 0
    "btt 1/3 1/3": (1/3, 0, 2/3, 0, 1/3, 2/3, 0),                   # ψ 1, ν 2/3, ω 0
    "btt 3/4 3/4": (3/4, 0, 1/4, 0, 3/4, 1/4, 0),                   # ψ 1/2, ν 1/4, ω 0
    "btt 1/4 1/4": (1/4, 0, 3/4, 0, 1/4, 3/4, 0),                   # ψ 1, ν 3/4, ω 0
    # with a rank that grows
    "btt 1/2 rank 1/4": (1/2, 0, 1/2, 0, 1/2, 1/2, 1/4),            # ψ 1, ν 3/4, ω 0
    "btt 1/2 rank 1/3": (1/2, 0, 1/2, 0, 1/2, 1/2, 1/3),            # ψ 1, ν 5/6, ω 0
    "btt 1/3 rank 1/4": (1/3, 0, 2/3, 0, 2/3, 1/3, 1/4),            # ψ 1, ν 11/12, ω 0
    "btt 2/3 rank 1/4": (2/3, 0, 1/3, 0, 1/3, 2/3, 1/4),            # ψ 1, ν 11/12, ω 0
    "btt 2/3 2/3 rank 1/4": (2/3, 0, 1/3, 0, 2/3, 1/3, 1/4),        # ψ 11/12, ν 7/12, ω 0
    "btt 1/3 1/3 rank 1/4": (1/3, 0, 2/3, 0, 1/3, 2/3, 1/4),        # ψ 1, ν 11/12, ω 0
    # Kronecker and Tensor-Train: parameters are shared
    "kronecker 1/2": (1/2, 1/2, 0, 1/2, 1/2, 0, 0),                 # ψ 1, ν 1/2, ω 1/2
    "kronecker 1/3": (1/3, 2/3, 0, 1/3, 2/3, 0, 0),                 # ψ 1, ν 2/3, ω 1/3
    "tt 1/2 rank 1/4": (1/2, 1/2, 0, 1/2, 1/2, 0, 1/4),             # ψ 1, ν 3/4, ω 1/2
    "tt 1/3 rank 1/4": (1/3, 2/3, 0, 1/3, 2/3, 0, 1/4),             # ψ 1, ν 11/12, ω 1/3
    # low rank
    "low rank 3/4": (1, 0, 0, 0, 1, 0, 3/4),                        # ψ 3/4, ν 3/4, ω 0
    "low rank 1/2": (1, 0, 0, 0, 1, 0, 1/2),                        # ψ 1/2, ν 1/2, ω 0
    # all seven
    "generic": (1/2, 1/4, 1/4, 1/4, 1/2, 1/4, 0),                   # ψ 1, ν 1/2, ω 1/4
    "generic rank 1/4": (1/2, 1/4, 1/4, 1/4, 1/2, 1/4, 1/4),        # ψ 1, ν 3/4, ω 1/4
}
_widths = [256, 512, 768, 1024]
structures = {"dense": dict(n_embd=_widths),
              "dense_normed": dict(struct="dense", weight_norm=True, n_embd=_widths)} | {
    name: dict(struct="einsum", theta=theta) for name, theta in _thetas.items()}
n_embd = [256, 512, 768, 1024, 2048, 4096]
n_layer = [3, 6]
head_size = 64
head_aligned = False
dataset = "openwebtext_char"
block_size = 128
batch_size = 64
gradient_accumulation_steps = 8
max_iters = 100_000
decay_lr = False
learning_rate = 3e-3
mup_base_width = 768
warmup_iters = 2_000
weight_decay = 0.0
eval_interval = 2_500
eval_iters = 200
log_interval = 100
sample_tokens = 0
