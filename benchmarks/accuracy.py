"""Measure how many questions a pruned model still answers, for every selector and budget, on the same questions.

The model runs as its users run it: a built repo, loaded by AutoProcessor and AutoModelForImageTextToText with
trust_remote_code=True, answers batches of (picture, question) prompts by `generate`. That its class is the repo's own
and that its KV cache is shorter by the dropped tokens is checked in every batch.

Questions   scenes that were never trained on, generated from --seed, or a sample of the easy-vqa test split.
Right       the answer is the expected word, whole, upper and lower case alike.
Interval    Wilson's at 95 %. Questions about one picture fail together, so they count as fewer where they do (the
            design effect of the pictures, never below 1).
random      the mean over three draws; its interval is that of one run over all questions.
downsample  no selection at all: the processor makes the picture smaller, to the largest square grid of patches within
            the budget, and the tower interpolates its position embeddings (stock `interpolate_pos_encoding`). The
            model never saw pictures of that size in training.
Object recall   the share of the objects that keep a patch, where a patch belongs to an object when its centre lies in
            the object's box.
100 %       nothing is dropped, so every selector is the dense model: it runs once, and each selector gets its row.

With photographs (`--dataset photos`; the recorded checkpoint of train_photo.py, or --repo) come four further figures:
no-image    the question alone, without a picture: what guessing and habit get right.
hard        the questions that the smaller picture of the same budget gets wrong.
yes         how often something is said to be there that is not.
gain        of a row over vispruner with ratio 0.5 and as many tokens, on the same questions; its 95 % interval is
            that of the differences, which is narrower than those of the two shares.

`accelerate launch --multi_gpu --num_processes N benchmarks/accuracy.py` shares the batches out among N processes; they
run on the CPU, whatever accelerate calls them. The figures stay the same.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial, wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).parent))
from outputs import output_file
from photos import PHOTO_PACKAGES, PHOTO_QUESTION_TYPES, generate_photo
from records import versions, write_record
from scenes import IMAGE_SIZE, QUESTION_TYPES, Box, Question, easy_vqa_questions, generate_scene
from tables_and_plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, markdown_table, new_figure, save_figure

from vispruner import SELECTORS
from vispruner.choosing import Choice
from vispruner.conversion.build import build_repo
from vispruner.conversion.checkpoint_io import read_json
from vispruner.conversion.photo_tower import hash_of, lacks_tower, with_tower
from vispruner.conversion.questions import is_right
from vispruner.conversion.repo_config import ASSETS
from vispruner.pruning_plan import most_before, whole_counts
from vispruner.stock_versions import CACHE

CONFIG = "tiny-llava-vispruner"
CODEBOOK = ASSETS / "tiny-llava-codebook.safetensors"  # of the embedded checkpoint
PHOTOS = "photos"
PHOTO_CONFIG = "photo-llava-vispruner"
PHOTO_LLAVA = ASSETS / "photo-llava"  # what train_photo.py wrote, without its tower
PHOTO_CODEBOOK = ASSETS / "photo-llava-codebook.safetensors"
DATASETS = ("scenes", "easy-vqa", PHOTOS)
# By dataset, the YAML of the embedded model that is asked, and its codebook.
EMBEDDED = dict.fromkeys(DATASETS, (CONFIG, CODEBOOK)) | {PHOTOS: (PHOTO_CONFIG, PHOTO_CODEBOOK)}
KINDS = tuple(dict.fromkeys((*QUESTION_TYPES, *PHOTO_QUESTION_TYPES)))
DENSE, DOWNSAMPLE, NO_IMAGE = "none", "downsample", "no-image"
BUDGETS = (100.0, 50.0, 25.0, 12.5, 6.0)
PHOTO_BUDGETS = (100.0, 33.33, 22.22, 11.11, 5.56)  # 192, 128, 64 and 32 of 576
RATIOS: tuple[float | str, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
AUTO = "auto"  # the ratio that an image's own features decide
POLICIES = ("renumber", "original")
DRAWS = (0, 1, 2)
QUESTIONS = 1500
BATCH = 32
PROCESSES = 2
Z95 = 1.959964
# What runs must have in common, for their rows to be in one record.
SAME_IN_A_RECORD = ("dataset", "seed", "base_model", "questions", "pictures", "full_visual_tokens")


class BenchmarkError(ValueError):
    """What was asked for cannot be measured, or the model did not do what pruning promises."""


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    first  whether it is the first question about its picture
    boxes  of all objects in the picture, None where nobody knows them
    """

    picture: int
    first: bool
    image: Image.Image
    text: str
    answer: str
    type: str
    boxes: tuple[Box, ...] | None


@dataclass(frozen=True)
class Variant:
    """One row of the result: a selector with its options, or a smaller picture, at one budget."""

    selector: str
    budget_percent: float
    visual_token_num: int
    important_ratio: float | str | None = None
    position_policy: str | None = None
    draws: tuple[int, ...] = (0,)
    encoder_stage: tuple[int, float] | None = None
    attention_layer: int | None = None

    def options(self, draw: int, batch: int) -> dict[str, Any]:
        """The `vispruner_config` fields to set; every draw and batch of a random selector has its own seed."""
        if self.selector in (DENSE, DOWNSAMPLE, NO_IMAGE):
            return {"method": "none", "encoder_stage": None, "attention_layer": None}
        options = {
            "method": self.selector,
            "visual_token_num": self.visual_token_num,
            "position_policy": self.position_policy,
            "seed": draw * 1_000_003 + batch,
            "encoder_stage": None,
            "attention_layer": self.attention_layer,
        }
        if self.encoder_stage is not None:
            options["encoder_stage"] = dict(zip(("layer", "keep_ratio"), self.encoder_stage, strict=True))
        return options if self.important_ratio is None else {**options, "important_ratio": self.important_ratio}


@dataclass(frozen=True)
class Seen:
    """What one batch gave under one draw of one variant; the objects of a picture count at its first question."""

    right: list[bool]
    said_yes: list[bool]
    kv_visual_tokens: int
    objects: int
    objects_kept: int


@dataclass
class Tally:
    """What was seen of one variant: answers by draw and question, objects that kept a patch, cached tokens."""

    right: dict[int, list[bool]] = field(default_factory=lambda: defaultdict(list))
    said_yes: dict[int, list[bool]] = field(default_factory=lambda: defaultdict(list))
    objects: int = 0
    objects_kept: int = 0
    kv_visual_tokens: set[int] = field(default_factory=set)

    def add(self, draw: int, seen: Seen) -> None:
        self.right[draw] += seen.right
        self.said_yes[draw] += seen.said_yes
        self.objects += seen.objects
        self.objects_kept += seen.objects_kept
        self.kv_visual_tokens.add(seen.kv_visual_tokens)


@dataclass(frozen=True)
class Answers:
    """One batch: an answer per prompt, the visual tokens its cache holds per prompt, and what was selected.

    kept      (B, T) patches that stayed, None where nothing was selected
    saliency  (B, N) what they were selected by, None likewise
    """

    texts: list[str]
    kv_visual_tokens: int
    kept: torch.Tensor | None = None
    saliency: torch.Tensor | None = None


# The questions


def questions(dataset: str, seed: int, limit: int) -> list[Sample]:
    """Return the first `limit` questions of the test set that a seed stands for."""
    source = {"scenes": _scene_samples, "easy-vqa": _easy_vqa_samples, PHOTOS: _photo_samples}[dataset](seed)
    samples = []
    for sample in source:
        samples.append(sample)
        if len(samples) == limit:
            break
    return samples


def _scene_samples(seed: int) -> Iterator[Sample]:
    scenes = (generate_scene("test", seed, index) for index in itertools.count())
    return _generated((scene.image, scene.objects, scene.questions) for scene in scenes)


def _photo_samples(seed: int) -> Iterator[Sample]:
    photos = (generate_photo("test", seed, index) for index in itertools.count())
    return _generated((photo.image, photo.things, photo.questions) for photo in photos)


def _generated(pictures: Iterable[tuple[Image.Image, Sequence[Any], Sequence[Question]]]) -> Iterator[Sample]:
    """All questions about pictures, which come with what is on them, in order."""
    for index, (image, things, asked) in enumerate(pictures):
        boxes = tuple(thing.box for thing in things)
        for place, q in enumerate(asked):
            yield Sample(index, place == 0, image, q.text, q.answer, q.type, boxes)


def _easy_vqa_samples(seed: int) -> Iterator[Sample]:
    """The whole test split, its pictures in an order that the seed decides."""
    by_picture: dict[int, list[Sample]] = defaultdict(list)
    for item in easy_vqa_questions("test"):
        q, asked = item.question, by_picture[item.image_id]
        asked.append(Sample(item.image_id, not asked, item.image, q.text, q.answer, q.type, None))
    for picture in np.random.default_rng(seed).permutation(sorted(by_picture)):
        yield from by_picture[int(picture)]


# The model, as its users run it


class PublishedModel:
    """A built repo loaded through the Auto classes. Raises BenchmarkError where it is not the repo's own class.

    codebook  the file for the selectors that need one; None is what the repo has
    """

    def __init__(self, repo: Path, codebook: Path | None = None) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
        auto_class: Any = AutoModelForImageTextToText
        self.model: Any = auto_class.from_pretrained(repo, trust_remote_code=True).eval()
        config = self.model.config
        named = (config.architectures or [""])[0]
        if type(self.model).__name__ != named or not type(self.model).__module__.startswith("transformers_modules."):
            raise BenchmarkError(f"{repo} was loaded as {type(self.model)}, not as its own class {named}")
        if config.model_type != "llava":
            raise BenchmarkError(f"{repo} is a {config.model_type} model: only llava repos (one tile) are measured")
        if registers := getattr(config.vision_config, "num_register_tokens", 0):
            raise BenchmarkError(
                f"the tower of {repo} has {registers} register tokens, which stay beside every budget: only towers "
                "without are measured, whose budgets are what the language model sees"
            )
        self.codebook = config.vispruner_config["codebook"] if codebook is None else str(codebook.resolve())
        self.patch_size: int = config.vision_config.patch_size
        self.has_large_tower = config.vision_config.model_type == "dinov2"
        self.interpolates = self.has_large_tower  # whatever the size, and takes no word for it
        self.grid: int = config.vision_config.image_size // self.patch_size
        module = type(self.model).__module__.rpartition(".")[0] + ".selectors"
        self.selection: Any = importlib.import_module(module)

    @property
    def visual_tokens(self) -> int:
        return self.grid**2

    @property
    def selectors(self) -> dict[str, Any]:
        """What the repo registers, but for what needs a codebook where there is none."""
        registry = self.selection.SELECTORS.items()
        return {name: selector for name, selector in registry if self.codebook or "codebook" not in selector.needs}

    def inputs(self, samples: Sequence[Sample], grid: int | None = None) -> Any:
        """Process one batch; `grid` makes the pictures smaller, to grid x grid patches, and 0 leaves them out."""
        texts = [self.prompt(sample.text, with_image=grid != 0) for sample in samples]
        if grid == 0:
            return self.processor(text=texts, padding=True, return_tensors="pt")
        side = (grid or self.grid) * self.patch_size
        smaller = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}} if grid else {}
        images = [sample.image for sample in samples]
        return self.processor(images=images, text=texts, padding=True, return_tensors="pt", **smaller)

    def prompt(self, question: str, *, with_image: bool = True) -> str:
        content = [*([{"type": "image"}] if with_image else []), {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def longest_answer(self, answers: Iterable[str]) -> int:
        """Return how many tokens the longest of these answers takes, with the one that ends it."""
        tokenizer = self.processor.tokenizer
        return 1 + max(len(tokenizer(f" {a}", add_special_tokens=False).input_ids) for a in set(answers))

    @torch.no_grad()
    def answer(self, inputs: Any, options: dict[str, Any], visual_token_num: int, new_tokens: int) -> Answers:
        """Answer one batch under these options; raise BenchmarkError unless the cache holds what they say."""
        selector = self.selection.SELECTORS.get(options["method"])
        needs_codebook = selector is not None and "codebook" in selector.needs
        if "+" in options["method"]:
            options = {**options, **self.stages(options)}
        if needs_codebook:
            options = {**options, "codebook": self.codebook}
        self.model.set_vispruner_config(**options)
        with self._recorded_selections() as selections, self._any_picture_size():
            result = self.model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=True
            )
        prompt = inputs["input_ids"].shape[1]
        placeholders = (inputs["input_ids"] == self.model.config.image_token_id).sum(dim=1)
        new = result.sequences.shape[1] - prompt
        # The last new token is never fed back, so the cache holds the prompt's text, its visual tokens and new - 1.
        text = prompt - int(placeholders[0]) + new - 1
        cached = self._cached_by_layers(result[CACHE], text, visual_token_num)
        if not bool((placeholders == placeholders[0]).all()) or cached != visual_token_num:
            raise BenchmarkError(
                f"the KV cache holds {cached} visual tokens under {options}, where {visual_token_num} are right"
            )
        texts = self.processor.tokenizer.batch_decode(result.sequences[:, prompt:], skip_special_tokens=True)
        if stages := getattr(result[CACHE], "vispruner_stages", ()):
            is_visual = inputs["input_ids"] == self.model.config.image_token_id
            if (columns := result[CACHE].vispruner_prompt.columns) is not None:  # it was shortened before
                is_visual = columns.take(is_visual.long(), 0).bool()
            stays = torch.zeros_like(is_visual).scatter(1, stages[-1].columns, stages[-1].seen)
            kept = stays[is_visual].view(len(is_visual), -1).nonzero()[:, 1].view(len(is_visual), -1)
            return Answers(texts, cached, selections[-1][0].gather(1, kept) if selections else kept, None)
        return Answers(texts, cached, *(selections[-1] if selections else (None, None)))

    def stages(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the budget of method "a+b": each stage in the language model leaves half of what it finds."""
        depth = self.model.config.text_config.num_hidden_layers
        layers = self.selection.SELECTORS[options["method"].split("+")[1]].place.layers(depth)
        left = tuple(0.5**stage for stage in range(1, len(layers) + 1))
        first = most_before(tuple(layers), left, depth, options["visual_token_num"])
        return {"visual_token_num": None, "stage_token_nums": [first, *whole_counts(first, left)]}

    def _cached_by_layers(self, cache: Any, text: int, budget: int) -> int:
        """Return how many visual tokens a layer's cache holds, on average; the budget where less than one is missing.

        A method in the language model meets a mean as closely as whole tokens in whole layers allow, never above it.
        """
        layers = self.model.config.text_config.num_hidden_layers
        mean = sum(int(cache.get_seq_length(layer)) - text for layer in range(layers)) / layers
        return budget if 0 <= budget - mean < 1 else math.ceil(mean)

    @contextmanager
    def _recorded_selections(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Note what `generate` itself selects behind the encoder, rather than encoding once more to ask."""
        recorded: list[tuple[torch.Tensor, torch.Tensor]] = []

        def note(choice: Choice) -> None:
            if choice.layer is None and choice.selection is not None:
                indices, numbers = choice.selection.indices, choice.tokens.numbers
                kept = indices if numbers is None else numbers.gather(1, indices)
                recorded.append((kept, choice.tokens.saliency))

        with self.model.model.watch_choices(after=note):
            yield recorded

    @contextmanager
    def _any_picture_size(self) -> Iterator[None]:
        """Have the tower interpolate its position embeddings when the picture is not as large as it was trained on."""

        def interpolate(tower: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            pixels = args[0] if args else kwargs["pixel_values"]
            smaller = pixels.shape[-1] != self.grid * self.patch_size and not self.interpolates
            return args, ({**kwargs, "interpolate_pos_encoding": True} if smaller else kwargs)

        hook = self.model.model.vision_tower.register_forward_pre_hook(interpolate, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def one_run_of_the_tower(published: PublishedModel) -> Iterator[None]:
    """Have the tower see each picture of a batch once, however many questions and rows there are about it.

    Rows share what it made where the same is read of the same layers. Only for the large tower of photographs: with
    the embedded one it saves little, and pictures in batches of another size round otherwise than in the records.
    """
    base, known = published.model.model, dict[Any, Any]()
    if not published.has_large_tower:
        yield
        return
    encode, get_features = base.encode, base.get_image_features

    def once(key: Any, pixels: torch.Tensor, run: Callable[[torch.Tensor], Any]) -> tuple[Any, list[int]]:
        is_new = [True, *(pixels[1:] != pixels[:-1]).flatten(1).any(dim=1).tolist()]
        if (key := (id(pixels), key)) not in known:
            known[key] = (pixels, run(pixels[is_new]))  # held, so that its id stays its own
        return known[key][1], [number - 1 for number in itertools.accumulate(map(int, is_new))]

    def encode_once(pixels: torch.Tensor, feature_layer: Any, **kwargs: Any) -> Any:
        options = base.encoder_options
        selector = published.selection.SELECTORS[options.method]
        stage = (str(options.encoder_stage), base.remaining_count(published.visual_tokens))
        key = (base.open_tap().readings, *stage, "cls_feature" in selector.needs | selector.uses)
        (outputs, tokens), owner = once(key, pixels, lambda part: encode(part, feature_layer, **kwargs))
        given = {name: getattr(tokens, name) for name in ("features", "saliency", "layer_saliency", "remain")}
        given = {name: value if value is None else value[owner] for name, value in given.items()}
        further = {name: value[owner] for name, value in tokens.further.items()}
        return outputs, replace(tokens, **given, further=further)

    @wraps(get_features)  # stock's `generate` hands over what its signature names
    def all_once(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        if base.encoder_options.method != DENSE or pixel_values.shape[-1] != published.grid * published.patch_size:
            return get_features(pixel_values, **kwargs)
        found, owner = once(DENSE, pixel_values, lambda part: get_features(part, **kwargs))
        of_images = ("pooler_output", "kept_indices", "placeholders", "full_counts")
        return replace(found, **{name: [getattr(found, name)[n] for n in owner] for name in of_images})

    base.encode, base.get_image_features = encode_once, all_once
    try:
        yield
    finally:
        del base.encode, base.get_image_features


@contextmanager
def published_repo(repo: Path | None, config: str = CONFIG) -> Iterator[Path]:
    """Yield a built repo: the given one, or one built from the given stock checkpoint or from the config's own."""
    if repo is not None and not (repo / "config.json").is_file():
        raise BenchmarkError(f"{repo} has no config.json: give a built repo or a stock LLaVA checkpoint")
    if repo is not None and "auto_map" in json.loads((repo / "config.json").read_text(encoding="utf-8")):
        yield repo
        return
    with tempfile.TemporaryDirectory(prefix="vispruner-benchmark-") as folder:
        if repo is not None and lacks_tower(repo):
            with_tower(repo, whole := Path(folder) / "whole")
            repo = whole
        yield build_repo(config, Path(folder) / config, base=repo, show_progress=False)


# What is measured


def variants(
    selectors: Sequence[str],
    budgets: Sequence[float],
    registry: dict[str, Any],
    full: int,
    policies: Sequence[str] = POLICIES,
    ratios: Sequence[float | str] = RATIOS,
    stages: Sequence[tuple[int, float]] = (),
    layers: Sequence[int] = (),
) -> list[Variant]:
    """Return the rows to measure: each selector with every option it takes, at each budget; nothing twice.

    stages  within the encoder, each a layer and what part of the patches it leaves: rows of VisPruner beside
    layers  of the encoder whose attention ranks: likewise, with every ratio
    """
    rows = []
    for budget in budgets:
        count = min(full, max(1, math.floor(full * budget / 100 + 0.5)))
        for selector in selectors:
            rows += _variants_of(selector, budget, count, registry, full, policies, ratios)
        row = Variant("vispruner", budget, count, 0.5, policies[0])
        rows += [replace(row, encoder_stage=stage) for stage in stages if count < stage[1] * full]
        if count < full:
            rows += [replace(row, important_ratio=r, attention_layer=n) for n in layers for r in ratios]
    return list(dict.fromkeys(rows))


def _is_pair(name: str, registry: dict[str, Any]) -> bool:
    first, *others = (registry[part] for part in name.split("+"))
    return not first.in_decoder and [other.place is not None for other in others] == [True]


def _require_rows_of(stages: Sequence[tuple[int, float]], layers: Sequence[int], rows: Sequence[Variant]) -> None:
    """Raise BenchmarkError for an option that no budget measures, rather than leave it out in silence."""
    for layer, share in stages:
        if all(row.encoder_stage != (layer, share) for row in rows):
            raise BenchmarkError(
                f"--encoder-stages {layer}:{share:g} leaves no more patches than every budget keeps: raise the share, "
                "or give smaller --budgets"
            )
    if layers and all(row.attention_layer is None for row in rows):
        raise BenchmarkError("--attention-layers: with all tokens nothing is ranked, add a smaller one to --budgets")


def _variants_of(
    selector: str,
    budget: float,
    count: int,
    registry: dict[str, Any],
    full: int,
    policies: Sequence[str],
    ratios: Sequence[float | str],
) -> list[Variant]:
    if selector == DENSE:
        return [Variant(DENSE, budget, full)] if count == full else []
    if selector == DOWNSAMPLE:
        return [Variant(DOWNSAMPLE, budget, math.isqrt(count) ** 2)]
    if selector == NO_IMAGE:
        return [Variant(NO_IMAGE, 0.0, 0)]
    parts = [registry[name] for name in selector.split("+")]
    options = {name for part in parts for name in part.options}
    if any(part.in_decoder for part in parts):  # it says itself which positions tokens have
        policies = (None,)
    own: Sequence[float | str | None] = ratios if "important_ratio" in options else (None,)
    draws = DRAWS if "seed" in options else (0,)
    return [Variant(selector, budget, count, ratio, policy, draws) for policy in policies for ratio in own]


def measure(
    published: PublishedModel, repo: Path, samples: Sequence[Sample], rows: Sequence[Variant], processes: int = 1
) -> dict[Variant, Tally]:
    """Answer every question under every row; each batch is processed once and goes through all of them."""
    dense = Variant(DENSE, 100.0, published.visual_tokens)
    run_as = {row: dense if row.visual_token_num == published.visual_tokens else row for row in rows}
    to_run = list(dict.fromkeys(run_as.values()))
    tallies: dict[Variant, Tally] = {row: Tally() for row in to_run}
    new_tokens = published.longest_answer(sample.answer for sample in samples)
    batches = [(start // BATCH, samples[start : start + BATCH]) for start in range(0, len(samples), BATCH)]
    answers_per_question = sum(len(row.draws) for row in to_run)
    hidden = not launched().is_main_process
    with tqdm(total=len(samples) * answers_per_question, unit="answer", disable=hidden) as progress:
        for (_, batch), seen in zip(
            batches, _answered(published, repo, batches, to_run, new_tokens, processes), strict=True
        ):
            for (row, draw), result in seen.items():
                tallies[row].add(draw, result)
            progress.update(len(batch) * answers_per_question)
    return {row: tallies[run] for row, run in run_as.items()}


def _answered(
    published: PublishedModel,
    repo: Path,
    batches: Sequence[tuple[int, Sequence[Sample]]],
    rows: Sequence[Variant],
    new_tokens: int,
    processes: int,
) -> Iterator[dict[tuple[Variant, int], Seen]]:
    """Answer the batches in order; small operations gain more from two processes than from two threads."""
    if launched().num_processes > 1:
        yield from _answered_by_all(published, batches, rows, new_tokens)
        return
    if processes == 1:
        yield from (answer_batch(published, number, batch, rows, new_tokens) for number, batch in batches)
        return
    codebook = None if published.codebook is None else repo / published.codebook
    with ProcessPoolExecutor(processes, get_context("spawn"), _load_in_worker, (repo, codebook)) as pool:
        yield from pool.map(partial(_answer_in_worker, rows=rows, new_tokens=new_tokens), batches)


def launched() -> PartialState:
    """The processes that `accelerate launch` started, which talk over gloo; without it there is one."""
    return PartialState(cpu=True)


def _answered_by_all(
    published: PublishedModel,
    batches: Sequence[tuple[int, Sequence[Sample]]],
    rows: Sequence[Variant],
    new_tokens: int,
) -> Iterator[dict[tuple[Variant, int], Seen]]:
    """Answer the batches in order, as many at a time as there are processes; every process gets all the answers."""
    processes = launched()
    for start in range(0, len(batches), processes.num_processes):
        together = list(batches[start : start + processes.num_processes])
        with processes.split_between_processes(together) as own:
            answered = [answer_batch(published, number, batch, rows, new_tokens) for number, batch in own]
        # Some versions of accelerate give processes without a batch of their own the last one once more.
        yield from gather_object(answered)[: len(together)]


_loaded_here: list[PublishedModel] = []


def _load_in_worker(repo: Path, codebook: Path | None) -> None:
    torch.set_num_threads(1)
    _loaded_here.append(PublishedModel(repo, codebook))


def _answer_in_worker(
    batch: tuple[int, Sequence[Sample]], rows: Sequence[Variant], new_tokens: int
) -> dict[tuple[Variant, int], Seen]:
    return answer_batch(_loaded_here[0], *batch, rows, new_tokens)


def answer_batch(
    published: PublishedModel, number: int, batch: Sequence[Sample], rows: Sequence[Variant], new_tokens: int
) -> dict[tuple[Variant, int], Seen]:
    """Answer one batch under every row and draw."""
    inputs = published.inputs(batch)
    results = {}
    with one_run_of_the_tower(published):
        for row in rows:
            smaller = row.selector in (DOWNSAMPLE, NO_IMAGE)
            own_inputs = published.inputs(batch, math.isqrt(row.visual_token_num)) if smaller else inputs
            for draw in row.draws:
                answers = published.answer(own_inputs, row.options(draw, number), row.visual_token_num, new_tokens)
                results[row, draw] = _seen(answers, batch, published.grid)
    return results


def _seen(answers: Answers, batch: Sequence[Sample], grid: int) -> Seen:
    right = [is_right(text, sample.answer) for text, sample in zip(answers.texts, batch, strict=True)]
    said_yes = [is_right(text, "yes") for text in answers.texts]
    objects = kept_objects = 0
    for place, sample in enumerate(batch):
        boxes = sample.boxes if sample.first and sample.boxes else ()
        everything = answers.kept is None and answers.kv_visual_tokens > 0
        kept = None if everything else set() if answers.kept is None else set(answers.kept[place].tolist())
        objects += len(boxes)
        kept_objects += sum(kept is None or bool(kept & patches_of(box, grid, sample.image.width)) for box in boxes)
    return Seen(right, said_yes, answers.kv_visual_tokens, objects, kept_objects)


def patches_of(box: Box, grid: int, size: int = IMAGE_SIZE) -> set[int]:
    """Return the patches, in raster order, whose centre lies in a box of a picture of size x size pixels."""
    left, top, right, bottom = box
    centers = [(place + 0.5) * size / grid for place in range(grid)]
    columns = [place for place, center in enumerate(centers) if left <= center < right]
    return {row * grid + column for row, y in enumerate(centers) if top <= y < bottom for column in columns}


# From counts to the result


def row_of(row: Variant, tally: Tally, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return one row of the JSON."""
    right = np.mean([tally.right[draw] for draw in sorted(tally.right)], axis=0)  # (questions,) over draws
    pictures = np.array([sample.picture for sample in samples])
    types = np.array([sample.type for sample in samples])
    by_type = {kind: types == kind for kind in KINDS if (types == kind).any()}
    if len(tally.kv_visual_tokens) != 1:
        raise BenchmarkError(f"{row} was seen with {sorted(tally.kv_visual_tokens)} visual tokens in the KV cache")
    result = {
        "selector": row.selector,
        "budget_percent": row.budget_percent,
        "visual_token_num": row.visual_token_num,
        "important_ratio": row.important_ratio,
        "position_policy": row.position_policy,
        **({} if row.encoder_stage is None else {"encoder_stage": list(row.encoder_stage)}),
        **({} if row.attention_layer is None else {"attention_layer": row.attention_layer}),
        "n": len(samples),
        "accuracy": float(right.mean()),
        "ci95": interval(right, pictures),
        "accuracy_by_type": {kind: float(right[mask].mean()) for kind, mask in by_type.items()},
        "ci95_by_type": {kind: interval(right[mask], pictures[mask]) for kind, mask in by_type.items()},
        "n_by_type": {kind: int(mask.sum()) for kind, mask in by_type.items()},
        "object_recall": tally.objects_kept / tally.objects if tally.objects else None,
        "kv_visual_tokens": tally.kv_visual_tokens.copy().pop(),
    }
    if len(tally.right) > 1:
        result["accuracy_by_draw"] = [float(np.mean(tally.right[draw])) for draw in sorted(tally.right)]
    return result


def photo_figures(row: Variant, tallies: dict[Variant, Tally], samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what rows about photographs have beside: the hard questions, yes where no is right, and the gain."""
    tally = tallies[row]
    right = np.mean([tally.right[draw] for draw in sorted(tally.right)], axis=0)
    pictures = np.array([sample.picture for sample in samples])
    absent = np.array([sample.type == "exist" and sample.answer == "no" for sample in samples])
    said_yes = np.mean([tally.said_yes[draw] for draw in sorted(tally.said_yes)], axis=0)
    figures: dict[str, Any] = {"yes_when_absent": float(said_yes[absent].mean()) if absent.any() else None}
    smaller = [v for v in tallies if v.selector == DOWNSAMPLE and v.budget_percent == row.budget_percent < 100]
    if smaller:
        hard = ~np.array(tallies[smaller[0]].right[0])
        figures["hard_questions"] = int(hard.sum())
        if hard.any():
            figures |= {"accuracy_hard": float(right[hard].mean()), "ci95_hard": interval(right[hard], pictures[hard])}
    ours = Variant("vispruner", row.budget_percent, row.visual_token_num, 0.5, "renumber")
    if row != ours and ours in tallies:
        figures["gain"], figures["gain_ci95"] = paired_gain(right, np.array(tallies[ours].right[0]), pictures)
    return figures


def paired_gain(right: np.ndarray, other: np.ndarray, pictures: np.ndarray) -> tuple[float, list[float]]:
    """Return by how much the share `right` is above `other` of the same questions, and its 95 % interval.

    As in `interval`, questions about one picture are drawn together, and never worth more than independent ones.
    """
    difference = right - other
    gain = float(difference.mean())
    of_pictures = np.bincount(np.unique(pictures, return_inverse=True)[1], difference - gain)
    groups = len(of_pictures)
    together = groups / max(1, groups - 1) * float((of_pictures**2).sum()) / len(right) ** 2
    half = Z95 * math.sqrt(max(together, float(difference.var()) / len(right)))
    return gain, [gain - half, gain + half]


def interval(right: np.ndarray, pictures: np.ndarray) -> list[float]:
    """Return Wilson's 95 % interval of a share, for as many independent questions as these are worth.

    right     (questions,) 0 to 1
    pictures  (questions,) questions about the same picture are drawn together
    """
    count, share = len(right), float(right.mean())
    effect = 1.0
    _, place = np.unique(pictures, return_inverse=True)
    groups = int(place.max()) + 1
    if 0 < share < 1 and groups > 1:
        residuals = np.bincount(place, right - share)
        variance = groups / (groups - 1) * float((residuals**2).sum()) / count**2
        effect = max(1.0, variance / (share * (1 - share) / count))
    return list(wilson(share, count / effect))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share seen in `count` independent trials."""
    middle = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def run_benchmark(
    repo: Path | None = None,
    selectors: Sequence[str] | None = None,
    budgets: Sequence[float] | None = None,
    dataset: str = "scenes",
    limit: int = QUESTIONS,
    seed: int = 0,
    processes: int | None = None,
    policies: Sequence[str] = POLICIES,
    codebook: Path | None = None,
    ratios: Sequence[float | str] = RATIOS,
    stages: Sequence[tuple[int, float]] = (),
    layers: Sequence[int] = (),
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure and return what the JSON holds; under `accelerate launch` each process returns the whole.

    repo       a built repo, a stock LLaVA checkpoint to build one from, or None for the embedded one
    selectors  "none", "downsample", "no-image", names that the repo registers and two of these as "a+b"; by default
               all that prune behind the encoder, since within the language model small budgets cannot be met
    codebook   for the selectors that need one; by default the repo's, or that of the embedded checkpoint
    processes  two by default, or as many as accelerate launched
    earlier    the record that `with_rows_of` is to add to: refused at once where no row of it is measured again
    """
    if dataset not in DATASETS:
        raise BenchmarkError(f"--dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    if budgets is None:
        budgets = PHOTO_BUDGETS if dataset == PHOTOS else BUDGETS
    if limit < 1 or seed < 0:
        raise BenchmarkError(f"--limit must be at least 1 and --seed at least 0, got {limit} and {seed}")
    others = launched().num_processes
    if others > 1 and processes is not None:
        raise BenchmarkError(f"accelerate launched {others} processes: leave out --processes")
    if processes is None:
        processes = others if others > 1 else PROCESSES
    if processes < 1:
        raise BenchmarkError(f"--processes must be at least 1, got {processes}")
    if wrong := [budget for budget in budgets if not 0 < budget <= 100]:
        raise BenchmarkError(f"--budgets are percentages above 0 up to 100, got {wrong[0]}")
    started = time.monotonic()
    config, own_codebook = EMBEDDED[dataset]
    with published_repo(repo, config) as folder:
        with launched().main_process_first():  # all copy the repo's code into the same cache
            published = PublishedModel(folder, own_codebook if repo is None and codebook is None else codebook)
        registry = published.selectors
        known = [DENSE, *registry, DOWNSAMPLE, NO_IMAGE]
        behind_encoder = [name for name, selector in registry.items() if not selector.in_decoder]
        everything = [DENSE, *behind_encoder, DOWNSAMPLE, *([NO_IMAGE] if dataset == PHOTOS else [])]
        chosen = everything if selectors is None else list(selectors)
        if unknown := [name for name in chosen if name not in known and not set(name.split("+")) <= registry.keys()]:
            raise BenchmarkError(f"--selectors must be among {', '.join(known)}, got {unknown[0]!r}")
        if wrong_pairs := [name for name in chosen if "+" in name and not _is_pair(name, registry)]:
            raise BenchmarkError(
                f"--selectors a+b is a method behind the encoder and one in the language model, got {wrong_pairs[0]!r}"
            )
        rows = variants(chosen, budgets, registry, published.visual_tokens, policies, ratios, stages, layers)
        _require_rows_of(stages, layers, rows)
        if not rows:
            raise BenchmarkError(f'"{DENSE}" drops nothing, so it is measured at 100 % only: add 100 to --budgets')
        if earlier is not None and not {_key(asdict(row)) for row in rows} & {_key(row) for row in earlier["rows"]}:
            raise BenchmarkError(GROWS_BY)
        samples = questions(dataset, seed, limit)
        tallies = measure(published, folder, samples, rows, processes)
    found = [row_of(row, tally, samples) for row, tally in tallies.items()]
    base = published.model.config.vispruner_config["base_model_name_or_path"]
    if dataset == PHOTOS:
        if repo is not None and (weights := repo / "model.safetensors").is_file():  # else in shards, or elsewhere
            base = f"{repo.name}, SHA-256 {hash_of(weights)}"
        found = [{**r, **photo_figures(row, tallies, samples)} for r, row in zip(found, tallies, strict=True)]
    return {
        "dataset": dataset,
        "seed": seed,
        "base_model": base,
        "questions": len(samples),
        "pictures": len({sample.picture for sample in samples}),
        "full_visual_tokens": published.visual_tokens,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions(
            "numpy", "scikit-learn", *(PHOTO_PACKAGES if dataset == PHOTOS else ("pillow", "easy-vqa"))
        ),
        "processes": processes,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "rows": found,
    }


GROWS_BY = (
    "the record can only grow by a run that measured some of its rows again, the dense model's if it has any, and "
    "found the same"
)


def _require_same(record: dict[str, Any], asked: dict[str, Any]) -> None:
    if other := [name for name, value in asked.items() if record[name] != value]:
        raise BenchmarkError(f"the record is of another run: it differs in {', '.join(other)}")


def earlier_record(path: Path, dataset: str, seed: int, limit: int) -> dict[str, Any]:
    """Return the record that --add-to names; BenchmarkError where such a run cannot be added to it."""
    record = read_json(path)
    if lacking := [name for name in (*SAME_IN_A_RECORD, "rows") if name not in record]:
        raise BenchmarkError(f"--add-to {path}: it is no record of accuracy.py, which has {', '.join(lacking)}")
    # Of easy-vqa there may be fewer questions than are asked for.
    asked = {"dataset": dataset, "seed": seed} | ({} if dataset == "easy-vqa" else {"questions": limit})
    _require_same(record, asked)
    return record


def with_rows_of(record: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return an earlier record with the rows of a further run about the same questions.

    That these are of the same model, questions and arithmetic must show in a row that both measured, and found the
    same to the last answer counted; and where both measured the dense model, it shows in that.
    """
    _require_same(record, {name: result[name] for name in SAME_IN_A_RECORD})
    before, new = ({_key(row): row for row in one["rows"]} for one in (record, result))
    same = {row for row in before.keys() & new.keys() if before[row] == new[row]}
    if not same or any(row[0] == DENSE and row not in same for row in before.keys() & new.keys()):
        raise BenchmarkError(GROWS_BY)
    rows = {**before, **new}
    run = {name: result[name] for name in ("date", "versions", "processes", "minutes")}
    run["selectors"] = list(dict.fromkeys(row["selector"] for row in result["rows"]))
    return {**record, "rows": list(rows.values()), "further_runs": [*record.get("further_runs", []), run]}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from every other of its record."""
    named = ("selector", "budget_percent", "important_ratio", "position_policy")
    return (*(row[name] for name in named), tuple(row.get("encoder_stage") or ()), row.get("attention_layer"))


def label(row: dict[str, Any]) -> str:
    """Name a row's selector and options as the table and the plot show them."""
    ratio, policy, stage = row["important_ratio"], row["position_policy"], row.get("encoder_stage")
    if stage is not None:
        return f"{row['selector']}, {stage[1]:.0%} behind encoder layer {stage[0]}"
    if (layer := row.get("attention_layer")) is not None:
        return f"{row['selector']} r={ratio}, ranked in encoder layer {layer}"
    name = row["selector"] if ratio is None else f"{row['selector']} r={ratio if ratio == AUTO else f'{ratio:g}'}"
    return f"{name}, original positions" if policy == "original" else name


def table(result: dict[str, Any]) -> str:
    """Return accuracy, and object recall where objects are known, by selector and budget, as Markdown."""
    budgets = sorted({row["budget_percent"] for row in result["rows"]}, reverse=True)
    lines: dict[str, dict[float, str]] = defaultdict(dict)
    for row in result["rows"]:
        half = 50 * (row["ci95"][1] - row["ci95"][0])
        count = f" of {row['kv_visual_tokens']} tokens" if row["selector"] == DOWNSAMPLE else ""
        recall = "" if row["object_recall"] is None else f" ({100 * row['object_recall']:.0f})"
        lines[label(row)][row["budget_percent"]] = f"{100 * row['accuracy']:.1f} ±{half:.1f}{count}{recall}"
    head = (
        f"{result['dataset']}, seed {result['seed']}: {result['questions']} questions about {result['pictures']} "
        "pictures; % right ± half of the 95 % interval (% of the objects that keep a patch)"
    )
    rows = [[name, *(cells.get(budget, "") for budget in budgets)] for name, cells in lines.items()]
    return f"{head}\n\n{markdown_table(['selector', *(f'{budget:g} %' for budget in budgets)], rows)}"


def photo_table(result: dict[str, Any]) -> str:
    """Return the figures about photographs, a row for each selector and budget, as Markdown."""
    kinds = list(result["rows"][0]["accuracy_by_type"])
    lines = []
    for row in result["rows"]:
        figures = [
            row["accuracy"],
            row.get("accuracy_hard"),
            row["yes_when_absent"],
            *row["accuracy_by_type"].values(),
        ]
        cells = ["" if figure is None else f"{100 * figure:.1f}" for figure in figures]
        lines.append([label(row), row["kv_visual_tokens"], *cells])
    return markdown_table(["selector", "tokens", "all", "hard", "yes where absent", *kinds], lines)


# The plot


COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BLACK, "#8C8C00")
MARKERS = "osD^vPX*"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw accuracy against kept tokens with error bars, all questions and by type, and VisPruner's own options."""
    rows = result["rows"]
    kinds = [kind for kind in KINDS if kind in rows[0]["accuracy_by_type"]]
    small_rows = math.ceil(len(kinds) / 4)
    figure = new_figure(figsize=(13, 5 + 2.7 * small_rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[5, 2.7 * small_rows])
    left, right = top.subplots(1, 2, width_ratios=[3, 2])
    curves = _curves(rows)
    _draw_curves(left, curves, "accuracy", "ci95")
    left.set(title="All questions", ylabel="share right")
    left.legend(fontsize=8, loc="lower right", ncols=2)
    _draw_ratios(right, rows)
    axes = list(bottom.subplots(small_rows, 4, squeeze=False, sharey=True).flat)
    for axis, kind in zip(axes, kinds, strict=False):
        _draw_curves(axis, curves, "accuracy_by_type", "ci95_by_type", kind)
        axis.set_title(f"{kind} ({rows[0]['n_by_type'][kind]} questions)", fontsize=10)
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    figure.suptitle(
        f"{result['dataset']}, seed {result['seed']}: {result['questions']} questions about {result['pictures']} "
        "pictures, with 95 % intervals"
    )
    save_figure(figure, path)


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows with renumbered positions into one curve per selector; of the ratios, 0, 0.5 and "auto"."""
    curves: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if (
            row["position_policy"] != "original"
            and not {"encoder_stage", "attention_layer"} & row.keys()
            and row["kv_visual_tokens"]
            and row["important_ratio"] in (None, 0.0, 0.5, AUTO)
        ):
            curves[label(row)].append(row)
    return curves


def _draw_curves(
    axis: Any, curves: dict[str, list[dict[str, Any]]], value: str, bounds: str, kind: str | None = None
) -> None:
    spread = 1.02
    curves = dict(curves)
    for row in curves.pop(DENSE, []):  # at one count only, so a line to compare the others with
        dense = row[value] if kind is None else row[value][kind]
        axis.axhline(dense, label=f"{DENSE} (all tokens)", color="#707070", linestyle=":", linewidth=1.2)
    for place, (name, rows) in enumerate(curves.items()):
        shift = spread ** (place - len(curves) / 2)  # so that error bars stand side by side
        values = [row[value] if kind is None else row[value][kind] for row in rows]
        limits = [row[bounds] if kind is None else row[bounds][kind] for row in rows]
        errors = [
            [max(0.0, v - low) for v, (low, _) in zip(values, limits, strict=True)],
            [max(0.0, high - v) for v, (_, high) in zip(values, limits, strict=True)],
        ]
        axis.errorbar(
            [row["kv_visual_tokens"] * shift for row in rows],
            values,
            yerr=errors,
            label=name,
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle="-" if place < len(COLOURS) else "--",
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )
    counts = sorted({row["kv_visual_tokens"] for rows in curves.values() for row in rows if _is_budget(row)})
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xlabel("visual tokens in the KV cache", fontsize=8)
    axis.grid(alpha=0.3)


def _is_budget(row: dict[str, Any]) -> bool:
    """Whether a row's token count is the budget itself; that of a smaller picture lies beneath."""
    return row["selector"] != DOWNSAMPLE


def _draw_ratios(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Accuracy against important_ratio, a pair of lines (renumbered and original positions) for each budget."""
    with_ratio = [
        row
        for row in rows
        if row["important_ratio"] not in (None, AUTO)
        and row["selector"] == "vispruner"
        and not {"encoder_stage", "attention_layer"} & row.keys()
    ]
    full = max((row["kv_visual_tokens"] for row in rows), default=0)
    counts = sorted({row["visual_token_num"] for row in with_ratio} - {full}, reverse=True)
    for place, count in enumerate(counts):
        for policy, line in (("renumber", "-"), ("original", "--")):
            chosen = [r for r in with_ratio if r["visual_token_num"] == count and r["position_policy"] == policy]
            axis.plot(
                [row["important_ratio"] for row in chosen],
                [row["accuracy"] for row in chosen],
                line,
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)],
                markersize=4,
                label=f"{count} tokens" if policy == "renumber" else None,
            )
    axis.set(title="VisPruner: share of important tokens", xlabel="important_ratio (dashed: original positions)")
    axis.grid(alpha=0.3)
    if counts:
        axis.legend(fontsize=8)


# The command line


def _ratio(text: str) -> float | str:
    return text if text == AUTO else float(text)


def _stage(text: str) -> tuple[int, float]:
    layer, _, share = text.partition(":")
    try:
        return int(layer), float(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be LAYER:SHARE such as 3:0.5, got {text!r}") from None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A quick look: python benchmarks/accuracy.py --selectors vispruner random --budgets 25 --limit 200",
    )
    parser.add_argument(
        "--repo",
        type=Path,
        metavar="DIR",
        help="a built repo, or a stock LLaVA checkpoint to build one from, be it without the tower of photo_tower.py; "
        "by default the trained one in the package, and with photographs that of train_photo.py",
    )
    parser.add_argument(
        "--selectors",
        nargs="+",
        metavar="NAME",
        help=f"what to measure: {DENSE}, {DOWNSAMPLE}, {NO_IMAGE} and the selectors that the repo registers "
        f"(here {', '.join(SELECTORS)}), or two of these as a+b; by default all that prune behind the encoder",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        metavar="PERCENT",
        help=f"visual tokens kept, in percent (default: {' '.join(f'{b:g}' for b in BUDGETS)}; about photographs "
        f"{' '.join(f'{b:g}' for b in PHOTO_BUDGETS)})",
    )
    parser.add_argument(
        "--positions",
        nargs="+",
        choices=POLICIES,
        default=POLICIES,
        help=f"of the kept tokens, in the prompt (default: {' '.join(POLICIES)})",
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=_ratio,
        default=RATIOS,
        metavar="R",
        help=f"of `important_ratio`, numbers or {AUTO} (default: {' '.join(f'{ratio:g}' for ratio in RATIOS)})",
    )
    parser.add_argument(
        "--encoder-stages",
        nargs="+",
        type=_stage,
        default=(),
        metavar="LAYER:SHARE",
        help="rows of vispruner in which patches leave behind that encoder layer, all but this part of them",
    )
    parser.add_argument(
        "--attention-layers",
        nargs="+",
        type=int,
        default=(),
        metavar="LAYER",
        help="rows of vispruner, with every ratio, in which that encoder layer ranks",
    )
    parser.add_argument("--codebook", type=Path, metavar="FILE", help="for the method that needs one (--repo only)")
    parser.add_argument("--dataset", choices=DATASETS, default="scenes", help="default: %(default)s")
    parser.add_argument(
        "--limit",
        type=int,
        default=QUESTIONS,
        metavar="QUESTIONS",
        help="how many questions (default: %(default)s; all rows of scenes take about thirteen minutes on two cores)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="which test set: any integer >= 0 makes another one (default: %(default)s)",
    )
    parser.add_argument("--processes", type=int, metavar="N", help=f"one core each (default: {PROCESSES})")
    parser.add_argument(
        "--add-to",
        type=Path,
        metavar="FILE",
        help="an earlier result of the same questions: --json and --plot get its rows too (measure some again)",
    )
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write all figures here")
    parser.add_argument("--plot", type=output_file(".png", ".svg"), metavar="FILE", help="draw them here")
    parsed = parser.parse_args(arguments)
    if parsed.add_to is not None and not parsed.add_to.is_file():
        parser.error(f"--add-to {parsed.add_to}: there is no such file")
    if parsed.add_to is not None and parsed.json is None:
        parser.error("--add-to is read only: say by --json where the whole record is to be written")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    torch.set_num_threads(1)
    try:
        earlier = None
        if parsed.add_to is not None:
            earlier = earlier_record(parsed.add_to, parsed.dataset, parsed.seed, parsed.limit)
        result = run_benchmark(
            parsed.repo,
            parsed.selectors,
            parsed.budgets,
            parsed.dataset,
            parsed.limit,
            parsed.seed,
            parsed.processes,
            parsed.positions,
            parsed.codebook,
            parsed.ratios,
            parsed.encoder_stages,
            parsed.attention_layers,
            earlier,
        )
        if earlier is not None:
            result = with_rows_of(earlier, result)
    except ValueError as error:  # BenchmarkError, BuildError and what the model refuses
        print(f"accuracy.py: {error}", file=sys.stderr)
        return 2
    if not launched().is_main_process:
        return 0
    print(table(result))
    if parsed.dataset == PHOTOS:
        print(f"\n{photo_table(result)}")
    if parsed.json is not None:
        write_record(parsed.json, result)
    if parsed.plot is not None:
        plot(result, parsed.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
