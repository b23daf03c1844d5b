# A CPU in minutes: characters of Python's own standard library (python data/python_char/prepare.py, no
# download).
dataset = "python_char"
block_size = 64
batch_size = 8
gradient_accumulation_steps = 2
n_layer = 3
n_head = 4
n_embd = 256
max_iters = 1200
warmup_iters = 20
eval_interval = 250
eval_iters = 100
log_interval = 50
