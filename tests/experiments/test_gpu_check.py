"""experiments.gpu_check on a CPU: it runs whole, and each kind of check can fail."""
import json

import pytest
import torch

from lib.kernels import torch_body

SMALL = ["--device=cpu", "--widths=16,", "--tokens=40", "--iterations=3"]


def read(folder, done):
    checks = json.loads((folder / "gpu_check.json").read_text())["checks"]
    failed = [c["check"] for c in checks if not c["passed"]]
    assert done.stdout.splitlines()[-1] == f"{len(checks)} checks, {len(failed)} failed"
    return {c["check"] for c in checks}, failed


def test_gpu_check(run, tmp_path):
    done = run("experiments.gpu_check", *SMALL, f"--out={tmp_path}", TRITON_INTERPRET="0")
    names, failed = read(tmp_path, done)
    assert done.returncode == 0 and not failed, done.stdout
    for name in ("torch btt_moe 16 x 16 bfloat16: error",
                 "torch btt_moe 16 x 8 float32: bitwise the same again",
                 "torch btt_moe 16 x 8 float32: expert without tokens", "time of btt_moe torch 16 float32",
                 "torch dense_moe 16 float32: compiled is eager", "training of moe eager",
                 "training of btt_moe with torchrun on 1"):
        assert name in names
    assert "open an issue" in done.stdout


def wrong_sum():
    """The sum over an expert's tiles is off by 2 %, but in the float64 of the truth."""
    core_gradient = torch_body.core_gradient
    torch_body.core_gradient = lambda left, *args: core_gradient(left, *args) * (
        1 if left.dtype == torch.float64 else 1.02)


def garbage():
    """What a kernel that skips an expert without rows leaves there."""
    core_gradient = torch_body.core_gradient

    def broken(left, right, tile_expert, like):
        grad = core_gradient(left, right, tile_expert, like)
        if len(like) > 1 and like.dtype != torch.float64:
            grad[1] = torch.empty_like(grad[1]).fill_(float("nan"))
        return grad
    torch_body.core_gradient = broken


def random_sum():
    """Rounding that differs from run to run, as atomic additions have it."""
    core_gradient = torch_body.core_gradient
    torch_body.core_gradient = lambda left, *args: core_gradient(left, *args) * (
        1 + 1e-6 * torch.rand((), dtype=left.dtype))


@pytest.mark.parametrize("broken, kind", [(wrong_sum, "error"), (garbage, "expert without tokens"),
                                          (random_sum, "bitwise the same again")])
def test_checks_fail(run, tmp_path, broken, kind):
    done = run("experiments.gpu_check", *SMALL, "--training=False", f"--out={tmp_path}", before=broken,
               TRITON_INTERPRET="0")
    _, failed = read(tmp_path, done)
    assert done.returncode == 1
    assert f"torch btt_moe 16 x 8 float32: {kind}" in failed, done.stdout


def test_a_training_run_that_fails(run, tmp_path):
    done = run("experiments.gpu_check", *SMALL, "--iterations=1", f"--out={tmp_path}", TRITON_INTERPRET="0")
    _, failed = read(tmp_path, done)
    assert done.returncode == 1 and "training of moe eager" in failed  # one loss cannot fall
