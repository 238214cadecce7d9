"""The command line: what it prints, what it writes, and with which status it ends."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documents import DOCUMENTS
from PIL import Image

import vispruner
from vispruner.conversion import build, cli, codebook, convert, demo, picture, verify
from vispruner.conversion.questions import Question, is_right, scene_questions

COMMANDS = (
    "demo",
    "build",
    "verify",
    "publish",
    "convert",
    "show",
    "methods",
    "codebook",
    "text-tower",
    "calibrate",
    "serve-check",
)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory, tiny_llava_repo: Path) -> Path:
    """A repo built by the command line from the tiny base, 16 of 64 visual tokens kept."""
    folder = tmp_path_factory.mktemp("cli")
    config = folder / "config.yaml"
    config.write_text(
        f"repo_id: someone/tiny\nbase_model: {tiny_llava_repo}\narchitecture: llava\n"
        "vispruner_config: {visual_token_num: 16}\n"
    )
    assert cli.main(["build", str(config), "--out", str(folder / "repo")]) == 0
    return folder / "repo"


@pytest.fixture
def photo_file(tmp_path: Path, photo: Image.Image) -> Path:
    photo.save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr().err.strip().splitlines()
    assert captured[-1].startswith("vispruner: error: ")
    assert not any(line.startswith("Traceback") for line in captured)
    return captured[-1]


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    return run


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_teaches_with_examples(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "examples:" in shown or "first steps:" in shown
    wanted = COMMANDS if arguments == ["--help"] else (f"vispruner {arguments[0]} ",)
    assert all(word in shown for word in wanted)


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"vispruner {vispruner.__version__}"


@pytest.mark.parametrize("arguments", [[], ["prune"], ["build", "tiny-llava-vispruner"], ["show", "photo.jpg"]])
def test_a_mistyped_command_ends_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


def test_build_writes_a_repo_that_names_our_class(repo: Path) -> None:
    config = json.loads((repo / "config.json").read_text())
    assert config["architectures"] == ["VisPrunerLlavaForConditionalGeneration"]
    assert config["vispruner_config"]["visual_token_num"] == 16


EMPTY = [
    ["build", "", "--out", "x"],
    ["build", "tiny-llava-vispruner", "--out", ""],
    ["build", "tiny-llava-vispruner", "--out", "", "--overwrite"],
    ["build", "tiny-llava-vispruner", "--out", "x", "--base", " "],
    ["verify", ""],
    ["verify", "x", "--base", ""],
    ["show", "--out", "x.png", "--repo", ""],
    ["show", "--out", "x.png", "--question", ""],
    ["demo", "--out", ""],
    ["codebook", "", "--out", "x.safetensors"],
    ["methods", "--for", ""],
    ["convert", "", "x"],
    ["publish", ""],
    ["publish", "tiny-llava-vispruner", "--collection", ""],
]


@pytest.mark.parametrize("arguments", EMPTY, ids=" ".join)
def test_an_empty_argument_is_not_the_current_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a variable of the shell that is not set; `build --out "" --overwrite` replaced the folder one was in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "is empty: leave it out, or set the variable that it stands for" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_folder_that_one_is_in_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (inner := tmp_path / "inner").mkdir()
    (inner / "notes.txt").write_text("keep me")
    monkeypatch.chdir(inner)
    for out in (".", "..", str(tmp_path)):
        assert cli.main(["build", "tiny-llava-vispruner", "--out", out, "--overwrite"]) == 2
        assert "holds the folder that you are in" in error_line(capsys)
    assert (inner / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("command", ["build", "demo"])
def test_an_output_below_a_file_is_called_that(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "file").write_text("mine")
    arguments = [command, *(["tiny-llava-vispruner"] if command == "build" else [])]
    for out in (file, file / "sub" / "folder"):
        assert cli.main([*arguments, "--out", str(out)]) == 2
        assert re.search(rf"{file}( exists and)? is (a file|no folder|not a folder)", error_line(capsys))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("command", ["show", "codebook"])
def test_what_is_no_checkpoint_is_said_to_be_none(
    command: str, photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for repo, said in (
        ("someone/nowhere", r"someone/nowhere is no folder here, and the Hub does not give it: "),
        ("tiny-llava-vispruner", r"is a config and no repo: `vispruner build tiny-llava-vispruner --out DIR`, then"),
        ("empty", "empty has no config.json: give the folder of a checkpoint, or a Hub id"),
        (str(photo_file), "photo.jpg is a file: give the folder of a checkpoint"),
        ("no/such/folder", "no/such/folder does not exist: give a checkpoint folder or a Hub id"),
    ):
        out = "out.png" if command == "show" else "out.safetensors"
        assert cli.main([command, str(photo_file), "--repo", repo, "--out", out]) == 2
        assert re.search(said, error_line(capsys))


def test_pictures_are_looked_at_before_a_model_is_loaded(
    photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(picture, "load_model", raising(AssertionError("loaded")))
    monkeypatch.setattr(codebook, "load_model", raising(AssertionError("loaded")))
    (text := tmp_path / "text.png").write_text("no picture")
    for arguments in (
        ["show", str(text), "--out", str(tmp_path / "out.png")],
        ["codebook", str(photo_file), str(text), "--out", str(tmp_path / "out.safetensors")],
    ):
        assert cli.main(arguments) == 2
        assert "text.png is not a readable image" in error_line(capsys)


def test_verify_of_what_is_no_folder_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("someone/pruned", "llava-1.5-7b-vispruner", "https://huggingface.co/someone/pruned"):
        assert cli.main(["verify", name]) == 1
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == 2 and "`hf download REPO --local-dir FOLDER`" in shown[0]


def test_build_names_the_shipped_configs_when_the_name_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", "no-such-config", "--out", str(tmp_path / "repo")]) == 2
    assert "tiny-llava-vispruner" in error_line(capsys)
    assert not (tmp_path / "repo").exists()


def test_build_leaves_a_folder_alone_until_told_to_overwrite(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("keep me")
    arguments = ["build", "tiny-llava-vispruner", "--out", str(out)]
    assert cli.main(arguments) == 2
    assert str(out) in error_line(capsys)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert (out / "config.json").is_file()


def test_verify_prints_its_table_and_its_verdict_is_the_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for status, code in (("pass", 0), ("not run", 0), ("fail", 1)):
        found = verify.Report(tmp_path, (verify.Check("config.json", status, "detail of the check"),))
        monkeypatch.setattr(verify, "verify_repo", lambda folder, base=None, found=found: found)
        assert cli.main(["verify", str(tmp_path)]) == code
        assert "detail of the check" in capsys.readouterr().out


def test_verify_of_a_folder_that_is_no_repo_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().out


def test_convert_hands_its_arguments_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(convert, "convert_llava", lambda *args, **kwargs: calls.append((args, kwargs)))
    assert cli.main(["convert", "SRC", "DST", "--vision-tower", "TOWER", "--overwrite"]) == 0
    assert calls == [(("SRC", "DST"), {"vision_tower": "TOWER", "overwrite": True})]


def test_convert_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(tmp_path / "missing"), str(tmp_path / "out")]) == 2
    assert "missing" in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_show_reads_a_built_repo_without_running_its_code(repo: Path, photo_file: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(repo, tmp_path / "copy")
    for code in copy.glob("*.py"):
        code.write_text("raise SystemExit('the code of the repo was run')")
    out = tmp_path / "kept.png"
    assert cli.main(["show", str(photo_file), "--repo", str(copy), "--out", str(out)]) == 0
    with Image.open(out) as drawn:
        assert drawn.width > 300


def test_show_of_a_stock_checkpoint_needs_a_budget(
    tiny_llava_repo: Path, photo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["show", str(photo_file), "--repo", str(tiny_llava_repo), "--out", str(tmp_path / "kept.png")]
    assert cli.main(arguments) == 2
    assert "visual_token_num" in error_line(capsys)
    assert cli.main([*arguments, "--visual-token-num", "8"]) == 0
    assert (tmp_path / "kept.png").is_file()


@pytest.mark.core
def test_show_draws_several_budgets_and_the_answers_to_a_question(
    repo: Path, photo_file: Path, tmp_path: Path
) -> None:
    sizes = []
    for extra in ([], ["--budgets", "16", "8"], ["--budgets", "16", "8", "--question", "What is this?"]):
        out = tmp_path / "kept.png"
        assert cli.main(["show", str(photo_file), "--repo", str(repo), "--out", str(out), *extra]) == 0
        with Image.open(out) as drawn:
            sizes.append(drawn.size)
    one, several, asked = sizes
    assert several[0] > one[0]
    assert asked[0] == several[0] and asked[1] > several[1]


@pytest.mark.core
def test_show_draws_the_embedded_scene_and_checkpoint_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def draw(panels: list[picture.Panel], caption: str, questions: list[Question]) -> Image.Image:
        drawn.update(panels=panels, caption=caption, questions=questions)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(picture, "kept_patches_picture", draw)
    assert cli.main(["show", "--budgets", "36", "18", "9", "--out", str(tmp_path / "kept.png")]) == 0
    assert [int(panel.tiles[0].kept.sum()) for panel in drawn["panels"]] == [144, 36, 18, 9]
    assert drawn["questions"] == scene_questions()
    given = drawn["panels"][0].answers
    assert sum(map(is_right, given, [question.answer for question in scene_questions()])) >= len(given) - 1
    arguments = ["show", "--question", "Where is the orange square?", "--out", str(tmp_path / "kept.png")]
    assert cli.main(arguments) == 0
    assert [int(panel.tiles[0].kept.sum()) for panel in drawn["panels"]] == [144, 18]
    assert [question.answer for question in drawn["questions"]] == ["top-right"]
    assert [list(panel.answers) for panel in drawn["panels"]] == [["top-right"], ["top-right"]]


@pytest.mark.core
@pytest.mark.parametrize("method", ["hiprune", "random"])
def test_show_draws_another_method_than_the_repos(method: str, repo: Path, photo_file: Path, tmp_path: Path) -> None:
    files = [tmp_path / "own.png", tmp_path / "other.png"]
    for file, extra in zip(files, ([], ["--method", method]), strict=True):
        assert cli.main(["show", str(photo_file), "--repo", str(repo), "--out", str(file), *extra]) == 0
    assert files[0].read_bytes() != files[1].read_bytes()


def test_show_refuses_a_method_that_does_not_exist(
    repo: Path, photo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["show", str(photo_file), "--repo", str(repo), "--out", str(tmp_path / "kept.png"), "--method", "best"]
    assert cli.main(arguments) == 2
    assert "vispruner_config.method must be one of" in capsys.readouterr().err


def test_show_takes_one_budget_or_several(capsys: pytest.CaptureFixture[str]) -> None:
    budgets = ["--budgets", "8", "4", "--visual-token-num", "4"]
    with pytest.raises(SystemExit):
        cli.main(["show", "photo.jpg", "--repo", "repo", "--out", "kept.png", *budgets])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"not an image", "is not a readable image"), (None, "No such file or directory")]
)
def test_show_says_which_image_cannot_be_read(
    content: bytes | None, complaint: str, repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "broken.jpg"
    if content is not None:
        image.write_bytes(content)
    assert cli.main(["show", str(image), "--repo", str(repo), "--out", str(tmp_path / "kept.png")]) == 2
    line = error_line(capsys)
    assert "broken.jpg" in line
    assert complaint in line
    assert not (tmp_path / "kept.png").exists()


def test_a_truncated_checkpoint_is_one_line(
    tiny_llava_repo: Path, photo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(tiny_llava_repo, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    arguments = ["show", str(photo_file), "--repo", str(broken), "--out", str(tmp_path / "kept.png")]
    assert cli.main([*arguments, "--visual-token-num", "8"]) == 2
    error_line(capsys)
    assert not (tmp_path / "kept.png").exists()


@pytest.mark.parametrize("error", [ValueError("visual_token_num must be >= 1"), OSError("disk full")])
def test_bad_input_is_one_line_and_status_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_demo", raising(error))
    assert cli.main(["demo"]) == 2
    assert error_line(capsys) == f"vispruner: error: {error}"


def test_traceback_is_printed_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build, "build_repo", raising(ValueError("no base")))
    assert cli.main(["--traceback", "build", "x", "--out", "y"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_ends_with_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(picture, "show", raising(KeyboardInterrupt()))
    assert cli.main(["show", "a.jpg", "--repo", "b", "--out", "c.png"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_demo", raising(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["demo"])


@pytest.mark.core
def test_json_is_all_there_is_on_stdout(
    repo: Path, photo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(*arguments: str, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.main([*arguments, "--json"]) == status
        return json.loads(capsys.readouterr().out)

    out = tmp_path / "kept.png"
    shown = result("show", str(photo_file), "--repo", str(repo), "--out", str(out))
    ((kept,),) = shown.pop("kept")[photo_file.name]
    assert shown == {"picture": str(out)} and kept == sorted(set(kept))
    built = result("build", "tiny-llava-vispruner", "--out", str(tmp_path / "built"))
    assert built.keys() == {"folder", "ceiling"} and built["folder"] == str(tmp_path / "built")
    assert 1 < built["ceiling"]["first_token"] < built["ceiling"]["none"]
    assert "no such" in result("build", "none.yaml", "--out", str(tmp_path / "x"), status=2)["error"]
    (tmp_path / "built" / "config.json").unlink()
    found = result("verify", str(tmp_path / "built"), status=1)
    assert found["passed"] is False and found["checks"][0]["status"] == "fail"


@pytest.mark.parametrize("module", ["vispruner", "vispruner.conversion"])
@pytest.mark.core
def test_it_runs_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "build", "no-such-config", "--out", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "vispruner: error: no-such-config: neither a file" in done.stderr


def methods_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["methods", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_methods_lists_every_method_once_with_what_it_declares(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[0] for line in lines[: len(vispruner.SELECTORS)]]
    assert sorted(rows) == sorted(vispruner.SELECTORS) and header.split()[0] == "method"
    found = {row["name"]: row for row in methods_of(capsys)["methods"]}
    assert list(found) == rows
    for name, selector in vispruner.SELECTORS.items():
        row = found[name]
        assert (row["prunes"] == "behind the encoder") == (not selector.in_decoder)
        assert (row["authors"] == "experimental") == selector.experimental
        assert selector.needs <= set(row["needs"]) and row["summary"] and row["refused"] is None
        assert row["options"].keys() == selector.options.keys()
    assert found["fastv"]["prunes"] == "before layer 2" and "second questions" in found["fastv"]["loses"]
    assert found["uniform_grid"]["needs"] == ["grid?"] and found["scope"]["needs"] == ["saliency"]


def test_methods_finds_each_paper_and_what_differs_in_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["name"]: row for row in methods_of(capsys)["methods"]}
    for name, paper in re.findall(
        r"^\| `(\w+)` \| \[.*?\]\(https://arxiv.org/abs/([\d.]+)\)", DOCUMENTS, re.MULTILINE
    ):
        assert paper in found[name]["paper"]
    asked = [row for row in found.values() if not row["experimental"]]
    assert all(row["authors"] in (("exact", "differs") if row["paper"] else ("",)) for row in asked)
    assert found["vispruner"]["authors"] == "exact" and "twice" in found["divprune"]["differs"]


@pytest.mark.core
@pytest.mark.parametrize("name", vispruner.ARCHITECTURES)
def test_methods_says_which_ones_an_architecture_refuses_and_why(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["methods", "--for", name]) == 0
    shown = capsys.readouterr().out
    result = methods_of(capsys, "--for", name)
    refused = {row["name"]: row["refused"] for row in result["methods"] if row["refused"] is not None}
    assert name in result["for"] and all(f"  {method}: " in shown for method in refused)
    has_cls, base = vispruner.ARCHITECTURES[name].base_class.has_cls_token, vispruner.ARCHITECTURES[name].base_class
    assert ("vtc_cls" in refused) == (not has_cls)
    assert ("pyramiddrop" in refused) == (base.position_axes > 1)
    assert ("fastv" in refused) == (name == "qwen3_vl")  # whose first layers still get features of the encoder
    assert not {"vispruner", "divprune", "random", "codebook"} & refused.keys()


def test_methods_asks_the_model_of_a_config_or_a_checkpoint(
    tiny_llava_next_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert methods_of(capsys, "--for", "tiny-llava-vispruner")["for"] == "embedded/tiny-llava"
    assert methods_of(capsys, "--for", str(tiny_llava_next_repo))["for"] == str(tiny_llava_next_repo)
    away = tmp_path / "away.yaml"
    away.write_text(
        "repo_id: someone/away\nbase_model: someone/nowhere\narchitecture: qwen2_vl\n"
        f"base_revision: {40 * 'a'}\nvispruner_config: {{visual_token_num: 16}}\n"
    )
    asked = methods_of(capsys, "--for", str(away))["for"]
    assert asked.startswith("qwen2_vl, with the defaults") and "someone/nowhere cannot be reached" in asked


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lava", "llava"), ("LLaVA_Next", "llava_next"), ("tiny-lava-vispruner", "tiny-llava-vispruner")],
)
def test_methods_names_the_model_that_was_meant(name: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "--for", name]) == 2
    assert error_line(capsys) == (
        f"vispruner: error: {name}: neither a file, a config of hub_configs nor a model_type; did you mean {meant}?"
    )


@pytest.mark.core
def test_methods_advises_against_nothing_that_nobody_chose() -> None:
    """In a process of its own, because transformers says a thing once."""
    command = [sys.executable, "-m", "vispruner", "methods", "--for", "llava"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "topv" in done.stdout and "experimental: its authors" not in done.stderr


def test_methods_for_what_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for name, said in [
        ("zzz", "the model_types are gemma3"),
        (str(tmp_path), "bert"),
        ("no/such/folder", "does not exist"),
    ]:
        assert cli.main(["methods", "--for", name]) == 2
        assert said in error_line(capsys)
