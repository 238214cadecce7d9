"""Images that were encoded and pruned once, to ask several questions about them.

inputs = processor(images=image, text=question, return_tensors="pt")
images = model.encode_images(inputs.pop("pixel_values"), inputs.pop("image_sizes", None))
model.generate(**inputs, encoded_images=images)
model.generate(**other_inputs, encoded_images=images)  # neither encodes nor selects
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .visual_features import PrunedImageFeatures, tokens_of

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
    told             per image (T,): by what the language model ranks them, where the encoder says so
    """

    tokens: tuple[torch.Tensor, ...]
    kept_indices: tuple[torch.Tensor, ...]
    placeholders: tuple[torch.Tensor | None, ...]
    full_counts: tuple[int, ...]
    vispruner_config: dict[str, Any]
    deepstack: tuple[torch.Tensor, ...] | None = None
    in_one_tensor: bool = False
    told: tuple[torch.Tensor, ...] | None = None

    @classmethod
    def from_features(cls, features: PrunedImageFeatures, vispruner_config: dict[str, Any]) -> "EncodedImages":
        """Keep of a vision output what questions need, and nothing of the encoder's own size."""
        made = features.pooler_output
        tokens = () if made is None else tuple(tokens_of(features))
        levels = features.deepstack_features
        return cls(
            tokens,
            kept_indices=tuple(features.kept_indices or ()),
            placeholders=tuple(features.placeholders or [None] * len(tokens)),
            full_counts=tuple(features.full_counts or ()),
            vispruner_config=dict(vispruner_config),
            deepstack=None if levels is None else tuple(torch.stack(image) for image in zip(*levels, strict=True)),
            in_one_tensor=isinstance(made, torch.Tensor),
            told=None if features.told is None else tuple(features.told),
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
            told=None if self.told is None else list(self.told),
        )

    @property
    def kept_counts(self) -> tuple[int, ...]:
        """Per image the placeholders of a shortened prompt."""
        return tuple(len(tokens) for tokens in self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: Any) -> "EncodedImages":
        """Return some of the images: by a number, a slice, a sequence of numbers, or a mask of one bool per image."""
        numbers = self._numbers(chosen)

        def take(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[number] for number in numbers)

        return replace(
            self,
            tokens=take(self.tokens),
            kept_indices=take(self.kept_indices),
            placeholders=take(self.placeholders),
            full_counts=take(self.full_counts),
            deepstack=None if self.deepstack is None else take(self.deepstack),
            told=None if self.told is None else take(self.told),
        )

    def _numbers(self, chosen: Any) -> list[int]:
        if isinstance(chosen, slice):
            return list(range(len(self))[chosen])
        if hasattr(chosen, "tolist"):  # of torch or numpy
            chosen = chosen.tolist()
        one = not isinstance(chosen, (list, tuple, range))
        wanted = [chosen] if one else [each.item() if hasattr(each, "item") else each for each in chosen]
        if wanted and not one and all(isinstance(each, bool) for each in wanted):
            if len(wanted) != len(self):
                raise IndexError(f"a mask must have one entry for each of the {len(self)} images, got {len(wanted)}")
            return [number for number, each in enumerate(wanted) if each]
        if any(isinstance(each, bool) or not isinstance(each, int) for each in wanted):
            raise TypeError(f"images are chosen by numbers, a slice or a mask of bools, got {chosen!r}")
        if any(not -len(self) <= each < len(self) for each in wanted):
            raise IndexError(f"there are {len(self)} images, numbered from 0, got {chosen!r}")
        return wanted

    def __add__(self, other: "EncodedImages") -> "EncodedImages":
        self.require_made_with(other.vispruner_config)
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            kept_indices=self.kept_indices + other.kept_indices,
            placeholders=self.placeholders + other.placeholders,
            full_counts=self.full_counts + other.full_counts,
            deepstack=None if self.deepstack is None else self.deepstack + (other.deepstack or ()),
            told=None if self.told is None else self.told + (other.told or ()),
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
            told=None if self.told is None else follow(self.told),
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


def features_of(images: Any, modality: str, vispruner_config: dict[str, Any]) -> dict[str, Any]:
    """Return images that were encoded before as stock takes them, by modality, in a dict of its own.

    images    what `encode_images` returned, or what stock calls `mm_encoder_outputs`: {modality: vision output}
    modality  the name of what `encode_images` encodes
    Raises TypeError for anything else, and ValueError for images made under another `vispruner_config`.
    """
    given = images if isinstance(images, Mapping) and not hasattr(images, "pooler_output") else {modality: images}
    features = {}
    for name, value in given.items():
        if hasattr(value, "to_features"):
            value.require_made_with(vispruner_config)
            value = value.to_features() if len(value) else None
        elif value is not None and getattr(value, "pooler_output", None) is None:
            raise TypeError(
                "encoded_images and mm_encoder_outputs must be what encode_images returns, or a dict of what "
                f"get_image_features and get_video_features return, got {type(value).__name__}"
            )
        if value is not None and len(value.pooler_output):  # else a prompt of text alone
            features[name] = value
    return features
