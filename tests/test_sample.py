"""sample.py from the outside: what it prints of small checkpoints, and what it says when it cannot."""
import os
import pickle
import shutil

import pytest
import torch

import model
from tests.conftest import Hostile

CHARACTERS = "\n" + bytes(range(32, 127)).decode("ascii")
SETTINGS = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=8, gradient_accumulation_steps=1, max_iters=50,
                warmup_iters=5, eval_interval=50, eval_iters=1, sample_tokens=0, dropout=0.2, device="cpu")


@pytest.fixture(scope="module")
def out(run, python_text, tmp_path_factory):
    """The out_dir of a small model of which the dataset is gone."""
    folder = tmp_path_factory.mktemp("sample")
    dataset = shutil.copytree(python_text, folder / "data")
    flags = [f"--{k}={v}" for k, v in (SETTINGS | {"dataset": dataset, "out_dir": folder / "out"}).items()]
    done = run("train.py", "config/btt_moe.py", *flags)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(dataset)
    return folder / "out"


@pytest.fixture
def sample(run, out):
    """sample(start="def ", ...) -> what is printed."""
    def sample(**settings):
        flags = [f"--{k}={v}" for k, v in ({"out_dir": out, "device": "cpu", "max_new_tokens": 30} | settings).items()]
        done = run("sample.py", *flags)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout
    return sample


@pytest.fixture
def refused(run, out):
    """refused(start="", ...) -> the one sentence on stderr."""
    def refused(**settings):
        done = run("sample.py", *[f"--{k}={v}" for k, v in ({"out_dir": out, "device": "cpu"} | settings).items()])
        assert done.returncode not in (0, None) and done.stdout == ""
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr
    return refused


def likeliest(path, text, count):
    """`text` and the `count` characters that the model finds likeliest, one whole forward pass for each."""
    checkpoint = torch.load(path, weights_only=True)
    gpt = model.GPT(model.GPTConfig(**checkpoint["model_args"])).eval()
    gpt.load_state_dict(checkpoint["model"])
    for _ in range(count):
        with torch.no_grad():
            logits, _ = gpt(torch.tensor([[CHARACTERS.index(c) for c in text[-16:]]]))
        text += CHARACTERS[logits[0, -1].argmax()]
    return text


def test_temperature_zero_takes_the_likeliest(sample, out):
    """From the out_dir and from a file, whatever the seed."""
    expected = likeliest(out / "ckpt.pt", "def ", 12) + "\n"
    assert sample(start="def ", temperature=0, max_new_tokens=12) == expected
    assert sample(start="def ", temperature=0, max_new_tokens=12, seed=5, out_dir=out / "ckpt_best.pt") == expected
    assert sample(start="def ", top_k=1, max_new_tokens=12) == expected


def test_a_prompt_longer_than_the_block(sample, out):
    """Its last block_size characters are what counts; it is printed whole."""
    prompt = "    for name in sorted(self._names):\n        "
    assert sample(start=prompt, temperature=0, max_new_tokens=1) == likeliest(out / "ckpt.pt", prompt, 1) + "\n"
    long, short = (sample(start=p, temperature=0)[len(p):] for p in (prompt, prompt[-16:]))
    assert long == short and len(long) == 30 + 1


def test_seed_and_number_of_samples(sample):
    text = sample(start="import ", num_samples=3)
    assert text == sample(start="import ", num_samples=3) != sample(start="import ", num_samples=3, seed=1)
    headers = [f"---- sample {i} of 3\n" for i in (1, 2, 3)]
    places = [text.index(header) for header in headers] + [len(text)]
    texts = [text[a + len(h):b] for h, a, b in zip(headers, places, places[1:])]
    assert places[0] == 0 and len(set(texts)) == 3
    assert all(t.startswith("import ") and len(t) == 7 + 30 + 1 and t[-1] == "\n" for t in texts)
    assert "----" not in sample(start="import ", top_k=5) and set(text) <= set(CHARACTERS)


def test_top_k_and_temperature(run, tmp_path):
    """A model that gives a, b, c and d 4, 3, 2 and 1 times the odds of the next, e none to speak of."""
    config = dict(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=4)
    gpt = model.GPT(model.GPTConfig(**config))
    for name, p in gpt.named_parameters():
        p.data.zero_()
    weights = gpt.state_dict()
    weights["ln_f.weight"] = torch.ones(4)
    weights["wte.weight"][:] = torch.tensor([1.0, -1.0, 1.0, -1.0])  # its layer norm is itself
    [head] = [name for name in weights if name.startswith("lm_head")]
    odds = torch.tensor([4.0, 3.0, 2.0, 1.0, 1e-6])
    weights[head] = (odds.log()[:, None] / 4 * torch.tensor([1.0, -1.0, 1.0, -1.0])).reshape(weights[head].shape)
    torch.save({"model": weights, "model_args": config, "tokenizer": {"name": "char", "characters": "abcde"}},
               tmp_path / "ckpt.pt")

    def shares(**settings):
        flags = [f"--{k}={v}" for k, v in ({"temperature": 1, "top_k": None} | settings).items()]
        done = run("sample.py", f"--out_dir={tmp_path}", "--start=a", "--max_new_tokens=3000", "--device=cpu", *flags)
        assert done.returncode == 0, done.stderr
        return [done.stdout[1:].count(c) / 3000 for c in "abcd"]

    assert shares() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.04)
    assert shares(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.04)
    assert shares(temperature=0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=0.04)


def test_prompt_from_a_file(sample, tmp_path):
    prompt = "def f(x):\n    '''--start'''\n"
    (tmp_path / "prompt.txt").write_text(prompt)
    assert sample(start=f"FILE:{tmp_path / 'prompt.txt'}") == sample(start=prompt)


# What a user can get wrong

def test_a_bad_prompt_is_one_sentence(refused, tmp_path):
    assert "'é'" in refused(start="café") or "\\xe9" in refused(start="café")
    assert "\\t" in refused(start="\tx")
    assert "empty" in refused(start="")
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in refused(start=f"FILE:{tmp_path / 'empty.txt'}")
    assert str(tmp_path / "none.txt") in refused(start=f"FILE:{tmp_path / 'none.txt'}")
    assert str(tmp_path) in refused(start=f"FILE:{tmp_path}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert str(tmp_path / "latin.txt") in refused(start=f"FILE:{tmp_path / 'latin.txt'}")


@pytest.mark.parametrize("key, value", [("temperature", -1), ("top_k", 0), ("num_samples", 0), ("max_new_tokens", 0),
                                        ("dtype", "float8"), ("device", "abacus"), ("num_sample", 3)])
def test_a_bad_setting_is_one_sentence(key, value, refused):
    sentence = refused(**{key: value})
    assert key in sentence and (str(value) in sentence or key == "num_sample")


def test_a_bad_checkpoint_is_one_sentence(refused, out, tmp_path):
    assert str(tmp_path / "ckpt.pt") in refused(out_dir=tmp_path)
    assert str(tmp_path / "nowhere") in refused(out_dir=tmp_path / "nowhere")

    whole, ckpt = (out / "ckpt.pt").read_bytes(), tmp_path / "ckpt.pt"
    bad = [b"", b"garbage", whole[:len(whole) // 2], pickle.dumps(Hostile(str(tmp_path / "made")))]
    for contents in bad:
        ckpt.write_bytes(contents)
        assert str(ckpt) in refused(out_dir=tmp_path)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    for changes in ({"model": {}}, {"tokenizer": {"name": "runes"}}, {"model_args": {"width": 8}},
                    {"config": Hostile(str(tmp_path / "made"))}):
        torch.save(checkpoint | changes, ckpt)
        assert str(ckpt) in refused(out_dir=ckpt)
    torch.save([1, 2], ckpt)
    assert str(ckpt) in refused(out_dir=ckpt)
    assert not os.path.exists(tmp_path / "made")
