"""The running Python's own standard library, by characters: a corpus that needs no download.

10 to 11 million characters of the newline and printable ASCII (96 in all), without the library's tests. A
file with any other character (a tab, an accent) is left out; a newline follows each file.

    python data/python_char/prepare.py
    python data/python_char/prepare.py --source my.txt    local files in its place, as data/chars/prepare.py
"""
import hashlib
import os
import platform
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data import common  # noqa: E402
from data.characters import MIN_COUNT, is_plain, write_characters  # noqa: E402
from data.tokenizer import CHARACTERS, CharTokenizer  # noqa: E402

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # made when Python is built: they describe that machine
FEWEST_CHARACTERS = 1_000_000


def library_files(library):
    """Yields (path in the library, text) of the standard library's source files, with \\n line ends."""
    for folder, folders, names in os.walk(library):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith(SKIPPED_PREFIXES)]
        for name in names:
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES):
                path = Path(folder, name)
                text = path.read_bytes().decode("latin-1").replace("\r\n", "\n")
                yield path.relative_to(library).as_posix(), text


def split_files(texts, val_fraction):
    """Splits {name: text} by whole files, so that about val_fraction of the characters are for validation.

    Files are taken in the order of their names' hashes; one that would exceed the share is passed over.
    """
    wanted = val_fraction * sum(map(len, texts.values()))
    held_out, taken = set(), 0
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode("utf-8")).digest()):
        if taken + len(texts[name]) <= wanted:
            held_out.add(name)
            taken += len(texts[name])
    return {"train": [text for name, text in texts.items() if name not in held_out],
            "val": [text for name, text in texts.items() if name in held_out]}


def write_library(args, work):
    source = {"library": "Python standard library", "python": platform.python_version()}
    common.check_out_dir(args.out_dir, source)
    library = sysconfig.get_path("stdlib")
    texts = {name: text for name, text in sorted(library_files(Path(library))) if text}
    kept = {name: text for name, text in texts.items() if is_plain(text)}
    left_out, characters = len(texts) - len(kept), sum(map(len, kept.values()))
    print(f"Python {platform.python_version()}: {len(kept):,} files of {characters:,} characters; "
          f"{left_out:,} left out")
    if characters < FEWEST_CHARACTERS:
        raise ValueError(f"this Python's standard library has only {characters:,} characters in {library}: "
                         "use a full Python, or give text with --source")
    tokenizer = CharTokenizer(CHARACTERS)
    splits = {split: (tokenizer.encode_ordinary(text + "\n") for text in files)
              for split, files in split_files(kept, args.val_fraction).items()}
    source |= {"documents": len(kept), "left_out": left_out, "val_fraction": args.val_fraction}
    common.write_dataset(args.out_dir, work, tokenizer, splits, source)


def main():
    args = common.parse_arguments(__doc__, HERE, more=MIN_COUNT)
    with common.work_folder(args.out_dir) as work:
        if args.source or args.dataset:
            write_characters(args, work)
        else:
            write_library(args, work)


if __name__ == "__main__":
    common.run(main)
