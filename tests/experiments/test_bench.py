"""experiments.bench: what it counts and writes, never how fast anything is."""
import importlib
import json
import os
import sys

import pytest

from tests.experiments.logs import cells_of

NAMES = ["dense", "low_rank", "kronecker", "monarch", "tt", "btt", "einsum", "dyad", "btt_moe"]


def test_bench_writes_a_row_for_each_layer_and_config(run, tmp_path):
    done = run("experiments.bench", "--widths=32,64", "--tokens=96", "--turns=2", "--steps=2", "--n_embd=32",
               "--head_size=16",
               "--n_layer=1", "--block_size=16", "--batch_size=2", f"--out={tmp_path}/b")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert [(r["width"], r["layer"]) for r in result["layers"]] == [(d, n) for d in (32, 64)
                                                                    for n in ["nn.Linear", *NAMES]]
    assert [r["config"] for r in result["steps"]] == [*NAMES, "moe"]
    for row in result["layers"]:
        low, high = row["quartiles"]
        assert low <= row["ratio"] <= high and row["ms"] > 0
        assert f"| {row['width']} | {row['layer']} | " in done.stdout
    rows = {(r["width"], r["layer"]): r for r in result["layers"]}
    for d in (32, 64):
        linear, dense = rows[d, "nn.Linear"], rows[d, "dense"]
        assert linear["ratio"] == linear["flops"] == linear["time_per_flop"] == dense["flops"] == 1
        # output, its gradient in x, and the gradient of the weight: nothing else is alive at the peak
        assert linear["peak_bytes"] == pytest.approx(4 * (2 * 96 * d + d * d), rel=0.05)
        assert dense["peak_bytes"] == pytest.approx(linear["peak_bytes"], rel=0.05)
        assert linear["kept_bytes"] == dense["kept_bytes"] == 4 * 96 * d    # the output
    # Monarch keeps its output; z, what its first core makes of the rows, is computed again
    assert rows[64, "monarch"]["kept_bytes"] == pytest.approx(4 * 96 * 64, rel=0.2)
    # output, gradients in x and of two cores of 512 entries, and scratch
    assert rows[64, "monarch"]["peak_bytes"] > 4 * (2 * 96 * 64 + 2 * 512)
    assert rows[64, "dyad"]["flops"] == 0.5         # two matrices of 4 blocks of 16 x 16: 2048 of 4096
    assert rows[64, "monarch"]["flops"] == 0.25     # 8 · 8 · 8, twice: 1024
    assert rows[64, "btt_moe"]["flops"] == 0.625    # two experts of Monarch's, and a router of 64 x 8: 2560
    assert result["steps"][0]["speed"] == result["steps"][0]["flops"] == 1
    assert result["machine"]["threads"] == int(os.environ["OMP_NUM_THREADS"])
    assert result["config"]["tokens"] == 96
    head, _, *lines = cells_of((tmp_path / "b" / "table.md").read_text())
    assert head == ["", "32", "64", "FLOPs at 64", "tokens/s of a step"]
    table = {name: cells for name, *cells in lines}
    assert list(table) == [*NAMES, "moe"]
    ratios = [f"{rows[width, 'monarch']['ratio']:.2f}" for width in (32, 64)]
    assert table["monarch"][:3] == [*ratios, "0.250"]
    assert table["moe"][:3] == [""] * 3     # it has no single layer
    svg = (tmp_path / "b" / "speed.svg").read_text()
    assert all(f">{name}<" in svg for name in NAMES) and (tmp_path / "b" / "speed.png").exists()


def test_bench_without_widths_or_steps(run, tmp_path):
    done = run("experiments.bench", "--widths=()", "--structs=dense", "--steps=1", "--n_embd=32",
               "--n_layer=1", "--head_size=16", "--block_size=16", "--batch_size=2", f"--out={tmp_path}/b")
    assert done.returncode == 0, done.stderr
    assert cells_of((tmp_path / "b" / "table.md").read_text())[::2] == [["", "tokens/s of a step"],
                                                                       ["dense", "1.00"]]
    done = run("experiments.bench", "--widths=32,", "--structs=dense", "--step=False", "--tokens=8",
               "--turns=1", f"--out={tmp_path}/c")
    assert done.returncode == 0, done.stderr
    assert cells_of((tmp_path / "c" / "table.md").read_text())[-1][0] == "dense"


def test_steps_of_a_plan(run, tmp_path):
    """Its labels and options, in the sizes of the command line; scaling fit takes them for its runs."""
    plan = tmp_path / "plan.py"
    plan.write_text("normed = dict(struct='dense', weight_norm=True, flops=1e9)\n"
                    "structures = dict(dense={}, normed=normed, btt_moe=dict(learning_rate=[1e-3, 2e-3]))\n"
                    "del normed\n"
                    "head_aligned = False\nn_embd = [64, 128]\nhead_size = 32\nbatch_size = 4\n")
    done = run("experiments.bench", f"--plan={plan}", "--widths=()", "--steps=2", "--n_embd=32",
               "--n_layer=1", "--head_size=16", "--block_size=16", "--batch_size=2", f"--out={tmp_path}/b")
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "b" / "bench.json").read_text())["steps"]
    assert [step["config"] for step in steps] == ["dense", "normed", "btt_moe"]
    assert steps[1]["flops"] == 1 and steps[2]["flops"] != 1
    done = run("experiments.bench", f"--plan={tmp_path}/nowhere.py", f"--out={tmp_path}/c")
    assert done.returncode == 1 and "there is no plan" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def bench(monkeypatch):
    """The module, small, with known times of three turns instead of measured ones."""
    monkeypatch.setattr(sys, "argv", ["bench"])
    module = importlib.import_module("experiments.bench")
    for key, value in dict(tokens=8, n_embd=32, head_size=16, n_layer=1, block_size=16, batch_size=2,
                           structures={"dense": {}, "low_rank": dict(struct="low_rank")}).items():
        monkeypatch.setattr(module, key, value)
    times = {"nn.Linear": [1.0, 2.0, 4.0], "dense": [1.0, 4.0, 8.0], "low_rank": [2.0, 2.0, 2.0]}
    monkeypatch.setattr(module, "take_turns", lambda runs, count, _: {name: times[name] for name in runs})
    return module


def test_ratios_are_taken_turn_by_turn(bench):
    linear, dense, low_rank = bench.bench_layers(64)
    assert linear["ratio"] == 1 and dense["ratio"] == 2 and dense["quartiles"] == [1.5, 2.0]
    assert low_rank["ratio"] == 1 and low_rank["quartiles"] == [0.75, 1.5] and low_rank["ms"] == 2
    assert low_rank["flops"] == 0.25    # rank 8: 64 · 8, twice, of 64 · 64
    assert low_rank["time_per_flop"] == 4


def test_steps_are_compared_with_dense(bench):
    dense, low_rank = bench.bench_steps()
    # 2 x 16 tokens in 4 ms and 2 ms
    assert dense["tokens_per_s"] == 8000 and low_rank["tokens_per_s"] == 16_000
    assert low_rank["speed"] == 2 and low_rank["quartiles"] == [1.25, 3.0]


def test_the_first_two_turns_are_not_timed(bench, monkeypatch):
    monkeypatch.undo()
    calls = []
    times = bench.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, "cpu")
    assert calls == ["a", "b"] * 5 and [len(times[name]) for name in "ab"] == [3, 3]


@pytest.mark.parametrize("flags, word", [
    (["--structs=bt"], "'bt'"), (["--turns=0"], "turns"), (["--device=nothing"], "nothing"),
    (["--dtype=int8"], "int8"),
    (["--widths=97,", "--structs=btt"], "97"), (["--widths=64.5,"], "widths"),
    # what would only be found after the layers before it
    (["--widths=32,97", "--structs=btt"], "97"), (["--step=True", "--widths=32,", "--n_embd=97",
                                                   "--head_size=97", "--structs=btt"], "97")])
def test_mistakes_are_one_sentence(run, tmp_path, flags, word):
    done = run("experiments.bench", "--tokens=8", "--step=False", *flags, f"--out={tmp_path}/b")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and word in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "b").exists()
