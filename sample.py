"""Print text from a trained model.

    python sample.py --out_dir=out-quickstart
    python sample.py --out_dir=out/ckpt_best.pt --start="def main(" --num_samples=3
    python sample.py --start=FILE:prompt.txt --temperature=0

Config files and --key=value override the keys below, from left to right; --help lists them.
"""
import configurator

# what to sample
out_dir: str = "out"            # a run's out_dir (its ckpt.pt), or a checkpoint file
start: str = "\n"               # the prompt, or FILE:path to read it from a file
num_samples: int = 1            # how many texts
max_new_tokens: int = 500       # tokens of each
temperature: float = 0.8        # below 1 is less random, 0 takes the likeliest token
top_k: int | None = 200         # keep only the k likeliest tokens; None: all
seed: int = 1337                # of the random choices
# system
device: str | None = None       # 'cuda', 'cuda:1', 'mps', 'cpu'; None: the best there is
dtype: str | None = None        # 'float32', 'bfloat16', 'float16'; None: bfloat16 where the GPU has it, else float32
config = configurator.configure(globals())
globals().update(config)

import os

import torch

from lib import device as devices
from data import tokenizer
from configurator import fail
from model import GPT, GPTConfig

for key in ("num_samples", "max_new_tokens"):
    if config[key] < 1:
        fail(f"{key} must be at least 1; got {config[key]}")
if temperature < 0:
    fail(f"temperature must not be negative; got {temperature}")
if top_k is not None and top_k < 1:
    fail(f"top_k must be at least 1, or None; got {top_k}")
if dtype not in (None, "float32", "bfloat16", "float16"):
    fail(f"dtype must be float32, bfloat16 or float16; got {dtype!r}")

device, device_type, dtype = devices.choose(device, dtype)
autocast = devices.autocast(device_type, dtype)

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

if start.startswith("FILE:"):
    try:
        with open(start[len("FILE:"):], encoding="utf-8") as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        fail(f"the prompt file {start[len('FILE:'):]} cannot be read: {e}")
try:
    prompt = torch.tensor([tok.encode(start)], device=device, dtype=torch.long)
except ValueError as e:
    fail(f"the prompt does not fit the model's vocabulary: {e}")
if prompt.numel() == 0:
    fail("the prompt is empty: give --start at least one character")

torch.manual_seed(seed)
for i in range(num_samples):
    if num_samples > 1:
        print(f"---- sample {i + 1} of {num_samples}")
    decode = tok.decoder()
    print(start, end="", flush=True)
    with autocast:
        for token in model.stream(prompt, max_new_tokens, temperature, top_k):
            print(decode(token.item()), end="", flush=True)
    print(decode.flush())
