"""The worker's part, shared by the vLLM models: run the encoder, read what ranks its tokens, keep and project some.

The method is the package's own: nothing here knows how tokens are ranked.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed.communication_op import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.models.utils import WeightsMapper

from vispruner.choosing import choose, choose_each
from vispruner.codebook_file import find_codebook, read_codebook
from vispruner.configuration_vispruner import VisPrunerOptions
from vispruner.selector_registry import SELECTORS, Selection
from vispruner.tile_encoder import mean_of_merged
from vispruner.visual_attention import SALIENCY_KINDS, Reading
from vispruner.visual_features import VisualTokens

from .launch_options import Readings, encoder_of, readings
from .request_budgets import from_numbers, said
from .vllm_launch import launch_options, read_weights_of_base, refuse_bypasses
from .vllm_prompts import MODALITIES, field_of

logger = init_logger(f"vllm.{__name__}")  # vLLM shows only what its own loggers say

# What transformers saves lacks a level of the tower's names that vLLM's own LLaVA expects.
TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
)


@dataclass(frozen=True)
class Asked:
    """The pictures of one modality in a batch, as the stock model has them, with the options of each's request."""

    inputs: Any
    options: list[VisPrunerOptions]


class Read(NamedTuple):
    """What was read of the encoder's attention, of B images or tiles: as in `VisualTokens`."""

    saliency: torch.Tensor
    layer_saliency: torch.Tensor | None
    further: dict[str, torch.Tensor]


class PrunedVision:
    """Mixin for a multi-modal model of vLLM. Goes before the stock class in the bases. An architecture says:

    vision_attentions  the encoder's attention modules, each with an `MMEncoderAttention` in `attn`
    project            features (..., C) to visual tokens (..., D)
    tokens_of_a_tile   how many visual tokens an image or tile has, for the log; None where that depends on its size
    folds_projected    whether methods that fold tokens together fold projected ones, as in transformers
    """

    config: Any
    vispruner_options: VisPrunerOptions
    vispruner_codebook: torch.Tensor | None
    folds_projected = False
    supports_tower_connector_lora = False  # stock counts the rows of tower and projector without pruning

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        options = launch_options(model_config)
        refuse_bypasses(vllm_config, options)
        codebook = _codebook(model_config, options)
        read_weights_of_base(model_config, options)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.vispruner_options, self.vispruner_codebook = options, codebook
        tokens = self.tokens_of_a_tile
        if tokens is None:
            logger.info_once("VisPruner keeps of the visual tokens of every image or frame: %s", said(options))
        else:
            kept = options.budget(tokens)
            logger.info_once("VisPruner keeps %d of %d visual tokens per image or tile", kept, tokens)

    @property
    def vision_attentions(self) -> Sequence[Any]:
        raise AttributeError(f"{type(self).__name__} must say where its encoder's attention modules are")

    @property
    def tokens_of_a_tile(self) -> int | None:
        raise AttributeError(f"{type(self).__name__} must say how many visual tokens a tile has")

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features (..., C) into visual tokens (..., D), for the selectors that compare those."""
        return self.multi_modal_projector(features)  # type: ignore[attr-defined]

    def _parse_and_validate_image_input(self, **kwargs: Any) -> Any:
        inputs = super()._parse_and_validate_image_input(**kwargs)  # type: ignore[misc]
        return self._asked(inputs, kwargs.get(field_of("image")))

    def _parse_and_validate_video_input(self, **kwargs: Any) -> Any:
        inputs = super()._parse_and_validate_video_input(**kwargs)  # type: ignore[misc]
        return self._asked(inputs, kwargs.get(field_of("video")))

    def _asked(self, inputs: Any, budgets: torch.Tensor | None) -> Any:
        if inputs is None or budgets is None:
            return inputs
        return Asked(inputs, [from_numbers(self.vispruner_options, row[:2]) for row in budgets.tolist()])

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Stock; the number of tokens must be that of the placeholders, or nothing can be served."""
        embeddings = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        budgets = [kwargs[field_of(name)] for name in MODALITIES if field_of(name) in kwargs]
        if len(budgets) == 1:  # vLLM encodes one modality at a time
            written, made = budgets[0][:, 2].long().tolist(), [len(tokens) for tokens in embeddings]
            if written != made:
                raise RuntimeError(
                    f"pictures with {written} placeholders in their prompts have {made} visual tokens: this version "
                    "of vLLM, or this processor_config.json, is not supported"
                )
        return embeddings

    @contextmanager
    def read_attention(
        self, seen: torch.Tensor | None = None, chunks: Sequence[int] | None = None
    ) -> Iterator[Callable[[torch.Tensor], Read]]:
        """Read what the method wants of the encoder while the `with` block runs it; then the function returns it.

        The function takes the tokens that the encoder attends over, (B, N, ...), but for [CLS].

        seen    (B, tokens of the encoder), False for padding; None where there is none
        chunks  of how many tokens each image is, where one sequence (1, N) holds all of them
        """
        wanted = readings(self.config, self.vispruner_options)
        found: dict[Reading, torch.Tensor] = {}

        def record(reading: Reading) -> Callable[..., None]:
            def hook(attention: Any, arguments: tuple, given: dict[str, Any]) -> None:
                if reading in found:
                    raise RuntimeError("the encoder ran twice: this version of vLLM is not supported")
                names = enumerate(("query", "key"))  # some encoders name them, some do not
                query, key = (arguments[at] if at < len(arguments) else given[name] for at, name in names)
                found[reading] = self._read(reading.kind, attention, query, key, seen, chunks)

            return hook

        with ExitStack() as stack:
            for reading in set(wanted.all):
                module = self.vision_attentions[reading.layer].attn
                stack.callback(module.register_forward_pre_hook(record(reading), with_kwargs=True).remove)
            yield lambda tokens: _in_order(wanted, found, tokens)

    def _read(
        self,
        kind: str,
        attention: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        seen: torch.Tensor | None,
        chunks: Sequence[int] | None,
    ) -> torch.Tensor:
        """Return what a reading is, (B, N) or more, of queries and keys (B, N, H * d) or (B, N, H, d)."""
        query, key = (_by_head(states, attention) for states in (query, key))
        if chunks is None:
            return self.of_all_ranks(kind, attention, SALIENCY_KINDS[kind](query, key, attention.scale, seen))
        alike = [(size, len(list(group))) for size, group in groupby(chunks)]  # neighbours of one size, read together
        lengths, parts = [size * count for size, count in alike], []
        for (size, _), q, k in zip(alike, query.split(lengths, dim=2), key.split(lengths, dim=2), strict=True):
            q, k = (states[0].unflatten(1, (-1, size)).transpose(0, 1) for states in (q, k))
            parts.append(SALIENCY_KINDS[kind](q, k, attention.scale).flatten(0, 1))
        return self.of_all_ranks(kind, attention, torch.cat(parts)[None])

    def of_all_ranks(self, kind: str, attention: Any, read: torch.Tensor) -> torch.Tensor:
        """Join what the ranks have read, each of some heads: all must rank by all of them."""
        ranks = self.attention_heads // attention.num_heads
        if ranks == 1:
            return read
        if kind in ("cls_query", "raw_keys"):  # heads side by side
            return tensor_model_parallel_all_gather(read.contiguous(), dim=-1)
        return tensor_model_parallel_all_reduce(read.contiguous()) / ranks

    @property
    def attention_heads(self) -> int:
        return self.config.vision_config.num_attention_heads

    def select(self, tokens: VisualTokens, visual_token_num: int) -> Selection:
        """Return which tokens stay, T of each image or tile."""
        codebook = self.vispruner_codebook
        return choose(self.vispruner_options, tokens, visual_token_num, project=self.project, codebook=codebook)

    def select_each(self, images: Sequence[VisualTokens], budgets: Sequence[int]) -> list[Selection]:
        """Return which tokens stay of images (1, N, C) of any sizes, like those together."""
        return choose_each(images, budgets, self.select)

    def prune_tiles(
        self, tokens: VisualTokens, tiles: Sequence[int], asked: Sequence[VisPrunerOptions]
    ) -> list[torch.Tensor]:
        """Keep of every tile what its request's budget leaves, and project it.

        tiles    how many of the B of `tokens` each image has; asked  the options of each image
        returns  (tokens, D) of each image
        """
        rows: dict[int, torch.Tensor] = {}
        for budget, images, part in self.by_budget(tokens, tiles, asked):
            kept = self._kept(part, budget).split([tiles[image] for image in images])
            rows |= dict(zip(images, (image.flatten(0, 1) for image in kept), strict=True))
        return [rows[image] for image in range(len(asked))]

    def by_budget(
        self, tokens: VisualTokens, tiles: Sequence[int], asked: Sequence[VisPrunerOptions]
    ) -> Iterator[tuple[int, list[int], VisualTokens]]:
        """Yield every budget of a tile, the images that have it, and the tokens of these, for `prune_tiles`."""
        budgets = [options.budget(tokens.features.shape[1]) for options in asked]
        places = torch.arange(len(tokens.features)).split(list(tiles))
        for budget in dict.fromkeys(budgets):
            images = [image for image, own in enumerate(budgets) if own == budget]
            yield budget, images, _some_of(tokens, torch.cat([places[image] for image in images]).tolist())

    def _kept(self, tokens: VisualTokens, budget: int) -> torch.Tensor:
        selection = self.select(tokens, budget)
        if self.folds_projected or SELECTORS[self.vispruner_options.method].merge_on == "projected":
            return selection.take(self.project(tokens.features))
        return self.project(selection.take(tokens.features))


def merged_tokens(patches: torch.Tensor, read: Read, merge: Callable[[torch.Tensor], torch.Tensor]) -> VisualTokens:
    """Return the tokens (tiles, M, ...) that blocks of patches (tiles, N, C) are merged into by `merge`."""
    features = merge(patches)
    further = {name: mean_of_merged(given.mT, merge).mT for name, given in read.further.items()}
    side = round(features.shape[1] ** 0.5)
    layers = None if read.layer_saliency is None else mean_of_merged(read.layer_saliency, merge)
    return VisualTokens(features, mean_of_merged(read.saliency, merge), layers, (side, side), further=further)


def _in_order(wanted: Readings, found: Mapping[Reading, torch.Tensor], tokens: torch.Tensor) -> Read:
    if missing := set(wanted.all) - set(found):
        raise RuntimeError(
            f"attention was not read in every layer that tokens are ranked by ({sorted(missing)}): this version of "
            "vLLM is not supported"
        )
    layers = torch.stack([found[reading] for reading in wanted.others], dim=1) if wanted.others else None
    saliency = tokens.new_zeros(tokens.shape[:2], dtype=torch.float32) if wanted.main is None else found[wanted.main]
    return Read(saliency, layers, {name: found[reading] for name, reading in wanted.further.items()})


def _by_head(states: torch.Tensor, attention: Any) -> torch.Tensor:
    """Return (B, H, N, d)."""
    if states.dim() == 3:
        states = states.unflatten(-1, (attention.num_heads, -1))
    return states.transpose(1, 2)


def _some_of(tokens: VisualTokens, numbers: Sequence[int]) -> VisualTokens:
    """Return some of B images or tiles."""
    if len(numbers) == len(tokens.features):
        return tokens
    return replace(
        tokens,
        features=tokens.features[numbers],
        saliency=tokens.saliency[numbers],
        layer_saliency=None if tokens.layer_saliency is None else tokens.layer_saliency[numbers],
        further={name: given[numbers] for name, given in tokens.further.items()},
    )


def _codebook(model_config: ModelConfig, options: VisPrunerOptions) -> torch.Tensor | None:
    if options.method == "none" or "codebook" not in SELECTORS[options.method].needs or options.codebook is None:
        return None
    path = find_codebook(options.codebook, model_config.model, {"revision": model_config.revision})
    return read_codebook(path, model_config.hf_config.get_text_config().hidden_size)


class PrunedTower(PrunedVision):
    """For the LLaVA family: a CLIP or SigLIP tower of patches, which the projector turns into visual tokens."""

    vision_tower: Any

    @property
    def vision_attentions(self) -> Sequence[Any]:
        return [layer.self_attn for layer in self.vision_tower.vision_model.encoder.layers]

    @property
    def side(self) -> int:
        """Patches along one side of an image or tile."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    @property
    def tokens_of_a_tile(self) -> int:
        return self.side**2

    def encode(self, pixel_values: torch.Tensor) -> VisualTokens:
        """Run the tower on images or tiles (B, 3, height, width)."""
        with self.read_attention() as read:
            features = self.vision_tower(pixel_values, feature_select_strategy="full")
        patches = features[:, 1:] if encoder_of(self.config).has_cls else features
        saliency, layers, further = read(patches)
        if encoder_of(self.config).has_cls:
            further["cls_feature"] = features[:, 0]
        return VisualTokens(patches, saliency, layers, (self.side, self.side), further=further)
