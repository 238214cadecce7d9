"""The pruned architectures as one table, and how prompts for them are made: what the model tests share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference import greedy, visual_tokens
from tiny_llava import write_tiny_llava, write_tiny_llava_next
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

import vispruner

ONE = "USER: <image>\nWhat is this? ASSISTANT:"
TWO = "USER: <image> and <image>\nDo these two pictures differ? ASSISTANT:"
NONE = "USER: What color is the sky at night? ASSISTANT:"
NEW = 8
# Padding and batching change the order of sums in matrix products, never more than this on these models.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@dataclass
class Case:
    """One architecture: its stock model, the pruned one, and how prompts are made for them."""

    name: str
    repo: str
    stock_class: type
    budget: int
    photo: Image.Image
    options: dict

    @cached_property
    def stock(self):
        return self.stock_class.from_pretrained(self.repo).eval()

    @cached_property
    def model(self):
        return vispruner.load(self.repo, visual_token_num=self.budget, **self.options).eval()

    @cached_property
    def processor(self):
        return AutoProcessor.from_pretrained(self.repo)

    @cached_property
    def pictures(self):
        turned = self.photo.transpose(Image.Transpose.ROTATE_90)
        return [self.photo, turned, self.photo.crop((60, 40, 260, 240))]

    @property
    def tile_mode(self):
        return self.options.get("tile_mode")

    def inputs(self, texts, images=(), side="left"):
        self.processor.tokenizer.padding_side = side
        return self.processor(images=list(images) or None, text=texts, return_tensors="pt", padding=True)

    def counts(self, inputs):
        return self.model.visual_token_counts(inputs["pixel_values"], inputs.get("image_sizes"))

    def reference(self, inputs, new_tokens=NEW, original_positions=False):
        """The hand-built answer to one unpadded prompt."""
        images = []
        for number, pixels in enumerate(inputs["pixel_values"]):
            size = inputs["image_sizes"][number] if "image_sizes" in inputs else None
            if size is not None:
                pixels = pixels[: self.tiles(size)]
            tokens, placeholders = visual_tokens(self.stock, pixels, self.budget, size, self.tile_mode)
            images.append((tokens, placeholders, self.counts(inputs)[0][number]))
        return greedy(self.stock, inputs["input_ids"][0], images, new_tokens, original_positions)

    def tiles(self, size):
        rows, columns = self.model.model.tile_grid(size)
        return 1 + rows * columns

    def shortened(self, inputs):
        """The same prompts as a processor that knows the budget would write them (one image or none a row)."""
        _, kept = self.counts(inputs)
        image = self.model.config.image_token_id
        rows, kept = [], list(kept)
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids = ids[mask.bool()].tolist()
            if image in ids:
                first, count = ids.index(image), ids.count(image)
                ids = ids[:first] + [image] * kept.pop(0) + ids[first + count :]
            rows.append(ids)
        width, pad = max(map(len, rows)), self.processor.tokenizer.pad_token_id
        short = dict(inputs)
        short["input_ids"] = torch.tensor([[pad] * (width - len(ids)) + ids for ids in rows])
        short["attention_mask"] = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
        return short


CASES = ("llava", "llava-mistral", "next-paper", "next-native", "next-mistral")


def all_cases(llava_repo: Path, next_repo: Path, mistral_folder: Path, photo: Image.Image) -> dict[str, Case]:
    mistral = write_tiny_llava(mistral_folder / "llava", image_size=112, text_model="mistral")
    next_mistral = write_tiny_llava_next(mistral_folder / "next", image_size=56, text_model="mistral")
    llava, next_ = LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
    paper, native = {"tile_mode": "paper"}, {"tile_mode": "native"}
    table = (
        Case("llava", str(llava_repo), llava, 9, photo, {}),
        Case("llava-mistral", str(mistral), llava, 6, photo, {}),
        Case("next-paper", str(next_repo), next_, 5, photo, paper),
        Case("next-native", str(next_repo), next_, 5, photo, native),
        Case("next-mistral", str(next_mistral), next_, 4, photo, native),
    )
    return {case.name: case for case in table}


# In the paper's tile mode every patch is a token, those of the padding too: it cannot equal stock's packing, and such
# tokens have no position in a full prompt.
packed_as_stock = pytest.mark.parametrize("case", [name for name in CASES if name != "next-paper"], indirect=True)


def generate(model, inputs, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, **options)


def answers(model, inputs, **options):
    return generate(model, inputs, **options)[:, inputs["input_ids"].shape[1] :]
