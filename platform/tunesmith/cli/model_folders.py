"""`models check` and `models init`: a model's folder is checked, or begun, before anything is uploaded."""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli import rendering
from tunesmith.cli.session import REFUSED, AsJson, output
from tunesmith.cli.terminal import echo, echo_json
from tunesmith.errors import SpecError

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A model's folder on this machine.")]


def check_model(
    folder: Folder,
    task_type: Annotated[str | None, typer.Option(help="Default: the card's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a model's folder as a registration will, except for what needs its weights. Exit code 2 where the model
    could not be trained."""
    from tunesmith.assets.model_folder import read_model_folder
    from tunesmith.assets.training_types import TEXT_TYPES, training_types

    if not folder.is_dir():
        raise SpecError(f"{folder} is not a folder", hint="give the folder with the model's README.md")
    found = read_model_folder(folder, task_type=task_type)
    types = training_types(found.task_type, found.gallery, language_model=found.may_be_language_model)
    if as_json:
        gallery = None if found.gallery is None else found.gallery.model_dump(mode="json")
        answer = {"task_type": found.task_type, "training": types.model_dump(mode="json"), "gallery": gallery}
        echo_json(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        rows: list[tuple[str, object]] = [("task type", found.task_type), *rendering.training(types, found.gallery)]
        if any(each in TEXT_TYPES for each in types.allowed):
            rows.append(("text training", "if the weights load as a causal language model: registering finds out"))
        output().print(rendering.pairs(rows), soft_wrap=True)
    if types.default is None or (found.gallery is not None and found.gallery.problems):
        raise typer.Exit(REFUSED)


def init_model(folder: Folder) -> None:
    """Write a model that brings its own training, as a start: a card, and a `gallery_train/` that works."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"{folder} exists already and is not an empty folder", hint="give a new folder")
    with as_file(files("tunesmith").joinpath("assets", "skeletons", "custom_model")) as template:
        shutil.copytree(template, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    written = "\n".join(f"  {path.relative_to(folder)}" for path in sorted(folder.rglob("*")) if path.is_file())
    name = folder.absolute().name
    echo(f"{folder}:\n{written}\n\ntunesmith models check {folder}\ntunesmith models register {name} {folder}")
