"""Tables in markdown, which a terminal shows as tables too."""
from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table with its columns aligned: a line for the head, one under it, and one for each row."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
