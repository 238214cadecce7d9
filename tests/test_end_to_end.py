"""The whole path on the recorded original checkpoints and a real photograph, by the commands a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vispruner import conversion
from vispruner.conversion.cli import main

DATA = Path(__file__).parent / "data" / "original_llava"
PHOTO = Path(conversion.__file__).parent / "assets" / "chelsea.jpg"
CHECKPOINTS = {"llava": "llava-v1.5-tiny", "llava_next": "llava-v1.6-tiny"}

# Run where `vispruner` cannot be imported: the repo has to bring all it needs.
ANSWER = """
import sys
sys.modules["vispruner"] = None
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
repo, photo = sys.argv[1], Image.open(sys.argv[2])
prompt = "USER: <image>\\nWhat is in this picture? ASSISTANT:"
processor = AutoProcessor.from_pretrained(repo)
inputs = processor(images=photo, text=prompt, return_tensors="pt")
answers = []
for auto_class in (AutoModel, AutoModelForImageTextToText):
    model = auto_class.from_pretrained(repo, trust_remote_code=True)
    assert type(model).__name__.startswith("VisPruner"), type(model)
    result = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    prompt_length = inputs.input_ids.shape[1]
    (full, ), (kept, ) = model.visual_token_counts(inputs.pixel_values, inputs.get("image_sizes"))
    assert result.past_key_values.get_seq_length() == result.sequences.shape[1] - 1 - full + kept
    answers.append(processor.decode(result.sequences[0, prompt_length:], skip_special_tokens=True))
pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
out = pipe(text=prompt, images=[photo], max_new_tokens=5, generate_kwargs={"do_sample": False}, return_full_text=False)
answers.append(out[0]["generated_text"])
assert len({answer.strip() for answer in answers}) == 1, answers
print("visual tokens", full, kept)
"""


@pytest.fixture(scope="module", params=sorted(CHECKPOINTS))
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An original checkpoint, as `vispruner convert` leaves it."""
    folder = tmp_path_factory.mktemp("converted")
    source = folder / "original"
    source.mkdir()
    for file in (DATA / CHECKPOINTS[request.param]).iterdir():
        (source / file.name).symlink_to(file)
    if not (source / "tokenizer.model").exists():
        (source / "tokenizer.model").symlink_to(DATA / "tokenizer.model")
    tower = ["--vision-tower", str(DATA / "clip")]
    assert main(["convert", str(source), str(folder / "hf"), *tower]) == 0
    return request.param, folder / "hf"


@pytest.mark.slow
def test_convert_build_verify_load_answer(converted: tuple[str, Path], tmp_path: Path) -> None:
    architecture, base = converted
    config = {
        "repo_id": "someone/tiny-llava-vispruner",
        "base_model": str(base),
        "architecture": architecture,
        "vispruner_config": {"visual_token_num": 64},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    repo = tmp_path / "repo"
    assert main(["build", str(tmp_path / "tiny.yaml"), "--out", str(repo)]) == 0
    assert main(["verify", str(repo), "--base", str(base)]) == 0
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(repo), str(PHOTO)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    full, kept = (int(word) for word in done.stdout.split()[-2:])
    tiles = {"llava": 1, "llava_next": 3}[architecture]  # a wide photo is two tiles and the base tile
    assert kept == 64 * tiles and kept < full


@pytest.mark.slow
def test_the_demo_on_an_original_checkpoint(converted: tuple[str, Path], tmp_path: Path) -> None:
    _, base = converted
    out = tmp_path / "demo"
    assert main(["demo", "--base", str(base), "--image", str(PHOTO), "--out", str(out)]) == 0
    measured = json.loads((out / "demo.json").read_text())
    dropped = measured["unpruned"]["visual_tokens"] - measured["pruned"]["visual_tokens"]
    assert dropped > 0
    assert measured["unpruned"]["kv_tokens"] - measured["pruned"]["kv_tokens"] == dropped
    assert measured["pruned"]["prefill_flops"] < measured["unpruned"]["prefill_flops"]
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 300 and len(picture.convert("RGB").getcolors(2**24)) > 1000
