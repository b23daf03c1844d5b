# Our own reproduction on two CPU cores: characters of Python's standard library, 128 at a time, 3 layers.
#
#     python data/python_char/prepare.py
#     python scaling.py sweep plans/cpu_rates.py --jobs=2       the learning rate of each structure: write the best below
#     python scaling.py sweep plans/cpu.py --jobs=2             the grid; goes on from the runs of the best rates
#     python scaling.py sweep plans/cpu_seeds.py --jobs=2       a second seed at width 128: the noise
#     python scaling.py fit
#
# The rate is constant after its warmup, as in the paper, so that every evaluation is a point of the frontier. Budgets give
# every run about 3,000 iterations of 2,048 characters: 6 million, of the corpus' 10 million, so that none is read twice;
# from 3e12 to 1e14 FLOPs a run, and the frontier from some 1e12 on. Learning-rate effort, the same for each structure:
# three rates at width 128, for a quarter of its budget.
#
# Time, by ms per iteration measured on one core of two that others were using too (widths 64, 128, 256; 16 x 128):
#     dense 72, 155, 470; low_rank 98, 157, 490; kronecker 145, 197, 615; monarch 118, 175, 347; tt 230, 312, 860;
#     btt 140, 210, 600; btt_moe 330, 448, 850; moe 125, 335, 1000
# Grid 7.7 core-hours, second seeds 1.9, rates 1.4 of which 0.5 go on in the grid, evaluations 6 %: about 11 core-hours,
# 5 1/2 hours with two jobs; perhaps two thirds of that where nothing else runs.
_large = {64: 8e12, 128: 3e13, 256: 1e14}       # FLOPs by width, where a width costs what dense does
_medium = {64: 5e12, 128: 1.2e13, 256: 4e13}    # ν = 3/4
_small = {64: 3e12, 128: 8e12, 256: 2e13}       # ν = 1/2
_rates = {}  # what cpu_rates found, {structure: rate}; 3e-3, the paper's, where it says nothing
_budgets = {"dense": _large, "moe": _large, "btt": _medium, "tt": _medium, "btt_moe": _medium, "monarch": _small,
            "low_rank": _small, "kronecker": _small}

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
