"""One model, asked the questions of one task after the other through lmms-eval: what `paper.py` calls a cell.

Beside lmms-eval's metrics a cell says how many visual tokens the language model really got. A repo that is said to
prune and does not is refused, whatever its figures are.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image, ImageOps
from run_lmms_eval import HuggingfacePictures
from transformers import AutoModelForImageTextToText

TASKS = Path(__file__).parent


class NotPrunedError(RuntimeError):
    """A repo that should prune gave all visual tokens to the language model."""


class PadsToSquare:
    """A processor whose pictures become squares before it resizes and crops them, so that it crops nothing off.

    The paper's LLaVA-1.5 saw pictures so: in the middle of a square of the colour that normalises to zero.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._color = tuple(int(255 * mean) for mean in processor.image_processor.image_mean)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, images: list[Image.Image], **inputs: Any) -> Any:
        return self._processor(images=[self._square(image) for image in images], **inputs)

    def _square(self, image: Image.Image) -> Image.Image:
        return ImageOps.pad(image, (max(image.size),) * 2, color=self._color)


class CountedModel(HuggingfacePictures):
    """lmms-eval's "huggingface" that stays loaded for the next task and notes the visual tokens of each call.

    pads    show pictures as squares, see `PadsToSquare`
    prunes  whether it is meant to
    """

    def __init__(self, pretrained: str, pads: bool, prunes: bool, **options: Any) -> None:
        super().__init__(pretrained, trust_remote_code=prunes, **options)
        # Anew: lmms-eval takes AutoModel, by which a stock LLaVA cannot generate, and bfloat16.
        self._model = None
        loading = {"trust_remote_code": prunes, "device_map": self.device_map, "dtype": "auto"}
        self._model = AutoModelForImageTextToText.from_pretrained(pretrained, **loading).eval()
        self._config = self._model.config
        if pads:
            self.processor = PadsToSquare(self.processor)
        self.prunes = prunes
        self.counts: list[tuple[int, int, int, int]] = []  # questions, tokens in full, behind the encoder, at the end
        self._uncounted = self._model.generate
        self._model.generate = self._generate

    def clean(self) -> None:
        """Free nothing: lmms-eval would drop the model after its first task."""

    def _generate(self, **inputs: Any) -> Any:
        output = self._uncounted(**inputs)
        if inputs.get("pixel_values") is not None:
            ids = inputs["input_ids"]
            full = kept = last = int((ids == self._config.image_token_id).sum())
            if (pruning := getattr(self._model, "last_pruning", None)) is not None:
                kept = last = sum(pruning.kept_counts)
                if pruning.stages:
                    last = sum(pruning.stages[-1][1])
            self.counts.append((len(ids), full, kept, last))
        return output

    def visual_tokens(self) -> dict[str, float]:
        """Return the visual tokens of a question since the last call: in full, behind the encoder, in the last layer.

        Raises NotPrunedError where it is meant to prune and did not.
        """
        counts, self.counts = self.counts, []
        questions, *sums = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0, 0)
        if self.prunes and counts and sums[-1] == sums[0]:
            raise NotPrunedError(
                "all visual tokens reached the language model, so that its figures would be those of the stock model"
            )
        return dict(zip(("full", "kept", "last"), (total / max(1, questions) for total in sums), strict=True))


def task_manager() -> TaskManager:
    """Return lmms-eval's index of tasks, ours among them; it takes seconds to make."""
    return TaskManager("WARNING", include_path=str(TASKS), model_name="huggingface")


def measure_cell(
    model: CountedModel, tasks: Sequence[str], manager: TaskManager, limit: int | None = None
) -> dict[str, Any]:
    """Ask `model` the questions of these tasks; return what lmms-eval says, and the visual tokens of a question."""
    model.counts = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # for what some tasks write beside their metrics
        try:
            found = simple_evaluate(
                model=model,
                tasks=list(tasks),
                limit=limit,
                bootstrap_iters=0,
                task_manager=manager,
                log_samples=tasks[0].startswith(("pope", "mmvet")),
                cli_args=argparse.Namespace(output_path=folder, process_with_media=False),
            )
        except ZeroDivisionError as error:
            if "coco_cap_chair" not in tasks:
                raise
            raise ValueError("no caption names an object of COCO, and CHAIR is the share of wrong ones") from error
    cell = {
        "tasks": {task: _figures(found, task) for task in tasks},
        "visual_tokens": model.visual_tokens(),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    samples = [sample for task in tasks for sample in found.get("samples", {}).get(task, [])]
    require_judged(samples)
    if said := [sample["pope_accuracy"]["prediction"] for sample in samples if "pope_accuracy" in sample]:
        # Counted here, because lmms-eval's pope_yes_ratio counts the right answers instead of the model's.
        cell["said_yes"] = said.count("yes") / len(said)
        cell["said_neither"] = 1 - cell["said_yes"] - said.count("no") / len(said)
    return cell


def require_judged(samples: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where a judge did not answer: lmms-eval would score 0, and say nothing of it."""
    silent = sum(sample.get("gpt_eval_score", {}).get("eval_model", "judge") == "" for sample in samples)
    if silent:
        raise ValueError(
            f"the judge did not answer for {silent} of {len(samples)} questions: see OPENAI_API_KEY, OPENAI_API_URL, "
            "MODEL_VERSION"
        )


def _figures(found: Mapping[str, Any], task: str) -> dict[str, Any]:
    metrics = {
        name.removesuffix(",none"): float(value)
        for name, value in found["results"][task].items()
        if name.endswith(",none") and "_stderr" not in name and isinstance(value, (int, float))
    }
    return {
        "questions": int(found["n-samples"][task]["effective"]),
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
    }
