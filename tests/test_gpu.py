"""What only an accelerator can show: selection without a host synchronisation, and pruning in half precision."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from matrix import LLAVAS, NEW, ONE, SEVERAL, Model, answers, attention_of, generate
from oracle import vispruner_oracle

import vispruner
from vispruner.stock_versions import CACHE
from vispruner.token_selection import select_vispruner

pytestmark = pytest.mark.gpu
every_llava = pytest.mark.parametrize("model", LLAVAS, indirect=True)


def on_the_device(model: Model, **options: Any) -> Any:
    attention = attention_of(model.row)
    return vispruner.load(
        model.folder, device_map="cuda", attn_implementation=attention, **model.row.options, **options
    ).eval()


def moved(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: value.to("cuda", dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def counts(model: Model, inputs: dict[str, Any]) -> list[int]:
    return [sum(map(sum, of.values())) for of in model.counts(inputs)]


def test_selection_on_the_device_equals_the_oracle_without_synchronising() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(0, 2, (3, 64, 64), generator=generator).float() * 2 - 1
    saliency = torch.randint(0, 16, (3, 64), generator=generator).float()
    expected = [vispruner_oracle(f.tolist(), s.tolist(), 16, 0.5) for f, s in zip(features, saliency, strict=True)]
    features, saliency = features.cuda(), saliency.cuda()
    select_vispruner(features, saliency, 16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = select_vispruner(features, saliency, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kept.cpu().tolist() == expected


@every_llava
def test_a_pruned_model_answers_on_the_device(model: Model) -> None:
    device, inputs = on_the_device(model), model.prompt(ONE)
    full, kept = counts(model, inputs)
    result = generate(device, moved(inputs), return_dict_in_generate=True)
    assert result[CACHE].get_seq_length() == inputs["input_ids"].shape[1] - full + kept + NEW - 1
    assert torch.equal(answers(device, moved(inputs)), answers(device, moved(model.shortened(inputs))))


@every_llava
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_prunes_by_the_same_count(model: Model, dtype: torch.dtype) -> None:
    device, inputs = on_the_device(model, dtype=dtype), model.prompt(ONE)
    features = device.get_image_features(**moved(model.pixels(inputs), dtype))
    assert sum(map(len, features.pooler_output)) == counts(model, inputs)[1]
    assert torch.isfinite(device(**moved(inputs, dtype)).logits).all()


def synchronisations(model, inputs, run):
    """How often `run` waits for the device."""
    run(model, inputs)  # what is done once only
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(model, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@every_llava
@pytest.mark.parametrize("count", [1, 3])
def test_shortening_waits_for_the_device_no_more_often_than_stock(model: Model, count: int) -> None:
    device = on_the_device(model)
    stock = model.row.stock_class.from_pretrained(model.folder, device_map="cuda").eval()
    inputs = moved(model.prompt(*([ONE] if count == 1 else [SEVERAL, ONE])))

    def forward(model, inputs):
        with torch.no_grad():
            model(**inputs)

    for run in (forward, generate):
        assert synchronisations(device, inputs, run) <= synchronisations(stock, inputs, run)


@every_llava
def test_encoded_images_wait_on_the_cpu_for_a_question(model: Model) -> None:
    device, inputs = on_the_device(model), moved(model.prompt(SEVERAL, ONE))
    expected = answers(device, inputs)
    pixels = {name: inputs.pop(name) for name in model.pixels(inputs)}
    images = device.encode_images(**pixels).to("cpu")
    assert torch.equal(answers(device, inputs, encoded_images=images), expected)


@every_llava
def test_static_cache_and_compiled_decoding(model: Model) -> None:
    device, inputs = on_the_device(model), model.prompt(ONE)
    result = generate(device, moved(inputs), cache_implementation="static", return_dict_in_generate=True)
    full, kept = counts(model, inputs)
    assert result[CACHE].layers[0].max_cache_len == inputs["input_ids"].shape[1] - full + kept + NEW - 1
    assert torch.equal(result.sequences, generate(device, moved(inputs)))
