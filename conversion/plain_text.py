"""Show text of others, such as file names and answers of servers, without what a terminal would obey."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` with every character but line ends that is not to be seen written as its escape."""
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


def one_line(text: str) -> str:
    """Return `text` as `printable` does, on one line whatever it holds."""
    return printable(text).replace("\n", "\\n")
