"""Which imports the code of a Hub repo may have: the standard library, torch, transformers and its own other files."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ALLOWED_PACKAGES = frozenset({"torch", "transformers"})
MOST_SOURCE = 2**18
OPTIONAL_PACKAGES = frozenset({"triton"})  # allowed inside `try:`


def forbidden_imports(path: Path, siblings: set[str]) -> list[str]:
    """List the imports of one file that a Hub repo may not have, as sentences with their line numbers."""
    if path.stat().st_size > MOST_SOURCE:
        return [f"is larger than {MOST_SOURCE // 2**10} KiB, which no published file is"]
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=path.name)
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        for statement in block.body
        for node in ast.walk(statement)
    }
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            if node.level > 1 or node.module is None or node.module not in siblings:
                written = "." * node.level + (node.module or "")
                problems.append(f"line {node.lineno} imports from {written}: only `from .sibling import name` loads")
            continue
        else:
            continue
        for name in names:
            package = name.partition(".")[0]
            known = package in ALLOWED_PACKAGES or package in sys.stdlib_module_names
            if not known and not (package in OPTIONAL_PACKAGES and id(node) in guarded):
                problems.append(f"line {node.lineno} imports {name}: not the standard library, torch or transformers")
    # transformers looks for relative imports in the text, docstrings included, and wants a file for each.
    for sibling in re.findall(r"^[^\S\n]*(?:from|import)[^\S\n]+\.(\S+)", source, flags=re.MULTILINE):
        if sibling not in siblings:
            problems.append(f"has a line that reads like an import of .{sibling}, which is no file of the repo")
    return problems
