"""data/adopt.py: nanoGPT's own folders."""
import json
import pickle
import runpy
import sys
from hashlib import sha256

import numpy as np
import pytest

from data import common, tokenizer
from tests.conftest import ROOT, Hostile

LETTERS = "\n !abcdé漢"


@pytest.fixture
def adopt(monkeypatch):
    """adopt(folder, "--tokenizer", "gpt2"): runs main() in this process."""
    def adopt(*arguments):
        monkeypatch.setattr(sys, "argv", ["adopt.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "data" / "adopt.py"))["main"]()
    return adopt


@pytest.fixture
def folder(tmp_path):
    """folder(train, val, dtype="<u2", meta=...) -> a folder with these ids, and with that meta.pkl."""
    def folder(train, val, dtype="<u2", meta=None):
        for split, ids in (("train", train), ("val", val)):
            np.array(ids, dtype).tofile(tmp_path / f"{split}.bin")
        if meta is not None:
            (tmp_path / "meta.pkl").write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta))
        return tmp_path
    return folder


def of_characters(characters):
    """meta.pkl as shakespeare_char's prepare.py writes it."""
    return {"vocab_size": len(characters), "itos": dict(enumerate(characters)),
            "stoi": {c: i for i, c in enumerate(characters)}}


def test_a_folder_of_characters(adopt, folder, capsys):
    place = folder([3, 4, 8, 0], [7, 1, 2], meta=of_characters(LETTERS))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    adopt(place)
    assert {name: (place / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in place.iterdir()) == ["meta.json", "meta.pkl", "train.bin", "val.bin"]
    assert json.loads((place / "meta.json").read_text()) == {
        "tokenizer": {"name": "char", "characters": LETTERS}, "vocab_size": 9, "dtype": "uint16",
        "train_tokens": 4, "val_tokens": 3,
        "source": {"adopted": "nanoGPT", **{f"{split}_sha256": sha256(before[f"{split}.bin"]).hexdigest()
                                            for split in ("train", "val")}}}
    meta, splits = common.open_dataset(place)
    assert tokenizer.from_meta(meta).decode(splits["train"][:].tolist()) == "ab漢\n"
    assert "4 training and 3 validation tokens, largest id 8" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, dtype, expected", [
    ([], "<u2", {"name": "gpt2"}), (["--tokenizer", "gpt2"], "<u2", {"name": "gpt2"}),
    (["--tokenizer", "o200k_base", "--dtype", "uint32"], "<u4", {"name": "o200k_base"})])
def test_a_folder_of_byte_pairs_needs_no_vocabulary(adopt, folder, monkeypatch, arguments, dtype, expected):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    place = folder([15496, 995, 50256], [50256, 0], dtype)
    adopt(place, *arguments)
    meta, splits = common.open_dataset(place)
    assert meta["tokenizer"] == expected and splits["train"][:].tolist() == [15496, 995, 50256]
    common.check_token_ids(splits, meta["vocab_size"])


def test_a_folder_of_a_tokenizers_file(adopt, folder, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")).save(str(tmp_path / "own.json"))
    adopt(folder([0, 1, 2], [1, 2]), "--tokenizer", tmp_path / "own.json")
    meta, _ = common.open_dataset(tmp_path)
    assert (meta["vocab_size"], meta["tokenizer"]["end_of_text"]) == (3, 2)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_pkl_that_would_run_code_is_refused(adopt, folder, tmp_path, protocol):
    made = tmp_path / "made"
    for hostile in (Hostile(str(made)), of_characters("ab") | {"itos": {0: "a", 1: Hostile(str(made))}}):
        place = folder([0, 1], [1], meta=pickle.dumps(hostile, protocol))
        with pytest.raises(ValueError, match=r"meta.pkl holds no vocabulary .* which is code\): name"):
            adopt(place)
        assert not made.exists() and not (place / "meta.json").exists()
    pickle.loads(pickle.dumps(Hostile(str(made)), protocol)).close()
    assert made.exists()  # it would have


@pytest.mark.parametrize("code", [b"cos\nsystem\n(S'touch made'\ntR.", b"(S'touch made'\nios\nsystem\n.",
                                  b"c__builtin__\neval\n(S'1'\ntR."])
def test_old_ways_to_run_code_are_refused(adopt, folder, monkeypatch, tmp_path, code):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="which is code"):
        adopt(folder([0, 1], [1], meta=code))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("meta, reason", [
    ({"vocab_size": 5}, "KeyError"), ([1], "TypeError"), (b"garbage", "UnpicklingError"), (b"", "EOFError"),
    ({"itos": {0: "ab", 1: "c"}}, "not single characters"), ({"itos": {0: "a", 2: "b"}}, "KeyError"),
    ({"itos": {0: "a", 1: "a"}}, "distinct"), ({"itos": {0: 1, 1: 2}}, "TypeError"),
    ({"itos": {}}, "distinct")])
def test_a_meta_pkl_without_a_vocabulary_is_one_sentence(adopt, folder, meta, reason):
    with pytest.raises(ValueError, match=f"meta.pkl holds no vocabulary .*{reason}.*--tokenizer"):
        adopt(folder([0, 1], [1], meta=meta))


@pytest.mark.parametrize("ids, meta, arguments, reason", [
    ([300, 50257], None, [], "largest id in .* is 50257, but the vocabulary ends at 50256"),
    ([0, 64], None, [], "largest id in .* is 64, far from GPT-2's: name the vocabulary with --tokenizer"),
    ([0, 9], of_characters(LETTERS), [], "is 9, but the vocabulary ends at 8"),
    ([0, 1], None, ["--tokenizer", "gpt3"], "'gpt3' is none of gpt2"),
    ([0, 1], None, ["--dtype", "uint32"], r"val.bin cannot be used \(it has 2 bytes"),
    # ids of 32 bits, one of which does not fit 16
    ([15496, 0, 34464, 1] * 50, None, ["--tokenizer", "cl100k_base"], "has 100,277 tokens, more .*uint16"),
    ([15496, 0, 50256, 0] * 50, None, [], "train.bin looks like ids of 32 bits, .*: give --dtype=uint32"),
    ([], None, [], r"train.bin cannot be used \(it has 0 bytes")])
def test_a_folder_that_does_not_fit_is_one_sentence(adopt, folder, ids, meta, arguments, reason):
    place = folder(ids, ids[-1:], meta=meta)
    with pytest.raises(ValueError, match=reason):
        adopt(place, *arguments)
    assert not (place / "meta.json").exists() and not (place / "prepare.tmp").exists()


def test_a_missing_split_is_named(adopt, folder):
    place = folder([300], [300])
    (place / "train.bin").unlink()
    with pytest.raises(ValueError, match=f"^{place} has no train.bin: name a folder that has it$"):
        adopt(place)


def test_small_ids_of_gpt2_when_it_is_named(adopt, folder):
    place = folder([0, 64], [1])
    adopt(place, "--tokenizer", "gpt2")
    assert common.open_dataset(place)[0]["tokenizer"] == {"name": "gpt2"}


def test_what_is_described_stays(adopt, folder):
    place = folder([300], [300])
    (place / "meta.json").write_text("mine")
    with pytest.raises(ValueError, match="has a meta.json already"):
        adopt(place)
    assert (place / "meta.json").read_text() == "mine"


def test_train_names_the_command(folder):
    place = folder([300], [300])
    with pytest.raises(ValueError, match=f"or python data/adopt.py {place} if nanoGPT made it"):
        common.open_dataset(place)
