"""data/tokenizer.py: characters and GPT-2's vocabulary, there and back."""
import json
import random

import pytest

from data import tokenizer

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
    assert gpt2.encode("Hello world") == gpt2.encode_ordinary("Hello world") == [15496, 995]
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


def test_meta_round_trip(tiktoken_cache):
    for made in (tokenizer.CharTokenizer("ab\n"), tokenizer.TiktokenTokenizer()):
        again = tokenizer.from_meta(json.loads(json.dumps({"tokenizer": made.to_meta()})))
        assert type(again) is type(made) and again.to_meta() == made.to_meta()
        assert again.encode("ab\n") == made.encode("ab\n")


@pytest.mark.parametrize(
    "meta", [{}, {"tokenizer": "gpt2"}, {"tokenizer": {"name": "bpe"}}, {"tokenizer": {"name": "char"}}]
)
def test_meta_without_a_tokenizer(meta):
    with pytest.raises(ValueError, match="tokenizer"):
        tokenizer.from_meta(meta)
