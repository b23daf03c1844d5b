"""A program's output, on terminals that lack characters and on outputs that fail. Needs no torch."""
import contextlib
import io
import sys


class OutputLost(SystemExit):
    """Nobody reads what a program prints, or nothing can be written there: the program ends."""


class Output(io.RawIOBase):
    """Bytes for a terminal, a pipe or a file, given as a raw stream.

    With keep_going, what cannot be written (a closed pipe, a full disk) is dropped. Without, the first such
    write raises OutputLost: with the status of SIGPIPE for a closed pipe, else with one sentence.
    """

    def __init__(self, raw, keep_going: bool):
        self.raw, self.name, self.keep_going = raw, raw.name, keep_going

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def write(self, data) -> int:
        try:
            written = self.raw.write(data)
            return len(data) if written is None else written  # None: a terminal that would have to wait
        except OSError as e:
            if not self.keep_going:
                self.keep_going = True  # the interpreter flushes once more at its end
                raise OutputLost(128 + 13 if isinstance(e, BrokenPipeError) else
                                 f"error: the output cannot be written: {e.strerror}") from None
            return len(data)


def excepthook(kind, error, traceback) -> None:
    """A sys.excepthook: no traceback where Ctrl-C ends a program; its exit status is that of SIGINT."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def prepare_output(keep_going: bool = False) -> None:
    """Every program calls it first: characters that stdout and stderr lack become "?", and neither a failed
    write nor Ctrl-C prints a traceback.

    keep_going: the program has more to do than to print, and goes on without its output (see Output). Streams
    that are not the program's own, such as those of a test, stay as they are.
    """
    sys.excepthook = excepthook
    for name, going_on in (("stdout", keep_going), ("stderr", True)):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError):
                stream.flush()
            raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer between the two
            output = io.BufferedWriter(Output(raw, going_on))
            setattr(sys, name, io.TextIOWrapper(output, stream.encoding, "replace", line_buffering=True))
