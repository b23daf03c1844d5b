"""Command lines of tools that take places, folders or files, beside --key=value."""


def split_places(arguments: list[str], doc: str) -> tuple[list[str], list[str]]:
    """(places, flags) of a command line; prints the program's docstring before the keys that --help lists."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    if {"-h", "--help"} & set(flags):
        print(doc)
    return [argument for argument in arguments if not argument.startswith("-")], flags
