"""A pruned LLaVA written out by hand on stock parts: eager attention maps, explicit packing, decoding without a cache.

Shares nothing with `modeling/` but the selector, so that it can say what the models there must compute.
"""

from __future__ import annotations

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from vispruner.token_selection import select_vispruner


@torch.no_grad()
def encode(stock, pixel_values):
    """(tiles, 3, h, w) -> features (tiles, N, C), saliency (tiles, N), from full eager attention maps."""
    tower = stock.model.vision_tower
    chosen = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    outputs = tower(pixel_values, output_hidden_states=True, output_attentions=True, return_dict=True)
    tower.set_attn_implementation(chosen)
    return outputs.hidden_states[-2][:, 1:], outputs.attentions[-2][:, :, 0, 1:].mean(1)


@torch.no_grad()
def visual_tokens(stock, pixel_values, budget, image_size=None, tile_mode=None):
    """One image's kept tokens (tokens, D) and the placeholder of a full prompt that each stands for (or None)."""
    if image_size is None:
        features, saliency = encode(stock, pixel_values[None])
        kept = select_vispruner(features, saliency, budget)[0]
        return stock.model.multi_modal_projector(features)[0][kept], kept
    features, saliency = encode(stock, pixel_values)
    projected = stock.model.multi_modal_projector(features)
    if tile_mode == "paper":
        return _paper_tokens(stock, projected, select_vispruner(features, saliency, budget), image_size), None
    return _native_tokens(stock, features, saliency, projected, budget, image_size)


def _grid(stock, image_size):
    config = stock.config
    return get_anyres_image_grid_shape(
        image_size.tolist(), config.image_grid_pinpoints, config.vision_config.image_size
    )


def _paper_tokens(stock, projected, kept, image_size):
    rows, columns = _grid(stock, image_size)
    side = int(projected.shape[1] ** 0.5)
    tokens = [projected[0, index] for index in kept[0]]
    kept_of_tile = [set(tile.tolist()) for tile in kept]
    for y in range(rows * side):
        for x in range(columns * side):
            tile = 1 + (y // side) * columns + x // side
            patch = (y % side) * side + x % side
            if patch in kept_of_tile[tile]:
                tokens.append(projected[tile, patch])
    return torch.stack(tokens)


def _native_tokens(stock, features, saliency, projected, budget, image_size):
    rows, columns = _grid(stock, image_size)
    side = int(projected.shape[1] ** 0.5)
    height, width = image_size.tolist()
    high, wide = rows * side, columns * side
    top = left = 0
    if width / height > wide / high:
        top = (high - int(round(height * wide / width, 7))) // 2
    else:
        left = (wide - int(round(width * high / height, 7))) // 2
    layout = [(0, patch) for patch in range(side * side)]
    for y in range(top, high - top):
        for x in range(left, wide - left):
            layout.append((1 + (y // side) * columns + x // side, (y % side) * side + x % side))
        layout.append(None)
    kept = set()
    for tile in range(len(features)):
        patches = sorted(patch for place in layout if place and place[0] == tile for patch in [place[1]])
        if patches:
            chosen = select_vispruner(features[tile][None, patches], saliency[tile][None, patches], budget)[0]
            kept |= {(tile, patches[index]) for index in chosen.tolist()}
    places = [number for number, place in enumerate(layout) if place is None or place in kept]
    tokens = [stock.model.image_newline if layout[n] is None else projected[layout[n]] for n in places]
    return torch.stack(tokens), torch.tensor(places)


@torch.no_grad()
def greedy(stock, input_ids, images, new_tokens, original_positions=False):
    """Generate for one unpadded prompt (S,) greedily without a cache.

    images   per image (tokens, placeholders, number of placeholders in the full prompt)
    returns  new ids (new_tokens,), logits of the prefill's last position (vocabulary,)
    """
    language_model = stock.model.language_model
    embed = stock.get_input_embeddings()
    rows, positions, column = [], [], 0
    ids = input_ids.tolist()
    pending = list(images)
    while column < len(ids):
        if ids[column] != stock.config.image_token_id:
            rows.append(embed(input_ids[column : column + 1]))
            positions.append(torch.tensor([column]))
            column += 1
            continue
        tokens, placeholders, full = pending.pop(0)
        rows.append(tokens)
        positions.append(torch.arange(len(tokens)) if placeholders is None else column + placeholders)
        column += full
    embeds = torch.cat(rows)[None]
    position_ids = torch.cat(positions)[None] if original_positions else torch.arange(embeds.shape[1])[None]
    new, first = [], None
    for _ in range(new_tokens):
        mask = torch.ones(1, embeds.shape[1], dtype=torch.long)
        hidden = language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        logits = stock.lm_head(hidden[0, -1])
        first = logits if first is None else first
        new.append(int(logits.argmax()))
        embeds = torch.cat([embeds, embed(torch.tensor([[new[-1]]]))], dim=1)
        position_ids = torch.cat([position_ids, position_ids[:, -1:] + 1], dim=1)
    return torch.tensor(new), first
