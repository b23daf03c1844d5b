# Trial 33 of a search: θ 1/3 0 2/3 2/9 1/9 2/3 0, 8 experts, top 2, ω 0, ψ 1, ν 0.888889.
# Validation loss 1.5406 after 2.00e+12 training FLOPs.
eval_iters = 20
log_interval = 20
sample_tokens = 0
dataset = 'python_char'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128
n_layer = 3
n_head = 2
weight_decay = 0.0
decay_lr = False
warmup_iters = 100
seed = 1337
n_embd = 40
max_iters = 1272
eval_interval = 159
struct = 'einsum'
theta = (1 / 3, 0.0, 2 / 3, 2 / 9, 1 / 9, 2 / 3, 0.0)
num_experts = 8
top_k = 2
learning_rate = 0.002
