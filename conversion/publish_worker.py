"""Load pushed commits the way their users will, in a process that knows nothing but the repo's name.

`publish` copies this file into a folder of its own and runs it there, without network: what it loads has been
downloaded and compared before. It imports transformers and never this package, whose import would register the very
classes that the repo has to bring along itself.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor


class Refused(Exception):
    """Something that does not load as it should; the message is the reason."""


def check(settings: dict[str, Any]) -> list[str]:
    """Load config, processor and classes at every commit, and the first one's weights if they are there."""
    passed = []
    for number, (commit, expected) in enumerate(settings["revisions"].items()):
        source = {"revision": commit, "trust_remote_code": True}
        config = AutoConfig.from_pretrained(settings["repo_id"], **source)
        if config.vispruner_config != expected:
            raise Refused(f"at {commit} vispruner_config is {config.vispruner_config}, built was {expected}")
        AutoProcessor.from_pretrained(settings["repo_id"], **source)
        auto_class: Any = AutoModelForImageTextToText
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=True, code_revision=commit)
        _require_own(model, settings["class_name"])
        budget = config.vispruner_config["visual_token_num"] or config.vispruner_config["keep_ratio"]
        line = f"loads at {commit}: {settings['class_name']}, budget {budget}"
        if number == 0 and settings["loads_weights"]:
            model, report = auto_class.from_pretrained(settings["repo_id"], output_loading_info=True, **source)
            _require_own(model, settings["class_name"])
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if report.get(kind):
                    raise Refused(
                        f"at {commit} the weights have {kind} {', '.join(sorted(map(str, report[kind]))[:8])}"
                    )
            line += ", with its weights"
        passed.append(line)
    return passed


def _require_own(model: Any, class_name: str) -> None:
    if type(model).__name__ != class_name or not type(model).__module__.startswith("transformers_modules."):
        raise Refused(
            f"the auto class makes {type(model).__module__}.{type(model).__name__}, not the repo's own class"
        )


def main(settings_file: str, result_file: str) -> None:
    """Run the check and write what passed, or the problem."""
    settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
    try:
        result: dict[str, Any] = {"passed": check(settings)}
    except Refused as reason:
        result = {"problem": str(reason)}
    except Exception as error:  # whatever the repo's code raises is the problem
        traceback.print_exc()
        result = {"problem": f"{type(error).__name__}: {error}"}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    sys.modules["vispruner"] = None  # type: ignore[assignment]  # from here on `import vispruner` raises
    main(*sys.argv[1:])
