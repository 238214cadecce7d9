"""Train a small LLaVA on a real pretrained tower and real photographs: `photos.py` asks, `photo_tower.py` sees.

A stock `LlavaForConditionalGeneration`. The tower is frozen; a projector of two layers and a small Llama learn. Three
stages, each counted in steps and resumable:
  features   what two layers of the tower say of many pictures is computed once and stored, 0.9 MB a picture.
  projector  each patch of a thing or a sign is to resemble, projected, the embeddings of the words that name it, and
             of the letter that it shows.
  language   projector and language model learn to answer. The questions of a picture share its tokens in one sequence,
             under a block mask. In a part of the steps the model sees a random part of the image tokens, renumbered,
             so that short images are nothing new and a step costs less; no pruning method takes part.

OUT gets a checkpoint without the tower's weights, which `photo_tower.with_tower` adds.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin lose half their speed on a busy machine
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Dinov2Model, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from outputs import new_folder, output_file
from photos import (
    CARDS,
    CLASSES,
    PHOTO_PACKAGES,
    PHOTO_SIZE,
    PHOTOGRAPH_NAMES,
    SQUARE_NAMES,
    WORDS,
    YES_NO_TYPES,
    Photo,
    ask,
    generate_photo,
    square_of,
)
from records import versions, write_record
from scenes import NUMBERS, prompt
from train_tiny import (
    UNTAGGED,
    Alignment,
    QuestionCoder,
    answerable,
    build_processor,
    build_tokenizer,
    covered_patches,
    language_loss,
    llava_of,
    pack,
    read_answers,
    to_pixels,
)
from training_run import TrainingRun, add_recipe, autocast, recipe_of, setting, tell, work_folder

from vispruner.conversion.checkpoint_io import CheckpointError, atomic_directory, read_json, replacing
from vispruner.conversion.photo_tower import MEAN, STD, hash_of, tower_folder

PATCH = 14
GRID = PHOTO_SIZE // PATCH
PATCHES = GRID * GRID
ROWS, COLUMNS = (np.indices((GRID, GRID)).reshape(2, -1) + 0.5) * PATCH  # the patches' centers
FEATURES_OF = "features.json"  # what decides them, in their folder
CHUNK = 50  # pictures whose features are one file
LEAST = 80  # pixels of a patch that make it one of a thing
# Of the tower's layers, by a linear readout of training pictures: the middle ones tell most of letters and things, and
# the one before the last, which LLaVA takes alone, least; its [CLS] attention is what tokens are ranked by.
FEATURE_LAYERS = [6, -2]
NAMES = (*CLASSES, *WORDS)
LETTERS = tuple(f"{number}-{letter}" for number in NUMBERS[1:] for letter in "abcdefghijklmnopqrstuvwxyz")
TAGS = {"name": NAMES, "color": tuple(CARDS), "square": SQUARE_NAMES, "letter": LETTERS}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, but for the versions of the libraries and the processor."""

    seed: int = setting(0, "what the pictures, the weights and every batch are drawn from")
    width: int = setting(256, "of the language model")
    text_layers: int = setting(4, "of the language model")
    heads: int = setting(4, "of its attention")
    pictures: int = setting(5000, "to train on")
    validation_pictures: int = setting(200, "to judge it on")
    projector_steps: int = setting(3000, "of the projector stage")
    projector_batch: int = setting(16, "pictures a step")
    projector_rate: float = setting(2e-3, "highest learning rate")
    language_steps: int = setting(4200, "of the language stage")
    language_batch: int = setting(8, "pictures a step")
    language_rate: float = setting(1e-3, "highest learning rate")
    questions: int = setting(14, "most questions asked about a picture in one step")
    compressed_share: float = setting(0.5, "of the steps with shortened images")
    fewest_tokens: int = setting(32, "that a shortened image has")
    alignment: float = setting(0.2, "weight of projected patches resembling words")
    bfloat16: bool = setting(True, "compute matrix products in bfloat16")


class Pictures:
    """Pictures whose features are stored, in files of CHUNK pictures each: features (N, C) and what is on each."""

    def __init__(self, folder: Path, split: str, count: int) -> None:
        self.files = [folder / f"{split}-{start:06d}.npy" for start in range(0, count, CHUNK)]
        self.shown: list[tuple] = []
        for file in self.files:
            self.shown += pickle.loads(file.with_suffix(".pickle").read_bytes())
        self.shown = self.shown[:count]

    def __len__(self) -> int:
        return len(self.shown)

    def features(self, numbers: Sequence[int], kept: np.ndarray) -> Tensor:
        """The kept patches of some pictures (B, K, C)."""
        parts = [np.load(self.files[n // CHUNK], mmap_mode="r")[n % CHUNK][kept] for n in numbers]
        return torch.from_numpy(np.stack(parts))


@torch.no_grad()
def cache_features(tower: Dinov2Model, recipe: Recipe, split: str, count: int, folder: Path) -> None:
    """Store the tower's features of the first `count` pictures of a split; files that are there are kept."""
    bar = tqdm(total=count, desc=f"features of {split}", unit="picture")
    for start in range(0, count, CHUNK):
        file = folder / f"{split}-{start:06d}.npy"
        if not file.exists():
            photos = [generate_photo(split, recipe.seed, start + index) for index in range(CHUNK)]
            features = np.concatenate([encode(tower, recipe, photos[at : at + 8]) for at in range(0, CHUNK, 8)])
            with replacing(file.with_suffix(".pickle")) as unfinished:
                unfinished.write_bytes(pickle.dumps([(photo.things, photo.background) for photo in photos]))
            with replacing(file) as unfinished:
                np.save(unfinished, features)
        bar.update(min(CHUNK, count - start))


def encode(tower: Dinov2Model, recipe: Recipe, photos: Sequence[Photo]) -> np.ndarray:
    """The patches' features (B, N, C) that LLaVA reads, in half precision."""
    pixels = to_pixels(np.stack([np.asarray(photo.image) for photo in photos]), MEAN, STD)
    with autocast(recipe.bfloat16):
        states = tower(pixels, output_hidden_states=True).hidden_states
    return torch.cat([states[layer][:, 1:] for layer in FEATURE_LAYERS], dim=-1).float().numpy().astype(np.float16)


def tag_patches(things: Sequence) -> dict[str, np.ndarray]:
    """What each patch is part of: name, color, square and letter of the thing or sign there (N,)."""
    tags = {name: np.full(PATCHES, UNTAGGED) for name in TAGS}
    for o in things:
        patches = covered(o.box)
        tags["name"][patches] = NAMES.index(o.name)
        if o.color is not None:
            tags["color"][patches] = TAGS["color"].index(o.color)
        if (square := square_of(o.center)) is not None:
            tags["square"][patches] = SQUARE_NAMES.index(square)
        for place, (x, y) in enumerate(o.letters):
            near = np.hypot(COLUMNS - x, ROWS - y) < PATCH
            tags["letter"][near] = LETTERS.index(f"{NUMBERS[place + 1]}-{o.name[place]}")
    return tags


def covered(box: Sequence[int]) -> np.ndarray:
    return covered_patches(box, LEAST, GRID, PATCH)


class ProjectorBatches(Dataset):
    """The tagged patches of the pictures of every step, as if they were one picture's."""

    def __init__(self, recipe: Recipe, pictures: Pictures) -> None:
        self.recipe, self.pictures = recipe, pictures

    def __len__(self) -> int:
        return self.recipe.projector_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.recipe.seed, 11, step])
        parts = []
        for number in rng.integers(len(self.pictures), size=self.recipe.projector_batch):
            tags = tag_patches(self.pictures.shown[number][0])
            patches = np.flatnonzero(tags["name"] != UNTAGGED)
            features = self.pictures.features([int(number)], patches)
            parts.append({"features": features, **{n: torch.from_numpy(t[patches])[None] for n, t in tags.items()}})
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


class LanguageBatches(Dataset):
    """The batch of every step of the language stage, with fresh questions."""

    def __init__(self, recipe: Recipe, pictures: Pictures, coder: QuestionCoder) -> None:
        self.recipe, self.pictures, self.coder = recipe, pictures, coder

    def __len__(self) -> int:
        return self.recipe.language_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        recipe = self.recipe
        rng = np.random.default_rng([recipe.seed, 12, step])
        kept = np.arange(PATCHES)
        if rng.random() < recipe.compressed_share:
            kept = np.sort(rng.permutation(PATCHES)[: int(rng.integers(recipe.fewest_tokens, PATCHES))])
        chosen = [int(number) for number in rng.integers(len(self.pictures), size=recipe.language_batch)]
        questions, tags = [], []
        for things, background in (self.pictures.shown[number] for number in chosen):
            asked = list(dict.fromkeys(ask(things, background, rng) + ask(things, background, rng)))
            asked = [asked[i] for i in rng.permutation(len(asked))]
            questions.append([q for q in asked if answerable(q, kept, covered)][: recipe.questions])
            tags.append(tag_patches(things))
        return {
            "features": self.pictures.features(chosen, kept),
            **{name: torch.from_numpy(np.stack([t[name][kept] for t in tags])) for name in TAGS},
            **pack(self.coder, questions, len(kept)),
        }


def corpus() -> list[str]:
    """Everything that is ever asked and answered, so that each word is one token."""
    rng = np.random.default_rng(0)
    photos = [generate_photo("train", 0, index) for index in range(60)]
    asked = [q.text for photo in photos for q in ask(photo.things, photo.background, rng)]
    answers = (*NAMES, *LETTERS, *CARDS, *SQUARE_NAMES, *NUMBERS, *PHOTOGRAPH_NAMES, "yes", "no")
    return [prompt(text) for text in dict.fromkeys(asked)] + [f" {answer}" for answer in answers]


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, coder: QuestionCoder, pictures: Pictures, recipe: Recipe
) -> dict[str, float]:
    """Share of right first tokens by question type, on stored pictures with all their tokens."""
    right: dict[str, list[bool]] = defaultdict(list)
    rng = np.random.default_rng(recipe.seed)
    for start in range(0, len(pictures), 8):
        numbers = range(start, min(start + 8, len(pictures)))
        questions = [ask(*pictures.shown[number], rng) for number in numbers]
        batch = pack(coder, questions, PATCHES)
        batch["features"] = pictures.features(numbers, np.arange(PATCHES))
        with autocast(recipe.bfloat16):
            _, hidden = read_answers(model, batch)
            rows, columns = (batch["places"] >= 0).nonzero(as_tuple=True)
            guess = model.lm_head(hidden[rows, batch["places"][rows, columns]]).argmax(-1)
        hits = (guess == batch["answers"][rows, columns]).tolist()
        for row, column, hit in zip(rows.tolist(), columns.tolist(), hits, strict=True):
            right[questions[row][column].type].append(hit)
    return summarise(right)


def summarise(right: dict[str, list[bool]]) -> dict[str, float]:
    """Accuracy by type, over all questions, and over those that are not answered by yes or no ("open")."""
    everything = [hit for hits in right.values() for hit in hits]
    open_ended = [hit for name, hits in right.items() if name not in YES_NO_TYPES for hit in hits]
    shares = {"overall": everything, "open": open_ended, **dict(sorted(right.items()))}
    return {name: round(float(np.mean(hits)), 4) for name, hits in shares.items() if hits}


class Run(TrainingRun):
    """The run of the model on real photographs."""

    stages = ("features", "projector", "language")

    def __init__(self, recipe: Recipe, work: Path, features: Path, save_every: int) -> None:
        self.tower = Dinov2Model.from_pretrained(tower_folder(PHOTO_SIZE))
        self.tokenizer = build_tokenizer(corpus())
        self.tower.config.name_or_path = ""  # a folder of this machine
        self.model = llava_of(self.tower.config, recipe, self.tokenizer, FEATURE_LAYERS)
        self.coder = QuestionCoder(self.tokenizer)
        self.align = Alignment(self.tokenizer, TAGS)
        self.stored_features = features
        learned = {
            "projector": self.model.model.multi_modal_projector,
            "language_model": self.model.model.language_model,
            "head": self.model.lm_head,
        }
        super().__init__(recipe, work, save_every, learned)

    def features(self) -> None:
        clock = time.monotonic()
        self._claim_features()
        for split, count in self._counts().items():
            cache_features(self.tower.eval(), self.recipe, split, count, self.stored_features)
        self.progress.seconds["features"] += time.monotonic() - clock
        self.finish_stage("features")

    def projector(self) -> None:
        train = self._pictures("train")
        if self.stored is None or not self.stored["optimizer"]:
            standardise(self.model.model.multi_modal_projector.linear_1, train)

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            projected = self.model.model.multi_modal_projector(batch["features"].float())
            return self.align(self.model, projected, batch)

        modules = [self.model.model.multi_modal_projector, self.model.get_input_embeddings()]
        batches = ProjectorBatches(self.recipe, train)
        self.train("projector", batches, modules, self.recipe.projector_rate, loss_of, dict)

    def language(self) -> None:
        train, validation = self._pictures("train"), self._pictures("validation")

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            return language_loss(self.model, self.align, batch, self.recipe.alignment)

        def report() -> dict[str, float]:
            return accuracy(self.model, self.coder, validation, self.recipe)

        batches = LanguageBatches(self.recipe, train, self.coder)
        self.train("language", batches, list(self.modules.values()), self.recipe.language_rate, loss_of, report)

    def _counts(self) -> dict[str, int]:
        return {"validation": self.recipe.validation_pictures, "train": self.recipe.pictures}

    def _claim_features(self) -> None:
        """Note in the folder of features what they are of, or refuse one of others, which would be mixed."""
        noted = self.stored_features / FEATURES_OF
        own = {"seed": self.recipe.seed, "bfloat16": self.recipe.bfloat16}
        self.stored_features.mkdir(exist_ok=True)
        if not noted.exists() and not any(self.stored_features.glob("*.npy")):
            write_record(noted, own)
        before: Any = read_json(noted) if noted.exists() else "an unknown recipe"
        if before != own:
            raise SystemExit(
                f"{self.stored_features} holds features of {before}, not of {own}: give another --features, or the "
                "settings that it was begun with"
            )

    def _pictures(self, split: str) -> Pictures:
        self._claim_features()
        return Pictures(self.stored_features, split, self._counts()[split])

    def write(self, out: Path) -> None:
        """Write the checkpoint in half precision, without the tower's weights, in place of one that is there."""
        learned = {n: t.half() for n, t in self.model.state_dict().items() if ".vision_tower." not in f".{n}"}
        with atomic_directory(out, overwrite=True) as unfinished:
            self.model.half().save_pretrained(unfinished, state_dict=learned)
            build_processor(self.tokenizer, PHOTO_SIZE, PATCH, MEAN, STD).save_pretrained(unfinished)
            (unfinished / "model.safetensors").chmod(0o644)  # as for the embedded checkpoint


@torch.no_grad()
def standardise(layer: nn.Linear, pictures: Pictures) -> None:
    """Have a layer begin as if each of its inputs had mean 0 and variance 1: some are a hundred times others."""
    features = pictures.features(range(min(64, len(pictures))), np.arange(PATCHES)).float().flatten(0, 1)
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    layer.weight /= deviation
    layer.bias -= layer.weight @ mean


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Stopped runs go on where they last saved: python benchmarks/train_photo.py --out FOLDER --resume",
    )
    parser.add_argument("--out", type=new_folder, required=True, help="folder of the checkpoint (replaced at the end)")
    parser.add_argument("--work", type=new_folder, help="folder of the unfinished run (default: OUT with .work added)")
    parser.add_argument(
        "--features", type=new_folder, help="folder of stored features, which runs may share (default: WORK/features)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the work folder")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: %(default)s)")
    parser.add_argument(
        "--save-every", type=int, default=200, metavar="STEPS", help="between savings (default: %(default)s)"
    )
    parser.add_argument("--json", type=output_file(".json"), help="write recipe, times, versions and accuracies here")
    add_recipe(parser, Recipe, "the defaults are those of the recorded run")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    recipe, work = recipe_of(args, Recipe), work_folder(args)
    try:
        run = Run(recipe, work, args.features or work / "features", args.save_every)
        run.go(args.resume)
    except CheckpointError as error:
        raise SystemExit(f"train_photo.py: {error}") from error
    reached = accuracy(run.model, run.coder, run._pictures("validation"), recipe)
    run.write(args.out)
    report = {
        "recipe": asdict(recipe),
        "threads": args.threads,
        "seconds": {name: round(value) for name, value in run.progress.seconds.items()},
        "versions": versions("tokenizers", "numpy", "scikit-learn", *PHOTO_PACKAGES),
        "parameters": sum(p.numel() for module in run.modules.values() for p in module.parameters()),
        "sha256": hash_of(args.out / "model.safetensors"),
        "validation": reached,
    }
    tell(report, args.json)


if __name__ == "__main__":
    main()
