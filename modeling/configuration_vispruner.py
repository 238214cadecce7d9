"""The `vispruner_config` block of config.json: its fields, their defaults (the paper's) and their validation.

A config subclass keeps the base model's `model_type`, so every table of `transformers` keyed by it still works.
"""

import difflib
import itertools
import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

POSITION_POLICIES = (None, "renumber", "original")
TILE_MODES = ("paper", "native")
WEIGHTS = ("full", "thin")


@dataclass(frozen=True)
class VisPrunerOptions:
    """One validated `vispruner_config` (arXiv 2412.01818).

    method            name of a registered selector, "a+b" for one behind the encoder and one in the language model, or
                      "none" for the dense model
    visual_token_num  visual tokens a decoder layer holds, on average over the layers: of each encoded image or tile
                      where tokens leave behind the encoder, of each image where they leave in the language model
    keep_ratio        the same as a fraction of all; exactly one of these two and
    stage_token_nums  how many tokens of an image each stage leaves, is set, unless method is "none"
    prune_layers      decoder layers before which visual tokens leave, each a stage; null for those of the method. A
                      method for the encoder prunes at these layers instead
    method_options    further options of the method, by name
    important_ratio   share of the budget given to the most attended tokens; "auto": by each image, less where its
                      features have a high effective rank
    dedup_step        most tokens that one round of duplicate removal drops; null is 8 for every full 1,024 tokens of
                      an image, hence the paper's 8 up to 2,047
    attention_layer   encoder layer that attention is read from; null is the layer that produces the features
    encoder_stage     {"layer": k, "keep_ratio": q}: after encoder layer k, counted from 0, all but the part q of the
                      patches that were attended most leave, and the method chooses among the rest; null for none.
                      Or {"pixel_tolerance": t}, Qwen-VL only: before the first layer the blocks of patches leave of
                      which no pixel is further than t (in units of `pixel_values`; 0: bit for bit) from what a
                      neighbour foretells. How many stay then depends on the picture: the budget is the most
    position_policy   null or "renumber": the shorter sequence is numbered anew; "original": kept tokens keep the
                      position they had in the full prompt
    tile_mode         LLaVA-NeXT only: "paper" or "native" packing of the kept tokens
    seed              method "random" only
    codebook          method "codebook" only: a safetensors file that `vispruner codebook` made; its bare name where it
                      lies in the repo, else a path
    text_tower        methods that read the question, LLaVA and LLaVA-NeXT: likewise a file that `vispruner text-tower`
                      made; CLIP then compares the question with patches. null: words as the language model embeds them
    base_model_name_or_path, base_model_revision   where the weights came from
    weights           "full": the repo holds them; "thin": it holds none, and loading takes them from that base
    vispruner_version   version of this package that built the repo
    """

    method: str = "vispruner"
    visual_token_num: int | None = None
    keep_ratio: float | None = None
    stage_token_nums: list[int] | None = None
    prune_layers: list[int] | None = None
    method_options: dict[str, Any] | None = None
    important_ratio: float | str = 0.5
    dedup_step: int | None = None
    attention_layer: int | None = None
    encoder_stage: dict[str, Any] | None = None
    position_policy: str | None = None
    tile_mode: str = "paper"
    seed: int | None = None
    codebook: str | None = None
    text_tower: str | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    weights: str = "full"
    vispruner_version: str | None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.method, str) and self.method, "method", 'a selector name or "none"', self.method)
        self._check_budget()
        self._check_stages()
        self._check_encoder_stage()
        _require(self.important_ratio == "auto" or _is_share(self.important_ratio), "important_ratio",
                 'a number in [0, 1] or "auto"', self.important_ratio)  # fmt: skip
        _require(self.dedup_step is None or (_is_int(self.dedup_step) and self.dedup_step >= 1), "dedup_step",
                 "an integer >= 1 or null", self.dedup_step)  # fmt: skip
        _require(self.attention_layer is None or _is_int(self.attention_layer), "attention_layer",
                 "an encoder layer index or null", self.attention_layer)  # fmt: skip
        _require(self.position_policy in POSITION_POLICIES, "position_policy",
                 'null, "renumber" or "original"', self.position_policy)  # fmt: skip
        _require(self.tile_mode in TILE_MODES, "tile_mode", '"paper" or "native"', self.tile_mode)
        _require(self.seed is None or _is_int(self.seed), "seed", "an integer or null", self.seed)
        _require(self.method != "random" or self.seed is not None, "seed", 'an integer when method is "random"', None)
        for name in FILES:
            named = getattr(self, name)
            _require(named is None or _is_tensor_file(named), name,
                     "null or a .safetensors file not named like weights (model...)", named)  # fmt: skip
        _require(self.weights in WEIGHTS, "weights", '"full" or "thin"', self.weights)
        for name in ("base_model_name_or_path", "base_model_revision", "vispruner_version"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, str), name, "a string or null", value)
        for name in ("base_model_name_or_path", "base_model_revision"):
            _require(self.weights != "thin" or getattr(self, name), name, 'a string when weights is "thin"',
                     getattr(self, name))  # fmt: skip

    def _check_budget(self) -> None:
        count, ratio = self.visual_token_num, self.keep_ratio
        disable = ' (use method="none" to disable pruning)'
        _require(
            count is None or (_is_int(count) and count >= 1), "visual_token_num", "an integer >= 1", count, disable
        )
        _require(ratio is None or (_is_number(ratio) and 0 < ratio <= 1), "keep_ratio", "a number in (0, 1]", ratio,
                 disable)  # fmt: skip
        if count is not None and ratio is not None:
            raise ValueError(
                "vispruner_config.visual_token_num and vispruner_config.keep_ratio are both set, "
                f"got {count} and {ratio}; give exactly one of them"
            )
        if self.stage_token_nums is not None:
            if count is not None or ratio is not None:
                raise ValueError(
                    "vispruner_config.stage_token_nums says how many tokens each stage leaves: take out "
                    f"visual_token_num and keep_ratio, got {count} and {ratio}"
                )
            return
        if count is None and ratio is None and self.method != "none":
            raise ValueError(
                "vispruner_config needs a budget: set visual_token_num (a count) or keep_ratio (a fraction)" + disable
            )

    def _check_stages(self) -> None:
        layers, counts, options = self.prune_layers, self.stage_token_nums, self.method_options
        rising = _are_ints(layers, 1) and all(a < b for a, b in itertools.pairwise(layers or ()))
        _require(layers is None or rising, "prune_layers", "null or decoder layers in rising order, from 1 on", layers)
        falling = _are_ints(counts, 0) and all(a >= b for a, b in itertools.pairwise(counts or ()))
        _require(counts is None or (falling and counts[0] >= 1), "stage_token_nums",
                 "null or numbers of tokens that do not grow, the first at least 1", counts)  # fmt: skip
        named = isinstance(options, dict) and all(isinstance(name, str) for name in options)
        _require(options is None or named, "method_options", "null or a dict of option names", options)
        for name in options or ():
            if name in FIELD_NAMES:
                raise ValueError(f"vispruner_config.method_options: {name} is a field beside it: give it there")
        are_names = len(self.methods) == 1 or (len(self.methods) == 2 and "none" not in self.methods)
        _require(are_names and all(self.methods), "method",
                 'a selector name, two of them as "a+b", or "none" alone', self.method)  # fmt: skip

    def _check_encoder_stage(self) -> None:
        stage = self.encoder_stage
        forms = ({"layer", "keep_ratio"}, {"pixel_tolerance"})
        has_keys = stage is None or (isinstance(stage, dict) and stage.keys() in forms)
        _require(has_keys, "encoder_stage", 'null, {"layer": k, "keep_ratio": q} or {"pixel_tolerance": t}', stage)
        if stage is None:
            return
        if "pixel_tolerance" in stage:
            tolerance = stage["pixel_tolerance"]
            is_distance = _is_number(tolerance) and 0 <= tolerance < math.inf
            _require(is_distance, "encoder_stage.pixel_tolerance", "a number from 0 on", tolerance)
            return
        layer, ratio = stage["layer"], stage["keep_ratio"]
        _require(_is_int(layer) and layer >= 0, "encoder_stage.layer", "an encoder layer index, from 0 on", layer)
        _require(_is_number(ratio) and 0 < ratio < 1, "encoder_stage.keep_ratio", "a number between 0 and 1", ratio)

    @property
    def pixel_tolerance(self) -> float | None:
        """How far pixels may be from foretold ones for their block not to be encoded; None where all blocks are."""
        return (self.encoder_stage or {}).get("pixel_tolerance")

    @property
    def methods(self) -> tuple[str, ...]:
        """The names in `method`: one, or that of what prunes behind the encoder and in the language model."""
        return tuple(self.method.split("+"))

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "VisPrunerOptions":
        """Validate a `vispruner_config` dict; ValueError names the offending field."""
        _require_known_keys(config)
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        """Return the flat, JSON-ready dict that config.json stores."""
        return asdict(self)

    @property
    def selector_options(self) -> dict[str, Any]:
        """What `select_tokens` is given of these fields, whatever the method."""
        fields = {"important_ratio": self.important_ratio, "dedup_step": self.dedup_step, "seed": self.seed}
        return {**fields, **(self.method_options or {})}

    def budget(self, visual_tokens: int) -> int:
        """Return how many of `visual_tokens` tokens of one image or tile are kept."""
        if self.method == "none":
            return visual_tokens
        if self.keep_ratio is not None:
            return max(1, math.floor(visual_tokens * self.keep_ratio + 0.5))
        return min(self.visual_token_num or visual_tokens, visual_tokens)


FILES = ("codebook", "text_tower")  # fields that name a file of the repo
# What a call says of the questions of its rows, for CLIP's text tower: ids, and which of them are no padding.
CLIP_INPUTS = ("clip_input_ids", "clip_attention_mask")
BUDGETS = ("visual_token_num", "keep_ratio", "stage_token_nums")
FIELD_NAMES = tuple(field.name for field in fields(VisPrunerOptions))


def merge_vispruner_config(stored: dict[str, Any] | None, changes: dict[str, Any] | None) -> dict[str, Any]:
    """Return `stored` with `changes` laid over it: complete, validated, flat.

    Giving one of visual_token_num, keep_ratio and stage_token_nums clears the others, and another method what belongs
    to the one before. Raises ValueError naming the field.
    """
    stored, changes = stored or {}, changes or {}
    for block in (stored, changes):
        _require_known_keys(block)
    merged = {**stored, **changes}
    for given in BUDGETS:
        if changes.get(given) is not None:
            merged |= {other: None for other in BUDGETS if other != given and changes.get(other) is None}
    if changes.get("method", stored.get("method")) != stored.get("method"):
        merged |= {name: None for name in ("prune_layers", "method_options") if name not in changes}
        if merged["method"] == "none":
            merged["stage_token_nums"] = None
    merged |= {name: os.fspath(merged[name]) for name in FILES if isinstance(merged.get(name), os.PathLike)}
    return VisPrunerOptions(**merged).to_dict()


def _require(condition: Any, name: str, allowed: str, value: Any, remedy: str = "") -> None:
    if not condition:
        raise ValueError(f"vispruner_config.{name} must be {allowed}, got {value!r}{remedy}")


def _require_known_keys(config: dict[str, Any]) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"vispruner_config must be a dict of fields, got {config!r}")
    unknown = sorted(set(config) - set(FIELD_NAMES), key=str)
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), FIELD_NAMES, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"the fields are {list(FIELD_NAMES)}"
        raise ValueError(f"vispruner_config has unknown fields {unknown}; {remedy}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ints(value: Any, least: int) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_int(item) and item >= least for item in value)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_tensor_file(value: Any) -> bool:
    name = os.path.basename(value) if isinstance(value, str) else ""
    return name.endswith(".safetensors") and not name.startswith("model")


def used_vision_layers(config: Any) -> int:
    """Return how many encoder layers, from the first on, a model must run for the features and attention it reads."""
    layers, features = config.vision_config.num_hidden_layers, config.vision_feature_layer
    used = [index % (layers + 1) for index in ([features] if isinstance(features, int) else features)]
    attention = (getattr(config, "vispruner_config", None) or {}).get("attention_layer")
    if attention is not None:
        used.append(attention % layers + 1)
    return max(1, *used)


# What a vision config that may serve as a backbone says of its depth in other words.
STAGES = ("stage_names", "out_features", "out_indices")


def drop_unused_vision_layers(config: Any) -> None:
    """Change `config` to a vision encoder that ends at the last layer it uses; what it computes stays the same.

    Indices counted from the end are adapted: of 24 layers with vision_feature_layer -2, 23 stay with -1.
    """
    if not hasattr(config, "vision_feature_layer"):
        raise ValueError(f"drop_unused_vision_layers: {config.model_type} uses every layer of its vision encoder")
    layers, used = config.vision_config.num_hidden_layers, used_vision_layers(config)

    def adapted(index: int) -> int:
        return index + layers - used if index < 0 else index

    features = config.vision_feature_layer
    config.vision_feature_layer = adapted(features) if isinstance(features, int) else [adapted(i) for i in features]
    options = getattr(config, "vispruner_config", None)
    if options is not None and options.get("attention_layer") is not None:
        config.vispruner_config = {**options, "attention_layer": adapted(options["attention_layer"])}
    vision = config.vision_config
    if hasattr(vision, "stage_names"):
        stored = {name: value for name, value in vision.to_dict().items() if name not in STAGES}
        config.vision_config = type(vision).from_dict({**stored, "num_hidden_layers": used})
    else:
        vision.num_hidden_layers = used


# Keys of the parts of config.json that lead stock to code of others: `attribute_map` gives any key another's meaning.
FOREIGN_KEYS = ("auto_map", "attribute_map")


def _without_foreign_code(name: Any, value: Any) -> Any:
    """Return a value of config.json without what leads to code of others; ValueError where it names such code."""
    if str(name).endswith(("_implementation", "_implementation_internal")):
        named = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(entry, str) and "/" in entry for entry in named):
            raise ValueError(f"config.json: {name} names code of a Hub repo, {value!r}, which is not run: take it out")
    if name == "backbone" and isinstance(value, str):
        raise ValueError(f"config.json: backbone names another model, {value!r}, which is not read: take it out")
    if not isinstance(value, dict) or name == "auto_map":
        return value
    return {key: _without_foreign_code(key, inner) for key, inner in value.items() if key not in FOREIGN_KEYS}


class VisPrunerConfigMixin:
    """Validates `vispruner_config` and merges a partial one given at load time over the stored one."""

    vispruner_config: dict[str, Any] | None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vispruner_config is not None:
            self.vispruner_config = merge_vispruner_config(self.vispruner_config, None)
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the stock config comes next in the MRO

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Stock, but no part of config.json leads to code of others: these classes are all the code there is."""
        config_dict = {
            name: _without_foreign_code(name, value) for name, value in config_dict.items() if name != "attribute_map"
        }
        changes = kwargs.pop("vispruner_config", None)
        if changes is not None:
            merged = merge_vispruner_config(config_dict.get("vispruner_config"), changes)
            config_dict = {**config_dict, "vispruner_config": merged}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
