"""What code each release carried: the sha256 of every published file, by version, so that its repos verify later on.

`python -m vispruner.conversion.released_code` records this version's files; a release does it first.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vispruner import ARCHITECTURES, __version__, code_files

from .endpoint_files import HANDLER, SOURCE

RELEASED = Path(__file__).parent / "assets" / "released_code.json"


def released_code(version: object) -> dict[str, str]:
    """Return file name -> sha256 of the published files of a release; nothing where it is not on record."""
    return json.loads(RELEASED.read_text(encoding="utf-8")).get(version, {})


def digest(path: Path) -> str:
    """Return the sha256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record() -> None:
    """Add the files of this version, or replace what was recorded of them."""
    files = {path.name: digest(path) for architecture in ARCHITECTURES for path in code_files(architecture)}
    files[HANDLER] = digest(SOURCE)
    known = json.loads(RELEASED.read_text(encoding="utf-8"))
    text = json.dumps({**known, __version__: dict(sorted(files.items()))}, indent=2)
    RELEASED.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
