"""Bodies of requests: JSON in UTF-8, finite, with short numbers and few levels, before anything is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from serve_app.error_responses import BadRequestError
from tunesmith.bounds import MAX_DEPTH

MAX_DIGITS = 40
"""Of a whole number. Turning digits into a number takes time that grows with their square."""


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return read_and_handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        return read_json(await self.body())


def read_json(body: bytes) -> Any:
    """The value of a body. JSONDecodeError where it is no JSON, BadRequestError where it is none that is taken."""
    try:
        value = json.loads(body.decode(), parse_int=_whole_number, parse_float=_number, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise _refused(f"the body is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _refused(_DEEP) from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [below for each in level for below in _children(each)]
    if any(isinstance(each, (dict, list)) for each in level):
        raise _refused(_DEEP)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


_DEEP = f"the body has more than {MAX_DEPTH} lists and objects in each other"


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _refused(f"the body has a number of {len(text)} characters; allowed are {MAX_DIGITS}")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _refused(f"the body has the number {text[:MAX_DIGITS]}, which is too large")
    return number


def _no_number(text: str) -> float:
    raise _refused(f"the body has {text}, which is no number of JSON")


def _refused(message: str) -> BadRequestError:
    return BadRequestError(message, hint="send JSON as RFC 8259 has it", code="invalid_json")
