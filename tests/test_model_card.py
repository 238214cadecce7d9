"""The model card: its metadata, figures and pictures are those on record, and what it tells a reader to run runs."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import DOCUMENTS
from huggingface_hub import ModelCard
from local_hub import LocalHub
from PIL import Image, ImageChops
from transformers import AutoProcessor

import vispruner
from vispruner.conversion.build import budget_config, build_repo
from vispruner.conversion.ceilings import ceiling_of_config
from vispruner.conversion.model_card import CITATION, PUBLISHED, REQUIRES, card_files, model_card
from vispruner.conversion.picture import kept_patches_picture, open_photo, view_budgets
from vispruner.conversion.questions import SCENE, scene_questions
from vispruner.conversion.repo_config import RESULTS, RepoConfig, RepoConfigError, hub_config_names, load_repo_config

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = "tiny-llava-vispruner"
PHOTO = "photo-llava-vispruner"  # tests/test_photo_repo.py has more about it
EMBEDDED = (TINY, "tiny-llava-divprune", "tiny-llava-fastv", PHOTO)
FIGURES = ("99.6 %", "96.6 %", "91.5 %", "98.6 %", "93.3 %", "86.7 %", "43.6", "1440")


def card_of(name: str, thin: bool = False) -> str:
    return model_card(load_repo_config(name), COMMIT, thin)


def python_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)


def tables(card: str, header: str) -> list[dict[str, list[str]]]:
    """Return the tables whose head row starts like this: first cell -> other cells; the head row itself is one."""
    found: list[dict[str, list[str]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", card, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        if rows[0][0] == header:
            found.append({row[0]: row[1:] for row in rows if set(row[0]) != {"-"}})
    return found


def write_yaml(folder: Path, card: Any, **changes: Any) -> Path:
    content = {
        "repo_id": "someone/pruned",
        "base_model": "embedded/tiny-llava",
        "architecture": "llava",
        "vispruner_config": {"visual_token_num": 18},
        "card": card,
        **changes,
    }
    path = folder / "pruned.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def record(stem: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{stem}.json").read_text(encoding="utf-8"))


def recorded_row(result: dict[str, Any], selector: str, ratio: float | None, count: int) -> dict[str, Any]:
    (row,) = (
        row
        for row in result["rows"]
        if (row["selector"], row["important_ratio"], row["visual_token_num"]) == (selector, ratio, count)
        and row["position_policy"] in (None, "renumber")
    )
    return row


# The metadata


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("name", [name for name in hub_config_names() if name not in EMBEDDED])
def test_the_metadata_of_a_real_base_reads_back_as_what_its_yaml_says(name: str, thin: bool) -> None:
    source = yaml.safe_load((ROOT / "hub_configs" / f"{name}.yaml").read_text())
    assert ModelCard(card_of(name, thin)).data.to_dict() == {
        "base_model": source["base_model"],
        "language": source["card"]["language"],
        "library_name": "transformers",
        **{name: text for name, text in source["card"].items() if name.startswith("license")},
        "pipeline_tag": "image-text-to-text",
        "tags": ["vispruner", "visual-token-pruning"],
    }


def test_the_metadata_of_the_tiny_repo_holds_what_was_measured_of_its_own_configuration() -> None:
    data = ModelCard(card_of(TINY)).data
    assert data.base_model is None, "an embedded base is no Hub id, which the Hub would refuse"
    assert data.model_name == TINY
    assert [(entry.dataset_type, entry.dataset_config) for entry in data.eval_results] == [
        ("scenes", "seed 0"),
        ("scenes", "seed 1"),
        ("easy-vqa", "seed 0"),
    ]
    for entry, stem in zip(data.eval_results, load_repo_config(TINY).card["results"], strict=True):
        result = record(stem)
        assert (entry.metric_type, entry.task_type) == ("accuracy", "image-text-to-text")
        assert entry.metric_value == recorded_row(result, "vispruner", 0.5, 18)["accuracy"]
        assert entry.metric_name == "right answers with 18 of 144 visual tokens"
        assert entry.dataset_args == {"questions": result["questions"], "pictures": result["pictures"]}


@pytest.mark.parametrize(
    "options",
    [
        {"visual_token_num": 17},
        {"visual_token_num": 18, "important_ratio": 0.4},
        {"visual_token_num": 18, "dedup_step": 4},
        {"visual_token_num": 18, "attention_layer": 2},
    ],
)
def test_a_configuration_that_was_not_measured_has_no_results_of_its_own(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    repo = load_repo_config(write_yaml(tmp_path, {"results": "accuracy-scenes-seed0"}, vispruner_config=options))
    card = model_card(repo, None, False)
    assert "model-index" not in ModelCard(card).data.to_dict()
    assert "Bold: this repository" not in card and "| **" not in card
    assert tables(card, "visual tokens kept"), "what was measured of other configurations is still shown"


def test_original_positions_have_their_own_rows(tmp_path: Path) -> None:
    options = {"visual_token_num": 18, "position_policy": "original"}
    repo = load_repo_config(write_yaml(tmp_path, {"results": "accuracy-scenes-seed0"}, vispruner_config=options))
    (entry,) = ModelCard(model_card(repo, None, False)).data.eval_results
    (row,) = (
        row
        for row in record("accuracy-scenes-seed0")["rows"]
        if (row["selector"], row["important_ratio"], row["visual_token_num"], row["position_policy"])
        == ("vispruner", 0.5, 18, "original")
    )
    assert entry.metric_value == row["accuracy"]


def test_every_other_field_of_the_card_reaches_the_metadata_or_the_text(tmp_path: Path) -> None:
    card = {
        "license": "other",
        "license_name": "toy-licence",
        "license_link": "https://example.org/licence",
        "language": ["en", "de"],
        "tags": ["toy", "vispruner"],
        "note": "A *note* about the base.",
        "citation": ["@misc{one,\n  year={1999}\n}\n", "@misc{two}"],
    }
    text = model_card(load_repo_config(write_yaml(tmp_path, card)), None, False)
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == tuple(card[name] for name in list(card)[:3])
    assert data.language == ["en", "de"]
    assert data.tags == ["vispruner", "visual-token-pruning", "toy"]
    assert "\nA *note* about the base.\n" in text
    assert "[toy-licence](https://example.org/licence)" in text
    assert re.findall(r"```bibtex\n(.*?)\n```", text, flags=re.DOTALL) == [
        CITATION,
        "@misc{one,\n  year={1999}\n}",
        "@misc{two}",
    ]


def test_a_card_links_to_what_its_yaml_names(tmp_path: Path) -> None:
    links = {"Documentation": "https://example.org/docs", "Space": "https://example.org/space"}
    text = model_card(load_repo_config(write_yaml(tmp_path, {"links": links, "new_version": "a/b"})), None, False)
    assert "\n[Documentation](https://example.org/docs) ·\n[Space](https://example.org/space)\n" in text
    assert ModelCard(text).data.new_version == "a/b"
    assert "new_version" not in card_of(TINY)


@pytest.mark.parametrize("name", hub_config_names())
def test_the_picture_comes_first_and_all_but_one_table_of_results_is_folded(name: str) -> None:
    card = card_of(name, thin=True)
    shown = re.sub(r"<details>.*?</details>", "", card, flags=re.DOTALL)
    top = shown.partition("## ")[0]
    assert "**The weights are not in this repository**: `from_pretrained` reads them from" in top
    assert "not in this repository" not in card_of(name, thin=False).partition("## ")[0]
    if picture := load_repo_config(name).card.get("picture"):
        assert top.index(f"]({picture}.png)") < top.index("visual token pruning. The weights are")
    results = [*tables(shown, "visual tokens kept"), *tables(shown, "visual tokens")]
    assert len(results) == (name in EMBEDDED or load_repo_config(name).base_model in PUBLISHED)
    assert tables(card, "property") and not tables(shown, "property")
    for block in re.findall(r"<details>\n(.*?)</details>", card, flags=re.DOTALL):
        assert re.match(r"<summary>[^\n]+</summary>\n\n.*\n\n\Z", block, flags=re.DOTALL), "else it is no Markdown"


def test_a_local_base_is_named_without_its_path(tiny_llava_repo: Path, tmp_path: Path) -> None:
    text = model_card(load_repo_config(write_yaml(tmp_path, None, base_model=str(tiny_llava_repo))), None, False)
    assert str(tiny_llava_repo.parent) not in text
    assert f"`{tiny_llava_repo.name}`" in text
    assert "base_model" not in ModelCard(text).data.to_dict()


# The text


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("name", hub_config_names())
def test_every_card_is_complete_and_the_same_each_time(name: str, thin: bool) -> None:
    repo, card = load_repo_config(name), card_of(name, thin)
    assert card == card_of(name, thin)
    assert re.findall(r"\{\{|\}\}(?!,)|\{%|%\}|\{#|\bNone\b|Undefined|\bTrue,\s*\|", card.split("```bibtex")[0]) == []
    assert "\n\n\n" not in card and not re.search(r"[ \t]+$", card, re.MULTILINE) and card.endswith("```\n")
    assert card.count("```") % 2 == 0
    assert [ast.parse(block) for block in python_blocks(card)]
    assert f"# {name}\n" in card and f'"{repo.repo_id}"' in card
    assert f"vispruner {vispruner.__version__}" in card or "vispruner from a checkout" in card
    for heading in ("Load it", "Change the budget", "Pin what you run", "What to expect", "Limits"):
        assert f"\n## {heading}\n\n" in card
    assert all(" | " in line for line in card.splitlines() if line.startswith("| "))


@pytest.mark.parametrize("name", hub_config_names())
def test_the_first_table_says_how_it_prunes(name: str) -> None:
    repo = load_repo_config(name)
    (rows,) = tables(card_of(name), "property")
    assert COMMIT in rows["base"][0]
    count, ratio = repo.vispruner_config["visual_token_num"], repo.vispruner_config["keep_ratio"]
    budget = f"{count} visual tokens per " if count is not None else f"{100 * ratio:g} % of the visual tokens of each "
    assert rows["budget"][0].startswith(budget)
    assert rows["method"][0].startswith(f"`{repo.vispruner_config['method']}`: keep ")
    if repo.vispruner_config["method"] == "vispruner":
        assert rows["`important_ratio`"][0].startswith("0.5: ")
        assert rows["`dedup_step`"][0].startswith("8 for every full 1,024 tokens of an image: ")
    assert ("tiles" in rows) == (repo.architecture == "llava_next")


@pytest.mark.parametrize(
    ("options", "shown", "absent"),
    [
        ({"keep_ratio": 0.125}, {"budget": "12.5 % of the visual tokens of each image"}, ["`seed`"]),
        ({"method": "random", "seed": 7, "keep_ratio": 0.5}, {"`seed`": "7: of the draw"}, ["`important_ratio`"]),
        ({"visual_token_num": 9, "attention_layer": 2}, {"attention": "of [CLS], in layer 2"}, []),
        ({"visual_token_num": 9, "position_policy": "original"}, {"positions": "those of the full prompt"}, []),
        ({"visual_token_num": 9, "important_ratio": 0.25}, {"`important_ratio`": "0.25: share of the budget"}, []),
        ({"visual_token_num": 9, "important_ratio": "auto"}, {"`important_ratio`": "auto: the most attended"}, []),
        ({"method": "otprune", "visual_token_num": 9}, {"method": "`otprune`: keep tokens that"}, ["attention"]),
        ({"method": "mmr", "visual_token_num": 9}, {"attention": "of [CLS], in the layer that gives"}, []),
        ({"visual_token_num": 9, "dedup_step": 8}, {"`dedup_step`": "8: tokens dropped per round"}, []),
        ({"method": "none"}, {"method": "`none`: nothing is dropped"}, ["budget", "positions"]),
        ({"method": "scope", "visual_token_num": 9}, {"attention": "of [CLS], in the layer that gives"}, ["`seed`"]),
        ({"method": "gprune", "visual_token_num": 9}, {"method": "`gprune`: keep the tokens that"}, ["attention"]),
        ({"method": "vtc_cls", "visual_token_num": 9}, {"attention": "of [CLS], in the layers that the method"}, []),
        ({"method": "hiprune", "visual_token_num": 9}, {"attention": "from all tokens of the image"}, []),
        (
            {"method": "codebook", "codebook": "tiny-llava-codebook.safetensors", "visual_token_num": 9},
            {"`codebook`": "tiny-llava-codebook.safetensors: the prototypes"},
            ["attention", "`dedup_step`"],
        ),
    ],
)
def test_the_first_table_follows_the_options(
    tmp_path: Path, options: dict[str, Any], shown: dict[str, str], absent: list[str]
) -> None:
    repo = load_repo_config(write_yaml(tmp_path, None, vispruner_config=options))
    (rows,) = tables(model_card(repo, None, False), "property")
    assert all(rows[name][0].startswith(text) for name, text in shown.items())
    assert not set(absent) & set(rows)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"visual_token_num": 18}, "visual_token_num=9"),
        ({"visual_token_num": 1}, "visual_token_num=1"),
        ({"keep_ratio": 0.5}, "keep_ratio=0.25"),
        ({"method": "none"}, 'method="vispruner", keep_ratio=0.25'),
    ],
)
def test_the_change_of_budget_it_shows_is_one_of_the_repos_own_kind(
    tmp_path: Path, options: dict[str, Any], changes: str
) -> None:
    repo = load_repo_config(write_yaml(tmp_path, None, vispruner_config=options))
    assert f"\nmodel.set_vispruner_config({changes})\n" in model_card(repo, None, False)


@pytest.mark.parametrize("name", hub_config_names())
def test_a_card_says_where_the_weights_are_and_what_happens_without_trust_remote_code(name: str) -> None:
    thin, full = card_of(name, thin=True), card_of(name, thin=False)
    assert "not in this repository: `from_pretrained` reads them" in thin
    assert "stops with an error about a\nmissing `model.safetensors`" in thin and "it is dense" not in thin
    assert "in this repository, equal to the base's" in full
    assert "it is dense,\nkeeps every visual token, and no warning says so" in full
    assert "missing `model.safetensors`" not in full


@pytest.mark.parametrize("name", hub_config_names())
def test_the_budget_branches_are_listed_as_in_the_yaml(name: str) -> None:
    budgets = yaml.safe_load((ROOT / "hub_configs" / f"{name}.yaml").read_text())["budgets"]
    (rows,) = tables(card_of(name), "`revision=`")
    del rows["`revision=`"]
    assert {branch.strip("`"): float(cells[0].split()[0]) for branch, cells in rows.items()} == {
        branch: field.get("visual_token_num", 100 * field.get("keep_ratio", 0)) for branch, field in budgets.items()
    }
    assert f'revision="{list(budgets)[-1]}"' in python_blocks(card_of(name))[-1]


def test_without_budget_branches_none_are_spoken_of(tmp_path: Path) -> None:
    assert "revision=`" not in model_card(load_repo_config(write_yaml(tmp_path, None)), None, False)


def test_the_versions_named_are_those_that_pyproject_allows() -> None:
    oldest, major = re.search(r'"transformers>=([\d.]+),<(\d+)"', PYPROJECT).groups()
    expected = f"{oldest} or a later {int(major) - 1}.x"
    assert expected == REQUIRES


# The figures


@pytest.mark.core
def test_published_figures_stand_only_in_the_cards_of_the_models_they_are_about() -> None:
    assert set(PUBLISHED) == {"llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"}
    expected = {"llava-1.5-7b-vispruner": FIGURES[:3], "llava-v1.6-vicuna-7b-vispruner": FIGURES[3:]}
    for name in hub_config_names():
        card = card_of(name)
        assert tuple(figure for figure in FIGURES if f"| {figure} |" in card) == expected.get(name, ())
        assert ("**not measured with this repository**" in card) == (name in expected)
        assert ("There are no figures here" in card) == (name not in expected and name not in EMBEDDED)
        assert ("Compare it on your own task" in card) == (name not in EMBEDDED)


@pytest.mark.parametrize(
    ("name", "full"), [("llava-1.5-7b-vispruner", "576 (all)"), ("llava-v1.6-vicuna-7b-vispruner", "2880 (all)")]
)
def test_published_figures_are_those_of_the_readme(name: str, full: str) -> None:
    (rows,) = tables(card_of(name), "visual tokens")
    assert rows["visual tokens"][0] == full
    row = f"| relative accuracy | {' | '.join(rows['relative accuracy'][1:])} |"
    head = f"of {full.split()[0]} tokens | {' | '.join(rows['visual tokens'][1:])} |"
    assert head in DOCUMENTS and row in DOCUMENTS[DOCUMENTS.index(head) :][:200]


def test_the_published_means_are_those_of_the_published_benchmarks() -> None:
    """Each mean is that of the ten ratios to the full model, within what rounding to one digit allows."""
    (rows,) = tables(card_of("llava-1.5-7b-vispruner"), "visual tokens")
    del rows["visual tokens"]
    means = [float(cell.rstrip(" %")) for cell in rows.pop("relative accuracy")]
    scores = [[float(cell) for cell in cells] for cells in rows.values()]
    assert len(scores) == 10
    ratios = [[100 * score / values[0] for score in values] for values in scores]
    assert [sum(column) / 10 for column in zip(*ratios, strict=True)] == pytest.approx(means, abs=0.1)


def test_measured_figures_are_the_recorded_ones() -> None:
    card, stems = card_of(TINY), load_repo_config(TINY).card["results"]
    found = tables(card, "visual tokens kept")
    assert len(found) == len(stems) == 3
    for rows, stem in zip(found, stems, strict=True):
        result = record(stem)
        counts = [int(cell) for cell in rows.pop("visual tokens kept")]
        assert counts == [72, 36, 18, 9] and len(rows) == {"scenes": 12, "easy-vqa": 6}[result["dataset"]]
        for name, cells in rows.items():
            selector = re.match(r"`(\w+)`", name)
            ratio = re.search(r"`important_ratio` ([\d.]+)", name)
            for count, cell in zip(counts, cells, strict=True):
                if selector is None:  # a smaller picture has a square of patches, as large as fits
                    row = recorded_row(result, "downsample", None, int(count**0.5) ** 2)
                else:
                    row = recorded_row(result, selector[1], ratio and float(ratio[1]), count)
                shown = f"{100 * row['accuracy']:.1f} ± {50 * (row['ci95'][1] - row['ci95'][0]):.1f}"
                own = name == "`vispruner`, `important_ratio` 0.5" and count == 18
                assert cell == (f"**{shown}**" if own else shown)
        dense = f"{100 * recorded_row(result, 'none', None, 144)['accuracy']:.1f}"
        assert f"With all 144 visual tokens {dense} ± " in card
        assert f"{result['questions']:,} questions about {result['pictures']} pictures" in card


@pytest.mark.core
def test_the_dates_and_versions_in_a_card_are_those_of_the_records() -> None:
    card, repo = card_of(TINY), load_repo_config(TINY)
    records = [record(stem) for stem in [repo.card["picture"], *repo.card["results"]]]
    dates = [sorted({run["date"] for run in (entry, *entry.get("further_runs", ()))}) for entry in records]
    assert re.findall(r"\d{4}-\d\d-\d\d", card) == [date for found in dates for date in found]
    for entry in records[1:]:
        versions = [f"{name} {entry['versions'][name]}" for name in ("python", "torch", "transformers")]
        assert f"vispruner from a checkout, {', '.join(versions)}." in card
    for name in set(hub_config_names()) - set(EMBEDDED):
        assert not re.search(r"\b20\d\d-\d\d-\d\d\b(?!-llava-next)", card_of(name))


def test_the_card_of_another_method_claims_nothing_of_vispruner() -> None:
    card, repo = card_of("tiny-llava-divprune"), load_repo_config("tiny-llava-divprune")
    assert "with visual token pruning by the method `divprune`" in card and "[VisPruner](" not in card
    assert "Removing duplicates" not in card
    for rows, stem in zip(tables(card, "visual tokens kept"), repo.card["results"], strict=True):
        row = recorded_row(record(stem), "divprune", None, 18)
        assert rows["`divprune`"][2].startswith(f"**{100 * row['accuracy']:.1f} ± ")
        assert sum(cell.startswith("**") for cells in rows.values() for cell in cells) == 1


# The pictures


@pytest.mark.parametrize("name", hub_config_names())
def test_a_card_shows_the_pictures_that_are_copied_beside_it(name: str) -> None:
    files = card_files(load_repo_config(name))
    assert re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", card_of(name)) == [path.name for path in files]
    assert all(path.is_file() for path in files)
    assert [path.name for path in files] == (
        [
            *{TINY: ["kept-patches-scene.png"], PHOTO: ["kept-patches-photos.png", "photos-seed0.png"]}.get(name, []),
            *(["accuracy-scenes-seed0.png"] if name in EMBEDDED and name != PHOTO else []),
        ]
    )


def test_what_the_cards_cite_and_show_is_in_the_package_and_nothing_else() -> None:
    (listed,) = re.findall(r'^"vispruner.benchmarks.results" = \[(.*?)^\]', PYPROJECT, re.MULTILINE | re.DOTALL)
    shipped = re.findall(r'"([^"]+)"', listed)
    assert '"vispruner.benchmarks.results" = "benchmarks/results"' in PYPROJECT
    needed = set()
    for repo in map(load_repo_config, hub_config_names()):
        stems = [*repo.card.get("results", ()), *filter(None, [repo.card.get("picture")])]
        needed |= {f"{stem}.json" for stem in stems} | {path.name for path in card_files(repo)}
    assert sorted(shipped) == sorted(needed)
    assert sum((RESULTS / name).stat().st_size for name in shipped) < 3_000_000


@pytest.mark.core
def test_the_recorded_picture_is_what_the_trained_checkpoint_gives() -> None:
    """Drawn anew it may differ by a font's edges, not by a patch or an answer."""
    folder, questions = SCENE.parent / "tiny-llava", scene_questions()
    model = vispruner.load(folder, visual_token_num=18).eval()
    panels = view_budgets(model, AutoProcessor.from_pretrained(folder), open_photo(SCENE), (36, 18, 9), questions)
    drawn = kept_patches_picture(panels, f"{SCENE.name} under several budgets", questions)
    with Image.open(RESULTS / "kept-patches-scene.png") as recorded:
        assert recorded.size == drawn.size
        difference = ImageChops.difference(recorded.convert("RGB"), drawn).convert("L")
    assert sum(difference.histogram()[64:]) < 0.005 * drawn.width * drawn.height


# What is refused

REFUSED = [
    ({"citation": "Liu et al. 2024"}, "card.citation must be BibTeX, which starts with @, got 'Liu et al. 2024'"),
    ({"citation": ["@misc{a}", 3]}, r"card.citation must be text, got 3 \(int\)"),
    ({"results": "accuracy-scenes-seed9"}, "card.results accuracy-scenes-seed9 is not on record.*did you mean"),
    ({"results": "../results/accuracy-scenes-seed0"}, "card.results .* is not on record"),
    ({"results": "kept-patches-scene"}, "card.results .* cannot stand in a card: it records no rows"),
    ({"picture": "accuracy-scenes-seed0"}, "card.picture .* cannot stand in a card: it records no command"),
    ({"picture": ["kept-patches-scene"]}, "card.picture must be text"),
    ({"links": "https://a"}, "card.links must hold names and addresses"),
    ({"links": {"Docs": "javascript:alert(1)"}}, "card.links.Docs must begin with https://"),
    ({"links": {"Docs": "https://a) [b](c"}}, "card.links.Docs must begin with https://"),
    ({"links": {"a] (b": "https://a"}}, "a name in card.links must be one line without brackets"),
    ({"links": {"a\nb": "https://a"}}, "a name in card.links must be one line without brackets"),
    ({"links": {3: "https://a"}}, "a name in card.links must be text"),
    ({"new_version": "gpt2"}, "card.new_version must be owner/name of a Hub repo"),
    ({"new_version": ["a/b"]}, "card.new_version must be text"),
    ({"notes": "a"}, "card.notes is not a field.*did you mean note"),
]


@pytest.mark.parametrize(("card", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_a_wrong_card_field_is_refused_by_file_and_name(tmp_path: Path, card: dict[str, Any], reason: str) -> None:
    with pytest.raises(RepoConfigError, match=f"(?s)pruned.yaml: .*{reason}"):
        load_repo_config(write_yaml(tmp_path, card))


@pytest.mark.parametrize("card", [{"results": "accuracy-scenes-seed0"}, {"picture": "kept-patches-scene"}])
def test_figures_of_another_base_are_refused(tmp_path: Path, card: dict[str, Any]) -> None:
    reason = "is about the base embedded/tiny-llava, not llava-hf/llava-1.5-7b-hf: leave it out"
    with pytest.raises(RepoConfigError, match=reason):
        load_repo_config(write_yaml(tmp_path, card, base_model="llava-hf/llava-1.5-7b-hf", base_revision="main"))


# What a reader runs, in a fresh process and from a Hub

NO_PACKAGE = "import sys\nsys.modules['vispruner'] = None\n"
REPORT = """
import json
shown = pipe.model if {pipe} else model
print('::' + json.dumps([
    type(shown).__name__, type(shown).__module__.partition('.')[0], shown.config.vispruner_config['visual_token_num']
]))
"""
Run = Callable[[str], "subprocess.CompletedProcess[str]"]


def publish(hub: LocalHub, repo: RepoConfig, built: Path) -> None:
    """Put a built repo on the Hub with its budget branches."""
    hub.add_repo(repo.repo_id)
    hub.commit(repo.repo_id, {path.name: path.read_bytes() for path in built.iterdir()})
    for branch, budget in repo.budgets.items():
        config = budget_config(json.loads((built / "config.json").read_text(encoding="utf-8")), budget)
        hub.commit(repo.repo_id, {"config.json": json.dumps(config).encode()}, revision=branch)


def reader_of(hub: LocalHub, home: Path) -> Run:
    """Return what runs a script as a reader of the card does, who has a photo and an empty cache."""
    home.mkdir()
    with Image.open(SCENE) as image:
        image.convert("RGB").save(home / "photo.jpg")
    environment = hub.client_env(home / "cache", OMP_NUM_THREADS="1")

    def run(script: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def tiny_card(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    """The card of the tiny repo as built, and a reader."""
    folder = tmp_path_factory.mktemp("card")
    repo = load_repo_config(TINY)
    built = build_repo(repo, folder / "built", show_progress=False)
    for path in card_files(repo):
        assert (built / path.name).read_bytes() == path.read_bytes()
    publish(hub, repo, built)
    return (built / "README.md").read_text(encoding="utf-8"), reader_of(hub, folder / "home")


def reported(done: subprocess.CompletedProcess[str]) -> list[list[Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("::")) for line in done.stdout.splitlines() if line.startswith("::")]


def with_reports(blocks: list[str]) -> str:
    return "".join(block + REPORT.format(pipe="pipe = pipeline" in block) for block in blocks)


@pytest.mark.core
def test_the_hub_accepts_the_metadata_of_every_card(hub: LocalHub) -> None:
    hub.add_user("someone", "hf_token")
    hub.add_repo("someone/cards")
    cards = [card_of(name, thin).encode() for name in hub_config_names() for thin in (False, True)]
    with hub.online("hf_token") as api:
        for card in cards:
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="someone/cards")
            assert hub.files("someone/cards")["README.md"] == card


@pytest.mark.core
def test_the_built_card_is_the_rendered_one_and_says_what_pruning_can_give(
    tiny_card: tuple[str, Run], tmp_path: Path
) -> None:
    folder = build_repo(TINY, tmp_path / "built", show_progress=False)
    limit = ceiling_of_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert tiny_card[0] == model_card(load_repo_config(TINY), None, False, ceiling=limit)
    assert f"What that can give at most, counted in operations: {limit} " in tiny_card[0]


@pytest.mark.core
def test_the_snippets_run_without_the_package(tiny_card: tuple[str, Run]) -> None:
    card, run = tiny_card
    blocks = [block for block in python_blocks(card) if "import vispruner" not in block]
    assert len(blocks) == len(python_blocks(card)) - 1 == 7
    done = run(NO_PACKAGE + with_reports(blocks))
    name = "VisPrunerLlavaForConditionalGeneration"
    assert reported(done) == [[name, "transformers_modules", budget] for budget in (18, 18, 18, 18, 9, 9, 9)]
    printed = [line for line in done.stdout.splitlines() if not line.startswith("::")]
    assert printed[1] == "([144], [18])"
    assert printed[0].strip() == printed[2].strip() != "", "the pipeline answers as the model does"


@pytest.mark.core
def test_the_packages_snippet_loads_the_repo_without_its_code(tiny_card: tuple[str, Run]) -> None:
    card, run = tiny_card
    (block,) = (block for block in python_blocks(card) if "import vispruner" in block)
    assert reported(run(with_reports([block]))) == [["VisPrunerLlavaForConditionalGeneration", "vispruner", 18]]


@pytest.mark.core
def test_without_trust_remote_code_a_full_repo_is_silently_dense_and_the_check_raises(
    tiny_card: tuple[str, Run],
) -> None:
    card, run = tiny_card
    load, check = (block.replace(", trust_remote_code=True", "") for block in python_blocks(card)[:2])
    done = run(load + "print('answered', type(model).__name__)\n" + check)
    assert done.returncode == 1 and done.stderr.rstrip().splitlines()[-1].startswith("AssertionError"), done.stderr
    assert "answered LlavaForConditionalGeneration" in done.stdout
    assert "trust_remote_code" not in done.stderr


# The same of a thin repo


@pytest.fixture(scope="module")
def thin_card(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    folder = tmp_path_factory.mktemp("thin-card")
    base, budgets = SCENE.parent / "tiny-llava", {"v36": {"keep_ratio": 0.25}}
    hub.add_repo("someone/base")
    commit = hub.commit("someone/base", {path.name: path.read_bytes() for path in base.iterdir()})
    where = {"repo_id": "someone/thin", "base_model": "someone/base", "base_revision": commit, "budgets": budgets}
    repo = load_repo_config(write_yaml(folder, {"license": "apache-2.0"}, **where))
    built = build_repo(repo, folder / "built", base=base, thin=True, show_progress=False)
    assert not list(built.glob("*.safetensors"))
    publish(hub, repo, built)
    return (built / "README.md").read_text(encoding="utf-8"), reader_of(hub, folder / "home")


@pytest.mark.core
def test_the_snippets_of_a_thin_repo_run(thin_card: tuple[str, Run]) -> None:
    card, run = thin_card
    blocks = [block for block in python_blocks(card) if "import vispruner" not in block]
    done = run(NO_PACKAGE + with_reports(blocks))
    name = "VisPrunerLlavaForConditionalGeneration"
    budgets = [18, 18, 18, 18, 9, 9, None]  # the branch has a keep_ratio
    assert reported(done) == [[name, "transformers_modules", budget] for budget in budgets]
    printed = [line for line in done.stdout.splitlines() if not line.startswith("::")]
    assert printed[1] == "([144], [18])"
    assert printed[0].strip() == printed[2].strip() != ""


@pytest.mark.core
def test_the_packages_snippet_loads_a_thin_repo(thin_card: tuple[str, Run]) -> None:
    card, run = thin_card
    (block,) = (block for block in python_blocks(card) if "import vispruner" in block)
    assert reported(run(with_reports([block]))) == [["VisPrunerLlavaForConditionalGeneration", "vispruner", 18]]


@pytest.mark.core
def test_without_trust_remote_code_a_thin_repo_is_an_error_about_its_weights(thin_card: tuple[str, Run]) -> None:
    card, run = thin_card
    load = python_blocks(card)[0].replace(", trust_remote_code=True", "")
    done = run(load)
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(r"^OSError: .*\bmodel\.safetensors\b", done.stderr, re.MULTILINE), done.stderr


@pytest.mark.parametrize("name", ["qwen2-vl-7b", "qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_a_card_says_why_its_method_is_not_vispruner(name: str) -> None:
    repo = load_repo_config(f"{name}-vispruner")
    assert repo.vispruner_config["method"] == "scope"
    card = model_card(repo, None, thin=True)
    assert "`scope` keeps the most of what this family can" in card and "Tables disagree" in card
    other = dataclasses.replace(repo, vispruner_config={**repo.vispruner_config, "method": "vispruner"})
    assert "Tables disagree" not in model_card(other, None, thin=True)


def test_where_an_encoder_has_a_class_token_the_method_is_vispruner() -> None:
    for name in ("llava-1.5-7b", "llava-v1.6-vicuna-7b", "internvl3-8b", "video-llava-7b"):
        assert load_repo_config(f"{name}-vispruner").vispruner_config["method"] == "vispruner"


@pytest.mark.parametrize("method", ["cdpruner", "trim"])
def test_a_card_says_that_the_question_chooses(method: str) -> None:
    repo = load_repo_config("llava-1.5-7b-vispruner")
    repo = dataclasses.replace(repo, vispruner_config={**repo.vispruner_config, "method": method})
    card = model_card(repo, None, thin=True)
    assert "Tokens are chosen by the question" in card and "without knowing the question" not in card
