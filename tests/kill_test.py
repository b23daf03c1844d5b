"""Kill a short run again and again, let it go on, and compare its end with that of a run left alone.

    python -m tests.kill_test                       50 kills, some ten minutes
    python -m tests.kill_test --kills=200 --seed=1 --config=config/btt_moe.py

SIGKILL falls at random moments: half of the kills anywhere between start and end, half while a checkpoint is
being written. After each kill out_dir/ckpt.pt must load and must not be older than before, the half lines in
log.jsonl are counted, and the run goes on by --init_from=auto. When it ends, its weights, optimizer state,
counters and log must be bitwise those of the run left alone. Then another run starts, until there were as
many kills as asked for. Needs nothing but requirements.txt.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

import torch

from data.tokenizer import CHARACTERS
from lib.terminal import prepare_output

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SETTINGS = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=4, gradient_accumulation_steps=2,
                dropout=0.1, max_iters=60, lr_decay_iters=60, warmup_iters=10, eval_interval=10,
                checkpoint_interval=1, eval_iters=4, log_interval=1, sample_tokens=0, device="cpu", seed=7,
                init_from="auto")


class Program:
    """train.py as a user starts it."""

    def __init__(self, arguments: list[str]):
        command = [sys.executable, os.path.join(HERE, "train.py"), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)

    def wait(self) -> int:
        return self.process.wait()

    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def make_dataset(folder: str) -> str:
    """A dataset of some 300,000 characters: this repository's sources, at the top and below lib/ and
    experiments/."""
    os.makedirs(folder)
    sources = [os.path.join(HERE, name) for name in os.listdir(HERE)]
    for room in ("lib", "experiments"):
        for path, _, names in os.walk(os.path.join(HERE, room)):
            sources += [os.path.join(path, name) for name in names]
    text = "".join(open(path, encoding="utf-8").read() for path in sorted(sources) if path.endswith(".py"))
    ids = bytes(CHARACTERS.index(c) for c in text if c in CHARACTERS)
    splits = {"train": ids[:-10_000], "val": ids[-10_000:]}
    for split, part in splits.items():
        with open(os.path.join(folder, f"{split}.bin"), "wb") as f:
            f.write(part)
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump({"tokenizer": {"name": "char", "characters": CHARACTERS}, "vocab_size": len(CHARACTERS),
                   "dtype": "uint8", "train_tokens": len(splits["train"]), "val_tokens": len(splits["val"]),
                   "source": {}}, f)
    return folder


def read_log(out: str) -> tuple[list[dict], int]:
    """(the points of log.jsonl without what depends on a clock, the number of lines that are not whole)."""
    timed = {"ms_per_iter", "tokens_per_s", "utilization", "iterations"}
    points, broken = [], 0
    with open(os.path.join(out, "log.jsonl"), "rb") as f:
        for line in f:
            try:
                point = json.loads(line)
                assert line.endswith(b"\n")
            except (ValueError, AssertionError):
                broken += 1
                continue
            if point["type"] != "run":
                points.append({k: v for k, v in point.items() if k not in timed})
    return points, broken


def same(a, b) -> bool:
    """Bitwise the same, tensors and all."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(out: str, reference: str) -> list[str]:
    """The parts of a finished run that are not bitwise those of the other."""
    a, b = (torch.load(os.path.join(folder, "ckpt.pt"), weights_only=True) for folder in (out, reference))
    found = [name for name in b if name not in ("config", "run_id") and not same(a.get(name), b[name])]
    if read_log(out)[0] != read_log(reference)[0]:
        found.append("log.jsonl")
    return found


def kill_once(start, arguments: list[str], out: str, delay: float | None, pick: random.Random) -> str | None:
    """Starts a run and kills it after `delay` seconds, or while it writes a checkpoint where delay is None.

    Returns what the run was doing, or None if it had ended.
    """
    run, begun, partial = start(arguments), time.monotonic(), os.path.join(out, "ckpt.pt.tmp")
    skip = pick.randrange(8)  # which checkpoint
    before = False
    while delay is None or time.monotonic() < begun + delay:
        if not run.running():
            if run.wait():
                raise SystemExit("the run ended by itself, and not well")
            return None
        there = os.path.exists(partial)
        if delay is None and there and not before:
            if not skip:
                time.sleep(pick.uniform(0, 0.002))
                break
            skip -= 1
        before = there
        time.sleep(0.0001 if delay is None else 0.002)
    run.kill()
    if os.path.exists(partial) or os.path.exists(os.path.join(out, "ckpt_best.pt.tmp")):
        return "writing a checkpoint"
    return "training" if os.path.exists(os.path.join(out, "ckpt.pt")) else "before the first checkpoint"


def check_files(out: str, reached: int) -> tuple[int, int]:
    """(the iteration of ckpt.pt, the half lines in log.jsonl) after a kill; SystemExit if ckpt.pt went back.

    `reached` is the iteration of ckpt.pt before, -1 if there was none.
    """
    ckpt, iteration, half_lines = os.path.join(out, "ckpt.pt"), -1, 0
    if os.path.exists(ckpt):
        iteration = torch.load(ckpt, weights_only=True)["iteration"]
    if iteration < reached:
        raise SystemExit(f"ckpt.pt went back from iteration {reached} to {iteration}, which is none if -1")
    if os.path.exists(os.path.join(out, "log.jsonl")):
        half_lines = read_log(out)[1]
    return iteration, half_lines


def kill_test(start, folder: str, kills: int, seed: int, arguments: list[str]) -> dict:
    """The figures of so many kills; SystemExit with a sentence where a guarantee does not hold."""
    pick = random.Random(seed)
    flags = [*(f"--{k}={v}" for k, v in SETTINGS.items()), *arguments]
    reference, begun = os.path.join(folder, "reference"), time.monotonic()
    if start([*flags, f"--out_dir={reference}"]).wait():
        raise SystemExit("the run that is left alone did not end well")
    whole = time.monotonic() - begun

    places, runs, half_lines = [], 0, 0
    while len(places) < kills:
        out, reached, ended = os.path.join(folder, f"run{runs}"), -1, False
        while not ended and len(places) < kills:
            delay = pick.uniform(0, whole) if pick.random() < 0.5 else None
            place = kill_once(start, [*flags, f"--out_dir={out}"], out, delay, pick)
            if place is None:
                ended = True
            else:
                places.append(place)
                print(f"kill {len(places)}: {place}", flush=True)
            reached, broken = check_files(out, reached)
            half_lines += broken
        if not ended and start([*flags, f"--out_dir={out}"]).wait():
            raise SystemExit("the run did not go on after the last kill")
        differing = differences(out, reference)
        if differing:
            raise SystemExit(f"{out} does not end as the run left alone: {', '.join(differing)}")
        runs += 1
    return dict(kills=len(places), runs=runs, places={place: places.count(place) for place in places},
                half_lines=half_lines, seconds_of_a_whole_run=round(whole, 1))


def main():
    prepare_output()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="config/moe.py", help="a structure config (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(os.path.join(folder, "data"))
        figures = kill_test(Program, folder, args.kills, args.seed, [args.config, f"--dataset={dataset}"])
    places = ", ".join(f"{count} {place}" for place, count in sorted(figures["places"].items()))
    print(f"{figures['kills']} kills ({places}) in {figures['runs']} runs of "
          f"{figures['seconds_of_a_whole_run']} s: every ckpt.pt loaded, {figures['half_lines']} half lines "
          "were in log.jsonl, every run ended bitwise as the one left alone")


if __name__ == "__main__":
    main()
