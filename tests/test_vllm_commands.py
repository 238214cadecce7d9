"""What the docs tell operators to run: systemd and Compose read it, vLLM takes it, and a launch is what it says."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from importlib.util import find_spec
from typing import Any

import pytest
import yaml
from documents import DOCUMENTS, PAGES
from transformers import Qwen2_5_VLConfig

from vispruner import ARCHITECTURES
from vispruner.serving.launch_options import merged_options
from vispruner.serving.request_budgets import BLOCK, RequestBudgets
from vispruner.serving.vllm_plugin import MODELS


def block(language: str) -> str:
    """Return the one block of that language on the page for operators."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGES["operate.md"], re.MULTILINE | re.DOTALL)
    return found


def of_systemd() -> list[str]:
    unit = configparser.RawConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(block("ini"))
    assert unit.sections() == ["Unit", "Service", "Install"]
    command = shlex.split(unit["Service"]["ExecStart"])
    assert "%" not in unit["Service"]["ExecStart"] and "$" not in unit["Service"]["ExecStart"]  # which systemd expands
    return command


def of_compose() -> list[str]:
    (service,) = yaml.safe_load(block("yaml"))["services"].values()
    assert all(isinstance(word, str) for word in service["command"])
    return [*service["entrypoint"], *service["command"]]


def written() -> list[list[str]]:
    """Return every `vllm serve` that stands in a block of the docs, its placeholders filled in."""
    lines = re.findall(r"^vllm serve .*$", DOCUMENTS, re.MULTILINE)
    assert lines
    return [shlex.split(line) for line in lines]


COMMANDS = [of_systemd(), of_compose(), *written()]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_a_command_overrides_is_a_launch(command: list[str]) -> None:
    if "--hf-overrides" not in command:
        return
    given = json.loads(command[command.index("--hf-overrides") + 1])
    (name,) = given["architectures"]
    assert name in MODELS and set(given) <= {"architectures", "vispruner_config", BLOCK}
    (model_type,) = (kind for kind, own in ARCHITECTURES.items() if own.model_class.__name__ == name)
    config: Any = ARCHITECTURES[model_type].config_class()
    if isinstance(config, Qwen2_5_VLConfig):
        config.vision_config.fullatt_block_indexes = [7, 15, 23, 31]
    options = merged_options(config, None, given["vispruner_config"])
    budgets = RequestBudgets.of_launch(options, given.get(BLOCK))
    assert budgets.default.budget(576) < 576


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; .ci/vllm-cpu installs it")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_vllm_takes_the_command_line(command: list[str]) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    program, serve, *arguments = command
    assert program.endswith("vllm") and serve == "serve"
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    assert parsed.model_tag == arguments[0]
    if "--hf-overrides" in arguments:
        assert parsed.hf_overrides["architectures"]
