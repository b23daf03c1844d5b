"""Adopt a folder of nanoGPT's, train.bin and val.bin of 16-bit token ids, by adding a meta.json.

    python data/adopt.py FOLDER                          GPT-2's vocabulary, or the characters of its meta.pkl
    python data/adopt.py FOLDER --tokenizer gpt2         says so, whatever the ids look like
    python data/adopt.py FOLDER --tokenizer my.json --dtype uint32

Every id is checked against the vocabulary. The .bin files stay as they are. meta.pkl is read as data: one
that would run code is refused.
"""
import argparse
import hashlib
import json
import pickle
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data import common  # noqa: E402
from data.tokenizer import TIKTOKEN, CharTokenizer, count_ids, from_name  # noqa: E402
from lib.files import write_whole  # noqa: E402


class DataUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers and strings. Nothing that could be called can be named."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is code")


def read_characters(path: Path) -> CharTokenizer:
    """The vocabulary of nanoGPT's meta.pkl, {"itos": {id: character}, ...}. Raises ValueError if it is none,
    or would run code."""
    try:
        with open(path, "rb") as file:
            itos = DataUnpickler(file).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
        if any(len(character) != 1 for character in characters):
            raise ValueError("its tokens are not single characters")
        return CharTokenizer("".join(characters))
    except OSError:
        raise
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(f"{path} holds no vocabulary of characters ({type(error).__name__}: {error}): name "
                         "the vocabulary with --tokenizer") from error


def describe_vocabulary(args: argparse.Namespace, folder: Path, largest: int) -> dict:
    """The tokenizer's object for meta.json. Raises ValueError if none is known, or if `largest`, the
    largest id, is not below its size."""
    if args.tokenizer in TIKTOKEN and not args.end_of_text:
        described = {"name": args.tokenizer}  # no vocabulary needs to be downloaded
    elif args.tokenizer:
        described = from_name(args.tokenizer, args.end_of_text).to_meta()
    elif (folder / "meta.pkl").exists():
        described = read_characters(folder / "meta.pkl").to_meta()
    elif largest < 256:
        raise ValueError(f"the largest id in {folder} is {largest}, far from GPT-2's: name the vocabulary "
                         "with --tokenizer")
    else:
        described = {"name": "gpt2"}
    if largest >= count_ids(described):
        raise ValueError(f"the largest id in {folder} is {largest}, but the vocabulary ends at "
                         f"{count_ids(described) - 1}: name another with --tokenizer, or another --dtype")
    return described


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           allow_abbrev=False)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="that of train.bin and val.bin: a path, or a name under data/")
    add("--tokenizer", metavar="NAME", help=f"{', '.join(TIKTOKEN)}, or the path of a tokenizer.json of the "
        "library tokenizers (default: meta.pkl's characters, or gpt2)")
    add("--end-of-text", metavar="TOKEN", help="the token of a tokenizer.json that ends a document")
    add("--dtype", choices=list(common.DTYPES), default="uint16", help="of the ids (default: uint16)")
    args = parser.parse_args()
    if args.end_of_text and not args.tokenizer:
        parser.error("--end-of-text belongs to --tokenizer, which is not given")
    folder = Path(common.find_dataset(args.folder))
    with common.work_folder(folder):  # no prepare.py writes there meanwhile
        adopt(folder, args)


def adopt(folder: Path, args: argparse.Namespace) -> None:
    """Checks all ids, and writes meta.json. Raises ValueError where something does not fit."""
    if (folder / "meta.json").exists():
        raise ValueError(f"{folder} has a meta.json already: remove it to write another")

    counts, source, largest = {}, {"adopted": "nanoGPT"}, -1
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        try:
            tokens = common.TokenFile(path, common.DTYPES[args.dtype])
        except FileNotFoundError:
            raise ValueError(f"{folder} has no {path.name}: name a folder that has it") from None
        except ValueError as error:
            raise ValueError(f"{path} cannot be used ({error})") from error
        if args.dtype == "uint16" and len(tokens) >= 64 and not tokens[1:1_000_000:2].any():
            raise ValueError(f"{path} looks like ids of 32 bits, since every second one of 16 is 0: give "
                             "--dtype=uint32")
        counts[f"{split}_tokens"], largest = len(tokens), max(largest, common.largest_id(tokens))
        with open(path, "rb") as file:
            source[f"{split}_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    described = describe_vocabulary(args, folder, largest)
    if count_ids(described) > 2 ** (8 * common.DTYPES[args.dtype].itemsize):
        raise ValueError(f"the vocabulary {described['name']} has {count_ids(described):,} tokens, more than "
                         f"ids of type {args.dtype} can tell apart: give a wider --dtype")
    meta = {"tokenizer": described, "vocab_size": count_ids(described), "dtype": args.dtype, **counts,
            "source": source}
    write_whole(str(folder / "meta.json"), json.dumps(meta, indent=2))
    print(f"{counts['train_tokens']:,} training and {counts['val_tokens']:,} validation tokens, largest id "
          f"{largest:,}, vocabulary {described['name']} of {meta['vocab_size']:,}")
    print(f"wrote {folder / 'meta.json'}")


if __name__ == "__main__":
    common.run(main)
