"""What pruning costs, in things that can be counted: encoder runs, operations, bytes, and waits for the device."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from counting import HostReads, OperationCounts, PeakBytes
from matrix import LLAVAS, ONE, PACKED_AS_STOCK, SEVERAL, TEXT, generate
from rows.llava_next import tiles_of
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

import vispruner
from vispruner.selectors import SELECTORS, Selector

every_llava = pytest.mark.parametrize("model", LLAVAS, indirect=True)
packed_as_stock = pytest.mark.parametrize("model", [name for name in LLAVAS if name in PACKED_AS_STOCK], indirect=True)


@pytest.fixture
def leading_tokens(monkeypatch):
    """A selector that reads nothing: on a CPU the others check their inputs, which an accelerator does by itself."""

    def select(features, saliency, visual_token_num):
        return torch.arange(visual_token_num, device=saliency.device).expand(len(saliency), -1)

    monkeypatch.setitem(SELECTORS, "leading", Selector(select, frozenset()))


class TestEncoding:
    @every_llava
    @pytest.mark.parametrize("count", [1, 3])
    def test_the_tower_runs_once_for_all_images_and_tiles(self, model, count):
        """...of a forward and of a whole generation, and no layer of it more often than that."""
        inputs = model.prompt(*([ONE] if count == 1 else [SEVERAL, ONE]))
        tiles = [len(image) for image in inputs["pixel_values"]] if "image_sizes" in inputs else [1] * count
        if "image_sizes" in inputs:
            tiles = [1 + math.prod(tiles_of(size)) for size in inputs["image_sizes"].tolist()]
        seen = []
        base = model.pruned.model
        watched = [base.vision_tower, base.vision_layers[0].self_attn]
        hooks = [
            module.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[0]))
            for module in watched
        ]
        try:
            for call in (lambda: model.pruned(**inputs), lambda: generate(model.pruned, inputs)):
                seen.clear()
                with torch.no_grad():
                    call()
                assert seen == [sum(tiles)] * 2
        finally:
            for hook in hooks:
                hook.remove()

    @every_llava
    def test_only_kept_rows_are_projected(self, model):
        inputs = model.prompt(SEVERAL, ONE)
        rows = []
        projector = model.pruned.model.multi_modal_projector
        hook = projector.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
        try:
            features = model.pruned.get_image_features(**model.pixels(inputs))
        finally:
            hook.remove()
        newlines = sum(int((image == -1).sum()) for image in features.kept_indices)
        ((kept,),) = (model.counts(inputs)[1].values(),)
        assert rows == [sum(kept) - newlines]

    @every_llava
    def test_saliency_adds_a_dozen_small_operations_to_the_tower(self, model):
        """One row of one layer's attention: two slices and casts, a product, its softmax and its mean over heads."""
        pixels = model.prompt(ONE)["pixel_values"].flatten(0, -4)
        tower = model.pruned.model.vision_tower
        with torch.no_grad(), OperationCounts() as stock:
            tower(pixels, output_hidden_states=True)
        with torch.no_grad(), OperationCounts() as ours:
            model.pruned.model.encode(pixels, None)
        assert not stock.counts - ours.counts
        extra = ours.counts - stock.counts
        assert extra["bmm"] == extra["_softmax"] == extra["mean"] == 1
        views = {"slice", "select", "transpose", "expand", "view", "_unsafe_view", "reshape", "alias", "unsqueeze"}
        computing = {name: count for name, count in extra.items() if name not in {*views, "promote_types"}}
        assert set(computing) <= {"bmm", "mul_", "_softmax", "mean", "_to_copy", "clone"}
        assert sum(computing.values()) <= 8

    @pytest.mark.core
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

    @pytest.mark.core
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

    def reads(self, model, inputs, run):
        """Those of the pruned and of the stock model."""
        totals = []
        for which in (model.pruned, model.stock):
            which._previous_max_cache_length = -1  # a static cache is as long as that of any earlier prompt
            with torch.no_grad(), HostReads(dict(inputs), list(which.parameters())) as reads:
                run(which)
            totals.append(reads.total)
        return totals

    def generation_reads(self, model, inputs, cache, new=4):
        options = {"cache_implementation": cache, "disable_compile": True, "max_new_tokens": new}
        return self.reads(model, inputs, lambda which: generate(which, inputs, **options))

    @every_llava
    @pytest.mark.parametrize("count", [1, 3])
    def test_a_forward_waits_no_more_often_than_stock(self, model, leading_tokens, count):
        model.pruned.set_vispruner_config(method="leading")
        inputs = model.prompt(*([ONE] if count == 1 else [SEVERAL, ONE]))
        ours, stock = self.reads(model, inputs, lambda which: which(**inputs))
        assert 0 < ours <= stock

    @pytest.mark.core
    @every_llava
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_a_generation_waits_no_more_often_than_stock(self, model, leading_tokens, count, cache):
        """...before the first token as for every later one."""
        model.pruned.set_vispruner_config(method="leading")
        inputs = model.prompt(*([ONE] if count == 1 else [SEVERAL, ONE]))
        for new in (1, 5):
            ours, stock = self.generation_reads(model, inputs, cache, new)
            assert 0 < ours <= stock

    @packed_as_stock
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_original_positions_wait_twice_more_at_most(self, model, leading_tokens, cache):
        """Stock itself looks at position ids that have gaps."""
        model.pruned.set_vispruner_config(method="leading", position_policy="original")
        ours, stock = self.generation_reads(model, model.prompt(ONE), cache)
        assert ours <= stock + 2

    @pytest.mark.core
    @packed_as_stock
    def test_encoded_images_wait_no_more_often(self, model, leading_tokens):
        model.pruned.set_vispruner_config(method="leading")
        inputs = model.prompt(SEVERAL, ONE)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        images = model.pruned.encode_images(**model.pixels(inputs))
        for new in (1, 5):
            _, stock = self.generation_reads(model, inputs, "dynamic", new)
            with torch.no_grad(), HostReads(text, list(images.tokens), list(model.pruned.parameters())) as ours:
                generate(model.pruned, text, encoded_images=images, max_new_tokens=new)
            assert 0 < ours.total <= stock

    @every_llava
    def test_a_later_turn_waits_three_times_more_at_most(self, model, leading_tokens):
        """It looks at its prompt, and where the images end that its cache must hold."""
        model.pruned.set_vispruner_config(method="leading")
        inputs = model.prompt(ONE)
        totals = []
        for which in (model.pruned, model.stock):
            first = generate(which, inputs, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, first.sequences[:, -4:]], dim=1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad(), HostReads(turn, list(which.parameters())) as reads:
                generate(which, turn, past_key_values=first.past_key_values)
            totals.append(reads.total)
        assert totals[0] <= totals[1] + 3

    @every_llava
    def test_text_alone_waits_once_more_in_generate(self, model):
        """To tell it from a prompt whose image was forgotten, which stock would answer without a word."""
        inputs = model.prompt(TEXT)
        ours, stock = self.reads(model, inputs, lambda which: which(**inputs))
        assert ours == stock
        ours, stock = self.reads(model, inputs, lambda which: generate(which, inputs))
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
