"""What all commands share: the door they talk to, the two outputs, exit codes, errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Terminal, echo_json, shown
from tunesmith.errors import TunesmithError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType

    from tunesmith.api.client import Client
    from tunesmith.settings import Settings

FAILED, REFUSED, UNREACHABLE, STOPPED, INTERRUPTED = 1, 2, 3, 4, 130
_BY_STATE = {"completed": 0, "failed": FAILED, "stopped": STOPPED}
"""Exit code of a command that followed a job to its end."""

AsJson = Annotated[bool, typer.Option("--json", help="Print the API's JSON, and nothing else.")]


def read_settings() -> Settings:
    """The settings of this process; imported here, because `--help` needs none."""
    from tunesmith.settings import Settings

    return Settings.from_env()


def open_client(settings: Settings | None = None) -> Client:
    """A client of the door that the environment names, or of this machine's."""
    from tunesmith.api.client import Client

    settings = settings or read_settings()
    url = os.environ.get("TUNESMITH_URL") or settings.door_url
    return Client(url, _token(settings, url))


def _token(settings: Settings, url: str) -> str | None:
    given = os.environ.get("TUNESMITH_TOKEN")
    # This machine's token is for its own door alone.
    if given or url.rstrip("/") != settings.door_url:
        return given
    try:
        return settings.api_token_path.read_text().strip()
    except FileNotFoundError:
        return None


def output() -> Console:
    return _console(stderr=False)


def messages() -> Console:
    """Where everything goes that is not the answer itself."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # Away from a terminal nothing is cut to its width.
    return Terminal(stderr=stderr, width=None if stream.isatty() else 240, highlight=False, markup=False)


def answer(view: BaseModel, as_json: bool, draw: Callable[[], RenderableType]) -> None:
    """Print what a command was asked for: the API's JSON, or what `draw` makes of it for people."""
    if as_json:
        echo_json(view.model_dump_json(indent=2))
    else:
        output().print(draw(), soft_wrap=True)


def follow_to_end(client: Client, job_id: str, *, as_json: bool) -> int:
    """Show a job until it ends, on stderr where stdout belongs to the JSON of the job as it ended; the exit code."""
    from tunesmith.cli.progress import show_progress

    job = show_progress(client, job_id, messages() if as_json else output())
    if as_json:
        echo_json(job.model_dump_json(indent=2))
    return _BY_STATE[job.state]


def print_error(error: TunesmithError) -> None:
    """The error for people, on stderr: what is wrong, where, what to do."""
    console = messages()
    # A message of several lines cannot look like several messages.
    message = shown(error.message, lines=True).replace("\n", "\n    ")
    console.print(f"error: {message}", style="red", soft_wrap=True)
    if error.fields:
        console.print(f"  fields: {shown(', '.join(error.fields))}", soft_wrap=True)
    if error.hint:
        console.print(f"  hint: {shown(error.hint)}", soft_wrap=True)


def exit_code(error: TunesmithError) -> int:
    if error.status == 503:
        return UNREACHABLE
    return REFUSED if error.status < 500 else FAILED
