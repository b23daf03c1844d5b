"""data/tokenizer.py: characters, tiktoken's encodings and files of the library tokenizers, there and back."""
import json
import random
import re
import sys
import types

import pytest

from data import tokenizer
from data.common import DTYPES

PRINTABLE = "\n" + bytes(range(32, 127)).decode("ascii")


def test_characters_are_the_newline_and_printable_ascii():
    assert tokenizer.CHARACTERS == PRINTABLE and len(PRINTABLE) == 96


def test_char_tokenizer_round_trip():
    chars = tokenizer.CharTokenizer(PRINTABLE)
    assert chars.vocab_size == 96
    assert chars.encode("\n ~") == [0, 1, 95]
    text = "".join(random.Random(0).choices(PRINTABLE, k=500))
    assert chars.decode(chars.encode(text)) == text
    decode = chars.decoder()
    assert [decode(i) for i in chars.encode(text)] == list(text)


def test_char_tokenizer_of_other_characters():
    chars = tokenizer.CharTokenizer("éa漢")
    assert chars.encode("漢é") == [2, 0]
    decode = chars.decoder()
    assert [decode(2), decode(0), decode.flush()] == ["漢", "é", ""]


def test_char_tokenizer_names_the_character():
    with pytest.raises(ValueError, match=r"'\\t'"):
        tokenizer.CharTokenizer(PRINTABLE).encode("a\tb")


@pytest.mark.parametrize("i", [-1, 96])
def test_char_tokenizer_refuses_other_ids(i):
    with pytest.raises(ValueError, match=str(i)):
        tokenizer.CharTokenizer(PRINTABLE).decode([0, i])


@pytest.mark.parametrize("chars", ["", "aba"])
def test_char_tokenizer_needs_distinct_characters(chars):
    with pytest.raises(ValueError):
        tokenizer.CharTokenizer(chars)


def test_gpt2_known_ids(tiktoken_cache):
    gpt2 = tokenizer.TiktokenTokenizer()
    assert gpt2.vocab_size == 50257 and gpt2.end_of_text == 50256
    assert gpt2.encode("Hello world") == list(gpt2.encode_ordinary("Hello world")) == [15496, 995]
    assert gpt2.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"


def test_gpt2_end_of_text_is_special_in_prompts_alone(tiktoken_cache):
    gpt2 = tokenizer.TiktokenTokenizer()
    assert gpt2.encode("<|endoftext|>Hello") == [50256, 15496]
    assert 50256 not in gpt2.encode_ordinary("<|endoftext|>")
    assert gpt2.decode(gpt2.encode_ordinary("<|endoftext|>")) == "<|endoftext|>"


def test_gpt2_decoder_never_gives_half_a_character(tiktoken_cache):
    gpt2 = tokenizer.TiktokenTokenizer()
    text = "naïve 漢字 🙂🏴‍☠️ ok\n"
    ids = gpt2.encode(text)
    assert any("\ufffd" in gpt2.decode([i]) for i in ids)  # some tokens end inside a character
    decode = gpt2.decoder()
    pieces = [decode(i) for i in ids]
    assert "".join(pieces) == text == gpt2.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert decode.flush() == ""


def test_gpt2_decoder_flushes_an_unfinished_character(tiktoken_cache):
    gpt2 = tokenizer.TiktokenTokenizer()
    decode = gpt2.decoder()
    assert decode(gpt2.encode("🙂")[0]) == ""
    assert decode.flush() == "\ufffd"


def test_gpt2_refuses_ids_of_a_padded_vocabulary(tiktoken_cache):
    gpt2 = tokenizer.TiktokenTokenizer()
    with pytest.raises(ValueError, match="50257"):
        gpt2.decode([50257])
    with pytest.raises(ValueError, match="50300"):
        gpt2.decoder()(50300)


# Other encodings of tiktoken. Their vocabularies cannot be downloaded here.


@pytest.fixture
def small_cl100k(monkeypatch):
    """tiktoken gives bytes and some pairs of them, with cl100k_base's special tokens, as cl100k_base."""
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"he": 256, b"ll": 257, b" w": 258, "λ".encode(): 259}
    special = {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
               "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
    encoding = tiktoken.Encoding("cl100k_base", pat_str=r"\s?\w+|\s|.", mergeable_ranks=ranks,
                                 special_tokens=special)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "cl100k_base", encoding)
    return encoding


def test_the_sizes_of_tiktokens_encodings(monkeypatch):
    """By tiktoken's own definitions, but for the files of the vocabularies."""
    from tiktoken_ext import openai_public

    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *args, **options: {})
    made = {name: make() for name, make in openai_public.ENCODING_CONSTRUCTORS.items()}
    assert tokenizer.TIKTOKEN == {name: encoding.get("explicit_n_vocab") or 1 + max(
        encoding["special_tokens"].values()) for name, encoding in made.items()}
    assert {"gpt2", "cl100k_base", "o200k_base"} <= set(made)


def test_another_encoding(small_cl100k):
    tok = tokenizer.from_name("cl100k_base")
    assert (tok.vocab_size, tok.dtype, tok.end_of_text, tok.start) == (100277, "uint32", 100257, 100257)
    assert tok.encode("hello<|endoftext|> w") == [256, 257, ord("o"), 100257, 258]
    text = "<|endoftext|>λ<|endofprompt|>"
    assert list(tok.encode_ordinary(text)) == small_cl100k.encode_ordinary(text)
    named = "<|endofprompt|>"
    assert tok.encode(named) == list(tok.encode_ordinary(named))  # in a prompt it is text
    assert tok.decode([256, 259, 100276]) == small_cl100k.decode([256, 259, 100276]) == "heλ<|endofprompt|>"


def test_ids_that_an_encoding_skips_do_not_end_a_sample(small_cl100k):
    """cl100k_base has no tokens 100256 and 100261 to 100275."""
    tok = tokenizer.from_name("cl100k_base")
    assert tok.decode([256, 100256, 256]) == "he\ufffdhe"
    decode = tok.decoder()
    assert [decode(256), decode(100270), decode(100276)] == ["he", "\ufffd", "<|endofprompt|>"]
    with pytest.raises(ValueError, match="100277"):
        decode(100277)


# Files of the library tokenizers


def llama():
    """Spaces as "▁", bytes for what has no token, and a decoder of the whole text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁helowrd'", "▁w", "▁h", "ell"]
    merges = [("▁", "w"), ("▁", "h"), ("l", "l"), ("e", "ll")]
    vocabulary = {token: i for i, token in enumerate([*tokens, "ll"])}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def unigram():
    """Spaces as "▁", and a decoder that drops the first of them. The vocabulary is a list."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<unk>", "</s>", *"▁helowrdάλ漢🙂", "▁hello", "▁wor"]
    made = Tokenizer(models.Unigram([(token, -len(token) / 9) for token in tokens], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def wordpiece():
    """Words with spaces between them, but for the pieces that go on with a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["[UNK]", "hello", "wor", "##ld", "!", "'", "s", "##s", "."]
    made = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.add_special_tokens(["[EOS]"])  # the vocabulary ends with an added token
    return made


def suffix():
    """A mark on the last piece of a word, which becomes a space unless it ends the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["</s>", *"helowrd", *(f"{c}</w>" for c in "helowrd"), "lo</w>"]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("l", "o</w>")],
                                end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    return made


def bytes_alone():
    """Bytes as characters, as GPT-2 has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll"]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("h", "e"), ("l", "l")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


MADE = [llama, unigram, wordpiece, suffix, bytes_alone]
ANY = "hello world, hell's λάλ 漢字 🙂🏴‍☠️ e\N{COMBINING ACUTE ACCENT}\r\n\tx  y <|endoftext|></s>"


@pytest.mark.parametrize("make", MADE)
def test_a_file_is_the_librarys_tokenizer(make):
    made = make()
    tok = tokenizer.FileTokenizer(made.to_str())
    for text in (ANY, ANY.split("<")[0], "hello", " ", ""):
        ids = made.encode(text, add_special_tokens=False).ids
        assert tok.encode(text) == ids
        assert tok.decode(ids) == made.decode(ids, skip_special_tokens=False)
    vocabulary = made.get_vocab(with_added_tokens=True)
    assert tokenizer.count_ids(tok.to_meta()) == tok.vocab_size == 1 + max(vocabulary.values())
    assert tok.end_of_text == tok.start == vocabulary[
        {bytes_alone: "<|endoftext|>", wordpiece: "[EOS]"}.get(make, "</s>")]
    for i in (-1, tok.vocab_size):
        with pytest.raises(ValueError, match=f"token id {i} is outside"):
            tok.decode([0, i])


@pytest.mark.parametrize("make", MADE)
def test_the_pieces_of_a_file_are_the_whole(make):
    """Of texts and of ids by chance, with and without ids before them."""
    made, chance = make(), random.Random(7)
    tok = tokenizer.FileTokenizer(made.to_str())
    for case in range(150):
        if case % 2:
            ids = made.encode("".join(chance.choices(ANY, k=40)), add_special_tokens=False).ids
        else:
            ids = chance.choices(range(tok.vocab_size), k=40)
        decode, whole = tok.decoder(), made.decode(ids, skip_special_tokens=False)
        pieces = [decode(i) for i in ids]
        assert "".join(pieces) + decode.flush() == whole
        before = made.decode(ids[:9], skip_special_tokens=False)
        if whole.startswith(before):  # half a character, say, may become another text
            decode = tok.decoder(ids[:9])
            assert before + "".join(map(decode, ids[9:])) + decode.flush() == whole


@pytest.mark.parametrize("make", [llama, bytes_alone])
def test_the_pieces_of_a_file_never_hold_half_a_character(make):
    tok = tokenizer.FileTokenizer(make().to_str())
    decode, ids = tok.decoder(), tok.encode("hello 漢字 🙂 hello")
    pieces = [decode(i) for i in ids]
    assert "".join(pieces) == "hello 漢字 🙂 hello" and decode.flush() == ""
    assert sum(map(bool, pieces)) > 5  # they come while the text grows
    decode = tok.decoder()
    assert [decode(tok.encode("🙂")[-4]), decode.flush()] == ["", "\ufffd"]


def test_a_text_goes_on_with_the_space_that_it_needs():
    """The first piece of a text has no space before it, but what follows a prompt has."""
    tok = tokenizer.FileTokenizer(unigram().to_str())
    prompt, [word] = tok.encode("hello"), tok.encode("wor")
    assert tok.decoder(prompt)(word) == " wor" and tok.decoder()(word) == "wor"


def test_pieces_take_the_same_time_however_long_the_text_is(monkeypatch):
    tok, lengths = tokenizer.FileTokenizer(unigram().to_str()), []
    decode = tok.decode
    monkeypatch.setattr(tok, "decode", lambda ids: lengths.append(len(list(ids))) or decode(ids))
    piece = tok.decoder()
    for i in tok.encode("hello world " * 100):
        piece(i)
    assert len(lengths) > 500 and max(lengths) < 10


def test_gpt2_as_a_file_is_gpt2(tiktoken_cache):
    """The library's byte pairs with GPT-2's vocabulary, against tiktoken's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = json.loads((tiktoken_cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6").read_text())
    merges = (tiktoken_cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").read_text(encoding="utf-8")
    pairs = [tuple(line.split()) for line in merges.split("\n")[1:] if line]
    made = Tokenizer(models.BPE(vocabulary, pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    tok, gpt2 = tokenizer.FileTokenizer(made.to_str()), tokenizer.TiktokenTokenizer()
    assert (tok.vocab_size, tok.dtype, tok.end_of_text) == (gpt2.vocab_size, gpt2.dtype, gpt2.end_of_text)
    for text in (ANY, "Hello world", "\u2028 naïve\0 \ufffd"):
        ids = list(gpt2.encode_ordinary(text))
        assert list(tok.encode_ordinary(text)) == ids and tok.encode(text) == gpt2.encode(text)
        assert tok.decode(ids) == gpt2.decode(ids) == text
    chance = random.Random(3)
    for _ in range(50):  # of bytes that are no text
        ids = chance.choices(range(300), k=20)
        decode, other = tok.decoder(), gpt2.decoder()
        assert "".join(map(decode, ids)) + decode.flush() == "".join(map(other, ids)) + other.flush()


# A long document is encoded in pieces


LINES = ["hello", " wor", "w", "\n", "\n", "\n\n", ".\n", ". \n", "\r\n", "\n ", " \n", "\n/", "/", "\t",
         "  ", "'s", "123", "é", "e\N{COMBINING ACUTE ACCENT}", "漢字", "🙂", "!", "\n" * 12, " " * 12]
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
          r"\s*[\r\n]|\s+(?!\S)|\s")


def recorded(function, texts):
    """The function, which also appends the texts that it is given to a list."""
    return lambda text, *args, **options: texts.append(text) or function(text, *args, **options)


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", *MADE])
def test_pieces_of_a_document_have_the_ids_of_the_whole(monkeypatch, tiktoken_cache, name):
    """llama and unigram put a space before each text: for them there is no place to cut."""
    import tiktoken

    encoded = []
    if name in MADE:
        made = name()
        tok = tokenizer.FileTokenizer(made.to_str())
        monkeypatch.setattr(tok, "_encode", recorded(tok._encode, encoded))
    else:
        made = tiktoken.get_encoding("gpt2")
        if name == "cl100k_base":  # its pattern, with GPT-2's pairs
            made = tiktoken.Encoding(name, pat_str=CL100K, mergeable_ranks=made._mergeable_ranks,
                                     special_tokens={"<|endoftext|>": 50256})
            monkeypatch.setitem(tiktoken.registry.ENCODINGS, name, made)
        tok = tokenizer.TiktokenTokenizer(name)
        tok.bpe = types.SimpleNamespace(encode_ordinary=recorded(made.encode_ordinary, encoded))
    monkeypatch.setattr(tokenizer, "PIECE", 300, raising=False)
    chance = random.Random(5)
    for size in [0, 1, 30, *[900] * 40]:
        text = "".join(chance.choices(LINES, k=size))
        expected = made.encode_ordinary(text) if name not in MADE else made.encode(
            text, add_special_tokens=False).ids
        encoded.clear()
        ids = tok.encode_ordinary(text)
        assert list(ids) == expected
        pieces = [piece for piece in encoded if len(piece) > 400]  # others are looked at for a place to cut
        if name in (llama, unigram):
            assert text in encoded and len(pieces) <= 1
        else:
            assert all(len(piece) < 700 for piece in encoded)
    assert ids.dtype == tok.dtype


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000"])
def test_a_million_blanks(tiktoken_cache, blank):
    """tiktoken panics at so many, with an error that is no Exception."""
    gpt2, text = tokenizer.TiktokenTokenizer(), "a" + blank * 1_100_000 + "b"
    assert gpt2.decode(gpt2.encode_ordinary(text)) == gpt2.decode(gpt2.encode(text)) == text
    few = "a" + blank * 100_000 + "b"
    assert list(gpt2.encode_ordinary(few)) == gpt2.bpe.encode_ordinary(few)


def test_special_tokens_are_special_in_prompts_alone():
    tok = tokenizer.FileTokenizer(bytes_alone().to_str())
    assert tok.encode("<|endoftext|>he") == [0, tok.encode("he")[0]]
    ids = tok.encode_ordinary("<|endoftext|>he")
    assert 0 not in ids and tok.decode(ids) == "<|endoftext|>he"
    assert tok.encode("<|endoftext|>") == [0]  # whatever came before


def test_a_file_neither_cuts_nor_fills_texts():
    made = bytes_alone()
    made.enable_truncation(4)
    made.enable_padding(length=9)
    tok = tokenizer.FileTokenizer(made.to_str())
    assert [len(tok.encode("x" * n)) for n in (1, 20)] == [1, 20]


def test_halves_of_surrogate_pairs_are_text_that_nobody_knows(tiktoken_cache):
    """A command line that is not UTF-8 has them."""
    for tok in (tokenizer.FileTokenizer(bytes_alone().to_str()), tokenizer.TiktokenTokenizer()):
        assert tok.decode(tok.encode("caf\udce9")) == "caf\ufffd"
    with pytest.raises(ValueError, match="udce9"):
        tokenizer.CharTokenizer(PRINTABLE).encode("caf\udce9")


def test_the_end_of_text_is_named_or_found(tmp_path):
    path = tmp_path / "own.JSON"
    path.write_text(llama().to_str(), encoding="utf-8")
    assert tokenizer.from_name(str(path)).end_of_text == 2
    assert tokenizer.from_name(str(path), "<s>").end_of_text == 1
    with pytest.raises(ValueError, match=re.escape(f"{path}: its vocabulary has no token <|im_end|>: name")):
        tokenizer.from_name(str(path), "<|im_end|>")
    path.write_text(llama().to_str().replace("</s>", "<end>"), encoding="utf-8")
    with pytest.raises(ValueError, match="has no token .* or </s> or .*--end-of-text"):
        tokenizer.from_name(str(path))


@pytest.mark.parametrize("name, end_of_text, reason", [
    ("gpt3", None, "'gpt3' is none of gpt2, .*cl100k_base, .* nor the path of a tokenizer.json"),
    ("gpt2", "<|im_end|>", "gpt2 has an end-of-text token of its own"),
    ("broken.json", None, "broken.json: it is no file of the library tokenizers"),
    ("latin.json", None, "latin.json: 'utf-8' codec"),
    ("none.json", None, "none.json cannot be read: No such file")])
def test_a_name_of_no_tokenizer_is_one_sentence(monkeypatch, tmp_path, name, end_of_text, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{"model": 3}')
    (tmp_path / "latin.json").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=reason):
        tokenizer.from_name(name, end_of_text)


def test_a_missing_library_is_one_sentence(monkeypatch):
    text = llama().to_str()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(OSError, match="pip install -r requirements-transformers.txt"):
        tokenizer.FileTokenizer(text)
    described = {"name": "tokenizers", "json": text, "end_of_text": 2}
    assert tokenizer.count_ids(described) == 3 + 256 + 13  # a run needs no more


@pytest.mark.parametrize("described", [
    {"name": "char", "characters": ["a", "b"]}, {"name": "char", "characters": "aab"},
    {"name": "char", "characters": "ab", "unknown": "c"}, {"name": "tokenizers"},
    {"name": "tokenizers", "end_of_text": 272},
    {"name": "tokenizers", "end_of_text": -1}, {"name": "tokenizers", "end_of_text": "</s>"}])
def test_what_sampling_would_refuse_is_refused_before_training(described):
    """meta.json may be another program's: what makes no tokenizer has no number of ids either."""
    if described["name"] == "tokenizers":
        described = described | {"json": llama().to_str()}
    with pytest.raises((ValueError, KeyError, TypeError)):     # open_dataset makes one sentence of each
        tokenizer.count_ids(described)


# What meta.json and checkpoints hold


def test_characters_with_a_mark_for_all_others():
    tok = tokenizer.CharTokenizer("\tab?é", "?", "NFC")
    assert tok.encode("b\tx漢") == [2, 0, 3, 3] and tok.encode("e\N{COMBINING ACUTE ACCENT}") == [4]
    assert tok.encode_ordinary("").tolist() == [] and tok.start == 0
    plain = tokenizer.CharTokenizer("ba\ne\N{COMBINING ACUTE ACCENT}")  # as they are: there is no é
    assert plain.encode("e\N{COMBINING ACUTE ACCENT}") == [3, 4] and plain.start == 2
    with pytest.raises(ValueError, match="'!' is not one of the characters"):
        tokenizer.CharTokenizer("ab", "!")


def test_a_long_text_of_characters():
    """It is encoded in parts of a million; the character that is missing is named wherever it is."""
    tok, text = tokenizer.CharTokenizer("ab"), "ab" * 600_000
    assert tok.encode_ordinary(text).tobytes() == b"\0\1" * 600_000
    with pytest.raises(ValueError, match="'c'"):
        tok.encode(text + "c" + text)


@pytest.mark.parametrize("size, dtype", [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"),
                                         (65_537, "uint32")])
def test_the_smallest_type_that_holds_the_ids(size, dtype):
    assert tokenizer.smallest_dtype(size) == dtype
    assert (DTYPES[dtype].itemsize, DTYPES[dtype].kind, DTYPES[dtype].newbyteorder("<") == DTYPES[dtype]) == (
        {"uint8": 1, "uint16": 2, "uint32": 4}[dtype], "u", True)


def test_meta_round_trip(tiktoken_cache, small_cl100k):
    made = [tokenizer.CharTokenizer("ab\n"), tokenizer.CharTokenizer("\nab?", "?", "NFC"),
            tokenizer.TiktokenTokenizer(), tokenizer.TiktokenTokenizer("cl100k_base"),
            tokenizer.FileTokenizer(llama().to_str(), "<s>")]
    for tok in made:
        again = tokenizer.from_meta(json.loads(json.dumps({"tokenizer": tok.to_meta()})))
        assert type(again) is type(tok) and again.to_meta() == tok.to_meta()
        assert again.encode("ab\n") == tok.encode("ab\n")
        for name in ("vocab_size", "dtype", "end_of_text", "start"):
            assert getattr(again, name) == getattr(tok, name)
        assert tokenizer.count_ids(tok.to_meta()) == tok.vocab_size
    assert made[2].to_meta() == {"name": "gpt2"}  # as older checkpoints have it
    assert json.loads(made[4].to_meta()["json"]) == json.loads(llama().to_str())  # the file's own


@pytest.mark.parametrize(
    "meta", [{}, {"tokenizer": "gpt2"}, {"tokenizer": {"name": "bpe"}}, {"tokenizer": {"name": "char"}},
             {"tokenizer": {"name": "tokenizers", "json": "{}"}}, {"tokenizer": {"name": ["gpt2"]}}]
)
def test_meta_without_a_tokenizer(meta):
    with pytest.raises(ValueError, match="tokenizer"):
        tokenizer.from_meta(meta)


# ---- tokenizer.json files that do not work -----------------------------------------------------------------

def word_level(vocabulary, end, unknown=None):
    """The text of a tokenizer.json of these words, and "</s>" as the added token of id `end`."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown or "none"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    described = json.loads(made.to_str())
    described["added_tokens"][0]["id"] = end
    return json.dumps(described)


@pytest.mark.parametrize("vocabulary, end", [
    ({"a": 0, "b": 1} | {f"w{i}": i for i in range(3, 99)}, 2), ({"a": 0, "b": 1, "[UNK]": 2}, 10)])
def test_ids_with_gaps_which_the_library_renumbers(vocabulary, end):
    with pytest.raises(ValueError, match=f"changes the id {end} of its token '</s>'"):
        tokenizer.FileTokenizer(word_level(vocabulary, end))


def test_a_word_without_an_id_is_one_sentence():
    tok = tokenizer.FileTokenizer(word_level({"a": 0, "b": 1}, 2))
    assert tok.encode("a b") == [0, 1]
    for encode in (tok.encode, tok.encode_ordinary):
        with pytest.raises(ValueError, match="has no id, and there is no unknown token"):
            encode("a c")


def test_missing_tiktoken_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(OSError, match="pip install"):
        tokenizer.TiktokenTokenizer()
