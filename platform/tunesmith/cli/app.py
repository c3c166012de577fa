"""All commands together. What takes long to import is imported inside the commands, so that `--help` is fast."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from tunesmith.cli import assets, audit, evaluations, jobs, machine, model_folders, submit
from tunesmith.cli.session import exit_code, print_error
from tunesmith.errors import TunesmithError

_HELP = """
Fine-tuning on Ray: pick a model, pick data, order a job, watch it, get a new model.

Exit codes: 0 done; 1 the job ended failed, or an unexpected error; 2 bad usage or refused input; 3 the front door, or
what it needs, does not answer; 4 the followed job was stopped; 130 interrupted, or not confirmed.

TUNESMITH_URL and TUNESMITH_TOKEN name another front door and its token than those of this machine.
"""

app = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(machine.up)
app.command()(machine.down)
app.command()(machine.status)
app.command()(machine.version)

_models = typer.Typer(help="Models: what jobs start from, and what they make.", no_args_is_help=True)
_models.command("list")(assets.list_models)
_models.command("show")(assets.show_model)
_models.command("register")(assets.register_model)
_models.command("check")(model_folders.check_model)
_models.command("init")(model_folders.init_model)
_models.command("dataset-readme")(assets.show_dataset_readme)
app.add_typer(_models, name="models")

_datasets = typer.Typer(help="Datasets: what jobs train on.", no_args_is_help=True)
_datasets.command("list")(assets.list_datasets)
_datasets.command("show")(assets.show_dataset)
_datasets.command("register")(assets.register_dataset)
_datasets.command("audit")(audit.audit_dataset)
app.add_typer(_datasets, name="datasets")

_flavors = typer.Typer(help="Flavors: what one worker of a job gets, and its price.", no_args_is_help=True)
_flavors.command("list")(assets.list_flavors)
app.add_typer(_flavors, name="flavors")

app.command()(assets.hyperparameters)

_jobs = typer.Typer(help="Jobs: order, watch, stop, delete.", no_args_is_help=True)
_jobs.command()(submit.submit)
_jobs.command()(submit.render)
_jobs.command("list")(jobs.list_jobs)
_jobs.command()(jobs.show)
_jobs.command()(jobs.watch)
_jobs.command()(jobs.events)
_jobs.command()(jobs.logs)
_jobs.command()(jobs.metrics)
_jobs.command("audit")(audit.show_audit)
_jobs.command()(evaluations.evaluations)
_jobs.command()(jobs.stop)
_jobs.command()(jobs.delete)
app.add_typer(_jobs, name="jobs")


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
