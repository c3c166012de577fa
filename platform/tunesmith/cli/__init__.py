"""The command line `tunesmith`: tables and progress bars for people, `--json` and exit codes for programs."""

from tunesmith.cli.app import main

__all__ = ["main"]
