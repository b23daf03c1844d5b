# Does the best learning rate stay where it is as the width grows? About an hour on two CPU cores.
#
#     python data/python_char/prepare.py
#     python -m experiments.scaling sweep experiments/plans/lr_transfer.py --runs=out-lr_transfer --jobs=2
#     python -m experiments.scaling transfer --runs=out-lr_transfer
#
# Another sweep into the same folder with --seed=2 adds a second seed to every point. --mup=False, in a folder
# of its own, is the counterexample: every parameter learns at learning_rate, and the best rate moves.
structures = {"dense": {}, "btt": dict(head_aligned=True), "btt_moe": {}}   # as at large widths, by default
n_embd = [64, 128, 256]
learning_rate = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]  # at the base width
n_layer = 3
head_size = 32
dataset = "python_char"
block_size = 64
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 500     # of 1,024 tokens
warmup_iters = 20
eval_interval = 500
eval_iters = 100
log_interval = 20
sample_tokens = 0
seed = 1
