"""Every program with a terminal that lacks the letters, a pipe that nobody reads, and a full disk."""
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import model
from tests.conftest import ROOT, SMALL, SOURCES, THREADS, TINY
from tests.runs import assert_one_sentence, assert_same_checkpoint

# found by their last lines or their keys, so that another program is among them from its first day
STARTS = ('if __name__ == "__main__"', "config = configure(")
PROGRAMS = [path.relative_to(ROOT) for path in SOURCES if not path.name.startswith("test_")
            and any(line.startswith(STARTS) for line in path.read_text(encoding="utf-8").splitlines())]
TRAIN, SAMPLE, PREPARE = map(Path, ("train.py", "sample.py", "data/openwebtext_char/prepare.py"))
ARGUMENTS = {"experiments/structures_table.py": ["16"]}  # all others have --help
# what they do is what they print: they end with their reader, as by SIGPIPE; the others go on
NEED_A_READER = {"sample.py", "experiments/structures_table.py", "tests/kill_test.py", "tools/compare.py",
                 "tools/export.py", "tools/project.py"}


def command(program):
    """What follows `python` when a user starts the program: with -m where it is of a package."""
    if program.parts[0] in ("experiments", "tests", "tools"):
        return ["-m", ".".join(program.with_suffix("").parts).removesuffix(".__main__")]
    return [program]


def start(program, *arguments, **options):
    """The program in a Python of its own, as a user starts it."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300, "cwd": ROOT} | options
    encoding = options.pop("encoding", "utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": THREADS, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, *command(program), *map(str, arguments)], env=environment,
                          **options)
    return subprocess.CompletedProcess(done.args, done.returncode, (done.stdout or b"").decode(encoding),
                                       (done.stderr or b"").decode(encoding))


@pytest.fixture
def closed_pipe():
    """The end to write to of a pipe that has no reader any more."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_all_programs_are_found():
    assert {"train.py", "sample.py", "data/openwebtext/prepare.py", "experiments/search/__main__.py",
            "tests/kill_test.py"} <= set(map(str, PROGRAMS))


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_a_terminal_that_lacks_the_letters(program, run, run_here):
    """It shows "?" for them, and all the rest."""
    script, arguments = str(command(program)[-1]), ARGUMENTS.get(str(program), ["--help"])
    ascii_only = run(script, *arguments, PYTHONIOENCODING="ascii")
    assert (ascii_only.returncode, ascii_only.stderr) == (0, ""), ascii_only.stderr
    # pytest rewrites modules of tests/, and runpy does not find them then
    whole = run(script, *arguments).stdout if "tests" in program.parts else run_here(script, *arguments)[1]
    assert whole and ascii_only.stdout == whole.encode("ascii", "replace").decode()


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_a_closed_pipe_has_no_traceback(program, closed_pipe):
    done = start(program, *ARGUMENTS.get(str(program), ["--help"]), stdout=closed_pipe)
    assert (done.returncode, done.stderr) == (128 + 13 if str(program) in NEED_A_READER else 0, "")


@pytest.fixture(scope="module")
def snowmen(tmp_path_factory):
    """A checkpoint whose vocabulary has a letter that few terminals have."""
    config = dict(block_size=8, vocab_size=2, n_layer=1, n_head=1, n_embd=4)
    path = tmp_path_factory.mktemp("snowmen") / "ckpt.pt"
    torch.save({"model": model.GPT(model.GPTConfig(**config)).state_dict(), "model_args": config,
                "tokenizer": {"name": "char", "characters": "a\N{SNOWMAN}"}}, path)
    return [f"--out_dir={path}", "--start=a\N{SNOWMAN}", "--device=cpu"]


def test_a_sample_in_letters_that_the_terminal_lacks(snowmen, run):
    flags = [*snowmen, "--max_new_tokens=20"]
    whole, plain = (run("sample.py", *flags, PYTHONIOENCODING=encoding) for encoding in ("utf-8", "cp1252"))
    assert plain.returncode == 0 and plain.stderr == "" and "\N{SNOWMAN}" in whole.stdout[2:]
    assert plain.stdout == whole.stdout.replace("\N{SNOWMAN}", "?")


def test_a_sample_ends_with_its_reader(snowmen, closed_pipe):
    """It does not go on to its last token, which would take months."""
    done = start(SAMPLE, *snowmen, "--max_new_tokens=1000000000", stdout=closed_pipe)
    assert (done.returncode, done.stderr) == (128 + 13, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_sample_that_a_full_disk_does_not_take_is_one_sentence(snowmen):
    with open("/dev/full", "wb") as full:
        done = start(SAMPLE, *snowmen, "--max_new_tokens=1000000000", stdout=full)
    assert_one_sentence(done, "the output cannot be written: No space left on device")


@pytest.mark.parametrize("output", ["closed pipe", pytest.param("full disk", marks=pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="no /dev/full"))])
def test_a_run_does_not_need_its_output(output, closed_pipe, python_text, trained, tmp_path):
    """Neither stdout nor stderr; it ends well, as a run whose output is read."""
    settings = SMALL | TINY | {"dataset": python_text, "out_dir": tmp_path / "out", "sample_tokens": 3}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    with open("/dev/full" if output == "full disk" else os.devnull, "wb") as file:
        stream = closed_pipe if output == "closed pipe" else file
        done = start(TRAIN, "config/dense.py", "config/quickstart.py", *flags, stdout=stream, stderr=stream)
    assert done.returncode == 0
    assert_same_checkpoint(tmp_path / "out", trained(**TINY))


def test_a_dataset_does_not_need_the_output(closed_pipe, tmp_path):
    """Nor do the progress bars."""
    (tmp_path / "text.txt").write_text("a line of text\n" * 100)
    done = start(PREPARE, "--source", tmp_path / "text.txt", "--out-dir", tmp_path, stdout=closed_pipe,
                 stderr=closed_pipe)
    assert done.returncode == 0 and (tmp_path / "meta.json").exists()


def test_ctrl_c_has_no_traceback(snowmen):
    """And the exit status is that of the signal."""
    process = subprocess.Popen([sys.executable, SAMPLE, *snowmen, "--max_new_tokens=1000000000"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout.read(4)  # it is at work
        threading.Thread(target=process.stdout.read, daemon=True).start()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"interrupted\n"
    assert process.returncode == -signal.SIGINT
