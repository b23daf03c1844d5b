# The best of a search and dense, 4 times the FLOPs of a trial:
#     python -m experiments.scaling sweep results/search/follow.py --runs=out-search/follow --jobs=2
structures = \
{'θ 3/4 0 1/4 3/4 1/4 0 0': {'n_embd': 72,
                             'struct': 'einsum',
                             'theta': (0.75, 0.0, 0.25, 0.75, 0.25, 0.0, 0.0),
                             'learning_rate': 0.003},
 'θ 2/3 0 1/3 3/4 1/4 0 0': {'n_embd': 72,
                             'struct': 'einsum',
                             'theta': (0.6666666666666666, 0.0, 0.3333333333333333, 0.75,
                                       0.25, 0.0, 0.0),
                             'learning_rate': 0.003},
 'θ 1/2 0 1/2 3/4 1/4 0 0': {'n_embd': 76,
                             'struct': 'einsum',
                             'theta': (0.5, 0.0, 0.5, 0.75, 0.25, 0.0, 0.0),
                             'learning_rate': 0.003},
 'monarch 1/2 0 1/2 0 1/2 1/2 0, 8 experts, top 2': {'n_embd': 64,
                                                     'struct': 'einsum',
                                                     'theta': (0.5, 0.0, 0.5, 0.0, 0.5,
                                                               0.5, 0.0),
                                                     'num_experts': 8,
                                                     'top_k': 2,
                                                     'learning_rate': 0.003},
 'dense': {'n_embd': 48, 'weight_norm': True, 'learning_rate': 0.003}}
flops = 4000000000000.0
seed = [1, 2, 3]
evals = 32
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
