"""The whole path on one picture: build a pruned repo, verify it, load it by the public API, ask, measure what fell.

The embedded toy is asked about the scene in assets/, whose true answers are known, any other model about a photo.
Every figure but the operations (`prefill_cost`) is read off the run: tokens and cache lengths from what `generate`
returned, times from the model's own modules (the best of several runs, pruned and unpruned taking turns). The unpruned
figures come from the same model with method="none".
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import pipeline
from transformers.utils import logging as transformers_logging

import vispruner
from vispruner import merge_vispruner_config
from vispruner.choosing import Choice
from vispruner.stock_versions import CACHE

from .base_checkpoint import resolve_base
from .build import build_repo
from .built_folder import holds_a_build, verified_copy
from .checkpoint_io import read_json, refuse_links, replacing
from .picture import kept_patches_picture, open_photo, save_png, view_budgets
from .prefill_cost import kv_cache_bytes, prefill_flops
from .questions import (
    NEW_TOKENS,
    PHOTOGRAPH_QUESTION,
    PHOTOGRAPHS,
    SCENE,
    Question,
    is_right,
    judged,
    model_inputs,
    questions_about,
)
from .repo_config import DEMO_CONFIG, EMBEDDED_CONFIGS, PHOTO_LLAVA, TOY, RepoConfig, load_repo_config
from .verify import Report, verify_repo

SAMPLE_PHOTO = PHOTOGRAPHS[0]
QUESTION = "What is in this picture?"
RESULTS, PICTURE, REPO = "demo.json", "demo.png", "repo"
MADE_BY = "vispruner demo"

STAGES = ("vision", "select", "project", "prefill", "decode")
REPEATS = 5


class DemoError(ValueError):
    """The demo cannot start, or what it saw is not what pruning promises."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One picture and question run through the model: counts, the operations of the prefill, seconds per stage."""

    visual_tokens: int
    prompt_tokens: int
    kv_tokens: int
    kv_bytes: int
    prefill_flops: int
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Answered:
    """One question with both answers, and the true one where it is known."""

    question: Question
    unpruned: str
    pruned: str


def run_demo(
    out: str | os.PathLike[str] = "vispruner-demo",
    image: str | os.PathLike[str] | None = None,
    base: str | None = None,
    question: str | None = None,
    visual_token_num: int | None = None,
    repo: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Run the demo, print its tables, and write `demo.png`, `demo.json` and the built `repo/` into the folder `out`.

    image             a photo; by default the scene that ships with the package, or its photo for another base
    base              build from this folder or Hub id instead of the embedded checkpoint
    question          ask only this; by default all questions of the scene, or what is in the photo
    visual_token_num  visual tokens kept per image or tile; by default the repo's own
    repo              use this built repo and build none
    Returns what `demo.json` holds. Raises DemoError when the cache did not shrink by the dropped tokens.
    """
    if base is not None and repo is not None:
        raise DemoError("give either --base (a repo is built from it) or --repo (one that is built already)")
    given = None if image is None else open_photo(image)
    config = None if repo is not None else _repo_config(base, visual_token_num)
    if repo is not None and not Path(repo).is_dir():
        raise DemoError(f"--repo {repo} is no folder: give one that `vispruner build` wrote")
    with _claimed_folder(Path(out).expanduser()) as folder, _quiet_transformers():
        verified = _verified_repo(folder / REPO, config, repo)
        with verified_copy(verified.folder, verified.files) as same:
            pipe = pipeline("image-text-to-text", model=str(same), trust_remote_code=True)
        if visual_token_num is not None:
            pipe.model.set_vispruner_config(visual_token_num=visual_token_num)
        options = pipe.model.config.vispruner_config
        made_of = options["base_model_name_or_path"]
        is_toy = made_of == TOY
        path = Path(image) if image is not None else SCENE if is_toy else SAMPLE_PHOTO
        photo = open_photo(path) if given is None else given
        usual = PHOTOGRAPH_QUESTION if made_of == PHOTO_LLAVA else QUESTION
        questions = questions_about(path, question) or [Question(usual)]
        print("Answering, pruned and unpruned ...", flush=True)
        with torch_threads(1 if is_toy else torch.get_num_threads()):
            unpruned, pruned = measure(pipe, photo, questions[0].text)
            require_pruning(unpruned, pruned)
            answers, picture = _answer_and_draw(pipe, photo, path.name, questions)
        save_png(picture, folder / PICTURE)
        results = {
            "made_by": MADE_BY,
            "picture": path.name,
            "vispruner_config": options,
            "unpruned": dataclasses.asdict(unpruned),
            "pruned": dataclasses.asdict(pruned),
            "answers": [dataclasses.asdict(answered) for answered in answers],
        }
        _write_results(folder, results)
        print(report(unpruned, pruned))
        print(answer_report(answers))
        print(f"\nThe kept patches are drawn in {folder / PICTURE}; the figures are in {folder / RESULTS}.")
        if made_of in LIMITS:
            parameters = sum(parameter.numel() for parameter in pipe.model.parameters())
            print(LIMITS[made_of].format(millions=parameters / 1e6))
    return results


LIMITS = {
    TOY: """\
The embedded model is a toy of {millions:.1f} M parameters, trained on drawn scenes: it knows nothing else.
One scene is no measure of its accuracy, and its times say little about a real model.""",
    PHOTO_LLAVA: """\
The vision tower is a real one: look at what is kept. The language model behind it learned drawn things on photographs;
what it says of other pictures means little.""",
}


def _answer_and_draw(
    pipe: Any, photo: Image.Image, name: str, questions: Sequence[Question]
) -> tuple[list[Answered], Image.Image]:
    """Answer all questions, and draw the model's budget between twice and half of it."""
    model = pipe.model
    full = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    budget = model.model.vispruner_options.budget(full)
    budgets = [number for number in (2 * budget, budget, budget // 2) if 0 < number < full]
    panels = view_budgets(model, pipe.processor, photo, budgets, questions)
    pruned = panels[1 + budgets.index(budget)]
    answers = [Answered(*texts) for texts in zip(questions, panels[0].answers, pruned.answers, strict=True)]
    return answers, kept_patches_picture(panels, f"{name} under several budgets", questions)


def _repo_config(base: str | None, visual_token_num: int | None) -> RepoConfig:
    config = load_repo_config(EMBEDDED_CONFIGS.get(base or TOY, DEMO_CONFIG))
    if visual_token_num is not None:
        options = merge_vispruner_config(config.vispruner_config, {"visual_token_num": visual_token_num})
        config = dataclasses.replace(config, vispruner_config=options)
    if base is not None and base not in EMBEDDED_CONFIGS:
        model_type = read_json(resolve_base(base) / "config.json").get("model_type", "")
        vispruner.architecture_of(model_type)
        repo_id = f"someone/{Path(base).name}-vispruner"
        config = dataclasses.replace(
            config, repo_id=repo_id, base_model=base, architecture=model_type, card={}, budgets={}
        )
    return config


@contextmanager
def _claimed_folder(folder: Path) -> Iterator[Path]:
    """Make the demo's folder; when the demo fails, what it made is removed again, unless an earlier demo was there."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    is_empty = bool(made) or (folder.is_dir() and not any(folder.iterdir()))
    _claim_folder(folder)
    try:
        yield folder
    except BaseException:
        if is_empty:
            shutil.rmtree(folder / REPO, ignore_errors=True)
            for file in (folder / RESULTS, folder / PICTURE):
                file.unlink(missing_ok=True)
            for parent in made:
                with suppress(OSError):  # not empty: somebody else uses it by now
                    parent.rmdir()
        raise


def _claim_folder(folder: Path) -> Path:
    """Make the demo's folder, or take over one that an earlier demo made; never touch another, nor follow a link."""
    if (file := next((place for place in (folder, *folder.parents) if place.is_file()), None)) is not None:
        raise DemoError(f"{file} is a file: give a folder with --out")
    results, repo = folder / RESULTS, folder / REPO
    if folder.is_dir() and any(folder.iterdir()):
        refuse_links(repo)
        made_by = read_json(results).get("made_by") if results.is_file() else None
        if made_by != MADE_BY or (repo.exists() and not (repo.is_dir() and holds_a_build(repo))):
            raise DemoError(f"{folder} holds files that no demo wrote: give another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    _write_results(folder, {"made_by": MADE_BY})
    return folder


def _write_results(folder: Path, results: Mapping[str, Any]) -> None:
    with replacing(folder / RESULTS) as unfinished:
        unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _verified_repo(target: Path, config: RepoConfig | None, repo: str | os.PathLike[str] | None) -> Report:
    if config is not None:
        print(f"Building {target} from {config.base_model} ...", flush=True)
        repo = build_repo(config, target, overwrite=True, show_progress=False)
    assert repo is not None
    print(f"Verifying {repo} in a fresh process ...", flush=True)
    found = verify_repo(repo)
    if not found.passed:
        raise DemoError(f"the repo is refused:\n{found.table()}")
    print(found.table().splitlines()[-1])
    return found


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Leave out the progress bars and the advice of libraries: the demo's own lines are the output."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Work that is too small to be shared is slower, and varies more, on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(pipe: Any, photo: Image.Image, question: str) -> tuple[Measured, Measured]:
    """Answer `question` with the pipeline's model, unpruned and as it is configured, and read all off the runs."""
    model, method = pipe.model, pipe.model.config.vispruner_config["method"]
    inputs = model_inputs(model, pipe.processor, photo, question)
    timed: dict[str, list[dict[str, float]]] = {"none": [], method: []}
    for _ in range(1 + REPEATS):
        for name, runs in timed.items():
            model.set_vispruner_config(method=name)
            runs.append(_time_stages(model, inputs))
    measured = []
    for name, runs in timed.items():
        model.set_vispruner_config(method=name)
        seconds = {stage: min(run[stage] for run in runs[1:]) for stage in (*STAGES, "whole")}
        measured.append(_count(model, inputs, seconds))
    return measured[0], measured[-1]


def _count(model: Any, inputs: Any, seconds: dict[str, float]) -> Measured:
    _, kept = model.visual_token_counts(inputs["pixel_values"], inputs.get("image_sizes"))
    cache = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)[CACHE]
    kv_tokens = cache.get_seq_length()
    value_size = torch.empty((), dtype=model.dtype).element_size()
    return Measured(
        visual_tokens=sum(kept),
        prompt_tokens=inputs["input_ids"].shape[1],
        kv_tokens=kv_tokens,
        kv_bytes=kv_cache_bytes(model.config, kv_tokens, value_size),
        prefill_flops=prefill_flops(model.config, kv_tokens, sum(kept)),
        seconds=seconds,
    )


def require_pruning(unpruned: Measured, pruned: Measured) -> None:
    """Raise DemoError unless the cache shrank by exactly the visual tokens that were dropped, and some were."""
    dropped = unpruned.visual_tokens - pruned.visual_tokens
    if dropped <= 0:
        raise DemoError(
            f"nothing was pruned: {pruned.visual_tokens} of {unpruned.visual_tokens} visual tokens were kept; "
            "give a smaller --visual-token-num"
        )
    if unpruned.kv_tokens != unpruned.prompt_tokens:
        raise DemoError(
            f"the unpruned model should cache its whole prompt of {unpruned.prompt_tokens} tokens, "
            f"but its cache holds {unpruned.kv_tokens}"
        )
    if unpruned.kv_tokens - pruned.kv_tokens != dropped:
        raise DemoError(
            f"{dropped} visual tokens were dropped, but the cache fell from {unpruned.kv_tokens} to "
            f"{pruned.kv_tokens} tokens: pruning did not do what it says"
        )


def _time_stages(model: Any, inputs: Any) -> dict[str, float]:
    """Return the seconds of every stage of one `generate`; "decode" is per token, "whole" is the call."""
    _finish_device_work(model)
    started = time.perf_counter()
    with _stage_clock(model) as seconds:
        model.generate(**inputs, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False)
    _finish_device_work(model)
    seconds["whole"] = time.perf_counter() - started
    seconds["decode"] /= NEW_TOKENS - 1
    return seconds


@contextmanager
def _stage_clock(model: Any) -> Iterator[dict[str, float]]:
    """Add up the seconds that the model's modules take during one `generate`."""
    seconds = dict.fromkeys(STAGES, 0.0)
    base, started, prefilled = model.model, 0.0, False

    def start(*_: Any) -> None:
        nonlocal started
        _finish_device_work(model)
        started = time.perf_counter()

    def stop(stage: str) -> None:
        _finish_device_work(model)
        seconds[stage] += time.perf_counter() - started

    def stop_head(*_: Any) -> None:
        nonlocal prefilled
        stop("decode" if prefilled else "prefill")
        prefilled = True

    def start_choice(choice: Choice) -> None:
        if choice.layer is None:  # what the language model chooses is a part of prefill
            start()

    def stop_choice(choice: Choice) -> None:
        if choice.layer is None:
            stop("select")

    ends = {
        base.vision_tower: lambda *_: stop("vision"),
        base.multi_modal_projector: lambda *_: stop("project"),
        base.language_model: lambda *_: stop("decode" if prefilled else "prefill"),
        model.lm_head: stop_head,
    }
    hooks = [module.register_forward_pre_hook(start) for module in ends]
    hooks += [module.register_forward_hook(end) for module, end in ends.items()]
    try:
        with base.watch_choices(after=stop_choice, before=start_choice):
            yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _finish_device_work(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def report(unpruned: Measured, pruned: Measured) -> str:
    """Return the table of both runs."""
    rows: list[tuple[str, float, float, str]] = [
        ("visual tokens", unpruned.visual_tokens, pruned.visual_tokens, ",.0f"),
        ("KV cache, tokens", unpruned.kv_tokens, pruned.kv_tokens, ",.0f"),
        ("KV cache, KiB", unpruned.kv_bytes / 2**10, pruned.kv_bytes / 2**10, ",.0f"),
        ("prefill, GFLOPs", unpruned.prefill_flops / 1e9, pruned.prefill_flops / 1e9, ",.3f"),
    ]
    names = {"decode": "decode, ms per token", "whole": f"whole answer of {NEW_TOKENS} tokens, ms"}
    for stage in (*STAGES, "whole"):
        name = names.get(stage, f"{stage}, ms")
        rows.append((name, 1e3 * unpruned.seconds[stage], 1e3 * pruned.seconds[stage], ",.2f"))
    lines = [f"\n{'':<32}{'unpruned':>12}{'pruned':>12}{'ratio':>9}"]
    for name, before, after, style in rows:
        ratio = f"{after / before:.3f}" if before else "-"
        lines.append(f"{name:<32}{before:>12{style}}{after:>12{style}}{ratio:>9}")
    return "\n".join(lines)


def answer_report(answers: Sequence[Answered]) -> str:
    """Return every question with its true answer and the two given ones, and how many of those are right."""
    if any(asked.question.answer is None for asked in answers):
        parts = [(asked.question.text, asked.unpruned, asked.pruned) for asked in answers]
        return "\n".join(
            f"\n{text}\nanswer, unpruned: {before}\nanswer, pruned:   {after}" for text, before, after in parts
        )
    rows: list[tuple[str, ...]] = [("question", "true answer", "unpruned", "pruned")]
    right = [0, 0]
    for asked in answers:
        expected = str(asked.question.answer)
        given = (asked.unpruned, asked.pruned)
        rows.append((asked.question.text, expected, *(judged(answer, expected) for answer in given)))
        right = [count + is_right(answer, expected) for count, answer in zip(right, given, strict=True)]
    rows.append(("right answers", f"{len(answers)}", *(f"{count}" for count in right)))
    widths = [2 + max(len(row[column]) for row in rows) for column in range(3)]
    return "\n" + "\n".join(
        "".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)) for row in rows
    )
