# Our own reproduction on two CPU cores: characters of Python's standard library, 128 at a time, 3 layers.
#
#     python data/python_char/prepare.py
#     python scaling.py sweep plans/cpu_rates.py --jobs=2       the learning rate of each structure: write the best below
#     python scaling.py sweep plans/cpu.py --jobs=2             the grid; goes on from the runs of the best rates
#     python scaling.py sweep plans/cpu_seeds.py --jobs=2       a second seed at width 64: the noise
#     python scaling.py fit
#
# The rate is constant after its warmup, as in the paper, so that every evaluation is a point of the frontier. Budgets give
# every run 1,300 to 3,200 iterations of 2,048 characters, less than one epoch's worth of the corpus' 10 million: 2e12 to
# 1e14 FLOPs a run. Learning-rate effort, the same for each structure: three rates at width 128, for about a third of its
# budget, and one more beyond where the best was at the edge.
#
# ms per iteration on one core of two, the other one busy with another run (widths 64, 128, 256; 16 x 128):
#     dense 72, 132, 470; low_rank 98, 153, 490; kronecker 145, 195, 615; monarch 118, 175, 347; tt 230, 240, 860;
#     btt 140, 215, 600; btt_moe 330, 375, 850; moe 125, 335, 1000
_large = {64: 5e12, 128: 2e13, 256: 1e14}       # FLOPs by width, where a width costs what dense does
_medium = {64: 3.3e12, 128: 8e12, 256: 2.4e13}  # ν = 3/4
_small = {64: 2e12, 128: 5e12, 256: 1e13}       # ν = 1/2
_rates = {}  # what cpu_rates found, {structure: rate}; 3e-3, the paper's, where it says nothing
_budgets = {"dense": _large, "moe": _large | {256: 7e13}, "btt": _medium, "tt": _medium, "btt_moe": _medium | {256: 1.8e13},
            "monarch": _small, "low_rank": _small, "kronecker": _small}

structures = {label: dict(flops=budget, learning_rate=_rates.get(label, 3e-3)) for label, budget in _budgets.items()}
for _label in ("btt_moe", "moe"):
    structures[_label]["router_balance_rate"] = 0.0  # the paper's routers; balanced ones cost loss at this scale
n_embd = [64, 128, 256]
n_layer = 3
head_size = 32
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
