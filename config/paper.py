# The paper's protocol (Potapczynski et al., arXiv 2410.02117), for a GPU: characters of OpenWebText, 128 at a
# time, 65,536 a step, 100,000 steps at a constant 3e-3, the rate of a dense layer of width 768. One of its
# sizes: 3 layers of width 768. experiments/plans/paper.py has widths 256 to 4096 and 3 and 6 layers, and says
# what is the paper's and what is ours; paper_moe.py has experts, and 9 layers too.
# Data: python data/openwebtext_char/prepare.py.
dataset = "openwebtext_char"
block_size = 128
batch_size = 64
gradient_accumulation_steps = 8     # 64 x 8 x 128 = 65,536
n_layer = 3
n_head = 12                         # heads of 64
n_embd = 768
head_aligned = False                # off, as in the paper; our older monarch and btt runs had the default, on
max_iters = 100_000
learning_rate = 3e-3
mup_base_width = 768
decay_lr = False
warmup_iters = 2_000
weight_decay = 0.0
eval_interval = 2_500
eval_iters = 200
log_interval = 100
