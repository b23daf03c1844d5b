"""sample.py from the outside: what it prints of small checkpoints, and what it says when it cannot."""
import contextlib
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import sys

import pytest
import torch

import model
from data.tokenizer import CharTokenizer, FileTokenizer, TiktokenTokenizer
from tests.conftest import ROOT, Hostile
from tests.runs import in_float64

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
def refused(refused, out):
    """refused(start="", ...) -> the one sentence on stderr."""
    def refused_here(**settings):
        settings = {"out_dir": out, "device": "cpu"} | settings
        return refused("sample.py", *[f"--{k}={v}" for k, v in settings.items()])
    return refused_here


def here(**settings):
    """(what sample.py prints, its sentence if it fails), in this process: for small checkpoints."""
    flags = [f"--{k}={v}" for k, v in ({"device": "cpu"} | settings).items()]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [str(ROOT / "sample.py"), *flags])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            assert stop.code == 1
    return out.getvalue(), err.getvalue()


def load_model(path):
    checkpoint = torch.load(path, weights_only=True)
    gpt = model.GPT(model.GPTConfig(**checkpoint["model_args"])).double().eval()
    gpt.load_state_dict(checkpoint["model"])
    return gpt


def likeliest(path, text, count):
    """`text` and the `count` characters that the model finds likeliest, by one whole forward pass for
    each."""
    gpt = load_model(path)
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


def test_top_k_top_p_and_temperature(tmp_path):
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
    (tmp_path / "prompts.txt").write_text("a\n" * 100)

    def shares(**settings):
        settings = dict(out_dir=tmp_path, prompts=tmp_path / "prompts.txt", batch_size=100, temperature=1,
                        top_k=None) | settings
        printed, error = here(max_new_tokens=30, **settings)
        texts = "".join(re.findall("^a([a-e]{30})$", printed, re.MULTILINE))
        assert not error and len(texts) == 3000
        return [texts.count(c) / 3000 for c in "abcd"]

    assert shares() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.04)
    assert shares(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.04)
    assert shares(top_p=0.6) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.04)
    assert shares(temperature=0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=0.04)


@pytest.mark.parametrize("prompt", ['"""Return"""', "'a' + 'b'", "'None'"])
def test_a_prompt_keeps_its_quotes(prompt, sample, out):
    """Python code arrives whole, as the shell hands it on."""
    expected = likeliest(out / "ckpt.pt", prompt, 1) + "\n"
    assert sample(start=prompt, temperature=0, max_new_tokens=1) == expected


def greedy(path, prompt, count):
    """The prompt and its likeliest continuation, as stream says: when the window is full, its oldest quarter
    is forgotten."""
    gpt = load_model(path)
    window, text = prompt[-16:], prompt
    for _ in range(count):
        window = window[-12:] if len(window) > 16 else window
        with torch.no_grad():
            logits, _ = gpt(torch.tensor([[CHARACTERS.index(c) for c in window]]))
        char = CHARACTERS[logits[0, -1].argmax()]
        window, text = window + char, text + char
    return text


PROMPTS = ["def ", "    for name in sorted(self._names): x", "return x", "import os"]


def test_a_file_of_prompts(sample, out, tmp_path):
    """Three at once and then one, of different lengths, each as it goes on alone."""
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    text = sample(prompts=tmp_path / "prompts.txt", batch_size=3, temperature=0)
    assert text == "".join(f"---- prompt {i} of 4\n{greedy(out / 'ckpt.pt', prompt, 20)}\n"
                           for i, prompt in enumerate(PROMPTS, 1))


def test_prompts_beyond_the_block_go_on_as_alone(tmp_path):
    """By a model of random weights, whose next token depends on all that it sees."""
    torch.manual_seed(2)
    config = dict(block_size=16, vocab_size=96, n_layer=2, n_head=2, n_embd=32)
    gpt = model.GPT(model.GPTConfig(**config))
    for p in gpt.parameters():
        p.data.normal_(std=0.5)
    torch.save({"model": gpt.state_dict(), "model_args": config,
                "tokenizer": {"name": "char", "characters": CHARACTERS}}, tmp_path / "ckpt.pt")
    prompts, settings = [*PROMPTS, "x" * 21], dict(out_dir=tmp_path, temperature=0, max_new_tokens=20)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    printed, error = here(prompts=tmp_path / "prompts.txt", **settings)
    alone = [here(start=prompt, **settings)[0] for prompt in prompts]
    assert not error and re.split(r"---- prompt \d of 5\n", printed) == ["", *alone]


def test_a_jsonl_file_of_prompts_and_several_samples(sample, out, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps("a\n\nb") + "\n\n" + json.dumps("class ") + "\n")
    text = sample(prompts=tmp_path / "prompts.jsonl", num_samples=2, temperature=0, max_new_tokens=9)
    assert text == "".join(f"---- prompt {i} of 2, sample {j} of 2\n{greedy(out / 'ckpt.pt', prompt, 9)}\n"
                           for i, prompt in enumerate(["a\n\nb", "class "], 1) for j in (1, 2))


def in_float64_with_stdin():
    in_float64()
    os.dup2(os.open(os.environ["TEST_STDIN"], os.O_RDONLY), 0)


def test_a_prompt_from_stdin(run, out, tmp_path):
    (tmp_path / "stdin").write_text("x =\n y")
    done = run("sample.py", f"--out_dir={out}", "--device=cpu", "--start=-", "--temperature=0",
               "--max_new_tokens=3", before=in_float64_with_stdin, TEST_STDIN=str(tmp_path / "stdin"))
    assert (done.stderr, done.stdout) == ("", greedy(out / "ckpt.pt", "x =\n y", 3) + "\n")


# A model that knows one text by heart, and says it over and over

TEXT = "漢字 naïve 🙂 one\r\n\n two<|endoftext|>"


@pytest.fixture(scope="module")
def parrot(tiktoken_cache, tmp_path_factory):
    """A checkpoint whose likeliest token after each of TEXT is the next one."""
    ids = TiktokenTokenizer().encode(TEXT)
    assert len(set(ids)) == len(ids) == 12
    config = dict(block_size=64, vocab_size=50257, n_layer=1, n_head=1, n_embd=12)
    weights = model.GPT(model.GPTConfig(**config)).state_dict()
    for name, weight in weights.items():
        weight.fill_(name == "ln_f.weight")
    [head] = [name for name in weights if name.startswith("lm_head")]
    for i, (token, following) in enumerate(zip(ids, ids[1:] + ids[:1])):
        weights["wte.weight"][token, i] = 1
        weights[head].view(-1, 12)[following, i] = 5
    path = tmp_path_factory.mktemp("parrot") / "ckpt.pt"
    torch.save({"model": weights, "model_args": config, "tokenizer": {"name": "gpt2"}}, path)
    return path


@pytest.mark.parametrize("settings, text", [
    ({}, "漢字 naïve 🙂 one\r\n\n two"), ({"stop_at_end": False}, TEXT + "漢"),
    ({"stop": "e one\r\n\n"}, "漢字 naïve 🙂 one\r\n\n two"), ({"stop": "e 🙂 o"}, "漢字 naïv"),
    ({"stop": "\n\n two"}, "漢字 naïve 🙂 one\r"), ({"stop": " two<|"}, "漢字 naïve 🙂 one\r\n\n two"),
    ({"stop": "漢", "stop_at_end": False}, TEXT), ({"max_new_tokens": 1}, "漢\ufffd"),
    ({"stop": " naïve 🙂 two", "max_new_tokens": 4}, "漢字 naïve 🙂")], ids=ascii)
def test_where_a_text_ends(settings, text, parrot):
    """At the end-of-text token, or before a text that spans tokens; what only begins like it is printed. "漢"
    is three tokens, and 9 more are left."""
    settings = dict(out_dir=parrot, start="漢", temperature=0, max_new_tokens=12) | settings
    assert here(**settings) == (text + "\n", "")


def test_without_a_prompt_a_new_text_begins(sample, out, parrot):
    """After the end-of-text token, or the newline; neither is printed."""
    assert here(out_dir=parrot, temperature=0) == ("漢字 naïve 🙂 one\r\n\n two\n", "")
    assert sample(temperature=0) == greedy(out / "ckpt.pt", "\n", 20)[1:] + "\n"


@pytest.mark.parametrize("make, start, expected", [
    ("BPE", None, r"[ab</s> ]+\n"), ("BPE", "\n", "the prompt has no tokens in this vocabulary"),
    ("characters", None, "[ab]{3}\n")])
def test_a_vocabulary_without_a_newline(make, start, expected, tmp_path):
    from tokenizers import Tokenizer, models

    pairs = Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    tok = FileTokenizer(pairs.to_str()) if make == "BPE" else CharTokenizer("ab")
    config = dict(block_size=8, vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_embd=4)
    torch.save({"model": model.GPT(model.GPTConfig(**config)).state_dict(), "model_args": config,
                "tokenizer": tok.to_meta()}, tmp_path / "ckpt.pt")
    printed, error = here(out_dir=tmp_path, max_new_tokens=3, stop_at_end=False,
                          **({} if start is None else {"start": start}))
    assert re.fullmatch(expected, printed) or expected in error


@pytest.mark.parametrize("settings, texts", [
    ({"max_new_tokens": 3}, ["漢字 naïve 🙂 one", "🙂 one\r\n\n two", "漢字 naïve"]),
    ({}, ["漢字 naïve 🙂 one\r\n\n two", "🙂 one\r\n\n two", "漢字 naïve 🙂 one\r\n\n two"]),
    ({"stop": " one\r"}, ["漢字 naïve 🙂", "🙂 one\r\n\n two", "漢字 naïve 🙂"])], ids=str)
def test_prompts_that_end_at_different_tokens(settings, texts, parrot, tmp_path):
    (tmp_path / "prompts.txt").write_text("漢字\n🙂 one\n漢\n")
    printed, error = here(out_dir=parrot, prompts=tmp_path / "prompts.txt", temperature=0, **settings)
    assert not error and printed == "".join(f"---- prompt {i} of 3\n{text}\n"
                                            for i, text in enumerate(texts, 1))


# The loss of a text

def test_the_perplexity_of_a_text(parrot, tmp_path):
    """Every byte counts, and every token, the first after the end of another text. What looks like a special
    token is text."""
    text = TEXT.replace("\r", "") + " naïve naïve"
    (tmp_path / "text.txt").write_text(text)
    ids = torch.tensor([[50256, *TiktokenTokenizer().encode_ordinary(text).tolist()]])
    with torch.no_grad():
        logits, _ = load_model(parrot)(ids, ids)
    nats = -logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None]).sum().item()
    count, size = ids.numel() - 1, len(text.encode())
    assert check_scores(*here(out_dir=parrot, eval=tmp_path / "text.txt"), count, size, nats) == "33"
    assert check_scores(*here(out_dir=parrot, eval=tmp_path / "text.txt", window=30, stride=30), count, size,
                        nats) == "1"


def check_scores(printed, error, count, size, nats, tolerance=5e-4):
    """Compares the numbers that were printed: in float32, a sum over 50,257 ids is as exact as that. Returns
    the least context that is said."""
    assert error == ""
    number = r"([\d.,]+)"
    tokens, bytes_, context, loss, perplexity, bits = re.search(
        f": {number} tokens of {number} bytes, each after {number} tokens or more.*\n{number} nats per "
        f"token, perplexity {number}, {number} bits per byte\n$", printed).groups()
    assert (int(tokens.replace(",", "")), int(bytes_.replace(",", ""))) == (count, size)
    assert float(loss) == pytest.approx(nats / count, abs=tolerance)
    assert float(perplexity) == pytest.approx(math.exp(nats / count), rel=1e-3)
    assert float(bits) == pytest.approx(nats / count / math.log(2) * count / size, abs=2 * tolerance)
    return context


def test_perplexity_over_sliding_windows_by_a_model_that_was_trained(run, out, tmp_path):
    """In float64, by one forward pass for each character; from stdin."""
    text = "def f(x):\n    return [y for y in x if y]  # a comment\n"
    (tmp_path / "stdin").write_text(text)
    gpt, ids, nats = load_model(out / "ckpt.pt"), [CHARACTERS.index(c) for c in "\n" + text], 0.0
    starts = [*range(0, len(ids) - 17, 5), len(ids) - 17]
    for t in range(1, len(ids)):
        first = next(s for s in starts if s + 16 >= t)
        with torch.no_grad():
            logits, _ = gpt(torch.tensor([ids[first:t]]))
        nats -= logits[0, -1].double().log_softmax(-1)[ids[t]].item()
    done = run("sample.py", f"--out_dir={out}", "--device=cpu", "--eval=-", "--stride=5", "--batch_size=2",
               before=in_float64_with_stdin, TEST_STDIN=str(tmp_path / "stdin"))
    assert check_scores(done.stdout, done.stderr, len(text), len(text), nats, tolerance=6e-5) == "12"


def test_the_loss_of_one_token(parrot, tmp_path):
    """After the end-of-text token the parrot says "漢"; "e" is as unlikely as all other tokens."""
    (tmp_path / "text.txt").write_text("e")
    gpt, e = load_model(parrot), TiktokenTokenizer().encode("e")
    with torch.no_grad():
        nats = -gpt(torch.tensor([[50256]]))[0][0, -1].double().log_softmax(-1)[e].item()
    assert check_scores(*here(out_dir=parrot, eval=tmp_path / "text.txt"), 1, 1, nats) == "33"


@pytest.mark.parametrize("flags, words", [
    (dict(eval="a.txt", top_p=0.9), "--top_p has no effect with --eval"),
    (dict(eval="a.txt", prompts="b.txt"), "--prompts has no effect with --eval"),
    (dict(prompts="b.txt", start="x"), "--start has no effect with --prompts"),
    (dict(window=8), "--window has no effect without --eval")])
def test_a_flag_without_effect_is_refused(flags, words, refused):
    assert words in refused(**flags)


def test_unknown_words_of_a_text_are_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "b": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    config = dict(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=4)
    torch.save({"model": model.GPT(model.GPTConfig(**config)).state_dict(), "model_args": config,
                "tokenizer": FileTokenizer(words.to_str()).to_meta()}, tmp_path / "ckpt.pt")
    (tmp_path / "text.txt").write_text("b other b words")
    printed, _ = here(out_dir=tmp_path, eval=tmp_path / "text.txt")
    assert "2 of them are the unknown mark" in printed


def test_unknown_characters_of_a_text_are_counted(tmp_path):
    """And all of its bytes, however its characters are composed. A model of zeros knows nothing."""
    config = dict(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=4)
    torch.save({"model": model.GPT(model.GPTConfig(**config)).state_dict(), "model_args": config,
                "tokenizer": CharTokenizer("\nb\u00e9?", "?", "NFC").to_meta()}, tmp_path / "ckpt.pt")
    (tmp_path / "text.txt").write_text("be\u0301\u6f22\u5b57\n")
    printed, error = here(out_dir=tmp_path, eval=tmp_path / "text.txt")
    first, second, third = printed.splitlines(keepends=True)
    assert second.startswith("2 of them are the unknown mark")
    check_scores(first + third, error, 5, 11, 5 * math.log(4))


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


@pytest.mark.parametrize("settings, word", [
    ({"top_p": 0}, "top_p must be above 0"), ({"top_p": 1.01}, "top_p must be at most 1"),
    ({"top_p": "nan"}, "top_p"), ({"stop": ""}, "stop text is empty"),
    ({"window": 65}, "65 is more than the 64"),
    ({"stride": 33, "window": 32}, "stride = 33 must not exceed window = 32"),
    ({"eval": "nowhere"}, "nowhere"), ({"prompts": "nowhere"}, "nowhere"), ({"eval": b""}, "is empty"),
       ({"eval": "\xff".encode("latin1")}, "cannot be read"), ({"prompts": b" \n\n"}, "holds no prompt"),
    ({"prompts": b"\xe9"}, "cannot be read")], ids=str)
def test_what_cannot_be_sampled_or_scored_is_one_sentence(settings, word, parrot, tmp_path):
    for key, value in settings.items():
        if isinstance(value, bytes):
            (tmp_path / "text").write_bytes(value)
            settings = settings | {key: tmp_path / "text"}
    settings = {"eval": __file__} | settings if {"window", "stride"} & settings.keys() else settings
    printed, error = here(out_dir=parrot, **settings)
    assert printed == "" and error.startswith("error: ") and error.count("\n") == 1 and word in error


@pytest.mark.parametrize("line", ["one", "3", '["one"]', '{"text": "one"}', "[" * 10_000])
def test_a_line_that_is_no_json_text_is_one_sentence(line, parrot, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"one"\n\n' + line)
    printed, error = here(out_dir=parrot, prompts=tmp_path / "prompts.jsonl")
    assert printed == "" and error.count("\n") == 1 and "line 3 of" in error


def test_a_text_outside_the_vocabulary_has_no_loss(out, tmp_path):
    (tmp_path / "text.txt").write_bytes("caf\u00e9".encode())
    printed, error = here(out_dir=out, eval=tmp_path / "text.txt")
    assert printed == "" and error.count("\n") == 1 and "'\u00e9'" in error and "vocabulary" in error


def test_line_ends_of_a_text_are_newlines(out, tmp_path):
    """As in the data that a prepare.py has made of such a text."""
    losses = []
    for name, end in (("text", b"\n"), ("crlf", b"\r\n")):
        (tmp_path / name).write_bytes(b"def main():" + end + b"    return" + end)
        printed, error = here(out_dir=out, eval=tmp_path / name)
        losses.append(printed.replace("crlf", "text"))
        assert error == "" and "bits per byte" in printed
    assert losses[0] == losses[1]


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
