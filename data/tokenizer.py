"""Text to token ids and back: one id per character, tiktoken's encodings, or a file of Hugging Face's library
`tokenizers`.

Every tokenizer has
    vocab_size      ids are below it
    dtype           of the ids on the disk: the smallest of uint8, uint16 and uint32
    end_of_text     the id that ends a document, or None
    start           the id after which a new text begins: end_of_text, or else the newline's, or else 0
    encode(text)    -> ids of a prompt, in which the special tokens' names are special tokens
    encode_ordinary(text) -> ids of a document, in which they are text like any other: an array of that dtype
    decode(ids)     -> the text of ids. ValueError if one is outside the vocabulary
    decoder(after)  -> a function of one id at a time; `after` are the ids that come before the first
    to_meta()       -> a JSON object that describes it

meta.json and every checkpoint hold that object under "tokenizer", and from_meta() makes the tokenizer of it.
"""
import codecs
import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

# The newline and the 95 printable ASCII characters; a character's id is its place here.
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
UNKNOWN = "\ufffd"  # stands for characters that are not in a vocabulary, and for bytes that are not UTF-8

# tiktoken's encodings and the numbers of their ids, so that no vocabulary is needed to check a dataset
TIKTOKEN = {"gpt2": 50257, "r50k_base": 50257, "p50k_base": 50281, "p50k_edit": 50284, "cl100k_base": 100277,
            "o200k_base": 200019, "o200k_harmony": 201088}
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|end▁of▁sentence|>")
PIECE = 1 << 20  # characters of a document that are encoded at once
LINE_END = re.compile(r"\S\s{0,9}\n(?=\S)")


def smallest_dtype(vocab_size: int) -> str:
    """The smallest unsigned type that holds the ids of a vocabulary."""
    return next(f"uint{bits}" for bits in (8, 16, 32) if vocab_size <= 2 ** bits)


def without_half_characters(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs. JSON and command lines may hold them, UTF-8 does
    not."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_in_pieces(encode: Callable[[str], list[int]], text: str, dtype: str) -> np.ndarray:
    """Returns encode(text) as an array. A text of more than PIECE characters is encoded in pieces, since the
    libraries take up to 160 bytes for each character that they encode at once."""
    places = itertools.pairwise([0, *find_cuts(encode, text), len(text)])
    return np.concatenate([np.array(encode(text[first:last]), dtype) for first, last in places])


def find_cuts(encode: Callable[[str], list[int]], text: str) -> Iterator[int]:
    """Yields places, about PIECE characters from each other, where a text can be cut so that the ids of its
    parts are those of the whole: beside a line end where this is true of the 200 characters before and after.
    There is none for a vocabulary that puts a space before each text."""
    place = PIECE
    while line_end := LINE_END.search(text, place):
        place = line_end.end()
        for cut in (place, place - 1):  # after it, or before
            left, right = text[max(0, cut - 200):cut], text[cut:cut + 200]
            if encode(left + right) == encode(left) + encode(right):
                yield cut
                place += PIECE
                break
        else:
            place += PIECE // 128


def cut_blanks(text: str) -> list[str]:
    """Returns the parts of a text that is cut where more than 100,000 blanks follow each other."""
    places = [0]
    if re.search(r"\s{99}", text[::1000]):  # takes a thousandth of the time
        for blanks in re.finditer(r"(?<!\s)\s{100001,}", text):
            places += range(blanks.start() + 100_000, blanks.end(), 100_000)
    return [text[first:last] for first, last in itertools.pairwise([*places, len(text)])]


class Decoder:
    """Decodes one token at a time, for text that is printed while it is generated.

    A token may end inside a UTF-8 character. Its bytes are then kept until the next tokens complete the
    character. Bytes that can never be UTF-8 come out as U+FFFD.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self.token_bytes = token_bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: int) -> str:
        """Returns the characters that this id completes: often "", in the middle of a character."""
        return self.utf8.decode(self.token_bytes(token))

    def flush(self) -> str:
        """Returns U+FFFD if the last character is incomplete, else ""."""
        return self.utf8.decode(b"", final=True)


class PrefixDecoder:
    """Like Decoder, for tokens whose text depends on the tokens before them: a call returns what its token
    adds to the text.

    decode   ids -> text
    after    the ids that come before the first: their text is not given again
    pending  ids whose text may still change, until one that is not among them follows
    """

    def __init__(self, decode: Callable[[list[int]], str], after: Sequence[int], pending: set[int]):
        self.decode, self.pending = decode, pending
        self.ids, self.given = list(after), len(decode(list(after)))

    def __call__(self, token: int) -> str:
        self.ids.append(token)
        text = self.decode(self.ids)
        # the library decodes an unfinished character to U+FFFD
        end = self.given if token in self.pending else max(self.given, len(text.rstrip(UNKNOWN)))
        piece, self.given = text[self.given:end], end
        if end == len(text) and token not in self.pending and (alone := self.decode([token])):
            self.ids, self.given = [token], len(alone)  # so that each call takes the same time
        return piece

    def flush(self) -> str:
        """Returns the text that was kept back, because more tokens could have changed it."""
        return self.decode(self.ids)[self.given:]


class CharTokenizer:
    """One id per character of `chars`, in their order.

    unknown        the one of them that stands for all other characters; None: there is none
    normalization  the Unicode form that texts are brought into, such as NFC; None: they are taken as they are

    Raises ValueError if the characters are not distinct.
    """

    end_of_text = None

    def __init__(self, chars: str, unknown: str | None = None, normalization: str | None = None):
        if not chars or len(set(chars)) != len(chars):
            raise ValueError(f"a character vocabulary needs distinct characters, at least one; got {chars!r}")
        if unknown is not None and (len(unknown) != 1 or unknown not in chars):
            raise ValueError(f"the unknown mark {unknown!r} is not one of the characters")
        self.chars, self.unknown, self.normalization = chars, unknown, normalization
        self.ids = {char: i for i, char in enumerate(chars)}
        self.vocab_size, self.dtype = len(chars), smallest_dtype(len(chars))
        self.unknown_id = self.ids.get(unknown)
        self.start = self.ids.get("\n", 0)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text. Raises ValueError if a character is not in the vocabulary, and there is
        no unknown mark."""
        return self.encode_ordinary(text).tolist()

    def encode_ordinary(self, text: str) -> np.ndarray:
        """As encode, but an array of the type `dtype`."""
        if self.normalization:
            text = unicodedata.normalize(self.normalization, text)
        ids = np.empty(len(text), self.dtype)
        for first in range(0, len(text), size := 1 << 20):  # a text may fill much of the memory
            part = self.table[code_points(text[first:first + size])]
            if part.min() < 0:
                char = text[first + int(part.argmin())]
                raise ValueError(f"the character {char!r} is not in the vocabulary of {self.vocab_size}")
            ids[first:first + size] = part
        return ids

    @functools.cached_property
    def table(self) -> np.ndarray:
        """The id of every code point, (0x110000,) int32; -1 for those that have none."""
        table = np.full(0x110000, self.ids.get(self.unknown, -1), np.int32)
        table[code_points(self.chars)] = np.arange(self.vocab_size)
        return table

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids. Raises ValueError if one is outside the vocabulary."""
        return "".join(self._char(i) for i in ids)

    def decoder(self, after: Sequence[int] = ()) -> Decoder:
        return Decoder(lambda i: self._char(i).encode("utf-8"))

    def to_meta(self) -> dict:
        meta = {"name": "char", "characters": self.chars, "unknown": self.unknown,
                "normalization": self.normalization}
        return {key: value for key, value in meta.items() if value is not None}

    def _char(self, i: int) -> str:
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size} characters")
        return self.chars[i]


def code_points(text: str) -> np.ndarray:
    """The code points of a text, one uint32 each."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class TiktokenTokenizer:
    """An encoding of TIKTOKEN: byte pairs by tiktoken, which downloads the vocabulary when it is first used.

    Raises OSError if the vocabulary is not cached and cannot be downloaded.
    """

    def __init__(self, name: str = "gpt2"):
        try:
            import tiktoken
        except ImportError as error:
            raise OSError("this tokenizer needs tiktoken: pip install -r requirements.txt") from error
        try:
            self.bpe = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:
            raise OSError(f"the vocabulary {name} could not be downloaded ({type(error).__name__}): connect "
                          "to the network once, or set TIKTOKEN_CACHE_DIR to tiktoken's cache") from error
        self.name, self.vocab_size, self.dtype = name, self.bpe.n_vocab, smallest_dtype(self.bpe.n_vocab)
        self.end_of_text = self.start = self.bpe.eot_token
        self.unknown_id = None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a prompt: "<|endoftext|>" in it is the end-of-text token."""
        return self._encode(self.bpe.encode, text, allowed_special={"<|endoftext|>"}, disallowed_special=())

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Returns the ids of a document: "<|endoftext|>" in it is text like any other."""
        encode = functools.partial(self._encode, self.bpe.encode_ordinary)
        return encode_in_pieces(encode, text, self.dtype)

    def _encode(self, encode: Callable, text: str, **options) -> list[int]:
        parts = cut_blanks(text)  # tiktoken panics at a million blanks
        return list(itertools.chain.from_iterable(encode(part, **options) for part in parts))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids. Raises ValueError if one is outside the vocabulary."""
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def decoder(self, after: Sequence[int] = ()) -> Decoder:
        return Decoder(self._bytes)

    def to_meta(self) -> dict:
        return {"name": self.name}

    def _bytes(self, i: int) -> bytes:
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary {self.name} of {self.vocab_size}")
        try:
            return self.bpe.decode_single_token_bytes(i)
        except KeyError:  # cl100k_base and o200k_base skip some ids, which a new model may choose
            return UNKNOWN.encode()


class FileTokenizer:
    """A tokenizer.json of the library `tokenizers`, given as its text.

    end_of_text  the name of the token that ends a document, or its id; None: the first of END_OF_TEXT in it

    Raises ValueError if the text describes no tokenizer, or has no such token, and OSError if the library is
    not installed.
    """

    def __init__(self, text: str, end_of_text: str | int | None = None):
        try:
            from tokenizers import Tokenizer
            from tokenizers.pre_tokenizers import ByteLevel
        except ImportError as error:
            raise OSError("this tokenizer needs the library tokenizers: pip install -r "
                          "requirements-transformers.txt") from error
        try:
            self.tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"it is no file of the library tokenizers ({error})") from error
        self.tokenizer.no_truncation()  # a file may say that texts are cut at 512 tokens
        self.tokenizer.no_padding()
        self.text, vocabulary = text, self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self.dtype = smallest_dtype(self.vocab_size)
        names = END_OF_TEXT if end_of_text is None else (end_of_text,)
        found = [vocabulary[name] for name in names if name in vocabulary]
        if not found and end_of_text not in vocabulary.values():
            raise ValueError(f"its vocabulary has no token {' or '.join(map(str, names))}: name the one that "
                             "ends a text with --end-of-text")
        self.end_of_text = self.start = found[0] if found else end_of_text
        file = json.loads(text)
        for token in file.get("added_tokens") or ():  # after a gap in the ids the library renumbers them
            if vocabulary.get(token["content"]) != token["id"]:
                raise ValueError(f"the library tokenizers changes the id {token['id']} of its token "
                                 f"{token['content']!r}: number its vocabulary without gaps")
        described = file.get("model") or {}  # Unigram has unk_id, others unk_token
        self.unknown_id = vocabulary.get(described.get("unk_token"), described.get("unk_id"))
        # One byte outside of any character turns all bytes next to it into U+FFFD.
        self.bytes = {i for name, i in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", name)}
        has_bytes = described.get("byte_fallback") and len(self.bytes) == 256 or (
            "ByteLevel" in f"{file.get('normalizer')} {file.get('pre_tokenizer')}"
            and vocabulary.keys() >= set(ByteLevel.alphabet()))
        # byte pairs leave out what they do not know, others have no ids for the whole text
        self.drops = "merges" in described and self.unknown_id is None and not has_bytes

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a prompt: the names of special tokens in it are those tokens."""
        return self._encode(text, special_as_text=False)

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Returns the ids of a document: the names of special tokens in it are text like any other."""
        encode = functools.partial(self._encode, special_as_text=True)
        return encode_in_pieces(encode, text, self.dtype)

    def count_lost(self, text: str, ids: np.ndarray) -> int:
        """Returns how many of a document's ids are the unknown token; if there is none, how many of its
        characters, not counting blanks, are left out."""
        lost = 0 if self.unknown_id is None else np.count_nonzero(ids == self.unknown_id)
        for first in range(0, len(text) if self.drops else 0, PIECE):
            part = text[first:first + PIECE]
            places = np.array(self._encoding(part, special_as_text=True).offsets, int).reshape(-1, 2)
            begun, ended = (np.bincount(column, minlength=len(part) + 1) for column in places.T)
            outside = np.flatnonzero((begun - ended).cumsum()[:-1] == 0)
            lost += sum(not part[place].isspace() for place in outside)
        return lost

    def _encode(self, text: str, special_as_text: bool) -> list[int]:
        return self._encoding(text, special_as_text).ids

    def _encoding(self, text: str, special_as_text: bool):
        self.tokenizer.encode_special_tokens = special_as_text
        try:
            return self.tokenizer.encode(without_half_characters(text), add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"a part of it has no id, and there is no unknown token ({error})") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids. Raises ValueError if one is outside the vocabulary."""
        ids = list(ids)
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary of {self.vocab_size}")
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def decoder(self, after: Sequence[int] = ()) -> PrefixDecoder:
        return PrefixDecoder(self.decode, after, self.bytes)

    def to_meta(self) -> dict:
        return {"name": "tokenizers", "json": self.text, "end_of_text": self.end_of_text}


Tokenizer = CharTokenizer | TiktokenTokenizer | FileTokenizer


def from_name(name: str, end_of_text: str | None = None) -> Tokenizer:
    """Returns the tokenizer of an encoding of tiktoken, or of a tokenizer.json at the path `name`, whose
    end-of-text token may be named. Raises ValueError if it is neither, and OSError if it cannot be loaded."""
    if name in TIKTOKEN and end_of_text is None:
        return TiktokenTokenizer(name)
    if name in TIKTOKEN:
        raise ValueError(f"the encoding {name} has an end-of-text token of its own: leave out --end-of-text")
    if not name.lower().endswith(".json"):
        raise ValueError(f"the tokenizer {name!r} is none of {', '.join(TIKTOKEN)}, nor the path of a "
                         "tokenizer.json of the library tokenizers")
    try:
        return FileTokenizer(Path(name).read_text(encoding="utf-8"), end_of_text)
    except OSError as error:
        raise ValueError(f"the tokenizer {name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def from_meta(meta: dict) -> Tokenizer:
    """Returns the tokenizer that meta["tokenizer"] describes. Raises ValueError if it describes none."""
    match meta.get("tokenizer"):
        case {"name": "char", "characters": str(characters), **options}:
            return CharTokenizer(characters, options.get("unknown"), options.get("normalization"))
        case {"name": "tokenizers", "json": str(text), "end_of_text": int(end_of_text)}:
            return FileTokenizer(text, end_of_text)
        case {"name": str(name)} if name in TIKTOKEN:
            return TiktokenTokenizer(name)
        case other:
            raise ValueError(f"the tokenizer {str(other)[:200]} is neither char with its characters, nor an "
                             f"encoding of tiktoken, nor a file of the library tokenizers")


def count_ids(described: dict) -> int:
    """Returns the vocab_size of the tokenizer that an object of to_meta() describes, without a vocabulary or
    the library tokenizers. Raises ValueError, KeyError, TypeError or AttributeError if it describes none."""
    if described["name"] == "char":
        if not isinstance(characters := described["characters"], str):
            raise TypeError(f"characters must be a text; got {str(characters)[:200]}")
        return CharTokenizer(characters, described.get("unknown"), described.get("normalization")).vocab_size
    if described["name"] != "tokenizers":
        return TIKTOKEN[described["name"]]
    file = json.loads(described["json"])
    vocabulary = file["model"]["vocab"]  # {token: id}, or a list of [token, score]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    count = 1 + max([*ids, *(token["id"] for token in file.get("added_tokens") or ())])
    if not 0 <= described["end_of_text"] < count:
        raise ValueError(f"its end of text, {described['end_of_text']}, is none of its {count} tokens")
    return count


def print_tokens(tokenizer: Tokenizer, tokens) -> None:
    """Prints the text of tokens, tensors of one id each, as they come; then the end of the line."""
    decode = tokenizer.decoder()
    for token in tokens:
        print(decode(token.item()), end="", flush=True)
    print(decode.flush())
