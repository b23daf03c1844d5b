"""The prepare scripts, as programs, and what they share: documents, datasets, kills, a user's mistakes."""
import argparse
import fcntl
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import unicodedata
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from data import common, tokenizer
from data.characters import is_plain
from tests.conftest import PROCESSES, ROOT

PRINTABLE = "\n" + bytes(range(32, 127)).decode("ascii")


def prepare(name, *arguments, cwd=None, **environment):
    """Runs data/<name>/prepare.py; returns the finished process."""
    command = [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8",
                          timeout=600)


def prepared(name, *arguments, **options):
    done = prepare(name, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(folder):
    """The dataset, read with nothing of the project's: (meta, {split: ids}); it must be whole."""
    meta = json.loads((folder / "meta.json").read_text())
    dtype = {"uint8": "u1", "uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]
    splits = {}
    for split in ("train", "val"):
        data = (folder / f"{split}.bin").read_bytes()
        splits[split] = np.frombuffer(data, dtype).tolist()
        assert len(splits[split]) == meta[f"{split}_tokens"] > 0
        assert meta["source"][f"{split}_sha256"] == sha256(data).hexdigest()
    assert max(map(max, splits.values())) < meta["vocab_size"]
    return meta, splits


@pytest.fixture
def prepare_here(monkeypatch):
    """prepare_here("chars", "--source", ...): runs the main() of data/chars/prepare.py in this process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("USE_TORCH", "0")  # common sets it

    def prepare_here(name, *arguments):
        script = ROOT / "data" / name
        script = script / "prepare.py" if script.is_dir() else script
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script))["main"]()
    return prepare_here


def characters(ids, alphabet=PRINTABLE):
    return "".join(alphabet[i] for i in ids)


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def refused(done):
    """The one sentence of a user error."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.endswith(line + "\n")
    return line


# python_char


@pytest.fixture(scope="module")
def python_char(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python_char")
    return folder, prepared("python_char", "--out-dir", folder, cwd=folder)


def test_python_char_is_the_standard_library(python_char):
    folder, printed = python_char
    meta, splits = read(folder)
    assert meta["tokenizer"] == {"name": "char", "characters": PRINTABLE}
    assert meta["vocab_size"] == 96 and meta["dtype"] == "uint8"

    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    sources = {}
    for path in library.rglob("*.py"):
        name = path.relative_to(library).as_posix()
        if skipped & set(name.split("/")) or "_sysconfigdata" in name or name.startswith("config-"):
            continue
        text = path.read_bytes().decode("latin-1").replace("\r\n", "\n")
        if text and not set(text) - set(PRINTABLE):
            sources[name] = text + "\n"
    assert sum(map(len, sources.values())) > 1_000_000

    # Each split is a sequence of whole files, in the order of their names; together they are all of them.
    rest = {split: characters(ids) for split, ids in splits.items()}
    for name in sorted(sources):
        split = next((s for s in rest if rest[s].startswith(sources[name])), None)
        assert split, name
        rest[split] = rest[split][len(sources[name]) :]
    assert rest == {"train": "", "val": ""}

    total = sum(map(len, sources.values()))
    assert 0.03 < meta["val_tokens"] / total < 0.06
    for number in (len(sources), total - len(sources), meta["train_tokens"], meta["val_tokens"]):
        assert f"{number:,}" in printed
    assert meta["source"]["python"] in printed and meta["source"]["train_sha256"] in printed


def test_python_char_is_deterministic(python_char, tmp_path):
    prepared("python_char", "--out-dir", tmp_path)
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / name).read_bytes() == (python_char[0] / name).read_bytes()


def test_python_char_holds_out_no_more_than_asked():
    texts = {f"{i}": f"{i:050}" for i in range(100)} | {"large": "large" * 1000}
    splits = runpy.run_path(str(ROOT / "data/python_char/prepare.py"))["split_files"](texts, 0.05)
    assert sum(map(len, splits["val"])) == 500  # a twentieth of 100 * 50 + 5000
    assert sorted(splits["train"] + splits["val"]) == sorted(texts.values())


def test_python_char_of_a_stripped_python(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "only.py").write_bytes(b"x = 1\r\n")  # 6 characters with \n for a line end
    script = ROOT / "data" / "python_char" / "prepare.py"
    program = f"""if True:
        import runpy, sys, sysconfig
        sysconfig.get_path = lambda name: {str(tmp_path / "lib")!r}
        sys.argv = ["prepare.py", "--out-dir", {str(tmp_path / "out")!r}]
        runpy.run_path({str(script)!r}, run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert "only 6 characters" in refused(done)
    assert not (tmp_path / "out" / "meta.json").exists()


# openwebtext


TEXTS = ["Hello world", "naïve 漢字 🙂", "a <|endoftext|> in the text", "line\nline\r\n",
         *(f"document {i}" for i in range(40))]


def held_out(count, documents):
    """nanoGPT's validation documents: the first of the permutation that train_test_split draws."""
    order = np.random.default_rng(2357).permutation(documents)
    return set(order[:count].tolist())


def documents_of(gpt2, ids):
    assert ids[-1] == 50256
    documents, start = [], 0
    for place, i in enumerate(ids):
        if i == 50256:
            documents.append(gpt2.bpe.decode(ids[start:place]))
            start = place + 1
    return documents


@pytest.mark.parametrize("num_proc", [1, 2])
def test_openwebtext(tiktoken_cache, tmp_path, num_proc):
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    out = tmp_path / "out"
    arguments = ["--source", source, "--out-dir", out, "--num-proc", num_proc, "--val-fraction", 0.1]
    prepared("openwebtext", *arguments, cwd=tmp_path)
    meta, splits = read(out)
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ({"name": "gpt2"}, 50257, "uint16")

    gpt2 = tokenizer.TiktokenTokenizer()
    train, val = (documents_of(gpt2, splits[split]) for split in ("train", "val"))
    expected = held_out(5, len(TEXTS))  # the ceiling of 0.1 * 44
    assert set(val) == {TEXTS[i] for i in expected} and len(val) == 5
    assert sorted(train + val) == sorted(TEXTS)
    everything = splits["train"] + splits["val"]
    start = everything.index(15496)
    assert everything[start : start + 3] == [15496, 995, 50256]
    assert not (out / "prepare.tmp").exists()


@pytest.mark.parametrize("name, arguments, count", [
    ("openwebtext", [], 2), ("openwebtext", ["--source"], 101), ("openwebtext", ["--dataset"], 101),
    ("openwebtext_char", [], 2), ("openwebtext_char", ["--source"], 101),
    ("openwebtext_char", ["--ascii", "--source"], 2), ("chars", ["--source"], 101),
    ("python_char", ["--source"], 101)])
def test_a_twentieth_is_held_out_but_of_openwebtext(prepare_here, tiktoken_cache, monkeypatch, tmp_path, name,
                                                    arguments, count):
    """Of 2,001 documents; of OpenWebText, for which --ascii stands too, it is a two-thousandth."""
    import datasets

    texts = [f"{i}" for i in range(2001)]
    (tmp_path / "texts").mkdir()
    path = write_jsonl(tmp_path / "texts" / "texts.jsonl", texts)
    if not arguments:
        hub = datasets.Dataset.from_dict({"text": texts})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    elif arguments[-1] == "--dataset":
        path = path.parent
    prepare_here(name, *arguments, *[path][:len(arguments)], "--out-dir", tmp_path / "out", "--num-proc", 1)
    meta, splits = read(tmp_path / "out")
    val = tokenizer.from_meta(meta).decode(splits["val"]).replace("<|endoftext|>", "\n").split("\n")[:-1]
    assert set(val) == {texts[i] for i in held_out(count, 2001)} and len(val) == count


def test_openwebtext_of_txt_jsonl_parquet_and_a_folder(prepare_here, tiktoken_cache, tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "one.TXT").write_text("one document\n\nof two paragraphs", encoding="utf-8")
    (folder / "ignored.md").write_text("not a source")
    write_jsonl(folder / "two.jsonl", ["second", "third", ""], field="body")
    table = pyarrow.table({"n": [1, 2, 3], "body": ["fourth", None, "fifth"]})
    pyarrow.parquet.write_table(table, tmp_path / "three.Parquet")
    out = tmp_path / "out"
    sources = [folder, tmp_path / "three.Parquet"]
    prepare_here("openwebtext", "--source", *sources, "--text-field", "body", "--out-dir", out,
                 "--num-proc", 1)
    meta, splits = read(out)
    found = documents_of(tokenizer.TiktokenTokenizer(), splits["train"] + splits["val"])
    assert sorted(found) == ["fifth", "fourth", "one document\n\nof two paragraphs", "second", "third"]
    assert meta["source"]["documents"] == 5


@pytest.mark.parametrize("num_proc", [1, 2])
def test_openwebtext_with_a_tokenizers_file(prepare_here, tmp_path, num_proc):
    """Of 70,000 words, whose ids need 32 bits; checked by hand."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "漢": 65_536, "κόσμε": 69_999} | {f"w{i}": i for i in range(1, 69_999) if i != 65_536}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<end>"])  # 70,000
    made.enable_truncation(9)  # is not used, and stays in the file
    made.save(str(tmp_path / "words.json"), pretty=False)
    texts = ["漢 w7\tκόσμε", "w65535 <end>\r\nnothing"]
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    run = prepared if num_proc == 2 else prepare_here   # pytest has threads: nothing forks from it
    run("openwebtext", "--source", source, "--out-dir", tmp_path / "out", "--num-proc", num_proc,
        "--tokenizer", tmp_path / "words.json", "--end-of-text", "<end>")
    meta, splits = read(tmp_path / "out")
    assert (meta["vocab_size"], meta["dtype"]) == (70_001, "uint32")
    assert meta["tokenizer"] == {"name": "tokenizers", "end_of_text": 70_000,
                                 "json": (tmp_path / "words.json").read_text(encoding="utf-8")}
    assert sorted(splits.values()) == [[65_535, 0, 0, 70_000], [65_536, 7, 69_999, 70_000]]
    assert common.open_dataset(tmp_path / "out")[0] == meta


@pytest.mark.parametrize("name, texts, remark", [
    ("words", ["a b", "a c漢 b c"], "25.00% of the tokens, 2, are the unknown token"),
    ("words", ["a b"] * 2, ""),
    ("pairs", ["ab b", "a漢 \n🙂cb a"], "3 characters of the text have no token, and are left out"),
    ("pairs", ["ab b", " \n"], ""), ("some bytes", ["ab", "a漢b漢"], "2 characters of the text have no token"),
    ("bytes", ["ab 漢", "🙂"], ""), ("fallback", ["ab 漢", "🙂"], "")])
def test_what_a_vocabulary_does_not_cover_is_counted(prepare_here, tmp_path, capsys, name, texts, remark):
    """Checked by hand: documents end with a token too, and blanks are left out by design."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {"words": ["?", "a", "b"], "bytes": alphabet, "some bytes": ["Ġ", "a", "b"],
              "fallback": ["a", "b", *(f"<0x{i:02X}>" for i in range(256))]}.get(name, ["a", "b"])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?") if name == "words" else models.BPE(
        vocabulary, [], byte_fallback=name == "fallback"))
    made.pre_tokenizer = (pre_tokenizers.ByteLevel(add_prefix_space=False) if "bytes" in name
                          else pre_tokenizers.WhitespaceSplit())
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "made.json"))
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    prepare_here("openwebtext", "--source", source, "--out-dir", tmp_path / "out", "--num-proc", 1,
                 "--tokenizer", tmp_path / "made.json", "--val-fraction", 0.5)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(remark or "wrote ") and read(tmp_path / "out")


def test_a_document_without_ids_is_named(prepare_here, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="none"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "words.json"))
    source = write_jsonl(tmp_path / "texts.jsonl", ["a b", "b " * 100 + "c", "a"])
    reason = (f"the document that begins with {'b ' * 25!r} does not fit the vocabulary: a part of it has no "
              "id")
    with pytest.raises(ValueError, match=re.escape(reason)):
        prepare_here("openwebtext", "--source", source, "--out-dir", tmp_path / "out", "--num-proc", 1,
                     "--tokenizer", tmp_path / "words.json")


def test_openwebtext_with_another_encoding(prepare_here, monkeypatch, tmp_path):
    """A small one stands for cl100k_base, whose vocabulary cannot be downloaded here."""
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "cl100k_base", tiktoken.Encoding(
        "cl100k_base", pat_str=r".|\n", mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 100_257, "<|endofprompt|>": 100_276}))
    source = write_jsonl(tmp_path / "texts.jsonl", ["é", "\n"])
    prepare_here("openwebtext", "--source", source, "--out-dir", tmp_path / "out", "--num-proc", 1,
                 "--tokenizer", "cl100k_base")
    meta, _ = read(tmp_path / "out")
    assert (meta["vocab_size"], meta["dtype"]) == (100_277, "uint32")
    assert meta["tokenizer"] == {"name": "cl100k_base"}
    files = [(tmp_path / "out" / f"{split}.bin").read_bytes().hex() for split in ("train", "val")]
    assert sorted(files) == ["0a000000" + "a1870100", "c3000000" + "a9000000" + "a1870100"]
    assert common.open_dataset(tmp_path / "out")[0] == meta


@pytest.mark.parametrize("name", ["openwebtext", "chars", "openwebtext_char", "python_char"])
def test_one_document_is_cut_in_two(prepare_here, tiktoken_cache, tmp_path, name):
    text = "To be, or not to be. " * 50
    (tmp_path / "one.txt").write_text(text)
    prepare_here(name, "--source", tmp_path / "one.txt", "--out-dir", tmp_path / "out", "--val-fraction", 0.1,
                 "--num-proc", 1)
    meta, splits = read(tmp_path / "out")
    made = tokenizer.from_meta(meta)
    end = "<|endoftext|>" if name == "openwebtext" else "\n"
    train, val = (made.decode(splits[split]).removesuffix(end) for split in ("train", "val"))
    assert train + val == text and len(val) == 105


@pytest.mark.parametrize("text", ["", None, "caf\xe9", "\t"])
def test_a_text_that_is_left_out(text):
    """Of OpenWebText and of Python's sources; rows of the hub may be empty."""
    assert not is_plain(text) and is_plain(PRINTABLE)


def test_openwebtext_char(prepare_here, tmp_path, capsys):
    """As OpenWebText is treated: with --ascii, local files are."""
    texts = ["plain", "tab\there", "two\nlines", "café", "carriage\r\n", "all " + PRINTABLE, "", "del\x7f",
             "last"]
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    arguments = ["--ascii", "--source", source, "--out-dir", tmp_path / "out", "--num-proc", 1]
    prepare_here("openwebtext_char", *arguments)
    printed = capsys.readouterr().out
    meta, splits = read(tmp_path / "out")
    assert meta["tokenizer"] == {"name": "char", "characters": PRINTABLE} and meta["dtype"] == "uint8"
    kept = ["plain", "two\nlines", "all " + PRINTABLE, "last"]
    [val] = held_out(1, len(kept))
    assert characters(splits["val"]) == kept[val] + "\n"
    rest = characters(splits["train"])
    for i, text in enumerate(kept):
        if i != val:
            assert rest.count(text + "\n") == 1
            rest = rest.replace(text + "\n", "")
    assert rest == ""
    assert meta["source"]["left_out"] == 4 and "4 left out" in printed


def test_the_hub_is_asked_for_one_revision(monkeypatch, tmp_path):
    import datasets

    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return datasets.Dataset.from_dict({"text": ["a"], "other": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = dict.fromkeys(("source", "dataset", "config", "split", "revision", "max_documents", "num_proc"))
    args = argparse.Namespace(out_dir=tmp_path, **args)
    documents, source = common.load_documents(args, tmp_path)
    assert documents.column_names == ["text"]
    assert (asked["name"], asked["split"]) == ("Skylion007/openwebtext", "train")
    assert re.fullmatch("[0-9a-f]{40}", asked["revision"])
    assert source == {"dataset": asked["name"], "revision": asked["revision"]}


# Any text, by its own characters


def texts_of(folder):
    """The text of each split of a dataset of characters."""
    meta, splits = read(folder)
    return {split: characters(ids, meta["tokenizer"]["characters"]) for split, ids in splits.items()}


ANY = {"greek.TXT": "Ελληνικά\r\n“curly” ‘quotes’ – and —\ttabs\n", "cjk.txt": "漢字かな交じり文。한국어\n",
       "emoji.txt": "🙂🏴‍☠️ e\N{COMBINING ACUTE ACCENT} x\N{COMBINING DOT BELOW}\n",
       "hebrew.txt": "שלום עולם\x7f\0"}


@pytest.mark.parametrize("name", ["chars", "openwebtext_char", "python_char"])
def test_any_text_is_kept_whole_in_its_own_alphabet(prepare_here, tmp_path, name):
    (tmp_path / "text").mkdir()
    for file, text in ANY.items():
        (tmp_path / "text" / file).write_bytes(text.encode())
    write_jsonl(tmp_path / "text" / "rows.jsonl", ["é\r\n", "ascii"])
    num_proc = 2 if name == "chars" else 1
    run = prepared if num_proc == 2 else prepare_here   # pytest has threads: nothing forks from it
    run(name, "--source", tmp_path / "text", "--out-dir", tmp_path / "out", "--num-proc", num_proc)
    # .txt files have Python's line ends, and all texts are in the form NFC
    expected = [unicodedata.normalize("NFC", text.replace("\r\n", "\n")) for text in ANY.values()]
    expected += ["é\r\n", "ascii"]
    meta, _ = read(tmp_path / "out")
    assert meta["tokenizer"] == {"name": "char", "normalization": "NFC",
                                 "characters": "".join(sorted({*"".join(expected), "\n"}))}
    assert {*"é\r\t“’—漢한🙂‍ש\0\x7f"} | {"x", "\N{COMBINING DOT BELOW}"} <= {*meta["tokenizer"]["characters"]}
    assert "\N{COMBINING ACUTE ACCENT}" not in meta["tokenizer"]["characters"]
    rest = "".join(texts_of(tmp_path / "out").values())
    for text in expected:
        assert rest.count(text + "\n") == 1
        rest = rest.replace(text + "\n", "")
    assert rest == ""


def test_the_bytes_of_a_small_text(prepare_here, tmp_path, capsys):
    """One text of accents that are characters of their own: é six times, cut in two, and a newline each."""
    (tmp_path / "text.txt").write_bytes(b"\t" + "e\N{COMBINING ACUTE ACCENT}".encode() * 6)
    prepare_here("chars", "--source", tmp_path / "text.txt", "--out-dir", tmp_path / "out", "--num-proc", 1,
                 "--val-fraction", 0.3)
    assert read(tmp_path / "out")[0]["tokenizer"]["characters"] == "\t\né"
    assert (tmp_path / "out" / "train.bin").read_bytes() == bytes([0, 2, 2, 2, 1])
    assert (tmp_path / "out" / "val.bin").read_bytes() == bytes([2, 2, 2, 1])
    assert "7 characters, 3 different ones in the vocabulary\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["chars", "openwebtext_char --ascii"])
def test_a_batch_of_large_documents_is_few(prepare_here, monkeypatch, tmp_path, name):
    """Of 401 bytes and their places in the table, 409: two in a batch of 1,000 bytes."""
    import datasets

    sizes, functions = [], {f: getattr(datasets.Dataset, f) for f in ("map", "filter")}

    def recorded(function):
        def call(self, *args, batch_size=1000, **options):
            sizes.append(batch_size)
            return functions[function](self, *args, batch_size=batch_size, **options)
        return call
    for function in functions:
        monkeypatch.setattr(datasets.Dataset, function, recorded(function))
    monkeypatch.setattr(common, "BATCH_BYTES", 1000, raising=False)
    texts = [f"{i:0401}" for i in range(10)]
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    prepare_here(*name.split(), "--source", source, "--out-dir", tmp_path / "out", "--num-proc", 1)
    assert len(sizes) > 2 and set(sizes) == {2}
    assert sorted("".join(texts_of(tmp_path / "out").values()).splitlines()) == texts


def test_a_mark_that_is_rare_itself_stays(prepare_here, tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", ["aaab", "bba\ufffd", "ab"])
    prepare_here("chars", "--source", source, "--out-dir", tmp_path / "out", "--num-proc", 1,
                 "--min-count", 2)
    assert sorted("".join(texts_of(tmp_path / "out").values()).splitlines()) == ["aaab", "ab", "bba\ufffd"]


@pytest.mark.parametrize("sizes, remark", [((90, 10), True), ((50, 50), False), ((10,) * 20, False)])
def test_a_large_document_that_is_held_out_is_remarked(sizes, remark, prepare_here, tmp_path, capsys):
    source = write_jsonl(tmp_path / "texts.jsonl", ["a" * (1000 * size) for size in sizes])
    prepare_here("chars", "--source", source, "--out-dir", tmp_path / "out", "--num-proc", 1,
                 "--val-fraction", 0.2)
    assert ("since documents are held out whole" in capsys.readouterr().out) == remark


def test_rare_characters_become_one_mark(prepare_here, tmp_path, capsys):
    source = write_jsonl(tmp_path / "texts.jsonl", ["aabb€", "ab漢漢", "a\ufffd"])
    prepare_here("chars", "--source", source, "--out-dir", tmp_path / "out", "--num-proc", 1,
                 "--min-count", 3)
    printed, (meta, _) = capsys.readouterr().out, read(tmp_path / "out")
    assert meta["tokenizer"] == {"name": "char", "characters": "\nab\ufffd", "unknown": "\ufffd",
                                 "normalization": "NFC"}
    assert [meta["source"][key] for key in ("min_count", "rare_characters", "replaced")] == [3, 2, 3]
    assert "2 others, which occur fewer than 3 times each and 3 times in all" in printed
    texts = "".join(texts_of(tmp_path / "out").values()).splitlines()
    assert sorted(texts) == sorted(["aabb\ufffd", "ab\ufffd\ufffd", "a\ufffd"])
    tok = tokenizer.from_meta(meta)
    assert tok.encode("ább") == [3, 2, 2]


@pytest.mark.parametrize("count, dtype", [(255, "uint8"), (256, "uint16"), (65_535, "uint16"),
                                          (65_536, "uint32")])
def test_ids_have_the_bits_that_the_vocabulary_needs(prepare_here, tmp_path, count, dtype):
    """`count` characters and the newline; the ids are checked by hand."""
    han = "".join(map(chr, [*range(0x4E00, 0x9FFF), *range(0x20000, 0x2A6DE), *range(0xAC00, 0xAC00 + 9999)]))
    text = han[:count]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    prepare_here("chars", "--source", tmp_path / "text.txt", "--out-dir", tmp_path / "out", "--num-proc", 1)
    meta, _ = read(tmp_path / "out")
    assert (meta["vocab_size"], meta["dtype"]) == (count + 1, dtype)
    order = {c: i for i, c in enumerate("\n" + "".join(sorted(text)))}
    size = {"uint8": 1, "uint16": 2, "uint32": 4}[dtype]
    train, val = ((tmp_path / "out" / f"{split}.bin").read_bytes() for split in ("train", "val"))
    newline = bytes(size)
    assert train.removesuffix(newline) + val.removesuffix(newline) == b"".join(
        order[c].to_bytes(size, "little") for c in text)
    meta, splits = common.open_dataset(tmp_path / "out")
    common.check_token_ids(splits, count + 1)
    with pytest.raises(ValueError, match=f"the token id {count},"):
        common.check_token_ids(splits, count)


def test_no_text_is_one_sentence(prepare_here, tmp_path):
    with pytest.raises(SystemExit, match="there is no text: give local files with --source"):
        prepare_here("chars", "--out-dir", tmp_path)


# Datasets by name


@pytest.fixture
def hub_folder(tmp_path):
    """A folder as those of the hub: three splits, one of them in two files, and one without text."""
    (tmp_path / "hub").mkdir()
    files = {"train-0": ["one", "δύο", None], "train-1": ["", "three", "four"], "test-0": ["x", "y"],
             "validation-0": [""]}
    for file, texts in files.items():
        rows = "".join(json.dumps({"n": 1, "body": text}) + "\n" for text in texts)
        (tmp_path / "hub" / f"{file}.jsonl").write_text(rows)
    return tmp_path / "hub"


@pytest.mark.parametrize("arguments, expected", [
    ([], ["one", "δύο", "three", "four"]), (["--max-documents", 3], ["one", "δύο", "three"]),
    (["--split", "test"], ["x", "y"])])
def test_a_dataset_by_name_is_streamed(prepare_here, hub_folder, tmp_path, arguments, expected):
    prepare_here("chars", "--dataset", hub_folder, "--text-field", "body", "--out-dir", tmp_path / "out",
                 "--num-proc", 1, *arguments)
    found = "".join(texts_of(tmp_path / "out").values()).splitlines()
    assert sorted(found) == sorted(expected)
    source = read(tmp_path / "out")[0]["source"]
    given = dict(zip((a[2:].replace("-", "_") for a in arguments[::2]), arguments[1::2]))
    assert source["dataset"] == str(hub_folder) and source["documents"] == len(expected)
    assert {k: source[k] for k in ("split", "max_documents") if k in source} == given


@pytest.mark.parametrize("arguments, reason", [
    ([], "there is no field 'text' among n, body (see --text-field)"),
    (["--text-field", "n"], "the field 'n' holds int, not strings"),
    (["--text-field", "body", "--split", "other"], "other"),
    (["--text-field", "body", "--split", "validation"], "the split validation of the dataset /"),
    (["--text-field", "body", "--config", "large"], "large"),
    (["--dataset", "nobody/nothing"], "the dataset nobody/nothing: ")])
def test_a_dataset_that_cannot_be_read_is_one_sentence(prepare_here, hub_folder, existing, arguments, reason):
    given = dict(zip((a[2:] for a in arguments[::2]), arguments[1::2]))
    given.pop("text-field", None)
    out = existing(**{"dataset": str(hub_folder)} | given)
    with pytest.raises(ValueError, match=re.escape(reason)):
        prepare_here("chars", "--dataset", hub_folder, "--out-dir", out, "--num-proc", 1, *arguments)


def test_a_dataset_is_asked_for_as_it_was_named(monkeypatch, tmp_path):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or [
        {"content": "a"}, {"content": None}, {"content": "b"}])
    args = argparse.Namespace(dataset="a/b", config="el", split=None, revision="v1", text_field="content",
                              max_documents=None)
    assert list(common._rows(args, (), tmp_path, nfc=False)) == [{"text": "a"}, {"text": "b"}]
    assert asked == [(("a/b", "el"), {"split": "train", "revision": "v1", "streaming": True})]


# Documents of local files


@pytest.fixture(scope="module")
def documents_in(tmp_path_factory):
    """documents_in(paths, text_field="text") -> the texts, read in this process."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USE_TORCH", "0")
        args = argparse.Namespace(text_field="text", max_documents=None)
        yield lambda paths: [row["text"] for row in common._rows(
            args, tuple(common.find_files([str(path) for path in paths])), work, nfc=False)]


FILES = {
    "mark.txt": ("\N{BYTE ORDER MARK}one\r\ntwo\n\n".encode(), ["one\ntwo\n\n"]),
    "accents.txt": ("naïve 漢字 \u2028🙂".encode(), ["naïve 漢字 \u2028🙂"]),
    "empty.txt": (b"", []),
    "odd name [1]*?{a,b}.txt": (b"odd", ["odd"]),
    ".hidden.txt": (b"hidden", ["hidden"]),
    "mark.jsonl": (b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\r\\n"}', ["a", "b\r\n"]),
    "like_dates.jsonl": (b'{"text": "2020-01-01T00:00:00Z"}\n{"text": "2021-01-01"}\n',
                         ["2020-01-01T00:00:00Z", "2021-01-01"]),
    "like_numbers.jsonl": (b'{"text": "007"}\n{"text": "1.50"}\n', ["007", "1.50"]),
    "rows_differ.jsonl": (b'{"text": "a", "n": 1}\n{"n": {"x": 1}, "text": "b"}\n{"text": "c", "n": "s"}',
                          ["a", "b", "c"]),
    "separators.jsonl": ('{"text": "a\u2028b\u0085c"}\n{"text": "d"}'.encode(), ["a\u2028b\u0085c", "d"]),
    "UPPER.TXT": ("\tκόσμε".encode(), ["\tκόσμε"]),
    "Mixed.JsonL": (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
    "halves.jsonl": (b'{"text": "a\\ud83d b\\ud83d\\ude42"}\n', ["a\ufffd b🙂"]),
    "empty_rows.jsonl": (b'\n{"text": ""}\n \n{"text": "a"}\n', ["a"]),
    "null.jsonl": (b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n', ["a", "b"]),
}


@pytest.mark.parametrize("file", FILES)
def test_documents_are_read_as_they_are(documents_in, tmp_path, file):
    data, expected = FILES[file]
    (tmp_path / file).write_bytes(data)
    (tmp_path / "last.txt").write_text("last")
    documents = documents_in([tmp_path / file, tmp_path / "last.txt"])
    assert documents == [*expected, "last"]


def test_a_long_jsonl_keeps_its_rows_in_order(documents_in, tmp_path):
    """It is longer than the 10 MB that `datasets` reads at a time."""
    texts = [f"{i} " * 100 for i in range(40_000)]
    assert documents_in([write_jsonl(tmp_path / "long.jsonl", texts)]) == texts


def test_the_order_does_not_depend_on_the_folder(documents_in, tmp_path):
    found = []
    for folder, order in (("one", 1), ("two/deeper", -1)):
        place = tmp_path / folder
        (place / "sub").mkdir(parents=True)
        for name in ["b.txt", "sub/a.txt", "a.txt", "sub.txt"][::order]:
            (place / name).write_text(f"text of {name}")
        write_jsonl(place / "rows.jsonl", ["x", "y"])
        found.append(documents_in([place]))
    a, b, *rest = (f"text of {name}" for name in ("a.txt", "b.txt", "sub.txt", "sub/a.txt"))
    assert found[0] == found[1] == [a, b, "x", "y", *rest]


# User errors: one sentence, exit status 1, the dataset that was there untouched


@pytest.fixture(scope="module")
def first_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    (folder / "first.txt").write_text("the first dataset, of few characters")
    prepared("python_char", "--source", folder / "first.txt", "--out-dir", folder / "out")
    return folder / "out"


@pytest.fixture
def existing(first_dataset, tmp_path):
    """existing(paths=["a.txt"]) -> a folder with a dataset of that source, the same after the test."""
    out = Path(shutil.copytree(first_dataset, tmp_path / "existing"))
    meta = json.loads((out / "meta.json").read_text())
    before = {}

    def existing(**source):
        (out / "meta.json").write_text(json.dumps(meta | {"source": source}))
        before.update((path.name, path.read_bytes()) for path in out.iterdir())
        return out
    yield existing
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def parquet(**columns):
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


NOT_UTF8 = "texts must be UTF-8 (iconv -f ENCODING -t utf-8 converts them)"
BAD_FILES = {
    "missing.txt": (None, "does not exist"),
    "picture.png": (b"", ".jsonl"),
    "empty.txt": (b"", "no text"),
    "latin.txt": (b"caf\xe9", f"latin.txt: {NOT_UTF8}"),
    "little.txt": ("\N{BYTE ORDER MARK}a".encode("utf-16-le"), f"little.txt: {NOT_UTF8}"),
    "big.txt": ("\N{BYTE ORDER MARK}a".encode("utf-16-be"), f"big.txt: {NOT_UTF8}"),
    "empty.jsonl": (b"\n", "no text"),
    "broken.jsonl": (b'{"text": "a"}\n{"text"\n', "broken.jsonl: line 2 is not JSON"),
    "deep.jsonl": (b'{"text": "a"}\n' + b"[" * 100_000, "deep.jsonl: line 2 is not JSON"),
    "field.jsonl": (b'{"body": "a"}\n', "field.jsonl: line 1 has no string field 'text' (see --text-field)"),
    "number.jsonl": (b'\n{"text": 3}\n', "number.jsonl: line 2"),
    "list.jsonl": (b"[1]\n", "list.jsonl: line 1"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', f"latin.jsonl: {NOT_UTF8}"),
    "broken.parquet": (b"PAR1 no", "broken.parquet: Parquet file size is 7 bytes"),
    "a::b.txt": (b"text", "a::b.txt cannot be read for the '::' in its path: rename it"),
    "cut.parquet": (parquet(text=["a" * 99])[:-9], "cut.parquet: "),
    "numbers.parquet": (parquet(text=[1, 2]), "numbers.parquet: the column 'text' holds int64, not strings"),
    "lists.parquet": (parquet(text=[["a"]]), "lists.parquet: the column 'text' holds"),
    "other.parquet": (parquet(body=["a"]), "other.parquet: there is no column 'text' (see --text-field)"),
}


@pytest.mark.parametrize("file", BAD_FILES)
def test_a_bad_file_is_one_sentence(documents_in, tmp_path, capfd, file):
    data, reason = BAD_FILES[file]
    if data is not None:
        (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(reason)):
        documents_in([tmp_path / file])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name, file, data, reason", [
    ("python_char", "letter.txt", b"x", "one character"),
    ("python_char", "broken.jsonl", b'{"text": "a"}\n{"text"\n', "broken.jsonl: line 2"),
    ("openwebtext_char", "empty.txt", b"", "no text"),
    ("openwebtext_char --ascii", "accents.txt", "é".encode(), "printable ASCII"),
    ("chars --min-count=9", "letters.txt", b"rare", "no character occurs 9 times"),
    ("openwebtext_char", "letter.txt", b"x", "one character"),
    ("openwebtext_char", "broken.parquet", b"PAR1 no", "broken.parquet: "),
])
def test_a_bad_source_leaves_the_dataset_that_was_there(prepare_here, existing, tmp_path, name, file, data,
                                                        reason):
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(reason)):
        prepare_here(*name.split(), "--source", tmp_path / file, "--num-proc", 1,
                     "--out-dir", existing(paths=[str(tmp_path / file)]))


def test_a_bad_source_is_one_sentence_of_the_program(existing, tmp_path):
    (tmp_path / "letter.txt").write_bytes(b"x")
    out = existing(paths=[str(tmp_path / "letter.txt")])
    done = prepare("chars", "--source", tmp_path / "letter.txt", "--out-dir", out)
    assert "one character" in refused(done)


def test_folder_without_sources(existing, tmp_path):
    (tmp_path / "none").mkdir()
    out = existing(paths=[str(tmp_path / "none")])
    done = prepare("openwebtext_char", "--source", tmp_path / "none", "--out-dir", out)
    assert "holds no" in refused(done)


@pytest.mark.parametrize("arguments, source, named", [
    ("chars --source a.txt", {"paths": ["b.txt"], "files": 1}, "paths ['b.txt']"),
    ("chars --source a.txt", {"adopted": "nanoGPT", "val_sha256": "0"}, "adopted nanoGPT"),
    ("chars --source a.txt", {"paths": ["a.txt"], "max_documents": 5}, "paths ['a.txt'], max_documents 5"),
    ("chars --source a.txt", {}, "an unknown source"),
    ("openwebtext --source a.txt b.txt", {"paths": ["b.txt", "a.txt"]}, "paths ['b.txt', 'a.txt']"),
    ("openwebtext --dataset a/b", {"dataset": "a/b", "config": "el"}, "dataset a/b, config el"),
    ("openwebtext_char", {"library": "Python standard library"}, "library Python standard library"),
    ("openwebtext_char", {"dataset": "Skylion007/openwebtext"}, "dataset Skylion007/openwebtext"),
    ("python_char --source a.txt", {"library": "Python standard library"}, "library Python standard library"),
    ("python_char", {"paths": ["a.txt"]}, "paths ['a.txt']")])
def test_a_dataset_of_another_source_is_not_overwritten(prepare_here, tiktoken_cache, existing, monkeypatch,
                                                        tmp_path, arguments, source, named):
    """Nor is the new source read."""
    import datasets

    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    reason = f"existing holds a dataset of {named}: give another --out-dir, or remove it"
    with pytest.raises(ValueError, match=re.escape(reason)):
        prepare_here(*arguments.split(), "--out-dir", existing(**source), "--num-proc", 1)


def test_a_source_is_the_same_however_its_path_is_written(prepare_here, monkeypatch, tmp_path):
    """And another where the same words name another file. Old datasets have the path as it was typed."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my.txt").write_text(f"text of {folder}")
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path / "a")
    for path in ("my.txt", "./my.txt", tmp_path / "a" / "my.txt", "../a/my.txt"):
        prepare_here("chars", "--source", path, "--out-dir", out, "--num-proc", 1)
        meta = read(out)[0]
        assert meta["source"]["paths"] == [str(tmp_path / "a" / "my.txt")]
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ValueError, match=re.escape(f"holds a dataset of paths {meta['source']['paths']}")):
        prepare_here("chars", "--source", "my.txt", "--out-dir", out, "--num-proc", 1)
    meta["source"]["paths"] = ["my.txt"]
    (out / "meta.json").write_text(json.dumps(meta))
    prepare_here("chars", "--source", "./my.txt", "--out-dir", out, "--num-proc", 1)
    assert "b" in read(out)[0]["tokenizer"]["characters"]


@pytest.mark.parametrize("meta", ["same", None, b"{", b"\xff", b"[]", b"[" * 100_000])
def test_a_dataset_of_the_same_source_is_made_again(prepare_here, tmp_path, meta):
    """Whatever its text, alphabet and share were before; so is one of which a kill left no meta.json in its
    place (None)."""
    path, out = tmp_path / "a.txt", tmp_path / "out"
    for text, more in (("old text" * 9, ()), ("new", ("--min-count", 1, "--val-fraction", 0.4))):
        path.write_text(text)
        prepare_here("chars", "--source", path, "--out-dir", out, "--num-proc", 1, *more)
        assert sum(map(len, texts_of(out).values())) == len(text) + 2
        if meta is None:
            (out / "prepare.tmp").mkdir()
            (out / "meta.json").rename(out / "prepare.tmp" / "meta.json")
        elif meta != "same":
            (out / "meta.json").write_bytes(meta)


@pytest.mark.parametrize("files", [["train.bin", "val.bin"], ["val.bin"]])
@pytest.mark.parametrize("name", ["chars", "python_char"])
def test_token_files_without_a_meta_json_are_not_overwritten(prepare_here, tmp_path, name, files):
    """They may be nanoGPT's; so may those beside what a killed run had not begun to move."""
    (tmp_path / "a.txt").write_text("some text")
    out = tmp_path / "nanoGPT"
    (out / "prepare.tmp").mkdir(parents=True)
    for file in ("prepare.tmp/train.bin", *files):
        (out / file).write_bytes(b"mine")
    source = ["--source", tmp_path / "a.txt"] if name == "chars" else []
    for _ in range(2):
        with pytest.raises(ValueError, match=f"holds {' and '.join(files)} without a meta.json: adopt"):
            prepare_here(name, *source, "--out-dir", out, "--num-proc", 1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == dict.fromkeys(files, b"mine")


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--val-fraction", "1"], "between 0 and 1"),
        (["--val-fraction", "nan"], "between 0 and 1"),
        (["--val-fraction", "some"], "'some'"),
        (["--num-proc", "0"], "at least 1; got 0"),
        (["--num-procs", "2"], "--num-procs"),
        (["--val", "0.5"], "--val"),
        (["--source"], "--source"),
        (["--source", "a.txt", "--dataset", "b"], "either --source or --dataset"),
        (["--source", "a.txt", "--split", "test"], "--split belongs to --dataset"),
        (["--min-count", "2"], "--min-count belongs to --source or --dataset"),
        (["--min-count", "2", "--source", "a.txt", "--ascii"], "without --ascii"),
        (["--dataset", "b", "--max-documents", "0"], "--max-documents must be at least 1; got 0"),
    ],
)
def test_bad_argument(prepare_here, existing, arguments, reason):
    with pytest.raises((SystemExit, ValueError), match=re.escape(reason)):  # common.run makes them alike
        prepare_here("openwebtext_char", "--out-dir", existing(), *arguments)


def test_two_at_once_do_not_delete_each_others_work(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "out" / "prepare.tmp").mkdir(parents=True)
    (tmp_path / "out" / "prepare.tmp" / "train.bin").write_text("of the other one")
    with open(tmp_path / "out" / "prepare.tmp" / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        error = refused(prepare("python_char", "--source", tmp_path / "a.txt", "--out-dir", tmp_path / "out"))
        assert "another prepare.py writes into" in error and "another --out-dir" in error
        assert (tmp_path / "out" / "prepare.tmp" / "train.bin").read_text() == "of the other one"


def test_out_dir_is_a_file(tmp_path):
    for name in ("a.txt", "out"):
        (tmp_path / name).write_text("some text")
    refused(prepare("python_char", "--source", tmp_path / "a.txt", "--out-dir", tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "some text"


def test_no_vocabulary(existing, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    proxy = "http://127.0.0.1:9"
    nowhere = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "HTTPS_PROXY": proxy, "https_proxy": proxy,
               "NO_PROXY": "", "no_proxy": ""}
    out = existing(paths=[str(tmp_path / "a.txt")])
    done = prepare("openwebtext", "--source", tmp_path / "a.txt", "--out-dir", out, **nowhere)
    assert "TIKTOKEN_CACHE_DIR" in refused(done)


def test_no_hub(existing, tmp_path):
    out = existing(dataset=common.HUB_DATASET, revision=common.HUB_REVISION)
    done = prepare("openwebtext_char", "--out-dir", out, "--num-proc", 1, HF_HOME=str(tmp_path / "hub"))
    assert "--source" in refused(done)


# Kills

def write_and_die(kill_at, out):
    """Writes a dataset, and ends without cleaning up at its k-th step on the file system, as SIGKILL
    would."""
    steps = itertools.count(1)

    def counted(function):
        def call(*args, **kwargs):
            if next(steps) == kill_at:
                os._exit(9)
            return function(*args, **kwargs)
        return call
    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    write_new(out)


def write_new(out):
    splits = {"train": [np.arange(96)] * 9, "val": [np.arange(9), np.arange(90)]}
    with common.work_folder(Path(out)) as work:
        common.write_dataset(Path(out), work, tokenizer.CharTokenizer(PRINTABLE), splits, {"name": "new"})


def whole_or_absent(folder):
    """Reads the dataset if it has a meta.json; None if it has none."""
    return read(folder) if (folder / "meta.json").exists() else None


def test_a_kill_at_any_step_leaves_no_broken_dataset(first_dataset, tmp_path):
    write_new(tmp_path / "expected")
    old, expected = read(first_dataset), read(tmp_path / "expected")
    assert [len(expected[1][split]) for split in ("train", "val")] == [864, 99]

    seen, step, code = [], 0, 9
    while code == 9:
        step += 1
        out = Path(shutil.copytree(first_dataset, tmp_path / f"step{step}"))
        process = PROCESSES.Process(target=write_and_die, args=(step, str(out)))
        process.start()
        process.join(600)
        process.kill()
        process.join()
        code = process.exitcode
        found = whole_or_absent(out)
        assert found in (None, old, expected)
        seen.append("none" if found is None else "old" if found == old else "new")
        write_new(out)
        assert read(out) == expected
        assert sorted(path.name for path in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert code == 0 and {"old", "none", "new"} == set(seen)


# Runs a script, and ends without cleaning up at the k-th document that it tokenizes.
TOKENIZE = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from data.tokenizer import TiktokenTokenizer
left, encode = int(sys.argv[1]), TiktokenTokenizer.encode_ordinary
def encode_ordinary(self, text):
    global left
    left -= 1
    if not left:
        os._exit(9)
    return encode(self, text)
TiktokenTokenizer.encode_ordinary = encode_ordinary
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_while_it_tokenizes(tiktoken_cache, tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", [f"document {i} " for i in range(1_500)])
    out = tmp_path / "out"
    script = ROOT / "data" / "openwebtext" / "prepare.py"
    command = [script, "--source", source, "--out-dir", out, "--num-proc", 1]
    for kill_at in (1, 1_200):  # in the first batch of documents, and in the second
        killed = [sys.executable, "-c", TOKENIZE, kill_at, *command]
        assert subprocess.run([*map(str, killed)], capture_output=True, timeout=600).returncode == 9
        assert not (out / "meta.json").exists() and (out / "prepare.tmp").exists()
    write_jsonl(source, [f"text {i} " for i in range(1_300)])  # what the killed runs have read is not used
    prepared("openwebtext", *command[1:])
    meta, splits = read(out)
    assert meta["source"]["documents"] == 1_300
    assert documents_of(tokenizer.TiktokenTokenizer(), splits["val"])[0].startswith("text ")
    assert not (out / "prepare.tmp").exists()


def test_a_killed_process_of_several_is_one_sentence(tiktoken_cache, tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", [f"document {i} " for i in range(9)])
    script = ROOT / "data" / "openwebtext" / "prepare.py"
    command = [sys.executable, "-c", TOKENIZE, 1, script, "--source", source, "--out-dir", tmp_path / "out",
               "--num-proc", 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert "give a smaller --num-proc" in refused(done)
    assert not any((tmp_path / "out").iterdir())


INTERRUPTED = """
import os, runpy, signal, sys
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGINT)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends the process on Windows")
def test_interrupt(existing, tmp_path):
    script = ROOT / "data" / "python_char" / "prepare.py"
    out = existing(library="Python standard library", python="2.7")  # another Python may go on
    command = [sys.executable, "-c", INTERRUPTED, script, "--out-dir", out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


# What train.py opens


def test_open_dataset(python_char):
    meta, tokens = common.open_dataset(python_char[0])
    expected_meta, expected = read(python_char[0])
    assert meta == expected_meta
    for split in ("train", "val"):
        ids, count = tokens[split], len(expected[split])
        assert ids.dtype == np.uint8 and len(ids) == count and ids[:].tolist() == expected[split]
        for part in (slice(3, 7), slice(count - 2, count + 9), slice(-3, None), slice(5, 2), slice(0, 9, 2)):
            assert ids[part].tolist() == expected[split][part]


def test_a_dataset_is_a_path_or_a_name_under_data(first_dataset, tmp_path, monkeypatch):
    assert common.find_dataset("python_char") == str(ROOT / "data" / "python_char")
    assert common.find_dataset(str(first_dataset)) == str(first_dataset)
    shutil.copytree(first_dataset, tmp_path / "python_char")
    monkeypatch.chdir(tmp_path)
    assert Path(common.find_dataset("python_char")).resolve() == tmp_path / "python_char"  # the path is first
    assert common.open_dataset("python_char")[0] == read(first_dataset)[0]
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "", "file", "a\0b"):
        with pytest.raises(ValueError, match="there is no dataset .* under data/"):
            common.find_dataset(name)
        with pytest.raises(ValueError, match="there is no dataset"):
            common.open_dataset(name)


def test_a_dataset_that_is_not_made_yet_names_its_script(monkeypatch, tmp_path):
    (tmp_path / "prepare.py").write_text("")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ValueError, match=re.escape(f"run python {tmp_path.name}/prepare.py")):
        common.open_dataset(tmp_path)


WHOLE = {"tokenizer": {"name": "char", "characters": "abc"}, "vocab_size": 3, "dtype": "uint16",
         "train_tokens": 4, "val_tokens": 2, "source": {}}
NOT_WHOLE = {
    "no meta.json": {"meta.json": None}, "half a meta.json": {"meta.json": b"{"},
    "a list": {"meta.json": b"[]"}, "deep": {"meta.json": b"[" * 100_000}, "not text": {"meta.json": b"\xff"},
    "another type": WHOLE | {"dtype": "float32"},
    "no count": {k: v for k, v in WHOLE.items() if k != "val_tokens"},
    "count too large": WHOLE | {"val_tokens": 3}, "count too small": WHOLE | {"train_tokens": 3},
    "count as text": WHOLE | {"val_tokens": "2"}, "vocab_size too large": WHOLE | {"vocab_size": 4},
    "vocab_size as float": WHOLE | {"vocab_size": 3.0}, "no tokenizer": WHOLE | {"tokenizer": None},
    "another tokenizer": WHOLE | {"tokenizer": {"name": "bpe"}},
    "gpt2 of 3 tokens": WHOLE | {"tokenizer": {"name": "gpt2"}},
    "no train.bin": {"train.bin": None}, "half a token": {"train.bin": b"1234567"}, "cut": {"val.bin": b"12"},
    "empty val.bin": {"val.bin": b""}, "empty and said so": WHOLE | {"val_tokens": 0, "val.bin": b""},
}


@pytest.mark.parametrize("case", [None, *NOT_WHOLE])
def test_open_dataset_that_is_not_whole(tmp_path, case):
    change = NOT_WHOLE.get(case, {})
    meta = {k: v for k, v in change.items() if "." not in k} or WHOLE
    files = {"train.bin": b"12345678", "val.bin": b"1234", "meta.json": json.dumps(meta).encode()}
    files |= {k: v for k, v in change.items() if "." in k}
    for name, data in files.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    if case is None:
        assert common.open_dataset(tmp_path)[0] == WHOLE
    else:
        with pytest.raises(ValueError, match=r"there is no whole dataset in .*prepare\.py"):
            common.open_dataset(tmp_path)


@pytest.mark.parametrize("split, place", [("train", 0), ("train", 999), ("val", 500)])
@pytest.mark.parametrize("parts", [1, 3])
def test_an_id_outside_the_vocabulary_is_found_by_one_share(split, place, parts):
    splits = {"train": np.full(1000, 95, np.uint8), "val": np.full(1000, 95, np.uint8)}
    for part in range(parts):
        common.check_token_ids(splits, 96, part, parts)
    splits[split][place] = 96
    found = []
    for part in range(parts):
        try:
            common.check_token_ids(splits, 96, part, parts)
        except ValueError as error:
            found.append(str(error))
    assert len(found) == 1 and f"{split}.bin holds the token id 96" in found[0] and "ends at 95" in found[0]
