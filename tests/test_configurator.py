"""configurator.py, through small scripts: in this process, and as programs of their own."""
import contextlib
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator

ROOT = Path(configurator.__file__).resolve().parent
SCRIPT = '''"""A script."""
import json
from typing import Literal
from configurator import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from configurator import Seed, UnitFloat, configure

# I/O, not a heading: an import stands between
import sys

# I/O
out_dir: str = "out"            # where # checkpoints go
eval_interval: int = 2000       # iterations between evaluations
rank: PositiveInt | None = None  # None: the structure's own \N{SQUARE ROOT}d
theta: tuple | None = None
tag: str | None = None

# AdamW
learning_rate: float = 6e-4     # peak
grad_clip: NonNegativeFloat = 1
compile: bool = True
top_k: int = 2
betas: tuple = (
    0.9,
    0.95,
)                               # of Adam
# ranges and choices
warmup: NonNegativeInt = 0
budget: PositiveFloat = 3e12
dropout: UnitFloat = 0.0
seed: Seed = 1337
mode: Literal["scratch", "resume", "auto"] = "scratch"  # what to start from
dtype: Literal["float32", "bfloat16"] | None = None
CONSTANT = 3
helper = 4
path = CONSTANT + helper
config = configure(globals())
after: int = 5
globals().update(config)
print(json.dumps(config))
'''
DEFAULTS = {"out_dir": "out", "eval_interval": 2000, "rank": None, "theta": None, "tag": None,
            "learning_rate": 6e-4,
            "grad_clip": 1.0, "compile": True, "top_k": 2, "betas": (0.9, 0.95), "warmup": 0, "budget": 3e12,
            "dropout": 0.0, "seed": 1337, "mode": "scratch", "dtype": None}
TYPES = {name: type(value) for name, value in DEFAULTS.items()}
TYPES |= {"rank": int, "theta": tuple, "tag": str, "dtype": str}
OPTIONAL = {"rank", "theta", "tag", "dtype"}
CHOICES = {"mode": {"scratch", "resume", "auto"}, "dtype": {"float32", "bfloat16"}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with script.py and an empty config/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(configurator, "HERE", str(tmp_path / "nowhere"))
    (tmp_path / "config").mkdir()
    write("script.py", SCRIPT)
    return tmp_path


def run(*argv):
    """Return (config or None, exit code or None, stdout, stderr) of configure(argv) on script.py."""
    out, err = io.StringIO(), io.StringIO()
    config, code = None, None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            config = configurator.configure({"__file__": "script.py"}, list(argv))
        except SystemExit as stop:
            code = stop.code
    return config, code, out.getvalue(), err.getvalue()


def configured(*argv):
    config, code, _, err = run(*argv)
    assert code is None, err
    return config


def error(*argv):
    """Return the one sentence that argv fails with."""
    config, code, out, err = run(*argv)
    assert config is None and code == 1 and out == ""
    assert err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1
    return err


def program(script, *argv, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run([sys.executable, str(script), *argv], env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, encoding="utf-8")


def write(name, text):
    Path(name).write_text(text, encoding="utf-8")
    return name


def same(value, expected):
    return type(value) is type(expected) and value == expected


# The block

def test_keys_are_the_annotated_globals_before_the_call():
    config = configured()
    assert config == DEFAULTS and list(config) == list(DEFAULTS)
    assert type(config["grad_clip"]) is float


def test_globals_are_not_touched_and_each_call_is_fresh():
    namespace = {"__file__": "script.py", "rank": 99}
    configurator.configure(namespace, ["--rank=3"])
    assert namespace == {"__file__": "script.py", "rank": 99}
    assert configurator.configure(namespace, [])["rank"] is None


def test_argv_defaults_to_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--rank=7"])
    assert configurator.configure({"__file__": "script.py"})["rank"] == 7


def test_keys_that_are_set_are_told_apart_from_those_that_have_their_default(monkeypatch):
    """Whatever the value; also those that a file imports, and not those that it only reads."""
    write("some_values.py", "learning_rate = 0.25\n")
    write("file.py", "from some_values import learning_rate\nif True:\n    seed = 1337\n_twice = 2 * top_k\n")
    monkeypatch.syspath_prepend(".")
    names = set()
    configurator.configure({"__file__": "script.py"}, ["--rank=None", "file.py"], names)
    assert names == {"rank", "seed", "learning_rate"}


@pytest.mark.parametrize("block", [
    "rank: int = None", "rank: int", "rank: int = 1.5", "rank: complex = 1", "rank: int | str = 1",
    "rank: list = []",
    "rank: list[int] = []", "rank: int = len('abc')", "rank: PositiveInt = 0", "rank: UnitFloat = 1.0",
    "rank: Literal['a', 'b'] = 'c'", "rank: Literal[1, 2] = 1", "n: int = True", "x: float = 1e999",
    "x: None = None"])
def test_a_malformed_block_is_an_exception(block):
    write("script.py", f"{block}\nconfig = configurator.configure(globals())\n")
    with pytest.raises((TypeError, ValueError)):
        configurator.configure({"__file__": "script.py"}, [])


def test_a_script_without_the_call_is_an_exception():
    write("script.py", "rank: int = 1\noptimizer = model.configure_optimizers(rank)\n")
    with pytest.raises(ValueError, match="configure"):
        configurator.configure({"__file__": "script.py"}, [])


@pytest.mark.parametrize("call", ["globals().update(configure(globals()))",
    "c = configurator.configure(globals(), [])"])
def test_keys_end_at_the_call_however_it_is_written(call):
    write("script.py", f"if True:\n    inner: int = 1\na: int = 1\n{call}\nb: int = 2\n")
    assert configured("--a=3") == {"a": 3}


def test_the_help_text_is_the_comment_and_no_part_of_the_default():
    write("script.py", "mark: str = '#öööööööö#'  # of a run\nother: str = '#'\nconfigure(globals())\n")
    keys = configurator.read_keys("script.py")
    assert (keys["mark"].help, keys["other"].help) == ("of a run", "")


def test_every_key_of_train_has_a_heading_and_a_help_text():
    keys = configurator.read_keys(str(ROOT / "train.py")).values()
    assert len(keys) > 40 and [key.name for key in keys if not key.heading or not key.help] == []


# Values on the command line

@pytest.mark.parametrize("arg, value", [
    ("--top_k=20", 20), ("--top_k=1_000", 1000), ("--top_k=1e4", 10000), ("--top_k=2.5e3", 2500),
    ("--top_k=-3", -3),
    ("--seed=9007199254740993", 9007199254740993), ("--seed=007", 7),
    ("--learning_rate=1e-3", 1e-3), ("--learning_rate=1", 1.0), ("--learning_rate=-.5", -0.5),
    ("--compile=true", True), ("--compile=1", True), ("--compile=YES", True), ("--compile=On", True),
    ("--compile=False", False), ("--compile=0", False), ("--compile=no", False), ("--compile=OFF", False),
    ("--rank=None", None), ("--rank=none", None), ("--rank=null", None), ("--rank=8", 8),
    ("--theta=1,0,0.5", (1, 0, 0.5)), ("--theta=(1, 0, .5)", (1, 0, 0.5)), ("--theta=[1,0,.5]", (1, 0, 0.5)),
    ("--theta=1", (1,)), ("--theta=(1,)", (1,)), ("--theta=()", ()), ("--theta=None", None),
    ("--out_dir=a b", "a b"), ("--out_dir=a=b", "a=b"), ("--out_dir==", "="), ("--out_dir=", ""),
    ("--out_dir=\n", "\n"), ("--out_dir='", "'"), ("--out_dir=None", "None"), ("--out_dir=1", "1"),
    ("--out_dir=-x", "-x"), ("--out_dir=größe", "größe"), ("--tag=None", None), ("--tag=none", None),
    ("--tag=", ""), ("--out-dir=x", "x"), ("--eval-interval=3", 3),
    ("--mode=auto", "auto"), ("--dtype=None", None),
    ("--dtype=bfloat16", "bfloat16")])
def test_a_value_gets_the_type_of_its_key(arg, value):
    name = arg[2:].partition("=")[0].replace("-", "_")
    config = configured(arg)
    assert same(config[name], value) and config == {**DEFAULTS, name: value}


@pytest.mark.parametrize("text", [
    '"""Return"""', "'a' + 'b'", '"x"', "'x'", "''", '"', "'x\"", "'None'", '"None"', " x ", "\\n"])
def test_a_text_is_taken_as_it_is(text):
    """The shell has taken its own quotes: what is left, such as Python code, belongs to the text."""
    for name in ("out_dir", "tag"):
        assert configured(f"--{name}={text}") == {**DEFAULTS, name: text}


@pytest.mark.parametrize("name, texts", [
    ("top_k", ["1.5", "True", "None", "x", "1e400", "1e-3", "nan", "inf", "0x10", "1,2", "9" * 5000]),
    ("learning_rate", ["nan", "inf", "-Infinity", "1e999", "x", "None", "False", "1j", "1 2", "9" * 4000]),
    ("compile", ["2", "y", "maybe", "None", "1.0"]),
    ("theta", ["a", "1,,2", "1,,", ",", "(,)", "(1", "1)", "[1)", "((1,2),)", "1,nan", "1,True", "1;2",
    "(" * 5000]),
    ("rank", ["4.5", "NONE", "'None'"])])
def test_a_value_of_another_type_is_refused(name, texts):
    for text in texts:
        message = error(f"--{name}={text}")
        assert f"--{name} takes " in message and len(message) < 300


@pytest.mark.parametrize("name", [name for name in TYPES if TYPES[name] is not str])
@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_value_is_refused(name, text):
    assert f"--{name} takes " in error(f"--{name}={text}")


# Ranges and choices: (key, what is just right, what is just wrong, the words of the error)

RANGES = [
    ("rank", 1, 0, "rank must be at least 1; got 0"),
    ("rank", 2**31 - 1, 2**31, "rank must be below 2147483648; got 2147483648"),
    ("warmup", 0, -1, "warmup must be at least 0; got -1"),
    ("warmup", 2**31 - 1, 10**18, "warmup must be below 2147483648"),
    ("top_k", 2**31 - 1, 2**31, "top_k must be below 2147483648"),
    ("top_k", 1 - 2**31, -2**31, "top_k must be above -2147483648"),
    ("seed", 2**63 - 1, 2**63, "seed must be below 9223372036854775808"),
    ("seed", 0, -1, "seed must be at least 0"),
    ("budget", 5e-324, 0.0, "budget must be above 0; got 0.0"),
    ("budget", 9e29, 1e30, "budget must be below 1e+30"),
    ("grad_clip", 0.0, -1e-9, "grad_clip must be at least 0; got -1e-09"),
    ("grad_clip", 9e29, 1e300, "grad_clip must be below 1e+30; got 1e+300"),
    ("dropout", 0.0, -0.1, "dropout must be at least 0; got -0.1"),
    ("mode", "auto", "'auto'", "mode must be one of scratch, resume, auto; got \"'auto'\""),
    ("dropout", 0.999, 1.0, "dropout must be below 1; got 1.0"),
    ("mode", "resume", "Resume", "mode must be one of scratch, resume, auto; got 'Resume'"),
    ("mode", "auto", "", "mode must be one of scratch, resume, auto; got ''"),
    ("dtype", "float32", "fp16", "dtype must be one of float32, bfloat16, or None; got 'fp16'")]


@pytest.mark.parametrize("name, right, wrong, words", RANGES)
def test_a_flag_and_a_file_are_held_to_the_range_of_a_key(name, right, wrong, words):
    assert same(configured(f"--{name}={right}")[name], right)
    assert same(configured(write("a.py", f"{name} = {right!r}"))[name], right)
    assert f"error: --{words}" in error(f"--{name}={wrong}")
    assert f"error: a.py line 2: {words}" in error(write("a.py", f"\n{name} = {wrong!r}"))


# Arguments

def test_later_arguments_win():
    write("a.py", "rank = 1\ntop_k = rank")
    write("b.py", "rank = 2")
    assert configured("a.py", "b.py")["rank"] == 2
    assert configured("b.py", "a.py")["rank"] == 1
    assert configured("--rank=5", "a.py")["rank"] == 1
    assert configured("a.py", "--rank=5", "--rank=6")["rank"] == 6
    assert configured("a.py", "b.py")["top_k"] == 1


@pytest.mark.parametrize("argv, parts", [
    (["--learnin_rate=1"], ["unknown key 'learnin_rate'", "did you mean --learning_rate?"]),
    (["--Rank=1"], ["unknown key 'Rank'", "did you mean --rank?"]),
    (["--eval-intervall=1"], ["did you mean --eval_interval?"]),
    (["--zzzz=1"], ["unknown key 'zzzz'", "--help"]),
    (["--CONSTANT=1"], ["unknown key"]), (["--helper=1"], ["unknown key"]), (["--path=1"], ["unknown key"]),
    (["--after=1"], ["unknown key"]), (["--help=1"], ["unknown key"]),
    (["--compile"], ["'--compile' has no value", "write --compile=VALUE"]),
    (["--top_k", "4"], ["'--top_k' has no value", "write --top_k=VALUE", "no spaces"]),
    (["-rank=1"], ["'-rank'", "did you mean --rank?"]), (["-x"], ["'-x'"]), (["-"], ["'-'"]),
    (["--"], ["unknown key ''"]), (["---"], ["'-'"]), (["--=1"], ["unknown key ''"]),
    (["---rank=1"], ["did you mean --rank?"]), (["\u2013rank=1"], [r"'\u2013rank=1'", "--key=value"]),
    (["rank=1"], ["'rank=1'", "--key=value"]), (["eval-interval=1"], ["--key=value"]),
    ([""], ["''", "--key=value"]), ([" "], ["' '", "--key=value"]), (["\n\t"], ["--key=value"]),
    (["a\0b"], ["no config file"]), (["a\nb"], [r"'a\nb'"]), (["\x1b[31m"], [r"'\x1b[31m'"]),
    (["\udcff"], [r"'\udcff'"]), (["x" * 10000], ["no config file"])])
def test_a_wrong_argument_is_refused_in_one_sentence(argv, parts):
    message = error(*argv)
    assert all(part in message for part in parts), message
    assert message.isascii() and len(message) < 300


def test_a_message_is_folded_to_one_printable_line(capsys):
    with pytest.raises(SystemExit) as stop:
        configurator.fail("one\n two\r\n\u2028three \x1b[31m\u202e \udcff é")
    assert stop.value.code == 1
    assert capsys.readouterr() == ("", "error: one two three \\x1b[31m\\u202e \\udcff é\n")


@pytest.mark.parametrize("local_rank, lines", [("0", 1), ("1", 0), ("7", 0)])
def test_only_the_first_process_of_a_machine_prints(monkeypatch, local_rank, lines):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert run("--rank=x")[1:3] == (1, "") and len(run("--rank=x")[3].splitlines()) == lines
    assert run("--help")[1] == 0 and bool(run("--help")[2]) == bool(lines)


def test_a_structure_config_that_sets_the_scale_names_its_first_such_key(folder, monkeypatch, capsys):
    monkeypatch.setattr(configurator, "HERE", str(folder))
    keys = ("block_size", "dataset", "n_embd", "n_head", "n_layer", "vocab_size")
    for first, second in itertools.combinations(keys, 2):
        write("config/wide.py", f"{second} = 1\nstruct = 'btt'\n{first} = 2\n")
        with pytest.raises(SystemExit):
            configurator.structure_config("wide")
        assert f"config/wide.py sets {first}, so" in capsys.readouterr().err


# --help

@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_keys_by_group(flag):
    config, code, out, err = run(flag)
    assert config is None and code == 0 and err == ""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("usage: python script.py ")
    assert lines[2:] == [
        "I/O",
        "--out_dir='out' str where # checkpoints go",
        "--eval_interval=2000 int iterations between evaluations",
        "--rank=None int at least 1 | None None: the structure's own \N{SQUARE ROOT}d",
        "--theta=None tuple | None",
        "--tag=None str | None",
        "",
        "AdamW",
        "--learning_rate=0.0006 float peak",
        "--grad_clip=1.0 float at least 0",
        "--compile=True bool",
        "--top_k=2 int",
        "--betas=(0.9, 0.95) tuple of Adam",
        "",
        "ranges and choices",
        "--warmup=0 int at least 0",
        "--budget=3000000000000.0 float above 0",
        "--dropout=0.0 float at least 0 below 1",
        "--seed=1337 int at least 0",
        "--mode='scratch' scratch | resume | auto what to start from",
        "--dtype=None float32 | bfloat16 | None"]


def test_help_shows_what_came_before_it():
    write("a.py", "top_k = 77")
    out = run("a.py", "--rank=55", "--help", "--rank=66")[2]
    assert "--top_k=77 " in out and "--rank=55 " in out


def test_help_of_a_package_says_how_to_start_it():
    os.makedirs("folder/package")
    for name in ("package/__main__", "module"):
        write(f"folder/{name}.py", SCRIPT)
    for name in ("folder.package", "folder.module"):
        assert program("-m", name, "--help").stdout.startswith(f"A script.\nusage: python -m {name} [")


# Config files

def test_a_file_computes_from_the_values_so_far():
    write("config/a.py", """import math
from math import pi, e as euler, sqrt as root
from os import path
_half = 0.5
def double(x):
    y = 2 * x
    return y
class Thing:
    size = 3
top_k = double(eval_interval) // 100 + Thing.size
theta = [1, 0, _half]
eval_interval = 5e3
learning_rate = 1
compile = not compile
out_dir = f"{out_dir}-größe"
tag: str = "x"
""")
    config = configured("--eval_interval=1000", "config/a.py")
    expected = {**DEFAULTS, "top_k": 23, "theta": (1, 0, 0.5), "eval_interval": 5000, "learning_rate": 1.0,
                "compile": False, "out_dir": "out-größe", "tag": "x"}
    assert config == expected and all(same(config[name], expected[name]) for name in expected)


def test_a_file_may_set_none_where_the_key_allows_it():
    write("a.py", "rank = None\ntheta = None")
    assert configured("--rank=3", "--theta=1", "a.py") == DEFAULTS


@pytest.mark.parametrize("source, rank", [('"rank = 4"', None), ("'''About.\n'''\nrank = 4", 4),
    ("del rank", 3), ("", 3)])
def test_a_file_may_have_a_docstring_and_need_not_set_a_key(source, rank):
    assert configured("--rank=3", write("a.py", source))["rank"] == (rank or 3)


def test_a_file_with_a_byte_order_mark_and_another_locale():
    Path("a.py").write_bytes("\N{BYTE ORDER MARK}out_dir = 'größe'\r\n".encode())
    result = program("script.py", "a.py", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.stderr == "" and json.loads(result.stdout)["out_dir"] == "größe"


@pytest.mark.parametrize("source, parts", [
    ("rank = 1\n\nlearnin_rate = 1", ["a.py line 3: unknown key 'learnin_rate'",
    "did you mean learning_rate?"]),
    ("for i in range(3):\n    pass", ["line 1: unknown key 'i'", "begins with _"]),
    ("if rank is None:\n    n_head = 3", ["line 2: unknown key 'n_head'"]),
    ("with open(__file__) as f:\n    _x = (n := 3)", ["line 1: unknown key 'f'"]),
    ("N = 3", ["unknown key 'N'"]), ("l\u0435arning_rate = 3", [r"unknown key 'l\u0435arning_rate'"]),
    ("rank = 1\nrank = 1.5", ["a.py line 2: rank takes whole numbers", "or None", "not 1.5"]),
    ("rank = True", ["rank takes", "not True"]), ("rank = '4'", ["not '4'"]),
    ("top_k = None", ["top_k takes", "not None"]), ("learning_rate = float('nan')", ["not nan"]),
    ("learning_rate = 1e999", ["not inf"]), ("learning_rate = 10 ** 400", ["learning_rate takes"]),
    ("learning_rate = 10 ** 5000", ["a.py line 1: "]),
    ("learning_rate = True", ["learning_rate takes"]),
    ("compile = 1", ["compile takes True or False, not 1"]),
    ("out_dir = 3", ["out_dir takes text"]), ('out_dir = b"x"', ["out_dir takes"]),
    ("theta = 1", ["theta takes"]),
    ("theta = (1, True)", ["theta takes"]), ("theta = (1, (2,))", ["theta takes"]),
    ("theta = '123'", ["theta takes"]),
    ("theta = [1, float('inf')]", ["theta takes"]), ("theta = {1, 2}", ["theta takes"]),
    ("class _I(int): pass\nrank = _I(3)", ["a.py line 2: rank takes"]),
    ("class _I:\n    def __repr__(self): raise ValueError(\"odd\")\nrank = _I()", ["a.py line 3: "]),
    ("def rank(): pass", ["a.py: rank takes"]), ("import math as rank", ["rank takes"]),
    ("rank = 1\nrank =", ["a.py: SyntaxError: invalid syntax", "line 2"]),
    ("if rank:\nrank = 2", ["expected an indented block", "line 2"]),
    ('rank = "', ["a.py: SyntaxError", "line 1"]),
    ("(" * 3000, ["a.py"]), ("rank = 1 \0", ["a.py", "null"]),
    ("\nrank = 1 // 0", ["a.py line 2: ZeroDivisionError: "]),
    ("def _f():\n    return {}[3]\nrank = _f()", ["a.py line 2: KeyError: 3"]),
    ("\nimport no_such_module", ["a.py line 2: ModuleNotFoundError: No module named 'no_such_module'"]),
    ("import json\njson.loads('x')", ["a.py line 2: JSONDecodeError"]),
    ("import broken", ["a.py line 1: SyntaxError", "broken.py, line 2"]),
    ("def f(): f()\nf()", ["RecursionError"]), ("input()", ["line 1: EOFError"]),
    ("import sys\nsys.exit(0)", ["a.py line 2: SystemExit"]),
    ("raise SystemExit('bye')", ["line 1: SystemExit"]),
    ('{"rank": 4}', ["a.py line 1 sets no key"]), ("rank: 4", ["line 1 sets no key"]),
    ("rank == 4", ["line 1 sets no key"]), ("top_k = 2\n(4, rank)", ["line 2 sets no key"]),
    ("rank", ["line 1 sets no key"]), ("[" * 150 + "]" * 150, ["sets no key"]),
    ("del rank\ntop_k = rank", ["a.py line 2: NameError: name 'rank' is not defined"])])
def test_a_wrong_file_is_refused_in_one_sentence(monkeypatch, folder, source, parts):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    write("broken.py", "\nx =")
    message = error(write("a.py", source))
    assert message.startswith("error: a.py") and all(part in message for part in parts), message


def test_a_file_may_call_and_compute_with_numpy():
    """What it calls need not set a key; what numpy computes is a number like any other."""
    code = "import numpy as np\nprint('hi')\ntop_k = np.int64(3)\nlearning_rate = np.sqrt(0.25)"
    config, status, out, _ = run(write("a.py", code))
    assert status is None and out == "hi\n"
    assert same(config["top_k"], 3) and same(config["learning_rate"], 0.5)


def test_a_file_that_is_not_text():
    Path("a.py").write_bytes(b'out_dir = "gr\xf6\xdfe"')
    assert "a.py: SyntaxError: " in error("a.py") and "utf-8" in error("a.py")


def test_an_interrupt_is_not_swallowed():
    write("a.py", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        run("a.py")


def test_a_missing_file_suggests_the_nearest():
    write("config/btt_moe.py", "")
    write("config/quickstart.py", "")
    for name in ("config/btt_moe", "btt_moe", "bt_moe.py", "configs/btt_mo.py", "config\\btt_moe.py"):
        assert "did you mean config/btt_moe.py?" in error(name), name
    assert "there is no config file 'zzz.py'" in error("zzz.py") and "did you mean" not in error("zzz.py")
    assert "there is no config file 'config'" in error("config")


def test_files_are_found_from_any_directory(folder):
    """In the working directory first, then beside configurator.py."""
    (folder / "repo" / "config").mkdir(parents=True)
    (folder / "elsewhere").mkdir()
    shutil.copy(ROOT / "configurator.py", folder / "repo")
    shutil.move(folder / "script.py", folder / "repo")
    write("repo/config/a.py", "rank = 1")
    os.chdir("elsewhere")
    script = folder / "repo" / "script.py"
    assert json.loads(program(script, "config/a.py", PYTHONPATH="").stdout)["rank"] == 1
    assert json.loads(program(script, str(folder / "repo" / "config" / "a.py"),
    PYTHONPATH="").stdout)["rank"] == 1
    assert "did you mean config/a.py?" in program(script, "a.py", PYTHONPATH="").stderr
    os.mkdir("config")
    assert json.loads(program(script, "config/a.py", PYTHONPATH="").stdout)["rank"] == 1
    write("config/a.py", "rank = 2")
    assert json.loads(program(script, "config/a.py", PYTHONPATH="").stdout)["rank"] == 2


# As a program

def test_a_program_gets_its_globals():
    write("script.py", SCRIPT + 'assert (rank, out_dir, after) == (4, "x", 5)\n')
    write("a.py", "rank = 3\n")
    result = program("script.py", "a.py", "--rank=4", "--out-dir=x")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {**DEFAULTS, "betas": [0.9, 0.95], "rank": 4, "out_dir": "x"}


@pytest.mark.parametrize("argv", [["--rank=1.5"], ["a.py"], ["--rank"], ["missing.py"], ["--learn=1"],
    ["--rank=0"]])
def test_a_program_prints_one_line_and_stops(argv):
    write("a.py", "rank = int(input('a number: '))")
    result = program("script.py", *argv)
    assert result.returncode == 1 and result.stdout.strip() in ("", "a number:")
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="arguments are bytes on POSIX only")
@pytest.mark.parametrize("arg", [b"--\xff=1", b"\xff", b"--rank=\xff"])
def test_bytes_that_are_not_utf8(arg):
    result = program("script.py", arg)
    assert result.returncode == 1 and result.stderr.startswith("error: "), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_torch_is_not_imported():
    code = "import sys, configurator; print(*[name for name in ('torch', 'numpy') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "")


# Whatever is typed

def is_right(name, value):
    if value is None:
        return name in OPTIONAL
    numbers = value if type(value) is tuple else [value] if type(value) in (int, float) else []
    return (type(value) is TYPES[name] and value in CHOICES.get(name, {value})
            and all(type(n) in (int, float) and math.isfinite(n) for n in numbers))


def check_outcome(*argv):
    config, code, out, err = run(*argv)
    if code == 0:
        assert {"-h", "--help"} & set(argv) and out and not err
    elif code is None:
        assert list(config) == list(DEFAULTS) and all(is_right(name, value) for name, value in config.items())
        assert out == err == ""
    else:
        assert code == 1 and out == "" and err.startswith("error: ")
        assert err[-1] == "\n" and err[:-1].isprintable()     # so it is one line


words = st.text(max_size=12) | st.text("-=_.,eE+0123456789()[] '\"NonTrueinfa", max_size=12)
numbers = st.integers() | st.floats()
names = st.sampled_from([*DEFAULTS, "path", "rnak"])
flags = st.builds("--{}={}".format, names | words, words | numbers | st.tuples(numbers,
                  numbers) | st.lists(numbers))
literals = st.recursive(st.none() | st.booleans() | numbers | st.text(max_size=5) | st.binary(max_size=5),
                        lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner), max_leaves=5)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(words | flags, max_size=3))
def test_any_arguments_end_in_a_config_or_one_sentence(argv):
    check_outcome(*argv)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(names, literals), max_size=3))
def test_any_assignments_in_a_file_end_in_a_config_or_one_sentence(pairs):
    lines = [f"{name} = {value!r}" for name, value in pairs]
    write("fuzz.py", "\n".join(["inf, nan = float('inf'), float('nan')", *lines, "del inf, nan"]))
    check_outcome("fuzz.py")


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(["out_dir", "tag", "top_k", "compile", "learning_rate", "theta"]),
       st.integers(-2**30, 2**30) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
       | st.text(max_size=8) | st.tuples(st.integers(), st.floats(allow_nan=False, allow_infinity=False)))
def test_the_command_line_reads_a_text_and_the_repr_of_all_else_as_a_file_does(name, value):
    if type(value) is TYPES[name] and value not in ("None", "none", "null"):
        typed = value if type(value) is str else repr(value)
        write("fuzz.py", f"{name} = {value!r}")
        assert same(configured(f"--{name}={typed}")[name], value) and same(configured("fuzz.py")[name], value)
