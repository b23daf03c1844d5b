"""The rooms of the repository and what may import what: train, sample -> model -> structured -> lib."""
import ast

import pytest

from tests.conftest import ROOT, SOURCES

ROOMS = ("configurator", "data", "experiments", "lib", "model", "sample", "structured", "tests", "tools",
         "train")
# what the modules of a room may import of this repository; lib must not end the process, so not configurator
ALLOWED = {
    "lib": {"lib"}, "structured": {"lib"}, "model": {"lib", "structured"}, "configurator": set(),
    "data": {"data", "lib"},
    "train": {"configurator", "data", "lib", "model"}, "sample": {"configurator", "data", "lib", "model"},
    "experiments": {"configurator", "data", "experiments", "lib", "model", "structured"},
    "tools": {"configurator", "data", "lib", "model", "structured", "tools"},
}

def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [path for path in SOURCES if room_of(path) in ALLOWED]


def imported_rooms(path):
    """Rooms whose modules a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & set(ROOMS)


def test_the_five_files_are_the_only_programs_at_the_top():
    top = {path.name for path in ROOT.glob("*.py")}
    assert top == {"train.py", "model.py", "structured.py", "sample.py", "configurator.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    assert imported_rooms(path) <= ALLOWED[room_of(path)]


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "lib"],
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lib_does_not_end_the_process(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
        elif isinstance(node, ast.Raise) and node.exc:
            found.add(ast.unparse(node.exc))
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not {"exit", "quit", "sys.exit", "os._exit", "SystemExit"} & found


@pytest.mark.parametrize("name, limit", [("train.py", 450), ("structured.py", 600), ("configurator.py", 220)])
def test_the_files_that_are_read_in_one_sitting_stay_short(name, limit):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= limit


def test_no_program_writes_into_results_by_default():
    """A command of the README must not overwrite a published table."""
    defaults = []
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
                defaults.append(node.value.value)
    assert "out-scaling" in defaults  # the block of keys of experiments.scaling is among them
    assert not [value for value in defaults if isinstance(value, str) and value.startswith("results")]


def test_lines_end_within_110_characters():
    lines = [(path.relative_to(ROOT), number, line) for path in SOURCES
             for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    long = [f"{path}:{number}" for path, number, line in lines if len(line) > 110]
    assert not long
