"""For mkdocs: what the site needs from beside docs/: the package, pictures, recorded figures, links to other files."""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from comparison import TABLES  # noqa: E402

PACKAGE = tempfile.TemporaryDirectory()


@event_priority(50)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    """Lay the package out as it installs, so that its docstrings are found without installing it."""
    package = Path(PACKAGE.name) / "vispruner"
    if not package.exists():
        package.mkdir()
        for path in [*(ROOT / "modeling").glob("*.py"), ROOT / "conversion", ROOT / "serving"]:
            (package / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [PACKAGE.name]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the recorded pictures to the site."""
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **arguments: Any) -> str:
    """Point to those pictures, and name files of the repository that are no pages."""
    markdown = re.sub(r"<!-- comparison: ([\w ]+) -->", lambda found: TABLES[found[1]](), markdown)
    markdown = markdown.replace("(../benchmarks/results/", "(results/")
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
