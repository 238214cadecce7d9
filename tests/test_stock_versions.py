"""One file knows that transformers has versions, says which were tested, and warns on a newer one."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from matrix import Model

import vispruner
from vispruner import stock_versions
from vispruner.stock_versions import NEWEST_TESTED, OLDEST_SUPPORTED, by_stock_name, warn_if_untested

ROOT = Path(__file__).parent.parent
ROOM = Path("modeling/stock_versions.py")
TEXTS = {".py", ".md", ".jinja", ".yaml"}
FILES = [
    file.relative_to(ROOT)
    for folder in ("modeling", "serving", "conversion")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in TEXTS
]
# "5.17", "5.24.1", "5.x", and "transformers 5" or "transformers>=5"; no "0.5.17".
NUMBER = re.compile(r"(?<![\d.])5\.(?:1[0-9]|[2-9][0-9]|x\b)|transformers`?\s?(?:[<>=~!]=?)?\s?v?\d", re.IGNORECASE)


def questions(source: str) -> Iterator[str]:
    """Yield what in `source` asks which transformers is installed, by its number or by what it has."""
    nodes = list(ast.walk(ast.parse(source)))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and is_stock(node)]
    imported = {alias.name: alias.asname or alias.name for node in imports for alias in node.names}
    stock = {"transformers", *imported.values()}
    yield from (name for name in imported if name in ("__version__", "is_transformers_version"))
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr == "__version__" and root(node) in stock:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and node.args:
            name, about = ast.unparse(node.func).rpartition(".")[2], node.args[0]
            by_number = name in ("version", "find_spec") and ast.unparse(about) == "'transformers'"
            may_lack = name in ("signature", "hasattr", "dir") or (name == "getattr" and len(node.args) == 3)
            if by_number or (may_lack and root(about) in stock):
                yield ast.unparse(node)
        elif isinstance(node, ast.Try):
            tried = [statement for statement in node.body if isinstance(statement, ast.ImportFrom)]
            yield from (ast.unparse(statement) for statement in tried if is_stock(statement))


def is_stock(node: ast.ImportFrom) -> bool:
    return (node.module or "").split(".")[0] == "transformers"


def root(node: ast.AST) -> str | None:
    """Return the name that a chain of attributes starts with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("file", [file for file in FILES if file != ROOM], ids=str)
def test_no_other_file_names_a_version_of_transformers_or_asks_for_it(file: Path) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if NUMBER.search(line)] == [], f"name versions in {ROOM} alone"
    if file.suffix == ".py":
        assert list(questions(text)) == [], f"ask what transformers has in {ROOM} alone"


def test_the_room_itself_does_both() -> None:
    text = (ROOT / ROOM).read_text()
    assert NUMBER.search(text) and len(list(questions(text))) > 2


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("# until 5.23 the second name", True),
        ('REQUIRES = "5.17 or a later 5.x"', True),
        ("transformers 5 flattened it", True),
        ('"transformers>=5"', True),
        ("torch 0.5.17, 15.17 s, 5.5 MiB, 0.5", False),
        ("older transformers, several of them", False),
    ],
)
def test_a_version_number_is_told_from_other_numbers(line: str, found: bool) -> None:
    assert bool(NUMBER.search(line)) is found


@pytest.mark.parametrize(
    "source",
    [
        "import transformers\nnew = transformers.__version__ > '5'",
        "from transformers import __version__",
        "from importlib.metadata import version\nversion('transformers')",
        "from transformers.utils import is_transformers_version",
        "import inspect\nfrom transformers import LlavaModel\ninspect.signature(LlavaModel.forward)",
        "from transformers.generation import utils\nhasattr(utils, '_slice')",
        "from transformers import cache_utils\ngetattr(cache_utils, 'Cache', None)",
        "try:\n    from transformers import Cache\nexcept ImportError:\n    Cache = None",
    ],
)
def test_every_way_to_ask_is_found(source: str) -> None:
    assert len(list(questions(source))) == 1


def test_what_is_asked_of_others_is_no_question_of_versions() -> None:
    source = (
        "import inspect\nfrom transformers import LlavaModel\n"
        "def f(stock, config):\n    hasattr(config, 'a')\n    getattr(config, 'b', 1)\n    inspect.signature(stock)\n"
        "getattr(LlavaModel, 'forward')\n"
    )
    assert list(questions(source)) == []


def test_the_supported_versions_are_the_same_everywhere() -> None:
    """...where they cannot be imported from that file."""
    page = "docs/getting-started.md"
    texts = {name: (ROOT / name).read_text() for name in ("pyproject.toml", page, ".ci/run")}
    assert f'"transformers>={OLDEST_SUPPORTED},<' in texts["pyproject.toml"]
    assert f"transformers {OLDEST_SUPPORTED} or a later 5.x (tested up to {NEWEST_TESTED})" in texts[page]
    assert f"'transformers=={OLDEST_SUPPORTED}.*'" in texts[".ci/run"]
    assert f'transformers: "{OLDEST_SUPPORTED}.*"' in (ROOT / ".github/workflows/ci.yml").read_text()


def test_both_names_of_one_input_are_refused() -> None:
    assert by_stock_name({"a": 1, "x": 2}, ("a", "b"), "b") == {"b": 1, "x": 2}
    assert by_stock_name({"a": None, "b": 1}, ("a", "b"), "b") == {"b": 1}
    assert by_stock_name({"x": 2}, ("a", "b"), "b") == {"x": 2}
    with pytest.raises(ValueError, match="a and b are two names of the same thing"):
        by_stock_name({"a": 1, "b": 1}, ("a", "b"), "b")


def test_an_input_that_has_neither_name_any_more_is_named() -> None:
    expected = f"LlavaModel.forward takes neither a nor b.* with transformers .*tested up to {NEWEST_TESTED}.*Install"
    with pytest.raises(ImportError, match=expected):
        stock_versions._known_name(("a", "b"), transformers.LlavaModel)


# On a newer version than any that was tested.


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """Let caplog hear transformers, whose logger passes records on only where CI is set; forget what was said once."""
    stock_versions.logger.warning_once.__func__.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    yield caplog
    stock_versions.logger.warning_once.__func__.cache_clear()


@pytest.fixture(params=["patch", "major", "minor", "development"])
def newer(request: pytest.FixtureRequest) -> str:
    major, minor = map(int, NEWEST_TESTED.split("."))
    return {
        "patch": f"{major}.{minor + 1}.1",
        "major": f"{major + 1}.0.0",
        "minor": f"{major}.{minor + 76}.0",  # larger as a number, smaller as a text
        "development": f"{major}.{minor + 1}.0.dev0",
    }[request.param]


def test_a_newer_version_is_named_once_with_what_to_do(
    newer: str, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny_llava_repo: Path
) -> None:
    monkeypatch.setattr(transformers, "__version__", newer)
    for _ in range(2):
        vispruner.load(tiny_llava_repo, visual_token_num=9)
    (record,) = [record for record in heard.records if "tested with" in record.getMessage()]
    assert record.levelno == logging.WARNING and record.name.startswith("transformers.")
    message = record.getMessage()
    assert newer in message and f"up to {NEWEST_TESTED}" in message
    assert f"install transformers {NEWEST_TESTED}" in message and "pip install -U vispruner" in message


@pytest.mark.parametrize("ending", [".0", ".7", ".0.post1", ".1.dev0"])
@pytest.mark.parametrize("tested", [OLDEST_SUPPORTED, NEWEST_TESTED])
def test_tested_versions_and_their_patches_are_silent(
    tested: str, ending: str, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "__version__", tested + ending)
    warn_if_untested()
    assert heard.records == []


def test_a_version_that_is_none_is_an_error_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "main")
    with pytest.raises(ValueError, match="'main'"):
        warn_if_untested()


BY_ITS_OWN_CODE = """
import sys
sys.modules["vispruner"] = None  # the repo brings all it needs
from transformers import AutoModelForImageTextToText, LlavaModel
import transformers  # behind them, because importing a model makes this module anew
repo, tested, newer = sys.argv[1:]
for version in (tested, newer, newer):
    transformers.__version__ = version
    print("loading on", version, file=sys.stderr, flush=True)
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
"""


@pytest.mark.parametrize("model", ["llava", "llava_next"], indirect=True)
@pytest.mark.core
def test_a_repo_warns_in_a_process_of_its_own(model: Model, tmp_path: Path) -> None:
    model.pruned.save_pretrained(tmp_path)
    tested, newer = f"{NEWEST_TESTED}.3", f"{int(NEWEST_TESTED.split('.')[0]) + 1}.0.0"
    command = [sys.executable, "-c", BY_ITS_OWN_CODE, str(tmp_path), tested, newer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    silent, first, second = done.stderr.split("loading on ")[1:]
    warning = f"was tested with transformers up to {NEWEST_TESTED}; {newer} is installed"
    assert [part.count(warning) for part in (silent, first, second)] == [0, 1, 0]
