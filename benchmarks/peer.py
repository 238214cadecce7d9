"""The fair peer: VisPruner as research code does it, on stock parts, to be measured beside ours.

Written from the paper (arXiv 2412.01818) and its specification; no line is the authors'. What research code does and
this does too:
* the vision tower runs with eager attention and returns the attention maps and hidden states of all layers
* cosine similarities are computed again in every round, from the tokens still in
* all N visual tokens pass the projector, and the kept ones are gathered afterwards
* the prompt's embeddings are spliced by hand and handed to `generate` as `inputs_embeds`
It is fair where it could be slower: it prunes a whole batch at once, never waits for the device within a round, and
its language model uses the same attention kernels and KV cache as stock and ours.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin, LlavaConfig, LlavaForConditionalGeneration, LlavaModel

ROUND = 8
IMPORTANT_RATIO = 0.5


def select_per_round(features: torch.Tensor, attention: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    """Choose (B, T) tokens, ascending, from features (B, N, C) and attention (B, N), comparing anew in every round."""
    important_num = int(visual_token_num * IMPORTANT_RATIO)
    diverse_num = visual_token_num - important_num
    order = attention.argsort(dim=-1, descending=True, stable=True)
    important, residual = order[:, :important_num], order[:, important_num:]
    directions = features / features.norm(dim=-1, keepdim=True)
    while (left := residual.shape[1]) > diverse_num:
        drop = min(ROUND, left - diverse_num, (left + 1) // 2)
        current = directions.gather(1, residual[..., None].expand(-1, -1, features.shape[-1]))
        similarity = current[:, 0::2] @ current[:, 1::2].transpose(1, 2)
        ranked = similarity.amax(dim=-1).argsort(dim=-1, descending=True, stable=True)
        survivors = residual[:, 0::2].gather(1, ranked[:, drop:])
        residual = torch.cat([survivors, residual[:, 1::2]], dim=1)
    return torch.cat([important, residual], dim=1).sort(dim=-1).values


class PerRound(torch.nn.Module):
    """The choice, as a module so that hooks see when it is made."""

    def forward(self, features: torch.Tensor, attention: torch.Tensor, visual_token_num: int) -> torch.Tensor:
        """Return the kept indices (B, T), ascending."""
        batch, tokens = attention.shape
        if visual_token_num >= tokens:
            return torch.arange(tokens, device=features.device).expand(batch, -1)
        return select_per_round(features, attention, visual_token_num)


class PeerLlavaModel(LlavaModel):
    """`LlavaModel` that prunes while it splices the prompt."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.vision_tower.set_attn_implementation("eager")
        self.visual_token_num = 128
        self.selection = PerRound()

    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, height, width) -> patch features (B, N, C), attention (B, N) that [CLS] pays to each patch."""
        outputs = self.vision_tower(pixel_values, output_hidden_states=True, output_attentions=True, return_dict=True)
        layer = self.config.vision_feature_layer
        return outputs.hidden_states[layer][:, 1:], outputs.attentions[layer][:, :, 0, 1:].mean(dim=1)

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed prompts (B, S) of one image a row, of which only the kept visual tokens stay: (B, S - N + T, D)."""
        features, attention = self.encode(pixel_values)
        kept = self.selection(features, attention, self.visual_token_num)
        projected = self.multi_modal_projector(features)
        images = projected.gather(1, kept[..., None].expand(-1, -1, projected.shape[-1]))
        rows = []
        for ids, image in zip(input_ids, images, strict=True):
            places = (ids == self.config.image_token_id).nonzero()[:, 0]
            first, last = int(places[0]), int(places[-1])
            words = self.get_input_embeddings()(torch.cat([ids[:first], ids[last + 1 :]]))
            rows.append(torch.cat([words[:first], image.to(words.dtype), words[first:]]))
        return torch.stack(rows)


class PeerLlavaForConditionalGeneration(LlavaForConditionalGeneration, GenerationMixin):
    """`generate(input_ids, pixel_values)` with pruning; `model.model.visual_token_num` is its budget."""

    def __init__(self, config: LlavaConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # the stock one would build a stock LlavaModel
        self.model = PeerLlavaModel(config)
        width, vocabulary = config.text_config.hidden_size, config.text_config.vocab_size
        self.lm_head = torch.nn.Linear(width, vocabulary, bias=False)
        self.post_init()

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **options: Any) -> Any:
        """Answer full prompts of equal length without padding, one image each."""
        options.pop("attention_mask", None)
        return super().generate(inputs_embeds=self.model.embed(input_ids, pixel_values), **options)
