# A CPU in minutes: characters of Python's own standard library (python data/python_char/prepare.py, no
# download).
dataset = "python_char"
block_size = 64
batch_size = 16
gradient_accumulation_steps = 2
n_layer = 2
n_head = 6
n_embd = 384
learning_rate = 6e-3
max_iters = 1250
warmup_iters = 50
eval_interval = 250
eval_iters = 40
log_interval = 50
