"""The command `vispruner publish`, and `upload.py` of a checkout: build, verify, show what would change, push.

Nothing that asks the Hub is imported before it runs: `--endpoint` has to be known when huggingface_hub is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

DESCRIPTION = """\
Build the repos that YAML files describe, verify them, show what would change on the Hub, and with --push make it so.
Without --push nothing on the Hub is touched, and no account is needed."""

EPILOG = """\
examples:
  hf auth login                                       once, with a token that may write
  COMMAND llava-1.5-7b-vispruner             a YAML in hub_configs/, by its stem: a dry run
  COMMAND llava-1.5-7b-vispruner --push      the same, and publish it
  COMMAND hub_configs/*.yaml --push          all of them
  COMMAND my-model.yaml --push --private     a YAML of your own, into a repo that only you see
  COMMAND my-model.yaml --push --revision next    to try it on another branch
  COMMAND my-model.yaml --push --create-pr   propose it, for somebody else to merge
  COMMAND my-model.yaml --space --push       and the page that shows it, which the YAML names as space
  COMMAND a.yaml b.yaml --push --collection Pruned    and put the repos into a collection of that name

The repo goes where repo_id in the YAML says: put your own name there. Interrupted, or the line dropped? Run the same
command again: it goes on where it stopped, and does nothing where nothing is new.

exit status:
   0  done, or nothing to do            9  the repo holds files that no build made: --force
   1  refused by verify, or changed    10  somebody else committed meanwhile, twice
   2  bad input: YAML, base, options   11  the rate limit lasts too long
   3  not logged in                    12  the Hub answers with server errors
   4  the token is not accepted        13  the connection broke
   5  the token may not write          14  the disk is full
   6  not your namespace               15  the Hub refuses the model card's metadata
   7  no access to the base            16  what is on the Hub is not what was built
   8  no such revision of the base     17  the Hub refuses for another reason
  70  a fault of this program         130  interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `upload.py` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="upload.py",
        description=DESCRIPTION,
        epilog=EPILOG.replace("COMMAND", "python upload.py"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    refuse_empty(parser)
    add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="print the Python traceback of an error too")
    options = vars(parser.parse_args(arguments))
    return run("upload", options.pop("traceback"), **options)


def run(name: str, show_traceback: bool, **options: Any) -> int:
    """Publish; return the exit status. An error is told on stderr, in the `name` of the command that was given."""
    as_json = options.pop("json")
    done: list[dict[str, Any]] = []
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        status, error = _publish(name, show_traceback, options, done)
    if as_json:
        print(json.dumps({"repos": done, **({"error": error} if error else {})}))
    return status


def _publish(name: str, show_traceback: bool, options: dict[str, Any], done: list[dict[str, Any]]) -> tuple[int, str]:
    if options["endpoint"]:
        os.environ["HF_ENDPOINT"] = options["endpoint"]  # huggingface_hub reads it once, when it is imported
    from safetensors import SafetensorError

    from vispruner.conversion.hub_access import ExitCode, PublishError, without_secrets
    from vispruner.conversion.plain_text import printable
    from vispruner.conversion.publish import publish

    try:
        publish(**options, done=done)
        return ExitCode.DONE, ""
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command again to go on", file=sys.stderr)
        return ExitCode.INTERRUPTED, "interrupted"
    except (PublishError, ValueError, OSError, SafetensorError) as error:
        said = printable(without_secrets(str(error).strip() or type(error).__name__))
        if show_traceback:
            print(printable(without_secrets(traceback.format_exc())), file=sys.stderr)
        print(f"{name}: error: {said}", file=sys.stderr)
        return (error.exit_code if isinstance(error, PublishError) else ExitCode.BAD_INPUT), said
    except Exception:
        print(printable(without_secrets(traceback.format_exc())), file=sys.stderr)
        print(f"{name}: error: this is a fault of this program, please report the lines above", file=sys.stderr)
        return ExitCode.FAULT, "a fault of this program"


def refuse_empty(parser: argparse.ArgumentParser) -> None:
    """Refuse empty text as an argument, which a path would take for the current folder; call it before adding any."""

    def text(given: str) -> str:
        if not given.strip():
            raise argparse.ArgumentTypeError("is empty: leave it out, or set the variable that it stands for")
        return given

    parser.register("type", None, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options but --traceback."""
    add: Any = parser.add_argument
    add("configs", nargs="+", metavar="CONFIG", help="path of a YAML, or the stem of one in hub_configs/")
    add("--push", action="store_true", help="publish; without it this is a dry run")
    add("--private", action="store_true", help="make a new repo private (an existing one keeps what it is)")
    add("--create-pr", action="store_true", help="open a pull request instead of committing to main")
    add("--revision", metavar="B", help="commit to this branch instead of main; the budget branches stay as they are")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--thin", dest="thin", action="store_true", default=None, help="leave the weights in the base"
    )
    weights.add_argument("--full", dest="thin", action="store_false", help="publish the weights too")
    add("--base", metavar="PATH", help="read the base from here instead of downloading base_model")
    add("--out", default="build/upload", metavar="DIR", help="folder for the built repos, default: %(default)s")
    add("--endpoint", metavar="URL", help="another Hub, default: HF_ENDPOINT or https://huggingface.co")
    add("--force", action="store_true", help="write over what no build of this base made")
    add(
        "--collection",
        metavar="NAME",
        help="put the repos into this collection of their owner; made where there is none",
    )
    add("--space", action="store_true", help="then publish the demo page that the YAML names as `space`, too")
    add("--json", action="store_true", help="print the result as JSON on stdout, and all else on stderr")
