"""`jobs submit` and `jobs render`: from a file and flags to an order, or to a job.json that needs no front door."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import rendering
from tunesmith.cli.order_options import OrderOptions, takes_order
from tunesmith.cli.session import (
    INTERRUPTED,
    AsJson,
    answer,
    follow_to_end,
    messages,
    open_client,
    output,
    read_settings,
)
from tunesmith.cli.terminal import echo, echo_json
from tunesmith.errors import SpecError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.api.client import Client
    from tunesmith.jobs.spec import TrainSpec
    from tunesmith.settings import Settings


@takes_order
def submit(
    order: OrderOptions,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it until it ends.")] = False,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key never orders twice.")] = None,
    as_json: AsJson = False,
) -> None:
    """Order a job: show the plan, ask, submit."""
    spec = order.spec()
    if spec.kind == "register":
        raise SpecError("the file describes a registration", hint=f"tunesmith {spec.asset}s register NAME SOURCE")
    console = messages() if as_json else output()
    with open_client() as client:
        _show_plan(client, spec, console)
        if not yes and not _confirmed():
            messages().print("nothing was submitted; -y submits without asking")
            raise typer.Exit(INTERRUPTED)
        job = client.submit(spec, idempotency_key=idempotency_key)
        if follow:
            console.print(f"{job.id} is submitted; Ctrl-C leaves it running", soft_wrap=True)
            raise typer.Exit(follow_to_end(client, job.id, as_json=as_json))
    answer(job, as_json, lambda: f"{job.id} is submitted; `tunesmith jobs watch {job.id}` shows how it goes")


@takes_order
def render(order: OrderOptions, *, as_json: AsJson = False) -> None:
    """Write a job.json to the storage and print the command that runs it on Ray, without the front door."""
    from tunesmith.clock import utc_text
    from tunesmith.errors import ConflictError
    from tunesmith.jobs.drafting import draft, new_job_id
    from tunesmith.storage import layout
    from tunesmith.storage.urls import open_storage

    settings = read_settings()
    storage = open_storage(settings.storage_url, settings)
    job_id = new_job_id()
    job = draft(order.spec(), storage=storage, account=settings.account, job_id=job_id, created_at=utc_text())
    key = layout.job_json(job_id)
    if not storage.put_if_absent(key, job.model_dump_json(indent=2).encode()):
        raise ConflictError(f"{key} is there already", hint="render again: it gets another id")
    url = layout.join(storage.url, key)
    command = submit_command(url, settings)
    if as_json:
        echo_json(json.dumps({"id": job_id, "url": url, "command": command}, indent=2))
    else:
        echo(f"{url}\n\n{command}")


def submit_command(url: str, settings: Settings) -> str:
    """The shell line with which Ray runs the job of that job.json on this installation's cluster."""
    from tunesmith.local.local_platform import token_environment
    from tunesmith.settings import Settings

    home = {"TUNESMITH_HOME": str(settings.home)}
    defaults = Settings.from_env(home).to_env()
    changed = {variable: text for variable, text in settings.to_env().items() if text != defaults.get(variable)}
    # When Ray stops the job, it waits that long for the checkpoint.
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "30", **home, **changed}
    access = token_environment(settings) if settings.ray_token_path.exists() else {}
    words = [*(f"{variable}={value}" for variable, value in access.items()), "ray", "job", "submit"]
    words += ["--address", settings.ray_jobs_url, "--entrypoint-num-cpus", "0"]
    words += ["--runtime-env-json", json.dumps({"env_vars": variables})]
    words += ["--", settings.python, "-m", "trainers", url]
    return shlex.join(words)


def _show_plan(client: Client, spec: TrainSpec, console: Console) -> None:
    planned = client.plan(spec)
    flavor = next((flavor for flavor in client.flavors().items if flavor.name == planned.flavor), None)
    console.print(rendering.plan(planned, flavor, client.model(planned.model).details))


def _confirmed() -> bool:
    try:
        return typer.confirm("Submit this job?", err=True)
    except typer.Abort:  # no answer: the input has ended
        return False
