"""sample.py from the outside: what it prints of small checkpoints, and what it says when it cannot."""
import pickle
import shutil

import pytest
import torch

import model
from tests.conftest import Hostile
from tests.runs import assert_one_sentence, in_float64

CHARACTERS = "\n" + bytes(range(32, 127)).decode("ascii")
SETTINGS = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=8, gradient_accumulation_steps=1,
                max_iters=30, warmup_iters=5, eval_interval=30, eval_iters=1, sample_tokens=0, dropout=0.2,
                device="cpu")


@pytest.fixture(scope="module")
def out(run, python_text, tmp_path_factory):
    """The out_dir of a small mixture, in float64, whose dataset is gone."""
    folder = tmp_path_factory.mktemp("sample")
    dataset = shutil.copytree(python_text, folder / "data")
    flags = [f"--{k}={v}" for k, v in (SETTINGS | {"dataset": dataset, "out_dir": folder / "out"}).items()]
    done = run("train.py", "config/btt_moe.py", *flags, before=in_float64)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(dataset)
    return folder / "out"


@pytest.fixture
def sample(run, out):
    """sample(start="def ", ...) -> what sample.py prints.

    It computes in float64: in float32 the rounding of the cache's other order of summation may choose other
    experts, and then another token.
    """
    def sample(**settings):
        settings = {"out_dir": out, "device": "cpu", "max_new_tokens": 20} | settings
        done = run("sample.py", *(f"--{k}={v}" for k, v in settings.items()), before=in_float64)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout
    return sample


@pytest.fixture
def refused(run, out):
    """refused(start="", ...) -> the one sentence on stderr."""
    def refused(**settings):
        settings = {"out_dir": out, "device": "cpu"} | settings
        done = run("sample.py", *[f"--{k}={v}" for k, v in settings.items()])
        assert_one_sentence(done)
        assert done.stdout == ""
        return done.stderr
    return refused


def likeliest(path, text, count):
    """`text` and the `count` characters that the model finds likeliest, by one whole forward pass for
    each."""
    checkpoint = torch.load(path, weights_only=True)
    gpt = model.GPT(model.GPTConfig(**checkpoint["model_args"])).double().eval()
    gpt.load_state_dict(checkpoint["model"])
    for _ in range(count):
        with torch.no_grad():
            logits, _ = gpt(torch.tensor([[CHARACTERS.index(c) for c in text[-16:]]]))
        text += CHARACTERS[logits[0, -1].argmax()]
    return text


def test_temperature_zero_takes_the_likeliest(sample, out):
    """From the out_dir and from a file, whatever the seed."""
    expected = likeliest(out / "ckpt.pt", "def ", 12) + "\n"
    best = out / "ckpt_best.pt"
    for settings in (dict(temperature=0), dict(temperature=0, seed=5, out_dir=best), dict(top_k=1)):
        assert sample(start="def ", max_new_tokens=12, **settings) == expected


def test_a_prompt_longer_than_the_block(sample, out):
    """Its last block_size characters are what counts; it is printed whole."""
    prompt = "    for name in sorted(self._names):\n        "
    expected = likeliest(out / "ckpt.pt", prompt, 1) + "\n"
    assert sample(start=prompt, temperature=0, max_new_tokens=1) == expected
    long, short = (sample(start=p, temperature=0)[len(p):] for p in (prompt, prompt[-16:]))
    assert long == short and len(long) == 20 + 1


def test_seed_and_number_of_samples(sample):
    text = sample(start="import ", num_samples=3)
    assert text == sample(start="import ", num_samples=3) != sample(start="import ", num_samples=3, seed=1)
    headers = [f"---- sample {i} of 3\n" for i in (1, 2, 3)]
    places = [text.index(header) for header in headers] + [len(text)]
    texts = [text[a + len(h):b] for h, a, b in zip(headers, places, places[1:])]
    assert places[0] == 0 and len(set(texts)) == 3
    assert all(t.startswith("import ") and len(t) == 7 + 20 + 1 and t[-1] == "\n" for t in texts)
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
    rows = odds.log()[:, None] / 4 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    weights[head] = rows.reshape(weights[head].shape)
    torch.save({"model": weights, "model_args": config, "tokenizer": {"name": "char", "characters": "abcde"}},
               tmp_path / "ckpt.pt")

    def shares(**settings):
        settings = dict(out_dir=tmp_path, start="a", max_new_tokens=3000, device="cpu", temperature=1,
                        top_k=None) | settings
        done = run("sample.py", *(f"--{k}={v}" for k, v in settings.items()))
        assert done.returncode == 0, done.stderr
        return [done.stdout[1:].count(c) / 3000 for c in "abcd"]

    assert shares() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.04)
    assert shares(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.04)
    assert shares(temperature=0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=0.04)


@pytest.mark.parametrize("prompt", ['"""Return"""', "'a' + 'b'", "None"])
def test_a_prompt_keeps_its_quotes(prompt, sample, out):
    """Python code arrives whole, as the shell hands it on."""
    expected = likeliest(out / "ckpt.pt", prompt, 1) + "\n"
    assert sample(start=prompt, temperature=0, max_new_tokens=1) == expected


def test_prompt_from_a_file(sample, tmp_path):
    prompt = "def f(x):\n    '''--start'''\n"
    (tmp_path / "prompt.txt").write_text(prompt)
    assert sample(start=f"FILE:{tmp_path / 'prompt.txt'}") == sample(start=prompt)


# What a user can get wrong

@pytest.mark.parametrize("start, word", [("café", "'é'"), ("\tx", "\\t"), ("", "empty")],
                         ids=["é", "tab", "empty"])
def test_a_prompt_outside_the_vocabulary_is_one_sentence(start, word, refused):
    assert word in refused(start=start)


@pytest.mark.parametrize("contents", ["missing", "a folder", "not UTF-8"])
def test_a_prompt_file_that_cannot_be_read_is_one_sentence(contents, refused, tmp_path):
    file = tmp_path / "prompt.txt"
    if contents == "a folder":
        file.mkdir()
    elif contents == "not UTF-8":
        file.write_bytes(b"caf\xe9")
    assert str(file) in refused(start=f"FILE:{file}")


def test_an_empty_prompt_file_is_one_sentence(refused, tmp_path):
    (tmp_path / "prompt.txt").write_text("")
    assert "empty" in refused(start=f"FILE:{tmp_path / 'prompt.txt'}")


@pytest.mark.parametrize("key, value, word", [
    ("temperature", -1, "-1"), ("top_k", 0, "0"), ("num_samples", 0, "0"), ("max_new_tokens", 0, "0"),
    ("dtype", "float8", "float8"), ("device", "abacus", "abacus"), ("num_sample", 3, "num_samples")])
def test_a_bad_setting_is_one_sentence(key, value, word, refused):
    sentence = refused(**{key: value})
    assert key in sentence and word in sentence


@pytest.mark.parametrize("place", ["nowhere", "nowhere/ckpt.pt", "."])
def test_no_checkpoint_is_one_sentence(place, refused, tmp_path):
    assert str(tmp_path / place) in refused(out_dir=tmp_path / place)


@pytest.mark.parametrize("contents", ["empty", "garbage", "half", "pickle"])
def test_a_file_that_is_no_checkpoint_is_one_sentence(contents, refused, out, tmp_path):
    """And nothing that it brings along is run."""
    whole, made = (out / "ckpt.pt").read_bytes(), tmp_path / "made"
    hostile = pickle.dumps(Hostile(str(made)))
    (tmp_path / "ckpt.pt").write_bytes(dict(
        empty=b"", garbage=b"garbage", half=whole[:len(whole) // 2], pickle=hostile)[contents])
    assert str(tmp_path / "ckpt.pt") in refused(out_dir=tmp_path)
    assert not made.exists()


@pytest.mark.parametrize("changes", [
    {"model": {}}, {"tokenizer": {"name": "runes"}}, {"model_args": {"width": 8}}, {"config": "hostile"},
    None], ids=str)
def test_a_checkpoint_that_does_not_fit_is_one_sentence(changes, refused, out, tmp_path):
    ckpt, made = tmp_path / "ckpt.pt", tmp_path / "made"
    if changes == {"config": "hostile"}:
        changes = {"config": Hostile(str(made))}
    contents = [1, 2] if changes is None else torch.load(out / "ckpt.pt", weights_only=True) | changes
    torch.save(contents, ckpt)
    assert str(ckpt) in refused(out_dir=ckpt)
    assert not made.exists()
