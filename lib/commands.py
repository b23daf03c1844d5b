"""Command lines of train.py: what they may start from, which folder they write to, and which ones a run
suggests at its end. Needs no torch."""
import os
import re
import shlex
from collections.abc import Sequence

# keys that define the structure, and keys that identify the run
STRUCTURE = ("struct", "rank", "theta", "layers", "num_experts", "top_k", "ffn_experts", "weight_norm",
             "head_aligned", "dyad_blocks", "dyad_variant", "router_balance_rate")
# those that make any run dense; the others then have no effect
DENSE = dict(struct="dense", rank=None, theta=None, num_experts=0, ffn_experts=0, weight_norm=None,
             head_aligned=None)
# values of init_from; anything else is a checkpoint, *.pt, or a GPT-2's folder
INIT_FROM = ("scratch", "resume", "auto")
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # of the hub's openai-community/
STARTS = (*INIT_FROM, *GPT2_NAMES)
RUN = ("out_dir", "max_iters", "lr_decay_iters", "init_from")


def default_out_dir(arguments: Sequence[str]) -> str:
    """out-<names of the config files>."""
    files = [os.path.splitext(os.path.basename(a))[0] for a in arguments if not a.startswith("-")]
    return "-".join(["out", *files])


def key_of(word: str) -> str | None:
    """The key that a word of the command line sets; None for a config file."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_") if word.startswith("-") else None


def flag_of(key: str, value) -> str:
    """The word of a command line that sets a key; a tuple's needs no quotes."""
    text = ",".join(map(repr, value)) + "," if isinstance(value, tuple) else value
    return f"--{key}={text}"


def keys_of_file(path: str) -> set[str]:
    """The keys that a config file, found as configurator finds it, sets."""
    path = path if os.path.isfile(path) else os.path.join(os.path.dirname(__file__), os.pardir, path)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return set(re.findall(r"^ *([a-z]\w*) *=(?!=)", file.read(), re.MULTILINE))
    except OSError:
        return set()


def launcher() -> list[str]:
    """The words before train.py: torchrun's where this run has several processes, all on one node."""
    processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return ["torchrun", f"--nproc_per_node={here}"] if here == processes > 1 else ["python"]


def dense_command(arguments: Sequence[str], config: dict, adopted: dict, ratio: float) -> tuple[str, str]:
    """(command, out_dir) of the dense run to compare a run with, of `ratio` times its iterations: see
    next_commands."""
    words = [word for word in arguments if key_of(word) not in (*STRUCTURE, *RUN)]
    files = {word: keys_of_file(word) for word in words if key_of(word) is None}
    pure = {word for word, keys in files.items() if "struct" in keys and keys <= set(STRUCTURE)}
    others = set().union(*(files[word] for word in files.keys() - pure))  # set more than a structure
    words = ["config/dense.py" if word in pure else word for word in words]
    words += [flag_of(key, value) for key, value in DENSE.items() if key in others]
    words += [flag_of(key, value) for key, value in adopted.items() if key not in STRUCTURE]
    iterations, warmup = max(1, round(config["max_iters"] * ratio)), config["warmup_iters"]
    words.append(flag_of("max_iters", iterations))
    if warmup > iterations / 2:  # it would hardly end
        warmup = round(warmup * ratio)
        words.append(flag_of("warmup_iters", warmup))
    if "lr_decay_iters" in others | set(map(key_of, arguments)):  # else it is max_iters
        decay = max(warmup, round(config["lr_decay_iters"] * ratio))
        words.append(flag_of("lr_decay_iters", decay))
    out_dir = config["out_dir"]
    if out_dir == default_out_dir(arguments) != default_out_dir(words):
        return shlex.join([*launcher(), "train.py", *words]), default_out_dir(words)
    return shlex.join([*launcher(), "train.py", *words, f"--out_dir={out_dir}-dense"]), f"{out_dir}-dense"


def next_commands(arguments: Sequence[str], config: dict, adopted: dict, ratio_to_dense: float) -> str:
    """What to run after a run: one line each for more samples, for its curves and, unless the run was itself
    dense or began with other weights, for dense with as many training FLOPs.

    config: its keys with the values that were used. adopted: those that came from a checkpoint and not
    from the arguments. ratio_to_dense: FLOPs per token ÷ those of dense.
    """
    out_dir = config["out_dir"]
    lines, folders = [("sample more", f"python sample.py {shlex.quote(f'--out_dir={out_dir}')}")], [out_dir]
    if ratio_to_dense != 1 and config["init_from"] in INIT_FROM:
        command, folder = dense_command(arguments, config, adopted, ratio_to_dense)
        lines.append(("dense, for as many FLOPs", command))
        folders.append(folder)
    lines.append(("the losses, drawn", f"python -m tools.compare {shlex.join(folders)}"))
    return "\n".join(f"{name + ':':26}{command}" for name, command in lines)
