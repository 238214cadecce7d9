"""Prompts of models whose tokens have (time, height, width) positions (M-RoPE): tokens that stay keep their own.

The stock model numbers the full prompt; the columns that stay are gathered from that. What is generated then goes on
from the position where the full prompt ended.
"""

from typing import Any

import torch

from .prompt_shortening import ShortenedPrompt
from .pruning_mixin import Modality, VisPrunerMixin

GRID_IMAGES = Modality("image", "pixel_values", ("image_grid_thw",), "image_token_id")
GRID_VIDEOS = Modality("video", "pixel_values_videos", ("video_grid_thw",), "video_token_id")
TEXT_ROW = 4  # rows of position ids when the first is the place among the tokens, as `generate` has it


class MRoPEMixin(VisPrunerMixin):
    """`VisPrunerMixin` for the Qwen-VL family; `position_policy` null is "original", and there is no other."""

    modalities = (GRID_IMAGES, GRID_VIDEOS)
    default_position_policy = "original"

    def _positions_in_forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        if (cache := inputs.get("past_key_values")) is not None and cache.get_seq_length():
            raise ValueError(
                "position_ids are missing: forward cannot number new images behind a cache; pass position_ids, or "
                "the whole conversation without past_key_values"
            )
        return self._number_full_prompt(inputs)

    def _positions_in_generate(self, arguments: dict[str, Any]) -> torch.Tensor:
        place = super()._positions_in_generate(arguments)
        return torch.cat([place[None], self._number_full_prompt(arguments)])

    def _number_full_prompt(self, inputs: dict[str, Any]) -> torch.Tensor:
        if inputs.get("mm_token_type_ids") is None:
            raise ValueError("mm_token_type_ids are missing: pass all that the processor returned")
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        positions, self.model.rope_deltas = self.model.get_rope_index(inputs["input_ids"], **given)
        return positions

    def _positions_after(self, prompt: ShortenedPrompt, positions: torch.Tensor) -> torch.Tensor:
        shift = prompt.shift.to(positions.device)
        kept = super()._positions_after(prompt, positions)
        if len(kept) == TEXT_ROW:
            kept[0] += shift
        if (deltas := self.model.rope_deltas) is not None:  # from the length of a prompt to its next position
            self.model.rope_deltas = deltas - shift.amin(1, keepdim=True).to(deltas.device)
        return kept

    def _require_contiguous_cache(self, inputs: dict[str, Any]) -> None:
        """The next position is known: stock remembers how far it is from the length of the cache."""
