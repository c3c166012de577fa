"""`gallery_train/`: what a model brings for its own training, read and checked (docs/contracts.md, section 4).

Nothing of it is run or imported here.
"""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field

from tunesmith.assets.cards import FILE as CARD
from tunesmith.assets.cards import Card
from tunesmith.assets.image_references import parse_image
from tunesmith.assets.train_params import TYPES, Method, Parameter, read_methods
from tunesmith.bounds import value_fault
from tunesmith.errors import SpecError, nearest
from tunesmith.file_names import path_fault
from tunesmith.frozen import Tolerant
from tunesmith.hyperparameters.checks import is_of_type, refusal, resolve
from tunesmith.hyperparameters.definitions import Advanced, SharedAdvanced
from tunesmith.hyperparameters.field import Hyperparameter, Value
from tunesmith.visible_text import visible

FOLDER = "gallery_train"
TRAIN, PARAMETERS, README, REQUIREMENTS = "train.py", "train_params.json", "dataset_readme.md", "requirements.txt"
MAX_FILE_BYTES = 1 << 20
"""Size of each of these files at most: the platform reads them all and shows two of them."""
MAX_VALUES_BYTES = 100_000
"""Size of all hyperparameters together: `train.py` gets them in one variable, and the system allows 128 KiB."""
MAX_PROBLEMS = 20
"""How many problems are reported at once."""


class Gallery(Tolerant):
    """What a model brings for its own training. It can be used only where it has no problems."""

    methods: list[Method] = Field(default=[])
    image_url: str | None = None
    """The container image of the card's `Train_image_url`, in which training runs."""
    command_path: str | None = None
    """What runs in that image: the card's `Train_command_path`."""
    problems: list[str] = Field(default=[])
    """What is missing or malformed, each with file, line and key."""

    @property
    def needed_files(self) -> list[str]:
        """Files of the model beyond its `gallery_train/` that its training needs."""
        if self.image_url is None or self.problems:
            return []
        command, reference = self.command_path or "/", parse_image(self.image_url)
        files = [reference.name] if reference.is_in_model else []
        return files if command.startswith("/") else [*files, command]

    def method(self, name: str | None) -> Method:
        """The method called `name`, or the only one. SpecError names those there are."""
        names = [method.name for method in self.methods]
        if name is None and len(names) == 1:
            return self.methods[0]
        if name not in names:
            given = "no method is given" if name is None else f"there is no method {name!r}"
            raise SpecError(
                f"{given}; the model's {PARAMETERS} has {', '.join(names)}",
                fields=["method"],
                hint=nearest(name, names) if name else f"method: {names[0]}",
                code="unknown_method",
            )
        return self.methods[names.index(name)]


def read_gallery(folder: Path, card: Card, *, present: Collection[str] | None = None) -> Gallery | None:
    """What the model in `folder` with this card brings for its own training; None where it brings nothing.

    `present`: the paths of all files that the folder will have, where it has not all of them yet.
    """
    image_url, command = card.text("Train_image_url"), card.text("Train_command_path")
    place = folder / FOLDER
    if not place.is_dir() and not place.is_symlink() and image_url is None and command is None:
        return None
    is_there = (lambda path: (folder / path).is_file()) if present is None else frozenset(present).__contains__
    problems = list(_card_problems(card, is_there))
    for name in (PARAMETERS, README) if image_url else (TRAIN, PARAMETERS, README):
        if not (place / name).exists() and not (place / name).is_symlink():
            problems.append(f"{FOLDER}/{name} is missing")
    texts = {}
    for name in (TRAIN, PARAMETERS, README, REQUIREMENTS):
        text = _read(place / name, problems, may_be_empty=name == REQUIREMENTS)
        if text is not None:
            texts[name] = text
    problems += _python_problems(texts.get(TRAIN, ""))
    methods, found = read_methods(texts[PARAMETERS], f"{FOLDER}/{PARAMETERS}") if PARAMETERS in texts else ([], [])
    problems += found
    more = len(problems) - MAX_PROBLEMS
    if more > 0:
        problems = [*problems[:MAX_PROBLEMS], f"and {more} more"]
    return Gallery(methods=[] if problems else methods, image_url=image_url, command_path=command, problems=problems)


def fill_in(method: Method, given: Mapping[str, Any]) -> dict[str, Value]:
    """The hyperparameters that `train.py` gets: those given, checked, and the defaults of the others.

    None as a value leaves one out that is not required. SpecError names what is unknown (with the nearest), missing,
    or of another type.
    """
    table = {p.name: p for p in method.hyperparameters}
    for name in given:
        if name not in table:
            raise SpecError(
                f"method {method.name!r} has no hyperparameter {name!r}",
                fields=[f"hyperparameters.{name}"],
                hint=nearest(name, table) or f"it has: {', '.join(table) or 'none'}",
                code="unknown_hyperparameter",
            )
    left_out = {name for name, value in given.items() if value is None and name in table and not table[name].required}
    filled = {
        p.name: _checked(p, given[p.name]) if p.name in given and p.name not in left_out else _default(p)
        for p in method.hyperparameters
    }
    missing = [p.name for p in method.hyperparameters if p.required and filled[p.name] is None]
    if missing:
        raise SpecError(
            f"method {method.name!r} needs {', '.join(missing)}",
            fields=[f"hyperparameters.{name}" for name in missing],
            hint="; ".join(f"{name}: {table[name].type}, {table[name].help}".rstrip(", ") for name in missing),
            code="missing_hyperparameter",
        )
    settled: dict[str, Value] = {
        name: value for name, value in filled.items() if value is not None and name not in left_out
    }
    size = len(json.dumps(settled))
    if size > MAX_VALUES_BYTES:
        raise SpecError(
            f"the hyperparameters have {size} bytes as JSON; allowed are {MAX_VALUES_BYTES}",
            fields=["hyperparameters"],
            hint="put what is long into a file of the dataset",
            code="too_large",
        )
    return settled


def advanced(given: Mapping[str, Any]) -> SharedAdvanced:
    """The checked `advanced` of training that is not the platform's own. SpecError names what is the recipe's alone."""
    allowed = SharedAdvanced.model_fields
    for name in given:
        if name in Advanced.model_fields and name not in allowed:
            raise SpecError(
                f"advanced.{name} belongs to the built-in recipe; custom training takes {', '.join(allowed)}",
                fields=[f"advanced.{name}"],
                hint="what train.py is to know belongs under hyperparameters, and into train_params.json",
                code="not_for_custom",
            )
    return resolve(SharedAdvanced, given)


def _checked(parameter: Parameter, value: Any) -> Value:
    kind, about = TYPES[parameter.type], parameter.help or parameter.name
    h = Hyperparameter(parameter.name, kind, None, about, about)
    if is_of_type(h, value) and (why := value_fault(value)) is not None:
        raise SpecError(f"{h.name} {why}", fields=[f"hyperparameters.{h.name}"], code="invalid_hyperparameter")
    if not is_of_type(h, value) or (kind is float and not math.isfinite(value)):
        raise refusal(h, value, "hyperparameters")
    checked: Value = kind(value)
    return checked


def _default(parameter: Parameter) -> Value:
    default: Value = None if parameter.default is None else TYPES[parameter.type](parameter.default)
    return default


def _card_problems(card: Card, is_there: Callable[[str], bool]) -> Iterator[str]:
    def problem(key: str, sentence: str) -> str:
        return f"{CARD}:{card.lines.get(key, 1)}: {key} {sentence}"

    for key in ("Train_image_url", "Train_command_path"):
        value = card.values.get(key)
        if value is not None and not isinstance(value, str):
            yield problem(key, f"must be text, got {value!r}")
    command = card.text("Train_command_path")
    url = card.text("Train_image_url")
    if url is None:
        if command is not None:
            yield problem("Train_command_path", "is for a Train_image_url, which the card does not name")
        return
    if isinstance(card.values["Train_image_url"], str) and (why := _image_problem(url, is_there)):
        yield problem("Train_image_url", why)
    if command is None:
        yield f"{CARD}: Train_command_path is missing: what runs in the image of Train_image_url"
        return
    if not command.endswith((".py", ".sh")):
        yield problem("Train_command_path", f"must end in .py or .sh, got {command!r}")
    elif (why := path_fault(_plain(command).removeprefix("/"))) is not None:
        yield problem("Train_command_path", f"is {visible(repr(command))}, which {why}")
    # Absolute paths lie in the image, which is not looked into.
    elif not command.startswith("/") and not is_there(_plain(command)):
        yield problem("Train_command_path", f"names no file of the model: {command!r}")


def _plain(path: str) -> str:
    """The path without what means nothing in it, such as a `./` at its start."""
    return str(PurePosixPath(path))


def _image_problem(url: str, is_there: Callable[[str], bool]) -> str | None:
    """What is wrong with the name of an image; the image itself is not looked at."""
    try:
        reference = parse_image(url)
    except SpecError as error:
        return error.message
    if reference.is_in_model and not is_there(_plain(reference.name)):
        return f"names no file of the model: {reference.name!r}"
    return None


def _read(path: Path, problems: list[str], *, may_be_empty: bool) -> str | None:
    """The text of a file, or None. What is wrong is added to `problems`; a missing file adds nothing."""
    name = f"{FOLDER}/{path.name}"
    if path.is_symlink():
        problems.append(f"{name} is a link; only files and folders are taken: copy what it points to")
    elif path.exists() and not path.is_file():
        problems.append(f"{name} is not a file")
    elif path.exists() and path.stat().st_size > MAX_FILE_BYTES:
        problems.append(f"{name} has {path.stat().st_size} bytes; allowed are {MAX_FILE_BYTES}")
    elif path.exists():
        data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            problems.append(f"{name}:{line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})")
            return None
        if text.strip() or may_be_empty:
            return text
        problems.append(f"{name} is empty")
    return None


def _python_problems(text: str) -> list[str]:
    """What keeps `train.py` from being Python; it is parsed, not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except SyntaxError as error:
        return [f"{FOLDER}/{TRAIN}:{error.lineno or 1}: not Python: {error.msg}"]
    except (ValueError, RecursionError, MemoryError) as error:
        return [f"{FOLDER}/{TRAIN}: not Python: {error or 'nested too deeply'}"]
    return []
