"""Make the model that a config.json describes, and say how tensors fit it: `verify` runs this in a process of its own.

What an unknown config.json asks for may take any time and any memory, or raise anything.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vispruner.conversion.published_layout import layout_facts


def main(settings_file: str, results_file: str) -> None:
    """Write the facts, or the error as one line."""
    settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
    results: dict[str, Any]
    try:
        results = {"facts": asdict(layout_facts(**settings))}
    except Exception as error:  # whatever the classes of transformers make of it
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        results = {"error": f"{kind}{error}"}
    Path(results_file).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
