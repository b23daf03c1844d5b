"""OpenWebText by characters, as in the paper: the newline and the 95 printable ASCII characters, 96 in all.
Documents with any other character are left out; a newline follows each document.

Other texts keep their own alphabet, as with data/chars/prepare.py, and nothing is left out; with --ascii,
they are treated as OpenWebText.

    python data/openwebtext_char/prepare.py                              about 24 GB to download
    python data/openwebtext_char/prepare.py --source owt.jsonl --ascii   a copy of it
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data import common  # noqa: E402
from data.characters import MIN_COUNT, write_characters  # noqa: E402


def main():
    ascii_only = {"--ascii": {"action": "store_true", "help":
                  "leave out documents with any character but the newline and printable ASCII"}}
    args = common.parse_arguments(__doc__, HERE, val_fraction=0.0005, more=MIN_COUNT | ascii_only)
    plain = args.ascii or not (args.source or args.dataset)
    if plain and args.min_count is not None:
        raise ValueError("--min-count is for an alphabet of the text's own: give a --source without --ascii")
    with common.work_folder(args.out_dir) as work:
        write_characters(args, work, plain)


if __name__ == "__main__":
    common.run(main)
