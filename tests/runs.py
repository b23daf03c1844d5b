"""What small runs of train.py leave behind: read, and compared."""
import json
import math

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig


def in_float64():
    """A hook for `before`: the model computes in float64.

    In float32 another order of summation can change which experts a router chooses, or which token is the
    likeliest. In float64 the difference is some 1e-15, and a tie that near does not occur.
    """
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # the logits, which the model casts to float32


def load(path):
    return torch.load(path, weights_only=True)


def name_run(path, run_id):
    """Makes a checkpoint one of the run of this name; None: as those of older versions, without one."""
    checkpoint = load(path) | dict(run_id=run_id)
    path.unlink()  # its bytes may be another file's too
    torch.save(checkpoint, path)


def read_log(out):
    """(descriptions of the run, {iteration: train point}, {iteration: eval point}); no point may come
    twice."""
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (out / "log.jsonl").read_text().splitlines()]
    of = {kind: [line for line in lines if line["type"] == kind] for kind in ("run", "train", "eval")}
    assert sum(map(len, of.values())) == len(lines) and lines[0]["type"] == "run"
    points = [{p["iter"]: p for p in of[kind]} for kind in ("train", "eval")]
    assert [len(p) for p in points] == [len(of["train"]), len(of["eval"])]
    return of["run"], *points


def losses(out):
    """({iteration: training loss}, {iteration: validation loss})."""
    _, steps, evals = read_log(out)
    return {i: p["loss"] for i, p in steps.items()}, {i: p["val_loss"] for i, p in evals.items()}


def untimed(out):
    """All points of a log, without what depends on a clock."""
    _, steps, evals = read_log(out)
    timed = {"ms_per_iter", "tokens_per_s", "utilization", "iterations"}
    return [{k: v for k, v in p.items() if k not in timed} for p in [*steps.values(), *evals.values()]]


def cross_entropy(checkpoint, ids, length=32, starts=None):
    """Mean cross-entropy of a checkpoint's model, in float64, over windows of so many tokens: the first 16
    validation windows, or those that start there."""
    gpt = GPT(GPTConfig(**checkpoint["model_args"])).double().eval()
    gpt.load_state_dict(checkpoint["model"])
    golden = (5 ** 0.5 - 1) / 2
    starts = starts or [math.floor(i * golden % 1 * (len(ids) - length)) for i in range(16)]
    windows = torch.tensor([list(ids[start:start + length + 1]) for start in starts])
    with torch.no_grad():
        logits, _ = gpt(windows[:, :-1], windows[:, 1:])
    return -logits.double().log_softmax(-1).gather(-1, windows[:, 1:, None]).mean().item()


def assert_same_checkpoint(a, b):
    """Bitwise the same model, optimizer and counters."""
    a, b = load(a / "ckpt.pt"), load(b / "ckpt.pt")
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for i, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer"]["state"][i][name]), (i, name)
    for name in ("iteration", "tokens", "flops", "best_val_loss", "model_args", "tokenizer"):
        assert a[name] == b[name], name


def assert_same_course(a, b, tolerance=1e-9):
    """The same losses, gradient norms, loads of experts and weights at the end, up to rounding in float64."""
    (_, steps_a, evals_a), (_, steps_b, evals_b) = read_log(a), read_log(b)
    assert steps_a.keys() == steps_b.keys() and evals_a.keys() == evals_b.keys()
    for i, p in steps_a.items():
        assert p["loss"] == pytest.approx(steps_b[i]["loss"], abs=tolerance), i
        assert p["grad_norm"] == pytest.approx(steps_b[i]["grad_norm"], rel=100 * tolerance), i
        assert [p[k] for k in ("tokens", "flops", "lr")] == [steps_b[i][k] for k in ("tokens", "flops", "lr")]
    for i, p in evals_a.items():
        assert p["val_loss"] == pytest.approx(evals_b[i]["val_loss"], abs=tolerance), i
        assert np.allclose(p["router_load"], evals_b[i]["router_load"], rtol=0, atol=tolerance), i
    weights_a, weights_b = (load(out / "ckpt.pt")["model"] for out in (a, b))
    assert weights_a.keys() == weights_b.keys()
    for name, weight in weights_a.items():
        torch.testing.assert_close(weight, weights_b[name], rtol=0, atol=100 * tolerance, msg=name)


def assert_one_sentence(done, *words):
    """The process failed with one line on stderr, which holds these words."""
    assert done.returncode not in (0, None) and done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)
