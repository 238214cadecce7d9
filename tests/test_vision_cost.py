"""What pruning costs, in things that can be counted: encoder runs, operations, bytes, and waits for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import NONE, ONE, TWO, generate, packed_as_stock
from counting import HostReads, OperationCounts, PeakBytes
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

import vispruner
from vispruner.selectors import SELECTORS, Selector


def pixels_of(inputs):
    return {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}


@pytest.fixture
def leading_tokens(monkeypatch):
    """A selector that reads nothing: on a CPU the others check their inputs, which an accelerator does by itself."""

    def select(features, saliency, visual_token_num):
        return torch.arange(visual_token_num, device=saliency.device).expand(len(saliency), -1)

    monkeypatch.setitem(SELECTORS, "leading", Selector(select, frozenset()))


class TestEncoding:
    @pytest.mark.parametrize("count", [1, 3])
    def test_the_tower_runs_once_for_all_images_and_tiles(self, case, count):
        """...of a forward and of a whole generation, and no layer of it more often than that."""
        inputs = case.inputs([ONE] if count == 1 else [TWO, ONE], case.pictures[:count])
        tiles = [len(image) for image in inputs["pixel_values"]] if "image_sizes" in inputs else [1] * count
        if "image_sizes" in inputs:
            tiles = [case.tiles(size) for size in inputs["image_sizes"]]
        seen = []
        model = case.model.model
        watched = [model.vision_tower, model.vision_layers[0].self_attn]
        hooks = [
            module.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[0]))
            for module in watched
        ]
        try:
            for call in (lambda: case.model(**inputs), lambda: generate(case.model, inputs)):
                seen.clear()
                with torch.no_grad():
                    call()
                assert seen == [sum(tiles)] * 2
        finally:
            for hook in hooks:
                hook.remove()

    def test_only_kept_rows_are_projected(self, case):
        inputs = case.inputs([TWO, ONE], case.pictures)
        rows = []
        projector = case.model.model.multi_modal_projector
        hook = projector.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
        try:
            features = case.model.get_image_features(**pixels_of(inputs))
        finally:
            hook.remove()
        newlines = sum(int((image == -1).sum()) for image in features.kept_indices)
        assert rows == [sum(case.counts(inputs)[1]) - newlines]

    def test_saliency_adds_a_dozen_small_operations_to_the_tower(self, case):
        """One row of one layer's attention: two slices and casts, a product, its softmax and its mean over heads."""
        pixels = case.inputs(ONE, case.pictures[:1])["pixel_values"].flatten(0, -4)
        tower = case.model.model.vision_tower
        with torch.no_grad(), OperationCounts() as stock:
            tower(pixels, output_hidden_states=True)
        with torch.no_grad(), OperationCounts() as ours:
            case.model.model.encode(pixels, None)
        assert not stock.counts - ours.counts
        extra = ours.counts - stock.counts
        assert extra["bmm"] == extra["_softmax"] == extra["mean"] == 1
        views = {"slice", "select", "transpose", "expand", "view", "_unsafe_view", "reshape", "alias", "unsqueeze"}
        computing = {name: count for name, count in extra.items() if name not in {*views, "promote_types"}}
        assert set(computing) <= {"bmm", "mul_", "_softmax", "mean", "_to_copy", "clone"}
        assert sum(computing.values()) <= 8

    @pytest.mark.parametrize("architecture", ["llava", "llava_next"])
    @pytest.mark.parametrize("layers", [-2, [-2, -4]])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_peak_memory_is_at_most_a_twentieth_above_stock(self, architecture, layers, dtype):
        stock, ours = real_geometry(architecture, layers, dtype)
        generator = torch.Generator().manual_seed(0)
        tiles = 1 if architecture == "llava" else 5
        pixels = {"pixel_values": torch.randn(tiles, 3, 336, 336, generator=generator).to(dtype)}
        if architecture == "llava_next":
            pixels = {"pixel_values": pixels["pixel_values"][None], "image_sizes": torch.tensor([[672, 600]])}
        assert peak_bytes(ours, pixels) <= 1.05 * peak_bytes(stock, pixels)

    def test_attention_maps_would_exceed_that(self):
        stock, ours = real_geometry("llava", -2, torch.float32)
        pixels = {"pixel_values": torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))}
        allowed = 1.05 * peak_bytes(stock, pixels)
        ours.model.vision_tower.set_attn_implementation("eager")
        assert peak_bytes(ours, pixels) > allowed


def peak_bytes(model, pixels):
    with torch.no_grad():
        model.get_image_features(**pixels)  # hooks are installed at the first call
        with PeakBytes() as memory:
            features = model.get_image_features(**pixels)
    assert 0 < memory.live < memory.peak and features.pooler_output
    return memory.peak


def real_geometry(architecture, layers, dtype, width=256):
    """A stock and a pruned model with the patches, tokens and proportions of LLaVA on CLIP ViT-L/14-336, but thin."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=4 * width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    pruned = vispruner.ARCHITECTURES[architecture]
    config = pruned.config_class(
        vision_config=vision,
        text_config=text,
        image_token_index=63,
        vision_feature_layer=layers,
        vispruner_config={"visual_token_num": 64},
    )
    stock = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}[architecture]
    return [model_class(copy.deepcopy(config)).to(dtype).eval() for model_class in (stock, pruned.model_class)]


class TestWaitsForTheDevice:
    """Operations whose result the host must read before it can go on; see counting.HostReads."""

    def reads(self, case, inputs, run):
        """Those of the pruned and of the stock model."""
        totals = []
        for model in (case.model, case.stock):
            model._previous_max_cache_length = -1  # a static cache is as long as that of any earlier prompt
            with torch.no_grad(), HostReads(dict(inputs), list(model.parameters())) as reads:
                run(model)
            totals.append(reads.total)
        return totals

    def generation_reads(self, case, inputs, cache, new=4):
        options = {"eos_token_id": None, "cache_implementation": cache, "disable_compile": True, "max_new_tokens": new}
        return self.reads(case, inputs, lambda model: generate(model, inputs, **options))

    @pytest.mark.parametrize("count", [1, 3])
    def test_a_forward_waits_no_more_often_than_stock(self, case, leading_tokens, count):
        case.model.set_vispruner_config(method="leading")
        inputs = case.inputs([ONE] if count == 1 else [TWO, ONE], case.pictures[:count])
        ours, stock = self.reads(case, inputs, lambda model: model(**inputs))
        assert 0 < ours <= stock

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_a_generation_waits_no_more_often_than_stock(self, case, leading_tokens, count, cache):
        """...before the first token as for every later one."""
        case.model.set_vispruner_config(method="leading")
        inputs = case.inputs([ONE] if count == 1 else [TWO, ONE], case.pictures[:count])
        for new in (1, 5):
            ours, stock = self.generation_reads(case, inputs, cache, new)
            assert 0 < ours <= stock

    @packed_as_stock
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_original_positions_wait_twice_more_at_most(self, case, leading_tokens, cache):
        """Stock itself looks at position ids that have gaps."""
        case.model.set_vispruner_config(method="leading", position_policy="original")
        ours, stock = self.generation_reads(case, case.inputs(ONE, case.pictures[:1]), cache)
        assert ours <= stock + 2

    @packed_as_stock
    def test_encoded_images_wait_no_more_often(self, case, leading_tokens):
        case.model.set_vispruner_config(method="leading")
        inputs = dict(case.inputs([TWO, ONE], case.pictures))
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        images = case.model.encode_images(**pixels_of(inputs))
        for new in (1, 5):
            _, stock = self.generation_reads(case, inputs, "dynamic", new)
            with torch.no_grad(), HostReads(text, list(images.tokens), list(case.model.parameters())) as ours:
                generate(case.model, text, encoded_images=images, max_new_tokens=new, eos_token_id=None)
            assert 0 < ours.total <= stock

    def test_a_later_turn_waits_three_times_more_at_most(self, case, leading_tokens):
        """It looks at its prompt, and where the images end that its cache must hold."""
        case.model.set_vispruner_config(method="leading")
        inputs = dict(case.inputs(ONE, case.pictures[:1]))
        totals = []
        for model in (case.model, case.stock):
            first = generate(model, inputs, return_dict_in_generate=True, eos_token_id=None)
            ids = torch.cat([first.sequences, first.sequences[:, -4:]], dim=1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad(), HostReads(turn, list(model.parameters())) as reads:
                generate(model, turn, past_key_values=first.past_key_values, eos_token_id=None)
            totals.append(reads.total)
        assert totals[0] <= totals[1] + 3

    def test_text_alone_waits_once_more_in_generate(self, case):
        """To tell it from a prompt whose image was forgotten, which stock would answer without a word."""
        inputs = case.inputs(NONE)
        ours, stock = self.reads(case, inputs, lambda model: model(**inputs))
        assert ours == stock
        ours, stock = self.reads(case, inputs, lambda model: generate(model, inputs, eos_token_id=None))
        assert ours == stock + 1

    def test_reads_are_seen(self):
        ids = torch.tensor([3, 0, 3])
        with HostReads(ids) as reads:
            mask = ids == 3
            mask.sum().item()
            mask.tolist()
            ids[mask]
            mask.nonzero()
            if mask.any():
                ids.repeat_interleave(ids)
            ids.repeat_interleave(ids, output_size=6)
            torch.tensor([1, 2]).tolist()
        assert reads.total == 6
