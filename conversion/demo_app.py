"""The demo as a page in the browser: a picture, a question and a budget, the patches that stay, and both answers.

`vispruner demo --ui` serves it on this machine; the Space that `vispruner space` writes calls the same `serve`. Gradio
draws it (`pip install "vispruner[ui]"`). The model runs by the installed package, and no code of its repo ever does.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import PreTrainedModel

from vispruner.selectors import SELECTORS
from vispruner.stock_versions import CACHE

from .base_checkpoint import find_base
from .checkpoint_io import read_json
from .demo import torch_threads
from .drawn_scenes import draw_scene
from .methods import all_methods
from .picture import kept_patches_picture, open_photo, view_choice
from .questions import (
    PHOTOGRAPH_QUESTION,
    PHOTOGRAPHS,
    SCENE,
    load_model,
    load_processor,
    model_inputs,
    scene_questions,
    where_and_how,
)
from .repo_config import PHOTO_LLAVA, TOY, is_hub_id

NEEDS_UI = 'the page needs Gradio: pip install "vispruner[ui]"'
ANSWER_TOKENS = 64
DEFAULT_RATIO = 0.25  # of a checkpoint that stores no budget
SCENE_QUESTION, PHOTO_QUESTION = "How many shapes are there?", "What is in this picture?"
DRAWN_SCENES = 2
# Each is as the page's own machine has it: nothing is fetched from elsewhere.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
ABOUT = """\
# {name}: which patches stay
{note}The slider says which share of a picture's visual tokens the language model still reads, and the picture shows
which. *Stock* is the same model with all of them."""
NOTES = {
    TOY: "A toy of {millions:.1f} M parameters, trained on drawn scenes: it knows nothing but those. ",
    PHOTO_LLAVA: "Its vision tower is a real one: look at what is kept. The language model behind it learned drawn "
    "things on photographs; what it says of other pictures means little. ",
}


@dataclass(frozen=True)
class Run:
    """One question answered one way: what was read off the call."""

    answer: str
    visual_tokens: str
    kv_tokens: float
    kv_bytes: int
    first_token: float
    whole: float


class Session:
    """One loaded model, and what the page asks of it; a call at a time, because each sets the model's options."""

    def __init__(self, repo: str | None, visual_token_num: int | None = None) -> None:
        options: dict[str, Any] = {} if visual_token_num is None else {"visual_token_num": visual_token_num}
        source, stored = where_and_how(repo)
        options = {**stored, **options}
        if not options and not _stores_a_budget(source):
            options = {"keep_ratio": DEFAULT_RATIO}
        self.name = "The embedded toy" if repo in (None, TOY) else Path(str(repo)).name
        self.processor = load_processor(source)
        self.model: PreTrainedModel = load_model(source, **options)
        if torch.cuda.is_available():
            self.model.to("cuda")
        self.stored = self.model.config.vispruner_config
        self.made_of = (repo or TOY) if stored else self.stored["base_model_name_or_path"]
        self.is_toy = self.made_of == TOY
        self._lock, self._is_warm = threading.Lock(), False
        self._folder = tempfile.TemporaryDirectory(prefix="vispruner-demo-")  # of the drawn scenes

    def methods(self) -> list[str]:
        """Return the methods that this model can take by a share of its tokens, its own first.

        None but its own that needs a file or another model, and no two at once, whose budget is no share.
        """
        own = self.stored["method"] if self.stored["method"] in SELECTORS else "vispruner"
        found = [
            method.name
            for method in all_methods(self.model.model)
            if method.refused is None and not SELECTORS[method.name].is_told and "codebook" not in method.needs
        ]
        return [own] * (own in found or own == self.stored["method"]) + [name for name in found if name != own]

    def percent(self) -> float:
        """Return the budget that the model came with, in percent of the visual tokens of the sample scene."""
        ratio, count = self.stored["keep_ratio"], self.stored["visual_token_num"]
        if ratio is None and count is not None:
            modality = next(modality for modality in self.model.modalities if modality.name == "image")
            inputs = model_inputs(self.model, self.processor, open_photo(SCENE), SCENE_QUESTION)
            names = [name for name in modality.described_by if name in inputs and name != modality.pixels]
            described = {name: inputs[name] for name in names}
            full, kept = self.model.visual_token_counts(inputs[modality.pixels], **described)
            drops = sum(kept) < sum(full) and not self.model.model.prunes_in_decoder
            ratio = sum(kept) / sum(full) if drops else count / full[0]
        return min(100.0, max(0.1, round(100 * (ratio or DEFAULT_RATIO), 1)))

    def examples(self) -> list[tuple[str, str]]:
        """Return pictures with a question each: scenes first for the toy, which knows nothing else."""
        scenes = [(str(SCENE), scene_questions()[0].text)]
        for number in range(DRAWN_SCENES):
            scene, path = draw_scene(0, number, side=384), Path(self._folder.name) / f"scene-{number}.png"
            scene.picture.save(path)
            scenes.append((str(path), scene.questions[0]))
        if self.made_of == PHOTO_LLAVA:
            return [(str(path), PHOTOGRAPH_QUESTION) for path in PHOTOGRAPHS]
        photographs = [(str(path), PHOTO_QUESTION) for path in PHOTOGRAPHS]
        return [*scenes, *photographs] if self.is_toy else [*photographs, *scenes]

    def draw(self, path: str | None, question: str, percent: float, method: str) -> Image.Image | None:
        """Return the picture with the patches that stay of it; None without a picture."""
        if path is None:
            return None
        photo = open_photo(path)
        with self._under(percent, method):
            panels = view_choice(self.model, self.processor, photo, question)
            return kept_patches_picture(panels, f"{percent:g} % by {method}")

    def answer(self, path: str | None, question: str, percent: float, method: str) -> tuple[Run, Run]:
        """Answer a question with all visual tokens and with those that stay."""
        if path is None:
            raise ValueError("there is no picture: upload one, or take an example")
        if not question.strip():
            raise ValueError("there is no question: write one")
        photo = open_photo(path)
        runs = []
        for share, name in ((percent, "none"), (percent, method)):
            with self._under(share, name):
                if not self._is_warm:  # a process's first call pays for what later ones find ready
                    self._run(photo, question)
                    self._is_warm = True
                runs.append(self._run(photo, question))
        return runs[0], runs[1]

    @contextmanager
    def _under(self, percent: float, method: str) -> Iterator[None]:
        changes: dict[str, Any] = {"method": method}
        if method != "none":
            changes |= {"keep_ratio": percent / 100, "seed": 0}
            if method != self.stored["method"]:
                changes |= {"method_options": None, "prune_layers": None}
        with self._lock, torch_threads(1 if self.is_toy else torch.get_num_threads()):
            try:
                self.model.set_vispruner_config(**changes)
                yield
            finally:
                self.model.config.vispruner_config = self.stored

    @torch.no_grad()
    def _run(self, photo: Image.Image, question: str) -> Run:
        inputs = model_inputs(self.model, self.processor, photo, question)
        started = time.perf_counter()
        first = self.model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        first_token = time.perf_counter() - started
        pruning = self.model.last_pruning
        layers = [layer for layer in first[CACHE].layers if getattr(layer, "keys", None) is not None]
        started = time.perf_counter()
        sequences = self.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        whole = time.perf_counter() - started
        new = sequences[0, inputs["input_ids"].shape[1] :]
        answer = self.processor.decode(new, skip_special_tokens=True).strip()
        later = [f"{sum(counts):,} from layer {layer} on" for layer, counts in pruning.stages]
        return Run(
            answer=answer,
            visual_tokens=", ".join([f"{sum(pruning.kept_counts):,}", *later]),
            kv_tokens=sum(layer.keys.shape[-2] for layer in layers) / len(layers),
            kv_bytes=sum(
                part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values)
            ),
            first_token=first_token,
            whole=whole,
        )


def _stores_a_budget(source: str) -> bool:
    if not Path(source).is_dir() and not is_hub_id(source):
        return True  # it is neither a folder nor on the Hub, which loading it tells
    return "vispruner_config" in read_json(find_base(source).folder / "config.json")


def figures(stock: Run, pruned: Run) -> str:
    """Return the table of both runs, as Markdown."""
    rows = [("visual tokens", stock.visual_tokens, pruned.visual_tokens, "")]
    for name, before, after, style in (
        ("KV cache of the prompt, tokens a layer", stock.kv_tokens, pruned.kv_tokens, ",.4g"),
        ("KV cache of the prompt, KiB", stock.kv_bytes / 2**10, pruned.kv_bytes / 2**10, ",.0f"),
        ("first token, ms", 1e3 * stock.first_token, 1e3 * pruned.first_token, ",.0f"),
        ("whole answer, ms", 1e3 * stock.whole, 1e3 * pruned.whole, ",.0f"),
    ):
        rows.append((name, f"{before:{style}}", f"{after:{style}}", f"{after / before:.2f}"))
    lines = ["| | stock | pruned | ratio |", "|---|---:|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
    note = "Read off one run each, on this machine, without the processor's work; answers may differ in length."
    return "\n".join([*lines, "", note])


def serve(
    repo: str | None = None,
    visual_token_num: int | None = None,
    image: str | os.PathLike[str] | None = None,
    question: str | None = None,
    port: int | None = None,
    block: bool = True,
) -> Any:
    """Load a model and serve the page; return what Gradio's `launch` does, (app, local URL, shared URL).

    repo              a built repo or a stock checkpoint, folder or Hub id; None for the embedded model
    visual_token_num  overrides the budget that the repo stores; a stock checkpoint has none, and starts with a quarter
    image, question   what stands in the page at first; by default the first example
    port              None for the first free one from 7860 on
    block             keep serving until interrupted
    """
    gradio = _gradio()
    if image is not None:
        open_photo(image)
    session = Session(repo, visual_token_num)
    examples = session.examples()
    if image is not None:
        examples.insert(0, (str(image), question or PHOTO_QUESTION))
    elif question is not None:
        examples.insert(0, (examples[0][0], question))
    return _page(gradio, session, examples).launch(
        server_port=port,
        prevent_thread_lock=not block,
        _frontend=False,  # do not give up where a busy machine takes more than three seconds for the first page
        show_error=True,
        theme=gradio.themes.Default(**FONTS),
        footer_links=[],
    )


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would ask its maker's server
    try:
        import gradio
    except ImportError as error:
        raise ValueError(NEEDS_UI) from error
    return gradio


def _on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """On ZeroGPU, let a function have a GPU while it runs; elsewhere return it as it is."""
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(function)


def _told(gradio: Any, function: Callable[..., Any], empty: Any) -> Callable[..., Any]:
    """Turn what a user's input brings about into a message in the page, which is left `empty` of what came before."""

    def told(path: str | None, *arguments: Any) -> Any:
        try:
            return function(path, *arguments)
        except (ValueError, OSError, SafetensorError, MemoryError) as error:
            said = str(error).strip() or type(error).__name__
            if path is not None:
                said = said.replace(path, Path(path).name)  # the name that the user knows
            gradio.Warning(said, duration=None)
            return empty

    return told


def _uploaded(gradio: Any, path: str) -> str:
    """Return the path of a picture that the page has a copy of: who calls its API could name any of this machine."""
    if not Path(path).resolve().is_relative_to(Path(gradio.utils.get_upload_folder()).resolve()):
        raise gradio.Error("the picture must be uploaded")
    return path


def _page(gradio: Any, session: Session, examples: list[tuple[str, str]]) -> Any:
    draw, both = _on_gpu(session.draw), _on_gpu(session.answer)
    nothing = ("", "", "")

    def answered(path: str | None, question: str, percent: float, method: str) -> tuple[str, str, str]:
        stock, pruned = both(path, question, percent, method)
        return stock.answer, pruned.answer, figures(stock, pruned)

    def redrawn(*given: Any) -> tuple[Any, ...]:
        return draw(*given), *nothing  # answers to other settings would be taken for answers to these

    def forgotten() -> tuple[str, str, str]:
        return nothing

    millions = sum(parameter.numel() for parameter in session.model.parameters()) / 1e6
    note = NOTES.get(session.made_of, "").format(millions=millions)
    with gradio.Blocks(title=f"vispruner: {session.name}", analytics_enabled=False) as app:
        gradio.Markdown(ABOUT.format(name=session.name, note=note))
        with gradio.Row():
            with gradio.Column(scale=2):
                photo = gradio.Image(examples[0][0], label="Picture", type="filepath", sources=["upload", "webcam"])
                # The file as it was uploaded, so that `open_photo` says what is wrong with it.
                photo.preprocess = lambda payload: payload and _uploaded(gradio, payload.path)
                question = gradio.Textbox(examples[0][1], label="Question")
                percent = gradio.Slider(0.1, 100, session.percent(), step=0.1, label="Visual tokens kept, percent")
                method = gradio.Dropdown(session.methods(), label="Method, of those that this model can take")
                button = gradio.Button("Answer, stock and pruned", variant="primary")
                chosen = gradio.Examples([list(example) for example in examples], [photo, question])
            with gradio.Column(scale=3):
                drawn = gradio.Image(
                    label="What stays",
                    show_label=False,
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="drawn",
                )
                with gradio.Row():
                    stock = gradio.Textbox(label="Stock model", elem_id="stock")
                    pruned = gradio.Textbox(label="Pruned model", elem_id="pruned")
                table = gradio.Markdown(elem_id="figures")
        given, shown = [photo, question, percent, method], [stock, pruned, table]
        one_at_a_time: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        redraw = _told(gradio, redrawn, (None, *nothing))
        live: dict[str, Any] = {"show_progress": "hidden", **one_at_a_time}
        changes = [app.load, photo.input, percent.change, method.change]
        gradio.on(changes, redraw, given, [drawn, *shown], trigger_mode="always_last", api_name="draw", **live)
        chosen.load_input_event.then(redraw, given, [drawn, *shown], **live)
        question.change(forgotten, None, shown, show_progress="hidden")
        question.blur(_told(gradio, draw, None), given, drawn, **live)  # a method may choose by it
        answer = _told(gradio, answered, nothing)
        gradio.on([button.click, question.submit], answer, given, shown, api_name="answer", **one_at_a_time)
    return app
