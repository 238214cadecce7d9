"""What a repo gets to run on a Hugging Face Inference Endpoint: handler.py and requirements.txt.

An endpoint may come with an older transformers than the repo needs; it installs what requirements.txt asks for.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from vispruner.stock_versions import OLDEST_SUPPORTED

HANDLER, REQUIREMENTS = "handler.py", "requirements.txt"
SOURCE = Path(__file__).parent.parent / "serving" / "endpoint_handler.py"
VIDEO_PACKAGES = ("torchvision", "num2words")
REQUIREMENT = re.compile(r"(transformers|accelerate|pillow|torchvision|num2words)([<>=]{1,2}[0-9.]+,?)*")


def endpoint_files(architecture: str) -> dict[str, bytes]:
    """Return name -> content of the files that an endpoint asks for."""
    ceiling = int(OLDEST_SUPPORTED.partition(".")[0]) + 1
    packages = [f"transformers>={OLDEST_SUPPORTED},<{ceiling}", "accelerate", "pillow"]
    if architecture in VIDEO_PROCESSOR_MAPPING_NAMES:
        packages += VIDEO_PACKAGES
    return {HANDLER: SOURCE.read_bytes(), REQUIREMENTS: "".join(f"{line}\n" for line in packages).encode()}


def strange_requirements(text: str) -> list[str]:
    """Return the lines that no build writes: an endpoint would install whatever they name."""
    return [line for line in text.splitlines() if not REQUIREMENT.fullmatch(line)]
