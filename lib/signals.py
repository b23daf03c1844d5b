"""Signals that end a run, handled where a training loop looks for them."""
import signal


class Stopped(SystemExit):
    """A signal that ends the program at once."""

# the last two are those that schedulers send before a time limit, such as Slurm with --signal
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


class DeferredSignals:
    """Before training a signal exits at once; during training (`deferring`) it is noted, and handled
    between iterations, micro-batches or batches of an evaluation.

    `received` is 0, or the number of the first signal that came while deferring. Further signals change
    nothing: torchrun and a terminal may both send one.
    """

    def __init__(self):
        self.received, self.deferring = 0, False
        for name in NAMES:
            number = getattr(signal, name, None)  # Windows has two of them
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._handle)

    def stop_deferring(self, handled: int) -> None:
        """From here on a signal exits at once, even one that came since the caller last looked, unless the
        caller has `handled` one."""
        self.deferring = False
        if self.received and not handled:
            raise Stopped(128 + self.received)

    def _handle(self, number, frame):
        if not self.deferring:
            raise Stopped(128 + number)
        self.received = self.received or number
