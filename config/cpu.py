# A CPU, in minutes to an hour: characters of Python's own standard library, 128 at a time, 3 layers. No
# download: python data/python_char/prepare.py. About the scale of experiments/plans/cpu.py.
# experiments.search uses this file and sets n_embd, max_iters and eval_interval itself.
dataset = "python_char"
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
n_layer = 3
n_head = 4
n_embd = 128
max_iters = 2000
decay_lr = False
warmup_iters = 50
weight_decay = 0.0
eval_interval = 250
eval_iters = 20
log_interval = 20
sample_tokens = 128
