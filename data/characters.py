"""Datasets of characters: the alphabet of a text, or the newline and printable ASCII."""
import argparse
from pathlib import Path

import numpy as np

from data import common
from data.tokenizer import CHARACTERS, UNKNOWN, CharTokenizer, code_points

MIN_COUNT = {"--min-count": {"type": int, "metavar": "N", "help":
             "characters that occur fewer times become one unknown mark (default: 1, none)"}}


def is_plain(text: str | None) -> bool:
    """Whether a text has characters, and none but the newline and the 95 printable ones of ASCII."""
    return bool(text) and text.isascii() and not text.encode().translate(None, CHARACTERS.encode())


def count_characters(batch: dict) -> dict:
    """{"text": [...]} -> {"code": [...], "count": [...]}: the code points in a batch of texts, and how often
    each occurs."""
    counts = np.zeros(0x110000, np.int64)
    for text in batch["text"]:
        for first in range(0, len(text), size := 1 << 20):
            found = np.bincount(code_points(text[first:first + size]))
            counts[:len(found)] += found
    codes = counts.nonzero()[0]
    return {"code": codes, "count": counts[codes]}


def collect_alphabet(documents, min_count: int, num_proc: int | None) -> tuple[CharTokenizer, dict]:
    """(The vocabulary of a datasets.Dataset of texts in the form NFC, what meta.json says of it); prints how
    many characters it has. A newline follows each text. Raises ValueError if none occurs min_count times."""
    counts = np.zeros(0x110000, np.int64)
    counted = documents.map(count_characters, batched=True, batch_size=common.batch_size(documents),
                            remove_columns=["text"], num_proc=num_proc, desc="counting characters")
    for batch in counted.with_format("numpy").iter(1 << 16):
        np.add.at(counts, batch["code"], batch["count"])
    rare = (0 < counts) & (counts < min_count)
    rare[[ord("\n"), ord(UNKNOWN)]] = False
    kept = (counts >= min_count).nonzero()[0]
    if not len(kept):
        raise ValueError(f"no character occurs {min_count} times: give a smaller --min-count, or more text")
    unknown = UNKNOWN if rare.any() or 0 < counts[ord(UNKNOWN)] < min_count else None
    characters = {*map(chr, kept), "\n", *([unknown] if unknown else ())}
    replaced = int(counts[rare].sum())
    print(f"{counts.sum():,} characters, {len(characters):,} different ones in the vocabulary"
          + (f"; {rare.sum():,} others, which occur fewer than {min_count} times each and {replaced:,} times "
             "in all, become the unknown mark U+FFFD" if rare.any() else ""))
    return (CharTokenizer("".join(sorted(characters)), unknown, "NFC"),
            {"min_count": min_count, "rare_characters": int(rare.sum()), "replaced": replaced})


def write_characters(args: argparse.Namespace, work: Path, plain: bool = False) -> None:
    """Loads the documents and writes them with their own alphabet; or, if `plain`, writes only those that
    consist of the newline and printable ASCII."""
    documents, source = common.load_documents(args, work, nfc=not plain)
    if plain:
        found = len(documents)
        documents = documents.filter(lambda batch: list(map(is_plain, batch["text"])), batched=True,
                                     batch_size=common.batch_size(documents), num_proc=args.num_proc,
                                     desc="leaving out other characters")
        left_out = found - len(documents)
        print(f"{found:,} documents, {left_out:,} left out for a character outside the 96")
        if not documents:
            raise ValueError("every document has a character outside the newline and printable ASCII")
        tokenizer, about = CharTokenizer(CHARACTERS), {"left_out": left_out}
    else:
        tokenizer, about = collect_alphabet(documents, args.min_count or 1, args.num_proc)
    common.write_documents(args, work, documents, tokenizer, source | about)
