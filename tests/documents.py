"""What README and the pages of docs/ say, for the tests that hold them to it."""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
DOCUMENTS = "\n".join([README, *PAGES.values()])


def code_blocks(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", DOCUMENTS, flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in blocks if name == language]


def run_python_block(
    block: str, folder: Path, names: dict[str, str], namespace: dict[str, Any] | None = None
) -> dict[str, Any]:
    for published, local in names.items():
        assert published in block
        block = block.replace(published, local)
    before = Path.cwd()
    os.chdir(folder)
    namespace = {} if namespace is None else namespace
    try:
        exec(compile(block, "README.md", "exec"), namespace)
    finally:
        os.chdir(before)
    return namespace


def python_block(containing: str) -> str:
    """Return the first block of Python in the README that has this."""
    return next(block for block in code_blocks("python") if containing in block)
