"""The Space that shows a repo: what its files say, that they stay, and that its app answers with a repo from a Hub."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from hub_protocol import metadata_problems
from local_hub import LocalHub

from vispruner import __version__
from vispruner.conversion.build import build_repo
from vispruner.conversion.cli import main
from vispruner.conversion.hub_access import require_write_access
from vispruner.conversion.model_card import model_card
from vispruner.conversion.questions import SCENE
from vispruner.conversion.repo_config import RepoConfigError, hub_config_names, load_repo_config
from vispruner.conversion.space import GRADIO, shown_models, space_files, write_space

STEM, REPO = "tiny-llava-vispruner", "someone/tiny-llava-vispruner"


@pytest.mark.parametrize("stem", hub_config_names())
def test_the_files_of_every_shipped_config(stem: str) -> None:
    repo = load_repo_config(stem)
    files = space_files(repo)
    front = yaml.safe_load(files["README.md"].split("---\n")[1])
    assert metadata_problems(files["README.md"], "space") == ([], [])
    assert (front["sdk"], front["app_file"], front["models"][0]) == ("gradio", "app.py", repo.repo_id)
    assert shown_models(files["README.md"]) == front["models"]
    assert (repo.base_model in front["models"]) == repo.base_on_hub
    assert "trust_remote_code=True" in files["README.md"] and "no code of the model" in files["README.md"]
    assert ast.parse(files["app.py"]).body[-1].value.args[0].value == repo.repo_id
    assert sum(map(len, files.values())) < 4000
    extras = "ui,video" if stem.startswith(("qwen", "smolvlm", "internvl", "video", "llava-onevision")) else "ui"
    assert files["requirements.txt"] == f"vispruner[{extras}]=={__version__}\n"


def test_zerogpu_comes_before_all_that_may_look_for_a_gpu() -> None:
    text = space_files(load_repo_config(STEM))["app.py"]
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    first, *_ = sorted(imports, key=lambda node: node.lineno)
    assert isinstance(first, ast.Import) and first.names[0].name == "spaces"


@pytest.mark.ui
def test_the_gradio_it_asks_for_is_of_the_version_that_runs_here() -> None:
    assert GRADIO.split(".")[0] == version("gradio").split(".")[0]


def test_the_command_writes_over_its_own_folder_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page"
    assert main(["space", STEM, "--out", str(out)]) == 0
    assert {path.name: path.read_text() for path in out.iterdir()} == space_files(load_repo_config(STEM))
    (out / "app.py").write_text("old")
    write_space(STEM, out)
    assert "serve" in (out / "app.py").read_text()
    with pytest.raises(RepoConfigError, match=r"holds files that no Space of someone/llava-1.5-7b-vispruner has"):
        write_space("llava-1.5-7b-vispruner", out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RepoConfigError, match=r"holds notes\.txt"):
        write_space(STEM, out)
    with pytest.raises(RepoConfigError, match="is a file"):
        write_space(STEM, out / "notes.txt")


@pytest.mark.parametrize(
    "text", ["", "no front matter", "---\n- a\n---\n", "---\n: : :\n---\n", "---\nmodels: x\n---\n"]
)
def test_what_is_no_readme_of_a_space_shows_nothing(text: str) -> None:
    assert shown_models(text) == []


def test_the_card_links_to_the_space_that_the_yaml_names(tmp_path: Path) -> None:
    shipped = load_repo_config(STEM)
    content = yaml.safe_load(shipped.path.read_text()) | {"space": "someone/page"}
    path = tmp_path / "with.yaml"
    path.write_text(yaml.safe_dump(content))
    link = "[Try it in the browser](https://huggingface.co/spaces/someone/page)"
    assert link in model_card(load_repo_config(path), None, thin=False)
    assert "Try it in the browser" not in model_card(shipped, None, thin=False)


@pytest.mark.parametrize(("space", "said"), [("page", "space must be owner/name"), (3, "space must be text")])
def test_a_space_is_a_hub_id(space: object, said: str, tmp_path: Path) -> None:
    content = yaml.safe_load(load_repo_config(STEM).path.read_text()) | {"space": space}
    path = tmp_path / "with.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RepoConfigError, match=said):
        load_repo_config(path)


def test_a_fine_grained_token_for_one_space() -> None:
    scope = {"entity": {"type": "space", "name": "me/page"}, "permissions": ["repo.write"]}
    token = {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    account = {"name": "me", "orgs": [], "auth": {"accessToken": token}}
    require_write_access(account, "me/page", creates=False, kind="space")
    for options in ({"creates": False, "kind": "model"}, {"creates": True, "kind": "space"}):
        with pytest.raises(Exception, match="may not write to"):
            require_write_access(account, "me/page", **options)


@pytest.mark.ui
@pytest.mark.slow
def test_its_app_answers_with_the_repo_that_a_hub_holds(tmp_path: Path) -> None:
    """As on ZeroGPU: `spaces` is there, and both calls go through it."""
    from gradio_client import Client, handle_file

    folder = write_space(STEM, tmp_path / "page")
    stand_in = "def GPU(function):\n    print('gpu', function.__name__, flush=True)\n    return function\n"
    (folder / "spaces.py").write_text(stand_in)
    built = build_repo(STEM, tmp_path / "repo", show_progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with LocalHub(tmp_path / "hub") as hub:
        hub.add_user("someone", "hf_someone")
        hub.add_repo(REPO)
        hub.commit(REPO, {path.name: path.read_bytes() for path in built.iterdir()})
        more = {"GRADIO_SERVER_PORT": port, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=folder,
            env=hub.client_env(tmp_path / "home", **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as app:
            try:
                said = []
                for line in app.stdout:
                    said.append(line)
                    if "Running on local URL" in line:
                        break
                assert any("Running on" in line for line in said), "".join(said)
                given = [handle_file(str(SCENE)), "What color is the square?", 12.5, "vispruner"]
                client = Client(f"http://127.0.0.1:{port}", verbose=False)
                assert client.predict(*given, api_name="/answer")[:2] == ("orange", "orange")
            finally:
                app.kill()
        asked = {re.sub(r".*/resolve/[^/]+/", "", path) for _, path in hub.requests if "/resolve/" in path}
    assert {"gpu draw\n", "gpu answer\n"} <= set(said)
    assert "model.safetensors" in asked and not any(name.endswith(".py") for name in asked)  # no code of the repo
