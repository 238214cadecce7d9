"""Build one published repo: a YAML and a base checkpoint become config, code, processor, card and renamed weights.

Nothing is re-saved through transformers: the base's own files are copied byte for byte, config.json gains a few
fields, and weight files change only in the names they carry. A thin repo has no weight files.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from vispruner import ARCHITECTURES, __version__, auto_map, code_files
from vispruner import configuration_vispruner as configuration
from vispruner.clip_text import TextTowerError, read_text_tower
from vispruner.codebook_file import CodebookError, read_codebook
from vispruner.configuration_vispruner import VisPrunerOptions, merge_vispruner_config
from vispruner.engine_interface import ENGINE_PROCESSORS
from vispruner.selectors import require_last_layer_unread, select_tokens, selector_named

from .base_checkpoint import (
    IMAGE_PROCESSOR_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    BaseCheckpoint,
    BuildError,
    find_base,
    find_hub_base,
    refuse_ambiguous,
    resolve_commit,
)
from .ceilings import ceiling
from .checkpoint_io import (
    TensorHeader,
    atomic_directory,
    checkpoint_shards,
    has_weights,
    iter_checkpoint_tensors,
    read_json,
    read_tensor_headers,
    require_readable,
    write_checkpoint,
)
from .endpoint_files import endpoint_files
from .foreign_code import foreign_code, own_code_only, published_settings, without_foreign_code
from .model_card import card_files, model_card
from .plain_text import one_line
from .published_layout import ModelLayout, layout_problems, model_layout, refuse_endless, without_dropped_layers
from .repo_config import RepoConfig, load_repo_config
from .verify_worker import VIDEO_EXTRA, held_by_layer, keeps_everything, needs_video_packages

OWN_FIELDS = ("architectures", "auto_map", "vispruner_config")  # what config.json gains or gets anew
COPY_BLOCK = 16 * 2**20
LAST_NORM = "post_layernorm.weight"
THIN_ABOVE = 2 * 10**9  # bytes of weights


def build_repo(
    config: str | os.PathLike[str] | RepoConfig,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    thin: bool | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    drop_unused_vision_layers: bool = False,
    engine_processor: bool = False,
) -> Path:
    """Build the repo that one YAML describes into the folder `out`, which appears only when it is complete.

    config     a YAML path, the stem of a file in `hub_configs/`, or a loaded RepoConfig
    base       where to read the base from instead of the YAML's `base_model`: a folder or a Hub id
    thin       leave the weights in the base's repo; None is what the YAML says, else thin for bases over 2 GB
    overwrite  replace a non-empty `out`
    drop_unused_vision_layers   leave out the vision layers that nothing is read from, as the YAML's field does
    engine_processor  let the repo's processor count kept tokens for serving engines, as the YAML's field does
    Raises BuildError, RepoConfigError, LayoutError or CheckpointError; `out` is then as it was before.
    """
    repo = config if isinstance(config, RepoConfig) else load_repo_config(config)
    destination = Path(out).expanduser()
    with own_code_only(), atomic_directory(destination, overwrite=overwrite) as staging:
        # --base only says where the bytes are; the YAML's revision is one of the YAML's base.
        source = find_repo_base(repo) if base is None else find_base(os.fspath(base))
        _refuse_overlap(source.folder, destination)
        thin = _is_thin(repo, thin, source)
        if not thin:
            source = source.with_weights()
        folder = source.folder
        require_readable(folder)
        base_config = _read_base_config(folder, repo.architecture)
        tokenizer = _load_tokenizer(folder, repo.architecture, base_config)
        revision = _base_revision(repo, source if base is None else None, thin)
        config_json = _repo_config_json(base_config, repo, revision, thin)
        names, expected = _check_weights(source.tensor_headers(), folder, repo, config_json)
        _try_method_options(repo)
        held = _refuse_ineffective(repo, expected.model, folder)
        _check_files(repo, config_json, folder)
        if drop_unused_vision_layers or repo.drop_unused_vision_layers:
            config_json = _without_unused_layers(config_json)
            names, expected = without_dropped_layers(names, config_json), model_layout(repo.architecture, config_json)
        limit = ceiling(expected.model.model)
        _write_json(staging / "config.json", config_json)
        _write_json(staging / "generation_config.json", _generation_config(folder, base_config, tokenizer))
        (staging / "README.md").write_text(model_card(repo, revision, thin, held, limit), encoding="utf-8")
        for path in (*code_files(repo.architecture), *card_files(repo), *repo.files.values()):
            shutil.copyfile(path, staging / path.name)
        for name, content in (endpoint_files(repo.architecture) if repo.handler else {}).items():
            (staging / name).write_bytes(content)
        _write_processor(folder, staging)
        if engine_processor or repo.engine_processor or "text_tower" in repo.files:
            _name_own_processor(staging / "processor_config.json", repo.architecture)
        if not thin:
            write_published_weights(folder, staging, names, show_progress=show_progress)
            written = {name: header.shape for name, header in read_tensor_headers(staging).items()}
            if problems := layout_problems(expected, written):
                raise BuildError(f"the weights just written are not the model's: {'; '.join(problems)}")
    return destination


def budget_config(config_json: Mapping[str, Any], budget: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a budget branch: main's, with another visual_token_num or keep_ratio."""
    return {**config_json, "vispruner_config": merge_vispruner_config(config_json["vispruner_config"], dict(budget))}


def find_repo_base(repo: RepoConfig) -> BaseCheckpoint:
    """Find the base that a YAML names: a Hub id is one of the Hub, whatever folders lie around here."""
    refuse_ambiguous(repo.base_model)
    return (find_hub_base if repo.base_on_hub else find_base)(repo.base_model, repo.base_revision)


def _is_thin(repo: RepoConfig, asked: bool | None, source: BaseCheckpoint) -> bool:
    if asked and not repo.base_on_hub:
        raise BuildError(
            f"{repo.path}: {repo.repo_id} cannot be thin, because its base_model {repo.base_model} is not on the Hub, "
            "where its users would get the weights: build it with --full, or set base_model to a Hub id (--base only "
            "says where this build reads from)"
        )
    if asked is not None:
        return asked
    if repo.weights is not None:
        return repo.weights == "thin"
    return repo.base_on_hub and source.weights_size() > THIN_ABOVE


def _base_revision(repo: RepoConfig, hub_base: BaseCheckpoint | None, thin: bool) -> str | None:
    """Return the commit that `base_revision` stands for; only a thin repo read from elsewhere has to ask the Hub."""
    if hub_base is not None and hub_base.commit is not None:
        return hub_base.commit
    if not thin or repo.base_revision is None:
        return repo.base_revision
    try:
        return resolve_commit(repo.base_model, repo.base_revision)
    except BuildError as error:
        raise BuildError(
            f"{repo.path}: a thin repo records the commit of its base, and that of base_revision {repo.base_revision} "
            f"is not to be had: set base_revision to the commit. {error}"
        ) from error


def _refuse_overlap(base: Path, out: Path) -> None:
    base, out = base.resolve(), out.resolve()
    if base == out or out in base.parents or base in out.parents:
        raise BuildError(f"--out {out} and the base {base} lie in one another: build into another folder")


def _read_base_config(folder: Path, architecture: str) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is not None:
        raise BuildError(f"the base {folder} is quantized (quantization_config): build from the original weights")
    if left_out := foreign_code({name: value for name, value in config.items() if name not in OWN_FIELDS}):
        _say_left_out("config.json", left_out)
        config = without_foreign_code(config)
    model_type = config.get("model_type")
    if model_type != architecture:
        hint = f"set architecture: {model_type} in the YAML" if model_type in ARCHITECTURES else "give another base"
        raise BuildError(
            f"the base {folder} has model_type {model_type!r}, the YAML's architecture is {architecture!r}: {hint}"
        )
    return config


def _load_tokenizer(folder: Path, architecture: str, base_config: Mapping[str, Any]) -> Any:
    """Return the base's tokenizer; refuse a processor that is missing, broken or writes other placeholders."""
    for what, files in (("image processor", IMAGE_PROCESSOR_FILES), ("tokenizer", TOKENIZER_FILES)):
        if not any((folder / name).is_file() for name in files):
            raise BuildError(
                f"the base {folder} has no {what} (none of {', '.join(files)}): add the files of the original repo"
            )
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a broken processor file raises, its name belongs in the message
        if needs_video_packages(error):
            tqdm.write(f"the processor of {folder} is copied without having been tried: {VIDEO_EXTRA}")
            return _tokenizer_alone(folder)
        raise BuildError(f"the processor of the base {folder} does not load: {error}") from error
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise BuildError(
                f"the processor of the base {folder} has no {part}: it cannot read an image with its text"
            )
    if getattr(processor, "patch_size", ...) is None:
        raise BuildError(
            f"processor_config.json of the base {folder} has no patch_size: the processor cannot count visual tokens; "
            "take a newer revision of the base"
        )
    for modality in ARCHITECTURES[architecture].model_class.modalities:
        # Configs have called it an index, too.
        known = (base_config.get(name) for name in (modality.placeholder, modality.placeholder[:-2] + "index"))
        expected = next((token for token in known if token is not None), None)
        # Gemma's processor calls what begins an image its image token, and its tokenizer the placeholder.
        parts = (processor, processor.tokenizer)
        found = [getattr(part, f"{modality.name}_token_id", None) for part in parts]
        written = [token for token in found if token is not None]
        if expected is not None and written and expected not in written:
            raise BuildError(
                f"the base {folder}: the processor's {modality.name} token is {written[0]}, config.json's is "
                f"{expected}: processor and model do not belong together"
            )
    return processor.tokenizer


def _tokenizer_alone(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        raise BuildError(f"the tokenizer of the base {folder} does not load: {error}") from error


def _check_weights(
    headers: Mapping[str, TensorHeader], folder: Path, repo: RepoConfig, config_json: Mapping[str, Any]
) -> tuple[dict[str, str], ModelLayout]:
    """Return base name -> published name and what the model needs, once both fit each other."""
    try:
        refuse_endless(config_json, len(headers))
        expected = model_layout(repo.architecture, config_json)
    except Exception as error:  # whatever the classes of transformers make of it
        if str(error).startswith("vispruner_config"):
            raise BuildError(f"{repo.path}: {error}") from error
        raise BuildError(f"{repo.path} with the config.json of {folder} describes no model: {error}") from error
    names = expected.published_names(headers)
    found = {published: headers[name].shape for name, published in names.items()}
    if problems := layout_problems(expected, found):
        raise BuildError(f"the weights of {folder} are not those of its config.json: {'; '.join(problems)}")
    return names, expected


def _try_method_options(repo: RepoConfig) -> None:
    """Let each method choose once among tokens drawn at random: it alone knows which numbers its options may be."""
    options = VisPrunerOptions.from_dict(repo.vispruner_config)
    drawn = torch.Generator().manual_seed(0)
    side, width = 24, 8
    tokens = torch.randn(1, side**2, width, generator=drawn)
    saliency = torch.rand(1, side**2, generator=drawn)
    inputs: dict[str, Any] = dict.fromkeys(("projected", "keys", "text", "layer_inputs"), tokens)
    inputs |= {"text_saliency": saliency, "places": tokens[..., :3]}
    inputs |= {
        "cls_feature": tokens[:, 0],
        "cls_query": tokens[:, 0],
        "raw_keys": torch.cat([tokens[:, :1], tokens], 1),
    }
    inputs |= {"codebook": tokens[0, :4], "grid": (side, side), "videos": torch.zeros(1, dtype=torch.int64)}
    try:
        for method in options.methods if options.method_options else ():
            asked = selector_named(method).saliency_layers
            layers = saliency[:, None].expand(-1, 0 if asked is None else len(asked(24, 22)), -1)
            select_tokens(method, tokens, saliency, side, layer_saliency=layers, **inputs, **options.selector_options)
    except ValueError as error:
        raise BuildError(f"{repo.path}: {error}") from error


def _refuse_ineffective(repo: RepoConfig, model: Any, folder: Path) -> list[int] | None:
    """Refuse a budget, main's or a branch's, that keeps everything: the repo would be published as pruned and is not.

    model    of the repo, whose tensors are not allocated; its budget is main's again afterwards
    returns  what `held_by_layer` says of main's budget
    """
    image_processor = None
    try:
        if "image_grid_thw" in model.modalities[0].described_by:  # what its largest picture is, it alone knows
            image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as for processors
        if needs_video_packages(error):
            return None  # said already where the processor was to be tried
        raise BuildError(f"the image processor of the base {folder} does not load: {error}") from error
    main = model.config.vispruner_config
    for name, budget in {"vispruner_config": {}, **{f"budgets.{key}": it for key, it in repo.budgets.items()}}.items():
        try:
            model.set_vispruner_config(**budget)
        except ValueError as error:
            raise BuildError(f"{repo.path}: {name}: {error}") from error
        if (problem := keeps_everything(model, image_processor)) is not None:
            raise BuildError(f"{repo.path}: {name}.{problem}")
        model.config.vispruner_config = main
    return held_by_layer(model, image_processor)


def _check_files(repo: RepoConfig, config_json: Mapping[str, Any], base: Path) -> None:
    """Refuse a file that vispruner_config names and that is not one for this model."""
    config = ARCHITECTURES[repo.architecture].config_class.from_dict(copy.deepcopy(dict(config_json)))
    try:
        if (codebook := repo.files.get("codebook")) is not None:
            read_codebook(codebook, config.get_text_config().hidden_size)
        if (tower := repo.files.get("text_tower")) is not None:
            if repo.architecture not in ENGINE_PROCESSORS:
                raise TextTowerError(f"only {' and '.join(ENGINE_PROCESSORS)} can have one, not {repo.architecture}")
            read_text_tower(tower, config.vision_config.hidden_size, _last_norm(base))
    except (CodebookError, TextTowerError) as error:
        field = "codebook" if isinstance(error, CodebookError) else "text_tower"
        raise BuildError(f"{repo.path}: vispruner_config.{field}: {error}") from error


def _last_norm(base: Path) -> torch.Tensor | None:
    """Return the weight of the last layer norm of a base's vision tower; None where no safetensors here have it."""
    shards = checkpoint_shards(base) if has_weights(base) else {}
    for shard in shards:
        if shard.suffix == ".safetensors":
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    if name.endswith(LAST_NORM):
                        return file.get_tensor(name)
    return None


def _repo_config_json(
    base_config: Mapping[str, Any], repo: RepoConfig, revision: str | None, thin: bool
) -> dict[str, Any]:
    bookkeeping = {
        "base_model_name_or_path": repo.base_model,
        "base_model_revision": revision,
        "weights": "thin" if thin else "full",
        "vispruner_version": __version__,
    }
    return {
        **base_config,
        "architectures": [ARCHITECTURES[repo.architecture].model_class.__name__],
        "auto_map": auto_map(repo.architecture),
        "vispruner_config": {**repo.vispruner_config, **bookkeeping},
    }


def _write_processor(folder: Path, out: Path) -> None:
    """Copy the base's processor and tokenizer, but for entries that lead to code or files of others."""
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            content, left_out = published_settings(folder / name)
            _say_left_out(name, left_out)
            (out / name).write_bytes(content)


def _say_left_out(name: str, entries: Sequence[str]) -> None:
    if entries:
        tqdm.write(
            f"{name}: {one_line(', '.join(entries))} of the base left out: transformers could run code, or read "
            "files, of somebody else by it"
        )


def engine_auto_map(architecture: str) -> dict[str, str] | None:
    """Return the `auto_map` of processor_config.json in a repo that counts kept tokens for engines, where it can."""
    processor = ENGINE_PROCESSORS.get(architecture)
    if processor is None:
        return None
    return {"AutoProcessor": f"{processor.__module__.rsplit('.', 1)[-1]}.{processor.__name__}"}


def _name_own_processor(path: Path, architecture: str) -> None:
    """Say in processor_config.json which class of the repo's code is its processor; the rest stays the base's."""
    own = engine_auto_map(architecture)
    if own is None:
        raise BuildError(
            f"engine_processor: there is none for {architecture}, only for {', '.join(ENGINE_PROCESSORS)}"
        )
    if not path.is_file():
        raise BuildError("engine_processor: the base has no processor_config.json; take a newer revision of it")
    _write_json(path, {**read_json(path), "auto_map": own})


def _without_unused_layers(config_json: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of a vision encoder that ends at the last layer in use."""
    config = ARCHITECTURES[config_json["model_type"]].config_class.from_dict(copy.deepcopy(config_json))
    try:
        require_last_layer_unread(VisPrunerOptions.from_dict(config.vispruner_config))
        configuration.drop_unused_vision_layers(config)
    except ValueError as error:
        raise BuildError(f"{error}: build without drop_unused_vision_layers") from error
    layers, stages = config.vision_config.num_hidden_layers, configuration.STAGES
    vision = {name: value for name, value in config_json["vision_config"].items() if name not in stages}
    return {
        **config_json,
        "vision_config": {**vision, "num_hidden_layers": layers},
        "vision_feature_layer": config.vision_feature_layer,
        "vispruner_config": config.vispruner_config,
    }


def stored_generation(folder: Path, base_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base's generation config, made of its config.json where it has none."""
    path = folder / "generation_config.json"
    if path.is_file():
        return without_foreign_code(read_json(path))
    stored = {name: _token_id(base_config, name) for name in ("bos_token_id", "eos_token_id")}
    return {name: token for name, token in stored.items() if token is not None}


def _token_id(base_config: Mapping[str, Any], name: str) -> Any:
    return base_config.get(name, (base_config.get("text_config") or {}).get(name))


def _generation_config(folder: Path, base_config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the base's generation config with a pad token, without which batched generation only guesses one."""
    found = stored_generation(folder, base_config)
    for pad in (found.get("pad_token_id"), tokenizer.pad_token_id, _token_id(base_config, "pad_token_id")):
        if pad is not None:
            return {**found, "pad_token_id": pad}
    end = found.get("eos_token_id", tokenizer.eos_token_id)
    pad = end[0] if isinstance(end, list) else end
    if pad is None:
        raise BuildError(
            f"the base {folder} has neither a pad nor an end token: set pad_token in tokenizer_config.json"
        )
    tqdm.write(f"{folder} names no pad token; generation_config.json gets the end token {pad} as pad_token_id")
    return {**found, "pad_token_id": pad}


def write_published_weights(folder: Path, out: Path, names: Mapping[str, str], show_progress: bool = True) -> None:
    """Write the tensors that `names` lists under their published names, as safetensors.

    A safetensors shard keeps its file name and its bytes; only its header changes, so memory stays at one block. Where
    no name in it changes the whole file is copied. .bin shards are read with `weights_only=True` and written anew.
    """
    shards = checkpoint_shards(folder)
    if any(path.suffix == ".bin" for path in shards):
        tensors = ((names[name], value) for name, value in iter_checkpoint_tensors(folder) if name in names)
        write_checkpoint(_counted(tensors, len(names), show_progress), out)
        return
    total = sum(path.stat().st_size for path in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not show_progress) as progress:
        weight_map, size = {}, 0
        for path in shards:
            written = rename_safetensors(path, out / path.name, names, progress)
            weight_map.update(dict.fromkeys(written, path.name))
            size += sum(written.values())
    if len(shards) > 1 or next(iter(shards)).name != "model.safetensors":
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(out / "model.safetensors.index.json", index)


def _counted(
    tensors: Iterator[tuple[str, torch.Tensor]], count: int, show_progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    yield from tqdm(tensors, total=count, unit="tensor", desc="weights", disable=not show_progress)


def rename_safetensors(source: Path, target: Path, names: Mapping[str, str], progress: tqdm) -> dict[str, int]:
    """Copy a safetensors file under new tensor names, leaving out the tensors `names` lacks; return bytes per name."""
    with source.open("rb") as reader:
        length = int.from_bytes(reader.read(8), "little")
        header = json.loads(reader.read(length))
        metadata = header.pop("__metadata__", None)
        kept = sorted((entry["data_offsets"][0], name) for name, entry in header.items() if name in names)
        if all(names.get(name) == name for name in header) and (metadata or {}).get("format") == "pt":
            reader.seek(0)
            with target.open("wb") as writer:
                _copy_bytes(reader, writer, source.stat().st_size, progress)
            return {name: end - start for name, (start, end) in ((n, e["data_offsets"]) for n, e in header.items())}
        renamed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        sizes, position = {}, 0
        for start, name in kept:
            size = header[name]["data_offsets"][1] - start
            renamed[names[name]] = {**header[name], "data_offsets": [position, position + size]}
            sizes[names[name]] = size
            position += size
        encoded = json.dumps(renamed, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the data stays aligned
        with target.open("wb") as writer:
            writer.write(len(encoded).to_bytes(8, "little") + encoded)
            progress.update(8 + length)
            for start, name in kept:
                reader.seek(8 + length + start)
                _copy_bytes(reader, writer, sizes[names[name]], progress)
    return sizes


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, count: int, progress: tqdm) -> None:
    while count:
        block = reader.read(min(count, COPY_BLOCK))
        if not block:
            raise BuildError(f"{reader.name} ended {count} bytes early: it changed while it was read")
        writer.write(block)
        progress.update(len(block))
        count -= len(block)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
