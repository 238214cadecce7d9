"""The names of transformers that the published files rely on are there, and tests/stock_names.py lists all of them."""

from __future__ import annotations

import ast
import builtins
import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from rows import rows
from stock_names import EVERY_MODEL, ON_MODELS, Names, names_in_modules
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

import vispruner
from vispruner import ARCHITECTURES
from vispruner.engine_interface import ENGINE_PROCESSORS
from vispruner.stock_versions import CACHE_NAMES, VIDEO_LLAVA_IMAGE_NAMES

PACKAGE = Path(vispruner.__file__).parent
INSTALLED = tuple(int(part) for part in transformers.__version__.split(".")[:2])
PART = r"[\w|]+\??(?:\(\))?(?:\[\d+\])?"
LINE = re.compile(rf"(?P<path>{PART}(?:\.{PART})*)(?:\((?P<args>[^()]+)\))?(?:\s+@(?P<where>[-\d.]+))?(?=\s|$)")
AT_MOST = 12  # names in a message


class Line(typing.NamedTuple):
    path: str
    arguments: tuple[str, ...]
    versions: str  # from which on, or with "-" up to which; "" for all

    @property
    def names(self) -> list[str]:
        """The parts of the path, without what stands behind them."""
        return [name for part in self.path.split(".") for name in re.match(r"[\w|]+", part)[0].split("|")]


def lines_of(text: str) -> list[Line]:
    left = re.sub(LINE, "", text)
    assert not left.strip(), f"not understood: {left.split()}"
    return [Line(found["path"], tuple((found["args"] or "").split()), found["where"] or "") for found in
            LINE.finditer(text)]  # fmt: skip


def needed(versions: str) -> bool:
    number = tuple(map(int, versions.strip("-").split("."))) if versions else ()
    return number >= INSTALLED if versions.startswith("-") else number <= INSTALLED


# The checker.


def complaints(root: Any, called: str, text: str) -> Iterator[str]:
    """Yield what of the names in `text` the object `root`, called so, does not have."""
    for line in lines_of(text):
        if not needed(line.versions):
            continue
        try:
            found, where = follow(root, called, line.path)
        except LookupError as error:
            yield error.args[0]
        else:
            yield from complaints_of_call(found, where, line.arguments)


def follow(found: Any, called: str, path: str) -> tuple[Any, str]:
    """Return what a path leads to, and how to call it; LookupError says what is gone."""
    where = "" if isinstance(found, types.ModuleType) else called
    for part in path.split("."):
        names, optional, call, item = re.fullmatch(r"([\w|]+)(\??)(\(\))?(?:\[(\d+)\])?", part).groups()
        there = [name for name in names.split("|") if has(found, name)]
        if not there and optional:
            continue
        if not there:
            near = difflib.get_close_matches(names, names_of(found), n=3, cutoff=0.6)
            hint = f"near to it: {', '.join(near)}" if near else "nothing is called alike"
            raise LookupError(f"{where or called} no longer has {names.replace('|', ' or ')}; {hint}")
        found = getattr(found, there[0], None)
        found = found() if call else found
        found = found[int(item)] if item else found
        where = ".".join(filter(None, [where, part]))
    return found, where


def has(thing: Any, name: str) -> bool:
    return name in names_of(thing) if is_output(thing) else hasattr(thing, name)


def names_of(thing: Any) -> list[str]:
    """...of an output its fields alone, because that of 5.24 answers to an old name too."""
    return [field.name for field in fields(thing)] if is_output(thing) else dir(thing)


def is_output(thing: Any) -> bool:
    return isinstance(thing, type) and is_dataclass(thing) and issubclass(thing, ModelOutput)


def complaints_of_call(function: Any, where: str, arguments: tuple[str, ...]) -> Iterator[str]:
    if not arguments:
        return
    taken = dict(inspect.signature(function).parameters)
    for bound in ("self", "cls"):
        taken.pop(bound, None)
    by_place = arguments[: arguments.index("/")] if "/" in arguments else ()
    listed = {name for argument in arguments for name in argument.partition("@")[0].strip("*>").split("|")}
    for place, argument in enumerate(arguments):
        names, _, versions = argument.partition("@")
        if names == "/" or not needed(versions):
            continue
        if names == "**":
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
                yield f"{where} no longer takes further arguments by name"
        elif names.startswith("*"):
            if f'"{names[1:]}"' not in inspect.getsource(inspect.unwrap(function)):
                yield f"{where} no longer reads {names[1:]} from its keyword arguments"
        elif names.startswith(">"):
            yield from complaints_of_result(function, where, names[1:])
        elif not set(names.split("|")) & taken.keys():
            yield f"{where} no longer takes {names.replace('|', ' or ')}; it has: {shown(taken, names, listed)}"
        elif argument in by_place and list(taken)[place] not in names.split("|"):
            yield f"{where} takes {list(taken)[place]} in place {place + 1}, where {names} is handed over"


def shown(taken: Any, missing: str, listed: set[str]) -> str:
    """Name what may be the new name of `missing` first: what the table does not list, and of that what is alike."""

    def likely(name: str) -> tuple[bool, float]:
        return name not in listed, difflib.SequenceMatcher(None, missing, name).ratio()

    named = [name for name, parameter in taken.items() if parameter.kind is not parameter.VAR_KEYWORD]
    names = sorted(named, key=likely, reverse=True)
    return ", ".join(names[:AT_MOST]) + (", ..." if len(names) > AT_MOST else "")


def complaints_of_result(function: Any, where: str, field: str) -> Iterator[str]:
    declared = inspect.signature(function, eval_str=True).return_annotation
    outputs = [kind for kind in (declared, *typing.get_args(declared)) if is_output(kind)]
    if not outputs:
        yield f"{where} no longer says which output it returns"
    for output in outputs:
        if field not in (there := names_of(output)):
            yield f"what {where} returns, {output.__name__}, no longer has {field}; it has: {', '.join(there)}"


def complaints_in_modules(names: Names) -> Iterator[str]:
    for module, text in names_in_modules(names).items():
        try:
            root = importlib.import_module(module)
        except ImportError as error:
            yield f"{module} cannot be imported: {error}"
        else:
            yield from complaints(root, module, text)


# What it finds.


def test_every_name_is_in_the_installed_version() -> None:
    assert list(complaints_in_modules(Names())) == []


def tiny(model_class: Any, config: Any) -> Any:
    with torch.device("meta"):
        return model_class(config)


@pytest.fixture(scope="module")
def stock_models() -> dict[str, Any]:
    return {row.model_type: tiny(row.stock_class, row.config()) for row in rows()}


@pytest.mark.parametrize("name", ON_MODELS)
def test_every_attribute_is_on_the_tiny_stock_model(name: str, stock_models: dict[str, Any]) -> None:
    model = stock_models[name]
    assert list(complaints(model, type(model).__name__, EVERY_MODEL + ON_MODELS[name])) == []


@pytest.mark.parametrize("name", ON_MODELS)
def test_our_model_holds_all_that_the_stock_one_does(name: str, stock_models: dict[str, Any]) -> None:
    """Its `__init__` stands in place of stock's, whose further attributes and modules it would miss."""
    stock, architecture = stock_models[name], ARCHITECTURES[name]
    options = {"method": "none"}
    config = architecture.config_class.from_dict({**stock.config.to_dict(), "vispruner_config": options})
    ours = tiny(architecture.model_class, config)
    for path in ("", "model"):
        theirs, own = stock.get_submodule(path), ours.get_submodule(path)
        assert set(vars(theirs)) - set(vars(own)) == set()
        assert set(theirs._modules) - set(own._modules) == set()


@pytest.mark.skipif(Names().cache != "cache", reason="this version still has the name that 5.24 renamed")
def test_the_rename_of_the_cache_would_have_been_caught() -> None:
    """The names of 5.23, against a version that has `cache`."""
    found = list(complaints_in_modules(Names(cache="past_key_values")))
    for row in rows():
        forward = f"{row.stock_class.__name__}.forward"
        takes = rf"{forward} no longer takes past_key_values; it has: (\w+, )*cache, "
        returns = rf"what {forward} returns, \w+, no longer has past_key_values; it has: (\w+, )*cache\b"
        assert [bool(re.match(takes, text)) for text in found].count(True) == 1
        assert [bool(re.match(returns, text)) for text in found].count(True) == 1
    assert "GenerateDecoderOnlyOutput no longer has past_key_values; nothing is called alike" in found
    assert all("past_key_values" in text for text in found)


class Renamed:
    """Stands for a stock class of another version."""

    def __init__(self) -> None:
        self.multi_modal_projector = self
        self.layers = [self]

    def forward(self, input_ids: Any, kv_cache: Any = None, pixel_value: Any = None) -> tuple | CausalLMOutput: ...

    def from_pretrained(self, name: str, **kwargs: Any) -> Any:
        return kwargs.pop("revision", None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("multi_modal_projector.layers[0].forward(input_ids / kv_cache)", None),
        ("gone?.layers[0]", None),
        ("gone|layers", None),
        ("from_pretrained(name / *revision **)", None),
        ("never_there @99.0", None),
        ("long_gone @-4.57", None),
        ("forward(never_there@99.0)", None),
        ("from_pretrain", "Renamed no longer has from_pretrain; near to it: from_pretrained"),
        ("layers[0].weights", "Renamed.layers[0] no longer has weights; nothing is called alike"),
        ("layer|norm", "Renamed no longer has layer or norm; near to it: layers"),
        (
            "forward(input_ids cache)",
            "Renamed.forward no longer takes cache; it has: kv_cache, pixel_value, input_ids",
        ),
        (
            "forward(input_ids kv_cache pixel_values)",
            "Renamed.forward no longer takes pixel_values; it has: pixel_value, input_ids, kv_cache",
        ),
        ("forward(kv_cache /)", "Renamed.forward takes input_ids in place 1, where kv_cache is handed over"),
        ("forward(**)", "Renamed.forward no longer takes further arguments by name"),
        (
            "forward(>scores)",
            "what Renamed.forward returns, CausalLMOutput, no longer has scores; "
            "it has: loss, logits, hidden_states, attentions",
        ),
        ("from_pretrained(>logits)", "Renamed.from_pretrained no longer says which output it returns"),
        ("from_pretrained(*token)", "Renamed.from_pretrained no longer reads token from its keyword arguments"),
    ],
)
def test_the_checker_says_what_vanished(line: str, message: str | None) -> None:
    assert list(complaints(Renamed(), "Renamed", line)) == ([] if message is None else [message])


def test_a_module_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "names_in_modules", lambda names: {"transformers.no_such_module": "Name"})
    (message,) = complaints_in_modules(Names())
    assert message.startswith("transformers.no_such_module cannot be imported: ")


def test_a_line_that_is_not_understood_is_an_error() -> None:
    with pytest.raises(AssertionError, match="not understood"):
        lines_of("LlavaModel.forward(input_ids,")


# Nothing is missing from the table.

TREES = {file.name: ast.parse(file.read_text()) for file in sorted(PACKAGE.glob("*.py"))}
del TREES["duplicate_removal_triton.py"]  # a language of its own, which knows no model
IN_MODULES = {module: lines_of(text) for module, text in names_in_modules(Names()).items()}
EVERYWHERE = [line for lines in IN_MODULES.values() for line in lines]
LISTED = EVERYWHERE + [line for text in (EVERY_MODEL, *ON_MODELS.values()) for line in lines_of(text)]


def arguments_of(lines: list[Line]) -> set[str]:
    every = [argument.partition("@")[0].strip("*>") for line in lines for argument in line.arguments]
    return {name for names in every for name in names.split("|")}


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield module and name of what a file imports from transformers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "transformers":
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("file", TREES)
def test_every_import_is_listed(file: str) -> None:
    listed = {(module, line.names[0]) for module, lines in IN_MODULES.items() for line in lines}
    assert set(imported(TREES[file])) - listed == set()


# Names that our files define themselves, and those of Python and torch: the others are stock's.


def is_record(node: ast.ClassDef) -> bool:
    return bool(re.search("dataclass|NamedTuple", ast.unparse([*node.decorator_list, *node.bases])))


def defined_by(tree: ast.AST) -> Iterator[str]:
    """Yield functions, classes, variables, fields of records, and what is set on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and is_record(node):
            yield from (field.target.id for field in node.body if isinstance(field, ast.AnnAssign))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            on_self = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
            yield from [node.attr] if on_self else [node.id] if isinstance(node, ast.Name) else []


def declared_by(tree: ast.AST) -> Iterator[str]:
    """Yield what a mixin says that its stock class has, such as `vision_tower: Any`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not is_record(node):
            yield from (field.target.id for field in node.body if isinstance(field, ast.AnnAssign) and not field.value)


OURS = {name for tree in TREES.values() for name in defined_by(tree)}
OURS -= {name for tree in TREES.values() for name in declared_by(tree)}
KNOWN = (
    *(torch.Tensor, torch.nn.Module(), torch.device, torch.Size, torch.finfo, numpy.ndarray),
    *(str, int, list, dict, set, tuple, type, property, builtins, typing.NamedTuple("Record", [])),
    *(OSError, Path, re.Match, re.Pattern, inspect.Signature, inspect.Parameter),
)
COMMON = {name for known in KNOWN for name in dir(known)}


CLASSES = [
    cls
    for architecture in ARCHITECTURES.values()
    for cls in (architecture.model_class, architecture.base_class, architecture.config_class)
] + list(ENGINE_PROCESSORS.values())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_stock_method_that_is_overridden_is_listed(cls: type) -> None:
    ours = [base for base in cls.__mro__ if base.__module__.startswith("vispruner")]
    stock = [base for base in cls.__mro__ if base.__module__.startswith("transformers.")]
    written = {name for base in ours for name in vars(base) if name in OURS or not name.startswith("__")}
    written -= {name for name in written if name.endswith("_cached_value")}  # which stock notes on a class, once asked
    overridden = {name for name in written if any(name in vars(theirs) for theirs in stock)}
    bases = {base.__name__ for base in stock}
    listed = {line.names[1] for line in EVERYWHERE if len(line.names) == 2 and line.names[0] in bases}
    assert overridden - listed == set()


def of_others(tree: ast.Module) -> set[str]:
    """Return what a file imports from elsewhere than transformers and its siblings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] != "transformers":
            found |= {alias.asname or alias.name for alias in node.names}
    return found - {"transformers"}


def root_of(node: ast.AST) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def looked_up(tree: ast.Module) -> Iterator[str]:
    """Yield the attributes that a file asks for and that are neither ours nor Python's nor torch's."""
    others = of_others(tree)
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Attribute) and root_of(node) not in others:
            name = node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
        if name and name not in OURS | COMMON and not name.startswith(("__", "vispruner")):
            yield name


@pytest.mark.parametrize("file", TREES)
def test_every_attribute_that_is_not_ours_is_listed(file: str) -> None:
    named = {name for line in LISTED for name in line.names}
    assert set(looked_up(TREES[file])) - named - arguments_of(LISTED) == set()


def handed_over(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield function and name of the arguments that a file hands to stock functions by name."""
    others = of_others(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or root_of(node.func) in others:
            continue
        called = ast.unparse(node.func).rpartition(".")[2].removeprefix("stock_")
        if "super(" in ast.unparse(node.func) or called not in OURS | COMMON | {"cls"}:
            yield from ((called, keyword.arg) for keyword in node.keywords if keyword.arg)


@pytest.mark.parametrize("file", TREES)
def test_every_argument_handed_to_stock_by_name_is_listed(file: str) -> None:
    for called, argument in handed_over(TREES[file]):
        lines = [line for line in LISTED if called in line.names[-2:]]  # a module by its name or by its forward
        passed_on = PASSED_ON if any("**" in line.arguments for line in lines) else set()
        own_fields = {line.names[-1] for line in lines}
        assert argument in arguments_of(lines) | own_fields | passed_on, f"{called}({argument}=) is not listed"


# What stock hands on through `**kwargs`, to where it has no signature that could be looked at.
PASSED_ON = {
    "_commit_hash",
    "return_dict",
    "output_hidden_states",
    "return_unused_kwargs",
    "trust_remote_code",
    "vispruner_head",
}


@pytest.mark.parametrize("name", ON_MODELS)
def test_every_input_that_is_spoken_of_is_listed(name: str, stock_models: dict[str, Any]) -> None:
    """...by the names of dictionary keys and modalities, as far as stock `forward` takes them."""
    head = type(stock_models[name])
    spoken_of = {
        node.value
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for modality in ARCHITECTURES[name].model_class.modalities:
        spoken_of |= {modality.pixels, *modality.described_by}
    (line,) = [line for line in EVERYWHERE if line.path == f"{head.__name__}.forward"]
    elsewhere = {"use_cache", *CACHE_NAMES, *VIDEO_LLAVA_IMAGE_NAMES}  # generate's, and what `Names` has
    assert (spoken_of & set(inspect.signature(head.forward).parameters)) - arguments_of([line]) - elsewhere == set()


def test_every_architecture_has_its_attributes_listed() -> None:
    assert set(ON_MODELS) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("self.language_model.rotary_emb(x)", {"language_model", "rotary_emb"}),
        ("getattr(tower, 'pre_layrnorm', None)", {"pre_layrnorm"}),
        ("model.loss_type = 1", {"loss_type"}),
        ("import os\nos.path.basename(self.vispruner_options.budget(2).view(1))", set()),
    ],
)
def test_what_a_file_looks_up_is_found(source: str, names: set[str]) -> None:
    assert set(looked_up(ast.parse(source))) == names


def test_what_a_file_hands_over_is_found() -> None:
    source = "super().generate(kind=1)\nself.language_model(rope=2)\nmax([], default=3)\ntorch.zeros(2, device=4)"
    tree = ast.parse(f"import torch\n{source}")
    assert list(handed_over(tree)) == [("generate", "kind"), ("language_model", "rope")]
