"""What a run prints and logs: log.jsonl, and wandb if it is asked for. Needs no torch."""
import contextlib
import errno
import json
import math
import os

from lib.files import replace_file, write_temporary
from lib.signals import Stopped

# keys of train.py that change neither what is learned nor what is measured
NO_EFFECT = ("out_dir", "eval_interval", "checkpoint_interval", "log_interval", "sample_tokens",
             "max_skipped", "wandb_log", "wandb_project", "wandb_run_name")


def print0(*message) -> None:
    """Print, on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*message, flush=True)


def format_duration(seconds: float) -> str:
    """3723.4 -> '1:02:03'."""
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def validation_windows(settings: dict) -> int:
    """How many windows of block_size tokens a run's evaluations take, by its settings; old ones have no
    eval_tokens. Raises KeyError if another of these keys is missing."""
    tokens = settings.get("eval_tokens")
    return -(-tokens // settings["block_size"]) if tokens else settings["eval_iters"] * settings["batch_size"]


def read_log(place: str) -> list[dict]:
    """The points of a log file, or of a folder's log.jsonl: [] if there is none. Incomplete lines and lines
    that are not JSON objects are left out."""
    path, points = os.path.join(place, "log.jsonl") if os.path.isdir(place) else place, []
    with contextlib.suppress(OSError):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError, RecursionError):
                    points.append(json.loads(line))
    return [point for point in points if isinstance(point, dict)]


class RunLog:
    """log.jsonl: one JSON object a line, whole lines only, whatever happens to the disk and the process.

    Opening it drops the points from `iteration` on: the run is about to make them again, the evaluation at
    `iteration` only if it evaluates there. Lines that a full disk does not take wait in memory (`waiting`),
    in order. A file that is removed or replaced meanwhile is made again, or appended to. Raises OSError if
    the file cannot be written.
    """

    def __init__(self, path: str, iteration: int, evaluates: bool = True):
        kept = []
        if os.path.exists(path):
            with open(path, "rb") as f:
                for line in f:
                    with contextlib.suppress(ValueError, RecursionError):  # a half line, or worse
                        point = json.loads(line)
                        at = point.get("iter", -1) if isinstance(point, dict) else None
                        if not isinstance(at, int):
                            continue
                        is_eval = point.get("type") == "eval"
                        if at < iteration or at == iteration and is_eval and not evaluates:
                            kept.append(line.rstrip(b"\n") + b"\n")
        write_temporary(path, lambda f: f.writelines(kept))
        replace_file(path)
        self.path, self.file, self.waiting = path, open(path, "ab", buffering=0), b""

    def write(self, point: dict) -> None:
        """Appends a line; numbers that are not finite become null. Raises OSError for the first line that has
        to wait."""
        had_to_wait = bool(self.waiting)
        self.waiting += (json.dumps(_finite(point), allow_nan=False) + "\n").encode()
        try:
            self._write_waiting()
        except OSError:
            if not had_to_wait:
                raise

    def sync(self) -> None:
        """Tries waiting lines once more; lines that are written are on the disk when it returns. Raises
        OSError if the disk does not take them."""
        with contextlib.suppress(OSError):
            self._write_waiting()
        os.fsync(self.file.fileno())

    def _reopen_if_gone(self) -> None:
        """Opens the log again if it was removed or replaced, or a server has forgotten its handle: its lines
        would be lost."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                return
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ESTALE):
                return
        gone, self.file = self.file, open(self.path, "ab", buffering=0)
        with contextlib.suppress(OSError):
            gone.close()

    def _write_waiting(self) -> None:
        self._reopen_if_gone()
        end = os.fstat(self.file.fileno()).st_size
        written = 0
        try:
            while written < len(self.waiting):  # one write, unless the disk is full
                written += self.file.write(self.waiting[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file.fileno(), end)
            raise
        self.waiting = b""


def _finite(x):
    """x with None for every float in it that JSON cannot express."""
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


class Wandb:
    """A wandb run that cannot stop training: whatever wandb raises is printed once, and switches it off.

    Charts are over `iter`, since wandb's own step can only rise: it would drop the points that a run makes
    again when it resumes from an older checkpoint.
    """

    def __init__(self, **options):
        self.run = None

        def init():
            import wandb
            run = wandb.init(**options)
            run.define_metric("iter")
            run.define_metric("*", step_metric="iter")
            return run
        self.run = self._attempt(init)

    def log(self, point: dict) -> None:
        if self.run is not None:
            self._attempt(lambda: self.run.log(point))

    def finish(self) -> None:
        if self.run is not None:
            self._attempt(lambda: self.run.finish())

    def _attempt(self, call):
        try:
            return call()
        except Stopped:
            raise
        except (Exception, SystemExit) as e:
            print0(f"wandb is off: {type(e).__name__}: {e}")
            self.run = None


class Logger:
    """Both logs of a run. With enabled=False, on all ranks but the first, it does nothing.

    Raises ValueError if log.jsonl cannot be written.
    """

    def __init__(self, out_dir: str, iteration: int, enabled: bool, evaluates: bool = True):
        self.path, self.run_log, self.wandb = os.path.join(out_dir, "log.jsonl"), None, None
        self.sync_failed = False
        if enabled:
            try:
                self.run_log = RunLog(self.path, iteration, evaluates)
            except OSError as e:
                raise ValueError(f"{self.path} cannot be written: {e.strerror}") from None

    def start_wandb(self, **options) -> None:
        if self.run_log is not None:
            self.wandb = Wandb(**options)

    def log(self, **point) -> None:
        """One line of log.jsonl; points of an iteration go to wandb too. Lines that find no room wait in
        memory."""
        if self.run_log is not None:
            try:
                self.run_log.write(point)
            except OSError as e:
                print0(f"{self.path} cannot be written ({e.strerror}): its lines wait for the disk")
        if self.wandb is not None and "iter" in point:
            self.wandb.log(point)

    def sync(self) -> None:
        """Brings the lines to the disk. Where that fails, it says so, once."""
        try:
            if self.run_log is not None:
                self.run_log.sync()
        except OSError as e:
            if not self.sync_failed:
                print0(f"{self.path} cannot be synced ({e.strerror}): a power cut may cost its last lines")
            self.sync_failed = True

    def finish(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()

    def lines_waiting(self) -> bool:
        return self.run_log is not None and bool(self.run_log.waiting)
