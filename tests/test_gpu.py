"""What only an accelerator can show: selection without a host synchronisation, and pruning in half precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import NEW, ONE, Case, answers, generate
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
