"""Settings and datasets that a user can get wrong: train.py says so in one sentence, and writes nothing."""
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, write_ids
from tests.runs import assert_one_sentence

MISTAKES = {
    "unknown key": ("--learning_rte=1", "learning_rte", "learning_rate"),
    "wrong type": ("--n_layer=two", "n_layer", "two"),
    "no such config file": ("config/bt.py", "config/bt.py", "config/btt.py"),
    "dataset not prepared": ("--dataset=python_char", "python_char", "python data/python_char/prepare.py"),
    "no such dataset": ("--dataset=tolstoy", "tolstoy", "data/*/prepare.py"),
    "heads": ("--n_head=5", "n_head = 5", "n_embd = 32"),
    "too few experts": ("--num_experts=4 --top_k=5", "top_k", "num_experts = 4", "got 5"),
    "one expert": ("--ffn_experts=1", "ffn_experts", "1"),
    "both kinds of experts": ("--ffn_experts=4 --num_experts=4", "num_experts", "ffn_experts"),
    "no checkpoint": ("--init_from=resume", "ckpt.pt", "scratch"),
    "init_from": ("--init_from=gpt3", "gpt3", "resume"),
    "prime width": ("config/monarch.py --n_embd=97 --n_head=1", "97"),
    "unknown struct": ("--struct=btx", "btx", "btt"),
    "theta without einsum": ("--struct=btt --theta=(1,0,0,1,0,0,0)", "theta", "einsum"),
    "einsum without theta": ("--struct=einsum", "theta", "einsum"),
    "rank of monarch": ("--struct=monarch --rank=2", "rank", "monarch"),
    "layers": ("--layers=some", "layers", "some"),
    "negative learning rate": ("--learning_rate=-1e-3", "learning_rate", "-0.001"),
    "no batch": ("--batch_size=0", "batch_size", "0"),
    "no width": ("--n_embd=0", "n_embd", "0"),
    "beta": ("--beta2=1", "beta2", "1.0"),
    "dropout": ("--dropout=1", "dropout", "1.0"),
    "dtype": ("--dtype=float8", "dtype", "float8"),
    "device": ("--device=abacus", "abacus"),
    "block_size": ("--block_size=20000", "val.bin", "20000"),
}


@pytest.fixture
def attempt(run, flags, tmp_path):
    """attempt("--n_head=5", ...) -> the process, which has ended; it must not have made its out_dir."""
    def attempt(*arguments, settings={}, **options):
        done = run("train.py", *flags(**settings), *arguments, **options)
        assert not (tmp_path / "out").exists()
        return done
    return attempt


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, attempt):
    arguments, *words = MISTAKES[mistake]
    if mistake == "dataset not prepared" and (ROOT / "data" / "python_char" / "meta.json").exists():
        pytest.skip("python_char is prepared here")
    assert_one_sentence(attempt(*arguments.split()), *words)


def test_accumulation_that_processes_do_not_divide(attempt):
    done = attempt("--gradient_accumulation_steps=3", WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert_one_sentence(done, "gradient_accumulation_steps = 3", "2 processes")


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


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_is_one_sentence(damage, attempt, tmp_path):
    folder = write_ids(tmp_path / "data", [1, 2, 3] * 200, [1, 2, 3] * 100)
    DAMAGES[damage](folder)
    file = ".bin" if ".bin" in damage or damage == "uint16" else "meta.json"
    assert_one_sentence(attempt(settings=dict(dataset=folder)), str(folder), file)


@pytest.mark.parametrize("split, place", [("train", 0), ("train", -1), ("train", 300), ("val", 0),
                                          ("val", -1)])
def test_an_id_beyond_the_vocabulary_is_found_anywhere(split, place, attempt, tmp_path):
    """Though no window of the run would hold it."""
    ids = {"train": [1, 2, 3] * 200, "val": [1, 2, 3] * 100}
    ids[split][place] = 96
    folder = write_ids(tmp_path / "data", ids["train"], ids["val"])
    assert_one_sentence(attempt(settings=dict(dataset=folder, max_iters=0)), f"{split}.bin", "96", "95")
