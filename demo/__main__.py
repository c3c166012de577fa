"""`make demo`: one fine-tuning job on this machine, from the order to the new model's answers beside its base's.

Its platform lives in `.demo/`, on ports of its own, and goes down at the end, however the demo ends. Environment:

DATA            your own file (jsonl, json, csv, parquet) in place of the demo's dataset
PROMPT_FIELD    its column with the prompts; default: prompt
RESPONSE_FIELD  its column with the responses; default: response
MAX_STEPS       optimizer steps at most; default: all rows once, 50 steps with DATA
SEED            seed of the job; default: 0
FLAVOR          what the job's worker gets; default: cpu-medium
KEEP            1: the platform stays up
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from demo.interrupts import interrupt_on_leave, uninterrupted
from demo.job import FREIGHT, Data, prepare, run
from trainers.isolation.bubblewrap import IsolationError, find_bubblewrap
from tunesmith.api.client import Client
from tunesmith.cli.session import INTERRUPTED, exit_code, print_error
from tunesmith.errors import SpecError, TunesmithError
from tunesmith.local import local_platform, ports
from tunesmith.settings import Settings

FOLDER = Path(__file__).resolve().parent.parent / ".demo"
"""What the demo makes. Beside its platform's home, for nothing in a home may be registered."""
HOME = FOLDER / "home"


@dataclass(frozen=True)
class Options:
    """What the environment asks for."""

    data: Data
    max_steps: int | None
    seed: int
    flavor: str | None
    keep: bool

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Options:
        given = {name: value for name, value in env.items() if value}
        file, fields = given.get("DATA"), [name for name in ("PROMPT_FIELD", "RESPONSE_FIELD") if name in given]
        if fields and not file:
            raise SpecError(f"{' and '.join(fields)} without DATA", fields=fields, hint="DATA=FILE names your own file")
        data = FREIGHT
        if file:
            prompt_field, response_field = given.get("PROMPT_FIELD", "prompt"), given.get("RESPONSE_FIELD", "response")
            data = Data(Path(file).expanduser().resolve(), prompt_field, response_field)
        return cls(
            data=data,
            max_steps=_number(given, "MAX_STEPS", 50 if file else None),
            seed=_number(given, "SEED", None) or 0,
            flavor=given.get("FLAVOR"),
            keep=given.get("KEEP", "0") != "0",
        )


def main() -> int:
    # kill and a closed terminal take the platform down, too, as Ctrl-C does.
    interrupt_on_leave()
    # Away from a terminal four columns of text need more than the usual 80 characters.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        options = Options.from_env(os.environ)
        prepared = prepare(options.data, FOLDER / "data")
        with _platform(console, keep=options.keep) as settings, _client(settings) as client:
            done = run(
                client,
                prepared,
                console,
                folder=FOLDER,
                max_steps=options.max_steps,
                seed=options.seed,
                flavor=options.flavor,
            )
        return 0 if done else 1
    except TunesmithError as error:
        print_error(error)
        return exit_code(error)
    except KeyboardInterrupt:
        console.print("interrupted", style="yellow")
        return INTERRUPTED


@contextmanager
def _platform(console: Console, *, keep: bool) -> Iterator[Settings]:
    """The demo's platform, started where it does not run already."""
    settings = _settings(console)
    try:
        with console.status("starting") as status:
            local_platform.up(
                settings,
                num_cpus=max(2, os.cpu_count() or 1),
                object_store_memory=256 << 20,
                on_step=lambda step: status.update(step),
            )
        console.print(
            f"The platform is up: {settings.door_url}, Ray's dashboard {settings.ray_jobs_url}", soft_wrap=True
        )
        yield settings
    finally:
        if keep and local_platform.running(settings):
            _say_how_to_go_on(console, settings)
        else:
            with uninterrupted(), console.status("taking the platform down"):
                ended = local_platform.down(settings)
            console.print(f"The platform is down: {ended} processes ended. KEEP=1 leaves it up.", style="dim")


def _settings(console: Console) -> Settings:
    """The settings of the demo's platform where it is still up, else settings with free ports.

    A machine that cannot isolate, such as most containers, shows the demo all the same: its model and rows are trusted.
    """
    plain = Settings.from_env({"TUNESMITH_HOME": str(HOME)})
    there = local_platform.running(plain)
    if there is not None:
        return Settings.from_env(there.settings)
    door, dashboard, ray = ports.free(3)
    chosen = {"HOME": HOME, "PORT": door, "RAY_DASHBOARD_PORT": dashboard, "RAY_PORT": ray}
    try:
        find_bubblewrap()
    except IsolationError as error:
        console.print(f"{error.message}; the demo reads its own files without walls", style="yellow", soft_wrap=True)
        chosen["ISOLATION"] = "none"
    return Settings.from_env({f"TUNESMITH_{name}": str(value) for name, value in chosen.items()})


def _client(settings: Settings) -> Client:
    return Client(settings.door_url, settings.api_token_path.read_text().strip())


def _say_how_to_go_on(console: Console, settings: Settings) -> None:
    command = Path(sys.executable).with_name("tunesmith")
    home = f"TUNESMITH_HOME={settings.home}"
    console.print(
        f"\nThe platform stays up: {settings.door_url}, its token in {settings.api_token_path}", soft_wrap=True
    )
    console.print(f"  go on:  {home} TUNESMITH_PORT={settings.port} {command} jobs list", soft_wrap=True)
    console.print(f"  end it: {home} {command} down", soft_wrap=True)


def _number(given: Mapping[str, str], name: str, default: int | None) -> int | None:
    try:
        return int(given[name]) if name in given else default
    except ValueError:
        raise SpecError(f"{name} must be a whole number, got {given[name]!r}", fields=[name]) from None


if __name__ == "__main__":
    sys.exit(main())
