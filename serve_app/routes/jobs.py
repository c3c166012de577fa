"""The routes of jobs: order, plan, look at, stop and delete them, and read what they say while they run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Path, Query, Response
from fastapi.responses import JSONResponse
from pydantic import Field, WithJsonSchema

from serve_app import openapi_examples
from serve_app.door import DoorDep
from serve_app.error_responses import documented
from serve_app.json_bodies import JsonRoute
from serve_app.log_pages import parse_cursor, read_logs, read_metrics
from serve_app.orders import place, plan
from serve_app.views import event_view, job_view
from tunesmith.api.views import EventView, JobView, LogView, Page
from tunesmith.bounds import MAX_LINE
from tunesmith.jobs.attempts import MetricLine
from tunesmith.jobs.audit_report import AuditReport
from tunesmith.jobs.evaluation_record import Evaluation
from tunesmith.jobs.spec import AnyTrainJob, RegisterJob, TrainSpec
from tunesmith.jobs.stored_reports import read_audit, read_evaluations
from tunesmith.records.record import Insertion

router = APIRouter(prefix="/v1", tags=["jobs"], route_class=JsonRoute)

MAX_NAMES = 100
"""How often a parameter may be given that may be given several times."""

# Checked by whoever uses it, with words of its own; the schema only says it.
_Key = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_LINE, "pattern": "^[!-~]*$"})]
IdempotencyKey = Annotated[
    _Key | None,
    Header(
        alias="Idempotency-Key",
        description="1 to 255 visible ASCII characters. The same key and body again: the first answer, and no new job. "
        "A key is known for 30 days.",
    ),
]
State = Literal["pending", "queued", "preparing", "running", "stopping", "completed", "failed", "stopped"]
TrainBody = Annotated[TrainSpec, Body(openapi_examples=openapi_examples.TRAIN)]
Limit = Annotated[int, Query(ge=1, le=1000)]
CursorQuery = Annotated[
    str | None, Query(max_length=MAX_LINE, description="`next` of an earlier page; without it, from the beginning")
]
JobId = Annotated[str, Path(max_length=MAX_LINE)]
Names = Annotated[
    list[Annotated[str, Field(max_length=MAX_LINE)]] | None,
    Query(max_length=MAX_NAMES, description="may be given several times"),
]

REPLAY: dict[int | str, dict[str, Any]] = {
    200: {
        "model": JobView,
        "description": "The first answer to this Idempotency-Key again; no new job",
        "headers": {"Idempotent-Replay": {"description": "`true`", "schema": {"type": "string"}}},
    }
}


def answer_order(insertion: Insertion, *, status: int) -> Response:
    """The first answer, as it was stored with the job; it is marked where it is repeated."""
    headers = {"Location": f"/v1/jobs/{insertion.record.id}"}
    if insertion.replayed:
        status, headers["Idempotent-Replay"] = 200, "true"
    return JSONResponse(insertion.response, status_code=status, headers=headers)


@router.post("/jobs", status_code=201, response_model=JobView, responses={**REPLAY, **documented(400, 409, 413, 422)})
def create_job(door: DoorDep, spec: TrainBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Order a training run. Once this answers, the job is not lost."""
    return answer_order(place(door, spec, key=idempotency_key), status=201)


@router.post("/plans", responses=documented(400, 413, 422))
def plan_job(door: DoorDep, spec: TrainBody) -> AnyTrainJob:
    """What an order would run, with every default filled in. Nothing is recorded."""
    job = plan(door, spec)
    assert not isinstance(job, RegisterJob)
    return job


@router.get("/jobs", responses=documented(404, 422))
def list_jobs(
    door: DoorDep,
    *,
    kind: Literal["train", "register"] | None = None,
    state: Annotated[list[State] | None, Query(max_length=MAX_NAMES, description="may be given several times")] = None,
    limit: Limit = 50,
    after: Annotated[
        str | None, Query(max_length=MAX_LINE, description="`next` of an earlier page: a job's id")
    ] = None,
) -> Page[JobView]:
    """Jobs, newest first."""
    records = door.store.page(kind=kind, states=state or (), limit=limit + 1, after=after)
    items = [job_view(record) for record in records[:limit]]
    return Page(items=items, next=items[-1].id if len(records) > limit else None)


@router.get("/jobs/{job_id}", responses=documented(404, 422))
def get_job(door: DoorDep, job_id: JobId) -> JobView:
    """One job, as it is now."""
    return job_view(door.store.get(job_id))


@router.post("/jobs/{job_id}/stop", responses=documented(404, 409, 422))
def stop_job(door: DoorDep, job_id: JobId) -> JobView:
    """Stop a job; one that runs saves a checkpoint first. A job that is stopping or final stays as it is."""
    return job_view(door.store.request_stop(job_id))


@router.delete("/jobs/{job_id}", status_code=204, responses=documented(404, 409, 422))
def delete_job(door: DoorDep, job_id: JobId) -> None:
    """Delete a final job with its checkpoints, logs and metrics. What it published stays."""
    door.store.delete(job_id)


@router.get("/jobs/{job_id}/events", responses=documented(404, 422))
def list_job_events(
    door: DoorDep,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, le=2**63 - 1, description="a sequence number: `next` of an earlier page")] = 0,
    limit: Limit = 1000,
) -> Page[EventView]:
    """Every change of a job, oldest first."""
    door.store.get(job_id)
    items = [event_view(event) for event in door.store.events(job_id, after=after, limit=limit)]
    return Page(items=items, next=str(items[-1].seq if items else after))


@router.get("/jobs/{job_id}/logs", responses=documented(404, 422))
def list_job_logs(
    door: DoorDep,
    job_id: JobId,
    rank: Annotated[
        str, Query(max_length=6, pattern=r"^(driver|[0-9]{1,6})$", description="a worker's number")
    ] = "driver",
    after: CursorQuery = None,
) -> Page[LogView]:
    """A log, about 1 MiB a page, over all attempts in order. `next` is always given: ask again for what came since."""
    return read_logs(door.storage, door.store.get(job_id), rank=rank, after=parse_cursor(after))


@router.get("/jobs/{job_id}/metrics", responses=documented(404, 422))
def list_job_metrics(
    door: DoorDep,
    job_id: JobId,
    name: Names = None,
    after: CursorQuery = None,
) -> Page[MetricLine]:
    """Metrics over all attempts in order. `next` is always given: ask again for what came since."""
    return read_metrics(door.storage, door.store.get(job_id), names=name or [], after=parse_cursor(after))


@router.get("/jobs/{job_id}/audit", responses=documented(404, 422))
def get_job_audit(door: DoorDep, job_id: JobId) -> AuditReport:
    """What the job trains: counts, lengths, and rows with their trained tokens marked."""
    return read_audit(door.storage, door.store.get(job_id).id)


@router.get("/jobs/{job_id}/evaluations", responses=documented(404, 422))
def list_job_evaluations(
    door: DoorDep,
    job_id: JobId,
    after: Annotated[int, Query(ge=-1, le=2**63 - 1, description="a step: `next` of an earlier page")] = -1,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[Evaluation]:
    """How the model did on the held-out rows, by its step: before the training, at checkpoints, and at the end."""
    items = read_evaluations(door.storage, door.store.get(job_id).id, after=after, limit=limit)
    return Page(items=items, next=str(items[-1].step if items else after))
