"""Verify is tested against broken repos: each is refused for its own reason, and a good one passes every check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

import vispruner
from vispruner import ARCHITECTURES, code_files
from vispruner.conversion import released_code, verify, verify_worker
from vispruner.conversion.base_checkpoint import BaseCheckpoint
from vispruner.conversion.build import build_repo
from vispruner.conversion.checkpoint_io import TensorHeader, read_tensor_headers, write_checkpoint
from vispruner.conversion.published_layout import layout_facts
from vispruner.conversion.verify import LIGHT_CHECKS, MODEL_CHECKS, Check, Report, forbidden_imports, verify_repo
from vispruner.conversion.verify_worker import Refused, Worker, compare_weights

STATIC_CHECKS = (
    "config.json",
    "files",
    "JSON files",
    "vispruner_config",
    "architectures",
    "auto_map",
    "code files",
    "imports",
    "processor files",
    "generation config",
    "weights",
)


def build(base: Path, folder: Path, architecture: str = "llava", **options: Any) -> Path:
    config = folder / "pruned.yaml"
    content = {
        "repo_id": "someone/pruned",
        "base_model": str(base),
        "architecture": architecture,
        "vispruner_config": options or {"visual_token_num": 16},
        "card": {"license": "apache-2.0"},
    }
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    return build_repo(config, folder / "out", show_progress=False)


@pytest.fixture(scope="module")
def good_repo(tiny_llava_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiny_llava_repo, tmp_path_factory.mktemp("good"))


@pytest.fixture
def repo(good_repo: Path, tmp_path: Path) -> Path:
    """A copy of the good repo that a test may break."""
    return Path(shutil.copytree(good_repo, tmp_path / "repo"))


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        pytest.fail("a repo that fails a static check must not be loaded")

    monkeypatch.setattr(verify, "_run_worker", refuse)


def statuses(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def edit_config(repo: Path, **changes: Any) -> None:
    """Change fields of config.json; a field set to `...` is removed."""
    path = repo / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}), encoding="utf-8")


def edit_tensors(repo: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(repo / "model.safetensors")
    change(tensors)
    save_file(tensors, repo / "model.safetensors", metadata={"format": "pt"})


def in_shards(repo: Path) -> list[Path]:
    tensors = load_file(repo / "model.safetensors")
    (repo / "model.safetensors").unlink()
    write_checkpoint(tensors.items(), repo, max_shard_size=300_000)
    return sorted(repo.glob("model-*.safetensors"))


# Good repos


@pytest.mark.core
def test_a_good_repo_passes_every_check(good_repo: Path, tiny_llava_repo: Path) -> None:
    report = verify_repo(good_repo, base=tiny_llava_repo)
    assert report.passed, report.table()
    names = (*STATIC_CHECKS, "files equal the base's", "weights equal the base's", *LIGHT_CHECKS, *MODEL_CHECKS)
    assert statuses(report) == dict.fromkeys(names, "pass")
    details = {check.name: check.detail for check in report.checks}
    assert details["KV length falls"].startswith("visual tokens 64 -> 16")
    assert details["keep-all equals stock"].endswith("LlavaForConditionalGeneration, bit for bit")
    assert report.table().splitlines()[-1] == f"verified: {good_repo} ({len(names)} passed, 0 failed)"


@pytest.mark.core
def test_llava_next_in_bfloat16_passes_in_paper_mode(tiny_llava_next_repo: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llava_next_repo, tmp_path / "base"))
    LlavaNextForConditionalGeneration.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    report = verify_repo(build(base, tmp_path, "llava_next", keep_ratio=0.25, tile_mode="paper"))
    assert set(statuses(report).values()) == {"pass"}, report.table()


@pytest.mark.core
def test_a_repo_that_keeps_all_tokens_is_shown_to_prune_when_told(tiny_llava_repo: Path, tmp_path: Path) -> None:
    report = verify_repo(build(tiny_llava_repo, tmp_path, method="none"))
    assert report.passed, report.table()
    (kv,) = (check for check in report.checks if check.name == "KV length falls")
    assert "64 -> 16" in kv.detail and "the stored budget keeps all" in kv.detail


@pytest.mark.core
def test_a_model_too_large_to_run_is_checked_without_and_says_so(good_repo: Path) -> None:
    report = verify_repo(good_repo, available_memory=2**20)
    assert report.passed, report.table()
    passed = dict.fromkeys((*STATIC_CHECKS, *LIGHT_CHECKS, "weights hash"), "pass")
    assert statuses(report) == {**passed, **dict.fromkeys(("weights equal the base's", *MODEL_CHECKS), "not run")}
    reasons = {check.detail for check in report.checks if check.name in MODEL_CHECKS}
    assert reasons == {"needs about 1.0 GiB of memory, 0.0 GiB are free"}
    assert "7 not run" in report.table().splitlines()[-1]


def test_the_memory_of_this_machine_is_known() -> None:
    assert 2**28 < verify.machine_memory() < 2**50


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("max", "5", 7 * 2**20), ("3000", "1000", 2000), ("1000", "3000", 0)]
)
def test_a_container_has_the_memory_that_is_left_of_its_limit(
    limit: str, used: str, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable:   {7 * 2**10} kB\n")
    (group := tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(verify, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert verify.machine_memory() == free


def test_a_model_needs_its_weights_a_quarter_more_and_a_gibibyte() -> None:
    headers = {"a": TensorHeader((2**28, 3), torch.float32, "f"), "b": TensorHeader((2**29,), torch.float16, "f")}
    weights = SimpleNamespace(tensor_headers=lambda: headers)
    assert verify.memory_needed(weights) == (4 + 1 + 1) * 2**30  # type: ignore[arg-type]


# Broken repos


def no_config(repo: Path) -> None:
    (repo / "config.json").unlink()


def other_model_type(repo: Path) -> None:
    edit_config(repo, model_type="mllama")


def no_vispruner_config(repo: Path) -> None:
    edit_config(repo, vispruner_config=...)


def no_budget(repo: Path) -> None:
    stored = json.loads((repo / "config.json").read_text(encoding="utf-8"))["vispruner_config"]
    edit_config(repo, vispruner_config={**stored, "visual_token_num": None})


def partial_vispruner_config(repo: Path) -> None:
    edit_config(repo, vispruner_config={"visual_token_num": 16})


def unknown_method(repo: Path) -> None:
    stored = json.loads((repo / "config.json").read_text(encoding="utf-8"))["vispruner_config"]
    edit_config(repo, vispruner_config={**stored, "method": "best"})


def stock_architectures(repo: Path) -> None:
    edit_config(repo, architectures=["LlavaForConditionalGeneration"])


def no_auto_map(repo: Path) -> None:
    edit_config(repo, auto_map=...)


def no_auto_model(repo: Path) -> None:
    entries = json.loads((repo / "config.json").read_text(encoding="utf-8"))["auto_map"]
    edit_config(repo, auto_map={name: entry for name, entry in entries.items() if name != "AutoModel"})


def altered_code(repo: Path) -> None:
    path = repo / "token_selection.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


def missing_code(repo: Path) -> None:
    (repo / "visual_attention.py").unlink()


def extra_code(repo: Path) -> None:
    (repo / "setup.py").write_text("import os\n", encoding="utf-8")


def imports_a_package(repo: Path) -> None:
    path = repo / "visual_attention.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nimport numpy as np\n", encoding="utf-8")


def no_processor(repo: Path) -> None:
    (repo / "processor_config.json").unlink()


def no_tokenizer(repo: Path) -> None:
    (repo / "tokenizer.json").unlink()


def no_pad_token(repo: Path) -> None:
    (repo / "generation_config.json").write_text('{"eos_token_id": 2}', encoding="utf-8")


def lm_head_removed(repo: Path) -> None:
    edit_tensors(repo, lambda tensors: tensors.pop("lm_head.weight"))


def lm_head_renamed(repo: Path) -> None:
    edit_tensors(
        repo, lambda tensors: tensors.update({"language_model.lm_head.weight": tensors.pop("lm_head.weight")})
    )


def lm_head_left_out_of_the_index(repo: Path) -> None:
    in_shards(repo)
    path = repo / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index), encoding="utf-8")


def other_shape(repo: Path) -> None:
    edit_tensors(
        repo, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:, :-1].contiguous()})
    )


def missing_shard(repo: Path) -> None:
    in_shards(repo)[1].unlink()


def stray_shard(repo: Path) -> None:
    save_file({"extra": torch.zeros(2)}, repo / "more.safetensors")


def truncated(repo: Path) -> None:
    path = repo / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def pickled_weights(repo: Path) -> None:
    torch.save({}, repo / "pytorch_model.bin")


BROKEN: list[tuple[Callable[[Path], None], str, str]] = [
    (no_config, "config.json", "has no config.json"),
    (other_model_type, "config.json", "model_type is 'mllama', supported are gemma3, "),
    (no_vispruner_config, "vispruner_config", "config.json has no vispruner_config"),
    (no_budget, "vispruner_config", "needs a budget"),
    (partial_vispruner_config, "vispruner_config", "vispruner_config lacks attention_layer"),
    (unknown_method, "vispruner_config", "'best' is not a registered selector"),
    (stock_architectures, "architectures", "['LlavaForConditionalGeneration'], it must be"),
    (no_auto_map, "auto_map", "config.json has no auto_map"),
    (no_auto_model, "auto_map", "AutoModel is None, not 'modeling_vispruner_llava."),
    (altered_code, "code files", "token_selection.py differs from the installed package's"),
    (missing_code, "code files", "visual_attention.py is missing"),
    (extra_code, "code files", "setup.py is not one of the package's files"),
    (imports_a_package, "imports", "imports numpy: not the standard library, torch or transformers"),
    (no_processor, "processor files", "no image processor"),
    (no_tokenizer, "processor files", "no tokenizer"),
    (no_pad_token, "generation config", "has no pad_token_id"),
    (lm_head_removed, "weights", "missing: lm_head.weight"),
    (lm_head_renamed, "weights", "missing: lm_head.weight; unexpected: language_model.lm_head.weight"),
    (lm_head_left_out_of_the_index, "weights", "also holds lm_head.weight"),
    (other_shape, "weights", "lm_head.weight is [512, 63], config.json asks for [512, 64]"),
    (missing_shard, "weights", "model.safetensors.index.json names model-00002-of-"),
    (stray_shard, "weights", "more.safetensors is in no index"),
    (truncated, "weights", "model.safetensors is truncated"),
    (pickled_weights, "weights", "pytorch_model.bin can run code"),
]
# Everything else has one reason.
SECOND_REASONS = {imports_a_package: {"code files"}, missing_code: {"imports"}}


@pytest.mark.core
@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(("spoil", "check", "reason"), BROKEN, ids=[spoil.__name__ for spoil, _, _ in BROKEN])
def test_a_broken_repo_is_refused_for_its_reason(
    spoil: Callable[[Path], None], check: str, reason: str, repo: Path
) -> None:
    spoil(repo)
    report = verify_repo(repo)
    assert not report.passed
    failures = {failure.name: failure.detail for failure in report.failures}
    assert reason in failures[check], failures
    assert failures.keys() == {check} | SECOND_REASONS.get(spoil, set())
    assert all(statuses(report)[name] == "not run" for name in (*LIGHT_CHECKS, *MODEL_CHECKS))
    assert report.table().splitlines()[-1].startswith(f"refused: {repo}")


def older(repo: Path) -> None:
    """Make the repo one that version 0.0.9 built, when a file was another one."""
    path = repo / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace(f'"{vispruner.__version__}"', '"0.0.9"'))
    (repo / "similarity.py").write_text((repo / "similarity.py").read_text(encoding="utf-8") + "\n# as it was\n")


@pytest.mark.usefixtures("no_process")
def test_code_of_another_version_is_refused_by_its_name(repo: Path) -> None:
    older(repo)
    (failure,) = verify_repo(repo).failures
    assert failure.name == "code files"
    assert f"vispruner 0.0.9 built the repo and this is {vispruner.__version__}: verify it with that" in failure.detail


@pytest.mark.core
def test_a_repo_of_an_older_release_is_verified_by_what_is_on_record_of_it(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older(repo)
    recorded = tmp_path / "released.json"
    recorded.write_text("{}")
    monkeypatch.setattr(released_code, "RELEASED", recorded)
    released_code.record()
    files = json.loads(recorded.read_text())
    assert files[vispruner.__version__]["llava_encoder.py"] == released_code.digest(repo / "llava_encoder.py")
    files["0.0.9"] = {**files[vispruner.__version__], "similarity.py": released_code.digest(repo / "similarity.py")}
    recorded.write_text(json.dumps(files))
    report = verify_repo(repo)
    assert report.passed, report.table()
    assert any("equal those of vispruner 0.0.9, which built the repo" in check.detail for check in report.checks)
    (repo / "similarity.py").write_text("# another")
    assert {failure.name for failure in verify_repo(repo).failures} == {"code files"}


@pytest.mark.usefixtures("no_process")
def test_the_table_has_every_name_whole_and_the_details_in_one_column() -> None:
    checks = (Check("short", "pass", "one"), Check("a name of some length", "pass", "two"))
    *lines, verdict = Report(Path("repo"), checks).table().splitlines()
    assert [line.split("  ")[-1].strip() for line in lines] == ["one", "two"]
    assert len({line.index(check.detail) for line, check in zip(lines, checks, strict=True)}) == 1
    assert all(check.name in line for line, check in zip(lines, checks, strict=True))
    assert verdict == "verified: repo (2 passed, 0 failed)"


def test_whatever_ends_a_check_is_a_reason_and_no_traceback(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a folder holds may end verify itself."""
    monkeypatch.setattr(verify, "foreign_code", lambda settings: 1 / 0)
    report = verify_repo(repo)
    assert not report.passed and any("ZeroDivisionError" in failure.detail for failure in report.failures)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    report = verify_repo(tmp_path / "absent")
    ((name, detail),) = [(failure.name, failure.detail) for failure in report.failures]
    assert name == "config.json"
    assert detail.startswith(
        f"{tmp_path / 'absent'} is not a folder: give one that `vispruner build` wrote, or get one"
    )


def lm_head_of_noise(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.randn_like(tensors["lm_head.weight"])


@pytest.mark.core
@pytest.mark.usefixtures("no_process")
def test_weights_that_are_not_the_bases_are_refused(repo: Path, tiny_llava_repo: Path) -> None:
    edit_tensors(repo, lm_head_of_noise)
    report = verify_repo(repo, base=tiny_llava_repo)
    assert [failure.detail for failure in report.failures] == [
        f"1 tensors are not those of {tiny_llava_repo}: lm_head.weight"
    ]


@pytest.mark.core
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors["lm_head.weight"].fill_(float("nan")), "lm_head.weight holds values that are not"),
        (
            lambda tensors: tensors["lm_head.weight"].copy_(tensors["model.language_model.embed_tokens.weight"]),
            "hold the same values",
        ),
    ],
)
def test_hashing_alone_finds_weights_that_cannot_be_right(
    change: Callable[[dict[str, torch.Tensor]], Any], reason: str, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_run_worker", lambda *args: [])
    edit_tensors(repo, change)
    (failure,) = verify_repo(repo, available_memory=0).failures
    assert failure.name == "weights hash" and reason in failure.detail


# The fresh process


@pytest.mark.core
def test_the_first_failure_in_the_fresh_process_ends_it_and_says_why(repo: Path) -> None:
    (repo / "tokenizer.json").write_text("{", encoding="utf-8")
    report = verify_repo(repo)
    (failure,) = report.failures
    assert failure.name == "AutoProcessor" and failure.detail
    assert all(statuses(report)[name] == "not run" for name in MODEL_CHECKS)
    assert statuses(report)["AutoConfig"] == "pass"


@pytest.mark.parametrize(
    ("script", "timeout", "detail"),
    [
        ("import sys; print('gone', file=sys.stderr); sys.exit(3)", 60.0, "exit status 3: gone"),
        ("import time; time.sleep(60)", 0.5, "no end after 0.5 s"),
    ],
)
@pytest.mark.core
def test_a_process_that_dies_or_hangs_is_a_failure(
    script: str, timeout: float, detail: str, good_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(script, encoding="utf-8")
    monkeypatch.setattr(verify_worker, "__file__", str(worker))
    report = verify_repo(good_repo, timeout=timeout)
    (failure,) = report.failures
    assert failure.name == "fresh process" and failure.detail.startswith(detail)


@pytest.mark.core
def test_the_process_starts_elsewhere_offline_and_with_caches_of_its_own(
    good_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    seen = "{name: os.environ[name] for name in ('HF_HUB_OFFLINE', 'HF_MODULES_CACHE', 'HF_HOME')}"
    worker.write_text(
        f"import json, os, sys; from pathlib import Path\n"
        f"Path(sys.argv[3]).write_text(json.dumps([('seen', 'pass', json.dumps([os.getcwd(), {seen}]))]))",
        encoding="utf-8",
    )
    monkeypatch.setattr(verify_worker, "__file__", str(worker))
    (check,) = (check for check in verify_repo(good_repo).checks if check.name == "seen")
    folder, environment = json.loads(check.detail)
    assert environment["HF_HUB_OFFLINE"] == "1"
    # Beside the working directory, which is empty.
    assert all(environment[name].startswith(str(Path(folder).parent)) for name in ("HF_MODULES_CACHE", "HF_HOME"))
    assert not Path(folder).exists()
    assert not good_repo.is_relative_to(folder)


# What the process checks can fail


def settings_for(repo: Path) -> dict[str, Any]:
    config = json.loads((repo / "config.json").read_text(encoding="utf-8"))
    facts = layout_facts(config, {name: header.shape for name, header in read_tensor_headers(repo).items()})
    return verify._worker_settings(config, BaseCheckpoint(repo), facts, run_models=True)


@pytest.fixture
def worker(good_repo: Path) -> Worker:
    """A worker that has loaded the good repo with the installed classes."""
    worker = Worker(good_repo, settings_for(good_repo))
    worker.model = ARCHITECTURES["llava"].model_class.from_pretrained(good_repo)
    worker.processor = AutoProcessor.from_pretrained(good_repo)
    return worker


def test_a_random_lm_head_is_found_in_a_loaded_model(worker: Worker) -> None:
    assert "tensors hash as in the files" in worker.check_weights()
    torch.nn.init.normal_(worker.model.lm_head.weight)
    with pytest.raises(Refused, match=r"1 loaded tensors are not those of the files: lm_head\.weight"):
        worker.check_weights()


def test_a_tensor_that_is_in_no_file_is_found(worker: Worker, repo: Path) -> None:
    edit_tensors(repo, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(Refused, match=r"1 loaded tensors are in no file: lm_head\.weight"):
        compare_weights(worker.model.state_dict(), [str(repo / "model.safetensors")], worker.stored_names)


def test_a_model_that_does_not_prune_is_found_by_its_cache(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = LlavaForConditionalGeneration.from_pretrained(worker.folder)
    monkeypatch.setattr(type(worker.model), "generate", lambda self, **inputs: stock.generate(**inputs))
    with pytest.raises(Refused, match=r"the KV cache holds \d+ tokens, \d+ are right"):
        worker.check_kv_length()


def test_wrong_token_counts_are_found(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(worker.model), "visual_token_counts", lambda self, pixel_values: ([64], [17]))
    with pytest.raises(Refused, match="64 placeholders, of which vispruner_config keeps 16"):
        worker.check_kv_length()


@pytest.mark.core
def test_logits_that_are_not_the_stock_ones_are_found(worker: Worker) -> None:
    with torch.no_grad():
        worker.model.lm_head.weight[5, 5] += 1.0
    with pytest.raises(Refused, match='the logits with method "none" are not those of LlavaForConditionalGeneration'):
        worker.check_keep_all()


def test_a_class_that_is_not_the_repos_own_is_refused(worker: Worker) -> None:
    with pytest.raises(Refused, match=r"AutoModel makes vispruner\.modeling_vispruner_llava.*not the repo's own"):
        worker._require_class(worker.model, "AutoModel")


@pytest.mark.core
def test_native_tiles_are_counted_by_the_cache_too(tiny_llava_next_repo: Path, tmp_path: Path) -> None:
    folder = build(tiny_llava_next_repo, tmp_path, "llava_next", visual_token_num=4, tile_mode="native")
    worker = Worker(folder, settings_for(folder))
    worker.model = ARCHITECTURES["llava_next"].model_class.from_pretrained(folder)
    worker.processor = AutoProcessor.from_pretrained(folder)
    assert "KV cache" in worker.check_kv_length()
    assert "bit for bit" in worker.check_keep_all()


@pytest.mark.parametrize("kind", ["missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"])
def test_any_key_in_a_loading_report_is_refused(kind: str) -> None:
    verify_worker.require_clean({}, "AutoModel")
    with pytest.raises(Refused, match=rf"AutoModel reports {kind} lm_head\.weight \(1 in all\)"):
        verify_worker.require_clean({kind: ["lm_head.weight"]}, "AutoModel")


# Imports


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("import math", True),
        ("from collections.abc import Callable", True),
        ("import torch.nn.functional as F", True),
        ("from transformers import LlavaConfig", True),
        ("from .token_selection import select_tokens", True),
        ("try:\n    import triton\nexcept ImportError:\n    triton = None", True),
        ("import triton", False),
        ("try:\n    pass\nexcept ImportError:\n    import triton", False),
        ("import numpy", False),
        ("def f():\n    import PIL.Image", False),
        ("try:\n    import numpy\nexcept ImportError:\n    numpy = None", False),
        ("from vispruner import load", False),
        ("from . import token_selection", False),
        ("from .token_selection.inner import x", False),
        ("from ..token_selection import x", False),
        ("from .absent import x", False),
        ('"""Explains:\n    from .absent import x\n"""', False),
    ],
)
def test_which_imports_a_published_file_may_have(line: str, allowed: bool, tmp_path: Path) -> None:
    path = tmp_path / "modeling.py"
    path.write_text(line + "\n", encoding="utf-8")
    problems = forbidden_imports(path, {"modeling", "token_selection"})
    assert (problems == []) == allowed, problems


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_packages_own_files_keep_to_the_rule(architecture: str) -> None:
    files = code_files(architecture)
    assert [forbidden_imports(path, {file.stem for file in files}) for path in files] == [[] for _ in files]
