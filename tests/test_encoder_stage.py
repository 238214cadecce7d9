"""Patches that leave within the encoder: beside an encoder of full length in which nobody attends to them any more."""

from __future__ import annotations

import copy
import json
import math
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import (
    ASK,
    CLIP,
    HELLO,
    ONE,
    ROWS,
    SEVERAL,
    TOLERANCE,
    Model,
    answers,
    attending_by,
    lent,
    logits,
    made,
)
from rows import Image
from torch import nn

import vispruner
from vispruner.choosing import watch_choices
from vispruner.conversion import cli
from vispruner.conversion.build import build_repo
from vispruner.conversion.repo_config import HUB_CONFIGS
from vispruner.conversion.verify import verify_repo
from vispruner.selectors import ENCODER_METHODS, SELECTORS, select_tokens

AFTER, SHARE, LAYERS = 1, 0.6, 5
STAGE = {"layer": AFTER, "keep_ratio": SHARE}
HINDERED = {"llava_onevision": "interpolated"}
CHANGES = {"llava_next": {"tile_mode": "paper"}}
STAGED = [name for name in ROWS if name not in HINDERED]
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def deep_config(name: str) -> Any:
    """A row's config with enough encoder layers to have some behind the stage."""
    config = ROWS[name].config()
    vision = config.vision_config
    setattr(vision, "depth" if name in GRIDS else "num_hidden_layers", LAYERS)
    if hasattr(vision, "fullatt_block_indexes"):
        vision.fullatt_block_indexes = [1, 3]
    return config


@pytest.fixture(scope="module")
def deep_models() -> dict[str, Model]:
    return {}


def deep(name: str, known: dict[str, Model], folder: Path) -> Model:
    if name not in known:
        options = {**ROWS[name].options, **CHANGES.get(name, {}), "encoder_stage": STAGE}
        known[name] = made(name, folder / "base", deep_config(name), **options)
    return known[name]


@pytest.fixture(params=STAGED)
def model(request: pytest.FixtureRequest, deep_models: dict[str, Model], tmp_path: Path) -> Iterator[Model]:
    yield from lent(deep(request.param, deep_models, tmp_path))


@pytest.fixture
def llava(deep_models: dict[str, Model], tmp_path: Path) -> Iterator[Model]:
    yield from lent(deep("llava", deep_models, tmp_path))


def dense(model: Model) -> Any:
    """A copy of the pruned model without the stage, at the same budget."""
    other = copy.deepcopy(model.pruned)
    other.set_vispruner_config(encoder_stage=None)
    return other


class FullLength:
    """Attention of an encoder of full length: behind layer `after` nobody attends to what left, and all are kept.

    saliency  by layer the mean attention (B, N) that patches get: of [CLS], or of all that did not leave yet
    """

    def __init__(self, model: Any, tokens: Sequence[int]) -> None:
        base = model.model
        self.numbers = {id(attention): number for number, attention in enumerate(base.vision_attentions)}
        self.has_cls, self.tokens = base.has_cls_token, tokens
        self.packed = base.packs_images
        self.after, self.ranks = AFTER, base.saliency_layer(AFTER)
        self.of_layer: dict[int, list[torch.Tensor]] = {}
        self.remain: torch.Tensor | None = None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        number = self.numbers[id(module)]
        weights = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            weights = weights + attention_mask
        lead, here = int(self.has_cls), self.of_layer.setdefault(number, [])
        stays = torch.ones(len(query), key.shape[2] - lead, dtype=torch.bool)
        if number > self.after:
            self.decide()
            first = sum(part.shape[1] for part in here)
            stays = self.remain[:, first : first + stays.shape[1]]
        seen = nn.functional.pad(stays, (lead, 0), value=True)
        weights = weights.masked_fill(~seen[:, None, None], torch.finfo(weights.dtype).min).softmax(-1)
        asking = weights[:, :, :1] if self.has_cls else weights * seen[:, None, :, None]
        rows = asking.mean(1).sum(1) / (1 if self.has_cls else seen.sum(1, keepdim=True).clamp(min=1))
        here.append(rows[:, lead:])
        return (weights @ value).transpose(1, 2), weights

    def saliency(self, layer: int) -> torch.Tensor:
        return torch.cat(self.of_layer[layer], dim=1)

    def decide(self) -> None:
        """Of each image or frame the tokens stay whose patches are attended most on average."""
        if self.remain is not None:
            return
        saliency = self.saliency(self.ranks)
        of_token = self.merged(saliency)
        keep, first = torch.zeros_like(of_token, dtype=torch.bool), 0
        for count in self.tokens:
            stays = math.floor(count * SHARE + 0.5)
            for row in range(len(keep)):
                best = sorted(range(count), key=lambda token, row=row, at=first: -float(of_token[row, at + token]))
                keep[row, [first + token for token in best[:stays]]] = True
            first += count
        self.remain = torch.stack([keep[:, token] for token in self.token_of_patch(saliency.shape[1])], dim=1)

    def remaining_tokens(self) -> torch.Tensor:
        """Which merged tokens remain, (B, tokens)."""
        return self.merged(self.remain) == 1

    def token_of_patch(self, patches: int) -> list[int]:
        block = patches // sum(self.tokens)
        if self.packed:
            return [patch // block for patch in range(patches)]
        side, size = math.isqrt(patches), math.isqrt(block)
        return [p // side // size * (side // size) + p % side // size for p in range(patches)]

    def merged(self, of_patches: torch.Tensor) -> torch.Tensor:
        owners = torch.tensor(self.token_of_patch(of_patches.shape[1]))
        sums = torch.zeros(len(of_patches), sum(self.tokens)).index_add(1, owners, of_patches.float())
        return sums / (of_patches.shape[1] // sum(self.tokens))


def encoded(model: Any, inputs: dict[str, Any], modality: str = "image") -> Any:
    return model.model.encode_prompt(**inputs)[modality]


def choices_in(model: Any, inputs: dict[str, Any]) -> list[Any]:
    seen: list[Any] = []
    with watch_choices(seen.append):
        encoded(model, inputs)
    return seen


def picked(features: torch.Tensor, saliency: torch.Tensor, budget: int) -> torch.Tensor:
    return select_tokens("vispruner", features[None], saliency[None], budget)[0]


@torch.no_grad()
@pytest.mark.parametrize("prompt", [ONE, SEVERAL], ids=["one", "several"])
def test_what_remains_is_chosen_from_as_in_an_encoder_of_full_length(model: Model, prompt: list) -> None:
    """Of images and tiles encoded together: which patches remain, their features, and what the method keeps."""
    if model.pruned.model.packs_images:
        pytest.skip("images of any size are the next test")
    inputs, plain = model.prompt(prompt), dense(model)
    (before,) = choices_in(plain, inputs)
    tokens = before.tokens.saliency.shape[1]
    oracle = FullLength(plain, [tokens])
    (full,) = choices_in(attending_by(oracle, plain), inputs)
    saliency = oracle.merged(oracle.saliency(plain.model.feature_layer))
    (ours,) = choices_in(model.pruned, inputs)
    output = encoded(model.pruned, inputs)
    remaining = math.floor(tokens * SHARE + 0.5)
    for item, remain in enumerate(oracle.remaining_tokens()):
        numbers = remain.nonzero()[:, 0]
        assert len(numbers) == remaining
        assert torch.equal(output.remain[item], remain)
        assert not output.saliency[item][~remain].any()
        features = full.tokens.features[item, numbers]
        torch.testing.assert_close(ours.tokens.features[item], features, **TOLERANCE)
        torch.testing.assert_close(ours.tokens.saliency[item], saliency[item, numbers], **TOLERANCE)
        kept = picked(features, saliency[item, numbers], model.row.options["visual_token_num"])
        assert torch.equal(ours.selection.indices[item], kept)
        if len(output.kept_indices) == len(oracle.remaining_tokens()):  # one run of placeholders for each
            assert torch.equal(output.kept_indices[item], numbers[kept])


@torch.no_grad()
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("modality", ["image", "video"])
def test_blocks_of_images_of_any_size_leave_their_windows(
    deep_models: dict[str, Model], tmp_path: Path, name: str, modality: str
) -> None:
    """Each image and frame keeps its own share, and what is left of a window still attends within it."""
    model = deep(name, deep_models, tmp_path)
    inputs, plain = model.prompt(SEVERAL if modality == "image" else CLIP), dense(model)
    plain.set_vispruner_config(method="none")
    tokens = list(encoded(plain, inputs, modality).full_counts)
    oracle = FullLength(plain, tokens)
    full = encoded(attending_by(oracle, plain), inputs, modality)
    frames = plain.model.frames_of(inputs[f"{modality}_grid_thw"])
    ranked = plain.model.saliency_layer(LAYERS - 1)
    of_frames = zip(
        full.pooler_output,
        oracle.merged(oracle.saliency(ranked))[0].split(tokens),
        oracle.remaining_tokens()[0].split(tokens),
        frames,
        strict=True,
    )
    ours = encoded(model.pruned, inputs, modality)
    for item, (features, scores, stays, grid) in enumerate(of_frames):
        raster = torch.tensor(model.row.order(plain.model.visual, *grid))
        saliency, remain = torch.empty_like(scores), torch.empty_like(stays)
        saliency[raster], remain[raster] = scores, stays
        numbers = remain.nonzero()[:, 0]
        assert torch.equal(ours.remain[item], remain) and len(numbers) == math.floor(len(remain) * SHARE + 0.5)
        kept = numbers[picked(features[numbers], saliency[numbers], math.floor(len(remain) * 0.4 + 0.5))]
        assert torch.equal(ours.kept_indices[item], kept)
        torch.testing.assert_close(ours.pooler_output[item], features[kept], **TOLERANCE)
        for level, whole in zip(ours.deepstack_features or [], full.deepstack_features or [], strict=True):
            torch.testing.assert_close(level[item], whole[item][kept], **TOLERANCE)


def rows_seen(model: Any, inputs: dict[str, Any]) -> list[int]:
    """How many rows each encoder layer was given; of Video-LLaVA the layers of both towers, one after the other."""
    layers, seen = list(model.model.vision_layers), []
    if hasattr(model.model, "video_tower"):
        layers += list(model.model.video_tower.encoder.layers)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0].shape[-2]), with_kwargs=True)
        for layer in layers
    ]
    answers(model, inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_layers_behind_run_on_fewer_rows_and_nothing_is_left_behind(model: Model) -> None:
    inputs = model.prompt(*model.prompts())
    with_stage = rows_seen(model.pruned, inputs)
    without = rows_seen(dense(model), inputs)
    assert len(with_stage) == len(without) and len(with_stage) % LAYERS == 0
    for number, (ours, all_rows) in enumerate(zip(with_stage, without, strict=True)):
        # the hook of the test runs before that which takes rows away
        fewer = number % LAYERS > AFTER + 1
        assert ours < all_rows * 0.75 if fewer else ours == all_rows
    assert not any(layer._forward_pre_hooks for layer in model.pruned.model.vision_layers)


def test_prompts_are_as_long_as_without_and_rows_of_a_batch_answer_as_alone(model: Model) -> None:
    inputs = model.prompt(*model.prompts())
    assert model.counts(inputs) == dense(model).model.count_visual_tokens(inputs)
    together = answers(model.pruned, inputs)
    for row, prompt in enumerate(model.prompts()):
        assert torch.equal(together[row], answers(model.pruned, model.prompt(prompt))[0])


@torch.no_grad()
def test_null_is_what_there_was_before(model: Model) -> None:
    inputs = model.prompt(ONE)
    never = made_without(model)
    model.pruned.set_vispruner_config(encoder_stage=None)
    assert torch.equal(logits(model.pruned, inputs), logits(never, inputs))
    model.pruned.set_vispruner_config(encoder_stage=STAGE)
    assert not torch.equal(logits(model.pruned, inputs), logits(never, inputs))


def made_without(model: Model) -> Any:
    options = {**model.row.options, **CHANGES.get(model.row.model_type, {})}
    return vispruner.load(model.folder, **options, attn_implementation="eager").eval()


OF_PARTS = [
    name
    for name in sorted(ENCODER_METHODS)
    if not {"grid", "codebook"} & (SELECTORS[name].needs | SELECTORS[name].uses)
]


@torch.no_grad()
@pytest.mark.parametrize("method", OF_PARTS)
def test_every_method_chooses_among_what_remains(llava: Model, method: str) -> None:
    llava.pruned.set_vispruner_config(method=method, seed=0)
    features = encoded(llava.pruned, llava.prompt(SEVERAL))
    assert features.remain.sum(1).tolist() == [math.floor(64 * SHARE + 0.5)] * 2
    for number, (kept, remain) in enumerate(zip(features.kept_indices, features.remain, strict=True)):
        assert remain[kept].all() and torch.equal(kept, kept.unique())
        if features.merged_into is not None:
            assert (features.merged_into[number][~remain] == -1).all()
            assert (features.merged_into[number] >= 0).sum() > len(kept)


def test_a_stage_leaves_no_fewer_than_the_budget(llava: Model) -> None:
    llava.pruned.set_vispruner_config(visual_token_num=50)
    features = encoded(llava.pruned, llava.prompt(ONE))
    assert int(features.remain.sum()) == 50 and torch.equal(
        features.kept_indices[0], features.remain[0].nonzero()[:, 0]
    )


def test_a_ratio_as_large_as_the_stage_s_keeps_as_many_as_a_count(llava: Model) -> None:
    inputs = llava.prompt(ONE)
    for options, kept in (({"keep_ratio": 0.8}, 51), ({"visual_token_num": 51}, 51), ({"keep_ratio": 1.0}, 64)):
        answers(llava.pruned, {**inputs, "vispruner_config": options})
        assert llava.pruned.last_pruning.kept_counts == (kept,)
    two_places = {"method": "image_text", "visual_token_num": None, "keep_ratio": 0.5}
    answers(llava.pruned, {**inputs, "vispruner_config": two_places})


def test_a_stage_that_ends_in_another_thread_leaves_a_plain_call_alone(llava: Model) -> None:
    """torch looks up `with_kwargs` when it calls a hook, and the thread that set it may have taken it away by then."""
    inputs, plain = llava.prompt(ONE), {"encoder_stage": None}
    with torch.no_grad():
        expected = answers(llava.pruned, {**inputs, "vispruner_config": plain})
    layer, found, inside, over = llava.pruned.model.vision_layers[AFTER + 2], {}, threading.Event(), threading.Event()
    names = {}

    def wait(module: nn.Module, args: tuple) -> None:
        if threading.current_thread() is names["plain"]:
            inside.set()
            assert over.wait(60)

    def staged() -> None:
        def begin(*of: Any) -> None:
            names["plain"].start()
            assert inside.wait(60)

        hook = llava.pruned.model.vision_layers[AFTER + 3].register_forward_pre_hook(begin)
        answers(llava.pruned, inputs)
        hook.remove()
        over.set()

    def ask() -> None:
        found["plain"] = answers(llava.pruned, {**inputs, "vispruner_config": plain})

    handle = layer.register_forward_pre_hook(wait)
    names["plain"], names["staged"] = threading.Thread(target=ask), threading.Thread(target=staged)
    names["staged"].start()
    names["staged"].join(120)
    names["plain"].join(120)
    handle.remove()
    assert torch.equal(found["plain"], expected)


def test_padding_of_a_tile_leaves_first(deep_models: dict[str, Model], tmp_path: Path) -> None:
    model = deep("idefics3", deep_models, tmp_path)
    inputs = model.prompt(ONE)
    inputs["pixel_attention_mask"][:, 0, 20:] = 0
    features = encoded(model.pruned, inputs)
    seen = inputs["pixel_attention_mask"][0, 0, ::8, ::8].bool().flatten()
    assert 0 < int(seen.sum()) < len(seen)
    left = (~features.remain[0]).sum()
    assert int((~features.remain[0] & ~seen).sum()) == min(int(left), int((~seen).sum()))


@pytest.mark.parametrize("change, named", [
    ({"encoder_stage": {"layer": 1}}, r'encoder_stage must be null, {"layer": k, "keep_ratio": q} or'),
    ({"encoder_stage": 3}, r"encoder_stage must be null, "),
    ({"encoder_stage": {"layer": -1, "keep_ratio": 0.5}}, r"encoder_stage\.layer must be an encoder layer index"),
    ({"encoder_stage": {"layer": True, "keep_ratio": 0.5}}, r"encoder_stage\.layer must be an encoder layer index"),
    ({"encoder_stage": {"layer": 1, "keep_ratio": 1.0}}, r"encoder_stage\.keep_ratio must be a number between 0"),
    ({"encoder_stage": {"layer": 3, "keep_ratio": 0.5}}, r"encoder_stage\.layer must be a layer from 0 to 2"),
    ({"method": "fastv"}, r'encoder_stage needs a method that chooses behind the encoder, and method "fastv"'),
    ({"method": "hiprune"}, r'method "hiprune" needs grid'),
    ({"method": "uniform_grid"}, r'method "uniform_grid" needs grid'),
    ({"method": "evs"}, r'method "evs" needs grid'),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(llava: Model, change: dict[str, Any], named: str) -> None:
    before = dict(llava.pruned.config.vispruner_config)
    with pytest.raises(ValueError, match=named):
        llava.pruned.set_vispruner_config(**change)
    assert llava.pruned.config.vispruner_config == before


@pytest.mark.parametrize("name", HINDERED)
def test_encoders_that_cannot_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"encoder_stage: .*{HINDERED[name]}.*set it to null"):
        made(name, tmp_path / "base", deep_config(name), **ROWS[name].options, encoder_stage=STAGE)


def test_native_packing_is_refused_by_name(deep_models: dict[str, Model], tmp_path: Path) -> None:
    model = deep("llava_next", deep_models, tmp_path)
    with pytest.raises(ValueError, match=r'encoder_stage: .*tile_mode "native"'):
        model.pruned.set_vispruner_config(tile_mode="native")


def test_training_goes_through_and_checkpointing_is_refused(llava: Model) -> None:
    pruned = copy.deepcopy(llava.pruned).train()
    inputs = llava.prompt(ONE)
    pruned(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert pruned.model.vision_layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    pruned.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"encoder_stage: gradient checkpointing"):
        pruned(**inputs, labels=inputs["input_ids"])


def test_an_encoder_whose_layers_are_not_called_is_found_out(deep_models: dict[str, Model], tmp_path: Path) -> None:
    """Where what takes rows away is skipped, as compiled code may skip it, nothing is answered."""
    model = deep("paligemma", deep_models, tmp_path)
    pruned = copy.deepcopy(model.pruned)
    for layer in pruned.model.vision_layers:
        layer.__class__ = type("Skipping", (type(layer),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)})
    with pytest.raises(RuntimeError, match=r"encoder_stage: no patch left"):
        answers(pruned, model.prompt(ONE))


@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_model_answers_as_it_does_uncompiled(llava: Model) -> None:
    inputs = llava.prompt(ONE)
    _, kept = llava.counts(inputs)
    short = llava.row.shortened(inputs, kept)
    torch._dynamo.reset()
    compiled = torch.compile(llava.pruned.model.forward, backend="eager")
    for stage in (STAGE, {**STAGE, "keep_ratio": 0.4}, None, STAGE):
        llava.pruned.set_vispruner_config(encoder_stage=stage)
        expected = llava.pruned.model(**short).last_hidden_state
        torch.testing.assert_close(compiled(**short).last_hidden_state, expected, **TOLERANCE)


def test_images_encoded_with_another_stage_are_refused(llava: Model) -> None:
    inputs = llava.prompt([HELLO, Image((56, 84), seed=1), ASK])
    images = llava.pruned.encode_images(inputs.pop("pixel_values"))
    assert torch.equal(
        answers(llava.pruned, {**inputs, "encoded_images": images}), answers(llava.pruned, llava.prompt(ONE))
    )
    llava.pruned.set_vispruner_config(encoder_stage={**STAGE, "keep_ratio": 0.5})
    with pytest.raises(ValueError, match="encoder_stage"):
        answers(llava.pruned, {**inputs, "encoded_images": images})


@pytest.mark.core
def test_a_repo_with_a_stage_is_built_verified_and_described(tmp_path: Path) -> None:
    shipped = (HUB_CONFIGS / "tiny-llava-vispruner.yaml").read_text(encoding="utf-8")
    yaml = tmp_path / "staged.yaml"
    head = "vispruner_config:\n"
    yaml.write_text(shipped.replace(head, f"{head}  encoder_stage: {{layer: 1, keep_ratio: 0.5}}\n"), encoding="utf-8")
    build_repo(yaml, tmp_path / "staged", show_progress=False)
    report = verify_repo(tmp_path / "staged")
    assert report.passed, report
    card = (tmp_path / "staged" / "README.md").read_text(encoding="utf-8")
    assert "behind layer 1 only the most attended 50% of the patches go on" in card
    build_repo("tiny-llava-vispruner", tmp_path / "plain", show_progress=False)
    plain = (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")
    bold = re.compile(r"\*\*\d+\.\d")  # a figure of this very repo
    assert bold.search(plain) and not bold.search(card), "what was measured without a stage is not this repo's"


def test_methods_for_a_staged_repo_are_refused_as_it_refuses_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = (HUB_CONFIGS / "tiny-llava-vispruner.yaml").read_text(encoding="utf-8")
    head = "vispruner_config:\n"
    (tmp_path / "staged.yaml").write_text(
        shipped.replace(head, f"{head}  encoder_stage: {{layer: 1, keep_ratio: 0.5}}\n"), encoding="utf-8"
    )
    assert cli.main(["methods", "--for", str(tmp_path / "staged.yaml"), "--json"]) == 0
    refused = {row["name"]: row["refused"] for row in json.loads(capsys.readouterr().out)["methods"]}
    for name in ("hiprune", "uniform_grid", "evs", "fastv"):
        assert refused[name], name
    assert refused["divprune"] is None


def test_it_is_saved_and_loaded(llava: Model, tmp_path: Path) -> None:
    llava.pruned.save_pretrained(tmp_path / "saved")
    again = vispruner.load(tmp_path / "saved", attn_implementation="eager").eval()
    assert again.config.vispruner_config["encoder_stage"] == STAGE
    assert torch.equal(answers(again, llava.prompt(ONE)), answers(llava.pruned, llava.prompt(ONE)))
