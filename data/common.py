"""What the prepare scripts share, and how train.py opens what they made.

A dataset is a folder: train.bin and val.bin, flat little-endian token ids of the type meta["dtype"], and meta.json,
which says how many. meta.json is there only when both .bin files are whole.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

from data.tokenizer import CHARACTERS, Gpt2Tokenizer

DTYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2")}
SUFFIXES = (".txt", ".jsonl", ".parquet")
SPLIT_SEED = 2357  # nanoGPT's, so that the validation documents of OpenWebText are the same
GPT2_SIZE = Gpt2Tokenizer.vocab_size
FEW_TOKENS = 10_000  # fewer validation tokens than this are worth a remark

# The hub's parquet version (80 files, 8,013,769 documents); a revision is what keeps the data the same tomorrow.
HUB_DATASET = "Skylion007/openwebtext"
HUB_REVISION = "b4325f019c648b1641a1784748667e8b74e5e064"

ALPHABET = CHARACTERS.encode("ascii")
ALPHABET_TO_IDS = bytes.maketrans(ALPHABET, bytes(range(len(ALPHABET))))


# Reading a dataset


def open_dataset(folder):
    """Opens a prepared dataset.

    Returns (meta, {"train": tokens, "val": tokens}), the tokens being read-only memory maps, 1-D, uint8 or uint16. Their
    ids are not looked at: see largest_id. Raises ValueError, one sentence, if there is no whole dataset in the folder.
    """
    folder = Path(find_dataset(folder))
    script = folder / "prepare.py"
    advice = f"run: python {os.path.relpath(script)}" if script.is_file() else "make one with data/*/prepare.py"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype = DTYPES[meta["dtype"]]
        counts = {split: meta[f"{split}_tokens"] for split in ("train", "val")}
        described = meta["tokenizer"]
        size = {"gpt2": GPT2_SIZE, "char": len(described.get("characters", ""))}[described["name"]]
        if any(type(n) is not int for n in [meta["vocab_size"], *counts.values()]):
            raise TypeError
    except OSError as error:
        raise ValueError(f"there is no whole dataset in {folder} (no readable meta.json): {advice}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / 'meta.json'} does not describe a dataset: {advice}") from error
    if meta["vocab_size"] != size:
        raise ValueError(
            f"{folder / 'meta.json'} says vocab_size {meta['vocab_size']}, but its tokenizer has {size} tokens: {advice}"
        )
    tokens = {}
    for split, count in counts.items():
        path = folder / f"{split}.bin"
        try:
            size = path.stat().st_size if path.is_file() else 0
            if count < 1 or size != count * dtype.itemsize:
                raise ValueError(
                    f"{path} holds {size} bytes where meta.json says {count} tokens of {dtype.itemsize}: {advice}"
                )
            tokens[split] = np.memmap(path, dtype=dtype, mode="r")
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): {advice}") from error
    return meta, tokens


def find_dataset(dataset):
    folder = Path(__file__).parent / dataset
    for f in (Path(dataset), folder):
        if f.is_dir():
            return str(f)
    raise ValueError(f"there is no dataset {dataset!r}: give a path, or the name of a folder under data/ (made by data/*/prepare.py)")


def check_token_ids(splits, vocab_size, part=0, parts=1):
    for split, tokens in splits.items():
        largest = largest_id(tokens, part, parts)
        if largest >= vocab_size:
            raise ValueError(f"{split}.bin holds the token id {largest}, but its vocabulary ends at {vocab_size - 1}: make it again with data/*/prepare.py")


def largest_id(tokens, part=0, parts=1, size=1 << 24):
    """Returns the largest of the ids in one of `parts` equal shares of tokens, -1 if it is empty; reads them once."""
    first, last = (len(tokens) * i // parts for i in (part, part + 1))
    return max((int(tokens[i : min(i + size, last)].max()) for i in range(first, last, size)), default=-1)


# The command line of a prepare script


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(f"error: {message}")


def parse_arguments(doc, folder, *, val_fraction, num_proc):
    """Parses a prepare script's command line; `folder`, the script's own, is where its data goes by default."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--source",
        nargs="+",
        metavar="PATH",
        help="local .txt (one document each), .jsonl or .parquet files, or folders",
    )
    parser.add_argument("--text-field", default="text", help="field of .jsonl and .parquet files (default: text)")
    parser.add_argument(
        "--out-dir", type=Path, default=folder, help="where the dataset goes (default: beside the script)"
    )
    parser.add_argument(
        "--val-fraction",
        type=fraction,
        default=val_fraction,
        help="share held out for validation (default: %(default)s)",
    )
    if num_proc:
        parser.add_argument(
            "--num-proc", type=positive_integer, default=_cores(), help="processes (default: all cores)"
        )
    return parser.parse_args()


def run(main):
    """Runs a script's main(): an error that the user can mend is one sentence and exit code 1, Ctrl-C is code 130."""
    interrupted = False
    script = os.getpid()

    def interrupt(signum, frame):
        nonlocal interrupted
        if os.getpid() == script:  # a forked worker leaves it to the script, which ends its workers
            interrupted = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except BaseException as error:
        if interrupted:  # `datasets` may turn the KeyboardInterrupt into an error of its own
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, ImportError):
            sys.exit(f"error: {error}: pip install -r requirements.txt brings what is missing")
        if isinstance(error, (OSError, ValueError)):
            sys.exit("error: " + " ".join(str(error).split()))
        raise


def fraction(text):
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive_integer(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _cores():
    # A container often grants fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Documents from local files


def find_files(paths):
    """Returns [(name, path)] of the documents' files at `paths`, a folder standing for all such files below it.

    The name says nothing of where the folder is. Raises ValueError if a path gives no file.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = {
                p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()
            }
            if not inside:
                raise ValueError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
            found += sorted(inside.items())
        elif not path.exists():
            raise ValueError(f"the source {path} does not exist")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"the source {path} is none of {', '.join(SUFFIXES)}, nor a folder of them")
        else:
            found.append((path.name, path))
    return found


def read_documents(files, text_field):
    """Yields (name, text) of every document that is not empty; raises ValueError, naming the place, at a bad one."""
    for name, path in files:
        if path.suffix == ".txt":
            texts = _read_txt(path)
        elif path.suffix == ".jsonl":
            texts = _read_jsonl(path, text_field)
        else:
            texts = _read_parquet(path, text_field)
        for number, text in enumerate(texts):
            if text:
                yield f"{name}:{number}", text


def _read_txt(path):
    try:
        yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _read_jsonl(path, text_field):
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}, is not JSON ({error.msg})") from error
                if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
                    raise ValueError(f"{path}, line {number}, has no string field {text_field!r} (see --text-field)")
                yield row[text_field]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason})") from error


def _read_parquet(path, text_field):
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error})") from error
    with table:
        names = table.schema_arrow.names
        if text_field not in names:
            raise ValueError(f"{path} has no column {text_field!r} but {', '.join(names)} (see --text-field)")
        kind = table.schema_arrow.field(text_field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"{path}: the column {text_field!r} holds {kind}, not strings (see --text-field)")
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            yield from batch.column(0).to_pylist()


# Documents as a datasets.Dataset, for what does not fit in memory


def load_documents(args, work):
    """Loads OpenWebText, or the local files of --source, as a datasets.Dataset with the one column "text".

    Returns (documents, source), `source` being the object that meta.json keeps. What is read from local files is kept
    in the folder `work`; what comes from the hub stays in the hub's own cache, for the next run.
    """
    import datasets

    if not args.source:
        print(f"loading {HUB_DATASET} at revision {HUB_REVISION}")
        try:
            documents = datasets.load_dataset(HUB_DATASET, revision=HUB_REVISION, split="train", num_proc=args.num_proc)
        except Exception as error:  # the hub's errors share no base class
            raise OSError(
                f"{HUB_DATASET} could not be loaded from the hub ({type(error).__name__}: {error}): try again, "
                "or give local files with --source"
            ) from error
        return documents.select_columns("text"), {"dataset": HUB_DATASET, "revision": HUB_REVISION}

    files = find_files(args.source)
    try:
        documents = datasets.Dataset.from_generator(
            _rows,
            gen_kwargs={"files": files, "text_field": args.text_field},
            features=datasets.Features({"text": datasets.Value("large_string")}),
            cache_dir=str(work),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error
    return documents, {"paths": args.source, "files": len(files)}


def _rows(files, text_field):
    empty = True
    for _, text in read_documents(files, text_field):
        empty = False
        yield {"text": text}
    if empty:
        raise ValueError("the source holds no text")


def split_documents(documents, val_fraction):
    """Splits a Dataset with the column "text" by documents, or a single document in two: {"train": ..., "val": ...}."""
    import datasets

    if len(documents) == 1:
        parts = zip(("train", "val"), cut(documents[0]["text"], val_fraction))
        return {split: datasets.Dataset.from_dict({"text": [part]}, documents.features) for split, part in parts}
    held_out = min(math.ceil(val_fraction * len(documents)), len(documents) - 1)
    both = documents.train_test_split(test_size=held_out, seed=SPLIT_SEED, shuffle=True)
    return {"train": both["train"], "val": both["test"]}


def cut(text, val_fraction):
    """Cuts one document in two, the end being for validation; raises ValueError if it is a single character."""
    if len(text) < 2:
        raise ValueError("the source holds one character in all, too little for a train and a validation split")
    place = len(text) - min(math.ceil(val_fraction * len(text)), len(text) - 1)
    return text[:place], text[place:]


def encode_documents(splits, encode, dtype, num_proc):
    """Maps `encode`, {"text": [...]} -> {"ids": [...]}, over the documents of every split, in parallel."""
    import datasets

    return {
        split: documents.map(
            encode,
            batched=True,
            remove_columns=["text"],
            features=datasets.Features({"ids": datasets.Sequence(datasets.Value(dtype))}),
            num_proc=processes(num_proc, documents),
            desc=f"tokenizing {split}",
        )
        for split, documents in splits.items()
    }


def processes(num_proc, documents):
    """The num_proc to pass to `datasets`: None, which is this process, unless there is work for several."""
    num_proc = min(num_proc, len(documents))
    return num_proc if num_proc > 1 else None


def token_shards(documents, desc, size=10_000):
    """Yields the column "ids" as 1-D arrays, `size` documents each, with a progress bar."""
    from tqdm import tqdm

    rows = documents.with_format("arrow")
    for start in tqdm(range(0, len(documents), size), desc=desc, unit="shard"):
        ids = rows[start : start + size].column("ids")
        for chunk in ids.chunks:
            yield chunk.flatten().to_numpy(zero_copy_only=False)


# Characters


def character_ids(text):
    """Returns the ids of `text`, one byte each, or None if a character of it is not among the 96.

    `text` is str or ASCII-compatible bytes.
    """
    if isinstance(text, str):
        if not text.isascii():
            return None
        text = text.encode("ascii")
    return None if text.translate(None, ALPHABET) else text.translate(ALPHABET_TO_IDS)


# Writing


@contextlib.contextmanager
def work_folder(out_dir):
    """A folder inside out_dir for what is not whole yet; a killed run's is removed first, and this one at the end."""
    folder = out_dir / "prepare.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_dataset(out_dir, work, tokenizer, dtype, splits, source):
    """Writes a dataset into `work` and, when it is whole, moves it into out_dir.

    `splits` is {"train": ..., "val": ...}, iterables of 1-D arrays of ids; dtype is "uint8" or "uint16"; `source` is
    the object that meta.json keeps, to which the SHA-256 of both files is added. Prints the counts. A kill at any
    moment leaves the old dataset, no meta.json, or the whole of this one. Raises ValueError if a split is empty.
    """
    meta = {"tokenizer": tokenizer.to_meta(), "vocab_size": tokenizer.vocab_size, "dtype": dtype}
    hashes = {}
    for split, arrays in splits.items():
        meta[f"{split}_tokens"], hashes[f"{split}_sha256"] = _write_tokens(work / f"{split}.bin", arrays, dtype)
        if not meta[f"{split}_tokens"]:
            raise ValueError(f"the {split} split is empty: the source holds too little text")
    meta["source"] = source | hashes
    with open(work / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=2)
        _sync(file)

    (out_dir / "meta.json").unlink(missing_ok=True)
    _sync_folder(out_dir)
    for split in splits:
        os.replace(work / f"{split}.bin", out_dir / f"{split}.bin")
        # Two runs that share an out_dir share a work folder; what the other has begun must not pass for whole.
        if (out_dir / f"{split}.bin").stat().st_size != meta[f"{split}_tokens"] * DTYPES[dtype].itemsize:
            raise OSError(
                f"{out_dir / split}.bin changed while it was moved into place: is another prepare.py running?"
            )
    _sync_folder(out_dir)
    os.replace(work / "meta.json", out_dir / "meta.json")
    _sync_folder(out_dir)

    for split in splits:
        print(f"{split}.bin: {meta[f'{split}_tokens']:,} tokens, sha256 {hashes[f'{split}_sha256']}")
    if meta["val_tokens"] < FEW_TOKENS:
        print(f"the validation split has only {meta['val_tokens']:,} tokens; a larger --val-fraction gives it more")
    print(f"wrote {out_dir}")


def _write_tokens(path, arrays, dtype):
    count, digest = 0, hashlib.sha256()
    with open(path, "wb") as file:
        for ids in arrays:
            data = np.asarray(ids, dtype=DTYPES[dtype]).tobytes()
            file.write(data)
            digest.update(data)
            count += len(ids)
        _sync(file)
    return count, digest.hexdigest()


def _sync(file):
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder):
    if os.name == "nt":  # Windows cannot open a folder, and needs no sync of one
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
