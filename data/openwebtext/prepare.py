"""OpenWebText in GPT-2's byte-pair encoding, an end-of-text token after each document.

    python data/openwebtext/prepare.py                      about 24 GB to download, 18 GB of tokens
    python data/openwebtext/prepare.py --source my.jsonl    local files in its place
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data import common  # noqa: E402
from data.tokenizer import TiktokenTokenizer  # noqa: E402


def encode(batch):
    tokenizer = TiktokenTokenizer()  # tiktoken loads the vocabulary once in each process
    return {"ids": [tokenizer.encode_ordinary(text) + [tokenizer.end_of_text] for text in batch["text"]]}


def main():
    args = common.parse_arguments(__doc__, HERE, val_fraction=0.0005, num_proc=True)
    tokenizer = TiktokenTokenizer()  # before the documents: without a vocabulary there is no use in loading them
    with common.work_folder(args.out_dir) as work:
        documents, source = common.load_documents(args, work)
        common.write_documents(args, work, documents, tokenizer, encode, source)


if __name__ == "__main__":
    common.run(main)
