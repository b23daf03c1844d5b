"""Any text by characters, in any language: the vocabulary is the alphabet of the text itself.

Texts are normalized to Unicode NFC, in which an accented letter is one character where there is one.
With --min-count=N, characters that occur fewer than N times become one unknown mark. A newline follows each
document.

    python data/chars/prepare.py --source my.txt
    python data/chars/prepare.py --dataset wikimedia/wikipedia --config 20231101.el --min-count 100
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data import common  # noqa: E402
from data.characters import MIN_COUNT, write_characters  # noqa: E402


def main():
    args = common.parse_arguments(__doc__, HERE, has_default_text=False, more=MIN_COUNT)
    with common.work_folder(args.out_dir) as work:
        write_characters(args, work)


if __name__ == "__main__":
    common.run(main)
