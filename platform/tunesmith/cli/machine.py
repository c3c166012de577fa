"""`up`, `down`, `status`, `version`: the platform on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.session import UNREACHABLE, AsJson, messages, open_client, output, read_settings
from tunesmith.cli.terminal import echo, echo_json
from tunesmith.errors import TunesmithError

if TYPE_CHECKING:
    from tunesmith.api.client import Client


def up(
    num_cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that jobs may use; default: all.")] = None,
    object_store_memory: Annotated[
        int | None, typer.Option(min=80_000_000, help="Bytes of Ray's object store; default: Ray's choice.")
    ] = None,
    door: Annotated[bool, typer.Option("--door/--no-door", help="Start the front door, or Ray alone.")] = True,
) -> None:
    """Start Ray and the front door on this machine, or what of them is missing."""
    from tunesmith.local import local_platform

    settings = read_settings()
    with messages().status("starting") as status:
        started = local_platform.up(
            settings, num_cpus=num_cpus, object_store_memory=object_store_memory, door=door, on_step=status.update
        )
    console = output()
    console.print("Tunesmith is up." if started.ray or started.door else "Tunesmith runs already.", style="bold")
    if door:
        console.print(f"  front door  {settings.door_url}  (token: {settings.api_token_path})", soft_wrap=True)
    console.print(f"  Ray         {settings.ray_jobs_url}  (token: {settings.ray_token_path})", soft_wrap=True)
    console.print(f"  home        {settings.home}", soft_wrap=True)
    console.print("`tunesmith down` ends it.")


def down() -> None:
    """End everything that `up` started, jobs included; they go on when it is up again."""
    from tunesmith.local import local_platform

    ended = local_platform.down(read_settings())
    output().print(f"Tunesmith is down: {ended} processes ended." if ended else "Tunesmith was not running.")


def status(as_json: AsJson = False) -> None:
    """What runs, and where."""
    from tunesmith.local import local_platform

    settings = read_settings()
    platform = local_platform.running(settings)
    with open_client(settings) as client:
        door = {"url": client.url, **_health(client)}
    ray = None if platform is None else {"url": settings.ray_jobs_url, "address": platform.ray_address}
    if as_json:
        echo_json(json.dumps({"door": door, "ray": ray, "home": str(settings.home)}, indent=2))
    else:
        console = output()
        version = f", version {door['version']}" if "version" in door else ""
        console.print(f"front door  {door['url']}: {door['status']}{version}", soft_wrap=True)
        console.print(f"Ray         {ray['url'] if ray else 'not started by `tunesmith up`'}", soft_wrap=True)
        console.print(f"storage     {settings.storage_url}", soft_wrap=True)
        console.print(f"home        {settings.home}", soft_wrap=True)
    if door["status"] != "ok":
        raise typer.Exit(UNREACHABLE)


def version() -> None:
    """The version of this command."""
    from tunesmith import __version__

    echo(__version__)


def _health(client: Client) -> dict[str, str]:
    try:
        return client.health().model_dump()
    except TunesmithError as error:
        return {"status": "does not answer", "message": error.message}
