"""Thin repos: built without the base's weights, loaded with exactly those, and never dense, random or half missing.

Bases and repos lie in a Hub cache of the true layout, so everything goes by Hub ids and revisions, without network.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import yaml
from bases import (
    COMMIT,
    HUB_BASE,
    as_saved_in_shards,
    copy_without_weights,
    in_cache,
    legacy_bin,
    legacy_bin_in_shards,
    legacy_in_shards,
    legacy_with_old_buffers,
    published,
)
from counting import cached_tokens
from huggingface_hub import constants
from local_hub import LocalHub
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    TorchAoConfig,
    pipeline,
)

import vispruner
from vispruner import VisPrunerLlavaConfig, VisPrunerLlavaForConditionalGeneration, code_files
from vispruner.conversion import build
from vispruner.conversion.base_checkpoint import PROCESSOR_FILES, BuildError
from vispruner.conversion.build import budget_config, build_repo
from vispruner.conversion.cli import main
from vispruner.conversion.verify import MODEL_CHECKS, verify_repo

OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
KEPT = 16  # of 64 visual tokens


def write_yaml(folder: Path, **changes: Any) -> Path:
    content = {
        "repo_id": "someone/pruned",
        "base_model": HUB_BASE,
        "base_revision": "main",
        "architecture": "llava",
        "vispruner_config": {"visual_token_num": KEPT},
        "card": {"license": "apache-2.0"},
        **changes,
    }
    path = folder / "pruned.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def options_of(repo: Path) -> dict[str, Any]:
    return read_json(repo / "config.json")["vispruner_config"]


def edit_options(repo: Path, **changes: Any) -> None:
    config = read_json(repo / "config.json")
    config["vispruner_config"].update(changes)
    (repo / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub cache of this test, empty; no test sees that of the machine."""
    folder = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def base(cache: Path, tiny_llava_repo: Path) -> Path:
    return in_cache(cache, HUB_BASE, tiny_llava_repo)


@pytest.fixture(scope="module")
def built(tiny_llava_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thin")
    config = write_yaml(folder, base_revision=COMMIT)
    return build_repo(config, folder / "out", base=tiny_llava_repo, thin=True, show_progress=False)


@pytest.fixture
def thin(built: Path, tmp_path: Path) -> Path:
    """A thin repo that a test may change; its base is where `base` or the test puts it."""
    return Path(shutil.copytree(built, tmp_path / "thin"))


@pytest.fixture(scope="module")
def prompt(tiny_llava_repo: Path, photo: Image.Image) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(tiny_llava_repo)
    return processor(text="USER: <image>\nWhat is it? ASSISTANT:", images=photo, return_tensors="pt")


@torch.no_grad()
def logits(model: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**{**prompt, "pixel_values": prompt["pixel_values"].to(model.dtype)}).logits


@pytest.fixture(scope="module")
def expected(tiny_llava_repo: Path, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the pruned base, loaded without any repo between."""
    return logits(vispruner.load(tiny_llava_repo, visual_token_num=KEPT), prompt)


# What a thin repo holds


def test_a_thin_repo_is_code_config_processor_and_card(base: Path, tmp_path: Path) -> None:
    out = build_repo(write_yaml(tmp_path), tmp_path / "out", thin=True, show_progress=False)
    names = {path.name for path in out.iterdir()}
    processor = {path.name for path in base.iterdir() if path.name in PROCESSOR_FILES}
    code = {path.name for path in code_files("llava")}
    assert names == processor | code | {"config.json", "generation_config.json", "README.md"}
    assert sum(path.stat().st_size for path in out.iterdir() if path.name != "tokenizer.json") < 10**6


def test_config_json_says_thin_and_pins_the_commit_of_the_branch(base: Path, tmp_path: Path) -> None:
    out = build_repo(write_yaml(tmp_path), tmp_path / "out", thin=True, show_progress=False)
    options = options_of(out)
    assert options["weights"] == "thin"
    assert (options["base_model_name_or_path"], options["base_model_revision"]) == (HUB_BASE, COMMIT)
    assert options["vispruner_version"] == vispruner.__version__


def test_thin_and_full_differ_in_the_weights_only(base: Path, tmp_path: Path) -> None:
    thin = build_repo(write_yaml(tmp_path), tmp_path / "thin", thin=True, show_progress=False)
    full = build_repo(write_yaml(tmp_path), tmp_path / "full", thin=False, show_progress=False)
    different = {path.name for path in thin.iterdir() if path.read_bytes() != (full / path.name).read_bytes()}
    assert different <= {"config.json", "README.md"}
    assert {path.name for path in full.iterdir()} - {path.name for path in thin.iterdir()} == {"model.safetensors"}
    assert {**options_of(thin), "weights": "full"} == options_of(full)


def test_a_branch_differs_from_main_in_its_budget_only(built: Path) -> None:
    main = read_json(built / "config.json")
    for budget, stored in (({"visual_token_num": 9}, (9, None)), ({"keep_ratio": 0.5}, (None, 0.5))):
        branch = budget_config(main, budget)
        options = branch["vispruner_config"]
        assert (options["visual_token_num"], options["keep_ratio"]) == stored
        assert list(branch) == list(main) and list(options) == list(main["vispruner_config"])
        same = {**options, "visual_token_num": KEPT, "keep_ratio": None}
        assert {**branch, "vispruner_config": same} == main
    assert main["vispruner_config"]["visual_token_num"] == KEPT


# Thin or full


@pytest.mark.parametrize(
    ("yaml_says", "asked", "limit", "is_thin"),
    [
        (None, None, 10**9, False),
        (None, None, 1000, True),
        ("thin", None, 10**9, True),
        ("full", None, 1000, False),
        ("thin", False, 1000, False),
        ("full", True, 10**9, True),
    ],
)
def test_what_is_asked_goes_before_the_yaml_and_that_before_the_size(
    base: Path, tmp_path: Path, monkeypatch: Any, yaml_says: str | None, asked: bool | None, limit: int, is_thin: bool
) -> None:
    assert build.THIN_ABOVE == 2 * 10**9
    monkeypatch.setattr(build, "THIN_ABOVE", limit)
    changes = {} if yaml_says is None else {"weights": yaml_says}
    out = build_repo(write_yaml(tmp_path, **changes), tmp_path / "out", thin=asked, show_progress=False)
    assert options_of(out)["weights"] == ("thin" if is_thin else "full")
    assert (out / "model.safetensors").is_file() == (not is_thin)


@pytest.mark.parametrize("base_model", ["embedded/tiny-llava", "."])
def test_a_base_that_is_not_on_the_hub_is_never_thin(
    base_model: str, tiny_llava_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "THIN_ABOVE", 0)
    config = write_yaml(tmp_path, base_model=base_model, base_revision=None)
    with pytest.raises(BuildError, match=r"pruned\.yaml: someone/pruned cannot be thin.*build it with --full"):
        build_repo(config, tmp_path / "out", base=tiny_llava_repo, thin=True, show_progress=False)
    assert not (tmp_path / "out").exists()
    out = build_repo(config, tmp_path / "out", base=tiny_llava_repo, show_progress=False)
    assert options_of(out)["weights"] == "full"


def test_a_base_read_from_elsewhere_is_still_pinned_to_a_commit(
    tiny_llava_repo: Path, cache: Path, tmp_path: Path
) -> None:
    build_here = functools.partial(build_repo, base=tiny_llava_repo, thin=True, show_progress=False)
    with pytest.raises(BuildError, match=r"that of base_revision main is not to be had: set base_revision to the"):
        build_here(write_yaml(tmp_path), tmp_path / "out")
    in_cache(cache, HUB_BASE, tiny_llava_repo, OTHER_COMMIT)
    assert options_of(build_here(write_yaml(tmp_path), tmp_path / "out"))["base_model_revision"] == OTHER_COMMIT
    pinned = build_here(write_yaml(tmp_path, base_revision=COMMIT), tmp_path / "pinned")
    assert options_of(pinned)["base_model_revision"] == COMMIT


def test_a_thin_build_checks_the_bases_tensors_as_a_full_one_does(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BuildError, match=r"missing: lm_head\.weight"):
        build_repo(write_yaml(tmp_path), tmp_path / "out", thin=True, show_progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "weights"), [("--thin", "thin"), ("--full", "full"), (None, "full")])
def test_the_command_line_builds_either(base: Path, tmp_path: Path, flag: str | None, weights: str) -> None:
    arguments = ["build", str(write_yaml(tmp_path)), "--out", str(tmp_path / "out"), *([flag] if flag else [])]
    assert main(arguments) == 0
    assert options_of(tmp_path / "out")["weights"] == weights


def test_the_command_line_builds_not_both(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["build", str(write_yaml(tmp_path)), "--out", str(tmp_path / "out"), "--thin", "--full"])


# Loading: by every way, with the base's own numbers

LOADERS: dict[str, Callable[..., PreTrainedModel]] = {
    "load": vispruner.load,
    "class": VisPrunerLlavaForConditionalGeneration.from_pretrained,
    **{
        auto.__name__: functools.partial(auto.from_pretrained, trust_remote_code=True)
        for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    },
    "pipeline": lambda repo, **settings: (
        pipeline("image-text-to-text", model=str(repo), trust_remote_code=True, **settings).model
    ),
}
every_way = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())


@every_way
def test_every_way_to_load_gives_the_pruned_base(
    load: Any, base: Path, thin: Path, prompt: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    model = load(thin)
    assert type(model).__name__ == "VisPrunerLlavaForConditionalGeneration"
    assert cached_tokens(model, prompt) == prompt["input_ids"].shape[1] - 64 + KEPT
    assert torch.equal(logits(model, prompt), expected)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "cpu"])
@every_way
def test_options_given_at_load_time_hold(
    load: Any, device_map: Any, base: Path, thin: Path, prompt: dict[str, torch.Tensor]
) -> None:
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": device_map}
    if load is not LOADERS["pipeline"]:  # which takes no options of the config
        settings |= {"attn_implementation": "eager", "vispruner_config": {"visual_token_num": 9}}
    model = load(thin, **settings)
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    if "vispruner_config" in settings:
        assert model.config.vision_config._attn_implementation == "eager"
        assert model.config.vispruner_config["visual_token_num"] == 9
        assert cached_tokens(model, prompt) == prompt["input_ids"].shape[1] - 64 + 9


@pytest.mark.core
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_dtype_auto_is_that_of_the_base(
    stored: torch.dtype, cache: Path, tiny_llava_repo: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llava_repo, folder)
    vispruner.load(folder, method="none", dtype=stored).save_pretrained(folder)
    in_cache(cache, HUB_BASE, folder)
    thin = build_repo(write_yaml(tmp_path), tmp_path / "out", thin=True, show_progress=False)
    for settings in ({"dtype": "auto"}, {}):
        assert LOADERS["AutoModel"](thin, **settings).dtype == stored
        assert vispruner.load(thin, **settings).dtype == stored


@pytest.mark.core
@pytest.mark.parametrize(
    "write",
    [as_saved_in_shards, legacy_in_shards, legacy_with_old_buffers, legacy_bin, legacy_bin_in_shards, published],
)
def test_bases_of_every_layout_load(
    write: Any, cache: Path, tiny_llava_repo: Path, thin: Path, tmp_path: Path, prompt: Any, expected: torch.Tensor
) -> None:
    folder = copy_without_weights(tiny_llava_repo, tmp_path / "base")
    write(tiny_llava_repo, folder)
    in_cache(cache, HUB_BASE, folder)
    rebuilt = build_repo(write_yaml(tmp_path), tmp_path / "out", thin=True, show_progress=False)
    for repo in (thin, rebuilt):
        assert torch.equal(logits(LOADERS["AutoModelForImageTextToText"](repo), prompt), expected)
        assert torch.equal(logits(vispruner.load(repo), prompt), expected)


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offload_gives_the_same_numbers(
    place: str, base: Path, thin: Path, tmp_path: Path, prompt: Any, expected: torch.Tensor
) -> None:
    device_map = {"model.vision_tower": place, "model.multi_modal_projector": "cpu", "model.language_model": place}
    settings = {"device_map": {**device_map, "lm_head": "cpu"}, "offload_folder": tmp_path / "offload"}
    for load in (LOADERS["AutoModelForImageTextToText"], vispruner.load):
        model = load(thin, **settings)
        offloaded = {parameter.device.type for parameter in model.model.language_model.parameters()}
        assert offloaded == {"meta" if place == "disk" else "cpu"}
        assert torch.equal(logits(model, prompt), expected)


def test_a_quantized_load_is_quantized_and_pruned(base: Path, thin: Path, prompt: dict[str, torch.Tensor]) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["model.vision_tower"])
    models = [
        load(thin, quantization_config=config, dtype=torch.bfloat16)
        for load in (LOADERS["AutoModelForImageTextToText"], vispruner.load)
    ]
    for model in models:
        assert "Int8" in type(model.model.language_model.layers[0].mlp.up_proj.weight).__name__
        assert cached_tokens(model, prompt) == prompt["input_ids"].shape[1] - 64 + KEPT
    assert torch.equal(logits(models[0], prompt), logits(models[1], prompt))


@pytest.mark.core
def test_llava_next_loads_with_its_newline(
    cache: Path, tiny_llava_next_repo: Path, tmp_path: Path, photo: Image.Image
) -> None:
    in_cache(cache, HUB_BASE, tiny_llava_next_repo)
    config = write_yaml(tmp_path, architecture="llava_next", vispruner_config={"visual_token_num": 4})
    thin = build_repo(config, tmp_path / "out", thin=True, show_progress=False)
    processor = AutoProcessor.from_pretrained(thin)
    inputs = dict(processor(text="USER: <image>\nWhat? ASSISTANT:", images=photo, return_tensors="pt"))
    reference = vispruner.load(tiny_llava_next_repo, visual_token_num=4)
    assert torch.equal(logits(LOADERS["AutoModel"](thin), inputs), logits(reference, inputs))


# Hub options: they reach both repos, and the revision is the thin repo's


@pytest.mark.core
@every_way
def test_a_budget_branch_of_a_thin_repo_loads_by_revision(
    load: Any, base: Path, cache: Path, thin: Path, prompt: dict[str, torch.Tensor]
) -> None:
    in_cache(cache, "someone/pruned", thin)
    edit_options(thin, visual_token_num=9)
    in_cache(cache, "someone/pruned", thin, OTHER_COMMIT, branch="v9")
    for revision, kept in (("main", KEPT), ("v9", 9), (OTHER_COMMIT, 9)):
        model = load("someone/pruned", revision=revision)
        assert model.config.vispruner_config["visual_token_num"] == kept
        assert cached_tokens(model, prompt) == prompt["input_ids"].shape[1] - 64 + kept


@pytest.mark.parametrize("load", [LOADERS["AutoModel"], LOADERS["class"], vispruner.load])
def test_cache_dir_and_local_files_only_hold_for_the_base_too(
    load: Any, thin: Path, tiny_llava_repo: Path, tmp_path: Path, prompt: Any, expected: torch.Tensor
) -> None:
    elsewhere = tmp_path / "elsewhere"
    in_cache(elsewhere, HUB_BASE, tiny_llava_repo)
    with pytest.raises(OSError, match="which cannot be read"):
        load(thin, local_files_only=True)
    assert torch.equal(logits(load(thin, cache_dir=str(elsewhere), local_files_only=True), prompt), expected)


def test_the_base_is_read_at_its_commit_whatever_its_branches_say(
    cache: Path, thin: Path, tiny_llava_repo: Path, tmp_path: Path, prompt: Any, expected: torch.Tensor
) -> None:
    in_cache(cache, HUB_BASE, tiny_llava_repo)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_llava_repo, moved)
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in load_file(moved / "model.safetensors").items()},
        moved / "model.safetensors",
        metadata={"format": "pt"},
    )
    in_cache(cache, HUB_BASE, moved, OTHER_COMMIT)  # main is there now
    assert torch.equal(logits(LOADERS["AutoModel"](thin), prompt), expected)


@pytest.mark.parametrize("load", [LOADERS["AutoModel"], vispruner.load], ids=["AutoModel", "load"])
def test_a_subfolder_is_refused(load: Any, base: Path, thin: Path, tmp_path: Path) -> None:
    shutil.copytree(thin, tmp_path / "outer" / "inner")
    for path in thin.glob("*.py"):
        shutil.copy(path, tmp_path / "outer")
    with pytest.raises(ValueError, match=r"is a thin repo.*leave out subfolder"):
        load(tmp_path / "outer", subfolder="inner")


# What belongs to the thin repo, not to its base


@pytest.mark.core
def test_the_generation_config_is_the_thin_repos_own(base: Path, thin: Path) -> None:
    config = read_json(thin / "generation_config.json")
    (thin / "generation_config.json").write_text(json.dumps({**config, "max_length": 77}))
    for load in (vispruner.load, LOADERS["AutoModel"]):
        assert load(thin).generation_config.max_length == 77
        assert load(thin, generation_config=GenerationConfig(max_length=88)).generation_config.max_length == 88


@every_way
def test_the_model_goes_by_the_thin_repos_name(load: Any, base: Path, thin: Path) -> None:
    """Adapters record it as their base; recorded as the base, they would come back on the dense model."""
    model = load(thin)
    assert model.name_or_path == model.config.name_or_path == str(thin)


def test_an_adapter_comes_back_on_the_pruned_model(
    base: Path, thin: Path, tmp_path: Path, prompt: dict[str, torch.Tensor]
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=r".*language_model.*q_proj", r=2, init_lora_weights=False)
    tuned = peft.get_peft_model(LOADERS["AutoModelForImageTextToText"](thin), lora)
    tuned.save_pretrained(tmp_path / "adapter")
    again = LOADERS["AutoModelForImageTextToText"](tmp_path / "adapter")
    assert type(again).__name__ == "VisPrunerLlavaForConditionalGeneration"
    assert torch.equal(logits(again, prompt), logits(tuned.base_model.model, prompt))


@pytest.mark.core
def test_code_that_lies_in_the_base_never_runs(base: Path, thin: Path) -> None:
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text("raise SystemExit('the code of the base ran')")
    (base / "modeling_vispruner_llava.py").write_text("raise SystemExit('the code of the base ran')")
    for load in LOADERS.values():
        assert "custom" not in repr(load(thin).generate)


# Saving: a full repo, which needs the base no more


@pytest.mark.core
@every_way
def test_a_saved_model_is_full_and_loads_when_the_base_is_gone(
    load: Any, base: Path, cache: Path, thin: Path, tmp_path: Path, prompt: Any, expected: torch.Tensor
) -> None:
    model = load(thin)
    model.save_pretrained(tmp_path / "saved")
    del model
    stored, before = options_of(tmp_path / "saved"), options_of(thin)
    assert stored == {**before, "weights": "full"}
    shutil.rmtree(cache)
    for again in (LOADERS["AutoModelForImageTextToText"](tmp_path / "saved"), vispruner.load(tmp_path / "saved")):
        assert torch.equal(logits(again, prompt), expected)


def test_what_is_saved_counts_even_past_our_own_save_pretrained(
    base: Path, thin: Path, tmp_path: Path, prompt: dict[str, torch.Tensor]
) -> None:
    """Some trainers write config and weights apart; the config must not send the next load back to the base."""
    model = vispruner.load(thin)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.config.save_pretrained(tmp_path / "apart")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        VisPrunerLlavaForConditionalGeneration.from_pretrained(tmp_path / "apart")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "apart" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(thin / "generation_config.json", tmp_path / "apart")
    assert not logits(vispruner.load(tmp_path / "apart"), prompt).any()


def test_a_model_told_to_be_thin_is_saved_full(base: Path, thin: Path, tmp_path: Path) -> None:
    full = vispruner.load(base, visual_token_num=KEPT)
    full.set_vispruner_config(weights="thin", base_model_name_or_path=HUB_BASE, base_model_revision=COMMIT)
    full.save_pretrained(tmp_path / "saved")
    assert options_of(tmp_path / "saved")["weights"] == "full"


# Errors


@every_way
def test_a_base_that_is_not_there_is_named_with_the_remedy(load: Any, thin: Path) -> None:
    message = (
        rf"(?s){thin} is a thin repo: its weights are those of {HUB_BASE} at revision {COMMIT}, which cannot be read.*"
        r"token=.*go online.*vispruner_config={'base_model_name_or_path'"
    )
    with pytest.raises(Exception, match=message) as error:
        load(thin)
    assert isinstance(error.value, OSError) or load is LOADERS["pipeline"]


def test_a_base_that_is_only_there_at_another_commit_is_an_error(cache: Path, thin: Path, base: Path) -> None:
    root = base.parent
    base.rename(root / OTHER_COMMIT)
    with pytest.raises(OSError, match=f"{HUB_BASE} at revision {COMMIT}, which cannot be read"):
        vispruner.load(thin)


@pytest.mark.parametrize("load", [LOADERS["AutoModel"], vispruner.load], ids=["AutoModel", "load"])
def test_a_moved_base_can_be_given_at_load_time(
    load: Any, thin: Path, tiny_llava_repo: Path, prompt: Any, expected: torch.Tensor
) -> None:
    model = load(thin, vispruner_config={"base_model_name_or_path": str(tiny_llava_repo)})
    assert torch.equal(logits(model, prompt), expected)


@every_way
def test_weights_that_the_base_lacks_are_an_error(load: Any, base: Path, thin: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=rf"{HUB_BASE} at revision {COMMIT} lacks weights .* lm_head\.weight") as error:
        load(thin)
    assert isinstance(error.value, ValueError)


def test_a_base_whose_weights_are_gone_is_named(base: Path, thin: Path) -> None:
    (base / "model.safetensors").unlink()
    with pytest.raises(OSError, match=f"{HUB_BASE} at revision {COMMIT}, which cannot be read"):
        vispruner.load(thin)


def test_a_full_disk_is_not_blamed_on_the_base(base: Path, thin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vispruner.base_weights, "cached_file", full_disk)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        vispruner.load(thin)


def test_a_full_repo_without_its_weights_stays_an_error(base: Path, tmp_path: Path) -> None:
    full = build_repo(write_yaml(tmp_path), tmp_path / "out", thin=False, show_progress=False)
    (full / "model.safetensors").unlink()
    for load in (vispruner.load, LOADERS["AutoModel"]):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            load(full)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_without_trust_remote_code_a_thin_repo_is_stocks_own_error(auto_class: Any, base: Path, thin: Path) -> None:
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        auto_class.from_pretrained(thin, trust_remote_code=False)


def test_the_config_of_a_thin_repo_does_not_replace_the_weights_of_another(
    base: Path, thin: Path, tmp_path: Path, prompt: dict[str, torch.Tensor]
) -> None:
    """Whether a repo is thin is for its own config.json to say, not for a config object from elsewhere."""
    tuned = vispruner.load(thin)
    with torch.no_grad():
        tuned.lm_head.weight.zero_()
    tuned.save_pretrained(tmp_path / "tuned")
    for config in (VisPrunerLlavaConfig.from_pretrained(thin), AutoConfig.from_pretrained(thin)):
        model = VisPrunerLlavaForConditionalGeneration.from_pretrained(tmp_path / "tuned", config=config)
        assert not logits(model, prompt).any()


@pytest.mark.core
def test_a_config_object_may_be_given(base: Path, thin: Path, prompt: Any, expected: torch.Tensor) -> None:
    config = VisPrunerLlavaConfig.from_pretrained(thin)
    for _ in range(2):  # the caller's object is left as it is
        model = VisPrunerLlavaForConditionalGeneration.from_pretrained(thin, config=config)
        assert torch.equal(logits(model, prompt), expected)
        assert config.vispruner_config["weights"] == "thin"


def test_its_kept_patches_can_be_drawn(base: Path, thin: Path, tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "photo.png")
    assert main(["show", str(tmp_path / "photo.png"), "--repo", str(thin), "--out", str(tmp_path / "kept.png")]) == 0
    assert (tmp_path / "kept.png").is_file()


# A fresh process, which has transformers and not this package

FRESH_PROCESS = """
import sys
sys.modules["vispruner"] = None
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from PIL import Image

torch.set_num_threads(1)
photo, results = sys.argv[1:]
image = Image.open(photo).convert("RGB")
processor = AutoProcessor.from_pretrained("someone/pruned")
prompt = processor(text="USER: <image>\\nWhat is it? ASSISTANT:", images=image, return_tensors="pt")
found = {}
with torch.no_grad():
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        model = auto_class.from_pretrained("someone/pruned", trust_remote_code=True)
        found[auto_class.__name__] = model(**prompt).logits
    pipe = pipeline("image-text-to-text", model="someone/pruned", trust_remote_code=True, revision="main")
    found["pipeline"] = pipe.model(**prompt).logits
    pipe(text="USER: <image>\\nWhat is it? ASSISTANT:", images=[image], max_new_tokens=3)
torch.save(found, results)
try:
    AutoModelForImageTextToText.from_pretrained("someone/pruned")
except OSError as error:
    print(error)
"""


@pytest.mark.core
def test_a_fresh_process_loads_a_thin_hub_repo_offline(
    base: Path, cache: Path, thin: Path, tmp_path: Path, photo: Image.Image, prompt: Any, expected: torch.Tensor
) -> None:
    in_cache(cache, "someone/pruned", thin)
    photo.save(tmp_path / "photo.png")
    script = tmp_path / "fresh.py"
    script.write_text(FRESH_PROCESS)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_CACHE": str(cache), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "photo.png"), str(tmp_path / "results.pt")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found = torch.load(tmp_path / "results.pt")
    assert found.keys() == {"AutoModel", "AutoModelForImageTextToText", "pipeline"}
    assert all(torch.equal(logits, expected) for logits in found.values())
    assert "does not appear to have a file named" in process.stdout


# Over HTTP


@pytest.fixture
def hub(tmp_path: Path, tiny_llava_repo: Path) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "storage") as hub:
        hub.add_user("ada", "hf_ada")
        hub.add_repo(HUB_BASE)
        hub.commit(HUB_BASE, contents(tiny_llava_repo))
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.core
def test_a_thin_build_reads_the_headers_of_the_weights_and_no_more(
    hub: LocalHub, tiny_llava_repo: Path, tmp_path: Path
) -> None:
    sharded = copy_without_weights(tiny_llava_repo, tmp_path / "sharded")
    legacy_in_shards(tiny_llava_repo, sharded)
    hub.add_repo("llava-hf/sharded")
    hub.commit("llava-hf/sharded", contents(sharded))
    for name, base_model in (("one", HUB_BASE), ("many", "llava-hf/sharded")):
        (tmp_path / name).mkdir()
        write_yaml(tmp_path / name, base_model=base_model)
    code = """
        from pathlib import Path
        from vispruner.conversion import build
        build.build_repo("one/pruned.yaml", "one/asked", thin=True)
        build.THIN_ABOVE = 10**6
        build.build_repo("one/pruned.yaml", "one/by-size")
        build.build_repo("many/pruned.yaml", "many/asked", thin=True)
    """
    hub.run(f"import os; os.chdir({str(tmp_path)!r})\n{dedent(code)}", home=tmp_path / "home")
    for out in ("one/asked", "one/by-size", "many/asked"):
        assert options_of(tmp_path / out)["weights"] == "thin"
    revisions = [options_of(tmp_path / name / "asked")["base_model_revision"] for name in ("one", "many")]
    assert revisions == [hub.refs(HUB_BASE)["main"], hub.refs("llava-hf/sharded")["main"]]
    fetched = [request for request in hub.cdn_requests if request.method == "GET"]
    assert len(fetched) == 1 + len(list(sharded.glob("*.safetensors")))  # the headers of a commit are read once
    assert {request.headers.get("Range") for request in fetched} == {"bytes=0-100000"}


@pytest.mark.core
def test_a_base_of_bin_files_is_downloaded_to_be_checked_and_that_is_said(
    hub: LocalHub, tiny_llava_repo: Path, tmp_path: Path
) -> None:
    folder = copy_without_weights(tiny_llava_repo, tmp_path / "bin")
    legacy_bin(tiny_llava_repo, folder)
    hub.add_repo("llava-hf/bin")
    hub.commit("llava-hf/bin", contents(folder))
    config, out = write_yaml(tmp_path, base_model="llava-hf/bin"), tmp_path / "out"
    code = f"from vispruner.conversion.build import build_repo\nbuild_repo({str(config)!r}, {str(out)!r}, thin=True)"
    done = hub.run(code, home=tmp_path / "home")
    assert "llava-hf/bin has no safetensors files: its .bin files are downloaded" in done.stdout
    assert options_of(out)["weights"] == "thin" and not list(out.glob("*.bin"))


LOAD_MANY = """
import json, sys
sys.modules["vispruner"] = None
import torch
from transformers import AutoModelForImageTextToText

torch.set_num_threads(1)
found = {}
for repo, settings in REPOS:
    name = repo + settings.get("revision", "")
    try:
        model = AutoModelForImageTextToText.from_pretrained(repo, **settings)
        found[name] = [type(model).__name__, model.config.vispruner_config["visual_token_num"]]
    except OSError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def load_many(hub: LocalHub, home: Path, repos: list[tuple[str, dict[str, Any]]], **settings: Any) -> dict[str, Any]:
    done = hub.run(LOAD_MANY.replace("REPOS", repr(repos)), home=home, **settings)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.core
def test_over_http_a_base_loads_or_is_named(hub: LocalHub, thin: Path, tiny_llava_repo: Path, tmp_path: Path) -> None:
    commit = hub.refs(HUB_BASE)["main"]
    bases = {
        "open": HUB_BASE,
        "private": "ada/secret",
        "gated": "ada/gated",
        "gone": "ada/gone",
        "rewritten": "ada/other",
    }
    hub.add_repo("ada/secret", private=True)
    hub.add_repo("ada/gated", gated="manual")
    hub.add_repo("ada/other")
    for name, base_model in bases.items():
        if base_model in hub.repos and base_model != HUB_BASE:
            hub.commit(base_model, contents(tiny_llava_repo))
        pinned = commit if name in ("open", "gone", "rewritten") else hub.refs(base_model)["main"]
        edit_options(thin, base_model_name_or_path=base_model, base_model_revision=pinned)
        hub.add_repo(f"ada/{name}-thin")
        hub.commit(f"ada/{name}-thin", contents(thin))
    edit_options(thin, base_model_name_or_path=HUB_BASE, base_model_revision=commit, visual_token_num=9)
    hub.commit("ada/open-thin", {"config.json": (thin / "config.json").read_bytes()}, revision="v9")

    trusted = {"trust_remote_code": True}
    repos = [(f"ada/{name}-thin", trusted) for name in bases]
    repos += [("ada/open-thin", {**trusted, "revision": "v9"})]
    found = load_many(hub, tmp_path / "home", repos)
    ours = "VisPrunerLlavaForConditionalGeneration"
    assert found.pop("ada/open-thin") == [ours, KEPT]
    assert found.pop("ada/open-thinv9") == [ours, 9]
    reasons = {
        "private": "make sure to pass a token having permission",
        "gated": "You are trying to access a gated repo",
        "gone": "is not a valid model identifier",
        "rewritten": "is not a valid git identifier",
    }
    assert found.keys() == {f"ada/{name}-thin" for name in reasons}
    for name, reason in reasons.items():
        message = found[f"ada/{name}-thin"]
        assert message.startswith(
            f"ada/{name}-thin is a thin repo: its weights are those of {bases[name]} at revision"
        )
        assert reason in message, message

    stock = load_many(hub, tmp_path / "home", [("ada/open-thin", {"trust_remote_code": False})])
    assert "does not appear to have a file named" in stock["ada/open-thin"]
    with_token = [("ada/private-thin", {**trusted, "token": "hf_ada"})]
    assert load_many(hub, tmp_path / "home", with_token) == {"ada/private-thin": [ours, KEPT]}

    seen = len(hub.log)
    assert load_many(hub, tmp_path / "home", repos[:1]) == {"ada/open-thin": [ours, KEPT]}
    assert not [request.path for request in hub.log[seen:] if HUB_BASE in request.path]  # a commit never changes
    del hub.repos[HUB_BASE]
    seen = len(hub.log)
    offline = load_many(hub, tmp_path / "home", [repos[0], repos[-1]], HF_HUB_OFFLINE="1")
    assert offline == {"ada/open-thin": [ours, KEPT], "ada/open-thinv9": [ours, 9]}
    assert len(hub.log) == seen


@pytest.mark.core
def test_the_token_and_the_weights_never_meet_on_the_storage_host(hub: LocalHub, thin: Path, tmp_path: Path) -> None:
    edit_options(thin, base_model_revision=hub.refs(HUB_BASE)["main"])
    hub.add_repo("ada/thin", private=True)
    hub.commit("ada/thin", contents(thin))
    repos = [("ada/thin", {"trust_remote_code": True})]
    found = load_many(hub, tmp_path / "home", repos, token="hf_ada")
    assert found["ada/thin"][1] == KEPT
    assert hub.cdn_requests
    assert not [request for request in hub.cdn_requests if "hf_ada" in str(request.headers) + request.path]


# Verify


@pytest.mark.core
def test_verify_loads_a_thin_repo_with_its_base_and_says_thin(base: Path, thin: Path, tiny_llava_repo: Path) -> None:
    report = verify_repo(thin, base=tiny_llava_repo)
    assert report.passed, report.table()
    assert {check.status for check in report.checks} == {"pass"}
    details = {check.name: check.detail for check in report.checks}
    assert details["weights"].startswith("thin: ") and f"of {HUB_BASE} at {COMMIT}" in details["weights"]
    assert details["base weights"].startswith(f"thin: {HUB_BASE} at {COMMIT}")
    assert details["KV length falls"].startswith(f"visual tokens 64 -> {KEPT}")
    assert "tensors hash as in the files" in details["weights come from the files"]


@pytest.mark.parametrize("write", [legacy_with_old_buffers, legacy_bin_in_shards])
@pytest.mark.core
def test_verify_reads_bases_of_other_layouts(
    write: Any, cache: Path, tiny_llava_repo: Path, thin: Path, tmp_path: Path
) -> None:
    folder = copy_without_weights(tiny_llava_repo, tmp_path / "base")
    write(tiny_llava_repo, folder)
    in_cache(cache, HUB_BASE, folder)
    report = verify_repo(thin)
    assert report.passed, report.table()


def no_base(thin: Path, base: Path) -> None:
    shutil.rmtree(base.parent.parent)


def lm_head_gone(thin: Path, base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def has_weights_after_all(thin: Path, base: Path) -> None:
    shutil.copy(base / "model.safetensors", thin)


def not_pinned(thin: Path, base: Path) -> None:
    edit_options(thin, base_model_revision="main")


def base_is_a_folder(thin: Path, base: Path) -> None:
    edit_options(thin, base_model_name_or_path=str(base))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_base, f"base {HUB_BASE} at revision {COMMIT} is not a folder here, is not in the local Hub cache"),
        (lm_head_gone, f"the base {HUB_BASE} at {COMMIT} does not fit: missing: lm_head.weight"),
        (has_weights_after_all, "the repo is thin, so model.safetensors would be ignored"),
        (not_pinned, "base_model_revision a commit, got"),
        (base_is_a_folder, "base_model_name_or_path must be a Hub id"),
    ],
)
@pytest.mark.core
def test_verify_refuses_a_thin_repo_that_could_not_be_loaded(
    spoil: Callable[[Path, Path], None], reason: str, base: Path, thin: Path
) -> None:
    spoil(thin, base)
    (failure,) = verify_repo(thin).failures
    assert failure.name == "weights" and reason in failure.detail


@pytest.mark.core
def test_verify_of_a_thin_repo_too_large_to_run_says_what_was_not_run(base: Path, thin: Path) -> None:
    report = verify_repo(thin, available_memory=2**20)
    assert report.passed, report.table()
    skipped = {check.name for check in report.checks if check.status == "not run"}
    assert skipped == {"weights hash", "weights equal the base's", *MODEL_CHECKS}


@pytest.mark.core
def test_verify_finds_a_base_with_other_weights(base: Path, thin: Path, tiny_llava_repo: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["language_model.lm_head.weight"].zero_()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (failure,) = verify_repo(thin, base=tiny_llava_repo).failures
    assert failure.detail == f"1 tensors are not those of {tiny_llava_repo}: lm_head.weight"
