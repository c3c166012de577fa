"""The options that an order is made of: one definition for every command that takes an order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from tunesmith.cli.spec_files import read_order, with_flags

if TYPE_CHECKING:
    from tunesmith.jobs.spec import RegisterSpec, TrainSpec

Type = Annotated[
    str | None, typer.Option(help="text-question-answering, text-generation or custom; default: the model's.")
]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="NAME=VALUE", help="A hyperparameter.")]
Advanced = Annotated[list[str] | None, typer.Option("--advanced", "-a", metavar="NAME=VALUE", help="An advanced one.")]


@dataclass(frozen=True)
class OrderOptions:
    """A file and the options over it. Those that are not `file`, `set_` or `advanced` are named as in the spec."""

    file: Annotated[
        str | None, typer.Argument(help="The order as YAML or JSON; `-`: from stdin. Options override it.")
    ] = None
    model: Annotated[str | None, typer.Option(metavar="NAME[@VERSION]", help="What to tune.")] = None
    dataset: Annotated[str | None, typer.Option(metavar="NAME[@VERSION]", help="What to train on.")] = None
    training_type: Type = None
    method: Annotated[str | None, typer.Option(help="LoRA; with custom, one of the model's own.")] = None
    set_: Set = None
    advanced: Advanced = None
    flavor: Annotated[str | None, typer.Option(help="What one worker gets; `tunesmith flavors list`.")] = None
    cards: Annotated[int | None, typer.Option(help="Accelerators in all; with a CPU flavor: workers. Default: 1.")] = (
        None
    )
    output_model: Annotated[str | None, typer.Option(help="Name of the new model.")] = None
    name: Annotated[str | None, typer.Option(help="Name of the job; default: the new model's.")] = None
    priority: Annotated[int | None, typer.Option(help="-100 to 100; higher goes first.")] = None
    max_run_time_s: Annotated[
        int | None, typer.Option(help="Seconds after which the job is stopped with a checkpoint.")
    ] = None

    def spec(self) -> TrainSpec | RegisterSpec:
        """What the file and the options ask for. SpecError says what is wrong with it."""
        from tunesmith.jobs.spec import parse_spec

        order = read_order(self.file) if self.file is not None else {}
        given = {option.name: getattr(self, option.name) for option in fields(self)}
        flags = {
            name: value
            for name, value in given.items()
            if value is not None and name not in ("file", "set_", "advanced")
        }
        return parse_spec(with_flags(order, flags, hyperparameters=self.set_ or (), advanced=self.advanced or ()))


def takes_order(command: Callable[..., None]) -> Callable[..., None]:
    """A command for Typer with the options of an order beside its own; `command` gets them as its first argument."""
    hints = get_type_hints(OrderOptions, include_extras=True)
    names = [option.name for option in fields(OrderOptions)]

    @wraps(command)
    def with_options(**given: Any) -> None:
        command(OrderOptions(**{name: given.pop(name) for name in names}), **given)

    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[name]) for name in names
    ]
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    # Typer reads both to find a command's options.
    with_options.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in [*options, *own]}
    return with_options
