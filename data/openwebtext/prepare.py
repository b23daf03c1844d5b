"""OpenWebText in byte pairs, an end-of-text token after each document.

    python data/openwebtext/prepare.py                      about 24 GB to download, 18 GB of tokens
    python data/openwebtext/prepare.py --source my.jsonl    local files in its place
    python data/openwebtext/prepare.py --dataset HuggingFaceFW/fineweb-edu --config sample-10BT \\
        --tokenizer o200k_base                              another dataset, another vocabulary
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data import common  # noqa: E402
from data.tokenizer import TIKTOKEN, from_name  # noqa: E402


def main():
    vocabulary = {
        "--tokenizer": {"default": "gpt2", "metavar": "NAME", "help":
                        f"{', '.join(TIKTOKEN)}, or the path of a tokenizer.json of the library tokenizers"},
        "--end-of-text": {"metavar": "TOKEN", "help": "the token of a tokenizer.json that ends a document"}}
    args = common.parse_arguments(__doc__, HERE, val_fraction=0.0005, more=vocabulary)
    # before the documents: without a vocabulary there is no use in loading them
    tokenizer = from_name(args.tokenizer, args.end_of_text)
    with common.work_folder(args.out_dir) as work:
        documents, source = common.load_documents(args, work)
        common.write_documents(args, work, documents, tokenizer, source)


if __name__ == "__main__":
    common.run(main)
