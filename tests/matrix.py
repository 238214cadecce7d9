"""What tests of all architectures share: a row's tiny stock model beside the pruned one, and what must come out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import Image, Row, Video, draw_weights, rows, variants
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import vispruner

ROWS = {row.model_type: row for row in rows()}
VARIANTS = variants()
EVERY = ROWS | VARIANTS
LLAVAS = [name for name in EVERY if name.partition("-")[0] in ("llava", "llava_next")]
# In the paper's tile mode every patch is a token, those of the padding too: it cannot equal stock's packing, and such
# tokens have no position in a full prompt.
PACKED_AS_STOCK = [name for name, row in EVERY.items() if row.options.get("tile_mode") != "paper"]
RENUMBERED = [name for name in PACKED_AS_STOCK if EVERY[name].positions == "renumber"]
NEW = 6
# Padding and batching change the order of sums in matrix products; activations are of order 1 to 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids"}

HELLO, ASK = [11, 12, 13], [14, 15, 16, 17]
ONE = [HELLO, Image((56, 84), seed=1), ASK]
SEVERAL = [HELLO, Image((84, 112), seed=2), [18], Image((112, 56), seed=3), ASK]
CLIP = [HELLO, Video(8, (56, 84), seed=4), ASK]
MIXED = [HELLO, Image((56, 56), seed=5), [19, 20], Video(8, (56, 56), seed=6), ASK]
TEXT = [[*HELLO, *ASK]]


@dataclass
class Model:
    """A tiny stock checkpoint, the stock model and the pruned one, both with the row's attention."""

    row: Row
    folder: Path
    stock: Any
    pruned: Any

    @property
    def attention(self) -> str:
        return attention_of(self.row)

    def prompt(self, *prompts: list) -> dict[str, Any]:
        return self.row.inputs(prompts)

    def counts(self, inputs: dict[str, Any]) -> tuple[dict, dict]:
        return self.pruned.model.count_visual_tokens(inputs)

    def pixels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The images of a prompt as `get_image_features` and `encode_images` take them."""
        image = self.pruned.modalities[0]
        return {name: inputs[name] for name in (image.pixels, *image.described_by) if name in inputs}

    def shortened(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same prompts as a processor that knows the budget would write them."""
        return self.row.shortened(inputs, self.counts(inputs)[1])

    def prompts(self) -> list[list]:
        """A batch that has all there is: one image, several of different sizes, text alone, videos."""
        return [ONE, SEVERAL, TEXT, *([CLIP, MIXED] if "video" in self.row.modalities else [])]


def attention_of(row: Row) -> str:
    return getattr(row, "attention", "eager")


def made(name: str, folder: Path, config: Any = None, **options: Any) -> Model:
    """Write a row's checkpoint into `folder` and load it, by another config or under other options where given."""
    row = EVERY[name]
    attention = attention_of(row)
    stock = row.stock_class(row.config() if config is None else config).eval()
    draw_weights(stock)
    stock.save_pretrained(folder)
    stock = row.stock_class.from_pretrained(folder, attn_implementation=attention).eval()
    pruned = vispruner.load(folder, **(options or row.options), attn_implementation=attention).eval()
    return Model(row, folder, stock, pruned)


def pair(row: Row, change: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """Return the stock model of a row, with fields of its config changed, and the pruned one of equal weights."""
    config = row.config()
    for name, value in (change or {}).items():
        setattr(config, name, value)
    stock = row.stock_class(config).eval()
    draw_weights(stock)
    architecture = vispruner.architecture_of(row.model_type)
    own = {**config.to_dict(), "vispruner_config": {**row.options, **options}}
    pruned = architecture.model_class(architecture.config_class.from_dict(own)).eval()
    pruned.load_state_dict(stock.state_dict())
    return stock, pruned


def lent(model: Model) -> Iterator[Model]:
    """Lend a model that several tests use; it gets its own options back."""
    before = dict(model.pruned.config.vispruner_config)
    yield model
    model.pruned.config.vispruner_config = before


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**copy.copy(inputs), **options)


def type_of_new_tokens(model: Model) -> int:
    """What new tokens have in `TOKEN_TYPES`: that of text, unless the row says something else."""
    return getattr(model.row, "type_of_new_tokens", 0)


def answers(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    return generate(model, inputs, **options)[:, inputs["input_ids"].shape[1] :]


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**copy.copy(inputs)).logits


def dropped_columns(inputs: dict[str, Any], kept: dict[int, list]) -> torch.Tensor:
    """Return where (1, S) the placeholders are that do not stay; `kept` says per id and item which do."""
    ids, dropped = inputs["input_ids"][0].tolist(), torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for token, items in kept.items():
        columns = [column for column, value in enumerate(ids) if value == token]
        start = 0
        for stays, full in items:
            for place in range(full):
                dropped[0, columns[start + place]] = place not in stays
            start += full
    return dropped


def reference_of(model: Model, inputs: dict[str, Any]) -> tuple[dict[int, list], dict[int, list]]:
    """Return per id and item the tokens that stay; and which placeholders they stand for, of how many (or nothing)."""
    found = model.row.reference(model.stock, inputs, model.pruned.config.vispruner_config)
    full = model.counts(inputs)[0]
    if any(item[1] is None for items in found.values() for item in items):
        return {token: [item[0] for item in items] for token, items in found.items()}, {}
    stays = {
        token: [(set(item[1].tolist()), count) for item, count in zip(items, full[token], strict=True)]
        for token, items in found.items()
    }
    return {token: [item[0] for item in items] for token, items in found.items()}, stays


def greedy_reference(model: Model, inputs: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    """Answer one prompt by hand on the stock model, without a cache: new ids, logits at the end of the prompt."""
    tokens, stays = reference_of(model, inputs)
    if not stays:  # such tokens stand in a prompt of their number alone
        inputs = model.row.shortened(inputs, {token: list(map(len, items)) for token, items in tokens.items()})
    dropped = dropped_columns(inputs, stays)
    if model.row.positions == "original":
        return masked_run(model.stock, inputs, dropped, tokens)
    return embedded_run(model.stock, inputs, dropped, tokens, type_of_new_tokens(model))


@torch.no_grad()
def embedded_run(
    stock: Any, inputs: dict[str, Any], dropped: torch.Tensor, tokens: dict[int, list], new_type: int
) -> tuple[list[int], torch.Tensor]:
    """Hand-built embeddings of the tokens that stay, numbered anew."""
    embeds = stock.get_input_embeddings()(inputs["input_ids"])
    for token, items in tokens.items():
        places = (inputs["input_ids"] == token) & ~dropped
        embeds[places] = torch.cat(items)
    embeds = embeds[~dropped][None]
    types = {"token_type_ids": inputs["token_type_ids"][~dropped][None]} if "token_type_ids" in inputs else {}
    new, ends = [], []
    for _ in range(NEW):
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        ends.append(stock(inputs_embeds=embeds, attention_mask=mask, **types).logits[0, -1])
        new.append(int(ends[-1].argmax()))
        types = {name: torch.nn.functional.pad(value, (0, 1), value=new_type) for name, value in types.items()}
        embeds = torch.cat([embeds, stock.get_input_embeddings()(torch.tensor([[new[-1]]]))], dim=1)
    return new, ends[0]


@torch.no_grad()
def masked_run(
    stock: Any, inputs: dict[str, Any], dropped: torch.Tensor, tokens: dict[int, list]
) -> tuple[list[int], torch.Tensor]:
    """The full prompt with its own positions, and nothing to be seen of the tokens that are dropped."""
    run, new, ends = dict(inputs), [], []
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    positions, _ = stock.model.get_rope_index(
        inputs["input_ids"], **{name: inputs[name] for name in names if name in inputs}
    )
    mask = inputs["attention_mask"].masked_fill(dropped, 0)
    for _ in range(NEW):
        ends.append(stock(**{**run, "position_ids": positions, "attention_mask": mask}).logits[0, -1])
        new.append(int(ends[-1].argmax()))
        run["input_ids"] = torch.cat([run["input_ids"], torch.tensor([[new[-1]]])], dim=1)
        run["mm_token_type_ids"] = torch.nn.functional.pad(run["mm_token_type_ids"], (0, 1))
        positions = torch.cat([positions, positions.amax(0, keepdim=True)[..., -1:].expand(3, -1, -1) + 1], dim=-1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return new, ends[0]


def require_the_reference(model: Model, prompt: list) -> None:
    inputs = model.prompt(prompt)
    full, kept = model.counts(inputs)
    assert any(sum(kept[token]) < sum(full[token]) for token in full)
    new, first = greedy_reference(model, inputs)
    result = generate(model.pruned, inputs, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(result.logits[0][0], first, **TOLERANCE)
    assert result.sequences[0, inputs["input_ids"].shape[1] :].tolist() == new
    torch.testing.assert_close(logits(model.pruned, inputs)[0, -1], first, **TOLERANCE)
    lost = sum(map(sum, full.values())) - sum(map(sum, kept.values()))
    assert result.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] - lost + NEW - 1


def attending_by(attention: Any, model: Any) -> Any:
    """Have the vision encoder of a model attend by a function of the test's own, without masks that skip."""
    AttentionInterface.register("of_a_test", attention)
    AttentionMaskInterface.register("of_a_test", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    for module in model.model.vision_attentions:
        module.config._stock_config._attn_implementation = "of_a_test"
    return model
