"""lib/files.py: the lock of an out_dir, and files that are whole or absent."""
import atexit
import contextlib
import errno
import os
import socket
import subprocess
import sys
import time

import pytest

import lib.files
from lib.files import lock_out_dir, rename_old_files, replace_file, write_temporary
from tests.conftest import PROCESSES


# Lock

def hold_the_lock_for_a_moment(folder):
    """A process that locks folder/out as soon as it can, has a child that ends, and ends itself."""
    os.chdir(folder)
    while True:
        try:
            lock_out_dir("out")
            break
        except ValueError:
            time.sleep(0.001)
    os.mkdir("held")  # fails while another process holds the lock
    if os.fork() == 0:
        atexit._run_exitfuncs()
        os._exit(0)
    os.wait()
    time.sleep(0.01)
    os.rmdir("held")
    atexit._run_exitfuncs()  # multiprocessing skips them


def test_only_one_of_several_processes_holds_the_lock(tmp_path):
    """Of eight that want it at once; the end of a child does not end the lock of its parent."""
    started = [PROCESSES.Process(target=hold_the_lock_for_a_moment, args=(tmp_path,)) for _ in range(8)]
    for process in started:
        process.start()
    for process in started:
        process.join(600)
    assert [process.exitcode for process in started] == [0] * 8
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []


def test_a_lock_file_that_is_removed_before_it_is_locked(tmp_path, monkeypatch):
    """Its last owner removes it between the opening and the locking.

    The lock must be on the file that others see.
    """
    lock, lockf, calls = tmp_path / "lock", lib.files.fcntl.lockf, []

    def late(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            os.remove(lock)
        return lockf(descriptor, operation)
    monkeypatch.setattr(lib.files.fcntl, "lockf", late)
    lock_out_dir(str(tmp_path))
    other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", other, lock], capture_output=True, text=True)
    assert len(calls) == 2 and "BlockingIOError" in done.stderr


def lock_that_another_holds_in_the_end(folder):
    """The folder goes, as prepare.tmp does, and another process makes and locks it before this one ends."""
    os.chdir(folder)
    os.mkdir("work")
    lib.files.lock_file("work/lock", "another writes", "--out")
    os.remove("work/lock")
    open("work/lock", "w").close()
    atexit._run_exitfuncs()  # multiprocessing skips them


def test_an_ending_process_leaves_the_lock_of_the_next_one(tmp_path):
    process = PROCESSES.Process(target=lock_that_another_holds_in_the_end, args=(tmp_path,))
    process.start()
    process.join(600)
    assert process.exitcode == 0 and os.listdir(tmp_path / "work") == ["lock"]


def hold_the_lock(folder, owner, seconds, held):
    """Locks folder/lock as the process `owner` for so long."""
    with open(folder / "lock", "w") as file:
        lib.files.fcntl.lockf(file, lib.files.fcntl.LOCK_EX)
        file.write(owner)
        file.flush()
        held.set()
        time.sleep(seconds)


HERE, ELSEWHERE = f"process 1 on {socket.gethostname()}", "process 1 on another-machine"


@pytest.mark.parametrize("owner, restarts, seconds, wait, waits, locks", [
    (HERE, "0", 60, 60, False, False), ("", "0", 60, 60, False, False), (HERE, "1", 1, 60, True, True),
    (ELSEWHERE, "0", 1, 60, True, True), (ELSEWHERE, "0", 60, 1, True, False)])
def test_the_lock_of_a_machine_that_may_be_gone(owner, restarts, seconds, wait, waits, locks, tmp_path, capfd,
                                                monkeypatch):
    """Its file server gives it up after a while, for which a restart or another machine waits."""
    monkeypatch.setattr(lib.files, "LOCK_WAIT", wait)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    held = PROCESSES.Event()
    process = PROCESSES.Process(target=hold_the_lock, args=(tmp_path, owner, seconds, held))
    process.start()
    assert held.wait(60)
    with contextlib.nullcontext() if locks else pytest.raises(ValueError) as error:
        lock_out_dir(str(tmp_path))
    process.kill()
    process.join()
    assert capfd.readouterr().out.count(f"waiting up to {wait} s for its end\n") == waits
    assert locks or f"if its machine is gone, remove {tmp_path / 'lock'}" in str(error.value)


def test_a_log_that_cannot_be_read_is_renamed(tmp_path, monkeypatch):
    """Another user's, say."""
    (tmp_path / "log.jsonl").write_text("{}\n")

    def refuse(*words):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(lib.files, "open", refuse, raising=False)
    assert rename_old_files(str(tmp_path)) == {"log.jsonl": "log.jsonl.old"}


def test_a_folder_that_cannot_be_locked_is_not_made(tmp_path, monkeypatch):
    """Nor are the folders above it; what was there stays."""
    def refuse(path, *words):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(lib.files, "lock_file", refuse)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="cannot be written: Permission denied"):
        lock_out_dir(str(tmp_path / "mine" / "a" / "b"))
    assert os.listdir(tmp_path) == ["mine"] and not os.listdir(tmp_path / "mine")


def test_the_lock_removes_what_a_killed_run_was_writing(tmp_path):
    for name in ("ckpt.pt", "ckpt.pt.tmp", "ckpt_best.pt.tmp", "log.jsonl.tmp"):
        (tmp_path / name).write_text(name)
    lock_out_dir(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "lock"]


# Files

def test_old_files_are_renamed(tmp_path):
    for name in ("ckpt.pt", "log.jsonl", "notes.txt"):
        (tmp_path / name).write_text(name)
    assert rename_old_files(str(tmp_path)) == {"ckpt.pt": "ckpt.pt.old", "log.jsonl": "log.jsonl.old"}
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt.old", "log.jsonl.old", "notes.txt"]


def test_files_renamed_before_are_kept(tmp_path):
    """A second start from scratch, by mistake, must not cost the first run."""
    for run in ("first", "second", "third"):
        (tmp_path / "ckpt.pt").write_text(run)
        if run == "second":
            (tmp_path / "log.jsonl").write_text('{"type": "train"}\n')
        rename_old_files(str(tmp_path))
    assert {path.name: path.read_text()[:6] for path in tmp_path.iterdir()} == {
        "ckpt.pt.old": "first", "ckpt.pt.old2": "second", "ckpt.pt.old3": "third",
        "log.jsonl.old2": '{"type'}


@pytest.mark.parametrize("line, renamed", [
    ('{"type": "run"}\n', {}), ('{"type": "train"}\n', {"log.jsonl": "log.jsonl.old"})])
def test_a_log_without_training_is_not_kept(line, renamed, tmp_path):
    (tmp_path / "log.jsonl").write_text(line)
    assert rename_old_files(str(tmp_path)) == renamed


@pytest.mark.parametrize("error, raised", [(OSError(28, "No space left on device"), OSError),
                                           (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_write_that_fails_leaves_the_old_file_alone(error, raised, tmp_path):
    def write(f):
        f.write(b"half")
        raise error
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(raised):
        write_temporary(str(tmp_path / "a"), write)
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_an_error_of_the_disk_comes_through_torch_as_it_was(tmp_path):
    """torch.save raises a RuntimeError in its place."""
    def write(f):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed writing file")
    with pytest.raises(OSError, match="No space left"):
        write_temporary(str(tmp_path / "a"), write)


def test_a_file_is_replaced_whole(tmp_path):
    """Another name of the old file keeps the old bytes."""
    (tmp_path / "a").write_bytes(b"old")
    os.link(tmp_path / "a", tmp_path / "b")
    write_temporary(str(tmp_path / "a"), lambda f: f.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"old"
    replace_file(str(tmp_path / "a"))
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"new", b"old"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("number, raised", [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_syncs_no_folders(number, raised, tmp_path, monkeypatch):
    """Shared folders of virtual machines refuse it; a broken disk is an error all the same."""
    def refuse(_):
        raise OSError(number, "no")
    monkeypatch.setattr(lib.files.os, "fsync", refuse)
    with pytest.raises(OSError) if raised else contextlib.nullcontext():
        lib.files.fsync_folder(str(tmp_path))
