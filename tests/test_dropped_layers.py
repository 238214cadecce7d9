"""Vision layers above the last one in use can go, and nothing changes but the time and the bytes they took."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from bases import HUB_BASE, in_cache, write_yaml
from huggingface_hub import constants
from matrix import LLAVAS, ONE, SEVERAL, TEXT, generate, logits
from safetensors import safe_open
from tiny_llava import write_tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlavaForConditionalGeneration

import vispruner
from vispruner.configuration_vispruner import drop_unused_vision_layers, used_vision_layers
from vispruner.conversion.build import build_repo
from vispruner.conversion.cli import main
from vispruner.conversion.repo_config import RepoConfigError, load_repo_config
from vispruner.conversion.verify import verify_repo

LAYERS = 4


def config_of(features, attention=None, layers=LAYERS):
    vision = CLIPVisionConfig(num_hidden_layers=layers, image_size=28, patch_size=14, num_attention_heads=8)
    options = {"visual_token_num": 2, "attention_layer": attention}
    return vispruner.VisPrunerLlavaConfig(
        vision_config=vision, vision_feature_layer=features, vispruner_config=options
    )


class TestConfig:
    @pytest.mark.parametrize(
        ("features", "attention", "layers", "adapted_features", "adapted_attention"),
        [
            (-2, None, 3, -1, None),
            (-1, None, 4, -1, None),
            (3, None, 3, 3, None),
            (-3, None, 2, -1, None),
            ([-2, -4], None, 3, [-1, -3], None),
            ([1, -3], None, 2, [1, -1], None),
            ([0, 1], None, 1, [0, 1], None),
            (-3, -1, 4, -3, -1),
            (-3, 3, 4, -3, 3),
            (-4, -2, 3, -3, -1),
            (-4, 1, 2, -2, 1),
            (-2, 0, 3, -1, 0),
        ],
    )
    def test_only_layers_above_all_used_ones_go(
        self, features, attention, layers, adapted_features, adapted_attention
    ):
        config = config_of(features, attention)
        assert used_vision_layers(config) == layers
        drop_unused_vision_layers(config)
        assert config.vision_config.num_hidden_layers == layers
        assert config.vision_feature_layer == adapted_features
        assert config.vispruner_config["attention_layer"] == adapted_attention

    def test_twice_is_once(self):
        config = config_of([-2, -4], -3)
        drop_unused_vision_layers(config)
        once = config.to_dict()
        drop_unused_vision_layers(config)
        assert config.to_dict() == once


every_llava = pytest.mark.parametrize("model", LLAVAS, indirect=True)


def without_the_last_layer(model, **options):
    return vispruner.load(
        model.folder,
        drop_unused_vision_layers=True,
        attn_implementation=model.attention,
        **model.row.options,
        **options,
    ).eval()


class TestLoading:
    @pytest.mark.core
    @every_llava
    def test_the_answers_are_the_same_bit_for_bit(self, model):
        short = without_the_last_layer(model)
        assert len(short.model.vision_layers) == len(model.pruned.model.vision_layers) - 1
        require_equal_outputs(prompts_of(model), short, model.pruned)
        for pruned in (short, model.pruned):
            pruned.set_vispruner_config(method="none")
        require_equal_outputs(prompts_of(model), short, model.stock)

    @every_llava
    @pytest.mark.parametrize("method", ["prumerge", "prumerge_plus"])
    def test_a_method_that_reads_the_last_layer_keeps_it(self, model, method):
        options = {**model.row.options, "method": method}
        with pytest.raises(ValueError, match=f'method "{method}" reads the last layer'):
            vispruner.load(model.folder, drop_unused_vision_layers=True, **options)

    @every_llava
    def test_an_attention_layer_counted_from_the_end_stays_the_same_one(self, model):
        model.pruned.set_vispruner_config(attention_layer=-3)
        short = without_the_last_layer(model, attention_layer=-3)
        assert short.config.vispruner_config["attention_layer"] == -2
        require_equal_outputs(prompts_of(model), short, model.pruned)

    @every_llava
    def test_it_says_nothing_of_the_layers_left_out_and_misses_none_below(self, model, tmp_path, caplog):
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            short, info = vispruner.load(
                model.folder, visual_token_num=3, drop_unused_vision_layers=True, output_loading_info=True
            )
        finally:
            logger.removeHandler(caplog.handler)
        assert not info["unexpected_keys"] and not info["missing_keys"]
        assert not [record for record in caplog.records if "layers" in record.getMessage()]
        weights = {name: value for name, value in short.state_dict().items() if "layers.0.mlp.fc1.bias" not in name}
        short.save_pretrained(tmp_path, state_dict=weights)
        with pytest.raises(ValueError, match=r"vision.*layers\.0\.mlp\.fc1\.bias"):
            type(short).from_pretrained(tmp_path)

    def test_a_layer_that_is_missed_by_mistake_is_still_reported(self, tiny_llava_repo):
        """Of a config of fewer layers whose feature layer was not adapted the features are other ones."""
        config = vispruner.VisPrunerLlavaConfig.from_pretrained(
            tiny_llava_repo, vispruner_config={"visual_token_num": 3}
        )
        config.vision_config.num_hidden_layers -= 1
        model_class = vispruner.ARCHITECTURES["llava"].model_class
        _, info = model_class.from_pretrained(tiny_llava_repo, config=config, output_loading_info=True)
        assert info["unexpected_keys"]

    @every_llava
    def test_a_saved_model_is_a_repo_of_fewer_layers(self, model, tmp_path):
        short = without_the_last_layer(model)
        short.save_pretrained(tmp_path)
        again = vispruner.load(tmp_path, attn_implementation=model.attention).eval()
        require_equal_outputs(prompts_of(model), again, short)

    @pytest.mark.core
    def test_several_feature_layers(self, tmp_path):
        """Only layers above all of them go."""
        base = several_feature_layers(tmp_path, [-3, -2])
        ids = torch.tensor([[1, *[base.config.image_token_id] * 64, 5, 6]])
        pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
        outputs = []
        for drop in (False, True):
            for options in ({"visual_token_num": 9}, {"method": "none"}):
                model = vispruner.load(tmp_path, drop_unused_vision_layers=drop, **options).eval()
                with torch.no_grad():
                    outputs.append(model(input_ids=ids, pixel_values=pixels).logits)
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
        assert model.config.vision_feature_layer == [-2, -1]
        with torch.no_grad():
            assert torch.equal(outputs[3], base(input_ids=ids, pixel_values=pixels).logits)


def several_feature_layers(folder, layers):
    """Write a stock checkpoint whose projector reads several hidden states, and return its model."""
    write_tiny_llava(folder / "one", image_size=112)
    config = type(LlavaForConditionalGeneration.from_pretrained(folder / "one").config).from_pretrained(folder / "one")
    config.vision_feature_layer = layers
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


def prompts_of(model):
    return [model.prompt(ONE), model.prompt(SEVERAL, ONE, TEXT)]


def processed(base, photo):
    """Prompts for a repo that has a processor."""
    processor = AutoProcessor.from_pretrained(base)
    one, two = "USER: <image>\nWhat is this? ASSISTANT:", "USER: <image> and <image>\nDo they differ? ASSISTANT:"
    batches = [([one], [photo]), ([two, one], [photo, photo.rotate(90), photo.crop((60, 40, 260, 240))])]
    return [processor(images=images, text=text, return_tensors="pt", padding=True) for text, images in batches]


def require_equal_outputs(prompts, left, right):
    for inputs in prompts:
        assert torch.equal(logits(left, dict(inputs)), logits(right, dict(inputs)))
        assert torch.equal(generate(left, dict(inputs)), generate(right, dict(inputs)))


class TestBuilding:
    @pytest.fixture(params=["llava", "llava_next"])
    def base(self, request, tiny_llava_repo, tiny_llava_next_repo):
        return {"llava": tiny_llava_repo, "llava_next": tiny_llava_next_repo}[request.param]

    @pytest.fixture
    def yaml(self, base, tmp_path):
        architecture = json.loads((base / "config.json").read_text())["model_type"]
        path = tmp_path / "some-vispruner.yaml"
        path.write_text(
            f"repo_id: someone/some-vispruner\nbase_model: {base}\narchitecture: {architecture}\n"
            "vispruner_config: {visual_token_num: 5, attention_layer: -2}\n"
        )
        return path

    def test_a_full_repo_lacks_config_and_weights_of_the_last_layer(self, base, yaml, tmp_path):
        whole, less = (
            build_repo(yaml, tmp_path / str(drop), drop_unused_vision_layers=drop, show_progress=False)
            for drop in (False, True)
        )
        configs = [json.loads((folder / "config.json").read_text()) for folder in (whole, less)]
        layers = [config["vision_config"]["num_hidden_layers"] for config in configs]
        assert layers[1] == layers[0] - 1
        assert [config["vispruner_config"]["attention_layer"] for config in configs] == [-2, -1]
        assert configs[1]["vision_feature_layer"] == -1
        same = {"vision_config", "vision_feature_layer", "vispruner_config"}
        assert {k: v for k, v in configs[0].items() if k not in same} == {
            k: v for k, v in configs[1].items() if k not in same
        }
        names = [tensor_names(folder) for folder in (whole, less)]
        assert names[1] < names[0]
        assert all(f"vision_model.encoder.layers.{layers[1]}." in name for name in names[0] - names[1])
        assert any("post_layernorm" in name for name in names[1])  # the stock class has it, used or not

    @pytest.mark.core
    def test_it_is_verified_and_answers_as_before_pruned_and_dense(self, base, yaml, tmp_path, photo):
        yaml.write_text(yaml.read_text().replace(", attention_layer: -2", ""))
        repo = build_repo(yaml, tmp_path / "repo", drop_unused_vision_layers=True, show_progress=False)
        found = verify_repo(repo, base=base)
        assert found.passed, found.table()
        pruned = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True).eval()
        assert type(pruned).__name__.startswith("VisPruner")
        prompts = processed(base, photo)
        require_equal_outputs(prompts, pruned, vispruner.load(base, visual_token_num=5).eval())
        dense, info = AutoModelForImageTextToText.from_pretrained(repo, output_loading_info=True)
        assert not type(dense).__name__.startswith("VisPruner")
        assert not info["missing_keys"] and not info["unexpected_keys"]
        require_equal_outputs(prompts, dense.eval(), AutoModelForImageTextToText.from_pretrained(base).eval())

    @pytest.mark.parametrize("method", ["prumerge", "prumerge_plus"])
    def test_a_method_that_reads_the_last_layer_keeps_it(self, yaml, method, tmp_path):
        changed = yaml.read_text().replace(", attention_layer: -2", f", method: {method}")
        yaml.write_text(changed + "drop_unused_vision_layers: true\n")
        with pytest.raises(ValueError, match=f'method "{method}" reads the last layer.*build without'):
            build_repo(yaml, tmp_path / "repo")

    def test_the_yaml_asks_for_it_too(self, yaml, tmp_path, capsys):
        assert main(["build", str(yaml), "--out", str(tmp_path / "by-option"), "--drop-unused-vision-layers"]) == 0
        yaml.write_text(yaml.read_text() + "drop_unused_vision_layers: true\n")
        assert main(["build", str(yaml), "--out", str(tmp_path / "by-yaml")]) == 0
        texts = [(tmp_path / name / "config.json").read_text() for name in ("by-option", "by-yaml")]
        assert texts[0] == texts[1]

    def test_a_value_that_is_neither_true_nor_false_is_refused(self, yaml):
        yaml.write_text(yaml.read_text() + "drop_unused_vision_layers: 1\n")
        with pytest.raises(RepoConfigError, match="drop_unused_vision_layers must be true or false"):
            load_repo_config(yaml)

    def test_where_nothing_is_unused_nothing_changes(self, base, yaml, tmp_path):
        yaml.write_text(yaml.read_text().replace("attention_layer: -2", "attention_layer: -1"))
        repos = [
            build_repo(yaml, tmp_path / str(drop), drop_unused_vision_layers=drop, show_progress=False)
            for drop in (False, True)
        ]
        for path in sorted(repos[0].iterdir()):
            assert path.read_bytes() == (repos[1] / path.name).read_bytes()


def tensor_names(folder):
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


class TestThinRepos:
    """Their weights are the base's, which has every layer."""

    @pytest.fixture(autouse=True)
    def base(self, tiny_llava_repo, tmp_path_factory, monkeypatch):
        cache = tmp_path_factory.mktemp("hub")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        return in_cache(cache, HUB_BASE, tiny_llava_repo)

    @pytest.mark.core
    def test_one_built_without_the_layer_loads_verifies_and_answers_as_before(self, tiny_llava_repo, tmp_path, photo):
        whole = vispruner.load(tiny_llava_repo, visual_token_num=9).eval()
        yaml = write_yaml(
            tmp_path,
            base_model=HUB_BASE,
            vispruner_config={"visual_token_num": 9},
            drop_unused_vision_layers=True,
        )
        repo = build_repo(yaml, tmp_path / "thin", thin=True, show_progress=False)
        assert not list(repo.glob("*.safetensors"))
        model, info = AutoModelForImageTextToText.from_pretrained(
            repo, trust_remote_code=True, output_loading_info=True
        )
        assert not info["unexpected_keys"] and not info["missing_keys"]
        assert len(model.model.vision_layers) == len(whole.model.vision_layers) - 1
        require_equal_outputs(processed(tiny_llava_repo, photo), model.eval(), whole)
        found = verify_repo(repo)
        assert found.passed, found.table()

    @pytest.mark.core
    def test_one_that_has_the_layer_can_be_loaded_without(self, tiny_llava_repo, tmp_path, photo):
        whole = vispruner.load(tiny_llava_repo, visual_token_num=9).eval()
        yaml = write_yaml(tmp_path, base_model=HUB_BASE, vispruner_config={"visual_token_num": 9})
        repo = build_repo(yaml, tmp_path / "thin", thin=True, show_progress=False)
        short = vispruner.load(repo, drop_unused_vision_layers=True).eval()
        assert len(short.model.vision_layers) == len(whole.model.vision_layers) - 1
        require_equal_outputs(processed(tiny_llava_repo, photo), short, whole)
