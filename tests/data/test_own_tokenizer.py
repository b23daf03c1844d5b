"""A run on token ids of 32 bits of a tokenizers file: the checkpoint carries all that sample.py needs."""
import json
import shutil

import numpy as np
import pytest
import torch

import model
from data import tokenizer
from tests.conftest import ROOT, SMALL, TINY
from tests.test_readme import blocks


@pytest.fixture(scope="module")
def words():
    """A tokenizer of 70,001 words, as the library has it. It joins them by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "漢": 69_999} | {f"w{i}": i for i in range(1, 69_999)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    return made


def test_a_run_and_its_sample(run, words, tmp_path):
    (tmp_path / "data").mkdir()
    ids = np.random.default_rng(0).choice([7, 65_536, 69_999, 70_000], 400)
    meta = {"tokenizer": tokenizer.FileTokenizer(words.to_str()).to_meta(), "vocab_size": 70_001,
            "dtype": "uint32", "train_tokens": 300, "val_tokens": 100, "source": {}}
    for split, part in (("train", ids[:300]), ("val", ids[300:])):
        part.astype("<u4").tofile(tmp_path / "data" / f"{split}.bin")
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    settings = SMALL | TINY | dict(dataset=tmp_path / "data", out_dir=tmp_path / "out", sample_tokens=2,
                                   max_iters=8, warmup_iters=0, gradient_accumulation_steps=1,
                                   learning_rate=0.3)
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = run("train.py", "config/dense.py", "config/quickstart.py", *flags)
    assert done.returncode == 0 and not done.stderr, done.stderr
    shutil.rmtree(tmp_path / "data")

    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    gpt = model.GPT(model.GPTConfig(**checkpoint["model_args"])).eval()
    gpt.load_state_dict(checkpoint["model"])
    ids = words.encode("w7 漢").ids
    assert ids == [7, 69_999]
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(gpt(torch.tensor([ids]))[0][0, -1].argmax()))
    assert set(ids[2:]) <= {7, 65_536, 69_999, 70_000}  # it has learned which ids there are
    done = run("sample.py", f"--out_dir={tmp_path / 'out'}", "--start=w7 漢", "--temperature=0",
               "--max_new_tokens=3", "--device=cpu")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout == words.decode(ids, skip_special_tokens=False) + "\n"


def test_the_tokenizer_that_the_docs_train(tmp_path, monkeypatch):
    example, _ = blocks((ROOT / "docs" / "data.md").read_text(encoding="utf-8"), "python")
    text = "κόσμε, e\N{COMBINING ACUTE ACCENT} 漢字 🙂\r\n\tκόσμε"
    (tmp_path / "my.txt").write_bytes(text.encode() * 9)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/data.md", "exec"), {})
    tok = tokenizer.from_name("my.json")
    assert tok.decode(tok.encode(text)) == text and len(tok.encode(text)) < 20
    assert tok.decode([tok.end_of_text]) == "<|endoftext|>"
