"""What every request passes first: its id, its token, the size of its body, and the promise that an answer comes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import uuid
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.error_responses import error_response
from tunesmith.api.request_bounds import MAX_BODY_BYTES, MAX_BODY_S
from tunesmith.errors import AuthError, SlowRequestError, TooLargeError, TunesmithError, UnavailableError

OPEN_PATHS = frozenset({"/healthz"})
"""Answered without a token."""

logger = logging.getLogger(__name__)


class DoorMiddleware:
    """ASGI middleware, the outermost of the door.

    `proxied`: Serve's proxy gives every request its X-Request-Id and writes it into the answer itself.
    """

    def __init__(self, app: ASGIApp, *, token_path: Path, proxied: bool) -> None:
        self._app = app
        self._token_path = token_path
        self._proxied = proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not self._proxied:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            self._check_token(scope)
            await self._app(scope, _replayed(await _read_body_in_time(receive), receive), send_with_id)
        except TunesmithError as error:
            await error_response(error, request_id)(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            if started:
                raise
            fault = TunesmithError("the platform failed at this request", hint="its log has the request id")
            await error_response(fault, request_id)(scope, receive, send_with_id)

    def _check_token(self, scope: Scope) -> None:
        """Raise AuthError unless the request carries the token in the file at `token_path`.

        The file is read anew for every request. Where there is none, no token is asked for.
        """
        if scope["path"] in OPEN_PATHS:
            return
        try:
            token = self._token_path.read_bytes().strip()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UnavailableError(f"the door's token cannot be read: {error.strerror}") from error
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), token)
        if not (token and right and scheme.lower() == "bearer"):
            raise AuthError(
                "this needs the header `Authorization: Bearer TOKEN` with the door's token",
                hint=f"the token is in the file {self._token_path.name} of the installation's home",
            )


async def _read_body_in_time(receive: Receive, *, limit_s: float = MAX_BODY_S) -> list[Message]:
    try:
        async with asyncio.timeout(limit_s):
            return await _read_body(receive)
    except TimeoutError:
        raise SlowRequestError(
            f"the body of a request may take {limit_s:g} s, took longer", hint="send the request again"
        ) from None


async def _read_body(receive: Receive) -> list[Message]:
    """The messages that carry the request's body; TooLargeError as soon as there are too many bytes."""
    messages: list[Message] = []
    size = 0
    while size <= MAX_BODY_BYTES:
        if messages and not messages[-1].get("more_body"):
            return messages
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
    raise TooLargeError(
        f"the body of a request may have {MAX_BODY_BYTES} bytes, got more",
        hint="put data into storage and register it from there",
    )


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives these messages first."""
    left = iter(messages)

    async def replay() -> Message:
        message = next(left, None)
        return message if message is not None else await receive()

    return replay


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[!-~]{1,128}", given) else uuid.uuid4().hex
