"""Text to token ids and back: GPT-2's byte-pair encoding, or one id per character.

A tokenizer describes itself as a JSON object, to_meta(). meta.json and every checkpoint hold that object
under "tokenizer", and from_meta() makes the tokenizer from it.
"""
import codecs
from collections.abc import Callable, Iterable

# The newline and the 95 printable ASCII characters; a character's id is its place here.
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))


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


class CharTokenizer:
    """One id per character of `chars`, in their order. Raises ValueError if they are not distinct."""

    dtype = "uint8"  # of the ids on the disk

    def __init__(self, chars: str):
        if not chars or len(set(chars)) != len(chars):
            raise ValueError(f"a character vocabulary needs distinct characters, at least one; got {chars!r}")
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}
        self.vocab_size = len(chars)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text. Raises ValueError if a character is not in the vocabulary."""
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            raise ValueError(f"the character {error} is not in the vocabulary of {self.vocab_size}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids. Raises ValueError if one is outside the vocabulary."""
        return "".join(self._char(i) for i in ids)

    def decoder(self) -> Decoder:
        return Decoder(lambda i: self._char(i).encode("utf-8"))

    def to_meta(self) -> dict:
        return {"name": "char", "characters": self.chars}

    def _char(self, i: int) -> str:
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size} characters")
        return self.chars[i]


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken, which downloads the vocabulary when it is first used.

    Raises OSError if the vocabulary is not cached and cannot be downloaded.
    """

    dtype = "uint16"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise OSError(f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}): connect to "
                          "the network once, or set TIKTOKEN_CACHE_DIR to tiktoken's cache") from error

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a prompt: "<|endoftext|>" in it is the end-of-text token."""
        return self.bpe.encode(text, allowed_special={"<|endoftext|>"})

    def encode_ordinary(self, text: str) -> list[int]:
        """Returns the ids of a document: "<|endoftext|>" in it is text like any other."""
        return self.bpe.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids. Raises ValueError if one is outside the vocabulary."""
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def decoder(self) -> Decoder:
        return Decoder(self._bytes)

    def to_meta(self) -> dict:
        return {"name": "gpt2"}

    def _bytes(self, i: int) -> bytes:
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is outside GPT-2's vocabulary of {self.vocab_size}")
        return self.bpe.decode_single_token_bytes(i)


def from_meta(meta: dict) -> CharTokenizer | Gpt2Tokenizer:
    """Returns the tokenizer that meta["tokenizer"] describes. Raises ValueError if it describes none."""
    described = meta.get("tokenizer")
    name = described.get("name") if isinstance(described, dict) else None
    if name == "gpt2":
        return Gpt2Tokenizer()
    if name == "char" and isinstance(described.get("characters"), str):
        return CharTokenizer(described["characters"])
    raise ValueError(f"the tokenizer {described!r} is neither gpt2 nor char with its characters")


def print_tokens(tokenizer: CharTokenizer | Gpt2Tokenizer, tokens) -> None:
    """Prints the text of tokens, tensors of one id each, as they come; then the end of the line."""
    decode = tokenizer.decoder()
    for token in tokens:
        print(decode(token.item()), end="", flush=True)
    print(decode.flush())
