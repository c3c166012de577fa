"""The one shape of errors, and how whatever goes wrong with a request is brought into it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tunesmith.api.views import ErrorBody
from tunesmith.errors import TunesmithError, UnavailableError
from tunesmith.jobs.spec import refusal
from tunesmith.visible_text import visible

logger = logging.getLogger(__name__)

_MEANINGS = {
    400: "the body is not JSON",
    401: "no token, or a wrong one",
    404: "there is nothing of that name",
    409: "the request contradicts what is there already",
    413: "the body is too large",
    422: "something that is not allowed was asked for",
    500: "a fault of the platform; its log has the request id",
    503: "something the platform needs does not answer at the moment; try again",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the errors with these statuses and of those that any route may answer with."""
    return {
        status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in sorted({401, 500, 503, *statuses})
    }


class BadRequestError(TunesmithError):
    """No route can take the request."""

    code = "bad_request"
    status = 400
    reason = "user_error"


def error_response(error: TunesmithError, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 503:
        headers["Retry-After"] = "1"
    # ASCII only: the message quotes what was given, which may hold text that has no UTF-8 form.
    content = json.dumps({"error": {**error.as_dict(), "request_id": request_id}})
    return Response(content, status_code=error.status, headers=headers, media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(TunesmithError, _on_tunesmith_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    # A pool whose connections are all in use raises TimeoutError, which is no OperationalError.
    for kind in (sa.exc.OperationalError, sa.exc.TimeoutError):
        app.add_exception_handler(kind, _on_database_error)


async def _on_tunesmith_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TunesmithError)
    if error.status >= 500:
        logger.error("request %s: %s", request.state.request_id, error, exc_info=error)
    return error_response(error, request.state.request_id)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    items = error.errors()
    broken = next((item for item in items if item["type"] == "json_invalid"), None)
    refused: TunesmithError
    if broken is not None:
        why = broken.get("ctx", {}).get("error", broken["msg"])
        refused = BadRequestError(f"the body is not JSON: {why} at character {broken['loc'][-1]}", code="invalid_json")
    else:
        # The first part of a place says body, query, path or header.
        refused = refusal([{**item, "loc": item["loc"][1:]} for item in items])
        if "json" not in request.headers.get("content-type", "json"):
            refused.hint = refused.hint or "send the body as JSON, with Content-Type: application/json"
    return error_response(refused, request.state.request_id)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette and FastAPI refuse by themselves."""
    assert isinstance(error, HTTPException)
    asked = visible(f"{request.method} {request.url.path}", limit=300)
    refused: TunesmithError
    if isinstance(error.__cause__, TunesmithError):  # the body could not be read; FastAPI wraps what said why
        return error_response(error.__cause__, request.state.request_id, error.headers)
    if error.status_code == 404:
        refused = BadRequestError(f"there is no {asked}", hint="GET /openapi.json lists the routes", code="not_found")
    elif error.status_code == 405:
        refused = BadRequestError(
            f"{asked} is not allowed", hint="GET /openapi.json lists the routes", code="method_not_allowed"
        )
    else:
        refused = BadRequestError(str(error.detail))
    refused.status = error.status_code
    return error_response(refused, request.state.request_id, error.headers)


async def _on_database_error(request: Request, error: Exception) -> Response:
    logger.error("request %s: the record store failed", request.state.request_id, exc_info=error)
    refused = UnavailableError("the record store does not answer at the moment", hint="try again")
    return error_response(refused, request.state.request_id)
