"""How much faster a pruned model can be at best: what its encoder costs, which pruning behind it leaves as it is.

Counted as in prefill_cost.py, from a config alone. A ceiling is a ratio of operations: memory, launches and the choice
itself only make it smaller. It is about one picture and a short question, see `example_inputs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vispruner import architecture_of

from .prefill_cost import kv_cache_bytes, language_model_flops, logits_flops

TEXT_TOKENS = 64
PIXELS = 1008  # the side of the picture, where an encoder takes any size: about a megapixel
TILES = 13  # of the picture, where it is cut into tiles of one size
SIDE_IN_TILES = {"llava_next": 2, "llava_onevision": 3}  # beside the tile that shows all of it
PROJECTORS = ("multi_modal_projector", "connector", "merger")
# What is in an encoder beside its matrix products; a head or pooler sees one token, and nothing reads what it makes.
NO_PRODUCTS = ("position_embedding", "pos_embed", "_token", "pooler", ".head.")
OTHERS = ("language_model", "text_model", "video_tower", "lm_head")


def example_inputs(base: Any) -> dict[str, torch.Tensor]:
    """Return one picture as the processor of a base model would: its largest usual form, see the constants."""
    config, vision = base.config, base.config.vision_config
    if base.packs_images:
        unit = vision.patch_size * vision.spatial_merge_size
        rows = PIXELS // unit * vision.spatial_merge_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.empty(rows * rows, width, device="meta"),
            "image_grid_thw": torch.tensor([[1, rows, rows]]),
        }
    height, width = (vision.image_size,) * 2 if isinstance(vision.image_size, int) else vision.image_size
    name = base.modalities[0].pixels
    if (tiles := SIDE_IN_TILES.get(config.model_type)) is not None:
        pixels = torch.empty(1, 1 + tiles**2, 3, height, width, device="meta")
        return {name: pixels, "image_sizes": torch.tensor([[tiles * height, tiles * width]])}
    if hasattr(config, "scale_factor"):  # its padding is found by looking at pixels
        return {name: torch.ones(1, TILES, 3, height, width)}
    return {name: torch.empty(TILES if hasattr(config, "downsample_ratio") else 1, 3, height, width, device="meta")}


def encoder_flops(base: Any, inputs: Mapping[str, torch.Tensor], staged: bool = True) -> tuple[int, int]:
    """Return the operations of a base model's encoder for the images in `inputs`, and of its projector for all tokens.

    base    pruned or not pruned, which may be on the meta device
    staged  whether patches leave within the encoder, where its options say so
    """
    sequences, patches = _sequences(base, inputs, staged)
    in_tower, on_patches, in_projector = 0, 0, 0
    for name, weight in base.named_parameters():
        if weight.ndim < 2 or any(part in name for part in NO_PRODUCTS) or name.startswith(OTHERS):
            continue
        if any(part in name for part in PROJECTORS):
            in_projector += weight.numel()
        elif "patch_embed" in name:
            on_patches += weight.numel()
            channels = weight.shape[0]
        else:
            in_tower += weight.numel()
    attention = 4 * channels * sum(length**2 for layer in sequences for length in layer)
    rows = sum(map(sum, sequences)) / len(sequences)  # of a layer, and all layers have the same weights
    tower = 2 * (in_tower * rows + on_patches * patches) + attention
    return round(tower), 2 * in_projector * _projected(base, inputs, patches)


def _sequences(base: Any, inputs: Mapping[str, torch.Tensor], staged: bool) -> tuple[list[list[float]], int]:
    """Return the lengths of the sequences that each layer attends within, and the patches of all images.

    Behind a stage within the encoder that is their mean: how many patches of a window leave, the picture says.
    """
    layers, vision = len(base.vision_attentions), base.config.vision_config
    stage = base.encoder_options.encoder_stage if staged and base.methods[0] is not None else None

    def left(layer: int) -> float:
        """Return what part of the patches a layer still has."""
        if stage is None or layer <= stage["layer"]:
            return 1.0
        tokens = _token_counts(base, inputs)[0][0]
        return float(base.remaining_count(tokens) / tokens)

    if base.packs_images:
        grids = [(h, w) for t, h, w in inputs["image_grid_thw"].tolist() for _ in range(t)]
        whole = [h * w for h, w in grids]
        windows = _windows(vision, grids) if hasattr(vision, "window_size") else whole
        attends_to_all = getattr(vision, "fullatt_block_indexes", range(layers))
        lengths = [whole if layer in attends_to_all else windows for layer in range(layers)]
        return [[left(layer) * length for length in own] for layer, own in enumerate(lengths)], sum(whole)
    pixels = inputs[base.modalities[0].pixels]
    rows, columns = (vision.patch_size,) * 2 if isinstance(vision.patch_size, int) else vision.patch_size
    patches = (pixels.shape[-2] // rows) * (pixels.shape[-1] // columns)
    tiles = math.prod(pixels.shape[:-3])
    others = base.has_cls_token + getattr(vision, "num_register_tokens", 0)
    return [[others + left(layer) * patches] * tiles for layer in range(layers)], tiles * patches


def _windows(vision: Any, grids: list[tuple[int, int]]) -> list[int]:
    """Return how many patches each window of Qwen2.5-VL's encoder has, cut off at the edges of an image."""
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
    return [
        min(side, h - top) * min(side, w - left)
        for h, w in grids
        for top in range(0, h, side)
        for left in range(0, w, side)
    ]


def _projected(base: Any, inputs: Mapping[str, torch.Tensor], patches: int) -> int:
    """Return how many tokens stock projects: patches where it packs them afterwards, else the visual tokens."""
    return patches if hasattr(base.config, "image_grid_pinpoints") else sum(_token_counts(base, inputs)[0])


def _token_counts(base: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    modality = base.modalities[0]
    described = {name: inputs[name] for name in modality.described_by if name in inputs}
    return base.image_token_counts(inputs[modality.pixels], **described)


@dataclass(frozen=True)
class Ceiling:
    """What pruning can give at most for one picture: ratios of operations to those of the unpruned model.

    visual_tokens  of the picture in full, and kept (the mean over the layers of the language model)
    encoder        the share of encoder and projector in the work for the first token, unpruned
    first_token    how many times less work comes before it, under the budget and with any stage within the encoder,
                   if only what stays is projected
    none           the same if no visual token were left
    prefill        how many times less work the language model's prefill is
    cache          what part of the prompt's KV cache is left
    """

    visual_tokens: tuple[int, float]
    encoder: float
    first_token: float
    none: float
    prefill: float
    cache: float

    def __str__(self) -> str:
        full, kept = self.visual_tokens
        return (
            f"Of a picture of {full:,} visual tokens with {TEXT_TOKENS} of text, encoder and projector are "
            f"{self.encoder:.0%} of the work before the first token. With {kept:,.0f} visual tokens that token comes "
            f"at most {self.first_token:.1f} times as soon, with none {self.none:.1f} times. The KV cache of that "
            f"prompt shrinks to {self.cache:.0%}."
        )


def ceiling(base: Any) -> Ceiling:
    """Return what a base model can gain at most under its own budget; it may be on the meta device.

    What leaves before the encoder for its pixels is not counted: only a picture says how much.
    """
    if base.vispruner_options.pixel_tolerance is not None:
        with base.call_with({"encoder_stage": None}):
            return ceiling(base)
    config, inputs = base.config, example_inputs(base)
    full, kept = map(sum, counts := _token_counts(base, inputs))
    held = [kept] * base.depth
    if base.prunes_in_decoder:
        held = [sum(of_images) for of_images in zip(*map(base.layer_counts, counts[1]), strict=True)]
    encoder, projector = encoder_flops(base, inputs, staged=False)
    shortened, _ = encoder_flops(base, inputs)

    def prefill(visual: list[int]) -> int:
        return language_model_flops(config, [TEXT_TOKENS + count for count in visual]) + logits_flops(config)

    dense, pruned, text = (prefill(visual) for visual in ([full] * base.depth, held, [0] * base.depth))
    caches = [kv_cache_bytes(config, [TEXT_TOKENS + n for n in visual]) for visual in ([full] * base.depth, held)]
    before = encoder + projector + dense  # the first token, unpruned
    return Ceiling(
        visual_tokens=(full, sum(held) / len(held)),
        encoder=(encoder + projector) / before,
        first_token=before / (shortened + projector * kept / full + pruned),
        none=before / (shortened + text),
        prefill=dense / pruned,
        cache=caches[1] / caches[0],
    )


def ceiling_of_config(content: Mapping[str, Any]) -> Ceiling:
    """Return the ceiling of what a repo's config.json describes; no weights are read."""
    architecture = architecture_of(content.get("model_type", ""))
    with torch.device("meta"):
        base = architecture.base_class(architecture.config_class.from_dict(dict(content)))
    return ceiling(base)


def ceiling_at(base: Any, keep_ratio: float, encoder_stage: dict[str, Any] | None = None) -> Ceiling:
    """Return the ceiling of a base model if it kept this part of its visual tokens, whatever its own budget is.

    encoder_stage  as the field of `vispruner_config`
    """
    changes = {"keep_ratio": keep_ratio, "visual_token_num": None, "encoder_stage": encoder_stage}
    with base.call_with({"method": "random", "seed": 0, **changes}):
        return ceiling(base)


def halfway(base: Any, keep_ratio: float) -> dict[str, Any] | None:
    """Return a stage that leaves this part of the patches in the middle of an encoder; None where none may leave."""
    after = max(base.stage_layers.start, len(base.vision_layers) // 2 - 1)
    return None if base.stage_hindrance is not None else {"layer": after, "keep_ratio": keep_ratio}
