# A CPU in minutes: characters of Python's own standard library (python data/python_char/prepare.py, no download).
dataset = "python_char"
block_size = 256
batch_size = 16
gradient_accumulation_steps = 2
n_layer = 3
n_head = 4
n_embd = 256
max_iters = 1000
warmup_iters = 50
eval_interval = 250
eval_iters = 20
log_interval = 10
