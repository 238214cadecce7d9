"""Every architecture against every property: one table, of which README shows what is covered.

Each test says by `@covers` which column of that table it stands for; the rows are in tests/rows.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import PLAIN, Image, Row, Video, draw_weights, rows
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForImageTextToText

import vispruner
from vispruner.conversion.codebook import save_codebook

ROWS = {row.model_type: row for row in rows()}
README = Path(__file__).parent.parent / "README.md"
NEW = 6
# Padding and batching change the order of sums in matrix products; activations are of order 1 to 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids"}

HELLO, ASK = [11, 12, 13], [14, 15, 16, 17]
ONE = [HELLO, Image((56, 84), seed=1), ASK]
SEVERAL = [HELLO, Image((84, 112), seed=2), [18], Image((112, 56), seed=3), ASK]
CLIP = [HELLO, Video(8, (56, 84), seed=4), ASK]
MIXED = [HELLO, Image((56, 56), seed=5), [19, 20], Video(8, (56, 56), seed=6), ASK]
TEXT = [[*HELLO, *ASK]]


@dataclass
class Model:
    """A tiny stock checkpoint, the stock model with eager attention, and the pruned one."""

    row: Row
    folder: Path
    stock: Any
    pruned: Any

    def prompt(self, *prompts: list) -> dict[str, Any]:
        return self.row.inputs(prompts)

    def counts(self, inputs: dict[str, Any]) -> tuple[dict, dict]:
        return self.pruned._count_visual_tokens(inputs)

    def prompts(self) -> list[list]:
        """A batch that has all there is: one image, several of different sizes, text alone, videos."""
        return [ONE, SEVERAL, TEXT, *([CLIP, MIXED] if "video" in self.row.modalities else [])]


def covers(column: str, needs: str = "image") -> Callable:
    """Mark a test as the proof of one column of README's table, for the rows that have the modality."""
    marked = [name for name, row in ROWS.items() if needs in row.modalities]

    def mark(test: Callable) -> Callable:
        test.column = column
        return pytest.mark.parametrize("model", marked, indirect=True)(test)

    return mark


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {}


@pytest.fixture
def model(
    request: pytest.FixtureRequest, models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    name = request.param
    if name not in models:
        row = ROWS[name]
        stock = row.stock_class(row.config()).eval()
        draw_weights(stock)
        folder = tmp_path_factory.mktemp(name) / "base"
        stock.save_pretrained(folder)
        stock = row.stock_class.from_pretrained(folder, attn_implementation="eager").eval()
        pruned = vispruner.load(folder, **row.options, attn_implementation="eager").eval()
        models[name] = Model(row, folder, stock, pruned)
    model = models[name]
    before = dict(model.pruned.config.vispruner_config)
    yield model
    model.pruned.config.vispruner_config = before


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**copy.copy(inputs), **options)


def type_of_new_tokens(model: Model) -> int:
    """What new tokens have in `TOKEN_TYPES`: that of text, unless the row says something else."""
    return getattr(model.row, "type_of_new_tokens", 0)


def answers(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    return generate(model, inputs, **options)[:, inputs["input_ids"].shape[1] :]


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**copy.copy(inputs)).logits


def dropped_columns(inputs: dict[str, Any], kept: dict[int, list]) -> torch.Tensor:
    """Return where (1, S) the placeholders are that do not stay; `kept` says per id and item which do."""
    ids, dropped = inputs["input_ids"][0].tolist(), torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for token, items in kept.items():
        columns = [column for column, value in enumerate(ids) if value == token]
        start = 0
        for stays, full in items:
            for place in range(full):
                dropped[0, columns[start + place]] = place not in stays
            start += full
    return dropped


def reference_of(model: Model, inputs: dict[str, Any]) -> tuple[dict[int, list], dict[int, list]]:
    """Return per id and item the tokens that stay; and which placeholders they stand for, of how many."""
    found = model.row.reference(model.stock, inputs, model.pruned.config.vispruner_config)
    full = model.counts(inputs)[0]
    stays = {
        token: [(set(item[1].tolist()), count) for item, count in zip(items, full[token], strict=True)]
        for token, items in found.items()
    }
    return {token: [item[0] for item in items] for token, items in found.items()}, stays


def greedy_reference(model: Model, inputs: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    """Answer one prompt by hand on the stock model, without a cache: new ids, logits at the end of the prompt."""
    tokens, stays = reference_of(model, inputs)
    dropped = dropped_columns(inputs, stays)
    if model.row.positions == "original":
        return masked_run(model.stock, inputs, dropped, tokens)
    return embedded_run(model.stock, inputs, dropped, tokens, type_of_new_tokens(model))


@torch.no_grad()
def embedded_run(
    stock: Any, inputs: dict[str, Any], dropped: torch.Tensor, tokens: dict[int, list], new_type: int
) -> tuple[list[int], torch.Tensor]:
    """Hand-built embeddings of the tokens that stay, numbered anew."""
    embeds = stock.get_input_embeddings()(inputs["input_ids"])
    for token, items in tokens.items():
        places = (inputs["input_ids"] == token) & ~dropped
        embeds[places] = torch.cat(items)
    embeds = embeds[~dropped][None]
    types = {"token_type_ids": inputs["token_type_ids"][~dropped][None]} if "token_type_ids" in inputs else {}
    new, ends = [], []
    for _ in range(NEW):
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        ends.append(stock(inputs_embeds=embeds, attention_mask=mask, **types).logits[0, -1])
        new.append(int(ends[-1].argmax()))
        types = {name: torch.nn.functional.pad(value, (0, 1), value=new_type) for name, value in types.items()}
        embeds = torch.cat([embeds, stock.get_input_embeddings()(torch.tensor([[new[-1]]]))], dim=1)
    return new, ends[0]


@torch.no_grad()
def masked_run(
    stock: Any, inputs: dict[str, Any], dropped: torch.Tensor, tokens: dict[int, list]
) -> tuple[list[int], torch.Tensor]:
    """The full prompt with its own positions, and nothing to be seen of the tokens that are dropped."""
    run, new, ends = dict(inputs), [], []
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    positions, _ = stock.model.get_rope_index(
        inputs["input_ids"], **{name: inputs[name] for name in names if name in inputs}
    )
    mask = inputs["attention_mask"].masked_fill(dropped, 0)
    for _ in range(NEW):
        ends.append(stock(**{**run, "position_ids": positions, "attention_mask": mask}).logits[0, -1])
        new.append(int(ends[-1].argmax()))
        run["input_ids"] = torch.cat([run["input_ids"], torch.tensor([[new[-1]]])], dim=1)
        run["mm_token_type_ids"] = torch.nn.functional.pad(run["mm_token_type_ids"], (0, 1))
        positions = torch.cat([positions, positions.amax(0, keepdim=True)[..., -1:].expand(3, -1, -1) + 1], dim=-1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return new, ends[0]


def require_the_reference(model: Model, prompt: list) -> None:
    inputs = model.prompt(prompt)
    full, kept = model.counts(inputs)
    assert any(sum(kept[token]) < sum(full[token]) for token in full)
    new, first = greedy_reference(model, inputs)
    result = generate(model.pruned, inputs, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(result.logits[0][0], first, **TOLERANCE)
    assert result.sequences[0, inputs["input_ids"].shape[1] :].tolist() == new
    torch.testing.assert_close(logits(model.pruned, inputs)[0, -1], first, **TOLERANCE)
    lost = sum(map(sum, full.values())) - sum(map(sum, kept.values()))
    assert result.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] - lost + NEW - 1


@covers("images")
@pytest.mark.parametrize("change", [{"method": "none"}, {"keep_ratio": 1.0}])
def test_keeping_all_equals_stock_bit_for_bit(model: Model, change: dict[str, Any]) -> None:
    model.pruned.set_vispruner_config(**change)
    for prompt in model.prompts():
        inputs = model.prompt(prompt)
        assert torch.equal(logits(model.pruned, inputs), logits(model.stock, inputs))
        assert torch.equal(generate(model.pruned, inputs), generate(model.stock, inputs))


@covers("images")
def test_one_image_equals_the_reference(model: Model) -> None:
    require_the_reference(model, ONE)
    dense, pruned = (logits(which, model.prompt(ONE))[0, -1] for which in (model.stock, model.pruned))
    assert not torch.allclose(dense, pruned, atol=1e-3)  # the tiny model can show a difference


@covers("several images")
def test_several_images_of_different_sizes_equal_the_reference(model: Model) -> None:
    require_the_reference(model, SEVERAL)


@covers("video", needs="video")
@pytest.mark.parametrize("prompt", [CLIP, MIXED], ids=["alone", "beside an image"])
def test_a_video_equals_the_reference(model: Model, prompt: list) -> None:
    require_the_reference(model, prompt)


RENUMBERED = [name for name, row in ROWS.items() if row.positions == "renumber"]


@pytest.mark.parametrize("model", RENUMBERED, indirect=True)
def test_original_positions_equal_the_full_prompt_with_dropped_tokens_masked_out(model: Model) -> None:
    """So `placeholders` says which token of the full prompt each kept one is."""
    model.pruned.set_vispruner_config(position_policy="original")
    for prompt in [ONE, SEVERAL, *([CLIP, MIXED] if "video" in model.row.modalities else [])]:
        inputs = model.prompt(prompt)
        dropped = dropped_columns(inputs, reference_of(model, inputs)[1])
        mask = inputs["attention_mask"].masked_fill(dropped, 0)
        expected = logits(model.stock, {**inputs, "attention_mask": mask})[0, -1]
        torch.testing.assert_close(logits(model.pruned, inputs)[0, -1], expected, **TOLERANCE)
        first = generate(model.pruned, inputs, return_dict_in_generate=True, output_logits=True).logits[0][0]
        torch.testing.assert_close(first, expected, **TOLERANCE)


@covers("batch")
def test_a_left_padded_batch_equals_its_rows(model: Model) -> None:
    inputs = model.prompt(*model.prompts())
    batch, last = answers(model.pruned, inputs), logits(model.pruned, inputs)[:, -1]
    for row, prompt in enumerate(model.prompts()):
        single = model.prompt(prompt)
        assert torch.equal(batch[row], answers(model.pruned, single)[0])
        torch.testing.assert_close(last[row], logits(model.pruned, single)[0, -1], **TOLERANCE)


@covers("batch")
def test_the_result_starts_with_the_callers_prompts(model: Model) -> None:
    inputs = model.prompt(*model.prompts())
    assert torch.equal(generate(model.pruned, inputs)[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@covers("batch")
def test_text_alone_equals_stock(model: Model) -> None:
    inputs = model.prompt(TEXT)
    assert torch.equal(logits(model.pruned, inputs), logits(model.stock, inputs))
    assert torch.equal(generate(model.pruned, inputs), generate(model.stock, inputs))


@covers("short prompts")
def test_prompts_with_the_kept_number_of_placeholders_give_the_same(model: Model) -> None:
    for prompts in ([ONE], [SEVERAL], model.prompts()):
        inputs = model.prompt(*prompts)
        short = model.row.shortened(inputs, model.counts(inputs)[1])
        assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
        assert torch.equal(answers(model.pruned, short), answers(model.pruned, inputs))
        expected = logits(model.pruned, inputs)[:, -1]
        torch.testing.assert_close(logits(model.pruned, short)[:, -1], expected, **TOLERANCE)


@covers("short prompts")
def test_any_other_number_of_placeholders_is_refused(model: Model) -> None:
    inputs = model.prompt(ONE)
    token = model.pruned._placeholder_ids[0]
    column = int((inputs["input_ids"][0] == token).nonzero()[0])
    for name in ("input_ids", "attention_mask", *TOKEN_TYPES):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name][:, :column], inputs[name][:, column + 1 :]], dim=1)
    for call in (model.pruned, model.pruned.generate):
        with pytest.raises(ValueError, match="placeholders"):
            call(**inputs)


@covers("beams")
def test_beams_of_a_batch_equal_those_of_its_rows(model: Model) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2}
    batch = answers(model.pruned, model.prompt(*model.prompts()), **options)
    for row, prompt in enumerate(model.prompts()):
        assert torch.equal(batch[2 * row : 2 * row + 2], answers(model.pruned, model.prompt(prompt), **options))
    assert not torch.equal(batch[0], batch[1])


@covers("static cache")
def test_a_static_cache_gives_the_same_and_is_as_long_as_the_pruned_prompt(model: Model) -> None:
    inputs = model.prompt(ONE)
    result = generate(model.pruned, inputs, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(result.sequences, generate(model.pruned, inputs))
    full, kept = model.counts(inputs)
    lost = sum(map(sum, full.values())) - sum(map(sum, kept.values()))
    assert result.past_key_values.layers[0].keys.shape[-2] <= inputs["input_ids"].shape[1] - lost + NEW


@covers("assisted")
def test_prompt_lookup_gives_the_same(model: Model) -> None:
    inputs = model.prompt(ONE)
    expected = generate(model.pruned, inputs)
    assert torch.equal(generate(model.pruned, inputs, prompt_lookup_num_tokens=2), expected)


@covers("assisted")
def test_decoding_equals_scoring_the_whole_in_one_pass(model: Model) -> None:
    """What the cache held while decoding was right: the same ids, scored at once, have the same logits."""
    inputs = model.prompt(ONE)
    result = generate(model.pruned, inputs, return_dict_in_generate=True, output_logits=True)
    whole = dict(inputs)
    new = result.sequences[:, inputs["input_ids"].shape[1] :]
    whole["input_ids"] = result.sequences
    whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    for name in TOKEN_TYPES & inputs.keys():
        whole[name] = torch.nn.functional.pad(inputs[name], (0, NEW), value=type_of_new_tokens(model))
    scored = logits(model.pruned, whole)[0, -NEW - 1 : -1]
    torch.testing.assert_close(torch.cat(result.logits), scored, **TOLERANCE)
    assert scored.argmax(-1).tolist() == new[0].tolist()


@covers("compile")
def test_generating_with_a_compiled_forward_gives_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    inputs = model.prompt(ONE)
    expected = generate(model.pruned, inputs)
    graphs = CompileCounter()
    monkeypatch.setattr(model.pruned, "forward", torch.compile(model.pruned.forward, backend=graphs))
    assert torch.equal(generate(model.pruned, inputs, cache_implementation="static"), expected)
    assert graphs.frame_count > 0


@covers("training")
def test_the_loss_is_finite_equal_for_both_prompt_forms_and_trains_the_encoder(model: Model) -> None:
    inputs = model.prompt(ONE, TEXT)
    short = model.row.shortened(inputs, model.counts(inputs)[1])
    losses = []
    for form in (inputs, short):
        labels = form["input_ids"].masked_fill(form["attention_mask"] == 0, -100)
        for token in model.pruned._placeholder_ids:
            labels = labels.masked_fill(form["input_ids"] == token, -100)
        losses.append(model.pruned(**copy.copy(form), labels=labels).loss)
    assert losses[0].isfinite()
    torch.testing.assert_close(losses[0], losses[1], **TOLERANCE)
    model.pruned.zero_grad()
    losses[0].backward()
    gradients = [p.grad for attention in model.pruned.model.vision_attentions for p in attention.parameters()]
    model.pruned.zero_grad()
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@covers("encoded images")
def test_images_encoded_once_answer_several_questions(model: Model) -> None:
    inputs = model.prompt(SEVERAL)
    described = {name: inputs[name] for name in model.pruned.modalities[0].described_by if name in inputs}
    pixels = model.pruned.modalities[0].pixels
    images = model.pruned.encode_images(inputs[pixels], **described)
    rest = {name: value for name, value in inputs.items() if name != pixels}
    assert torch.equal(generate(model.pruned, {**rest, "encoded_images": images}), generate(model.pruned, inputs))


@covers("save and load")
def test_a_saved_model_loads_pruned_from_its_own_code(model: Model, tmp_path: Path) -> None:
    model.pruned.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded).__name__ == type(model.pruned).__name__
    assert type(loaded).__module__.startswith("transformers_modules")
    for prompt in (ONE, SEVERAL):
        assert torch.equal(logits(loaded.eval(), model.prompt(prompt)), logits(model.pruned, model.prompt(prompt)))


@covers("thin")
def test_a_thin_repo_takes_its_weights_from_the_base(model: Model, tmp_path: Path) -> None:
    model.pruned.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    base = {"base_model_name_or_path": str(model.folder), "base_model_revision": "main"}
    config["vispruner_config"] |= {"weights": "thin", **base}
    (tmp_path / "config.json").write_text(json.dumps(config))
    thin = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True, attn_implementation="eager")
    assert torch.equal(logits(thin.eval(), model.prompt(ONE)), logits(model.pruned, model.prompt(ONE)))


@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_attention_functions_rank_alike(model: Model) -> None:
    """Eager and SDPA attention of the encoder are read the same way."""
    other = vispruner.load(model.folder, **model.row.options, attn_implementation="sdpa").eval()
    expected = logits(model.pruned, model.prompt(ONE))
    torch.testing.assert_close(logits(other, model.prompt(ONE)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [name for name in vispruner.SELECTORS if name != "vispruner"])
@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_every_method_prunes_as_much_or_says_what_it_lacks(model: Model, method: str, tmp_path: Path) -> None:
    inputs = model.prompt(*model.prompts())
    kept = model.counts(inputs)[1]
    width = model.pruned.config.get_text_config().hidden_size
    prototypes = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    codebook = save_codebook(prototypes, tmp_path / "codebook.safetensors", {})
    try:
        model.pruned.set_vispruner_config(method=method, seed=3, codebook=codebook)
    except ValueError as error:
        assert re.search(f'method "{method}" needs .*(CLS|grid)', str(error))
        return
    assert model.counts(inputs)[1] == kept
    assert torch.equal(answers(model.pruned, inputs), answers(model.pruned, inputs))


@pytest.mark.parametrize("name", ROWS)
def test_text_ids_mean_nothing_special(name: str) -> None:
    found = re.findall(r"\"\w*(?:token_id|token_index)\": (\d+)", ROWS[name].config().to_json_string())
    assert not {int(value) for value in found} & set(PLAIN)


def feature_table() -> str:
    """Return README's table: an architecture a line, and what the tests above cover of it."""
    tests = [value for value in globals().values() if hasattr(value, "column")]
    columns = list(dict.fromkeys(test.column for test in tests))
    lines = [f"| architecture (`model_type`) | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in ROWS:
        covered = {
            test.column
            for test in tests
            for mark in test.pytestmark
            if mark.args[0] == "model" and name in mark.args[1]
        }
        cells = ["✓" if column in covered else "" for column in columns]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_every_architecture_has_a_row() -> None:
    assert set(ROWS) == set(vispruner.ARCHITECTURES)


def test_readme_shows_the_table() -> None:
    assert feature_table() in README.read_text(), "run: python tests/test_architectures.py"


if __name__ == "__main__":
    print(feature_table(), file=sys.stdout)
