"""Repos published on a local Hub by the README's own commands, and loaded as a stranger would: by name."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from documents import README
from local_hub import LocalHub
from tiny_llava import write_tiny_llava

from vispruner import conversion

ROOT = Path(__file__).parent.parent
PHOTO = Path(conversion.__file__).parent / "assets" / "chelsea.jpg"
TOKEN = "hf_the-owner-s-token"
BUDGETS = {"v8": {"visual_token_num": 8}, "quarter": {"keep_ratio": 0.25}}
KEPT = {"main": 16, "v8": 8, "quarter": 16}  # of 64
pytestmark = pytest.mark.slow

# Run where `vispruner` cannot be imported: the repo has to bring all it needs.
LOAD = """
import sys
sys.modules["vispruner"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
photo = Image.open(sys.argv[1])
for source in sys.argv[2:]:
    repo, _, revision = source.partition("@")
    processor = AutoProcessor.from_pretrained(repo, revision=revision)
    model, report = AutoModelForImageTextToText.from_pretrained(
        repo, revision=revision, trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    inputs = processor(images=photo, text="USER: <image>\\nWhat is this? ASSISTANT:", return_tensors="pt")
    result = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    (full,), (kept,) = model.visual_token_counts(inputs.pixel_values)
    assert result.past_key_values.get_seq_length() == result.sequences.shape[1] - 1 - full + kept
    answer = processor.decode(result.sequences[0, inputs.input_ids.shape[1]:])
    print("LOADED", source, full, kept, repr(answer))
"""
PIPELINE = """
import sys
sys.modules["vispruner"] = None
from PIL import Image
from transformers import pipeline
prompt = "USER: <image>\\nWhat is this? ASSISTANT:"
for repo in sys.argv[2:]:
    pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
    assert type(pipe.model).__name__.startswith("VisPruner"), type(pipe.model)
    print(repo, pipe(text=prompt, images=[Image.open(sys.argv[1])], max_new_tokens=4, return_full_text=False))
"""


@dataclass
class Site:
    """A local Hub and a machine of one user: a home with a token and a cache, and a working folder."""

    hub: LocalHub
    folder: Path

    def environment(self, home: str = "owner", **more: str) -> dict[str, str]:
        unset = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "HF_HUB_CACHE", "HF_ENDPOINT")
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        return {
            **inherited,
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.folder / home),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **more,
        }

    def run(self, *command: str, home: str = "owner", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(home, **more),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def load(self, *sources: str, home: str = "stranger", **more: str) -> dict[str, tuple[int, str]]:
        """Load each `repo@revision`, answer, and return it with the tokens that were kept and the answer."""
        done = self.run(sys.executable, "-c", LOAD, str(PHOTO), *sources, home=home, **more)
        assert done.returncode == 0, done.stderr
        found = re.findall(r"^LOADED (\S+) 64 (\d+) (.*)$", done.stdout, flags=re.MULTILINE)
        return {source: (int(kept), answer) for source, kept, answer in found}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A Hub with a base model on it, and a full and a thin repo that `upload.py` made from it."""
    folder = tmp_path_factory.mktemp("site")
    base = write_tiny_llava(folder / "tiny-llava", image_size=112)
    with LocalHub(folder / "hub") as hub:
        hub.add_user("user", TOKEN)
        hub.add_repo("user/tiny-llava")
        hub.commit("user/tiny-llava", {path.name: path.read_bytes() for path in base.iterdir()})
        site = Site(hub, folder)
        for kind in ("full", "thin"):
            content = {
                "repo_id": f"user/tiny-{kind}",
                "base_model": "user/tiny-llava",
                "base_revision": "main",
                "architecture": "llava",
                "vispruner_config": {"visual_token_num": 16},
                "weights": kind,
                "budgets": BUDGETS,
                "card": {"license": "apache-2.0"},
            }
            (folder / f"{kind}.yaml").write_text(yaml.safe_dump(content))
        done = site.run(sys.executable, str(ROOT / "upload.py"), "full.yaml", "thin.yaml", "--push", HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        yield site


def test_every_branch_of_a_full_and_of_a_thin_repo_loads_by_name_and_prunes(site: Site) -> None:
    sources = [f"user/tiny-{kind}@{branch}" for kind in ("full", "thin") for branch in KEPT]
    found = site.load(*sources)
    assert {source: kept for source, (kept, _) in found.items()} == {
        source: KEPT[source.partition("@")[2]] for source in sources
    }
    for branch in KEPT:
        assert found[f"user/tiny-full@{branch}"][1] == found[f"user/tiny-thin@{branch}"][1]


def test_the_thin_repo_holds_no_weights_and_the_base_s_commit(site: Site) -> None:
    files = site.hub.files("user/tiny-thin")
    assert not [path for path in files if path.endswith((".safetensors", ".bin"))]
    assert "model.safetensors" in site.hub.files("user/tiny-full")
    assert site.hub.refs("user/tiny-llava")["main"].encode() in files["config.json"]


def test_a_pipeline_by_name(site: Site) -> None:
    done = site.run(sys.executable, "-c", PIPELINE, str(PHOTO), "user/tiny-full", "user/tiny-thin", home="stranger")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("generated_text") == 2


def test_a_private_repo_loads_for_its_owner_only(site: Site) -> None:
    site.hub.add_repo("user/secret", private=True)
    site.hub.commit("user/secret", site.hub.files("user/tiny-full"))
    assert site.load("user/secret@main", home="owner", HF_TOKEN=TOKEN)["user/secret@main"][0] == 16
    refused = site.run(sys.executable, "-c", LOAD, str(PHOTO), "user/secret@main", home="stranger")
    assert refused.returncode == 1
    assert "user/secret" in refused.stderr


def test_offline_from_the_cache(site: Site) -> None:
    sources = ("user/tiny-full@v8", "user/tiny-thin@v8")
    online = site.load(*sources, home="traveller")
    before = len(site.hub.requests)
    assert site.load(*sources, home="traveller", HF_HUB_OFFLINE="1") == online
    assert len(site.hub.requests) == before


def test_the_readme_s_commands_end_in_a_repo_that_loads_and_prunes(site: Site) -> None:
    """Put your name into a YAML, look, log in, push; two processes build the same bytes."""
    shipped = (ROOT / "hub_configs" / "tiny-llava-vispruner.yaml").read_text(encoding="utf-8")
    assert "repo_id: someone/" in shipped
    (site.folder / "mine.yaml").write_text(shipped.replace("repo_id: someone/", "repo_id: user/"))
    (block,) = re.findall(r"^```\n(vispruner publish mine\.yaml\n.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    here = {
        "hf auth login": f"hf auth login --token {TOKEN}",
        "vispruner publish": f"{sys.executable} -m vispruner publish",
    }
    for published, local in here.items():
        assert published in block
        block = block.replace(published, local)
    commands = block.splitlines()
    assert len(commands) == 3 and commands[-1].endswith("mine.yaml --push")
    outputs, builds = [], []
    folder = site.folder / "build" / "upload" / "tiny-llava-vispruner"
    for command in commands:
        done = site.run(*shlex.split(command), home="newcomer")
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout + done.stderr)
        builds.append({path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {})
        if "--push" not in command:
            assert "user/tiny-llava-vispruner" not in site.hub.repos
    assert "dry run" in outputs[0]
    assert builds[0] == builds[2]
    assert builds[2].items() <= site.hub.files("user/tiny-llava-vispruner").items()
    assert not [output for output in (outputs[0], outputs[2]) if TOKEN in output]
    done = site.run(sys.executable, "-c", PIPELINE, str(PHOTO), "user/tiny-llava-vispruner", home="stranger")
    assert done.returncode == 0, done.stderr
