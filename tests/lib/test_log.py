"""lib/log.py: log.jsonl holds whole lines, whatever the disk takes."""
import contextlib
import errno
import json
import os
import resource

import pytest

from lib.log import RunLog, format_duration, print0, read_log


@contextlib.contextmanager
def largest_file(size):
    """No file can grow beyond this many bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("room", [0, 1, 7, 28, 50, 80])
def test_a_line_is_whole_or_waits(room, tmp_path):
    """A line that the disk takes a part of is removed again.

    It is written when there is room, in its place.
    """
    path = tmp_path / "log.jsonl"
    log = RunLog(str(path), -1)
    log.write({"type": "train", "iter": 0, "loss": 1.5})
    before = path.read_bytes()
    with largest_file(len(before) + room), pytest.raises(OSError):
        log.write({"type": "train", "iter": 1, "loss": float("nan"), "text": "x" * 50})
    assert path.read_bytes() == before and log.waiting
    log.sync()
    assert not log.waiting and b'"iter": 1,' in path.read_bytes()
    log.write({"type": "train", "iter": 2, "loss": 1.5})
    points = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(p["iter"], p["loss"]) for p in points] == [(0, 1.5), (1, None), (2, 1.5)]


def test_only_the_first_line_that_waits_raises(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(str(path), -1)
    with largest_file(0):
        with pytest.raises(OSError):
            log.write({"iter": 1})
        log.write({"iter": 2})
        log.sync()
    log.write({"iter": 3})
    assert [json.loads(line)["iter"] for line in path.read_text().splitlines()] == [1, 2, 3]


def iterations(path):
    return [json.loads(line)["iter"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_log_that_is_gone_is_made_again(how, tmp_path):
    """No later line goes to a file without a name, or under another one; a copy that takes its place is
    appended to."""
    path = tmp_path / "log.jsonl"
    log = RunLog(str(path), -1)
    log.write({"iter": 1})
    if how == "removed":
        path.unlink()
    elif how == "moved":
        path.rename(tmp_path / "moved")
    else:
        (tmp_path / "copy").write_bytes(path.read_bytes())
        os.replace(tmp_path / "copy", path)
    log.write({"iter": 2})
    log.sync()
    assert iterations(path) == ([1, 2] if how == "replaced" else [2])


def test_a_log_whose_folder_is_gone_waits(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    log = RunLog(str(folder / "log.jsonl"), -1)
    folder.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        log.write({"iter": 1})
    folder.mkdir()
    log.sync()
    assert iterations(folder / "log.jsonl") == [1] and not log.waiting


def test_a_stale_handle_is_opened_again(tmp_path, monkeypatch):
    """As on a shared folder whose server has forgotten it."""
    log = RunLog(str(tmp_path / "log.jsonl"), -1)
    fstat, stale = os.fstat, log.file.fileno()

    def forgotten(descriptor):
        if log.file.fileno() == descriptor == stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return fstat(descriptor)
    monkeypatch.setattr(os, "fstat", forgotten)
    log.write({"iter": 1})
    assert iterations(tmp_path / "log.jsonl") == [1]


@pytest.mark.parametrize("tail", [b'{"type": "train", "it', b'{"type": "train", "iter": 3', b"\0\0\0\0",
                                  b"\xff\xfe\n", b"3\n", b"[1]\n", b"\n", b'{"iter": null}\n',
                                  b"[" * 100_000])
def test_opening_drops_half_lines_and_points_to_be_made_again(tail, tmp_path):
    """A power cut may have left such a tail; a run that resumes at 2 makes the points from there on again."""
    path = tmp_path / "log.jsonl"
    lines = [b'{"type": "run"}\n', b'{"type": "eval", "iter": 0}\n', b'{"type": "train", "iter": 1}\n']
    path.write_bytes(b"".join(lines) + b'{"type": "train", "iter": 2}\n' + tail)
    RunLog(str(path), 2)
    assert path.read_bytes() == b"".join(lines)


def test_a_log_that_cannot_be_rewritten_stays(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"type": "eval", "iter": 0}\n' * 10)
    with largest_file(100), pytest.raises(OSError):
        RunLog(str(path), 2)
    assert path.stat().st_size == 280 and os.listdir(tmp_path) == ["log.jsonl"]


@pytest.mark.parametrize("rank, printed", [("0", "a 1\n"), ("1", "")])
def test_print0_prints_on_the_first_rank_alone(rank, printed, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    print0("a", 1)
    assert capsys.readouterr().out == printed


def test_reading_a_log_leaves_out_what_is_no_point(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"type": "run"}\n3\n\xff\n\n{"iter": 1}\n{"iter": 2')
    assert read_log(str(tmp_path)) == [{"type": "run"}, {"iter": 1}]
    assert read_log(str(tmp_path / "nowhere")) == []


@pytest.mark.parametrize("seconds, text", [(0, "0:00:00"), (59.9, "0:00:59"), (3723.4, "1:02:03"),
                                           (360_000, "100:00:00")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text
