"""Options that name what a benchmark writes: each is refused before anything is measured, if it could not be written.

They are the `type` of options of argparse, and check as the commands of `vispruner` do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from vispruner.conversion.checkpoint_io import writable_file, writable_folder


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """Return what reads the name of a file to write, which ends in one of `suffixes`."""
    return lambda name: _said(lambda: writable_file(name, suffixes, "the result"))


def output_folder(name: str) -> Path:
    """Read the name of a folder, which must exist, to write files into."""
    return _said(lambda: writable_file(Path(name) / "result.json", (".json",), "the result").parent)


def new_folder(name: str) -> Path:
    """Read the name of a folder to make, or to replace."""
    return _said(lambda: writable_folder(name))


def _said(check: Callable[[], Path]) -> Path:
    try:
        return check()
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
