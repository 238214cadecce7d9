"""Train the small LLaVA that the package embeds: a stock checkpoint that really answers questions about scenes.

Four stages, each counted in steps and resumable:
  vision    a CLIP tower learns to name, at every patch of an object (features of layer -2), the object's colour,
            shape or digit and where its centre is. CLS has a loss of its own, a list of what is in the picture, which
            is what makes its attention settle on objects as it does in CLIP. At first it looks at half of the patches
            of crowded scenes, which costs half, and at the end at whole ordinary ones.
  features  the tower is frozen and the features of many scenes are computed once.
  language  projector and language model learn to answer from those features. The questions of a picture share its
            tokens in one sequence, under a block mask. In a third of the steps the model sees a random part of the
            image tokens only, renumbered, so that short images are nothing new; no pruning method takes part.
  finish    the same once more, shorter and gentler, with a larger share of easy-vqa's pictures.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin lose half their speed on a busy machine
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parent))
from outputs import new_folder, output_file
from records import versions
from scenes import (
    COLORS,
    EASY_VQA_SHAPES,
    GRID,
    IMAGE_SIZE,
    NUMBERS,
    PATCH_SIZE,
    QUADRANTS,
    SHAPES,
    Box,
    EasyVqaItem,
    Question,
    SceneObject,
    ask,
    compose,
    easy_vqa_questions,
    generate_scene,
    prompt,
    scene_rng,
)
from training_run import TrainingRun, add_recipe, autocast, recipe_of, setting, tell, work_folder

from vispruner.conversion.checkpoint_io import atomic_directory

PATCHES = GRID * GRID
COLOR_WORDS = (*COLORS, "black", "gray", "teal", "brown")  # the last four occur in easy-vqa only
SHAPE_WORDS = (*SHAPES, "rectangle")
DIGIT_WORDS = tuple("0123456789")
SCENE_WORDS = {"color": COLOR_WORDS, "shape": SHAPE_WORDS, "digit": DIGIT_WORDS, "quadrant": QUADRANTS}
BACKGROUND, SHAPE, DIGIT = range(3)
UNTAGGED = -100  # what cross_entropy ignores
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # what CLIP normalises with
STAGES = ("vision", "features", "language", "finish")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if content is string %}{% set content = [{'type': 'text', 'text': content}] %}{% endif %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% for part in content if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LANGUAGE_SEED = 1  # scenes cached for the language stage are others than those of the vision stage


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, but for the versions of the libraries and the processor."""

    seed: int = setting(0, "what the weights and every batch are drawn from")
    width: int = setting(128, "of the tower and of the language model")
    vision_layers: int = setting(6, "the last one stays untrained")
    text_layers: int = setting(4, "of the language model")
    heads: int = setting(4, "of attention, in both")
    vision_steps: int = setting(3600, "of the vision stage")
    vision_batch: int = setting(32, "pictures a step")
    vision_rate: float = setting(1e-3, "highest learning rate")
    easy_share: float = setting(0.125, "of easy-vqa's pictures in the vision and language stages")
    dense_share: float = setting(0.6, "of crowded scenes in the vision stage, but for its last fifth")
    vision_tokens: int = setting(72, "patches seen in the first part of the vision stage")
    sparse_share: float = setting(0.7, "of the vision stage that is its first part")
    cached_scenes: int = setting(12000, "scenes for the language stage")
    validation_scenes: int = setting(400, "scenes to judge it on")
    easy_limit: int | None = setting(None, "questions of easy-vqa to read (all unless given)")
    language_steps: int = setting(3600, "of the language stage")
    language_batch: int = setting(16, "pictures a step")
    language_rate: float = setting(1.5e-3, "highest learning rate")
    questions: int = setting(14, "most questions asked about a picture in one step")
    compressed_share: float = setting(1 / 3, "of the steps with shortened images")
    fewest_tokens: int = setting(16, "that a shortened image has")
    alignment: float = setting(0.2, "weight of projected patches resembling words")
    finish_steps: int = setting(1200, "of the finishing stage")
    finish_rate: float = setting(7e-4, "highest learning rate")
    finish_easy_share: float = setting(0.35, "of easy-vqa's pictures in it")
    bfloat16: bool = setting(True, "compute matrix products in bfloat16")


LANGUAGE_FIELDS = ("questions", "compressed_share", "fewest_tokens", "alignment")


def build_tokenizer(corpus: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges make one token of every word of a corpus, by default the questions about scenes."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    words = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+(?:-[A-Za-z]+)*| ?[0-9]| ?[^\sA-Za-z0-9]|\s"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merging ends when every word of the corpus is one token
        min_frequency=1,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus() if corpus is None else corpus, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def _corpus() -> list[str]:
    answers = (*COLOR_WORDS, *SHAPE_WORDS, *DIGIT_WORDS, *NUMBERS, *QUADRANTS, "yes", "no")
    asked = [q.text for index in range(200) for q in generate_scene("train", 0, index).questions]
    asked += [item.question.text for item in easy_vqa_questions("train", 2000)]
    return [prompt(text) for text in dict.fromkeys(asked)] + [f" {answer}" for answer in answers]


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 with fresh weights. Its tower's last layer stays as drawn: layer -2 never reads it."""
    vision = CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        projection_dim=recipe.width,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    return llava_of(vision, recipe, tokenizer)


def llava_of(
    vision: Any, recipe: Any, tokenizer: PreTrainedTokenizerFast, feature_layer: int | list[int] = -2
) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 with fresh weights on this tower; width, text_layers, heads and seed are the recipe's."""
    torch.manual_seed(recipe.seed)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=11 * recipe.width // 4,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=2048,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def build_processor(
    tokenizer: PreTrainedTokenizerFast,
    image_size: int = IMAGE_SIZE,
    patch_size: int = PATCH_SIZE,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> LlavaProcessor:
    """CLIP's processing: the shorter edge is resized, the centre cropped."""
    from transformers import CLIPImageProcessor  # on import it warns when torchvision is missing

    image_processor = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(mean),
        image_std=list(std),
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def vision_features(model: LlavaForConditionalGeneration, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
    """hidden_states[-2] of the tower, CLS first (B, 1 + N, C), without running the layer after it.

    With `kept` (B, K), patches in raster order, the tower looks at those only and returns (B, 1 + K, C).
    """
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    hidden = tower.embeddings(pixels)
    if kept is not None:
        patches = hidden[:, 1:].gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1]))
        hidden = torch.cat([hidden[:, :1], patches], dim=1)
    hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[:-1]:
        output = layer(hidden, None)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def to_pixels(images: np.ndarray, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Normalise (B, H, W, 3) bytes as CLIP's image processor does."""
    scaled = (torch.tensor(images).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return scaled.permute(0, 3, 1, 2).contiguous()


class VisionHeads(nn.Module):
    """Linear readouts of the patches' and CLS's features, dropped after the vision stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.sizes = {"kind": 3, "color": len(COLOR_WORDS), "shape": len(SHAPE_WORDS), "digit": 10, "quadrant": 4}
        self.patch = nn.Linear(width, sum(self.sizes.values()) + 2)
        self.cls = nn.Linear(width, len(COLOR_WORDS) * len(SHAPE_WORDS) + 10)

    def forward(self, features: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the patches' logits by tag, the centres they point at (B, N, 2), and what CLS lists."""
        features = self.norm(features.float())
        *tags, center = self.patch(features[:, 1:]).split([*self.sizes.values(), 2], dim=-1)
        return dict(zip(self.sizes, tags, strict=True)), center, self.cls(features[:, 0])


def tag_patches(objects: Sequence[SceneObject]) -> dict[str, np.ndarray]:
    """What each patch is part of: kind, color, shape, digit, quadrant (N,), center (N, 2); and CLS's list (L,)."""
    tags = {name: np.full(PATCHES, UNTAGGED) for name in ("color", "shape", "digit", "quadrant")}
    tags["kind"] = np.full(PATCHES, BACKGROUND)
    center = np.zeros((PATCHES, 2), np.float32)
    listed = np.zeros(len(COLOR_WORDS) * len(SHAPE_WORDS) + 10, np.float32)
    for o in objects:
        covered = covered_patches(o.box)
        x, y = o.center
        center[covered] = (x / IMAGE_SIZE, y / IMAGE_SIZE)
        tags["quadrant"][covered] = 2 * (y > IMAGE_SIZE / 2) + (x > IMAGE_SIZE / 2)
        tags["kind"][covered] = DIGIT if o.kind == "digit" else SHAPE
        if o.digit is not None:
            tags["digit"][covered] = o.digit
            listed[len(COLOR_WORDS) * len(SHAPE_WORDS) + o.digit] = 1
        if o.color is not None:
            tags["color"][covered] = COLOR_WORDS.index(o.color)
        if o.shape is not None:
            tags["shape"][covered] = SHAPE_WORDS.index(o.shape)
        if o.color is not None and o.shape is not None:
            listed[COLOR_WORDS.index(o.color) * len(SHAPE_WORDS) + SHAPE_WORDS.index(o.shape)] = 1
    return {**tags, "center": center, "listed": listed}


def covered_patches(box: Sequence[int], least: int = 10, grid: int = GRID, patch_size: int = PATCH_SIZE) -> np.ndarray:
    """The patches, in raster order, that share at least this many pixels with a box."""
    edges = np.arange(grid) * patch_size
    left, top, right, bottom = box
    wide = np.clip(np.minimum(edges + patch_size, right) - np.maximum(edges, left), 0, None)
    high = np.clip(np.minimum(edges + patch_size, bottom) - np.maximum(edges, top), 0, None)
    return np.flatnonzero(np.outer(high, wide) >= least)


@dataclass
class EasyPicture:
    """A picture of easy-vqa with its questions, and the one object in it as far as the questions tell."""

    pixels: np.ndarray
    objects: list[SceneObject]
    questions: list[Question]


def load_easy(split: str, limit: int | None) -> list[EasyPicture]:
    """Read the pictures of a split of easy-vqa; the object's box is where the picture is not its corner's colour."""
    items: dict[int, list[EasyVqaItem]] = defaultdict(list)
    for item in easy_vqa_questions(split, limit):
        items[item.image_id].append(item)
    pictures = []
    for group in items.values():
        pixels = np.asarray(group[0].image)
        rows, columns = np.nonzero(np.abs(pixels.astype(int) - pixels[0, 0]).sum(-1) > 40)
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        questions = [item.question for item in group]
        named = {q.answer for q in questions}
        for q in questions:
            negated = " not " in q.text or " no " in q.text
            if q.type == "exist" and (q.answer == "yes") != negated:
                named |= set(q.text.rstrip("?").split())
        color = next((c for c in COLOR_WORDS if c in named), None)
        shape = next((s for s in EASY_VQA_SHAPES if s in named), None)
        pictures.append(EasyPicture(pixels, [SceneObject("shape", box, color=color, shape=shape)], questions))
    return pictures


class VisionBatches(Dataset):
    """The batch of every step of the vision stage: scenes as they are, crowded ones, and pictures of easy-vqa."""

    def __init__(self, recipe: Recipe, easy: list[EasyPicture]) -> None:
        self.recipe, self.easy = recipe, easy

    def __len__(self) -> int:
        return self.recipe.vision_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        recipe = self.recipe
        batch = [self._picture(step * recipe.vision_batch + i, step) for i in range(recipe.vision_batch)]
        tags = [tag_patches(objects) for _, objects in batch]
        if step < recipe.sparse_share * recipe.vision_steps:
            rng = np.random.default_rng([recipe.seed, 3, step])
            for t in tags:
                # Rather patches of objects: most of a picture is background, which teaches little.
                order = np.argsort(rng.random(PATCHES) - 0.5 * (t["kind"] != BACKGROUND))
                kept = np.sort(order[: recipe.vision_tokens])
                t |= {name: value[kept] for name, value in t.items() if name != "listed"} | {"kept": kept}
        tensors = {name: torch.from_numpy(np.stack([t[name] for t in tags])) for name in tags[0]}
        return {"pixels": to_pixels(np.stack([pixels for pixels, _ in batch])), **tensors}

    def _picture(self, index: int, step: int) -> tuple[np.ndarray, Sequence[SceneObject]]:
        rng = scene_rng("train", self.recipe.seed, index)
        kind = rng.random()
        if kind < self.recipe.easy_share:
            picture = self.easy[int(rng.integers(len(self.easy)))]
            return picture.pixels, picture.objects
        crowded = kind < self.recipe.easy_share + self.recipe.dense_share and step < 0.8 * self.recipe.vision_steps
        if crowded:
            return compose(rng, "train", shapes=5, digits=4)
        return compose(rng, "train", shapes=int(rng.integers(1, 5)), digits=int(rng.random() < 0.8))


def vision_loss(heads: VisionHeads, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Name and place the object at each of its patches, and list the picture's contents at CLS."""
    logits, center, listed = heads(features)
    weight = torch.tensor([0.3, 1.0, 1.0])
    loss = F.cross_entropy(logits["kind"].flatten(0, 1), batch["kind"].flatten(), weight)
    for name, factor in (("color", 1.0), ("shape", 1.0), ("digit", 1.5), ("quadrant", 0.5)):
        if (batch[name] != UNTAGGED).any():
            loss = loss + factor * F.cross_entropy(logits[name].flatten(0, 1), batch[name].flatten())
    tagged = batch["kind"] != BACKGROUND
    loss = loss + 5 * F.smooth_l1_loss(center[tagged], batch["center"][tagged], beta=0.05)
    return loss + 8 * F.binary_cross_entropy_with_logits(listed, batch["listed"])


@torch.no_grad()
def vision_accuracy(model: LlavaForConditionalGeneration, heads: VisionHeads, recipe: Recipe) -> dict[str, float]:
    """How many of the objects of validation scenes are named right by the mean of their patches."""
    right: dict[str, list[bool]] = defaultdict(list)
    count = min(recipe.validation_scenes, 256)
    scenes = [generate_scene("validation", recipe.seed, index) for index in range(count)]
    for start in range(0, count, 64):
        part = scenes[start : start + 64]
        with autocast(recipe.bfloat16):
            features = vision_features(model, to_pixels(np.stack([np.asarray(s.image) for s in part])))
        logits, _, _ = heads(features)
        for row, scene in enumerate(part):
            for o in scene.objects:
                covered = covered_patches(o.box)
                guess = {name: values[row, covered].mean(0).argmax().item() for name, values in logits.items()}
                if o.digit is not None:
                    right["digit"].append(guess["digit"] == o.digit)
                else:
                    right["color"].append(COLOR_WORDS[guess["color"]] == o.color)
                    right["shape"].append(SHAPE_WORDS[guess["shape"]] == o.shape)
    return {name: float(np.mean(values)) for name, values in right.items()}


@dataclass
class Pictures:
    """Cached pictures: features (P, N, C) of layer -2, and per picture its objects and (easy-vqa) its questions."""

    features: np.ndarray
    objects: list[list[SceneObject]]
    questions: list[list[Question] | None]


@torch.no_grad()
def cache_features(model: LlavaForConditionalGeneration, recipe: Recipe, split: str, scenes: int, file: Path) -> None:
    """Compute the features of a split's scenes and easy-vqa pictures and write them beside each other to `file`."""
    easy = load_easy(split, recipe.easy_limit)
    features = np.empty((scenes + len(easy), PATCHES, recipe.width), np.float16)
    objects: list[list[SceneObject]] = []
    for start in tqdm(range(0, len(features), 64), desc=f"features of {split}"):
        numbers = range(start, min(start + 64, len(features)))
        part = [
            _cached_scene(split, recipe, number) if number < scenes else easy[number - scenes].pixels
            for number in numbers
        ]
        pixels = [picture if isinstance(picture, np.ndarray) else picture[0] for picture in part]
        objects += [
            easy[number - scenes].objects if isinstance(picture, np.ndarray) else picture[1]
            for number, picture in zip(numbers, part, strict=True)
        ]
        with autocast(recipe.bfloat16):
            features[numbers.start : numbers.stop] = vision_features(model, to_pixels(np.stack(pixels)))[:, 1:].float()
    questions = [None] * scenes + [picture.questions for picture in easy]
    partial = file.with_suffix(".part")
    with partial.open("wb") as out:
        pickle.dump((features, objects, questions), out, protocol=5)
    os.replace(partial, file)


def _cached_scene(split: str, recipe: Recipe, index: int) -> tuple[np.ndarray, list[SceneObject]]:
    scene = generate_scene(split, recipe.seed + (LANGUAGE_SEED if split == "train" else 0), index)
    return np.asarray(scene.image), scene.objects


class QuestionCoder:
    """Turns questions into ids: what precedes the image, and per question what follows it up to the end token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[tuple[str, str], list[int]] = {}
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        ids = tokenizer(prompt("?")).input_ids
        self.prefix = ids[: ids.index(self.image)]

    def __call__(self, question: Question) -> list[int]:
        key = (question.text, question.answer)
        if key not in self.known:
            ids = self.tokenizer(f"{prompt(question.text)} {question.answer}").input_ids
            self.known[key] = [*ids[ids.index(self.image) + 1 :], self.tokenizer.eos_token_id]
        return self.known[key]


def pack(
    coder: QuestionCoder, questions: Sequence[Sequence[Question]], image_tokens: int, length: int | None = None
) -> dict[str, Tensor]:
    """Lay out, per picture, prefix, image and all its questions in one sequence.

    Every question sees the prefix and the image but no other question, and counts its positions from the image on.
    Returns ids and positions (B, S), mask (B, 1, S, S), and for the last token before each answer: its place, the
    answer's id and the question's number in the picture, -1 where padded (B, Q).
    """
    start = len(coder.prefix) + image_tokens
    coded = [[coder(q) for q in row] for row in questions]
    longest = max(start + sum(map(len, row)) for row in coded)
    most = max(map(len, coded))
    size = longest if length is None else length
    ids = torch.full((len(coded), size), coder.tokenizer.pad_token_id)
    positions, block = torch.zeros_like(ids), torch.full_like(ids, -1)
    places, answers = (torch.full((len(coded), most), -1) for _ in range(2))
    ids[:, :start] = torch.tensor(coder.prefix + [coder.image] * image_tokens)
    positions[:, :start] = torch.arange(start)
    block[:, :start] = 0
    for row, blocks in enumerate(coded):
        at = start
        for number, tokens in enumerate(blocks):
            end = at + len(tokens)
            ids[row, at:end] = torch.tensor(tokens)
            positions[row, at:end] = torch.arange(start, start + len(tokens))
            block[row, at:end] = number + 1
            places[row, number], answers[row, number] = end - 3, tokens[-2]
            at = end
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    shared = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    mask = (causal & shared | torch.eye(size, dtype=torch.bool))[:, None]
    return {"ids": ids, "positions": positions, "mask": mask, "places": places, "answers": answers}


def answerable(question: Question, kept: np.ndarray, covered: Callable[[Box], np.ndarray] = covered_patches) -> bool:
    """Whether every object that the answer rests on still has a patch among the kept ones."""
    return all(np.isin(covered(box), kept).any() for box in question.boxes)


class LanguageBatches(Dataset):
    """The batch of every step of the last two stages, drawn from the cached pictures with fresh questions."""

    def __init__(self, recipe: Recipe, pictures: Pictures, coder: QuestionCoder, *, finish: bool = False) -> None:
        self.recipe, self.pictures, self.coder = recipe, pictures, coder
        self.steps = recipe.finish_steps if finish else recipe.language_steps
        self.easy_share = recipe.finish_easy_share if finish else recipe.easy_share
        self.stream = 8 if finish else 7

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        recipe = self.recipe
        rng = np.random.default_rng([recipe.seed, self.stream, step])
        kept = np.arange(PATCHES)
        if rng.random() < recipe.compressed_share:
            kept = np.sort(rng.permutation(PATCHES)[: int(rng.integers(recipe.fewest_tokens, PATCHES))])
        scenes, total = recipe.cached_scenes, len(self.pictures.features)
        of_easy = rng.random(recipe.language_batch) < self.easy_share
        chosen = [int(rng.integers(scenes, total) if easy else rng.integers(scenes)) for easy in of_easy]
        questions = []
        for number in chosen:
            known = self.pictures.questions[number]
            asked = known if known is not None else _draw_questions(self.pictures.objects[number], rng)
            asked = [asked[i] for i in rng.permutation(len(asked))]
            questions.append([q for q in asked if answerable(q, kept)][: recipe.questions])
        tags = [tag_patches(self.pictures.objects[number]) for number in chosen]
        return {
            "features": torch.from_numpy(self.pictures.features[chosen][:, kept]),
            **{
                n: torch.from_numpy(np.stack([t[n][kept] for t in tags]))
                for n in ("color", "shape", "digit", "quadrant")
            },
            **pack(self.coder, questions, len(kept)),
        }


def _draw_questions(objects: list[SceneObject], rng: np.random.Generator) -> list[Question]:
    return list(dict.fromkeys(ask(objects, rng) + ask(objects, rng)))


def read_answers(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the projected image tokens (B, T, D) and the hidden states (B, S, D) of packed sequences."""
    image = model.model.multi_modal_projector(batch["features"].float())
    embedded = model.get_input_embeddings()(batch["ids"]).clone()
    start = int((batch["ids"][0] == model.config.image_token_id).nonzero()[0])
    embedded[:, start : start + image.shape[1]] = image.to(embedded.dtype)
    output = model.model.language_model(
        inputs_embeds=embedded, attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
    )
    return image, output.last_hidden_state


class Alignment(nn.Module):
    """How well each projected patch of an object resembles the embeddings of the words that name it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, groups: dict[str, Sequence[str]] = SCENE_WORDS) -> None:
        super().__init__()
        self.words = {name: torch.tensor([answer_id(tokenizer, w) for w in words]) for name, words in groups.items()}

    def forward(self, model: LlavaForConditionalGeneration, image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        loss = image.new_zeros((), dtype=torch.float32)
        for name, ids in self.words.items():
            if (batch[name] != UNTAGGED).any():
                words = model.get_input_embeddings()(ids)
                logits = image.float() @ words.float().T / image.shape[-1] ** 0.5 * 4
                loss = loss + F.cross_entropy(logits.flatten(0, 1), batch[name].flatten())
        return loss


def answer_id(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    ids = tokenizer(f" {word}", add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"the answer {word!r} must be one token, got {len(ids)}: extend the tokenizer's corpus")
    return ids[0]


def language_loss(
    model: LlavaForConditionalGeneration, align: Alignment, batch: dict[str, Tensor], weight: float
) -> Tensor:
    """Cross-entropy of the answers and of the end tokens after them, and the alignment of the image with words."""
    image, hidden = read_answers(model, batch)
    rows, columns = (batch["places"] >= 0).nonzero(as_tuple=True)
    places = batch["places"][rows, columns]
    loss = F.cross_entropy(model.lm_head(hidden[rows, places]).float(), batch["answers"][rows, columns])
    end = torch.full_like(places, model.config.text_config.eos_token_id)
    loss = loss + 0.1 * F.cross_entropy(model.lm_head(hidden[rows, places + 1]).float(), end)
    return loss + weight * align(model, image, batch)


@torch.no_grad()
def language_accuracy(
    model: LlavaForConditionalGeneration,
    coder: QuestionCoder,
    pictures: Pictures,
    recipe: Recipe,
    image_tokens: int = PATCHES,
) -> dict[str, float]:
    """Share of right first tokens by question type, easy-vqa apart, on cached pictures or a random part of them."""
    rng = np.random.default_rng(recipe.seed)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(pictures.features), 32):
        numbers = range(start, min(start + 32, len(pictures.features)))
        kept = np.sort(rng.permutation(PATCHES)[:image_tokens])
        questions = [pictures.questions[n] or ask(pictures.objects[n], rng) for n in numbers]
        batch = pack(coder, questions, len(kept))
        batch["features"] = torch.from_numpy(pictures.features[numbers.start : numbers.stop][:, kept])
        with autocast(recipe.bfloat16):
            _, hidden = read_answers(model, batch)
            guess = model.lm_head(
                hidden.gather(1, batch["places"].clamp(min=0)[..., None].expand(-1, -1, recipe.width))
            )
        hits = guess.argmax(-1) == batch["answers"]
        for row, number in enumerate(numbers):
            easy = pictures.questions[number] is not None
            for column, question in enumerate(questions[row]):
                right["easy-vqa" if easy else question.type].append(bool(hits[row, column]))
    return summarise(right)


def summarise(right: dict[str, list[bool]]) -> dict[str, float]:
    """Accuracy by type; "overall" is over all questions about scenes but relation, as the aim is stated."""
    accuracy = {name: round(float(np.mean(hits)), 4) for name, hits in sorted(right.items())}
    counted = [hit for name, hits in right.items() if name not in ("relation", "easy-vqa") for hit in hits]
    return {"overall": round(float(np.mean(counted)), 4), **accuracy} if counted else accuracy


class Run(TrainingRun):
    """The run of the embedded checkpoint."""

    stages = STAGES

    def __init__(self, recipe: Recipe, work: Path, save_every: int) -> None:
        self.tokenizer = build_tokenizer()
        self.model = build_model(recipe, self.tokenizer)
        self.heads = VisionHeads(recipe.width)
        self.coder = QuestionCoder(self.tokenizer)
        super().__init__(recipe, work, save_every, {"model": self.model, "heads": self.heads})

    def used(self, name: str) -> bool:
        stage = "language" if name in LANGUAGE_FIELDS else name.split("_")[0]
        if stage not in ("language", "finish"):
            return True
        begun = len(self.progress.done) + (self.progress.step > 0)
        return STAGES.index(stage) < begun

    def vision(self) -> None:
        recipe, model, heads = self.recipe, self.model, self.heads

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            return vision_loss(heads, vision_features(model, batch["pixels"], batch.get("kept")), batch)

        batches = VisionBatches(recipe, load_easy("train", recipe.easy_limit))
        modules = [model.model.vision_tower, heads]
        self.train(
            "vision", batches, modules, recipe.vision_rate, loss_of, lambda: vision_accuracy(model, heads, recipe)
        )

    def features(self) -> None:
        clock = time.monotonic()
        for split in ("validation", "train"):
            scenes = self.recipe.cached_scenes if split == "train" else self.recipe.validation_scenes
            cache_features(self.model, self.recipe, split, scenes, self.work / f"{split}.pickle")
        self.progress.seconds["features"] += time.monotonic() - clock
        self.finish_stage("features")

    def language(self) -> None:
        self._language("language", self.recipe.language_rate)

    def finish(self) -> None:
        self._language("finish", self.recipe.finish_rate)

    def _language(self, stage: str, rate: float) -> None:
        recipe, model = self.recipe, self.model
        align = Alignment(self.tokenizer)
        train, validation = (self._cached(split) for split in ("train", "validation"))

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            return language_loss(model, align, batch, recipe.alignment)

        def report() -> dict[str, float]:
            return language_accuracy(model, self.coder, validation, recipe)

        batches = LanguageBatches(recipe, train, self.coder, finish=stage == "finish")
        modules = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
        self.train(stage, batches, modules, rate, loss_of, report)

    def _cached(self, split: str) -> Pictures:
        with (self.work / f"{split}.pickle").open("rb") as file:
            return Pictures(*pickle.load(file))

    def write(self, out: Path) -> None:
        """Write the checkpoint as any LLaVA is stored, in place of one that is there."""
        with atomic_directory(out, overwrite=True) as unfinished:
            self.model.save_pretrained(unfinished)
            build_processor(self.tokenizer).save_pretrained(unfinished)
            # It is written for the owner alone, which packages would carry on.
            (unfinished / "model.safetensors").chmod(0o644)


@torch.no_grad()
def generate_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: Sequence[tuple[Image.Image, Question, str]],
    batch: int = 64,
) -> dict[str, float]:
    """Answer (picture, question, name to count it under) with the model's own generate(); shares of right answers."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in tqdm(range(0, len(asked), batch), desc="generate"):
        part = asked[start : start + batch]
        inputs = processor(
            images=[image for image, _, _ in part],
            text=[prompt(q.text) for _, q, _ in part],
            padding=True,
            return_tensors="pt",
        ).to(model.dtype)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (_, question, name), text in zip(part, texts, strict=True):
            right[name].append(text.strip() == question.answer)
    return summarise(right)


def evaluate(folder: Path, scenes: int, easy_limit: int | None) -> dict[str, dict[str, float]]:
    """Measure a written checkpoint on validation and test pictures, through the processor and generate()."""
    from transformers import AutoProcessor

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    results = {}
    for split in ("validation", "test"):
        pictures = [generate_scene(split, 0, index) for index in range(scenes)]
        asked = [(scene.image, q, q.type) for scene in pictures for q in scene.questions]
        asked += [(item.image, item.question, "easy-vqa") for item in easy_vqa_questions(split, easy_limit)]
        results[split] = generate_accuracy(model, processor, asked)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Stopped runs go on where they last saved: python benchmarks/train_tiny.py --out FOLDER --resume",
    )
    parser.add_argument("--out", type=new_folder, required=True, help="folder of the checkpoint (replaced at the end)")
    parser.add_argument("--work", type=new_folder, help="folder of the unfinished run (default: OUT with .work added)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the work folder")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: %(default)s)")
    parser.add_argument(
        "--save-every", type=int, default=300, metavar="STEPS", help="between savings (default: %(default)s)"
    )
    parser.add_argument("--json", type=output_file(".json"), help="write recipe, times, versions and accuracies here")
    parser.add_argument(
        "--scenes", type=int, default=500, help="scenes of the final measurement (default: %(default)s)"
    )
    add_recipe(parser, Recipe, "defaults are the recipe of the embedded checkpoint")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    recipe, work = recipe_of(args, Recipe), work_folder(args)
    run = Run(recipe, work, args.save_every)
    run.go(args.resume)
    run.write(args.out)
    report = {
        "recipe": asdict(recipe),
        "threads": args.threads,
        "seconds": {name: round(value) for name, value in run.progress.seconds.items()},
        "versions": versions("tokenizers", "numpy", "scikit-learn", "easy-vqa"),
        "scenes": args.scenes,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "accuracy": evaluate(args.out, args.scenes, recipe.easy_limit),
    }
    tell(report, args.json)


if __name__ == "__main__":
    main()
