# Trial 101 of a search: θ 1/2 1/6 1/3 1/2 1/6 1/3 0, ω 0.166667, ψ 1, ν 0.833333,
# validation loss 1.6662 after 3.02e+12 training FLOPs.
eval_iters = 20
log_interval = 20
sample_tokens = 128
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
struct = 'einsum'
theta = (0.5, 0.16666666666666666, 0.3333333333333333, 0.5, 0.16666666666666666, 0.3333333333333333, 0.0)
n_embd = 132
max_iters = 592
eval_interval = 74
learning_rate = 0.003
