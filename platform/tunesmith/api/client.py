"""The HTTP API of the front door as typed calls; their answers are those of `tunesmith.api.views`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from tunesmith.api.views import AssetView, ErrorBody, EventView, HealthView, JobView, LogView, Page
from tunesmith.errors import (
    AuthError,
    ConflictError,
    DataError,
    ModelError,
    NotFoundError,
    SpecError,
    StorageError,
    TunesmithError,
    UnavailableError,
)
from tunesmith.jobs.attempts import MetricLine
from tunesmith.jobs.audit_report import AuditReport
from tunesmith.jobs.evaluation_record import Evaluation
from tunesmith.jobs.flavors import Flavor
from tunesmith.jobs.spec import TrainJob, TrainSpec, parse_job
from tunesmith.jobs.states import FINAL

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

_AGAIN = frozenset({502, 503, 504})
_BY_CODE = {kind.code: kind for kind in (DataError, ModelError, StorageError)}
_BY_STATUS = {401: AuthError, 403: AuthError, 404: NotFoundError, 409: ConflictError, 503: UnavailableError}


class Client:
    """A front door at `url`. What the door refuses is raised as the same TunesmithError, with its code, message, fields
    and hint; UnavailableError is raised where it does not answer.

    Every call may be repeated without harm, because what creates something carries an idempotency key. So a call that
    gets no answer, 502, 503 or 504, or a 404 that is not the door's own, is tried again with growing pauses until
    `retry_s` seconds have passed; a door that has never answered is given up after `first_retry_s`. A context manager.
    """

    def __init__(
        self, url: str, token: str | None = None, *, retry_s: float = 60.0, first_retry_s: float = 1.0
    ) -> None:
        self.url = url.rstrip("/")
        self._retry_s = retry_s
        self._first_retry_s = first_retry_s
        self._answered = False
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(60.0, connect=5.0),
            # A proxy named in the environment cannot reach this machine's loopback.
            trust_env=httpx.URL(self.url).host not in ("127.0.0.1", "localhost", "::1"),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def health(self) -> HealthView:
        """Whether the door answers, and its version; needs no token."""
        return self._one(HealthView, "GET", "/healthz")

    def flavors(self) -> Page[Flavor]:
        return Page[Flavor].model_validate_json(self._call("GET", "/v1/flavors").content)

    def models(self, *, name: str | None = None) -> Page[AssetView]:
        return self._assets("/v1/models", name)

    def datasets(self, *, name: str | None = None) -> Page[AssetView]:
        return self._assets("/v1/datasets", name)

    def model(self, ref: str) -> AssetView:
        """A version by NAME@VERSION, or the newest one by NAME."""
        return self._one(AssetView, "GET", f"/v1/models/{_part(ref)}")

    def dataset_readme(self, ref: str) -> str:
        """The `dataset_readme.md` of a model that brings its own training. NotFoundError where it brings none."""
        return self._call("GET", f"/v1/models/{_part(ref)}/dataset-readme").text

    def dataset(self, ref: str) -> AssetView:
        return self._one(AssetView, "GET", f"/v1/datasets/{_part(ref)}")

    def register_model(
        self, name: str, source: str, *, task_type: str | None = None, idempotency_key: str | None = None
    ) -> JobView:
        """The job that registers what lies at `source`, which the cluster can read."""
        body = {"name": name, "source": source} | ({"task_type": task_type} if task_type else {})
        return self._create("/v1/models", body, idempotency_key)

    def register_dataset(self, name: str, source: str, *, idempotency_key: str | None = None) -> JobView:
        return self._create("/v1/datasets", {"name": name, "source": source}, idempotency_key)

    def plan(self, spec: TrainSpec) -> TrainJob:
        """What the job would run with; nothing is recorded."""
        job = parse_job(self._call("POST", "/v1/plans", json=_body(spec)).content)
        assert isinstance(job, TrainJob), "the plan of a training run is one"
        return job

    def submit(self, spec: TrainSpec, *, idempotency_key: str | None = None) -> JobView:
        return self._create("/v1/jobs", _body(spec), idempotency_key)

    def jobs(
        self, *, kind: str | None = None, states: Sequence[str] = (), limit: int = 50, after: str | None = None
    ) -> Page[JobView]:
        """Newest first; `after` is the `next` of the page before."""
        query = _query(kind=kind, state=list(states), limit=limit, after=after)
        return Page[JobView].model_validate_json(self._call("GET", "/v1/jobs", params=query).content)

    def job(self, job_id: str) -> JobView:
        return self._one(JobView, "GET", f"/v1/jobs/{_part(job_id)}")

    def stop(self, job_id: str) -> JobView:
        return self._one(JobView, "POST", f"/v1/jobs/{_part(job_id)}/stop")

    def delete(self, job_id: str) -> None:
        self._call("DELETE", f"/v1/jobs/{_part(job_id)}")

    def events(self, job_id: str, *, after: str | None = None, limit: int | None = None) -> Page[EventView]:
        """Some events, oldest first; `next` leads to the following ones, here and in the three methods below."""
        query = _query(after=after, limit=limit)
        return Page[EventView].model_validate_json(
            self._call("GET", f"/v1/jobs/{_part(job_id)}/events", params=query).content
        )

    def logs(self, job_id: str, *, rank: str = "driver", after: str | None = None) -> Page[LogView]:
        query = _query(rank=rank, after=after)
        return Page[LogView].model_validate_json(
            self._call("GET", f"/v1/jobs/{_part(job_id)}/logs", params=query).content
        )

    def metrics(self, job_id: str, *, names: Sequence[str] = (), after: str | None = None) -> Page[MetricLine]:
        query = _query(name=list(names), after=after)
        answer = self._call("GET", f"/v1/jobs/{_part(job_id)}/metrics", params=query)
        return Page[MetricLine].model_validate_json(answer.content)

    def evaluations(self, job_id: str, *, after: str | None = None) -> Page[Evaluation]:
        answer = self._call("GET", f"/v1/jobs/{_part(job_id)}/evaluations", params=_query(after=after))
        return Page[Evaluation].model_validate_json(answer.content)

    def audit(self, job_id: str) -> AuditReport:
        """What the job trains. NotFoundError before it is audited."""
        return self._one(AuditReport, "GET", f"/v1/jobs/{_part(job_id)}/audit")

    def follow_events(self, job_id: str, *, after: str | None = None, poll_s: float = 1.0) -> Iterator[EventView]:
        """Events as they come, until the job is final."""
        return self._follow(job_id, lambda place: self.events(job_id, after=place), after, poll_s)

    def follow_logs(
        self, job_id: str, *, rank: str = "driver", after: str | None = None, poll_s: float = 1.0
    ) -> Iterator[LogView]:
        return self._follow(job_id, lambda place: self.logs(job_id, rank=rank, after=place), after, poll_s)

    def follow_metrics(
        self, job_id: str, *, names: Sequence[str] = (), after: str | None = None, poll_s: float = 1.0
    ) -> Iterator[MetricLine]:
        return self._follow(job_id, lambda place: self.metrics(job_id, names=names, after=place), after, poll_s)

    def wait(self, job_id: str, *, on_event: Callable[[EventView], None] = lambda _: None) -> JobView:
        """The job once it is final; `on_event` sees its events meanwhile."""
        for event in self.follow_events(job_id):
            on_event(event)
        return self.job(job_id)

    def _follow(
        self, job_id: str, read: Callable[[str | None], Page[T]], after: str | None, poll_s: float
    ) -> Iterator[T]:
        while True:
            # Asked first: what a job wrote before it was final is in the page that is read afterwards.
            final = self.job(job_id).state in FINAL
            items, after = read_on(read, after)
            yield from items
            if final:
                return
            time.sleep(poll_s)

    def _assets(self, path: str, name: str | None) -> Page[AssetView]:
        return Page[AssetView].model_validate_json(self._call("GET", path, params=_query(name=name)).content)

    def _one(self, model: type[M], method: str, path: str, *, json: Any = None) -> M:
        return model.model_validate_json(self._call(method, path, json=json).content)

    def _create(self, path: str, body: Mapping[str, Any], key: str | None) -> JobView:
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return JobView.model_validate_json(self._call("POST", path, json=body, headers=headers).content)

    def _call(self, method: str, path: str, **request: Any) -> httpx.Response:
        deadline = time.monotonic() + (self._retry_s if self._answered else self._first_retry_s)
        pause_s = 0.1
        while True:
            response, failure = self._try(method, path, **request)
            if response is not None and response.status_code not in _AGAIN and not _is_proxys(response):
                self._answered = True
                if response.is_success:
                    return response
                raise self._refusal(response)
            if time.monotonic() + pause_s > deadline:
                raise self._refusal(response) if response is not None else self._unreachable(failure)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)

    def _try(self, method: str, path: str, **request: Any) -> tuple[httpx.Response | None, httpx.TransportError | None]:
        try:
            return self._http.request(method, path, **request), None
        except httpx.TransportError as error:
            return None, error

    def _unreachable(self, error: httpx.TransportError | None) -> UnavailableError:
        return UnavailableError(
            f"the front door at {self.url} does not answer: {str(error) or type(error).__name__}",
            hint="`tunesmith up` starts one on this machine; TUNESMITH_URL names another",
            code="door_unreachable",
        )

    def _refusal(self, response: httpx.Response) -> TunesmithError:
        """The error that the door answered with. An answer without the one error shape is quoted."""
        status = response.status_code
        other = SpecError if status < 500 else TunesmithError
        try:
            given = ErrorBody.model_validate_json(response.content).error
        except ValidationError:
            kind = _BY_STATUS.get(status, other)
            error = kind(f"{self.url} answered {status}: {response.text[:200]}", hint="is it a Tunesmith front door?")
        else:
            kind = _BY_CODE.get(given.code) or _BY_STATUS.get(status, other)
            error = kind(given.message, fields=given.fields, hint=given.hint, code=given.code)
        error.status = status
        return error


def _is_proxys(response: httpx.Response) -> bool:
    """Whether a 404 is not the door's: Serve's proxy knows no route before the door has told it of its own."""
    if response.status_code != 404:
        return False
    try:
        ErrorBody.model_validate_json(response.content)
    except ValidationError:
        return True
    return False


def read_on(read: Callable[[str | None], Page[T]], after: str | None = None) -> tuple[list[T], str | None]:
    """Everything that a growing record holds now, page by page, and the place to read on from."""
    items: list[T] = []
    while True:
        page = read(after)
        items += page.items
        if page.next is None or page.next == after:
            return items, after
        after = page.next


def _part(text: str) -> str:
    """A user's word as one part of a path."""
    return quote(text, safe="@")


def _body(spec: TrainSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_unset=True)


def _query(**given: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None and value != []}
