"""Prompts of models whose tokens have (time, height, width) positions (M-RoPE): tokens that stay keep their own.

The stock model numbers the full prompt; the columns that stay are gathered from that. What is generated then goes on
from the position where the full prompt ended.
"""

from collections.abc import Callable
from typing import Any

import torch

from .prompt_shortening import ShortenedPrompt
from .pruned_encoder import PrunedImageFeatures
from .pruning_mixin import Modality, VisPrunerMixin
from .stock_versions import CACHE, TAKES_FEATURES

GRID_IMAGES = Modality("image", "pixel_values", ("image_grid_thw",), "image_token_id")
GRID_VIDEOS = Modality("video", "pixel_values_videos", ("video_grid_thw",), "video_token_id")
TEXT_ROW = 4  # rows of position ids when the first is the place among the tokens, as `generate` has it


class MRoPEMixin(VisPrunerMixin):
    """`VisPrunerMixin` for the Qwen-VL family; `position_policy` null is "original", and there is no other."""

    modalities = (GRID_IMAGES, GRID_VIDEOS)
    default_position_policy = "original"

    def _positions_in_forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        if (cache := inputs.get(CACHE)) is not None and cache.get_seq_length():
            raise ValueError(
                "position_ids are missing: forward cannot number new images behind a cache; pass position_ids, or "
                f"the whole conversation without {CACHE}"
            )
        return self._number_full_prompt(inputs)

    def _positions_in_generate(self, arguments: dict[str, Any]) -> torch.Tensor:
        place = super()._positions_in_generate(arguments)
        return torch.cat([place[None], self._number_full_prompt(arguments)])

    def _number_full_prompt(self, inputs: dict[str, Any]) -> torch.Tensor:
        ids = inputs["input_ids"]
        kinds = sum(kind * (ids == token).int() for kind, token in enumerate(self._placeholder_ids, start=1))
        for modality, token in zip(self.modalities, self._placeholder_ids, strict=True):
            (grid,) = modality.described_by
            if inputs.get(grid) is None and (ids == token).any():
                raise ValueError(f"{grid} is missing: positions in a prompt depend on it; pass it with every prompt")
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        positions, self.model.rope_deltas = self.model.get_rope_index(ids, mm_token_type_ids=kinds, **given)
        return positions

    def _positions_after(self, prompt: ShortenedPrompt, positions: torch.Tensor) -> torch.Tensor:
        kept = super()._positions_after(prompt, positions)
        if len(kept) == TEXT_ROW:
            kept[0] += prompt.shift.to(kept.device)
        return kept

    def _shorten(self, inputs: dict[str, Any], *args: Any) -> ShortenedPrompt:
        """Shorten, and tell stock how far the next position is from the length of the shortened prompt."""
        positions = inputs.get("position_ids")
        prompt = super()._shorten(inputs, *args)
        if positions is not None and positions.dim() == 3:
            mask = inputs.get("attention_mask")
            length = prompt.length if mask is None else mask.sum(1).to(positions.device)
            self.model.rope_deltas = (positions[-3:].amax(dim=(0, 2)) + 1 - length)[:, None]
        return prompt

    def _run_stock(self, stock_forward: Callable, inputs: dict[str, Any]) -> Any:
        """Stock takes pixels or features, not both; one that takes no features is given them as pixels.

        So it can still number the prompt by its ids, and Qwen3-VL gets what goes past the embedded prompt.
        """
        encoded = dict(inputs.pop("mm_encoder_outputs", None) or {})
        if encoded or not TAKES_FEATURES:
            for modality in self.modalities:
                if (pixels := inputs.pop(modality.pixels, None)) is not None:
                    described = {name: inputs[name] for name in modality.described_by if name in inputs}
                    encode = getattr(self.model, f"get_{modality.name}_features")
                    encoded[modality.name] = encode(pixels, **described, return_dict=True)
        if encoded and TAKES_FEATURES:
            inputs["mm_encoder_outputs"] = encoded
        elif encoded:
            pixels = {modality.name: modality.pixels for modality in self.modalities}
            inputs |= {pixels[name]: _in_one_tensor_per_level(features) for name, features in encoded.items()}
        return stock_forward(**inputs)

    def _require_contiguous_cache(self, inputs: dict[str, Any]) -> None:
        """The next position is known: stock remembers how far it is from the length of the cache."""


def _in_one_tensor_per_level(features: Any) -> PrunedImageFeatures:
    levels: Any = getattr(features, "deepstack_features", None)
    joined: Any = None if levels is None else [torch.cat(list(level)) for level in levels]
    return PrunedImageFeatures(pooler_output=list(features.pooler_output), deepstack_features=joined)
