"""`jobs list|show|watch|events|logs|metrics|stop|delete`: what became of orders."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.text import Text

from tunesmith.cli import rendering
from tunesmith.cli.session import AsJson, answer, follow_to_end, messages, open_client, output
from tunesmith.cli.terminal import echo, echo_json
from tunesmith.errors import NotFoundError

JobId = Annotated[str, typer.Argument(metavar="JOB")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends; with --json a line each.")]


def list_jobs(
    *,
    kind: Annotated[str | None, typer.Option(help="train or register; default: both.")] = None,
    state: Annotated[list[str] | None, typer.Option(help="Only jobs of this state; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    after: Annotated[str | None, typer.Option(help="Go on after this job.")] = None,
    as_json: AsJson = False,
) -> None:
    """Jobs, newest first."""
    with open_client() as client:
        page = client.jobs(kind=kind, states=state or (), limit=limit, after=after)
    answer(page, as_json, lambda: rendering.jobs(page.items))
    if page.next is not None and not as_json:
        messages().print(f"older ones: --after {page.next}")


def show(job_id: JobId, as_json: AsJson = False) -> None:
    """One job: where it is, and what it runs with."""
    with open_client() as client:
        job = client.job(job_id)
        details: dict[str, Any] = {}
        with suppress(NotFoundError):  # its model may have been deleted
            details = client.model(job.job["model"]).details if job.kind == "train" and not as_json else {}
    answer(job, as_json, lambda: rendering.job(job, details))


def watch(job_id: JobId, as_json: AsJson = False) -> None:
    """Watch a job until it ends; the exit code says how it did."""
    with open_client() as client:
        raise typer.Exit(follow_to_end(client, job_id, as_json=as_json))


def events(job_id: JobId, follow: Follow = False, as_json: AsJson = False) -> None:
    """Everything that happened to a job, oldest first."""
    from tunesmith.api.client import read_on
    from tunesmith.api.views import EventView, Page
    from tunesmith.cli.progress import event_text

    console = output()
    with open_client() as client:
        if follow:
            for event in client.follow_events(job_id):
                if as_json:
                    echo_json(event.model_dump_json())
                else:
                    console.print(event_text(event), soft_wrap=True)
            return
        items, place = read_on(lambda after: client.events(job_id, after=after))
    page = Page[EventView](items=items, next=place)
    answer(page, as_json, lambda: Text("\n").join(event_text(event) for event in items))


def logs(
    job_id: JobId,
    *,
    follow: Follow = False,
    rank: Annotated[str, typer.Option(help="A worker's number, or `driver`.")] = "driver",
    as_json: AsJson = False,
) -> None:
    """What the job printed, all its attempts in turn."""
    from tunesmith.api.client import read_on
    from tunesmith.api.views import LogView, Page

    with open_client() as client:
        if follow:
            for part in client.follow_logs(job_id, rank=rank):
                if as_json:
                    echo_json(part.model_dump_json())
                else:
                    echo(part.text, nl=False)
            return
        items, place = read_on(lambda after: client.logs(job_id, rank=rank, after=after))
    if as_json:
        echo_json(Page[LogView](items=items, next=place).model_dump_json(indent=2))
    else:
        echo("".join(part.text for part in items), nl=False)


def metrics(
    job_id: JobId,
    *,
    follow: Follow = False,
    name: Annotated[list[str] | None, typer.Option(help="Only this metric; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """What the job measured: a row a step, or with --follow a line a figure."""
    from tunesmith.api.client import read_on
    from tunesmith.api.views import Page
    from tunesmith.jobs.attempts import MetricLine

    with open_client() as client:
        if follow:
            for line in client.follow_metrics(job_id, names=name or ()):
                if as_json:
                    echo_json(line.model_dump_json())
                else:
                    echo(rendering.metric_text(line))
            return
        lines, place = read_on(lambda after: client.metrics(job_id, names=name or (), after=after))
    answer(Page[MetricLine](items=lines, next=place), as_json, lambda: rendering.metrics(lines))


def stop(job_id: JobId, as_json: AsJson = False) -> None:
    """Stop a job; one that trains saves a checkpoint first. One that has ended stays as it is."""
    with open_client() as client:
        job = client.stop(job_id)
    answer(job, as_json, lambda: f"{job.id} is {job.state}")


def delete(job_id: JobId) -> None:
    """Delete a job that has ended, with its logs, metrics and checkpoints; the model it made stays."""
    with open_client() as client:
        client.delete(job_id)
    output().print(f"{job_id} is deleted")
