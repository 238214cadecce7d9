"""The codebook of redundant tokens: whose prototypes it holds, that it is found again, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import vispruner
from vispruner.codebook_file import CodebookError, read_codebook
from vispruner.conversion import cli, codebook
from vispruner.conversion.codebook import build_codebook, save_codebook, write_codebook
from vispruner.related_selectors import redundancy


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, photo: Image.Image) -> Path:
    """A folder of three pictures and of something else."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, turn in enumerate((0, 90, 180)):
        photo.rotate(turn).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def projected_and_saliency(case, picture):
    """(tiles, N, D) and (tiles, N), from the parts of the stock model."""
    pixels = case.inputs("<image>", [picture])["pixel_values"].flatten(0, -4)
    model = case.model.model
    outputs = model.vision_tower(pixels, output_hidden_states=True)
    projected = model.multi_modal_projector(outputs.hidden_states[model.config.vision_feature_layer][:, 1:])
    case.model.set_vispruner_config(method="cls_attention")
    return projected, model.encode(pixels, None)[1].saliency


class TestBuilding:
    @pytest.mark.parametrize("case", ["llava", "next-paper"], indirect=True)
    def test_prototypes_are_the_visual_tokens_that_are_attended_to_least(self, case):
        before, picture = dict(case.model.config.vispruner_config), case.pictures[0]
        built = build_codebook(case.model, case.processor, [picture], prototypes=5)
        assert case.model.config.vispruner_config == before and "select" not in vars(case.model.model)

        with torch.no_grad():
            projected, saliency = projected_and_saliency(case, picture)
        assert built.dtype == torch.float32 and built.shape == (5, projected.shape[-1])
        distance = torch.cdist(built, projected.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist")
        assert (distance.min(dim=-1).values < 1e-4).all(), "each is a token of the picture"
        rank = saliency.argsort(dim=-1).argsort(dim=-1).flatten()  # 0: attended to least in its tile
        assert (rank[distance.argmin(dim=-1)] < saliency.shape[1] // 2).all()

    def test_more_prototypes_resemble_the_redundant_tokens_better(self, case):
        with torch.no_grad():
            projected, _ = projected_and_saliency(case, case.pictures[0])
        mean = [
            redundancy(projected, build_codebook(case.model, case.processor, case.pictures[:1], count)).mean()
            for count in (1, 4, 8)
        ]
        assert mean == sorted(mean) and mean[0] < mean[-1]

    def test_of_many_tokens_an_even_sample_is_compared(self, cases, monkeypatch):
        case = cases["llava"]
        everything = build_codebook(case.model, case.processor, case.pictures, 8)
        monkeypatch.setattr(codebook, "MOST_COMPARED", 16)
        sample = build_codebook(case.model, case.processor, case.pictures, 8)
        assert sample.shape == everything.shape and not torch.equal(sample, everything)
        assert torch.equal(sample, build_codebook(case.model, case.processor, case.pictures, 8)), "deterministic"

    @pytest.mark.parametrize(
        "count, message", [(0, "at least one prototype, got 0"), (33, "33 prototypes need .* got 32: give more pictu")]
    )
    def test_a_count_that_cannot_be_had_is_refused(self, cases, count, message):
        case = cases["llava"]
        with pytest.raises(CodebookError, match=message):
            build_codebook(case.model, case.processor, case.pictures[:1], count)


class TestFiles:
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
