# The noise of experiments/plans/cpu.py: a second seed at width 64, for one structure of each kind.
from experiments.plans.cpu import *  # noqa: F403
structures = {label: structures[label] for label in ("dense", "monarch", "btt", "btt_moe")}
n_embd = 64
seed = 2
