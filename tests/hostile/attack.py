"""One attacked machine, and what an attacker can do to it; every code of his leaves a mark."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from vispruner.conversion import verify
from vispruner.conversion.verify import verify_repo

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = "llava-hf/tiny"


@dataclass(frozen=True)
class Attack:
    """One attacked machine: the repo under attack, a folder of the attacker elsewhere, and the mark his code leaves.

    cache  the user's Hub cache, which the attacker may fill with repos of his own
    """

    repo: Path
    elsewhere: Path
    cache: Path
    mark: Path

    @property
    def code(self) -> str:
        """Python that leaves the mark, and defines whatever class or function it is asked for."""
        return f"open({str(self.mark)!r}, 'w').close()\ndef __getattr__(name):\n    return type(name, (), {{}})\n"

    def write_code(self, folder: Path, name: str = "evil.py") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(self.code)
        return folder / name

    def in_cache(self, repo_id: str, files: dict[str, str]) -> Path:
        """Put a repo of the attacker into the user's Hub cache, as an earlier download leaves it."""
        root = self.cache / f"models--{repo_id.replace('/', '--')}"
        snapshot = root / "snapshots" / COMMIT
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text(COMMIT)
        for name, text in files.items():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_text(text)
        return snapshot

    def edit(self, name: str, **changes: Any) -> None:
        """Change entries of one of the repo's JSON files."""
        path = self.repo / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))

    def edit_part(self, part: str, **changes: Any) -> None:
        """Change entries of one part of config.json."""
        config = json.loads((self.repo / "config.json").read_text())
        self.edit("config.json", **{part: {**config[part], **changes}})


def refusal_unloaded(
    spoil: Callable[[Attack], None], repo: Path, attack_on: Callable[[Path], Attack], monkeypatch: pytest.MonkeyPatch
) -> str:
    """What `verify` prints of a spoiled copy of a repo, which it must not load."""
    monkeypatch.setattr(verify, "_run_worker", lambda *arguments: pytest.fail("it was loaded"))
    attack = attack_on(repo)
    spoil(attack)
    return verify_repo(attack.repo).table()


def write_yaml(folder: Path, **changes: Any) -> Path:
    content = {
        "repo_id": "someone/pruned",
        "base_model": BASE,
        "base_revision": COMMIT,
        "architecture": "llava",
        "vispruner_config": {"visual_token_num": 16},
        "card": {"license": "apache-2.0"},
    }
    path = folder / "pruned.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path
