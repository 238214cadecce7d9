"""The `vispruner_config` block: validation, budgets, merging at load time, and changes of a loaded model."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, SiglipVisionConfig

import vispruner
from vispruner import (
    VisPrunerLlavaConfig,
    VisPrunerLlavaForConditionalGeneration,
    VisPrunerLlavaNextConfig,
    VisPrunerLlavaNextForConditionalGeneration,
    VisPrunerOptions,
    merge_vispruner_config,
)

FULL = 64  # visual tokens of an image in the tiny LLaVA
DEFAULTS = {
    "method": "vispruner",
    "visual_token_num": None,
    "keep_ratio": None,
    "stage_token_nums": None,
    "prune_layers": None,
    "method_options": None,
    "important_ratio": 0.5,
    "dedup_step": None,
    "attention_layer": None,
    "encoder_stage": None,
    "position_policy": None,
    "tile_mode": "paper",
    "seed": None,
    "codebook": None,
    "text_tower": None,
    "base_model_name_or_path": None,
    "base_model_revision": None,
    "weights": "full",
    "vispruner_version": None,
}


@pytest.fixture(scope="module")
def model(tiny_llava_repo: Path) -> VisPrunerLlavaForConditionalGeneration:
    return vispruner.load(tiny_llava_repo, visual_token_num=8)


@pytest.fixture(autouse=True)
def _restore_the_shared_model(request: pytest.FixtureRequest) -> Any:
    yield
    if "model" in request.fixturenames:
        request.getfixturevalue("model").set_vispruner_config(**{**DEFAULTS, "visual_token_num": 8})


@pytest.fixture(scope="module")
def inputs(tiny_llava_repo: Path, photo: Image.Image) -> dict[str, torch.Tensor]:
    return AutoProcessor.from_pretrained(tiny_llava_repo)(
        text="<image> What is it?", images=photo, return_tensors="pt"
    )


@pytest.fixture(scope="module")
def saved_repo(model: VisPrunerLlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned repo that stores settings other than the defaults."""
    folder = tmp_path_factory.mktemp("saved")
    changed = copy.deepcopy(model)
    changed.set_vispruner_config(visual_token_num=12, important_ratio=0.25, dedup_step=4)
    changed.save_pretrained(folder)
    return folder


def visual_tokens(model: VisPrunerLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> int:
    """Count the image's tokens that really reached the KV cache."""
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    return cache.get_seq_length() - (inputs["input_ids"].shape[1] - FULL)


def test_a_stored_step_of_8_stays_8_and_null_brings_the_default_back() -> None:
    """Repos of 0.1 store the default of that time, which no image size changed."""
    stored = {**DEFAULTS, "visual_token_num": 8, "dedup_step": 8}
    assert merge_vispruner_config(stored, {"visual_token_num": 9})["dedup_step"] == 8
    assert VisPrunerOptions.from_dict(stored).selector_options["dedup_step"] == 8
    assert merge_vispruner_config(stored, {"dedup_step": None})["dedup_step"] is None


DISABLE = ' (use method="none" to disable pruning)'
INVALID = [
    ("visual_token_num", (0, -3, "64", True, 1.5, float("nan")), "an integer >= 1", DISABLE),
    ("keep_ratio", (0, -0.1, 1.5, "0.5", True, float("nan"), float("inf")), "a number in (0, 1]", DISABLE),
    ("important_ratio", (-0.1, 1.1, "0.5", None, True, float("nan")), 'a number in [0, 1] or "auto"', ""),
    ("dedup_step", (0, -8, 2.0, True, "8"), "an integer >= 1 or null", ""),
    (
        "encoder_stage",
        (3, {}, {"layer": 1}, {"layer": 1, "keep_ratio": 0.5, "more": 1}, {"layer": 0, "pixel_tolerance": 0}),
        'null, {"layer": k, "keep_ratio": q} or {"pixel_tolerance": t}',
        "",
    ),
    ("attention_layer", ("2", 1.0, True, [1]), "an encoder layer index or null", ""),
    ("position_policy", ("renumbered", "", 0, ["original"]), 'null, "renumber" or "original"', ""),
    ("tile_mode", ("Paper", None, 1), '"paper" or "native"', ""),
    ("seed", ("1", 1.0, True), "an integer or null", ""),
    (
        "codebook",
        (1, "", "codebook.bin", "made/model.safetensors"),
        "null or a .safetensors file not named like weights (model...)",
        "",
    ),
    (
        "text_tower",
        (1, "", "tower.bin", "made/model.safetensors"),
        "null or a .safetensors file not named like weights (model...)",
        "",
    ),
    ("method", ("", None, 3, ["random"]), 'a selector name or "none"', ""),
    (
        "stage_token_nums",
        ([0], [4, 8], [4, -1], [], 4, [1.5]),
        "null or numbers of tokens that do not grow, the first at least 1",
        "",
    ),
    ("prune_layers", ([0], [3, 2], [2, 2], [], 2, ["2"]), "null or decoder layers in rising order, from 1 on", ""),
    ("method_options", ([], "x", {1: 2}), "null or a dict of option names", ""),
    ("base_model_name_or_path", (1, Path("base")), "a string or null", ""),
    ("base_model_revision", (1,), "a string or null", ""),
    ("weights", ("base", None, True), '"full" or "thin"', ""),
    ("vispruner_version", (1, 0.1), "a string or null", ""),
]


@pytest.mark.parametrize(
    ("field", "value", "allowed", "remedy"),
    [(field, value, allowed, remedy) for field, values, allowed, remedy in INVALID for value in values],
)
def test_an_invalid_value_is_refused_by_field_and_remedy(field: str, value: Any, allowed: str, remedy: str) -> None:
    budget = {} if field in ("keep_ratio", "stage_token_nums") else {"visual_token_num": 8}
    with pytest.raises(ValueError) as error:
        VisPrunerOptions.from_dict({**budget, field: value})
    assert str(error.value) == f"vispruner_config.{field} must be {allowed}, got {value!r}{remedy}"


@pytest.mark.parametrize(
    ("given", "absent"),
    [({}, "base_model_name_or_path"), ({"base_model_name_or_path": "a/b"}, "base_model_revision")],
)
def test_weights_that_are_elsewhere_need_a_pinned_base(given: dict[str, str], absent: str) -> None:
    with pytest.raises(ValueError, match=rf'{absent} must be a string when weights is "thin", got None'):
        VisPrunerOptions.from_dict({"visual_token_num": 8, "weights": "thin", **given})


@pytest.mark.parametrize("method", ["vispruner+none", "none+fastv", "a+b+c", "vispruner+"])
def test_none_stands_alone_and_two_methods_are_the_most(method: str) -> None:
    with pytest.raises(
        ValueError, match=r'method must be a selector name, two of them as "a\+b", or "none" alone, got'
    ):
        VisPrunerOptions.from_dict({"visual_token_num": 8, "method": method})


@pytest.mark.parametrize("name", ["important_ratio", "dedup_step", "seed", "visual_token_num"])
def test_a_field_is_no_option_of_a_method(name: str) -> None:
    """There it would win over the field, unchecked."""
    with pytest.raises(ValueError, match=f"method_options: {name} is a field beside it: give it there"):
        VisPrunerOptions.from_dict({"visual_token_num": 8, "method_options": {name: 50}})


@pytest.mark.parametrize("counts", [[8, 8], [1, 0]])
def test_stages_may_keep_as_many_as_the_one_before_and_few(counts: list[int]) -> None:
    options = {"method": "pyramiddrop", "prune_layers": [1, 2], "stage_token_nums": counts}
    assert VisPrunerOptions.from_dict(options).stage_token_nums == counts


def test_a_change_of_method_keeps_the_stages_unless_it_is_none() -> None:
    stored = {"method": "fastv", "prune_layers": [2], "stage_token_nums": [8]}
    assert merge_vispruner_config(stored, {"method": "dart"})["stage_token_nums"] == [8]
    assert merge_vispruner_config(stored, {"method": "none"})["stage_token_nums"] is None


def test_of_several_unknown_fields_the_first_is_guessed() -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['methd', 'zzz'\]; did you mean method\?"):
        VisPrunerOptions.from_dict({"methd": "none", "zzz": 1})


def test_every_field_has_its_invalid_values_tested() -> None:
    assert {field for field, *_ in INVALID} == set(DEFAULTS) == set(vispruner.configuration_vispruner.FIELD_NAMES)


def test_the_defaults_are_the_papers() -> None:
    assert VisPrunerOptions.from_dict({"visual_token_num": 128}).to_dict() == {**DEFAULTS, "visual_token_num": 128}


@pytest.mark.parametrize("config", [{"visual_tokens": 8}, {"visual_token_num": 8, "T": 8, 3: 4}])
def test_unknown_keys_are_refused_with_the_known_ones(config: dict[Any, Any]) -> None:
    for refuse in (VisPrunerOptions.from_dict, lambda block: merge_vispruner_config({"keep_ratio": 0.5}, block)):
        with pytest.raises(ValueError, match=r"vispruner_config has unknown fields .*; (the fields are|did you mean)"):
            refuse(config)


@pytest.mark.parametrize("block", [["visual_token_num"], "visual_token_num=8", 8])
def test_a_block_that_is_no_dict_is_refused(block: Any) -> None:
    with pytest.raises(ValueError, match=r"vispruner_config must be a dict of fields, got"):
        merge_vispruner_config(None, block)


def test_random_needs_a_seed() -> None:
    with pytest.raises(ValueError, match=r'vispruner_config.seed must be an integer when method is "random"'):
        VisPrunerOptions(method="random", visual_token_num=8)
    assert VisPrunerOptions(method="random", visual_token_num=8, seed=0).seed == 0


def test_exactly_one_budget_is_required() -> None:
    with pytest.raises(
        ValueError, match=r"visual_token_num and vispruner_config.keep_ratio are both set, got 8 and 0.5"
    ):
        VisPrunerOptions(visual_token_num=8, keep_ratio=0.5)
    with pytest.raises(
        ValueError, match=r"needs a budget: set visual_token_num .* or keep_ratio .*use method=\"none\""
    ):
        VisPrunerOptions()


def test_method_none_needs_no_budget_and_ignores_one() -> None:
    assert VisPrunerOptions(method="none").budget(576) == 576
    assert VisPrunerOptions(method="none", visual_token_num=8).budget(576) == 576


@pytest.mark.parametrize(
    ("stored", "changes", "budgets"),
    [
        ({"visual_token_num": 64}, {"keep_ratio": 0.25}, (None, 0.25)),
        ({"keep_ratio": 0.25}, {"visual_token_num": 64}, (64, None)),
        ({"keep_ratio": 0.25}, {"visual_token_num": 64, "keep_ratio": None}, (64, None)),
        ({"visual_token_num": 64}, {"important_ratio": 0.0}, (64, None)),
        ({"visual_token_num": 64}, {}, (64, None)),
        ({"visual_token_num": 64}, None, (64, None)),
        (None, {"visual_token_num": 64}, (64, None)),
        ({"visual_token_num": 64}, {"method": "none"}, (64, None)),
        ({"method": "none"}, {"method": "vispruner", "visual_token_num": 64}, (64, None)),
    ],
)
def test_giving_one_budget_clears_the_other(
    stored: dict | None, changes: dict | None, budgets: tuple[int | None, float | None]
) -> None:
    before = copy.deepcopy((stored, changes))
    merged = merge_vispruner_config(stored, changes)
    assert (merged["visual_token_num"], merged["keep_ratio"]) == budgets
    assert list(merged) == list(DEFAULTS)
    assert (stored, changes) == before


def test_taking_the_budget_away_or_giving_both_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a budget"):
        merge_vispruner_config({"visual_token_num": 64}, {"visual_token_num": None})
    with pytest.raises(ValueError, match=r"are both set, got 64 and 0.5"):
        merge_vispruner_config(None, {"visual_token_num": 64, "keep_ratio": 0.5})


@pytest.mark.parametrize(
    ("keep_ratio", "tokens", "kept"),
    [
        (0.5, 576, 288),
        (0.5, 5, 3),  # 2.5 goes up, where Python's round() would go to 2
        (0.25, 10, 3),
        (0.1, 576, 58),
        (1 / 9, 576, 64),
        (0.001, 576, 1),
        (0.0005, 576, 1),  # never nothing
        (0.001, 1, 1),
        (0.999, 576, 575),
        (0.9999, 576, 576),
        (1.0, 577, 577),
        (1, 7, 7),
    ],
)
def test_keep_ratio_rounds_half_up_and_keeps_at_least_one(keep_ratio: float, tokens: int, kept: int) -> None:
    assert VisPrunerOptions(keep_ratio=keep_ratio).budget(tokens) == kept


@pytest.mark.parametrize(("tokens", "kept"), [(1, 1), (63, 63), (64, 64), (576, 64)])
def test_visual_token_num_is_capped_by_what_there_is(tokens: int, kept: int) -> None:
    assert VisPrunerOptions(visual_token_num=64).budget(tokens) == kept


@pytest.mark.parametrize("budget", [{"visual_token_num": FULL}, {"visual_token_num": 10**6}, {"keep_ratio": 1.0}])
def test_a_budget_of_everything_is_the_identity_and_warns_once(
    model: VisPrunerLlavaForConditionalGeneration,
    inputs: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
    budget: dict[str, float],
) -> None:
    logging.Logger.warning_once.cache_clear()  # transformers forgets what earlier tests warned of
    model.set_vispruner_config(method="none")
    with torch.no_grad():
        dense = model(**inputs).logits
    assert not caplog.records
    model.set_vispruner_config(method="vispruner", **budget)
    with torch.no_grad():
        first, second = model(**inputs).logits, model(**inputs).logits
    assert torch.equal(first, dense) and torch.equal(second, dense)
    (warning,) = [record.getMessage() for record in caplog.records if "vispruner_config" in record.getMessage()]
    assert warning.startswith(f"vispruner_config keeps all {FULL} visual tokens of an image")
    assert warning.endswith("so nothing is pruned; lower visual_token_num or keep_ratio to prune")


@pytest.mark.parametrize("config_class", [VisPrunerLlavaConfig, VisPrunerLlavaNextConfig])
def test_config_json_holds_the_complete_flat_block_and_gives_it_back(config_class: type, tmp_path: Path) -> None:
    config = config_class(vispruner_config={"keep_ratio": 0.25, "seed": 3, "base_model_revision": "abc"})
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["vispruner_config"]
    assert stored == {**DEFAULTS, "keep_ratio": 0.25, "seed": 3, "base_model_revision": "abc"}
    assert all(isinstance(value, str | int | float | None) for value in stored.values())
    loaded = config_class.from_pretrained(tmp_path)
    assert type(loaded) is config_class
    assert loaded.vispruner_config == config.vispruner_config == stored
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("config_class", "model_type"),
    [
        (VisPrunerLlavaConfig, "llava"),
        (VisPrunerLlavaNextConfig, "llava_next"),
    ],
)
def test_the_model_type_stays_native(config_class: type, model_type: str) -> None:
    assert config_class(vispruner_config={"visual_token_num": 8}).model_type == model_type


def test_a_config_is_validated_when_made_and_when_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vispruner_config.visual_token_num must be an integer >= 1, got 0"):
        VisPrunerLlavaConfig(vispruner_config={"visual_token_num": 0})
    VisPrunerLlavaConfig(vispruner_config={"visual_token_num": 8}).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["vispruner_config"]["keep_rate"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"unknown fields \['keep_rate'\]"):
        VisPrunerLlavaConfig.from_pretrained(tmp_path)


STORED = {**DEFAULTS, "visual_token_num": 12, "important_ratio": 0.25, "dedup_step": 4}
MERGED = {**STORED, "visual_token_num": None, "keep_ratio": 0.5}


@pytest.mark.core
def test_a_partial_block_is_laid_over_the_stored_one(saved_repo: Path) -> None:
    load = VisPrunerLlavaForConditionalGeneration.from_pretrained
    assert load(saved_repo).config.vispruner_config == STORED
    assert load(saved_repo, vispruner_config={"keep_ratio": 0.5}).config.vispruner_config == MERGED
    assert load(saved_repo, vispruner_config={}).config.vispruner_config == STORED
    assert vispruner.load(saved_repo).config.vispruner_config == STORED
    assert vispruner.load(saved_repo, keep_ratio=0.5).config.vispruner_config == MERGED
    assert vispruner.load(saved_repo, vispruner_config={"keep_ratio": 0.5}).config.vispruner_config == MERGED
    config = VisPrunerLlavaConfig.from_pretrained(saved_repo, vispruner_config={"keep_ratio": 0.5})
    assert config.vispruner_config == MERGED


def test_a_merge_that_is_invalid_fails_the_load(saved_repo: Path) -> None:
    with pytest.raises(ValueError, match=r"vispruner_config.keep_ratio must be a number in"):
        VisPrunerLlavaForConditionalGeneration.from_pretrained(saved_repo, vispruner_config={"keep_ratio": 7})


def test_a_partial_block_is_laid_over_a_given_config_object(saved_repo: Path, tiny_llava_repo: Path) -> None:
    load = VisPrunerLlavaForConditionalGeneration.from_pretrained
    ours = VisPrunerLlavaConfig.from_pretrained(saved_repo)
    assert load(saved_repo, config=ours, vispruner_config={"keep_ratio": 0.5}).config.vispruner_config == MERGED
    assert ours.vispruner_config == STORED  # the caller's own object is left alone
    assert load(saved_repo, config=ours).config.vispruner_config == STORED
    assert (
        load(saved_repo, config=str(saved_repo), vispruner_config={"keep_ratio": 0.5}).config.vispruner_config
        == MERGED
    )
    stock = LlavaConfig.from_pretrained(tiny_llava_repo)
    loaded = load(tiny_llava_repo, config=stock, vispruner_config={"keep_ratio": 0.5})
    assert loaded.config.vispruner_config == {**DEFAULTS, "keep_ratio": 0.5}
    assert not hasattr(stock, "vispruner_config")
    assert vispruner.load(saved_repo, config=ours, keep_ratio=0.5).config.vispruner_config == MERGED


REMOTE_MERGE = """
import json, sys
sys.modules["vispruner"] = None  # importing the installed package would be an error
from transformers import AutoConfig, AutoModelForImageTextToText
repo, changes = sys.argv[1], {"keep_ratio": 0.5}
remote = {"trust_remote_code": True}
load = AutoModelForImageTextToText.from_pretrained
config = AutoConfig.from_pretrained(repo, **remote)
blocks = {
    "stored": config.vispruner_config,
    "config": AutoConfig.from_pretrained(repo, vispruner_config=changes, **remote).vispruner_config,
    "model": load(repo, vispruner_config=changes, **remote).config.vispruner_config,
    "model and config": load(repo, config=config, vispruner_config=changes, **remote).config.vispruner_config,
    "given config afterwards": config.vispruner_config,
}
print(json.dumps(blocks))
"""


@pytest.mark.core
def test_the_auto_classes_merge_alike_from_remote_code(saved_repo: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", REMOTE_MERGE, str(saved_repo)],
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "stored": STORED,
        "config": MERGED,
        "model": MERGED,
        "model and config": MERGED,
        "given config afterwards": STORED,
    }


def test_set_vispruner_config_takes_effect_at_the_next_call(
    model: VisPrunerLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> None:
    assert visual_tokens(model, inputs) == 8
    for changes, kept in (
        ({"visual_token_num": 3}, 3),
        ({"keep_ratio": 0.25}, 16),
        ({"method": "cls_attention"}, 16),
        ({"method": "none"}, FULL),
        ({"method": "vispruner"}, 16),
        ({"visual_token_num": 5}, 5),
    ):
        model.set_vispruner_config(**changes)
        assert visual_tokens(model, inputs) == kept, changes


@pytest.mark.parametrize(
    "changes",
    [
        {"visual_token_num": 0},
        {"visual_token_num": None},
        {"keep_ratio": 2.0},
        {"visual_token_num": 4, "keep_ratio": 0.5},
        {"visual_token_num": 4, "tokens": 8},
        {"visual_token_num": 4, "important_ratio": 2},
    ],
)
def test_a_refused_change_leaves_the_old_config(
    model: VisPrunerLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], changes: dict[str, Any]
) -> None:
    before = copy.deepcopy(model.config.vispruner_config)
    with pytest.raises(ValueError, match=r"vispruner_config"):
        model.set_vispruner_config(**changes)
    assert model.config.vispruner_config == before
    assert visual_tokens(model, inputs) == 8


def test_llava_next_refuses_original_positions_in_paper_mode(tiny_llava_next_repo: Path) -> None:
    message = 'vispruner_config.position_policy "original" needs tile_mode "native"'
    with pytest.raises(ValueError, match=message):
        vispruner.load(tiny_llava_next_repo, visual_token_num=4, position_policy="original")
    model = vispruner.load(tiny_llava_next_repo, visual_token_num=4)
    with pytest.raises(ValueError, match=message):
        model.set_vispruner_config(position_policy="original")
    assert model.config.vispruner_config["position_policy"] is None
    model.set_vispruner_config(position_policy="original", tile_mode="native")
    with pytest.raises(ValueError, match=message):
        model.set_vispruner_config(tile_mode="paper")
    assert model.config.vispruner_config["tile_mode"] == "native"


def tiny_config(vision: Any = None, **settings: Any) -> VisPrunerLlavaConfig:
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = vision or CLIPVisionConfig
    return VisPrunerLlavaConfig(
        vision_config=vision(image_size=56, patch_size=14, **size),
        text_config=LlamaConfig(vocab_size=64, **size),
        image_token_index=63,
        **{"vispruner_config": {"visual_token_num": 4}, **settings},
    )


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [
        (VisPrunerLlavaForConditionalGeneration, VisPrunerLlavaConfig),
        (VisPrunerLlavaNextForConditionalGeneration, VisPrunerLlavaNextConfig),
    ],
)
def test_a_model_needs_the_block(model_class: type, config_class: type) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"config.vispruner_config is missing: pass vispruner_config="),
    ):
        model_class(config_class())


def test_a_stock_repo_without_a_block_is_refused(tiny_llava_repo: Path) -> None:
    with pytest.raises(ValueError, match=r"config.vispruner_config is missing: pass vispruner_config="):
        VisPrunerLlavaForConditionalGeneration.from_pretrained(tiny_llava_repo)
    with pytest.raises(ValueError, match=r"needs a budget"):
        vispruner.load(tiny_llava_repo)


def test_a_tower_without_cls_is_refused_unless_dense() -> None:
    with pytest.raises(
        ValueError, match=r"vision_config.model_type must be clip_vision_model or .*, got 'siglip_vision_model'"
    ):
        VisPrunerLlavaForConditionalGeneration(tiny_config(SiglipVisionConfig))
    settings = {"vision_feature_select_strategy": "full", "vispruner_config": {"method": "none"}}
    dense = VisPrunerLlavaForConditionalGeneration(tiny_config(SiglipVisionConfig, **settings))
    assert [len(image) for image in dense.get_image_features(torch.zeros(1, 3, 56, 56)).pooler_output] == [16]
    with pytest.raises(ValueError, match=r"vision_config.model_type must be clip_vision_model"):
        dense.set_vispruner_config(method="vispruner", visual_token_num=4)
    assert dense.config.vispruner_config["method"] == "none"


def test_the_select_strategy_full_is_refused_unless_dense() -> None:
    with pytest.raises(ValueError, match=r"vision_feature_select_strategy must be \"default\" .*, got 'full'"):
        VisPrunerLlavaForConditionalGeneration(tiny_config(vision_feature_select_strategy="full"))
    settings = {"vision_feature_select_strategy": "full", "vispruner_config": {"method": "none"}}
    dense = VisPrunerLlavaForConditionalGeneration(tiny_config(**settings))
    assert [len(image) for image in dense.get_image_features(torch.zeros(1, 3, 56, 56)).pooler_output] == [17]


def test_several_feature_layers_are_concatenated() -> None:
    torch.manual_seed(0)
    model = VisPrunerLlavaForConditionalGeneration(tiny_config(vision_feature_layer=[-2, -1])).eval()
    pixels = torch.randn(2, 3, 56, 56)
    features = model.get_image_features(pixels)
    model.set_vispruner_config(method="none")
    dense = model.get_image_features(pixels).pooler_output
    for image, kept, full in zip(features.pooler_output, features.kept_indices, dense, strict=True):
        torch.testing.assert_close(image, full[kept])


@pytest.mark.parametrize("layer", [2, -3, 100])
def test_an_attention_layer_that_the_tower_lacks_is_refused(layer: int) -> None:
    options = {"visual_token_num": 4, "attention_layer": layer}
    with pytest.raises(ValueError, match=rf"attention_layer must be an encoder layer index in \[-2, 1\], got {layer}"):
        VisPrunerLlavaForConditionalGeneration(tiny_config(vispruner_config=options))
    model = VisPrunerLlavaForConditionalGeneration(tiny_config())
    with pytest.raises(ValueError, match=r"attention_layer must be an encoder layer index"):
        model.set_vispruner_config(attention_layer=layer)
    assert model.config.vispruner_config["attention_layer"] is None


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    message = r"vispruner_config.method 'vispruned' is not a method: did you mean vispruner\?"
    with pytest.raises(ValueError, match=message):
        VisPrunerLlavaForConditionalGeneration(
            tiny_config(vispruner_config={"method": "vispruned", "visual_token_num": 4})
        )
    model = VisPrunerLlavaForConditionalGeneration(tiny_config())
    with pytest.raises(ValueError, match=message):
        model.set_vispruner_config(method="vispruned")
    assert model.config.vispruner_config["method"] == "vispruner"


def test_parts_lose_what_leads_to_code_and_keep_everything_else() -> None:
    parts = {"vision_config": {"hidden_size": 48, "auto_map": {"AutoModel": "other.Model"}}, "id2label": {0: "cat"}}
    config = VisPrunerLlavaConfig.from_dict({**parts, "auto_map": {"AutoConfig": "own.Config"}})
    assert not hasattr(config.vision_config, "auto_map") and config.vision_config.hidden_size == 48
    assert config.id2label == {0: "cat"} and config.auto_map == {"AutoConfig": "own.Config"}
    with pytest.raises(ValueError, match="attn_implementation names code of a Hub repo, 'owner/kernel'"):
        VisPrunerLlavaConfig.from_dict({"text_config": {"attn_implementation": "owner/kernel"}})
