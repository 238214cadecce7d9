"""How the cost of choosing grows: what can be counted, the benchmark that measures the rest, and its recorded run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from documents import DOCUMENTS
from matrix import pair
from rows import Image, Video, rows
from safetensors.torch import save_file

from vispruner.conversion import verify_worker
from vispruner.selector_registry import Selection
from vispruner.selectors import ENCODER_METHODS, SELECTORS, Selector

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import dedup_step  # noqa: E402
import large_checkpoints  # noqa: E402
import scaling  # noqa: E402

MERGING = ["visionzip", "tome", "prumerge", "prumerge_plus"]
# All tokens with each other, or those of a part.
COMPARING = [
    "vispruner",
    "gprune",
    "divprune",
    "scope",
    "adts",
    "holov",
    "mmr",
    "otprune",
    "prunesid",
    "cdpruner",
    *MERGING,
]


def counted(method: str, tokens: int, channels: int = 64, features: str = "random", images: int = 1) -> scaling.Counts:
    args = scaling.parse(["--channels", str(channels)])
    form = scaling.form_of(method, scaling.inputs(images, tokens, args, features))
    with torch.inference_mode(), scaling.Counts() as counts:
        form()
    return counts


@pytest.mark.parametrize("features", ["random", "smooth"])
@pytest.mark.parametrize("method", ENCODER_METHODS)
@pytest.mark.parametrize("tokens", [600, 3000])
def test_a_method_multiplies_all_rows_with_all_rows_about_once(method, tokens, features):
    """...or not at all; the codebook's 64 rows are not all."""
    products = counted(method, tokens, features=features).multiplications / (tokens**2 * 64)
    assert (products == 0) == (method not in [*COMPARING, "codebook"])
    assert products <= 1.15


@pytest.mark.core
@pytest.mark.parametrize("method", ENCODER_METHODS)
def test_the_operations_of_a_method_grow_no_faster_than_what_it_keeps(method):
    """Twice the tokens: twice the picks, and rows that are multiplied in twice as many blocks of half as many rows."""
    few, many = (counted(method, tokens, channels=4).operations for tokens in (2200, 4400))
    assert many <= 2.3 * few + 20


@pytest.mark.parametrize("method", ENCODER_METHODS)
def test_a_method_says_whether_its_saliency_has_to_be_read(method):
    given = scaling.inputs(1, 64, scaling.parse(["--channels", "16"]), "random")
    rows = []
    for seed in range(4):
        saliency = torch.rand(1, 64, generator=torch.Generator().manual_seed(seed))
        made = scaling.form_of(method, given | {"saliency": saliency})()
        rows.append((made if isinstance(made, Selection) else Selection(made)).take(given["features"]))
    assert SELECTORS[method].by_saliency == any(not torch.equal(rows[0], other) for other in rows[1:])


# Many at once


@pytest.mark.parametrize("method", ENCODER_METHODS)
def test_64_small_images_take_hardly_more_operations_than_one(method):
    one, many = (counted(method, 64, images=images).operations for images in (1, 64))
    draws = 2 * 63 if method == "random" else 0  # image by image on the host
    assert many <= one + draws + 4


def features_of(model, inputs):
    """Encode the images or, where they go by a name of their own, the videos of a prompt."""
    pixels = [
        name for name in inputs if "pixel" in name or name in ("image_grid_thw", "video_grid_thw", "image_sizes")
    ]
    videos = "pixel_values_videos" in inputs
    encode = model.model.get_video_features if videos else model.model.get_image_features
    first = "pixel_values_videos" if videos else "pixel_values"  # by place, since its name differs between versions
    first = first if first in inputs else pixels[0]
    with torch.no_grad():
        return encode(inputs[first], **{name: inputs[name] for name in pixels if name != first})


@pytest.mark.parametrize("row", [row for row in rows() if "video" in row.modalities], ids=lambda row: row.model_type)
def test_pruning_a_video_adds_as_many_operations_for_256_frames_as_for_64(row):
    """Stock's own, which some encoders repeat for every frame, are taken off."""
    models = pair(row)
    added = []
    for frames in (64, 256):
        inputs = row.inputs([[[11], Video(frames, (56, 56)), [12]]])
        of_models = []
        for model in models:
            with scaling.Counts() as counts:
                features_of(model, inputs)
            of_models.append(counts.operations)
        added.append(of_models[1] - of_models[0])
    assert added[0] > 0 and added[1] <= added[0] + 8


class Seen:
    """How often a selector was called, and of how many tokens of how many images."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setitem(SELECTORS, "leading", Selector(self.select, {}))

    def select(self, features, saliency, visual_token_num):
        self.calls.append(tuple(saliency.shape))
        return torch.arange(visual_token_num, device=saliency.device).expand(len(saliency), -1)


@pytest.mark.parametrize("tile_mode", ["paper", "native"])
@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row.model_type)
def test_the_encoder_runs_once_and_the_method_once_per_size(row, tile_mode, monkeypatch):
    """Three times the same pictures of two sizes: no more calls than of those once, of three times as many images."""
    seen, runs = Seen(monkeypatch), []
    _, pruned = pair(row, method="leading", tile_mode=tile_mode)
    pruned.model.vision_attentions[0].register_forward_hook(lambda *_: runs.append(1))
    calls = []
    for times in (1, 3):
        seen.calls.clear()
        runs.clear()
        features_of(pruned, row.inputs([[[11], Image(size), [12]] for size in [(56, 84), (84, 112)] * times]))
        assert len(runs) == 1
        calls.append(sorted(seen.calls))
    assert len(set(calls[0])) == len(calls[0])
    assert calls[1] == [(3 * images, tokens) for images, tokens in calls[0]]


@pytest.mark.core
def test_the_quick_mode_fills_every_table(tmp_path):
    out, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--quick", "--json", str(out), "--plot", str(picture)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    for features in ("random", "smooth"):
        rows = result["sizes"][features]
        assert [(row["tokens"], row["kept"]) for row in rows] == [(64, 16), (128, 32), (256, 64)]
        for row in rows:
            assert row["ratio"].keys() == set(ENCODER_METHODS)
            assert row["milliseconds"].keys() == {scaling.PRODUCT, *ENCODER_METHODS}
            assert row["products"][scaling.PRODUCT] == 1 and row["operations"]["scope"] > row["operations"]["random"]
        assert result["exponents"][features].keys() == rows[0]["milliseconds"].keys()
    assert {(row["tokens"], row["images"]) for row in result["batches"]} == {(64, 1), (64, 4), (256, 1), (256, 4)}
    assert [row["patches"] for row in result["attention"]] == [64, 256]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(f"\n{method} " in run.stdout for method in ENCODER_METHODS)


def test_an_exponent_is_fitted_to_the_logarithms():
    rows = [{"tokens": n, "milliseconds": {"a": {"median": 3 * n**1.5}}} for n in (10, 100, 1000)]
    assert scaling.exponents(rows) == {"a": 1.5}
    assert scaling.exponents(rows[:1]) == {}


def test_the_first_token_of_qwen_is_mostly_its_encoder_and_its_weights():
    """7.07 billion weights of the language model's layers and logits, 0.63 of the encoder's layers."""
    text = scaling.first_token_flops(4, 1000, 0) - scaling.first_token_flops(4, 0, 0)
    attention = 4 * 1000**2 * 3584 * 28
    assert (text - attention) / 2000 == pytest.approx(6.53e9, rel=0.01)
    encoder = scaling.first_token_flops(5184, 1296) - scaling.first_token_flops(4, 1296)
    assert encoder / (2 * 4 * 5184) == pytest.approx(0.63e9, rel=0.5), "and half as much again for attention"


@pytest.mark.parametrize("wrong", [["--sizes", "2"], ["--kept", "1"], ["--repeats", "0"]])
def test_impossible_settings_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        scaling.parse(wrong)
    assert "at least" in capsys.readouterr().err


# Large checkpoints

TENTH_OF_7B = 1_300_000_000  # bytes


def hollow_base(folder, size=TENTH_OF_7B, shard=130_000_000):
    """A base whose language model has so many bytes of weights, in ten shards that hold nothing: holes on disk."""
    width, mlp = 1024, 2752
    a_layer = 2 * (4 * width**2 + 3 * width * mlp + 2 * width)
    widths = {"hidden_size": width, "intermediate_size": mlp, "num_attention_heads": 8, "num_key_value_heads": 8}
    large_checkpoints.hollow_checkpoint(folder, size // a_layer, widths, 512, shard)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def yaml_for(folder):
    path = folder / "pruned.yaml"
    path.write_text(
        f"repo_id: someone/pruned\nbase_model: someone/base\nbase_revision: {'a' * 40}\narchitecture: llava\n"
        "vispruner_config: {visual_token_num: 18}\ncard: {license: apache-2.0}\n"
    )
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the bytes that a process reads and writes are known on Linux")
def test_a_tenth_of_a_7b_base_is_read_once_and_written_once(tmp_path):
    """...with no more in memory than a few blocks of the copy, whatever a shard holds."""
    size = hollow_base(tmp_path / "base")
    assert size > 0.9 * TENTH_OF_7B
    program = f"""
        import threading, re
        from vispruner.conversion import build

        def of(file, name):
            return int(re.search(rf"{{name}}:\\s+(\\d+)", open(f"/proc/self/{{file}}").read())[1])

        published = build.write_published_weights

        def watched(*args, **kwargs):
            open("/proc/self/clear_refs", "w").write("5")
            before = of("io", "rchar"), of("io", "wchar"), of("status", "VmRSS")
            published(*args, **kwargs)
            after = of("io", "rchar"), of("io", "wchar"), of("status", "VmHWM")
            print("counted", *(new - old for new, old in zip(after, before)))

        build.write_published_weights = watched
        config, out, base = {[str(yaml_for(tmp_path)), str(tmp_path / "out"), str(tmp_path / "base")]!r}
        build.build_repo(config, out, base, thin=False)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("counted"))
    read, written, memory = map(int, line.split()[1:])
    assert size - 2**20 <= read <= size + 2**20
    assert size - 2**20 <= written <= size + 2**20
    assert memory <= 4 * 16 * 1024  # KiB; a block of the copy has 16 MiB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the bytes that a process reads are known on Linux")
def test_verifying_a_tenth_of_7b_reads_it_once_and_maps_one_shard_after_the_other(tmp_path):
    """What `verify` itself does, the model not loaded: hashed as it is read, then every tensor from a mapped file."""
    shard = 130_000_000
    size = hollow_base(tmp_path / "base", shard=shard)
    program = f"""
        import re
        from vispruner.conversion.build import build_repo
        from vispruner.conversion.verify import verify_repo

        def of(file, name):
            return int(re.search(rf"{{name}}:\\s+(\\d+)", open(f"/proc/self/{{file}}").read())[1])

        config, out, base = {[str(yaml_for(tmp_path)), str(tmp_path / "out"), str(tmp_path / "base")]!r}
        build_repo(config, out, base, thin=False)
        open("/proc/self/clear_refs", "w").write("5")
        before = of("io", "rchar"), of("status", "VmRSS")
        report = verify_repo(out, available_memory=2**20)
        print("counted", of("io", "rchar") - before[0], of("status", "VmHWM") - before[1])
        print("checks", *(check.name for check in report.checks if check.status == "pass"), sep="|")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "|weights hash" in run.stdout, run.stdout
    read, memory = map(int, next(line for line in run.stdout.splitlines() if line.startswith("counted")).split()[1:])
    assert size - 2**20 <= read <= 1.5 * size, "what the fresh process imports counts, too; twice would be twice"
    assert memory * 1024 <= 3 * shard


def test_comparing_hashes_reads_every_stored_tensor_once_and_holds_one(tmp_path, monkeypatch):
    """What `verify` does to a loaded model and the files: one tensor at a time is alive beside the model."""
    state = {f"layer.{number}.weight": torch.full((256, 256), float(number)) for number in range(40)}
    for part in range(4):
        names = list(state)[part::4]
        save_file({name: state[name] for name in names}, tmp_path / f"model-{part}.safetensors")
    reads, alive, most = [], 0, 0

    def watched(files):
        nonlocal alive, most
        for name, tensor in stored(files):
            reads.append(name)
            alive += 1
            most = max(most, alive)
            weakref.finalize(tensor, gone)
            yield name, tensor
            del tensor

    def gone():
        nonlocal alive
        alive -= 1

    stored = verify_worker.stored_tensors
    monkeypatch.setattr(verify_worker, "stored_tensors", watched)
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    assert verify_worker.compare_weights(state, files, {name: name for name in state}) == 40
    assert sorted(reads) == sorted(state)
    assert most <= 2  # the next one is read while the loop still names the last


@pytest.mark.core
def test_a_thin_build_of_a_large_base_reads_headers_alone(tmp_path):
    """The shards are holes of 1.3 GB: reading them would take that much, and the process may not."""
    size = hollow_base(tmp_path / "base")
    program = f"""
        from pathlib import Path
        import re
        from vispruner.conversion.build import build_repo
        build_repo({str(yaml_for(tmp_path))!r}, {str(tmp_path / "out")!r}, {str(tmp_path / "base")!r}, thin=True)
        status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else "RssFile: 0"
        print("mapped", re.search(r"RssFile:\\s+(\\d+)", status)[1])
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    mapped = next(int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("mapped"))
    assert mapped * 1024 < size / 2
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_recorded_conversions_held_less_than_a_shard_or_two():
    recorded = json.loads((BENCHMARKS / "results" / "large-checkpoints.json").read_text())
    convert, thin = recorded["convert"], recorded["thin"]
    assert convert["tensor_bytes"] > 12.9e9
    assert convert["peak_mib"] * 2**20 < 2 * convert["largest_shard_bytes"]
    assert convert["written_bytes"] < 1.01 * convert["result_bytes"]
    assert thin["weights"] > 72e9
    assert thin["peak_mib"] < 512 and thin["written_bytes"] < 2**20


# The recorded run


@pytest.fixture(scope="module")
def recorded():
    return json.loads((BENCHMARKS / "results" / "scaling.json").read_text())


@pytest.mark.parametrize("features", ["random", "smooth"])
def test_the_recorded_run_stays_below_the_bars(recorded, features):
    rows = {row["tokens"]: row for row in recorded["sizes"][features]}
    assert list(rows) == scaling.SIZES and recorded["settings"]["channels"] == 1280
    for tokens, most in scaling.BARS.items():
        assert all(ratio["median"] <= most for ratio in rows[tokens]["ratio"].values())
    assert all(exponent <= scaling.MOST_EXPONENT for exponent in recorded["exponents"][features].values())


def test_the_readme_shows_the_recorded_run(recorded):
    assert scaling.markdown(recorded) in DOCUMENTS


def test_the_readme_shows_what_the_default_step_changes_in_large_pictures():
    recorded = json.loads((BENCHMARKS / "results" / "dedup-step.json").read_text())
    assert recorded["settings"]["pictures"] >= 24 and all(row["tokens"] > 2047 for row in recorded["rows"])
    assert dedup_step.markdown(recorded["rows"]) in DOCUMENTS
    asked, about = recorded["settings"]["questions"], recorded["settings"]["pictures"]
    assert f"{asked} questions about {about} pictures" in DOCUMENTS


@pytest.mark.core
def test_the_step_benchmark_asks_every_question_under_every_step(tmp_path, monkeypatch):
    """One picture of 14 x 14 patches, where the default is the paper's step."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of other tests in this process, too
    out = tmp_path / "out.json"
    dedup_step.main(["--pictures", "1", "--grids", "14", "--kept", "20", "--json", str(out)])
    result = json.loads(out.read_text())
    paper, other = result["rows"]
    assert result["settings"]["questions"] == len(dedup_step.asked(1, 0)) > 5
    assert (paper["dedup_step"], paper["default"], paper["in_common"]) == (8, True, 1)
    assert (other["dedup_step"], other["default"]) == (32, False) and 0 < other["in_common"] <= 1
    assert other["only_this_right"] + other["only_8_right"] <= result["settings"]["questions"]


def test_the_recorded_share_of_the_first_token_is_small(recorded):
    assert recorded["first_token"]["tokens"] == 5184
    assert max(recorded["first_token"]["share"].values()) < 0.03


def test_the_recorded_run_holds_no_more_than_the_bound(recorded):
    """A matrix of 2^27 cosines, the lists of SCOPE, twice the features, and blocks."""
    bound = 512 + 192 + 2 * 16384 * 1280 * 4 / 2**20 + 6 * 16
    assert recorded["sizes"]["random"][-1]["tokens"] == 16384
    for sizes in recorded["sizes"].values():
        peaks = {(row["tokens"], method): mib for row in sizes for method, mib in row["peak_mib"].items()}
        assert {place: mib for place, mib in peaks.items() if mib > bound and place[1] != scaling.PRODUCT} == {}


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is known on Linux")
@pytest.mark.core
def test_memory_alone_can_be_measured_anew_in_a_record(tmp_path):
    """...of some methods, in a process of its own each; nothing else of the record changes."""
    quick = scaling.parse(["--quick", "--features", "random", "--sizes", "64"])
    settings = {name: value for name, value in vars(quick).items() if name not in ("json", "memory", "plot")}
    row = {"tokens": 700, "peak_mib": {"scope": -1, "gprune": -1}, "ratio": {}}
    record = {"settings": settings | {"channels": 64}, "sizes": {"random": [row]}, "first_token": None}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--memory", str(path), "--methods", "scope"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    after = json.loads(path.read_text())
    assert after["sizes"]["random"][0]["peak_mib"]["gprune"] == -1
    assert after["sizes"]["random"][0]["peak_mib"]["scope"] > 700**2 * 4 / 2**20
    assert after.pop("peak_mib_measured_again")["methods"] == ["scope"]
    after["sizes"]["random"][0]["peak_mib"]["scope"] = -1
    assert after == record


def test_reading_attention_took_about_one_more_attention_of_the_layer(recorded):
    assert {row["patches"]: row["ratio"]["median"] <= 1.25 for row in recorded["attention"]} == {
        1024: True, 4096: True, 16384: True, 40000: True
    }  # fmt: skip
