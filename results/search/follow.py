# The best of a search and dense, 4 times the budget of a trial:
#     python -m experiments.scaling sweep results/search/follow.py --runs=out-search/follow --jobs=2
structures = \
{'θ 1/2 1/6 1/3 1/2 1/6 1/3 0': {'struct': 'einsum',
                                 'theta': (0.5, 0.16666666666666666, 0.3333333333333333,
                                           0.5, 0.16666666666666666, 0.3333333333333333,
                                           0.0),
                                 'n_embd': 132,
                                 'learning_rate': 0.003},
 'θ 3/4 0 1/4 9/16 3/16 1/4 0': {'struct': 'einsum',
                                 'theta': (0.75, 0.0, 0.25, 0.5625, 0.1875, 0.25, 0.0),
                                 'n_embd': 136,
                                 'learning_rate': 0.003},
 'θ 2/3 0 1/3 1/2 1/6 1/3 0': {'struct': 'einsum',
                               'theta': (0.6666666666666666, 0.0, 0.3333333333333333, 0.5,
                                         0.16666666666666666, 0.3333333333333333, 0.0),
                               'n_embd': 132,
                               'learning_rate': 0.003},
 'dense': {'n_embd': 96, 'learning_rate': 0.003}}
flops = 12000000000000.0
seed = [1, 2]
evals = 32
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
