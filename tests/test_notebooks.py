"""The notebooks run from the first cell to the last, on the model in the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

QUICKSTART = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(QUICKSTART.read_text(encoding="utf-8"))["cells"]
    parameters, *rest = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(parameters, names)
    names["MODEL"] = "embedded/tiny-llava"
    for source in rest:
        exec(compile(source, QUICKSTART.name, "exec"), names)
    assert isinstance(names["picture"], Image.Image)
    (_, dense), (_, pruned) = names["figures"].values()
    assert dense - pruned == 144 - 36
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / names["FOLDER"], trust_remote_code=True)
    assert type(again).__name__ == "VisPrunerLlavaForConditionalGeneration"
