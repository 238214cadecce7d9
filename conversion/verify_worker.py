"""Load a built repo the way its users will, in a process that knows nothing but that folder, and report what happened.

`verify` copies this file into an empty folder and runs it there. It imports transformers and never this package, whose
import would register the very classes that the repo has to bring along itself.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

QUESTION = {"image": "What is in this picture?", "video": "What happens in this video?"}
NEW_TOKENS = 4
FRAMES = 8
BUDGETS = ("visual_token_num", "keep_ratio", "stage_token_nums")
VIDEO_PACKAGES = ("torchvision", "num2words")
VIDEO_EXTRA = "it needs packages that most others do not: pip install 'vispruner[video]'"


class Refused(Exception):
    """A check that did not hold; its message is the reason."""


class Worker:
    """Runs the checks in order and keeps what later ones need; only one model is in memory at a time."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.class_name: str = settings["class_name"]
        self.weights_folder = Path(settings["weights_folder"])  # of a thin repo: its base in the Hub cache
        self.weight_files: list[str] = settings["weight_files"]
        self.stored_names: dict[str, str] = settings["stored_names"]
        self.renamed_inputs: dict[str, str] = settings["renamed_inputs"]  # as is this
        self.modalities: list[dict[str, Any]] = settings["modalities"]  # the model class's, as dicts
        self.model: Any = None
        self.processor: Any = None

    def checks(self, run_models: bool) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "AutoConfig", self.check_config
        yield "AutoProcessor", self.check_processor
        yield "auto classes", self.check_auto_classes
        yield "budget", self.check_budget
        if not run_models:
            return
        yield "AutoModelForImageTextToText", self.check_image_text_model
        yield "weights come from the files", self.check_weights
        yield "KV length falls", self.check_kv_length
        yield "keep-all equals stock", self.check_keep_all
        yield "AutoModel", self.check_auto_model
        yield "pipeline", self.check_pipeline

    def check_config(self) -> str:
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=True)
        self._require_own(type(config), "AutoConfig")
        stored = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["vispruner_config"]
        if config.vispruner_config != stored:
            raise Refused(f"vispruner_config is {stored} in config.json but {config.vispruner_config} once loaded")
        return type(config).__name__

    def check_processor(self) -> str:
        try:
            self.processor = AutoProcessor.from_pretrained(self.folder, trust_remote_code=True)
        except Exception as error:
            if needs_video_packages(error):
                raise Refused(f"the processor cannot be tried here: {VIDEO_EXTRA}") from error
            raise
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=True)
        counted = []
        for modality in self._visual_inputs():
            placeholders = self._placeholders(self.inputs(modality["name"]), modality, config)
            counted.append(f"{placeholders} placeholders for one {modality['name']}")
            if placeholders <= 1:
                raise Refused(f"the processor writes {counted[-1]}")
        return ", ".join([type(self.processor).__name__, *counted])

    def _visual_inputs(self) -> list[dict[str, Any]]:
        """Return the modalities that model and processor both have; the first is the image."""
        has_video = getattr(self.processor, "video_processor", None) is not None
        return [modality for modality in self.modalities if modality["name"] != "video" or has_video]

    @staticmethod
    def _placeholders(inputs: dict[str, torch.Tensor], modality: dict[str, Any], config: Any) -> int:
        return int((inputs["input_ids"] == getattr(config, modality["placeholder"])).sum())

    def check_auto_classes(self) -> str:
        """Make the model on the meta device, which takes no weights."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=True)
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            with torch.device("meta"):
                model = auto_class.from_config(config, trust_remote_code=True)
            self._require_class(model, auto_class.__name__)
        return f"three of them make {self.class_name}"

    def check_budget(self) -> str:
        """Refuse a budget under which no image is pruned; no weights are needed to tell."""
        auto_class: Any = AutoModelForImageTextToText
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=True)
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=True)
        if (problem := keeps_everything(model, self.processor.image_processor)) is not None:
            raise Refused(f"vispruner_config.{problem}")
        return "prunes nothing, as method none says" if model.model.methods == (None, None) else "leaves fewer tokens"

    def check_image_text_model(self) -> str:
        self.model = self._load(AutoModelForImageTextToText)
        return self.class_name

    def check_weights(self) -> str:
        count = compare_weights(self.model.state_dict(), self.weight_files, self.stored_names)
        return f"{count} tensors hash as in the files"

    def check_kv_length(self) -> str:
        return "; ".join(self._check_kv_length_of(modality) for modality in self._visual_inputs())

    def _check_kv_length_of(self, modality: dict[str, Any]) -> str:
        if self.model.model.prunes_in_decoder:
            return self._check_kv_length_of_layers(modality)
        inputs, detail = self.inputs(modality["name"]), ""
        placeholders = self._placeholders(inputs, modality, self.model.config)
        full, kept = self._counts(modality, inputs)
        if sum(kept) >= placeholders:
            # The stored budget prunes nothing here; show that the code prunes when it is told to.
            self.model.set_vispruner_config(method="vispruner", keep_ratio=0.25)
            detail = " (the stored budget keeps all, shown with keep_ratio 0.25)"
            full, kept = self._counts(modality, inputs)
        expected = self._expected_kept(modality, inputs, placeholders)
        if sum(full) != placeholders or (expected is not None and sum(kept) != expected):
            raise Refused(
                f"{modality['name']} token counts are {full} -> {kept}; the prompt has {placeholders} placeholders"
                + ("" if expected is None else f", of which vispruner_config keeps {expected}")
            )
        if sum(kept) >= sum(full):
            raise Refused(f"{sum(kept)} of {sum(full)} visual tokens are kept: nothing is pruned")
        result = self.generate(inputs)
        prompt = inputs["input_ids"].shape[1]
        new = result.sequences.shape[1] - prompt
        # By what it can do, since transformers renamed it.
        cache = next(value for value in result.values() if hasattr(value, "get_seq_length"))
        length, expected_length = cache.get_seq_length(), prompt - sum(full) + sum(kept) + new - 1
        if length != expected_length:
            raise Refused(f"the KV cache holds {length} tokens, {expected_length} are right")
        if not torch.equal(result.sequences[:, :prompt], inputs["input_ids"]):
            raise Refused("the generated sequence does not start with the prompt")
        what = "visual tokens" if modality["name"] == "image" else f"{modality['name']} tokens"
        return f"{what} {sum(full)} -> {sum(kept)}, KV cache {prompt + new - 1} -> {length}{detail}"

    def _check_kv_length_of_layers(self, modality: dict[str, Any]) -> str:
        """Hold each layer's cache against the budget: what a method leaves that prunes in the language model."""
        inputs, options = self.inputs(modality["name"]), self.model.config.vispruner_config
        placeholders = self._placeholders(inputs, modality, self.model.config)
        full, kept = self._counts(modality, inputs)
        result = self.generate(inputs)
        cache = next(value for value in result.values() if hasattr(value, "get_seq_length"))
        lengths = [int(cache.get_seq_length(layer)) for layer in range(len(cache.layers))]
        text = result.sequences.shape[1] - 1 - placeholders
        held = [length - text for length in lengths]
        falls = all(0 <= later <= earlier for earlier, later in itertools.pairwise(held))
        if sum(full) != placeholders or held[0] != sum(kept) or not falls:
            raise Refused(f"the KV cache holds {held} visual tokens by layer, of {placeholders} in the prompt")
        if options["stage_token_nums"] is not None:
            expected = options["stage_token_nums"][-1] * len(full)
            if held[-1] != expected:
                raise Refused(f"the last layer holds {held[-1]} visual tokens, vispruner_config keeps {expected}")
        else:
            count, ratio = options["visual_token_num"], options["keep_ratio"]
            most = count * len(full) if count is not None else ratio * placeholders
            if sum(held) > most * len(held):
                mean = sum(held) / len(held)
                raise Refused(f"layers hold {mean:g} visual tokens on average, where the budget is {most:g}")
        if sum(held) >= placeholders * len(held):
            raise Refused(f"every layer holds all {placeholders} visual tokens: nothing is pruned")
        if not torch.equal(result.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"]):
            raise Refused("the generated sequence does not start with the prompt")
        runs = [f"{tokens} in {held.count(tokens)} layers" for tokens in dict.fromkeys(held)]
        return f"of {placeholders} {modality['name']} tokens the KV cache holds {', '.join(runs)}"

    def _counts(self, modality: dict[str, Any], inputs: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
        is_image = modality["name"] == "image"
        count = self.model.visual_token_counts if is_image else self.model.model.video_token_counts
        return count(inputs[modality["pixels"]], **self._described(modality, inputs))

    @staticmethod
    def _described(modality: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: inputs[name] for name in modality["described_by"] if name in inputs}

    def _expected_kept(
        self, modality: dict[str, Any], inputs: dict[str, torch.Tensor], placeholders: int
    ) -> int | None:
        """Count the kept tokens from the budget and the grids alone; None where packing or pixels change that."""
        views = getattr(self.model.model, f"{modality['name']}_views")
        items = views(inputs[modality["pixels"]], **self._described(modality, inputs))
        tokens = [view.grid[0] * view.grid[1] for views in items for view in views]
        options = self.model.config.vispruner_config
        if options["method"] == "none":
            return placeholders
        if sum(tokens) != placeholders or _goes_by_pixels(self.model.config):
            return None
        count, ratio = options["visual_token_num"], options["keep_ratio"]
        return sum(min(count, n) if count is not None else max(1, int(n * ratio + 0.5)) for n in tokens)

    def check_keep_all(self) -> str:
        inputs = self.inputs()
        self.model.set_vispruner_config(method="none")
        kept_all = self.logits(inputs)
        self.model.set_vispruner_config(method="vispruner", keep_ratio=1.0, tile_mode="native", encoder_stage=None)
        full_budget = self.logits(inputs)
        self.model = None
        gc.collect()
        auto_class: Any = AutoModelForImageTextToText
        stock, report = auto_class.from_pretrained(
            self.weights_folder, trust_remote_code=False, dtype="auto", output_loading_info=True
        )
        require_clean(report, "the stock class")
        if type(stock).__name__ == self.class_name or not type(stock).__module__.startswith("transformers.models."):
            raise Refused(f"without trust_remote_code {type(stock).__module__}.{type(stock).__name__} is loaded")
        self.model = stock.eval()
        expected = self.logits({name: value for name, value in inputs.items() if not name.startswith("clip_")})
        self.model = None
        for what, found in (('method "none"', kept_all), ("keep_ratio 1.0", full_budget)):
            if found.shape != expected.shape or not torch.equal(found, expected):
                raise Refused(f"the logits with {what} are not those of {type(stock).__name__}")
        return f"logits {list(expected.shape)} are those of {type(stock).__name__}, bit for bit"

    def check_auto_model(self) -> str:
        self._load(AutoModel)
        return self.class_name

    def check_pipeline(self) -> str:
        gc.collect()
        pipe: Any = pipeline("image-text-to-text", model=str(self.folder), trust_remote_code=True, dtype="auto")
        self._require_class(pipe.model, "pipeline")
        answer = pipe(text=self.prompt(), images=[sample_image()], max_new_tokens=NEW_TOKENS, return_full_text=False)
        while isinstance(answer, list):
            answer = answer[0]
        if not isinstance(answer.get("generated_text"), str):
            raise Refused(f"the pipeline answers {answer!r}")
        return f"{self.class_name} answers"

    def _load(self, auto_class: Any) -> Any:
        model, report = auto_class.from_pretrained(
            self.folder, trust_remote_code=True, dtype="auto", output_loading_info=True
        )
        require_clean(report, auto_class.__name__)
        self._require_class(model, auto_class.__name__)
        return model.eval()

    def _require_class(self, model: Any, loaded_by: str) -> None:
        self._require_own(type(model), loaded_by)
        if type(model).__name__ != self.class_name:
            raise Refused(f"{loaded_by} makes {type(model).__name__}, config.json names {self.class_name}")

    def _require_own(self, loaded: type, loaded_by: str) -> None:
        if not loaded.__module__.startswith("transformers_modules."):
            raise Refused(f"{loaded_by} makes {loaded.__module__}.{loaded.__name__}, not the repo's own class")

    def prompt(self, kind: str = "image") -> str:
        message = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": QUESTION[kind]}]}
        if getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template([message], add_generation_prompt=True)
        return f"USER: {getattr(self.processor, f'{kind}_token')}\n{QUESTION[kind]} ASSISTANT:"

    def inputs(self, kind: str = "image") -> dict[str, torch.Tensor]:
        visual: dict[str, Any] = {"images": sample_image()}
        if kind == "video":
            frames = np.stack([np.asarray(sample_image(frame)) for frame in range(FRAMES)])
            visual = {"videos": [frames], "do_sample_frames": False}
        inputs = self.processor(text=self.prompt(kind), return_tensors="pt", **visual)
        return {self.renamed_inputs.get(name, name): value for name, value in inputs.items()}

    def _cast(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pixels = [modality["pixels"] for modality in self.modalities if modality["pixels"] in inputs]
        return {**inputs, **{name: inputs[name].to(self.model.dtype) for name in pixels}}

    @torch.no_grad()
    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**self._cast(inputs)).logits

    def generate(self, inputs: dict[str, torch.Tensor]) -> Any:
        return self.model.generate(
            **self._cast(inputs), max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, return_dict_in_generate=True
        )


def keeps_everything(model: Any, image_processor: Any) -> str | None:
    """Return the budget that prunes no image its processor can make, and the remedy; None where some image is pruned.

    model  a pruned model, which may be on the meta device
    """
    base = model.model
    options, (encoder, decoder) = base.vispruner_options, base.methods
    images = _largest_images(model, image_processor)
    if (encoder, decoder) == (None, None) or _goes_by_pixels(model.config):
        return None
    if any(_is_pruned(base, *image) for image in images):
        return None
    name = next(name for name in BUDGETS if getattr(options, name) is not None)
    in_decoder = encoder is None
    most = max(whole if in_decoder else unit for unit, whole in images)
    of = "the largest image" if in_decoder or base.packs_images else f"an {base.budget_unit}"
    remedy = f"set it below {most}" if name != "keep_ratio" else "set it lower"
    return (
        f"{name} {getattr(options, name)} keeps all {most} visual tokens of {of}, so nothing would be pruned: "
        f'{remedy}, or set method to "none" for the dense model'
    )


def held_by_layer(model: Any, image_processor: Any) -> list[int] | None:
    """Return how many visual tokens each decoder layer holds of the largest image; None where all hold as many.

    model  as above
    """
    encoder, decoder = model.model.methods
    if encoder is not None or decoder is None:
        return None
    return list(model.model.layer_counts(max(whole for _, whole in _largest_images(model, image_processor))))


def _largest_images(model: Any, image_processor: Any) -> list[tuple[int, int]]:
    """Return of the largest images how many tokens that which the encoder's budget is for has, and the whole has."""
    base, config = model.model, model.config
    described = model.modalities[0].described_by
    if "image_grid_thw" in described:
        vision = config.vision_config
        most = image_processor.size["longest_edge"] // (vision.patch_size * vision.spatial_merge_size) ** 2
        return [(most, most)]
    if hasattr(config, "image_grid_pinpoints"):
        wholes, _ = base.image_token_counts(None, image_sizes=torch.tensor(config.image_grid_pinpoints))
        return [(base.side**2, whole) for whole in wholes]
    side = config.vision_config.image_size
    pixels = torch.ones(1, 3, *([side, side] if isinstance(side, int) else side))
    full, _ = base.image_token_counts(pixels[None] if hasattr(config, "scale_factor") else pixels)
    return [(full[0], full[0])]


def _goes_by_pixels(config: Any) -> bool:
    """Say whether how many tokens stay depends on the picture."""
    return "pixel_tolerance" in (config.vispruner_config.get("encoder_stage") or {})


def _is_pruned(base: Any, unit: int, whole: int) -> bool:
    encoder, decoder = base.methods
    if encoder is not None and base.encoder_options.budget(unit) < unit:
        return True
    if decoder is None:
        return False
    stages = base.vispruner_options.stage_token_nums
    if stages is not None:
        return min(stages) < whole
    try:
        return base.layer_counts(whole)[-1] < whole
    except ValueError:  # a budget too small for the largest image
        return True


def needs_video_packages(error: BaseException) -> bool:
    """Say whether a processor failed to load because what is needed to read videos is not installed."""
    is_missing = isinstance(error, ImportError) or "Missing optional dependencies" in str(error)
    return is_missing and any(name in str(error).lower() for name in VIDEO_PACKAGES)


def sample_image(frame: int = 0) -> Image.Image:
    """Draw a picture that is not the same everywhere: 320 x 240, gradients and rings, which a video moves."""
    image = Image.new("RGB", (320, 240))
    image.putdata(
        [
            (x * 255 // 319, y * 255 // 239, ((x - 160) ** 2 + (y - 120) ** 2) // (24 + 2 * frame) % 256)
            for y in range(240)
            for x in range(320)
        ]
    )
    return image


def require_clean(report: dict[str, Any], loaded_by: str) -> None:
    """Refuse a load that left parameters random or ignored tensors of the files."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = [str(key) for key in report.get(kind) or ()]
        if found:
            raise Refused(f"{loaded_by} reports {kind} {', '.join(sorted(found)[:8])} ({len(found)} in all)")


def compare_weights(state: dict[str, torch.Tensor], files: list[str], stored_names: dict[str, str]) -> int:
    """Compare the hash of every loaded tensor with the one in the weight files; return how many there are."""
    loaded = {stored_names.get(name, name): tensor for name, tensor in state.items()}
    published = set(stored_names.values())
    compared: set[str] = set()
    wrong = []
    for name, tensor in stored_tensors(files):
        if name not in published:
            continue  # a buffer that models compute themselves
        compared.add(name)
        # Files may hold another dtype than config.json asks for; casting gives one result only.
        if name not in loaded or tensor_hash(loaded[name]) != tensor_hash(tensor.to(loaded[name].dtype)):
            wrong.append(name)
    if wrong:
        raise Refused(f"{len(wrong)} loaded tensors are not those of the files: {', '.join(sorted(wrong)[:8])}")
    stored = {loaded[name].data_ptr() for name in compared}
    random = sorted(name for name in loaded if name not in compared and loaded[name].data_ptr() not in stored)
    if random:
        raise Refused(f"{len(random)} loaded tensors are in no file: {', '.join(random[:8])}")
    return len(compared)


def stored_tensors(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every (name, tensor) of these files; only the base of a thin repo may have .bin files."""
    for path in files:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    yield name, file.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True).items()


def tensor_hash(tensor: torch.Tensor) -> str:
    """Hash dtype, shape and bytes of a tensor."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def main(folder: str, settings_file: str, results_file: str) -> None:
    """Run the checks; the first failure ends the run, and the rest are reported as not run."""
    settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
    worker = Worker(Path(folder), settings)
    results: list[tuple[str, str, str]] = []
    failed = ""
    for name, check in worker.checks(settings["run_models"]):
        if failed:
            results.append((name, "not run", f"{failed} failed"))
            continue
        try:
            results.append((name, "pass", check()))
        except Refused as reason:
            failed = name
            results.append((name, "fail", str(reason)))
        except Exception as error:  # whatever the repo's code raises is this check's result
            failed = name
            traceback.print_exc()
            results.append((name, "fail", f"{type(error).__name__}: {error}"))
        Path(results_file).write_text(json.dumps(results), encoding="utf-8")
    Path(results_file).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    sys.modules["vispruner"] = None  # type: ignore[assignment]  # from here on `import vispruner` raises
    main(*sys.argv[1:])
