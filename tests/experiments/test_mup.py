"""The two checks of µP: activations over widths (coordinate_check.py), learning rates over widths (scaling
transfer)."""
import csv
import importlib
import math
import sys

import pytest
import torch

from experiments.scaling import transfer
from model import GPT, GPTConfig
from tests.experiments.logs import write_log


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# Eight times the width, which makes exponents that are wrong by 1/2 a factor 2.8. Half the tokens where that
# is enough.
SMALL, LONG = ["--widths=64,512", "--seeds=1"], ["--widths=64,512", "--seeds=2"]
SHORT = [*SMALL, "--block_size=32"]


@pytest.mark.parametrize("structs, flags", [
    ("dense,tt,dyad,moe", SHORT), ("low_rank,kronecker,monarch,btt,einsum", SMALL), ("btt_moe", LONG)])
def test_coordinates_do_not_depend_on_width(run, python_text, tmp_path, structs, flags):
    done = run("experiments.coordinate_check", f"--structs={structs}", f"--dataset={python_text}",
               "--batch_size=4", f"--out={tmp_path}", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(tmp_path / "coordinate_check.csv")
    quantities = ["block 0", "block 1", "block 2", "attention logits", "output logits"]
    assert [(row["struct"], row["width"], row["quantity"]) for row in rows] == [
        (struct, width, quantity) for struct in structs.split(",")
        for width in flags[0].removeprefix("--widths=").split(",") for quantity in quantities]
    assert (tmp_path / "coordinate_check.png").stat().st_size > 10_000


def test_coordinates_grow_without_mup(run, python_text, tmp_path):
    done = run("experiments.coordinate_check", "--structs=dense", "--mup=False", "--widths=128,512",
               f"--dataset={python_text}", "--batch_size=4", "--seeds=1", f"--out={tmp_path}")
    assert done.returncode == 1 and "not below 2" in done.stdout
    narrow, wide = (float(row["rms"]) for row in read(tmp_path / "coordinate_check.csv")
                    if row["quantity"] == "block 0")
    assert wide > 4 * narrow


def test_coordinates_that_diverge_fail(run, python_text, tmp_path):
    """At a rate where nothing stays finite: not a number is no ratio below 2."""
    done = run("experiments.coordinate_check", "--structs=dense", "--widths=32,64", "--learning_rate=1e29",
               f"--dataset={python_text}", f"--out={tmp_path}")
    assert done.returncode == 1 and "inf" in done.stdout and "not below 2" in done.stdout
    assert "no figure: every value is 0 or not finite" in done.stdout and not done.stderr
    assert (tmp_path / "coordinate_check.csv").exists()


@pytest.fixture
def coordinate_check(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coordinate_check"])
    return importlib.import_module("experiments.coordinate_check")


def test_spread_is_the_largest_over_the_smallest(coordinate_check):
    sizes = dict(narrow=(0.5, 0.2, 0.4), late=(1.0, 1.0, 3.0), zero=(0.0, 1.0, 1.0),
                 lost=(1.0, math.nan, 1.0))
    rows = [dict(quantity=quantity, rms=rms) for i in range(3)
            for quantity, values in sizes.items() for rms in values[i:i + 1]]
    assert coordinate_check.spread(rows) == dict(narrow=2.5, late=3.0, zero=math.inf, lost=math.inf)


def test_measured_sizes_are_those_of_known_activations(coordinate_check):
    """A block that adds 3 to the residual stream, queries and keys whose product is known, and logits that
    are all 5."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=4, vocab_size=7, n_layer=1, n_head=2, n_embd=32, qk_norm=True))
    block = model.blocks[0]
    block.register_forward_hook(lambda module, inputs, output: inputs[0] + 3)
    # heads of 16: 16 · 2 · 0.5 · 8 / 16
    for norm, value in ((block.attn.q_norm, 2.0), (block.attn.k_norm, 0.5)):
        norm.register_forward_hook(lambda module, inputs, output, value=value: torch.full_like(output, value))
    model.lm_head.register_forward_hook(lambda module, inputs, output: torch.full_like(output, 5.0))
    x = torch.randint(7, (2, 4))
    found = coordinate_check.measure(model, x, x)
    assert found == pytest.approx({"block 0": 9, "attention logits": 64, "output logits": 25}, rel=1e-5)


@pytest.mark.parametrize("flags, word", [
    (["--structs=dense,bt"], "'bt'"), (["--structs=quickstart"], "is no structure config"),
    (["--widths=128,"], "widths"),
    (["--widths=100,200"], "widths"), (["--steps=1"], "steps"), (["--seeds=0"], "seeds"),
    (["--learning_rate=-1"], "learning_rate"), (["--dataset=nowhere"], "nowhere"),
    (["--structs=dense, dense"], "every structure once"), (["--structs=dense, bt"], "'bt'")])
def test_mistakes_in_a_coordinate_check_are_one_sentence(refused, tmp_path, flags, word):
    assert word in refused("experiments.coordinate_check", *flags, f"--out={tmp_path}/c")
    assert not (tmp_path / "c").exists()


def test_too_little_text_for_a_coordinate_check_is_one_sentence(refused, python_text, tmp_path):
    assert "too few for block_size = 9999999" in refused(
        "experiments.coordinate_check", "--block_size=9999999", f"--dataset={python_text}",
        f"--out={tmp_path}/c")


RATES = (1e-4, 1e-3, 1e-2, 1e-1)     # a step is a factor 10


def write_rates(folder, label, width, loss, rates=RATES, seed=1, its=20, **config):
    """Finished runs, one for each rate."""
    for rate in rates:
        config = dict(n_embd=width, n_head=width // 32, learning_rate=rate, seed=seed, decay_lr=True,
                      mup=True) | config
        config["learning_rate"] = rate
        write_log(folder / f"{label}-{width}-{rate}-{seed}", label, config, 6.0, [1000.0 * its],
                  [loss(math.log10(rate))])


@pytest.mark.parametrize("narrow, wide, stays", [
    (-3.0, -2.2, True), (-2.2, -3.0, True), (-3.4, -2.2, False), (-4.5, -4.2, False), (-1.5, -0.9, False)])
def test_the_minimum_may_move_by_one_step_within_the_grid(run, tmp_path, narrow, wide, stays):
    """Losses on a parabola over the logarithm of the rate, whose minimum is at 10^narrow and 10^wide."""
    for width, minimum in ((32, narrow), (64, wide)):
        write_rates(tmp_path / "runs", "btt", width, lambda u: 2 + (u - minimum) ** 2)
    done = run("experiments.scaling", "transfer", f"--runs={tmp_path}/runs", f"--out={tmp_path}/out")
    assert done.returncode == (0 if stays else 1) and ("<- moves" in done.stdout) == (not stays), done.stderr
    for width, minimum in ((32, narrow), (64, wide)):
        assert f"width {width}: " in done.stdout
        assert f"parabola's minimum at {10 ** minimum:.2g}" in done.stdout
    rows = read(tmp_path / "out" / "lr_transfer.csv")
    assert [(row["struct"], int(row["width"]), float(row["learning_rate"])) for row in rows] == [
        ("btt", width, rate) for width in (32, 64) for rate in RATES]
    assert float(rows[0]["val_loss"]) == pytest.approx(2 + (-4 - narrow) ** 2) and rows[0]["iters"] == "20"
    assert (tmp_path / "out" / "lr_transfer.png").stat().st_size > 10_000


def test_a_parabola_is_fitted_to_all_seeds(tmp_path, capsys):
    """3, 2 and 2.5 at 10^-4, 10^-3 and 10^-2: curvature 0.75, slope -0.25 at the middle, so that the minimum
    is 1/6 above it. Two seeds lie as much above as below; the best rate is that of the least mean."""
    middle = {-4: 3.0, -3: 2.0, -2: 2.5}
    for seed, off in ((1, 0.2), (2, -0.2)):
        for width in (32, 64):
            write_rates(tmp_path, "tt", width, lambda u: middle[round(u)] + off, rates=RATES[:3], seed=seed)
    assert transfer.transfer([str(tmp_path)], str(tmp_path / "out"))
    told = capsys.readouterr().out
    assert f"width 32: 2.0000 at 0.001, parabola's minimum at {10 ** (-3 + 1 / 6):.2g}" in told


def test_runs_that_do_not_count_are_named(tmp_path, capsys):
    """A diverged one, one that is shorter, and points of the grid that are missing."""
    write_rates(tmp_path, "btt", 32, lambda u: 2 + (u + 3) ** 2, decay_lr=False)
    write_rates(tmp_path, "btt", 64, lambda u: 2 + (u + 3) ** 2, rates=RATES[:3], decay_lr=False)
    write_rates(tmp_path, "btt", 64, lambda u: math.nan, rates=RATES[3:], decay_lr=False)
    write_rates(tmp_path, "btt", 64, lambda u: 0.0, rates=RATES[:1], seed=2, its=10, decay_lr=False,
                max_iters=20)
    assert transfer.transfer([str(tmp_path)], str(tmp_path / "out"))
    text = capsys.readouterr().out
    assert "btt-64-0.1-1: left out, diverged" in text
    assert "btt: there is no run of width 64 at learning rate 0.1" in text
    assert "btt-64-0.0001-2: left out, it ends before others" in text
    assert len(read(tmp_path / "out" / "lr_transfer.csv")) == 7


@pytest.mark.parametrize("widths, rates", [((32, 64), RATES[:2]), ((32,), RATES[:3])])
def test_two_rates_or_one_width_tell_nothing(tmp_path, widths, rates):
    for width in widths:
        write_rates(tmp_path, "btt", width, lambda u: 2 + (u + 3) ** 2, rates=rates)
    with pytest.raises(ValueError, match="^the runs of btt have fewer than two widths, or than three"):
        transfer.transfer([str(tmp_path)], str(tmp_path / "out"))


def test_runs_that_differ_in_more_than_the_rate_are_refused(tmp_path):
    write_rates(tmp_path, "btt", 32, lambda u: 2 + u ** 2)
    write_rates(tmp_path, "btt", 64, lambda u: 2 + u ** 2, mup=False)
    with pytest.raises(ValueError, match="runs of btt differ in more than width, rate, seed: mup is "):
        transfer.transfer([str(tmp_path)], str(tmp_path / "out"))
