"""Command lines of train.py: the folder that one writes to, and those that a run proposes at its end."""
import os
import shlex
from collections.abc import Sequence

# keys that say the structure, and keys that say which run it is
STRUCTURE = ("struct", "rank", "theta", "layers", "num_experts", "top_k", "ffn_experts", "head_aligned",
             "dyad_blocks", "dyad_variant", "router_balance_rate")
RUN = ("out_dir", "max_iters", "init_from")


def default_out_dir(arguments: Sequence[str]) -> str:
    """out-<names of the config files>."""
    files = [os.path.splitext(os.path.basename(a))[0] for a in arguments if not a.startswith("-")]
    return "-".join(["out", *files])


def sets_structure(path: str) -> bool:
    """Whether a config file sets `struct`."""
    try:
        with open(path, encoding="utf-8") as file:
            return any(line.replace(" ", "").startswith("struct=") for line in file)
    except OSError:
        return False


def dense_command(arguments: Sequence[str], iterations: int) -> tuple[str, str]:
    """(command, out_dir) of the dense run beside a run with these arguments."""
    leave_out = tuple(f"--{key}=" for key in (*STRUCTURE, *RUN))
    words = [word for word in arguments if not word.startswith(leave_out)]
    words = [os.path.join(os.path.dirname(word), "dense.py") if sets_structure(word) else word
             for word in words]
    own = [word.partition("=")[2] for word in arguments if word.startswith("--out_dir=")]
    out_dir = f"{own[-1]}-dense" if own else default_out_dir(words)
    words += [f"--max_iters={iterations}", *([f"--out_dir={out_dir}"] if own else [])]
    return shlex.join(["python", "train.py", *words]), out_dir


def next_commands(arguments: Sequence[str], out_dir: str, init_from: str, iterations: int,
                  ratio_to_dense: float) -> str:
    """What to run after a run: a line each for more samples, for its curves and, where the run was not dense
    itself and did not begin with other weights, for dense with as many training FLOPs. ratio_to_dense: FLOPs
    per token ÷ those of dense."""
    lines, folders = [("sample more", f"python sample.py {shlex.quote(f'--out_dir={out_dir}')}")], [out_dir]
    if ratio_to_dense != 1 and init_from in ("scratch", "auto", "resume"):
        command, folder = dense_command(arguments, max(1, round(iterations * ratio_to_dense)))
        lines.append(("dense, for as many FLOPs", command))
        folders.append(folder)
    lines.append(("the losses, drawn", f"python -m tools.compare {shlex.join(folders)}"))
    return "\n".join(f"{name + ':':26}{command}" for name, command in lines)
