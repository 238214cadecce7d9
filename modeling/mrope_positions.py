"""Positions of models whose tokens have (time, height, width) positions (M-RoPE): tokens that stay keep their own.

The stock model numbers the full prompt; the columns that stay are taken from that. What is generated then goes on from
the position where the full prompt ended.
"""

from typing import Any

import torch

from .position_policies import Original
from .prompt_reading import Modality, Prompt
from .prompt_shortening import CachedPrompt, KeptColumns
from .stock_versions import CACHE

GRID_IMAGES = Modality("image", "pixel_values", ("image_grid_thw",), "image_token_id")
GRID_VIDEOS = Modality("video", "pixel_values_videos", ("video_grid_thw",), "video_token_id")
DESCRIBING = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
TEXT_ROW = 4  # rows of position ids when the first is the place among the tokens, as `generate` has it


class MRoPE(Original):
    """The one policy of such a model. Stock remembers in `model.rope_deltas` how the next position is to be found.

    model  the base model
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def in_forward(self, prompt: Prompt) -> torch.Tensor | None:
        """Return (3, B, S): time, height, width."""
        if prompt.past:
            raise ValueError(
                "position_ids are missing: forward cannot number new images behind a cache; pass position_ids, or "
                f"the whole conversation without {CACHE}"
            )
        return self._number(prompt)

    def in_generate(self, prompt: Prompt) -> torch.Tensor:
        """Return (4, B, S): the place among the tokens, time, height, width."""
        place = super().in_generate(prompt)
        return torch.cat([place[None], self._number(prompt)])

    def of_kept(self, columns: KeptColumns, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return (3 or 4, B, W), and tell stock how far the next position is from the length of the shortened prompt.

        Places among the tokens are counted anew, since stock tells samples that are packed into one row by them.
        """
        if positions.dim() != 3:
            return super().of_kept(columns, positions, mask)
        kept = columns.take(positions, 0)
        if len(kept) == TEXT_ROW:
            kept = torch.cat([columns.renumbered(positions[0])[None], kept[1:]])
        length = columns.length if mask is None else mask.sum(1).to(positions.device)
        self.model.rope_deltas = (positions[-3:].amax(dim=(0, 2)) + 1 - length)[:, None]
        return kept

    def after(self, cached: CachedPrompt, past: int, new: int, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Return the caller's, with places among the tokens that are in the cache; None leaves them to stock."""
        if positions is None or cached.columns is None or len(positions) != TEXT_ROW:
            return positions
        place = positions[0] + cached.columns.grown[:, -1:].to(positions.device)
        return torch.cat([place[None], positions[1:]])

    def _number(self, prompt: Prompt) -> torch.Tensor:
        """Return (3, B, S) as stock numbers the full prompt; embeddings, which it cannot read, as text."""
        if prompt.ids is None or "inputs_embeds" in prompt.inputs:
            place = super().in_generate(prompt)
            return place.expand(3, *place.shape)
        kinds = sum(kind * flags.int() for kind, flags in enumerate(prompt.is_placeholder.values(), start=1))
        for modality, token in prompt.modalities:
            (grid,) = modality.described_by
            if prompt.full[token] and prompt.inputs.get(grid) is None:
                raise ValueError(f"{grid} is missing: positions in a prompt depend on it; pass it with every prompt")
        given = {name: prompt.inputs[name] for name in DESCRIBING if prompt.inputs.get(name) is not None}
        positions, self.model.rope_deltas = self.model.get_rope_index(
            prompt.ids, mm_token_type_ids=kinds, attention_mask=prompt.mask, **given
        )
        return positions
