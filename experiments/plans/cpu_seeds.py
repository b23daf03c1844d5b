# The noise of experiments/plans/cpu.py: a second seed at width 32 for every structure, and at 64 for some.
from experiments.plans.cpu import *  # noqa: F403
for _label, _own in structures.items():
    _own["n_embd"] = [32, 64] if _label in ("dense", "kronecker", "btt", "btt_moe") else 32
seed = 2
