# Our own reproduction on two CPU cores: characters of Python's standard library, 128 at a time, 3 layers.
#
#     python data/python_char/prepare.py
#     python -m experiments.scaling sweep experiments/plans/cpu_rates.py --jobs=2   rates; the best are below
#     python -m experiments.scaling sweep experiments/plans/cpu.py --jobs=2         the grid
#     python -m experiments.scaling sweep experiments/plans/cpu_widths.py --jobs=2  widths 24 and 48, and 16
#     python -m experiments.scaling sweep experiments/plans/cpu_seeds.py --jobs=2   second seeds: the noise
#     python -m experiments.scaling sweep experiments/plans/cpu_long.py --jobs=2    to 1e14, and width 192
#     python -m experiments.scaling fit                                             see results/scaling
#
# The rate is constant after its warmup, as in the paper, so that every evaluation is a point of the frontier.
# Every structure has the same widths and budgets, and the same effort for its learning rate. None is aligned
# with heads (head_aligned), since not all can be; weight norm is what each has by default, and dense is also
# here with it. All five take some 24 core-hours of an Intel Xeon with AVX-512.
_budgets = {32: 3.3e12, 64: 1e13, 96: 1e13, 128: 1e13}     # FLOPs by width
_rates = dict(dense=3e-3, dense_normed=3e-3, low_rank=3e-3, kronecker=1.2e-2, monarch=3e-3, tt=1.2e-2,
              btt=3e-3, btt_moe=1.5e-3, btt_moe_16=1.5e-3, moe=3e-3)     # found by cpu_rates.py

structures = {label: dict(flops=_budgets, learning_rate=rate) for label, rate in _rates.items()}
# the baseline goes on, so that what dense needs for the others' losses is known up to their ends
structures["dense_normed"] |= dict(struct="dense", weight_norm=True, flops=_budgets | {64: 2e13, 128: 2e13})
structures["btt_moe_16"] |= dict(struct="btt", num_experts=16, top_k=2)
n_embd = [32, 64, 96, 128]
n_layer = 3
head_size = 32
head_aligned = False
dataset = "python_char"
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
decay_lr = False
warmup_iters = 100
weight_decay = 0.0
seed = 1
evals = 30
eval_iters = 20
log_interval = 20
sample_tokens = 0
