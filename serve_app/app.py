"""The front door's HTTP API. Routes parse, call one service function, and return a view of tunesmith.api.views."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import APIRouter, FastAPI, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from serve_app.door import Door
from serve_app.error_responses import add_error_handlers
from serve_app.middleware import DoorMiddleware
from serve_app.routes import assets, jobs
from tunesmith import __version__
from tunesmith.api.views import HealthView
from tunesmith.records.store import RecordStore
from tunesmith.settings import Settings
from tunesmith.storage.urls import open_promptly

_ABOUT = "Pick a model, pick data, get a new model. Every answer that is not a success has the shape `ErrorBody`."

health = APIRouter(tags=["health"])


@health.get("/healthz")
def get_health() -> HealthView:
    """Say that the door answers. This needs no token."""
    return HealthView(version=__version__)


def make_app(
    settings: Settings, *, proxied: bool = False, capacity: Callable[[], Mapping[str, float]] | None = None
) -> FastAPI:
    """Make the door over the record store and the storage that `settings` name.

    `proxied`: the door is behind Serve's proxy. `capacity` gives the cluster's resources; it is called where an order
    depends on them.
    """
    app = FastAPI(
        title="Tunesmith",
        version=__version__,
        description=_ABOUT,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    app.state.door = Door(
        settings=settings,
        store=RecordStore(settings.database_url),
        storage=open_promptly(settings.storage_url, settings),
        capacity=capacity,
    )
    # The middleware checks the token, before any body is read; this puts it into the OpenAPI document.
    bearer = Security(HTTPBearer(auto_error=False, description="the door's token"))
    app.include_router(health)
    for router in (jobs.router, assets.router):
        app.include_router(router, dependencies=[bearer])
    add_error_handlers(app)
    app.add_middleware(DoorMiddleware, token_path=settings.api_token_path, proxied=proxied)
    return app


def _operation_id(route: APIRoute) -> str:
    """The name of a method in a generated client."""
    return route.name
