"""Override a script's annotated globals with config files and --key=value; the last one wins. A user's
mistake ends in one sentence and exit status 1. Does not import torch, which is slow to load."""
import ast
import contextlib
import difflib
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn, TextIO, get_args

HERE = os.path.dirname(os.path.abspath(__file__))
PositiveInt = Annotated[int, ("at least", 1), ("below", 2**31)]
NonNegativeInt = Annotated[int, ("at least", 0), ("below", 2**31)]
Seed = Annotated[int, ("at least", 0), ("below", 2**63)]
PositiveFloat = Annotated[float, ("above", 0), ("below", 1e30)]  # float32 ends at 3e38
NonNegativeFloat = Annotated[float, ("at least", 0), ("below", 1e30)]
UnitFloat = Annotated[float, ("at least", 0), ("below", 1)]
LIMITS = {int: (("above", -2**31), ("below", 2**31))}  # of a type that declares none
TAKES = {int: "whole numbers", float: "finite numbers", bool: "True or False", str: "text", tuple: "numbers"}
BOOLS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


class Key(NamedTuple):
    name: str
    type: type  # int, float, bool, str or tuple
    optional: bool  # None is a value of it
    choices: tuple  # the texts that a Literal allows; (): any
    limits: tuple  # such as ("at least", 1)
    default: object
    heading: str  # the comment above its group
    help: str  # the comment at the end of its line


def configure(namespace: dict, argv: list[str] | None = None, given: set[str] | None = None) -> dict:
    """Return {key: value} for a script's globals() and arguments (None: sys.argv[1:]); exit after --help."""
    given = set() if given is None else given  # collects the names of the keys that the arguments set
    keys = read_keys(namespace["__file__"])
    config = {key.name: key.default for key in keys.values()}
    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ("-h", "--help"):
            print_help(namespace, keys, config)
            raise SystemExit(0)
        if arg.startswith("-"):
            name, config[name] = read_flag(arg, keys)
            given.add(name)
        else:
            config = run_file(arg, find_file(arg), keys, config, given)
    return config


def fail(message: str) -> NoReturn:
    """Print `error: message` as one line on stderr, once per machine under torchrun; exit with status 1."""
    line = " ".join(message.split())
    print_once("error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), sys.stderr)
    raise SystemExit(1)


def print_once(text: str, stream: TextIO) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine under torchrun
        print(text, file=stream)


def structure_config(name: str) -> dict:
    """Return {key: value} that the structure config config/<name>.py sets, or fail if it is none."""
    if not os.path.exists(path := os.path.join(HERE, "config", f"{name}.py")):
        fail(f"there is no structure config {name!r} in config/")
    values = {k: v for k, v in runpy.run_path(path).items() if not k.startswith("_")}
    for key in sorted(values.keys() & {"dataset", "n_layer", "n_head", "n_embd", "block_size", "vocab_size"}):
        fail(f"config/{name}.py sets {key}, so it is no structure config: those set the structure alone")
    return values


def read_keys(path: str) -> dict[str, Key]:
    """Return a script's keys, its annotated globals above configure(); raise TypeError or ValueError."""
    source = Path(path).read_text(encoding="utf-8")
    lines, keys, heading = source.split("\n"), {}, ""
    for node in ast.parse(source, path).body:
        calls = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
        if calls & {"configure", "configurator.configure"}:
            return keys
        if isinstance(node, ast.AnnAssign):
            if lines[node.lineno - 2].startswith("#"):
                heading = lines[node.lineno - 2].strip("# ")
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().strip("# ")
            name, kind = ast.unparse(node.target), read_type(ast.unparse(node.annotation))
            key = Key(name, *kind, ast.literal_eval(node.value), heading, comment)
            keys[name] = key._replace(default=coerce(key, key.default))
    raise ValueError(f"{path} does not call configure()")


def read_type(annotation: str) -> tuple[type, bool, tuple, tuple]:
    """Return (type, whether None is allowed, choices, limits), or raise TypeError or NameError."""
    hint = eval(annotation, globals())
    kind, *others = [kind for kind in get_args(hint | None) if kind is not type(None)]
    base = getattr(kind, "__origin__", kind)  # int of PositiveInt
    choices, base = (kind.__args__, str) if base is Literal else ((), base)
    if others or base not in TAKES:
        raise TypeError(f"a key cannot be {annotation}: see the types of configurator.py")
    return base, hint == hint | None, choices, getattr(kind, "__metadata__", LIMITS.get(kind, ()))


def parse(key: Key, text: str) -> object:
    """Return the key's value from its text on the command line, or fail. A str key's text stays as it is."""
    value = text  # the shell has removed its quotes: any left belong to the text
    if key.optional and text in ("None", "none", "null"):
        value = None
    elif key.type is bool:
        value = BOOLS.get(text.lower(), text)
    elif key.type is tuple:
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # coerce reports it
            value = ast.literal_eval(text.strip())
            value = (value,) if type(value) in (int, float) else value
    elif key.type is not str:
        with contextlib.suppress(ValueError):
            value = float(text) if "." in text or "e" in text.lower() else int(text)
    try:
        return coerce(key, value)
    except ValueError as error:
        fail(f"--{error}")


def coerce(key: Key, value: object) -> object:
    """Return a value in the key's type; raise ValueError, with a sentence, if it does not fit."""
    def is_number(x):  # exact types: True is an int
        return type(x) in (int, float) and abs(x) <= sys.float_info.max

    value = value.item() if getattr(value, "shape", None) == () else value  # numpy's
    if value is None and key.optional:
        return None
    or_none = ", or None" * key.optional
    if is_number(value) and (key.type is float or key.type is int and value == int(value)):
        value = key.type(value)
    elif key.type is tuple and type(value) in (tuple, list) and all(map(is_number, value)):
        value = tuple(value)
    elif key.type not in (bool, str) or type(value) is not key.type:
        raise ValueError(f"{key.name} takes {TAKES[key.type]}{or_none}, not {show(value)}")
    if key.choices and value not in key.choices:
        raise ValueError(f"{key.name} must be one of {', '.join(key.choices)}{or_none}; got {show(value)}")
    for words, x in key.limits:
        if not {"at least": value >= x, "above": value > x, "below": value < x, "at most": value <= x}[words]:
            raise ValueError(f"{key.name} must be {words} {x}; got {show(value)}")
    return value


def show(value: object) -> str:
    """Return a short ASCII repr; ValueError if there is none, as of an int of 5,000 digits."""
    return text if len(text := ascii(value)) <= 120 else text[:120] + "..."


def read_flag(arg: str, keys: dict[str, Key]) -> tuple[str, object]:
    """Return (key, value) of --key=text, or fail."""
    written, equals, text = arg.removeprefix("--").partition("=")
    name = written.replace("-", "_")
    if name not in keys:
        fail(f"unknown key {show(written)}: {nearest(name, keys, '--')}")
    if not equals:
        fail(f"{show(arg)} has no value: write --{name}=VALUE, with no spaces")
    return name, parse(keys[name], text)


def nearest(name: str, known: dict | list, prefix: str = "") -> str:
    """Return the end of an error about an unknown name: the known name that it resembles, if any."""
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else "--help lists the keys"


def print_help(namespace: dict, keys: dict[str, Key], config: dict) -> None:
    """Print the docstring, the usage, and each key: its present value, type, limits or choices, comment."""
    module, script = namespace.get("__spec__"), os.path.basename(namespace["__file__"])
    program = f"-m {module.name}".removesuffix(".__main__") if module else script
    lines = [f"{namespace.get('__doc__') or ''}\nusage: python {program} [path | --key=value] ...".lstrip()]
    for key in keys.values():
        if "\n" + key.heading not in lines:
            lines.append("\n" + key.heading)
        limits = "".join(f" {words} {limit}" for words, limit in key.limits if abs(limit) <= 1)  # not 2**31
        kind = (" | ".join(key.choices) or key.type.__name__ + limits) + " | None" * key.optional
        lines.append(f"  --{key.name + '=' + show(config[key.name]):36} {kind:23} {key.help}".rstrip())
    print_once("\n".join(lines), sys.stdout)


def find_file(arg: str) -> str:
    """Return the path of a config file, found in the working directory or beside this file, or fail."""
    for path in filter(os.path.isfile, (arg, os.path.join(HERE, arg))):
        return path
    names = [path.name for folder in (".", HERE) for path in Path(folder, "config").glob("*.py")]
    hint = nearest(os.path.basename(arg), names, "config/")
    fail(f"there is no config file {show(arg)} (a key is set by --key=value): {hint}")


def run_file(arg: str, path: str, keys: dict[str, Key], config: dict, given: set[str]) -> dict:
    """Return the values of all keys after a config file has run over those so far, or fail."""
    try:
        values = runpy.run_path(path, config)
        tree = ast.parse(Path(path).read_bytes())
    except (Exception, SystemExit) as error:
        fail(show(arg)[1:-1] + describe(error, path))
    for node in tree.body[ast.get_docstring(tree) is not None:]:
        v = getattr(node, "value", node)  # a call, such as print(...), may do what it likes
        if v is None or type(node) is ast.Expr and (type(v) is not ast.Call or ast.unparse(v.func) == "dict"):
            fail(f"{show(arg)[1:-1]} line {node.lineno} sets no key: write key = value")  # JSON, say
    stored = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    lines = dict.fromkeys(keys, "") | {node.id: f" line {node.lineno}" for node in stored}
    for name, line in lines.items():
        try:
            if name in keys:
                values[name] = coerce(keys[name], values.get(name, config[name]))
            elif name in values and not name.startswith("_"):
                raise ValueError(f"unknown key {show(name)} (a helper begins with _): {nearest(name, keys)}")
        except Exception as error:
            fail(f"{show(arg)[1:-1]}{line}: {error}")
    given |= {name for name in keys if lines[name] or values[name] != config[name]}
    return {name: values[name] for name in keys}


def describe(error: BaseException, path: str) -> str:
    """Return " line N: what happened", without the line if the file's own code did not raise the error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return (f" line {lines[-1]}" if lines else "") + f": {type(error).__name__}: {error}"
