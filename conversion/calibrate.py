"""Find the options of the method `vflowopt` that suit a model: Bayesian optimisation under a fixed budget.

What is looked for is how many tokens leave where (behind the encoder, and before each of its layers of the language
model), which tokens its map is the mean of, and how large the cells are that dropped tokens are folded over. Whatever
is tried, a decoder layer holds the same number of visual tokens on average. Like the authors of VFlowOpt, who compare
the last token of the prompt with and without pruning, it takes no true answers: what counts is the Kullback-Leibler
divergence of the next token's distribution from the unpruned one, in nats, mean over questions.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel

from vispruner import __version__
from vispruner.prompt_reading import PER_TOKEN
from vispruner.selectors import SELECTORS

from .base_checkpoint import find_base
from .checkpoint_io import replacing, writable_file
from .demo import torch_threads
from .drawn_scenes import SIDE, draw_scene
from .picture import existing_picture, open_photo
from .plain_text import one_line
from .questions import load_model, load_processor, model_inputs
from .repo_config import load_repo_config

METHOD = "vflowopt"
CALIBRATION = ([".yaml", ".yml"], "a calibration")
EMBEDDED = "tiny-llava-vispruner"
KEEP_RATIO, TRIALS, SCENES, SEED = 0.25, 60, 12, 0
HELD_OUT = 4  # every so manieth picture is kept from the search, to check what it found
LEAST_SHARE = 0.1  # of the tokens that a stage leaves, where the budget allows so few
THRESHOLDS, CELLS = (1.0, 50.0), (2.0, 24.0)
DIGITS = 4  # that numbers of the result have
TEXT = ("input_ids", "attention_mask", *PER_TOKEN)
EXTRA = "vispruner calibrate needs optuna: pip install 'vispruner[calibrate]'"


class CalibrationError(ValueError):
    """What was asked for cannot be calibrated."""


class Asked(NamedTuple):
    """A picture with its questions, ready for the model.

    pixels    what the encoder takes
    prompts   of each question what the language model takes
    expected  of each the log-probabilities (vocabulary,) of the next token, unpruned
    """

    pixels: dict[str, Any]
    prompts: list[dict[str, Any]]
    expected: list[torch.Tensor]


def calibrate(
    model: str | None = None,
    out: str | os.PathLike[str] | None = None,
    keep_ratio: float = KEEP_RATIO,
    images: Sequence[str | os.PathLike[str]] = (),
    questions: Sequence[str] = (),
    trials: int = TRIALS,
    scenes: int = SCENES,
    seed: int = SEED,
) -> dict[str, Any]:
    """Search, and return what was found; write it to the YAML `out`, if given, as a `vispruner_config` block.

    model       a built repo or stock checkpoint (folder or Hub id), or a YAML or its stem, whose base is taken; its
                own code is never run. None: the embedded one
    keep_ratio  the visual tokens that a decoder layer holds on average, as a fraction of all
    images      pictures to ask about, each all of `questions`; without, `scenes` of drawn shapes with their own
    """
    _check(keep_ratio, images, questions, trials, scenes)
    out = None if out is None else writable_file(out, *CALIBRATION)
    pictures = [open_photo(existing_picture(os.path.expanduser(image))) for image in images]
    optuna, (source, name) = _optuna(), _source_of(model)
    with torch_threads(1 if model is None else torch.get_num_threads()):  # the embedded one is too small to share
        loaded = load_model(source, method=METHOD, keep_ratio=keep_ratio)
        to_ask = _to_ask(loaded, pictures, questions, scenes, seed)
        asked = _ask_all(loaded, load_processor(source), to_ask)
        found = {"model": name, "trials": trials, "seed": seed, **_search(optuna, loaded, asked, trials, seed)}
    if out is not None:
        with replacing(out) as unfinished:
            unfinished.write_text(as_yaml(found), encoding="utf-8")
    return found


def _search(optuna: Any, model: PreTrainedModel, asked: Sequence[Asked], trials: int, seed: int) -> dict[str, Any]:
    """Return the best options of so many tries, the first being the defaults, and how far they are from unpruned."""
    searched = [one for number, one in enumerate(asked, 1) if number % HELD_OUT]
    checked = [one for number, one in enumerate(asked, 1) if not number % HELD_OUT]
    stages, least = len(model.model.decoder_layers), _least_share(model)

    def loss(trial: Any) -> float:
        options = {
            "cell": round(trial.suggest_float("cell", *CELLS), DIGITS),
            "global_threshold": round(trial.suggest_float("global_threshold", *THRESHOLDS, log=True), DIGITS),
            "stage_shares": [round(trial.suggest_float(f"share_{n}", least, 1.0), DIGITS) for n in range(stages)],
        }
        trial.set_user_attr("method_options", options)
        return divergence(model, searched, options)

    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, deterministic_objective=True))
    study.enqueue_trial(_default_parameters(stages, least))
    with tqdm(total=trials, desc="calibrating", unit="try") as progress:
        for _ in range(trials):
            study.optimize(loss, n_trials=1)
            progress.set_postfix(divergence=f"{study.best_value:.4f}")
            progress.update()
    tries = {"found": study.best_trial, "default": study.trials[0]}
    options = {name: one.user_attrs["method_options"] for name, one in tries.items()}
    keep_ratio = model.config.vispruner_config["keep_ratio"]
    return {
        "vispruner_config": {"method": METHOD, "keep_ratio": keep_ratio, "method_options": options["found"]},
        "tokens": _tokens_of(model, asked[0], options["found"]),
        "questions": sum(len(one.prompts) for one in searched),
        "divergence": {name: one.value for name, one in tries.items()},
        "held_out_questions": sum(len(one.prompts) for one in checked),
        "held_out_divergence": {
            name: divergence(model, checked, given) if checked else None for name, given in options.items()
        },
    }


def _check(
    keep_ratio: float,
    images: Sequence[str | os.PathLike[str]],
    questions: Sequence[str],
    trials: int,
    scenes: int,
) -> None:
    if not 0 < keep_ratio < 1:
        raise CalibrationError(f"--keep-ratio must be above 0 and below 1, got {keep_ratio:g}")
    for option, value in (("--trials", trials), ("--scenes", scenes)):
        if value < 1:
            raise CalibrationError(f"{option} must be at least 1, got {value}")
    if bool(images) != bool(questions):
        there, missing = ("--images", "--question") if images else ("--question", "--images")
        raise CalibrationError(f"{there} needs {missing}: each picture is asked every question")


def _optuna() -> Any:
    try:
        import optuna
        from optuna.exceptions import ExperimentalWarning
    except ImportError as error:
        raise CalibrationError(EXTRA) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    return optuna


def _source_of(model: str | None) -> tuple[str, str]:
    """Return where the model is loaded from, and what to call it."""
    if model is not None and (Path(model).is_dir() or ("/" in model and not Path(model).is_file())):
        return model, one_line(Path(model).name if Path(model).is_dir() else model)
    repo = load_repo_config(EMBEDDED if model is None else model)
    return str(find_base(repo.base_model, repo.base_revision).with_weights().folder), one_line(repo.base_model)


def _to_ask(
    model: PreTrainedModel, pictures: Sequence[Image.Image], questions: Sequence[str], scenes: int, seed: int
) -> list[tuple[Image.Image, Sequence[str]]]:
    if pictures:
        return [(picture, questions) for picture in pictures]
    size = getattr(model.config.vision_config, "image_size", None)
    side = size if isinstance(size, int) else SIDE * 4
    return [draw_scene(seed, number, side) for number in range(scenes)]


def _ask_all(
    model: PreTrainedModel, processor: Any, pictures: Sequence[tuple[Image.Image, Sequence[str]]]
) -> list[Asked]:
    """Return every picture with its questions, and what the unpruned model says to them."""
    asked = []
    for picture, questions in tqdm(pictures, desc="asking the unpruned model", unit="picture"):
        every = [dict(model_inputs(model, processor, picture, question)) for question in questions]
        pixels = {name: value for name, value in every[0].items() if name not in TEXT}
        prompts = [{k: v for k, v in inputs.items() if not k.startswith("pixel_values")} for inputs in every]
        asked.append(Asked(pixels, prompts, next_tokens(model, Asked(pixels, prompts, []), method="none")))
    return asked


@torch.no_grad()
def next_tokens(model: PreTrainedModel, asked: Asked, **changes: Any) -> list[torch.Tensor]:
    """Return of each question the log-probabilities (vocabulary,) of the next token, with `vispruner_config` changed.

    The picture is encoded once for all of them.
    """
    images = model.encode_images(**asked.pixels, vispruner_config=changes)
    given = {"encoded_images": images, "vispruner_config": changes, "logits_to_keep": 1}
    every = [model(**prompt, **given).logits[0, -1] for prompt in asked.prompts]
    return [logits.float().log_softmax(-1).cpu() for logits in every]


def divergence(model: PreTrainedModel, asked: Sequence[Asked], options: dict[str, Any]) -> float:
    """Return how far answers under these options are from those of the unpruned model: nats, mean over questions."""
    lost = [
        torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True).item()
        for one in asked
        for found, expected in zip(next_tokens(model, one, method_options=options), one.expected, strict=True)
    ]
    return sum(lost) / len(lost)


def _least_share(model: PreTrainedModel) -> float:
    """Return the least share that all stages may leave without the encoder having to leave more than there is."""
    layers, depth, keep_ratio = (
        model.model.decoder_layers,
        model.model.depth,
        model.config.vispruner_config["keep_ratio"],
    )
    widths = [after - before for before, after in zip([0, *layers], [*layers, depth], strict=True)]

    def mean(share: float) -> float:
        return sum(width * share**stage for stage, width in enumerate(widths)) / depth

    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if mean(middle) >= keep_ratio else (middle, high)
    return max(LEAST_SHARE, math.ceil(high * 10**DIGITS) / 10**DIGITS)


def _default_parameters(stages: int, least: float) -> dict[str, float]:
    """Return the options that hold where none are set, as far as the search may go, by the names of its parameters."""
    default = SELECTORS[METHOD].options
    shares = [*default["stage_shares"], *[1.0] * stages][:stages]
    return {
        "cell": default["cell"],
        "global_threshold": default["global_threshold"],
        **{f"share_{stage}": max(share, least) for stage, share in enumerate(shares)},
    }


def _tokens_of(model: PreTrainedModel, asked: Asked, options: dict[str, Any]) -> str:
    """Say how many visual tokens of a picture are left where."""
    next_tokens(model, asked, method_options=options)
    return str(model.last_pruning)


def as_yaml(found: dict[str, Any]) -> str:
    """Return the block to put into a YAML of hub_configs/, under a comment on how it was found."""
    lost, checked = found["divergence"], found["held_out_divergence"]
    comments = [
        f"Found by vispruner calibrate {__version__} for {found['model']}: {found['trials']} tries, "
        f"seed {found['seed']}.",
        f"{found['tokens']}.",
        f"Divergence from the unpruned model, nats a token: {lost['found']:.4f}, by default {lost['default']:.4f} "
        f"({found['questions']} questions).",
    ]
    if found["held_out_questions"]:
        comments.append(
            f"On {found['held_out_questions']} questions that the search did not see: {checked['found']:.4f}, by "
            f"default {checked['default']:.4f}."
        )
    block = yaml.safe_dump({"vispruner_config": found["vispruner_config"]}, sort_keys=False, default_flow_style=None)
    return "".join(f"# {comment}\n" for comment in comments) + block
