"""Hostile repos that are looked at, built from or loaded: none of their code runs, and nobody is asked whether to."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack import BASE, COMMIT, Attack, write_yaml
from huggingface_hub import constants
from PIL import Image

import vispruner
from vispruner.conversion import cli, verify
from vispruner.conversion.build import BuildError, build_repo
from vispruner.conversion.checkpoint_io import CheckpointError
from vispruner.conversion.convert import convert_llava


@pytest.fixture(autouse=True)
def obliging_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who says yes to everything: nobody may ask."""

    def answer(prompt: str = "") -> str:
        pytest.fail(f"asked: {prompt}")

    monkeypatch.setattr(builtins, "input", answer)


def own_tokenizer(attack: Attack) -> None:
    attack.write_code(attack.repo)
    attack.edit("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "evil.Evil"]})


def own_processor(attack: Attack) -> None:
    attack.write_code(attack.repo)
    attack.edit("processor_config.json", processor_class="Evil", auto_map={"AutoProcessor": "evil.Evil"})


def own_image_processor(attack: Attack) -> None:
    attack.write_code(attack.repo)
    entry = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    attack.edit("processor_config.json", image_processor=entry)


def audio_tokenizer_of_another_repo(attack: Attack) -> None:
    code = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    attack.write_code(attack.elsewhere)
    (attack.elsewhere / "config.json").write_text(json.dumps({"auto_map": code}))
    entry = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(attack.elsewhere)}
    attack.edit("processor_config.json", audio_tokenizer=entry)


def tower_of_another_repo(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    attack.edit_part(
        "vision_config",
        model_type="align_vision_model",  # known, but AutoModel has no class for it
        _name_or_path="openai/clip-vit-large-patch14-336",
        auto_map={"AutoModel": f"{attack.elsewhere}--evil.Evil"},
    )


def tower_of_another_repo_by_another_name(attack: Attack) -> None:
    """`attribute_map` makes a key of any name the one that transformers looks for."""
    attack.write_code(attack.elsewhere)
    attack.edit_part(
        "vision_config",
        model_type="align_vision_model",
        _name_or_path="openai/clip-vit-large-patch14-336",
        attribute_map={"tower": "auto_map"},
        tower={"AutoModel": f"{attack.elsewhere}--evil.Evil"},
    )


def tower_with_a_backbone_of_another_repo(attack: Attack) -> None:
    attack.in_cache(
        "mallory/backbone",
        {
            "config.json": json.dumps(
                {"model_type": "align_vision_model", "auto_map": {"AutoBackbone": "mallory/backbone--evil.Evil"}}
            ),
            "evil.py": attack.code,
        },
    )
    attack.edit_part(
        "vision_config", model_type="detr", backbone="mallory/backbone", use_timm_backbone=False, backbone_config=None
    )


def attention_of_another_repo(attack: Attack) -> None:
    attack.edit_part("text_config", attn_implementation="mallory/kernel")


def own_generate(attack: Attack) -> None:
    attack.write_code(attack.repo / "custom_generate", "generate.py")


USED = [
    own_tokenizer,
    own_processor,
    own_image_processor,
    audio_tokenizer_of_another_repo,
    tower_of_another_repo,
    tower_of_another_repo_by_another_name,
    tower_with_a_backbone_of_another_repo,
    attention_of_another_repo,
    own_generate,
]


OUTPUTS = {"show": "kept.png", "codebook": "book.safetensors", "calibrate": "found.yaml"}


def looking_at(repo: str, command: str, photo: str, out: str) -> list[str]:
    """The arguments of a command that loads a repo to look at a photo."""
    if command == "calibrate":
        pytest.importorskip("optuna")
        return [command, repo, "--images", photo, "--question", "What?", "--trials", "1", "--out", out]
    more = ["--prototypes", "2"] if command == "codebook" else []
    return [command, photo, "--repo", repo, "--out", out, *more]


@pytest.mark.core
@pytest.mark.parametrize("command", ["show", "codebook", "calibrate"])
@pytest.mark.parametrize("spoil", USED)
def test_looking_at_a_repo_runs_none_of_its_code_and_does_not_ask(
    spoil: Callable[[Attack], None],
    command: str,
    good_repo: Path,
    attack_on: Callable[[Path], Attack],
    tmp_path: Path,
    photo: Image.Image,
    capsys: pytest.CaptureFixture[str],
) -> None:
    attack = attack_on(good_repo)
    spoil(attack)
    photo.resize((64, 64)).save(tmp_path / "photo.png")
    out = OUTPUTS[command]
    status = cli.main(looking_at(str(attack.repo), command, str(tmp_path / "photo.png"), str(tmp_path / out)))
    assert status in (0, 2)
    assert (tmp_path / out).is_file() == (status == 0)
    if status == 2:
        assert "vispruner: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{"auto_map": 0}, {"vispruner_config": "x"}, {"text_config": {"model_type": "llama", "num_attention_heads": 0}}],
    ids=str,
)
@pytest.mark.parametrize("command", ["show", "build"])
def test_a_config_that_makes_no_model_is_one_line(
    command: str,
    changes: dict[str, Any],
    good_repo: Path,
    attack_on: Callable[[Path], Attack],
    photo: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    attack = attack_on(good_repo)
    attack.edit("config.json", **changes)
    if command == "show":
        photo.resize((64, 64)).save(tmp_path / "photo.png")
        arguments = ["show", str(tmp_path / "photo.png"), "--repo", str(attack.repo)]
    else:
        arguments = ["build", str(write_yaml(tmp_path)), "--full", "--base", str(attack.repo)]
    status = cli.main([*arguments, "--out", str(tmp_path / "out.png")])
    err = capsys.readouterr().err
    is_replaced = command == "build" and "vispruner_config" in changes  # a build writes its own
    assert status == (0 if is_replaced else 2), err
    assert is_replaced or "vispruner: error: " in err


@pytest.mark.parametrize("part", [{"text_config": None}, {"image_size": 10**6}], ids=str)
def test_a_model_larger_than_its_files_is_not_even_made(
    part: dict[str, Any],
    good_repo: Path,
    attack_on: Callable[[Path], Attack],
    photo: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a text_config stock makes one of seven billion parameters, and fills them with random numbers."""
    attack = attack_on(good_repo)
    if "image_size" in part:
        attack.edit_part("vision_config", **part)
    else:
        attack.edit("config.json", **part)
    photo.resize((64, 64)).save(tmp_path / "photo.png")
    monkeypatch.setattr(vispruner, "load", lambda *_, **__: pytest.fail("it was loaded"))
    arguments = ["show", str(tmp_path / "photo.png"), "--repo", str(attack.repo), "--out", str(tmp_path / "out.png")]
    assert cli.main(arguments) == 2
    assert "are not those of its config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (attention_of_another_repo, "attn_implementation names code of a Hub repo, 'mallory/kernel'"),
        (tower_of_another_repo, "Unrecognized configuration class"),
        (tower_of_another_repo_by_another_name, "Unrecognized configuration class"),
    ],
)
def test_load_refuses_what_only_code_of_others_could_run(
    spoil: Callable[[Attack], None], message: str, good_repo: Path, attack_on: Callable[[Path], Attack]
) -> None:
    attack = attack_on(good_repo)
    spoil(attack)
    with pytest.raises(ValueError, match=message):
        vispruner.load(attack.repo, method="none")


def test_load_reads_no_model_that_a_part_of_the_config_names(
    good_repo: Path, attack_on: Callable[[Path], Attack]
) -> None:
    attack = attack_on(good_repo)
    tower_with_a_backbone_of_another_repo(attack)
    config = json.loads((attack.repo / "config.json").read_text())
    with pytest.raises(ValueError, match="backbone names another model, 'mallory/backbone', which is not read"):
        vispruner.VisPrunerLlavaForConditionalGeneration.config_class.from_dict(config)
    with pytest.raises((ValueError, OSError)):
        vispruner.load(attack.repo, method="none")


def test_load_executes_the_installed_code_only(good_repo: Path, attack_on: Callable[[Path], Attack]) -> None:
    attack = attack_on(good_repo)
    own_generate(attack)
    assert "generate.py" not in repr(vispruner.load(attack.repo, trust_remote_code=True).generate)


def test_a_kernel_that_the_caller_names_is_the_caller_s_choice(
    good_repo: Path, attack_on: Callable[[Path], Attack]
) -> None:
    attack = attack_on(good_repo)
    attack.edit("config.json", attn_implementation="sdpa")
    with pytest.raises(ImportError, match="kernels"):
        vispruner.load(attack.repo, attn_implementation="mallory/kernel")


# What a base brings along is not handed on


@pytest.mark.core
def test_a_build_leaves_out_what_a_base_says_about_code(
    tiny_llava_repo: Path,
    attack_on: Callable[[Path], Attack],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attack = attack_on(tiny_llava_repo)
    auto_map = {"AutoProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    attack.edit("tokenizer_config.json", auto_map=auto_map, special_tokens_map_file="/home/somebody/map.json")
    attack.edit("processor_config.json", auto_map=auto_map)
    attack.edit("config.json", auto_map={"AutoConfig": "evil.Evil"}, custom_pipelines={"x": {"impl": "evil.Evil"}})
    attack.edit_part("vision_config", auto_map={"AutoModel": "evil.Evil"})
    attack.write_code(attack.repo)
    built = build_repo(write_yaml(tmp_path), tmp_path / "built", base=attack.repo, thin=False, show_progress=False)
    assert not (built / "evil.py").exists()
    assert "evil" not in "".join(path.read_text() for path in built.glob("*.json") if path.name != "tokenizer.json")
    assert "somebody" not in (built / "tokenizer_config.json").read_text()
    said = capsys.readouterr().out
    assert "tokenizer_config.json: auto_map, special_tokens_map_file of the base left out" in said
    assert "config.json: custom_pipelines, vision_config.auto_map of the base left out" in said
    before = json.loads((tiny_llava_repo / "tokenizer_config.json").read_text())
    assert json.loads((built / "tokenizer_config.json").read_text()) == before
    monkeypatch.setattr(verify, "_run_worker", lambda *arguments: [])
    report = verify.verify_repo(built, base=attack.repo)
    assert report.passed, report.table()


def test_a_quantized_base_is_refused(
    tiny_llava_repo: Path, attack_on: Callable[[Path], Attack], tmp_path: Path
) -> None:
    attack = attack_on(tiny_llava_repo)
    attack.edit("config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(BuildError, match="is quantized"):
        build_repo(write_yaml(tmp_path), tmp_path / "built", base=attack.repo, thin=False, show_progress=False)


# Thin repos load from a Hub id at a commit, and from nowhere else


def zeros_in(folder: Path, tiny_llava_repo: Path) -> Path:
    """A checkpoint whose weights are somebody's own."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llava_repo, folder)
    weights = {name: tensor * 0 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_auto(repo: Path, **options: object) -> object:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, **options)


every_way = pytest.mark.parametrize("load", [vispruner.load, load_auto])


@pytest.mark.core
@every_way
def test_a_folder_is_not_taken_for_the_base(
    load: Callable[..., object],
    good_thin_repo: Path,
    attack_on: Callable[[Path], Attack],
    tiny_llava_repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attack = attack_on(good_thin_repo)
    folder = zeros_in(tmp_path / "prepared" / BASE, tiny_llava_repo)
    monkeypatch.chdir(tmp_path / "prepared")
    with pytest.raises(ValueError, match=r"there is a folder with the name of its base.*start somewhere else"):
        load(attack.repo)
    told = load(attack.repo, vispruner_config={"base_model_name_or_path": f"./{BASE}"})
    assert not told.lm_head.weight.any()  # type: ignore[attr-defined]
    (failure,) = verify.verify_repo(attack.repo).failures
    assert "is not in the local Hub cache" in failure.detail and folder.is_dir()


@every_way
@pytest.mark.parametrize(
    "changes",
    [
        {"base_model_revision": "main"},
        {"base_model_revision": COMMIT[:-1]},
        {"base_model_name_or_path": "/somewhere/else"},
        {"base_model_name_or_path": "../elsewhere"},
        {"base_model_name_or_path": "elsewhere"},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_only_a_hub_id_at_a_commit_is_a_base(
    changes: dict[str, str], load: Callable[..., object], good_thin_repo: Path, attack_on: Callable[[Path], Attack]
) -> None:
    attack = attack_on(good_thin_repo)
    attack.edit_part("vispruner_config", **changes)
    with pytest.raises(ValueError, match=r"that must be a Hub id \(owner/name\) at a commit of 40 digits"):
        load(attack.repo)


def test_a_base_that_is_an_adapter_of_another_one_is_refused(
    good_thin_repo: Path, attack_on: Callable[[Path], Attack], tiny_llava_repo: Path
) -> None:
    pytest.importorskip("peft")
    attack = attack_on(good_thin_repo)
    files = {"adapter_config.json": json.dumps({"base_model_name_or_path": "mallory/base"})}
    attack.in_cache(BASE, {**files, "config.json": (tiny_llava_repo / "config.json").read_text()})
    with pytest.raises(ValueError, match="holds an adapter, which is not loaded"):
        vispruner.load(attack.repo)


def test_a_folder_is_not_taken_for_a_base_that_is_named_on_the_command_line(
    good_repo: Path, tiny_llava_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros_in(tmp_path / BASE, tiny_llava_repo)
    monkeypatch.chdir(tmp_path)
    (failure,) = verify.verify_repo(good_repo, base=BASE).failures
    assert failure.detail.endswith(f"there is a folder of that name here: write ./{BASE} for the folder")
    with pytest.raises(BuildError, match=f"write ./{BASE} for the folder"):
        build_repo(write_yaml(tmp_path), tmp_path / "built", base=BASE, show_progress=False)
    with pytest.raises(CheckpointError, match=f"write ./{BASE} for it"):
        convert_llava(BASE, tmp_path / "converted")


@pytest.mark.parametrize("command", ["show", "codebook", "calibrate"])
def test_a_folder_is_not_taken_for_a_repo_that_is_looked_at(
    command: str,
    good_repo: Path,
    photo: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(good_repo, tmp_path / BASE)
    photo.resize((64, 64)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    arguments = looking_at(BASE, command, "photo.png", OUTPUTS[command])
    assert cli.main(arguments) == 2
    assert f"write ./{BASE} for the folder" in capsys.readouterr().err
    (tmp_path / BASE).rename(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_TOKEN", "hf_the-owner-s-token")
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    assert cli.main(arguments) == 2
    assert "http://hub.example is not https, and your token would be sent" in capsys.readouterr().err


def test_a_yaml_does_not_mean_a_folder_by_a_hub_id(
    tiny_llava_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros_in(tmp_path / BASE, tiny_llava_repo)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError, match=rf"{BASE} is a Hub id, and there is a folder of that name here"):
        build_repo(write_yaml(tmp_path), tmp_path / "built", show_progress=False)
    built = build_repo(
        write_yaml(tmp_path, base_model=f"./{BASE}", base_revision=None), tmp_path / "built", show_progress=False
    )
    assert (built / "model.safetensors").is_file()
