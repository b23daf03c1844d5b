"""python -m tools.compare: tables and curves of logs that are written by hand, against numbers by hand."""
import builtins
import json

import pytest

from lib import figure, log
from tests.conftest import ROOT, TINY
from tools import compare

CONFIG = dict(struct="dense", dataset="d", block_size=10, eval_tokens=None, eval_iters=2, batch_size=5,
              learning_rate=0.01, min_lr=0.001, max_iters=40, lr_decay_iters=40, num_experts=0, rank=None,
              out_dir="out", seed=1, weight_norm=False, head_aligned=False)
DIGEST = "the digest of the validation windows"


def start(**changes):
    """A log's first line: 100 tokens an iteration of 6 FLOPs each."""
    return dict(type="run", config=CONFIG | changes, model_args=dict(vocab_size=96), params=5,
                flops_per_token=6, tokens_per_iter=100, device="cpu", processes=1, dtype="float32",
                compile=False)


def evaluation(i, loss):
    return dict(type="eval", iter=i, tokens=100 * i, flops=600.0 * i, val_loss=loss, seconds=3.0 * i)


def training(i, loss, ms):
    done = i + 1
    return dict(type="train", iter=i, tokens=100 * done, flops=600.0 * done, loss=loss, ms_per_iter=ms)


def write(place, *points, end=""):
    path = place if place.suffix else place / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(point) + "\n" for point in points) + end)
    return str(place)


def tables(text):
    """The rows of each table, without its head."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in block[2:]] for block in blocks]


@pytest.fixture
def two(tmp_path):
    """A finished run of dense, and one of btt on its way, whose last line is not whole."""
    dense = write(tmp_path / "a", start(), evaluation(0, 4.0), training(0, 4.0, 1000), training(9, 3.5, 2000),
                  evaluation(10, 3.0), training(19, 2.5, 3000), evaluation(20, 2.0), evaluation(30, 2.25),
                  training(39, None, 4000), evaluation(40, 2.1))
    btt = write(tmp_path / "b", start(struct="btt", weight_norm=True, head_aligned=True, max_iters=80,
                                      lr_decay_iters=80), evaluation(0, 4.0), training(0, 4.0, 500),
                evaluation(10, 2.5), training(19, 1.5, 500), evaluation(20, 1.5),
                end='{"type": "eval", "iter": 30, "tok')
    return [dense, btt]


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(compare, "draw", lambda runs, folder: None)


def test_the_table_by_hand(two, capsys, no_figure):
    """Seconds of dense: 1 + 9 · 2 + 10 · 3 + 20 · 4 = 129; of btt 10."""
    compare.compare(two)
    overview, crossings = tables(capsys.readouterr().out)
    labels = ["struct=dense, max_iters=40", "struct=btt, max_iters=80"]
    assert overview == [[labels[0], "2.1000", "2.0000 at 20", "40", "4,000", "2.4e+04", "0:02:09", "31"],
                        [labels[1], "1.5000", "1.5000 at 20", "20 of 80", "2,000", "1.2e+04", "0:00:10",
                         "200"]]
    # Both have reached 2.0, and the lower of the first evaluations on the way is 2.5: 2.25, 2.125 and 2.
    # dense comes from 3.0 to 2.0 between iterations 10 and 20, 19 s and 49 s; btt from 2.5 to 1.5.
    levels = ("2.25", "2.13", "2")
    assert [row[:2] for row in crossings] == [[level, label] for level in levels for label in labels]
    assert crossings[0][2:] == ["1.05e+04", "1.000", "0:00:41", "1.000"]  # 17.5 iterations
    assert crossings[1][2:] == ["7.5e+03", "0.714", "0:00:06", f"{6.25 / 41.5:.3f}"]  # 12.5
    assert crossings[4][2:] == ["1.2e+04", "1.000", "0:00:49", "1.000"]
    assert crossings[5][2:] == ["9e+03", "0.750", "0:00:07", f"{7.5 / 49:.3f}"]


def test_losses_of_ones_own(two, capsys, monkeypatch, no_figure):
    """One that the first run does not reach, and one that is reached before the first evaluation."""
    monkeypatch.setattr(compare, "losses", (1.75, 5))
    compare.compare(two)
    rows = tables(capsys.readouterr().out)[1]
    assert rows[0][2:] == ["—"] * 4 and rows[1][2:] == ["1.05e+04", "—", "0:00:08", "—"]
    assert rows[2][2:] == rows[3][2:] == ["0", "—", "0:00:00", "—"]


def test_a_resumed_run_counts_each_iteration_once(tmp_path):
    """Two logs of one run, one after the other: what was made again counts, and the time of it too."""
    place = write(tmp_path / "log.jsonl", start(init_from="b.pt"), evaluation(0, 4.0), training(0, 4.0, 1000),
                  training(9, 3.0, 1000), evaluation(10, 3.0), training(19, 9.0, 9000), evaluation(20, 9.0),
                  start(learning_rate=0.02), evaluation(10, 2.9), training(19, 2.5, 3000),
                  evaluation(20, 2.0), start(learning_rate=0.02, init_from="resume"))
    run = compare.read_run(place)
    assert [[p[key] for key in ("iter", "loss", "seconds")] for p in run.val] == [
        [0, 4.0, 0], [10, 2.9, 10], [20, 2.0, 40]]
    assert [(p["iter"], p["loss"]) for p in run.train] == [(1, 4.0), (10, 3.0), (20, 2.5)]
    assert run.settings["learning_rate"] == 0.02 and run.settings["init_from"] == "b.pt"
    assert run.name == tmp_path.name


@pytest.mark.parametrize("done, seconds", [(0, 0), (1, 1), (5, 9), (10, 19), (20, 49), (25, 64)])
def test_the_clock_between_and_after_points(done, seconds):
    clock = compare.make_clock([training(0, 1, 1000), training(9, 1, 2000), training(19, 1, 3000)])
    assert clock(done) == pytest.approx(seconds)


@pytest.mark.parametrize("points, done, seconds", [
    # (iterations done, ms, iterations that it is the mean of): a resume at 19, whose first iteration compiles
    ([(1, 1000, 1), (10, 1000, 9), (20, 100_000, 1), (30, 1000, 10)],
     [10, 19, 20, 30, 40], [10, 19, 119, 129, 139]),
    # another soon after the first start: the gap is filled with neither of the times of compilation
    ([(1, 60_000, 1), (8, 60_000, 1), (108, 300, 100)], [1, 7, 8, 108], [60, 61.8, 121.8, 151.8]),
    # the beginning of the log is lost
    ([(101, 60_000, 1), (201, 300, 100)], [100, 101, 201], [30, 90, 120])])
def test_the_first_iteration_of_a_resume_compiles(points, done, seconds):
    clock = compare.make_clock([training(i - 1, 1, ms) | dict(iterations=n) for i, ms, n in points])
    assert [clock(i) for i in done] == pytest.approx(seconds)


def test_points_of_a_log_say_how_many_iterations_they_are_of(train, tmp_path):
    """After the first point of each of two processes, five."""
    settings = TINY | dict(log_interval=5, eval_interval=100)
    train(tmp_path / "out", **settings | dict(max_iters=10))
    out = train(tmp_path / "out", **settings | dict(max_iters=20), init_from="resume")
    points = [p for p in log.read_log(str(out)) if p["type"] == "train"]
    assert [(p["iter"], p["iterations"]) for p in points] == [(0, 1), (5, 5), (10, 1), (15, 5)]


def test_the_log_of_a_run_that_was_resumed_by_train(train, tmp_path):
    """train.py's own log: ended at 6, and resumed for longer."""
    out = train(tmp_path / "out", max_iters=6)
    train(tmp_path / "out", max_iters=8, init_from="resume")
    run = compare.read_run(str(out))
    start, *points = log.read_log(str(out))
    points = {kind: {p["iter"]: p for p in points if p["type"] == kind} for kind in ("train", "eval")}
    assert [p["iter"] for p in run.train] == list(range(1, 9))
    assert [p["iter"] for p in run.val] == [0, 5, 6, 8]
    per_token, per_iter = start["flops_per_token"], 4 * 2 * 32
    for point in run.train + run.val:
        assert point["tokens"] == point["iter"] * per_iter
        assert point["flops"] == pytest.approx(point["tokens"] * per_token)
        ms = [points["train"][i]["ms_per_iter"] for i in range(point["iter"])]  # log_interval = 1
        assert point["seconds"] == pytest.approx(sum(ms) / 1e3)
    assert run.val[-1]["loss"] == points["eval"][8]["val_loss"] and run.last["iter"] == run.max_iters == 8


def label(tmp_path, *changes):
    runs = [compare.read_run(write(tmp_path / f"run{i}", start(**of))) for i, of in enumerate(changes)]
    compare.name_runs(runs)
    return [run.label for run in runs]


@pytest.mark.parametrize("changes, labels", [
    ([{}, {"learning_rate": 0.02, "min_lr": 0.002}], ["learning_rate=0.01", "learning_rate=0.02"]),
    ([{}, {"min_lr": 0.002}], ["min_lr=None", "min_lr=0.002"]),
    ([{}, {"max_iters": 50}], ["max_iters=40", "max_iters=50, lr_decay_iters=40"]),
    ([{}, {"struct": "btt", "weight_norm": True, "head_aligned": True}], ["struct=dense", "struct=btt"]),
    ([{}, {"struct": "btt", "weight_norm": None, "head_aligned": False}],
     ["struct=dense", "struct=btt, head_aligned=False"]),
    ([{}, {"rank": 4}], ["rank=None", "rank=4"]), ([{}, {"a_key_of_later": 4}], ["run0", "run1"]),
    ([{}, {"out_dir": "other", "eval_iters": 4}], ["run0", "run1"]),
    ([{"init_from": "auto"}, {"init_from": "a/ckpt.pt"}], ["init_from=scratch", "init_from=a/ckpt.pt"]),
    ([{}, {}, {"seed": 2}], ["run0: seed=1", "run1: seed=1", "seed=2"])])
def test_labels_are_what_differs(changes, labels, tmp_path):
    assert label(tmp_path, *changes) == labels


@pytest.mark.parametrize("changes, words", [
    ({"dataset": "other"}, "dataset is d (run0), other (run1)"),
    ({"eval_iters": 3}, "validation windows is 10 (run0), 15 (run1)"),
    ({"eval_tokens": 101}, "validation windows is 10 (run0), 11 (run1)"),
    ({"eval_tokens": 100}, None), ({"eval_iters": 5, "batch_size": 2}, None),
    ({"block_size": 20}, "block_size")])
def test_losses_that_do_not_measure_the_same_are_remarked_on(changes, words, tmp_path):
    runs = [compare.read_run(write(tmp_path / f"run{i}", start(**of))) for i, of in enumerate([{}, changes])]
    for run in runs:
        run.label = run.name
    notes = compare.remarks(runs)
    assert len(notes) == (words is not None)
    assert all(words in note and "do not measure the same" in note for note in notes)


@pytest.mark.parametrize("digests, changes, words", [
    (("a1", "a1"), {"dataset": "/a/copy"}, []),
    (("a1", "b2"), {}, [f"{DIGEST} is a1 (run0), b2 (run1)"]),
    (("a1", "b2"), {"dataset": "other"}, [f"{DIGEST} is a1 (run0), b2 (run1)"]),
    (("a1", None), {"dataset": "other"}, ["dataset is d (run0), other (run1)"]),
    (("a1", "b2"), {"block_size": 20}, ["block_size is 10"]),
    (("a1", "b2"), {"eval_iters": 3, "dataset": "other"}, ["dataset is", "validation windows is 10"])])
def test_equal_validation_tokens_count_not_the_name_of_the_dataset(digests, changes, words, tmp_path):
    """Logs without a digest are older; one of other windows says nothing of the dataset."""
    runs = []
    for i, (digest, config) in enumerate(zip(digests, [{}, changes])):
        line = start(**config) | ({"measured_on": digest} if digest else {})
        runs.append(compare.read_run(write(tmp_path / f"run{i}", line)))
        runs[-1].label = f"run{i}"
    notes = compare.remarks(runs)
    assert len(notes) == len(words) and all(part in note for part, note in zip(words, notes)), notes


def test_the_log_of_train_has_the_digest(train, python_text, tmp_path):
    from data.batches import Batches
    from data.common import open_dataset
    out = train(tmp_path / "out", max_iters=0)
    config = log.read_log(str(out))[0]["config"]
    sizes = {key: config[key] for key in ("block_size", "batch_size", "seed")}
    batches = Batches(open_dataset(str(python_text))[1], **sizes, sequences=1, device="cpu",
                      val_windows=log.validation_windows(config))
    assert compare.read_run(str(out)).measured[DIGEST] == batches.val_digest()[:12]


def test_smoothing_by_hand():
    """Weights 1; ½, 1 of the sum 3/2; ¼, ½, 1 of 7/4."""
    assert compare.smooth([6, 3, 1], 0.5) == pytest.approx([6, 4, (6 / 4 + 3 / 2 + 1) / (7 / 4)])
    assert compare.smooth([6, 3, 1], 0) == [6, 3, 1]


def test_the_figure_has_four_panels_and_every_label(two, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "out", str(tmp_path / "figures"))
    compare.compare(two)
    svg = (tmp_path / "figures" / "compare.svg").read_text()
    for text in ("iterations", "tokens", "training FLOPs", "training seconds", "loss, nats per token",
                 "struct=dense, max_iters=40", "struct=btt, max_iters=80"):
        assert f">{text}<" in svg, text
    assert (tmp_path / "figures" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_the_same_folder_name(tmp_path, capsys, no_figure):
    """And of the same settings: their paths tell them apart."""
    places = [write(tmp_path / folder / "out", start(), evaluation(0, 4.0)) for folder in ("a", "b")]
    compare.compare(places)
    assert [row[0] for row in tables(capsys.readouterr().out)[0]] == places


def test_without_matplotlib_the_table_is_there(two, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **options)
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    monkeypatch.setattr(compare, "out", str(tmp_path / "figures"))
    compare.compare(two)
    printed = capsys.readouterr().out
    assert len(tables(printed)) == 2 and printed.splitlines()[-1].endswith("(pip install matplotlib)")
    assert not (tmp_path / "figures").exists()


def test_runs_that_have_just_begun(two, tmp_path, capsys, monkeypatch):
    """Without an evaluation, or a time; a loss that was not finite."""
    monkeypatch.setattr(compare, "out", str(tmp_path / "figures"))
    nothing = write(tmp_path / "nothing", start(seed=2))
    lost = write(tmp_path / "lost", start(seed=3), evaluation(0, 4.0), evaluation(10, None),
                 training(10, None, 1))
    compare.compare([nothing, lost, two[0]])
    printed = capsys.readouterr().out
    rows = tables(printed)
    assert len(rows) == 1 and rows[0][0] == ["seed=2", "—", "—", "0 of 40", "0", "0", "—", "—"]
    assert rows[0][1][1:4] == ["4.0000", "4.0000 at 0", "0 of 40"] and rows[0][2][1] == "2.1000"
    compare.compare([nothing])


def test_a_log_of_the_first_version(capsys, no_figure):
    compare.compare([str(ROOT / "tests" / "fixtures" / "log_v1.jsonl")])
    [[row]] = tables(capsys.readouterr().out)
    assert row[0] == "log_v1.jsonl" and row[1] == "1.6596" and row[3] == "40"


@pytest.mark.parametrize("text", ["", "3\n", '{"type": "run"}', '{"type": "run", "config": {}}\n',
                                  '{"type": "run", "config": 3}\n',
                                  json.dumps(start()) + '\n{"type": "eval"}\n'])
def test_what_is_no_run_is_one_sentence(text, two, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(SystemExit):
        compare.main([two[0], str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert str(tmp_path) in printed.err


@pytest.mark.parametrize("arguments, word", [
    ([], "out-a out-b"), (["--smoothing=1"], "smoothing"), (["--lossy=3"], "losses")])
def test_arguments_that_are_wrong_are_one_sentence(arguments, word, capsys):
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert word in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_sentence(two, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "out", compare.out)  # main sets it, and it is set back
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        compare.main([*two, f"--out={tmp_path / 'file'}"])
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_folder_without_a_run_among_runs_is_passed_over(two, tmp_path, no_figure, capsys):
    """As out-compare is in out-*; but not one that is alone, or a file, or a folder that is not there."""
    (tmp_path / "out-compare").mkdir()
    compare.main([*two, str(tmp_path / "out-compare")])
    printed = capsys.readouterr().out
    assert "out-compare has no log.jsonl, and is passed over" in printed and len(tables(printed)[0]) == 2
    for places in ([tmp_path / "out-compare"], [*two, tmp_path / "nowhere"]):
        with pytest.raises(SystemExit):
            compare.main(list(map(str, places)))
        assert "is no run" in capsys.readouterr().err


def test_a_wrapped_label_is_as_wide_as_its_longest_line(tmp_path):
    """And as high as all of them."""
    sizes = []
    for label in ("x" * 39, "\n".join(["x" * 39] * 4)):
        fig, [[ax]] = figure.figure()
        for i in range(8):
            ax.plot([1, 2], [1, 2], label=label)
        figure.save(fig, ax, str(tmp_path), "one")
        sizes.append(fig.get_size_inches())
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > 0.2 * 8 * 4
