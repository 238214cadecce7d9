"""Images that were encoded and pruned once, to ask several questions about them.

inputs = processor(images=image, text=question, return_tensors="pt")
images = model.encode_images(inputs.pop("pixel_values"), inputs.pop("image_sizes", None))
model.generate(**inputs, encoded_images=images)
model.generate(**other_inputs, encoded_images=images)  # neither encodes nor selects
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .pruned_encoder import PrunedImageFeatures

# Fields of vispruner_config that say nothing about which tokens an image has.
NOT_ABOUT_TOKENS = (
    "position_policy",
    "base_model_name_or_path",
    "base_model_revision",
    "weights",
    "vispruner_version",
)


@dataclass(frozen=True)
class EncodedImages:
    """What `encode_images` returns; `forward` and `generate` take it as `encoded_images` in place of pixel values.

    A sequence of images in the order in which prompts show them: `images[0]`, `images[[0, 0, 1]]` and `a + b` make
    others of the same tokens, `images[[0] * 3]` for a batch of three questions about one image. It holds no gradients
    and refuses a model whose `vispruner_config` would choose other tokens.

    tokens           per image (T, D): kept visual tokens, projected
    kept_indices     per image (T,): tile * N + patch, newline = -1
    placeholders     per image (T,): placeholder of a full prompt that each token stands for; None where there is none
    full_counts      per image the placeholders of a full prompt
    vispruner_config what they were made with
    deepstack        per image (levels, T, D), where the model has such features (Qwen3-VL)
    in_one_tensor    whether the stock model has the tokens of all images in one tensor
    """

    tokens: tuple[torch.Tensor, ...]
    kept_indices: tuple[torch.Tensor, ...]
    placeholders: tuple[torch.Tensor | None, ...]
    full_counts: tuple[int, ...]
    vispruner_config: dict[str, Any]
    deepstack: tuple[torch.Tensor, ...] | None = None
    in_one_tensor: bool = False

    @classmethod
    def from_features(cls, features: PrunedImageFeatures, vispruner_config: dict[str, Any]) -> "EncodedImages":
        """Keep of a vision output what questions need, and nothing of the encoder's own size."""
        made = features.pooler_output
        tokens = () if made is None else tuple(made)
        levels = features.deepstack_features
        return cls(
            tokens,
            kept_indices=tuple(features.kept_indices or ()),
            placeholders=tuple(features.placeholders or [None] * len(tokens)),
            full_counts=tuple(features.full_counts or ()),
            vispruner_config=dict(vispruner_config),
            deepstack=None if levels is None else tuple(torch.stack(image) for image in zip(*levels, strict=True)),
            in_one_tensor=isinstance(made, torch.Tensor),
        )

    def to_features(self) -> PrunedImageFeatures:
        """Return them as the vision output that stock code reads, in lists of its own."""
        placeholders = [image for image in self.placeholders if image is not None]
        levels = None if self.deepstack is None else [list(level) for level in zip(*self.deepstack, strict=True)]
        return PrunedImageFeatures(
            pooler_output=torch.stack(self.tokens) if self.in_one_tensor else list(self.tokens),
            kept_indices=list(self.kept_indices),
            placeholders=placeholders if len(placeholders) == len(self) else None,
            full_counts=list(self.full_counts),
            deepstack_features=levels,
        )

    @property
    def kept_counts(self) -> tuple[int, ...]:
        """Per image the placeholders of a shortened prompt."""
        return tuple(len(tokens) for tokens in self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: int | slice | Sequence[int]) -> "EncodedImages":
        numbers = range(len(self))[chosen] if isinstance(chosen, (int, slice)) else chosen
        numbers = [numbers] if isinstance(numbers, int) else list(numbers)

        def take(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[number] for number in numbers)

        return replace(
            self,
            tokens=take(self.tokens),
            kept_indices=take(self.kept_indices),
            placeholders=take(self.placeholders),
            full_counts=take(self.full_counts),
            deepstack=None if self.deepstack is None else take(self.deepstack),
        )

    def __add__(self, other: "EncodedImages") -> "EncodedImages":
        self.require_made_with(other.vispruner_config)
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            kept_indices=self.kept_indices + other.kept_indices,
            placeholders=self.placeholders + other.placeholders,
            full_counts=self.full_counts + other.full_counts,
            deepstack=None if self.deepstack is None else self.deepstack + (other.deepstack or ()),
        )

    def to(self, *args: Any, **kwargs: Any) -> "EncodedImages":
        """Move to a device, or cast the tokens to a dtype, as `torch.Tensor.to` does; a model moves them by itself."""
        tokens = tuple(image.to(*args, **kwargs) for image in self.tokens)

        def follow(indices: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
            pairs = zip(indices, tokens, strict=True)
            return tuple(None if index is None else index.to(image.device) for index, image in pairs)

        return replace(
            self,
            tokens=tokens,
            kept_indices=follow(self.kept_indices),
            placeholders=follow(self.placeholders),
            deepstack=None if self.deepstack is None else tuple(image.to(*args, **kwargs) for image in self.deepstack),
        )

    def require_made_with(self, vispruner_config: dict[str, Any]) -> None:
        """Raise ValueError naming the fields by which `vispruner_config` would choose other tokens."""
        fields = [name for name in {**self.vispruner_config, **vispruner_config} if name not in NOT_ABOUT_TOKENS]
        changed = [name for name in fields if self.vispruner_config.get(name) != vispruner_config.get(name)]
        if changed:
            made, now = (
                ", ".join(f"{name}={config.get(name)!r}" for name in changed)
                for config in (self.vispruner_config, vispruner_config)
            )
            raise ValueError(
                f"encoded_images were made with vispruner_config {made}, which is now {now}: encode the images again "
                "with encode_images, or set that configuration again"
            )
