"""One tree of errors. Each carries a machine code, a sentence, the fields at fault and a hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MAX_MESSAGE = 10_000
"""Characters of a message: it may quote what somebody else has written."""


class TunesmithError(Exception):
    """The root of every error the platform raises on purpose.

    `code` is for programs and `message` for people: what was given, what is allowed. `fields` are dotted paths into
    the request, `hint` says what to do. `status` is the HTTP status the door answers with and `reason` the word
    (docs/contracts.md, section 6) a job ends with. It pickles, so it crosses Ray unchanged.
    """

    code = "platform_error"
    status = 500
    reason = "platform_error"

    def __init__(
        self, message: str, *, fields: Sequence[str] = (), hint: str | None = None, code: str | None = None
    ) -> None:
        message = message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE - 1]}…"
        super().__init__(message)
        self.message = message
        self.fields = list(fields)
        self.hint = hint
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # Past __init__, which may take other arguments in a subclass.
        return _rebuild, (type(self), self.args, self.__dict__)

    def as_dict(self) -> dict[str, Any]:
        """The body of the one error shape, without its request id."""
        return {"code": self.code, "message": self.message, "fields": self.fields, "hint": self.hint}


class SpecError(TunesmithError):
    """What was asked for is not allowed, or names something that does not exist."""

    code = "invalid_spec"
    status = 422
    reason = "user_error"


class DataError(TunesmithError):
    """A dataset, or a file of it, is not what its name says, or not what the job needs."""

    code = "invalid_data"
    status = 422
    reason = "data_error"


class ModelError(TunesmithError):
    """A model's files do not load, or do not fit together."""

    code = "invalid_model"
    status = 422
    reason = "user_error"


class NotFoundError(TunesmithError):
    """There is nothing by that name."""

    code = "not_found"
    status = 404
    reason = "user_error"


class ConflictError(TunesmithError):
    """The request contradicts what is there already."""

    code = "conflict"
    status = 409
    reason = "user_error"


class AuthError(TunesmithError):
    """No token, or a wrong one."""

    code = "unauthorized"
    status = 401
    reason = "user_error"


class TooLargeError(TunesmithError):
    """The request has more bytes than are taken."""

    code = "body_too_large"
    status = 413
    reason = "user_error"


class SlowRequestError(TunesmithError):
    """The request did not come in the time that it may take."""

    code = "request_timeout"
    status = 408
    reason = "user_error"


class StorageError(TunesmithError):
    """The storage did not do what was asked, after its client's own retries."""

    code = "storage_unavailable"
    status = 503


class DamagedError(TunesmithError):
    """A file in storage is not what its manifest says."""

    code = "damaged_file"


STORAGE_FULL = "storage_full"
"""Code of a StorageError that comes from a storage without room."""
EXIT_STORAGE_FULL = 28
"""Exit code of a driver that ended because of that: ENOSPC of Linux."""


class UnavailableError(TunesmithError):
    """Something that the platform needs does not answer now; the same call may succeed later."""

    code = "unavailable"
    status = 503


class WorkerLostError(TunesmithError):
    """A process or machine that did the work is gone; what it did since its last checkpoint can be done again."""

    code = "worker_lost"
    reason = "worker_lost"


class OutOfMemoryError(TunesmithError):
    """The job needs more memory than its flavor has."""

    code = "out_of_memory"
    reason = "out_of_memory"


class LeaseLostError(TunesmithError):
    """Another process has taken over, as the reconciler or as a job's attempt; this one must stop writing."""

    code = "lease_lost"
    status = 503


def _rebuild(kind: type[TunesmithError], args: tuple[Any, ...], state: dict[str, Any]) -> TunesmithError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A hint that names the known word closest to `name`, or None when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None
