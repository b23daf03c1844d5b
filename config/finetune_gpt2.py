# GPT-2 on your own text, with nanoGPT's settings: 32 sequences an iteration, a small constant learning rate.
#     python data/openwebtext/prepare.py --source my.txt --out-dir data/mine
#     python train.py config/finetune_gpt2.py --dataset=mine
init_from = "gpt2"                  # or gpt2-medium, gpt2-large, gpt2-xl, or a folder with such a model
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20                      # 655,360 tokens at a block_size of 1024
learning_rate = 3e-5                # AdamW's for every weight: µP's factors are off
decay_lr = False
warmup_iters = 0
eval_interval = 5
eval_iters = 40
log_interval = 1
