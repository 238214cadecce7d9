"""The `vispruner_config` that a serving engine is started with, and what follows from it before any image is seen.

Needs no engine: `config` is the model's, stock or ours, as the engine loaded it.
"""

from typing import Any

from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from vispruner.configuration_vispruner import VisPrunerOptions, merge_vispruner_config
from vispruner.selectors import SELECTORS, require_choice_by_image
from vispruner.visual_attention import Reading

# What a selector may ask for beside features and saliency.
SELECTOR_INPUTS = frozenset({"projected", "grid", "layer_saliency"})
HOW_TO_SET = '--hf-overrides \'{"vispruner_config": {"visual_token_num": 128}}\''


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
    if missing := sorted(SELECTORS[options.method].needs - SELECTOR_INPUTS):
        raise ValueError(f'vispruner_config.method "{options.method}" needs {", ".join(missing)}, which is not served')
    if SELECTORS[options.method].merge_on == "projected":
        raise ValueError(f'vispruner_config.method "{options.method}" folds projected tokens, which is not served')
    if options.position_policy == "original":
        raise ValueError(
            'vispruner_config.position_policy "original" cannot be served: the engine numbers the tokens of a prompt '
            'itself (use null or "renumber")'
        )
    if config.model_type == "llava_next" and options.tile_mode != "paper":
        raise ValueError(
            f'vispruner_config.tile_mode must be "paper" to be served, got {options.tile_mode!r}: "native" packing is '
            "not implemented there"
        )
    _check_tower(config, options)
    return options


def _check_tower(config: Any, options: VisPrunerOptions) -> None:
    tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if tower != "clip_vision_model":
        raise ValueError(
            f"vision_config.model_type must be clip_vision_model, got {tower!r}: tokens are ranked by the attention "
            "of a [CLS] token, which it lacks"
        )
    if strategy != "default":
        raise ValueError(f'vision_feature_select_strategy must be "default" (no [CLS]), got {strategy!r}')
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"vision_feature_layer must be one layer, got {config.vision_feature_layer}: the engine's tower has one "
            "output"
        )
    readings(config, options)


def readings(config: Any, options: VisPrunerOptions) -> list[Reading]:
    """Return what to read of which encoder layer: first the saliency that ranks tokens, then what the method adds."""
    layers = config.vision_config.num_hidden_layers
    built = config.vision_feature_layer % (layers + 1)  # the engine's tower ends where features come from
    if built == 0:
        raise ValueError("vision_feature_layer 0 is the embedding, which no attention layer produces")
    selector, wanted = SELECTORS[options.method], options.attention_layer
    found = [Reading(built - 1 if wanted is None else wanted, "cls")]
    if selector.saliency_layers is not None:
        kind = "received_behind_cls" if selector.saliency_kind == "received" else selector.saliency_kind
        found += [Reading(layer, kind) for layer in selector.saliency_layers(layers, built - 1)]
    for layer, _ in found:
        if not -layers <= layer < layers or layer % layers >= built:
            raise ValueError(
                f"vispruner_config: attention must be read from the first {built} encoder layers, not from {layer}: "
                f"features come from those, and the engine builds no more of the {layers}"
            )
    return [Reading(layer % layers, kind) for layer, kind in found]


def side_of_tile(config: Any) -> int:
    """Return the patches along one side of an image or tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def tile_grid(config: Any, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the tiles beside the base tile (LLaVA-NeXT)."""
    return get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, config.vision_config.image_size)


def tokens_of_tiles(config: Any, options: VisPrunerOptions, height: int, width: int) -> int:
    """Return how many tokens of a LLaVA-NeXT image are kept in tile_mode "paper": the budget for each tile."""
    rows, columns = tile_grid(config, height, width)
    return options.budget(side_of_tile(config) ** 2) * (1 + rows * columns)
