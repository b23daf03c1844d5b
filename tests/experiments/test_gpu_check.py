"""experiments.gpu_check on a CPU: it runs whole, and each kind of check can fail."""
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import launcher
from lib.kernels import c_body, torch_body

SMALL = ["--device=cpu", "--widths=16,", "--tokens=40", "--iterations=3"]


def read(folder, done):
    checks = json.loads((folder / "gpu_check.json").read_text())["checks"]
    failed = [c["check"] for c in checks if not c["passed"]]
    assert done.stdout.splitlines()[-1] == f"{len(checks)} checks, {len(failed)} failed"
    return {c["check"] for c in checks}, failed


def compile_without_code():
    """Tracing is what differs between layers; tests/test_compile.py has C++."""
    compiled = torch.compile
    torch.compile = lambda layer, **options: compiled(layer, backend="aot_eager", **options)


def test_gpu_check(run, tmp_path):
    done = run("experiments.gpu_check", *SMALL, f"--out={tmp_path}", before=compile_without_code,
               TRITON_INTERPRET="0")
    names, failed = read(tmp_path, done)
    assert done.returncode == 0 and not failed, done.stdout
    for name in ("torch btt_moe 16 x 16 bfloat16: error",
                 "torch btt_moe 16 x 8 float32: bitwise the same again",
                 "torch btt_moe 16 x 8 float32: expert without tokens", "time of btt_moe torch 16 float32",
                 "torch dense_moe 16 float32: compiled is torch's", "torch btt 16 float32: eager is torch's",
                 "generation of btt_moe: the cache changes no token", "training of moe auto eager",
                 "training of btt_moe eager with torchrun on 1"):
        assert name in names
    assert "open an issue" in done.stdout


def break_core_gradient():
    """With 8 experts, a sum over an expert's tiles that is off by 2 %; with 16, rounding that differs from
    run to run, as atomic additions have it, and garbage for an expert without rows. float64 stays right.
    The C body, without experts, has outputs that are off by 3 %, eager and compiled."""
    core_gradient, calls = torch_body.core_gradient, itertools.count()

    def broken(left, right, tile_expert, like):
        grad = core_gradient(left, right, tile_expert, like)
        if left.dtype == torch.float64:
            return grad
        if len(like) == 16:
            grad = grad * (1 + 1e-6 * (next(calls) % 5))
            grad[1] = 1e-9
        return grad * 1.02 if len(like) == 8 else grad
    torch_body.core_gradient = broken
    forward = c_body.forward

    def broken_forward(x, first, *others):
        y, *routing = forward(x, first, *others)
        return y * 1.03 if len(first) == 1 else y, *routing
    c_body.forward = broken_forward
    torch.compile = lambda layer, **_: layer  # takes long, and is not what fails here

    def broken_run(command, timeout):
        """torchrun fails, and the loss of a run of train.py rises."""
        if "torch.distributed.run" in command:
            return 1, "", "a line\nno network\n"
        [folder] = [word.partition("=")[2] for word in command if word.startswith("--out_dir=")]
        os.makedirs(folder)
        with open(os.path.join(folder, "log.jsonl"), "w") as f:
            f.writelines(json.dumps(dict(type="train", iter=i, loss=9.0 + i, tokens_per_s=1.0,
                                         utilization=None, peak_memory=None)) + "\n" for i in range(3))
        return 0, "", ""
    launcher.run_alone = broken_run


def test_checks_fail(run, tmp_path):
    done = run("experiments.gpu_check", *SMALL, f"--out={tmp_path}",
               before=break_core_gradient, TRITON_INTERPRET="0")
    _, failed = read(tmp_path, done)
    assert done.returncode == 1
    assert {name for name in failed if name.startswith("torch") and "float32" in name} == {
        "torch btt_moe 16 x 8 float32: error", "torch btt_moe 16 x 8 float32, top 1: error",
        "torch btt_moe 16 x 8 float32, given experts: error",
        "torch btt_moe 16 x 8 float32, given logits: error",
        "torch btt_moe 16 x 16 float32: expert without tokens",
        "torch btt_moe 16 x 16 float32: bitwise the same again"}, done.stdout
    assert {name for name in failed if name.startswith("c ")} == {
        "c btt 16 float32: eager is torch's", "c btt 16 float32: compiled is torch's"}
    assert "training of moe auto eager" in failed  # whose loss rises
    assert "FAILED btt_moe eager with torchrun on 1: error no network" in done.stdout


def end_at_the_first_run():
    torch.compile = lambda layer, **_: layer
    launcher.run_alone = lambda command, timeout: os._exit(9)


def test_what_ends_the_process_leaves_the_checks_before(run, tmp_path):
    done = run("experiments.gpu_check", *SMALL, f"--out={tmp_path}", before=end_at_the_first_run,
               TRITON_INTERPRET="0")
    names = [c["check"] for c in json.loads((tmp_path / "gpu_check.json").read_text())["checks"]]
    assert done.returncode == 9 and names[-1].startswith("time of generation of btt_moe") and len(names) > 20


def test_no_process_of_a_run_outlives_it(tmp_path, monkeypatch):
    """torchrun's workers, which would keep their GPUs, are in sessions of their own. The time is up when the
    worker is there."""
    place, script = tmp_path / "pid", tmp_path / "worker.py"
    script.write_text(f"import os, time\nprint(os.getpid(), file=open({str(place)!r}, 'w'), flush=True)\n"
                      "time.sleep(1000)\n")

    def communicate(process, timeout):
        while not (place.exists() and place.read_text().endswith("\n")) and process.poll() is None:
            time.sleep(0.1)
        raise subprocess.TimeoutExpired(process.args, timeout)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "communicate", communicate)
        with pytest.raises(subprocess.TimeoutExpired):
            launcher.run_alone([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                "--nproc_per_node=1", str(script)], timeout=40)
    stat = Path("/proc", place.read_text().strip(), "stat")
    for _ in range(100):    # nobody may have waited for it yet: then it is a zombie, Z
        if not stat.exists() or stat.read_text().rsplit(") ")[1][0] in "ZX":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker goes on")
    assert launcher.run_alone([sys.executable, "-c", "print(5)"], timeout=60) == (0, "5\n", "")
