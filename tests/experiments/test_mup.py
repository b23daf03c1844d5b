"""The commands that prove µP: coordinate_check.py and lr_transfer.py, their figures read back from what they write."""
import csv
import itertools
import json
import math

import pytest


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def spread(rows):
    """{quantity: largest ÷ smallest size over the widths}."""
    key = lambda row: row["quantity"]  # noqa: E731
    groups = itertools.groupby(sorted(rows, key=key), key)
    return {q: max(sizes) / min(sizes) for q, group in groups if (sizes := [float(row["rms"]) for row in group])}


@pytest.mark.parametrize("struct", ["dense", "low_rank", "kronecker", "monarch", "tt", "btt", "einsum", "dyad", "btt_moe", "moe"])
def test_coordinates_do_not_depend_on_width(run, python_text, tmp_path, struct):
    widths = ["128", "256", "512"] if struct == "moe" else ["128", "256", "512", "1024"]  # it takes as long as all others
    told = run("experiments.coordinate_check", f"--structs={struct}", f"--widths={','.join(widths)}", f"--dataset={python_text}",
               "--batch_size=4", "--seeds=1", f"--out={tmp_path}/c")
    assert told.returncode == 0, told.stdout + told.stderr
    rows = read(tmp_path / "c.csv")
    assert [row["width"] for row in rows[::5]] == widths and {row["struct"] for row in rows} == {struct}
    found = spread(rows)
    assert found.keys() == {"block 0", "block 1", "block 2", "attention logits", "output logits"}
    assert max(found.values()) < 2
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_coordinates_grow_without_mup(run, python_text, tmp_path):
    told = run("experiments.coordinate_check", "--structs=dense", "--mup=False", f"--dataset={python_text}", "--batch_size=4", "--seeds=1",
               f"--out={tmp_path}/c")
    assert told.returncode == 1 and "not below 2" in told.stdout
    assert max(spread(read(tmp_path / "c.csv")).values()) > 4


@pytest.mark.parametrize("flags, word", [
    (["--structs=dense,bt"], "'bt'"), (["--structs=quickstart"], "sets dataset"), (["--widths=128,"], "widths"),
    (["--widths=100,200"], "widths"), (["--steps=1"], "steps"), (["--seeds=0"], "seeds"),
    (["--learning_rate=-1"], "learning_rate"), (["--dataset=nowhere"], "nowhere")])
def test_coordinate_check_refuses(run, tmp_path, flags, word):
    told = run("experiments.coordinate_check", *flags, f"--out={tmp_path}/c/c")
    assert told.returncode == 1 and told.stderr.startswith("error: ") and word in told.stderr
    assert told.stderr.count("\n") == 1 and not (tmp_path / "c").exists()


def test_coordinates_that_diverge_fail(run, python_text, tmp_path):
    """At a rate where nothing stays finite: not a number is no ratio below 2."""
    told = run("experiments.coordinate_check", "--structs=dense", "--widths=32,64", "--learning_rate=1e30", f"--dataset={python_text}",
               f"--out={tmp_path}/c")
    assert told.returncode == 1 and "inf" in told.stdout and "not below 2" in told.stdout


SHORT = ["--structs=btt", "--widths=32,64", "--rates=1e-4,1e-3,1e-1", "--max_iters=20", "--jobs=2"]


def test_lr_transfer(run, python_text, tmp_path):
    """Rates of which the middle one is best: 20 steps at 1e-4 learn nothing, and at 0.1 nothing holds."""
    places = [f"--dataset={python_text}", f"--runs={tmp_path}/runs", f"--out={tmp_path}/t"]
    told = run("experiments.lr_transfer", *SHORT, *places)
    rows = read(tmp_path / "t.csv")
    assert len(rows) == 6 and len({(r["struct"], r["width"], r["learning_rate"]) for r in rows}) == 6
    losses = {(r["struct"], r["width"], float(r["learning_rate"])): float(r["val_loss"]) for r in rows}
    for log in (tmp_path / "runs").rglob("log.jsonl"):  # what was asked for is what was run
        points = [json.loads(line) for line in log.read_text().splitlines()]
        config = points[0]["config"]
        row = config["struct"], str(config["n_embd"]), config["learning_rate"]
        assert losses.pop(row) == points[-1]["val_loss"] and config["max_iters"] == points[-1]["iter"] == 20
    assert not losses
    losses = {(r["struct"], r["width"], float(r["learning_rate"])): float(r["val_loss"]) for r in rows}
    minima = []
    for width in ("32", "64"):
        best = min((1e-4, 1e-3, 1e-1), key=lambda rate: losses["btt", width, rate])
        low, middle, high = (losses["btt", width, rate] for rate in (1e-4, 1e-3, 1e-1))
        rise, fall = (high - middle) / 2, (middle - low) / 1  # per factor 10; through three points, by divided differences
        curvature = (rise - fall) / 3
        minima.append(10 ** ((-4 - 3) / 2 - fall / (2 * curvature)) if curvature > 0 else math.nan)
        assert f"{losses['btt', width, best]:.4f} at {best:g}, parabola's minimum at {minima[-1]:.2g}" in told.stdout
    stays = all(1e-4 <= m <= 1e-1 for m in minima) and max(minima) <= 1000 ** 0.5 * min(minima)
    assert told.returncode == (not stays) and (tmp_path / "t.png").stat().st_size > 10_000
    made = {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").rglob("log.jsonl")}
    again = run("experiments.lr_transfer", *SHORT, *places)
    assert again.returncode == told.returncode and read(tmp_path / "t.csv") == rows
    assert made == {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").rglob("log.jsonl")} and len(made) == 6
    log = next(iter(made))
    log.write_text(log.read_text().replace('"eval_iters": 100', '"eval_iters": 1'))  # another run, of the same name
    assert run("experiments.lr_transfer", *SHORT, *places).returncode == told.returncode and read(tmp_path / "t.csv") == rows
    assert {f for f in made if f.stat().st_mtime_ns != made[f]} == {log} and '"eval_iters": 100' in log.read_text()
    # losses whose parabola has its minimum at 10^v: within one step, √1000, and beyond
    for v32, v64, moves in ((-3, -2, False), (-3.8, -1.2, True), (-5, -4.5, True)):
        for log in made:
            *points, last = [json.loads(line) for line in log.read_text().splitlines()]
            config = points[0]["config"]
            last["val_loss"] = 2 + (math.log10(config["learning_rate"]) - {32: v32, 64: v64}[config["n_embd"]]) ** 2
            log.write_text("".join(json.dumps(point) + "\n" for point in (*points, last)))
        told = run("experiments.lr_transfer", *SHORT, *places)
        assert told.returncode == moves == ("<- moves" in told.stdout)
        assert f"minimum at {10 ** v32:.2g}" in told.stdout and f"minimum at {10 ** v64:.2g}" in told.stdout


@pytest.mark.parametrize("flags, word", [
    (["--structs=dense,bt"], "'bt'"), (["--rates=0,1,2"], "rates"), (["--rates=1,2"], "rates"), (["--widths=100,"], "widths"), (["--jobs=0"], "jobs"),
    (["--rates=1e-3,1e-2,1e-3"], "twice"), (["--structs=btt,btt"], "twice"), (["--widths=64,64"], "twice"),
    (["--dataset=nowhere"], "nowhere")])
def test_lr_transfer_refuses(run, tmp_path, flags, word):
    told = run("experiments.lr_transfer", *flags, f"--runs={tmp_path}/runs", f"--out={tmp_path}/t")
    assert told.returncode == 1 and told.stderr.startswith("error: ") and word in told.stderr
    assert told.stderr.count("\n") == 1 and not (tmp_path / "t.csv").exists()
