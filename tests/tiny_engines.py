"""Tiny checkpoints that vLLM takes, pictures to ask about, and what is asked of an engine's answers."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix import ROWS
from PIL import Image
from rows import draw_weights
from tiny_processors import write_processor

import vispruner
from vispruner.conversion.questions import model_inputs
from vispruner.serving.launch_options import MROPE

QUESTION = "w11 w12 w13 w14"
NEW = 8
CLOSE = 1e-3  # of logits, which are of order 1 to 10; the engines differ by some 1e-6 of them
HEAD = 32  # vLLM on the CPU serves no narrower heads
BUDGETS = [{"visual_token_num": 2}, {"keep_ratio": 0.25}, {"visual_token_num": 3}]
WITH_VIDEOS = ("internvl", "llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")  # which vLLM serves with them
# Whose images see themselves in both directions, which vLLM's attention on the CPU cannot: there answers differ dense
# and pruned; the tokens that the encoder hands over are compared all the same.
ONE_DIRECTION = ("gemma3",)


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write the tiny model of a row with its processor, as wide as vLLM wants it."""
    row, config = ROWS[name], ROWS[name].config()
    text = config.get_text_config()
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 4 * HEAD, 4, 2
    text.max_position_embeddings = 2048
    if hasattr(text, "head_dim"):
        text.head_dim = HEAD
    if name in MROPE:  # their encoders project
        of_tokens = "hidden_size" if name == "qwen2_vl" else "out_hidden_size"
        setattr(config.vision_config, of_tokens, text.hidden_size)
        text.rope_parameters |= {"mrope_section": [8, 4, 4], "mrope_interleaved": name == "qwen3_vl"}
    model = row.stock_class(config)
    draw_weights(model)
    model.save_pretrained(folder)
    write_processor(row, folder)
    if name == "gemma3":  # vLLM looks for line breaks in its vocabulary
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        words = tokenizer["model"]["vocab"]
        for count in range(1, 5):
            words["\n" * count] = words.pop(f"w{70 + count}")
        path.write_text(json.dumps(tokenizer))
    return folder


def overrides_of(name: str) -> dict[str, Any]:
    """Return the --hf-overrides that serve a row's checkpoint pruned."""
    return {
        "architectures": [vispruner.ARCHITECTURES[name].model_class.__name__],
        "vispruner_config": ROWS[name].options,
        "vispruner_serving": {"maximum": {"keep_ratio": 0.9}, "detail": {"low": {"visual_token_num": 2}}},
    }


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(90, 60, 1), picture(60, 120, 2), picture(200, 70, 3), picture(64, 64, 4)]
# Qwen2.5-VL makes of the first one two tokens that are each other's nearest and the farthest from all others: noise
# decides with which of them DivPrune begins.
WITHOUT_A_TIE = PICTURES[1:]

VIDEO = [picture(90, 60, seed) for seed in range(5, 9)]


@dataclass
class Pruned:
    """A checkpoint pruned in transformers, by which what an engine makes of it is judged."""

    name: str
    pruned: Any
    processor: Any

    @contextmanager
    def options(self, **options: Any) -> Iterator[None]:
        before = dict(self.pruned.config.vispruner_config)
        self.pruned.set_vispruner_config(**options)
        try:
            yield
        finally:
            self.pruned.config.vispruner_config = before

    def inputs(self, visual: Any) -> Any:
        """Return what transformers takes to be asked about a picture, a tuple of several, or the frames of a video."""
        if not isinstance(visual, tuple):
            return model_inputs(self.pruned, self.processor, visual, QUESTION)
        content = [*({"type": "image"} for _ in visual), {"type": "text", "text": QUESTION}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.processor(text=prompt, images=list(visual), return_tensors="pt")

    def kept(self, visual: Any, **budget: Any) -> int:
        """Return how many visual tokens stay."""
        with self.options(**budget):
            return sum(map(sum, self.pruned.model.count_visual_tokens(dict(self.inputs(visual)))[1].values()))

    def require_same(self, prompt_tokens: int, answer: Sequence[int], visual: Any, **budget: Any) -> None:
        """The prompt is shorter by what was dropped, and the answer that of transformers, but for near ties."""
        inputs = self.inputs(visual)
        length, greedy = inputs["input_ids"].shape[1], {"do_sample": False, "eos_token_id": None}
        with self.options(**budget):
            full, kept = self.pruned.model.count_visual_tokens(dict(inputs))
            found = self.pruned.generate(
                **inputs, **greedy, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True
            )
        dropped = sum(map(sum, full.values())) - sum(map(sum, kept.values()))
        assert dropped > 0 and prompt_tokens == length - dropped
        if self.name in ONE_DIRECTION:
            return
        for step, (ours, theirs) in enumerate(zip(answer, found.sequences[0, length:].tolist(), strict=True)):
            if ours != theirs:
                logits = found.logits[step][0]
                assert logits[theirs] - logits[ours] < CLOSE, f"the answer {answer} is another from {step} on"
                return  # what follows is about another text


@contextmanager
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have vLLM run its engine in this process, and take it down at the end."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_CACHE_ROOT": str(tmp_path_factory.getbasetemp() / "vllm"),
        }.items():
            patch.setenv(name, value)
        try:
            yield
        finally:
            from vllm.distributed import cleanup_dist_env_and_memory

            gc.collect()
            cleanup_dist_env_and_memory()
