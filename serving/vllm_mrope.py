"""What the Qwen-VL models share in vLLM: tokens that stay keep their time, height and width, of images and frames.

vLLM numbers a prompt before its pictures are encoded. So text is numbered as in the full prompt, and every placeholder
as the first token of its picture. A token that stays brings its own place along, in further columns of its embedding;
where embeddings are put into the prompt these are cut off, and added to the positions of that step.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any

import torch
from vllm.config import VllmConfig

from vispruner.configuration_vispruner import VisPrunerOptions
from vispruner.qwen_vl_encoder import MergedGrids
from vispruner.selector_registry import in_a_row

from .kept_counts import Picture
from .vllm_prompts import PrunedPrompts
from .vllm_pruning import Asked, PrunedVision

COLUMNS = 6  # time, height and width, two digits each
BASE = 128  # of these digits: bfloat16 is exact only up to 256


class PrunedGridPrompts(PrunedPrompts):
    """`PrunedPrompts` of pictures that are counted by their grids."""

    def picture(self, modality: str, items: Any, item: int, out_mm_kwargs: Any) -> Picture:
        grid = out_mm_kwargs[modality][item][f"{modality}_grid_thw"].data
        return Picture(int(grid[1]), int(grid[2]), int(grid[0]) if modality == "video" else None)


class PrunedGrids(MergedGrids, PrunedVision):
    """`PrunedVision` of the Qwen-VL models: one sequence of images and frames of any sizes."""

    visual: Any
    vispruner_places: torch.Tensor  # (3, tokens of a step), what is still to be added to positions
    vispruner_last_position: int

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _refuse_other_positions(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        places = torch.zeros(3, vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.long)
        self.register_buffer("vispruner_places", places, persistent=False)  # type: ignore[attr-defined]
        modules = self.language_model.modules()  # type: ignore[attr-defined]
        rotations = next(module.cos_sin_cache for module in modules if hasattr(module, "cos_sin_cache"))
        # A short prompt of many pictures may count further than any prompt that fits: no request may read beyond.
        self.vispruner_last_position = len(rotations) - 1

    @property
    def vision_attentions(self) -> Sequence[Any]:
        return [block.attn for block in self.visual.blocks]

    @property
    def attention_heads(self) -> int:
        return self.config.vision_config.num_heads

    @property
    def tokens_of_a_tile(self) -> None:
        return None

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return features

    @property
    def prunes(self) -> bool:
        return self.vispruner_options.method != "none"

    def _process_image_input(self, image_input: Any) -> Any:
        return self._embedded(image_input, "image", super()._process_image_input)  # type: ignore[misc]

    def _process_video_input(self, video_input: Any) -> Any:
        return self._embedded(video_input, "video", super()._process_video_input)  # type: ignore[misc]

    def _postprocess_image_embeds_evs(self, embeddings: Any, image_input: Any) -> Any:
        return embeddings

    def _postprocess_video_embeds_evs(self, embeddings: Any, video_input: Any) -> Any:
        return embeddings

    def _embedded(self, given: Any, modality: str, encode: Any) -> Any:
        """Return of each image or video the embeddings that stay, (tokens, D and columns for their places)."""
        inputs = given.inputs if isinstance(given, Asked) else given
        grid = inputs[f"{modality}_grid_thw"]
        places = [self.places_of(grid[number : number + 1], inputs, number) for number in range(len(grid))]
        if not isinstance(given, Asked):  # embeddings of the client, which stay as they are
            embeddings = encode(inputs)
            return _with_places(embeddings, places) if self.prunes else embeddings
        with self.read_attention(chunks=[int(h) * int(w) for t, h, w in grid.tolist() for _ in range(int(t))]) as read:
            encoded = torch.cat(list(encode(inputs)))
        patches = inputs["pixel_values" if modality == "image" else "pixel_values_videos"]
        kept = self._kept_rows(encoded, read(patches[None]), grid, given.options)
        counts = [len(own) for own in places]
        parts = zip(encoded.split(counts), places, kept, strict=True)
        return _with_places(*zip(*((own[rows], place[rows.cpu()]) for own, place, rows in parts), strict=True))

    def _kept_rows(
        self, encoded: torch.Tensor, read: Any, grid: torch.Tensor, asked: Sequence[VisPrunerOptions]
    ) -> list[torch.Tensor]:
        """Return of each image or video which of its tokens stay, and fold the others into them in place."""
        frames = self.frames_of(grid)
        counts = [rows * columns for rows, columns in frames]
        of_frames = [options for options, (t, _, _) in zip(asked, grid.tolist(), strict=True) for _ in range(int(t))]
        images = self.images_of(encoded[:, : self.config.get_text_config().hidden_size], read, grid, frames)
        budgets = [options.budget(count) for options, count in zip(of_frames, counts, strict=True)]
        selections = self.select_each(images, budgets)
        if any(one.merge is not None for one in selections):
            encoded.copy_(in_a_row(selections, counts).fold(encoded[None])[0])
        rows, frame = [], 0
        for t in (int(of_grid[0]) for of_grid in grid.tolist()):
            own = selections[frame : frame + t]
            starts = [0, *accumulate(counts[frame : frame + t])]
            rows.append(torch.cat([one.indices[0] + start for one, start in zip(own, starts, strict=False)]))
            frame += t
        return rows

    def places_of(self, grid: torch.Tensor, inputs: Any, number: int) -> torch.Tensor:
        """Return (tokens, 3) of one image or video (1, 3): time, height and width in it."""
        (t, _, _), (rows, columns) = (int(side) for side in grid[0]), self.frames_of(grid)[0]
        time, height, width = torch.meshgrid(*map(torch.arange, (t, rows, columns)), indexing="ij")
        time = (time * self.seconds_factor(inputs, number)).long()
        return torch.stack([time, height, width], dim=-1).flatten(0, 2)

    def seconds_factor(self, inputs: Any, number: int) -> float:
        """Return how far apart in time the frames of a video are numbered."""
        return 1.0

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> Any:
        """Number a short prompt as its full one is: text where it would be, pictures where they begin."""
        if not self.prunes:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        ids: list[int] = []
        columns: list[int] = []  # of the full prompt, for each of the short one
        features, done = [], 0
        for feature in sorted(mm_features, key=lambda own: own.mm_position.offset):
            place, grid = feature.mm_position, feature.data[f"{feature.modality}_grid_thw"].data
            columns += range(len(ids), len(ids) + place.offset - done)
            ids += input_tokens[done : place.offset]
            done, start = place.offset + place.length, len(ids)
            self._expand(input_tokens[place.offset : done], int(grid.prod()), ids, columns)
            full = replace(place, offset=start, length=len(ids) - start, is_embed=None)
            features.append(replace(feature, mm_position=full))
        columns += range(len(ids), len(ids) + len(input_tokens) - done)
        ids += input_tokens[done:]
        positions, _ = super().get_mrope_input_positions(ids, features)  # type: ignore[misc]
        return positions[:, columns], int(positions.max()) + 1 - len(input_tokens)

    def _expand(self, written: list[int], patches: int, ids: list[int], columns: list[int]) -> None:
        """Append the placeholders that a full prompt has for what stands in a short one, and where to find these."""
        visual = (self.config.image_token_id, self.config.video_token_id)
        runs = [(key in visual, list(run)) for key, run in groupby(written, key=lambda token: token)]
        full = patches // self.visual.spatial_merge_size**2 // sum(is_visual for is_visual, _ in runs)
        for is_visual, run in runs:
            start = len(ids)
            columns += [start] * len(run) if is_visual else range(start, start + len(run))
            ids += run[:1] * full if is_visual else run

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """Stock, without the columns for places, which `forward` is going to use."""
        if self.prunes and multimodal_embeddings is not None and len(multimodal_embeddings):
            digits = torch.cat([own[:, -COLUMNS:] for own in multimodal_embeddings]).long()
            places = (digits[:, :3] * BASE + digits[:, 3:]).T.to(self.vispruner_places)
            multimodal_embeddings = [own[:, :-COLUMNS] for own in multimodal_embeddings]
            step = self.vispruner_places[:, : len(input_ids)].zero_()
            step.masked_scatter_(is_multimodal.to(step.device).expand(3, -1), places)
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal, **kwargs
        )

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stock; positions are changed in place, since a captured graph reads them where they are."""
        step = self.vispruner_places[:, : positions.shape[-1]]
        if self.prunes and positions.dim() == 2:
            positions[:, : step.shape[1]].add_(step).clamp_(max=self.vispruner_last_position)
            step.zero_()
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]


def _refuse_other_positions(vllm_config: VllmConfig) -> None:
    """Raise ValueError for what would number pruned pictures another way."""
    multimodal: Any = vllm_config.model_config.multimodal_config
    drafter = vllm_config.speculative_config
    if multimodal.video_pruning_rate:
        raise ValueError("--video-pruning-rate: videos are pruned by vispruner_config here, start without it")
    if drafter is not None and drafter.method not in ("ngram", "suffix"):
        raise ValueError(f"speculative_config.method {drafter.method!r}: a drafter would not know pruned positions")
    if getattr(vllm_config.parallel_config, "enable_dbo", False):
        raise ValueError("--enable-dbo: a step that is split in two would mix up where kept tokens stand")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("--pipeline-parallel-size must be 1: only the first rank knows where kept tokens stand")


def _with_places(embeddings: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Append to embeddings (tokens, D) their places (tokens, 3)."""
    made = []
    for own, place in zip(embeddings, places, strict=True):
        digits = torch.cat([place // BASE, place % BASE], dim=1)
        made.append(torch.cat([own, digits.to(own)], dim=1))
    return tuple(made)
