"""Config files and --key=value over a block of commented globals.

    from typing import Literal
    from configurator import PositiveInt, configure
    # I/O
    out_dir: str = "out"                                        # where checkpoints go
    rank: PositiveInt | None = None                             # None: the structure's own
    init_from: Literal["scratch", "resume"] = "scratch"         # where the weights come from
    config = configure(globals())
    globals().update(config)

`python train.py config/btt.py --rank=4` runs the file, then sets the key. Arguments are read from left to right, and a
later one wins. --help lists the keys. A mistake of the user ends in one sentence and exit status 1. This file needs the
standard library only, so a script that calls it before `import torch` reports a bad flag at once.
"""
import ast
import difflib
import glob
import io
import math
import operator
import os
import runpy
import sys
import tokenize
import traceback
import types
import typing
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NoReturn

HERE = os.path.dirname(os.path.abspath(__file__))

# Types of keys. Their limits are checked on the command line, in config files and for the default.
PositiveInt = Annotated[int, (">=", 1), ("<", 2**31)]
NonNegativeInt = Annotated[int, (">=", 0), ("<", 2**31)]
Seed = Annotated[int, (">=", 0), ("<", 2**63)]
PositiveFloat = Annotated[float, (">", 0), ("<", 1e30)]         # below 1e30, its products fit float32
NonNegativeFloat = Annotated[float, (">=", 0), ("<", 1e30)]
UnitFloat = Annotated[float, (">=", 0), ("<", 1)]
TYPES = {"int": Annotated[int, (">", -2**31), ("<", 2**31)], "float": float, "bool": bool, "str": str, "tuple": tuple,
         "PositiveInt": PositiveInt, "NonNegativeInt": NonNegativeInt, "Seed": Seed, "PositiveFloat": PositiveFloat,
         "NonNegativeFloat": NonNegativeFloat, "UnitFloat": UnitFloat, "Literal": Literal}
COMPARISONS = {">=": (operator.ge, "at least"), ">": (operator.gt, "above"), "<": (operator.lt, "below")}
TAKES = {int: "a whole number such as 8", float: "a finite number such as 6e-4", bool: "True or False",
         str: "text such as 'out'", tuple: "finite numbers such as (1, 0, 0.5)"}
BOOLS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


@dataclass(frozen=True)
class Key:
    name: str
    type: type                                      # int, float, bool, str or tuple
    optional: bool                                  # whether None is a value of it
    choices: tuple[str, ...]                        # the values that a Literal names; (): any
    limits: tuple[tuple[str, float], ...]           # (">=", 1): the value must be at least 1
    default: object
    heading: str                                    # the comment above its group
    help: str                                       # the comment at the end of its line

    def takes(self) -> str:
        return TAKES[self.type] + (", or None" if self.optional else "")

    def kind(self) -> str:
        """Return the type as --help shows it, without the limits that only keep a number in the computer's range."""
        limits = ", ".join(f"{sign} {limit}" for sign, limit in self.limits if abs(limit) <= 1)
        shown = " | ".join(self.choices) or f"{self.type.__name__} {limits}".strip()
        return shown + (" | None" if self.optional else "")


def configure(namespace: dict, argv: list[str] | None = None) -> dict:
    """Return {key: value} for the keys that the calling script assigns before this call.

    namespace is the script's globals(); argv defaults to sys.argv[1:]. Raises SystemExit(1) after one sentence on
    stderr for a user's mistake, SystemExit(0) after --help, ValueError or TypeError for a mistake in the block itself.
    """
    keys = read_keys(namespace["__file__"])
    config = {key.name: key.default for key in keys.values()}
    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ("-h", "--help"):
            if is_first_process():
                print_help(namespace["__file__"], keys, config)
            raise SystemExit(0)
        if not arg.strip():
            fail("an argument is empty: give a config file or --key=value")
        if arg.startswith("-"):
            name, text = split_flag(arg, keys)
            config[name] = parse(keys[name], text)
        else:
            config = run_file(arg, find_file(arg, keys), keys, config)
    return config


def fail(message: str) -> NoReturn:
    """Print `error: message` as one line on stderr, once per machine under torchrun, and raise SystemExit(1)."""
    if is_first_process():
        line = " ".join(message.split())
        print("error:", "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    raise SystemExit(1)


def structure_config(name: str) -> dict:
    """Return {key: value} that the structure config config/<name>.py sets, or end in one sentence if it is none."""
    path = os.path.join(HERE, "config", f"{name}.py")
    if not os.path.exists(path):
        fail(f"there is no structure config {name!r} in config/")
    values = {k: v for k, v in runpy.run_path(path).items() if not k.startswith("_")}
    for key in ("dataset", "n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        if key in values:
            fail(f"config/{name}.py sets {key}, so it is no structure config: those set the structure alone")
    return values


def is_first_process() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


# The block of keys at the head of the script

def read_keys(path: str) -> dict[str, Key]:
    """Return the keys of a script, in order, or raise TypeError or ValueError if its block is not well formed."""
    with tokenize.open(path) as file:
        source = file.read()
    headings, notes = read_comments(source)
    keys, heading = {}, ""
    for node in ast.parse(source, path).body:
        calls = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
        if calls & {"configure", "configurator.configure"}:
            return keys
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [target.id for target in targets if isinstance(target, ast.Name) and target.id.islower()]
        for name in (name for name in names if not name.startswith("_")):
            annotation = getattr(node, "annotation", None)
            try:
                default = ast.literal_eval(node.value)
            except (TypeError, ValueError):
                if annotation is None:
                    continue                        # a plain variable of the script, not a key
                raise TypeError(f"the default of {name} is not a literal") from None
            written = ast.unparse(annotation).strip("'\"") if annotation else type(default).__name__
            heading = headings.get(node.lineno - 1, heading)
            key = Key(name, *read_type(name, written), default, heading, notes.get(node.end_lineno, ""))
            keys[name] = replace(key, default=coerce(key, default))
    raise ValueError(f"{path} does not call configure() at module level")


def read_type(name: str, written: str) -> tuple[type, bool, tuple, tuple]:
    """Return (type, whether None is allowed, choices, limits) of an annotation, given as source text."""
    try:
        hint = eval(written, {"__builtins__": {}}, TYPES)
    except Exception:
        hint = None
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (typing.get_args(hint) if is_union else [hint]) if kind is not types.NoneType]
    kind, *more = typing.get_args(kinds[0]) or kinds
    if len(kinds) == 1 and typing.get_origin(kinds[0]) is Literal and {type(c) for c in (kind, *more)} == {str}:
        return str, is_union, (kind, *more), ()
    if len(kinds) != 1 or kind not in TAKES:
        raise TypeError(f"{name}: annotate it with one of {', '.join(TYPES)} (| None), not {written}")
    return kind, is_union, (), tuple(more)


def read_comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return {line: text} of the comments at the left margin (adjacent ones joined), and of the others."""
    headings, notes = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (line, column), text = token.start, token.string.lstrip("#").strip()
            if column == 0:
                headings[line] = f"{headings.get(line - 1, '')} {text}".strip()
            else:
                notes[line] = text
    return headings, notes


# Values

def parse(key: Key, text: str) -> object:
    """Return the value that a text on the command line gives the key, or fail."""
    if key.type is not str and not text.strip():
        fail(f"--{key.name}= has no value after '=': it takes {key.takes()}")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    value = text[1:-1] if key.type is str and quoted else text
    if key.optional and text in ("None", "none", "null"):
        value = None
    elif key.type is not str:
        read = {bool: lambda text: BOOLS[text.strip().lower()], tuple: parse_tuple}.get(key.type, parse_number)
        try:
            value = read(text)
        except (KeyError, ValueError):
            pass                                    # coerce says what the key takes
    try:
        return coerce(key, value, show(text))
    except ValueError as error:
        fail(f"--{error}")


def parse_number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_tuple(text: str) -> tuple:
    text = text.strip()
    if text[0] + text[-1] in ("()", "[]"):
        text = text[1:-1].strip()
    parts = text.removesuffix(",").split(",") if text else []
    return tuple(parse_number(part) for part in parts)


def coerce(key: Key, value: object, written: str | None = None) -> object:
    """Return a Python value in the key's type; raise ValueError, with a sentence, if it does not fit.

    written is how the user wrote the value, where that is not its repr.
    """
    def is_number(x):       # exact types: True is an int, and numpy's numbers do not belong in a checkpoint
        return type(x) is int or type(x) is float and math.isfinite(x)

    if value is None and key.optional:
        return None
    if key.type is int and is_number(value) and value == int(value):
        value = int(value)
    elif key.type is float and is_number(value) and abs(value) <= sys.float_info.max:
        value = float(value)
    elif key.type is tuple and type(value) in (tuple, list) and all(map(is_number, value)):
        value = tuple(value)
    elif key.type not in (bool, str) or type(value) is not key.type:
        raise ValueError(f"{key.name} takes {key.takes()}, not {written or show(value)}")
    if key.choices and value not in key.choices:
        close = difflib.get_close_matches(value, key.choices, n=1)
        raise ValueError(f"{key.name} must be one of {', '.join(key.choices)}{', or None' * key.optional}; "
                         f"got {show(value)}{f' (did you mean {close[0]}?)' if close else ''}")
    for sign, limit in key.limits:
        compare, words = COMPARISONS[sign]
        if not compare(value, limit):
            raise ValueError(f"{key.name} must be {words} {limit}; got {show(value)}")
    return value


def show(value: object) -> str:
    """Return a short ASCII repr; it never fails."""
    try:
        text = ascii(value)
    except Exception:       # an int of 5,000 digits, or a broken __repr__
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 120 else text[:120] + "..."


# The command line

def split_flag(arg: str, keys: dict[str, Key]) -> tuple[str, str]:
    """Return (key, text) of --key=text, or fail."""
    written, equals, text = arg.removeprefix("--").partition("=")
    name = written.replace("-", "_")
    if not arg.startswith("--") or not written.strip("-"):
        fail(f"{show(arg)} is not a setting: write --key=value, with two dashes")
    if name not in keys:
        fail(f"unknown key {show(written)}: {nearest(name, keys, '--')}")
    if not equals:
        fail(f"--{name} has no value: write --{name}={'True' if keys[name].type is bool else 'VALUE'}, with no spaces")
    return name, text


def nearest(name: str, keys: dict[str, Key], prefix: str = "") -> str:
    close = difflib.get_close_matches(name.lower(), keys, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else "--help lists the keys"


def print_help(script: str, keys: dict[str, Key], config: dict) -> None:
    """Print the usage, and by group each key with its present value, type and comment."""
    lines = [f"usage: python {os.path.basename(script)} [config file | --key=value] ...",
             "Left to right, a later one wins. The keys, with their values as of here:"]
    heading = None
    for key in keys.values():
        if key.heading != heading:
            heading = key.heading
            lines += ["", heading]
        lines.append(f"  --{key.name + '=' + show(config[key.name]):36} {key.kind():18} {key.help}".rstrip())
    encoding = sys.stdout.encoding or "utf-8"       # a comment may hold letters that the terminal does not have
    print("\n".join(lines).encode(encoding, "replace").decode(encoding))


# Config files

def find_file(arg: str, keys: dict[str, Key]) -> str:
    """Return the path of a config file, looked for in the working directory and beside this file, or fail."""
    paths = [arg, os.path.join(HERE, arg)]
    for path in filter(os.path.isfile, paths):
        return path
    if any(map(os.path.isdir, paths)):
        fail(f"{show(arg)} is a folder: give a config file, such as one in it")
    if arg.partition("=")[0].replace("-", "_") in keys:
        fail(f"{show(arg)} is not a setting: write --key=value, with two dashes")
    stems = [os.path.basename(path)[:-3] for folder in (os.curdir, HERE)
             for path in glob.glob(os.path.join(glob.escape(folder), "config", "*.py"))]
    close = difflib.get_close_matches(os.path.basename(arg).removesuffix(".py"), stems, n=1)
    hint = f"did you mean config/{close[0]}.py?" if close else "give the path of a file, or --key=value"
    fail(f"there is no config file {show(arg)}: {hint}")


def run_file(arg: str, path: str, keys: dict[str, Key], config: dict) -> dict:
    """Return the values of all keys after running a config file over those so far, or fail naming file and line."""
    shown, config = show(arg)[1:-1], dict(config)
    namespace = {**config, "__name__": "__config__", "__file__": path}
    try:
        with open(path, encoding="utf-8-sig") as file:
            source = file.read()
        tree = ast.parse(source, path)
        exec(compile(tree, path, "exec", dont_inherit=True), namespace)
    except (Exception, SystemExit) as error:
        fail(f"{shown}{describe(error, path)}")
    imported = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                for alias in node.names}
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    lines = {node.id: node.lineno for node in sorted(stored, key=lambda node: node.lineno)}
    for name, value in namespace.items():
        where = f"{shown} line {lines[name]}" if name in lines else shown
        if name in keys:
            try:
                config[name] = coerce(keys[name], value)
            except ValueError as error:
                fail(f"{where}: {error}")
        elif not (name.startswith("_") or name in imported or callable(value) or isinstance(value, types.ModuleType)):
            fail(f"{where}: unknown key {show(name)}: {nearest(name, keys)} (a helper starts with an underscore)")
    for node in tree.body[ast.get_docstring(tree) is not None:]:
        if isinstance(node, ast.Expr) or isinstance(node, ast.AnnAssign) and node.value is None:    # JSON, YAML, a == b
            part = show(ast.get_source_segment(source, node))
            fail(f"{shown} line {node.lineno}: {part} sets no key: write key = value")
    return config


def describe(error: BaseException, path: str) -> str:
    """Return " line N: what happened", without the line if the error did not come from the file's own code."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line, message = lines[-1] if lines else None, f"{type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        message = "a config file only sets keys and must not exit"
    elif isinstance(error, SyntaxError) and error.filename == path:
        line, message = error.lineno, f"SyntaxError: {error.msg}"
    return f" line {line}: {message}" if line else f": {message}"
