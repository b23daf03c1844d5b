"""Text that arrives in pieces, cut off at a stop text."""


class StopText:
    """Passes pieces of a text on, up to the first place where `stop` begins; None: all of them. Raises
    ValueError for an empty stop.

    found   whether the stop text has come
    """

    def __init__(self, stop: str | None):
        if stop == "":
            raise ValueError("the stop text is empty: give it at least one character")
        self.stop, self.held, self.found = stop, "", False

    def __call__(self, piece: str) -> str:
        """What is sure to come before the stop text: an end that may be its beginning is held back."""
        if self.stop is None or self.found:
            return "" if self.found else piece
        text, self.held = self.held + piece, ""
        before, stop, _ = text.partition(self.stop)
        self.found = bool(stop)
        if not self.found:
            held = next(n for n in range(len(self.stop) - 1, -1, -1) if text.endswith(self.stop[:n]))
            before, self.held = text[:len(text) - held], text[len(text) - held:]
        return before

    def flush(self) -> str:
        """What is held back, once no more is to come."""
        held, self.held = self.held, ""
        return held
