"""What the prepare scripts share, and how train.py opens what they wrote.

A dataset is a folder: train.bin and val.bin, flat little-endian token ids of the type meta["dtype"], and
meta.json, which describes them. meta.json exists only while both .bin files are whole.
"""
import argparse
import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data.tokenizer import FileTokenizer, Tokenizer, count_ids, without_half_characters
from lib.files import fsync_folder, lock_file
from lib.terminal import prepare_output

DTYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SUFFIXES = (".txt", ".jsonl", ".parquet")
SPLIT_SEED = 2357  # nanoGPT's, so that the validation documents of OpenWebText are the same
VAL_FRACTION = 0.05  # of a text of the user's own, which is small beside OpenWebText
SOURCE = ("library", "adopted", "paths", "dataset", "config", "split", "revision", "max_documents")
BATCH_BYTES = 2 ** 28  # of documents that are worked on at once; a batch must have less than 2^31 ids
FEW_TOKENS = 10_000  # fewer validation tokens than this are worth a remark

# The hub's parquet version (80 files, 8,013,769 documents); the fixed revision keeps the data the same.
HUB_DATASET = "Skylion007/openwebtext"
HUB_REVISION = "b4325f019c648b1641a1784748667e8b74e5e064"

# ---- Reading a dataset -------------------------------------------------------------------------------------


def find_dataset(dataset: str) -> str:
    """Returns the path of a dataset's folder, given that path or the name of a folder under data/. Raises
    ValueError, one sentence, if there is no such folder."""
    for folder in (dataset, os.path.join(os.path.dirname(os.path.abspath(__file__)), dataset)):
        if dataset and os.path.isdir(folder):
            return folder
    raise ValueError(f"there is no dataset {dataset!r}: give the path of a folder, or the name of one under "
                     "data/ (made by data/*/prepare.py)")


class TokenFile:
    """The token ids in a file, 1-D: tokens[first:last] reads an array of them.

    Not a memory map, whose pages stay in the process's resident memory once read: in the end, the whole
    dataset. Raises OSError, or ValueError if the file is empty or its last id is not whole.
    """

    def __init__(self, path: str | os.PathLike, dtype: np.dtype):
        self.filename, self.dtype = str(path), dtype
        self.file = open(path, "rb", buffering=0)
        size = os.fstat(self.file.fileno()).st_size
        if size == 0 or size % dtype.itemsize:
            raise ValueError(f"it has {size} bytes, not whole ids of {dtype.itemsize} bytes each")
        self.length = size // dtype.itemsize

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, places: slice) -> np.ndarray:
        first, last, step = places.indices(self.length)
        ids = np.empty(max(0, last - first), self.dtype)
        self.file.seek(first * self.dtype.itemsize)
        unread = ids.view(np.uint8)
        while len(unread):
            count = self.file.readinto(unread)
            if not count:
                raise OSError(f"{self.filename} has become shorter while it is in use")
            unread = unread[count:]
        return ids[::step]


def open_dataset(dataset: str) -> tuple[dict, dict[str, TokenFile]]:
    """Opens a dataset, given as to find_dataset: (meta, {"train": tokens, "val": tokens}).

    They are not checked: see check_token_ids. Raises ValueError, one sentence, if the folder holds no whole
    dataset.
    """
    folder = Path(find_dataset(dataset))
    script = folder / "prepare.py"
    with contextlib.suppress(ValueError):  # Windows has no way from one drive to another
        script = Path(os.path.relpath(script))
    command = f"python {script}" if script.is_file() else "a data/*/prepare.py"
    if (folder / "train.bin").exists() and not (folder / "meta.json").exists():
        command += f", or python data/adopt.py {folder} if nanoGPT made it"
    problem = f"there is no whole dataset in {folder} (run {command})"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        described, dtype = meta["tokenizer"], DTYPES[meta["dtype"]]
        counts = {split: meta[f"{split}_tokens"] for split in ("train", "val")}
        size = count_ids(described)
        if any(type(n) is not int for n in [meta["vocab_size"], *counts.values()]):
            raise TypeError("vocab_size and the numbers of tokens must be whole numbers")
        if meta["vocab_size"] != size:
            raise ValueError(f"vocab_size is {meta['vocab_size']}, but its tokenizer has {size} tokens")
    except OSError as error:
        raise ValueError(f"{problem}: meta.json cannot be read") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{problem}: meta.json is not valid ({type(error).__name__}: {error})") from error
    tokens = {}
    for split, count in counts.items():
        try:
            tokens[split] = TokenFile(folder / f"{split}.bin", dtype)
            if len(tokens[split]) != count:
                raise ValueError(f"it holds {len(tokens[split])} tokens, and meta.json says {count}")
        except (OSError, ValueError) as error:
            raise ValueError(f"{problem}: {split}.bin cannot be used ({error})") from error
    return meta, tokens


def check_token_ids(splits: dict[str, TokenFile | np.ndarray], vocab_size: int, part: int = 0,
                    parts: int = 1) -> None:
    """Reads one of `parts` equal shares of each split. Raises ValueError if an id is not below vocab_size."""
    for split, tokens in splits.items():
        if (largest := largest_id(tokens, part, parts)) >= vocab_size:
            path = getattr(tokens, "filename", f"{split}.bin")
            raise ValueError(f"{path} holds the token id {largest}, but its vocabulary ends at "
                             f"{vocab_size - 1}: make it again with data/*/prepare.py")


def largest_id(tokens: TokenFile | np.ndarray, part: int = 0, parts: int = 1, size: int = 1 << 21) -> int:
    """Returns the largest id in one of `parts` equal shares of tokens, -1 if it is empty. It reads `size` ids
    at a time."""
    first, last = (len(tokens) * i // parts for i in (part, part + 1))
    return max((int(tokens[i:min(i + size, last)].max()) for i in range(first, last, size)), default=-1)


# ---- A prepare script --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        sys.exit(f"error: {message}")


def parse_arguments(doc: str, folder: Path, *, val_fraction: float = VAL_FRACTION,
                    has_default_text: bool = True, more: dict[str, dict] | None = None) -> argparse.Namespace:
    """Parses a prepare script's command line. Data goes to `folder`, the script's own, by default.

    val_fraction      the default for the script's own text, and with --ascii; for others it is VAL_FRACTION
    has_default_text  whether the script has a text where neither --source nor --dataset is given
    more              {"--name": options of argparse} of further arguments
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--source", nargs="+", metavar="PATH",
        help="local .txt (one document each), .jsonl or .parquet files, or folders of them")
    add("--dataset", metavar="NAME", help="a dataset of the Hugging Face hub, or the folder of one, streamed")
    add("--config", metavar="NAME", help="configuration of --dataset, if it has several")
    add("--split", metavar="NAME", help="split of --dataset (default: train)")
    add("--revision", metavar="COMMIT", help="commit of --dataset (default: the newest)")
    add("--text-field", metavar="NAME",
        help="field of .jsonl and .parquet files, and of --dataset (default: text)")
    add("--max-documents", type=int, metavar="N", help="take the first N documents (default: all)")
    add("--out-dir", type=Path, default=folder, help="where the dataset goes (default: beside the script)")
    of_openwebtext = "" if val_fraction == VAL_FRACTION else f"; of OpenWebText {val_fraction}"
    add("--val-fraction", type=float, metavar="X",
        help=f"share held out for validation (default: {VAL_FRACTION}{of_openwebtext})")
    # a container often grants fewer cores than the machine has
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--num-proc", type=int, default=cores, metavar="N", help="processes (default: all cores)")
    for name, options in (more or {}).items():
        add(name, **options)
    args = parser.parse_args()
    if args.source and args.dataset:
        parser.error("give either --source or --dataset")
    if not (has_default_text or args.source or args.dataset):
        parser.error("there is no text: give local files with --source, or a dataset's name with --dataset")
    belong_to = dict.fromkeys(("config", "split", "revision"), "--dataset") | dict.fromkeys(
        ("text_field", "max_documents", "min_count"), "--source or --dataset")
    for name, other in belong_to.items():
        if getattr(args, name, None) is not None and not (args.dataset or args.source and "source" in other):
            parser.error(f"--{name.replace('_', '-')} belongs to {other}, which is not given")
    args.text_field = args.text_field or "text"
    if args.val_fraction is None:
        default_text = not (args.source or args.dataset) or getattr(args, "ascii", False)
        args.val_fraction = val_fraction if default_text else VAL_FRACTION
    if not 0 < args.val_fraction < 1:
        parser.error(f"--val-fraction must be between 0 and 1; got {args.val_fraction}")
    for name in ("max_documents", "num_proc", "min_count"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")
    if args.num_proc == 1:
        args.num_proc = None  # for `datasets` 1 is one process besides this one
    return args


def run(main: Callable[[], None]) -> None:
    """Runs a script's main(). An error that the user can fix is one sentence and exit status 1."""
    prepare_output(keep_going=True)
    interrupted, script = False, os.getpid()

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
        if isinstance(error, RuntimeError) and "abruptly died" in str(error):  # of `datasets`
            sys.exit("error: one of the processes was killed, perhaps for lack of memory: give a smaller "
                     "--num-proc")
        raise


@contextlib.contextmanager
def work_folder(out_dir: Path) -> Iterator[Path]:
    """A folder inside out_dir for unfinished files. Leftovers of a killed run are removed first, except the
    meta.json that check_out_dir looks for. Raises ValueError while another process uses the folder."""
    folder = out_dir / "prepare.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    lock_file(str(folder / "lock"), "another prepare.py writes", "--out-dir")
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in ("lock", "meta.json"):
            path.unlink(missing_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_out_dir(out_dir: Path, source: dict) -> None:
    """Raises ValueError if out_dir holds a dataset of another source, by the keys of SOURCE in meta.json, or
    token files without a meta.json: these are nanoGPT's, unless a run was killed while moving its own there.
    A meta.json that cannot be read does not count as another source. Old ones may have relative paths."""
    meta = out_dir / "meta.json"
    killed = (out_dir / "prepare.tmp" / "meta.json").exists()  # it is moved last: see write_dataset
    files = [f"{split}.bin" for split in ("train", "val") if (out_dir / f"{split}.bin").exists()]
    if files and not meta.exists() and not killed:
        raise ValueError(f"{out_dir} holds {' and '.join(files)} without a meta.json: adopt nanoGPT's with "
                         "data/adopt.py, give another --out-dir, or remove them")
    try:
        old = json.loads(meta.read_text(encoding="utf-8"))["source"]
        old, new = ({key: given[key] for key in SOURCE if key in given} for given in (old, source))
        paths = {"paths": list(map(os.path.abspath, old["paths"]))} if "paths" in old else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if old | paths != new:
        named = ", ".join(f"{key} {value}" for key, value in old.items()) or "an unknown source"
        raise ValueError(f"{out_dir} holds a dataset of {named}: give another --out-dir, or remove it")


# ---- Documents ---------------------------------------------------------------------------------------------


def import_datasets():
    """Returns the module `datasets`, set up to neither import torch nor log the errors it raises."""
    os.environ["USE_TORCH"] = "0"
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def find_files(paths: list[str]) -> list[Path]:
    """Returns the documents' files at `paths`. A folder stands for all such files below it (not behind links
    to folders), in an order that does not depend on where it is. Raises ValueError if a path has none, or
    one that `datasets` cannot open."""
    found, kinds = [], ", ".join(SUFFIXES)
    for path in map(Path, paths):
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
            if not files:
                raise ValueError(f"the folder {path} holds no {kinds} file")
            found += sorted(files, key=lambda p: p.relative_to(path).as_posix())
        elif not path.exists():
            raise ValueError(f"the source {path} does not exist")
        elif path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"the source {path} is none of {kinds}, nor a folder of them")
        else:
            found.append(path)
    for path in found:
        if "::" in str(path.absolute()):  # fsspec takes what follows for another file system
            raise ValueError(f"the source {path.absolute()} cannot be read for the '::' in its path: rename "
                             "it")
    return found


def read_documents(files: Iterable[Path], text_field: str, work: Path) -> Iterator[str | None]:
    """Yields the text of every document in the files of find_files. `work` is for temporary files. Raises
    ValueError, one sentence that names the file, if one cannot be read."""
    import pyarrow
    for path in files:
        try:
            yield from _read_file(path, text_field, work)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: texts must be UTF-8 (iconv -f ENCODING -t utf-8 converts them): "
                             f"{error}") from error
        # bytes that are not parquet are a ValueError, a text of more than 2 GiB an ArrowException
        except (ValueError, OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path}: {error}") from error


def _read_file(path: Path, text_field: str, work: Path) -> Iterator[str | None]:
    # Not the "json" builder: it turns texts that look like dates into dates, and needs all rows alike.
    suffix = path.suffix.lower()
    builder, options = {".txt": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),
                        ".jsonl": ("text", {"sample_by": "line", "encoding": "utf-8-sig"}),
                        ".parquet": ("parquet", {"columns": [text_field]})}[suffix]
    pattern = glob.escape(str(path.absolute()))
    rows = import_datasets().load_dataset(builder, data_files=pattern, split="train", streaming=True,
                                          cache_dir=str(work), **options)
    if builder == "parquet" and text_field not in rows.features:
        raise ValueError(f"there is no column {text_field!r} (see --text-field)")
    kind = getattr(rows.features[text_field], "dtype", "no strings") if builder == "parquet" else "string"
    if kind not in ("string", "large_string"):
        raise ValueError(f"the column {text_field!r} holds {kind}, not strings (see --text-field)")
    for number, row in enumerate(rows, 1):
        [text] = row.values()
        if suffix != ".jsonl":
            yield text
        elif text.strip():
            yield _json_field(text, text_field, number)


def _json_field(line: str, field: str, number: int) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get(field, 0), str | None):
        raise ValueError(f"line {number} has no string field {field!r} (see --text-field)")
    return without_half_characters(row[field] or "")


def read_hub(args: argparse.Namespace) -> Iterator[str | None]:
    """Yields the text of every document of --dataset, as they are downloaded. Raises ValueError, one
    sentence, if it cannot be read."""
    try:
        rows = import_datasets().load_dataset(args.dataset, args.config, split=args.split or "train",
                                              revision=args.revision, streaming=True)
        for row in rows:
            if args.text_field not in row:
                raise ValueError(f"there is no field {args.text_field!r} among {', '.join(row)} (see "
                                 "--text-field)")
            text = row[args.text_field]
            if not isinstance(text, str | None):
                raise ValueError(f"the field {args.text_field!r} holds {type(text).__name__}, not strings "
                                 "(see --text-field)")
            yield text
    except Exception as error:  # the errors of the hub and of its formats share no base class
        raise ValueError(f"the dataset {args.dataset}: {error or type(error).__name__}") from error


def load_documents(args: argparse.Namespace, work: Path, nfc: bool = False):
    """Loads OpenWebText, the local files of --source or the --dataset: (a datasets.Dataset with the column
    "text", the source for meta.json). nfc: texts are normalized to Unicode NFC, except OpenWebText's.
    Texts are kept in `work`, OpenWebText's in the hub's own cache."""
    datasets = import_datasets()
    files, source = (), {key: value for key in ("dataset", "config", "split", "revision", "max_documents")
                         if (value := getattr(args, key)) is not None}
    if args.source:
        files = tuple(find_files(args.source))  # a list would be taken for the generator's shards
        # absolute, since the same name in another folder is another text
        source = {"paths": list(map(os.path.abspath, args.source)), "files": len(files)} | source
    elif not args.dataset:
        source = {"dataset": HUB_DATASET, "revision": HUB_REVISION}
    check_out_dir(args.out_dir, source)
    if not (args.source or args.dataset):
        print(f"loading {HUB_DATASET} at revision {HUB_REVISION}")
        try:
            documents = datasets.load_dataset(HUB_DATASET, revision=HUB_REVISION, split="train",
                                              num_proc=args.num_proc)
        except Exception as error:  # the hub's errors share no base class
            raise OSError(f"{HUB_DATASET} could not be loaded ({type(error).__name__}: {error}): try again, "
                          "or give local files with --source") from error
        return documents.select_columns("text"), source
    try:
        documents = datasets.Dataset.from_generator(
            _rows, features=datasets.Features({"text": datasets.Value("large_string")}), cache_dir=str(work),
            writer_batch_size=100,  # documents that are kept in memory: they may be books
            gen_kwargs={"args": args, "files": files, "work": work, "nfc": nfc})
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error
    return documents, source


def _rows(args: argparse.Namespace, files: tuple, work: Path, nfc: bool) -> Iterator[dict]:
    documents = read_documents(files, args.text_field, work) if files else read_hub(args)
    empty = True
    for text in itertools.islice(filter(None, documents), args.max_documents):
        empty = False
        yield {"text": unicodedata.normalize("NFC", text) if nfc else text}
    if empty:
        source = "source" if files else f"split {args.split or 'train'} of the dataset {args.dataset}"
        raise ValueError(f"the {source} holds no text")


def cut(text: str, val_fraction: float) -> tuple[str, str]:
    """Cuts a document in two; the end is for validation. Raises ValueError if it is one character."""
    if len(text) < 2:
        raise ValueError("the source holds one character in all, too little for two splits")
    place = len(text) - min(math.ceil(val_fraction * len(text)), len(text) - 1)
    return text[:place], text[place:]


def split_documents(documents, val_fraction: float) -> dict:
    """Splits the documents into {"train", "val"}, or cuts a single one in two."""
    if len(documents) == 1:
        parts = zip(("train", "val"), cut(documents[0]["text"], val_fraction))
        return {split: documents.from_dict({"text": [part]}, documents.features) for split, part in parts}
    held_out = min(math.ceil(val_fraction * len(documents)), len(documents) - 1)
    both = documents.train_test_split(test_size=held_out, seed=SPLIT_SEED, shuffle=True)
    return {"train": both["train"], "val": both["test"]}


def batch_size(documents) -> int:
    """The number of documents that have BATCH_BYTES together, on average; 1000 at most."""
    return max(1, min(1000, BATCH_BYTES // (1 + documents.data.nbytes // len(documents))))


# ---- Writing -----------------------------------------------------------------------------------------------


def encode_documents(batch: dict, tokenizer: Tokenizer) -> dict:
    """{"text": [...]} -> {"ids": [...], "lost": [...]}: the ids of each document, and the id that ends it;
    what FileTokenizer.count_lost counts. Raises ValueError, which has the beginning of the document, if a
    part of one has no id."""
    def encode(text):
        try:
            return np.asarray(tokenizer.encode_ordinary(text), tokenizer.dtype)
        except ValueError as error:
            raise ValueError(f"the document that begins with {text[:50]!r} does not fit the vocabulary: "
                             f"{error}") from error

    end = np.array([tokenizer.start], tokenizer.dtype)
    ids = list(map(encode, batch["text"]))
    counts = isinstance(tokenizer, FileTokenizer)  # the others have ids for every text, or a rare mark
    lost = map(tokenizer.count_lost, batch["text"], ids) if counts else [0] * len(ids)
    return {"ids": [np.append(of_text, end) for of_text in ids], "lost": list(lost)}


def write_documents(args: argparse.Namespace, work: Path, documents, tokenizer: Tokenizer,
                    source: dict) -> None:
    """Splits the documents, tokenizes them and writes the dataset."""
    datasets = import_datasets()
    features = datasets.Features({"ids": datasets.Sequence(datasets.Value(tokenizer.dtype)),
                                  "lost": datasets.Value("int64")})
    size, ids, lost = batch_size(documents), {}, 0
    for split, texts in split_documents(documents, args.val_fraction).items():
        encoded = texts.map(encode_documents, fn_kwargs={"tokenizer": tokenizer}, batched=True,
                            batch_size=size, writer_batch_size=size, remove_columns=["text"],
                            features=features, num_proc=args.num_proc, desc=f"tokenizing {split}")
        ids[split] = _shards(encoded, f"writing {split}.bin")
        lost += sum(sum(part["lost"]) for part in encoded.select_columns("lost").iter(1 << 16))
    source = source | {"documents": len(documents), "val_fraction": args.val_fraction}
    meta = write_dataset(args.out_dir, work, tokenizer, ids, source)
    if lost and tokenizer.unknown_id is None:
        print(f"{lost:,} characters of the text have no token, and are left out: choose another --tokenizer")
    elif lost:
        print(f"{lost / (meta['train_tokens'] + meta['val_tokens']):.2%} of the tokens, {lost:,}, are the "
              "unknown token, and what they stand for is lost: choose another --tokenizer to keep it")


def _shards(encoded, desc: str, size: int = 10_000) -> Iterator[np.ndarray]:
    """Yields the column "ids" as 1-D arrays, `size` documents each, with a progress bar."""
    from tqdm import tqdm

    rows = encoded.with_format("arrow")
    for start in tqdm(range(0, len(encoded), size), desc=desc, unit="shard"):
        for chunk in rows[start:start + size].column("ids").chunks:
            yield chunk.flatten().to_numpy(zero_copy_only=False)


def write_dataset(out_dir: Path, work: Path, tokenizer: Tokenizer, splits: dict[str, Iterable[np.ndarray]],
                  source: dict) -> dict:
    """Writes a dataset into `work` and, when it is whole, moves it into out_dir. Prints the counts. Returns
    what meta.json holds.

    splits: {"train": ..., "val": ...}, iterables of 1-D arrays of ids. source: the object that meta.json
    keeps, to which the SHA-256 of both files is added. A kill at any moment leaves the old dataset, no
    meta.json, or the whole of this one. Raises ValueError if a split is empty.
    """
    meta = {"tokenizer": tokenizer.to_meta(), "vocab_size": tokenizer.vocab_size, "dtype": tokenizer.dtype}
    dtype, hashes = DTYPES[tokenizer.dtype], {}
    for split, arrays in splits.items():
        path = work / f"{split}.bin"
        hashes[f"{split}_sha256"] = write_file(path, (np.asarray(ids, dtype).tobytes() for ids in arrays))
        meta[f"{split}_tokens"] = path.stat().st_size // dtype.itemsize
        if not meta[f"{split}_tokens"]:
            raise ValueError(f"the {split} split is empty: the source holds too little text")
    meta["source"] = source | hashes
    write_file(work / "meta.json", [json.dumps(meta, indent=2).encode()])

    (out_dir / "meta.json").unlink(missing_ok=True)
    fsync_folder(out_dir)
    for split in splits:
        path = out_dir / f"{split}.bin"
        os.replace(work / path.name, path)
        # Two runs that share an out_dir share a work folder: what the other began must not pass as complete.
        if path.stat().st_size != meta[f"{split}_tokens"] * dtype.itemsize:
            raise OSError(f"{path} changed while it was moved into place: is another prepare.py running?")
    fsync_folder(out_dir)
    os.replace(work / "meta.json", out_dir / "meta.json")
    fsync_folder(out_dir)

    for split in splits:
        print(f"{split}.bin: {meta[f'{split}_tokens']:,} tokens, sha256 {hashes[f'{split}_sha256']}")
    if meta["val_tokens"] < FEW_TOKENS:
        print(f"the validation split has only {meta['val_tokens']:,} tokens: raise --val-fraction for more")
    share = meta["val_tokens"] / (meta["train_tokens"] + meta["val_tokens"])
    if share > max(0.2, 3 * source.get("val_fraction", 1)):
        print(f"the validation split has {share:.0%} of all tokens, since documents are held out whole, and "
              "these are few, or differ much in size: join them into one file, which is cut in two")
    print(f"wrote {out_dir}")
    return meta


def write_file(path: Path, chunks: Iterable[bytes]) -> str:
    """Writes a file to the disk and returns its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
