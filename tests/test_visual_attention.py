"""Saliency without attention maps: right for every attention function; outside a tap the tower is the user's own."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from counting import PeakBytes
from rows.llava import ROW
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.clip.modeling_clip import CLIPAttention, eager_attention_forward

import vispruner
from vispruner import cpu_workarounds, visual_attention
from vispruner.cpu_workarounds import FAST_ROWS, SLOW_ROWS
from vispruner.selectors import SELECTORS
from vispruner.visual_attention import (
    SALIENCY_KINDS,
    Reading,
    SaliencyTap,
    cls_saliency,
    make_tappable,
    received_attention,
    received_attention_of_patches,
    run_tower,
)

HEADS, LAYERS, N = 4, 4, 64  # of the tiny tower; N patches beside the [CLS] token
KEPT = 12


def images(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 112, 112, generator=torch.Generator().manual_seed(seed))


def tower_with(attention: str, text: str = "sdpa") -> dict[str, str]:
    return {"vision_config": attention, "text_config": text}


@pytest.fixture(scope="module")
def stock(tiny_llava_repo: Path) -> LlavaForConditionalGeneration:
    """The stock model with eager attention: the only stock way to see attention maps."""
    return LlavaForConditionalGeneration.from_pretrained(tiny_llava_repo, attn_implementation="eager")


@pytest.fixture(scope="module")
def model(tiny_llava_repo: Path) -> Any:
    return vispruner.load(tiny_llava_repo, visual_token_num=KEPT)


@torch.no_grad()
def eager_saliency(stock: LlavaForConditionalGeneration, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Read the definition off full attention maps: [CLS] row, mean over heads, [CLS] column cut off: (B, N)."""
    attentions = stock.model.vision_tower(pixels, output_attentions=True).attentions  # each (B, H, 1+N, 1+N)
    assert len(attentions) == LAYERS and attentions[0].shape[1:] == (HEADS, 1 + N, 1 + N)
    return attentions[layer][:, :, 0, 1:].mean(1)


@torch.no_grad()
def saliency(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model.get_image_features(pixels).saliency


def layers_of(tower: nn.Module) -> nn.ModuleList:
    return getattr(tower, "vision_model", tower).encoder.layers


def tap_of(tower: nn.Module, layer: int) -> SaliencyTap:
    return SaliencyTap([layer.self_attn for layer in layers_of(tower)], Reading(layer, "cls"))


def require_nothing_recorded(tap: SaliencyTap) -> None:
    with pytest.raises(RuntimeError, match="no attention was recorded"):
        _ = tap.saliency


def tapped_saliency(tower: nn.Module, layer: int, code: Any = visual_attention) -> torch.Tensor:
    with code.SaliencyTap([layer.self_attn for layer in layers_of(tower)], code.Reading(layer, "cls")) as tap:
        tower(images())
    return tap.saliency


def attention_seen(model: Any) -> set[str]:
    return {layer.self_attn.config._attn_implementation for layer in layers_of(model.model.vision_tower)}


@contextlib.contextmanager
def registered(name: str, function: Callable) -> Iterator[str]:
    """Register an attention function as a user does, and take it back."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        yield name
    finally:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


class OwnAttention:
    """A user's attention function; as flash does, it looks up its own name in the module's config."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        self.names.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)


# The largest difference seen is 4e-8: q.k is summed over one row instead of all rows.
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.mark.parametrize("attention", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.core)])
def test_saliency_equals_the_eager_cls_row(tiny_llava_repo: Path, stock: Any, attention: str) -> None:
    model = vispruner.load(tiny_llava_repo, visual_token_num=KEPT, attn_implementation=tower_with(attention))
    assert attention_seen(model) == {attention}
    torch.testing.assert_close(saliency(model, images()), eager_saliency(stock, images(), LAYERS - 2), **CLOSE)


def test_saliency_with_a_registered_attention_function(tiny_llava_repo: Path, stock: Any) -> None:
    own = OwnAttention()
    with registered("users_own", own):
        model = vispruner.load(tiny_llava_repo, visual_token_num=KEPT, attn_implementation=tower_with("users_own"))
        found = saliency(model, images())
    torch.testing.assert_close(found, eager_saliency(stock, images(), LAYERS - 2), **CLOSE)
    assert own.names == ["users_own"] * LAYERS


@pytest.mark.parametrize("attention", ["eager", "users_own", "sdpa"])
def test_the_attention_of_a_loaded_model_can_be_changed(model: Any, stock: Any, attention: str) -> None:
    own = OwnAttention()
    changed = copy.deepcopy(model)
    with registered("users_own", own):
        changed.set_attn_implementation(tower_with(attention))
        assert attention_seen(changed) == {attention}
        found = saliency(changed, images())
    torch.testing.assert_close(found, eager_saliency(stock, images(), LAYERS - 2), **CLOSE)
    assert own.names == (["users_own"] * LAYERS if attention == "users_own" else [])


@pytest.mark.parametrize(
    ("feature_layer", "producer"),
    [
        (-2, LAYERS - 2),
        (-1, LAYERS - 1),
        (1, 0),
        (2, 1),
        (LAYERS, LAYERS - 1),
        ([-2], LAYERS - 2),
        ([1, 3], 2),
        ([-1, 2], 3),
    ],
)
def test_the_default_is_the_layer_that_produces_the_features(
    model: Any, stock: Any, feature_layer: int | list[int], producer: int
) -> None:
    changed = copy.deepcopy(model).model
    changed.config.vision_feature_layer = feature_layer
    with torch.no_grad():
        tokens = changed.encode(images(), None)[1]
        hidden = stock.model.vision_tower(images(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(tokens.saliency, eager_saliency(stock, images(), producer), **CLOSE)
    layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    # Activations are of order 1; eager and SDPA add in different orders.
    torch.testing.assert_close(tokens.features, torch.cat([hidden[i][:, 1:] for i in layers], -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 3, -1, -4])
def test_attention_layer_names_another_layer(model: Any, stock: Any, layer: int) -> None:
    changed = copy.deepcopy(model)
    changed.set_vispruner_config(attention_layer=layer)
    torch.testing.assert_close(saliency(changed, images()), eager_saliency(stock, images(), layer), **CLOSE)
    assert not torch.allclose(saliency(changed, images()), saliency(model, images()), atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Note the most elements that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [item for item in torch.utils._pytree.tree_leaves(result) if isinstance(item, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


@pytest.mark.parametrize(("attention", "allocates_maps"), [("sdpa", False), ("eager", True)])
def test_no_attention_map_is_allocated_unless_the_user_chose_eager(
    tiny_llava_repo: Path, attention: str, allocates_maps: bool
) -> None:
    model = vispruner.load(tiny_llava_repo, visual_token_num=KEPT, attn_implementation=tower_with(attention))
    pixels = images()
    with torch.no_grad(), LargestTensor() as largest:
        model.get_image_features(pixels)
    assert largest.elements > 0
    assert (largest.elements >= len(pixels) * HEADS * N * N) == allocates_maps


def test_outside_a_tap_the_tower_is_stock(model: Any, tiny_llava_repo: Path) -> None:
    stock = LlavaForConditionalGeneration.from_pretrained(tiny_llava_repo)
    with torch.no_grad():
        ours = model.model.vision_tower(images(), output_hidden_states=True)
        theirs = stock.model.vision_tower(images(), output_hidden_states=True)
    for own, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(own, other)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert attention_seen(model) == {"sdpa"}


def test_a_tap_leaves_the_towers_output_alone(model: Any) -> None:
    tower = model.model.vision_tower
    with torch.no_grad():
        untapped = tower(images()).last_hidden_state
        with tap_of(tower, 2) as tap:
            tapped = tower(images()).last_hidden_state
            assert attention_seen(model) != {"sdpa"}
    assert tap.saliency.shape == (2, N) and torch.equal(tapped, untapped)
    assert attention_seen(model) == {"sdpa"}


@pytest.mark.parametrize("broken", [0, 2, 3])
def test_an_error_inside_the_tower_closes_the_tap(model: Any, broken: int) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("broken layer")

    before = saliency(model, images())
    hook = layers_of(model.model.vision_tower)[broken].self_attn.out_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        model.get_image_features(images())
    hook.remove()
    assert attention_seen(model) == {"sdpa"}
    assert torch.equal(saliency(model, images()), before)


def test_an_error_inside_the_users_attention_closes_the_tap(tiny_llava_repo: Path) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken kernel")

    with registered("broken", fail):
        model = vispruner.load(tiny_llava_repo, visual_token_num=KEPT, attn_implementation=tower_with("broken"))
        with pytest.raises(RuntimeError, match="broken kernel"):
            model.get_image_features(images())
        assert attention_seen(model) == {"broken"}


def test_a_tower_that_ignores_its_config_is_an_error(model: Any) -> None:
    broken = copy.deepcopy(model)
    attention = layers_of(broken.model.vision_tower)[LAYERS - 2].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(RuntimeError, match=f"no attention was recorded in layer {LAYERS - 2}: the encoder"):
        broken.get_image_features(images())


def test_taps_nest(model: Any, stock: Any) -> None:
    tower, pixels = model.model.vision_tower, images()
    with torch.no_grad(), tap_of(tower, 0) as outer:
        with tap_of(tower, 3) as inner:
            tower(pixels)
        require_nothing_recorded(outer)
        tower(pixels)
    torch.testing.assert_close(outer.saliency, eager_saliency(stock, pixels, 0), **CLOSE)
    torch.testing.assert_close(inner.saliency, eager_saliency(stock, pixels, 3), **CLOSE)


def test_two_threads_encode_different_images_at_once(tiny_llava_repo: Path) -> None:
    together = threading.Barrier(2, timeout=600)
    names = []

    def meet(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names.append(module.config._attn_implementation)
        if threading.current_thread() is not threading.main_thread():
            together.wait()  # both threads are inside the tower, with their taps open
        return sdpa_attention_forward(module, *args, **kwargs)

    with registered("meet", meet):
        model = vispruner.load(tiny_llava_repo, visual_token_num=KEPT, attn_implementation=tower_with("meet"))
        alone = [model.get_image_features(images(seed=seed)) for seed in (1, 2)]
        found: dict[int, Any] = {}

        def encode(seed: int) -> None:
            found[seed] = model.get_image_features(images(seed=seed))

        threads = [threading.Thread(target=encode, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed, expected in zip((1, 2), alone, strict=True):
        assert torch.equal(found[seed].saliency, expected.saliency)
        assert torch.equal(torch.stack(found[seed].kept_indices), torch.stack(expected.kept_indices))
    assert not torch.equal(alone[0].saliency, alone[1].saliency)
    assert set(names) == {"meet"}


def test_an_open_tap_is_not_seen_by_other_threads(model: Any) -> None:
    seen, output = [], []

    def run_stock() -> None:
        seen.append(attention_seen(model))
        output.append(model.model.vision_tower(images()).last_hidden_state)

    with torch.no_grad():
        expected = model.model.vision_tower(images()).last_hidden_state
    with tap_of(model.model.vision_tower, 0) as tap:
        thread = threading.Thread(target=run_stock)
        thread.start()
        thread.join()
    assert seen == [{"sdpa"}]
    require_nothing_recorded(tap)
    assert torch.equal(output[0], expected)


def test_two_copies_of_the_code_live_side_by_side(
    model: Any, tiny_llava_repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every Hub repo brings its own copy of the file; a model goes on pruning after another repo was loaded."""
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    before = saliency(model, images())
    spec = importlib.util.spec_from_file_location("vispruner.copied_attention", visual_attention.__file__)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    tower = LlavaForConditionalGeneration.from_pretrained(tiny_llava_repo).model.vision_tower
    copied.make_tappable([layer.self_attn for layer in layers_of(tower)])
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(tapped_saliency(tower, LAYERS - 2, copied), before)
        assert torch.equal(saliency(model, images()), before)


class FusedAttention(CLIPAttention):
    """[CLS] attention with one q/k/v projection, as serving engines rewrite it."""

    def __init__(self, separate: CLIPAttention) -> None:
        super().__init__(separate.config)
        projections = [separate.q_proj, separate.k_proj, separate.v_proj]
        del self.q_proj, self.k_proj, self.v_proj
        self.qkv = nn.Linear(self.embed_dim, 3 * self.embed_dim)
        self.qkv.weight.data = torch.cat([projection.weight.data for projection in projections])
        self.qkv.bias.data = torch.cat([projection.bias.data for projection in projections])
        self.out_proj = separate.out_proj

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> tuple:
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.qkv(hidden_states).chunk(3, dim=-1))
        attention = AttentionInterface().get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attention(self, q, k, v, attention_mask, scaling=self.scale, **kwargs)
        return self.out_proj(out.reshape(*hidden_states.shape)), weights


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fused_projections_are_tapped(tiny_llava_repo: Path, stock: Any, attention: str) -> None:
    load = LlavaForConditionalGeneration.from_pretrained
    tower = load(tiny_llava_repo, attn_implementation=tower_with(attention)).model.vision_tower
    for layer in layers_of(tower):
        layer.self_attn = FusedAttention(layer.self_attn)
    make_tappable([layer.self_attn for layer in layers_of(tower)])
    with torch.no_grad():
        found = tapped_saliency(tower, LAYERS - 2)
    torch.testing.assert_close(found, eager_saliency(stock, images(), LAYERS - 2), **CLOSE)


def test_modules_that_cannot_be_tapped_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="Linear has no config that names its attention function"):
        make_tappable([nn.Linear(2, 2)])
    module = nn.Linear(2, 2)
    module.config = model.config.vision_config
    with pytest.raises(ValueError, match="no eager_attention_forward beside Linear"):
        make_tappable([module])


@pytest.mark.core
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_get_image_features_compiles_in_one_graph(model: Any, backend: str) -> None:
    # transformers installs the hooks that collect hidden states on a first call, which no compiler can trace.
    expected = model.get_image_features(images())
    torch._dynamo.reset()
    compiled = torch.compile(model.get_image_features, fullgraph=True, backend=backend)
    with torch.no_grad():
        found = compiled(images())
    assert torch.equal(torch.stack(found.kept_indices), torch.stack(expected.kept_indices))
    # Fusion changes the order of additions.
    torch.testing.assert_close(found.saliency, expected.saliency, **CLOSE)
    torch.testing.assert_close(
        torch.stack(list(found.pooler_output)), torch.stack(list(expected.pooler_output)), rtol=0, atol=1e-4
    )
    assert not torch.equal(torch.stack(compiled(images(seed=9)).kept_indices), torch.stack(found.kept_indices))


@pytest.fixture(scope="module")
def one_large_picture() -> tuple[LlavaForConditionalGeneration, Any, torch.Tensor]:
    """A stock model and ours with its weights, and a picture whose 577 tokens get a few more in ours."""
    config = ROW.config()
    config.vision_config.image_size = 336
    torch.manual_seed(0)
    stock = LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()
    ours = vispruner.VisPrunerLlavaForConditionalGeneration(
        vispruner.VisPrunerLlavaConfig(**config.to_dict(), vispruner_config={"visual_token_num": 64})
    )
    ours.load_state_dict(stock.state_dict())
    return stock, ours.to(torch.bfloat16).eval(), torch.randn(1, 3, 336, 336, dtype=torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_appended_tokens_change_nothing(
    one_large_picture: tuple, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, ours, picture = one_large_picture
    for model in (stock, ours):
        model.set_attn_implementation({"vision_config": attention})
    asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    expected = stock.model.vision_tower(picture, **asked)
    # Whatever attended to these would be no number either.
    monkeypatch.setattr(cpu_workarounds.F, "pad", functools.partial(torch.nn.functional.pad, value=torch.nan))
    with rows_in(ours) as rows:
        found, tokens = ours.model.encode(picture, None, **asked)
    assert rows == {FAST_ROWS}
    same = functools.partial(torch.testing.assert_close, rtol=0.02, atol=0.02)
    same(found.hidden_states, expected.hidden_states)
    same(found.last_hidden_state, expected.last_hidden_state)
    same(found.pooler_output, expected.pooler_output)
    same(tokens.features, expected.hidden_states[-2][:, 1:])
    assert tokens.saliency.isfinite().all()
    if attention == "eager":
        same(found.attentions, expected.attentions)
        torch.testing.assert_close(
            tokens.saliency, expected.attentions[1][:, :, 0, 1:].float().mean(1), rtol=0.02, atol=0
        )


@torch.no_grad()
def test_tokens_are_appended_only_where_it_pays(one_large_picture: tuple) -> None:
    _, ours, picture = one_large_picture
    with rows_in(ours) as rows:
        ours.model.encode(picture.expand(2, -1, -1, -1), None)
        ours.model.vision_tower(picture)
        with torch.enable_grad():
            ours.model.encode(picture, None)
        ours.float().model.encode(picture, None)
    ours.bfloat16()
    assert rows == {SLOW_ROWS}


@contextlib.contextmanager
def rows_in(model: Any) -> Iterator[set[int]]:
    """Collect how many rows per picture a layer of the tower multiplies."""
    rows: set[int] = set()
    linear = layers_of(model.model.vision_tower)[0].mlp.fc1
    hook = linear.register_forward_hook(lambda module, arguments, result: rows.add(result.shape[-2]))
    yield rows
    hook.remove()


@torch.no_grad()
def test_appended_tokens_are_not_asked(one_large_picture: tuple) -> None:
    """HiPrune averages over all queries: as many of them as stock's eager attention has."""
    stock, ours, picture = (copy.deepcopy(each) for each in one_large_picture)
    stock.set_attn_implementation({"vision_config": "eager"})
    ours.set_vispruner_config(method="hiprune")
    _, tokens = ours.model.encode(picture, None)
    layers = SELECTORS["hiprune"].saliency_layers(3, 1)
    maps = stock.model.vision_tower(picture, output_attentions=True).attentions
    expected = torch.stack([maps[layer].float().mean((1, 2))[:, 1:] for layer in layers], dim=1)
    torch.testing.assert_close(tokens.layer_saliency, expected, rtol=0.02, atol=0)


@pytest.mark.core
def test_layers_compiled_one_by_one_are_told_apart(model: Any, stock: Any) -> None:
    """Equal layers share one graph, and still only one of them is the layer that attention is read from."""
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    for layer in layers_of(compiled.model.vision_tower):
        layer.compile(backend="eager")
    for layer in (1, 2):
        compiled.set_vispruner_config(attention_layer=layer)
        torch.testing.assert_close(saliency(compiled, images()), eager_saliency(stock, images(), layer), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_run_in_fp32(tiny_llava_repo: Path, dtype: torch.dtype) -> None:
    model = vispruner.load(tiny_llava_repo, visual_token_num=KEPT, dtype=dtype)
    attention = layers_of(model.model.vision_tower)[LAYERS - 2].self_attn
    projected: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(
            lambda module, args, output, name=name: projected.__setitem__(name, output)
        )
    found = saliency(model, images().to(dtype))
    q, k = (projected[name].view(2, 1 + N, HEADS, -1).transpose(1, 2) for name in ("q_proj", "k_proj"))
    assert q.dtype == dtype and found.dtype == torch.float32

    def by_hand(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:].mean(1).float()

    torch.testing.assert_close(found, by_hand(q.float(), k.float()), **CLOSE)
    assert (by_hand(q, k) - found).abs().max() > 1e-5  # what rounding the logits would have cost


def test_autocast_does_not_round_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, HEADS, 1 + N, 16, generator=generator) for _ in "qk")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = cls_saliency(q, k)
    assert torch.equal(under_autocast, cls_saliency(q, k))


def test_fp64_stays_fp64() -> None:
    q = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    assert cls_saliency(q, q).dtype == torch.float64


def test_saliency_is_not_renormalised_after_cls_is_cut_off(model: Any) -> None:
    total = saliency(model, images()).sum(-1)
    assert ((total > 0) & (total < 1 - 1e-3)).all()


def tower_gradients(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    features = model.get_image_features(pixels)
    assert not features.saliency.requires_grad
    torch.stack(list(features.pooler_output)).pow(2).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.model.vision_tower.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_reach_the_tower_with_and_without_checkpointing(model: Any, use_reentrant: bool) -> None:
    trained = copy.deepcopy(model).train()
    pixels = images().requires_grad_()
    plain = tower_gradients(trained, pixels)
    # The last layer and what follows it do not feed the features.
    for index in range(LAYERS - 1):
        assert any(f"layers.{index}.self_attn.q_proj.weight" in name and grad.any() for name, grad in plain.items())
    calls = []
    layers_of(trained.model.vision_tower)[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    trained.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = tower_gradients(trained, pixels)
    assert len(calls) == 2  # forward, and again in backward: by then the tap is closed
    assert checkpointed.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.core
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_a_copy_prunes_alike_and_is_independent(tiny_llava_repo: Path, clone: Callable) -> None:
    original = vispruner.load(tiny_llava_repo, visual_token_num=KEPT)
    copied = clone(original)  # pickle only before a first image: then transformers adds hooks that it cannot pickle
    expected = original.get_image_features(images())
    copied.set_attn_implementation(tower_with("eager"))
    copied.set_vispruner_config(visual_token_num=3)
    with torch.no_grad():
        copied.model.multi_modal_projector.linear_1.weight.zero_()
    assert (attention_seen(copied), attention_seen(original)) == ({"eager"}, {"sdpa"})
    again = original.get_image_features(images())
    assert torch.equal(again.saliency, expected.saliency)
    assert torch.equal(torch.stack(again.pooler_output), torch.stack(expected.pooler_output))
    changed = copied.get_image_features(images())
    torch.testing.assert_close(changed.saliency, expected.saliency, **CLOSE)
    assert [len(kept) for kept in changed.kept_indices] == [3, 3]


def test_quantized_linears_are_tapped(tiny_llava_repo: Path) -> None:
    from torchao import quantization

    settings = {"attn_implementation": "eager"}
    stock = LlavaForConditionalGeneration.from_pretrained(tiny_llava_repo, **settings)
    model = vispruner.load(tiny_llava_repo, visual_token_num=KEPT)
    exact = saliency(model, images())
    for each in (stock, model):
        quantization.quantize_(each.model.vision_tower, quantization.Int8WeightOnlyConfig())
    found = saliency(model, images())
    # int8 products are added in another order for one row than for all.
    torch.testing.assert_close(found, eager_saliency(stock, images(), LAYERS - 2), rtol=0, atol=1e-5)
    assert (found - exact).abs().max() > 1e-5  # the tower really is quantized


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_towers_give_the_same(model: Any, tmp_path: Path, where: str) -> None:
    offloaded = copy.deepcopy(model)
    if where == "cpu":
        accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(offloaded, tmp_path, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in offloaded.model.vision_tower.parameters()} == {"meta"}
    with torch.no_grad():
        expected, found = model.get_image_features(images()), offloaded.get_image_features(images())
    assert torch.equal(found.saliency, expected.saliency)
    assert torch.equal(torch.stack(list(found.pooler_output)), torch.stack(list(expected.pooler_output)))


@pytest.mark.parametrize("tokens", [7, 16, 53])
def test_padding_gets_no_attention_and_does_not_ask(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """What the other tokens get is what they get where there is no padding, with few queries at a time too."""
    monkeypatch.setattr(visual_attention, "ATTENTION_IN_CACHE", 1)  # 16 queries of one head, the fewest
    q, k = (torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    seen = torch.ones(2, tokens, dtype=torch.bool)
    seen[0, tokens // 2 :] = False
    seen[1, ::3] = False
    received, by_cls = received_attention(q, k, seen=seen), cls_saliency(q, k, seen=seen)
    assert (received[~seen] == 0).all() and (by_cls[~seen[:, 1:]] == 0).all()
    for image in range(2):
        real_q, real_k = (rows[image : image + 1, :, seen[image]] for rows in (q, k))
        torch.testing.assert_close(received[image, seen[image]], received_attention(real_q, real_k)[0])
    first_q, first_k = (rows[:1, :, : tokens // 2] for rows in (q, k))
    torch.testing.assert_close(by_cls[0, : tokens // 2 - 1], cls_saliency(first_q, first_k)[0])
    torch.testing.assert_close(received_attention(q, k, seen=torch.ones_like(seen)), received_attention(q, k))


@pytest.mark.parametrize("at_once", [1, 500, 2000, 10**9])
@pytest.mark.parametrize("padded", [False, True])
def test_received_attention_is_the_mean_over_heads_and_queries_however_little_is_held(
    monkeypatch: pytest.MonkeyPatch, at_once: int, padded: bool
) -> None:
    monkeypatch.setattr(visual_attention, "ATTENTION_IN_CACHE", at_once)
    q, k = (torch.randn(2, 5, 37, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    seen = torch.ones(2, 37, dtype=torch.bool)
    seen[1, 30:] = not padded
    logits = (q.double() @ k.double().mT / 8**0.5).masked_fill(~seen[:, None, None], float("-inf"))
    attention = logits.softmax(-1).mean(dim=1)
    expected = torch.stack([attention[image, seen[image]].mean(dim=0) for image in range(2)])
    found = received_attention(q, k, seen=seen if padded else None)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-7)  # float32 against float64


def test_patches_are_asked_about_by_cls_too() -> None:
    """The mean is over all 1+N queries. Here [CLS] alone ranks: the patches ask about all alike."""
    q, k = (torch.randn(2, 3, 1 + 9, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    q[:, :, 1:] = 0
    attention = (q.double() @ k.double().mT / 8**0.5).softmax(-1)
    expected = attention.mean(dim=(1, 2))[:, 1:]
    found = received_attention_of_patches(q, k)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-7)  # float32 against float64
    assert torch.equal(found.argsort(dim=-1), cls_saliency(q, k).argsort(dim=-1))


class ProductsOf(TorchDispatchMode):
    """While active, count the multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten.bmm.default:
            self.count += args[0].shape.numel() * args[1].shape[-1]
        return operation(*args, **(kwargs or {}))


@pytest.mark.core
def test_attention_of_eight_megapixels_takes_half_of_a_layers_products_and_a_stated_memory() -> None:
    """40,000 patches in Qwen2.5-VL's encoder. A layer's attention multiplies twice as much: by the values, too."""
    heads, patches, width = 16, 40_000, 80
    q, k = (torch.empty(1, heads, patches, width, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with ProductsOf() as products, PeakBytes() as memory:
        assert received_attention(q, k).shape == (1, patches)
    assert products.count == heads * patches**2 * width
    key_of_a_head = patches * width * 4
    assert memory.peak <= 2 * visual_attention.ATTENTION_AT_ONCE * 4 + 3 * key_of_a_head
    assert memory.peak < heads * patches**2 * 4 / 300


def test_chunks_of_one_size_are_read_together_as_many_as_may_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed sequence of nine images: seven of 5 tokens, then two of 3; three of the first may be held at a time."""
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randn(2, 1, 2, size, 4, generator=generator) for size in [5] * 7 + [3] * 2]
    together: list[int] = []

    def read(query: torch.Tensor, *more: Any) -> torch.Tensor:
        together.append(len(query))
        return received_attention(query, *more)

    monkeypatch.setitem(visual_attention.SALIENCY_KINDS, "received", read)
    monkeypatch.setattr(visual_attention, "ATTENTION_IN_CACHE", 3 * 2 * 5**2)
    reading = Reading(0, "received")
    tap = SaliencyTap([SimpleNamespace(config=SimpleNamespace(place=0))], reading, packed=True)
    for query, key in chunks:
        tap.record(0, query, key, 0.7)
        tap.record(1, key, query, 0.7)  # another layer, which is not asked about
    alone = torch.cat([received_attention(query, key, 0.7) for query, key in chunks], dim=1)
    torch.testing.assert_close(tap.saliency, alone)
    assert together == [3, 3, 1, 2] and tap.layer_saliency is None


def test_nothing_is_appended_once_the_tower_has_run(model: Any) -> None:
    pixels = torch.zeros(1, 3, 112, 112)
    with model.model.open_tap() as tap:
        run_tower(model.model.vision_tower, pixels, -2, tap)
        assert visual_attention.open_tap_that_may_pad() is None and tap.tokens is None


@pytest.mark.parametrize("kind", SALIENCY_KINDS)
def test_what_is_read_of_attention_has_no_gradient(kind: str) -> None:
    """Choosing is no part of what is trained, and a training step would hold all attention until it goes backward."""
    query, key = (torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(2))
    assert not Reading(0, kind, 1.0 if kind.startswith("global") else None).of(query, key).requires_grad


def test_the_config_of_a_tapped_module_has_all_that_the_stock_one_has(model: Any) -> None:
    config, stock = model.model.vision_attentions[0].config, model.config.vision_config
    for one in (config, copy.deepcopy(config)):
        assert type(one) is not type(stock) and one.hidden_size == stock.hidden_size
    with pytest.raises(AttributeError):
        _ = config.no_such_field
