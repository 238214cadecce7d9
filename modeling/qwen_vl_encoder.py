"""What the Qwen-VL models share: an encoder without [CLS] that packs images of any size and merges 2 x 2 patches.

A token's saliency is the attention that its patches receive from all patches of the image or frame, on average.
Merged tokens are selected by merged features. What has placeholders of its own is an image, or a frame of a video (two
pictures, which the encoder takes together); each frame is pruned on its own.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import can_return_tuple

from .encoder_stage import EncoderStage, refuse_checkpointing
from .mrope_positions import GRID_IMAGES, GRID_VIDEOS, MRoPE
from .pixel_prediction import cells_to_encode
from .prompt_reading import Prompt
from .pruned_encoder import VisPrunerModelMixin
from .selector_inputs import most_attended_first
from .selector_registry import Selection, in_a_row
from .stock_versions import TAKES_FEATURES
from .visual_features import PrunedImageFeatures, TokenView, VisualTokens


class MergedGrids:
    """Tokens of images of any sizes, each a block of patches, by their (t, h, w) grids."""

    visual: Any

    def frames_of(self, grid_thw: torch.Tensor) -> list[tuple[int, int]]:
        """Return per frame of (images, 3) grids the rows and columns of its merged tokens."""
        side = self.visual.spatial_merge_size
        return [(int(h) // side, int(w) // side) for t, h, w in grid_thw.tolist() for _ in range(int(t))]

    def images_of(
        self, features: torch.Tensor, read: Any, grid_thw: torch.Tensor, frames: list[tuple[int, int]]
    ) -> list[VisualTokens]:
        """Return what selectors look at, of each image or frame.

        features  (tokens, C) of all of them in a row
        read      saliency, layer_saliency and further, of the patches in the encoder's order
        """
        counts = [rows * columns for rows, columns in frames]
        saliency = self._merged(read.saliency, grid_thw).split(counts, dim=-1)
        layers = read.layer_saliency
        of_layers = [None] * len(counts) if layers is None else self._merged(layers, grid_thw).split(counts, dim=-1)
        videos = [(number,) for number, (t, _, _) in enumerate(grid_thw.tolist()) for _ in range(int(t))]
        parts = zip(features.split(counts), saliency, of_layers, frames, videos, strict=True)
        images = [
            VisualTokens(tokens[None], score, layer, grid, videos=own, owners=(number,))
            for number, (tokens, score, layer, grid, own) in enumerate(parts)
        ]
        for name, given in read.further.items():
            of_images = self._merged(given.mT, grid_thw).split(counts, dim=-1)
            images = [
                replace(image, further={**image.further, name: own.mT})
                for image, own in zip(images, of_images, strict=True)
            ]
        return images

    def _merged(self, saliency: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Average the saliency (..., patches) of the patches that become one token: (..., tokens), in raster order."""
        merged = saliency.unflatten(-1, (-1, self.visual.spatial_merge_size**2)).mean(-1)
        return self.in_raster_order(merged, grid_thw)

    def in_raster_order(self, merged: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Undo what an encoder did to the order of merged tokens (..., tokens)."""
        return merged


class QwenVLEncoderMixin(MergedGrids, VisPrunerModelMixin):
    """For the base models of the family: count, encode and select images and videos by their (t, h, w) grids."""

    modalities = (GRID_IMAGES, GRID_VIDEOS)
    default_position_policy = "original"
    position_axes = 3
    has_cls_token = False
    packs_images = True
    foretells_pixels = True
    budget_unit = "image or frame of a video"

    def position_policy(self, name: str | None = None) -> MRoPE:
        return MRoPE(self)

    def named_as_stock(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As ever, without what tells images from text in ids: embeddings are numbered as text, as stock does."""
        given = super().named_as_stock(inputs)
        if given.get("inputs_embeds") is not None and given.get("input_ids") is None:
            given.pop("mm_token_type_ids", None)  # soft prompts make it too short
        return given

    def must_encode(self, inputs: Mapping[str, Any]) -> bool:
        """As ever; a stock that takes no features is given them as pixels, so all must be features."""
        return super().must_encode(inputs) or (not TAKES_FEATURES and self._has_pixels(inputs))

    def put_features(self, inputs: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
        """Give stock features in the place of pixels: so it can number the prompt by its ids, and has all levels."""
        pixels = {modality.name: modality.pixels for modality in self.modalities}
        return {**inputs, **{pixels[name]: _in_one_tensor_per_level(image) for name, image in features.items()}}

    @property
    def vision_layers(self) -> Sequence[Any]:
        return self.visual.blocks

    def check_prunable(self) -> None:
        policy = self.encoder_options.position_policy
        if policy not in (None, "original"):
            raise ValueError(
                f'vispruner_config.position_policy must be null or "original", got {policy!r}: tokens have a time, a '
                "height and a width here, which cannot be numbered anew"
            )

    def image_token_counts(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **arguments: Any
    ) -> tuple[list[int], list[int]]:
        """Return per image the visual tokens of a full prompt and those that are kept."""
        return self._token_counts(pixel_values, image_grid_thw, "image_grid_thw")

    def video_token_counts(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor | None = None, **arguments: Any
    ) -> tuple[list[int], list[int]]:
        """Return per frame of all videos the visual tokens of a full prompt and those that are kept."""
        return self._token_counts(pixel_values_videos, video_grid_thw, "video_grid_thw")

    def token_grids(self, prompt: Prompt) -> dict[int, list[tuple[int, int]]]:
        """Return per placeholder id the rows and columns that the tokens of each image or frame are."""
        given = {token: prompt.inputs.get(f"{modality.name}_grid_thw") for modality, token in prompt.modalities}
        if any(given[token] is None for token, images in prompt.full.items() if images):
            raise ValueError("image_grid_thw or video_grid_thw is missing: pass it as the processor returned it")
        return {token: [] if grid is None else self.frames_of(grid) for token, grid in given.items()}

    def _token_counts(
        self, pixels: torch.Tensor | None, grid_thw: torch.Tensor | None, name: str
    ) -> tuple[list[int], list[int]]:
        if grid_thw is None:
            raise ValueError(f"{name} is missing: pass all that the processor returned")
        full = [rows * columns for rows, columns in self.frames_of(grid_thw)]
        budgets = [self.encoder_options.budget(count) for count in full]
        if not self._foretells:
            return full, budgets
        left = _counted(self._tokens_to_encode(pixels, grid_thw))
        return full, [min(budget, count) for budget, count in zip(budgets, left, strict=True)]

    @property
    def _foretells(self) -> bool:
        """Whether blocks whose pixels are foretold leave before the encoder."""
        options = self.encoder_options
        return options.method != "none" and options.pixel_tolerance is not None

    def _tokens_to_encode(self, pixels: torch.Tensor | None, grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """Return per image or frame which of its tokens (N,) must be encoded: by pixels as the encoder gets them."""
        if pixels is None:
            raise ValueError(
                "vispruner_config.encoder_stage.pixel_tolerance: how many visual tokens are kept depends on the "
                "picture, so pass pixel_values (or pixel_values_videos) as the processor returned them"
            )
        side, grids, staying = self.visual.spatial_merge_size, grid_thw.tolist(), list[torch.Tensor]()
        seen = _patches_of(pixels.detach().to(self.visual.dtype), grids)
        for (t, h, w), patches in zip(grids, seen, strict=True):
            cells = patches.reshape(t, h // side, w // side, -1)
            stays = cells_to_encode(cells, self.encoder_options.pixel_tolerance or 0)
            staying.extend(stays.flatten(1).unbind())
        return staying

    def image_views(self, pixel_values: torch.Tensor, **arguments: Any) -> list[list[TokenView]]:
        """Return every image, put together again from its patches, with a grid of merged tokens."""
        return self._views(pixel_values, arguments["image_grid_thw"])

    def video_views(self, pixel_values_videos: torch.Tensor, **arguments: Any) -> list[list[TokenView]]:
        """Return every frame as an image of its own: the first of its two pictures."""
        return self._views(pixel_values_videos, arguments["video_grid_thw"])

    def _views(self, pixels: torch.Tensor, grid_thw: torch.Tensor) -> list[list[TokenView]]:
        vision = self.config.vision_config
        side, patch, grids = vision.spatial_merge_size, vision.patch_size, grid_thw.tolist()
        pictures: list[torch.Tensor] = []
        for (t, h, w), part in zip(grids, _patches_of(pixels, grids), strict=True):
            # (time, block row, block column, row, column, colour, picture, y, x), the last four of a patch
            split = part.view(t, h // side, w // side, side, side, -1, vision.temporal_patch_size, patch, patch)
            pictures += split[..., 0, :, :].permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(t, -1, h * patch, w * patch)
        return [[TokenView(*view)] for view in zip(pictures, self.frames_of(grid_thw), strict=True)]

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> PrunedImageFeatures:
        """Encode images and select merged tokens; `pooler_output` holds (T, D) per image."""
        encode = super().get_image_features  # type: ignore[misc]
        return self.encode_pruned(encode, pixel_values, image_grid_thw, **kwargs)

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> PrunedImageFeatures:
        """Encode videos and select merged tokens of each frame; `pooler_output` holds (T, D) per frame."""
        encode = super().get_video_features  # type: ignore[misc]
        return self.encode_pruned(encode, pixel_values_videos, video_grid_thw, **kwargs)

    @property
    def _mergers(self) -> list[Any]:
        return [self.visual.merger, *getattr(self.visual, "deepstack_merger_list", ())]

    def _leaving(
        self, pixels: torch.Tensor, grid_thw: torch.Tensor, counts: list[int]
    ) -> tuple[list[int], EncoderStage | None]:
        """Return how many tokens of each image or frame the encoder hands over, and what lets the others leave.

        counts  how many tokens each has
        """
        if self._foretells:
            refuse_checkpointing(self.vision_layers)  # whatever this picture is: training must not stop at the next
            staying = self._tokens_to_encode(pixels, grid_thw)
            left = _counted(staying)
            return left, None if left == counts else self._stage_before(staying, left, grid_thw)
        left = [self.remaining_count(count) for count in counts]
        return left, None if left == counts else self._stage(counts, left)

    def _stage_before(self, staying: Sequence[torch.Tensor], left: list[int], grid_thw: torch.Tensor) -> EncoderStage:
        """Return what lets all but the tokens that stay leave before the encoder's first layer."""
        raster, block = torch.cat(list(staying)), self.visual.spatial_merge_size**2
        places = self.in_raster_order(torch.arange(len(raster), device=raster.device), grid_thw)
        remain = torch.empty_like(raster).scatter(0, places, raster).repeat_interleave(block)[None]
        return EncoderStage(
            self.vision_layers, -1, None, lambda _: remain, sum(left) * block, restored_at=self._mergers
        )

    def _stage(self, counts: list[int], left: list[int]) -> EncoderStage:
        """Return what leaves so many of the merge blocks of images or frames within the encoder."""
        block = self.visual.spatial_merge_size**2
        starts = [0, *itertools.accumulate(counts[:-1])]
        first = torch.cat([start + torch.arange(most) for start, most in zip(starts, left, strict=True)])
        frame = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

        def choose(saliency: torch.Tensor) -> torch.Tensor:
            # What the encoder puts in windows stays within its frame, and every block together.
            order = most_attended_first(saliency.unflatten(-1, (-1, block)).mean(-1))
            of_frame, best = (numbers.to(order.device, non_blocking=True) for numbers in (frame, first))
            order = order.gather(1, of_frame[order].argsort(dim=1, stable=True))
            stays = torch.zeros_like(order, dtype=torch.bool)
            return stays.scatter(1, order[:, best], True).repeat_interleave(block, dim=1)

        return self.stage_behind(self.vision_layers, choose, sum(left) * block, restored_at=self._mergers)

    def encode_pruned(
        self, encode: Any, pixels: torch.Tensor, grid_thw: torch.Tensor | None, **kwargs: Any
    ) -> PrunedImageFeatures:
        """Run stock `encode(pixels, grid_thw)` and keep of each image or frame what its budget leaves."""
        # A stock that takes no features is given them in the place of pixels.
        if isinstance(pixels, PrunedImageFeatures):
            return pixels
        if grid_thw is None:
            raise ValueError("image_grid_thw or video_grid_thw is missing: pass it as the processor returned it")
        frames = self.frames_of(grid_thw)
        counts = [rows * columns for rows, columns in frames]
        kwargs.pop("return_dict", None)
        keeps_all = all(map(self.keeps_all, counts))
        left, stage = (counts, None) if keeps_all and not self._foretells else self._leaving(pixels, grid_thw, counts)
        if keeps_all and stage is None:
            self.warn_that_all_are_kept("each picture of a call")
            outputs = encode(pixels, grid_thw, return_dict=True, **kwargs)
            outputs.pooler_output = torch.cat(list(outputs.pooler_output)).split(counts)
            everything = self.keep_everything(outputs)
            everything.deepstack_features = _split_levels(outputs, counts)
            return everything
        with self.open_tap(stage=stage) as tap:
            outputs = encode(pixels, grid_thw, return_dict=True, **kwargs)
        features = torch.cat(list(outputs.pooler_output))
        images = self.images_of(features, tap, grid_thw, frames)
        if stage is not None and stage.remain is not None:
            remain = (self._merged(stage.remain.float(), grid_thw) > 0.5).to(features.device).split(counts, dim=-1)
            of_images = zip(images, remain, left, strict=True)
            images = [replace(image, remain=own, left=count) for image, own, count in of_images]
        kept = self.select_each(images)
        all_kept, numbers = in_a_row(kept, counts), [one.indices.shape[1] for one in kept]
        indices = list(torch.cat([one.indices for one in kept], dim=1)[0].split(numbers))
        visual, *of_levels = [
            list(all_kept.take(tensor[None])[0].split(numbers))
            for tensor in [features, *(_joined_levels(outputs) or [])]
        ]
        return self.pruned_output(
            outputs,
            kwargs,
            images,
            pooler_output=visual,
            kept_indices=indices,
            placeholders=indices,
            full_counts=counts,
            deepstack_features=of_levels or None,
            merged_into=_merged_into(kept, counts),
        )


def _patches_of(pixels: torch.Tensor, grids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
    """Return the patches (t * h * w, P) of each image or video, of pixels (..., patches, P), by their (t, h, w)."""
    counts, patches = [t * h * w for t, h, w in grids], pixels.flatten(0, -2)
    if len(patches) != sum(counts):
        raise ValueError(
            f"pixel_values (or pixel_values_videos) hold {len(patches)} patches, but image_grid_thw (or "
            f"video_grid_thw) says {sum(counts)}: pass both as the processor returned them"
        )
    return patches.split(counts)


def _counted(staying: Sequence[torch.Tensor]) -> list[int]:
    """Return how many tokens stay of each image or frame, for which the device is waited for."""
    return torch.stack([own.sum() for own in staying]).tolist() if staying else []


def _merged_into(kept: Sequence[Selection], counts: list[int]) -> list[torch.Tensor] | None:
    if all(one.merge is None for one in kept):
        return None
    return [one.merged_into(count)[0] for one, count in zip(kept, counts, strict=True)]


def _joined_levels(outputs: Any) -> list[torch.Tensor] | None:
    """Return the deepstack features (N, D) per level, of all images in a row; newer stock has them apart."""
    levels = getattr(outputs, "deepstack_features", None)
    if levels is None:
        return None
    return [level if isinstance(level, torch.Tensor) else torch.cat(list(level)) for level in levels]


def _split_levels(outputs: Any, counts: list[int]) -> list[list[torch.Tensor]] | None:
    """Return the deepstack features per level and image or frame."""
    levels = _joined_levels(outputs)
    return None if levels is None else [list(level.split(counts)) for level in levels]


def _in_one_tensor_per_level(features: Any) -> PrunedImageFeatures:
    levels: Any = getattr(features, "deepstack_features", None)
    joined: Any = None if levels is None else [torch.cat(list(level)) for level in levels]
    return PrunedImageFeatures(pooler_output=list(features.pooler_output), deepstack_features=joined)
