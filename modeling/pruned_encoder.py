"""The base model's part of pruning: read saliency while an encoder runs, select, and say what was kept.

Knows the registry of selectors; where attention and tokens are in a model is the architecture file's business.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging

from .choosing import choose, choose_each, watch_choices
from .clip_text import TextTower, find_text_tower, read_text_tower
from .codebook_file import find_codebook, read_codebook
from .configuration_vispruner import used_vision_layers
from .encoder_stage import EncoderStage
from .pruned_forward import PrunedForwardMixin
from .selector_inputs import most_attended_first
from .selectors import SELECTORS, Selection, selector_named
from .visual_attention import Reading, SaliencyTap, make_tappable
from .visual_features import PrunedImageFeatures, TokenView, VisualTokens, kept_counts_of

logger = logging.get_logger(__name__)

DROPPED_LAYERS = r"(vision|image|video)_tower\.(vision_model\.)?(encoder\.)?layers?\.\d+\."


def inherit_checkpoint_conversion(model_class: type[nn.Module], stock_name: str) -> None:
    """Read every key layout that the stock class or model_type `stock_name` reads.

    transformers converts no keys for a class outside itself: a checkpoint with older names would leave weights random.
    """
    mapping = get_checkpoint_conversion_mapping(stock_name)
    if mapping is None:
        raise RuntimeError(
            f"transformers has no checkpoint conversion named {stock_name!r}; this version is unsupported"
        )
    register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)


class VisPrunerModelMixin(PrunedForwardMixin):
    """For the base model (encoder, projector, language model). An architecture says:

    has_cls_token        whether token 0 of its encoder is [CLS], whose attention then ranks the others
    packs_images         whether its encoder takes images of any size in one sequence and attends within each
    budget_unit          what the budget is for, in words
    vision_layers        the encoder's layers, in order
    feature_layer        the number of the encoder layer that produces the features
    check_prunable       what else must hold, as a ValueError
    project              features (B, N, C) to visual tokens (B, N, D), for the selectors that compare those
    stage_hindrance      why patches cannot leave within its encoder, if they cannot
    foretells_pixels     whether blocks of pixels can leave before it
    selector_inputs      which of token_selection's FURTHER_INPUTS it can give, if not all
    image_token_counts   per image the placeholders of a full prompt and of a shortened one, before anything runs
    get_image_features   `PrunedImageFeatures`; likewise get_video_features and video_token_counts, where it has videos
    image_views          what the tokens are of, to be drawn; likewise video_views
    """

    config: Any
    device: Any
    register_buffer: Any
    has_cls_token = True
    packs_images = False
    budget_unit = "image"
    _keys_to_ignore_on_load_unexpected: Any
    stage_hindrance: str | None = None
    foretells_pixels = False
    has_common_space = False  # whether patches of its tower have a place in CLIP's common space
    text_tower: TextTower | None = None
    watch_choices = staticmethod(watch_choices)  # of the code that this model runs, which may be a repo's own

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the stock model comes next in the MRO
        self.check_options()
        self.make_prunable()

    @property
    def vision_layers(self) -> Sequence[Any]:
        raise AttributeError(f"{type(self).__name__} must say where its encoder's layers are")

    @property
    def vision_attentions(self) -> list[Any]:
        return [attention_of(layer) for layer in self.vision_layers]

    @property
    def feature_layer(self) -> int:
        return len(self.vision_attentions) - 1

    def image_token_counts(self, pixel_values: torch.Tensor, **arguments: Any) -> tuple[list[int], list[int]]:
        """Return per image the visual tokens of a full prompt and those that are kept."""
        raise AttributeError(f"{type(self).__name__} must say how many visual tokens an image has")

    def image_views(self, pixel_values: torch.Tensor, **arguments: Any) -> list[list[TokenView]]:
        """Return per image what it is encoded as: here one grid of the patches of (B, 3, height, width)."""
        patch = self.config.vision_config.patch_size
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        return [[TokenView(image, grid)] for image in pixel_values]

    @property
    def selector_inputs(self) -> frozenset[str]:
        of_cls = {"cls_feature"} if self.has_cls_token else set()
        of_all = set() if self.vispruner_options.encoder_stage else {"grid"}  # of which those that remain are a part
        return frozenset({"projected", "layer_saliency", "keys", *of_all, *of_cls})

    def saliency_layer(self, layer: int) -> int:
        """Return the layer to read saliency in where a selector asks for `layer`."""
        return layer

    def check_prunable(self) -> None:
        """Raise ValueError with the remedy when this config cannot be pruned."""

    def check_options(self) -> None:
        """Raise ValueError with the remedy when this model cannot be pruned under its options."""
        if self.vispruner_options.method == "none":
            return
        for method in self.methods:
            if method is not None and selector_named(method).experimental:
                logger.warning_once(
                    f'vispruner_config.method "{method}" is experimental: its authors published no code, so its rule '
                    "is a reading of their paper and their figures need not come out"
                )
        if self.vispruner_options.text_tower is not None and not self.has_common_space:
            raise ValueError(
                f"vispruner_config.text_tower: patches of {type(self).__name__} have no place in CLIP's common space "
                "with this configuration; only LLaVA and LLaVA-NeXT, with a CLIP tower and one vision_feature_layer, "
                "have one: leave it out, and words are compared as the language model embeds them"
            )
        self.check_method_options()
        self.check_decoder_options()
        if self.vispruner_options.encoder_stage is not None:
            self._check_stage()
        if (method := self.methods[0]) is not None:
            self.check_prunable()
            self._check_selector(method)
            self._attention_layer(self.feature_layer)

    def make_prunable(self) -> None:
        """Make the encoder tappable, once. What it computes does not change."""
        make_tappable(self.vision_attentions)
        if hasattr(self.config, "vision_feature_layer") and used_vision_layers(self.config) == len(
            self.vision_attentions
        ):
            # Layers above those are not missed: loading need not warn of a base that still has them.
            self._keys_to_ignore_on_load_unexpected.add(DROPPED_LAYERS)

    @property
    def saliency_kind(self) -> str:
        return "cls" if self.has_cls_token else "received"

    def _check_stage(self) -> None:
        if self.stage_hindrance is not None:
            raise ValueError(
                f"vispruner_config.encoder_stage: {self.stage_hindrance}; set it to null for {type(self).__name__}"
            )
        if self.methods[0] is None:
            raise ValueError(
                f"vispruner_config.encoder_stage needs a method that chooses behind the encoder, and method "
                f'"{self.vispruner_options.method}" does not: name one as in "vispruner+fastv", or set it to null'
            )
        if self.vispruner_options.pixel_tolerance is not None:
            self._check_pixel_stage()
            return
        after, layers = self._stage_layer, self.stage_layers
        if after not in layers:
            raise ValueError(
                f"vispruner_config.encoder_stage.layer must be a layer from {layers.start} to {layers.stop - 1}, "
                f"with layers behind it that features come from, got {after}"
            )

    def _check_pixel_stage(self) -> None:
        if not self.foretells_pixels:
            raise ValueError(
                "vispruner_config.encoder_stage.pixel_tolerance is for the Qwen-VL models, whose encoders take any "
                f"number of blocks of pixels: set encoder_stage to null for {type(self).__name__}, or to "
                '{"layer": k, "keep_ratio": q}'
            )
        if self.prunes_in_decoder:
            raise ValueError(
                "vispruner_config.encoder_stage.pixel_tolerance leaves as many tokens as the picture asks for, which "
                "a budget of decoder layers cannot be counted from: choose a method that prunes behind the encoder "
                f'alone, not "{self.vispruner_options.method}", or set encoder_stage to null'
            )

    @property
    def _stage_layer(self) -> int:
        return int((self.vispruner_options.encoder_stage or {})["layer"])

    def stage_behind(
        self, layers: Sequence[Any], choose: Callable[[torch.Tensor], torch.Tensor], patches: int, **more: Any
    ) -> EncoderStage:
        """Return the configured stage among the `layers` of an encoder, which leaves so many patches; see there."""
        after = self._stage_layer
        reading = Reading(self.saliency_layer(after), self.saliency_kind)
        return EncoderStage(layers, after, reading, choose, patches, has_cls=self.has_cls_token, **more)

    @property
    def stage_layers(self) -> range:
        """The encoder layers behind which patches can leave: ranked by what was attended so far, before others."""
        return range(self.feature_layer)

    def remaining_count(self, visual_tokens: int) -> int:
        """Return how many of the `visual_tokens` tokens of an image or tile the encoder hands over.

        All of them, unless patches leave within it; then the part that the stage keeps, but no fewer than the budget.
        """
        stage = self.encoder_options.encoder_stage
        if stage is None:
            return visual_tokens
        share = max(1, math.floor(visual_tokens * stage["keep_ratio"] + 0.5))
        remaining = max(share, self.encoder_options.budget(visual_tokens))
        if remaining == visual_tokens:
            logger.warning_once(
                f"vispruner_config.encoder_stage drops none of the {visual_tokens} tokens of an image or tile, of "
                f"which the budget keeps {self.encoder_options.budget(visual_tokens)}"
            )
        return remaining

    def _check_selector(self, method: str) -> None:
        selector = SELECTORS[method]
        if "codebook" in selector.needs and self.vispruner_options.codebook is None:
            raise ValueError(
                f'vispruner_config.method "{method}" needs a codebook: name the safetensors file in '
                "vispruner_config.codebook; `vispruner codebook` makes one"
            )
        missing = sorted(selector.needs - self.selector_inputs - {"codebook"})
        if self.vispruner_options.encoder_stage is not None and "grid" in selector.uses:
            missing.append("grid")  # without one it would take what remains for a line
        if self.vispruner_options.pixel_tolerance is not None and "videos" in selector.uses:
            missing.append("videos")  # of whose frames as many would have to be left of each as of the others
        if selector.saliency_layers is not None and selector.saliency_kind == "cls" and not self.has_cls_token:
            missing.append("a [CLS] token")
        if missing:
            raise ValueError(
                f'vispruner_config.method "{method}" needs {", ".join(missing)}, which {type(self).__name__} cannot '
                "give with this configuration; choose another method"
            )

    def _attention_layer(self, feature_layer: int) -> int:
        wanted, layers = self.vispruner_options.attention_layer, len(self.vision_attentions)
        if wanted is None:
            return feature_layer
        if not -layers <= wanted < layers:
            raise ValueError(
                f"vispruner_config.attention_layer must be an encoder layer index in [{-layers}, {layers - 1}], "
                f"got {wanted}"
            )
        return wanted % layers

    def warn_if_all_are_kept(self, visual_tokens: int) -> None:
        """Say once that a budget prunes nothing of an image or tile of `visual_tokens` tokens."""
        if self.keeps_all(visual_tokens):
            self.warn_that_all_are_kept("an image or tile", f"{visual_tokens} ")

    def warn_that_all_are_kept(self, of_what: str, count: str = "") -> None:
        """Say once that nothing is pruned, where something was to be."""
        if self.vispruner_options.method != "none" and not self.prunes_in_decoder:
            logger.warning_once(
                f"vispruner_config keeps all {count}visual tokens of {of_what}, so nothing is pruned; "
                "lower visual_token_num or keep_ratio to prune"
            )

    def open_tap(
        self,
        seen: torch.Tensor | None = None,
        feature_layer: int | None = None,
        stage: EncoderStage | None = None,
    ) -> SaliencyTap:
        """Return the tap to run the encoder under: its `saliency` ranks tokens, as (B, N).

        seen           (B, tokens of the encoder), False for padding; None where there is none
        feature_layer  where a call takes its features from another layer than the config says
        stage          lets patches leave within the encoder
        """
        selector, attentions = SELECTORS[self.encoder_options.method], self.vision_attentions
        feature_layer = self.feature_layer if feature_layer is None else feature_layer
        main = Reading(self._attention_layer(feature_layer), self.saliency_kind)
        if selector.main_kind == "global":
            given = {**selector.options, **self.encoder_options.selector_options}
            kind = "global_behind_cls" if self.has_cls_token else "global"
            main = Reading(main.layer, kind, given["global_threshold"])
        last = len(attentions) - 1
        further = {
            "keys": Reading(main.layer, "keys_behind_cls" if self.has_cls_token else "keys"),
            "cls_query": Reading(last, "cls_query"),
            "raw_keys": Reading(last, "raw_keys"),
        }
        asked = {name: reading for name, reading in further.items() if name in selector.needs}
        others: list[Reading] = []
        if selector.saliency_layers is not None:
            behind_cls = self.has_cls_token and selector.saliency_kind == "received"
            kind = "received_behind_cls" if behind_cls else selector.saliency_kind
            layers = map(self.saliency_layer, selector.saliency_layers(len(attentions), feature_layer))
            others = [Reading(layer, kind) for layer in layers]
        return SaliencyTap(attentions, main, others, seen, self.packs_images, asked, stage)

    def select(self, tokens: VisualTokens, visual_token_num: int) -> Selection:
        """Return which tokens stay, T of each image, by the configured method."""
        if tokens.remain is not None:
            part = tokens.remaining()
            assert part.numbers is not None
            return self.select(part, visual_token_num).among(part.numbers, tokens.remain.shape[1])
        options = self.encoder_options
        codebook = self._read_codebook() if "codebook" in SELECTORS[options.method].needs else None
        if self.is_guided:
            tokens = replace(tokens, further={**tokens.further, **self._asked_about(tokens)})
        selection = choose(options, tokens, visual_token_num, project=self.project, codebook=codebook)
        if selection.appended:
            raise ValueError(
                f'vispruner_config.method "{options.method}" puts tokens behind the others, which only the language '
                "model can: give it prune_layers"
            )
        return selection

    def _asked_about(self, tokens: VisualTokens) -> dict[str, torch.Tensor]:
        """Return what a method is given of the question that each of B images is asked."""
        question = None if self.open_call is None else self.open_call.question
        if question is None:
            raise ValueError(
                f'vispruner_config.method "{self.vispruner_options.method}" chooses by the question, which is not '
                "known here: pass the images to generate or forward, together with the prompt"
            )
        owners = range(len(tokens.features)) if tokens.owners is None else tokens.owners
        rows = torch.tensor([question.rows[owner] for owner in owners]).to(question.words.device, non_blocking=True)
        words, is_word = (given[rows].to(tokens.features.device) for given in (question.words, question.is_word))
        if self.compares_in_clip:
            patches = self.require_text_tower().of_patches(self.last_normed(tokens.features))
            return {"text_embeds": words, "image_embeds": patches}
        saliency = torch.zeros(is_word.shape, device=is_word.device).masked_fill(~is_word, float("-inf"))
        return {"text": words, "text_saliency": saliency}

    def prune(self, outputs: Any, tokens: VisualTokens, asked: Mapping[str, Any]) -> PrunedImageFeatures:
        """Select from every image by one budget and project what stays; `pooler_output` is one tensor (B, T, D).

        outputs  of the encoder; asked  the further arguments of `get_image_features`
        """
        images, count = tokens.saliency.shape
        selection = self.select(tokens, self.encoder_options.budget(count))
        projected = tokens.projected
        if projected is None and self.folds_projected:
            projected = self.project(tokens.features)
        kept = self.project(selection.take(tokens.features)) if projected is None else selection.take(projected)
        indices = list(selection.indices)
        return self.pruned_output(
            outputs,
            asked,
            tokens,
            kept,
            indices,
            list(indices),
            [count] * images,
            merged_into=None if selection.merge is None else selection.merged_into(count),
        )

    @property
    def folds_projected(self) -> bool:
        """Whether the method folds together what is projected, and not features."""
        return SELECTORS[self.encoder_options.method].merge_on == "projected"

    @property
    def last_norm_weight(self) -> torch.Tensor:
        """The weight (C,) of the last layer norm of a tower of CLIP."""
        raise AttributeError(f"{type(self).__name__} must say where the last layer norm of its tower is")

    def last_normed(self, features: torch.Tensor) -> torch.Tensor:
        """Return features (B, N, C) behind the last layer norm of a tower of CLIP."""
        raise AttributeError(f"{type(self).__name__} must say where the last layer norm of its tower is")

    @property
    def paths_of_files(self) -> dict[str, str]:
        """By field of `vispruner_config` the file that was read for it."""
        return dict(getattr(self, "_paths_of_files", {}))

    def load_files(self, repo: str | None, **hub_options: Any) -> None:
        """Hold what is in the files that the configuration names, or nothing; a bare name is looked up in `repo`.

        Where one of them cannot be read, what was held before stays.
        """
        options, paths = self.vispruner_options, dict[str, str]()
        codebook = tower = None
        if options.codebook is not None:
            paths["codebook"] = find_codebook(options.codebook, repo, hub_options)
            codebook = read_codebook(paths["codebook"], self.config.get_text_config().hidden_size)
            codebook = codebook if self.device.type == "meta" else codebook.to(self.device)
        if options.text_tower is not None and self.has_common_space:
            paths["text_tower"] = find_text_tower(options.text_tower, repo, hub_options)
            width, norm = self.config.vision_config.hidden_size, self.last_norm_weight
            tower = read_text_tower(paths["text_tower"], width, norm)
        self.register_buffer("codebook", codebook, persistent=False)
        self.text_tower, self._paths_of_files = tower, paths

    def require_text_tower(self) -> TextTower:
        if self.text_tower is None:
            raise ValueError(
                f"vispruner_config.text_tower {self.vispruner_options.text_tower!r} was not read, because none is "
                "named, or this model did not come from from_pretrained: give it by "
                "set_vispruner_config(text_tower=...)"
            )
        return self.text_tower

    def _read_codebook(self) -> torch.Tensor:
        codebook = getattr(self, "codebook", None)
        if codebook is None:
            raise ValueError(
                f"vispruner_config.codebook {self.vispruner_options.codebook!r} was not read, because this model did "
                "not come from from_pretrained: give it by set_vispruner_config(codebook=...)"
            )
        return codebook

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features (B, N, C) into visual tokens (B, N, D); the same thing where features are merged tokens."""
        return features

    def select_each(self, images: Sequence[VisualTokens], budgets: Sequence[int] | None = None) -> list[Selection]:
        """Return which tokens stay of images (1, N, C) of any sizes; those of one size are selected from together.

        Each keeps as many as `budgets` says, by default what the configured budget leaves of its own N.
        """
        if budgets is None:
            options = self.encoder_options
            budgets = [options.budget(image.features.shape[1]) for image in images]
        return choose_each(images, budgets, self.select)

    def keeps_all(self, visual_tokens: int) -> bool:
        """True when nothing is to be chosen from the `visual_tokens` tokens of an image or tile, nor to be told."""
        return self.encoder_options.budget(visual_tokens) == visual_tokens and not self.is_told_by_encoder

    def keep_everything(
        self, outputs: Any, kept_indices: list[torch.Tensor] | None = None, counts: list[int] | None = None
    ) -> PrunedImageFeatures:
        """Describe a stock vision output, of which nothing was dropped, in the terms of a pruned one.

        kept_indices  per image, where they are not 0, 1, 2 ...
        counts        visual tokens of each image, where `pooler_output` does not have them apart
        """
        counts = kept_counts_of(outputs) if counts is None else counts
        device = outputs.pooler_output[0].device if len(outputs.pooler_output) else None
        placeholders = [torch.arange(count, device=device) for count in counts]
        kept_indices = list(placeholders) if kept_indices is None else kept_indices
        fields = {**outputs, "pooler_output": outputs.pooler_output}  # which the mapping may lack, set afterwards
        return PrunedImageFeatures(**fields, kept_indices=kept_indices, placeholders=placeholders, full_counts=counts)

    def pruned_output(
        self,
        outputs: Any,
        asked: Mapping[str, Any],
        tokens: VisualTokens | Sequence[VisualTokens],
        pooler_output: torch.Tensor | list[torch.Tensor],
        kept_indices: list[torch.Tensor],
        placeholders: list[torch.Tensor] | None,
        full_counts: list[int],
        deepstack_features: list[list[torch.Tensor]] | None = None,
        merged_into: torch.Tensor | list[torch.Tensor] | None = None,
        tiles: Sequence[int] | None = None,
    ) -> PrunedImageFeatures:
        """Return what `get_image_features` does: of the encoder's output what stock gives, and what was kept.

        asked   the further arguments of `get_image_features`
        tokens  what was chosen from: all images together, or each by itself where they differ in size
        tiles   how many of the former each image has; None for one
        """
        saliency: Any
        layers: Any
        remain: Any
        if isinstance(tokens, VisualTokens):
            saliency, layers, remain = tokens.saliency, tokens.layer_saliency, tokens.remain
        else:
            saliency = [image.saliency[0] for image in tokens]
            remain = [image.remain[0] for image in tokens if image.remain is not None] or None
            layers = [image.layer_saliency[0] for image in tokens if image.layer_saliency is not None] or None
        told = _of_kept(saliency, kept_indices, tiles) if self.is_told_by_encoder else None
        return PrunedImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pooler_output,
            hidden_states=outputs.hidden_states if self.wants_hidden_states(asked) else None,
            attentions=outputs.attentions,
            kept_indices=kept_indices,
            placeholders=placeholders,
            saliency=saliency,
            layer_saliency=layers,
            merged_into=merged_into,
            remain=remain,
            full_counts=full_counts,
            deepstack_features=deepstack_features,
            told=told,
        )

    def wants_hidden_states(self, asked: Mapping[str, Any]) -> bool:
        """True when a call, or the config, asks for all hidden states of the encoder."""
        named = asked.get("output_hidden_states")
        return bool(self.config.vision_config.output_hidden_states if named is None else named)


def attention_of(layer: Any) -> Any:
    """Return the module of an encoder's layer that attends: one of these names, or within one that only wraps it."""
    for name in ("self_attn", "attn", "attention"):
        if (attention := getattr(layer, name, None)) is not None:
            return getattr(attention, "attention", attention)
    raise AttributeError(f"{type(layer).__name__} has no attention module under a known name")


def remaining_by_saliency(saliency: torch.Tensor, count: int) -> torch.Tensor:
    """Return which `count` of N tokens are attended most, (B, N); the first of equals."""
    stays = most_attended_first(saliency)[:, :count]
    return torch.zeros_like(saliency, dtype=torch.bool).scatter(1, stays, True)


def _of_kept(
    saliency: torch.Tensor | list[torch.Tensor], kept_indices: list[torch.Tensor], tiles: Sequence[int] | None
) -> list[torch.Tensor]:
    """Return per image the saliency (tokens,) of what stays; what is no patch has 1, more than any of them."""
    if isinstance(saliency, torch.Tensor):
        saliency = list(saliency.split([1] * len(saliency) if tiles is None else list(tiles)))
    return [
        own.flatten()[kept.clamp(min=0)].masked_fill(kept < 0, 1.0)
        for own, kept in zip(saliency, kept_indices, strict=True)
    ]
