"""Text to token ids and back: GPT-2's byte-pair encoding, or one id per character.

A tokenizer describes itself as a JSON object, to_meta(); data/<name>/meta.json and every checkpoint hold that object
under "tokenizer", and from_meta() makes the tokenizer again.
"""

import codecs

# The newline and the 95 printable ASCII characters; a character's id is its place here.
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))


class Decoder:
    """Decodes one token at a time, for text that is shown while it is made.

    A token may end inside a UTF-8 character: its bytes wait for the tokens that complete it, so that no call returns
    half a character. Bytes that can never be UTF-8 come out as U+FFFD.
    """

    def __init__(self, token_bytes):
        self.token_bytes = token_bytes  # id -> bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token):
        """Returns the text that this id completes, often "" in the middle of a character."""
        return self.utf8.decode(self.token_bytes(token))

    def flush(self):
        """Returns what a character that was never completed becomes: U+FFFD, or "" if nothing waits."""
        return self.utf8.decode(b"", final=True)


class CharTokenizer:
    """One id per character of `chars`, in their order."""

    def __init__(self, chars):
        if not chars or len(set(chars)) != len(chars):
            raise ValueError(f"a character vocabulary needs distinct characters, at least one, and got {chars!r}")
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}
        self.vocab_size = len(chars)

    def encode(self, text):
        """Returns the ids of `text` as a list; raises ValueError at a character outside the vocabulary."""
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            raise ValueError(
                f"the character {error.args[0]!r} is not among the {self.vocab_size} of this vocabulary"
            ) from None

    def decode(self, ids):
        return "".join(self._char(i) for i in ids)

    def decoder(self):
        return Decoder(lambda i: self._char(i).encode("utf-8"))

    def to_meta(self):
        return {"name": "char", "characters": self.chars}

    def _char(self, i):
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size} characters")
        return self.chars[i]


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken, which downloads the vocabulary at first use.

    Raises OSError if the vocabulary is neither cached nor to be had.
    """

    vocab_size = 50257
    end_of_text = 50256

    def __init__(self):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise OSError(
                f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}): connect to the network once, or "
                "set TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it"
            ) from error

    def encode(self, text):
        """Returns the ids of a prompt as a list; `<|endoftext|>` in it is the end-of-text token."""
        return self.bpe.encode(text, allowed_special={"<|endoftext|>"})

    def encode_ordinary(self, text):
        """Returns the ids of a document as a list; `<|endoftext|>` in it is text like any other."""
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):
        ids = list(ids)
        for i in ids:
            self._check(i)
        return self.bpe.decode(ids)

    def decoder(self):
        return Decoder(self._bytes)

    def to_meta(self):
        return {"name": "gpt2"}

    def _bytes(self, i):
        self._check(i)
        return self.bpe.decode_single_token_bytes(i)

    def _check(self, i):
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is outside GPT-2's vocabulary of {self.vocab_size}")


def from_meta(meta):
    """Returns the tokenizer that meta["tokenizer"] describes; raises ValueError if it describes none."""
    described = meta.get("tokenizer")
    name = described.get("name") if isinstance(described, dict) else None
    if name == "gpt2":
        return Gpt2Tokenizer()
    if name == "char" and isinstance(described.get("characters"), str):
        return CharTokenizer(described["characters"])
    raise ValueError(f'the tokenizer {described!r} is neither {{"name": "gpt2"}} nor a "char" one with its characters')


def print_tokens(tokenizer, tokens):
    """Prints the text of tokens, tensors of one id each, as they come; then the end of the line."""
    decode = tokenizer.decoder()
    for token in tokens:
        print(decode(token.item()), end="", flush=True)
    print(decode.flush())
