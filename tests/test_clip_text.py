"""Questions that CLIP reads: a text tower beside the weights, the ids that the processor adds, and what is kept."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from matrix import ROWS, made
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import POSITIONS, write_tiny_clip
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel, pipeline

import vispruner
from vispruner.choosing import Choice, watch_choices
from vispruner.clip_text import TextTowerError, read_text_tower
from vispruner.configuration_vispruner import CLIP_INPUTS
from vispruner.conversion import cli
from vispruner.conversion.build import BuildError, build_repo
from vispruner.conversion.llava_keys import CHAT_TEMPLATES
from vispruner.conversion.picture import show
from vispruner.conversion.repo_config import load_repo_config
from vispruner.conversion.text_tower import write_text_tower
from vispruner.conversion.upload_plan import built_files
from vispruner.conversion.verify import verify_repo
from vispruner.engine_interface import VisPrunerLlavaProcessor
from vispruner.selectors import require_choice_by_image, run_selector

METHODS = ("cdpruner", "trim")
T = 9
ASK, OTHER = "What color is the animal?", "How many people are there?"
LONG = "Where is the small brown dog that runs along the beach while the children play with a ball near the window?"


def written(text: str) -> str:
    return f"USER: <image>\n{text} ASSISTANT:"


@pytest.fixture(scope="session")
def clip(tiny_llava_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny-clip", tiny_llava_repo)


@pytest.fixture(scope="session")
def tower(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_tower(clip, tmp_path_factory.mktemp("towers") / "clip-text.safetensors")


def write_yaml(folder: Path, base: Path, tower: Path, architecture: str = "llava", **options: Any) -> Path:
    path = folder / f"{architecture}.yaml"
    named = {"method": "cdpruner", "visual_token_num": T, "text_tower": str(tower), **options}
    base_of = {"base_model": str(base), "architecture": architecture}
    path.write_text(yaml.safe_dump({"repo_id": "me/pruned", **base_of, "vispruner_config": named}))
    return path


@pytest.fixture(scope="session")
def built(tiny_llava_repo: Path, tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    return build_repo(write_yaml(folder, tiny_llava_repo, tower), folder / "repo", show_progress=False)


@pytest.fixture(scope="session")
def processor(built: Path) -> Any:
    return AutoProcessor.from_pretrained(built, trust_remote_code=True)


@pytest.fixture
def model(built: Path) -> Any:
    return vispruner.load(built).eval()


def question_by_hand(clip: CLIPModel, tokenizer: Any, question: str) -> torch.Tensor:
    """Return CLIP's embedding (1, 1, E) of a question, the mean of its parts, by stock's own model."""
    ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    parts = [ids[start : start + POSITIONS - 2] for start in range(0, len(ids), POSITIONS - 2)]
    embeds = []
    for part in parts:
        given = torch.tensor([[tokenizer.bos_token_id, *part, tokenizer.eos_token_id]])
        pooled = clip.text_model(input_ids=given).pooler_output
        embeds.append(F.normalize(clip.text_projection(pooled), dim=-1))
    return torch.stack(embeds).mean(0)[None]


@torch.no_grad()
def kept_by_hand(folder: Path, llava: Path, pixels: torch.Tensor, question: str, method: str) -> torch.Tensor:
    clip, stock = CLIPModel.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(llava)
    states = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    images = clip.visual_projection(clip.vision_model.post_layernorm(states))[:, 1:]
    features = states[:, 1:]
    question_embeds = question_by_hand(clip, AutoTokenizer.from_pretrained(folder), question)
    return run_selector(
        method,
        features,
        torch.zeros(features.shape[:2]),
        T,
        projected=stock.model.multi_modal_projector(features),
        image_embeds=images,
        text_embeds=question_embeds,
    ).indices[0]


@torch.no_grad()
def kept(model: Any, inputs: Any) -> list[torch.Tensor]:
    return model.model.encode_prompt(**copy.copy(inputs))["image"].kept_indices


# What is kept


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("question", [ASK, OTHER, LONG])
def test_what_stays_is_what_stocks_clip_and_the_authors_rule_say(
    clip: Path, tiny_llava_repo: Path, model: Any, processor: Any, photo: Image.Image, method: str, question: str
) -> None:
    inputs = processor(images=photo, text=written(question), return_tensors="pt")
    expected = kept_by_hand(clip, tiny_llava_repo, inputs["pixel_values"], question, method)
    model.set_vispruner_config(method=method)
    (found,) = kept(model, inputs)
    assert torch.equal(found, expected) and len(found) == T
    choices: list[Choice] = []
    with watch_choices(choices.append), torch.no_grad():
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2)
    assert [torch.equal(choice.selection.indices[0], expected) for choice in choices] == [True, True]
    assert not any(name in choice.tokens.further for choice in choices for name in ("text", "text_saliency"))


def test_questions_and_spaces_matter(model: Any, processor: Any, photo: Image.Image) -> None:
    inputs = [processor(images=photo, text=written(question), return_tensors="pt") for question in (ASK, OTHER)]
    found = [kept(model, one)[0].tolist() for one in inputs]
    model.set_vispruner_config(text_tower=None)
    by_words = [kept(model, one)[0].tolist() for one in inputs]
    assert len({str(one) for one in (*found, *by_words)}) == 4


@pytest.mark.core
@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_a_batch_is_chosen_for_as_alone(model: Any, processor: Any, photo: Image.Image, method: str) -> None:
    """Rows with one image, none and two; questions of one part and of several."""
    model.set_vispruner_config(method=method)
    texts = [written(ASK), "USER: Hello. ASSISTANT:", f"USER: <image> and <image>\n{LONG} ASSISTANT:"]
    turned = photo.rotate(90)
    images = [[photo], [], [photo, turned]]
    together = processor(images=images, text=texts, padding=True, return_tensors="pt")
    alone = [
        processor(images=own, text=text, return_tensors="pt") for own, text in zip(images, texts, strict=True) if own
    ]
    expected = [one for inputs in alone for one in kept(model, inputs)]
    assert [one.tolist() for one in kept(model, together)] == [one.tolist() for one in expected]
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    new = model.generate(**together, **settings)[:, together["input_ids"].shape[1] :]
    for row, inputs in zip((0, 2), alone, strict=True):
        assert torch.equal(model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :], new[row])
    beams = model.generate(**together, **settings, num_beams=2, num_return_sequences=2)
    assert len(beams) == 6


@pytest.mark.core
def test_tiles_are_compared_each_by_itself(tiny_llava_next_repo: Path, tmp_path: Path, photo: Image.Image) -> None:
    clip = write_tiny_clip(tmp_path / "clip", tiny_llava_next_repo)
    tower = write_text_tower(clip, tmp_path / "clip-text.safetensors")
    yaml_file = write_yaml(tmp_path, tiny_llava_next_repo, tower, "llava_next", visual_token_num=5)
    repo = build_repo(yaml_file, tmp_path / "repo", show_progress=False)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    model, stock = vispruner.load(repo).eval(), CLIPModel.from_pretrained(clip)
    asked = question_by_hand(stock, AutoTokenizer.from_pretrained(clip), ASK)
    inputs = processor(images=photo, text=written(ASK), return_tensors="pt")
    for mode in ("paper", "native"):
        model.set_vispruner_config(tile_mode=mode)
        choices: list[Choice] = []
        with watch_choices(choices.append), torch.no_grad():
            model(**inputs)
        assert choices
        for choice in choices:
            features, further = choice.tokens.features, choice.tokens.further
            with torch.no_grad():
                patches = stock.visual_projection(stock.vision_model.post_layernorm(features))
            torch.testing.assert_close(further["image_embeds"], patches, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                further["text_embeds"], asked.expand(len(features), -1, -1), rtol=1e-4, atol=1e-5
            )


def test_nothing_is_asked_for_where_nothing_is_chosen(model: Any, processor: Any, photo: Image.Image) -> None:
    inputs = dict(processor(images=photo, text=written(ASK), return_tensors="pt"))
    ids = {name: inputs.pop(name) for name in CLIP_INPUTS}
    plain = processor.tokenizer("Hello.", return_tensors="pt")
    with torch.no_grad():
        model(**plain)
        for change in ({"method": "none"}, {"keep_ratio": 1.0}, {"method": "vispruner"}):
            expected = model(**inputs, vispruner_config=change).logits
            assert torch.equal(model(**inputs, **ids, vispruner_config=change).logits, expected)
    images = model.encode_images(inputs["pixel_values"], vispruner_config={"method": "vispruner"})
    change = {"method": "vispruner"}
    model.generate(
        input_ids=inputs["input_ids"], **ids, encoded_images=images, vispruner_config=change, max_new_tokens=2
    )


def test_a_question_that_is_missing_or_does_not_fit_is_refused(model: Any, processor: Any, photo: Image.Image) -> None:
    inputs = dict(processor(images=photo, text=written(ASK), return_tensors="pt"))
    ids = {name: inputs.pop(name) for name in CLIP_INPUTS}
    run = (lambda given: model(**given), lambda given: model.generate(**given, max_new_tokens=2))
    for call in run:
        with pytest.raises(ValueError, match=r"needs clip_input_ids and clip_attention_mask: the processor of a repo"):
            call(inputs)
        with pytest.raises(ValueError, match="needs clip_input_ids"):
            call({**inputs, "clip_input_ids": ids["clip_input_ids"]})
        for wrong in (lambda ids: ids[0], lambda ids: ids.repeat(2, 1, 1), lambda ids: ids.float()):
            with pytest.raises(ValueError, match=r"must be integers \(rows, parts, length\) for the 1 rows"):
                call({**inputs, **{name: wrong(value) for name, value in ids.items()}})
    with pytest.raises(ValueError, match="must be integers"):
        model(**inputs, clip_input_ids=ids["clip_input_ids"], clip_attention_mask=ids["clip_attention_mask"][..., :1])
    with pytest.raises(ValueError, match="chooses by the question"):
        model.encode_images(inputs["pixel_values"])


def test_the_model_makes_the_ids_for_prompts_of_a_stock_processor(
    model: Any, processor: Any, tiny_llava_repo: Path, photo: Image.Image
) -> None:
    stock = AutoProcessor.from_pretrained(tiny_llava_repo)
    inputs = stock(images=photo, text=written(ASK), return_tensors="pt")
    assert not {*CLIP_INPUTS} & inputs.keys()
    own = processor(images=photo, text=written(ASK), return_tensors="pt")
    made_here = model.question_inputs([ASK])
    assert all(torch.equal(made_here[name], own[name]) for name in CLIP_INPUTS)
    assert torch.equal(kept(model, {**inputs, **made_here})[0], kept(model, own)[0])
    with pytest.raises(TypeError, match="takes a list"):
        model.question_inputs(ASK)
    with pytest.raises(ValueError, match="none is named"):
        vispruner.load(tiny_llava_repo, method="cdpruner", visual_token_num=T).question_inputs([ASK])


# The processor


def question_of(processor: Any, inputs: Any, row: int = 0) -> str:
    """Return what CLIP is to read, from its ids."""
    ids, is_token = (torch.as_tensor(inputs[name])[row] for name in CLIP_INPUTS)
    parts = [ids[part][is_token[part].bool()][1:-1] for part in range(len(ids)) if is_token[part].any()]
    return processor.tokenize_questions.tokenizer.decode(torch.cat(parts))


def test_the_question_is_what_stands_behind_the_last_image_up_to_the_first_answer(
    processor: Any, photo: Image.Image
) -> None:
    content = [{"type": "image"}, {"type": "text", "text": ASK}]
    first = {"role": "user", "content": content}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "It is orange."}]}
    second = {"role": "user", "content": [{"type": "text", "text": OTHER}]}
    for messages, more in (
        ([first], True),
        ([first], False),
        ([first, answer], False),
        ([first, answer, second], True),
    ):
        text = processor.apply_chat_template(messages, add_generation_prompt=more)
        assert question_of(processor, processor(images=photo, text=text, return_tensors="pt")) == ASK
    shown = [{**first, "content": [{"type": "image", "image": photo}, content[1]]}]
    found = processor.apply_chat_template(
        shown, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert question_of(processor, found) == ASK
    before = f"USER: {ASK}\n<image> ASSISTANT:"
    for answered in ("", " It is orange.</s>"):  # which the question may not hold
        assert question_of(processor, processor(images=photo, text=before + answered)) == f"USER: {ASK}"
    two = f"USER: <image> {OTHER} <image> {ASK} ASSISTANT:"
    assert question_of(processor, processor(images=[photo, photo], text=two)) == ASK


@pytest.mark.parametrize("template", sorted(CHAT_TEMPLATES))
def test_no_answer_is_read_whatever_the_template_writes_before_it(
    built: Path, photo: Image.Image, template: str
) -> None:
    """Mistral's has no generation prompt."""
    processor = AutoProcessor.from_pretrained(built, trust_remote_code=True)
    processor.chat_template = CHAT_TEMPLATES[template]
    content = [{"type": "image"}, {"type": "text", "text": ASK}]
    for answer in ("It is orange.", "blue"):
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        for content_of in (content, content[::-1]):
            text = processor.apply_chat_template([{"role": "user", "content": content_of}, said])
            assert answer in text
            question = question_of(processor, processor(images=photo, text=text))
            assert ASK in question and answer not in question and "INST]" not in question.partition(ASK)[2]


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0]['content'] + 'x' }}", None])
def test_a_template_that_tells_nothing_is_no_error(
    built: Path, photo: Image.Image, template: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    processor = AutoProcessor.from_pretrained(built, trust_remote_code=True)
    processor.chat_template = template
    assert question_of(processor, processor(images=photo, text=f"<image> {ASK}")) == ASK


def test_a_question_may_be_said_otherwise(processor: Any, tiny_llava_repo: Path, photo: Image.Image) -> None:
    texts = [written("Answer in one word."), written(LONG)]
    found = processor(images=[photo, photo], text=texts, padding=True, return_tensors="pt", question=[ASK, LONG])
    assert [question_of(processor, found, row) for row in (0, 1)] == [ASK, LONG]
    ids, is_token = (found[name] for name in CLIP_INPUTS)
    assert ids.shape == is_token.shape and ids.shape[1] > 1 and ids.shape[2] == POSITIONS
    assert is_token[0, 1:].sum() == 0 and is_token[0, 0].sum() < POSITIONS
    with pytest.raises(ValueError, match="question must be one for each of 2 rows of text, got 1"):
        processor(images=[photo, photo], text=texts, question=[ASK])
    assert question_of(processor, processor(images=photo, text=texts[:1], question=ASK)) == ASK
    assert not {*CLIP_INPUTS} & processor(text=["USER: Hello. ASSISTANT:"]).keys()
    empty = processor(images=photo, text="<image>", return_tensors="pt")
    assert empty["clip_attention_mask"].tolist() == [[[1, 1]]]


def test_a_repo_without_a_text_tower_takes_no_question(
    tiny_llava_repo: Path, tmp_path: Path, photo: Image.Image
) -> None:
    stock = VisPrunerLlavaProcessor.from_pretrained(tiny_llava_repo)
    assert not {*CLIP_INPUTS} & stock(images=photo, text=written(ASK)).keys()
    with pytest.raises(ValueError, match="carries no text tower"):
        stock(images=photo, text=written(ASK), question=ASK)


# The file


def test_the_command_writes_the_same_bytes_and_says_so(
    clip: Path, tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.safetensors"
    assert cli.main(["text-tower", str(clip), "--out", str(out)]) == 0
    assert out.read_bytes() == tower.read_bytes() and f"wrote {out}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_only_a_whole_clip_gives_one(clip: Path, tiny_llava_repo: Path, tmp_path: Path) -> None:
    with pytest.raises(TextTowerError, match=r"is a llava checkpoint: give a whole CLIP"):
        write_text_tower(tiny_llava_repo, tmp_path / "out.safetensors")
    with pytest.raises(TextTowerError, match="is a name of weights"):
        write_text_tower(clip, tmp_path / "model-text.safetensors")
    vision_alone = tmp_path / "vision"
    vision_alone.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (vision_alone / name).write_bytes((clip / name).read_bytes())
    tensors = {n: t for n, t in load_file(clip / "model.safetensors").items() if not n.startswith("text_")}
    save_file(tensors, vision_alone / "model.safetensors")
    with pytest.raises(TextTowerError, match="is no text tower, it lacks text_model"):
        write_text_tower(vision_alone, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


NARROW = {"visual_projection.weight": torch.ones(24, 9), "vision_model.post_layernorm.weight": torch.ones(9)}


def about(tensors: dict[str, torch.Tensor], **changes: Any) -> torch.Tensor:
    said = {**json.loads(bytes(tensors["about"].tolist())), **changes}
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"text_projection.weight": None}, "it lacks text_projection.weight"),
        (lambda t: {"vision_model.more": torch.ones(2)}, "is no text tower as"),
        (lambda t: {"text_model.final_layer_norm.weight": None}, "is no text tower: .*final_layer_norm"),
        (lambda t: {"text_model.more": torch.ones(2)}, "is no text tower: .*text_model.more"),
        (lambda t: {"visual_projection.weight": torch.ones(23, 64)}, "do not lead into one space"),
        (lambda t: {"text_projection.weight": torch.full((24, 48), float("nan"))}, "holds NaN or infinity"),
        (lambda t: {"tokenizer": torch.ones(9, dtype=torch.uint8)}, "its tokenizer cannot be read"),
        (lambda t: {"about": torch.ones(9, dtype=torch.uint8)}, "does not say what its text tower is"),
        (lambda t: {"about": about(t, begins="a")}, "of the wrong kind"),
        (lambda t: {"about": about(t, ends=10**6)}, "of the wrong kind"),
        (lambda t: {"about": about(t, num_attention_heads=-4)}, "of the wrong kind"),
        (lambda t: {"about": about(t, layer_norm_eps=float("nan"))}, "of the wrong kind"),
        (lambda t: {"about": t["about"].float()}, "bytes are stored as uint8"),
        (lambda t: {"text_model.embeddings.token_embedding.weight": torch.ones(400, 48)}, "of the wrong|knows 51"),
        (lambda t: {"about": about(t, num_attention_heads=5)}, "is no text tower"),
        (lambda t: {"about": about(t, hidden_act="os.system")}, "is no text tower"),
        (lambda t: {"vision_model.post_layernorm.weight": torch.ones(64) * 3}, "another CLIP checkpoint"),
        (lambda t: {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(10**9, 0)}, "do not fit each other"),
        (lambda t: {"text_model.embeddings.position_embedding.weight": torch.ones(2, 48)}, "no position for a word"),
        (lambda t: {"about": torch.tensor(1, dtype=torch.uint8)}, "no row of bytes"),
        (lambda t: NARROW, "take the CLIP checkpoint that the vision tower came from"),
    ],
)
def test_a_file_that_is_none_is_refused_and_the_model_stays_as_it_was(
    tiny_llava_repo: Path, tower: Path, tmp_path: Path, change: Any, message: str
) -> None:
    tensors = load_file(tower)
    changed = {name: tensor for name, tensor in {**tensors, **change(tensors)}.items() if tensor is not None}
    save_file(changed, tmp_path / "other.safetensors")
    model = vispruner.load(tiny_llava_repo, method="cdpruner", visual_token_num=T)
    before = dict(model.config.vispruner_config)
    with pytest.raises(TextTowerError, match=message):
        model.set_vispruner_config(text_tower=tmp_path / "other.safetensors")
    assert model.config.vispruner_config == before and model.model.text_tower is None


def test_a_huge_config_makes_no_huge_tower(tower: Path, tmp_path: Path) -> None:
    """The tower is as large as its tensors, whatever the file says."""
    tensors = load_file(tower)
    save_file(
        {**tensors, "about": about(tensors, hidden_size=10**9, num_hidden_layers=10**6)}, tmp_path / "x.safetensors"
    )
    text = read_text_tower(tmp_path / "x.safetensors").text
    assert sum(p.numel() for p in text.parameters()) == sum(
        t.numel() for n, t in tensors.items() if n.startswith("text_")
    )


def test_what_cannot_be_a_text_tower_is_refused_by_name(tiny_llava_repo: Path, tower: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ("absent.safetensors", r"absent.safetensors is not in .*or make one with `vispruner text-tower`"),
        (str(tmp_path / "no.safetensors"), "vispruner_config.text_tower: there is no file"),
        ("tower.bin", "vispruner_config.text_tower must be null or a .safetensors file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            vispruner.load(tiny_llava_repo, method="cdpruner", visual_token_num=T, text_tower=wrong)
    model = vispruner.load(tiny_llava_repo, method="cdpruner", visual_token_num=T, text_tower=tower)
    with pytest.raises(ValueError, match="text_tower cannot be changed for one call"):
        model.encode_images(torch.ones(1, 3, 112, 112), vispruner_config={"text_tower": None})
    fresh = type(model)(model.config).eval()
    with pytest.raises(ValueError, match="this model did not come from from_pretrained"):
        fresh.question_inputs([ASK])
    layers = {"vision_feature_layer": [-2, -1]}
    with pytest.raises(ValueError, match=r"text_tower: patches of VisPrunerLlavaModel have no place in CLIP's"):
        vispruner.load(tiny_llava_repo, method="cdpruner", visual_token_num=T, text_tower=tower, **layers)


@pytest.mark.parametrize("name", sorted({*ROWS} - {"llava", "llava_next"}))
def test_other_architectures_refuse_it_by_name(name: str, tower: Path, tmp_path: Path) -> None:
    options = {**ROWS[name].options, "method": "cdpruner", "method_options": None}
    model = made(name, tmp_path / name, **options).pruned
    with pytest.raises(ValueError, match=rf"text_tower: patches of {type(model.model).__name__} have no place"):
        model.set_vispruner_config(text_tower=str(tower))


# In a repo


@pytest.mark.core
def test_a_thin_repo_brings_its_own(
    tiny_llava_repo: Path,
    tower: Path,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    photo: Image.Image,
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(tiny_llava_repo, tmp_path / "hub" / "models--llava-hf--tiny" / "snapshots" / commit)
    config = write_yaml(tmp_path, tiny_llava_repo, tower)
    stored = {**yaml.safe_load(config.read_text()), "base_model": "llava-hf/tiny", "base_revision": commit}
    config.write_text(yaml.safe_dump(stored))
    thin = build_repo(config, tmp_path / "thin", base=tiny_llava_repo, thin=True, show_progress=False)
    assert not (thin / "model.safetensors").exists()
    assert tower.name in {file.path for file in built_files(thin, load_repo_config(config))}
    processor = AutoProcessor.from_pretrained(thin, trust_remote_code=True)
    inputs = processor(images=photo, text=written(ASK), return_tensors="pt")
    assert torch.equal(kept(vispruner.load(thin), inputs)[0], kept(vispruner.load(built), inputs)[0])


def test_it_moves_with_the_model_and_is_no_weight(model: Any, processor: Any, photo: Image.Image) -> None:
    assert not any("text_tower" in name for name in model.state_dict())
    assert not any("text_tower" in name for name, _ in model.named_modules())
    inputs = processor(images=photo, text=written(ASK), return_tensors="pt")
    expected = kept(model, inputs)[0]
    assert torch.equal(kept(copy.deepcopy(model), inputs)[0], expected)
    half = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    assert len(kept(model.to(torch.bfloat16), half)[0]) == T
    assert next(model.model.text_tower.text.parameters()).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_built_repo_is_verified_with_its_text_tower(built: Path, tiny_llava_repo: Path, tower: Path) -> None:
    report = verify_repo(built, base=tiny_llava_repo)
    assert report.passed and report.digest, report.table()
    (options,) = (check.detail for check in report.checks if check.name == "vispruner_config")
    assert options.endswith(f"a text tower of {len(load_file(tower))} tensors")
    assert "clip-text.safetensors" in report.files
    card = (built / "README.md").read_text()
    assert "CLIP's text tower, a file of this repository" in card
    assert 'AutoProcessor.from_pretrained("me/pruned", trust_remote_code=True)' in card


@pytest.mark.core
@pytest.mark.parametrize("damage", ["missing", "not one", "no processor"])
def test_a_damaged_repo_is_refused(built: Path, tmp_path: Path, damage: str) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    for path in built.iterdir():
        (repo / path.name).write_bytes(path.read_bytes())
    if damage == "missing":
        (repo / "clip-text.safetensors").unlink()
        with pytest.raises(OSError, match=r"clip-text\.safetensors is not in"):
            vispruner.load(repo)
        with pytest.raises(OSError, match=r"clip-text\.safetensors is not in"):
            AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    elif damage == "not one":
        save_file({"a": torch.ones(1)}, repo / "clip-text.safetensors")
        with pytest.raises(ValueError, match="is no text tower"):
            vispruner.load(repo)
    else:
        stored = json.loads((repo / "processor_config.json").read_text())
        stored.pop("auto_map")
        (repo / "processor_config.json").write_text(json.dumps(stored))
    report = verify_repo(repo)
    assert not report.passed
    assert "text_tower" in report.failures[0].detail or "no text tower" in report.failures[0].detail


def test_two_files_of_one_name_are_not_saved_over_each_other(
    tiny_llava_repo: Path, tower: Path, tmp_path: Path
) -> None:
    model = vispruner.load(tiny_llava_repo, method="cdpruner", text_tower=tower, visual_token_num=T)
    width = model.config.get_text_config().hidden_size
    save_file({"codebook": torch.ones(4, width)}, tmp_path / tower.name)
    model.set_vispruner_config(codebook=tmp_path / tower.name)
    with pytest.raises(ValueError, match="files of the same name"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.core
def test_a_saved_model_carries_it_and_comes_back(built: Path, tmp_path: Path, photo: Image.Image, tower: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(built, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(built, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / tower.name).read_bytes() == tower.read_bytes()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    reading = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    inputs = processor(images=photo, text=written(LONG), return_tensors="pt")
    found = reading(images=photo, text=written(LONG), return_tensors="pt")
    assert all(torch.equal(inputs[name], found[name]) for name in (*CLIP_INPUTS, "input_ids"))
    assert torch.equal(kept(again, found)[0], kept(model, inputs)[0])


@pytest.mark.core
def test_a_pipeline_and_the_picture_read_the_question(built: Path, tmp_path: Path, photo: Image.Image) -> None:
    pipe: Any = pipeline("image-text-to-text", model=str(built), trust_remote_code=True)
    content = [{"type": "image", "image": photo}, {"type": "text", "text": ASK}]
    answer = pipe(text=[{"role": "user", "content": content}], max_new_tokens=2, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)
    photo.save(tmp_path / "photo.png")
    out, _ = show(tmp_path / "photo.png", str(built), tmp_path / "kept.png", question=ASK)
    assert Image.open(out).width > 100


def test_engines_refuse_it_and_builds_check_it(
    built: Path, tiny_llava_repo: Path, tower: Path, tmp_path: Path
) -> None:
    model = vispruner.load(built)
    with pytest.raises(ValueError, match="chooses by the question, but an engine"):
        require_choice_by_image(model.model.vispruner_options)
    other = write_text_tower(
        write_tiny_clip(tmp_path / "other", tiny_llava_repo), tmp_path / "same-tower-other-text.safetensors"
    )
    tensors = load_file(other)
    tensors["vision_model.post_layernorm.weight"] *= 2
    save_file(tensors, other)
    with pytest.raises(BuildError, match=r"vispruner_config.text_tower: .*another CLIP checkpoint"):
        build_repo(write_yaml(tmp_path, tiny_llava_repo, other), tmp_path / "repo", show_progress=False)
    with pytest.raises(ValueError, match=r"there is no absent.safetensors beside .*`vispruner text-tower`"):
        build_repo(write_yaml(tmp_path, tiny_llava_repo, Path("absent.safetensors")), tmp_path / "repo")
    assert not (tmp_path / "repo").exists()
