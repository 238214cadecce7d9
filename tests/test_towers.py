"""LLaVA on other towers with [CLS] than CLIP's: DINOv2, with registers and without, and ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import ASK, HELLO, Model, answers, dropped_columns, logits, pair, reference_of, require_the_reference
from rows import Image
from rows.llava import PATCHES, LlavaRow
from transformers import (
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PixtralVisionConfig,
    SiglipVisionConfig,
    ViTConfig,
)

import vispruner
from vispruner.choosing import watch_choices
from vispruner.conversion.published_layout import model_layout
from vispruner.selectors import ENCODER_METHODS, SELECTORS

REGISTERS = 3
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
    "layerscale_value": 1.0,
}
VIT = {name: value for name, value in SIZES.items() if name != "layerscale_value"}
TOWERS = {
    "dinov2": Dinov2Config(**SIZES, mlp_ratio=2),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=REGISTERS),
    "vit": ViTConfig(**VIT, intermediate_size=64),
}
PROMPT = [HELLO, Image((112, 112), seed=1), ASK]
BATCH = [PROMPT, [HELLO, Image((112, 112), seed=2), [18], Image((112, 112), seed=3), ASK], [[*HELLO, *ASK]]]


class TowerRow(LlavaRow):
    """LLaVA's row with another tower."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        self.registers = int(getattr(tower, "num_register_tokens", 0))

    def vision_config(self) -> Any:
        return self.tower


@pytest.fixture(scope="module", params=TOWERS)
def model(request: pytest.FixtureRequest) -> Model:
    row = TowerRow(TOWERS[request.param])
    stock, pruned = pair(row)
    for one in (stock, pruned):
        one.set_attn_implementation("eager")
    return Model(row, Path(), stock, pruned)


@pytest.mark.parametrize("prompt", BATCH[:2])
def test_answers_and_logits_are_those_of_the_stock_model_on_what_stays(model: Model, prompt: list) -> None:
    require_the_reference(model, prompt)


def test_kept_tokens_are_patches_and_registers_are_never_ranked(model: Model) -> None:
    seen: list[Any] = []
    with watch_choices(seen.append):
        features = model.pruned.model.encode_prompt(**model.prompt(*BATCH))["image"]
    assert [tuple(choice.tokens.saliency.shape) for choice in seen] == [(3, PATCHES)]
    registers = model.row.registers
    assert features.full_counts == [registers + PATCHES] * 3
    for kept, places in zip(features.kept_indices, features.placeholders, strict=True):
        assert len(kept) == 9 and int(kept.min()) >= 0 and int(kept.max()) < PATCHES
        assert torch.equal(places, registers + kept)


def test_rows_of_a_batch_answer_as_they_do_alone(model: Model) -> None:
    together = answers(model.pruned, model.prompt(*BATCH))
    for row, prompt in enumerate(BATCH):
        assert torch.equal(together[row], answers(model.pruned, model.prompt(prompt))[0])


def test_nothing_pruned_is_the_stock_model(model: Model) -> None:
    inputs = model.prompt(PROMPT)
    for change in ({"method": "none"}, {"visual_token_num": PATCHES}):
        dense = model.pruned(**inputs, vispruner_config=change).logits
        torch.testing.assert_close(dense, model.stock(**inputs).logits)
        made = model.pruned.generate(**inputs, max_new_tokens=3, do_sample=False, vispruner_config=change)
        assert torch.equal(made, model.stock.generate(**inputs, max_new_tokens=3, do_sample=False))
    assert model.pruned.last_pruning.kept_counts == (model.row.registers + PATCHES,)


def test_original_positions_are_those_of_patches_behind_the_registers(model: Model) -> None:
    inputs = model.prompt(PROMPT)
    _, stays = reference_of(model, inputs)
    found = model.pruned(**inputs, vispruner_config={"position_policy": "original"}).logits[0, -1]
    full = {**inputs, "attention_mask": inputs["attention_mask"].masked_fill(dropped_columns(inputs, stays), 0)}
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    expected = model.stock(**full, position_ids=positions).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tower", "before"),
    [
        (CLIPVisionConfig(**VIT, intermediate_size=64), 1),
        (TOWERS["dinov2"], 1),
        (TOWERS["dinov2_with_registers"], 1 + REGISTERS),
        (SiglipVisionConfig(**VIT, intermediate_size=64), 0),
    ],
    ids=lambda given: getattr(given, "model_type", str(given)),
)
def test_a_dense_model_that_keeps_cls_says_so(tower: Any, before: int) -> None:
    """[CLS] is token 0 of the prompt's, so that patch 0 is another; a tower without [CLS] has none to keep."""
    row = TowerRow(tower)
    row.registers = before
    stock, dense = pair(row, {"vision_feature_select_strategy": "full"}, method="none")
    inputs = Model(row, Path(), stock, dense).prompt(PROMPT)
    assert torch.equal(logits(dense, inputs), logits(stock, inputs))
    assert dense.visual_token_counts(inputs["pixel_values"]) == ([before + PATCHES], [before + PATCHES])
    features = dense.model.encode_prompt(**inputs)["image"]
    assert features.kept_indices[0].tolist() == [-1] * before + list(range(PATCHES))


@pytest.mark.parametrize(("stored", "asked", "before"), [("default", "full", 1), ("full", "default", 0)])
def test_a_call_may_keep_cls_or_not(stored: str, asked: str, before: int) -> None:
    _, dense = pair(LlavaRow(), {"vision_feature_select_strategy": stored}, method="none")
    pixels = torch.randn(2, 3, 112, 112)
    assert dense.visual_token_counts(pixels, vision_feature_select_strategy=asked) == ([before + PATCHES] * 2,) * 2
    features = dense.model.get_image_features(pixels, vision_feature_select_strategy=asked)
    assert [kept.tolist() for kept in features.kept_indices] == [[-1] * before + list(range(PATCHES))] * 2


def test_pictures_that_a_dense_model_encodes_in_their_own_size_are_numbered_from_0() -> None:
    row = TowerRow(PixtralVisionConfig(**VIT, intermediate_size=64))
    _, dense = pair(row, {"vision_feature_layer": -1}, method="none")
    features = dense.model.get_image_features(
        torch.randn(2, 3, 112, 112),
        vision_feature_select_strategy="full",
        image_sizes=torch.tensor([[112, 112], [56, 84]]),
    )
    assert [kept.tolist() for kept in features.kept_indices] == [list(range(64)), list(range(4 * 6))]


@pytest.mark.parametrize("method", sorted(set(ENCODER_METHODS) - {"codebook"}))
def test_every_method_gets_what_it_needs_of_the_patches(model: Model, method: str) -> None:
    seen: list[Any] = []
    with watch_choices(seen.append):
        model.pruned(**model.prompt(PROMPT), vispruner_config={"method": method, "seed": 0})
    (choice,) = seen
    assert choice.selection.indices.shape == (1, 9) and int(choice.selection.indices.max()) < PATCHES
    for name, given in choice.tokens.further.items():
        if name not in ("text", "text_saliency", "cls_feature", "cls_query"):
            assert given.shape[1] == PATCHES + (name == "raw_keys")
    if (layers := SELECTORS[method].saliency_layers) is not None:
        assert choice.tokens.layer_saliency.shape[1:] == (len(layers(3, 1)), PATCHES)


def test_a_checkpoint_is_read_and_saved(model: Model, tmp_path: Path) -> None:
    model.stock.save_pretrained(tmp_path / "base")
    pruned = vispruner.load(tmp_path / "base", visual_token_num=9)
    inputs = model.prompt(PROMPT)
    expected = logits(model.pruned, inputs)
    torch.testing.assert_close(logits(pruned, inputs), expected, rtol=1e-4, atol=1e-4)
    pruned.save_pretrained(tmp_path / "saved")
    again = vispruner.load(tmp_path / "saved")
    torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tower", ["dinov2", "dinov2_with_registers"])
def test_a_repo_has_the_names_that_all_versions_read(tower: str) -> None:
    """Newer transformers call DINOv2's projections otherwise; a base may have either name, and becomes the older."""
    config = pair(TowerRow(TOWERS[tower]))[1].config.to_dict()
    layout = model_layout("llava", config)
    queries = [name for name in layout.shapes if ".vision_tower." in name and ".query.weight" in name]
    assert len(queries) == 3 and all(name.endswith(".attention.attention.query.weight") for name in queries)
    assert not any("_proj." in name for name in layout.shapes if ".vision_tower." in name)
    for name in (*layout.shapes, *layout.loaded.values()):
        (published,) = layout.published_names([name]).values()
        assert published in layout.shapes


def test_layers_that_nothing_is_read_from_are_left_out(model: Model, tmp_path: Path) -> None:
    model.stock.save_pretrained(tmp_path / "base")
    whole = vispruner.load(tmp_path / "base", visual_token_num=9)
    shorter = vispruner.load(tmp_path / "base", visual_token_num=9, drop_unused_vision_layers=True)
    assert (len(whole.model.vision_attentions), len(shorter.model.vision_attentions)) == (3, 2)
    inputs = model.prompt(PROMPT)
    assert torch.equal(logits(shorter, inputs), logits(whole, inputs))
    shorter.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(vispruner.load(tmp_path / "saved"), inputs), logits(whole, inputs))


def test_gradients_reach_the_projector_and_the_tower(model: Model) -> None:
    inputs = model.prompt(PROMPT)
    model.pruned(**inputs, labels=inputs["input_ids"]).loss.backward()
    of = {name: parameter.grad for name, parameter in model.pruned.named_parameters()}
    assert any(grad is not None and bool(grad.any()) for name, grad in of.items() if "multi_modal_projector" in name)
    assert any(grad is not None and bool(grad.any()) for name, grad in of.items() if "vision_tower" in name)
    model.pruned.zero_grad()


@pytest.mark.parametrize("config_class", [SiglipVisionConfig, DeiTConfig])  # the second has a [CLS] token
def test_any_other_tower_is_refused(config_class: type) -> None:
    tower, name = config_class(**VIT, intermediate_size=64), config_class.model_type
    with pytest.raises(ValueError, match=rf"or vit, got '{name}': .* token, which is read of these alone"):
        pair(LlavaRow(), {"vision_config": tower})


@pytest.mark.parametrize(("name", "size"), [("image_size", [112, 112]), ("patch_size", [14, 14])])
def test_sizes_that_are_no_number_are_refused(name: str, size: list[int]) -> None:
    tower = Dinov2Config(**{**SIZES, name: size}, mlp_ratio=2)
    with pytest.raises(ValueError, match=f"vision_config.{name} must be one number"):
        pair(TowerRow(tower))


def test_llava_next_refuses_registers() -> None:
    from rows.llava_next import ROW

    with pytest.raises(ValueError, match="num_register_tokens must be 0: LLaVA-NeXT packs"):
        pair(ROW, {"vision_config": TOWERS["dinov2_with_registers"]})
