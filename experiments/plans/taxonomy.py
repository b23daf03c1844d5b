# The taxonomy, measured: θ's that differ in one of ω, ψ and ν at a time. The paper finds that small ω and
# large ψ scale best and that ν may vary. The protocol is ours, that of cpu.py with more widths, for one GPU
# or a patient CPU:
#
#     python -m experiments.scaling sweep experiments/plans/taxonomy.py
#     python -m experiments.scaling fit --base="monarch ω0 ψ1 ν½"
#
# Every series starts from Monarch. Where ψ falls at the same ν and ω, a rank has to grow for what θα + θε > 1
# takes away.
from experiments.plans.cpu import *  # noqa: F403
_thetas = {  # alpha beta gamma delta epsilon phi rho
    "monarch ω0 ψ1 ν½": (1/2, 0, 1/2, 0, 1/2, 1/2, 0),
    # parameter sharing, ω: ψ = 1, ν = 1/2
    "ω¼": (1/2, 1/4, 1/4, 1/4, 1/2, 1/4, 0),
    "kronecker ω½": (1/2, 1/2, 0, 1/2, 1/2, 0, 0),
    # rank, ψ: ω = 0, ν = 1/2
    "ψ¾": (3/4, 0, 1/4, 0, 3/4, 1/4, 1/4),
    "low rank ψ½": (1, 0, 0, 0, 1, 0, 1/2),
    # compute intensity, ν: ω = 0, ψ = 1
    "ν⅔": (1/3, 0, 2/3, 0, 2/3, 1/3, 0),
    "ν¾": (1/4, 0, 3/4, 0, 3/4, 1/4, 0),
    "btt ν¾": (1/2, 0, 1/2, 0, 1/2, 1/2, 1/4),
    "dense ν1": (1, 0, 0, 1, 0, 0, 0),
}
structures = {name: dict(struct="einsum", theta=theta) for name, theta in _thetas.items()}
head_aligned = False    # it would set γ and φ in some of these and not in others
n_embd = [64, 128, 256, 512]
learning_rate = 3e-3
flops = {64: 5e12, 128: 1.5e13, 256: 5e13, 512: 2e14}
