"""What small runs of train.py leave: read, and compared."""
import json

import numpy as np
import pytest
import torch


def load(path):
    return torch.load(path, weights_only=True)


def read_log(out):
    """(descriptions of the run, {iteration: train point}, {iteration: eval point}); no point may come twice."""
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (out / "log.jsonl").read_text().splitlines()]
    of = {kind: [line for line in lines if line["type"] == kind] for kind in ("run", "train", "eval")}
    assert sum(map(len, of.values())) == len(lines) and lines[0]["type"] == "run"
    points = [{p["iter"]: p for p in of[kind]} for kind in ("train", "eval")]
    assert [len(p) for p in points] == [len(of["train"]), len(of["eval"])]
    return of["run"], *points


def losses(out):
    """{iteration: loss} and {iteration: val loss}."""
    _, steps, evals = read_log(out)
    return {i: p["loss"] for i, p in steps.items()}, {i: p["val_loss"] for i, p in evals.items()}


def untimed(out):
    """All points of a log, without what a clock says."""
    _, steps, evals = read_log(out)
    timed = {"ms_per_iter", "tokens_per_s", "utilization", "seconds"}
    return [{k: v for k, v in p.items() if k not in timed} for p in [*steps.values(), *evals.values()]]


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


def assert_same_course(a, b):
    (_, steps_a, evals_a), (_, steps_b, evals_b) = read_log(a), read_log(b)
    assert steps_a.keys() == steps_b.keys() and evals_a.keys() == evals_b.keys()
    for i, p in steps_a.items():
        assert p["loss"] == pytest.approx(steps_b[i]["loss"], abs=1e-4), i
        assert p["grad_norm"] == pytest.approx(steps_b[i]["grad_norm"], rel=1e-2), i
        assert [p[k] for k in ("tokens", "flops", "lr")] == [steps_b[i][k] for k in ("tokens", "flops", "lr")]
    for i, p in evals_a.items():
        assert p["val_loss"] == pytest.approx(evals_b[i]["val_loss"], abs=1e-4), i
        assert np.allclose(p["router_load"], evals_b[i]["router_load"], atol=0.01), i


def assert_one_sentence(done, *words):
    assert done.returncode not in (0, None) and done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)
