"""Turn an original LLaVA v1.5 / v1.6 checkpoint into a stock Hugging Face LLaVA or LLaVA-NeXT checkpoint.

Everything is planned from configs and tensor headers first, so that what cannot be converted is refused before a byte
is written; then the weights are streamed, shard by shard, into a folder that appears only when it is complete. Run on
its own output, or a second time, the converter changes nothing.
"""

from __future__ import annotations

import ast
import copy
import filecmp
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from . import llava_keys as keys
from .checkpoint_io import (
    CheckpointError,
    TensorHeader,
    atomic_directory,
    has_weights,
    iter_checkpoint_tensors,
    parse_size,
    read_json,
    read_tensor_headers,
    require_readable,
    same_tensors,
    shorten,
    write_checkpoint,
)
from .foreign_code import own_code_only
from .published_layout import refuse_endless
from .repo_config import is_hub_id

STOCK_CLASSES: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}
STOCK_PROCESSORS = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
VOCABULARY_MULTIPLE = 64  # what the published llava-hf checkpoints are padded to


@dataclass
class Conversion:
    """All that is known before the weights are read: where they come from, and every other file of the result."""

    source: Path
    tower: Path | None  # folder to read vision weights from; None when the checkpoint holds them
    dtype: torch.dtype
    vocab_size: int
    total_bytes: int
    files: dict[str, bytes]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the result under its new name."""
        for name, tensor in iter_checkpoint_tensors(self.source):
            new = keys.rename(name, keys.KEY_MAP, keys.IGNORED_KEYS)
            if new in keys.VOCABULARY_KEYS:
                tensor = grow_vocabulary(tensor, self.vocab_size)
            if new is not None:
                yield new, tensor
        if self.tower is None:
            return
        for name, tensor in iter_checkpoint_tensors(self.tower):
            new = keys.rename(name, keys.TOWER_KEY_MAP, keys.TOWER_IGNORED_KEYS)
            if new is not None:  # the original code, too, runs a separate tower in the checkpoint's dtype
                yield new, tensor.to(self.dtype)


def convert_llava(
    source: str | Path,
    destination: str | Path,
    vision_tower: str | Path | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    show_progress: bool = True,
) -> Path:
    """Write `source`, an original LLaVA checkpoint, to `destination` as a stock Hugging Face checkpoint.

    source          local folder or Hub id
    vision_tower    local folder or Hub id of the CLIP model: its config and preprocessor are used, and its weights
                    where the checkpoint holds none; by default what config.mm_vision_tower names
    overwrite       replace a non-empty `destination`
    max_shard_size  largest weight file, bytes or such as "5GB"; also about the memory that is needed
    returns         the destination; `CheckpointError` for everything that cannot be converted or written

    A destination that already holds this very result is left alone, and so is a source that needs no conversion: it is
    copied as it is, or, when it is the destination, nothing happens.
    """
    parse_size(max_shard_size)
    folder = fetch(source)
    require_readable(folder)
    final = Path(destination).expanduser().resolve()
    config = read_json(folder / "config.json")
    if is_converted(config):
        return _copy_converted(folder, Path(destination), overwrite, show_progress)
    plan = plan_conversion(folder, config, vision_tower)
    _protect_inputs(final, [folder, plan.tower])
    if not overwrite and _holds_result(final, plan, show_progress):
        _say(f"{final} already holds this conversion, nothing to do")
        return final
    with atomic_directory(destination, overwrite) as work:
        for name, content in plan.files.items():
            (work / name).write_bytes(content)
        write_checkpoint(_with_progress(plan, "converting", show_progress), work, max_shard_size)
    return final


def is_converted(config: dict[str, Any]) -> bool:
    """Tell a Hugging Face LLaVA config from an original one, which may carry the same model_type."""
    return config.get("model_type") in STOCK_CLASSES and isinstance(config.get("text_config"), dict)


def fetch(source: str | Path, weights: bool = True, hint: str = "") -> Path:
    """Give the local folder of a checkpoint: the folder itself, or what the Hub has under that id."""
    folder, name = Path(source).expanduser(), str(source)
    if not name.strip():
        raise CheckpointError(f"an empty name is neither a folder nor a Hub id{hint}")
    if folder.is_dir():
        if not isinstance(source, Path) and is_hub_id(name):
            raise CheckpointError(
                f"{name} is a Hub id, and there is a folder of that name here: write ./{name} for it"
            )
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{source} is a file; give the folder of the checkpoint")
    return _fetch_from_hub(source, weights, hint)


def _fetch_from_hub(source: str | Path, weights: bool, hint: str) -> Path:
    name = str(source)
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise CheckpointError(f"there is no folder {source}{hint}")
    small = ["*.json", "*.model"]
    try:
        local = Path(snapshot_download(name, allow_patterns=[*small, "*.safetensors"] if weights else small))
        if weights and not has_weights(local):
            local = Path(snapshot_download(name, allow_patterns=[*small, "*.bin"]))
    except Exception as error:  # every layer below the Hub client brings errors of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{name} is no local folder, and the Hub did not give it ({reason[0]}); "
            f"check the name and the network, or give a local folder{hint}"
        ) from error
    return local


def plan_conversion(source: Path, config: dict[str, Any], vision_tower: str | Path | None = None) -> Conversion:
    """Check that everything fits together and prepare every file but the weights."""
    _refuse_unknown(source, config)
    headers = _renamed_headers(source, keys.KEY_MAP, keys.IGNORED_KEYS)
    kind = _architecture(config, headers)
    inside = any(name.startswith(keys.TOWER_PREFIX) for name in headers)
    tower = _tower_folder(config, vision_tower, weights=not inside)
    if not inside:
        if config.get("unfreeze_mm_vision_tower"):
            raise CheckpointError(f"{source} was trained together with its vision tower, but does not hold that tower")
        if not has_weights(tower):
            raise CheckpointError(f"neither {source} nor the vision tower {tower} holds vision weights")
        headers |= _renamed_headers(tower, keys.TOWER_KEY_MAP, keys.TOWER_IGNORED_KEYS)
    rows = _positive(config, "vocab_size")
    tokenizer = load_tokenizer(source, rows)
    top = max(tokenizer.get_vocab().values()) + 1
    vocab_size = rows if top <= rows else -(-top // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    embedding = headers.get(keys.VOCABULARY_KEYS[0])
    dtype = embedding.dtype if embedding is not None else torch.float16
    new = stock_config(kind, config, tokenizer, vision_config(tower), dtype, vocab_size)
    expected = _expected_shapes(kind, new, len(headers))
    _check_tensors(source, tower if not inside else None, headers, expected, rows)
    files = {
        "config.json": _json(new),
        "generation_config.json": _json({k: new[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}),
        "preprocessor_config.json": _json(preprocessor_config(kind, config, new, tower)),
        "processor_config.json": _json(processor_config(kind, new)),
        "chat_template.jinja": keys.CHAT_TEMPLATES[new["text_config"]["model_type"]].encode(),
        **tokenizer_files(source, tokenizer, STOCK_PROCESSORS[kind]),
    }
    total = sum(torch.Size(shape).numel() for shape in expected.values()) * dtype.itemsize
    return Conversion(source, None if inside else tower, dtype, vocab_size, total, files)


def _refuse_unknown(source: Path, config: dict[str, Any]) -> None:
    """Refuse, by name, what looks like LLaVA and would convert to something that answers differently."""
    told = f"{source} cannot be converted: "
    for name in ("adapter_config.json", "non_lora_trainables.bin"):
        if (source / name).is_file():
            raise CheckpointError(
                f"{told}{name} says that it holds LoRA deltas; merge them into their base model first"
            )
    if (source / "mm_projector.bin").is_file() and not has_weights(source):
        raise CheckpointError(f"{told}it holds only a projector (mm_projector.bin), not a whole model")
    model_type = config.get("model_type")
    if model_type not in keys.TEXT_MODEL_TYPES:
        raise CheckpointError(
            f"{told}config.model_type is {model_type!r}; known are {', '.join(map(repr, keys.TEXT_MODEL_TYPES))}"
        )
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise CheckpointError(f"{told}config.mm_projector_type must be 'mlp2x_gelu', got {projector!r}")
    for field, why in (
        ("mm_use_im_start_end", "its prompts need start and end tokens that the stock processor does not write"),
        ("tie_word_embeddings", "the stock classes keep lm_head apart"),
        ("quantization_config", "its weights are quantized; convert the original ones"),
        ("s2", "multi-scale vision features have no stock counterpart"),
    ):
        if config.get(field):
            raise CheckpointError(f"{told}config.{field} is set, and {why}")
    if not (source / "tokenizer.model").is_file():
        raise CheckpointError(f"{told}it has no tokenizer.model, and only LlamaTokenizer is known")


def _architecture(config: dict[str, Any], headers: dict[str, TensorHeader]) -> str:
    """Tell v1.6 from v1.5, and refuse a checkpoint of which the parts disagree."""
    newline = "model.image_newline" in headers
    merge = config.get("mm_patch_merge_type") or "flat"
    if not (newline or "unpad" in merge or config.get("image_aspect_ratio") == "anyres"):
        return "llava"
    if not newline:
        raise CheckpointError("config.json describes LLaVA v1.6, but the weights have no model.image_newline")
    if merge != "spatial_unpad":
        raise CheckpointError(f"config.mm_patch_merge_type must be 'spatial_unpad' for LLaVA v1.6, got {merge!r}")
    if not config.get("image_grid_pinpoints"):
        raise CheckpointError("config.image_grid_pinpoints is missing, but the weights have model.image_newline")
    return "llava_next"


def _tower_folder(config: dict[str, Any], vision_tower: str | Path | None, weights: bool) -> Path:
    name = vision_tower if vision_tower is not None else config.get("mm_vision_tower", config.get("vision_tower"))
    if not name or not isinstance(name, str | Path):
        raise CheckpointError(
            "config.mm_vision_tower names no vision tower; give the CLIP model's folder or Hub id (--vision-tower)"
        )
    if vision_tower is not None:
        tower = fetch(name, weights)
    elif is_hub_id(name):  # of whoever made the checkpoint, so that no folder of this machine is meant by it
        tower = _fetch_from_hub(name, weights, "; --vision-tower gives the vision tower's folder or Hub id")
    else:
        raise CheckpointError(
            f"config.mm_vision_tower is {name!r}, which is no Hub id: give the vision tower's folder or Hub id with "
            "--vision-tower"
        )
    require_readable(tower)
    return tower


def _renamed_headers(
    folder: Path, key_map: tuple[tuple[str, str], ...], ignored: tuple[str, ...]
) -> dict[str, TensorHeader]:
    headers, unknown = {}, []
    for name, header in read_tensor_headers(folder).items():
        try:
            new = keys.rename(name, key_map, ignored)
        except KeyError:
            unknown.append(name)
            continue
        if new in headers:
            raise CheckpointError(f"{folder} holds {new} twice, the second time as {name}")
        if new is not None:
            headers[new] = header
    if unknown:
        raise CheckpointError(f"{folder} holds tensors that are not known: {shorten(unknown)}")
    return headers


def _expected_shapes(kind: str, config: dict[str, Any], tensors: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the stock model, under the names we write; more layers than `tensors` are none."""
    config_class, model_class = STOCK_CLASSES[kind]
    try:
        refuse_endless(config, tensors)
        with torch.device("meta"):
            state = model_class(config_class.from_dict(copy.deepcopy(config))).state_dict()
    except Exception as error:  # whatever a config with impossible values runs into
        raise CheckpointError(f"config.json does not describe a model: {error}") from error
    shapes = {}
    for name, tensor in state.items():
        inner = name.removeprefix(keys.TOWER_PREFIX)
        if inner != name and not inner.startswith("vision_model."):  # newer transformers have it flat
            name = f"{keys.TOWER_PREFIX}vision_model.{inner}"
        shapes[name] = tuple(tensor.shape)
    return shapes


def _check_tensors(
    source: Path,
    tower: Path | None,
    headers: dict[str, TensorHeader],
    expected: dict[str, tuple[int, ...]],
    rows: int,
) -> None:
    """Compare what the files hold with what the stock model needs."""
    where = f"{source}" if tower is None else f"{source} with the vision tower {tower}"
    missing = sorted(expected.keys() - headers.keys())
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensors: {shorten(missing)} (as they are named after conversion)"
        )
    surplus = sorted(headers.keys() - expected.keys())
    if surplus:
        raise CheckpointError(f"{where} holds more than config.json describes: {shorten(surplus)}")
    for name, shape in expected.items():
        if name in keys.VOCABULARY_KEYS:
            shape = (rows, *shape[1:])
        if headers[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(headers[name].shape)} (in {headers[name].file}), "
                f"config.json asks for {list(shape)}"
            )


def stock_config(
    kind: str,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    vision: dict[str, Any],
    dtype: torch.dtype,
    vocab_size: int,
) -> dict[str, Any]:
    """Give config.json of the result; fields that the original does not set are left to the stock class."""
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in keys.SELECT_STRATEGIES:
        raise CheckpointError(f"config.mm_vision_select_feature must be 'patch' or 'cls_patch', got {feature!r}")
    layer = config.get("mm_vision_select_layer")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise CheckpointError(f"config.mm_vision_select_layer must be a layer number, got {layer!r}")
    model_type = keys.TEXT_MODEL_TYPES[config["model_type"]]
    if any("Mistral" in str(name) for name in config.get("architectures") or []):
        model_type = "mistral"
    pad = tokenizer.pad_token_id
    text = {key: config[key] for key in keys.TEXT_CONFIG_FIELDS if key in config}
    new = {
        "architectures": [STOCK_CLASSES[kind][1].__name__],
        "model_type": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "bos_token_id": config.get("bos_token_id", tokenizer.bos_token_id),
        "eos_token_id": config.get("eos_token_id", tokenizer.eos_token_id),
        "pad_token_id": pad,
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2 + (feature == "cls_patch"),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": keys.SELECT_STRATEGIES[feature],
        "text_config": {"model_type": model_type, **text, "pad_token_id": pad, "vocab_size": vocab_size},
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }
    if kind == "llava_next":
        new["image_grid_pinpoints"] = grid_pinpoints(config["image_grid_pinpoints"])
    return new


def grid_pinpoints(original: list[list[int]] | str) -> list[list[int]]:
    """Turn (width, height) pairs into the (height, width) pairs of transformers.

    A list that holds every pair both ways round, as all published ones do, stays as it is, as in the llava-hf repos.
    """
    try:
        pairs = ast.literal_eval(original) if isinstance(original, str) else original
        pairs = [[int(width), int(height)] for width, height in pairs]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"config.image_grid_pinpoints must be a list of pairs, got {original!r}") from error
    swapped = [[height, width] for width, height in pairs]
    return pairs if sorted(pairs) == sorted(swapped) else swapped


def vision_config(tower: Path) -> dict[str, Any]:
    """Read the vision part of a CLIP config, complete with the defaults it leaves out."""
    config = read_json(tower / "config.json")
    vision = config.get("vision_config", {}) if config.get("model_type") == "clip" else config
    if config.get("model_type") not in ("clip", "clip_vision_model") or not isinstance(vision, dict):
        raise CheckpointError(
            f"the vision tower {tower} must be a CLIP model, its config.model_type is {config.get('model_type')!r}"
        )
    try:
        full = CLIPVisionConfig.from_dict(vision)
    except Exception as error:  # validation errors of the config classes
        raise CheckpointError(f"{tower / 'config.json'} does not describe a vision tower: {error}") from error
    return {field: getattr(full, field) for field in keys.VISION_CONFIG_FIELDS}


def preprocessor_config(kind: str, config: dict[str, Any], new: dict[str, Any], tower: Path) -> dict[str, Any]:
    """Give preprocessor_config.json: the tower's preprocessing, with the padding or tiling of the original model."""
    base = read_json(tower / "preprocessor_config.json")
    size, crop = base.get("size", 224), base.get("crop_size", 224)
    new_base = {
        "do_resize": base.get("do_resize", True),
        "size": {"shortest_edge": size} if isinstance(size, int) else size,
        "resample": base.get("resample", 3),
        "do_center_crop": base.get("do_center_crop", True),
        "crop_size": {"height": crop, "width": crop} if isinstance(crop, int) else crop,
        "do_rescale": base.get("do_rescale", True),
        "rescale_factor": base.get("rescale_factor", 1 / 255),
        "do_normalize": base.get("do_normalize", True),
        "image_mean": base.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        "image_std": base.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
        "do_convert_rgb": base.get("do_convert_rgb", True),
        "processor_class": STOCK_PROCESSORS[kind],
    }
    edge = new["vision_config"]["image_size"]
    if new_base["crop_size"] != {"height": edge, "width": edge}:
        raise CheckpointError(f"{tower} crops images to {crop}, but its config.image_size is {edge}")
    if kind == "llava_next":
        tiling = {"image_grid_pinpoints": new["image_grid_pinpoints"], "do_pad": True}
        return {"image_processor_type": "LlavaNextImageProcessor", **new_base, **tiling}
    if config.get("image_aspect_ratio") == "pad":
        return {"image_processor_type": "LlavaImageProcessor", **new_base, "do_pad": True}
    return {"image_processor_type": "CLIPImageProcessor", **new_base}


def processor_config(kind: str, new: dict[str, Any]) -> dict[str, Any]:
    """Give processor_config.json, by which the processor counts the placeholders of an image."""
    return {
        "processor_class": STOCK_PROCESSORS[kind],
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": new["vision_config"]["patch_size"],
        "vision_feature_select_strategy": new["vision_feature_select_strategy"],
    }


def load_tokenizer(source: Path, rows: int) -> PreTrainedTokenizerBase:
    """Load the source's tokenizer and add `<image>` and a pad token of its own.

    rows  what the vocabulary of the model has, of which more than half must be the tokenizer's
    The original code encodes the text on either side of an image separately, each with a leading space mark; that is
    what `legacy` asks for.
    """
    try:
        with own_code_only():
            tokenizer = LlamaTokenizer.from_pretrained(source, legacy=True)
    except Exception as error:  # sentencepiece, protobuf and tokenizers each fail in their own way
        raise CheckpointError(f"cannot read the tokenizer of {source}: {error}") from error
    if 2 * len(tokenizer.get_vocab()) < rows:
        raise CheckpointError(
            f"the tokenizer of {source} has {len(tokenizer.get_vocab())} tokens, and config.vocab_size is {rows}: "
            "tokenizer.model is empty, or another model's"
        )
    if "<|im_start|>" in tokenizer.get_vocab():
        raise CheckpointError(f"{source} uses ChatML prompts (<|im_start|>), for which no chat template is known")
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token_id in (None, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def tokenizer_files(source: Path, tokenizer: PreTrainedTokenizerBase, processor: str) -> dict[str, bytes]:
    """Give the tokenizer's files, in the form that old and new versions of transformers read alike."""
    names = {key: str(getattr(tokenizer, key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    added = {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "added_tokens_decoder": added,
        **names,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "left",
        "processor_class": processor,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    return {
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(pretty=True).encode(),
        "tokenizer.model": (source / "tokenizer.model").read_bytes(),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(names),
    }


def grow_vocabulary(weight: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Append rows up to `vocab_size`, each the mean of the old ones, so that no added token is ever the likeliest."""
    extra = vocab_size - weight.shape[0]
    if extra <= 0:
        return weight
    mean = weight.mean(dim=0, keepdim=True, dtype=torch.float64).to(weight.dtype)
    return torch.cat([weight, mean.expand(extra, -1)])


def _copy_converted(source: Path, destination: Path, overwrite: bool, show_progress: bool) -> Path:
    """Bring a checkpoint that needs no conversion to the destination unchanged."""
    final = destination.expanduser().resolve()
    read_tensor_headers(source)
    if final == source:
        _say(f"{source} is already a Hugging Face checkpoint, nothing to convert")
        return final
    _protect_inputs(final, [source])
    names = sorted(path.name for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
    if not overwrite and _same_files(source, final, names):
        _say(f"{source} is already a Hugging Face checkpoint, and {final} is a copy of it: nothing to do")
        return final
    _say(f"{source} is already a Hugging Face checkpoint, nothing to convert: copying it to {final}")
    with atomic_directory(destination, overwrite) as work:
        for name in tqdm(names, desc="copying", unit="file", disable=not show_progress):
            shutil.copyfile(source / name, work / name)
    return final


def _same_files(first: Path, second: Path, names: list[str]) -> bool:
    return all((second / n).is_file() and filecmp.cmp(first / n, second / n, shallow=False) for n in names)


def _protect_inputs(final: Path, inputs: Iterable[Path | None]) -> None:
    for folder in inputs:
        if folder is not None and (folder == final or final in folder.parents):
            raise CheckpointError(f"{final} holds the input {folder}; choose another destination")


def _holds_result(final: Path, plan: Conversion, show_progress: bool) -> bool:
    """Compare the destination with what would be written, the small files first."""
    try:
        if any((final / name).read_bytes() != content for name, content in plan.files.items()):
            return False
        return same_tensors(_with_progress(plan, "comparing", show_progress), final)
    except (OSError, CheckpointError):
        return False


def _with_progress(plan: Conversion, what: str, show: bool) -> Iterator[tuple[str, torch.Tensor]]:
    with tqdm(total=plan.total_bytes, desc=what, unit="B", unit_scale=True, disable=not show) as bar:
        for name, tensor in plan.tensors():
            yield name, tensor
            bar.update(tensor.numel() * tensor.element_size())


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _positive(config: dict[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.{field} must be a positive number, got {value!r}")
    return value
