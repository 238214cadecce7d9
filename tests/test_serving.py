"""Serving, as far as it needs no engine: the plugin's registration, what a launch means, the processor for engines."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec
from itertools import groupby
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bases import write_yaml
from documents import PAGES
from matrix import ROWS, Model, pair
from PIL import Image
from rows import Image as DrawnImage
from rows import Row
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vispruner import ARCHITECTURES, VisPrunerOptions, serving
from vispruner.choosing import choose
from vispruner.configuration_vispruner import merge_vispruner_config
from vispruner.conversion.build import BuildError, build_repo
from vispruner.conversion.repo_config import RepoConfigError
from vispruner.conversion.verify import verify_repo
from vispruner.engine_interface import ENGINE_ATTENTION, ENGINE_PROCESSORS, require_servable
from vispruner.selectors import ENCODER_METHODS, SELECTORS
from vispruner.serving.kept_counts import Picture, kept_count
from vispruner.serving.launch_options import (
    ENCODERS,
    Readings,
    merged_options,
    readings,
    require_known_overrides,
)
from vispruner.serving.request_budgets import RequestBudgets, as_numbers, from_numbers, of_request
from vispruner.serving.vllm_plugin import MODELS, register
from vispruner.visual_attention import Reading
from vispruner.visual_features import VisualTokens

ROOT = Path(__file__).parent.parent
SERVING = Path(serving.__file__).parent


# The vLLM plugin


@pytest.fixture
def vllm_registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stands in for vLLM, of which the plugin needs the registry; what was registered, by architecture."""
    registered: dict[str, str] = {}

    def register_model(architecture: str, place: str) -> None:
        assert architecture not in registered, "registered twice"
        registered[architecture] = place

    vllm = ModuleType("vllm")
    vllm.__spec__ = ModuleSpec("vllm", None)
    vllm.ModelRegistry = SimpleNamespace(  # type: ignore[attr-defined]
        register_model=register_model, get_supported_archs=lambda: registered.keys()
    )
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return registered


TEXT_FREE = [name for name in ENCODER_METHODS if not SELECTORS[name].is_guided]


@pytest.mark.parametrize("method", [name for name in TEXT_FREE if SELECTORS[name].needs <= {"projected"}])
def test_choosing_needs_no_more_than_the_plugin_has(method: str) -> None:
    """`PrunedVision` of the plugin has the options and a projector, and is no pruned model."""
    options = VisPrunerOptions(visual_token_num=4, method=method, seed=1)
    tokens = VisualTokens(torch.randn(2, 9, 8), torch.rand(2, 9), grid=(3, 3))
    assert choose(options, tokens, 4, project=lambda features: features).indices.shape == (2, 4)


def test_the_plugin_registers_every_served_architecture_once_and_lazily(vllm_registry: dict[str, str]) -> None:
    register()
    register()
    assert vllm_registry == MODELS
    assert not {place.split(":")[0] for place in MODELS.values()} & set(sys.modules)


def test_what_is_registered_exists_and_is_an_architecture_of_the_package() -> None:
    assert set(MODELS) == {ARCHITECTURES[name].model_class.__name__ for name in ENCODERS}
    for place in MODELS.values():
        module, name = place.split(":")
        source = (SERVING / f"{module.removeprefix('vispruner.serving.')}.py").read_text(encoding="utf-8")
        assert name in {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def test_without_vllm_the_plugin_is_silent_and_imports_neither_vllm_nor_torch() -> None:
    program = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'vllm' else find(name, *rest)\n"
        "from vispruner.serving.vllm_plugin import register; register()\n"
        "assert not {'vllm', 'torch'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_vllm_finds_the_plugin_by_an_entry_point_and_tests_do_not_install_vllm() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    entry_point = '[project.entry-points."vllm.general_plugins"]\nvispruner = "vispruner.serving.vllm_plugin:register"'
    assert entry_point in project
    assert re.findall(r"^.*vllm[<>=].*$", project, re.MULTILINE) == ['vllm = ["vllm>=0.32,<0.34"]']


# What a launch means


@pytest.fixture(scope="module")
def llava_config(tiny_llava_repo: Path) -> Any:
    return AutoConfig.from_pretrained(tiny_llava_repo)


@pytest.fixture(scope="module")
def llava_next_config(tiny_llava_next_repo: Path) -> Any:
    return AutoConfig.from_pretrained(tiny_llava_next_repo)


@pytest.mark.parametrize(
    ("stored", "given", "kept"),
    [
        ({"visual_token_num": 18}, None, 18),
        (None, {"visual_token_num": 36}, 36),
        ({"visual_token_num": 18, "important_ratio": 0.7}, {"visual_token_num": 9}, 9),
        ({"visual_token_num": 18}, {"keep_ratio": 0.25}, 16),
        ({"keep_ratio": 0.25}, {"visual_token_num": 7}, 7),
        ({"visual_token_num": 18}, {"visual_token_num": 1000}, 64),
        ({"visual_token_num": 18}, {"method": "none"}, 64),
    ],
)
def test_a_launch_changes_the_budget_and_nothing_else_of_the_repo(
    llava_config: Any, stored: dict | None, given: dict | None, kept: int
) -> None:
    options = merged_options(llava_config, stored, given)
    assert options.budget(64) == kept
    assert options.important_ratio == (stored or {}).get("important_ratio", 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual_token_num": None}, "needs a budget"),
        ({"visual_tokens": 3}, "unknown fields"),
        ({"method": "bogus"}, "method must be one of"),
        ({"position_policy": "original"}, 'position_policy "original" cannot be served'),
        ({"encoder_stage": {"layer": 0, "keep_ratio": 0.5}}, "encoder_stage is not served: .*set it to null"),
        ({"encoder_stage": {"pixel_tolerance": 0}}, "encoder_stage is not served: .*set it to null"),
        ({"attention_layer": 3}, "from the first 3 encoder layers, not from 3"),
        ({"attention_layer": -1}, "from the first 3 encoder layers, not from -1"),
        ({"attention_layer": -5}, "from the first 3 encoder layers, not from -5"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(llava_config: Any, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merged_options(llava_config, {"visual_token_num": 8}, changes)


def test_a_stock_checkpoint_without_a_budget_is_refused_with_the_remedy(llava_config: Any) -> None:
    with pytest.raises(ValueError, match="--hf-overrides"):
        merged_options(llava_config, None, None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy"),
        ("vision_feature_layer", [-2, -1], "vision_feature_layer must be one layer"),
        ("vision_feature_layer", 0, "vision_feature_layer 0"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_refused(tiny_llava_repo: Path, field: str, value: Any, message: str) -> None:
    config = AutoConfig.from_pretrained(tiny_llava_repo)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        merged_options(config, {"visual_token_num": 8}, None)


@pytest.mark.parametrize(("given", "layer"), [(None, 2), (-2, 2), (-4, 0), (1, 1)])
def test_the_layer_that_ranks_is_the_models(llava_config: Any, given: int | None, layer: int) -> None:
    options = merged_options(llava_config, {"visual_token_num": 8, "attention_layer": given}, None)
    assert readings(llava_config, options) == Readings(Reading(layer, "cls"), (), {})


@pytest.fixture(scope="module", params=sorted(ENCODERS))
def served(request: pytest.FixtureRequest) -> tuple[Row, Any]:
    """A row of the matrix, and its model as vLLM can serve it."""
    tiles = {"tile_mode": "paper"} if request.param == "llava_next" else {}
    return ROWS[request.param], pair(ROWS[request.param], **tiles)[1]


def test_every_method_reads_what_the_model_reads_or_is_refused_by_name(served: tuple[Row, Any]) -> None:
    """Refused is what the model itself refuses, and [CLS] of a last layer that vLLM does not build."""
    row, model = served
    read = []
    for method in ENCODER_METHODS:
        given = {"method": method, "visual_token_num": 4, "seed": 0, "codebook": "./a.safetensors"}
        try:
            options = merged_options(row.config(), None, given)
        except ValueError as error:
            if SELECTORS[method].is_guided:
                assert "chooses by the question, but an engine" in str(error)
                continue
            assert f'vispruner_config.method "{method}" needs' in str(error)
            if method not in ("prumerge", "prumerge_plus"):
                with pytest.raises(ValueError, match="needs"):
                    model.set_vispruner_config(method=method, seed=0)
            continue
        model.config.vispruner_config = {**model.config.vispruner_config, "method": method, "seed": 0}
        tap = model.model.open_tap()
        main = tap._main if SELECTORS[method].by_saliency else None  # which an engine does not read for nothing
        assert readings(row.config(), options) == Readings(main, tuple(tap._others), tap._further)
        read.append(method)
    assert {"vispruner", "divprune", "scope", "visionzip", "hiprune", "codebook"} <= set(read)


def test_the_page_names_the_methods_that_read_no_attention() -> None:
    config = ROWS["qwen2_5_vl"].config()
    options = {"visual_token_num": 4, "seed": 0, "codebook": "./a.safetensors"}
    silent = set()
    for method in TEXT_FREE:
        with suppress(ValueError):  # which are refused
            if not readings(config, merged_options(config, None, {**options, "method": method})).all:
                silent.add(method)
    (sentence,) = re.findall(r"unless the method reads\s+no attention \((.*?)\)", PAGES["serve.md"], re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == silent


@pytest.mark.parametrize("budget", [{"visual_token_num": 3}, {"keep_ratio": 0.3}, {"visual_token_num": 1000}])
def test_the_front_end_counts_what_the_model_returns(served: tuple[Row, Any], budget: dict) -> None:
    """By the placeholders of a full prompt, run by run, and the size of the picture."""
    row, model = served
    config, options = row.config(), merged_options(row.config(), None, budget)
    model.config.vispruner_config = merge_vispruner_config(model.config.vispruner_config, {**budget, "method": "mmr"})
    for seed, size in enumerate([(56, 84), (84, 56), (112, 112), (300, 40), (28, 28)]):
        inputs = row.inputs([[[11], DrawnImage(size, seed), [12]]])
        full, kept = model.model.count_visual_tokens(inputs)
        (token,) = [token for token, counts in full.items() if counts]
        runs = [len(list(run)) for key, run in groupby(inputs["input_ids"][0].tolist()) if key == token]
        assert sum(kept_count(config, options, run, Picture(*size)) for run in runs) == sum(kept[token])


def test_native_tiles_are_refused(llava_next_config: Any) -> None:
    with pytest.raises(ValueError, match='tile_mode must be "paper"'):
        merged_options(llava_next_config, {"visual_token_num": 4, "tile_mode": "native"}, None)


@pytest.mark.parametrize("model", ["llava_next-paper"], indirect=True)
def test_an_image_of_tiles_takes_what_the_model_returns(model: Model) -> None:
    config = model.pruned.config
    options = merged_options(config, config.vispruner_config, None)
    for size in ((56, 84), (112, 56), (300, 40), (40, 300)):
        inputs = model.prompt([[11], DrawnImage(size), [12]])
        _, kept = model.pruned.visual_token_counts(inputs["pixel_values"], inputs["image_sizes"])
        assert [kept_count(config, options, 0, Picture(*size))] == kept


@pytest.mark.parametrize(
    ("architecture", "given", "message"),
    [
        ("qwen2_5_vl", {"position_policy": "renumber"}, 'position_policy "renumber" cannot be served'),
        ("qwen2_5_vl", {"attention_layer": 0}, r"attention_layer must be one of \[1\], which attend over"),
        ("internvl", {"stage_token_nums": [4]}, "stage_token_nums is not served"),
        ("llava_onevision", {"position_policy": "original"}, 'position_policy "original" cannot be served'),
        ("gemma3", {"method": "fastv"}, "prunes in the language model"),
        ("paligemma", {}, "model_type must be one of .* to be served pruned, got 'paligemma'"),
        ("video_llava", {}, "got 'video_llava'"),
    ],
)
def test_what_an_architecture_cannot_have_served_is_refused_by_name(
    architecture: str, given: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merged_options(ROWS[architecture].config(), {"visual_token_num": 4}, given)


def test_an_internvl_whose_features_are_not_the_last_is_refused() -> None:
    config = ROWS["internvl"].config()
    config.vision_feature_layer = -2
    with pytest.raises(ValueError, match="vision_feature_layer must be -1, got -2"):
        merged_options(config, {"visual_token_num": 4}, None)


def test_a_processor_that_writes_parts_of_tiles_is_refused() -> None:
    options = VisPrunerOptions(visual_token_num=4)
    with pytest.raises(ValueError, match=r"set image_seq_length in processor_config\.json to 16"):
        kept_count(ROWS["internvl"].config(), options, 24, Picture(32, 32))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"visual_token_num": 64}, "visual_token_num is a field of vispruner_config, --hf-overrides '"),
        ({"vispruner_confg": {}}, "vispruner_confg is unknown: there are vispruner_config and vispruner_serving"),
    ],
)
def test_overrides_that_nobody_would_read_are_refused(overrides: dict, message: str) -> None:
    known = {"architectures": ["A"], "vispruner_config": {}, "vispruner_serving": {}}
    require_known_overrides(known)
    with pytest.raises(ValueError, match=message):
        require_known_overrides({**known, **overrides})


# What a request may ask for

LAUNCHED = VisPrunerOptions(visual_token_num=64)
NAMED = {"low": {"visual_token_num": 16}, "high": {"keep_ratio": 0.1}}
ALLOWED = {"maximum": {"visual_token_num": 256}, "detail": NAMED, "keywords": ["do_pan_and_scan"]}


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({}, 64),
        ({"visual_token_num": 16}, 16),
        ({"keep_ratio": 0.25}, 144),
        ({"visual_token_num": 256}, 256),
        ({"detail": "low"}, 16),
        ({"detail": "high"}, 58),
        ({"do_pan_and_scan": True}, 64),
        ({"visual_token_num": None, "keep_ratio": None, "detail": None}, 64),
        ({"visual_token_num": None, "detail": "low"}, 16),
    ],
)
def test_a_request_has_the_budget_it_asks_for(asked: dict, kept: int) -> None:
    budgets = RequestBudgets.of_launch(LAUNCHED, ALLOWED)
    options = budgets.asked(asked)
    assert options.budget(576) == kept
    assert budgets.asked(of_request(options)).budget(576) == kept
    assert from_numbers(LAUNCHED, as_numbers(options)) == options
    budgets.require_within(options, kept, budgets.maximum.budget(576))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"visual_token_num": 0}, r"^mm_processor_kwargs\.visual_token_num must be an integer >= 1, got 0$"),
        ({"visual_token_num": True}, "visual_token_num must be an integer >= 1, got True"),
        ({"keep_ratio": "0.5"}, r"keep_ratio must be a number in \(0, 1\]"),
        ({"keep_ratio": float("nan")}, r"keep_ratio must be a number in \(0, 1\]"),
        ({"visual_token_num": 4, "keep_ratio": 0.5}, "are both set"),
        ({"detail": "auto"}, r"detail must be one of \['high', 'low'\], got 'auto'"),
        ({"detail": ["low"]}, "detail must be one of"),
        ({"detail": "low", "visual_token_num": 4}, "give one of"),
        ({"visual_tokens": 4}, "takes visual_token_num, keep_ratio, detail, do_pan_and_scan of a request, got v"),
        ({"visual_token_num": 4, "crop_size": 28}, r"got crop_size: .* in vispruner_serving\.keywords"),
    ],
)
def test_a_request_that_asks_for_no_budget_is_told_so(asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RequestBudgets.of_launch(LAUNCHED, ALLOWED).asked(asked)


def test_no_picture_keeps_more_than_the_operator_allows() -> None:
    budgets = RequestBudgets.of_launch(LAUNCHED, None)
    options = budgets.asked({"keep_ratio": 0.5})
    budgets.require_within(options, options.budget(128), budgets.maximum.budget(128))
    with pytest.raises(ValueError, match=r"288 visual tokens of a picture \(keep_ratio 0\.5\), .* at most 64"):
        budgets.require_within(options, options.budget(576), budgets.maximum.budget(576))


@pytest.mark.parametrize("asked", [{}, {"detail": "low"}])
def test_what_the_operator_named_is_served_of_pictures_of_which_the_maximum_is_less(asked: dict) -> None:
    """A part of a small picture may be fewer tokens than a count."""
    block = {"maximum": {"keep_ratio": 0.5}, "detail": {"low": {"visual_token_num": 16}}}
    budgets = RequestBudgets.of_launch(LAUNCHED, block)
    options = budgets.asked(asked)
    budgets.require_within(options, options.budget(20), budgets.maximum.budget(20))
    other = budgets.asked({"visual_token_num": 15})
    with pytest.raises(ValueError, match=r"asks for 15 visual tokens .* at most 10"):
        budgets.require_within(other, other.budget(20), budgets.maximum.budget(20))


def test_a_budget_that_no_float_holds_is_one_all_the_same() -> None:
    options = VisPrunerOptions(visual_token_num=10**400)
    assert from_numbers(LAUNCHED, as_numbers(options)).budget(10**6) == options.budget(10**6)


def test_a_server_that_names_no_budgets_says_where_to() -> None:
    with pytest.raises(ValueError, match=r"detail must be named at the start, in vispruner_serving\.detail, got"):
        RequestBudgets.of_launch(LAUNCHED, None).asked({"detail": "low"})


def test_a_server_that_prunes_nothing_takes_no_budget() -> None:
    budgets = RequestBudgets.of_launch(VisPrunerOptions(method="none"), None)
    assert budgets.asked({"do_pan_and_scan": True}) == budgets.default
    with pytest.raises(ValueError, match="this server prunes nothing"):
        budgets.asked({"visual_token_num": 4})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([], r"vispruner_serving must be a dict of maximum, detail, keywords, got \[\]"),
        ({"max": {}}, r"vispruner_serving must be a dict of maximum, detail, keywords, got \['max'\]"),
        ({"maximum": 64}, "vispruner_serving.maximum must be a budget"),
        ({"maximum": {"visual_token_num": 0}}, r"^vispruner_serving\.maximum\.visual_token_num must be .*, got 0$"),
        ({"keywords": "max_pixels"}, "vispruner_serving.keywords must be a list of names, got 'max_pixels'"),
        ({"maximum": {"visual_token_num": 63}}, "maximum must not be less than the budget of 'vispruner_config'"),
        ({"detail": {"high": {"visual_token_num": 65}}}, "maximum must not be less than the budget of 'high'"),
        ({"detail": ["low"]}, "vispruner_serving.detail must be a dict"),
        ({"detail": {"low": {"method": "mmr"}}}, "vispruner_serving.detail.low must be a budget"),
    ],
)
def test_a_launch_that_allows_what_makes_no_sense_is_refused(block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RequestBudgets.of_launch(LAUNCHED, block)


# Without the plugin: the repo's own processor and code

ONE = "USER: <image>\nWhat is this? ASSISTANT:"
TWO = "USER: <image> and <image>\nDo these two pictures differ? ASSISTANT:"


@pytest.fixture(scope="module")
def pictures(photo: Image.Image) -> list[Image.Image]:
    return [photo, photo.transpose(Image.Transpose.ROTATE_90), photo.crop((60, 40, 260, 240))]


@pytest.fixture(scope="module", params=sorted(ENGINE_PROCESSORS))
def engine_repo(
    request: pytest.FixtureRequest,
    tiny_llava_repo: Path,
    tiny_llava_next_repo: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    base = {"llava": tiny_llava_repo, "llava_next": tiny_llava_next_repo}[request.param]
    folder = tmp_path_factory.mktemp("engine")
    config = {"visual_token_num": 5}
    yaml = write_yaml(folder, architecture=request.param, vispruner_config=config, engine_processor=True)
    return build_repo(yaml, folder / "repo", base=base, show_progress=False)


@pytest.mark.core
def test_the_option_adds_one_entry_to_the_processor_files(engine_repo: Path, tmp_path: Path) -> None:
    architecture = json.loads((engine_repo / "config.json").read_text())["model_type"]
    config = json.loads((engine_repo / "processor_config.json").read_text())
    entry = config.pop("auto_map")
    assert entry == {"AutoProcessor": f"engine_interface.{ENGINE_PROCESSORS[architecture].__name__}"}
    stock = next(
        kind for kind in ENGINE_PROCESSORS[architecture].__mro__ if kind.__module__.startswith("transformers.")
    )
    assert config["processor_class"] == stock.__name__
    assert verify_repo(engine_repo).passed


def test_the_option_is_true_or_false(tmp_path: Path, tiny_llava_repo: Path) -> None:
    with pytest.raises(RepoConfigError, match="engine_processor must be true or false"):
        build_repo(write_yaml(tmp_path, engine_processor="yes"), tmp_path / "out", base=tiny_llava_repo)


def test_a_base_without_processor_config_cannot_have_it(
    tmp_path: Path, tiny_llava_repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vispruner.conversion.build.PROCESSOR_FILES", ("tokenizer.json", "tokenizer_config.json"))
    with pytest.raises(BuildError, match=r"no processor_config\.json"):
        build_repo(write_yaml(tmp_path), tmp_path / "out", base=tiny_llava_repo, engine_processor=True)
    assert not (tmp_path / "out").exists()


def test_without_remote_code_the_processor_is_the_stock_one(engine_repo: Path) -> None:
    processor = AutoProcessor.from_pretrained(engine_repo, trust_remote_code=False)
    assert type(processor).__module__.startswith("transformers.")


def test_for_everyone_but_an_engine_it_is_the_stock_processor(engine_repo: Path, pictures: list[Image.Image]) -> None:
    ours = AutoProcessor.from_pretrained(engine_repo, trust_remote_code=True)
    stock = AutoProcessor.from_pretrained(engine_repo, trust_remote_code=False)
    for text, images in ((ONE, pictures[:1]), (TWO, pictures[1:]), ("no picture", None)):
        found, expected = (p(images=images, text=text, return_tensors="pt") for p in (ours, stock))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_engine_is_told_as_many_tokens_as_the_model_returns(engine_repo: Path, pictures: list[Image.Image]) -> None:
    processor = AutoProcessor.from_pretrained(engine_repo, trust_remote_code=True)
    model = AutoModel.from_pretrained(engine_repo, trust_remote_code=True)
    inputs = processor(images=pictures[:2], text=TWO, return_text_replacement_offsets=True, return_tensors="pt")
    sizes = {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
    returned = [len(image) for image in model.encode_images(inputs["pixel_values"], **sizes).tokens]
    told = [entry["replacement"].count("<image>") for entry in inputs["text_replacement_offsets"][0]]
    counted = processor._get_num_multimodal_tokens(image_sizes=[(p.height, p.width) for p in pictures[:2]])
    assert told == counted["num_image_tokens"] == returned
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == sum(returned)


def test_a_processor_saved_alone_serves_everyone_but_engines(
    engine_repo: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    AutoProcessor.from_pretrained(engine_repo, trust_remote_code=True).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert "input_ids" in processor(images=pictures[:1], text=ONE)
    with pytest.raises(ValueError, match=r"config\.json has no vispruner_config"):
        processor(images=pictures[:1], text=ONE, return_text_replacement_offsets=True)


def test_native_tiles_are_not_counted_for_an_engine(engine_repo: Path) -> None:
    processor = AutoProcessor.from_pretrained(engine_repo, trust_remote_code=True)
    processor.vispruner_config = {**processor.vispruner_config, "tile_mode": "native"}
    if hasattr(processor.image_processor, "image_grid_pinpoints"):
        with pytest.raises(ValueError, match='tile_mode must be "paper"'):
            processor._get_num_multimodal_tokens(image_sizes=[(60, 90)])
    else:
        assert processor._get_num_multimodal_tokens(image_sizes=[(60, 90)])["num_image_tokens"] == [5]


@pytest.fixture
def engine_attention() -> Any:
    """Registers an attention function under the name that vLLM's Transformers backend uses."""
    AttentionInterface.register(ENGINE_ATTENTION, ALL_ATTENTION_FUNCTIONS["sdpa"])
    yield
    del ALL_ATTENTION_FUNCTIONS._global_mapping[ENGINE_ATTENTION]


def engine_config(repo: Path) -> Any:
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
    config.get_text_config()._attn_implementation = ENGINE_ATTENTION
    return config


def test_an_engine_gets_the_base_model(engine_repo: Path, engine_attention: None) -> None:
    whole = AutoModel.from_config(AutoConfig.from_pretrained(engine_repo, trust_remote_code=True))
    model = AutoModel.from_config(engine_config(engine_repo), trust_remote_code=True)
    assert type(model).__name__ == type(whole.base_model).__name__
    assert not hasattr(model, "lm_head") and hasattr(whole, "lm_head")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual_token_num": 6}, "not that of the repo's config.json"),
        ({"important_ratio": 0.7}, "not that of the repo's config.json"),
        ({"weights": "thin", "base_model_revision": "abc"}, "thin repo has no weights"),
    ],
)
def test_an_engine_is_refused_what_its_processor_does_not_know(engine_repo: Path, changes: dict, message: str) -> None:
    config = engine_config(engine_repo)
    config.vispruner_config = {**config.vispruner_config, **changes}
    with pytest.raises(ValueError, match=message):
        require_servable(config)


def test_an_engine_is_refused_positions_that_it_cannot_give(engine_repo: Path, tmp_path: Path) -> None:
    repo = Path(shutil.copytree(engine_repo, tmp_path / "repo"))
    content = json.loads((repo / "config.json").read_text())
    content["vispruner_config"].update(position_policy="original", tile_mode="native")
    (repo / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match='position_policy "original" cannot be served'):
        require_servable(engine_config(repo))


def test_an_engine_is_refused_a_repo_whose_processor_counts_all_tokens(engine_repo: Path, tmp_path: Path) -> None:
    repo = Path(shutil.copytree(engine_repo, tmp_path / "repo"))
    content = json.loads((repo / "processor_config.json").read_text())
    del content["auto_map"]
    (repo / "processor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="build it with --engine-processor"):
        require_servable(engine_config(repo))
