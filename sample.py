"""Print text from a trained model, or how well it predicts a text.

    python sample.py --out_dir=out-btt_moe
    python sample.py --out_dir=out-btt_moe/ckpt_best.pt --start="def main(" --num_samples=3
    python sample.py --out_dir=out-btt_moe --start=FILE:prompt.txt --temperature=0 --stop="return"
    python sample.py --out_dir=out-btt_moe --prompts=prompts.jsonl --top_k=None --top_p=0.9
    python sample.py --out_dir=out-btt_moe --eval=text.txt          perplexity and bits per byte

Config files and --key=value override the keys below, from left to right; --help lists them.
"""
from typing import Annotated, Literal

from configurator import NonNegativeFloat, PositiveInt, Seed, configure, fail
from lib.terminal import prepare_output

# what to sample
out_dir: str = "out"                    # a run's out_dir (its ckpt.pt), or a checkpoint file
start: str | None = None                # the prompt; FILE:path: from a file, -: from stdin; None: a new text
prompts: str | None = None              # a file of prompts instead, one a line; *.jsonl: JSON texts
batch_size: PositiveInt = 8             # samples at once with prompts; windows at once with eval
num_samples: PositiveInt = 1            # texts to make from each prompt
max_new_tokens: PositiveInt = 500       # most tokens to generate for each text
temperature: NonNegativeFloat = 0.8     # below 1 is less random, 0 takes the likeliest token
top_k: PositiveInt | None = 200         # keep only the k likeliest tokens; None: all
top_p: Annotated[float, ("above", 0), ("at most", 1)] = 1.0  # then the likeliest that sum to p; 1: all
stop: str | None = None                 # a text ends before this string, which is not printed
stop_at_end: bool = True                # a text ends at the end-of-text token, if the tokenizer has one
seed: Seed = 1337                       # of the random choices
# what to evaluate instead
eval: str | None = None                 # a text file, - for stdin: the model's cross-entropy on it
window: PositiveInt | None = None       # tokens that the model reads at once; None: its block_size
stride: PositiveInt | None = None       # tokens by which windows slide; None: half a window
# system
device: str | None = None               # 'cuda', 'cuda:1', 'mps', 'cpu'; None: the best there is
dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: bfloat16 on GPUs that have it
kernel: Literal["auto", "torch", "c", "triton"] = "auto"  # for einsums; auto: c on CPUs, else torch
prepare_output()
config = configure(globals())
globals().update(config)

import json
import math
import sys
from collections.abc import Iterator

import numpy as np
import torch

from data import tokenizer
from lib import kernels
from lib.commands import key_of
from lib.device import autocast, choose_device, choose_dtype, use_device
from lib.evaluation import score_text
from lib.stop import StopText
from model import load_checkpoint

if eval is not None:
    mode, unused = "with --eval", {"start", "prompts", "num_samples", "max_new_tokens", "temperature",
                                   "top_k", "top_p", "stop", "stop_at_end", "seed"}
elif prompts is not None:
    mode, unused = "with --prompts", {"start", "window", "stride"}
else:
    mode, unused = "without --eval or --prompts", {"window", "stride", "batch_size"}
for name in sorted(unused & {key_of(word) for word in sys.argv[1:]}):   # a config file may have defaults
    if config[name] is not None:
        fail(f"--{name} has no effect {mode}")
try:
    device, device_type = choose_device(device)
    use_device(device)
    dtype = choose_dtype(dtype, device_type)
    kernels.use_kernel(kernel, device_type, dtype)
    StopText(stop)  # only checks it
except ValueError as e:
    fail(str(e))
amp = autocast(device_type, dtype)

# ---- Model and tokenizer, both from the checkpoint ---------------------------------------------------------

try:
    path, checkpoint, model = load_checkpoint(out_dir)
except ValueError as e:
    fail(str(e))
try:
    tok = tokenizer.from_meta(checkpoint)
except OSError as e:
    fail(str(e))
except Exception as e:
    fail(f"the tokenizer of {path} cannot be used ({type(e).__name__}: {e})")
del checkpoint
model.to(device)

block_size = model.config.block_size
end_of_text = tok.end_of_text if stop_at_end else None
new_text = start is None and prompts is None  # it begins after tok.start

# ---- Texts, and their tokens -------------------------------------------------------------------------------

def read_text(path: str, what: str) -> str:
    """The text of a file, or of stdin if the path is "-"; line ends become newlines, as in training data."""
    try:
        with open(0 if path == "-" else path, encoding="utf-8-sig") as f:
            return f.read()
    except (OSError, ValueError) as e:
        fail(f"the {what} {'on stdin' if path == '-' else path} cannot be read: {e}")


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, one a line, without blank lines. In *.jsonl a prompt may have line breaks."""
    lines = enumerate(read_text(path, "file of prompts").split("\n"), 1)
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        fail(f"the file of prompts {path} holds no prompt")
    if not path.lower().endswith(".jsonl"):
        return [line for _, line in lines]
    found = []
    for number, line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            found.append(None)
        if not isinstance(found[-1], str):
            fail(f"line {number} of {path} is not a JSON string, such as \"one\\ntwo\"")
    return found


def encode(text: str, what: str, function=tok.encode) -> list[int] | np.ndarray:
    try:
        return function(text)
    except ValueError as e:
        fail(f"the {what} does not fit the model's vocabulary: {e}")

# ---- The loss of a text ------------------------------------------------------------------------------------

def evaluate_text() -> None:
    """Prints the model's cross-entropy on the file `eval`; its first token is predicted from tok.start."""
    longest = window or block_size
    step = stride or max(1, longest // 2)
    if longest > block_size:
        fail(f"window = {longest} is more than the {block_size} tokens that the model can see")
    if step > longest:
        fail(f"stride = {step} must not exceed window = {longest}: tokens in between would not be scored")
    text = read_text(eval, "text")
    ids = np.array(encode(text, "text", tok.encode_ordinary), np.int64)
    count, size = len(ids), len(text.encode())
    if not count:
        fail(f"the text {eval} is empty: there is nothing to score")
    ids = torch.from_numpy(np.insert(ids, 0, tok.start)).to(device)
    nats = score_text(model, ids, longest, step, batch_size, amp)
    print(f"{eval}: {count:,} tokens of {size:,} bytes, each after {longest - step + 1:,} tokens or more, "
          "fewer at the start")
    if tok.unknown_id is not None and (unknown := (ids[1:] == tok.unknown_id).sum()):
        print(f"{unknown:,} of them are the unknown mark: the loss does not distinguish what it stands for")
    print(f"{nats / count:.4f} nats per token, perplexity {math.exp(min(nats / count, 700)):.4f}, "
          f"{nats / math.log(2) / size:.4f} bits per byte")

# ---- Samples -----------------------------------------------------------------------------------------------

class Continuation:
    """Turns the tokens of one row of a batch, of which the first `unread` are the prompt's, into the text
    that follows the prompt."""

    def __init__(self, prompt: list[int], unread: int):
        self.unread = unread  # tokens of the prompt that come before its continuation
        self.left = max_new_tokens  # 0 where the text has ended
        after = () if new_text else prompt  # tok.start is not part of the text
        self.decode, self.before_stop = tok.decoder(after), StopText(stop)

    def add(self, token: int) -> str:
        """The text that this token completes; "" for the prompt's own tokens, and after the end."""
        if self.unread or not self.left:
            self.unread = max(0, self.unread - 1)
            return ""
        is_end = token == end_of_text
        self.left = 0 if is_end else self.left - 1
        text = self.before_stop("" if is_end else self.decode(token))
        if not self.left:
            text += self.before_stop(self.decode.flush()) + self.before_stop.flush()
        if self.before_stop.found:
            self.left = 0
        return text


def continuations(batch: list[list[int]]) -> Iterator[list[str]]:
    """Pieces of text, one for each prompt of the batch at a time, until all texts have ended.

    The model reads as many tokens as the shortest prompt has, then one token per row at a time: the prompt's
    own while any are left, otherwise a sampled one. Only a prompt's last block_size tokens are used.
    """
    batch = [ids[-block_size:] for ids in batch]
    shortest, longest = min(map(len, batch)), max(map(len, batch))
    padded = [ids + [-1] * (longest - len(ids)) for ids in batch]
    idx, known = torch.tensor(padded, device=device).split([shortest, longest - shortest], dim=1)
    rows = [Continuation(ids, len(ids) - shortest) for ids in batch]
    with amp:
        for tokens in model.stream(idx, longest - shortest + max_new_tokens, temperature, top_k, top_p,
                                   known=known):
            yield [row.add(token) for row, token in zip(rows, tokens[:, 0].tolist())]
            if not any(row.left for row in rows):
                return


def print_samples() -> None:
    """Prints each prompt with its continuations: as they come, or when those of a batch have all ended."""
    if prompts is not None:
        texts = read_prompts(prompts)
    elif start is None:
        texts = [""]
    elif start == "-" or start.startswith("FILE:"):
        texts = [read_text(start.removeprefix("FILE:"), "prompt file")]
    else:
        texts = [start]
    samples = []  # (what is printed before a continuation, the prompt's tokens)
    for i, text in enumerate(texts, 1):
        name = f"prompt {i} of {len(texts)}" if prompts is not None else ""
        ids = [tok.start] if new_text else encode(text, name or "prompt")
        if not ids:
            fail(f"the {name or 'prompt'} " + ("has no tokens in this vocabulary" if text else
                                               "is empty: give it at least one character"))
        for j in range(1, num_samples + 1):
            number = f"sample {j} of {num_samples}" if num_samples > 1 else ""
            heading = ", ".join(filter(None, (name, number)))
            samples.append(((f"---- {heading}\n" if heading else "") + text, ids))
    torch.manual_seed(seed)
    at_once = 1 if prompts is None else batch_size
    for i in range(0, len(samples), at_once):
        beginnings, batch = zip(*samples[i:i + at_once])
        pieces = continuations(batch)
        if len(batch) > 1:
            for beginning, parts in zip(beginnings, zip(*pieces)):
                print(beginning + "".join(parts))
        else:
            print(beginnings[0], end="", flush=True)
            for [piece] in pieces:
                print(piece, end="", flush=True)
            print()


if eval is None:
    print_samples()
else:
    evaluate_text()
