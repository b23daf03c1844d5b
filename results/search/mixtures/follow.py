# The three best of a search over mixtures, BTT-MoE 8/2 and dense, 4 times the FLOPs of a trial:
#   python -m experiments.scaling sweep results/search/mixtures/follow.py --runs=out-mixtures/follow --jobs=2
structures = \
{'θ 1/3 0 2/3 2/9 1/9 2/3 0, 8 experts, top 2': {'n_embd': 40,
                                                 'struct': 'einsum',
                                                 'theta': (0.3333333333333333, 0.0,
                                                           0.6666666666666666,
                                                           0.2222222222222222,
                                                           0.1111111111111111,
                                                           0.6666666666666666, 0.0),
                                                 'num_experts': 8,
                                                 'top_k': 2,
                                                 'learning_rate': 0.002},
 'θ 3/4 0 1/4 2/9 4/9 1/3 1/8, 8 experts, top 2': {'n_embd': 48,
                                                   'struct': 'einsum',
                                                   'theta': (0.75, 0.0, 0.25,
                                                             0.2222222222222222,
                                                             0.4444444444444444,
                                                             0.3333333333333333, 0.125),
                                                   'num_experts': 8,
                                                   'top_k': 2,
                                                   'learning_rate': 0.002},
 'θ 1/4 1/12 2/3 1/3 1/3 1/3 0, 8 experts, top 2': {'n_embd': 44,
                                                    'struct': 'einsum',
                                                    'theta': (0.25, 0.08333333333333333,
                                                              0.6666666666666666,
                                                              0.3333333333333333,
                                                              0.3333333333333333,
                                                              0.3333333333333333, 0.0),
                                                    'num_experts': 8,
                                                    'top_k': 2,
                                                    'learning_rate': 0.002},
 'btt_moe': {'n_embd': 64, 'struct': 'btt', 'num_experts': 8, 'top_k': 2, 'learning_rate': 0.002},
 'dense': {'n_embd': 48, 'weight_norm': True, 'learning_rate': 0.003}}
flops = 8000000000000.0
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
n_head = 2
weight_decay = 0.0
decay_lr = False
warmup_iters = 100
