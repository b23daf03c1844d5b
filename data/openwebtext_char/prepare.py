"""OpenWebText by characters: the newline and the 95 printable ASCII characters, 96 in all.

Documents with any other character are left out; a newline follows each document that is kept.

    python data/openwebtext_char/prepare.py                      about 24 GB to download
    python data/openwebtext_char/prepare.py --source my.jsonl    local files in its place
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402

from data import common  # noqa: E402
from data.tokenizer import CHARACTERS, CharTokenizer  # noqa: E402


def is_plain(batch):
    return [bool(text) and common.character_ids(text) is not None for text in batch["text"]]


def encode(batch):
    return {"ids": [np.frombuffer(common.character_ids(text + "\n"), np.uint8) for text in batch["text"]]}


def main():
    args = common.parse_arguments(__doc__, HERE, val_fraction=0.0005, num_proc=True)
    with common.work_folder(args.out_dir) as work:
        documents, source = common.load_documents(args, work)
        plain = documents.filter(is_plain, batched=True, num_proc=args.num_proc,
                                 desc="leaving out other characters")
        left_out = len(documents) - len(plain)
        print(f"{len(documents):,} documents, {left_out:,} left out for a character outside the 96")
        if not plain:
            raise ValueError("every document has a character outside the newline and printable ASCII")
        tokenizer = CharTokenizer(CHARACTERS)
        common.write_documents(args, work, plain, tokenizer, encode, source | {"left_out": left_out})


if __name__ == "__main__":
    common.run(main)
