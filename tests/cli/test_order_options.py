"""The options of an order: each reaches the field of its name, in every command that takes an order."""

from dataclasses import fields
from pathlib import Path

import typer
from typer.testing import CliRunner

from tunesmith.cli.order_options import OrderOptions, takes_order
from tunesmith.jobs.spec import TrainSpec

OTHERS = {"file", "set_", "advanced"}
GIVEN = {
    "model": "m@1",
    "dataset": "d@2",
    "training_type": "text-generation",
    "method": "LoRA",
    "flavor": "cpu-small",
    "cards": 3,
    "output_model": "o",
    "name": "n",
    "priority": -7,
    "max_run_time_s": 11,
}


def run(*arguments: str) -> TrainSpec:
    """The spec that a command with these arguments gets."""
    found: list[TrainSpec] = []
    app = typer.Typer()

    @app.command()
    @takes_order
    def order(options: OrderOptions, *, twice: bool = False) -> None:
        spec = options.spec()
        assert isinstance(spec, TrainSpec)
        found.extend([spec] * (1 + twice))

    done = CliRunner().invoke(app, [*arguments, "--twice"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(found) == 2
    return found[0]


def test_every_field_of_an_order_has_its_option() -> None:
    options = {option.name for option in fields(OrderOptions)} - OTHERS
    assert options == set(TrainSpec.model_fields) - {"kind", "hyperparameters", "advanced"}
    assert options == GIVEN.keys()


def test_each_option_reaches_the_field_of_its_name() -> None:
    arguments = [text for name, value in GIVEN.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    spec = run(*arguments, "-s", "lora_rank=4", "-a", "seed=5")
    assert {name: getattr(spec, name) for name in GIVEN} == GIVEN
    assert "lora_rank" in str(spec.hyperparameters)
    assert "seed" in str(spec.advanced)


def test_options_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "order.yaml"
    file.write_text("model: a\ndataset: d\nflavor: cpu-small\noutput_model: o\ncards: 2\n")
    spec = run(str(file), "--model", "b")
    assert (spec.model, spec.cards) == ("b", 2)
