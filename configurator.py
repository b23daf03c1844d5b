"""Config files and --key=value over a block of commented globals.

    import configurator
    # I/O
    out_dir: str = 'out'            # where checkpoints go
    rank: int | None = None         # None: the structure's own
    config = configurator.configure(globals())
    globals().update(config)

`python train.py config/btt.py --rank=4` runs the file, then sets the key: left to right, and a later one wins. --help
lists the keys. Whatever a user can get wrong ends in one sentence and exit status 1. Standard library only: a script
that calls this before `import torch` answers a bad flag at once.
"""
import ast
import dataclasses
import difflib
import glob
import io
import math
import os
import runpy
import sys
import tokenize
import traceback
import types
from typing import NoReturn

HERE = os.path.dirname(os.path.abspath(__file__))
TYPES = {'int': int, 'float': float, 'bool': bool, 'str': str, 'tuple': tuple}
TAKES = {int: 'a whole number such as 8', float: 'a finite number such as 6e-4', bool: 'True or False',
         str: "text such as 'out'", tuple: 'finite numbers such as (1, 0, 0.5)'}
BOOLS = {'true': True, '1': True, 'yes': True, 'on': True, 'false': False, '0': False, 'no': False, 'off': False}
DASHES = '\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d'    # what editors make of a typed hyphen


@dataclasses.dataclass(frozen=True)
class Key:
    name: str
    type: type          # one of TYPES
    optional: bool      # None is a value of it
    default: object
    heading: str        # the comment above its group
    help: str           # the comment at the end of its line

    def takes(self) -> str:
        return TAKES[self.type] + (', or None' if self.optional else '')


def configure(namespace: dict, argv: list[str] | None = None) -> dict:
    """Return {key: value} for the keys that the calling script assigns before this call.

    namespace is the script's globals(); argv defaults to sys.argv[1:]. Raises SystemExit(1) after one sentence on
    stderr for a user's mistake, SystemExit(0) after --help, ValueError or TypeError for a mistake in the block itself.
    """
    keys = read_keys(namespace['__file__'])
    config = {key.name: key.default for key in keys.values()}
    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ('-h', '--help'):
            if is_first_process():
                print_help(namespace['__file__'], keys, config)
            raise SystemExit(0)
        if not arg.strip():
            fail('an argument is empty: give a config file or --key=value')
        if arg.startswith('-'):
            name, text = split_flag(arg, keys)
            config[name] = parse(keys[name], text)
        else:
            config = run_file(arg, find_file(arg, keys), keys, config)
    return config


def fail(message: str) -> NoReturn:
    """Print `error: message` as one line on stderr, once per machine under torchrun, and raise SystemExit(1)."""
    if is_first_process():
        line = ' '.join(message.split())
        print('error:', ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    raise SystemExit(1)


def structure_config(name: str) -> dict:
    """Return {key: value} that the structure config config/<name>.py sets, or end in one sentence if it is none."""
    path = os.path.join(HERE, 'config', f'{name}.py')
    if not os.path.exists(path):
        fail(f'there is no structure config {name!r} in config/')
    values = {k: v for k, v in runpy.run_path(path).items() if not k.startswith('_')}
    for key in ('dataset', 'n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size'):
        if key in values:
            fail(f'config/{name}.py sets {key}, so it is no structure config: those set the structure alone')
    return values


def is_first_process() -> bool:
    return os.environ.get('LOCAL_RANK', '0') == '0'


# The block of keys at the head of the script

def read_keys(path: str) -> dict[str, Key]:
    """Return the keys of a script, in order, or raise TypeError or ValueError if its block is not well formed."""
    with tokenize.open(path) as file:
        source = file.read()
    headings, notes = read_comments(source)
    keys, heading = {}, ''
    for node in ast.parse(source, path).body:
        calls = [ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]
        if 'configure' in calls or 'configurator.configure' in calls:
            return keys
        for name, annotation, default in assigned(node):
            heading = headings.get(node.lineno - 1, heading)
            kind, optional = read_type(name, annotation, default)
            key = Key(name, kind, optional, default, heading, notes.get(node.end_lineno, ''))
            keys[name] = dataclasses.replace(key, default=coerce(key, default))
    raise ValueError(f'{path} does not call configure() at module level')


def read_comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return {line: text} of the comments at the left margin (adjacent ones joined), and of the others."""
    headings, notes = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (line, column), text = token.start, token.string.lstrip('#').strip()
            if column == 0:
                headings[line] = f'{headings.get(line - 1, "")} {text}'.strip()
            else:
                notes[line] = text
    return headings, notes


def assigned(node: ast.stmt) -> list[tuple[str, ast.expr | None, object]]:
    """Return (name, annotation, literal) of each key that a statement assigns."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    names = [name for name in names if not name.startswith('_') and name == name.lower()]
    annotation = getattr(node, 'annotation', None)
    try:
        return [(name, annotation, ast.literal_eval(node.value)) for name in names]
    except (TypeError, ValueError):
        if annotation is None:
            return []       # a plain variable of the script, not a key
        raise TypeError(f'the default of {names[0]} is not a literal') from None


def read_type(name: str, annotation: ast.expr | None, default: object) -> tuple[type, bool]:
    """Return (type, whether None is allowed), from the annotation or, without one, from the default."""
    written = ast.unparse(annotation).strip('\'"') if annotation else type(default).__name__
    parts = [part.strip() for part in written.split('|')]
    kinds = [part for part in parts if part != 'None']
    if len(kinds) != 1 or kinds[0] not in TYPES:
        raise TypeError(f"{name}: annotate it with one of {', '.join(TYPES)} (| None), not {written}")
    return TYPES[kinds[0]], 'None' in parts


# Values

def parse(key: Key, text: str) -> object:
    """Return the value that a text on the command line gives the key, or fail."""
    if key.type is not str and not text.strip():
        fail(f"--{key.name}= has no value after '=': it takes {key.takes()}")
    if key.optional and text in ('None', 'none', 'null'):
        return None
    if key.type is str:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in '\'"'
        return text[1:-1] if quoted else text
    try:
        if key.type is bool:
            return BOOLS[text.strip().lower()]
        return coerce(key, parse_tuple(text) if key.type is tuple else parse_number(text))
    except (KeyError, ValueError):
        fail(f'--{key.name} takes {key.takes()}, not {show(text)}')


def parse_number(text: str) -> int | float:
    if not text.isascii():      # int() and float() take the digits of any script
        raise ValueError(text)
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_tuple(text: str) -> tuple:
    text = text.strip()
    if text[0] + text[-1] in ('()', '[]'):
        text = text[1:-1].strip()
    parts = text.removesuffix(',').split(',') if text else []
    return tuple(parse_number(part) for part in parts)


def coerce(key: Key, value: object) -> object:
    """Return a Python value in the key's type; raise ValueError with a sentence if it does not fit."""
    def is_number(x):       # exact types: True is an int, and numpy's numbers do not belong in a checkpoint
        return type(x) is int or type(x) is float and math.isfinite(x)

    if value is None and key.optional or key.type in (bool, str) and type(value) is key.type:
        return value
    if key.type is int and is_number(value) and value == int(value):
        return int(value)
    if key.type is float and is_number(value) and abs(value) <= sys.float_info.max:
        return float(value)
    if key.type is tuple and type(value) in (tuple, list) and all(map(is_number, value)):
        return tuple(value)
    raise ValueError(f'{key.name} takes {key.takes()}, not {show(value)}')


def show(value: object) -> str:
    """Return a short repr that cannot fail; letters that only look like ASCII are escaped."""
    try:
        text = ascii(value)
    except Exception:       # an int of 5,000 digits, or a broken __repr__
        text = f'a value of type {type(value).__name__}'
    return text if len(text) <= 120 else text[:120] + '...'


# The command line

def split_flag(arg: str, keys: dict[str, Key]) -> tuple[str, str]:
    """Return (key, text) of --key=text, or fail."""
    written, equals, text = arg.removeprefix('--').partition('=')
    name = written.replace('-', '_')
    if not arg.startswith('--') or not written.strip('-'):
        fail(f'{show(arg)} is not a setting: write --key=value, with two dashes')
    if name not in keys:
        fail(f'unknown key {show(written)}: {nearest(name, keys, "--")}')
    if not equals:
        fail(f"--{name} has no value: write --{name}={'True' if keys[name].type is bool else 'VALUE'}, with no spaces")
    return name, text


def nearest(name: str, keys: dict[str, Key], prefix: str = '') -> str:
    close = difflib.get_close_matches(name.lower(), keys, n=1)
    return f'did you mean {prefix}{close[0]}?' if close else '--help lists the keys'


def print_help(script: str, keys: dict[str, Key], config: dict) -> None:
    """Print the usage, and by group each key with its present value, type and comment."""
    lines = [f'usage: python {os.path.basename(script)} [config file | --key=value] ...',
             'Left to right, a later one wins. The keys, with their values as of here:']
    heading = None
    for key in keys.values():
        if key.heading != heading:
            heading = key.heading
            lines += ['', heading]
        kind = key.type.__name__ + (' | None' if key.optional else '')
        lines.append(f'  --{key.name + "=" + show(config[key.name]):36} {kind:12} {key.help}'.rstrip())
    encoding = sys.stdout.encoding or 'utf-8'       # a comment may hold letters that the terminal does not have
    print('\n'.join(lines).encode(encoding, 'replace').decode(encoding))


# Config files

def find_file(arg: str, keys: dict[str, Key]) -> str:
    """Return the path of a config file, looked for in the working directory and beside this file, or fail."""
    paths = [arg, os.path.join(HERE, arg)]
    for path in filter(os.path.isfile, paths):
        return path
    if any(map(os.path.isdir, paths)):
        fail(f'{show(arg)} is a folder: give a config file, such as one in it')
    if arg[0] in DASHES or arg.partition('=')[0].replace('-', '_') in keys:
        fail(f'{show(arg)} is not a setting: write --key=value, with two plain dashes')
    stems = [os.path.basename(path)[:-3] for folder in (os.curdir, HERE)
             for path in glob.glob(os.path.join(glob.escape(folder), 'config', '*.py'))]
    close = difflib.get_close_matches(os.path.basename(arg).removesuffix('.py'), stems, n=1)
    hint = f'did you mean config/{close[0]}.py?' if close else 'give the path of a file, or --key=value'
    fail(f'there is no config file {show(arg)}: {hint}')


def run_file(arg: str, path: str, keys: dict[str, Key], config: dict) -> dict:
    """Return the values of all keys after running a config file over those so far, or fail naming file and line."""
    shown, config, namespace = show(arg)[1:-1], dict(config), {**config, '__name__': '__config__', '__file__': path}
    try:
        with open(path, encoding='utf-8-sig') as file:
            source = file.read()
        tree = ast.parse(source, path)
        exec(compile(tree, path, 'exec', dont_inherit=True), namespace)
    except (Exception, SystemExit) as error:
        fail(f'{shown}{describe(error, path)}')
    imported, lines = bound_names(tree)
    for name in namespace:
        value, where = namespace[name], f'{shown} line {lines[name]}' if name in lines else shown
        if name in keys:
            try:
                config[name] = coerce(keys[name], value)
            except ValueError as error:
                fail(f'{where}: {error}')
        elif not (name.startswith('_') or name in imported or callable(value) or isinstance(value, types.ModuleType)):
            fail(f'{where}: unknown key {show(name)}: {nearest(name, keys)} (a helper starts with an underscore)')
    for node in idle(tree):
        fail(f'{shown} line {node.lineno}: {show(ast.get_source_segment(source, node))} sets no key: write key = value')
    return config


def idle(tree: ast.Module) -> list[ast.stmt]:
    """Return the statements of a file that set nothing, such as JSON or YAML mistaken for a config; not its docstring."""
    body = tree.body[ast.get_docstring(tree) is not None:]
    return [node for node in body if isinstance(node, ast.Expr) or isinstance(node, ast.AnnAssign) and node.value is None]


def bound_names(tree: ast.Module) -> tuple[set[str], dict[str, int]]:
    """Return the names that a file imports from modules, and {name: the last line that assigns it}."""
    imported, lines = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = max(node.lineno, lines.get(node.id, 0))
    return imported, lines


def describe(error: BaseException, path: str) -> str:
    """Return ' line N: what happened', without the line if the error did not come from the file's own code."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line, message = lines[-1] if lines else None, f'{type(error).__name__}: {error}'
    if isinstance(error, SystemExit):
        message = 'a config file only sets keys and must not exit'
    elif isinstance(error, SyntaxError) and error.filename == path:
        line, message = error.lineno, f'SyntaxError: {error.msg}'
    return f' line {line}: {message}' if line else f': {message}'
