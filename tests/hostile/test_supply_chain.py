"""What builds and publishes the package: actions by commit, few rights, pinned tools, and auditors that run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(workflow: Path) -> dict[str, dict[str, Any]]:
    return yaml.load(workflow.read_text(), yaml.BaseLoader)["jobs"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_actions_are_pinned_by_commit_and_named_by_version(workflow: Path) -> None:
    used = re.findall(r"^ *-? *uses: (.*)$", workflow.read_text(), re.MULTILINE)
    assert used
    assert [line for line in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_an_action_is_the_same_everywhere() -> None:
    used = {line for path in WORKFLOWS for line in re.findall(r"uses: (\S+@\S+)", path.read_text())}
    assert len({line.partition("@")[0] for line in used}) == len(used)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_a_job_may_read_the_code_and_no_more(workflow: Path) -> None:
    whole = yaml.load(workflow.read_text(), yaml.BaseLoader)
    assert whole["permissions"] in ({}, {"contents": "read"})
    for name, job in whole["jobs"].items():
        rights = job.get("permissions", whole["permissions"])
        assert rights == ({"id-token": "write"} if name == "publish" else {"contents": "read"}), name
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] == "false"
        assert not re.search(r"\$\{\{ *(github\.event|github\.head_ref|secrets)", str(job))


def test_a_release_is_built_by_pinned_tools_from_one_index_and_published_by_nothing_else() -> None:
    workflow = ROOT / ".github" / "workflows" / "release.yml"
    assert "INDEX" not in workflow.read_text()
    steps = [step.get("run") for step in jobs(workflow)["build"]["steps"] if "run" in step]
    assert steps[0] == ".ci/build dist"
    assert jobs(workflow)["build"]["needs"] == "try" and jobs(workflow)["publish"]["needs"] == "build"
    assert not [step for step in jobs(workflow)["publish"]["steps"] if "run" in step]
    build = (ROOT / ".ci" / "build").read_text()
    assert "unset PIP_EXTRA_INDEX_URL" in build and "release-tools.txt" in build
    installed = re.findall(r"^pip install (.*)$", build, re.MULTILINE)
    assert installed == ["build twine"]
    pins = re.findall(r"^(?!#)(.*)$", (ROOT / ".ci" / "release-tools.txt").read_text(), re.MULTILINE)
    names = {pin.partition("==")[0] for pin in pins if pin}
    assert {"build", "twine", "setuptools"} <= names
    assert [pin for pin in pins if pin and not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    assert os.access(ROOT / ".ci" / "build", os.X_OK)


def test_the_weekly_run_audits_the_code_and_what_it_depends_on_and_attacks_it() -> None:
    workflow = ROOT / ".github" / "workflows" / "weekly.yml"
    assert "schedule" in yaml.load(workflow.read_text(), yaml.BaseLoader)["on"]
    audit = jobs(workflow)["audit"]
    commands = " ".join(step.get("run", "") for step in audit["steps"])
    assert re.search(r'pip" install bandit==\d\S* pip-audit==\d\S*', commands)
    for folder in ("conversion", "modeling", "serving", "upload.py"):
        assert re.search(rf"bandit\" .*--recursive .*{re.escape(folder)}", commands)
    assert "pytest tests/hostile" in commands


def test_every_run_attacks_it_too() -> None:
    for script in (ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "ci.yml"):
        assert re.search(r"\bpytest\b(?! tests)", script.read_text()), script.name
    configured = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in configured


def test_the_threat_model_is_written_down() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
    for word in ("trust_remote_code", "verify", "Hub", "Not against", "Report a flaw"):
        assert word in text
