"""What only an accelerator can show: selection without a host synchronisation, and pruning in half precision."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from cases import NEW, ONE, TWO, Case, answers, generate
from oracle import vispruner_oracle

import vispruner
from vispruner.token_selection import select_vispruner

pytestmark = pytest.mark.gpu


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


def test_a_pruned_model_answers_on_the_device(case: Case) -> None:
    model = vispruner.load(Path(case.repo), visual_token_num=case.budget, device_map="cuda", **case.options).eval()
    inputs = case.inputs(ONE, case.pictures[:1]).to("cuda")
    (full,), (kept,) = case.counts(inputs)
    result = generate(model, inputs, return_dict_in_generate=True, eos_token_id=None)
    assert result.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] - full + kept + NEW - 1
    short = {name: value.cuda() for name, value in case.shortened(case.inputs(ONE, case.pictures[:1])).items()}
    assert torch.equal(answers(model, inputs, eos_token_id=None), answers(model, short, eos_token_id=None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_prunes_by_the_same_count(case: Case, dtype: torch.dtype) -> None:
    model = vispruner.load(case.repo, visual_token_num=case.budget, device_map="cuda", dtype=dtype, **case.options)
    inputs = case.inputs(ONE, case.pictures[:1]).to("cuda", dtype)
    features = model.get_image_features(**{k: inputs[k] for k in ("pixel_values", "image_sizes") if k in inputs})
    assert [len(image) for image in features.pooler_output] == case.counts(inputs)[1]
    assert torch.isfinite(model(**inputs).logits).all()


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


@pytest.mark.parametrize("count", [1, 3])
def test_shortening_waits_for_the_device_no_more_often_than_stock(case: Case, count: int) -> None:
    model = vispruner.load(case.repo, visual_token_num=case.budget, device_map="cuda", **case.options).eval()
    stock = case.stock_class.from_pretrained(case.repo, device_map="cuda").eval()
    inputs = case.inputs([ONE] if count == 1 else [TWO, ONE], case.pictures[:count]).to("cuda")

    def forward(model, inputs):
        with torch.no_grad():
            model(**inputs)

    for run in (forward, lambda model, inputs: generate(model, inputs, eos_token_id=None)):
        assert synchronisations(model, inputs, run) <= synchronisations(stock, inputs, run)


def test_encoded_images_wait_on_the_cpu_for_a_question(case: Case) -> None:
    model = vispruner.load(case.repo, visual_token_num=case.budget, device_map="cuda", **case.options).eval()
    inputs = dict(case.inputs([TWO, ONE], case.pictures).to("cuda"))
    expected = answers(model, inputs, eos_token_id=None)
    pixels = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes") if name in inputs}
    images = model.encode_images(**pixels).to("cpu")
    assert torch.equal(answers(model, inputs, encoded_images=images, eos_token_id=None), expected)


def test_static_cache_and_compiled_decoding(case: Case) -> None:
    model = vispruner.load(case.repo, visual_token_num=case.budget, device_map="cuda", **case.options).eval()
    inputs = case.inputs(ONE, case.pictures[:1]).to("cuda")
    options = {"cache_implementation": "static", "return_dict_in_generate": True, "eos_token_id": None}
    result = generate(model, inputs, **options)
    (full,), (kept,) = case.counts(inputs)
    assert result.past_key_values.layers[0].max_cache_len == inputs["input_ids"].shape[1] - full + kept + NEW - 1
    assert torch.equal(result.sequences, generate(model, inputs, eos_token_id=None))
