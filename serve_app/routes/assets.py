"""The routes of models, datasets and flavors."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path, Query, Response
from pydantic import Field

from serve_app import openapi_examples
from serve_app.door import Door, DoorDep
from serve_app.error_responses import documented
from serve_app.json_bodies import JsonRoute
from serve_app.orders import place
from serve_app.routes.jobs import REPLAY, IdempotencyKey, answer_order
from serve_app.views import asset_view
from tunesmith.api.views import AssetView, JobView, Page
from tunesmith.assets.catalog import Manifest, get_manifest, list_manifests
from tunesmith.assets.gallery import FOLDER, README
from tunesmith.bounds import MAX_LINE, Line, SourceText
from tunesmith.errors import NotFoundError, SpecError
from tunesmith.frozen import Frozen
from tunesmith.jobs.flavors import Flavor, load_flavors
from tunesmith.jobs.spec import RegisterSpec
from tunesmith.storage.layout import check_name

router = APIRouter(prefix="/v1", route_class=JsonRoute)

Ref = Annotated[str, Path(max_length=MAX_LINE)]
NameQuery = Annotated[str | None, Query(max_length=MAX_LINE, description="only the versions of this name")]


class RegisterModel(Frozen):
    """Files to register as a new version of a model."""

    name: Line
    source: SourceText
    """A full path on the door's machine, or an `s3://` or `obs://` prefix."""
    task_type: Annotated[Line | None, Field(default=None, min_length=1, max_length=63)]
    """Default: what the card's front matter says."""


class RegisterDataset(Frozen):
    """Files to register as a new version of a dataset."""

    name: Line
    source: SourceText
    """A full path on the door's machine, or an `s3://` or `obs://` prefix."""


@router.get("/flavors", tags=["flavors"], responses=documented())
def list_flavors() -> Page[Flavor]:
    """What one worker can be given."""
    return Page(items=list(load_flavors().values()), next=None)


@router.get("/models", tags=["models"], responses=documented(422))
def list_models(door: DoorDep, name: NameQuery = None) -> Page[AssetView]:
    """All versions of all models."""
    return _list(door, "model", name)


@router.get("/models/{ref}", tags=["models"], responses=documented(404, 422))
def get_model(door: DoorDep, ref: Ref) -> AssetView:
    """A model by NAME@VERSION, or the newest version of a NAME."""
    return _get(door, "model", ref)


@router.get(
    "/models/{ref}/dataset-readme",
    tags=["models"],
    response_class=Response,
    responses={200: {"content": {"text/markdown": {"schema": {"type": "string"}}}}, **documented(404, 422)},
)
def get_dataset_readme(door: DoorDep, ref: Ref) -> Response:
    """What a model that brings its own training says its datasets must look like: its `dataset_readme.md`."""
    manifest = _manifest(door, "model", ref)
    if manifest.gallery is None or manifest.gallery.problems:
        raise NotFoundError(f"{manifest.ref} has no {README}", fields=["ref"], code="no_dataset_readme")
    text = manifest.stored.read(door.storage, f"{FOLDER}/{README}")
    return Response(text, media_type="text/markdown; charset=utf-8")


@router.post(
    "/models",
    tags=["models"],
    status_code=202,
    response_model=JobView,
    responses={**REPLAY, **documented(400, 409, 413, 422)},
)
def register_model(
    door: DoorDep,
    body: Annotated[RegisterModel, Body(openapi_examples=openapi_examples.MODEL)],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Register a model: a job of kind `register` copies it and checks that it loads."""
    spec = RegisterSpec(asset="model", **body.model_dump(exclude_unset=True))
    return answer_order(place(door, spec, key=idempotency_key), status=202)


@router.get("/datasets", tags=["datasets"], responses=documented(422))
def list_datasets(door: DoorDep, name: NameQuery = None) -> Page[AssetView]:
    """All versions of all datasets."""
    return _list(door, "dataset", name)


@router.get("/datasets/{ref}", tags=["datasets"], responses=documented(404, 422))
def get_dataset(door: DoorDep, ref: Ref) -> AssetView:
    """A dataset by NAME@VERSION, or the newest version of a NAME."""
    return _get(door, "dataset", ref)


@router.post(
    "/datasets",
    tags=["datasets"],
    status_code=202,
    response_model=JobView,
    responses={**REPLAY, **documented(400, 409, 413, 422)},
)
def register_dataset(
    door: DoorDep,
    body: Annotated[RegisterDataset, Body(openapi_examples=openapi_examples.DATASET)],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Register a dataset: a job of kind `register` copies it and reads its files."""
    spec = RegisterSpec(asset="dataset", **body.model_dump(exclude_unset=True))
    return answer_order(place(door, spec, key=idempotency_key), status=202)


def _list(door: Door, kind: str, name: str | None) -> Page[AssetView]:
    if name is not None:
        check_name(name, field="name")
    return Page(
        items=[asset_view(each, door.storage.url) for each in list_manifests(door.storage, kind, name=name)], next=None
    )


def _get(door: Door, kind: str, ref: str) -> AssetView:
    return asset_view(_manifest(door, kind, ref), door.storage.url)


def _manifest(door: Door, kind: str, ref: str) -> Manifest:
    try:
        return get_manifest(door.storage, kind, ref, field="ref")
    except SpecError as error:
        if error.code != f"unknown_{kind}":
            raise
        # Here the name is the address that was asked for, not a word in an order, so the answer is 404.
        raise NotFoundError(error.message, fields=error.fields, hint=error.hint, code=error.code) from None
