"""The command line `tunesmith`: tables and progress bars for people, `--json` and exit codes for programs."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.cli.app import app
from tunesmith.cli.session import exit_code, print_error
from tunesmith.errors import TunesmithError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command (default: the process's arguments) and exit with its code."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="tunesmith")
    except TunesmithError as error:
        _end(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "tunesmith"):
            raise
        hint = "pip install 'tunesmith[cluster]' installs what a platform needs"
        _end(TunesmithError(f"this command needs the package {package}, which is not installed", hint=hint))


def _end(error: TunesmithError) -> None:
    print_error(error)
    raise SystemExit(exit_code(error)) from None
