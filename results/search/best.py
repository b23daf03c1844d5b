# Trial 84 of a search: θ 3/4 0 1/4 3/4 1/4 0 0, ω 0, ψ 1, ν 0.75.
# Validation loss 1.7318 after 9.98e+11 training FLOPs.
eval_iters = 20
log_interval = 20
sample_tokens = 0
dataset = 'python_char'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128
n_layer = 3
n_head = 4
weight_decay = 0.0
decay_lr = False
warmup_iters = 50
seed = 1337
n_embd = 72
max_iters = 648
eval_interval = 81
struct = 'einsum'
theta = (0.75, 0.0, 0.25, 0.75, 0.25, 0.0, 0.0)
learning_rate = 0.003
