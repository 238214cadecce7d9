"""Building a repo: what it holds for every kind of base; a bad base or a broken disk leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bases import (
    COMMIT,
    as_saved,
    as_saved_in_shards,
    copy_without_weights,
    edit_json,
    legacy_bin,
    legacy_bin_in_shards,
    legacy_in_shards,
    legacy_names,
    legacy_with_old_buffers,
    legacy_without_metadata,
    published,
    published_name,
    read_json,
    write_yaml,
)
from safetensors.torch import load_file, save_file
from tiny_llava import write_tiny_llava
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from vispruner import ARCHITECTURES, SELECTORS, auto_map, code_files
from vispruner.conversion import base_checkpoint, build
from vispruner.conversion.base_checkpoint import PROCESSOR_FILES, BuildError, resolve_base
from vispruner.conversion.build import build_repo
from vispruner.conversion.checkpoint_io import iter_checkpoint_tensors, write_checkpoint
from vispruner.conversion.published_layout import LayoutError, model_layout


def hashes(folder: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in iter_checkpoint_tensors(folder)
    }


@pytest.fixture(scope="module")
def built(tiny_llava_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    return build_repo(write_yaml(folder), folder / "out", base=tiny_llava_repo, show_progress=False)


@pytest.fixture
def base(tiny_llava_repo: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_llava_repo, tmp_path / "bases" / "copy"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to build into; after a failed build it must be empty again."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


# What a built repo holds


def test_config_is_the_bases_own_plus_four_fields(built: Path, tiny_llava_repo: Path) -> None:
    config, base_config = read_json(built / "config.json"), read_json(tiny_llava_repo / "config.json")
    ours = {name: config.pop(name) for name in ("architectures", "auto_map", "vispruner_config")}
    base_config.pop("architectures")
    assert config == base_config
    assert ours["architectures"] == ["VisPrunerLlavaForConditionalGeneration"]
    assert ours["auto_map"] == auto_map("llava")
    assert ours["vispruner_config"]["visual_token_num"] == 16
    assert ours["vispruner_config"]["base_model_name_or_path"] == "llava-hf/llava-1.5-7b-hf"
    assert ours["vispruner_config"]["base_model_revision"] == "main"


def test_code_and_processor_files_are_copied_byte_for_byte(built: Path, tiny_llava_repo: Path) -> None:
    sources = [*code_files("llava"), *(path for path in tiny_llava_repo.iterdir() if path.name in PROCESSOR_FILES)]
    assert len(sources) > len(code_files("llava")) + 3
    for source in sources:
        assert (built / source.name).read_bytes() == source.read_bytes(), source.name
    others = {"config.json", "generation_config.json", "README.md", "model.safetensors"}
    assert {path.name for path in built.iterdir()} == {path.name for path in sources} | others


def test_the_repo_loads_with_no_key_missing_and_answers_as_stock(built: Path, tiny_llava_repo: Path) -> None:
    model, report = ARCHITECTURES["llava"].model_class.from_pretrained(
        built, vispruner_config={"method": "none"}, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    stock = LlavaForConditionalGeneration.from_pretrained(tiny_llava_repo)
    ids = torch.tensor([[1, 40, 50, 60]])
    assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_the_card_names_base_license_and_how_to_load(built: Path) -> None:
    _, front, text = (built / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "llama2",
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "llava-hf/llava-1.5-7b-hf",
        "tags": ["vispruner", "visual-token-pruning"],
    }
    assert 'from_pretrained("someone/pruned", trust_remote_code=True' in text
    assert "Without `trust_remote_code=True`" in text


def test_the_cards_one_line_check_tells_a_pruned_model_from_a_stock_one(built: Path) -> None:
    line = re.search(r"^assert .*$", (built / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    pruned = ARCHITECTURES["llava"].model_class.from_pretrained(built)
    exec(line[0], {"model": pruned})
    with pytest.raises(AssertionError):
        exec(line[0], {"model": AutoModelForImageTextToText.from_pretrained(built, trust_remote_code=False)})


def test_llava_next_builds_with_its_newline(tiny_llava_next_repo: Path, tmp_path: Path) -> None:
    config = write_yaml(tmp_path, architecture="llava_next", vispruner_config={"keep_ratio": 0.25})
    out = build_repo(config, tmp_path / "out", base=tiny_llava_next_repo, show_progress=False)
    assert "model.image_newline" in hashes(out)
    assert read_json(out / "config.json")["architectures"] == ["VisPrunerLlavaNextForConditionalGeneration"]
    assert (out / "modeling_vispruner_llava_next.py").is_file()
    assert not (out / "modeling_vispruner_llava.py").exists()


def test_the_shipped_config_builds_without_network(tmp_path: Path) -> None:
    out = build_repo("tiny-llava-vispruner", tmp_path / "out", show_progress=False)
    assert read_json(out / "config.json")["vispruner_config"]["base_model_name_or_path"] == "embedded/tiny-llava"
    assert read_json(out / "config.json")["vispruner_config"]["visual_token_num"] == 18
    assert "base_model" not in yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_the_embedded_base_is_the_trained_checkpoint_in_the_package() -> None:
    folder = resolve_base("embedded/tiny-llava")
    assert folder == Path(build.__file__).parent / "assets" / "tiny-llava"
    assert read_json(folder / "config.json")["image_seq_length"] == 144
    assert (folder / "model.safetensors").stat().st_size < 10_000_000


# Every kind of base gives the same weights


@pytest.mark.parametrize(
    "write",
    [
        as_saved,
        as_saved_in_shards,
        legacy_in_shards,
        legacy_with_old_buffers,
        legacy_without_metadata,
        legacy_bin,
        legacy_bin_in_shards,
        published,
    ],
)
def test_every_kind_of_base_gives_the_same_published_weights(
    write: Callable[[Path, Path], None], tiny_llava_repo: Path, built: Path, tmp_path: Path
) -> None:
    base = copy_without_weights(tiny_llava_repo, tmp_path / "base")
    write(tiny_llava_repo, base)
    out = build_repo(write_yaml(tmp_path), tmp_path / "out", base=base, show_progress=False)
    assert hashes(out) == hashes(built)
    prefixes = {
        "lm_head.",
        "model.language_model.",
        "model.multi_modal_projector.",
        "model.vision_tower.vision_model.",
    }
    assert all(name.startswith(tuple(prefixes)) for name in hashes(out))
    assert not list(out.glob("*.bin*"))
    AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=False)


def sha256(path: Path, skip: int = 0) -> str:
    return hashlib.sha256(path.read_bytes()[skip:]).hexdigest()


def header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_shards_without_a_name_to_change_are_copied_byte_for_byte(tiny_llava_repo: Path, tmp_path: Path) -> None:
    base = copy_without_weights(tiny_llava_repo, tmp_path / "base")
    published(tiny_llava_repo, base)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    save_file(load_file(base / shards[0]), base / shards[0], metadata={"format": "pt", "made_by": "somebody"})
    out = build_repo(write_yaml(tmp_path), tmp_path / "out", base=base, show_progress=False)
    assert len(shards) > 2
    for name in shards:
        assert sha256(out / name) == sha256(base / name)
    assert read_json(out / "model.safetensors.index.json") == read_json(base / "model.safetensors.index.json")


def test_a_shard_with_a_name_to_change_keeps_its_bytes_behind_the_header(
    tiny_llava_repo: Path, tmp_path: Path
) -> None:
    base = copy_without_weights(tiny_llava_repo, tmp_path / "base")
    tensors = {
        name if name.startswith("vision") else published_name(name): tensor
        for name, tensor in legacy_names(tiny_llava_repo).items()
    }
    write_checkpoint(sorted(tensors.items()), base, max_shard_size=300_000)
    out = build_repo(write_yaml(tmp_path), tmp_path / "out", base=base, show_progress=False)
    same = []
    for path in sorted(base.glob("*.safetensors")):
        copied = out / path.name
        assert sha256(copied, header_size(copied)) == sha256(path, header_size(path))
        same.append(sha256(copied) == sha256(path))
        assert same[-1] == (not any(name.startswith("vision") for name in load_file(path)))
    assert True in same and False in same


def test_a_built_repo_is_a_base_too(built: Path, tmp_path: Path) -> None:
    config = write_yaml(tmp_path, vispruner_config={"keep_ratio": 0.5})
    out = build_repo(config, tmp_path / "out", base=built, show_progress=False)
    assert (out / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()
    options = read_json(out / "config.json")["vispruner_config"]
    assert (options["keep_ratio"], options["visual_token_num"]) == (0.5, None)


def test_building_twice_gives_the_same_bytes(built: Path, tiny_llava_repo: Path, tmp_path: Path) -> None:
    again = build_repo(write_yaml(tmp_path), tmp_path / "out", base=tiny_llava_repo, show_progress=False)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in built.iterdir()
    }


def test_renaming_a_shard_holds_one_block_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COPY_BLOCK", 2**20)
    source = tmp_path / "model.safetensors"
    save_file({"language_model.lm_head.weight": torch.randn(16, 2**20), "dropped": torch.randn(2**20)}, source)
    tracemalloc.start()
    with build.tqdm(disable=True) as progress:
        written = build.rename_safetensors(
            source, tmp_path / "renamed.safetensors", {"language_model.lm_head.weight": "lm_head.weight"}, progress
        )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
    assert written == {"lm_head.weight": 64 * 2**20}
    renamed = load_file(tmp_path / "renamed.safetensors")
    assert list(renamed) == ["lm_head.weight"]
    assert torch.equal(renamed["lm_head.weight"], load_file(source)["language_model.lm_head.weight"])


def test_two_names_that_become_one_are_refused(built: Path) -> None:
    layout = model_layout("llava", read_json(built / "config.json"))
    with pytest.raises(LayoutError, match="the checkpoint holds it twice"):
        layout.published_names(["lm_head.weight", "language_model.lm_head.weight"])


# Tied embeddings


@pytest.fixture
def tied_base(base: Path) -> Path:
    model = LlavaForConditionalGeneration.from_pretrained(base)
    model.config.tie_word_embeddings = True
    model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    assert not any("lm_head" in name for name in hashes(base))
    return base


def test_a_tied_lm_head_may_be_absent(tied_base: Path, tmp_path: Path) -> None:
    out = build_repo(write_yaml(tmp_path), tmp_path / "out", base=tied_base, show_progress=False)
    model, report = ARCHITECTURES["llava"].model_class.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_an_untied_lm_head_may_not(tied_base: Path, tmp_path: Path, place: Path) -> None:
    config = read_json(tied_base / "config.json")
    config["text_config"]["tie_word_embeddings"] = False
    edit_json(tied_base / "config.json", tie_word_embeddings=False, text_config=config["text_config"])
    with pytest.raises(BuildError, match=r"missing: lm_head\.weight"):
        build_repo(write_yaml(tmp_path), place / "out", base=tied_base, show_progress=False)
    assert list(place.iterdir()) == []


# Pad token


@pytest.mark.parametrize("has_generation_config", [True, False])
def test_the_pad_token_comes_from_the_tokenizer_where_the_generation_config_has_none(
    base: Path, tmp_path: Path, has_generation_config: bool
) -> None:
    pad = read_json(base / "generation_config.json")["pad_token_id"]
    (base / "generation_config.json").unlink()
    if has_generation_config:
        (base / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5}')
    out = build_repo(write_yaml(tmp_path), tmp_path / "out", base=base, show_progress=False)
    written = read_json(out / "generation_config.json")
    assert (written["pad_token_id"], written["eos_token_id"]) == (pad, 2)
    assert written.get("temperature") == (0.5 if has_generation_config else None)


def test_without_any_pad_token_the_end_token_is_used_and_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    edit_json(base / "config.json", pad_token_id=None)
    edit_json(base / "tokenizer_config.json", pad_token=None)
    out = build_repo(write_yaml(tmp_path), tmp_path / "out", base=base, show_progress=False)
    assert read_json(out / "generation_config.json")["pad_token_id"] == 2
    assert "gets the end token 2 as pad_token_id" in capsys.readouterr().out


# Where the base comes from


def test_a_hub_base_is_pinned_to_the_commit_its_branch_resolved_to(
    tiny_llava_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path(shutil.copytree(tiny_llava_repo, tmp_path / "hub" / "snapshots" / COMMIT))
    asked = []

    def download(repo_id: str, revision: str | None, allow_patterns: list[str], **settings: Any) -> str:
        asked.append((repo_id, revision, "*.safetensors" in allow_patterns, "pytorch_model*.bin" in allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(base_checkpoint, "snapshot_download", download)
    out = build_repo(write_yaml(tmp_path), tmp_path / "out", show_progress=False)
    base = "llava-hf/llava-1.5-7b-hf"
    assert asked == [(base, "main", False, False), (base, COMMIT, True, False)]
    assert read_json(out / "config.json")["vispruner_config"]["base_model_revision"] == COMMIT
    assert f"at `{COMMIT}`" in (out / "README.md").read_text(encoding="utf-8")


def test_bin_files_are_downloaded_only_where_there_are_no_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo_id: str, revision: str | None, allow_patterns: list[str], **settings: Any) -> str:
        asked.append([kind for kind in ("safetensors", "bin") if any(kind in pattern for pattern in allow_patterns)])
        return str(tmp_path)

    monkeypatch.setattr(base_checkpoint, "snapshot_download", download)
    resolve_base("someone/old")
    assert asked == [[], ["safetensors"], ["bin"]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "embedded/other",
            "embedded/other is not embedded in this package; embedded/tiny-llava and embedded/photo-llava are",
        ),
        ("./absent", "does not exist: give a checkpoint folder or a Hub id"),
        ("/absent/folder", "does not exist"),
        ("llava-hf/absent", "not in the local Hub cache.*give a checkpoint folder"),
        ("llava hf/absent", "neither a folder nor a valid Hub id"),
    ],
)
def test_a_base_that_cannot_be_found_says_what_to_give(
    name: str, reason: str, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError, match=reason):
        build_repo(write_yaml(tmp_path), place / "out", base=name, show_progress=False)
    assert list(place.iterdir()) == []


def test_a_file_is_no_base(tmp_path: Path) -> None:
    path = write_yaml(tmp_path)
    with pytest.raises(BuildError, match="is a file: give the folder"):
        resolve_base(str(path))


# Bases that are refused


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def replace_weights(base: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def no_config(base: Path) -> None:
    (base / "config.json").unlink()


def no_llava(base: Path) -> None:
    edit_json(base / "config.json", model_type="mllama")


def next_in_llava(base: Path) -> None:
    edit_json(base / "config.json", model_type="llava_next")


def no_cls(base: Path) -> None:
    vision = {**read_json(base / "config.json")["vision_config"], "model_type": "siglip_vision_model"}
    edit_json(base / "config.json", vision_config=vision)


def full_strategy(base: Path) -> None:
    edit_json(base / "config.json", vision_feature_select_strategy="full")


def no_image_processor(base: Path) -> None:
    (base / "processor_config.json").unlink()


def no_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def broken_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text("{")


def other_processor(base: Path) -> None:
    edit_json(base / "config.json", image_token_index=7)


def no_patch_size(base: Path) -> None:
    edit_json(base / "processor_config.json", patch_size=None)


def no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def missing_shard(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    write_checkpoint(tensors.items(), base, max_shard_size=300_000)
    sorted(base.glob("model-*.safetensors"))[1].unlink()


def truncated(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_with_code(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save({**tensors, "extra": RunsCode(base.parent / "executed")}, base / "pytorch_model.bin")


def plain_pickle_with_code(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(base.parent / "executed"), protocol=2))


def random_lm_head(base: Path) -> None:
    replace_weights(base, lambda tensors: tensors.pop("language_model.lm_head.weight"))


def renamed_lm_head(base: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.head.weight"] = tensors.pop("language_model.lm_head.weight")

    replace_weights(base, rename)


def other_shape(base: Path) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"][:-1].clone()

    replace_weights(base, shorten)


BAD_BASES: list[tuple[Callable[[Path], None], str]] = [
    (no_config, "has no config.json"),
    (no_llava, "model_type 'mllama', the YAML's architecture is 'llava': give another base"),
    (next_in_llava, "set architecture: llava_next in the YAML"),
    (no_cls, r"describes no model: .*got 'siglip_vision_model'.*\[CLS\]"),
    (full_strategy, "vision_feature_select_strategy must be .*'full'"),
    (no_image_processor, "has no image processor"),
    (no_tokenizer, "has no tokenizer"),
    (broken_tokenizer, "processor of the base .* does not load"),
    (other_processor, "image token is 508, config.json's is 7: processor and model do not belong together"),
    (no_patch_size, "has no patch_size"),
    (no_weights, "holds no weights"),
    (missing_shard, r"is incomplete: .* names model-00002-of-\d+.safetensors, which is not there"),
    (truncated, "model.safetensors is truncated"),
    (pickle_with_code, "pytorch_model.bin is refused.*could run code"),
    (plain_pickle_with_code, "pytorch_model.bin is refused.*could run code"),
    (random_lm_head, "missing: lm_head.weight"),
    (renamed_lm_head, "missing: lm_head.weight; unexpected: model.language_model.head.weight"),
    (other_shape, r"wrong shape: lm_head.weight is \[511, 64\], config.json asks for \[512, 64\]"),
]


@pytest.mark.parametrize(("spoil", "reason"), BAD_BASES, ids=[spoil.__name__ for spoil, _ in BAD_BASES])
def test_a_bad_base_is_refused_by_name_and_leaves_nothing(
    spoil: Callable[[Path], None], reason: str, base: Path, place: Path, tmp_path: Path
) -> None:
    spoil(base)
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        build_repo(write_yaml(tmp_path), place / "out", base=base, show_progress=False)
    assert list(place.iterdir()) == []
    assert not (base.parent / "executed").exists()


def test_options_that_the_model_refuses_fail_the_build(
    tiny_llava_next_repo: Path, place: Path, tmp_path: Path
) -> None:
    config = write_yaml(
        tmp_path,
        architecture="llava_next",
        vispruner_config={"visual_token_num": 4, "position_policy": "original", "tile_mode": "paper"},
    )
    with pytest.raises(BuildError, match=r"pruned\.yaml.*position_policy"):
        build_repo(config, place / "out", base=tiny_llava_next_repo, show_progress=False)
    assert list(place.iterdir()) == []


WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"method": "visionzip", "method_options": {"contextual_share": 5}},
        "contextual_share must be a number from 0 to",
    ),
    ({"method": "hiprune", "method_options": {"anchor_share": "a"}}, "anchor_share must be a number such as 0.1"),
    ({"method": "gprune", "method_options": {"temperature": 0}}, "temperature must be a number above 0, got 0"),
    ({"method": "prumerge", "method_options": {"neighbours": 0}}, "neighbours must be >= 1, got 0"),
    ({"method": "vidcom2", "method_options": {"share": 1}}, "method \"vidcom2\" has no option 'share'; it has none"),
    ({"method": "dart", "prune_layers": [1], "method_options": {"text_pivots": 0}}, "text_pivots must be >= 1, got 0"),
    ({"attention_layer": 99}, "attention_layer must be an encoder layer index in"),
]


@pytest.mark.parametrize(("options", "reason"), WRONG_OPTIONS, ids=[reason[:30] for _, reason in WRONG_OPTIONS])
def test_an_option_that_would_fail_when_the_repo_is_used_fails_the_build(
    options: dict[str, Any], reason: str, base: Path, place: Path, tmp_path: Path
) -> None:
    config = write_yaml(tmp_path, vispruner_config={"keep_ratio": 0.5, **options})
    with pytest.raises(BuildError, match=rf"^{re.escape(str(config))}: vispruner_config\.[^:]*(: )?{reason}"):
        build_repo(config, place / "out", base=base, show_progress=False)
    assert list(place.iterdir()) == []


@pytest.mark.core
def test_the_options_that_a_method_has_are_built_with(base: Path, place: Path, tmp_path: Path) -> None:
    for method in ("hiprune", "gprune", "scope", "mmr", "holov", "otprune", "visionzip", "prumerge_plus"):
        own = SELECTORS[method].options
        config = write_yaml(
            tmp_path, vispruner_config={"visual_token_num": 16, "method": method, "method_options": own}
        )
        out = build_repo(config, place / method, base=base, show_progress=False)
        assert json.loads((out / "config.json").read_text())["vispruner_config"]["method_options"] == own


# Where the repo goes to


def test_a_non_empty_output_is_refused_unless_told(built: Path, base: Path, place: Path, tmp_path: Path) -> None:
    out = place / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        build_repo(write_yaml(tmp_path), out, base=base, show_progress=False)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    build_repo(write_yaml(tmp_path), out, base=base, overwrite=True, show_progress=False)
    assert {path.name for path in out.iterdir()} == {path.name for path in built.iterdir()}
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_failed_overwrite_keeps_the_old_repo(base: Path, place: Path, tmp_path: Path) -> None:
    out = build_repo(write_yaml(tmp_path), place / "out", base=base, show_progress=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    truncated(base)
    with pytest.raises(ValueError, match="truncated"):
        build_repo(write_yaml(tmp_path), out, base=base, overwrite=True, show_progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize("inside", [".", "..", "out"])
def test_base_and_output_may_not_lie_in_one_another(base: Path, tmp_path: Path, inside: str) -> None:
    before = sorted(base.rglob("*"))
    with pytest.raises(BuildError, match="lie in one another"):
        build_repo(write_yaml(tmp_path), base / inside, base=base, overwrite=True, show_progress=False)
    assert sorted(base.rglob("*")) == before


def interrupted_copy(error: BaseException) -> Callable[..., None]:
    def copy(reader: Any, writer: Any, count: int, progress: Any) -> None:
        writer.write(reader.read(count // 2))
        raise error

    return copy


@pytest.mark.parametrize(
    ("error", "seen", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ValueError, "no space left"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (MemoryError("full"), MemoryError, "full"),
    ],
    ids=["disk full", "interrupted", "out of memory"],
)
def test_a_build_that_stops_half_way_leaves_nothing(
    error: BaseException,
    seen: type[BaseException],
    reason: str,
    base: Path,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "_copy_bytes", interrupted_copy(error))
    with pytest.raises(seen, match=reason):
        build_repo(write_yaml(tmp_path), place / "out", base=base, show_progress=False)
    assert list(place.iterdir()) == []


def test_no_permission_to_write_is_said(
    base: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        # The tests may run as root, whom no file mode stops.
        if place in self.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="no permission to write"):
        build_repo(write_yaml(tmp_path), place / "out", base=base, show_progress=False)
    assert list(place.iterdir()) == []


def test_progress_is_shown_unless_switched_off(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_repo(write_yaml(tmp_path), tmp_path / "quiet", base=base, show_progress=False)
    assert "weights:" not in capsys.readouterr().err
    build_repo(write_yaml(tmp_path), tmp_path / "loud", base=base)
    assert "weights: 100%" in capsys.readouterr().err


def test_a_mistral_text_model_builds(tmp_path: Path) -> None:
    base = write_tiny_llava(tmp_path / "mistral", image_size=56, text_model="mistral")
    out = build_repo(
        write_yaml(tmp_path, vispruner_config={"visual_token_num": 4}),
        tmp_path / "out",
        base=base,
        show_progress=False,
    )
    _, report = ARCHITECTURES["llava"].model_class.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
