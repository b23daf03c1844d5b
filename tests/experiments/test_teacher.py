"""experiments.teacher: its teacher, its students' costs, and runs that experiments.scaling reads."""
import importlib
import json
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.scaling import fit
from model import num_params

FLAGS = ("--examples=2048", "--widths=32,", "--seeds=1,2", "--batch_size=256", "--teacher_width=16",
         "--learning_rates=3e-3,1e-2", "--tuned_at=16", "--base_width=16")


@pytest.fixture
def teacher(monkeypatch, tmp_path):
    """A function: the module as flags configure it, with runs in tmp_path."""
    def configured(*flags):
        monkeypatch.setattr(sys, "argv", ["teacher", *FLAGS, f"--out={tmp_path}", *flags])
        sys.modules.pop("experiments.teacher", None)
        module = importlib.import_module("experiments.teacher")
        module.BLOCK = 512
        return module
    yield configured
    sys.modules.pop("experiments.teacher", None)


def test_answers_are_those_of_a_relu_network_standardized(teacher):
    module = teacher()
    (x, y), (test_x, test_y) = module.make_data()
    assert x.shape == (2048, 8) and y.shape == (2048, 1) and test_x.shape == (512, 8)
    torch.testing.assert_close(test_y.mean().item(), 0.0, atol=1e-5, rtol=0)
    torch.testing.assert_close(test_y.std().item(), 1.0)
    weights = [weight.double().numpy() for weight in module.Teacher().weights]
    assert [weight.shape for weight in weights] == [(16, 8), *[(16, 16)] * 5, (1, 16)]
    np.testing.assert_allclose(np.std(weights[1:6]), (2 / 16) ** 0.5, rtol=0.1)

    def network(rows):
        for weight in weights[:-1]:
            rows = np.maximum(rows @ weight.T, 0)
        return rows @ weights[-1].T
    raw = network(test_x.double().numpy())
    expected = (network(x.double().numpy()) - raw.mean()) / raw.std(ddof=1)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert len(torch.cat([x, test_x]).unique(dim=0)) == 2560  # no example twice
    ratios = x[:16].flatten() / torch.as_tensor(weights[0]).flatten()[:128]
    assert ratios.std() > 0.1   # examples and weights are draws of their own


def test_answers_that_are_known_are_not_made_again(teacher, monkeypatch):
    (_, few), _ = teacher("--examples=1024").make_data()
    (_, many), _ = teacher().make_data()
    module = teacher()
    monkeypatch.setattr(module.Teacher, "__init__", None)  # all are in the file
    (_, again), _ = module.make_data()
    assert torch.equal(few, many[:1024]) and torch.equal(many, again)


@pytest.mark.parametrize("options, width", [
    (dict(struct="dense"), 32), (dict(struct="btt", rank=2), 64),
    (dict(struct="einsum", theta=(1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 4, 0)), 64),
    (dict(struct="btt", num_experts=4, top_k=2), 64)])
def test_flops_are_those_that_torch_counts(teacher, options, width):
    student = teacher().Student(width, options)
    with FlopCounterMode(display=False) as counter:
        student(torch.randn(64, 8))
    assert 64 * student.flops() == 3 * counter.get_total_flops()


def test_an_example_uses_top_k_of_the_experts(teacher):
    student = teacher().Student(64, dict(struct="btt", num_experts=4, top_k=1))
    expert = sum(p[0].numel() for layer in student.inner for p in layer.experts.parameters())
    count = sum(p.numel() for p in student.parameters())
    assert (num_params(student), num_params(student, active=True)) == (count, count - 3 * expert)


def test_routers_learn_to_balance_their_load(teacher, tmp_path):
    """Their losses have a weight: with a large one experts end with a like share, without they do not."""
    loads = {}
    for weight in (0.0, 10.0):
        module = teacher("--only=btt_moe")
        module.AUX_LOSS_WEIGHT = weight
        folder = tmp_path / str(weight)
        folder.mkdir()
        module.train(folder, "btt_moe", module.STRUCTURES["btt_moe"], 32, 1e-2, 1, module.make_data())
        loads[weight] = torch.tensor(fit.read_log(str(folder))[-1]["router_load"])   # (routers, experts)
    unevenness = {weight: (8 * load).std().item() for weight, load in loads.items()}
    assert loads[0.0].shape == (2, 8) and 1.5 * unevenness[10.0] < unevenness[0.0], unevenness


def test_runs_of_two_structures(teacher, tmp_path, capsys):
    module = teacher("--only=btt 1/2,btt_moe")
    assert module.main() == 0
    made = capsys.readouterr().out.splitlines()
    assert len(made) == 2 * 2 + 2 * 2  # rates, and seeds
    rates = {}
    for folder in (tmp_path / "rates").iterdir():
        points = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert points[-1]["tokens"] == 512  # a quarter of the examples
        label = json.loads((folder / "settings.json").read_text())["label"]
        rates.setdefault(label, {})[points[0]["config"]["learning_rate"]] = points[-1]["val_loss"]
    runs, notes = fit.read_runs([str(tmp_path / "runs")])
    assert {(run.label, run.size, run.config["seed"]) for run in runs} == {
        (label, "3 x 32", seed) for label in ("btt 1/2", "btt_moe") for seed in (1, 2)}
    for run in runs:
        assert run.config["learning_rate"] == min(rates[run.label], key=rates[run.label].get)
        assert run.config["loss"] == "mean squared error" and run.last == 2048
        assert run.points.losses[-1] < 1  # it has learned something
    one, other = (run for run in runs if run.label == "btt_moe")
    assert one.points.losses[-1] != other.points.losses[-1]  # seeds differ
    assert module.main() == 0 and not capsys.readouterr().out  # nothing is made again


def test_seeds_differ_in_their_weights(teacher, tmp_path):
    module = teacher()
    data, ends = module.make_data(), []
    for seed in (0, 1):  # both begin with the first example
        folder = tmp_path / str(seed)
        folder.mkdir()
        module.train(folder, "dense", dict(struct="dense"), 16, 1e-2, seed, data)
        ends.append(json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["val_loss"])
    assert ends[0] != ends[1]


@pytest.mark.parametrize("flags, words", [
    (["--only=btt 1/2,dens"], "no structure 'dens' here: did you mean dense?"),
    (["--only=dense", "--flops=10"], "less than a batch at width 16"),
    (["--only=dense", "--flops=1e7", "--widths=16,1024"], "less than a batch at width 1024"),
    (["--widths=64.5,"], "widths takes whole numbers of at least 1"), (["--seeds=()"], "seeds takes"),
    (["--learning_rates=()"], "learning_rates takes numbers above 0"),
    (["--widths=32,97", "--only=btt_moe"], "97"),
])
def test_a_mistake_is_one_sentence(teacher, tmp_path, capsys, flags, words):
    """Before any run."""
    with pytest.raises(SystemExit) as stop:
        module = teacher(*flags)
        module.run_program(module.main)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and words in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("log.jsonl"))


def test_a_folder_holds_runs_of_one_kind(teacher, tmp_path):
    teacher("--only=dense").check_settings()
    with pytest.raises(ValueError, match="have batch_size = 256, not 128: give another --out"):
        teacher("--batch_size=128").check_settings()
    with pytest.raises(ValueError, match=r"have learning_rates = \[0.003, 0.01\], not \[0.1\]"):
        teacher("--learning_rates=0.1,").check_settings()


def test_a_students_rates_are_those_of_mup(teacher, tmp_path, monkeypatch):
    """Of a dense student, base width 16: what has the width as fan-in learns at 16 / width of the rate."""
    module, rates = teacher("--examples=256"), {}

    def adam(groups):
        rates.update((tuple(group["params"][0].shape), group["lr"]) for group in groups)
        return torch.optim.SGD(groups, lr=1.0)
    monkeypatch.setattr(module.torch.optim, "Adam", adam)
    module.train(str(tmp_path), "dense", dict(struct="dense"), 64, 0.01, 1, module.make_data())
    assert rates == {(64, 8): 0.01, (64,): 0.01, (1, 64, 64): pytest.approx(0.0025),
                     (1, 64): pytest.approx(0.0025), (1,): 0.01}


def test_each_seed_begins_elsewhere_in_the_data(teacher, tmp_path, monkeypatch):
    module, firsts = teacher(), []
    data = module.make_data()
    forward = module.Student.forward
    monkeypatch.setattr(module.Student, "forward", lambda self, x, aux=None: (
        firsts.append(x[0]) if aux is not None else None, forward(self, x, aux))[1])
    places = []
    for seed in (1, 2, 3):
        firsts.clear()
        module.train(str(tmp_path), "dense", dict(struct="dense"), 16, 0.01, seed, data)
        places.append((data[0][0] == firsts[0]).all(1).nonzero().item())
    assert places[0] == 0 and len(set(places)) == 3
