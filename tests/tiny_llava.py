"""Write tiny random LLaVA checkpoints in the stock Hugging Face format: the fixtures of the tests.

The weights are drawn per tensor from the seed and the tensor's name, so every version of transformers writes the same
ones. They are scaled so that attention is uneven and logits depend on the image; the answers mean nothing.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vispruner import conversion

TextModel = Literal["llama", "mistral"]

PATCH_SIZE = 14
HIDDEN_SIZE = 64
VOCAB_SIZE = 512

CHAT_TEMPLATE = (Path(conversion.__file__).parent / "assets" / "tiny-llava" / "chat_template.jinja").read_text()

# Enough English for the merges to be pieces of words, so that a random answer is at least printable.
CORPUS = (
    "USER: What is in this picture? ASSISTANT: The picture shows a cat that looks at the camera.",
    "USER: What color is the animal? ASSISTANT: It is orange and white, with green eyes and long whiskers.",
    "USER: Where is it? ASSISTANT: It sits on a soft blanket near the window, in the light of the morning.",
    "USER: How many people are there? ASSISTANT: There are two people, a woman in an orange suit and a man in black.",
    "USER: Describe the scene. ASSISTANT: A small brown dog runs along the beach while the children play with a ball.",
    "USER: Is it day or night? ASSISTANT: It is day; the sky is clear and the sun stands high over the mountains.",
    "USER: What does the sign say? ASSISTANT: The red sign on the left side of the street says stop.",
    "USER: What is on the table? ASSISTANT: A plate of fresh fruit, a cup of coffee, a knife and an open book.",
)


def write_tiny_llava(
    folder: str | Path, *, seed: int = 0, image_size: int = 336, text_model: TextModel = "llama"
) -> Path:
    """Write a stock LLaVA-1.5 checkpoint with random weights; one image is `(image_size // 14) ** 2` visual tokens."""
    folder = _empty_folder(folder)
    tokenizer = _tokenizer()
    config = LlavaConfig(
        vision_config=_vision_config(image_size),
        text_config=_text_config(text_model),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // PATCH_SIZE) ** 2,
        pad_token_id=tokenizer.pad_token_id,
    )
    from transformers import CLIPImageProcessor  # on import it warns when torchvision is missing

    image_processor = CLIPImageProcessor(**_image_size_settings(image_size))
    processor = LlavaProcessor(image_processor, tokenizer, **_processor_settings())
    return _save(LlavaForConditionalGeneration(config), processor, folder, seed)


def write_tiny_llava_next(
    folder: str | Path, *, seed: int = 0, image_size: int = 336, text_model: TextModel = "llama"
) -> Path:
    """Write a stock LLaVA-NeXT checkpoint with random weights; one tile is `(image_size // 14) ** 2` visual tokens."""
    folder = _empty_folder(folder)
    tokenizer = _tokenizer()
    s = image_size
    pinpoints = [[s, 2 * s], [2 * s, s], [2 * s, 2 * s], [3 * s, s], [s, 3 * s]]
    config = LlavaNextConfig(
        vision_config=_vision_config(image_size),
        text_config=_text_config(text_model),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // PATCH_SIZE) ** 2,
        image_grid_pinpoints=pinpoints,
        pad_token_id=tokenizer.pad_token_id,
    )
    from transformers import LlavaNextImageProcessor  # on import it warns when torchvision is missing

    image_processor = LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **_image_size_settings(image_size))
    processor = LlavaNextProcessor(image_processor, tokenizer, **_processor_settings())
    return _save(LlavaNextForConditionalGeneration(config), processor, folder, seed)


def _empty_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a new folder for the tiny checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _vision_config(image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        projection_dim=HIDDEN_SIZE,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=PATCH_SIZE,
    )


def _text_config(text_model: TextModel) -> LlamaConfig | MistralConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
    }
    if text_model == "llama":
        return LlamaConfig(num_key_value_heads=4, **settings)
    if text_model == "mistral":
        return MistralConfig(num_key_value_heads=2, sliding_window=None, **settings)
    raise ValueError(f'text_model must be "llama" or "mistral", got {text_model!r}')


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2,  # <image> and <pad> come last, as in the real checkpoints
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def _image_size_settings(image_size: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}


def _processor_settings() -> dict[str, Any]:
    return {
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }


def _save(model: PreTrainedModel, processor: LlavaProcessor | LlavaNextProcessor, folder: Path, seed: int) -> Path:
    tokenizer = processor.tokenizer
    _draw_weights(model, _unspeakable_ids(tokenizer), seed)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _unspeakable_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids a random model had better not answer with: special tokens, control characters, pieces of UTF-8."""
    texts = {index: tokenizer.decode([index]) for index in range(len(tokenizer))}
    broken = [index for index, text in texts.items() if not text.isprintable() or "\ufffd" in text]
    return sorted({*tokenizer.all_special_ids, *broken})


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, silent_ids: list[int], seed: int) -> None:
    for name, parameter in model.named_parameters():
        # The CLIP tower lost a level of nesting between versions of transformers; the draw must not depend on it.
        key = name.removeprefix("model.").replace("vision_model.", "")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            is_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(1.0 + 0.1 * noise if is_scale else 0.1 * noise)
        elif "position_embedding" in name:
            parameter.copy_(0.3 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(noise)
        else:
            spread = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.copy_(spread * noise * parameter[0].numel() ** -0.5)
    model.get_output_embeddings().weight[silent_ids] = 0.0
