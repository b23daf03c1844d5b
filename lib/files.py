"""Files of an out_dir: its lock, and writes that are whole or absent. Needs no torch.

Errors that a user can fix are ValueError, with one sentence. Failed writes are OSError, and leave the old
file.
"""
import atexit
import contextlib
import errno
import itertools
import os
import socket
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_WAIT = 120.0  # seconds; a file server keeps the locks of a lost machine for some 90 s

# ---- Lock --------------------------------------------------------------------------------------------------


def restarted() -> bool:
    """Whether torchrun has started this process again, after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def lock_out_dir(out_dir: str) -> None:
    """Makes out_dir and locks it until this process ends. Raises ValueError if it cannot be written or is
    locked.

    The lock is a record lock on out_dir/lock: the kernel drops it when its process dies, on NFS too, and the
    file that is left behind means nothing. On Windows, and where the file system has no such locks, there is
    no lock.
    """
    parents = [out_dir]
    while parents[-1] and not os.path.exists(parents[-1]):
        parents.append(os.path.dirname(parents[-1]))
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock_file(os.path.join(out_dir, "lock"), "another run writes", "--out_dir")
    except (OSError, UnicodeError) as e:
        for folder in parents[:-1]:  # those that did not exist
            with contextlib.suppress(OSError, UnicodeError):
                os.rmdir(folder)
        shown, reason = ascii(out_dir)[:120], getattr(e, "strerror", None) or e
        raise ValueError(f"out_dir {shown} cannot be written: {reason}") from None
    for name in ("ckpt.pt.tmp", "ckpt_best.pt.tmp", "log.jsonl.tmp"):  # of a killed run
        remove(os.path.join(out_dir, name))


def lock_file(path: str, owner_writes: str, flag: str) -> None:
    """Creates a file and holds a record lock on it until this process ends: see lock_out_dir. Raises
    ValueError if another process has locked it: at once if that is on this machine; otherwise, and after a
    restart by torchrun, only after LOCK_WAIT, since its machine may be gone and the lock soon expire."""
    if fcntl is None:
        return
    give_up_at = None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            owner = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                return  # this file system has no locks
            writer = f"{owner_writes} into {os.path.dirname(path)} ({owner or 'unknown'})"
            elsewhere = " on " in owner and owner.rpartition(" on ")[2] != socket.gethostname()
            if give_up_at is None and (elsewhere or restarted()):
                give_up_at = time.monotonic() + LOCK_WAIT
                print(f"{writer}: waiting up to {LOCK_WAIT:g} s for its end", flush=True)
            if give_up_at is None or time.monotonic() > give_up_at:
                raise ValueError(f"{writer}: wait for its end, or give another {flag}; if its machine is "
                                 f"gone, remove {path}") from None
            time.sleep(0.5)
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # its last owner has just removed the file: the next run would lock another one
    os.ftruncate(descriptor, 0)
    with contextlib.suppress(OSError):  # on a full disk, the message to others lacks the name
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    owner = os.getpid()
    # the descriptor is never closed: the lock lasts as long as the process
    # a file without links is gone (work_folder): one of this name is another process's
    atexit.register(lambda: os.getpid() == owner and os.fstat(descriptor).st_nlink and remove(path))


def is_locked(path: str) -> bool:
    """Whether a process, on any machine, holds lock_file's lock on a file, which is not created; False where
    there are no record locks. The process that holds the lock must not call it: it would lose the lock."""
    if fcntl is not None:
        with contextlib.suppress(OSError), open(path, "r+b") as f:
            try:
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return True
    return False


def unused_suffix(out_dir: str, names: list[str]) -> str:
    """'.old', '.old2', '.old3' ...: the first for which out_dir has none of the names with it."""
    suffixes = (".old" if i == 1 else f".old{i}" for i in itertools.count(1))
    return next(suffix for suffix in suffixes
                if not any(os.path.exists(os.path.join(out_dir, name + suffix)) for name in names))


def rename_old_files(out_dir: str) -> dict[str, str]:
    """Renames the files of an earlier run to <name>.old, or .old2 ... where there is one, for a run from
    scratch. Returns {name: new name}.

    A log without a training iteration is useless, and is left to be overwritten. Two nodes may
    rename the same files of a shared folder: the second one finds some of them gone.
    """
    names = ["ckpt.pt", "ckpt_best.pt", "log.jsonl"]
    names = [name for name in names if os.path.exists(os.path.join(out_dir, name))]
    with contextlib.suppress(OSError):  # a log that cannot be read is worth keeping
        if names == ["log.jsonl"]:
            with open(os.path.join(out_dir, "log.jsonl"), "rb") as f:
                names = names if any(b'"train"' in line for line in f) else []
    suffix = unused_suffix(out_dir, ["ckpt.pt", "ckpt_best.pt", "log.jsonl"])
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(out_dir, name), os.path.join(out_dir, name + suffix))
    return {name: name + suffix for name in names}


# ---- Atomic writes -----------------------------------------------------------------------------------------


def remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def write_temporary(path: str, write) -> None:
    """The first half of an atomic write: calls write(file) on path + ".tmp" and syncs it. Raises OSError, and
    removes it, if the write fails."""
    remove(path + ".tmp")  # never overwritten in place: it may be another name of ckpt_best.pt
    try:
        with open(path + ".tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except BaseException as e:
        remove(path + ".tmp")
        if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):  # how torch.save passes it on
            raise e.__context__ from None
        raise


def replace_file(path: str) -> None:
    """The second half: path + ".tmp" takes the place of path, in one step and for good."""
    os.replace(path + ".tmp", path)
    fsync_folder(os.path.dirname(path) or os.curdir)


def write_whole(path: str, text: str) -> None:
    """Both halves, for a text. Raises OSError, and leaves the old file, if the write fails."""
    write_temporary(path, lambda file: file.write(text.encode()))
    replace_file(path)


def fsync_folder(folder: str) -> None:
    """Brings the names of a folder's files to the disk. Windows cannot open a folder, and needs no sync of
    one; file systems that refuse it, such as shared folders of virtual machines, do without."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES):
            raise
    finally:
        os.close(descriptor)
