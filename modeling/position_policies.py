"""What `position_policy` means: how the tokens of a shortened prompt are numbered. One object for each policy."""

import torch

from .prompt_reading import Prompt
from .prompt_shortening import CachedPrompt, KeptColumns


class Renumbered:
    """Tokens are counted anew, as in a prompt that was always that short (the paper). Stock numbers it by itself."""

    name = "renumber"
    keeps_original = False  # whether the position of a token depends on which others stay

    def in_forward(self, prompt: Prompt) -> torch.Tensor | None:
        """Return the positions (..., B, S) that stock `forward` gives a full prompt; None leaves them to stock."""
        return None

    def in_generate(self, prompt: Prompt) -> torch.Tensor | None:
        """Return the positions (..., B, S) that stock `generate` gives a full prompt; None leaves them to stock."""
        return None

    def of_kept(self, columns: KeptColumns, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the positions (..., B, W) of a shortened prompt, given those (..., B, S) of the full one.

        mask  (B, W) of the shortened prompt, None where all is seen
        """
        return columns.renumbered(positions)

    def after(self, cached: CachedPrompt, past: int, new: int, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Return the positions (..., B, new) of text behind `past` cached tokens, given those the caller counts by."""
        if positions is None or cached.columns is None:
            return positions
        return positions + cached.columns.grown[:, -1:].to(positions.device)


class Original(Renumbered):
    """Every token keeps the position that it has in the full prompt.

    first  the position of a prompt's first token in stock `forward`
    """

    name = "original"
    keeps_original = True

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def in_forward(self, prompt: Prompt) -> torch.Tensor | None:
        """Return (B, S): the columns, counted from where the cache ends."""
        start = self.first + prompt.positions_before
        return (start + torch.arange(prompt.width, device=prompt.device)).expand(prompt.rows, -1)

    def in_generate(self, prompt: Prompt) -> torch.Tensor:
        """Return (B, S): the tokens, counted without padding."""
        if prompt.mask is None:
            return torch.arange(prompt.width, device=prompt.device).expand(prompt.rows, -1)
        return (prompt.mask.long().cumsum(-1) - 1).clamp(min=0)

    def of_kept(self, columns: KeptColumns, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return (B, W): those of the columns that stay."""
        return columns.take(positions.expand(*positions.shape[:-2], len(columns.index), -1), 0)

    def after(self, cached: CachedPrompt, past: int, new: int, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Return (1, new): they go on from where the full prompt ended."""
        if positions is not None or cached.skipped == 0:
            return positions
        return (self.first + past + cached.skipped + torch.arange(new))[None]
