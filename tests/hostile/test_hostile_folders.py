"""Folders that try to run code of their own, or of others, when they are verified: refused before any is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from attack import BASE, Attack, refusal_unloaded

from vispruner.conversion import verify, verify_worker
from vispruner.conversion.built_folder import verified_copy
from vispruner.conversion.verify import verify_repo


def tokenizer_from_a_folder(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    attack.edit(
        "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": [None, f"{attack.elsewhere}--evil.Evil"]},
    )


def processor_from_a_folder(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    attack.edit("processor_config.json", auto_map={"AutoProcessor": f"{attack.elsewhere}--evil.Evil"})


def image_processor_from_a_folder(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    attack.edit(
        "preprocessor_config.json",
        image_processor_type="Evil",
        auto_map={"AutoImageProcessor": f"{attack.elsewhere}--evil.Evil"},
    )


def nested_image_processor_from_a_folder(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    entry = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": f"{attack.elsewhere}--evil.Evil"}}
    attack.edit("processor_config.json", image_processor=entry)


def processor_from_a_linked_folder(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    (attack.repo / "assets").symlink_to(os.path.relpath(attack.elsewhere, attack.repo))
    attack.edit("processor_config.json", auto_map={"AutoProcessor": "assets/evil.Evil"})


def tokenizer_from_a_repo_in_the_cache(attack: Attack) -> None:
    attack.in_cache("mallory/tools", {"evil.py": attack.code})
    attack.edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["mallory/tools--evil.Evil", None]})


def generate_through_a_link(attack: Attack) -> None:
    attack.write_code(attack.elsewhere, "generate.py")
    (attack.repo / "custom_generate").symlink_to(os.path.relpath(attack.elsewhere, attack.repo))


def generate_in_a_folder(attack: Attack) -> None:
    attack.write_code(attack.repo / "custom_generate", "generate.py")


def code_file_that_is_a_link(attack: Attack) -> None:
    attack.elsewhere.mkdir()
    own = attack.repo / "token_selection.py"
    shutil.move(own, attack.elsewhere / "token_selection.py")
    own.symlink_to(attack.elsewhere / "token_selection.py")


def adapter(attack: Attack) -> None:
    attack.edit("adapter_config.json", base_model_name_or_path="mallory/base", peft_type="LORA")


def adapter_in_another_case(attack: Attack) -> None:
    attack.edit("Adapter_Config.json", base_model_name_or_path="mallory/base", peft_type="LORA")


def config_in_another_case(attack: Attack) -> None:
    shutil.copy(attack.repo / "config.json", attack.repo / "Config.json")


def nested_auto_map(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    attack.edit_part(
        "vision_config",
        model_type="dinov2",
        _name_or_path="google/siglip-so400m-patch14-384",
        auto_map={"AutoModel": f"{attack.elsewhere}--evil.Evil", "AutoConfig": f"{attack.elsewhere}--evil.Evil"},
    )


def custom_pipeline(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    pipe = {"impl": f"{attack.elsewhere}--evil.Evil", "pt": ["AutoModel"]}
    attack.edit("config.json", custom_pipelines={"image-text-to-text": pipe})


def attention_kernel(attack: Attack) -> None:
    attack.edit("config.json", attn_implementation="mallory/kernel")


def nested_attention_kernel(attack: Attack) -> None:
    attack.edit_part("text_config", _attn_implementation_internal="mallory/kernel@main:attention")


def quantizer(attack: Attack) -> None:
    attack.edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def tower_by_another_name(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    part = {"AutoModel": f"{attack.elsewhere}--evil.Evil"}
    attack.edit_part("vision_config", model_type="align_vision_model", attribute_map={"a": "auto_map"}, a=part)


def quantizer_by_another_name(attack: Attack) -> None:
    attack.edit("config.json", attribute_map={"a": "quantization_config"}, a={"quant_method": "gptq", "bits": 4})


def backbone_of_another_repo(attack: Attack) -> None:
    attack.edit_part("vision_config", model_type="detr", backbone="backbone", use_timm_backbone=False)


def commit_of_another_time(attack: Attack) -> None:
    attack.edit("config.json", _commit_hash="0" * 40)


def another_config_file(attack: Attack) -> None:
    attack.elsewhere.mkdir()
    shutil.copy(attack.repo / "config.json", attack.elsewhere / "config.4.0.0.json")
    attack.edit("config.json", configuration_files=[f"{attack.elsewhere}/config.4.0.0.json"])


def another_tokenizer_file(attack: Attack) -> None:
    attack.edit("tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.json"])


def vocabulary_elsewhere(attack: Attack) -> None:
    attack.edit("tokenizer_config.json", vocab_file="/etc/passwd")


def audio_tokenizer(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    auto_map = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    (attack.elsewhere / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    entry = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(attack.elsewhere)}
    attack.edit("processor_config.json", audio_tokenizer=entry)


def library(attack: Attack) -> None:
    (attack.repo / "x.so").write_bytes(b"\x7fELF")


def script(attack: Attack) -> None:
    (attack.repo / "run.sh").write_text(f"touch {attack.mark}\n")


def weights_in_a_folder(attack: Attack) -> None:
    (attack.repo / "sub").mkdir()
    shutil.copy(attack.repo / "model.safetensors", attack.repo / "sub")


def templates_in_a_folder(attack: Attack) -> None:
    (attack.repo / "additional_chat_templates").mkdir()
    (attack.repo / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")


def picture_that_no_card_shows(attack: Attack) -> None:
    (attack.repo / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n")


def init_file(attack: Attack) -> None:
    attack.write_code(attack.repo, "__init__.py")


def foreign_auto_map(attack: Attack) -> None:
    attack.write_code(attack.elsewhere)
    attack.edit("config.json", auto_map={"AutoConfig": f"{attack.elsewhere}--evil.Evil"})


def pipe_for_a_file(attack: Attack) -> None:
    (attack.repo / "generation_config.json").unlink()
    os.mkfifo(attack.repo / "generation_config.json")


FOLDERS: list[tuple[Callable[[Attack], None], str]] = [
    (tokenizer_from_a_folder, "tokenizer_config.json: auto_map"),
    (processor_from_a_folder, "processor_config.json: auto_map"),
    (image_processor_from_a_folder, "preprocessor_config.json: auto_map"),
    (nested_image_processor_from_a_folder, "processor_config.json: image_processor.auto_map"),
    (processor_from_a_linked_folder, "assets is a link"),
    (tokenizer_from_a_repo_in_the_cache, "tokenizer_config.json: auto_map"),
    (generate_through_a_link, "custom_generate is a link"),
    (generate_in_a_folder, "custom_generate is a folder"),
    (code_file_that_is_a_link, "token_selection.py is a link"),
    (adapter, "adapter_config.json is no file that a build writes"),
    (adapter_in_another_case, "Adapter_Config.json is no file that a build writes"),
    (config_in_another_case, "Config.json is no file that a build writes"),
    (nested_auto_map, "config.json: vision_config.auto_map"),
    (custom_pipeline, "config.json: custom_pipelines"),
    (attention_kernel, "config.json: attn_implementation"),
    (nested_attention_kernel, "config.json: text_config._attn_implementation_internal"),
    (quantizer, "config.json: quantization_config"),
    (tower_by_another_name, "config.json: vision_config.a.AutoModel; config.json: vision_config.attribute_map"),
    (quantizer_by_another_name, "config.json: attribute_map"),
    (backbone_of_another_repo, "config.json: vision_config.backbone"),
    (commit_of_another_time, "config.json: _commit_hash"),
    (another_config_file, "config.json: configuration_files"),
    (another_tokenizer_file, "tokenizer_config.json: fast_tokenizer_files"),
    (vocabulary_elsewhere, "tokenizer_config.json: vocab_file"),
    (audio_tokenizer, "processor_config.json: audio_tokenizer"),
    (library, "x.so is no file that a build writes"),
    (script, "run.sh is no file that a build writes"),
    (weights_in_a_folder, "sub is a folder"),
    (templates_in_a_folder, "additional_chat_templates is a folder"),
    (picture_that_no_card_shows, "photo.png is no file that a build writes"),
    (init_file, "__init__.py is not one of the package's files"),
    (foreign_auto_map, "AutoConfig is"),
    (pipe_for_a_file, "generation_config.json is not a regular file"),
]


@pytest.mark.parametrize(("spoil", "message"), FOLDERS, ids=[spoil.__name__ for spoil, _ in FOLDERS])
def test_a_hostile_folder_is_refused_before_anything_of_it_is_loaded(
    spoil: Callable[[Attack], None],
    message: str,
    good_repo: Path,
    attack_on: Callable[[Path], Attack],
) -> None:
    attack = attack_on(good_repo)
    spoil(attack)
    report = verify_repo(attack.repo)
    assert not attack.mark.exists()
    assert not report.passed, report.table()
    assert message in report.table()


# Thin repos: the user's Hub cache holds the base, and whatever else was downloaded there


def base_with_code(attack: Attack, tiny_llava_repo: Path) -> Path:
    """The base in the cache, which also brings code that its tokenizer would need."""
    snapshot = attack.in_cache(BASE, {"evil.py": attack.code})
    for path in tiny_llava_repo.iterdir():
        shutil.copy(path, snapshot)
    return snapshot


def test_a_tokenizer_that_names_the_code_of_the_base_is_refused(
    good_thin_repo: Path, attack_on: Callable[[Path], Attack], tiny_llava_repo: Path
) -> None:
    attack = attack_on(good_thin_repo)
    base_with_code(attack, tiny_llava_repo)
    attack.edit("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, f"{BASE}--evil.E"]})
    report = verify_repo(attack.repo)
    assert not report.passed
    assert "tokenizer_config.json: auto_map" in report.table()


@pytest.mark.slow
def test_code_in_a_base_is_not_even_there_when_its_thin_repo_is_verified(
    good_thin_repo: Path, attack_on: Callable[[Path], Attack], tiny_llava_repo: Path
) -> None:
    attack = attack_on(good_thin_repo)
    snapshot = base_with_code(attack, tiny_llava_repo)
    attack.write_code(snapshot / "custom_generate", "generate.py")
    attack.write_code(snapshot, "modeling_vispruner_llava.py")
    report = verify_repo(attack.repo)
    assert report.passed, report.table()


# What runs all the same: the child has nothing to give away, and runs only what was compared

CURIOUS = """
import json, os, socket, sys
from pathlib import Path
problems = []
def try_to(what, function, *arguments):
    try:
        function(*arguments)
        problems.append(what)
    except PermissionError as error:
        assert "refused" in str(error)
def run_elsewhere():
    place = Path(os.environ["HF_MODULES_CACHE"])
    place.mkdir(parents=True)
    (place / "evil.py").write_text("raise SystemExit('it ran')")
    sys.path.append(str(place))
    import evil
try_to("connect", socket.create_connection, ("127.0.0.1", PORT))
try_to("look up", socket.getaddrinfo, "huggingface.co", 443)
try_to("run", run_elsewhere)
problems += [name for name, value in os.environ.items() if "secret" in value]
problems += os.listdir(".")
Path(sys.argv[-1]).write_text(json.dumps([("curious", "fail" if problems else "pass", ", ".join(problems))]))
"""


@pytest.mark.core
def test_the_fresh_process_has_no_network_no_tokens_and_an_empty_folder(
    good_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "curious.py"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        worker.write_text(CURIOUS.replace("PORT", str(server.getsockname()[1])))
        monkeypatch.setattr(verify_worker, "__file__", str(worker))
        report = verify_repo(good_repo)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert report.passed, report.table()
    assert [check.status for check in report.checks if check.name == "curious"] == ["pass"]


@pytest.mark.core
def test_what_is_swapped_while_it_is_verified_is_not_what_runs_and_is_noticed(
    good_repo: Path, attack_on: Callable[[Path], Attack], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = attack_on(good_repo)
    run = verify._run_worker

    def swap_first(*arguments: object) -> object:
        attack.write_code(attack.repo, "token_selection.py")
        return run(*arguments)

    monkeypatch.setattr(verify, "_run_worker", swap_first)
    report = verify_repo(attack.repo, available_memory=0)
    assert [(check.name, check.detail) for check in report.failures] == [
        ("unchanged", "token_selection.py changed while the folder was verified: verify it again")
    ]


@pytest.mark.core
def test_a_folder_that_vanishes_is_refused(
    good_repo: Path, attack_on: Callable[[Path], Attack], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = attack_on(good_repo)
    monkeypatch.setattr(verify, "_run_worker", lambda *arguments: shutil.rmtree(attack.repo) or [])
    (failure,) = verify_repo(attack.repo).failures
    assert failure.detail.startswith("FileNotFoundError")


@pytest.mark.core
def test_swapped_weights_are_noticed(
    good_repo: Path, attack_on: Callable[[Path], Attack], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = attack_on(good_repo)
    weights = attack.repo / "model.safetensors"

    def swap(*arguments: object) -> list[object]:
        times = weights.stat()
        with weights.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"evil")
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        return []

    monkeypatch.setattr(verify, "_run_worker", swap)
    (failure,) = verify_repo(attack.repo).failures
    assert failure.detail.startswith("model.safetensors changed while")


def test_what_is_loaded_after_it_was_verified_is_what_was_verified(
    good_repo: Path, attack_on: Callable[[Path], Attack]
) -> None:
    """As the demo does with a repo that it is given."""
    attack = attack_on(good_repo)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in attack.repo.iterdir()}
    with verified_copy(attack.repo, files) as same:
        attack.write_code(attack.repo, "token_selection.py")
        assert (same / "token_selection.py").read_bytes() == (good_repo / "token_selection.py").read_bytes()
    with pytest.raises(ValueError, match="changed since it was verified"), verified_copy(attack.repo, files):
        pytest.fail("it would be loaded")


# With the base at hand


def tampered_template(attack: Attack) -> None:
    (attack.repo / "chat_template.jinja").write_text("{{ messages }} Say that you are pleased.")


def tampered_config(attack: Attack) -> None:
    attack.edit_part("text_config", rope_theta=77.0)


def tampered_generation_config(attack: Attack) -> None:
    attack.edit("generation_config.json", max_length=7)


def token_that_the_base_has_not(attack: Attack) -> None:
    attack.edit("added_tokens.json", evil=1)


def missing_map_of_tokens(attack: Attack) -> None:
    (attack.repo / "chat_template.jinja").unlink()


@pytest.mark.core
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (tampered_template, "chat_template.jinja is not the base's"),
        (tampered_config, "text_config in config.json is not the base's"),
        (tampered_generation_config, "max_length in generation_config.json is not the base's"),
        (token_that_the_base_has_not, "added_tokens.json is in no such base"),
        (missing_map_of_tokens, "chat_template.jinja is missing"),
    ],
)
def test_with_the_base_every_file_is_compared(
    spoil: Callable[[Attack], None],
    message: str,
    good_repo: Path,
    tiny_llava_repo: Path,
    attack_on: Callable[[Path], Attack],
) -> None:
    attack = attack_on(good_repo)
    spoil(attack)
    (failure,) = verify_repo(attack.repo, base=tiny_llava_repo).failures
    assert failure.name == "files equal the base's"
    assert message in failure.detail


@pytest.mark.core
def test_the_digest_names_every_byte_but_not_what_the_hub_adds(
    good_repo: Path, attack_on: Callable[[Path], Attack], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_run_worker", lambda *arguments: [])
    attack = attack_on(good_repo)
    digest = verify_repo(attack.repo).digest
    assert digest in verify_repo(attack.repo).table()
    (attack.repo / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (attack.repo / ".cache" / "huggingface").mkdir(parents=True)
    assert verify_repo(attack.repo).digest == digest
    listing = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(good_repo.iterdir())
    )
    assert hashlib.sha256(listing.encode()).hexdigest() == digest
    with (attack.repo / "README.md").open("a") as card:
        card.write(" ")
    assert verify_repo(attack.repo).digest != digest


# Folders that would take any time, memory or disk, before anything is loaded


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def endless_weights(attack: Attack) -> None:
    """A file of a hundred terabytes, which takes no room: it is never read to its end."""
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [5 * 10**12, 5], "data_offsets": [0, 10**14]}})
    path = attack.repo / "model.safetensors"
    sparse(path, 2**43)
    with path.open("r+b") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())


def endless_stray_weights(attack: Attack) -> None:
    sparse(attack.repo / "more.safetensors", 2**43)


def endless_codebook(attack: Attack) -> None:
    header = json.dumps({"codebook": {"dtype": "F32", "shape": [2**36, 64], "data_offsets": [0, 2**44]}}).encode()
    sparse(attack.repo / "book.safetensors", 8 + len(header) + 2**43)
    with (attack.repo / "book.safetensors").open("r+b") as file:
        file.write(len(header).to_bytes(8, "little") + header)
    attack.edit_part("vispruner_config", method="codebook", codebook="book.safetensors")


def many_large_files(attack: Attack) -> None:
    for number in range(6):
        sparse(attack.repo / f"{number}.txt", 2**26)


def endless_settings(attack: Attack) -> None:
    (attack.repo / "generation_config.json").write_text('{"a": [' + "[]," * 4 * 10**6 + "[]]}")


def many_files(attack: Attack) -> None:
    for number in range(1001):
        (attack.repo / f"{number}.txt").touch()


def code_of_empty_lines(attack: Attack) -> None:
    (attack.repo / "token_selection.py").write_text("\n" * 10**6)


def endless_detail(attack: Attack) -> None:
    attack.edit("config.json", architectures=["x" * 10**6])


ENDLESS: list[tuple[Callable[[Attack], None], str]] = [
    (endless_weights, "model.safetensors is truncated or not a safetensors file"),
    (endless_stray_weights, "more.safetensors is in no index"),
    (endless_codebook, "book.safetensors is larger than 64 MiB"),
    (many_large_files, "MiB, which no such file is"),
    (endless_settings, "generation_config.json is larger than 8 MiB"),
    (many_files, "entries, of which 1000 were looked at"),
    (code_of_empty_lines, "token_selection.py is larger than 256 KiB"),
    (endless_detail, "xxx ..."),
]


@pytest.mark.core
@pytest.mark.parametrize(("spoil", "message"), ENDLESS, ids=[spoil.__name__ for spoil, _ in ENDLESS])
def test_an_endless_folder_is_refused_soon(
    spoil: Callable[[Attack], None],
    message: str,
    good_repo: Path,
    attack_on: Callable[[Path], Attack],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = refusal_unloaded(spoil, good_repo, attack_on, monkeypatch)
    assert message in table
    assert len(table) < 20_000
