"""train.py and configurator.py given what a user may get wrong: one sentence, a status that is not 0, and no out_dir."""
import contextlib
import io
import json
import os
import random
import runpy
import subprocess
import sys
import time

import configurator
from tests.conftest import PROCESSES, ROOT, write_ids

KEYS = configurator.read_keys(str(ROOT / "train.py"))
WRONG = {int: ["1.5", "two", "", " ", "1e400", "0x10", "nan", "\uff11\uff12", "True", "1,2", "9" * 5000],
         float: ["nan", "inf", "-inf", "", "fast", "1,2", "1e999", "\u0663", "False", "1 2"],
         bool: ["maybe", "", "2", "y", "1.0", "\uff34\uff32\uff35\uff25"], tuple: ["a", "1,,2", "(1", "1;2", "", "1,nan"]}
COMMON = dict(n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=2, gradient_accumulation_steps=1, max_iters=0,
              eval_iters=1, sample_tokens=0, device="cpu", dataset="data", out_dir="out")

OUT_OF_RANGE = """
n_layer=0 n_layer=-1 n_layer=1000000000 n_layer=99999999999 n_head=0 n_head=-2 n_head=5 n_embd=0 n_embd=-32 n_embd=1073741824
n_embd=100000000 n_embd=33 block_size=0 block_size=-1 block_size=20000 block_size=1000000000 batch_size=0 batch_size=-4
batch_size=1000000000 gradient_accumulation_steps=0 gradient_accumulation_steps=-1 gradient_accumulation_steps=1000000000
eval_iters=0 eval_iters=-1 eval_interval=0 eval_interval=-5 checkpoint_interval=0 checkpoint_interval=-1 log_interval=0
log_interval=-1 max_iters=-1 max_iters=1e18 warmup_iters=-1 lr_decay_iters=-1 sample_tokens=-1 max_skipped=0 max_skipped=-1
learning_rate=-1 learning_rate=1e300 min_lr=-1 min_lr=1 weight_decay=-0.1 weight_decay=1e40 beta1=1 beta1=-0.1 beta2=1
beta2=2 grad_clip=-1 dropout=1 dropout=-0.1 dropout=2 seed=-1 seed=99999999999999999999999 mup_base_width=0 mup_base_width=-1
aux_loss_weight=-1 router_balance_rate=-1 num_experts=1 num_experts=-1 ffn_experts=1 ffn_experts=-3 num_experts=1000000000
ffn_experts=1000000000
""".split()

CHOICES = """
init_from=gpt2 init_from= init_from=Auto init_from=None dtype=float8 dtype= dtype=fp16 backend=carrier_pigeon backend= device=abacus
device=meta device= device=cuda:99 device=cpu:x struct=btx struct= struct=None layers=some layers= dataset=tolstoy dataset=
dataset=\0x dataset=data/train.bin out_dir= out_dir=data/meta.json out_dir=data/meta.json/x out_dir=\0 dataset=.
""".replace("\0", "%00").split()

CONTRADICTORY = """
num_experts=4 ffn_experts=4 | num_experts=4 top_k=5 | num_experts=4 top_k=0 | num_experts=4 top_k=-1 | ffn_experts=4 top_k=5
struct=einsum | struct=einsum theta=1,0 | struct=einsum theta=1,1,1,1,1,1,1 | struct=einsum theta=2,0,-1,1,0,0,0
struct=btt theta=(1,0,0,1,0,0,0) | struct=monarch rank=2 | struct=low_rank rank=0 | struct=low_rank rank=-3 | struct=btt rank=0
struct=dense rank=4 | struct=dyad dyad_blocks=0 | struct=dyad dyad_blocks=-2 | struct=dyad dyad_blocks=7
struct=dyad dyad_variant=xy | struct=dyad rank=2 | struct=monarch n_embd=97 n_head=1 | struct=kronecker n_embd=31 n_head=1
head_aligned=True struct=dense | head_aligned=True struct=btt layers=mlp | head_aligned=True struct=tt
init_from=resume | init_from=resume out_dir=new/folder | learning_rate=1e-3 min_lr=1e-2 | batch_size=1048576 gradient_accumulation_steps=2
""".replace("\n", "|").split("|")

ARGUMENTS = ["", " ", "-", "--", "---", "--=1", "-x", "-n_layer=2", "n_layer=2", "\u2013n_layer=2", "\u2014\u2014n_layer=2", "train",
             "config/bt.py", "config", "config/", "nowhere.py", "data/train.bin", "\udcff", "x" * 5000, "a\nb", "\t",
             "--n_lay\u0435r=2", "--\U0001f600=1", "--help=1", "--config=1", "--globals=1", "--__file__=x", "--ddp=True",
             "--vocab_size=5", "--master=True", "--iteration=5", "\x1b[31m", "--n_layer 2", "--n_layer:2", "/n_layer=2"]

FILES = ["n_layer = 'two'", "n_layer = 1.5", "n_layer = None", "n_layr = 2", "n_layer = [2]", "n_layer =", "n_layer = 1 // 0",
         "import nothing_of_this_name", "raise SystemExit(0)", "exit()", "assert False", "def n_layer(): pass", "N = 3", "for i in (1,): pass",
         "n_embd = -1", "out_dir = 3", "out_dir = ''", "out_dir = 'a\\0b'", "out_dir = '\\ud800'", "theta = 5", "learning_rate = float('nan')",
         "learning_rate = 10 ** 400", "bias = 1", "(" * 2000, "\0", "batch_size = True", "dataset = None",
         "out_dir = 'new/' + 'y' * 300", "out_dir = 'y' * 5000", "class C: pass\nstruct = C()", "def f(): f()\nf()", "open('nowhere')",
         "warmup_iters = 2 ** 70", "beta1 = 1j", "betas = (1, 2)", "\u0435 = 1", "struct = 'btt'\nrank = 'all'",
         '{"n_layer": 2}', "n_layer: 2", "n_layer == 2", "dict(n_layer=2)", "n_layer"]


def cases() -> list[tuple[list[str], list[str]]]:
    """(arguments, words that the sentence must have): the same at every call."""
    pick = random.Random(0)
    found = []
    for name, key in KEYS.items():
        place = pick.randrange(len(name))
        for wrong in sorted({name[:place] + name[place + 1:], name.upper()} - KEYS.keys()):
            found.append(([f"--{wrong}=1"], ["--"]))
        found.append(([f"--{name}"], [f"--{name}="]))
        for text in pick.sample(WRONG.get(key.type, []), min(3, len(WRONG.get(key.type, [])))):
            found.append(([f"--{name}={text}"], [name]))
    for flag in OUT_OF_RANGE:
        found.append(([f"--{flag}"], []))
    for flag in CHOICES:
        found.append(([f"--{flag}".replace("%00", "\0")], []))
    for flags in filter(str.strip, CONTRADICTORY):
        found.append(([f"--{flag}" for flag in flags.split()], []))
    found += [([argument], []) for argument in ARGUMENTS]
    # what is wrong in itself names the file; what only train.py finds wrong does not know where it was set
    found += [([f"bad{i}.py"], [] if text.startswith(("out_dir = '", "warmup_iters", "n_embd")) else [f"bad{i}.py"])
              for i, text in enumerate(FILES)]
    return found


def try_all(folder, answers):
    """In a process of its own: for each case [exit status or exception, stderr, what is new in the folder, seconds]."""
    import torch
    torch.set_num_threads(1)
    os.chdir(folder)
    for i, text in enumerate(FILES):
        with open(f"bad{i}.py", "w", encoding="utf-8", errors="surrogatepass") as f:
            f.write(text + "\n")
    before = sorted(os.listdir())
    found = []
    for arguments, _ in cases():
        sys.argv = [str(ROOT / "train.py"), *(f"--{k}={v}" for k, v in COMMON.items()), *arguments]
        out, err, status, start = io.StringIO(), io.StringIO(), 0, time.process_time()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as e:
                status = e.code
            except BaseException as e:
                status = f"{type(e).__name__}: {e}"
        left = [name for name in sorted(os.listdir()) if name not in before]
        found.append([status, err.getvalue(), left, time.process_time() - start])
    with open(answers, "w") as f:
        json.dump(found, f)


def test_every_mistake_is_one_sentence(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    write_ids(folder / "data", [1, 2, 3] * 2000, [1, 2, 3] * 1000)
    process = PROCESSES.Process(target=try_all, args=(str(folder), str(tmp_path / "answers")))
    process.start()
    process.join(1800)
    assert process.exitcode == 0
    found = cases()
    assert len(found) >= 300
    wrong = []
    for (arguments, words), (status, err, left, seconds) in zip(found, json.load(open(tmp_path / "answers")), strict=True):
        one = err.startswith("error: ") and len(err.splitlines()) == 1 and len(err) < 2000 and "Traceback" not in err
        if status != 1 or not one or left or seconds > 20 or not all(word in err for word in words):
            wrong.append((arguments, status, err[:300], left, seconds))
    assert not wrong, f"{len(wrong)} of {len(found)}: {wrong[:20]}"


def test_a_bad_flag_does_not_wait_for_torch(tmp_path):
    """A program without torch, started as a user starts it, tells each of these."""
    write_ids(tmp_path / "data", [1, 2, 3] * 20, [1, 2, 3] * 10)
    program = f"""if True:
        import runpy, sys
        sys.modules["torch"] = None
        path, wrong = {str(ROOT / "train.py")!r}, 0
        sys.path.insert(0, {str(ROOT)!r})
        for flag in sys.argv[1:]:
            sys.argv = [path, flag]
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as e:
                wrong += e.code == 1
        print(wrong)"""
    flags = ["--n_layr=1", "--n_layer=two", "--batch_size=0", "--learning_rate=-1", "--init_from=gpt2", "--dtype=float8", "--min_lr=1",
             "--out_dir=", "--out_dir=data/meta.json", "--seed=99999999999999999999", "--backend=pigeon", "config/bt.py", "--batch_size=9e6"]
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=20 * len(flags))
    assert done.stdout.split() == [str(len(flags))], done.stderr
    assert len(done.stderr.splitlines()) == len(flags) and os.listdir(tmp_path) == ["data"]
