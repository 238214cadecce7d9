"""The files of a Space: `vispruner demo --ui` for one published repo, on the Hub, ready for its ZeroGPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from vispruner import __version__

from .checkpoint_io import replacing
from .model_card import TAGS, UNKNOWN_VERSION
from .repo_config import RepoConfig, RepoConfigError, load_repo_config

GRADIO = "6.31.0"  # that the page was tried with
PYTHON = "3.12"
SPACE_FILES = ("README.md", "app.py", "requirements.txt")

APP = '''\
"""Shows {repo_id}: the page of `vispruner demo --ui`. The installed package runs it, and no code of that repo."""

try:
    import spaces  # noqa: F401 - lends a GPU to each call, and has to come before whatever may look for one
except ImportError:
    pass

from vispruner.conversion.demo_app import serve

serve("{repo_id}")
'''

ABOUT = """\
# {name} in the browser

Upload a picture, move the slider, and see which patches [{repo_id}](https://huggingface.co/{repo_id}) keeps for its
language model, with the answers of the stock and of the pruned model.

The page runs the installed package `vispruner`, and no code of the model's repository. With transformers alone that
repository is loaded with `trust_remote_code=True`, which runs its Python files on your machine: read them, and pin the
commit that you read (`revision="<commit>"`).

Written by `vispruner space`, version {version}. Times on shared hardware say little.
"""


def space_files(repo: RepoConfig) -> dict[str, str]:
    """Return the text of each file of the Space that shows a YAML's repo."""
    name = repo.repo_id.split("/")[-1]
    header = {
        "title": name,
        "emoji": "✂️",
        "colorFrom": "yellow",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": PYTHON,
        "app_file": "app.py",
        "suggested_hardware": "zero-a10g",
        "short_description": "Which visual tokens a pruned model keeps",
        "models": [repo.repo_id, *([repo.base_model] if repo.base_on_hub else [])],
        "tags": list(TAGS),
        "license": "apache-2.0",
    }
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    about = ABOUT.format(name=name, repo_id=repo.repo_id, version=__version__)
    extras = "ui,video" if repo.architecture in VIDEO_PROCESSOR_MAPPING_NAMES else "ui"
    version = "" if __version__ == UNKNOWN_VERSION else f"=={__version__}"
    return {
        "README.md": f"---\n{front}---\n\n{about}",
        "app.py": APP.format(repo_id=repo.repo_id),
        "requirements.txt": f"vispruner[{extras}]{version}\n",
    }


def shown_models(readme: str) -> list[Any]:
    """Return the models that the README.md of a Space says it shows; none where it says nothing that can be read."""
    try:
        header = yaml.safe_load(readme.split("---\n")[1])
        return list(header["models"]) if header["models"] and isinstance(header["models"], list) else []
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
        return []


def write_space(config: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the Space of a YAML into the folder `out`, over an older one but over nothing else."""
    repo, folder = load_repo_config(config), Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise RepoConfigError(f"{folder} is a file: give a folder with --out")
    strange = sorted(path.name for path in folder.iterdir() if path.name not in SPACE_FILES) if folder.is_dir() else []
    readme = folder / "README.md"
    is_older = readme.is_file() and repo.repo_id in shown_models(readme.read_text(encoding="utf-8", errors="replace"))
    if strange or (folder.is_dir() and any(folder.iterdir()) and not is_older):
        held = ", ".join(strange[:3]) or "files"
        raise RepoConfigError(f"{folder} holds {held} that no Space of {repo.repo_id} has: give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in space_files(repo).items():
        with replacing(folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return folder
