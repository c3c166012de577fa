"""`models`, `datasets`, `flavors`, `hyperparameters`: what there is to order with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import rendering
from tunesmith.cli.session import AsJson, answer, follow_to_end, open_client, output
from tunesmith.cli.terminal import echo, echo_json
from tunesmith.errors import SpecError, nearest

if TYPE_CHECKING:
    from tunesmith.api.client import Client
    from tunesmith.api.views import JobView

Ref = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Without a version: the newest.")]
OnlyName = Annotated[str | None, typer.Option("--name", help="Only versions of this name.")]
NewName = Annotated[str, typer.Argument(help="a-z, 0-9, '.', '_' and '-'. A name there is gets a new version.")]
Source = Annotated[str, typer.Argument(help="Folder, file, or s3:// or obs:// prefix that the cluster can read.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end, showing how it goes.")]


def list_models(name: OnlyName = None, as_json: AsJson = False) -> None:
    """All models there are."""
    with open_client() as client:
        page = client.models(name=name)
    answer(page, as_json, lambda: rendering.models(page.items))


def show_model(ref: Ref, as_json: AsJson = False) -> None:
    """One model: where it comes from, and its files."""
    with open_client() as client:
        view = client.model(ref)
    answer(view, as_json, lambda: rendering.asset(view))


def show_dataset_readme(ref: Ref) -> None:
    """What a model that brings its own training says its datasets must look like."""
    with open_client() as client:
        echo(client.dataset_readme(ref).rstrip("\n"))


def register_model(
    name: NewName,
    *,
    source: Source,
    task_type: Annotated[
        str | None, typer.Option(help="text-question-answering, text-generation, or another; default: the card's.")
    ] = None,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Take a model in: a task on the cluster copies it and checks that it loads."""
    with open_client() as client:
        job = client.register_model(name, _absolute(source), task_type=task_type)
        _finish(client, job, wait=wait, as_json=as_json)


def list_datasets(name: OnlyName = None, as_json: AsJson = False) -> None:
    """All datasets there are."""
    with open_client() as client:
        page = client.datasets(name=name)
    answer(page, as_json, lambda: rendering.datasets(page.items))


def show_dataset(ref: Ref, as_json: AsJson = False) -> None:
    """One dataset: its columns, and its files."""
    with open_client() as client:
        view = client.dataset(ref)
    answer(view, as_json, lambda: rendering.asset(view))


def register_dataset(name: NewName, *, source: Source, wait: Wait = True, as_json: AsJson = False) -> None:
    """Take a dataset in: a task on the cluster copies it and reads its columns."""
    with open_client() as client:
        job = client.register_dataset(name, _absolute(source))
        _finish(client, job, wait=wait, as_json=as_json)


def list_flavors(as_json: AsJson = False) -> None:
    """All flavors there are."""
    with open_client() as client:
        page = client.flavors()
    answer(page, as_json, lambda: rendering.flavors(page.items))


def hyperparameters(
    name: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    *,
    model: Annotated[str | None, typer.Option(help="Defaults and bounds for this model.")] = None,
    chinese: Annotated[bool, typer.Option("--zh", help="Describe each in Chinese.")] = False,
    as_json: AsJson = False,
) -> None:
    """The hyperparameters that `--set` and `--advanced` take: types, defaults, bounds."""
    from tunesmith.hyperparameters.definitions import SECTIONS, for_model

    details: Mapping[str, Any] = {}
    if model is not None:
        with open_client() as client:
            details = client.model(model).details
    sections = {definition.section: for_model(definition, details) for definition in SECTIONS}
    if name is not None:
        names = [h.name for known in sections.values() for h in known]
        found = {section: tuple(h for h in known if h.name == name) for section, known in sections.items()}
        sections = {section: known for section, known in found.items() if known}
        if not sections:
            raise SpecError(
                f"there is no hyperparameter {name!r}", hint=nearest(name, names), code="unknown_hyperparameter"
            )
    if as_json:
        rows = [
            {"section": section, **{f.name: getattr(h, f.name) for f in fields(h)}, "type": h.type.__name__}
            for section, known in sections.items()
            for h in known
        ]
        echo_json(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    console = output()
    for section, known in sections.items():
        console.print(f"{section} (--{'set' if section == 'hyperparameters' else 'advanced'})", style="bold")
        console.print(rendering.hyperparameters(known, chinese=chinese))


def _finish(client: Client, job: JobView, *, wait: bool, as_json: bool) -> None:
    """Follow a registration to its end, unless `wait` is false, and print it."""
    if wait:
        raise typer.Exit(follow_to_end(client, job.id, as_json=as_json))
    answer(job, as_json, lambda: job.id)


def _absolute(source: str) -> str:
    """A local path as the cluster, which runs in another folder, finds it."""
    return source if "://" in source else str(Path(source).expanduser().absolute())
