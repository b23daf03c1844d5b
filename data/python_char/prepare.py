"""The running Python's own standard library, by characters: a corpus that needs no download.

10 to 11 million characters of the newline and printable ASCII (96 in all), tests left out. A file with any other
character (a tab, an accent) is left out; a newline follows each file.

    python data/python_char/prepare.py
    python data/python_char/prepare.py --source my.txt    local files in its place
"""

import hashlib
import os
import platform
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402

from data import common  # noqa: E402
from data.tokenizer import CHARACTERS, CharTokenizer  # noqa: E402

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Made when Python is built; they describe the machine that built it.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
FEWEST_CHARACTERS = 1_000_000


def library_files():
    """Yields (path relative to the library, bytes with \\n line ends) of the standard library's source files."""
    library = Path(sysconfig.get_path("stdlib"))
    for folder, folders, names in os.walk(library):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith(SKIPPED_PREFIXES)]
        for name in names:
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES):
                path = Path(folder, name)
                yield path.relative_to(library).as_posix(), path.read_bytes().replace(b"\r\n", b"\n")


def split_files(files, val_fraction):
    """Splits {name: ids} by whole files, so that about val_fraction of the characters are for validation.

    Files are taken in the order of their names' hashes, those passed over that would be too much.
    """
    if len(files) == 1:
        [ids] = files.values()
        train, val = common.cut(ids, val_fraction)
        return {"train": [train], "val": [val]}
    wanted = val_fraction * sum(map(len, files.values()))
    held_out, taken = set(), 0
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode("utf-8")).digest()):
        if taken + len(files[name]) <= wanted:
            held_out.add(name)
            taken += len(files[name])
    held_out = held_out or {min(files, key=lambda name: (len(files[name]), name))}
    return {
        "train": [ids for name, ids in files.items() if name not in held_out],
        "val": [ids for name, ids in files.items() if name in held_out],
    }


def main():
    args = common.parse_arguments(__doc__, HERE, val_fraction=0.05, num_proc=False)
    if args.source:
        found = common.find_files(args.source)
        texts = list(common.read_documents(found, args.text_field))
        source = {"paths": args.source, "files": len(found)}
    else:
        texts = sorted(library_files())
        source = {"library": "Python standard library", "python": platform.python_version()}

    ids = [(name, common.character_ids(text)) for name, text in texts if text]
    kept = {f"{i}:{name}" if args.source else name: data for i, (name, data) in enumerate(ids) if data is not None}
    left_out = len(ids) - len(kept)
    characters = sum(map(len, kept.values()))
    print(
        f"Python {platform.python_version()}: {len(kept):,} files of {characters:,} characters; {left_out:,} left out"
    )
    if not kept:
        raise ValueError("the source holds no text made of the newline and printable ASCII alone")
    if not args.source and characters < FEWEST_CHARACTERS:
        raise ValueError(
            f"this Python's standard library has only {characters:,} characters of source in "
            f"{sysconfig.get_path('stdlib')}: use a full Python, or give text with --source"
        )

    newline = CHARACTERS.index("\n")
    splits = {
        split: (np.frombuffer(data + bytes([newline]), np.uint8) for data in files)
        for split, files in split_files(kept, args.val_fraction).items()
    }
    source |= {"documents": len(kept), "left_out": left_out, "val_fraction": args.val_fraction}
    with common.work_folder(args.out_dir) as work:
        common.write_dataset(args.out_dir, work, CharTokenizer(CHARACTERS), "uint8", splits, source)


if __name__ == "__main__":
    common.run(main)
