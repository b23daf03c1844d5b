# The noise of experiments/plans/cpu.py: a second seed at width 32.
from experiments.plans.cpu import *  # noqa: F403
n_embd = 32
seed = 2
