"""What is installed, and what README, CHANGELOG and LICENSE say about it, is true."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from documents import DOCUMENTS, PAGES, README, code_blocks, python_block, run_python_block
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from transformers import AutoProcessor

import vispruner
from vispruner import SELECTORS, VisPrunerOptions, conversion
from vispruner.configuration_vispruner import FIELD_NAMES
from vispruner.conversion import cli
from vispruner.conversion.build import build_repo
from vispruner.conversion.repo_config import HUB_CONFIGS, hub_config_names, load_repo_config
from vispruner.serving.launch_options import ENCODERS

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMANDS = ("pip install . && vispruner demo", 'pip install -e ".[test]" && pytest')


def table_after(header: str) -> list[list[str]]:
    lines = DOCUMENTS[DOCUMENTS.index(header) :].splitlines()[2:]
    rows = lines[: next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def file_tree() -> dict[str, str]:
    """Return path -> remark of CONTRIBUTING's map."""
    (tree,) = re.findall(r"^```\n(modeling/.*?)^```$", CONTRIBUTING, flags=re.MULTILINE | re.DOTALL)
    paths, folder = {}, ""
    for line in tree.splitlines():
        name, _, remark = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            paths[name] = remark.strip()
        else:
            paths[folder + name] = remark.strip()
    return paths


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_gives_each_command_alone_in_a_block(command: str) -> None:
    assert f"{command}\n" in code_blocks("")


def test_the_lock_file_holds_a_version_of_every_requirement_that_fits() -> None:
    text = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    assert "://" not in text, "it must install from whatever index pip or uv is set to"
    locked = defaultdict(list)
    for line in text.splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            locked[requirement.name].append(specifier.version)
    for requirement in map(Requirement, importlib.metadata.requires("vispruner") or ()):
        extras = [
            requirement.marker is None or requirement.marker.evaluate({"extra": name}) for name in ("test", "docs")
        ]
        if any(extras) and requirement.name != "vispruner":
            versions = locked[canonicalize_name(requirement.name)]
            assert versions and all(version in requirement.specifier for version in versions), requirement


def test_everything_on_the_map_exists() -> None:
    assert [path for path in file_tree() if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("folder", ["modeling", "conversion"])
def test_every_module_is_on_the_map(folder: str) -> None:
    modules = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    assert modules - set(file_tree()) == set()


def test_every_folder_of_the_repository_is_on_the_map() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    folders = {path.split("/")[0] + "/" for path in listed if "/" in path and not path.startswith(".")}
    assert folders - set(file_tree()) == set()


def test_the_documented_fields_and_defaults_are_the_config_s() -> None:
    rows = {row[0].strip("`"): row[1].strip("`").strip('"') for row in table_after("| field | default |")}
    defaults = VisPrunerOptions(method="none").to_dict() | {"method": "vispruner"}
    assert tuple(rows) == FIELD_NAMES
    assert rows == {name: "null" if value is None else str(value) for name, value in defaults.items()}


def test_the_documented_methods_are_the_registered_ones() -> None:
    assert {row[0].strip("`") for row in table_after("| method | keeps |")} == {*SELECTORS, "none"}


def test_relative_links_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
        assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


def test_the_readme_counts_the_architectures_that_vllm_serves() -> None:
    rows = re.findall(r"^\| [^|]+ \| \[.*\| ([✓ ]*)\|$", README, flags=re.MULTILINE)
    assert len(rows) == 12 and sum("✓" in served for served in rows) == len(ENCODERS) == 10
    assert "vLLM serves ten of the twelve" in " ".join(README.split())


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_documented_commands_are_understood() -> None:
    (block,) = (block for block in code_blocks("") if block.startswith("vispruner convert"))
    parsed = [cli._parser().parse_args(line.split()[1:]).command.__name__ for line in block.splitlines()]
    assert parsed == ["_convert", "_build", "_verify", "_show"]


def test_the_documented_yaml_is_a_repo_s(tmp_path: Path) -> None:
    (block,) = (block for block in code_blocks("yaml") if block.startswith("repo_id: your-name/"))
    (tmp_path / "mine.yaml").write_text(block)
    assert load_repo_config(tmp_path / "mine.yaml").vispruner_config["visual_token_num"] == 128


def test_every_command_of_ours_in_the_documents_is_understood() -> None:
    lines = [line for block in code_blocks("") for line in block.splitlines() if line.startswith("vispruner ")]
    assert len(lines) >= 6
    for line in lines:
        cli._parser().parse_args(shlex.split(line.partition(" #")[0])[1:])


def test_every_snippet_of_python_in_the_documents_is_python() -> None:
    assert len([ast.parse(block) for block in code_blocks("python")]) >= 8


def test_every_page_is_on_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [name for name in PAGES if name not in menu] == []


def test_the_readme_begins_with_what_runs(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.jpg")
    trained = Path(conversion.__file__).parent / "assets" / "tiny-llava"
    ran = run_python_block(code_blocks("python")[0], tmp_path, {"HuggingFaceTB/SmolVLM2-2.2B-Instruct": str(trained)})
    assert ran["model"].last_pruning.kept_counts == (36,)


def test_the_first_example_of_getting_started_runs(tiny_llava_repo: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.jpg")
    ran = run_python_block(
        python_block("visual_token_num=64"), tmp_path, {"llava-hf/llava-1.5-7b-hf": str(tiny_llava_repo)}
    )
    assert ran["model"].config.vispruner_config["visual_token_num"] == 64
    assert bool((ran["output"][:, : ran["inputs"].input_ids.shape[1]] == ran["inputs"].input_ids).all())


def test_the_readme_s_second_question_is_answered_as_if_it_came_with_the_image(
    tiny_llava_repo: Path, photo: Image.Image, tmp_path: Path
) -> None:
    model = vispruner.load(str(tiny_llava_repo), visual_token_num=16)
    processor = AutoProcessor.from_pretrained(tiny_llava_repo)
    model.generation_config.max_new_tokens = 8
    questions = [f"USER: <image>\n{text} ASSISTANT:" for text in ("What is this?", "Where is the cat?")]
    given = {"model": model, "processor": processor, "image": photo}
    ran = run_python_block(
        python_block("encode_images"),
        tmp_path,
        {},
        {**given, "question": questions[0], "other_question": questions[1]},
    )
    for question, answer in zip(questions, (ran["first"], ran["second"]), strict=True):
        inputs = processor(images=photo, text=question, return_tensors="pt")
        assert answer[0, -8:].tolist() == model.generate(**inputs)[0, -8:].tolist()


def test_the_readme_s_budget_of_one_call_holds_for_that_call(
    tiny_llava_repo: Path, photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vispruner.load(str(tiny_llava_repo), visual_token_num=16)
    processor = AutoProcessor.from_pretrained(tiny_llava_repo)
    inputs = processor(images=photo, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    block = python_block("set_vispruner_config(visual_token_num=32)")
    run_python_block(block, tmp_path, {}, {"model": model, "inputs": inputs})
    assert capsys.readouterr().out == "32 of 64 visual tokens kept\n"
    assert model.config.vispruner_config["visual_token_num"] == 32


def test_the_readme_s_log_probs_are_those_of_the_short_prompt(
    tiny_llava_repo: Path, photo: Image.Image, tmp_path: Path
) -> None:
    """Column by column, as generate would score the answer."""
    model = vispruner.load(str(tiny_llava_repo), visual_token_num=16).eval()
    processor = AutoProcessor.from_pretrained(tiny_llava_repo)
    given = {"model": model, "processor": processor, "image": photo, "answer": " It is a cat."}
    given["question"] = "USER: <image>\nWhat is this? ASSISTANT:"
    ran = run_python_block(python_block("logits_to_keep"), tmp_path, {}, given)
    answer = ran["new"][0].tolist()
    prompt, expected = dict(ran["prompt"]), []
    for token in answer:
        step = model.generate(**prompt, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        expected.append(float(step.logits[0][0].log_softmax(-1)[token]))
        prompt["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([[token]])], dim=1)
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    assert len(answer) > 3 and model.last_pruning.kept_counts == (16,)
    assert ran["log_probs"][0].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.core
def test_the_readme_s_check_tells_pruned_from_dense(tiny_llava_repo: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"repo_id: someone/tiny\nbase_model: {tiny_llava_repo}\narchitecture: llava\n"
        "vispruner_config: {visual_token_num: 16}\n"
    )
    repo = build_repo(config, tmp_path / "repo", show_progress=False)
    second = python_block("pipeline(")
    names = {"someone/llava-1.5-7b-vispruner": str(repo)}
    run_python_block(second, tmp_path, names)
    with pytest.raises(AssertionError, match="this is the dense model"):
        run_python_block(second, tmp_path, {**names, ", trust_remote_code=True)\n": ")\n"})


def test_the_package_brings_its_configs_its_pictures_and_its_checkpoint() -> None:
    assert "tiny-llava-vispruner" in hub_config_names()
    assert Path(conversion.__file__).parent.parent / "hub_configs" == HUB_CONFIGS
    folder = Path(conversion.__file__).parent / "assets"
    assets = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    files = ("config.json", "model.safetensors", "tokenizer.json")
    checkpoint = {f"{model}/{name}" for model in ("tiny-llava", "photo-llava") for name in files}
    package_data = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.setuptools.package-data]")[2]
    assert all(f'"{model}/*"' in package_data for model in ("tiny-llava", "photo-llava"))
    assert {
        "chelsea.jpg",
        "astronaut.jpg",
        "coffee.jpg",
        "scene.png",
        "scene.json",
        "README.md",
        *checkpoint,
    } <= assets


def test_the_sample_photo_is_small_and_its_licence_is_stated() -> None:
    assets = ROOT / "conversion" / "assets"
    about = (assets / "README.md").read_text(encoding="utf-8")
    for name in ("chelsea.jpg", "astronaut.jpg", "coffee.jpg"):
        assert (assets / name).stat().st_size < 150_000 and f"`{name}`" in about
    assert about.count("CC0 1.0") == 2 and "in the public domain" in about


def test_the_version_is_one() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    released = re.search(r"^## \[(\d.+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None
    assert released is not None
    assert vispruner.__version__ == importlib.metadata.version("vispruner") == declared[1] == released[1]


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert importlib.metadata.metadata("vispruner")["License-Expression"] == "Apache-2.0"


def test_the_command_is_installed() -> None:
    (script,) = (
        point
        for point in importlib.metadata.distribution("vispruner").entry_points
        if point.group == "console_scripts"
    )
    assert script.name == "vispruner"
    assert script.load() is cli.main


def test_continuous_integration_runs_the_readme_s_commands() -> None:
    for script in (ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "ci.yml"):
        text = script.read_text(encoding="utf-8")
        assert all(command in text for command in COMMANDS), script.name
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_a_release_is_what_every_run_has_built_installed_and_tried() -> None:
    assert os.access(ROOT / ".ci" / "release", os.X_OK)
    for script in (".ci/run", ".github/workflows/ci.yml", ".github/workflows/release.yml"):
        assert re.search(r"^[^#]*\.ci/release \S+", (ROOT / script).read_text(encoding="utf-8"), re.MULTILINE), script
    workflow = yaml.load((ROOT / ".github" / "workflows" / "release.yml").read_text(), yaml.BaseLoader)
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    assert workflow["jobs"]["publish"]["needs"] == "build"


def test_every_week_the_core_tests_run_on_what_comes_next() -> None:
    workflow = yaml.load((ROOT / ".github" / "workflows" / "weekly.yml").read_text(), yaml.BaseLoader)
    assert workflow["permissions"] == {"contents": "read"}
    assert all(len(event["cron"].split()) == 5 for event in workflow["on"]["schedule"])
    job = workflow["jobs"]["test"]
    installs = {entry["name"]: entry["install"] for entry in job["strategy"]["matrix"]["include"]}
    assert {name for name, install in installs.items() if ".ci/constraints.txt" not in install} == {"newest torch"}
    assert "git+" in installs["main branch of transformers"]
    assert "continue-on-error" not in str(job) and job["strategy"]["fail-fast"] == "false"
    assert 'pytest -m "core or not slow"' in [step.get("run") for step in job["steps"]]


def test_the_pythons_named_are_those_that_were_tried() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    tried = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert f'requires-python = ">={tried[0]}"' in project
    assert f"Python {tried[0]} or newer (tried up to {tried[-1]})" in DOCUMENTS


def test_continuous_integration_holds_torch_and_users_do_not() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert '"torch>=2.9",' in project and re.search(r'"torchvision>=[\d.]+"', project)
    held = re.findall(r"^(\w+)==[\d.]+$", (ROOT / ".ci" / "constraints.txt").read_text(), re.MULTILINE)
    assert held == ["torch", "torchvision"]
    for script in (".ci/run", ".github/workflows/ci.yml"):
        text = (ROOT / script).read_text()
        assert "cp .ci/constraints.txt" in text and "PIP_CONSTRAINT=" in text


@pytest.mark.core
def test_importing_the_package_needs_no_test_dependency() -> None:
    blocked = ("pytest", "hypothesis", "skimage", "matplotlib", "peft", "scipy", "sklearn", "easy_vqa")
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import vispruner, vispruner.conversion.cli, vispruner.conversion.demo, vispruner.conversion.convert\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
