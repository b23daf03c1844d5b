"""Makes the runs of a plan, beside any number of other processes and machines that share their folder."""
import contextlib
import os
import subprocess
import time
from typing import NamedTuple

import filelock

from experiments.launcher import (Run, check_begun, final_loss, is_training, last_words, launch, speed, stop,
                                  why_ended)
from lib.log import format_duration


class Job(NamedTuple):
    run: Run
    process: subprocess.Popen


class Sweep:
    """Starts train.py on every run that is not finished, `jobs` at a time, until there is none left.

    A run belongs to the process that holds the lease in its folder; a thread of filelock renews it as long as
    that process runs. Another process may take it at once if the holder was on the same machine and is dead,
    otherwise after having seen it unchanged for `expiry` seconds. A process that loses a lease, because its
    machine slept, say, ends that run's train.py.
    """

    def __init__(self, planned: list[Run], *, jobs: int, gpus: int, program: str, expiry: float, wait: bool):
        self.jobs, self.gpus, self.program, self.wait = jobs, gpus, program, wait
        self.pause = min(1.0, expiry / 10)      # seconds between two looks at the jobs
        self.next_look = 0.0                    # when to look for runs to start, by time.monotonic()
        self.next_progress = time.monotonic() + 60
        for run in planned:
            check_begun(run)
        self.finished = [run for run in planned if final_loss(run) is not None]
        self.pending = [run for run in planned if run not in self.finished]     # those at work included
        self.failed: list[Run] = []
        self.active: dict[int, Job] = {}        # by number, from 0 to jobs - 1
        self.failures_before = {run.name: failure_time(run) for run in self.pending}    # tried once more
        seconds = dict(lease_duration=expiry, heartbeat_interval=min(10.0, expiry / 10))
        self.leases = {run.name: filelock.SoftFileLease(os.path.join(run.folder, "lease"), **seconds)
                       for run in self.pending}
        self.started, self.flops_before = time.monotonic(), flops_left(self.pending)

    def make_all(self) -> list[Run]:
        """Returns the runs that failed. Raises OSError where the folder cannot be written."""
        planned = [*self.finished, *self.pending]
        flops = sum(run.flops for run in planned)
        print(f"{len(planned)} runs, {flops:.3g} FLOPs; {len(self.finished)} finished before", flush=True)
        try:
            while self.pending:
                self.check_jobs()
                self.start_jobs()
                if not self.active and not self.wait:
                    break
                self.print_progress()
                self.sleep()
        finally:
            stop(*(process for _, process in self.active.values()))
            for run, _ in self.active.values():
                self.leases[run.name].release()
        print(f"{len(self.finished)} of {len(planned)} finished, {len(self.failed)} failed"
              + (f", {len(self.pending)} in the hands of others" if self.pending else ""), flush=True)
        return self.failed

    def check_jobs(self) -> None:
        """Close the jobs whose process has ended, and end those whose run somebody else has taken."""
        for number, job in list(self.active.items()):
            lease = self.leases[job.run.name]
            if not lease.is_lock_held_by_us:
                stop(job.process)
                print(f"{job.run.name}: taken over by another sweep, because this one did not "
                      "renew its lease in time", flush=True)
            elif job.process.poll() is not None:
                self.close(job)
            else:
                continue
            lease.release()     # the outcome is on disk
            del self.active[number]
            self.next_look = 0.0

    def close(self, job: Job) -> None:
        """Note what became of a run whose process has ended."""
        run, status, loss = job.run, job.process.returncode, final_loss(job.run)
        if status == 0 and loss is not None:
            duration = format_duration((speed(run)[1] or 0) * run.max_iters / 1e3)
            self.settle(run, self.finished, f"val loss {loss:.4f}, {duration}")
        elif not is_training(run.folder):   # else a train.py left by a killed sweep was there first
            reason = why_ended(run, status)
            self.settle(run, self.failed, f"FAILED, {reason}")
            with open(os.path.join(run.folder, "failed.txt"), "w") as f:
                f.write(reason + "\n")

    def start_jobs(self) -> None:
        """Now and then: settle the pending runs that others have made, and start others on the free jobs."""
        free = [number for number in range(self.jobs) if number not in self.active]
        if not free or time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + 5 * self.pause
        mine = [job.run for job in self.active.values()]
        for run in [run for run in self.pending if run not in mine]:
            if final_loss(run) is not None:
                self.settle(run, self.finished, "finished elsewhere")
            elif failure_time(run) not in (None, self.failures_before[run.name]):
                self.settle(run, self.failed, f"FAILED elsewhere: {last_words(run)}")
            elif free and self.take(run):
                number = free.pop(0)
                process = launch(run, number, jobs=self.jobs, gpus=self.gpus, program=self.program)
                self.active[number] = Job(run, process)

    def take(self, run: Run) -> bool:
        """Take the lease of a run that nobody else has. Raises ValueError where sweeps differ in `expiry`."""
        lease = self.leases[run.name]
        os.makedirs(run.folder, exist_ok=True)
        try:
            lease.acquire(blocking=False)
        except filelock.Timeout:
            return False
        except filelock.LeaseSettingsMismatch:
            raise ValueError(f"a sweep of {run.folder} has another expiry: give both the same") from None
        # it may just have ended, or its sweep was killed while its train.py goes on
        if final_loss(run) is not None or is_training(run.folder):
            lease.release()
            return False
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(run.folder, "failed.txt"))
        return True

    def settle(self, run: Run, outcome: list[Run], text: str) -> None:
        """Move a run from the pending ones to the finished or the failed ones, and say so."""
        self.pending.remove(run)
        outcome.append(run)
        done = len(self.finished) + len(self.failed)
        print(f"[{done}/{done + len(self.pending)}] {run.name}: {text}", flush=True)

    def print_progress(self) -> None:
        """Once a minute: how far the running ones are, and how long all that is left will take."""
        if time.monotonic() > self.next_progress:
            self.next_progress = time.monotonic() + 60
            shares = [f"{run.name} {speed(run)[0] / run.max_iters:.0%}" for run, _ in self.active.values()]
            left = flops_left(self.pending)
            rate = (self.flops_before - left) / (time.monotonic() - self.started)
            print("  running: " + (", ".join(shares) or "others' runs")
                  + (f" | left about {format_duration(left / rate)}" if rate > 0 else ""), flush=True)

    def sleep(self) -> None:
        """Until a job ends, or for the pause between two looks."""
        if self.active:
            with contextlib.suppress(subprocess.TimeoutExpired):
                next(iter(self.active.values())).process.wait(self.pause)
        elif self.pending:
            time.sleep(self.pause)


def failure_time(run: Run) -> int | None:
    """When a sweep last failed at this run, in ns by the clock of its file system; None: never."""
    with contextlib.suppress(OSError):
        return os.stat(os.path.join(run.folder, "failed.txt")).st_mtime_ns


def flops_left(pending: list[Run]) -> float:
    """Training FLOPs that these runs still need."""
    return sum(run.flops * max(0.0, 1 - speed(run)[0] / run.max_iters) for run in pending)
