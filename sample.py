"""Print text from a trained model.

    python sample.py --out_dir=out-btt_moe
    python sample.py --out_dir=out-btt_moe/ckpt_best.pt --start="def main(" --num_samples=3
    python sample.py --out_dir=out-btt_moe --start=FILE:prompt.txt --temperature=0

Config files and --key=value override the keys below, from left to right; --help lists them.
"""
from typing import Literal

from configurator import NonNegativeFloat, PositiveInt, Seed, configure, fail
from lib.terminal import prepare_output

# what to sample
out_dir: str = "out"                    # a run's out_dir (its ckpt.pt), or a checkpoint file
start: str = "\n"                       # the prompt, or FILE:path to read it from a file
num_samples: PositiveInt = 1            # how many texts
max_new_tokens: PositiveInt = 500       # tokens of each
temperature: NonNegativeFloat = 0.8     # below 1 is less random, 0 takes the likeliest token
top_k: PositiveInt | None = 200         # keep only the k likeliest tokens; None: all
seed: Seed = 1337                       # of the random choices
# system
device: str | None = None               # 'cuda', 'cuda:1', 'mps', 'cpu'; None: the best there is
dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: bfloat16 on GPUs that have it
kernel: Literal["auto", "torch", "c", "triton"] = "auto"  # what computes einsums; auto: the best one here
prepare_output()
config = configure(globals())
globals().update(config)

import os

import torch

from data import tokenizer
from lib import kernels
from lib.device import autocast, choose_device, choose_dtype
from model import GPT, GPTConfig

try:
    device, device_type = choose_device(device)
    dtype = choose_dtype(dtype, device_type)
    kernels.use_kernel(kernel, device_type, dtype)
except ValueError as e:
    fail(str(e))
amp = autocast(device_type, dtype)

# ---- Model and tokenizer, both from the checkpoint ---------------------------------------------------------

path = os.path.join(out_dir, "ckpt.pt") if os.path.isdir(out_dir) else out_dir
try:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    tok = tokenizer.from_meta(checkpoint)
except FileNotFoundError:
    fail(f"there is no checkpoint {path}: train one first, or give --out_dir")
except OSError as e:
    fail(str(e))
except Exception as e:
    fail(f"{path} is not a checkpoint that can be read ({type(e).__name__})")
del checkpoint
model.eval().to(device)

# ---- Prompt ------------------------------------------------------------------------------------------------

if start.startswith("FILE:"):
    file = start.removeprefix("FILE:")
    try:
        with open(file, encoding="utf-8") as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        fail(f"the prompt file {file} cannot be read: {e}")
try:
    prompt = torch.tensor([tok.encode(start)], device=device, dtype=torch.long)  # (1, T)
except ValueError as e:
    fail(f"the prompt does not fit the model's vocabulary: {e}")
if prompt.numel() == 0:
    fail("the prompt is empty: give --start at least one character")

# ---- Samples -----------------------------------------------------------------------------------------------

torch.manual_seed(seed)
for i in range(num_samples):
    if num_samples > 1:
        print(f"---- sample {i + 1} of {num_samples}")
    print(start, end="", flush=True)
    with amp:
        tokens = model.stream(prompt, max_new_tokens, temperature, top_k)
        tokenizer.print_tokens(tok, tokens, after=prompt[0].tolist())
