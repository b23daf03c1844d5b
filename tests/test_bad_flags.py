"""train.py given flags, config files and datasets that are wrong: one sentence on stderr, exit status 1, and
no out_dir."""
import contextlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import configurator
from tests.conftest import PROCESSES, ROOT, write_ids
from tests.runs import assert_one_sentence

KEYS = configurator.read_keys(str(ROOT / "train.py"))
WRONG_VALUES = {
    int: ["1.5", "two", "", " ", "1e400", "0x10", "nan", "True", "1,2", "9" * 5000],
    float: ["nan", "inf", "-inf", "", "fast", "1,2", "1e999", "False", "1 2"],
    bool: ["maybe", "", "2", "y", "1.0"], tuple: ["a", "1,,2", "(1", "1;2", "", "1,nan"], str: []}
SMALL_RUN = dict(n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=2, gradient_accumulation_steps=1,
                 max_iters=0, eval_iters=1, sample_tokens=0, device="cpu", dataset="data", out_dir="out")

OUT_OF_RANGE = """
n_layer=0 n_layer=-1 n_layer=99999999999 n_head=0 n_head=-2 n_head=5 n_embd=0 n_embd=-32 n_embd=33
block_size=0 block_size=-1 block_size=20000 block_size=1000000000 batch_size=0 batch_size=-4
batch_size=1000000000 gradient_accumulation_steps=0 gradient_accumulation_steps=-1
gradient_accumulation_steps=1000000000
eval_iters=0 eval_iters=-1 eval_interval=0 eval_interval=-5 checkpoint_interval=0 checkpoint_interval=-1
log_interval=0 log_interval=-1 max_iters=-1 max_iters=1e18 warmup_iters=-1 lr_decay_iters=-1 sample_tokens=-1
max_skipped=0 max_skipped=-1 learning_rate=-1 learning_rate=1e300 min_lr=-1 min_lr=1 weight_decay=-0.1
weight_decay=1e40 beta1=1 beta1=-0.1 beta2=1 beta2=2 grad_clip=-1 dropout=1 dropout=-0.1 dropout=2 seed=-1
seed=99999999999999999999999 mup_base_width=0 mup_base_width=-1 aux_loss_weight=-1 router_balance_rate=-1
num_experts=1 num_experts=-1 ffn_experts=1 ffn_experts=-3 num_experts=32768 ffn_experts=1000000000
""".split()

TOO_LARGE = """
n_layer=1000000000 n_embd=100000000 n_embd=1073741824
""".split()

NO_SUCH_CHOICE = """
init_from=gpt3 init_from= init_from=Auto init_from=None dtype=float8 dtype= dtype=fp16 backend=carrier_pigeon
backend= device=abacus device=meta device= device=cuda:99 device=cpu:x struct=btx struct= struct=None
layers=some layers= dataset=tolstoy dataset= dataset=\0x dataset=data/train.bin out_dir=
out_dir=data/meta.json out_dir=data/meta.json/x out_dir=\0 dataset=.
""".split()

CONTRADICTIONS = """
num_experts=4 ffn_experts=4 | num_experts=4 top_k=5 | num_experts=4 top_k=0 | num_experts=4 top_k=-1
ffn_experts=4 top_k=5 | struct=einsum | struct=einsum theta=1,0 | struct=einsum theta=1,1,1,1,1,1,1
struct=einsum theta=2,0,-1,1,0,0,0 | struct=btt theta=(1,0,0,1,0,0,0) | struct=monarch rank=2
struct=low_rank rank=0 | struct=low_rank rank=-3 | struct=btt rank=0 | struct=dense rank=4
struct=dyad dyad_blocks=0 | struct=dyad dyad_blocks=-2 | struct=dyad dyad_blocks=7
struct=dyad dyad_variant=xy | struct=dyad rank=2 | struct=monarch n_head=1 n_embd=97
struct=kronecker n_head=1 n_embd=31
head_aligned=True struct=dense | head_aligned=True struct=btt layers=mlp | head_aligned=True struct=tt
init_from=resume | init_from=resume out_dir=new/folder | learning_rate=1e-3 min_lr=1e-2
lr_decay_iters=4 warmup_iters=5 | lr_decay_iters=0 warmup_iters=1 | lr_decay_iters=1999
batch_size=1048576 gradient_accumulation_steps=2
""".strip().replace("\n", "|").split("|")

NO_FLAG = ["", " ", "-", "--", "---", "--=1", "-x", "-n_layer=2", "n_layer=2", "\u2013n_layer=2", "train",
           "config/bt.py", "config", "config/", "nowhere.py", "\udcff", "x" * 5000, "a\nb",
           "\t",
           "--n_lay\u0435r=2", "--\U0001f600=1", "--help=1", "--config=1", "--globals=1", "--__file__=x",
           "--ddp=True", "--vocab_size=5", "--master=True", "--iteration=5", "\x1b[31m", "--n_layer 2",
           "--n_layer:2", "/n_layer=2"]

# What is wrong in itself names the file; what only train.py finds wrong does not say where it was set.
FILES = ["n_layer = 'two'", "n_layer = 1.5", "n_layer = None", "n_layr = 2", "n_layer = [2]", "n_layer =",
         "n_layer = 1 // 0", "import nothing_of_this_name", "raise SystemExit(0)", "exit()", "assert False",
         "def n_layer(): pass", "N = 3", "for i in (1,): pass", "n_embd = -1", "out_dir = 3", "theta = 5",
         "learning_rate = float('nan')", "learning_rate = 10 ** 400", "bias = 1", "(" * 2000, "\0",
         "batch_size = True", "dataset = None", "class C: pass\nstruct = C()", "def f(): f()\nf()",
         "open('nowhere')", "warmup_iters = 2 ** 70", "beta1 = 1j", "betas = (1, 2)", "\u0435 = 1",
         "struct = 'btt'\nrank = 'all'", '{"n_layer": 2}', "n_layer: 2", "n_layer == 2", "dict(n_layer=2)",
         "n_layer"]
FILES_WITH_BAD_PATHS = ["out_dir = ''", "out_dir = 'a\\0b'", "out_dir = '\\ud800'",
                        "out_dir = 'new/' + 'y' * 300", "out_dir = 'y' * 5000"]

# a command line, and what its sentence says: what is wrong, and what to do
WORDS = [
    ("data/train.bin", "data/train.bin", "SyntaxError"),
    ("--learning_rte=1", "learning_rte", "learning_rate"),
    ("--n_layer=two", "n_layer", "two"),
    ("ROOT/config/bt.py", "config/bt.py", "config/btt.py"),
    ("--dataset=tolstoy", "tolstoy", "data/*/prepare.py"),
    ("--n_head=5", "n_head = 5", "n_embd = 32"),
    ("--num_experts=4 --top_k=5", "top_k", "num_experts = 4", "got 5"),
    ("--ffn_experts=4 --num_experts=4", "num_experts", "ffn_experts"),
    ("--init_from=resume", "ckpt.pt", "scratch"),
    ("--init_from=gpt3", "gpt3", "resume"),
    ("ROOT/config/monarch.py --n_embd=97 --n_head=1", "97"),
    ("--struct=btx", "btx", "btt"),
    ("--struct=btt --theta=(1,0,0,1,0,0,0)", "theta", "einsum"),
    ("--struct=einsum", "theta", "einsum"),
    ("--struct=monarch --rank=2", "rank", "monarch"),
    ("--layers=some", "layers", "some"),
    ("--learning_rate=-1e-3", "learning_rate", "-0.001"),
    ("--batch_size=0", "batch_size", "0"),
    ("--beta2=1", "beta2", "1.0"),
    ("--dropout=1", "dropout", "1.0"),
    ("--dtype=float8", "dtype", "float8"),
    ("--device=abacus", "abacus"),
    ("--block_size=4000", "val.bin", "4000"),
]
if not (ROOT / "data" / "python_char" / "meta.json").exists():
    WORDS.append(("--dataset=python_char", "python_char", "data/python_char/prepare.py"))


def change_meta(folder, **changes):
    """Sets keys of meta.json; None removes one."""
    meta = json.loads((folder / "meta.json").read_text()) | changes
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))


DAMAGES = {
    "not JSON": lambda folder: (folder / "meta.json").write_text('{"dtype": "uint8",'),
    "not an object": lambda folder: (folder / "meta.json").write_text("[1, 2]"),
    "empty": lambda folder: (folder / "meta.json").write_text("{}"),
    "no dtype": lambda folder: change_meta(folder, dtype=None),
    "unknown dtype": lambda folder: change_meta(folder, dtype="float32"),
    "no count": lambda folder: change_meta(folder, train_tokens=None),
    "count of text": lambda folder: change_meta(folder, val_tokens="many"),
    "vocabulary of text": lambda folder: change_meta(folder, vocab_size="96"),
    "unknown tokenizer": lambda folder: change_meta(folder, tokenizer={"name": "runes"}),
    "no tokenizer": lambda folder: change_meta(folder, tokenizer=None),
    "short train.bin": lambda folder: os.truncate(folder / "train.bin", 500),
    "no val.bin": lambda folder: os.remove(folder / "val.bin"),
    "empty train.bin": lambda folder: os.truncate(folder / "train.bin", 0),
    "one byte more of val.bin": lambda folder: (folder / "val.bin").write_bytes(b"\1" * 301),
    "a folder as val.bin": lambda folder: (os.remove(folder / "val.bin"), os.mkdir(folder / "val.bin")),
    "uint16": lambda folder: change_meta(folder, dtype="uint16"),
    "another vocabulary": lambda folder: change_meta(folder, vocab_size=97),
    "fraction of a count": lambda folder: change_meta(folder, train_tokens=600.0),
    "infinite count": lambda folder: change_meta(folder, train_tokens=float("inf")),
    "not UTF-8": lambda folder: (folder / "meta.json").write_bytes(b"\xff{}"),
    "nested": lambda folder: (folder / "meta.json").write_text("[" * 100_000),
    "no meta.json": lambda folder: os.remove(folder / "meta.json"),
}
BEYOND = [("train", 0), ("train", -1), ("train", 300), ("val", 0), ("val", -1)]  # (split, where an id is 96)


def list_mistakes() -> list[tuple[list[str], tuple[str, ...]]]:
    """Returns (arguments, what the sentence must contain) of each mistake: the same at every call."""
    pick = random.Random(0)
    mistakes = []
    for name, key in KEYS.items():
        place = pick.randrange(len(name))
        for misspelt in sorted({name[:place] + name[place + 1:], name.upper()} - KEYS.keys()):
            mistakes.append(([f"--{misspelt}=1"], f"unknown key '{misspelt}'"))
        mistakes.append(([f"--{name}"], f"--{name}="))
        wrong = WRONG_VALUES[key.type]
        mistakes += [([f"--{name}={text}"], f"--{name}") for text in pick.sample(wrong, min(3, len(wrong)))]
    mistakes += [([f"--{flag}"], flag.partition("=")[0]) for flag in OUT_OF_RANGE + NO_SUCH_CHOICE]
    mistakes += [([f"--{flag}"], "model") for flag in TOO_LARGE]
    for flags in CONTRADICTIONS:    # the last key is named, or the width that does not factor
        key, _, value = flags.split()[-1].partition("=")
        mistakes.append(([f"--{flag}" for flag in flags.split()], value if key == "n_embd" else key))
    mistakes += [([argument], "unknown key" if argument.startswith("-") else "config file")
                 for argument in NO_FLAG]
    mistakes += [([f"bad{i}.py"], f"bad{i}.py") for i in range(len(FILES))]
    mistakes += [([f"bad{len(FILES) + i}.py"], "out_dir") for i in range(len(FILES_WITH_BAD_PATHS))]
    mistakes = [(arguments, (word,)) for arguments, word in mistakes]
    mistakes += [([word.replace("ROOT", str(ROOT)) for word in arguments.split()], words)
                 for arguments, *words in WORDS]
    for i, damage in enumerate(DAMAGES):
        file = ".bin" if ".bin" in damage or damage == "uint16" else "meta.json"
        mistakes.append(([f"--dataset=damaged{i}"], (f"damaged{i}", file)))
    return mistakes + [([f"--dataset={split} {place}"], (f"{split}.bin", "96", "95"))
                       for split, place in BEYOND]


MISTAKES = list_mistakes()


def make_mistakes(folder, answers):
    """In a process of its own: writes [exit status or exception, stderr, new files in the folder] of each
    mistake."""
    import torch
    torch.set_num_threads(1)
    os.chdir(folder)
    for i, damage in enumerate(DAMAGES.values()):
        damage(write_ids(Path(f"damaged{i}"), [1, 2, 3] * 200, [1, 2, 3] * 100))
    for split, place in BEYOND:
        ids = {"train": [1, 2, 3] * 200, "val": [1, 2, 3] * 100}
        ids[split][place] = 96
        write_ids(Path(f"{split} {place}"), ids["train"], ids["val"])
    for i, text in enumerate(FILES + FILES_WITH_BAD_PATHS):
        with open(f"bad{i}.py", "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text + "\n")
    before = set(os.listdir())
    found, code = [], compile((ROOT / "train.py").read_text(encoding="utf-8"), ROOT / "train.py", "exec")
    for arguments, _ in MISTAKES:
        sys.argv = [str(ROOT / "train.py"), *(f"--{k}={v}" for k, v in SMALL_RUN.items()), *arguments]
        stderr, status = io.StringIO(), 0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            try:
                exec(code, dict(__name__="__main__", __file__=sys.argv[0]))
            except SystemExit as stop:
                status = stop.code
            except BaseException as error:
                status = f"{type(error).__name__}: {error}"
        found.append([status, stderr.getvalue(), sorted(set(os.listdir()) - before)])
    with open(answers, "w") as file:
        json.dump(found, file)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The outcomes of MISTAKES, in their order: all in one process, since each needs torch."""
    folder = tmp_path_factory.mktemp("bad_flags")
    (folder / "work").mkdir()
    write_ids(folder / "work" / "data", [1, 2, 3] * 2000, [1, 2, 3] * 1000)
    process = PROCESSES.Process(target=make_mistakes, args=(str(folder / "work"), str(folder / "answers")))
    process.start()
    process.join(1800)
    assert process.exitcode == 0
    return json.loads((folder / "answers").read_text())


@pytest.mark.parametrize("number", range(len(MISTAKES)),
                         ids=[ascii(" ".join(arguments))[1:-1][:50] for arguments, _ in MISTAKES])
def test_a_mistake_is_one_sentence_and_leaves_no_out_dir(outcomes, number):
    status, stderr, left = outcomes[number]
    assert status == 1, stderr
    assert stderr.startswith("error: ") and len(stderr.splitlines()) == 1 and len(stderr) < 2000, stderr
    assert all(word in stderr for word in MISTAKES[number][1]) and "Traceback" not in stderr
    assert left == []


def test_accumulation_that_processes_do_not_divide(run, flags, tmp_path):
    done = run("train.py", *flags(gradient_accumulation_steps=3), WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert_one_sentence(done, "gradient_accumulation_steps = 3", "2 processes")
    assert not (tmp_path / "out").exists()


def test_a_mistake_at_a_real_start(python_text, tmp_path):
    """Also when torch is imported afresh, with all that it may print."""
    command = [sys.executable, ROOT / "train.py", f"--dataset={python_text}", "--n_head=5",
               f"--out_dir={tmp_path / 'out'}"]
    assert_one_sentence(subprocess.run(command, capture_output=True, text=True, timeout=600), "n_head = 5")
    assert not (tmp_path / "out").exists()


def test_out_dir_that_is_a_file(run, flags, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert_one_sentence(run("train.py", *flags()), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_a_bad_flag_is_reported_without_torch(tmp_path):
    write_ids(tmp_path / "data", [1, 2, 3] * 20, [1, 2, 3] * 10)
    program = f"""if True:
        import runpy, sys
        sys.modules["torch"] = None
        path, refused = {str(ROOT / "train.py")!r}, 0
        sys.path.insert(0, {str(ROOT)!r})
        for flag in sys.argv[1:]:
            sys.argv = [path, flag]
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as stop:
                refused += stop.code == 1
        print(refused)"""
    flags = ["--n_layr=1", "--n_layer=two", "--batch_size=0", "--learning_rate=-1", "--init_from=gpt3",
             "--dtype=float8", "--min_lr=1", "--out_dir=", "--out_dir=data/meta.json",
             "--seed=99999999999999999999",
             "--backend=pigeon", "config/bt.py", "--batch_size=9e6", "--lr_decay_iters=1999"]
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=tmp_path, capture_output=True,
                          text=True, timeout=20 * len(flags))
    assert done.stdout.split() == [str(len(flags))], done.stderr
    assert len(done.stderr.splitlines()) == len(flags) and os.listdir(tmp_path) == ["data"]
