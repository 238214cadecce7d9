"""What benchmarks record: JSON files, written whole or not at all, that say the versions they were measured with."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vispruner import __version__
from vispruner.conversion.checkpoint_io import replacing

RESULTS = Path(__file__).parent / "results"  # the records that are committed, from which the tables of the docs come


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, which appears only when it is complete."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears only when it is complete."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of this library, Python, torch, transformers and of further packages, by name."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    return {"vispruner": __version__, "python": platform.python_version(), **found}
