"""The `vispruner_config` that a serving engine is started with, and what follows from it before any image is seen.

Needs no engine: `config` is the model's, stock or ours, as the engine loaded it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vispruner.configuration_vispruner import FIELD_NAMES, VisPrunerOptions, merge_vispruner_config
from vispruner.selectors import SELECTORS, require_choice_by_image
from vispruner.visual_attention import Reading

from .request_budgets import BLOCK

HOW_TO_SET = '--hf-overrides \'{"vispruner_config": {"visual_token_num": 128}}\''
# What a selector may ask for of any encoder, beside features and saliency.
SELECTOR_INPUTS = frozenset({"projected", "grid", "layer_saliency", "keys", "codebook"})
PACKED_TILES = ("llava_next", "llava_onevision")  # what is projected there is not in the order of the encoder


class Encoder(NamedTuple):
    """A vision encoder as an engine builds it.

    layers   how many its config has; the engine builds the first `built` of them
    main     the one that produces the features, from 0 on
    has_cls  whether token 0 is [CLS]
    merges   whether tokens are blocks of patches
    whole    the layers that attend over the whole image, None for all
    """

    layers: int
    built: int
    main: int
    has_cls: bool
    merges: bool = False
    whole: tuple[int, ...] | None = None

    def nearest(self, layer: int) -> int:
        """Return the layer that attends over the whole image and is the next at or below `layer`, else above it."""
        if self.whole is None:
            return layer
        return max((index for index in self.whole if index <= layer), default=self.whole[0])

    @property
    def inputs(self) -> frozenset[str]:
        """What a selector may ask for beside features and saliency."""
        of_cls = {"cls_feature"} if self.has_cls and not self.merges else set()
        of_last = {"cls_query", "raw_keys"} if of_cls and self.built == self.layers else set()
        return SELECTOR_INPUTS | of_cls | of_last


class Readings(NamedTuple):
    """What to read of which encoder layer: the saliency that ranks tokens, if any, and what the method adds to it."""

    main: Reading | None
    others: tuple[Reading, ...]
    further: dict[str, Reading]

    @property
    def all(self) -> tuple[Reading, ...]:
        return (*([] if self.main is None else [self.main]), *self.others, *self.further.values())


def require_known_overrides(overrides: Mapping[str, Any]) -> None:
    """Raise ValueError for fields of --hf-overrides that mean us and that nobody would read."""
    for name in overrides:
        if name in FIELD_NAMES:
            raise ValueError(f"--hf-overrides: {name} is a field of vispruner_config, {HOW_TO_SET}")
        if name.startswith("vispruner") and name not in ("vispruner_config", BLOCK):
            raise ValueError(f"--hf-overrides: {name} is unknown: there are vispruner_config and {BLOCK}")


def merged_options(config: Any, stored: dict[str, Any] | None, given: dict[str, Any] | None) -> VisPrunerOptions:
    """Return the options of a launch: those of the repo with those of the command line laid over them.

    Raises ValueError, with the remedy, for what cannot be served pruned.
    """
    if stored is None and given is None:
        raise ValueError(f"the repo has no vispruner_config: say how many visual tokens to keep, {HOW_TO_SET}")
    options = VisPrunerOptions.from_dict(merge_vispruner_config(stored, given))
    if options.method == "none":
        return options
    require_choice_by_image(options)
    if options.stage_token_nums is not None:
        raise ValueError("vispruner_config.stage_token_nums is not served: give visual_token_num or keep_ratio")
    if options.encoder_stage is not None:
        raise ValueError(
            "vispruner_config.encoder_stage is not served: the engine has its own encoder, which no patch can leave; "
            "set it to null"
        )
    encoder = encoder_of(config)
    if missing := sorted(SELECTORS[options.method].needs - encoder.inputs):
        raise ValueError(
            f'vispruner_config.method "{options.method}" needs {", ".join(missing)}, which is not served for it'
        )
    if SELECTORS[options.method].merge_on == "projected" and config.model_type in PACKED_TILES:
        raise ValueError(
            f'vispruner_config.method "{options.method}" folds projected tokens, which is not served where tiles are '
            "packed: choose another method"
        )
    if "codebook" in SELECTORS[options.method].needs and options.codebook is None:
        raise ValueError(f'vispruner_config.method "{options.method}" needs a codebook: name its file')
    if options.position_policy == "original" and config.model_type not in MROPE:
        raise ValueError(
            'vispruner_config.position_policy "original" cannot be served: the engine numbers the tokens of a prompt '
            'itself (use null or "renumber")'
        )
    if options.position_policy == "renumber" and config.model_type in MROPE:
        raise ValueError(
            'vispruner_config.position_policy "renumber" cannot be served: tokens have a time, a height and a width '
            'here (use null or "original")'
        )
    if config.model_type == "llava_next" and options.tile_mode != "paper":
        raise ValueError(
            f'vispruner_config.tile_mode must be "paper" to be served, got {options.tile_mode!r}: "native" packing is '
            "not implemented there"
        )
    readings(config, options)
    return options


def encoder_of(config: Any) -> Encoder:
    """Return the encoder that an engine builds for a model; ValueError for one that cannot be pruned there."""
    if config.model_type not in ENCODERS:
        raise ValueError(
            f"model_type must be one of {sorted(ENCODERS)} to be served pruned, got {config.model_type!r}"
        )
    return ENCODERS[config.model_type](config)


def _llava(config: Any, tower: str = "clip_vision_model", patches: str = "default") -> Encoder:
    found, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if found != tower:
        lacking = "of a [CLS] token, which it lacks" if tower == "clip_vision_model" else "of that encoder"
        raise ValueError(
            f"vision_config.model_type must be {tower}, got {found!r}: tokens are ranked by the attention {lacking}"
        )
    if strategy != patches:
        meaning = "no [CLS]" if patches == "default" else "all patches"
        raise ValueError(f'vision_feature_select_strategy must be "{patches}" ({meaning}), got {strategy!r}')
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"vision_feature_layer must be one layer, got {config.vision_feature_layer}: the engine's tower has one "
            "output"
        )
    layers = config.vision_config.num_hidden_layers
    built = config.vision_feature_layer % (layers + 1)  # the engine's tower ends where features come from
    if built == 0:
        raise ValueError("vision_feature_layer 0 is the embedding, which no attention layer produces")
    return Encoder(layers, built, built - 1, has_cls=tower == "clip_vision_model")


def _llava_onevision(config: Any) -> Encoder:
    return _llava(config, "siglip_vision_model", "full")


def _internvl(config: Any) -> Encoder:
    strategy, layer = config.vision_feature_select_strategy, config.vision_feature_layer
    if strategy != "default":
        raise ValueError(f'vision_feature_select_strategy must be "default" (no [CLS]), got {strategy!r}')
    if layer != -1:
        raise ValueError(f"vision_feature_layer must be -1, got {layer}: the engine's features are those of the last")
    layers = config.vision_config.num_hidden_layers
    return Encoder(layers, layers, layers - 1, has_cls=True, merges=True)


def _whole_tower(config: Any) -> Encoder:
    layers = config.vision_config.num_hidden_layers
    return Encoder(layers, layers, layers - 1, has_cls=False, merges=True)


def _qwen_vl(config: Any) -> Encoder:
    layers = config.vision_config.depth
    named = getattr(config.vision_config, "fullatt_block_indexes", None)
    whole = tuple(sorted(index for index in range(layers) if named is None or index in named))
    if not whole:
        raise ValueError(
            "vision_config.fullatt_block_indexes names no layer of the encoder, by which tokens are ranked"
        )
    return Encoder(layers, layers, whole[-1], has_cls=False, merges=True, whole=whole)


ENCODERS: dict[str, Callable[[Any], Encoder]] = {
    "gemma3": _whole_tower,
    "idefics3": _whole_tower,
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen_vl,
    "qwen2_vl": _qwen_vl,
    "qwen3_vl": _qwen_vl,
    "smolvlm": _whole_tower,
}
MROPE = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")  # models whose tokens have a time, a height and a width


def readings(config: Any, options: VisPrunerOptions) -> Readings:
    """Return what to read of the encoder for a method; ValueError for a layer that the engine does not build."""
    encoder, selector, wanted = encoder_of(config), SELECTORS[options.method], options.attention_layer
    behind = "_behind_cls" if encoder.has_cls else ""
    main = Reading(encoder.main if wanted is None else wanted, "cls" if encoder.has_cls else "received")
    kinds = {"cls": "cls", "received": f"received{behind}"}
    others = []
    if selector.saliency_layers is not None:
        kind = kinds[selector.saliency_kind]
        layers = map(encoder.nearest, selector.saliency_layers(encoder.layers, encoder.main))
        others = [Reading(layer, kind) for layer in layers]
        if kind == "cls" and not encoder.has_cls:
            raise ValueError(
                f'vispruner_config.method "{options.method}" needs a [CLS] token, which this model\'s encoder lacks'
            )
    last = encoder.layers - 1
    further = {
        "keys": Reading(main.layer, f"keys{behind}"),
        "cls_query": Reading(last, "cls_query"),
        "raw_keys": Reading(last, "raw_keys"),
    }
    asked = {name: reading for name, reading in further.items() if name in selector.needs}
    for layer in (reading.layer for reading in (main, *others, *asked.values())):
        if not -encoder.layers <= layer < encoder.layers or layer % encoder.layers >= encoder.built:
            raise ValueError(
                f"vispruner_config: attention must be read from the first {encoder.built} encoder layers, not from "
                f"{layer}: features come from those, and the engine builds no more of the {encoder.layers}"
            )
    if encoder.whole is not None and main.layer % encoder.layers not in encoder.whole:
        raise ValueError(
            f"vispruner_config.attention_layer must be one of {list(encoder.whole)}, which attend over the whole "
            f"image, got {wanted}"
        )
    counted = {name: reading._replace(layer=reading.layer % encoder.layers) for name, reading in asked.items()}
    main, *rest = [reading._replace(layer=reading.layer % encoder.layers) for reading in (main, *others)]
    return Readings(main if selector.by_saliency else None, tuple(rest), counted)
